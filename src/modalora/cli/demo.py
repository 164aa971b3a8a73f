"""`modalora demo`: the bundled model on bundled inputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from modalora.assistant import Assistant

INPUTS = Path(__file__).parents[1] / "bundled" / "demo"
CASES = (
    ("text", "What is twelve plus five?", (), ()),
    ("text", "Repeat: the quick brown fox", (), ()),
    ("image", "How many circles are there?", ("scene.png",), ()),
    ("image", "What color is the star?", ("scene.png",), ()),
    ("sound", "Transcribe the audio clip into text.", (), ("digits.wav",)),
    ("sound", "Add the numbers.", (), ("digits.wav",)),
    ("image + sound", "Is the spoken number the number of circles?", ("scene.png",), ("number.wav",)),
    ("image + sound", "", ("scene.png",), ("question.wav",)),
)


def demo() -> None:
    """Answer a text, a picture, a recording and both together; show the routes, and that text is unchanged to the
    last bit.

    Example: modalora demo
    """
    import modalora

    started = time.perf_counter()
    assistant = modalora.load("nano")
    parameters = sum(parameter.numel() for parameter in assistant.model.parameters())
    print(f"nano: {parameters / 1e6:.1f} million parameters, a toy trained on two CPU cores; its inputs: {INPUTS}\n")
    for kind, question, images, sounds in CASES:
        answer = assistant.ask(
            question, image=[INPUTS / name for name in images], audio=[INPUTS / name for name in sounds], max_tokens=48
        )
        files = " ".join((*images, *sounds))
        adapter = answer.route["adapter"] or "none"
        print(f"[{kind}] {files}{' ' if files else ''}{question}".rstrip())
        print(f"  {answer.text}")
        print(f"  route: adapter {adapter}, {answer.usage['prompt_tokens']} prompt tokens\n")
    same = text_is_unchanged(assistant)
    print(f"text logits with and without the adapters: {'identical to the last bit' if same else 'DIFFERENT'}")
    print(f"took {time.perf_counter() - started:.0f} s. Next:")
    print("      modalora ask nano 'How many squares are there?' --image YOUR.png")
    print("      modalora chat nano    modalora route explain nano 'Hi' --audio YOUR.wav    modalora doctor")
    if not same:
        raise typer.Exit(1)


def text_is_unchanged(assistant: Assistant) -> bool:
    """Compare text logits with those of the same decoder built without adapters and encoders."""
    import torch

    from modalora.assistant import Assistant, make_processor
    from modalora.models.multimodal import ModelConfig, Multimodal

    config = ModelConfig(decoder=assistant.model.config.decoder)
    bare = Multimodal(config).eval()
    weights = assistant.model.state_dict()
    bare.load_state_dict({name: weights[name] for name in bare.state_dict()})
    alone = Assistant(bare, make_processor(config, assistant.processor.tokenizer), "decoder")
    texts = [question for kind, question, *_ in CASES if kind == "text"]
    return all(torch.equal(alone.logits(text), assistant.logits(text)) for text in texts)
