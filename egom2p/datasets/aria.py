"""What the sets recorded with Project Aria glasses share.

By facebookresearch/projectaria_tools (docs and core): `T_a_b` maps points of b into a; the MPS trajectory is world from
device, metres, in a gravity-aligned world, stamped in device time (us); the camera's frame is OpenCV's with respect to
the raw image, which is mounted turned. Raw images are turned 90 degrees clockwise to be upright, and poses with them:
camera @ rotZ(-90). VRS files need projectaria-tools, whose wheels exist for x86-64 Linux and macOS only.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import BadSequence, Pictures, Track, find
from egom2p.datasets.video import rotations
from egom2p.errors import UserError

# raw camera from upright camera: x right, y down of the upright image are -y, x of the raw one.
RAW_FROM_UPRIGHT = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
RGB = "camera-rgb"
GAZE_DEPTH_M = 1.0


def turn(frame: np.ndarray) -> np.ndarray:
    """A raw image, upright."""
    return np.ascontiguousarray(np.rot90(frame, 3))


def turn_intrinsics(intrinsics: np.ndarray, height: int) -> np.ndarray:
    """Pinhole matrix of the upright image of a raw one `height` pixels high (pixel centres at half-integers)."""
    return np.array([[intrinsics[1, 1], 0, height - intrinsics[1, 2]], [0, intrinsics[0, 0], intrinsics[0, 2]],
                     [0, 0, 1.0]])


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of a csv with a header, as numbers; NaN where a field is none."""
    with find(path).open(newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        rows = [[_number(row[n]) for n in names] for row in reader]
    if not rows:
        raise BadSequence(f"{path} holds no row")
    return dict(zip(names, np.array(rows, np.float64).T, strict=True))


def read_trajectory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N,) device time in ns and (N, 4, 4) world_from_device of an MPS closed-loop (or ADT, ASE) trajectory; columns by
    name."""
    columns = read_csv(path)
    wanted = ["tracking_timestamp_us", *(f"t{a}_world_device" for a in "xyz"), *(f"q{a}_world_device" for a in "xyzw")]
    missing = [n for n in wanted if n not in columns]
    if missing:
        raise BadSequence(f"{path} lacks the column {missing[0]}")
    poses = np.tile(np.eye(4), (len(columns["tracking_timestamp_us"]), 1, 1))
    poses[:, :3, :3] = rotations(np.stack([columns[f"q{a}_world_device"] for a in "xyzw"], -1))
    poses[:, :3, 3] = np.stack([columns[f"t{a}_world_device"] for a in "xyz"], -1)
    order = np.argsort(columns["tracking_timestamp_us"], kind="stable")
    return columns["tracking_timestamp_us"][order] * 1000.0, poses[order]


def read_online_calibration(path: Path, label: str = RGB) -> tuple[np.ndarray, np.ndarray]:
    """(4, 4) device_from_camera and (15,) f, cu, cv, k0..k5, p0, p1, s0..s3 of the first calibration that has the
    camera."""
    with find(path).open() as file:
        for line in file:
            for camera in json.loads(line).get("CameraCalibrations", []):
                if camera.get("Label") == label:
                    w, xyz = camera["T_Device_Camera"]["UnitQuaternion"]
                    device_from_camera = transform([*xyz, w], camera["T_Device_Camera"]["Translation"])
                    return device_from_camera, np.array(camera["Projection"]["Params"], np.float64)
    raise BadSequence(f"{path} has no calibration of {label}")


def transform(xyzw: Any, translation: Any) -> np.ndarray:
    """(4, 4) from a quaternion x y z w and a translation."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotations(np.array([xyzw], np.float64))[0], translation
    return out


