"""Errors that a user can mend: shown as one line, without a traceback, with exit status 2."""


class UserError(ValueError):
    """A mistake in a config, a file or a data set; the message names the key, the value and what is accepted."""


class CheckpointError(UserError):
    """A saved state that is missing, damaged, or of another network."""


class DataError(UserError):
    """A data set that is not prepared, is damaged, or does not have the expected content."""


class NonFiniteLossError(UserError):
    """Training stopped because the loss was NaN or infinite."""


class Interrupted(Exception):
    """A run was asked to stop; its state is saved.

    Attributes:
      signal_number: which signal asked.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def one_line(error: BaseException) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
