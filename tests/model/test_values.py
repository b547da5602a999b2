"""The model's small parts against numbers worked out by loops."""

import copy
import math

import pytest
import torch

from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.loss import weighted_cross_entropy
from egom2p.model.positions import position_table
from tests.model.test_attention import MODALITIES


def angle(position: int, channel: int, half: int) -> float:
    return position / 10000 ** (channel / half)


def test_positions_on_one_axis_are_sines_then_cosines():
    table = position_table((7,), 6)
    for row in range(7):
        expected = [f(angle(row, c, 3)) for f in (math.sin, math.cos) for c in range(3)]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_on_three_axes_take_turns_within_a_third_each():
    table, row = position_table((2, 3, 4), 12), 0
    for place in [(t, y, x) for t in range(2) for y in range(3) for x in range(4)]:
        expected = [f(angle(p, c, 2)) for p in place for c in range(2) for f in (math.sin, math.cos)]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)
        row += 1
    assert len(table) == row
    # A width that three does not divide: even shares, the larger ones first.
    assert position_table((2, 2, 2), 16)[-1, :6].tolist() == pytest.approx(
        [f(angle(1, c, 3)) for c in range(3) for f in (math.sin, math.cos)], abs=1e-6)
    assert position_table((2, 2, 2), 16)[1, 6:12].tolist() == pytest.approx([0, 1, 0, 1, 0, 1], abs=1e-6)


def test_revivs_positions_by_loops():
    """Tokens lie as (frames, groups), the table counts as if they lay as (groups, frames)."""
    frames, groups, dim = 3, 2, 8
    table = position_table((frames, groups), dim, "reviv")
    assert table.shape == (6, dim)
    for n in range(frames * groups):
        expected = [f(angle(p, c, 2)) for p in (n // frames, n % frames) for f in (math.sin, math.cos)
                    for c in range(2)]
        assert table[n].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("grid", "dim", "kind"), [((4,), 5, "axes"), ((4,), 8, "reviv"), ((2, 2), 6, "reviv"),
                                                   ((2, 2, 2), 8, "reviv")])
def test_tables_that_cannot_be(grid, dim, kind):
    with pytest.raises(ValueError, match="position table needs"):
        position_table(grid, dim, kind)


@pytest.mark.parametrize(("changes", "words"), [({"dim": 50}, "dim 50 must be even and divide by num_heads 4"),
                                                ({"dim": 9, "num_heads": 3}, "dim 9 must be even"),
                                                ({"fill_to": -1}, "fill_to must not be below 0")])
def test_sizes_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelArgs(**{"dim": 24, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 1, **changes})
    assert ModelArgs(24, 4, 1, 1, fill_to=0) == ModelArgs(24, 4, 1, 1)


def test_a_fingerprint_knows_every_tensor_and_nothing_else():
    torch.manual_seed(0)
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1))
    before = model.fingerprint()
    assert len(before) == 16 and copy.deepcopy(model).fingerprint() == before
    assert copy.deepcopy(model).double().fingerprint() == before  # the numbers, not how they are kept
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        assert model.fingerprint() != before, name
        with torch.no_grad():
            parameter.view(-1)[0] -= 1


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_the_loss_of_a_frozen_trunk_or_a_frozen_head(wanted):
    """Gradients for whichever side asks for one, those of torch's own cross-entropy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6).requires_grad_(wanted[0]), torch.randn(11, 6).requires_grad_(wanted[1])
    target, scale = torch.randint(11, (9,)), torch.rand(9)
    ours, each = weighted_cross_entropy(hidden, weight, target, scale)
    plain = (torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none") * scale).sum()
    torch.testing.assert_close(ours, plain)
    asked = [x for x, w in zip((hidden, weight), wanted, strict=True) if w]
    assert ours.requires_grad == bool(asked) and not each.requires_grad
    for mine, theirs in zip(torch.autograd.grad(ours, asked) if asked else (),
                            torch.autograd.grad(plain, asked) if asked else (), strict=True):
        torch.testing.assert_close(mine, theirs)
