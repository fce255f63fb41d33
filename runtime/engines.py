"""The engines of a bundle, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.backends import Backend, Session
from runtime.manifest import Manifest, check_file


class EngineSet(Mapping[str, Session]):
    """A bundle's engines, each loaded when it is first asked for, and once."""

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._backend = backend
        self._loaded: dict[str, Session] = {}

    def __getitem__(self, name: str) -> Session:
        if name not in self._loaded:
            entry = self._manifest.engine(name)
            for file in entry.files:
                check_file(self._bundle, file)
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
        for session in self._loaded.values():
            session.close()
        self._loaded.clear()
