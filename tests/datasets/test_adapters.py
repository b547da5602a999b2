"""Each adapter on a miniature of its raw layout, written from the world in that set's axes, units, rates and formats.

What comes back must be the world's own poses, gaze and depth, so a wrong axis, a transposed matrix or a wrong unit
cannot pass. The miniatures are ragged: frames dropped, clocks offset, poses NaN, gaze missing, videos cut off,
sequences unreadable.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from egom2p import geometry
from egom2p.data.clips import ClipIndex
from egom2p.data.video import square
from egom2p.datasets import ADAPTERS
from egom2p.datasets.checks import reprojection_error
from egom2p.datasets.prepare import PrepareArgs, make_adapter
from egom2p.datasets.prepare import prepare as prepare_in
from egom2p.datasets.video import VideoFolder
from egom2p.signals.writers import write_video
from tests.conftest import run_cli
from tests.datasets.conventions import PSI_FROM_OPENCV, opencv_distort
from tests.datasets.miniature import Miniature, save_png

SIZE = 64


def clips_of(out: Path, sequence: str) -> list:
    tars = list(out.glob(f"*/{sequence}.tar"))
    if not tars:
        return []
    index = ClipIndex(str(tars[0]))
    return [index.read(i) for i in range(len(index))]


def check(clips: list, mini: Miniature, crop: int = 0, signals: tuple[str, ...] = ("rgb", "depth", "cam"),
          offset: float = 0.0, metres: float = 0.004, degrees: float = 0.3, last: float = 0.0) -> None:
    """Every clip holds the world's own signals for its time."""
    assert clips
    crop = crop or min(mini.width, mini.height)
    for clip in clips:
        start = clip.meta["start"] - offset
        assert set(signals) <= clip.signals.keys(), (clip.key, clip.signals.keys())
        video, motion = start + np.arange(16) / 8, start + np.arange(60) / 30
        nearest = np.abs(mini.times[:, None] - video).argmin(0)
        shown, depth = (frames[nearest] for frames in mini.frames)
        top, left = (mini.height - crop) // 2, (mini.width - crop) // 2
        centre = (slice(None), slice(top, top + crop), slice(left, left + crop))
        assert np.abs(square(shown[centre], SIZE).astype(int) - clip.signals["rgb"]).mean() < 6
        if "cam" in signals:
            truth, got = (geometry.relative_to_first(p.astype(np.float64))
                          for p in (mini.poses(np.minimum(motion, last or mini.times[-1])), clip.signals["cam"]))
            assert np.linalg.norm(truth[:, :3, 3] - got[:, :3, 3], axis=1).max() < metres
            assert geometry.rotation_angle_deg(truth[:, :3, :3].transpose(0, 2, 1) @ got[:, :3, :3]).max() < degrees
        if "depth" in signals:
            step = crop / SIZE
            rows = ((np.arange(SIZE) + 0.5) * step).astype(int)
            expected = depth[centre][:, rows][:, :, rows]
            got = clip.signals["depth"].astype(np.float32)
            assert np.median(np.abs(got - expected) / np.maximum(expected, 0.1)) < 0.01
            if "cam" in signals and "intrinsics" in clip.meta:
                assert reprojection_error(clip.signals["depth"], clip.signals["cam"],
                                          np.array(clip.meta["intrinsics"])) < 0.06
        if "gaze" in signals:
            pixels = mini.gaze_pixels(np.minimum(motion, mini.times[-1]))
            truth = geometry.gaze_from_pixels(pixels, mini.width, mini.height, crop)
            both = (truth[:, 2] > 0) & (clip.signals["gaze"][:, 2] > 0)
            assert both.any()
            assert np.abs(truth[both, :2] - clip.signals["gaze"][both, :2]).max() < 0.01


def prepare(name: str, root: Path, out: Path, *more: object) -> dict:
    run_cli("prepare", name, "--root", root, "--out", out, "--size", SIZE, "--workers", 1, *more, check=False)
    return json.loads((out / "card.json").read_text())


def text(rows: np.ndarray, path: Path, fmt: str = "%.9g", delimiter: str = " ") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, fmt=fmt, delimiter=delimiter)


