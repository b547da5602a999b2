"""EgoM2P: one masked transformer over the tokens of egocentric video, depth, camera motion and gaze."""
