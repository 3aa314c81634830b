"""Step times against numbers worked out by hand, on a machine with round figures (µs throughout)."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.hardware import PRESETS, WeightRates
from cluster.planning.collectives import Group
from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.footprint import LayerSizes, stage_weights, stages
from cluster.planning.memory import kv_bytes_per_token, rank_bytes, rank_parameters
from cluster.planning.official import find_config, official_configs
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError, ParallelLayoutError
from qwen3_dist.layout import Layout, valid_layouts
from qwen3_dist.parallel.expert_exchange import CPU_ALL_TO_ALL_FROM, capacity, prefers_all_to_all
from qwen3_dist.quantization_config import read_quantization
from tests.cluster.machines import DENSE, MOE, PLAIN, cluster

ONE_DECODE = StepShape(1, 10, 0, 0, 1)
FP8_OF_OUTPUTS = find_config("Qwen3-8B-FP8-dynamic")[1].quantization
OFFICIAL = Path(__file__).parents[3] / "shared/data/configs/qwen3.json"


def parts(model: CostModel, shape: StepShape) -> dict[str, float]:
    return {name: pytest.approx(1e6 * seconds) for name, seconds in model.step_parts(shape).items()}


def test_a_decode_step_reads_all_weights_and_its_keys_and_values_once() -> None:
    assert parts(CostModel(DENSE, Layout(), PLAIN), ONE_DECODE) == {
        # layers x (q and back: 2 x 4 heads, k and v: 2 x 2 groups) x 50 x 100 weights x 2 bytes
        "attention projections": 2 * 120.0,
        # layers x 10 tokens x (K and V) x 2 groups x 50 x 2 bytes
        "attention of decodes": 2 * 4.0,
        # layers x (10 x 100 + 2 x (4 heads + 4 KV heads) x 50) numbers x 2 bytes
        "norms, rope, residuals": 2 * 3.6,
        # layers x (3 x 300 x 100 weights + 3 x 300 numbers) x 2 bytes
        "dense FFN": 2 * 181.8,
        "head": 200.0,  # 1000 x 100 x 2 bytes
    }
    assert CostModel(DENSE, Layout(), PLAIN).step_seconds(ONE_DECODE) == pytest.approx(818.8e-6)


def test_tp_halves_what_is_split_and_pays_two_all_reduces_a_layer() -> None:
    assert parts(CostModel(DENSE, Layout(tp=2), PLAIN), ONE_DECODE) == {
        "attention projections": 2 * 60.0,
        "attention of decodes": 2 * 2.0,
        "norms, rope, residuals": 2 * 2.8,  # 10 x 100 + 2 x (2 + 2) x 50 numbers
        "dense FFN": 2 * 90.9,
        "tp all-reduce": 2 * 2 * 1.2,  # 1 µs and 2 x 1/2 x 200 bytes
        "embedding": 1.2,
        "head": 100.0 + 2.0,  # and 1 µs and 1/2 x 2000 bytes of logits
    }


def test_many_rows_cost_their_multiplications() -> None:
    slow = cluster(device=replace(PLAIN.device, flops_per_s=1e9))
    prompt = StepShape(0, 0, 100, 100 * 101 // 2, 1)
    found = CostModel(DENSE, Layout(), slow).step_parts(prompt)
    # 2 x 100 tokens x 60,000 weights at 1 GFLOP/s, in 2 layers
    assert found["attention projections"] == pytest.approx(2 * 12e-3)
    # 5050 pairs x 4 operations x 4 heads x 50, in 2 layers
    assert found["attention of prompts"] == pytest.approx(2 * 4.04e-3)


def test_measured_rates_are_interpolated_between_rows() -> None:
    device = replace(PLAIN.device, read_bytes_per_s=1e15, row_rates=((1, 2e9), (3, 3e9)))
    found = CostModel(DENSE, Layout(), cluster(device=device))
    # A weight takes 1 ns for one row, 2 ns for three, hence 1.5 ns for two and 4 ns for six.
    for rows, nanoseconds in ((1, 1.0), (2, 1.5), (3, 2.0), (6, 4.0)):
        projections = found.step_parts(StepShape(rows, 0, 0, 0, 0))["attention projections"]
        assert projections == pytest.approx(2 * 60_000 * nanoseconds * 1e-9)


def test_adapters_are_read_and_multiplied_beside_their_layers() -> None:
    one, three = (CostModel(DENSE, Layout(), PLAIN, adapters=(8, n)).step_parts(ONE_DECODE) for n in (1, 3))
    # 8 x (4 x 100 + 2 x (4 + 2) x 50) weights beside attention, 8 x 3 x (100 + 300) beside the FFN, 2 bytes; 2 layers
    assert one["LoRA"] == pytest.approx(2 * 2 * (8000 + 9600) * 1e-9)
    assert three["LoRA"] == pytest.approx(3 * one["LoRA"])
    assert "LoRA" not in CostModel(DENSE, Layout(), PLAIN).step_parts(ONE_DECODE)


def test_rates_of_a_kind_of_weights_are_those_of_its_products() -> None:
    rates = WeightRates(2.0, 0.5, idle_expert_reads=1.0, expert_layer_overhead_s=1e-3)
    fast = cluster(device=replace(PLAIN.device, fp8=rates))
    config = replace(DENSE, quantization=FP8_OF_OUTPUTS)
    plain, stored = (CostModel(config, Layout(), each) for each in (PLAIN, fast))
    # A byte for each weight and 4 for the scale of an output, at half the rate: about what 2 bytes take.
    assert 1.0 < stored.step_parts(ONE_DECODE)["dense FFN"] / plain.step_parts(ONE_DECODE)["dense FFN"] < 1.1
    many = StepShape(0, 0, 4000, 0, 1)
    ratio = stored.step_parts(many)["attention projections"] / plain.step_parts(many)["attention projections"]
    assert ratio == pytest.approx(0.5)
    moe = replace(MOE, quantization=FP8_OF_OUTPUTS)
    idle, none = (CostModel(moe, Layout(), each).step_parts(ONE_DECODE) for each in (fast, PLAIN))
    assert idle["experts"] > 1.9 * none["experts"]  # four experts are read, of which the token needs two
    assert idle["layer overhead"] == pytest.approx(2e-3)


def test_a_moe_layer_reads_the_experts_that_its_tokens_touch() -> None:
    one, many, uneven = (
        CostModel(MOE, Layout(), PLAIN, expert_evenness=evenness).step_parts(StepShape(n, 0, 0, 0, 0))
        for n, evenness in ((1, 0.5), (3, math.inf), (3, 0.5))
    )
    # 2 of 4 experts of 3 x 50 x 100 weights, 2 bytes each; 2 pairs of 3 x 50 + 2 x 100 numbers
    assert one["experts"] == pytest.approx(2 * (60.0 + 1.4) * 1e-6)
    # 4 x (1 - (1 - 2/4)^3) = 3.5 of them; 6 pairs
    assert many["experts"] == pytest.approx(2 * (105.0 + 4.2) * 1e-6)
    # Beta(1/2, 1/2): a token misses an expert with probability 1/2, three do with 1/2 x 3/4 x 5/6 = 5/16
    assert uneven["experts"] == pytest.approx(2 * (4 * 11 / 16 * 30.0 + 4.2) * 1e-6)
    assert one["router"] == pytest.approx(2 * 0.8e-6)


def test_dp_groups_share_the_experts_and_gather_their_tokens() -> None:
    found = CostModel(MOE, Layout(dp=2, ep=2), PLAIN, expert_imbalance=1.0).step_parts(ONE_DECODE)
    # All-gather and reduce-scatter of 2 tokens x 100 x 2 bytes, half of which moves, 1 µs latency each;
    # two layers, and one more exchange before the step.
    assert found["dispatch"] == pytest.approx(2 * 2 * 1.2e-6)
    assert found["overhead"] == pytest.approx(1e-6)


def test_large_steps_go_by_all_to_all_to_the_ranks_that_host_a_tokens_experts() -> None:
    host = replace(PLAIN, shared_host=True, num_devices=PLAIN.devices_per_node)
    model = CostModel(MOE, Layout(tp=2, ep=2), host)
    few = model.step_parts(StepShape(0, 0, CPU_ALL_TO_ALL_FROM - 1, 0, 1))
    many = model.step_parts(StepShape(0, 0, 600, 0, 1))
    assert "dispatch" not in few and "dispatch" in many
    # 300 tokens a rank x 2 ranks x (1 - C(2,2) / C(4,2)) = 500 rows, half of them to the other rank:
    # 216 bytes there (with ids and weights), 200 back, 1 µs each way; two layers.
    assert many["dispatch"] == pytest.approx(2 * (1 + 54.0 + 1 + 50.0) * 1e-6)


def test_gpus_send_all_slots_of_an_exchange() -> None:
    moe = replace(MOE, num_experts=128, num_experts_per_tok=8, emb_dim=4096)
    layout, of_group = Layout(dp=16, ep=16), 4096
    model = CostModel(moe, layout, replace(PLAIN, num_devices=16, devices_per_node=16))
    assert prefers_all_to_all(layout, moe, 16 * of_group, device="cuda")
    found = model.step_parts(StepShape(0, 0, of_group, 0, 1))["dispatch"]
    # To each of 15 other ranks, there (with ids and weights) and back, at 1 GB/s, and a few µs; two layers.
    slots = capacity(layout, moe, of_group)
    assert found == pytest.approx(2 * 15 * slots * (2 * 4096 * 2 + 8 * 8) / 1e9, rel=1e-4)


def test_the_busiest_rank_waits_for_nobody() -> None:
    shape = StepShape(64, 0, 0, 0, 0)
    slow = cluster(device=replace(PLAIN.device, flops_per_s=1e9))
    even, uneven = (
        CostModel(MOE, Layout(tp=2, ep=2), slow, imbalance).step_parts(shape)["experts"]
        for imbalance in (1.0, 1.5)
    )
    assert 1.3 < uneven / even < 1.5


def test_even_routing_has_a_busiest_rank_too() -> None:
    """Against drawing: 8 of 64 experts for each token, on 2, 4 and 16 ranks."""
    config = replace(MOE, num_experts=64, num_experts_per_tok=8)
    rng = random.Random(0)
    for ep, tokens in ((2, 1), (4, 16), (16, 64)):
        drawn = []
        for _ in range(400):
            counts = [0] * ep
            for _ in range(tokens):
                for expert in rng.sample(range(64), 8):
                    counts[expert * ep // 64] += 1
            drawn.append(max(counts))
        model = CostModel(config, Layout(dp=ep, ep=ep), cluster(num_devices=16), 1.0)
        mean = tokens * 8 / ep
        assert model._moe is not None
        assert mean + model._moe._spread * mean**0.5 == pytest.approx(statistics.mean(drawn), rel=0.05)


def test_micro_batches_fill_the_pipeline() -> None:
    fast = cluster(device=replace(PLAIN.device, read_bytes_per_s=1e15, flops_per_s=1e9))
    alone, deep = CostModel(DENSE, Layout(), fast), CostModel(DENSE, Layout(pp=2), fast)
    one, two = StepShape(1, 0, 0, 0, 0), StepShape(2, 0, 0, 0, 0)
    # What the multiplications cost in one stage is half; a lone sequence passes both stages and the link.
    send = 1e-6 + 200e-9
    assert deep.step_seconds(one) == pytest.approx(alone.step_seconds(one) + send, rel=1e-6)
    # Two micro-batches keep both busy: twice the slowest stage, which is the one that sends.
    assert deep.step_seconds(two) == pytest.approx(2 * (alone.step_seconds(one) / 2 + send), rel=1e-6)


def test_a_prompt_is_not_split_over_micro_batches() -> None:
    model = CostModel(DENSE, Layout(pp=2), PLAIN)
    alone = StepShape(0, 0, 4000, 8_002_000, 1)
    beside = StepShape(3, 3, 4000, 8_002_000, 4)
    assert model.step_seconds(beside) > model.step_seconds(alone)
    two = StepShape(0, 0, 8000, 16_004_000, 2)  # two such prompts, one after the other through two stages
    assert model.step_seconds(alone) <= model.step_seconds(two) < 1.6 * model.step_seconds(alone)


def test_step_parts_add_up_to_the_step() -> None:
    h100 = PRESETS["H100"]
    _, config = find_config("Qwen3-30B-A3B")
    for text in ("tp=1", "tp=4,ep=2", "dp=4,ep=4", "tp=2,dp=2,pp=2,ep=4"):
        for shape in (StepShape(8, 8000, 0, 0, 8), StepShape(64, 64000, 1024, 600_000, 65)):
            model = CostModel(config, Layout.parse(text), h100)
            assert sum(model.step_parts(shape).values()) == pytest.approx(model.step_seconds(shape))


def test_nodes_are_crossed_once_by_what_is_gathered_and_by_each_row_of_an_all_to_all() -> None:
    group = Group(8, 4, PLAIN)  # latency: 2 doublings inside, 1 across
    assert group.all_gather(800) == pytest.approx(12e-6 + 800 * max(7 / 8 * 1e-9, 4 / 8 / 4 * 1e-8))
    assert group.all_to_all(800) == pytest.approx(12e-6 + 800 * max(3 / 8 * 1e-9, 4 / 8 * 1e-8))
    assert group.all_reduce(800) == pytest.approx(12e-6 + 1600 * max(7 / 8 * 1e-9, 4 / 8 / 4 * 1e-8))
    assert Group(1, 1, PLAIN).all_reduce(800) == 0


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        MOE,
        replace(MOE, num_experts=10, mlp_only_layers=(0,), n_layers=5, vocab_size=997),
        replace(DENSE, tie_word_embeddings=True, attention_bias=True, n_kv_groups=1),
    ],
)
@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_weights_are_those_of_the_fullest_rank(config: ModelConfig, world: int) -> None:
    for layout in valid_layouts(config, world):
        sizes = LayerSizes.of(config, layout)
        found = [stage_weights(config, layout, sizes, stage) for stage in stages(config, layout)]
        for index, weights in enumerate(found):
            first = index * layout.stage_size
            ranks = range(first, first + layout.stage_size)
            counted = max(rank_parameters(config, layout, rank) for rank in ranks)
            assert counted <= weights <= counted * 1.03, layout  # the zeros that pad take room too


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_quantised_weights_take_the_bytes_of_codes_and_scales(config: ModelConfig) -> None:
    alone = {"modules_to_not_convert": ["lm_head", "o_proj"]}
    fp8 = read_quantization(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8], **alone}}
    )
    quantized = replace(config, quantization=fp8)
    for layout in valid_layouts(quantized, 2):
        counted = max(rank_bytes(quantized, layout, rank) for rank in range(2))
        taken = CostModel(quantized, layout, PLAIN).weights_bytes()
        assert counted * 0.97 <= taken <= counted * 1.03, layout
        assert taken < 0.9 * CostModel(config, layout, PLAIN).weights_bytes()


def test_the_cache_is_what_weights_and_activations_leave() -> None:
    model = CostModel(DENSE, Layout(tp=2), PLAIN)
    left = 10**9 - model.weights_bytes() - model.activation_bytes(100, 4)
    assert model.kv_bytes_per_token() == kv_bytes_per_token(DENSE, Layout(tp=2), 0, 2) == 400
    assert model.kv_capacity_tokens(100, 4) == left // 400
    assert (
        CostModel(
            DENSE, Layout(), cluster(device=replace(PLAIN.device, memory_bytes=1000))
        ).kv_capacity_tokens(8192, 256)
        < 0
    )


def test_ranks_of_a_shared_host_share_its_rates() -> None:
    shared = cluster(shared_host=True, num_devices=2, devices_per_node=2)
    whole, half = (CostModel(DENSE, Layout(tp=tp), shared) for tp in (1, 2))
    names = ("attention projections", "attention of decodes")
    for name in names:
        assert half.step_parts(ONE_DECODE)[name] == pytest.approx(whole.step_parts(ONE_DECODE)[name])
    assert half.device.memory_bytes == whole.device.memory_bytes // 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ParallelLayoutError, match="n_heads=4 is not divisible by tp=3"):
        CostModel(DENSE, Layout(tp=3), PLAIN)
    with pytest.raises(ConfigError, match=r"expert_imbalance must be at least 1 \(even\), not 0.5"):
        CostModel(MOE, Layout(), PLAIN, 0.5)


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official shapes lie in ../shared")
def test_the_table_of_official_sizes_is_that_of_the_shared_data() -> None:
    shared = {name: raw for name, raw in json.loads(OFFICIAL.read_text()).items() if name != "_note"}
    assert {name: {**raw, "torch_dtype": "bfloat16"} for name, raw in shared.items()} == official_configs()
