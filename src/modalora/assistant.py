"""The front door: `modalora.load(...)`, then `.ask`, `.stream`, `.logits`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from modalora import modality
from modalora.checkpoint.adapters import Verdict, load_adapter
from modalora.checkpoint.find import check_adapter_folder, find_model
from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.contracts import Batch, Message, terms
from modalora.errors import ConfigError, InputError, PromptError, RouteError
from modalora.generation.engine import Token, check_max_tokens, generate
from modalora.generation.sampling import Sampling
from modalora.generation.windows import Switch, check_switch, explain_table
from modalora.models.multimodal import MODALITIES, ModelConfig, Multimodal
from modalora.models.router import route as route_of
from modalora.nn.rope import LongRope, Regime
from modalora.processing.chat import FORMATS, ChatFormat, read_calls
from modalora.processing.processor import Compat, Processor, Row
from modalora.processing.questions import Payloads, check_open, conversation, media_by_kind
from modalora.processing.spans import spans
from modalora.processing.tokenizer import Growing, TextTokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROWS = 16  # conversations that are answered at a time


@dataclass(frozen=True)
class Answer:
    """What a model said.

    finish_reason: "stop", "length" or "tool_calls". route: the row's record of `explain`. usage: token counts as OpenAI
    names them. content, tool_calls: its words and the calls of tools in it, as OpenAI has them, a call that is no JSON
    as its text; `text` has words and JSON together. To go on, add {"role": "assistant", "content": ..., "tool_calls":
    ...} to the messages, and the results.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    route: Mapping[str, Any]
    usage: Mapping[str, int]
    seconds: float
    content: str = ""
    tool_calls: tuple[dict[str, Any] | str, ...] = ()


@dataclass(frozen=True)
class _Settings:
    """How rows are answered, checked. sampling: of each row; all but the seeds are the same."""

    max_tokens: int
    stop: list[str]
    switch: Switch
    sampling: list[Sampling]

    def select(self, rows: Sequence[int]) -> _Settings:
        """Return the settings of some of the rows."""
        return replace(self, sampling=[self.sampling[row] for row in rows])


