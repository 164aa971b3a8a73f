"""`modalora chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from modalora.cli import options
from modalora.cli.loading import open_model, unused

if TYPE_CHECKING:
    from modalora.assistant import Assistant

HELP = """/image FILE    add a picture to your next message       /audio FILE   add a recording
/NAME FILE     add what a further modality reads, such as /dna gene.fasta
/drop          take what was added out again
/route [NAME]  show the last answer's route, or use auto/none/an adapter from now on
/system TEXT   start anew with a system message           /retry        answer the last message again
/reset         start anew                                 /save FILE    write the conversation as one JSON line
/help          this text                                  /exit         leave (so does Ctrl-D)
Ctrl-C stops an answer; twice at the prompt it leaves."""


def chat(
    model: options.Model = "nano",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
) -> None:
    """Talk with a model; it streams its answers. /help lists the commands.

    Example: modalora chat nano
    """
    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    _check(max_tokens, temperature, seed)
    session = Session(open_model(model, adapter, modality_file, dtype=dtype, device=device), settings)
    for name in unused(session.assistant, adapter, session.route):
        print(f"! the adapter {name!r} is loaded and not used yet: /route {name}", file=sys.stderr)
    if session.terminal:
        print(f"{model}: /help lists the commands, Ctrl-D leaves")
    asked_to_leave = False
    while True:
        try:
            line = input("> " if session.terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            if asked_to_leave or not session.terminal:
                raise
            asked_to_leave = True
            print("\n[Ctrl-C again leaves, as Ctrl-D does]")
            continue
        asked_to_leave = False
        if line.strip() == "/exit":
            break
        try:
            session.take(line)
        except KeyboardInterrupt:
            if not session.terminal:
                raise
            print("\n[stopped]")
    if session.exit_code and not session.terminal:
        raise typer.Exit(session.exit_code)


def _check(max_tokens: int, temperature: float, seed: int) -> None:
    """Refuse bad settings before a model is loaded. Raises ConfigError."""
    from modalora.generation.engine import check_max_tokens
    from modalora.generation.sampling import Sampling

    Sampling(temperature=temperature, seed=seed)
    check_max_tokens(max_tokens)


class Session:
    """The messages so far and what waits for the next one; media are held as they were when they were added."""

    def __init__(self, assistant: Assistant, settings: dict[str, Any]) -> None:
        self.assistant, self.settings = assistant, settings
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.files: dict[bytes, str] = {}  # where held media came from, for /save
        self.route = "auto"
        self.answered: tuple[list[dict[str, Any]], str] | None = None  # what was answered last, and by which route
        self.terminal = sys.stdin.isatty()
        self.exit_code = 0  # of the last line that could not be carried out

    def take(self, line: str) -> None:
        """Carry out one line; an error is printed and changes nothing. Ctrl-C is passed on, a begun answer kept."""
        from modalora.errors import ModaloraError

        try:
            word, _, rest = line.strip().partition(" ")
            if word.startswith("/"):
                self._command(word, rest.strip())
            elif line.strip() or self.waiting:
                text = [{"type": "text", "text": line.strip()}] if line.strip() else []
                self._say(self.messages, [*self.waiting, *text])
        except ModaloraError as error:
            self._refuse(str(error), error.exit_code)

    def _refuse(self, why: str, exit_code: int = 2) -> None:
        self.exit_code = exit_code
        print(f"! {why}", file=sys.stdout if self.terminal else sys.stderr)

    def _command(self, word: str, rest: str) -> None:
        if word[1:] in self.assistant.processor.kinds:
            self._attach(word[1:], rest)
        elif word == "/drop":
            self._drop()
        elif word == "/route":
            self._route(rest)
        elif word == "/system":
            self._begin([{"role": "system", "content": rest}] if rest else [])
        elif word == "/reset":
            self._drop()
            self._begin([])
        elif word == "/retry":
            self._retry()
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            print(HELP)
        else:
            self._refuse(f"unknown command {word}; /help lists the commands")

    def _begin(self, messages: list[dict[str, Any]]) -> None:
        self.messages, self.answered = messages, None

    def _drop(self) -> None:
        if self.waiting:
            print(f"[dropped: {', '.join(part['type'] for part in self.waiting)}]")
        self.waiting = []

    def _attach(self, kind: str, name: str) -> None:
        path = _path(name, f"/{kind}")
        part: dict[str, Any] = {"type": kind, kind: str(path)}
        self.assistant.processor([[{"role": "user", "content": [part]}]])  # a bad file is refused here
        if kind in ("image", "audio"):  # a further modality may read from paths alone
            part[kind] = path.read_bytes()
            self.files[part[kind]] = str(path)
        self._room([*self.messages, {"role": "user", "content": [*self.waiting, part]}])
        self.waiting.append(part)
        print(f"[{kind} {name} goes with your next message]")

    def _room(self, asked: list[dict[str, Any]]) -> int:
        """Return how many tokens an answer may have. Raises PromptError where that is none."""
        from modalora.errors import PromptError

        processor = self.assistant.processor
        tokens = processor.measure(asked)
        if tokens >= processor.window:
            raise PromptError(
                f"with this the conversation is {tokens} tokens and the model reads {processor.window}, its answer "
                "included; /reset starts anew, /drop takes out what was added to this message"
            )
        return processor.window - tokens

    def _say(self, before: list[dict[str, Any]], parts: list[dict[str, Any]]) -> str:
        asked = [*before, {"role": "user", "content": parts}]
        room, answer = self._room(asked), ""
        settings = {**self.settings, "max_tokens": min(room, self.settings["max_tokens"])}
        try:
            for piece in self.assistant.stream(asked, route=self.route, **settings):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            if answer:
                self._keep(asked, answer)
            raise
        print()
        self._keep(asked, answer)
        if settings["max_tokens"] < self.settings["max_tokens"]:
            print(f"[the window is nearly full: {room} tokens were left for this answer; /reset starts anew]")
        return answer

    def _keep(self, asked: list[dict[str, Any]], answer: str) -> None:
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.answered = asked, self.route
        said = asked[-1]["content"]
        self.waiting = [part for part in self.waiting if not any(part is own for own in said)]

    def _retry(self) -> None:
        from modalora.errors import ModaloraError

        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._refuse("nothing to retry yet")
            return
        seed, old = self.settings["seed"], self.messages[-1]["content"]
        self.settings["seed"] += 1
        try:
            if self._say(self.messages[:-2], self.messages[-2]["content"]) == old and not self.settings["temperature"]:
                print("[the same: a greedy answer does not change; begin with --temperature 0.7 for others]")
        except ModaloraError:
            self.settings["seed"] = seed
            raise

    def _route(self, name: str) -> None:
        from modalora.cli.route import lines

        if name:
            self.assistant.processor.router((), name)  # an unknown one is refused here
            self.route = name
        elif self.answered:
            asked, route = self.answered
            batch = self.assistant.processor([asked], route=route)
            record = self.assistant.explain(batch, max_tokens=self.settings["max_tokens"])[0]
            print("\n".join(lines(record)[:5]))
        print(f"[route {self.route}]")

    def _saved(self, message: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return a message as a row of training has it: media as paths from the folder, absolute where not in it."""
        content = message["content"]
        if isinstance(content, str):
            parts = _untagged(content)
            return {**message, "content": parts if len(parts) > 1 else content}
        told = [self._saved_part(part, folder.resolve()) for part in content]
        return {**message, "content": [own for parts in told for own in parts]}

    def _saved_part(self, part: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        kind, payload = part["type"], part[part["type"]]
        if kind == "text":
            return _untagged(payload)
        path = Path(self.files.get(payload, payload)).resolve()
        told = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        return [{"type": kind, kind: told if kind in ("image", "audio") else {"path": told}}]

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        if not any(message["role"] == "assistant" for message in self.messages):
            self._refuse("nothing to save yet")
            return
        saved = {"messages": [self._saved(message, path.parent) for message in self.messages]}
        line = json.dumps(saved, ensure_ascii=False)
        try:
            with path.open("ab+") as file:
                file.seek(0)
                held = file.read()
                file.write(b"\n" * (held[-1:] not in (b"", b"\n")) + line.encode(errors="backslashreplace") + b"\n")
        except OSError as error:
            self._refuse(f"{name} cannot be written: {error.strerror or error}")
            return
        count = len(held.splitlines())
        print(f"[appended to {name} as line {count + 1}]" if count else f"[saved to {name}]")


def _untagged(text: str) -> list[dict[str, Any]]:
    """Return words as parts, cut within their tags: whole, rows of training take these as places of media."""
    from modalora.data.forms import TAG

    cuts = [match.start() + 1 for match in TAG.finditer(text)]
    return [{"type": "text", "text": text[start:stop]} for start, stop in pairwise([0, *cuts, len(text)])]


def _path(name: str, command: str) -> Path:
    """Return the path that a line names, with quotes around it or not, ~ for one's own folder. Raises PromptError."""
    from modalora.errors import PromptError

    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]
    if not name or "\0" in name:
        raise PromptError(f"{command} {name!r} names no file; write {command} and the path of one")
    if "://" in name or name.startswith("data:"):  # Path would make "//" one
        raise PromptError(f"{name!r:.80} is a URL, and {command} takes a file; download it and give its path")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise PromptError(f"{name!r} is no path: {error}") from None
