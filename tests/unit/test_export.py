"""Adapters written for stock PEFT, and read back with nothing taken on trust."""

import json
import math
import os
import re
import resource
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import AdapterError
from tagi_ray.export import (
    adapter_readme,
    module_hash,
    read_adapter,
    read_instruction,
    stack_adapters,
    write_adapter,
)
from tagi_ray.instruction import FusedInstruction
from tagi_ray.lora import LoraBank
from tagi_ray.sections import LoraSettings
from tests.decoders import BEGIN, random_causal_lm, random_decoder
from tests.models import VOCABULARY, fill

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
    return EncoderDecoder(tiny_t5(), LORA.targets, BASE)


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


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def fused(kind: str) -> FusedInstruction:
    """Two instructions, of which the second has two tokens."""
    states = torch.arange(2 * 4 * 16, dtype=torch.float32).view(2, 4, 16)
    if kind == "kv_prefix":
        layers = torch.arange(3 * 2 * 2 * 2 * 4 * 5).float().view(3, 2, 2, 2, 4, 5)
        return FusedInstruction(MASK, prefix=tuple((keys, values) for keys, values in layers))
    return FusedInstruction(
        MASK, states if "concat" in kind else None, states if "cross" in kind else None
    )


@pytest.mark.parametrize(
    "kind", ["concat", "cross_attention", "cross_attention+concat", "kv_prefix"]
)
def test_what_the_student_gets_of_the_instruction_travels_with_the_adapter(tmp_path, bank, kind):
    folder, given = tmp_path / "adapter", fused(kind)
    write_adapter(folder, bank, 1, lora=LORA, base_model=BASE, instruction=given, fusion=kind)
    returned = read_instruction(folder)
    assert returned.mask_KI.tolist() == [[True, True]]  # padding of the batch is left out
    for part, other in ((returned.memory_KID, given.memory_KID),
                        (returned.attended_KID, given.attended_KID)):  # fmt: skip
        assert (part is None) == (other is None)
        assert part is None or torch.equal(part, other[1:, :2])
    assert len(returned.prefix) == len(given.prefix) == (3 if kind == "kv_prefix" else 0)
    for layer, other in zip(returned.prefix, given.prefix, strict=True):
        for part, whole in zip(layer, other, strict=True):
            assert torch.equal(part, whole[1:, :, :2])
    extras = json.loads((folder / "tagi.json").read_text())
    assert extras["fusion"] == kind
    assert extras["fusion_weights_sha256"] is None
    assert extras["fusion_has_weights"] is False


@pytest.mark.parametrize(
    ("kind", "tensors", "reason"),
    [
        ("concat", {"states": (4, 16), "mask": (3,)}, r"mask \[3\] doesn't fit states \[4, 16\]"),
        ("concat", {"states": (4,), "mask": (4,)}, r"not states \[I, D\] and mask \[I\]"),
        ("concat", {"keys": (3, 2, 4, 5), "values": (3, 2, 4, 5), "mask": (4,)}, "not states"),
        ("kv_prefix", {"states": (4, 16), "mask": (4,)}, r"not keys and values \[L, H, I, E\]"),
        ("kv_prefix", {"keys": (3, 2, 4, 5), "values": (3, 2, 3, 5), "mask": (4,)}, "not keys and"),
        ("kv_prefix", {"keys": (3, 2, 4, 5), "values": (3, 2, 4, 5), "mask": (2,)}, "doesn't fit"),
        ("no_kind", {"states": (4, 16), "mask": (4,)}, "fusion='no_kind' is no kind of fusion"),
    ],
)
def test_a_damaged_instruction_is_refused(tmp_path, bank, kind, tensors, reason):
    folder = tmp_path / "adapter"
    write_adapter(
        folder, bank, 1, lora=LORA, base_model=BASE, instruction=fused("concat"), fusion=kind
    )
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(made | {"mask": made["mask"].bool()}, folder / "instruction.safetensors")
    with pytest.raises(AdapterError, match=reason):
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


# Decoder-only models.


