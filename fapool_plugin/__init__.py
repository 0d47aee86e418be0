"""FA Pool: attention of long sequences, computed together with borrowed ranks that hold no weights.

Names are imported on first use, so that a pool rank never loads a model framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fapool_plugin.base.attention import FAPoolAttention
    from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
    from fapool_plugin.integrations.huggingface import FAPoolForCausalLM

__version__ = "0.1.0"
__all__ = ["FAPoolAttention", "FAPoolConfig", "FAPoolConfigError", "FAPoolForCausalLM"]

_HOMES = {
    "FAPoolAttention": "fapool_plugin.base.attention",
    "FAPoolConfig": "fapool_plugin.config",
    "FAPoolConfigError": "fapool_plugin.config",
    "FAPoolForCausalLM": "fapool_plugin.integrations.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
