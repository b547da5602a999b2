"""EgoM2P: one masked transformer over the tokens of egocentric video, depth, camera motion and gaze.

    from egom2p import EgoM2P, Pipeline, tokenizers
    model = EgoM2P.from_pretrained("runs/quickstart/model")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egom2p import tokenizers
    from egom2p.generation.pipeline import Pipeline
    from egom2p.model.egom2p import EgoM2P

__version__ = "0.2.0"
__all__ = ["EgoM2P", "Pipeline", "__version__", "tokenizers"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `egom2p --help` does not wait for torch."""
    if name == "EgoM2P":
        from egom2p.generation.sampler import generate_targets
        from egom2p.model.egom2p import EgoM2P

        EgoM2P.generate = generate_targets  # here, so that the network's room need not import the sampler's
        return EgoM2P
    if name == "Pipeline":
        from egom2p.generation.pipeline import Pipeline

        return Pipeline
    if name == "tokenizers":
        return importlib.import_module("egom2p.tokenizers")
    raise AttributeError(f"module 'egom2p' has no attribute '{name}'")
