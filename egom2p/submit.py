"""`egom2p submit`: freeze code and configuration of a run, or of another command, fill in the SLURM script and send it.

`RUN/frozen/` gets the package as it is now, the resolved configuration and the filled script, so that a job that waits,
is requeued or goes on next week runs what was submitted, whatever happens to the checkout.
"""

import filecmp
import logging
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from egom2p import resources
from egom2p.config import dump, load
from egom2p.data.clips import expand_paths
from egom2p.data.remote import is_remote
from egom2p.data.tokens import TokenDataset
from egom2p.errors import UserError
from egom2p.files import aside
from egom2p.modalities import ModalitySet
from egom2p.training.pretraining import PretrainConfig, held_out_sets

log = logging.getLogger(__name__)

TEMPLATE = Path("scripts/slurm/train.sbatch")
FROZEN = "frozen"


@dataclass(frozen=True)
class JobArgs:
    """options: sbatch options by long name, without dashes; "" as value drops the script's own; the job's name is the
    run folder's unless given. environment: variables the script reads. chain: so many jobs, each waiting for the one
    before (for clusters that forbid requeueing). unchecked: the data need not be seen from this machine."""

    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    chain: int = 1
    unchecked: bool = False


def submit(config: Path, overrides: Sequence[str], job: JobArgs, template: Path = TEMPLATE,
           send: bool = True) -> tuple[Path, list[str]]:
    """Freeze, fill and send. Returns the script that sends the job and the jobs' numbers, none when `send` is
    false."""
    script = _read_template(template)
    resolved = load(PretrainConfig, config, overrides)
    _check_job(resolved, job)
    frozen = _freeze_job(Path(resolved.run.dir), dump(resolved), script, job)
    return _dispatch(frozen, [str((frozen / "config.yaml").resolve())], job, send)


def submit_array(configs: Sequence[PretrainConfig], wanted: Sequence[int], folder: Path, job: JobArgs,
                 template: Path = TEMPLATE, send: bool = True,
                 at_once: int | None = None) -> tuple[Path, list[str]]:
    """Trainings as one job array, of which only those numbers of `configs` are sent that are `wanted`, at most
    `at_once` at the same time. One frozen copy of the code lies in `folder`; a later call for it must be about the same
    `configs`."""
    script = _read_template(template)
    for number in wanted:
        _check_job(configs[number], job)
    tasks = ",".join(map(str, wanted)) + (f"%{at_once}" if at_once else "")
    job = replace(job, options={"output": "slurm-%x-%A_%a.out", **job.options, "array": tasks},
                  environment={**job.environment, "ARRAY": str((folder / FROZEN / "configs").resolve())})
    frozen = _freeze_job(folder, "---\n".join(map(dump, configs)), script, job)
    (frozen / "configs").mkdir(exist_ok=True)
    for number, config in enumerate(configs):
        (frozen / "configs" / f"{number}.yaml").write_text(dump(config))
    return _dispatch(frozen, [], job, send)


def submit_command(verbs: Sequence[str], arguments: Sequence[str], folder: Path, job: JobArgs,
                   template: Path = TEMPLATE, send: bool = True) -> tuple[Path, list[str]]:
    """The same for another command that shares its work among processes, `egom2p VERBS... ARGUMENTS...`, whose output
    goes to `folder`. A stopped job goes on where it was, as the command itself does."""
    script = _read_template(template)
    _check_limits(job)
    job = replace(job, environment={**job.environment, "COMMAND": " ".join(verbs)})
    frozen = _freeze_job(folder, f"# egom2p {shlex.join([*verbs, *arguments])}\n", script, job)
    return _dispatch(frozen, list(arguments), job, send)


def _read_template(template: Path) -> str:
    template = resources.locate(template)
    if not template.is_file():
        raise UserError(f"no SLURM script {template}; name one with --template")
    return template.read_text()


def _freeze_job(folder: Path, config: str, script: str, job: JobArgs) -> Path:
    """The frozen folder, with the script filled in for it."""
    environment = {**job.environment, "FROZEN": str((folder / FROZEN).resolve())}
    return freeze(folder, config, fill(script, {"job-name": folder.name, **job.options}, environment))


def _dispatch(frozen: Path, arguments: list[str], job: JobArgs, send: bool) -> tuple[Path, list[str]]:
    chained = ["--dependency=singleton"] if job.chain > 1 else []
    command = ["sbatch", "--parsable", *chained, str(frozen / "train.sbatch"), *arguments]
    script = frozen / "submit.sh"
    script.write_text(shlex.join(command) + "\n")
    return script, [_send(command) for _ in range(job.chain)] if send else []


