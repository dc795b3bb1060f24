"""Base class of errors that are the user's to fix, and that a command shows as one line."""

from typing import ClassVar

REFUSED = 2  # exit code by the convention of Unix
_WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UserError(ValueError):
    """An invalid setting, file, or service, with a message that says what to change.

    `cli.run` prints the message in one line. Every other exception is a bug or a fault of the
    machine, and keeps its traceback.

    Attributes:
      exit_code: Exit code of the command (see `exit_code`).
    """

    exit_code: ClassVar[int] = REFUSED


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that an exception ends.

    It is 2 if the same command would fail again: an invalid setting, or a file that does not exist.
    The scripts in `launch/` restart a command that ends with 1, not one that ends with 2.
    """
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, _WRONG_PATH) and error.filename is not None:
        return REFUSED
    return 1
