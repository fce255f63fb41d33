"""Optimisation profiles from a bundle's named axes, so that no engine needs a hand-written list of shapes.

An axis has the same range wherever its name occurs. The default ranges depend on the engine's role; a user can
change them by the axis's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from runtime.errors import InputError
from runtime.manifest import AxisRange, EngineEntry, Manifest, PlanProfile
from runtime.serving.requests import Limits

MOST_CONTEXT_TOKENS = 4096
"""Limit of a conversation, unless the user asks for more: a profile's memory grows with its largest shapes."""


@dataclass(frozen=True)
class AxisChoices:
    """The sizes that a user chose for an axis. Several values make several profiles, in this order."""

    minimum: tuple[int, ...] = ()
    optimum: tuple[int, ...] = ()
    maximum: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises `InputError` if minimum, optimum and maximum name different numbers of profiles."""
        lengths = {len(values) for values in (self.minimum, self.optimum, self.maximum)} - {0, 1}
        if len(lengths) > 1:
            raise InputError(f"--min, --opt and --max name different numbers of profiles: {sorted(lengths)}")

    @property
    def profiles(self) -> int:
        return max(1, len(self.minimum), len(self.optimum), len(self.maximum))

    def apply(self, axis: str, default: AxisRange, profile: int) -> AxisRange:
        """Returns the default range with the chosen sizes; an optimum that was not chosen is moved into the range."""
        low, best, high = (_pick(values, profile) for values in (self.minimum, self.optimum, self.maximum))
        asked = [value for value in (low, best, high) if value is not None]
        minimum = min([default.min, *asked]) if low is None else low
        maximum = max([default.max, *asked]) if high is None else high
        optimum = min(max(default.opt, minimum), maximum) if best is None else best
        if not minimum <= optimum <= maximum:
            raise InputError(f"axis {axis}: expected min <= opt <= max, got {minimum}, {optimum} and {maximum}")
        return AxisRange(min=minimum, opt=optimum, max=maximum)


def profiles_of(manifest: Manifest, engine: EngineEntry, choices: Mapping[str, AxisChoices]) -> tuple[PlanProfile, ...]:
    """Returns an engine's profiles.

    Args:
        choices: the user's choices by axis; axes that this engine does not have are ignored.

    Raises:
        InputError: a range is not in order.
    """
    found = []
    for use in _uses(manifest, engine):
        ours = {axis: choice for axis, choice in choices.items() if axis in use.ranges}
        count = max((choice.profiles for choice in ours.values()), default=1)
        for index in range(count):
            ranges = {
                axis: ours[axis].apply(axis, default, index) if axis in ours else default
                for axis, default in use.ranges.items()
            }
            name = use.name if count == 1 else f"{use.name} {index}"
            found.append(PlanProfile(name=name, axes=_whole(engine, ranges | use.fixed)))
    return tuple(found)


def axes_of(engines: Iterable[EngineEntry]) -> set[str]:
    """Returns the axes that a user may choose sizes for, which are those that do not follow from others."""
    return {axis for engine in engines for axis in engine.axes} - {"total"}


def parse_choices(options: Mapping[str, Sequence[str]], known: set[str]) -> dict[str, AxisChoices]:
    """Parses the options of a command line, `{"minimum": ["rows=2"], …}`; returns choices by axis.

    Raises:
        InputError: a text is not AXIS=N, or no engine has the axis.
    """
    found: dict[str, AxisChoices] = {}
    for bound, texts in options.items():
        for text in texts:
            axis, _, values = text.partition("=")
            try:
                numbers = tuple(int(value) for value in values.split(","))
            except ValueError:
                numbers = ()
            if not numbers or min(numbers) < 0:
                raise InputError(f"expected AXIS=N or AXIS=N,N,… for several profiles, got {text!r}")
            if axis not in known:
                raise InputError(f"no engine has an axis {axis!r}; there are {', '.join(sorted(known))}")
            found[axis] = replace(found.get(axis, AxisChoices()), **{bound: numbers})
    return found


@dataclass(frozen=True)
class _Use:
    """One way to run an engine."""

    name: str
    ranges: dict[str, AxisRange]
    """Axes whose ranges a user may change."""
    fixed: dict[str, AxisRange]
    """Axes whose sizes define this use."""


def _uses(manifest: Manifest, engine: EngineEntry) -> list[_Use]:
    """Returns the default ranges for each use of an engine."""
    height, width = manifest.geometry.latent_size
    latents = {"latent_height": _static(height), "latent_width": _static(width)}
    rows = AxisRange(min=1, opt=2, max=Limits().max_rows_per_tick)
    prompt = AxisRange(min=1, opt=min(32, manifest.prompt.max_tokens), max=manifest.prompt.max_tokens)
    context = min(manifest.understanding.max_context_tokens, MOST_CONTEXT_TOKENS)
    images = AxisRange(min=1, opt=min(256, context), max=context)
    one, none = _static(1), _static(0)
    if engine.role == "vlm":
        answered = AxisRange(min=1, opt=min(512, context), max=context)
        past = AxisRange(min=1, opt=min(512, context - 1), max=context - 1)
        return [
            _Use("prompts", {"batch": rows, "tokens": prompt}, {"past": none, "image_tokens": one}),
            _Use("prefill", {"batch": one, "tokens": answered, "image_tokens": images}, {"past": none}),
            _Use("decode", {"batch": one, "past": past}, {"tokens": one, "image_tokens": one}),
        ]
    if engine.role == "vision_encoder":
        return [_Use("images", {"image_tokens": images}, {})]
    known = {"rows": rows, "batch": rows.model_copy(update={"opt": 1}), "prefix": prompt} | latents
    axes = axes_of([engine])
    if axes - set(known):
        raise InputError(f"engine {engine.name} has axes with no default range: {', '.join(sorted(axes - set(known)))}")
    return [_Use(engine.name, {axis: known[axis] for axis in sorted(axes)}, {})]


def _whole(engine: EngineEntry, ranges: dict[str, AxisRange]) -> dict[str, AxisRange]:
    """Adds the range of `total`, the past and the new tokens together, if the engine has it."""
    if "total" in engine.axes:
        past, new = ranges["past"], ranges["tokens"]
        ranges["total"] = AxisRange(min=past.min + new.min, opt=past.opt + new.opt, max=past.max + new.max)
    return ranges


def _static(size: int) -> AxisRange:
    return AxisRange(min=size, opt=size, max=size)


def _pick(values: tuple[int, ...], profile: int) -> int | None:
    if not values:
        return None
    return values[0] if len(values) == 1 else values[profile]
