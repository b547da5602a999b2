"""Trajectories, gaze, depth and intrinsics as people's tools write them beside a video. Each file is written here from
what its tool's source or documentation says, and must come back as the values that went in."""

import gzip
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from egom2p import geometry
from egom2p.data.clips import read_clips
from egom2p.datasets.checks import Statistics
from egom2p.datasets.clocks import TIME, VideoClock
from egom2p.datasets.cutting import _depth_at, cut
from egom2p.datasets.gaze_files import read_gaze
from egom2p.datasets.recording import (
    ArrayPictures,
    BadSequence,
    ImagePictures,
    Pictures,
    Recording,
    Track,
    fit_intrinsics,
)
from egom2p.datasets.tables import read_matrix, read_table
from egom2p.datasets.trajectories import read_colmap, read_tum
from egom2p.datasets.video import VideoFolder, _Beside, numbered_depth
from egom2p.geometry import quaternions
from egom2p.signals.writers import write_video
from tests.conftest import run_cli
from tests.datasets.miniature import save_png
from tests.test_geometry import random_poses

FRAMES = 75
CLOCK = VideoClock(np.arange(FRAMES) * 2.5 / FRAMES)
TIMES = np.arange(FRAMES) / 30
HEADER = "timestamp tx ty tz qx qy qz qw"


@pytest.fixture
def poses(rng) -> np.ndarray:
    return random_poses(rng, FRAMES)


def tum_rows(poses: np.ndarray, stamps=TIMES, order: str = "xyzw", fmt: str = "%.9f") -> list[list[str]]:
    xyzw = quaternions(poses[:, :3, :3])
    rotation = xyzw if order == "xyzw" else xyzw[:, [3, 0, 1, 2]]
    return [[repr(float(t)) if not isinstance(t, (int, np.integer)) else str(t), *(fmt % v for v in (*p, *q))]
            for t, p, q in zip(stamps, poses[:, :3, 3], rotation, strict=True)]


def written(path: Path, lines: list[str], newline: str = "\n", bom: bytes = b"", encoding: str = "utf-8") -> Path:
    path.write_bytes(bom + newline.join([*lines, ""]).encode(encoding))
    return path


