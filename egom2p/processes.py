"""How this package starts Python processes of its own: forked from one that has imported the libraries."""

import multiprocessing
import os
from multiprocessing.context import BaseContext

# Not a module of this package: the forking process looks for them in the working directory first, where another
# `egom2p` may lie (the released code has a folder of that name).
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.fsdp", "huggingface_hub", "safetensors.torch", "av", "tqdm")


def set_environment() -> None:
    """What libraries read from the environment, where the user says nothing; before they are used."""
    # OpenMP's threads sleep where they wait: beside another busy program two that spin are much slower, alone they are
    # hardly faster (benchmarks/RESULTS.md). Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Less GPU memory lost between blocks of odd sizes; read when the first block is asked for.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch reads after this one
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


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
