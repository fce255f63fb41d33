"""Every error that a user can cause.

    LatteFlowError
    ├── InputError         an argument that cannot work: a prompt, a number, an output folder
    ├── BundleError        a bundle that is missing, incomplete, altered, or not for this reader
    ├── CheckpointError    the same of a checkpoint
    ├── MissingExtraError  a part of the toolkit that is not installed
    ├── VerificationError  engines that do not compute what PyTorch computes
    ├── EngineError        an engine that failed to load or to run
    └── ServiceError       a service that did not do what was asked, though it could have been
        ├── QueueFullError    no place now
        ├── DrainingError     it is shutting down
        ├── DeadlineError     not in time
        └── CancelledError    the client did not want it any more

Each message is one line that says what came, what was expected and what to do; the command line
prints it and exits with the class's `exit_code`.
"""

from __future__ import annotations


class LatteFlowError(Exception):
    """The base that callers catch."""

    exit_code = 2


class InputError(LatteFlowError, ValueError):
    """An argument that cannot work."""


class BundleError(LatteFlowError):
    """A bundle that cannot be used."""


class CheckpointError(LatteFlowError):
    """A checkpoint that cannot be used."""


class MissingExtraError(LatteFlowError):
    """An optional part that is not installed."""


class VerificationError(LatteFlowError):
    """Engines that do not compute what the reference computes."""

    exit_code = 1


class EngineError(LatteFlowError):
    """An engine that failed to load or to run."""

    exit_code = 1


class ServiceError(LatteFlowError):
    """A service that did not do what was asked."""

    exit_code = 1


class QueueFullError(ServiceError):
    """No place now; the same request may be sent again."""


class DrainingError(ServiceError):
    """The service is shutting down; the same request may be sent to another one."""


class DeadlineError(ServiceError):
    """Not done in time."""


class CancelledError(ServiceError):
    """The client did not want it any more."""


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks, or the error's class where there is none."""
    return " ".join(str(error).split()) or type(error).__name__
