"""Messages to a Batch: chat format, tokens, media features, routes, right padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modalora.contracts import IGNORED, Batch, Media, Message, Route, Rule, subsampled
from modalora.errors import PromptError
from modalora.processing.audio import AudioConfig, count_frames, log_mel, open_audio
from modalora.processing.chat import FORMATS, ChatFormat, Piece, as_text, render, render_raw
from modalora.processing.image import ImageConfig, count_image_tokens, image_features, open_image
from modalora.processing.tokenizer import PLACEHOLDERS, TextTokenizer

Compat = Literal["official"] | None


@dataclass
class Row:
    """One conversation as tokens; media keep their spans."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: list[tuple[str, dict[str, Tensor], int, int]] = field(
        default_factory=list
    )  # modality, features, start, tokens
    text: str = ""
    sample: str = ""  # where a training row came from


class Processor:
    """Turns conversations into batches for one model.

    image, audio: limits and sizes of the media that the model takes; None: it takes none of that kind.
    window: tokens that the model may read in one row. router: (modalities, requested route) -> Rule.
    chat: how messages are joined. compat: "official" routes a whole batch by all the media in it, as the released code
    of Phi-4-Multimodal does; None routes every row by its own.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        image: ImageConfig | None,
        audio: AudioConfig | None,
        window: int,
        router: Callable[[Collection[str], str], Rule],
        chat: ChatFormat = FORMATS["phi4"],
        compat: Compat = None,
    ) -> None:
        self.tokenizer, self.image, self.audio, self.window, self.router = tokenizer, image, audio, window, router
        self.chat, self.compat = chat, compat

    def __call__(self, conversations: Sequence[Sequence[Message]], *, route: str = "auto") -> Batch:
        """Return the batch from which the assistant goes on, one row per conversation.

        Raises PromptError (placeholders, window), MediaError, RouteError.
        """
        if not conversations:
            raise PromptError("no conversation was given; pass a list of message lists")
        return self.collate([self.row(messages) for messages in conversations], route=route, labelled=False)

    def row(self, messages: Sequence[Message], *, answer: bool = True) -> Row:
        """Return one conversation as tokens."""
        return self._row(render(messages, answer=answer, chat=self.chat))

    def raw_row(self, prompt: str, media: Mapping[str, Sequence[Any]]) -> Row:
        """Return a prompt that is already in the model's format, control tokens and all, as tokens."""
        return self._row(render_raw(prompt, media, self.tokenizer.controls))

    def measure(self, messages: Sequence[Message], *, answer: bool = True) -> int:
        """Return how many tokens a conversation has, beyond the window or not, reading only the headers of its media.

        Raises PromptError, and MediaError for what a header tells.
        """
        total = 0
        for piece, after, before in _between(render(messages, answer=answer, chat=self.chat)):
            if piece.kind in PLACEHOLDERS:
                total += self._media_tokens(piece.kind, piece.value)
            elif piece.kind == "text":
                total += len(self.tokenizer.encode(piece.value, after=after, before=before))
            else:
                self.tokenizer.control(piece.value)  # raises where there is none
                total += 1
        return total

    def _media_tokens(self, modality: str, payload: Any) -> int:
        if modality == "image" and self.image is not None:
            return count_image_tokens(payload, self.image)
        if modality == "audio" and self.audio is not None:
            return subsampled(count_frames(payload, self.audio))
        return self._features(modality, payload)[1]  # says what the model lacks

    def _row(self, pieces: Sequence[Piece]) -> Row:
        row = Row()
        for piece, after, before in _between(pieces):
            if piece.kind in PLACEHOLDERS:
                features, tokens = self._features(piece.kind, piece.value)
                row.media.append((piece.kind, features, len(row.ids), tokens))
                ids = [self.tokenizer.control(PLACEHOLDERS[piece.kind])] * tokens
            elif piece.kind == "control":
                ids = [self.tokenizer.control(piece.value)]
            else:
                ids = self.tokenizer.encode(piece.value, after=after, before=before)
            row.ids += ids
            row.labels += ids if piece.trained else [IGNORED] * len(ids)
        row.text = as_text(pieces)
        if len(row.ids) > self.window:
            media = sum(tokens for *_, tokens in row.media)
            raise PromptError(
                f"the prompt is {len(row.ids)} tokens ({media} of them media) and this model reads at most "
                f"{self.window}; shorten the text, or give fewer, smaller or shorter media"
            )
        return row

    def _features(self, modality: str, payload: Any) -> tuple[dict[str, Tensor], int]:
        if modality == "image":
            if self.image is None:
                raise PromptError("this model has no picture encoder; leave the image out or load a multimodal model")
            return image_features(open_image(payload, self.image), self.image)
        if self.audio is None:
            raise PromptError("this model has no sound encoder; leave the audio out or load a multimodal model")
        wave, rate = open_audio(payload, self.audio)
        mel = log_mel(wave, rate, mels=self.audio.mels)
        return {"mel": mel}, subsampled(len(mel))

    def collate(self, rows: Sequence[Row], *, route: str = "auto", labelled: bool = True) -> Batch:
        """Return rows as one batch, padded on the right; labelled keeps their labels for a training loss."""
        pad = self.tokenizer.control("<|endoftext|>")
        lengths = torch.tensor([len(row.ids) for row in rows])
        time = int(lengths.max())
        ids = torch.full((len(rows), time), pad)
        labels = torch.full((len(rows), time), IGNORED) if labelled else None
        media: list[Media] = []
        adapters: list[str | None] = []
        everywhere = _modalities(rows)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            if labels is not None:
                labels[number, : len(row.ids)] = torch.tensor(row.labels)
            rule = self.router(everywhere if self.compat == "official" else _modalities([row]), route)
            adapters.append(rule.adapter)
            media += [
                Media(modality, features, number, start, tokens, rule.branches[modality])
                for modality, features, start, tokens in row.media
            ]
        return Batch(
            input_ids=ids,
            lengths=lengths,
            route=Route(tuple(adapters)),
            media=tuple(media),
            labels=labels,
            texts=tuple(row.text for row in rows),
            samples=tuple(row.sample for row in rows),
        )


def _between(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, str | None, str | None]]:
    """Yield every piece with the control tokens before and behind it, None where there is none."""
    names = [PLACEHOLDERS.get(piece.kind, piece.value if piece.kind == "control" else None) for piece in pieces]
    yield from zip(pieces, [None, *names[:-1]], [*names[1:], None], strict=True)


def _modalities(rows: Sequence[Row]) -> set[str]:
    return {modality for row in rows for modality, *_ in row.media}
