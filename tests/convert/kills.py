"""Kill conversions at random moments and look at what they left: python -m tests.convert.kills [INTERRUPTIONS]."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalong.convert.to_gguf import hf_to_gguf
from megalong.convert.to_hf import megatron_to_hf
from megalong.convert.to_megatron import hf_to_megatron
from tests.convert.tokenizers_of_llamas import write_gpt2
from tests.llamas import hf_config, save_hf

DIRECTIONS: dict[str, Callable[..., None]] = {
    "to_megatron": hf_to_megatron,
    "to_hf": megatron_to_hf,
    "to_gguf": hf_to_gguf,
}

# Conversions one after another in a process of its own, which says when it begins; slow writes make hits likely.
SCRIPT = """
import sys, time
from pathlib import Path
from megalong.convert import output_folder
from megalong.convert.to_gguf import hf_to_gguf
from megalong.convert.to_hf import megatron_to_hf
from megalong.convert.to_megatron import hf_to_megatron
write = output_folder._write_all
def slow(handle, data):
    time.sleep(0.002)
    write(handle, data)
output_folder._write_all = slow
print("begin", flush=True)
way = sys.argv[1]
for target in sys.argv[3:]:
    dict(to_megatron=hf_to_megatron, to_hf=megatron_to_hf, to_gguf=hf_to_gguf)[way](Path(sys.argv[2]), Path(target))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a directory but those that name library versions; or the one file."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("megalong.json", "checksums.json")
    }


def kill_conversions(scratch: Path, direction: str, interruptions: int, seed: int) -> dict[str, int]:
    """Kill processes while they convert until so many kills hit a conversion half-way (`interruptions`).

    Asserts that what has a final name is whole, and that a rerun works.

    Returns:
        how many processes were killed (`kills`), how many of them half-way (`interrupted`) and how many whole
        directories were found (`whole`).
    """
    save_hf(scratch / "hf", hf_config(vocab_size=1024, num_hidden_layers=3), torch.bfloat16)
    write_gpt2(scratch / "hf")
    (scratch / "hf" / "README.md").write_text("---\nmodel_name: one name\n---\n")  # else a GGUF has its file's
    hf_to_megatron(scratch / "hf", scratch / "megatron")
    megatron_to_hf(scratch / "megatron", scratch / "single")
    hf_to_gguf(scratch / "hf", scratch / "file")
    goods = {"to_megatron": "megatron", "to_hf": "single", "to_gguf": "file"}
    source, good = "megatron" if direction == "to_hf" else "hf", goods[direction]
    expected = contents(scratch / good)
    draw, found = random.Random(seed), {"kills": 0, "interrupted": 0, "whole": 0}
    while found["interrupted"] < interruptions:
        attempt = found["kills"]
        assert attempt < 10 * interruptions, f"kills do not hit a conversion half-way: {found}"
        found["kills"] += 1
        targets = [scratch / f"{attempt}-{n}" for n in range(200)]
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, direction, scratch / source, *targets], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        while process.poll() is None and not any(scratch.glob(f"{attempt}-*")):
            time.sleep(0.001)  # a busy machine is slow to begin: the moment is drawn from where there is something
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
                if target.is_file():
                    target.unlink()
                elif target.exists():  # killed between getting its name and the last of the cleaning
                    shutil.rmtree(target)
                DIRECTIONS[direction](scratch / source, target)
                assert contents(target) == expected, target
                assert not partial.exists()
    return found


def main() -> None:
    interruptions = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for direction in DIRECTIONS:
        with tempfile.TemporaryDirectory() as scratch:
            found = kill_conversions(Path(scratch), direction, interruptions, seed=1)
            print(json.dumps({"direction": direction, **found}))


if __name__ == "__main__":
    main()
