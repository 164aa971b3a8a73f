"""A model folder compared with the certificate that training left (preserve.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from modalora.checkpoint.files import MANIFEST, check_manifest
from modalora.checkpoint.preserve import CERTIFICATE, brought_with, differences, preservation, read_certificate
from modalora.checkpoint.store import load_model
from modalora.errors import CheckpointError, listed
from modalora.models.multimodal import part_of


def verify_base(model: Path, adapter: Path | None, device: str) -> str:
    """Compare a model with the certificate beside an adapter, or its own; return in words what was found.

    Other adapters, encoders and projectors that the model lacks as a whole are no difference for an adapter.
    Raises CheckpointError naming what differs, or when the model has no certificate of its own.
    """
    if adapter is not None and not (adapter / CERTIFICATE).exists():
        return f"not certified: {adapter} has no {CERTIFICATE}"
    certified = read_certificate(adapter or model)
    # unchecked, so that a tensor can be named, not only the file that holds it
    network = load_model(model, device=device, check=False).model
    trained = set(network.state_dict()) - set(certified.frozen)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(max(certified.threads, 1), 256))  # the last bits of logits depend on it
    try:
        found = preservation(network, trained)
    finally:
        torch.set_num_threads(threads)
    beside: list[str] = []
    if adapter is not None:
        brought = brought_with(adapter)  # frozen parts of a modality that the base lacks
        found = replace(found, frozen=brought | dict(found.frozen))
        held = {part_of(name) for name in (*network.state_dict(), *brought)}
        beside = sorted({part_of(name) for name in certified.frozen} - held - {"decoder"})
        same = {name: told for name, told in certified.frozen.items() if part_of(name) not in beside}
        certified = replace(certified, frozen=same)
    if wrong := differences(certified, found):
        raise CheckpointError(f"{model} is not the base that was certified: {listed(wrong)}")
    if (model / MANIFEST).exists():
        check_manifest(model)
    tensors = f"{len(certified.frozen)} frozen tensors"
    lacks = f"; this model lacks {listed(beside, between=', ')}, beside which the adapter was trained" * bool(beside)
    if certified.sums == found.sums:
        return f"{tensors} and the logits of {len(certified.logits)} texts are as certified{lacks}"
    return (
        f"{tensors} are as certified; logits are not compared, theirs were of {certified.sums}, these of {found.sums}"
        f"{lacks}"
    )
