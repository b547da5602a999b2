"""A training step, ours against the plain padded way (benchmarks/plain.py), alternating in one run on identical
batches.

    python benchmarks/train_step.py [--size tiny] [--samples 2] [--precision float32|bfloat16] [--rounds 5]

Prints, for glibc's default allocator and for a reused heap (MALLOC_* in the environment of a child process; both sides
always run under the same setting): samples/s, real tokens/s, model FLOP/s, peak memory, and the ratios. A step is
forward, backward, clipping and fused AdamW. Batches are drawn from the released mask mixture over four modalities.
Model FLOPs are counted on real tokens (egom2p/model/flops.py: 3 x forward; attention 4 d a pair, heads 2 d vocab a
target). Peak memory is that of a process that runs one side only, model and optimiser included. Losses of the two sides
must agree to 1e-4.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.plain import PlainEgoM2P
from benchmarks.printing import heading, median_ratio, say
from egom2p.config import build, read_yaml, to_plain
from egom2p.data.batch import MaskedSample, pack
from egom2p.data.masking import MaskArgs, Masker
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import training_flops
from egom2p.training.optim import OptimArgs, make_optimizer

RELEASED = ModalitySet([Modality("rgb", 64000, (5, 32, 32)), Modality("depth", 64000, (5, 32, 32)),
                        Modality("cam", 256, (30,)), Modality("gaze", 256, (30,))])
REUSED_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


def model_sizes(name: str) -> ModelArgs:
    """The sizes in cfgs/model/NAME.yaml; `smoke`: seconds, the same code."""
    if name == "smoke":
        return ModelArgs(32, 2, 1, 1)
    return build(ModelArgs, to_plain(dict(read_yaml(Path(f"cfgs/model/{name}.yaml"))["model"])), "model", name)


def run_child(module: str, arguments: list[str], allocator: dict[str, str]) -> dict:
    """The JSON object that `python -m MODULE ARGUMENTS` prints last, under the given allocator settings."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], env={**os.environ, **allocator},
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def make_samples(count: int, start: int, modalities: ModalitySet = RELEASED,
                 args: MaskArgs | None = None) -> list[MaskedSample]:
    masker, rng = Masker(args or MaskArgs(), modalities, seed=0), np.random.default_rng(start)
    tokens = [{i: rng.integers(0, m.vocab_size, m.num_tokens).astype(np.int32) for i, m in enumerate(modalities)}
              for _ in range(count)]
    return [MaskedSample(start + i, *masker.mask(t, start + i)) for i, t in enumerate(tokens)]


class Side:
    """One way of computing the step, with its own optimiser over the same parameters (a rate so small that they
    stay)."""

    def __init__(self, name: str, model: EgoM2P, bfloat16: bool) -> None:
        self.name, self.model, self.bfloat16 = name, model, bfloat16
        self.plain = PlainEgoM2P(model, 2048, 2048)
        self.optimizer = make_optimizer(model, OptimArgs(lr=1e-12))

    def step(self, samples: list[MaskedSample]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            if self.name == "plain":
                loss = self.plain.loss(self.plain.collate(samples))
            else:
                batch = pack(samples, 4)
                counts = batch.targets.modality_counts
                scale = torch.cat([torch.full((n,), 1 / (4 * max(n, 1))) for n in counts])
                loss, _ = self.model(batch, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def measure(args: argparse.Namespace) -> dict:
    """Alternate the sides named in args.sides; medians over rounds."""
    torch.manual_seed(0)
    sizes = model_sizes(args.size)
    model = EgoM2P(RELEASED, sizes)
    sides = [Side(name, model, args.precision == "bfloat16") for name in args.sides.split(",")]
    seconds: dict[str, list[float]] = {s.name: [] for s in sides}
    work, tokens = [], []
    for round_number in range(args.rounds + 1):
        samples = make_samples(args.samples, round_number * args.samples)
        batch = pack(samples, 4)
        losses = {}
        for side in sides if round_number % 2 else reversed(sides):
            started = time.perf_counter()
            losses[side.name] = side.step(samples)
            if round_number:
                seconds[side.name].append(time.perf_counter() - started)
        if len(losses) == 2 and args.precision != "bfloat16":
            assert abs(losses["plain"] / losses["ours"] - 1) < 1e-4, losses
        if round_number:
            work.append(training_flops(sizes, [m.vocab_size for m in RELEASED], batch.inputs.lengths,
                                       batch.targets.lengths))
            tokens.append(len(batch.inputs) + len(batch.targets))
    return {"seconds": seconds, "flops": work, "tokens": tokens,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def child(args: argparse.Namespace, sides: str, allocator: dict[str, str], rounds: int) -> dict:
    return run_child("benchmarks.train_step", ["--size", args.size, "--samples", str(args.samples), "--precision",
                                               args.precision, "--rounds", str(rounds),
                                               "--sides", sides], allocator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", default="", help="used by the child processes")
    args = parser.parse_args()
    if args.sides:
        print(json.dumps(measure(args)))
        return
    heading(__doc__)
    for setting, allocator in (("default allocator", {}), ("heap reused", REUSED_HEAP)):
        both = child(args, "plain,ours", allocator, args.rounds)
        memory = {side: child(args, side, allocator, 1)["peak_gb"] for side in ("plain", "ours")}
        say(f"{args.size}, {args.samples} samples, {args.precision}, {setting}, {torch.get_num_threads()} threads, "
            f"{statistics.mean(both['tokens']) / args.samples:.0f} real tokens a sample")
        for side in ("plain", "ours"):
            rates = [args.samples / s for s in both["seconds"][side]]
            flops = statistics.median(f / s for f, s in zip(both["flops"], both["seconds"][side], strict=True))
            per_second = statistics.median(t / s for t, s in zip(both["tokens"], both["seconds"][side], strict=True))
            say(f"  {side:6} {statistics.median(rates):8.3f} samples/s {per_second:8.0f} tokens/s {flops / 1e9:8.1f} "
                f"GFLOP/s {memory[side]:6.2f} GB peak")
        ratio = median_ratio(both["seconds"]["plain"], both["seconds"]["ours"])
        say(f"  ours / plain: {ratio:.2f} x the samples/s, {memory['ours'] / memory['plain']:.2f} of the peak memory")


if __name__ == "__main__":
    main()
