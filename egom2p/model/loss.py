"""Cross-entropy over large vocabularies without ever holding all logits.

torch.nn.functional.linear_cross_entropy chunks too, but cannot weight single targets, which the loss over
groups of samples needs (`docs/architecture.md`); so the chunked form here serves every device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p.errors import UserError

# Logits held at a time. On a GPU each chunk reads the whole head again and adds to its whole gradient, so chunks are
# large there: 1 GB in float32, 4 194 rows of 64 000 (counted, not measured: 58 chunks a micro-batch become 4).
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}

Softmax = Callable[..., tuple[Tensor, Tensor, Tensor]]
NEAREST = 32  # ids over which a target may be spread


class NearCodes(nn.Module):
    """For each id of a vocabulary (V,): the K ids with the nearest code vectors, itself among them, and how much of a
    target each gets, (V, K) both, rows of `share` summing to 1.

    A Gaussian of `width` in steps: the median distance of a code to the nearest other one. Not part of any export.
    """

    def __init__(self, codes_VL: Tensor, width: float) -> None:
        super().__init__()
        codes = codes_VL.detach().cpu().float()
        count = min(NEAREST, len(codes))
        found = [torch.cdist(part, codes).topk(count, largest=False) for part in codes.split(1024)]
        distance = torch.cat([d for d, _ in found])
        nearest = torch.where(distance > 0, distance, torch.inf).min(1).values  # codes may have twins
        if not nearest.isfinite().any():
            raise UserError("all code vectors are the same: there are no near ones to spread targets over")
        step = nearest[nearest.isfinite()].median()
        share = torch.exp(-0.5 * (distance / (step * width)) ** 2)
        self.register_buffer("ids", torch.cat([i for _, i in found]), persistent=False)
        self.register_buffer("share", share / share.sum(1, keepdim=True), persistent=False)


def softmax_step(logits_TV: Tensor, target_T: Tensor, scale_T: Tensor,
                 near: NearCodes | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(what is minimised of each target (T,), its CE (T,), the gradient of sum scale * the first by the logits).

    The first two are the same unless targets are spread over near codes. Both are float32 (float64 for float64 logits),
    the gradient is in the logits' type.
    """
    log_probs, minimised_T, losses_T = _losses(logits_TV, target_T, near)
    grad = log_probs.exp_()
    if near is None:
        grad[torch.arange(len(target_T), device=target_T.device), target_T] -= 1
    else:
        grad.scatter_add_(1, near.ids[target_T], -near.share[target_T].to(grad.dtype))
    return minimised_T, losses_T, grad.mul_(scale_T[:, None].to(grad.dtype)).to(logits_TV.dtype)


def softmax_step_to_fuse(logits_TV: Tensor, target_T: Tensor, scale_T: Tensor,
                         near: NearCodes | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_step` as one expression without assignments, which torch.compile makes two passes over the logits of."""
    wide = _wide(logits_TV)
    log_probs = wide - torch.logsumexp(wide, dim=-1, keepdim=True)
    losses_T = -log_probs.gather(1, target_T[:, None])[:, 0]
    if near is None:
        minimised_T = losses_T
        wanted = (torch.arange(wide.shape[1], device=wide.device) == target_T[:, None]).to(wide.dtype)
    else:
        minimised_T = _spread(log_probs, target_T, near)
        wanted = torch.zeros_like(wide).scatter_add(1, near.ids[target_T], near.share[target_T].to(wide.dtype))
    grad = (log_probs.exp() - wanted) * scale_T[:, None].to(wide.dtype)
    return minimised_T, losses_T, grad.to(logits_TV.dtype)


def _losses(logits_TV: Tensor, target_T: Tensor, near: NearCodes | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log probabilities (T, V), the first two of `softmax_step`)."""
    log_probs = F.log_softmax(_wide(logits_TV), dim=-1)
    losses_T = F.nll_loss(log_probs, target_T, reduction="none")
    return log_probs, losses_T if near is None else _spread(log_probs, target_T, near), losses_T


def _spread(log_probs: Tensor, target_T: Tensor, near: NearCodes) -> Tensor:
    return -(near.share[target_T].to(log_probs.dtype) * log_probs.gather(1, near.ids[target_T])).sum(1)


def weighted_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale_T: Tensor,
                           softmax: Softmax = softmax_step, near: NearCodes | None = None) -> tuple[Tensor, Tensor]:
    """sum_t scale_t * CE(hidden_t @ weight.T, target_t), and each target's unscaled CE (detached, float32).

    Gradients are made in the forward pass, chunk by chunk, so the backward pass is two multiplications. softmax: what
    makes losses and gradient of a chunk's logits, `softmax_step` or a compiled `softmax_step_to_fuse`. near: over which
    ids each target is spread in the sum; the CE returned is that of the target alone.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD = hidden_TD.to(dtype)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _WeightedCrossEntropy.apply(hidden_TD, weight_VD, target_T, scale_T, needs_grad, softmax, near)


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale_T: Tensor, needs_grad: bool,
                softmax: Softmax, near: NearCodes | None):
        compute_weight = weight_VD.to(hidden_TD.dtype)
        elements = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cpu"])
        chunk = max(1, elements // weight_VD.shape[0])
        minimised, losses, grad_hidden = [], [], []
        grad_weight = torch.zeros_like(weight_VD) if needs_grad else None
        for hidden, target, scale in zip(hidden_TD.split(chunk), target_T.split(chunk), scale_T.split(chunk),
                                         strict=True):
            logits = hidden @ compute_weight.T
            if needs_grad:
                low, loss, grad = softmax(logits, target, scale, near)
                grad_hidden.append(grad @ compute_weight)
                _add_product(grad_weight, grad.T, hidden)
            else:
                _, low, loss = _losses(logits, target, near)
            minimised.append(low)
            losses.append(loss)
        losses_T, minimised_T = (torch.cat(x) if x else hidden_TD.new_zeros(0) for x in (losses, minimised))
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden_TD), grad_weight)
        ctx.mark_non_differentiable(losses_T)
        return (minimised_T * scale_T).sum(), losses_T

    @staticmethod
    def backward(ctx, grad_total: Tensor, _grad_losses: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total, None, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on CUDA in half precision with float32 sums inside the product (torch >= 2.8), so that no chunk's
    share is rounded to half precision and the whole gradient is read and written once a chunk."""
    if total.is_cuda and total.dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
