"""Adapters written for stock PEFT, and read back with nothing taken on trust."""

import json
import math
import os
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray.backbone import Backbone, EncodedInstruction
from tagi_ray.errors import AdapterError
from tagi_ray.export import (
    adapter_readme,
    module_hash,
    read_adapter,
    read_instruction,
    stack_adapters,
    write_adapter,
)
from tagi_ray.lora import LoraBank
from tagi_ray.sections import LoraSettings

LORA = LoraSettings(rank=3, alpha=6.0, targets=("q", "v"))
BASE = "some/base"


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=4,
        num_heads=3,
        num_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def backbone():
    return Backbone(tiny_t5(), LORA.targets, BASE)


@pytest.fixture
def bank(backbone):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return 0.5 * torch.randn(*shape, generator=generator)

    return LoraBank(
        {site.name: draw(2, LORA.rank, site.d_in) for site in backbone.sites},
        {site.name: draw(2, site.d_out, LORA.rank) for site in backbone.sites},
        LORA.alpha / LORA.rank,
    )


@pytest.fixture
def adapter(tmp_path, bank):
    write_adapter(tmp_path / "adapter", bank, 1, lora=LORA, base_model=BASE)
    return tmp_path / "adapter"


def read(folder, backbone, **changes):
    wanted = {"rank": LORA.rank, "alpha": LORA.alpha, "base_model": BASE, **changes}
    return read_adapter(folder, backbone.sites, **wanted)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def first_key(weights):
    return next(iter(sorted(weights)))


def test_a_slot_comes_back_unchanged(adapter, bank, backbone):
    returned = read(adapter, backbone)
    assert returned.slots == 1
    assert returned.scaling == bank.scaling
    for name in bank.a:
        assert torch.equal(returned.a[name][0], bank.a[name][1])
        assert torch.equal(returned.b[name][0], bank.b[name][1])


