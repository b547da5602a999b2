"""Everything we want to know of a CUDA machine, in one command of about ten minutes.

    python -m benchmarks.gpu [--size base] [--sections correct,sync,step,ladder,profile,generate,train] [--out runs/gpu]
    python -m benchmarks.gpu --smoke          (seconds, any device: the same code at toy sizes)

- correct: fused segment attention in every dtype against softmax in float64, a segment at a time (norm-wise relative
  error of the output and of each gradient), for small segments and for those of training (64 channels a head, segments
  of 1 to 2 048 tokens, packs of 4 000 and 60 000), with the kernels that served; the chunked loss against torch's in
  float64; and loss and gradients of a small model on the device against the plain padded network in float64 on the CPU
  (benchmarks/plain.py).
- step: forward, backward, clip, fused AdamW in bf16 autocast on samples of the released mask mixture, at several
  micro-batch sizes, with and without torch.compile: samples/s, real tokens/s, model FLOP utilisation
  (egom2p/model/flops.py over the datasheet peak), peak memory. The goal is 177 samples/s on an H100.
- ladder: the same step with one change after another switched on, at the largest micro-batch that fits: samples/s, MFU
  of real tokens, peak memory, kernels a step, milliseconds for which a micro-batch keeps the host busy (one of a single
  sample, whose kernels do not fill the device's queue); a table for RESULTS.md.
- sync: one step under torch.cuda.set_sync_debug_mode("error"), which raises where the host would wait for the device.
- profile: the kernels of a step by device time.
- generate: seconds a clip of the four released recipes, as `egom2p generate` computes, after one clip to warm up.
- train: two minutes of `egom2p train` on random shards, on one GPU and, where there are more, under torchrun on all;
  the share of time waiting for data must be near 0.
A table comes last; full figures are in OUT/gpu.json. Timings are medians; the first steps are left out.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.plain import PlainEgoM2P
from benchmarks.printing import heading, say
from benchmarks.train_step import RELEASED, make_samples, model_sizes
from egom2p.config import load
from egom2p.data.batch import FlatTokens, MaskedSample, PackedBatch, pack
from egom2p.distributed import multiplies_bfloat16
from egom2p.generation.sampler import generate_targets
from egom2p.generation.schedule import RecipeConfig
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.attention import Segments, newest_flash_attention, segment_attention
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import peak_flops, training_flops
from egom2p.model.loss import CHUNK_ELEMENTS, softmax_step, softmax_step_to_fuse, weighted_cross_entropy
from egom2p.processes import set_environment
from egom2p.training.optim import OptimArgs, make_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOAL = 177.0
TRAIN_LIMIT_S = 600
SMALL = ModalitySet([Modality("a", 70, (3, 4, 4)), Modality("b", 50, (2, 4, 4)), Modality("c", 17, (9,))])
MODALITIES = RELEASED
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference|, infinite when ours holds a NaN."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    if not ours.isfinite().all():
        return float("inf")
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))


def segments_one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: np.ndarray,
                        keys: np.ndarray) -> torch.Tensor:
    """Softmax attention of each segment by itself; zeros for queries without keys."""
    parts = []
    for one, keys_one, values in zip(q.split(queries.tolist()), k.split(keys.tolist()), v.split(keys.tolist()),
                                     strict=True):
        weights = (torch.einsum("qhd,khd->hqk", one, keys_one) * q.shape[-1] ** -0.5).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


def check_attention(queries: np.ndarray, keys: np.ndarray, heads: int, seed: int,
                    dtypes: dict[torch.dtype, float]) -> dict[str, float]:
    """Worst error in each dtype; the name says how many tokens."""
    rng = np.random.default_rng(seed)
    shapes = [(int(n.sum()), heads, 64) for n in (queries, keys, keys)]
    wide = [torch.from_numpy(rng.standard_normal(s)).to(DEVICE).requires_grad_() for s in shapes]
    expected = segments_one_by_one(*wide, queries, keys)
    weight = torch.from_numpy(rng.standard_normal(expected.shape)).to(DEVICE)
    (expected * weight).sum().backward()
    errors = {}
    for dtype, limit in dtypes.items():
        # Slices of one tensor, as the blocks make them.
        q, kv = wide[0].detach().to(dtype), torch.stack([w.detach().to(dtype) for w in wide[1:]], 1)
        ours = [q.requires_grad_(), kv.requires_grad_()]
        with kernels() as served:
            out = segment_attention(q, *kv.unbind(1), Segments(queries, keys, DEVICE))
            (out * weight.to(dtype)).sum().backward()
        theirs = [wide[0].grad, torch.stack([w.grad for w in wide[1:]], 1)]
        worst = max(error(out, expected), *(error(o.grad, g) for o, g in zip(ours, theirs, strict=True)))
        name = f"attention {str(dtype)[6:]}, {queries.sum()} queries, {keys.sum()} keys"
        errors[f"{name} ({', '.join(sorted(served)) or 'kernels unknown'})"] = worst
        assert worst < limit, f"{name}: error {worst:.1e} above {limit:.0e} ({served})"
    return errors


@contextmanager
def kernels() -> Iterator[set[str]]:
    """Which attention served, filled on leaving: by the names of the kernels, of the operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    served: set[str] = set()
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
        yield served
        wait()
    names = " ".join(event.key.lower() for event in prof.key_averages())
    served |= {kind for kind in ("flash", "cudnn", "efficient", "cutlass", "attention_math") if kind in names}


