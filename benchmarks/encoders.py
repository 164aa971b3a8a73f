"""How long do the picture and the sound encoder take at full size, beside transformers' with the same weights?

Random weights, one thread or a GPU; seconds, the best of several repeats, both sides in turn in one process, in bf16 or
float32. The peer's vision tower is right in eager mode alone (under SDPA it runs causally); both are shown. Ours runs
as it does in a prompt, with wide products. Results are compared.

    THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 \
        python benchmarks/encoders.py [--dtype float32] [--pack] [--work crop image sound]
    python benchmarks/encoders.py --device cuda
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from copy import deepcopy

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch import Tensor, nn
from transformers import Phi4MultimodalConfig
from transformers.models.phi4_multimodal import modeling_phi4_multimodal as peer

from modalora.checkpoint.names import plan
from modalora.models.sizes import phi4_multimodal
from modalora.models.speech import SpeechEncoder
from modalora.models.vision import ImageEmbedder
from modalora.nn.dense import Product
from modalora.nn.products import wide_products
from timing import CPU, in_turn, where

PREFIX = {"image": "model.embed_tokens_extend.image_embed.", "audio": "model.embed_tokens_extend.audio_embed."}


def spread(model: nn.Module) -> None:
    """Draw weights that keep activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            tensor.normal_(generator=generator)
            if "global_invstd" in name:
                tensor.mul_(0.02).add_(0.2)
            elif "global_mean" in name:
                tensor.add_(12)
            elif "norm" in name and name.endswith("weight"):
                tensor.mul_(0.1).add_(1)
            elif tensor.ndim > 1 and "embedding" not in name and "bias" not in name:
                tensor.mul_(tensor[0].numel() ** -0.5)
            else:
                tensor.mul_(0.1)


def copy(ours: nn.Module, theirs: nn.Module, kind: str) -> None:
    """Give the peer our weights, by the table of its layout."""
    config = phi4_multimodal()
    own = {f"encoders.{kind}.{name}": tensor for name, tensor in ours.state_dict().items()}
    places = plan("phi4_multimodal", {name: tuple(tensor.shape) for name, tensor in own.items()}, config)
    state = theirs.state_dict()
    for name, place in places.items():
        state[place.name.removeprefix(PREFIX[kind])].copy_(place.pair.to_theirs(own[name], config))


def picture(crops: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    side = int(crops**0.5)
    return {
        "pixels": torch.randn(1 + crops, 3, 448, 448, dtype=dtype, device=device),
        "mask": torch.ones(1 + crops, 32, 32, dtype=torch.bool, device=device),
        "grid": torch.tensor([side, side]),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--work", nargs="+", choices=("crop", "image", "sound"), default=["crop", "image", "sound"])
    parser.add_argument("--pack", action="store_true", help="ours with packed matrices, as load(pack=True) has them")
    parser.add_argument("--device", type=torch.device, default=CPU)
    asked = parser.parse_args()
    device: torch.device = asked.device
    dtype: torch.dtype = getattr(torch, asked.dtype)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Phi4MultimodalConfig(hidden_size=3072, num_attention_heads=24, audio_config={"bias_max_distance": 500})
    sizes = phi4_multimodal()
    assert sizes.vision is not None
    assert sizes.speech is not None
    torch.set_default_dtype(dtype)
    tower, encoder = ImageEmbedder(sizes.vision).eval(), SpeechEncoder(sizes.speech).eval()
    views = {}
    for mode in ("eager", "sdpa"):
        config = deepcopy(config)
        config.vision_config._attn_implementation = config.audio_config._attn_implementation = mode
        views[mode] = (
            peer.Phi4MultimodalImageEmbedding(config).eval(),
            peer.Phi4MultimodalAudioEmbedding(config).eval(),
        )
    torch.set_default_dtype(torch.float32)
    spread(tower)
    spread(encoder)
    for image, audio in views.values():
        copy(tower, image, "image")
        copy(encoder, audio, "audio")
    for module in (tower, encoder, *(module for view in views.values() for module in view)):
        module.to(device)
    if asked.pack:
        for module in (*tower.modules(), *encoder.modules()):
            if isinstance(module, Product):
                module.pack(lambda weight: None)
    print(f"{where(device=device)}, {dtype}\n")
    print("| work | ours s | transformers eager s | ratio | transformers sdpa s | ratio | largest difference |")
    print("|---|---|---|---|---|---|---|")

    def compare(name: str, ours: Callable[[], Tensor], theirs: dict[str, Callable[[], Tensor]], repeats: int) -> None:
        ours = wide_products()(ours)
        own, told = ours().float(), theirs["eager"]().float()
        difference = float((own - told).abs().max() / told.abs().max())
        times = in_turn({"ours": ours, **theirs}, repeats, device)
        mine = times["ours"]
        cells = " | ".join(f"{times[mode]:.4g} | {times[mode] / mine:.2f}" for mode in ("eager", "sdpa"))
        print(f"| {name} | {mine:.4g} | {cells} | {difference:.1e} of the largest value |", flush=True)

    pictures = {"crop": ("one 448 crop", 0, 7), "image": ("1344x1344: 9 crops and the whole", 9, 1)}
    for name, crops, repeats in (row for kind, row in pictures.items() if kind in asked.work):
        one = picture(crops, dtype, device)
        compare(
            name,
            lambda one=one: tower.tower(one["pixels"], one["mask"]),
            {
                mode: lambda one=one, view=image: view.img_processor(
                    one["pixels"], patch_attention_mask=one["mask"], output_hidden_states=True
                ).hidden_states[-2]
                for mode, (image, _) in views.items()
            },
            repeats,
        )
    if "sound" in asked.work:
        mel = 12 + 4 * torch.randn(2998, 80, device=device)
        compare(
            "30 s of sound",
            lambda: encoder([{"mel": mel}])[0],
            {mode: lambda view=audio: view.encoder(mel.to(dtype)[None], None)[0] for mode, (_, audio) in views.items()},
            7,
        )


if __name__ == "__main__":
    main()
