"""Clips a second and memory of tokenising, stage by stage.

    python -m benchmarks.encode [--count 400] [--rounds 3]

Stages: reading and decoding clips (arrays and films), the networks alone (the world's tokenizers at 48 x 48, a
TorchScript stand-in with the convolutions of a Cosmos encoder at 256 x 256), and the whole command's function with 0
and 1 reading processes (torch's threads get the cores that are left). Medians over rounds; memory: the peak here.
"""

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.printing import heading, say
from egom2p.config import load
from egom2p.data.clips import Clip, ClipIndex, write_clips
from egom2p.datasets.world import write_world
from egom2p.modalities import Modality
from egom2p.tokenizers.cosmos import CosmosArgs, CosmosTokenizer
from egom2p.tokenizers.encode import EncodeArgs, encode_clips
from egom2p.training.tokenizer_training import TokenizerConfig, make_tokenizer


class StandIn(nn.Module):
    """The widths of Cosmos DV4x8x8's encoder (128, 256, 512), a convolution a level."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(3, 128, (4, 4, 4), (4, 4, 4)), nn.SiLU(),
                                    nn.Conv3d(128, 256, (1, 3, 3), padding=(0, 1, 1)), nn.SiLU(),
                                    nn.Conv3d(256, 512, (1, 2, 2), (1, 2, 2)), nn.SiLU(), nn.Conv3d(512, 6, 1))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.layers(torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2))
        return (codes[:, 0].abs() * 1000).clamp(0, 63999).to(torch.int32), codes


def seconds(function, rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def stand_in(folder: Path) -> CosmosTokenizer:
    folder.mkdir()
    network = StandIn().eval()
    with torch.no_grad():
        torch.jit.trace(network, torch.zeros(1, 3, 17, 256, 256)).save(str(folder / "encoder.jit"))
    shutil.copy(folder / "encoder.jit", folder / "decoder.jit")
    return CosmosTokenizer(Modality("rgb", 64000, (5, 32, 32), "rgb"), CosmosArgs(source=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--large", type=int, default=48, help="clips of 256 x 256")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    heading(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder / "small", args.count, seed=1, size=48)
        small = ClipIndex(str(folder / "small"))
        pictures = np.kron(small.read(0).signals["rgb"], np.ones((1, 6, 6, 1), np.uint8))[:, :256, :256]
        for store in ("npy", "mp4"):
            write_clips(folder / f"{store}/a.tar", (Clip(f"{i:04d}", "large", {"rgb": np.roll(pictures, i, 2)})
                                                    for i in range(args.large)), store)
            index = ClipIndex(str(folder / store))
            spent = seconds(lambda i=index: [i.read(n) for n in range(len(i))], args.rounds)
            say(f"reading 256 x 256 frames stored as {store}: {args.large / spent:8.0f} clips/s")
        made = {n: make_tokenizer(load(TokenizerConfig, f"tokenizers/world_{n}/config.yaml").tokenizer).eval()
                for n in ("cam", "gaze", "rgb", "depth")}
        for key, tokenizer in made.items():
            signals = [s for i in range(min(args.count, 128)) if (s := small.read(i).signals.get(key)) is not None]
            x = torch.from_numpy(np.stack([tokenizer.signal.normalize(s) for s in signals]))
            spent = seconds(lambda t=tokenizer, x=x: [t.encode_units(b) for b in x.split(t.encode_batch)], args.rounds)
            say(f"network of '{key}': {len(x) / spent:8.0f} clips/s")
        large = stand_in(folder / "cosmos")
        x = torch.rand(min(4, args.large), 3, 16, 256, 256) * 2 - 1
        spent = seconds(lambda: large.encode_units(x), args.rounds)
        say(f"network of the Cosmos stand-in: {len(x) / spent:8.1f} clips/s")
        for label, tokenizers, clips, count in (("four tokenizers, 48 x 48", list(made.values()), "small", args.count),
                                                ("Cosmos stand-in, npy", [large], "npy", args.large),
                                                ("Cosmos stand-in, mp4", [large], "mp4", args.large)):
            for workers in (0, 1):
                def whole(tokenizers=tokenizers, clips=clips, workers=workers) -> None:
                    shutil.rmtree(folder / "tokens", ignore_errors=True)
                    encode_clips(tokenizers, str(folder / clips), folder / "tokens", EncodeArgs(workers=workers))
                spent = seconds(whole, args.rounds)
                say(f"{label}, {workers} reading processes: {count / spent:8.1f} clips/s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        say(f"peak memory of this process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
