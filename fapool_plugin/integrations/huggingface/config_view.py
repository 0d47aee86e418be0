"""Hugging Face: how a model's modules come to look for our attention, while its configuration says nothing of it.

Modules read the name of their attention from their configuration, which is the user's, too: saved, pickled, given to
other models. So they get a view of it, which has the same attributes, written ones included, and answers with our name.
Knows transformers' configurations, not what stands behind the name.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

from torch import nn

LOCAL = "_attn_implementation_internal"
"""Under which attribute a configuration has the name of its attention implementation."""
_TEXT = ("text_config", "decoder", "generator")
"""Under which names a configuration of several models has that of its decoder, as in ``get_text_config``."""


class _View:
    """A configuration that shares all attributes with another. Copies and pickles of it are of that other one."""

    __slots__ = ("fapool_viewed",)
    fapool_viewed: Any
    fapool_name: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Who makes another of a configuration's class, as saving does to know the defaults, gets no view.
        return cls.__bases__[1](*args, **kwargs)

    @property
    def _attn_implementation(self) -> str:
        return self.fapool_name

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        if value != self.fapool_name:
            self.fapool_viewed._attn_implementation = value

    @property
    def _attn_implementation_internal(self) -> str:
        return self.fapool_name

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        # A model that is made of a view writes what it has read.
        if value != self.fapool_name:
            self.__dict__[LOCAL] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.fapool_viewed, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The same object where a model is pickled with it, and no name of ours where it is pickled alone.
        return operator.getitem, ([self.fapool_viewed], 0)


def local_name(config: Any) -> str | None:
    """The attention implementation that ``config`` has without us, as it is now."""
    name: str | None = vars(config).get(LOCAL)
    return name


def view(config: Any, name: str) -> Any:
    """A view of ``config`` that names ``name`` as its attention implementation; of a decoder's configuration inside it
    likewise."""
    if isinstance(config, _View):
        return config
    inner = tuple(key for key in _TEXT if vars(config).get(key) is not None and hasattr(vars(config)[key], "to_dict"))
    kind: Any = type(config)
    made = object.__new__(_view_class(kind, inner, name))
    object.__setattr__(made, "fapool_viewed", config)
    object.__setattr__(made, "__dict__", config.__dict__)
    return made


def view_configs(module: nn.Module, attentions: set[nn.Module], name: str, *, own: bool) -> None:
    """Gives every module that holds one of ``attentions``, or is one, a view of its configuration; ``module`` itself
    only if ``own``."""
    for inside in module.modules():
        if inside is module and not own:
            continue
        config = vars(inside).get("config")
        if hasattr(config, "to_dict") and not attentions.isdisjoint(inside.modules()):
            vars(inside)["config"] = view(config, name)


@functools.cache
def _view_class(base: Any, inner: tuple[str, ...], name: str) -> Any:
    def of(key: str) -> property:
        def read(self: Any) -> Any:
            return view(self.__dict__[key], name)

        def write(self: Any, value: Any) -> None:
            self.__dict__[key] = value

        return property(read, write)

    members = {"__module__": base.__module__, "__doc__": base.__doc__, "__slots__": (), "fapool_name": name}
    return type(base.__name__, (_View, base), members | {key: of(key) for key in inner})
