"""Documents by what they must hold, losses against a cross-entropy of all logits, answers against generation."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stories import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from modalora.assistant import set_regime
from modalora.contracts import Batch, Rotations, Route
from modalora.data.retrieval import Phrases
from modalora.errors import ConfigError, DataError, ShapeError, WorkError
from modalora.evaluation.documents import (
    Digits,
    Words,
    grid_documents,
    load_texts,
    make_documents,
    part_of_books,
    passage,
    sentences,
    within,
)
from modalora.evaluation.names import draw_names, draw_numbers, draw_words
from modalora.evaluation.needle import (
    Document,
    Grid,
    Probe,
    answer_losses,
    ask_probes,
    fingerprint,
    make_grid,
    measure_grid,
    plain_document,
)
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer

TOLD = re.compile(r" The secret number of the ([a-z]+-[a-z]+) is (\d{7})\.")
ASKED = re.compile(r"What is the secret number of the ([a-z]+-[a-z]+)\? The secret number of the \1 is (\d{7})")


def places(ids: tuple[int, ...], piece: list[int]) -> list[int]:
    return [at for at in range(len(ids)) if list(ids[at : at + len(piece)]) == piece]


# ----------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("style", ["digits", "words"])
@pytest.mark.parametrize(("length", "needles", "distractors"), [(200, 1, 0), (509, 3, 5), (1500, 5, 20)])
def test_a_document_is_as_long_as_asked_for_and_ends_with_an_answer(
    tokenizer: TextTokenizer, style: str, length: int, needles: int, distractors: int
) -> None:
    for document in make_documents(
        tokenizer, TEXTS, 5, length=length, part="search", style=style, needles=needles, distractors=distractors
    ):
        assert len(document.ids) == length
        assert document.answers[-1] == length - 1
        assert len(document.probes) == len(document.depths) == needles
        assert document.sha256 == fingerprint(document.ids)


def test_a_document_of_digits_tells_each_thing_once_asks_at_the_end_and_scores_the_number(
    tokenizer: TextTokenizer,
) -> None:
    start = tokenizer.control(END_OF_TEXT)
    for document in make_documents(tokenizer, TEXTS, 6, length=900, part="search", needles=3, distractors=4):
        assert (document.ids[0], document.ids.count(start)) == (start, 1)
        text = tokenizer.decode(document.ids)
        told, asked = dict(TOLD.findall(text)), ASKED.findall(text)
        assert len(TOLD.findall(text)) == len(told) == len(set(told.values())) == 3 + 4  # no thing twice
        assert len(asked) == 3
        for (name, number), probe in zip(asked, document.probes, strict=True):
            assert told[name] == number
            assert tokenizer.decode([document.ids[at] for at in probe]) == number
            assert text.count(number) == 2  # told and answered
            assert text.count(name) == 3  # told, asked, answered
            assert len(places(document.ids, within(tokenizer, f" The secret number of the {name} is {number}."))) == 1
        assert text.index(asked[0][0]) < text.index("What is")


def test_digits_are_scored_by_whatever_tokens_a_tokenizer_has_for_them() -> None:
    """SentencePiece joins digits with each other and with the space in front of them."""
    joined = Tokenizer(models.BPE())
    joined.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    joined.decoder = decoders.Metaspace(prepend_scheme="first")
    numbers = [f" The secret number of it is {number}." for number in range(1_000_000, 9_999_999, 9_973)]
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123456789.,?-\n"]
    joined.train_from_iterator(
        [*TEXTS, *numbers], trainers.BpeTrainer(vocab_size=900, initial_alphabet=letters, show_progress=False)
    )
    tokenizer = TextTokenizer(joined.to_str())
    sizes = set()
    for document in make_documents(tokenizer, TEXTS, 12, length=400, part="search", needles=2):
        asked = ASKED.findall(tokenizer.decode(document.ids))
        for (_, number), probe in zip(asked, document.probes, strict=True):
            assert tokenizer.decode([document.ids[at] for at in probe]) == number
            sizes.add(len(probe))
    assert max(sizes) < 7
    assert len(sizes) > 1


def test_a_document_of_words_tells_a_fact_once_and_names_its_key_nowhere_else(tokenizer: TextTokenizer) -> None:
    phrases = Phrases(tokenizer)
    for document in make_documents(
        tokenizer, TEXTS, 6, length=300, part="search", style="words", needles=3, distractors=4
    ):
        told = [document.ids[at + 1] for at, index in enumerate(document.ids) if index == phrases.states]
        assert len(set(told)) == len(told) == 3 + 4
        for (at,) in document.probes:
            asks, key, value = document.ids[at - 2 : at + 1]
            assert asks == phrases.asks
            assert told.count(key) == 1
            assert len(places(document.ids[: at - 2], phrases.fact(key, value))) == 1


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_a_needle_lies_at_its_depth_within_a_sentence(tokenizer: TextTokenizer, depth: float) -> None:
    longest = max(len(within(tokenizer, one)) for text in TEXTS for one in sentences(text))
    opening = Digits(tokenizer).opening(1)
    for document in make_documents(tokenizer, TEXTS, 4, length=700, part="evaluation", depths=[depth]):
        ((name, number),) = TOLD.findall(tokenizer.decode(document.ids))
        fact = within(tokenizer, f" The secret number of the {name} is {number}.")
        question = within(
            tokenizer, f"\n\nWhat is the secret number of the {name}? The secret number of the {name} is {number}"
        )
        room = 700 - len(opening) - len(fact) - len(question)
        (at,) = places(document.ids, fact)
        place = at - len(opening)
        assert abs(place - depth * room) <= longest
        if depth in (0, 1):
            assert place == depth * room
        else:
            assert re.search(r"[.]\s*$", tokenizer.decode(document.ids[:at]))  # behind a sentence


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_of_words_lies_at_its_depth_to_the_token(tokenizer: TextTokenizer, depth: float) -> None:
    phrases = Phrases(tokenizer)
    for document in make_documents(tokenizer, TEXTS, 4, length=200, part="evaluation", style="words", depths=[depth]):
        (at,) = document.answers
        _, key, value = document.ids[at - 2 : at + 1]
        room = 200 - 3 - 3
        assert places(document.ids, phrases.fact(key, value)) == [round(depth * room)]


def test_every_depth_is_asked_for_equally_often_and_in_no_fixed_order(tokenizer: TextTokenizer) -> None:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    made = grid_documents(tokenizer, TEXTS, [300, 400], 8, part="search", style="words", depths=depths, needles=4)
    for length in (300, 400):
        asked = [depth for document in made if len(document.ids) == length for depth in document.depths]
        assert [asked.count(depth) for depth in depths] == [8] * 5
    assert len({document.depths for document in made}) > 5


def test_needles_of_one_document_and_the_next_take_turns_at_the_depths(tokenizer: TextTokenizer) -> None:
    made = make_documents(
        tokenizer, TEXTS, 2, length=500, part="search", style="words", depths=(0.0, 0.3, 0.6, 1.0), needles=2
    )
    assert [sorted(document.depths) for document in made] == [[0.0, 0.3], [0.6, 1.0]]


def test_a_text_that_names_a_thing_is_asked_about_others(tokenizer: TextTokenizer) -> None:
    def drawn(text: str) -> list[str]:
        facts = Digits(tokenizer).facts(np.random.default_rng(0), "search", 4, tokenizer.encode(text))
        return [found for fact in facts for found in TOLD.findall(tokenizer.decode(fact.ids))]

    free = drawn("Nobody.")
    (name, _), (_, number), *_ = free
    told = drawn(f"It was the {name}, and {number} of them.")
    assert len(told) == 4
    assert name not in {own for own, _ in told}
    assert number not in {own for _, own in told}


def test_the_same_seed_gives_the_same_documents_and_another_seed_none_of_them(tokenizer: TextTokenizer) -> None:
    def made(seed: int) -> set[str]:
        documents = make_documents(tokenizer, TEXTS, 12, length=250, part="search", seed=seed)
        return {document.sha256 for document in documents}

    assert made(3) == made(3)
    assert len(made(3) | made(4) | made(5)) == 36


def test_parts_share_no_name_and_no_draw(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    names = {part: set(draw_names(rng, part, 500)) for part in ("search", "evaluation", "tasks", "examples")}
    nouns = {part: {name.partition("-")[2] for name in own} for part, own in names.items()}
    assert len(set().union(*nouns.values())) == sum(map(len, nouns.values()))
    told = {}
    for part in ("search", "evaluation"):
        made = make_documents(tokenizer, TEXTS, 10, length=400, part=part)
        told[part] = {one for document in made for fact in TOLD.findall(tokenizer.decode(document.ids)) for one in fact}
    assert not told["search"] & told["evaluation"]


@pytest.mark.data
def test_the_books_of_the_search_are_not_those_that_judge(data_folder: Path) -> None:
    search, judge = part_of_books(data_folder, "search"), part_of_books(data_folder, "evaluation")
    assert (len(search), len(judge)) == (3, 2)
    assert not set(search) & set(judge)
    lines = [{line for text in part for line in text.splitlines() if len(line) > 40} for part in (search, judge)]
    assert not lines[0] & lines[1]
    assert load_texts(data_folder) == judge


def test_what_cannot_be_made_is_refused(tokenizer: TextTokenizer, letters: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"60 tokens are too few: 3 facts and 3 questions alone take \d+"):
        make_documents(tokenizer, TEXTS, 1, length=60, part="search", needles=3)
    with pytest.raises(DataError, match="5000 tokens are asked for and no text of the 1 given has so many"):
        make_documents(tokenizer, [TEXTS[0][:3000]], 1, length=5000, part="search")
    with pytest.raises(DataError, match="no text of the 0 given"):
        make_documents(tokenizer, [], 1, length=500, part="search")
    with pytest.raises(ConfigError, match="style='numbers' must be one of digits, words"):
        make_documents(tokenizer, TEXTS, 1, length=500, part="search", style="numbers")
    with pytest.raises(ConfigError, match="depths=.*1.2.* must be shares of the text"):
        make_documents(tokenizer, TEXTS, 1, length=500, part="search", depths=[0.5, 1.2])
    with pytest.raises(ConfigError, match="needles=0 must lie in 1 to 99"):
        make_documents(tokenizer, TEXTS, 1, length=500, part="search", needles=0)
    with pytest.raises(DataError, match="90 facts are asked for and there are .* things"):
        make_documents(tokenizer, TEXTS, 1, length=1000, part="search", style="words", distractors=89)
    with pytest.raises(ConfigError, match="facts are made of words of one token"):
        make_documents(letters, TEXTS, 1, length=500, part="search", style="words")
    with pytest.raises(DataError, match="cannot be read as text"):
        load_texts(Path("no-such-file"))


def test_names_numbers_and_words_come_once_each() -> None:
    rng = np.random.default_rng(0)
    assert len(set(draw_names(rng, "tasks", 9000))) == 9000
    assert len(set(draw_numbers(rng, 50_000))) == 50_000
    words = draw_words(rng, 20_000)
    assert len(set(words)) == 20_000
    assert all(re.fullmatch(r"([bdfgklmnprstvz][aeiou]){3}", word) for word in words)
    with pytest.raises(DataError, match="can be told apart"):
        draw_names(rng, "examples", 10**6)


def test_sentences_are_the_text_cut_behind_full_stops_and_empty_lines() -> None:
    text = "One two. “Three!” said he. Mr 4.5 went?\n\nHEADING\n\nLast one."
    assert list(sentences(text)) == ["One two.", " “Three!”", " said he.", " Mr 4.5 went?\n\n", "HEADING\n\n"]


def test_a_passage_ends_with_a_sentence_and_knows_where_its_sentences_end(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    for tokens in (5, 50, 2000):
        ids, ends = passage(tokenizer, TEXTS, tokens, rng)
        assert len(ids) == tokens == ends[-1]
        assert all(tokenizer.decode(ids[:end]).rstrip().endswith(".") for end in ends)
        assert any(tokenizer.decode(ids) in text for text in TEXTS)


def test_a_document_without_a_scored_token_or_with_other_ids_is_refused() -> None:
    with pytest.raises(DataError, match="has no scored token"):
        Document((1, 2, 3), (), (), 0, fingerprint((1, 2, 3)))
    for answers in ((0,), (3,), (2, 1), (1, 1)):
        with pytest.raises(DataError, match="must ascend within 1..2"):
            Document((1, 2, 3), answers, (), 0, fingerprint((1, 2, 3)))
    with pytest.raises(DataError, match="2 needles and 1 answers"):
        Document((1, 2, 3), (1, 2), (0.1, 0.9), 0, fingerprint((1, 2, 3)))
    with pytest.raises(DataError, match="its ids differ"):
        replace(plain_document((1, 2, 3)), ids=(1, 2, 4))
    assert plain_document((5, 6, 7)).answers == (1, 2)
    assert plain_document((5, 6, 7), scored=1).answers == (2,)


# -------------------------------------------------------------------------------------------------------------- losses


def told_losses(model: Multimodal, documents: list[Document]) -> torch.Tensor:
    """Mean cross-entropy of the answers, from all logits of each document alone."""
    means = []
    for document in documents:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            logits = model(Batch(ids, torch.tensor([len(document.ids)]), Route((None,))))[0]
        at = torch.tensor(document.answers)
        means.append(functional.cross_entropy(logits[at - 1].double(), ids[0, at]))
    return torch.stack(means)


@pytest.fixture(scope="module")
def documents(letters: TextTokenizer) -> list[Document]:
    """Around the tiny model's switch of tables, at 256 tokens."""
    made = [
        make_documents(letters, TEXTS, 1, length=length, part="search", needles=needles, seed=length)[0]
        for length, needles in ((256, 1), (257, 1), (520, 3), (400, 2))
    ]
    return [*made, plain_document(made[0].ids[:40]), plain_document(made[2].ids[:300], scored=9)]


