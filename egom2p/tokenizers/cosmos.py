"""NVIDIA's Cosmos discrete video tokenizers (DV4x8x8, DV8x16x16): wraps `encoder.jit` and `decoder.jit`.

encoder.jit takes (B, 3, T, H, W) in [-1, 1] and returns int32 ids (B, t, h, w), bfloat16 codes (B, 6, t, h, w) and a
loss; decoder.jit takes ids and returns the video, not clamped (seen by tracing NVIDIA's own code at small width,
NVIDIA/Cosmos-Tokenizer 3584ae75; their published files could not be fetched here). As in their wrapper, each window of
17 frames is padded to 1 + 8k frames by repeating its edges (half before, half after), and at the sides with black,
centred, to multiples of 16. Licence of the weights: NVIDIA Open Model License; some repositories are gated.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from egom2p.config import read_json
from egom2p.errors import UserError
from egom2p.export import CONFIG, resolve_folder
from egom2p.modalities import Modality
from egom2p.tokenizers.base import Tokenizer, check_picture, picture_units
from egom2p.tokenizers.torchscript import settle

FILES = ("encoder.jit", "decoder.jit")
BLACK = -1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CosmosArgs:
    """source: folder with encoder.jit and decoder.jit, or a Hub repository. patch: frames, rows, columns a token.
    num_frames: frames of a clip. window: frames encoded at a time; longer videos take several windows."""

    source: str = "nvidia/Cosmos-0.1-Tokenizer-DV4x8x8"
    patch: tuple[int, ...] = (4, 8, 8)
    num_frames: int = 16
    window: int = 17
    pad_frames: int = 8
    pad_sides: int = 16


class CosmosTokenizer(Tokenizer):
    """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) ids and back. bfloat16 on CUDA, float32 on the CPU."""

    kind = "cosmos"
    margin = BLACK

    def __init__(self, modality: Modality, args: CosmosArgs) -> None:
        super().__init__(modality, args)
        self.signal = picture_units(modality)
        self.beside: Path | None = None  # the folder of its config.json
        self._device = torch.device("cpu")
        self._networks: dict[str, Any] = {}
        self._digests: dict[Path, str] = {}

    def fingerprint(self) -> str:
        """Of the arguments and of what is in the two files, wherever they lie; of their source's name while they are
        not at hand."""
        folder = self._folder_at_hand()
        if folder is None:
            return super().fingerprint()
        config = self.to_config()
        config["args"] |= {"source": "", **{name: self._content(folder / name) for name in FILES}}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def made(self, fingerprint: str) -> bool:
        """Also by its source's name, as earlier versions had it; files that are not at hand cannot be compared."""
        named = super().fingerprint()
        if self._folder_at_hand() is None and fingerprint != named:
            log.warning("%s is not fetched yet: whether it made the tokens of '%s' is not checked", self.args.source,
                        self.modality.name)
            return True
        return fingerprint in (named, self.fingerprint())

    def _folder_at_hand(self) -> Path | None:
        """Where the two files are without fetching them."""
        if (local := self._local_folder()) is not None:
            return local
        try:
            cached = [huggingface_hub.try_to_load_from_cache(self.args.source, name) for name in FILES]
        except HFValidationError:  # no repository's name
            return None
        return Path(cached[0]).parent if all(isinstance(path, str) for path in cached) else None

    def _content(self, path: Path) -> str:
        if path not in self._digests:
            with path.open("rb") as file:
                self._digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[path]

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "CosmosTokenizer":
        """An export folder: config.json alone, or with the two .jit files beside it."""
        folder = resolve_folder(source)
        tokenizer = cls.from_config(read_json(folder / CONFIG), str(folder / CONFIG))
        tokenizer.beside = folder
        return tokenizer.to(device)

    def save_pretrained(self, folder: str | Path, weights: dict | None = None) -> None:
        """Writes config.json, and the networks where they are local files; those of the Hub stay there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.to_config(), indent=1))
        local = self._local_folder()
        if local:
            for name in FILES:
                shutil.copyfile(local / name, folder / name)

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device | str) -> "CosmosTokenizer":
        self._device = torch.device(device)
        self._networks.clear()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._device.type == "cuda" else torch.float32

    @property
    def frame_size(self) -> int:
        """Side in pixels of the square frames its grid is for."""
        return self.modality.grid[1] * self.args.patch[1]

    def check_size(self, signal: np.ndarray) -> None:
        check_picture(signal, self.modality, self.args.num_frames, self.args.patch)

    def encode_normalized(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) int64 ids, the windows' latent frames one after the other."""
        encoder = self._network("encoder.jit")
        windows = [encoder(self._pad(part).to(self._device, self.dtype)) for part in video.split(self.args.window, 2)]
        return torch.cat([w[0] if isinstance(w, (tuple, list)) else w for w in windows], 1).long()

    def decode_normalized(self, ids: Tensor) -> Tensor:
        """(B, t, h, w) ids of a clip of `num_frames` -> (B, 3, T, H, W) in [-1, 1], padding in time removed."""
        decoder, start, parts = self._network("decoder.jit"), 0, []
        for frames in self._window_frames():
            before, padded = self._time_padding(frames)
            latent = 1 + (padded - 1) // self.args.patch[0]
            video = decoder(ids[:, start : start + latent].int().to(self._device)).float().clamp(-1, 1)
            parts.append(video[:, :, before : before + frames])
            start += latent
        return torch.cat(parts, 2)

    def codes(self) -> Tensor:
        raise UserError(f"'{self.modality.name}' uses Cosmos' decoder, which takes ids only: it has no code vectors: "
                        f"set expected: false in its recipe, name the other modalities in loss.near_modalities, and "
                        f"leave init.codes out")

    def _window_frames(self) -> list[int]:
        """Raw frames in each window of a clip."""
        full, rest = divmod(self.args.num_frames, self.args.window)
        return [self.args.window] * full + ([rest] if rest else [])

    def _time_padding(self, frames: int) -> tuple[int, int]:
        """(frames added before, frames after padding); the padded count is 1 + pad_frames * k."""
        missing = -(frames - 1) % self.args.pad_frames
        return missing // 2, frames + missing

    def _pad(self, video: Tensor) -> Tensor:
        before, padded = self._time_padding(video.shape[2])
        after = padded - video.shape[2] - before
        video = torch.cat([video[:, :, :1].expand(-1, -1, before, -1, -1), video,
                           video[:, :, -1:].expand(-1, -1, after, -1, -1)], 2)
        rows, columns = (-side % self.args.pad_sides for side in video.shape[-2:])
        return F.pad(video, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=BLACK)

    def _network(self, name: str) -> Any:
        if name not in self._networks:
            path = self._folder() / name
            if not self.trusted and not self._is_nvidias():
                raise UserError(f"{path}: TorchScript is a program, and this one came along with a model; run again "
                                "with --trust-torchscript if you trust its author, or name your own copy as the "
                                "tokenizer")
            try:
                self._networks[name] = settle(torch.jit.load(path, map_location=self._device).eval(), self._device,
                                              self.dtype)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).splitlines()[0][:120]
                raise UserError(f"{path}: not a readable TorchScript file ({reason})") from error
        return self._networks[name]

    def _is_nvidias(self) -> bool:
        """Whether the files are fetched from NVIDIA's own repositories."""
        return self._local_folder() is None and self.args.source.startswith("nvidia/")

    def _local_folder(self) -> Path | None:
        for folder in (self.beside, Path(self.args.source)):
            if folder and all((folder / f).is_file() for f in FILES):
                return folder
        return None

    def _folder(self) -> Path:
        """Where the two files are: beside config.json, in the source folder, or fetched from the Hub."""
        local = self._local_folder()
        if local:
            return local
        if Path(self.args.source).is_dir() or self.args.source.count("/") != 1:
            raise UserError(f"{self.args.source}: no {' and '.join(FILES)} there; download them from the Hub "
                            f"(nvidia/Cosmos-0.1-Tokenizer-DV4x8x8)")
        try:
            return Path(huggingface_hub.snapshot_download(self.args.source, allow_patterns=list(FILES)))
        except GatedRepoError as error:
            raise UserError(f"{self.args.source} is gated: accept its licence on huggingface.co, then `hf auth login` "
                            f"with your token") from error
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"{self.args.source}: cannot be fetched from the Hub ({type(error).__name__}); put "
                            f"{' and '.join(FILES)} "
                            "beside config.json or name their folder as args.source") from error
