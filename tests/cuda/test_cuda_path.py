"""The CUDA path without a GPU: real micro-batches go through forward and loss as fake tensors on `cuda`.

FakeTensorMode runs torch's own dispatch, autocast and shape rules and no kernel; so these tests show which kernels are
asked for, with which types and shapes, and that the host reads nothing back. What backward does can only be seen on a
GPU (autograd asks for a device context): where there is one, the same batches run for real.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from egom2p.data.batch import pack
from egom2p.distributed import World
from egom2p.model.attention import Segments, segment_attention
from egom2p.model.blocks import CrossAttention, SelfAttention
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.parallel import BUCKET_MB, spread
from tests.model.test_attention import MODALITIES, SAMPLES, sample
from tests.training.test_no_sync import NoHostReads

pytest.importorskip("torch.nn.attention.varlen")
NO_TARGETS, NO_INPUTS = sample(7, (3, 0, 2), (0, 0, 0), 2), sample(8, (0, 0, 0), (3, 2, 0), 2)


class Attention(TorchDispatchMode):
    """Records the arguments of every fused and every other attention that is asked for, and the types of what goes
    into products with sums of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[dict] = []
        self.others: list[str] = []
        self.wide_sums: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "_varlen_attn" in name:
            names = [a.name for a in func._schema.arguments]
            self.fused.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        elif "addmm.dtype" in name:
            self.wide_sums.append(tuple(x.dtype for x in args[:3]))
        elif "attention" in name:
            self.others.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda(monkeypatch):
    """Fake tensors on `cuda`, bfloat16 autocast as `train.precision=bfloat16` asks for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    kept = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast itself refuses where no GPU is
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_autocast_enabled("cuda", kept[0])
        torch.set_autocast_dtype("cuda", kept[1])


def fake_model(variant: str, fill_to: int = 0) -> EgoM2P:
    with torch.device("cuda"):
        model = EgoM2P(MODALITIES, ModelArgs(64, 4, 3, 2, variant=variant, fill_to=fill_to))
    for module in model.modules():  # `.to` cannot swap fake parameters; the tables come from numpy
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to("cuda")
    return model


def forward(model: EgoM2P, samples: list) -> tuple[torch.Tensor, torch.Tensor, Attention]:
    batch = pack(samples, len(MODALITIES)).to("cuda")
    scale = torch.ones(len(batch.targets), device="cuda")
    with Attention() as seen, NoHostReads():
        total, losses = model(batch, scale)
    return total, losses, seen


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_every_attention_is_the_fused_one_in_one_half_type(monkeypatch, variant):
    with fake_cuda(monkeypatch):
        total, losses, seen = forward(fake_model(variant), SAMPLES)
        assert len(seen.fused) == 3 + 2 * 2 and not seen.others
        for call in seen.fused:
            q, k, v = call["query"], call["key"], call["value"]
            assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
            assert {x.device.type for x in (q, k, v, call["cu_seq_q"], call["cu_seq_k"])} == {"cuda"}
            assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1  # what FlashAttention asks of them
            assert call["cu_seq_q"].dtype == call["cu_seq_k"].dtype == torch.int32
            assert q.shape[1:] == k.shape[1:] == v.shape[1:] == (4, 16) and k.shape == v.shape
            assert call["cu_seq_q"].shape == call["cu_seq_k"].shape
            assert call["max_q"] > 0 and call["max_k"] > 0 and not call["is_causal"]
            if "window_size" in call:
                assert min(call["window_size"]) >= max(call["max_q"], call["max_k"])
        assert total.dtype == losses.dtype == torch.float32 and total.device.type == "cuda"
        # A head's gradient, one chunk of the loss a modality: products of half types summed in float32.
        assert seen.wide_sums == [(torch.float32, torch.bfloat16, torch.bfloat16)] * len(MODALITIES)


@pytest.mark.parametrize("fill_to", [16, 64])
def test_filled_packs_come_in_few_shapes(monkeypatch, fill_to):
    """Whatever the samples: rows in multiples of fill_to, one number of segments, longest lengths in steps."""
    with fake_cuda(monkeypatch):
        model = fake_model("swiglu", fill_to)
        for samples in (SAMPLES, SAMPLES[:2], [*SAMPLES, NO_INPUTS]):
            _, _, seen = forward(model, samples)
            assert len(seen.fused) == 3 + 2 * 2
            for call in seen.fused:
                assert len(call["query"]) % fill_to == len(call["key"]) % fill_to == 0
                assert call["cu_seq_q"].shape == call["cu_seq_k"].shape == (64 + 1,)
                assert call["max_q"] == call["max_k"] == 256


@pytest.mark.parametrize("samples", [[], [NO_TARGETS], [NO_INPUTS]], ids=["nothing", "no targets", "no inputs"])
def test_an_attention_without_a_pair_never_reaches_the_kernel(monkeypatch, samples):
    """The fused kernel is not defined for packs without a query or without a key."""
    with fake_cuda(monkeypatch):
        total, _, seen = forward(fake_model("swiglu"), samples)
        assert all(len(call["query"]) and len(call["key"]) and call["max_k"] > 0 for call in seen.fused)
        assert len(seen.fused) == {0: 0, 7: 3, 8: 2}[samples[0].number if samples else 0]
        assert total.shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
@pytest.mark.parametrize("samples", [SAMPLES, [], [NO_TARGETS], [NO_INPUTS]], ids=["full", "nothing", "no targets",
                                                                               "no inputs"])
def test_the_same_batches_on_a_real_gpu(variant, samples):
    torch.manual_seed(0)
    model = EgoM2P(MODALITIES, ModelArgs(64, 4, 3, 2, variant=variant))
    batch = pack(samples, len(MODALITIES))
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            total, _ = model(batch.to(device), torch.ones(len(batch.targets), device=device))
        total.backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append(torch.cat([p.grad.float().cpu().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0.1, atol=0.02 * float(results[0].abs().max() + 1e-6))


def test_heads_that_the_fused_kernels_refuse_take_the_other_way(monkeypatch):
    """Widths that are no multiple of eight, as of a toy on its first GPU."""
    with fake_cuda(monkeypatch), Attention() as asked:
        for width in (12, 16, 264):
            q, k, v = torch.empty(3, 5, 2, width, device="cuda", dtype=torch.bfloat16).unbind()
            lengths = np.array([2, 3])
            assert segment_attention(q, k, v, Segments(lengths, lengths, q.device)).shape == q.shape
    assert len(asked.fused) == 1 and asked.fused[0]["query"].shape[-1] == 16


def test_attention_is_given_what_the_next_layer_multiplies(monkeypatch):
    """Under autocast a norm makes float32; nothing of it goes on to a projection, in another graph when compiled."""
    found: list[torch.dtype] = []
    note = lambda module, inputs: found.extend(x.dtype for x in inputs if isinstance(x, torch.Tensor))  # noqa: E731
    with fake_cuda(monkeypatch):
        model = fake_model("swiglu")
        for module in model.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.register_forward_pre_hook(note)
        forward(model, SAMPLES)
    assert len(found) == 3 + 2 * 3 and set(found) == {torch.bfloat16}  # the other attention has two inputs


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_compiled_blocks_are_traced_once_and_hand_half_types_to_attention(monkeypatch, variant):
    """What dynamo traces of blocks whose tensors are on `cuda`: graphs made of the first pack serve every other, they
    break at attention alone, and between its two sides nothing is float32."""
    from torch._dynamo.utils import counters

    graphs, made = [], 0

    def keep(graph, inputs):
        graphs.append(([x for x in inputs if isinstance(x, torch.Tensor)], graph.graph.output_node().args[0]))
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    with fake_cuda(monkeypatch):
        model = fake_model(variant)
        model.compile(backend=keep)
        for number, samples in enumerate((SAMPLES, SAMPLES[:2], SAMPLES[1:], SAMPLES)):
            batch = pack(samples, len(MODALITIES)).to("cuda")
            model(batch, torch.ones(len(batch.targets), device="cuda"))
            made = made or len(graphs)
            assert counters["stats"]["unique_graphs"] == len(graphs) == made > 5, f"pack {number} was traced anew"
    assert all("segment_attention" in reason for reason in counters["graph_break"])
    for inputs, outputs in graphs:
        assert {x.device.type for x in inputs if x.dim()} == {"cuda"}  # numbers aside
        assert {o.meta["example_value"].dtype for o in outputs} <= {torch.bfloat16, torch.float32}
    to_attention = [o.meta["example_value"] for _, outputs in graphs for o in outputs
                    if o.meta["example_value"].dim() == 3]
    assert to_attention and {x.dtype for x in to_attention} == {torch.bfloat16}


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_ddp_takes_what_a_gpu_is_given(monkeypatch, reduce):
    """torch's own constructor, in a group of two of which only this one is there; a forward pass asks for a driver."""
    import torch.nn.parallel.distributed as ddp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for compares_values in ("_verify_param_shape_across_processes", "_sync_module_states"):
        monkeypatch.setattr(ddp, compares_values, lambda *args, **options: None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with fake_cuda(monkeypatch):
            model = fake_model("swiglu")
            replicas = spread(model, "ddp", World(0, 2, 0, torch.device("cuda", 0)), "bfloat16", reduce)
        assert replicas.module is model and replicas.device_ids == [0]
        assert replicas.gradient_as_bucket_view and not replicas.will_sync_module_buffers()
        assert replicas.bucket_bytes_cap == BUCKET_MB << 20
        assert bool(replicas._comm_hooks) == (reduce == "bfloat16")
    finally:
        dist.destroy_process_group()
