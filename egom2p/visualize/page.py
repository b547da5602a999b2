"""Takes as one HTML page that needs nothing else: the scene in 3-D on a canvas, frames, curves, one slider for time.

What draws is `viewer.js` beside this file, plain JavaScript without a library, inlined; so are pictures and numbers, at
reduced size.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from egom2p.signals import KINDS
from egom2p.visualize.scene import Take, as_images

PICTURE_SIDE = 160
WIDEST_JPEG = 65_000  # pixels; libjpeg takes 65 500
POINTS = 700  # a frame

VIEWER_STYLE = """
.viewer { border: 1px solid #e3e6ec; border-radius: 10px; padding: .8rem; margin: 1rem 0; }
.viewer .row { display: flex; gap: .8rem; flex-wrap: wrap; align-items: flex-start; }
.viewer canvas.scene { flex: 1 1 340px; min-width: 280px; height: 400px; touch-action: none; cursor: grab;
                       background: #f7f8fa; border-radius: 8px; }
.viewer .pictures { display: flex; gap: .5rem; flex-wrap: wrap; flex: 1 1 330px; }
.viewer figure { margin: 0; position: relative; } .viewer figure canvas { width: 160px; height: 160px; display: block; }
.viewer figcaption { font-size: .78rem; color: #6b7486; }
.viewer canvas.curve { width: 100%; height: 110px; }
.viewer .time { display: flex; gap: .6rem; align-items: center; margin: .6rem 0 0; }
.viewer .time input { flex: 1; }
@media (max-width: 480px) { .viewer figure canvas { width: 138px; height: 138px; } }
.viewer button { font: inherit; border: 1px solid #cfd4dd; border-radius: 6px; background: white;
                 padding: .1rem .7rem; }
.true { color: #222222; } .predicted { color: #d1495b; }
"""
STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1d2433; margin: 0 auto; padding: 1rem;
       max-width: 1200px; }
h1 { font-size: 1.25rem; margin: .2rem 0; } .soft { color: #6b7486; font-size: .86rem; margin: .1rem 0; }
""" + VIEWER_STYLE


def write_page(path: Path, takes: list[Take], title: str) -> None:
    """One self-contained page with every take."""
    parts = "".join(viewer_html(take) for take in takes)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<!doctype html><html lang="en">{head}<title>{html.escape(title)}</title><style>{STYLE}</style>'
                    f"<body><h1>{html.escape(title)}</h1>{LEGEND}{parts}<script>{script()}</script></body></html>",
                    encoding="utf-8", errors="replace")


def script() -> str:
    """What draws the viewers of a page."""
    return (Path(__file__).parent / "viewer.js").read_text()


LEGEND = ('<p class="soft"><b class="true">Black</b>: true; <b class="predicted">red</b>: predicted. Drag to turn, '
          "wheel to come nearer, double-click to start over. Axes of the first camera: x right, y down, z forward.</p>")


def viewer_html(take: Take) -> str:
    """The HTML of one take; `viewer.js` and STYLE must be on the page."""
    data = json.dumps(_data(take), separators=(",", ":")).replace("</", "<\\/")
    notes = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in take.notes)
    return (f'<section class="viewer"><b>{html.escape(take.key)}</b>{notes}'
            f'<script type="application/json">{data}</script></section>')


def _data(take: Take) -> dict[str, Any]:
    """Everything the script draws, as plain numbers and inlined pictures."""
    paths = take.paths
    pictures = [_film(name, side, kind, signal, take.rates[name], _gaze(take, name))
                for name, kind in take.kinds.items() if KINDS[kind].is_picture
                for side, signal in take.sides(name).items()]
    curves = [{"name": f"{name}: error, {take.units.get(name, '')}", "seconds": take.seconds,
               "lines": [{"side": "predicted", "values": _or_null(error)}]} for name, error in take.errors.items()]
    for name, kind in take.kinds.items():
        if KINDS[kind].is_picture or kind == "gaze" or name == take.of_kind("pose"):
            continue
        lines = {side: signal[:, :3, 3] if kind == "pose" else signal for side, signal in take.sides(name).items()}
        curves.append({"name": f"{name}: position, m" if kind == "pose" else name, "seconds": take.seconds,
                       "lines": [{"side": side, "values": _plain(column)} for side, signal in lines.items()
                                 for column in signal.T]})
    return {"seconds": take.seconds, "pictures": pictures, "curves": curves,
            "poseRate": take.rates.get(take.of_kind("pose"), 30.0),
            "depthRate": take.rates.get(take.of_kind("depth"), 8.0),
            "paths": {side: _plain(poses[:, :3, :].reshape(len(poses), 12)) for side, poses in paths.items()},
            "points": {side: [_points(take, side, frame) for frame in range(len(metres))]
                       for side, metres in take.metres.items()}}


def _points(take: Take, side: str, frame: int) -> list[list[float]]:
    places, colours = take.points(side, frame)
    finite = np.isfinite(places).all(1)  # of a camera whose pose is not known, nowhere
    places, colours = places[finite], colours[finite]
    kept = np.linspace(0, len(places) - 1, min(POINTS, len(places))).astype(int)
    return [[*map(float, np.round(p, 2)), int(c[0]) << 16 | int(c[1]) << 8 | int(c[2])]
            for p, c in zip(places[kept], colours[kept], strict=True)]


def _gaze(take: Take, picture: str) -> dict[str, Any]:
    """Gaze to draw on frames of a film of what the wearer sees."""
    name = take.of_kind("gaze")
    if not name or take.kinds[picture] != "rgb":
        return {}
    return {"rate": take.rates[name], **{side: _plain(signal) for side, signal in take.sides(name).items()}}


def _plain(array: np.ndarray) -> list:
    return np.where(np.isfinite(array), np.round(array.astype(np.float64), 4), 0.0).tolist()


def _or_null(array: np.ndarray) -> list:
    """As `_plain`, null where there is no number: a curve has a gap there."""
    return [value if known else None for value, known in zip(_plain(array), np.isfinite(array), strict=True)]


def _film(name: str, side: str, kind: str, video: np.ndarray, rate: float, gaze: dict[str, Any]) -> dict[str, Any]:
    """A film, of a long one every second frame, third, ..., so that they fit side by side into a JPEG."""
    step = -(-len(video) * PICTURE_SIDE // WIDEST_JPEG)
    return {"name": f"{name}, {side}", "rate": rate / step, "sheet": _sheet(kind, video[::step], side == "predicted"),
            "count": len(video[::step]), "gaze": gaze}


def _sheet(kind: str, video: np.ndarray, predicted: bool) -> str:
    """All frames side by side as one inlined JPEG."""
    side = min(PICTURE_SIDE, max(video.shape[1:3]))
    frames = [np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
              for picture in as_images(kind, video, predicted)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(frames, 1)).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
