"""The network: encoder over visible tokens, decoder over masked positions, one head a modality.

Shapes: E visible tokens and D target tokens of a whole pack, `dim` channels.
Encoder input = token embedding + (position + modality); decoder query = mask token + the same sum;
context = linear(encoder output) + the same sum of the inputs. Modality embeddings are shared by both sides.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from egom2p.config import read_json
from egom2p.data.batch import FlatTokens, MaskedSample, PackedBatch, PackedTokens, pack
from egom2p.errors import UserError
from egom2p.export import Exportable, resolve_folder
from egom2p.modalities import Modality, ModalitySet, stored_ids
from egom2p.model.attention import Segments, permute_rows, segment_attention
from egom2p.model.blocks import (
    STYLES,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    SelfAttention,
    init_weights,
    layer_norm,
)
from egom2p.model.loss import NearCodes, Softmax, softmax_step, softmax_step_to_fuse, weighted_cross_entropy
from egom2p.model.positions import position_table

GENERATION = "generation.json"
SEGMENT_STEP = 64  # a filled pack has a multiple of so many segments


@dataclass(frozen=True)
class ModelArgs:
    """Any size; `variant` gelu (with biases), swiglu (without) or swiglu_qknorm. embedding_std: of the token
    tables at the start; 0.02 as released, nearer 1 (the size of the position table) for short trainings. fill_to: where
    gradients are made, blocks compute micro-batches filled up to a multiple of so many tokens a side, which come in few
    shapes (0 = as they are; 1024 for 32 samples of the released budgets)."""

    dim: int
    num_heads: int
    encoder_depth: int
    decoder_depth: int
    mlp_ratio: float = 4.0
    variant: Literal["gelu", "swiglu", "swiglu_qknorm"] = "swiglu"
    activation_checkpointing: bool = False
    embedding_std: float = 0.02
    fill_to: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.num_heads) < 1 or min(self.encoder_depth, self.decoder_depth) < 0:
            raise ValueError("dim and num_heads must be at least 1, and no depth below 0")
        if self.dim % self.num_heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even and divide by num_heads {self.num_heads}")
        if self.fill_to < 0:
            raise ValueError("fill_to must not be below 0")


class ModalityEmbedding(nn.Module):
    """Token table (vocab, dim) of the encoder, modality vector (dim,) and fixed position table (n, dim)."""

    def __init__(self, modality: Modality, dim: int) -> None:
        super().__init__()
        self.token = nn.Embedding(modality.vocab_size, dim)
        self.modality = nn.Parameter(torch.empty(dim))
        self.register_buffer("position", position_table(modality.grid, dim, modality.positions), persistent=False)

    @torch.no_grad()
    def reset(self, token_std: float) -> None:
        """Normal; the modality vector with std 0.02, as in 4M."""
        nn.init.normal_(self.token.weight, std=token_std)
        nn.init.normal_(self.modality, std=0.02)


class EgoM2P(Exportable):
    """See the module's docstring. Build from `ModalitySet` and `ModelArgs`, or `from_pretrained(folder)`.

    generation: {target modality: recipe in plain values}, how the model was meant to be asked; `generation.schedule`
    reads it. origins: {modality: fingerprint of the tokenizer whose tokens it learnt}, as far as that is known.
    """

    # Bound by egom2p/__init__.py to `generation.sampler.generate_targets`: the network itself knows nothing of
    # sampling.
    generate: Callable[..., Any]

    def __init__(self, modalities: ModalitySet, args: ModelArgs) -> None:
        super().__init__()
        self.modalities, self.args = modalities, args
        self.generation: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.folder: Path | None = None  # where it was loaded from
        self.softmax: Softmax = softmax_step
        self.near_codes = nn.ModuleDict()
        style = STYLES[args.variant]
        sizes = (args.dim, args.num_heads, args.mlp_ratio, style)
        self.embeddings = nn.ModuleDict({m.name: ModalityEmbedding(m, args.dim) for m in modalities})
        self.mask_token = nn.Parameter(torch.empty(args.dim))
        self.encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(args.encoder_depth))
        self.encoder_norm = layer_norm(args.dim, style)
        self.context_projection = nn.Linear(args.dim, args.dim)
        self.decoder = nn.ModuleList(DecoderBlock(*sizes) for _ in range(args.decoder_depth))
        self.decoder_norm = layer_norm(args.dim, style)
        self.heads = nn.ModuleDict({m.name: nn.Linear(args.dim, m.vocab_size, bias=False) for m in modalities})
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise in place: blocks as `init_weights`, embeddings, heads and mask token normal with std 0.02."""
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        for embedding, head in zip(self.embeddings.values(), self.heads.values(), strict=True):
            embedding.reset(self.args.embedding_std)
            nn.init.normal_(head.weight, std=0.02)

    @torch.no_grad()
    def start_from_codes(self, codes: dict[str, Tensor], seed: int = 0) -> None:
        """Initialise token tables and heads from {modality: (vocab, L)} code vectors of the tokenizers.

        Ids with near codes start with near embeddings: a fixed random projection of the standardised codes
        and their first harmonics, scaled to the usual standard deviations. Short trainings gain most.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, table in codes.items():
            z = (table.cpu().float() - table.cpu().float().mean(0)) / table.cpu().float().std(0).clamp(min=1e-6)
            features = torch.cat([z, (2 * z).cos(), (2 * z).sin()], 1)
            for weight, std in ((self.embeddings[name].token.weight, self.args.embedding_std),
                                (self.heads[name].weight, 0.02)):
                projected = features @ torch.randn(features.shape[1], weight.shape[1], generator=generator)
                weight.copy_((projected - projected.mean(0)) * std / projected.std())

    def spread_targets(self, codes: dict[str, Tensor], width: float) -> None:
        """From now on the loss spreads each target of these modalities over the ids whose (vocab, L) code vectors are
        near, by a Gaussian of `width` steps between codes."""
        self.near_codes = nn.ModuleDict({name: NearCodes(table, width) for name, table in codes.items()})

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), **({"origins": self.origins} if self.origins else {})}

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Self:
        model = super().from_config(config, source)
        model.origins = dict(config.get("origins", {}))
        return model

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        super().save_pretrained(folder, weights)
        if self.generation:
            (Path(folder) / GENERATION).write_text(json.dumps(self.generation, indent=1))

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Self:
        """See `Exportable.from_pretrained`; `generation.json` beside the config says how it wants to be asked."""
        folder = resolve_folder(source)
        model = super().from_pretrained(folder, device)
        model.folder = folder
        if (folder / GENERATION).is_file():
            model.generation = read_json(folder / GENERATION)
        return model

    def fingerprint(self) -> str:
        """A digest of the weights that is quick to take: a few entries of each. Of a sharded model all ranks take it
        together; asking for its `state_dict` instead would shard again what is whole for the moment."""
        digest = hashlib.sha256()
        for name, tensor in self.named_parameters():
            flat = getattr(tensor.detach(), "full_tensor", tensor.detach)().flatten()
            digest.update(name.encode() + flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.mask_token.device

    def compile(self, **options: Any) -> None:
        """torch.compile every block in place and the loss's softmax, once for all lengths (dynamic shapes).

        Segment attention itself stays outside (its Python groups segments by length); what is compiled is the norms,
        projections, gates and residuals around it.
        """
        import torch._dynamo  # takes a second, and only trainings that compile need it

        options = {"dynamic": True, **options}
        # Inside DistributedDataParallel dynamo would cut each block's graphs again, where gradients are bucketed; as
        # blocks are compiled one by one, sums over ranks and computation overlap anyway.
        torch._dynamo.config.optimize_ddp = False
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.attend = torch.compiler.disable(segment_attention)
        for block in [*self.encoder, *self.decoder]:
            block.compile(**options)
        self.softmax = torch.compile(softmax_step_to_fuse, **options)

    def forward(self, batch: PackedBatch, scale: Tensor | None = None):
        """Hidden states (D, dim) of the targets sorted by modality; with `scale` (D,), the loss of `loss`.

        (The loss is reachable from `forward` because DistributedDataParallel only wraps that.)
        """
        hidden_D = self.decode_packed(batch, self.context_packed(batch), batch.inputs.lengths.sum(1))
        return hidden_D if scale is None else self.loss(hidden_D, batch, scale)

    def context_packed(self, batch: PackedBatch) -> Tensor:
        """What the decoder looks at: (E, dim), projected encoder features of the visible tokens plus their places."""
        place_E = self._place(batch.inputs)
        return self.context_projection(self.encode_packed(batch, place_E)) + place_E

    def decode_packed(self, batch: PackedBatch, context_ED: Tensor, context_lengths: np.ndarray) -> Tensor:
        """Hidden states (D, dim) of the targets sorted by modality, given (E, dim) context of which the samples own
        `context_lengths` (B,) rows each."""
        hidden_D = self._decode(batch, self.mask_token + self._place(batch.targets), context_ED, context_lengths)
        return permute_rows(hidden_D, batch.targets.by_modality, batch.targets.to_pack)

    def encode_packed(self, batch: PackedBatch, place_E: Tensor | None = None, layers: int | None = None) -> Tensor:
        """Encoder features (E, dim) of the visible tokens, in pack order. layers: only the first so many blocks, and
        then no norm, as that is the last block's."""
        place_E = self._place(batch.inputs) if place_E is None else place_E
        x_ED = self._filled(self._embed_tokens(batch.inputs) + place_E)
        lengths = batch.inputs.lengths.sum(1)
        segments = self._segments(lengths, lengths, x_ED, x_ED)
        for block in self.encoder[:layers]:
            x_ED = self._run(block, x_ED, segments)
        x_ED = x_ED[: len(place_E)]
        return self.encoder_norm(x_ED) if layers is None else x_ED

    def loss(self, hidden_D: Tensor, batch: PackedBatch, scale_D: Tensor) -> tuple[Tensor, Tensor]:
        """sum of scale * CE over the targets, and each target's CE (D,), both sorted by modality.

        hidden_D as `forward` returns it; scale_D (D,) in the same order.
        """
        token = batch.targets.token[batch.targets.by_modality]
        parts = zip(self.heads.items(), *(x.split(batch.targets.modality_counts) for x in (hidden_D, token, scale_D)),
                    strict=True)
        near = dict(self.near_codes.items())
        totals, losses = zip(*(weighted_cross_entropy(h, head.weight, t, s, self.softmax, near.get(name))
                               for (name, head), h, t, s in parts), strict=True)
        return torch.stack(totals).sum(), torch.cat(losses)

    def logits(self, hidden_D: Tensor, counts: list[int]) -> list[Tensor]:
        """[(targets of modality m, vocab)] from hidden states sorted by modality; counts: targets a modality."""
        return [head(h) for head, h in zip(self.heads.values(), hidden_D.split(counts), strict=True)]

    def masked_logits(self, tokens: dict[str, Tensor], is_input: dict[str, Tensor],
                      is_target: dict[str, Tensor]) -> dict[str, Tensor]:
        """{modality: (targets, vocab)}, rows by sample, then position.

        tokens {modality: (B, *grid) ids}; is_input and is_target {modality: (B, n) bool}.
        """
        samples = samples_from_grids(self.modalities, tokens, is_input, is_target)
        batch = pack(samples, len(self.modalities)).to(self.device)
        logits = self.logits(self(batch), batch.targets.modality_counts)
        return {m.name: rows for m, rows in zip(self.modalities, logits, strict=True) if m.name in tokens}

    @torch.no_grad()
    def score(self, tokens: dict[str, Tensor], is_input: dict[str, Tensor],
              is_target: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-likelihood (nats) of given tokens under a mask: log p(token | the inputs) of each target on its own.

        tokens {modality: (B, *grid) ids}; is_input and is_target {modality: (B, n) bool} -> {modality: (B, n)}, NaN
        where a position is no target.
        """
        samples = samples_from_grids(self.modalities, tokens, is_input, is_target)
        if any(sample.targets.token.min(initial=0) < 0 for sample in samples):
            raise UserError("a target that was not observed has no likelihood; leave it out of is_target")
        batch = pack(samples, len(self.modalities)).to(self.device)
        _, losses = self(batch, torch.ones(len(batch.targets), dtype=self.mask_token.dtype, device=self.device))
        out = {}
        for modality, rows in zip(self.modalities, losses.split(batch.targets.modality_counts), strict=True):
            if modality.name in is_target:
                mask = torch.as_tensor(is_target[modality.name], device=self.device).reshape(len(samples), -1)
                out[modality.name] = rows.new_full(mask.shape, float("nan"))
                out[modality.name][mask] = -rows
        return out

    @torch.no_grad()
    def encode(self, tokens: dict[str, Tensor], layers: int | None = None) -> dict[str, Tensor]:
        """Encoder features of whole grids, for downstream tasks; layers: after the first so many blocks.

        tokens {modality: (B, *grid) ids}, negative ids (65535 in uint16, as shards store it) are unknown and left out
        -> {modality: (B, n, dim)}, zeros at unknown positions. Raises UserError for a name the model does not have.
        """
        tokens = checked_grids(self.modalities, tokens)
        shown = {n: torch.from_numpy(ids >= 0) for n, ids in tokens.items()}
        batch = pack(samples_from_grids(self.modalities, tokens, shown, {}), len(self.modalities)).to(self.device)
        packed = self.encode_packed(batch, layers=layers)
        features = permute_rows(packed, batch.inputs.by_modality, batch.inputs.to_pack)
        out = {}
        for modality, rows in zip(self.modalities, features.split(batch.inputs.modality_counts), strict=True):
            if modality.name in tokens:
                out[modality.name] = features.new_zeros(*shown[modality.name].shape, self.args.dim)
                out[modality.name][shown[modality.name]] = rows
        return out

    def _place(self, tokens: PackedTokens) -> Tensor:
        """Position + modality embedding of each token, (N, dim)."""
        counts, device = tokens.modality_counts, self.device
        position = tokens.position[tokens.by_modality].split(counts)
        parts = [e.position[p] + e.modality for e, p in zip(self.embeddings.values(), position, strict=True)]
        return permute_rows(torch.cat(parts).to(device), tokens.to_pack, tokens.by_modality)

    def _embed_tokens(self, tokens: PackedTokens) -> Tensor:
        ids = tokens.token[tokens.by_modality].split(tokens.modality_counts)
        parts = [e.token(i) for e, i in zip(self.embeddings.values(), ids, strict=True)]
        return permute_rows(torch.cat(parts), tokens.to_pack, tokens.by_modality)

    def _decode(self, batch: PackedBatch, x_DD: Tensor, context_ED: Tensor, context_lengths: np.ndarray) -> Tensor:
        num_targets = len(x_DD)
        x_DD, context_ED = self._filled(x_DD), self._filled(context_ED)
        by_modality = batch.targets.lengths.reshape(-1)
        by_modality = by_modality[by_modality > 0]
        self_segments = self._segments(by_modality, by_modality, x_DD, x_DD)
        cross_segments = self._segments(batch.targets.lengths.sum(1), context_lengths, x_DD, context_ED)
        for block in self.decoder:
            x_DD = self._run(block, x_DD, context_ED, self_segments, cross_segments)
        return self.decoder_norm(x_DD[:num_targets])

    def _filled(self, x_TD: Tensor) -> Tensor:
        """Where gradients are made: with zero rows at the end, up to a multiple of `fill_to`, so that packs come in few
        shapes. They are a segment of their own, which nothing else sees, and are cut off before anything is made of
        them."""
        return F.pad(x_TD, (0, 0, 0, -len(x_TD) % self.args.fill_to)) if self._fills else x_TD

    @property
    def _fills(self) -> bool:
        return self.args.fill_to > 0 and torch.is_grad_enabled()

    def _segments(self, query_lengths: np.ndarray, key_lengths: np.ndarray, queries: Tensor, keys: Tensor) -> Segments:
        """Segments of a pack, one more for the rows that `_filled` added, and empty ones up to a multiple of
        SEGMENT_STEP."""
        if self._fills:
            empty = [0] * (-(len(query_lengths) + 1) % SEGMENT_STEP)
            query_lengths, key_lengths = (np.array([*n, len(rows) - n.sum(), *empty]) for n, rows in (
                (query_lengths, queries), (key_lengths, keys)))
        return Segments(query_lengths, key_lengths, queries.device)

    def _run(self, block: nn.Module, *args):
        if self.args.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def checked_grids(modalities: ModalitySet, tokens: dict) -> dict[str, np.ndarray]:
    """{modality: (B, *grid) ids}, as shards store them too -> {modality: (B, n) int64}, -1 where not observed, in the
    model's order. Raises UserError for unknown names, other grids, and batches of several sizes."""
    if strangers := set(tokens) - set(modalities.names):
        raise UserError(f"the model has no modality '{sorted(strangers)[0]}'; it has {', '.join(modalities.names)}")
    found: dict[str, np.ndarray] = {}
    for modality in (m for m in modalities if m.name in tokens):
        ids = tokens[modality.name]
        ids = stored_ids(np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids))
        if ids.ndim < 2 or ids.shape[1:] not in (modality.grid, (modality.num_tokens,)):
            raise UserError(f"'{modality.name}': tokens of shape {ids.shape}, expected (clips, "
                            f"{', '.join(map(str, modality.grid))})")
        found[modality.name] = ids.reshape(len(ids), -1)
    if len({len(ids) for ids in found.values()}) != 1:
        counts = ", ".join(f"{name} {len(ids)}" for name, ids in found.items())
        raise UserError(f"tokens of as many clips of each modality are wanted, at least of one ({counts or 'none'})")
    return found


