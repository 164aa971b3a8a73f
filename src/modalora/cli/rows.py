"""Many questions from a file, and an answer to each: rows of the forms that training reads (data/forms.py).

A row is asked up to its last answer, which is left out where it has one; so a file of training rows can be asked as it
is. An answer is one line of JSON; a row that cannot be asked has "error" in its line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.assistant import Answer, Assistant
    from modalora.contracts import Message
    from modalora.data.files import Records
    from modalora.data.forms import Options
    from modalora.errors import InputError

_ANSWER = "?"  # in place of the answer that a row lacks, so that it is read as one of training; taken out again


def asked(fields: Mapping[str, Any], options: Options) -> list[Message]:
    """Return the conversation of a record, up to what is to be answered. Raises DataError."""
    from modalora.data.forms import SPEAKERS, form_of, read_record

    for key, speaker, words in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = fields.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            said = SPEAKERS.get(str(turns[-1].get(speaker))) == "assistant"
            fields = {**fields, key: [*turns[: len(turns) - said], {speaker: "assistant", words: _ANSWER}]}
    if "instruction" in fields:
        fields = {**fields, "output": _ANSWER}
    return list(read_record(fields, form_of(fields), options)[:-1])


def answer_rows(
    assistant: Assistant, records: Records, root: Path, answers: Answers, batch: int, settings: Mapping[str, Any]
) -> int:
    """Answer the rows behind those that are answered, `batch` at a time, and return how many could not be asked.

    root: the folder that media paths are relative to and may not leave. settings: of Assistant.ask_each.
    """
    from modalora.data.forms import Options
    from modalora.errors import InputError
    from modalora.processing.tokenizer import PLACEHOLDERS

    options = Options(root, more=tuple(name for name in assistant.processor.media if name not in PLACEHOLDERS))
    bad = answers.bad
    with _progress(answers.rows, len(records)) as done:
        for start in range(answers.rows, len(records), batch):
            numbers = range(start, min(start + batch, len(records)))
            read = [_read(records, number, options) for number in numbers]
            found = assistant.ask_each([one for one in read if not isinstance(one, InputError)], rows=batch, **settings)
            for number, one in zip(numbers, read, strict=True):
                answer = one if isinstance(one, InputError) else next(found)
                bad += isinstance(answer, InputError)
                answers.write(_line(records, number, answer))
                done()
    return bad


def _read(records: Records, number: int, options: Options) -> list[Message] | InputError:
    from modalora.errors import InputError

    try:
        return asked(records.read(number), options)
    except InputError as error:
        return error


def _line(records: Records, number: int, found: Answer | InputError) -> dict[str, Any]:
    from modalora.errors import InputError

    if isinstance(found, InputError):
        return {"row": number + 1, "error": f"{records.path}, {records.unit} {records.line(number)}: {found}"}
    return {
        "row": number + 1,
        "text": found.text,
        "finish_reason": found.finish_reason,
        "route": found.route["adapter"],
        "usage": dict(found.usage),
        **({"tool_calls": list(found.tool_calls)} if found.tool_calls else {}),
    }


class Answers:
    """Where answers go: standard output, or a file that is gone on with where it was left.

    rows, bad: lines that the file has already, and those of them with an error.
    """

    def __init__(self, path: Path | None) -> None:
        """Look at the file. Raises ConfigError where it holds something else than answers to the first rows."""
        self.path = path
        self.rows = self.bad = 0
        if path is None:
            return
        with path.open("ab+") as file:
            file.seek(0)
            for line in file.readlines():
                if not line.endswith(b"\n"):  # cut off as it was written
                    file.truncate(file.tell() - len(line))
                    break
                self.rows += 1
                self.bad += "error" in _held(line, path, self.rows)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line and see that it is there."""
        if self.path is None:
            print(to_json(line), flush=True)
            return
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def _held(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    from modalora.errors import ConfigError

    try:
        held = json.loads(line)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or held.get("row") != number:
        raise ConfigError(f"--output {path}, line {number} is no answer to row {number}; name a new file")
    return held


@contextmanager
def _progress(done: int, rows: int) -> Iterator[Any]:
    """Give a function that counts one more row, on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), redirect_stdout=False, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=rows, completed=done)
        yield lambda: progress.advance(task)
