"""Records of the usual shapes into messages with media parts.

A form is told by the keys of a record; a file is of one form. Media stand beside the text as lists, tags say where
(<image>, <audio>, <|image_1|>); without tags they stand before the first words, as in `ask`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from modalora.data.files import Fields
from modalora.errors import DataError, PromptError
from modalora.processing.chat import check_message, decode_base64, read_call, read_part, read_tools
from modalora.processing.tokenizer import CONTROL_TOKENS, PLACEHOLDERS

Messages = list[dict[str, Any]]

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
MEDIA_FIELDS = tuple(name for kind in PLACEHOLDERS for name in (kind, f"{kind}s"))
_ANSWER = "?"  # in place of the answer that a record lacks, so that it is read as one of training; taken out again
UNREAD = ("video", "videos", "chosen", "rejected")  # fields that change what a record means and are not read


@dataclass(frozen=True)
class Form:
    """One shape of records.

    fits: whether a record has its keys. read: record to messages. keys: all it reads. turns: all it reads of a turn.
    """

    fits: Callable[[Fields], bool]
    read: Callable[[Fields, Options], Messages]
    because: str
    keys: tuple[str, ...]
    turns: tuple[str, ...] = ()

    def unread(self, fields: Fields) -> list[str]:
        """Return the fields of a record that are not read, those of its turns as messages[].NAME."""
        found = [name for name in fields if name not in (*self.keys, *MEDIA_FIELDS)]
        if not self.turns:
            return found
        listed = self.keys[0]
        names = dict.fromkeys(name for turn in fields[listed] for name, own in turn.items() if own is not None)
        return found + [f"{listed}[].{name}" for name in names if name not in self.turns]


@dataclass(frozen=True)
class Options:
    """How the records of a source are read.

    rename: name in the file -> name that the form knows. root: folder that media paths may not leave. prompt: what is
    asked of media that have a caption alone. tags: whether <image> and <audio> in texts stand for media. more: further
    modalities of the model, of which content parts hold the payload itself. setting: what stands before the name of an
    option where it is typed.
    """

    root: Path
    rename: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    tags: bool = True
    more: tuple[str, ...] = ()
    setting: str = ""


def detect(records: Mapping[str, Fields], options: Options) -> tuple[str, str]:
    """Return the form that all these records have, and why. Raises DataError when there is none or more than one.

    records: by where they stand, such as "line 7".
    """
    found: dict[str, list[str]] = defaultdict(list)
    problem = DataError("it holds no record that can be read; look at its first lines")
    for place, fields in records.items():
        try:
            found[form_of(renamed(fields, options), options.setting)].append(place)
        except DataError as error:  # a single one is a bad row when it is read
            problem = error
    if not found:
        raise problem
    most, *others = sorted(found, key=lambda name: -len(found[name]))
    if others:
        counts = ", ".join(f"{len(found[name])} {name}, the first in {found[name][0]}" for name in others)
        raise DataError(
            f"its records are of several forms (of {len(records)} looked at {len(found[most])} {most}; {counts}); "
            f"split the file, or read all as one form: {options.setting}form={most}"
        )
    return most, FORMS[most].because


def form_of(fields: Fields, setting: str = "") -> str:
    """Return the name of the one form whose keys a record has. Raises DataError. setting: see Options."""
    names = [name for name, form in FORMS.items() if form.fits(fields)]
    if len(names) == 1:
        return names[0]
    keys = ", ".join(map(repr, fields)) or "none"
    if names:
        raise DataError(f"its keys ({keys}) fit the forms {', '.join(names)} alike; name one: {setting}form={names[0]}")
    raise DataError(
        f"its keys ({keys}) fit no form; rename them ({setting}rename='{{question: instruction, answer: output}}') or "
        f"write {', '.join(f'{name} ({form.because})' for name, form in FORMS.items())}"
    )


def read_record(fields: Fields, form: str, options: Options) -> Messages:
    """Return a record as messages. Raises DataError saying what is wrong with it and what to do."""
    fields = _understood(fields, options)
    if not FORMS[form].fits(fields):
        keys = ", ".join(fields) or "none"
        raise DataError(
            f"it is not of the form {form} ({FORMS[form].because}): its keys are {keys}; give it those of the others"
        )
    try:
        messages = FORMS[form].read(fields, options)
    except PromptError as error:  # what no conversation may hold
        raise DataError(str(error)) from None
    _check_turns(messages)
    messages = _with_media(messages, fields, options)
    for number, message in enumerate(messages, start=1):
        if message["role"] == "user" and _is_empty(message["content"]):
            raise DataError(
                f"message {number}, the user's, is empty or blank; put a question there, or drop the record"
            )
    return messages


def read_question(fields: Fields, form: str, options: Options) -> tuple[Messages, list[str]]:
    """Return a record up to its last answer, which it may lack, as messages; and its fields that are not read.

    form: "auto" tells it by the keys. Raises DataError.
    """
    fields = renamed(fields, options)
    for key, speaker, words in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = fields.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            said = SPEAKERS.get(str(turns[-1].get(speaker))) == "assistant"
            fields = {**fields, key: [*turns[: len(turns) - said], {speaker: "assistant", words: _ANSWER}]}
    if "instruction" in fields:
        fields = {**fields, "output": _ANSWER}
    form = form_of(fields, options.setting) if form == "auto" else form
    return read_record(fields, form, replace(options, rename={}))[:-1], FORMS[form].unread(fields)


def read_text(fields: Fields, options: Options) -> str:
    """Return the text of a record of the form "text". Raises DataError."""
    text = _string(_understood(fields, options).get("text"), "text")
    if not text:
        raise DataError("its text is empty, so nothing in it is trained; drop the record")
    return text


def _understood(fields: Fields, options: Options) -> Fields:
    fields = renamed(fields, options)
    for key in UNREAD:
        if fields.get(key):
            raise DataError(f"it has {key!r}, which is not read; take it out, or the record means something else")
    return fields


def renamed(fields: Fields, options: Options) -> Fields:
    """Return the record under the names that forms know. Raises DataError where two fields would have one name."""
    if options.rename:
        fields = {key: value for key, value in fields.items() if value is not None}
    for key in fields:
        name = options.rename.get(key, key)
        if name != key and name in fields and options.rename.get(name, name) == name:
            raise DataError(f"rename makes {key!r} to {name!r}, and it has that too; take one out, or rename that")
    return {options.rename.get(key, key): value for key, value in fields.items()} if options.rename else fields


def control_tokens(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the control tokens that texts spell out: they are read as plain text, which may not be what was meant."""
    texts = [part for message in messages for part in _texts(message["content"])]
    return [token for token in CONTROL_TOKENS if any(token in text for text in texts)]


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


