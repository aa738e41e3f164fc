"""The one error type that users are meant to read."""


class UserError(ValueError):
    """Something the user can mend. The message names the place and the remedy; the CLI prints it without a traceback."""