FORMS = {
    "plain": ([], " ", "\n", b""), "comment": (["# " + HEADER], " ", "\n", b""),
    "windows": (["# " + HEADER], " ", "\r\n", b""),
    "header": ([HEADER], " ", "\n", b""), "byte order mark": ([HEADER], " ", "\n", b"\xef\xbb\xbf"),
    "commas": (["#" + HEADER.replace(" ", ",")], ",", "\n", b""),
    "tabs": ([HEADER.replace(" ", "\t")], "\t", "\r\n", b""),
    "semicolons": ([HEADER.replace(" ", ";")], ";", "\n", b""), "scientific": ([], " ", "\n", b""),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_trajectory_in_any_dress(tmp_path, poses, form):
    head, delimiter, newline, bom = FORMS[form]
    rows = tum_rows(poses, fmt="%.18e" if form == "scientific" else "%.9f")
    path = written(tmp_path / "a.cam.tum", [*head, *(delimiter.join(r) for r in rows)], newline, bom)
    notes: list[str] = []
    track = read_tum(path, CLOCK, {}, notes)
    assert not notes
    assert np.allclose(track.times, TIMES)
    assert np.abs(track.values - poses).max() < 1e-6


@pytest.mark.parametrize(("stamps", "said", "noted"), [
    (np.round(TIMES * 1e9).astype(np.int64), {}, False), (TIMES * 1e3, {}, False), (TIMES * 1e6, {}, False),
    (np.arange(FRAMES), {}, False), (1_700_000_000 + TIMES, {}, True),
    ((1_700_000_000_000_000_000 + np.round(TIMES * 1e9)).astype(np.int64), {}, True),
    (1_700_000_000 + TIMES - 0.5, {"start": 1_700_000_000}, False),
    (TIMES * 1e9 + 5e9, {"unit": "ns", "start": 5e9}, False)])
def test_clocks(tmp_path, poses, stamps, said, noted):
    """Seconds, milli-, micro- and nanoseconds, frame numbers, Unix time; the video's start told, or equal lengths."""
    path = written(tmp_path / "a.cam.tum", [" ".join(r) for r in tum_rows(poses, stamps)])
    notes: list[str] = []
    track = read_tum(path, CLOCK, said, notes)
    offset = -0.5 if said == {"start": 1_700_000_000} else 0
    assert np.abs(track.times - (TIMES + offset)).max() < 1e-5
    assert bool(notes) == noted


@pytest.mark.parametrize("first", [0, 1])
def test_frame_numbers_go_by_the_times_of_the_frames(tmp_path, poses, first):
    """As a phone records that slows down in the dark: 40 frames at 30 a second, 35 at 15. From 1 only a file can count
    that names the frame behind the last."""
    times = np.concatenate([np.arange(40) / 30, 40 / 30 + np.arange(35) / 15])
    notes: list[str] = []
    rows = tum_rows(poses, np.arange(FRAMES) + first)
    for said in ({}, {"unit": "frames", "start": first}):
        track = read_tum(written(tmp_path / "a.cam.tum", [" ".join(r) for r in rows]), VideoClock(times + 5), said,
                         notes)
        assert np.abs(track.times - times).max() < 1e-9
    assert notes == ([f"{tmp_path / 'a.cam.tum'}: its frames are counted from 1"] if first else [])


@pytest.mark.parametrize("stamps", [1_700_000_000 + np.arange(40) / 30, 100 + TIMES * 40, TIMES * 0 + 3])
def test_a_clock_that_fits_nowhere_is_refused_with_both_ranges(tmp_path, poses, stamps):
    path = written(tmp_path / "a.cam.tum", [" ".join(r) for r in tum_rows(poses[: len(stamps)], stamps)])
    with pytest.raises(BadSequence, match=r"2\.50|stand still"):
        read_tum(path, CLOCK, {}, [])


def test_quaternion_order(tmp_path, poses):
    first = geometry.relative_to_first(poses)  # starts with the identity, which shows the order
    for order, said, values in (("wxyz", {}, first), ("wxyz", {"quaternion": "wxyz"}, poses), ("xyzw", {}, first)):
        path = written(tmp_path / "a.cam.tum", [" ".join(r) for r in tum_rows(values, order=order)])
        assert np.abs(read_tum(path, CLOCK, said, []).values - values).max() < 1e-6
    head = "#timestamp [ns],p_RS_R_x [m],p_RS_R_y [m],p_RS_R_z [m],q_RS_w [],q_RS_x [],q_RS_y [],q_RS_z []"
    rows = tum_rows(poses, np.round(TIMES * 1e9).astype(np.int64), order="wxyz")  # EuRoC's data.csv
    path = written(tmp_path / "euroc.cam.tum", [head, *(",".join(r) for r in rows)])
    assert np.abs(read_tum(path, CLOCK, {}, []).values - poses).max() < 1e-6


@pytest.mark.parametrize("head", ["timestamp x y z q_w q_x q_y q_z", "t px py pz rot_w rot_x rot_y rot_z",
                                  "timestamp[ns] t_wo_x[m] t_wo_y[m] t_wo_z[m] q_wo_w q_wo_x q_wo_y q_wo_z"])
def test_a_header_says_which_number_is_w(tmp_path, poses, head):
    path = written(tmp_path / "a.cam.tum", [head, *(" ".join(r) for r in tum_rows(poses, order="wxyz"))])
    notes: list[str] = []
    assert np.abs(read_tum(path, CLOCK, {}, notes).values - poses).max() < 1e-6 and not notes


def test_rows_numbers_in_front_are_no_times(tmp_path, poses):
    """As pandas writes them; 25 poses at 10 Hz would end after .8 s."""
    rows = [[str(i), *row] for i, row in enumerate(tum_rows(poses[:25], np.arange(25) / 10))]
    for head in (",timestamp,tx,ty,tz,qx,qy,qz,qw", "frame,timestamp,tx,ty,tz,qx,qy,qz,qw"):
        path = written(tmp_path / "a.cam.tum", [head, *(",".join(r) for r in rows)])
        track = read_tum(path, CLOCK, {}, [])
        assert np.allclose(track.times, np.arange(25) / 10) and np.abs(track.values - poses[:25]).max() < 1e-6


def test_speeds_beside_the_position_are_not_taken_for_it(tmp_path, poses):
    rows = [[r[0], "0", "9.81", "0", *r[1:]] for r in tum_rows(poses)]
    head = "timestamp,ax,ay,az,{0}x,{0}y,{0}z,q_x,q_y,q_z,q_w"
    path = written(tmp_path / "a.cam.tum", [head.format("t"), *(",".join(r) for r in rows)])
    assert np.abs(read_tum(path, CLOCK, {}, []).values - poses).max() < 1e-6
    with pytest.raises(BadSequence, match="could both be meant; call the position tx"):
        read_tum(written(path, [head.format("c."), *(",".join(r) for r in rows)]), CLOCK, {}, [])
    rows = tum_rows(poses, range(FRAMES))
    dotted = written(path, ["frame,t.x,t.y,t.z,q.x,q.y,q.z,q.w", *(",".join(r) for r in rows)])
    assert np.allclose(read_tum(dotted, CLOCK, {}, []).times, TIMES, atol=1e-6)


def test_a_first_quaternion_that_says_two_things_is_noted(tmp_path, poses):
    """1 0 0 0: the identity with w first, and where an OpenGL trajectory starts, turned to OpenCV's axes, w last."""
    opengl = geometry.relative_to_first(poses) @ np.diag([1.0, -1, -1, 1])
    path = written(tmp_path / "a.cam.tum", [" ".join(r) for r in tum_rows(opengl)])
    notes: list[str] = []
    read_tum(path, CLOCK, {}, notes)
    assert "taken as w x y z; if not, say" in notes[0] and "a.cam.json" in notes[0]
    assert np.abs(read_tum(path, CLOCK, {"quaternion": "xyzw"}, notes).values - opengl).max() < 1e-6
    assert len(notes) == 1


def test_both_eyes_may_have_a_row_a_stamp(tmp_path, poses):
    rows = [r for r in tum_rows(poses) for _ in range(2)]
    track = read_tum(written(tmp_path / "a.cam.tum", [" ".join(r) for r in rows]), CLOCK, {}, [])
    assert np.allclose(track.times, TIMES)


def test_rows_that_are_no_pose_are_counted(tmp_path, poses):
    rows = [" ".join(r) for r in tum_rows(poses)]
    rows[10], rows[20], rows[30] = "nan " * 7 + "nan", rows[20].rsplit(" ", 4)[0] + " 0 0 0 0", "0.9 1 2"
    notes: list[str] = []
    track = read_tum(written(tmp_path / "a.cam.tum", rows), CLOCK, {}, notes)
    assert len(track.times) == FRAMES - 3
    assert "3 of 75 rows" in notes[0]


def colmap_text(folder: Path, poses: np.ndarray, first: int = 0, points: bool = True, extra: tuple[str, ...] = (),
                name: str = "frame_%04d.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(extra)
    order = np.random.default_rng(0).permutation(len(poses))  # ids and order mean nothing
    for image in order:
        camera_from_world = geometry.invert(poses[image])
        x, y, z, w = quaternions(camera_from_world[None, :3, :3])[0]
        values = " ".join(repr(float(v)) for v in (w, x, y, z, *camera_from_world[:3, 3]))
        lines.append(f"{image + 7} {values} 1 {name % (image + first)}")
        if points:
            lines.append("" if image % 2 else "10.5 20.5 -1 30.5 40.5 17")
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def colmap_binary(folder: Path, poses: np.ndarray, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<Q", len(poses))
    for image, pose in enumerate(poses):
        camera_from_world = geometry.invert(pose)
        x, y, z, w = quaternions(camera_from_world[None, :3, :3])[0]
        data += struct.pack("<I7dI", image + 1, w, x, y, z, *camera_from_world[:3, 3], 1)
        data += f"images/frame_{image + first:04d}.png".encode() + b"\0"
        data += struct.pack("<Q", 2) + struct.pack("<ddQddQ", 1, 2, 3, 4, 5, 6)
    (folder / "images.bin").write_bytes(data)
    (folder / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 1, 1, 640, 480, 500, 510, 320, 240))
    return folder


@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_colmap_text_models_are_joined_by_name(tmp_path, poses, points, first):
    extra = ("", "# Image list", f"# Number of images: {FRAMES}, mean observations: 3")
    folder = colmap_text(tmp_path / "a.colmap", poses, first, points, extra)
    (folder / "cameras.txt").write_text("# Camera list\n1 PINHOLE 640 480 500 510 320 240\n")
    track, matrix, size = read_colmap(folder, TIMES, {}, [])
    assert np.abs(track.values - poses).max() < 1e-9
    assert matrix.tolist() == [[500, 0, 320], [0, 510, 240], [0, 0, 1]]
    assert size == (640, 480)


def test_colmap_binary_models_and_gaps(tmp_path, poses):
    folder = colmap_binary(tmp_path / "a.colmap/sparse/0", poses)
    track, matrix, _ = read_colmap(tmp_path / "a.colmap", TIMES, {}, [])
    assert np.abs(track.values - poses).max() < 1e-9
    assert matrix[0, 0] == 500
    (folder / "images.bin").write_bytes((folder / "images.bin").read_bytes()[:-30])
    with pytest.raises(BadSequence, match="no whole"):
        read_colmap(tmp_path / "a.colmap", TIMES, {}, [])


def test_colmap_names_that_do_not_tell_are_refused(tmp_path, poses):
    """Images 1 .. 74 of 75 frames: the first may be called 0 or 1. Told, or seen from the pictures, it is known."""
    folder = colmap_text(tmp_path / "a.colmap", poses[:-1], first=1)
    with pytest.raises(BadSequence, match="count from 0 or from 1"):
        read_colmap(folder, TIMES, {}, [])
    for first, shift in ((1, 0), (0, 1)):
        track, _, _ = read_colmap(folder, TIMES, {"first_image": first}, [])
        assert np.abs(track.values[shift : shift + 74] - poses[:-1]).max() < 1e-9
        assert np.isnan(track.values[-1 if first else 0]).all()
    save_png(folder / "images/frame_0001.png", np.zeros((4, 4), np.uint8))
    save_png(folder / f"images/frame_{FRAMES:04d}.png", np.zeros((4, 4), np.uint8))
    assert np.abs(read_colmap(folder, TIMES, {}, [])[0].values[:74] - poses[:-1]).max() < 1e-9


@pytest.mark.parametrize(("count", "first", "words"), [(20, 0, "another rate"), (38, 0, "another rate"),
                                                     (75, 5, "are not frames")])
def test_colmap_models_of_other_frames_are_refused(tmp_path, poses, count, first, words):
    folder = colmap_text(tmp_path / "a.colmap", poses[:count], first)
    said = {"first_image": 0} if first else {}
    with pytest.raises(BadSequence, match=words):
        read_colmap(folder, TIMES, said, [])


def test_a_colmap_header_that_says_another_number_is_refused(tmp_path, poses):
    folder = colmap_text(tmp_path / "a.colmap", poses, extra=("# Number of images: 76",))
    with pytest.raises(BadSequence, match="says 76 images and holds 75"):
        read_colmap(folder, TIMES, {}, [])


WIDTH, HEIGHT = 640, 480
GAZE_TIMES = np.arange(150) / 60
PIXELS = np.stack([100 + 2 * np.arange(150.0), 300 - np.arange(150.0)], 1)
LOST = np.arange(150) % 10 == 3


def gaze_of(path: Path, units: str = "", said: dict | None = None):
    track = read_gaze(path, CLOCK, (WIDTH, HEIGHT), units, said or {}, [])
    assert np.abs(track.times - GAZE_TIMES).max() < 1e-4
    assert np.isnan(track.values[LOST]).all()
    assert np.abs(track.values[~LOST] - PIXELS[~LOST]).max() < 1e-6


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("True", "False"), ("true", "false"), ("Valid", "Invalid"),
                                         ("1.0", "0.0")])
