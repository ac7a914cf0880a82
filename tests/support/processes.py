"""Processes that tests start, watch and kill."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # folders of programs


def until(condition: Callable[[], object], seconds: float = 300.0, interval: float = 0.1) -> object:
    """The first true value of `condition`, asked every `interval` seconds. AssertionError after
    `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(interval)
    raise AssertionError(f"nothing within {seconds} s")


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in text.split()]
    except OSError:  # the process has ended
        return []


def descendants(pid: int) -> set[int]:
    return {pid for child in children(pid) for pid in (child, *descendants(child))}


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def is_up(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


class TrackingServer:
    """A real MLflow server on loopback. Its database outlives it."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> "TrackingServer":
        self.kill()
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        artifacts = ["--artifacts-destination", str(self.folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *address, *store, *artifacts]
        quiet = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with open(self.folder / "log", "a") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=quiet, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(lambda: is_up(f"{self.address}/health"))
        except AssertionError:
            raise AssertionError((self.folder / "log").read_text()) from None
        return self

    @property
    def is_started(self) -> bool:
        return self._process is not None

    def send(self, number: int) -> None:
        """Sends a signal to the server and its workers."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def postgres_server() -> Iterator[str]:
    """A real PostgreSQL server on loopback without fsync. Yields the URL of an empty database, with
    a password. PostgreSQL refuses to run as root."""
    folder, port, owner = Path(tempfile.mkdtemp()), free_port(), {}
    password = folder / "password"
    password.write_text("correct horse")
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        owner = {"user": user.pw_uid, "group": user.pw_gid}
        for path in (folder, password):
            os.chown(path, user.pw_uid, user.pw_gid)

    def call(program: str, *arguments: str) -> None:
        command = [str(POSTGRES[-1] / program), "-D", str(folder / "data"), *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "timeout": 120}
        subprocess.run(command, cwd=folder, check=True, **quiet, **owner)

    access = ("--auth", "scram-sha-256", "--pwfile", str(password))
    call("initdb", *access, "--username", "gem", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
    yield f"postgresql://gem:correct%20horse@127.0.0.1:{port}/postgres"
    call("pg_ctl", "stop", "--mode", "immediate")
    shutil.rmtree(folder)
