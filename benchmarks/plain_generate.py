"""Generation written the plain way: padded, every position embedded at every step, guided and unguided passes apart.

Decoding schedule, random numbers and weights are those of `egom2p.generation.sampler`, so greedy ids can be compared
and only the way of computing differs: at each step all positions of all modalities are embedded, the inputs (at least 2
048) and the step's targets are gathered and attended under dense masks with an explicit softmax, the guided and the
unguided pass are two, and top-p sorts the whole vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import PlainEgoM2P, _first, _gather
from egom2p.generation.sampler import _clip_rng
from egom2p.generation.schedule import TargetArgs
from egom2p.model.blocks import CrossAttention
from egom2p.model.egom2p import EgoM2P


class PlainGenerator(PlainEgoM2P):
    """One clip, random-order autoregression (`roar`)."""

    def __init__(self, model: EgoM2P, num_inputs: int = 2048) -> None:
        super().__init__(model, num_inputs, 0)

    @torch.no_grad()
    def generate(self, condition: dict[str, np.ndarray], target: str, args: TargetArgs, seed: int = 0,
                 key: str = "0") -> np.ndarray:
        """(n,) ids of the target."""
        model, names = self.model, self.model.modalities.names
        spans = {n: slice(self.starts[i], self.starts[i + 1]) for i, n in enumerate(names)}
        tokens = torch.zeros(1, self.starts[-1], dtype=torch.long)
        given = torch.zeros(1, self.starts[-1], dtype=torch.bool)
        for name, grid in condition.items():
            tokens[0, spans[name]] = torch.from_numpy(grid.reshape(-1))
            given[0, spans[name]] = True
        size, start = model.modalities.by_name(target).num_tokens, self.starts[names.index(target)]
        rng = _clip_rng(seed, key, 0)
        hidden = rng.permutation(size)
        known = torch.zeros_like(given)
        for count, temperature in zip(args.sizes(size), args.temperatures(), strict=False):
            chosen = np.sort(hidden[:count])
            asked = torch.zeros_like(given)
            asked[0, start + torch.from_numpy(chosen)] = True
            logits = self._logits(tokens, given | known, asked, target)
            if args.guidance != 1.0:
                free = self._logits(tokens, known, asked, target)
                logits = free + args.guidance * (logits - free)
            ids = _sample(logits, torch.from_numpy(rng.random(len(chosen))), temperature, args.top_p)
            tokens[0, start + torch.from_numpy(chosen)] = ids
            known[0, start + torch.from_numpy(chosen)] = True
            hidden = hidden[count:]
        return tokens[0, spans[target]].numpy()

    def _logits(self, tokens: Tensor, shown: Tensor, asked: Tensor, target: str) -> Tensor:
        """(asked positions, vocab)."""
        model = self.model
        grids = tokens.split([m.num_tokens for m in model.modalities], 1)
        place = torch.cat([(e.position + e.modality).expand(len(tokens), -1, -1) for e in model.embeddings.values()], 1)
        embedded = torch.cat([e.token(g) for e, g in zip(model.embeddings.values(), grids, strict=True)], 1)
        inputs, input_ok = _first(shown, max(self.num_inputs, int(shown.sum())))
        targets, _ = _first(asked, int(asked.sum()))
        x = _gather(embedded + place, inputs)
        visible = input_ok[:, None, :]
        context = model.context_projection(self.encode(x, visible)) + _gather(place, inputs)
        y = _gather(model.mask_token + place, targets)
        same = torch.ones(1, y.shape[1], y.shape[1], dtype=torch.bool)
        return model.heads[target](self.decode(y, same, context, visible))[0].float()

    def _cross_attention(self, attn: CrossAttention, x: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
        """Nothing to look at gives zeros before the projection."""
        return super()._cross_attention(attn, x, context,
                                        allowed) if bool(allowed.any()) else attn.proj(torch.zeros_like(x))


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_p < 1:
        values, order = logits.softmax(-1).sort(-1, descending=True)
        drop = (values.cumsum(-1) - values) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:],
                              right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
