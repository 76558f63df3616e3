"""What each system is given, that batching changes nothing, and what is written."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray.config import Experiment
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import CheckpointError, DataError
from tagi_ray.evaluate import (
    Scorer,
    load_weights,
    over_seeds,
    plan_jobs,
    write_predictions,
    write_scores,
)
from tagi_ray.export import write_adapter
from tagi_ray.fusion import Fusion
from tagi_ray.hypernetwork import Hypernetwork
from tagi_ray.lora import LoraBank
from tagi_ray.method_sections import FusionSettings, HypernetworkSettings, VariantSettings
from tagi_ray.metrics import Prediction, aggregate
from tagi_ray.model import TagiModel
from tagi_ray.sections import BankSettings, DataSettings, EvaluationSettings, LoraSettings
from tagi_ray.shards import ShardTask
from tagi_ray.systems import instruction_sources, plan_of
from tagi_ray.tasks import Instance, PositiveExample, Task
from tagi_ray.vocabulary import TextTokenizer

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
LORA = LoraSettings(rank=4, alpha=8.0)
EXPERIMENT = Experiment(
    name="tiny",
    data=DataSettings(max_target_tokens=5, oracle_instances=1),
    lora=LORA,
    hypernetwork=HypernetworkSettings(width=16, layers=1, heads=2, capacity=4),
    evaluation=EvaluationSettings(tasks_per_batch=2, instances_per_batch=2),
    oracle=BankSettings(prompt="input"),
    variants={
        "tagi": VariantSettings(),
        "tuned": VariantSettings(
            hypernetwork={"generator": "shared"}, distillation={"student_prompt": "full"}
        ),
    },
)


def shard_task(name: str, category: str, definition: str, count: int) -> ShardTask:
    place = WORDS.index(name)
    examples = tuple(PositiveExample(WORDS[place - 1 - i], WORDS[place - 3 - i]) for i in range(2))
    inputs = [" ".join(WORDS[(place + i + j) % 10] for j in range(i % 3 + 1)) for i in range(count)]
    instances = tuple(Instance(f"{name}-{i}", text, ("ant", text)) for i, text in enumerate(inputs))
    return ShardTask(Task(name, category, (definition, "another wording"), examples), instances)


TASKS = [
    shard_task("ant", "one", "fox fox jay", 5),
    shard_task("bee", "one", "gnu", 1),
    shard_task("cat", "two", "hen ibis dog dog dog", 4),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    prompt = "Definition : Now complete the following example - Input Output . Positive Example 1 2"
    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS, *prompt.split()]
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.save(str(folder / "tokenizer.json"))
    special = {"pad": 0, "eos": 1, "start": 0, "begin": None, "ends_texts": True}
    (folder / "special.json").write_text(json.dumps(special))
    return TextTokenizer(folder)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tokenizer.size,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=1,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config)
    for name, parameter in t5.named_parameters():
        if "Attention" in name:
            torch.nn.init.normal_(parameter, std=0.6)  # so that the words it reads matter to it
    backbone = EncoderDecoder(t5, LORA.targets, "tiny")
    hypernetwork = Hypernetwork(backbone.sites, 16, EXPERIMENT.hypernetwork, LORA)
    for name, parameter in hypernetwork.named_parameters():
        if "heads" in name:
            torch.nn.init.normal_(parameter)  # at its start it would generate nothing
    return TagiModel(backbone, hypernetwork, Fusion(FusionSettings(), backbone))


def predict(model, tokenizer, system, tasks=TASKS, folder=Path(), **changes):
    experiment = EXPERIMENT.model_copy(update=changes)
    plan = plan_of(system, EXPERIMENT) if isinstance(system, str) else system
    sources = instruction_sources([task.task for task in tasks], plan.instruction)
    return Scorer(model, tokenizer, experiment, folder).predict(plan, tasks, sources)


def texts(predictions):
    return [one.prediction for one in predictions]


def with_definition(task: ShardTask, other: Task) -> ShardTask:
    return replace(task, task=replace(task.task, definitions=other.definitions))


def test_a_variant_and_its_controls_are_systems_that_say_how_they_differ():
    plan = plan_of("tuned", EXPERIMENT)
    assert (plan.weights, plan.prompt, plan.bank, plan.fusion) == (
        "tuned",
        "full",
        "generated",
        True,
    )
    assert "hypernetwork.generator=shared" in plan.about
    assert plan_of("tuned_shuffled", EXPERIMENT).instruction == "shuffled"
    assert plan_of("tuned_empty", EXPERIMENT).instruction == "empty"
    assert plan_of("tuned_no_bank", EXPERIMENT).bank == "none"
    assert not plan_of("tuned_no_fusion", EXPERIMENT).fusion
    assert plan_of("tagi", EXPERIMENT).prompt == "input"


@pytest.mark.parametrize("system", ["base", "metatrain", "tagi", "tagi_no_bank"])
def test_batching_changes_nothing_and_filled_rows_are_dropped(model, tokenizer, system):
    single = EvaluationSettings(tasks_per_batch=1, instances_per_batch=1)
    wide = EvaluationSettings(tasks_per_batch=8, instances_per_batch=3)
    expected = predict(model, tokenizer, system, evaluation=single)
    assert [one.id for one in expected] == [i.id for task in TASKS for i in task.instances]
    assert predict(model, tokenizer, system, evaluation=wide) == expected
    assert predict(model, tokenizer, system) == expected


def test_an_instruction_is_encoded_and_its_adapter_generated_once(model, tokenizer, monkeypatch):
    encoded = []
    encode = model.backbone.encode

    def counting(ids_KI, mask_KI):
        encoded.append(len(ids_KI))
        return encode(ids_KI, mask_KI)

    monkeypatch.setattr(model.backbone, "encode", counting)
    predict(model, tokenizer, "tagi")
    assert encoded == [2, 1]
    assert model.generated_tasks == len(TASKS)


def test_predictions_are_scored_against_all_references(model, tokenizer):
    answers = predict(model, tokenizer, "tagi")
    task = replace(
        TASKS[0],
        instances=tuple(
            replace(instance, outputs=("nothing", answer.prediction))
            for instance, answer in zip(TASKS[0].instances, answers[:5], strict=True)
        ),
    )
    scored = predict(model, tokenizer, "tagi", [task])
    assert [one.exact_match for one in scored] == [1.0] * 5
    assert scored[0].references == ("nothing", answers[0].prediction)
    assert (scored[0].task, scored[0].category) == ("ant", "one")


def test_base_reads_the_input_alone(model, tokenizer):
    changed = [with_definition(task, TASKS[-1].task) for task in TASKS]
    expected = texts(predict(model, tokenizer, "base"))
    assert texts(predict(model, tokenizer, "base", changed)) == expected
    assert texts(predict(model, tokenizer, "metatrain")) != expected
    assert model.generated_tasks == 0


def test_the_first_paraphrase_is_given(model, tokenizer):
    changed = [
        replace(t, task=replace(t.task, definitions=(t.task.definitions[0], "ibis"))) for t in TASKS
    ]
    for system in ("tagi", "metatrain"):
        expected = texts(predict(model, tokenizer, system))
        assert texts(predict(model, tokenizer, system, changed)) == expected


@pytest.mark.parametrize(
    ("system", "reads"), [("metatrain", True), ("tagi", True), ("base", False)]
)
def test_positive_examples_are_part_of_the_instruction(model, tokenizer, system, reads):
    data = EXPERIMENT.data.model_copy(update={"prompt": "def_2pos"})
    plain = texts(predict(model, tokenizer, system))
    shown = texts(predict(model, tokenizer, system, data=data))
    assert (plain != shown) is reads


def test_shuffled_gives_another_tasks_instruction(model, tokenizer):
    sources = instruction_sources([task.task for task in TASKS], "shuffled")
    swapped = [with_definition(task, sources[task.task.name]) for task in TASKS]
    shuffled = predict(model, tokenizer, "tagi_shuffled")
    assert texts(shuffled) == texts(predict(model, tokenizer, "tagi", swapped))
    assert texts(shuffled) != texts(predict(model, tokenizer, "tagi"))


def test_empty_gives_no_words(model, tokenizer):
    wordless = Task("none", "none", ("",))
    changed = [with_definition(task, wordless) for task in TASKS]
    empty = texts(predict(model, tokenizer, "tagi_empty"))
    assert empty == texts(predict(model, tokenizer, "tagi", changed))
    assert empty != texts(predict(model, tokenizer, "tagi"))


def test_no_bank_keeps_the_fusion(model, tokenizer, monkeypatch):
    without = texts(predict(model, tokenizer, "tagi_no_bank"))
    assert without != texts(predict(model, tokenizer, "tagi"))
    assert without != texts(predict(model, tokenizer, "base"))
    generate = model.hypernetwork.forward
    monkeypatch.setattr(model.hypernetwork, "forward", lambda encoded: generate(encoded).zeroed())
    assert without == texts(predict(model, tokenizer, "tagi"))


def test_adapter_only_keeps_the_adapter(model, tokenizer):
    alone = texts(predict(model, tokenizer, "tagi_no_fusion"))
    model.fusion = None
    assert alone == texts(predict(model, tokenizer, "tagi"))
    assert alone != texts(predict(model, tokenizer, "base"))


def test_teacher_answers_with_each_tasks_own_adapter(model, tokenizer, tmp_path):
    generator = torch.Generator().manual_seed(5)

    def random_bank():
        shapes = {site.name: site for site in model.backbone.sites}
        return LoraBank(
            {n: torch.randn(1, 4, s.d_in, generator=generator) for n, s in shapes.items()},
            {n: torch.randn(1, s.d_out, 4, generator=generator) for n, s in shapes.items()},
            2.0,
        )

    banks = {task.task.name: random_bank() for task in TASKS}
    for name, bank in banks.items():
        write_adapter(tmp_path / name, bank, 0, lora=LORA, base_model="tiny")
    taught = predict(model, tokenizer, "teacher", folder=tmp_path)
    for task in TASKS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "generate_bank", lambda _, bank=banks[task.task.name]: bank)
            expected = predict(model, tokenizer, "tagi_no_fusion", [task])
        assert [one for one in taught if one.task == task.task.name] == expected
    assert texts(taught) != texts(predict(model, tokenizer, "base"))


categories = st.lists(st.sampled_from("abc"), min_size=2, max_size=12)


@given(categories)
def test_shuffling_is_a_derangement(drawn):
    tasks = [Task(f"task{i}", category, (f"text {i}",)) for i, category in enumerate(drawn)]
    sources = instruction_sources(tasks, "shuffled")
    assert sorted(other.name for other in sources.values()) == sorted(sources)
    assert all(sources[task.name].name != task.name for task in tasks)
    assert instruction_sources(tasks[::-1], "shuffled") == sources


@given(st.integers(2, 6))
def test_shuffling_crosses_categories_of_equal_size(size):
    tasks = [Task(f"task{i}", "ab"[i % 2], (f"text {i}",)) for i in range(2 * size)]
    sources = instruction_sources(tasks, "shuffled")
    assert all(sources[task.name].category != task.category for task in tasks)


def test_shuffling_avoids_the_same_wording():
    tasks = [Task(f"task{i}", "a", (f"text {i % 2}",)) for i in range(4)]
    sources = instruction_sources(tasks, "shuffled")
    assert all(sources[task.name].definitions != task.definitions for task in tasks)


def test_one_task_cannot_be_shuffled():
    with pytest.raises(DataError, match="two held-out tasks"):
        instruction_sources([TASKS[0].task], "shuffled")


def test_jobs_cover_every_seed_once():
    experiment = EXPERIMENT.model_copy(
        update={
            "seeds": (3, 4),
            "evaluation": EvaluationSettings(
                systems=("tagi", "base", "metatrain", "tagi_shuffled"), tasks_per_batch=2
            ),
        }
    )
    paths = {s: {"tagi": Path(f"t{s}"), "metatrain": Path(f"m{s}")} for s in (3, 4)}
    jobs = list(plan_jobs(experiment, TASKS, paths))
    covered = [(job.seed, job.system, job.weights) for job in jobs for _ in job.tasks]
    assert len(covered) == 3 * 7
    assert set(covered) == {
        (3, "base", None),
        *((s, "metatrain", Path(f"m{s}")) for s in (3, 4)),
        *((s, name, Path(f"t{s}")) for s in (3, 4) for name in ("tagi", "tagi_shuffled")),
    }
    loads = [job.weights for job in jobs]
    assert sum(a != b for a, b in pairwise(loads)) == 4


def test_untrained_weights_are_named():
    experiment = EXPERIMENT.model_copy(update={"evaluation": EvaluationSettings(systems=("tagi",))})
    with pytest.raises(CheckpointError, match=r"'tagi', but tagi of seed 0 is not trained"):
        list(plan_jobs(experiment, TASKS, {}))


def test_weights_are_loaded_exactly(model, tmp_path):
    path = tmp_path / "state.safetensors"
    wanted = {name: torch.randn_like(p) for name, p in model.trainable().items()}
    state = {f"model.{name}": value for name, value in wanted.items()}
    save_file({**state, "exp_avg.other": torch.zeros(1)}, path)
    load_weights(model, path)
    assert all(torch.equal(p, wanted[name]) for name, p in model.trainable().items())

    key = next(iter(state))
    save_file({name: value for name, value in state.items() if name != key}, path)
    with pytest.raises(CheckpointError, match="differ in 1 weights"):
        load_weights(model, path)
    save_file(state | {key: torch.zeros(1, 2, 3)}, path)
    with pytest.raises(CheckpointError, match=r"shape \[1, 2, 3\]"):
        load_weights(model, path)


def test_scores_are_means_over_seeds():
    def scores(first, second):
        rows = [("t1", "c1", first), ("t2", "c1", second)]
        return aggregate([Prediction(t, c, "i", "x", "y", ("z",), s, s / 2) for t, c, s in rows])

    combined = over_seeds({3: scores(1.0, 0.0), 7: scores(1.0, 1.0)})
    assert combined["exact_match"] == pytest.approx(75.0)
    assert combined["per_task"]["t2"]["exact_match"] == pytest.approx(50.0)
    assert combined["per_category"]["c1"]["rouge_l"] == pytest.approx(37.5)
    assert (combined["n_tasks"], combined["n_instances"]) == (2, 2)
    assert combined["seeds"] == [
        {"seed": 3, "exact_match": 50.0, "rouge_l": 25.0},
        {"seed": 7, "exact_match": 100.0, "rouge_l": 50.0},
    ]


def test_predictions_are_written_in_full(model, tokenizer, tmp_path):
    predictions = predict(model, tokenizer, "base")
    write_predictions(tmp_path / "0" / "base.parquet", predictions)
    rows = pq.read_table(tmp_path / "0" / "base.parquet").to_pylist()
    returned = [Prediction(**{**row, "references": tuple(row["references"])}) for row in rows]
    assert returned == predictions
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["base.parquet"]


def test_scores_of_other_systems_stay_while_they_are_of_the_same_run(tmp_path):
    run = {"seeds": [0], "data_fingerprint": "a"}
    write_scores(tmp_path, {"tagi": 1, "base": 1}, run)
    merged = write_scores(tmp_path, {"tagi": 2, "metatrain": 2}, run)
    assert merged == json.loads((tmp_path / "scores.json").read_text())
    assert list(merged["systems"].items()) == [("tagi", 2), ("base", 1), ("metatrain", 2)]
    other = write_scores(tmp_path, {"tagi": 3}, {**run, "data_fingerprint": "b"})
    assert other["systems"] == {"tagi": 3}


def test_teachers_of_categories_are_found_by_their_folders(model, tokenizer, tmp_path):
    generator = torch.Generator().manual_seed(5)
    sites = model.backbone.sites
    bank = LoraBank(
        {s.name: torch.randn(1, 4, s.d_in, generator=generator) for s in sites},
        {s.name: torch.randn(1, s.d_out, 4, generator=generator) for s in sites},
        2.0,
    )
    write_adapter(tmp_path / "Question_Answering", bank, 0, lora=LORA, base_model="tiny")
    task = shard_task("ant", "Question Answering", "fox fox jay", 2)
    oracle = BankSettings(prompt="input", per="category")
    assert predict(model, tokenizer, "teacher", [task], folder=tmp_path, oracle=oracle)
