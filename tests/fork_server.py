"""Run the program in processes of their own that start in milliseconds: a server imports everything once, then forks.

    with ForkServer() as server:
        process = server.start(["--max_steps", "4", ...], log=tmp_path / "log")
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

The server only imports libraries and never calls them, so forks inherit no threads and no locks.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import random
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

# Modules that a run imports late; in the server they are imported once, which saves 3 s a process.
LATE_IMPORTS = (
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft.tuners.lora.bnb",
    "scipy.stats",
    "transformers.integrations.bitsandbytes",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)


def free_port() -> int:
    """A port that no connection is given meanwhile: the kernel takes theirs from 32768 upwards."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            listener.bind(("127.0.0.1", port))
            return port


class Process:
    """One run, seen from a test."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.status, self._exited = pid, log, None, threading.Event()

    def kill(self, number: int) -> None:
        """Send a signal, unless the process has exited."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status, or minus the signal that killed it."""
        if not self._exited.wait(seconds):
            self.kill(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s: {self.text()}")
        return self.status

    @property
    def running(self) -> bool:
        return not self._exited.is_set()

    def text(self) -> str:
        """Its standard output and error so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def set_status(self, status: int) -> None:
        self.status = status
        self._exited.set()


class ForkServer:
    """The server, seen from a test."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).resolve())]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.processes: dict[int, Process] = {}
        self.started: list[int] = []
        self.changed = threading.Condition()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.stdin.close()  # it kills its children and exits
        self.server.wait(30)
        self.listener.join(30)
        self.server.stdout.close()

    def _listen(self) -> None:
        for line in self.server.stdout:
            pid, status = json.loads(line)
            with self.changed:
                if status is None:
                    self.started.append(pid)
                    self.changed.notify_all()
                else:
                    self.changed.wait_for(lambda pid=pid: pid in self.processes)
                    self.processes[pid].set_status(status)

    def start(
        self,
        argv: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        die_at: tuple | None = None,
        full_at: tuple | None = None,
        before: str | None = None,
    ) -> Process:
        """Start a run.

        Args:
            argv: The command line.
            log: File for standard output and error.
            environment: Additional variables.
            die_at: (module, name, n): the process kills itself with SIGKILL at its n-th call of that function.
            full_at: (module, name): from the first call of that function on, no file may grow beyond 1000 bytes.
            before: Python code to execute first.
        """
        order = {"argv": argv, "log": str(log), "environment": environment or {}}
        order |= {"die_at": die_at, "full_at": full_at, "before": before}
        self.server.stdin.write(json.dumps(order).encode() + b"\n")
        self.server.stdin.flush()
        with self.changed:
            assert self.changed.wait_for(lambda: self.started, 120)
            process = Process(self.started.pop(0), log)
            self.processes[process.pid] = process
            self.changed.notify_all()
        return process

    def start_ranks(self, number: int, argv: list[str], log: Path, **options: Any) -> list[Process]:
        """Start the ranks of one run one by one, as srun does; each has a log of its own: log.0, log.1, …"""
        rendezvous = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
        return [self.start(argv, Path(f"{log}.{rank['RANK']}"), rendezvous | rank, **options) for rank in ranks]


def _dying(function: Any, times: int) -> Any:
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:  # a plain function, so that it still binds as a method
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
    """In the fork: what `python qlora.py` does after its imports."""
    import qlora

    os.setsid()
    with open(order["log"], "ab", buffering=0) as log:
        # through a pipe, as `full_at` would limit the log as well; in a session that no signal reaches
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
    atexit._run_exitfuncs()  # they wait for the processes of a data loader
    sys.stdout.flush()
    sys.stderr.flush()
    end = os.readlink(f"/proc/self/fd/{pipe.stdin.fileno()}")
    for descriptor in list(map(int, os.listdir("/proc/self/fd"))):  # DeepSpeed duplicates standard output
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == end:
                os.close(descriptor)
    pipe.wait()  # the log is complete
    return code


def _serve() -> None:
    orders, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # DeepSpeed prints when it is imported
    import torch

    import qlora  # noqa: F401

    for module in LATE_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if "deepspeed" in sys.modules:  # compiling these takes it a minute, and a run killed meanwhile locks out all others
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a run collects garbage; over the imported objects that takes 0.4 s and copies their pages
    running: set[int] = set()
    with orders, answers:
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
