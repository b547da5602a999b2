"""The one exception a user's mistake raises."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the fix; the CLI prints it and exits 2."""
