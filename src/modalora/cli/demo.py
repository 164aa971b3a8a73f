"""`modalora demo`: the bundled model on bundled inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modalora.cli import options

if TYPE_CHECKING:
    from modalora.assistant import Assistant

INPUTS = Path(__file__).parents[1] / "bundled" / "demo"
CASES = (  # with the right answers: nano does not always give them
    ((), "What is twelve plus five?", "seventeen"),
    ((), "Repeat: the quick brown fox", "the quick brown fox"),
    (("scene.png",), "How many circles are there?", "three"),
    (("scene.png",), "What color is the triangle?", "black"),
    (("digits.wav",), "Transcribe the audio clip into text.", "three seven one"),
    (("digits.wav",), "Add the numbers.", "eleven"),
    (("scene.png", "number.wav"), "Is the spoken number the number of circles?", "yes"),
    (("scene.png", "question.wav"), "", "three"),
)


def demo(device: options.Device = "cpu") -> None:
    """Answer a text, a picture, a recording and both together; show the routes, and that text is unchanged to the
    last bit.

    Example: modalora demo
    """
    import modalora

    started = time.perf_counter()
    assistant = modalora.load("nano", device=device)
    for line in transcript(assistant):
        print(line, flush=True)
    same = text_is_unchanged(assistant)
    print(f"text logits with and without the adapters: {'identical to the last bit' if same else 'DIFFERENT'}")
    print(f"took {time.perf_counter() - started:.0f} s; the inputs are in {INPUTS}. Next:")
    print("  modalora ask nano 'How many squares are there?' --image YOUR.png")
    print("  modalora route explain nano 'Hi' --audio YOUR.wav")
    print("  modalora chat nano")
    if not same:
        raise typer.Exit(1)


def transcript(assistant: Assistant) -> Iterator[str]:
    """Yield question, answer and route of every case, line by line."""
    for files, question, right in CASES:
        sounds = [INPUTS / name for name in files if name.endswith(".wav")]
        images = [INPUTS / name for name in files if name.endswith(".png")]
        answer = assistant.ask(question, image=images, audio=sounds, max_tokens=48)
        yield f"> {' '.join([*(f'[{name}]' for name in files), question]).strip()}"
        yield answer.text
        told = f"adapter: {answer.route['adapter'] or 'none'}, prompt: {answer.usage['prompt_tokens']} tokens"
        yield f"  ({told})" if answer.text == right else f"  ({told}; right would be {right})"


def text_is_unchanged(assistant: Assistant) -> bool:
    """Compare text logits with those of the same decoder built without adapters and encoders."""
    import torch

    from modalora.assistant import Assistant, make_processor
    from modalora.models.multimodal import ModelConfig, Multimodal

    config = ModelConfig(decoder=assistant.model.config.decoder)
    bare = Multimodal(config).to(assistant.device).eval()
    weights = assistant.model.state_dict()
    bare.load_state_dict({name: weights[name] for name in bare.state_dict()})
    alone = Assistant(bare, make_processor(config, assistant.processor.tokenizer))
    texts = [question for files, question, _ in CASES if not files]
    return all(torch.equal(alone.logits(text), assistant.logits(text)) for text in texts)
