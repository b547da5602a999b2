"""`egom2p COMMAND`. Each command parses its arguments and calls one function elsewhere."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import egom2p
from egom2p.errors import Preempted, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 when part of the work failed; 2 after one line about a mistake of
    the user's; 75 when a run was asked to stop and saved; 130 after Ctrl-C; 141 when the reader of the output left."""
    parser = _parser()
    args, left = parser.parse_known_args(argv)
    if left and not (hasattr(args, "overrides") and all("=" in a and not a.startswith("-") for a in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # overrides given after options, which argparse does not join to those before
        args.overrides = [*args.overrides, *left]
    _set_up_logging()
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"egom2p: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("egom2p: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away (`| head`); nothing may be printed there any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Preempted as stopped:
        print(f"egom2p: {stopped}", file=sys.stderr)
        return Preempted.EXIT_CODE


def _set_up_logging() -> None:
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpx2", "matplotlib", "PIL", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="egom2p",
                                     description="One masked transformer over egocentric video, depth, camera motion "
                                                 "and gaze.")
    parser.add_argument("--version", action="version", version=f"egom2p {egom2p.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_world(commands)
    _add_prepare(commands)
    _add_tokens(commands)
    _add_depth(commands)
    _add_tokenizer(commands)
    _add_shards(commands)
    _add_train(commands)
    _add_submit(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_ablate(commands)
    _add_compare(commands)
    _add_view(commands)
    _add_features(commands)
    _add_probe(commands)
    _add_export(commands)
    _add_push(commands)
    _add_import(commands)
    _add_configs(commands)
    _add_quickstart(commands)
    return parser


def _add_world(commands) -> None:
    parser = commands.add_parser("world", help="write procedural clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clip tars")
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    parser.add_argument("--size", type=int, default=64, help="side of the frames in pixels")
    parser.add_argument("--dataset", default="world", help="data set name written into the clips")
    parser.add_argument("--without", default="", help="signals to leave out, for instance depth,gaze")
    parser.add_argument("--processes", type=int, default=None)
    parser.set_defaults(run=_world)


def _world(args) -> None:
    from egom2p.datasets.world import write_world

    without = tuple(s for s in args.without.split(",") if s)
    write_world(args.out, args.clips, args.seed, args.size, args.dataset, without, args.processes, args.first)


def _add_prepare(commands) -> None:
    parser = commands.add_parser("prepare", help="real recordings -> clips, a card and a contact sheet")
    _add_recordings(parser, "folder for the clips; a second run does what is missing")
    parser.set_defaults(run=_prepare)


def _add_recordings(parser, out: str) -> None:
    from egom2p.datasets import ADAPTERS

    parser.add_argument("dataset", help=f"one of {', '.join(ADAPTERS)} (docs/data.md says how to get them)")
    parser.add_argument("--root", type=Path, required=True, help="folder of the raw data as its authors publish it")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--size", type=int, default=256, help="side of the stored frames")
    parser.add_argument("--limit", type=int, default=0, help="at most so many clips a sequence")
    parser.add_argument("--sequences", nargs="*", default=[], help="only these")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--split", default="", help="what every sequence is for, instead of what the set's lists say")
    parser.add_argument("--gaze-units", default="", choices=("pixels", "normalized"),
                        help="of gaze files that do not say themselves (default: pixels; asked when they look like 0 "
                             ".. 1)")
    parser.add_argument("--depth-with-wearer", action="store_true",
                        help="depth that shows the wearer's own body, where a set has both (adt)")
    parser.add_argument("--store", default="", choices=("npy", "mp4"),
                        help="frames and depth as arrays (npy), or as H.264 (visually lossless) and FFV1 "
                             "(lossless), a tenth of the size (default: mp4 above 128 pixels)")


def _prepare_args(args, store: str):
    from egom2p.datasets.prepare import PrepareArgs

    if args.size < 8 or min(args.limit, args.workers) < 0:
        raise UserError("--size must be at least 8, --limit and --workers not below 0")
    return PrepareArgs(args.size, args.limit, args.workers, args.split, args.gaze_units, args.depth_with_wearer, store)


def _prepare(args) -> int:
    from egom2p.datasets.card import describe
    from egom2p.datasets.prepare import prepare

    card = prepare(args.dataset, args.root, args.out, _prepare_args(args, args.store), tuple(args.sequences))
    print(f"{describe(card)}\ncard: {args.out / 'card.json'}, contact sheet: {args.out / 'contact_sheet.png'}")
    return 0 if card["clips"] and not card["failed"] else 1


def _add_tokens(commands) -> None:
    parser = commands.add_parser("tokens", help="real recordings -> token shards in one pass, no clips kept")
    _add_recordings(parser, "root of the token shards; a second run goes on where it was")
    parser.add_argument("--tokenizers", nargs="+", required=True, help="tokenizer folders or Hub names")
    parser.add_argument("--group", type=int, default=32, help="sequences a shard")
    parser.add_argument("--batch", type=int, default=0, help="clips that a network takes at once")
    _add_device(parser)
    parser.set_defaults(run=_tokens)


def _tokens(args) -> int:
    from egom2p.datasets.card import describe
    from egom2p.datasets.tokenise import prepared_beside, tokenise
    from egom2p.distributed import environment_world
    from egom2p.tokenizers import load
    from egom2p.tokenizers.encode import EncodeArgs

    if args.group < 1:
        raise UserError("--group must be at least 1")
    device = environment_world(args.device).device
    card = tokenise(args.dataset, args.root, args.out, [load(t).to(device) for t in args.tokenizers],
                    _prepare_args(args, args.store or "npy"), tuple(args.sequences), args.group,
                    EncodeArgs(batch=args.batch))
    folder = prepared_beside(args.out)
    print(f"{describe(card)}\ncard: {folder / 'card.json'}, contact sheet: {folder / 'contact_sheet.png'}")
    return 0 if card["clips"] and not card["failed"] else 1


def _add_depth(commands) -> None:
    parser = commands.add_parser("depth", help="pseudo-label clips that have no depth")
    parser.add_argument("--clips", required=True, help="pattern of clip tars, which are rewritten")
    parser.add_argument("--model", required=True,
                        help="rollingdepth, video-depth-anything:WEIGHTS, or package.module:Class")
    parser.set_defaults(run=_depth)


def _depth(args) -> None:
    from egom2p.datasets.pseudo import label_depth

    labelled, had = label_depth(args.clips, args.model)
    print(f"{labelled} clips labelled, {had} had depth")


def _add_tokenizer(commands) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer, encode clips, measure and compare")
    verbs = tokenizer.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train from a config")
    _add_config(train)
    train.set_defaults(run=_tokenizer_train)
    encode = verbs.add_parser("encode", help="clips -> token shards")
    encode.add_argument("tokenizers", nargs="+", help="tokenizer folders or Hub names")
    encode.add_argument("--clips", required=True, help="pattern of clip tars")
    encode.add_argument("--out", type=Path, required=True, help="root of the token shards")
    encode.add_argument("--dataset", default="", help="data set name, instead of the one in the clips")
    encode.add_argument("--batch", type=int, default=0,
                        help="clips that a network takes at once (default: 16 videos, 1024 motions)")
    encode.add_argument("--workers", type=int, default=-1,
                        help="reading processes beside each encoding one (default: the cores there are)")
    _add_device(encode)
    encode.set_defaults(run=_tokenizer_encode)
    reconstruct = verbs.add_parser("reconstruct", help="error table of encoding and decoding clips")
    reconstruct.add_argument("tokenizer", help="tokenizer folder or Hub name")
    reconstruct.add_argument("--clips", required=True, help="pattern of clip tars")
    reconstruct.add_argument("--limit", type=int, default=200, help="at most so many clips (0 = all)")
    _add_device(reconstruct)
    reconstruct.set_defaults(run=_tokenizer_reconstruct)
    compare = verbs.add_parser("compare", help="tokenizers of one signal side by side: errors, bits, ids in use, speed")
    compare.add_argument("tokenizers", nargs="+", help="tokenizer folders or Hub names")
    compare.add_argument("--clips", required=True, help="pattern of clip tars")
    compare.add_argument("--limit", type=int, default=200, help="at most so many clips (0 = all)")
    _add_device(compare)
    compare.set_defaults(run=_tokenizer_compare)


def _tokenizer_compare(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.evaluation.run import comparison_table
    from egom2p.tokenizers import load

    device = environment_world(args.device).device
    names = [Path(t).name for t in args.tokenizers]
    labels = names if len(set(names)) == len(names) else args.tokenizers
    made = {label: load(t).to(device) for label, t in zip(labels, args.tokenizers, strict=True)}
    print(comparison_table(made, args.clips, args.limit))


def _tokenizer_train(args) -> None:
    from egom2p.config import load
    from egom2p.training.tokenizer_training import TokenizerConfig, train_tokenizer

    train_tokenizer(load(TokenizerConfig, args.config, args.overrides))


def _tokenizer_encode(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.tokenizers import load
    from egom2p.tokenizers.encode import EncodeArgs, encode_clips

    world = environment_world(args.device)
    asked = EncodeArgs(args.dataset, args.batch, args.workers)
    written = encode_clips([load(t).to(world.device) for t in args.tokenizers], args.clips, args.out, asked, world)
    if world.is_main:
        for name, entry in written.items():
            left_out = "".join(f", {n} left out: {reason}" for reason, n in entry["left_out"].items())
            print(f"{name}: {entry['clips']} clips{left_out}")


def _tokenizer_reconstruct(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.evaluation.run import reconstruction_table
    from egom2p.tokenizers import load

    device = environment_world(args.device).device
    print(reconstruction_table(load(args.tokenizer).to(device), args.clips, args.limit))


def _add_device(parser) -> None:
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: its GPU, if there is one)")


def _add_train(commands) -> None:
    parser = commands.add_parser("train", help="train the masked transformer")
    _add_config(parser)
    parser.set_defaults(run=_train)


def _train(args) -> None:
    from egom2p.config import load
    from egom2p.training.pretraining import PretrainConfig, pretrain

    pretrain(load(PretrainConfig, args.config, args.overrides))


def _add_submit(commands) -> None:
    parser = commands.add_parser("submit", help="freeze a run's code and configuration and send it to SLURM",
                                 epilog="Another command than train goes after two dashes: egom2p submit --nodes 1 -- "
                                        "tokenizer encode ... (also: tokenizer train, eval).")
    _add_config(parser)
    _add_job(parser)
    parser.set_defaults(run=_submit)


def _add_job(parser) -> None:
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8,
                        help="also the processes a node; 4 on GH200, 0 for CPUs")
    parser.add_argument("--processes", type=int, help="training processes a node, when not one a GPU")
    parser.add_argument("--cpus-per-task", type=int, help="cores a node")
    parser.add_argument("--time", help="limit of one job, D-HH:MM:SS; the run goes on in the next")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--name", help="job name (default: the run folder's)")
    parser.add_argument("--venv", help="virtual environment to enter; %%m stands for the machine, x86_64 or aarch64")
    parser.add_argument("--container", help="image: a .sif for apptainer, else for srun --container-image")
    parser.add_argument("--mounts", help="folders the container sees")
    parser.add_argument("--chain", type=int, default=1,
                        help="so many jobs one after another, where requeueing is forbidden")
    parser.add_argument("--sbatch", nargs="*", default=[], metavar="OPTION=VALUE",
                        help="further sbatch options, without dashes")
    parser.add_argument("--template", type=Path, help="another script than scripts/slurm/train.sbatch")
    parser.add_argument("--unchecked", action="store_true", help="send it although this machine does not see the data")
    parser.add_argument("--dry-run", action="store_true", help="check and write RUN/frozen, send nothing")


def _job_of(args):
    """JobArgs of the options of `_add_job`."""
    from egom2p.submit import JobArgs

    if min(args.nodes, args.chain) < 1 or args.gpus_per_node < 0:
        raise UserError("--nodes and --chain must be at least 1, --gpus-per-node at least 0")
    if not all("=" in item for item in args.sbatch):
        raise UserError("--sbatch takes OPTION=VALUE, for instance --sbatch constraint=gh200 mem=0")
    given = {"nodes": args.nodes, "gpus-per-node": args.gpus_per_node or "", "cpus-per-task": args.cpus_per_task,
             "time": args.time,
             "partition": args.partition, "account": args.account, "qos": args.qos, "job-name": args.name}
    options = {k: str(v) for k, v in given.items() if v is not None} | dict(item.split("=", 1) for item in args.sbatch)
    variables = {"PROCESSES": args.processes or args.gpus_per_node or 1, "VENV": args.venv, "CONTAINER": args.container,
                 "MOUNTS": args.mounts}
    return JobArgs(options, {k: str(v) for k, v in variables.items() if v}, args.chain, args.unchecked)


def _submit(args) -> None:
    from egom2p.submit import TEMPLATE, submit, submit_command

    job = _job_of(args)
    words = [str(args.config), *args.overrides]
    verbs = next((list(v) for v in SHARED_COMMANDS if words[: len(v)] == list(v)), None)
    if verbs:
        rest = words[len(verbs) :]
        sent = submit_command(verbs, rest, _output_of(words), job, args.template or TEMPLATE, not args.dry_run)
    else:
        sent = submit(args.config, args.overrides, job, args.template or TEMPLATE, not args.dry_run)
    _say_sent(*sent)


def _say_sent(script: Path, numbers: list[str]) -> None:
    for number in numbers or [f"not sent; `bash {shlex.quote(str(script))}` sends it"]:
        print(number)


# Commands besides train whose processes share the work.
SHARED_COMMANDS = (("tokenizer", "encode"), ("tokenizer", "train"), ("eval",), ("features",))


def _output_of(words: Sequence[str]) -> Path:
    """Where a command will write, once its arguments are known to be right."""
    from egom2p.config import load
    from egom2p.training.tokenizer_training import TokenizerConfig

    args = _parser().parse_args(words)
    if hasattr(args, "config") and hasattr(args, "overrides"):
        return Path(load(TokenizerConfig, args.config, args.overrides).run.dir)
    if args.out is None:
        raise UserError("give the command an --out: what the job runs is frozen there")
    return args.out


def _add_shards(commands) -> None:
    shards = commands.add_parser("shards", help="check, describe, index, convert or invent token shards")
    verbs = shards.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (("check", "read every token file and list what is wrong"),
                       ("stats", "clips, ids and sizes by folder"),
                       ("index", "write index.json beside the shards")):
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("pattern", help="for instance 'tokens/[rgb,cam]/rooms/shard-{000000..000004}.tar' or a "
                                            "folder")
        parser.add_argument("--config", type=Path, help="train config whose modalities the tokens must fit")
        parser.set_defaults(run={"check": _shards_check, "stats": _shards_stats, "index": _shards_index}[verb])
    convert = verbs.add_parser("convert", help="rewrite released or loose token files in the compact form")
    convert.add_argument("pattern")
    convert.add_argument("--out", type=Path, required=True)
    convert.add_argument("--config", type=Path, help="train config whose modalities name the folders (default: those "
                                                     "of the released model)")
    convert.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    convert.set_defaults(run=_shards_convert)
    random = verbs.add_parser("random", help="random tokens in the layout a config expects")
    _add_config(random)
    random.add_argument("--out", type=Path, required=True)
    random.add_argument("--count", type=int, required=True, help="clips of each data set")
    random.add_argument("--seed", type=int, default=0)
    random.set_defaults(run=_shards_random)


def _shards_check(args) -> int:
    from egom2p.data.shardtools import check, modality_folders
    from egom2p.tokenizers.origin import origin_problems

    modalities = _modalities_of(args.config)
    found = check(args.pattern, modalities)
    strangers = origin_problems(modality_folders(args.pattern), modalities)
    for kind, rows in (("damage", found.problems), ("note", found.notes)):
        for row in rows:
            print(f"{kind}\t{row['file']}{': ' + row['key'] if row['key'] else ''}: {row['problem']}")
    for problem in strangers:
        print(f"origin\t{problem}")
    problems = len(found.problems) + len(strangers)
    print(f"{found.files} token files read, {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def _shards_stats(args) -> None:
    from egom2p.data.shardtools import stats

    columns = ("folder", "shards", "clips", "bytes", "dtype", "shape", "distinct_ids", "commonest_share", "unobserved")
    print("\t".join(columns))
    for row in stats(args.pattern):
        print("\t".join(f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))


def _shards_index(args) -> None:
    from egom2p.data.clips import expand_paths
    from egom2p.data.tarindex import index_tars

    entries = index_tars([p for p in expand_paths(args.pattern) if p.suffix == ".tar"])
    print(f"{len(entries)} shards, {sum(len(e.keys) for e in entries)} files indexed, "
          f"{sum(bool(e.damage) for e in entries)} damaged")


def _shards_convert(args) -> None:
    from egom2p.config import read_yaml
    from egom2p.data.shardtools import convert

    released = read_yaml(Path("cfgs/modalities/egom2p.yaml")).modalities
    names = _modalities_of(args.config).names if args.config else map(str, released)
    done = convert(args.pattern, args.out, names, args.workers or os.cpu_count() or 1)
    print(f"{done.files} token files in {done.written + done.kept} shards below {args.out}, {done.kept} of them from "
          f"before")
    before, after = done.rates
    print(f"one core reads {before:,.0f} token files a second of the old form, {after:,.0f} of the new "
          f"({after / before:.1f} times)")


def _shards_random(args) -> None:
    from egom2p.config import load
    from egom2p.data.shardtools import write_random
    from egom2p.modalities import ModalitySet
    from egom2p.training.pretraining import PretrainConfig

    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    config = load(PretrainConfig, args.config, args.overrides)
    held_out = config.eval.datasets if not config.eval.root else ()
    write_random(config.data, held_out, ModalitySet.from_config(config.modalities), args.out, args.count, args.seed)


def _modalities_of(config: Path | None):
    if config is None:
        return None
    from egom2p.config import load
    from egom2p.modalities import ModalitySet
    from egom2p.training.pretraining import PretrainConfig

    return ModalitySet.from_config(load(PretrainConfig, config).modalities)


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="predict modalities from videos or token files")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, metavar="FILE",
                        help="videos, or token files (.npz, .npy)")
    parser.add_argument("--targets", default="",
                        help="modalities to predict, in order: cam,depth (default: those of the recipe)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modality", default="",
                        help="what the inputs are (default: the model's first picture modality)")
    parser.add_argument("--recipe", type=Path, help="YAML with recipes by target (cfgs/generate/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="draws a window; more than one also write their spread")
    parser.add_argument("--overlap", type=float, default=0.5,
                        help="seconds that neighbouring windows of a long recording share")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the blocks: slower to start, faster for many windows")
    _add_trust(parser)
    parser.set_defaults(run=_generate)


def _generate(args) -> int:
    from egom2p.distributed import environment_world
    from egom2p.generation.pipeline import Pipeline
    from egom2p.generation.recordings import GenerateArgs, generate_files

    recipe = _recipe(args.recipe)
    targets = [t for t in args.targets.split(",") if t] or list(recipe.targets)
    if not targets:
        raise UserError("say what to predict: --targets cam,depth or a --recipe")
    pipeline = Pipeline.from_pretrained(args.model, str(environment_world().device), args.trust_torchscript)
    if args.compile:
        pipeline.model.compile()
    if args.samples < 1 or not 0 <= args.overlap < 2:
        raise UserError("--samples must be at least 1 and --overlap from 0 to below 2 seconds")
    asked = GenerateArgs(targets, args.modality or recipe.input, recipe.targets, args.seed, args.samples, args.overlap)
    folders, failed = generate_files(pipeline, args.inputs, args.out, asked)
    for folder in folders:
        print(folder)
    for reason in failed.values():
        print(f"egom2p: {reason}", file=sys.stderr)
    if failed and not folders:
        return 2
    if failed:
        print(f"{len(failed)} of {len(args.inputs)} recordings failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval",
                                 help="measure tasks on held-out clips (under torchrun: clips are shared among the "
                                      "ranks)")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--protocol", type=Path,
                        help="YAML below cfgs/eval/: tasks, data, recipes and alignments in one")
    parser.add_argument("--tasks", help="for instance rgb2cam,rgb2gaze,rgb2depth,depth2rgb")
    parser.add_argument("--data", help="pattern of clip tars")
    parser.add_argument("--recipe", type=Path, help="YAML with recipes by target (cfgs/generate/)")
    parser.add_argument("--limit", type=int, help="at most so many clips, spread evenly")
    parser.add_argument("--out", type=Path,
                        help="folder for results.json, plots and the rows a stopped evaluation goes on from (default: "
                             "MODEL/eval)")
    parser.add_argument("--seed", type=int)
    _add_trust(parser)
    parser.set_defaults(run=_eval)


def _eval(args) -> None:
    from egom2p.distributed import process_group
    from egom2p.evaluation.results import table
    from egom2p.evaluation.run import evaluate_to
    from egom2p.model.egom2p import EgoM2P

    protocol = _protocol(args)
    out = args.out or Path(args.model) / "eval"
    with process_group(3600) as world:
        evaluation = evaluate_to(out, EgoM2P.from_pretrained(args.model, str(world.device)), protocol, world,
                                 args.trust_torchscript)
        if world.is_main:
            print(f"{table(evaluation.summary, protocol.published)}\nresults: {out / 'results.json'}")


def _add_ablate(commands) -> None:
    parser = commands.add_parser("ablate", help="train every combination of a sweep, and compare")
    parser.add_argument("sweep", type=Path, help="YAML: base, axes, seeds (cfgs/ablations/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the sweep, for instance out=runs/a")
    parser.add_argument("--submit", metavar="OPTIONS",
                        help="send the runs to SLURM as one job array with these options of `egom2p submit`, in one "
                             "word: --submit='--nodes 1 --time 2:00:00 --at-once 4'")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")
    parser.set_defaults(run=_ablate)


def _ablate(args) -> None:
    from egom2p.ablate import SweepConfig, ablate, combinations
    from egom2p.config import load
    from egom2p.submit import TEMPLATE, submit_array

    sweep = load(SweepConfig, args.sweep, args.overrides)
    if args.dry_run:
        for run in combinations(sweep):
            print(f"{run.folder}\t{shlex.join(run.overrides)}")
        return

    def send(configs) -> None:
        parser = argparse.ArgumentParser(prog="egom2p ablate --submit")
        _add_job(parser)
        parser.add_argument("--at-once", type=int, help="so many runs at most at the same time")
        given = parser.parse_args(shlex.split(args.submit))
        what = "".join(f"# {run.folder}: {shlex.join(run.overrides)}\n" for run in combinations(sweep))
        job = _job_of(given)
        _say_sent(*submit_array(configs, Path(sweep.out), what, job, given.template or TEMPLATE, not given.dry_run,
                                given.at_once))

    ablate(sweep, send if args.submit is not None else None)


def _add_compare(commands) -> None:
    parser = commands.add_parser("compare", help="runs and evaluations side by side, and which differences are real")
    parser.add_argument("folders", nargs="+", type=Path, help="runs or folders of `egom2p eval`, the reference first")
    parser.add_argument("--figures", default="", help="only these, comma-separated: eval/loss,rgb2cam/ate_m")
    parser.add_argument("--out", type=Path, help="folder for compare.csv, compare.json and compare.png")
    parser.set_defaults(run=_compare)


def _compare(args) -> None:
    from egom2p.compare import compare, comparison_text, write_comparison

    rows, groups = compare(args.folders, [f for f in args.figures.split(",") if f])
    print(comparison_text(rows))
    if args.out:
        write_comparison(args.out, rows, groups)


def _add_view(commands) -> None:
    parser = commands.add_parser("view", help="look at clips, predictions and evaluations in 3-D")
    parser.add_argument("path", help="clips, a folder of generate or eval, or a quickstart")
    parser.add_argument("--model", default="", help="predict the clips with this run, export folder or Hub name")
    parser.add_argument("--targets", default="", help="what is predicted, comma-separated (default: everything)")
    parser.add_argument("--limit", type=int, default=3, help="at most so many clips, spread over them")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--save", type=Path, metavar="FILE.rrd", help="a rerun recording")
    shown.add_argument("--web", action="store_true", help="serve the rerun viewer to browsers")
    shown.add_argument("--html", type=Path, metavar="FILE", help="one page that needs neither rerun nor a network")
    parser.set_defaults(run=_view)


def _view(args) -> None:
    from egom2p.view import takes_of
    from egom2p.visualize.page import write_page
    from egom2p.visualize.rerun_view import serve, show

    if args.limit < 1:
        raise UserError("--limit must be at least 1")
    takes = takes_of(args.path, args.limit, args.model, [t for t in args.targets.split(",") if t])
    if args.html:
        write_page(args.html, takes, f"egom2p view {args.path}")
    elif args.web:
        serve(takes)
    else:
        show(takes, args.save)
    if args.html or args.save:
        print(args.html or args.save)


def _add_features(commands) -> None:
    parser = commands.add_parser("features", help="the encoder's features of clips, for other work")
    parser.add_argument("model", help="run, export folder or Hub name")
    parser.add_argument("--clips", required=True, help="pattern of clip tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the features; a second run goes on")
    parser.add_argument("--inputs", default="rgb", help="modalities that are shown, comma-separated")
    parser.add_argument("--layer", type=int, default=-1, help="encoder blocks to run (default: all, and the last norm)")
    parser.add_argument("--pool", default="mean", choices=("mean", "none"), help="over the tokens of a clip")
    parser.add_argument("--label", default="", help="entry of the clips' json that goes into OUT/labels.csv")
    _add_device(parser)
    parser.set_defaults(run=_features)


def _features(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.features import FeatureArgs, write_features
    from egom2p.model.egom2p import EgoM2P

    world = environment_world(args.device)
    asked = FeatureArgs(tuple(args.inputs.split(",")), args.layer, args.pool, args.label)
    count = write_features(EgoM2P.from_pretrained(args.model, str(world.device)), args.clips, args.out, asked, world)
    if world.is_main:
        print(f"features of {count} clips in {args.out}")


def _add_probe(commands) -> None:
    parser = commands.add_parser("probe", help="how much of a label is in features")
    parser.add_argument("features", type=Path, help="folder that `egom2p features` wrote")
    parser.add_argument("--labels", type=Path, required=True, help="CSV with the columns key and label")
    parser.add_argument("--kind", default="linear", choices=("linear", "attentive"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_probe)


def _probe(args) -> None:
    from egom2p.probe import probe

    if args.folds < 2:
        raise UserError("--folds must be at least 2")
    print(probe(args.features, args.labels, args.kind, args.folds, args.seed))


def _protocol(args):
    """The protocol file, with what the command line says instead."""
    from dataclasses import replace

    from egom2p.config import load
    from egom2p.evaluation.run import ProtocolConfig

    given = {"tasks": tuple(args.tasks.split(",")) if args.tasks else None, "data": args.data, "limit": args.limit,
             "seed": args.seed,
             "recipes": _recipe(args.recipe).targets if args.recipe else None}
    given = {k: v for k, v in given.items() if v is not None}
    if args.protocol:
        return replace(load(ProtocolConfig, args.protocol), **given)
    if not {"tasks", "data"} <= given.keys():
        raise UserError("say what to evaluate: --tasks rgb2cam --data 'clips/*.tar', or --protocol cfgs/eval/NAME.yaml")
    return ProtocolConfig(**given)


def _recipe(path: Path | None):
    from egom2p.config import load
    from egom2p.generation.schedule import RecipeConfig

    return load(RecipeConfig, path) if path else RecipeConfig()


def _add_quickstart(commands) -> None:
    parser = commands.add_parser("quickstart", help="the whole job on a CPU, from a made-up world to a report")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", type=Path, default=Path("cfgs/quickstart.yaml"))
    parser.add_argument("--inputs", nargs="*", type=Path, default=[], metavar="FILE",
                        help="real videos to run the trained model on")
    parser.add_argument("--recordings", type=Path, metavar="FOLDER",
                        help="your own videos (docs/data.md): train on them beside the world, hold a share aside and "
                             "show it in the report")
    parser.set_defaults(run=_quickstart)


def _quickstart(args) -> None:
    from egom2p.quickstart import quickstart

    quickstart(args.out, args.config, args.inputs, args.recordings)


def _add_export(commands) -> None:
    parser = commands.add_parser("export", help="a self-contained folder: the model and its tokenizers, movable")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.set_defaults(run=_export)


def _export(args) -> None:
    from egom2p.generation.bundle import export_bundle

    print(export_bundle(args.model, args.out))


def _add_push(commands) -> None:
    for name, what, text in (("push", "source", "a model with its tokenizers and a card -> the Hugging Face Hub"),
                             ("push-data", "pattern", "clips or token shards -> the Hugging Face Hub")):
        parser = commands.add_parser(name, help=text)
        parser.add_argument(what, help={"source": "run or export folder", "pattern": "folder or pattern of tars"}[what])
        parser.add_argument("repo", help="OWNER/NAME on the Hub")
        parser.add_argument("--private", action="store_true")
        parser.add_argument("--licence", default="other", help="as the Hub names it, for instance apache-2.0")
        parser.set_defaults(run=_push)


def _push(args) -> None:
    from egom2p.hub import push_data, push_model

    if args.command == "push":
        print(push_model(args.source, args.repo, args.private, args.licence))
    else:
        print(push_data(args.pattern, args.repo, args.private, args.licence))


def _add_configs(commands) -> None:
    parser = commands.add_parser("configs", help="list the YAMLs that come with the code, or copy one")
    parser.add_argument("name", nargs="?", help="one of those that are listed")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy it there, with the files it includes")
    parser.set_defaults(run=_configs)


def _configs(args) -> None:
    from egom2p import resources
    from egom2p.config import included_files

    if args.copy and not args.name:
        raise UserError("--copy needs the name of a configuration; `egom2p configs` lists them")
    if args.copy:
        shipped = resources.root() / args.name
        for path in resources.copy_config(args.name, args.copy, included_files(shipped) if shipped.is_file() else []):
            print(path)
    elif args.name:
        print(resources.read_config(args.name), end="")
    else:
        for name, comment in resources.configs().items():
            print(f"{name:40} {comment}")


def _add_import(commands) -> None:
    parser = commands.add_parser("import-released", help="official checkpoints -> our export folders")
    parser.add_argument("file", type=Path, help="the main checkpoint, or the camera or gaze tokenizer's .pth")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ema", action="store_true", help="take the averaged weights, where the file has them")
    parser.add_argument("--num-heads", type=int, help="attention heads, when the file's model name does not tell")
    parser.add_argument("--tokenizers", default="", metavar="NAME=FOLDER,...",
                        help="tokenizer folders to write into the model's config")
    parser.set_defaults(run=_import)


def _import(args) -> None:
    from egom2p.compat.released import import_released

    pairs = [item.partition("=") for item in args.tokenizers.split(",") if item]
    if not all(name and folder for name, _, folder in pairs):
        raise UserError(f"--tokenizers {args.tokenizers}: write NAME=FOLDER,NAME=FOLDER")
    folders = {name: folder for name, _, folder in pairs}
    print(import_released(args.file, args.out, args.num_heads, folders, args.ema))


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-torchscript", action="store_true",
                        help="run TorchScript networks (Cosmos) that came along with the model; they are programs")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, for instance train.steps=100")


if __name__ == "__main__":
    sys.exit(main())
