"""What docs/scaling.md rests on: imbalance of token counts, cost of the dealing, and cost against size, budget and
batch.

    python -m benchmarks.scaling [--steps 40] [--cost]

Imbalance: sample costs come from the released mixture of eight data sets (weights, modalities and masks of
cfgs/data/egom2p.yaml) through the Masker that training uses. For each number of GPUs and samples a GPU, the mean over
steps of (most tokens on a rank / mean over ranks): every rank waits for the fullest at each all-reduce, so the excess
over 1 is time lost. "dealt in turn" gives sample j to rank j mod world; "balanced" is BatchPlan.deal. The same is shown
in model FLOPs of EgoM2P-base, which the dealing does not see (it balances tokens).
Filling: what model.fill_to adds to the rows that the blocks compute, inputs and targets each filled up to a multiple,
and how many shapes that leaves, for 8 GPUs dealt by tokens.
--cost measures seconds a step on this machine against width, depth, budget and batch, float32, beside the model FLOPs.
"""

import argparse
import statistics
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from benchmarks.printing import heading, say
from benchmarks.train_step import RELEASED
from egom2p.config import load
from egom2p.data.batch import MaskedSample, pack
from egom2p.data.loader import BatchPlan, _with_input_only
from egom2p.data.masking import MaskArgs, Masker
from egom2p.data.order import MixtureOrder
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import training_flops
from egom2p.training.optim import OptimArgs, make_optimizer
from egom2p.training.pretraining import PretrainConfig

BASE = ModelArgs(768, 12, 12, 12)
VOCAB = [m.vocab_size for m in RELEASED]


