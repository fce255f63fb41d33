"""How a client reaches a service: address, TLS, headers and token."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tritonclient.grpc as grpc
from tritonclient.grpc import MAX_GRPC_MESSAGE_SIZE

from model_repository.transport import is_loopback, tls_context
from runtime.errors import InputError

TOKEN_VARIABLE = "LATTE_FLOW_TOKEN"
"""Environment variable with a bearer token."""
_CHANNEL = [
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_SIZE),
]
"""What the client library sets itself as long as nobody else sets anything."""
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True)
class Connection:
    """Address of a gRPC endpoint, and what every request to it carries.

    Raises:
        InputError: a header cannot be sent, a token would be sent in the clear, or the certificates cannot be read.
    """

    url: str
    tls: bool = False
    ca: Path | None = None
    """File with the certificates of the authorities to trust, PEM; None for those of gRPC. It implies TLS."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    token: str | None = field(default=None, repr=False)
    """Sent as `authorization: Bearer TOKEN`, over TLS or to this machine only. None for the environment's."""
    own: bool = False
    """This process runs the server, so that no proxy is between them, whatever the address."""

    def __post_init__(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
                raise InputError(
                    f"a header must have a name of letters, digits, -, _ and . and an ASCII value: {name!r}"
                )
        token = os.environ.get(TOKEN_VARIABLE) if self.token is None else self.token
        if token:
            if not (token.isascii() and token.isprintable()):
                raise InputError("a token must be printable ASCII")
            if not self.secure and not is_loopback(self.url.rpartition(":")[0]):
                raise InputError(f"a token is sent to {self.url} over TLS only; use --tls, or --ca FILE")
            headers["authorization"] = f"Bearer {token}"
        object.__setattr__(self, "headers", headers)
        if self.ca is not None:
            tls_context(self.ca)  # gRPC would be silent about a file that it cannot use

    @property
    def secure(self) -> bool:
        return self.tls or self.ca is not None

    def open(self) -> grpc.InferenceServerClient:
        """Returns a new channel; nothing is sent yet."""
        ca = None if self.ca is None else str(self.ca)
        options = [*_CHANNEL, ("grpc.enable_http_proxy", int(self._may_use_proxy))]
        return grpc.InferenceServerClient(self.url, ssl=self.secure, root_certificates=ca, channel_args=options)

    @property
    def _may_use_proxy(self) -> bool:
        """gRPC obeys `http_proxy` also for this machine's own addresses, and would send a token there in the clear."""
        return not (self.own or is_loopback(self.url.rpartition(":")[0]))
