"""The enumeration of layouts contains every valid factorisation and no other, and refusals help."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.schema import ModelConfig
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import Layout
from megalong.topology.valid import Demand, check_layout, choose_layout, layout_problems, valid_layouts

LLAMA = ModelConfig()


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 48),
    seq_length=st.integers(1, 64).map(lambda n: 8 * n),
    batch=st.integers(1, 12),
    heads=st.sampled_from([(8, 2), (8, 8), (12, 4), (6, 3)]),
    layers=st.integers(1, 12),
)
def test_enumeration_holds_every_valid_factorisation_and_no_other(world_size, seq_length, batch, heads, layers):
    model = ModelConfig(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], num_hidden_layers=layers, intermediate_size=96
    )
    found = list(valid_layouts(Demand(model, seq_length, batch), world_size))
    # The rules, stated a second time by brute force over all sizes.
    expected = {
        (tp, cp, pp, dp)
        for tp, cp, pp in itertools.product(range(1, world_size + 1), repeat=3)
        if world_size % (tp * cp * pp) == 0
        for dp in [world_size // (tp * cp * pp)]
        if heads[1] % tp == 0 and 96 % tp == 0
        if seq_length % (2 * cp * tp) == 0 and layers % pp == 0 and batch % dp == 0
    }
    assert {(x.tp, x.cp, x.pp, x.dp) for x in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "tp=3 does not divide 32 attention heads and 8 key-value heads"),
        (Layout(cp=7), "not divisible by 2*cp = 14"),
        (Layout(pp=5), "pp=5 does not divide 32 layers"),
        (Layout(dp=5), "dp=5 does not divide the global batch of 32"),
    ],
)
def test_each_broken_rule_is_named_with_its_values(layout, words):
    assert any(words in problem for problem in layout_problems(layout, Demand(LLAMA, 65536, 32)))


def test_refusal_names_world_size_and_layouts_that_run():
    with pytest.raises(LayoutError, match="1\\*32\\*1\\*16 = 512, but there are 4 ranks") as refusal:
        check_layout(Layout(cp=32, dp=16), LLAMA, 1048576, 16, 4)
    assert "topology.cp=" in str(refusal.value)


@pytest.mark.parametrize(("cp", "valid"), [(4, True), (8, True), (16, False)])
def test_head_exchange_needs_a_key_value_head_per_rank(cp, valid):
    problems = layout_problems(Layout(cp=cp), Demand(LLAMA, 65536, 32, "a2a"))
    assert (not problems) == valid


def test_hierarchical_sizes_multiply_to_cp():
    assert not layout_problems(Layout(cp=32), Demand(LLAMA, 262144, 16, "a2a+p2p", [8, 4]))
    assert layout_problems(Layout(cp=32), Demand(LLAMA, 262144, 16, "a2a+p2p", [8, 8]))
    assert layout_problems(Layout(cp=32), Demand(LLAMA, 262144, 16, "a2a+p2p"))


def test_choice_without_knowledge_keeps_rings_short():
    assert choose_layout(LLAMA, 1048576, 16, 512) == Layout(cp=32, dp=16)
    assert choose_layout(LLAMA, 65536, 32, 8, cp=8) == Layout(cp=8)
    assert choose_layout(LLAMA, 65536, 32, 8, tp=2, cp=2, pp=2) == Layout(tp=2, cp=2, pp=2)


@pytest.mark.parametrize("fixed", [{"tp": 3}, {"cp": 7}, {"tp": 2, "cp": 3}, {"dp": 3, "tp": 2}, {"dp": 64}])
def test_impossible_wishes_are_refused_by_name(fixed):
    with pytest.raises(LayoutError, match="cannot run"):
        choose_layout(LLAMA, 65536, 32, 8, **fixed)


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 64), batch=st.integers(1, 16), tp=st.sampled_from([None, 1, 2, 4, 3]))
def test_choice_is_always_one_of_the_valid_or_a_refusal(world_size, batch, tp):
    demand = Demand(LLAMA, 65536, batch)
    valid = list(valid_layouts(demand, world_size, tp=tp))
    if valid:
        assert choose_layout(LLAMA, 65536, batch, world_size, tp=tp) in valid
    else:
        with pytest.raises(LayoutError):
            choose_layout(LLAMA, 65536, batch, world_size, tp=tp)
