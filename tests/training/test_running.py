"""How commands behave where they really run: two jobs on one folder, Ctrl-C, values as people type them."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from egom2p import resources
from egom2p.config import load
from egom2p.data.tarindex import split_name
from egom2p.errors import UserError
from egom2p.lock import LOCK, RunLock, is_running, process_start
from egom2p.submit import fill
from egom2p.training.log import read_metrics
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT, run_cli, start_cli


def test_a_run_folder_is_held_by_one_process(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=r"is in use by process \d+"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("host", ["this", "another"])
def test_a_stale_lock_is_taken_over(tmp_path, host, monkeypatch):
    """A process that is gone here, and a heart that stopped long ago elsewhere."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    import socket

    name = socket.gethostname() if host == "this" else "node-17"
    (tmp_path / LOCK).write_text(json.dumps({"token": "x", "host": name, "pid": dead.pid, "born": "1"}))
    if host == "another":
        os.utime(tmp_path / LOCK, (time.time() - 600,) * 2)
    with RunLock(tmp_path) as lock:
        lock.check()


def test_a_living_holder_elsewhere_is_waited_for_and_refused(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps({"token": "x", "host": "node-17", "pid": 1}))
    lock = RunLock(tmp_path)
    monkeypatch.setattr(lock, "_still_beats", lambda seconds: True)
    with pytest.raises(UserError, match="node-17"):
        lock.__enter__()


def test_a_holder_of_another_numbering_is_judged_by_its_heart(tmp_path, monkeypatch):
    """As in containers that share the host's name: its process number means nothing here."""
    (tmp_path / LOCK).write_text(json.dumps({"token": "x", "host": os.uname().nodename, "space": "pid:[1]", "pid": 1,
                                             "born": "1"}))
    lock = RunLock(tmp_path)
    monkeypatch.setattr(lock, "_still_beats", lambda seconds: True)
    with pytest.raises(UserError, match="it is alive"):
        lock.__enter__()
    os.utime(tmp_path / LOCK, (time.time() - 600,) * 2)
    with RunLock(tmp_path):
        pass


def test_a_process_that_may_not_be_looked_at_is_alive(monkeypatch):
    def forbidden(*given: object) -> None:
        raise PermissionError

    monkeypatch.setattr("egom2p.lock.os.kill", forbidden)
    monkeypatch.setattr("egom2p.lock.process_start", lambda pid: "")
    assert is_running(4711, "1")


def test_a_number_used_again_is_no_living_holder(tmp_path):
    assert process_start(os.getpid())
    (tmp_path / LOCK).write_text(json.dumps({"token": "x", "host": os.uname().nodename, "pid": os.getpid(),
                                             "born": "1"}))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_saves_and_leaves(debug_tokens, tmp_path, workers):
    process = start_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                        "train.steps=100000", f"data.workers={workers}", "eval.every=0", "checkpoint.every=0")
    deadline = time.time() + 60
    while len(read_metrics(tmp_path / "run")) < 3 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output[-2000:]
    assert "Traceback" not in output
    assert any((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_run_that_fails_ends_with_its_workers(tmp_path):
    """Too many unreadable clips while two workers run."""
    run_cli("shards", "random", "cfgs/train/debug.yaml", "--out", tmp_path / "tokens", "--count", 16)
    for tar in (tmp_path / "tokens").rglob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"\x93NUMPY", b"\x00NUMPX"))
    process = start_cli("train", "cfgs/train/debug.yaml", f"data.root={tmp_path}/tokens", f"run.dir={tmp_path}/run",
                        "train.steps=200", "data.workers=2", "eval.every=0")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "clips were unreadable" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("text", "want"), [("run.dir=4711", "4711"), ("run.dir=007", "007"), ("run.dir=1e5", "1e5"),
                                            ("run.dir=on", "on"), ("run.dir=my run x=1", "my run x=1")])
def test_text_stays_text_in_overrides(text, want):
    assert load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [text]).run.dir == want


def test_numbers_stay_numbers_in_overrides():
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", ["train.steps=1e1", "optim.lr=1e-4"])
    assert (config.train.steps, config.optim.lr) == (10, 1e-4)


@pytest.mark.parametrize(("name", "parts"), [
    ("a.npy", ("a", "npy")), ("c0.rgb.npy", ("c0", "rgb.npy")), ("P01.5_0003.npy", ("P01.5_0003", "npy")),
    ("P01.5_0003.rgb.mp4", ("P01.5_0003", "rgb.mp4")), ("2024.05.01-walk.json", ("2024.05.01-walk", "json")),
    ("README", ("README", ""))])
def test_keys_with_dots(name, parts):
    assert split_name(name) == parts


