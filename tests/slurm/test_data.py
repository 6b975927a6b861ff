"""A stage's data as an array job on a real Slurm: the bytes of one process, and what is refused never starts."""

import re
from pathlib import Path

import pytest

from megalong.data.pipeline.run import prepare_stage
from megalong.recipe.preparation import job_of
from tests.data import corpus
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.long


def words(source: Path, out: Path, tokenizer: Path) -> list[str]:
    return [
        *("+stage=65k", "+scale=mini", f"data.source={source}", f"data.out={out}", f"data.tokenizer={tokenizer}"),
        *("data=upsampled", "data.long_from=300", "data.eval_fraction=0.1"),
    ]


def start(cluster: Cluster, *more: str) -> dict[str, str]:
    """Name -> job number of what is submitted, four array tasks of one core each."""
    said = cluster.run("slurm/data.sh", "--array=0-3", "--cpus-per-task=1", *more)
    return dict(re.findall(r"([\w-]+): job (\d+)", said))


@pytest.mark.timeout(600)
def test_an_array_job_writes_the_same_bytes_as_one_process(cluster: Cluster, tmp_path: Path) -> None:
    of = corpus.texts()
    tokenizer = corpus.make_tokenizer(tmp_path / "tokenizer", of)
    source = corpus.make_shards(tmp_path / "source", corpus.records(of), 6)
    jobs = start(cluster, *words(source, tmp_path / "array" / "out", tokenizer))
    assert list(jobs) == ["tokenize", "lay-out"]
    ended = cluster.ended(jobs["lay-out"])
    logs = "".join(p.read_text() for p in (tmp_path / "array" / "logs").glob("*.log"))
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), logs
    assert set(re.findall(r"task (\d) of 4: \d of 6 shards", logs)) == {"0", "1", "2", "3"}
    prepare_stage(job_of(words(source, tmp_path / "one" / "out", tokenizer), workers=1), progress=False)
    for name in ("out", "tokenized"):
        found = [
            {
                p.relative_to(tmp_path / where): p.read_bytes()
                for p in (tmp_path / where / name).rglob("*")
                if p.is_file()
            }
            for where in ("array", "one")
        ]
        assert found[0] == found[1]


def test_what_the_tool_refuses_is_not_submitted(cluster: Cluster, tmp_path: Path) -> None:
    of = corpus.texts(60)
    tokenizer = corpus.make_tokenizer(tmp_path / "tokenizer", of)
    source = corpus.make_shards(tmp_path / "source", corpus.records(of), 2)
    with pytest.raises(AssertionError, match="Too little data for the stage"):
        start(cluster, *words(source, tmp_path / "out", tokenizer), "train.steps=9000")
    assert not (tmp_path / "logs").exists()
