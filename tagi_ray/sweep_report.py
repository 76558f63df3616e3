"""A sweep in one offline page: its trials, what their loss depends on, and the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from tagi_ray.json_files import write_whole
from tagi_ray.metrics import METRICS
from tagi_ray.plots import rendered_page
from tagi_ray.report import TITLES, spread, with_spread
from tagi_ray.sweep_plots import (
    TICKED_VALUES,
    best_so_far,
    importance_bars,
    is_logarithmic,
    number_of,
    numbers_of,
    parallel_coordinates,
)
from tagi_ray.trials import (
    STATUS_WORDS,
    TrialRow,
    best,
    counted,
    loss_of,
    pareto,
    ranked,
    short_count,
    shown_changes,
    shown_loss,
)

WEIGHT, RANK = "distillation.lambda_kl", "lora.rank"
"""The axes of the map: λ1 and the rank of the paper."""
LEADERS = 12
TOP_TRIALS = 5
"""PED-ANOVA compares at least that many of the best trials with all: fewer give noise."""
MAP_BINS = 5
OWN, BEST = "default", "best"
TEST_TITLES = {OWN: "recipe's own settings", BEST: "best trial"}
UNKNOWN = "(unset)"

# T5-LM-base, 20k steps unless swept: Table 7 of the paper, rows of TAGI.
_TABLE_7 = {
    "rank": ("16", "32", "64"),
    "learning rate": ("5e-5", "1e-4", "3e-4", "1e-3"),
}
_TABLE_7_ROWS = {
    "rank": {
        "Def + 2 Pos, ROUGE-L": (41.8, 42.5, 42.3),
        "Def, ROUGE-L": (34.8, 35.3, 35.4),
        "P3 MTest11, accuracy": (44.8, 45.6, 45.5),
    },
    "learning rate": {
        "Def + 2 Pos, ROUGE-L": (42.1, 42.5, 40.3, 39.7),
        "Def, ROUGE-L": (34.3, 35.3, 33.5, 31.8),
        "P3 MTest11, accuracy": (44.0, 45.6, 44.0, 41.6),
    },
}
# T5-LM-base, Def + 2 Pos: Table 8 of the paper, ROUGE-L over λ1 and λ2.
_TABLE_8 = {
    "sigmoid(L_ins)": {"0.5": 40.1, "2": 40.9, "5": 42.5, "10": 38.7},
    "0.2": {"5": 41.3},
    "0.5": {"5": 41.6},
    "1.0": {"5": 41.2},
}

Values = dict[str, str]


def write_sweep_report(
    target: Path,
    name: str,
    rows: Sequence[TrialRow],
    *,
    default: Mapping[str, str],
    space: str,
    test_scores: Mapping[str, Mapping[str, Any]] | None,
    commands: Sequence[str],
) -> Path:
    """Write the page of a sweep, also while it runs.

    `default` are the recipe's own values of the swept fields as YAML text, `space` is the text of
    the space's file. `test_scores` are systems of scores.json under "default" and "best", `commands`
    those that repeat the sweep and use its result. Links lead to what lies beside the page.
    """
    names = list(dict.fromkeys([*default, *(field for row in rows for field in row.changes)]))
    values = {row.number: _values(row, names, default) for row in rows}
    ended = ranked(rows)
    shares, remarks = importance(ended, values, names)
    page = rendered_page(
        "sweep_template.html",
        name=name,
        counted=counted(rows),
        cards=_cards(rows),
        best=_told(best(rows)),
        scores=_test_rows(test_scores or {}),
        metrics=[TITLES[metric] for metric in METRICS],
        progress=best_so_far(rows) if ended else "",
        parallel=parallel_coordinates(rows, values, names) if ended and names else "",
        parallel_width=7 * (len(names) + 1),
        importance=importance_bars(shares) if shares else "",
        remarks=remarks,
        map=_loss_map(ended, values, names),
        published=_published(),
        names=names,
        leaders=LEADERS,
        trials=_table(rows, values, names),
        failed=[_told(row) for row in rows if row.error],
        space=space,
        commands=list(commands),
        files=_files(target.parent),
    )
    write_whole(target, page)
    return target


def importance(
    ended: Sequence[TrialRow], values: Mapping[int, Values], names: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Return the share of each field in what sets the best trials apart, and what to know of it.

    PED-ANOVA (arXiv 2304.10255) over the trials that ended, early or not, best first: fields in which the best
    tenth, and at least `TOP_TRIALS`, is distributed unlike all of them.
    """
    kinds = {name: {values[row.number][name] for row in ended} for name in names}
    remarks = [
        f"{name} has one value only, {next(iter(kinds[name]))}: its share can't be told."
        for name in names
        if len(kinds[name]) == 1
    ]
    varied = [name for name in names if len(kinds[name]) > 1]
    if len(ended) < 2 * TOP_TRIALS:
        count = f"{len(ended)} trial{'s have' if len(ended) != 1 else ' has'}"
        return {}, [f"{count} ended with a loss: shares need {2 * TOP_TRIALS} at least.", *remarks]
    if not varied:
        return {}, remarks
    top = _top_count(ended)
    # Where the best trials are as good as the worst, there is nothing to tell apart.
    tied = loss_of(ended[top - 1]) == loss_of(ended[-1])
    found = {} if tied else _ped_anova(ended, values, varied)
    total = sum(found.values())
    if total <= 0:
        return {}, ["No field sets the best trials apart from all of them.", *remarks]
    remarks.insert(0, f"What sets the best {top} apart from all {len(ended)} trials that ended.")
    return {name: found[name] / total for name in varied}, remarks


