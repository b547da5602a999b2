"""Cross-entropy over large vocabularies without ever holding all logits.

torch.nn.functional.linear_cross_entropy chunks too, but cannot weight single targets, which the loss over
groups of samples needs (`docs/architecture.md`); so the chunked form here serves every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at a time. On a GPU each chunk reads the whole head again and adds to its whole gradient, so chunks are
# large there: 1 GB in float32, 4 194 rows of 64 000 (counted, not measured: 58 chunks a micro-batch become 4).
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}


def weighted_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor,
                           scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t scale_t * CE(hidden_t @ weight.T, target_t), and each target's unscaled CE (detached, float32).

    Gradients are made in the forward pass, chunk by chunk, so the backward pass is two multiplications.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD = hidden_TD.to(dtype)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _WeightedCrossEntropy.apply(hidden_TD, weight_VD, target_T, scale_T, needs_grad)


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale_T: Tensor, needs_grad: bool):
        compute_weight = weight_VD.to(hidden_TD.dtype)
        elements = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cpu"])
        chunk = max(1, elements // weight_VD.shape[0])
        losses, grad_hidden = [], []
        grad_weight = torch.zeros_like(weight_VD) if needs_grad else None
        for hidden, target, scale in zip(hidden_TD.split(chunk), target_T.split(chunk), scale_T.split(chunk),
                                         strict=True):
            logits = hidden @ compute_weight.T
            wide = logits if logits.dtype == torch.float64 else logits.float()
            log_probs = F.log_softmax(wide, dim=-1)
            losses.append(F.nll_loss(log_probs, target, reduction="none"))
            if needs_grad:
                grad = log_probs.exp_()
                grad[torch.arange(len(target), device=target.device), target] -= 1
                grad = grad.mul_(scale[:, None].to(grad.dtype)).to(hidden.dtype)
                grad_hidden.append(grad @ compute_weight)
                grad_weight += grad.T @ hidden
        losses_T = torch.cat(losses) if losses else hidden_TD.new_zeros(0)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden_TD), grad_weight)
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * scale_T).sum(), losses_T

    @staticmethod
    def backward(ctx, grad_total: Tensor, _grad_losses: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total, None, None, None
