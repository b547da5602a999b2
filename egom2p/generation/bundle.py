"""`egom2p export`: a folder that holds a model with its tokenizers, so that it can be moved, zipped or uploaded."""

import dataclasses
import shutil
from pathlib import Path

from egom2p import tokenizers
from egom2p.errors import UserError
from egom2p.files import aside
from egom2p.modalities import ModalitySet
from egom2p.model.egom2p import GENERATION, EgoM2P


def export_bundle(source: str | Path, out: Path) -> str:
    """Write the model `source` and its tokenizers (`OUT/tokenizers/NAME`) into the new or empty folder `out`, aside
    first; returns one line about it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another --out or remove it")
    model = EgoM2P.from_pretrained(source)
    named = [m.name for m in model.modalities if m.tokenizer]
    loaded = tokenizers.load_for(model.modalities, named, "cpu", model.folder, origins=model.origins)
    out = out.resolve()
    part = out / f".{aside(out).name}" if out.exists() else aside(out)  # a volume cannot be renamed, only filled
    try:
        for name, tokenizer in loaded.items():
            tokenizer.save_pretrained(part / "tokenizers" / name)
        inside = {name: str(part / "tokenizers" / name) for name in named}
        model.modalities = ModalitySet(dataclasses.replace(m, tokenizer=inside.get(m.name, ""))
                                       for m in model.modalities)
        model.save_pretrained(part)
        if not model.generation:  # uploaded over an older model, nothing else takes that one's recipes away
            (part / GENERATION).write_text("{}")
        if out.exists():
            for entry in part.iterdir():
                entry.replace(out / entry.name)
        else:
            part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    without = [m.name for m in model.modalities if not m.tokenizer]
    note = f"; tokens only, no tokenizer is named: {', '.join(without)}" if without else ""
    return f"{out}: {', '.join(m.name for m in model.modalities)}{note}"
