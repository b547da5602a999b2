"""One model over several processes: replicated (DDP) or sharded (FSDP2). Checkpoints of both are the same files."""

import contextlib
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from egom2p.distributed import World
from egom2p.model.blocks import DecoderBlock, EncoderBlock

BUCKET_MB = 100  # of gradients that GPUs sum together; torch's 25 are of slower networks and smaller models


def spread(model: nn.Module, mode: str, world: World, precision: str = "float32",
           reduce: str = "float32") -> nn.Module:
    """The module to call: the model itself, a DistributedDataParallel around it, or the model with its blocks sharded.

    mode: ddp or fsdp. Both average gradients over ranks, in the type `reduce`: bfloat16 sends half as much and rounds
    every gradient. With precision bfloat16 sharded blocks are gathered in it, which halves what is sent; tables and
    heads stay float32. Sharding replaces the model's parameters, so it comes before the optimiser is made.
    """
    if world.size == 1:
        return model
    if mode == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        summed = torch.bfloat16 if reduce == "bfloat16" else torch.float32
        half = MixedPrecisionPolicy(torch.bfloat16, summed, cast_forward_inputs=False)
        root = MixedPrecisionPolicy(reduce_dtype=summed) if reduce == "bfloat16" else MixedPrecisionPolicy()
        for module in model.modules():
            if isinstance(module, (EncoderBlock, DecoderBlock)):
                fully_shard(module, mesh=mesh, mp_policy=half if precision == "bfloat16" else root)
        return fully_shard(model, mesh=mesh, mp_policy=root)
    # Buffers are tables that never change, or are moved by every rank alike (a tokenizer's running codebook).
    on_gpu = {"device_ids": [world.local_rank], "bucket_cap_mb": BUCKET_MB} if world.device.type == "cuda" else {}
    known = signature(DistributedDataParallel).parameters  # the older name is deprecated since torch 2.14
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    replicas = DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False}, **on_gpu)
    if reduce == "bfloat16":
        replicas.register_comm_hook(None, bf16_compress_hook)
    return replicas


@contextlib.contextmanager
def unsharded_root(forward: nn.Module) -> Iterator[None]:
    """Tables, heads and norms of a sharded model whole, for work on it that does not go through its `forward`, such as
    sampling. Its blocks gather themselves when they are called."""
    if isinstance(forward, FSDPModule):
        forward.unshard()
    try:
        yield
    finally:
        if isinstance(forward, FSDPModule):
            forward.reshard()


@contextlib.contextmanager
def gradients_stay_local(forward: nn.Module, local: bool) -> Iterator[None]:
    """Backward passes inside leave gradients unsummed over ranks when `local`: all micro-batches of a step but the
    last."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(not local)
        yield
    elif isinstance(forward, DistributedDataParallel) and local:
        with forward.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Any) -> Any:
    """The whole of a sharded tensor (every rank must ask), any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` on the parameter's device, and sharded as it is when it has its shape."""
    moved = tensor.to(parameter.device)
    tensor = tensor.clone() if moved is tensor else moved  # a checkpoint's tensor lies in its file, which is removed
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
