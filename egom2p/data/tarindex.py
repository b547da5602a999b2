"""Tars: written whole, and read at random through keys and byte offsets kept in `index.json` beside the shards.

An entry is rebuilt when its tar's size or modification time changes. A tar that breaks off is indexed up
to the break and the damage is written down, so that nothing is lost in silence.
"""

import errno
import io
import json
import logging
import os
import re
import resource
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import webdataset

from egom2p.errors import UserError
from egom2p.files import aside, write_whole

log = logging.getLogger(__name__)

INDEX_FILE = "index.json"
VERSION = 3  # 1 took a tar with a damaged header in its middle for whole, 2 sparse members and macOS's notes for files
VOLUME_LABEL = b"V"  # of GNU tar: a name for the archive
LONGEST_END = 1 << 16  # bytes of zeros behind the last member; tar fills up to 10 KiB
_NOTHING: dict = {"size": 0, "mtime_ns": 0, "keys": [], "suffixes": [], "offsets": [], "sizes": []}


class Fetched(Protocol):
    """A tar that lives elsewhere and is fetched before it is read (`data.remote.RemoteShard`)."""

    def local(self) -> Path: ...


@dataclass(frozen=True)
class TarEntry:
    """Members of one tar. keys and suffixes (M,) str; offsets (M,) of the data; sizes (M,) bytes; damage "" if none."""

    path: Path
    size: int
    mtime_ns: int
    keys: list[str]
    suffixes: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str

    def token_files(self) -> Iterator[tuple[str, str, int, int]]:
        """(key, extension, offset, size) of every .npy and .npz, read as a token file: with one suffix, whatever the
        key is."""
        for key, suffix, offset, size in zip(self.keys, self.suffixes, self.offsets.tolist(), self.sizes.tolist(),
                                             strict=True):
            name, _, extension = f"{key}.{suffix}".rpartition(".")
            if extension in ("npy", "npz"):
                yield name, extension, offset, size


