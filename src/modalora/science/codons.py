"""Codons as tokens, after GenSLMs (Zvyagin et al. 2022): three letters in frame are one token.

Ids: 0 .. 63 are the codons of ACGT in that order, 64 is NNN, 65 is <|endoftext|>, which stands before and behind a
document and fills padded rows. Letters are those of IUPAC, in either case, U for T, white space left out. The rules
that GenSLMs leave open:
- a codon with any letter but ACGT is NNN. The model reads it and is never asked for it: its label is IGNORED.
- one or two letters behind the last whole codon are what `partial` says: NNN, as in GenSLMs, nothing, or an error.
- padding is never in the loss (GenSLMs train on it).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product

from modalora.contracts import IGNORED
from modalora.errors import ConfigError, DataError

CODONS = tuple("".join(letters) for letters in product("ACGT", repeat=3))
NUMBER = {codon: number for number, codon in enumerate(CODONS)}
UNKNOWN, END = 64, 65
VOCAB_SIZE = 66
UNKNOWN_CODON, END_OF_TEXT = "NNN", "<|endoftext|>"
IUPAC, COMPLEMENTS = "ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN"
_COMPLEMENT = str.maketrans(IUPAC, COMPLEMENTS)

PARTIAL = ("unknown", "drop", "refuse")  # what becomes of a partial codon


def clean(letters: str) -> str:
    """Return a sequence in capitals, T for U, without white space. Raises DataError for what is no letter of IUPAC."""
    letters = "".join(letters.split()).upper().replace("U", "T")
    if strange := sorted(set(letters) - set(IUPAC)):
        at = min(letters.index(one) for one in strange)
        raise DataError(
            f"{letters[at]!r} at letter {at + 1} of {letters[:20]!r}... is no nucleotide; give {IUPAC} (U is T), gaps "
            "taken out"
        )
    return letters


def encode(letters: str, *, partial: str = "unknown") -> list[int]:
    """Return the ids of a sequence, read from its first letter on.

    partial: what one or two letters behind the last whole codon become: NNN, nothing, or an error. Raises DataError.
    """
    if partial not in PARTIAL:
        raise ConfigError(f"partial={partial!r} must be one of {', '.join(PARTIAL)}")
    letters = clean(letters)
    rest = len(letters) % 3
    if rest and partial == "refuse":
        raise DataError(
            f"{len(letters)} letters are {len(letters) // 3} codons and {rest} more; give whole codons, or "
            "partial='drop' to leave the rest out"
        )
    whole = [NUMBER.get(letters[at : at + 3], UNKNOWN) for at in range(0, len(letters) - 2, 3)]
    return [*whole, UNKNOWN] if rest and partial == "unknown" else whole


def decode(ids: Sequence[int]) -> str:
    """Return the letters of ids, documents' ends left out. Raises DataError for an id that is none."""
    if strange := [number for number in ids if not 0 <= number < VOCAB_SIZE]:
        raise DataError(f"{strange[0]} is no id of a codon; they are 0 to {VOCAB_SIZE - 1}")
    return "".join((*CODONS, UNKNOWN_CODON, "")[number] for number in ids)


def targets(ids: Sequence[int]) -> list[int]:
    """Return the labels of ids: nobody is asked to say NNN."""
    return [IGNORED if number == UNKNOWN else number for number in ids]


def reverse_complement(letters: str) -> str:
    """Return the other strand, read in its own direction."""
    return clean(letters)[::-1].translate(_COMPLEMENT)


REVERSED = (*(NUMBER[reverse_complement(codon)] for codon in CODONS), UNKNOWN, END)  # by id


def reverse_complement_ids(ids: Sequence[int]) -> list[int]:
    """Return the ids of the other strand, in the frame that begins at the last letter."""
    return [REVERSED[number] for number in reversed(ids)]


def definition() -> str:
    """Return a tokenizer.json of these ids, so that a codon model is a model folder like any other.

    It cannot refuse: letters that `encode` does not know become NNN, and so does a partial codon.
    """
    replaced = [
        {"type": "Replace", "pattern": {"Regex": r"\s"}, "content": ""},
        *({"type": "Replace", "pattern": {"String": old}, "content": old.upper()} for old in "acgt"),
        *({"type": "Replace", "pattern": {"String": old}, "content": "T"} for old in "uU"),
    ]
    vocabulary = {codon: number for number, codon in enumerate((*CODONS, UNKNOWN_CODON))}
    end = {
        "id": END, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": {"type": "Sequence", "normalizers": replaced},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": ".{1,3}"}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN_CODON},
    }  # fmt: skip
    return json.dumps(fields)
