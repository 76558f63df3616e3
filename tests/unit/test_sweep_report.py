"""The page of a sweep: complete, self-contained, and safe with any text and any trials."""

import math
import random
import re

import pytest

from tagi_ray.sweep_plots import axis_of
from tagi_ray.sweep_report import importance, write_sweep_report
from tagi_ray.trials import TrialRow, ranked
from tests.unit.test_report import Checked, system

WEIGHT, RANK, RATE = "distillation.lambda_kl", "lora.rank", "finetune.optimizer.learning_rate"
DEFAULT = {WEIGHT: "5", RANK: "16", "lora.targets": "[q, v]", RATE: "1e-3"}
SPACE = "method: random\nspace: {lora.rank: [8, 16, 32]}\n"


def trial(number, loss, changes=None, status="done", size=1000, error=""):
    return TrialRow(
        number=number,
        folder=f"trial_{number}",
        status=status,
        step=400,
        valid_loss=loss,
        adapter_parameters=size,
        seconds=61.5,
        attempts=2 if error else 1,
        changes=changes or {},
        error=error,
    )


def write_sweep(folder, count=24):
    """Leave the page of a sweep with trials of every kind."""
    folder.mkdir()
    draw = random.Random(0)
    rows = [trial(0, 0.92, size=442_368)]
    for number in range(1, count):
        weight, rank = draw.choice([0.5, 2, 5, 10]), draw.choice([8, 16, 32])
        changes = {
            WEIGHT: f"{weight:g}",
            RANK: str(rank),
            "lora.targets": draw.choice(["[q, v]", "[q, k, v, o]"]),
            RATE: f"{10 ** draw.uniform(-4, -2):.3g}",
        }
        loss = 0.6 + 0.1 * abs(math.log(weight / 5)) + draw.random() / 50
        status = "stopped" if number % 4 == 3 else "done"
        rows.append(trial(number, loss, changes, status, size=27_648 * rank))
    rows.append(trial(count, None, {RANK: "64"}, "failed", error="OutOfMemoryError: no memory"))
    rows.append(trial(count + 1, float("nan"), {RANK: "32"}, "running"))
    (folder / "trials.csv").touch()
    scores = {
        "default": system(40.0, 61.5, seeds=(0, 1, 2)),
        "best": system(44.0, 64.5, seeds=(0, 1, 2)),
    }
    return page_of(folder, rows, scores)


def page_of(folder, rows, scores=None, default=None, space=SPACE):
    target = write_sweep_report(
        folder / "sweep.html",
        "my_sweep",
        rows,
        default=DEFAULT if default is None else default,
        space=space,
        test_scores=scores,
        commands=["python jobs/sweep.py demo", "python jobs/finetune.py runs/my_sweep/best.yaml"],
    )
    return target.read_text("utf-8")


def words_of(page):
    return " ".join(" ".join(Checked(page).words).split())


def importances(rows, names):
    values = {row.number: {name: row.changes.get(name, "0") for name in names} for row in rows}
    return importance(ranked(rows), values, names)


def test_page_shows_trials_plots_map_scores_and_commands(tmp_path):
    page = write_sweep(tmp_path / "my_sweep")
    text = words_of(page)
    assert "26 trials: 18 done, 6 stopped early, 1 failed, 1 running" in text
    assert page.count("<svg") == 3  # best so far, parallel coordinates, importance
    assert "OutOfMemoryError: no memory" in text
    assert "40.0 ± 1.0" in text
    assert "44.0 ± 1.0 +4.0 ± 0.0" in text  # the same seeds differ by the same
    assert "442 k" in text
    assert "python jobs/finetune.py runs/my_sweep/best.yaml" in text
    assert "space: {lora.rank: [8, 16, 32]}" in text
    tables = page[page.index("<h2>Trials") :]
    assert len(re.findall(r"<tr><td>\d+", tables)) == 12 + 26 + 1  # leaders, all, errors


