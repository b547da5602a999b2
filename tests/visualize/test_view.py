"""What `egom2p view` shows: geometry by hand, the page in a real browser, the rerun recording by rerun's own reader."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from egom2p.data.clips import Clip, write_clips
from egom2p.evaluation.takes import take_of
from egom2p.view import takes_of
from egom2p.visualize.page import viewer_html
from egom2p.visualize.scene import as_images
from tests.conftest import run_cli, start_cli

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def wall_clip():
    """A camera that moves 1 m forward towards a wall at z = 4 m, seen with a focal length of half a side."""
    frames, size = 16, 10
    poses = np.tile(np.eye(4, dtype=np.float32), (60, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 60)
    depth = np.stack([np.full((size, size), 4 - t / (59 / 30), np.float16) for t in np.arange(frames) / 8])
    rgb = np.zeros((frames, size, size, 3), np.uint8)
    rgb[:, :, 5:] = (200, 100, 50)
    matrix = [[5.0, 0, 5], [0, 5, 5], [0, 0, 1]]
    return Clip("wall", "set", {"rgb": rgb, "depth": depth, "cam": poses}, {"intrinsics": matrix, "side": size})


KINDS = {"rgb": "rgb", "depth": "depth", "cam": "pose"}


def test_points_lie_where_the_wall_is():
    take = take_of(wall_clip(), KINDS, {})
    for frame in (0, 7, 15):
        places, colours = take.points("true", frame)
        assert places[:, 2] == pytest.approx(4, abs=0.02)  # whatever the camera's own place is
        assert np.ptp(places[:, 0]) == pytest.approx(0.9 * take.metres["true"][frame, 0, 0] * 2, rel=1e-2)
        assert (colours[places[:, 0] > 0] == (200, 100, 50)).all() and (colours[places[:, 0] < 0] == 0).all()


def test_predicted_depth_is_placed_by_the_evaluations_fit():
    """Half of the true inverse depth plus a tenth: the fit undoes both."""
    clip = wall_clip()
    varied = clip.signals["depth"] * np.linspace(0.8, 1.2, 10, dtype=np.float16)
    clip = Clip(clip.key, clip.dataset, {**clip.signals, "depth": varied.astype(np.float16)}, clip.meta)
    made = 0.5 / clip.signals["depth"].astype(np.float32) + 0.1
    take = take_of(clip, KINDS, {"depth": made, "cam": clip.signals["cam"]})
    np.testing.assert_allclose(take.metres["predicted"], take.metres["true"], rtol=1e-3)
    assert take.errors["depth"].max() < 1e-3 and take.errors["cam"].max() < 1e-6
    assert "no scale" in take.notes[0]
    alone = take_of(Clip("k", "", {"rgb": clip.signals["rgb"]}, {}), KINDS, {"depth": made})
    assert not alone.metres and "pictures only" in alone.notes[0]


def test_a_kind_that_nothing_knows_of_appears_as_curves():
    clip = Clip("k", "", {"wrist": np.arange(120.0).reshape(60, 2)}, {})
    data = json.loads(re.search(r"<script[^>]*>(.*?)</script>", viewer_html(take_of(clip, {"wrist": "motion"}, {})))[1])
    assert [len(line["values"]) for line in data["curves"][0]["lines"]] == [60, 60]


def test_a_page_of_a_long_film_and_of_errors_with_gaps():
    """JPEG ends at 65 500 pixels, so of ten minutes every twelfth frame; where gaze is not known its error is a gap."""
    frames = np.zeros((4800, 16, 160, 3), np.uint8)
    gaze = np.ones((18_000, 3), np.float32)
    gaze[100:200, 2] = 0
    clip = Clip("k", "", {"rgb": frames, "gaze": gaze}, {})
    page = viewer_html(take_of(clip, {"rgb": "rgb", "gaze": "gaze"}, {"gaze": np.ones((18_000, 3), np.float32)}))
    data = json.loads(re.search(r"<script[^>]*>(.*?)</script>", page)[1])
    assert data["pictures"][0]["count"] == 400 and data["pictures"][0]["rate"] == pytest.approx(8 / 12)
    values = data["curves"][0]["values"] if "values" in data["curves"][0] else data["curves"][0]["lines"][0]["values"]
    assert None in values and 0.0 in values


def test_joined_depth_is_shown_as_it_is_and_true_depth_as_its_inverse():
    """Predictions joined over windows leave [0, 1]; true depth may lie within a metre. Near is bright in both."""
    metres = np.linspace(0.2, 0.9, 12).reshape(1, 3, 4)
    joined = np.linspace(1.4, 0.1, 12).reshape(1, 3, 4)
    for signal, predicted in ((metres, False), (joined, True)):
        light = as_images("depth", signal, predicted).astype(int).sum(-1).ravel()
        assert (np.diff(light) <= 0).all() and light[0] > light[-1]


def test_names_of_films_may_hold_anything(finished, tmp_path):
    out, _, video, _ = finished
    films = [tmp_path / "a$_$b.mp4", Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.mp4")), tmp_path / "z.mp4"]
    for film in films:
        shutil.copy(video, film)
    run_cli("generate", out / "model", "--inputs", *films, "--targets", "cam,cam", "--out", tmp_path / "made")
    assert len(list((tmp_path / "made").glob("*/preview.png"))) == 3
    tokens = np.load(tmp_path / "made/z/cam_tokens.npy")
    assert len(tokens) == json.loads((tmp_path / "made/z/generated.json").read_text())["windows"]


def test_what_generate_and_eval_leave_can_be_looked_at(finished, tmp_path):
    out, _, video, _ = finished
    run_cli("generate", out / "model", "--inputs", video, "--targets", "cam,gaze,depth", "--out", tmp_path / "made")
    take = takes_of(str(tmp_path / "made/walk"))[0]
    assert take.predicted.keys() == {"cam", "gaze", "depth"} and take.truth["rgb"].shape[1:] == (24, 24, 3)
    assert take.seconds == pytest.approx(3, abs=0.1)
    run_cli("generate", out / "model", "--inputs", video, "--modality", "depth", "--targets", "rgb", "--out",
            tmp_path / "grey")
    take = takes_of(str(tmp_path / "grey/walk"))[0]
    assert take.predicted.keys() == {"rgb"} and take.truth.keys() == {"depth, as filmed"}
    assert len(take.predicted["rgb"]) == len(take.truth["depth, as filmed"])
    run_cli("eval", out / "model", "--tasks", "rgb2cam", "--data", out / "clips/test/*.tar", "--out", tmp_path / "eval")
    takes = takes_of(str(tmp_path / "eval"), limit=2)
    assert len(takes) == 2 and all("cam" in t.errors or "cam" not in t.truth for t in takes)
    done = run_cli("view", out / "clips/test", "--model", out / "model", "--targets", "hands", "--html",
                   tmp_path / "x.html", check=False)
    assert done.returncode == 2 and "no modality 'hands'" in done.stderr


def test_the_rerun_recording_holds_every_signal(finished, tmp_path):
    pytest.importorskip("rerun", reason="rerun is not installed")
    path = tmp_path / "q.rrd"
    run_cli("view", finished[0], "--save", path, "--limit", 1)
    done = subprocess.run([sys.executable, "-m", "rerun", "rrd", "print", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for entity in ("world/true/camera", "world/predicted/path", "world/predicted/points", "pictures/depth/predicted",
                   "pictures/rgb/true", "curves/gaze/true/valid", "errors/cam", "notes"):
        assert entity in done.stdout, entity


def screenshot(page, picture, width=1000, height=700):
    subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                    "--disable-background-networking", "--disable-component-update", "--disable-sync",
                    f"--user-data-dir={picture.parent}/chromium-{width}", f"--window-size={width},{height}",
                    "--virtual-time-budget=4000", f"--screenshot={picture}", page.as_uri()],
                   check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(picture).convert("RGB"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1300, 400])
def test_the_page_draws_in_a_browser(tmp_path, width):
    """The wall's colour is seen in the scene, the true path in black, the predicted one in red; nothing is fetched."""
    clip = wall_clip()
    moved = clip.signals["cam"].copy()
    moved[:, 0, 3] += np.linspace(0, 1, 60)
    write_clips(tmp_path / "clips.tar", [clip])
    page = tmp_path / "page.html"
    from egom2p.visualize.page import write_page

    write_page(page, [take_of(clip, KINDS, {"cam": moved})], "a test")
    text = page.read_text()
    assert "http" not in text.replace("http://www.w3.org", "") and "src=\"" not in text
    seen = screenshot(page, tmp_path / "seen.png", width)
    scene = seen[: 600].reshape(-1, 3).astype(int)
    for colour, least in (((200, 100, 50), 100), ((209, 73, 91), 60), ((34, 34, 34), 60)):
        assert (np.abs(scene - colour).max(1) < 12).sum() > least, colour


