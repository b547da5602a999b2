"""Token shards: pairing by key, formats, the index, damage."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from egom2p.data import tarindex
from egom2p.data.shardtools import check, convert
from egom2p.data.tarindex import INDEX_FILE, index_tars
from egom2p.data.tokens import TokenDataset, decode_tokens, encode_tokens
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import Modality, ModalitySet

MODALITIES = ModalitySet([Modality("rgb", 64000, (5, 2, 2)), Modality("cam", 256, (30,))])


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(array):
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def grids(rng, count=6):
    return {f"k{i}": {"rgb": rng.integers(0, 64000, (5, 2, 2)).astype(np.uint16),
                      "cam": rng.integers(0, 256, 30).astype(np.uint16)}
            for i in range(count)}


def write_set(root, samples, name="set", suffix="npy", pack=npy, lacking=()):
    for modality in ("rgb", "cam"):
        rows = [(f"{k}.{suffix}", pack(v[modality])) for k, v in samples.items() if (modality, k) not in lacking]
        write_tar(root / modality / name / "shard-000000.tar", rows)


def open_set(root, name="set", pattern=""):
    return TokenDataset.open(root, name, pattern, MODALITIES)


def test_modalities_pair_by_key_and_a_lacking_one_is_absent(tmp_path, rng):
    samples = grids(rng)
    write_set(tmp_path, samples, lacking={("rgb", "k0"), ("cam", "k3")})
    dataset = open_set(tmp_path)
    assert dataset.keys == [f"k{i}" for i in range(6)]
    for element, key in enumerate(dataset.keys):
        sample = dataset.read(element)
        expected = {i: samples[key][m.name].reshape(-1) for i, m in enumerate(MODALITIES)
                    if (m.name, key) not in {("rgb", "k0"), ("cam", "k3")}}
        assert sample.tokens.keys() == expected.keys()
        assert all(np.array_equal(sample.tokens[i], expected[i]) for i in expected)


def write_parts(root, samples, **shards):
    """Shards {MODALITY__NAME: keys}."""
    for name, keys in shards.items():
        modality, _, shard = name.partition("__")
        write_tar(root / modality / "set" / f"{shard}.tar", [(f"{k}.npy", npy(samples[k][modality])) for k in keys])


def test_clips_pair_by_key_whatever_their_shards_are_called_and_hold(tmp_path, rng):
    """As the authors' scripts name them, one after the modality, and as shards cut by size or by what is there are."""
    samples = grids(rng)
    keys = list(samples)
    write_parts(tmp_path, samples, rgb__a=keys[:2], rgb__b=keys[2:], cam__train_cam_0=keys[1:5],
                cam__train_cam_1=keys[5:])
    dataset = open_set(tmp_path)
    assert sorted(dataset.keys) == keys and dataset.present().sum(1).tolist() == [6, 5]
    for element, key in enumerate(dataset.keys):
        for index, ids in dataset.read(element).tokens.items():
            assert np.array_equal(ids, samples[key][MODALITIES[index].name].reshape(-1))
    assert not check(f"{tmp_path}/*/*/*.tar", MODALITIES).problems


def test_keys_that_are_counted_anew_in_each_shard_stay_apart(tmp_path, rng):
    one, other = grids(rng), grids(rng)
    write_parts(tmp_path, one, rgb__a=["k0", "k1"], cam__a=["k1"])
    write_parts(tmp_path, other, rgb__b=["k0", "k1"], cam__b=["k0", "k1"])
    dataset = open_set(tmp_path)
    assert dataset.keys == ["k0", "k1"] * 2 and dataset.present().tolist() == [[True] * 4, [False, True, True, True]]
    assert np.array_equal(dataset.read(2).tokens[1], other["k0"]["cam"])


def test_one_key_in_two_folders_of_a_data_set_is_refused(tmp_path, rng):
    """Shards of one name: clip 7 of one folder would get the camera of the other's."""
    samples = grids(rng)
    write_set(tmp_path, samples, "a")
    write_set(tmp_path, samples, "b", lacking={("cam", "k3")})
    with pytest.raises(UserError, match="both hold a clip k"):
        open_set(tmp_path, pattern="[rgb,cam]/*/shard-*.tar")
    assert len(open_set(tmp_path, pattern="[rgb,cam]/{a,a}/shard-000000.tar").keys) == 6


