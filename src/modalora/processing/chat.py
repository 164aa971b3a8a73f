"""Phi's chat formats: messages to pieces of text, control tokens and media, in reading order.

<|role|>content<|end|> for every message, tools inside the system message, calls of them behind the assistant's words.
Phi-4 has nothing between, Phi-3 newlines.
Fields of a message or a part that are not read are refused, unless they are empty or of IGNORED.
Templates that come with a model are never run: a format is code here, or not read.
Source: model cards of Phi-4-multimodal-instruct and Phi-3-mini-4k-instruct; see docs/papers.md.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from modalora.contracts import Message
from modalora.errors import PromptError
from modalora.processing.tokenizer import ASSISTANT, END, END_OF_TEXT, PLACEHOLDERS, TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
READ = ("role", "content", "tools", "tool_calls", "loss")  # fields of a message
CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"  # around the JSON list of an answer's calls
IGNORED = ("id", "tool_call_id")  # names that OpenAI's API gives, which say nothing to a model
_MARKS = {"wav": (b"RIFF", b"RF64"), "flac": (b"fLaC",), "ogg": (b"OggS",)}  # first bytes by format


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How messages are joined.

    begin: a control token before everything. default_system: system text where the messages have none.
    """

    after_role: str = ""
    after_end: str = ""
    begin: str | None = None
    default_system: str | None = None


FORMATS = {
    "phi4": ChatFormat(),
    "phi3": ChatFormat(after_role="\n", after_end="\n"),
    "phi3-small": ChatFormat(after_role="\n", after_end="\n", begin=END_OF_TEXT),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: kind "text", "control", or a modality with its payload."""

    kind: str
    value: Any
    trained: bool = False  # the assistant's own words, which a training loss counts


def render(
    messages: Sequence[Message],
    *,
    answer: bool = True,
    chat: ChatFormat = FORMATS["phi4"],
    kinds: Collection[str] = tuple(PLACEHOLDERS),
) -> list[Piece]:
    """Return the pieces of a conversation; answer appends the tag after which the assistant speaks.

    kinds: modalities that a part may have as its type, with the payload under the same key.
    Raises PromptError for an unknown role or part, naming the message.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"messages must be a non-empty list of {{'role', 'content'}}; got {messages!r:.80}")
    pieces = [Piece("control", chat.begin)] if chat.begin else []
    if chat.default_system and not any(isinstance(one, Mapping) and one.get("role") == "system" for one in messages):
        messages = [{"role": "system", "content": chat.default_system}, *messages]
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        check_message(message, where)
        _check_fields(message, (*READ, *IGNORED), where)
        role = message["role"]
        trained = role == "assistant" and bool(message.get("loss", True))
        pieces += [Piece("control", f"<|{role}|>"), Piece("text", chat.after_role, trained)]
        calls = message.get("tool_calls")
        content = message.get("content")
        tools = read_tools(message.get("tools"), where)
        said = "" if content is None and (calls or tools) else content
        pieces.extend(_content(said, where, trained, kinds))
        if calls:
            told = [_call(call, f"{where}, call {place}") for place, call in enumerate(calls, start=1)]
            written = _as_json(told, "arguments", where)
            pieces += [
                Piece("control", CALL, trained),
                Piece("text", written, trained),
                Piece("control", CALL_END, trained),
            ]
        if tools:
            pieces += [Piece("control", "<|tool|>"), Piece("text", tools), Piece("control", "<|/tool|>")]
        pieces += [Piece("control", END, trained), Piece("text", chat.after_end)]
    if answer:
        pieces += [Piece("control", ASSISTANT), Piece("text", chat.after_role)]
    return _joined(pieces)


