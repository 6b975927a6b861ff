"""Layouts on a slow network: does the one that the planner prefers win, and by the factor it predicts?

Network namespaces stand for nodes: inside one, ranks talk over loopback; between them a rate-limited link is the
network interface. The real trainer runs over them on CPU ranks in several layouts, and `tools/plan.py calibrate`
measures the same namespaces for the planner's prediction:

- `one ring`: all ranks in one ring, across the nodes;
- `rings inside`: a ring in each node, data parallel across;
- `rings inside, ranks dealt out`: the same layout with neighbouring ranks on different nodes (a bad order);
- `heads inside`: one group of all ranks, head exchange inside the nodes, ring across (a2a+p2p).

  python benchmarks/topology.py [rates=50,200] [nodes=2] [per_node=2] [steps=2] [picture=p.png]   (Mbit/s; needs root)

The last line of stdout is a JSON object with every figure. Without the right to make namespaces it says so and ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalong.config.cluster import ClusterConfig, load_cluster
from megalong.planning.plan import Plan, make_plan
from megalong.planning.workload import workload_of
from megalong.recipe.resolve import run_of
from megalong.topology.placement import cyclic_order

REPO = Path(__file__).resolve().parents[1]

# A window that is long for the model, with as many key-value heads as heads: much to carry for little computing.
MODEL = [
    "+stage=1048k",
    "+scale=mini",
    "model.num_key_value_heads=8",
    "model.num_hidden_layers=2",
    "model.tie_word_embeddings=true",
    "train.global_batch_size=4",
    "data.eval_sequences=0",
    "checkpoint.save_steps=0",
]


@dataclass(frozen=True)
class Case:
    """One layout on the nodes."""

    name: str
    overrides: tuple[str, ...]
    dealt: bool = False
    """Neighbouring ranks on different nodes."""


def cases(nodes: int, per_node: int) -> list[Case]:
    ranks = nodes * per_node
    inside = (f"topology.cp={per_node}", f"topology.dp={nodes}", "topology.tp=1", "topology.pp=1")
    whole = (f"topology.cp={ranks}", "topology.dp=1", "topology.tp=1", "topology.pp=1")
    heads = (
        "attention.cp_comm_type=a2a+p2p",
        f"attention.hierarchical_context_parallel_sizes=[{per_node},{nodes}]",
    )
    return [
        Case("one ring", whole),
        Case("rings inside", inside),
        Case("rings inside, ranks dealt out", inside, dealt=True),
        Case("heads inside", (*whole, *heads)),
    ]


class Nodes:
    """Network namespaces joined by a switch, each with one rate-limited interface; removed on exit."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.prefix = f"ml{os.getpid() % 10000}"
        self.switch = f"{self.prefix}sw"

    def name(self, node: int) -> str:
        return f"{self.prefix}n{node}"

    def __enter__(self) -> Nodes:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for node in range(self.count):
            name, port = self.name(node), f"p{node}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self.switch)
            _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def limit(self, mbit: int) -> None:
        """Let every node send at most `mbit` Mbit/s."""
        for node in range(self.count):
            # the bucket holds 8 ms of the rate, two ticks of the slowest kernel clock: a smaller one would cut the rate
            shape = ["tbf", "rate", f"{mbit}mbit", "burst", f"{mbit}kb", "latency", "200ms"]
            _run(["tc", "-n", self.name(node), "qdisc", "replace", "dev", "eth0", "root", *shape])

    def __exit__(self, *_: object) -> None:
        for name in [self.switch, *(self.name(n) for n in range(self.count))]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def launch(nodes: Nodes, per_node: int, dealt: bool, command: list[str], port: int) -> None:
    """Run a command as one process per rank, each in the namespace of its node; wait for all.

    Raises:
        RuntimeError: a rank failed; the text is the end of its output.
    """
    ranks = nodes.count * per_node
    slots = cyclic_order(ranks, per_node) if dealt else tuple(range(ranks))
    running = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(slots[rank] % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended
        inside = ["ip", "netns", "exec", nodes.name(slots[rank] // per_node), sys.executable, *command]
        running.append((subprocess.Popen(inside, env=env, cwd=REPO, stdout=log, stderr=subprocess.STDOUT), log))
    try:
        codes = [process.wait(timeout=1200) for process, _ in running]
    finally:
        for process, _ in running:
            process.kill()
    for rank, (code, (_, log)) in enumerate(zip(codes, running, strict=True)):
        if code:
            log.seek(0)
            raise RuntimeError(f"rank {rank} of {command[0]} ended with {code}:\n{log.read()[-2000:]}")


def measured_step(nodes: Nodes, per_node: int, case: Case, steps: int, folder: Path, port: int) -> float:
    """Seconds of the trainer's fastest step after the first: other work on the machine drops out."""
    run_dir = folder / f"run-{port}"
    command = ["megalong/pretrain.py", *MODEL, *case.overrides, f"train.steps={steps + 1}", f"run_dir={run_dir}"]
    launch(nodes, per_node, case.dealt, command, port)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(run_dir)
    return min(json.loads(line)["seconds"] for line in lines[1:])


def predicted(case: Case, cluster: ClusterConfig, ranks: int, per_node: int) -> Plan:
    run = run_of([*MODEL, *case.overrides], ranks)
    return make_plan(workload_of(run, "cpu"), cluster, cyclic_order(ranks, per_node) if case.dealt else None)


def main(rates: list[int], count: int, per_node: int, steps: int) -> dict[str, Any]:
    """Measure and predict at every rate."""
    todo = cases(count, per_node)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, Nodes(count) as nodes:
        folder, port = Path(temporary), 29600
        for rate in rates:
            nodes.limit(rate)
            path = folder / f"measured-{rate}.yaml"
            calibrate = ["tools/plan.py", "calibrate", f"name=netns-{rate}", f"file={path}"]
            calibrate += [f"gpus_per_node={per_node}", *MODEL, *todo[0].overrides]
            launch(nodes, per_node, False, calibrate, port)
            cluster = load_cluster(path)
            print(
                f"{rate} Mbit/s between {count} nodes of {per_node} ranks; calibrated: "
                f"{cluster.nic_gbs.value * 8e3:.0f} Mbit/s across, {cluster.node_gbs.value:.2f} GB/s inside",
                flush=True,
            )
            rows = []
            for case in todo:
                port += 1
                seconds = measured_step(nodes, per_node, case, steps, folder, port)
                plan = predicted(case, cluster, count * per_node, per_node)
                rows.append(
                    {
                        "layout": case.name,
                        "measured_s": seconds,
                        "predicted_s": plan.step_s,
                        "predicted_terms_s": asdict(plan.step.seconds),
                    }
                )
                print(f"  {case.name:<30} measured {seconds:7.2f} s   predicted {plan.step_s:7.2f} s", flush=True)
            facts = {name: fact.value for name, fact in cluster.facts().items() if fact.tag == "measured"}
            found.append({"mbit": rate, "steps": rows, "ratios": ratios(rows), "calibrated": facts})
            port += 1
    return {"nodes": count, "ranks_per_node": per_node, "rates": found}


PAIRS = (
    ("one ring", "rings inside"),
    ("rings inside, ranks dealt out", "rings inside"),
    ("heads inside", "rings inside"),
    ("one ring", "heads inside"),
)


def ratios(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """One layout's step against another's, measured and predicted."""

    def seconds(name: str, key: str) -> float:
        return float(str(next(r[key] for r in rows if r["layout"] == name)))

    found = []
    for slow, fast in PAIRS:
        measured, expected = (seconds(slow, key) / seconds(fast, key) for key in ("measured_s", "predicted_s"))
        found.append(
            {
                "layout": slow,
                "against": fast,
                "slower_measured": measured,
                "slower_predicted": expected,
                "predicted_over_measured": expected / measured,
            }
        )
        print(f"  {slow} : {fast} = {measured:.2f} measured, {expected:.2f} predicted", flush=True)
    return found


def draw(rates: list[dict[str, Any]], path: Path) -> None:
    """Measured beside predicted steps, one panel per rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(rates), figsize=(5 * len(rates), 4.2), squeeze=False)
    for axis, found in zip(axes[0], rates, strict=True):
        names = [row["layout"].replace(", ", ",\n").replace(" inside", "\ninside") for row in found["steps"]]
        for shift, key, colour in ((-0.2, "measured_s", "tab:blue"), (0.2, "predicted_s", "tab:orange")):
            places = [i + shift for i in range(len(names))]
            bars = axis.bar(
                places, [row[key] for row in found["steps"]], 0.4, color=colour, label=key.removesuffix("_s")
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{found['mbit']} Mbit/s between nodes", fontsize=10)
        axis.set_ylabel("seconds per step")
        axis.margins(y=0.2)
        axis.legend(frameon=False, ncols=2, loc="upper center")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def obstacle() -> str | None:
    """Why this machine cannot emulate a network; None if it can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: apt-get install iproute2)"
    try:
        with Nodes(1) as nodes:
            nodes.limit(100)
    except OSError as error:
        return f"no right to make network namespaces: {error}"
    return None


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    why = obstacle()
    if why:
        print(json.dumps({"skipped": why}))
    else:
        result = main(
            [int(r) for r in options.get("rates", "50,200").split(",")],
            int(options.get("nodes", 2)),
            int(options.get("per_node", 2)),
            int(options.get("steps", 2)),
        )
        if "picture" in options:
            draw(result["rates"], Path(options["picture"]))
        print(json.dumps(result))
