"""The picture encoder: token counts, positions, what patches see, and where separators stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modalora.contracts import image_tokens
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.models.vision import ImageEmbedder, VisionConfig, positions

CONFIG = tiny().vision
assert CONFIG is not None
SIDE = CONFIG.side  # 4 patches of 14 pixels
# float32 over two layers of width 32: equal bits seen so far, but other batch sizes may sum in another order
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def embedder(make_model: Callable[..., Multimodal]) -> ImageEmbedder:
    return make_model().encoders["image"]


def picture(rows: int, columns: int, valid_rows: int, valid_columns: int, seed: int = 0) -> dict[str, Tensor]:
    """A picture on a grid of crops of which valid_rows x valid_columns patches are real."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.zeros(rows * SIDE, columns * SIDE, dtype=torch.bool)
    whole[:valid_rows, :valid_columns] = True
    crops = whole.view(rows, SIDE, columns, SIDE).transpose(1, 2).reshape(-1, SIDE, SIDE)
    mask = torch.cat((torch.ones(1, SIDE, SIDE, dtype=torch.bool), crops))
    pixels = torch.randn(len(mask), 3, 56, 56, generator=generator)
    return {"pixels": pixels, "mask": mask, "grid": torch.tensor([rows, columns])}


class Places(nn.Module):
    """A tower that says where each patch is: view (0 global), row and column in the grid of patches."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        features = torch.zeros(len(pixels), SIDE, SIDE, CONFIG.hidden_size if CONFIG else 0)
        for crop in range(len(pixels)):
            top, left = divmod(crop - 1, self.columns) if crop else (0, 0)
            features[crop, :, :, 0] = min(crop, 1)
            features[crop, :, :, 1] = (top * SIDE + torch.arange(SIDE))[:, None]
            features[crop, :, :, 2] = left * SIDE + torch.arange(SIDE)
        return features.flatten(1, 2)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), short=st.integers(0, 3), narrow=st.integers(0, 3))
def test_tokens_are_as_many_as_contracts_says(rows: int, columns: int, short: int, narrow: int) -> None:
    valid = rows * SIDE - short, columns * SIDE - narrow
    torch.manual_seed(0)
    with torch.no_grad():
        (features,) = ImageEmbedder(CONFIG)([picture(rows, columns, *valid)])
    assert features.shape == (image_tokens(*valid, SIDE), CONFIG.hidden_size)


def test_positions_stretch_the_table_over_the_picture_as_siglip_buckets_do() -> None:
    boundaries = torch.arange(1 / 32, 1.0, 1 / 32)
    for size in range(1, 33):
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[0, :size] = True
        bucket = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / size), boundaries, right=True)
        told = torch.zeros(32, 32, dtype=torch.long)
        told[:size] = bucket[:, None] * 32 + torch.arange(32)
        assert torch.equal(positions(mask)[0], told.flatten())
        assert torch.equal(positions(mask.mT)[0].view(32, 32)[:, :size], torch.arange(32)[:, None] * 32 + bucket)
    assert torch.equal(positions(torch.ones(1, 32, 32, dtype=torch.bool))[0], torch.arange(1024))
    assert not positions(torch.zeros(1, 32, 32, dtype=torch.bool)).any()


def test_the_last_patch_changes_the_first_feature(embedder: ImageEmbedder) -> None:
    image = picture(1, 1, 4, 4)
    changed = {**image, "pixels": image["pixels"].clone()}
    changed["pixels"][:, :, -14:, -14:] += 1.0
    with torch.no_grad():
        before, after = embedder.tower(image["pixels"], image["mask"]), embedder.tower(changed["pixels"], image["mask"])
    assert bool((before != after).any(-1).all())


def test_pixels_of_padded_patches_reach_no_patch_of_the_picture(embedder: ImageEmbedder) -> None:
    image = picture(1, 1, 3, 2)
    changed = {**image, "pixels": image["pixels"].clone()}
    changed["pixels"][1, :, 3 * 14 :] = 9.0
    changed["pixels"][1, :, :, 2 * 14 :] = -9.0
    with torch.no_grad():
        before = embedder.tower(image["pixels"], image["mask"])[1].view(4, 4, -1)
        after = embedder.tower(changed["pixels"], image["mask"])[1].view(4, 4, -1)
        assert torch.equal(before[:3, :2], after[:3, :2])
        (first,), (second,) = embedder([image]), embedder([changed])
    # 2 lines of 1 token and a separator: only the second, pooled over an odd edge, may differ
    assert (first != second).any(-1).nonzero().flatten().tolist() == [2]


def test_an_even_edge_lets_no_padding_in(embedder: ImageEmbedder) -> None:
    image = picture(1, 2, 2, 6)
    changed = {**image, "pixels": image["pixels"].clone()}
    changed["pixels"][1:, :, 2 * 14 :] = 9.0
    changed["pixels"][2, :, :, 2 * 14 :] = -9.0
    with torch.no_grad():
        assert torch.equal(embedder([image])[0], embedder([changed])[0])


def test_a_crop_without_picture_is_finite(embedder: ImageEmbedder) -> None:
    with torch.no_grad():
        image = picture(1, 1, 4, 4)
        mask = image["mask"].clone()
        mask[1] = False
        features = embedder.tower(image["pixels"], mask)
        assert bool(features.isfinite().all())
        torch.testing.assert_close(features[0], embedder.tower(image["pixels"], image["mask"])[0], **TOLERANCE)


def test_the_last_layer_the_last_norm_and_the_head_are_never_read(embedder: ImageEmbedder) -> None:
    image = picture(2, 1, 7, 3)
    tower = embedder.tower
    with torch.no_grad():
        before = embedder([image])[0]
        for module in (tower.layers[-1], tower.post_layernorm, tower.head):
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(embedder([image])[0], before)


def test_the_feature_is_the_second_last_layer(embedder: ImageEmbedder) -> None:
    image = picture(1, 1, 4, 4)
    tower = embedder.tower
    with torch.no_grad():
        x = tower.patch_embedding(image["pixels"]).flatten(2).mT + tower.position_embedding.weight
        for layer in (tower.layers[0], tower.layers[1]):
            x = layer(x, None)
        assert torch.equal(embedder.tower(image["pixels"], image["mask"]), x)


def test_one_layer_equals_its_definition_in_float64(embedder: ImageEmbedder) -> None:
    layer = embedder.tower.layers[0].double()
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    visible = torch.rand(2, 16) > 0.3
    weights = dict(layer.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    normal = norm(x, "layer_norm1")
    heads = []
    for h in range(2):
        own = slice(16 * h, 16 * h + 16)
        q, k, v = (linear(normal, f"self_attn.{name}_proj")[..., own] for name in "qkv")
        logits = (q @ k.mT / 4).masked_fill(~visible[:, None], -torch.inf)
        heads.append(logits.softmax(-1) @ v)
    told = x + linear(torch.cat(heads, -1), "self_attn.out_proj")
    inner = linear(norm(told, "layer_norm2"), "mlp.fc1")
    inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    told = told + linear(inner, "mlp.fc2")
    torch.testing.assert_close(layer(x, visible), told, atol=1e-12, rtol=1e-12)  # float64 rounding


def test_crops_come_first_row_by_row_with_separators_then_the_global_view(embedder: ImageEmbedder) -> None:
    rows, columns = 2, 3
    embedder.tower = Places(columns)
    with torch.no_grad():
        embedder.line_end.fill_(-1.0)
        embedder.view_end.fill_(-2.0)
        (features,) = embedder([picture(rows, columns, 7, 10)])
    line = torch.full((3,), -1.0)
    told = []
    for row in range(4):  # ceil(7 / 2) lines of ceil(10 / 2) tokens; a pooled place is the mean of two patches
        told += [torch.tensor([1.0, 2 * row + 0.5, 2 * column + 0.5]) for column in range(5)]
        told.append(line)
    told.append(torch.full((3,), -2.0))
    for row in range(2):
        told += [torch.tensor([0.0, 2 * row + 0.5, 2 * column + 0.5]) for column in range(2)]
        told.append(line)
    assert torch.equal(features[:, :3], torch.stack(told))


def test_images_do_not_depend_on_each_other(embedder: ImageEmbedder) -> None:
    images = [picture(1, 1, 4, 4, 1), picture(2, 2, 7, 5, 2), picture(1, 3, 3, 12, 3)]
    with torch.no_grad():
        together = embedder(images)
        for image, features in zip(images, together, strict=True):
            torch.testing.assert_close(embedder([image])[0], features, **TOLERANCE)
        backwards = embedder(images[::-1])
    for one, other in zip(together, backwards[::-1], strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"crop": 70}, "crop=70"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(CONFIG, **fields)


def test_the_defaults_are_siglips() -> None:
    assert VisionConfig().side == 32
