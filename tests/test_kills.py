"""SIGKILL at any moment, real signals to real processes, several processes that must agree: see forks.py."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import tiny
import torch
from forks import Forks, Process
from safetensors.torch import load_file

import qlora

TIMED = ("runtime", "per_second")  # what of a logged entry differs between two equal runs


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def command(models: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """`command(name, **flags)`: the words of a run into tmp_path / name.

    Adapters of rank 64 on a width of 64: 4096 numbers, from which on bitsandbytes keeps its state in 8 bit.
    """
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(45))

    def words(name: str, **flags: Any) -> list[str]:
        plain = {
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
        return conftest._to_argv(plain | flags)

    return words


def logged(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in log if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(TIMED)} for entry in entries]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_same(output: Path, reference: Path) -> None:
    """Every logged number and every weight, bit for bit; and no litter."""
    assert logged(output) == logged(reference)
    one, other = adapter(output), adapter(reference)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    left = {path.name for path in output.iterdir() if not path.name.startswith("left-")}
    assert left == {path.name for path in reference.iterdir()}


def states(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every `state1` and `state2` of an optimizer's state, however deep."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in ("state1", "state2"):
            yield name, inner
        else:
            yield from states(inner)


def until(condition: Callable[[], Any], process: Process, seconds: float = 120) -> None:
    """Wait for it, or for the end of the process."""
    deadline = time.monotonic() + seconds
    while process.running and not condition():
        assert time.monotonic() < deadline, process.text()
        time.sleep(0.001)


# ------------------------------------------------------------------------------------
# SIGKILL
# ------------------------------------------------------------------------------------

# Functions at whose n-th call a process kills itself, and the largest n: the moments between which a save is torn.
CALLS = [
    ("qlora", "flush", 30),
    ("qlora", "file_digest", 25),
    ("torch", "save", 7),
    ("pathlib", "Path.rename", 3),
    ("shutil", "rmtree", 3),
    ("peft.peft_model", "safe_save_file", 3),
    ("qlora", "write_file", 1),
]


def files_being_saved(output: Path) -> int:
    """Of a save under way, in a `.saving-` folder of a process that was not killed before."""
    folders = [folder for folder in output.glob(".saving-*") if not (folder / "stale").exists()]
    return max((len(files) for folder in folders for _, _, files in os.walk(folder)), default=0)


def start_and_kill(kind: str, start: Callable[..., Process], output: Path, chance: random.Random) -> str:
    """One run that is killed. Returns at what it was."""
    for folder in output.glob(".saving-*"):
        (folder / "stale").touch()
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
            until(lambda: process.text().count("'loss'") >= steps, process)
        else:  # between two looks at the hidden folder lie a few files
            files, delay = chance.randint(0, 11), chance.uniform(0, 0.01)
            what = f"a save, {files} files written"
            until(lambda: files_being_saved(output) > files, process)
        time.sleep(delay)
        process.kill(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"ended before the kill: more steps are needed\n{process.text()}"
    return str(what)


def kill_and_compare(
    forks: Forks, words: Callable[..., list[str]], folder: Path, kinds: list[str], seed: int, **flags: Any
) -> None:
    """The same command until it is done, killed once for each of `kinds`, against the run that nothing disturbs."""
    began, chance = time.monotonic(), random.Random(seed)
    reference = forks.start(words("reference", **flags), folder / "reference.log")
    assert reference.wait(600) == 0, reference.text()
    output, last = folder / "out", 0
    for number, kind in enumerate(kinds):

        def start(number: int = number, **options: Any) -> Process:
            return forks.start(words("out", **flags), folder / f"{number}.log", **options)

        what = start_and_kill(kind, start, output, chance)
        newest = qlora.find_last_checkpoint(output) if output.exists() else None
        step = qlora.step_of(newest) if newest else 0
        print(f"kill {number + 1}, {kind}: {what}; the newest whole checkpoint is of step {step}")
        assert step >= last, "a checkpoint that was whole is lost"
        last = step
    final = forks.start(words("out", **flags), folder / "final.log")
    assert final.wait(600) == 0, final.text()
    assert_same(output, folder / "reference")
    print(f"{len(kinds)} kills, seed {seed}, {time.monotonic() - began:.0f} s, {len(logged(output))} entries equal")
    newest = qlora.find_last_checkpoint(output)
    found = list(states(torch.load(newest / "optimizer.pt", weights_only=True)))
    matrices = len(adapter(output))
    assert len(found) == 2 * matrices and {tensor.dtype for _, tensor in found} == {torch.uint8}
    assert any("eval_loss" in entry for entry in logged(output))


def test_killed_four_times(forks, command, tmp_path):
    """At the start, between steps, in the middle of a save, and at one of the calls that a save is made of."""
    kinds = ["step", "save", "start", "call"]
    kill_and_compare(forks, command, tmp_path, kinds, seed=random.randrange(10**6), max_steps=18, packing=True)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "by-length"])
def test_killed_at_any_number_of_moments(forks, command, tmp_path, packing):
    """QLORA_KILLS, 24 without it, in an order that QLORA_SEED repeats."""
    kills = int(os.environ.get("QLORA_KILLS", 24))
    seed = int(os.environ.get("QLORA_SEED", random.randrange(10**6)))
    kinds = random.Random(seed).choices(["start", "step", "save", "call"], (1, 2, 3, 3), k=kills)
    kill_and_compare(forks, command, tmp_path, kinds, seed, max_steps=8 * kills, packing=packing)
