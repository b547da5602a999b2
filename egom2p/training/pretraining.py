"""Training the masked transformer on token shards: `egom2p train`."""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from egom2p.config import read_json, to_plain
from egom2p.data.batch import PackedBatch, on_device
from egom2p.data.loader import (
    BatchPlan,
    DataArgs,
    FixedSet,
    StepBatch,
    StepDataset,
    TokenStream,
    step_loader,
    tolerated,
)
from egom2p.data.masking import MaskArgs
from egom2p.data.tokens import TokenDataset
from egom2p.distributed import World, sum_over_ranks
from egom2p.errors import UserError
from egom2p.evaluation.measures import VARIANT
from egom2p.evaluation.run import evaluate
from egom2p.generation.schedule import TargetArgs, name_unknown
from egom2p.modalities import ModalityArgs, ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import training_flops
from egom2p.tokenizers import load as load_tokenizer
from egom2p.tokenizers.origin import check_tokenizers, content_of, folders_of, origins_of
from egom2p.training.arguments import TrainingConfig
from egom2p.training.loop import run_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossArgs:
    """group_samples: consecutive samples whose targets are averaged together, 0 = the whole global batch.
    4 restores the weights of the released run, where each GPU averaged its own 4 samples. near_codes: a target counts
    for the ids with near code vectors too, by a Gaussian so many steps between codes wide (0 = the id alone); needs the
    modalities' tokenizers, and only those in `near_modalities` when there are any. The cross-entropies that are logged
    by modality are of the ids alone. weights: of the output modalities' means, 1 where nothing is said; what they sum
    to is divided by."""

    group_samples: int = 0
    near_codes: float = 0.0
    near_modalities: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(weight > 0 for weight in self.weights.values()):
            raise ValueError("weights must be above 0; a modality that is never asked for has target: false")
        if self.near_codes < 0 or (self.near_modalities and not self.near_codes):
            raise ValueError("near_codes must not be below 0, and near_modalities need it")


@dataclass(frozen=True)
class InitArgs:
    """from: export, run or Hub repository whose weights to start from. Modalities are matched by name; what the
    source lacks starts fresh, what it has more is left out. codes: start token tables and heads from the code
    vectors of the modalities' tokenizers (see EgoM2P.start_from_codes). freeze: nothing, the trunk (everything
    but the modalities' embeddings and heads), or all but those of the modalities in `unfreeze`. unfreeze_at: the step
    from which everything learns (0 = never); the frozen parts then wait with their gradients computed."""

    from_: str = ""
    codes: bool = False
    freeze: Literal["none", "trunk", "all"] = "none"
    unfreeze: tuple[str, ...] = ()
    unfreeze_at: int = 0

    def __post_init__(self) -> None:
        if self.unfreeze_at < 0 or (self.unfreeze_at and self.freeze == "none"):
            raise ValueError("unfreeze_at must not be below 0, and needs freeze: trunk or all")
        if self.freeze == "all" and not self.unfreeze and not self.unfreeze_at:
            raise ValueError("freeze: all leaves nothing to learn; name modalities in unfreeze, or give unfreeze_at")

    def learns(self, name: str) -> bool:
        """Whether a parameter of that name is not frozen at the start."""
        modality = name.split(".")[1] if name.startswith(("embeddings.", "heads.")) else ""
        return self.freeze == "none" or (bool(modality) if self.freeze == "trunk" else modality in self.unfreeze)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Everything `egom2p train` reads. generation: how the model is asked for each target, written into its exports."""

    modalities: dict[str, ModalityArgs]
    data: DataArgs
    model: ModelArgs
    masking: MaskArgs = MaskArgs()
    loss: LossArgs = LossArgs()
    init: InitArgs = InitArgs()
    generation: dict[str, TargetArgs] = field(default_factory=dict)

    @property
    def tokens_per_sample(self) -> int:
        return self.masking.input_tokens + self.masking.target_tokens

    @property
    def num_steps(self) -> int:
        return self.train.num_steps(self.tokens_per_sample)


def pretrain(config: PretrainConfig) -> Path:
    """Train EgoM2P; returns the run's folder."""
    return run_training(config, PretrainTask)


