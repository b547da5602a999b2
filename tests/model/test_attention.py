"""Invariant 3: packing changes nothing. Segments against padded sequences with dense masks, in float64."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from egom2p.data.batch import FlatTokens, MaskedSample, pack
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.attention import Segments, _flash_only, segment_attention
from egom2p.model.blocks import STYLES, QKNorm
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.loss import CHUNK_ELEMENTS, NearCodes, softmax_step, softmax_step_to_fuse, weighted_cross_entropy

MODALITIES = ModalitySet([Modality("a", 40, (3, 2, 2)), Modality("b", 20, (9,)), Modality("c", 20, (4, 3))])


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [
    ([3, 5, 3], [4, 4, 4]), ([1, 1, 7], [1, 9, 1]), ([4, 4, 4, 4], [6, 6, 6, 6]), ([5, 0, 2], [3, 4, 0]), ([2], [0]),
    ([2, 3, 2], [5, 1, 5])])
def test_segments_equal_a_dense_mask(lengths_q, lengths_k):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(n), 2, 8, dtype=torch.float64, requires_grad=True)
               for n in (lengths_q, lengths_k, lengths_k))
    segments = Segments(np.array(lengths_q), np.array(lengths_k), q.device)
    out = segment_attention(q, k, v, segments)
    owner_q, owner_k = (torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (lengths_q, lengths_k))
    mask = owner_q[:, None] == owner_k[None]
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    weights = torch.nan_to_num(scores.masked_fill(~mask, float("-inf")).softmax(-1),
                               nan=0.0) if sum(lengths_k) else scores
    dense = torch.einsum("hqk,khd->qhd", weights, v)
    assert torch.allclose(out, dense, atol=1e-12)
    pick = torch.randn_like(out)
    ours = torch.autograd.grad((out * pick).sum(), (q, k, v), allow_unused=True)
    theirs = torch.autograd.grad((dense * pick).sum(), (q, k, v), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        b = torch.zeros(1, dtype=torch.float64) if b is None else torch.nan_to_num(b)
        assert torch.allclose(torch.zeros(1, dtype=torch.float64) if a is None else a, b, atol=1e-12)


def sample(number, inputs, targets, seed):
    rng = np.random.default_rng(seed)

    def side(counts, skip):
        parts = [(np.full(n, m), np.sort(np.arange(MODALITIES[m].num_tokens)[skip[m] : skip[m] + n]),
                  rng.integers(0, MODALITIES[m].vocab_size, n))
                 for m, n in enumerate(counts)]
        return FlatTokens(*(np.concatenate(p) for p in zip(*parts, strict=True)))

    return MaskedSample(number, side(inputs, [0, 0, 0]), side(targets, inputs))


SAMPLES = [sample(0, (4, 3, 0), (3, 2, 5), 1), sample(1, (0, 0, 0), (6, 1, 0), 2), sample(2, (12, 0, 1), (0, 9, 0), 3),
           sample(3, (1, 0, 0), (0, 0, 12), 4)]


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_one_pack_equals_sample_by_sample(variant):
    """Loss and every gradient: empty inputs, single-token segments, one modality alone are all among the samples."""
    torch.manual_seed(0)
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2, variant=variant)).double()

    def run(groups):
        model.zero_grad()
        total = 0.0
        for group in groups:
            batch = pack(group, 3)
            loss, _ = model(batch, torch.full((len(batch.targets),), 0.1, dtype=torch.float64))
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters()}

    packed, packed_grads = run([SAMPLES])
    alone, alone_grads = run([[s] for s in SAMPLES])
    assert packed == pytest.approx(alone, rel=1e-12)
    for name, grad in packed_grads.items():
        assert torch.allclose(grad, alone_grads[name], rtol=1e-5, atol=1e-12), name


def test_samples_do_not_see_each_other():
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2)).double().eval()
    with torch.no_grad():
        for first, second in ((0, 2), (2, 3)):
            both = model(pack([SAMPLES[first], SAMPLES[second]], 3))
            alone = model(pack([SAMPLES[first]], 3))
            counts = pack([SAMPLES[first], SAMPLES[second]], 3).targets.lengths
            starts = np.cumsum(np.r_[0, counts.sum(0)])
            rows = np.concatenate([np.arange(starts[m], starts[m] + counts[0, m]) for m in range(3)])
            assert torch.allclose(both[rows], alone, atol=1e-12)


def test_decoder_self_attention_stays_within_a_modality():
    """Changing which c targets are asked moves no prediction of the a targets."""
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2)).double().eval()
    with torch.no_grad():
        with_c, without_c = (model(pack([sample(0, (4, 3, 0), (3, 2, n), 1)], 3))[:3] for n in (5, 0))
    assert torch.allclose(with_c, without_c, atol=1e-12)


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[1:2], SAMPLES[2:3], []])
@pytest.mark.parametrize("fill_to", [1, 7, 64])
def test_rows_that_fill_a_pack_change_nothing(samples, fill_to):
    """Loss and every gradient in float64; blocks see multiples of fill_to. Only in training."""
    torch.manual_seed(0)
    plain = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2)).double()
    filled = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2, fill_to=fill_to)).double()
    filled.load_state_dict(plain.state_dict())
    seen = []
    for block in (filled.encoder[0], filled.decoder[0]):
        block.register_forward_hook(lambda _, rows, out: seen.append(len(out)))
    batch = pack(samples, 3)
    results = []
    for model in (plain, filled):
        total, losses = model(batch, torch.linspace(0.1, 1, len(batch.targets), dtype=torch.float64))
        total.backward()
        results.append([total, losses, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-13)
    sizes = [len(batch.inputs), len(batch.targets)]
    assert seen == [-(-n // fill_to) * fill_to for n in sizes]
    with torch.no_grad():
        filled(batch)
    assert seen[2:] == sizes


def test_the_fused_softmax_equals_the_plain_one():
    torch.manual_seed(0)
    logits, target, scale = 30 * torch.randn(11, 50), torch.randint(50, (11,)), torch.rand(11)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for codes in (None, NearCodes(torch.randn(50, 3), 0.8)):
            plain, fused = (step(logits.to(dtype), target, scale, codes)
                            for step in (softmax_step, softmax_step_to_fuse))
            assert plain[2].dtype == dtype
            for a, b in zip(plain, fused, strict=True):
                torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_targets_spread_over_near_codes_by_hand():
    """Codes 0, 1, 2, 3, 10 on a line: steps of 1. The loss is the cross-entropy with soft labels, torch's own; what is
    reported is that of the id alone."""
    codes = torch.tensor([[0.0], [1], [2], [3], [10]], dtype=torch.float64)
    near = NearCodes(codes, 0.5).double()
    weight = torch.exp(-2 * (codes - codes.T) ** 2)
    labels = weight / weight.sum(1, keepdim=True)
    spread = torch.zeros(5, 5, dtype=torch.float64).scatter_(1, near.ids, near.share)
    torch.testing.assert_close(spread, labels, rtol=1e-6, atol=1e-9)
    torch.manual_seed(0)
    hidden, head = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    target, scale = torch.randint(5, (7,)), torch.rand(7, dtype=torch.float64)
    total, losses = weighted_cross_entropy(hidden, head, target, scale, near=near)
    logits = hidden @ head.T
    soft = torch.nn.functional.cross_entropy(logits, spread[target], reduction="none")
    torch.testing.assert_close(total, (soft * scale).sum())
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    ours = torch.autograd.grad(2 * total, (hidden, head))
    theirs = torch.autograd.grad(2 * (soft * scale).sum(), (hidden, head))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # shares are kept in float32
    with torch.no_grad():
        assert weighted_cross_entropy(hidden, head, target, scale, near=near)[0].item() == pytest.approx(total.item())


@pytest.mark.parametrize("softmax", [softmax_step, softmax_step_to_fuse])
@pytest.mark.parametrize("chunk", [64, 1000, 2**24])
def test_chunked_loss_equals_cross_entropy(chunk, softmax, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (37, 50))
    target, scale = torch.randint(50, (37,)), torch.rand(37, dtype=torch.float64)
    loss, losses = weighted_cross_entropy(hidden, weight, target, scale, softmax)
    full = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
    assert torch.allclose(losses, full)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    theirs = torch.autograd.grad(3 * (full * scale).sum(), (hidden, weight))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("softmax", [softmax_step, softmax_step_to_fuse])
def test_the_loss_without_gradients_takes_every_chunk(softmax, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 100)
    torch.manual_seed(0)
    hidden, weight, target, scale = torch.randn(7, 4), torch.randn(50, 4), torch.randint(50, (7,)), torch.rand(7)
    with torch.no_grad():
        total, losses = weighted_cross_entropy(hidden, weight, target, scale, softmax)
    full = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
    torch.testing.assert_close(losses, full)
    torch.testing.assert_close(total, (full * scale).sum())


def test_the_loss_in_bfloat16_autocast():
    """Products in bfloat16 and sums in float32: near the float32 loss, and exactly that of rounded operands."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    target, scale = torch.randint(30, (9,)), torch.rand(9)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = weighted_cross_entropy(hidden, weight, target, scale)
    assert total.dtype == losses.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    total.backward()
    exact, _ = weighted_cross_entropy(*(x.detach().requires_grad_() for x in (hidden, weight)), target, scale)
    assert exact.item() == pytest.approx(total.item(), rel=2e-2) and exact.item() != total.item()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_near_codes_are_not_part_of_an_export():
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1))
    names = set(model.state_dict())
    model.spread_targets({"b": torch.randn(20, 3)}, 0.5)
    assert set(model.state_dict()) == names and set(dict(model.named_buffers())) > {"near_codes.b.ids"}


