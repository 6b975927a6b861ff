"""The configured cluster is compared with the machine that is here; `cluster=auto` reads it.

Memory, layout, time and MFU follow from the configured cluster. `check_this_machine` compares it with the devices
before anything else is done with it; `cluster=auto` takes name, devices per node and memory from the devices, nodes
from what started the ranks or from Slurm, and the facts of the card from a cluster file that has it: a measured one
first.
`cluster=<path>.yaml` takes a file wherever it lies.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from megalong.config.cluster import ClusterConfig, card, load_cluster
from megalong.config.schema import Config
from megalong.recipe.folders import find, names
from megalong.recipe.overrides import Overrides
from megalong.runtime import console
from megalong.runtime.errors import ConfigError

AUTO = "auto"
TOLERANCE = 0.05
"""Of memory: what drivers and error correction change is below it, what tells two cards apart above it."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The node that a process is on, as CUDA and the launcher report it."""

    gpu: str
    """Name of a device."""
    devices: int
    """Devices of the node."""
    memory_gib: float
    """Memory of one device."""
    host_memory_gib: float
    ranks: int = 1
    """Ranks that were started on the node."""
    world_size: int = 1
    """Ranks that were started in all."""
    nodes: int = 1
    """Nodes that torchrun started on, or Slurm has given the job."""


def differences(cluster: ClusterConfig, here: Machine) -> list[str]:
    """Where a cluster of GPUs is not this machine, one clause each with both values; empty where it is.

    A cluster may have more nodes than a run uses. Memory that others take belongs into `reserve_gib`, not into
    `memory_gib`, which is compared.
    """
    found = []
    if card(cluster.gpu) != card(here.gpu):
        found.append(f"its devices are {cluster.gpu}, and here is {here.gpu}")
    per_node = int(cluster.gpus_per_node.value)
    devices = max(here.devices, here.ranks)  # Slurm may show each task its own device only
    if per_node != devices:
        found.append(f"it has {per_node} devices per node, and this node has {devices}")
    elif here.world_size > here.ranks != per_node:
        found.append(f"it has {per_node} devices per node, and {here.ranks} ranks were started on this one")
    memory = cluster.memory_gib.value
    if abs(memory - here.memory_gib) > TOLERANCE * here.memory_gib:
        found.append(f"a device of it has {memory:.1f} GiB, and one here {here.memory_gib:.1f} GiB")
    if here.world_size > cluster.devices:
        found.append(f"it has {cluster.devices} devices in all, and {here.world_size} ranks were started")
    return found


def check_cluster(config: Config, here: Machine | None) -> list[str]:
    """The configured cluster is the one that the run is on.

    Args:
        here: None where there is no CUDA device.

    Returns:
        what should be known of a rehearsal on another kind of device.

    Raises:
        ConfigError: a cluster of GPUs is not the one that is here, or a full run is planned for CPU ranks.
    """
    cluster = config.cluster
    if here is None:
        wrong = cluster.device != "cpu"
        plan = f"cluster={cluster.name} describes {cluster.gpu}, and this run is on CPU ranks"
        return [f"{plan}: planned times and MFU are not theirs"] if wrong else []
    if cluster.device == "cpu":
        plan = f"cluster={cluster.name} describes CPU ranks, and here is {here.gpu}"
        if config.scale.name != "full":
            return [f"{plan}: planned times and MFU are not its; cluster=auto reads it"]
        found = [plan]
    else:
        found = differences(cluster, here)
    if found:
        raise ConfigError(
            f"cluster={cluster.name} is not this machine: {'; '.join(found)}. Memory, layout, time and MFU would be "
            "wrong. Give cluster=auto, which reads the devices, a file of conf/cluster that describes them, or the "
            "values that differ (cluster.gpus_per_node.value=...)."
        )
    return []


def this_machine(world_size: int | None) -> Machine | None:
    """The node that this process is on, for `world_size` ranks (None: one); None where there is no CUDA device."""
    from megalong.runtime import device, launch

    if not device.on_cuda():
        return None
    gpu, devices, memory_gib = device.cuda_devices()
    world = world_size or 1
    # a plan is made by one process for as many ranks as it is asked for: they would fill the node
    ranks = launch.ranks_per_node() or min(world, devices)
    return Machine(gpu, devices, memory_gib, device.host_memory_gib(), ranks, world, launch.nodes())


