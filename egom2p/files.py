"""Files that are whole or absent: written aside, under a name no other writer has, and renamed. And all those below a
folder."""

import functools
import glob
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

ABANDONED_S = 86400


def aside(path: Path) -> Path:
    """Where this process writes what will become `path`; others, on other hosts too, may write it at the same time."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")


def write_whole(path: Path, text: str) -> None:
    """Write a text file; a full disk or a kill leaves the old one. Raises OSError."""
    part = aside(path)
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed left of `path`: files and folders aside that nobody has written to for a
    day."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        newest = max((p.lstat().st_mtime for p in [left, *left.rglob("*")]), default=0.0)
        if newest < time.time() - ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def walk(root: Path) -> Iterator[Path]:
    """Every file below `root`, linked folders followed (each folder once), in sorted order; hidden ones left out. A
    folder that cannot be read is named in the log."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=lambda e: _say(e.filename, e.strerror), followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            _say(folder, "a link to a folder that is read already")
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))


@functools.cache
def _say(folder: str, reason: str) -> None:
    if Path(folder).exists():
        log.warning("%s cannot be read (%s); what is in it is left out", folder, reason)
