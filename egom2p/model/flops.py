"""Model FLOPs of a training step, counted on real tokens (no padding, no recomputation)."""

import numpy as np

from egom2p.model.blocks import STYLES

# Dense bf16 peak FLOP/s by the vendor's datasheet, matched against the device's name, longer names first.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "GH200": 989e12, "H200": 989e12,
         "H100": 989e12, "A100": 312e12}


def training_flops(args, vocab_sizes: list[int], input_lengths: np.ndarray, target_lengths: np.ndarray) -> float:
    """Forward and backward of one pack; the backward pass counts twice the forward.

    input_lengths, target_lengths (B, M): tokens of each sample and modality. A multiply-add is 2 FLOPs. Per
    token and d = dim: encoder block 8 d^2 (qkv, proj) + MLP; decoder block 16 d^2 (self and cross) + MLP, of
    which the cross-attention's key and value 4 d^2 are paid by the context tokens; MLP 4 d h, or 6 d h gated; attention
    4 d a pair of query and key; context projection 2 d^2; head 2 d vocab a target. Embedding lookups count 0.
    """
    d, style = args.dim, STYLES[args.variant]
    hidden = int(2 * int(d * args.mlp_ratio) / 3) if style.gated else int(d * args.mlp_ratio)
    mlp = (6 if style.gated else 4) * d * hidden
    e, t = input_lengths.sum(1).astype(np.float64), target_lengths.sum(1).astype(np.float64)
    encoder = args.encoder_depth * (e.sum() * (8 * d * d + mlp) + 4 * d * (e**2).sum())
    self_pairs = (target_lengths.astype(np.float64) ** 2).sum()
    decoder = args.decoder_depth * (t.sum() * (12 * d * d + mlp) + e.sum() * 4 * d * d + 4 * d
                                    * (self_pairs + (e * t).sum()))
    heads = 2 * d * float((target_lengths.sum(0) * np.array(vocab_sizes)).sum())
    return 3 * (encoder + decoder + 2 * d * d * e.sum() + heads)


def peak_flops(device_name: str) -> float | None:
    """Datasheet bf16 peak of a known accelerator, else None."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