class PretrainTask:
    """Masked modelling of token shards.

    The loss is a mean per modality over the targets of a group of consecutive global samples, averaged over the output
    modalities (by loss.weights) and over groups (design invariant 2). Each target's weight follows from
    counts over the whole global batch, so micro-batches and ranks add up to it exactly.
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.modalities = ModalitySet.from_config(config.modalities)
        self.config, self.world = config, world
        recipes = {name: recipe for name, recipe in config.generation.items() if name in self.modalities.names}
        name_unknown({**config.generation, **config.eval.recipes}, self.modalities.names)
        self.stream = TokenStream(config.data, self.modalities, config.masking, config.train.seed)
        self.held_out = self._open_held_out()
        self._name_absent()
        self._check_lost()
        folders = folders_of([*self.stream.datasets, *(self.held_out.datasets if self.held_out else ())])
        self.model = EgoM2P(self.modalities, config.model)
        self.model.generation = {name: to_plain(recipe) for name, recipe in recipes.items()}
        self.model.origins = check_tokenizers(self.modalities, origins_of(folders))
        self.unstarted: UserError | None = None
        try:
            start_model(self.model, config.init, config.train.seed)
        except NotThere as error:
            if not (Path(config.run.dir) / "checkpoints/latest").exists():
                raise
            self.unstarted = error  # weights come from a checkpoint then; without a whole one the loop raises this
            log.warning("%s; the weights of the run's own checkpoint are taken", error)
            with contextlib.suppress(UserError):  # what it had learnt from the other's tokens
                known = read_json(Path(config.run.dir) / "checkpoints/latest/config.json").get("origins", {})
                self.model.origins = {**known, **self.model.origins}
        self._spread_targets(config.loss)
        self.plan = BatchPlan(config.train.batch_size, config.train.micro_batch(world.size),
                              config.loss.group_samples or config.train.batch_size, world.rank, world.size)
        self.tokens_per_sample = config.tokens_per_sample
        self.weight_M = self._weights(config.loss)
        self.scale_GM = torch.empty(0)
        self._fingerprint = self.stream.fingerprint()
        if content := content_of(folders_of(self.stream.datasets)):
            self._fingerprint = hashlib.sha256(f"{self._fingerprint} {content}".encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def steps(self, steps: range) -> Iterator[StepBatch]:
        dataset = StepDataset(self.stream, len(self.modalities), self.plan)
        for batch in step_loader(dataset, steps, self.config.data.workers):
            yield batch.to(self.world.device)

    def begin_step(self, batch: StepBatch) -> None:
        """Targets of the global batch by group and modality -> the weight of one such target, (G, M)."""
        counts = np.zeros((self.plan.num_groups, len(self.modalities)))
        for micro in batch.micro_batches:
            np.add.at(counts, micro.groups, micro.targets.lengths)
        counts_GM = sum_over_ranks(on_device(counts, self.world.device))
        weight_M = on_device(self.weight_M, self.world.device)
        self.scale_GM = weight_M / (counts_GM.clamp(min=1) * self.plan.num_groups)

    def loss(self, micro: PackedBatch, forward: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        counts = micro.targets.lengths
        group = on_device(np.repeat(micro.groups, counts.sum(1)), self.world.device)
        scale = self.scale_GM[group, micro.targets.modality].to(self.model.mask_token.dtype)[micro.targets.by_modality]
        total, losses = forward(micro, scale)
        return total, self._sums(micro, total, losses), per_sample(micro, (~torch.isfinite(losses)).float()) > 0

    def _sums(self, micro: PackedBatch, total: Tensor, losses: Tensor) -> Tensor:
        """[loss, tokens, FLOPs, sum of CE by modality, targets by modality] in float64."""
        counts = micro.targets.modality_counts
        by_modality = [part.double().sum() for part in losses.split(counts)]
        flops = training_flops(self.config.model, [m.vocab_size for m in self.modalities], micro.inputs.lengths,
                               micro.targets.lengths)
        host = on_device(np.array([len(micro.inputs) + len(micro.targets), flops, *counts], np.float64), total.device)
        return torch.cat([total.detach().double()[None], host[:2], torch.stack(by_modality), host[2:]])

    def figures(self, sums: Tensor) -> dict[str, float]:
        total, tokens, flops, *rest = sums.tolist()
        sums_m, counts = rest[: len(self.modalities)], rest[len(self.modalities) :]
        by_modality = {f"loss/{m.name}": s / n for m, s, n in zip(self.modalities, sums_m, counts, strict=True) if n}
        return {"loss": total, **by_modality, "tokens": tokens, "flops": flops}

    def learns(self, name: str, step: int) -> bool:
        return not 0 <= step < self.config.init.unfreeze_at or self.config.init.learns(name)

    def faster_data(self) -> str:
        hints = ["data.workers reads ahead in processes"] if not self.config.data.workers else []
        if any(dataset.compressed for dataset in self.stream.datasets):
            hints.append("some shards are compressed .npz: `egom2p shards convert` writes them in a form that is read "
                         "several times faster")
        return f"; {'; '.join(hints)}" if hints else ""

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Nothing to do."""

    def inspect(self, batch: StepBatch) -> list[dict[str, Any]]:
        """Data set, key, tokens and mean cross-entropy of each sample."""
        rows = []
        for micro in batch.micro_batches:
            micro = micro.to(self.world.device)
            _, losses = self.model(micro, torch.ones(len(micro.targets), dtype=self.model.mask_token.dtype,
                                                     device=self.world.device))
            means = per_sample(micro, losses) / per_sample(micro, torch.ones_like(losses))
            for number, mean, num_inputs, num_targets in zip(micro.numbers.tolist(), means.tolist(),
                                                             micro.inputs.lengths.sum(1).tolist(),
                                                             micro.targets.lengths.sum(1).tolist(), strict=True):
                index, element = self.stream.locate(number)
                rows.append({"sample": number, "dataset": self.stream.datasets[index].name,
                             "key": self.stream.datasets[index].keys[element],
                             "inputs": num_inputs, "targets": num_targets, "loss": mean
                             if math.isfinite(mean) else None})
        return rows

    def evaluate(self) -> dict[str, float]:
        """Held-out loss per modality, mean over the targets of fixed clips under fixed masks."""
        plan = BatchPlan(self.config.eval.samples, self.plan.micro_batch_size, self.config.eval.samples,
                         self.world.rank, self.world.size)
        batch = StepDataset(self.held_out, len(self.modalities), plan)[0]
        sums = torch.zeros(3 + 2 * len(self.modalities), dtype=torch.float64, device=self.world.device)
        for micro in batch.micro_batches:
            micro = micro.to(self.world.device)
            scale = torch.ones(len(micro.targets), dtype=self.model.mask_token.dtype, device=self.world.device)
            sums += self._sums(micro, *self.model(micro, scale))
        for message in batch.damaged:
            log.error("held out, left out: %s", message)
        figures = self.figures(sum_over_ranks(sums))
        if not any(k.startswith("loss/") for k in figures):
            raise UserError(f"none of {self.config.eval.samples} held-out clips can be used (eval.datasets)")
        return {f"eval/{k}": v for k, v in figures.items() if k.startswith("loss/")}

    def predict(self, folder: Path) -> dict[str, float]:
        """Figures of the tasks on a few fixed clips, within eval.max_s; the first clip's sheet goes to `folder`.

        Every rank predicts the same clips (a sharded model needs all of them); the main one keeps the picture.
        """
        from egom2p.visualize import plots

        args, figures, started = self.config.eval, {}, time.perf_counter()
        for task in args.tasks:
            if time.perf_counter() - started > args.max_s and self.config.train.parallel == "ddp":
                log.warning("eval.tasks: %s left out, eval.max_s=%g s are used up", task, args.max_s)
                continue
            done = evaluate(self.model, [task], args.clips, args.recipes, args.task_clips, shown=1)
            figures |= {f"eval/{task}/{metric}": f["value"] for metric, f in done.summary[task].items()
                        if VARIANT not in metric}
            if self.world.is_main:
                clip, predicted = done.shown[task][0]
                frames = clip.signals.get("rgb", np.full((16, 48, 48, 3), 40, np.uint8))
                kinds = {m.name: m.signal for m in self.modalities}
                folder.mkdir(parents=True, exist_ok=True)
                sheet = {k: v for k, v in predicted.items() if k != "ceiling"}
                plots.save(plots.clip_sheet(frames, clip.signals, sheet, kinds, f"{task}, clip {clip.key}"),
                           folder / f"{task}.png")
        return {**figures, "eval/tasks_s": time.perf_counter() - started}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.model.save_pretrained(folder, weights)

    def _weights(self, args: LossArgs) -> np.ndarray:
        """(M,) of the modalities' means in the loss; those of the outputs sum to 1."""
        unknown = set(args.weights) - {m.name for m in self.modalities if m.target}
        if unknown:
            raise UserError(f"loss.weights names '{sorted(unknown)[0]}', which is no output modality")
        if not any(m.target for m in self.modalities):
            raise UserError("every modality has target: false, so there is nothing to learn")
        weights = np.array([args.weights.get(m.name, 1.0) for m in self.modalities])
        return weights / weights[[m.target for m in self.modalities]].sum()

    def _spread_targets(self, args: LossArgs) -> None:
        if not args.near_codes:
            return
        names = args.near_modalities or [m.name for m in self.modalities if m.target]
        for name in names:
            if name not in self.modalities.names or not self.modalities.by_name(name).tokenizer:
                raise UserError(f"loss.near_codes needs the code vectors of '{name}', which "
                                f"{'has no tokenizer' if name in self.modalities.names else 'is no modality'}; "
                                f"name those that have one in loss.near_modalities")
        self.model.spread_targets(code_vectors(self.modalities, names), args.near_codes)

    def _name_absent(self) -> None:
        """Warn of modalities that no clip has: their tables and heads stay as they start."""
        present = np.any([rows.any(1) for rows in self.stream.present], axis=0)
        absent = [m.name for m, there in zip(self.modalities, present, strict=True) if not there]
        if absent:
            listed = all(d.modalities and absent[0] not in d.modalities for d in self.config.data.datasets.values())
            where = f"{self.config.data.root}/{absent[0]}/DATASET"
            log.warning("no data set has tokens of %s; it will not be learnt. %s", ", ".join(absent),
                        f"Every data set lists its modalities: name {absent[0]} in data.datasets.NAME.modalities, too"
                        if listed else f"Its shards belong in {where}")

    def _check_lost(self) -> None:
        """Raises UserError when more clips than data.max_damaged lack a modality because its shard is damaged."""
        lost, clips = sum(d.lost for d in self.stream.datasets), sum(map(len, self.stream.datasets))
        share = self.config.data.max_damaged
        if lost > tolerated(share, clips):
            raise UserError(f"{lost} of {clips} clips lack a modality whose shard is damaged, more than "
                            f"data.max_damaged={share}; `egom2p shards check` lists the damaged files: mend them, or "
                            f"accept it with a larger data.max_damaged")
        if lost:
            log.warning("%d of %d clips lack a modality whose shard is damaged", lost, clips)

    def _open_held_out(self) -> FixedSet | None:
        sets = [TokenDataset.open(root, name, path, self.modalities, (), self.stream.cache)
                for root, name, path in held_out_sets(self.config)]
        return FixedSet(sets, self.modalities, self.config.masking, self.config.eval.samples) if sets else None


