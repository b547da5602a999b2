"""Commands that train, here or on a cluster, and compare: train, submit, ablate, compare, quickstart, configs."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from egom2p.cli.common import add_config
from egom2p.errors import UserError


def add_commands(commands) -> None:
    _add_train(commands)
    _add_submit(commands)
    _add_ablate(commands)
    _add_compare(commands)
    _add_quickstart(commands)
    _add_configs(commands)


def _add_train(commands) -> None:
    parser = commands.add_parser("train", help="train the masked transformer")
    add_config(parser)
    parser.set_defaults(run=_train)


def _train(args) -> None:
    from egom2p.config import load
    from egom2p.training.pretraining import PretrainConfig, pretrain

    pretrain(load(PretrainConfig, args.config, args.overrides))


def _add_submit(commands) -> None:
    parser = commands.add_parser("submit", help="freeze a run's code and configuration and send it to SLURM",
                                 epilog="Another command than train goes after two dashes: egom2p submit --nodes 1 -- "
                                        "tokenizer encode ... (also: tokenizer train, eval, features).")
    add_config(parser)
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
    parser.add_argument("--sbatch", nargs="*", action="extend", default=[], metavar="OPTION=VALUE",
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

    # What has a dot is no option of sbatch's but an override, given behind them.
    overrides = [item for item in args.sbatch if "." in item.partition("=")[0]]
    args.sbatch = [item for item in args.sbatch if item not in overrides]
    args.overrides = [*args.overrides, *overrides]
    job = _job_of(args)
    words = [str(args.config), *args.overrides]
    verbs = next((list(v) for v in SHARED_COMMANDS if words[: len(v)] == list(v)), None)
    if verbs:
        rest, out = words[len(verbs) :], _output_of(words, args.parse)
        sent = submit_command(verbs, rest, out, job, args.template or TEMPLATE, not args.dry_run)
    else:
        sent = submit(args.config, args.overrides, job, args.template or TEMPLATE, not args.dry_run)
    _say_sent(*sent)


def _say_sent(script: Path, numbers: list[str]) -> None:
    for number in numbers or [f"not sent; `bash {shlex.quote(str(script))}` sends it"]:
        print(number)


# Commands besides train whose processes share the work.
SHARED_COMMANDS = (("tokenizer", "encode"), ("tokenizer", "train"), ("eval",), ("features",))


def _output_of(words: Sequence[str], parse: Callable[[Sequence[str]], argparse.Namespace]) -> Path:
    """Where a command will write, once its arguments are known to be right."""
    from egom2p.config import load
    from egom2p.training.tokenizer_training import TokenizerConfig

    args = parse(words)
    if hasattr(args, "config") and hasattr(args, "overrides"):
        return Path(load(TokenizerConfig, args.config, args.overrides).run.dir)
    if args.out is None:
        raise UserError("give the command an --out: what the job runs is frozen there")
    return args.out


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

    def send(configs, missing) -> None:
        parser = argparse.ArgumentParser(prog="egom2p ablate --submit")
        _add_job(parser)
        parser.add_argument("--at-once", type=int, help="so many runs at most at the same time")
        try:
            given = parser.parse_args(shlex.split(args.submit))
        except ValueError as error:
            raise UserError(f"--submit {args.submit}: {error}") from error
        _say_sent(*submit_array(configs, missing, Path(sweep.out), _job_of(given), given.template or TEMPLATE,
                                not given.dry_run, given.at_once))

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


def _add_quickstart(commands) -> None:
    parser = commands.add_parser("quickstart", help="the whole job on a CPU, from a made-up world to a report")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", type=Path, default=Path("cfgs/quickstart.yaml"))
    parser.add_argument("--inputs", nargs="*", type=Path, default=[], metavar="FILE",
                        help="real videos to run the trained model on")
    parser.add_argument("--recordings", type=Path, metavar="FOLDER",
                        help="your own videos (docs/data.md): train on them beside the world, hold a share aside and "
                             "show it in the report")
    parser.add_argument("--gaze-units", default="", choices=("pixels", "normalized"),
                        help="of gaze files of the recordings that do not say it")
    parser.set_defaults(run=_quickstart)


def _quickstart(args) -> None:
    from egom2p.quickstart import quickstart

    quickstart(args.out, args.config, args.inputs, args.recordings, args.gaze_units)


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