def _check_job(config: PretrainConfig, job: JobArgs) -> None:
    """Raises UserError for what would end the job when it starts, perhaps days from now."""
    nodes, processes = job.options.get("nodes", "1"), job.environment.get("PROCESSES", "1")
    if nodes.isdigit() and processes.isdigit():
        config.train.micro_batch(int(nodes) * int(processes))
    _check_limits(job)
    try:
        _check_data(config)
    except UserError as error:
        if "CONTAINER" not in job.environment and not job.unchecked:
            raise UserError(f"{error}. If only the job's nodes see the data: --unchecked") from error
        log.warning("on this machine: %s", error)


def _check_limits(job: JobArgs) -> None:
    limit = job.options.get("time", "")
    if limit and not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)", limit):
        raise UserError(f"--time {limit}: write minutes, HH:MM:SS or D-HH:MM:SS")
    venv = job.environment.get("VENV", "").replace("%m", platform.machine())
    if venv and not (Path(venv) / "bin/activate").is_file() and "CONTAINER" not in job.environment:
        log.warning("--venv %s: no environment there on this machine (%s)", venv, platform.machine())


def _check_data(config: PretrainConfig) -> None:
    """Raises UserError unless every local data set of a training has shards, and evaluation its clips."""
    modalities = ModalitySet.from_config(config.modalities)
    wanted = [(config.data.root, n, d.path, d.modalities) for n, d in config.data.datasets.items()]
    wanted += [(*place, ()) for place in held_out_sets(config)]
    for root, name, path, only in wanted:
        if not is_remote(root) and not is_remote(path):
            TokenDataset.find(root, name, path, modalities, only)
    if config.eval.every and config.eval.tasks and not is_remote(config.eval.clips):
        expand_paths(config.eval.clips)


def freeze(run_dir: Path, config: str, script: str) -> Path:
    """Copy the package, configuration and script into RUN/frozen. A run frozen before must be the same run."""
    frozen = run_dir / FROZEN
    if (frozen / "config.yaml").exists() and (frozen / "config.yaml").read_text() != config:
        raise UserError(f"{frozen / 'config.yaml'} differs from the configuration given now; choose another run.dir, "
                        f"or remove {frozen} to freeze anew")
    if (frozen / "egom2p").exists():
        changed = _changed(resources.PACKAGE, frozen / "egom2p")
        if changed:
            log.warning("the code changed since %s was frozen (%s); the job runs the frozen code. Remove it to freeze "
                        "anew", frozen, ", ".join(changed[:5]))
    else:
        _copy_code(frozen / "egom2p")
    (frozen / "config.yaml").write_text(config)
    (frozen / "train.sbatch").write_text(script)
    return frozen


def _copy_code(target: Path) -> None:
    """The package with what is shipped with it: whole, or not there at all."""
    part = aside(target)
    try:
        shutil.copytree(resources.PACKAGE, part, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
        for folder in resources.FOLDERS:
            shutil.copytree(resources.root() / folder, part / "shipped" / folder)
        (part / "shipped" / resources.COMMIT).write_text((resources.commit() or "") + "\n")
        part.rename(target)
    except shutil.Error as error:
        raise UserError(f"{target}: the code cannot be copied there ({error.args[0][0][2]})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fill(script: str, options: dict[str, str], environment: dict[str, str]) -> str:
    """The script with its #SBATCH lines set (replaced where it has the option, added where it lacks it, dropped for
    "") and, below them, its variables. sbatch's --export could not hand on a value with a comma."""
    lines, left = [], dict(options)
    for line in script.splitlines():
        name = line.removeprefix("#SBATCH --").partition("=")[0] if line.startswith("#SBATCH --") else ""
        if name not in left:
            lines.append(line)
        elif (value := left.pop(name)) != "":
            lines.append(_option(name, value))
    lines[1:1] = [_option(k, v) for k, v in left.items() if v != ""]
    header = max(i for i, line in enumerate(lines) if i == 0 or line.startswith("#SBATCH")) + 1
    lines[header:header] = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join(lines) + "\n"


def _option(name: str, value: str) -> str:
    """An #SBATCH line; sbatch cuts a value at a blank unless it is in quotes."""
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={quoted if re.search(r'[^-!$-~]', value) else value}"


def _send(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("sbatch is not here; run this on a SLURM login node, or add --dry-run to write the job without "
                        "sending it") from error
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _changed(ours: Path, theirs: Path) -> list[str]:
    """Python files that differ or exist on one side only."""
    names = {p.relative_to(root).as_posix() for root in (ours, theirs) for p in root.rglob("*.py")}
    return sorted(n for n in names if not ((ours / n).exists() and (theirs / n).exists()
                                           and filecmp.cmp(ours / n, theirs / n, shallow=False)))
