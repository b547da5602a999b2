"""What the file system refuses is one line and exit code 2; a bug keeps its traceback."""

import errno

import pytest

from egom2p.datasets.recording import stamp_of
from egom2p.errors import UserError, refusal
from egom2p.generation import recordings
from egom2p.probe import _read_labels
from tests.conftest import run_cli


def test_refusals_of_the_file_system():
    assert refusal(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert refusal(PermissionError(errno.EACCES, "Permission denied", "/x")) == "/x: Permission denied"
    assert not refusal(FileNotFoundError(errno.ENOENT, "No such file", "/x")) and not refusal(ValueError("x"))


@pytest.mark.parametrize(("error", "code"), [(OSError(errno.ENOSPC, "No space left on device"), 2),
                                             (FileNotFoundError(errno.ENOENT, "No such file", "/x"), None)])
def test_a_command_that_meets_one(monkeypatch, error, code):
    def raises(*given: object) -> None:
        raise error

    monkeypatch.setattr("egom2p.resources.configs", raises)
    if code is None:
        with pytest.raises(FileNotFoundError):
            run_cli("configs", check=False)
        return
    done = run_cli("configs", check=False)
    assert done.returncode == code and done.stderr == "egom2p: No space left on device\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (("trian", "x"), "did you mean 'train'?"), (("world", "--clips", "x"), "invalid int value: 'x'"),
    (("shards", "chekc", "x"), "did you mean 'check'?"), (("train",), "required"), (("view", "x", "--nope"), "--nope")])
def test_a_mistaken_command_line_is_one_line(arguments, words, capsys):
    from egom2p.cli import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("egom2p: ") and said.count("\n") == 1 and words in said and "--help" in said


def test_what_is_there_already_is_not_written_over(debug_tokens, tmp_path):
    """Tokens with a tokenizer's note, an export in the place of a run, a run in the place of an export."""
    noted = tmp_path / "noted/cam/full"
    noted.mkdir(parents=True)
    (noted / "encode.json").write_text("{}")
    for words in (("shards", "random", "cfgs/train/debug.yaml", "--count", 2),
                  ("shards", "convert", f"{debug_tokens}/cam/full/*.tar")):
        done = run_cli(*words, "--out", tmp_path / "noted", check=False)
        assert done.returncode == 2 and "that `tokenizer encode` made" in done.stderr, done.stderr
    assert not list((tmp_path / "noted").rglob("cam/full/*.tar"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    done = run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/export",
                   check=False)
    assert done.returncode == 2 and "holds an export" in done.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("{}")
    done = run_cli("import-released", tmp_path / "x.pth", "--out", tmp_path / "run", check=False)
    assert done.returncode == 2 and "holds a run" in done.stderr


def test_a_viewer_needs_a_display_and_a_quickstart_its_recordings(tmp_path, monkeypatch, world_clips):
    pytest.importorskip("rerun", reason="rerun is not installed")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    done = run_cli("view", world_clips, check=False)
    assert done.returncode == 2 and "no display" in done.stderr
    done = run_cli("quickstart", "--out", tmp_path / "q", "--recordings", tmp_path / "nowhere", check=False)
    assert done.returncode == 2 and "no folder" in done.stderr and not (tmp_path / "q").exists()


def test_labels_as_other_programs_write_them(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("key,label\na,1.5\nb,NA\nc,nan\nd,2\n")
    assert _read_labels(path)[0] == {"a": "1.5", "d": "2"}
    path.write_bytes("key,label\na,K\u00fcche\n".encode("latin-1"))
    with pytest.raises(UserError, match="is no UTF-8"):
        _read_labels(path)


def test_an_input_that_may_not_be_read_leaves_the_others(monkeypatch, tmp_path):
    def one(pipeline, path, folder, args):
        if path.name == "b.mp4":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return folder

    monkeypatch.setattr(recordings, "_generate_file", one)
    inputs = [tmp_path / f"{name}.mp4" for name in "abc"]
    folders, failed = recordings.generate_files(None, inputs, tmp_path / "out", None)
    assert [f.name for f in folders] == ["a", "c"] and "Permission denied" in failed[inputs[1]]
    stamp_of([tmp_path / "caf\udce9.mp4"])
