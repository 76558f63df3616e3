"""The report of a run: complete, self-contained, and safe with any text in it."""

import json
import re
from html.parser import HTMLParser

import pytest

from tagi_ray.report import read_records, scores_table, write_report

VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}


class Checked(HTMLParser):
    """Collects tags, links and text, and fails on tags that don't nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.ids, self.words = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def system(exact, rouge, seeds=(0,), task="task_one"):
    return {
        "exact_match": exact,
        "rouge_l": rouge,
        "n_tasks": 2,
        "n_instances": 20,
        "per_task": {
            task: {"exact_match": exact, "rouge_l": rouge, "category": "c1", "n_instances": 10},
            "task_two": {"exact_match": 0.0, "rouge_l": 1.5, "category": "c1", "n_instances": 10},
        },
        "per_category": {
            "c1": {"exact_match": exact / 2, "rouge_l": 7.25, "n_tasks": 2, "n_instances": 20}
        },
        "seeds": [
            {"seed": seed, "exact_match": exact + shift, "rouge_l": rouge + shift}
            for shift, seed in enumerate(seeds)
        ],
    }


def record(stage, step, seed=0, **values):
    return {"stage": stage, "seed": seed, "step": step, "loss": 5.0 / step, **values}


def write_run(folder):
    """Leave what a run of two systems and two stages leaves."""
    folder.mkdir()
    scores = {
        "systems": {"base": system(3.0, 11.0), "tagi": system(40.0, 61.5, seeds=(0, 1))},
        "run": {"name": "my_run"},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    records = [
        record("finetune_tagi", step, seed, kl=0.1 * step, tokens_per_second=1000.0)
        for seed in (0, 1)
        for step in (10, 20, 30)
    ]
    records[2]["valid_loss"] = 0.7
    records += [record("teachers", 5, alignment=float("nan"))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.yaml").write_text("name: my_run\nnote: <b>&co</b>\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "my_run")


def page_of(run):
    return write_report(run).read_text("utf-8")


def test_report_shows_scores_curves_and_configuration(run):
    page = page_of(run)
    text = " ".join(" ".join(Checked(page).words).split())
    for expected in ("my_run", "40.0 %", "61.5 %", "+50.5", "task_two", "c1", "7.2", "kl"):
        assert expected in text
    assert "finetune_tagi: 30 steps, 2 seeds, 1,000 tokens/s" in text
    assert "teachers: 5 steps" in text
    assert page.count("<svg") == 3
    assert "note: &lt;b&gt;&amp;co&lt;/b&gt;" in page


def test_ablation_has_a_row_a_change_and_a_command_for_each_variant(run):
    variants = "variants: {tagi: {}, no_kl: {distillation: {lambda_kl: 0}}}"
    systems = "evaluation: {systems: [base, tagi, no_kl]}"
    (run / "config.yaml").write_text(f"name: my_run\n{variants}\n{systems}\n")
    scores = json.loads((run / "scores.json").read_text())
    scores["systems"]["no_kl"] = system(30.0, 51.5, seeds=(0, 1))
    scores["systems"]["no_kl"]["seeds"][1]["exact_match"] = 27.0
    (run / "scores.json").write_text(json.dumps(scores))
    text = " ".join(" ".join(Checked(page_of(run)).words).split())
    assert "tagi with distillation.lambda_kl=0." in text
    assert "python jobs/finetune.py runs/my_run/config.yaml 'evaluation.systems=[no_kl]'" in text
    # By seed: 30 - 40 and 27 - 41.
    assert "30.0 ± 2.1 -12.0 ± 2.8" in text


def test_report_needs_no_network(run):
    page = page_of(run)
    urls = set(re.findall(r"https?://[^\s\"'<>)]*", page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"@import|<script|<link|<iframe|url\((?!#)", page)
    links = Checked(page).links
    outside = [link for link in links if not link.startswith("#")]
    assert sorted(outside) == ["config.yaml", "metrics.jsonl", "scores.json"]
    assert all((run / link).exists() for link in outside)


def test_plots_do_not_share_ids_and_follow_the_theme(run):
    page = page_of(run)
    ids = Checked(page).ids
    named = [name for name in ids if re.fullmatch(r"[pm][0-9a-f]{8,}", name)]
    assert named
    assert len(named) == len(set(named))
    assert "currentColor" in page
    assert "var(--line)" in page
    assert not re.search(r"#010203|#040506|#070809|#000000", page)


def test_names_are_escaped(run):
    scores = json.loads((run / "scores.json").read_text())
    scores["systems"]["<script>alert(1)</script>"] = system(1.0, 2.0, task="<img src=x onerror=y>")
    (run / "scores.json").write_text(json.dumps(scores))
    (run / "metrics.jsonl").write_text(json.dumps(record("</svg><script>x", 1)) + "\n")
    page = page_of(run)
    assert "<script" not in page
    assert "<img" not in page
    Checked(page)


def test_the_same_run_gives_the_same_report(run):
    assert page_of(run) == page_of(run)
    assert not list(run.glob(".report*"))


def test_report_of_an_unfinished_run(tmp_path):
    page = page_of(tmp_path)
    assert "Nothing has been scored yet." in page
    assert "<svg" not in page


def test_many_tasks_show_best_and_worst(run):
    scores = json.loads((run / "scores.json").read_text())
    for place, row in enumerate(scores["systems"].values()):
        row["per_task"] = {
            f"task{i:02d}": {"exact_match": 0.0, "rouge_l": float(i if place else 50 - i)}
            for i in range(30)
        }
    (run / "scores.json").write_text(json.dumps(scores))
    names = re.findall(r"<td>(task\d\d)</td>", page_of(run))
    best = [f"task{i:02d}" for i in range(29, 21, -1)]
    worst = [f"task{i:02d}" for i in range(8)]
    assert names[:16] == best + worst
    assert sorted(names[16:]) == [f"task{i:02d}" for i in range(30)]


def test_a_step_logged_again_counts_once(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [record("a", 1), record("a", 2, loss=9.0), record("a", 2), record("b", 2)]
    path.write_text("\n".join(["{}", *map(json.dumps, lines), '{"stage": "a", "st']))
    records = read_records(path)
    assert [(r["stage"], r["step"], r["loss"]) for r in records] == [
        ("a", 1, 5.0),
        ("a", 2, 2.5),
        ("b", 2, 2.5),
    ]
    (warning,) = caplog.messages  # none of the last line, which is being written
    assert "metrics.jsonl:1" in warning


def test_scores_table_lines_up():
    scores = {"systems": {"base": system(3.0, 11.0), "tagi": system(40.0, 61.5, seeds=(0, 1))}}
    head, rule, base, tagi = scores_table(scores).splitlines()
    assert len({len(head), len(rule), len(base), len(tagi)}) == 1
    assert base.split() == ["base", "3.0", "11.0", "2", "20"]
    assert tagi.split() == ["tagi", "40.0", "±", "0.7", "61.5", "±", "0.7", "2", "20"]
