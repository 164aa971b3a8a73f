"""Projectors that PEFT saved whole (modules_to_save) give its numbers here, for the rows of their adapter alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_multimodal import TOLERANCE, WORDS, picture, sound

import modalora
from modalora.checkpoint.adapters import save_adapter
from modalora.contracts import Route

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = r"model\.layers\.\d+\.self_attn\.(qkv_proj|o_proj)"


@torch.no_grad()
def test_projectors_that_peft_trained_whole_give_its_numbers(rng: np.random.Generator, tmp_path: Path) -> None:
    words = oracle.tokenizer()
    reference = oracle.multimodal_model(oracle.multimodal_config(rng, words), 5)
    ours = modalora.load(oracle.save(reference, tmp_path / "model", words))
    prompts = {
        "text": [WORDS],
        "image": [picture(rng, 50, 50), WORDS],
        "speech": [sound(rng, 1.3, 16_000), WORDS],
        "image + speech": [picture(rng, 90, 40), sound(rng, 0.7, 16_000)],
    }
    asked = {name: [{"role": "user", "content": parts}] for name, parts in prompts.items()}
    plain = {name: ours.logits(messages, route="none") for name, messages in asked.items()}

    whole = ["img_projection_up", "img_projection_down", "down_proj_for_speech", "up_proj_for_vision_speech"]
    torch.manual_seed(0)
    theirs = get_peft_model(
        reference, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=whole)
    ).eval()
    for name, tensor in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    theirs.save_pretrained(tmp_path / "whole")
    verdict = ours.load_adapter(tmp_path / "whole", "mine")
    assert set(verdict.modules) == {
        "image.projector.vision",
        "audio.projector.speech",
        "audio.projector.vision",
    }
    inner = theirs.base_model.model
    inner.peft_config = {}  # its one adapter stays on; the oracle is not to switch between several
    for name, messages in asked.items():
        batch = ours.processor([messages], route="mine")
        # the reference's sound projector is chosen by its own name, which the adapter's copy has in front
        media = tuple(replace(item, branch=item.branch.removesuffix("-mine")) for item in batch.media)
        told = oracle.run(inner, replace(batch, media=media, route=Route(("default",)))).logits
        mine = ours.model(batch)[0]
        torch.testing.assert_close(mine, told, **TOLERANCE, msg=lambda why, at=name: f"{at}: {why}")
        assert (mine - plain[name]).abs().max() > 0.01
        assert torch.equal(ours.logits(messages, route="none"), plain[name])

    save_adapter(ours.model, "mine", tmp_path / "back")
    first, back = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("whole", "back"))
    assert set(first) <= set(back)  # ours writes both Linears of a projector
    assert all(torch.equal(back[key], tensor) for key, tensor in first.items())
