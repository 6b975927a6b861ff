"""Is preparing data as fast as its parts (the tokenizer alone, the disk alone, a bare read), in bounded memory?

Real text (the Python sources of this machine, cut into documents, over again with a number in each so that none is a
copy) in SlimPajama's format. Rates of the two sides of a ratio are taken in turns and their medians are compared,
because other programs may be running; CPU seconds of both are given too.

    python benchmarks/data.py [--megabytes 60] [--memory-megabytes 2000] [--scratch /tmp] [--only tokenize ...]

The last line of stdout is one JSON object:
    tokenize    our tokenizing (reading, parsing, hashing, writing included) / tokenizers.encode_batch, same cores
    datatrove   the same / datatrove's reader and DocumentTokenizer, same shards and cores
    lay_out     choosing and writing, bytes/s / sequential write and fsync of as many bytes
    read        a rank's micro-batch of a 1M-token sequence, cp 16, cold / its bytes through a bare numpy memmap, cold
    memory      peak of all processes together (proportional set size) while so much text is tokenized
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zstandard
from tokenizers import Tokenizer

from megalong.attention.zigzag import chunk_ranges
from megalong.data.builtin import python_sources, train_tokenizer
from megalong.data.pipeline import tokenized
from megalong.data.pipeline.job import Job, checked, tasks_of, tokenize
from megalong.data.pipeline.run import lay_out
from megalong.data.pipeline.settings import Settings

CORES = len(os.sched_getaffinity(0))
WINDOW = 2**20
CP = 16


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="of text for the rates")
    parser.add_argument("--memory-megabytes", type=int, default=2000, help="of text for the memory")
    parser.add_argument("--lay-out-tokens", type=int, default=200_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--only", nargs="*", default=["tokenize", "datatrove", "lay_out", "read", "memory"])
    given = parser.parse_args()
    found: dict[str, Any] = {"cores": CORES, "machine": platform.machine(), "python": platform.python_version()}
    found["load"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="data-benchmark-") as name:
        scratch = Path(name)
        train_tokenizer(
            [t for _, t in zip(range(40), python_sources(10**7), strict=False)], 8192, _made(scratch / "tok")
        )
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "tokenize": lambda: against_tokenizers(scratch, given.megabytes, given.repeats),
            "datatrove": lambda: against_datatrove(scratch, given.megabytes, given.repeats),
            "lay_out": lambda: against_disk(scratch, given.lay_out_tokens, given.repeats),
            "read": lambda: against_numpy(scratch),
            "memory": lambda: memory(scratch, given.memory_megabytes),
        }
        for part in given.only:
            found[part] = parts[part]()
            print(f"{part}: {found[part]}", flush=True)
    print(json.dumps(found))


def shards(folder: Path, megabytes: int, count: int = 8) -> tuple[Path, list[str]]:
    """So much text in .jsonl.zst; and the texts, if there are at most 200 MB."""
    source = [t[i : i + 6000] for t in python_sources(12_000_000) for i in range(0, len(t), 6000)]
    kept: list[str] = []
    if not folder.exists():
        folder.mkdir()
    size, number = 0, 0
    per_shard = megabytes * 1_000_000 // count
    for shard in range(count):
        with zstandard.ZstdCompressor(3).stream_writer((folder / f"chunk_{shard:03}.jsonl.zst").open("wb")) as out:
            while size < (shard + 1) * per_shard:
                text = f"{number}\n{source[number % len(source)]}"
                number, size = number + 1, size + len(text)
                line = json.dumps({"text": text, "meta": {"redpajama_set_name": f"S{number % 5}"}})
                out.write(line.encode() + b"\n")
                if megabytes <= 200:
                    kept.append(text)
    return folder, kept


def job(scratch: Path, source: Path, name: str, **more: Any) -> Job:
    """Tokenize (and lay out) below `scratch/name`."""
    settings = Settings(
        source=str(source),
        out=str(scratch / name / "out"),
        source_key="meta.redpajama_set_name",
        estimate=False,
        **more,
    )
    return Job(settings, scratch / "tok", "benchmark", WINDOW, 1, 1, CORES)


def our_tokenizing(scratch: Path, source: Path, name: str) -> None:
    """Reading, parsing, tokenizing, hashing, writing whole folders."""
    plan = job(scratch, source, name)
    tokenize(plan, tasks_of(plan, checked(plan)), progress=False)


def against_tokenizers(scratch: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Ours / encode_batch on texts that are in memory."""
    source, texts = shards(scratch / "source", megabytes)
    warm, _ = shards(scratch / "warm", 1, 2)
    our_tokenizing(scratch, warm, "warm-up")  # processes start once, whatever follows
    plain = Tokenizer.from_file(str(scratch / "tok" / "tokenizer.json"))

    def alone() -> None:
        for start in range(0, len(texts), 1000):
            plain.encode_batch(texts[start : start + 1000], add_special_tokens=False)

    return in_turns(
        lambda i: our_tokenizing(scratch, source, f"ours-{i}"), lambda i: alone(), sum(map(len, texts)) / 1e6, repeats
    )


