"""Procedural egocentric clips: a furnished room, a head that walks, turns and looks, exact geometry.

World axes: x, y on the floor, z up, metres. The camera is an OpenCV pinhole with a 90 degree field of view.
Colour and depth are ray cast at 8 fps from the same poses that are written as `world_from_camera` at 30 Hz
(both clocks start at 0; frame i of the video is at i / 8 s, pose j at j / 30 s). Clip number i is a pure
function of (seed, i). Every wall keeps its own hue, the lamp sits on the head (far is darker), and the eye
rests on bright balls, so that turns, distances and fixations can be read off the picture.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from egom2p import geometry
from egom2p.data.clips import RATES, Clip, write_clips
from egom2p.errors import UserError
from egom2p.processes import forks

CLIP_SECONDS = 2.0
VIDEO_FRAMES, MOTION_FRAMES = 16, 60
CLIPS_PER_SHARD = 250
DEPTH_RANGE_M = 8.0
GAZE_JITTER = 0.003
TEXTURE_WAVELENGTH_M = 2.0
TWO_BALLS = 0.3
SHARE_WITHOUT = {"depth": 0.1, "gaze": 0.1}

# Base colours (RGB in [0, 1]) of the faces x = 0, x = W, y = 0, y = D, floor, ceiling.
FACE_COLOURS = np.array([[0.75, 0.30, 0.25], [0.25, 0.60, 0.30], [0.25, 0.40, 0.80], [0.80, 0.70, 0.30],
                         [0.35, 0.25, 0.20], [0.85, 0.85, 0.90]], np.float32)
BALL_COLOUR = np.array([1.0, 0.15, 0.9], np.float32)


@dataclass(frozen=True)
class Scene:
    """size (3,): room extent, the room spans [0, size]. boxes (B, 2, 3): lower and upper corners.
    balls (K, 3): centres; ball_radius metres. Colours are RGB in [0, 1]."""

    size: np.ndarray
    face_colours: np.ndarray
    boxes: np.ndarray
    box_colours: np.ndarray
    balls: np.ndarray
    ball_radius: float


@dataclass(frozen=True)
class Walk:
    """Parameters of one smooth head motion; `poses(times)` evaluates it at any time."""

    start: np.ndarray  # (2,) metres
    speed: float  # m/s
    speed_swing: float  # relative change of speed over the clip
    heading: float  # radians, at time 0
    path_turn: float  # rad/s of the walking direction
    look: float  # radians between walking and looking direction, at time 0
    head_turn: float  # rad/s of the head on top of the path
    pitch: float
    pitch_rate: float
    eye_height: float
    bob_phase: float

    def positions(self, times: np.ndarray) -> np.ndarray:
        """(T,) seconds -> (T, 3) camera centres in metres."""
        fine = np.linspace(0, CLIP_SECONDS, 241)
        speed = self.speed * (1 + self.speed_swing * np.sin(np.pi * fine / CLIP_SECONDS - np.pi / 2))
        heading = self.heading + self.path_turn * fine
        velocity = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], -1)
        path = np.concatenate([np.zeros((1, 2)), np.cumsum((velocity[1:] + velocity[:-1]) / 2 * np.diff(fine)[:, None],
                                                           0)])
        steps = 2 * np.pi * (1.3 + 0.4 * self.speed) * times + self.bob_phase
        sway = 0.012 * self.speed * np.sin(steps / 2)
        x = self.start[0] + np.interp(times, fine, path[:, 0]) - sway * np.sin(self.heading)
        y = self.start[1] + np.interp(times, fine, path[:, 1]) + sway * np.cos(self.heading)
        z = self.eye_height + 0.025 * self.speed * np.sin(steps)
        return np.stack([x, y, z], -1)

    def poses(self, times: np.ndarray) -> np.ndarray:
        """(T,) seconds -> (T, 4, 4) world_from_camera."""
        yaw = self.heading + self.look + (self.path_turn + self.head_turn) * times
        pitch = self.pitch + self.pitch_rate * times
        forward = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], -1)
        right = np.stack([np.sin(yaw), -np.cos(yaw), np.zeros_like(yaw)], -1)
        world_from_camera = np.zeros((len(times), 4, 4))
        world_from_camera[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], -1)
        world_from_camera[:, :3, 3] = self.positions(times)
        world_from_camera[:, 3, 3] = 1
        return world_from_camera


def activity(walk: Walk) -> str:
    """What the wearer does, in a word: standing, turning (faster than 30 degrees a second) or walking."""
    if abs(walk.path_turn + walk.head_turn) > np.radians(30):
        return "turning"
    return "walking" if walk.speed > 0 else "standing"


def intrinsics(size: int) -> np.ndarray:
    """(3, 3) pinhole matrix of a size x size image, pixels; pixel centres are at half-integers."""
    return np.array([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1.0]])


def make_clip(seed: int, number: int, size: int = 64, dataset: str = "world", without: tuple[str, ...] = ()) -> Clip:
    """Clip `number` of the world `seed`, with size x size frames and the signals `without` left out."""
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    scene, walk = _make_scene(rng)
    video_times = np.arange(VIDEO_FRAMES) / RATES["rgb"]
    motion_times = np.arange(MOTION_FRAMES) / RATES["cam"]
    world_from_camera = walk.poses(motion_times)
    gaze, fixated = _make_gaze(rng, scene, world_from_camera)
    rgb, depth = render(scene, walk.poses(video_times), size)
    signals = {"rgb": rgb, "depth": depth, "cam": world_from_camera.astype(np.float32), "gaze": gaze}
    absent = set(without) | {name for name, share in SHARE_WITHOUT.items() if rng.random() < share}
    meta = {"source": f"world-{seed}", "start": number * CLIP_SECONDS, "rates": RATES,
            "intrinsics": intrinsics(size).tolist(), "side": size, "balls": scene.balls.tolist(),
            "fixated": fixated.tolist(), "activity": activity(walk)}
    return Clip(f"{seed:03d}-{number:06d}", dataset, {k: v for k, v in signals.items() if k not in absent}, meta)


def write_world(out: Path, clips: int, seed: int = 0, size: int = 64, dataset: str = "world",
                without: tuple[str, ...] = (), processes: int | None = None, first: int = 0) -> int:
    """Render clips first .. first + clips - 1 of world `seed` into `out/shard-NNNNNN.tar`; returns how many.

    The files do not depend on `processes`.
    """
    if clips < 1 or size < 8:
        raise UserError(f"a world needs at least 1 clip of at least 8 x 8 pixels, not {clips} of {size} x {size}")
    unknown = set(without) - set(RATES)
    if unknown:
        raise UserError(f"unknown signal '{sorted(unknown)[0]}' in --without; the world has {', '.join(RATES)}")
    jobs = [(out / f"shard-{i:06d}.tar", range(start, min(start + CLIPS_PER_SHARD, first + clips)), seed, size, dataset,
             without)
            for i, start in enumerate(range(first, first + clips, CLIPS_PER_SHARD))]
    others = sorted(set(out.glob("*.tar")) - {job[0] for job in jobs})
    if others:
        raise UserError(f"{out} already holds {others[0].name} of another world, which would be mixed in; choose "
                        f"another --out or remove it")
    with tqdm(total=clips, desc=f"world {out.name}", unit="clip") as bar:
        for done in _run_jobs(jobs, processes):
            bar.update(done)
    return clips


def render(scene: Scene, world_from_camera: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ray cast (T, 4, 4) poses: rgb (T, size, size, 3) uint8 and depth (T, size, size) float16 metres along z."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / (size / 2) - 1
    x, y = np.meshgrid(centres, centres)
    camera_rays = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3)
    rays = camera_rays[None] @ np.swapaxes(world_from_camera[:, :3, :3], -1, -2).astype(np.float32)
    # Axes first, (3, T, P): least and greatest over three whole arrays are several times faster than over triples.
    rays = np.ascontiguousarray(np.moveaxis(np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays), -1, 0))
    origin = world_from_camera[:, :3, 3].astype(np.float32).T[..., None]
    depth, colour = _hit_room(scene, origin, rays)
    for box, box_colour in zip(scene.boxes.astype(np.float32), scene.box_colours, strict=True):
        _hit_box(box, box_colour, origin, rays, depth, colour)
    for ball in scene.balls.astype(np.float32):
        _hit_ball(ball, scene.ball_radius, origin, rays, depth, colour)
    colour *= (1 / (1 + 0.05 * depth**2))[..., None]
    frames = np.clip(colour * 255 + 0.5, 0, 255).astype(np.uint8)
    shape = (len(world_from_camera), size, size)
    return frames.reshape(*shape, 3), np.where(depth > DEPTH_RANGE_M, 0, depth).astype(np.float16).reshape(shape)


def _least(a: np.ndarray) -> np.ndarray:
    """Over the first of (3, T, P)."""
    return np.minimum(np.minimum(a[0], a[1]), a[2])


def _greatest(a: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(a[0], a[1]), a[2])


def _hit_room(scene: Scene, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth (T, P) and colour (T, P, 3) of the walls, floor and ceiling, seen from inside. origin: (3, T, 1)."""
    ahead = rays > 0
    distance = (np.where(ahead, scene.size.astype(np.float32)[:, None, None], 0) - origin) / rays
    depth = _least(distance)
    first, second = distance[0] == depth, distance[1] == depth
    axis = np.where(first, 0, np.where(second, 1, 2))
    face = 2 * axis + np.where(first, ahead[0], np.where(second, ahead[1], ahead[2]))
    waves = np.sin((origin + rays * depth) * np.float32(2 * np.pi / TEXTURE_WAVELENGTH_M))
    pattern = np.where(first, waves[1] * waves[2], np.where(second, waves[0] * waves[2], waves[0] * waves[1]))
    return depth, scene.face_colours[face] * (1 + 0.25 * pattern)[..., None]


