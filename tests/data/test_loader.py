"""Steps -> micro-batches: workers, ranks and damage change nothing else."""

import os

import numpy as np
import pytest

from egom2p.config import load
from egom2p.data.loader import BatchPlan, StepDataset, TokenStream, step_loader
from egom2p.errors import UserError
from egom2p.modalities import ModalitySet
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT


def stream(root, *overrides):
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [f"data.root={root}", *overrides])
    modalities = ModalitySet.from_config(config.modalities)
    return TokenStream(config.data, modalities, config.masking, config.train.seed), modalities


def contents(micro_batches):
    """{sample number: everything the model sees of it}."""
    found = {}
    for micro in micro_batches:
        for side in ("inputs", "targets"):
            packed = getattr(micro, side)
            ends = np.cumsum(packed.lengths.sum(1))
            for number, end, length in zip(micro.numbers, ends, packed.lengths.sum(1), strict=True):
                rows = slice(end - length, end)
                found.setdefault(int(number), []).append([t[rows].tolist()
                                                          for t in (packed.modality, packed.position, packed.token)])
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_global_batches_for_any_ranks_and_workers(debug_tokens, world, workers):
    source, _ = stream(debug_tokens)
    reference = {b.step: contents(b.micro_batches) for b in step_loader(StepDataset(source, 4, BatchPlan(8, 8, 8)),
                                                                        range(3, 6), 0)}
    seen: dict[int, dict] = {3: {}, 4: {}, 5: {}}
    for rank in range(world):
        for batch in step_loader(StepDataset(source, 4, BatchPlan(8, 2, 8, rank, world)), range(3, 6), workers):
            seen[batch.step].update(contents(batch.micro_batches))
    assert seen == reference
    assert set(reference[4]) == set(range(32, 40))


def test_a_damaged_clip_leaves_its_slot_empty_and_moves_nobody(debug_tokens, tmp_path):
    import shutil

    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    source, _ = stream(root)
    dataset, element = source.locate(13)
    path = source.datasets[dataset].paths[source.datasets[dataset]._file[0, element]]
    offset = int(source.datasets[dataset]._offset[0, element])
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"garbage!" * 16)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    whole, _ = stream(debug_tokens)
    plan = BatchPlan(8, 8, 8)
    before, after = StepDataset(whole, 4, plan)[1], StepDataset(source, 4, plan)[1]
    assert after.damaged
    assert "sample 13" in after.damaged[0]
    assert str(path) in after.damaged[0]
    assert contents(after.micro_batches) == {k: v for k, v in contents(before.micro_batches).items() if k != 13}


def test_data_set_without_depth_never_shows_it(debug_tokens):
    source, modalities = stream(debug_tokens)
    depth = modalities.index_of("depth")
    for number in range(60):
        sample = source.sample(number)
        if source.locate(number)[0] == 1:
            assert depth not in sample.inputs.modality
            assert depth not in sample.targets.modality


def test_fingerprint_follows_the_index(debug_tokens, tmp_path):
    import shutil

    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    assert stream(root)[0].fingerprint() == stream(debug_tokens)[0].fingerprint()
    (root / "gaze/full/shard-000000.tar").unlink()
    assert stream(root)[0].fingerprint() != stream(debug_tokens)[0].fingerprint()


def test_misnamed_modality_of_a_data_set(debug_tokens):
    with pytest.raises(UserError, match="unknown modality 'sound'"):
        stream(debug_tokens, "data.datasets.full.modalities=[sound]")


def test_dealing_balances_tokens_and_keeps_the_global_batch(debug_tokens):
    """Heaviest first to the lightest micro-batch: every sample once, loads far closer than dealt in turn."""
    source, _ = stream(debug_tokens)
    for step in range(4):
        plans = [BatchPlan(32, 4, 32, rank, 4) for rank in range(4)]
        dealt = [micro for plan in plans for micro in plan.deal(step, source.cost)]
        assert sorted(n for micro in dealt for n in micro) == list(range(32 * step, 32 * step + 32))
        loads = [sum(source.cost(n) for n in micro) for micro in dealt]
        in_turn = [sum(source.cost(n) for n in micro) for plan in plans for micro in plan.deal(step, None)]
        assert max(loads) - min(loads) < 0.5 * (max(in_turn) - min(in_turn))


def test_cost_is_the_number_of_tokens(debug_tokens):
    source, _ = stream(debug_tokens)
    for number in range(40):
        sample = source.sample(number)
        assert source.cost(number) == len(sample.inputs) + len(sample.targets)


def test_sixty_four_nodes_of_four_share_a_global_batch_exactly():
    """256 ranks: every sample of the global batch goes to one rank, whatever the micro-batch; token counts balance."""
    rng = np.random.default_rng(0)
    costs = rng.integers(100, 4000, 4096)
    for world, micro in ((256, 2), (256, 4), (64, 16), (1, 1024)):
        for step in (0, 3):
            dealt = [BatchPlan(1024, micro, 1024, rank, world).deal(step, lambda n: int(costs[n]))
                     for rank in range(world)]
            numbers = sorted(n for rank in dealt for part in rank for n in part)
            assert numbers == list(range(step * 1024, (step + 1) * 1024))
            assert len({len(rank) for rank in dealt}) == 1  # as many micro-batches everywhere
            loads = np.array([sum(costs[n] for part in rank for n in part) for rank in dealt])
            in_turn = np.array([costs[BatchPlan(1024, micro, 1024, rank, world).numbers(step)].sum()
                                for rank in range(world)])
            assert loads.max() <= in_turn.max()


@pytest.mark.parametrize(("samples", "world", "micro"), [(64, 128, 4), (64, 48, 1), (64, 24, 2), (64, 12, 5),
                                                         (64, 3, 21), (64, 8, 3), (1, 4, 2)])
def test_held_out_samples_are_all_dealt_whatever_the_number_of_ranks(samples, world, micro):
    """They need not divide by it; ranks have equally many micro-batches, some of them empty."""
    dealt = [BatchPlan(samples, micro, samples, rank, world).deal(0, None) for rank in range(world)]
    assert sorted(n for rank in dealt for numbers in rank for n in numbers) == list(range(samples))
    assert len({len(rank) for rank in dealt}) == 1
    assert max(len(numbers) for rank in dealt for numbers in rank) <= micro
