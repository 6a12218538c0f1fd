"""A real Slurm of one node, from Debian's packages (`apt-get install slurm-wlm munge`), on loopback, in one folder."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from started_programs import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
# munged and the Slurm daemons lie where only root has them on PATH.
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"))
START_SECONDS = 60

SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not_here() -> str | None:
    """Why a cluster cannot be started on this machine; None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started by root"


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster`: the daemons run, and `cluster.environment` is what their clients need.

    Args:
        folder: of the key, the sockets, the state and the logs; its path must be short, for a socket has little room.
        proctrack: how processes of a job are told from others: linuxproc or pgid.
    """

    def __init__(self, folder: Path, proctrack: str = "linuxproc") -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))},
            "PATH": SYSTEM_PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons = ExitStack()
        (folder / "state").mkdir(parents=True)
        (folder / "spool").mkdir()
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=socket.gethostname().partition(".")[0],
                user="root",
                cpus=os.cpu_count(),
                folder=folder,
                controller_port=free_port(),
                node_port=free_port(),
                proctrack=proctrack,
            )
        )
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)

    def __enter__(self) -> Self:
        with self._daemons as daemons:
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
            # --force: the folder is closed to others, which munged takes for a mistake
            self._start("munged", "--foreground", "--force", *options)
            self.wait_until("munged answers", lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            self.wait_until("the node is idle", lambda: self.run("sinfo", "--noheader", "-o", "%T").strip() == "idle")
            self._daemons = daemons.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--state=PENDING", "--user=root")
        self.run("scancel", "--user=root")
        self.wait_until("all jobs are gone", lambda: not self.run("squeue", "--noheader", "--states=R,CG,PD"))
        self._daemons.close()

    def run(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol` knows of a job: JobState, StartTime, EndTime, Restarts..."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: int | str, states: tuple[str, ...], seconds: float) -> dict[str, str]:
        """The job, once it is in one of the states; fails after so many seconds."""
        self.wait_until(f"job {job_id} is {states}", lambda: self.job(job_id).get("JobState") in states, seconds)
        return self.job(job_id)

    def _start(self, *command: str) -> None:
        program = shutil.which(command[0], path=SYSTEM_PATH)
        assert program is not None
        log = open(self.folder / f"{command[0]}.out", "wb")
        process = subprocess.Popen([program, *command[1:]], env=self.environment, stdout=log, stderr=log)
        self._daemons.callback(log.close)
        self._daemons.callback(process.wait)
        self._daemons.callback(process.terminate)

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Waits; fails after so many seconds, with what the daemons have to say."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in self.folder.glob("*.log"))
                jobs = self.run("scontrol", "show", "job")
                raise TimeoutError(f"not within {seconds} seconds: {what}\n{logs}\n{jobs}")
            time.sleep(0.1)