def held_out_sets(config: PretrainConfig) -> list[tuple[str, str, str]]:
    """(root, name, path below it) of the data sets for `eval`, none when it is off. Raises UserError when it is on and
    names none, or tasks without clips."""
    args = config.eval
    if not args.every:
        return []
    if args.tasks and not args.clips:
        raise UserError("eval.tasks is set but eval.clips names no clip tars to predict on")
    if not args.datasets:
        raise UserError("eval.every is set but eval.datasets names no held-out data set; name some, or set "
                        "eval.every=0")
    paths = {} if args.root else {n: entry.path for n, entry in config.data.datasets.items()}
    return [(args.root or config.data.root, name, paths.get(name, "")) for name in args.datasets]


def per_sample(micro: PackedBatch, values: Tensor) -> Tensor:
    """(B,) sums of `values` (one a target, sorted by modality) over each sample."""
    owner = on_device(np.repeat(np.arange(micro.num_samples), micro.targets.lengths.sum(1)), values.device)
    return values.new_zeros(micro.num_samples).index_add_(0, owner[micro.targets.by_modality], values)


def code_vectors(modalities: ModalitySet, names: Iterable[str]) -> dict[str, Tensor]:
    """{modality: (vocab, L) code vectors} of those that have a tokenizer."""
    return {name: load_tokenizer(modalities.by_name(name).tokenizer).codes() for name in names}