def samples_from_grids(modalities: ModalitySet, tokens: dict, is_input: dict, is_target: dict) -> list[MaskedSample]:
    """Dense (B, *grid) ids and (B, n) masks -> MaskedSamples. Modalities missing from a dictionary are unused."""
    ids = checked_grids(modalities, tokens)
    num_samples = len(next(iter(ids.values())))
    masks = [{n: np.asarray(torch.as_tensor(side[n]).cpu()).reshape(num_samples, -1) for n in ids if n in side}
             for side in (is_input, is_target)]
    for name, mask in masks[0].items():  # what was not observed is not shown
        masks[0][name] = mask & (ids[name] >= 0)
    return [MaskedSample(i, *(_select(modalities, ids, side, i) for side in masks)) for i in range(num_samples)]


def _select(modalities: ModalitySet, ids: dict, masks: dict, sample: int) -> FlatTokens:
    parts = [(index, np.flatnonzero(masks[m.name][sample]), ids[m.name][sample])
             for index, m in enumerate(modalities) if m.name in masks]
    if not parts:
        return FlatTokens(*(np.zeros(0, np.int64) for _ in range(3)))
    return FlatTokens(np.concatenate([np.full(len(p), index) for index, p, _ in parts]),
                      np.concatenate([p for _, p, _ in parts]), np.concatenate([t[p] for _, p, t in parts]))

