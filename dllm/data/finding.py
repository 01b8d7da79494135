"""Find the files that data.train_path means, and datasets of the Hugging Face hub.

What is in a folder but not meant, such as a test split or the licence of a dataset, is left out and named.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dllm.data.formats import TABLES, suffix_of
from dllm.errors import Failure, UserError, first_line
from dllm.files import LOCK, read_json

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|test|testing|eval|evaluation|dev|validation|valid|val)(?![a-z])")
_DESCRIBES = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|authors|contributing)\b.*"
                        r"|(dataset_infos?|dataset_dict|state|croissant)\.json|.*\.lock|cache-.*\.arrow", re.IGNORECASE)
_PLAIN = (".txt", ".raw", ".tokens")  # suffixes of text that is not source code; the latter two are WikiText's
_COPY = re.compile(r".*(~|\.(bak|orig|old|swp|tmp|temp|part|partial|incomplete|crdownload))|#.*#", re.IGNORECASE)


class Shard(NamedTuple):
    """A file, local or on the hub."""

    name: str  # below its folder
    path: Path | None
    table: Any = None  # a dataset of the library `datasets`, if there is no path

    @property
    def size(self) -> int:
        """Bytes; 0 for a file on the hub."""
        return 0 if self.path is None else self.path.stat().st_size


class Skipped:
    """Files and records that could not be read, and files that are not meant for training, each named once."""

    def __init__(self):
        self.names: dict[str, None] = {}
        self.left_out: dict[str, None] = {}
        self._told = {"skipped": 0, "left out": 0}

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, reason: str) -> None:
        self.names[f"{name} ({reason})"] = None

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[f"{name} ({reason})"] = None

    def tell(self) -> None:
        """Print a line on stderr about everything skipped since the last line, and one about everything left out."""
        for verb, what, names, shown in (("skipped", "that could not be read as text", self.names, 3),
                                         ("left out", "not meant for training", self.left_out, 10)):
            new = list(names)[self._told[verb]:]
            self._told[verb] = len(names)
            if new:
                more = f" and {len(new) - shown} more" if len(new) > shown else ""
                print(f"{verb} {len(new)} {what}: {', '.join(new[:shown])}{more}", file=sys.stderr)


def find_shards(paths: Sequence[str | Path] | None, stream: bool = False, skipped: Skipped | None = None
                ) -> list[Shard]:
    """The files under each path, sorted by name within it.

    Args:
        paths: a folder (`find_files`), a file, or where there is no such path a dataset of the hub as owner/name,
            owner/name:config, owner/name@split (default: train) or all of it; None is the standard library.
        stream: read the hub's files while they are downloaded, one shard each, instead of downloading them first.
        skipped: gets what is left out.
    Raises: UserError if there is no such path or dataset.
    """
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
        names = [name for name in names if not (_TEST_FOLDERS | _NOT_SOURCE) & set(name.split("/")[:-1])]
        if not names:
            raise UserError(f"this Python's standard library is not in files below {root}; name a folder of text")
        return [Shard(name, root / name) for name in names]
    shards = []
    for path in (Path(path).expanduser() for path in paths):
        hub = None if path.exists() else _HUB.fullmatch(str(path))
        if hub:
            shards += _open_hub(str(path), hub["name"], hub["config"], hub["split"] or "train", stream)
        elif not path.exists():
            raise UserError(f"{path} does not exist; give a folder or file of text that does")
        elif path.is_file():
            real = path.resolve()  # a link is the same data as its file; the hub's cache has files without suffixes
            shards.append(Shard(real.name if suffix_of(real.name) == suffix_of(path.name) else path.name, path))
        else:
            found = find_files(path, Skipped() if skipped is None else skipped)
            shards += [Shard(name, path / name) for name in found]
    return shards


def find_files(root: Path, skipped: Skipped) -> list[str]:
    """The names of the files below a folder that are meant for training, sorted.

    Links are followed, and each folder is read once. Hidden files and folders are none of the data, and neither are the
    folders of runs and models. Beside tables and plain text (.txt, .raw, .tokens), and where all others are .json
    files, files that describe them are left out; beside tables, .json files and plain text of a training split, those
    of other splits. Of a folder that `datasets` saved, only the split train is read. Backups of editors and unfinished
    downloads are left out.
    Raises: UserError if such a folder has other splits only.
    """
    names = sorted(_Walk(root, skipped).files())
    describing = {name for name in names if _DESCRIBES.fullmatch(name.rpartition("/")[2])}
    kinds = {suffix_of(name) for name in names if name not in describing}
    described = len(names) > 1 and (kinds == {".json"} or any(suffix_of(name) in (*TABLES, *_PLAIN) for name in names))
    splits = {name: _split_of(name) for name in names if suffix_of(name) in (*TABLES, ".json", *_PLAIN)}
    trains = any(split in ("train", "training") for split in splits.values())
    found = []
    for name in names:
        split = splits.get(name)
        if described and name in describing:
            skipped.leave_out(name, "describes the data")
        elif _COPY.fullmatch(name.rpartition("/")[2]):
            skipped.leave_out(name, "a backup, or not whole")
        elif trains and split not in (None, "train", "training"):
            skipped.leave_out(name, f"the split {split}")
        else:
            found.append(name)
    return found


def _split_of(name: str) -> str | None:
    """The split that the name of a file, or else of the nearest folder, tells."""
    matches = map(_SPLIT.search, reversed(name.lower().split("/")))
    return next((match[1] for match in matches if match), None)


class _Walk:
    """Walks a tree: the folders in it first, then those that links lead to."""

    def __init__(self, root: Path, skipped: Skipped):
        self.root, self.skipped = root, skipped
        self.seen: set[str] = set()  # folders
        self.links: list[str] = []  # names of links to folders

    def files(self) -> Iterator[str]:
        yield from self._read("")
        while self.links:
            name = self.links.pop(0)
            target = os.path.realpath(self.root / name)
            if target in self.seen or os.path.realpath(self.root).startswith(os.path.join(target, "")):
                self.skipped.leave_out(name, "a link to a folder that is read already")
            else:
                yield from self._read(name)

    def _read(self, name: str) -> Iterator[str]:
        folder = self.root / name
        self.seen.add(os.path.realpath(folder))
        try:
            entries = {entry.name: entry for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)}
        except OSError as error:
            self.skipped.add(name, error.strerror)
            return
        below = f"{name}/" if name else ""
        if reason := _explain_folder(entries) if name else None:
            self.skipped.leave_out(name, reason)
        elif "dataset_dict.json" in entries:
            yield from self._read_splits(folder, below)
        elif {"state.json", "dataset_info.json"} <= entries.keys():
            files = read_json(folder / "state.json").get("_data_files", [])
            yield from (below + file["filename"] for file in files)
        else:
            yield from self._read_entries(below, entries)

    def _read_entries(self, below: str, entries: dict[str, os.DirEntry]) -> Iterator[str]:
        folders = []
        for entry in entries.values():
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir():
                (self.links if entry.is_symlink() else folders).append(below + entry.name)
            elif entry.is_file():
                yield below + entry.name
            else:
                self.skipped.add(below + entry.name, "a link to nothing" if entry.is_symlink() else "no file")
        for name in folders:
            yield from self._read(name)

    def _read_splits(self, folder: Path, below: str) -> Iterator[str]:
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            raise UserError(f"{folder} has the splits {', '.join(splits)}, and none is train; name the one to train "
                            f"on, as {folder / splits[0]}")
        for split in splits:
            if split == "train":
                yield from self._read(below + split)
            else:
                self.skipped.leave_out(below + split, f"the split {split}")


def _explain_folder(entries: dict) -> str | None:
    """Why a folder holds no data; None if it does."""
    if LOCK in entries or {"config.yaml", "metrics.jsonl"} <= entries.keys():
        return "the folder of a run"
    if "config.json" in entries and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in entries):
        return "a model"
    return None


def _open_hub(where: str, name: str, config: str | None, split: str, stream: bool) -> list[Shard]:
    from huggingface_hub import HfApi

    try:
        import datasets
    except ImportError:
        raise UserError(f"{where} is no local path, and reading it from the hub needs datasets: "
                        "pip install 'dllm[data]'") from None
    try:
        if not Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
            HfApi().dataset_info(name, timeout=10)  # fails at once; load_dataset retries for half a minute
        table = datasets.load_dataset(name, config, split=split, streaming=stream)
    except Exception as error:  # unreachable, unknown, gated, without that split: many types, one meaning
        raise UserError(f"{where} is no local path, and cannot be read from the hub ({first_line(error)}); check the "
                        "name and the network") from error
    if not stream or table.num_shards == 1:
        return [Shard(where, None, table)]
    return [Shard(f"{where}[{i}]", None, table.shard(table.num_shards, i)) for i in range(table.num_shards)]


def write_parquet(table: Any, folder: Path) -> None:
    """Write a dataset of the library `datasets` as files of about half a gigabyte, each whole or absent.

    Raises: Failure if the disk is full or the folder cannot be written.
    """
    count = max(1, -(-(table.dataset_size or 0) // 2**29))
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            path = folder / f"{index:05}-of-{count:05}.parquet"
            temporary = path.with_name(f".{path.name}.tmp")
            table.shard(count, index, contiguous=True).to_parquet(temporary)
            temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise Failure(f"cannot write {folder}: {reason}; free space or choose another folder") from error
