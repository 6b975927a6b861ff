"""Every number of the schema has a range and every string is one of a few or free on purpose; both are enforced."""

import math
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.cluster import Fact, load_cluster
from megalong.config.limits import CHOICES, RANGE, Range, violations
from megalong.config.schema import Config
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError

FREE = {
    "run_dir",
    "init_from",
    "data.path",
    "data.allow_tokenizer",
    "model.name",
    "stage.name",
    "stage.predecessor",
    "searchpath",
    "scale.name",
    "cluster.name",
    "cluster.gpu",
    "checkpoint.allow_changed",
    "evaluation.haystack",
    "model.rope_scaling",
    "stage.rope_scaling",
}
"""Settings whose value is any text, or is checked by a function of its own."""

Leaf = tuple[str, Any, Any]


def leaves(schema: Any = Config, prefix: str = "") -> list[Leaf]:
    """(key, type, metadata) of every setting; a fact is one."""
    found: list[Leaf] = []
    for f in fields(schema):
        kind = get_type_hints(schema)[f.name]
        if is_dataclass(kind) and kind is not Fact:
            found += leaves(kind, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, kind, f.metadata))
    return found


LEAVES = leaves()
RANGES = {key: metadata[RANGE] for key, _, metadata in LEAVES if RANGE in metadata}


def holds(kind: Any, *wanted: str) -> bool:
    return any(word in str(kind) for word in wanted)


def test_every_setting_has_a_range_or_choices_or_is_free_on_purpose() -> None:
    bare = {key for key, kind, m in LEAVES if RANGE not in m and CHOICES not in m and not holds(kind, "bool")}
    assert bare == FREE
    numbers = {key for key, kind, _ in LEAVES if kind is Fact or holds(kind, "int", "float")}
    assert numbers - set(RANGES) == set()
    assert all(r != Range() for r in RANGES.values())  # an empty range is none


def outside(limits: Range) -> list[float]:
    found = [math.nan, math.inf, -math.inf]
    if limits.at_least is not None:
        found.append(limits.at_least - 1)
    if limits.above is not None:
        found += [limits.above, limits.above - 1]
    if limits.at_most is not None:
        found.append(limits.at_most + 1)
    if limits.below is not None:
        found.append(limits.below)
    return found


CONFIG = run_of(["+stage=65k", "+scale=mini"], 1).config


def told(key: str, value: Any) -> list[str]:
    """What is said of the configuration with one value changed in place."""
    *path, name = key.split(".")
    at: Any = CONFIG
    for part in path:
        at = getattr(at, part)
    if isinstance(getattr(at, name), Fact):
        at, name = getattr(at, name), "value"
    before = getattr(at, name)
    setattr(at, name, value)
    try:
        return list(violations(CONFIG))
    finally:
        setattr(at, name, before)


@pytest.mark.parametrize("key", RANGES)
def test_values_outside_a_range_are_refused_with_key_value_and_range(key: str) -> None:
    for value in outside(RANGES[key]):
        found = told(key, value)
        assert len(found) == 1, (key, value)
        assert key in found[0]
        assert f"={value}:" in found[0]
        assert f"must be {RANGES[key]}" in found[0]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(RANGES)), st.floats(0, 1), st.booleans())
def test_values_inside_a_range_are_accepted(key: str, share: float, at_an_end: bool) -> None:
    limits = RANGES[key]
    low = limits.at_least if limits.at_least is not None else limits.above
    high = limits.at_most if limits.at_most is not None else limits.below
    assert low is not None
    top = high if high is not None else low + 1e6
    value: float = low + (top - low) * share
    if at_an_end and limits.at_least is not None:
        value = limits.at_least
    if limits.whole:
        value = math.ceil(value)
    if value in (limits.above, limits.below):
        return
    assert told(key, value) == []


WRONG = {
    "checkpoint.keep=-1": "checkpoint.keep=-1: must be at least 1.",
    "train.heartbeat_s=-5": "train.heartbeat_s=-5.0: must be at least 1 and at most 86400.",
    "train.join_s=0": "train.join_s=0.0: must be at least 1 ",
    "optimizer.adam_beta1=1.5": "optimizer.adam_beta1=1.5: must be at least 0 and below 1.",
    "optimizer.adam_beta2=1": "optimizer.adam_beta2=1.0: must be at least 0 and below 1.",
    "optimizer.adam_eps=0": "optimizer.adam_eps=0.0: must be above 0 and at most 1.",
    "optimizer.clip_grad=-1": "optimizer.clip_grad=-1.0: must be at least 0.",
    "optimizer.weight_decay=nan": "optimizer.weight_decay=nan: must be at least 0 and at most 10.",
    "checkpoint.save_minutes=-1": "checkpoint.save_minutes=-1.0: must be at least 0.",
    "train.lr=inf": "train.lr=inf: must be above 0 and at most 1.",
    "stage.lr=5": "stage.lr=5.0: must be above 0 and at most 1.",
    "scale.steps=0": "scale.steps=0: must be at least 1.",
    "topology.tp=0": "topology.tp=0: must be at least 1 ",
    "attention.hierarchical_context_parallel_sizes=[2,-1]": "sizes=[2, -1]: must be at least 1.",
    "model.num_attention_heads=0": "model.num_attention_heads=0: must be at least 1.",
    "model.rms_norm_eps=0": "model.rms_norm_eps=0.0: must be above 0 ",
    "model.num_hidden_layers=3000000": "model.num_hidden_layers=3000000: must be at least 1 and at most 1024.",
    "model.eos_token_id=[3,end]": "model.eos_token_id=[3, 'end']: must be at least 0 ",
    "seed=-1": "seed=-1: must be at least 0 and at most 4294967295.",
    "train.max_skipped=0": "train.max_skipped=0: must be at least 1.",
    "train.loss_chunk=-1": "train.loss_chunk=-1: must be at least 0.",
    "stage.theta_law=guess": "stage.theta_law='guess': choose one of dynamic_ntk, scaling_law, unchanged, fixed.",
    "topology.policy=best": "topology.policy='best': choose one of stage, auto.",
    "cluster.nodes.value=1.5": "cluster.nodes.value=1.5: must be a whole number, at least 1.",
    "cluster.spine_share.value=1.1": "cluster.spine_share.value=1.1: must be above 0 and at most 1.",
    "cluster.memory_gib.value=nan": "cluster.memory_gib.value=nan: must be above 0.",
    "evaluation.tasks=[needle,nedle]": "evaluation.tasks=['needle', 'nedle']: choose some of needle, multi_key, ",
    "evaluation.depths=[0.5,1.5]": "evaluation.depths=[0.5, 1.5]: must be at least 0 and at most 1.",
    "cluster.device=tpu": "cluster.device='tpu': choose one of cuda, cpu.",
}


def test_the_command_line_is_held_to_the_ranges_and_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        run_of(["+stage=65k", "+scale=mini", *WRONG], 1)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(WRONG)
    for sentence in WRONG.values():
        assert sum(sentence in line for line in lines) == 1, sentence


def test_a_tag_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="spec, assumed, measured"):
        run_of(["+stage=65k", "+scale=mini", "cluster.nodes.tag=guessed"], 1)


def test_a_cluster_file_of_ones_own_is_held_to_the_ranges(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("nodes: {value: 0, tag: spec, source: x}")
    with pytest.raises(ConfigError, match=r"c\.yaml: cluster\.nodes\.value=0"):
        load_cluster(tmp_path / "c.yaml")
