"""Token shards that live elsewhere: `s3://`, `hf://`, `https://` (anything fsspec opens) and `pipe:COMMAND`.

A shard is fetched whole into a bounded local cache and then read at random like a local one. The data order moves
through windows of shards (design invariant 1), so the shards of the next window are fetched ahead while this one is
used. A fetch that fails is tried again with longer and longer pauses; one that ends early is noticed by its size.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.utils import stringify_path
from huggingface_hub.errors import HfHubHTTPError

from egom2p.data.tarindex import INDEX_FILE, TarEntry, index_tars, parse_index, to_entry
from egom2p.errors import UserError
from egom2p.files import ABANDONED_S, aside

log = logging.getLogger(__name__)

T = TypeVar("T")
CHUNK = 1 << 20
READERS = 4
# What file systems call that which changes with a file's content, the surest first.
VERSIONS = ("blob_id", "md5Hash", "generation", "ETag", "etag", "LastModified", "last_modified", "mtime", "created")
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore, where it is installed
CACHED = re.compile(r"[0-9a-f]{24}-")  # how names in the cache begin
PART = re.compile(r"\..+-\d+\.part")  # `aside`
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(text: str | os.PathLike) -> bool:
    """Whether a path names something that is not on this machine's file systems."""
    return bool(re.match(r"(pipe:|[a-z][a-z0-9+.-]*://)", str(text)))