def test_token_keys_with_dots_are_all_used(tmp_path):
    from egom2p.data.tokens import TokenDataset
    from egom2p.modalities import Modality, ModalitySet

    path = tmp_path / "cam/set/shard-000000.tar"
    path.parent.mkdir(parents=True)
    names = ["P01.5_0000", "P01.5_0001", "morning.walk", "evening.walk"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            buffer = io.BytesIO()
            np.save(buffer, np.zeros(4, np.uint16))
            info = tarfile.TarInfo(f"{name}.npy")
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    found = TokenDataset.open(tmp_path, "set", "", ModalitySet([Modality("cam", 9, (4,), "pose")]))
    assert found.keys == sorted(names)
    assert not found.lost


def test_values_with_blanks_and_commas_reach_the_job(tmp_path):
    script = fill("#!/usr/bin/env bash\n#SBATCH --nodes=1\n\necho \"$MOUNTS\"\n", {"job-name": "try 1", "nodes": "2"},
                  {"MOUNTS": "/data:/data,/my scratch:/scratch"})
    assert '#SBATCH --job-name="try 1"' in script.splitlines()
    assert "#SBATCH --nodes=2" in script.splitlines()
    path = tmp_path / "job.sh"
    path.write_text(script)
    done = subprocess.run(["bash", path], capture_output=True, text=True)
    assert done.stdout.strip() == "/data:/data,/my scratch:/scratch"


def test_the_reader_of_a_pipe_may_leave(debug_tokens):
    command = f"{shlex.quote(sys.executable)} -m egom2p configs | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_clips_that_the_tokenizer_is_not_for(world_clips, tmp_path):
    """Frames of another size are named before the first step, with what to give."""
    done = run_cli("tokenizer", "train", "tokenizers/world_rgb/config.yaml", f"data.clips={world_clips}/*.tar",
                   f"run.dir={tmp_path}/run", "train.steps=2", check=False)
    assert done.returncode == 2
    assert "prepare the clips with --size 48" in done.stderr


def test_an_inherited_data_set_can_be_dropped():
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", ["data.datasets.nodepth=null"])
    assert "nodepth" not in config.data.datasets
    assert "full" in config.data.datasets


def test_a_training_ends_with_one_line(debug_tokens, tmp_path):
    done = run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                   "train.steps=2")
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"{tmp_path}/run: step 2 of 2, 2 steps in ")
    assert "last loss" in last
    assert "eval/loss/cam" in last


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
@pytest.mark.parametrize(("deterministic", "mode"), [("true", " CNR:AUTO,STRICT "), ("false", " CNR:OFF ")])
def test_deterministic_asks_mkl_for_repeatable_products(debug_tokens, tmp_path, deterministic, mode):
    process = start_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                        "train.steps=1", "eval.every=0", f"train.deterministic={deterministic}", MKL_VERBOSE="1")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output[-2000:]
    products = [line for line in output.splitlines() if line.startswith("MKL_VERBOSE SGEMM")]
    assert products
    assert all(mode in line for line in products)


def test_features_of_what_a_shard_stores(debug_tokens, tmp_path):
    """uint16 ids with 65535 where nothing was observed; names the model has."""
    from egom2p import EgoM2P

    run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run", "train.steps=1")
    model = EgoM2P.from_pretrained(tmp_path / "run")
    stored = np.zeros((1, 30), np.uint16)
    stored[0, 3] = 65535
    features = model.encode({"cam": stored})["cam"]
    assert features[0, 3].abs().max() == 0
    assert features[0, 2].abs().max() > 0
    with pytest.raises(UserError, match="no modality 'rbg'"):
        model.encode({"rbg": stored})


@pytest.mark.parametrize(("options", "said"), [(("--time", "tomorrow", "--gpus-per-node", 4), "--time tomorrow"),
                                               (("--gpus-per-node", 5), "does not divide by")])