def _ped_anova(
    ended: Sequence[TrialRow], values: Mapping[int, Values], names: Sequence[str]
) -> dict[str, float]:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator

    spaces: dict[str, Any] = {}
    points: list[dict[str, Any]] = [
        {name: values[row.number][name] for name in names} for row in ended
    ]
    for name in names:
        texts = list(dict.fromkeys(point[name] for point in points))
        numbers = numbers_of(texts)
        # A few numbers are choices: a density over a line would smear them.
        if numbers is None or len(texts) <= TICKED_VALUES:
            spaces[name] = CategoricalDistribution(texts)
            continue
        low, high = min(numbers.values()), max(numbers.values())
        spaces[name] = FloatDistribution(low, high, log=is_logarithmic([low, high]))
        for point in points:
            point[name] = numbers[point[name]]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study would announce itself
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    for row, point in zip(ended, points, strict=True):
        study.add_trial(
            optuna.trial.create_trial(params=point, distributions=spaces, value=loss_of(row))
        )
    # Halves keep rounding from taking one trial more.
    quantile = (_top_count(ended) - 0.5) / len(ended)
    return PedAnovaImportanceEvaluator(target_quantile=quantile).evaluate(study, params=list(names))


def _top_count(ended: Sequence[TrialRow]) -> int:
    return max(TOP_TRIALS, math.ceil(len(ended) / 10))


def _values(row: TrialRow, names: Sequence[str], default: Mapping[str, str]) -> Values:
    return {name: _plain(row.changes.get(name, default.get(name, UNKNOWN))) for name in names}


def _plain(text: str) -> str:
    """Return numbers in one spelling, of six digits at most: 5 for 5.0, 0.0001 for 1e-4."""
    number = number_of(text)
    if number is None:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.6g}"


def _told(row: TrialRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "number": row.number,
        "changes": shown_changes(row),
        "attempts": row.attempts,
        "error": row.error,
    }


def _cards(rows: Sequence[TrialRow]) -> list[dict[str, str]]:
    cards = []
    first = best(rows)
    own = next((row for row in ranked(rows) if row.number == 0), None)
    if first is not None:
        cards.append(_card("Best valid loss", shown_loss(first), f"trial {first.number}"))
    if own is not None:
        cards.append(_card("Recipe's own settings", shown_loss(own), "valid loss"))
    if first is not None and own is not None and loss_of(own) > 0:
        change = 100 * (loss_of(first) / loss_of(own) - 1)
        cards.append(_card("Difference", f"{change + 0.0:+.1f} %", "of the recipe's valid loss"))
    cards.append(_card("All trials together", _duration(sum(row.seconds for row in rows)), "time"))
    return cards


