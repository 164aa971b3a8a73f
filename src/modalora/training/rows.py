"""What a loop asks of rows: which rotary table they use, which media they hold, and whether these lie in them."""

from __future__ import annotations

from typing import Any

from modalora.contracts import Batch
from modalora.errors import TrainingError
from modalora.models.multimodal import Multimodal
from modalora.nn.rope import is_long
from modalora.training.nonfinite import row_name

TABLES = ("short", "long")  # rotary tables of a row, where a model has two


def row_tables(model: Multimodal, batch: Batch) -> list[str]:
    """Return which of two rotary tables each row of a batch uses; none where the model has one table alone."""
    rope = model.config.decoder.rope
    return [] if rope.switch is None else [TABLES[long] for long in is_long(rope, batch.lengths.tolist())]


def rope_tables(model: Multimodal) -> dict[str, Any]:
    """Return both tables of a model, as JSON: radians per token and attention factors; nothing where it has one."""
    config = model.config.decoder
    rope = config.rope
    if rope.switch is None:
        return {}
    return {"switch": rope.switch, "window": rope.window} | {
        table: {
            "attention_factor": rope.attention_factor(long=long),
            "frequencies": rope.frequencies(config.head_dim, long=long).tolist(),
        }
        for long, table in ((False, "short"), (True, "long"))
    }


def check_spans(batch: Batch, number: int) -> None:
    """Refuse media that do not lie in their row. Raises TrainingError naming the row."""
    for item in batch.media:
        if item.start < 0 or item.start + item.tokens > int(batch.lengths[item.row]):
            raise TrainingError(
                f"row {row_name(batch, number, item.row)}: its {item.modality} fills tokens {item.start} to "
                f"{item.start + item.tokens}, and the row has {int(batch.lengths[item.row])}; was it cut off?"
            )


def row_kinds(model: Multimodal, batch: Batch) -> list[str]:
    """Return what each row of a batch holds: text alone, or its media, such as image+audio."""
    held = {(item.row, item.modality) for item in batch.media}
    kinds = model.config.modalities
    return ["+".join(kind for kind in kinds if (row, kind) in held) or "text" for row in range(len(batch.lengths))]
