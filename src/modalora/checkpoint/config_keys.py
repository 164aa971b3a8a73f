"""Keys of a published config.json: read, checked to have the one value that the networks have, known to change no
number, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modalora.errors import ConfigError

Fields = Mapping[str, Any]

# Keys that transformers writes and that change no number of a forward pass.
_INERT = frozenset(
    """architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id full_attn_mod
    gradient_checkpointing id2label initializer_range interpolate_factor is_decoder is_encoder_decoder label2id
    max_sequence_length model_type output_attentions output_hidden_states pad_token_id problem_type return_dict
    tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version use_cache""".split()
)
# Keys that older versions of transformers wrote into every config, or that say what these networks are anyway.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "task_specific_params": (None, {}), "torchscript": (False, None), "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None), "add_cross_attention": (False, None), "use_sliding_window": (False, None),
    "cross_attention_hidden_size": (None,), "use_bfloat16": (False, True, None), "finetuning_task": (None,),
    "output_scores": (False, None), "return_dict_in_generate": (False, None),
}  # fmt: skip
# How answers are chosen, which is asked for here with every question.
_GENERATION = frozenset(
    """bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences prefix remove_invalid_values repetition_penalty sep_token_id suppress_tokens temperature top_k
    top_p typical_p""".split()
)
# Of transformers, of its older versions, of MLX.
_QUANTISED = ("quantization_config", "compression_config", "quantization")
# Rates that matter in training only, where dropout is not used.
_NO_DROPOUT = dict.fromkeys(
    ("attention_dropout", "embd_pdrop", "resid_pdrop", "attention_dropout_prob", "embedding_dropout_prob",
     "ffn_dropout_prob", "dropout_rate", "dropout")
)  # fmt: skip


@dataclass
class Reader:
    """Keys of one JSON object, each asked for once; what is left at the end is refused."""

    fields: Fields
    where: str
    asked: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default where the key is absent."""
        self.asked.add(key)
        return self.fields.get(key, default)

    def need(self, key: str) -> Any:
        """Return a value. Raises ConfigError when the key is absent."""
        if key not in self.fields:
            raise ConfigError(f"{self.where}: {key} is missing")
        return self.get(key)

    def must(self, **values: Any) -> None:
        """Refuse a key whose value is none of the given (one, or a tuple of several); absent keys pass."""
        for key, wanted in values.items():
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            if self.get(key, wanted[0]) not in wanted:
                raise ConfigError(
                    f"{self.where}: {key}={self.fields[key]!r:.60}; these networks have {key}="
                    f"{' or '.join(map(repr, wanted))}"
                )

    def inner(self, key: str) -> Reader:
        """Return a reader of the object under a key."""
        value = self.need(key)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {key} must be an object; it is {type(value).__name__}")
        return Reader(value, f"{self.where}: {key}")

    def sizes(self, **names: str) -> dict[str, Any]:
        """Return values under our names, ours=theirs; absent ones are left out."""
        return {ours: self.get(theirs) for ours, theirs in names.items() if theirs in self.fields}

    def finish(self) -> None:
        """Refuse every key that was not asked for and is not known to be inert."""
        for key in _QUANTISED:
            if self.fields.get(key) is not None:
                raise ConfigError(
                    f"{self.where}: {key} tells that the weights were quantised; give the plain ones, and once they "
                    "are loaded as m, quantize(m.model, 8) of modalora.quantize makes int8 of them (4: int4)"
                )
        known = self.asked | _INERT | _GENERATION | {*_QUANTISED}
        known |= {key for key, plain in _PLAIN.items() if self.fields.get(key) in plain}
        unknown = [key for key in self.fields if key not in known and not key.startswith("_")]
        unknown = [key for key in unknown if not (key in _NO_DROPOUT and isinstance(self.fields[key], int | float))]
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown key {', '.join(map(repr, sorted(unknown)))}; if it changes nothing, remove it "
                "from the file"
            )
