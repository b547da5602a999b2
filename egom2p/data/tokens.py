"""Token shards as random-access data sets.

`ROOT/MODALITY/DATASET/shard-000000.tar` holds `KEY.npy` (ours) or `KEY.npz` with `arr_0` (released); a
folder of loose `KEY.npz` / `KEY.npy` files is one shard. Modalities pair by key, whatever their shards are called; only
where a modality holds a key in two shards do the shards' names count as well (`join_by_key`). A clip that lacks a
modality is simply without it.
"""

import ast
import hashlib
import io
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from egom2p.data.clips import expand_pattern, matches
from egom2p.data.remote import RemoteShard, ShardCache, index_remote, is_remote, list_shards, reachable
from egom2p.data.storage import DAMAGE
from egom2p.data.tarindex import TarEntry, index_tars, read_at
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import Modality, ModalitySet

log = logging.getLogger(__name__)

MAX_HEADER = 4096


class ShardPlace(NamedTuple):
    """Of a shard ROOT/MODALITY/DATASET/NAME.tar, or (released) ROOT/MODALITY/DATASET/token/NAME.tar."""

    root: Path
    modality: str
    dataset: str


def place_of(path: Path) -> ShardPlace:
    folder = path.parent.parent if path.parent.name == "token" else path.parent
    return ShardPlace(folder.parent.parent, folder.parent.name, folder.name)


@dataclass(frozen=True)
class TokenSample:
    """key, dataset and `{modality index: (n,) int32 ids}`, -1 where a position carries no observation."""

    key: str
    dataset: str
    tokens: dict[int, np.ndarray]