def write_tar(path: Path, samples: Iterable[dict[str, str | bytes]]) -> int:
    """Write WebDataset samples (`__key__` and {suffix: bytes}) to one tar, aside and then renamed, so that it is whole
    or absent. Equal samples make equal files. Returns the number of samples.

    An index beside a tar that is replaced goes: read from elsewhere, without the tar's own time, it would pass for the
    new one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = aside(path), 0
    try:
        # A file, not its name: webdataset takes a name with a colon for a URL.
        with part.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
                count += 1
        if path.exists():
            (path.parent / INDEX_FILE).unlink(missing_ok=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a file's name: `P01.5_0003`, `rgb.npy` of `P01.5_0003.rgb.npy`.

    Keys may have dots. WebDataset cuts a name at its first dot; here the suffix is the extension, and for an array or a
    video the word before it, when that could be a signal's name.
    """
    stem, _, suffix = name.rpartition(".")
    if suffix in ("npy", "npz", "mp4", "mkv") and (match := re.fullmatch(r"(.+)\.([A-Za-z_]\w*)", stem)):
        return match[1], f"{match[2]}.{suffix}"
    return (stem, suffix) if stem else (name, "")


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def index_tars(paths: list[Path]) -> list[TarEntry]:
    """Entries of `paths`, read from the `index.json` of their folders and rebuilt where those are stale."""
    stored = {folder: _read_index(folder) for folder in {p.parent for p in paths}}
    entries, stale = [], set()
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            log.warning("%s: cannot be read (%s); its clips lack this modality", path, error.strerror)
            entries.append(to_entry(path, {**_NOTHING, "damage": f"cannot be read ({error.strerror})"}))
            continue
        record = stored[path.parent].get(path.name)
        if not record or (record["size"], record["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            record = _scan(path)
            stored[path.parent][path.name] = record
            stale.add(path.parent)
        entries.append(to_entry(path, record))
        if record["damage"]:
            log.warning("%s: %s; the %d files before that are used", path, record["damage"], len(record["keys"]))
    for folder in stale:
        _write_index(folder, stored[folder])
    return entries


_FILES: dict[Path | Fetched, int] = {}
_FILES_PID = [os.getpid()]
# Descriptors kept, a quarter of what the system grants (256 in all on a Mac); the rest is for everybody else.
MAX_OPEN = max(8, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def read_at(path: Path | Fetched, offset: int, size: int, stamp: tuple[int, int] = (-1, 0)) -> bytes:
    """Bytes of an open file; descriptors are kept, at most MAX_OPEN, and never shared across a fork.

    stamp: the file's size and modification time (0 = any) when it was indexed; another one raises OSError.
    """
    descriptor = _descriptor(path)
    if _changed(descriptor, stamp):  # perhaps only the descriptor is old: the file was replaced and indexed anew
        os.close(_FILES.pop(path))
        descriptor = _descriptor(path)
        if _changed(descriptor, stamp):
            raise OSError("the file changed since it was indexed")
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise EOFError(f"file ends {size - len(data)} bytes early; it changed since it was indexed")
    return data


def _descriptor(path: Path | Fetched) -> int:
    if _FILES_PID[0] != os.getpid():
        _FILES.clear()
        _FILES_PID[0] = os.getpid()
    if path not in _FILES:
        while len(_FILES) >= MAX_OPEN:
            os.close(_FILES.pop(next(iter(_FILES))))
        _FILES[path] = _open(path if isinstance(path, Path) else path.local())
    return _FILES[path]


def _open(path: Path) -> int:
    """A descriptor; when the process may open no more files, those kept here are given up first."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    while _FILES:
        os.close(_FILES.popitem()[1])
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError("too many open files; raise the limit with `ulimit -n 4096`") from error


def _changed(descriptor: int, stamp: tuple[int, int]) -> bool:
    if stamp[0] < 0:
        return False
    now = os.fstat(descriptor)
    return now.st_size != stamp[0] or stamp[1] not in (0, now.st_mtime_ns)


def to_entry(path: Path, record: dict) -> TarEntry:
    """An index record as a TarEntry."""
    suffixes = record["suffixes"]
    if isinstance(suffixes, str):
        suffixes = [suffixes] * len(record["keys"])
    keys, suffixes = _split_again(record["keys"], suffixes)
    return TarEntry(path, record["size"], record["mtime_ns"], keys, suffixes,
                    np.array(record["offsets"], np.int64), np.array(record["sizes"], np.int64), record["damage"])


def _split_again(keys: list[str], suffixes: list[str]) -> tuple[list[str], list[str]]:
    """Names of an index that was written when they were still cut at the first dot."""
    if all(split_name(f"key.{suffix}") == ("key", suffix) for suffix in set(suffixes)):
        return keys, suffixes
    pairs = []
    for key, suffix in zip(keys, suffixes, strict=True):
        folder, _, name = f"{key}.{suffix}".rpartition("/")
        stem, rest = split_name(name)
        pairs.append((f"{folder}/{stem}" if folder else stem, rest))
    return [k for k, _ in pairs], [s for _, s in pairs]


def _scan(path: Path) -> dict:
    """Walk the tar's headers; never reads the data itself. A hard link stands for the member that it names."""
    stat = path.stat()
    keys, suffixes, offsets, sizes, damage = [], [], [], [], ""
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.rpartition("/")[2].startswith("._"):  # AppleDouble: what macOS notes of a file
                    continue
                if member.issparse():
                    damage = damage or f"holds {member.name} as a sparse file; write the tar without -S"
                    continue
                if member.isreg() and member.offset_data + member.size > stat.st_size:
                    damage = f"truncated inside {member.name}"
                    break
                if member.isreg():
                    places[member.name] = member.offset_data, member.size
                elif member.islnk() and member.linkname in places:
                    places[member.name] = places[member.linkname]
                else:
                    known = member.isdir() or member.type == VOLUME_LABEL
                    damage = damage or ("" if known else f"holds {member.name}, which is a link or the like, no file")
                    continue
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, suffix = split_name(name)
                keys.append(f"{folder}/{stem}" if folder else stem)
                suffixes.append(suffix)
                offset, size = places[member.name]
                offsets.append(offset)
                sizes.append(size)
            else:
                damage = _damaged_end(path, tar.offset, stat.st_size) or damage
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        damage = _describe(error, stat.st_size, len(keys))
    if len(set(zip(keys, suffixes, strict=True))) < len(keys):
        damage = damage or "holds a key twice"
    compact = suffixes[0] if suffixes and len(set(suffixes)) == 1 else suffixes
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "keys": keys, "suffixes": compact,
            "offsets": offsets, "sizes": sizes, "damage": damage}


def _describe(error: Exception, size: int, files: int) -> str:
    if not size:
        return "is empty (0 bytes)"
    if "unexpected end" in str(error):
        return f"truncated after {files} files"
    return f"not a readable tar after {files} files ({error})"


def _damaged_end(path: Path, offset: int, size: int) -> str:
    """A whole tar ends, where its last member does, with two zero blocks and zeros to fill up; tarfile takes a damaged
    header or a block of zeros in its middle for the end, too."""
    if offset + tarfile.BLOCKSIZE > size:
        return "ends without the closing zero blocks, so files may be missing"
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            return f"the header at byte {offset} is damaged, so what follows is not used"
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return f"goes on behind its end at byte {offset}, and what follows is not used"
    # tar fills up whole records, of more than 10 KiB when it is told to (`tar -b`).
    record = max(LONGEST_END, min(size & -size, 1 << 20))
    return f"holds nothing but zeros from byte {offset} on, so files may be missing" if size - offset > record else ""


def parse_index(index: dict, oldest: int = VERSION) -> dict[str, dict]:
    """{shard name: record} of an index file's JSON; {} when it is of another version or malformed."""
    version = index.get("version") if isinstance(index, dict) else None
    shards = index.get("shards") if type(version) is int and oldest <= version <= VERSION else None
    return {name: r for name, r in shards.items() if _is_record(r)} if isinstance(shards, dict) else {}


def _is_record(record: object) -> bool:
    """Whether an index record can be trusted not to fail later: lists of equal lengths, numbers inside the file."""
    if not isinstance(record, dict) or record.keys() != {"size", "mtime_ns", "keys", "suffixes", "offsets", "sizes",
                                                         "damage"}:
        return False
    keys, suffixes, offsets, sizes = (record[k] for k in ("keys", "suffixes", "offsets", "sizes"))
    return (all(isinstance(x, list) and len(x) == len(keys) for x in (keys, offsets, sizes))
            and (isinstance(suffixes, str) or (isinstance(suffixes, list) and len(suffixes) == len(keys)))
            and isinstance(record["size"], int) and isinstance(record["mtime_ns"], int)
            and isinstance(record["damage"], str)
            and all(type(o) is int and type(n) is int and 0 <= o <= o + n <= record["size"]
                    for o, n in zip(offsets, sizes, strict=True))
            and all(isinstance(k, str) for k in keys) and (isinstance(suffixes, str)
                                                           or all(isinstance(x, str) for x in suffixes)))


def _read_index(folder: Path) -> dict[str, dict]:
    try:
        return parse_index(json.loads((folder / INDEX_FILE).read_text()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


_UNWRITABLE: set[Path] = set()  # folders whose index could not be written; said once a process


def _write_index(folder: Path, shards: dict[str, dict]) -> None:
    try:
        write_whole(folder / INDEX_FILE, json.dumps({"version": VERSION, "shards": shards}, separators=(",", ":")))
    except OSError as error:
        if not _UNWRITABLE:
            log.warning("%s: the index cannot be written (%s); it is rebuilt at every start, and so are those of other "
                        "folders that cannot be written", folder, error.strerror)
        _UNWRITABLE.add(folder)
