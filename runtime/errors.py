"""The errors that a user can cause.

    LatteFlowError
    ├── InputError         an argument that cannot work: a prompt, a number, an output folder
    ├── BundleError        a bundle that is missing, incomplete, altered, or of another version
    ├── CheckpointError    a checkpoint that is missing, incomplete, or does not fit together
    ├── TrainingError      a training run that cannot go on
    ├── MissingExtraError  an optional part of latte-flow that is not installed
    ├── VerificationError  engines that do not compute what PyTorch computes
    ├── EngineError        an engine that failed to load or to run
    └── ServiceError       a service that did not do what was asked, although the request was valid
        ├── QueueFullError    there is no room for the request now
        ├── DrainingError     the service is shutting down
        ├── DeadlineError     the request's deadline passed
        └── CancelledError    the client cancelled the request

Each message is one line that says what came, what was expected and what to do. The command line prints
it and exits with the class's `exit_code`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OUR_PACKAGES = ("runtime", "latte", "export", "model_repository")
DRAINING = "the service is shutting down"
"""Begins the message of a `DrainingError`. A client knows the error by it, since Triton has no code for it."""
TRY_AGAIN = "try again in"
"""Begins the end of the message of a `QueueFullError`, "try again in N s"; a client knows the error by it."""


class LatteFlowError(Exception):
    """The base class of all errors that a user can cause."""

    exit_code = 2


class InputError(LatteFlowError, ValueError):
    """An argument that cannot work."""


class BundleError(LatteFlowError):
    """A bundle that cannot be used."""


class CheckpointError(LatteFlowError):
    """A checkpoint that cannot be used."""


class TrainingError(LatteFlowError):
    """A training run that cannot go on."""

    exit_code = 1


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
    """There is no room for the request now; the same request may be sent again later."""

    @property
    def retry_after(self) -> int:
        """Seconds after which to send it again, which the message names; 0 if it names none."""
        found = re.search(rf"{TRY_AGAIN} (\d+) s$", str(self))
        return int(found[1]) if found else 0


class DrainingError(ServiceError):
    """The service is shutting down; the same request may be sent to another one."""


class DeadlineError(ServiceError):
    """The request was not finished before its deadline."""


class CancelledError(ServiceError):
    """The client cancelled the request."""


def missing_extra(command: str, error: ModuleNotFoundError, extras: str) -> MissingExtraError:
    """Returns the error of a command that lacks a package.

    Args:
        extras: what installs it, such as "export,cpu".

    Raises:
        ModuleNotFoundError: the missing module is of this package, which no extra installs.
    """
    if (error.name or "").partition(".")[0] in OUR_PACKAGES:
        raise error
    return MissingExtraError(
        f'`latte-flow {command}` needs {error.name}, which is not installed; run: pip install "latte-flow[{extras}]"'
    )


def one_line(error: BaseException) -> str:
    """Returns an exception's message without line breaks, or its class name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def line_of(fault: Mapping[str, Any], whole: str = "") -> str:
    """Returns one of pydantic's errors in one line: where it is, and what it is.

    Args:
        whole: what to call the place of an error that is in no field.
    """
    place = ".".join(str(part) for part in fault["loc"]) or whole
    return (f"{place}: {fault['msg']}" if place else str(fault["msg"])).replace("Value error, ", "")
