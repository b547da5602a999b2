"""Order, masks and storage: what is promised of them, measured."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from egom2p.data.clips import expand_paths
from egom2p.data.loader import BatchPlan
from egom2p.data.masking import MaskArgs, MaskComponent, Masker
from egom2p.data.order import BLOCK, MixtureOrder, PassOrder
from egom2p.data.shardtools import check, convert, placed, stats
from egom2p.data.tarindex import INDEX_FILE, index_tars, npy_bytes, read_at, split_name, write_tar
from egom2p.data.tokens import TokenDataset, decode_tokens, load_array
from egom2p.errors import UserError
from egom2p.modalities import Modality, ModalitySet
from tests.conftest import run_cli

SETS = ModalitySet([Modality("a", 50, (40,)), Modality("b", 50, (20,))])
TWO = ModalitySet([Modality("a", 50, (40,)), Modality("b", 40, (32,))])
SIZES = np.array([7, 5, 9, 4])


def passes(order: PassOrder, number: int) -> list[int]:
    return [order.element(number * order.size + i) for i in range(order.size)]


def test_passes_data_sets_and_seeds_differ_and_each_is_whole():
    orders = {name: PassOrder(SIZES, 2, seed, salt) for name, seed, salt in (("own", 1, 0), ("salt", 1, 1),
                                                                             ("seed", 2, 0))}
    seen = [tuple(passes(orders["own"], n)) for n in range(3)] + [tuple(passes(orders[n], 0)) for n in ("salt", "seed")]
    assert all(sorted(one) == list(range(25)) for one in seen)
    assert len(set(seen)) == 5


def test_shards_are_shuffled_by_pass_data_set_and_seed():
    """Shards of one clip in windows of one: nothing but the order of shards is left."""
    ones = np.ones(30, int)
    seen = {tuple(passes(PassOrder(ones, 1, seed, salt), n)) for seed, salt, n in ((0, 0, 0), (0, 0, 1), (0, 1, 0),
                                                                                  (1, 0, 0))}
    assert len(seen) == 4 and all(sorted(one) == list(range(30)) for one in seen)


def test_clips_of_one_window_are_shuffled_anew_in_every_pass():
    """One window of all shards: the order inside it, not that of the shards, is what changes."""
    order = PassOrder(np.array([30]), 1, 0, 0)
    first, second = passes(order, 0), passes(order, 1)
    assert sorted(first) == sorted(second) == list(range(30))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_slots_of_the_mixture_differ_from_block_to_block():
    order = MixtureOrder([0.5, 0.5], 0)
    blocks = [[order.locate(b * BLOCK + i)[0] for i in range(BLOCK)] for b in range(2)]
    same = np.mean(np.array(blocks[0]) == np.array(blocks[1]))
    assert 0.4 < same < 0.6


def test_every_position_is_as_likely_an_input_and_a_target():
    masker = Masker(MaskArgs(10, 10, (MaskComponent(alpha=10.0),)), SETS, seed=3)
    ids = {0: np.zeros(40, np.int32), 1: np.zeros(20, np.int32)}
    counts = np.zeros((2, 2, 40))
    draws = 4000
    for number in range(draws):
        for side, flat in enumerate(masker.mask(ids, number)):
            np.add.at(counts, (side, flat.modality, flat.position), 1)
    for side in range(2):
        for modality, size in ((0, 40), (1, 20)):
            seen = counts[side, modality, :size]
            mean = seen.mean()
            assert np.abs(seen - mean).max() < 5 * np.sqrt(mean), (side, modality)


def test_components_are_drawn_by_their_weights():
    only = {"a": 1.0}
    masker = Masker(MaskArgs(10, 10, (MaskComponent(3.0, None, only, {"b": 1.0}),
                                      MaskComponent(1.0, None, {"b": 1.0}, only))), SETS, 0)
    ids = {0: np.zeros(40, np.int32), 1: np.zeros(20, np.int32)}
    share = np.mean([masker.mask(ids, n)[1].modality[0] == 1 for n in range(4000)])
    assert share == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("budget", [(15, 12), (3, 100), (100, 5)])
def test_the_way_out_of_a_mask_without_targets_keeps_the_budgets(budget):
    """A component that asks for nothing the clip has: half of everything is asked for instead, within the budgets."""
    masker = Masker(MaskArgs(*budget, (MaskComponent(1.0, None, {"a": 1.0}, {"b": 1.0}),)), SETS, 0)
    for number in range(50):
        inputs, targets = masker.mask({0: np.zeros(40, np.int32)}, number)
        assert 0 < len(targets) <= budget[1] and len(inputs) <= budget[0]
        assert len(inputs) + len(targets) <= 40


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("batch", "micro", "world"), [(8, 3, 1), (12, 5, 2), (7, 7, 1), (10, 1, 2)])
def test_no_sample_of_a_step_is_left_out(batch, micro, world, balanced):
    plans = [BatchPlan(batch, micro, batch, rank, world) for rank in range(world)]
    for step in (0, 3):
        dealt = [n for p in plans for part in p.deal(step, (lambda n: n % 5 + 1) if balanced else None) for n in part]
        assert sorted(dealt) == list(range(step * batch, (step + 1) * batch))


def test_arrays_in_fortran_order_are_read_right():
    array = np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    buffer = io.BytesIO()
    np.save(buffer, array)
    assert np.array_equal(load_array(buffer.getvalue()), array)


def write_shard(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, ({"__key__": key, "npy": npy_bytes(array)} for key, array in arrays.items()))


def test_converting_keeps_every_clip_and_every_id(tmp_path, rng):
    clips = {f"clip{i:03d}": rng.integers(0, 50, 40) for i in range(7)}
    write_shard(tmp_path / "old/a/set/shard-000000.tar", clips)
    assert convert(str(tmp_path / "old/a/set/*.tar"), tmp_path / "new")[:3] == (7, 1, 0)
    made = TokenDataset.open(tmp_path / "new", "set", "", SETS)
    assert made.keys == sorted(clips)
    for number, key in enumerate(made.keys):
        assert np.array_equal(made.read(number).tokens[0], clips[key])


@pytest.mark.parametrize(("wrong", "said"), [(-7, "-7"), (50, "50")])
def test_ids_outside_the_vocabulary_are_found_at_both_ends(tmp_path, wrong, said):
    ids = np.zeros(40, np.int32)
    ids[3] = wrong
    write_shard(tmp_path / "a/set/shard-000000.tar", {"good": np.zeros(40, np.int32), "bad": ids})
    problems = check(str(tmp_path), SETS).problems
    assert [p["key"] for p in problems] == ["bad"] and said in problems[0]["problem"]


@pytest.mark.parametrize("change", ["offset", "size"])
def test_an_index_that_points_past_the_end_is_not_trusted(tmp_path, change):
    path = tmp_path / "a/set/shard-000000.tar"
    write_shard(path, {f"k{i}": np.full(40, i, np.int32) for i in range(3)})
    index_tars([path])
    note = path.parent / INDEX_FILE
    text = json.loads(note.read_text())

    def spoil(value):
        if isinstance(value, dict):
            return {k: ([*v[:-1], 10**9] if k == f"{change}s" else spoil(v)) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    spoilt = spoil(text)
    assert spoilt != text
    note.write_text(json.dumps(spoilt))
    made = TokenDataset.open(tmp_path, "set", "", SETS)
    for number in range(3):
        assert made.read(number).tokens[0].tolist() == [number] * 40


NAMES = {"rgb", "cam"}


@pytest.mark.parametrize(("path", "place"), [
    ("root/rgb/holo/shard-0.tar", ("root", "rgb", "holo")),
    ("root/rgb/holo/token/shard-0.tar", ("root", "rgb", "holo")),
    ("root/holo/rgb/token/shard-0.tar", ("root/holo", "rgb", "holo")),  # no folder for the data set inside
    ("root/holo/rgb/shard-0.tar", ("root/holo", "rgb", "holo")),
    ("home/cam/tokens/rgb/holo/shard-0.tar", ("home/cam/tokens", "rgb", "holo")),
    ("root/wrist/mine/shard-0.tar", ("root", "wrist", "mine")),  # no known name: as our own layout says
])
def test_where_a_shard_belongs(path, place):
    assert placed(Path(path), NAMES) == (Path(place[0]), *place[1:])


@pytest.mark.parametrize("path", ["root/wrist/mine/token/s.tar", "root/rgb/cam/s.tar", "rgb/a/b/s.tar", "s.tar"])
def test_a_shard_that_cannot_be_placed_is_refused(path):
    with pytest.raises(UserError, match="cannot tell where it belongs"):
        placed(Path(path), NAMES)


def test_folders_of_tars_are_searched_through_links_and_exist_before_they_are_patterns(tmp_path):
    for name in ("there", "a [1,2]", "b"):
        write_tar(tmp_path / name / "x.tar", [{"__key__": "k", "npy": npy_bytes(np.zeros(3, np.uint16))}])
    (tmp_path / "b/linked").symlink_to(tmp_path / "there")
    (tmp_path / "b/linked/round").symlink_to(tmp_path / "b")
    assert expand_paths(str(tmp_path / "b")) == [tmp_path / "b/linked/x.tar", tmp_path / "b/x.tar"]
    assert expand_paths(str(tmp_path / "a [1,2]")) == [tmp_path / "a [1,2]/x.tar"]
    with pytest.raises(UserError, match="in pairs"):
        expand_paths(str(tmp_path / "{000..010.tar"))


def test_statistics_and_conversion_of_shards_with_holes(tmp_path):
    """A data set whose clips all lack a modality has empty shards; a damaged file is counted, or refused by name."""
    good = npy_bytes(np.arange(3, dtype=np.uint16))
    write_tar(tmp_path / "depth/set/shard-000000.tar", [])
    write_tar(tmp_path / "cam/set/shard-000000.tar", [{"__key__": "a", "npy": good}, {"__key__": "b", "npy": b"x" * 40},
                                                      {"__key__": "c", "npy": npy_bytes(np.zeros(3))}])
    rows = {Path(row["folder"]).parent.name: row for row in stats(str(tmp_path))}
    assert rows["depth"]["clips"] == 0 and rows["depth"]["distinct_ids"] == 0
    assert rows["cam"]["unreadable"] == 2 and rows["cam"]["distinct_ids"] == 3
    printed = [line.split("\t") for line in run_cli("shards", "stats", tmp_path).stdout.splitlines()]
    assert printed[0][-1] == "unreadable" and sorted(line[-1] for line in printed[1:]) == ["0", "2"]
    done = run_cli("shards", "convert", tmp_path / "[cam,depth]", "--out", tmp_path / "new", check=False)
    assert done.returncode == 2 and "shard-000000.tar: b: " in done.stderr and not list((tmp_path / "new").rglob("*.*"))
    np.savez(tmp_path / "poses.npz", np.zeros((5, 4, 4)))
    (tmp_path / "raw/cam/own").mkdir(parents=True)
    (tmp_path / "poses.npz").rename(tmp_path / "raw/cam/own/a.npz")
    done = run_cli("shards", "convert", tmp_path / "raw/[cam,gaze]/*/*.npz", "--out", tmp_path / "new", check=False)
    assert done.returncode == 2 and "a: holds float64, tokens are integers" in done.stderr


def test_converting_goes_on_and_notices_what_changed(tmp_path, rng):
    sources = [tmp_path / f"old/{n}/a/token/shard-00000{i}.tar" for n in ("one", "two") for i in range(2)]
    for path in sources:
        write_shard(path, {f"{path.parts[-4]}{i}": rng.integers(0, 50, 40) for i in range(3)})
    pattern = str(tmp_path / "old/*/a/token/*.tar")
    assert convert(pattern, tmp_path / "new", {"a"}, workers=2)[:3] == (12, 4, 0)
    made = {p.relative_to(tmp_path / "new"): p.stat().st_mtime_ns for p in (tmp_path / "new").rglob("*.tar")}
    assert {str(p.parent) for p in made} == {"a/one", "a/two"}
    write_shard(sources[3], {"two9": rng.integers(0, 50, 40)})
    assert convert(pattern, tmp_path / "new", {"a"})[:3] == (10, 1, 3)
    again = {p: (tmp_path / "new" / p).stat().st_mtime_ns for p in made}
    assert [str(p) for p in made if again[p] != made[p]] == ["a/two/shard-000001.tar"]


def test_two_sources_of_one_shard_are_refused(tmp_path, rng):
    for root in ("x", "y"):
        write_shard(tmp_path / root / "a/set/shard-000000.tar", {"k": rng.integers(0, 50, 40)})
    with pytest.raises(UserError, match="would both become"):
        convert(str(tmp_path / "*/a/set/*.tar"), tmp_path / "new", {"a"})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [
    {}, {"alpha": 1.0, "inputs": {"a": 1.0}}, {"alpha": 0.0}, {"alpha": 1.0, "weight": -0.5}, {"inputs": {"a": 0.0}},
    {"inputs": {"a": 1.0}, "targets": {"b": -1.0}}, {"targets": {"b": 0.0}}])
def test_components_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"give either alpha|concentrations must be above 0"):
        MaskComponent(**wrong)
    MaskComponent(weight=0.0, inputs={"a": 0.1}, targets={"b": 0.1})  # switched off, and small, are both allowed


@pytest.mark.parametrize(("name", "key", "suffix"), [
    ("a.npy", "a", "npy"), ("a.b.npy", "a", "b.npy"), ("P01.5_0003.rgb.npz", "P01.5_0003", "rgb.npz"),
    ("x.rgb.mp4", "x", "rgb.mp4"), ("x.depth.mkv", "x", "depth.mkv"), ("P01.5.npy", "P01.5", "npy"),
    ("a.b.json", "a.b", "json"), ("noext", "noext", ""), (".hidden", ".hidden", "")])
def test_a_members_name_is_a_key_and_a_suffix(name, key, suffix):
    assert split_name(name) == (key, suffix)


def test_a_shard_that_is_not_there_is_an_entry_that_says_why(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [{"__key__": "k", "npy": npy_bytes(np.arange(3))}])
    there, gone = index_tars([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert there.damage == "" and gone.damage == "cannot be read (No such file or directory)"
    assert f"{tmp_path / 'b.tar'}: cannot be read (No such file or directory)" in caplog.text
    assert list(there.keys) == ["k"] and not len(gone.keys)


def test_bytes_beyond_the_end_are_counted(tmp_path):
    (tmp_path / "x").write_bytes(b"abcdefgh")
    assert read_at(tmp_path / "x", 2, 3) == b"cde"
    with pytest.raises(EOFError, match="file ends 4 bytes early"):
        read_at(tmp_path / "x", 5, 7)
    with pytest.raises(OSError, match="changed since"):
        read_at(tmp_path / "x", 0, 1, (9, 0))


def test_loose_arrays_are_sharded_in_the_order_of_their_keys(tmp_path):
    """By key: `a` comes before `a-b`, though `a-b.npy` comes before `a.npy`."""
    (tmp_path / "raw/a/set").mkdir(parents=True)
    for key in ("a-b", "a", "c"):
        np.save(tmp_path / f"raw/a/set/{key}.npy", np.zeros(40, np.int32))
    convert(str(tmp_path / "raw"), tmp_path / "out", {"a"})
    shard, = (tmp_path / "out").rglob("*.tar")
    assert list(index_tars([shard])[0].keys) == ["a", "a-b", "c"]


def save_loose(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for key, ids in arrays.items():
        np.savez(folder / f"{key}.npz", ids)


def test_loose_files_of_several_modalities_fill_shards_of_the_same_clips(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("egom2p.data.shardtools.SHARD_CLIPS", 4)
    clips = {f"k{i:02d}": rng.integers(0, 50, 40) for i in range(10)}
    save_loose(tmp_path / "raw/a/set", clips)
    save_loose(tmp_path / "raw/b/set", {k: ids[:32] % 40 for k, ids in clips.items() if k not in ("k01", "k02")})
    convert(str(tmp_path / "raw/[a,b]/set"), tmp_path / "new")
    made = TokenDataset.open(tmp_path / "new", "set", "", TWO)
    assert made.keys == sorted(clips) and made.shard_sizes.tolist() == [4, 4, 2]
    assert made.present().sum(1).tolist() == [10, 8]
    np.savez(tmp_path / "raw/a/set/a_new_one.npz", clips["k00"])  # sorted before all others: every shard changes
    convert(str(tmp_path / "raw/[a,b]/set"), tmp_path / "new")
    assert TokenDataset.open(tmp_path / "new", "set", "", TWO).keys == ["a_new_one", *sorted(clips)]
    (tmp_path / "raw/a/set/a_new_one.npz").unlink()
    (tmp_path / "new/a/set/shard-000000.tar").unlink()
    convert(str(tmp_path / "raw/[a,b]/set"), tmp_path / "new")
    (tmp_path / "raw/a/set/k03.npz").unlink()
    with pytest.raises(UserError, match=r"new/a/set holds 1 clips .* such as k03"):
        convert(str(tmp_path / "raw/a/set/*.npz"), tmp_path / "new", {"a"})
    save_loose(tmp_path / "few/a/set", {k: clips[k] for k in ("k00", "k01", "k02", "k03")})
    with pytest.raises(UserError, match="earlier, longer set"):
        convert(str(tmp_path / "few/a/set"), tmp_path / "new", {"a"})
    assert TokenDataset.open(tmp_path / "new", "set", "", TWO).keys == sorted(clips)


def test_loose_files_and_tars_of_one_data_set_pair_by_key(tmp_path, rng):
    clips = {f"k{i}": rng.integers(0, 50, 40) for i in range(5)}
    write_shard(tmp_path / "a/set/shard-000000.tar", clips)
    save_loose(tmp_path / "b/set", {**{k: ids[:32] % 40 for k, ids in clips.items()}, "alone": np.zeros(32, np.int64)})
    made = TokenDataset.open(tmp_path, "set", "", TWO)
    assert sorted(made.keys) == ["alone", *sorted(clips)]
    assert made.present().sum(0).tolist() == [1 if key == "alone" else 2 for key in made.keys]
    (tmp_path / "b/set/alone.npz").unlink()
    assert not check(str(tmp_path)).problems


def test_loose_files_are_checked_and_counted(tmp_path, rng):
    save_loose(tmp_path / "a/set", {f"k{i}": rng.integers(0, 50, 40) for i in range(3)})
    (tmp_path / "a/set/bad.npz").write_bytes(b"no zip")
    for pattern in (tmp_path, tmp_path / "a/set/*.npz", tmp_path / "[a,b]/set"):
        found = check(str(pattern), SETS)
        assert found.files == 4 and [p["key"] for p in found.problems] == ["bad"], pattern
    assert stats(str(tmp_path))[0]["clips"] == 4 and stats(str(tmp_path))[0]["unreadable"] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tar and no loose"):
        check(str(tmp_path / "empty"))


def test_a_pattern_with_wildcards_may_be_absolute(tmp_path, rng):
    write_shard(tmp_path / "a/set/shard-000000.tar", {"k": rng.integers(0, 50, 40)})
    for pattern in (str(tmp_path / "[a,b]/set/*.tar"), str(tmp_path / "[a,b]/s?t/*.tar")):
        assert TokenDataset.open("elsewhere", "set", pattern, SETS).keys == ["k"]


def test_a_position_without_observation_stays_one_in_any_vocabulary():
    large = Modality("a", 100_000, (4,))
    assert decode_tokens(npy_bytes(np.array([1, 65535, 3, 4], np.uint16)), large).tolist() == [1, -1, 3, 4]
    assert decode_tokens(npy_bytes(np.array([1, 65535, -1, 4], np.int32)), large).tolist() == [1, 65535, -1, 4]


def test_random_shards_lie_where_the_configuration_looks(tmp_path):
    root, path = tmp_path / "tokens", "data.datasets.full.path='[rgb,depth,cam,gaze]/other/*.tar'"
    run_cli("shards", "random", "cfgs/train/debug.yaml", path, "--out", root, "--count", 30)
    run_cli("train", "cfgs/train/debug.yaml", path, f"data.root={root}", "train.steps=1", f"run.dir={tmp_path / 'run'}",
            "eval.every=0", "optim.warmup_steps=0")
    for wrong in (f"{tmp_path}/[rgb,cam]/x", "../[rgb,cam]/x", "[rgb,cam]/o*/x.tar",
                  "[rgb,cam]/other/clips-{000..002}.tar", "s3://b/[rgb,cam]/x"):
        done = run_cli("shards", "random", "cfgs/train/debug.yaml", f"data.datasets.full.path='{wrong}'", "--out",
                       root, "--count", 2, check=False)
        assert done.returncode == 2 and "name one folder a modality" in done.stderr, wrong


def test_fewer_random_shards_than_before_are_not_mixed_with_the_old(tmp_path, monkeypatch):
    monkeypatch.setattr("egom2p.data.shardtools.SHARD_CLIPS", 4)
    command = ("shards", "random", "cfgs/train/debug.yaml", "--out", tmp_path, "--count")
    run_cli(*command, 9)
    done = run_cli(*command, 4, check=False)
    assert done.returncode == 2 and "shard-000001.tar is of an earlier, longer set" in done.stderr
    run_cli(*command, 9)


def test_a_tar_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("exp:1/x.tar"), [{"__key__": "k", "npy": npy_bytes(np.arange(3))}])
    assert index_tars([Path("exp:1/x.tar")])[0].keys == ["k"]
