"""Messages to a Batch: chat format, tokens, media features, routes, right padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modalora.contracts import IGNORED, Batch, Media, Message, Route, Rule
from modalora.errors import MediaError, ModaloraError, PromptError
from modalora.processing.audio import AudioConfig
from modalora.processing.chat import CALL, FORMATS, ChatFormat, Piece, render, render_raw
from modalora.processing.image import ImageConfig
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer

Compat = Literal["official"] | None
_NOUNS = {"image": "picture", "audio": "sound"}


@dataclass(frozen=True, slots=True)
class Medium:
    """How one modality is read. placeholder: name and id of the token that fills its spans.

    read: (payload, settings) -> features, named tensors that the encoder takes, and the number of tokens they become.
    count: (payload, settings) -> that number alone; None: as `read` tells it.
    """

    placeholder: tuple[str, int]
    read: Callable[[Any, Any], tuple[dict[str, Tensor], int]]
    settings: Any
    count: Callable[[Any, Any], int] | None = None


class Placed(NamedTuple):
    """A medium of a row: its features, and the span of tokens that it fills."""

    modality: str
    features: dict[str, Tensor]
    start: int
    tokens: int


@dataclass
class Row:
    """One conversation as tokens; media keep their spans."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: list[Placed] = field(default_factory=list)
    sample: str = ""  # where a training row came from
    route: str | None = None  # the route that this row asks for; None: the one that `collate` is given

    @property
    def kinds(self) -> set[str]:
        """The modalities that it holds."""
        return {item.modality for item in self.media}


