"""A corpus of damaged inputs: each is used, left out and counted, or refused; none changes which other samples are
seen."""

import io
import logging
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egom2p.config import load
from egom2p.data.loader import TokenStream
from egom2p.data.storage import DAMAGE, from_file
from egom2p.data.tarindex import INDEX_FILE, VERSION, index_tars, npy_bytes, parse_index, write_tar
from egom2p.data.tokens import TokenDataset, decode_tokens
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import Modality, ModalitySet
from egom2p.training.log import read_metrics
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT, run_cli
from tests.training.test_training import train

SHARD = "rgb/full/shard-000000.tar"


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def rewrite(path: Path, rows: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def replace_one(path: Path, data: bytes) -> None:
    rewrite(path, [(n, data if i == 3 else d) for i, (n, d) in enumerate(members(path))])


def claim(path: Path, size: int) -> None:
    """The third member's header says it is `size` bytes long, checksum and all."""
    rows, offset = members(path), 0
    for _, data in rows[:3]:
        offset += 512 + -(-len(data) // 512) * 512
    raw = bytearray(path.read_bytes())
    header = tarfile.TarInfo(rows[3][0])
    header.size = size
    raw[offset : offset + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(raw)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def header_at(path: Path, number: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


def join_halves(path: Path) -> None:
    """`cat a.tar b.tar`: tar's own end stands in the middle."""
    rows, halves = members(path), []
    for half in (rows[:7], rows[7:]):
        rewrite(path, half)
        halves.append(path.read_bytes())
    path.write_bytes(b"".join(halves))


def link_one(path: Path, target: str, kind: bytes) -> None:
    """Its fourth member is a link to `target` instead of a file."""
    rows = members(path)
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(rows):
            info = tarfile.TarInfo(name)
            if number == 3:
                info.type, info.linkname = kind, target
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if number != 3 else None)


def zeros_from(path: Path, number: int) -> None:
    """A copy into a file of the final size that broke off."""
    offset = header_at(path, number)
    size = offset + 100_000
    os.truncate(path, offset)
    os.truncate(path, size)


GRID = np.zeros((5, 4, 4), np.uint16)


def npy_file(descr: str, shape: str) -> bytes:
    """The header of a .npy file that claims so much."""
    fields = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + fields.ljust(117).encode() + b"\n"


DAMAGES = {  # what is done to the shard -> what `shards check` says of it
    "truncated tar": (lambda p: os.truncate(p, 5000), "truncated"),
    "damaged header": (lambda p: overwrite(p, header_at(p, 5) + 150, b"7"), "header at byte"),
    "zeros for a header": (lambda p: overwrite(p, header_at(p, 5), bytes(512)), "goes on behind its end"),
    "two tars joined": (join_halves, "goes on behind its end"),
    "zeros to the end": (lambda p: zeros_from(p, 5), "nothing but zeros"),
    "a link in the tar": (lambda p: link_one(p, "./elsewhere", tarfile.SYMTYPE), "a link"),
    "zero-byte tar": (lambda p: p.write_bytes(b""), "0 bytes"),
    "garbage": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(9000)), "not a readable tar"),
    "wrong shape": (lambda p: replace_one(p, npy_bytes(GRID[:4])), "shape"),
    "id beyond the vocabulary": (lambda p: replace_one(p, npy_bytes(GRID + 1000)), "token id 1000"),
    "float tokens": (lambda p: replace_one(p, npy_bytes(GRID.astype(np.float32))), "holds float32"),
    "duplicated key": (lambda p: rewrite(p, [*members(p), members(p)[2]]), "twice"),
    "key missing": (lambda p: rewrite(p, members(p)[:5] + members(p)[6:]),
                    "absent here while other modalities hold it"),
    "shard missing": (lambda p: p.unlink(), "whole shard missing"),
    "unreadable file": (lambda p: (p.unlink(), p.symlink_to("/nowhere/at/all")), "cannot be read"),
    "pickled array": (lambda p: replace_one(p, npy_file("'|O'", "(1,)") + b"\x80\x04."), "unreadable"),
    "absurd size": (lambda p: claim(p, 2**40), "truncated"),
    "npy that claims an absurd shape": (
        lambda p: replace_one(p, npy_file("'<u2'", "(99999999999, 99999999)")), "unreadable"),
}


@pytest.fixture
def config(debug_tokens):
    return load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [f"data.root={debug_tokens}"])


