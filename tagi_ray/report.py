"""A run in one offline page: scores, loss curves, configuration; and the scores as plain text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import quote

from tagi_ray import recipes
from tagi_ray.config import Experiment, control_of
from tagi_ray.errors import ConfigError
from tagi_ray.json_files import write_whole
from tagi_ray.metrics import METRICS
from tagi_ray.plots import COLOURS, INK, SOFT, inline_svg, new_figure, rendered_page, scale_losses
from tagi_ray.systems import BASELINES, SYSTEM, plan_of

TITLES = {"exact_match": "Exact match", "rouge_l": "ROUGE-L"}
CURVES = ("loss", "cross_entropy", "kl", "alignment")
SHOWN_TASKS = 8

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` from what the run's folder holds; what is missing is left out."""
    scores = _read_scores(run_folder / "scores.json")
    config = run_folder / "config.yaml"
    page = rendered_page(
        "report_template.html",
        name=run_folder.resolve().name,
        config=config.read_text("utf-8") if config.is_file() else "",
        curves=_curves(read_records(run_folder / "metrics.jsonl")),
        files=_files(run_folder),
        **_score_fields(scores, _settings(config)),
    )
    target = run_folder / "report.html"
    write_whole(target, page)
    return target


def scores_table(scores: Mapping[str, Any]) -> str:
    """Plain text table of `scores.json`, with the spread over seeds where there are several."""
    head = f"{'system':<26} {'exact match':>14} {'ROUGE-L':>14} {'tasks':>6} {'instances':>10}"
    lines = [head, "-" * len(head)]
    for name, row in scores["systems"].items():
        exact, rouge = (with_spread(row, metric) for metric in METRICS)
        lines.append(
            f"{name:<26} {exact:>14} {rouge:>14} {row['n_tasks']:>6} {row['n_instances']:>10}"
        )
    return "\n".join(lines)


def with_spread(row: Mapping[str, Any], metric: str) -> str:
    """Return a metric of a system, with its standard deviation over several seeds."""
    return f"{row[metric]:.1f}{spread([seed[metric] for seed in row['seeds']])}"


def spread(values: Sequence[float]) -> str:
    """Return the standard deviation after its sign; nothing of a single value."""
    return f" ± {stdev(values):.1f}" if len(values) > 1 else ""


def read_records(path: Path) -> list[Record]:
    """Return the records of metrics.jsonl; of a step that was written again, the last one.

    A last line without its end is one that is being written, or that a crash cut: it is left out.
    """
    if not path.is_file():
        return []
    records: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            records[record["stage"], record.get("seed"), record["step"]] = record
        except (ValueError, KeyError, TypeError):
            logger.warning("%s:%d is no metrics record and is left out", path, number)
    return list(records.values())