def test_h2o(tmp_path):
    mini = Miniature(1, 128, 72, 30)
    rgb, depth = mini.frames
    folder = tmp_path / "raw/subject3_ego/k2/0/cam4"
    for i in range(len(rgb)):
        if i in (40, 41):
            continue  # frames dropped
        save_png(folder / f"rgb/{i:06d}.png", rgb[i])
        save_png(folder / f"depth/{i:06d}.png", np.round(depth[i] * 1000).astype(np.uint16))
        text(mini.poses(mini.times[i : i + 1]).reshape(1, 16), folder / f"cam_pose/{i:06d}.txt")
    (folder / "cam_pose/000050.txt").write_text("1 0 0")  # cut off
    k = mini.intrinsics
    text(np.array([[k[0, 0], k[1, 1], k[0, 2], k[1, 2], mini.width, mini.height]]), folder / "cam_intrinsics.txt")
    (tmp_path / "raw/subject1/h1/0/cam4/rgb").mkdir(parents=True)  # nothing in it
    card = prepare("h2o", tmp_path / "raw", tmp_path / "out")
    assert card["clips_by_split"] == {"val": 3}
    assert list(card["failed"]) == ["subject1/h1/0"]
    assert not card["reprojection"]["doubtful"]
    check(clips_of(tmp_path / "out", "subject3_ego_k2_0"), mini)


@pytest.mark.parametrize("stored", ["whole", "a frame short", "half as many", "resized"])
def test_taco(tmp_path, stored):
    """A second sequence whose poses are of more frames keeps its video; depth that is short, of another rate, or a
    resized 8-bit copy costs depth or its tail."""
    mini = Miniature(2, 192, 108, 30)
    rgb, _ = mini.frames
    for number, lost in ((1, 0), (2, 3)):
        sequence = f"(stir, spoon, bowl)/20231105_{number:03d}"
        video = tmp_path / "raw/Egocentric_RGB_Videos" / sequence / "color.mp4"
        video.parent.mkdir(parents=True)
        write_video(video, rgb[: len(rgb) - lost], 30)
        parameters = tmp_path / "raw/Egocentric_Camera_Parameters" / sequence
        parameters.mkdir(parents=True)
        np.save(parameters / "egocentric_frame_extrinsic.npy", geometry.invert(mini.poses(mini.times)))
        full = np.diag([1920 / 192, 1080 / 108, 1]) if stored == "a frame short" else np.eye(3)
        text(full @ mini.intrinsics, parameters / "egocentric_intrinsic.txt")
        kept = {"a frame short": slice(None, -1), "half as many": slice(None, None, 2)}.get(stored, slice(None))
        depth = tmp_path / "raw/Egocentric_Depth_Videos" / sequence / "egocentric_depth.avi"
        if stored == "resized":
            depth.parent.mkdir(parents=True)
            write_video(depth, rgb[:, ::2, ::2], 15)
        else:
            mini.write_depth_video(depth, 1 / 4000, 15, kept=kept)
    card = prepare("taco", tmp_path / "raw", tmp_path / "out")
    assert card["clips"] == 6
    assert not card["failed"]
    first, second = (card["notes"].get(f"(stir, spoon, bowl)/20231105_{i:03d}", []) for i in (1, 2))
    assert any("frames were lost" in note for note in second)
    assert not any("cam" in note for note in first)
    good = stored in ("whole", "a frame short")
    assert any("depth" in note for note in first) == (stored != "whole")
    if stored == "resized":
        assert any("16-bit grey" in note for note in first)
    if stored == "a frame short":
        assert any("were scaled" in note for note in first)
    check(clips_of(tmp_path / "out", "_stir__spoon__bowl__20231105_001"), mini,
          signals=("rgb", "depth", "cam") if good else ("rgb", "cam"))


