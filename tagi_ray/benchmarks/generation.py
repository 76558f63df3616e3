"""Adapters generated for a batch of tasks, beside one task at a time through stock PEFT.

Axes: K tasks, I instruction tokens, D features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tagi_ray.benchmarks.measure import Case, Row, measure
from tagi_ray.benchmarks.shapes import Shape, random_batch, random_model
from tagi_ray.benchmarks.train_step import MEDIAN

if TYPE_CHECKING:  # torch would make `--help` slow
    import torch

    from tagi_ray.hypernetwork import Hypernetwork
    from tagi_ray.instruction import EncodedInstruction
    from tagi_ray.lora import LoraBank, Site
    from tagi_ray.sections import LoraSettings

TASKS = 4
"""Tasks K of a batch."""
T5_BASE = Shape(768, 12, 4096)
"""T5-base but for its vocabulary, which no instruction pays for."""


def rows(rounds: int) -> Iterator[Row]:
    """Adapters of a batch of instructions, written as PEFT files, or one after another by PEFT."""
    from tagi_ray.lora import Site

    yield from measure(encoding_case("T5-base", T5_BASE, TASKS, MEDIAN[0]), rounds)
    t5 = [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in range(12)]
    t5 += [f"decoder.block.{layer}.layer.0.SelfAttention" for layer in range(12)]
    t5 += [f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in range(12)]
    llama = [f"model.layers.{layer}.self_attn" for layer in range(32)]
    shapes = {"T5-base": (t5, ("q", "v"), 768), "7B": (llama, ("q_proj", "v_proj"), 4096)}
    for name, (blocks, modules, width) in shapes.items():
        sites = tuple(Site(f"{block}.{last}", width, width) for block in blocks for last in modules)
        for dtype in ("float32", "bfloat16"):
            for case in adapter_cases(name, sites, TASKS, MEDIAN[0], dtype):
                yield from measure(case, rounds)


def encoding_case(name: str, shape: Shape, tasks: int, tokens: int) -> Case:
    """K instructions of I tokens through the frozen encoder, at once or one after another."""
    import torch

    model = random_model(shape)
    batch = random_batch(shape, tasks, 1, (tokens, 1, 1))
    ids, mask = batch.instruction_ids_KI, batch.instruction_mask_KI

    def encode(size: int) -> float:
        with torch.inference_mode():
            parts = zip(ids.split(size), mask.split(size), strict=True)
            return sum(float(model.backbone.encode(*part).states_KID.abs().sum()) for part in parts)

    return Case(f"{name}, instruction encoded", lambda: encode(tasks), lambda: encode(1), tasks)


def adapter_cases(
    name: str, sites: Sequence[Site], tasks: int, tokens: int, dtype: str = "float32"
) -> Iterator[Case]:
    """K encoded instructions to factors, and to files: ours in one pass, the other one by one.

    The other side writes with `save_pretrained` of a stock PEFT model that has these sites. `dtype`
    is the backbone's, in which the hypernetwork computes and the files are written.
    """
    import torch

    from tagi_ray.export import write_adapter
    from tagi_ray.instruction import EncodedInstruction
    from tagi_ray.sections import LoraSettings

    modules = tuple(sorted({site.module for site in sites}))
    lora = LoraSettings(targets=modules)
    hypernetwork, encoded = _hypernetwork(sites, lora, tasks, tokens, getattr(torch, dtype))
    peft_model = _peft_model(sites, lora).to(getattr(torch, dtype))

    def ours(folder: Path | None) -> float:
        with torch.inference_mode():
            bank = hypernetwork(encoded)
        if folder is not None:
            for slot in range(tasks):
                target = folder / "ours" / str(slot)
                write_adapter(target, bank, slot, lora=lora, base_model="random")
        return _told(bank)

    def other(folder: Path | None) -> float:
        told = 0.0
        for slot in range(tasks):
            states, mask = (part[slot : slot + 1] for part in encoded[:2])
            with torch.inference_mode():
                bank = hypernetwork(EncodedInstruction(states, mask))
            if folder is not None:
                _save(peft_model, bank, folder / "other" / str(slot))
            told += _told(bank)
        return told

    label = f"{name}, {dtype}: factors"
    yield Case(label, lambda: ours(None), lambda: other(None), tasks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield Case(f"{label} and files", lambda: ours(folder), lambda: other(folder), tasks)


def _hypernetwork(
    sites: Sequence[Site], lora: LoraSettings, tasks: int, tokens: int, dtype: torch.dtype
) -> tuple[Hypernetwork, EncodedInstruction]:
    """Return a hypernetwork whose B is not zero, and K random encoded instructions for it."""
    import torch

    from tagi_ray.hypernetwork import Hypernetwork
    from tagi_ray.instruction import EncodedInstruction
    from tagi_ray.method_sections import HypernetworkSettings

    width = sites[0].d_in
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernetwork = Hypernetwork(tuple(sites), width, HypernetworkSettings(), lora)
        for head in hypernetwork.heads_b:
            torch.nn.init.normal_(head.get_parameter("mix.weight"), std=0.1)
        states = torch.randn(tasks, tokens, width)
    mask = torch.ones(tasks, tokens, dtype=torch.bool)
    return hypernetwork.eval(), EncodedInstruction(states.to(dtype), mask)


def _peft_model(sites: Sequence[Site], lora: LoraSettings) -> Any:
    """Return a stock PEFT model with LoRA on these sites; its base has no other weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils import skip_init

    base = torch.nn.Module()
    for site in sites:
        *path, last = site.name.split(".")
        parent = base
        for name in path:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, skip_init(torch.nn.Linear, site.d_in, site.d_out, bias=False))
    config = LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets)
    )  # fmt: skip
    return get_peft_model(base, config)  # pyright: ignore[reportArgumentType]


def _save(peft_model: Any, bank: LoraBank, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    tensors = {
        f"base_model.model.{site}.lora_{factor}.weight": value[0]
        for factor, factors in (("A", bank.a), ("B", bank.b))
        for site, value in factors.items()
    }
    set_peft_model_state_dict(peft_model, tensors)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)


def _told(bank: LoraBank) -> float:
    """Return a number that depends on every slot of a bank."""
    return float(list(bank.b.values())[-1].float().abs().sum())
