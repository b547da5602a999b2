"""Where pixels, poses and moments end up on their way into clips."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from egom2p import geometry
from egom2p.datasets import aria, hot3d
from egom2p.datasets.arctic import Arctic, load_plain_pickle
from egom2p.datasets.ase import ASE
from egom2p.datasets.cutting import nearest, resample_points, resample_poses
from egom2p.datasets.lens import Undistortion, distort_fisheye624, distort_rational
from egom2p.datasets.recording import BadSequence, Track
from tests.datasets.conventions import opencv_distort
from tests.datasets.miniature import save_png


def test_the_upright_picture_and_its_intrinsics_agree():
    """A bright pixel and the point it shows: turned with the frame, it lies where the turned matrix projects it."""
    raw = np.array([[100.0, 0, 37], [0, 120, 21], [0, 0, 1]])
    frame = np.zeros((40, 60), np.uint8)
    row, column = 9, 51
    frame[row, column] = 255
    ray = np.linalg.inv(raw) @ [column + 0.5, row + 0.5, 1]
    turned = aria.turn(frame)
    (new_row, new_column), = np.argwhere(turned)
    assert turned.shape == (60, 40)
    upright_ray = np.array([-ray[1], ray[0], 1])  # a quarter turn clockwise of the picture
    pixel = geometry.project(upright_ray, aria.turn_intrinsics(raw, 40))
    np.testing.assert_allclose(pixel, [new_column + 0.5, new_row + 0.5], atol=1e-9)


@pytest.mark.parametrize("side", [704, 352])
def test_the_principal_point_of_synthetic_environments(tmp_path, side):
    """ASE's published calibration is of 704 x 704 pixels whose centres are at whole numbers; pictures come turned by a
    quarter (numbers by hand)."""
    save_png(tmp_path / "3/rgb/vignette0000000.png", np.zeros((side, side, 3), np.uint8))
    intrinsics = ASE().open(tmp_path, "3").intrinsics * 704 / side
    np.testing.assert_allclose(intrinsics[:2], [[297.63754, 0, 704 - 349.69225], [0, 297.63754, 358.15992]], atol=1e-4)


def test_hot3ds_participants_are_dealt_as_the_authors_deal_them():
    want = {"P0001": "val", "P0014": "val", "P0004": "test", "P0020": "test", "P0002": "train", "P0015": "train"}
    assert {participant: hot3d._split(participant) for participant in want} == want


@pytest.mark.parametrize(("said", "full"), [({}, (2800, 2000)), ({"image_size": [[1400, 1000]]}, (1400, 1000))])
def test_arctics_lens_is_that_of_the_size_that_its_notes_say(tmp_path, said, full):
    poses = {"R_k_cam_np": np.tile(np.eye(3), (30, 1, 1)), "T_k_cam_np": np.zeros((30, 3, 1))}
    matrix = np.array([[1000.0, 0, 1400], [0, 900, 1000], [0, 0, 1]])
    save_png(tmp_path / "images/s01/mixer/0/00015.png", np.zeros((100, 140, 3), np.uint8))
    (tmp_path / "images/s01/mixer/0/00015.png").rename(tmp_path / "images/s01/mixer/0/00015.jpg")
    (tmp_path / "raw_seqs/s01").mkdir(parents=True)
    np.save(tmp_path / "raw_seqs/s01/mixer.egocam.dist.npy", {**poses, "intrinsics": matrix, "dist8": np.zeros(8)})
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/misc.json").write_text(json.dumps({"s01": {"ioi_offset": 0, **said}}))
    recording = Arctic().open(tmp_path, "s01/mixer")
    wanted = np.diag([140 / full[0], 100 / full[1], 1]) @ matrix
    np.testing.assert_allclose(recording.intrinsics, wanted)


def test_tangential_terms_of_the_rational_model_are_opencvs():
    """p1 bends along y (r2 + 2 y2), p2 along x (r2 + 2 x2): OpenCV's calib3d page, numbers by hand."""
    ray = np.array([0.3, -0.2])
    r2 = 0.13
    np.testing.assert_allclose(distort_rational(ray, [0, 0, 0.1, 0]),
                               [0.3 + 0.1 * 2 * 0.3 * -0.2, -0.2 + 0.1 * (r2 + 2 * 0.04)])
    np.testing.assert_allclose(distort_rational(ray, [0, 0, 0, 0.1]),
                               [0.3 + 0.1 * (r2 + 2 * 0.09), -0.2 + 0.1 * 2 * 0.3 * -0.2])
    np.testing.assert_allclose(distort_rational(ray, [0.5, 0.25, 0, 0, 2.0, 0.125, 0, 0]),
                               ray * (1 + 0.5 * r2 + 0.25 * r2**2 + 2 * r2**3) / (1 + 0.125 * r2))


