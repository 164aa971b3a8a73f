"""Model folders: what is saved comes back to the bit, and nothing altered is read."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalora.checkpoint.card import CONFIG, TOKENIZER, WEIGHTS, read_card
from modalora.checkpoint.files import MANIFEST, Weights, check_manifest, mapped, release, write_folder
from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.disk import digest, read_json, write_json
from modalora.errors import CheckpointError, ConfigError, WorkError
from modalora.models.multimodal import Multimodal
from modalora.nn.quantised import to_int8
from modalora.processing.tokenizer import TextTokenizer
from small import fox, shaken


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return fox()


@pytest.fixture(scope="module")
def model() -> Multimodal:
    return shaken()


@pytest.fixture
def folder(tmp_path: Path, model: Multimodal, tokenizer: TextTokenizer) -> Path:
    save_model(model, tokenizer, tmp_path / "model", notes={"why": "test"})
    return tmp_path / "model"


def reseal(folder: Path) -> None:
    """Write the manifest anew, as someone would who altered a file with care."""
    names = (CONFIG, WEIGHTS, TOKENIZER)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in names
        if (folder / name).exists()
    }
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = read_json(folder / CONFIG)
    change(fields)
    write_json(folder / CONFIG, fields)
    reseal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    reseal(folder)


def test_a_model_comes_back_to_the_bit(folder: Path, model: Multimodal, tokenizer: TextTokenizer) -> None:
    loaded = load_model(folder)
    assert loaded.model.config == model.config
    assert not loaded.model.training
    assert loaded.notes == {"why": "test"}
    assert loaded.tokenizer.definition == tokenizer.definition
    saved, back = model.state_dict(), loaded.model.state_dict()
    assert list(saved) == list(back)
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_folder_holds_four_files_and_no_draft(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted((CONFIG, WEIGHTS, TOKENIZER, MANIFEST))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_has_the_rights_of_the_umask(
    tmp_path: Path, model: Multimodal, tokenizer: TextTokenizer, umask: int, rights: int
) -> None:
    before = os.umask(umask)
    try:
        save_model(model, tokenizer, tmp_path / "new")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == dict.fromkeys(
        (CONFIG, WEIGHTS, TOKENIZER, MANIFEST), rights
    )


def test_a_model_may_be_read_in_another_dtype(folder: Path, model: Multimodal) -> None:
    back = load_model(folder, dtype=torch.bfloat16).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor.bfloat16())


def test_a_network_runs_in_the_dtype_of_most_of_its_numbers(folder: Path) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:  # 45,056 numbers in 3 tensors; 37,184 in 11 stay float32
            if name.startswith("decoder.") and name.endswith(("embed_tokens.weight", "gate_up_proj.weight")):
                tensors[name] = tensors[name].bfloat16()

    change_tensors(folder, store)
    network = load_model(folder).model
    assert network.decoder.norm.weight.dtype == torch.bfloat16
    assert network.encoders["image"].tower.patch_embedding.weight.dtype == torch.float32


def test_int8_is_within_half_a_scale_and_a_quarter_of_the_size(
    tmp_path: Path, folder: Path, model: Multimodal, tokenizer: TextTokenizer
) -> None:
    small = tmp_path / "small"
    save_model(model, tokenizer, small, int8=True)
    back = load_model(small).model.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2 or len(tensor) == 1:
            assert torch.equal(back[name], tensor), name
            continue
        flat, other = tensor.flatten(1), back[name].flatten(1)
        # the scale has eight bits of precision, so half of it may be 1 / 512 more than half of max / 127
        bound = flat.abs().amax(1) / 127 / 2 * (1 + 2**-8)
        assert bool(((flat - other).abs().amax(1) <= bound).all()), name
    assert (small / WEIGHTS).stat().st_size < 0.4 * (folder / WEIGHTS).stat().st_size


def test_storing_an_expanded_matrix_again_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    values, scale = to_int8(torch.randn(40, 30, 3))
    again, other = to_int8(values.float() * scale)
    assert torch.equal(values, again)
    assert torch.equal(scale, other)


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    values, scale = to_int8(torch.zeros(2, 3))
    assert not (values.float() * scale).any()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_one_flipped_bit_is_found_and_the_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        load_model(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        load_model(folder)


def test_a_truncated_file_is_told_by_its_size(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} has {len(data) - 10} bytes, the manifest says {len(data)}"):
        load_model(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match="its header promises"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"format": 1}', '{"format": 1, "files": {"a": 3}}', "\xff"])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_model(folder)


def test_an_absent_manifest_and_an_absent_folder_are_told(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(folder / "none")


def test_a_manifest_that_lists_nothing_vouches_for_nothing(folder: Path) -> None:
    write_json(folder / MANIFEST, {"format": 1, "files": {}})
    with pytest.raises(CheckpointError, match="config.json is not in the manifest"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_a_manifest_may_not_lead_out_of_its_folder(folder: Path, kind: str) -> None:
    secret = folder.parent / "secret"
    secret.write_text("x")
    name = {"parent": "../secret", "absolute": str(secret), "link": "link"}[kind]
    (folder / "link").symlink_to(secret)
    manifest = read_json(folder / MANIFEST)
    manifest["files"][name] = {"bytes": 1, "sha256": digest(secret)}
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        check_manifest(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("decoder.norm.weight"), "decoder.norm.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "extra is unknown"),
        (
            lambda tensors: tensors.update({"decoder.norm.weight": torch.ones(65)}),
            r"decoder.norm.weight has shape \[65\], the config implies \[64\]",
        ),
        (
            lambda tensors: tensors.update({"decoder.norm.weight": torch.ones(64, dtype=torch.long)}),
            "decoder.norm.weight has dtype I64; floats and int8 are read",
        ),
        (
            lambda tensors: tensors.update({"decoder.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "decoder.norm.weight is int8 without a scale per row",
        ),
        (
            lambda tensors: tensors.update({"decoder.norm.weight.scale": torch.ones(64)}),
            "decoder.norm.weight.scale belongs to no int8 tensor",
        ),
    ],
)
def test_tensors_must_be_those_that_the_config_implies(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=f"model does not fit its config: {told}$"):
        load_model(folder)


def test_an_unknown_config_key_is_answered_with_the_right_one(folder: Path) -> None:
    change_config(folder, lambda fields: fields["decoder"].update(hiden_size=3))
    with pytest.raises(
        ConfigError, match=r"config.json: unknown key 'decoder.hiden_size'; did you mean 'hidden_size'\?"
    ):
        load_model(folder)


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 0), ("vocab_size", -1), ("num_hidden_layers", 0)])
def test_sizes_in_a_config_that_make_no_network_are_refused(folder: Path, field: str, value: int) -> None:
    change_config(folder, lambda fields: fields["decoder"].update({field: value}))
    with pytest.raises(ConfigError, match=f"{field}={value} must be at least 1"):
        load_model(folder)


@pytest.mark.parametrize(("key", "value"), [("model_type", "llama"), ("format", 2)])
def test_another_layout_is_refused(folder: Path, key: str, value: object) -> None:
    change_config(folder, lambda fields: fields.update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        read_card(folder)


def test_a_key_given_twice_is_refused(folder: Path) -> None:
    text = (folder / CONFIG).read_text().replace('"vocab_size": 320,', '"vocab_size": 320, "vocab_size": 320,')
    (folder / CONFIG).write_text(text)
    reseal(folder)
    with pytest.raises(CheckpointError, match="the key 'vocab_size' stands twice"):
        load_model(folder)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / TOKENIZER).write_text("{}")
    reseal(folder)
    with pytest.raises(CheckpointError, match=TOKENIZER):
        load_model(folder)


def test_an_existing_folder_is_not_written_over(folder: Path, model: Multimodal, tokenizer: TextTokenizer) -> None:
    before = digest(folder / MANIFEST)
    with pytest.raises(CheckpointError, match="exists; give a new folder, nothing was written"):
        save_model(model, tokenizer, folder)
    assert digest(folder / MANIFEST) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_memory_is_given_back_whatever_else_is_mapped(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5000)}, tmp_path / "model.safetensors")
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\r\n\x0b odd"))  # no UTF-8, and what looks like lines
    other.write_bytes(b"odd")
    with other.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        tensor = Weights(tmp_path).get("a")
        spans = mapped()
    assert any(begin <= tensor.data_ptr() < end for begin, end in spans)
    release(tensor, spans)
    assert torch.equal(tensor, torch.arange(5000))


def test_the_name_of_a_new_folder_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[tuple[int, bool]] = []
    real = os.fsync

    def synced(handle: int) -> None:
        there.append((os.fstat(handle).st_ino, (tmp_path / "new").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", synced)
    write_folder(tmp_path / "new", lambda draft: write_json(draft / "a.json", {}))
    assert there[-1] == (tmp_path.stat().st_ino, True)


def test_nothing_half_written_is_left_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"

    def fill(draft: Path) -> None:
        write_json(draft / "a.json", {"new": 1})
        raise OSError("disk full")

    with pytest.raises(WorkError, match="folder could not be written, and nothing of it is left: disk full"):
        write_folder(target, fill)
    assert list(target.parent.iterdir()) == []
