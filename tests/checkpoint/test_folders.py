"""Folders as users have them: moved, given in place of one another, with adapters inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import modalora
from modalora.checkpoint.adapters import CONFIG, WEIGHTS, save_adapter
from modalora.checkpoint.find import find_model
from modalora.checkpoint.store import describe
from modalora.checkpoint.sums import compose, merge
from modalora.checkpoint.write import convert, save_model
from modalora.cli.main import app
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from modalora.nn.lora import LoraConfig
from modalora.nn.packed import can_pack
from small import fox


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a bf16 model in a published layout."""
    torch.manual_seed(0)
    model = Multimodal(ModelConfig(decoder=tiny().decoder)).bfloat16()
    save_model(model, fox(), tmp_path / "base", layout="phi3")
    write_json(tmp_path / "base" / "special_tokens_map.json", {"pad_token": "<|endoftext|>"})
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return a float32 adapter of it."""
    model = modalora.load(base).model
    model.add_adapter("mine", LoraConfig(r=4, lora_alpha=8))
    for linear in model.decoder.routed().values():
        torch.nn.init.normal_(linear.lora_B["mine"])
    save_adapter(model, "mine", tmp_path / "lora")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / WEIGHTS).values()} == {torch.float32}
    return tmp_path / "lora"


def change_of(folder: Path, place: str = "base_model.model.model.layers.1.self_attn.o_proj") -> torch.Tensor:
    """Return B A of one Linear times its scale, in float64."""
    tensors, fields = load_file(folder / WEIGHTS), read_json(folder / CONFIG)
    down, up = (tensors[f"{place}.lora_{side}.weight"].double() for side in "AB")
    return up @ down * (fields["lora_alpha"] / fields["r"])


def test_an_adapter_within_a_model_folder_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, base)
    for use in (modalora.load, describe, lambda folder: convert(folder, tmp_path / "new", "modalora")):
        with pytest.raises(CheckpointError, match=r"holds an adapter beside the model .* move its two files"):
            use(base)


def test_a_model_is_saved_whole_after_the_process_went_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    loaded = modalora.load(".")
    assert repr(loaded).startswith("Assistant(base: ")
    monkeypatch.chdir(tmp_path)
    loaded.save("copy", "phi3")
    assert sorted(path.name for path in Path("copy").iterdir()) == sorted(path.name for path in base.iterdir())
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="base is no folder any more"):
        loaded.save("again", "phi3")


def test_adapters_are_not_rounded_by_a_base_of_fewer_bits(base: Path, adapter: Path, tmp_path: Path) -> None:
    loaded = modalora.load(base)
    loaded.load_adapter(adapter, "mine")
    loaded.save(tmp_path / "copy", "phi3")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "copy" / "mine-lora"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = modalora.load(tmp_path / "copy")
    assert torch.equal(again.logits("Hi", route="mine"), loaded.logits("Hi", route="mine"))

    compose(loaded.model, "mine@0.7", "less")
    save_adapter(loaded.model, "less", tmp_path / "less")
    wanted = 0.7 * change_of(adapter)
    # one product in float32: 4e-8 seen; adapters in bf16 are 2e-3 off
    torch.testing.assert_close(change_of(tmp_path / "less"), wanted, atol=1e-6, rtol=1e-6)

    weight = loaded.model.decoder.routed()["layers.1.self_attn.o_proj"].weight.double()
    merge(loaded.model, "mine")
    merged = loaded.model.decoder.routed()["layers.1.self_attn.o_proj"].weight
    once = (weight + change_of(adapter)).bfloat16()
    # a float32 sum may fall on the other side of a half: none of 4,096 seen; rounded adapters change one in five
    assert (merged != once).sum() < 5


def test_a_packed_model_has_adapters_in_its_own_dtype(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, base / "mine-lora")
    loaded = modalora.load(base)
    wanted = loaded.logits("Hi", route="mine")
    linear = next(iter(loaded.model.decoder.routed().values()))
    assert linear.lora_A["mine"].dtype == torch.float32
    convert(base, tmp_path / "own", "modalora")
    if not can_pack(linear.weight):
        pytest.skip("this CPU has no bf16 products")
    for folder in (base, tmp_path / "own"):
        packed = modalora.load(folder, pack=True)
        packed.load_adapter(adapter, "same")
        assert torch.equal(packed.logits("Hi", route="same"), packed.logits("Hi", route="mine"))
        # 0 seen on an AMD EPYC, bf16 in another order elsewhere; without the adapter 0.96
        torch.testing.assert_close(packed.logits("Hi", route="mine"), wanted, atol=0.05, rtol=0)


def test_adapters_name_their_base_in_full(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = modalora.load("base")
    loaded.load_adapter("lora", "mine")
    loaded.save("copy", "phi3")
    assert read_json(Path("copy/mine-lora") / CONFIG)["base_model_name_or_path"] == str(tmp_path / "copy")
    convert(Path("copy"), Path("again"), "phi3")
    assert read_json(Path("again/mine-lora") / CONFIG)["base_model_name_or_path"] == str(tmp_path / "again")
    save_adapter(loaded.model, "mine", Path("alone"), base=Path("base"))
    convert(Path("copy"), Path("own"), "modalora")  # which PEFT cannot open
    for model, target in (("copy", "sum"), ("own", "own-sum")):
        result = CliRunner().invoke(app, ["adapter", "compose", model, "mine@0.5", target])
        assert result.exit_code == 0, result.output
    told = {name: read_json(Path(name) / CONFIG)["base_model_name_or_path"] for name in ("alone", "sum", "own-sum")}
    assert told == {"alone": str(base), "sum": str(tmp_path / "copy"), "own-sum": None}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda key: key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    ],
    ids=["compile", "DDP", "compile within PEFT", "checkpoints", "FSDP"],
)
def test_adapters_with_the_marks_of_wrappers_are_read(
    rename: Callable[[str], str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "marked").mkdir()
    shutil.copy(adapter / CONFIG, tmp_path / "marked")
    tensors = load_file(adapter / WEIGHTS)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, tmp_path / "marked" / WEIGHTS)
    loaded = modalora.load(base)
    loaded.load_adapter(adapter, "plain")
    loaded.load_adapter(tmp_path / "marked", "marked")
    assert torch.equal(loaded.logits("Hi", route="marked"), loaded.logits("Hi", route="plain"))


def test_an_adapter_in_place_of_a_model_is_told_with_a_config_beside_it(base: Path, adapter: Path) -> None:
    shutil.copy(base / "config.json", adapter)
    with pytest.raises(CheckpointError, match="lora is an adapter, not a model"):
        modalora.load(adapter)


def test_gguf_is_named(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(tmp_path / "phi.gguf")
    with pytest.raises(CheckpointError, match=r"phi.gguf' is GGUF, which is not read; give the folder with"):
        find_model(tmp_path / "phi.gguf")
    (tmp_path / "phi.gguf").rename(base / "phi.gguf")
    with pytest.raises(CheckpointError, match=r"base/phi.gguf is GGUF, which is not read"):
        find_model(base)


def test_a_folder_that_cannot_name_an_adapter_is_refused_wherever_it_is_listed(base: Path, adapter: Path) -> None:
    shutil.copytree(adapter, base / "my.adapter-lora")
    for use in (modalora.load, describe):
        with pytest.raises(CheckpointError, match=r"base/my.adapter-lora .*'my.adapter' cannot name an adapter"):
            use(base)


def test_a_folder_of_several_adapters_names_them(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20"):
        shutil.copytree(adapter, tmp_path / "out" / name)
    loaded = modalora.load(base)
    with pytest.raises(CheckpointError, match="out is no adapter but holds some; give .*-10 or .*out/checkpoint-20"):
        loaded.load_adapter(tmp_path / "out", "mine")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is never opened; save the adapter as safetensors"):
        loaded.load_adapter(adapter, "mine")
