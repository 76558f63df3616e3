"""Every generator of adapters: what it makes, from what, at which size, and at step 0."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tagi_ray.adapter_generator import AdapterGenerator
from tagi_ray.errors import ConfigError
from tagi_ray.hypernetwork import build_hypernetwork
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import LoraBank, Site, common_start
from tagi_ray.method_sections import HypernetworkSettings
from tagi_ray.sections import LoraSettings

WIDTH, CAPACITY = 12, 5
LORA = LoraSettings(rank=3, alpha=6.0, targets=("q", "v"), start_seed=3)
T5 = tuple(
    Site(f"{stack}.block.{block}.layer.{layer}.{name}.{target}", 12, 10)
    for stack, attentions in (
        ("encoder", [(0, "SelfAttention")]),
        ("decoder", [(0, "SelfAttention"), (1, "EncDecAttention")]),
    )
    for block in range(2)
    for layer, name in attentions
    for target in ("q", "v")
)
"""Inner width other than the model width."""
GROUPED = tuple(
    Site(f"model.layers.{block}.{name}", d_in, d_out)
    for block in range(3)
    for name, d_in, d_out in (
        ("self_attn.q_proj", 12, 16),
        ("self_attn.v_proj", 12, 4),
        ("self_attn.o_proj", 16, 12),
        ("mlp.down_proj", 20, 12),
    )
)
"""Grouped queries: V is narrower than Q; and no two targets have one shape."""
SITES = {"t5": T5, "grouped": GROUPED}
TEXT_TO_LORA = ("t2l_l", "t2l_m", "t2l_s")
GENERATORS = ("attention", "mlp", *TEXT_TO_LORA)

each_generator = pytest.mark.parametrize("generator", GENERATORS)
each_backbone = pytest.mark.parametrize("backbone", SITES)


def built(
    generator: Any,
    sites: tuple[Site, ...] = T5,
    capacity: int = CAPACITY,
    lora: LoraSettings = LORA,
    started: bool = False,
) -> Any:
    """A small generator; unless it is only started, all that starts at zero has other values."""
    settings = HypernetworkSettings(
        generator=generator, width=16, layers=1, heads=2, capacity=capacity
    )
    torch.manual_seed(0)
    made = build_hypernetwork(sites, WIDTH, settings, lora)
    assert made is not None
    for parameter in made.parameters():
        if not started and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return made


def instructions(lengths: tuple[int, ...], longest: int = 7, seed: int = 0) -> EncodedInstruction:
    """Random states; those of padding are random too, and larger."""
    generator = torch.Generator().manual_seed(seed)
    mask_KI = torch.arange(longest) < torch.tensor(lengths)[:, None]
    states_KID = torch.randn(len(lengths), longest, WIDTH, generator=generator)
    return EncodedInstruction(torch.where(mask_KI[..., None], states_KID, 9 * states_KID), mask_KI)


def updates(bank: LoraBank) -> list[Tensor]:
    return [bank.b[name] @ bank.a[name] for name in bank.a]


def test_no_generator_is_none():
    assert build_hypernetwork(T5, WIDTH, HypernetworkSettings(generator="none"), LORA) is None


@each_backbone
@each_generator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_backbone_with_the_common_start(generator, backbone, dtype):
    sites = SITES[backbone]
    encoded = instructions((4, 7))
    bank = built(generator, sites, started=True)(
        encoded._replace(states_KID=encoded.states_KID.to(dtype))
    )
    start = common_start(sites, 3, 3)
    assert bank.scaling == 2.0
    assert list(bank.a) == list(bank.b) == [site.name for site in sites]
    for site in sites:
        a, b = bank.a[site.name], bank.b[site.name]
        assert a.shape == (2, 3, site.d_in)
        assert b.shape == (2, site.d_out, 3)
        assert torch.equal(a, start[site.name].to(dtype).expand(2, -1, -1))
        assert not b.any()


@each_backbone
@each_generator
def test_gradients_reach_every_weight_within_two_steps_of_the_start(generator, backbone):
    network = built(generator, SITES[backbone], started=True)
    encoded = instructions((7, 5, 3, 7, 2, 6))
    drawn = torch.Generator().manual_seed(1)
    aims = [torch.randn(update.shape, generator=drawn) for update in updates(network(encoded))]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        made = updates(network(encoded))
        loss = sum((u - aim).square().mean() for u, aim in zip(made, aims, strict=True))
        loss.backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_perceptrons_units_start_as_alive_in_the_last_layer_as_in_the_first():
    """Its sites' numbers, 2l and 2l + 1, do not decide alone which units answer."""
    sites = tuple(
        Site(f"block.{block}.attention.{target}", 12, 12) for block in range(40) for target in "qv"
    )
    network = built("mlp", sites, capacity=256, started=True)
    (hidden_LMKC,) = network.hidden(instructions((7, 5, 3, 6, 2, 4)))
    alive_L = (hidden_LMKC > 0).flatten(1, 2).any(1).float().mean(1)
    assert alive_L.min() > 0.85
    assert not torch.allclose(hidden_LMKC[:, 0], hidden_LMKC[:, 1], atol=0.1)


