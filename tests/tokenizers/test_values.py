"""Numbers of the tokenizers: the moving averages of codes, gradients, weights of channels, layouts of pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from egom2p.modalities import Modality
from egom2p.signals.depth import relative_inverse_depth
from egom2p.signals.pose import PoseSeries
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer, with_statistics
from egom2p.tokenizers.perceptual import Critic, Lpips, adversarial_loss
from egom2p.tokenizers.quantize import EmaCodebook
from egom2p.tokenizers.video import VideoArgs, VideoTokenizer


def test_one_update_of_the_codebook_by_hand():
    """Counts and sums move by 1 - decay towards the batch's, and a code is their quotient (van den Oord 2017, A.1)."""
    torch.manual_seed(0)
    book = EmaCodebook(4, 3, decay=0.9, dead_below=0.0)
    codes, sums, counts = book.embed.clone(), book.embed_sum.clone(), book.cluster_size.clone()
    latents = torch.randn(2, 5, 3)
    _, ids, _ = book.train()(latents)
    unit = F.normalize(latents, dim=-1).reshape(-1, 3)
    assert torch.equal(ids.flatten(), (unit @ F.normalize(codes, dim=-1).T).argmax(-1))
    book.update(0, 1)
    for code in range(4):
        mine = unit[ids.flatten() == code]
        count = 0.9 * counts[code] + 0.1 * len(mine)
        total = 0.9 * sums[code] + 0.1 * mine.sum(0)
        assert book.cluster_size[code] == pytest.approx(count.item(), rel=1e-5)
        torch.testing.assert_close(book.embed[code], total / count)


