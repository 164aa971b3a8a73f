"""What does a training step take at real size on one GPU, in time and memory, beside transformers + PEFT?

image, audio: Phi-4-multimodal whole, a picture of 1,344 x 1,344 or 30 s of sound with a question and an answer; a fresh
adapter of the published rank and the projector train, the rest is frozen bf16. pretrain: a decoder of 1.4 billion
numbers, all of which train, kept in float32 and multiplied in bf16, --rows of 2,048 tokens, each labelled.

Weights are random and the same on both sides, whose losses must agree. A step is forward, backward
and AdamW; memory is all that is held at its peak, weights and moments included; MFU is against a large square product
in bf16 on the same device. `--size tiny` tries the script out.

    python benchmarks/full_size_training.py --device cuda image audio pretrain
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import numpy as np
import oracle
import torch
from PIL import Image
from torch import Tensor, nn

from full_size import build, words
from modalora.assistant import make_processor
from modalora.checkpoint.store import load_model
from modalora.contracts import IGNORED, Batch, Route
from modalora.models.multimodal import ModelConfig, Multimodal, recompute
from modalora.models.sizes import phi4_mini, phi4_multimodal, tiny
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.flops import StepFlops
from modalora.training.optimizer import freeze
from timing import CPU, best, peak, where

BRANCH = {"image": "vision", "audio": "speech"}  # adapter and projector of each work; pretrain has neither
PROJECTOR = {"image": "image_embed.img_projection", "audio": "_proj_for_speech"}  # what transformers calls them
SIDES = ("ours", "ours, recompute", "transformers", "transformers, recompute")
# |ours - theirs| / theirs of the mean loss: bf16 rounds each product to 2^-9, at other places on each side
CLOSE = 0.01

Loss = Callable[[], Tensor]


def config(work: str, size: str) -> ModelConfig:
    whole = phi4_multimodal()
    if size == "tiny":
        small = tiny()
        assert small.speech is not None
        whole = replace(small, speech=replace(small.speech, segment=500))  # the layout's own
    if work != "pretrain":
        return whole
    if size == "tiny":
        return ModelConfig(decoder=whole.decoder)
    decoder = replace(phi4_mini().decoder, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16)
    return ModelConfig(decoder=decoder)


def layout(work: str) -> str:
    return "phi3" if work == "pretrain" else "phi4_multimodal"


def batch_of(work: str, size: str, count: int) -> Batch:
    """Return one row with a picture or a sound, or `count` rows of text."""
    own = config(work, size)
    if work == "pretrain":
        length = min(2048, own.decoder.rope.window)
        ids = torch.randint(0, own.decoder.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))
        return Batch(ids, torch.full((count,), length), Route((None,) * count), labels=ids)
    rng = np.random.default_rng(0)
    side = own.vision.crop if own.vision else 0
    media = {
        "image": Image.fromarray(rng.integers(0, 255, (3 * side, 3 * side, 3), dtype=np.uint8)),
        "audio": (0.1 * rng.standard_normal(30 * 16_000).astype(np.float32), 16_000),
    }
    parts = [{"type": work, work: media[work]}, {"type": "text", "text": "What is this? " * 10}]
    answer = "the lazy dog jumps over the quick brown fox " * 5
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    processor = make_processor(own, TextTokenizer(words(own.decoder.vocab_size)))
    return processor.collate([processor.row(messages, answer=False)])


def operations(work: str, size: str, batch: Batch) -> float:
    """Return those of a step."""
    with torch.device("meta"):
        model = Multimodal(config(work, size))
    return StepFlops(model, patterns(work), decodes=True).of([batch])


def patterns(work: str) -> list[str]:
    """Return the parts that train."""
    name = BRANCH.get(work)
    return [f"adapter.{name}", f"{work}.projector.{name}"] if name else ["decoder"]


def ours(given: argparse.Namespace, batch: Batch) -> tuple[Loss, list[nn.Parameter]]:
    """Return the mean loss of the batch as a function, and what trains."""
    model = load_model(given.folder, dtype=stored(given), device=str(given.device)).model.train()
    if name := BRANCH.get(given.work):
        model.add_adapter(name, replace(config(given.work, given.size).adapters[name], lora_dropout=0.0))
    trained = freeze(model.to(given.device), patterns(given.work))
    for place, parameter in trained.items():
        if ".lora_" in place:
            parameter.data = parameter.data.to(getattr(torch, given.adapters))
    if given.side.endswith("recompute"):
        recompute(model)
    return lambda: model.loss(batch)[0].mean(), list(trained.values())


def theirs(given: argparse.Namespace, batch: Batch) -> tuple[Loss, list[nn.Parameter]]:
    """The same by transformers and PEFT."""
    import peft
    import transformers

    kind = json.loads((given.folder / "config.json").read_text())["architectures"][0]
    settings = transformers.AutoConfig.from_pretrained(given.folder)
    name = BRANCH.get(given.work)
    if name:
        settings.vision_config._attn_implementation = "eager"  # the one that is right
        placeholder = int(batch.input_ids[0, batch.media[0].start])  # a small tokenizer has others than the published
        settings.vision_config.image_token_id = settings.audio_config.audio_token_id = placeholder
    whole = getattr(transformers, kind).from_pretrained(
        given.folder, config=settings, dtype=stored(given) or torch.bfloat16
    )
    whole.to(given.device)
    model = whole
    if name:
        lora = config(given.work, given.size).adapters[name]
        own = peft.LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=oracle.TARGETS)
        model = peft.get_peft_model(whole, own, autocast_adapter_dtype=given.adapters == "float32")
        for place, parameter in whole.named_parameters():
            if PROJECTOR[given.work] in place:
                parameter.requires_grad_(True)
    if given.side.endswith("recompute"):
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def loss() -> Tensor:
        if not name:
            return model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        embeds = whole.get_input_embeddings()(batch.input_ids).clone()
        for item in batch.media:
            span = slice(item.start, item.start + item.tokens)
            embeds[0, span] = oracle.IMAGE_OR_SOUND[item.modality](whole, item, batch)[0, span]
        return model(inputs_embeds=embeds, labels=batch.labels, use_cache=False).loss

    return loss, [parameter for parameter in model.parameters() if parameter.requires_grad]


def stored(given: argparse.Namespace) -> torch.dtype | None:
    """Return what the frozen or trained weights are held in; None: as in the file, bf16."""
    return torch.float32 if given.work == "pretrain" else None


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Run one side in this process."""
    torch.set_num_threads(1)
    device: torch.device = given.device
    batch: Batch = torch.load(given.batch, weights_only=False).to(device)
    with peak(device) as held:
        loss, trained = (ours if given.side.startswith("ours") else theirs)(given, batch)
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=given.work == "pretrain"):
                found = loss()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            return found.detach()

        first = float(step())
        step()  # with moments
    seconds = best(step, given.times, device)
    count = sum(parameter.numel() for parameter in trained)
    return {"loss": first, "trained": count, "seconds": seconds, "peak_gb": held.bytes / 1e9}


