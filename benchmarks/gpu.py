"""Everything we want to know of a CUDA machine, in one command of about eight minutes.

    python -m benchmarks.gpu [--size base] [--sections correct,step,sync,profile,generate,train] [--out runs/gpu]
    python -m benchmarks.gpu --smoke          (seconds, any device: the same code at toy sizes)

- correct: fused segment attention in every dtype against a padded softmax in float64 (norm-wise relative error of the
  output and of each gradient), and loss and gradients of a small model on the device against the plain padded network
  in float64 on the CPU (benchmarks/plain.py).
- step: forward, backward, clip, fused AdamW in bf16 autocast on samples of the released mask mixture, at several
  micro-batch sizes, with and without torch.compile: samples/s, real tokens/s, model FLOP utilisation
  (egom2p/model/flops.py over the datasheet peak), peak memory. The goal is 177 samples/s on an H100.
- sync: one step under torch.cuda.set_sync_debug_mode("error"), which raises where the host would wait for the device.
- profile: the kernels of a step by device time.
- generate: seconds a clip of the four released recipes.
- train: two minutes of `egom2p train` on random shards; the share of time waiting for data must be near 0.
A table comes last; full figures are in OUT/gpu.json. Timings are medians; the first steps are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.plain import PlainEgoM2P
from benchmarks.printing import heading, say
from benchmarks.train_step import RELEASED, make_samples, model_sizes
from egom2p.config import load
from egom2p.data.batch import FlatTokens, MaskedSample, PackedBatch, pack
from egom2p.generation.sampler import generate_targets
from egom2p.generation.schedule import RecipeConfig
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.attention import Segments, segment_attention
from egom2p.model.blocks import compile_blocks
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import peak_flops, training_flops
from egom2p.training.optim import OptimArgs, make_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOAL = 177.0
SMALL = ModalitySet([Modality("a", 70, (3, 4, 4)), Modality("b", 50, (2, 4, 4)), Modality("c", 17, (9,))])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference|, infinite when ours holds a NaN."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    if not ours.isfinite().all():
        return float("inf")
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))


def padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: np.ndarray,
                     keys: np.ndarray) -> torch.Tensor:
    """Dense softmax under a block mask; zeros for queries without keys."""
    number = torch.arange(len(queries))
    query, key = (number.repeat_interleave(torch.from_numpy(n)) for n in (queries, keys))
    allowed = query[:, None] == key[None]
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, v)


def check_attention(seed: int) -> dict[str, float]:
    """Random segment lengths, with a single-token segment, an empty one and one whose keys are empty."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.integers(2, 90, 6), rng.integers(2, 90, 6)
    queries[1], keys[2], queries[3], keys[3] = 1, 0, 0, 5
    shapes = [(int(n.sum()), 4, 64) for n in (queries, keys, keys)]
    wide = [torch.from_numpy(rng.standard_normal(s)).requires_grad_() for s in shapes]
    expected = padded_attention(*wide, queries, keys)
    weight = torch.from_numpy(rng.standard_normal(expected.shape))
    (expected * weight).sum().backward()
    errors = {}
    for dtype, limit in TOLERANCE.items():
        ours = [t.detach().to(DEVICE, dtype).requires_grad_() for t in wide]
        out = segment_attention(*ours, Segments(queries, keys, DEVICE))
        (out * weight.to(DEVICE, dtype)).sum().backward()
        worst = max(error(out, expected), *(error(o.grad, w.grad) for o, w in zip(ours, wide, strict=True)))
        errors[f"attention {str(dtype)[6:]}"] = worst
        assert worst < limit, f"attention in {dtype}: error {worst:.1e} above {limit:.0e}"
    return errors


def small_samples(seed: int) -> list[MaskedSample]:
    """Four samples: an ordinary one, one of one modality, one with a single input, one with a single target."""
    rng = np.random.default_rng(seed)

    def side(counts: dict[int, int], skip: dict[int, int] | None = None) -> FlatTokens:
        parts = [(np.full(n, m), np.arange((skip or {}).get(m, 0), (skip or {}).get(m, 0) + n),
                  rng.integers(0, SMALL[m].vocab_size, n)) for m, n in counts.items()]
        return FlatTokens(*(np.concatenate(a) for a in zip(*parts, strict=True)))

    plans = [({0: 20, 1: 9, 2: 3}, {0: 9, 1: 11, 2: 6}), ({0: 11}, {0: 30}), ({2: 1}, {1: 8, 2: 4}),
             ({0: 5, 2: 2}, {1: 1})]
    return [MaskedSample(i, side(a), side(b, a)) for i, (a, b) in enumerate(plans)]