def against_datatrove(scratch: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Ours / datatrove's reader and tokenizer."""
    source, texts = shards(scratch / "source", megabytes)
    script = scratch / "trove.py"
    script.write_text(_DATATROVE)

    def theirs(i: int) -> None:
        command = [
            sys.executable,
            str(script),
            str(source),
            str(scratch / f"trove-{i}"),
            str(scratch / "tok"),
            str(CORES),
        ]
        _program(command)

    def ours(i: int) -> None:  # a program of its own too
        words = ["-c", _OURS, str(scratch), str(source), f"alone-{i}"]
        _program([sys.executable, *words])

    return in_turns(ours, theirs, sum(map(len, texts)) / 1e6, repeats)


def against_disk(scratch: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """Choosing and laying out tokens that are there / writing as many zeros."""
    source = _made(scratch / "synthetic")
    (source / "a.jsonl").write_text('{"text": "a", "meta": {"redpajama_set_name": "S0"}}\n')
    plan = job(scratch, source, "laid", sequences=tokens // WINDOW * 9 // 10)
    (task,) = tasks_of(plan, checked(plan))
    _synthetic(_made(task.folder), tokens)
    nbytes = plan.settings.sequences * WINDOW * 4 / 1e6  # type: ignore[operator]

    def ours(i: int) -> None:
        shutil.rmtree(plan.out, ignore_errors=True)
        lay_out(plan, checked(plan), [task])

    def disk(i: int) -> None:
        block = b"\0" * 2**22
        with (scratch / "disk").open("wb") as file:
            for _ in range(int(nbytes * 1e6) // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        (scratch / "disk").unlink()

    return in_turns(ours, disk, nbytes, repeats)


def _synthetic(folder: Path, tokens: int) -> None:
    """A tokenized shard of documents of 100 to 100,000 tokens."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(100), np.log(100_000), tokens // 10_000)).astype(np.int64)
    lengths = lengths[np.cumsum(lengths) <= tokens]
    total = int(lengths.sum())
    np.arange(total, dtype=np.uint32).__imod__(8192).tofile(folder / tokenized.TOKENS)
    hashes = random.integers(2**63, size=len(lengths), dtype=np.uint64) * np.uint64(2)
    columns = np.stack([hashes, hashes, np.cumsum(lengths) - lengths, lengths, np.arange(len(lengths)), 0 * lengths])
    said = tokenized.Report("synthetic", 0, 0, len(lengths), total, ["S0"], {}, {}, [], {"S0": []})
    tokenized.write(folder, columns.astype(np.uint64), said)


def against_numpy(scratch: Path) -> dict[str, Any]:
    """A rank's micro-batch / the bytes it is made of, each from a cold page cache. Needs `lay_out` to have run."""
    from megalong.data.dataset import SequenceDataset  # torch, which tokenizing does without
    from megalong.data.loader import assemble, pieces_of, read_memmap

    folder = scratch / "laid" / "out"
    for path in folder.glob("*.npy"):
        _forget(path)  # before it is mapped: what is mapped stays
    dataset = SequenceDataset(folder)
    times: dict[str, list[float]] = {"ours": [], "numpy": [], "ours_warm": [], "numpy_warm": []}
    for sequence in range(len(dataset)):  # each is read by one of the two, so that both find it cold
        ranges = chunk_ranges(WINDOW, CP, sequence // 2 % CP)
        path, row = dataset.location(sequence)
        mapped = np.load(path, mmap_mode="r")

        def bare(mapped: Any = mapped, row: int = row, ranges: Any = ranges) -> list[np.ndarray]:
            return [np.array(mapped[row, a : b + 1]) for a, b in ranges]

        def ours(sequence: int = sequence, ranges: Any = ranges) -> Any:
            pieces = pieces_of([sequence], WINDOW, ranges)
            (chunks,) = read_memmap(dataset, [pieces])
            return assemble(dataset, [sequence], pieces, chunks, "intra")

        name, read = ("ours", ours) if sequence % 2 else ("numpy", bare)
        for kind in (name, f"{name}_warm"):
            began = time.perf_counter()
            read()
            times[kind].append(time.perf_counter() - began)
    milliseconds = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return {"ratio": milliseconds["ours"] / milliseconds["numpy"], "milliseconds": milliseconds}


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def memory(scratch: Path, megabytes: int) -> dict[str, Any]:
    """Peak of this tool's processes together while text is tokenized; shared pages count once."""
    source, _ = shards(scratch / "large", megabytes, 20)
    words = [sys.executable, "-c", _OURS, str(scratch), str(source), "memory"]
    began = time.perf_counter()
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], _proportional(process.pid))
            time.sleep(0.3)

    thread = threading.Thread(target=watch)
    thread.start()
    process.wait()
    thread.join()
    assert process.returncode == 0
    return {"peak_gib": peak[0] / 2**30, "text_gb": megabytes / 1e3, "seconds": time.perf_counter() - began}


def _proportional(pid: int) -> int:
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def in_turns(ours: Callable[[int], None], theirs: Callable[[int], None], amount: float, repeats: int) -> dict[str, Any]:
    """Rates (MB/s) of both, by turns; the ratio of the medians, and that of CPU seconds."""
    wall: dict[str, list[float]] = {"ours": [], "theirs": []}
    cpu: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(repeats):
        for name, work in (("ours", ours), ("theirs", theirs)):
            before, began = _cpu(), time.perf_counter()
            work(i)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(_cpu() - before)
    rate = {name: amount / statistics.median(t) for name, t in wall.items()}
    seconds = {name: statistics.median(t) for name, t in cpu.items()}
    return {
        "ratio": rate["ours"] / rate["theirs"],
        "cpu_ratio": seconds["theirs"] / seconds["ours"] if seconds["ours"] else None,
        "mb_per_s": rate,
        "cpu_s": seconds,
        "runs": wall,
    }


def _program(command: list[str]) -> None:
    """Run a program, and wait for the processes that it leaves behind too, so that their CPU seconds are counted."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: they become ours
    before = {child.pid for child in psutil.Process().children()}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    for child in psutil.Process().children():
        if child.pid not in before:
            os.waitpid(child.pid, 0)


def _cpu() -> float:
    """CPU seconds of this process, of those that ended, and of those that live below it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(u.ru_utime + u.ru_stime for u in used)
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


_OURS = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from benchmarks.data import our_tokenizing
our_tokenizing(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""

_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    source, out, tokenizer, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(source, glob_pattern="*.jsonl.zst", compression="zstd"),
            DocumentTokenizer(out, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|end_of_text|>",
                              shuffle_documents=False),
        ],
        tasks=8, workers=int(workers), logging_dir=out + "-logs",
    ).run()
"""

if __name__ == "__main__":
    main()