def test_losses_are_the_cross_entropy_of_the_answers_however_documents_are_batched(
    model: Multimodal, documents: list[Document]
) -> None:
    told = told_losses(model, documents)
    # float32 sums in another order: worst seen 6e-7; one wrong position is 1e-1
    close = {"atol": 1e-5, "rtol": 1e-5}
    together = answer_losses(model, documents)
    assert together.shape == (len(documents),)
    torch.testing.assert_close(together.double(), told, **close)
    for rows in (1, 2, 5):
        parts = [answer_losses(model, documents[at : at + rows]) for at in range(0, len(documents), rows)]
        torch.testing.assert_close(torch.cat(parts).double(), told, **close)
    mixed = [documents[one] for one in (3, 0, 5, 2, 1, 4)]
    torch.testing.assert_close(answer_losses(model, mixed).double(), told[[3, 0, 5, 2, 1, 4]], **close)
    assert not together.requires_grad
    assert told.std() > 1e-2  # documents differ: a mix-up could not pass


def test_rows_read_their_own_rotary_tables(model: Multimodal, documents: list[Document]) -> None:
    rope, pair = model.config.decoder.rope, documents[2:4]
    long = rope.frequencies(16, long=True)
    scale = rope.attention_factor(long=True)
    same = answer_losses(model, pair, Rotations(long.repeat(2, 1), torch.full((2,), scale)))
    torch.testing.assert_close(same, answer_losses(model, pair))  # both beyond the original window
    tables = torch.stack([rope.frequencies(16), long])
    first, second = answer_losses(model, pair, Rotations(tables, torch.full((2,), scale))).tolist()
    assert abs(first - float(same[0])) > 1e-3
    assert second == pytest.approx(float(same[1]), abs=1e-5)
    with pytest.raises(ShapeError, match="rotations of 2 rows"):
        answer_losses(model, pair, Rotations(long.repeat(3, 1), torch.full((3,), scale)))