def test_a_job_that_could_not_start_is_not_sent(tmp_path, options, said):
    done = run_cli("submit", "cfgs/train/debug.yaml", f"run.dir={tmp_path}/run", *options, "--dry-run", check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_job_whose_data_is_not_there_is_not_sent(debug_tokens, tmp_path, caplog):
    def submit(*options):
        return run_cli("submit", "cfgs/train/debug.yaml", f"run.dir={tmp_path}/run", "--gpus-per-node", 4, "--dry-run",
                       *options, check=False)

    for options, said in (((f"data.root={tmp_path}/none",), f"{tmp_path}/none"),
                          ((f"data.root={debug_tokens}", "eval.datasets=[nowhere]"), "data set 'nowhere'"),
                          ((f"data.root={debug_tokens}", "eval.tasks=[rgb2cam]", f"eval.clips={tmp_path}/*.tar"),
                           f"no file matches {tmp_path}")):
        done = submit(*options)
        assert done.returncode == 2 and said in done.stderr and "--unchecked" in done.stderr
        assert not (tmp_path / "run").exists()
    assert submit(f"data.root={tmp_path}/none", "--unchecked").returncode == 0
    assert "on this machine: data set 'full'" in caplog.text
    assert (tmp_path / "run/frozen/egom2p/shipped/COMMIT").read_text().strip() == (resources.commit() or "")


def test_a_longer_run_says_what_its_learning_rate_does(debug_tokens, tmp_path, caplog):
    arguments = ("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                 "eval.every=0")
    run_cli(*arguments, "train.steps=10")
    assert "planned for" not in caplog.text
    run_cli(*arguments, "train.steps=20")
    # lr 1e-3 after 5 steps of warm-up: at step 10 of 20 the cosine stands at a third, where it had ended at 0
    assert "planned for 10 steps and now has 20: from step 10 on" in caplog.text
    assert "is 0.00075 there, where the old schedule has 0" in caplog.text


def test_a_shorter_run_is_not_called_finished(debug_tokens, tmp_path):
    """It would rewrite the run's configuration, and print that it is at a step that it left long ago."""
    arguments = ("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                 "eval.every=0")
    run_cli(*arguments, "train.steps=4")
    before = (tmp_path / "run/config.yaml").read_text()
    done = run_cli(*arguments, "train.steps=3", check=False)
    assert done.returncode == 2 and "holds step 4, beyond the 3 asked for" in done.stderr
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert run_cli(*arguments, "train.steps=4", "data.max_damaged=0.5").returncode == 0
    done = run_cli(*arguments, "debug.replay_step=2", f"run.dir={tmp_path}/ruin", check=False)
    assert done.returncode == 2 and "no run whose step could be replayed" in done.stderr


@pytest.mark.parametrize(("change", "words"), [("model.num_heads=2", "its num_heads is 4, here 2"),
                                               ("model.variant=swiglu_qknorm", "its variant is swiglu, here"),
                                               ("model.encoder_depth=1", "its encoder_depth is 2, here 1")])
def test_a_start_of_another_architecture_is_refused(debug_tokens, tmp_path_factory, change, words):
    """Weights of the same shapes, of another function."""
    place = tmp_path_factory.getbasetemp() / "starts"
    arguments = ("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", "eval.every=0", "train.steps=1")
    if not place.exists():
        run_cli(*arguments, f"run.dir={place}")
    done = run_cli(*arguments, f"run.dir={place}-other", f"init.from={place}", change, check=False)
    assert done.returncode == 2 and words in done.stderr


def test_a_run_goes_on_without_what_it_started_from(debug_tokens, tmp_path, caplog):
    arguments = ("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", "eval.every=0")
    run_cli(*arguments, f"run.dir={tmp_path}/start", "train.steps=1")
    start = f"init.from={tmp_path}/start"
    run_cli(*arguments, f"run.dir={tmp_path}/run", start, "train.steps=2", "checkpoint.every=1")
    shutil.rmtree(tmp_path / "start")
    run_cli(*arguments, f"run.dir={tmp_path}/run", start, "train.steps=3")
    assert "the weights of the run's own checkpoint are taken" in caplog.text
    for state, damage in zip((tmp_path / "run/checkpoints").glob("step_*/state.json"), (bytes(100), b"{}", b"[]"),
                             strict=False):
        state.write_bytes(damage)
    for again in (f"run.dir={tmp_path}/run", f"run.dir={tmp_path}/new"):
        done = run_cli(*arguments, again, start, "train.steps=4", check=False)
        assert done.returncode == 2 and "init.from=" in done.stderr.splitlines()[-1]


def test_submit_of_another_command(finished, tmp_path):
    """Its arguments are checked before anything is frozen, and the script runs it."""
    tokenizer = finished[0] / "tokenizers/cam"
    words = ("tokenizer", "encode", tokenizer, "--clips", "clips/*.tar", "--out", tmp_path / "tokens")
    run_cli("submit", "--nodes", 2, "--gpus-per-node", 4, "--dry-run", "--", *words)
    frozen = tmp_path / "tokens/frozen"
    script = (frozen / "train.sbatch").read_text()
    assert "#SBATCH --nodes=2" in script and "export COMMAND='tokenizer encode'" in script
    sent = shlex.split((frozen / "submit.sh").read_text())
    assert sent[:3] == ["sbatch", "--parsable", str(frozen / "train.sbatch")]
    assert sent[3:] == [str(w) for w in words[2:]]
    with pytest.raises(SystemExit):  # argparse's own line: a missing --clips
        run_cli("submit", "--dry-run", "--", "tokenizer", "encode", "x", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_threads_sleep_where_they_wait_before_torch_is_loaded(monkeypatch):
    """In a new process: set when torch is loaded; a user's own choice stays."""
    code = ("import os, sys\nfrom egom2p.cli import main\nassert 'torch' not in sys.modules\nmain(['configs'])\n"
            "print(os.environ['OMP_WAIT_POLICY'])")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for chosen, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        if chosen:
            monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == expected
