"""Two machines on one host: namespaces of network, host name, mounts and processes, joined by a wire, each with sshd.

A machine that is `killed` loses all its processes at once; one that is `cut` off stays silent, as after a power cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tests.launch import ROOT, TINY, hear_signals, unlaunched

NAMES = ("machine-a", "machine-b")
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "sshd", "ssh-keygen", "pdsh")
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
PORT = "29533"  # of the ranks' meeting, in the machines' own network

SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
SetEnv {environment}
"""
SSH = """
Host *
    IdentityFile {folder}/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
    ConnectTimeout 3
    ServerAliveInterval 2
    ServerAliveCountMax 2
"""
BOOT = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
{more}
/usr/sbin/sshd -D -f {folder}/sshd_config &
touch {folder}/{name}.up
wait
"""


def missing() -> str:
    """Why there can be no machines here; "" where there can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"several machines on one host: there is no {', '.join(absent)}"
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True)
    return f"several machines on one host: {tried.stderr.strip()}" if tried.returncode else ""


class Machine:
    """One of the machines. bind: {what is to be seen there: what lies there instead}, files or folders."""

    def __init__(self, folder: Path, number: int, bind: dict[Path, Path]):
        self.name, self.address, self._folder = NAMES[number], f"10.99.0.{number + 1}", folder
        more = "\n".join(f"mount --bind '{source}' '{place}'" for place, source in bind.items())
        script = BOOT.format(name=self.name, folder=folder, more=more)
        self._log = open(folder / f"{self.name}.log", "w")  # noqa: SIM115 (open as long as the machine is)
        self._outer = subprocess.Popen(
            [*UNSHARE, "sh", "-c", script], stdout=self._log, stderr=self._log, preexec_fn=hear_signals
        )
        deadline = time.time() + 20
        while not (folder / f"{self.name}.up").exists():
            up = self._outer.poll() is None and time.time() < deadline
            assert up, (folder / f"{self.name}.log").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.init = int(children[0])
        # Held, so that the wire stays when the machine is killed: the other's end of it has the other's address.
        self._network = os.open(f"/proc/{self.init}/ns/net", os.O_RDONLY)

    def inside(self, *words: str) -> list[str]:
        """The command line of `words` on this machine, in the folder of the project."""
        return ["nsenter", "-t", str(self.init), "-n", "-u", "-m", "-p", f"--wd={ROOT}", *words]

    def do(self, *words: str) -> None:
        """Run `words` there, expecting success."""
        subprocess.run(self.inside(*words), check=True, capture_output=True, text=True)

    def start(self, *words: str, **more: str) -> subprocess.Popen:
        """Start `words` there, with its output in one pipe."""
        return subprocess.Popen(
            self.inside(*words),
            env=unlaunched(**environment(), **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_signals,
        )

    def cut(self) -> None:
        """Take the wire away: the machine goes on and nobody hears of it."""
        self.do("ip", "link", "set", "eth0", "down")

    def kill(self) -> None:
        """End all its processes at once, and with them its network."""
        if self._outer.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self._outer.wait()
        self._log.close()

    def unplug(self) -> None:
        """Give its network back."""
        os.close(self._network)


def environment() -> dict[str, str]:
    """What a login on a machine gives: CPU, one thread, no interpreter, this checkout."""
    known = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return {**known, "PATH": PATH}


@contextmanager
def machines(folder: Path, *binds: dict[Path, Path]):
    """Two of them, gone at the end. binds: of each, see Machine."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    words = " ".join(f"{name}={value}" for name, value in environment().items())
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, environment=words))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    addresses = "".join(f"10.99.0.{number + 1} {name}\n" for number, name in enumerate(NAMES))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    made: list[Machine] = []
    try:
        for number in range(2):
            made.append(Machine(folder, number, binds[number] if binds else {}))
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(made[1].init)]
        subprocess.run(["nsenter", "-t", str(made[0].init), "-n", "ip", "link", "add", "eth0", *peer], check=True)
        for machine in made:
            machine.do("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            machine.do("ip", "link", "set", "eth0", "up")
        yield made
    finally:
        for machine in made:
            machine.kill()
            machine.unplug()


def trainer(runs: Path, *overrides: str) -> list[str]:
    """The trainer and its arguments, for a launcher."""
    return ["ijepa_fast/train.py", "--config", "configs/quickstart.yaml", f"runs={runs}", *TINY, *overrides]


def deepspeed(made: list[Machine], folder: Path, runs: Path, *overrides: str, hostfile: str = "hostfile"):
    """Start a run by `deepspeed --hostfile`, typed on the first machine."""
    launcher = ["deepspeed", "--hostfile", str(folder / hostfile), "--master_port", PORT]
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in environment().items()))
    return [made[0].start(*launcher, *trainer(runs, *overrides), DS_ENV_FILE=str(folder / "deepspeed_env"))]


def torchrun(made: list[Machine], runs: Path, *overrides: str, others: dict[int, tuple[str, ...]] | None = None):
    """Start a run by torchrun, typed on each machine. others: what is typed on one of them besides."""
    found = []
    for number, machine in enumerate(made):
        launcher = ["torchrun", f"--nnodes={len(made)}", f"--node-rank={number}", "--nproc-per-node=1"]
        launcher += [f"--master-addr={made[0].address}", f"--master-port={PORT}"]
        found.append(machine.start(*launcher, *trainer(runs, *overrides, *(others or {}).get(number, ()))))
    return found


def outcome(processes: list[subprocess.Popen], timeout: float = 120) -> tuple[list[int], str]:
    """Wait for them: their exit statuses and what they said."""
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(texts)


def by_hand(made: list[Machine], runs: Path, *overrides: str, first: str = "", others=None):
    """Start a rank on each machine without a launcher. first: code that they run before the trainer's."""
    main = "import sys; from ijepa_fast.train import main; sys.exit(main(sys.argv[1:]))"
    world = {"WORLD_SIZE": str(len(made)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    world |= {"MASTER_ADDR": made[0].address, "MASTER_PORT": PORT}
    found = []
    for number, machine in enumerate(made):
        arguments = [*trainer(runs, *overrides)[1:], *(others or {}).get(number, ())]
        found.append(machine.start("python", "-c", f"{first}\n{main}", *arguments, **world, RANK=str(number)))
    return found


def said(text: str) -> list[str]:
    """The errors among what ranks have said, without what a launcher puts before a line."""
    return [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