def check_attentions(smoke: bool) -> dict[str, float]:
    """Small segments with a single-token one, an empty one and one without keys; then the sizes of training."""
    errors = {}
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        queries, keys = rng.integers(2, 90, 6), rng.integers(2, 90, 6)
        queries[1], keys[2], queries[3], keys[3] = 1, 0, 0, 5
        errors |= check_attention(queries, keys, 4, seed, TOLERANCE)
    half = {d: limit for d, limit in TOLERANCE.items() if d in (torch.float16, torch.bfloat16)}
    once = [1, 3, 129, 1500, 2048, 0, 5]
    for repeats in (0,) if smoke else (1, 16):  # 3 686 and 58 976 tokens
        queries = np.array(once * repeats or [1, 3, 129, 300])
        keys = np.array([2048, 1, 129, 3, 1500, 7, 0] * repeats or [129, 1, 0, 300])
        errors |= check_attention(queries, keys, 12, repeats, half)
        errors |= check_attention(queries, queries, 12, repeats, half)
    return errors


def check_loss(smoke: bool) -> dict[str, float]:
    """The chunked loss over a large vocabulary in bf16, plain and compiled, against torch's in float64: the loss, and
    the gradients by hidden states and head."""
    rows, vocab, dim = (300, 500, 64) if smoke else (9000, 64000, 768)
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, head = (torch.randn(n, dim, device=DEVICE, generator=generator) for n in (rows, vocab))
    head *= dim**-0.5
    target = torch.randint(vocab, (rows,), device=DEVICE, generator=generator)
    scale = torch.rand(rows, device=DEVICE, generator=generator) / rows
    wide = [x.double().requires_grad_() for x in (hidden, head)]
    expected = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for part in range(0, rows, 1000):
        here = slice(part, part + 1000)
        logits = wide[0][here] @ wide[1].T
        loss = (torch.nn.functional.cross_entropy(logits, target[here], reduction="none") * scale[here]).sum()
        loss.backward()
        expected += loss.detach()
    errors = {}
    for name, softmax in (("plain", softmax_step), ("compiled", torch.compile(softmax_step_to_fuse, dynamic=True))):
        ours = [x.clone().requires_grad_() for x in (hidden, head)]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            total, _ = weighted_cross_entropy(*ours, target, scale, softmax)
        total.backward()
        worst = max(error(total, expected), *(error(o.grad, w.grad) for o, w in zip(ours, wide, strict=True)))
        errors[f"loss bf16 {name}"] = worst
        assert worst < 2e-2, f"{name} loss in bf16: error {worst:.1e}"
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


