"""A real Slurm on this machine for tests: munged, slurmctld, and nodes that are namespaces of their own.

Each node has its own hostname, network (10.98.0.N over a bridge), processes, mounts and /dev/shm; they share the file
system, as nodes of a cluster do.
Wants root and Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2. Only processes started here are
ended here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "ip")
SUBNET, CONTROLLER = "10.98.0", "10.98.0.254"

# The first process of a node: it waits for its network, starts slurmd, and reaps what slurmd leaves behind.
NODE = """set -e
hostname "$1"; mount --bind "$3/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$2/24" dev eth0; ip link set eth0 up
slurmd -f "$3/slurm.conf" -N "$1"
while :; do sleep 3600 & wait $!; done"""

# Small timeouts, so that a lost node is noticed and a requeued job (held until its credential has expired) started
# within seconds.
CONF = """ClusterName=test
SlurmctldHost=ctl({controller})
SlurmctldPort=17917
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=n[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "namespaces and a Slurm of one's own want root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2)" if absent else None
    )


class Cluster:
    """A controller and nodes n1, n2, ...; to be used as a context."""

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._bridge = f"vlt{os.getpid()}"
        self._services: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        addresses = {
            "localhost": "127.0.0.1",
            "ctl": CONTROLLER,
            **{f"n{node}": f"{SUBNET}.{node}" for node in self._nodes},
        }
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        nodes = "\n".join(
            f"NodeName=n{node} NodeHostname=n{node} NodeAddr={SUBNET}.{node} Port=17918 CPUs=2 RealMemory=4000"
            for node in self._nodes
        )
        conf = CONF.format(controller=CONTROLLER, folder=self.folder, nodes=nodes, num_nodes=self.num_nodes)
        (self.folder / "slurm.conf").write_text(conf)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            self._run("ip", "link", "add", self._bridge, "type", "bridge")
            self._run("ip", "addr", "add", f"{CONTROLLER}/24", "dev", self._bridge)
            self._run("ip", "link", "set", self._bridge, "up")
            places = {
                "key-file": key,
                "socket": "munge.sock",
                "pid-file": "munged.pid",
                "log-file": "munged.log",
                "seed-file": "munge.seed",
            }
            self._start(
                "munged",
                "munged",
                "--foreground",
                "--force",
                *(f"--{name}={self.folder / place}" for name, place in places.items()),
            )
            self._until(10, lambda: self._succeeds("munge", "-n", "-S", str(self.folder / "munge.sock")))
            controller = 'hostname ctl; mount --bind "$1/hosts" /etc/hosts; exec slurmctld -D -f "$1/slurm.conf"'
            self._start("slurmctld", "unshare", "--mount", "--uts", "bash", "-c", controller, "ctl", str(self.folder))
            self._until(20, lambda: "UP" in self.told("scontrol", "ping"))
            for node in self._nodes:
                self.revive(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            self.crash(node)
        for name in ("slurmctld", "munged"):
            if name in self._services:
                self._services[name].terminate()
                self._services.pop(name).wait()
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    @property
    def _nodes(self) -> range:
        return range(1, self.num_nodes + 1)

    def told(self, *words: str) -> str:
        """Standard output of one of Slurm's programs on the machine around the nodes."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job, such as JobState and Restarts."""
        return dict(word.split("=", 1) for word in self.told("scontrol", "show", "job", number).split() if "=" in word)

    def crash(self, node: int) -> None:
        """Takes a node's power away: all of its processes die at once."""
        service = self._services.pop(f"n{node}", None)
        if service is not None:
            service.kill()  # and with it, by --kill-child, the first process of the namespace and all others in there
            service.wait()

    def revive(self, node: int) -> None:
        """Starts a node and waits until the controller counts on it."""
        name, veth = f"n{node}", f"{self._bridge}n{node}"
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        subprocess.run(["ip", "link", "del", veth], capture_output=True)
        spaces = ("--mount", "--uts", "--net", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child")
        service = self._start(
            name, "unshare", *spaces, "bash", "-c", NODE, "init", name, f"{SUBNET}.{node}", str(self.folder)
        )
        children = Path(f"/proc/{service.pid}/task/{service.pid}/children")
        self._until(10, lambda: children.read_text().split())
        first = children.read_text().split()[0]
        self._until(10, lambda: os.readlink(f"/proc/{first}/ns/net") != os.readlink("/proc/self/ns/net"))
        self._run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", first)
        self._run("ip", "link", "set", veth, "master", self._bridge, "up")
        self._until(
            90,
            lambda: (
                self.told("sinfo", "-h", "-N", "-n", name, "-o", "%T").strip()
                in ("idle", "mixed", "allocated", "completing")
            ),
        )

    def _start(self, name: str, *words: str) -> subprocess.Popen:
        with (self.folder / f"{name}.out").open("ab") as log:
            service = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._services[name] = service
        return service

    def _run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    def _succeeds(self, *words: str) -> bool:
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def _until(self, seconds: float, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s; logs in {self.folder}")
            time.sleep(0.1)