class NotThere(UserError):
    """The model that a training starts from cannot be read."""


def start_model(model: EgoM2P, args: InitArgs, seed: int) -> None:
    """Starting weights and frozen parts, as `init` says. Raises UserError; NotThere when the model to start from cannot
    be read, the parts being frozen all the same."""
    try:
        _take_weights(model, args, seed)
    finally:
        _freeze(model, args)


def _take_weights(model: EgoM2P, args: InitArgs, seed: int) -> None:
    if args.codes:
        named = [m.name for m in model.modalities if m.tokenizer]
        model.start_from_codes(code_vectors(model.modalities, named), seed)
    if args.from_:
        try:
            start = EgoM2P.from_pretrained(args.from_)
        except UserError as error:
            raise NotThere(f"init.from={args.from_}: {error}") from error
        for name in start.origins.keys() & model.origins.keys():
            if start.origins[name] != model.origins[name]:
                raise UserError(f"init.from={args.from_}: it learnt tokens of '{name}' made by another tokenizer "
                                f"({start.origins[name]}, here {model.origins[name]}); encode the clips with that one, "
                                f"or rename the modality to start it fresh")
        for name in ("dim", "num_heads", "encoder_depth", "decoder_depth", "mlp_ratio", "variant"):
            theirs, ours = getattr(start.args, name), getattr(model.args, name)
            if theirs != ours:  # not all of it shows in the weights' shapes
                raise UserError(f"init.from={args.from_} does not fit this model: its {name} is {theirs}, here {ours}; "
                                f"use the same model section")
        model.origins = {n: o for n, o in start.origins.items() if n in model.modalities.names} | model.origins
        source = start.state_dict()
        own = model.state_dict()
        for name in own:
            modality = name.split(".")[1] if name.startswith(("embeddings.", "heads.")) else ""
            if name in source and source[name].shape == own[name].shape:
                own[name] = source[name]
            elif not modality:
                raise UserError(f"init.from={args.from_}: its '{name}' does not fit this model; use the same model "
                                f"section")
            elif name in source:
                raise UserError(f"init.from={args.from_}: modality '{modality}' has another vocabulary there; rename "
                                f"it here to start it fresh")
        model.load_state_dict(own)


def _freeze(model: EgoM2P, args: InitArgs) -> None:
    unknown = set(args.unfreeze) - set(model.modalities.names)
    if unknown:
        raise UserError(f"init.unfreeze names an unknown modality '{sorted(unknown)[0]}'")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = args.learns(name) or args.unfreeze_at > 0
