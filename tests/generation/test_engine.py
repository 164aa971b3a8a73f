"""The generation loop: when rows stop, and that a batch says what its rows say alone, cached or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from modalora.assistant import make_processor
from modalora.contracts import Batch, Message, Route
from modalora.errors import ConfigError, WorkError
from modalora.generation.engine import Token, generate
from modalora.generation.sampling import Sampling
from modalora.generation.windows import Switch
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.nn.cache import KVCache
from modalora.nn.rope import DynamicNtk
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import TextTokenizer
from small import shaken

GREEDY = Sampling()
WORDS = "seven blue boxes touch the wall, and the quick brown fox jumps over the lazy dog; how many are there? " * 4


class Counter:
    """Says the number after the last one that it has read, below 100; notes what it was asked to read."""

    def __init__(self, switch: int = 10_000) -> None:
        self.switch = switch
        self.reads: list[list[list[int]]] = []
        self.steps: list[tuple[list[int], Route]] = []
        self.reaches: list[list[int]] = []

    def new_cache(self, batch: int) -> KVCache:
        return KVCache(0, batch)

    def read(self, batch: Batch, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        rows = [ids[:length].tolist() for ids, length in zip(batch.input_ids, batch.lengths, strict=True)]
        self.reads.append(rows)
        self.reaches += [list(reach)] if reach else []
        cache.advance(batch.lengths)
        return self._say([row[-1] for row in rows])

    def read_next(self, ids: Tensor, route: Route, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        self.steps.append((ids.tolist(), route))
        self.reaches += [list(reach)] if reach else []
        cache.advance(torch.ones_like(ids))
        return self._say(ids.tolist())

    def table_number(self, length: int) -> int:
        return int(length > self.switch)

    def _say(self, last: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(last) + 1, 100).float()


def rows_of(*rows: list[int], adapters: tuple[str | None, ...] = ()) -> Batch:
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=99)
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(input_ids=padded, lengths=lengths, route=Route(adapters or (None,) * len(rows)))


def said(tokens: Sequence[Token], rows: int) -> list[list[int]]:
    return [[token.id for token in tokens if token.row == row] for row in range(rows)]


def finishes(tokens: Sequence[Token]) -> dict[int, str]:
    return {token.row: token.finish for token in tokens if token.finish is not None}


def test_a_row_ends_at_a_stop_id_which_is_its_last_token() -> None:
    tokens = list(generate(Counter(), rows_of([5]), sampling=GREEDY, max_tokens=9, stop_ids={8, 50}))
    assert tokens == [Token(0, 6), Token(0, 7), Token(0, 8, "stop")]


def test_a_row_ends_at_its_most_tokens() -> None:
    tokens = list(generate(Counter(), rows_of([5]), sampling=GREEDY, max_tokens=3, stop_ids=()))
    assert tokens == [Token(0, 6), Token(0, 7), Token(0, 8, "length")]
    tokens = list(generate(Counter(), rows_of([5]), sampling=GREEDY, max_tokens=1, stop_ids={6}))
    assert tokens == [Token(0, 6, "stop")]  # a stop id at the last place is a stop


def test_a_row_ends_by_the_callers_rule_which_sees_its_own_new_ids() -> None:
    asked: list[tuple[int, list[int]]] = []

    def stops(row: int, ids: list[int]) -> bool:
        asked.append((row, list(ids)))
        return sum(ids) > 40

    tokens = list(generate(Counter(), rows_of([5], [20]), sampling=GREEDY, max_tokens=9, stop_ids=(), stops=stops))
    assert said(tokens, 2) == [[6, 7, 8, 9, 10, 11], [21, 22]]
    assert finishes(tokens) == {0: "stop", 1: "stop"}
    assert asked[:2] == [(0, [6]), (1, [21])]


def test_unequal_rows_each_go_on_from_their_own_last_token() -> None:
    model = Counter()
    tokens = list(generate(model, rows_of([1, 2, 3], [50], [7, 7]), sampling=GREEDY, max_tokens=2, stop_ids=()))
    assert said(tokens, 3) == [[4, 5], [51, 52], [8, 9]]
    assert [token.row for token in tokens] == [0, 1, 2, 0, 1, 2]
    assert model.reads == [[[1, 2, 3], [50], [7, 7]]]


def test_rows_that_stop_leave_the_batch_with_their_route() -> None:
    model = Counter()
    batch = rows_of([1], [20], [40], adapters=("vision", None, "speech"))
    tokens = list(generate(model, batch, sampling=GREEDY, max_tokens=4, stop_ids={21, 43}))
    assert said(tokens, 3) == [[2, 3, 4, 5], [21], [41, 42, 43]]
    assert [(ids, route.adapters) for ids, route in model.steps] == [
        ([2, 41], ("vision", "speech")),
        ([3, 42], ("vision", "speech")),
        ([4], ("vision",)),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_answer_with_row_and_token(temperature: float) -> None:
    class Overflowing(Counter):
        def _say(self, last: Sequence[int]) -> Tensor:
            logits = super()._say(last) * 1000
            return logits.masked_fill(logits[:, 53:54] > 0, torch.nan)

    tokens = generate(
        Overflowing(), rows_of([5], [50]), sampling=Sampling(temperature=temperature), max_tokens=9, stop_ids=()
    )
    with pytest.raises(WorkError, match="row 2 has logits that are NaN or infinite at token 3 of its answer"):
        list(tokens)


def test_tokens_come_as_they_are_made() -> None:
    model = Counter()
    stream = generate(model, rows_of([1]), sampling=GREEDY, max_tokens=9, stop_ids=())
    assert not model.reads
    assert next(stream) == Token(0, 2)
    assert not model.steps


def test_a_row_that_outgrows_the_original_window_is_read_again_once_and_alone() -> None:
    model = Counter(switch=4)
    tokens = list(generate(model, rows_of([1, 2, 3], [50]), sampling=GREEDY, max_tokens=4, stop_ids=()))
    assert said(tokens, 2) == [[4, 5, 6, 7], [51, 52, 53, 54]]
    assert model.reads == [[[1, 2, 3], [50]], [[1, 2, 3, 4, 5]]]


def test_at_least_one_token_must_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="max_tokens=0 must be at least 1"):
        next(generate(Counter(), rows_of([1]), sampling=GREEDY, max_tokens=0, stop_ids=()))


# ------------------------------------------------------------------------------------------------ with a real model


@pytest.fixture(scope="module")
def model() -> Multimodal:
    model = shaken()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv_proj.weight" in name:
                parameter.mul_(4)  # attention that is sharp, so that a key turned by the wrong table shows
    return model


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = TextTokenizer.train([WORDS], 320)
    return make_processor(tiny(), tokenizer)


def messages(words: str, *media: str) -> list[Message]:
    rng = np.random.default_rng(len(words))
    made = {
        "image": lambda: Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)),
        "audio": lambda: (rng.standard_normal(4800).astype(np.float32) / 8, 8000),
    }
    parts = [{"type": kind, kind: made[kind]()} for kind in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


MIXED = (
    messages("How many?"),
    messages("Which blue box is this then?", "image"),
    messages("Transcribe it.", "audio"),
    messages("Is that the number of boxes?", "image", "audio"),
    messages("The fox touches a wall, so it jumps over the seven boxes."),
)


def greedy(model: Multimodal, batch: Batch, count: int, stop_ids: Sequence[int] = ()) -> list[list[int]]:
    tokens = list(generate(model, batch, sampling=GREEDY, max_tokens=count, stop_ids=stop_ids))
    return said(tokens, len(batch.input_ids))


@torch.no_grad()
def uncached(model: Multimodal, batch: Batch, count: int) -> list[int]:
    """Greedy tokens of a batch of one row, the whole of it read anew for each."""
    new: list[int] = []
    for _ in range(count):
        ids = torch.cat((batch.input_ids, torch.tensor([new], dtype=torch.long)), dim=1)
        longer = replace(batch, input_ids=ids, lengths=torch.tensor([ids.shape[1]]))
        new.append(int(model(longer)[0, -1].argmax()))
    return new


def test_a_batch_of_unequal_rows_says_what_its_rows_say_alone(model: Multimodal, processor: Processor) -> None:
    batch = processor(MIXED)
    assert set(batch.route.adapters) == {None, "vision", "speech"}
    together = greedy(model, batch, 20)
    assert together == [greedy(model, processor([row]), 20)[0] for row in MIXED]
    assert together == [uncached(model, processor([row]), 20) for row in MIXED]
    assert len({tuple(ids) for ids in together}) == len(MIXED)


def test_rows_that_leave_change_nothing_for_those_that_stay(model: Multimodal, processor: Processor) -> None:
    batch = processor(MIXED)
    free = greedy(model, batch, 20)
    stop = [free[1][2], free[3][7]]
    stopped = greedy(model, batch, 20, stop_ids=stop)
    for short, long in zip(stopped, free, strict=True):
        end = next((place for place, index in enumerate(long) if index in stop), 19)
        assert short == long[: end + 1]
    assert len({len(ids) for ids in stopped}) > 1


def test_a_sampled_batch_says_what_its_rows_say_alone(model: Multimodal, processor: Processor) -> None:
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=5, repetition_penalty=1.1)

    def answers(rows: Sequence[Sequence[Message]]) -> list[list[int]]:
        tokens = list(generate(model, processor(rows), sampling=sampling, max_tokens=12, stop_ids=()))
        return said(tokens, len(rows))

    assert answers(MIXED) == [answers([row])[0] for row in MIXED]


def of_length(processor: Processor, length: int, *media: str) -> list[Message]:
    """Messages whose prompt has this many tokens; 'z' is one token and merges with nothing."""
    short = len(processor.row(messages("", *media)).ids)
    made = messages("z" * (length - short), *media)
    assert len(processor.row(made).ids) == length
    return made


@pytest.mark.parametrize("media", [(), ("image",), ("audio",)])
def test_a_row_that_crosses_the_original_window_says_what_reading_anew_says(
    model: Multimodal, processor: Processor, media: tuple[str, ...]
) -> None:
    batch = processor([of_length(processor, 250, *media)])
    assert greedy(model, batch, 14) == [uncached(model, batch, 14)]


@pytest.mark.parametrize("length", [255, 256, 257])
def test_prompts_that_end_beside_the_original_window_go_on_right(
    model: Multimodal, processor: Processor, length: int
) -> None:
    batch = processor([of_length(processor, length)])
    assert greedy(model, batch, 4) == [uncached(model, batch, 4)]


def test_one_row_of_a_batch_may_cross_the_original_window(model: Multimodal, processor: Processor) -> None:
    rows = [of_length(processor, 30, "audio"), of_length(processor, 251, "image"), of_length(processor, 180)]
    together = greedy(model, processor(rows), 12)
    assert together == [uncached(model, processor([row]), 12) for row in rows]


def test_a_row_may_cross_after_another_has_left(model: Multimodal, processor: Processor) -> None:
    rows = [of_length(processor, 40), of_length(processor, 250, "image"), of_length(processor, 245, "audio")]
    told = [uncached(model, processor([row]), 16) for row in rows]
    stop = next(index for index in told[0] if index not in told[1] and index not in told[2])
    together = greedy(model, processor(rows), 16, stop_ids=[stop])
    assert together == [told[0][: told[0].index(stop) + 1], told[1], told[2]]


# ------------------------------------------------------------------------------------------------- tables of long rows


def test_a_planned_row_is_read_once_by_the_table_of_its_planned_length() -> None:
    model = Counter(switch=4)
    batch = rows_of([1, 2, 3], [50])
    tokens = list(generate(model, batch, sampling=GREEDY, max_tokens=4, stop_ids=(), switch="planned"))
    assert said(tokens, 2) == [[4, 5, 6, 7], [51, 52, 53, 54]]
    assert len(model.reads) == 1
    assert model.reaches == [[7, 5]] * 4


def test_rows_that_leave_take_their_plan_along() -> None:
    model = Counter()
    tokens = list(
        generate(model, rows_of([1], [20, 20]), sampling=GREEDY, max_tokens=3, stop_ids={2}, switch="planned")
    )
    assert said(tokens, 2) == [[2], [21, 22, 23]]
    assert model.reaches == [[4, 5], [5], [5]]


def test_a_crossing_that_is_not_read_again_says_something_else(
    model: Multimodal, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: with keys of both tables in one cache the answer differs."""
    rows = [of_length(processor, 30, "audio"), of_length(processor, 251, "image"), of_length(processor, 180)]
    told = greedy(model, processor(rows), 24)
    assert told[1] == uncached(model, processor([rows[1]]), 24)
    monkeypatch.setattr(Multimodal, "table_number", lambda self, length: 0)
    stale = greedy(model, processor(rows), 24)
    assert stale[1] != told[1]
    assert (stale[0], stale[2]) == (told[0], told[2])  # these do not cross


