"""What every training is configured with, whatever it trains."""

from dataclasses import dataclass, field
from typing import Literal

from egom2p.errors import UserError
from egom2p.generation.schedule import TargetArgs
from egom2p.training.checkpoint import CheckpointArgs
from egom2p.training.log import LogArgs
from egom2p.training.optim import OptimArgs
from egom2p.training.profile import profiled_steps


@dataclass(frozen=True)
class RunArgs:
    """dir: folder of the run; starting a command again in the same folder resumes it."""

    dir: str


@dataclass(frozen=True)
class ResumeArgs:
    """force: resume although the configuration or the data changed."""

    force: bool = False


@dataclass(frozen=True)
class DebugArgs:
    """replay_step: run only that step of the run again, from the newest checkpoint before it, and write what every
    sample's loss was to RUN/replay_step_N.json. Nothing else of the run is touched."""

    replay_step: int = 0


@dataclass(frozen=True)
class TrainArgs:
    """batch_size is the global batch; micro_batch_size what one process computes at a time (0 = all of its part).
    One of steps and tokens (samples x budget) says how long. seed: of data order, masks and weights. threads: of torch
    in each process (0 = its own choice). precision: compute type, weights stay float32
    (float64 computes and stores in float64). deterministic: refuse operations that vary from run to run (CUDA), and
    have MKL's products repeat bit by bit.
    compile: torch.compile the transformer's blocks and the loss's softmax, with dynamic lengths (not for tokenizers).
    parallel: how several processes share the model, ddp
    (a copy each) or fsdp (sharded, for models that do not fit). reduce: the type in which gradients are summed over
    processes; bfloat16 sends half as much, for slow networks. timeout_s: a rank that keeps the others waiting so long
    is lost and ends the run (first_timeout_s until the first step is done, when data and kernels are being prepared).
    max_skipped: so many steps in a row without a finite loss and gradient end the run. ema: decay a step of a moving
    average of the weights (0 = none, .999 say), which evaluations and exports then hold. profile: FROM:TO, steps
    counted from 1 whose profile is written into RUN/profile."""

    batch_size: int
    steps: int = 0
    tokens: int = 0
    micro_batch_size: int = 0
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    deterministic: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    reduce: Literal["float32", "bfloat16"] = "float32"
    threads: int = 0
    first_timeout_s: int = 1800
    timeout_s: int = 300
    max_skipped: int = 10
    ema: float = 0.0
    profile: str = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.tokens, self.micro_batch_size, self.seed, self.threads) < 0:
            raise ValueError("steps, tokens, micro_batch_size, seed and threads must not be below 0")
        if bool(self.steps) == bool(self.tokens):
            raise ValueError("give one of steps and tokens")
        if self.batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        if min(self.timeout_s, self.first_timeout_s, self.max_skipped) < 1:
            raise ValueError("timeout_s, first_timeout_s and max_skipped must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError("ema must lie in 0 .. 1, 1 left out")
        if self.reduce == "bfloat16" and self.precision == "float64":
            raise ValueError("precision float64 sums in float64; leave reduce out")
        profiled_steps(self.profile)

    def num_steps(self, tokens_per_sample: int) -> int:
        return self.steps or -(-self.tokens // (tokens_per_sample * self.batch_size))

    def micro_batch(self, world: int) -> int:
        """Samples a process computes at a time."""
        if self.batch_size % world:
            fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise UserError(f"train.batch_size={self.batch_size} does not divide by {world} processes; use one of "
                            f"{fits[:12]} processes")
        return min(self.micro_batch_size or self.batch_size, self.batch_size // world)


@dataclass(frozen=True)
class EvalArgs:
    """every: steps between evaluations on held-out data (0 = never); samples, root, datasets: token loss on what.
    tasks: also predict these (rgb2cam, ...) from `task_clips` of the clip tars that `clips` names, every `tasks_every`
    steps (0 = whenever the loss is), with `recipes`; stop after max_s seconds. Figures and pictures are logged."""

    every: int = 0
    samples: int = 64
    root: str = ""
    datasets: tuple[str, ...] = ()
    clips: str = ""
    tasks: tuple[str, ...] = ()
    tasks_every: int = 0
    task_clips: int = 8
    max_s: float = 120.0
    recipes: dict[str, TargetArgs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.samples, self.task_clips) < 1 or min(self.every, self.tasks_every) < 0:
            raise ValueError("samples and task_clips must be at least 1, every and tasks_every not below 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training is configured with."""

    run: RunArgs
    train: TrainArgs
    optim: OptimArgs = OptimArgs()
    eval: EvalArgs = EvalArgs()
    checkpoint: CheckpointArgs = CheckpointArgs()
    log: LogArgs = LogArgs()
    resume: ResumeArgs = ResumeArgs()
    debug: DebugArgs = DebugArgs()