def decoder_adapter(folder, family, targets, rank=8):
    """A written adapter of a small random model, its backbone, and the bank it is a slot of."""
    backbone = random_decoder(family, torch.float32, targets=targets)
    lora = LoraSettings(rank=rank, alpha=2.0 * rank, targets=targets)
    bank = fill(backbone.sites, 2, rank)
    write_adapter(
        folder,
        bank,
        1,
        lora=lora,
        base_model="random",
        task_type=backbone.task_type,
        transposed=backbone.sites[0].transposed,
    )
    return backbone, bank, lora


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("mistral", ("q_proj", "v_proj")),
        ("qwen2", ("q_proj", "v_proj")),
        ("qwen3", ("k_proj", "down_proj")),
        ("gpt2", ("c_attn",)),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
    ],
)
def test_stock_peft_computes_the_same_logits_of_a_decoder_only_model(tmp_path, family, targets):
    from peft import PeftModel

    backbone, bank, lora = decoder_adapter(tmp_path / "adapter", family, targets)
    returned = read_adapter(
        tmp_path / "adapter", backbone.sites, rank=8, alpha=lora.alpha, base_model="random"
    )
    assert all(torch.equal(returned.a[name][0], bank.a[name][1]) for name in bank.a)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is (family == "gpt2")

    ids = torch.randint(3, VOCABULARY, (1, 2, 9), generator=torch.Generator().manual_seed(2))
    inputs, targets_ids = ids[..., :5], ids[..., 5:]
    mask = torch.ones_like(inputs, dtype=torch.bool)
    with torch.no_grad(), backbone.bound(bank.take(torch.tensor([1]))):
        ours = backbone.logits(inputs, mask, targets_ids)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # of keys that are missing, or of an orientation
        stock = PeftModel.from_pretrained(
            random_causal_lm(family, torch.float32), tmp_path / "adapter"
        ).eval()
    begun = torch.cat([torch.full((2, 1), BEGIN), ids[0]], 1)
    with torch.no_grad():
        theirs = stock(input_ids=begun).logits[:, 5:-1]
        bare = backbone.logits(inputs, mask, targets_ids)[0]
    torch.testing.assert_close(ours[0], theirs, atol=2e-5, rtol=1e-5)
    assert (theirs - bare).abs().max() > 1e-2


VLLM_LARGEST_RANK = 64
"""Its --max-lora-rank, which is one of 8, 16, 32, 64, 128, 256, 320 and 512 (and 16 if not set)."""
VLLM_MODULES = {
    # Its own fused layers, by the names that they are packed from.
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
}  # fmt: skip


def vllm_problems(folder) -> list[str]:
    """What vLLM would refuse of the adapter of a model like Llama, by its rules.

    Those of `PEFTHelper` and `LoRAModel.from_local_checkpoint`; vLLM itself pins other versions.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    problems = [
        f"{name}={config[name]}"
        for name, allowed in {
            "bias": ("none",),
            "use_dora": (False, None),
            "use_rslora": (False, None),  # which it knows: but then the scale is another
            "modules_to_save": (None,),
            "fan_in_fan_out": (False, None),
            "peft_type": ("LORA",),
        }.items()
        if config[name] not in allowed
    ]
    rank, targets = config["r"], config["target_modules"]
    if rank > VLLM_LARGEST_RANK:
        problems.append(f"r={rank}")
    if not isinstance(targets, list) or not set(targets) <= VLLM_MODULES:
        problems.append(f"target_modules={targets}")
    if (folder / "adapter_model.bin").exists():
        problems.append("pickle")
    key = re.compile(
        r"base_model\.model\.model\.layers\.\d+\.[a-z_]+\.([a-z_]+)\.lora_([AB])\.weight"
    )
    weights = load_file(folder / "adapter_model.safetensors")
    for name, value in weights.items():
        match = key.fullmatch(name)
        if match is None or match[1] not in VLLM_MODULES:
            problems.append(name)
        elif value.shape[0 if match[2] == "A" else 1] != rank:
            problems.append(f"{name}: {list(value.shape)}")
    halves = [name.replace("lora_A", "lora_B") for name in weights if "lora_A" in name]
    if not halves or set(halves) != {name for name in weights if "lora_B" in name}:
        problems.append("factors without their other half")
    return problems


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_adapters_of_models_like_llama_follow_the_rules_of_vllm(tmp_path, family):
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    decoder_adapter(tmp_path / "adapter", family, every)
    assert vllm_problems(tmp_path / "adapter") == []


def test_the_rules_of_vllm_find_what_it_would_refuse(tmp_path):
    decoder_adapter(tmp_path / "adapter", "llama", ("q_proj", "v_proj"), rank=65)
    assert vllm_problems(tmp_path / "adapter") == ["r=65"]
    decoder_adapter(tmp_path / "gpt2", "gpt2", ("c_attn",))
    assert "fan_in_fan_out=True" in vllm_problems(tmp_path / "gpt2")


def test_an_adapter_of_the_other_orientation_is_refused(tmp_path):
    backbone, _, lora = decoder_adapter(tmp_path / "adapter", "gpt2", ("c_attn",))
    edit_config(tmp_path / "adapter", fan_in_fan_out=False)
    with pytest.raises(AdapterError, match="fan_in_fan_out is False, this run needs True"):
        read_adapter(
            tmp_path / "adapter", backbone.sites, rank=8, alpha=lora.alpha, base_model="random"
        )
