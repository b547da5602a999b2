"""`python -m egom2p` and its like as forks of one process that has imported everything: a start takes milliseconds,
where a new interpreter takes seconds of a core to import torch. What runs is the module, in a process of its own.

The zygote itself never computes, so that a fork of it is as good as new (torch's threads do not live through a fork).
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forked:
    """What tests use of a `subprocess.Popen`; what it prints is in the file `output`."""

    def __init__(self, pid: int, output: Path, status: Path) -> None:
        self.pid, self.output, self.status = pid, output, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.status.exists():
            self.returncode = int(self.status.read_text())
            self.status.unlink()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.output.read_text())
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, None]:
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class Zygote:
    """environment: of it and of what it starts, beside this process's own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.started = folder, 0
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as scripts/test.sh has them
        self.environment = {**threads, "TQDM_MININTERVAL": "10", **environment}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.zygote"], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, **self.environment})

    def start(self, *args: object, module: str = "egom2p", output: Path | None = None, errors: Path | None = None,
              **environment: str) -> Forked:
        """`python -m module ARGS` in a fork, whose environment is this process's now, and `environment`. Both streams
        go to the file `output`, or stderr to `errors`."""
        self.started += 1
        output, status = output or self.folder / f"{self.started}.out", self.folder / f"{self.started}.status"
        for path in filter(None, (output, errors)):
            path.write_text("")
        job = {"module": module, "args": [str(a) for a in args], "output": str(output), "status": str(status),
               "errors": str(errors or output),
               "environment": {**os.environ, **self.environment, **environment}}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Forked(int(self.process.stdout.readline()), output, status)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _keep(job: dict) -> None:
    """Run one job in a fork and leave how it ended, as `Popen.returncode` says it, in a file."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _live(job)
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    part = Path(job["status"] + ".part")
    part.write_text(str(code))
    part.rename(job["status"])
    os._exit(0)


def _live(job: dict) -> None:
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, job["output"], os.O_WRONLY | os.O_APPEND),
                                (2, job["errors"], os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(path, flags), number)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv[:] = [job["module"], *job["args"]]
    code = 0
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch._dynamo  # noqa: F401 (a training's optimiser imports it)

    import egom2p.cli
    import egom2p.evaluation.run
    import egom2p.generation.recordings
    import egom2p.tokenizers.encode
    import egom2p.training.pretraining
    import egom2p.training.tokenizer_training  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    for line in sys.stdin:
        if os.fork() == 0:
            _keep(json.loads(line))


if __name__ == "__main__":
    _serve()