def half() -> torch.autocast:
    """bfloat16 where it is what one would train in."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=multiplies_bfloat16(DEVICE))


def make_model(sizes: ModelArgs) -> EgoM2P:
    """On the device, after what former ones held there is given back."""
    give_back()
    torch.manual_seed(0)
    with DEVICE:  # 400 M random numbers take a CPU long; position tables come from numpy and are moved
        model = EgoM2P(MODALITIES, sizes)
    return model.to(DEVICE)


class Trainer:
    """Model, optimiser and batches of one step measurement."""

    def __init__(self, sizes: ModelArgs, micro: int, compiled: bool, batches: int = 4, fused: bool = True) -> None:
        self.model = make_model(sizes)
        if compiled:
            self.model.compile()
        if not fused:
            self.model.softmax = softmax_step
        self.optimizer = make_optimizer(self.model, OptimArgs())
        self.sizes = sizes
        self.hold(micro, batches)

    def hold(self, micro: int, batches: int) -> None:
        """Batches of `micro` samples to step through."""
        self.host = [pack(make_samples(micro, i * micro, MODALITIES), 4) for i in range(batches)]
        self.host = [b.pin_memory() for b in self.host] if DEVICE.type == "cuda" else self.host
        self.scales = [torch.cat([torch.full((n,), 1 / (4 * max(n, 1))) for n in b.targets.modality_counts]).to(DEVICE)
                       for b in self.host]

    def step(self, number: int) -> None:
        batch: PackedBatch = self.host[number % len(self.host)].to(DEVICE)
        with half():
            loss, _ = self.model(batch, self.scales[number % len(self.host)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def work(self, number: int) -> tuple[float, int]:
        """Model FLOPs and real tokens of a step."""
        batch = self.host[number % len(self.host)]
        flops = training_flops(self.sizes, [m.vocab_size for m in MODALITIES], batch.inputs.lengths,
                               batch.targets.lengths)
        return flops, len(batch.inputs) + len(batch.targets)


def give_back() -> None:
    """What former models held on the device: compiled blocks refer to themselves, and go when garbage is collected."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_steps(sizes: ModelArgs, micro: int, compiled: bool, steps: int, fused: bool = True) -> dict:
    """Median seconds a step after the first passes over the batches, and for how long the host is busy with one."""
    trainer = Trainer(sizes, micro, compiled, fused=fused)
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
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None
    launches = count_launches(trainer, steps)
    seconds = statistics.median(r[0] for r in rows)
    flops = statistics.median(f / s for s, f, _ in rows)
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return {"micro": micro, "compile": compiled, "ms": 1e3 * seconds, "samples_per_s": micro / seconds,
            "tokens_per_s": statistics.median(t / s for s, _, t in rows), "tflops": flops / 1e12,
            "mfu": flops / peak if peak else None, "host_ms": 1e3 * host_seconds(trainer), "launches": launches,
            "peak_gb": peak_gb}


def host_seconds(trainer: Trainer) -> float:
    """For how long a step keeps the host busy, whatever its size: with one sample, whose kernels do not fill the
    device's queue, in which a host would wait."""
    trainer.hold(1, 2)
    seconds = []
    for number in range(5):
        started = time.perf_counter()
        trainer.step(number)
        seconds.append(time.perf_counter() - started)
        wait()
    return min(seconds)


def count_launches(trainer: Trainer, number: int) -> int | None:
    """Kernels and copies of one step on the device."""
    from torch.profiler import ProfilerActivity, profile

    if DEVICE.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        trainer.step(number)
        wait()
    return sum(event.count for event in prof.key_averages() if event.self_device_time_total > 0)