def test_holoassist(tmp_path):
    """Poses in psi's axes, ticks of 100 ns, the video starting 0.5 s after the poses, a NaN stretch, lost eyes."""
    mini = Miniature(3, 896 // 4, 504 // 4, 30)
    rgb, _ = mini.frames
    folder = tmp_path / "raw/R001-1July-Test/Export_py"
    (folder / "Video").mkdir(parents=True)
    write_video(folder / "Video_pitchshift.mp4", rgb, 30)
    zero = 637_900_000_000_000_000
    (folder / "Video/VideoMp4Timing.txt").write_text(f"{zero}\n{zero + 60_000_000}\n")
    k = mini.intrinsics
    text(np.concatenate([k.reshape(-1), np.zeros(14), [mini.width, mini.height]])[None],
         folder / "Video/Intrinsics.txt", delimiter="\t")
    times = np.arange(-15, len(rgb)) / 30
    poses = mini.poses(np.maximum(times, 0)) @ geometry.invert(PSI_FROM_OPENCV)
    eyes = mini.poses(np.maximum(times, 0))
    ball = mini.scene.balls[0]
    with (folder / "Video/Pose_sync.txt").open("w") as pose_file:
        for i, t in enumerate(times):
            row = np.full(16, np.nan) if 135 <= i < 150 else poses[i].reshape(-1)
            pose_file.write("\t".join([f"{t + 0.5:.6f}", str(zero + round(t * 1e7)),
                                       *(f"{v:.9g}" for v in row)]) + "\n")
    (folder / "Eyes").mkdir()
    half = 0.5  # the authors place the gaze at half a metre along the ray; its start must not matter: at the camera
    with (folder / "Eyes/Eyes_sync.txt").open("w") as eye_file:
        for i, t in enumerate(times):
            origin = eyes[i, :3, 3]
            direction = (ball - origin) * half
            eye_file.write("\t".join([f"{t + 0.5:.6f}", str(zero + round(t * 1e7)),
                                      *(f"{np.nan if 60 <= i < 70 else v:.9g}" for v in (*origin, *direction)),
                                      str(int(i < 100))]) + "\n")
    (tmp_path / "raw/val-v1_2.txt").write_text("R001-1July-Test\n")
    card = prepare("holoassist", tmp_path / "raw", tmp_path / "out")
    clips = clips_of(tmp_path / "out", "R001-1July-Test")
    assert card["clips_by_split"] == {"val": 3}
    assert "without a valid calibration" in card["notes"]["R001-1July-Test"][-1]
    assert card["left_out"]["cam left out: gap or NaN"] == 1
    check(clips[:2], mini, crop=120, signals=("rgb", "cam", "gaze"))
    assert "cam" not in clips[2].signals
    lost = clips[0].signals["gaze"][:, 2]
    assert (lost[47:53] == 0).all()


def test_egogen(tmp_path):
    """OpenGL axes."""
    mini = Miniature(4, 80, 80, 8)
    (tmp_path / "raw/cam").mkdir(parents=True)
    (tmp_path / "raw/rgb").mkdir()
    (tmp_path / "raw/depth").mkdir()
    (tmp_path / "raw/intrinsics").mkdir()
    motion = np.arange(180) / 30
    np.savez(tmp_path / "raw/cam/a.npz", mini.poses(motion) @ np.diag([1, -1, -1, 1]))
    write_video(tmp_path / "raw/rgb/a.mp4", mini.frames[0], 8)
    np.savez(tmp_path / "raw/depth/a.npz", mini.frames[1])
    text(mini.intrinsics, tmp_path / "raw/intrinsics/a.txt")
    np.savez(tmp_path / "raw/cam/broken.npz", np.zeros((3, 3)))
    write_video(tmp_path / "raw/rgb/broken.mp4", mini.frames[0][:20], 8)
    card = prepare("egogen", tmp_path / "raw", tmp_path / "out")
    assert any("expected (T, 4, 4)" in note for note in card["notes"]["broken"])
    check(clips_of(tmp_path / "out", "a"), mini, last=motion[-1])


def test_hoi4d(tmp_path):
    """Fifteen poses a second, interpolated to thirty; modalities below roots of their own."""
    mini = Miniature(5, 192, 108, 15)
    sequence = "ZY20210800001/H1/C1/N01/S01/s01/T1"
    video = tmp_path / "raw/HOI4D_release" / sequence / "align_rgb/image.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, mini.frames[0], 15)
    mini.write_depth_video(tmp_path / "raw/HOI4D_depth_video" / sequence / "align_depth/depth_video.avi", 0.001, 15)
    log = tmp_path / "raw/HOI4D_annotations" / sequence / "3Dseg/output.log"
    log.parent.mkdir(parents=True)
    start = geometry.relative_to_first(mini.poses(mini.times))
    log.write_text("".join(f"{i} {i} {i + 1}\n" + "\n".join(" ".join(f"{v:.9f}" for v in row) for row in pose) + "\n"
                           for i, pose in enumerate(start)))
    (tmp_path / "raw/camera_params/ZY20210800001").mkdir(parents=True)
    np.save(tmp_path / "raw/camera_params/ZY20210800001/intrin.npy", mini.intrinsics)
    card = prepare("hoi4d", tmp_path / "raw", tmp_path / "out")
    assert card["clips_by_split"] == {"test": 3}
    check(clips_of(tmp_path / "out", "ZY20210800001_H1_C1_N01_S01_s01_T1"), mini)


def test_arctic(tmp_path):
    """A distorted lens, images numbered from an offset, the camera in a pickled dictionary."""
    mini = Miniature(6, 140, 100, 30)
    lens = np.array([-0.12, 0.03, 0.001, -0.002, 0.0, 0.02, 0.0, 0.0])
    offset = 7
    folder = tmp_path / "raw/cropped_images/s05/box_grab_01/0"
    distort = _through(mini.intrinsics, lens, mini.width, mini.height)
    for i, frame in enumerate(mini.frames[0]):
        save_png(folder / f"{i + offset:05d}.png", distort(frame))
        (folder / f"{i + offset:05d}.png").rename(folder / f"{i + offset:05d}.jpg")
    camera_from_world = geometry.invert(mini.poses(mini.times))
    (tmp_path / "raw/raw_seqs/s05").mkdir(parents=True)
    full = np.diag([2800 / mini.width, 2800 / mini.width, 1]) @ mini.intrinsics
    camera = {"R_k_cam_np": camera_from_world[:, :3, :3], "T_k_cam_np": camera_from_world[:, :3, 3:],
              "intrinsics": full, "dist8": lens, "ego_markers.label": ["a", "b"]}
    np.save(tmp_path / "raw/raw_seqs/s05/box_grab_01.egocam.dist.npy", camera, allow_pickle=True)
    (tmp_path / "raw/meta").mkdir()
    (tmp_path / "raw/meta/misc.json").write_text(json.dumps({"s05": {"ioi_offset": offset}}))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    save_png(tmp_path / "raw/cropped_images/s05/evil_01/0/00001.png", mini.frames[0][0])
    array = np.empty((), object)
    array[()] = Evil()
    with (tmp_path / "raw/raw_seqs/s05/evil_01.egocam.dist.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(array, file)
    card = prepare("arctic", tmp_path / "raw", tmp_path / "out")
    assert "refused" in card["failed"]["s05/evil_01"]
    assert not (tmp_path / "ran").exists()
    assert card["clips_by_split"] == {"val": 2}
    clips = clips_of(tmp_path / "out", "s05_box_grab_01")
    assert clips[0].meta["start"] == pytest.approx(1 / 3)
    check(clips, mini, signals=("rgb", "cam"))


def _through(intrinsics: np.ndarray, lens: np.ndarray, width: int, height: int) -> Callable[[np.ndarray], np.ndarray]:
    """frame -> what the real lens would have recorded: each pinhole pixel moved to where the lens puts it (nearest,
    holes filled)."""
    v, u = np.mgrid[0:height, 0:width]
    target = np.stack([u + 0.5, v + 0.5], -1).astype(float)
    guess = (np.concatenate([target, np.ones((height, width, 1))], -1) @ np.linalg.inv(intrinsics).T)[..., :2]
    wanted = guess.copy()
    for _ in range(30):  # fixed-point inversion of the lens
        guess = guess - (np.stack(opencv_distort(guess[..., 0], guess[..., 1], *lens), -1) - wanted)
    pixels = (np.concatenate([guess, np.ones((height, width, 1))], -1) @ intrinsics.T)[..., :2].astype(int)
    inside = ((pixels >= 0) & (pixels < [width, height])).all(-1)

    def distort(frame: np.ndarray) -> np.ndarray:
        out = np.zeros_like(frame)
        out[inside] = frame[pixels[inside][:, 1], pixels[inside][:, 0]]
        return out

    return distort


@pytest.fixture
def own_videos(tmp_path):
    """A folder of someone's own videos: everything beside one, a COLMAP model beside another, a plain one, and broken
    ones."""
    mini = Miniature(7, 128, 96, 25)
    root = tmp_path / "raw"
    (root / "val").mkdir(parents=True)
    write_video(root / "val/walk.mp4", mini.frames[0], 25)
    motion = np.arange(0, 6, 1 / 50)
    from egom2p.geometry import quaternions

    poses = mini.poses(motion)
    text(np.c_[motion, poses[:, :3, 3], quaternions(poses[:, :3, :3])], root / "val/walk.cam.tum")
    rows = ["time,x,y,valid", *(f"{t:.6f},{x:.4f},{y:.4f},1" if np.isfinite(x) else f"{t:.6f},,,0"
                                for t, (x, y) in zip(motion, mini.gaze_pixels(motion), strict=True))]
    (root / "val/walk.gaze.csv").write_text("\n".join(rows))
    np.save(root / "val/walk.depth.npy", mini.frames[1])
    text(mini.intrinsics, root / "val/walk.intrinsics.txt")
    write_video(root / "colmap.mov", mini.frames[0], 25)
    (root / "colmap.colmap").mkdir()
    lines = ["# Image list"]
    for i, pose in enumerate(geometry.invert(mini.poses(mini.times))):
        x, y, z, w = quaternions(pose[None, :3, :3])[0]
        lines += [f"{i + 1} {w} {x} {y} {z} {' '.join(map(str, pose[:3, 3]))} 1 frame_{i:05d}.png", ""]
    (root / "colmap.colmap/images.txt").write_text("\n".join(lines))
    write_video(root / "plain.mp4", mini.frames[0][:60], 25)
    whole = (root / "plain.mp4").read_bytes()
    (root / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "short.mp4").write_bytes(b"")
    write_video(root / "badgaze.mp4", mini.frames[0][:60], 25)
    (root / "badgaze.gaze.csv").write_text("t,u,v\n0,1,2\n")
    return root, mini


def test_own_videos(own_videos, tmp_path):
    root, mini = own_videos
    card = prepare("video", root, tmp_path / "out")
    check(clips_of(tmp_path / "out", "val_walk_mp4"), mini, signals=("rgb", "cam", "gaze", "depth"))
    check(clips_of(tmp_path / "out", "colmap_mov"), mini, signals=("rgb", "cam"))
    assert card["clips_by_split"] == {"train": 5, "val": 3}
    assert set(card["failed"]) == {"broken.mp4"}
    assert any(line.startswith("short.mp4") and "empty" in line for line in card["skipped"])
    assert any("needs a column" in note for note in card["notes"]["badgaze.mp4"])
    assert card["coverage"]["rgb"] == 1
    assert len(card["pose_mean"]) == 9
    assert (tmp_path / "out/contact_sheet.png").stat().st_size > 20_000


def test_a_second_run_does_what_is_missing_and_any_number_of_workers_writes_the_same(own_videos, tmp_path):
    root, _ = own_videos
    prepare("video", root, tmp_path / "a")
    run_cli("prepare", "video", "--root", root, "--out", tmp_path / "b", "--size", SIZE, "--workers", 2, check=False)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.tar"))
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.tar"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/card.json").read_text() == (tmp_path / "b/card.json").read_text()
    times = {f: (tmp_path / "a" / f).stat().st_mtime_ns for f in files}
    (tmp_path / "a/records/plain_mp4.json").unlink()
    prepare("video", root, tmp_path / "a")
    changed = {f.name for f in files if (tmp_path / "a" / f).stat().st_mtime_ns != times[f]}
    assert changed == {"plain.mp4".replace(".", "_") + ".tar"}
    tar = next((tmp_path / "a").glob("*/plain_mp4.tar"))
    whole = tar.read_bytes()
    tar.unlink()
    prepare("video", root, tmp_path / "a")
    assert tar.read_bytes() == whole
    done = run_cli("prepare", "video", "--root", root, "--out", tmp_path / "a", "--size", 32, check=False)
    assert done.returncode == 2
    assert "choose another --out" in done.stderr


def test_lists_that_changed_move_what_was_prepared(tmp_path, monkeypatch):
    """What is for testing now must not stay among the clips that are trained on."""
    (tmp_path / "raw").mkdir()
    for name in "abc":
        write_video(tmp_path / f"raw/{name}.mp4", np.zeros((60, 32, 32, 3), np.uint8), 30)
    lists = {"a.mp4": "train", "b.mp4": "train", "c.mp4": "train"}
    monkeypatch.setattr(VideoFolder, "splits", lambda self, root, sequences: {s: lists[s] for s in lists})
    made = []
    for change in ({}, {"b.mp4": "test"}, {"c.mp4": None}):
        lists = {k: v for k, v in {**lists, **change}.items() if v}
        prepare_in("video", tmp_path / "raw", tmp_path / "out", PrepareArgs(size=16, workers=1))
        made.append(sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/*.tar")))
    assert made == [["train/a_mp4.tar", "train/b_mp4.tar", "train/c_mp4.tar"],
                    ["test/b_mp4.tar", "train/a_mp4.tar", "train/c_mp4.tar"], ["test/b_mp4.tar", "train/a_mp4.tar"]]


def test_wrong_axes_are_flagged(tmp_path):
    """The same video with its trajectory inverted: poses, depth and intrinsics disagree, and the card says so."""
    from egom2p.signals.writers import write_tum

    mini = Miniature(8, 96, 96, 25)
    for name, poses in (("right", mini.poses(mini.times)), ("wrong", geometry.invert(mini.poses(mini.times)))):
        root = tmp_path / name
        root.mkdir()
        write_video(root / "v.mp4", mini.frames[0], 25)
        np.save(root / "v.depth.npy", mini.frames[1])
        text(mini.intrinsics, root / "v.intrinsics.txt")
        write_tum(root / "v.cam.tum", poses, 25)
    assert not prepare("video", tmp_path / "right", tmp_path / "out_right")["reprojection"]["doubtful"]
    assert prepare("video", tmp_path / "wrong", tmp_path / "out_wrong")["reprojection"]["doubtful"]


def test_folders_and_names_as_people_have_them(tmp_path, rng):
    """Brackets and commas in the output's name, a name too long for what is put behind it, one renamed later, one in a
    linked folder, a folder that cannot be entered, and an output that is a file."""
    root, out, long = tmp_path / "raw", tmp_path / "clips [a,b] {2024}", "ü" * 100
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    for path in (root / f"{long}.mp4", root / f"{long[:-1]}.mp4", tmp_path / "elsewhere/a.mp4"):
        write_video(path, rng.integers(0, 255, (16, 32, 32, 3)).astype(np.uint8), 8)
    assert prepare("video", root, out)["clips"] == 3
    assert len(ClipIndex(str(out))) == 3 and len(ClipIndex(f"{tmp_path}/clips*")) == 3
    (root / f"{long}.mp4").rename(root / "b.mp4")
    card = prepare("video", root, out)
    assert card["clips"] == 4
    assert card["skipped"] == [f"{long}.mp4: prepared before and not below {root} now; what was made of it stays. "
                               "Renamed or moved recordings are there twice: take another --out"]
    (tmp_path / "file").write_text("")
    done = run_cli("prepare", "video", "--root", root, "--out", tmp_path / "file", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr


def test_one_bad_file_does_not_end_the_others(tmp_path):
    """A clip that did not come whole, and one that is a web page."""
    raw = tmp_path / "hot3d"
    raw.mkdir()
    (raw / "clip-000001.tar").write_bytes(b"")
    (raw / "clip-000002.tar").write_bytes(b"<html>not found</html>")
    with tarfile.open(raw / "clip-000003.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("000000.image_214-1.jpg"), io.BytesIO())
    adapter = make_adapter("hot3d_aria")
    assert adapter.sequences(raw) == ["clip-000003.tar"]
    assert adapter.skipped(raw) == [f"clip-00000{i}.tar: not a readable tar" for i in (1, 2)]


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_an_empty_folder_is_one_line(name, tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        done = run_cli("prepare", name, "--root", root, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2
        assert "expected" in done.stderr
    assert run_cli("prepare", "nonesuch", "--root", tmp_path, "--out", tmp_path / "out", check=False).returncode == 2


def test_prepared_clips_go_through_the_pipeline(own_videos, tmp_path):
    """Tokenise what was prepared, with the statistics of a camera tokenizer trained on it."""
    root, _ = own_videos
    prepare("video", root, tmp_path / "clips")
    run_cli("tokenizer", "train", "tokenizers/world_cam/config.yaml", f"data.clips={tmp_path}/clips/*/*.tar",
            f"run.dir={tmp_path / 'cam'}",
            "train.steps=2", "train.batch_size=2", "optim.warmup_steps=1")
    done = run_cli("tokenizer", "encode", tmp_path / "cam", "--clips", f"{tmp_path}/clips/*/*.tar", "--out",
                   tmp_path / "tokens")
    assert "cam: 6 clips" in done.stdout
