"""Steps whose loss or gradient is not finite are left out, on all ranks together, and named.

The decision stays on the device: fused AdamW takes a flag (`found_inf`) and then changes nothing. The host looks at the
flags where it reads figures anyway, at logged steps and checkpoints.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from egom2p.distributed import max_over_ranks
from egom2p.errors import UserError

log = logging.getLogger(__name__)


class Guard:
    """limit: so many skipped steps in a row end the run."""

    def __init__(self, device: torch.device, limit: int, counts: dict[str, int]) -> None:
        """counts: what `state` returned at the checkpoint, {} at the start."""
        self.limit = limit
        self.skipped = counts.get("skipped", 0)
        self.in_a_row = torch.tensor(float(counts.get("in_a_row", 0)), device=device)
        self.most_in_a_row = self.in_a_row.clone()
        self.pending: list[tuple[int, Tensor, list[Tensor], list[list[int]]]] = []

    def judge(self, step: int, grad_norm: Tensor, losses: list[Tensor], suspects: list[Tensor],
              numbers: list[list[int]]) -> Tensor:
        """1.0 on the device if `step` must be left out, else 0.0.

        losses: of each micro-batch; suspects: for each micro-batch (B,) whether a sample's own loss is not finite;
        numbers: the samples' global numbers.
        """
        finite = torch.isfinite(torch.stack([grad_norm.to(losses[0].dtype),
                                             *losses])).all() if losses else torch.isfinite(grad_norm)
        bad = max_over_ranks((~finite).float())
        self.in_a_row = (self.in_a_row + 1) * bad
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.pending.append((step, bad, suspects, numbers))
        return bad

    def report(self) -> None:
        """Log the steps left out since the last report. Reads from the device. Raises UserError past the limit."""
        if not self.pending:
            return
        flags = torch.stack([bad for _, bad, _, _ in self.pending]).tolist()
        for flag, (step, _, suspects, numbers) in zip(flags, self.pending, strict=True):
            if flag:
                self.skipped += 1
                log.warning("step %d left out: its loss or gradient is not finite; %s (debug.replay_step=%d runs it "
                            "again)",
                            step + 1, _name(_gather(suspects, numbers)), step + 1)
        self.pending.clear()
        worst, self.most_in_a_row = int(self.most_in_a_row.item()), self.in_a_row.clone()
        if worst >= self.limit:
            raise UserError(f"{worst} steps in a row had no finite loss and gradient (train.max_skipped={self.limit}); "
                            f"lower optim.lr, or look "
                            "at the samples named above with debug.replay_step. The weights are those of the last good "
                            "step")

    def state(self) -> dict[str, int]:
        """Counts that a checkpoint keeps."""
        self.report()
        return {"skipped": self.skipped, "in_a_row": int(self.in_a_row.item())}


def _gather(suspects: list[Tensor], numbers: list[list[int]]) -> tuple[list[int], list[int]]:
    """(samples whose loss was not finite, all samples of the step) over all ranks."""
    mine: tuple[list[int], list[int]] = ([], [])
    for flags, names in zip(suspects, numbers, strict=True):
        mine[1].extend(names)
        mine[0].extend(n for n, f in zip(names, flags.tolist(), strict=True) if f)
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return sorted(n for part in everyone for n in part[0]), sorted(n for part in everyone for n in part[1])


def _name(found: tuple[list[int], list[int]]) -> str:
    guilty, every = found
    if guilty:
        shown = ', '.join(map(str, guilty[:20])) + (" ..." if len(guilty) > 20 else "")
        return f"global samples {shown} have no finite loss"
    if not every:
        return "it held no sample"
    return f"each sample's loss is finite, so the gradient of samples {every[0]} .. {every[-1]} is at fault"
