"""Token shards read by hand: `open_tokens`, for looking at them and for other people's code."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from egom2p.data.clips import expand_paths
from egom2p.data.storage import DAMAGE
from egom2p.data.tarindex import index_tars, read_at
from egom2p.data.tokens import load_array, place_of
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import stored_ids


class TokenClips(Mapping[str, dict[str, np.ndarray]]):
    """{clip key: {modality: ids}} of one data set's shards, read when asked.

    ids: int32 arrays in the stored shape (the modality's grid), -1 where a position carries no observation. A clip
    holds the modalities that its shards have. Reading raises DamagedClip.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._places: dict[str, dict[str, tuple[Path, int, int, tuple[int, int]]]] = {}
        for entry in index_tars(shards):
            modality = place_of(entry.path).modality
            for key, extension, offset, size in entry.token_files():
                if extension in ("npy", "npz"):
                    place = (entry.path, offset, size, (entry.size, entry.mtime_ns))
                    self._places.setdefault(key, {})[modality] = place
        self.modalities = sorted({name for places in self._places.values() for name in places})

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        return {name: self._read(key, *place) for name, place in self._places[key].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, key: str, path: Path, offset: int, size: int, stamp: tuple[int, int]) -> np.ndarray:
        try:
            return stored_ids(load_array(read_at(path, offset, size, stamp))).astype(np.int32)
        except DAMAGE as error:
            raise DamagedClip(f"{path}: key {key}: {error}") from error


def open_tokens(root: str | Path, dataset: str = "") -> TokenClips:
    """The clips of the data set below ROOT/MODALITY/DATASET; `dataset` may be left out where there is one.

        tokens = open_tokens("runs/quickstart/tokens", "rooms")
        tokens["001-000042"]["cam"]      # (30,) int32
    """
    shards: dict[str, list[Path]] = {}
    for path in expand_paths(str(root)):
        shards.setdefault(place_of(path).dataset, []).append(path)
    if dataset not in shards and (dataset or len(shards) != 1):
        raise UserError(f"{root} holds the data sets {', '.join(sorted(shards))}; name one of them")
    return TokenClips(shards[dataset or next(iter(shards))])