def _read_scores(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {"systems": {}}


def _settings(config: Path) -> Experiment | None:
    """Return the run's settings, where they are there and are such that jobs take today."""
    try:
        return recipes.load(str(config)) if config.is_file() else None
    except ConfigError:
        return None


def _score_fields(scores: Mapping[str, Any], experiment: Experiment | None) -> dict[str, Any]:
    rows: dict[str, Any] = scores["systems"]
    if not rows:
        return {"systems": [], "shape": None}
    focus = SYSTEM if SYSTEM in rows else next(iter(rows))
    return {
        "systems": list(rows),
        "rows": rows,
        "shape": rows[focus],
        "about": _about(rows, experiment),
        "ablation": _ablation(rows, experiment),
        "cards": _cards(rows, focus),
        "comparison": _comparison(rows),
        "spread": any(len(row["seeds"]) > 1 for row in rows.values()),
        "metrics": list(TITLES.items()),
        "categories": {metric: _table(rows, "per_category", metric) for metric in METRICS},
        "tasks": _table(rows, "per_task", "rouge_l", focus),
        "focus": focus,
        "shown": SHOWN_TASKS,
    }


def _about(rows: Mapping[str, Any], experiment: Experiment | None) -> dict[str, str]:
    if experiment is None:
        return {name: plan.about for name, plan in BASELINES.items()}
    known = [name for name in rows if name in BASELINES or control_of(name, experiment.variants)]
    return {name: plan_of(name, experiment).about for name in known}


def _ablation(rows: Mapping[str, Any], experiment: Experiment | None) -> list[dict[str, Any]]:
    """One row for each trained variant: its scores, how far it is from the method's on the same
    seeds, and the command that makes it.
    """
    if experiment is None or SYSTEM not in rows:
        return []
    names = [name for name in rows if name in experiment.variants]
    if len(names) < 2:
        return []
    recipe = experiment.name
    if recipe not in recipes.names():
        recipe = f"{experiment.storage}/{experiment.name}/config.yaml"
    reference = {seed["seed"]: seed for seed in rows[SYSTEM]["seeds"]}
    table = []
    for name in names:
        told = {"name": name, "about": plan_of(name, experiment).about, "scores": []}
        told["command"] = f"python jobs/finetune.py {recipe} 'evaluation.systems=[{name}]'"
        for metric in METRICS:
            apart = [
                seed[metric] - reference[seed["seed"]][metric]
                for seed in rows[name]["seeds"]
                if seed["seed"] in reference
            ]
            change = f"{mean(apart):+.1f}{spread(apart)}" if apart and name != SYSTEM else ""
            told["scores"] += [with_spread(rows[name], metric), change]
        table.append(told)
    return table


def _cards(rows: Mapping[str, Any], focus: str) -> list[dict[str, str]]:
    ours = rows[focus]
    cards = [
        _card(f"{TITLES[metric]} of {focus}", f"{ours[metric]:.1f} %", "held-out tasks")
        for metric in METRICS
    ]
    for other in ("metatrain", "base", "tagi_shuffled", "teacher"):
        if other in rows and other != focus:
            gain = ours["rouge_l"] - rows[other]["rouge_l"]
            cards.append(_card(f"against {other}", f"{gain:+.1f}", "ROUGE-L points"))
    return cards


def _card(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _table(
    rows: Mapping[str, Any], group: str, metric: str, focus: str | None = None
) -> list[dict[str, Any]]:
    """Rows of a table with a column for each system; sorted by the system in focus, best first."""
    names = sorted({name for row in rows.values() for name in row[group]})
    table = [
        {"name": name, "values": [row[group].get(name, {}).get(metric) for row in rows.values()]}
        for name in names
    ]
    if focus is not None:
        best_first = {name: score[metric] for name, score in rows[focus][group].items()}
        table.sort(key=lambda row: -best_first.get(row["name"], -1.0))
    return table


def _files(run_folder: Path) -> list[str]:
    """Links, relative to the report, to what the run left."""
    names = ["scores.json", "metrics.jsonl", "config.yaml", "predictions", "adapters", "logs"]
    return [quote(name) for name in names if (run_folder / name).exists()]


def _curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One plot for each stage: the loss and its parts, for every seed."""
    stages: dict[str, dict[Any, list[Record]]] = {}
    for record in records:
        stages.setdefault(record["stage"], {}).setdefault(record.get("seed"), []).append(record)
    curves = []
    for stage, seeds in stages.items():
        for history in seeds.values():
            history.sort(key=lambda record: record["step"])
        last = next(iter(seeds.values()))[-1]
        caption = f"{stage}: {last['step']} steps"
        if len(seeds) > 1:
            caption += f", {len(seeds)} seeds"
        speeds = [r.get("tokens_per_second", 0) for history in seeds.values() for r in history]
        if any(speeds):
            caption += f", {mean(speeds):,.0f} tokens/s"
        curves.append({"svg": _loss_plot(stage, list(seeds.values())), "caption": caption})
    return curves


def _loss_plot(stage: str, histories: Sequence[Sequence[Record]]) -> Any:
    figure, axes = new_figure(4.4, 2.8)
    shown: list[float] = []
    names = [name for name in CURVES if any(_number(r, name) for h in histories for r in h)]
    for place, name in enumerate([*names, "valid_loss"]):
        for seed, history in enumerate(histories):
            points = [(r["step"], r[name]) for r in history if _number(r, name)]
            if not points:
                continue
            shown += [value for _, value in points]
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.6}
            if name == "valid_loss":
                style = {"color": INK, "linestyle": "none", "marker": "o", "markersize": 4}
            label = name.replace("_", " ") if seed == 0 else None
            axes.plot(*zip(*points, strict=True), alpha=0.85, label=label, **style)
    scale_losses(axes, shown)
    axes.set_xlabel("step", fontsize=8, color=SOFT)
    return inline_svg(figure, stage)


def _number(record: Record, name: str) -> bool:
    value = record.get(name)
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _comparison(rows: Mapping[str, Any]) -> Any:
    """Bars of exact match and ROUGE-L for each system, with a dot for each seed."""
    figure, axes = new_figure(5.8, 0.9 + 0.45 * len(rows))
    for offset, metric, colour in zip((-0.19, 0.19), METRICS, COLOURS, strict=False):
        places = [place + offset for place in range(len(rows))]
        values = [row[metric] for row in rows.values()]
        axes.barh(places, values, height=0.34, color=colour, label=TITLES[metric])
        for place, value, row in zip(places, values, rows.values(), strict=True):
            seeds = [seed[metric] for seed in row["seeds"]]
            end = max([value, *seeds]) + 1
            axes.text(end, place, f"{value:.1f}", va="center", fontsize=8, color=SOFT)
            if len(seeds) > 1:
                axes.plot(seeds, [place] * len(seeds), "o", color=INK, markersize=2.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("%", fontsize=8, color=SOFT)
    axes.grid(axis="y", visible=False)
    return inline_svg(figure, "comparison")