def seen(root: Path, count: int = 250) -> dict[int, tuple[str, dict[int, list[int]]] | str]:
    """What each global sample number shows: the clip and its tokens, or why it is left out."""
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [f"data.root={root}"])
    stream = TokenStream(config.data, ModalitySet.from_config(config.modalities), config.masking, 0)
    found = {}
    for number in range(count):
        dataset, element = stream.locate(number)
        data = stream.datasets[dataset]
        try:
            sample = data.read(element)
            found[number] = (f"{sample.dataset}/{sample.key}", {m: t.tolist() for m, t in sample.tokens.items()})
        except DamagedClip as error:
            found[number] = str(error)
    return found


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_harms_nothing_else(debug_tokens, tmp_path, caplog, name):
    damage, words = DAMAGES[name]
    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    for first in root.glob("*/full/shard-000000.tar"):
        rewrite(first.with_name("shard-000001.tar"), [(f"9{n}", d) for n, d in members(first)])
    before = seen(root)
    damage(root / SHARD)
    for index in root.rglob(INDEX_FILE):
        index.unlink()

    checked = run_cli("shards", "check", root, "--config", "cfgs/train/debug.yaml", check=False)
    assert checked.returncode == (0 if name == "key missing" else 1), checked.stdout
    assert any(words in line and SHARD in line for line in checked.stdout.splitlines()), checked.stdout

    after = seen(root)
    changed = 0
    for number, (clip, tokens) in before.items():
        if isinstance(after[number], str):
            assert SHARD in after[number]
            assert clip.split("/")[1] in after[number]
            changed += 1
            continue
        assert after[number][0] == clip, "another sample moved"
        assert all(after[number][1][m] == tokens[m] for m in after[number][1]), "another sample's tokens changed"
        changed += after[number][1].keys() != tokens.keys()
    assert changed or name == "duplicated key"

    caplog.set_level(logging.WARNING)
    caplog.clear()
    run_cli("train", "cfgs/train/debug.yaml", f"data.root={root}", f"run.dir={tmp_path / 'run'}", "train.steps=6",
            "eval.every=0", "data.max_damaged=0.5")
    assert len(read_metrics(tmp_path / "run")) == 6
    if name not in ("key missing", "shard missing"):
        assert SHARD in caplog.text, caplog.text


@pytest.mark.skipif("GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout,
                    reason="no GNU tar")
