"""How good is the bundled model? Every figure of the README's table, on validation data, greedy decoding.

    make bench            (or: python benchmarks/nano.py [--folds runs/folds] [--model nano] [--quick])

Prints one row per figure with its number of cases and 95 % interval. --folds names a folder with one model per
left-out speaker (FOLDS/SPEAKER/speech/model), as `make folds` trains them. --quick takes a tenth of the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import modalora
from modalora.cli.demo import text_is_unchanged
from modalora.contracts import Message
from modalora.data.rows import conversation
from modalora.data.scenes import nlvr_like
from modalora.data.speech import digit_string, spoken_digits
from modalora.data.text import books
from modalora.data.voices import question_voices, sentence_voices
from modalora.evaluation import tasks
from modalora.evaluation.mixed import worst_differences
from modalora.evaluation.perplexity import bits_per_byte
from timing import where

DATA = Path(os.environ.get("MODALORA_DATA", "../shared/data"))
CACHE = Path("runs/cache")  # of training: voices take minutes to make


@dataclass
class Figure:
    """One row of the table."""

    name: str
    least: str
    stretch: str
    measured: str
    cases: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--folds", type=Path, default=Path("runs/folds"))
    parser.add_argument("--only", nargs="+", help="measure these parts: text digits folds strings questions ...")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table and the wrong answers here, as JSON")
    options = parser.parse_args()
    share = 10 if options.quick else 1
    started = time.perf_counter()
    assistant = modalora.load(options.model)
    figures: list[Figure] = []
    wrong: dict[str, list[dict[str, str]]] = {}

    def add(name: str, least: str, stretch: str, measured: str, cases: str = "") -> None:
        figures.append(Figure(name, least, stretch, measured, cases))
        print(f"{name:<58} {measured:>22} {cases}", flush=True)

    valid = spoken_digits(DATA, "validation")

    def text() -> None:
        texts = [text[: len(text) // share] for text in books(DATA, "validation")]
        add("text: bits per byte, books/validation", "1.9", "1.5", f"{bits_per_byte(assistant, texts):.3f}")

    def digits() -> None:
        found = tasks.score(assistant, tasks.single_digits(valid)[::share])
        wrong["single"] = found.wrong
        add("spoken digits, single, word accuracy", "98 %", "99.5 %", *percent(found))

    def folds() -> None:
        for speaker, answers in _folds(options.folds, add, share):
            wrong[f"left out {speaker}"] = answers

    def strings() -> None:
        found = tasks.score(assistant, tasks.digit_strings(valid, 500 // share))
        wrong["strings"] = found.wrong
        rate = f"{100 * found.word_error_rate:.2f} %"
        add("digit strings of 3-7, word error rate", "3 %", "1 %", rate, f"{found.words} words")

    def questions() -> None:
        found = tasks.score(assistant, tasks.nlvr_questions(DATA, 1200 // share))
        wrong["questions"] = found.wrong
        add("NLVR pictures: count/colour/position questions", "85 %", "97 %", *percent(found))
        groups(found)

    def sentences() -> None:
        found = tasks.score(assistant, tasks.nlvr_sentences(DATA)[::share])
        wrong["sentences"] = found.wrong
        add("NLVR human sentences, true/false", "report", "66 %", *percent(found))
        groups(found)

    def others() -> None:
        found = tasks.score(assistant, tasks.generated_questions(600 // share))
        wrong["generated pictures"] = found.wrong
        add("generated pictures of other shapes, questions", "report", "", *percent(found))
        groups(found)

    def series() -> None:
        found = tasks.score(assistant, tasks.frame_questions(DATA, 300 // share))
        wrong["several pictures"] = found.wrong
        add("two or three NLVR pictures, questions", "report", "", *percent(found))

    def together() -> None:
        found = tasks.score(assistant, tasks.numbers_and_pictures(DATA, 1800 // share))
        wrong["image + speech"] = found.wrong
        add("image + speech: spoken number vs. picture", "85 %", "97 %", *percent(found))

    def asked_aloud() -> None:
        for bank, kind in ((sentence_voices, "questions"), (question_voices, "many questions")):
            for split, name in (("train", f"{kind} heard in training"), ("validation", f"new {kind}")):
                cases = tasks.spoken_questions(DATA, bank(CACHE, split), 300 // share)
                found = tasks.score(assistant, cases)
                wrong[f"spoken {name}"] = found.wrong
                measured, interval = percent(found)
                add(f"NLVR pictures, asked by espeak-ng: {name}", "report", "", measured, f"{interval}, {clips(cases)}")

    def words() -> None:
        cases = tasks.text_questions(next(books(DATA, "validation")), assistant.processor.tokenizer, 200 // share)
        found = tasks.score(assistant, cases, max_tokens=120)
        wrong["words"] = found.wrong
        add("text: sums, copying, recall of a list", "report", "", *percent(found))
        groups(found)

    def exact() -> None:
        add("text logits changed by adapters", "0 bits", "", "0 bits" if text_is_unchanged(assistant) else "CHANGED")
        logits, gradients = worst_differences(assistant, mixed_rows())
        add("mixed batch vs. row by row, fp32: logits / gradients", "1e-5", "", f"{logits:.1e} / {gradients:.1e}")

    def groups(found: tasks.Score) -> None:
        for group, (right, count) in sorted(found.groups.items()):
            add(f"  of which {group}", "", "", f"{100 * right / count:.1f} %", f"{count}")

    sections = (text, words, digits, folds, strings, questions, others, series, sentences, together, asked_aloud, exact)
    known = [section.__name__ for section in sections]
    if options.only and not set(options.only) <= set(known):
        parser.error(f"--only takes {', '.join(known)}")
    for section in sections:
        if not options.only or section.__name__ in options.only:
            section()

    print()
    print(table(figures))
    place, spent = where(torch.get_num_threads()), time.perf_counter() - started
    print(f"\n{place}: {' '.join(['python', *sys.argv])}, {spent:.0f} s")
    if options.out:
        record = {"machine": place, "command": sys.argv}
        record |= {"figures": [vars(figure) for figure in figures], "wrong": wrong}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _folds(folder: Path, add: Callable[..., None], share: int) -> list[tuple[str, list[dict[str, str]]]]:
    rows = spoken_digits(DATA, "train") + spoken_digits(DATA, "validation")
    result: list[tuple[str, list[dict[str, str]]]] = []
    shares: list[float] = []
    for path in sorted(folder.glob("*/speech/model")):
        speaker = path.parts[-3]
        left_out = [clip for clip in rows if clip.speaker == speaker]
        found = tasks.score(modalora.load(path), tasks.single_digits(left_out)[::share])
        shares.append(found.accuracy)
        result.append((speaker, found.wrong))
        add(f"  speaker {speaker} left out of training", "", "", *percent(found))
    if shares:
        mean = f"{100 * sum(shares) / len(shares):.1f} %"
        add("single digits of a left-out speaker, mean", "80 %", "95 %", mean, f"{len(shares)} folds")
    return result


def mixed_rows() -> list[list[Message]]:
    """Return finished conversations of every kind."""
    rng = np.random.default_rng(3)
    clip = digit_string(spoken_digits(DATA, "validation"), rng, 2, 4, augmented=False)
    sound = ("audio", (clip.wave, clip.rate))
    picture = ("image", nlvr_like(rng).image)
    media = ([], [picture], [sound], [picture, sound])
    answers = ("one", "two three", "four", "five six seven")
    return [conversation(own, [("How many are there?", answer)]) for own, answer in zip(media, answers, strict=True)]


def clips(cases: Sequence[tasks.Case]) -> str:
    """Return how many recordings the cases share: an interval over cases tells nothing of other recordings."""
    waves = {id(part["audio"][0]) for case in cases for part in case.messages[0]["content"] if part["type"] == "audio"}
    return f"{len(waves)} clips"


def percent(found: tasks.Score) -> tuple[str, str]:
    """Return accuracy, and the cases with the 95 % interval."""
    low, high = found.interval
    return f"{100 * found.accuracy:.1f} %", f"{found.count} ({100 * low:.1f}-{100 * high:.1f})"


def table(figures: list[Figure]) -> str:
    """Return the figures as a Markdown table."""
    rows = [f"| {f.name.strip()} | {f.least} | {f.stretch} | {f.measured} | {f.cases} |" for f in figures]
    return "\n".join(
        ["| figure | at least | stretch | measured | cases (95 % interval) |", "|---|---|---|---|---|", *rows]
    )


if __name__ == "__main__":
    main()
