"""Byte-level BPE with control tokens that text can never produce (tokenizers library; o200k's or cl100k's splitting).

The rule: `encode` sees text only, so "<|end|>" typed by a user becomes ordinary tokens. Control ids come from
`control`.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import inf, prod
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from modalora.errors import CheckpointError, PromptError

END_OF_TEXT = "<|endoftext|>"
END = "<|end|>"
ASSISTANT = "<|assistant|>"
PLACEHOLDERS = {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}  # one per media token in the rendered prompt

# Phi's control tokens in the order of their published ids.
CONTROL_TOKENS = (
    END_OF_TEXT,
    *PLACEHOLDERS.values(),
    "<|endofprompt|>",
    ASSISTANT,
    END,
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_response|>",
    "<|tag|>",
)

# Word pieces that know case and contractions, digits in groups of one to three, punctuation runs, newlines, spaces.
_SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


# Of Phi-3-small, whose released tokenizer is tiktoken's file of ranks: the control tokens behind them stand in code.
RANKS = "cl100k_base.tiktoken"
_RANKS_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_RANKS_CONTROL = (
    "<|dummy_id_2|>",
    END_OF_TEXT,
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|system|>", "<|user|>", ASSISTANT, "<|dummy_id_0|>", "<|dummy_id_1|>", END),
    *(f"<|dummy_id_{number}|>" for number in range(3, 12)),
    "<|endofprompt|>",
    *(f"<|dummy_id_{number}|>" for number in range(12, 87)),
)
_MOST_MERGES = 1_000_000  # pairs that make a word: a few for each of cl100k's 100,256

_MOST_GROWTH = 16  # times that a tokenizer may lengthen a text; Llama-2's doubles one of a single letter
_SETTLED = 16  # ids after which text that ends with a whole character is not decoded again
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of byte fallback


def _is_control(token: Mapping[str, Any]) -> bool:
    """Tell whether an added token is one that only a chat format writes; others are words like any.

    Published tokenizers do not mark all of their control tokens as special.
    """
    return bool(token.get("special")) or bool(re.fullmatch(r"<\|.*\|>|</?(?:s|unk|pad|bos|eos)>", token["content"]))


def _never_first(split: dict[str, Any]) -> dict[str, Any]:
    """Return a pre-tokenizer that puts no space before its first word."""
    if split.get("type") == "Sequence":
        return {**split, "pretokenizers": [_never_first(one) for one in split["pretokenizers"]]}
    if split.get("type") == "Metaspace" and split.get("prepend_scheme") == "first":
        return {**split, "prepend_scheme": "never"}
    return split


def _growth(part: Any) -> float:
    """Return how many times as long a normalizer, pre-tokenizer or decoder makes a text at most."""
    if not isinstance(part, dict):
        return 1
    kind, content = str(part.get("type")), part.get("content", "")
    if kind == "Sequence":
        return prod(_growth(step) for key in ("normalizers", "pretokenizers", "decoders") for step in part.get(key, ()))
    if kind == "Replace":
        found = part.get("pattern", {}).get("String")  # a regular expression may match between any two letters
        return max(1.0, len(content) / len(found)) if found else 1 + len(content)
    if kind == "Prepend":
        return 1 + len(part.get("prepend", ""))
    # a letter of n bytes becomes n; the last two may be told to put a space behind every letter
    return {"Precompiled": inf, "ByteLevel": 4, "BPEDecoder": 2, "CTC": 2}.get(kind, 1)


def _byte_level(model: models.BPE, split: str) -> Tokenizer:
    """Return a tokenizer of bytes that never joins two of the pieces that a regular expression cuts."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_ranks(file: bytes) -> str:
    """Return the tokenizer.json of tiktoken's ranks, lines of a word in base 64 and its id. Raises CheckpointError.

    tiktoken joins the two neighbours that make the lowest word, so every pair that makes a word is a merge of its rank.
    The order within a rank is no matter: joined in that way, the bytes of a word are two in one way alone.
    """
    try:
        lines = [line.split() for line in file.splitlines() if line]
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError:
        ranks = {}
    alphabet = {bytes([byte]) for byte in range(256)}
    if not alphabet <= ranks.keys() or [*ranks.values()] != [*range(len(lines))]:
        raise CheckpointError("its lines must be words in base 64 with the ids 0, 1, 2 and so on, each byte among them")
    moved = itertools.count(256)  # letters for bytes that are not printed
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = {byte: byte if byte in shown else next(moved) for byte in range(256)}
    written = {word: word.decode("latin-1").translate(letters) for word in ranks}
    merges: list[tuple[str, str]] = []
    for word in ranks:
        cuts = ((word[:at], word[at:]) for at in range(1, len(word)))
        merges += [(written[left], written[right]) for left, right in cuts if left in ranks and right in ranks]
        if len(merges) > _MOST_MERGES:
            raise CheckpointError(f"more than {_MOST_MERGES:,} pairs of its words make a third")
    vocabulary = {written[word]: rank for word, rank in ranks.items()}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True), _RANKS_SPLIT)
    tokenizer.add_special_tokens(list(_RANKS_CONTROL))
    return str(tokenizer.to_str(pretty=False))


