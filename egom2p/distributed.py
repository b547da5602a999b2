"""Processes: who am I, start and end of the process group, sums over ranks, and what happens when a rank is lost.

Inside torchrun each process is a rank. A rank that fails prints its own traceback and leaves at once; the others
notice within `train.timeout_s`, say which rank is missing, and leave too. Nobody waits for ever.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from egom2p.errors import Preempted, UserError, refusal

BEAT_S = 1.0
DIAGNOSIS_S = 10.0
NCCL_MARGIN_S = 60
SILENCE_MARGIN_S = 30  # beyond the time-out: where the hosts' own group can tell, it does so first
LEFT = 1 << 40  # added to the count of a rank that leaves in good order
_beating: "_Heartbeats | None" = None


@dataclass(frozen=True)
class World:
    """rank and size of the job; local_rank on this host; the device this process computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment_world(device: str = "") -> World:
    """What torchrun's variables say, one process alone without them; on this rank's GPU, a CPU, or `device`. A GPU
    multiplies float32 in TF32 from then on, as the authors' evaluation does (`allow_tf32` in their eval_model_*.py);
    tokenizers do not (`Tokenizer.encode`). Raises UserError for a device that is not there."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda":
            place = torch.device("cuda", local_rank if place.index is None else place.index)
            torch.cuda.set_device(place)
            torch.set_float32_matmul_precision("high")
        else:
            torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return World(rank, size, local_rank, place)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are made by the hardware. A CPU without them (before avx512_bf16 and AMX on x86-64)
    takes some forty times as long as for float32."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def process_group(first_timeout_s: int) -> Iterator[World]:
    """Join the group torchrun describes in the environment, if any, and leave it at the end.

    first_timeout_s: how long a rank may keep the others waiting until `shorten_timeout` is called.
    """
    world = environment_world()
    rank, size, device = world.rank, world.size, world.device
    if size == 1:
        yield world
        return
    timeout = timedelta(seconds=first_timeout_s)
    bound = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=_fresh_store(timeout), rank=rank,
                            world_size=size, timeout=timeout, **bound)
    global _beating
    heartbeats = _beating = _Heartbeats(world, first_timeout_s)
    try:
        yield world
    except Preempted:
        heartbeats.stop()
        dist.destroy_process_group()
        raise
    except BaseException as error:
        _leave_at_once(error, heartbeats)
    heartbeats.stop()
    dist.destroy_process_group()


def _fresh_store(timeout: timedelta) -> dist.Store:
    """torchrun's key-value store, without what an earlier life of these workers left in it.

    torchrun keeps one store for all its restarts, in which restarted workers may find the dead ones' addresses. On one
    host the restart's number tells them apart; on several it is not the same everywhere, and torchrun has to be started
    with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to restart workers reliably.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def shorten_timeout(seconds: int, *groups: dist.ProcessGroup | None) -> None:
    """From now on a rank that keeps the others waiting so long counts as lost, in the main group and in `groups`.

    NCCL ends the process when its time is up, where gloo raises an error that can be told. So the hosts' groups get the
    time that was asked for and an NCCL main group NCCL_MARGIN_S more.
    """
    if _beating is not None:
        _beating.patience_s = seconds
    if dist.is_initialized():
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        margin = NCCL_MARGIN_S if dist.get_backend() == "nccl" else 0
        for group, extra in ((None, margin), *((g, 0) for g in groups)):
            with contextlib.suppress(ValueError):
                set_timeout(timedelta(seconds=seconds + extra), group)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def check_same_everywhere(text: str, otherwise: str) -> None:
    """Raises UserError on every rank unless all say the same; `otherwise` has a place for the ranks that do not."""
    if not dist.is_initialized():
        return
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, text)
    if others := [f"rank {rank}" for rank, theirs in enumerate(said) if theirs != said[0]]:
        raise UserError(otherwise.format(f"{', '.join(others[:8])}{', ...' if len(others) > 8 else ''} see"))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _leave_at_once(error: BaseException, heartbeats: "_Heartbeats") -> None:
    """End this process without waiting for the others, its own error shown."""
    known = str(error) if isinstance(error, UserError) else refusal(error)
    if known:
        print(f"egom2p: {known}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("egom2p: interrupted; start the same command again to go on", file=sys.stderr)
    elif isinstance(error, RuntimeError) and _is_collective(error):
        print(f"egom2p: rank {heartbeats.world.rank}: {heartbeats.missing()} ({' '.join(str(error).split())[:200]}). "
              "The last checkpoint is whole; start the same command again to resume", file=sys.stderr)
    else:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if known else 130 if isinstance(error, KeyboardInterrupt) else 1)