class Mixture:
    """The released mixture without its clips: lengths of every sample's inputs and targets."""

    def __init__(self) -> None:
        self.sets = list(load(PretrainConfig, "cfgs/train/egom2p_base.yaml").data.datasets.values())
        self.order = MixtureOrder([s.weight for s in self.sets], seed=0)
        self.maskers = [Masker(MaskArgs(), _with_input_only(RELEASED, s.input_only), seed=0) for s in self.sets]
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def lengths(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self.known:
            index, _ = self.order.locate(number)
            counts = np.array([m.num_tokens if m.name in self.sets[index].modalities else 0 for m in RELEASED])
            self.known[number] = self.maskers[index].plan(counts, number)[:2]
        return self.known[number]

    def tokens(self, number: int) -> int:
        return int(sum(side.sum() for side in self.lengths(number)))

    def flops(self, number: int) -> float:
        inputs, targets = self.lengths(number)
        return training_flops(BASE, VOCAB, inputs[None], targets[None])


def imbalance(mixture: Mixture, world: int, per_rank: int, steps: int, balanced: bool) -> tuple[float, float]:
    """Mean over steps of max over ranks / mean over ranks, in tokens and in FLOPs."""
    ratios = []
    for step in range(steps):
        loads = []
        for rank in range(world):
            plan = BatchPlan(world * per_rank, per_rank, world * per_rank, rank, world)
            numbers = _deal_all(plan, step, mixture)[rank] if balanced else plan.numbers(step).tolist()
            loads.append((sum(map(mixture.tokens, numbers)), sum(map(mixture.flops, numbers))))
        loads = np.array(loads)
        ratios.append(loads.max(0) / loads.mean(0))
    return tuple(np.mean(ratios, 0))


_DEALT: dict[tuple[int, int, int], list[list[int]]] = {}


def _deal_all(plan: BatchPlan, step: int, mixture: Mixture) -> list[list[int]]:
    """Samples of every rank, each as the rank itself would deal them (dealt once, then kept)."""
    key = (plan.batch_size, plan.world, step)
    if key not in _DEALT:
        _DEALT.clear()
        _DEALT[key] = [list(chain.from_iterable(replace(plan, rank=r).deal(step, mixture.tokens)))
                       for r in range(plan.world)]
    return _DEALT[key]


def filling(mixture: Mixture, micro: int, multiple: int, steps: int) -> tuple[float, int, int]:
    """(share of rows that are filled, shapes with it, shapes without), over the micro-batches of one of 8 ranks."""
    real, shapes = [], (set(), set())
    for step in range(steps):
        for numbers in BatchPlan(1024, micro, 1024, 0, 8).deal(step, mixture.tokens):
            rows = np.sum([[side.sum() for side in mixture.lengths(n)] for n in numbers], 0)
            real.append((rows.sum(), (-(-rows // multiple) * multiple).sum()))
            shapes[0].add(tuple(-(-rows // multiple)))
            shapes[1].add(tuple(rows))
    rows, filled = np.sum(real, 0)
    return 1 - rows / filled, len(shapes[0]), len(shapes[1])


def seconds_a_step(sizes: ModelArgs, budget: int, samples: int, rounds: int = 3) -> tuple[float, float]:
    """Median seconds and mean FLOPs of a whole step."""
    torch.manual_seed(0)
    model = EgoM2P(RELEASED, sizes)
    optimizer = make_optimizer(model, OptimArgs())
    masker, rng, times, work = Masker(MaskArgs(budget, budget), RELEASED, seed=0), np.random.default_rng(0), [], []
    for number in range(rounds + 1):
        tokens = {i: rng.integers(0, m.vocab_size, m.num_tokens).astype(np.int32) for i, m in enumerate(RELEASED)}
        batch = pack([MaskedSample(i, *masker.mask(tokens, number * samples + i)) for i in range(samples)], 4)
        started = time.perf_counter()
        scale = torch.cat([torch.full((n,), 1 / (4 * max(n, 1))) for n in batch.targets.modality_counts])
        model(batch, scale)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
        work.append(training_flops(sizes, VOCAB, batch.inputs.lengths, batch.targets.lengths))
    return statistics.median(t / w for t, w in zip(times[1:], work[1:],
                                                   strict=True)) * float(np.mean(work)), float(np.mean(work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    heading(__doc__)
    mixture = Mixture()
    sample = [mixture.flops(n) for n in range(200 if args.smoke else 4096)]
    tokens = [mixture.lengths(n) for n in range(len(sample))]
    say(f"a sample: {np.mean([i.sum() for i, _ in tokens]):.0f} encoder + "
        f"{np.mean([t.sum() for _, t in tokens]):.0f} decoder tokens, "
        f"{np.mean(sample) / 1e12:.2f} TFLOP forward and backward (base), standard deviation of tokens "
        f"{np.std([i.sum() + t.sum() for i, t in tokens]) / np.mean([i.sum() + t.sum() for i, t in tokens]):.2f} of "
        f"the mean")
    started = time.perf_counter()
    BatchPlan(1024, 32, 1024, 0, 8).deal(1000, mixture.tokens)
    say(f"dealing a step of 1 024 samples: {1e3 * (time.perf_counter() - started):.0f} ms in a loader worker")
    say("max / mean over ranks       tokens: in turn, balanced      FLOPs: in turn, balanced")
    for world, per_rank in ((2, 4),) if args.smoke else ((8, 16), (8, 32), (8, 128), (32, 32), (64, 16), (128, 8),
                                                         (256, 4)):
        turn, dealt = (imbalance(mixture, world, per_rank, 3 if args.smoke else max(4, args.steps * 8 // world), b)
                       for b in (False, True))
        say(f"{world:4} GPUs x {per_rank:3} samples {turn[0]:14.3f} {dealt[0]:9.3f} {turn[1]:18.3f} {dealt[1]:9.3f}")
    for micro, multiple in ((16, 512),) if args.smoke else ((16, 512), (16, 1024), (32, 1024), (64, 1024), (64, 2048)):
        share, shapes, before = filling(mixture, micro, multiple, 1 if args.smoke else args.steps)
        say(f"micro-batches of {micro:3} filled to {multiple:4}: {share:6.2%} of the rows, {shapes} shapes "
            f"instead of {before}")
    if args.cost:
        say("seconds a step, float32, this machine")
        for label, sizes, budget, samples in (
                ("128 wide, 2 + 2", ModelArgs(128, 2, 2, 2), 512, 2),
                ("256 wide, 2 + 2", ModelArgs(256, 4, 2, 2), 512, 2),
                ("384 wide, 6 + 6 (tiny)", ModelArgs(384, 6, 6, 6), 512, 2),
                ("512 wide, 8 + 8 (small)", ModelArgs(512, 8, 8, 8), 512, 2),
                ("tiny, budget 1024", ModelArgs(384, 6, 6, 6), 1024, 2),
                ("tiny, budget 2048", ModelArgs(384, 6, 6, 6), 2048, 2),
                ("tiny, 4 samples", ModelArgs(384, 6, 6, 6), 512, 4),
                ("tiny, 8 samples", ModelArgs(384, 6, 6, 6), 512, 8)):
            seconds, flops = seconds_a_step(sizes, budget, samples)
            say(f"  {label:26} budget {budget:5} {samples} samples {seconds:7.2f} s {flops / 1e9:9.0f} GFLOP "
                f"{flops / seconds / 1e9:6.0f} GFLOP/s")


if __name__ == "__main__":
    main()
