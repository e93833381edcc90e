"""A real SLURM cluster of several nodes inside one machine, for tests of `launch/`.

Everything lives in one new set of namespaces (PID, network, mount, host name, IPC), so that no port, file or process can meet those
of the machine, and the kernel ends every process when the first one ends. A node is a PID namespace of its own inside it: power loss
is the end of that namespace's first process. GPUs are character devices that nobody opens. Needs root and Debian's packages
slurmctld, slurmd, slurm-client, munge, iproute2.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "srun", "munged", "unshare", "nsenter", "setpriv", "ip")
START_LIMIT_S = 60.0
CPUS = 16
"""Per node, more than the machine has: `config_overrides` believes it."""

IN_NAMESPACE = """
ip link set lo up
ip addr add 127.0.1.1/8 dev lo    # name look-ups fail where loopback has 127.0.0.1 alone
hostname login
mount --bind "$1/hosts" /etc/hosts
exec sleep infinity
"""
A_NODE = """
hostname "$1"
slurmd -D -N "$1" &
wait $!
exec sleep infinity
"""


def missing() -> list[str]:
    """What this machine lacks to hold a cluster."""
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return [*lacking, *(["root"] if os.geteuid() else [])]


class Cluster:
    """`with Cluster(folder) as cluster:` is up inside the block. Nodes are called gpu1, gpu2, ... and io1, io2, ..."""

    def __init__(self, folder: Path, gpu_nodes: int = 2, gpus: int = 1, io_nodes: int = 0, slurmd_timeout_s: int = 10):
        self.folder, self._gpus, self._slurmd_timeout_s = folder, gpus, slurmd_timeout_s
        self.gpu_nodes = [f"gpu{i + 1}" for i in range(gpu_nodes)]
        self.io_nodes = [f"io{i + 1}" for i in range(io_nodes)]
        self.nodes = [*self.gpu_nodes, *self.io_nodes]
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._booted: dict[str, subprocess.Popen] = {}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        self._write_files()
        command = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self._outer = self._start([*command, "bash", "-ec", IN_NAMESPACE, "init", str(self.folder)], "init")
        try:
            self._init_pid = _wait_for(lambda: next(iter(_children(self._outer.pid)), None), "a namespace")
            _wait_for(lambda: _command(self._init_pid).startswith("sleep"), "the namespace's network")
            self._daemon("munged", "-F", "--force", *munge_options(self.folder))
            _wait_for((self.folder / "munge.sock").exists, "munged")
            self._daemon("slurmctld", "-D")
            for node in self.nodes:
                self.boot(node)
            self.wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._outer.kill()
        for process in (*self._booted.values(), *self._daemons, self._outer):
            process.wait()

    def run(self, *command: str | Path, environment: dict[str, str] | None = None, check: bool = True, timeout_s: float = 60.0) -> str:
        """The output of a command on the login host. Raises AssertionError with what it said where it fails."""
        done = subprocess.run(self._enter(*map(str, command)), env={**self._environment, **(environment or {})}, capture_output=True,
                              text=True, timeout=timeout_s, check=False)  # fmt: skip
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def wait_until_idle(self) -> None:
        """All nodes answer and nothing runs on them."""
        _wait_for(lambda: set(self.run("sinfo", "-hN", "-t", "idle", "-o", "%N", check=False).split()) == set(self.nodes), "idle nodes")

    def job(self, job: str, field: str) -> str:
        """One field of `scontrol show job`."""
        return re.search(rf"\b{field}=(\S*)", self.run("scontrol", "-o", "show", "job", job)).group(1)

    def boot(self, node: str) -> None:
        (self.folder / f"{node}.spool").mkdir(exist_ok=True)
        command = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash", "-c", A_NODE, "node", node]
        self._booted[node] = self._start(self._enter(*command), node)

    def boot_lost_nodes(self) -> None:
        """Those that crashed, and were not booted since."""
        for node in self.nodes:
            if node not in self._booted:
                self.boot(node)

    def crash(self, node: str) -> None:
        """Power loss: slurmd, steps and tasks are gone at once."""
        os.kill(self._node_init(node), signal.SIGKILL)
        self._booted.pop(node).wait()

    def freeze(self, node: str) -> None:
        """Nothing runs, and sockets stay open."""
        for pid in self.processes(node):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        for pid in self.processes(node):
            os.kill(pid, signal.SIGCONT)

    def make_read_only(self, node: str, folder: Path) -> None:
        """The node, and no other, can only read what is in `folder`."""
        command = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"'
        self._run_on(node, "bash", "-ec", command, "mount", str(folder))

    def occupy_port(self, node: str, port: int) -> subprocess.Popen:
        """A process that listens on the node, until it is ended."""
        code = f"import socket, time; s = socket.create_server(('', {port})); print('listening', flush=True); time.sleep(600)"
        process = subprocess.Popen(self._on(node, sys.executable, "-c", code), stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"listening\n"
        return process

    def _run_on(self, node: str, *command: str) -> None:
        subprocess.run(self._on(node, *command), check=True, capture_output=True, timeout=60)

    def _on(self, node: str, *command: str) -> list[str]:
        """Inside the node's own namespaces."""
        return ["nsenter", "--target", str(self._node_init(node)), "--mount", "--pid", "--net", "--uts", "--ipc", "--", *command]

    def processes(self, node: str, having: str = "") -> list[int]:
        """Process ids (as this test sees them) of a node's processes whose command line contains `having`."""
        namespace = os.readlink(f"/proc/{self._node_init(node)}/ns/pid")
        return [pid for pid in _all_pids() if _namespace(pid) == namespace and having in _command(pid)]

    def _node_init(self, node: str) -> int:
        """The chain is nsenter -> unshare -> the first process of the node."""
        pid = self._booted[node].pid
        while _namespace(pid) in (_namespace(os.getpid()), _namespace(self._init_pid)):
            pid = _wait_for(lambda pid=pid: next(iter(_children(pid)), None), f"the node {node}")
        return pid

    def _enter(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self._init_pid), "--mount", "--pid", "--net", "--uts", "--ipc", f"--wd={os.getcwd()}", *command]

    def _daemon(self, *command: str) -> None:
        self._daemons.append(self._start(self._enter(*command), command[0]))

    def _start(self, command: list[str], name: str) -> subprocess.Popen:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            # Whatever ends this test also ends the namespace, and with it all that is in it.
            return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], env=self._environment, stdin=subprocess.DEVNULL,
                                    stdout=log, stderr=log)  # fmt: skip

    def _write_files(self) -> None:
        for name in ("state", "log", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        addresses = {node: f"127.0.0.{10 + i}" for i, node in enumerate(self.nodes)}
        hosts = "".join(f"{address} {name}\n" for name, address in {"login": "127.0.0.1", **addresses}.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        for i in range(self._gpus):
            device = self.folder / "dev" / f"nvidia{i}"
            if not device.exists():
                device.symlink_to("/dev/null")
        gres = f"NodeName={','.join(self.gpu_nodes)} Name=gpu File={self.folder}/dev/nvidia[0-{self._gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gres}")
        (self.folder / "slurm.conf").write_text(slurm_conf(self.folder, addresses, self._gpus, self._slurmd_timeout_s))


def munge_options(folder: Path) -> list[str]:
    files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "log/munged.log", "seed-file": "seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def slurm_conf(folder: Path, addresses: dict[str, str], gpus: int, slurmd_timeout_s: int) -> str:
    """Short times: a requeued job may start after 6 s."""
    nodes = "".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={17000 + i} CPUs={CPUS} RealMemory=8000 State=UNKNOWN"
        f"{f' Gres=gpu:{gpus}' if node.startswith('gpu') else ''}\n"
        for i, (node, address) in enumerate(addresses.items())
    )
    partitions = "".join(
        f"PartitionName={name} Nodes={','.join(members)} MaxTime=INFINITE State=UP {options}\n"
        for name, kind, options in (("gpu", "gpu", "Default=YES"), ("urgent", "gpu", "PriorityTier=2"), ("io", "io", ""))
        if (members := [node for node in addresses if node.startswith(kind)])
    )
    return f"""ClusterName=test
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
SlurmctldHost=login(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_min_age_reserve=0
KillWait=30
SlurmdTimeout={slurmd_timeout_s}
InactiveLimit=0
MinJobAge=600
CompleteWait=0
ReturnToService=2
JobRequeue=1
GresTypes=gpu
{nodes}{partitions}"""


def _wait_for(condition, what: str, limit_s: float = START_LIMIT_S):
    """The first true value of `condition()`. Raises AssertionError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not there after {limit_s:.0f} s")


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
