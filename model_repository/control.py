"""Control of a server: load and unload its models, behind a key.

Whoever may load a model may run code, since a request can bring a model's files with it. So every server that this
project starts or describes opens only health, metadata and inference; the other protocols ask for the control key.
This module needs no client library, so that it runs in the server's container too.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from model_repository.schema import CLIENT_HEADER, DRAIN_SECONDS, MODEL
from runtime.errors import InputError, ServiceError, one_line

CONTROL_HEADER = "latte-flow-control"
"""Header with the key in HTTP requests."""
GRPC_CONTROL_HEADER = f"triton-grpc-protocol-{CONTROL_HEADER}"
"""Triton's name of that header in gRPC requests."""
RESTRICTED = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
"""Triton's protocols that ask for the key; health, metadata and inference do not."""
LOAD_SECONDS = 600.0
ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05
MIN_KEY_CHARACTERS = 16


def server_options(models: Path | str, key: str) -> list[str]:
    """Returns the options of `tritonserver` for a repository; its control protocols ask for the key."""
    restricted = f"{','.join(RESTRICTED)}:{CONTROL_HEADER}={key}"
    return [
        f"--model-repository={models}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
        *(f"--{protocol}-header-forward-pattern=(?i){CLIENT_HEADER}" for protocol in ("http", "grpc")),
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
    ]


def write_key(path: Path) -> str:
    """Writes a new random key to a new file that only its owner can read; returns the key."""
    key = secrets.token_hex(32)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{key}\n")
    return key


def read_key(path: Path) -> str:
    """Returns the key in a file.

    Raises:
        InputError: the file cannot be read, or holds no key.
    """
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the control key in {path}: {one_line(error)}") from error
    if len(key) < MIN_KEY_CHARACTERS or not key.isalnum():
        raise InputError(
            f"{path} holds no control key: expected one line of at least {MIN_KEY_CHARACTERS} letters and digits; "
            "make one with: openssl rand -hex 32"
        )
    return key


class Control:
    """The control protocol of one server.

    Example:
        >>> Control("localhost:8000", read_key(Path("control.key"))).load()
    """

    def __init__(self, http_url: str, key: str) -> None:
        self.http_url = http_url
        self._key = key

    def load(self, model: str = MODEL, seconds: float = LOAD_SECONDS) -> None:
        """Loads what the repository contains now; the old model serves until the new one is warm.

        Raises:
            ServiceError: the model cannot be loaded, and the old one stays; or the server did not do it in time.
        """
        self._post(f"/v2/repository/models/{model}/load", seconds)

    def unload(self, model: str = MODEL, seconds: float = DRAIN_SECONDS) -> None:
        """Lets the model refuse new requests and finish those in flight; returns before they are finished."""
        self._post(f"/v2/repository/models/{model}/unload", seconds)

    def is_ready(self, model: str = MODEL, seconds: float = ANSWER_SECONDS) -> bool:
        """Returns whether the server calls a model ready; a server that does not answer calls none so."""
        try:
            index: list[dict[str, str]] = self._post("/v2/repository/index", seconds)
        except ServiceError:
            return False
        return any(entry["name"] == model and entry.get("state") == "READY" for entry in index)

    def is_unloaded(self, model: str = MODEL, seconds: float = DRAIN_SECONDS) -> bool:
        """Returns whether the model has finished all its requests and is gone."""
        index: list[dict[str, str]] = self._post("/v2/repository/index", seconds)
        entries = [entry for entry in index if entry["name"] == model and "state" in entry]
        return all(entry.get("reason") == "unloaded" for entry in entries)

    def drain(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Unloads the model and waits until its requests are finished; returns whether they are.

        Raises:
            ServiceError: the server does not answer, or refuses the key.
        """
        give_up = time.monotonic() + seconds
        self.unload(seconds=seconds)
        while not self.is_unloaded(seconds=max(give_up - time.monotonic(), 1.0)):
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _post(self, path: str, seconds: float) -> Any:
        connection = HTTPConnection(self.http_url, timeout=seconds)
        try:
            connection.request("POST", path, b"{}", {CONTROL_HEADER: self._key})
            response = connection.getresponse()
            status, body = response.status, response.read()
        except (OSError, HTTPException) as error:
            raise ServiceError(f"{self.http_url} does not answer: {one_line(error)}") from error
        finally:
            connection.close()
        if status == 403:
            raise ServiceError(f"{self.http_url} refuses the control key; name the file that this server was given")
        try:
            content = json.loads(body or b"null")
        except ValueError:
            content = None
        if status != 200:
            reason = content.get("error") if isinstance(content, dict) else None
            raise ServiceError(f"{self.http_url} answered {status}: {one_line(Exception(reason or 'no reason given'))}")
        return content
