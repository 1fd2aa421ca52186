"""Errors for the user. Each is one line that says where, what is wrong, and what to do.

The command line prints the message and exits with the error's `exit_code`: 2 for invalid input
(options, corpus, another folder), 1 for a run that failed (disk, damaged file).
"""


class LogitshardsError(Exception):
    """Base of every error that is meant for the user rather than for a programmer."""

    exit_code = 2


class InputError(LogitshardsError):
    """An option, a corpus, a model or a folder that cannot be used."""


class RunError(LogitshardsError):
    """A run that started properly and then failed: disk full, an engine that stopped."""

    exit_code = 1


class StoppedError(LogitshardsError):
    """A run that a signal ended. What is on disk is kept."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports it


class FailedElsewhereError(LogitshardsError):
    """Another process of this run failed, and prints why: nothing more is to be said here."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ShardError(LogitshardsError):
    """Base of the errors about a dataset of shards."""


class ShardFormatError(ShardError):
    """Not a dataset or shard of a format version that this release reads."""


class ShardCorruptError(ShardError):
    """A file that is damaged, truncated, or not the one that its sidecar describes."""

    exit_code = 1


class IdentityMismatchError(ShardError):
    """The folder holds another dataset than the command asks for."""


def one_line(error: BaseException) -> str:
    """The message of another library's exception on one line; its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of another library's exception; its class if it has no message.

    For an error in compiled code, the first line of its cause (torch's `inner_exception`).
    """
    try:
        lines = str(getattr(error, "inner_exception", error)).splitlines()
    except Exception:  # a broken __str__ must not hide the error
        lines = []
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)
