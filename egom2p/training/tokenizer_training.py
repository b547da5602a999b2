"""Training a tokenizer on raw signals: `egom2p tokenizer train`."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from egom2p.data.batch import on_device
from egom2p.data.clips import ClipIndex
from egom2p.data.loader import BatchPlan, SourceArgs, StepBatch, step_loader
from egom2p.data.order import PassOrder
from egom2p.distributed import World, sum_over_ranks
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import Modality, ModalityArgs
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer, with_statistics
from egom2p.tokenizers.video import VideoArgs, VideoTokenizer
from egom2p.tokenizers.widen import widen
from egom2p.training.arguments import TrainingConfig
from egom2p.training.loop import run_training

log = logging.getLogger(__name__)

KEPT = 20_000
STATISTICS_CLIPS = 1000  # the trivial predictions are averages over so many


@dataclass(frozen=True, kw_only=True)
class ClipsArgs(SourceArgs):
    """clips: pattern of the clip tars. widen: train on head motion made wider (`tokenizers.widen`; signal pose)."""

    clips: str
    widen: bool = False
    shuffle_shards: int = 4


@dataclass(frozen=True)
class TokenizerArgs:
    """name and entry of the modality, and exactly one of `motion` and `video`: the network."""

    name: str
    modality: ModalityArgs
    motion: MotionArgs | None = None
    video: VideoArgs | None = None

    def __post_init__(self) -> None:
        if (self.motion is None) == (self.video is None):
            raise ValueError("give exactly one of motion and video")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(TrainingConfig):
    """Everything `egom2p tokenizer train` reads."""

    tokenizer: TokenizerArgs
    data: ClipsArgs


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Train a tokenizer; returns the run's folder, whose latest checkpoint is the finished tokenizer."""
    return run_training(config, TokenizerTask)


def make_tokenizer(args: TokenizerArgs, signals: Iterable[np.ndarray] = ()) -> Tokenizer:
    """signals: raw ones, on which what the arguments leave open is measured."""
    try:
        modality = Modality(args.name, **vars(args.modality))
        if args.motion:
            return MotionTokenizer(modality, with_statistics(args.motion, modality, signals))
        return VideoTokenizer(modality, args.video)
    except ValueError as error:
        raise UserError(f"tokenizer '{args.name}': {error}") from error


@dataclass(frozen=True)
class SignalBatch:
    """x (B, ...) in the network's units; numbers (B,) their global sample numbers; samples: how many of them count."""

    x: Tensor
    numbers: np.ndarray
    samples: int

    def to(self, device: torch.device) -> "SignalBatch":
        return replace(self, x=self.x.to(device, non_blocking=True))

    def pin_memory(self) -> "SignalBatch":
        return replace(self, x=self.x.pin_memory())


class SignalSteps(torch.utils.data.Dataset):
    """Step -> this rank's micro-batches of normalised signals, in the data order of one data set."""

    def __init__(self, clips: ClipIndex, tokenizer: Tokenizer, plan: BatchPlan, order: PassOrder | None,
                 widen_seed: int | None = None) -> None:
        self.clips, self.tokenizer, self.plan, self.order = clips, tokenizer, plan, order
        self.widen_seed = widen_seed
        self.kept: dict[int, np.ndarray] = {}  # series are small and are read once, as far as KEPT clips go

    def __getitem__(self, step: int) -> StepBatch:
        micro, damaged = [], []
        for numbers in self.plan.deal(step, None):
            rows, read = [], []
            for number in numbers:
                try:
                    element = self.order.element(number) if self.order else number % len(self.clips)
                    raw = self._read(element)
                    if raw is not None:
                        rows.append(raw)
                        read.append(number)
                except UserError as error:
                    damaged.append(f"sample {number}: {error}")
            raws = rows or [self._stand_in()]
            if self.widen_seed is not None:
                raws = widen(np.stack(raws), self.widen_seed, np.array(read or [0]))
            x = self.tokenizer.stack([self.tokenizer.signal.normalize(raw) for raw in raws])
            micro.append(SignalBatch(x, np.array(read or [-1]), len(rows)))
        return StepBatch(step, micro, damaged)

    def _read(self, element: int) -> np.ndarray | None:
        """One clip's raw signal, None when it carries no measurement. Raises UserError when it is damaged or not what
        the tokenizer is for."""
        raw = self.kept.get(element)
        if raw is None:
            raw = self.clips.read_signal(element, self.tokenizer.modality.clip_signal)
            self.tokenizer.check(raw, self.clips.keys[element])
            if not self.tokenizer.modality.kind.is_picture and len(self.kept) < KEPT:
                self.kept[element] = raw
        return raw if np.any(self.tokenizer.observed(raw)) else None

    def _stand_in(self) -> np.ndarray:
        """Some readable clip, for a micro-batch that lost all of its own: it counts nothing, but every rank must take
        part."""
        for element in range(len(self.clips)):
            with contextlib.suppress(UserError):
                x = self._read(element)
                if x is not None:
                    return x
        raise UserError("no clip of the data set can be read; `egom2p shards check` lists the damaged files")


