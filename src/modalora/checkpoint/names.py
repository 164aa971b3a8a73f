"""Tensor names and shapes of published layouts, and how each becomes ours: one table per layout, read both ways.

A layout is named by the `model_type` of its config.json. In a pattern {layer} is a number, {side} is A or B, any other
field is text; the first pair that fits is taken. Rows are a matrix's first axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from modalora.errors import ConfigError
from modalora.models.multimodal import ModelConfig

Order = Callable[[ModelConfig], Tensor]


@dataclass(frozen=True, slots=True)
class Pair:
    """One pattern in both vocabularies. ones: axes of size 1 that theirs has in front. order: ours = theirs[order]."""

    ours: str
    theirs: str
    ones: int = 0
    order: Order | None = None

    def to_ours(self, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Return a tensor of theirs as ours."""
        if self.ones:
            tensor = tensor.reshape(tensor.shape[self.ones :])
        return tensor if self.order is None else tensor[self.order(config).to(tensor.device)]

    def to_theirs(self, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Return a tensor of ours as theirs."""
        if self.order is not None:
            tensor = tensor[torch.argsort(self.order(config)).to(tensor.device)]
        return tensor.reshape((1,) * self.ones + tensor.shape)


def _grouped_qkv(config: ModelConfig) -> Tensor:
    """Phi-3-small has for each key head its query heads, the key, the value; ours all queries, all keys, all values."""
    sizes = config.decoder
    groups, head_dim = sizes.num_key_value_heads, sizes.head_dim
    rows = torch.arange((sizes.num_attention_heads + 2 * groups) * head_dim).view(groups, -1, head_dim)
    return torch.cat([part.flatten() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])


def _interleaved(config: ModelConfig) -> Tensor:
    """Phi-3-small alternates gate and value; ours has all gates, then all values."""
    rows = torch.arange(2 * config.decoder.intermediate_size).view(-1, 2)
    return rows.t().flatten()


_DECODER = (Pair("decoder.lm_head.weight", "lm_head.weight"), Pair("decoder.{rest}", "model.{rest}"))

_SMALL = (
    Pair("decoder.lm_head.weight", "lm_head.weight"),
    Pair(
        "decoder.layers.{layer}.self_attn.qkv_proj.{kind}",
        "model.layers.{layer}.self_attn.query_key_value.{kind}",
        order=_grouped_qkv,
    ),
    Pair("decoder.layers.{layer}.self_attn.o_proj.{kind}", "model.layers.{layer}.self_attn.dense.{kind}"),
    Pair(
        "decoder.layers.{layer}.mlp.gate_up_proj.{kind}", "model.layers.{layer}.mlp.up_proj.{kind}", order=_interleaved
    ),
    Pair("decoder.norm.{kind}", "model.final_layernorm.{kind}"),
    Pair("decoder.{rest}", "model.{rest}"),
)

_IMAGE, _AUDIO = "model.embed_tokens_extend.image_embed.", "model.embed_tokens_extend.audio_embed."
_TOWER, _ENCODER = f"{_IMAGE}img_processor.", f"{_AUDIO}encoder."
_BLOCK, _THEIRS = "encoders.audio.blocks.{layer}.", f"{_ENCODER}encoders.{{layer}}."

_BOTH = (  # what the two layouts of Phi-4-Multimodal share
    Pair("encoders.image.tower.patch_embedding.{kind}", f"{_TOWER}embeddings.patch_embedding.{{kind}}"),
    Pair("encoders.image.tower.position_embedding.{kind}", f"{_TOWER}embeddings.position_embedding.{{kind}}"),
    Pair("encoders.image.tower.layers.{rest}", f"{_TOWER}encoder.layers.{{rest}}"),
    Pair("encoders.image.tower.{rest}", f"{_TOWER}{{rest}}"),
    Pair(f"{_BLOCK}conv.glu.{{kind}}", f"{_THEIRS}conv.glu.ext_pw_conv_1d.{{kind}}"),
    Pair(f"{_BLOCK}conv.b{{number}}", f"{_THEIRS}conv.glu.b{{number}}"),
    Pair(f"{_BLOCK}conv.dw_conv.{{kind}}", f"{_THEIRS}conv.dw_sep_conv_1d.dw_conv.{{kind}}"),
    Pair(f"{_BLOCK}conv.pw_conv.{{kind}}", f"{_THEIRS}conv.dw_sep_conv_1d.pw_conv.{{kind}}"),
    Pair(f"{_BLOCK}{{rest}}", f"{_THEIRS}{{rest}}"),
    Pair("encoders.audio.relative_bias.weight", f"{_ENCODER}relative_attention_bias_layer.bias_values.weight"),
    Pair("encoders.audio.embed.{rest}", f"{_ENCODER}embed.{{rest}}"),
    Pair("encoders.audio.{statistic}", f"{_ENCODER}encoder_embedding.{{statistic}}"),
)

_OFFICIAL = (
    Pair("decoder.layers.{layer}.{linear}_proj.weight", "model.layers.{layer}.{linear}_proj.base_layer.weight"),
    Pair("decoder.layers.{rest}.lora_{side}.{name}", "model.layers.{rest}.lora_{side}.{name}.weight"),
    Pair("encoders.image.line_end", f"{_IMAGE}sub_GN", ones=3),
    Pair("encoders.image.view_end", f"{_IMAGE}glb_GN", ones=2),
    Pair("projectors.image.vision.up.{kind}", f"{_IMAGE}img_projection.0.{{kind}}"),
    Pair("projectors.image.vision.down.{kind}", f"{_IMAGE}img_projection.2.{{kind}}"),
    Pair("projectors.audio.{branch}.up.{kind}", f"{_AUDIO}audio_projection.{{branch}}.0.{{kind}}"),
    Pair("projectors.audio.{branch}.down.{kind}", f"{_AUDIO}audio_projection.{{branch}}.2.{{kind}}"),
    Pair(f"{_BLOCK}feed_forward_{{end}}.gate_up_proj.{{kind}}", f"{_THEIRS}feed_forward_{{end}}.net.0.linear.{{kind}}"),
    Pair(f"{_BLOCK}feed_forward_{{end}}.down_proj.{{kind}}", f"{_THEIRS}feed_forward_{{end}}.net.2.{{kind}}"),
    Pair(f"{_BLOCK}self_attn.o_proj.{{kind}}", f"{_THEIRS}self_attn.linear_out.{{kind}}"),
    Pair(f"{_BLOCK}self_attn.{{which}}_proj.{{kind}}", f"{_THEIRS}self_attn.linear_{{which}}.{{kind}}"),
    *_BOTH,
    *_DECODER,
)

_NATIVE = (
    Pair("encoders.image.line_end", f"{_IMAGE}sub_img_feature_extensor", ones=3),
    Pair("encoders.image.view_end", f"{_IMAGE}global_img_feature_extensor", ones=2),
    Pair("projectors.image.vision.{end}.{kind}", f"{_IMAGE}img_projection_{{end}}.{{kind}}"),
    Pair("projectors.audio.speech.{end}.{kind}", f"{_AUDIO}{{end}}_proj_for_speech.{{kind}}"),
    Pair("projectors.audio.vision.{end}.{kind}", f"{_AUDIO}{{end}}_proj_for_vision_speech.{{kind}}"),
    *_BOTH,
    *_DECODER,
)

# layout -> its table. Adapters stand in the weights of phi4mm; elsewhere they are PEFT folders beside them.
LAYOUTS: dict[str, tuple[Pair, ...]] = {
    "modalora": (Pair("{name}", "{name}"),),
    "phi3": _DECODER,
    "phi3small": _SMALL,
    "phi4mm": _OFFICIAL,
    "phi4_multimodal": _NATIVE,
}
HOLDS_ADAPTERS = ("modalora", "phi4mm")
_FIELDS = {"layer": r"\d+", "side": r"[AB]", "which": r"[qkv]", "number": r"\d+", "kind": r"weight|bias"}
_FIELDS |= {"end": r"up|down|in|out", "branch": r"speech|vision", "statistic": r"global_mean|global_invstd"}
# left in names by torch's checkpoints, compile and FSDP; around everything by DDP and PEFT
_MARKS = re.compile(r"(?<![^.])(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
_AROUND = re.compile(r"^(?:(?:module|base_model\.model)\.)+")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one of our tensors stands in a layout, and its shape there."""

    name: str
    shape: tuple[int, ...]
    pair: Pair

    @property
    def module(self) -> str:
        """The module there that it is the weight of."""
        return self.name.removesuffix(".weight")


def plan(layout: str, shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> dict[str, Stored]:
    """Return for each of our tensors, with its shape, where the layout has it.

    Raises ConfigError for an unknown layout, and naming every tensor that the layout has no place for.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is unknown; known are {', '.join(LAYOUTS)}")
    found, homeless = {}, []
    for name, shape in shapes.items():
        renamed = _rename(layout, name)
        if renamed is None:
            homeless.append(name)
            continue
        theirs, pair = renamed
        found[name] = Stored(theirs, (1,) * pair.ones + tuple(shape), pair)
    if homeless:
        parts = sorted({name.rsplit(".", 1)[0] for name in homeless})
        raise ConfigError(
            f"the layout {layout!r} has no place for {len(homeless)} tensors, among them {', '.join(parts[:3])}"
        )
    if len({stored.name for stored in found.values()}) != len(found):
        raise ConfigError(f"the layout {layout!r} gives two tensors one name; its table is wrong")
    return found


def theirs(names: Iterable[str]) -> dict[str, str]:
    """Return our tensor names by what any layout calls them."""
    found: dict[str, str] = {}
    for name in names:
        for layout in LAYOUTS:
            if renamed := _rename(layout, name):
                found.setdefault(renamed[0], name)
    return found


def plain_name(name: str) -> str:
    """Return what a stored name is without the marks of training wrappers."""
    return _AROUND.sub("", _MARKS.sub("", name))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return stored names by what a whole model calls them, without the marks of training wrappers."""
    found = {plain_name(name): name for name in names}
    if "embed_tokens.weight" in found:  # transformers' Phi3Model, which is all but the output matrix
        return {name if name.startswith("lm_head.") else f"model.{name}": stored for name, stored in found.items()}
    return found


def _rename(layout: str, name: str) -> tuple[str, Pair] | None:
    for pair in LAYOUTS[layout]:
        if match := _regex(pair.ours).fullmatch(name):
            return pair.theirs.format(**match.groupdict()), pair
    return None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", pattern)
    fields = [rf"(?P<{name}>{_FIELDS.get(name, r'.+')})" for name in pieces[1::2]]
    fixed = [re.escape(piece) for piece in pieces[::2]]
    return re.compile("".join(text for both in zip(fixed, [*fields, ""], strict=True) for text in both))
