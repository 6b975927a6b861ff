"""A conversion against a plain copy of the same bytes, and the memory that it needs.

Makes a synthetic bf16 checkpoint of Llama-3-8B's shape (random bytes, any number of layers; `--model` takes another of
conf/model) and times, each with a cold source: `cp` plus `sync`, `tools/convert.py hf-to-megatron`, `cp` again,
`megatron-to-hf`, `cp` once more, and `hf-to-gguf` for each `--gguf`. A conversion does more than `cp`: it hashes what
it writes (not a GGUF), checks what it reads, and syncs every file. Peak resident memory is what the kernel accounts to
the process. Results are compared with the source byte by byte (of a GGUF, the matrices whose rows keep their order).

    python benchmarks/convert.py --scratch /tmp --layers 8 --layers 32
    python benchmarks/convert.py --model llama3-70b --layers 2 --gguf bf16 --gguf q8_0
    python benchmarks/convert.py --trial hf-to-megatron --repeats 3 --layers 14

The last line puts every device of reading and writing on trial (`convert_devices.py`): `cp`, plain writing, and the
conversion with each device switched off, one after another in an order that is drawn anew for each repeat, so that
what else the machine does meets all of them. Medians over the repeats; what is left of a result in the page cache is
what other users' pages had to make room for.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from convert_devices import TRIAL, keep_only
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map

from megalong.checkpoint.checksums import read_checksums
from megalong.config.schema import ModelConfig
from megalong.convert.gguf_types import NAMES
from megalong.convert.safetensors_dir import INDEX
from megalong.convert.safetensors_plan import header, index_json, plan_files
from megalong.convert.source import as_bytes
from megalong.convert.table import hf_shapes
from megalong.convert.to_hf import MAX_SHARD_SIZE, megatron_to_hf
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import HuggingFaceWeights
from megalong.model.llama import model_to_hf
from megalong.runtime.resident import peak_resident_bytes

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "convert.py"
DTYPE = torch.bfloat16


def synthetic(folder: Path, layers: int, divide: int, name: str = "llama3-8b") -> int:
    """Write a Hugging Face directory of random bytes with a tokenizer; returns the bytes of its tensors."""
    shape = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()))
    model = replace(
        shape,
        num_hidden_layers=layers,
        vocab_size=shape.vocab_size // divide,
        hidden_size=shape.hidden_size // divide,
        intermediate_size=shape.intermediate_size // divide,
        num_attention_heads=shape.num_attention_heads // divide,
        num_key_value_heads=max(1, shape.num_key_value_heads // divide),
    )
    folder.mkdir(parents=True)
    for file in (ROOT / "examples" / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(model_to_hf(model), indent=2, sort_keys=True) + "\n")
    plans = plan_files(hf_shapes(model), DTYPE, MAX_SHARD_SIZE)
    random = np.random.default_rng(0)
    for plan in plans:
        with (folder / plan.name).open("wb") as file:
            file.write(header(plan, DTYPE))
            left = plan.nbytes(DTYPE)
            while left:
                count = min(left, 1 << 26)
                # without the exponent's highest bit no bf16 is NaN or infinity, which a conversion refuses
                values = random.integers(0, 1 << 16, count // DTYPE.itemsize, dtype=np.uint16) & 0xBFFF
                file.write(values.tobytes())
                left -= count
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


def timed(command: list[str] | Callable[[], None], source: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory of a process, as the kernel accounts them.

    Args:
        command: what to run, or a function to call in a fork of this process, which has imported everything already.
    """
    forget(source)
    begun = time.monotonic()
    if callable(command):
        process_id = forked(command)
    else:
        process_id = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid
    peak, pid = 0.0, 0
    while pid == 0:
        peak = max(peak, peak_resident_bytes(process_id) / 2**20)
        time.sleep(0.02)
        pid, status, usage = os.wait4(process_id, os.WNOHANG)
    seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"{command} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(seconds, 2),
        "user_seconds": round(usage.ru_utime, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "peak_rss_mib": round(peak, 1),
    }


