"""Tiny random models of every causal language model type of the installed transformers, and what is found of each.

Knows how models are built and what may be said of them; how they are used stands in ``tests/survey_uses.py``.
"""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.models import THRESHOLD, TOLERANCE
from tests.survey_configs import LAYERS, LEFT_OUT, NEEDS, NOT_BUILT, SINGLE, SMALL, TOKENS, VARIANTS
from tests.survey_uses import OTHERWISE, USES, Answers, Asked, NoSuchUse, exact_softmax

TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
FA_POOL = {"threshold": THRESHOLD, "pool_ranks": 1, "activation": "length", "kv_block": 16, "memory_limit_mib": 64}
Kind = Literal[
    "equal",
    "plain is inconsistent",
    "local",
    "refused at load",
    "refused late",
    "refused",
    "no such use",
    "not built",
    "failed",
]
"""plain is inconsistent: equal to the plain model used in this way, which used in another way answers otherwise;
refused: rightly, since plain mixes documents that are packed into one row; no such use: plain has none."""
Phase = Literal["prefill", "training"]
PHASES: tuple[Phase, ...] = ("prefill", "training")
IN_BLOCKS_BY: dict[Phase, tuple[str, int]] = {"prefill": ("blocks", 2), "training": ("gradients", 1)}
"""The use that is long enough for blocks, and how many of its forwards are."""
AGREED: tuple[Kind, ...] = ("equal", "plain is inconsistent")
_GAIN = 1.3
"""Of random weights: scores of attention are far from alike, and far from one-hot."""


