"""`egom2p view PATH`: clips, predictions and evaluations, to look at.

PATH is a clip tar, a folder or a pattern of them (with --model: predicted, too), a recording's folder that `egom2p
generate` wrote, a folder that `egom2p eval` wrote (its model on its clips), or a quickstart (on its test clips).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from egom2p.config import build, read_json
from egom2p.data.clips import RATES, Clip, ClipIndex
from egom2p.data.video import FrameStream, decode_video
from egom2p.errors import UserError
from egom2p.evaluation.run import predict_clip
from egom2p.evaluation.takes import place_depth, take_of
from egom2p.generation.pipeline import Pipeline
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.signals import KINDS
from egom2p.visualize.scene import Take

GENERATED = "generated.json"
CLIP_KINDS = {"rgb": "rgb", "depth": "depth", "cam": "pose", "gaze": "gaze"}


def takes_of(path: str, limit: int = 3, model: str = "", targets: Sequence[str] = (),
             trust_torchscript: bool = False) -> list[Take]:
    """At most `limit` takes of what lies at `path`, spread over it. model: predicts them, where PATH does not say
    which; targets: what is predicted, all that is not the input when empty. Raises UserError when nothing can be
    shown."""
    folder = Path(path)
    if (folder / GENERATED).exists():
        return [_generated(folder)]
    if not model and (folder / "results.json").exists() and (folder / "clips").is_dir():
        return _of_clips(str(folder / "clips/test"), limit, str(folder / "model"), targets,
                         trust_torchscript)
    if not model and (folder / "results.json").exists():
        about = read_json(folder / "results.json").get("about", {})
        if not {"model", "data"} <= about.keys():
            raise UserError(f"{folder / 'results.json'} does not say which model and clips it is about; evaluate again")
        recipes = build(dict[str, TargetArgs], about.get("recipes", {}), "about.recipes", str(folder / "results.json"))
        return _of_clips(about["data"], limit, about["model"], targets, trust_torchscript, recipes)
    return _of_clips(path, limit, model, targets, trust_torchscript)


def _of_clips(pattern: str, limit: int, model: str, targets: Sequence[str], trust: bool,
              recipes: dict[str, TargetArgs] | None = None) -> list[Take]:
    index = ClipIndex(pattern)
    chosen = np.unique(np.linspace(0, len(index) - 1, max(1, min(limit, len(index)))).astype(int))
    clips = [index.read(int(number)) for number in chosen]
    clips = [clip for clip in clips if clip.signals]
    if not clips:
        raise UserError(f"{pattern}: its clips hold no signal to show; token shards are shown as `egom2p generate` "
                        f"decodes them")
    if not model:
        return [take_of(clip, {n: _kind_of(n, s) for n, s in clip.signals.items()}, {}) for clip in clips]
    pipeline = Pipeline(EgoM2P.from_pretrained(model), trust)
    return [_predicted(pipeline, clip, targets, recipes) for clip in clips]


def _kind_of(name: str, signal: np.ndarray) -> str:
    """The kind of a clip's signal: of one's own, the kind whose arrays look like it."""
    if name in CLIP_KINDS:
        return CLIP_KINDS[name]
    if signal.ndim == 4:
        return "rgb"
    if signal.ndim == 3:
        return "pose" if signal.shape[1:] == (4, 4) else "depth"
    return "motion"


def _predicted(pipeline: Pipeline, clip: Clip, targets: Sequence[str], given: dict[str, TargetArgs] | None) -> Take:
    """A clip with what the model makes of its film, asked for as an evaluation did (`given`) or the model says."""
    modalities = {m.name: m for m in pipeline.model.modalities}
    shown = next((n for n, m in modalities.items() if m.kind.is_picture and m.clip_signal in clip.signals), "")
    if not shown:
        raise UserError(f"clip {clip.key} has no picture that the model could be shown")
    wanted = targets or [n for n in modalities if n != shown]
    if strangers := [n for n in wanted if n not in modalities]:
        raise UserError(f"the model has no modality '{strangers[0]}'; there are {', '.join(modalities)}")
    recipes = pipeline.recipes(given)
    made = predict_clip(pipeline, clip, [shown], {n: recipes[n] for n in wanted})
    signals = {n: clip.signals[m.clip_signal] for n, m in modalities.items() if m.clip_signal in clip.signals}
    renamed = Clip(clip.key, clip.dataset, signals, clip.meta)
    return take_of(renamed, {n: m.signal for n, m in modalities.items()}, made)


def _generated(folder: Path) -> Take:
    """The files of one recording that `egom2p generate` wrote, with the film where it still is."""
    note = read_json(folder / GENERATED)
    predicted = {p.stem: np.load(p) for p in sorted(folder.glob("*.npy"))
                 if not p.stem.endswith(("_tokens", "_spread"))}
    films = [folder / f"{n}.mp4" for n in note.get("targets", ()) if n not in predicted]
    predicted |= {film.stem: decode_video(film)[0] for film in films if film.exists()}
    kinds = {n: note.get("kinds", CLIP_KINDS).get(n, "motion") for n in predicted}
    source, truth, notes = Path(note.get("source", "")), {}, []
    seconds = note["seconds"]
    rates = {n: len(signal) / seconds for n, signal in predicted.items()}
    shown = note.get("modality", "rgb")
    if KINDS[{**CLIP_KINDS, **note.get("kinds", {})}.get(shown, "rgb")].colours:
        shown = f"{shown}, as filmed"  # grey levels for the model, and a film in colours all the same
    if source.is_file() and source.suffix not in (".npy", ".npz") and kinds.get(shown) is None:
        side = next((s.shape[1] for n, s in predicted.items() if KINDS[kinds[n]].is_picture), 128)
        truth[shown] = np.stack(list(FrameStream(source, RATES["rgb"], side)))
        kinds, rates = {shown: "rgb", **kinds}, {**rates, shown: RATES["rgb"]}
    elif not source.is_file():
        notes.append(f"The recording {source} is not there any more; its frames cannot be shown.")
    take = Take(folder.name, kinds, rates, truth, predicted, notes=notes)
    place_depth(take)
    return take
