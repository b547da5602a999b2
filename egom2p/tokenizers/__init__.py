"""Raw signals <-> tokens. `load(folder)` gives any tokenizer by its export folder or Hub name."""

from pathlib import Path

from egom2p.tokenizers.base import Tokenizer


def load(source: str | Path, device: str = "cpu") -> Tokenizer:
    """A tokenizer export (folder, run or Hub repository) as an object with encode, decode and `modality`."""
    return Tokenizer.from_pretrained(source, device)
