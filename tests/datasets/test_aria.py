"""The Aria sets on miniatures of their layouts: turned sensors, fisheye lenses, device clocks, rays from the pupil
frame.

VRS files cannot be written here, so `projectaria_tools` is stood in for by a reader of .npz files with the same calls;
what is tested is everything around it.
"""

import csv
import dataclasses
import io
import json
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from egom2p import geometry
from egom2p.datasets import ase
from egom2p.datasets.aria import gaze_direction
from egom2p.datasets.checks import reprojection_error
from egom2p.datasets.lens import distort_fisheye624
from egom2p.geometry import quaternions
from egom2p.signals.writers import write_video
from tests.conftest import run_cli
from tests.datasets.conventions import RAW_FROM_UPRIGHT, aria_matrix, transform
from tests.datasets.miniature import Miniature, save_png
from tests.datasets.test_adapters import SIZE, check, clips_of, prepare

DEVICE_FROM_CAMERA = transform([0.33, 0.03, 0.03, 0.943] / np.linalg.norm([0.33, 0.03, 0.03, 0.943]),
                               [-0.0075, -0.011, -0.0036])
LENS = ase.LENS
WIDE = 320


def world_from_device(mini: Miniature, times: np.ndarray) -> np.ndarray:
    return mini.poses(times) @ geometry.invert(RAW_FROM_UPRIGHT) @ geometry.invert(DEVICE_FROM_CAMERA)


def write_trajectory(path: Path, times: np.ndarray, poses: np.ndarray, start_us: float) -> None:
    """MPS columns in an order of their own, with one more that nobody asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["graph_uid", "tracking_timestamp_us", *(f"q{a}_world_device" for a in "xyzw"),
             *(f"t{a}_world_device" for a in "xyz"), "geo_available"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for t, q, p in zip(times, quaternions(poses[:, :3, :3]), poses[:, :3, 3], strict=True):
            writer.writerow(["abc", round(start_us + t * 1e6), *q, *p, "False"])


class Lens:
    """What a turned Fisheye624 sensor records of the world; pixel centres at integers, as Aria's calibration has
    them."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.params = np.array([side * 0.4228, side * 0.508, side * 0.496, *LENS])
        matrix = aria_matrix(self.params)
        v, u = np.mgrid[0:side, 0:side]
        wanted = (np.stack([u + 0.5, v + 0.5, np.ones_like(u)], -1) @ np.linalg.inv(matrix).T)[..., :2]
        rays = wanted.copy()
        for _ in range(60):
            rays = rays - 0.7 * (distort_fisheye624(rays, LENS) - wanted)
        upright = np.stack([-rays[..., 1], rays[..., 0]], -1)
        back = np.abs(distort_fisheye624(rays, LENS) - wanted).max(-1)
        self.inside = (np.abs(upright) < 0.98).all(-1) & (back < 1e-3)
        self.pixel = np.clip((upright + 1) * WIDE / 2, 0, WIDE - 1).astype(int)
        self.slant = np.sqrt(1 + (upright**2).sum(-1))

    def see(self, wide: np.ndarray) -> np.ndarray:
        """(T, WIDE, WIDE, ...) pinhole frames of 90 degrees -> (T, side, side, ...) raw ones."""
        out = wide[:, self.pixel[..., 1], self.pixel[..., 0]]
        out[:, ~self.inside] = 0
        return out


def expected(mini: Miniature, clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rgb, depth) of the world through the clip's own pinhole, and where the miniature covers it."""
    inverse = np.linalg.inv(np.array(clip.meta["intrinsics"]))
    v, u = np.mgrid[0:SIZE, 0:SIZE]
    rays = (np.stack([u + 0.5, v + 0.5, np.ones_like(u)], -1) @ inverse.T)[..., :2]
    inside = (np.abs(rays) < 0.9).all(-1)
    pixel = np.clip((rays + 1) * WIDE / 2, 0, WIDE - 1).astype(int)
    times = clip.meta["start"] + np.arange(16) / 8
    nearest = np.abs(mini.times[:, None] - times).argmin(0)
    return (*(wide[nearest][:, pixel[..., 1], pixel[..., 0]] for wide in mini.frames), inside)


