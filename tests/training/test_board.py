"""TensorBoard itself, with either of its loaders, shows of two stages what a run wrote: all of it, each thing once."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.checkpoint import pointer
from megalong.checkpoint.info import read_info, write_info
from megalong.data.builtin import builtin_tokenizer
from megalong.runtime.errors import CheckpointError
from megalong.runtime.ranks import RankPool
from megalong.training.curves import DESCRIPTIONS, RESULTS, accuracy_tag, cards_of
from megalong.training.sequences import CACHE
from tests.llamas import hf_config, save_hf
from tests.training.runs import metrics, run_stage, stage_run

Ask = Callable[..., Any]
FIRST, SECOND = "65k/tensorboard", "262k/tensorboard"
STEPS = {FIRST: 3, SECOND: 2}
ASKED = ("recall",)


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 65k in two attempts, the first of which is cut off after a step that was not saved; 262k from it."""
    folder = tmp_path_factory.mktemp("runs")
    mini = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
    save_hf(folder / "base", hf_config(**mini, max_position_embeddings=32))
    shutil.copytree(builtin_tokenizer(CACHE, 512), folder / "base", dirs_exist_ok=True)
    first = ["train.steps=3", "data.eval_sequences=2", "train.global_batch_size=1", "model.vocab_size=512"]
    first += [f"evaluation.tasks=[{','.join(ASKED)}]", f"init_from={folder / 'base'}"]
    ranks.run(run_stage, 1, str(folder / "65k"), *first, "train.stop_after=2", "checkpoint.save_steps=1")
    pointer.set_aside(pointer.folder_of(folder / "65k/checkpoints", 2), "lost")
    ranks.run(run_stage, 1, str(folder / "65k"), *first)
    second = ["train.steps=2", *first[1:-1], f"init_from={folder / '65k'}"]
    ranks.run(second_stage, 1, str(folder / "262k"), *second)
    return folder


def second_stage(run_dir: str, *overrides: str) -> None:
    stage_run(run_dir, *overrides, stage="262k").run()


