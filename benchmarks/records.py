"""Results on the disk as soon as they are there, one JSON line each, for runs that may be cut off at any moment."""

import json
import os
from pathlib import Path


def append(path: str | Path, line: dict) -> None:
    """Add a line, which is on the disk when this returns, in place of one that was cut off."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """The lines, without what was being written when a process was killed."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]