@each_backbone
@each_generator
def test_an_adapter_does_not_depend_on_its_batch_mates_or_their_padding(generator, backbone):
    network, lengths = built(generator, SITES[backbone]), (4, 7, 2)
    states_KID, mask_KI, _ = instructions(lengths)
    together = network(EncodedInstruction(states_KID, mask_KI))
    for task, length in enumerate(lengths):
        part = slice(task, task + 1)
        alone = network(EncodedInstruction(states_KID[part, :length], mask_KI[part, :length]))
        for name in together.a:
            for many, one in ((together.a, alone.a), (together.b, alone.b)):
                torch.testing.assert_close(many[name][part], one[name], atol=1e-5, rtol=1e-5)


@each_backbone
@each_generator
def test_every_site_and_every_task_gets_an_adapter_of_its_own(generator, backbone):
    sites = SITES[backbone]
    bank, start = built(generator, sites)(instructions((4, 7))), common_start(sites, 3, 3)
    moved = {name: bank.a[name] - start[name] for name in bank.a}
    for factors in (moved, bank.b):
        adapters = [(name, slot) for name in factors for slot in range(2)]
        for first in adapters:
            for second in adapters:
                left, right = factors[first[0]][first[1]], factors[second[0]][second[1]]
                if first < second and left.shape == right.shape:
                    assert not torch.allclose(left, right, atol=1e-3), (first, second)


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.of[str(func)] += 1
        return func(*args, **(kwargs or {}))


@each_generator
def test_more_tasks_take_the_same_number_of_operations(generator):
    network = built(generator)
    counted = []
    for tasks in (2, 9):
        encoded = instructions((3, 5) * 4 + (4,))
        states_KID, mask_KI = encoded.states_KID[:tasks], encoded.mask_KI[:tasks]
        with Calls() as calls:
            bank = network(EncodedInstruction(states_KID, mask_KI))
            sum(factor.sum() for factor in (*bank.a.values(), *bank.b.values())).backward()
        assert bank.slots == tasks
        counted.append(calls.of)
        network.zero_grad()
    assert counted[0] == counted[1]


@pytest.mark.parametrize("generator", ["mlp", *TEXT_TO_LORA])
def test_more_layers_take_no_more_products(generator):
    counted = []
    for layers in (2, 6):
        sites = tuple(
            Site(f"block.{block}.attention.{target}", 12, 10)
            for block in range(layers)
            for target in "qv"
        )
        with Calls() as calls:
            built(generator, sites)(instructions((3, 5)))
        counted.append({op: count for op, count in calls.of.items() if "mm" in op})
    assert counted[0]
    assert counted[0] == counted[1]


@each_backbone
@each_generator
def test_above_a_bfloat16_backbone_the_factors_are_bfloat16_and_the_weights_are_not(
    generator, backbone
):
    network = built(generator, SITES[backbone])
    encoded = instructions((4, 7))
    half = encoded._replace(states_KID=encoded.states_KID.bfloat16())
    exact = network(encoded._replace(states_KID=half.states_KID.float()))
    bank = network(half)
    for name in bank.a:
        for rough, fine in ((bank.a[name], exact.a[name]), (bank.b[name], exact.b[name])):
            assert rough.dtype == torch.bfloat16
            torch.testing.assert_close(rough.float(), fine, atol=0.03, rtol=0.03)
    sum(update.float().square().sum() for update in updates(bank)).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())


