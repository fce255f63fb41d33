"""The images of rows that are not files of this machine, read before their rows are run."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from runtime.batch.places import os_errors, place_of, reason_of
from runtime.errors import InputError, LatteFlowError, MissingExtraError
from runtime.images import check_file_size

READERS = 16
"""Number of images that are read at the same time."""
_WEB = ("http://", "https://")

Fetched = Mapping[str, bytes | LatteFlowError]
"""What is at each URL, or why it could not be read."""


def fetch(urls: Iterable[str], hosts: Collection[str]) -> Fetched:
    """Reads what is at URLs, several at a time.

    Args:
        hosts: those from which http and https may read.

    Raises:
        MissingExtraError: the library for a kind of URL is not installed.
    """
    wanted = sorted(set(urls))
    if not wanted:
        return {}
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda url: _read(url, hosts), wanted))
    for one in found:
        if isinstance(one, MissingExtraError):
            raise one
    return dict(zip(wanted, found, strict=True))


def content_at(url: str, fetched: Fetched) -> bytes:
    """Returns what was read from a URL.

    Raises:
        InputError: it could not be read.
    """
    found = fetched[url]
    if isinstance(found, LatteFlowError):
        raise found
    return found


def _read(url: str, hosts: Collection[str]) -> bytes | LatteFlowError:
    try:
        return _read_from_web(url, hosts) if url.lower().startswith(_WEB) else _read_from_store(url)
    except LatteFlowError as error:
        return error


def _read_from_web(url: str, hosts: Collection[str]) -> bytes:
    try:
        from runtime.gateway.fetching import fetch_url
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'images at http URLs need {error.name}, which is not installed; run: pip install "latte-flow[batch,cpu]"'
        ) from error
    return asyncio.run(fetch_url(url, hosts, "name its host with --allow-image-host, or give a file"))


def _read_from_store(url: str) -> bytes:
    place = place_of(url)
    try:
        with os_errors(place):
            check_file_size(place.stat().st_size)
            return cast(bytes, place.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no image at {url}") from error
    except OSError as error:
        raise InputError(f"{url} cannot be read: {reason_of(error)}") from error
