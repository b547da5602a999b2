"""Sweeps and comparisons: what is run, what is not run again, and which differences are called real."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from egom2p.ablate import SweepConfig, _call, combinations
from egom2p.compare import compare, comparison_text
from egom2p.config import load
from egom2p.errors import Preempted
from egom2p.evaluation.measures import is_better
from tests.conftest import ROOT, run_cli


def write_eval(folder, values, metric="ate_m"):
    """An evaluation of one task as `egom2p eval` leaves it."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    rows = {"keys": [f"c{i:03d}" for i in range(len(values))], "rows": {"model": {metric: list(values)}}}
    (folder / "clips.json").write_text(json.dumps({"rgb2cam": rows}))
    return folder


def test_paired_differences_are_found_where_means_alone_would_not_tell(tmp_path, rng):
    """Clips differ by 1.0, models by 0.02 with the same sign on nearly every clip."""
    hard = rng.normal(3, 1.0, 100)
    first = write_eval(tmp_path / "first", hard)
    better = write_eval(tmp_path / "better", hard - 0.02 + rng.normal(0, 0.01, 100))
    same = write_eval(tmp_path / "same", hard + rng.normal(0, 0.05, 100))
    rows, _ = compare([first, better, same])
    by_group = {r.group: r for r in rows}
    assert by_group["better"].verdict == "better" and by_group["same"].verdict == "same"
    assert by_group["better"].difference == pytest.approx(-0.02, abs=0.005)
    low, high = by_group["better"].low, by_group["better"].high
    assert low < -0.02 < high and high - low == pytest.approx(2 * 1.96 * 0.01 / 10, rel=0.3)
    assert by_group["first"].verdict == ""


def test_figures_that_were_measured_otherwise_are_said(tmp_path, rng, caplog):
    folders = [write_eval(tmp_path / name, rng.normal(3, 1, 20)) for name in "ab"]
    for folder, alignment in zip(folders, ("se3", "none"), strict=True):
        (folder / "results.json").write_text(json.dumps({"protocol": {"measures": {"pose_alignment": alignment}}}))
    compare(folders)
    assert "measured differently (pose_alignment: se3 and none)" in caplog.text


def test_higher_is_better_where_it_is(tmp_path, rng):
    values = rng.normal(20, 1, 50)
    folders = [write_eval(tmp_path / name, values + more, "psnr_db") for name, more in (("a", 0), ("b", 1))]
    rows, _ = compare(folders)
    assert rows[1].verdict == "better" and is_better("codes_used", 0.9, 0.4) and is_better("perplexity", 90, 40)


def test_seeds_make_a_group_and_count_in_the_interval(tmp_path, rng):
    """Two seeds that differ by more than the groups do: no difference is real."""
    clips = rng.normal(3, 1.0, 200)
    folders = [write_eval(tmp_path / f"{name},seed={seed}", clips + shift)
               for name, shifts in (("lr=1", (0.0, 0.4)), ("lr=2", (0.1, 0.5))) for seed, shift in enumerate(shifts)]
    rows, groups = compare(folders)
    assert {k: len(v) for k, v in groups.items()} == {"lr=1": 2, "lr=2": 2}
    assert rows[1].seeds == 2 and rows[1].spread == pytest.approx(0.4 / np.sqrt(2))
    assert rows[1].difference == pytest.approx(0.1) and rows[1].verdict == "same"
    assert "sd" in comparison_text(rows)


def write_run(folder, losses):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {batch_size: 8}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "loss": loss, "samples_per_s": 8.0}) + "\n")
            file.write(json.dumps({"step": step, "eval/loss/cam": loss, "eval/loss/rgb": loss + 2}) + "\n")
    return folder


def test_runs_are_compared_over_seeds_and_one_seed_tells_nothing(tmp_path):
    """Welch's interval by hand for two and two: t of 2 degrees of freedom is 4.303."""
    folders = [write_run(tmp_path / f"{n},seed={s}", [9.0, v]) for n, vs in (("a", (1.0, 1.2)), ("b", (2.0, 2.2)))
               for s, v in enumerate(vs)]
    rows, groups = compare(folders, ["eval/loss"])
    row = rows[1]
    assert row.mean == pytest.approx(2.1 + 1) and row.difference == pytest.approx(1.0)
    half = 4.303 * np.sqrt(2 * 0.02 / 2)
    assert (row.low, row.high) == (pytest.approx(1 - half, rel=1e-3), pytest.approx(1 + half, rel=1e-3))
    assert row.verdict == "worse"
    np.testing.assert_allclose(groups["a"][0].curve, [[1, 1, 10], [2, 2, 2]])  # 8 samples a step, 8 samples a second
    alone, _ = compare([folders[0], folders[2]], ["eval/loss"])
    assert alone[1].verdict == "?" and "one seed" in comparison_text(alone)


