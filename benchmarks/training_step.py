"""How long does a LoRA training step take, and in how much memory, beside transformers + PEFT on the same weights?

A model of Phi-4-mini's width (3,072; 200,064 words; 4 layers), rank 320 on all Linears of the decoder, bf16, every
token labelled, or the last --labelled of them, as answers are: forward, backward and AdamW. Before any time is taken,
gradients of all A and B must agree. `loss` measures the cross-entropy alone, 4,096 tokens, beside logits and torch's.
Each side runs in a process of its own, on one thread or a GPU; times are the best of several (timing.py); memory is the
peak above what was held before the first of two steps, with the allocator's defaults: adapters are weights, their
gradients and moments are not. The matrix products alone are the limit: no step can be faster than they are. The share
of it that a step reaches is its MFU, against products as this machine has them.

    python benchmarks/training_step.py step            # 2 GB of weights in --folder, about 15 minutes
    python benchmarks/training_step.py loss            # the peer needs 14 GB
    python benchmarks/training_step.py --device cuda step
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from full_size import TUNED, draw
from full_size import build as build_base
from modalora.checkpoint.store import load_model
from modalora.contracts import IGNORED, Batch, Route
from modalora.models.multimodal import ModelConfig, Multimodal, recompute
from modalora.models.sizes import phi4_mini
from modalora.nn.lora import LoraConfig
from modalora.nn.loss import cross_entropy
from modalora.training.moments import SmallAdamW
from timing import CPU, best, peak, where

LAYERS, RANK = 4, 320
OURS = ("ours", "recompute", "8-bit moments")
HEAD = "embed_tokens.weight"  # tied
LORA = LoraConfig(r=RANK, lora_alpha=2 * RANK)
# Distances of gradients, |ours - theirs| / |theirs| of the worst matrix. float32: sums in another order, 1e-6 seen.
# bf16: both sides round every product and sum to 2^-9 of it, at other places; 0.034 seen.
CLOSE = {"float32": 1e-5, "bfloat16": 0.06}

Loss = Callable[[Tensor, Tensor], Tensor]  # of ids and labels
Parameters = dict[str, torch.nn.Parameter]


def config() -> ModelConfig:
    whole = phi4_mini()
    return replace(whole, decoder=replace(whole.decoder, num_hidden_layers=LAYERS))


def build(folder: Path) -> None:
    """Write random weights in transformers' layout, and an adapter by our names."""
    build_base(config(), "phi3", folder)
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = Multimodal(config())
        model.decoder.add_adapter("new", LORA)
    adapter = {
        name.removeprefix("decoder."): draw(name, tuple(parameter.shape), generator)
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(adapter, folder / "adapter.st")


def ours(given: argparse.Namespace, dtype: torch.dtype, adapters: torch.dtype) -> tuple[Loss, Parameters]:
    """Return a function from ids and labels to the mean loss, and the trained parameters by name."""
    device, folder = given.device, given.folder
    model = load_model(folder, device=str(device)).model.to(dtype).requires_grad_(False).train()
    model.decoder.add_adapter("new", LORA)
    stored, trained = load_file(folder / "adapter.st"), {}
    for name, parameter in model.decoder.named_parameters():
        if name in stored:
            parameter.data = stored[name].to(device, adapters)
            trained[name] = parameter
    if given.side == "recompute":
        recompute(model)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        batch = Batch(ids, torch.full((1,), ids.shape[1], device=device), Route(("new",)), labels=labels)
        return model.loss(batch)[0].mean()

    return loss, trained


def theirs(given: argparse.Namespace, dtype: torch.dtype, adapters: torch.dtype) -> tuple[Loss, Parameters]:
    """The same by transformers and PEFT."""
    import peft
    import transformers

    folder = given.folder
    model = transformers.Phi3ForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device)
    places = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=places)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=adapters == torch.float32).train()
    stored, trained = load_file(folder / "adapter.st"), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == adapters
            place = name.removeprefix("base_model.model.model.").replace(".default.weight", ".new")
            parameter.data.copy_(stored[place])
            trained[place] = parameter
    assert trained.keys() == stored.keys()
    return lambda ids, labels: model(input_ids=ids, labels=labels, use_cache=False).loss, trained


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Run one side in this process."""
    torch.set_num_threads(1)
    dtype, adapters = getattr(torch, given.dtype), getattr(torch, given.adapters)
    loss, trained = (theirs if given.side == "peft" else ours)(given, dtype, adapters)
    ids = torch.randint(0, 199_000, (1, given.tokens), generator=torch.Generator().manual_seed(1)).to(given.device)
    labels = ids.clone()
    labels[:, : given.tokens - round(given.labelled * given.tokens)] = IGNORED
    if given.gradients:
        value = loss(ids, labels)
        value.backward()
        save_file({name: parameter.grad.float().cpu() for name, parameter in trained.items()}, given.gradients)
        return {"loss": float(value.detach())}
    if given.side == "8-bit moments":
        groups = [{"params": list(trained.values())}]
        optimizer: torch.optim.Optimizer = SmallAdamW(groups, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, bits=8)
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, betas=(0.9, 0.95))
    with torch.no_grad():
        loss(ids[:, :16], ids[:, :16])  # weights are read from their file

    def step() -> None:
        loss(ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    with peak(given.device) as held:
        step()
        step()  # from the second on, the optimiser has its moments
    return {"seconds": best(step, given.times, given.device), "peak_gb": held.bytes / 1e9}


def measure_products(given: argparse.Namespace) -> dict[str, float]:
    """Time what no step can do without: its matrix products, at the speed of those of 8,192 words."""
    torch.set_num_threads(1)
    device = given.device
    hidden, weight = (torch.randn(rows, 3072, device=device).bfloat16() for rows in (given.tokens, 8192))
    logits = hidden @ weight.T
    forward, backward = (best(work, 5, device) for work in (lambda: hidden @ weight.T, lambda: logits @ weight))
    with torch.device("meta"):
        model = Multimodal(config())
        model.decoder.add_adapter("new", LORA)
    shapes = {name: tensor.numel() for name, tensor in model.decoder.named_parameters() if tensor.ndim == 2}
    # each frozen matrix once each way, those of adapters twice on the way back
    sizes = [(size, 2 if ".lora_" in name else 1) for name, size in shapes.items() if name != HEAD]
    sizes.append((given.labelled * shapes[HEAD], 1))
    seconds = sum(size * (forward + ways * backward) for size, ways in sizes) / weight.numel()
    operations = sum(2 * given.tokens * size * (1 + ways) for size, ways in sizes)
    return {"seconds": seconds, "peak_gb": 0.0, "teraflop": operations / 1e12}


def measure_loss(given: argparse.Namespace) -> dict[str, float]:
    """Run the cross-entropy alone."""
    torch.set_num_threads(1)
    device = given.device
    generator = torch.Generator(device).manual_seed(0)
    weight = draw("head", (200_064, 3072), generator)
    hidden = torch.randn(given.tokens, 3072, generator=generator, device=device).bfloat16().requires_grad_()
    targets = torch.randint(0, len(weight), (given.tokens,), generator=generator, device=device)
    found = {}

    def step() -> None:
        hidden.grad = None
        if given.side == "ours":
            values = cross_entropy(hidden, weight, targets)
        else:
            values = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="none")
        values.mean().backward()
        found["loss"] = float(values.detach().mean())

    with peak(device) as held:
        step()
    if given.gradients:
        save_file({"hidden": hidden.grad.float().cpu()}, given.gradients)
    return {"seconds": best(step, given.times, device), "peak_gb": held.bytes / 1e9, **found}


def ask(given: argparse.Namespace, verb: str, side: str, *, tuned: bool, **options: object) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(given.folder), "--device", str(given.device), verb, side]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = TUNED if tuned else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def distance(one: Path, other: Path) -> float:
    """Return |one - other| / |other| of the worst matrix."""
    found, told = load_file(one), load_file(other)
    return max(float((found[name] - told[name]).norm() / told[name].norm()) for name in told)


def run_step(given: argparse.Namespace) -> None:
    """Compare gradients, then print times and memory of both sides, and their ratios."""
    if not given.folder.exists():
        build(given.folder)
    with tempfile.TemporaryDirectory() as folder:
        for dtype, adapters, tokens in (("float32", "float32", 64), ("bfloat16", "bfloat16", given.tokens[0])):
            files = {side: Path(folder) / f"{side}-{dtype}" for side in ("ours", "recompute", "peft")}
            options = {"dtype": dtype, "adapters": adapters, "tokens": tokens, "labelled": given.labelled}
            for side, file in files.items():
                ask(given, "measure", side, tuned=True, gradients=file, **options)
            apart = distance(files["ours"], files["peft"])
            print(
                f"gradients of A and B, {dtype}, {tokens} tokens: {apart:.1e} apart (at most {CLOSE[dtype]})",
                flush=True,
            )
            same = 0.0 if given.device == CPU else CLOSE[dtype]  # a GPU adds up in any order
            if apart > CLOSE[dtype] or distance(files["recompute"], files["ours"]) > same:
                raise SystemExit("gradients differ: no time is taken")
    print(f"\n{where(device=given.device)}, labelled {given.labelled:.0%}\n")
    print("| tokens | adapters | side | step, s | tuned allocator | peak GB above weights | MFU |")
    print("|---|---|---|---|---|---|---|")
    for tokens in given.tokens:
        products = ask(given, "measure-products", "ours", tuned=False, tokens=tokens, labelled=given.labelled)
        floor = products["seconds"]
        speed = f"{products['teraflop'] / floor:.3g} TFLOP/s"
        print(f"| {tokens} | bfloat16 | matrix products alone | {floor:.3g} | | | 100 %: {speed} |", flush=True)
        for adapters in ("bfloat16", "float32"):
            rows: dict[str, tuple[float, ...]] = {}
            options = {"dtype": "bfloat16", "adapters": adapters, "tokens": tokens, "times": given.times}
            options["labelled"] = given.labelled
            for side in given.rounds * ("peft", *given.sides):
                plain, tuned = (ask(given, "measure", side, tuned=tuned, **options) for tuned in (False, True))
                found = plain["seconds"], tuned["seconds"], plain["peak_gb"]
                rows[side] = tuple(map(min, found, rows.get(side, found)))
            for side in rows:
                told = [f"{x:.3g}" for x in rows[side]] + [f"{floor / rows[side][0]:.0%}"]
                print(f"| {tokens} | {adapters} | {side} | " + " | ".join(told) + " |", flush=True)
            for side in given.sides:
                ratios = [mine / other for mine, other in zip(rows[side], rows["peft"], strict=True)]
                print(
                    f"| {tokens} | {adapters} | {side} / peft | " + " | ".join(f"{x:.2f}x" for x in ratios) + " | |",
                    flush=True,
                )


def run_loss(given: argparse.Namespace) -> None:
    """The same for the cross-entropy alone."""
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / side for side in ("ours", "logits")}
        tokens = given.tokens[0]
        plain = {
            side: ask(given, "measure-loss", side, tuned=False, tokens=tokens, times=given.times, gradients=file)
            for side, file in files.items()
        }
        apart = distance(files["ours"], files["logits"])
    tuned = {side: ask(given, "measure-loss", side, tuned=True, tokens=tokens, times=given.times) for side in plain}
    print(f"losses {plain['ours']['loss']:.5f} and {plain['logits']['loss']:.5f}; gradients {apart:.1e} apart")
    if apart > 0.01:  # each is rounded to bf16 once, 2^-9
        raise SystemExit("gradients differ: no time is taken")
    print(f"\n{where(device=given.device)}, {tokens} tokens\n")
    print("| side | s | tuned allocator | peak GB above weights |")
    print("|---|---|---|---|")
    rows = {side: (plain[side]["seconds"], tuned[side]["seconds"], plain[side]["peak_gb"]) for side in plain}
    for side, row in rows.items():
        print(f"| {side} | " + " | ".join(f"{x:.3f}" for x in row) + " |")
    ratios = [mine / other for mine, other in zip(rows["ours"], rows["logits"], strict=True)]
    print("| ours / logits | " + " | ".join(f"{x:.3f}x" for x in ratios) + " |")


def share(word: str) -> float:
    value = float(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must lie above 0 and not above 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/training-step"))
    parser.add_argument("--device", type=torch.device, default=CPU)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, run, tokens in (("step", run_step, [512, 2048]), ("loss", run_loss, [4096])):
        sub = verbs.add_parser(verb)
        sub.add_argument("--tokens", type=int, nargs="+", default=tokens)
        sub.set_defaults(run=run)
    step = verbs.choices["step"]
    step.add_argument("--rounds", type=int, default=1, help="how often each side is asked, in turn; the best is told")
    step.add_argument("--labelled", type=share, default=1.0, help="share of the tokens that have labels, the last ones")
    step.add_argument("--sides", nargs="+", choices=OURS, default=OURS)
    for verb, run, sides in (
        ("measure", measure, (*OURS, "peft")),
        ("measure-products", measure_products, ("ours",)),
        ("measure-loss", measure_loss, ("ours", "logits")),
    ):
        sub = verbs.add_parser(verb)
        sub.add_argument("side", choices=sides)
        sub.add_argument("--tokens", type=int, required=True)
        sub.add_argument("--dtype", default="bfloat16")
        sub.add_argument("--adapters", default="bfloat16")
        sub.add_argument("--labelled", type=share, default=1.0)
        sub.add_argument("--gradients", type=Path)
        sub.set_defaults(run=lambda given, run=run: print(json.dumps(run(given))))
    for sub in verbs.choices.values():
        sub.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
