"""Recordings as their authors' tools write them (`../shared/data/real`, never committed), the authors' own readers as
oracles where they are installed. Tests skip, and say so, where the files are not there."""

import json

import numpy as np
import pytest

from egom2p import geometry
from egom2p.datasets.aria import Trajectory, gaze_direction, read_online_calibration, read_trajectory
from egom2p.datasets.cutting import LARGEST_GAP
from egom2p.datasets.hot3d import _integers
from egom2p.datasets.prepare import make_adapter
from egom2p.datasets.tables import read_table
from tests.conftest import SHARED

REAL = SHARED / "data/real"
MPS = REAL / "mps"
ADT = REAL / "adt/aria_digital_twin_test_data"
HOT3D = REAL / "hot3d_aria/P0003_c701bd11"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not at {REAL}")
needs_aria = pytest.mark.skipif(not pytest.importorskip("importlib.util").find_spec("projectaria_tools"),
                                reason="projectaria-tools is not installed (no wheel for aarch64)")


@needs_aria
@pytest.mark.parametrize("name", ["trajectory/closed_loop_trajectory.csv",
                                  "trajectory/closed_loop_trajectory_geo_available.csv"])
def test_trajectory_is_what_the_authors_reader_gives(name):
    from projectaria_tools.core import mps

    theirs = mps.read_closed_loop_trajectory(str(MPS / name))
    ours = read_trajectory(MPS / name)
    assert len(ours.device_ns) == len(theirs)
    assert ours.left_out == 0
    stamps = [round(p.tracking_timestamp.total_seconds() * 1e9) for p in theirs]
    assert np.abs(ours.device_ns - stamps).max() < 1000
    rows = np.linspace(0, len(theirs) - 1, 50).astype(int)
    wanted = np.array([theirs[i].transform_world_device.to_matrix() for i in rows])
    assert np.abs(ours.poses(rows) - wanted).max() < 1e-6


@needs_aria
@pytest.mark.parametrize("name", ["eyegaze.csv", "generalized_eye_gaze.csv"])
def test_gaze_points_are_what_the_authors_reader_gives(name):
    from projectaria_tools.core import mps

    theirs = mps.read_eyegaze(str(MPS / "eye_gaze" / name))
    table = read_table(MPS / "eye_gaze" / name)
    ours = gaze_direction(table)
    assert len(ours) == len(theirs)
    checked = 0
    for point, row in zip(ours, theirs, strict=True):
        depth = row.depth or 1.0
        wanted = mps.get_eyegaze_point_at_depth(row.yaw, row.pitch, depth)
        if row.depth:
            assert np.linalg.norm(point - wanted) < 0.02 * np.linalg.norm(wanted)
            checked += 1
        assert np.dot(point, wanted) / np.linalg.norm(point) / np.linalg.norm(wanted) > 0.9999
    assert checked or "depth_m" not in table.columns or not np.isfinite(table.columns["depth_m"]).any()


def test_calibration_of_the_rgb_camera():
    device_from_camera, params = read_online_calibration(MPS / "trajectory/online_calibration.jsonl")
    assert params.shape == (15,)
    assert 200 < params[0] < 1500
    assert np.allclose(device_from_camera[:3, :3] @ device_from_camera[:3, :3].T, np.eye(3), atol=1e-6)