# ----------------------------------------------------------------------------------------------------- forms


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        kind = "missing" if value is None else f"of type {type(value).__name__}"
        raise DataError(f"{what} is {kind}, and must be text; write a string")
    if "\0" in value:
        raise DataError(f"{what} holds NUL characters; take them out")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} must be a list of turns and is {value!r:.60}; write at least one question and answer")
    return value


def _messages(fields: Fields, options: Options) -> Messages:
    made: Messages = []
    seen: Counter[str] = Counter()
    for number, turn in enumerate(_list(fields["messages"], "messages"), start=1):
        what = f"message {number}"
        check_message(turn, what)
        _check_media(turn, what)
        content = turn.get("content")
        tools = turn["tools"] if read_tools(turn.get("tools"), what) else None
        given = {key: one for key, one in (("tools", tools), ("tool_calls", turn.get("tool_calls"))) if one}
        if isinstance(content, list):
            _check_order(content, seen, what)
            content = [_part(part, f"{what}, part {place}", options) for place, part in enumerate(content, start=1)]
        else:
            content = "" if content is None and given else content
            content = _string(content, f"the content of {what}")
        made.append({"role": turn["role"], "content": content, **given, **_loss(turn, what)})
    return _with_tools(made, fields)


def _check_media(turn: Fields, what: str) -> None:
    """Refuse media inside a turn, which would be lost."""
    for key in (*MEDIA_FIELDS, "video", "videos"):
        if turn.get(key):
            raise DataError(f"{what} has {key!r}, which is not read there; write media beside the turns, or as parts")


def _with_tools(messages: Messages, fields: Fields) -> Messages:
    """Put the tools that stand beside the turns into the system message, which is made where there is none."""
    if not read_tools(fields.get("tools"), "it"):
        return messages
    system, rest = {"role": "system", "content": ""}, messages
    if messages[0]["role"] == "system":
        system, rest = messages[0], messages[1:]
    if system.get("tools"):
        raise DataError("it has tools beside its turns and in its system message; keep one of them")
    return [{**system, "tools": fields["tools"]}, *rest]


