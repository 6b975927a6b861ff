"""A gradient that is not finite: the step is as if it had never been, or the run stops with the rank named."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalong.model.gpt import build
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.training.agreement import Agreement
from megalong.training.finite import FiniteSteps, GradientWatch, NonFiniteError
from megalong.training.forward import forward_backward
from megalong.training.sequences import open_data
from megalong.training.start import plan_start
from megalong.training.state import load_state
from megalong.training.steps import steps
from megalong.training.verify import local_batches, synthetic_samples

NOTHING = Agreement(stop=False, save=False, written=True, kernel_seconds=(0.0,))


def poisoned_second_step(run_dir: str, policy: str, layout: list[str]) -> tuple[list, list, str, int]:
    """Parameters and moments before and after a step in which rank 1 makes a NaN gradient."""
    overrides = ["+stage=65k", "+scale=mini", f"run_dir={run_dir}", f"train.non_finite={policy}", *layout]
    run = run_of([*overrides, "model.num_hidden_layers=2", "data.eval_sequences=0"], dist.get_world_size())
    start = plan_start(run)
    run, data = open_data(run, [])
    initialize(run.layout)
    now = load_state(run, start, data.train)
    judge = FiniteSteps(run.config.train, GradientWatch(now.model), now.skipped)
    trained = steps(run, now, data.train, nullcontext)
    judge.look(next(trained), NOTHING)

    def state() -> list[torch.Tensor]:
        inner = now.optimizer.chained_optimizers[0].optimizer
        moments = [v.clone() for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [p.detach().clone() for p in now.model[0].parameters()] + moments

    before = state()
    if dist.get_rank() == 1:
        parameter = next(p for n, p in now.model[0].named_parameters() if "linear_fc1" in n)
        parameter.register_hook(lambda grad: grad * float("nan"))
    message = ""
    try:
        judge.look(next(trained), NOTHING)
    except NonFiniteError as error:
        message = str(error)
    return before, state(), message, judge.skipped


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


def culprits_by_step(overlap: bool, guilty: int) -> list[list[int]]:
    """Who is named after each of four steps; one rank makes a NaN in the third."""
    overrides = ["+stage=65k", "+scale=mini", "topology.dp=4", "train.global_batch_size=4"]
    run = run_of([*overrides, "model.num_hidden_layers=2"], dist.get_world_size())
    initialize(run.layout)
    model = build(run, overlap=overlap)
    watch = GradientWatch(model)
    finish = model[0].config.finalize_model_grads_func

    def late(*args: Any, **kwargs: Any) -> Any:
        """What was reduced during backward has arrived when the step is closed."""
        for group in model[0].bucket_groups:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()
        return finish(*args, **kwargs)

    model[0].config.finalize_model_grads_func = late
    weight = next(p for n, p in model[0].named_parameters() if "layers.1.mlp.linear_fc1" in n)
    named = []
    for step in range(4):
        planted = step == 2 and dist.get_rank() == guilty
        hook = weight.register_hook(lambda grad: grad * float("nan")) if planted else None
        batches = local_batches(run, synthetic_samples(run, seed=step))
        forward_backward(run.seq_length, model, batches, 1)
        if hook is not None:
            hook.remove()
        named.append(watch.culprits())
    return named


@pytest.mark.parametrize("overlap", [False, True], ids=["reduced after backward", "reduced during backward"])
def test_only_the_rank_at_fault_is_named_whenever_reduction_begins(ranks: RankPool, overlap: bool) -> None:
    assert ranks.run(culprits_by_step, 4, overlap, 2) == [[[], [], [2], []]] * 4