@needs_aria
@pytest.mark.parametrize("wearer", [False, True])
def test_adt_opens_and_its_depth_is_along_z(wearer):
    """The table of the sequence is one plane when depth is read along the optical axis, and none along rays."""
    from egom2p.datasets.adt import ADT as Adapter

    recording = Adapter(with_wearer=wearer).open(ADT.parent, ADT.name)
    assert recording.meta["depth_file"] == ("depth_images_with_skeleton.vrs" if wearer else "depth_images.vrs")
    assert len(recording.rgb.times) == 3
    assert len(recording.depth.times) == 2
    assert np.abs(recording.depth.times - recording.rgb.times[:2]).max() < 0.001
    assert recording.rgb.read(0).shape == (1408, 1408, 3)
    depth = recording.depth.read(0)
    v, u = np.mgrid[0:1408:6, 0:1408:6].reshape(2, -1)
    z = depth[v, u]
    seen = z > 0
    rays = np.c_[u[seen] + 0.5, v[seen] + 0.5, np.ones(seen.sum())] @ np.linalg.inv(recording.intrinsics).T
    nearest = np.abs(recording.cam.times - recording.depth.times[0]).argmin()
    world_from_camera = recording.cam.values[nearest]

    def fullest_bin(points: np.ndarray) -> int:
        heights = (points @ world_from_camera[:3, :3].T + world_from_camera[:3, 3])[:, 1]  # ADT's world has y up
        heights = heights[(heights > 0.4) & (heights < 1.4)]
        return np.histogram(heights, np.arange(0.4, 1.4, 0.02))[0].max()

    along_z = fullest_bin(rays * z[seen, None])
    along_rays = fullest_bin(rays / np.linalg.norm(rays, axis=1, keepdims=True) * z[seen, None])
    assert along_z > 2.5 * along_rays
    assert np.isfinite(recording.gaze.values).all(1).any()


@needs_aria
def test_adt_gaze_is_projected_as_the_authors_do():
    from projectaria_tools.core import data_provider, mps
    from projectaria_tools.core.mps.utils import get_gaze_vector_reprojection

    recording = make_adapter("adt").open(ADT.parent, ADT.name)
    provider = data_provider.create_vrs_data_provider(str(ADT / "video.vrs"))
    calibration = provider.get_device_calibration()
    camera = calibration.get_camera_calib("camera-rgb")
    rows = mps.read_eyegaze(str(ADT / "eyegaze.csv"))
    params = np.array((getattr(camera, "get_projection_params", None) or camera.projection_params)())
    from egom2p.datasets.aria import pinhole, turn_intrinsics

    matrix = turn_intrinsics(pinhole(params), 1408)
    compared = 0
    for row, ours in zip(rows[:50], recording.gaze.values[:50], strict=True):
        pixel = get_gaze_vector_reprojection(row, "camera-rgb", calibration, camera, row.depth or 1.0)
        if pixel is None or not np.isfinite(ours).all():
            continue
        ray = camera.unproject(np.asarray(pixel))  # of the raw camera; upright: x = -y, y = x
        upright = np.array([-ray[1], ray[0], ray[2]])
        assert np.abs(matrix @ (upright / upright[2]) - [*ours, 1]).max() < 1.0
        compared += 1
    assert compared


def test_headset_poses_are_those_of_mps():
    """The test participants of HOT3D have MPS poses only: they are the same to 0.01 mm."""
    table = read_table(HOT3D / "headset_trajectory.csv")
    ours = np.stack([table.column(f"t_wo_{a}[m]") for a in "xyz"], -1)
    mps = read_trajectory(HOT3D / "mps/slam/closed_loop_trajectory.csv")
    distance = np.abs(ours[:, None] - mps.translations[None]).max(-1).min(1)
    assert np.median(distance) < 1e-5
    assert (distance < 1e-5).sum() >= 60
    stamps = np.sort(_integers(HOT3D / "headset_trajectory.csv", "timestamp[ns]"))  # two a frame
    thinned = Trajectory(stamps, np.zeros((len(stamps), 4)), np.zeros((len(stamps), 3))).thinned().device_ns
    assert np.diff(thinned).max() < 1e9 * LARGEST_GAP["cam"]


def test_real_gaze_and_metadata_of_hot3d_are_read():
    table = read_table(HOT3D / "mps/eye_gaze/general_eye_gaze.csv")
    points = gaze_direction(table)
    assert np.isfinite(points).all(1).mean() > 0.9
    assert json.loads((HOT3D / "metadata.json").read_text())["headset"] == "Aria"


def test_a_real_head_moves_as_heads_do():
    trajectory = read_trajectory(MPS / "trajectory/closed_loop_trajectory.csv").thinned()
    poses = trajectory.poses()
    seconds = np.diff(trajectory.device_ns) / 1e9
    speed = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1) / seconds
    turn = geometry.rotation_angle_deg(poses[:-1, :3, :3].transpose(0, 2, 1) @ poses[1:, :3, :3]) / seconds
    assert speed.max() < 5
    assert turn.max() < 1000
