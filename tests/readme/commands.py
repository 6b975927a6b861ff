"""The commands of README.md, in order, and what is done with each to see that it runs as printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MINI = " +scale=mini train.steps=2 data.eval_sequences=0"


@dataclass(frozen=True)
class Command:
    """One command, perhaps of several lines."""

    text: str
    output: str = ""
    """What README shows of its output."""

    @property
    def plain(self) -> str:
        """On one line, without comments, if it has no here-document."""
        if "<<" in self.text:
            return self.text
        joined = " ".join(line.split(" # ")[0].rstrip("\\ ") for line in self.text.splitlines())
        return " ".join(joined.split())


@dataclass(frozen=True)
class Treatment:
    """How a command is tried."""

    pattern: str
    """Regular expression that stands at its beginning."""
    replace: tuple[tuple[str, str], ...] = ()
    """Pieces of it, and what stands in their place: sizes, mostly."""
    add: str = ""
    code: int = 0
    skipped: str = ""
    """Why it is not run at all."""

    def applied(self, command: Command) -> str:
        """The command as it is run."""
        if not self.replace and not self.add:
            return command.text
        text = command.plain
        for piece, other in self.replace:
            assert piece in text, (piece, text)
            text = text.replace(piece, other)
        return text + self.add


_ONE = (("torchrun --nproc-per-node 8", "torchrun --standalone --nproc-per-node 2"),)
_NODES = "torchrun --nnodes {} --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500"

TREATMENTS = (
    Treatment(r"make demo", skipped="takes minutes, and is what a maintainer looks at"),
    Treatment(r"make test", skipped="is what runs this"),
    Treatment(r"source \.venv/bin/activate", skipped="the environment is that of this test"),
    Treatment(r"torchrun --nproc-per-node 8 \S+ \+stage=65k", _ONE, MINI),
    Treatment(r"torchrun --nnodes 4 .* \+stage=262k", ((_NODES.format(4), "python"),), MINI),
    Treatment(r"python megalong/pretrain\.py \+stage=65k \+scale=mini$"),
    Treatment(
        r"torchrun --nproc-per-node 8 \S+ \+stage=1048k \+scale=mini",
        (("torchrun --nproc-per-node 8", "torchrun --standalone --nproc-per-node 8"),),
        " --cfg job",  # eight ranks that import torch would take a minute on two cores
    ),
    Treatment(r"python megalong/pretrain\.py \+stage=65k \+scale=mini --cfg$"),
    Treatment(r"python megalong/pretrain\.py -m "),
    Treatment(r'eval "\$\(python megalong/pretrain\.py -sc install=bash\)"'),
    Treatment(r"mkdir -p mine/stage$"),
    Treatment(r"cat > mine/stage/128k\.yaml <<EOF"),
    Treatment(r"python tools/plan\.py --config-dir mine"),
    Treatment(r"python megalong/pretrain\.py --config-dir mine"),
    Treatment(r"torchrun --nnodes 2 ", ((_NODES.format(2), "python"),), " --cfg job"),
    Treatment(
        r"torchrun --nproc-per-node 8 tools/find_theta\.py",
        (("torchrun --nproc-per-node 8 tools/find_theta.py", "python megalong/pretrain.py"), (" budget=200000000", "")),
        " --cfg job",  # its other words are the trainer's; the search itself: tests/evaluation
    ),
    Treatment(r"python tools/evaluate\.py runs/1048k", (), " --tasks needle --lengths 1024 --samples 1 --count 1"),
    Treatment(r"python tools/evaluate\.py sample", (("--length 4096", "--length 1000"),), " --tokens 2"),
    Treatment(r"python tools/verify\.py \+stage=65k"),
    Treatment(r"python tools/plan\.py \+stage=1048k$"),
    Treatment(r"python tools/convert\.py hf-to-megatron"),
    Treatment(r"python tools/convert\.py megatron-to-hf"),
    Treatment(r"python tools/convert\.py verify"),
    Treatment(r"python tools/convert\.py inspect"),
    Treatment(r"python tools/convert\.py diff", code=1),  # as diff(1): they differ
    Treatment(r"python tools/convert\.py from-meta"),
    Treatment(r"python tools/convert\.py megatron-to-gguf"),
    Treatment(r"python tools/card\.py runs/1048k$"),
    Treatment(r"python tools/doctor\.py machine kernels$", (), " --out outputs/doctor"),
    Treatment(
        r"python tools/prepare_data\.py \+stage=1048k",
        (("prepare_data.py +stage=1048k", "prepare_data.py plan +stage=1048k"),),
        " +scale=mini data.estimate=false data.out=data/planned",  # its text is too small for the long documents
    ),
    Treatment(r"python tools/prepare_data\.py check data/1048k"),
    Treatment(r"python tools/prepare_data\.py texts/ "),
    Treatment(r"python tools/prepare_data\.py \+stage=65k \+scale=mini"),
    Treatment(r"python tools/prepare_data\.py check outputs/data/65k"),
    Treatment(r"slurm/stage\.sbatch --dry-run"),
    Treatment(r"slurm/recipe\.sh --dry-run"),
)


def commands(readme: str) -> Iterator[Command]:
    """Every command of the blocks marked ```bash, and of those marked ```console, where it follows a `$`."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.M | re.S):
        assert kind in ("bash", "console", "text", "python"), f"a block of README.md is marked {kind!r}"
        if kind == "bash":
            yield from map(Command, _split(block))
        if kind == "console":
            for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
                text, _, output = part.partition("\n")
                yield Command(text, output)


def _split(block: str) -> Iterator[str]:
    """Lines that belong together: continued ones, and here-documents."""
    lines = iter(block.splitlines())
    for line in lines:
        text = [line]
        while text[-1].endswith("\\"):
            text.append(next(lines))
        if mark := re.search(r"<<(\w+)", line):
            while text[-1] != mark[1]:
                text.append(next(lines))
        if line.strip():
            yield "\n".join(text)


def treatment_of(command: Command) -> Treatment:
    """How a command is tried; there is exactly one treatment."""
    found = [treatment for treatment in TREATMENTS if re.match(treatment.pattern, command.plain)]
    assert len(found) == 1, f"tests/readme/commands.py has {len(found)} treatments for: {command.plain}"
    return found[0]


def shown(output: str) -> list[str]:
    """Lines of an output with numbers left out, which differ from machine to machine."""
    lines = [re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "N", " ".join(line.split())) for line in output.splitlines()]
    return [line for line in lines if line and line != "..."]
