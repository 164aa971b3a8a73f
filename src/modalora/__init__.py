"""modalora: compact multimodal language models built from one frozen decoder and modality-routed LoRAs.

    import modalora
    m = modalora.load("nano")
    print(m.ask("What number is spoken?", audio="seven.wav"))

Names are loaded when used, so that importing the package (and `modalora --help`) stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalora.assistant import Answer, Assistant, load
    from modalora.contracts import Batch, Message
    from modalora.errors import ModaloraError

__version__ = "0.1.0"

_HOMES = {
    "Answer": "modalora.assistant",
    "Assistant": "modalora.assistant",
    "Batch": "modalora.contracts",
    "Message": "modalora.contracts",
    "ModaloraError": "modalora.errors",
    "load": "modalora.assistant",
}
__all__ = ["Answer", "Assistant", "Batch", "Message", "ModaloraError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modalora' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
