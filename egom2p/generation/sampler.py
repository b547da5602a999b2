"""Predict any modalities from any others, one implementation for every scheme and modality.

A target's tokens are decoded in steps. Each step encodes what is visible (the condition and the target's
tokens so far), predicts some hidden positions, and makes a few of them visible. Guidance adds, in the same
pack, further views of every clip that see none or some of the condition, but the same target tokens. Chained
targets join the condition of those after them.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from egom2p.data.batch import FlatTokens, MaskedSample, pack
from egom2p.errors import UserError
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P, checked_grids
from egom2p.tokenizers.base import Tokenizer

LOGITS_AT_ONCE = 1 << 28
NO_TOKENS = FlatTokens(*(np.zeros(0, np.int64) for _ in range(3)))


@dataclass
class Generated:
    """Per target modality: tokens (B, *grid) int64; confidence (B, n), the probability the model gave the
    chosen id before filtering; expected (B, n, L), mean code vectors, where codes were given."""

    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    confidence: dict[str, np.ndarray] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)

    def signals(self, name: str, tokenizer: Tokenizer) -> list[np.ndarray]:
        """The raw signal of each clip: of the mean codes where there are some, else of the tokens."""
        if name in self.expected:
            return [tokenizer.decode_from_codes(c) for c in self.expected[name]]
        return [tokenizer.decode(ids) for ids in self.tokens[name]]


@torch.no_grad()
def generate(model: EgoM2P, tokens: dict[str, np.ndarray], targets: dict[str, TargetArgs], seed: int = 0,
             keys: list[str] | None = None, known: dict[str, np.ndarray] | None = None,
             codes: dict[str, Tensor] | None = None) -> Generated:
    """Generate `targets`, in order, for a batch of clips.

    tokens: {modality: (B, *grid) ids}, the condition; negative ids are unknown. A target may be in `tokens`
    too: with `known` {target: (B, n) bool} those positions are given and the rest is filled in.
    keys: B names; a clip's random numbers depend on (seed, key) only, not on the batch. codes: {target:
    (vocab, L)} code vectors whose expectation is wanted.
    """
    grids = checked_grids(model.modalities, tokens)
    num_clips = len(next(iter(grids.values())))
    keys = keys or [str(i) for i in range(num_clips)]
    for name in targets:
        if name not in model.modalities.names:
            raise UserError(f"the model has no modality '{name}'; it has {', '.join(model.modalities.names)}")
    state = {name: np.full((num_clips, m.num_tokens), -1)
             for name, m in zip(model.modalities.names, model.modalities, strict=True)}
    for name, ids in grids.items():
        state[name] = np.where(known[name].reshape(num_clips, -1), ids, -1) if name in (known or {}) else ids.copy()
    for name in targets:
        if not model.modalities.by_name(name).target and (state[name] < 0).any():
            raise UserError(f"this model never learnt to predict '{name}' (target: false)")
    out = Generated()
    for number, (name, args) in enumerate(targets.items()):
        decoder = _TargetDecoder(model, name, args, state, [_clip_rng(seed, key, number) for key in keys])
        decoder.run((codes or {}).get(name))
        modality = model.modalities.by_name(name)
        out.tokens[name] = state[name].reshape(num_clips, *modality.grid)
        out.confidence[name] = decoder.confidence
        if decoder.expected is not None:
            out.expected[name] = decoder.expected
    return out


def generate_targets(model: EgoM2P, tokens: dict, targets: list[str] | dict[str, TargetArgs], **options) -> Generated:
    """`EgoM2P.generate`: predict `targets` (names, or {name: TargetArgs}) from {modality: (B, *grid) ids}, arrays or
    tensors; options as in `generate`."""
    recipes = targets if isinstance(targets, dict) else {name: TargetArgs() for name in targets}
    return generate(model, tokens, recipes, **options)


@torch.no_grad()
def generate_samples(model: EgoM2P, tokens: dict[str, np.ndarray], targets: dict[str, TargetArgs], samples: int,
                     seed: int = 0,
                     keys: list[str] | None = None, known: dict[str, np.ndarray] | None = None,
                     codes: dict[str, Tensor] | None = None) -> list[Generated]:
    """`samples` independent draws for each clip, all in one batch. The first equals `generate`'s."""
    num_clips = len(next(iter(tokens.values())))
    keys = keys or [str(i) for i in range(num_clips)]

    def repeat(grids: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
        return {n: np.concatenate([np.asarray(g)] * samples) for n, g in grids.items()} if grids else None

    names = [k if i == 0 else f"{k}#{i}" for i in range(samples) for k in keys]
    made = generate(model, repeat(tokens), targets, seed, names, repeat(known), codes)
    return [Generated(*({n: v[i * num_clips : (i + 1) * num_clips] for n, v in part.items()}
                        for part in (made.tokens, made.confidence, made.expected)))
            for i in range(samples)]


class _TargetDecoder:
    """Decodes one target for all clips; writes its ids into `state[name]`."""

    def __init__(self, model: EgoM2P, name: str, args: TargetArgs, state: dict[str, np.ndarray],
                 rngs: list[np.random.Generator]) -> None:
        self.model, self.name, self.args, self.state, self.rngs = model, name, args, state, rngs
        self.hidden = [np.flatnonzero(row < 0) for row in state[name]]
        if args.order == "roar":
            self.hidden = [rng.permutation(h) for rng, h in zip(rngs, self.hidden, strict=True)]
        self.confidence = np.where(state[name] < 0, 0.0, 1.0)
        self.expected: Tensor | None = None
        self.contexts: dict[frozenset[str], list[Tensor]] = {}

    def run(self, codes: Tensor | None) -> None:
        sizes = [self.args.sizes(len(h)) if len(h) else [] for h in self.hidden]
        if codes is not None:
            shown = torch.from_numpy(np.maximum(self.state[self.name], 0)).to(codes.device)
            self.expected = codes[shown].clone()
        for step, temperature in enumerate(self.args.temperatures()):
            take = [s[step] if step < len(s) else 0 for s in sizes]
            if not any(take):
                break
            asked = [h if self.args.order == "maskgit" else h[:n] for h, n in zip(self.hidden, take, strict=True)]
            asked = [np.sort(a) for a in asked]
            self._commit(asked, take, *self._draw(asked, temperature, codes))

    def _draw(self, asked: list[np.ndarray], temperature: float,
              codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, their probability and, given codes, the mean code of every asked position, of all clips one after the
        other. Every guided and unguided view of every clip goes through in one pack, and then through the head some
        positions at a time, whose logits over a large vocabulary would fill a GPU."""
        views = self._views()
        hidden = self._reused(views, asked) if self.args.reuse_condition else self._together(views, asked)
        parts, weights = hidden.chunk(len(views)), [w for _, w in views]
        uniform = torch.from_numpy(np.concatenate([rng.random(len(a))
                                                   for rng, a in zip(self.rngs, asked, strict=True)])).to(hidden.device)
        head = self.model.heads[self.name]
        rows = max(1, LOGITS_AT_ONCE // (head.weight.shape[0] * len(views)))
        drawn = []
        for start in range(0, len(uniform), rows):
            logits = [head(part[start : start + rows]).float() for part in parts]
            guided = sum(x * w for x, w in zip(logits[1:], weights[1:], strict=True)) + logits[0] * weights[0]
            probabilities = guided.softmax(-1)
            ids = sample_ids(guided, uniform[start : start + rows], temperature, self.args.top_p, self.args.top_k)
            drawn.append((ids, probabilities.gather(1, ids[:, None])[:, 0],
                          probabilities @ codes.to(probabilities) if codes is not None else None))
        ids, confidence, expected = zip(*drawn, strict=True)
        return torch.cat(ids), torch.cat(confidence), torch.cat(expected) if codes is not None else None

    def _views(self) -> list[tuple[frozenset[str], float]]:
        """(condition modalities that are visible, weight of those logits) of each view; weights sum to 1."""
        everything = frozenset(n for n, rows in self.state.items() if n != self.name and (rows >= 0).any())
        scales = {frozenset([n]): w for n, w in self.args.condition_weights.items()} or {everything: self.args.guidance}
        for name in self.args.condition_weights:
            if name not in everything:
                raise UserError(f"condition_weights names '{name}', which is not given; the condition is "
                                f"{', '.join(sorted(everything)) or 'empty'}")
        if scales == {everything: 1.0}:
            return [(everything, 1.0)]
        return [(frozenset(), 1.0 - sum(scales.values())), *scales.items()]

    def _together(self, views: list[tuple[frozenset[str], float]], asked: list[np.ndarray]) -> Tensor:
        """Hidden states when each view's condition and the target's tokens so far are encoded together."""
        samples = [MaskedSample(clip, self._tokens(clip, names | {self.name}), self._queries(positions))
                   for names, _ in views for clip, positions in enumerate(asked)]
        return self.model(pack(samples, len(self.model.modalities)).to(self.model.device))

    def _reused(self, views: list[tuple[frozenset[str], float]], asked: list[np.ndarray]) -> Tensor:
        """Hidden states when conditions are encoded once, and the target's tokens by themselves at every step."""
        clips = range(len(asked))
        own = self._context([self._tokens(clip, {self.name}) for clip in clips])
        contexts = []
        for names, _ in views:
            if names not in self.contexts:
                self.contexts[names] = self._context([self._tokens(clip, names) for clip in clips])
            contexts += [torch.cat([self.contexts[names][clip], own[clip]]) for clip in clips]
        samples = [MaskedSample(clip, NO_TOKENS, self._queries(positions)) for _ in views
                   for clip, positions in enumerate(asked)]
        batch = pack(samples, len(self.model.modalities)).to(self.model.device)
        return self.model.decode_packed(batch, torch.cat(contexts), np.array([len(c) for c in contexts]))

    def _context(self, tokens: list[FlatTokens]) -> list[Tensor]:
        """What the decoder looks at for each clip: (tokens of the clip, dim)."""
        batch = pack([MaskedSample(i, t, NO_TOKENS) for i, t in enumerate(tokens)],
                     len(self.model.modalities)).to(self.model.device)
        return list(self.model.context_packed(batch).split([len(t) for t in tokens]))

    def _tokens(self, clip: int, names: frozenset[str] | set[str]) -> FlatTokens:
        parts = []
        for m, name in enumerate(self.model.modalities.names):
            if name in names:
                shown = np.flatnonzero(self.state[name][clip] >= 0)
                parts.append((np.full(len(shown), m), shown, self.state[name][clip][shown]))
        return FlatTokens(*map(np.concatenate, zip(*parts, strict=True))) if parts else NO_TOKENS

    def _queries(self, positions: np.ndarray) -> FlatTokens:
        return FlatTokens(np.full(len(positions), self.model.modalities.index_of(self.name)), positions,
                          np.zeros(len(positions), np.int64))

    def _commit(self, asked: list[np.ndarray], take: list[int], ids: Tensor, confidence: Tensor,
                expected: Tensor | None) -> None:
        """Keep `take` of each clip's asked positions, the surest."""
        start = 0
        for clip, (positions, num) in enumerate(zip(asked, take, strict=True)):
            rows = np.arange(start, start + len(positions))
            start += len(positions)
            if num < len(positions):
                surest = confidence[torch.from_numpy(rows).to(ids.device)].cpu().numpy()
                chosen = np.sort(np.argsort(-surest, kind="stable")[:num])
                rows, positions = rows[chosen], positions[chosen]
            picked = torch.from_numpy(rows).to(ids.device)
            self.state[self.name][clip][positions] = ids[picked].cpu().numpy()
            self.confidence[clip][positions] = confidence[picked].cpu().numpy()
            if expected is not None:
                where = torch.from_numpy(positions).to(self.expected.device)
                self.expected[clip][where] = expected[picked].to(self.expected)
            self.hidden[clip] = self.hidden[clip][~np.isin(self.hidden[clip], positions)]


def sample_ids(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """One id a row of (N, vocab) logits, by inverse transform of `uniform` (N,) in [0, 1).

    The filters look at the logits before the temperature divides them (as the released sampler does).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        logits = _keep_nucleus(logits, top_p)
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _keep_nucleus(logits: Tensor, top_p: float, first_look: int = 1024) -> Tensor:
    """Mask all but the smallest set of ids whose probability reaches top_p (Holtzman et al. 2020).

    The set is looked for among the `first_look` likeliest ids before the whole vocabulary is sorted.
    """
    probabilities = logits.softmax(-1)
    for count in (min(first_look, logits.shape[-1]), logits.shape[-1]):
        values, order = probabilities.topk(count, dim=-1)
        before = values.cumsum(-1) - values
        if count == logits.shape[-1] or bool((before[:, -1] >= top_p).all()):
            break
    kept = torch.where(before < top_p, logits.gather(1, order), torch.full_like(values, float("-inf")))
    return torch.full_like(logits, float("-inf")).scatter(1, order, kept)


def _clip_rng(seed: int, key: str, target: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}|{key}|{target}".encode("utf-8", "surrogateescape")).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