def _card(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _test_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scored system, with its difference to the recipe's on the same seeds."""
    own = {seed["seed"]: seed for seed in scores.get(OWN, {}).get("seeds", [])}
    rows = []
    for key, row in scores.items():
        cells = []
        for metric in METRICS:
            pairs = [
                (seed[metric], own[seed["seed"]][metric])
                for seed in row["seeds"]
                if key != OWN and seed["seed"] in own
            ]
            apart = [ours - theirs for ours, theirs in pairs]
            cells += [
                with_spread(row, metric),
                f"{mean(apart):+.1f}{spread(apart)}" if apart else "",
            ]
        title = TEST_TITLES.get(key, key)
        rows.append({"name": title, "cells": cells, "seeds": len(row["seeds"])})
    return rows


def _loss_map(
    ended: Sequence[TrialRow], values: Mapping[int, Values], names: Sequence[str]
) -> dict[str, Any]:
    """Mean valid loss of the trials of each pair of λ1 and rank, or the reason for its absence."""
    for field in (WEIGHT, RANK):
        if field not in names or len({values[row.number][field] for row in ended}) < 2:
            return {"absent": f"The map needs trials with several values of {field}."}
    downs = _groups([values[row.number][WEIGHT] for row in ended])
    acrosses = _groups([values[row.number][RANK] for row in ended])
    cells: dict[tuple[str, str], list[TrialRow]] = {}
    for row in ended:
        place = downs[values[row.number][WEIGHT]], acrosses[values[row.number][RANK]]
        cells.setdefault(place, []).append(row)
    means = {place: mean(loss_of(row) for row in group) for place, group in cells.items()}
    # Shaded by rank: one pair that diverged would leave all others the same shade.
    levels = sorted(set(means.values()))
    head, side = list(dict.fromkeys(acrosses.values())), list(dict.fromkeys(downs.values()))

    def cell(place: tuple[str, str]) -> dict[str, str] | None:
        if place not in cells:
            return None
        early = sum(row.status == "stopped" for row in cells[place])
        note = f"{len(cells[place])} trial{'s' * (len(cells[place]) > 1)}"
        note += f", {early} early" if early else ""
        heat = 1 - _share(levels.index(means[place]), range(len(levels)))
        return _cell(f"{means[place]:.4f}", heat, note)

    table = [{"name": down, "cells": [cell((down, across)) for across in head]} for down in side]
    return {"absent": "", "head": head, "rows": table}


def _groups(texts: Sequence[str]) -> dict[str, str]:
    """Return for each value, in their order, the label of the row or column it belongs to."""
    numbers = numbers_of(texts)
    if numbers is None:
        return {text: text for text in sorted(set(texts))}
    order = sorted(numbers, key=lambda text: numbers[text])
    if len(order) <= TICKED_VALUES:
        return {text: text for text in order}
    scale, back = (math.log, math.exp) if is_logarithmic(list(numbers.values())) else (float, float)
    low, high = scale(numbers[order[0]]), scale(numbers[order[-1]])
    width = (high - low) / MAP_BINS
    labels = [
        f"{back(low + bin * width):.3g} to {back(low + (bin + 1) * width):.3g}"
        for bin in range(MAP_BINS)
    ]
    places = {text: int((scale(numbers[text]) - low) / width) for text in order}
    return {text: labels[min(place, MAP_BINS - 1)] for text, place in places.items()}


def _cell(value: str, heat: float, note: str = "") -> dict[str, str]:
    return {"value": value, "heat": f"{heat:.3f}", "note": note}


def _share(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


def _published() -> list[dict[str, Any]]:
    """Tables of the paper's figures, shaded from the least to the greatest that can be compared."""
    head = tuple(_TABLE_8["sigmoid(L_ins)"])
    figures = [value for row in _TABLE_8.values() for value in row.values()]
    rows = [
        {"name": weight, "cells": [_figure(row.get(key), figures) for key in head]}
        for weight, row in _TABLE_8.items()
    ]
    title = "Table 8: λ1 (columns) and λ2 (rows), Def + 2 Pos, ROUGE-L"
    tables: list[dict[str, Any]] = [
        {"title": title, "head": head, "corner": "λ2 / λ1", "rows": rows}
    ]
    for field, head in _TABLE_7.items():
        rows = [
            {"name": measure, "cells": [_figure(value, figures) for value in figures]}
            for measure, figures in _TABLE_7_ROWS[field].items()
        ]
        tables.append({"title": f"Table 7: {field}", "head": head, "corner": field, "rows": rows})
    return tables


def _figure(value: float | None, figures: Sequence[float]) -> dict[str, str] | None:
    return None if value is None else _cell(f"{value:.1f}", _share(value, figures))


def _table(
    rows: Sequence[TrialRow], values: Mapping[int, Values], names: Sequence[str]
) -> list[dict[str, Any]]:
    """All trials: those that ended, best first, then the others."""
    first = ranked(rows)
    shown = {row.number for row in first}
    front = {row.number for row in pareto(rows)}
    order = [*first, *(row for row in rows if row.number not in shown)]
    return [
        {
            "number": row.number,
            "own": row.number == 0,
            "front": row.number in front,
            "status": STATUS_WORDS.get(row.status, row.status),
            "loss": shown_loss(row),
            "step": row.step,
            "parameters": short_count(row.adapter_parameters),
            "time": _duration(row.seconds),
            "cells": [values[row.number][name] for name in names],
        }
        for row in order
    ]


def _files(folder: Path) -> list[str]:
    """Links, relative to the page, to what the sweep left beside it."""
    names = ["trials.csv", "best.yaml", "space.yaml", "trials", "logs"]
    return [quote(name) for name in names if (folder / name).exists()]
