"""API keys: who may ask, and how much at a time."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from runtime.errors import InputError, QueueFullError, line_of

MIN_KEY_CHARACTERS = 16


class ApiKey(BaseModel):
    """One key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.@-]{1,64}$", description="in logs, and for fairness")
    key: str = Field(min_length=MIN_KEY_CHARACTERS, pattern=r"^[\x21-\x7e]+$")
    max_images: int | None = Field(default=None, ge=1, description="images at a time")
    max_questions: int | None = Field(default=None, ge=1, description="questions at a time")


_KEYS = TypeAdapter(list[ApiKey])


class KeyRing:
    """The keys of a gateway. Without keys everybody may ask, without a name."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self._keys = {hashlib.sha256(key.key.encode()).digest(): key for key in keys}
        self._open: Counter[tuple[str, str]] = Counter()

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Reads a JSON list of `{"name": …, "key": …, "max_images": …, "max_questions": …}`.

        Raises:
            InputError: the file cannot be read, is open to everyone, or is not such a list.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            keys = _KEYS.validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the API keys in {path}: {error.strerror or error}") from error
        except ValidationError as error:
            reason = line_of(error.errors()[0], "the file")
            raise InputError(f"{path} must be a JSON list of API keys, each with a name and a key: {reason}") from error
        if mode & stat.S_IRWXO:
            raise InputError(
                f"every user of this machine can reach the API keys in {path} (mode {mode:04o}); run: chmod 600 {path}"
            )
        if not keys:
            raise InputError(f"{path} contains no key; add one, or leave --api-key-file out")
        if len({key.name for key in keys}) < len(keys) or len({key.key for key in keys}) < len(keys):
            raise InputError(f"{path} contains a name or a key twice; each needs its own")
        return cls(keys)

    @property
    def is_empty(self) -> bool:
        """Whether everybody may ask."""
        return not self._keys

    def find(self, token: str) -> ApiKey | None:
        """Returns the key that a token is, or None. Takes the same time for every token."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, key in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = key
        return found

    @contextmanager
    def quota(self, key: ApiKey | None, kind: str, count: int) -> Iterator[None]:
        """Takes so many places of a key's quota, until the block is left.

        Raises:
            InputError: there are never so many.
            QueueFullError: there are not so many now.
        """
        if key is None:
            yield
            return
        most = key.max_images if kind == "draw" else key.max_questions
        noun = "images" if kind == "draw" else "questions"
        place = (key.name, kind)
        if most is not None and count > most:
            raise InputError(f"the key {key.name!r} may have {most} {noun} open at a time, got {count}; ask for fewer")
        if most is not None and self._open[place] + count > most:
            raise QueueFullError(
                f"the key {key.name!r} has {self._open[place]} of {most} {noun} open and no room for {count} more; "
                "wait for one"
            )
        self._open[place] += count
        try:
            yield
        finally:
            self._open[place] -= count
