"""What people write about a scene of emoji: its canonical caption, and captions in other words.

`describe` is the one canonical caption of a scene. `caption` says the same, or part of it, with a small grammar: names
or synonyms, an order of clauses, ways of saying each. `unseen_phrasing` fills templates that were written by hand for
scoring; no caption of training has their sentences.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from latte.emoji.catalogue import Catalogue
from latte.emoji.scenes import RELATIONS, Placed, Scene, choose

SYNONYM_SHARE = 0.35
"""Share of captions that use a synonym of a name that has one."""
_LEADS = (
    "draw", "please draw", "paint", "show me", "generate", "make", "create", "an image of", "a picture of", "image:",
    "there is", "here is", "give me", "i want",
)  # fmt: skip
_LEAD_SHARE = 0.2
_SIZES = {"large": ("large", "large", "big", "huge"), "small": ("small", "small", "little", "tiny")}
_NOUNS = ("{a} {size} {name}", "{size} {name}", "{a} {size} {name} emoji", "the {size} {name} emoji", "{name}, {size}")
_NOUNS_WITHOUT_SIZE = ("{a} {name}", "{name}", "{a} {name} emoji", "the {name} emoji")
_AT = {
    "middle": ("in the middle", "in the middle", "in the center", "in the centre"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "on the top side"),
    "bottom": ("at the bottom", "at the bottom", "on the bottom side"),
}
_AT_CORNER = ("at the {place}", "at the {place}", "in the {place} corner", "on the {place}", "in the {upper}")
_BEHIND = (
    "on a {background} background", "on a {background} background", "on {background}", "with a {background} background",
    "against a {background} background", "over {background}",
)  # fmt: skip
_BETWEEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("top", "bottom"): (
        "{first} above {second}", "{first} over {second}", "{second} below {first}", "{second} under {first}",
        "{first} at the top and {second} at the bottom", "{second} at the bottom, {first} at the top",
    ),
    ("left", "right"): (
        "{first} to the left of {second}", "{first} left of {second}", "{second} to the right of {first}",
        "{second} right of {first}", "{first} on the left and {second} on the right",
        "{second} on the right, {first} on the left",
    ),
}  # fmt: skip
_OPPOSITE_CORNERS = (
    "{first} {at_first} and {second} {at_second}", "{second} {at_second} and {first} {at_first}",
    "{first} {at_first}, {second} {at_second}",
)  # fmt: skip
_SOMEWHERE = ("{first} and {second}", "{second} and {first}", "{first} with {second}", "{second}, {first}")
_ORDERS = ("{what} {place} {behind}", "{what} {place} {behind}", "{what} {place}, {behind}", "{what} {behind} {place}")
_ORDERS_INVERTED = (
    "{place}, {what} {behind}",
    "{place} {what} {behind}",
    "{behind}, {what} {place}",
    "{behind}: {what} {place}",
)
_INVERTED_SHARE = 0.3


def describe(scene: Scene) -> str:
    """Returns the canonical caption of a scene, which is the expected answer to `questions.DESCRIBE`.

    It states the attributes that are not None; of two emoji, not their size, which is always small. All captions that
    state the same have the same canonical form.
    """
    if len(scene.emoji) == 1:
        emoji = scene.emoji[0]
        text = " ".join(part for part in (emoji.size, emoji.name, emoji.place and at(emoji.place)) if part)
    else:
        first, second = scene.emoji
        relation = RELATIONS.get((str(first.place), str(second.place)))
        if relation is not None:
            text = f"{first.name} {relation} {second.name}"
        elif first.place is not None and second.place is not None:
            text = f"{first.name} {at(first.place)} and {second.name} {at(second.place)}"
        else:
            text = " and ".join(sorted((first.name, second.name)))
    return f"{text} on a {scene.background} background" if scene.background else text


def at(place: str) -> str:
    """Returns the plain words for a place, such as "at the top left"."""
    return _AT[place][0] if place in _AT else f"at the {place}"


def state(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> Scene:
    """Returns the scene as a caption may state it: attributes that it omits are None.

    Args:
        full: state every attribute, except the size of two emoji, which is always small.
    """
    placed = full or rng.random() < 0.85
    sized = full or rng.random() < 0.8
    emoji = tuple(
        replace(
            emoji,
            place=emoji.place if placed else None,
            size=emoji.size if len(scene.emoji) == 1 and sized else None,
        )
        for emoji in scene.emoji
    )
    return Scene(emoji, scene.background if full or rng.random() < 0.85 else None)


def caption(scene: Scene, catalogue: Catalogue, rng: np.random.Generator, *, full: bool = False) -> tuple[str, Scene]:
    """Returns a random caption of a scene, and the scene as stated; see `state`."""
    stated = state(scene, rng, full=full)
    behind = choose(rng, _BEHIND).format(background=stated.background) if stated.background else ""
    if len(stated.emoji) == 1:
        emoji = stated.emoji[0]
        what, place = _noun(emoji, catalogue, rng), _at(emoji.place, rng)
    else:
        what, place = _both(stated, catalogue, rng), ""
    inverted = rng.random() < _INVERTED_SHARE
    text = choose(rng, _ORDERS_INVERTED if inverted else _ORDERS).format(what=what, place=place, behind=behind)
    if not inverted and rng.random() < _LEAD_SHARE:
        text = f"{choose(rng, _LEADS)} {text}"
    return _tidy(text), stated


def _both(stated: Scene, catalogue: Catalogue, rng: np.random.Generator) -> str:
    first, second = stated.emoji
    forms: tuple[str, ...] = _SOMEWHERE
    if first.place is not None and second.place is not None:
        forms = _BETWEEN.get((first.place, second.place), _OPPOSITE_CORNERS)
    return choose(rng, forms).format(
        first=_noun(first, catalogue, rng),
        second=_noun(second, catalogue, rng),
        at_first=_at(first.place, rng),
        at_second=_at(second.place, rng),
    )


def _noun(emoji: Placed, catalogue: Catalogue, rng: np.random.Generator) -> str:
    """Returns one of the ways to say what an emoji is, the plain one most often."""
    synonyms = catalogue[emoji.name].synonyms
    name = choose(rng, synonyms) if synonyms and rng.random() < SYNONYM_SHARE else emoji.name
    forms = _NOUNS if emoji.size else _NOUNS_WITHOUT_SIZE
    size = choose(rng, _SIZES[emoji.size]) if emoji.size else ""
    return _noun_in_form(choose(rng, forms[:2] if rng.random() < 0.5 else forms), name, size)


def _noun_in_form(form: str, name: str, size: str) -> str:
    has_plural = name.endswith("s") and not name.endswith("ss") and "emoji" not in form  # most names in -s are plurals
    article = "" if has_plural else article_of(size or name)
    return form.format(a=article, name=name, size=size)


def article_of(word: str) -> str:
    """Returns "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def _at(place: str | None, rng: np.random.Generator) -> str:
    if place is None:
        return ""
    if place in _AT:
        return choose(rng, _AT[place])
    upper = place.replace("top", "upper").replace("bottom", "lower")
    return choose(rng, _AT_CORNER).format(place=place, upper=upper)


