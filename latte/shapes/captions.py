"""What people write about a scene: its canonical caption, plain captions, and captions in other words.

`describe` is the one canonical caption of a scene. `caption` fills one of a few plain templates. `rephrase` says the
same with a small grammar: synonyms, an order of clauses, ways of saying each, and filler words. `unseen_phrasing` fills
templates that were written by hand for scoring; no caption of training has their sentences.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from latte.shapes.scenes import Scene, Shape, choose, mirrored

_PLACES = {"center": ("in the center", "in the middle")}
_ONE_SHAPE = (
    "{article} {size} {colour} {kind} {place} on {background}",
    "{article} {size} {colour} {kind} {place}, {background}",
    "{place} {article} {size} {colour} {kind} on {background}",
    "on {background}, {article} {size} {colour} {kind} {place}",
    "{background} with {article} {size} {colour} {kind} {place}",
)
_TWO_SHAPES = (
    "{first} {relation} {second} on {background}",
    "{first} {relation} {second}, {background}",
    "{first} that is {relation} {second} on {background}",
    "on {background}, {first} {relation} {second}",
    "{background} with {first} {relation} {second}",
)


def describe(scene: Scene) -> str:
    """Returns the canonical caption of a scene, which is the expected answer to `questions.DESCRIBE`.

    It states the attributes that are not None; for two shapes, their relation in place of their cells. All captions
    that state the same have the same canonical form.
    """
    if scene.relation in ("below", "right of"):
        scene = mirrored(scene)
    text = _name(scene.shapes[0])
    if scene.relation is not None:
        text += f" {scene.relation} {_name(scene.shapes[1])}"
    else:
        text += f" {_places(scene.shapes[0].cell)[0]}"
    return _tidy(f"{text} on a {scene.background} background" if scene.background else text)


def state(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> Scene:
    """Returns the scene as a caption may state it: attributes that it omits are None.

    Args:
        full: state every attribute, except the cells of two shapes, which their relation implies.
    """
    if rng.random() < 0.5:
        scene = mirrored(scene)
    keeps_background = full or rng.random() < 0.9
    shapes = tuple(
        replace(
            shape,
            size=shape.size if full or rng.random() < 0.85 else None,
            cell=shape.cell if len(scene.shapes) == 1 and (full or rng.random() < 0.9) else None,
        )
        for shape in scene.shapes
    )
    return Scene(shapes, scene.background if keeps_background else None, scene.relation)


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> tuple[str, Scene]:
    """Returns a random plain caption of a scene, and the scene as stated; see `state`."""
    stated = state(scene, rng, full=full)
    templates = _ONE_SHAPE if len(stated.shapes) == 1 else _TWO_SHAPES
    first = stated.shapes[0]
    text = choose(rng, templates).format(
        article="a",
        size=first.size or "",
        colour=first.colour,
        kind=first.kind,
        place=choose(rng, _places(first.cell)) if first.cell else "",
        background=f"a {stated.background} background" if stated.background else "",
        relation=stated.relation if stated.relation in ("above", "below") else f"to the {stated.relation}",
        first=_name(stated.shapes[0]),
        second=_name(stated.shapes[-1]),
    )
    return _tidy(text), stated


def short_caption(scene: Scene) -> tuple[str, Scene]:
    """Returns a caption of the colour and the kind of a scene's first shape only, and the scene as stated."""
    shape = replace(scene.shapes[0], size=None, cell=None)
    return _tidy(_name(shape)), Scene((shape,), None, None)


def _name(shape: Shape) -> str:
    return f"a {shape.size or ''} {shape.colour} {shape.kind}"


def _places(cell: str | None) -> tuple[str, ...]:
    if cell is None:
        return ("",)
    return _PLACES.get(cell, (f"at the {cell}", f"in the {cell}" if " " in cell else f"on the {cell}"))


def _tidy(text: str) -> str:
    """Removes the gaps that omitted attributes leave in a filled template."""
    text = " ".join(text.split()).replace("a orange", "an orange")
    for left, right in ((" ,", ","), ("on , ", ""), ("on, ", "")):
        text = text.replace(left, right)
    text = text.removeprefix("with ").strip(" ,")
    return text.removesuffix(" on").strip(" ,")


