"""VidTok against Microsoft's own code: small random checkpoints of the published layout, with what that code made of a
video (tests/reference/vidtok.pt, made from microsoft/VidTok d6ad92d9)."""

import numpy as np
import pytest
import torch

from egom2p import tokenizers
from egom2p.compat.released import import_released
from egom2p.compat.vidtok import convert_vidtok
from egom2p.errors import UserError
from tests.conftest import ROOT, run_cli

NAMES = ("vidtok_fsq_causal_488_4096", "vidtok_fsq_causal_888_32768_v1_1")


@pytest.fixture(params=NAMES)
def given(request, tmp_path):
    """(what Microsoft's code made, a checkpoint file as Lightning writes them)."""
    reference = torch.load(ROOT / "tests/reference/vidtok.pt", weights_only=True)[request.param]
    path = tmp_path / f"{request.param}.ckpt"
    torch.save({"state_dict": {**reference["state_dict"], "loss.logvar": torch.zeros(1)}, "epoch": 3}, path)
    return reference, path


def test_ids_and_videos_are_those_of_the_original(given):
    reference, path = given
    left_out = []
    tokenizer = convert_vidtok(reference["state_dict"], path, left_out)
    assert not left_out
    frames = reference["x"].shape[2]
    codes = tokenizer.codes()
    with torch.no_grad():
        latent = tokenizer.encoder.double()(reference["x"].double()).float()
        made = tokenizer.quantizer(latent.movedim(1, -1).flatten(1, 3))[1].reshape(reference["ids"].shape)
        video = tokenizer.decoder(codes[reference["ids"].long()].movedim(-1, 1))[:, :, -frames:]
    torch.testing.assert_close(video, reference["video"], atol=2e-3, rtol=0)
    # The miniature's norms over two channels magnify the last bit, and every processor has its own: a latent at the
    # edge of a level may fall on the other side. In float64 it is one, by one level, everywhere.
    spacing = torch.stack([channel.unique().diff()[0] for channel in codes.T])
    levels = ((codes[made] - codes[reference["ids"].long()]) / spacing).abs()
    assert levels.max() < 1.5 and (levels > 0.5).sum() <= 1


def test_import_encode_decode(given, tmp_path, rng):
    """By the command: grids for the clips that prepare makes, what is left out named, a round trip of the shapes."""
    _, path = given
    printed = run_cli("import-released", path, "--out", tmp_path / "tok").stdout
    assert "1 tensors of its training" in printed and ("1.1" in printed) == ("v1_1" in path.name)
    tokenizer = tokenizers.load(tmp_path / "tok")
    assert tokenizer.frame_size == 256
    assert tokenizer.modality.grid == ((2, 32, 32) if "888" in path.name else (5, 32, 32))
    clip = rng.integers(0, 255, (16, 256, 256, 3)).astype(np.uint8)
    ids = tokenizer.encode(clip)
    assert ids.shape == tokenizer.modality.grid and ids.max() < tokenizer.modality.vocab_size
    assert tokenizer.decode(ids).shape == clip.shape
    with pytest.raises(UserError, match="prepare the clips with --size 256"):
        tokenizer.check(clip[:, :128, :128])


def test_what_is_no_whole_checkpoint_is_refused(given, tmp_path):
    reference, path = given
    state = dict(reference["state_dict"])
    state.pop("decoder.mid.attn_1.q.conv.weight")
    torch.save(state, path)  # the tensors alone, as other tools save them
    with pytest.raises(UserError, match=r"decoder.mid.attn_1.q.conv.weight' is missing"):
        import_released(path, tmp_path / "out")


def test_a_film_is_encoded_as_a_clip_is(given, tmp_path, rng):
    """As `egom2p generate` does with a video file, by any tokenizer of pictures."""
    _, path = given
    run_cli("import-released", path, "--out", tmp_path / "tok")
    tokenizer = tokenizers.load(tmp_path / "tok")
    clip = rng.integers(0, 255, (16, 256, 256, 3)).astype(np.uint8)
    assert np.array_equal(tokenizer.encode_frames(clip), tokenizer.encode(clip))