def loss_and_gradients(model: EgoM2P, samples: list[MaskedSample],
                       device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = pack(samples, len(SMALL)).to(device)
    scale = torch.cat([torch.full((n,), 1 / (3 * max(n, 1)), dtype=model.mask_token.dtype)
                       for n in batch.targets.modality_counts]).to(device)
    total, _ = model(batch, scale)
    total.backward()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_model() -> dict[str, float]:
    """Every variant and dtype on the device against the padded network in float64 on the CPU; worst of loss and
    gradients."""
    errors = {}
    for variant in ("gelu", "swiglu", "swiglu_qknorm"):
        torch.manual_seed(0)
        reference = EgoM2P(SMALL, ModelArgs(64, 4, 2, 2, variant=variant)).double()
        samples = small_samples(0)
        plain = PlainEgoM2P(reference, 40, 40)
        expected = plain.loss(plain.collate(samples))
        expected.backward()
        grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        for name, dtype, bf16, limit in (("float64", torch.float64, False, 1e-9),
                                         ("float32", torch.float32, False, 1e-3),
                                         ("bf16 autocast", torch.float32, True, 5e-2)):
            model = EgoM2P(SMALL, ModelArgs(64, 4, 2, 2, variant=variant)).to(DEVICE, dtype)
            model.load_state_dict({k: v.to(dtype) for k, v in reference.state_dict().items()})
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss, ours = loss_and_gradients(model, samples, DEVICE)
            # In bf16 single small gradients are mostly rounding; what the optimiser follows is the whole gradient.
            names = [n for n, g in grads.items() if g.norm() > 1e-7]
            whole = error(torch.cat([ours[n].double().flatten().cpu() for n in names]),
                          torch.cat([grads[n].flatten() for n in names]))
            worst = max(error(loss, expected), whole if bf16 else max(error(ours[n], grads[n]) for n in names))
            errors[f"{variant} {name}"] = worst
            assert worst < limit, f"{variant} in {name}: error {worst:.1e} above {limit:.0e}"
    return errors


class Trainer:
    """Model, optimiser and batches of one step measurement."""

    def __init__(self, sizes: ModelArgs, micro: int, compiled: bool, batches: int = 4) -> None:
        torch.manual_seed(0)
        self.model = EgoM2P(RELEASED, sizes).to(DEVICE)  # position tables come from numpy: `with device` leaves them
        if compiled:
            compile_blocks(self.model)
        self.optimizer = make_optimizer(self.model, OptimArgs())
        self.sizes = sizes
        self.host = [pack(make_samples(micro, i * micro), 4) for i in range(batches)]
        self.host = [b.pin_memory() for b in self.host] if DEVICE.type == "cuda" else self.host
        self.scales = [torch.cat([torch.full((n,), 1 / (4 * max(n, 1))) for n in b.targets.modality_counts]).to(DEVICE)
                       for b in self.host]

    def step(self, number: int) -> None:
        batch: PackedBatch = self.host[number % len(self.host)].to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, _ = self.model(batch, self.scales[number % len(self.host)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def work(self, number: int) -> tuple[float, int]:
        """Model FLOPs and real tokens of a step."""
        batch = self.host[number % len(self.host)]
        flops = training_flops(self.sizes, [m.vocab_size for m in RELEASED], batch.inputs.lengths,
                               batch.targets.lengths)
        return flops, len(batch.inputs) + len(batch.targets)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_steps(sizes: ModelArgs, micro: int, compiled: bool, steps: int) -> dict:
    """Median seconds a step after the first passes over the batches."""
    trainer = Trainer(sizes, micro, compiled)
    for number in range(len(trainer.host) + 2):
        trainer.step(number)
    wait()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for number in range(steps):
        started = time.perf_counter()
        trainer.step(number)
        wait()
        rows.append((time.perf_counter() - started, *trainer.work(number)))
    seconds = statistics.median(r[0] for r in rows)
    flops = statistics.median(f / s for s, f, _ in rows)
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return {"micro": micro, "compile": compiled, "ms": 1e3 * seconds, "samples_per_s": micro / seconds,
            "tokens_per_s": statistics.median(t / s for s, _, t in rows), "tflops": flops / 1e12, "mfu": flops / peak
            if peak else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None}


def section_correct(args) -> dict:
    return {**check_attention(0), **check_attention(1), **check_model()}


def section_step(args) -> list[dict]:
    rows = []
    for compiled in (False, True):
        for micro in args.micro:
            try:
                rows.append(time_steps(args.sizes, micro, compiled, args.steps))
                say(json.dumps(rows[-1]))
            except torch.cuda.OutOfMemoryError:
                say(f"micro-batch {micro}, compile={compiled}: out of memory")
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def section_sync(args) -> str:
    """Which line makes the host wait, or "none"."""
    trainer = Trainer(args.sizes, args.micro[0], False)
    trainer.step(0)
    if DEVICE.type != "cuda":
        return "no CUDA device; tests/training/test_no_sync.py is the CPU's twin"
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(1)
        return "none"
    except RuntimeError as problem:
        return str(problem)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def section_profile(args) -> str:
    from torch.profiler import ProfilerActivity, profile

    trainer = Trainer(args.sizes, args.micro[len(args.micro) // 2], False)
    for number in range(3):
        trainer.step(number)
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=activities) as prof:
        trainer.step(3)
        wait()
    return prof.key_averages().table(sort_by=f"self_{DEVICE.type}_time_total", row_limit=25, max_name_column_width=60)


def section_generate(args) -> dict[str, float]:
    torch.manual_seed(0)
    model = EgoM2P(RELEASED, args.sizes).to(DEVICE).eval()
    seconds = {}
    for name in args.recipes:
        recipe = load(RecipeConfig, f"cfgs/generate/{name}.yaml")
        targets = {k: replace(t, steps=min(t.steps, 2))
                   for k, t in recipe.targets.items()} if args.smoke else recipe.targets
        grid = np.random.default_rng(0).integers(0, 64000, (1, 5, 32, 32))
        started = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            generate_targets(model, {recipe.input or "rgb": grid}, targets, codes=None)
        wait()
        seconds[name] = time.perf_counter() - started
    return seconds


def section_train(args) -> dict[str, float]:
    """The real command on random shards; figures of its last logged step."""
    root = args.out / "tokens"
    config = "cfgs/train/debug.yaml" if args.smoke else "cfgs/train/egom2p_base.yaml"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "egom2p", "shards", "random", config, "--out", root, "--count", "40"
                        if args.smoke else "500"],
                       check=True, stderr=subprocess.DEVNULL)
    micro = 4 if args.smoke else max(args.micro)
    changes = ["train.steps=5", "train.batch_size=8"] if args.smoke else [
        f"train.steps={args.train_steps}", f"train.batch_size={2 * micro}", "loss.group_samples=0", "train.tokens=0",
        "optim.warmup_tokens=0",
        "optim.warmup_steps=20", "data.workers=8", f"train.compile={str(args.compile_train).lower()}", "log.every=10"]
    done = subprocess.run([sys.executable, "-m", "egom2p", "train", config, f"data.root={root}",
                           f"run.dir={args.out / f'run-{time.time_ns()}'}",
                           f"train.micro_batch_size={micro}", "checkpoint.every=0", "eval.every=0",
                           *changes], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    newest = max(args.out.glob("run-*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()][1:]
    return {k: statistics.median(r[k] for r in rows if k in r)
            for k in ("samples_per_s", "tokens_per_s", "mfu", "data_wait_share", "peak_memory_gb")
            if any(k in r for r in rows)}


SECTIONS = {"correct": section_correct, "sync": section_sync, "step": section_step, "profile": section_profile,
            "generate": section_generate, "train": section_train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--micro", type=lambda s: [int(n) for n in s.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipes", type=lambda s: s.split(","),
                        default=["rgb2cam", "rgb2gaze", "rgb2depth", "depth2rgb"])
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--compile-train", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, any device")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.sizes = model_sizes(args.size)
    if args.smoke:
        args.sizes, args.micro, args.steps, args.recipes = ModelArgs(32, 2, 1, 1), [1], 1, ["rgb2cam"]
    heading(__doc__, size=args.size)
    results, summary = {}, []
    for name in args.sections.split(","):
        started = time.perf_counter()
        try:
            results[name] = SECTIONS[name](args)
            summary.append(f"{name}: ok ({time.perf_counter() - started:.0f} s)")
        except Exception as problem:  # one section's failure must not cost the others their lease
            results[name] = summary_line = f"FAILED: {type(problem).__name__}: {problem}"
            summary.append(f"{name}: {summary_line}")
        say(f"--- {name}\n{results[name] if isinstance(results[name], str) else json.dumps(results[name], indent=1)}")
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))
    best = max((r["samples_per_s"] for r in results["step"]), default=0) if isinstance(results.get("step"), list) else 0
    say("\n".join([*summary, f"best {best:.1f} samples/s; the goal is {GOAL:.0f} on an H100"]))
    sys.exit(any("FAILED" in line for line in summary))


if __name__ == "__main__":
    main()
