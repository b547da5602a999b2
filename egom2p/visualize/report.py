"""`report.html`: one self-contained page about a run. Pictures are inlined; nothing is fetched."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from egom2p.visualize import page as viewer
from egom2p.visualize import plots
from egom2p.visualize.scene import Take

STYLE = """
:root { --ink: #1d2433; --soft: #6b7486; --line: #e3e6ec; --good: #15803d; --bad: #b42318; --accent: #00798c; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); max-width: 1060px;
       margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); } .num { text-align: right; font-variant-numeric: tabular-nums;
} table { border-collapse: collapse; width: 100%; font-size: .84rem; } th { text-align: left; font-weight: 600; color:
var(--soft); } th, td { padding: .36rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap; } th.num {
text-align: right; } tr.main td { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: flex; gap: .9rem; flex-wrap: wrap; margin: 1.4rem 0; }
.card { flex: 1 1 190px; border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; } .card span { color: var(--soft); font-size: .86rem; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0 1.3rem; } code { background: #f3f4f7; padding: .1em
.35em; border-radius: 4px; }
.scroll { overflow-x: auto; }
"""

MAIN_METRICS = {"ate_m": "trajectory error, m", "gaze_mse": "gaze error (MSE)", "abs_rel": "relative depth error",
                "psnr_db": "picture PSNR, dB"}


@dataclass
class OwnPart:
    """About the user's own recordings: a sentence, (caption, figure) sheets, and the summary of an evaluation, empty
    where none was possible."""

    text: str
    sheets: list[tuple[str, plt.Figure]]
    summary: dict[str, dict[str, dict]]


@dataclass
class Report:
    """What the page shows. summary: the evaluation's; metrics: the training's rows; sheets: (caption, figure) of clips;
    seconds: by stage; facts: (name, value). pictures: (caption, PNG file) of recordings from outside the world; during:
    the same, made while training; mine: the user's own recordings; takes: clips to turn and play, before everything
    else; reliability: by task, `evaluation.results.reliability`; before: what `evaluation.results.changes_since` found
    in the folder; drawn: (caption, figure) of pictures beside one draw."""

    title: str
    summary: dict[str, dict[str, dict]]
    metrics: list[dict[str, Any]]
    sheets: Sequence[tuple[str, plt.Figure]]
    seconds: dict[str, float]
    facts: Sequence[tuple[str, str]]
    pictures: Sequence[tuple[str, Path]] = ()
    during: Sequence[tuple[str, Path]] = ()
    mine: OwnPart | None = None
    takes: Sequence[Take] = ()
    reliability: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: tuple[dict[str, Any], Sequence[Any]] = ({}, ())
    drawn: Sequence[tuple[str, plt.Figure]] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page."""
    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1>", _lead(report.facts), _cards(report.summary), *_viewers(report.takes),
             "<h2>Results on held-out clips</h2>", _RESULT_NOTE, _result_table(report.summary),
             *_changes(*report.before), *_reliability(report.reliability),
             "<h2>Training</h2>", _image(plots.loss_curves(report.metrics)), *_files(report.during),
             "<h2>Clips</h2>", _CLIP_NOTE, *_figures(report.sheets)]
    if report.drawn:
        parts += ["<h2>The mean and one draw</h2>", _DRAW_NOTE, *_figures(report.drawn)]
    if report.mine:
        parts += _own_part(report.mine)
    if report.pictures:
        parts += ["<h2>Recordings from outside the world</h2>", _OUTSIDE_NOTE, *_files(report.pictures)]
    parts += ["<h2>What each stage cost</h2>", _cost_table(report.seconds)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    style = STYLE + (viewer.VIEWER_STYLE if report.takes else "")
    script = f"<script>{viewer.script()}</script>" if report.takes else ""
    path.write_text(f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{style}</style>'
                    f"<body>{''.join(parts)}{script}</body></html>", encoding="utf-8", errors="replace")


def _figures(sheets: Sequence[tuple[str, plt.Figure]]) -> list[str]:
    return [f'<p class="soft">{html.escape(caption)}</p>{_image(figure)}' for caption, figure in sheets]


def _files(pictures: Sequence[tuple[str, Path]]) -> list[str]:
    return [f'<p class="soft">{html.escape(caption)}</p>{_inline(file.read_bytes())}' for caption, file in pictures]


_RESULT_NOTE = """<p>Every row sets the model beside the strongest trivial prediction, beside itself with its inputs
taken from another clip (if that were no worse, the input would not be used), and beside the tokenizer's own
reconstruction, which no prediction in these tokens is expected to beat. Brackets are 95&nbsp;% bootstrap intervals over
clips. ATE is taken after a rigid
SE(3) fit, depth errors after a scale-and-shift fit in inverse depth per clip.</p>"""

_CLIP_NOTE = """<p>Held-out clips, not chosen: the first of the set. White ring: true gaze, cyan cross: predicted. Depth
is relative inverse depth, bright is near. Trajectory, gaze and depth are predicted from rgb; rgb is predicted from
depth.</p>"""


_OUTSIDE_NOTE = """<p>The same model on real videos it was never trained for: shown because the path from a plain file
to trajectory, gaze and depth works, not because the predictions are good.</p>"""

_DRAW_NOTE = """<p>Colours are not in depth. The mean over all rooms that fit is what a squared error asks for, and
is a blur; one draw, decoded in several steps, commits itself to a room, and is further from the true one on
average.</p>"""


def _viewers(takes: Sequence[Take]) -> list[str]:
    return [f"<h2>Predictions to look at</h2>{viewer.LEGEND}", *map(viewer.viewer_html, takes)] if takes else []


def _own_part(mine: OwnPart) -> list[str]:
    parts = ["<h2>Your recordings</h2>", f"<p>{html.escape(mine.text)} White rings and black lines are what the "
             "recordings themselves bring along, where they do.</p>"]
    if mine.summary:
        parts.append(_result_table(mine.summary))
    return parts + _figures(mine.sheets)


def _lead(facts: Sequence[tuple[str, str]]) -> str:
    return '<p class="soft">' + " &middot; ".join(f"{html.escape(k)} {html.escape(v)}" for k, v in facts) + "</p>"


def _cards(summary: dict) -> str:
    cards = []
    for task, metrics in summary.items():
        for metric, label in MAIN_METRICS.items():
            if metric in metrics:
                f = metrics[metric]
                gain = _gain(f)
                tone = "good" if gain > 0 else "bad"
                cards.append(f'<div class="card"><span>{task}: {label}</span><b>{_number(f["value"])}</b>'
                             f'<span class="{tone}">{_versus(metric, f)} the strongest trivial prediction</span></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _gain(f: dict) -> float:
    return f["value"] - f["baseline"] if f["better"] == "higher" else f["baseline"] - f["value"]


def _versus(metric: str, f: dict) -> str:
    if metric == "psnr_db":
        return f"{f['value'] - f['baseline']:+.2f} dB against"
    change = f["value"] / f["baseline"] - 1 if f["baseline"] else 0.0
    return f"{abs(change):.0%} {'below' if change < 0 else 'above'}"


def _result_table(summary: dict) -> str:
    head = ("<tr><th>task<th>metric<th class=num>model<th class=num>95 % interval<th class=num>baseline<th>which"
            "<th class=num>inputs shuffled<th class=num>ceiling<th class=num>clips</tr>")
    rows = []
    for task, metrics in summary.items():
        for metric, f in metrics.items():
            if "@" in metric:  # variants stay in results.json
                continue
            tone = "good" if _gain(f) > 0 else "bad"
            low, high = f["ci95"]
            cells = [_number(f["value"]), f"[{_number(low)}, {_number(high)}]", _number(f["baseline"])]
            more = [_number(f["shuffled"]), _number(f["ceiling"]), f["clips"]]
            rows.append(f'<tr class="{"main" if metric in MAIN_METRICS else ""}"><td>{task}<td>{metric}'
                        f'<td class="num {tone}">' + "<td class=num>".join(map(str, cells))
                        + f'<td>{html.escape(f["baseline_name"])}'
                        + "".join(f"<td class=num>{cell}" for cell in more) + "</tr>")
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _changes(about: dict[str, Any], changes: Sequence[Any]) -> list[str]:
    """Figures beside those that the folder held before."""
    if not changes:
        return []
    told = ", ".join(f"{key} {about[key]}" for key in ("commit", "step", "torch") if about.get(key))
    rows = "".join(f"<tr><td>{c.task}<td>{c.metric}<td class=num>{_number(c.before)}<td class=num>{_number(c.now)}"
                   f"<td class=num>[{_number(c.ci95[0])}, {_number(c.ci95[1])}]<td>{'yes' if c.is_real else 'no'}</tr>"
                   for c in changes)
    return ["<h2>What changed since the last run in this folder</h2>", f"<p>Before: {html.escape(told)}. The same "
            "clips, paired; a difference is real when its 95&nbsp;% interval leaves out 0.</p>",
            "<table><tr><th>task<th>metric<th class=num>before<th class=num>now<th class=num>difference"
            f"<th>real</tr>{rows}</table>"]


def _reliability(by_task: dict[str, dict[str, Any]]) -> list[str]:
    """How wrong the model is where it is how sure: clips in four parts by confidence."""
    rows = ""
    for task, told in by_task.items():
        if told:
            cells = "".join(f'<td class=num>{_number(p[told["metric"]])}<span class="soft"> at '
                            f'{_number(p["confidence"])}</span>' for p in told["parts"])
            rows += f'<tr><td>{task}<td>{told["metric"]}{cells}<td class=num>{told["agreement"]:+.2f}</tr>'
    if not rows:
        return []
    between = max(len(told["parts"]) for told in by_task.values() if told) - 2
    head = f"<th class=num>least sure{'<th>' * between}<th class=num>surest"
    return ["<h2>Does it know when it is wrong?</h2>", "<p>Clips in four parts by how sure the model was of them, and "
            "how sure: the probability it gave the ids it chose, geometric mean over a clip. Agreement is the rank "
            "correlation of confidence with quality: +1 when the surest are the best, 0 when confidence tells nothing."
            "</p>",
            f'<div class="scroll"><table><tr><th>task<th>metric{head}<th class=num>agreement</tr>{rows}</table></div>']


def _cost_table(seconds: dict[str, float]) -> str:
    total = max(sum(seconds.values()), 1e-9)
    style = "background:var(--accent);height:.7rem;border-radius:3px"
    rows = "".join(f'<tr><td>{html.escape(stage)}<td class=num>{_duration(s)}<td style="width:55%">'
                   f'<div style="{style};width:{100 * s / total:.1f}%"></div></tr>' for stage, s in seconds.items())
    return (f"<table><tr><th>stage<th class=num>time<th></tr>{rows}"
            f"<tr class=main><td>all<td class=num>{_duration(total)}<td></tr></table>")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.2f}"


def _image(figure: plt.Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return _inline(buffer.getvalue())


def _inline(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