def test_what_cannot_be_compared_is_one_line(tmp_path):
    done = run_cli("compare", tmp_path, check=False)
    assert done.returncode == 2 and "neither a run" in done.stderr
    run = write_run(tmp_path / "a", [1.0])
    done = run_cli("compare", run, "--figures", "eval/loss/hands", check=False)
    assert done.returncode == 2 and "no figure 'eval/loss/hands'; there are" in done.stderr


def test_names_and_overrides_of_a_sweep():
    sweep = SweepConfig("b.yaml", "runs/s", {"optim.lr": [1e-3, 2e-3], "masks": {"few": ["masking.input_tokens=8"],
                                                                                "usual": []}}, ("x=1",), (0, 1))
    runs = combinations(sweep)
    assert [r.folder.name for r in runs[:3]] == ["lr=0.001,masks=few,seed=0", "lr=0.001,masks=few,seed=1",
                                                 "lr=0.001,masks=usual,seed=0"]
    assert len(runs) == 8
    assert runs[1].overrides == ["x=1", "optim.lr=0.001", "masking.input_tokens=8", "train.seed=1",
                                 "run.dir=runs/s/lr=0.001,masks=few,seed=1"]


@pytest.fixture
def sweep(debug_tokens, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"""
base: cfgs/train/debug.yaml
out: {tmp_path}/runs
overrides: [data.root={debug_tokens}, train.steps=4, optim.warmup_steps=0, eval.every=2, checkpoint.every=0]
axes:
  optim.lr: [1.0e-3, 1.0e+30]
  limit: {{short: ["train.max_skipped=1", "optim.clip_norm=0"]}}
figures: [eval/loss, loss]
""")
    return path


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_names_what_fails_and_compares(sweep, tmp_path, caplog):
    listed = run_cli("ablate", sweep, "--dry-run").stdout.splitlines()
    assert len(listed) == 2 and not (tmp_path / "runs").exists()
    done = run_cli("ablate", sweep)
    good, bad = tmp_path / "runs/lr=0.001,limit=short", tmp_path / "runs/lr=1e+30,limit=short"
    assert "eval/loss" in done.stdout and f"{bad} failed" in caplog.text
    stamp = (good / "metrics.jsonl").stat().st_mtime_ns
    with (tmp_path / "runs/compare.csv").open() as file:
        assert [r["group"] for r in csv.DictReader(file)] == [good.name] * 2
    assert (tmp_path / "runs/compare.png").stat().st_size > 5000
    again = run_cli("ablate", sweep)
    assert "run 1 of 2" not in again.stdout and "run 2 of 2" in again.stdout  # only the one that failed
    assert (good / "metrics.jsonl").stat().st_mtime_ns == stamp
    other = run_cli("ablate", sweep, "overrides=[train.steps=5]", check=False)
    assert other.returncode == 2 and "was run with" in other.stderr