def test_validity_words(tmp_path, yes, no):
    rows = [f"{t},{x},{y},{no if lost else yes}" for t, (x, y), lost in zip(GAZE_TIMES, PIXELS, LOST, strict=True)]
    gaze_of(written(tmp_path / "a.gaze.csv", ["time, x, y, valid", *rows], bom=b"\xef\xbb\xbf"))


def test_pupil_core(tmp_path):
    """y upwards, 0 .. 1; what is not sure is not seen; the clock starts anywhere."""
    rows = [f"{t},{i},{0.1 if lost else 0.95},{x / WIDTH},{1 - y / HEIGHT}" for i, (t, (x, y), lost)
            in enumerate(zip(GAZE_TIMES, PIXELS, LOST, strict=True))]
    head = "gaze_timestamp,world_index,confidence,norm_pos_x,norm_pos_y"
    gaze_of(written(tmp_path / "a.gaze.csv", [head, *rows]))
    with pytest.raises(BadSequence, match="eye's own picture"):
        read_gaze(written(tmp_path / "b.gaze.csv", ["pupil_timestamp,confidence,norm_pos_x,norm_pos_y", "0,1,0.5,0.5"]),
                  CLOCK, (WIDTH, HEIGHT), "", {}, [])


def test_pupil_cloud_and_neon(tmp_path):
    start = 1_700_000_000_000_000_000
    rows = []
    for i, (t, (x, y), lost) in enumerate(zip(GAZE_TIMES, PIXELS, LOST, strict=True)):
        taken_off, blink = lost and i % 20 == 3, lost and i % 20 != 3
        rows.append(f"s,r,{start + round(t * 1e9)},{x},{y},{float(not taken_off)},,{i if blink else ''}")
    head = "section id,recording id,timestamp [ns],gaze x [px],gaze y [px],worn,fixation id,blink id"
    gaze_of(written(tmp_path / "a.gaze.csv", [head, *rows]), said={"start": start, "unit": "ns"})


