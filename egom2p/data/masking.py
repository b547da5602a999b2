"""Which tokens of a sample are shown and which are asked for.

For each sample one component of a mixture is drawn. Its Dirichlet distributions split the input budget and
the target budget over the modalities the clip has; each share is clamped to what is there, inputs first,
targets from what is left. Positions are random and disjoint. (EgoM2P section 3; 4M, Mizrahi et al. 2023.)
"""

from dataclasses import dataclass

import numpy as np

from egom2p.data.batch import FlatTokens
from egom2p.errors import UserError
from egom2p.modalities import ModalitySet

ATTEMPTS = 8
_MASK = 11


@dataclass(frozen=True)
class MaskComponent:
    """weight in the mixture. Either `alpha`, one concentration for every modality on both sides, or `inputs`
    and `targets`: {modality: concentration}, where a modality that is not named gets nothing."""

    weight: float = 1.0
    alpha: float | None = None
    inputs: dict[str, float] | None = None
    targets: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.inputs is None and self.targets is None):
            raise ValueError("give either alpha, or inputs and targets")
        values = [self.alpha] if self.alpha is not None else [*(self.inputs or {}).values(),
                                                              *(self.targets or {}).values()]
        if min(values, default=1) <= 0 or self.weight < 0:
            raise ValueError("concentrations must be above 0 and weights not below it")


@dataclass(frozen=True)
class MaskArgs:
    """Budgets of one sample, in tokens, and the mixture of ways to spend them."""

    input_tokens: int = 2048
    target_tokens: int = 2048
    components: tuple[MaskComponent, ...] = (MaskComponent(alpha=0.01), MaskComponent(alpha=0.1),
                                             MaskComponent(alpha=1.0), MaskComponent(alpha=10.0))

    def __post_init__(self) -> None:
        if self.input_tokens < 0 or self.target_tokens < 1:
            raise ValueError("target_tokens must be at least 1 and input_tokens not below 0")
        if not sum(c.weight for c in self.components) > 0:
            raise ValueError("components must name at least one with a weight above 0")


class Masker:
    """Draws masks. Budgets depend on the sample's modalities and (seed, number, attempt) only."""

    def __init__(self, args: MaskArgs, modalities: ModalitySet, seed: int, redraw: bool = True) -> None:
        self.args, self.modalities, self.seed, self.redraw = args, modalities, seed, redraw
        weights = np.array([c.weight for c in args.components], np.float64)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._alphas = [self._concentrations(component) for component in args.components]

    def mask(self, tokens: dict[int, np.ndarray], number: int) -> tuple[FlatTokens, FlatTokens]:
        """Inputs and targets of one sample; tokens {modality index: (n,) ids, -1 = not observed}."""
        observed = {m: ids if ids.min(initial=0) < 0 else None for m, ids in tokens.items()}
        positions = {m: None if ids is None else np.flatnonzero(ids >= 0) for m, ids in observed.items()}
        counts = np.zeros(len(self.modalities), np.int64)
        for m, ids in tokens.items():
            counts[m] = len(ids) if positions[m] is None else len(positions[m])
        num_inputs, num_targets, rng = self.plan(counts, number)
        return self._select(tokens, positions, counts, num_inputs, num_targets, rng)

    def plan(self, counts: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """(M,) inputs and targets of sample `number`, re-drawn while there is no target, and the generator to go on
        with."""
        for attempt in range(ATTEMPTS):
            rng = self._rng(number, attempt)
            num_inputs, num_targets = self.budgets(counts, rng)
            if num_targets.sum() or not self.redraw:
                return num_inputs, num_targets, rng
        half = (counts * [m.target for m in self.modalities] + 1) // 2
        inputs, targets = _within(self.args.input_tokens, counts - half), _within(self.args.target_tokens, half)
        return inputs, targets, self._rng(number, ATTEMPTS)

    def budgets(self, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(M,) inputs and (M,) targets of a sample with `counts` (M,) observed tokens a modality."""
        component = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        inputs, targets = self._alphas[min(component, len(self._alphas) - 1)]
        num_inputs = np.minimum(_split(self.args.input_tokens, np.where(counts > 0, inputs, 0), rng), counts)
        num_targets = np.minimum(_split(self.args.target_tokens, np.where(counts > 0, targets, 0), rng),
                                 counts - num_inputs)
        return num_inputs, num_targets

    def _select(self, tokens: dict[int, np.ndarray], positions: dict, counts: np.ndarray, num_inputs: np.ndarray,
                num_targets: np.ndarray, rng: np.random.Generator) -> tuple[FlatTokens, FlatTokens]:
        sides: tuple[list, list] = ([], [])
        for m in sorted(tokens):
            shown, asked = int(num_inputs[m]), int(num_targets[m])
            if shown + asked == 0:
                continue
            chosen = np.arange(counts[m]) if shown == counts[m] else rng.permutation(counts[m])
            chosen = chosen if positions[m] is None else positions[m][chosen]
            for side, part in zip(sides, (chosen[:shown], chosen[shown : shown + asked]), strict=True):
                if len(part):
                    part = np.sort(part)
                    side.append((np.full(len(part), m), part, tokens[m][part]))
        return _join(sides[0]), _join(sides[1])

    def _concentrations(self, component: MaskComponent) -> tuple[np.ndarray, np.ndarray]:
        """(M,) Dirichlet concentrations for inputs and targets; 0 = never."""
        sides = []
        for given in (component.inputs, component.targets):
            if component.alpha is not None:
                given = dict.fromkeys(self.modalities.names, component.alpha)
            unknown = set(given or {}) - set(self.modalities.names)
            if unknown:
                raise UserError(f"masking names an unknown modality '{sorted(unknown)[0]}'; there are "
                                f"{', '.join(self.modalities.names)}")
            sides.append(np.array([(given or {}).get(name, 0.0) for name in self.modalities.names]))
        return sides[0], sides[1] * [m.target for m in self.modalities]

    def _rng(self, number: int, attempt: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed * 64 + _MASK, number], counter=[0, 0, 0, attempt]))


def _within(budget: int, counts: np.ndarray) -> np.ndarray:
    """(M,) counts, scaled down to whole numbers that add up to `budget` when they are more."""
    return counts if counts.sum() <= budget else _whole(budget, counts * budget / counts.sum())


def _whole(budget: int, shares: np.ndarray) -> np.ndarray:
    """Shares that add up to `budget` as whole numbers that do (largest remainder)."""
    whole = np.floor(shares).astype(np.int64)
    missing = budget - int(whole.sum())
    if missing > 0:
        whole[np.argsort(whole - shares, kind="stable")[:missing]] += 1
    return whole


def _split(budget: int, alphas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dirichlet shares of `budget` as whole numbers; modalities with alpha 0 get none."""
    counts = np.zeros(len(alphas), np.int64)
    chosen = np.flatnonzero(alphas)
    if not len(chosen):
        return counts
    shares = budget * (rng.dirichlet(alphas[chosen]) if len(chosen) > 1 else np.ones(1))
    counts[chosen] = _whole(budget, shares)
    return counts


def _join(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> FlatTokens:
    if not parts:
        return FlatTokens(*(np.zeros(0, np.int64) for _ in range(3)))
    return FlatTokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
