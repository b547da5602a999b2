"""One process at a time: in a run's folder, at a shard, at a note that several write.

A lock is a file that names the host and process that holds it; its modification time is a heartbeat. One whose process
is gone (same host, same numbering of processes) or whose heart has stopped for STALE_S (elsewhere) is taken over. Locks
of the file system itself are not used: on the network disks of clusters they work on some and silently do nothing on
others.
"""

import errno
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from egom2p.errors import UserError

log = logging.getLogger(__name__)

LOCK = "lock.json"
BEAT_S = 5.0
STALE_S = 30.0
POLL_S = 0.05


class FileLock:
    """The lock `path`: `take` says at once whether one has it now, `release` gives it back; `with` waits for it."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, uuid.uuid4().hex
        self.stopped, self.lost = threading.Event(), False

    def __enter__(self) -> "FileLock":
        while not self.take():
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Have the lock, unless somebody holds it who is alive, or may be for all that is known yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create():
            holder = self._holder()
            if self._alive(holder):
                return False
            self._remove(holder)
            if not self._create():
                return False
        self.stopped.clear()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
        return True

    def release(self) -> None:
        self.stopped.set()
        if self._holder().get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _alive(self, holder: dict[str, Any]) -> bool:
        if _is_here(holder):
            return is_running(holder.get("pid"), holder.get("born"))
        return self._silence() < STALE_S

    def _remove(self, holder: dict[str, Any]) -> None:
        """Remove the lock of a holder that is gone, unless it has changed hands meanwhile."""
        if self._holder() == holder:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock file, whole from the first moment, unless there is one."""
        holder = {"token": self.token, "host": socket.gethostname(), "space": _space(), "pid": os.getpid(),
                  "born": process_start(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        aside = self.path.with_name(f".{self.path.name}.{self.token}")
        try:
            aside.write_text(json.dumps(holder))
            try:
                os.link(aside, self.path)
            except OSError as error:  # disks without hard links
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                with self.path.open("x") as file:
                    file.write(json.dumps(holder))
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free space or choose another "
                            f"folder") from error
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self.path.read_text())
            return holder if isinstance(holder, dict) else {}
        except (OSError, ValueError):
            return {}

    def _modified(self) -> float:
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def _silence(self) -> float:
        """Seconds since the last heartbeat, by the file server's clock."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.") as probe:
            return os.stat(probe.name).st_mtime - self._modified()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT_S):
            if self._holder().get("token", self.token) != self.token:
                self.lost = True
                return
            try:
                os.utime(self.path)
            except OSError as error:
                log.warning("%s: no heartbeat (%s)", self.path, error.strerror)


class RunLock(FileLock):
    """Holds a run's folder, by `RUN/lock.json`, from `with` to its end. Raises UserError when another living process
    holds it.

    A lock from another host whose process may have died with its machine is waited for until it is stale.
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        super().__init__(folder / LOCK)
        self.active = active

    def __enter__(self) -> "RunLock":
        while self.active and not self.take():
            self._make_way()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.release()

    def check(self) -> None:
        """Raises UserError when another process has taken the folder, for instance while this one was suspended."""
        if self.lost:
            raise UserError(f"{self.path}: another process has taken over this run; this one stops")

    def _make_way(self) -> None:
        """Wait until it is sure that whoever holds the lock is gone. Raises UserError when somebody is alive."""
        holder, silent = self._holder(), self._silence()
        where = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        if _is_here(holder):
            if self._alive(holder):
                raise UserError(f"{self.path.parent} is in use by {where}; stop that one first, or choose another "
                                f"run.dir")
        elif silent < STALE_S:
            log.info("%s was in use by %s; waiting until it is sure that this one is gone", self.path.parent, where)
            if self._still_beats(STALE_S + BEAT_S - silent):
                raise UserError(f"{self.path.parent} is in use by {where}, and it is alive; stop that one first, or "
                                f"choose another run.dir")

    def _remove(self, holder: dict[str, Any]) -> None:
        if holder:
            log.warning("%s was left by process %s on %s, since %s, which is gone; taking over", self.path,
                        holder.get("pid"), holder.get("host"), holder.get("since"))
        super()._remove(holder)

    def _still_beats(self, seconds: float) -> bool:
        """Whether the holder gives a sign of life within so many seconds."""
        before, until = self._modified(), time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(BEAT_S / 2, seconds))
            now = self._modified()
            if now != before:
                return now != 0.0
        return False


def _space() -> str:
    """Which numbering of processes this one lives in: containers of one host name may have one each."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process number means anything here; else it is judged by its heartbeat."""
    return holder.get("host") == socket.gethostname() and holder.get("space", _space()) == _space()


def is_running(pid: Any, born: Any) -> bool:
    """Whether that process of this machine is alive, and not another one that got its number since."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's; /proc may hide what it is (hidepid)
        if process_start(pid) == "":
            return True
    start = process_start(pid)
    return start != "" and start == born if born else True


def process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" for one that has ended (a zombie, too) or where /proc is
    not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