class Processor:
    """Turns conversations into batches for one model.

    media: the modalities that the model takes, by name. window: tokens that the model may read in one row.
    router: (modalities, requested route) -> Rule.
    chat: how messages are joined. compat: "official" routes a whole batch by all the media in it, as the released code
    of Phi-4-Multimodal does; None routes every row by its own.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        media: Mapping[str, Medium],
        window: int,
        router: Callable[[Collection[str], str], Rule],
        chat: ChatFormat = FORMATS["phi4"],
        compat: Compat = None,
    ) -> None:
        self.tokenizer, self.media, self.window, self.router = tokenizer, dict(media), window, router
        self.chat, self.compat = chat, compat

    @property
    def image(self) -> ImageConfig | None:
        """Limits and sizes of pictures; None: the model takes none."""
        return self.media["image"].settings if "image" in self.media else None

    @property
    def audio(self) -> AudioConfig | None:
        """Limits and sizes of sound; None: the model takes none."""
        return self.media["audio"].settings if "audio" in self.media else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Modalities that a conversation may hold; those without a Medium are refused by name."""
        return tuple(dict.fromkeys((*_NOUNS, *self.media)))

    @property
    def further(self) -> tuple[str, ...]:
        """Modalities beside image and audio."""
        return tuple(kind for kind in self.media if kind not in _NOUNS)

    def __call__(self, conversations: Sequence[Sequence[Message]], *, route: str = "auto") -> Batch:
        """Return the batch from which the assistant goes on, one row per conversation.

        Raises PromptError (placeholders, window), MediaError, RouteError.
        """
        if not conversations:
            raise PromptError("no conversation was given; pass a list of message lists")
        return self.collate([self.row(messages) for messages in conversations], route=route, labelled=False)

    def row(self, messages: Sequence[Message], *, answer: bool = True) -> Row:
        """Return one conversation as tokens."""
        return self._row(self._render(messages, answer))

    def raw_row(self, prompt: str, media: Mapping[str, Sequence[Any]]) -> Row:
        """Return a prompt that is already in the model's format, control tokens and all, as tokens."""
        pieces = render_raw(prompt, media, self.tokenizer.controls, self.kinds)
        fillers = {medium.placeholder[0] for medium in self.media.values()}
        if wrong := [piece.value for piece in pieces if piece.kind == "control" and piece.value in fillers]:
            kinds = [kind for kind, medium in self.media.items() if medium.placeholder[0] == wrong[0]]
            raise PromptError(
                f"the raw prompt holds {wrong[0]}, which stands for tokens of {' or '.join(kinds)}; write "
                f"{' or '.join(f'<|{kind}_1|>' for kind in kinds)} and give the {' or '.join(kinds)}"
            )
        return self._row(pieces)

    def measure(self, messages: Sequence[Message], *, answer: bool = True) -> int:
        """Return how many tokens a conversation has, beyond the window or not, reading only the headers of its media.

        Raises PromptError, and MediaError for what a header tells.
        """
        return sum(self._counts(self._render(messages, answer)))

    def _render(self, messages: Sequence[Message], answer: bool) -> list[Piece]:
        pieces = render(messages, answer=answer, chat=self.chat, kinds=self.kinds)
        if any(message.get("tool_calls") for message in messages) and not self.tokenizer.has_control(CALL):
            raise PromptError(
                f"the messages have tool_calls, and this model's vocabulary has no {CALL}: it has learnt no calls; "
                "write what was called as the assistant's text"
            )
        return pieces

    def _counts(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        """Return the tokens of text and control, and those of media."""
        words = media = 0
        for piece, after, before in self._between(pieces):
            if piece.kind == "text":
                words += len(self.tokenizer.encode(piece.value, after=after, before=before))
            elif piece.kind == "control":
                self.tokenizer.control(piece.value)  # raises where there is none
                words += 1
            else:
                media += self._count(piece.kind, piece.value)
        return words, media

    def _read(self, kind: str, payload: Any) -> tuple[dict[str, Tensor], int]:
        """Return a medium's features and how many tokens they become. Raises MediaError."""
        medium = self.media[kind]
        with _told(kind):
            features, tokens = medium.read(payload, medium.settings)
        if not isinstance(features, Mapping) or not all(isinstance(one, Tensor) for one in features.values()):
            held = [type(one).__name__ for one in (features.values() if isinstance(features, Mapping) else [features])]
            raise MediaError(f"the modality {kind!r} has features of {', '.join(held)}; give a dict of tensors")
        return features, _whole(kind, tokens)

    def _count(self, kind: str, payload: Any) -> int:
        """Return how many tokens a medium becomes. Raises MediaError."""
        medium = self.media[kind]
        if medium.count is None:
            return self._read(kind, payload)[1]
        with _told(kind):
            tokens = medium.count(payload, medium.settings)
        return _whole(kind, tokens)

    def _between(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, str | None, str | None]]:
        """Yield every piece with the control tokens before and behind it, None where there is none."""
        names = [self._control_name(piece) for piece in pieces]
        yield from zip(pieces, [None, *names[:-1]], [*names[1:], None], strict=True)

    def _row(self, pieces: Sequence[Piece]) -> Row:
        row = Row()
        if sum(piece.kind == "image" for piece in pieces) > 1:  # small files may hold large pictures
            self._check_window(*self._counts(pieces))
        words = at = 0
        spans: list[tuple[list[int], int]] = []  # ids, and how often each stands there
        for piece, after, before in self._between(pieces):
            if piece.kind == "control":
                ids, times = [self.tokenizer.control(piece.value)], 1
            elif piece.kind == "text":
                ids, times = self.tokenizer.encode(piece.value, after=after, before=before), 1
            else:
                features, times = self._read(piece.kind, piece.value)
                ids = [self.media[piece.kind].placeholder[1]]
                row.media.append(Placed(piece.kind, features, at, times))
            spans.append((ids, times))
            words += len(ids) if piece.kind in ("control", "text") else 0
            at += len(ids) * times
        self._check_window(words, at - words)  # before there are lists of what may be a billion tokens
        for piece, (ids, times) in zip(pieces, spans, strict=True):
            row.ids += ids * times
            row.labels += ids if piece.trained else [IGNORED] * (len(ids) * times)
        return row

    def _check_window(self, words: int, media: int) -> None:
        if words + media > self.window:
            raise PromptError(
                f"the prompt is {words + media} tokens ({media} of them media) and this model reads at most "
                f"{self.window}; shorten the text, or give fewer, smaller or shorter media"
            )

    def _control_name(self, piece: Piece) -> str | None:
        if piece.kind in ("control", "text"):
            return piece.value if piece.kind == "control" else None
        if piece.kind not in self.media:
            noun = _NOUNS.get(piece.kind, piece.kind)
            raise PromptError(
                f"this model has no {noun} encoder; leave the {piece.kind} out or load a multimodal model"
            )
        return self.media[piece.kind].placeholder[0]

    def collate(self, rows: Sequence[Row], *, route: str = "auto", labelled: bool = True) -> Batch:
        """Return rows as one batch, padded on the right; labelled keeps their labels for a training loss.

        route: "auto", "none" or an adapter, for the rows that do not ask for one themselves.
        """
        media: list[Media] = []
        adapters: list[str | None] = []
        everywhere = {kind for row in rows for kind in row.kinds}
        for number, row in enumerate(rows):
            rule = self.router(everywhere if self.compat == "official" else row.kinds, row.route or route)
            adapters.append(rule.adapter)
            media += [Media(**item._asdict(), row=number, branch=rule.branches[item.modality]) for item in row.media]
        return Batch(
            input_ids=_padded([row.ids for row in rows], self.tokenizer.control(END_OF_TEXT)),
            lengths=torch.tensor([len(row.ids) for row in rows]),
            route=Route(tuple(adapters)),
            media=tuple(media),
            labels=_padded([row.labels for row in rows], IGNORED) if labelled else None,
            samples=tuple(row.sample for row in rows),
        )


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Name the modality whose code fails. Raises MediaError."""
    try:
        yield
    except ModaloraError:
        raise
    except Exception as error:  # it may be someone else's code
        raise MediaError(
            f"the {kind} cannot be read: the features of that modality fail with {type(error).__name__}: "
            f"{' '.join(str(error).split()):.200}; give another {kind}, or mend them to say what they take"
        ) from error


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def _whole(kind: str, tokens: Any) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
        raise MediaError(
            f"the modality {kind!r} makes {tokens!r:.40} tokens of what was given; features must return a whole number "
            "of at least 1, or raise MediaError for what holds nothing"
        )
    return int(tokens)
