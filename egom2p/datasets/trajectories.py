"""Camera trajectories beside a video: TUM and EuRoC files, COLMAP models in text and binary form.

TUM: `time tx ty tz qx qy qz qw` a line, camera to world. Seen written by evo, ORB-SLAM2 and 3, DPVO (frame numbers as
time) and MonST3R (frame numbers, and `qw qx qy qz` though it is called TUM); EuRoC's `data.csv` has a header and w
first, and its poses (as those of ORB-SLAM3 with an IMU) are the IMU's: taken as the camera's, with a note. A header
says what is where by names that differ in their last letter (`px py pz`, `q_w q_x q_y q_z`, `t_wo_x[m]`). Without one
the order of a quaternion cannot be told from its norm: `{"quaternion": "wxyz"}` in NAME.cam.json says it, or a first
row 1 0 0 0, which is the identity w first and a half turn about x w last, so a note says what it was taken for; else it
is x y z w.

COLMAP: `images.txt` / `images.bin` hold camera from world, Hamilton, w first; ids and order mean nothing, so images are
joined to frames by the number at the end of their names.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egom2p import geometry
from egom2p.datasets.clocks import VideoClock, seconds_of, time_column
from egom2p.datasets.recording import BadSequence, Track, find, poses_from
from egom2p.datasets.tables import Table, read_table, read_text

TRANSLATIONS = (("tx", "ty", "tz"), ("x", "y", "z"), ("p_rs_r_x [m]", "p_rs_r_y [m]", "p_rs_r_z [m]"),
                ("px", "py", "pz"))
QUATERNIONS = (("qx", "qy", "qz", "qw"), ("q_rs_x []", "q_rs_y []", "q_rs_z []", "q_rs_w []"))
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
PINHOLES = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1}
# Parameters of COLMAP's camera models by id (colmap/src/colmap/sensor/models.h), to step over the others in a binary
# file.
MODEL_PARAMS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12, 16, 4, 5, 3, 4, 6, 2)


def read_tum(path: Path, clock: VideoClock, said: dict[str, Any], notes: list[str]) -> Track:
    """A TUM or EuRoC trajectory; rows that are no pose are left out and counted."""
    table = read_table(path)
    stamps, translations, quaternions = _tum_columns(table, said, notes)
    times = seconds_of(stamps, clock, str(path), notes, said)
    poses = poses_from(quaternions, translations)
    good = np.isfinite(times) & np.isfinite(poses).all((1, 2))
    lost = len(good) - int(good.sum()) + table.lost
    if lost:
        notes.append(f"{path.name}: {lost} of {len(good) + table.lost} rows are no pose and were left out")
    order = np.argsort(times[good], kind="stable")
    times, poses = times[good][order], poses[good][order]
    fresh = np.diff(times, prepend=-np.inf) > 0
    if not fresh.any():
        raise BadSequence(f"{path} holds no pose")
    return Track(times[fresh], poses[fresh])


def _tum_columns(table: Table, said: dict[str, Any],
                 notes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) stamps, (N, 3) translations, (N, 4) quaternions x y z w."""
    if table.has_header:
        quaternion = _named(table, QUATERNIONS, "xyzw", list(table.columns))
        translation = _named(table, TRANSLATIONS, "xyz", [n for n in table.columns if n not in quaternion])
        if translation and quaternion:
            rest = [n for n in table.columns if n not in translation and n not in quaternion]
            if not rest:
                raise BadSequence(f"{table.path} has no column of times")
            stamp = table.columns[time_column(rest)]
            if translation[0].startswith("p_rs_r"):
                notes.append(f"{table.path.name}: EuRoC's poses are those of the IMU; they are taken as the camera's")
            return (stamp, *(np.stack([table.columns[n] for n in names], 1) for names in (translation, quaternion)))
    matrix = table.matrix()
    if matrix.shape[1] < 8:
        raise BadSequence(f"{table.path} has rows of {matrix.shape[1]} numbers; a TUM trajectory has 8: "
                          "time tx ty tz qx qy qz qw")
    quaternions = matrix[:, 4:8]
    norms = np.linalg.norm(quaternions, axis=1)
    if not np.nanmedian(np.abs(norms - 1)) < 0.05:
        raise BadSequence(f"{table.path}: columns 5 to 8 are no unit quaternions (median norm "
                          f"{np.nanmedian(norms):.3g}); "
                          "expected time tx ty tz qx qy qz qw")
    order = said.get("quaternion")
    if not order and np.allclose(quaternions[0], [1, 0, 0, 0], atol=1e-9):
        order = "wxyz"
        notes.append(f"{table.path.name}: its first quaternion is 1 0 0 0, so they are taken as w x y z; if not, say "
                     f"{{\"quaternion\": \"xyzw\"}} in {table.path.name.removesuffix('.tum')}.json")
    order = order or "xyzw"
    if order not in ("xyzw", "wxyz"):
        raise BadSequence(f"{table.path}: quaternion '{order}' must be xyzw or wxyz")
    return matrix[:, 0], matrix[:, 1:4], quaternions if order == "xyzw" else quaternions[:, [1, 2, 3, 0]]


