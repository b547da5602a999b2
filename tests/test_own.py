"""`egom2p quickstart --recordings FOLDER`: one's own videos beside the world."""

import json
import shutil

import numpy as np
import pytest

from egom2p import EgoM2P, Pipeline, own
from egom2p.data.clips import ClipIndex
from egom2p.errors import UserError
from egom2p.signals.writers import write_video
from tests.conftest import run_cli


def write_recording(folder, name, seconds, seed, gaze=True):
    """A video of moving stripes at 10 fps, 64 x 48 pixels, with gaze at 30 Hz beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (48, 64 + seconds * 10, 3)).astype(np.uint8)
    frames = np.stack([picture[:, i : i + 64] for i in range(seconds * 10)])
    write_video(folder / f"{name}.mp4", frames, 10)
    if gaze:
        times = np.arange(seconds * 30) / 30
        np.savetxt(folder / f"{name}.gaze.csv", np.c_[times, 32 + 8 * np.sin(times), 24 + 4 * np.cos(times)],
                   delimiter=",", header="time,x,y", comments="")


def test_the_end_of_each_recording_is_held_aside(tmp_path):
    write_recording(tmp_path / "mine", "long", 20, 1)
    write_recording(tmp_path / "mine", "short", 4, 2)
    shares = own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)
    assert (shares.trained, shares.aside, shares.recordings) == (10, 2, 2)
    trained, aside = (ClipIndex(str(folder)).keys for folder in (shares.train_folder, shares.aside_folder))
    assert sorted(k[:4] for k in aside) == ["long", "long"]
    assert max(k for k in trained if k.startswith("long")) < min(aside)
    again = own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)
    assert again == shares
    write_recording(tmp_path / "mine", "third", 6, 3)
    with pytest.raises(UserError, match="recordings changed since"):
        own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)


@pytest.mark.parametrize(("seconds", "trained", "aside"), [(2, 1, 0), (4, 1, 1)])
def test_very_short_recordings(tmp_path, seconds, trained, aside):
    write_recording(tmp_path / "mine", "only", seconds, 1, gaze=False)
    shares = own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)
    assert (shares.trained, shares.aside) == (trained, aside)


def test_recordings_in_folders_for_it_are_held_aside_whole(tmp_path):
    for place in ("train/x", "test/y", "val/z"):
        write_recording(tmp_path / "mine" / place[:-2], place[-1], 10, 1)
    shares = own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)
    trained, aside = ({k.rpartition("-")[0] for k in ClipIndex(str(f)).keys}
                      for f in (shares.train_folder, shares.aside_folder))
    assert trained == {"train_x_mp4"} and aside == {"test_y_mp4", "val_z_mp4"}
    shutil.rmtree(tmp_path / "mine/train")
    with pytest.raises(UserError, match="into train/"):
        own.take_recordings(tmp_path / "mine", tmp_path / "other", 24)


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="no clip could be made"):
        own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)


def test_what_is_aside_is_predicted_and_measured_where_it_brings_truth(finished, tmp_path):
    model = EgoM2P.from_pretrained(finished[0] / "model")
    write_recording(tmp_path / "mine", "long", 20, 1)
    shares = own.take_recordings(tmp_path / "mine", tmp_path / "out", 24)
    evaluation = own.measure(model, ("rgb2cam", "rgb2gaze", "depth2rgb"), shares, {})
    assert list(evaluation.summary) == ["rgb2gaze"]  # neither camera nor depth came with it
    assert evaluation.summary["rgb2gaze"]["gaze_mse"]["clips"] == 2
    made = own.predict_aside(Pipeline(model), shares, ("cam", "gaze", "depth"), {})
    assert [clip.key for clip, _ in made] == ClipIndex(str(shares.aside_folder)).keys
    assert all(signals["cam"].shape == (60, 4, 4) and signals["depth"].shape == (16, 24, 24) for _, signals in made)


@pytest.mark.slow
def test_quickstart_with_recordings(finished, tmp_path):
    _, config, _, _ = finished
    write_recording(tmp_path / "mine", "long", 20, 1)
    done = run_cli("quickstart", "--out", tmp_path / "out", "--config", config, "--recordings", tmp_path / "mine")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["recordings"]) == ["rgb2gaze"]
    assert "recordings, the clips held aside" in done.stdout
    page = (tmp_path / "out/report.html").read_text()
    assert "10 clips of 1 recordings: 8 were trained on beside the world, 2 held aside" in page
    assert len(list((tmp_path / "out/tokens").glob("gaze/recordings/*.tar"))) == 1
    other = run_cli("quickstart", "--out", tmp_path / "out", "--config", config, check=False)
    assert other.returncode == 2 and "another configuration" in other.stderr
