"""EgoM2P: one masked transformer over the tokens of egocentric video, depth, camera motion and gaze.

    from egom2p import EgoM2P, Pipeline, tokenizers
    model = EgoM2P.from_pretrained("runs/quickstart/model")
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["EgoM2P", "Pipeline", "tokenizers"]

_PLACES = {"EgoM2P": "egom2p.model.egom2p", "Pipeline": "egom2p.generation.pipeline"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `egom2p --help` does not wait for torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name == "tokenizers":
        return importlib.import_module("egom2p.tokenizers")
    raise AttributeError(f"module 'egom2p' has no attribute '{name}'")
