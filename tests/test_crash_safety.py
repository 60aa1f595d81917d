"""Runs that are killed, signalled or out of disk space: what is saved is whole, and the rerun is exact."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import tiny
import torch
from fork_server import ForkServer, Process
from safetensors.torch import load_file

import qlora

TIMES = ("runtime", "per_second")  # suffixes of logged values that differ between equal runs


@pytest.fixture
def command(models: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """`command(name, **flags)`: the command line of a run into tmp_path / name.

    Adapters of rank 64 on a width of 64 have 4096 values, enough for bitsandbytes to keep 8-bit states.
    """
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(45))

    def words(name: str, **flags: Any) -> list[str]:
        defaults = {
            "model_name_or_path": models("llama"),
            "dataset": rows,
            "output_dir": tmp_path / name,
            "source_max_len": 16,
            "target_max_len": 48,
            "lora_r": 64,
            "lora_dropout": 0.1,
            "optim": "paged_adamw_8bit",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "group_by_length": True,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "disable_tqdm": True,
        }
        return conftest._to_argv(defaults | flags)

    return words


def logged(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in log if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in entries]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_same(output: Path, reference: Path) -> None:
    """Every logged value and every weight, bit for bit; and no other files."""
    assert logged(output) == logged(reference)
    one, other = adapter(output), adapter(reference)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    left = {path.name for path in output.iterdir() if not path.name.startswith("left-")}
    assert left == {path.name for path in reference.iterdir()}


def states(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every `state1` and `state2` in the nested state of an optimizer."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in ("state1", "state2"):
            yield name, inner
        else:
            yield from states(inner)


def steps_kept(output: Path) -> set[int]:
    return {qlora.checkpoint_step(folder) for folder in qlora.checkpoints_in(output)}


def until(condition: Callable[[], Any], process: Process, seconds: float = 120) -> None:
    """Wait for the condition or the end of the process."""
    deadline = time.monotonic() + seconds
    while process.running and not condition():
        assert time.monotonic() < deadline, process.text()
        time.sleep(0.001)


# ------------------------------------------------------------------------------------
# SIGKILL
# ------------------------------------------------------------------------------------

# A process kills itself at the n-th call of one of these functions, n at most as given: every point inside a save.
CALLS = [
    ("qlora", "fsync_path", 60),
    ("qlora", "file_digest", 60),
    ("torch", "save", 15),
    ("pathlib", "Path.rename", 6),
    ("shutil", "rmtree", 6),
    ("peft.peft_model", "safe_save_file", 6),
    ("qlora", "write_file", 1),
]


def files_being_saved(output: Path, after: int) -> int:
    """Number of files in the unfinished checkpoint of a step after `after`."""
    folders = [folder for folder in output.glob(".saving-[0-9]*") if int(folder.name.rpartition("-")[2]) > after]
    return max((len(files) for folder in folders for _, _, files in os.walk(folder)), default=0)


def start_and_kill(kind: str, start: Callable[..., Process], output: Path, chance: random.Random) -> str:
    """Run and kill once. Returns when that was; empty if the run was done before a kill from outside."""
    begun = max((int(folder.name.rpartition("-")[2]) for folder in output.glob(".saving-[0-9]*")), default=0)
    if kind == "call":
        module, name, most = chance.choice(CALLS)
        times = chance.randint(1, most)
        process = start(die_at=(module, name, times))
        what = f"call {times} of {module}.{name}"
    else:
        process = start()
        if kind == "start":
            what = delay = chance.uniform(0, 2)
        elif kind == "step":
            steps, delay = chance.randint(0, 4), chance.uniform(0, 0.2)
            what = f"{delay:.3f} s after {steps} steps"
            until(lambda: process.text().count("  loss ") >= steps, process)
        else:  # between two looks at the staging folder a few files are written
            files, delay = chance.randint(0, 7), chance.uniform(0, 0.01)
            after = max([begun, *steps_kept(output)]) + 2 * chance.randint(0, 2)
            what = f"a save after step {after}, {files} files written"
            until(lambda: files_being_saved(output, after) > files, process)
        time.sleep(delay)
        process.kill(signal.SIGKILL)
    code = process.wait()
    assert code == -signal.SIGKILL or (code == 0 and kind != "call"), process.text()
    return str(what) if code else ""


def kill_and_compare(
    fork_server: ForkServer, words: Callable[..., list[str]], folder: Path, kinds: list[str], seed: int, **flags: Any
) -> None:
    """Repeat one command until it is done, killed once for each of `kinds`; compare with an undisturbed run."""
    began, chance = time.monotonic(), random.Random(seed)
    reference = fork_server.start(words("reference", **flags), folder / "reference.log")
    assert reference.wait(600) == 0, reference.text()
    output, last = folder / "out", 0
    for number, kind in enumerate(kinds):

        def start(number: int = number, **options: Any) -> Process:
            return fork_server.start(words("out", **flags), folder / f"{number}.log", **options)

        if not (what := start_and_kill(kind, start, output, chance)):  # on a busy machine
            print(f"kill {number + 1}, {kind}: too late")
            break
        newest = qlora.find_last_checkpoint(output) if output.exists() else None
        step = qlora.checkpoint_step(newest) if newest else 0
        print(f"kill {number + 1}, {kind}: {what}; the newest complete checkpoint is of step {step}")
        assert step >= last, "a complete checkpoint is lost"
        last = step
    final = fork_server.start(words("out", **flags), folder / "final.log")
    assert final.wait(600) == 0, final.text()
    assert_same(output, folder / "reference")
    print(f"{len(kinds)} kills, seed {seed}, {time.monotonic() - began:.0f} s, {len(logged(output))} entries equal")
    newest = qlora.find_last_checkpoint(output)
    found = list(states(torch.load(newest / "optimizer.pt", weights_only=True)))
    matrices = len(adapter(output))
    assert len(found) == 2 * matrices and {tensor.dtype for _, tensor in found} == {torch.uint8}
    assert any("eval_loss" in entry for entry in logged(output))


def test_killed_in_the_middle_of_saves(fork_server, command, tmp_path):
    """Once at one of the calls that a save is made of, and once from outside."""
    seed = random.randrange(10**6)
    kill_and_compare(fork_server, command, tmp_path, ["call", "save"], seed, max_steps=24, packing=True)


def test_killed_at_once_when_the_run_is_marked_completed(fork_server, command, tmp_path):
    """Nothing hidden is left, and the next run finds it completed."""
    words = command("out", max_steps=1, eval_strategy="no")
    kill = """
