"""What `fapool plan` and `fapool calibrate` show: predicted times over lengths, thresholds, and a profile's fits.

Finds or measures the profile and shows numbers as they come. How they are predicted or measured is not known here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.plan.forecast import Choice, Cores, Thresholds, auto_threshold, choose_prefill, moved_bytes
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import Fit, Profile, Shape
from fapool_plugin.tools.demo import Screen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POOR = 0.25
"""A fit with a larger relative error is not trusted silently."""


@dataclass(frozen=True)
class Setting:
    """What is planned with."""

    cores: Cores
    pool_ranks: tuple[int, ...]
    """Numbers of pool ranks at hand, each planned for."""
    max_blocks: int
    dtype: str
    """A name in torch."""

    @property
    def threads(self) -> list[int]:
        """Numbers of threads that a plan asks costs of."""
        moving = [self.cores.base(ranks) for ranks in self.pool_ranks]
        return sorted({self.cores.total, *moving, self.cores.per_rank or self.cores.total})

    def as_measured(self, profile: Profile) -> Setting:
        """No threads move where a profile says that ranks compute on GPUs, whatever was told."""
        return replace(self, cores=replace(self.cores, per_rank=0)) if profile.on_devices else self


@dataclass(frozen=True)
class Outlook:
    """Predictions for one number of pool ranks at hand: the best pooled way for each length, and where it pays."""

    pool_ranks: int
    choices: dict[int, Choice]
    moved: dict[int, tuple[int, int]]
    """Bytes to and from all ranks, by length."""
    thresholds: Thresholds


def pays(choice: Choice) -> bool:
    """Whether this pooled way is faster than the base alone."""
    return choice.seconds < choice.alone_s


def find_profile(model: Path | None, given: Path | None, setting: Setting, screen: Screen | None = None) -> Profile:
    """The profile to plan with: the ``given`` one, else the one kept for this machine and model, else one quickly
    measured and then kept. No weights are read unless it is measured.

    Raises:
        ProfileError: it is damaged.
        OSError: no model, or a pool rank cannot be started.
        ValueError: nothing of the model would be pooled.
    """
    from fapool_plugin.measure.calibrate import machine_of

    found = Profile.load(given) if given is not None else None
    if found is not None and model is None:
        differs = found.misfit(machine_of(found), found.shape)
    else:
        from fapool_plugin.integrations.huggingface.calibrate import default_path, shape_of_path

        folder = _model_folder(model)
        shape = shape_of_path(folder, setting.dtype)
        if found is None:
            kept = default_path(machine_of(None), shape)
            found = Profile.load(kept) if kept.exists() else measure(folder, setting, quick=True, screen=screen)
        differs = found.misfit(machine_of(found), shape)
    if differs:
        _note(f"the profile is of something else, so times may be far off: {differs}")
    if found.quick:
        _note("the profile was taken in a hurry; fapool calibrate measures a better one")
    _note_poor(found)
    for part, known in (("attention", found.attention), ("linear", found.linear)):
        if found.on_devices:
            break  # a GPU's host has nothing to compute
        if missing := sorted(set(setting.threads) - {cost.threads for cost in known}):
            nearest = sorted({cost.threads for cost in known})
            _note(f"{part} was measured with {nearest} threads; the nearest stands for {missing}")
    return found


def shape_to_hold(model: Path | None, given: Path | None, setting: Setting) -> Shape:
    """What of a model its keys depend on; no weights are read, and nothing is measured.

    Raises:
        ProfileError: the profile is damaged.
        OSError: no model.
        ValueError: nothing of the model would be pooled.
    """
    if given is not None and model is None:
        return Profile.load(given).shape
    from fapool_plugin.integrations.huggingface.calibrate import shape_of_path

    return shape_of_path(_model_folder(model), setting.dtype)


def kept_profile(model: Path, setting: Setting, screen: Screen | None = None) -> str:
    """The file of the profile kept for this machine and model, measured quickly if there is none."""
    from fapool_plugin.integrations.huggingface.calibrate import default_path

    profile = find_profile(model, None, setting, screen)
    return str(default_path(profile.machine, profile.shape))


def measure(
    model: Path | None, setting: Setting, *, quick: bool, out: Path | None = None, screen: Screen | None = None
) -> Profile:
    """Measures a profile, with progress, and writes it to ``out`` or, for None, where plans look for it.

    Raises:
        OSError: no model, or a pool rank cannot be started.
        ValueError: nothing of the model would be pooled.
    """
    from fapool_plugin.integrations.huggingface.calibrate import calibrate_model, keep

    folder = _model_folder(model)
    with Screen() if screen is None else nullcontext(screen) as shown:
        try:
            profile = calibrate_model(
                folder,
                threads=setting.threads,
                threads_per_rank=max(1, setting.cores.per_rank),
                dtype=setting.dtype,
                quick=quick,
                progress=shown,
            )
        except RuntimeError as error:
            raise OSError(f"the profile could not be measured: {error}; see fapool doctor") from error
    if out is None:
        out = keep(profile)
    else:
        profile.save(out)
    _note(f"profile written to {out}")
    if not quick:
        _note_poor(profile)
    return profile


def _model_folder(model: Path | None) -> Path:
    """The model's folder; the demo model's for None."""
    if model is None:
        from fapool_plugin.integrations.huggingface.runs import demo_model

        with Screen() as screen:
            return demo_model(None, screen)
    if not (model / "config.json").is_file():
        what = "has no config.json" if model.is_dir() else "is no folder"
        raise FileNotFoundError(f"model {model} {what}; give a folder written by save_pretrained or hf download")
    return model


def _note_poor(profile: Profile) -> None:
    poor = [f"{part} by {fit.error:.0%}" for part, _, fit in _fits(profile) if fit.error > _POOR]
    if poor:
        _note(f"measured times differ from their fit: {', '.join(poor)}; measure again while nothing else runs")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def outlooks(profile: Profile, lengths: Sequence[int], setting: Setting) -> list[Outlook]:
    """Predicts all lengths for all numbers of pool ranks, with progress."""
    total, done, found = len(lengths) * len(setting.pool_ranks), 0, []
    known: dict[str, Any] = {"cores": setting.cores, "max_blocks": setting.max_blocks}
    with Screen() as screen:
        for ranks in setting.pool_ranks:
            choices, moved = {}, {}
            for length in lengths:
                screen("predicting", done, total)
                rows = [Row(0, length, length)]
                choices[length] = choose_prefill(profile, rows, ranks=ranks, alone=False, **known)
                moved[length] = moved_bytes(profile, rows, setting.cores, choices[length])
                done += 1
            thresholds = auto_threshold(profile, ranks=ranks, longest=max(64, *lengths), **known)
            found.append(Outlook(ranks, choices, moved, thresholds))
        screen("predicting", done, total)
    return found


def show_plan(found: Sequence[Outlook]) -> None:
    """Prints predictions as one table for each number of pool ranks, and both thresholds below it."""
    for outlook in found:
        names = ("tokens", "alone s", "pooled s", "ratio", "ceiling s", "ranks", "base", "blocks", "GB")
        table = Table(
            *names,
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"Prefill of one sequence, up to {outlook.pool_ranks} pool rank(s), predicted",
        )
        for column in table.columns:
            column.justify, column.no_wrap = "right", True
        for length, choice in outlook.choices.items():
            table.add_row(
                str(length),
                f"{choice.alone_s:.2f}",
                f"{choice.seconds:.2f}",
                f"{choice.alone_s / choice.seconds:.2f}",
                f"{choice.ceiling_s:.2f}",
                str(choice.ranks),
                f"{choice.base_share:.0%}",
                str(choice.blocks),
                f"{sum(outlook.moved[length]) / 1e9:.2f}",
            )
        table.caption = _caption(outlook)
        Console().print(table)


def _caption(outlook: Outlook) -> str:
    longest = max(outlook.choices)

    def since(length: int | None) -> str:
        return f"not up to {longest} tokens" if length is None else f"from {length} tokens on"

    return (
        f"attention > FFN + overhead: {since(outlook.thresholds.auto)}\n"
        f"pooled < alone: {since(outlook.thresholds.crossing)}\n"
        "ranks, base (the part of attention it keeps), blocks and GB moved are the best pooled way's"
    )


def plan_values(profile: Profile, found: Sequence[Outlook], setting: Setting) -> dict[str, Any]:
    """Predictions and what they were made of, as plain JSON values."""
    return {
        "profile": profile.model_dump(mode="json", include={"version", "date", "quick", "machine", "shape"}),
        "threads": setting.cores.total,
        "threads_per_rank": setting.cores.per_rank,
        "max_blocks": setting.max_blocks,
        "plans": [
            {
                "pool_ranks": outlook.pool_ranks,
                "thresholds": asdict(outlook.thresholds),
                "lengths": [
                    {
                        "tokens": length,
                        "pays": pays(choice),
                        **asdict(choice),
                        "bytes_sent": outlook.moved[length][0],
                        "bytes_received": outlook.moved[length][1],
                    }
                    for length, choice in outlook.choices.items()
                ],
            }
            for outlook in found
        ],
    }


def write_plan(path: Path, profile: Profile, found: Sequence[Outlook], setting: Setting) -> None:
    """Writes :func:`plan_values` to ``path``."""
    path.write_text(json.dumps(plan_values(profile, found, setting), indent=1) + "\n", encoding="utf-8")


def draw(path: Path, found: Sequence[Outlook]) -> None:
    """Draws times over length, and below them the ranks used and the base's share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 8), layout="constrained")
    times, ranks, shares = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    first = found[0].choices
    times.plot(list(first), [choice.alone_s for choice in first.values()], "k-", label="alone")
    for index, outlook in enumerate(found):
        color, tokens, chosen = f"C{index}", list(outlook.choices), outlook.choices.values()
        at_hand = f"{outlook.pool_ranks} pool rank" + "s" * (outlook.pool_ranks > 1)
        times.plot(tokens, [c.seconds for c in chosen], "o-", color=color, label=f"pooled, {at_hand}")
        times.plot(tokens, [c.ceiling_s for c in chosen], ":", color=color, label="its ceiling")
        ranks.plot(tokens, [c.ranks if pays(c) else 0 for c in chosen], "o-", color=color)
        shares.plot(tokens, [c.base_share if pays(c) else 1.0 for c in chosen], "o-", color=color)
        _draw_thresholds((times, ranks, shares), outlook.thresholds, color)
    times.set(xscale="log", yscale="log", ylabel="seconds", title="Prefill of one sequence, predicted")
    ranks.set(ylabel="pool ranks used")
    shares.set(ylabel="base's share", xlabel="tokens", ylim=(-0.05, 1.05))
    shares.set_xticks(list(first), labels=[str(length) for length in first], rotation=45)
    shares.minorticks_off()
    times.yaxis.set_major_formatter(ScalarFormatter())
    times.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_thresholds(axes: Sequence[Axes], thresholds: Thresholds, color: str) -> None:
    for length, style, name in (
        (thresholds.auto, "--", "attention > FFN + overhead"),
        (thresholds.crossing, "-.", "pooled < alone"),
    ):
        for index, axis in enumerate(axes):
            if length is not None:
                axis.axvline(length, color=color, linestyle=style, linewidth=1, label=None if index else name)