@torch.no_grad()
def uncached_planned(model: Multimodal, batch: Batch, count: int) -> list[int]:
    """As `uncached`, every reading by the table of prompt and count."""
    new: list[int] = []
    planned = int(batch.lengths[0]) + count
    for _ in range(count):
        ids = torch.cat((batch.input_ids, torch.tensor([new], dtype=torch.long)), dim=1)
        longer = replace(batch, input_ids=ids, lengths=torch.tensor([ids.shape[1]]))
        new.append(int(model.read(longer, model.new_cache(1), [planned])[0].argmax()))
    return new


def test_planned_rows_of_a_batch_say_what_reading_anew_by_their_own_table_says(
    model: Multimodal, processor: Processor
) -> None:
    rows = [of_length(processor, 30, "audio"), of_length(processor, 245, "image"), of_length(processor, 300)]
    batch = processor(rows)
    planned = list(generate(model, batch, sampling=GREEDY, max_tokens=14, stop_ids=(), switch="planned"))
    told = [uncached_planned(model, processor([row]), 14) for row in rows]
    assert said(planned, 3) == told
    crossing = greedy(model, batch, 14)
    assert told[0] == crossing[0]  # short by either
    assert told[1] != crossing[1]  # long from the start, not from token 257 on
    assert told[2] == crossing[2]  # long by either