def section_correct(args) -> dict:
    """Every check is made, also after one that fails."""
    found, failed = {}, []
    for check in (lambda: check_attentions(args.smoke), lambda: check_loss(args.smoke), check_model):
        try:
            found |= check()
        except Exception as problem:
            failed.append(f"{type(problem).__name__}: {problem}")
    say(json.dumps(found, indent=1))
    if failed:
        raise AssertionError("; ".join(failed))
    return found


def timed(sizes: ModelArgs, micro: int, compiled: bool, steps: int, fused: bool = True) -> dict | None:
    """`time_steps`, or None and why it failed: one row must not cost the others their lease."""
    try:
        return time_steps(sizes, micro, compiled, steps, fused)
    except torch.cuda.OutOfMemoryError:
        reason = "out of memory"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
    say(f"micro-batch {micro}, compile={compiled}: {reason}")
    return None


class Rung(NamedTuple):
    """What is switched on: compiled blocks, the fused softmax, filled packs, elements of a chunk of logits, and the
    newest FlashAttention that is installed instead of torch's own."""

    name: str
    compiled: bool = True
    fused: bool = True
    fill_to: int = 0
    elements: int = CHUNK_ELEMENTS["cuda"]
    newest: bool = False


LADDER = (  # each with what those before it switched on
    Rung("small chunks of the loss (as on a CPU)", False, False, elements=CHUNK_ELEMENTS["cpu"]),
    Rung("large chunks", False, False),
    Rung("compiled blocks", fused=False),
    Rung("fused softmax (train.compile)"),
    Rung("FlashAttention 3 or 4", newest=True),
    Rung("model.fill_to=2048", newest=True, fill_to=2048),
)


def choose_attention(newest: bool) -> str:
    """torch's own flash kernels, or the newest ones installed, which training takes; returns the name of those."""
    if DEVICE.type != "cuda":
        return ""
    if not newest:
        if getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)():
            torch.nn.attention.restore_flash_attention_impl()
        return ""
    return newest_flash_attention(torch.cuda.get_device_capability()[0])


