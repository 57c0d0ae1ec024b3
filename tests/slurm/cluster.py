"""A SLURM of one node, from Debian's packages, in a folder of its own.

Nothing under ``/etc`` is read or written and no service is used: the daemons run with a
configuration, ports, a socket and a key that belong to this cluster alone, and only processes
started here are stopped.
"""

import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
GPUS = 4
CPUS = 32
"""More than there are, so that jobs which ask four threads fit; ``config_overrides`` allows it."""
MEMORY_MB = 400_000
PATIENCE = 60
"""Seconds after which waiting for a daemon or a state is given up."""

CONF = """\
ClusterName=layersense
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
# Samples memory twice a second and kills what is over its request; there are no cgroups here.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=5
InactiveLimit=0
KillWait=5
OverTimeLimit=0
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu,slot
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus},slot:1 \
 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes={host} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why a cluster cannot be started here, or None if it can."""
    programs = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if programs:
        return f"no {', '.join(programs)} (apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "SLURM's daemons and character devices need root"
    return None


class Cluster:
    """The daemons and what one asks them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to talk to this cluster."""
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(self.folder / "bin"), _path()]),
        }

    def start(self) -> None:
        """Write the configuration, make the GPUs and start the three daemons."""
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        for index in range(GPUS):
            # SLURM takes character devices only; this one is /dev/null.
            os.mknod(self.folder / f"gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\nName=slot Count=1\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        # Snakemake's job step drops SLURM_CONF before it calls srun.
        srun = self.folder / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(
            f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun")} "$@"\n'
        )
        srun.chmod(0o755)
        ctld_port, slurmd_port = _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=self.host,
                folder=self.folder,
                ctld_port=ctld_port,
                slurmd_port=slurmd_port,
                cpus=CPUS,
                memory=MEMORY_MB,
                gpus=GPUS,
            )
        )
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munge.seed",
        )
        self._wait((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "-D", "-i")
        self._wait(lambda: self.ask("scontrol", "ping").returncode == 0, "slurmctld")
        self._supervisor.start()
        self.start_slurmd()

    def start_slurmd(self) -> None:
        """Start the node's daemon and wait until the node takes jobs."""
        self._start("slurmd", "-D", "-N", self.host)
        self._wait(lambda: self.node_state() in ("IDLE", "MIXED", "ALLOCATED"), "slurmd")

    def kill_slurmd(self) -> None:
        """Kill the node's daemon and all that it runs, as when a machine loses power."""
        process = psutil.Process(self._running["slurmd"].pid)
        # A step's title replaced its environment, but the log that it holds open is this cluster's.
        steps = [
            step
            for step in psutil.process_iter(["cmdline"])
            if (step.info["cmdline"] or [""])[0].startswith("slurmstepd")
            and str(self.folder / "slurmd.log") in _open_files(step)
        ]
        victims = [process, *steps]
        for victim in [process, *steps]:
            with suppress(psutil.NoSuchProcess):
                victims += victim.children(recursive=True)
        # Frozen first, all of them: what dies early would be reported by what dies late.
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.suspend()
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        self._running.pop("slurmd").wait()

    def stop(self) -> None:
        """Cancel what runs and stop the daemons that were started here."""
        if "slurmctld" in self._running:
            self.ask("scancel", "--full", "--user=root")
            with suppress(RuntimeError):
                self._until(lambda: not self.jobs("RUNNING", "COMPLETING"), 15)
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for name in reversed(list(self._running)):
            process = self._running.pop(name)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's programs."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def node_state(self) -> str:
        """Return the node's state, such as ``IDLE``."""
        return self._answer("sinfo", "--noheader", "--format=%T").strip().upper()

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of jobs in these states (``all`` for every known job)."""
        command = ("squeue", "--noheader", "--format=%i", f"--states={','.join(states)}")
        return self._answer(*command).split()

    def job(self, number: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says."""
        text = self._answer("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def _answer(self, *command: str) -> str:
        """Run one of SLURM's programs until it answers: a busy controller may not, at first."""
        answers: list[str] = []

        def answered() -> bool:
            result = self.ask(*command)
            if result.returncode == 0:
                answers.append(result.stdout)
            return bool(answers)

        if not self._until(answered, PATIENCE):
            raise RuntimeError(f"{' '.join(command)}: no answer")
        return answers[0]

    def _start(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_path())
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as output:
            self._running[name] = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its own session: a Ctrl-C at pytest reaches the fixture, which stops it in order.
                start_new_session=True,
            )

    def _supervise(self) -> None:
        """Start the controller again when it crashes, as systemd does on a real cluster.

        Debian 12's crashes at times when it is asked for a job that it put back into the queue.
        """
        while not self._stopping.wait(0.5):
            if self._running["slurmctld"].poll() is not None:
                self._start("slurmctld", "-D", "-i")

    def _wait(self, condition: Callable[[], bool], name: str) -> None:
        if not self._until(condition, PATIENCE):
            output = (self.folder / f"{name}.out").read_text(errors="replace")
            log = self.folder / f"{name}.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            raise RuntimeError(f"{name} did not come up:\n{output}\n{text}")

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster, and stop it whatever happens."""
    # Not pytest's folder: munged insists on parents that others may enter.
    folder = Path(tempfile.mkdtemp(prefix="layersense-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _path() -> str:
    # The daemons lie where an ordinary PATH does not look.
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:
        return set()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
