"""`adapter verify` against a certificate: one bit of the base that differs is found, and its tensor named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modalora.checkpoint import verify
from modalora.checkpoint.adapters import save_adapter
from modalora.checkpoint.files import MANIFEST, Weights, seal
from modalora.checkpoint.preserve import CERTIFICATE, differences, preservation, probe_logits
from modalora.checkpoint.write import save_model
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.sizes import tiny
from small import fox

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder, and the folder of an adapter that was certified on it."""
    torch.manual_seed(0)
    model = Multimodal(tiny()).eval()
    trained = {name for name, _ in model.named_parameters() if part_of(name) == "adapter.vision"}
    for name, own in model.named_parameters():
        if name in trained:
            torch.nn.init.normal_(own, std=0.1)
    certificate = preservation(model, trained)
    save_model(model, fox(), tmp_path / "model", certificate=certificate)
    save_adapter(model, "vision", tmp_path / "lora", certificate)
    return tmp_path / "model", tmp_path / "lora"


def flip(model: Path, name: str, bit: int) -> None:
    """Change one bit of a stored tensor."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    wanted = bytes(Weights(model).get(name).contiguous().flatten().view(torch.uint8).tolist())
    at = data.index(wanted)
    data[at + bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def test_an_untouched_base_is_as_certified(run: Run, base: tuple[Path, Path]) -> None:
    model, lora = base
    code, out, _ = run("adapter", "verify", str(model), str(lora))
    assert code == 0
    frozen = len(json.loads((lora / CERTIFICATE).read_text())["frozen"])
    assert f"preserved  {frozen} frozen tensors and the logits of 4 texts are as certified" in out
    told = f"base       {frozen} frozen tensors and the logits of 4 texts are as certified\n"
    assert run("adapter", "verify", str(model))[:2] == (0, told)


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize(
    "name", ["decoder.layers.1.mlp.down_proj.weight", "encoders.image.tower.patch_embedding.weight"]
)
def test_one_flipped_bit_is_found_and_its_tensor_named(
    run: Run, base: tuple[Path, Path], name: str, resealed: bool
) -> None:
    model, lora = base
    flip(model, name, 5000)
    if resealed:  # so that the manifest, which names files only, is content
        (model / MANIFEST).unlink()
        seal(model)
    for arguments in ((str(model), str(lora)), (str(model),)):
        code, out, err = run("adapter", "verify", *arguments)
        assert (code, out) == (2, "")
        assert f"{name} is not what it was" in err


def test_an_adapter_is_verified_on_a_base_that_lacks_what_stood_beside_it(run: Run, base: tuple[Path, Path]) -> None:
    model, lora = base
    certificate = json.loads((lora / CERTIFICATE).read_text())
    frozen = len(certificate["frozen"])
    beside = ("decoder.layers.0.mlp.down_proj.lora_A.idle", "encoders.smell.table.weight")
    certificate["frozen"] |= dict.fromkeys(beside, "0" * 64)
    (lora / CERTIFICATE).write_text(json.dumps(certificate))
    code, out, err = run("adapter", "verify", str(model), str(lora))
    told = "; this model lacks adapter.idle, smell.encoder, beside which the adapter was trained\n"
    assert (code, err, f"preserved  {frozen} frozen tensors" in out, told in out) == (0, "", True, True)
    for name in ("decoder.layers.9.mlp.down_proj.weight", "encoders.image.more.weight"):  # parts that the base has
        more = certificate["frozen"] | {name: "0" * 64}
        (lora / CERTIFICATE).write_text(json.dumps(certificate | {"frozen": more}))
        code, _, err = run("adapter", "verify", str(model), str(lora))
        assert (code, f"not the base that was certified: {name} is missing" in err) == (2, True)


def test_a_changed_file_that_no_network_reads_is_found_by_the_manifest(run: Run, base: tuple[Path, Path]) -> None:
    path = base[0] / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")  # says the same
    for arguments in ((str(base[0]), str(base[1])), (str(base[0]),)):
        code, out, err = run("adapter", "verify", *arguments)
        assert (code, out, "tokenizer.json" in err) == (2, "", True)


def test_a_model_without_a_certificate_says_so(run: Run, base: tuple[Path, Path]) -> None:
    for folder in base:
        (folder / CERTIFICATE).unlink()
    (base[0] / MANIFEST).unlink()
    seal(base[0])
    code, _, err = run("adapter", "verify", str(base[0]))
    assert (code, CERTIFICATE in err) == (2, True)
    assert "not certified" in run("adapter", "verify", str(base[0]), str(base[1]))[1]


def test_the_bundled_model_is_as_its_last_stage_found_it(run: Run) -> None:
    code, out, _ = run("adapter", "verify", "nano")  # logits are compared on the processor that certified them alone
    assert (code, "371 frozen tensors" in out, "as certified" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("field", "value"), [("torch", "1.0"), ("device", "abacus"), ("threads", 0), ("threads", 10**9)]
)
def test_logits_summed_elsewhere_are_not_compared_and_this_is_told(
    run: Run, base: tuple[Path, Path], field: str, value: str | int
) -> None:
    model = base[0]
    certificate = json.loads((model / CERTIFICATE).read_text())
    certificate["logits"] = ["0" * 64] * len(certificate["logits"])

    def verified() -> tuple[int, str, str]:
        (model / CERTIFICATE).write_text(json.dumps(certificate))
        (model / MANIFEST).unlink()
        seal(model)
        return run("adapter", "verify", str(model))

    assert "the text logits of probe 0 differ" in verified()[2]
    certificate[field] = value
    code, out, _ = verified()
    assert (code, "logits are not compared" in out, str(value) in out) == (0, True, True)


def test_logits_are_compared_on_as_many_threads_as_were_certified(run: Run, base: tuple[Path, Path]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert "logits of 4 texts are as certified" in run("adapter", "verify", str(base[0]))[1]
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_check_that_fails_leaves_the_threads_as_they_were(base: tuple[Path, Path], monkeypatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(verify, "preservation", fail)
    certificate = json.loads((base[0] / CERTIFICATE).read_text())
    (base[0] / CERTIFICATE).write_text(json.dumps(certificate | {"threads": torch.get_num_threads() + 1}))
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        verify.verify_base(base[0], None, "cpu")
    assert torch.get_num_threads() == threads


def test_what_trained_is_no_part_of_the_certificate() -> None:
    model = Multimodal(tiny()).eval()
    names = {name for name, _ in model.named_parameters() if part_of(name) == "adapter.speech"}
    before = preservation(model, names)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name in names:
                own.add_(1.0)
    assert differences(before, preservation(model, names)) == []
    with torch.no_grad():
        model.decoder.norm.weight[0] += 1e-6
    (told,) = differences(before, preservation(model, names))
    assert told.startswith("decoder.norm.weight")


def test_the_probes_are_text_that_no_adapter_touches() -> None:
    model = Multimodal(tiny()).eval()
    before = probe_logits(model)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_" in name:
                own.fill_(float("nan"))
    assert probe_logits(model) == before
    with torch.no_grad():
        model.decoder.norm.weight[0] += 1e-3
    assert all(one != other for one, other in zip(probe_logits(model), before, strict=True))