def gaze_direction(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(N, 3) gaze points in the central pupil frame at their own depth (1 m where it is not given), metres; x left, y
    up, z forward.

    Old files have one yaw, newer ones one an eye, whose rays meet (interpupillary distance 63 mm). MPS: x = tan(yaw), y
    = tan(pitch).
    """
    pitch = np.tan(columns["pitch_rads_cpf"])
    if "yaw_rads_cpf" in columns:
        x = np.tan(columns["yaw_rads_cpf"])
    else:
        x = (np.tan(columns["left_yaw_rads_cpf"]) + np.tan(columns["right_yaw_rads_cpf"])) / 2
    rays = np.stack([x, pitch, np.ones_like(x)], -1)
    depth = columns.get("depth_m", np.zeros(len(x)))
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, GAZE_DEPTH_M)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True) * depth[:, None]


def poses_at(trajectory: tuple[np.ndarray, np.ndarray], stamps_ns: np.ndarray, times: np.ndarray,
             device_from_camera: np.ndarray, gap_ns: float = 50e6) -> Track:
    """world_from_camera (upright) at each stamp: the nearest pose of a dense trajectory, NaN where none is near."""
    known, poses = trajectory
    index = np.clip(np.searchsorted(known, stamps_ns), 1,
                    len(known) - 1) if len(known) > 1 else np.zeros(len(stamps_ns), int)
    index = np.where(np.abs(known[index - 1] - stamps_ns) < np.abs(known[index] - stamps_ns), index - 1, index)
    out = poses[index] @ device_from_camera @ RAW_FROM_UPRIGHT
    out[~(np.abs(known[index] - stamps_ns) <= gap_ns)] = np.nan
    return Track(times, out)


class VrsPictures(Pictures):
    """A stream of a VRS file, upright and undistorted to a pinhole. depth: integers in mm along the optical axis."""

    def __init__(self, provider: Any, stream: Any, stamps: np.ndarray, first: int, undistort: Any,
                 depth: bool = False) -> None:
        self.provider, self.stream, self.undistort, self.depth = provider, stream, undistort, depth
        self.times = (np.asarray(stamps, np.int64) - first) / 1e9

    def read(self, index: int) -> np.ndarray:
        array = self.provider.get_image_data_by_index(self.stream, int(index))[0].to_numpy_array()
        if self.depth:
            return turn(self.undistort.depth_along_axis(array.astype(np.float32) / 1000))
        return turn(self.undistort(array if array.ndim == 3 else np.repeat(array[..., None], 3, -1)))


def open_vrs(path: Path) -> tuple[Any, Any]:
    """(projectaria_tools.core, data provider) of a VRS file."""
    try:
        from projectaria_tools import core
        from projectaria_tools.core import data_provider
    except ImportError as error:
        raise UserError("reading Aria VRS files needs projectaria-tools: pip install 'egom2p[aria]' on x86-64 Linux or "
                        "macOS (it has no aarch64 Linux wheel; "
                        "prepare the clips on another machine and copy them)") from error
    provider = data_provider.create_vrs_data_provider(str(find(path)))
    if provider is None:
        raise BadSequence(f"{path} cannot be opened as VRS")
    return core, provider


def pinhole(params: np.ndarray) -> np.ndarray:
    """Aria's f, cu, cv (pixel centres at integers) as a matrix with pixel centres at half-integers."""
    return np.array([[params[0], 0, params[1] + 0.5], [0, params[0], params[2] + 0.5], [0, 0, 1.0]])


class AriaRecording:
    """The rgb stream of a VRS file with its calibration, all clocks from its first frame. raw: pinhole matrix of the
    unturned frames."""

    def __init__(self, path: Path) -> None:
        core, self.provider = open_vrs(path)
        self.domain = core.sensor_data.TimeDomain.DEVICE_TIME
        self.stream = self.provider.get_stream_id_from_label(RGB)
        self.stamps = np.array(self.provider.get_timestamps_ns(self.stream, self.domain), np.int64)
        self.calibration = self.provider.get_device_calibration()
        camera = self.calibration.get_camera_calib(RGB)
        width, self.height = (int(n) for n in camera.get_image_size())
        read = getattr(camera, "get_projection_params", None) or camera.projection_params  # the older name is going
        params = np.array(read(), np.float64)
        self.raw = pinhole(params)
        self.undistort = Undistortion(self.raw, width, self.height, lambda rays: distort_fisheye624(rays, params[3:]))
        self.device_from_camera = np.asarray(camera.get_transform_device_camera().to_matrix(), np.float64)

    @property
    def intrinsics(self) -> np.ndarray:
        return turn_intrinsics(self.raw, self.height)

    def rgb(self) -> VrsPictures:
        return VrsPictures(self.provider, self.stream, self.stamps, self.stamps[0], self.undistort)

    def depth(self, path: Path) -> VrsPictures:
        """The depth stream of another VRS file of the same recording."""
        _, provider = open_vrs(path)
        stream = provider.get_stream_id_from_label(RGB)
        return VrsPictures(provider, stream, provider.get_timestamps_ns(stream, self.domain), self.stamps[0],
                           self.undistort, depth=True)

    def seconds(self, device_ns: np.ndarray) -> np.ndarray:
        return (device_ns - self.stamps[0]) / 1e9

    def camera_track(self, device_ns: np.ndarray, world_from_device: np.ndarray) -> Track:
        order = np.argsort(device_ns, kind="stable")
        return Track(self.seconds(device_ns[order]), (world_from_device @ self.device_from_camera
                                                      @ RAW_FROM_UPRIGHT)[order])

    def gaze(self, path: Path) -> Track:
        """MPS gaze as pixels of the upright, undistorted frames, NaN behind the camera."""
        columns = read_csv(path)
        device_from_cpf = np.asarray(self.calibration.get_transform_device_cpf().to_matrix(), np.float64)
        upright_from_cpf = RAW_FROM_UPRIGHT.T @ np.linalg.inv(self.device_from_camera) @ device_from_cpf
        points = np.c_[gaze_direction(columns), np.ones(len(columns["tracking_timestamp_us"]))] @ upright_from_cpf.T
        with np.errstate(invalid="ignore", divide="ignore"):
            pixels = (points[:, :3] @ self.intrinsics.T)[:, :2] / points[:, 2:3]
        pixels[~(points[:, 2] > 0.05)] = np.nan
        return Track(self.seconds(columns["tracking_timestamp_us"] * 1000), pixels)


def _number(text: str | None) -> float:
    if text in ("True", "False"):
        return float(text == "True")
    try:
        return float(text) if text else float("nan")
    except ValueError:
        return float("nan")
