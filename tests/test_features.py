"""Features that others work with, and probes that find what is in them and nothing that is not."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from egom2p import EgoM2P
from egom2p.data.clips import ClipIndex
from egom2p.data.tarindex import write_tar
from egom2p.errors import UserError
from egom2p.features import read_features
from egom2p.probe import probe
from egom2p.tokenizers import load
from tests.conftest import run_cli


def test_features_are_the_encoders(finished, tmp_path):
    """Of two inputs together, pooled over what was observed; by the command and by hand; finished files are kept."""
    out, clips = finished[0], str(finished[0] / "clips/test/*.tar")
    command = ("features", out / "model", "--clips", clips, "--inputs", "rgb,gaze", "--label", "activity", "--out",
               tmp_path / "f")
    printed = run_cli(*command).stdout
    keys, features = read_features(tmp_path / "f")
    assert f"features of {len(keys)} clips" in printed
    model, index = EgoM2P.from_pretrained(out / "model"), ClipIndex(clips)
    made = {n: load(out / "tokenizers" / n) for n in ("rgb", "gaze")}
    having = [i for i in range(len(index)) if (g := index.read(i).signals.get("gaze")) is not None and g[:, 2].any()]
    assert keys == [index.keys[i] for i in having] and features.shape == (len(keys), 128)
    clip = index.read(having[0]).signals
    ids = {n: np.where(t.observed(clip[n]), t.encode(clip[n]), -1)[None] for n, t in made.items()}
    tokens = model.encode({n: torch.from_numpy(i) for n, i in ids.items()})
    rows = torch.cat([tokens[n][0][torch.from_numpy(ids[n].reshape(-1) >= 0)] for n in ("rgb", "gaze")])
    np.testing.assert_allclose(features[0], rows.mean(0).detach().numpy(), atol=2e-3)
    with (tmp_path / "f/labels.csv").open() as file:
        labels = {r["key"]: r["label"] for r in csv.DictReader(file)}
    assert labels == {k: index.read(i).meta["activity"] for i, k in enumerate(index.keys)}
    path = next((tmp_path / "f").glob("*.safetensors"))
    before = path.stat().st_mtime_ns
    run_cli(*command)
    assert path.stat().st_mtime_ns == before
    other = run_cli(*command, "--layer", 1, check=False)
    assert other.returncode == 2 and "other options" in other.stderr


def test_layers_and_tokens(finished, tmp_path):
    out, clips = finished[0], str(finished[0] / "clips/test/*.tar")
    command = ("features", out / "model", "--clips", clips, "--pool", "none")
    run_cli(*command, "--layer", 0, "--out", tmp_path / "0")
    run_cli(*command, "--out", tmp_path / "all")
    first, last = read_features(tmp_path / "0")[1], read_features(tmp_path / "all")[1]
    assert first.shape == last.shape == (12, 45, 128) and not np.allclose(first, last, atol=0.1)
    model = EgoM2P.from_pretrained(out / "model")
    clip = ClipIndex(clips).read(0).signals["rgb"]
    ids = torch.from_numpy(load(out / "tokenizers/rgb").encode(clip)).reshape(-1)
    table = model.embeddings["rgb"]
    by_hand = table.token(ids) + table.position + table.modality
    np.testing.assert_allclose(first[0], by_hand.detach().numpy(), atol=5e-3)
    done = run_cli(*command, "--layer", 9, "--out", tmp_path / "x", check=False)
    assert done.returncode == 2 and "--layer must lie in" in done.stderr


def write(folder, features, labels):
    folder.mkdir()
    keys = [f"c{i}" for i in range(len(labels))]
    save_file({"features": torch.from_numpy(features).half()}, folder / "features-000000.safetensors",
              {"keys": json.dumps(keys)})
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "label"], *zip(keys, labels, strict=True)])
    return folder, folder / "labels.csv"


def test_a_probe_finds_what_is_there_and_only_that(tmp_path, rng):
    classes = np.array(["a", "b", "b", "b"])[rng.integers(0, 4, 200)]
    noise = rng.standard_normal((200, 16))
    there = noise.copy()
    there[:, 3] += 4 * (classes == "a")
    good = probe(*write(tmp_path / "good", there, classes))
    assert good.figure > 0.93 and good.low < good.figure < good.high and set(good.recalls) == {"a", "b"}
    nothing = probe(*write(tmp_path / "none", noise, classes))
    assert abs(nothing.figure - 0.5) < 0.12 and nothing.low < 0.55 and nothing.baseline == 0.5
    numbers = 3 * there[:, 5] + 0.1 * rng.standard_normal(200) + 7
    assert probe(*write(tmp_path / "numbers", there, numbers)).figure > 0.95


def test_an_attentive_probe_looks_where_a_mean_does_not(tmp_path, rng):
    """The class is in one token of 32, at a place that a marker shows."""
    classes = rng.integers(0, 2, 300)
    tokens = 0.3 * rng.standard_normal((300, 32, 8))
    place = rng.integers(0, 32, 300)
    tokens[np.arange(300), place, 0] += 5
    tokens[np.arange(300), place, 1] += 2 * (2 * classes - 1)
    tokens[:, :, 1] += 1.5 * rng.standard_normal((300, 32)) * (tokens[:, :, 0] < 3)
    place = write(tmp_path / "f", tokens, [f"k{c}" for c in classes])
    linear, attentive = probe(*place), probe(*place, "attentive")
    assert attentive.figure > 0.9 > linear.figure + 0.1


def test_what_cannot_be_probed_is_one_line(tmp_path, rng):
    folder, labels = write(tmp_path / "f", rng.standard_normal((20, 4)), ["a"] * 20)
    for kind, words in (("linear", "nothing to tell apart"), ("attentive", "--pool none")):
        with pytest.raises(UserError, match=words):
            probe(folder, labels, kind)
    (tmp_path / "other.csv").write_text("name,what\n1,2\n")
    done = run_cli("probe", folder, "--labels", tmp_path / "other.csv", check=False)
    assert done.returncode == 2 and "columns key and label" in done.stderr
    done = run_cli("probe", tmp_path, "--labels", labels, check=False)
    assert done.returncode == 2 and "no features there" in done.stderr


def test_clips_of_one_recording_are_in_one_fold(tmp_path, rng):
    """Features that only say which recording it is tell nothing of labels drawn by recording."""
    keys = [f"r{i // 20}-{i % 20}" for i in range(800)]
    recording = np.repeat(rng.normal(size=(40, 8)), 20, 0)
    features = torch.from_numpy(recording + 0.1 * rng.normal(size=(800, 8))).half()
    (tmp_path / "f").mkdir()
    save_file({"features": features}, tmp_path / "f/features-000000.safetensors", {"keys": json.dumps(keys)})
    words = np.repeat(rng.permutation(["a"] * 20 + ["b"] * 20), 20)
    with (tmp_path / "grouped.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "label", "group"],
                                    *zip(keys, words, [k.partition("-")[0] for k in keys], strict=True)])
    with (tmp_path / "each.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "label"], *zip(keys, words, strict=True)])
    grouped, each = (probe(tmp_path / "f", tmp_path / name, steps=60) for name in ("grouped.csv", "each.csv"))
    assert grouped.figure < 0.75 and grouped.high - grouped.low > 2 * (each.high - each.low)
    assert each.figure > grouped.figure + 0.05
    assert "in 40 groups" in str(grouped) and "groups" not in str(each)


def test_features_of_nothing_are_one_line(tmp_path):
    save_file({"features": torch.zeros(0, 8).half()}, tmp_path / "features-000000.safetensors", {"keys": "[]"})
    with pytest.raises(UserError, match="no clip there has features"):
        read_features(tmp_path)


def test_as_many_groups_as_clips_are_drawn_as_clips(tmp_path):
    from egom2p import probe

    groups = [f"g{i}" for i in range(40)]
    members = probe._members(groups, 5)
    assert [m.tolist() for m in members] == [[i] for i in range(40)]
    figures = np.random.default_rng(1).random(40)
    alone = probe._summary("x", lambda i: figures[i].mean(), members, 0.0, {})
    pairs = probe._summary("x", lambda i: figures[i].mean(), [np.array([i, i + 1]) for i in range(0, 40, 2)], 0.0, {})
    assert alone.figure == pytest.approx(pairs.figure) and (alone.groups, pairs.groups) == (0, 20)


def test_labels_of_clips_whose_json_is_damaged_are_left_out(finished, tmp_path):
    from egom2p.features import _write_labels

    write_tar(tmp_path / "a.tar", [{"__key__": "one", "json": b'{"activity": "walk", "source": "r"}'},
                                   {"__key__": "two", "json": b"["},
                                   {"__key__": "three", "json": b'{"activity": "sit"}'}])
    _write_labels(tmp_path / "labels.csv", ClipIndex(str(tmp_path / "a.tar")), "activity")
    assert (tmp_path / "labels.csv").read_text().split() == ["key,label,group", "one,walk,r", "three,sit,"]
