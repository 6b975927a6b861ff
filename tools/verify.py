"""Prove a layout: `python tools/verify.py +stage=65k +scale=mini topology.cp=4 attention.cp_comm_type=a2a ...`.

Runs the configured layout and one rank on the same weights and sequences, on CPU ranks that it starts itself, and
prints loss, the worst gradient of each parameter, and the canary. Sizes left out are 1. Exit code 0 only within
tolerance, 1 outside it, 2 for a mistake in what was asked for.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_of
from megalong.runtime.errors import EXIT_USER_ERROR, UserError

SIZES = ("tp", "cp", "pp", "dp")
# fp32: what rounding in another order of summation leaves; bf16: its eight bits of mantissa, over some layers
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 5e-2)}


def main(overrides: list[str]) -> int:
    """Run the comparison; returns the exit code."""
    if not overrides or {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    if not any(o.startswith("precision=") for o in overrides):
        overrides = [*overrides, "precision=fp32"]
    given = dict(o.split("=", 1) for o in overrides if o.startswith("topology.") and "=" in o)
    world = math.prod(int(given.get(f"topology.{a}", 1)) for a in SIZES)
    complete = [*overrides, *(f"topology.{a}=1" for a in SIZES if f"topology.{a}" not in given)]
    config = compose(complete, world)
    alone = [o for o in overrides if not o.startswith(("topology.", "attention.cp_comm", "attention.hier"))]
    alone += [f"topology.{a}=1" for a in SIZES]
    print(f"{layout_of(config)}, {config.attention.cp_comm_type}, kernel {config.attention.kernel}, ", end="")
    print(f"documents {config.attention.document_mask}, {config.precision}, window {config.stage.seq_length:,}")

    from megalong.runtime.ranks import RankFailed, RankPool
    from megalong.training.verify import compare, measure_on_rank, random_hf

    with tempfile.TemporaryDirectory(prefix="megalong-verify-") as folder, RankPool() as pool:
        hf_dir = config.init_from or random_hf(config, Path(folder))
        try:
            expected = pool.run(measure_on_rank, 1, alone, str(hf_dir), timeout_s=3000)[0]
            found = pool.run(measure_on_rank, world, complete, str(hf_dir), timeout_s=3000)[0]
        except RankFailed as error:
            text = str(error)
            print(f"FAILED: {text[text.find('CanaryError: ') + 13 :] if 'CanaryError' in text else text}")
            return 1
    return 0 if compare(expected, found, *TOLERANCE[config.precision]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"\nmegalong: {error}\n", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