class TokenizerTask:
    """Reconstruction of one signal. The loss is the mean over the clips of the global batch."""

    tokens_per_sample = 1

    def __init__(self, config: TokenizerConfig, world: World) -> None:
        self.config, self.world = config, world
        if config.train.compile:
            raise UserError("train.compile is for the masked transformer; leave it out for a tokenizer")
        self.source = config.tokenizer.modality.source or config.tokenizer.name
        if config.data.widen and config.tokenizer.modality.signal != "pose":
            raise UserError("data.widen is for head motion (signal: pose)")
        self.clips = ClipIndex(config.data.clips, self.source)
        if config.eval.every and not config.eval.clips and world.is_main:
            log.warning("eval.clips is not set: eval/error is of training clips, and tells nothing of others")
        self.model = make_tokenizer(config.tokenizer, self._spread_over_clips())
        self.order = PassOrder(self.clips.shard_sizes, config.data.shuffle_shards, config.train.seed, salt=0)
        micro = config.train.micro_batch(world.size)
        self.plan = BatchPlan(config.train.batch_size, micro, config.train.batch_size, world.rank, world.size)
        self.samples = torch.ones(())
        self.model.statistics = self.model.modality.kind.statistics(self._checked_clips())
        content = json.dumps([self.clips.keys, [(name[25:] if self.clips.is_remote else name, size)
                                               for name, size, _ in self.clips.stamps()]])
        self._fingerprint = f"{len(self.clips)} clips {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def steps(self, steps: range) -> Iterator[StepBatch]:
        seed = self.config.train.seed if self.config.data.widen else None
        return step_loader(SignalSteps(self.clips, self.model, self.plan, self.order, seed), steps,
                           self.config.data.workers)

    def begin_step(self, batch: StepBatch) -> None:
        count = np.array(sum(m.samples for m in batch.micro_batches), np.float32)
        self.samples = sum_over_ranks(on_device(count, self.world.device))

    def loss(self, micro: SignalBatch, forward: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        loss, figures = forward(self._typed(micro.x))
        used = torch.bincount(figures["ids"].flatten(), minlength=self.model.modality.vocab_size).double()
        if not micro.samples:  # a stand-in counts nothing
            self.model.quantizer.leave_out_the_last()
            used.zero_()
        share = micro.samples / self.samples
        sums = torch.stack([loss.detach() * share, figures["error"] * share]).double()
        return loss * share, torch.cat([sums, used]), (~torch.isfinite(loss.detach())).expand(len(micro.numbers))

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(next(self.model.parameters()).dtype)

    def figures(self, sums: Tensor) -> dict[str, float]:
        """loss, reconstruction error, share of codes used and perplexity of the codebook in this batch."""
        used = sums[2:]
        p = used / used.sum().clamp(min=1)
        perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
        return {"loss": sums[0].item(), "error": sums[1].item(), "tokens": used.sum().item(),
                "codes_used": (used > 0).double().mean().item(), "perplexity": perplexity.item()}

    def predict(self, folder: Path) -> dict[str, float]:
        """A tokenizer predicts nothing."""
        return {}

    def learns(self, name: str, step: int) -> bool:
        return True

    def faster_data(self) -> str:
        return "" if self.config.data.workers else "; data.workers reads ahead in processes"

    def after_step(self, step: int, skipped: Tensor) -> None:
        self.model.after_step(self.config.train.seed, step, bool(skipped))

    def inspect(self, batch: StepBatch) -> list[dict[str, Any]]:
        """Reconstruction loss of each clip."""
        rows = []
        for micro in batch.micro_batches:
            for number, x in zip(micro.numbers.tolist(), micro.x, strict=True):
                loss = self.model.eval()(self._typed(x[None]).to(self.world.device))[0].item()
                rows.append({"sample": number, "loss": loss if math.isfinite(loss) else None})
        self.model.train()
        return rows

    def evaluate(self) -> dict[str, float]:
        """Reconstruction error on `eval.clips`; where none are given, on the first clips of the training."""
        held_out = ClipIndex(self.config.eval.clips or self.config.data.clips, self.source)
        samples = min(self.config.eval.samples, len(held_out))
        batch = SignalSteps(held_out, self.model, BatchPlan(samples, 32, samples), None)[0]
        self.samples = torch.tensor(float(sum(m.samples for m in batch.micro_batches)), device=self.world.device)
        for message in batch.damaged:
            log.warning("held out, left out: %s", message)
        if not self.samples:
            raise UserError(f"none of {samples} held-out clips can be read (eval.clips, eval.samples)")
        sums = sum(self.loss(m.to(self.world.device), self.model)[1] for m in batch.micro_batches if m.samples)
        return {f"eval/{k}": v for k, v in self.figures(sums).items() if k in ("error", "codes_used", "perplexity")}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.model.save_pretrained(folder, weights)

    def _spread_over_clips(self) -> Iterator[np.ndarray]:
        """Raw signals of at most STATISTICS_CLIPS readable clips, evenly spread."""
        for element in self._spread():
            with contextlib.suppress(DamagedClip):
                yield self.clips.read_signal(element, self.source)

    def _checked_clips(self) -> Iterator[np.ndarray]:
        """The same ones. Raises UserError before the first step when they are not what the tokenizer is for."""
        for element in self._spread():
            with contextlib.suppress(DamagedClip):
                signal = self.clips.read_signal(element, self.source)
                self.model.check(signal, self.clips.keys[element])
                yield signal

    def _spread(self) -> list[int]:
        return np.linspace(0, len(self.clips) - 1, min(len(self.clips), STATISTICS_CLIPS)).astype(int).tolist()