def check_pinhole(clips: list, mini: Miniature, signals: tuple[str, ...], metres: float = 0.006) -> None:
    assert clips
    for clip in clips:
        assert set(signals) <= clip.signals.keys(), clip.signals.keys()
        rgb, depth, inside = expected(mini, clip)
        assert inside.mean() > 0.5
        assert np.abs(rgb[:, inside].astype(int) - clip.signals["rgb"][:, inside]).mean() < 12
        motion = np.minimum(clip.meta["start"] + np.arange(60) / 30, mini.times[-1])
        truth, got = (geometry.relative_to_first(p.astype(np.float64))
                      for p in (mini.poses(motion), clip.signals["cam"]))
        assert np.linalg.norm(truth[:, :3, 3] - got[:, :3, 3], axis=1).max() < metres
        assert geometry.rotation_angle_deg(truth[:, :3, :3].transpose(0, 2, 1) @ got[:, :3, :3]).max() < 0.4
        if "depth" in signals:
            seen = clip.signals["depth"][:, inside].astype(np.float32)
            assert np.median(np.abs(seen - depth[:, inside]) / depth[:, inside].clip(0.1)) < 0.02
            assert reprojection_error(clip.signals["depth"], clip.signals["cam"],
                                      np.array(clip.meta["intrinsics"])) < 0.08
        if "gaze" in signals:
            points = mini.in_camera(motion)
            pixels = geometry.project(points, np.array(clip.meta["intrinsics"])) / SIZE
            both = (clip.signals["gaze"][:, 2] > 0) & geometry.gaze_is_valid(pixels)
            assert both.any()
            assert np.abs(pixels[both] - clip.signals["gaze"][both, :2]).max() < 0.03


def write_gaze_2d(path: Path, times: np.ndarray, pixels: np.ndarray, start_ns: int, kind: str) -> None:
    """The authors' columns: frame_num counts these rows. stamped: in device time, from 0.15 s before the video on."""
    late = 0.15 if kind == "stamped" else 0.0
    rows = ["frame_num,tracking_timestamp_us,x,y"]
    for i, (t, (x, y)) in enumerate(zip(times, pixels, strict=True)):
        stamp = round(start_ns / 1000 + t * 1e6) if kind == "stamped" else ""
        if not (kind == "stamped" and t < late):
            rows.append(f"{i},{stamp},{x},{y}")
    path.write_text("\n".join(rows))


@pytest.mark.parametrize("gaze", ["stamped", "numbered"])
def test_egoexo4d(tmp_path, gaze):
    """Upright mp4 with a device clock from timesync, a stamp missing, gaze at 10 Hz placed by its stamps or its row
    numbers, a take without its files, one in no split list, one without trajectory."""
    mini = Miniature(11, 96, 96, 30)
    root, start_ns = tmp_path / "raw", 7_000_000_000
    take = {"take_name": "cmu_bike14_4", "take_uid": "u1", "timesync_start_idx": 5,
            "capture": {"capture_name": "cmu_bike14", "cameras": [{"cam_id": "cam01", "is_ego": False},
                                                                  {"cam_id": "aria02", "is_ego": True}]}}
    folder = root / "takes/cmu_bike14_4"
    (folder / "frame_aligned_videos/downscaled/448").mkdir(parents=True)
    (root / "takes/empty_take").mkdir(parents=True)
    takes = [take, *({**take, "take_name": n, "take_uid": u} for n, u in (("empty_take", "u2"), ("unlisted", "u3"),
                                                                          ("still", "u4")))]
    (root / "takes.json").write_text(json.dumps(takes))
    for name in ("unlisted", "still"):
        (root / f"takes/{name}/frame_aligned_videos").mkdir(parents=True)
        write_video(root / f"takes/{name}/frame_aligned_videos/aria02_214-1.mp4", mini.frames[0][:75], 30)
    write_video(folder / "frame_aligned_videos/downscaled/448/aria02_214-1.mp4", mini.frames[0], 30)
    (root / "captures/cmu_bike14").mkdir(parents=True)
    stamps = ["" if i == 40 else str(start_ns + round((i - 6) / 30 * 1e9)) for i in range(5 + 2 + len(mini.times))]
    (root / "captures/cmu_bike14/timesync.csv").write_text("cam01_pts,aria02_214-1_capture_timestamp_ns\n"
                                                           + "\n".join(f"{i},{s}" for i, s in enumerate(stamps)))
    dense = np.arange(0, 6, 0.002)
    write_trajectory(folder / "trajectory/closed_loop_trajectory.csv", dense, world_from_device(mini, dense),
                     start_ns / 1000)
    w, xyz = (q := quaternions(DEVICE_FROM_CAMERA[None, :3, :3])[0])[3], q[:3]
    calibration = {"CameraCalibrations": [{"Label": "camera-slam-left"},
                                          {"Label": "camera-rgb",
                                           "T_Device_Camera": {"Translation": DEVICE_FROM_CAMERA[:3, 3].tolist(),
                                                               "UnitQuaternion": [w, xyz.tolist()]},
                                                                          "Projection": {"Params": [1.0] * 15}}]}
    (folder / "trajectory/online_calibration.jsonl").write_text(json.dumps(calibration) + "\n")
    slow = np.arange(0, 6, 0.1)
    (folder / "eye_gaze").mkdir()
    write_gaze_2d(folder / "eye_gaze/general_eye_gaze_2d.csv", slow, mini.gaze_pixels(slow) * 1408 / 96, start_ns, gaze)
    (root / "annotations").mkdir()
    listed = {"u1": "val", "u2": "val", "u4": "TEST"}
    (root / "annotations/splits.json").write_text(json.dumps({"take_uid_to_split": listed}))
    card = prepare("egoexo4d", root, tmp_path / "out")
    assert card["clips_by_split"] == {"val": 3, "test": 1}
    assert list(card["failed"]) == ["empty_take"]
    assert card["skipped"] == ["unlisted: in no split list"]
    assert any(n.startswith("cam left out") for n in card["notes"]["still"])
    clips = clips_of(tmp_path / "out", "cmu_bike14_4")
    check(clips, mini, signals=("rgb", "cam", "gaze"))
    assert "intrinsics" not in clips[0].meta


