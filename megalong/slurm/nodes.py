"""What a node says of itself before a run: GPUs, memory, disk, and the wire to the next node.

One task per node runs it (slurm/nodes.sh); it prints one JSON line, which `preflight.py` judges.
Without an NVIDIA driver nothing but the standard library is needed, and it takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalong.runtime.files import checkpoints_size
from megalong.slurm.start import this_start

GIB = 2**30
MIB = 2**20
LINK_BYTES = 64 * MIB
PRODUCT = 8192  # rows of the square bf16 product: large enough to reach what the GPU can do


@dataclass(frozen=True)
class Gpu:
    """One GPU as its node sees it."""

    free_gib: float
    total_gib: float
    tflops: float
    """Achieved on a bf16 product."""


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    node: str
    topology: str
    """SLURM_TOPOLOGY_ADDR: switches from the top and the node, joined by dots."""
    cuda: bool = False
    """Whether an NVIDIA driver is loaded."""
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None
    run_dir_error: str | None = None
    """Why run_dir is not the folder that the job uses, or cannot be written."""
    disk_gib: float = 0.0
    """Free for run_dir, and what its checkpoints hold already."""
    host_gib: float = 0.0
    """Host memory that is available."""
    link_gbs: float | None = None
    """GB/s sent to the next node in the job's list; None: no next node, or see link_error."""
    link_error: str | None = None


def measure(nodes: dict[str, str], token: Path, run_dir: Path, port: int, wait_s: float) -> NodeReport:
    """Measure this node.

    Args:
        nodes: all nodes of the job and their addresses, in the job's order.
        token: file that the job's first node has just written below run_dir, named after job and attempt.
        port: TCP port of the first node's listener; each further node has the next one.
        wait_s: seconds that neighbours wait for one another.
    """
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    link_gbs, link_error = _link(nodes, node, port, token.name, wait_s)
    cuda = Path("/dev/nvidiactl").exists()
    gpus, gpu_error = _gpus() if cuda else ((), None)
    error, disk = _disk(run_dir, token, node)
    return NodeReport(
        node=node,
        topology=os.environ.get("SLURM_TOPOLOGY_ADDR", node),
        cuda=cuda,
        gpus=gpus,
        gpu_error=gpu_error,
        run_dir_error=error,
        disk_gib=disk,
        host_gib=_available_memory() / GIB,
        link_gbs=link_gbs,
        link_error=link_error,
    )


def _disk(run_dir: Path, token: Path, node: str) -> tuple[str | None, float]:
    """Why run_dir will not do, and GiB of free space and of its own checkpoints, which later ones replace."""
    if not token.is_file():
        return f"{run_dir} is not the folder that the job's other nodes see (file system not mounted?)", 0.0
    probe = token.with_name(f"{token.name}.{node}")
    try:
        with probe.open("wb") as file:
            file.write(b"x" * MIB)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return f"{run_dir} cannot be written: {error.strerror}", 0.0
    return None, (shutil.disk_usage(run_dir).free + checkpoints_size(run_dir)) / GIB


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Free memory and speed of each GPU, one after another; a driver or GPU that fails is the reason."""
    try:
        import torch

        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                left, right = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
                for _ in range(5):
                    left @ right
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(20):
                    left @ right
                end.record()
                end.synchronize()
                tflops = 20 * 2 * PRODUCT**3 / begin.elapsed_time(end) / 1e9
                del left, right
                torch.cuda.empty_cache()
            found.append(Gpu(free / GIB, total / GIB, tflops))
        return tuple(found), None
    except (ImportError, RuntimeError) as error:
        return (), f"GPU check failed: {str(error).splitlines()[0]}"


def _link(nodes: dict[str, str], node: str, port: int, word: str, wait_s: float) -> tuple[float | None, str | None]:
    """Send to the next node of the ring while the one before sends here.

    Returns:
        GB/s to the next node, or why there is no figure.
    """
    names = list(nodes)
    if node not in nodes or len(names) < 2:
        return None, None
    index = names.index(node)
    following = names[(index + 1) % len(names)]
    deadline = time.monotonic() + wait_s
    server = threading.Thread(target=_receive, args=(port + index, word, deadline), daemon=True)
    server.start()
    try:
        rate = _send(nodes[following], port + names.index(following), word, deadline)
    except OSError as error:
        return None, f"no answer from {following} ({nodes[following]}): {error}"
    finally:
        server.join(max(0.0, deadline - time.monotonic()))
    return rate, None


def _receive(port: int, word: str, deadline: float) -> None:
    """Answer the neighbour of the same job; its silence is its own report's business."""
    try:
        with socket.create_server(("", port)) as listener:
            while (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(left)
                    if _read(peer, len(word)) == word.encode():
                        _read(peer, LINK_BYTES)
                        peer.sendall(b"k")
                        return
    except OSError:
        return


def _read(peer: socket.socket, count: int) -> bytes:
    """Read `count` bytes, or what comes before the other side closes."""
    pieces = []
    while count and (piece := peer.recv(min(count, MIB))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _send(address: str, port: int, word: str, deadline: float) -> float:
    """GB/s to a listener that may start some seconds later than we do."""
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())) as peer:
                peer.sendall(word.encode())
                block = bytes(MIB)
                begun = time.monotonic()
                for _ in range(LINK_BYTES // MIB):
                    peer.sendall(block)
                if peer.recv(1) != b"k":
                    raise ConnectionResetError("another program listens there")
                return LINK_BYTES / (time.monotonic() - begun) / 1e9
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def read_reports(text: str) -> list[NodeReport]:
    """Reports from JSON lines; other lines (warnings of a container start, for one) are left out."""
    found = []
    for line in text.splitlines():
        if not line.startswith('{"node"'):
            continue
        values: dict[str, Any] = json.loads(line)
        values["gpus"] = tuple(Gpu(**gpu) for gpu in values["gpus"])
        found.append(NodeReport(**values))
    return found


def main(arguments: list[str]) -> int:
    """Print the report of this node.

    Returns:
        exit code.
    """
    parser = argparse.ArgumentParser(prog="nodes")
    parser.add_argument("--nodes", required=True, help="name=address of every node, joined by commas")
    parser.add_argument("--token", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, default=this_start().neighbour_port)
    parser.add_argument("--wait-s", type=float, default=120.0)
    options = parser.parse_args(arguments)
    nodes = dict(pair.split("=", 1) for pair in options.nodes.split(","))
    report = measure(nodes, options.token, options.run_dir, options.port, options.wait_s)
    print(json.dumps(asdict(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