def test_page_needs_no_network_and_its_links_exist(tmp_path):
    page = write_sweep(tmp_path / "my_sweep")
    urls = set(re.findall(r"https?://[^\s\"'<>)]*", page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"@import|<script|<link|<iframe|<img|url\((?!#)", page)
    assert [link for link in Checked(page).links if not link.startswith("#")] == ["trials.csv"]


def test_plots_do_not_share_ids_and_follow_the_theme(tmp_path):
    page = write_sweep(tmp_path / "my_sweep")
    named = [name for name in Checked(page).ids if re.fullmatch(r"[pm][0-9a-f]{8,}", name)]
    assert named
    assert len(named) == len(set(named))
    assert not re.search(r"#010203|#040506|#070809|#0a0b0c|#000000", page)


def test_the_same_trials_give_the_same_page(tmp_path):
    assert write_sweep(tmp_path / "one") == write_sweep(tmp_path / "two")


def test_map_has_the_mean_of_each_pair(tmp_path):
    rows = [
        trial(0, 0.5, {WEIGHT: "0.5", RANK: "8"}),
        trial(1, 0.7, {WEIGHT: "5e-1", RANK: "8"}, "stopped"),
        trial(2, 0.2, {WEIGHT: "10", RANK: "32"}),
        trial(3, None, {WEIGHT: "10", RANK: "8"}, "failed"),
        trial(4, 1e6, {WEIGHT: "0.5", RANK: "32"}),
    ]
    page = page_of(tmp_path, rows)
    table = page[page.index("lambda_kl / rank") :]
    cells = words_of("<table><thead><tr><th>" + table[: table.index("</table>")] + "</table>")
    assert cells == (
        "lambda_kl / rank 8 32 0.5 0.6000 2 trials, 1 early 1000000.0000 1 trial 10 0.2000 1 trial"
    )
    # The middle stands out from the one that diverged.
    assert re.findall(r"--v: (\S+)\"", table)[:3] == ["0.500", "0.000", "1.000"]


def test_many_values_of_a_weight_are_grouped(tmp_path):
    rows = [
        trial(at, 0.5, {WEIGHT: str(0.01 * 10 ** (at / 10)), RANK: str(8 << at % 2)})
        for at in range(31)
    ]
    text = words_of(page_of(tmp_path, rows))
    assert "0.01 to 0.0398" in text
    assert "2.51 to 10" in text


def test_published_figures_are_those_of_the_paper(tmp_path):
    page = page_of(tmp_path, [])
    text = words_of(page)
    assert "Published, Table 8" in text
    assert (
        "λ2 / λ1 0.5 2 5 10 sigmoid(L_ins) 40.1 40.9 42.5 38.7 0.2 41.3 0.5 41.6 1.0 41.2" in text
    )
    assert "rank 16 32 64 Def + 2 Pos, ROUGE-L 41.8 42.5 42.3 Def, ROUGE-L 34.8 35.3 35.4" in text
    assert "5e-5 1e-4 3e-4 1e-3 Def + 2 Pos, ROUGE-L 42.1 42.5 40.3 39.7" in text


def test_the_field_that_matters_is_the_most_important():
    draw = random.Random(1)
    rows = []
    for number in range(60):
        rate, rank = 10 ** draw.uniform(-5, -1), draw.choice(["8", "16", "32"])
        noise = str(draw.uniform(0, 1))
        loss = abs(math.log10(rate) + 3) + (rank == "8") / 5
        rows.append(trial(number, loss, {"rate": f"{rate}", "rank": rank, "noise": noise}))
    shares, remarks = importances(rows, ["rate", "rank", "noise", "fixed"])
    assert max(shares, key=lambda name: shares[name]) == "rate"
    assert shares["rate"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert remarks[0].startswith("What sets the best 6 apart from all 60 trials")
    assert remarks[1].startswith("fixed has one value only, 0")


def test_importance_says_why_it_is_absent():
    few = [trial(number, 0.1 * number, {"a": str(number)}) for number in range(9)]
    assert importances(few, ["a"]) == (
        {},
        ["9 trials have ended with a loss: shares need 10 at least."],
    )
    same = [trial(number, 0.5, {"a": str(number % 2)}) for number in range(20)]
    assert importances(same, ["a"])[1] == ["No field sets the best trials apart from all of them."]
    fixed = [trial(number, 0.1 * number) for number in range(20)]
    shares, (remark,) = importances(fixed, ["a"])
    assert not shares
    assert "one value only" in remark


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        (["1e-4", "1e-2", "0.001"], [0, 1, 0.5]),  # a hundredfold: logarithms
        (["8", "16", "32"], [0, 1 / 3, 1]),  # fourfold: as they are
        (["0", "50", "100"], [0, 0.5, 1]),  # no logarithm of 0
        (["[q, v]", "null", "true"], [0, 0.5, 1]),
        (["0.5", "null"], [0, 1]),
        (["7", "7"], [0.5, 0.5]),
    ],
)
def test_axes_are_laid_out_by_the_kind_of_their_values(texts, places):
    axis = axis_of(texts)
    assert [axis.places[text] for text in texts] == pytest.approx(places)
    assert [place for place, _ in axis.labels] == pytest.approx(sorted(set(places)))


