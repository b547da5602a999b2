"""`egom2p prepare`: clips a second on one core, and where the time goes.

    python -m benchmarks.prepare [--width 448] [--height 252] [--seconds 8] [--size 256]

One procedural recording as a folder of one's own videos (H.264 at 30 fps, depth as .npy, a 30 Hz trajectory, gaze) is
prepared in this process. Stages are timed by running them alone on the same recording: decoding every frame, decoding
and resizing the frames that are used, poses and gaze, writing.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.printing import heading, say
from egom2p.data.clips import write_clips
from egom2p.data.video import decode_video
from egom2p.datasets.checks import Statistics
from egom2p.datasets.cutting import cut
from egom2p.datasets.prepare import Job, PrepareArgs, prepare_sequence
from egom2p.datasets.recording import VideoPictures
from egom2p.datasets.video import VideoFolder
from egom2p.signals.writers import write_tum, write_video
from tests.datasets.miniature import Miniature


def write_recording(root: Path, width: int, height: int, seconds: float) -> None:
    mini = Miniature(0, width, height, 30, seconds)
    rgb, depth = mini.frames
    write_video(root / "walk.mp4", rgb, 30)
    np.save(root / "walk.depth.npy", depth.astype(np.float16))
    write_tum(root / "walk.cam.tum", mini.poses(mini.times), 30)
    np.savetxt(root / "walk.intrinsics.txt", mini.intrinsics)
    gaze = zip(mini.times, mini.gaze_pixels(mini.times), strict=True)
    (root / "walk.gaze.csv").write_text("time,x,y\n" + "\n".join(f"{t},{x},{y}" for t, (x, y) in gaze))


def seconds_of(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--height", type=int, default=252)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    heading(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "raw", Path(folder) / "out"
        root.mkdir()
        write_recording(root, args.width, args.height, args.seconds)
        settings, job = PrepareArgs(args.size, workers=1), Job("walk.mp4", "", "walk_mp4", "")
        whole = seconds_of(lambda: prepare_sequence("video", root, out, settings, job))
        decode = seconds_of(lambda: decode_video(root / "walk.mp4"))
        made = []

        def cut_all(with_tracks: bool) -> None:
            recording = VideoFolder().open(root, "walk.mp4")
            recording.rgb = VideoPictures(root / "walk.mp4")
            if not with_tracks:
                recording.cam = recording.gaze = recording.depth = None
            made[:] = cut(recording, "video", settings.size, settings.limit, Counter(), Statistics())

        pictures, everything = seconds_of(lambda: cut_all(False)), seconds_of(lambda: cut_all(True))
        write = seconds_of(lambda: write_clips(out / "again.tar", made))
    clips = len(made)
    say(f"{args.width} x {args.height} at 30 fps -> {args.size}, {clips} clips, one core: {clips / whole:.2f} "
        f"clips/s ({2 * clips / whole:.1f} x real time)")
    for name, value in (("decode every frame", decode), ("crop and resize", max(0.0, pictures - decode)),
                        ("depth, poses, gaze, checks", max(0.0, everything - pictures)), ("write", write)):
        say(f"  {name:28} {value:6.2f} s {value / whole:6.0%}")


if __name__ == "__main__":
    main()
