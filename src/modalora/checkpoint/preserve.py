"""The base-preservation certificate: proof that what was frozen has not moved, bit for bit.

It lists the SHA-256 of every frozen tensor and of the text logits of a few fixed prompts, and is stored beside the
model and its adapters as preservation.json.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modalora.checkpoint.files import Weights
from modalora.checkpoint.names import plain_name
from modalora.config import parse
from modalora.contracts import Batch, Route
from modalora.disk import read_json
from modalora.errors import CheckpointError
from modalora.models.multimodal import Multimodal

CERTIFICATE = "preservation.json"
_PROBES, _PROBE_TOKENS = 4, 24


@dataclass(frozen=True)
class Preservation:
    """What a model was when it was certified.

    frozen: SHA-256 of each tensor that did not train. logits: SHA-256 of the text logits of each probe, empty when the
    decoder trained. torch, threads, device: logits are the same bits only where sums are taken in the same order.
    """

    frozen: Mapping[str, str]
    logits: tuple[str, ...]
    torch: str
    threads: int
    device: str = ""  # certificates up to 2026-11-22 do not tell

    @property
    def sums(self) -> str:
        """Return in words what the order of sums depends on."""
        return f"torch {self.torch}, threads: {self.threads}, {self.device or 'a device it does not name'}"

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of all frozen tensors."""
        return hashlib.sha256(
            "".join(f"{name}{told}" for name, told in sorted(self.frozen.items())).encode()
        ).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with its family, model and the widest vectors torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = {"model name": platform.processor() or platform.machine()}
    with suppress(OSError):  # Linux tells more; each field as it is for the first core
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        told |= {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = [f"{key} {told[key]}" for key in ("cpu family", "model") if key in told]
    return " ".join([told["model name"], *family, torch.backends.cpu.get_cpu_capability()])


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bits."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def preservation(model: Multimodal, trained: Collection[str]) -> Preservation:
    """Certify what does not train, and text logits when the decoder is among it."""
    frozen = {name: own for name, own in model.state_dict().items() if name not in trained}
    base = {name for name in model.decoder.state_dict() if "lora_" not in name}
    whole = all(f"decoder.{name}" in frozen for name in base)
    return Preservation(
        frozen={name: tensor_digest(own) for name, own in frozen.items()},
        logits=probe_logits(model) if whole else (),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=device_name(model.device),
    )


@torch.no_grad()
def probe_logits(model: Multimodal) -> tuple[str, ...]:
    """Return the SHA-256 of the logits of each fixed probe of plain text, which no adapter may touch."""
    was_training = model.training
    model.eval()
    rng = np.random.default_rng(20250303)
    device = model.device
    found = []
    for _ in range(_PROBES):
        ids = torch.from_numpy(rng.integers(0, model.config.decoder.vocab_size, (1, _PROBE_TOKENS))).to(device)
        batch = Batch(input_ids=ids, lengths=torch.tensor([_PROBE_TOKENS], device=device), route=Route((None,)))
        found.append(tensor_digest(model(batch)))
    model.train(was_training)
    return tuple(found)


def brought_with(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the tensors of encoders and projectors that an adapter's folder brings, by our names."""
    weights = Weights(folder, "adapter_model")
    named = {plain_name(key): key for key in weights.entries}
    return {
        name: tensor_digest(weights.get(key))
        for name, key in named.items()
        if name.startswith(("encoders.", "projectors."))
    }


def differences(certified: Preservation, found: Preservation) -> list[str]:
    """Return what differs from the certificate, tensors first, in words; empty: nothing moved.

    Logits are compared where both were summed in one order (`sums`).
    """
    told = []
    for name, before in certified.frozen.items():
        if name not in found.frozen:
            told.append(f"{name} is missing")
        elif found.frozen[name] != before:
            told.append(f"{name} is not what it was: its SHA-256 differs")
    if not told and certified.sums == found.sums and certified.logits and found.logits:
        pairs = zip(certified.logits, found.logits, strict=True)
        told += [f"the text logits of probe {n} differ" for n, (one, other) in enumerate(pairs) if one != other]
    return told


def read_certificate(folder: Path) -> Preservation:
    """Read a folder's certificate. Raises CheckpointError when it has none."""
    path = folder / CERTIFICATE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {CERTIFICATE}; `modalora train` writes one when the decoder is frozen")
    return parse(Preservation, read_json(path), str(path))
