"""The open sources of a mixture, and their rows by name: measured, or made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, get_type_hints

import numpy as np
from pydantic import PydanticUserError

from modalora import modality
from modalora.config import MediaConfig, SourceConfig, parse, source_names
from modalora.contracts import IGNORED
from modalora.data.corpus import Passages, open_corpus, open_documents
from modalora.data.files import find_files
from modalora.data.sources import (
    CUT,
    MADE,
    SCORED,
    SOURCES,
    Bad,
    Context,
    Drawn,
    Key,
    Source,
    bad_row,
    check_window,
)
from modalora.errors import ConfigError, DataError, InputError
from modalora.processing.processor import Processor, Row

Name = tuple[int, int]  # place of the source in the mixture, number of the row in the source
Made = Row | Bad

MEASURED = 64  # rows of a source that tell how long its rows are


LIMITS = {"image": "max_crops", "audio": "max_seconds"}


def limit_media(processor: Processor, limits: MediaConfig, of: str = "") -> Processor:
    """Return a processor whose media may be smaller, or larger, than those of another.

    Raises ConfigError for a limit on media that the model does not take. of: what has the limits, for the message.
    """
    for kind in LIMITS:
        if kind not in processor.media and (told := _limits(kind, limits)):
            raise ConfigError(f"media: {told}{of} is for a model that takes {kind}; leave it out")
    found = copy(processor)
    found.media = {
        kind: replace(medium, settings=limited(kind, medium.settings, limits))
        for kind, medium in processor.media.items()
    }
    return found


def _limits(kind: str, limits: MediaConfig) -> dict[str, Any]:
    key = LIMITS.get(kind, "")
    value = getattr(limits, key, None)
    return {} if value is None else {key: value}


def limited(kind: str, settings: Any, limits: MediaConfig) -> Any:
    """Return how a medium is read within some limits."""
    own = _limits(kind, limits)
    return replace(settings, **own) if own else settings


def make_source(context: Context, config: SourceConfig, key: Key = (0, 0)) -> Source:
    """Return the source that a recipe names. Raises ConfigError (unknown name or option), RouteError, DataError."""
    if config.media != MediaConfig():
        _check_media(config, MADE.get(config.source, LIMITS))
        context = replace(context, processor=limit_media(context.processor, config.media, _of(config)))
    if config.window:
        context = replace(context, window=config.window)
    if config.window or config.source in CUT:
        check_window(context, _of(config))
    if config.route is not None:
        context.processor.router((), config.route)
    try:
        if config.source == "files":
            return _windowed(config, open_corpus(context, key, **_options(config, open_corpus)))
        if config.source == "documents":
            return open_documents(context, key, **_options(config, open_documents))
        kind = SOURCES.get(config.source)
        maker = kind.draw if kind else modality.source(config.source)
        if maker is None:
            known = ", ".join(sorted(("documents", "files", *SOURCES)))
            raise ConfigError(f"unknown source {config.source!r}; known are {known}, and MODALITY.SOURCE")
        if config.window and not (kind and kind.windowed):
            raise _no_window(config)
        return Drawn(maker(context, **_options(config, maker)), key)
    except TypeError as error:
        raise ConfigError(f"source {config.source!r} does not take these options: {error}") from None


def _check_named(config: SourceConfig, maker: Callable[..., Any]) -> None:
    """Refuse options that a maker does not have, and a want of those that it must have. Raises ConfigError."""
    try:
        _, *declared = signature(maker).parameters.values()  # all but the context
    except (TypeError, ValueError):  # someone else's, of which nothing is known
        return
    if any(one.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL) for one in declared):
        return
    own = declared[1:] if maker in (open_corpus, open_documents) else declared  # theirs is the key, too
    taken = {one.name: one.default is Parameter.empty for one in own}
    where = f"source {config.source!r}"
    for name in config.options:
        if name not in taken:
            close = get_close_matches(name, taken, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"{where} has no option {name!r}; {hint}it takes {', '.join(taken) or 'none'}")
    if lacking := [name for name, needed in taken.items() if needed and name not in config.options]:
        raise ConfigError(f"{where} needs the option {lacking[0]!r}; write options: {{{lacking[0]}: ...}}")


def _options(config: SourceConfig, maker: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a source as the types that its maker declares. Raises ConfigError naming key and value."""
    _check_named(config, maker)
    try:
        kinds = get_type_hints(maker)
    except Exception:  # someone else's: types for a type checker alone, or no plain function
        return config.options
    made = dict(config.options)
    for key, value in made.items():
        if key in kinds and value is not None:
            with suppress(PydanticUserError):  # a type of someone else's, which nothing is known of
                made[key] = parse(kinds[key], value, f"source {config.source!r}, {key}")
    return made


def _windowed(config: SourceConfig, source: Source) -> Source:
    if config.window and not isinstance(source, Passages):
        raise _no_window(config)
    if isinstance(source, Passages):
        _check_media(config, ())
    return source


def _of(config: SourceConfig) -> str:
    return f" of source {config.name or config.source!r}"


def _check_media(config: SourceConfig, made: Collection[str]) -> None:
    """Refuse limits on media that the rows of a source never hold. Raises ConfigError."""
    for kind in LIMITS:
        if kind not in made and (told := _limits(kind, config.media)):
            raise ConfigError(f"media: {told}{_of(config)}: its rows hold no {kind}; leave it out")