def _tidy(text: str) -> str:
    """Removes the gaps that omitted attributes leave in a filled template."""
    text = " ".join(text.split())
    for mark in ",:":
        text = text.replace(f" {mark}", mark)
    return text.strip(" ,:").removeprefix("with ")


_UNSEEN_ONE = (
    "{background} background. {name}, {size}, {place}.",
    "draw me the {name} emoji {at}: {size}, and {background} behind it",
    "could you sketch a {name}? make it {size}, put it {at}, and fill the rest with {background}",
    "i would like to see a {name}: {size}, {at}, and all the rest {background}",
    "{at} there should be a {size} {name}, the rest stays {background}",
    "a {background} sheet with a {size} {name} {at}",
    "{size} {name} emoji, {place}, {background} behind",
)
_UNSEEN_TWO = (
    "{background} background. {first} {at_first}, {second} {at_second}.",
    "draw me the {first} emoji {at_first} and the {second} emoji {at_second}, {background} behind them",
    "could you sketch a {first} {at_first} and a {second} {at_second}? fill the rest with {background}",
    "{at_first} there should be a {first}, {at_second} a {second}, the rest stays {background}",
    "two emoji, {first} {at_first} and {second} {at_second}, all the rest {background}",
)


def unseen_phrasing(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Returns a caption that states everything in a sentence that training never uses, and the scene as stated."""
    stated = state(scene, rng, full=True)
    first, second = stated.emoji[0], stated.emoji[-1]
    text = choose(rng, _UNSEEN_ONE if len(stated.emoji) == 1 else _UNSEEN_TWO).format(
        background=stated.background,
        name=first.name,
        size=first.size,
        place=first.place,
        at=at(str(first.place)),
        first=first.name,
        second=second.name,
        at_first=at(str(first.place)),
        at_second=at(str(second.place)),
    )
    return text, stated