def test_stock_peft_computes_the_same_logits(adapter, bank, backbone):
    from peft import PeftModel

    inputs = torch.randint(2, 64, (1, 3, 7), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(2, 64, (1, 3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(inputs, dtype=torch.bool)
    with torch.no_grad(), backbone.bound(bank.take(torch.tensor([1]))):
        ours = backbone.logits(inputs, mask, targets)
    with torch.no_grad():
        bare = backbone.logits(inputs, mask, targets)

    stock = PeftModel.from_pretrained(tiny_t5(), adapter).eval()
    loaded = {
        name.replace(".default", ""): value
        for name, value in stock.state_dict().items()
        if "lora_" in name
    }
    written = load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    with torch.no_grad():
        theirs = stock(input_ids=inputs[0], attention_mask=mask[0].long(), labels=targets[0]).logits
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)
    assert (ours - bare).abs().max() > 1e-2


def test_configuration_is_plain_lora(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["target_modules"] == ["q", "v"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["inference_mode"] is True


def test_writing_again_replaces_and_leaves_nothing_beside(adapter, bank, backbone):
    write_adapter(adapter, bank, 0, lora=LORA, base_model=BASE, readme="hello")
    name = backbone.sites[0].name
    assert torch.equal(read(adapter, backbone).a[name][0], bank.a[name][0])
    assert (adapter / "README.md").read_text() == "hello"
    assert os.listdir(adapter.parent) == ["adapter"]


def test_a_failed_write_leaves_the_old_adapter(adapter, bank, backbone, monkeypatch):
    monkeypatch.setattr("tagi_ray.export._write_json", lambda path, value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(adapter, bank, 0, lora=LORA, base_model=BASE)
    name = backbone.sites[0].name
    assert torch.equal(read(adapter, backbone).a[name][0], bank.a[name][1])
    assert os.listdir(adapter.parent) == ["adapter"]


def test_non_finite_factors_are_never_written(tmp_path, bank):
    name = next(iter(bank.b))
    bank.b[name][1, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match=f"lora_B of {name}.*not finite"):
        write_adapter(tmp_path / "adapter", bank, 1, lora=LORA, base_model=BASE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(rank=4, alpha=8.0, targets=("q", "v")),
        LoraSettings(rank=3, alpha=6.0, targets=("q", "k", "v")),
        LoraSettings(rank=3, alpha=12.0, targets=("q", "v")),
    ],
)
def test_a_bank_of_other_settings_is_not_written(tmp_path, bank, lora):
    with pytest.raises(AdapterError, match="own run's settings"):
        write_adapter(tmp_path / "adapter", bank, 0, lora=lora, base_model=BASE)


def test_stacked_adapters_keep_their_order(tmp_path, bank, backbone):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, slot in zip(folders, (1, 0), strict=True):
        write_adapter(folder, bank, slot, lora=LORA, base_model=BASE)
    stacked = stack_adapters(
        folders, backbone.sites, rank=LORA.rank, alpha=LORA.alpha, base_model=BASE
    )
    expected = bank.take(torch.tensor([1, 0]))
    assert all(torch.equal(stacked.a[name], expected.a[name]) for name in bank.a)
    assert all(torch.equal(stacked.b[name], expected.b[name]) for name in bank.b)


def test_a_pickle_is_refused_and_never_run(adapter, backbone):
    (adapter / "adapter_model.safetensors").unlink()
    canary = adapter / "canary"
    (adapter / "adapter_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle.*safe_serialization"):
        read(adapter, backbone)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model": "other"}, "base_model_name_or_path is 'some/base', this run needs 'other'"),
        ({"rank": 4}, "r is 3, this run needs 4"),
        ({"alpha": 1.0}, "lora_alpha is 6, this run needs 1.0"),
    ],
)
def test_an_adapter_of_another_run_is_refused(adapter, backbone, changes, reason):
    with pytest.raises(AdapterError, match=reason):
        read(adapter, backbone, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("target_modules", ["q"]),
        ("target_modules", "all-linear"),
        ("bias", "all"),
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q": 8}),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_anything_but_the_plain_lora_is_refused(adapter, backbone, field, value):
    edit_config(adapter, **{field: value})
    with pytest.raises(AdapterError, match=field):
        read(adapter, backbone)


def rename(weights):
    weights["base_model.model.other.lora_A.weight"] = weights.pop(first_key(weights))


def drop(weights):
    weights.pop(first_key(weights))


def add(weights):
    weights["extra"] = torch.zeros(1)


def reshape(weights):
    weights[first_key(weights)] = torch.zeros(1_000, 16)


def transpose(weights):
    weights[first_key(weights)] = weights[first_key(weights)].T.contiguous()


def poison(weights):
    weights[first_key(weights)][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename, "is missing; base_model.model.other.lora_A.weight does not belong"),
        (drop, "is missing"),
        (add, "extra does not belong there"),
        (reshape, r"has shape \[1000, 16\], not \[3, 16\]"),
        (transpose, r"has shape \[16, 3\], not \[3, 16\]"),
        (poison, "not finite"),
    ],
)
def test_wrong_tensors_are_refused(adapter, backbone, change, reason):
    edit_weights(adapter, change)
    with pytest.raises(AdapterError, match=reason):
        read(adapter, backbone)


def test_shapes_are_checked_before_tensors_are_read(adapter, backbone, monkeypatch):
    edit_weights(adapter, reshape)
    monkeypatch.setattr("torch.isfinite", lambda tensor: pytest.fail("a tensor was read"))
    with pytest.raises(AdapterError, match="has shape"):
        read(adapter, backbone)


def test_links_are_refused(adapter, backbone, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(adapter)
    with pytest.raises(AdapterError, match="not a link"):
        read(link, backbone)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="is a link"):
        read(adapter, backbone)


def safetensors(shape: list[int], data: bytes = b"", length: int | None = None) -> bytes:
    """A file whose header says what it likes of one tensor, or of its own length."""
    end = 4 * math.prod(shape)
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors([10**6, 10**9]),
        safetensors([4], b"too few bytes"),
        safetensors([1], b"four", length=10**9),
        safetensors([1], b"four", length=2**63),
        struct.pack("<Q", 5) + b"{bad}",
        b"\x00" * 7,
    ],
    ids=["bomb", "truncated", "overlong header", "absurd header", "no JSON", "no header"],
)
def test_a_lying_header_is_refused_before_anything_is_allocated(adapter, backbone, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors can't be read \("):
        read(adapter, backbone)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    ("rank", "reason"), [(10**6, "has shape"), (10**9, "can't be read|has shape")]
)
def test_a_huge_rank_is_refused_from_the_header(adapter, backbone, rank, reason):
    """Sparse files whose headers are true: only these may be read."""
    path = adapter / "adapter_model.safetensors"
    header, end = {}, 0
    for name, value in load_file(path).items():
        shape = [rank if size == LORA.rank else size for size in value.shape]
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=reason):
        read(adapter, backbone)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("rank", [10**6, -1, 0, "3", None, True, 3.5])
