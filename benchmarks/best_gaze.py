"""How well can rgb2gaze be done on the procedural world? Squared error of the best prediction that knows the scene.

    python -m benchmarks.best_gaze [--clips 150] [--seed 4] [--model runs/quickstart/model]

The eye rests on a ball. Where a clip has two of them, which one is looked at is drawn at random and is not in the
picture: the prediction of least squared error is the mean of those in view. So is every frame's best prediction here,
from the true balls and poses; what is left is that draw, and the eye's jitter. With a model: how far its predictions
are from those, which says more about it than its error does, most of which is the draw.
"""

import argparse

import numpy as np

from benchmarks.printing import heading, say
from egom2p import geometry
from egom2p.data.clips import Clip
from egom2p.datasets import world
from egom2p.evaluation.gaze import gaze_mse
from egom2p.evaluation.run import predict_clip
from egom2p.generation.pipeline import Pipeline


def best_guess(balls: np.ndarray, world_from_camera: np.ndarray) -> np.ndarray:
    """(K, 3) balls, (T, 4, 4) -> (T, 2): the mean of the balls in view, in [0, 1]."""
    homogeneous = np.c_[balls, np.ones(len(balls))]
    camera_xyz = np.einsum("tij,kj->tki", geometry.invert(world_from_camera), homogeneous)[..., :3]
    ahead = camera_xyz[..., 2] > 0.05
    camera_xyz[~ahead] = (0, 0, 1)
    points = geometry.project(camera_xyz, world.intrinsics(1))
    in_view = (ahead & geometry.gaze_is_valid(points)).astype(float)
    return (points * in_view[..., None]).sum(1) / np.maximum(in_view.sum(1), 1)[:, None]


def predict_gaze(pipeline: Pipeline, clip: Clip) -> np.ndarray:
    return predict_clip(pipeline, clip, ["rgb"], {"gaze": pipeline.recipes()["gaze"]})["gaze"]


def say_row(name: str, errors: list[tuple[float, ...]]) -> None:
    floor, *of_model = np.mean(errors, 0)
    more = "; model {:.6f}, from the best prediction {:.6f}".format(*of_model) if of_model else ""
    say(f"{len(errors):4d} clips{name}: {floor:.6f}{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=150)
    parser.add_argument("--seed", type=int, default=4, help="4 is the quickstart's test set")
    parser.add_argument("--model", help="a model of the procedural world's gaze")
    parser.add_argument("--size", type=int, default=48, help="side of the frames that the model is for")
    args = parser.parse_args()
    heading(__doc__, clips=args.clips)
    pipeline = Pipeline.from_pretrained(args.model) if args.model else None
    errors: dict[int, list[tuple[float, ...]]] = {1: [], 2: []}
    for number in range(args.clips):
        clip = world.make_clip(args.seed, number, size=args.size if pipeline else 8)
        gaze, balls = clip.signals.get("gaze"), np.array(clip.meta["balls"]).reshape(-1, 3)
        if gaze is not None and gaze[:, 2].any():
            best = np.c_[best_guess(balls, clip.signals["cam"].astype(np.float64)), gaze[:, 2]]
            row = (gaze_mse(best, gaze),)
            if pipeline:
                predicted = predict_gaze(pipeline, clip)
                row = (*row, gaze_mse(predicted, gaze), gaze_mse(predicted, best))
            errors[len(balls)].append(row)
    rows = {f" with {count} ball{'s' * (count > 1)}": found for count, found in errors.items()}
    for name, found in {**rows, "": [*errors[1], *errors[2]]}.items():
        if found:
            say_row(name, found)


if __name__ == "__main__":
    main()
