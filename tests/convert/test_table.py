"""The name table: a Llama in megatron-core computes what transformers computes, and every row comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.schema import ModelConfig
from megalong.convert import parameters, table
from megalong.model.llama import model_from_hf
from megalong.runtime.errors import CheckpointError
from megalong.runtime.ranks import RankPool
from megalong.topology.layout import Layout
from tests.llamas import build_on_rank, hf_config, hf_logits, rank_logits, save_hf

TOKENS = torch.randint(0, 250, (2, 64), generator=torch.Generator().manual_seed(1))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([4, 8]))
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=draw(st.sampled_from([8, 12])),
        intermediate_size=draw(st.sampled_from([8, 20])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


def random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in table.hf_shapes(model).items()}


@settings(deadline=None)
@given(model=models(), tp=st.sampled_from([1, 2, 4]))
def test_cutting_and_merging_gives_back_every_row(model, tp):
    tensors = random_tensors(model)
    padded = -(-model.vocab_size // tp) * tp
    back = {}
    for entry in table.table(model):
        rows = padded if entry.is_vocabulary else None
        shards = [table.shard_from_hf(entry, lambda n, a, b: tensors[n][a:b], rank, tp, rows) for rank in range(tp)]
        whole = table.merge_shards(entry, shards)
        assert whole.shape == entry.shape
        assert torch.equal(whole, table.from_hf(entry, lambda n, a, b: tensors[n][a:b]))
        back |= table.to_hf(entry, whole)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@settings(deadline=None)
@given(model=models(), tp=st.sampled_from([2, 4]))
def test_a_rank_reads_only_its_own_rows(model, tp):
    tensors, read = random_tensors(model), 0

    def reader(name, start, stop):
        nonlocal read
        read += stop - start
        return tensors[name][start:stop]

    for entry in table.table(model):
        if entry.tp_axis == 0 and not entry.is_vocabulary:
            read = 0
            table.shard_from_hf(entry, reader, 1, tp)
            assert read == entry.shape[0] // tp


def test_the_row_spans_of_a_tensor_cover_it_once():
    model = model_from_hf(hf_config(attention_bias=True, mlp_bias=True))
    for entry in table.table(model):
        spans = [span for piece in entry.pieces for span in piece.spans]
        rows = sorted(row for span in spans for row in range(span.megatron_row, span.megatron_row + span.rows))
        assert rows == list(range(entry.shape[0]))
        for piece in entry.pieces:
            assert sorted(i for s in piece.spans for i in range(s.hf_row, s.hf_row + s.rows)) == list(range(piece.rows))


@pytest.mark.parametrize("name", ["decoder.layers.0.self_attention.q_layernorm.weight", "embedding.position"])
def test_a_parameter_of_another_architecture_is_refused(name):
    with pytest.raises(CheckpointError, match=name):
        parameters.entry_of_parameter(model_from_hf(hf_config()), name)


def test_both_layer_specs_name_the_same_tensors():
    model = model_from_hf(hf_config())
    local = parameters.entry_of_parameter(model, "module.module.decoder.layers.1.input_layernorm.weight", first_layer=2)
    engine = parameters.entry_of_parameter(model, "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight")
    assert local == engine
    assert local is not None
    assert local.layer == 3
    assert parameters.entry_of_parameter(model, "decoder.layers.0.mlp.linear_fc1._extra_state") is None


def load_and_compute(folder: Path, layout: Layout) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    model = model_from_hf(folder)
    module = build_on_rank(model, layout, TOKENS.shape[1])
    parameters.load_hf_into([module], folder, model)
    return rank_logits(module, model.vocab_size, TOKENS), {n: p.detach() for n, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, Layout()),
        ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, Layout(tp=2, pp=2)),
        ({"attention_bias": True, "num_key_value_heads": 8}, Layout(tp=4)),
    ],
    ids=["one rank", "tied, biases, tp 2 pp 2", "multi-head, tp 4"],
)
def test_a_hugging_face_llama_gives_the_same_logits_in_megatron(tmp_path, ranks: RankPool, changes, layout):
    save_hf(tmp_path, hf_config(**changes))
    results = ranks.run(load_and_compute, layout.world_size, tmp_path, layout)
    expected = hf_logits(tmp_path, TOKENS)
    for rank, (logits, _) in enumerate(results):
        if layout.coordinates(rank).pp == layout.pp - 1:
            assert (logits - expected).norm() / expected.norm() < 1e-5


def test_a_layout_that_does_not_divide_the_model_is_refused():
    entry = table.layer_table(model_from_hf(hf_config(intermediate_size=90)), 0)[-2]
    with pytest.raises(CheckpointError, match=r"does not divide .*linear_fc1"):
        table.shard_from_hf(entry, lambda n, a, b: torch.zeros(b - a, 64), 0, 4)
