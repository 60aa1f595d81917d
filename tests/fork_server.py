"""Runs of the program as processes of their own, which begin in milliseconds: one imports, then forks for each.

    with Forks() as fork_server:
        process = fork_server.start(["--max_steps", "4", ...], log=tmp_path / "log")
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

The process that forks has imported the libraries and done nothing with them, so no thread and no lock is inherited.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """One run."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.status, self._ended = pid, log, None, threading.Event()

    def kill(self, number: int) -> None:
        """Send a signal; nothing if it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status, or minus the signal that ended it."""
        if not self._ended.wait(seconds):
            self.kill(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s: {self.text()}")
        return self.status

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def text(self) -> str:
        """What it has written to standard output and error."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ended(self, status: int) -> None:
        self.status = status
        self._ended.set()


class Forks:
    """The process that fork_server, seen from a test."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).resolve())]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.processes: dict[int, Process] = {}
        self.born: list[int] = []
        self.changed = threading.Condition()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.stdin.close()  # it kills what still runs, and ends
        self.server.wait(30)
        self.listener.join(30)
        self.server.stdout.close()

    def _listen(self) -> None:
        for line in self.server.stdout:
            pid, status = json.loads(line)
            with self.changed:
                if status is None:
                    self.born.append(pid)
                    self.changed.notify_all()
                else:
                    self.changed.wait_for(lambda pid=pid: pid in self.processes)
                    self.processes[pid].ended(status)

    def start(
        self,
        argv: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        die_at: tuple | None = None,
        full_at: tuple | None = None,
        before: str | None = None,
    ) -> Process:
        """A run.

        Args:
            argv: The command line.
            log: Where standard output and error go.
            environment: Beside the one there is.
            die_at: (module, name, n): the process kills itself with SIGKILL where it calls that function the n-th time.
            full_at: (module, name): from its first call of that function on no file that it writes may be longer than
                1000 bytes.
            before: Python to run first.
        """
        order = {"argv": argv, "log": str(log), "environment": environment or {}}
        order |= {"die_at": die_at, "full_at": full_at, "before": before}
        self.server.stdin.write(json.dumps(order).encode() + b"\n")
        self.server.stdin.flush()
        with self.changed:
            assert self.changed.wait_for(lambda: self.born, 120)
            process = Process(self.born.pop(0), log)
            self.processes[process.pid] = process
            self.changed.notify_all()
        return process

    def start_ranks(self, number: int, argv: list[str], log: Path, **options: Any) -> list[Process]:
        """A run of several processes, as srun starts them; each has a log of its own, log.0 and so on."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        found = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
        return [self.start(argv, Path(f"{log}.{place['RANK']}"), found | place, **options) for place in places]


def _dying(function: Any, times: int) -> Any:
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:  # a function, so that a method stays one
        if next(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return called


def _limited(function: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return function(*args, **kwargs)

    return called


def _replace(module: str, path: str, wrap: Any, *args: Any) -> None:
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, wrap(getattr(owner, name), *args))


def _run(order: dict[str, Any]) -> int:
    """In the forked process: everything that `python qlora.py` would do after its imports."""
    import qlora

    os.setsid()
    with open(order["log"], "ab", buffering=0) as log:
        # not the file itself, whose length may be limited; in a group that no signal is sent to
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, start_new_session=True)
    os.dup2(pipe.stdin.fileno(), 1)
    os.dup2(pipe.stdin.fileno(), 2)
    os.environ.update(order["environment"])
    exec(order["before"] or "", {})
    if order["die_at"]:
        module, name, times = order["die_at"]
        _replace(module, name, _dying, times)
    if order["full_at"]:
        _replace(*order["full_at"], _limited)
    try:
        code = qlora.main(order["argv"])
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # which wait for processes of a data loader
    sys.stdout.flush()
    sys.stderr.flush()
    end = os.readlink(f"/proc/self/fd/{pipe.stdin.fileno()}")
    for descriptor in list(map(int, os.listdir("/proc/self/fd"))):  # DeepSpeed keeps a copy of standard output
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == end:
                os.close(descriptor)
    pipe.wait()  # all is in the log
    return code


def _serve() -> None:
    import torch

    import qlora  # noqa: F401

    torch.set_num_threads(1)
    running: set[int] = set()
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers, os.fdopen(os.dup(0), "rb", buffering=0) as orders:
        assert threading.active_count() == 1, threading.enumerate()
        while True:
            if select.select([orders], [], [], 0.002)[0]:
                line = orders.readline()
                if not line:
                    break
                pid = os.fork()
                if pid == 0:
                    try:
                        os._exit(_run(json.loads(line)))
                    finally:
                        os._exit(1)
                running.add(pid)
                answers.write(json.dumps([pid, None]).encode() + b"\n")
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    answers.write(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve()