def test_ase(tmp_path, monkeypatch):
    """A turned fisheye at 10 fps with depth along its rays."""
    mini, lens = Miniature(12, WIDE, WIDE, 10), Lens(200)
    monkeypatch.setattr(ase, "DEVICE_FROM_CAMERA", DEVICE_FROM_CAMERA)
    monkeypatch.setattr(ase, "FOCAL", lens.params[0])
    monkeypatch.setattr(ase, "CENTRE", (lens.params[1], lens.params[2]))
    monkeypatch.setattr(ase, "SIDE", 200)
    rgb, depth = mini.frames
    for i, (frame, along) in enumerate(zip(lens.see(rgb), lens.see(depth) * lens.slant, strict=True)):
        save_png(tmp_path / f"raw/7/rgb/vignette{i:07d}.png", frame)
        save_png(tmp_path / f"raw/7/depth/depth{i:07d}.png", np.round(along * 1000).astype(np.uint16))
    write_trajectory(tmp_path / "raw/7/trajectory.csv", mini.times, world_from_device(mini, mini.times), 0)
    (tmp_path / "raw/8/rgb").mkdir(parents=True)
    card = prepare("ase", tmp_path / "raw", tmp_path / "out")
    assert list(card["failed"]) == ["8"]
    check_pinhole(clips_of(tmp_path / "out", "7"), mini, ("rgb", "cam", "depth"))


