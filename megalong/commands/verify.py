"""Prove a layout against one rank, on CPU, before it is trusted with GPUs.

Example: python tools/verify.py +stage=65k +scale=mini topology.cp=4 attention.cp_comm_type=a2a

Runs the configured layout and one rank on the same weights and sequences, on CPU ranks that it starts itself, and
prints loss, the worst gradient of each parameter, and the canary. Sizes left out are 1. Exit code 0 only within
tolerance, 1 outside it, 2 for a mistake in what was asked for. Hydra's flags (--cfg, --info, --config-dir) are the
trainer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from megalong.recipe.command_line import answer, parse
from megalong.recipe.compose import to_yaml
from megalong.recipe.overrides import split
from megalong.recipe.resolve import run_of
from megalong.runtime.called import as_called
from megalong.runtime.errors import EXIT_USER_ERROR, UserError

SIZES = ("tp", "cp", "pp", "dp")
# fp32: what rounding in another order of summation leaves; bf16: its eight bits of mantissa, over some layers
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 5e-2)}


def main(overrides: list[str]) -> int:
    """Run the comparison; returns the exit code."""
    line = parse(overrides if overrides else ["--help"])
    # what is given twice counts as it is given last
    complete = [*line.added, *(f"topology.{a}=1" for a in SIZES), "precision=fp32", *line.words]
    code = answer(line, __doc__ or "", lambda: to_yaml(run_of(complete).config))
    if code is not None:
        return code
    run = run_of(complete)
    config, layout = run.config, run.layout
    ours = ("topology", "attention.cp_comm_type", "attention.hierarchical_context_parallel_sizes")
    alone = [*line.added, *(o for o in complete[len(line.added) :] if not split(o)[1].startswith(ours))] + [
        f"topology.{a}=1" for a in SIZES
    ]
    print(f"{layout}, {config.attention.cp_comm_type}, kernel {config.attention.kernel}, ", end="")
    print(f"documents {config.attention.document_mask}, {config.precision}, window {run.seq_length:,}")

    from megalong.runtime.ranks import RankFailed, RankPool
    from megalong.training.verify import compare, measure_on_rank, random_hf

    with tempfile.TemporaryDirectory(prefix="megalong-verify-") as folder, RankPool() as pool:
        hf_dir = config.init_from or random_hf(run, Path(folder))
        try:
            expected = pool.run(measure_on_rank, 1, alone, str(hf_dir), timeout_s=3000)[0]
            found = pool.run(measure_on_rank, layout.world_size, complete, str(hf_dir), timeout_s=3000)[0]
        except RankFailed as error:
            text = str(error)
            print(f"FAILED: {text[text.find('CanaryError: ') + 13 :] if 'CanaryError' in text else text}")
            return 1
    return 0 if compare(expected, found, *TOLERANCE[config.precision]) else 1


def command() -> int:
    """`megalong-verify`; exit code."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"\nmegalong: {as_called(str(error))}\n", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(command())