def test_codes_in_use_stay_in_a_small_batch():
    """After the first step has given nearly all codes a latent, few are replaced: each of 64 clusters is met some two
    times a step, which a threshold of two in every step would call dead."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(64, 8), dim=-1)
    book = EmaCodebook(128, 8).train()
    replaced = []
    for step in range(60):
        met = centres[torch.randint(64, (4, 30))] + 0.02 * torch.randn(4, 30, 8)
        book(met)
        before = book.embed.clone()
        book.update(0, step)
        dead = (F.cosine_similarity(before, book.embed) < 0.9).sum().item()  # others move a little
        replaced.append(dead)
    assert replaced[0] > 100 and max(replaced[30:]) < 16, replaced


def test_codes_are_found_in_float32_whatever_is_trained_in():
    torch.manual_seed(0)
    book, latents = EmaCodebook(256, 32).eval(), torch.randn(64, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids, _ = book(latents)
        half = book(latents.bfloat16())
    assert torch.equal(ids, book(latents)[1]) and codes.dtype == torch.float32
    assert torch.equal(half[1], book(latents.bfloat16().float())[1])


def test_gradients_go_straight_through_the_codebook():
    book = EmaCodebook(4, 3).eval()
    latents = torch.randn(1, 5, 3, requires_grad=True)
    codes, _, _ = book(latents)
    weight = torch.randn(1, 5, 3)
    (gradient,) = torch.autograd.grad((codes * weight).sum(), latents)
    (wanted,) = torch.autograd.grad((F.normalize(latents, dim=-1) * weight).sum(), latents)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().max() > 0


def motion(**args) -> MotionTokenizer:
    torch.manual_seed(0)
    return MotionTokenizer(Modality("hands", 240, (4,), "motion"),
                           MotionArgs(8, (0.0, 0.0), (1.0, 1.0), dim=16, depth=1, num_heads=2, quantizer="fsq", **args))


def test_channels_are_weighed_in_the_loss():
    x = torch.randn(3, 8, 2)
    plain, heavy = motion(), motion(channel_weights=(1.0, 10.0))
    heavy.load_state_dict(plain.state_dict())
    with torch.no_grad():
        codes = plain.quantizer(plain.latents(x))[0]
        squares = (plain.decode_codes(codes) - x) ** 2
        assert plain.training_loss(x)[1]["error"].item() == pytest.approx(squares.mean().item(), rel=1e-5)
        wanted = (squares * torch.tensor([1.0, 10.0])).mean().item()
        assert heavy.training_loss(x)[1]["error"].item() == pytest.approx(wanted, rel=1e-5)


def test_only_valid_frames_count_in_the_loss():
    torch.manual_seed(0)
    gaze = MotionTokenizer(Modality("gaze", 240, (4,), "gaze"),
                           MotionArgs(8, (0.5, 0.5), (0.2, 0.2), dim=16, depth=1, num_heads=2, quantizer="fsq"))
    x = torch.randn(2, 8, 3)
    x[..., 2] = (torch.arange(8) % 3 != 0).float()
    with torch.no_grad():
        out = gaze.decode_codes(gaze.quantizer(gaze.latents(x))[0])
        valid = x[..., 2] > 0
        wanted = ((out - x[..., :2]) ** 2)[valid].mean().item()
        assert gaze.training_loss(x)[1]["error"].item() == pytest.approx(wanted, rel=1e-5)


def test_the_loss_of_clips_is_the_mean_of_theirs_however_many_frames_are_valid():
    """So that micro-batches and ranks add up to it (design invariant 2)."""
    torch.manual_seed(0)
    gaze = MotionTokenizer(Modality("gaze", 240, (4,), "gaze"),
                           MotionArgs(8, (0.5, 0.5), (0.2, 0.2), dim=16, depth=1, num_heads=2, quantizer="fsq"))
    x = torch.randn(4, 8, 3)
    x[..., 2] = (torch.arange(8) < torch.tensor([[1], [3], [8], [0]])).float()
    with torch.no_grad():
        each = [gaze.training_loss(clip[None])[0].item() for clip in x]
        assert gaze.training_loss(x)[0].item() == pytest.approx(np.mean(each), rel=1e-5)
        assert each[3] == 0


def test_a_stand_in_leaves_no_trace_in_the_codebook():
    torch.manual_seed(0)
    books = [EmaCodebook(8, 4).train() for _ in range(3)]
    for book in books[1:]:
        book.load_state_dict(books[0].state_dict())
    latents = torch.randn(2, 6, 4)
    books[0](latents)
    for x in (latents, torch.randn(1, 6, 4)):
        books[1](x)
    books[1].leave_out_the_last()
    books[2](latents)
    books[2].leave_out_the_last()
    before = {k: v.clone() for k, v in books[2].state_dict().items()}
    for book in books:
        book.update(seed=0, step=0)
    assert all(torch.equal(v, books[1].state_dict()[k]) for k, v in books[0].state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in books[2].state_dict().items())


@pytest.mark.parametrize("kind", ["series", "picture"])
def test_ids_and_signals_do_not_depend_on_a_training_in_bfloat16_around_them(kind):
    torch.manual_seed(0)
    if kind == "series":
        tokenizer = MotionTokenizer(Modality("gaze", 240, (4,), "gaze"), MotionArgs(
            8, (0.5, 0.5), (0.2, 0.2), dim=16, depth=1, num_heads=2, quantizer="fsq")).eval()
        signal = torch.rand(8, 3).numpy()
    else:
        tokenizer = VideoTokenizer(Modality("rgb", 512, (5, 2, 2), "rgb"), VideoArgs(dim=16, depth=1)).eval()
        signal = torch.randint(0, 255, (16, 16, 16, 3), dtype=torch.uint8).numpy()
    ids, back = tokenizer.encode(signal), tokenizer.decode(tokenizer.encode(signal))
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(tokenizer.encode(signal), ids)
        assert np.array_equal(tokenizer.decode(ids), back)
        codes = tokenizer.codes()[torch.from_numpy(ids.reshape(-1))]
        assert np.allclose(tokenizer.decode_from_codes(codes), back, atol=1e-5)


def test_poses_are_relative_to_the_first_frame_and_scaled():
    """Rows of numbers by scipy: the rotation's first two columns, then metres, in the first camera's frame."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[:, :3, :3] = Rotation.random(6, random_state=0).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(6, 3))
    mean, std = tuple(rng.normal(size=9)), tuple(rng.uniform(0.5, 2, 9))
    series = PoseSeries(mean, std)
    made = series.normalize(poses)
    first = np.linalg.inv(poses[0])
    for row, pose in zip(made, poses, strict=True):
        relative = first @ pose
        nine = np.r_[relative[:3, 0], relative[:3, 1], relative[:3, 3]]
        np.testing.assert_allclose(row[:9], (nine - mean) / std, atol=1e-5)
    np.testing.assert_allclose(series.denormalize(made[:, :9]), first @ poses, atol=1e-4)


