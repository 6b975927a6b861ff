"""How long does a conversion take against a plain copy of the same bytes, and how much memory does it need?

Makes a synthetic bf16 checkpoint of Llama-3-8B's shape (random bytes, any number of layers) and times, each with a
cold source: `cp` plus `sync`, `tools/convert.py hf-to-megatron`, `cp` again, `megatron-to-hf`. A conversion does more
than `cp`: it hashes what it writes, checks what it reads, and syncs every file. Peak resident memory is what the
kernel accounts to the process. Both results are compared with the source byte by byte.

    python benchmarks/convert.py --scratch /tmp --layers 8 --layers 32

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalong.checkpoint.hf import hf_shapes
from megalong.checkpoint.safetensors_dir import INDEX
from megalong.checkpoint.safetensors_plan import header, index_json, plan_shards
from megalong.checkpoint.to_hf import MAX_SHARD_SIZE
from megalong.config.schema import ModelConfig
from megalong.model.llama import model_to_hf

TOOL = Path(__file__).parent.parent / "tools" / "convert.py"
DTYPE = torch.bfloat16


def synthetic(folder: Path, layers: int, divide: int) -> int:
    """Write a Hugging Face directory of random bytes; returns the bytes of its tensors."""
    model = ModelConfig(
        num_hidden_layers=layers,
        vocab_size=128256 // divide,
        hidden_size=4096 // divide,
        intermediate_size=14336 // divide,
        num_attention_heads=32 // divide,
        num_key_value_heads=max(1, 8 // divide),
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_to_hf(model), indent=2, sort_keys=True) + "\n")
    plans = plan_shards(hf_shapes(model), DTYPE, MAX_SHARD_SIZE)
    random = np.random.default_rng(0)
    for plan in plans:
        with (folder / plan.name).open("wb") as file:
            file.write(header(plan, DTYPE))
            left = plan.nbytes(DTYPE)
            while left:
                piece = random.bytes(min(left, 1 << 26))
                file.write(piece)
                left -= len(piece)
            os.fsync(file.fileno())
    index = index_json(plans, DTYPE)
    if index is not None:
        (folder / INDEX).write_text(index)
    return sum(plan.nbytes(DTYPE) for plan in plans)


def forget(folder: Path) -> None:
    """Drop a directory's files from the page cache, so that every measurement reads them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timed(command: list[str], source: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory of a process, as the kernel accounts them."""
    forget(source)
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak, pid = 0.0, 0
    while pid == 0:
        # not ru_maxrss: after fork and exec it still counts the memory of the process that forked
        peak = max(peak, peak_resident_mib(process.pid))
        time.sleep(0.02)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"{' '.join(command)} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(seconds, 2),
        "user_seconds": round(usage.ru_utime, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "peak_rss_mib": round(peak, 1),
    }


def peak_resident_mib(pid: int) -> float:
    """High-water mark of a running process's resident memory; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def copied(source: Path, scratch: Path) -> dict[str, float]:
    """`cp` plus `sync` of a directory."""
    target = scratch / "copy"
    result = timed(["sh", "-c", f"cp -r '{source}' '{target}' && sync -f '{target}'"], source)
    shutil.rmtree(target)
    return result


def converted(command: str, source: Path, target: Path) -> dict[str, float]:
    """One conversion, by the tool itself."""
    return timed([sys.executable, str(TOOL), command, str(source), str(target)], source)


def measure(scratch: Path, layers: int, divide: int) -> dict[str, Any]:
    """All measurements of one size."""
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    nbytes = synthetic(hf, layers, divide)
    copies = [copied(hf, scratch)]
    to_megatron = converted("hf-to-megatron", hf, megatron)
    copies.append(copied(hf, scratch))
    to_hf = converted("megatron-to-hf", megatron, back)
    names = [path.name for path in hf.iterdir()]
    _, different, absent = filecmp.cmpfiles(hf, back, names, shallow=False)
    for folder in (hf, megatron, back):
        shutil.rmtree(folder)
    return {
        "layers": layers,
        "gigabytes": round(nbytes / 1e9, 3),
        "bitwise_equal": not different and not absent,
        "cp_and_sync": copies,
        "hf_to_megatron": {**to_megatron, "ratio_to_cp": round(to_megatron["seconds"] / copies[0]["seconds"], 3)},
        "megatron_to_hf": {**to_hf, "ratio_to_cp": round(to_hf["seconds"] / copies[1]["seconds"], 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="disk to measure on")
    parser.add_argument("--layers", type=int, action="append", help="layers of Llama-3-8B's shape; may be repeated")
    parser.add_argument("--divide", type=int, default=1, help="divides all widths, for a quick look")
    arguments = parser.parse_args()
    results = []
    for layers in arguments.layers or [8, 32]:
        with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="convert-") as scratch:
            results.append(measure(Path(scratch), layers, arguments.divide))
            print(json.dumps(results[-1], indent=1), flush=True)
    peaks = [max(r["hf_to_megatron"]["peak_rss_mib"], r["megatron_to_hf"]["peak_rss_mib"]) for r in results]
    both = [r[way]["ratio_to_cp"] for r in results for way in ("hf_to_megatron", "megatron_to_hf")]
    summary = {
        "benchmark": "convert",
        "ratio_to_cp_worst": max(both),
        "ratio_limit": 2.0,
        "peak_rss_mib": max(peaks),
        "peak_rss_limit_mib": 4096,
        "peak_rss_largest_over_smallest": round(max(peaks) / min(peaks), 3),
        "bitwise_equal": all(r["bitwise_equal"] for r in results),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}",
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