def test_a_loose_file_in_two_forms_is_one_clip(tmp_path, rng):
    """As a conversion in place leaves them."""
    ids = rng.integers(0, 256, 30).astype(np.uint16)
    (tmp_path / "cam/set").mkdir(parents=True)
    (tmp_path / "cam/set/k1.npz").write_bytes(npz(ids))
    (tmp_path / "cam/set/k1.npy").write_bytes(npy(ids))
    dataset = open_set(tmp_path)
    assert dataset.keys == ["k1"] and np.array_equal(dataset.read(0).tokens[1], ids)


def test_modalities_of_no_common_clip_are_said(tmp_path, rng, caplog):
    samples = grids(rng)
    write_parts(tmp_path, samples, rgb__a=["k0", "k1"], cam__a=["k2", "k3"])
    open_set(tmp_path)
    assert "no clip has both 'rgb' and 'cam'" in caplog.text


def test_the_index_of_a_shard_that_is_replaced_goes(tmp_path, rng):
    """Elsewhere, where it is trusted by the size alone, it would be that of other clips."""
    path = tmp_path / "set/shard-000000.tar"
    for clip in ("one", "two"):
        tarindex.write_tar(path, [{"__key__": clip, "npy": npy(np.zeros(30, np.uint16))}])
        assert not (path.parent / INDEX_FILE).exists()
        assert index_tars([path])[0].keys == [clip] and (path.parent / INDEX_FILE).exists()


def test_a_shard_that_is_named_and_not_there_is_said_and_no_other(tmp_path, rng, caplog):
    write_set(tmp_path, grids(rng))
    for pattern in ("[rgb,cam]/set/shard-000000.tar", "[rgb,cam]/set/*.tar"):
        assert len(open_set(tmp_path, pattern=pattern).keys) == 6
    assert not caplog.text
    (tmp_path / "cam/set/shard-000001.tar").symlink_to("shard-000000.tar")
    open_set(tmp_path, pattern="[rgb,cam]/set/shard-{000000..000001}.tar")
    said = [record.getMessage() for record in caplog.records if "does not exist" in record.getMessage()]
    assert len(said) == 1 and "shard-000001.tar does not exist; clips of that shard lack 'rgb'" in said[0]


def test_released_forms_give_identical_samples(tmp_path, rng):
    """.npz tars in int32 / int64 with a `token` folder, loose folders, and our shards converted from both."""
    samples = grids(rng)
    wide = {k: {"rgb": v["rgb"].astype(np.int32), "cam": v["cam"].astype(np.int64)} for k, v in samples.items()}
    write_set(tmp_path / "ours", samples)
    for modality in ("rgb", "cam"):
        write_tar(tmp_path / "theirs" / modality / "set" / "token" / "shard-000000.tar",
                  [(f"{k}.npz", npz(v[modality])) for k, v in wide.items()])
        folder = tmp_path / "loose" / modality / "set"
        folder.mkdir(parents=True)
        for k, v in wide.items():
            (folder / f"{k}.npz").write_bytes(npz(v[modality]))
    assert convert(str(tmp_path / "theirs"), tmp_path / "converted", ("rgb", "cam")).files == 12
    sets = [open_set(tmp_path / "ours"), open_set(tmp_path / "theirs",
                                                  pattern="[rgb,depth,cam]/set/token/shard-{000000..000000}.tar"),
            open_set(tmp_path / "loose"), open_set(tmp_path / "converted")]
    for element in range(6):
        first, *others = (s.read(element) for s in sets)
        for other in others:
            assert other.key == first.key
            assert all(np.array_equal(first.tokens[i], other.tokens[i]) for i in (0, 1))
    first = index_tars([tmp_path / "converted/rgb/set/shard-000000.tar"])[0]
    assert first.sizes.max() < index_tars([tmp_path / "theirs/rgb/set/token/shard-000000.tar"])[0].sizes.min()