def test_depth_is_inverse_near_is_one_and_holes_are_far():
    depth = np.array([[[1.0, 2.0], [4.0, 0.0]]], np.float16)
    np.testing.assert_allclose(relative_inverse_depth(depth), [[[1.0, (0.5 - 0.25) / 0.75], [0.0, 0.0]]], atol=1e-6)


def video(depth: int = 0) -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(Modality("rgb", 512, (5, 2, 3), "rgb"), VideoArgs(16, (4, 8, 8), dim=16, depth=depth))


def test_files_and_clips_of_the_same_frames_have_the_same_ids():
    """A video file's frames go through `encode_frames`, training clips through the signal's normalisation."""
    frames = np.random.default_rng(0).integers(0, 256, (16, 16, 24, 3)).astype(np.uint8)
    made = video(1)
    assert np.array_equal(made.encode_frames(frames), made.encode(frames))
    with torch.no_grad():
        x = torch.from_numpy(made.signal.normalize(frames))
    assert x.shape == (3, 16, 16, 24)
    np.testing.assert_allclose(x[2, 5, 7, 9].item(), frames[5, 7, 9, 2] / 127.5 - 1, atol=1e-6)


def test_a_token_sees_its_own_patch_of_rows_and_columns():
    """Without mixing blocks a pixel changes the latent of one token: frames (1 +) 4, rows 8, columns 8 of it."""
    made = video(0)
    black = torch.zeros(1, 3, 17, 16, 24)
    for frame, row, column in ((0, 3, 20), (1, 9, 2), (4, 9, 2), (5, 0, 8), (16, 15, 23)):
        bright = black.clone()
        bright[0, :, frame, row, column] = 1
        with torch.no_grad():
            changed = (made.latents(bright) - made.latents(black))[0].abs().sum(-1).unflatten(0, (5, 2, 3)).nonzero()
        assert changed.tolist() == [[-(-frame // 4), row // 8, column // 8]]


def test_frames_that_were_added_in_front_are_taken_away_again():
    """16 frames are filled to 17, half before and half after: what comes back is frame for frame what went in."""
    made = video(0)
    assert made._time_padding(16) == (0, 1) and made._time_padding(14) == (1, 2)
    for frames, before in ((16, 0), (14, 1)):
        args = VideoArgs(frames, (4, 8, 8), dim=16, depth=0)
        own = VideoTokenizer(Modality("rgb", 512, (5, 2, 3), "rgb"), args)
        hidden = torch.zeros(1, 30, 3)
        with torch.no_grad():
            whole = own.unembed(own.from_latent(hidden))
            whole[..., :] = torch.arange(whole.shape[-1]).float()  # value = place in the patch
            place = torch.arange(3 * 4 * 8 * 8).view(3, 4, 8, 8)[0, :, 0, 0]  # first channel, top left, by frame
            timeline = place.repeat(5)[3:]  # the first frame's group is filled from the front
            own.unembed = torch.nn.Sequential(torch.nn.Identity(), _Constant(whole.shape[-1]))
            out = own.decode_codes(hidden)
        assert out.shape == (1, 3, frames, 16, 24)
        assert out[0, 0, :, 0, 0].tolist() == timeline[before : before + frames].tolist()


class _Constant(torch.nn.Module):
    """Gives every token the numbers 0 .. n - 1."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.values).float().expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["motion", "gaze", "pose"])
def test_statistics_are_measured_where_the_configuration_says_auto(kind, rng):
    """Against numpy over the observed frames; a channel that stands still is not blown up."""
    args = MotionArgs(60, "auto", "auto", 16, 1, 2, quantizer="fsq")
    modality = Modality("m", 240, (30,), kind)
    series = [rng.normal(3, 2, (60, 3)) * [1, 5, 0] for _ in range(8)]
    if kind == "gaze":
        signals = [np.c_[s[:, :2], rng.random(60) < 0.5].astype(np.float32) for s in series]
        frames = np.concatenate([s[s[:, 2] > 0, :2] for s in signals])
    elif kind == "pose":
        signals = [np.tile(np.eye(4, dtype=np.float32), (60, 1, 1)) for _ in series]
        for signal, s in zip(signals, series, strict=True):
            signal[:, :3, 3] = s
        frames = np.concatenate([np.c_[np.tile([1, 0, 0, 0, 1, 0], (60, 1)), s - s[0]] for s in series])
    else:
        signals = [*series, np.full((60, 3), np.nan)]  # without a measurement
        frames = np.concatenate(series)
    made = with_statistics(args, modality, signals)
    np.testing.assert_allclose(made.mean, frames.mean(0), rtol=1e-4, atol=1e-6)
    std = frames.std(0)
    np.testing.assert_allclose(made.std, np.maximum(std, std.max() / 100), rtol=1e-4)
    assert with_statistics(made, modality, []) == made
    with pytest.raises(ValueError, match="no clip carries a measurement"):
        with_statistics(args, modality, [])


def test_losses_of_the_video_tokenizer_by_hand(monkeypatch):
    """Of a reconstruction that is off by a known picture; the tokens' fingerprint does not depend on the loss."""
    modality, prints = Modality("v", 64, (1, 2, 2), "rgb"), set()
    off = torch.arange(2 * 3 * 1 * 4 * 4, dtype=torch.float32).reshape(2, 3, 1, 4, 4) ** 2 / 1000
    rows, columns = off[..., 1:, :] - off[..., :-1, :], off[..., :, 1:] - off[..., :, :-1]
    for loss, of in (("l1", torch.abs), ("l2", torch.square)):
        torch.manual_seed(0)
        made = VideoTokenizer(modality, VideoArgs(1, (1, 2, 2), 8, 1, (4, 4, 4), loss=loss, edge_weight=0.5))
        video = torch.rand(2, 3, 1, 4, 4)
        monkeypatch.setattr(made, "decode_codes", lambda *_, video=video: video + off)
        value, figures = made.training_loss(video)
        expected = of(off).mean() + 0.5 * (of(rows).mean() + of(columns).mean())
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert figures["error"].item() == pytest.approx(off.square().mean().item(), rel=1e-5)
        prints.add(made.fingerprint())
    assert len(prints) == 1


def small_video(**more) -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(Modality("v", 64, (1, 16, 16), "rgb"), VideoArgs(1, (1, 4, 4), 8, 1, (4, 4, 4), **more))


def test_near_pixels_of_depth_weigh_more(monkeypatch):
    made = small_video(loss="l1", near_weight=3.0)
    video = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 1, 3).expand(1, 3, 1, 1, 3)
    monkeypatch.setattr(made, "decode_codes", lambda *_: video + torch.tensor([0.1, 0.2, 0.4]))
    monkeypatch.setattr(made, "_unpad_sides", lambda x, _: x)
    assert made.training_loss(video)[0].item() == pytest.approx((0.1 * 1 + 0.2 * 2.5 + 0.4 * 4) / 3, rel=1e-5)


def test_the_perceptual_part_of_the_loss(tmp_path):
    """What it adds is LPIPS of frames and reconstruction; its network is not part of the export and does not learn."""
    from torchvision.models import alexnet

    torch.manual_seed(1)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    plain, made = small_video(), small_video(perceptual_weight=0.7, perceptual_network=str(tmp_path / "alexnet.pth"))
    video = torch.rand(2, 3, 1, 64, 64) * 2 - 1
    loss = made.training_loss(video)[0]
    codes = plain.quantizer(plain.latents(plain._pad(video)))[0]
    back = plain.decode_codes(codes, (1, 16, 16))
    distance = Lpips(tmp_path / "alexnet.pth")(back[:, :, 0], video[:, :, 0]).mean()
    assert distance > 0
    assert loss.item() == pytest.approx((plain.training_loss(video)[0] + 0.7 * distance).item(), rel=1e-5)
    loss.backward()
    assert made.state_dict().keys() == plain.state_dict().keys() and made.fingerprint() == plain.fingerprint()
    assert all(p.grad is not None for p in made.parameters())
    with pytest.raises(ValueError, match="go together"):
        VideoArgs(perceptual_weight=1.0)


def test_the_critic_and_the_tokenizer_learn_each_their_own():
    """The critic's gradient is that of the hinge loss by hand; the pictures', -weight times the slope of its scores."""
    torch.manual_seed(0)
    critic, true, made = Critic(8), torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16, requires_grad=True)
    adversarial_loss(critic, true, made, 0.3).backward()
    ours = [p.grad.clone() for p in critic.parameters()]
    hinge = (1 - critic(true)).clamp(min=0).mean() + (1 + critic(made.detach())).clamp(min=0).mean()
    for a, b in zip(ours, torch.autograd.grad(hinge, list(critic.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    (slope,) = torch.autograd.grad(critic(made).mean(), made)
    torch.testing.assert_close(made.grad, -0.3 * slope)


def test_a_critic_learns_to_tell_and_its_tokenizer_loads_again(tmp_path):
    made = small_video(adversarial_weight=0.1)
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    stripes = torch.where(torch.arange(64) % 4 < 2, 0.9, -0.9).expand(4, 3, 1, 64, 64)
    for _ in range(30):
        optimizer.zero_grad()
        made.training_loss(stripes)[0].backward()
        optimizer.step()
    with torch.no_grad():
        assert made.critic(stripes[:, :, 0]).mean() > made.critic(torch.zeros(4, 3, 64, 64)).mean() + 0.5
    made.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(again.critic.layers[0].weight, made.critic.layers[0].weight)


@pytest.mark.parametrize(("wrong", "words"), [
    ({"num_frames": 400}, "400 by stride 2 make 200 tokens"), ({"stride": 4, "kernel": 4}, "make 15 tokens"),
    ({"stride": 0}, "at least 1"), ({"num_heads": 0}, "at least 1"), ({"stride": 10, "kernel": 2}, "kernel 2 must be"),
    ({"kernel": 3}, "more by an even number"), ({"num_frames": 61}, "must divide")])
def test_a_motion_network_whose_tokens_are_not_the_grids_is_refused(wrong, words):
    args = {"num_frames": 60, "mean": (0.0,), "std": (1.0,), "dim": 16, "depth": 1, "num_heads": 2, "quantizer": "fsq"}
    with pytest.raises(ValueError, match=words):
        MotionTokenizer(Modality("imu", 240, (30,)), MotionArgs(**{**args, **wrong}))
    MotionTokenizer(Modality("imu", 240, (40,)), MotionArgs(**{**args, "num_frames": 400, "stride": 10, "kernel": 10}))


def test_clips_of_slightly_different_sides_are_encoded_together(rng):
    """22 to 24 pixels are of one grid of three cells; each has the ids that it has by itself, whatever is beside it."""
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(Modality("rgb", 512, (5, 3, 3), "rgb"), VideoArgs(dim=16, depth=1)).eval()
    clips = [rng.integers(0, 256, (16, side, side, 3)).astype(np.uint8) for side in (24, 22, 24, 23)]
    alone = [tokenizer.encode(clip) for clip in clips]
    assert np.array_equal(tokenizer.encode_many(clips), np.stack(alone))
    units = [tokenizer.signal.normalize(clip) for clip in clips]
    chunks = [tokenizer.stack(part, whole_grid=True) for part in (units[1:2], units[2:])]
    assert np.array_equal(tokenizer.encode_units(torch.cat(chunks)), np.stack(alone[1:]))


def test_a_grid_that_the_frames_do_not_make_is_refused():
    with pytest.raises(ValueError, match="make 5 steps in time, but the grid"):
        VideoTokenizer(Modality("rgb", 512, (4, 3, 3), "rgb"), VideoArgs(dim=16, depth=1))
