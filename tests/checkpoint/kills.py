"""Kill conversions at random moments and look at what they left: python -m tests.checkpoint.kills [KILLS]."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megalong.checkpoint.to_hf import megatron_to_hf
from megalong.checkpoint.to_megatron import hf_to_megatron
from tests.checkpoint.llamas import hf_config, save_hf

DIRECTIONS = {"to_megatron": hf_to_megatron, "to_hf": megatron_to_hf}

# Conversions one after another in a process of its own, which says when it begins; slow writes make hits likely.
SCRIPT = """
import sys, time
from pathlib import Path
from megalong.checkpoint import output
from megalong.checkpoint.to_hf import megatron_to_hf
from megalong.checkpoint.to_megatron import hf_to_megatron
write = output._write_all
def slow(handle, data):
    time.sleep(0.002)
    write(handle, data)
output._write_all = slow
print("begin", flush=True)
for target in sys.argv[3:]:
    dict(to_megatron=hf_to_megatron, to_hf=megatron_to_hf)[sys.argv[1]](Path(sys.argv[2]), Path(target))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a directory but those that name library versions."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("megalong.json", "checksums.json")
    }


def kill_conversions(scratch: Path, direction: str, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` processes while they convert; assert that what has a final name is whole, and that a rerun works.

    Returns:
        how many kills hit a conversion half-way (`interrupted`) and how many whole directories were found (`whole`).
    """
    save_hf(scratch / "hf", hf_config(num_hidden_layers=3), torch.bfloat16)
    hf_to_megatron(scratch / "hf", scratch / "megatron")
    megatron_to_hf(scratch / "megatron", scratch / "single")
    source, good = ("hf", "megatron") if direction == "to_megatron" else ("megatron", "single")
    expected = contents(scratch / good)
    draw, found = random.Random(seed), {"kills": kills, "interrupted": 0, "whole": 0}
    for attempt in range(kills):
        targets = [scratch / f"{attempt}-{n}" for n in range(200)]
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, direction, scratch / source, *targets], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(draw.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for target in targets:
            if target.exists():
                found["whole"] += 1
                assert contents(target) == expected, target
            partial = target.with_name(target.name + ".partial")
            if partial.exists():
                found["interrupted"] += 1
                assert not target.exists()
                DIRECTIONS[direction](scratch / source, target)
                assert contents(target) == expected, target
                assert not partial.exists()
    return found


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for direction in DIRECTIONS:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps({"direction": direction, **kill_conversions(Path(scratch), direction, kills, seed=1)}))


if __name__ == "__main__":
    main()