def section_ladder(args) -> str:
    """A Markdown table."""
    lines = ["| switched on | micro-batch | samples/s | MFU | peak GB | kernels a step | host ms of ms |",
             "|---|---|---|---|---|---|---|"]
    usual = CHUNK_ELEMENTS[DEVICE.type]
    for rung in LADDER[-1:] if args.smoke else LADDER:
        attention = choose_attention(rung.newest)
        if rung.newest and not rung.fill_to and not attention:
            say(f"{rung.name}: not installed for this GPU")
            continue
        CHUNK_ELEMENTS[DEVICE.type] = rung.elements
        torch._dynamo.reset()
        for micro in sorted(args.micro, reverse=True):
            row = timed(replace(args.sizes, fill_to=rung.fill_to), micro, rung.compiled, args.steps, rung.fused)
            if row is None:
                continue
            lines.append(f"| {rung.name} | {micro} | {row['samples_per_s']:.1f} | "
                         + (f"{row['mfu']:.1%}" if row["mfu"] else "-") + " | "
                         + (f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-")
                         + f" | {row['launches'] or '-'} | {row['host_ms']:.0f} of {row['ms']:.0f} |")
            say(lines[-1])
            break
    CHUNK_ELEMENTS[DEVICE.type] = usual
    choose_attention(True)
    return "\n".join(lines)


def section_step(args) -> list[dict]:
    rows = []
    for compiled in (False,) if args.smoke else (False, True):  # the ladder compiles too
        for micro in args.micro:
            row = timed(args.sizes, micro, compiled, args.steps)
            if row is not None:
                rows.append(row)
                say(json.dumps(row))
    if not rows:
        raise RuntimeError("no row could be measured")
    args.best_micro = max(rows, key=lambda row: row["samples_per_s"])["micro"]
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
    torch.set_float32_matmul_precision("high")  # after what is checked in whole float32
    model = make_model(args.sizes).eval()
    seconds = {}
    for name in [*args.recipes[:1], *args.recipes]:  # the first also warms up, and is timed again
        recipe = load(RecipeConfig, f"cfgs/generate/{name}.yaml")
        targets = {k: replace(t, steps=min(t.steps, 2))
                   for k, t in recipe.targets.items()} if args.smoke else recipe.targets
        rgb = MODALITIES[0]
        grid = np.random.default_rng(0).integers(0, rgb.vocab_size, (1, *rgb.grid))
        started = time.perf_counter()
        generate_targets(model, {recipe.input or "rgb": grid}, targets, codes=None)
        wait()
        seconds[name] = time.perf_counter() - started
    return seconds


def section_train(args) -> dict[str, dict[str, float]]:
    """The real command on random shards, {processes: figures}: medians of its logged steps, the first left out. On
    several GPUs also with gradients summed in bfloat16."""
    give_back()
    counts = sorted({1, max(1, torch.cuda.device_count())})
    found = {f"{n} process{'es' if n > 1 else ''}": train_for_a_while(args, n) for n in counts}
    if counts[-1] > 1:
        found[f"{counts[-1]} processes, train.reduce=bfloat16"] = train_for_a_while(args, counts[-1],
                                                                                    "train.reduce=bfloat16")
    return found


def train_for_a_while(args, processes: int, *more: str) -> dict[str, float]:
    root = args.out / "tokens"
    config = "cfgs/train/debug.yaml" if args.smoke else "cfgs/train/egom2p_base.yaml"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "egom2p", "shards", "random", config, "--out", root, "--count", "40"
                        if args.smoke else "500"],
                       check=True, stderr=subprocess.DEVNULL)
    micro = 4 if args.smoke else args.best_micro
    changes = ["train.steps=5", "train.batch_size=8"] if args.smoke else [
        f"train.steps={args.train_steps}", f"train.batch_size={2 * micro * processes}",
        "loss.group_samples=0", "train.tokens=0", "optim.warmup_tokens=0",
        "optim.warmup_steps=20", "data.workers=8", f"train.compile={str(args.compile_train).lower()}", "log.every=10"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *(launcher if processes > 1 else []), "-m", "egom2p", "train", config,
                           f"data.root={root}",
                           f"run.dir={args.out / f'run-{time.time_ns()}'}",
                           f"train.micro_batch_size={micro}", "checkpoint.every=0", "eval.every=0",
                           *changes, *more], capture_output=True, text=True, timeout=TRAIN_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{processes} processes: {done.stderr[-1500:]}")
    newest = max(args.out.glob("run-*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()][1:]
    return {k: statistics.median(r[k] for r in rows if k in r)
            for k in ("samples_per_s", "tokens_per_s", "mfu", "data_wait_share", "peak_memory_gb")
            if any(k in r for r in rows)}


SECTIONS = {"correct": section_correct, "sync": section_sync, "step": section_step, "ladder": section_ladder,
            "profile": section_profile, "generate": section_generate, "train": section_train}


def main() -> None:
    global MODALITIES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--micro", type=lambda s: [int(n) for n in s.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipes", type=lambda s: s.split(","),
                        default=["rgb2cam", "rgb2gaze", "rgb2depth", "depth2rgb"])
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--compile-train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, any device")
    args = parser.parse_args()
    set_environment()
    args.out.mkdir(parents=True, exist_ok=True)
    args.sizes, args.best_micro = model_sizes(args.size), args.micro[-1]
    if args.smoke:
        MODALITIES = ModalitySet([replace(m, vocab_size=min(m.vocab_size, 500)) for m in RELEASED])
        args.sizes, args.micro, args.steps, args.recipes = ModelArgs(32, 2, 1, 1), [1], 1, ["rgb2cam"]
    heading(__doc__, size=args.size)
    if DEVICE.type == "cuda":
        say(f"attention by {choose_attention(True) or 'torch'}, as in training")
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
