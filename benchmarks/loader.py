"""Samples a second on one core: reading, masking and packing, ours against the plain pipeline.

    python -m benchmarks.loader [--count 960] [--rounds 5]

Ours reads from our uint16 shards and from the released `.npz` form. The plain pipeline is the ordinary way: iterate the
tars of each modality side by side, decode each npz, mask with torch sample by sample over all positions, and collate
full grids. Both run in this process on one thread, alternating, on the same random tokens in four modalities with the
released budgets; medians over rounds. Also: memory a forked worker adds, and the time from start to the first batch.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.printing import heading, median_ratio, say
from egom2p.data.batch import pack
from egom2p.data.loader import DataArgs, DatasetArgs, TokenStream
from egom2p.data.masking import MaskArgs
from egom2p.data.shardtools import write_random
from egom2p.modalities import Modality, ModalitySet

RELEASED = ModalitySet([Modality("rgb", 64000, (5, 32, 32)), Modality("depth", 64000, (5, 32, 32)),
                        Modality("cam", 256, (30,)), Modality("gaze", 256, (30,))])
BATCH = 32


def write_released(root: Path, out: Path) -> None:
    """The same tokens as released: npz, int32 / int64."""
    for shard in root.rglob("*.tar"):
        target = out / shard.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(shard) as source, tarfile.open(target, "w") as tar:
            for member in source:
                array = np.load(io.BytesIO(source.extractfile(member).read()))
                buffer = io.BytesIO()
                np.savez(buffer, array.astype(np.int32 if array.ndim == 3 else np.int64))
                info = tarfile.TarInfo(member.name.replace(".npy", ".npz"))
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def open_stream(root: Path, sets: Sequence[str] = ("set",)) -> TokenStream:
    return TokenStream(DataArgs(root=str(root), datasets={name: DatasetArgs() for name in sets}), RELEASED, MaskArgs(),
                       seed=0)


def ours(stream: TokenStream, count: int, start: int) -> None:
    for first in range(start, start + count, BATCH):
        pack([stream.sample(n) for n in range(first, first + BATCH)], 4)


def plain(root: Path, count: int) -> None:
    """Tar iteration, npz decode, torch masks over every position, collate of full grids."""
    tars = [tarfile.open(root / m.name / "set/shard-000000.tar") for m in RELEASED]  # noqa: SIM115
    batch = []
    for index, members in enumerate(zip(*tars, strict=False)):
        if index == count:
            break
        ids = [torch.from_numpy(np.load(io.BytesIO(tar.extractfile(m).read()))["arr_0"].astype(np.int64)).flatten()
               for tar, m in zip(tars, members, strict=True)]
        alpha = torch.full((4,), [0.01, 0.1, 1.0, 10.0][int(torch.randint(4, (1,)))])
        shares = [torch.distributions.Dirichlet(alpha).sample() * 2048 for _ in range(2)]
        sample = {}
        for modality, tokens, num_inputs, num_targets in zip(RELEASED, ids, *shares, strict=True):
            order = torch.rand(len(tokens)).argsort()
            is_input, is_target = torch.ones(len(tokens), dtype=torch.bool), torch.ones(len(tokens), dtype=torch.bool)
            shown = min(int(num_inputs), len(tokens))
            is_input[order[:shown]] = False
            is_target[order[shown : shown + int(num_targets)]] = False
            sample[modality.name] = {"tensor": tokens, "input_mask": is_input, "target_mask": is_target}
        batch.append(sample)
        if len(batch) == BATCH:
            torch.utils.data.default_collate(batch)
            batch = []


def rate(function, count: int) -> float:
    started = time.perf_counter()
    function()
    return count / (time.perf_counter() - started)


def private_mb() -> float:
    """Memory of this process that no other shares."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private")) / 1024


def forked_worker_mb(stream: TokenStream) -> float:
    """What a forked worker adds after some batches."""
    read, write = os.pipe()
    if os.fork() == 0:
        ours(stream, 320, 0)
        os.write(write, str(private_mb()).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=500,
                        help="shards of the start-up and memory measurement, over eight data sets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heading(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_random(DataArgs(root="", datasets={"set": DatasetArgs()}), (), RELEASED, root / "ours", 1000)
        write_released(root / "ours", root / "released")
        streams = {"our shards": open_stream(root / "ours"), "released npz": open_stream(root / "released")}
        rates: dict[str, list[float]] = {"plain": [], **{k: [] for k in streams}}
        for round_number in range(args.rounds + 1):
            for name, stream in streams.items():
                rates[name].append(rate(lambda s=stream, r=round_number: ours(s, args.count, r * args.count),
                                        args.count))
            rates["plain"].append(rate(lambda: plain(root / "released", args.count), args.count))
        for name, values in rates.items():
            ratio = median_ratio(values[1:], rates["plain"][1:])
            say(f"{name:14} {statistics.median(values[1:]):8.0f} samples/s a core, {ratio:.1f} x plain")
        many, sets = root / "many", [f"set{i}" for i in range(8)]
        for number in range(args.shards):
            for modality in RELEASED:
                target = many / modality.name / sets[number % 8] / f"shard-{number // 8:06d}.tar"
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(root / "ours" / modality.name / "set/shard-000000.tar", target)
        sets = sets[: args.shards]
        open_stream(many, sets)
        started = time.perf_counter()
        stream = open_stream(many, sets)
        ours(stream, BATCH, 0)
        say(f"first batch after {time.perf_counter() - started:.2f} s on {args.shards} shards of 1 000 clips in 4 "
            f"modalities and {len(sets)} data sets (index fresh)")
        say(f"a forked worker adds {forked_worker_mb(stream):.0f} MB")


if __name__ == "__main__":
    main()