def forked(work: Callable[[], None]) -> int:
    """Process id of a child that does some work and ends."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def copied(source: Path, scratch: Path) -> dict[str, float]:
    """`cp` plus `sync` of a directory."""
    target = scratch / "copy"
    result = timed(["sh", "-c", f"cp -r '{source}' '{target}' && sync -f '{target}'"], source)
    shutil.rmtree(target)
    return result


def converted(command: str, source: Path, target: Path, *options: str) -> dict[str, float]:
    """One conversion, by the tool itself."""
    return timed([sys.executable, str(TOOL), command, str(source), str(target), *options], source)


def as_gguf(hf: Path, scratch: Path, kind: str) -> dict[str, Any]:
    """`hf-to-gguf` beside `cp`."""
    out = scratch / f"{kind}.gguf"
    copy, made = copied(hf, scratch), converted("hf-to-gguf", hf, out, "--type", kind)
    found: dict[str, Any] = {**made, "gigabytes": round(out.stat().st_size / 1e9, 3), "cp_and_sync": copy}
    found["ratio_to_cp"] = round(made["seconds"] / copy["seconds"], 3)
    if kind == "bf16":
        found["bitwise_equal"] = same_matrices(hf, out)
    out.unlink()
    return found


def same_matrices(hf: Path, gguf: Path) -> bool:
    """Whether the matrices of a bf16 GGUF whose rows are in Hugging Face's order are those of the source."""
    stored = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    with HuggingFaceWeights(hf) as weights:
        names = get_tensor_name_map(MODEL_ARCH.LLAMA, weights.model.num_hidden_layers)
        for name, facts in weights.tensors.items():
            if len(facts.shape) == 1 or "q_proj" in name or "k_proj" in name:
                continue
            data = stored[names.get_name(name, try_suffixes=(".weight",)) or ""]
            for start in range(0, facts.shape[0], 1024):
                rows = weights.rows(name, start, min(facts.shape[0], start + 1024))
                if not np.array_equal(as_bytes(rows), data[start : start + 1024].reshape(-1).view(np.uint8)):
                    return False
    return True


def measure(scratch: Path, layers: int, divide: int, name: str, kinds: list[str]) -> dict[str, Any]:
    """All measurements of one size."""
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    nbytes = synthetic(hf, layers, divide, name)
    copies = [copied(hf, scratch)]
    to_megatron = converted("hf-to-megatron", hf, megatron)
    copies.append(copied(hf, scratch))
    to_hf = converted("megatron-to-hf", megatron, back)
    names = [path.name for path in hf.iterdir()]
    _, different, absent = filecmp.cmpfiles(hf, back, names, shallow=False)
    for folder in (megatron, back):
        shutil.rmtree(folder)
    ggufs = {kind: as_gguf(hf, scratch, kind) for kind in kinds}
    shutil.rmtree(hf)
    return {
        "model": name,
        "layers": layers,
        "gigabytes": round(nbytes / 1e9, 3),
        "bitwise_equal": not different and not absent,
        "cp_and_sync": copies,
        "hf_to_megatron": {**to_megatron, "ratio_to_cp": round(to_megatron["seconds"] / copies[0]["seconds"], 3)},
        "megatron_to_hf": {**to_hf, "ratio_to_cp": round(to_hf["seconds"] / copies[1]["seconds"], 3)},
        "hf_to_gguf": ggufs,
    }


def cached_mib(folder: Path) -> float:
    """MiB of a directory's files that the page cache holds, by util-linux' fincore."""
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    told = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", *files], capture_output=True)
    return round(sum(map(int, told.stdout.split())) / 2**20, 1)


