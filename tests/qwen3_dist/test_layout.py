"""Layouts as values: their text, their arithmetic, their refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3_dist import Layout, ModelConfig
from qwen3_dist.errors import ParallelLayoutError
from qwen3_dist.layout import even_ranges, nearest_layout, padded_range, valid_layouts
from qwen3_dist.parallel.context import _groups_of
from qwen3_dist.parallel.expert_exchange import bytes_saved, capacity, prefers_all_to_all

SHAPE = {"vocab_size": 99, "emb_dim": 64, "n_layers": 4, "n_kv_groups": 2, "head_dim": 16, "hidden_dim": 96}
DENSE = ModelConfig(n_heads=8, **SHAPE)  # type: ignore[arg-type]
MOE = ModelConfig(n_heads=8, num_experts=10, num_experts_per_tok=2, moe_hidden_dim=8, **SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["tp=1", "tp=2", "tp=2,ep=2", "tp=2,dp=2,ep=4", "dp=4,ep=2", "tp=2,pp=2"])
def test_text_and_value_are_inverse(text: str) -> None:
    assert str(Layout.parse(text)) == text
    assert Layout.parse(Layout.parse(text)) == Layout.parse(text)


def test_order_spaces_and_missing_axes_do_not_matter() -> None:
    assert Layout.parse(" ep=2, tp = 2 ") == Layout(tp=2, ep=2)
    assert Layout.parse("") == Layout()


@pytest.mark.parametrize("text", ["tp", "tp=", "tp=two", "tp=-1", "xp=2", "tp=2,tp=4", "2", "tp=2;ep=2"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ParallelLayoutError, match="is expected"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("layout", "config", "sentence"),
    [
        ("tp=3", DENSE, "n_heads=8 is not divisible by tp=3; tp=1, 2, 4, 8 work"),
        ("tp=2,ep=2", DENSE, "ep=2 needs a MoE checkpoint and this one is dense; leave ep out"),
        ("pp=5", DENSE, "pp=5 is more than n_layers=4; pp=4 is the most"),
        ("tp=4,dp=4,ep=16", MOE, "ep=16 is more than num_experts=10; ep=1, 2, 4, 8 work"),
    ],
)
def test_a_refusal_names_what_works(layout: str, config: ModelConfig, sentence: str) -> None:
    with pytest.raises(ParallelLayoutError) as error:
        Layout.parse(layout).validate(config)
    assert str(error.value) == sentence


def test_zero_and_indivisible_sizes_are_refused() -> None:
    with pytest.raises(ParallelLayoutError, match="tp must be a positive integer, not 0"):
        Layout.parse("tp=0")
    with pytest.raises(ParallelLayoutError, match=r"ep=3 does not divide dp\*tp=4; ep=1, 2, 4 work"):
        Layout.parse("tp=2,dp=2,ep=3")


def test_kv_groups_are_replicated_when_tp_exceeds_them() -> None:
    assert Layout(tp=4).fits(DENSE) and Layout(tp=8).fits(DENSE)
    three = ModelConfig(n_heads=12, **{**SHAPE, "n_kv_groups": 3})  # type: ignore[arg-type]
    assert [tp for tp in (1, 2, 3, 4, 6, 12) if Layout(tp=tp).fits(three)] == [1, 3, 6, 12]


def test_coordinates_and_groups_of_every_rank() -> None:
    layout = Layout(tp=2, dp=2, pp=2, ep=2)
    at = [layout.coords(rank) for rank in range(8)]
    assert [c.stage for c in at] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.group for c in at] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [c.tp_rank for c in at] == [0, 1] * 4
    assert [c.ep_rank for c in at] == [0, 0, 1, 1] * 2
    assert [c.etp_rank for c in at] == [0, 1] * 4
    assert _groups_of(layout, 5) == ((4, 5), (5, 7), (5, 7), (4, 5))
    assert _groups_of(Layout(tp=4, ep=2), 2) == ((0, 1, 2, 3), (2,), (0, 2), (2, 3))


def test_valid_layouts_of_a_world() -> None:
    assert [str(layout) for layout in valid_layouts(DENSE, 2)] == ["tp=2", "dp=2", "pp=2"]
    assert [str(layout) for layout in valid_layouts(MOE, 2)] == [
        "tp=2",
        "tp=2,ep=2",
        "dp=2",
        "dp=2,ep=2",
        "pp=2",
    ]
    assert valid_layouts(DENSE, 5) == [Layout(dp=5)]


def test_ranges_cover_everything_once() -> None:
    assert even_ranges(10, 4) == [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    assert [padded_range(10, 4, part) for part in range(4)] == [
        (range(0, 3), 3),
        (range(3, 6), 3),
        (range(6, 9), 3),
        (range(9, 10), 3),
    ]
    assert [padded_range(2, 4, part)[0] for part in range(4)] == [
        range(0, 1),
        range(1, 2),
        range(2, 2),
        range(2, 2),
    ]


@pytest.mark.parametrize(
    ("layout", "tokens", "wanted"),
    [
        ("tp=4,ep=4", 511, False),
        ("tp=4,ep=4", 512, True),
        ("tp=1", 8192, False),
        ("tp=4", 8192, False),  # every rank has a part of each expert
        ("tp=2,ep=2", 8192, False),  # 8 of 64 experts: hardly a token has them all on one of two ranks
        ("dp=2,ep=2", 8192, True),
        ("pp=2,tp=2,ep=2", 8192, False),
    ],
)
def test_large_steps_go_by_all_to_all_unless_tokens_are_wanted_almost_everywhere(
    layout: str, tokens: int, wanted: bool
) -> None:
    config = replace(MOE, num_experts=64, num_experts_per_tok=8)
    assert prefers_all_to_all(Layout.parse(layout), config, tokens) is wanted
    assert not prefers_all_to_all(Layout.parse(layout), DENSE, tokens)


QWEN3_235B = replace(MOE, emb_dim=4096, num_experts=128, num_experts_per_tok=8)


@pytest.mark.parametrize(
    ("layout", "tokens", "wanted"),
    [
        ("tp=8,ep=8", 8192, False),  # 91% of the rows would go to every rank
        ("dp=8,ep=8", 8 * 256, False),  # decodes: too few
        ("dp=8,ep=8", 8 * 16384, True),
        ("dp=64,ep=64", 64 * 16, False),
        ("dp=64,ep=64", 64 * 128, True),  # decodes, in a graph
        ("tp=4", 8192, False),
        ("tp=1", 8192, False),
    ],
)
def test_gpus_take_all_to_all_where_fewer_bytes_make_up_for_its_launches(
    layout: str, tokens: int, wanted: bool
) -> None:
    parsed = Layout.parse(layout)
    assert prefers_all_to_all(parsed, QWEN3_235B, tokens, device="cuda") is wanted
    if parsed.ep > 1:  # half as many bytes there
        assert bytes_saved(parsed, QWEN3_235B, tokens, fp8=True) > bytes_saved(parsed, QWEN3_235B, tokens)


def test_all_rows_have_room_where_an_overflow_could_not_be_told() -> None:
    assert capacity(Layout(dp=64, ep=64, pp=2), QWEN3_235B, 1000) == 1000
    assert 250 < capacity(Layout(dp=64, ep=64), QWEN3_235B, 1000) < 320  # 8 of 128, and 2 of a rank's, twice
    for rows in (0, 1, 2, 3, 17):
        assert capacity(Layout(dp=64, ep=64), QWEN3_235B, rows) <= rows


@pytest.mark.parametrize(
    ("config", "wanted", "nearest"),
    [
        (DENSE, "tp=3", "dp=3"),
        (DENSE, "tp=2,dp=2,ep=2", "tp=2,dp=2"),
        (MOE, "dp=16,ep=16", "dp=16,ep=8"),
        (MOE, "pp=7", "dp=7"),
        (MOE, "tp=2,ep=2", "tp=2,ep=2"),
        (MOE, "ep=8", "tp=8,ep=8"),  # which no layout has: ep must divide the ranks
        (MOE, "tp=2,ep=5", "dp=5,ep=5"),
        (DENSE, "ep=4,tp=0", "tp=4"),
    ],
)
def test_the_nearest_layout_has_as_many_ranks_and_its_axes_are_near(
    config: ModelConfig, wanted: str, nearest: str
) -> None:
    assert str(nearest_layout(config, wanted)) == nearest


def test_the_nearest_layout_has_no_more_ranks_than_there_may_be() -> None:
    assert str(nearest_layout(MOE, "tp=2,dp=32,ep=8", most_ranks=16)) == "tp=2,dp=8,ep=8"
