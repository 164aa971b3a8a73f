"""Short text conversations that give a small base model its chat manners, and the arithmetic that its other senses
need.

Questions about a picture or a recording are first asked about their description in words: the frozen decoder then
knows how to count, compare and add, and an adapter only has to make it see and hear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from modalora.data.numbers import DIGITS, number_words
from modalora.data.questions import questions
from modalora.data.rows import Conversation, conversation, judged
from modalora.data.scenes import COLORS, KINDS, SIZES, caption, free_scene, nlvr_like
from modalora.data.speech import Clip, speech_questions
from modalora.data.statements import nlvr_case, statement
from modalora.data.text import check_stream, window
from modalora.processing.tokenizer import TextTokenizer

Pair = tuple[str, str]

_FACTS = (
    ("What color is grass?", "green"), ("What color is snow?", "white"), ("What color is coal?", "black"),
    ("What color is the sky?", "blue"), ("What color is a banana?", "yellow"), ("What color is blood?", "red"),
    ("What is the opposite of big?", "small"), ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"), ("What is the opposite of day?", "night"),
    ("What is the opposite of left?", "right"), ("What is the opposite of true?", "false"),
    ("How many days are in a week?", "seven"), ("How many months are in a year?", "twelve"),
    ("How many legs does a dog have?", "four"), ("How many legs does a bird have?", "two"),
    ("What does a cow give?", "milk"), ("Where do fish live?", "in water"), ("What do bees make?", "honey"),
    ("What comes after Monday?", "Tuesday"), ("What comes after Friday?", "Saturday"),
    ("What comes before Sunday?", "Saturday"), ("What season comes after winter?", "spring"),
    ("What season comes after summer?", "autumn"), ("What is frozen water called?", "ice"),
    ("What do we use to write?", "a pen"), ("What do we use to see?", "our eyes"),
    ("What do we use to hear?", "our ears"), ("What has three sides?", "a triangle"),
    ("What has four equal sides?", "a square"),
)  # fmt: skip
_MANNERS = (
    (("Hello!", "Hi!", "Good morning!", "Hello, how are you?"), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am nano, a very small model. I can read, look at pictures of shapes, and hear spoken digits.",
    ),
    (("Thank you.", "Thanks!", "Thank you very much."), "You are welcome."),
    (("Goodbye.", "Bye!", "See you tomorrow."), "Goodbye!"),
    (
        ("What can you do?", "How can you help me?", "Help me."),
        (
            "I can answer short questions, copy text, add small numbers, count, go on with a story, "
            "describe pictures of shapes, and write down spoken digits."
        ),
    ),
)  # fmt: skip
_VALUES = (*COLORS, *KINDS, *SIZES, *DIGITS)  # what recall says of things
LONGEST = 200  # ids of running text that a passage is cut from, at most


def instruct(stream: np.ndarray, tokenizer: TextTokenizer) -> Callable[[Generator], Conversation]:
    """Return a source of text conversations. stream: token ids of running text, as token_stream gives them.

    Raises DataError when the text is shorter than a passage.
    """
    check_stream(stream, LONGEST)
    makers: tuple[tuple[float, Callable[[Generator], Conversation]], ...] = (
        (0.47, described_scene),
        (0.11, described_digits),
        (0.11, sums),
        (0.06, lambda rng: repetition(stream, tokenizer, rng)),
        (0.10, lambda rng: recall(stream, tokenizer, rng)),
        (0.03, lambda rng: story(stream, tokenizer, rng)),
        (0.12, lambda rng: conversation([], [_small(stream, tokenizer, rng) for _ in range(int(rng.integers(2, 9)))])),
    )
    shares = [share for share, _ in makers]
    return lambda rng: makers[rng.choice(len(makers), p=shares)][1](rng)


# what a caption settles; places in a picture it does not
_TOLD = tuple("count color presence comparison shape size list tally".split())


def described_scene(rng: Generator) -> Conversation:
    """Return questions about a scene given as its caption, and statements where it shows towers."""
    draw = rng.random()
    if draw < 0.5:
        scene, sentence, truth = nlvr_case(rng, towers=1.0)
        more = judged(*statement(scene, rng))
        pairs = [judged(sentence, truth), *questions(scene, rng, 10, (*_TOLD, "position")), more]
    else:
        scene = nlvr_like(rng, towers=0.0) if draw < 0.78 else free_scene(rng)
        pairs = list(questions(scene, rng, 12, (*_TOLD, "position") if scene.boxes > 1 else _TOLD))
    (question, answer), *rest = pairs
    return conversation([], [(f"Picture: {caption(scene)}\n{question}", answer), *rest])


def described_digits(rng: Generator) -> Conversation:
    """Return questions about a row of digits in words."""
    words = tuple(DIGITS[index] for index in rng.integers(10, size=int(rng.integers(1, 8))))
    pairs = speech_questions(Clip(np.zeros(1, dtype=np.float32), 8000, words), rng)[2:]
    rng.shuffle(pairs)
    (question, answer), *rest = pairs[:8]
    return conversation([], [(f"Digits: {' '.join(words)}\n{question}", answer), *rest])


def sums(rng: Generator) -> Conversation:
    """Return sums and differences up to forty: among other small questions a model meets too few to learn them."""
    return conversation([], [_sum(rng) for _ in range(int(rng.integers(4, 13)))])


_REPEAT = ("Repeat: ", "Copy this: ", "Say this again: ")


def repetition(stream: np.ndarray, tokenizer: TextTokenizer, rng: Generator) -> Conversation:
    """Return passages to be said again, in order or shuffled: what makes a small model look back.

    A model that never met enough repetition cannot answer from its context at all.
    """
    pairs = []
    for _ in range(int(rng.integers(1, 4))):
        words = _words(stream, tokenizer, rng, 40)
        if rng.random() < 0.5:
            rng.shuffle(words)
        text = " ".join(words)
        pairs.append((str(rng.choice(_REPEAT)) + text, text))
    return conversation([], pairs)


def recall(stream: np.ndarray, tokenizer: TextTokenizer, rng: Generator) -> Conversation:
    """Return a list of things with something said of each, and a question about most of them."""
    words = list(dict.fromkeys(word.lower() for word in _words(stream, tokenizer, rng, 40)))
    names = words[: int(rng.integers(1, 1 + max(1, min(10, len(words)))))]
    values = [str(rng.choice(_VALUES)) for _ in names]
    given = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    order = rng.permutation(len(names))
    pairs = [(f"What is {names[at]}?", values[at]) for at in order]
    if rng.random() < 0.3:
        asked = str(rng.choice(values))
        pairs.append((f"Which are {asked}?", ", ".join(n for n, v in zip(names, values, strict=True) if v == asked)))
    (question, answer), *rest = pairs
    return conversation([], [(f"Remember: {given}\n{question}", answer), *rest])


def story(stream: np.ndarray, tokenizer: TextTokenizer, rng: Generator) -> Conversation:
    """Return a passage of a book as question and what follows it as answer."""
    ids = window(stream, LONGEST, rng)
    cut = int(rng.integers(25, 80))
    asked = str(rng.choice(("Continue the story: ", "Continue: ", "What happens next? ")))
    before, after = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + 70])
    return conversation([], [(asked + before, after.strip())])


def _small(stream: np.ndarray, tokenizer: TextTokenizer, rng: Generator) -> Pair:
    draw = rng.random()
    if draw < 0.30:
        return _sum(rng)
    if draw < 0.50:
        return _count(rng)
    if draw < 0.80:
        return _copy(_words(stream, tokenizer, rng), rng)
    if draw < 0.93:
        question, answer = _FACTS[rng.integers(len(_FACTS))]
        return question, answer
    asked, answer = _MANNERS[rng.integers(len(_MANNERS))]
    return str(rng.choice(asked)), answer


def _sum(rng: Generator) -> Pair:
    one, two = int(rng.integers(0, 21)), int(rng.integers(0, 21))
    if rng.random() < 0.4:
        one, two = max(one, two), min(one, two)
        word, sign, value = "minus", "-", one - two
    else:
        word, sign, value = "plus", "+", one + two
    if rng.random() < 0.5:
        return f"What is {number_words(one)} {word} {number_words(two)}?", number_words(value)
    return f"What is {one} {sign} {two}?", str(value)


def _count(rng: Generator) -> Pair:
    draw = rng.random()
    low = int(rng.integers(0, 15))
    high = low + int(rng.integers(1, 6))
    numbers = [number_words(value) for value in range(low, high + 1)]
    if draw < 0.3:
        return f"Count from {numbers[0]} to {numbers[-1]}.", " ".join(numbers)
    if draw < 0.45:
        return f"Count down from {numbers[-1]} to {numbers[0]}.", " ".join(numbers[::-1])
    if draw < 0.65:
        return f"What number comes after {numbers[0]}?", numbers[1]
    if draw < 0.8:
        return f"Which is bigger, {numbers[0]} or {numbers[-1]}?", numbers[-1]
    word, times = str(rng.choice(("apple", "dog", "red", "star", "tree", "hello"))), int(rng.integers(1, 6))
    return f"Say {word} {number_words(times)} times.", " ".join([word] * times)


def _copy(words: Sequence[str], rng: Generator) -> Pair:
    draw = rng.random()
    text = " ".join(words)
    if draw < 0.5:
        return str(rng.choice(_REPEAT)) + text, text
    if draw < 0.65:
        return f"What is the first word of: {text}", words[0]
    if draw < 0.8:
        return f"What is the last word of: {text}", words[-1]
    return f"How many words are in: {text}", number_words(len(words))


def _words(stream: np.ndarray, tokenizer: TextTokenizer, rng: Generator, most: int = 8) -> list[str]:
    ids = window(stream, 128, rng)
    words = [word for word in tokenizer.decode(ids[:96]).split() if word.isalpha()][1:-1]
    return words[: int(rng.integers(2, most + 1))] or ["yes"]