def check_message(message: Any, where: str) -> None:
    """Refuse what is no message, whatever its content. where: what errors call it. Raises PromptError."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"{where} is {message!r:.60}; give a mapping with 'role' and 'content'")
    role = message["role"]
    if role not in ROLES:
        raise PromptError(f"{where} has role {role!r:.40}; use one of {', '.join(ROLES)}")
    if message.get("function_call"):
        raise PromptError(f"{where} has function_call, which is not read; write it as tool_calls")
    if (calls := message.get("tool_calls")) and role != "assistant":
        raise PromptError(f"{where} has tool_calls, which the assistant's messages hold; move them there")
    if calls and not isinstance(calls, list | tuple):
        raise PromptError(f"{where} has tool_calls={calls!r:.40}; give a list of calls, as OpenAI's API does")
    for place, call in enumerate(calls or (), start=1):
        _call(call, f"{where}, call {place}")
    if read_tools(message.get("tools"), where) and role != "system":
        raise PromptError(f"{where} has tools, which the system message holds; move them there")


def read_tools(tools: Any, where: str) -> str:
    """Return the text by which a model knows its tools, "" for none. Raises PromptError for what defines none.

    tools: a list of definitions, or one alone, with a name each, as they are or under "function"; or their JSON, whose
    bytes are kept.
    """
    told = tools
    if isinstance(tools, str):
        with suppress(ValueError, RecursionError):  # told below, as it was given
            told = json.loads(tools)
    if not told:
        return ""
    for one in told if isinstance(told, list | tuple) else [told]:
        function = (one.get("function") or one) if isinstance(one, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]):
            raise PromptError(
                f"{where} has tools={tools!r:.60}; give a list of definitions with a name each, or its JSON as a string"
            )
    return tools if isinstance(tools, str) else _as_json(tools, "tools", where)


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call of OpenAI's API as the model writes it. Raises PromptError."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type") not in ("function", None):
        raise PromptError(
            f"{where} is {call!r:.60}; write {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}"
        )
    _check_fields(call, ("type", "function", *IGNORED), where)
    _check_fields(function, ("name", "arguments"), where)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where} has name={name!r:.40}; give the name of a tool")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # told below, as it was given
            arguments = json.loads(arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise PromptError(
            f"{where} has arguments={function.get('arguments')!r:.60}; give an object of names and values, or its JSON"
        )
    return {"name": name, "arguments": dict(arguments)}


def read_calls(ids: Sequence[int], tokenizer: TextTokenizer) -> tuple[str, tuple[dict[str, Any] | str, ...]]:
    """Return the words of an answer, and the calls in it as `render` takes both: OpenAI's content and tool_calls.

    What stands between the tokens of a call and is no JSON of calls, or is cut off, is returned as its text.
    """
    if not (tokenizer.has_control(CALL) and tokenizer.has_control(CALL_END)):
        return tokenizer.decode(ids), ()
    start, stop = tokenizer.control(CALL), tokenizer.control(CALL_END)
    words: list[int] = []
    found: list[dict[str, Any] | str] = []
    at = 0
    while start in ids[at:]:
        begin = ids.index(start, at)
        end = ids.index(stop, begin) if stop in ids[begin:] else len(ids)
        words += ids[at:begin]
        found += read_call(tokenizer.decode(ids[begin + 1 : end]))
        at = end
    return tokenizer.decode([*words, *ids[at:]]), tuple(found)


def read_call(text: str) -> list[dict[str, Any] | str]:
    """Return the calls that JSON tells, of one or a list, as OpenAI's API has them; else the text."""
    try:
        told = json.loads(text)
        calls = [_call({"function": call}, "it") for call in (told if isinstance(told, list) else [told])]
        written = [_as_json(call["arguments"], "arguments", "it") for call in calls]  # Python reads NaN, JSON has none
    except (ValueError, RecursionError, PromptError):
        return [text]
    found: list[dict[str, Any] | str] = [
        {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        for call, arguments in zip(calls, written, strict=True)
    ]
    return found or [text]


def read_part(part: Any, where: str, kinds: Collection[str], empty: Collection[str] = ()) -> tuple[str, Any]:
    """Return the kind of a content part, "text" or a modality, and its payload.

    OpenAI's image_url becomes an image, its payload the URL as it is; input_audio becomes audio, decoded.
    kinds: the modalities. empty: those whose parts may stand without payload, which is None then. Raises PromptError.
    """
    kinds = ("text", *kinds, "image_url", "input_audio")
    if not isinstance(part, Mapping) or part.get("type") not in kinds:
        got = part.get("type") if isinstance(part, Mapping) else part
        raise PromptError(f"{where} has type {got!r:.40}; use one of {', '.join(kinds)}")
    kind = part["type"]
    payload = part.get(kind)
    if payload is None and kind not in empty:
        raise PromptError(
            f"{where} has no {kind!r}; write the payload in the part: {{'type': '{kind}', '{kind}': ...}}"
        )
    _check_fields(part, ("type", kind), where)
    if kind == "text" and not isinstance(payload, str):
        raise PromptError(f"{where} has text of type {type(payload).__name__}; give a string")
    if kind == "image_url":
        fields = payload if isinstance(payload, Mapping) else {"url": payload}
        _check_fields(fields, ("url", "detail"), where)
        if (detail := fields.get("detail")) not in (None, "auto", "high"):
            raise PromptError(f"{where} has detail={detail!r:.40}; pictures are read whole: 'high', or scale it down")
        return "image", fields.get("url")
    if kind == "input_audio":
        fields = payload if isinstance(payload, Mapping) else {"data": payload}
        _check_fields(fields, ("data", "format"), where)
        data = _inline(decode_base64(fields.get("data"), bare=True), where)
        _check_format(fields.get("format"), data, where)
        return "audio", data
    return kind, payload


def _check_fields(given: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuse what would be lost; None and empty values, as APIs and tables fill in, mean nothing."""
    for name, value in given.items():
        if name not in known and value is not None and not (isinstance(value, str | list | Mapping) and not value):
            raise PromptError(
                f"{where} has {name!r:.40}, which is not read; take it out, or write it into the text (read here: "
                f"{', '.join(known)})"
            )


def _check_format(told: Any, data: bytes, where: str) -> None:
    found = next((name for name, marks in _MARKS.items() if data.startswith(marks)), None)
    if told is not None and (told not in (*_MARKS, "mp3") or (found and found != told)):
        rule = f"its bytes are {found}; write that" if found else f"write one of {', '.join(_MARKS)}, mp3, or none"
        raise PromptError(f"{where} has format={told!r:.40}; {rule}")


def decode_base64(text: Any, *, bare: bool = False) -> bytes | None:
    """Return the bytes of a base64 data URL, or None. bare: base64 alone will do, where OpenAI's format has that."""
    if not isinstance(text, str):
        return None
    head, comma, data = text.partition(",")
    if not (re.fullmatch(r"data:.*;base64", head) if comma else bare):
        return None
    try:
        return base64.b64decode(data if comma else text, validate=True)
    except ValueError:  # binascii.Error is one; text beyond ASCII raises its parent
        return None


def render_raw(
    prompt: str,
    media: Mapping[str, Sequence[Any]],
    known: Collection[str],
    kinds: Collection[str] = tuple(PLACEHOLDERS),
) -> list[Piece]:
    """Return the pieces of a prompt that is already in its model's format: here text does become control tokens.

    media: payloads by modality, used in reading order at <|image_N|>, <|audio_N|> and so on for all kinds. known: the
    control tokens there are; any other mark stays text. Raises PromptError for an empty prompt, and when tags and media
    differ in number.
    """
    if not prompt:
        raise PromptError("the raw prompt is empty; give at least one token")
    kinds = tuple(dict.fromkeys((*kinds, *media)))
    waiting = {kind: iter(media.get(kind, ())) for kind in kinds}
    counts = dict.fromkeys(kinds, 0)
    pieces: list[Piece] = []
    marks = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    for part in re.split(rf"(<\|\w+_\d+\|>|{marks})" if marks else r"(<\|\w+_\d+\|>)", prompt):
        tag = re.fullmatch(r"<\|(\w+)_\d+\|>", part)
        if tag and (kind := tag[1]) in counts:
            counts[kind] += 1
            pieces += [Piece(kind, payload) for payload in itertools.islice(waiting[kind], 1)]
        elif part:
            pieces.append(Piece("control" if part in known else "text", part))
    for kind, count in counts.items():
        if count != len(media.get(kind, ())):
            raise PromptError(
                f"the raw prompt has {count} <|{kind}_N|> tags and {len(media.get(kind, ()))} {kind}(s) were given; "
                "give as many as there are tags"
            )
    return _joined(pieces)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring text, which a loss treats alike, as one stretch is tokenised otherwise than two."""
    joined: list[Piece] = []
    for piece in pieces:
        if piece.kind != "text":
            joined.append(piece)
        elif joined and joined[-1].kind == "text":
            joined[-1] = Piece("text", joined[-1].value + piece.value, piece.trained)
        elif piece.value:
            joined.append(piece)
    return joined


def _content(content: Any, where: str, trained: bool, kinds: Collection[str]) -> list[Piece]:
    if isinstance(content, str):
        return [Piece("text", content, trained)] if content else []
    if content is None:
        raise PromptError(f"{where} has no content; give a string or a list of parts")
    if not isinstance(content, Sequence):
        raise PromptError(f"{where} has content of type {type(content).__name__}; give a string or a list of parts")
    return [_part(part, f"{where}, part {number}", trained, kinds) for number, part in enumerate(content, start=1)]


def _part(part: Any, where: str, trained: bool, kinds: Collection[str]) -> Piece:
    kind, payload = read_part(part, where, kinds)
    if part["type"] == "image_url":
        payload = _inline(decode_base64(payload), where)
    return Piece(kind, payload, trained and kind == "text")


def _as_json(told: Any, what: str, where: str) -> str:
    try:
        return json.dumps(told, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where} has {what} that JSON cannot hold ({error}); write them as a string") from None


def _inline(data: bytes | None, where: str) -> bytes:
    if data is None:
        raise PromptError(f"{where} must hold base64 data ('data:...;base64,...'); nothing is fetched from the network")
    return data
