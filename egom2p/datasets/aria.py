"""What the sets recorded with Project Aria glasses share.

By facebookresearch/projectaria_tools (docs and core): `T_a_b` maps points of b into a; the MPS trajectory is world from
device, metres, in a gravity-aligned world, stamped in device time (us); the camera's frame is OpenCV's with respect to
the raw image, which is mounted turned. Raw images are turned 90 degrees clockwise to be upright, and poses with them:
camera @ rotZ(-90). VRS files need projectaria-tools, whose wheels exist for x86-64 Linux and macOS only.
"""

import ast
import contextlib
import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import BadSequence, Pictures, Track, find, poses_from, rotations
from egom2p.datasets.tables import Table, read_table
from egom2p.errors import UserError

# raw camera from upright camera: x right, y down of the upright image are -y, x of the raw one.
RAW_FROM_UPRIGHT = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
RGB = "camera-rgb"
RGB_STREAM = "214-1"
GAZE_DEPTH_M = 1.0
EYES_APART_M = 0.063
DENSE_STEP_NS = 5e6  # denser trajectories (MPS writes 1 kHz) are thinned to this
MAX_CALIBRATION = 1 << 20


def turn(frame: np.ndarray) -> np.ndarray:
    """A raw image, upright."""
    return np.ascontiguousarray(np.rot90(frame, 3))


def turn_intrinsics(intrinsics: np.ndarray, height: int) -> np.ndarray:
    """Pinhole matrix of the upright image of a raw one `height` pixels high (pixel centres at half-integers)."""
    return np.array([[intrinsics[1, 1], 0, height - intrinsics[1, 2]], [0, intrinsics[0, 0], intrinsics[0, 2]],
                     [0, 0, 1.0]])


