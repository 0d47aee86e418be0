"""Accelerate: models that are prepared for an Accelerator are pooled first, with DeepSpeed behind it or without.

Knows what prepare() is given and returns; how a model is pooled is known by the home of transformers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface.model import FAPoolForCausalLM, PreTrainedModel
from fapool_plugin.ranks.launch import JOINED
from fapool_plugin.ranks.roles import take_role


class FAPoolPlugin:
    """Pools transformers models on their way into ``Accelerator.prepare``.

    With ``"pool": "launch"`` make it before the Accelerator, which starts torch.distributed: on pool ranks it does not
    return, their processes serve until the base ranks have ended. (Under ``--module fapool_plugin.run`` that has
    happened already.)

    Args:
        fa_pool: settings, as in :meth:`FAPoolForCausalLM.from_pretrained`.

    Raises:
        FAPoolConfigError: a setting is wrong.
        SystemExit: this is a pool rank that has served; or the launch does not fit, and rank 0 has said why.
    """

    def __init__(self, fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
        self.config = FAPoolConfig.load(fa_pool)
        if JOINED.get() is None:
            take_role(self.config)

    def prepare(self, *objects: Any) -> Any:
        """Pools every transformers model among the objects, in place; give them to ``Accelerator.prepare`` then.

        Returns the objects, a single one as it is. Raises ValueError for a model that cannot be pooled exactly.
        """
        for one in objects:
            if self.config.enabled and isinstance(one, PreTrainedModel) and not isinstance(one, FAPoolForCausalLM):
                FAPoolForCausalLM.wrap(one, self.config)
        return objects[0] if len(objects) == 1 else objects

    def attach(self, accelerator: Accelerator) -> Accelerator:
        """From now on ``accelerator.prepare`` pools what it is given. Returns the accelerator."""
        prepare = accelerator.prepare

        @functools.wraps(prepare)
        def pooled(*objects: Any, **kwargs: Any) -> Any:
            self.prepare(*objects)
            return prepare(*objects, **kwargs)

        accelerator.prepare = pooled
        return accelerator
