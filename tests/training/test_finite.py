"""A gradient that is not finite: the step is as if it had never been, or the run stops with the rank named."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_of
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.training.finite import NonFiniteError
from megalong.training.loop import StageRun
from megalong.training.metrics import Metrics
from megalong.training.start import plan_data, plan_start


def poisoned_second_step(run_dir: str, policy: str, layout: list[str]) -> tuple[list, list, str, int]:
    """Parameters and moments before and after a step in which rank 1 makes a NaN gradient."""
    overrides = ["+stage=65k", "+scale=mini", f"run_dir={run_dir}", f"train.non_finite={policy}", *layout]
    config = compose([*overrides, "model.num_hidden_layers=2", "data.eval_sequences=0"], dist.get_world_size())
    start = plan_start(config)
    data = plan_data(config, [])
    initialize(layout_of(config))
    stage = StageRun(config, start, *data)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    metrics, batches = Metrics(Path(run_dir), config, 0, stage.first), stage._batches()
    stage._train_one(batches, metrics)

    def state() -> list[torch.Tensor]:
        inner = stage.optimizer.chained_optimizers[0].optimizer
        moments = [v.clone() for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [p.detach().clone() for p in stage.model[0].parameters()] + moments

    before = state()
    if dist.get_rank() == 1:
        parameter = next(p for n, p in stage.model[0].named_parameters() if "linear_fc1" in n)
        parameter.register_hook(lambda grad: grad * float("nan"))
    message = ""
    try:
        stage._train_one(batches, metrics)
    except NonFiniteError as error:
        message = str(error)
    return before, state(), message, stage.skipped


@pytest.mark.parametrize("layout", [["topology.tp=2"], ["topology.cp=2"], ["topology.pp=2"]], ids=str)
def test_skip_leaves_weights_and_moments_as_they_were_on_every_rank(
    ranks: RankPool, tmp_path: Path, layout: list[str]
) -> None:
    for before, after, message, skipped in ranks.run(poisoned_second_step, 2, str(tmp_path), "skip", layout):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert (message, skipped) == ("", 1)


def test_stop_names_step_rank_and_samples(ranks: RankPool, tmp_path: Path) -> None:
    for *_, message, _ in ranks.run(poisoned_second_step, 2, str(tmp_path), "stop", ["topology.cp=2"]):
        assert "step 2: " in message
        assert "not finite on rank 1. Samples 4 to 7 of the run: sequences " in message
