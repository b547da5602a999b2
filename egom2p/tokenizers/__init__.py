"""Raw signals <-> tokens. `load(folder)` gives any tokenizer by its export folder or Hub name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from egom2p import resources
from egom2p.config import read_json
from egom2p.errors import UserError
from egom2p.export import CONFIG, resolve_folder
from egom2p.modalities import Modality, ModalitySet
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.cosmos import CosmosTokenizer
from egom2p.tokenizers.motion import MotionTokenizer
from egom2p.tokenizers.video import VideoTokenizer
from egom2p.tokenizers.vidtok import VidTokTokenizer

# Every tokenizer class by the `kind` in its exports. Adding one means adding it here.
KINDS: dict[str, type[Tokenizer]] = {c.kind: c for c in (MotionTokenizer, VideoTokenizer, CosmosTokenizer,
                                                                 VidTokTokenizer)}


def load(source: str | Path, device: str = "cpu") -> Tokenizer:
    """A tokenizer export (folder, run or Hub repository) as an object with encode, decode and `modality`."""
    folder = resolve_folder(source)
    kind = read_json(folder / CONFIG).get("kind")
    if kind not in KINDS:
        raise UserError(f"{folder / CONFIG}: not a tokenizer export (its 'kind' must be one of {', '.join(KINDS)})")
    return KINDS[kind].from_pretrained(folder, device)


def load_for(modalities: ModalitySet, names: Iterable[str], device: str | torch.device = "cpu",
             model_folder: Path | None = None, trust_torchscript: bool = False,
             origins: Mapping[str, str] | None = None) -> dict[str, Tokenizer]:
    """The tokenizers of the named modalities of a model, checked against its grids and, where the model remembers which
    tokenizers made the tokens it was trained on (`origins`: {modality: fingerprint}), against those.

    model_folder: where the model's export lies. TorchScript is a program: what a model brings along, inside its folder
    or from a repository that its config names, is run only with trust_torchscript.
    """
    loaded = {}
    for name in sorted(names):
        modality = modalities.by_name(name)
        if not modality.tokenizer:
            raise UserError(f"modality '{name}' names no tokenizer; set modalities.{name}.tokenizer in the model's "
                            f"config.json")
        tokenizer = loaded[name] = load(modality.tokenizer).to(device)
        tokenizer.trusted = trust_torchscript or _is_own(modality.tokenizer, model_folder)
        check_fits(tokenizer, modality)
        made_by = (origins or {}).get(name)
        if made_by and not tokenizer.made(made_by):
            own = tokenizer.fingerprint()
            raise UserError(f"tokenizer {modality.tokenizer} ({own}) is not the one whose tokens the model learnt for "
                            f"'{name}' ({made_by}); name that one in modalities.{name}.tokenizer of the model's "
                            f"config.json")
    return loaded


def check_fits(tokenizer: Tokenizer, modality: Modality) -> None:
    """Raises UserError unless a tokenizer makes tokens of the kind, grid and vocabulary of a model's modality."""
    own = tokenizer.modality
    if own.signal != modality.signal:
        raise UserError(f"tokenizer {modality.tokenizer} is for {own.signal}, but '{modality.name}' is "
                        f"{modality.signal}; correct modalities.{modality.name}.tokenizer")
    if (own.vocab_size, own.grid) != (modality.vocab_size, modality.grid):
        raise UserError(f"tokenizer {modality.tokenizer} makes {list(own.grid)} tokens of {own.vocab_size} ids, "
                        f"but the model's '{modality.name}' is {list(modality.grid)} of {modality.vocab_size}")


def _is_own(tokenizer: str, model_folder: Path | None) -> bool:
    """Whether a tokenizer is a folder of the user's own or a shipped one, not one that came inside a model's folder or
    that its config fetches from the Hub."""
    place = resources.locate(tokenizer)
    if not place.exists():
        return False
    return model_folder is None or not place.resolve().is_relative_to(model_folder.resolve())