@each_backbone
@each_generator
def test_it_runs_without_data_on_the_meta_device(generator, backbone):
    meta = torch.device("meta")
    with meta:
        network = built_on_meta(generator, SITES[backbone])
        states_KID = torch.empty(2, 7, WIDTH)
        mask_KI = torch.empty(2, 7, dtype=torch.bool)
    bank = network(EncodedInstruction(states_KID, mask_KI))
    sum(update.sum() for update in updates(bank)).backward()
    assert all(factor.device == meta for factor in (*bank.a.values(), *bank.b.values()))
    assert all(p.grad is not None for p in network.parameters())


def built_on_meta(generator: Any, sites: tuple[Site, ...]) -> AdapterGenerator:
    settings = HypernetworkSettings(generator=generator, width=16, heads=2, capacity=4)
    made = build_hypernetwork(sites, WIDTH, settings, LORA)
    assert made is not None
    return made.to("meta")


@pytest.mark.parametrize("capacity", [1, 3])
def test_attentions_capacity_is_the_number_of_basis_rows_of_a_site(capacity):
    start = common_start(T5, 3, 3)
    bank = built("attention", capacity=capacity)(instructions((7, 5, 3, 2) * 5))
    for site in T5:
        for rows in (bank.a[site.name] - start[site.name], bank.b[site.name].transpose(1, 2)):
            assert torch.linalg.matrix_rank(rows.flatten(0, 1), rtol=1e-4) == capacity


def test_the_perceptrons_capacity_bounds_what_tells_its_adapters_apart():
    bank = built("mlp", capacity=4)(instructions((7, 5, 3, 2) * 5))
    layers = [(bank.a[q.name], bank.a[v.name]) for q, v in zip(T5[::2], T5[1::2], strict=True)]
    ranks = []
    for q, v in layers:
        # Without the start, which differs between the two.
        apart = torch.cat([(x - x[:1]).flatten(1) for x in (q, v)])
        ranks.append(int(torch.linalg.matrix_rank(apart, rtol=1e-4)))
    assert max(ranks) == 4