def test_missing_marks_survive_both_storage_types():
    ids, observed = np.arange(30), np.arange(30) % 3 > 0
    for vocab in (256, 64000, 100_000):
        modality = Modality("m", vocab, (30,))
        stored = encode_tokens(ids, observed, modality)
        assert stored.dtype == (np.uint16 if vocab < 65536 else np.int32)
        assert np.array_equal(decode_tokens(npy(stored), modality), np.where(observed, ids, -1))


@pytest.mark.parametrize(("array", "words"), [
    (np.zeros((5, 2, 3), np.uint16), "shape"), (np.zeros(30), "float64"), (np.full(30, 256, np.uint16), "outside"),
    (np.full(30, -2), "outside"), (np.full(30, 2**32 + 5), "outside")])
def test_tokens_that_do_not_fit_are_refused(array, words):
    with pytest.raises(ValueError, match=words):
        decode_tokens(npy(array), MODALITIES[1])


def test_pickles_are_never_loaded(tmp_path, rng):
    samples = grids(rng)
    write_set(tmp_path, samples)
    evil = npy(np.array([{"a": 1}], dtype=object))
    write_tar(tmp_path / "cam/set/shard-000000.tar", [("k0.npy", evil),
                                                      *((f"{k}.npy", npy(v["cam"])) for k, v in samples.items()
                                                        if k != "k0")])
    with pytest.raises(DamagedClip, match="k0"):
        open_set(tmp_path).read(0)


def test_index_is_read_and_rebuilt_when_the_shard_changes(tmp_path, rng, monkeypatch):
    write_set(tmp_path, grids(rng))
    shard = tmp_path / "cam/set/shard-000000.tar"
    first = index_tars([shard])[0]
    assert (shard.parent / INDEX_FILE).exists()
    monkeypatch.setattr("egom2p.data.tarindex._scan", lambda path: pytest.fail("a fresh index was rebuilt"))
    assert index_tars([shard])[0].keys == first.keys
    monkeypatch.undo()
    write_tar(shard, [("other.npy", npy(np.zeros(30, np.uint16)))])
    assert index_tars([shard])[0].keys == ["other"]
    (shard.parent / INDEX_FILE).write_text("{ damaged")
    assert index_tars([shard])[0].keys == ["other"]


def test_truncated_tar_keeps_what_is_whole_and_says_so(tmp_path, rng, caplog):
    write_set(tmp_path, grids(rng))
    shard = tmp_path / "rgb/set/shard-000000.tar"
    os.truncate(shard, 3 * 1024 + 600)
    dataset = open_set(tmp_path)
    assert "truncated" in caplog.text
    assert str(shard) in caplog.text
    assert len(dataset) == 6
    assert dataset.present()[0].sum() == 3
    assert dataset.read(0).tokens.keys() == {0, 1}


def test_check_finds_every_damage(tmp_path, rng):
    samples = grids(rng)
    write_set(tmp_path, samples, "whole")
    assert check(str(tmp_path), MODALITIES)[0] == []
    write_set(tmp_path, samples, "cut")
    os.truncate(tmp_path / "rgb/cut/shard-000000.tar", 3000)
    write_tar(tmp_path / "cam/odd/shard-000000.tar", [("a.npy", npy(np.zeros(30, np.uint16))),
                                                      ("a.npy", npy(np.zeros(30, np.uint16))),
              ("b.npy", npy(np.zeros(29, np.uint16))), ("c.npy", npy(np.zeros(30))),
              ("d.npy", npy(np.full(30, 999, np.uint16))), ("e.npy", b"nonsense")])
    (tmp_path / "cam/odd/shard-000001.tar").write_bytes(b"")
    (tmp_path / "cam/odd/shard-000002.tar").write_bytes(os.urandom(4096))
    write_tar(tmp_path / "rgb/odd/shard-000000.tar", [("a.npy", npy(samples["k0"]["rgb"]))])
    text = json.dumps(check(str(tmp_path), MODALITIES)[0])
    for finding in ("truncated", "key occurs twice", "shape (29,)", "holds float64", "token id 999", "unreadable",
                    "0 bytes", "not a readable tar", "whole shard missing"):
        assert finding in text, finding


def test_missing_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no token shard"):
        open_set(tmp_path)
