"""Aria Digital Twin (Pan et al., ICCV 2023); post-training and evaluation.

Get it: https://www.projectaria.com/datasets/adt (own licence). Layout by projectaria_tools' ADT docs (V2):
  SEQUENCE/video.vrs               (main_recording.vrs in V1) stream 214-1, 1408 x 1408 fisheye, 30 fps, turned
  SEQUENCE/depth_images.vrs        same labels; integers in millimetres along the optical axis, same size, fisheye; 0 = no reading
  SEQUENCE/aria_trajectory.csv     MPS columns: world from device, device time
  SEQUENCE/eyegaze.csv             MPS columns, with depth
Frames and depth are undistorted to a pinhole of the same focal length and turned upright. Everything is `test`: no official split exists.
Needs projectaria-tools.
"""

from pathlib import Path

import numpy as np

from egom2p.datasets.aria import RAW_FROM_UPRIGHT, RGB, VrsPictures, open_vrs, read_trajectory, turn_intrinsics
from egom2p.datasets.hot3d import _pinhole, vrs_gaze
from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import Adapter, Recording, Track, find, need


class ADT(Adapter):
    name = "adt"
    layout = "SEQUENCE/{video.vrs, depth_images.vrs, aria_trajectory.csv, eyegaze.csv}"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.parent.name for p in root.glob("*/aria_trajectory.csv")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence
        core, provider = open_vrs(find(folder / "video.vrs", folder / "main_recording.vrs"))
        domain = core.sensor_data.TimeDomain.DEVICE_TIME
        stream = provider.get_stream_id_from_label(RGB)
        stamps = np.array(provider.get_timestamps_ns(stream, domain), np.int64)
        calibration = provider.get_device_calibration()
        camera = calibration.get_camera_calib(RGB)
        width, height = (int(n) for n in camera.get_image_size())
        params = np.array(camera.projection_params(), np.float64)
        raw = _pinhole(params)
        undistort = Undistortion(raw, width, height, lambda rays: distort_fisheye624(rays, params[3:]))
        device_from_camera = np.asarray(camera.get_transform_device_camera().to_matrix(), np.float64)
        depth = None
        if (folder / "depth_images.vrs").exists():
            _, depths = open_vrs(folder / "depth_images.vrs")
            depth_stream = depths.get_stream_id_from_label(RGB)
            depth = VrsPictures(depths, depth_stream, depths.get_timestamps_ns(depth_stream, domain), stamps[0], undistort, depth=True)
        device, poses = read_trajectory(folder / "aria_trajectory.csv")
        return Recording(sequence, "test", rgb=VrsPictures(provider, stream, stamps, stamps[0], undistort), depth=depth,
                         cam=Track((device - stamps[0]) / 1e9, poses @ device_from_camera @ RAW_FROM_UPRIGHT),
                         gaze=vrs_gaze(folder / "eyegaze.csv", calibration, device_from_camera, raw, height, int(stamps[0])), intrinsics=turn_intrinsics(raw, height))