@pytest.mark.parametrize("decimal", [".", ","])
def test_tobii_pro_lab(tmp_path, decimal):
    """Tab separated, rows of other sensors between, words for validity, decimal commas, UTF-16."""
    rows = ["Recording timestamp [ms]\tSensor\tGaze point X [MCS px]\tGaze point Y [MCS px]\tValidity left\tValidity "
            "right"]
    for t, (x, y), lost in zip(GAZE_TIMES, PIXELS, LOST, strict=True):
        word = "Invalid" if lost else "Valid"
        rows.append(f"{t * 1000:.6f}\tEye Tracker\t{x}\t{y}\t{word}\t{word}".replace(".", decimal))
        rows.append(f"{t * 1000 + 1:.6f}\tGyroscope\t\t\t\t".replace(".", decimal))
    path = tmp_path / "a.gaze.tsv"
    path.write_bytes("\r\n".join(rows).encode("utf-16"))
    gaze_of(path)
    with pytest.raises(BadSequence, match="screen"):
        read_gaze(written(tmp_path / "s.gaze.tsv", [rows[0] + "\tPresented Stimulus name", rows[1] + "\tx"]), CLOCK,
                  (WIDTH, HEIGHT), "", {}, [])


def test_a_blink_in_a_tobii_export_is_not_bridged(tmp_path):
    """A quarter of a second of rows of the eye tracker without a point, other sensors' rows between them."""
    rows = ["Recording timestamp [ms]\tGaze point X [MCS px]\tGaze point Y [MCS px]\tValidity left"]
    times = np.arange(100) / 40
    for t in times:
        blink = 1.0 <= t < 1.25
        rows.append(f"{t * 1000:.3f}\t{'' if blink else 40}\t{'' if blink else 30}\t{'Invalid' if blink else 'Valid'}")
        rows.append(f"{t * 1000 + 1:.3f}\t\t\t")
    track = read_gaze(written(tmp_path / "a.gaze.tsv", rows), CLOCK, (WIDTH, HEIGHT), "", {}, [])
    assert np.array_equal(np.isnan(track.values[:, 0]), (times >= 1.0) & (times < 1.25))