@pytest.fixture(scope="module")
def dynamic(model: Multimodal) -> Multimodal:
    """The same weights with a table for every length beyond 40 tokens."""
    rope = DynamicNtk(factor=3.0, rotated=0.75, window=2048, original_window=40)
    sizes = replace(model.config, decoder=replace(model.config.decoder, rope=rope))
    made = Multimodal(sizes).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("switch", ["crossing", "planned"])
def test_dynamic_tables_with_a_cache_say_what_reading_anew_says(
    dynamic: Multimodal, processor: Processor, switch: Switch
) -> None:
    rows = [of_length(processor, 25), of_length(processor, 36, "audio"), of_length(processor, 60)]
    anew = uncached if switch == "crossing" else uncached_planned
    told = [anew(dynamic, processor([row]), 12) for row in rows]
    tokens = list(generate(dynamic, processor(rows), sampling=GREEDY, max_tokens=12, stop_ids=(), switch=switch))
    assert said(tokens, 3) == told


def test_a_stale_dynamic_table_says_something_else(
    dynamic: Multimodal, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = processor([of_length(processor, 36)])
    told = uncached(dynamic, batch, 24)
    assert greedy(dynamic, batch, 24) == [told]
    monkeypatch.setattr(Multimodal, "table_number", lambda self, length: 0)
    assert greedy(dynamic, batch, 24) != [told]


def test_a_model_reads_in_inference_mode_and_its_caller_does_not() -> None:
    modes: list[bool] = []

    class Noting(Counter):
        def _say(self, last: Sequence[int]) -> Tensor:
            modes.append(torch.is_inference_mode_enabled())
            return super()._say(last)

    for _ in generate(Noting(), rows_of([5]), sampling=GREEDY, max_tokens=3, stop_ids=()):
        modes.append(torch.is_inference_mode_enabled())
    assert modes == [True, False] * 3


def test_rows_draw_by_their_own_seeds() -> None:
    def tokens(seeds: list[int] | None, *rows: list[int]) -> list[list[int]]:
        hot = Sampling(temperature=50.0, seed=7)
        drawn = generate(Counter(), rows_of(*rows), sampling=hot, max_tokens=6, stop_ids=(), seeds=seeds)
        return said(list(drawn), len(rows))

    assert tokens([7, 8, 7], [5], [5], [5]) == [*tokens(None, [5]), *tokens([8], [5]), *tokens([7], [5])]
    assert tokens([7], [5]) != tokens([8], [5])
