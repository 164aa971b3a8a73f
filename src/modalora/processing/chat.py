"""Phi's chat format: messages to pieces of text, control tokens and media, in reading order.

<|role|>content<|end|> for every message, no spaces or newlines between; tools stand inside the system message.
Source: model card of Phi-4-multimodal-instruct; see docs/papers.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modalora.contracts import Message
from modalora.errors import PromptError
from modalora.processing.tokenizer import ASSISTANT, END, PLACEHOLDERS

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: kind "text", "control", or a modality with its payload."""

    kind: str
    value: Any
    trained: bool = False  # the assistant's own words, which a training loss counts


def render(messages: Sequence[Message], *, answer: bool = True) -> list[Piece]:
    """Return the pieces of a conversation; answer appends the tag after which the assistant speaks.

    Raises PromptError for an unknown role or part, naming the message.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"messages must be a non-empty list of {{'role', 'content'}}; got {messages!r:.80}")
    pieces: list[Piece] = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"{where} must be a mapping with 'role' and 'content'; got {message!r:.80}")
        role = message["role"]
        if role not in ROLES:
            raise PromptError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
        trained = role == "assistant" and bool(message.get("loss", True))
        pieces.append(Piece("control", f"<|{role}|>"))
        pieces.extend(_content(message.get("content"), where, trained))
        if role == "system" and message.get("tools"):
            tools = message["tools"]
            text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
            pieces += [Piece("control", "<|tool|>"), Piece("text", text), Piece("control", "<|/tool|>")]
        pieces.append(Piece("control", END, trained))
    if answer:
        pieces.append(Piece("control", ASSISTANT))
    return pieces


def as_text(pieces: Sequence[Piece]) -> str:
    """Return the prompt as it is shown to people; media as numbered tags."""
    shown: list[str] = []
    counts: dict[str, int] = {}
    for piece in pieces:
        if piece.kind in PLACEHOLDERS:
            counts[piece.kind] = counts.get(piece.kind, 0) + 1
            shown.append(f"<|{piece.kind}_{counts[piece.kind]}|>")
        else:
            shown.append(piece.value)
    return "".join(shown)


def _content(content: Any, where: str, trained: bool) -> list[Piece]:
    if isinstance(content, str):
        return [Piece("text", content, trained)] if content else []
    if content is None:
        raise PromptError(f"{where} has no content; give a string or a list of parts")
    if not isinstance(content, Sequence):
        raise PromptError(f"{where} has content of type {type(content).__name__}; give a string or a list of parts")
    return [_part(part, f"{where}, part {number}", trained) for number, part in enumerate(content, start=1)]


def _part(part: Any, where: str, trained: bool) -> Piece:
    kinds = ("text", *PLACEHOLDERS, "image_url", "input_audio")
    if not isinstance(part, Mapping) or part.get("type") not in kinds:
        got = part.get("type") if isinstance(part, Mapping) else part
        raise PromptError(f"{where} has type {got!r:.40}; use one of {', '.join(kinds)}")
    kind = part["type"]
    if kind not in part:
        raise PromptError(f"{where} has no {kind!r}; the payload stands under the key that its type names")
    payload = part[kind]
    if kind == "text":
        if not isinstance(payload, str):
            raise PromptError(f"{where} has text of type {type(payload).__name__}; give a string")
        return Piece("text", payload, trained)
    if kind == "image_url":
        url = payload.get("url") if isinstance(payload, Mapping) else payload
        return Piece("image", _inline(url, where))
    if kind == "input_audio":
        data = payload.get("data") if isinstance(payload, Mapping) else payload
        return Piece("audio", _inline(data, where, bare=True))
    return Piece(kind, payload)


def _inline(url: Any, where: str, *, bare: bool = False) -> bytes:
    """Return the bytes of a base64 data URL, or of bare base64 where OpenAI's format has that."""
    if isinstance(url, str) and (bare or url.startswith("data:")):
        _, comma, data = url.partition(",")
        try:
            return base64.b64decode(data if comma else url, validate=True)
        except ValueError:  # binascii.Error is one; text beyond ASCII raises its parent
            pass
    raise PromptError(f"{where} must hold base64 data ('data:...;base64,...'); nothing is fetched from the network")
