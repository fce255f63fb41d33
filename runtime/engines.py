"""The engines of a bundle, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.backends import Backend, Session
from runtime.manifest import Manifest, check_file

SMALL = {"solver_step"}
"""Engines without weights, which always stay."""


class EngineSet(Mapping[str, Session]):
    """A bundle's engines, each loaded when it is first asked for.

    With `low_memory` only one engine with weights is in memory at a time: an expert is loaded when its
    interval begins and dropped when the next one's does, at every call anew.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, *, low_memory: bool = False) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._backend = backend
        self._low_memory = low_memory
        self._loaded: dict[str, Session] = {}
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Session:
        if name not in self._loaded:
            entry = self._manifest.engine(name)
            if self._low_memory and name not in SMALL:
                self._drop_all_but(SMALL)
            if name not in self._checked:
                for file in entry.files:
                    check_file(self._bundle, file)
                self._checked.add(name)
            self._loaded[name] = self._backend.load(self._bundle, entry)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return any(entry.name == name for entry in self._manifest.engines)

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self._manifest.engines)

    def __len__(self) -> int:
        return len(self._manifest.engines)

    @property
    def loaded(self) -> list[str]:
        """Names of the engines in memory."""
        return list(self._loaded)

    def close(self) -> None:
        """Frees all engines."""
        self._drop_all_but(set())

    def _drop_all_but(self, kept: set[str]) -> None:
        for name in set(self._loaded) - kept:
            self._loaded.pop(name).close()