def _named(table: Table, known: Iterable[tuple[str, ...]], letters: str, names: list[str]) -> Sequence[str]:
    """Columns by names that are known, else those in a row whose names, units aside, differ in their last letters
    alone, which are these; in the letters' order. () when there are none; BadSequence when several could be meant."""
    if usual := next((k for k in known if set(k) <= table.columns.keys()), None):
        return usual
    found = _letters(names, letters)
    if len(found) > 1:
        raise BadSequence(f"{table.path}: {', '.join(found[0])} and {', '.join(found[1])} could both be meant; call "
                          f"the position tx, ty, tz and the quaternion qx, qy, qz, qw")
    return found[0] if found else ()


def _letters(names: list[str], letters: str) -> list[list[str]]:
    plain = [re.sub(r"\s*\[[^\]]*\]$", "", name) for name in names]
    found = []
    for start in range(len(names) - len(letters) + 1):
        part = plain[start : start + len(letters)]
        if len({p[:-1] for p in part}) == 1 and sorted(p[-1:] for p in part) == sorted(letters):
            found.append([names[start + next(i for i, p in enumerate(part) if p.endswith(x))] for x in letters])
    return found


@dataclass(frozen=True)
class ColmapModel:
    """poses {image name: (4, 4) camera_from_world}; intrinsics (3, 3) and (width, height) of a single pinhole
    camera."""

    path: Path
    poses: dict[str, np.ndarray]
    intrinsics: np.ndarray | None
    size: tuple[int, int]


def read_colmap(folder: Path, times: np.ndarray, said: dict[str, Any],
                notes: list[str]) -> tuple[Track, np.ndarray | None, tuple[int, int]]:
    """Poses of a COLMAP model as a track on the video's frame times, NaN for frames without; the camera's pinhole
    matrix and frame size where it has one."""
    model = load_colmap(_model_folder(folder, notes))
    poses = np.full((len(times), 4, 4), np.nan)
    for name, frame in _frames_of(model, folder, len(times), said, notes).items():
        poses[frame] = geometry.invert(model.poses[name])
    if model.intrinsics is None:
        notes.append(f"{folder.name}: no intrinsics, since its camera is not one single (SIMPLE_)PINHOLE")
    return Track(times, poses), model.intrinsics, model.size


def load_colmap(folder: Path) -> ColmapModel:
    """A model from `images.bin` and `cameras.bin`, or from their text forms."""
    binary = (folder / "images.bin").exists()
    poses = _images_bin(folder / "images.bin") if binary else _images_txt(find(folder / "images.txt"))
    if not poses:
        raise BadSequence(f"{folder} holds no registered image")
    cameras = folder / ("cameras.bin" if binary else "cameras.txt")
    found = (_cameras_bin(cameras) if binary else _cameras_txt(cameras)) if cameras.exists() else []
    if len(found) != 1 or found[0][0] not in PINHOLES:
        return ColmapModel(folder, poses, None, (0, 0))
    model, size, params = found[0]
    fx, fy, cx, cy = params if model == "PINHOLE" else (params[0], *params)
    return ColmapModel(folder, poses, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), size)


def _model_folder(folder: Path, notes: list[str]) -> Path:
    """Where the model lies: the folder itself, or its `sparse/` with the largest of the numbered parts."""
    def holds(place: Path) -> bool:
        return (place / "images.bin").exists() or (place / "images.txt").exists()

    if holds(folder):
        return folder
    base = folder / "sparse" if (folder / "sparse").is_dir() else folder
    parts = [p for p in [base, *sorted(base.iterdir())] if p.is_dir() and holds(p)]
    if not parts:
        raise BadSequence(f"{folder} holds no COLMAP model (images.txt or images.bin, there or in sparse/0)")
    if len(parts) > 1:
        parts.sort(key=lambda p: -max(f.stat().st_size for f in p.glob("images.*")))
        notes.append(f"{folder.name} holds {len(parts)} separate models; the largest, {parts[0].name}, is used")
    return parts[0]