def test_mlp_is_equation_2_layer_by_layer_with_its_gradients():
    """LoRA_l^t = MLP_l(mean of the instruction's states; idx), in float64 from plain linears."""
    network = built("mlp", GROUPED).double()
    states_KID, mask_KI, _ = instructions((4, 7, 1))
    states_KID = states_KID.double()
    layers = {
        f"model.layers.{block}.{name}": (stack, block, d_in, d_out)
        for stack, (name, d_in, d_out) in enumerate([("self_attn", 16, 16), ("mlp", 20, 12)])
        for block in range(3)
    }
    perceptrons = {}
    for name, (stack, block, _, _) in layers.items():
        units, head_a, head_b = network.units[stack], network.heads_a[stack], network.heads_b[stack]
        first = nn.Linear(WIDTH + 1, CAPACITY, dtype=torch.float64)
        first.weight.data, first.bias.data = units.weight_LCD.data[block], units.bias_LC.data[block]
        last = nn.Linear(CAPACITY, 1, dtype=torch.float64)
        last.weight.data = torch.cat([head.weight_LDC.data[block] for head in (head_a, head_b)])
        last.bias.data = torch.cat([head.bias_LD.data[block] for head in (head_a, head_b)])
        perceptrons[name] = nn.Sequential(first, nn.ReLU(), last)

    bank, start = network(EncodedInstruction(states_KID, mask_KI)), common_start(GROUPED, 3, 3)
    loss, loss_by_hand = torch.zeros((), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for task, length in enumerate((4, 7, 1)):
        mean_D = sum(states_KID[task, token] for token in range(length)) / length
        for idx, site in enumerate(GROUPED):
            layer = site.name.rpartition(".")[0]
            _, _, d_in, d_out = layers[layer]
            output = perceptrons[layer](torch.cat([mean_D, torch.tensor([float(idx)])]))
            a = output[: 3 * d_in].view(3, d_in)[:, : site.d_in] + start[site.name]
            b = output[3 * d_in :].view(3, d_out)[:, : site.d_out].T
            torch.testing.assert_close(bank.a[site.name][task], a)
            torch.testing.assert_close(bank.b[site.name][task], b)
            loss = loss + (bank.b[site.name][task] @ bank.a[site.name][task]).sin().sum()
            loss_by_hand = loss_by_hand + (b @ a).sin().sum()
    loss.backward()
    loss_by_hand.backward()
    for name, (stack, block, d_in, _) in layers.items():
        first, _, last = perceptrons[name]
        units, head_a, head_b = network.units[stack], network.heads_a[stack], network.heads_b[stack]
        cut = 3 * d_in
        for ours, by_hand in (
            (units.weight_LCD, first.weight.grad), (units.bias_LC, first.bias.grad),
            (head_a.weight_LDC, last.weight.grad[:cut]), (head_a.bias_LD, last.bias.grad[:cut]),
            (head_b.weight_LDC, last.weight.grad[cut:]), (head_b.bias_LD, last.bias.grad[cut:]),
        ):  # fmt: skip
            torch.testing.assert_close(ours.grad[block], by_hand)
            assert by_hand.any()


def test_q_and_v_of_one_attention_are_told_apart_by_consecutive_numbers():
    network = built("mlp")
    numbers_LM = network.units[0].numbers_LM
    assert torch.equal(
        numbers_LM, torch.stack([2 * torch.arange(6.0), 2 * torch.arange(6.0) + 1], 1)
    )


@each_backbone
@pytest.mark.parametrize("generator", TEXT_TO_LORA)
def test_text_to_lora_equals_its_loop_over_tasks_sites_factors_and_rows(generator, backbone):
    sites, size = SITES[backbone], generator[-1]
    network = built(generator, sites).double()
    states_KID, mask_KI, _ = instructions((4, 7))
    states_KID = states_KID.double()
    bank, start = network(EncodedInstruction(states_KID, mask_KI)), common_start(sites, 3, 3)
    # Types in the order of first appearance: a name without the number of its block.
    types = list(dict.fromkeys(_without_block(site.name)[1] for site in sites))
    for task, length in enumerate((4, 7)):
        task_W = network.task_encoder(states_KID[task, :length].mean(0))
        for site in sites:
            block, name = _without_block(site.name)
            place = torch.tensor(types.index(name))
            layer_W = network.layer_embedding(torch.tensor(block))
            joined_W = torch.cat([task_W, layer_W, network.type_embedding(place)])
            mixed_W = network.mlp1(network.mixer(joined_W))
            linear = network.heads[int(place)].linear
            made = []
            for factor, features in enumerate((site.d_in, site.d_out)):
                one_W = mixed_W
                if size != "l":
                    one_W = one_W + network.factor_embedding(2 * place + factor)
                one_W = network.mlp2(one_W)
                rows = []
                for row in range(3):
                    row_W = one_W
                    if size == "s":
                        row_W = row_W + network.mlp2(network.row_embedding(torch.tensor(row)))
                    wide = max(site.d_in, site.d_out)
                    first = {
                        "l": factor * 3 * site.d_in + row * features, "m": row * wide, "s": 0,
                    }[size]  # fmt: skip
                    part = slice(first, first + features)
                    rows.append(
                        functional.linear(
                            network.mlp3(row_W), linear.weight[part], linear.bias[part]
                        )
                    )
                made.append(torch.stack(rows))
            a, b = made[0] + start[site.name], made[1].T
            torch.testing.assert_close(bank.a[site.name][task], a)
            torch.testing.assert_close(bank.b[site.name][task], b)


def _without_block(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return int(parts.pop(2)), ".".join(parts)


def mistral_7b() -> tuple[Site, ...]:
    return tuple(
        Site(f"model.layers.{block}.self_attn.{name}", 4096, d_out)
        for block in range(32)
        for name, d_out in (("q_proj", 4096), ("v_proj", 1024))
    )


def t5_base() -> tuple[Site, ...]:
    attentions = [("encoder", "0.SelfAttention"), ("decoder", "0.SelfAttention"),
                  ("decoder", "1.EncDecAttention")]  # fmt: skip
    return tuple(
        Site(f"{stack}.block.{block}.layer.{name}.{target}", 768, 768)
        for stack, name in attentions
        for block in range(12)
        for target in "qv"
    )


def parameters(
    generator: Any, sites: tuple[Site, ...], features: int, rank: int, **settings: int
) -> int:
    made = HypernetworkSettings(generator=generator, **settings)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        network = build_hypernetwork(sites, features, made, LoraSettings(rank=rank))
    assert network is not None
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("generator", "latent", "millions"),
    [
        ("t2l_l", 128, 55.42), ("t2l_m", 128, 34.41), ("t2l_s", 128, 5.00),
        ("t2l_l", 512, 230.0), ("t2l_m", 512, 146.1), ("t2l_s", 512, 28.6),
    ],
)  # fmt: skip
def test_text_to_lora_has_the_published_sizes_on_mistral_7b(generator, latent, millions):
    """q and v at rank 8, a task embedding of 1024 features; to the last digit that is published."""
    counted = parameters(generator, mistral_7b(), 1024, 8, width=latent) / 1e6
    assert round(counted, 2 if latent == 128 else 1) == millions


@pytest.mark.parametrize(
    ("generator", "settings", "features", "millions"),
    [
        ("t2l_l", {"width": 128}, 1024, "152"), ("t2l_m", {"width": 128}, 1024, "76.4"),
        ("t2l_s", {"width": 128}, 1024, "3.2"), ("mlp", {"capacity": 8}, 768, "16.1"),
    ],
)  # fmt: skip
def test_sizes_on_t5_base_at_rank_32(generator, settings, features, millions):
    """Six module types, 36 attentions; counted before from the formulas of both papers."""
    counted = parameters(generator, t5_base(), features, 32, **settings) / 1e6
    digits = len(millions.partition(".")[2])
    assert f"{counted:.{digits}f}" == millions


def test_only_the_small_head_does_not_grow_with_the_rank():
    counted = {
        (generator, rank): parameters(generator, mistral_7b(), 1024, rank, width=128)
        for generator in TEXT_TO_LORA
        for rank in (8, 16)
    }
    assert counted["t2l_s", 16] - counted["t2l_s", 8] == 8 * 128  # the rows' embeddings
    assert counted["t2l_l", 16] - counted["t2l_l", 8] == 8 * 513 * (4 * 4096 - 3072)
    assert counted["t2l_m", 16] - counted["t2l_m", 8] == 8 * 513 * 2 * 4096


def test_a_latent_size_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"hypernetwork\.width=4 .*t2l_m: set at least 8"):
        build_hypernetwork(T5, WIDTH, HypernetworkSettings(generator="t2l_m", width=4), LORA)


def test_a_shared_adapter_is_one_for_all_tasks_and_learns_from_each():
    generator: Any = built("shared")
    bank = generator(EncodedInstruction(torch.randn(3, 4, WIDTH), torch.ones(3, 4).bool()))
    for site in T5:
        assert bank.a[site.name].shape == (3, 3, site.d_in)
        assert bank.b[site.name].shape == (3, site.d_out, 3)
        assert torch.equal(bank.a[site.name][0], bank.a[site.name][2])
    weights = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    sum((weights * factor).sum() for factor in (*bank.a.values(), *bank.b.values())).backward()
    assert all((p.grad == 111.0).all() for p in generator.parameters())
    started = built("shared", started=True)(
        EncodedInstruction(torch.randn(1, 4, WIDTH), torch.ones(1, 4).bool())
    )
    start = common_start(T5, LORA.rank, LORA.start_seed)
    assert all(torch.equal(started.a[site.name][0], start[site.name]) for site in T5)
    assert not any(factor.any() for factor in started.b.values())
