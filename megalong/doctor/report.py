"""How is a visit written down? One report for people (Markdown), one for programs (JSON), and lines on the console."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalong.doctor.part import Part, Round
from megalong.doctor.result import FAIL, PartResult
from megalong.machine.finding import Finding


def lines(result: PartResult) -> list[str]:
    """What the console shows of a part."""
    found = [f"{result.name:<10} {result.state:<8} {result.seconds:6.1f} s   {result.question}"]
    for check in result.checks:
        limit = f"   [{check.limit}]" if check.limit else ""
        found.append(f"  {check.state:<8} {check.name}: {check.figure}{limit}")
    if result.error:
        found.append(f"  {FAIL:<8} {result.error}")
    return found


def advice(findings: Sequence[Finding]) -> list[str]:
    """Findings with their remedies."""
    found = []
    for finding in findings:
        found.append(f"{finding.weight}: {finding.name}. {finding.what}")
        found.append(f"  what helps: {finding.remedy}")
        found.append(f"  source: {finding.source}")
    return found


def markdown(visit: Round, results: Sequence[PartResult], parts: Sequence[Part], seconds: float) -> str:
    """The report for people."""
    failed = [r.name for r in results if r.state == FAIL]
    verdict = f"**Failed: {', '.join(failed)}.**" if failed else "**No part failed.**"
    when = time.strftime("%Y-%m-%d %H:%M")
    text = [
        f"# Doctor's report: {visit.machine.host}",
        "",
        f"{when}, {seconds:.0f} s. {verdict}",
    ]
    text += ["", "| part | state | s | question |", "|---|---|---|---|"]
    text += [f"| {r.name} | {r.state} | {r.seconds:.1f} | {r.question} |" for r in results]
    if visit.findings:
        text += ["", "## What stops or slows this machine", ""]
        for finding in visit.findings:
            text.append(f"- **{finding.name}** ({finding.weight}): {finding.what}")
            text.append(f"  What helps: {finding.remedy} Source: {finding.source}")
    for result in results:
        text += ["", f"## {result.name}", "", "| claim | state | seen | limit |", "|---|---|---|---|"]
        cells = [(c.name, c.state, c.figure, c.limit) for c in result.checks]
        text += ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in cells]
        if result.error:
            text += ["", "```", result.error, "```"]
    left = left_out(visit, parts)
    if left:
        text += ["", "## On a GPU it would run", "", *(f"- {line}" for line in left)]
    if visit.machine.not_told:
        text += ["", "## Not told", "", *(f"- {line}" for line in visit.machine.not_told)]
    return "\n".join(text) + "\n"


def left_out(visit: Round, parts: Sequence[Part]) -> list[str]:
    """What needs a GPU and was left out for want of one."""
    return [] if visit.on_gpu else [f"{part.name}: {what}" for part in parts for what in part.on_gpu]


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples of names that are keys become `a b`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {" ".join(map(str, k)) if isinstance(k, tuple) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def as_json(visit: Round, results: Sequence[PartResult], parts: Sequence[Part], seconds: float) -> dict[str, Any]:
    """The report for programs."""
    import megalong

    return {
        "megalong": megalong.__version__,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "device": visit.ranks.device,
        "ranks": visit.ranks.count,
        "failed": [r.name for r in results if r.state == FAIL],
        "machine": plain(visit.machine),
        "findings": plain(visit.findings),
        "transports": visit.log.kinds() if visit.log else {},
        "cluster_file": str(visit.cluster_file) if visit.cluster_file.exists() else None,
        "parts": [{"state": r.state, **plain(r)} for r in results],
        "on_a_gpu": left_out(visit, parts),
    }


def write(visit: Round, results: Sequence[PartResult], parts: Sequence[Part], seconds: float) -> Path:
    """Write both; returns the one for people."""
    path = visit.out / "report.md"
    path.write_text(markdown(visit, results, parts, seconds), encoding="utf-8")
    found = json.dumps(as_json(visit, results, parts, seconds), indent=2, allow_nan=False)
    (visit.out / "report.json").write_text(found + "\n", encoding="utf-8")
    return path