def test_a_loss_that_is_no_number_is_an_error_and_never_a_rank(model: Multimodal, documents: list[Document]) -> None:
    broken = Multimodal(tiny()).eval()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.decoder.norm.weight[0] = torch.nan
    with pytest.raises(WorkError, match=r"a document of 256 tokens \(seed 25600000\) has a loss of nan"):
        answer_losses(broken, documents[:2])
    with pytest.raises(WorkError, match="has a loss of nan"):
        ask_probes(broken, documents[:2])
    with pytest.raises(DataError, match="no documents were given"):
        answer_losses(model, [])


# ------------------------------------------------------------------------------------------------------------ accuracy


def continued(model: Multimodal, ids: tuple[int, ...], tokens: int) -> list[int]:
    batch = Batch(torch.tensor([ids]), torch.tensor([len(ids)]), Route((None,)))
    return [one.id for one in generate(model, batch, sampling=Sampling(), max_tokens=tokens, stop_ids=())]


def test_an_answer_is_right_exactly_where_generation_says_it(model: Multimodal, documents: list[Document]) -> None:
    rng = np.random.default_rng(0)
    made = []
    for number in range(8):
        document = documents[2 + number % 2]
        ids = list(document.ids)
        for probe in document.probes:
            said = continued(model, tuple(ids[: probe[0]]), len(probe))
            if rng.random() < 0.5:  # spoil one token
                spoilt = int(rng.integers(len(said)))
                said[spoilt] = (said[spoilt] + 1) % 256
            ids[probe[0] : probe[-1] + 1] = said
        made.append(replace(document, ids=tuple(ids), sha256=fingerprint(ids)))
    found = ask_probes(model, made, rows=5)
    told = [
        continued(model, document.ids[: probe[0]], len(probe)) == [document.ids[at] for at in probe]
        for document in made
        for probe in document.probes
    ]
    assert [probe.right for probe in found] == told
    assert 5 < sum(told) < len(told) - 5
    assert [probe.depth for probe in found] == [depth for document in made for depth in document.depths]
    assert [probe.length for probe in found] == [len(document.ids) for document in made for _ in document.depths]
    for document, loss in zip(made, answer_losses(model, made).tolist(), strict=True):
        own = found[: len(document.depths)]
        del found[: len(document.depths)]
        mean = sum(probe.nats * probe.tokens for probe in own) / sum(probe.tokens for probe in own)
        assert mean == pytest.approx(loss, rel=1e-5)
    with pytest.raises(DataError, match="has no needles"):
        ask_probes(model, [plain_document((1, 2, 3))])


