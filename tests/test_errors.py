"""What the file system refuses is one line and exit code 2; a bug keeps its traceback."""

import errno

import pytest

from egom2p.errors import refusal
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