@pytest.mark.parametrize(("terms", "expected"), [
    (8, [[0.0, 0.0], [0.2939919994951741, -0.19603799966344942], [-0.4768983041426362, 0.381272643314109],
         [0.636077868840114, 0.5475167447200977], [-0.09386316127621776, -0.7398552902097421]]),
    (5, [[0.0, 0.0], [0.29473935009999996, -0.19653623340000004], [-0.4805205655, 0.38417045240000003],
         [0.6456812624999999, 0.555748225], [-0.0949495875, -0.7485467]])])
def test_the_rational_model_is_opencvs(terms, expected):
    """What cv2.projectPoints (5.0.0) gave for these rays and coefficients; the miniature's own formula agrees."""
    lens = [-0.12, 0.03, 0.001, -0.002, 0.011, 0.02, -0.004, 0.0015][:terms]
    rays = np.array([[0, 0], [0.3, -0.2], [-0.5, 0.4], [0.7, 0.6], [-0.1, -0.8]])
    np.testing.assert_allclose(distort_rational(rays, lens), expected, atol=1e-12)
    np.testing.assert_allclose([opencv_distort(*ray, *lens) for ray in rays], expected, atol=1e-12)


def test_the_fisheye_is_project_arias():
    """What projectaria_tools 2.3.0 (CameraCalibration.project) gave for these rays, every term of the lens in use."""
    focal, centre = 300.0, [320.5, 318.25]
    lens = [0.36, -0.17, -0.75, 2.4, -2.5, 0.87, 0.002, -0.003, 0.004, -0.001, -0.0025, 0.0015]
    rays = np.array([[0, 0], [0.3, -0.2], [-0.5, 0.4], [0.7, 0.6], [-0.1, -0.8]])
    expected = [[320.5, 318.25], [410.7611382820123, 258.0218351166226], [176.09361035257325, 433.72530627901847],
                [515.0144904392283, 483.0405585741098], [293.0221431789519, 90.09637333197026]]
    np.testing.assert_allclose(focal * distort_fisheye624(rays, lens) + centre, expected, atol=1e-9)


def test_the_fisheye_keeps_angles_when_it_has_no_terms():
    rays = np.array([[0.5, 0.0], [0.0, -0.5], [1.0, 1.0]])
    bent = distort_fisheye624(rays, np.zeros(12))
    np.testing.assert_allclose(np.linalg.norm(bent, axis=1), np.arctan(np.linalg.norm(rays, axis=1)))
    np.testing.assert_allclose(bent / np.linalg.norm(bent, axis=1, keepdims=True),
                               rays / np.linalg.norm(rays, axis=1, keepdims=True))


def test_undistortion_moves_nothing_without_a_lens_and_by_whole_pixels_with_a_shift():
    matrix = np.array([[50.0, 0, 20], [0, 60, 12], [0, 0, 1]])
    frame = np.random.default_rng(0).integers(0, 255, (24, 40, 3)).astype(np.uint8)
    assert np.array_equal(Undistortion(matrix, 40, 24, lambda rays: rays)(frame), frame)
    shifted = Undistortion(matrix, 40, 24, lambda rays: rays + np.array([3 / 50, 2 / 60]))(frame)
    assert np.array_equal(shifted[:-2, :-3], frame[2:, 3:])
    assert not shifted[-2:].any() and not shifted[:, -3:].any()


@pytest.mark.parametrize(("width", "height", "crop"), [(60, 40, None), (61, 40, 30), (40, 61, None)])
def test_crops_gaze_and_intrinsics_share_one_square(width, height, crop):
    side = crop or min(width, height)
    left, top = geometry.crop_offset(width, height, side)
    assert left == (width - side) // 2 and top == (height - side) // 2
    gaze = geometry.gaze_from_pixels(np.array([[left + side / 4, top + side / 2], [-500.0, 0]]), width, height, crop)
    np.testing.assert_allclose(gaze[0], [0.25, 0.5, 1], atol=1e-6)
    assert gaze[1].tolist() == [0, 0, 0]


def track(times, rotations, centres) -> Track:
    poses = np.tile(np.eye(4), (len(times), 1, 1))
    poses[:, :3, :3] = rotations.as_matrix()
    poses[:, :3, 3] = centres
    return Track(np.asarray(times, float), poses)


def test_poses_between_samples_lie_nearer_to_the_nearer_one():
    times = np.arange(0, 2.2, 0.05)
    turns = Rotation.from_euler("y", 40 * times[:, None], degrees=True)
    centres = np.c_[times, 2 * times**2, 0 * times]
    wanted = np.arange(60) / 30
    made, reason = resample_poses(track(times, turns, centres), wanted)
    assert not reason
    linear = np.stack([np.interp(wanted, times, centres[:, i]) for i in range(3)], -1)
    np.testing.assert_allclose(made[:, :3, 3], linear, atol=1e-9)
    exact = Slerp(times, turns)(wanted).as_matrix()
    assert geometry.rotation_angle_deg(exact.transpose(0, 2, 1) @ made[:, :3, :3]).max() < 0.01


