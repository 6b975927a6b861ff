"""The peak memory of a process is its own, however large the process was that started it."""

import subprocess
import sys

from megalong.runtime.resident import peak_resident_bytes

MIB = 2**20
CHILD = "from megalong.runtime.resident import peak_resident_bytes as peak; print(peak())"
PARENT = f"""
import os, subprocess, sys
{CHILD}
room = bytearray(os.urandom(4096)) * (300 * 256)
{CHILD}
del room
sys.stdout.flush()
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
if os.fork() == 0:
    {CHILD.partition("; ")[2]}
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""


def test_a_small_child_of_a_large_parent_reports_its_own_peak() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    before, large, executed, forked = (int(line) / MIB for line in done.stdout.split())
    assert large > before + 250
    assert executed < 100
    assert forked < 100


def test_another_process_is_asked_by_its_number_and_one_that_has_ended_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert 0 < peak_resident_bytes(other.pid) < 100 * MIB
        other.communicate(b"\n")
    assert peak_resident_bytes(other.pid) == 0
