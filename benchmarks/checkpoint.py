"""How long training stands still for a checkpoint: in the background against written at once, alternating in one run.

    python -m benchmarks.checkpoint [--size tiny] [--rounds 5] [--out FOLDER]

Stall is the time `Checkpoints.save` takes (a copy of weights and optimiser state into host memory, or all of the
writing, hashing and flushing). "step beside a write" is a training step while the thread writes, over one while nothing
does: the writing shares this machine's cores, which a GPU node would not notice.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.printing import heading, median_ratio, say
from benchmarks.train_step import RELEASED, Side, make_samples, model_sizes
from egom2p.model.egom2p import EgoM2P
from egom2p.training.checkpoint import CheckpointArgs, Checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    heading(__doc__, size=args.size)
    torch.manual_seed(0)
    sizes = model_sizes(args.size)
    model = EgoM2P(RELEASED, sizes)
    side = Side("ours", model, bfloat16=False)
    samples = make_samples(1, 0)
    side.step(samples)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        kinds = {kind: Checkpoints(Path(folder) / kind, CheckpointArgs(keep_last=1, background=kind == "background"))
                 for kind in ("background", "at once")}
        stalls: dict[str, list[float]] = {k: [] for k in kinds}
        alone, beside = [], []
        for step in range(args.rounds + 1):
            for kind, checkpoints in kinds.items():
                started = time.perf_counter()
                checkpoints.save(step, model.save_pretrained, model, side.optimizer, {"fingerprint": ""})
                if kind == "at once":
                    checkpoints.wait()
                stalls[kind].append(time.perf_counter() - started)
                started = time.perf_counter()
                side.step(samples)
                (beside if kind == "background" else alone).append(time.perf_counter() - started)
                checkpoints.wait()
        size = sum(p.stat().st_size for p in (Path(folder) / "background/checkpoints/latest/").iterdir())
    medians = {k: statistics.median(v[1:]) for k, v in stalls.items()}
    ratio = median_ratio(stalls["background"][1:], stalls["at once"][1:])
    say(f"{args.size}, {size / 1e9:.2f} GB a checkpoint: stall {medians['background']:.3f} s in the background, "
        f"{medians['at once']:.3f} s at once, ratio {ratio:.3f}")
    say(f"step beside a write / step alone: {median_ratio(beside[1:], alone[1:]):.2f}")


if __name__ == "__main__":
    main()
