"""What is asked for in long text: names in four sets that share none, numbers, and made-up words.

A name is an adjective and a noun. Documents of a search, documents that judge its result, RULER-style tasks and the
solved examples in front of them name different things by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from numpy.random import Generator

from modalora.errors import DataError

Part = Literal["search", "evaluation", "tasks", "examples"]

_ADJECTIVES = (
    "amber ancient bitter blunt brave brief bright brisk broad calm careful cheerful clever cold copper crisp curious "
    "damp dark deep dusty eager early faint fancy fast fierce firm fresh gentle glad golden grand green happy hasty "
    "heavy hollow honest humble icy idle jolly keen late lazy light lively lonely lucky mellow mild modest narrow neat "
    "noble odd olive pale patient plain polite proud purple quick quiet rapid rare red rough round rusty sandy scarlet "
    "secret shallow sharp shy silent silver simple sleepy slow small smooth soft solid steady stern still stout strong "
    "sunny sweet swift tall tame tender thin tidy tiny urban vast velvet warm weary wide wild wise witty young yellow"
).split()

_NOUNS: dict[Part, list[str]] = {
    "search": (
        "anchor apron arrow basket beacon bench bottle bridge bucket button candle canvas carpet castle chimney circle "
        "cottage cradle curtain dagger desk drawer engine feather fiddle garden goblet hammer harbor kettle ladder "
        "lantern mirror needle orchard paddle pillow ribbon saddle teapot"
    ).split(),
    "evaluation": (
        "acorn almond badger barley beetle birch bramble cactus canyon cedar cherry clover comet coral cricket daisy "
        "donkey falcon fern forest glacier heron island ivy jungle lagoon lizard maple meadow nettle otter panther "
        "pebble planet raven river salmon spruce thistle willow"
    ).split(),
    "tasks": (
        "account album anthem archer artist atlas baker ballad banker barber boxer butcher captain carpenter census "
        "chapter charter clerk colony column council courier cousin critic dancer doctor drummer editor essay farmer "
        "fiction gardener general guard guest hunter jester judge jury juror knight lawyer legend letter library "
        "lyric magnet major market mason mayor melody merchant miller miner minister monk motto museum nephew novel "
        "nurse orator painter parish pilot piper player poem poet porter prince printer puzzle ranger recipe reader "
        "riddle sailor satire saying scholar sculptor senate sermon sheriff singer sketch smith soldier sonata song "
        "speech squire statute stranger student surgeon tailor teacher tenant theater trader treaty tutor uncle "
        "verdict verse village visitor voyage waiter warden weaver widow witness writer"
    ).split(),
    "examples": "biscuit butter carrot cheese cookie cracker dumpling garlic ginger lemon muffin onion pepper".split(),
}


def most_names(part: Part) -> int:
    """Return how many names a part has."""
    return len(_ADJECTIVES) * len(_NOUNS[part])


def draw_names(rng: Generator, part: Part, count: int) -> list[str]:
    """Return this many different names, such as "quiet-lantern". Raises DataError when there are not so many."""
    nouns, most = _NOUNS[part], most_names(part)
    if count > most:
        raise DataError(f"{count} names are asked for and {most} can be told apart; ask for a shorter length")
    chosen = rng.choice(most, size=count, replace=False)
    return [f"{_ADJECTIVES[one // len(nouns)]}-{nouns[one % len(nouns)]}" for one in chosen.tolist()]


def draw_numbers(rng: Generator, count: int, digits: int = 7) -> list[str]:
    """Return this many different numbers of so many digits, none of which begins with 0."""
    lowest: int = 10 ** (digits - 1)
    return [str(lowest + one) for one in rng.choice(9 * lowest, size=count, replace=False).tolist()]


_ONSETS: Sequence[str] = "b d f g k l m n p r s t v z".split()
_VOWELS: Sequence[str] = "a e i o u".split()


def draw_words(rng: Generator, count: int) -> list[str]:
    """Return this many different made-up words of six letters, such as "bakelo". Raises DataError beyond 343,000."""
    kinds = len(_ONSETS) * len(_VOWELS)
    if count > kinds**3:
        raise DataError(f"{count} words are asked for and {kinds**3} can be told apart; ask for a shorter length")
    words = []
    for one in rng.choice(kinds**3, size=count, replace=False).tolist():
        word = ""
        for _ in range(3):
            one, syllable = divmod(one, kinds)
            word += _ONSETS[syllable // len(_VOWELS)] + _VOWELS[syllable % len(_VOWELS)]
        words.append(word)
    return words