@pytest.mark.parametrize(("jump", "turn"), [(1.0, 0), (0.0, 90)])
def test_a_trackers_jump_costs_the_poses(jump, turn):
    times = np.arange(60) / 30
    centres = np.zeros((60, 3))
    centres[30:, 0] = jump  # 1 m in a thirtieth of a second
    angles = np.where(np.arange(60) < 30, 0, turn)[:, None]
    made, reason = resample_poses(track(times, Rotation.from_euler("z", angles, degrees=True), centres), times)
    assert made is None and reason == "jump of the tracker"
    slow = track(times, Rotation.from_euler("z", angles / 20, degrees=True), centres / 20)
    assert resample_poses(slow, times)[0] is not None


def test_gaze_between_samples_is_weighed_and_gaps_stay_empty():
    made = resample_points(Track(np.array([0.0, 0.1, 0.2, 1.0]), np.array([[0.0, 8], [4, 0], [8, 0], [9, 9]])),
                           np.array([0.0, 0.025, 0.1, 0.175, 0.6, 1.0]))
    np.testing.assert_allclose(made[:4], [[0, 8], [1, 6], [4, 0], [7, 0]], atol=1e-9)
    assert np.isnan(made[4]).all()
    np.testing.assert_allclose(made[5], [9, 9])


def test_the_nearest_sample_by_hand():
    assert nearest(np.array([0.0, 1.0, 4.0]), np.array([-3, 0.4, 0.6, 2.4, 2.6, 9])).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest(np.array([5.0]), np.array([1.0, 9.0])).tolist() == [0, 0]


def test_what_a_clip_keeps_of_a_recording(tmp_path):
    """Odd sides, a principal point off the centre, depth with holes and NaN, gaze: every signal in one square."""
    from egom2p.datasets.checks import Statistics
    from egom2p.datasets.cutting import cut
    from egom2p.datasets.recording import Recording

    class Frames:
        def __init__(self, frames):
            self.frames, self.times, self.losses = frames, np.arange(len(frames)) / 10, None

        def read(self, index):
            return self.frames[index]

    rng = np.random.default_rng(0)
    frames = np.zeros((25, 40, 60, 3), np.uint8)
    frames[:, 12:20, 22:30] = 255
    depth = rng.uniform(1, 2, (25, 40, 60)).astype(np.float32)
    depth[:, :, 40:] = np.nan
    depth[:, 0:8, :] = -1
    recording = Recording("one", "train")
    recording.rgb, recording.depth = Frames(frames), Frames(depth)
    recording.intrinsics = np.array([[50.0, 0, 33], [0, 55, 18], [0, 0, 1]])
    recording.gaze = Track(np.arange(80) / 30, np.tile([26.0, 16.0], (80, 1)))  # the bright square's centre
    counts = Counter()
    clip, = cut(recording, "set", 20, 0, counts, Statistics())
    assert clip.signals["rgb"].shape == (16, 20, 20, 3) and counts["clips kept"] == 1
    bright = np.argwhere(clip.signals["rgb"][3, :, :, 0] > 128)
    centre = (bright.mean(0) + 0.5) / 20
    np.testing.assert_allclose(clip.signals["gaze"][0, :2], centre[::-1], atol=0.03)
    assert clip.signals["gaze"][:, 2].all()
    matrix = np.array(clip.meta["intrinsics"])
    np.testing.assert_allclose(matrix, [[25, 0, (33 - 10) / 2], [0, 27.5, 9], [0, 0, 1]])
    stored = clip.signals["depth"].astype(np.float32)
    assert np.isfinite(stored).all() and stored.min() == 0 and stored[stored > 0].min() >= 1
    assert not stored[:, :4].any() and not stored[:, :, 15:].any() and stored[:, 5:, :14].all()


@pytest.mark.parametrize("protocol", range(6))
def test_arctics_dictionaries_of_every_pickle_protocol(tmp_path, protocol):
    """ARCTIC's files hold a pickled dictionary, some by protocol 2 (old numpy), whose bytes come as Latin-1 text."""
    told = {"R_k_cam_np": np.random.default_rng(0).normal(size=(3, 3, 3)), "dist8": np.float32(0.25), "names": ["a", 1]}
    path = tmp_path / "one.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        box = np.empty((), object)
        box[()] = told
        pickle.dump(box, file, protocol)
    made = load_plain_pickle(path)
    assert np.array_equal(made["R_k_cam_np"], told["R_k_cam_np"]) and made["dist8"] == 0.25
    assert made["names"] == ["a", 1]


class Program:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_arctics_dictionaries_run_nothing(tmp_path, protocol, capsys):
    path = tmp_path / "one.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump({"x": Program()}, file, protocol)
    with pytest.raises(BadSequence, match="print, which is refused"):
        load_plain_pickle(path)
    assert not capsys.readouterr().out
