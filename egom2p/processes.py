"""How this package starts Python processes of its own: forked from one that has imported the libraries."""

import multiprocessing
import os
from multiprocessing.context import BaseContext

# Not a module of this package: the forking process looks for them in the working directory first, where another
# `egom2p` may lie (the released code has a folder of that name).
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.fsdp", "huggingface_hub", "safetensors.torch", "av", "tqdm")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forks() -> BaseContext:
    """A multiprocessing context whose processes start in a tenth of a second each, after the seconds that the first
    of them takes to import torch: those of `spawn` take them every time.

    The process that they are forked from (multiprocessing's `forkserver`) never computes, so they are as good as new;
    forks of a process that has used torch are not. It ends with the process that asked for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context
