"""Many questions from a file, and an answer to each: rows of the forms that training reads (data/forms.py).

A row is asked up to its last answer, which is left out where it has one; so a file of training rows can be asked as it
is. An answer is one line of JSON; a row that cannot be asked has "error" in its line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.assistant import Answer, Assistant
    from modalora.contracts import Message
    from modalora.data.files import Records
    from modalora.errors import InputError
    from modalora.processing.processor import Processor


class Rows:
    """The rows of a file as conversations, up to what is to be answered.

    unread: fields of what was read so far that say nothing to a model, and in how many rows.
    """

    def __init__(
        self, records: Records, root: Path, form: str = "auto", rename: str = "{}", tags: str = "true"
    ) -> None:
        """root: the folder that media paths are relative to and may not leave. form, rename, tags: see data/corpus.py.

        Raises ConfigError.
        """
        from modalora.config.yaml import read
        from modalora.data.forms import FORMS, Options
        from modalora.errors import ConfigError

        names, tagged = read(rename, "--rename"), read(tags, "--tags")
        if form not in ("auto", *FORMS):
            raise ConfigError(f"--form {form!r:.40} must be auto or one of {', '.join(FORMS)}")
        if not isinstance(names, dict) or not all(isinstance(one, str) for pair in names.items() for one in pair):
            raise ConfigError(f"--rename {rename!r:.60} must be names and names, such as '{{question: instruction}}'")
        if not isinstance(tagged, bool):
            raise ConfigError(f"--tags {tags!r:.40} must be true or false")
        self.records, self.form = records, form
        self.options = Options(root, names, tags=tagged, setting="--")
        self.unread: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.records)

    def suit(self, processor: Processor) -> None:
        """Read further modalities as this model does."""
        self.options = replace(self.options, more=processor.further)

    def read(self, number: int) -> list[Message]:
        """Return one, counted from 0. Raises DataError."""
        from modalora.data.forms import read_question

        messages, unread = read_question(self.records.read(number), self.form, self.options)
        self.unread.update(unread)
        return [_parted(message) for message in messages]

    def where(self, number: int) -> str:
        """Return where in which file one stands."""
        return f"{self.records.path}, {self.records.unit} {self.records.line(number)}"

    def digest(self, number: int, settings: Any) -> str:
        """Return what tells a row that is so asked from others; of media in files of their own it knows the names."""
        from modalora.errors import InputError

        try:
            held: Any = self.records.read(number)
        except InputError as error:
            held = str(error)
        return hashlib.sha256(repr((held, settings)).encode(errors="backslashreplace")).hexdigest()[:8]

    def tell_unread(self) -> None:
        """Say on standard error which fields were not read."""
        if self.unread:
            listed = ", ".join(f"{name} ({count:,})" for name, count in self.unread.items())
            print(f"{self.records.path}: fields that are not read: {listed}", file=sys.stderr)


def _parted(message: dict[str, Any]) -> Message:
    """Return a message whose words are a part: in a string, tags that are mere text would be places of media."""
    words = message["content"]
    return {**message, "content": [{"type": "text", "text": words}]} if isinstance(words, str) else message


def answer_rows(assistant: Assistant, rows: Rows, answers: Answers, batch: int, settings: Mapping[str, Any]) -> None:
    """Answer the rows behind those that are answered, `batch` at a time; row N has the seed of the settings + N - 1.

    settings: of Assistant.ask_each. Raises PromptError where they leave no room for any prompt.
    """
    from modalora.errors import InputError
    from modalora.processing.questions import question_messages

    assistant.check_room(int(assistant.processor.measure(question_messages("?"))), settings["max_tokens"])
    rows.suit(assistant.processor)
    if answers.count:
        print(f"{answers.name} has {answers.count:,} of {len(rows):,} rows, and is gone on with", file=sys.stderr)
    with _progress(answers.count, len(rows)) as done:
        for start in range(answers.count, len(rows), batch):
            numbers = range(start, min(start + batch, len(rows)))
            read = {number: _read(rows, number) for number in numbers}
            good = {number: one for number, one in read.items() if not isinstance(one, InputError)}
            seeds = [settings["seed"] + number for number in good]
            found = assistant.ask_each([*good.values()], rows=batch, **{**settings, "seed": seeds})
            for number, one in read.items():
                answer = one if isinstance(one, InputError) else next(found)
                answers.write(_line(rows, number, answer))
                done()
    rows.tell_unread()
    if answers.bad:
        print(f'{answers.bad:,} of {len(rows):,} rows could not be asked: see "error" in their lines', file=sys.stderr)


def _read(rows: Rows, number: int) -> list[Message] | InputError:
    from modalora.errors import InputError

    try:
        return rows.read(number)
    except InputError as error:
        return error


def _line(rows: Rows, number: int, found: Answer | InputError) -> dict[str, Any]:
    from modalora.errors import InputError

    if isinstance(found, InputError):
        return {"row": number + 1, "error": f"{rows.where(number)}: {found}"}
    return {
        "row": number + 1,
        "text": found.text,
        "finish_reason": found.finish_reason,
        "route": found.route["adapter"],
        "usage": dict(found.usage),
        **({"content": found.content, "tool_calls": list(found.tool_calls)} if found.tool_calls else {}),
    }


class Answers:
    """Where answers go: standard output, or a file that is gone on with where it was left.

    count, bad: lines that it has, and those of them with an error.
    """

    def __init__(self, rows: Rows, settings: Any, file: FileIO | None = None) -> None:
        """settings: all that an answer depends on beside its row. file: open for reading and adding.

        Raises ConfigError where it holds something else than answers to the first rows, asked so.
        """
        self.rows, self.settings, self.file, self.name = rows, settings, file, file.name if file else ""
        self.count = self.bad = 0
        if file is None:
            return
        file.seek(0)
        data = file.readall()
        *lines, tail = data.split(b"\n")
        for line in lines:
            self._take(line)
        begun = b'{"row": %d, ' % (self.count + 1)
        if not (begun.startswith(tail) or tail.startswith(begun)):  # else cut off as it was written
            raise self._wrong(f"is no answer to row {self.count + 1}")
        file.truncate(len(data) - len(tail))

    def _take(self, line: bytes) -> None:
        try:
            held = json.loads(line)
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict) or held.get("row") != self.count + 1:
            raise self._wrong(f"is no answer to row {self.count + 1}")
        if self.count == len(self.rows):
            raise self._wrong(f"answers more than the {self.count:,} rows of {self.rows.records.path}")
        if held.get("asked") != self.rows.digest(self.count, self.settings):
            raise self._wrong("answers another row, or was asked of another model or with other settings")
        self.count += 1
        self.bad += "error" in held

    def _wrong(self, why: str) -> InputError:
        from modalora.errors import ConfigError

        return ConfigError(f"--output {self.name}, line {self.count + 1} {why}; name a new file")

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line and see that it is there."""
        if self.file is None:
            print(to_json(line), flush=True)
        else:
            told = {**line, "asked": self.rows.digest(self.count, self.settings)}
            data = json.dumps(told, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            while data:  # a full disk takes a part, and then says so
                data = data[self.file.write(data) :]
        self.count += 1
        self.bad += "error" in line


@contextmanager
def open_answers(path: Path | None, rows: Rows, settings: Any) -> Iterator[Answers]:
    """Give where answers go; a file for this process alone, and none where nothing was written. Raises ConfigError."""
    from modalora.errors import ConfigError

    if path is None:
        yield Answers(rows, settings)
        return
    new = not path.exists()
    if not new and not path.is_file():
        raise ConfigError(f"--output {path} is no file; name one, or leave --output out to have the lines printed")
    if not new and path.samefile(rows.records.path):
        raise ConfigError(f"--output {path} is the file of --rows; name a new file")
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go with any handle of it: it is read by this one
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"another process writes to --output {path}; wait for it, or name a new file") from None
        answers = Answers(rows, settings, file)
        try:
            yield answers
        except KeyboardInterrupt:
            print(f"modalora: stopped behind row {answers.count:,}; the same command goes on there", file=sys.stderr)
            raise
        finally:
            if new and not answers.count:
                path.resolve().unlink()


@contextmanager
def _progress(done: int, rows: int) -> Iterator[Any]:
    """Give a function that counts one more row, on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), redirect_stdout=False, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=rows, completed=done)
        yield lambda: progress.advance(task)
