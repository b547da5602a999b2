"""The released recipes at the released size, random weights: seconds and peak memory of the real command's function.

    python benchmarks/base_generate.py [--tokens ../shared/data/egom2p_examples/rgb2cam_egoexo.npz] [--recipes
    rgb2cam,rgb2gaze]

Random weights do the same work as trained ones. Without --tokens the input is a random 5 x 32 x 32 grid.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.printing import heading, say
from egom2p.compat.released import CAMERA_MEAN, CAMERA_STD
from egom2p.config import load, read_yaml
from egom2p.generation.pipeline import Pipeline
from egom2p.generation.recordings import GenerateArgs, generate_files
from egom2p.generation.schedule import RecipeConfig
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--recipes", default="rgb2cam,rgb2gaze")
    parser.add_argument("--size", default="base")
    args = parser.parse_args()
    heading(__doc__, size=args.size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        MotionTokenizer(Modality("cam", 256, (30,), "pose"),
                        MotionArgs(60, CAMERA_MEAN, CAMERA_STD)).save_pretrained(root / "cam")
        MotionTokenizer(Modality("gaze", 256, (30,), "gaze"),
                        MotionArgs(60, (0.5, 0.5), (0.5, 0.5))).save_pretrained(root / "gaze")
        modalities = ModalitySet([Modality("rgb", 64000, (5, 32, 32), "rgb"),
                                  Modality("depth", 64000, (5, 32, 32), "depth"),
                                  Modality("cam", 256, (30,), "pose", tokenizer=str(root / "cam")),
                                  Modality("gaze", 256, (30,), "gaze", tokenizer=str(root / "gaze"))])
        sizes = dict(read_yaml(Path(f"cfgs/model/{args.size}.yaml"))["model"])
        EgoM2P(modalities, ModelArgs(**sizes)).save_pretrained(root / "model")
        tokens = args.tokens
        if tokens is None:
            tokens = root / "random.npz"
            np.savez(tokens, np.random.default_rng(0).integers(0, 64000, (5, 32, 32)).astype(np.int32))
        pipeline = Pipeline.from_pretrained(root / "model")
        for name in args.recipes.split(","):
            recipe = load(RecipeConfig, f"cfgs/generate/{name}.yaml")
            started = time.perf_counter()
            generate_files(pipeline, [tokens], root / "out",
                           GenerateArgs(list(recipe.targets), recipe.input, recipe.targets))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            say(f"{args.size} {name}: {time.perf_counter() - started:.1f} s a clip, peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
