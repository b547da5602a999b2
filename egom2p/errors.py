"""The exceptions the command line turns into an exit code."""

import errno

# What a path given by the user runs into: no rights, a file for a folder, a full or read-only disk, too long a name.
OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EROFS,
                 errno.EDQUOT, errno.ENAMETOOLONG)


def refusal(error: BaseException) -> str:
    """One line about an error of the file system that the user can mend; "" for any other."""
    if not isinstance(error, OSError) or error.errno not in OF_THE_SYSTEM:
        return ""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the fix; the CLI prints it and exits 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DamagedClip(UserError):
    """A clip, or a signal of it, cannot be used; the message names file, key and cause. Readers of many clips go on
    without it."""


class Preempted(Exception):
    """The run was asked to stop, saved a checkpoint and can go on from it. The CLI exits with EXIT_CODE."""

    EXIT_CODE = 75  # EX_TEMPFAIL: try again later
