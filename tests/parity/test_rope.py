"""Every rotary method has transformers' frequencies and attention factor, and a model exported with LongRope its
logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from modalora.checkpoint import configs
from modalora.checkpoint.config_decoder import ROPE_KEYS
from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import convert, save_model
from modalora.contracts import Batch, Route
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderConfig
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.nn.rope import (
    DynamicNtk,
    Form,
    Linear,
    Llama3,
    LongRope,
    Ntk,
    NtkByParts,
    Plain,
    Rope,
    ScalingLawNtk,
    Yarn,
    as_longrope,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(fields: dict[str, Any], head_dim: int, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Return frequencies and attention factor of a model whose config.json has these keys."""
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, **fields)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)


def drawn(seed: int) -> list[tuple[Rope, int]]:
    """Return random settings of each method whose form transformers has, with a head size."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Rope, int]] = []
    for _ in range(6):
        head_dim = int(rng.choice([16, 64, 96, 128]))
        original = int(rng.choice([128, 2048, 8192]))
        factor = float(rng.choice([2, 8, 10, 64]))
        base: dict[str, Any] = {"theta": float(rng.choice([1e3, 1e4, 5e5])), "window": int(original * factor)}
        if (share := float(rng.choice([1.0, 0.75, 0.5]))) * head_dim % 2 == 0:
            base["rotated"] = share
        both = {**base, "original_window": original}
        pairs = int(head_dim * base.get("rotated", 1.0)) // 2
        fast = float(rng.choice([32, 16]))
        lists = {name: tuple((1 + factor * np.sort(rng.random(pairs))).tolist()) for name in ("short", "long")}
        long = {f"{name}_factor": values for name, values in lists.items()} | both
        methods: list[Rope] = [
            Plain(**base),
            Linear(factor=factor, **base),
            DynamicNtk(factor=factor, **both),
            ScalingLawNtk(**both),
            NtkByParts(factor=factor, beta_fast=fast, **both),
            Yarn(factor=factor, beta_fast=fast, truncate=bool(rng.random() < 0.5), **both),
            Yarn(factor=factor, mscale=0.707, mscale_all_dim=1.0, **both),
            Yarn(factor=factor, attention=1.25, **both),
            Llama3(factor=factor, high_freq_factor=float(rng.choice([2, 4])), **both),
            LongRope(**long),
            LongRope(temperature="yarn", **long),
            LongRope(mscale=(1.1, 1.1), **long),
        ]
        found += [(rope, head_dim) for rope in methods]
    return found


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("seed", range(4))
def test_frequencies_and_attention_factors_are_those_of_transformers(seed: int, form: Form) -> None:
    for rope, head_dim in drawn(seed):
        for long in (False, True):
            length = rope.window if long else getattr(rope, "original_window", 1)
            frequencies, factor = theirs(rope.to_hf(form), head_dim, length)
            # float32 powers, whose order of rounding differs: worst seen 3e-7
            torch.testing.assert_close(rope.frequencies(head_dim, long=long), frequencies, rtol=1e-6, atol=0)
            assert rope.attention_factor(long=long) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 131_072])
def test_dynamic_ntk_is_that_of_transformers_at_every_length(length: int) -> None:
    rope = DynamicNtk(factor=4.0, theta=5e5, window=131_072, original_window=2048)
    frequencies, _ = theirs(rope.to_hf(), 128, length)
    torch.testing.assert_close(rope.at(length).frequencies(128), frequencies, rtol=1e-6, atol=0)


def test_a_fixed_ntk_is_transformers_dynamic_one_at_one_length() -> None:
    frequencies, _ = theirs(DynamicNtk(factor=3.0, window=384, original_window=128).to_hf(), 64, 256)
    torch.testing.assert_close(Ntk(factor=4.0).frequencies(64), frequencies, rtol=1e-6, atol=0)  # 3 x 2 - (3 - 1)


# --------------------------------------------------------------------------------------------------------------- export

# As LongRoPE2 finds them: the anchor at pair 4 of 6, the rest between s and 2 s, the fast ones by the rule below it.
LAMBDA = (*(8.5 ** (pair / 4) for pair in range(4)), 8.5, 9.75)
ROPE = LongRope(short_factor=(1.0,) * 6, long_factor=LAMBDA, theta=1000.0, rotated=0.75, window=512, original_window=64)


def made(rope: Rope, seed: int = 0) -> Multimodal:
    """Return a random decoder that all of its angles tell on."""
    sizes = DecoderConfig(
        vocab_size=oracle.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rope=rope,
    )  # fmt: skip
    model = Multimodal(ModelConfig(decoder=sizes)).eval()
    oracle.spread(model, seed)
    return model


@torch.no_grad()
def logits(model: Multimodal, ids: torch.Tensor) -> torch.Tensor:
    return model(Batch(ids, torch.tensor([ids.shape[1]]), Route((None,))))[0]


@pytest.mark.parametrize(
    "rope",
    [
        ROPE,
        replace(ROPE, short_factor=(1.0, 1.0, 1.1, 1.1, 1.3, 1.5)),
        replace(ROPE, temperature="yarn"),
        replace(ROPE, mscale=(1.0, 1.0)),
    ],
    ids=["su", "short", "yarn", "none"],
)
def test_an_exported_longrope_has_the_logits_of_transformers(rope: LongRope, tmp_path: Path) -> None:
    model, words = made(rope), oracle.tokenizer()
    save_model(model, words, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "phi3", "phi3")
    reference = Phi3ForCausalLM.from_pretrained(tmp_path / "phi3", attn_implementation="eager").eval()
    ids = torch.randint(oracle.VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
    for length in (1, 40, 64, 65, 200):  # up to the original window, and beyond it
        with torch.no_grad():
            told = reference(ids[:, :length], use_cache=False).logits[0]
        # float32 on both sides, logits of about one: worst seen 4e-6; the wrong table is 0.1 off
        torch.testing.assert_close(logits(model, ids[:, :length]), told, atol=1e-4, rtol=0)
    wrong = logits(made(replace(rope, regime="long")), ids[:, :64])
    assert float((wrong - logits(model, ids[:, :64])).abs().max()) > 0.1

    back = load_model(tmp_path / "phi3").model
    assert torch.equal(logits(back, ids), logits(model, ids))
    if rope.temperature == "su":
        assert back.config == model.config


@pytest.mark.parametrize(
    "rope",
    [
        Linear(factor=8.0, theta=1000.0, window=512),
        Yarn(factor=8.0, theta=1000.0, window=512, original_window=64),
        ScalingLawNtk(theta=1000.0, window=512, original_window=64),
    ],
    ids=lambda rope: rope.kind,
)
def test_other_methods_are_refused_and_exported_as_divisors(rope: Rope, tmp_path: Path) -> None:
    model, words = made(rope), oracle.tokenizer()
    with pytest.raises(ConfigError, match=rf"plain and longrope, not {rope.kind}; as_longrope\(rope, head_dim\)"):
        save_model(model, words, tmp_path / "no", layout="phi3")
    assert list(tmp_path.iterdir()) == []
    same = made(as_longrope(rope, 16))
    save_model(same, words, tmp_path / "phi3", layout="phi3")
    reference = Phi3ForCausalLM.from_pretrained(tmp_path / "phi3", attn_implementation="eager").eval()
    ids = torch.randint(oracle.VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        told = reference(ids, use_cache=False).logits[0]
    # as above; the divisors' roundings of 2e-7 add angles of 200 x 2e-7 rad
    torch.testing.assert_close(logits(model, ids), told, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        (DynamicNtk(factor=8.0, window=512, original_window=64), "dynamic_ntk has a table for every length, which no"),
        (replace(ROPE, mscale=(1.0, 1.2)), r"mscale=\(1.0, 1.2\): transformers multiplies"),
        (replace(ROPE, regime="long"), "regime='long' is a setting of this run"),
    ],
    ids=["dynamic", "two scales", "regime"],
)
def test_what_a_form_cannot_hold_is_refused_and_nothing_written(rope: Rope, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        save_model(made(rope), oracle.tokenizer(), tmp_path / "no", layout="phi3")
    assert list(tmp_path.iterdir()) == []


def test_both_forms_are_read_by_transformers_phi3() -> None:
    sizes = configs.write_config("phi3", made(ROPE).config, {"pad_token_id": 0})
    for form in ("rope_parameters", "rope_scaling"):
        fields = {key: value for key, value in sizes.items() if key not in ROPE_KEYS}
        config = Phi3Config(**fields, **ROPE.to_hf(form))
        told = config.rope_parameters
        assert (told["rope_type"], told["original_max_position_embeddings"]) == ("longrope", 64)
        assert tuple(told["long_factor"]) == LAMBDA
        assert (told["rope_theta"], told["partial_rotary_factor"]) == (1000.0, 0.75)
        assert config.max_position_embeddings == 512
