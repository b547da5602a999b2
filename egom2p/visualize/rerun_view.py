"""Takes as a rerun recording (rerun.io, extra `viewer`): one timeline, one view for each thing there is."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.errors import UserError
from egom2p.signals import KINDS
from egom2p.visualize.scene import Take, as_images

COLOURS = {"true": (34, 34, 34), "predicted": (209, 73, 91)}
FRUSTUM_M = 0.15
PAUSE_S = 0.5  # between two takes on the timeline


def show(takes: list[Take], save: Path | None = None) -> None:
    """Write FILE.rrd, or open the native viewer. Raises UserError when rerun is not installed."""
    rr = _rerun()
    rr.init("egom2p", spawn=False)
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        rr.save(str(save), default_blueprint=_blueprint(takes))
    else:
        rr.spawn(default_blueprint=_blueprint(takes))
    _log(rr, takes)
    rr.disconnect()


def serve(takes: list[Take]) -> None:
    """Serve the viewer to browsers until interrupted."""
    rr = _rerun()
    rr.init("egom2p", spawn=False)
    rr.serve_web_viewer(open_browser=False, connect_to=rr.serve_grpc(default_blueprint=_blueprint(takes)))
    _log(rr, takes)
    threading.Event().wait()


def _log(rr: Any, takes: list[Take]) -> None:
    start = 0.0
    for take in takes:
        _log_take(rr, take, start)
        start += take.seconds + PAUSE_S


def _rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise UserError("the viewer is not installed: pip install 'egom2p[viewer]', or write a page with --html "
                        "FILE") from error
    return rerun


def _blueprint(takes: list[Take]) -> Any:
    import rerun.blueprint as rrb

    kinds = {n: k for take in takes for n, k in take.kinds.items() if n in take.truth or n in take.predicted}
    pictures = [rrb.Spatial2DView(origin=f"pictures/{n}/{side}", name=f"{n}, {side}")
                for n, k in kinds.items() if KINDS[k].is_picture for side in ("true", "predicted")
                if any(n in take.sides(n) or side in take.sides(n) for take in takes)]
    curves = [rrb.TimeSeriesView(origin=f"curves/{n}", name=n) for n, k in kinds.items() if not KINDS[k].is_picture]
    if any(take.errors for take in takes):
        curves.insert(0, rrb.TimeSeriesView(origin="errors", name="error over time"))
    columns = [rrb.Vertical(rrb.Spatial3DView(origin="world", name="world"), rrb.TextDocumentView(origin="notes"),
                            row_shares=[5, 1])]
    if pictures:
        columns.append(rrb.Grid(*pictures))
    if curves:
        columns.append(rrb.Vertical(*curves))
    return rrb.Blueprint(rrb.Horizontal(*columns), collapse_panels=True)


def _log_take(rr: Any, take: Take, start: float) -> None:
    rr.set_time("time", duration=start)
    rr.log("world", rr.Clear(recursive=True))
    rr.log("notes", rr.TextDocument("\n\n".join([f"**{take.key}**", *take.notes]), media_type="text/markdown"))
    rr.log("world", rr.ViewCoordinates.RIGHT_HAND_Y_DOWN)
    for side, poses in take.paths.items():
        rr.log(f"world/{side}/path", rr.LineStrips3D([poses[:, :3, 3]], colors=[COLOURS[side]]))
    for name, kind in take.kinds.items():
        for side, signal in take.sides(name).items():
            values = as_images(kind, signal) if KINDS[kind].is_picture else signal
            for index, value in enumerate(values):
                rr.set_time("time", duration=start + index / take.rates[name])
                _log_value(rr, take, name, kind, side, index, value)
    for side in take.metres:
        for frame in range(len(take.metres[side])):
            rr.set_time("time", duration=start + frame / take.rates[take.of_kind("depth")])
            places, colours = take.points(side, frame)
            rr.log(f"world/{side}/points", rr.Points3D(places, colors=colours, radii=0.01))
    for name, error in take.errors.items():
        for index, value in enumerate(error):
            rr.set_time("time", duration=start + index / (len(error) / take.seconds))
            rr.log(f"errors/{name}", rr.Scalars(float(value)))


def _log_value(rr: Any, take: Take, name: str, kind: str, side: str, index: int, value: np.ndarray) -> None:
    """One frame of one signal (a picture ready to be shown), by its kind; one's own kinds as pictures or as curves."""
    if KINDS[kind].is_picture:
        rr.log(f"pictures/{name}/{side}", rr.Image(value))
        return
    if kind == "pose":
        value = take.paths[side][index]
        rr.log(f"world/{side}/camera", rr.Transform3D(translation=value[:3, 3], mat3x3=value[:3, :3]))
        focal = take.camera()
        rr.log(f"world/{side}/camera", rr.Pinhole(focal_length=float(focal[0, 0]) * 100, width=100, height=100,
                                                  image_plane_distance=FRUSTUM_M, color=COLOURS[side]))
        value = value[:3, 3]
    elif kind == "gaze":
        picture = take.of_kind("rgb")
        if picture:
            size = take.sides(picture)[next(iter(take.sides(picture)))].shape[1]
            spot = [[float(value[0]) * size, float(value[1]) * size]] if value[2] > 0 else []
            for over in take.sides(picture):
                rr.log(f"pictures/{picture}/{over}/gaze_{side}", rr.Points2D(spot, colors=[COLOURS[side]], radii=1.5))
    for channel, number in enumerate(np.ravel(value)):
        rr.log(f"curves/{name}/{side}/{channel}", rr.Scalars(float(number)))