import os, pathlib, signal
def replace(file, target, replace=pathlib.Path.replace):
    replace(file, target)
    if pathlib.Path(target).name == "completed":
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = replace
"""
    assert fork_server.start(words, tmp_path / "killed", before=kill).wait() == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").glob(".*")} <= {".qlora.lock"}
    again = fork_server.start(words, tmp_path / "again")
    assert again.wait() == 0 and "not trained again" in again.text() and not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "by-length"])
def test_killed_at_many_random_moments(fork_server, command, tmp_path, packing):
    """QLORA_KILLS times, by default 24; QLORA_SEED repeats a sequence."""
    kills = int(os.environ.get("QLORA_KILLS", 24))
    seed = int(os.environ.get("QLORA_SEED", random.randrange(10**6)))
    kinds = random.Random(seed).choices(["start", "step", "save", "call"], (1, 2, 3, 3), k=kills)
    kill_and_compare(fork_server, command, tmp_path, kinds, seed, max_steps=8 * kills, packing=packing)


# ------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------

ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "eval_strategy": "no"}


def wait_for_steps(process: Process, steps: int = 1) -> None:
    until(lambda: process.text().count("  loss ") >= steps, process)
    assert process.running, process.text()


@pytest.mark.parametrize("name", qlora.STOP_SIGNALS)
def test_a_signal_to_all_processes_of_a_run_finishes_the_step_and_saves(fork_server, command, tmp_path, name):
    """Terminals and torchrun signal the workers of the data loader, too, and launchers repeat SIGTERM and SIGUSR1."""
    number = getattr(signal, name)
    process = fork_server.start(command("out", **ENDLESS, dataloader_num_workers=2), tmp_path / "log")
    wait_for_steps(process)
    os.killpg(process.pid, number)
    until(lambda: "finishing the step" in process.text(), process)
    if name != "SIGINT" and process.running:
        process.kill(number)
    assert process.wait() == qlora.STOP_SIGNALS[name], process.text()
    (step,) = steps_kept(tmp_path / "out")
    assert process.text().count("finishing the step") <= 1, "none if the signal came while a line was written"
    *_, last = process.text().strip().splitlines()
    assert last == f"stopped by {name} at step {step}, saved; the same command goes on from what is saved"
    assert not (tmp_path / "out/completed").exists() and not list((tmp_path / "out").glob(".*"))
    assert qlora.checkpoint_problem(tmp_path / f"out/checkpoint-{step}") is None


SAYS_STEPS = """
def say(*args, training_step=qlora.QLoRATrainer.training_step):
    qlora.log.info("a step begins")
    return training_step(*args)