class TokenDataset:
    """One data set of token shards: element e is clip `keys[e]`, its shard the range that holds e.

    shard_sizes (S,): clips a shard. lost: how many clips lack a modality because its shard is damaged, as far as
    that can be told. Reading is by position in the file; nothing is unpacked ahead.
    """

    def __init__(self, name: str, files: dict[int, list[Path | RemoteShard]], modalities: ModalitySet) -> None:
        self.name, self.modalities = name, modalities
        self.paths: list[Path | RemoteShard] = []
        self.stamps: list[tuple[int, int]] = []
        self.lost = 0
        self.compressed = False  # whether some token files are .npz, which take longer to read
        shards: dict[str, dict[int, dict[str, tuple[int, int, int]]]] = {}
        damaged: dict[str, set[int]] = {}
        for index, paths in files.items():
            for shard, entry in self._entries(paths):
                if entry.damage:
                    damaged.setdefault(shard, set()).add(index)
                members = self._members(entry)
                known = shards.setdefault(shard, {}).setdefault(index, {})
                self._refuse_twice(known, members)
                known.update(members)
        place_loose(shards)
        join_by_key(shards)
        self.is_remote = any(isinstance(p, RemoteShard) for p in self.paths)
        self._build(shards, damaged)

    @classmethod
    def open(cls, root: Path | str, name: str, pattern: str, modalities: ModalitySet, only: tuple[str, ...] = (),
             cache: ShardCache | None = None) -> "TokenDataset":
        """The data set `name` under `root`; `pattern` overrides the default `[MODALITIES]/NAME`. Either may be a URL,
        whose shards then pass through `cache`."""
        return cls(name, cls.find(root, name, pattern, modalities, only, cache), modalities)

    @staticmethod
    def find(root: Path | str, name: str, pattern: str, modalities: ModalitySet, only: tuple[str, ...] = (),
             cache: ShardCache | None = None) -> dict[int, list[Path | RemoteShard]]:
        """{modality index: shards} of a data set, by their names alone. Raises UserError when there are none."""
        files: dict[int, list[Path | RemoteShard]] = {}
        for index, modality in enumerate(modalities):
            if not only or modality.name in only:
                paths = _modality_files(str(root), name, pattern, modality, modalities, cache)
                if paths:
                    files[index] = paths
        if not files:
            where = pattern or f"{{{','.join(modalities.names)}}}/{name}"
            raise UserError(f"data set '{name}': no token shard at {root}/{where}; write some with `egom2p tokenizer "
                            "encode` or `egom2p shards random`, or correct data.root")
        return files

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """Hash of what the data order depends on: keys, shard sizes and where each modality is present."""
        digest = hashlib.sha256(f"{self.name} {self.shard_sizes.tolist()}".encode())
        digest.update("\n".join(self.keys).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self._file >= 0).tobytes())
        return digest.hexdigest()

    def read(self, element: int) -> TokenSample:
        """Tokens of one clip. Raises DamagedClip with file, key and cause."""
        tokens = {}
        for index in np.flatnonzero(self._file[:, element] >= 0):
            path = self.paths[self._file[index, element]]
            try:
                data = read_at(path, int(self._offset[index, element]), int(self._size[index, element]),
                               self.stamps[self._file[index, element]])
                tokens[int(index)] = decode_tokens(data, self.modalities[index])
            except DAMAGE as error:
                raise DamagedClip(f"{path}: key {self.keys[element]}: {error}") from error
        return TokenSample(self.keys[element], self.name, tokens)

    def present(self) -> np.ndarray:
        """(M, N) bool: which modality each clip has."""
        return self._file >= 0

    def folders(self) -> dict[str, list[Path]]:
        """{modality: local folders that its shards lie in}."""
        found: dict[str, set[Path]] = {}
        for modality, files in zip(self.modalities, self._file, strict=True):
            paths = [self.paths[f] for f in np.unique(files) if f >= 0]
            found[modality.name] = {p.parent for p in paths if isinstance(p, Path)}
        return {name: sorted(folders) for name, folders in found.items() if folders}

    def shard_files(self, shard: int) -> list[RemoteShard]:
        """The remote files of one shard, of all modalities."""
        start = int(self.shard_sizes[:shard].sum())
        used = np.unique(self._file[:, start : start + int(self.shard_sizes[shard])])
        return [self.paths[f] for f in used if f >= 0 and isinstance(self.paths[f], RemoteShard)]

    def _entries(self, paths: list[Path | RemoteShard]) -> list[tuple[str, TarEntry]]:
        remote = [p for p in paths if isinstance(p, RemoteShard)]
        with reachable(f"data set '{self.name}'"):
            found = index_remote(remote)
        return [*((e.path.name, e) for e in found),
                *token_entries([p for p in paths if isinstance(p, Path)])]

    def _count_lost(self, shards: dict, damaged: dict[str, set[int]]) -> int:
        """How many clips probably lack a modality because its file is damaged: fewer of a shard have it than in whole
        shards. At least one of a shard with no whole file, by which it could be told."""
        whole = [held for name, held in shards.items() if name not in damaged] if damaged else []
        clips = sum(len(set().union(*held.values())) for held in whole)
        held = [sum(len(modalities.get(m, ())) for modalities in whole) for m in range(len(self.modalities))]
        lost = 0
        for shard, broken in damaged.items():
            keys = set().union(*shards[shard].values())
            gone = [round((held[m] / clips if held[m] else 1) * len(keys)) - len(shards[shard].get(m, ()))
                    for m in broken]
            lost += max(0 if shards[shard].keys() - broken else 1, *gone)
        return lost

    def _refuse_twice(self, known: dict[str, tuple[int, ...]], members: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError for a key in two files of one name: which of them its other modalities are of is unknown."""
        for key in known.keys() & members.keys():
            one, other = (self.paths[place[0]] for place in (known[key], members[key]))
            twice = isinstance(one, Path) and isinstance(other, Path) and one.with_suffix("") == other.with_suffix("")
            if str(one) != str(other) and not twice:  # KEY.npz beside KEY.npy is one clip
                raise UserError(f"data set '{self.name}': {one} and {other} both hold a clip {key}; name their folders "
                                f"as two data sets")

    def _members(self, entry: TarEntry) -> dict[str, tuple[int, int, int]]:
        self.paths.append(entry.path)
        self.stamps.append((entry.size, 0 if isinstance(entry.path, RemoteShard) else entry.mtime_ns))
        file = len(self.paths) - 1
        found = {key: (extension, file, offset, size) for key, extension, offset, size in entry.token_files()}
        self.compressed |= any(extension == "npz" for extension, *_ in found.values())
        return {key: place for key, (_, *place) in found.items()}

    def _build(self, shards: dict, damaged: dict[str, set[int]]) -> None:
        self.keys: list[str] = []
        sizes, columns = [], []
        for shard in sorted(shards):
            by_modality = shards[shard]
            keys = sorted(set().union(*by_modality.values()))
            absent = (-1, 0, 0)
            columns += [[by_modality.get(m, {}).get(key, absent) for m in range(len(self.modalities))] for key in keys]
            self.keys += keys
            sizes.append(len(keys))
        self.lost = self._count_lost(shards, damaged)
        table = np.array(columns, np.int64).reshape(-1, len(self.modalities), 3).transpose(2, 1, 0)
        self._file, self._offset, self._size = table[0].astype(np.int32), table[1], table[2]
        self.shard_sizes = np.array([s for s in sizes if s], np.int64)
        self._say_unpaired()
        if not self.keys:
            raise UserError(f"data set '{self.name}': its shards hold no clip "
                            f"({', '.join(str(p) for p in self.paths[:3])})")


    def _say_unpaired(self) -> None:
        present = self.present().astype(np.int64)
        together = present @ present.T
        for a, b in itertools.combinations(np.flatnonzero(together.diagonal()).tolist(), 2):
            if not together[a, b]:
                log.warning("data set '%s': no clip has both '%s' and '%s'; their keys differ, so none is paired",
                            self.name, self.modalities[a].name, self.modalities[b].name)
                return


def token_entries(paths: Sequence[Path]) -> list[tuple[str, TarEntry]]:
    """(shard's name, its index) of tars and of loose token files, each of which is an entry of the shard ""."""
    entries = [(e.path.name, e) for e in index_tars([p for p in paths if p.suffix == ".tar"])]
    for path in (p for p in paths if p.suffix != ".tar"):
        try:
            stat = path.stat()
        except OSError as error:  # a link whose file was not fetched
            log.warning("%s: cannot be read (%s); its clip lacks this modality", path, error.strerror)
            continue
        entries.append(("", TarEntry(path, stat.st_size, stat.st_mtime_ns, [path.stem], [path.suffix[1:]],
                                     np.zeros(1, np.int64), np.array([stat.st_size]), "")))
    return entries


def place_loose(shards: dict[str, dict[Any, dict[str, Any]]]) -> None:
    """{shard: {modality: {key: anything}}}: where some modalities lie in tars and others in loose files (shard ""), the
    loose ones join the tars that hold their keys."""
    loose = shards.pop("", {})
    for by_modality in shards.values():
        keys = set().union(*by_modality.values())
        for modality, members in loose.items():
            for key in keys & members.keys():
                by_modality.setdefault(modality, {}).setdefault(key, members.pop(key))
    if left := {modality: members for modality, members in loose.items() if members}:
        shards[""] = left


def join_by_key(shards: dict[str, dict[Any, dict[str, Any]]]) -> None:
    """{shard: {modality: {key: anything}}}: a clip whose modalities lie in shards of different names is put together in
    the first of them, in the order of their names. Where a modality holds a key in two shards, as where keys are
    counted anew in each, only shards of one name belong together and nothing is moved."""
    every: set[str] = set()
    clips = 0
    for by_modality in shards.values():
        keys = set().union(*by_modality.values())
        clips += len(keys)
        every |= keys
    if clips == len(every):  # the usual case
        return
    names: dict[Any, list[str]] = {}
    for by_modality in shards.values():
        for modality, members in by_modality.items():
            names.setdefault(modality, []).extend(members)
    if any(len(set(keys)) < len(keys) for keys in names.values()):
        return
    home: dict[str, str] = {}
    for shard in sorted(shards):
        for modality, members in list(shards[shard].items()):
            for key in list(members):
                if (first := home.setdefault(key, shard)) != shard:
                    shards[first].setdefault(modality, {})[key] = members.pop(key)
            if not members:
                del shards[shard][modality]


def decode_tokens(data: bytes, modality: Modality) -> np.ndarray:
    """Bytes of a .npy or .npz file -> (n,) int32 ids, -1 where not observed. ValueError when they do not fit."""
    array = load_array(data)
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens are {array.dtype}, expected integers")
    if array.size != modality.num_tokens or (array.ndim > 1 and array.shape[-len(modality.grid):] != modality.grid):
        raise ValueError(f"shape {array.shape} does not fit the grid {list(modality.grid)} of '{modality.name}'")
    ids = array.reshape(-1)
    if array.dtype == np.uint16:  # also where the vocabulary is larger
        ids = ids.astype(np.int32)
        ids[ids == 65535] = -1
    if ids.size and (ids.min() < -1 or ids.max() >= modality.vocab_size):
        raise ValueError(f"token id {ids.max() if ids.max() >= modality.vocab_size else ids.min()} lies outside "
                         f"0 .. {modality.vocab_size - 1} of '{modality.name}'")
    return ids.astype(np.int32)


def load_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file, or `arr_0` of a .npz; never a pickle."""
    return _parse_npy(data) if data[:6] == b"\x93NUMPY" else _parse_npz(data)


def encode_tokens(ids: np.ndarray, observed: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids of a grid -> the stored array: uint16 with 65535, or int32 with -1, where not observed."""
    missing = 65535 if modality.token_dtype == np.uint16 else -1
    return np.where(observed, ids, missing).astype(modality.token_dtype)


_HEADERS: dict[bytes, tuple[np.dtype, tuple[int, ...], str, int]] = {}


def _parse_npy(data: bytes) -> np.ndarray:
    """np.load for the plain case, with the parsed header remembered: shards repeat one header a million times."""
    if len(data) < 12:
        raise ValueError("npy header is cut off or absurdly long")
    length = int.from_bytes(data[8:10], "little") + 10 if data[6] == 1 else int.from_bytes(data[8:12], "little") + 12
    if length > min(len(data), MAX_HEADER):
        raise ValueError("npy header is cut off or absurdly long")
    header = data[:length]
    if header not in _HEADERS:
        fields = ast.literal_eval(header[10 if data[6] == 1 else 12 :].decode("latin1"))
        dtype = np.dtype(fields["descr"])
        if dtype.hasobject:
            raise ValueError("npy file is pickled")
        if len(_HEADERS) < 64:
            _HEADERS[header] = (dtype, tuple(fields["shape"]), "F" if fields["fortran_order"] else "C", length)
        else:
            return np.load(io.BytesIO(data), allow_pickle=False)
    dtype, shape, order, start = _HEADERS[header]
    return np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=start).reshape(shape, order=order)


def _parse_npz(data: bytes) -> np.ndarray:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            found = archive["arr_0"] if isinstance(archive, np.lib.npyio.NpzFile) and "arr_0" in archive else None
    except RuntimeError as error:  # zipfile's way of refusing encryption, patches and versions it does not know
        raise ValueError(f"npz file that cannot be read ({error})") from error
    if not isinstance(found, np.ndarray):  # numpy hands out the bytes of a member that is no array
        raise ValueError("npz file without an array 'arr_0'")
    return found


def path_of(modality: Modality, modalities: ModalitySet, name: str, pattern: str = "") -> str | None:
    """The pattern of a modality's shards of the data set `name`, whose own `pattern` lists modalities in brackets; None
    when it does not list this one."""
    pattern = pattern or f"[{','.join(modalities.names)}]/{name}"
    chosen = re.sub(r"\[([^\[\]]*)\]", lambda m: modality.name if modality.name in m[1].split(",") else "\0", pattern)
    return None if "\0" in chosen else chosen


def _modality_files(root: str, name: str, pattern: str, modality: Modality, modalities: ModalitySet,
                    cache: ShardCache | None) -> list[Path | RemoteShard]:
    """Shards (or loose files) of one modality, sorted."""
    chosen = path_of(modality, modalities, name, pattern)
    if chosen is None:
        return []
    paths: list[Path | RemoteShard] = []
    for text in expand_pattern(chosen):
        if is_remote(text) or is_remote(root):
            url = text if is_remote(text) else f"{root.rstrip('/')}/{text}"
            with reachable(f"data set '{name}'"):
                found = list_shards(url, cache or ShardCache.usual())
        else:
            found = _local_files(Path(root), text)
        if not found and text.endswith((".tar", ".npz", ".npy")) and not any(c in text for c in "*?"):
            log.warning("data set '%s': %s does not exist; clips of that shard lack '%s'", name, text, modality.name)
        paths += found
    return paths


def _local_files(root: Path, text: str) -> list[Path]:
    path = root / text
    if path.is_dir():
        return sorted(path.glob("*.tar")) or sorted([*path.glob("*.npz"), *path.glob("*.npy")])
    if any(c in text for c in "*?"):
        return matches(path) if Path(text).is_absolute() else sorted(root.glob(text))
    return [path] if path.is_file() else []