def _hit_box(box: np.ndarray, box_colour: np.ndarray, origin: np.ndarray, rays: np.ndarray,
             depth: np.ndarray, colour: np.ndarray) -> None:
    """Draw one axis-aligned box into `depth` and `colour` (slab method)."""
    to_lower, to_upper = ((corner[:, None, None] - origin) / rays for corner in box)
    near = np.minimum(to_lower, to_upper)
    enter, leave = _greatest(near), _least(np.maximum(to_lower, to_upper))
    hit = (enter < leave) & (enter > 0.05) & (enter < depth)
    depth[hit] = enter[hit]
    colour[hit] = box_colour * np.array([0.8, 0.95, 1.15], np.float32)[near[:, hit].argmax(0)][:, None]


def _hit_ball(ball: np.ndarray, radius: float, origin: np.ndarray, rays: np.ndarray,
              depth: np.ndarray, colour: np.ndarray) -> None:
    """Draw one sphere into `depth` and `colour`."""
    to_ball = ball[:, None, None] - origin
    a = rays[0] ** 2 + rays[1] ** 2 + rays[2] ** 2
    b = rays[0] * to_ball[0] + rays[1] * to_ball[1] + rays[2] * to_ball[2]
    discriminant = b**2 - a * ((to_ball**2).sum(0) - np.float32(radius) ** 2)
    enter = (b - np.sqrt(np.maximum(discriminant, 0))) / a
    hit = (discriminant > 0) & (enter > 0.05) & (enter < depth)
    depth[hit] = enter[hit]
    normal = (np.broadcast_to(to_ball, rays.shape)[:, hit] - rays[:, hit] * enter[hit]) / np.float32(radius)
    facing = (normal * rays[:, hit]).sum(0) / np.sqrt(a[hit])
    colour[hit] = BALL_COLOUR * (0.6 + 0.6 * facing)[:, None]