def _frames_of(model: ColmapModel, folder: Path, frames: int, said: dict[str, Any], notes: list[str]) -> dict[str, int]:
    """{image name: frame of the video}, or BadSequence where the names do not tell."""
    numbers = {name: _number_of(name) for name in model.poses}
    if None in numbers.values():
        if len(numbers) != frames:
            raise BadSequence(f"{model.path}: image names such as '{next(iter(numbers))}' hold no number, and there "
                              f"are {len(numbers)} for {frames} frames")
        notes.append(f"{model.path.name}: image names hold no number; they are taken in their order")
        return {name: i for i, name in enumerate(sorted(numbers))}
    if len(set(numbers.values())) < len(numbers):
        raise BadSequence(f"{model.path}: several images have the same number; they are of more than one video")
    low, high = min(numbers.values()), max(numbers.values())
    first = said["first_image"] if "first_image" in said else _first_number(low, high, folder, frames)
    if first is None:
        raise BadSequence(f"{model.path}: images {low} .. {high} of a video of {frames} frames (0 .. {frames - 1}): "
                          "names may count from 0 or from 1. Say which number the first frame has: "
                          "{\"first_image\": 1} in NAME.cam.json")
    if not low - first >= 0 or high - first >= frames:
        raise BadSequence(f"{model.path}: images {low} .. {high}, counted from {first}, are not frames of a video of "
                          f"{frames} frames")
    if high - first <= frames // 2 and "first_image" not in said:
        raise BadSequence(f"{model.path}: images {low} .. {high} for {frames} video frames: they were pulled at "
                          "another rate, or most did not register; nothing tells which frames they are")
    return {name: number - first for name, number in numbers.items()}


def _first_number(low: int, high: int, folder: Path, frames: int) -> int | None:
    """What the first frame's image is called: 0, 1, or unknown."""
    if low == 0:
        return 0
    if high == frames:
        return 1
    others = [n for p in folder.rglob("*") if p.suffix.lower() in PICTURES and (n := _number_of(p.name)) is not None]
    if others:
        return 0 if min(others) == 0 else 1 if max(others) == frames and min(others) == 1 else None
    return None


def _number_of(name: str) -> int | None:
    digits = re.search(r"(\d+)\D*$", Path(name).stem)
    return int(digits[1]) if digits else None


def _images_txt(path: Path) -> dict[str, np.ndarray]:
    """Image lines `ID QW QX QY QZ TX TY TZ CAMERA_ID NAME`, each followed by a line of points that may be empty, or be
    missing in a model written by hand; the header's count is checked."""
    lines = read_text(path).splitlines()
    poses, at = {}, 0
    while at < len(lines):
        words = lines[at].split()
        at += 1
        if not words or words[0].startswith("#"):
            continue
        if not _is_image(words):
            raise BadSequence(f"{path}: line {at} is no image line (ID QW QX QY QZ TX TY TZ CAMERA_ID NAME)")
        poses[" ".join(words[9:])] = _camera_from_world([float(w) for w in words[1:8]])
        if at < len(lines) and not lines[at].startswith("#") and not _is_image(lines[at].split()):
            at += 1
    stated = re.search(r"Number of images: *(\d+)", "\n".join(lines[:20]))
    if stated and int(stated[1]) != len(poses):
        raise BadSequence(f"{path} says {stated[1]} images and holds {len(poses)}")
    return poses


def _is_image(words: list[str]) -> bool:
    if len(words) < 10 or not (words[0].isdigit() and words[8].isdigit()):
        return False
    try:
        return abs(np.linalg.norm([float(w) for w in words[1:5]]) - 1) < 0.05 and Path(words[9]).suffix != ""
    except ValueError:
        return False


def _images_bin(path: Path) -> dict[str, np.ndarray]:
    data, at, poses = path.read_bytes(), 8, {}
    try:
        for _ in range(struct.unpack_from("<Q", data)[0]):
            values = struct.unpack_from("<I7dI", data, at)
            end = data.index(b"\0", at + 64)
            poses[data[at + 64 : end].decode()] = _camera_from_world(values[1:8])
            at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
            if at > len(data):
                raise ValueError("it ends early")
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise BadSequence(f"{path} is no whole images.bin ({error})") from error
    return poses


def _camera_from_world(values: Any) -> np.ndarray:
    w, x, y, z, *translation = values
    return poses_from(np.array([[x, y, z, w]]), np.array([translation]))[0]


def _cameras_txt(path: Path) -> list[tuple[str, tuple[int, int], list[float]]]:
    rows = [line.split() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
    try:
        return [(row[1], (int(row[2]), int(row[3])), [float(w) for w in row[4:]]) for row in rows]
    except (IndexError, ValueError):
        return []


def _cameras_bin(path: Path) -> list[tuple[str, tuple[int, int], list[float]]]:
    data, at, cameras = path.read_bytes(), 8, []
    names = {number: name for name, number in PINHOLES.items()}
    try:
        for _ in range(struct.unpack_from("<Q", data)[0]):
            _, model, width, height = struct.unpack_from("<IiQQ", data, at)
            count = MODEL_PARAMS[model]
            cameras.append((names.get(model, ""), (width, height),
                            list(struct.unpack_from(f"<{count}d", data, at + 24))))
            at += 24 + 8 * count
    except (struct.error, IndexError):
        return []
    return cameras