def test_labels_of_an_axis_do_not_touch():
    labels = axis_of([str(number) for number in (1, 1.001, 1.002, 2)]).labels
    assert [text for _, text in labels] == ["1", "2"]
    assert len(axis_of([str(1.07**at) for at in range(200)]).labels) < 12


def test_sweep_without_a_trial(tmp_path):
    text = words_of(page_of(tmp_path, []))
    assert "0 trials." in text
    assert "No trial has taken all its steps yet." in text
    assert "Nothing has been scored on test tasks yet." in text


def test_sweep_without_a_finished_trial(tmp_path):
    rows = [
        trial(0, 0.5, status="running"),
        trial(1, float("nan")),
        trial(2, None, status="failed", error="lost"),
    ]
    page = page_of(tmp_path, rows)
    assert "<svg" not in page
    assert "0 trials have ended with a loss" in words_of(page)


def test_sweep_with_one_trial(tmp_path):
    page = page_of(tmp_path, [trial(0, 0.5)])
    assert "Trial 0 is the best: the recipe's own settings" in words_of(page)
    assert "+0.0 %" in page
    assert page.count("<svg") == 2


def test_sweep_of_categories_only(tmp_path):
    rows = [trial(at, 0.5 + at / 100, {"fusion.kind": "abc"[at % 3]}) for at in range(12)]
    page = page_of(tmp_path, rows, default={"fusion.kind": "none"})
    assert page.count("<svg") == 3
    assert "The map needs trials with several values of distillation.lambda_kl." in words_of(page)


def test_sweep_of_200_trials_with_a_diverged_one_stays_small(tmp_path):
    draw = random.Random(2)
    rows = [
        trial(
            number,
            1e9 if number == 7 else draw.uniform(0.4, 0.9),
            {RATE: str(10 ** draw.uniform(-5, -2)), WEIGHT: str(draw.uniform(0, 10))}
            | {f"section.field_{at}": str(draw.random()) for at in range(8)},
        )
        for number in range(200)
    ]
    page = page_of(tmp_path, rows)
    assert len(page.encode()) < 3 << 20
    Checked(page)


def test_texts_are_escaped(tmp_path):
    evil = "</svg><script>alert('$x$')</script>"
    rows = [trial(at, 0.5, {evil: f"{evil}{at}"}, error=evil) for at in range(12)]
    page = page_of(tmp_path, rows, {evil: system(1.0, 2.0)}, {evil: evil}, evil)
    assert "<script" not in page
    assert "alert('$x$')" in words_of(page)
