"""The Cosmos wrapper against TorchScript stand-ins with the same interface."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p import tokenizers
from egom2p.data.clips import Clip, write_clips
from egom2p.errors import UserError
from tests.conftest import ROOT, run_cli


class Encoder(nn.Module):
    """Mean grey of each patch as an id; the first frame is repeated to fill its patch, as a causal net would."""

    def __init__(self, t: int, s: int) -> None:
        super().__init__()
        self.t, self.s = t, s

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([x[:, :, :1].expand(-1, -1, self.t - 1, -1, -1), x], 2)
        pooled = F.avg_pool3d(x.float().mean(1, keepdim=True), [self.t, self.s, self.s])[:, 0]
        return ((pooled + 1) * 1000).round().to(torch.int32), pooled


class Decoder(nn.Module):
    def __init__(self, t: int, s: int) -> None:
        super().__init__()
        self.t, self.s = t, s

    def forward(self, ids: Tensor) -> Tensor:
        video = ids[:, None].float() / 1000 - 1
        video = video.repeat_interleave(self.t, 2).repeat_interleave(self.s, 3).repeat_interleave(self.s, 4)
        return video[:, :, self.t - 1 :].expand(-1, 3, -1, -1, -1)


@pytest.fixture(params=[("rgb", 4, 8), ("depth", 4, 8), ("rgb_dv8x16x16", 8, 16)], ids=lambda p: p[0])
def folder(request, tmp_path):
    """The shipped config.json with stand-in networks beside it."""
    name, t, s = request.param
    (tmp_path / "config.json").write_text((ROOT / "tokenizers/cosmos" / name / "config.json").read_text())
    for file, network in (("encoder.jit", Encoder(t, s)), ("decoder.jit", Decoder(t, s))):
        torch.jit.script(network).save(str(tmp_path / file))
    return tmp_path


def smooth_video(frames, side):
    y, x = np.mgrid[:side, :side] / side
    return np.stack([np.stack([(x + y + i / frames) * 80] * 3, -1) for i in range(frames)]).astype(np.uint8)


def test_round_trip_of_a_clip(folder):
    tokenizer = tokenizers.load(folder)
    frames, side = tokenizer.args.num_frames, tokenizer.frame_size
    video = smooth_video(frames, side)
    signal = video if tokenizer.modality.signal == "rgb" else (1 / (video[..., 0] / 100 + 0.5)).astype(np.float16)
    ids = tokenizer.encode(signal)
    assert ids.shape == tokenizer.modality.grid
    assert ids.dtype == np.int64
    back = tokenizer.decode(ids)
    assert back.shape == signal.shape
    expected = tokenizer.signal.denormalize(tokenizer.signal.normalize(signal))
    assert np.abs(back.astype(float) - expected).max() < (25 if back.dtype == np.uint8 else 0.1)


def test_the_last_decoded_frame_is_dropped_and_sides_are_centred(folder):
    tokenizer = tokenizers.load(folder)
    video = torch.zeros(2, 3, 16, 30, 40)
    padded = tokenizer._pad(video)
    assert padded.shape == (2, 3, 17, 32, 48)
    assert tokenizer._time_padding(16) == (0, 17)
    assert tokenizer._time_padding(12) == (2, 17)


def test_longer_videos_go_through_in_windows(folder):
    config = json.loads((folder / "config.json").read_text())
    config["args"].update(num_frames=40, window=17)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(folder)
    video = torch.from_numpy(smooth_video(40, tokenizer.frame_size)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    ids = tokenizer.encode_normalized(video)
    back = tokenizer.decode_normalized(ids)
    assert back.shape == video.shape
    assert (back - video).abs().max() < 0.25


def test_encode_command_writes_shards(folder, tmp_path):
    tokenizer = tokenizers.load(folder)
    side = tokenizer.frame_size
    video = smooth_video(tokenizer.args.num_frames, side)
    signals = {"rgb": video, "depth": (1 / (video[..., 0] / 100 + 0.5)).astype(np.float16)}
    write_clips(tmp_path / "clips/a.tar", [Clip(f"k{i}", "set", signals) for i in range(2)])
    run_cli("tokenizer", "encode", folder, "--clips", tmp_path / "clips/*.tar", "--out", tmp_path / "tokens")
    assert (tmp_path / "tokens" / tokenizer.modality.name / "set/shard-000000.tar").exists()


def test_missing_and_broken_files_get_one_line(folder):
    (folder / "encoder.jit").write_bytes(b"nonsense")
    tokenizer = tokenizers.load(folder)
    with pytest.raises(UserError, match="not a readable TorchScript file"):
        tokenizer.encode_normalized(torch.zeros(1, 3, 16, 32, 32))
    (folder / "encoder.jit").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["args"]["source"] = str(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no encoder\.jit and decoder\.jit there"):
        tokenizers.load(folder).encode_normalized(torch.zeros(1, 3, 16, 32, 32))


def test_a_gated_repository_is_explained(folder, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_args, **_kwargs):
        raise GatedRepoError("gated", response=httpx.Response(403,
                                                              request=httpx.Request("GET", "https://huggingface.co/x")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    (folder / "encoder.jit").unlink()
    with pytest.raises(UserError, match="is gated: accept its licence"):
        tokenizers.load(folder).encode_normalized(torch.zeros(1, 3, 16, 32, 32))