def test_a_sweep_goes_to_slurm_as_one_array(sweep, tmp_path):
    """What is finished is not sent; the tasks keep their numbers; another sweep in the folder is refused."""
    done = run_cli("ablate", sweep, "--submit=--dry-run --gpus-per-node 0 --time 2:00:00 --at-once 1")
    assert done.stdout.count("sends it") == 1
    frozen = tmp_path / "runs/frozen"
    script = (frozen / "train.sbatch").read_text()
    assert "#SBATCH --time=2:00:00" in script and "#SBATCH --array=0,1%1\n" in script
    assert f"export ARRAY={frozen / 'configs'}" in script and "#SBATCH --output=slurm-%x-%A_%a.out" in script
    for number, rate in enumerate(("lr: 0.001", "lr: 1.0e+30")):
        assert rate in (frozen / f"configs/{number}.yaml").read_text()
    finished = tmp_path / "runs/lr=0.001,limit=short"
    finished.mkdir()
    combination = combinations(load(SweepConfig, sweep))[0]
    (finished / "ablation.json").write_text(json.dumps(combination.overrides))
    run_cli("ablate", sweep, "--submit=--dry-run --gpus-per-node 0")
    assert "#SBATCH --array=1\n" in (frozen / "train.sbatch").read_text()
    other = run_cli("ablate", sweep, "seeds=[1]", "--submit=--dry-run", check=False)
    assert other.returncode == 2 and "lr=0.001" in other.stderr
    trained = tmp_path / "runs/lr=1e+30,limit=short/checkpoints/latest"
    trained.mkdir(parents=True)
    (trained / "state.json").write_text('{"step": 4}')
    assert "every run is trained" in run_cli("ablate", sweep, "--submit=--dry-run --gpus-per-node 0").stdout
    (trained / "state.json").write_text('{"step": 3}')
    longer = run_cli("ablate", sweep, "overrides=[optim.warmup_steps=0]", "--submit=--dry-run", check=False)
    assert longer.returncode == 2 and "was run with" in longer.stderr
    quotes = run_cli("ablate", sweep, "--submit=--dry-run '", check=False)
    assert quotes.returncode == 2 and len(quotes.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("axes", ["{}", "{optim.lr: 3}", "{x: []}"])
def test_a_sweep_without_values_is_refused(axes, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(f"base: cfgs/train/debug.yaml\nout: {tmp_path}/runs\naxes: {axes}\n")
    done = run_cli("ablate", path, "--dry-run", check=False)
    assert done.returncode == (0 if axes == "{}" else 2)


@pytest.mark.parametrize("wrong", ["axes: {train.seed: [0, 1]}", "axes: {x: {a: ['train.seed=3']}}",
                                   "axes: {optim.lr: [1]}\noverrides: [run.dir=x]"])
def test_seeds_and_folders_are_the_sweeps_own(tmp_path, wrong):
    (tmp_path / "s.yaml").write_text(f"base: cfgs/train/debug.yaml\nout: {tmp_path}/runs\n{wrong}\n")
    done = run_cli("ablate", tmp_path / "s.yaml", "--dry-run", check=False)
    assert done.returncode == 2 and "is set for each run" in done.stderr


def test_a_finished_run_of_another_base_is_refused(debug_tokens, tmp_path):
    """What is compared was trained by the configuration of now."""
    base = tmp_path / "base.yaml"
    base.write_text(f"include: [{ROOT}/cfgs/train/debug.yaml]\ndata: {{root: {debug_tokens}}}\n"
                    "train: {steps: 2}\noptim: {warmup_steps: 0}\neval: {every: 0}\n")
    (tmp_path / "s.yaml").write_text(f"base: {base}\nout: {tmp_path}/runs\naxes: {{optim.lr: [0.001]}}\n")
    run = combinations(load(SweepConfig, tmp_path / "s.yaml"))[0]
    run_cli("train", base, *run.overrides)
    (run.folder / "ablation.json").write_text(json.dumps(run.overrides))
    run_cli("ablate", tmp_path / "s.yaml")
    whole = base.read_text()
    longer = whole.replace("steps: 2", "steps: 3")
    for changed, words in ((whole + "model: {dim: 32}\n", "model.dim"), (longer, "train.steps: 2 -> 3")):
        base.write_text(changed)
        done = run_cli("ablate", tmp_path / "s.yaml", check=False)
        assert done.returncode == 2 and words in done.stderr and "resume: {force: true}" in done.stderr
    base.write_text(changed + "resume: {force: true}\n")
    run_cli("ablate", tmp_path / "s.yaml")


def test_the_verdict_is_about_the_clips_that_both_have(tmp_path, caplog):
    """Of evaluations of 200 and of 50 clips, the latter the harder ones: better on each is better."""
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(0.1, 0.01, 150), rng.normal(0.2, 0.01, 50)
    rows = {"a": dict(enumerate([*hard, *easy])), "b": dict(enumerate(hard - 0.01))}
    for name, values in rows.items():
        (tmp_path / name).mkdir()
        clips = {"rgb2cam": {"keys": list(map(str, values)), "rows": {"model": {"ate_m": list(values.values())}}}}
        (tmp_path / name / "clips.json").write_text(json.dumps(clips))
        (tmp_path / name / "results.json").write_text("{}")
    _, row = compare([tmp_path / "a", tmp_path / "b"])[0]
    assert row.verdict == "better" and row.difference == pytest.approx(-0.01)
    assert "on the 50 clips that both have" in caplog.text


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_sweep_that_is_asked_to_stop_starts_no_other_run(monkeypatch, number, error):
    """Also where the command that runs then knows nothing of saving, and dies of it."""
    started = []

    def start(words, **options):
        started.append(words)
        process = real([sys.executable, "-c", "import time; time.sleep(30)"], **options)
        threading.Timer(0.3, lambda: (os.kill(os.getpid(), number), process.send_signal(number))).start()
        return process

    real = subprocess.Popen
    monkeypatch.setattr("egom2p.ablate.subprocess.Popen", start)
    with pytest.raises(error):
        _call(["eval", "nothing"])
    assert len(started) == 1