def test_a_rank_that_is_not_the_runs_is_refused(adapter, backbone, rank):
    edit_config(adapter, r=rank)
    with pytest.raises(AdapterError, match=rf"r is {rank!r}, this run needs 3: use an adapter"):
        read(adapter, backbone)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "adapter_config.json is not a JSON object: export the adapter again"),
        ('"LORA"', "adapter_config.json is not a JSON object: export the adapter again"),
        ("[" * 100_000, "adapter_config.json is not valid JSON"),
        (b"\xff\xfe", "adapter_config.json is not valid JSON"),
        (" " * (2 << 20), "adapter_config.json has more than 1048576 bytes"),
    ],
    ids=["list", "text", "deep", "not UTF-8", "large"],
)
def test_a_configuration_that_is_none_is_refused(adapter, backbone, content, reason):
    path = adapter / "adapter_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match=reason):
        read(adapter, backbone)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_damaged_files_are_adapter_errors(adapter, backbone, name, damage):
    path = adapter / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    with pytest.raises(AdapterError, match=name):
        read(adapter, backbone)


def encoded():
    states = torch.arange(2 * 4 * 16, dtype=torch.float32).view(2, 4, 16)
    return EncodedInstruction(states, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool())


def test_the_encoded_instruction_travels_with_the_adapter(tmp_path, bank):
    folder = tmp_path / "adapter"
    write_adapter(
        folder, bank, 1, lora=LORA, base_model=BASE, instruction=encoded(), fusion="concat"
    )
    returned = read_instruction(folder)
    assert torch.equal(returned.states_KID, encoded().states_KID[1:])
    assert torch.equal(returned.mask_KI, encoded().mask_KI[1:])
    extras = json.loads((folder / "tagi.json").read_text())
    assert extras["fusion"] == "concat"
    assert extras["fusion_weights_sha256"] is None
    assert extras["fusion_has_weights"] is False


def test_a_damaged_instruction_is_refused(tmp_path, bank):
    folder = tmp_path / "adapter"
    write_adapter(
        folder, bank, 1, lora=LORA, base_model=BASE, instruction=encoded(), fusion="concat"
    )
    save_file(
        {"states": torch.zeros(4, 16), "mask": torch.zeros(3, dtype=torch.bool)},
        folder / "instruction.safetensors",
    )
    with pytest.raises(AdapterError, match=r"mask \[3\] doesn't fit states \[4, 16\]"):
        read_instruction(folder)


def test_module_hash_names_the_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    before = module_hash(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert before is not None
    assert module_hash(layer) != before
    assert module_hash(torch.nn.Identity()) is None
    assert module_hash(None) is None


def test_readme_says_what_stock_tools_leave_out():
    text = adapter_readme("t", BASE, fusion="concat", alone={"ROUGE-L": 12.345})
    assert "without fusion" in text
    assert "ROUGE-L 12.3 %" in text
    assert "not measured" in adapter_readme("t", BASE, fusion="concat")
    plain = adapter_readme("t", BASE, origin="Trained on instances.")
    assert "fusion" not in plain
    assert "Trained on instances." in plain


def test_banks_of_half_precision_are_written_in_it_and_lose_nothing(tmp_path, bank):
    half = bank.to("cpu", torch.bfloat16)
    write_adapter(tmp_path / "adapter", half, 0, lora=LORA, base_model=BASE)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    for site in half.a:
        assert torch.equal(weights[f"base_model.model.{site}.lora_A.weight"], half.a[site][0])