@pytest.mark.slow
def test_the_viewer_is_served_where_it_says(finished, tmp_path):
    """A browser gets rerun's page at the address that is printed; a second viewer is refused in one line."""
    pytest.importorskip("rerun")
    words = ("view", f"{finished[0]}/clips/test/*.tar", "--web", "--limit", "1")
    process = start_cli(*words, output=tmp_path / "printed")
    try:
        deadline = time.time() + 200  # seconds alone, a minute beside other work
        while "Ctrl-C ends it" not in (tmp_path / "printed").read_text() and time.time() < deadline:
            assert process.poll() is None, (tmp_path / "printed").read_text()
            time.sleep(0.2)
        printed = (tmp_path / "printed").read_text()
        address = next((line for line in printed.splitlines() if line.startswith("http")), printed)
        assert address.startswith("http://localhost:9090/?url=rerun%2Bhttp%3A%2F%2F")
        with urlopen(address.replace("localhost", "127.0.0.1"), timeout=20) as answer:
            assert b"rerun" in answer.read().lower()
        second = run_cli(*words, check=False)
        assert second.returncode == 2 and "is in use" in second.stderr
    finally:
        process.kill()


def test_signals_of_ones_own_appear_as_what_they_are(tmp_path, rng):
    """A second pose, pictures and numbers, of clips alone and by a modality's kind: curves that fit, the camera as
    itself."""
    hand = np.tile(np.eye(4, dtype=np.float32), (60, 1, 1))
    hand[:, :3, 3] = np.arange(180).reshape(60, 3)
    signals = {"rgb": rng.integers(0, 255, (16, 24, 24, 3)).astype(np.uint8), "cam": hand[:, ::1] * 1, "hand": hand,
               "infrared": rng.integers(0, 255, (16, 24, 24, 3)).astype(np.uint8), "imu": np.ones((400, 6), np.float32)}
    write_clips(tmp_path / "a.tar", [Clip("k", "", signals, {"rates": {"imu": 200.0, "hand": 30.0, "infrared": 8.0}})])
    take = takes_of(str(tmp_path / "a.tar"))[0]
    assert take.kinds == {"rgb": "rgb", "cam": "pose", "hand": "pose", "infrared": "rgb", "imu": "motion"}
    data = json.loads(re.search(r"<script[^>]*>(.*?)</script>", viewer_html(take))[1])
    assert {c["name"]: [len(line["values"]) for line in c["lines"]] for c in data["curves"]} == {
        "hand: position, m": [60] * 3, "imu": [400] * 6}
    assert data["curves"][0]["lines"][1]["values"][:2] == [1.0, 4.0] and len(data["pictures"]) == 2
