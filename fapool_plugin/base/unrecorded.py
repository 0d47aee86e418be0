"""What shapes a forward beside its inputs: weights, adapters, modules, hooks that alter, random numbers.

So that it is known whether a replay of the inputs would make the same keys. Knows a model as a torch module; not what
is recorded of its forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from fapool_plugin.base.kept_calls import fingerprint
from fapool_plugin.base.random_numbers import RandomNumbers


def modules_in(owner: nn.Module) -> list[nn.Module]:
    """As ``owner.modules()``, in a third of its time: it is asked for in each decode step."""
    found, left = dict[int, nn.Module](), [owner]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            left.extend(reversed(module._modules.values()))  # type: ignore[arg-type]
    return list(found.values())


def version_of(owner: nn.Module) -> tuple[Any, ...]:
    """What is another value once weights, buffers, adapters or modules have changed, but by writes to their ``data``.
    What was made in inference mode has no version."""
    tensors = (*owner.parameters(), *owner.buffers())
    modules = [(id(m), m.training, id(vars(m).get("forward"))) for m in modules_in(owner)]
    return adapters(owner), modules, [(id(x), 0 if x.is_inference() else x._version) for x in tensors]


_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_WITHOUT_SETTINGS = frozenset({nn.Linear, nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout})
"""Modules whose attributes shape nothing that they make, unless they train."""


def made_by(modules: Iterable[nn.Module]) -> list[Any] | None:
    """What is another value once these modules make something else of the same input. It is asked for in each layer of
    each step: of a linear layer it takes 5 us, of an adapted one 25. Values assigned to ``data`` count, writes to them
    don't. None: it cannot be known of modules that have hooks, train, or have weights without versions, or elsewhere.
    """
    seen = list[Any]()
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    for module in (inside for one in modules for inside in modules_in(one)):
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        seen.append(id(module))
        own = vars(module)
        if type(module) not in _WITHOUT_SETTINGS or "forward" in own:
            seen.append({name: _plain(own[name]) for name in own.keys() - _OF_ALL_MODULES})
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is None:
                continue
            if x.is_inference() or x.is_meta:
                return None
            seen += (id(x), x._version, x.data_ptr() if type(x) in (Tensor, nn.Parameter) else 0)
    return seen


def _plain(value: Any) -> Any:
    """A setting's value; of what is none, its identity."""
    kind = type(value)
    if kind in (bool, int, float, str):
        return value
    if issubclass(kind, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    return [_plain(item) for item in value] if issubclass(kind, list | tuple | set) else id(value)


def values_of(owner: nn.Module) -> bytes:
    """The same of all bits, writes to ``data`` included. Of tensors that are sharded, quantized or elsewhere: none."""
    tensors = [x.detach() for x in (*owner.parameters(), *owner.buffers()) if x.numel() and not x.is_meta]
    plain = [x for x in tensors if type(x) is Tensor]
    return _fingerprint(*plain) if plain else b"none"


def adapters(owner: nn.Module) -> list[Any]:
    """What may be switched to and fro at no cost, and so is looked at in each forward."""
    tuned = [m for m in modules_in(owner) if getattr(type(m), "merged_adapters", None) is not None]
    names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    return [owner.training, *(repr([getattr(m, name, None) for name in names]) for m in tuned)]


def decoder_in(owner: Any) -> Any:
    """The decoder of a model, which may be called by itself."""
    return owner.get_decoder() if hasattr(owner, "get_decoder") else owner


@contextmanager
def unseen(owner: nn.Module, own: Callable[[Any], bool]) -> Iterator[None]:
    """Within it users' hooks are off and random numbers are drawn from a copy of their state."""
    numbers, taken = RandomNumbers.now(), []
    for hooks, key, _ in _users_hooks(owner, own):
        taken.append((hooks, dict(hooks)))
        del hooks[key]
    try:
        yield
    finally:
        for hooks, before in reversed(taken):
            hooks.clear()
            hooks.update(before)
        numbers.set()


@contextmanager
def watched(owner: nn.Module, own: Callable[[Any], bool], draws_none: Callable[[Any], bool]) -> Iterator[list[str]]:
    """Within it a forward is made, of which inputs do not tell all if there is anything in the list afterwards: a hook
    altered what modules are given or return, or the model drew random numbers."""
    found, numbers, wrapped = list[str](), RandomNumbers.now(), []
    everywhere: Any = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    users = [*_users_hooks(owner, own), *((hooks, key, hook) for hooks in everywhere for key, hook in hooks.items())]
    for hooks, key, hook in users:
        hooks[key] = _noting(hook, found)
        wrapped.append((hooks, key, hook, hooks[key]))
    try:
        yield found
    finally:
        for hooks, key, hook, noting in wrapped:
            if hooks.get(key) is noting:
                hooks[key] = hook
        if RandomNumbers.now() != numbers and (owner.training or not draws_none(owner)):
            found.append("a forward drew random numbers")


def _users_hooks(owner: nn.Module, own: Callable[[Any], bool]) -> list[tuple[dict[int, Any], int, Any]]:
    return [
        (hooks, key, hook)
        for module in modules_in(owner)
        if module._forward_hooks or module._forward_pre_hooks
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if not own(hook)
    ]


def _noting(hook: Any, found: list[str]) -> Any:
    """The hook, which says if it alters anything."""

    @functools.wraps(hook, updated=())
    def noting(*args: Any) -> Any:
        before, given = [(x, _bits(x)) for x in _tensors(args)], _ids(args)
        result = hook(*args)
        alike = result is None or _ids(result) in (_ids(args[-1]), _ids(args[1:]))
        if not alike or _ids(args) != given or any(_bits(x) != bits for x, bits in before):
            found.append("a hook altered what modules are given or return")
        return result

    return noting


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _ids(values: Any) -> list[int]:
    return [id(x) for x in _tensors(values)]


def _bits(x: Tensor) -> Any:
    """What writes to a tensor change. One that was made in inference mode counts none."""
    return _fingerprint(x) if x.is_inference() else x._version


def _fingerprint(*tensors: Tensor) -> bytes:
    return fingerprint(*(x.reshape(1, 1, -1, x.shape[-1] if x.ndim else 1) for x in tensors))
