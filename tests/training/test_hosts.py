"""Two hosts on one machine: network namespaces with their own addresses, and a cable that is pulled in mid-step."""

import subprocess
import time
from pathlib import Path

import pytest

from egom2p.training.log import read_metrics
from tests.conftest import start_torchrun
from tests.training.test_kills import SMALL
from tests.training.test_reliability import arguments, forget_after, wait_for
from tests.training.test_training import curve, train

OPTIONS = ("train.steps=160", "checkpoint.every=10", "checkpoint.keep_last=99", *SMALL)
HOSTS = {"egoa": "10.77.0.1", "egob": "10.77.0.2"}


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def cable():
    """Two namespaces joined by a pair of virtual cards, or a skip that says why there are none."""
    try:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            ip("netns", "add", name)
        ip("link", "add", "egoa0", "netns", "egoa", "type", "veth", "peer", "name", "egob0", "netns", "egob")
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}0")
            ip("-n", name, "link", "set", f"{name}0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield lambda state: ip("-n", "egob", "link", "set", "egob0", state)
    for name in HOSTS:
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", "-9", pid], capture_output=True)
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(root, run, port: int) -> list[subprocess.Popen]:
    """One torchrun on each host, meeting at the first."""
    return [start_torchrun(1, *arguments(root, run, *OPTIONS, "train.timeout_s=8", "train.first_timeout_s=60"),
                           launcher=("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint",
                                     f"{HOSTS['egoa']}:{port}", "--local-addr", address, "--rdzv-conf",
                                     f"is_host={str(name == 'egoa').lower()}"),
                           prefix=("ip", "netns", "exec", name),
                           GLOO_SOCKET_IFNAME=f"{name}0") for name, address in HOSTS.items()]


def running_children(pid: int) -> list[str]:
    """Child processes that have not ended (an ended one stays listed until torchrun, itself cut off, looks)."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [c for c in children if (status := Path(f"/proc/{c}/stat")).exists()
            and status.read_text().rpartition(")")[2].split()[0] != "Z"]


@pytest.mark.slow
def test_a_host_cut_off_is_named_and_the_run_resumes(debug_tokens, tmp_path, cable):
    run = tmp_path / "run"
    hosts = start(debug_tokens, run, 29511)
    wait_for(lambda: len(read_metrics(run)) > 30, hosts[0])
    cable("down")
    cut = time.time()
    output = hosts[0].communicate(timeout=60)[0]
    waited = time.time() - cut
    assert hosts[0].returncode != 0
    assert "missing" in output, output[-3000:]
    assert "rank 1 of 2 is missing" in output or "rank 0 is missing" in output, output[-3000:]
    assert waited < 8 + 10 + 20, f"ended {waited:.0f} s after the cable was pulled"
    deadline = time.time() + 40
    while running_children(hosts[1].pid) and time.time() < deadline:
        time.sleep(0.5)
    assert not running_children(hosts[1].pid), "the cut-off host's training process hangs"
    hosts[1].kill()
    print(f"ended {waited:.1f} s after the cable was pulled: "
          f"{[line for line in output.splitlines() if 'missing' in line][:1]}")

    cable("up")
    hosts = start(debug_tokens, run, 29512)
    for host in hosts:
        output = host.communicate(timeout=200)[0]
        assert host.returncode == 0, output[-3000:]
    train(debug_tokens, tmp_path / "whole", *OPTIONS)
    for ours, theirs in zip(curve(run), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3), ours["step"]
    forget_after(run, 0)
