"""The front door: `modalora.load(...)`, then `.ask`, `.stream`, `.logits`."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from modalora import modality
from modalora.checkpoint.adapters import Verdict, load_adapter
from modalora.checkpoint.store import load_model, save_model
from modalora.contracts import Batch, Message, terms
from modalora.errors import CheckpointError, ConfigError, PromptError, RouteError
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling
from modalora.generation.windows import Switch, check_switch, explain_table
from modalora.models.multimodal import MODALITIES, ModelConfig, Multimodal
from modalora.models.router import route as route_of
from modalora.nn.rope import LongRope, Regime
from modalora.processing.chat import FORMATS, ChatFormat, read_calls
from modalora.processing.processor import Compat, Processor
from modalora.processing.spans import spans
from modalora.processing.tokenizer import Growing, TextTokenizer

BUNDLED = Path(__file__).parent / "bundled"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Media = Any  # a path, bytes, a PIL image, or (samples, sample_rate)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    finish_reason: "stop", "length" or "tool_calls". route: the row's record of `explain`. usage: token counts as OpenAI
    names them. tool_calls: the calls of tools that it holds, as OpenAI has them; text has their JSON as well. To go on,
    add {"role": "assistant", "content": None, "tool_calls": ...} to the messages, and the results.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    route: Mapping[str, Any]
    usage: Mapping[str, int]
    seconds: float
    tool_calls: tuple[dict[str, Any] | str, ...] = ()


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
        image: Media | Sequence[Media] = (),
        audio: Media | Sequence[Media] = (),
        media: Mapping[str, Any] | None = None,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        raw: bool = False,
        switch: Switch = "crossing",
        **sampling: Any,
    ) -> Answer:
        """Answer a question, or go on from a list of messages.

        image, audio: one or several (paths, bytes, PIL images, (samples, rate)); they stand before the text unless it
        has tags: the first of a kind at <|image_1|>, and so on. media: the same for further modalities, {name: one
        payload or a list of them}. Messages hold their media themselves, as parts, and end with what is to be answered.
        route: "auto", "none" or an adapter. sampling: fields of generation.sampling.Sampling.
        raw: the question is a whole prompt in the model's own format, whose control tokens count as such; else they are
        text. switch: when a row changes to the rotary table of longer rows (generation.windows.Switch): "crossing",
        once it outgrows the original window, or "planned", from the start if prompt and max_tokens together do.
        Raises PromptError, MediaError, RouteError, ConfigError; WorkError where the model's logits are no numbers.
        """
        if not isinstance(question, Sequence):
            raise PromptError(f"question={question!r:.60} must be a string or a list of messages")
        _check_bool("raw", raw)
        if raw:
            batch = self.raw_batch(question, image=image, audio=audio, media=media, route=route)
            return self._answers(batch, max_tokens, stop, switch, sampling)[0]
        if isinstance(question, str):
            messages = question_messages(question, image, audio, media)
        elif given := [kind for kind, own in _by_kind(image, audio, media).items() if own]:
            raise PromptError(
                f"{', '.join(given)} was given beside a list of messages; put it into the content of one, as the part "
                f"{{'type': '{given[0]}', '{given[0]}': ...}}"
            )
        else:
            messages = list(question)
        return self.ask_many([messages], max_tokens=max_tokens, route=route, stop=stop, switch=switch, **sampling)[0]

    def raw_batch(
        self,
        prompt: str | Sequence[Message],
        *,
        image: Media | Sequence[Media] = (),
        audio: Media | Sequence[Media] = (),
        media: Mapping[str, Any] | None = None,
        route: str = "auto",
    ) -> Batch:
        """Return a prompt that is already in the model's own format as a batch of one row."""
        if not isinstance(prompt, str):
            raise PromptError("a raw prompt must be one string, with its control tokens in it; messages are not raw")
        row = self.processor.raw_row(prompt, _by_kind(image, audio, media))
        return self.processor.collate([row], route=route, labelled=False)

    def ask_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        switch: Switch = "crossing",
        **sampling: Any,
    ) -> list[Answer]:
        """Answer several conversations in one batch, whatever media each holds; each answer is what it would be
        alone."""
        if isinstance(conversations, str | Mapping) or not isinstance(conversations, Sequence):
            raise PromptError(f"conversations={conversations!r:.60} must be a list of message lists")
        for number, messages in enumerate(conversations, start=1):
            _check_open(messages, f"conversation {number}" if len(conversations) > 1 else "the conversation")
        return self._answers(self.processor(conversations, route=route), max_tokens, stop, switch, sampling)

    def _answers(
        self, batch: Batch, max_tokens: int, stop: str | Sequence[str], switch: Switch, sampling: Mapping[str, Any]
    ) -> list[Answer]:
        started = time.perf_counter()
        stop = _stops(stop)
        batch = self._prompt(batch, max_tokens)
        ids: list[list[int]] = [[] for _ in batch.input_ids]
        finish = ["stop"] * len(ids)
        for token in self._generate(batch, max_tokens, stop, switch, sampling):
            if token.finish != "stop" or token.id not in self.stop_ids:
                ids[token.row].append(token.id)
            finish[token.row] = token.finish or finish[token.row]
        seconds = time.perf_counter() - started
        answers: list[Answer] = []
        routes = self.explain(batch, max_tokens=max_tokens, switch=switch)
        for row, new in enumerate(ids):
            prompt = int(batch.lengths[row])
            usage = {"prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new)}
            text = _cut(self.processor.tokenizer.decode(new), stop)
            calls = read_calls(new, self.processor.tokenizer)
            finish[row] = "tool_calls" if calls and finish[row] == "stop" else finish[row]
            answers.append(Answer(text, tuple(new), finish[row], routes[row], usage, seconds, calls))
        return answers

    def stream(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 128,
        route: str = "auto",
        stop: str | Sequence[str] = (),
        switch: Switch = "crossing",
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the answer in pieces of whole characters as they come; the pieces together are `ask`'s text."""
        stop = _stops(stop)
        conversation = question_messages(messages) if isinstance(messages, str) else messages
        _check_open(conversation, "the conversation")
        batch = self._prompt(self.processor([conversation], route=route), max_tokens)
        growing, text, sent = Growing(self.processor.tokenizer), "", ""
        held_back = max((len(word) for word in stop), default=1) - 1  # a stop string may have begun
        for token in self._generate(batch, max_tokens, stop, switch, sampling):
            if token.id not in self.stop_ids:
                text = growing.add(token.id)
            known = _cut(text, stop)
            if token.finish is None:
                known = known.rstrip("\ufffd")  # the rest of a character is still to come
                known = known[: max(len(sent), len(known) - held_back)]
            if len(known) > len(sent):
                yield known[len(sent) :]
                sent = known

    @torch.no_grad()
    def logits(self, messages: str | Sequence[Message], *, route: str = "auto") -> Tensor:
        """Return logits, (time, vocab) float32, of the rendered prompt including its media spans."""
        conversation = question_messages(messages) if isinstance(messages, str) else messages
        batch = self.processor([conversation], route=route).to(self.device)
        return self.model(batch)[0].float()

    def explain(self, batch: Batch, *, max_tokens: int = 128, switch: Switch = "crossing") -> list[dict[str, Any]]:
        """Return per row: adapter and scale, projector branches, rotary table, and what each token range is.

        max_tokens, switch: of the answer that would follow, which decide the table.
        """
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

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.decoder.embed_tokens.weight.device

    def check_room(self, batch: Batch, max_tokens: int) -> None:
        """Raise ConfigError or PromptError unless an answer of max_tokens fits behind every prompt."""
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral):
            raise ConfigError(f"max_tokens={max_tokens!r:.40} must be a whole number, such as 128")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
        longest = int(batch.lengths.max())
        room = self.processor.window - longest
        if max_tokens > room:
            lower = f"lower max_tokens to {room} or shorten the prompt" if room else "shorten the prompt"
            raise PromptError(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} exceed this model's window of "
                f"{self.processor.window}; {lower}"
            )

    def _prompt(self, batch: Batch, max_tokens: int) -> Batch:
        self.check_room(batch, max_tokens)
        return batch.to(self.device)

    def _generate(
        self, batch: Batch, max_tokens: int, stop: Sequence[str], switch: Switch, sampling: Mapping[str, Any]
    ) -> Iterator[Any]:
        check_switch(self.model.config.decoder.rope, switch)
        growing = [Growing(self.processor.tokenizer) for _ in batch.input_ids]

        def stops(row: int, ids: list[int]) -> bool:
            text = growing[row].add(ids[-1])
            return any(word in text for word in stop)

        known = Sampling.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise ConfigError(f"unknown sampling setting {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = Sampling(**sampling)
        return generate(
            self.model, batch, sampling=chosen, max_tokens=max_tokens, stop_ids=self.stop_ids,
            stops=stops if stop else None, switch=switch,
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
    return Assistant(loaded.model, processor, folder, notes=loaded.notes)


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


def find_model(name: str | Path) -> Path:
    """Return the folder of a model: a path, or the name of a bundled model.

    "bundled/NAME" is the same, for recipes, where a bare nano means fresh weights of that size.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"the model {name!r:.60} must be a folder, or the name of a bundled model")
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{str(name)!r} is a file; give the folder of a model")
    short = str(name).removeprefix("bundled/")
    if (BUNDLED / short).is_dir():
        return BUNDLED / short
    bundled = ", ".join(sorted(folder.name for folder in BUNDLED.glob("*/") if (folder / "config.json").exists()))
    raise CheckpointError(
        f"no model folder {str(name)!r}; give a folder, or a bundled model ({bundled or 'none here'})"
    )


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


def question_messages(
    question: str,
    image: Media | Sequence[Media] = (),
    audio: Media | Sequence[Media] = (),
    media: Mapping[str, Any] | None = None,
) -> list[Message]:
    """Return one user message with its media: the first of a kind at <|image_1|> and so on, or all before the text.

    Raises PromptError when the text has tags of a kind, and not one for each of its media.
    """
    by_kind = _by_kind(image, audio, media)
    tag = re.compile(rf"<\|({'|'.join(map(re.escape, by_kind))})_(\d+)\|>")
    parts: list[dict[str, Any]] = []
    for kind, given in by_kind.items():
        numbers = [match[2] for match in tag.finditer(question) if match[1] == kind]
        if not numbers:
            parts += [{"type": kind, kind: item} for item in given]
        elif len(numbers) != len(given):
            raise PromptError(
                f"the text has {len(numbers)} {kind} placeholder(s) and {len(given)} {kind}(s) were given; give as "
                f"many as there are <|{kind}_N|> tags, or write no tags to put the media first"
            )
        elif set(numbers) != {str(number) for number in range(1, len(given) + 1)}:
            raise PromptError(
                f"the {kind} placeholders are numbered {', '.join(numbers):.60}; number them 1 to {len(given)}, each "
                f"once: <|{kind}_1|> is the first {kind} given"
            )
    at = 0
    for match in tag.finditer(question):
        kind = match.group(1)
        if question[at : match.start()]:
            parts.append({"type": "text", "text": question[at : match.start()]})
        parts.append({"type": kind, kind: by_kind[kind][int(match.group(2)) - 1]})
        at = match.end()
    if question[at:]:
        parts.append({"type": "text", "text": question[at:]})
    if not parts:
        raise PromptError("the question is empty and there are no media; write a question, or give an image or audio")
    return [{"role": "user", "content": parts}]


def _by_kind(image: Any, audio: Any, media: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    if media is not None and not isinstance(media, Mapping):
        raise PromptError(f"media={media!r:.60} must be {{modality: payload}}, such as {{'motion': 'wrist.csv'}}")
    if wrong := [kind for kind in media or {} if not isinstance(kind, str)]:
        raise PromptError(f"media has {wrong[0]!r:.40} as a modality's name; names are strings, such as 'motion'")
    found = {"image": _listed(image), "audio": _listed(audio)}
    for kind, given in (media or {}).items():
        found[kind] = [*found.get(kind, ()), *_listed(given)]
    return found


def _listed(media: Media | Sequence[Media]) -> list[Media]:
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


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r:.40} must be True or False")


def _check_open(messages: Sequence[Message], what: str) -> None:
    """Refuse a conversation in which there is nothing to answer; what else is wrong with it is told elsewhere."""
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise PromptError(
            f"{what} ends with the assistant's own message; leave that out or add a user's, or let the model go on "
            "inside an answer: ask(prompt, raw=True), the prompt written with its control tokens"
        )


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
