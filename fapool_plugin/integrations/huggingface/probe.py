"""Hugging Face: whether a decoder may be cut into pieces, shown on a few tokens of the forward at hand.

    plain   transformers' own attention, one piece          -+
    cut     our attention without pool ranks, in pieces      +-> the same hidden states, keys, gradients, random
    uncut   our attention, one piece: if those two differ,  -+   numbers and modes of torch?
            to say what it is that differs

All begin with the same random numbers, buffers and attributes of modules, which are put back afterwards. A verdict is
kept for what it depends on. What so few tokens cannot show is named in pieces. Knows decoders, no ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fapool_plugin.base.forward import CannotPool, Forward, Misjudged
from fapool_plugin.base.random_numbers import RandomNumbers
from fapool_plugin.base.rounds import Modes
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface.attention import SCOPE, Scope, mask_again
from fapool_plugin.integrations.huggingface.blocks import mask_purposes, names_used, run_blocks, run_parts
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.training_cache import GraphCache
from fapool_plugin.observe.metrics import Counters
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.link import first_line

LENGTH = 48
"""Tokens of a row."""
_PIECES = {"positions": 3, "rows": 2}
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
"""Of hidden states, by norm, position by position; of keys and gradients ten times as much. Models of float64 have
parts that compute in float32."""
_ROUGH = 4
"""The same for other dtypes, whose sums depend on the sizes of matrices: so many times their precision, or the
difference that our attention alone makes."""


@dataclass
class Probe:
    """The verdicts on one model. Empty: pieces agree with the whole."""

    verdicts: dict[Any, str] = field(default_factory=dict)
    windows: dict[Any, frozenset[int]] = field(default_factory=dict)
    """Which windows masks and layers asked for."""
    values: dict[Any, object] = field(default_factory=dict)
    """Those of modules that a verdict was shown with."""

    def knows(self, key: Any, values: object) -> bool:
        """Whether there is a verdict that holds for these values: to leave a model whole is never wrong."""
        return key in self.verdicts and (self.verdicts[key] != "" or self.values.get(key) == values)

    def run(
        self, key: Any, values: object, owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope
    ) -> str:
        """The verdict for ``key``, shown anew by ``owner``'s forward of a few tokens of what is ``given``. ""
        for yes, or in which way pieces differ."""
        began = time.perf_counter()
        rows = key[0] == "rows"
        with _undisturbed(owner, scope):
            try:
                trial = _Trial(owner, enter, given, scope, rows)
                verdict = self.verdicts[key] = trial.verdict()
                self.windows[key], self.values[key] = frozenset(trial.windows), values
            except (CannotPool, Misjudged) as error:
                # That is of this forward's arguments, and not kept.
                verdict = str(error)
            except Exception as error:  # whatever a model's own code does with so few tokens
                verdict = self.verdicts[key] = f"a short trial failed ({_said(error)})"
        took_ms = (time.perf_counter() - began) * 1e3
        said = f"not be cut along {key[0]}: {verdict}" if verdict else f"be cut along {key[0]}"
        scope.manager.counters.log("probe", f"a trial of {LENGTH} tokens took {took_ms:.0f} ms: the model may {said}")
        return verdict


@dataclass
class _Seen:
    """What one run left."""

    hidden_BSX: list[Tensor]
    keys: list[Tensor]
    gradients: list[Tensor]
    """Of each parameter its sums over the last dimension."""
    state: Any
    """Random numbers to come, and modes of torch."""


class _Trial:
    """A few tokens of a forward's rows, and how to run them."""

    def __init__(self, owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope, rows: bool) -> None:
        self.owner, self.enter, self.scope, self.rows = owner, enter, scope, rows
        self.windows: set[int] = set()
        self.training = scope.decided.phase == "training"
        # Masks that were made outside are made again for these few tokens, as a 2-D mask says where they are.
        self.purposes = mask_purposes(given, scope) or {}
        padding = next((purpose["attention_mask"] for purpose in self.purposes.values()), None)
        given = given | ({"attention_mask": padding} if self.purposes else {})
        self.given, self.geometry = shortened(given, scope.decided.geometry, names_used(owner), rows=rows)
        parameters = [parameter for parameter in owner.parameters() if parameter.requires_grad]
        for name, value in self.given.items():
            if isinstance(value, Tensor) and value.requires_grad:
                # Not the graph that it comes from: that one is the model's, and goes backward once.
                self.given[name] = value.detach().requires_grad_()
                parameters.append(self.given[name])
        self.wanted = parameters if self.training and torch.is_grad_enabled() else []
        self.random = RandomNumbers.now()
        self.kept = _Attributes.of(owner)

    def verdict(self) -> str:
        """In which way the pieces differ from the whole; "" in none."""
        plain = self._run("plain")
        dtype, device = plain.hidden_BSX[0].dtype, plain.hidden_BSX[0].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = dtype in _TOLERANCE
        uncut = None if exact else self._run("uncut")
        noise = 0.0 if uncut is None else _difference(uncut.hidden_BSX, plain.hidden_BSX, self.real_BS)
        tolerance = _TOLERANCE[dtype] if exact else _ROUGH * max(torch.finfo(dtype).eps, noise)
        try:
            cut = self._run("cut")
        except (CannotPool, Misjudged):
            raise
        except Exception as error:  # whatever a model's own code does with a piece
            return f"it fails in pieces ({_said(error)})"
        return self._compared(cut, plain, tolerance)

    @property
    def real_BS(self) -> Tensor:
        """Which positions are not padding; on the CPU, whatever torch's default device is."""
        at = torch.arange(self.geometry.columns, device="cpu")[None]
        edges = (self.geometry.starts, self.geometry.stops)
        starts, stops = (torch.tensor(x, device="cpu")[:, None] for x in edges)
        return (at >= starts) & (at < stops)

    def _compared(self, cut: _Seen, plain: _Seen, tolerance: float) -> str:
        hidden = _difference(cut.hidden_BSX, plain.hidden_BSX, self.real_BS)
        if not hidden <= tolerance:
            return f"hidden states differ by {hidden:.2g} of their size"
        keys = max((_relative(a, b, self.real_BS) for a, b in zip(cut.keys, plain.keys, strict=False)), default=0.0)
        if not keys <= 10 * tolerance:
            return f"cached keys differ by {keys:.2g} of their size"
        largest = max((float(x.norm()) for x in plain.gradients), default=0.0)
        for mine, other in zip(cut.gradients, plain.gradients, strict=True):
            gradients = float((mine - other).norm()) / (float(other.norm()) + 0.01 * largest or 1.0)
            if not gradients <= 10 * tolerance:
                return f"gradients differ by {gradients:.2g} of their size"
        if cut.state != plain.state:
            return "random numbers, or modes of torch, go on from elsewhere"
        return ""

    def _run(self, how: str) -> _Seen:
        """One run, and its gradients. Everything is as before afterwards."""
        given, config = dict(self.given), self.owner.config.get_text_config(decoder=True)
        decided = Forward(self.scope.decided.config, Counters(), self.scope.decided.phase)
        cache: Any = None
        if how != "plain":
            state = SequenceState()
            state.place(self.geometry.starts)
            pieces = 1 if how == "uncut" else _PIECES["rows" if self.rows else "positions"]
            decided = replace(decided, pooled=True, geometry=self.geometry, sequence=state, blocks=pieces)
            cache = GraphCache(config, self.geometry.columns) if self.training else None
            cache = cache or PooledCache(config, self.scope.manager, state)
        scope = Scope(self.scope.manager, decided, None if self.training else cache, windows=self.windows)
        modes, before = Modes.now(), SCOPE.set(scope)
        try:
            if self.purposes:
                given["attention_mask"] = {name: mask_again(self._short(x)) for name, x in self.purposes.items()}
            if how != "cut":
                output = self.enter(**given | {"use_cache": how == "plain" and not self.training, "return_dict": True})
            elif self.rows:
                output = run_parts(self.owner, self.enter, given | {"use_cache": False, "return_dict": True}, scope)
            else:
                cut = given | {"past_key_values": None, "use_cache": False, "return_dict": True}
                output = run_blocks(self.owner, self.enter, cut, scope, cache, LENGTH // _PIECES["positions"])
                cache = cache if not self.training else None
            left = (RandomNumbers.now(), Modes.now())
            hidden = [x for x in output.values() if isinstance(x, Tensor) and x.ndim == 3]
            keys = (
                output.get("past_key_values") if how == "plain" else cache if how == "cut" and not self.rows else None
            )
            return _Seen([x.detach() for x in hidden], _keys_of(keys), self._gradients(hidden), left)
        finally:
            SCOPE.reset(before)
            modes.set()
            self.random.set()
            self.kept.put_back()

    def _short(self, purpose: dict[str, Any]) -> dict[str, Any]:
        rows, length = len(self.geometry.starts), self.geometry.columns
        sizes = {"batch_size": rows, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
        return purpose | sizes | {"attention_mask": self.given.get("attention_mask")}

    def _gradients(self, hidden: list[Tensor]) -> list[Tensor]:
        if not self.wanted:
            return []
        weights = torch.Generator("cpu").manual_seed(0)
        loss = hidden[0].new_zeros(())
        for x in hidden:
            factors = torch.randn(x.shape, generator=weights, device="cpu").to(x.device, x.dtype)
            loss = loss + (x * factors * self.real_BS.to(x.device)[..., None]).sum()
        if not loss.requires_grad:
            return [x.new_zeros(()) for x in self.wanted]
        found = torch.autograd.grad(loss, self.wanted, allow_unused=True, retain_graph=True)
        return [x.new_zeros(()) if grad is None else _sums(grad) for x, grad in zip(self.wanted, found, strict=True)]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _sums(grad: Tensor) -> Tensor:
    """What is kept of a parameter's gradient: all of a model's are as large as the model."""
    exact = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(-1, dtype=exact) if grad.ndim else grad.to(exact)


def shortened(
    given: dict[str, Any], geometry: Geometry | None, used: frozenset[str], *, rows: bool
) -> tuple[dict[str, Any], Geometry]:
    """A decoder's arguments for a few tokens of two rows at most, padded ones among them: (arguments, where they are).

    Raises:
        ValueError: it is not given tokens.
    """
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(tokens, Tensor) or geometry is None:
        raise ValueError("no tokens are given")
    batch, new = tokens.shape[:2]
    length, past = min(LENGTH, new), geometry.q_column
    starts, stops = ([column - past for column in columns] for columns in (geometry.starts, geometry.stops))
    left, right = max(range(batch), key=lambda row: starts[row]), min(range(batch), key=lambda row: stops[row])
    padded = [row for row in dict.fromkeys((left, right)) if starts[row] > 0 or stops[row] < new]
    chosen = list(dict.fromkeys([*padded, *range(batch)]))[: 2 if rows else max(1, len(padded))]
    firsts = []
    for row in chosen:
        # A third of the row is padding, where there is any.
        first = starts[row] - length // 3 if starts[row] > 0 else stops[row] - 2 * length // 3
        firsts.append(max(0, min(new - length, first)) if row in padded else 0)

    def windows(x: Tensor, row_dim: int, dim: int) -> Tensor:
        picked = [
            x.narrow(row_dim, row if x.shape[row_dim] == batch else 0, 1).narrow(dim, first, length)
            for row, first in zip(chosen, firsts, strict=True)
        ]
        return torch.cat(picked, dim=row_dim)

    short = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    short = {name: value for name, value in short.items() if name not in ("past_key_values", "output_hidden_states")}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            continue
        if name == "attention_mask":
            short[name] = windows(value[:, past:], 0, 1)
        elif name == "position_ids" and value.ndim >= 2:
            short[name] = windows(value, value.ndim - 2, value.ndim - 1)
        elif name in ("input_ids", "inputs_embeds", "per_layer_inputs"):
            short[name] = windows(value, 0, 1)
        elif name in used:
            raise ValueError(f"argument {name} is not known")
    at = list(zip(chosen, firsts, strict=True))
    begins, ends = (tuple(max(0, min(length, edges[row] - first)) for row, first in at) for edges in (starts, stops))
    return short, Geometry(begins, ends, 0, length)


def _difference(these: list[Tensor], others: list[Tensor], real_BS: Tensor) -> float:
    """The largest difference of hidden states (B, S, X), by norm, position by position."""
    worst = 0.0
    for a, b in zip(these, others, strict=True):
        a, b = (x.double().cpu()[real_BS] for x in (a, b))
        if a.numel():
            scale = b.norm(dim=-1)
            worst = max(worst, _largest((a - b).norm(dim=-1) / (scale + 1e-3 * scale.mean() + 1e-30)))
    return worst


def _relative(a_BKTD: Tensor, b_BKTD: Tensor, real_BS: Tensor) -> float:
    """The largest difference of cached keys at real positions, of which a layer may have the last only."""
    if a_BKTD.shape != b_BKTD.shape:
        return float("inf")
    real_BT = real_BS[:, real_BS.shape[1] - a_BKTD.shape[2] :]
    a, b = (x.transpose(1, 2).double().cpu()[real_BT] for x in (a_BKTD, b_BKTD))
    return _largest((a - b).abs()) / (float(b.abs().max()) + 1e-30) if a.numel() else 0.0


def _largest(x: Tensor) -> float:
    """NaN, which is not in any tolerance, if there is any."""
    return float(x.max()) if bool(x.isfinite().all()) else float("nan")


def _keys_of(cache: Any) -> list[Tensor]:
    layers = getattr(cache, "layers", ())
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return [x.detach() for x in found if isinstance(x, Tensor) and x.ndim == 4]


@contextmanager
def _undisturbed(owner: nn.Module, scope: Scope) -> Iterator[None]:
    """Trials are not counted, neither their calls nor, as the base's activity, their time."""
    manager, phase = scope.manager, scope.decided.phase
    counters = manager.counters.backward
    before = dict(vars(counters), base_s=dict(counters.base_s))
    manager.timeline.end()
    try:
        yield
    finally:
        vars(counters).update(before)
        manager.timeline.begin(manager.counters.phase(phase))


@dataclass
class _Attributes:
    """What modules keep beside their parameters: buffers by value, all else by identity, in dicts and lists, too."""

    dicts: list[tuple[dict[str, Any], dict[str, Any]]]
    lists: list[tuple[list[Any], list[Any]]]
    buffers: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, owner: nn.Module) -> _Attributes:
        """As they are now."""
        values = [value for module in owner.modules() for value in (vars(module), *vars(module).values())]
        buffers = [(buffer, buffer.detach().clone()) for buffer in owner.buffers() if not buffer.is_meta]
        dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
        return cls(dicts, [(value, list(value)) for value in values if isinstance(value, list)], buffers)

    def put_back(self) -> None:
        """As they were."""
        for now, before in self.dicts:
            if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
                now.clear()
                now.update(before)
        for found, items in self.lists:
            found[:] = items
        with torch.no_grad():
            for buffer, value in self.buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
