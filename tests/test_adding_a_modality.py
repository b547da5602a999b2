"""docs/adding-a-modality.md, done: a six-channel wrist signal becomes a fifth modality."""

import re

import numpy as np

from egom2p import EgoM2P
from egom2p.data.clips import Clip, read_clips, write_clips
from egom2p.datasets.world import make_clip
from egom2p.training.log import read_metrics
from tests.conftest import ROOT, run_cli


def test_the_page_works(tmp_path):
    page = (ROOT / "docs/adding-a-modality.md").read_text()
    tokenizer_yaml, entry = re.findall(r"```yaml\n(.*?)```", page, re.S)
    snippet = re.search(r"```python\n(.*?)```", page, re.S)[1]
    config = tmp_path / "wrist.yaml"
    config.write_text(re.sub(r"(?m)^   ", "", tokenizer_yaml))
    rng = np.random.default_rng(0)
    clips = []
    for number in range(24):
        clip = make_clip(1, number, 24)
        wrist = np.cumsum(rng.normal(size=(60, 6)), 0).astype(np.float32)
        clips.append(Clip(clip.key, "rooms", {**clip.signals, **({"wrist": wrist} if number % 5 else {})}, clip.meta))
    write_clips(tmp_path / "clips/a.tar", clips)
    # The page's code puts the same signal into clips without it.
    write_clips(tmp_path / "bare/a.tar", [Clip(c.key, c.dataset, {"cam": c.signals["cam"]}, c.meta) for c in clips])
    code = re.sub(r"(?m)^     ", "", snippet).replace("clips/*.tar", f"{tmp_path}/bare/*.tar")
    exec(code.replace("new/a.tar", f"{tmp_path}/new/a.tar"), {"cut_out": lambda source, start: np.ones((60, 6))})
    assert all(c.signals["wrist"].shape == (60, 6) and "cam" in c.signals for c in read_clips(f"{tmp_path}/new/*.tar"))
    clips_pattern = f"{tmp_path}/clips/*.tar"
    for name, path, extra in (("wrist", config, []), ("cam", "tokenizers/world_cam/config.yaml", []),
                              ("rgb", "tokenizers/world_rgb/config.yaml", ["tokenizer.modality.grid=[5,3,3]"])):
        run_cli("tokenizer", "train", path, f"data.clips={clips_pattern}", f"run.dir={tmp_path / name}",
                "train.steps=5", "train.batch_size=8",
                "optim.warmup_steps=2", *extra)
    run_cli("tokenizer", "encode", *(tmp_path / n for n in ("wrist", "cam", "rgb")), "--clips", clips_pattern, "--out",
            tmp_path / "tokens")
    common = f"""
run: {{dir: {tmp_path}/run}}
data: {{root: {tmp_path}/tokens, datasets: {{rooms: {{}}}}}}
model: {{dim: 24, num_heads: 2, encoder_depth: 1, decoder_depth: 1}}
masking: {{input_tokens: 40, target_tokens: 40}}
train: {{steps: 4, batch_size: 4}}
log: {{every: 1}}
modalities:
  rgb: {{vocab_size: 4096, grid: [5, 3, 3], signal: rgb, tokenizer: {tmp_path}/rgb}}
  cam: {{vocab_size: 240, grid: [30], signal: pose, tokenizer: {tmp_path}/cam}}
"""
    (tmp_path / "before.yaml").write_text(common)
    (tmp_path / "after.yaml").write_text(common + "  "
                                         + entry.strip().replace("runs/tokenizers/wrist",
                                                                 str(tmp_path / "wrist")) + "\n")
    run_cli("train", tmp_path / "before.yaml", f"run.dir={tmp_path}/before")
    run_cli("train", tmp_path / "after.yaml", f"init.from={tmp_path}/before")
    assert any("loss/wrist" in m for m in read_metrics(tmp_path / "run"))
    assert EgoM2P.from_pretrained(tmp_path / "run").modalities.names == ["rgb", "cam", "wrist"]
    from egom2p.signals.writers import write_video

    write_video(tmp_path / "video.mp4", rng.integers(0, 255, (16, 32, 32, 3)).astype(np.uint8), 8)
    run_cli("generate", tmp_path / "run", "--inputs", tmp_path / "video.mp4", "--targets", "wrist", "--out",
            tmp_path / "predictions")
    assert np.load(tmp_path / "predictions/video/wrist.npy").shape == (60, 6)
