"""The exceptions the command line turns into an exit code."""


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