@dataclass(frozen=True)
class Trajectory:
    """device_ns (N,) device time, ascending; quaternions (N, 4) x y z w and translations (N, 3) of world_from_device in
    metres; left_out: rows that are no pose or of another world (an MPS `graph_uid`)."""

    device_ns: np.ndarray
    quaternions: np.ndarray
    translations: np.ndarray
    left_out: int = 0

    def poses(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n, 4, 4) world_from_device of some rows."""
        return poses_from(self.quaternions[rows], self.translations[rows])

    def thinned(self) -> "Trajectory":
        """The first row of every DENSE_STEP_NS. HOT3D's have two or three rows a frame, microseconds apart."""
        rows = np.unique((self.device_ns - self.device_ns[:1]) // DENSE_STEP_NS, return_index=True)[1]
        return Trajectory(self.device_ns[rows], self.quaternions[rows], self.translations[rows], self.left_out)


def read_trajectory(path: Path, positional: bool = False) -> Trajectory:
    """An MPS closed-loop (or ADT, ASE) trajectory, columns by name; positional: by place (time second, translation from
    the fourth, quaternion x y z w from the seventh, as ASE's reader takes them) when the names are others.

    Half a million rows take about two seconds and 50 MB. Rows that are cut off, hold no numbers or no rotation, or
    belong to another `graph_uid` (another world) than most are left out and counted.
    """
    names = ["tracking_timestamp_us", *(f"t{a}_world_device" for a in "xyz"), *(f"q{a}_world_device" for a in "xyzw")]
    table, graphs, cut = _read_columns(find(path), names, [1, 3, 4, 5, 6, 7, 8, 9] if positional else None)
    good = np.isfinite(table).all(1) & (np.abs(np.linalg.norm(table[:, 4:], axis=1) - 1) < 0.1)
    if graphs is not None and good.any():
        good &= graphs == np.bincount(graphs[good]).argmax()
    if not good.any():
        raise BadSequence(f"{path} holds no pose")
    kept = table[good]
    kept = kept[np.argsort(kept[:, 0], kind="stable")]
    return Trajectory(kept[:, 0] * 1000.0, kept[:, 4:], kept[:, 1:4], cut + int((~good).sum()))


def _read_columns(path: Path, names: list[str], places: list[int] | None) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(N, C) of the named columns, (N,) numbers that tell apart the values of `graph_uid` when there is one, and how
    many rows do not have the header's number of fields."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = [name.strip() for name in file.readline().split(",")]
        missing = [name for name in names if name not in header]
        if missing and (places is None or len(header) <= max(places)):
            raise BadSequence(f"{path} lacks the column {missing[0]}")
        columns = places if missing else [header.index(name) for name in names]
        commas, cut, uids, codes = len(header) - 1, Counter(), {}, []
        graph = header.index("graph_uid") if "graph_uid" in header else None

        def whole() -> Iterator[str]:
            for line in file:
                if line.count(",") == commas:
                    if graph is not None:
                        codes.append(uids.setdefault(line.split(",", graph + 1)[graph], len(uids)))
                    yield line
                elif line.strip():
                    cut["rows"] += 1

        start = file.tell()
        try:
            table = np.loadtxt(whole(), delimiter=",", usecols=columns, comments=None, ndmin=2)
        except ValueError:  # a field is empty or no number: slower, and such rows become NaN
            file.seek(start)
            cut.clear()
            codes.clear()
            rows = [[_number(row[c]) for c in columns] for row in csv.reader(whole())]
            table = np.array(rows, np.float64).reshape(-1, len(columns))
    return table, np.array(codes) if graph is not None else None, cut["rows"]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read_online_calibration(path: Path, label: str = RGB) -> tuple[np.ndarray, np.ndarray]:
    """(4, 4) device_from_camera and (15,) f, cu, cv, k0..k5, p0, p1, s0..s3 of the first calibration that has the
    camera.

    Files from before June 2023 hold numbers and lists as quoted text.
    """
    with find(path).open(encoding="utf-8-sig") as file:
        for line in file:
            try:
                for camera in _plain(json.loads(line[:MAX_CALIBRATION])).get("CameraCalibrations", []):
                    if camera.get("Label") == label:
                        w, xyz = camera["T_Device_Camera"]["UnitQuaternion"]
                        device_from_camera = transform([*xyz, w], camera["T_Device_Camera"]["Translation"])
                        return device_from_camera, np.array(camera["Projection"]["Params"], np.float64)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    raise BadSequence(f"{path} has no calibration of {label}")


def _plain(value: Any) -> Any:
    """A calibration whose numbers, lists and objects may be quoted text, in Python's spelling."""
    if isinstance(value, str) and value[:1] in ("[", "{", "("):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            value = ast.literal_eval(value)
    if isinstance(value, dict):
        return {k: v if k == "Label" else _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def transform(xyzw: Any, translation: Any) -> np.ndarray:
    """(4, 4) from a quaternion x y z w and a translation."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotations(np.array([xyzw], np.float64))[0], translation
    return out


def gaze_direction(table: Table | dict[str, np.ndarray]) -> np.ndarray:
    """(N, 3) gaze points in the central pupil frame at their own depth, metres; x left, y up, z forward.

    Old files have one yaw; since March 2024 one an eye, whose rays meet; the newest have pitches an eye too and no
    depth. x = tan(yaw), y = tan(pitch) of unit z. Where no depth is given it is where the two eyes' rays meet, else 1
    m.
    """
    columns = table.columns if isinstance(table, Table) else table
    depth = columns.get("depth_m")
    if "left_yaw_rads_cpf" in columns:
        left, right = np.tan(columns["left_yaw_rads_cpf"]), np.tan(columns["right_yaw_rads_cpf"])
        x = (left + right) / 2
        meeting = _eyes_apart(columns) / np.where(right - left > 1e-4, right - left, np.nan)
    else:
        x, meeting = np.tan(columns["yaw_rads_cpf"]), None
    pitches = [columns[n] for n in ("left_pitch_rads_cpf", "right_pitch_rads_cpf") if n in columns]
    y = np.tan(columns["pitch_rads_cpf"] if "pitch_rads_cpf" in columns else np.mean(pitches, 0))
    rays = np.stack([x, y, np.ones_like(x)], -1)
    units = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    if depth is None and meeting is not None:
        depth = meeting / units[:, 2]
    depth = np.zeros(len(x)) if depth is None else depth
    return units * np.where(np.isfinite(depth) & (depth > 0), depth, GAZE_DEPTH_M)[:, None]


def _eyes_apart(columns: dict[str, np.ndarray]) -> np.ndarray | float:
    """Metres between the pupils, where the file states them."""
    if {"tx_left_eye_cpf", "tx_right_eye_cpf"} <= columns.keys():
        return np.abs(columns["tx_left_eye_cpf"] - columns["tx_right_eye_cpf"])
    return EYES_APART_M


def poses_at(trajectory: Trajectory, stamps_ns: np.ndarray, times: np.ndarray, device_from_camera: np.ndarray,
             gap_ns: float = 50e6) -> Track:
    """world_from_camera (upright) at each stamp: the nearest pose of a dense trajectory, NaN where none is near."""
    known = trajectory.device_ns
    right = np.clip(np.searchsorted(known, stamps_ns), 1, max(1, len(known) - 1))
    left, right = right - 1, np.minimum(right, len(known) - 1)
    index = np.where(np.abs(known[left] - stamps_ns) < np.abs(known[right] - stamps_ns), left, right)
    out = trajectory.poses(index) @ device_from_camera @ RAW_FROM_UPRIGHT
    out[~(np.abs(known[index] - stamps_ns) <= gap_ns)] = np.nan
    return Track(times, out)


class VrsPictures(Pictures):
    """A stream of a VRS file, upright and undistorted to a pinhole. depth: integers in mm along the optical axis."""

    def __init__(self, provider: Any, stream: Any, stamps: np.ndarray, first: int, undistort: Any,
                 depth: bool = False) -> None:
        self.provider, self.stream, self.undistort, self.depth = provider, stream, undistort, depth
        self.times = (np.asarray(stamps, np.int64) - first) / 1e9

    def read(self, index: int) -> np.ndarray:
        image = self.provider.get_image_data_by_index(self.stream, int(index))[0]
        if not image.is_valid():
            raise BadSequence(f"picture {index} of stream {self.stream} cannot be read")
        array = image.to_numpy_array()
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
        if not len(self.stamps):
            raise BadSequence(f"{path} holds no rgb frame")
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
        """The rgb camera's depth in another VRS file of the same recording.

        Its streams have no labels; the one for a camera is that whose configuration is described by the camera's stream
        id, as the authors choose it. (Asked for a label, the provider names a stream that the file does not have.)
        """
        _, provider = open_vrs(path)
        streams = list(provider.get_all_streams())
        named = [s for s in streams if provider.get_image_configuration(s).description == RGB_STREAM]
        found = named or [s for s in streams if str(s) == RGB_STREAM]
        if not found:
            raise BadSequence(f"{path} has no depth of the rgb camera ({RGB_STREAM}); its streams are "
                              f"{', '.join(map(str, streams)) or 'none'}")
        stamps = provider.get_timestamps_ns(found[0], self.domain)
        return VrsPictures(provider, found[0], stamps, self.stamps[0], self.undistort, depth=True)

    def seconds(self, device_ns: np.ndarray) -> np.ndarray:
        return (device_ns - self.stamps[0]) / 1e9

    def from_timecode(self, stamps_ns: np.ndarray) -> np.ndarray:
        """(N,) time code -> device time, ns. BadSequence when the recording has no usable time code: its conversion
        then gives -1, or stamps that lie nowhere near the recording."""
        device = np.array([self.provider.convert_from_timecode_to_device_time_ns(int(t)) for t in stamps_ns], np.int64)
        if not (device > 0).all() or device.max() < self.stamps[0] - 1e9 or device.min() > self.stamps[-1] + 1e9:
            raise BadSequence("the recording has no usable time code, so its time-coded poses cannot be placed")
        return device

    def camera_track(self, trajectory: Trajectory) -> Track:
        dense = trajectory.thinned()
        return Track(self.seconds(dense.device_ns), dense.poses() @ self.device_from_camera @ RAW_FROM_UPRIGHT)

    def gaze(self, path: Path) -> Track:
        """MPS gaze as pixels of the upright, undistorted frames, NaN behind the camera. The extrinsics are the
        recording's own (factory) ones, as the released projectaria-tools project gaze; its development version takes
        the CAD ones."""
        table = read_table(path)
        device_from_cpf = np.asarray(self.calibration.get_transform_device_cpf().to_matrix(), np.float64)
        upright_from_cpf = RAW_FROM_UPRIGHT.T @ np.linalg.inv(self.device_from_camera) @ device_from_cpf
        stamps = table.column("tracking_timestamp_us")
        points = np.c_[gaze_direction(table), np.ones(len(stamps))] @ upright_from_cpf.T
        with np.errstate(invalid="ignore", divide="ignore"):
            pixels = (points[:, :3] @ self.intrinsics.T)[:, :2] / points[:, 2:3]
        pixels[~(points[:, 2] > 0.05)] = np.nan
        order = np.argsort(stamps, kind="stable")
        return Track(self.seconds(stamps[order] * 1000), pixels[order])


def gaze_file(folder: Path) -> Path | None:
    """The best MPS gaze export in a folder, under any of the names it has had."""
    names = ("personalized_eye_gaze", "calibrated_eye_gaze", "general_eye_gaze", "generalized_eye_gaze")
    return next((p for n in names if (p := folder / f"{n}.csv").exists()), None)