def _make_scene(rng: np.random.Generator) -> tuple[Scene, Walk]:
    """A room, a walk that stays inside it, furniture off the path, and one or two balls in view."""
    size = np.array([rng.uniform(5, 8), rng.uniform(5, 8), rng.uniform(2.5, 3.0)])
    walk = _make_walk(rng, size)
    times = np.linspace(0, CLIP_SECONDS, 9)
    path = walk.positions(times)
    boxes = []
    for _ in range(rng.integers(2, 5)):
        extent = np.array([rng.uniform(0.6, 1.5), rng.uniform(0.6, 1.5), rng.uniform(0.5, 1.8)])
        corner = np.append(rng.uniform(0, 1, 2) * (size[:2] - extent[:2]), 0)
        gap = np.maximum(np.maximum(corner - path, path - corner - extent), 0)[:, :2]
        if np.linalg.norm(gap, axis=-1).min() > 0.8:
            boxes.append([corner, corner + extent])
    boxes = np.array(boxes).reshape(-1, 2, 3)
    radius = 0.28
    balls = [ball for _ in range(1 + (rng.random() < TWO_BALLS))
             if (ball := _place_ball(rng, walk, size, boxes, radius)) is not None]
    tint = FACE_COLOURS * rng.uniform(0.85, 1.15, (6, 1)).astype(np.float32)
    colours = rng.uniform(0.15, 0.9, (len(boxes), 3)).astype(np.float32)
    return Scene(size, tint, boxes, colours, np.array(balls).reshape(-1, 3), radius), walk


