"""A real Slurm on this machine: one controller and five nodes, as one user, without munge and cgroups.

n1 to n4 are sound. On n5 no file can grow beyond half a MiB (a limit of its daemon that its tasks inherit), which is
less than preflight writes; only jobs in partition `shaky` can get it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2", "n3", "n4", "n5")
SHAKY = "n5"
LEAVES = {"leaf0": "n[1,3]", "leaf1": "n[2,4-5]"}  # not in the order of the names: the order of ranks must follow it

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv", "prlimit")
# the scripts take `python3` where there is no .venv; daemons are not on the path of everybody
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"

CONF = """\
ClusterName=megalong
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
TopologyPlugin=topology/tree
JobRequeue=1
MinJobAge=3600
FirstJobId={first_job}
ReturnToService=2
KillWait=10
PropagateResourceLimitsExcept=FSIZE
SlurmdParameters=config_overrides
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)} on this machine (Debian: apt-get install slurm-wlm)" if absent else None


class Cluster:
    """Five nodes of eight slots; n1 and n3 share a leaf switch, the others have another one.

    Args:
        folder: for its state and logs; short, since sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH, "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        text = CONF.format(
            host=host,
            user=getpass.getuser(),
            folder=self.folder,
            ports=ports,
            first_job=1 + 500 * worker,  # a job's port follows from its number, and this host has several clusters
        )
        for node, port in zip(NODES, ports[1:], strict=True):
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000\n"
        text += "PartitionName=main Nodes=n[1-4] Default=YES\nPartitionName=shaky Nodes=n[1-2,5]\n"
        (self.folder / "slurm.conf").write_text(text)
        switches = "".join(f"SwitchName={leaf} Nodes={nodes}\n" for leaf, nodes in LEAVES.items())
        (self.folder / "topology.conf").write_text(switches + f"SwitchName=spine Switches={','.join(LEAVES)}\n")
        for part in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / part).mkdir(parents=True)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.boot(node)
        self.wait(
            lambda: len(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "main,shaky").split("\n")) > 7, 60, "nodes"
        )

    def boot(self, node: str) -> None:
        """Start the daemon of a node."""
        limit = ("prlimit", "--fsize=524288") if node == SHAKY else ()
        self._daemon(*limit, "slurmd", "-D", "-N", node)

    def crash(self, node: str) -> None:
        """Kill the daemon of a node; Slurm takes minutes to notice, and goes on giving the node to jobs."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def _daemon(self, *command: str) -> None:
        """A daemon that ends with this process, whatever way that ends."""
        log = (self.folder / f"{command[-1]}.out").open("wb")
        command = ("setpriv", "--pdeathsig", "TERM", *command)
        self._daemons[command[-1]] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.env, timeout=30)
        deadline = time.monotonic() + 30
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _running(self) -> bool:
        listed = subprocess.run(
            ["squeue", "-h", "-t", "R,CG"], env=self.env, capture_output=True, text=True, timeout=30
        )
        return bool(listed.stdout.strip())

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path = REPO) -> str:
        """Output of a command that has to succeed."""
        done = subprocess.run(command, env=self.env | dict(env or {}), cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "show", "job", number, "--oneliner")
        return dict(pair.partition("=")[::2] for pair in text.split() if "=" in pair)

    def ended(self, number: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is over for good, and return what Slurm knows of it.

        A requeued job waits two minutes, until the credentials of its first start have expired. Here it starts three
        seconds later: in the same second slurmd would refuse it (job credential revoked) and the job would fail.
        """
        hastened = {"0"}

        def look() -> bool:
            now = self.job(number)
            if now["JobState"] == "PENDING" and now["Restarts"] not in hastened:
                hastened.add(now["Restarts"])
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")
            return now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.wait(look, seconds, f"job {number} to end")
        return self.job(number)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a condition; the daemons' last words come with the failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in self.folder.glob("slurm*.log"))
                raise AssertionError(f"waited {seconds} s in vain for {what}\n{self.run('squeue')}{logs}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
