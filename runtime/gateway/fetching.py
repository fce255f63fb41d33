"""The images that messages name by URL."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from urllib.parse import urlsplit

import httpx2

from runtime.errors import InputError, one_line
from runtime.gateway.chat import content_of
from runtime.images import MAX_FILE_BYTES

FETCH_SECONDS = 10.0
"""Longest time for a whole image."""
_REMEDY = "send a data URI (the operator can add --allow-image-host)"


async def read_url(url: str, hosts: Collection[str]) -> bytes:
    """Returns the file at a data URI, or at an http URL of an allowed host.

    Raises:
        InputError: it cannot be read, or may not be fetched.
    """
    return content_of(url) if url.startswith("data:") else await fetch_url(url, hosts)


async def fetch_url(url: str, hosts: Collection[str], remedy: str = _REMEDY) -> bytes:
    """Returns the file at an http URL of an allowed host.

    Args:
        remedy: what to do about a host that is not allowed.

    Raises:
        InputError: it cannot be read, or may not be fetched.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise InputError(f"an image's URL cannot be read: {one_line(error)}") from error
    if parts.scheme not in ("http", "https") or host not in hosts:
        allowed = f"only from {', '.join(sorted(hosts))}" if hosts else "from no host"
        raise InputError(f"images are fetched {allowed}; {remedy}")
    content = b""
    try:
        async with (
            asyncio.timeout(FETCH_SECONDS),
            httpx2.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise InputError(f"{host} answered {response.status_code} for an image")
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_FILE_BYTES:
                    raise InputError(f"an image is larger than {MAX_FILE_BYTES} bytes; make it smaller")
    except TimeoutError as error:
        raise InputError(f"an image from {host} took longer than {FETCH_SECONDS:g} s; send a data URI") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise InputError(f"an image could not be fetched from {host}: {one_line(error)}") from error
    return content
