"""How a target is generated: in how many steps, in what order, with what temperature and guidance."""

import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from egom2p.config import build
from egom2p.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetArgs:
    """One target modality's recipe.

    order: roar (random order), maskgit (most confident first, Chang et al. 2022) or raster.
    step_sizes: linear or cosine shares of the tokens a step. temperature 0 = the likeliest id, otherwise it
    starts at `temperature` and stays (constant), falls to 0 (linear) or as 1/step (inverse).
    guidance: classifier-free scale s, uncond + s * (cond - uncond); 1 = none (Ho and Salimans 2022).
    condition_weights: {modality: w}, instead of one scale: uncond + sum of w * (cond on that modality alone - uncond),
    the sum of weighted conditions of 4M (Mizrahi et al. 2023, section 4) after Liu et al. 2022.
    expected: decode the mean code over the predicted distribution instead of the sampled code.
    reuse_condition: encode the condition once instead of together with the target's tokens at every step. Faster
    and approximate (the model was trained on both together); see benchmarks/RESULTS.md for what it costs.
    """

    steps: int = 1
    order: Literal["roar", "maskgit", "raster"] = "roar"
    step_sizes: Literal["linear", "cosine"] = "linear"
    temperature: float = 1.0
    temperature_schedule: Literal["constant", "linear", "inverse"] = "constant"
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 1.0
    expected: bool = False
    condition_weights: dict[str, float] = field(default_factory=dict)
    reuse_condition: bool = False

    def __post_init__(self) -> None:
        if self.condition_weights and self.guidance != 1.0:
            raise ValueError("give guidance or condition_weights, not both")
        if self.steps < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("steps must be at least 1, temperature and top_k at least 0, top_p in (0, 1]")

    def sizes(self, num_tokens: int) -> list[int]:
        """Tokens decoded in each step; they sum to num_tokens.

        linear: differences of an integer linspace, the largest first (the released schedule). cosine: few
        tokens first, many last.
        """
        steps = min(self.steps, num_tokens)
        if self.step_sizes == "linear":
            bounds = np.linspace(0, num_tokens, steps + 1).astype(int)
            return sorted(np.diff(bounds).tolist(), reverse=True)
        left = np.round(num_tokens * np.cos(np.linspace(0, np.pi / 2, steps + 1))).astype(int)
        left = np.minimum(left, np.arange(num_tokens, num_tokens - steps - 1, -1))
        left[-1] = 0
        return (-np.diff(left)).tolist()

    def temperatures(self) -> list[float]:
        steps = np.arange(self.steps)
        share = {"constant": np.ones(self.steps), "linear": 1 - steps / self.steps, "inverse": 1 / (1 + steps)}
        return (self.temperature * share[self.temperature_schedule]).tolist()


def recipes_of(own: dict[str, Any], given: dict[str, TargetArgs] | None = None) -> "Recipes":
    """How a model is asked: as `given` says, else as its own export does (plain values), else with the defaults."""
    return Recipes({**build(dict[str, TargetArgs], own, "targets", "generation.json"), **(given or {})})


def name_unknown(recipes: Iterable[str], names: Sequence[str]) -> None:
    """Say which recipes are for modalities that a model does not have. Raises UserError for one that is nearly called
    like a modality without a recipe."""
    for name in sorted(set(recipes) - set(names)):
        meant = difflib.get_close_matches(name, set(names) - set(recipes), n=1, cutoff=0.8)
        if meant:
            raise UserError(f"there is a recipe for '{name}', which this model does not have; did you "
                            f"mean '{meant[0]}'?")
        log.warning("there is a recipe for '%s', which this model does not have; it has %s", name, ", ".join(names))


class Recipes(dict[str, TargetArgs]):
    """{target modality: recipe}; a target without one gets the defaults."""

    def __missing__(self, target: str) -> TargetArgs:
        return TargetArgs()


@dataclass(frozen=True)
class RecipeConfig:
    """A YAML below cfgs/generate/: what the input is ("" = the model's first picture modality) and how each target is
    generated."""

    input: str = ""
    targets: dict[str, TargetArgs] = field(default_factory=dict)
