"""Generation of the four released recipes: clips a second and peak memory, ours against the plain padded way.

    python -m benchmarks.generate [--size tiny] [--recipes rgb2cam,rgb2gaze,rgb2depth,depth2rgb] [--rounds 3]
    [--precision float32]

Both sides run alternating in one process on the same random weights and token grids (one clip), under glibc's default
allocator and with the heap reused. With temperature 0 the ids must be identical (float32). Peak memory is that of a
process that runs one side only. "reused" is ours with reuse_condition (the condition is encoded once; approximate).
"""

import argparse
import json
import resource
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.plain_generate import PlainGenerator
from benchmarks.printing import heading, median_ratio, say
from benchmarks.train_step import RELEASED, REUSED_HEAP, model_sizes, run_child
from egom2p.config import load
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import RecipeConfig
from egom2p.model.egom2p import EgoM2P


def measure(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = EgoM2P(RELEASED, model_sizes(args.size)).eval()
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.mul_(20)  # random weights give flat predictions; sharper ones leave no ties to rounding
    plain = PlainGenerator(model)
    found = {}
    for name in args.recipes.split(","):
        recipe = load(RecipeConfig, f"cfgs/generate/{name}.yaml")
        target, released = next(iter(recipe.targets.items()))
        source = recipe.input or "rgb"
        grid = np.random.default_rng(0).integers(0, 64000, (1, 5, 32, 32))

        def ours(recipe, source=source, target=target, grid=grid):
            return generate(model, {source: grid}, {target: recipe}).tokens[target].reshape(-1)

        ways = {"plain": lambda r, source=source, target=target, grid=grid: plain.generate({source: grid}, target, r),
                "ours": ours,
                "reused": lambda r, ours=ours: ours(replace(r, reuse_condition=True))}
        seconds: dict[str, list[float]] = {s: [] for s in args.sides.split(",")}
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            if "plain" in seconds and args.precision == "float32" and args.check:
                greedy = replace(released, temperature=0.0)
                agree = float((ways["ours"](greedy) == ways["plain"](greedy)).mean())
                assert agree == 1.0, f"{name}: only {agree:.4f} of the greedy ids agree"
            for _ in range(args.rounds):
                for side in seconds:
                    started = time.perf_counter()
                    ways[side](released)
                    seconds[side].append(time.perf_counter() - started)
        found[name] = seconds
    return {"seconds": found, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def child(args: argparse.Namespace, sides: str, allocator: dict[str, str], rounds: int, recipes: str,
          check: bool) -> dict:
    return run_child("benchmarks.generate", ["--size", args.size, "--precision", args.precision, "--rounds",
                                             str(rounds), "--recipes", recipes, "--sides", sides,
                                             *(["--check"] if check else [])], allocator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--recipes", default="rgb2cam,rgb2gaze,rgb2depth,depth2rgb")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="", help="used by the child processes")
    parser.add_argument("--check", action="store_true", help="used by the child processes")
    args = parser.parse_args()
    if args.sides:
        print(json.dumps(measure(args)))
        return
    heading(__doc__)
    settings = (("default allocator", {}), ("heap reused", REUSED_HEAP))
    for setting, allocator in settings[: 1 if args.size == "smoke" else 2]:
        for recipe in args.recipes.split(","):
            seconds = child(args, "plain,ours,reused", allocator, args.rounds, recipe, not allocator)["seconds"][recipe]
            memory = {side: child(args, side, allocator, 1, recipe, False)["peak_gb"] for side in ("plain", "ours")}
            medians = {s: statistics.median(v) for s, v in seconds.items()}
            ratio = {s: median_ratio(seconds["plain"], seconds[s]) for s in ("ours", "reused")}
            same = ", greedy ids identical" if not allocator and args.precision == "float32" else ""
            say(f"{args.size} {recipe}, {args.precision}, {setting}: plain {medians['plain']:.2f} s, ours "
                f"{medians['ours']:.2f} s ({ratio['ours']:.2f} x), "
                f"reused {medians['reused']:.2f} s ({ratio['reused']:.2f} x); peak {memory['plain']:.1f} and "
                f"{memory['ours']:.1f} GB{same}")


if __name__ == "__main__":
    main()
