from __future__ import annotations

import re
from pathlib import Path

import modalora
from modalora.cli.demo import text_is_unchanged, transcript

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_transcript_in_the_readme_is_what_the_demo_says() -> None:
    shown = re.search(r"<!-- transcript -->\n```\n(.*?)\n```", README, re.DOTALL)
    assert shown
    assert shown[1].splitlines() == list(transcript(modalora.load("nano")))


def test_the_bundled_adapters_change_no_bit_of_text() -> None:
    assert text_is_unchanged(modalora.load("nano"))
