"""Clips with predictions as takes: what `egom2p view` and the report show."""

import numpy as np

from egom2p.data.clips import RATES, Clip
from egom2p.evaluation.depth import align_depth
from egom2p.evaluation.measures import MEASURES, MeasureArgs, without_padding
from egom2p.visualize.scene import Take


def take_of(clip: Clip, kinds: dict[str, str], predicted: dict[str, np.ndarray]) -> Take:
    """A clip and what was predicted for it, with errors over time and depth placed in space. kinds {modality: kind of
    signal}; signals of the clip go by the modalities' names."""
    rates = {**RATES, **clip.meta.get("rates", {})}
    length = len(clip.signals["rgb"]) / rates["rgb"] if "rgb" in clip.signals else 2.0
    rates |= {n: len(s) / length for n, s in {**clip.signals, **predicted}.items() if n not in rates}
    predicted = {n: without_padding(made, clip.signals[n]) if n in clip.signals else made
                 for n, made in predicted.items()}
    take = Take(f"{clip.dataset} {clip.key}".strip(), kinds, rates, dict(clip.signals), dict(predicted))
    if "intrinsics" in clip.meta and "side" in clip.meta:
        take.intrinsics = np.diag([1 / clip.meta["side"], 1 / clip.meta["side"], 1]) @ np.array(clip.meta["intrinsics"])
    for name, made in predicted.items():
        if name in clip.signals:
            measure = MEASURES[kinds[name]](MeasureArgs())
            take.errors[name] = np.asarray(measure.over_time(made, clip.signals[name]), np.float64)
            take.units[name] = measure.curve
    place_depth(take)
    return take


def place_depth(take: Take) -> None:
    """Depth in metres, and what had to be fitted or assumed for it."""
    name = take.of_kind("depth")
    if not name:
        return
    truth, made = take.truth.get(name), take.predicted.get(name)
    if truth is not None:
        take.metres["true"] = np.where(np.isfinite(truth), truth, 0).astype(np.float32)
    if made is not None and truth is not None:
        take.metres["predicted"] = align_depth(made, truth.astype(np.float32)).astype(np.float32)
        take.notes.append("Predicted depth has no scale: it is placed by the scale and shift, in inverse depth, that "
                          "fit the clip's true depth best, as the evaluation does, and seen from the true camera.")
    elif made is not None:
        take.notes.append("Predicted depth has no scale and there is no true depth to fit it to: it is shown as "
                          "pictures only.")
    if take.metres and take.intrinsics is None:
        take.notes.append("The camera's intrinsics are not known; 58 degrees of view are assumed for the points.")
