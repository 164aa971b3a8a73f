"""Rows as people can look at them: what is trained is coloured, pictures and sounds are shown. Terminal and HTML."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from rich.text import Text

from modalora.config import SourceConfig, source_names
from modalora.contracts import IGNORED, Message
from modalora.data.reader import check_route, make_source
from modalora.data.sources import Bad, Context, bad_row
from modalora.errors import InputError
from modalora.processing.audio import open_audio
from modalora.processing.image import open_image
from modalora.processing.processor import Processor, Row
from modalora.processing.spans import Span, spans

WIDEST = 320  # pixels of a picture in the page
LONGEST_SECONDS = 30


@dataclass(frozen=True)
class Shown:
    """A row to be shown: its spans and the payloads of its media in order, or what is wrong with it."""

    sample: str
    place: str
    spans: Sequence[Span] = ()
    media: Sequence[tuple[str, Any]] = ()
    bad: Bad | None = None

    @property
    def heading(self) -> str:
        """What the row is called, where it stands, how long it is and how much of it is trained."""
        tokens = sum(span.tokens for span in self.spans)
        trained = sum(span.tokens for span in self.spans if span.trained)
        told = "bad" if self.bad else f"{tokens} tokens, {trained} of them trained"
        return "  ".join(filter(None, (self.sample, self.place, told)))


def preview(context: Context, sources: Sequence[SourceConfig], rows: int, seed: int = 0) -> Iterator[Shown]:
    """Yield the first rows of each source, as a run with this seed reads them. Raises ConfigError, DataError."""
    for place, (name, config) in enumerate(zip(source_names(sources), sources, strict=True)):
        source = make_source(context, config, (seed, place))
        for number in range(min(rows, source.rows or rows)):
            sample, where = f"{name}:{number}", str(source.place(number))
            try:
                source.measure(number)
                row = source.row(number)
                check_route(row, config.route, context.processor)
                media = _payloads(source.messages(number) or ())
            except InputError as error:
                yield Shown(sample, where, bad=bad_row(error, sample, source, number))
                continue
            yield Shown(sample, where, _spans(row, context.processor), media)


def _payloads(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def _spans(row: Row, processor: Processor) -> list[Span]:
    """Return a row as spans, cut where media, control tokens or labels begin and end."""
    media = {item.start: (item.modality, item.tokens) for item in row.media}
    return list(spans(row.ids, media, processor.tokenizer, [label != IGNORED for label in row.labels]))


def as_terminal(shown: Shown) -> Text:
    """Return a row for a terminal: trained text green, control tokens dim, media as boxes."""
    text = Text(shown.heading + "\n", style="bold")
    if shown.bad is not None:
        text.append(f"{_harmless(shown.bad.reason)}\n", style="red")
        text.append(f"{_harmless(shown.bad.mend)}\n")
    for span in shown.spans:
        words = f"[{span.kind}: {span.tokens} tokens]" if span.is_medium else _harmless(span.text)
        style = "cyan" if span.is_medium else "dim" if span.kind == "control" else ""
        text.append(words, style="bold green" if span.trained else style or None)
    return text.append("\n")


def _harmless(text: str) -> str:
    """Show the characters that would drive a terminal: escape sequences may move the cursor, or worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


_PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
article {{ border-top: 1px solid #ccc; padding: .7em 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
h2 {{ font-size: 1em; margin: 0 0 .4em; }}
.trained {{ background: #c9f2d0; color: #0a4a1a; }}
.control {{ color: #888; font-family: monospace; font-size: .85em; }}
.medium {{ display: inline-block; border: 1px solid #9bd; padding: .3em; margin: .2em; white-space: normal; }}
.bad {{ color: #a00; }}
img {{ display: block; max-width: 100%; }}
</style>
<h1>{title}</h1>
<p><span class="trained">Coloured text</span> is trained; <span class="control">control tokens</span> are written by the
chat format alone.</p>
"""


def as_page(rows: Sequence[Shown], title: str, processor: Processor) -> str:
    """Return one HTML page that needs no other file, with pictures scaled down and sounds to be played."""
    return _PAGE.format(title=html.escape(title)) + "".join(_article(shown, processor) for shown in rows)


def _article(shown: Shown, processor: Processor) -> str:
    media = iter(shown.media)
    parts = [f"<h2>{html.escape(shown.heading)}</h2>"]
    if shown.bad is not None:
        parts.append(f'<span class="bad">{html.escape(shown.bad.reason)}</span>\n{html.escape(shown.bad.mend)}')
    for span in shown.spans:
        if span.is_medium:
            held = next(media, None)
            body = _medium(*held, processor) if held is not None else ""
            parts.append(f'<span class="medium">{span.kind}, {span.tokens} tokens{body}</span>')
            continue
        classes = " ".join(
            filter(None, ("control" if span.kind == "control" else "", "trained" if span.trained else ""))
        )
        text = html.escape(span.text)
        parts.append(f'<span class="{classes}">{text}</span>' if classes else text)
    return f"<article>{''.join(parts)}</article>\n"


def _medium(kind: str, payload: Any, processor: Processor) -> str:
    file = io.BytesIO()
    if kind == "image" and processor.image is not None:
        picture = open_image(payload, processor.image)
        picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        picture.info.clear()
        picture.save(file, "PNG")
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    if kind == "audio" and processor.audio is not None:
        wave, rate = open_audio(payload, processor.audio)
        cut = np.clip(wave[: LONGEST_SECONDS * rate], -1, 1)
        soundfile.write(file, cut, rate, format="WAV", subtype="PCM_16")
        return f'<br><audio controls src="data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"></audio>'
    return ""