def check_this_machine(config: Config, world_size: int) -> None:
    """`check_cluster` for the node that this process is on; what should be known is said on stderr.

    Raises:
        ConfigError: the configured cluster is not this machine.
    """
    for line in check_cluster(config, this_machine(world_size)):
        console.warn(line)


def with_cluster(given: Overrides, here: Machine | None, added: Sequence[str] = ()) -> Overrides:
    """Replace `cluster=auto` by a file of conf/cluster and what the devices say; explicit settings stay the last word.

    Args:
        here: None where there is no CUDA device: the cluster of CPU ranks.
    """
    if here is None:
        return dataclasses.replace(given, groups={**given.groups, "cluster": "cpu"})
    per_node = max(here.devices, here.ranks)
    # a plan is made before anything is started: then the nodes of the job that it is made in count
    started = math.ceil(here.world_size / max(1, here.ranks if here.world_size > here.ranks else per_node))
    nodes = max(1, started, here.nodes)
    base = known_cluster(here.gpu, nodes, added)
    if base is None:
        console.warn(
            f"{here.gpu} is in no file of conf/cluster: its peak, bandwidths and efficiencies are assumed, and MFU is "
            "a share of an assumed peak. Measure it with tools/plan.py calibrate, and write its data sheet's peak down."
        )
    read = {
        "nodes": (nodes, "as started" if nodes == started else "as given by Slurm or torchrun"),
        "gpus_per_node": (per_node, "as CUDA reports it"),
        "memory_gib": (here.memory_gib, "as CUDA reports it"),
        "host_memory_gib": (here.host_memory_gib, "as the kernel reports it"),
    }
    values = [f"cluster.{k}={{value: {v:.10g}, tag: measured, source: '{source}'}}" for k, (v, source) in read.items()]
    pair = int(_facts(base or AUTO, added)["gpus_per_pair"]["value"])
    if per_node % pair:
        values.append(
            f"cluster.gpus_per_pair={{value: {math.gcd(pair, per_node)}, tag: assumed, source: fewer devices}}"
        )
    return Overrides(
        {**given.groups, "cluster": base or AUTO},
        values + given.values,
        {"cluster.name": AUTO, "cluster.gpu": here.gpu, **given.texts},
    )


def from_file(given: Overrides, added: Sequence[str] = ()) -> Overrides:
    """Replace `cluster=<path>.yaml` by what the file says; explicit settings stay the last word.

    A file that builds on others (`defaults`) is one of a `cluster/` folder and is chosen by its name.

    Raises:
        ConfigError: it is no cluster file.
    """
    cluster = load_cluster(given.groups["cluster"])
    values = [
        f"cluster.{name}={{value: {fact.value:.10g}, tag: {fact.tag}, source: {json.dumps(fact.source)}}}"
        for name, fact in cluster.facts().items()
    ]
    texts = {f"cluster.{name}": getattr(cluster, name) for name in ("name", "gpu")}
    device = [f"cluster.device={cluster.device}"]
    return Overrides(
        {**given.groups, "cluster": AUTO}, device + values + given.values, {**texts, **given.texts}, given.hydra
    )


def known_cluster(gpu: str, nodes: int, added: Sequence[str] = ()) -> str | None:
    """The file that has this card and the nearest number of nodes; of several, the one with most measured facts. None
    where none has the card."""
    found: dict[str, tuple[float, int]] = {}
    for name in names("cluster", added):
        facts = _facts(name, added)
        if name != AUTO and facts.get("device") != "cpu" and card(facts["gpu"]) == card(gpu):
            measured = sum(isinstance(fact, dict) and fact.get("tag") == "measured" for fact in facts.values())
            found[name] = (abs(math.log(facts["nodes"]["value"] / nodes)), -measured)
    return min(found, key=lambda name: found[name]) if found else None


def _facts(name: str, added: Sequence[str] = ()) -> dict[str, Any]:
    """A file of conf/cluster with those that it builds on, as plain values."""
    path = find("cluster", name, added)
    assert path is not None, name
    tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    found: dict[str, Any] = {}
    for before in tree.pop("defaults", []):
        found |= {} if before == "_self_" else _facts(before, added)
    return found | tree
