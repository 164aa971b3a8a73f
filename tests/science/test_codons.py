from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalora.contracts import IGNORED
from modalora.errors import ConfigError, DataError
from modalora.processing.tokenizer import TextTokenizer
from modalora.science import codons

IN_FRAME = st.lists(st.sampled_from(codons.CODONS), max_size=40).map("".join)
LETTERS = st.text(codons.IUPAC, max_size=60)


@given(IN_FRAME)
def test_letters_in_frame_come_back_as_they_were(letters: str) -> None:
    assert codons.decode(codons.encode(letters, partial="refuse")) == letters


def test_the_vocabulary_is_64_codons_nnn_and_the_end_of_a_document() -> None:
    assert len(set(codons.CODONS)) == 64
    assert codons.encode("".join(codons.CODONS)) == list(range(64))
    assert (codons.UNKNOWN, codons.END, codons.VOCAB_SIZE) == (64, 65, 66)
    assert TextTokenizer(codons.definition()).vocab_size == codons.VOCAB_SIZE


@given(LETTERS)
def test_the_other_strand_of_the_other_strand_is_the_sequence(letters: str) -> None:
    assert codons.reverse_complement(codons.reverse_complement(letters)) == letters


@given(LETTERS)
def test_the_other_strand_is_biopythons(letters: str) -> None:
    sequence = pytest.importorskip("Bio.Seq", reason="the reference is Biopython").Seq(letters)
    assert codons.reverse_complement(letters) == str(sequence.reverse_complement())


@given(IN_FRAME)
def test_the_other_strand_can_be_had_from_ids(letters: str) -> None:
    assert codons.reverse_complement_ids(codons.encode(letters)) == codons.encode(codons.reverse_complement(letters))


def test_a_codon_with_another_letter_is_nnn_and_nobody_is_asked_for_it() -> None:
    ids = codons.encode("ATGNNAccRuaa")
    assert ids == [codons.NUMBER["ATG"], 64, 64, codons.NUMBER["TAA"]]
    assert codons.decode(ids) == "ATGNNNNNNTAA"
    assert codons.targets(ids) == [ids[0], IGNORED, IGNORED, ids[3]]


def test_letters_behind_the_last_codon_follow_the_policy_that_is_asked_for() -> None:
    assert codons.encode("ATGAA") == [codons.NUMBER["ATG"], codons.UNKNOWN]
    assert codons.encode("ATGAA", partial="drop") == [codons.NUMBER["ATG"]]
    with pytest.raises(DataError, match="5 letters are 1 codons and 2 more; give whole codons"):
        codons.encode("ATGAA", partial="refuse")
    with pytest.raises(ConfigError, match="partial='guess' must be one of unknown, drop, refuse"):
        codons.encode("ATGAA", partial="guess")  # type: ignore[arg-type]


def test_what_is_no_nucleotide_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match="'-' at letter 4 of 'ATG-TAA'"):
        codons.encode("ATG-TAA")
    with pytest.raises(DataError, match="66 is no id of a codon"):
        codons.decode([0, 66])


@given(LETTERS, st.booleans())
def test_the_tokenizer_of_a_model_folder_gives_the_same_ids(letters: str, low: bool) -> None:
    tokenizer = TextTokenizer(codons.definition())
    written = letters.lower().replace("t", "u") if low else letters
    assert tokenizer.encode(f"{written[:7]}\n{written[7:]}") == codons.encode(letters)
    assert tokenizer.decode([*codons.encode(letters), codons.END]) == codons.decode(codons.encode(letters))
