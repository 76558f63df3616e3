"""A slot of a bank as a PEFT directory, and back, strictly.

Stock PEFT and vLLM load the directory as it is. A run with fusion adds the encoded instruction,
which they don't know. Reading trusts nothing: no pickle, no link, and every name, shape and value
is checked before it is used.

Axes: K tasks, R rank, D features, I instruction tokens, L layers, H heads, E features of a head.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tagi_ray.adapter_files import (
    file_hash,
    read_header,
    read_json,
    read_tensors,
    refuse_pickles_and_links,
)
from tagi_ray.errors import AdapterError
from tagi_ray.instruction import FusedInstruction
from tagi_ray.lora import LoraBank, Site
from tagi_ray.method_sections import FusionSettings
from tagi_ray.sections import LoraSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INSTRUCTION_FILE = "instruction.safetensors"
EXTRAS_FILE = "tagi.json"
PEFT_PREFIX = "base_model.model."

PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "exclude_modules": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
}
"""Fields of adapter_config.json with the values under which an adapter is scaling * B A only."""


def write_adapter(
    folder: Path,
    bank: LoraBank,
    slot: int,
    *,
    lora: LoraSettings,
    base_model: str,
    task_type: str = "SEQ_2_SEQ_LM",
    transposed: bool = False,
    readme: str | None = None,
    instruction: FusedInstruction | None = None,
    fusion: str = "none",
    fusion_weights_hash: str | None = None,
) -> None:
    """Write a slot of a bank as a PEFT directory, in the bank's dtype; one of that name is replaced.

    The directory appears complete or not at all. transposed: whether the sites are Conv1D. With
    fusion, what the student gets of the slot's instruction is written too, with the hash of the
    fusion's weights (None: the fusion has none).
    Raises AdapterError for a factor that isn't finite or doesn't belong to `lora`.
    """
    tensors = _peft_tensors(bank, slot, lora, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_json(draft / CONFIG_FILE, _peft_config(lora, base_model, task_type, transposed))
        if instruction is not None:
            _write_instruction(draft, instruction, slot, fusion, fusion_weights_hash)
        if readme is not None:
            (draft / "README.md").write_text(readme, "utf-8")
        draft.chmod(0o755)
        _swap_in(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _peft_tensors(bank: LoraBank, slot: int, lora: LoraSettings, folder: Path) -> dict[str, Tensor]:
    modules = {name.rsplit(".", 1)[-1] for name in bank.a}
    if modules != set(lora.targets) or bank.rank != lora.rank:
        raise AdapterError(
            f"{folder}: a bank of rank {bank.rank} on {sorted(modules)} is not what"
            f" lora.rank={lora.rank} and lora.targets={sorted(lora.targets)} say:"
            " export it with its own run's settings"
        )
    if abs(bank.scaling - lora.alpha / lora.rank) > 1e-6 * bank.scaling:
        raise AdapterError(
            f"{folder}: the bank's scaling {bank.scaling} is not lora.alpha / lora.rank ="
            f" {lora.alpha / lora.rank}: export it with its own run's settings"
        )
    tensors: dict[str, Tensor] = {}
    for factor, factors in (("A", bank.a), ("B", bank.b)):
        for name, value in factors.items():
            kept = value[slot].detach().to("cpu").contiguous()
            low, high = torch.aminmax(kept)  # nan if there is one; a third of `isfinite`'s time
            if not (math.isfinite(low) and math.isfinite(high)):
                raise AdapterError(
                    f"{folder}: lora_{factor} of {name} is not finite, so nothing was written:"
                    " lower the learning rate of the stage that made it"
                )
            tensors[_key(name, factor)] = kept
    return tensors


def _key(site: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{site}.lora_{factor}.weight"


def _peft_config(
    lora: LoraSettings, base_model: str, task_type: str, transposed: bool
) -> dict[str, Any]:
    """What stock PEFT needs to attach the adapter to exactly the run's sites.

    A run's sites are all linears with these last parts of their names, and so PEFT reads the list.
    """
    from peft import LoraConfig  # slow import

    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        bias="none",
        task_type=task_type,  # pyright: ignore[reportArgumentType]
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }


def _write_instruction(
    folder: Path, instruction: FusedInstruction, slot: int, fusion: str, weights_hash: str | None
) -> None:
    """Write the instruction's tokens without padding: states [I, D], or keys and values [L, H, I, E]."""
    mask = instruction.mask_KI[slot].cpu().bool()
    mask = mask[: int(mask.sum())]
    tensors = {"mask": mask.clone()}
    memory, attended = instruction.memory_KID, instruction.attended_KID
    states = attended if memory is None else memory  # the encoder's, whoever reads them
    if states is not None:
        kept = states[slot, : len(mask)].detach().to("cpu", torch.float32, copy=True)
        tensors["states"] = kept.contiguous()
    if instruction.prefix:
        for name, layers in zip(
            ("keys", "values"), zip(*instruction.prefix, strict=True), strict=True
        ):
            kept = torch.stack([layer[slot, :, : len(mask)] for layer in layers])
            tensors[name] = kept.detach().cpu().contiguous()
    save_file(tensors, folder / INSTRUCTION_FILE)
    _write_json(
        folder / EXTRAS_FILE,
        {
            "version": 1,
            "fusion": fusion,
            "fusion_weights_sha256": weights_hash,
            "fusion_has_weights": weights_hash is not None,
            "instruction_sha256": file_hash(folder / INSTRUCTION_FILE),
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", "utf-8")


def _swap_in(draft: Path, folder: Path) -> None:
    """Put a complete draft in a folder's place, and keep the old version until it stands."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.replace(folder, old / "adapter")
    try:
        draft.rename(folder)
    except OSError:
        os.replace(old / "adapter", folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def module_hash(module: nn.Module | None) -> str | None:
    """SHA-256 over the names and values of a module's weights, in hex; None if it has none."""
    weights = {} if module is None else module.state_dict()
    if not weights:
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def adapter_readme(
    task: str,
    base_model: str,
    *,
    origin: str = "",
    fusion: str = "none",
    alone: Mapping[str, float] | None = None,
) -> str:
    """Text of an adapter's README.md.

    origin: a sentence on what it was made from, and what its prompt is.
    alone: the scores in percent of the adapter without fusion, where they are known.
    """
    lines = [
        f"# Adapter for {task}",
        "",
        " ".join([f"LoRA adapter in PEFT format for `{base_model}`.", origin]).strip(),
        "",
    ]
    if fusion != "none":
        lines += [
            f"The run that made it also fuses the encoded instruction (`{fusion}`), which is in",
            f"`{INSTRUCTION_FILE}`. Stock PEFT and vLLM run the adapter without fusion.",
            "",
        ]
        scores = ", ".join(f"{name} {value:.1f} %" for name, value in (alone or {}).items())
        lines.append(
            f"Scores of that mode on the held-out tasks: {scores}."
            if scores
            else "How well that mode works was not measured in this run."
        )
        lines.append("")
    return "\n".join(lines)


def read_adapter(
    folder: Path, sites: Sequence[Site], *, rank: int, alpha: float, base_model: str
) -> LoraBank:
    """Read a PEFT directory as a bank of one slot, in fp32 on the CPU.

    Raises AdapterError, before any tensor is read, unless its base model, rank, alpha, tensor
    names and shapes are exactly the run's; and for values that aren't finite.
    """
    refuse_pickles_and_links(folder)
    _check_config(folder, sites, rank=rank, alpha=alpha, base_model=base_model)
    expected: dict[str, list[int]] = {}
    for site in sites:
        expected[_key(site.name, "A")] = [rank, site.d_in]
        expected[_key(site.name, "B")] = [site.d_out, rank]
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    return LoraBank(
        {site.name: tensors[_key(site.name, "A")].float().unsqueeze(0) for site in sites},
        {site.name: tensors[_key(site.name, "B")].float().unsqueeze(0) for site in sites},
        alpha / rank,
    )


def stack_adapters(
    folders: Sequence[Path], sites: Sequence[Site], *, rank: int, alpha: float, base_model: str
) -> LoraBank:
    """Read several PEFT directories as one bank with a slot for each, in their order."""
    banks = [
        read_adapter(folder, sites, rank=rank, alpha=alpha, base_model=base_model)
        for folder in folders
    ]
    return LoraBank(
        {site.name: torch.cat([bank.a[site.name] for bank in banks]) for site in sites},
        {site.name: torch.cat([bank.b[site.name] for bank in banks]) for site in sites},
        alpha / rank,
    )


def read_instruction(folder: Path) -> FusedInstruction:
    """Read what the student gets of an adapter's instruction, as a batch of one task."""
    refuse_pickles_and_links(folder)
    path, extras = folder / INSTRUCTION_FILE, read_json(folder / EXTRAS_FILE)
    try:
        fusion = FusionSettings(kind=extras.get("fusion", "none"))
    except ValueError:
        raise AdapterError(
            f"{folder / EXTRAS_FILE}: fusion={extras['fusion']!r} is no kind of fusion: export again"
        ) from None
    shapes = read_header(path)
    names = ("keys", "values") if fusion.kind == "kv_prefix" else ("states",)
    sizes = [shapes.get(name, []) for name in names]
    if (
        set(shapes) != {"mask", *names}
        or any(size != sizes[0] for size in sizes)
        or len(sizes[0]) != (4 if "keys" in names else 2)
    ):
        wanted = "keys and values [L, H, I, E]" if "keys" in names else "states [I, D]"
        raise AdapterError(f"{path} holds {shapes}, not {wanted} and mask [I]: export again")
    if shapes["mask"] != sizes[0][-2:-1]:
        raise AdapterError(
            f"{path}: mask {shapes['mask']} doesn't fit {names[0]} {sizes[0]}: export again"
        )
    tensors = read_tensors(path, shapes)
    mask = tensors["mask"].bool()
    if not mask.any():
        raise AdapterError(f"{path}: the mask leaves no token of the instruction: export again")
    if "keys" in names:
        pairs = zip(tensors["keys"], tensors["values"], strict=True)
        prefix = tuple((keys[None], values[None]) for keys, values in pairs)
        return FusedInstruction(mask[None], prefix=prefix)
    states = tensors["states"].float()[None]
    return FusedInstruction(
        mask[None],
        states if fusion.concat else None,
        states if fusion.cross_attention else None,
    )


def _check_config(
    folder: Path, sites: Sequence[Site], *, rank: int, alpha: float, base_model: str
) -> None:
    path = folder / CONFIG_FILE
    config = read_json(path)
    targets = config.get("target_modules")
    found = {
        "peft_type": config.get("peft_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }
    wanted = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({site.module for site in sites}),
        "fan_in_fan_out": any(site.transposed for site in sites),
    }
    for field, value in wanted.items():
        if found[field] != value:
            raise AdapterError(
                f"{path}: {field} is {found[field]!r}, this run needs {value!r}:"
                " use an adapter made for this backbone and these lora settings"
            )
    for field, plain in PLAIN_LORA.items():
        if config.get(field, plain[0]) not in plain:
            raise AdapterError(
                f"{path}: {field}={config[field]!r} makes it more than a plain LoRA:"
                f" train the adapter with {field}={plain[0]!r}"
            )