def test_a_grid_counts_by_length_and_depth_and_survives_json(model: Multimodal, letters: TextTokenizer) -> None:
    made = grid_documents(letters, TEXTS, [450, 350], 4, part="evaluation", depths=[0.0, 1.0], needles=2)
    (grid,) = measure_grid(model, made, rows=3)
    assert [(cell.length, cell.depth, cell.count) for cell in grid.cells] == [
        (350, 0.0, 4), (350, 1.0, 4), (450, 0.0, 4), (450, 1.0, 4),
    ]  # fmt: skip
    assert [(cell.length, cell.depth, cell.count) for cell in grid.by_length] == [(350, None, 8), (450, None, 8)]
    assert grid.tokens == 7  # this tokenizer has no digit pairs
    assert Grid.from_json(grid.as_json()) == grid
    nats = answer_losses(model, [one for one in made if len(one.ids) == 350])
    assert grid.by_length[0].nats == pytest.approx(float(nats.mean()), rel=1e-5)
    with pytest.raises(DataError, match="at least one question"):
        make_grid("reference", [])


def test_a_length_weighs_each_question_alike() -> None:
    asked = [(0.0, 1.0), (0.0, 3.0), (0.0, 5.0), (1.0, 11.0)]
    grid = make_grid("reference", [Probe(350, depth, True, nats, 7) for depth, nats in asked])
    assert [cell.nats for cell in grid.cells] == [3.0, 11.0]
    assert [cell.nats for cell in grid.by_length] == [5.0]


