"""A row of tokens as spans: media, single control tokens, and the text between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modalora.processing.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one sort, ids[start:stop]. kind: "text", "control" or a modality. text: what they say."""

    kind: str
    start: int
    stop: int
    text: str = ""
    trained: bool = False

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def is_medium(self) -> bool:
        """Whether it is a picture, a sound or another medium."""
        return self.kind not in ("text", "control")


def spans(
    ids: Sequence[int],
    media: Mapping[int, tuple[str, int]],
    tokenizer: TextTokenizer,
    trained: Sequence[bool] | None = None,
) -> Iterator[Span]:
    """Yield the spans of a row in order.

    media: start -> modality and tokens. trained: for each token, whether a loss counts it, which cuts text as well.
    """
    control = tokenizer.control_ids
    learnt = [False] * len(ids) if trained is None else trained
    at = 0
    while at < len(ids):
        own = learnt[at]
        if at in media:
            kind, tokens = media[at]
            span = Span(kind, at, at + tokens, "", own)
        elif ids[at] in control:
            span = Span("control", at, at + 1, tokenizer.show(ids[at]), own)
        else:
            stop = at + 1
            while stop < len(ids) and stop not in media and ids[stop] not in control and learnt[stop] == own:
                stop += 1
            span = Span("text", at, stop, tokenizer.decode(ids[at:stop]), own)
        yield span
        at = span.stop
