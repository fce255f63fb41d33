"""Control of a server: load and unload its models, behind a key.

Whoever may load a model may run code, since a request can bring a model's files with it. So every server that this
project starts or describes opens only health, metadata and inference; the other protocols ask for the control key.
This module needs no client library, so that it runs in the server's container too.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from model_repository.schema import CLIENT_HEADER, DRAIN_SECONDS, MODEL, engine_model
from model_repository.transport import is_loopback, tls_context
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
    """Writes a new random key to a new file that only its owner can read; returns the key.

    Raises:
        InputError: the file cannot be written, or is there already.
    """
    key = secrets.token_hex(32)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{key}\n")
    except OSError as error:
        raise InputError(f"cannot write the control key to {path}: {error.strerror}; choose another file") from error
    return key


def read_key(path: Path) -> str:
    """Returns the key in a file.

    A group may read it: so a pod's user reads a Secret.

    Raises:
        InputError: the file cannot be read, is open to everyone, or holds no key.
    """
    try:
        with path.open(encoding="ascii") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read().strip()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the control key in {path}: {one_line(error)}") from error
    if mode & stat.S_IRWXO:
        raise InputError(
            f"every user of this machine can reach the control key in {path} (mode {mode:04o}); run: chmod 600 {path}"
        )
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

    def __init__(
        self, http_url: str, key: str, *, tls: bool = False, ca: Path | None = None, own: bool = False
    ) -> None:
        """Sends nothing yet.

        Args:
            http_url: address of Triton's HTTP endpoint, `host:port`, or `https://host:port` of a proxy.
            tls: connect over TLS, as with https.
            ca: file with the certificates of the authorities to trust, PEM; implies `tls`.
            own: this process runs the server, so that its address is one of this machine.

        Raises:
            InputError: it is no such address, the key would be sent in the clear, or `ca` cannot be read.
        """
        self.http_url = http_url
        self._key = key
        https, self._host, self._port = _parse(http_url)
        self._tls = tls_context(ca) if https or tls or ca is not None else None
        if self._tls is None and not own and not is_loopback(self._host):
            raise InputError(
                f"the control key is sent to {self._host} over TLS only; use https://, --tls, or --ca FILE"
            )

    def reload(self, seconds: float = LOAD_SECONDS) -> None:
        """Loads what the repository contains now: the service, and its engines where they are models of their own.

        Such engines are replaced while no request needs them, since an image that is half drawn would go on with other
        weights: the service first finishes its requests, and takes no new ones until it is loaded again.

        Args:
            seconds: how long the requests, and then each model, may take.

        Raises:
            ServiceError: a model cannot be loaded, or requests were not finished in time. A service without such
                engines goes on with the old model; one with them stays unloaded.
        """
        engines = {
            entry["name"]: entry.get("state") == "READY"
            for entry in self._index(ANSWER_SECONDS)
            if entry["name"].startswith(engine_model(""))
        }
        if any(engines.values()) and not self.drain(seconds):
            raise ServiceError(
                f"{self.http_url} still has requests in flight, or clients keep streams open, after {seconds:g} s, and "
                "takes no new requests; reload again"
            )
        for engine in engines:
            self.load(engine, seconds)
        self.load(seconds=seconds)

    def load(self, model: str = MODEL, seconds: float = LOAD_SECONDS) -> None:
        """Loads what the repository contains of one model now; the old one serves until the new one is warm.

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
            index = self._index(seconds)
        except ServiceError:
            return False
        return _is_ready(index, model)

    def check_alive(self, seconds: float = ANSWER_SECONDS) -> None:
        """Checks that a model which is loaded answers. One that drains or is being replaced counts as alive.

        Raises:
            ServiceError: the model does not answer, or its server does not.
        """
        if _is_ready(self._index(seconds), MODEL):
            self._post(f"/v2/models/{MODEL}/generate", seconds, {"heartbeat": True})

    def is_unloaded(self, model: str = MODEL, seconds: float = DRAIN_SECONDS) -> bool:
        """Returns whether the model has finished all its requests and is gone."""
        entries = [entry for entry in self._index(seconds) if entry["name"] == model and "state" in entry]
        return all(entry.get("reason") == "unloaded" for entry in entries)

    def drain(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Unloads the model and waits until its requests are finished; returns whether they are.

        Raises:
            ServiceError: the server does not answer, or refuses the key.
        """
        give_up = time.monotonic() + seconds
        self.unload(seconds=max(seconds, ANSWER_SECONDS))
        while not self.is_unloaded(seconds=max(give_up - time.monotonic(), ANSWER_SECONDS)):
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _index(self, seconds: float) -> list[dict[str, str]]:
        """Returns the models in the repository, with name and, once they were loaded, state and reason."""
        index: list[dict[str, str]] = self._post("/v2/repository/index", seconds)
        return index

    def _post(self, path: str, seconds: float, body: Mapping[str, Any] = {}) -> Any:
        connection = (
            HTTPConnection(self._host, self._port, timeout=seconds)
            if self._tls is None
            else HTTPSConnection(self._host, self._port, timeout=seconds, context=self._tls)
        )
        try:
            connection.request("POST", path, json.dumps(body), {CONTROL_HEADER: self._key})
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, HTTPException) as error:
            raise ServiceError(f"{self.http_url} does not answer: {one_line(error)}") from error
        finally:
            connection.close()
        if status == 403:
            raise ServiceError(f"{self.http_url} refuses the control key; name the file that this server was given")
        try:
            content = json.loads(answer or b"null")
        except ValueError:
            content = None
        if status != 200:
            reason = content.get("error") if isinstance(content, dict) else None
            raise ServiceError(f"{self.http_url} answered {status}: {one_line(Exception(reason or 'no reason given'))}")
        return content


def _is_ready(index: Sequence[Mapping[str, str]], model: str) -> bool:
    return any(entry["name"] == model and entry.get("state") == "READY" for entry in index)


def _parse(url: str) -> tuple[bool, str, int | None]:
    """Returns whether an address says https, its host, and its port if it has one."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if (
        not host
        or parts.scheme not in ("http", "https")
        or parts.path not in ("", "/")
        or parts.query
        or parts.username
    ):
        raise InputError(f"expected an address HOST:PORT or https://HOST:PORT, got {url!r}")
    return parts.scheme == "https", host, port
