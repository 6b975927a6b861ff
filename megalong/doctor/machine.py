"""What is this machine, and what of it stops or slows a run? The inventory, and findings with their remedies."""

from __future__ import annotations

from megalong.doctor.part import Round
from megalong.doctor.result import NOT_RUN, NOTE, Check, held
from megalong.machine.finding import STOPS
from megalong.machine.remedies import findings


def run(visit: Round) -> list[Check]:
    """What is here, a line each; what stops runs fails."""
    machine = visit.machine
    visit.findings = findings(machine, visit.log, len(machine.gpus) or None)
    wrong = [f.name for f in visit.findings if f.weight == STOPS]
    cores = f"{machine.cpu}, {machine.cores} cores, {machine.host_memory_gib:.1f} GiB, {machine.numa_nodes} NUMA node"
    checks = [Check("host", NOTE, cores + ("s" if machine.numa_nodes > 1 else ""), f"Linux {machine.kernel}")]
    if machine.container:
        checks.append(Check("container", NOTE, machine.container))
    versions = {**machine.packages, **machine.libraries}
    there = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
    checks.append(Check("software", NOTE, there))
    absent = ", ".join(sorted(name for name, version in versions.items() if not version))
    checks.append(Check("not installed", NOTE, absent or "nothing"))
    if not machine.gpus:
        return [*checks, Check("GPUs", NOT_RUN, "; ".join(machine.not_told) or "none")]
    kinds = {gpu.name: 0 for gpu in machine.gpus}
    for gpu in machine.gpus:
        kinds[gpu.name] += 1
    named = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    driver = ", ".join(f"{key} {value}" for key, value in machine.driver.items())
    checks.append(Check("GPUs", NOTE, named, driver))
    if len(machine.gpus) > 1:
        joined = ", ".join(f"{count} pairs {word}" for word, count in machine.links.between_gpus().items())
        checks.append(Check("links", NOTE, joined or "not told", f"pairs of {machine.links.pair_size()} per switch"))
        peer = {True: "yes", False: "no", None: "not asked"}[machine.peer_access]
        checks.append(Check("peer access", NOTE, peer, "CUDA"))
    unknown = "; ".join(machine.not_told)
    found = f"{len(wrong)} findings: {', '.join(wrong)}" if wrong else f"none of {len(visit.findings)} findings"
    checks.append(held("nothing stops a run", not wrong, found, f"not told: {unknown}" if unknown else ""))
    return checks
