"""PEFT's adapters load here and ours load in PEFT, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

import modalora
from modalora.assistant import Assistant
from modalora.checkpoint.adapters import save_adapter
from modalora.checkpoint.sums import compose, merge
from modalora.contracts import Batch, Route
from modalora.errors import CheckpointError
from modalora.nn.lora import LoraConfig as Size

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}  # as in test_text.py
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def base(rng: np.random.Generator, folder: Path) -> tuple[Any, Assistant]:
    config = oracle.text_config(rng, num_hidden_layers=3)
    reference = oracle.text_model(config, 0)
    return reference, modalora.load(oracle.save(reference, folder, oracle.tokenizer()))


def trained(reference: Any, settings: dict[str, Any], seed: int = 0) -> Any:
    """Return the reference with a random adapter, as PEFT makes it."""
    torch.manual_seed(seed)
    model = get_peft_model(reference, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[1] ** -0.5)
    return model


def row(ids: torch.Tensor, route: str | None) -> Batch:
    return Batch(input_ids=ids, lengths=torch.tensor([ids.shape[1]]), route=Route((route,)))


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        {"r": 8, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 16, "target_modules": ["o_proj"], "use_rslora": True},
        {**PLAIN, "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"qkv_proj": 3}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"], "layers_to_transform": [0, 2]},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(1|2)\.mlp\.gate_up_proj"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["model.layers.1.self_attn.qkv_proj", "o_proj"],
            "layers_to_transform": [0],
        },
    ],
    ids=["all", "two kinds", "rank-stabilised", "patterns", "some layers", "a regular expression", "a full name"],
)
@torch.no_grad()
def test_what_peft_saved_gives_its_numbers_here_and_back_in_peft(
    settings: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    reference, ours = base(rng, tmp_path / "base")
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, 30)))
    plain = ours.model(row(ids, None))
    theirs = trained(reference, settings)
    theirs.save_pretrained(tmp_path / "lora")
    told = theirs(input_ids=ids).logits
    assert (told - plain).abs().max() > 0.1
    verdict = ours.load_adapter(tmp_path / "lora", "mine")
    torch.testing.assert_close(ours.model(row(ids, "mine")), told, **TOLERANCE)
    assert torch.equal(ours.model(row(ids, None)), plain)
    assert verdict.logit_change > 0.1
    assert verdict.zero == ()

    save_adapter(ours.model, "mine", tmp_path / "ours")
    again = PeftModel.from_pretrained(theirs.unload(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, told, **TOLERANCE)

    ours.save(tmp_path / "model")
    back = modalora.load(tmp_path / "model")
    assert torch.equal(back.model(row(ids, "mine")), ours.model(row(ids, "mine")))


@torch.no_grad()
def test_sums_compositions_and_merges_agree(rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = base(rng, tmp_path / "base")
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, 30)))
    for seed, (name, settings) in enumerate({"a": PLAIN, "b": {**PLAIN, "r": 7, "target_modules": ["o_proj"]}}.items()):
        model = trained(reference, settings, seed)
        model.save_pretrained(tmp_path / name)
        reference = model.unload()
        ours.load_adapter(tmp_path / name, name)
    both = PeftModel.from_pretrained(reference, tmp_path / "a", "a")
    both.load_adapter(tmp_path / "b", "b")
    both.base_model.set_adapter(["a", "b"])
    summed = ours.model(row(ids, "a+b"))
    torch.testing.assert_close(summed, both.eval()(input_ids=ids).logits, **TOLERANCE)

    half = ours.model(row(ids, "a@0.5+b"))
    assert (half - summed).abs().max() > 0.05
    compose(ours.model, "a@0.5+b", "c")
    torch.testing.assert_close(ours.model(row(ids, "c")), half, **TOLERANCE)
    found = merge(ours.model, "a@0.5+b")
    torch.testing.assert_close(ours.model(row(ids, None)), half, **TOLERANCE)
    assert ours.model.adapters == ()
    assert found.error < 1e-6  # float32 keeps 24 bits of a change near one


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_changed_their_base_are_refused(start: str, rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = base(rng, tmp_path / "base")
    trained(reference, {**PLAIN, "init_lora_weights": start}).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{start}': the base weights were changed with it"):
        ours.load_adapter(tmp_path / "lora", "mine")


@torch.no_grad()
def test_sums_of_nothing_are_refused_and_the_adapters_stay(rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = base(rng, tmp_path / "base")
    trained(
        reference,
        {**PLAIN, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "layers_to_transform": []},
    ).save_pretrained(tmp_path / "lora")
    verdict = ours.load_adapter(tmp_path / "lora", "a")
    assert verdict.linears == (12, 12)  # an empty list is all layers, as in PEFT
    ours.load_adapter(tmp_path / "lora", "b")
    weights = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    for change in (lambda: compose(ours.model, "a@0", "c"), lambda: merge(ours.model, "a@0")):
        with pytest.raises(CheckpointError, match="has no weight but zero"):
            change()
    with pytest.raises(CheckpointError, match="changes no weight; there is nothing to merge"):
        merge(ours.model, "a+b@-1")
    assert ours.model.adapters == ("a", "b")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.model.state_dict().items())


@torch.no_grad()
def test_four_broken_adapters_give_four_errors(rng: np.random.Generator, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reference, ours = base(rng, tmp_path / "base")
    trained(reference, PLAIN).save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    broken = {
        "half": ({key: tensor for key, tensor in tensors.items() if ".layers.2." not in key}, "tensors .* are missing"),
        "renamed": (
            {key.replace("qkv_proj", "query"): tensor for key, tensor in tensors.items()},
            "belong to no Linear",
        ),
        "zero": (
            {key: tensor * (0.0 if "lora_B" in key else 1.0) for key, tensor in tensors.items()},
            "lora_B is zero in all",
        ),
        "other": (
            {key: torch.ones(4, 999) if "A" in key else tensor for key, tensor in tensors.items()},
            "another base",
        ),
    }
    for name, (changed, told) in broken.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text((tmp_path / "good" / "adapter_config.json").read_text())
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=told):
            ours.load_adapter(folder, "mine")
        assert ours.model.adapters == ()

    ours.load_adapter(tmp_path / "good", "mine")
    save_adapter(ours.model, "mine", tmp_path / "signed")
    _, other = base(np.random.default_rng(list(rng.bytes(8))), tmp_path / "second")
    same_sizes = modalora.load(tmp_path / "base")
    same_sizes.model.decoder.norm.weight.data += 0.5
    with pytest.raises(CheckpointError, match="was trained on another base model: its base has the fingerprint"):
        same_sizes.load_adapter(tmp_path / "signed", "mine")
    with pytest.raises(CheckpointError, match="another base model|belong to no Linear|missing|fingerprint"):
        other.load_adapter(tmp_path / "signed", "mine")


@torch.no_grad()
def test_an_adapter_of_a_multimodal_base_wraps_the_decoder_alone(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = oracle.tokenizer()
    reference = oracle.multimodal_model(oracle.multimodal_config(rng, words), 5)
    ours = modalora.load(oracle.save(reference, tmp_path / "base", words))
    ours.model.add_adapter("mine", size := Size(r=4, lora_alpha=8))
    for linear in ours.model.decoder.routed().values():
        torch.nn.init.normal_(linear.lora_B["mine"])
    save_adapter(ours.model, "mine", tmp_path / "lora", base=ours.folder)
    monkeypatch.chdir("/")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    wrapped = {name.removeprefix("base_model.model.") for name, one in theirs.named_modules() if hasattr(one, "lora_A")}
    assert wrapped == {f"model.{place}" for place in ours.model.decoder.routed()}
    again = modalora.load(tmp_path / "base")
    again.load_adapter(tmp_path / "lora", "mine")
    assert again.model.config.adapters["mine"] == size
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, 30)))
    assert torch.equal(again.model(row(ids, "mine")), ours.model(row(ids, "mine")))
