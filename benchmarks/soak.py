"""Are the first gradients of fresh processes the same bits, while another program takes the cores?

    python -m benchmarks.soak [--processes 2000] [--threads 2] [--size world] [--no-load] [--deterministic]

Forks one process after another; each builds the same model, computes loss and gradients of the same micro-batch with
a pool of threads of its own, and answers with a hash of every gradient. Beside them a matrix product loop keeps all
cores busy. Prints how many differ from the first, and which parameters' gradients do. --size: the quickstart's model
and four samples of its tokens (a fraction of a second each), or a narrow one with the released heads.

Seen on Intel machines with AMX under load: one of about 330 (issue 13, B3).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass

import torch
import torch._dynamo

from benchmarks.printing import heading, say
from benchmarks.train_step import RELEASED, make_samples
from egom2p.config import load
from egom2p.data.batch import MaskedSample, pack
from egom2p.data.masking import MaskArgs
from egom2p.modalities import ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.arguments import TrainArgs
from egom2p.training.loop import set_up_torch
from egom2p.training.pretraining import PretrainConfig

LOAD = "import torch; a = torch.randn(1500, 1500)\nwhile True: a @ a"


@dataclass(frozen=True)
class Work:
    """What every process does: no tensor in it, so that the process that forks has computed nothing."""

    modalities: ModalitySet
    model: ModelArgs
    samples: list[MaskedSample]
    train: TrainArgs


def work(threads: int, deterministic: bool, size: str) -> Work:
    train = TrainArgs(batch_size=4, steps=1, threads=threads, deterministic=deterministic)
    if size == "released":
        return Work(RELEASED, ModelArgs(64, 4, 2, 2), make_samples(2, 0), train)
    quickstart = load(PretrainConfig, "cfgs/train/quickstart.yaml")
    modalities = ModalitySet.from_config(quickstart.modalities)
    return Work(modalities, quickstart.model, make_samples(4, 0, modalities, MaskArgs(180, 200)), train)


def hashes(asked: Work) -> dict[str, str]:
    """{parameter: hash of its gradient}, and `loss`."""
    set_up_torch(asked.train)
    model = EgoM2P(asked.modalities, asked.model)
    batch = pack(asked.samples, len(asked.modalities))
    total, _ = model(batch, torch.full((len(batch.targets),), 1e-3))
    total.backward()
    tensors = {"loss": total.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for name, t in tensors.items()}


def in_a_fork(asked: Work) -> dict[str, str]:
    """`hashes`, computed in a process of its own, whose threads start there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as answer:
                json.dump(hashes(asked), answer)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a forked process failed")
    return json.loads(text)


def soak(processes: int, load: bool, asked: Work) -> tuple[int, Counter[str]]:
    """(processes that differ from the first, how often each parameter does)."""
    beside = subprocess.Popen([sys.executable, "-c", LOAD]) if load else None
    differing, names = 0, Counter()
    try:
        first = in_a_fork(asked)
        for number in range(1, processes):
            if number % 200 == 0:
                say(f"{number}: {differing} differ")
            told = in_a_fork(asked)
            changed = [name for name in first if told[name] != first[name]]
            differing += bool(changed)
            names.update(changed)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return differing, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["world", "released"], default="world")
    parser.add_argument("--no-load", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    heading(__doc__, **vars(args))
    started = time.perf_counter()
    differing, names = soak(args.processes, not args.no_load, work(args.threads, args.deterministic, args.size))
    say(f"{differing} of {args.processes} processes differ from the first, in {time.perf_counter() - started:.0f} s"
        + "".join(f"\n  {name}: {count}" for name, count in names.most_common()))


if __name__ == "__main__":
    main()