class TextTokenizer:
    """Text to ids and back."""

    def __init__(self, definition: str) -> None:
        """definition: the text of a tokenizer.json."""
        fields = json.loads(definition)
        if not isinstance(fields, dict) or not isinstance(fields.get("added_tokens"), list):
            raise CheckpointError("it has no list added_tokens, which names the control tokens")
        for key in ("normalizer", "pre_tokenizer", "decoder"):
            if (growth := _growth(fields.get(key))) > _MOST_GROWTH:
                raise CheckpointError(
                    f"its {key} may make a text {growth:.3g} times as long; at most {_MOST_GROWTH} times is read"
                )
        self._full = Tokenizer.from_str(definition)
        self._full.no_truncation()
        self._full.no_padding()
        added = [token for token in fields["added_tokens"] if _is_control(token)]
        self._control = {token["content"]: int(token["id"]) for token in added}
        self._eats_left = {token["content"] for token in added if token.get("lstrip")}
        self._eats_right = {token["content"] for token in added if token.get("rstrip")}
        # Encoding runs on a copy without control tokens: nothing in the text can match one. Added words are words.
        words = [token for token in fields["added_tokens"] if not _is_control(token)]
        off: dict[str, Any] = {"added_tokens": words, "post_processor": None, "truncation": None, "padding": None}
        self._plain = self._later = Tokenizer.from_str(json.dumps({**fields, **off}))
        # without the control tokens before them, those that the model has no word for got other ids
        found = {self._plain.token_to_id(token["content"]): int(token["id"]) for token in words}
        self._moved = {index: wanted for index, wanted in found.items() if index is not None and index != wanted}
        split = fields.get("pre_tokenizer") or {}
        if (never := _never_first(split)) != split:
            # SentencePiece puts a space before the first word of a prompt, not after a control token
            self._later = Tokenizer.from_str(json.dumps({**fields, **off, "pre_tokenizer": never}))
        # the decoder of byte fallback makes a whole run of bytes U+FFFD where one of its characters is not whole
        falls_back = '"ByteFallback"' in json.dumps(fields.get("decoder"))
        words_by_id = self._full.get_vocab() if falls_back else {}
        self._bytes = {index: int(word[3:5], 16) for word, index in words_by_id.items() if _BYTE.fullmatch(word)}
        self.definition = definition
        ends = (END, END_OF_TEXT)
        self.stop_ids = frozenset(self._control[token] for token in ends if token in self._control)

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read folder/tokenizer.json, or Phi-3-small's ranks where there is none; raise CheckpointError if broken."""
        path, ranks = folder / "tokenizer.json", folder / RANKS
        path = ranks if ranks.exists() and not path.exists() else path
        try:
            return cls(_from_ranks(path.read_bytes()) if path == ranks else path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing; a model folder needs its tokenizer.json, or {RANKS}, as Phi-3-small has it"
            ) from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learn merges from the texts; the control tokens take the last ids of vocab_size."""
        tokenizer = _byte_level(models.BPE(), _SPLIT)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(CONTROL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(list(CONTROL_TOKENS))
        return cls(tokenizer.to_str(pretty=False))

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return int(self._full.get_vocab_size())

    @property
    def last_id(self) -> int:
        """The highest id that is a word or a control token; those behind it are free."""
        return max(self._full.get_vocab().values())

    def encode(self, text: str, *, after: str | None = None, before: str | None = None) -> list[int]:
        """Return the ids of the text, which is never read as a control token.

        after, before: the control tokens around it; some take the white space beside them.
        Raises PromptError for text that is no Unicode: a lone surrogate, as Python makes of undecodable bytes.
        """
        text = text.lstrip() if after in self._eats_right else text
        text = text.rstrip() if before in self._eats_left else text
        plain = self._plain if after is None else self._later
        try:
            ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise PromptError(f"the text {text!r:.60} is not valid Unicode; give text that encodes as UTF-8") from None
        return self._settled(ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, on all cores."""
        return [self._settled(item.ids) for item in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def _settled(self, ids: list[int]) -> list[int]:
        return [self._moved.get(index, index) for index in ids] if self._moved else ids

    def control(self, token: str) -> int:
        """Return the id of a control token. Raises PromptError when the vocabulary has none of that name."""
        if token not in self._control:
            raise PromptError(f"this tokenizer has no control token {token!r}; it has {', '.join(self._control)}")
        return self._control[token]

    def has_control(self, token: str) -> bool:
        """Tell whether there is a control token of this name."""
        return token in self._control

    @cached_property
    def controls(self) -> frozenset[str]:
        """Names of the control tokens."""
        return frozenset(self._control)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that only the chat template writes."""
        return frozenset(self._control.values())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, control tokens left out; bytes that are no character become U+FFFD.

        Further ids change nothing of it but U+FFFD at its end.
        """
        hidden = self.control_ids
        shown = [index for index in ids if index not in hidden]
        if not self._bytes.keys().isdisjoint(shown):
            text: str = self._full.decoder.decode(self._whole(shown))
        else:
            text = self._full.decode(shown, skip_special_tokens=False)
        return text

    def _whole(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as written, but U+FFFD for bytes that are no character: the others of their run stay whole."""
        words: list[str] = []
        for is_byte, run in itertools.groupby(ids, self._bytes.__contains__):
            own = list(run)
            written = [word for index in own if (word := self._full.id_to_token(index)) is not None]
            data = bytes(self._bytes[index] for index in own) if is_byte else b""
            while data:
                try:
                    data.decode()
                    break
                except UnicodeDecodeError as error:
                    words += [*written[: error.start], "\ufffd"]
                    data, written = data[error.end :], written[error.end :]
            words += written
        return words

    def show(self, index: int) -> str:
        """Return how one id is written in explanations."""
        return str(self._full.id_to_token(index))


class Growing:
    """The text of ids that come one by one: what `decode` gives of all so far, for the work of the last few."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """tokenizer: whose ids they are."""
        self._tokenizer = tokenizer
        self._settled = ""  # text that no further id changes
        self._lead = 0  # characters of it that `_ids` begin with: a first word is decoded otherwise than a later one
        self._ids: list[int] = []

    def add(self, index: int) -> str:
        """Return the text, this id included."""
        self._ids.append(index)
        text = self._settled + self._tokenizer.decode(self._ids)[self._lead :]
        if len(self._ids) >= _SETTLED and not text.endswith("\ufffd") and (own := self._tokenizer.decode([index])):
            self._settled, self._lead, self._ids = text, len(own), [index]
        return text