def product_speed(device: torch.device) -> float:
    """Return the TFLOP/s of a large product; its matrices are gone once it is told."""
    side = 2048 if device == CPU else 8192
    matrix = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 / 1e12 / best(lambda: matrix @ matrix, 10, device)


def compare(given: argparse.Namespace, work: str) -> None:
    """Print the table of a work."""
    folder = given.folder / f"{layout(work)}-{given.size}"
    own = replace(config(work, given.size), adapters={})
    if not folder.exists():
        build(own, layout(work), folder, given.device)
    batch = batch_of(work, given.size, given.rows)
    torch.save(batch, folder / "batch.pt")
    tokens, labels = int(batch.lengths.sum()), int((batch.labels != IGNORED).sum())
    told = operations(work, given.size, batch) / 1e12
    print(f"\n{work}: {tokens:,} tokens, {labels:,} of them labelled; {told:.3g} TFLOP a step\n")
    print("| side | adapters | trained | loss | s | tokens/s | MFU | peak GB |\n|---|---|---|---|---|---|---|---|")
    speed = product_speed(given.device)
    losses, counts = [], set()
    for adapters in ("bfloat16", "float32") if work in BRANCH else ("float32",):
        for side in SIDES:
            command = [sys.executable, __file__, "--device", str(given.device), "--size", given.size]
            command += ["--folder", str(folder), "--times", str(given.times), "--adapters", adapters]
            command += ["--side", side, "--batch", str(folder / "batch.pt"), work]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                why = "out of memory" if "OutOfMemory" in done.stderr else f"failed: {done.stderr[-1500:]}"
                print(f"| {side} | {adapters} | {why} |", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            losses.append(found["loss"])
            counts.add(found["trained"])
            seconds, share = found["seconds"], told / found["seconds"] / speed
            print(
                f"| {side} | {adapters} | {found['trained']:,} | {found['loss']:.4f} | {seconds:.4g} | "
                f"{tokens / seconds:,.0f} | {share:.1%} | {found['peak_gb']:.2f} |",
                flush=True,
            )
    if max(losses) - min(losses) > CLOSE * min(losses) or len(counts) > 1:
        raise SystemExit(f"the sides do not do the same work: losses {losses}, trained numbers {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+", choices=(*BRANCH, "pretrain"))
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size-training"))
    parser.add_argument("--rows", type=int, default=8, help="of text, of pretrain")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--adapters", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # this process measures it
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        (given.work,) = given.work
        print(json.dumps(measure(given)))
        return
    print(where(device=given.device))
    for work in given.work:
        compare(given, work)


if __name__ == "__main__":
    main()