@pytest.mark.parametrize("options", [["-b", "20"], ["-b", "256"], ["-b", "2048"], ["-V", "label"], ["--format=pax"]])
def test_whole_tars_of_gnu_tar_are_whole(debug_tokens, tmp_path, options):
    for name, data in members(debug_tokens / SHARD)[:5]:
        (tmp_path / name).write_bytes(data)
    names = sorted(p.name for p in tmp_path.glob("*.npy"))
    subprocess.run(["tar", *options, "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    entry = index_tars([tmp_path / "a.tar"])[0]
    assert not entry.damage and len(entry.keys) == 5


@pytest.mark.skipif("GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout,
                    reason="no GNU tar")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_not_read_as_if_they_were_whole(tmp_path, form):
    """Their holes are not in the tar, so what lies there is of other places of the file."""
    with (tmp_path / "a.npy").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
    (tmp_path / "b.npy").write_bytes(b"y" * 5000)
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", "a.tar", "a.npy", "b.npy"], cwd=tmp_path, check=True)
    entry = index_tars([tmp_path / "a.tar"])[0]
    assert "as a sparse file; write the tar without -S" in entry.damage and entry.keys == ["b"]


def test_what_macos_notes_of_files_is_no_clip(debug_tokens, tmp_path):
    rows = members(debug_tokens / SHARD)[:4]
    rewrite(tmp_path / "a.tar", [(prefix + name, b"Mac OS X" if prefix else data) for name, data in rows
                                 for prefix in ("._", "")])
    entry = index_tars([tmp_path / "a.tar"])[0]
    assert len(entry.keys) == 4 and not entry.damage


def test_a_header_that_numpy_cannot_split_is_damage(tmp_path):
    with pytest.raises(DAMAGE):
        from_file("npy", npy_file("'<f4'", "(3,)").replace(b"}", b"("))


def test_a_hard_link_is_the_file_it_names(debug_tokens, tmp_path):
    """As GNU tar stores the second name of a file."""
    path = tmp_path / "rgb/full/shard-000000.tar"
    path.parent.mkdir(parents=True)
    shutil.copy(debug_tokens / SHARD, path)
    rows = members(path)
    link_one(path, rows[1][0], tarfile.LNKTYPE)
    entry = index_tars([path])[0]
    assert not entry.damage
    assert len(entry.keys) == len(rows)
    assert (entry.offsets[3], entry.sizes[3]) == (entry.offsets[1], entry.sizes[1])


def test_a_shard_that_changes_while_training_is_noticed(debug_tokens, tmp_path, caplog):
    """Rewritten in place under an open run, another clip's tokens never pass for the one asked for."""
    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [f"data.root={root}"])
    dataset = TokenDataset.open(root, "full", "", ModalitySet.from_config(config.modalities))
    dataset.read(2)
    data = (root / SHARD).read_bytes()
    with (root / SHARD).open("r+b") as file:
        file.write(data[::-1][: len(data) // 2])
    with pytest.raises(DamagedClip, match="changed since it was indexed"):
        dataset.read(2)


def test_a_modality_that_is_gone_altogether_is_refused_on_resume(debug_tokens, tmp_path):
    root, run = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(debug_tokens, root)
    train(root, run, "train.steps=5", "eval.every=0", "checkpoint.every=2")
    shutil.rmtree(root / "gaze/full")
    done = train(root, run, "train.steps=6", "eval.every=0", check=False)
    assert done.returncode == 2
    assert "the data changed" in done.stderr


def _tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(4):
            data = npy_bytes(GRID + i)
            info = tarfile.TarInfo(f"k{i}.npy")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


WHOLE = _tar_bytes()
MODALITY = Modality("m", 1000, (5, 4, 4))
MODEST = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def mutated(draw, data: bytes = WHOLE) -> bytes:
    """A valid file with bytes changed, cut out or put in."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "number"]))
        if kind == "set":
            out[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del out[at : at + draw(st.integers(1, 700))]
        elif kind == "insert":
            out[at:at] = draw(st.binary(max_size=40))
        else:
            out[at : at + 8] = struct.pack("<q", draw(st.integers(-(2**63), 2**63 - 1)))
    return bytes(out)


@pytest.mark.slow
@MODEST
@given(data=st.one_of(st.binary(max_size=4000), mutated()))
def test_fuzz_index_reader(tmp_path_factory, data):
    """Any bytes: an entry whose members lie inside the file, or a damage in words; never an exception."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "shard-000000.tar"
    path.write_bytes(data)
    entry = index_tars([path])[0]
    assert ((entry.offsets >= 0) & (entry.sizes >= 0) & (entry.offsets + entry.sizes <= len(data))).all()
    again = index_tars([path])[0]
    assert (again.keys, again.damage) == (entry.keys, entry.damage)
    for number in range(len(entry.keys)):
        piece = data[entry.offsets[number] : entry.offsets[number] + entry.sizes[number]]
        _decode(piece)


def _decode(data: bytes) -> None:
    """Ids inside the vocabulary, or one of the errors that TokenDataset.read turns into DamagedClip."""
    modalities = ModalitySet([MODALITY])
    dataset = TokenDataset.__new__(TokenDataset)
    dataset.name, dataset.modalities, dataset.keys = "d", modalities, ["k"]
    dataset.paths, dataset.stamps = [Path("x")], [(-1, 0)]
    dataset._file, dataset._offset = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int64)
    dataset._size = np.full((1, 1), len(data))
    import egom2p.data.tokens as tokens

    kept, tokens.read_at = tokens.read_at, lambda *_: data
    try:
        ids = dataset.read(0).tokens[0]
        assert ids.shape == (80,)
        assert ids.min() >= -1
        assert ids.max() < 1000
    except DamagedClip:
        pass
    finally:
        tokens.read_at = kept


def _npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, GRID.astype(np.int32))
    return buffer.getvalue()


@pytest.mark.slow
@MODEST
@given(data=st.one_of(st.binary(max_size=400), mutated(npy_bytes(GRID)), mutated(_npz_bytes())))
def test_fuzz_token_decoder(data):
    _decode(data)


@pytest.mark.parametrize("fault", ["no array", "patched", "method", "version"])
def test_npz_files_that_zipfile_or_numpy_do_not_take(fault):
    """Found by the test above: a member that is no array, and what zipfile refuses with NotImplementedError."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(*(("arr_0", b"text") if fault == "no array" else ("arr_0.npy", npy_bytes(GRID))))
    data = bytearray(buffer.getvalue())
    central = data.index(b"PK\x01\x02")
    if fault == "patched":
        data[central + 8] |= 0x20
    elif fault == "method":
        data[central + 10] = 9
    elif fault == "version":
        data[central + 6] = 200
    with pytest.raises(ValueError, match="npz file"):
        decode_tokens(bytes(data), MODALITY)


INDEX_WORDS = ["version", "shards", "a.tar", "size", "mtime_ns", "keys", "suffixes", "offsets", "sizes", "damage"]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.sampled_from(INDEX_WORDS), inner, max_size=7), max_leaves=20)


@pytest.mark.slow
@MODEST
@given(tree=JSON)
def test_fuzz_index_file(tree):
    assert isinstance(parse_index(tree), dict)
    parse_index({"version": VERSION, "shards": tree})
    parse_index({"version": VERSION, "shards": {"a": tree}})


@pytest.mark.slow
@MODEST
@given(text=st.one_of(st.text(max_size=200), mutated((ROOT / "cfgs/train/debug.yaml").read_bytes())),
       override=st.text(max_size=30))
def test_fuzz_config_loader(tmp_path_factory, text, override):
    """Any text: a configuration or one line for the user."""
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for given_path, overrides in ((path, []), (ROOT / "cfgs/train/debug.yaml", [override])):
        try:
            load(PretrainConfig, given_path, overrides)
        except UserError as error:
            assert "\n" not in str(error)


def test_the_decoder_refuses_what_the_fuzzer_found():
    """Kept examples: headers that are no headers."""
    for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x00\x00", b"PK\x03\x04",
                 b"\x93NUMPY\x01\x00v\x00" + b"[" * 117 + b"\n"):
        with pytest.raises((ValueError, OSError, KeyError, EOFError, SyntaxError, TypeError, MemoryError,
                            zipfile.BadZipFile)):
            decode_tokens(data, MODALITY)


@pytest.mark.parametrize(("share", "code"), [("0.01", 2), ("0", 2), ("0.95", 0)])
def test_a_damaged_shard_ends_the_run_beyond_the_stated_share(debug_tokens, tmp_path, caplog, share, code):
    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    os.truncate(root / SHARD, 5000)
    done = run_cli("train", "cfgs/train/debug.yaml", f"data.root={root}", f"run.dir={tmp_path / 'run'}",
                   "train.steps=2", "eval.every=0", "optim.warmup_steps=0", f"data.max_damaged={share}", check=False)
    assert done.returncode == code, done.stderr
    said = done.stderr if code else caplog.text
    assert re.search(r"\d\d of \d+ clips lack a modality whose shard is damaged", said), said


def test_no_damage_at_all_is_a_share_too(debug_tokens, tmp_path):
    """Ten unreadable clips are let pass, but not where none is wanted."""
    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    replace_one(root / SHARD, npy_bytes(GRID[:4]))
    command = ("train", "cfgs/train/debug.yaml", f"data.root={root}", "train.steps=12", "eval.every=0")
    run_cli(*command, f"run.dir={tmp_path / 'one'}")
    done = run_cli(*command, f"run.dir={tmp_path / 'two'}", "data.max_damaged=0", check=False)
    assert done.returncode == 2 and "more than data.max_damaged=0" in done.stderr


@pytest.mark.parametrize(("name", "data"), [
    ("json", b"[]"), ("json", b"{"), ("cam.npy", npy_file("'<f4'", "(6000000000000, 4)")),
    ("cam.npy", b"PK\x03\x04" + b"x" * 40), ("cam.npy", b""), ("rgb.mp4", b"no film")])
def test_any_damage_of_a_clip_is_a_damaged_clip(tmp_path, caplog, name, data):
    from egom2p.data.clips import ClipIndex, read_clips

    good = npy_bytes(np.zeros((60, 4, 4), np.float32))
    write_tar(tmp_path / "a.tar", [{"__key__": "good", "cam.npy": good}, {"__key__": "bad", **{name: data}}])
    with pytest.raises(DamagedClip, match="clip bad is damaged"):
        ClipIndex(str(tmp_path / "a.tar")).read(1)
    assert [clip.key for clip in read_clips(str(tmp_path / "a.tar"))] == ["good"]
    assert "clip bad" in caplog.text


def test_what_clips_lack_anyway_is_not_lost_to_damage(tmp_path, rng):
    """Of a modality that two clips in five have, and of damage that costs nothing, no more counts than is likely."""
    pair = ModalitySet([Modality("a", 50, (8,)), Modality("b", 50, (8,))])
    for shard in range(4):
        keys = [f"{shard}{i:02d}" for i in range(50)]
        for name, held in (("a", keys), ("b", keys[::5] + keys[2::5])):
            arrays = ((k, npy_bytes(rng.integers(0, 50, 8).astype(np.uint16))) for k in sorted(held))
            write_tar(tmp_path / f"{name}/set/shard-00000{shard}.tar", ({"__key__": k, "npy": d} for k, d in arrays))
    assert TokenDataset.open(tmp_path, "set", "", pair).lost == 0
    whole = tmp_path / "b/set/shard-000000.tar"
    os.truncate(whole, header_at(whole, 19) + 100)  # its last clip
    assert TokenDataset.open(tmp_path, "set", "", pair).lost == 1
    path = tmp_path / "a/set/shard-000001.tar"
    rewrite(path, [*members(path), members(path)[2]])  # held twice, none lost
    assert TokenDataset.open(tmp_path, "set", "", pair).lost == 1
    os.truncate(tmp_path / "a/set/shard-000002.tar", 0)
    assert TokenDataset.open(tmp_path, "set", "", pair).lost == 1 + 20  # of those that b still names
