"""Runs with random flags that are killed and resumed with others: they keep to them, and to what lay around them."""

import contextlib
import io
import math
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainerCallback, get_scheduler

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import selftest

import qlora


class Killed(BaseException):
    """Ends a run as kill -9 does: no handler of the program sees it."""


def start(flags: Sequence[str], *callbacks: TrainerCallback) -> tuple[int | str, str, dict[int, list[str]]]:
    """Run qlora.py in this process. Returns its exit status or "killed", its output and the rows of each step."""
    build, training_step = qlora.build_callbacks, qlora.QLoRATrainer.training_step
    output, rows = io.StringIO(), dict[int, list[str]]()
    code: int | str = "killed"

    def noting(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows[self.state.global_step + 1] = list(inputs["step"].where)
        return training_step(self, model, inputs, *args)

    with (
        mock.patch.object(qlora, "build_callbacks", lambda *args: [*build(*args), *callbacks]),
        mock.patch.object(qlora.QLoRATrainer, "training_step", noting),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        contextlib.suppress(Killed),
    ):
        code = qlora.main(flags)
    return code, output.getvalue(), rows


def logged(folder: Path, key: str) -> dict[int, float]:
    """A number that a run logged, by step."""
    history = qlora.read_json(folder / "trainer_state.json")["log_history"]
    return {entry["step"]: entry[key] for entry in history if "loss" in entry}


Choices = list[list[dict[str, Any]]]  # of each list, one
FIXED: Choices = [  # for the whole life of a run
    [{"bits": 4}, {"bits": 16}, {"bits": 16, "full_finetune": True}],
    [{"optim": "paged_adamw_32bit"}, {"optim": "adamw_torch"}], [{"lora_dropout": 0.1, "seed": 1}, {}],
    [{"per_device_train_batch_size": size} for size in (3, 4, 8)],
    [{"gradient_accumulation_steps": count} for count in (1, 2)],
    [{"train_sampling_strategy": name} for name in ("group_by_length", "random")],
    [{"packing": True}, {"dataloader_drop_last": True}, {"dataloader_drop_last": False}],
    [{"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": best} for best in (False, True)] + [{}],
    [{"output_dir": "new"}, {"output_dir": "older/new"}, {"output_dir": "new", "working_dir": "work"},
     {"output_dir": "new", "final_output_dir": "final"}],
]  # fmt: skip
CHANGING: Choices = [  # with each start
    [{"lr_scheduler_type": name} for name in ("constant", "linear", "cosine", "constant_with_warmup")],
    [{"learning_rate": rate} for rate in (1e-3, 2e-4)], [{"warmup_steps": steps} for steps in (0, 3)],
    [{"weight_decay": 0.1, "max_grad_norm": 1}, {}], [{"max_steps": steps} for steps in (9, 12)],
    [{"save_steps": steps} for steps in (1, 2, 3)], [{"save_total_limit": limit} for limit in (-1, 1, 2)],
]  # fmt: skip
HELD_OUT = 8  # rows, if there is an evaluation


class Interrupt(TrainerCallback):
    """Kills the run at one event in ten, and sends it SIGTERM at another."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        fate = self.chance.random()
        if fate < 0.1:
            raise Killed
        if fate < 0.2:
            signal.raise_signal(signal.SIGTERM)

    on_step_end = on_save = on_step_begin


def draw(chance: random.Random, choices: Choices) -> dict[str, Any]:
    """One of each list."""
    return {name: value for options in choices for name, value in chance.choice(options).items()}


def learning_rates(flags: dict[str, Any]) -> list[float]:
    """The learning rate of each step, from transformers alone."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=flags["learning_rate"])
    schedule: Any = get_scheduler(flags["lr_scheduler_type"], optimizer, flags["warmup_steps"], flags["max_steps"])
    return [flags["learning_rate"] * schedule.lr_lambdas[0](step) for step in range(flags["max_steps"])]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, beside the cache."""
    files = (path for path in folder.rglob("*") if path.is_file() and folder / "cache" not in path.parents)
    return {path: path.read_bytes() for path in files}


def check_random_runs(folder: Path, seed: int = 3, starts: int = 4) -> str:
    """A run that is killed and resumed with other flags keeps to them, and to what lay around it.

    Nothing that was there before is gone or changed, the log's rates and the rows of each step are those of the flags,
    and what a line calls saved loads.
    """
    chance, expected, trained = random.Random(seed), dict[int, float](), dict[int, list[str]]()
    if not (folder / "older").exists():
        selftest.run(folder, "older", max_steps=2)
    shared, before = draw(chance, FIXED), contents(folder)
    shared |= {name: folder / f"{value}-{seed}" for name, value in shared.items() if name.endswith("_dir")}
    work = shared.get("working_dir", shared["output_dir"])
    for number in range(1, starts + 1):
        flags = shared | draw(chance, CHANGING)
        words = selftest.flags_for(
            folder, "", **flags, eval_dataset_size=HELD_OUT, source_max_len=16, target_max_len=112
        )
        code, text, rows = start(words, *([Interrupt(chance)] if number < starts else []))
        where = f"seed {seed}, start {number}, {flags}:\n{text[-2000:]}"
        done = (work / "completed").exists()
        assert code in ((0, 143) if done else (143, "killed")), f"exit status {code}, {where}"
        for step in re.findall(r".* at step (\d+), saved", "" if done else text):
            assert qlora.checkpoint_problem(work / f"checkpoint-{step}") is None, f"{step} is not saved, {where}"
        expected |= {step: rate for step, rate in enumerate(learning_rates(flags), 1) if step in rows}
        trained |= rows
        after = contents(folder)
        changed = [str(path) for path, data in before.items() if after.get(path) != data]
        assert not changed, f"{changed} changed, {where}"
        if done:
            break
    rates = logged(work, "learning_rate")
    wrong = {n: rate for n, rate in rates.items() if not math.isclose(rate, expected[n], rel_tol=1e-6, abs_tol=1e-12)}
    assert not wrong, f"rates {wrong} are not the flags': expected {expected}, {where}"
    if not shared.get("packing"):
        check_rows(trained, shared)
    return f"{number} starts, {len(rates)} steps"


def check_rows(trained: dict[int, list[str]], flags: dict[str, Any]) -> None:
    """Every epoch has each row once; where the last, smaller step is dropped, at most once."""
    size = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    count = len(selftest.ROWS) - HELD_OUT * ("eval_strategy" in flags)
    steps = (math.floor if flags["dataloader_drop_last"] else math.ceil)(count / size)
    for first in range(1, max(trained) - steps + 2, steps):
        rows = Counter(row for step in range(first, first + steps) for row in trained[step])
        count = min(count, steps * size)
        assert len(rows) == rows.total() == count, f"steps from {first} on have the rows {rows}, expected {count}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and a dataset, as the self-test writes them."""
    folder = tmp_path_factory.mktemp("random")
    selftest.write_inputs(folder)
    return folder


@pytest.mark.parametrize("seed", [3, 9])  # of four starts each
def test_random_runs_keep_to_their_flags(folder, seed):
    check_random_runs(folder, seed)


@pytest.mark.slow
def test_many_random_runs_keep_to_their_flags(folder):
    """QLORA_RUNS of them, by default 30; QLORA_SEED repeats one."""
    seeds = [int(os.environ["QLORA_SEED"])] if "QLORA_SEED" in os.environ else random.sample(range(10**6), 30)
    for seed in seeds[: int(os.environ.get("QLORA_RUNS", 30))]:
        print(f"seed {seed}: {check_random_runs(folder, seed)}")
