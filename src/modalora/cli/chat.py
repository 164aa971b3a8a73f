"""`modalora chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalora.cli import options
from modalora.cli.loading import open_model

if TYPE_CHECKING:
    from modalora.assistant import Assistant

HELP = """/image FILE    add a picture to your next message       /audio FILE   add a recording
/NAME FILE     add what a further modality reads, such as /dna gene.fasta
/route [NAME]  show the last route, or use auto/none/an adapter from now on
/system TEXT   start anew with a system message           /retry        answer the last message again
/reset         start anew                                 /save FILE    write the conversation as one JSON line
/help          this text                                  /exit         leave (so does Ctrl-D)"""


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
    session = Session(open_model(model, adapter, modality_file, dtype=dtype, device=device), settings)
    if sys.stdin.isatty():
        print(f"{model}: /help lists the commands, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        session.take(line)


class Session:
    """The messages so far and what waits for the next one."""

    def __init__(self, assistant: Assistant, settings: dict[str, Any]) -> None:
        self.assistant, self.settings = assistant, settings
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.route = "auto"

    def take(self, line: str) -> None:
        """Carry out one line; an error is printed and changes nothing."""
        from modalora.errors import ModaloraError

        try:
            word, _, rest = line.strip().partition(" ")
            if word.startswith("/"):
                self._command(word, rest.strip())
            elif line.strip() or self.waiting:
                text = [{"type": "text", "text": line.strip()}] if line.strip() else []
                self._say(self.messages, [*self.waiting, *text])
                self.waiting = []
        except ModaloraError as error:
            print(f"! {error}")

    def _command(self, word: str, rest: str) -> None:
        if word[1:] in self.assistant.processor.kinds:
            self._attach(word[1:], rest)
        elif word == "/route":
            self._route(rest)
        elif word == "/system":
            self.messages, self.waiting = ([{"role": "system", "content": rest}] if rest else []), []
        elif word == "/reset":
            self.messages, self.waiting = [], []
        elif word == "/retry":
            self._retry()
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            print(HELP)
        else:
            print(f"! unknown command {word}; /help lists the commands")

    def _attach(self, kind: str, name: str) -> None:
        part = {"type": kind, kind: str(_path(name))}
        self.assistant.processor([[{"role": "user", "content": [part]}]])  # a bad file is refused here
        self.waiting.append(part)
        print(f"[{kind} {name} goes with your next message]")

    def _say(self, before: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
        asked = [*before, {"role": "user", "content": parts}]
        answer = ""
        for piece in self.assistant.stream(asked, route=self.route, **self.settings):
            print(piece, end="", flush=True)
            answer += piece
        print()
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _retry(self) -> None:
        from modalora.errors import ModaloraError

        if not self.messages or self.messages[-1]["role"] != "assistant":
            print("! nothing to retry yet")
            return
        seed = self.settings["seed"]
        self.settings["seed"] += 1
        try:
            self._say(self.messages[:-2], self.messages[-2]["content"])
        except ModaloraError:
            self.settings["seed"] = seed
            raise

    def _route(self, name: str) -> None:
        from modalora.cli.route import lines

        if name:
            self.assistant.processor.router((), name)  # an unknown one is refused here
            self.route = name
        elif self.messages:
            batch = self.assistant.processor([self.messages], route=self.route)
            print("\n".join(lines(self.assistant.explain(batch)[0])[:5]))
        print(f"[route {self.route}]")

    def _save(self, name: str) -> None:
        if not name:
            print("! give a file: /save chat.jsonl")
            return
        path = _path(name)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"! {name} cannot be written: {error.strerror}")
            return
        print(f"[saved to {name}]")


def _path(name: str) -> Path:
    """Return the path that a line names, ~ for one's own folder. Raises PromptError for a user there is none of."""
    from modalora.errors import PromptError

    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise PromptError(f"{name!r} is no path: {error}") from None