def test_empty_cells_at_the_ends_of_tab_separated_rows(tmp_path):
    """Tobii writes fixations in the last columns: empty between fixations, and no reason to lose the row."""
    rows = ["\tRecording timestamp [ms]\tGaze point X [MCS px]\tGaze point Y [MCS px]\tValidity left\tFixation point X"]
    for i, (t, (x, y), lost) in enumerate(zip(GAZE_TIMES, PIXELS, LOST, strict=True)):
        rows.append(f"\t{t * 1000:.6f}\t{x}\t{y}\t{'Invalid' if lost else 'Valid'}\t{x if i % 3 else ''}")
    notes: list[str] = []
    rows.append("\t2500\t5")  # cut off
    track = read_gaze(written(tmp_path / "a.gaze.tsv", rows), CLOCK, (WIDTH, HEIGHT), "", {}, notes)
    assert np.abs(track.values[~LOST] - PIXELS[~LOST]).max() < 1e-6
    assert notes == ["a.gaze.tsv: 1 of 151 rows are cut off and were left out"]
    (tmp_path / "k.txt").write_text("900\t0\t320\t\n0\t900\t240\t\n0\t0\t1\t\n")
    assert read_matrix(tmp_path / "k.txt")[1, 2] == 240


@pytest.mark.parametrize(("head", "row"), [("time\tx\ty\t", "{}\t{}\t{}"), ("\ttime\tx\ty", "{}\t{}\t{}"),
                                           ("time\tx\ty", "\t{}\t{}\t{}"), ("time\tx\ty", "{}\t{}\t{}\t")])
def test_tabs_that_mean_nothing(tmp_path, head, row):
    rows = [row.format(t, x, y) for t, (x, y) in zip(GAZE_TIMES, PIXELS, strict=True)]
    track = read_gaze(written(tmp_path / "a.gaze.tsv", [head, *rows]), CLOCK, (WIDTH, HEIGHT), "", {}, [])
    assert np.abs(track.values - PIXELS).max() < 1e-6
    (tmp_path / "k.txt").write_text("\t900\t0\t320\n\t0\t900\t240\n\t0\t0\t1\n")
    assert read_matrix(tmp_path / "k.txt")[0].tolist() == [900, 0, 320]


def test_tobii_glasses_3(tmp_path):
    with gzip.open(tmp_path / "a.gazedata.gz", "wt") as file:
        for t, (x, y), lost in zip(GAZE_TIMES, PIXELS, LOST, strict=True):
            data = {} if lost else {"gaze2d": [x / WIDTH, y / HEIGHT]}
            file.write(json.dumps({"type": "gaze", "timestamp": t, "data": data}) + "\n")
            file.write(json.dumps({"type": "imu", "timestamp": t}) + "\n")
    gaze_of(tmp_path / "a.gazedata.gz")


def test_gaze_that_is_not_in_pixels_of_these_frames(tmp_path):
    def path(scale, name="a.gaze.csv", head="time,x,y"):
        return written(tmp_path / name, [head, *(f"{t},{x * scale[0]},{y * scale[1]}" for t, (x, y)
                                                  in zip(GAZE_TIMES, PIXELS, strict=True))])

    with pytest.raises(BadSequence, match="--gaze-units normalized"):
        read_gaze(path((1 / WIDTH, 1 / HEIGHT)), CLOCK, (WIDTH, HEIGHT), "", {}, [])
    track = read_gaze(path((1 / WIDTH, 1 / HEIGHT)), CLOCK, (WIDTH, HEIGHT), "normalized", {}, [])
    assert np.abs(track.values - PIXELS).max() < 1e-6
    with pytest.raises(BadSequence, match="another size"):
        read_gaze(path((4, 4)), CLOCK, (WIDTH, HEIGHT), "", {}, [])
    with pytest.raises(BadSequence, match="MPS gaze as angles"):
        read_gaze(path((1, 1), head="tracking_timestamp_us,yaw_rads_cpf,pitch_rads_cpf"), CLOCK, (WIDTH, HEIGHT), "",
                  {}, [])


