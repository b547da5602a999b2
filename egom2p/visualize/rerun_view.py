"""Takes as a rerun recording (rerun.io, extra `viewer`): one timeline, one view for each thing there is."""

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
        if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            raise UserError("there is no display here for rerun's viewer; --html FILE or --save FILE.rrd writes a "
                            "file, --web serves to a browser")
        rr.spawn(default_blueprint=_blueprint(takes))
    _log(rr, takes)
    rr.disconnect()


WEB_PORT, DATA_PORT = 9090, 9876  # rerun's own


def serve(takes: list[Take]) -> None:
    """Serve the viewer to browsers until interrupted; where it is, is printed. Raises UserError when a port is in
    use."""
    rr = _rerun()
    for port in (WEB_PORT, DATA_PORT):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise UserError(f"port {port} is in use, perhaps by another `egom2p view --web`; end that one first")
    rr.init("egom2p", spawn=False)
    data = rr.serve_grpc(grpc_port=DATA_PORT)
    # Not serve_grpc(default_blueprint=...): it waits with Python's lock held (0.33, python_bridge.rs) for a thread that
    # frees arrays of Python's, and on a busy machine waits for ever.
    _blueprint(takes).connect_grpc("egom2p", url=data)
    rr.serve_web_viewer(web_port=WEB_PORT, open_browser=False, connect_to=data)
    _log(rr, takes)
    host = socket.gethostname()
    print(f"http://localhost:{WEB_PORT}/?url={quote(data, safe='')}\nfrom another machine, through a tunnel: ssh -L "
          f"{WEB_PORT}:localhost:{WEB_PORT} -L {DATA_PORT}:localhost:{DATA_PORT} {host}\nwho can reach {host} can "
          f"look; Ctrl-C ends it", flush=True)
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
            values = as_images(kind, signal, side == "predicted") if KINDS[kind].is_picture else signal
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
    if kind == "pose":  # the camera's, or another one, such as a hand's: where it is, in its own frame
        if name == take.of_kind("pose"):
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
    names = KINDS[kind].curves
    for channel, number in enumerate(np.ravel(value)):
        label = names[channel] if channel < len(names) else str(channel)
        rr.log(["curves", name, side, label], rr.Scalars(float(number)))
