"""ARCTIC (Fan et al., "ARCTIC: A Dataset for Dexterous Bimanual Hand-Object Manipulation", CVPR 2023).

Get it: https://arctic.is.tue.mpg.de (registration; the MPI licence is non-commercial and forbids redistribution).
Layout and conventions by zc-alexfan/arctic docs/data/data_doc.md and src/arctic/processing.py; view 0 is the
head-mounted camera:
  cropped_images/SUBJECT/SEQUENCE/0/%05d.jpg   2800 x 2000 resized by 0.3 (840 x 600), distorted as captured; or
                                               images/ at full size
  raw_seqs/SUBJECT/SEQUENCE.egocam.dist.npy    a pickled dictionary: R_k_cam_np (T, 3, 3), T_k_cam_np (T, 3, 1): camera
                                               from world, OpenCV axes, metres; intrinsics (3, 3) at full size; dist8:
                                               OpenCV's rational model
  meta/misc.json                               ioi_offset of each subject: row = image number - ioi_offset; image_size
The pickle is read by an unpickler that knows numpy arrays and plain containers and nothing else. Frames are
undistorted. Ten images at either end may be black and are left out, as the authors do. 30 fps, no time stamps, no
captured depth, no gaze. s05 is held out, as in EgoM2P.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from egom2p import geometry
from egom2p.datasets.lens import Undistortion, distort_rational
from egom2p.datasets.recording import Adapter, BadSequence, ImagePictures, MappedPictures, Recording, Track, find, need

RATE = 30.0
FULL = [2800, 2000]
KINDS = ("cropped_images", "images", "croppped_images")  # the authors' page spells the last
BLACK_ENDS = 10
HELD_OUT = {"s05"}


class Arctic(Adapter):
    name = "arctic"
    layout = ("cropped_images/SUBJECT/SEQUENCE/0/%05d.jpg (or images/), "
              "raw_seqs/SUBJECT/SEQUENCE.egocam.dist.npy, meta/misc.json")

    def sequences(self, root: Path) -> list[str]:
        base = self._base(root)
        found = {p.parent.relative_to(base / kind).as_posix() for kind in KINDS for p in (base / kind).glob("s*/*/0")}
        return need(root, sorted(found), self)

    def files(self, root: Path, sequence: str) -> list[Path]:
        base = self._base(root)
        return [base / f"raw_seqs/{sequence}.egocam.dist.npy",
                *(p for kind in KINDS for p in sorted((base / kind / sequence / "0").glob("*.jpg")))]

    def open(self, root: Path, sequence: str) -> Recording:
        base, subject = self._base(root), sequence.split("/")[0]
        folders = [base / kind / sequence / "0" for kind in KINDS]
        folder = next((f for f in folders if next(f.glob("*.jpg"), None)), folders[0])
        camera = load_plain_pickle(find(base / f"raw_seqs/{sequence}.egocam.dist.npy"))
        known = json.loads(find(base / "meta/misc.json").read_text())
        if subject not in known:
            raise BadSequence(f"meta/misc.json does not know the subject {subject}")
        offset = int(known[subject]["ioi_offset"])
        camera_from_world = np.tile(np.eye(4), (len(camera["R_k_cam_np"]), 1, 1))
        camera_from_world[:, :3, :3] = camera["R_k_cam_np"]
        camera_from_world[:, :3, 3] = np.asarray(camera["T_k_cam_np"]).reshape(-1, 3)
        rows = {int(p.stem) - offset: p for p in folder.glob("*.jpg") if p.stem.isdigit()}
        used = sorted(r for r in rows if BLACK_ENDS <= r < len(camera_from_world) - BLACK_ENDS)
        if not used:
            raise BadSequence(f"{folder}: no image has a camera pose (ioi_offset {offset})")
        images = ImagePictures([rows[r] for r in used], np.array(used) / RATE)
        height, width = images.read(0).shape[:2]
        full_width, full_height = known[subject].get("image_size", [FULL])[0]
        scale = np.diag([width / full_width, height / full_height, 1.0])
        intrinsics = scale @ np.asarray(camera["intrinsics"], np.float64)
        undistort = Undistortion(intrinsics, width, height, lambda rays: distort_rational(rays, camera["dist8"]))
        return Recording(sequence, "val" if subject in HELD_OUT else "train", rgb=MappedPictures(images, undistort),
                         cam=Track(np.arange(len(camera_from_world)) / RATE, geometry.invert(camera_from_world)),
                         intrinsics=intrinsics)

    def _base(self, root: Path) -> Path:
        """Where the folders lie: `root`, or below it as the authors' scripts unpack them."""
        places = [root / p for p in ("", "data", "arctic_data/data", "data/arctic_data/data",
                                     "unpack/arctic_data/data")]
        return next((p for p in places if any((p / kind).is_dir() for kind in KINDS)), root)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `_codecs.encode` in old pickles, which hold bytes as Latin-1 text."""
    if encoding.lower().replace("-", "") not in ("latin1", "iso88591"):
        raise BadSequence(f"a pickled file asks for the encoding {encoding}, which is refused")
    return text.encode("latin-1")


def _no_bytes(*parts: Any) -> bytes:
    """Stands for `bytes` in old pickles, which only make empty ones with it."""
    if parts:
        raise BadSequence("a pickled file makes bytes in a way that is refused")
    return b""


class _PlainUnpickler(pickle.Unpickler):
    """Numpy arrays and plain containers; anything else is refused, so that nothing in a file is ever run.

    Protocols 0 to 2 (old numpy) also ask for `_codecs.encode` and `bytes`, for the arrays' bytes: they get functions of
    ours that make bytes of text and nothing else.
    """

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")} | {
        (f"numpy.{core}.{module}", name) for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))}
    OWN = {("_codecs", "encode"): _latin1, ("__builtin__", "bytes"): _no_bytes, ("builtins", "bytes"): _no_bytes}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.OWN:
            return self.OWN[module, name]
        if (module, name) not in self.ALLOWED:
            raise BadSequence(f"a pickled file asks for {module}.{name}, which is refused")
        if module.startswith("numpy.core."):
            module = module.replace("numpy.core.", "numpy._core." if hasattr(np, "_core") else "numpy.core.")
        return super().find_class(module, name)


def load_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a `.npy` that holds a pickled object array of one element."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = (np.lib.format.read_array_header_1_0
                           if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
        if not dtype.hasobject:
            raise BadSequence(f"{path} is {dtype} {shape}, expected a dictionary")
        loaded = _PlainUnpickler(stream, encoding="latin1").load()
    except (ValueError, EOFError, TypeError, AttributeError, KeyError, IndexError, pickle.UnpicklingError) as error:
        raise BadSequence(f"{path}: {error}") from error
    value = loaded.item() if isinstance(loaded, np.ndarray) else loaded
    if not isinstance(value, dict):
        raise BadSequence(f"{path} holds {type(value).__name__}, expected a dictionary")
    return value
