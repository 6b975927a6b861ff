"""Steps of two windows in one run: each is what transformers computes on its sequences, and every one is read once."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megalong.attention.zigzag import unshard
from megalong.data.dataset import SequenceDataset
from megalong.data.order import epoch_order
from megalong.runtime.ranks import RankPool
from tests.data.folders import alternate, make_mixed_folder
from tests.training.runs import metrics, outcome_of, same, stage_run, state_of
from tests.training.test_whole_steps import TOLERANCES, same_steps
from tests.training.whole_steps import (
    BATCH,
    EVALUATED,
    RATES,
    SEED,
    WINDOW,
    Reference,
    Steps,
    full_weights,
    make_base,
    make_data,
    settings,
    start_of,
)

SHORT = 32
ORDER = [WINDOW, SHORT, WINDOW]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and random documents in two windows: two steps of the long one to one of the short."""
    where = tmp_path_factory.mktemp("windows")
    make_base(where / "base")
    make_data(where / "data")
    make_data(where / "data" / f"window-{SHORT}", SHORT)
    alternate(where / "data", {WINDOW: 2, SHORT: 1})
    return where


class Alternating(Reference):
    """Short sequences go through transformers one by one, each from position 0."""

    def run(self) -> Steps:
        data = {WINDOW: SequenceDataset(self.data), SHORT: SequenceDataset(self.data / f"window-{SHORT}")}
        orders = {w: np.concatenate([epoch_order(SEED, epoch, len(d)) for epoch in range(3)]) for w, d in data.items()}
        before, done, lines = self.both(), dict.fromkeys(data, 0), []
        for step, (window, rate) in enumerate(zip(ORDER, RATES, strict=True)):
            count = BATCH * WINDOW // window
            ids = orders[window][done[window] : done[window] + count].tolist()
            done[window] += count
            lines.append(self.step(step, data[window], ids, rate))
        weights = {n: p.detach().clone() for n, p in self.masters.items()}
        return Steps(lines, weights, {"before": before, "after": self.both()})

    def both(self) -> list[float]:
        return self.by_position() + self.by_position(self.data / f"window-{SHORT}", EVALUATED * WINDOW // SHORT)


def trained(folder: str, name: str, mask: str, sizes: list[str]) -> Steps:
    run_dir = Path(folder) / name
    base = settings(Path(folder) / "base", Path(folder) / "data")
    stage = stage_run(str(run_dir), *base, "precision=fp32", f"attention.document_mask={mask}", *sizes)
    assert stage.run() == 0
    found = json.loads((run_dir / "evaluation.json").read_text())
    (short,) = found["shorter"]
    assert short["seq_length"] == SHORT
    evaluation = {when: found[when]["loss"] + short[when]["loss"] for when in ("before", "after")}
    return Steps(metrics(run_dir), full_weights(stage), evaluation)


CASES = {
    "cp4": ("none", ["topology.cp=4"]),
    "tp2-cp2": ("intra", ["topology.tp=2", "topology.cp=2"]),
    "pp2-dp2": ("none", ["topology.pp=2", "topology.dp=2"]),
    "cp2-a2a": ("none", ["topology.cp=2", "topology.dp=2", "attention.cp_comm_type=a2a"]),
    "cp4-all-gather": ("none", ["topology.cp=4", "attention.cp_comm_type=all_gather"]),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_of_both_windows_are_those_of_transformers_on_each_sequence_by_itself(
    ranks: RankPool, folder: Path, case: str
) -> None:
    mask, sizes = CASES[case]
    found = ranks.run(trained, 4, str(folder), case, mask, sizes)[0]
    assert [line["window"] for line in found.metrics] == ORDER
    same_steps(found, Alternating(folder, "fp32", mask).run(), start_of(folder), *TOLERANCES["fp32"])


ROUND = {WINDOW: 3, SHORT: 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one round of four steps consumes, to the sequence, each of other tokens."""
    out = tmp_path_factory.mktemp("rounds") / "data"
    make_mixed_folder(out, {w: (n * BATCH * WINDOW // w, 4) for w, n in ROUND.items()}, ROUND)
    return out


def consumed(run_dir: str, *overrides: str) -> tuple[tuple[int, int, int], list[torch.Tensor], Any]:
    """The tokens that this rank's model was given, micro-batch by micro-batch; where it stands; its state."""
    from megalong.training import step as module

    seen, original = [], module.forward_backward

    def spied(seq_length: int, model: Any, batches: Any, micro_batches: int) -> Any:
        def noted() -> Any:
            for batch in batches:
                seen.append(batch["tokens"].clone())
                yield batch

        return original(seq_length, model, noted(), micro_batches)

    module.forward_backward = spied
    try:
        stage = stage_run(run_dir, "data.max_passes=9", *overrides)
        stage.run()
    finally:
        module.forward_backward = original
    dp, cp = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
    return (dp, cp, stage.settings.micro_batches), seen, state_of(stage)


def of_run(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        str(run_dir), f"data.path={data}", f"stage.seq_length={WINDOW * 256}", f"train.global_batch_size={BATCH}",
        "train.steps=8", "model.vocab_size=1000", "precision=fp32", *overrides,
    ]  # fmt: skip


def ids_of(data: Path, found: list[tuple]) -> list[tuple[int, int]]:
    """(window, sequence) of everything that all ranks together were given, in the global order."""
    rows = {}
    for window, folder in ((WINDOW, data), (SHORT, data / f"window-{SHORT}")):
        dataset = SequenceDataset(folder)
        rows |= {(window, tuple(dataset.read(i, 0, window).tolist())): i for i in range(len(dataset))}
    by_rank = {(dp, cp): seen for (dp, cp, _), seen, _ in found}
    dp_size, cp_size = (1 + max(place[axis] for place in by_rank) for axis in (0, 1))
    ids = []
    for m in range(len(by_rank[0, 0])):
        for d in range(dp_size):
            whole = unshard([by_rank[d, c][m] for c in range(cp_size)], dim=1)[0]
            window = WINDOW if (WINDOW, tuple(whole.tolist())) in rows else SHORT
            ids += [(window, rows[window, tuple(row)]) for row in whole.view(-1, window).tolist()]
    return ids


def test_a_run_stopped_twice_on_other_layouts_reads_every_sequence_once_in_the_order_of_the_unbroken_one(
    ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    unbroken = ids_of(data, ranks.run(consumed, 1, *of_run(data, tmp_path / "a", "topology.dp=1")))
    found = []
    for stop, sizes in ((3, ["topology.dp=4"]), (5, ["topology.cp=4"]), (8, ["topology.dp=2", "topology.cp=2"])):
        part = of_run(data, tmp_path / "b", *sizes, f"train.stop_after={stop}")
        found += ids_of(data, ranks.run(consumed, 4, *part))
    assert found == unbroken
    half = len(found) // 2
    assert sorted(found[:half]) == sorted(found[half:]) == sorted({*found})
    windows = [line["window"] for line in metrics(tmp_path / "a")]
    assert windows == [line["window"] for line in metrics(tmp_path / "b")]
    assert [*chain(*([w] * (WINDOW // w * BATCH) for w in windows))] == [w for w, _ in found]
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["tokens"] == other["tokens"]
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=0)


def test_a_resume_on_the_same_layout_is_the_unbroken_run_bit_for_bit(
    ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    layout = ["topology.dp=2", "topology.cp=2", "data.eval_sequences=1"]
    unbroken = ranks.run(consumed, 4, *of_run(data, tmp_path / "a", *layout))
    ranks.run(consumed, 4, *of_run(data, tmp_path / "b", *layout, "train.stop_after=5"))
    resumed = ranks.run(consumed, 4, *of_run(data, tmp_path / "b", *layout))
    assert same([state for _, _, state in unbroken], [state for _, _, state in resumed])
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a/evaluation.json").read_text() == (tmp_path / "b/evaluation.json").read_text()


def test_attention_that_cannot_keep_packed_sequences_apart_is_refused(
    ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    said = ranks.run(outcome_of, 1, *of_run(data, tmp_path, "attention=transformer_engine"))[0]
    assert said.startswith("ConfigError")
    assert "several windows" in said