qlora.QLoRATrainer.training_step = say
"""


def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback(tmp_path):
    command = [sys.executable, str(conftest.ROOT / "qlora.py"), "--output_dir", str(tmp_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background of a shell ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT and "Traceback" not in process.communicate()[1]


def test_a_second_ctrl_c_stops_at_once(fork_server, command, tmp_path):
    """In the middle of a step of 4000 rows, which takes tens of seconds."""
    rows = tiny.rows_to_jsonl(tmp_path / "many.jsonl", tiny.support_rows(24) * 167)
    flags = ENDLESS | {"dataset": rows, "gradient_accumulation_steps": 2000, "dataloader_num_workers": 2}
    flags |= {"auto_batch": False}
    process = fork_server.start(command("out", **flags), tmp_path / "log", before=f"import qlora\n{SAYS_STEPS}")
    until(lambda: "a step begins" in process.text(), process)
    process.kill(signal.SIGINT)
    until(lambda: "finishing the step" in process.text(), process)
    time.sleep(0.5)
    assert process.running
    process.kill(signal.SIGINT)
    assert process.wait() == 130, process.text()
    text = process.text()
    assert "interrupted by SIGINT; the same command starts again" in text and "Traceback" not in text
    assert not steps_kept(tmp_path / "out")
    assert not subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout


def test_a_signal_before_training_ends_the_run_at_once(fork_server, command, tmp_path):
    wait = "import signal, qlora\nqlora.load_model = lambda *args: signal.pause()"
    process = fork_server.start(command("out", **ENDLESS), tmp_path / "log", before=wait)
    until(lambda: "This run" in process.text(), process)  # before the model is loaded
    process.kill(signal.SIGUSR1)
    assert process.wait() == qlora.STOP_SIGNALS["SIGUSR1"], process.text()
    assert "interrupted by SIGUSR1" in process.text() and "Traceback" not in process.text()


def test_processes_agree_on_the_step_at_which_a_signal_stops_them(fork_server, command, tmp_path):
    """The signal reaches one of two, and not rank 0."""
    ranks = fork_server.start_ranks(2, command("out", **ENDLESS), tmp_path / "log")
    wait_for_steps(ranks[0], 2)
    ranks[1].kill(signal.SIGUSR1)
    assert [process.wait() for process in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    (step,) = steps_kept(tmp_path / "out")
    folder = tmp_path / f"out/checkpoint-{step}"
    assert f"stopped by SIGUSR1 at step {step}" in ranks[0].text()
    assert qlora.checkpoint_problem(folder) is None
    assert {path.name for path in folder.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_one_run_at_a_time_writes_into_a_folder(fork_server, command, tmp_path):
    """The second one says who is there and changes nothing; after a kill -9 the folder is free at once."""
    flags = ENDLESS | {"save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 1}
    (tmp_path / "link").symlink_to(tmp_path / "merged")
    first = fork_server.start(command("out", **flags, merged_output_dir=tmp_path / "link"), tmp_path / "first")
    until(lambda: steps_kept(tmp_path / "out"), first)
    for used, names in (
        ("out", {"final_output_dir": "other"}),
        ("out", {"output_dir": "other", "final_output_dir": "out"}),
        (".merging-merged", {"output_dir": "other", "merged_output_dir": "merged"}),
    ):
        words = command("out", **flags, **{flag: tmp_path / name for flag, name in names.items()})
        refused = fork_server.start(words, tmp_path / f"log of {names}")
        assert refused.wait() == 2
        (line,) = [line for line in refused.text().splitlines() if line.startswith("error: ")]
        assert f"{tmp_path / used} is in use by process {first.pid} on {socket.gethostname()}" in line
    ranks = fork_server.start_ranks(2, command("out", **flags), tmp_path / "ranks")
    assert [rank.wait() for rank in ranks] == [2, 2] and "in use by" in ranks[0].text()
    assert first.running and not (tmp_path / "other").exists()
    first.kill(signal.SIGKILL)
    first.wait()
    third = fork_server.start(command("out", **flags), tmp_path / "third")
    wait_for_steps(third)
    third.kill(signal.SIGTERM)
    assert third.wait() == 143 and not list((tmp_path / "out").glob(".*"))


# ------------------------------------------------------------------------------------
# scripts/slurm.sbatch
# ------------------------------------------------------------------------------------

# srun starts every task with its rank. Without `B:` Slurm signals the tasks and not the batch shell.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & echo $! >> "$TASKS"
done
failed=0; for task in $(cat "$TASKS"); do wait "$task" || failed=$?; done; exit $failed
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; else echo 127.0.0.1; fi
"""