def _no_window(config: SourceConfig) -> ConfigError:
    return ConfigError(
        f"window={config.window} of source {config.source!r}: its rows are as long as what is in them; leave it out"
    )


def check_usable(row: Row, asked: str | None, context: Context) -> None:
    """Refuse a row that a run cannot take, as a mixture with this context reads it. Raises RouteError, DataError."""
    check_route(row, asked, context.processor)
    check_length(len(row.ids), context.most)
    if context.labelled:
        check_labels(row)


def check_route(row: Row, asked: str | None, processor: Processor) -> None:
    """Refuse a row whose media no route of the model takes. Raises RouteError."""
    processor.router(row.kinds, asked or "auto")


def check_length(tokens: int, most: int) -> None:
    """Refuse a row that the budget of a micro-batch cannot hold; most 0: it has none. Raises DataError."""
    if most and tokens > most:
        raise DataError(f"it is {tokens} tokens and tokens={most}; raise tokens, or shorten the row or its window")


def check_labels(row: Row) -> None:
    """Refuse a row that trains nothing. Raises DataError."""
    if not any(label != IGNORED for label in row.labels[1:]):
        raise DataError("no token of it is trained; give it an answer")


BOOKS = "books"  # what a source of documents reads without a path
_SIDE = ("path", "split", "form", "rename", "held_out", "shuffle")  # options; of another form, rows are others


def check_apart(trained: Sequence[SourceConfig], scored: Sequence[SourceConfig]) -> None:
    """Refuse to score files, or books, that are trained on by a source that does not hold the same rows out.

    Raises ConfigError naming one of them.
    """
    for source in scored:
        others = [own for own in trained if not source.holds_out or _side(own) != _side(source)]
        both = sorted(_stores(source) & {store for own in others for store in _stores(own)})
        if both and both[0][0] == BOOKS:
            raise ConfigError(
                f"split={both[0][1]} of the {BOOKS} is scored, and a source of mixture trains on it; give the source "
                "of eval_mixture another split"
            )
        if both:
            raise ConfigError(
                f"{both[0][0]} is scored, and a source of mixture trains on it; give eval_mixture another file, or "
                f"every source of mixture that reads it the same window, {', '.join(_SIDE[:-1])} and {_SIDE[-1]}"
            )


def _side(source: SourceConfig) -> tuple[Any, ...]:
    """Return what tells which rows of its files a source trains on."""
    return (source.holds_out, source.window, *map(source.options.get, _SIDE))


def _stores(source: SourceConfig) -> set[tuple[str, str]]:
    """Return the data files of a source, each with its split, as far as they can be found."""
    path, split = source.options.get("path"), source.options.get("split")
    if path is None:  # whole texts of books: those that are scored would be trained on
        return {(BOOKS, str(split or "train"))} if source.source == "documents" else set()
    with suppress(DataError, TypeError):  # what is no file is told where files are opened
        return {(str(file.resolve()), str(split or "")) for file in find_files(path)}
    return set()


@dataclass
class Reader:
    """The open sources of a mixture. Rows that cannot be used come back as what is wrong with them."""

    sources: list[Source]
    names: list[str]
    routes: list[str | None]  # that the rows of each source ask for; None: by their media
    context: Context

    def sample(self, name: Name) -> str:
        """Return what a row is called: SOURCE:NUMBER."""
        return f"{self.names[name[0]]}:{name[1]}"

    def look(self, name: Name) -> int | Made:
        """Return the tokens of a row, or the row itself where that is how they become known."""
        source, number = self.sources[name[0]], name[1]
        try:
            tokens = source.measure(number)
        except InputError as error:
            return bad_row(error, self.sample(name), source, number)
        if tokens is None:
            return self.make(name)
        try:
            check_length(tokens, self.context.most)
        except DataError as error:
            return bad_row(error, self.sample(name), source, number)
        return tokens

    def make(self, name: Name) -> Made:
        """Return a row."""
        source, number = self.sources[name[0]], name[1]
        try:
            row = source.row(number)
            check_usable(row, self.routes[name[0]], self.context)
        except InputError as error:
            return bad_row(error, self.sample(name), source, number)
        row.sample, row.route = self.sample(name), self.routes[name[0]]
        return row


def key_of(seed: int, place: int) -> Key:
    """Return what the rows of a source follow from; those that are scored are the same beside whatever others."""
    return (seed, 0 if seed == SCORED else place)


def open_reader(context: Context, sources: Sequence[SourceConfig], seed: int) -> Reader:
    """Open every source. Raises ConfigError, DataError."""
    opened = [make_source(context, source, key_of(seed, place)) for place, source in enumerate(sources)]
    routes = [source.route for source in sources]
    return Reader(opened, source_names(sources), routes, context)


def mean_tokens(reader: Reader, place: int) -> float:
    """Return the mean tokens of the first rows of a source. Raises DataError when none of them is good."""
    rows = reader.sources[place].rows
    seen = [reader.look((place, number)) for number in range(min(MEASURED, rows or MEASURED))]
    sizes = [len(one.ids) if isinstance(one, Row) else one for one in seen if not isinstance(one, Bad)]
    if not sizes:
        raise DataError(f"none of the first {len(seen)} rows of {reader.names[place]!r} can be used; see `data check`")
    return float(np.mean(sizes))
