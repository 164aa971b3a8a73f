"""Every task is solved again from the text of its prompt, by means of its own."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from stories import TEXTS

from modalora.assistant import Assistant, make_processor
from modalora.errors import ConfigError, DataError
from modalora.evaluation import ruler
from modalora.evaluation.documents import make_documents
from modalora.evaluation.intervals import wilson
from modalora.evaluation.puzzles import COMMON, HOPS, TASKS, zipf_counts
from modalora.evaluation.ruler import (
    Report,
    Sample,
    TaskCell,
    answer_samples,
    make_samples,
    run_tasks,
    score_answer,
)
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import TextTokenizer

TOLD = re.compile(r"The locker code of the ([a-z]+-[a-z]+) is (\d{7})\.")
ASKED = re.compile(r"What (?:is|are all \d+)(?: the)? locker codes? of the ([^?]+) in the text above\?")


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Processor:
    return make_processor(tiny(), tokenizer)


def text_of(processor: Processor, sample: Sample) -> str:
    return processor.tokenizer.decode(sample.ids)


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(processor: Processor, task: str, form: str) -> None:
    for length, example in ((900, False), (1600, True), (2048, False)):
        for sample in make_samples(processor, task, length, 2, texts=TEXTS, form=form, example=example):
            assert 0.95 * length <= len(sample.ids) + sample.budget <= length
            answer = " " + ", ".join(sample.answers) + " and."
            assert len(processor.tokenizer.encode(answer)) <= sample.budget
            assert text_of(processor, sample).endswith(" is" if len(sample.answers) == 1 else " are")


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_samples_and_another_seed_others(processor: Processor, task: str) -> None:
    def made(seed: int) -> list[str]:
        return [sample.sha256 for sample in make_samples(processor, task, 1200, 3, texts=TEXTS, seed=seed)]

    assert made(1) == made(1)
    assert len({*made(1), *made(2)}) == 6


@pytest.mark.parametrize(
    ("task", "things", "asked"),
    [
        ("single-repeated", 1, 1), ("single-book", 1, 1), ("multi-key", 4, 1), ("multi-value", 1, 1),
        ("multi-query", 4, 4),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_hidden_once_in_the_text(processor: Processor, task: str, things: int, asked: int) -> None:
    for sample in make_samples(processor, task, 1500, 4, texts=TEXTS):
        text = text_of(processor, sample)
        told = TOLD.findall(text)
        (names,) = ASKED.findall(text)
        sought = re.findall(r"[a-z]+-[a-z]+", names)
        assert len(told) == len(set(told)) == max(things, len(sample.answers))
        assert (len({name for name, _ in told}), len(sought)) == (things, asked)
        assert {number for name, number in told if name in sought} == set(sample.answers)
        for answer in sample.answers:
            assert text.count(answer) == 1
        if task != "single-repeated":
            plain = TOLD.sub("", text)  # the book goes on around it
            assert sum(line in "".join(TEXTS) for line in plain.split(".")) > 20


def test_a_needle_among_needles_is_one_of_many_that_all_differ(processor: Processor) -> None:
    for sample in make_samples(processor, "single-needles", 1500, 4):
        told = TOLD.findall(text_of(processor, sample))
        (name,) = ASKED.findall(text_of(processor, sample))
        assert len(told) == len(dict(told)) > 30
        assert sample.answers == (dict(told)[name],)


def test_needles_are_found_at_all_depths_and_behind_sentences(processor: Processor) -> None:
    shares = []
    for sample in make_samples(processor, "single-book", 500, 40, texts=TEXTS):
        text = text_of(processor, sample)
        before, _, behind = text.partition("The locker code of the")
        body = before.partition("\n\n")[2]
        assert not body or re.search(r"[.]\s*$", body)
        shares.append(len(body) / (len(body) + len(behind)))
    # 40 draws of a uniform share: none in the first quarter has a chance of 1e-5
    assert min(shares) < 0.25
    assert max(shares) > 0.75


def test_variables_are_a_chain_of_five_names_in_order(processor: Processor) -> None:
    for sample in make_samples(processor, "variables", 900, 4):
        text = text_of(processor, sample)
        chain = re.findall(r"LET ([A-Z]{5}) = (\w+)\.", text)
        assert tuple(name for name, _ in chain) == sample.answers
        assert len(set(sample.answers)) == HOPS + 1 == 5
        assert [value for _, value in chain][1:] == list(sample.answers[:-1])
        number = chain[0][1]
        assert re.fullmatch(r"[1-9]\d{4}", number)
        assert f"have the value {number} in the end?" in text


@pytest.mark.parametrize(("length", "often", "seldom"), [(900, 6, 1), (8192, 30, 3)])
def test_exactly_ten_words_are_common(tokenizer: TextTokenizer, length: int, often: int, seldom: int) -> None:
    (sample,) = make_samples(make_processor(tiny(), tokenizer), "common-words", length, 1)
    text = tokenizer.decode(sample.ids)
    listed = re.findall(r"(\d+)\. ([a-z]{6})", text)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    assert len(sample.answers) == COMMON == 10
    assert set(counts.values()) == {often, seldom}
    assert len(counts) >= 20


def test_frequent_words_are_the_three_behind_the_dots(processor: Processor) -> None:
    for sample in make_samples(processor, "frequent-words", 1500, 4):
        body = text_of(processor, sample).split("\n\n")[1].split()
        counts = Counter(body)
        ranked = counts.most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *sample.answers]
        assert ranked[3][1] > ranked[4][1]


def test_words_come_as_often_as_the_inverse_square_of_their_rank() -> None:
    counts = np.array(zipf_counts(100_000, 40))
    shares = counts / counts[0]
    np.testing.assert_allclose(shares, np.arange(1, 41.0) ** -2, atol=1e-5)
    assert counts.sum() == pytest.approx(100_000, abs=40)
    for total in range(80, 2000):
        for kinds in (8, 50):
            assert zipf_counts(total, kinds)[3] > zipf_counts(total, kinds)[4]


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_solved_in_front_and_names_other_things(processor: Processor, task: str) -> None:
    for sample in make_samples(processor, task, 1800, 2, texts=TEXTS, example=True):
        text = text_of(processor, sample)
        opening = text[:40]
        assert text.count(opening) == 2
        front, back = text[: text.rindex(opening)], text[text.rindex(opening) :]
        names, others = ({name for name, _ in TOLD.findall(part)} for part in (front, back))
        assert not names & others
        assert not any(answer in front for answer in sample.answers)
        assert re.search(r" (is|are) [^?]+\.\n\n$", front)


def test_tasks_share_nothing_with_the_documents_of_a_search(processor: Processor) -> None:
    documents = make_documents(processor.tokenizer, TEXTS[:1], 20, length=500, part="search", distractors=5)
    searched = " ".join(processor.tokenizer.decode(document.ids) for document in documents)
    named = set(re.findall(r"[a-z]+-[a-z]+|\d{7}", searched))
    assert len(named) > 200  # of 20 documents with 6 facts each
    for task in TASKS:
        for sample in make_samples(processor, task, 1400, 3, texts=TEXTS[1:], example=True):
            text = text_of(processor, sample)
            assert not named & set(re.findall(r"[a-z]+-[a-z]+|\d{7}", text))
            sentences = {one for one in re.split(r"[.?]\s*", text) if len(one) > 25}
            assert sentences
            assert not any(sentence in searched for sentence in sentences)


def test_what_does_not_fit_is_refused(processor: Processor) -> None:
    with pytest.raises(ConfigError, match="task 'niah' must be one of single-repeated, "):
        make_samples(processor, "niah", 500, 1)
    with pytest.raises(DataError, match=r"task 'common-words' needs \d+ tokens .* and 300 are asked for"):
        make_samples(processor, "common-words", 300, 1)
    with pytest.raises(DataError, match="hides things in running text and none was given"):
        make_samples(processor, "multi-key", 500, 1)
    with pytest.raises(DataError, match=r"runs out after \d+ of 2000 tokens; give longer texts"):
        make_samples(processor, "single-book", 2000, 1, texts=[TEXTS[0][:2000]])
    with pytest.raises(ConfigError, match="form='raw' must be one of plain, chat"):
        make_samples(processor, "variables", 500, 1, form="raw")


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("said", "every", "some"),
    [
        (" WRCNN, yijtq and CZXRV.", 1.0, 1.0),
        ("The names are CZXRV, WRCNN.", 2 / 3, 1.0),
        ("YIJT Q", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("xwrcnnx", 1 / 3, 1.0),
    ],
)
def test_all_counts_the_share_of_answers_and_part_whether_there_is_one(said: str, every: float, some: float) -> None:
    answers = ("WRCNN", "YIJTQ", "CZXRV")
    assert score_answer(said, answers) == score_answer(said, answers, "all") == pytest.approx(every)
    assert score_answer(said, answers, "part") == some


def test_the_effective_length_is_the_longest_up_to_which_averages_hold() -> None:
    def report(**averages: float) -> Report:
        return Report(
            tuple(
                TaskCell(task, int(length[1:]), 10 * score, 10)
                for length, average in averages.items()
                for task, score in (("a", average + 0.05), ("b", average - 0.05))
            )
        )

    assert report(n128=0.9, n256=0.87, n512=0.8).effective_length() == 256
    assert report(n512=0.8, n128=0.9, n256=0.87).effective_length() == 256  # in whatever order
    assert report(n128=0.9, n256=0.8, n512=0.9).effective_length() == 128  # it stays above, or does not count
    assert report(n128=0.8, n256=0.9).effective_length() is None
    assert report(n128=0.8, n256=0.7).effective_length(0.7 - 1e-9) == 256
    assert report(n128=0.855).effective_length() is None
    made = report(n128=0.9, n256=0.6)
    assert made.averages == pytest.approx({128: 0.9, 256: 0.6})
    assert (made.as_json()["threshold"], made.as_json()["effective_length"]) == (0.856, 128)
    assert made.cells[0].interval == wilson(9.5, 10)


def test_scores_are_summed_over_the_samples_of_a_task(
    model: Multimodal, letters: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = Assistant(model, make_processor(tiny(), letters))
    asked: list[int] = []

    def said(given: Assistant, samples: list[Sample], adapter: str | None) -> list[str]:
        asked.append(len(samples))
        return [" and ".join(sample.answers[: len(sample.answers) // 2 or 1]) for sample in samples]

    monkeypatch.setattr(ruler, "answer_samples", said)
    cells = list(run_tasks(assistant, ["multi-value", "single-needles"], [900, 800], samples=5, texts=TEXTS, rows=2))
    assert [(cell.task, cell.length, cell.points, cell.count) for cell in cells] == [
        ("multi-value", 900, 2.5, 5), ("single-needles", 900, 5.0, 5),
        ("multi-value", 800, 2.5, 5), ("single-needles", 800, 5.0, 5),
    ]  # fmt: skip
    assert asked == [2, 2, 1] * 4
    with pytest.raises(ConfigError, match="length 4096 must lie in 2 to 2048, this model's window"):
        next(run_tasks(assistant, ["single-needles"], [512, 4096]))


def test_a_batch_of_samples_is_answered_as_each_alone_within_its_budget(
    model: Multimodal, letters: TextTokenizer
) -> None:
    assistant = Assistant(model, make_processor(tiny(), letters))
    samples = [
        *make_samples(assistant.processor, "single-needles", 300, 2),
        *make_samples(assistant.processor, "frequent-words", 700, 1),
    ]
    said = answer_samples(assistant, samples)
    for sample, text in zip(samples, said, strict=True):
        prompt = "<|endoftext|>" + letters.decode(sample.ids)
        alone = assistant.ask(prompt, raw=True, max_tokens=sample.budget)
        assert alone.usage["prompt_tokens"] == len(sample.ids)
        assert text == alone.text
        assert alone.usage["total_tokens"] <= sample.length