def tried(command: str, source: Path, target: Path, on: tuple[str, ...]) -> dict[str, Any]:
    """One conversion with the devices of `on`; the SHA-256 of the files with weights are in the answer."""

    def work() -> None:
        keep_only(on)
        {"hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf}[command](source, target)

    result: dict[str, Any] = timed(work, source)
    result["target_cached_mib"], result["source_cached_mib"] = cached_mib(target), cached_mib(source)
    sums = read_checksums(target) or {}
    result["sums"] = {name: e["sha256"] for name, e in sums.items() if name.endswith((".distcp", ".safetensors"))}
    shutil.rmtree(target)
    os.sync()
    return result


def trial(scratch: Path, command: str, layers: int, divide: int, repeats: int, names: list[str]) -> dict[str, Any]:
    """`cp` and the variants of `names` against one another."""
    source = scratch / "hf"
    nbytes = synthetic(source, layers, divide)
    if command == "megatron-to-hf":
        converted("hf-to-megatron", source, scratch / "megatron")
        shutil.rmtree(source)
        source = scratch / "megatron"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("cp", *names)}
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(runs), len(runs)):
            one = copied(source, scratch) if name == "cp" else tried(command, source, scratch / "out", TRIAL[name])
            runs[name].append({**one, "load": round(os.getloadavg()[0], 1)})
            shown = {key: value for key, value in runs[name][-1].items() if key != "sums"}
            print(json.dumps({"repeat": repeat, "variant": name, **shown}), flush=True)
    sums = [run.pop("sums") for name in names for run in runs[name]]
    assert sums[0]
    assert all(one == sums[0] for one in sums), "the variants wrote different bytes"
    shutil.rmtree(source)
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
        for name, found in runs.items()
    }
    for name, median in medians.items():
        for other in ("cp", "plain"):
            # of the same repeat, so that both met much the same machine
            pairs = zip(runs[name], runs[other], strict=True)
            median[f"ratio_to_{other}"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)
    return {
        "benchmark": "convert, devices on trial",
        "command": command,
        "layers": layers,
        "gigabytes": round(nbytes / 1e9, 3),
        "repeats": repeats,
        "medians": medians,
        "seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="disk to measure on")
    parser.add_argument("--layers", type=int, action="append", help="layers of Llama-3-8B's shape; may be repeated")
    parser.add_argument("--model", default="llama3-8b", help="of conf/model")
    parser.add_argument("--gguf", action="append", choices=NAMES, help="types of GGUF to make (bf16); may be repeated")
    parser.add_argument("--divide", type=int, default=1, help="divides all widths, for a quick look")
    parser.add_argument("--trial", choices=["hf-to-megatron", "megatron-to-hf"], help="put the devices on trial")
    parser.add_argument("--variant", action="append", choices=list(TRIAL), help="of the trial, besides plain; repeated")
    parser.add_argument("--repeats", type=int, default=3, help="of the trial")
    arguments = parser.parse_args()
    if arguments.trial:
        names = list(dict.fromkeys(["plain", *(arguments.variant or TRIAL)]))
        with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="convert-") as scratch:
            layers = (arguments.layers or [14])[0]
            told = trial(Path(scratch), arguments.trial, layers, arguments.divide, arguments.repeats, names)
        print(json.dumps({**told, **machine()}))
        return
    results = []
    for layers in arguments.layers or [8, 32]:
        with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="convert-") as scratch:
            kinds = arguments.gguf or ["bf16"]
            results.append(measure(Path(scratch), layers, arguments.divide, arguments.model, kinds))
            print(json.dumps(results[-1], indent=1), flush=True)
    peaks = [max(r["hf_to_megatron"]["peak_rss_mib"], r["megatron_to_hf"]["peak_rss_mib"]) for r in results]
    both = [r[way]["ratio_to_cp"] for r in results for way in ("hf_to_megatron", "megatron_to_hf")]
    ggufs = [found for r in results for found in r["hf_to_gguf"].values()]
    summary = {
        "benchmark": "convert",
        "gguf_ratio_to_cp_worst": max(found["ratio_to_cp"] for found in ggufs),
        "gguf_peak_rss_mib": max(found["peak_rss_mib"] for found in ggufs),
        "gguf_peak_rss_limit_mib": 1024,
        "gguf_bitwise_equal": all(found.get("bitwise_equal", True) for found in ggufs),
        "ratio_to_cp_worst": max(both),
        "ratio_limit": 2.0,
        "peak_rss_mib": max(peaks),
        "peak_rss_limit_mib": 4096,
        "peak_rss_largest_over_smallest": round(max(peaks) / min(peaks), 3),
        "bitwise_equal": all(r["bitwise_equal"] for r in results),
        **machine(),
        "results": results,
    }
    print(json.dumps(summary))


def machine() -> dict[str, Any]:
    """What it was measured on, and how busy that is."""
    return {
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}",
    }


if __name__ == "__main__":
    main()
