"""What is asked, as messages: words, media given beside them, and tags that say where in the words these stand.

In words given as a string <image>, <audio> and, of any modality, <|image_1|> are places of media: as many tags as media
of a kind, or no tag and all media before the words. The words of a content part are text, whatever they hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from modalora.contracts import Message
from modalora.errors import PromptError
from modalora.processing.tokenizer import PLACEHOLDERS

Payload = Any  # a path, bytes, an open file, what `datasets` holds; a PIL image or array; (samples, rate)
Payloads = Payload | Sequence[Payload]


def conversation(
    question: str | Sequence[Message],
    image: Payloads = (),
    audio: Payloads = (),
    media: Mapping[str, Any] | None = None,
) -> list[Message]:
    """Return a question, or messages, with the media beside it at their places. Raises PromptError."""
    if isinstance(question, str):
        return question_messages(question, image, audio, media)
    if isinstance(question, Mapping) or not isinstance(question, Sequence):
        raise PromptError(f"question={question!r:.60} must be a string or a list of messages")
    by_kind = media_by_kind(image, audio, media)
    messages: list[Any] = list(question)
    spoken = [place for place, message in enumerate(messages) if _is_spoken(message)]
    placed, used = _placed([messages[place]["content"] for place in spoken], by_kind)
    if left := [kind for kind, held in by_kind.items() if held and kind not in used]:
        raise PromptError(
            f"{', '.join(left)} was given beside a list of messages; put it into the content of one, as the part "
            f"{{'type': '{left[0]}', '{left[0]}': ...}}, or write <|{left[0]}_1|> where it belongs"
        )
    for place, parts in zip(spoken, placed, strict=True):
        if any(part["type"] != "text" for part in parts):
            messages[place] = {**messages[place], "content": parts}
    return messages


def question_messages(
    question: str, image: Payloads = (), audio: Payloads = (), media: Mapping[str, Any] | None = None
) -> list[Message]:
    """Return one user message with its media: where its tags are, or all before the text.

    Raises PromptError when the text has tags of a kind, and not one for each of its media.
    """
    by_kind = media_by_kind(image, audio, media)
    (parts,), used = _placed([question], by_kind)
    first = [{"type": kind, kind: item} for kind, held in by_kind.items() if kind not in used for item in held]
    if not first and not parts:
        raise PromptError("the question is empty and there are no media; write a question, or give an image or audio")
    return [{"role": "user", "content": [*first, *parts]}]


def check_open(messages: Sequence[Message]) -> None:
    """Refuse a conversation in which there is nothing to answer; what else is wrong with it is told elsewhere."""
    last = messages[-1] if messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise PromptError(
            "the last message is the assistant's own; leave that out or add a user's, or let the model go on inside an "
            "answer: ask(prompt, raw=True), the prompt written with its control tokens"
        )


def _is_spoken(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "user" and isinstance(message.get("content"), str)


def _placed(
    texts: Sequence[str], by_kind: Mapping[str, Sequence[Payload]]
) -> tuple[list[list[dict[str, Any]]], set[str]]:
    """Return texts as parts with media at their tags, and the kinds that have tags.

    A tag without a number has the next of its kind, over all texts.
    """
    plain, known = "|".join(PLACEHOLDERS), "|".join(map(re.escape, by_kind))
    tag = re.compile(rf"<({plain})>|<\|({known})_(\d+)\|>")
    numbers: dict[str, list[str]] = {}
    placed: list[list[dict[str, Any]]] = []
    for text in texts:
        parts: list[dict[str, Any]] = []
        at = 0
        for match in tag.finditer(text):
            kind = match[1] or match[2]
            own = numbers.setdefault(kind, [])
            own.append(match[3] or str(len(own) + 1))
            parts += [{"type": "text", "text": text[at : match.start()]}, {"type": kind, kind: own[-1]}]
            at = match.end()
        parts.append({"type": "text", "text": text[at:]})
        placed.append([part for part in parts if part.get("text") != ""])
    for kind, own in numbers.items():
        _check_numbers(kind, own, len(by_kind[kind]))
    for part in (part for parts in placed for part in parts if part["type"] != "text"):
        part[part["type"]] = by_kind[part["type"]][int(part[part["type"]]) - 1]
    return placed, set(numbers)


def _check_numbers(kind: str, numbers: Sequence[str], given: int) -> None:
    if len(numbers) != given:
        raise PromptError(
            f"the text has {len(numbers)} {kind} placeholder(s) and {given} {kind}(s) were given; give as many as "
            f"there are <{kind}> or <|{kind}_N|> tags, or no tags to put the media first ('< {kind}>' is none)"
        )
    if set(numbers) != {str(number) for number in range(1, given + 1)}:
        raise PromptError(
            f"the {kind} placeholders are numbered {', '.join(numbers):.60}; number them 1 to {given}, each once: "
            f"<|{kind}_1|> is the first {kind} given"
        )


def media_by_kind(image: Payloads, audio: Payloads, media: Mapping[str, Any] | None) -> dict[str, list[Payload]]:
    """Return what was given of each modality, image and audio always among them. Raises PromptError."""
    if media is not None and not isinstance(media, Mapping):
        raise PromptError(f"media={media!r:.60} must be {{modality: payload}}, such as {{'motion': 'wrist.csv'}}")
    if wrong := [kind for kind in media or {} if not isinstance(kind, str)]:
        raise PromptError(f"media has {wrong[0]!r:.40} as a modality's name; names are strings, such as 'motion'")
    found = {"image": _listed(image), "audio": _listed(audio)}
    for kind, given in (media or {}).items():
        found[kind] = [*found.get(kind, ()), *_listed(given)]
    return found


def _listed(media: Payloads) -> list[Payload]:
    if isinstance(media, list | tuple) and len(media) > 0 and all(isinstance(one, Real) for one in media):
        return [media]  # one series of numbers
    if isinstance(media, list | tuple) and len(media) == 2 and _is_pair(*media):
        return [media]
    if isinstance(media, list):
        return media
    if isinstance(media, tuple):
        return list(media)
    return [] if media is None else [media]


def _is_pair(first: Any, second: Any) -> bool:
    """Tell whether two things are one sound, (samples, rate), or meant as one, (samples, "16000"), not two media."""
    if isinstance(second, str):
        return second.isdecimal() and not isinstance(first, str | bytes | os.PathLike)
    return isinstance(second, Real)
