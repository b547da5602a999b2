"""How well can depth2rgb be done on the procedural world? PSNR of pictures that know more than depth tells, and less.

    python -m benchmarks.best_rgb [--clips 150] [--seed 4] [--size 48] [--tokenizer runs/quickstart/tokenizers/rgb]

Each clip is rendered once more with its true geometry and other colours. Colours are not in depth: the walls' hues say
which way the room lies, of which depth tells four rotations at best, each as likely; tints and the boxes' colours are
drawn at random. So the mean over what is drawn is the prediction of least squared error:

- true colours: the truth itself; what is lost is the tokenizer's (with --tokenizer).
- mean tints and boxes, walls known: as if the room's orientation were given.
- one of four orientations, at random: a sharp picture of a room that fits the depth, as sampling would make it.
- mean of the four orientations: the best possible from depth, when the texture's place on the walls is read off too.
- the same without texture.
"""

import argparse
from dataclasses import replace

import numpy as np

from benchmarks.printing import heading, say
from egom2p.datasets import world
from egom2p.evaluation.video import psnr_db
from egom2p.tokenizers import load

TURNS = ([0, 1, 2, 3], [3, 2, 0, 1], [1, 0, 3, 2], [2, 3, 1, 0])  # walls after a quarter turn of the room, and so on


def scene_of(seed: int, number: int) -> tuple[world.Scene, np.ndarray]:
    """The scene of a clip and the poses of its frames, as `make_clip` draws them."""
    scene, walk = world._make_scene(np.random.Generator(np.random.Philox(key=[seed, number])))
    return scene, walk.poses(np.arange(world.VIDEO_FRAMES) / world.RATES["rgb"])


def guesses(scene: world.Scene, poses: np.ndarray, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{what is known: frames}."""
    def paint(walls: np.ndarray) -> np.ndarray:
        faces = np.concatenate([walls, world.FACE_COLOURS[4:]])
        boxes = np.full_like(scene.box_colours, (0.15 + 0.9) / 2)
        return world.render(replace(scene, face_colours=faces, box_colours=boxes), poses, size)[0]

    walls = world.FACE_COLOURS[:4]
    mean = np.repeat(walls.mean(0, keepdims=True), 4, 0)
    return {"true colours": world.render(scene, poses, size)[0], "mean tints and boxes, walls known": paint(walls),
            "one of four orientations, at random": paint(walls[TURNS[rng.integers(4)]]),
            "mean of the four orientations": paint(mean)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=150)
    parser.add_argument("--seed", type=int, default=4, help="4 is the quickstart's test set")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--tokenizer", help="rgb tokenizer: what is left of every guess after it")
    args = parser.parse_args()
    heading(__doc__, clips=args.clips)
    tokenizer = load(args.tokenizer) if args.tokenizer else None
    rng = np.random.default_rng(0)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for number in range(args.clips):
        scene, poses = scene_of(args.seed, number)
        made = guesses(scene, poses, args.size, rng)
        truth = made["true colours"]
        wavelength, world.TEXTURE_WAVELENGTH_M = world.TEXTURE_WAVELENGTH_M, float("inf")
        made["mean of the four orientations, no texture"] = guesses(scene, poses, args.size, rng)[
            "mean of the four orientations"]
        world.TEXTURE_WAVELENGTH_M = wavelength
        for name, frames in made.items():
            decoded = (psnr_db(tokenizer.decode(tokenizer.encode(frames)), truth),) if tokenizer else ()
            rows.setdefault(name, []).append((psnr_db(frames, truth), *decoded))
    for name, values in rows.items():
        means = np.mean(values, 0)
        say(f"{name:45} {means[0]:6.2f} dB" + (f", through the tokenizer {means[1]:6.2f} dB" if tokenizer else ""))


if __name__ == "__main__":
    main()