def _make_walk(rng: np.random.Generator, size: np.ndarray, margin: float = 0.7) -> Walk:
    """A walk whose whole path keeps `margin` metres from the walls."""
    standing = rng.random() < 0.1
    walk = Walk(start=np.zeros(2), speed=0.0 if standing else rng.uniform(0.1, 1.6), speed_swing=rng.uniform(-0.4, 0.4),
                heading=rng.uniform(-np.pi, np.pi), path_turn=rng.normal(0, 0.3), look=rng.normal(0, 0.3),
                head_turn=rng.normal(0, 0.35), pitch=rng.normal(-0.2, 0.1), pitch_rate=rng.normal(0, 0.08),
                eye_height=rng.uniform(1.5, 1.75), bob_phase=rng.uniform(0, 2 * np.pi))
    path = walk.positions(np.linspace(0, CLIP_SECONDS, 17))[:, :2]
    low, high = margin - path.min(0), size[:2] - margin - path.max(0)
    return Walk(**{**vars(walk), "start": low + rng.uniform(0, 1, 2) * (high - low)})


def _place_ball(rng: np.random.Generator, walk: Walk, size: np.ndarray, boxes: np.ndarray,
                radius: float) -> np.ndarray | None:
    """A spot the camera sees half-way through the clip, clear of walls, boxes and path; None if 40 tries fail."""
    half_way = walk.poses(np.array([CLIP_SECONDS / 2]))[0]
    path = walk.positions(np.linspace(0, CLIP_SECONDS, 9))
    for _ in range(40):
        ray = np.append(np.clip(rng.normal(0, 0.4, 2), -0.8, 0.8), 1)
        ball = half_way[:3, :3] @ ray * rng.uniform(1.2, 3.5) + half_way[:3, 3]
        clear_of_walls = np.all(ball > 0.3) and np.all(ball < size - 0.3)
        clear_of_boxes = all(np.linalg.norm(np.maximum(np.maximum(b[0] - ball, ball - b[1]), 0)) > radius
                             for b in boxes)
        if not (clear_of_walls and clear_of_boxes and np.linalg.norm(path - ball, axis=-1).min() > 0.8):
            continue
        if not any(_blocks(box, half_way[:3, 3], ball) for box in boxes):
            return ball
    return None


def _blocks(box: np.ndarray, eye: np.ndarray, point: np.ndarray) -> bool:
    """Whether the box cuts the segment from `eye` to `point`."""
    step = np.where(np.abs(point - eye) < 1e-9, 1e-9, point - eye)
    low, high = (box[0] - eye) / step, (box[1] - eye) / step
    enter, leave = np.minimum(low, high).max(), np.maximum(low, high).min()
    return enter < min(leave, 1) and leave > 0


def _make_gaze(rng: np.random.Generator, scene: Scene, world_from_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaze (T, 3) and the index (T,) of the fixated ball, -1 when there is none.

    The eye rests on a ball; with two balls, one clip in two holds a saccade (two frames, 67 ms). Blinks
    drop three to six frames. A ball outside the frame by more than its fifth gives invalid frames.
    """
    num_frames = len(world_from_camera)
    fixated = np.full(num_frames, -1)
    if len(scene.balls):
        first = rng.integers(len(scene.balls))
        fixated[:] = first
        if len(scene.balls) == 2 and rng.random() < 0.5:
            fixated[rng.integers(15, num_frames - 15) :] = 1 - first
    if not len(scene.balls):
        return np.zeros((num_frames, 3), np.float32), fixated
    in_camera = np.einsum("tij,kj->tki", geometry.invert(world_from_camera),
                          np.c_[scene.balls, np.ones(len(scene.balls))])
    depth = in_camera[..., 2]
    points = geometry.project(np.concatenate([in_camera[..., :2], np.maximum(depth, 1e-3)[..., None]], -1),
                              intrinsics(1))
    gaze = points[np.arange(num_frames), fixated]
    for jump in np.flatnonzero(np.diff(fixated)):
        gaze[jump + 1] = (gaze[jump] + gaze[min(jump + 2, num_frames - 1)]) / 2
    gaze = gaze + rng.normal(0, GAZE_JITTER, gaze.shape)
    valid = geometry.gaze_is_valid(gaze) & (depth[np.arange(num_frames), fixated] > 0.05)
    if rng.random() < 0.4:
        blink = rng.integers(0, num_frames - 6)
        valid[blink : blink + rng.integers(3, 7)] = False
    return np.concatenate([np.where(valid[:, None], gaze, 0), valid[:, None]], -1).astype(np.float32), fixated


def _run_jobs(jobs: list[tuple], processes: int | None) -> Iterator[int]:
    processes = min(len(jobs), processes or multiprocessing.cpu_count())
    if processes <= 1:
        yield from map(_write_shard, jobs)
        return
    with forks().Pool(processes) as pool:
        yield from pool.imap_unordered(_write_shard, jobs)


def _write_shard(job: tuple) -> int:
    path, numbers, seed, size, dataset, without = job
    return write_clips(path, (make_clip(seed, n, size, dataset, without) for n in numbers))