def tiny(name: str) -> Any:
    """A small configuration of a type, or of a variant."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    kind: Any = CONFIG_MAPPING[model_type]
    return kind(**_small(kind, NEEDS.get(model_type, {}) | changes))


def _small(kind: Any, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a small configuration of this class; those of configurations inside it are dicts."""
    standard, values = kind(), dict[str, Any]()
    for setting in dataclasses.fields(kind):
        name, default, made = setting.name, setting.default, vars(standard).get(setting.name)
        if isinstance(made, PreTrainedConfig):
            values[name] = _small(type(made), needs.get(name, {}))
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif name == "is_decoder":
            values[name] = True
        elif isinstance(default, float) and ("drop" in name or "jitter" in name):
            values[name] = 0.0
        elif name in SMALL and isinstance(default, int) and not isinstance(default, bool):
            values[name] = SMALL[name]
        elif name == "layer_types" and made:
            kinds = sorted(set(made), key=lambda kind: (kind in ("full_attention", "hybrid"), kind))
            values[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    values |= {
        name: value for name, value in needs.items() if not isinstance(vars(standard).get(name), PreTrainedConfig)
    }
    return {name: value for name, value in values.items() if value is not LEFT_OUT}


def build(name: str, attention: str | None = None) -> Any:
    """A random model, the same for the same name; in fp64 wherever its own code is able to."""
    arguments = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    # Experts one after the other: transformers' grouped product has no fp64.
    model = AutoModelForCausalLM.from_config(tiny(name), experts_implementation="eager", **arguments).eval()
    if model.config.model_type not in SINGLE:
        model = model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "sink" in name or "emb" in name:
                parameter.copy_(noise)
            elif parameter.ndim < 2:
                parameter.add_(noise / 10)
            elif "A_log" not in name:  # decays of a recurrence: others make it overflow
                parameter.copy_(noise * _GAIN / max(parameter.shape[1:]) ** 0.5)
    return model


@dataclass(frozen=True)
class Outcome:
    """What one use of a type, or the type as a whole, came to; ``why`` for all but "equal"."""

    kind: Kind
    why: str = ""
    worst: float = 0.0
    """Largest difference to what it is compared with, relative to the largest value of that."""
    in_blocks: int = 0
    """Forwards of which blocks of positions were in flight."""
    in_one: tuple[str, ...] = ()
    """Why other pooled forwards were not cut."""


@dataclass
class Found:
    """All that is known of one type."""

    name: str
    model_type: str = ""
    loaded: Outcome | None = None
    """Why there is nothing more: not built, or refused at load."""
    uses: dict[str, Outcome] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """What must not be, use by use."""
    took_s: float = 0.0

    @property
    def verdict(self) -> str:
        """The type as a whole, by the worst of its uses."""
        kinds = [outcome.kind for outcome in self.uses.values()]
        if self.loaded is not None:
            return self.loaded.kind
        order: tuple[Kind, ...] = ("failed", "refused late", "plain is inconsistent", "equal", "local", "no such use")
        return next(kind for kind in order if kind in kinds)


def survey(name: str, kv_home: str = "base") -> Found:
    """Uses one type in every way, with pool ranks and without."""
    if name in NOT_BUILT:
        return Found(name, name, Outcome("not built", NOT_BUILT[name]))
    began = time.perf_counter()
    reference, plain, model = build(name, "eager"), build(name), build(name)
    found = Found(name, plain.config.model_type)
    try:
        model = FAPoolForCausalLM.wrap(model, FA_POOL | {"kv_home": kv_home})
    except ValueError as error:
        found.loaded = Outcome("refused at load", said(error))
    except Exception as error:
        found.loaded = Outcome("failed", said(error))
        found.wrong.append(f"not even refused at load: {said(error)}")
    else:
        with model.fa_pool, exact_softmax():
            for use in USES:
                found.uses[use] = _use(found, use, reference, plain, model)
            stats = model.fa_pool.stats()
        if stats["faults"] or stats["stale"]:
            found.wrong.append(f"{stats['faults']} faults, {stats['stale']} stale: {stats['events']}")
    found.took_s = time.perf_counter() - began
    return found


def _use(found: Found, use: str, reference: Any, plain: Any, model: Any) -> Outcome:
    """One use, long and short."""
    run = USES[use]
    try:
        expected = run(Asked(reference), False)
        other = OTHERWISE[use](Asked(reference)) if use in OTHERWISE else {}
        own, short = run(Asked(plain), False), run(Asked(plain), True)
    except NoSuchUse as why:
        return Outcome("no such use", str(why))
    except Exception as error:
        return Outcome("no such use", said(error))
    allowed = TOLERANCE if found.model_type in SINGLE else TOLERANCE / 5
    apart = distance(other, {key: expected[key] for key in other})
    asked = Asked(model)
    outcome = _compared(use, asked, expected, own, allowed, apart)
    outcome = replace(outcome, in_blocks=asked.in_blocks, in_one=tuple(sorted(asked.in_one)))
    try:
        worst, where = distance(run(Asked(model), True), short)
    except Exception as error:
        found.wrong.append(f"{use}, short: {said(error)}")
    else:
        if worst:
            found.wrong.append(f"{use}, short: {where} differs by {worst:.3g}, not by 0")
    if outcome.kind in ("failed", "refused late"):
        found.wrong.append(f"{use}: {outcome.kind}: {outcome.why}")
    return outcome


def _compared(
    use: str, asked: Asked, expected: Answers, own: Answers, allowed: float, apart: tuple[float, str]
) -> Outcome:
    """Of the pooled model, with the reference or, if the plain model does not agree with itself, with that."""
    try:
        got = USES[use](asked, False)
    except ValueError as error:
        if use == "packed" and apart[0] > allowed:
            return Outcome("refused", f"plain mixes documents (by {apart[0]:.1e}): {said(error)}")
        return Outcome("refused late", said(error))
    except Exception as error:
        return Outcome("failed", said(error))
    if asked.unaccounted:
        return Outcome("failed", f"neither pooled nor counted with a reason: {', '.join(asked.unaccounted)}")
    worst, where = distance(got, expected)
    inconsistent = f"asked otherwise, {apart[1]} differs by {apart[0]:.1e}" if apart[0] > allowed else ""
    if worst > allowed and distance(own, expected)[0] > allowed:
        worst, where = distance(got, own)
        inconsistent = f"its own attentions differ by {distance(own, expected)[0]:.1e}"
    if worst > allowed:
        return Outcome("failed", f"{where} differs by {worst:.3g}, {allowed:.3g} allowed", worst)
    if not asked.pooled:
        return Outcome("local", "; ".join(sorted(asked.reasons)), worst)
    return Outcome("plain is inconsistent" if inconsistent else "equal", inconsistent, worst)


def distance(actual: Answers, expected: Answers) -> tuple[float, str]:
    """(largest difference, where): relative to the largest expected value, for gradients to the largest of all."""
    if actual.keys() != expected.keys():
        return math.inf, f"the set of answers ({', '.join(sorted(actual.keys() ^ expected.keys())[:5])})"
    gradients = [float(x.abs().max()) for key, x in expected.items() if key.startswith("gradient")]
    largest, worst = max(gradients, default=0.0), (0.0, "")
    for key, tensor in expected.items():
        if actual[key].shape != tensor.shape:
            return math.inf, f"the shape of {key}"
        apart = float((actual[key] - tensor).abs().max())
        relative = apart / ((largest if key.startswith("gradient") else float(tensor.abs().max())) or 1.0)
        worst = max(worst, (relative if math.isfinite(relative) else math.inf, key))
    return worst


def said(error: BaseException) -> str:
    """An error's first line, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line} ({'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno})"


def agreed_in_blocks(found: Iterable[Found], phase: Phase = "prefill") -> set[str]:
    """Model types of which blocks of positions were in flight and gave what one forward gives.

    Blocks are of 64 positions and windows, where there are any, of 8: the prompt is much longer than a window.
    """
    use, forwards = IN_BLOCKS_BY[phase]
    outcomes = [(each.model_type, each.uses[use]) for each in found if use in each.uses]
    agreed = {name for name, outcome in outcomes if outcome.in_blocks == forwards and outcome.kind in AGREED}
    return agreed - {name for name, outcome in outcomes if outcome.kind in ("failed", "refused late")}


def lines(found: Iterable[Found]) -> Iterator[str]:
    """The table: each type with what its uses came to, and the counts."""
    found = list(found)
    for each in found:
        yield f"{each.name}: {each.verdict} ({each.took_s:.1f} s)"
        if each.loaded is not None:
            yield f"    {each.loaded.why}"
        for use, outcome in each.uses.items():
            why = f": {outcome.why}" if outcome.why else f", {outcome.worst:.1e}"
            blocks = f"; {outcome.in_blocks} in blocks" if use in ("blocks", "gradients") else ""
            yield f"    {use}: {outcome.kind}{why}{blocks}" + "".join(
                f"; in one: {reason}" for reason in outcome.in_one
            )
        yield from (f"    WRONG {what}" for what in each.wrong)
    for verdict, count in Counter(each.verdict for each in found).most_common():
        yield f"{count} {verdict}"
