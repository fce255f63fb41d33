"""The engines of a bundle, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.backends import Backend, Session
from runtime.errors import InputError
from runtime.manifest import EngineEntry, Manifest, check_file


class EngineSet(Mapping[str, Session]):
    """The engines of a bundle, each loaded when it is first needed.

    With `low_memory` only one engine with weights is in memory at a time: an expert is loaded when its interval
    begins and dropped when the next one's begins, in every call.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, *, low_memory: bool = False) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._backend = backend
        self._low_memory = low_memory
        self._loaded: dict[str, Session] = {}
        self._checked: set[str] = set()
        self._weights = {entry.name: entry.files for entry in manifest.engines}
        """The files that each engine's weights are from."""

    def __getitem__(self, name: str) -> Session:
        if name not in self._loaded:
            entry = self._manifest.engine(name)
            if self._low_memory and _has_weights(entry):
                self._drop_engines_with_weights()
            if name not in self._checked:
                for file in self._backend.files(entry):
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

    def refit(self, bundle: Path, manifest: Manifest) -> None:
        """Gives the engines whose weights are others in another bundle the weights of that bundle.

        Raises:
            InputError: only one engine is in memory at a time, so that the weights would be lost.
            BundleError: a file of the other bundle was altered.
            EngineError: the provider cannot do it, or the graphs differ.
        """
        if self._low_memory:
            raise InputError("with low memory each call loads the engines again; open the other bundle instead")
        changed = [entry for entry in manifest.engines if entry.files != self._weights[entry.name]]
        for entry in changed:
            for file in entry.files:
                check_file(bundle, file)
        for entry in changed:
            self[entry.name].refit(bundle, entry)
            self._weights[entry.name] = entry.files

    def close(self) -> None:
        """Frees all engines."""
        while self._loaded:
            self._loaded.popitem()[1].close()

    def _drop_engines_with_weights(self) -> None:
        for name, session in list(self._loaded.items()):
            if _has_weights(session.entry):
                del self._loaded[name]
                session.close()


def _has_weights(entry: EngineEntry) -> bool:
    return len(entry.files) > 1
