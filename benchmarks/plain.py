"""The same network written the plain way: padded to the budgets, dense masks, explicit softmax, full logits.

Every position of every modality is embedded, then 2048 inputs and 2048 targets are gathered, as the released code does.
It shares the parameters of an `EgoM2P`, so losses can be compared and only the way of computing differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from egom2p.data.batch import MaskedSample
from egom2p.model.blocks import CrossAttention, SelfAttention
from egom2p.model.egom2p import EgoM2P


class PlainEgoM2P:
    """Padded forward and loss of an EgoM2P's parameters."""

    def __init__(self, model: EgoM2P, num_inputs: int, num_targets: int) -> None:
        self.model, self.num_inputs, self.num_targets = model, num_inputs, num_targets
        self.starts = [0]
        for modality in model.modalities:
            self.starts.append(self.starts[-1] + modality.num_tokens)

    def collate(self, samples: list[MaskedSample]) -> dict[str, Tensor]:
        """Full grids (B, N) of ids, which are inputs, which targets, and each position's modality."""
        total = self.starts[-1]
        tokens, is_input, is_target = (torch.zeros(len(samples), total, dtype=d)
                                       for d in (torch.long, torch.bool, torch.bool))
        for row, sample in enumerate(samples):
            for side, mask in ((sample.inputs, is_input), (sample.targets, is_target)):
                start = torch.tensor(self.starts)[torch.from_numpy(side.modality).long()]
                where = start + torch.from_numpy(side.position).long()
                tokens[row, where] = torch.from_numpy(side.token).long()
                mask[row, where] = True
        modality = torch.repeat_interleave(torch.arange(len(self.model.modalities)),
                                           torch.tensor([m.num_tokens for m in self.model.modalities]))
        return {"tokens": tokens, "is_input": is_input, "is_target": is_target,
                "modality": modality.expand(len(samples), -1)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy averaged inside each modality, then over all modalities."""
        model = self.model
        grids = batch["tokens"].split([m.num_tokens for m in model.modalities], 1)
        place = torch.cat([(e.position + e.modality).expand(len(grids[0]), -1, -1) for e in model.embeddings.values()],
                          1)
        embedded = torch.cat([e.token(g) for e, g in zip(model.embeddings.values(), grids, strict=True)], 1)
        inputs, input_ok = _first(batch["is_input"], self.num_inputs)
        targets, target_ok = _first(batch["is_target"], self.num_targets)
        x = _gather(embedded + place, inputs)
        visible = input_ok[:, None, :]
        context = model.context_projection(self.encode(x, visible)) + _gather(place, inputs)
        y = _gather(model.mask_token + place, targets)
        modality = batch["modality"].gather(1, targets)
        same = (modality[:, :, None] == modality[:, None, :]) & target_ok[:, None, :]
        y, ids = self.decode(y, same, context, visible), batch["tokens"].gather(1, targets)
        losses = []
        for index, head in enumerate(model.heads.values()):
            rows = (modality == index) & target_ok
            logits = head(y[rows])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses.append(F.cross_entropy(logits, ids[rows]) if rows.any() else y.new_zeros(()))
        return torch.stack(losses).mean()

    def encode(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, N, dim) inputs under a mask of keys (B, 1, N)."""
        for block in self.model.encoder:
            x = x + self._self_attention(block.attn, block.norm1(x), visible)
            x = x + block.mlp(block.norm2(x))
        return self.model.encoder_norm(x)

    def decode(self, y: Tensor, same: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """(B, T, dim) queries that see each other where `same` (B, T, T) and the context where `visible` (B, 1, N)."""
        for block in self.model.decoder:
            y = y + self._self_attention(block.self_attn, block.norm1(y), same)
            y = y + self._cross_attention(block.cross_attn, block.query_norm(y), block.context_norm(context), visible)
            y = y + block.mlp(block.norm2(y))
        return self.model.decoder_norm(y)

    def _self_attention(self, attn: SelfAttention, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if attn.qk_norm is not None:
            q, k = attn.qk_norm(q, k)
        return attn.proj(_softmax_attention(q, k, v, allowed))

    def _cross_attention(self, attn: CrossAttention, x: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
        q = attn.q(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        k, v = attn.kv(context).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if attn.qk_norm is not None:
            q, k = attn.qk_norm(q, k)
        return attn.proj(_softmax_attention(q, k, v, allowed))


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """(B, H, Tq, D) with allowed (B, Tq or 1, Tk) -> (B, Tq, H * D)."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _first(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices (B, count) of the True positions of each row first, and which of them are True."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return order, mask.gather(1, order)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