@pytest.fixture(scope="module", params=["true", "false"], ids=["data server", "python loader"])
def ask(runs: Path, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """A TensorBoard over both runs: plugin, route and query to what its page is given."""
    # a process of its own: tests that fork would meet the threads of its gRPC
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={runs}", "--port=0", f"--load_fast={request.param}"]
    board = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert board.stderr is not None
    url = next(found[0] for line in board.stderr if (found := re.search(r"http://\S+/", line)))

    def ask(route: str, body: Any = None, **query: str) -> Any:
        there = f"{url}data/plugin/{route}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        with urllib.request.urlopen(urllib.request.Request(there, data, headers)) as answer:
            found = answer.read()
        return found if found[:4] == b"\x89PNG" else json.loads(found)

    deadline = time.monotonic() + 60  # it reads in a thread of its own
    while time.monotonic() < deadline:
        found = ask("scalars/tags")
        if "evaluation_after/last_quarter_loss" in found.get(SECOND, {}) and f"{SECOND}/tokens" in found:
            break
        time.sleep(0.1)
    yield ask
    board.terminate()
    board.communicate()


def test_every_scalar_has_a_description_and_no_description_is_left_over(ask: Ask) -> None:
    seen = {}
    for tags in ask("scalars/tags").values():
        for tag, about in tags.items():
            seen[tag] = about["description"]
    # pages show Markdown as HTML
    assert {tag for tag, text in seen.items() if len(text) < 20} == set()
    assert seen.keys() == {*DESCRIPTIONS, *map(accuracy_tag, ASKED)}


def points(ask: Ask, run: str, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for _, step, value in ask("scalars/scalars", run=run, tag=tag)]


def test_every_step_stands_on_its_curve_once_though_one_was_done_twice(ask: Ask, runs: Path) -> None:
    for run, steps in STEPS.items():
        losses = [line["loss"] for line in metrics(runs / run.split("/")[0])]
        assert points(ask, run, "train/loss") == [(s + 1, pytest.approx(losses[s], rel=1e-6)) for s in range(steps)]


def test_the_token_axis_goes_on_over_stages(ask: Ask, runs: Path) -> None:
    found = {run: points(ask, f"{run}/tokens", "by_tokens/loss") for run in STEPS}
    assert [tokens for tokens, _ in found[FIRST]] == [256, 512, 768]
    assert [tokens for tokens, _ in found[SECOND]] == [768 + 1024, 768 + 2048]
    assert [v for _, v in found[SECOND]] == [v for _, v in points(ask, SECOND, "train/loss")]
    held_out = [t for run in STEPS for t, _ in points(ask, f"{run}/tokens", "by_tokens/held_out_last_quarter")]
    assert held_out == [0, 768, 768, 768 + 2048]
    info = read_info(pointer.folder_of(runs / "262k/checkpoints", 2))
    assert (info.tokens_before, info.tokens) == (768, 768 + 2048)


def test_predicted_and_actual_share_a_card_and_every_card_has_its_curves(ask: Ask) -> None:
    layout = ask("custom_scalars/layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for part in layout["category"] for chart in part["chart"]}
    assert [len(part["chart"]) for part in layout["category"]] == [len(cards) for cards in cards_of(ASKED).values()]
    for title, curves in charts.items():
        where = f"{SECOND}/tokens" if "by_tokens" in curves[0] else SECOND
        for curve in curves:
            found = ask("custom_scalars/scalars", run=where, tag=curve)["tag_to_events"]
            assert [len(events) > 0 for events in found.values()] == [True], (title, curve)
    assert [tag.rstrip("$").rpartition("_")[2] for tag in charts["seconds of a step"]] == ["predicted", "actual"]


def test_the_configuration_of_each_attempt_is_a_text(ask: Ask, runs: Path) -> None:
    texts = ask("text/text", run=FIRST, tag="config")
    assert [text["step"] for text in texts] == [0, 1]
    assert ["stop_after: 2" in text["text"] for text in texts] == [True, False]
    assert "<code" in texts[0]["text"]
    config = (runs / "65k/config.yaml").read_text()
    assert all(line.strip() in texts[1]["text"] for line in config.splitlines() if "'" not in line)


def test_settings_and_results_of_both_runs_stand_side_by_side(ask: Ask, runs: Path) -> None:
    experiment = ask("hparams/experiment", {})
    assert {"lr", "decay", "window", "cp"} <= {info["name"] for info in experiment["hparamInfos"]}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == set(RESULTS)
    request = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"], "colParams": []}
    request["colParams"] = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    groups = ask("hparams/session_groups", request)["sessionGroups"]
    windows = {group["name"]: group["hparams"]["window"] for group in groups}
    assert windows == {str(runs / "65k"): 256, str(runs / "262k"): 1024}
    for group in groups:
        assert {value["name"]["tag"] for value in group["metricValues"]} == set(RESULTS)


def test_each_evaluation_is_a_picture(ask: Ask) -> None:
    for run, steps in STEPS.items():
        found = ask("images/images", run=run, tag="evaluation/loss_by_position", sample="0")
        assert [image["step"] for image in found] == [0, steps]
        before, after = (ask("images/individualImage?" + image["query"]) for image in found)
        assert before[:4] == after[:4] == b"\x89PNG"
        assert before != after
        assert imread(BytesIO(after)).shape[0] > 300
        tags = ask("images/tags")[run]
        assert "before the stage and, once" in tags["evaluation/loss_by_position"]["description"]
        maps = ask("images/images", run=run, tag="evaluation/recall", sample="0")
        assert [image["step"] for image in maps] == [0, steps]
        assert "recall: share of answers found" in tags["evaluation/recall"]["description"]


def test_other_readers_find_the_scalars_where_they_always_were(runs: Path) -> None:
    board = EventAccumulator(str(runs / FIRST))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]


def test_tokens_of_a_checkpoint_that_did_not_count_them_begin_at_its_own(runs: Path, tmp_path: Path) -> None:
    info = read_info(pointer.folder_of(runs / "262k/checkpoints", 2))
    write_info(tmp_path, info)
    record = json.loads((tmp_path / "megalong.json").read_text())
    del record["tokens_before"]
    (tmp_path / "megalong.json").write_text(json.dumps(record))
    assert read_info(tmp_path).tokens == 2048
    record["consumed_samples"] = 2**62
    (tmp_path / "megalong.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="tokens="):
        read_info(tmp_path)