def test_regimes_are_measured_side_by_side_and_the_model_keeps_its_own(
    model: Multimodal, letters: TextTokenizer
) -> None:
    made = grid_documents(letters, TEXTS, [250, 300], 2, part="evaluation", depths=[0.5])
    set_regime(model, "long")
    try:
        reference, long, short = measure_grid(model, made, regimes=("reference", "long", "short"))
        assert model.config.decoder.rope.regime == "long"
        assert model.decoder.config.rope.regime == "long"
    finally:
        set_regime(model, "reference")
    assert [grid.regime for grid in (reference, long, short)] == ["reference", "long", "short"]
    # the original window is 256: the model reads 250 by the short table and 300 by the long one
    assert reference.cells[0] == short.cells[0] != long.cells[0]
    assert reference.cells[1] == long.cells[1] != short.cells[1]


def test_the_window_studys_words_are_read_by_it(tokenizer: TextTokenizer) -> None:
    """The facts are, to the id, those that `data.retrieval.facts_row` trains on."""
    phrases, writer = Phrases(tokenizer), Words(tokenizer)
    for fact in writer.facts(np.random.default_rng(0), "search", 9, [phrases.states, phrases.keys[0]]):
        states, key, value = fact.ids
        assert fact.ids == phrases.fact(key, value)
        assert fact.question == [*phrases.question(key), value]
        assert (states, fact.scored) == (phrases.states, 1)
        assert key != phrases.keys[0]  # the text has it behind the sign of a fact
