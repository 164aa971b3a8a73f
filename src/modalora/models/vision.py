"""The picture encoder: a SigLIP tower over square crops, then 2x2 pooling and learned separators.

Phi-4-Multimodal, arXiv:2503.01743, section 2.2; SigLIP, arXiv:2303.15343. patches = (crop / patch) ** 2, side =
crop / patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.config import check_sizes
from modalora.contracts import image_tokens
from modalora.errors import ConfigError
from modalora.nn.attend import attend
from modalora.nn.dense import Dense
from modalora.nn.mask import Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Sizes of the tower. The defaults are SigLIP-so400m at 448 pixels."""

    branches: ClassVar[tuple[str, ...]] = ("vision",)  # its projectors

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    crop: int = 448
    patch: int = 14
    layer_norm_eps: float = 1e-6
    pooling_head: bool = True  # stored in the published checkpoint, read by nothing
    max_crops: int = 36

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.crop % (2 * self.patch):
            raise ConfigError(f"crop={self.crop} must be a multiple of 2 x patch={self.patch}; SigLIP uses 448 and 14")
        if self.num_hidden_layers < 2:
            raise ConfigError(f"num_hidden_layers={self.num_hidden_layers} must be at least 2: the feature is layer -2")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return self.crop // self.patch

    def encoder(self) -> ImageEmbedder:
        """Return the networks, with fresh weights."""
        return ImageEmbedder(self)

    def smallest(self) -> tuple[dict[str, Tensor], int]:
        """Return the features of a blank picture of one crop, and its tokens."""
        mask = torch.ones(2, self.side, self.side, dtype=torch.bool)
        pixels = torch.zeros(2, 3, self.crop, self.crop)
        tokens = image_tokens(self.side, self.side, self.side)
        return {"pixels": pixels, "mask": mask, "grid": torch.tensor([1, 1])}, tokens


class VisionAttention(nn.Module):
    """Attention over the patches of one crop, both ways; padded patches are not seen."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj = Dense(width, width), Dense(width, width)
        self.v_proj, self.out_proj = Dense(width, width), Dense(width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """x: (crops, patches, width); visible: (crops, patches) bool, None: all."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        bias = None
        if visible is not None:
            bias = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, -torch.inf)[:, None, None]
            bias = bias.expand(-1, self.heads, x.shape[1], -1)
        out: Tensor = self.out_proj(attend(q, k, v, mask=Mask(), pair_bias=bias).flatten(2))
        return out


class VisionMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Dense(config.hidden_size, config.intermediate_size, activation="gelu_tanh")
        self.fc2 = Dense(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        out: Tensor = self.fc2(self.fc1(x))
        return out


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """x: (crops, patches, width); visible as in VisionAttention."""
        x = x + self.self_attn(self.layer_norm1(x), visible)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class PoolingHead(nn.Module):
    """SigLIP's attention pooling. Its weights are part of the published checkpoint; no feature comes from it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)


class VisionTower(nn.Module):
    """Crops to patch features: the output of the second-last layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch, config.patch)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = PoolingHead(config) if config.pooling_head else None
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """pixels: (crops, 3, crop, crop) in about [-1, 1]; mask: (crops, side, side) bool, True = picture.

        Returns (crops, patches, width). The last layer, post_layernorm and head are not run.
        """
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2)
        x = x.mT.contiguous()  # or every layer would read and write it crosswise
        x = x + self.position_embedding(positions(mask))
        visible = None if bool(mask.all()) else mask.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x, visible)
        return x


def positions(mask: Tensor) -> Tensor:
    """Return the position id of each patch, (crops, patches), for mask (crops, side, side).

    Patch (i, j) of a crop with r valid rows and c valid columns gets floor(side i / r) * side + floor(side j / c):
    the learned table is stretched over the picture part. Padded patches get 0.
    """
    side = mask.shape[-1]
    rows = mask[:, :, 0].sum(1)[:, None].clamp(min=1)
    columns = mask[:, 0].sum(1)[:, None].clamp(min=1)
    at = torch.arange(side, device=mask.device)[None]
    row, column = (side * at) // rows, (side * at) // columns
    ids = row[:, :, None] * side + column[:, None]
    return torch.where(mask, ids, 0).flatten(1)


class ImageEmbedder(nn.Module):
    """Pictures to rows of features with separators, ready for the projector."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.tower = VisionTower(config)
        self.line_end = nn.Parameter(torch.zeros(config.hidden_size))  # ends every line [sub_GN]
        self.view_end = nn.Parameter(torch.zeros(config.hidden_size))  # between crops and global view [glb_GN]

    def forward(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """Each image: pixels (1 + h w, 3, crop, crop), global view first; mask (1 + h w, side, side); grid [h, w].

        Returns per image (tokens, width), tokens as contracts.image_tokens counts them.
        """
        counts = [len(image["pixels"]) for image in images]
        pixels = torch.cat([image["pixels"] for image in images])
        masks = torch.cat([image["mask"] for image in images])
        # asked for before the tower runs: a device that is asked in between has nothing to do meanwhile
        grids = torch.stack([image["grid"] for image in images]).tolist()
        extents = [_extent(mask, *grid) for mask, grid in zip(masks.split(counts), grids, strict=True)]
        places = zip(grids, torch.stack(extents).tolist(), strict=True)
        features = self.tower(pixels, masks).split(counts)
        return [self._assemble(own, *place) for own, place in zip(features, places, strict=True)]

    def _assemble(self, features: Tensor, grid: Sequence[int], extent: Sequence[int]) -> Tensor:
        (rows, columns), (down, across), side = grid, extent, isqrt(features.shape[1])
        maps = features.transpose(1, 2).unflatten(-1, (side, side))
        pooled = functional.avg_pool2d(maps, 2).permute(0, 2, 3, 1)  # (1 + h w, side / 2, side / 2, width)
        crops = pooled[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return torch.cat(
            (self._lines(crops[:down, :across]), self.view_end[None].to(crops.dtype), self._lines(pooled[0]))
        )

    def _lines(self, view: Tensor) -> Tensor:
        ends = self.line_end.to(view.dtype).expand(len(view), 1, -1)
        return torch.cat((view, ends), dim=1).flatten(0, 1)


def _extent(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Return how many pooled places the picture takes down and across its rows x columns crops, (2,)."""
    seen = mask[1:, ::2, ::2].unflatten(0, (rows, columns))
    return torch.stack((seen[:, 0, :, 0].sum(), seen[0, :, 0].sum()))