@pytest.mark.parametrize("headset", ["aria", "quest"])
def test_hot3d_clips(tmp_path, headset):
    """Tars of the Hub release: fisheye jpegs, world from camera with the scalar first, one pose missing."""
    mini, lens = Miniature(13, WIDE, WIDE, 30, seconds=5), Lens(160)
    stream = {"aria": "214-1", "quest": "1201-1"}[headset]
    params = lens.params.tolist() if headset == "aria" else [lens.params[0], *lens.params.tolist()]
    path = tmp_path / "raw/train/clip-000001.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for i, frame in enumerate(lens.see(mini.frames[0])):
            world_from_raw = mini.poses(mini.times[i : i + 1])[0] @ geometry.invert(RAW_FROM_UPRIGHT)
            x, y, z, w = quaternions(world_from_raw[None, :3, :3])[0]
            camera = {"T_world_from_camera": {"translation_xyz": world_from_raw[:3, 3].tolist(),
                                              "quaternion_wxyz": [w, x, y,
                                                                  z]}, "calibration": {"projection_params": params}}
            if i == 60:
                camera["T_world_from_camera"] = None
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "JPEG", quality=95)
            for name, data in ((f"{i:06d}.image_{stream}.jpg", buffer.getvalue()),
                               (f"{i:06d}.cameras.json", json.dumps({stream: camera}).encode()),
                               (f"{i:06d}.info.json", b'{"participant_id": "P0014"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    card = prepare(f"hot3d_{headset}", tmp_path / "raw", tmp_path / "out")
    assert card["clips_by_split"] == {"val": 2}
    check_pinhole(clips_of(tmp_path / "out", "train_clip-000001_tar"), mini, ("rgb", "cam"))


class _Matrix:
    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def to_matrix(self) -> np.ndarray:
        return self.matrix


class _Provider:
    """The calls of a VRS data provider on a .npz file."""

    OFFSET = 5_000_000  # between time code and device time, ns

    def __init__(self, path: str) -> None:
        self.data = np.load(path)

    def get_stream_id_from_label(self, label: str) -> str:
        assert label == "camera-rgb"
        return "214-1"

    def get_all_streams(self) -> list[str]:
        return [str(self.data["stream"])]

    def get_image_configuration(self, stream: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(description=str(self.data["description"]))

    def get_timestamps_ns(self, stream: str, domain: str) -> list[int]:
        """Of a stream that is not there: none, without an error, as the real one does."""
        assert domain == "device"
        return self.data["stamps"].tolist() if stream == str(self.data["stream"]) else []

    def get_image_data_by_index(self, stream: str, index: int) -> tuple:
        assert stream == str(self.data["stream"])
        frames = self.data["frames"]
        frame = frames[index] if index < len(frames) else None
        return types.SimpleNamespace(to_numpy_array=lambda: frame, is_valid=lambda: frame is not None), None

    def get_device_calibration(self) -> "_Provider":
        return self

    def get_camera_calib(self, label: str) -> "_Provider":
        return self

    def get_image_size(self) -> np.ndarray:
        return np.array(self.data["frames"].shape[2:0:-1])

    def projection_params(self) -> np.ndarray:
        return self.data["params"]

    def get_transform_device_camera(self) -> _Matrix:
        return _Matrix(DEVICE_FROM_CAMERA)

    def get_transform_device_cpf(self) -> _Matrix:
        return _Matrix(self.data["device_from_cpf"])

    def convert_from_timecode_to_device_time_ns(self, stamp: int) -> int:
        """-1 when the recording has no time code, as the real one answers."""
        return stamp - self.OFFSET if self.data["timecode"] else -1


@pytest.fixture
def vrs(monkeypatch):
    """projectaria_tools, stood in for."""
    core = types.ModuleType("projectaria_tools.core")
    core.data_provider = types.SimpleNamespace(create_vrs_data_provider=_Provider)
    core.sensor_data = types.SimpleNamespace(TimeDomain=types.SimpleNamespace(DEVICE_TIME="device"))
    package = types.ModuleType("projectaria_tools")
    package.core = core
    for name, module in (("projectaria_tools", package), ("projectaria_tools.core", core),
                         ("projectaria_tools.core.data_provider", core.data_provider)):
        monkeypatch.setitem(sys.modules, name, module)


CPF_AXES = np.diag([-1.0, -1.0, 1.0, 1.0])  # x left, y up, z forward against OpenCV's right, down, forward


def write_vrs(path: Path, mini: Miniature, lens: Lens, frames: np.ndarray, stamps: np.ndarray, stream: str = "214-1",
              description: str = "", timecode: bool = True) -> np.ndarray:
    """Returns device_from_cpf: the pupils half a decimetre beside the camera, looking the way the wearer does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    upright_from_cpf = CPF_AXES.copy()
    upright_from_cpf[:3, 3] = [0.05, 0.02, -0.01]
    device_from_cpf = DEVICE_FROM_CAMERA @ RAW_FROM_UPRIGHT @ upright_from_cpf
    with path.open("wb") as file:
        np.savez(file, frames=frames, stamps=stamps, params=lens.params, device_from_cpf=device_from_cpf, stream=stream,
                 description=description, timecode=timecode)
    return upright_from_cpf


def write_gaze(path: Path, mini: Miniature, upright_from_cpf: np.ndarray, start_us: float, per_eye: bool) -> None:
    """Yaw, pitch and depth of the ball from the pupils, ten a second; one row lost."""
    times = np.arange(0, mini.seconds, 0.1)
    points = np.c_[mini.in_camera(times), np.ones(len(times))] @ np.linalg.inv(upright_from_cpf).T
    x, y, z = points[:, :3].T
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        yaws = "left_yaw_rads_cpf,right_yaw_rads_cpf" if per_eye else "yaw_rads_cpf"
        file.write(f"tracking_timestamp_us,{yaws},pitch_rads_cpf,depth_m\n")
        for i, t in enumerate(times):
            angles = [np.arctan(x[i] / z[i])] * (2 if per_eye else 1)
            if i != 12:
                file.write(",".join(map(str, [round(start_us + t * 1e6), *angles, np.arctan(y[i] / z[i]),
                                              np.linalg.norm(points[i, :3])])) + "\n")


@pytest.mark.parametrize("poses_by", ["headset", "no time code", "test participant"])
def test_hot3d_recording(vrs, tmp_path, poses_by):
    """The trajectory in time code, or from MPS where there is no time code or no headset trajectory; gaze from both
    eyes."""
    mini, lens, start = Miniature(14, WIDE, WIDE, 30), Lens(160), 43_000_000_000
    folder = tmp_path / "raw/nested/P0014_abc"
    upright_from_cpf = write_vrs(folder / "recording.vrs", mini, lens, lens.see(mini.frames[0]),
                                 start + np.round(mini.times * 1e9).astype(np.int64), timecode=poses_by == "headset")
    poses = world_from_device(mini, mini.times)
    if poses_by != "test participant":
        with (folder / "headset_trajectory.csv").open("w") as file:
            file.write("object_uid,timestamp[ns],t_wo_x[m],t_wo_y[m],t_wo_z[m],q_wo_w,q_wo_x,q_wo_y,q_wo_z\n")
            for t, pose, (x, y, z, w) in zip(mini.times, poses, quaternions(poses[:, :3, :3]), strict=True):
                for later in (0, 93_000, 93_013):  # a row for the stamp of each camera, as in the authors' files
                    row = ["h", start + round(t * 1e9) + later + _Provider.OFFSET, *pose[:3, 3], w, x, y, z]
                    file.write(",".join(map(str, row)) + "\n")
    if poses_by != "headset":
        dense = np.arange(0, 6, 0.001)
        write_trajectory(folder / "mps/slam/closed_loop_trajectory.csv", dense, world_from_device(mini, dense),
                         start / 1000)
    (folder / "metadata.json").write_text(json.dumps({"headset": "Aria", "participant_id": "P0014"}))
    write_gaze(folder / "mps/eye_gaze/generalized_eye_gaze.csv", mini, upright_from_cpf, start / 1000, per_eye=True)
    card = prepare("hot3d_aria", tmp_path / "raw", tmp_path / "out")
    assert card["clips_by_split"] == {"val": 3}
    assert any("no usable time code" in n for n in card["notes"].get("nested/P0014_abc",
                                                                     [])) == (poses_by == "no time code")
    check_pinhole(clips_of(tmp_path / "out", "nested_P0014_abc"), mini, ("rgb", "cam", "gaze"))


@pytest.mark.parametrize("wearer", [False, True])
def test_adt(vrs, tmp_path, wearer):
    """The depth stream is found by its description; the file with the wearer's body is used when asked for, and
    said."""
    mini, lens, start = Miniature(15, WIDE, WIDE, 30), Lens(160), 1_000_000_000
    folder = tmp_path / "raw/Apartment_release_1/subtour"
    stamps = start + np.round(mini.times * 1e9).astype(np.int64)
    upright_from_cpf = write_vrs(folder / "video.vrs", mini, lens, lens.see(mini.frames[0]), stamps)
    millimetres = np.round(lens.see(mini.frames[1]) * 1000).astype(np.uint16)
    for name, factor in (("depth_images.vrs", 1), ("depth_images_with_skeleton.vrs", 2)):
        write_vrs(folder / name, mini, lens, millimetres * factor, stamps, stream="345-1", description="214-1")
    dense = np.arange(0, 6, 0.01)
    write_trajectory(folder / "aria_trajectory.csv", dense, world_from_device(mini, dense), start / 1000)
    write_gaze(folder / "eyegaze.csv", mini, upright_from_cpf, start / 1000, per_eye=False)
    card = prepare("adt", tmp_path / "raw", tmp_path / "out", *(["--depth-with-wearer"] if wearer else []))
    assert card["clips_by_split"] == {"test": 3}
    clips = clips_of(tmp_path / "out", "Apartment_release_1_subtour")
    assert clips[0].meta["depth_file"] == ("depth_images_with_skeleton.vrs" if wearer else "depth_images.vrs")
    if wearer:
        clips = [dataclasses.replace(c, signals={**c.signals, "depth": c.signals["depth"] / 2}) for c in clips]
    check_pinhole(clips, mini, ("rgb", "cam", "depth", "gaze"))


def test_adt_without_the_rgb_cameras_depth_keeps_the_rest(vrs, tmp_path):
    mini, lens, start = Miniature(15, WIDE, WIDE, 30, seconds=3), Lens(160), 1_000_000_000
    folder = tmp_path / "raw/seq"
    stamps = start + np.round(mini.times * 1e9).astype(np.int64)
    write_vrs(folder / "video.vrs", mini, lens, lens.see(mini.frames[0]), stamps)
    write_vrs(folder / "depth_images.vrs", mini, lens, np.zeros((2, 160, 160), np.uint16), stamps[:2], stream="345-2",
              description="1201-1")
    card = prepare("adt", tmp_path / "raw", tmp_path / "out")
    assert card["clips"] == 1
    assert any("no depth of the rgb camera" in n for n in card["notes"]["seq"])
    assert any(n.startswith("cam left out") for n in card["notes"]["seq"])


def test_without_projectaria_tools_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "projectaria_tools", None)
    (tmp_path / "raw/Seq").mkdir(parents=True)
    (tmp_path / "raw/Seq/aria_trajectory.csv").write_text("x\n1\n")
    (tmp_path / "raw/Seq/video.vrs").write_bytes(b"")
    done = run_cli("prepare", "adt", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1, check=False)
    assert done.returncode == 2
    assert "egom2p[aria]" in done.stderr
    assert "aarch64" in done.stderr


def test_both_eyes_make_one_ray():
    both = gaze_direction({"left_yaw_rads_cpf": np.array([0.1]), "right_yaw_rads_cpf": np.array([0.3]),
                           "pitch_rads_cpf": np.array([0.2]), "depth_m": np.array([np.nan])})
    assert np.linalg.norm(both) == pytest.approx(1)
    assert both[0, 0] / both[0, 2] == pytest.approx((np.tan(0.1) + np.tan(0.3)) / 2)


def test_lens_turn_and_constants_are_projectaria_tools_own():
    """Against the authors' package, where it is installed: projection, the turn to upright, ASE's calibration, the
    calls we make."""
    pytest.importorskip("projectaria_tools",
                        reason="projectaria-tools is not installed (pip install 'egom2p[aria]', x86-64 and macOS)")
    from projectaria_tools.core import calibration, data_provider, sensor_data
    from projectaria_tools.projects import ase as theirs

    from egom2p.datasets.aria import turn_intrinsics

    camera = theirs.get_ase_rgb_calibration()
    read = getattr(camera, "get_projection_params", None) or camera.projection_params
    params = np.array(read())
    assert np.allclose(params, [ase.FOCAL, *ase.CENTRE, *ase.LENS])
    assert np.allclose(camera.get_transform_device_camera().to_matrix(), ase.DEVICE_FROM_CAMERA, atol=1e-12)
    points = np.c_[np.random.default_rng(0).uniform(-0.8, 0.8, (200, 2)), np.ones(200)]
    expected = np.array([camera.project(p) for p in points])
    assert np.allclose(params[0] * distort_fisheye624(points[:, :2], params[3:]) + params[1:3], expected, atol=1e-9)
    turned = calibration.rotate_camera_calib_cw90deg(camera)
    assert np.allclose(turned.get_transform_device_camera().to_matrix(), ase.DEVICE_FROM_CAMERA @ RAW_FROM_UPRIGHT,
                       atol=1e-12)
    upright = np.array((getattr(turned, "get_projection_params", None) or turned.projection_params)())
    assert np.allclose(turn_intrinsics(aria_matrix(params), 704)[:2, 2] - 0.5, upright[1:3])
    provider = data_provider.VrsDataProvider
    for name in ("get_stream_id_from_label", "get_timestamps_ns", "get_device_calibration", "get_image_data_by_index",
                 "convert_from_timecode_to_device_time_ns"):
        assert hasattr(provider, name)
    assert hasattr(sensor_data.TimeDomain, "DEVICE_TIME")
    assert hasattr(sensor_data.ImageData, "to_numpy_array")