def test_loss_of_no_targets_is_zero_and_differentiable():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss, _ = weighted_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([], []), ([0, 0], [3, 2]), ([3, 2], [0, 0]), ([3, 0], [0, 4])])
def test_a_pack_in_which_no_query_meets_a_key_still_has_gradients(lengths_q, lengths_k):
    """Or a rank that got such a pack would keep the others waiting for its share of them."""
    q, k, v = (torch.randn(sum(n), 2, 8, requires_grad=True) for n in (lengths_q, lengths_k, lengths_k))
    out = segment_attention(q, k, v, Segments(np.array(lengths_q, int), np.array(lengths_k, int), q.device))
    assert out.shape == q.shape and not out.any()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):  # raises for one that is not part of the graph
        assert not gradient.any()


def test_normalised_queries_and_keys_keep_the_type_of_the_values():
    """LayerNorm gives float32 under autocast; the fused attention takes one type."""
    norm = QKNorm(8, STYLES["swiglu_qknorm"])
    q = torch.randn(5, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in norm(q, q)] == [torch.bfloat16] * 2


def test_fused_attention_stays_with_flash(monkeypatch):
    """torch's own rule, with a Hopper's capability and a new cuDNN: ours is declined by it, a call without is not."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(varlen, "_can_use_cudnn"):
        pytest.skip(f"torch {torch.__version__} knows no cuDNN for packs")
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda device: True)
    with FakeTensorMode():
        q = torch.empty(600, 12, 64, dtype=torch.bfloat16, device="cuda")
        window = list(_flash_only(300)["window_size"])
        assert varlen._can_use_cudnn(q, q, q, 300, [-1, -1])
        assert not varlen._can_use_cudnn(q, q, q, 300, window)
    assert min(window) >= 300  # and hides nothing