@pytest.fixture
def slurm(command: Any, tmp_path: Path, models: Callable[..., Path]) -> Callable[..., subprocess.Popen]:
    """`slurm(*words, tasks=1)`: run the script as a job, with stand-ins for Slurm's commands."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*words: str, tasks: int = 1, **environment: str) -> subprocess.Popen:
        (tmp_path / "tasks").unlink(missing_ok=True)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TASKS": str(tmp_path / "tasks"),
            "REQUEUED": str(tmp_path / "requeued"),
            "PYTHON": sys.executable,
            "MODEL": str(models("llama")),
            "DATASET": str(tmp_path / "rows.jsonl"),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "BF16": "False",
            "SLURM_JOB_ID": str(random.randrange(10**6)),
            "SLURM_JOB_NODELIST": "here",
            "SLURM_NTASKS": str(tasks),
            "SLURM_SUBMIT_DIR": str(conftest.ROOT),
            **environment,
        }
        command = ["bash", str(conftest.ROOT / "scripts/slurm.sbatch"), *words]
        with (tmp_path / "job").open("a") as log:
            return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)

    tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(24))
    return start


SMALL = ["--lora_r", "4", "--logging_steps", "1", "--gradient_accumulation_steps", "1", "--source_max_len", "16"]


@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.slow)])
def test_a_slurm_job_saves_before_its_time_limit_and_is_requeued_until_done(slurm, tmp_path, tasks):
    job = slurm(*SMALL, "--max_steps", "100000", tasks=tasks)
    deadline = time.monotonic() + 180
    while "  loss " not in (tmp_path / "job").read_text():
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "job").read_text()
        time.sleep(0.05)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)  # the task itself must be the program, not a shell around it
    assert job.wait(120) == 0, (tmp_path / "job").read_text()
    assert steps_kept(tmp_path / "out")
    assert len((tmp_path / "requeued").read_text().split()) == 1
    # the program finishes: it writes `completed`, then metrics.json (tests/test_training.py)
    done = tmp_path / "done"
    done.write_text('#!/bin/sh\ntouch "$OUTPUT_DIR/completed"; sleep 0.1; touch "$OUTPUT_DIR/metrics.json"\n')
    done.chmod(0o755)
    assert slurm(*SMALL, tasks=tasks, PYTHON=str(done)).wait(120) == 0
    assert len((tmp_path / "requeued").read_text().split()) == 1, "a job that is done is not requeued"


@pytest.mark.slow
def test_a_slurm_job_with_a_user_error_is_not_requeued(slurm, tmp_path):
    job = slurm("--lora_rank", "3")
    assert job.wait(120) == 2 and not (tmp_path / "requeued").exists()


# ------------------------------------------------------------------------------------
# Full disks
# ------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("room", [0.3, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.05, 0.7, 0.9, 0.97))])
def test_a_real_disk_fills_up_during_a_save(fork_server, command, tmp_path, room):
    """The file system has room for one checkpoint and a part of the next: the first one stays.

    After the disk has grown, the same command ends as if nothing had happened.
    """
    flags = {"max_steps": 4, "eval_strategy": "no"}
    assert fork_server.start(command("reference", **flags), tmp_path / "straight").wait() == 0
    size = sum(path.stat().st_size for path in (tmp_path / "reference/checkpoint-2").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * (1 + room)) + 80_000}", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root; the test of file size limits covers the error")
    try:
        full = fork_server.start(command("disk/out", **flags), tmp_path / "full")
        assert full.wait() == 2, full.text()
        (line,) = [line for line in full.text().splitlines() if line.startswith("error: ")]
        assert "checkpoint-4: not saved: " in line and "Traceback" not in full.text()
        assert steps_kept(disk / "out") == {2} and not list((disk / "out").glob(".saving-*"))
        assert qlora.checkpoint_problem(disk / "out/checkpoint-2") is None
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert fork_server.start(command("disk/out", **flags), tmp_path / "again").wait() == 0
        assert_same(disk / "out", tmp_path / "reference")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "full_at",
    [
        pytest.param(("peft.peft_model", "safe_save_file"), marks=pytest.mark.slow),
        ("transformers", "PreTrainedTokenizerBase.save_pretrained"),
        ("torch", "save"),
        pytest.param(("transformers", "TrainerState.save_to_json"), marks=pytest.mark.slow),
        ("qlora", "write_manifest"),
    ],
    ids=lambda place: place[1],
)
def test_a_file_size_limit_is_reported_whichever_library_hits_it(fork_server, command, tmp_path, full_at):
    """RLIMIT_FSIZE stands for a quota: the kernel refuses to write beyond it."""
    flags = {"eval_strategy": "no", "max_steps": 4}
    first = fork_server.start(command("out", **flags | {"max_steps": 2}), tmp_path / "first")
    assert first.wait() == 0, first.text()
    before = snapshot(tmp_path / "out/checkpoint-2")
    limited = fork_server.start(command("out", **flags), tmp_path / "limited", full_at=full_at)
    assert limited.wait() == 2, limited.text()
    (line,) = [line for line in limited.text().splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'out'}/checkpoint-4: not saved: " in line and "Traceback" not in limited.text()
    assert snapshot(tmp_path / "out/checkpoint-2") == before and steps_kept(tmp_path / "out") == {2}
    assert not list((tmp_path / "out").glob(".saving-*"))


def test_a_folder_that_can_no_longer_be_written(fork_server, command, tmp_path):
    """A file replaces the output folder, so that even root cannot write there. The moved folder is intact."""
    flags = {"max_steps": 100_000, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "no"}
    process = fork_server.start(command("out", **flags), tmp_path / "log")
    until(lambda: steps_kept(tmp_path / "out"), process)
    (tmp_path / "out").rename(tmp_path / "away")
    (tmp_path / "out").write_text("")
    assert process.wait() == 2, process.text()
    (line,) = [line for line in process.text().splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'out'}" in line and "not saved: " in line and "Traceback" not in process.text()
    assert qlora.find_last_checkpoint(tmp_path / "away") is not None
