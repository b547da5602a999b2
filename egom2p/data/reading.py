"""Token shards read by hand: `open_tokens`, for looking at them and for other people's code."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from egom2p.data.clips import expand_paths
from egom2p.data.tarindex import index_tars, read_at
from egom2p.data.tokens import load_array
from egom2p.errors import DamagedClip, UserError


class TokenClips(Mapping[str, dict[str, np.ndarray]]):
    """{clip key: {modality: ids}} of one data set, read from its shards when asked.

    ids: int32 arrays in the stored shape (the modality's grid), -1 where a position carries no observation. A clip
    holds the modalities that its shards have. Reading raises DamagedClip.
    """

    def __init__(self, root: Path, dataset: str) -> None:
        self._places: dict[str, dict[str, tuple[Path, int, int, tuple[int, int]]]] = {}
        for folder in sorted(path for path in root.iterdir() if (path / dataset).is_dir()):
            # released shards lie one folder further down
            inside = folder / dataset / "token" if (folder / dataset / "token").is_dir() else folder / dataset
            for entry in index_tars(sorted(inside.glob("*.tar"))):
                for key, extension, offset, size in entry.token_files():
                    if extension in ("npy", "npz"):
                        place = (entry.path, offset, size, (entry.size, entry.mtime_ns))
                        self._places.setdefault(key, {})[folder.name] = place
        self.modalities = sorted({name for places in self._places.values() for name in places})

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        return {name: self._read(key, *place) for name, place in self._places[key].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, key: str, path: Path, offset: int, size: int, stamp: tuple[int, int]) -> np.ndarray:
        try:
            array = load_array(read_at(path, offset, size, stamp))
        except (ValueError, OSError, EOFError, KeyError) as error:
            raise DamagedClip(f"{path}: key {key}: {error}") from error
        ids = array.astype(np.int32)
        return np.where(ids == 65535, -1, ids).astype(np.int32) if array.dtype == np.uint16 else ids


def open_tokens(root: str | Path, dataset: str = "") -> TokenClips:
    """The clips of the data set below ROOT/MODALITY/DATASET; `dataset` may be left out where there is one.

        tokens = open_tokens("runs/quickstart/tokens", "rooms")
        tokens["001-000042"]["cam"]      # (30,) int32
    """
    root = Path(root)
    names = sorted({path.parent.name if path.parent.name != "token" else path.parent.parent.name
                    for path in expand_paths(str(root))})
    if dataset not in names and (dataset or len(names) != 1):
        raise UserError(f"{root} holds the data sets {', '.join(names)}; name one of them")
    return TokenClips(root, dataset or names[0])