@pytest.mark.parametrize("first", [0, 1])
def test_depth_pictures_go_by_their_numbers(tmp_path, first):
    for i in range(12):
        save_png(tmp_path / f"d/{i + first}.png", np.full((4, 4), 1000 + i, np.uint16))
    notes: list[str] = []
    pictures = numbered_depth(tmp_path / "d", TIMES[:13], notes)
    assert [round(float(pictures.read(i)[0, 0]) * 1000) for i in range(12)] == list(range(1000, 1012))
    assert np.allclose(pictures.times, TIMES[:12])
    assert notes == ["depth covers 12 of 13 video frames"]
    save_png(tmp_path / "d/40.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(BadSequence, match="must count from 0 or 1"):
        numbered_depth(tmp_path / "d", TIMES[:13], [])


def test_depth_arrays_that_are_not_the_frames_are_refused(tmp_path):
    def of(shape: tuple[int, ...], count: int = FRAMES) -> ArrayPictures:
        np.save(tmp_path / "d.npy", np.full((count, *shape), 2.0, np.float16))
        return ArrayPictures(tmp_path / "d.npy", TIMES, (20, 36), notes)

    notes: list[str] = []
    assert of((36, 20)).read(0).shape == (36, 20) and of((18, 10)).read(0).shape == (18, 10) and not notes
    for shape in ((20, 36), (24, 18)):  # as the sensor lies; of another camera
        with pytest.raises(BadSequence, match="turned, cut or squeezed"):
            of(shape)
    with pytest.raises(BadSequence, match="25 frames, the video 75"):
        of((36, 20), 25)
    assert np.array_equal(of((36, 20), 70).times, TIMES[:70]) and notes == ["depth covers 70 of 75 video frames"]


def test_endless_depth_is_no_reading(tmp_path):
    frames = np.full((16, 8, 8), np.inf, np.float64)
    frames[:, 4:] = 3
    frames[:, 0, 0] = 1e6  # more than a stored clip can hold
    np.save(tmp_path / "d.npy", frames)
    recording = Recording("a", "train", depth=ArrayPictures(tmp_path / "d.npy", np.arange(16) / 8, (8, 8), []))
    depth, _ = _depth_at(recording, np.arange(16) / 8)
    assert np.array_equal(depth, np.where(frames == 3, 3, 0))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_a_side_file_that_is_no_file_costs_only_itself(tmp_path, data):
    recording = Recording("a", "train")
    for end in ("npy", "npz"):
        (tmp_path / f"d.{end}").write_bytes(data)
        assert recording.attempt("depth", ArrayPictures, tmp_path / f"d.{end}", TIMES, (8, 8), []) is None
    assert len(recording.notes) == 2 and all("depth left out" in note for note in recording.notes)


def test_an_eight_bit_depth_picture_is_refused(tmp_path):
    save_png(tmp_path / "d/0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(BadSequence, match="16-bit"):
        numbered_depth(tmp_path / "d", TIMES[:1], []).read(0)


def test_intrinsics(tmp_path):
    matrix = np.array([[1000.0, 0, 960], [0, 1000, 540], [0, 0, 1]])
    for text in ("1000 0 960\n0 1000 540\n0 0 1\n", "1000,0,960,0,1000,540,0,0,1\n"):
        (tmp_path / "k.txt").write_text(text)
        assert np.array_equal(read_matrix(tmp_path / "k.txt"), matrix)
    notes: list[str] = []
    scaled = fit_intrinsics(matrix, 640, 360, (1920, 1080), notes)
    assert np.allclose(scaled, [[1000 / 3, 0, 320], [0, 1000 / 3, 180], [0, 0, 1]])
    assert "scaled" in notes[0]
    with pytest.raises(BadSequence, match="another size"):
        fit_intrinsics(matrix, 512, 376, (1920, 1080), [])
    (tmp_path / "k.txt").write_text("1 2\n3 4\n")
    with pytest.raises(BadSequence, match="3 x 3"):
        read_matrix(tmp_path / "k.txt")


def test_table_counts_rows_that_are_cut_off(tmp_path):
    path = written(tmp_path / "t.csv", ["a, b ,c", "1,2,3", "4,5", "7,,9"])
    table = read_table(path)
    assert list(table.columns) == ["a", "b", "c"]
    assert table.lost == 1
    assert np.array_equal(table.matrix(), [[1, 2, 3], [7, np.nan, 9]], equal_nan=True)


@pytest.mark.parametrize("rows", [8, 9, 10, 11])
def test_rows_of_a_tab_separated_table_may_be_empty_wherever_they_are(tmp_path, rows):
    lines = ["Recording timestamp\tGaze point X [MCS px]\tGaze point Y [MCS px]",
             *(f"{i}\t{i * 10}\t5" if i % 2 else f"{i}\t\t" for i in range(rows))]
    table = read_table(written(tmp_path / "t.tsv", lines))
    assert list(table.columns) == ["recording timestamp", "gaze point x [mcs px]", "gaze point y [mcs px]"]
    assert len(table) == rows and table.lost == 0
    assert np.isnan(table.column("gaze point x [mcs px]")[::2]).all()


def test_a_comment_is_the_header_also_of_rows_that_end_in_a_tab(tmp_path):
    path = written(tmp_path / "t.txt", ["# time\ttx\tqw", *(f"{i}\t1\t0\t" for i in range(4))])
    table = read_table(path)
    assert table.has_header and list(table.columns) == ["time", "tx", "qw"]


@pytest.mark.parametrize("end", ["", "\t", " \t"])
def test_numbers_parted_by_blanks_may_end_in_a_tab(tmp_path, end):
    path = written(tmp_path / "t.txt", [f"{i} 1.5 2{end}" for i in range(4)])
    assert np.array_equal(read_table(path).matrix(), [[i, 1.5, 2] for i in range(4)])


def test_running_out_of_memory_is_not_a_fault_of_the_file():
    def hungry():
        raise MemoryError

    with pytest.raises(MemoryError):
        Recording("r", "train").attempt("depth", hungry)


def own_signals(folder, seconds: float = 5.0) -> np.ndarray:
    """A film of five seconds and, beside it, an IMU at 197 Hz whose channels are known functions of time (nanoseconds
    since an epoch), and heart rate once a second."""
    write_video(folder / "walk.mp4", np.zeros((int(seconds * 30), 32, 32, 3), np.uint8), 30)
    times = np.arange(0, seconds, 1 / 197)
    rows = [f"{1_700_000_000_000_000_000 + int(t * 1e9)},{t:.6f},{2 * t:.6f},9.81" for t in times]
    written(folder / "walk.imu.csv", ["timestamp [ns],ax,ay,az", *rows])
    written(folder / "walk.imu.json", [json.dumps({"unit": "ns", "start": 1_700_000_000_000_000_000})])
    written(folder / "walk.pulse.tsv", ["time\tbpm", *(f"{i}\t{60 + i}" for i in range(6))])
    return times


def test_signals_of_ones_own_come_with_the_recording(tmp_path):
    (tmp_path / "raw").mkdir()
    own_signals(tmp_path / "raw")
    command = ("prepare", "video", "--root", tmp_path / "raw", "--out", tmp_path / "clips", "--size", 32, "--workers",
               1)
    done = run_cli(*command, "--series", "imu=200", "pulse=1")
    assert "imu 100%" in done.stdout and "pulse 100%" in done.stdout
    clips = list(read_clips(str(tmp_path / "clips/train")))
    assert len(clips) == 2
    for clip in clips:
        assert clip.meta["rates"]["imu"] == 200 and clip.signals["imu"].shape == (400, 3)
        wanted = clip.meta["start"] + np.arange(400) / 200
        assert np.abs(clip.signals["imu"] - np.stack([wanted, 2 * wanted, np.full(400, 9.81)], 1)).max() < 1e-4
        assert np.allclose(clip.signals["pulse"][:, 0], 60 + clip.meta["start"] + np.arange(2))
    refused = run_cli(*command, "--series", "imu=100", "pulse=1", check=False)
    assert refused.returncode == 2 and "prepared with {'series': {'imu': 200.0, 'pulse': 1.0}}, now" in refused.stderr


def test_a_table_that_nobody_asks_for_is_skipped_with_what_to_ask(tmp_path):
    own_signals(tmp_path)
    written(tmp_path / "notes.txt", ["a rainy day"])
    assert VideoFolder(series={"pulse": 1.0}).skipped(tmp_path) == [
        "notes.txt: neither a video nor a side file",
        "walk.imu.csv: neither a video nor a side file; --series imu=HZ takes it for a signal of your own",
        "walk.imu.json: neither a video nor a side file"]


def test_gaps_of_a_signal_of_ones_own_cost_that_signal_only(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    own_signals(tmp_path / "raw")
    lines = (tmp_path / "raw/walk.imu.csv").read_text().splitlines()
    lines[100:180] = []  # 0.4 s
    lines[500] = lines[500].split(",")[0] + ",nan,nan,nan"
    written(tmp_path / "raw/walk.imu.csv", lines)
    done = run_cli("prepare", "video", "--root", tmp_path / "raw", "--out", tmp_path / "clips", "--size", 32,
                   "--workers", 1, "--series", "imu=200", "hands=30")
    assert "1 imu left out: gap or NaN" in done.stdout
    assert [sorted(c.signals) for c in read_clips(str(tmp_path / "clips/train"))] == [["rgb"], ["imu", "rgb"]]
    assert "no clip has 'hands'" in caplog.text


@pytest.mark.parametrize(("series", "words"), [("imu", "NAME=HZ"), ("imu=fast", "NAME=HZ"), ("gaze=30", "none of"),
                                               ("a.b=3", "letters, digits"), ("imu=0", "give Hz"),
                                               ("imu=.1", "at least")])
def test_series_that_cannot_be(tmp_path, series, words):
    done = run_cli("prepare", "video", "--root", tmp_path, "--out", tmp_path / "o", "--series", series, check=False)
    assert done.returncode == 2 and words in done.stderr


def test_an_adapter_of_ones_own_brings_signals_of_its_own(tmp_path):
    """With rates of its own, or those that the user gives; without either a note says what is missing."""
    track = Track(np.arange(0, 5, 0.01), np.random.default_rng(0).random((500, 2)))
    save_png(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8))
    pictures = ImagePictures([tmp_path / "p.png"] * 40, np.arange(40) / 8)
    recording = Recording("r", "train", rgb=pictures, series={"hands": track, "pulse": track})
    clips = list(cut(recording, "mine", 8, 0, Counter(), Statistics(), rates={"hands": 50.0}))
    assert [sorted(c.signals) for c in clips] == [["hands", "rgb"]] * 2 and clips[0].signals["hands"].shape == (100, 2)
    assert np.allclose(clips[0].signals["hands"], track.values[:200:2])
    assert recording.notes == ["pulse left out: nobody says at which rate; give --series pulse=HZ"]


def test_a_broken_note_beside_a_side_file_costs_that_signal(tmp_path):
    (tmp_path / "raw").mkdir()
    own_signals(tmp_path / "raw")
    written(tmp_path / "raw/walk.imu.json", ["{"])
    done = run_cli("prepare", "video", "--root", tmp_path / "raw", "--out", tmp_path / "clips", "--size", 32,
                   "--workers", 1, "--series", "imu=200", "pulse=1")
    assert "pulse 100%" in done.stdout and "imu" not in done.stdout.split("coverage")[1].splitlines()[0]
    record = json.loads((tmp_path / "clips/records/walk_mp4.json").read_text())
    assert any("imu left out" in note and "walk.imu.json" in note for note in record["notes"])


@pytest.mark.parametrize(("header", "clock"), [
    ("seconds,t1,t2", "seconds"), ("frame,t_x,t_y", "frame"), ("index,timestamp_us,ax", "timestamp_us"),
    ("ax,Time [s],ay", "time [s]"), ("a,b,timestamps", "timestamps"), ("a,t,temp", "t"), ("time_ns,a,b", "time_ns")])
def test_which_column_is_the_clock(header, clock):
    names = [name.strip().lower() for name in header.split(",")]
    assert next((name for name in names if TIME.match(name)), names[0]) == clock


def test_a_channel_without_a_number_costs_the_signal_and_a_last_separator_nothing(tmp_path):
    """Or clips of two recordings would hold other channels under one name."""
    clock = VideoClock(np.arange(90) / 30)
    for name, rows in (("end", ["time,ax,ay,", *(f"{i / 10},1,2," for i in range(30))]),
                       ("named", ["time,ax,ay", *(f"{i / 10},,2" for i in range(30))])):
        written(tmp_path / f"{name}.imu.csv", rows)
        track = _Beside(tmp_path / name, clock.times, (32, 32), "", []).series("imu")
        assert track.values.shape == (30, 2)
        assert np.isfinite(track.values).all() == (name == "end")


def test_poses_of_ones_own_are_moved_as_poses_at_their_own_rate(poses):
    """A hand at five poses a second, four metres a second fast."""
    hand = poses[:40].copy()
    hand[:, :3, 3] = np.arange(40)[:, None] * np.array([0.8, 0, 0])
    save = Track(np.arange(40) / 5, hand)
    rgb = ArrayOfPictures(40)
    recording = Recording("r", "train", rgb=rgb, series={"hand": save, "none": Track(np.zeros(0), np.zeros((0, 6)))})
    counts = Counter()
    clips = list(cut(recording, "mine", 8, 0, counts, Statistics(), rates={"hand": 5.0, "none": 1.0}))
    assert clips[0].signals["hand"].shape == (10, 4, 4) and not any("hand" in reason for reason in counts)
    assert np.allclose(clips[0].signals["hand"], hand[:10], atol=1e-5)
    assert counts["none left out: gap or NaN"] == len(clips)


class ArrayOfPictures(Pictures):
    def __init__(self, count: int) -> None:
        self.times = np.arange(count) / 8

    def read(self, index: int) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


def test_a_table_without_header_is_as_wide_as_its_widest_row(tmp_path):
    """Also when that comes after thousands of others."""
    rows = [*(f"{i / 100},1,2," for i in range(6000)), *(f"{i / 100},1,2,3" for i in range(6000, 7000))]
    table = read_table(written(tmp_path / "t.csv", rows))
    assert table.matrix().shape == (7000, 4) and table.lost == 0


def test_columns_of_one_name_are_told_apart(tmp_path):
    table = read_table(written(tmp_path / "t.csv", ["time,x,y,x,x", "0,1,2,3,4"]))
    assert list(table.columns) == ["time", "x", "y", "x.2", "x.3"] and table.column("x.3")[0] == 4


def test_rows_numbers_are_no_channel(tmp_path):
    table = written(tmp_path / "a.imu.csv", [",time,ax,ay", *(f"{i},{t},{t * 2},{t * 3}" for i, t in enumerate(TIMES))])
    beside = _Beside(tmp_path / "a", TIMES, (64, 48), "", [])
    assert np.allclose(beside.series("imu").values, np.stack([TIMES * 2, TIMES * 3], 1))
    written(table, [",time", *(f"{i},{t}" for i, t in enumerate(TIMES))])
    with pytest.raises(BadSequence, match="one of numbers a channel"):
        beside.series("imu")


def test_a_depth_film_beside_a_video_is_no_recording(tmp_path):
    frames = np.zeros((75, 32, 32, 3), np.uint8)
    for name in ("n.mp4", "n.depth.mkv", "alone.depth.mp4"):
        write_video(tmp_path / name, frames, 30)
    adapter = VideoFolder()
    assert adapter.sequences(tmp_path) == ["alone.depth.mp4", "n.mp4"]
    assert [line.partition(":")[0] for line in adapter.skipped(tmp_path)] == ["n.depth.mkv"]
