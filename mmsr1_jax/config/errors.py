"""Base class of errors that are the user's to fix, and that a command shows as one line."""


class UserError(ValueError):
    """An invalid setting, file, or service, with a message that says what to change.

    `cli.run` prints the message in one line and exits with code 1. Every other exception is a bug
    or a fault of the machine, and keeps its traceback.
    """
