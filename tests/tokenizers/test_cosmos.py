"""The Cosmos wrapper against stand-ins made as NVIDIA's files are: traced in bfloat16, with the casts baked in."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from egom2p import tokenizers
from egom2p.data.clips import Clip, write_clips
from egom2p.errors import UserError
from egom2p.tokenizers.torchscript import settle
from tests.conftest import ROOT, run_cli


class Encoder(nn.Module):
    """Mean grey of each patch as an id; the first frame is repeated to fill its patch, as a causal net would."""

    def __init__(self, t: int, s: int) -> None:
        super().__init__()
        self.t = t
        self.mix, self.pool = nn.Conv3d(3, 1, 1), nn.Conv3d(1, 1, (t, s, s), (t, s, s))
        for layer in (self.mix, self.pool):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            nn.init.zeros_(layer.bias)
        self.half = torch.full((1,), 0.5, dtype=torch.bfloat16)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat([x[:, :, :1].expand(-1, -1, self.t - 1, -1, -1), x], 2)
        grey = self.mix(x).to(torch.bfloat16)
        pooled = self.pool(grey) * torch.tensor(2.0) * self.half
        none = torch.zeros(15, dtype=torch.bfloat16)[:1]  # 15 is a number here, and elsewhere the dtype's
        ids = ((pooled[:, 0] + none + 1).float() * 1000).round().to(torch.int32)
        return ids, pooled.expand(-1, 6, -1, -1, -1).to(torch.bfloat16), torch.zeros_like(pooled.mean([1, 2, 3], True))


class Decoder(nn.Module):
    def __init__(self, t: int, s: int) -> None:
        super().__init__()
        self.t, self.s = t, s
        self.colour = nn.Conv3d(1, 3, 1, bias=False)
        nn.init.ones_(self.colour.weight)

    def forward(self, ids: Tensor) -> Tensor:
        video = self.colour((ids[:, None].float() / 1000 - 1).to(torch.bfloat16))
        video = video.repeat_interleave(self.t, 2).repeat_interleave(self.s, 3).repeat_interleave(self.s, 4)
        return video[:, :, self.t - 1 :]


def trace(network: nn.Module, example: Tensor, path) -> None:
    """A bfloat16 trace, with its device named cuda:0 as on the machine that NVIDIA made theirs on."""
    torch.jit.trace(network.bfloat16().eval(), example).save(str(path.with_suffix(".cpu")))
    with zipfile.ZipFile(path.with_suffix(".cpu")) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".py"):
                data = data.replace(b'torch.device("cpu")', b'torch.device("cuda:0")')
            new.writestr(item.filename, data)


@pytest.fixture(params=[("rgb", 4, 8), ("depth", 4, 8), ("rgb_dv8x16x16", 8, 16), ("depth_dv8x16x16", 8, 16)],
                ids=lambda p: p[0])
def folder(request, tmp_path):
    """The shipped config.json with stand-in networks beside it."""
    name, t, s = request.param
    (tmp_path / "config.json").write_text((ROOT / "tokenizers/cosmos" / name / "config.json").read_text())
    trace(Encoder(t, s), torch.zeros(1, 3, 1 + t, 2 * s, 2 * s, dtype=torch.bfloat16), tmp_path / "encoder.jit")
    trace(Decoder(t, s), torch.zeros(1, 2, 2, 2, dtype=torch.int32), tmp_path / "decoder.jit")
    return tmp_path


def test_what_is_rewritten(folder):
    """As they are, the files fail on a CPU; settled, they compute what the network does in float32."""
    video = torch.rand(2, 3, 17, 32, 48) * 2 - 1
    for name, given in (("encoder.jit", video), ("decoder.jit", torch.zeros(1, 2, 2, 2, dtype=torch.int32))):
        plain = torch.jit.load(str(folder / name), map_location="cpu").float()
        with pytest.raises(RuntimeError, match=r"should be the same|expected scalar type BFloat16|CUDA|cuda|NVIDIA"):
            plain(given)
    module = settle(torch.jit.load(str(folder / "encoder.jit"), map_location="cpu"), torch.device("cpu"), torch.float32)
    t, s, _ = json.loads((folder / "config.json").read_text())["args"]["patch"]
    ids, codes, _ = module(video)
    twin = Encoder(t, s).bfloat16().float()
    twin.half = twin.half.float()
    grey = twin.pool(twin.mix(torch.cat([video[:, :, :1].expand(-1, -1, t - 1, -1, -1), video], 2)))
    assert codes.dtype == torch.float32 and torch.allclose(codes[:, :1], grey, atol=1e-6)
    assert torch.equal(ids, ((grey[:, 0] + 1) * 1000).round().int())
    assert not re.search("cuda", str(module.inlined_graph))


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
    assert (padded[:, :, :, 1:31, 4:44] == 0).all() and (padded[:, :, :, 0] == -1).all()  # black beside the picture
    assert (padded[..., :4] == -1).all() and (padded[..., 44:] == -1).all()
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


def test_where_the_files_lie_says_nothing_of_the_tokens(folder, tmp_path, caplog):
    """Known by what is in them: encoded from one folder and decoded from another; by their name while they are not
    at hand; and by what earlier versions wrote down."""
    import hashlib
    import shutil

    here = tokenizers.load(folder)
    before = hashlib.sha256(json.dumps(here.to_config(), sort_keys=True).encode()).hexdigest()[:16]
    assert here.made(before) and not here.made("another")
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["args"]["source"] = "nvidia/Cosmos-0.1-Tokenizer-DV4x8x8"
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    copy = tokenizers.load(tmp_path / "copy")
    assert copy.fingerprint() == here.fingerprint() and copy.made(here.fingerprint())
    (tmp_path / "copy/decoder.jit").write_bytes(b"another network")
    assert tokenizers.load(tmp_path / "copy").fingerprint() != here.fingerprint()
    (tmp_path / "copy/decoder.jit").unlink()
    away = tokenizers.load(tmp_path / "copy")
    assert away.fingerprint() != here.fingerprint() and away.made(here.fingerprint())
    assert "is not fetched yet" in caplog.text


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