def _check_order(parts: Sequence[Any], seen: Counter[str], what: str) -> None:
    """Refuse parts that name another of the record's media than the next of their kind."""
    for part in parts:
        if not isinstance(part, Mapping) or (kind := part.get("type")) not in PLACEHOLDERS:
            continue
        if part.get("index", seen[kind]) not in (None, seen[kind]):
            raise DataError(f"{what} has {kind} {part['index']!r:.20} where {seen[kind]} is next; put them in order")
        seen[kind] += 1


def _loss(turn: Fields, what: str) -> dict[str, bool]:
    """Return whether an answer is trained: "loss", or "weight" as OpenAI's fine-tuning has it."""
    told = {key: turn[key] for key in ("loss", "weight") if turn.get(key) is not None}
    if not all(value in (0, 1) for value in told.values()) or len(set(told.values())) > 1:
        given = ", ".join(f"{key}={value!r:.40}" for key, value in told.items())
        raise DataError(f"{what} has {given}; write loss as true or false, or weight as 0 or 1")
    return {"loss": all(told.values())} if told else {}


def _part(part: Any, what: str, options: Options) -> dict[str, Any]:
    if isinstance(part, Mapping) and part.get("type") in PLACEHOLDERS:
        part = {key: value for key, value in part.items() if key != "index"}  # which _check_order has seen
    kind, payload = read_part(part, what, (*PLACEHOLDERS, *options.more), empty=PLACEHOLDERS)
    if kind == "text":
        payload = _string(payload, what)
    elif kind in options.more and isinstance(payload, Mapping):
        payload = _path(payload, kind, options)
    return {"type": kind, kind: payload}  # media without payload: the next of the record's


def _path(payload: Mapping[str, Any], kind: str, options: Options) -> Any:
    """Return the file that {"path": NAME} names; what a string of a further modality says is for it to know."""
    if set(payload) != {"path"}:
        return payload
    return resolve(payload["path"], kind, options)


def _sharegpt(fields: Fields, options: Options) -> Messages:
    made: Messages = []
    if fields.get("system"):
        made.append({"role": "system", "content": _string(fields["system"], "system")})
    for number, turn in enumerate(_list(fields["conversations"], "conversations"), start=1):
        if not isinstance(turn, Mapping) or str(turn.get("from")) not in SPEAKERS:
            speaker = turn.get("from") if isinstance(turn, Mapping) else turn
            raise DataError(f"turn {number} is from {speaker!r:.40}; use one of {', '.join(SPEAKERS)}")
        _check_media(turn, f"turn {number}")
        content = _string(turn.get("value"), f"the value of turn {number}")
        said: dict[str, Any] = {"content": content}
        if turn["from"] == "function_call":
            said = {"content": "", "tool_calls": _calls(content, f"turn {number}")}
        made.append({"role": SPEAKERS[turn["from"]], **said, **_loss(turn, f"turn {number}")})
    return _with_tools(made, fields)


def _calls(text: str, what: str) -> list[dict[str, Any]]:
    """Return the calls in a turn of function_call, as OpenAI's API writes them."""
    calls: list[dict[str, Any]] = [call for call in read_call(text) if not isinstance(call, str)]
    if not calls:
        raise DataError(
            f'{what}, a function_call, is {text!r:.60}; write JSON, {{"name": ..., "arguments": {{...}}}} or a list of '
            "such"
        )
    return calls


def _alpaca(fields: Fields, options: Options) -> Messages:
    made: Messages = []
    if fields.get("system"):
        made.append({"role": "system", "content": _string(fields["system"], "system")})
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is {history!r:.60}; write a list of [question, answer]")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history {number} is {pair!r:.60}; write [question, answer]")
        made += _pair(pair[0], pair[1], f"of history {number}")
    asked = _string(fields["instruction"], "instruction")
    given = "" if fields.get("input") is None else _string(fields["input"], "input")
    return made + _pair(f"{asked}\n{given}" if asked and given else asked + given, fields["output"], "")


