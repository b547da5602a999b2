"""Files that are whole or absent: written aside, under a name no other writer has, and renamed."""

import os
import socket
from pathlib import Path


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