# ---- captions in other words ----------------------------------------------------------------------

_SYNONYMS = {
    "small": ("small", "small", "little", "tiny", "small-sized"),
    "medium": ("medium", "medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge", "large-sized"),
    "circle": ("circle", "circle", "disc"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "ring": ("ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus sign"),
    "grey": ("grey", "grey", "gray"),
    "center": ("center", "middle", "centre"),
    "top left": ("top left", "top left", "upper left"),
    "top right": ("top right", "top right", "upper right"),
    "bottom left": ("bottom left", "bottom left", "lower left"),
    "bottom right": ("bottom right", "bottom right", "lower right"),
}
_LEADS = (
    "draw", "please draw", "paint", "show", "show me", "generate", "make", "create", "an image of", "a picture of",
    "a drawing of", "image:", "there is", "i want", "we need", "here is", "imagine", "can you draw", "give me",
)  # fmt: skip
_FILLERS = (
    "please", "now", "just", "simply", "ok", "well", "for me", "today", "if possible", "thank you", "hello", "hi",
    "nice", "clean", "with care", "exactly", "again", "as an example", "in flat style", "this time", "next", "also",
)  # fmt: skip
_NAMES = (
    "a {size} {colour} {kind}", "one {size} {colour} {kind}", "{size} {colour} {kind}", "the {size} {colour} {kind}",
    "a {colour} {size} {kind}", "a {colour} {kind} that is {size}", "a {kind} that is {colour} and {size}",
    "a {size} {kind} in {colour}", "a {size} {kind} , {colour}", "a {kind} ( {colour} , {size} )",
    "a single {size} {kind} which is {colour}", "a {colour} {kind} of {size} size", "a {size} {kind} coloured {colour}",
    "{kind} , {size} , {colour}", "{colour} {size} {kind}", "{kind} in {colour} , {size}",
    "shape : {kind} , colour : {colour} , size : {size}", "size {size} , colour {colour} , {kind}",
    "a {kind} . it is {colour} . it is {size}", "a {size} {kind} . its colour is {colour}",
    "a {kind} , coloured {colour} , with size {size}", "{kind} = {colour} , size = {size}",
)  # fmt: skip
_NAMES_WITHOUT_SIZE = (
    "a {colour} {kind}", "one {colour} {kind}", "{colour} {kind}", "the {colour} {kind}", "a {kind} that is {colour}",
    "a {kind} in {colour}", "a {kind} , {colour}", "a {kind} ( {colour} )", "a {kind} coloured {colour}",
    "shape : {kind} , colour : {colour}", "a {kind} . its colour is {colour}", "{kind} in {colour}",
    "{kind} = {colour}",
)  # fmt: skip
_AT = (
    "at the {place}", "in the {place}", "on the {place}", "{place}", "placed at the {place}", "in the {place} corner",
    "positioned at {place}", "towards the {place}", "in the {place} part", "near the {place}", "located {place}",
    "position : {place}", "place : {place}", "at {place}", "it is at the {place}", "it sits in the {place}",
    "place it at the {place}", "at the {place} of the image", "in the {place} area", "with position {place}",
)  # fmt: skip
_BEHIND = (
    "on a {background} background", "on {background}", "{background} background", "a {background} background",
    "against {background}", "against a {background} background", "over {background}", "background : {background}",
    "the background is {background}", "with a {background} background", "with {background} behind it",
    "in front of a {background} wall", "background {background}", "on a {background} canvas", "{background} backdrop",
    "use a {background} background", "everything else is {background}", "on a field of {background}",
)  # fmt: skip
_JOINTS = (" ", " ", " , ", " , ", " . ", " ; ", " and ", " - ")
_BETWEEN = {
    "above": (
        "{first} above {second}", "above {second} , {first}", "{first} that is above {second}", "{first} over {second}",
        "{first} on top and {second} at the bottom", "at the top {first} , at the bottom {second}",
        "{second} with {first} above it", "{first} higher than {second}", "{second} , and above it {first}",
        "top : {first} . bottom : {second}", "{first} at the top . {second} is under it",
    ),
    "below": (
        "{first} below {second}", "below {second} , {first}", "{first} that is below {second}",
        "{first} under {second}", "{first} at the bottom and {second} on top",
        "at the bottom {first} , at the top {second}",
        "{second} with {first} below it", "{first} lower than {second}", "{second} , and under it {first}",
        "bottom : {first} . top : {second}", "{first} at the bottom . {second} is over it",
    ),
    "left of": (
        "{first} to the left of {second}", "left of {second} , {first}", "{first} that is left of {second}",
        "{first} on the left and {second} on the right", "on the left {first} , on the right {second}",
        "{second} with {first} to its left", "left : {first} . right : {second}", "{first} left of {second}",
        "{second} , and to the left of it {first}", "{first} on the left . {second} is right of it",
    ),
    "right of": (
        "{first} to the right of {second}", "right of {second} , {first}", "{first} that is right of {second}",
        "{first} on the right and {second} on the left", "on the right {first} , on the left {second}",
        "{second} with {first} to its right", "right : {first} . left : {second}", "{first} right of {second}",
        "{second} , and to the right of it {first}", "{first} on the right . {second} is left of it",
    ),
}  # fmt: skip
_COMMON_ENGLISH = """
    about after again air all also always am an any anyone anything are art as ask away be because been being best
    better book both but by call came can car case change city come could day did do does done each else even ever
    every eye fact family feel few find for friend from game get girl give go good got group had hand has have he
    health help her here him his home hope hour house how i idea if into is it its job just keep kid know last law
    learn let life like live long look lot made make man many may maybe me mean might minute moment money month more
    morning most mother much music must my name need new night now of often old once only or other our own party
    people perhaps person play problem put question quite read real really reason room said same say school see seem
    she should since so some someone something sometimes soon still story student such sure take talk team tell than
    thank that their them then these they thing think this those though thought time to today together told too try
    turn us use used very walk want war was water way we week well went were what when where whether which while who
    whole whose why will wish with within word work world would write year yes yet you your
"""
_COMMON_WORDS = _COMMON_ENGLISH.split()
"""Words that say nothing about a scene."""
COMMON_WORDS_SHARE = 0.5
"""Share of rephrased captions with common words anywhere in their sentences."""
FILLER_SHARE = 0.3
"""Share of rephrased captions with a filler word, at each end."""
PLAIN_SHARE = 0.3
"""Share of training's captions that are plain."""
LEAD_SHARE = 0.5
"""Share of rephrased captions that begin as a request or as the title of an image."""


def rephrase(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> tuple[str, Scene]:
    """Returns a random caption of the grammar, and the scene as stated; see `state`.

    The clauses (the shapes, the place, the background) come in any order.
    """
    stated = state(scene, rng, full=full)
    if stated.relation is None:
        clauses = [_named(stated.shapes[0], rng)]
        if stated.shapes[0].cell is not None:
            clauses.append(choose(rng, _AT).format(place=_word(stated.shapes[0].cell, rng)))
    else:
        names = {"first": _named(stated.shapes[0], rng), "second": _named(stated.shapes[1], rng)}
        clauses = [choose(rng, _BETWEEN[stated.relation]).format(**names)]
    if stated.background is not None:
        clauses.append(choose(rng, _BEHIND).format(background=_word(stated.background, rng)))
    # A shape usually comes before its place and its background, but not always.
    order = rng.permutation(len(clauses)) if rng.random() < 0.6 else range(len(clauses))
    joint = choose(rng, _JOINTS)
    text = "".join(
        (joint if rng.random() < 0.7 else choose(rng, _JOINTS)) * (i > 0) + clauses[k] for i, k in enumerate(order)
    )
    if rng.random() < LEAD_SHARE:
        text = f"{choose(rng, _LEADS)} {text}"
    if rng.random() < FILLER_SHARE:
        text = f"{choose(rng, _FILLERS)} {choose(rng, (',', '.', '', ''))} {text}"
    if rng.random() < FILLER_SHARE:
        text = f"{text} {choose(rng, (',', '.', '', ''))} {choose(rng, _FILLERS)}"
    if rng.random() < COMMON_WORDS_SHARE:
        text = _with_common_words(text, rng)
    return _spaced(text + choose(rng, ("", "", " .", " !"))), stated


def _with_common_words(text: str, rng: np.random.Generator) -> str:
    """Puts one to four common words at one to three places, so that words which say nothing are learned to be that."""
    words = text.split()
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(len(words) + 1)
        words[place:place] = rng.choice(_COMMON_WORDS, rng.integers(1, 5))
    return " ".join(words)


def _named(shape: Shape, rng: np.random.Generator) -> str:
    """Returns one of the ways to say what a shape is, the plain one most often."""
    if shape.size is None:
        form = choose(rng, _NAMES_WITHOUT_SIZE[:1] if rng.random() < 0.3 else _NAMES_WITHOUT_SIZE)
        return form.format(colour=shape.colour, kind=_word(shape.kind, rng))
    form = choose(rng, _NAMES[:1] if rng.random() < 0.3 else _NAMES)
    return form.format(size=_word(shape.size, rng), colour=shape.colour, kind=_word(shape.kind, rng))


def _word(word: str, rng: np.random.Generator) -> str:
    return choose(rng, _SYNONYMS.get(word, (word,)))


def _spaced(text: str) -> str:
    """Removes the spaces before punctuation, and corrects the article before a vowel."""
    text = " ".join(text.split())
    for mark in ",.;:!)":
        text = text.replace(f" {mark}", mark)
    return text.replace("( ", "(").replace("a orange", "an orange")


# ---- phrasings for scoring ------------------------------------------------------------------------

_UNSEEN_ONE_SHAPE = (
    "{background} background. {colour} {kind}, {size}, {cell}.",
    "draw me a {size} {colour} {kind} at the {cell} of a {background} page",
    "could you sketch a {colour} {kind}? make it {size}, put it {cell}, and fill the rest with {background}",
    "i would like to see a {kind}: it should be {colour} and {size}, {cell}, over {background}",
    "at the {cell} there should be a {size} {kind} in {colour}, the rest stays {background}",
    "{size} {kind}, {colour}, {cell}, {background} behind",
    "a {background} sheet whose {cell} has a {size} {colour} {kind}",
    "the {kind} is {colour}, the size is {size}, the place is {cell}, the background is {background}",
    "on {background}: {colour} {kind} ({size}), {cell}",
    "put a {size} {kind} of {colour} colour in the {cell}, {background} all around",
    "a {colour} and {size} {kind}, {cell}. {background} background, thanks",
    "{cell}: {colour} {kind}, {size}. colour of the background: {background}",
)
_UNSEEN_TWO_SHAPES = (
    "{background} background. {a}, and it is {relation} {b}.",
    "draw me {a} {relation} {b} on a {background} page",
    "could you sketch {a}? {relation} {b} please, and fill the rest with {background}",
    "i would like to see {a} and {b}: the {first} is {relation} the {second}, over {background}",
    "{a} and {b}, the first {relation} the second, the rest stays {background}",
    "two shapes: {a} {relation} {b}, {background} behind",
    "a {background} sheet showing {a} {relation} {b}",
    "there are {a} and {b}. the {first} is {relation} the {second}. the colour of the background is {background}",
    "{first} {relation} {second}: {a}, {b}, {background} all around",
    "{b}, {background} background, plus {a} {relation} the {second}",
)


def training_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Returns a caption to train on, plain or rephrased, and the scene as stated."""
    return caption(scene, rng) if rng.random() < PLAIN_SHARE else rephrase(scene, rng)


def unseen_phrasing(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Returns a caption that states everything in a sentence that training never uses, and the scene as stated."""
    stated = state(scene, rng, full=True)
    first, second = stated.shapes[0], stated.shapes[-1]
    templates = _UNSEEN_ONE_SHAPE if len(stated.shapes) == 1 else _UNSEEN_TWO_SHAPES
    side = "to the " if stated.relation in ("left of", "right of") else ""
    text = choose(rng, templates).format(
        size=first.size,
        colour=first.colour,
        kind=first.kind,
        cell=first.cell,
        background=stated.background,
        a=_name(first),
        b=_name(second),
        first=first.kind,
        second=second.kind,
        relation=f"{side}{stated.relation}",
    )
    return _spaced(text), stated