@dataclass
class Assistant:
    """A loaded model with its processor.

    For one thread at a time: answers of two threads at once do not mix, but a float32 prompt on some CPUs sets for the
    whole process how products are summed (nn.products), so that another thread's last bits may differ.
    """

    model: Multimodal
    processor: Processor
    folder: Path | None = None
    stop_ids: frozenset[int] = frozenset()  # empty: the tokenizer's
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the tokenizer's stop tokens where none are named."""
        self.stop_ids = self.stop_ids or self.processor.tokenizer.stop_ids

    def ask(
        self,
        question: str | Sequence[Message],
        *,
        image: Payloads = (),
        audio: Payloads = (),
        media: Mapping[str, Any] | None = None,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        raw: bool = False,
        switch: Switch = "crossing",
        **sampling: Any,
    ) -> Answer:
        """Answer a question, or go on from a list of messages.

        image, audio: one or several: paths, bytes, files open for reading, what `datasets` holds, PIL images or uint8
        arrays, (samples, rate). media: the same for further modalities, {name: one payload or a list of them}. They
        stand before the text unless it has tags: <image>, <audio>, or by number <|image_1|>, the first of its kind.
        Messages hold their media themselves, as parts, or have such tags in a user's text; they end with what is to be
        answered. route: "auto", "none" or an adapter. sampling: fields of generation.sampling.Sampling; seed is 0
        unless given, so that a question has one answer at any temperature.
        raw: the question is a whole prompt in the model's own format, whose control tokens count as such; else they are
        text. switch: when a row changes to the rotary table of longer rows (generation.windows.Switch): "crossing",
        once it outgrows the original window, or "planned", from the start if prompt and max_tokens together do.
        Raises PromptError, MediaError, RouteError, ConfigError; WorkError where the model's logits are no numbers.
        """
        _check_bool("raw", raw)
        if not raw:
            messages = conversation(question, image, audio, media)
            alone = self.ask_many([messages], max_tokens=max_tokens, route=route, stop=stop, switch=switch, **sampling)
            return alone[0]
        settings = self._settings(max_tokens, stop, switch, sampling, 1)
        batch = self.raw_batch(question, image=image, audio=audio, media=media, route=route)
        self.check_room(int(batch.lengths[0]), max_tokens)
        return self._answers(batch, settings)[0]

    def raw_batch(
        self,
        prompt: str | Sequence[Message],
        *,
        image: Payloads = (),
        audio: Payloads = (),
        media: Mapping[str, Any] | None = None,
        route: str = "auto",
    ) -> Batch:
        """Return a prompt that is already in the model's own format as a batch of one row."""
        if not isinstance(prompt, str):
            raise PromptError("a raw prompt must be one string, with its control tokens in it; messages are not raw")
        row = self.processor.raw_row(prompt, media_by_kind(image, audio, media))
        return self.processor.collate([row], route=route, labelled=False)

    def ask_many(
        self,
        conversations: Sequence[str | Sequence[Message]],
        *,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        switch: Switch = "crossing",
        seed: int | Sequence[int] = 0,
        rows: int = ROWS,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer several questions or conversations, whatever media each holds; each answer is what it would be alone.

        rows: how many are answered at a time, which bounds the memory. seed: of all, so that equal conversations get
        equal answers; or one for each, for several answers to one. What is wrong with any is told before the first is
        answered, as far as texts and the headers of media tell.
        """
        found = self.ask_each(
            conversations, max_tokens=max_tokens, route=route, stop=stop, switch=switch, seed=seed, rows=rows,
            **sampling,
        )  # fmt: skip
        if not conversations:
            raise PromptError("no conversation was given; pass a list of message lists")
        for place, one in enumerate(conversations if len(conversations) > 1 else ()):
            try:
                messages = conversation(one)
                check_open(messages)
                self.check_room(self.processor.measure(messages), max_tokens)
            except InputError as error:
                raise _numbered(error, place, conversations) from None
        answers: list[Answer] = []
        for answer in found:
            if isinstance(answer, InputError):
                raise _numbered(answer, len(answers), conversations)
            answers.append(answer)
        return answers

    def ask_each(
        self,
        conversations: Sequence[str | Sequence[Message]],
        *,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        switch: Switch = "crossing",
        seed: int | Sequence[int] = 0,
        rows: int = ROWS,
        **sampling: Any,
    ) -> Iterator[Answer | InputError]:
        """Return what becomes of each conversation, in order: an answer, or what is wrong with it.

        Arguments as for `ask_many`. Raises ConfigError and RouteError for a setting that suits none, PromptError for
        what is no list.
        """
        if isinstance(conversations, str | bytes | Mapping) or not isinstance(conversations, Sequence):
            raise PromptError(f"conversations={conversations!r:.60} must be a list of message lists")
        if isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1:
            raise ConfigError(f"rows={rows!r:.40} must be a whole number of at least 1, such as {ROWS}")
        settings = self._settings(max_tokens, stop, switch, {**sampling, "seed": seed}, len(conversations))
        self.processor.router((), route)
        if self.processor.compat:
            rows = len(conversations) or 1  # whose media route them all
        return self._each(conversations, route, settings, rows)

    def _each(
        self, conversations: Sequence[str | Sequence[Message]], route: str, settings: _Settings, rows: int
    ) -> Iterator[Answer | InputError]:
        for start in range(0, len(conversations), rows):
            part = [self._row_or_error(one, route, settings) for one in conversations[start : start + rows]]
            good = {start + place: one for place, one in enumerate(part) if isinstance(one, Row)}
            answers: Iterator[Answer] = iter(())
            if good:
                batch = self.processor.collate([*good.values()], route=route, labelled=False)
                answers = iter(self._answers(batch, settings.select([*good])))
            yield from (one if isinstance(one, InputError) else next(answers) for one in part)

    def _row_or_error(self, question: str | Sequence[Message], route: str, settings: _Settings) -> Row | InputError:
        try:
            return self._row(conversation(question), route, settings)
        except InputError as error:
            return error

    def _row(self, messages: Sequence[Message], route: str, settings: _Settings) -> Row:
        """Return a conversation as a row that can be answered by itself."""
        check_open(messages)
        row = self.processor.row(messages)
        self.check_room(len(row.ids), settings.max_tokens)
        if not self.processor.compat:
            self.processor.router(row.kinds, route)
        return row

    def _answers(self, batch: Batch, settings: _Settings) -> list[Answer]:
        started = time.perf_counter()
        batch = batch.to(self.device)
        ids: list[list[int]] = [[] for _ in batch.input_ids]
        finish = ["stop"] * len(ids)
        for token in self._generate(batch, settings):
            if token.finish != "stop" or token.id not in self.stop_ids:
                ids[token.row].append(token.id)
            finish[token.row] = token.finish or finish[token.row]
        seconds = time.perf_counter() - started
        answers: list[Answer] = []
        routes = self.explain(batch, max_tokens=settings.max_tokens, switch=settings.switch)
        for row, new in enumerate(ids):
            prompt = int(batch.lengths[row])
            usage = {"prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new)}
            whole, kept = self.processor.tokenizer.decode(new), new
            text = _cut(whole, settings.stop)
            while len(self.processor.tokenizer.decode(kept)) > len(text):  # calls are those of the text
                kept = kept[:-1]
            words, calls = read_calls(kept, self.processor.tokenizer)
            if text == whole and finish[row] == "stop" and any(isinstance(call, dict) for call in calls):
                finish[row] = "tool_calls"
            content = words if calls else text
            answers.append(Answer(text, tuple(new), finish[row], routes[row], usage, seconds, content, calls))
        return answers

    def stream(
        self,
        question: str | Sequence[Message],
        *,
        image: Payloads = (),
        audio: Payloads = (),
        media: Mapping[str, Any] | None = None,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        switch: Switch = "crossing",
        **sampling: Any,
    ) -> Generator[str]:
        """Return the answer in pieces of whole characters as they come; the pieces together are `ask`'s text.

        `close` ends it early. Arguments and errors as for `ask`; what is wrong with them is told at once.
        """
        settings = self._settings(max_tokens, stop, switch, sampling, 1)
        row = self._row(conversation(question, image, audio, media), route, settings)
        return self._pieces(self.processor.collate([row], route=route, labelled=False).to(self.device), settings)

    def _pieces(self, batch: Batch, settings: _Settings) -> Generator[str]:
        growing, text, sent = Growing(self.processor.tokenizer), "", ""
        held_back = max((len(word) for word in settings.stop), default=1) - 1  # a stop string may have begun
        for token in self._generate(batch, settings):
            if token.id not in self.stop_ids:
                text = growing.add(token.id)
            known = _cut(text, settings.stop)
            if token.finish is None:
                known = known.rstrip("\ufffd")  # the rest of a character is still to come
                known = known[: max(len(sent), len(known) - held_back)]
            if len(known) > len(sent):
                yield known[len(sent) :]
                sent = known

    @torch.no_grad()
    def logits(self, messages: str | Sequence[Message], *, route: str = "auto") -> Tensor:
        """Return logits, (time, vocab) float32, of the rendered prompt including its media spans."""
        batch = self.processor([conversation(messages)], route=route).to(self.device)
        return self.model(batch)[0].float()

    def explain(
        self,
        asked: str | Sequence[Message] | Batch,
        *,
        route: str | None = None,
        max_tokens: int = 128,
        switch: Switch = "crossing",
    ) -> list[dict[str, Any]]:
        """Return per row: adapter and scale, projector branches, rotary table, and what each token range is.

        asked: a question, messages, or a Batch, which has its routes. route: "auto" unless given. max_tokens, switch:
        of the answer that would follow, which decide the table.
        """
        if isinstance(asked, Batch) and route is not None:
            raise ConfigError(
                f"route={route!r:.40} would change nothing: a Batch has its routes; give it to the processor"
            )
        batch = asked if isinstance(asked, Batch) else self.processor([conversation(asked)], route=route or "auto")
        return [self._explain(batch, row, max_tokens, switch) for row in range(len(batch.input_ids))]

    def explain_official(self, batch: Batch) -> list[dict[str, Any] | None]:
        """Return per row the adapter and projectors of the released code, which has one mode for a whole batch.

        None: it has no mode for this batch, or this model lacks the mode's adapter.
        """
        if not {item.modality for item in batch.media} <= set(MODALITIES):
            return [None] * len(batch.input_ids)
        try:
            rule = self.processor.router({item.modality for item in batch.media}, "auto")
        except RouteError:
            return [None] * len(batch.input_ids)
        held = [{item.modality for item in batch.media if item.row == row} for row in range(len(batch.input_ids))]
        return [{"adapter": rule.adapter, "projectors": {kind: rule.branches[kind] for kind in own}} for own in held]

    def load_adapter(self, folder: str | Path, name: str) -> Verdict:
        """Add a PEFT LoRA folder to the decoder under a name that `route` takes; return what was found in it.

        A modality or projectors that the folder brings come along. Raises CheckpointError, or ConfigError where the
        package of its modality is missing.
        """
        if not isinstance(folder, str | os.PathLike) or "\0" in str(folder) or not isinstance(name, str):
            raise ConfigError(f"load_adapter({folder!r:.60}, {name!r:.40}) takes a folder, and a name for its adapter")
        check_adapter_folder(Path(folder))
        verdict = load_adapter(self.model, Path(folder), name)
        self._renew()
        return verdict

    def add_modality(self, name: str, **sizes: Any) -> None:
        """Add an installed modality with fresh networks and a fresh adapter, to be trained; text keeps every bit.

        sizes: fields of the modality's config. Raises ConfigError.
        """
        modality.add(self.model, name, sizes)
        self._renew()

    def _renew(self) -> None:
        old = self.processor
        self.processor = make_processor(self.model.config, old.tokenizer, old.chat, old.compat)
        self.processor.media.update(old.media)

    def save(self, folder: str | Path, layout: str = "modalora") -> None:
        """Write the model to a new folder in a layout of checkpoint.names.LAYOUTS.

        Raises ConfigError for a layout that cannot hold the model, CheckpointError when the folder exists.
        """
        if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
            raise ConfigError(f"save({folder!r:.60}) takes the path of a new folder, such as 'my-model'")
        self.processor.tokenizer.stop_ids = self.stop_ids
        save_model(
            self.model, self.processor.tokenizer, Path(folder), layout=layout, chat=self.processor.chat,
            notes=self.notes, beside=self.folder,
        )  # fmt: skip

    def __repr__(self) -> str:
        """Return one line: which model, how large, what it reads, which adapters, and where it is."""
        weight = self.model.decoder.embed_tokens.weight
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"Assistant({self.folder.name if self.folder else 'unsaved'}: {numbers:,} numbers, window "
            f"{self.processor.window:,}, adapters {', '.join(self.model.adapters) or 'none'}, "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def check_room(self, tokens: int, max_tokens: int) -> None:
        """Raise PromptError unless an answer of max_tokens fits behind a prompt of so many tokens."""
        room = self.processor.window - tokens
        if max_tokens > room:
            lower = f"lower max_tokens to {room} or shorten the prompt" if room else "shorten the prompt"
            raise PromptError(
                f"a prompt of {tokens} tokens and max_tokens={max_tokens} exceed this model's window of "
                f"{self.processor.window}; {lower}"
            )

    def _settings(
        self, max_tokens: int, stop: str | Sequence[str], switch: Switch, sampling: Mapping[str, Any], rows: int
    ) -> _Settings:
        """Return how so many rows are answered. Raises ConfigError."""
        check_max_tokens(max_tokens)
        check_switch(self.model.config.decoder.rope, switch)
        known = Sampling.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise ConfigError(f"unknown sampling setting {', '.join(unknown)}; known are {', '.join(known)}")
        seed = sampling.get("seed", 0)
        if not isinstance(seed, Integral | list | tuple | range):
            raise ConfigError(f"seed={seed!r:.40} must be a whole number, or a list of one for each conversation")
        seeds = seed if isinstance(seed, list | tuple | range) else [seed] * rows
        if len(seeds) != rows:
            raise ConfigError(
                f"seed has {len(seeds)} number(s) for {rows} conversation(s); give one for each, or one number for all"
            )
        each = [Sampling(**{**sampling, "seed": one}) for one in seeds]
        return _Settings(max_tokens, _stops(stop), switch, each)

    def _generate(self, batch: Batch, settings: _Settings) -> Iterator[Token]:
        growing = [Growing(self.processor.tokenizer) for _ in batch.input_ids]

        def stops(row: int, ids: list[int]) -> bool:
            text = growing[row].add(ids[-1]).rstrip("\ufffd")  # the rest of a character may still come
            return any(word in text for word in settings.stop)

        return generate(
            self.model, batch, sampling=settings.sampling[0], max_tokens=settings.max_tokens, stop_ids=self.stop_ids,
            stops=stops if settings.stop else None, switch=settings.switch,
            seeds=[one.seed for one in settings.sampling],
        )  # fmt: skip

    def _scale(self, route: str) -> float | list[float]:
        """What an adapter's B A x is multiplied by; of a sum, one number per term.

        Where patterns give a module another rank or alpha, the factor that most modules have.
        """
        scales = []
        for name, weight in terms(route):
            held = [own.adapters[name].scaling for own in self.model.decoder.routed().values() if name in own.adapters]
            scales.append(weight * Counter(held).most_common(1)[0][0])
        return scales[0] if len(scales) == 1 else scales

    def _explain(self, batch: Batch, row: int, max_tokens: int, switch: Switch) -> dict[str, Any]:
        length = int(batch.lengths[row])
        ids = batch.input_ids[row, :length].tolist()
        media = {item.start: item for item in batch.media if item.row == row}
        places = {start: (item.modality, item.tokens) for start, item in media.items()}
        name = batch.route.adapters[row]
        return {
            "modalities": sorted({item.modality for item in media.values()}) or ["text"],
            "adapter": name,
            "scale": self._scale(name) if name else None,
            "projectors": {item.modality: item.branch for item in media.values()},
            **explain_table(self.model.config.decoder.rope, length, max_tokens, switch),
            "tokens": length,
            "spans": [
                {"kind": span.kind, "start": span.start, "stop": span.stop}
                | ({"projector": media[span.start].branch} if span.is_medium else {"text": span.text})
                for span in spans(ids, places, self.processor.tokenizer)
            ],
        }


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    rope: Regime = "reference",
    compat: Compat = None,
    pack: bool = False,
    fast_images: bool = False,
    modalities: Sequence[str | Path] = (),
) -> Assistant:
    """Load a model folder in any layout, or a bundled model by name, with its adapters.

    dtype: float32, bfloat16, float16, or auto, the stored one (int8 becomes float32). device: a torch device.
    rope: which rows use the long rotary table: "reference", those longer than the original window; "long", "short",
    all or none. compat: "official" routes a whole batch as one, as the released code of Phi-4-Multimodal does.
    pack: rearrange a bf16 model for this CPU: takes seconds, decodes up to twice as fast (where memory is not the
    limit already), and leaves a model that cannot be changed or saved.
    fast_images: prepare large photos in under half the time, their pixels under 1 % of the range off on average.
    modalities: Python files that set MODALITY, for modalities that no installed package brings; they are run.
    Raises CheckpointError or ConfigError.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if compat not in ("official", None):
        raise ConfigError(f"compat={compat!r} must be 'official' or None")
    _check_bool("pack", pack)
    _check_bool("fast_images", fast_images)
    check_device(device)
    if isinstance(modalities, str) or not isinstance(modalities, Sequence):
        raise ConfigError(f"modalities={modalities!r:.60} must be a list of Python files, such as ['motion.py']")
    for path in modalities:
        modality.load_file(path)
    folder = find_model(model)
    loaded = load_model(folder, dtype=DTYPES[dtype], device=device, pack=pack)
    set_regime(loaded.model, rope)
    processor = make_processor(loaded.model.config, loaded.tokenizer, loaded.chat, compat)
    if fast_images and processor.image is None:
        raise ConfigError("fast_images=True: this model takes no pictures; leave it out")
    if fast_images:
        picture = processor.media["image"]
        processor.media["image"] = replace(picture, settings=replace(picture.settings, fast=True))
    return Assistant(loaded.model, processor, folder.resolve(), notes=loaded.notes)  # wherever the process goes


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have. Raises ConfigError."""
    try:
        torch.device(device if isinstance(device, str | torch.device) else "")  # torch takes numbers, and None
    except RuntimeError:
        raise ConfigError(
            f"device={device!r:.40} cannot be used: it is no device of torch; 'cpu' always can, 'cuda' and 'cuda:1' "
            "where there are GPUs"
        ) from None
    try:
        found = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's builds without a kind of device assert
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason:.160}; 'cpu' always can") from None
    if found.is_meta:
        raise ConfigError("device='meta' cannot be used: it holds no numbers; 'cpu' always can")


def set_regime(model: Multimodal, regime: Regime) -> None:
    """Choose which rows use the long rotary table. Raises ConfigError for an unknown regime, or one table alone."""
    rope = model.config.decoder.rope
    if regime not in get_args(Regime):
        raise ConfigError(f"rope={regime!r} must be one of {', '.join(get_args(Regime))}")
    if regime != "reference" and not isinstance(rope, LongRope):
        raise ConfigError(f"rope={regime!r}: this model has no long and short table; leave rope at 'reference'")
    if isinstance(rope, LongRope):
        model.set_rope(replace(rope, regime=regime))


def make_processor(
    config: ModelConfig, tokenizer: TextTokenizer, chat: ChatFormat = FORMATS["phi4"], compat: Compat = None
) -> Processor:
    """Return the processor that fits a model."""
    return Processor(
        tokenizer,
        media=modality.media(config, tokenizer),
        window=config.decoder.rope.window,
        router=partial(
            route_of, adapters=tuple(config.adapters), routes=modality.routes(config), branches=config.branches
        ),
        chat=chat,
        compat=compat,
    )


def _numbered(error: InputError, place: int, conversations: Sequence[Any]) -> InputError:
    return type(error)(f"conversation {place + 1}: {error}") if len(conversations) > 1 else error


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r:.40} must be True or False")


def _stops(stop: str | Sequence[str]) -> list[str]:
    words = [stop] if isinstance(stop, str) else stop  # OpenAI takes both; a str is no list of its letters
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"stop={stop!r:.60} must be a string or a list of strings")
    if not all(words):
        raise ConfigError("stop holds an empty string, which every answer begins with; leave it out")
    return list(words)


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [text.find(word) for word in stop if word in text]
    return text[: min(ends)] if ends else text
