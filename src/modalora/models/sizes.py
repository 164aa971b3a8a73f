"""Named sizes: the published models, built on the meta device to be counted, and small ones that run anywhere."""

from __future__ import annotations

from modalora.models.decoder import DecoderConfig
from modalora.models.multimodal import ModelConfig
from modalora.models.speech import SpeechConfig
from modalora.models.vision import VisionConfig
from modalora.nn.lora import LoraConfig
from modalora.nn.rope import LongRope, Plain

# Published config of Phi-4-Mini: one divisor per rotated pair (head_dim 128, 0.75 rotated).
_PHI4_LONG = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03,
    32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip


def phi4_mini() -> ModelConfig:
    """Phi-4-Mini: 3,836,021,760 parameters (arXiv:2503.01743, section 2.1)."""
    rope = LongRope(short_factor=(1.0,) * 48, long_factor=_PHI4_LONG, rotated=0.75)
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=200_064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=24,
            num_key_value_heads=8,
            rope=rope,
        )
    )


def phi4_multimodal() -> ModelConfig:
    """Phi-4-Multimodal: 5,574,460,384 numbers in 2,047 tensors (arXiv:2503.01743, section 2.2)."""
    return ModelConfig(
        decoder=phi4_mini().decoder,
        vision=VisionConfig(),
        speech=SpeechConfig(),
        adapters={
            "vision": LoraConfig(r=256, lora_alpha=512),
            "speech": LoraConfig(r=320, lora_alpha=640, lora_dropout=0.01),
        },
    )


def nano() -> ModelConfig:
    """The bundled model: the same architecture, trained by this repository's recipes on two CPU cores."""
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope=Plain(rotated=0.75, window=1024),
        ),
        vision=VisionConfig(
            hidden_size=160,
            intermediate_size=480,
            num_hidden_layers=5,
            num_attention_heads=4,
            crop=120,
            patch=10,
            pooling_head=False,
            max_crops=16,
        ),
        speech=SpeechConfig(
            hidden_size=144,
            intermediate_size=288,
            num_blocks=6,
            num_attention_heads=4,
            subsampling_channels=64,
            bias_max_distance=100,
            segment=100,
        ),
        adapters={
            "vision": LoraConfig(r=32, lora_alpha=64),
            "speech": LoraConfig(r=16, lora_alpha=32, lora_dropout=0.01),
        },
    )


def tiny() -> ModelConfig:
    """Two layers of width 64 for tests, with every mechanism of the large model, LongRoPE included."""
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope=LongRope(
                short_factor=(1.0,) * 6,
                long_factor=(1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
                rotated=0.75,
                window=2048,
                original_window=256,
            ),
        ),
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            crop=56,
            patch=14,
            max_crops=6,
        ),
        speech=SpeechConfig(
            hidden_size=32,
            intermediate_size=48,
            num_blocks=2,
            num_attention_heads=2,
            subsampling_channels=16,
            bias_max_distance=50,
            segment=50,
        ),
        adapters={
            "vision": LoraConfig(r=8, lora_alpha=16),
            "speech": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.01),
        },
    )


def window_study() -> ModelConfig:
    """A decoder alone, of 5.4 million parameters, that reads 128 tokens: the base of the study of longer windows.

    14 of its 32 rotated pairs complete a period within the window, 0.44 of them, as against 0.55 and 0.65 in the
    models of arXiv:2502.20082; the slowest sees 2.5 % of its period.
    """
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            rope=Plain(theta=1000.0, window=128),
        )
    )


def genome() -> ModelConfig:
    """A decoder of codons (science/codons.py), of 0.8 million parameters, that reads 8,192 of them: 24,576 letters."""
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=66,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            rope=Plain(window=8192),
        )
    )


def _gpt(layers: int) -> ModelConfig:
    # 12 x width^2 numbers a layer, as GPT has them, in three matrices of the MLP instead of two
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=66,
            hidden_size=5760,
            intermediate_size=15_360,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=64,
            rope=Plain(window=2**20),
            tie_word_embeddings=False,
        )
    )


def genome_25b() -> ModelConfig:
    """The 25B model of the long-sequence tables of arXiv:2310.04610: 64 layers of width 5760, to be planned with."""
    return _gpt(64)


def genome_33b() -> ModelConfig:
    """The 33B model of the same tables: 80 layers of width 5760, to be planned with."""
    return _gpt(80)


SIZES = {
    "phi4-mini": phi4_mini,
    "phi4-multimodal": phi4_multimodal,
    "nano": nano,
    "tiny": tiny,
    "window-study": window_study,
    "genome": genome,
    "genome-25b": genome_25b,
    "genome-33b": genome_33b,
}
