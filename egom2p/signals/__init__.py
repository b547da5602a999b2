"""The kinds of raw signal. Adding one is a file beside these and an entry in `KINDS`."""

from egom2p.signals.depth import DEPTH
from egom2p.signals.gaze import GAZE
from egom2p.signals.kind import SignalKind
from egom2p.signals.motion import MOTION
from egom2p.signals.pose import POSE
from egom2p.signals.rgb import RGB

KINDS: dict[str, SignalKind] = {kind.name: kind for kind in (RGB, DEPTH, POSE, GAZE, MOTION)}

__all__ = ["KINDS", "SignalKind"]