def default_cache() -> Path:
    """Where remote shards are kept when data.cache names no folder."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user id that no one knows, as in some containers
        home = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return home / "egom2p/shards"


@dataclass(frozen=True)
class RemoteShard:
    """One shard elsewhere. size: its bytes when the listing tells, else -1. version: what the listing says that changes
    when the shard is replaced (an ETag, a time), if anything."""

    url: str
    size: int
    cache: "ShardCache"
    version: str = ""

    @property
    def name(self) -> str:
        """Of a command, its last word that names a tar: `pipe:aws s3 cp s3://bucket/shard-000000.tar -`."""
        words = [word for word in re.split(r"[/\s]", self.url) if word]
        return next((word for word in reversed(words) if ".tar" in word), words[-1])

    def local(self) -> Path:
        """Its copy in the cache, fetched if need be. Raises OSError when it cannot be had."""
        return self.cache.fetch(self)

    def __str__(self) -> str:
        return self.url


class ShardCache:
    """Whole shards in `folder`, at most `limit` bytes of them; the least recently used go first.

    Several processes may share it: a shard is fetched by one of them, aside, and renamed.
    """

    def __init__(self, folder: Path, limit: float, retry_s: float) -> None:
        self.folder, self.limit, self.retry_s = folder, limit, retry_s
        self._ahead: tuple[int, ThreadPoolExecutor] | None = None

    @classmethod
    def usual(cls) -> "ShardCache":
        """Where no configuration says another."""
        return cls(default_cache(), 50e9, 60.0)

    def path(self, shard: RemoteShard) -> Path:
        """Where the copy of this very content is kept."""
        content = f"{shard.url} {shard.size} {shard.version}".encode()
        return self.folder / f"{hashlib.sha256(content).hexdigest()[:24]}-{shard.name[-80:]}"

    def fetch(self, shard: RemoteShard) -> Path:
        path = self.path(shard)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    retry(lambda: self._download(shard, path), shard.url, self.retry_s)
                    self._make_room(path)
        with suppress(OSError):  # the time of its last use; that of its writing tells one copy from the next
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return path

    def holds_all(self, shards: Iterable[RemoteShard]) -> bool:
        """Whether these fit into it together, as far as their sizes are told."""
        sizes = [shard.size for shard in shards]
        return min(sizes, default=0) >= 0 and sum(sizes) <= self.limit

    def ahead(self, shards: Iterable[RemoteShard]) -> None:
        """Fetch in the background what will be read soon; failures show when it is read."""
        if self._ahead is None or self._ahead[0] != os.getpid():
            self._ahead = (os.getpid(), ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead"))
        for shard in shards:
            if not self.path(shard).exists():
                self._ahead[1].submit(self._quietly, shard)

    def _quietly(self, shard: RemoteShard) -> None:
        with suppress(OSError):
            self.fetch(shard)

    def _download(self, shard: RemoteShard, path: Path) -> None:
        part = aside(path)
        try:
            with _open(shard.url) as source, part.open("wb") as target:
                while data := source.read(CHUNK):
                    target.write(data)
            if shard.size >= 0 and part.stat().st_size != shard.size:
                raise EOFError(f"{part.stat().st_size} of {shard.size} bytes came")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, keep: Path) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                if PART.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - ABANDONED_S:
                    os.unlink(entry.path)
                elif CACHED.match(entry.name) and entry.is_file():  # others are the user's own
                    files.append((entry.stat().st_atime_ns, entry.stat().st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def list_shards(url: str, cache: ShardCache) -> list[RemoteShard]:
    """The tars that a URL names: one tar, a glob, or a folder; [] when there is none."""
    if url.startswith("pipe:"):
        return [RemoteShard(url, -1, cache)]

    def ask() -> dict[str, dict[str, Any]]:
        fs, path = filesystem(url)
        if any(c in path for c in "*?"):
            return fs.glob(path, detail=True)
        info = fs.info(path)  # not `exists`, which says no of a server that cannot be asked
        if path.endswith(".tar"):
            return {path: info}
        return {row["name"]: row for row in fs.ls(path.rstrip("/"), detail=True) if row["name"].endswith(".tar")}

    try:
        found = retry(ask, url, cache.retry_s)
    except FileNotFoundError:
        return []
    fs, _ = filesystem(url)
    return [RemoteShard(fs.unstrip_protocol(path), -1 if info.get("size") is None else info["size"], cache,
                        str(next((info[v] for v in VERSIONS if info.get(v)), "")))
            for path, info in sorted(found.items())]


def local_copies(urls: list[str], cache: ShardCache | None = None) -> list[Path]:
    """The tars that URLs name, all of them fetched. Raises UserError when one cannot be had, or when they are more than
    the cache holds."""
    cache = cache or ShardCache.usual()
    too_many = UserError(f"{urls[0]}: these clips are more than the {cache.limit / 1e9:.3g} GB that are kept in "
                         f"{cache.folder}; copy them to a disk and name the folder")
    with reachable(urls[0]):
        shards = [shard for url in urls for shard in list_shards(url, cache)]
        if sum(max(0, shard.size) for shard in shards) > cache.limit:
            raise too_many
        missing = [shard for shard in shards if not cache.path(shard).exists()]
        if missing:
            log.info("%s: fetching %d of %d files into %s", urls[0], len(missing), len(shards), cache.folder)
        cache.ahead(missing)
        paths = [shard.local() for shard in shards]
    if not all(path.exists() for path in paths):  # sizes were not told, and the first had to go for the last
        raise too_many
    return paths


@contextmanager
def reachable(what: str) -> Iterator[None]:
    """What the other side refuses, or the network, as one line."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(reason if what in reason else f"{what}: {reason}") from error


def index_remote(shards: list[RemoteShard]) -> list[TarEntry]:
    """Members of each shard: from the `index.json` beside it when that fits its size, else by fetching the shard."""
    stored: dict[str, dict[str, dict]] = {}
    entries: dict[int, TarEntry] = {}
    fetched: dict[int, Path] = {}
    together = shards[0].cache.holds_all(shards) if shards else False
    for number, shard in enumerate(shards):
        folder = "" if shard.url.startswith("pipe:") else shard.url.rpartition("/")[0]
        if folder not in stored:
            stored[folder] = _remote_index(folder, shard.cache) if folder else {}
        record = stored[folder].get(shard.name)
        if record is not None and record["size"] == shard.size:
            entries[number] = to_entry(shard, record)
        elif together:
            fetched[number] = shard.local()
        else:  # it may have to go for the next one
            entries[number] = _of(shard, index_tars([shard.local()])[0])
    for number, entry in zip(fetched, index_tars(list(fetched.values())), strict=True):
        if entry.damage and not fetched[number].exists():  # made room for another's, since the cache is shared
            entry = index_tars([shards[number].local()])[0]
        entries[number] = _of(shards[number], entry)
    return [entries[number] for number in range(len(shards))]


