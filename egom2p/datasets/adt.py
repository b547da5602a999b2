"""Aria Digital Twin (Pan et al., ICCV 2023); post-training and evaluation.

Get it: https://www.projectaria.com/datasets/adt (own licence). Layout by projectaria_tools' ADT docs and reader, seen
on the authors' test sequence; each folder that holds a video.vrs is one recording (version 1 has a SUBTOUR folder below
the sequence's):
  video.vrs                           stream 214-1, 1408 x 1408 fisheye, 30 fps, turned
  depth_images.vrs                    the stream described as "214-1": integers in millimetres along the optical axis,
  same
                                      size, fisheye; 0 = no reading; depth_images_with_skeleton.vrs shows the wearer too
  aria_trajectory.csv                 MPS columns: world from device, device time; else
  mps/slam/closed_loop_trajectory.csv
  eyegaze.csv                         MPS columns, with depth; else mps/eye_gaze/
Depth along the optical axis is confirmed on that sequence: its table is one plane (10 380 points within 2 cm of height,
2 702 when read along rays). Frames and depth are undistorted to a pinhole of the same focal length and turned upright.
Everything is `test`: no official split exists. Needs projectaria-tools.
"""

from pathlib import Path

from egom2p.datasets.aria import AriaRecording, gaze_file, read_trajectory
from egom2p.datasets.recording import Adapter, Recording, find, need
from egom2p.files import walk

VIDEOS = ("video.vrs", "main_recording.vrs")
PLAIN, WEARER = "depth_images.vrs", "depth_images_with_skeleton.vrs"


class ADT(Adapter):
    name = "adt"
    layout = "SEQUENCE/{video.vrs, depth_images.vrs, aria_trajectory.csv, eyegaze.csv}"

    def __init__(self, with_wearer: bool = False) -> None:
        self.with_wearer = with_wearer

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted({p.parent.relative_to(root).as_posix() for p in walk(root) if p.name in VIDEOS}), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence
        aria = AriaRecording(find(*(folder / name for name in VIDEOS)))
        recording = Recording(sequence, "test", rgb=aria.rgb(), intrinsics=aria.intrinsics)
        recording.depth = recording.attempt("depth", aria.depth, self._depth(folder, recording))
        recording.cam = recording.attempt("cam", lambda: aria.camera_track(read_trajectory(
            find(folder / "aria_trajectory.csv", folder / "mps/slam/closed_loop_trajectory.csv"))))
        gaze = next((p for p in (folder / "eyegaze.csv", gaze_file(folder / "mps/eye_gaze")) if p and p.exists()), None)
        if gaze:
            recording.gaze = recording.attempt("gaze", aria.gaze, gaze)
        return recording

    def _depth(self, folder: Path, recording: Recording) -> Path:
        """The depth file that is asked for, said in notes and in every clip's json."""
        wanted = (WEARER, PLAIN) if self.with_wearer else (PLAIN, WEARER)
        found = next((name for name in wanted if (folder / name).exists()), wanted[0])
        if found == wanted[1]:
            recording.notes.append(f"{wanted[0]} is not there: depth is of {found}, which "
                                   f"{'shows' if found == WEARER else 'does not show'} the wearer")
        recording.meta["depth_file"] = found
        return folder / found


