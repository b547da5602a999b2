"""Files that grow: what another program reads from them."""

import numpy as np
from scipy.spatial.transform import Rotation

from egom2p.signals.writers import ColmapWriter


def test_colmap_images_are_camera_from_world(tmp_path):
    """COLMAP's documented text format, read by hand with scipy; pycolmap 4.2 read the same file to 1e-8."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, :3, :3] = Rotation.random(5, random_state=1).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(5, 3))
    writer = ColmapWriter(tmp_path / "cam_colmap", 30)
    writer.append(poses[:2])
    writer.append(poses[2:])
    writer.close()
    lines = (tmp_path / "cam_colmap/images.txt").read_text().split("\n")[1:]
    assert lines[1::2] == [""] * 5 and len(lines) == 11  # an image, its (no) points
    for number, (line, pose) in enumerate(zip(lines[0:10:2], poses, strict=True), 1):
        index, w, x, y, z, *shift, camera, name = line.split()
        assert (index, camera, name) == (str(number), "1", f"frame_{number:06d}.png")
        camera_from_world = np.eye(4)
        camera_from_world[:3, :3] = Rotation.from_quat([float(v) for v in (x, y, z, w)]).as_matrix()
        camera_from_world[:3, 3] = [float(v) for v in shift]
        np.testing.assert_allclose(camera_from_world @ pose, np.eye(4), atol=1e-6)
    assert (tmp_path / "cam_colmap/cameras.txt").read_text().splitlines()[1].split()[1] == "SIMPLE_PINHOLE"
    assert (tmp_path / "cam_colmap/points3D.txt").is_file()
