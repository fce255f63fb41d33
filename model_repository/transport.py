"""What a client may send where: secrets over TLS, or to this machine's loopback interface."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from runtime.errors import InputError, one_line


def is_loopback(host: str) -> bool:
    """Returns whether what is sent to a host stays on this machine; of names, only localhost is known to."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """Returns a context that checks certificates.

    Args:
        ca: file with the certificates of the authorities to trust, PEM; None for those of the system.

    Raises:
        InputError: the certificates cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise InputError(f"cannot read the certificates in {ca}: {one_line(error)}") from error