def _of(shard: RemoteShard, copy: TarEntry) -> TarEntry:
    return TarEntry(shard, *list(vars(copy).values())[1:])


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it; one of its own for each process, since connections do not survive a
    fork."""
    key = (os.getpid(), url.partition("://")[0])
    try:
        if key not in _FILESYSTEMS:
            _FILESYSTEMS[key] = fsspec.filesystem(key[1], skip_instance_cache=True)
        return _FILESYSTEMS[key], _FILESYSTEMS[key]._strip_protocol(stringify_path(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}; `pip install 'egom2p[remote]'` brings s3fs and aiohttp") from error


_FILESYSTEMS: dict[tuple[int, str], Any] = {}


def retry(action: Callable[[], T], what: str, patience_s: float) -> T:
    """`action()`, again after each passing failure, with pauses that double from 0.1 s to 30 s (and a random part)."""
    started, pause = time.monotonic(), 0.1
    while True:
        try:
            return action()
        except (OSError, EOFError, TimeoutError, *_client_errors()) as error:
            if type(error).__name__ in NO_KEYS:
                raise PermissionError(f"{what}: {error}") from error
            if isinstance(error, PERMANENT) and not _was_not_asked(error):
                raise
            left = patience_s - (time.monotonic() - started)
            if left <= 0:
                reason = " ".join(str(error.__cause__ or error).split())[:200]
                raise OSError(f"{what} could not be had in {patience_s:g} s ({reason})") from error
            log.info("%s: %s; trying again", what, " ".join(str(error).split())[:200])
        time.sleep(min(pause * random.uniform(0.5, 1.5), left))
        pause = min(2 * pause, 30.0)


def _was_not_asked(error: Exception) -> bool:
    """fsspec calls a file not found when its server could not be asked, or was busy, too."""
    answer = getattr(error.__cause__, "response", None)
    status = getattr(answer, "status_code", None) or getattr(error.__cause__, "status", 503)
    return isinstance(error.__cause__, _client_errors()) and (status >= 500 or status in (408, 429))


def _client_errors() -> tuple[type[Exception], ...]:
    """Exceptions of the HTTP clients that are installed."""
    # huggingface_hub has changed its client twice; the base of that one's errors is among those of its own.
    found: list[type[Exception]] = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    with suppress(ImportError):
        from aiohttp import ClientError

        found.append(ClientError)
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError
        from botocore.exceptions import ClientError as S3Error

        found += [BotoCoreError, S3Error]
    return tuple(found)


def _remote_index(folder: str, cache: ShardCache) -> dict[str, dict]:
    def ask() -> dict[str, dict]:
        fs, path = filesystem(f"{folder}/{INDEX_FILE}")
        fs.info(path)
        index = json.loads(fs.cat_file(path))
        if isinstance(index, dict) and index.get("version") == 1:
            log.warning("%s/%s is of an older version, which took damaged tars for whole; `egom2p shards index` where "
                        "the shards are made writes a new one to upload", folder, INDEX_FILE)
        return parse_index(index, oldest=1)

    try:
        return retry(ask, f"{folder}/{INDEX_FILE}", cache.retry_s)
    except (FileNotFoundError, ValueError):
        return {}


@contextmanager
def _open(url: str):
    if url.startswith("pipe:"):
        from webdataset.gopen import gopen

        with gopen(url) as stream:
            yield stream
    else:
        fs, path = filesystem(url)
        with fs.open(path, "rb", block_size=8 * CHUNK) as stream:
            yield stream


@contextmanager
def _lock(path: Path):
    with path.open("w") as file:
        with suppress(OSError):  # file systems without locks (Lustre without `-o flock`): two may fetch the same shard
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