# What the backends say when another rank is gone; the wording depends on where in a collective they were.
LOST_WORDS = ("gloo", "nccl", "processgroup", "connection closed by peer", "connection reset by peer", "broken pipe",
              "pair closure", "timed out", "timeout")


def _is_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST_WORDS)


class _Heartbeats:
    """Every rank counts up its own key in the group's store, so that the others can tell who stopped.

    A host may be waiting inside a device's queue, where it notices nothing (NCCL then ends the process without a word
    on who is missing). So each rank also watches the next one's count, in a thread, and leaves with a message when it
    stands still for `patience_s` and SILENCE_MARGIN_S more.
    """

    def __init__(self, world: World, patience_s: float) -> None:
        self.world, self.patience_s, self.stopped = world, patience_s, threading.Event()
        self.seen = 0  # the next rank's count
        store = dist.distributed_c10d._get_default_store()
        self.store = store.clone() if hasattr(store, "clone") else store
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def stop(self) -> None:
        """This rank leaves in good order."""
        self.stopped.set()
        leave = threading.Thread(target=self._leave, daemon=True)  # which hangs when the store's host is cut off
        leave.start()
        leave.join(DIAGNOSIS_S)

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self.store.add(self._key(self.world.rank), LEFT)

    def missing(self) -> str:
        """Which ranks no longer count, in words. Answers within DIAGNOSIS_S."""
        answer: list[str] = []
        asker = threading.Thread(target=lambda: answer.append(self._ask()), daemon=True)
        asker.start()
        asker.join(DIAGNOSIS_S)
        return answer[0] if answer else self._no_store()

    def _no_store(self) -> str:
        return f"rank 0 is missing: its host {os.environ.get('MASTER_ADDR', '')} no longer answers"

    def _ask(self) -> str:
        try:
            before = self._counts()
            time.sleep(3 * BEAT_S)
            after = self._counts()
        except (RuntimeError, OSError):
            return self._no_store()
        counts = enumerate(zip(before, after, strict=True))
        silent = [r for r, (a, b) in counts if a == b < LEFT and r != self.world.rank]
        if not silent:
            return "every rank is alive but one kept the others waiting beyond train.timeout_s"
        names, (noun, verb) = ", ".join(map(str, silent)), ("ranks", "are") if len(silent) > 1 else ("rank", "is")
        return f"{noun} {names} of {self.world.size} {verb} missing (no heartbeat)"

    def _counts(self) -> list[int]:
        return [self.store.add(self._key(r), 0) for r in range(self.world.size)]

    def _key(self, rank: int) -> str:
        return f"egom2p/heartbeat/{rank}"

    def _beat(self) -> None:
        following = self._key((self.world.rank + 1) % self.world.size)
        with contextlib.suppress(RuntimeError, OSError):  # the store's host is gone, or this is the end
            while not self.stopped.wait(BEAT_S):
                self.store.add(self._key(self.world.rank), 1)
                self.seen = self.store.add(following, 0)

    def _watch(self) -> None:
        """Beside `_beat`, which hangs when the store's host is cut off."""
        count, since = self.seen, time.monotonic()
        while not self.stopped.wait(BEAT_S):
            if self.seen != count or count >= LEFT:
                count, since = self.seen, time.monotonic()
            elif time.monotonic() - since > self.patience_s + SILENCE_MARGIN_S:
                self._give_up(count)
                count, since = self.seen, time.monotonic()

    def _give_up(self, count: int) -> None:
        """Leave, unless the next rank goes on counting: all of them may have been stopped and continued."""
        missing = self.missing()
        if self.stopped.is_set() or self.seen != count:
            return
        print(f"egom2p: rank {self.world.rank}: {missing}. The last checkpoint is whole; start the same command again "
              "to resume", file=sys.stderr, flush=True)
        os._exit(1)
