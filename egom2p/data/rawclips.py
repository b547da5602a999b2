"""Clip tars as a random-access data set of one raw signal, for training tokenizers."""

import io
from pathlib import Path

import numpy as np

from egom2p.data.clips import expand_paths
from egom2p.data.tarindex import index_tars
from egom2p.data.tokens import DamagedClip, read_at
from egom2p.data.video import decode_video
from egom2p.errors import UserError


class RawSignalDataset:
    """Every clip of `pattern` that has the signal `source`. shard_sizes (S,) clips a tar."""

    def __init__(self, pattern: str, source: str) -> None:
        self.rows: list[tuple[Path, str, str, int, int]] = []
        sizes = []
        for entry in index_tars([p for p in expand_paths(pattern) if p.suffix == ".tar"]):
            before = len(self.rows)
            for key, suffix, offset, size in zip(entry.keys, entry.suffixes, entry.offsets, entry.sizes, strict=True):
                if suffix in (f"{source}.npy", f"{source}.mp4"):
                    self.rows.append((entry.path, key, suffix, int(offset), int(size)))
            sizes.append(len(self.rows) - before)
        if not self.rows:
            raise UserError(f"{pattern}: no clip there has the signal '{source}'")
        self.shard_sizes = np.array([s for s in sizes if s], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, element: int) -> np.ndarray:
        """The raw array. Raises DamagedClip."""
        path, key, suffix, offset, size = self.rows[element]
        try:
            data = read_at(path, offset, size)
            return decode_video(data)[0] if suffix.endswith("mp4") else np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, OSError, EOFError, UserError) as error:
            raise DamagedClip(f"{path}: key {key}: {error}") from error
