"""Files: written whole or not at all and never over an input, owned, read as text or JSON with clear errors, digested;
and what the processor is.
"""

import codecs
import fcntl
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dllm.errors import Failure, UserError, first_line

LOCK = ".dllm_lock"  # the file in a folder by which a run owns it
LOCK_SECONDS = 3.0  # a run that was just killed may take a moment to let go


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, or leave it as it was. Creates the folder.

    Raises: Failure if the disk is full or the folder cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def write_json(path: Path, record: dict) -> None:
    """`write_atomically` of a record, as indented JSON; text may hold halves of surrogate pairs."""
    write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def own_folder(folder: Path, rank: int = 0) -> Iterator[None]:
    """Own a folder while a run writes to it, so that no other run does. Creates the folder.

    The lock is the kernel's (flock on a hidden file that names the owner). It ends with its process, however that ends,
    and NFS keeps it for all machines.
    Args:
        rank: of the process, where several share the folder; each keeps out those of its rank in other runs.
    Raises: UserError naming the process and host that own the folder; Failure if it cannot be written.
    """
    path = folder / (f"{LOCK}_{rank}" if rank else LOCK)
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            if not lock_within(file, LOCK_SECONDS):
                file.seek(0)
                raise UserError(f"{folder} belongs to a run that is going on, {file.read() or 'another process'}; wait "
                                "for its end, stop it, or name another folder")
        except OSError as error:  # a disk without locks
            print(f"note: {folder} cannot be locked ({error.strerror}); let no other run write to it", file=sys.stderr)
        try:
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


def lock_within(file, seconds: float) -> bool:
    """Whether the file could be locked within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def check_outputs(outputs: dict[str, Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is an input: a file of them, or a file that is there already in a folder of them.

    Args:
        outputs: by the flag that names it.
    Raises: UserError naming the flag; also if two flags name one file, or one a folder.
    """
    given = {flag: os.path.realpath(path) for flag, path in outputs.items() if path is not None}
    read = [os.path.realpath(Path(path).expanduser()) for path in inputs if path is not None]
    for flag, path in given.items():
        if os.path.isdir(path):
            raise UserError(f"{flag} {outputs[flag]} is a folder; name a file")
        other = next((other for other in given if other != flag and given[other] == path), None)
        if other:
            raise UserError(f"{flag} and {other} name the same file, {outputs[flag]}; give each its own")
        for known in read:
            inside = path == known or path.startswith(os.path.join(known, ""))
            if inside and os.path.isfile(path) or os.path.exists(path) and os.path.exists(known) \
                    and os.path.samefile(path, known):
                raise UserError(f"{flag} {outputs[flag]} would overwrite what the command reads; name another file")


def check_new_folder(folder: Path) -> None:
    """Refuse to write a folder that holds something, or a file. Raises: UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a new folder")


def cannot_write(path: Path, error: Exception) -> Failure:
    """The Failure that says why a path could not be written; a full disk is an OSError, or torch's error over one."""
    if isinstance(error, Failure):
        return error
    return Failure(f"cannot write {path}: {find_reason(error)}; free space or choose another folder (what was there is "
                   "unchanged)")


def find_reason(error: BaseException) -> str:
    """What the system says below an error, or else its first line: torch covers a full disk by errors of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "strerror", None) or first_line(error)


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The JSON object in `path`; `missing`, if given, stands for a file that is not there.

    Raises: UserError naming the file, if it cannot be read or is not a JSON object.
    """
    try:
        raw = json.loads(decode_text(path.read_bytes()))
    except FileNotFoundError:
        if missing is None:
            raise UserError(f"{path} does not exist; a model folder holds config.json and model.safetensors") from None
        return missing
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a readable JSON file ({error}); restore it from its source") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}, not an object; restore it from its source")
    return raw


def find_encoding(start: bytes) -> str:
    """The encoding that a byte order mark tells; UTF-8 without one."""
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    return next((encoding for mark, encoding in marks if start.startswith(mark)), "utf-8")


def decode_text(content: bytes) -> str:
    """The text of a file, without its byte order mark. Raises: UnicodeDecodeError."""
    return content.decode(find_encoding(content))


def digest_files(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """$DLLM_CACHE, or ~/.cache/dllm: what can be computed again from what the user gave."""
    return Path(os.environ.get("DLLM_CACHE") or Path.home() / ".cache" / "dllm")


def name_processor() -> str:
    return _read_processor("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """The instructions that the processor has by Linux's names, such as avx512_bf16; none where they cannot be read."""
    return set(_read_processor("flags").split())


def _read_processor(field: str) -> str:
    """A field of the first processor; empty if there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""