def show_profile(profile: Profile) -> None:
    """Prints a profile's fits as a table, with how well they fit."""
    shape, machine = profile.shape, profile.machine
    names = "part", "threads", "seconds at n", "error", "spread"
    table = Table(*names, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Measured")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for part, threads, fit in _fits(profile):
        table.add_row(part, threads, _formula(fit), f"{fit.error:.0%}", f"{fit.spread:.0%}")
    table.caption = (
        "n: tokens, keys (attention in decode), sequences (linear in decode), bytes (links); a kernel is one layer's "
        f"attention, linear is all of the model but attention. {machine.processor}, {machine.cores} cores, torch "
        f"{machine.torch}; {shape.layers} layers, {shape.heads} query and {shape.kv_heads} KV heads, {shape.dtype}. "
        f"Pool ranks start in {_seconds(profile.start_s)}, those that run are had in {_seconds(profile.activation_s)}."
    )
    Console().print(table)


def _fits(profile: Profile) -> Iterator[tuple[str, str, Fit]]:
    for attention in profile.attention:
        same = attention.dtype == profile.shape.dtype
        kind = attention.kernel if same else f"{attention.kernel}, {attention.dtype}"
        threads = str(attention.threads)
        yield f"prefill, {kind}", threads, attention.prefill
        yield f"decode, {kind}", threads, attention.decode
    for linear in profile.linear:
        yield "prefill, linear", str(linear.threads), linear.prefill
        yield "decode, linear", str(linear.threads), linear.decode
    yield "link, to a pool rank", "", profile.link.to_rank
    yield "link, back", "", profile.link.to_base


def _formula(fit: Fit) -> str:
    if fit.points:
        return " to ".join(f"{seconds:.2g} at {n:g}" for n, seconds in (fit.points[0], fit.points[-1]))
    terms = [f"{value:.2g}{unit}" for value, unit in ((fit.a, ""), (fit.b, " n"), (fit.c, " n²")) if value]
    return " + ".join(terms) or "0"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