def _pair(question: Any, answer: Any, where: str) -> Messages:
    return [
        {"role": "user", "content": _string(question, f"the question {where}".strip())},
        {"role": "assistant", "content": _string(answer, f"the answer {where}".strip())},
    ]


def _caption(fields: Fields, options: Options) -> Messages:
    return _pair(options.prompt, fields["text"], "")


def _plain(fields: Fields, options: Options) -> Messages:
    raise DataError("plain text has no turns; it is read in windows")


def _has_media(fields: Fields) -> bool:
    return any(fields.get(key) for key in MEDIA_FIELDS)


def _has_turns(fields: Fields) -> bool:
    turns = fields.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else {"from": ""}  # what is no list is told when it is read
    return "conversations" in fields and isinstance(first, Mapping) and "from" in first


FORMS: dict[str, Form] = {
    "messages": Form(
        lambda fields: "messages" in fields,
        _messages,
        "'messages' of role and content, as OpenAI's",
        ("messages", "tools"),
        ("role", "content", "tools", "tool_calls", "tool_call_id", "loss", "weight"),
    ),
    "sharegpt": Form(
        _has_turns,
        _sharegpt,
        "'conversations' of from and value",
        ("conversations", "system", "tools"),
        ("from", "value", "loss", "weight"),
    ),
    "alpaca": Form(
        lambda fields: "instruction" in fields and "output" in fields,
        _alpaca,
        "'instruction' and 'output'",
        ("instruction", "input", "output", "system", "history"),
    ),
    "caption": Form(
        lambda fields: "text" in fields and _has_media(fields),
        _caption,
        "'text' with 'images' or 'audios'",
        ("text",),
    ),
    "text": Form(
        lambda fields: "text" in fields and not _has_media(fields),
        _plain,
        "'text' alone",
        ("text",),
    ),
}


