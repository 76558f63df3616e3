"""Plots of a sweep: its trials over the swept fields, the best so far, what the loss depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tagi_ray.plots import CARD, COLOURS, INK, LINE, SOFT, inline_svg, new_figure, scale_losses
from tagi_ray.trials import TrialRow, best, done, loss_of, ranked

LOG_SPAN = 10.0
"""Positive numbers that differ by this factor are laid out by their logarithms."""
TICKED_VALUES = 7
LABEL_GAP = 0.055
"""Least distance of two labels, in heights of an axis."""
LABEL_LENGTH = 22
GOOD, BAD = COLOURS[:2]

Values = Mapping[str, str]
"""Swept field -> a trial's value as YAML text."""


@dataclass(frozen=True, slots=True)
class FieldAxis:
    """Where values of a field stand between 0 and 1, and the labels beside it."""

    places: Mapping[str, float]
    labels: Sequence[tuple[float, str]]


def number_of(text: str) -> float | None:
    """Return the finite number that a YAML text is, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def numbers_of(texts: Sequence[str]) -> dict[str, float] | None:
    """Return the numbers of the texts; None if one of them is no number."""
    numbers = {text: number_of(text) for text in texts}
    known = {text: number for text, number in numbers.items() if number is not None}
    return known if len(known) == len(numbers) else None


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Say whether numbers are laid out by their logarithms."""
    return min(numbers) > 0 and max(numbers) >= LOG_SPAN * min(numbers)


def axis_of(texts: Sequence[str]) -> FieldAxis:
    """Lay out the values of a field: numbers to scale, anything else at even distances."""
    numbers = numbers_of(texts)
    if numbers is None:
        kinds = sorted(set(texts))
        places = {kind: _share(at, 0, len(kinds) - 1) for at, kind in enumerate(kinds)}
        return FieldAxis(places, _apart([(places[kind], _short(kind)) for kind in kinds]))
    values = sorted(set(numbers.values()))
    scale = math.log if is_logarithmic(values) else float
    low, high = scale(values[0]), scale(values[-1])
    ticks = values if len(values) <= TICKED_VALUES else _round_ticks(values)
    return FieldAxis(
        {text: _share(scale(number), low, high) for text, number in numbers.items()},
        _apart([(_share(scale(tick), low, high), f"{tick:.6g}") for tick in ticks]),
    )


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _round_ticks(values: Sequence[float]) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = values[0], values[-1]
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    locator = LogLocator(subs=subs) if is_logarithmic(values) else MaxNLocator(6)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _apart(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out labels that would stand on others."""
    kept: list[tuple[float, str]] = []
    for place, text in labels:
        if not kept or place - kept[-1][0] >= LABEL_GAP:
            kept.append((place, text))
    return kept


def _short(text: str) -> str:
    """Return a text that fits beside an axis, without Matplotlib's formulas."""
    text = text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"
    return text.replace("$", r"\$")


def parallel_coordinates(
    rows: Sequence[TrialRow], values: Mapping[int, Values], names: Sequence[str]
) -> Any:
    """One line for each trial that ended, across an axis for each field and one for the loss.

    Colours follow the rank of the loss; the recipe's own settings are dashed, the best trial thick.
    `values` are by the trial's number.
    """
    from matplotlib.colors import LinearSegmentedColormap

    order = ranked(rows)
    colours = LinearSegmentedColormap.from_list("rank", [GOOD, "#a9a06a", BAD])
    columns = [axis_of([values[row.number][name] for row in order]) for name in names]
    losses = axis_of([repr(loss_of(row)) for row in order])
    figure, axes = new_figure(2.4 + 1.35 * len(names), 3.8)
    axes.grid(visible=False)
    first = best(rows)
    for rank, row in reversed(list(enumerate(order))):
        heights = [
            column.places[values[row.number][name]]
            for column, name in zip(columns, names, strict=True)
        ]
        heights.append(losses.places[repr(loss_of(row))])
        style: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.75 if len(order) <= 60 else 0.5}
        if row == first:
            style = {"linewidth": 3.0, "alpha": 1.0}
        style["color"] = colours(rank / max(1, len(order) - 1))
        axes.plot(range(len(heights)), heights, solid_joinstyle="round", **style)
        if row.number == 0:
            axes.plot(
                range(len(heights)), heights, color=INK, linestyle=(0, (4, 3)), linewidth=1.3,
                zorder=4,
            )  # fmt: skip
    _draw_axes(axes, [*columns, losses])
    titles = ["\n".join(_short(part) for part in name.rsplit(".", 1)) for name in names]
    axes.set_xticks(range(len(names) + 1), [*titles, "valid\nloss"])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", labelcolor=INK, labelsize=8, pad=8)
    axes.set_yticks([])
    return inline_svg(figure, "parallel")


def _draw_axes(axes: Any, columns: Sequence[FieldAxis]) -> None:
    back = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.9, "pad": 0.8}
    for at, column in enumerate(columns):
        axes.plot([at, at], [0, 1], color=LINE, linewidth=1.6, zorder=1)
        last = at == len(columns) - 1
        for place, text in column.labels:
            axes.annotate(
                text, (at, place), (5 if last else -5, 0), textcoords="offset points",
                ha="left" if last else "right", va="center", fontsize=8, color=SOFT, bbox=back,
                zorder=5,
            )  # fmt: skip


def best_so_far(rows: Sequence[TrialRow]) -> Any:
    """Losses of the trials by number, and the least among those that took all their steps."""
    figure, axes = new_figure(5.8, 2.8)
    for status, label, face in (("done", "done", GOOD), ("stopped", "stopped early", "none")):
        ended = [row for row in ranked(rows) if row.status == status]
        if ended:
            axes.plot(
                [row.number for row in ended], [loss_of(row) for row in ended], "o",
                color=GOOD, markerfacecolor=face, markersize=4.5, zorder=3, label=label,
            )  # fmt: skip
    steps: list[tuple[int, float]] = []
    for row in sorted(done(rows), key=lambda row: row.number):
        steps.append((row.number, min(loss_of(row), steps[-1][1] if steps else math.inf)))
    if steps:
        last = max(row.number for row in rows)
        numbers, lowest = zip(*steps, (last, steps[-1][1]), strict=True)
        axes.plot(
            numbers, lowest, color=BAD, linewidth=1.8, drawstyle="steps-post", label="best so far"
        )
    own = [loss_of(row) for row in ranked(rows) if row.number == 0]
    for loss in own:
        axes.axhline(
            loss, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="recipe's own settings"
        )
    scale_losses(axes, [loss_of(row) for row in ranked(rows)])
    _whole_numbers(axes)
    axes.set_xlabel("trial", fontsize=8, color=SOFT)
    axes.set_ylabel("valid loss", fontsize=8, color=SOFT)
    return inline_svg(figure, "best")


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def importance_bars(shares: Mapping[str, float]) -> Any:
    """Bars of the shares of fields in what makes a trial one of the best."""
    figure, axes = new_figure(5.8, 0.8 + 0.36 * len(shares))
    names = sorted(shares, key=lambda name: -shares[name])
    values = [100 * shares[name] for name in names]
    axes.barh(range(len(names)), values, height=0.55, color=GOOD)
    for place, value in enumerate(values):
        axes.text(value + 1, place, f"{value:.0f}", va="center", fontsize=8, color=SOFT)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("%", fontsize=8, color=SOFT)
    axes.grid(axis="y", visible=False)
    return inline_svg(figure, "importance")
