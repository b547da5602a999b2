"""scripts/slurm/train.sbatch without a SLURM: its commands are stand-ins that write down how they were called.

What real clusters differ in is played by the stand-ins: the script lies in the spool of the first node only, and srun
does not pass on --cpus-per-task.
"""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$CALLS/scontrol"; fi',
    # every node runs the command, and none of the others has the script
    "srun": '''printf "%s\\n" "$@" > "$CALLS/srun"; rm -f "$SCRIPT"
while [ "${1#--}" != "$1" ]; do shift; done
for id in 0 1; do SLURM_NODEID=$id "$@" || exit $?; done''',
    "python": '''if [[ " $* " = *" --help "* ]]; then echo "--numa-binding"; exit 0; fi
printf "%s|" "$@" >> "$CALLS/python"; echo >> "$CALLS/python"
echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $PYTORCH_ALLOC_CONF" >> "$CALLS/network"; exit "${CODE:-0}"''',
    "numactl": "exit 1",  # torch asks whether it is there
    "getent": 'echo "10.1.2.3 STREAM node1"',
    "ip": '''if [ "$2" = route ]; then [ "$SLURM_NODEID" = 0 ] && echo "local 10.1.2.3 dev lo src 10.1.2.3" ||
    echo "10.1.2.3 dev ib0 src 10.1.2.4"; else echo "2: hsn0 inet 10.1.2.3/24 brd 10.1.2.255"; fi''',
}


def run_script(tmp_path, *arguments, without: str = "", **env):
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    for place in (folder, calls):
        place.mkdir()
    for name, text in STAND_INS.items():
        if name == without:
            continue
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    script = tmp_path / "slurm_script"
    shutil.copy(ROOT / "scripts/slurm/train.sbatch", script)
    told = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "12345678", "SLURM_NNODES": "2", "CALLS": str(calls),
            "SCRIPT": str(script), "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **told, **env})
    return done, {p.name: p.read_text().splitlines() for p in calls.iterdir()}


def test_every_node_runs_although_only_the_first_has_the_script(tmp_path):
    done, calls = run_script(tmp_path, "my config.yaml", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "slurm_script").exists()
    for number, line in enumerate(calls["python"]):
        words = line.split("|")
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert words[words.index("--node-rank") + 1] == str(number)
        assert words[words.index("--nproc-per-node") + 1] == "4"
        assert words[words.index("--master-addr") + 1] == "node1"
        assert words[words.index("--numa-binding") + 1] == "node"
        assert words[-6:-1] == ["-m", "egom2p", "train", "my config.yaml", "train.steps=3"]
    assert len(calls["python"]) == 2
    assert "--cpus-per-task=64" in calls["srun"]


@pytest.mark.skipif(shutil.which("numactl") is not None, reason="numactl is installed here")
def test_memory_is_bound_only_where_numactl_is_there(tmp_path):
    """torchrun ends at once when it is asked to and finds no numactl."""
    done, calls = run_script(tmp_path, "c.yaml", without="numactl")
    assert done.returncode == 0 and not any("--numa-binding" in line for line in calls["python"])


def test_each_node_talks_through_the_card_that_leads_to_the_first(tmp_path):
    _, calls = run_script(tmp_path, "c.yaml")
    assert calls["network"] == ["hsn0 hsn0 expandable_segments:True", "ib0 ib0 expandable_segments:True"]


def test_a_network_that_was_chosen_stays(tmp_path):
    _, calls = run_script(tmp_path, "c.yaml", GLOO_SOCKET_IFNAME="eth7", PYTORCH_ALLOC_CONF="x:y")
    assert calls["network"] == ["eth7 hsn0 x:y", "eth7 ib0 x:y"]


def test_a_stopped_job_goes_back_to_the_queue_and_a_failed_one_does_not(tmp_path):
    done, calls = run_script(tmp_path, "c.yaml", CODE="75")
    assert done.returncode == 75 and calls["scontrol"] == ["requeue 12345678"]
    (tmp_path / "again").mkdir()
    done, calls = run_script(tmp_path / "again", "c.yaml", CODE="1")
    assert done.returncode == 1 and "scontrol" not in calls


def test_a_task_of_an_array_takes_the_configuration_of_its_number(tmp_path):
    """And goes back to the queue by itself: one task's SLURM_JOB_ID is that of the whole array."""
    done, calls = run_script(tmp_path, ARRAY="/runs/a b/configs", SLURM_ARRAY_TASK_ID="7",
                             SLURM_ARRAY_JOB_ID="12345678", CODE="75")
    assert done.returncode == 75 and calls["scontrol"] == ["requeue 12345678_7"]
    assert calls["python"][0].split("|")[-3:-1] == ["train", "/runs/a b/configs/7.yaml"]


def test_another_command_than_train(tmp_path):
    _, calls = run_script(tmp_path, "tok", "--clips", "a b/*.tar", COMMAND="tokenizer encode")
    words = calls["python"][0].split("|")
    assert words[-8:-1] == ["-m", "egom2p", "tokenizer", "encode", "tok", "--clips", "a b/*.tar"]
