"""A real SLURM on this machine: a job is submitted, preempted, requeued and resumed, and its figures are exact.

The daemons (munged, slurmctld, slurmd of Debian's slurm-wlm and munge) are started here as root with one node of two
cores and their state in a temporary folder. Where they cannot be started the tests skip and say why.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from egom2p.training.log import read_metrics
from tests.conftest import ROOT, run_cli, run_ranks
from tests.training.test_kills import SMALL
from tests.training.test_reliability import arguments, same_weights
from tests.training.test_training import curve

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={port1}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which sbatch, squeue and scancel talk to a cluster of this machine alone."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"no SLURM to start: {', '.join(missing) or 'not root'} (apt-get install slurm-wlm munge)")
    folder = Path("/run") / f"egom2p-slurm-{os.getpid()}"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    port = _free_port()
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder,
                                                   port=port, port1=_free_port()))
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    try:
        subprocess.run(["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                        f"--pid-file={folder}/munged.pid",
                        f"--log-file={folder}/munged.log",
                        f"--seed-file={folder}/munge.seed"], check=True, capture_output=True, text=True)
        for name in ("slurmctld", "slurmd"):
            daemons.append(subprocess.Popen([name, "-D"], env=env, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL))
        state, deadline = "", time.time() + 40
        while "idle" not in state and time.time() < deadline:
            time.sleep(0.5)
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True).stdout
        if "idle" not in state:
            trace = folder / "slurmctld.log"
            said = trace.read_text()[-500:] if trace.exists() else "no log"
            pytest.skip(f"SLURM did not come up: node '{state.strip()}'; {said}")
        yield env
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"SLURM cannot be started here: {getattr(error, 'stderr', error)}")
    finally:
        subprocess.run(["scancel", "--full", "-u", "root"], env=env, capture_output=True, timeout=30)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)
        if (folder / "munged.pid").exists():
            os.kill(int((folder / "munged.pid").read_text()), 15)
        shutil.rmtree(folder, ignore_errors=True)


def state_of(env: dict, job: str) -> str:
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], env=env, capture_output=True,
                          text=True).stdout.strip()


def wait(condition, seconds: float, what: str, log: Path | None = None) -> None:
    deadline = time.time() + seconds
    while not condition():
        if time.time() > deadline:
            raise AssertionError(f"{what} did not happen in {seconds:.0f} s: "
                                 f"{log.read_text()[-3000:] if log and log.exists() else ''}")
        time.sleep(0.2)


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_resumed_exactly(cluster, debug_tokens, tmp_path, monkeypatch):
    """Two processes under torchrun in a SLURM job, stopped by a job of higher priority."""
    for key, value in cluster.items():
        monkeypatch.setenv(key, value)
    options = [f"data.root={debug_tokens}", "train.threads=1", "train.steps=300", "checkpoint.every=0", *SMALL]
    run, output = tmp_path / "run", tmp_path / "job.out"
    done = run_cli("submit", "cfgs/train/debug.yaml", *options, f"run.dir={run}", "--nodes", 1, "--gpus-per-node", 0,
                   "--processes", 2, "--cpus-per-task", 2, "--time", "10:00",
                   "--partition", "low", "--venv", Path(sys.executable).parent.parent, "--sbatch", f"output={output}",
                   "mem=1000")
    job = done.stdout.strip()
    assert job.isdigit(), done.stdout
    wait(lambda: len(read_metrics(run)) > 20, 90, "the first steps", output)
    before = len(read_metrics(run))
    high = subprocess.run(["sbatch", "--parsable", "--partition=high", "--ntasks=1", "--cpus-per-task=2",
                           "--mem=500", f"--output={tmp_path / 'high.out'}", "--wrap", "sleep 3"],
                          env=cluster, capture_output=True, text=True)
    assert high.returncode == 0, high.stderr
    wait(lambda: (run / "checkpoints/latest").exists(), 60, "the checkpoint", output)
    stopped_at = len(read_metrics(run))
    assert before <= stopped_at < 300
    wait(lambda: not state_of(cluster, job), 240, "the end of the job", output)
    text = output.read_text()
    assert "start 0:" in text
    assert "start 1:" in text, text[-3000:]
    assert "resuming" in text
    assert read_metrics(run)[-1]["step"] == 300, text[-3000:]

    run_ranks(2, *arguments(debug_tokens, tmp_path / "whole", *options[1:]))
    assert curve(run) == curve(tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_sweep_runs_as_an_array_whose_tasks_stop_and_go_on_alone(cluster, debug_tokens, tmp_path, monkeypatch):
    """Two runs side by side; one gets the signal that precedes a time limit, saves and is requeued, the other never
    notices. Each is exactly the run without SLURM; sent once more, nothing is left to do, and they can be compared."""
    for key, value in cluster.items():
        monkeypatch.setenv(key, value)
    options = [f"data.root={debug_tokens}", "train.threads=1", "train.steps=250", "checkpoint.every=0",
               "optim.warmup_steps=0", *SMALL]
    sweep, output = tmp_path / "sweep.yaml", tmp_path / "job-0.out"
    sweep.write_text(f"base: cfgs/train/debug.yaml\nout: {tmp_path}/runs\noverrides: [{', '.join(options)}]\n"
                     "axes: {optim.lr: [0.001, 0.002]}\nfigures: [loss]\n")
    submit = (f"--nodes 1 --gpus-per-node 0 --processes 1 --cpus-per-task 1 --time 10:00 --partition low --venv "
              f"{Path(sys.executable).parent.parent} --sbatch output={tmp_path}/job-%a.out mem=900")
    job = run_cli("ablate", sweep, f"--submit={submit}").stdout.strip()
    assert job.isdigit(), job
    runs = [tmp_path / "runs" / name for name in ("lr=0.001", "lr=0.002")]
    wait(lambda: all(len(read_metrics(run)) > 5 for run in runs), 120, "the first steps", output)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_0"], env=cluster, check=True)
    wait(lambda: (runs[0] / "checkpoints/latest").exists(), 60, "the checkpoint", output)
    wait(lambda: not state_of(cluster, job), 240, "the end of the array", output)
    first, second = ((tmp_path / f"job-{n}.out").read_text() for n in (0, 1))
    assert "start 1:" in first and "resuming" in first, first[-3000:]
    assert "start 1:" not in second and "resuming" not in second, second[-3000:]
    for run, rate in zip(runs, ("0.001", "0.002"), strict=True):
        assert read_metrics(run)[-1]["step"] == 250, first[-3000:]
        run_cli("train", "cfgs/train/debug.yaml", *options, f"optim.lr={rate}", f"run.dir={tmp_path / rate}")
        assert curve(run) == curve(tmp_path / rate) and same_weights(run, tmp_path / rate)
    assert "every run is trained" in run_cli("ablate", sweep, f"--submit={submit}").stdout
    assert "loss" in run_cli("ablate", sweep).stdout


def test_submit_freezes_what_it_sends(debug_tokens, tmp_path):
    """--dry-run writes everything; code and configuration are those of now, and another configuration is refused."""
    run = tmp_path / "run"
    arguments = ["submit", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={run}",
                 "--nodes", 4, "--gpus-per-node", 4, "--time", "1-00:00:00", "--account", "lab",
                 "--sbatch", "constraint=gh200", "train.batch_size=16", "--chain", 3, "--venv", "/envs/%m", "--dry-run"]
    done = run_cli(*arguments)
    assert "not sent" in done.stdout
    script = (run / "frozen/train.sbatch").read_text()
    for line in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=4", "#SBATCH --time=1-00:00:00", "#SBATCH --account=lab",
                 "#SBATCH --constraint=gh200", "#SBATCH --job-name=run"):
        assert script.count(line + "\n") == 1, line
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "--gpus-per-node=8" not in script
    command = (run / "frozen/submit.sh").read_text()
    assert "--dependency=singleton" in command
    assert "export VENV=/envs/%m\n" in script
    assert "export PROCESSES=4\n" in script
    assert f"export FROZEN={run / 'frozen'}\n" in script
    assert subprocess.run(["bash", "-n", run / "frozen/train.sbatch"]).returncode == 0
    # The frozen copy runs by itself.
    env = {**os.environ, "PYTHONPATH": str(run / "frozen"), "PYTHONSAFEPATH": "1"}
    where = subprocess.run([sys.executable, "-c", "import egom2p; print(egom2p.__file__)"], env=env, cwd=ROOT,
                           capture_output=True, text=True).stdout
    assert where.strip() == str(run / "frozen/egom2p/__init__.py")
    assert run_cli(*arguments).returncode == 0
    refused = run_cli(*arguments[:2], "optim.lr=0.5", *arguments[2:], check=False)
    assert refused.returncode == 2
    assert "differs from the configuration given now" in refused.stderr


def test_submit_without_slurm_says_so(debug_tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_cli("submit", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path / 'run'}",
                   check=False)
    assert done.returncode == 2
    assert "sbatch is not here" in done.stderr
