"""Stopping on request: SIGTERM, SIGUSR1 and Ctrl-C end the run after a whole step, on every rank at the same one."""

import logging
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from egom2p.distributed import World

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 2.0  # torchrun repeats to its workers what the terminal has sent to everybody


class StopRequest:
    """Listens for SIGNALS while it is entered; a second signal, SAME_REQUEST_S or more after the first, ends the
    process at once.

    `agreed()` is called once a step by every rank. Ranks vote through a small asynchronous all-reduce between hosts,
    and learn the outcome one step later, so that no step waits for it and all stop after the same step.
    """

    def __init__(self, world: World) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.vote: tuple[torch.Tensor, dist.Work] | None = None
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether every rank is to stop now."""
        if self.group is None:
            return self.received is not None
        stop = False
        if self.vote is not None:
            votes, work = self.vote
            work.wait()
            stop = bool(votes.item())
        votes = torch.tensor(int(self.received is not None))
        self.vote = (votes, dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True))
        return stop

    def meet(self) -> None:
        """Wait, on the host, until every rank has come to this step's vote."""
        if self.vote is not None:
            self.vote[1].wait()

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            if time.monotonic() - self.since < SAME_REQUEST_S:
                return
            os._exit(128 + number)
        self.received, self.since = number, time.monotonic()
        log.warning("%s received: finishing the step, then saving a checkpoint (send it again to leave at once)",
                    signal.Signals(number).name)