def _check_turns(messages: Messages) -> None:
    """Refuse conversations from which nothing is learnt, or not what was meant."""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            raise DataError(f"message {number} is a system message, which stands first or not at all; move it there")
        if role == "assistant" and number > 1 and messages[number - 2]["role"] == "assistant":
            raise DataError(f"messages {number - 1} and {number} are both the assistant's; join them")
        if role == "assistant" and _is_empty(message["content"]) and not message.get("tool_calls"):
            raise DataError(f"message {number}, the assistant's, is empty or blank; give an answer or drop the record")
    spoken = [message for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise DataError("it has no assistant's message, so nothing in it is trained; add an answer")
    if messages[0]["role"] == "assistant" or (messages[0]["role"] == "system" and messages[1]["role"] == "assistant"):
        raise DataError("the assistant speaks first; put the question before it")
    if not any(message["role"] == "user" for message in messages):
        raise DataError("it has no user's message; put the question before the answer")
    if not any(message.get("loss", True) for message in spoken):
        raise DataError("loss is false for every assistant's message, so nothing in it is trained; train at least one")


def _is_empty(content: Any) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return all(part["type"] == "text" and not part["text"].strip() for part in content)


# ----------------------------------------------------------------------------------------------------- media

TAG = re.compile(r"(<(?:image|audio|video)>|<\|(?:image|audio|video)_\d+\|>)")


def _with_media(messages: Messages, fields: Fields, options: Options) -> Messages:
    """Put the record's media where its tags and empty parts are, and load none of them yet."""
    waiting = {kind: _listed(fields, kind) for kind in PLACEHOLDERS}
    used = dict.fromkeys(waiting, 0)
    if any(waiting.values()) and not any(_places(message["content"], options.tags) for message in messages):
        first = next(message for message in messages if message["role"] == "user")
        parts = [{"type": kind, kind: None} for kind, held in waiting.items() for _ in held]
        own = first["content"]
        first["content"] = (
            [*parts, *([{"type": "text", "text": own}] if own else [])] if isinstance(own, str) else [*parts, *own]
        )
    for message in messages:
        message["content"] = _filled(message["content"], waiting, used, options)
    for kind, held in waiting.items():
        if used[kind] != len(held):
            raise DataError(
                f"it has {used[kind]} <{kind}> places and {len(held)} {kind}s; give as many of one as of the other"
                + ("" if held else f", or {_mere_text(options)}")
            )
    return messages


def _mere_text(options: Options) -> str:
    return f"set {options.setting}tags=false when the tag is mere text"


def _listed(fields: Fields, kind: str) -> list[Any]:
    both = [key for key in (kind, f"{kind}s") if fields.get(key) is not None]
    if len(both) > 1:
        raise DataError(f"it has both {both[0]!r} and {both[1]!r}; keep one")
    given = fields[both[0]] if both else []
    return list(given) if isinstance(given, list) else [given]


def _places(content: Any, tags: bool) -> bool:
    if isinstance(content, str):
        return tags and bool(TAG.search(content))
    return any(part["type"] in PLACEHOLDERS and part[part["type"]] is None for part in content) or any(
        tags and TAG.search(part["text"]) for part in content if part["type"] == "text"
    )


def _filled(content: Any, waiting: Mapping[str, list[Any]], used: dict[str, int], options: Options) -> Any:
    if isinstance(content, str):
        if not (options.tags and TAG.search(content)):
            return content
        content = [{"type": "text", "text": content}]
    made: list[dict[str, Any]] = []
    for part in content:
        if part["type"] in PLACEHOLDERS:
            kind, payload = part["type"], part[part["type"]]
            made.append(
                {
                    "type": kind,
                    kind: _next(kind, waiting, used, options) if payload is None else resolve(payload, kind, options),
                }
            )
            continue
        if part["type"] != "text":
            made.append(part)
            continue
        pieces = TAG.split(part["text"]) if options.tags else [part["text"]]
        for piece in pieces:
            if options.tags and TAG.fullmatch(piece):
                kind, _, place = piece.strip("<|>").partition("_")
                if kind not in waiting:
                    raise DataError(
                        f"it has the tag {piece:.40}, and no {kind} is read; drop the record, or {_mere_text(options)}"
                    )
                if place and place != str(used[kind] + 1):
                    raise DataError(
                        f"the tag {piece:.40} stands where {kind} {used[kind] + 1} belongs; number tags in order"
                    )
                made.append({"type": kind, kind: _next(kind, waiting, used, options)})
            elif piece:
                made.append({"type": "text", "text": piece})
    return made


def _next(kind: str, waiting: Mapping[str, list[Any]], used: dict[str, int], options: Options) -> Any:
    used[kind] += 1
    held = waiting[kind]
    return resolve(held[used[kind] - 1], kind, options) if used[kind] <= len(held) else b""


def resolve(value: Any, kind: str, options: Options) -> Any:
    """Return a medium as the processor takes it: a path inside the root, bytes, or (array, rate).

    value: also a data URL, and what `datasets` has: {"bytes", "path"} or {"array", "sampling_rate"}. Raises DataError.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return resolve(value["bytes"], kind, options)
        if value.get("array") is not None and kind == "audio":
            return _numbers(value["array"], kind), value.get("sampling_rate")
        inner = value.get("path") or value.get("url")
        if inner is None:
            raise DataError(f"an {kind} is {{{', '.join(map(repr, value))}}}; give a path, bytes, or a data URL")
        return resolve(inner, kind, options)
    if not isinstance(value, str):
        if value is None or isinstance(value, int | float | list):
            raise DataError(f"an {kind} is {value!r:.40}; give a path, bytes, or a data URL")
        return value
    if value.startswith("data:"):
        if (data := decode_base64(value)) is None:
            raise DataError(f"the data URL of an {kind} is not base64; write 'data:TYPE;base64,...'")
        return data
    if "://" in value:
        raise DataError(
            f"the {kind} {value!r:.60} is a URL, and nothing is fetched; download it beforehand and give its path"
        )
    if "\0" in value or not value or value.encode(errors="ignore").decode() != value:  # half of a surrogate pair
        raise DataError(f"the path of an {kind} is {value!r:.60}; give the path of a file")
    path = options.root / value
    resolved = Path(os.path.realpath(path))  # Path.resolve fails where links go round in a circle
    if not resolved.is_relative_to(options.root.resolve()):
        raise DataError(
            f"the {kind} {value!r:.80} lies outside {str(options.root)!r}; write paths from there, or set media_root"
        )
    return path


def _numbers(array: Any, kind: str) -> np.ndarray:
    try:
        return np.asarray(array, dtype=np.float32)
    except (OverflowError, TypeError, ValueError):
        raise DataError(f"the array of an {kind} is {array!r:.60}; give one number per sample") from None
