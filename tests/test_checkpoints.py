"""Stopping, resuming, torn checkpoints, and what `completed` means."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import qlora

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ("loss", "learning_rate", "grad_norm", "epoch")  # of each step


class Raise(TrainerCallback):
    """Raises a signal in this process when `event` comes and `step` steps are done."""

    def __init__(self, event: str, step: int, number: int) -> None:
        def handler(args, state, control, **kwargs):
            if state.global_step == step:
                signal.raise_signal(number)

        setattr(self, event, handler)


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(5)`: the next run gets SIGTERM while it trains step 5; `interrupt(None)`: none."""
    build_callbacks = qlora.build_callbacks

    def arm(step, number=signal.SIGTERM, event="on_step_begin"):
        done = step - 1 if event == "on_step_begin" and step else step
        extra = [] if step is None else [Raise(event, done, number)]
        monkeypatch.setattr(qlora, "build_callbacks", lambda *a, **k: [*build_callbacks(*a, **k), *extra])

    return arm


@pytest.fixture
def stopped(run_qlora, interrupt, tmp_path):
    """`stopped(5, **flags)`: a run into tmp_path / "out" that SIGTERM stopped after step 5."""

    def run(step, **flags):
        interrupt(step)
        result = run_qlora(**flags)
        interrupt(None)
        assert result.code == 143
        return result

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(run) -> list[tuple]:
    log = run.json("trainer_state.json")["log_history"]
    return [tuple(entry[name] for name in TRAINED) for entry in log if "loss" in entry]


def assert_equal_runs(run, reference) -> None:
    assert (run.code, reference.code) == (0, 0)
    assert trained(run) == trained(reference)
    assert same_weights(run.output_dir, reference.output_dir)
    assert not hidden(run.output_dir)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def steps_kept(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def error_of(run) -> str:
    """The one message of a run that ended with exit status 2."""
    assert run.code == 2 and "Traceback" not in run.stderr
    (message,) = re.findall(r"error: (.*)", run.stderr)
    return message


# ------------------------------------------------------------------------------------
# Exact resume
#
# 23 rows, batches of 2, two of them a step: an epoch has six steps, and its last step one row less.
# ------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path):
    return {
        "dataset": tiny.rows_to_jsonl(tmp_path / "uneven.jsonl", tiny.support_rows(23)),
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,
        "max_steps": 9,
        "save_steps": 100,
        "learning_rate": 5e-3,
        "source_max_len": 16,
        "target_max_len": 80,
    }


@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((2,), {"optim": "paged_adamw_8bit", "lora_r": 64, "group_by_length": False}),
        ((8,), {"optim": "paged_adamw_8bit", "lora_r": 64}),
        ((6,), {"optim": "paged_adamw_32bit"}),
        ((8,), {"optim": "paged_adamw_32bit", "dataloader_num_workers": 1}),
        ((6, 7), {"optim": "paged_adamw_32bit", "group_by_length": False}),
        ((3, 9), {"lr_scheduler_type": "cosine", "warmup_steps": 3, "neftune_noise_alpha": 5}),
    ],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(run_qlora, interrupt, uneven, tmp_path, stops, flags):
    """Stopped inside the first epoch, at its end, inside the second, twice, after the last step."""
    flags = uneven | flags
    reference = run_qlora(output_dir=tmp_path / "straight", **flags)
    for step in stops:
        interrupt(step)
        broken = run_qlora(**flags)
        assert broken.code == 143
        assert max(steps_kept(broken.output_dir)) == step
        assert (broken.output_dir / "completed").exists() == (step == 9) and not hidden(broken.output_dir)
    interrupt(None)
    resumed = run_qlora(**flags)
    assert ("not trained again" if stops[-1] == 9 else f"checkpoint-{stops[-1]}") in resumed.stderr
    assert len(trained(reference)) == 9
    assert_equal_runs(resumed, reference)
    if "8bit" in flags.get("optim", ""):
        saved = torch.load(resumed.output_dir / f"checkpoint-{stops[0]}/optimizer.pt")
        assert "torch.uint8" in str(saved["state"])  # the 8-bit states that the resume must bring back


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_signal_finishes_the_step_and_saves(run_qlora, interrupt, number, code):
    interrupt(3, number)
    run = run_qlora(save_steps=100)
    assert run.code == code
    assert steps_kept(run.output_dir) == {3}
    line = run.stderr.strip().splitlines()[-1]
    assert "step 3" in line and "same command" in line
    assert not (run.output_dir / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_evaluate"])
def test_signal_in_the_last_step_exits_after_saving(run_qlora, interrupt, event):
    interrupt(4, signal.SIGTERM, event)
    run = run_qlora(save_strategy="no", eval_strategy="steps", eval_steps=4)
    assert run.code == 143 and "stopped by SIGTERM at step 4, saved" in run.stderr
    assert (run.output_dir / "completed").exists() and not (run.output_dir / "metrics.json").exists()
    assert run_qlora(save_strategy="no", eval_strategy="steps", eval_steps=4).code == 0


def test_a_signal_saves_a_step_that_is_not_the_best(run_qlora, interrupt):
    """The Trainer saves the best alone and forgets that another save is due."""
    flags = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    interrupt(3)
    run = run_qlora(**flags, greater_is_better=True, learning_rate=1e-2)  # the first step stays the best
    assert run.code == 143 and "stopped by SIGTERM at step 3, saved" in run.stderr
    assert steps_kept(run.output_dir) == {1, 3}


def test_a_signal_during_a_step_without_gradient_saves_it(run_qlora, models, interrupt, tmp_path):
    """A masked model's short rows, of which most steps mask no token."""
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": word} for word in ("a", "bc", "d", "ef", "g", "hi")])
    interrupt(3)
    run = run_qlora(
        model_name_or_path=models("encoder", family="bert"), dataset=data, mask_prob=0.05, save_steps=100,
        per_device_train_batch_size=1, target_max_len=None, logging_steps=1,
    )  # fmt: skip
    log = run.json("checkpoint-3/trainer_state.json")["log_history"]
    assert run.code == 143 and steps_kept(run.output_dir) == {3} and log[-1]["step"] == 3
    assert any(entry["grad_norm"] == 0 for entry in log)


# Three steps an epoch, at whose end the loss is logged, then the model is evaluated, then saved.
EPOCHS = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "max_steps": None, "eval_dataset_size": 4,
          "max_train_samples": 20, "logging_steps": 1}  # fmt: skip


@pytest.mark.parametrize(("step", "strategy"), [(2, "eval"), (2, "eval save"), (3, "eval")])
def test_a_signal_saves_its_step_once_and_the_resume_is_exact(
    run_qlora, interrupt, tmp_path, monkeypatch, step, strategy
):
    """In the middle of an epoch, whose evaluation is not due yet, and at its end."""
    flags = EPOCHS | {f"{name}_strategy": "epoch" for name in strategy.split()}
    flags |= {"save_steps": 1} if strategy == "eval" else {}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    rename, committed = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda file, target: committed.append(target.name) or rename(file, target))
    interrupt(step)
    broken = run_qlora(**flags)
    assert broken.code == 143 and committed == [
        f"checkpoint-{n}" for n in range(1 if "save_steps" in flags else step, step + 1)
    ]
    interrupt(None)
    resumed = run_qlora(**flags)
    assert_equal_runs(resumed, straight)
    evaluated = [
        [
            (entry["step"], entry["eval_loss"])
            for entry in run.json("trainer_state.json")["log_history"]
            if "eval_loss" in entry
        ]
        for run in (straight, resumed)
    ]
    assert evaluated[0] == evaluated[1] and [at for at, _ in evaluated[0]] == [3, 6]


def test_a_kill_during_an_evaluation_at_the_end_of_an_epoch(run_qlora, monkeypatch, tmp_path):
    """A checkpoint of the epoch's last step comes after it: it draws random numbers, and its loss is logged."""
    flags = EPOCHS | {"eval_strategy": "epoch", "save_steps": 1, "lora_dropout": 0.1, "learning_rate": 1e-2}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(qlora.QLoRATrainer, "evaluate", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        run_qlora(**flags)
    assert steps_kept(tmp_path / "out") == {1, 2}
    resumed = run_qlora(**flags)
    assert_equal_runs(resumed, straight)
    logs = [run.json("trainer_state.json")["log_history"] for run in (straight, resumed)]
    losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.slow  # torch waits some seconds for its workers
def test_a_signal_while_a_worker_hangs_ends_the_run(run_qlora, monkeypatch):
    collate = qlora.collate_step

    def hang(rows, masked=False):
        if os.getpid() != here and rows and "length" in rows[0]:
            calls.append(1)
            if len(calls) == 3:
                time.sleep(100)
        return collate(rows, masked)

    here, began, calls = os.getpid(), time.monotonic(), []
    monkeypatch.setattr(qlora, "collate_step", hang)
    monkeypatch.setattr(qlora.GracefulStop, "grace", 0.5)
    build_callbacks = qlora.build_callbacks

    class Later(TrainerCallback):
        """Sends a signal while the third step's rows do not come: the loader fetches them before the second step."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                threading.Timer(1.0, os.kill, (here, signal.SIGTERM)).start()

    monkeypatch.setattr(qlora, "build_callbacks", lambda *args: [*build_callbacks(*args), Later()])
    run = run_qlora(dataloader_num_workers=1, save_steps=1)
    assert run.code == 143 and time.monotonic() - began < 60
    assert "interrupted by SIGTERM" in run.stderr.splitlines()[-1] and steps_kept(run.output_dir) == {1}


def test_sigint_after_training_keeps_the_completed_run(run_qlora, monkeypatch):
    def generate(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(qlora, "generate_predictions", generate)
    run = run_qlora(do_predict=True, predict_with_generate=True)
    assert run.code == 130
    assert (run.output_dir / "completed").exists()


def test_the_line_of_a_stop_names_the_command_that_goes_on(run_qlora, stopped, monkeypatch, tmp_path):
    """The same command would start anew, or from the checkpoint that was picked."""
    assert stopped(3).stderr.endswith("saved; the same command goes on from what is saved\n")
    picked = stopped(4, max_steps=6, resume_from_checkpoint=tmp_path / "out/checkpoint-3")
    assert picked.stderr.endswith(
        "saved; the same command without --resume_from_checkpoint goes on from what is saved\n"
    )
    for error, said in (
        (KeyboardInterrupt(), "interrupted by SIGINT"),
        (RuntimeError("gloo: closed"), "another rank of this run has exited"),
    ):
        for place, words in (
            ("load_splits", "starts again"),  # nothing is saved yet
            ("generate_predictions", "without --overwrite_output_dir goes on from what is saved"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(qlora, place, lambda *args, error=error: (_ for _ in ()).throw(error))
                run = run_qlora(**PREDICT, max_steps=1, overwrite_output_dir=True)
            assert run.stderr.endswith(f"{said}; the same command {words}\n")


# ------------------------------------------------------------------------------------
# Whole or absent
# ------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _lose_manifest(folder: Path) -> None:
    """As a program leaves it that writes no list of its files."""
    (folder / "checkpoint.json").unlink()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _foreign(folder: Path) -> None:
    _empty(folder)
    (folder / "notes.txt").write_text("not a checkpoint")


DAMAGE = {
    "half an adapter": lambda f: _truncate(f / "adapter_model.safetensors"),
    "no adapter": lambda f: (f / "adapter_model.safetensors").unlink(),
    "half an optimizer": lambda f: _truncate(f / "optimizer.pt"),
    "no optimizer": lambda f: (f / "optimizer.pt").unlink(),
    "empty random states": lambda f: (f / "rng_state.pth").write_bytes(b""),
    "no trainer state": lambda f: (f / "trainer_state.json").unlink(),
    "an empty folder": _empty,
    "a foreign folder": _foreign,
    "no manifest, half an adapter": lambda f: (
        _lose_manifest(f),
        _truncate(f / "adapter_model.safetensors"),
    ),
    "no manifest, half an optimizer": lambda f: (_lose_manifest(f), _truncate(f / "optimizer.pt")),
    "no manifest, half a trainer state": lambda f: (
        _lose_manifest(f),
        _truncate(f / "trainer_state.json"),
    ),
}
_built: dict[str, Path] = {}


def test_one_flipped_bit_in_any_file_invalidates_a_checkpoint(broken_off, tmp_path):
    """A bit of each file that the manifest lists, wherever it lies."""
    out, chance = tmp_path / "out", random.Random(0)
    for file in sorted({*(out / "checkpoint-5").iterdir()} - {out / "checkpoint-5/checkpoint.json"}):
        for _ in range(2):
            whole = file.read_bytes()
            torn, place = bytearray(whole), chance.randrange(len(whole))
            torn[place] ^= 1 << chance.randrange(8)
            file.write_bytes(torn)
            assert qlora.find_last_checkpoint(out) == out / "checkpoint-4", (file, place)
            assert file.name in qlora.checkpoint_problem(out / "checkpoint-5")
            file.write_bytes(whole)
    assert qlora.find_last_checkpoint(out) == out / "checkpoint-5"


@pytest.mark.parametrize("damaged", [(2, 4, 5), (4, 5)])
def test_torn_checkpoints_do_not_count_towards_save_total_limit(run_qlora, broken_off, interrupt, tmp_path, damaged):
    """--save_total_limit 1: the newest is kept, and those that are torn have higher numbers."""
    for step in damaged:
        _truncate(tmp_path / f"out/checkpoint-{step}/optimizer.pt")
    interrupt(3)
    run = run_qlora(max_steps=6, save_total_limit=1, save_steps=100)
    interrupt(None)
    assert run.code == 143 and qlora.find_last_checkpoint(tmp_path / "out") == tmp_path / "out/checkpoint-3"
    assert same_weights(run_qlora(max_steps=6, save_total_limit=1).output_dir, broken_off)


def test_a_checkpoint_picked_by_another_name(run_qlora, broken_off, tmp_path):
    (tmp_path / "out/checkpoint-4").rename(tmp_path / "out/best")
    run = run_qlora(max_steps=6, resume_from_checkpoint=tmp_path / "out/best")
    assert run.code == 0 and same_weights(run.output_dir, broken_off)


def test_the_working_folder_is_picked(run_qlora, broken_off, tmp_path, monkeypatch):
    """Its last step is also the last that is asked for."""
    monkeypatch.chdir(tmp_path / "out/checkpoint-4")
    run = run_qlora(max_steps=4, resume_from_checkpoint=".")
    assert run.code == 0 and same_weights(run.output_dir, tmp_path / "out/checkpoint-4")


def test_kill_while_writing_metrics_does_not_break_the_next_run(run_qlora, monkeypatch):
    """The files of metrics are whole too: one that breaks off would be read by the next run."""
    replace = Path.replace

    def kill(file, target):
        if target.name == "all_results.json":
            raise Killed
        return replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            run_qlora(do_eval=True)
    assert run_qlora(do_eval=True).code == 0


@pytest.fixture
def broken_off(run_qlora, stopped, tmp_path, tmp_path_factory):
    """A copy, at tmp_path / "out", of a run of 6 steps stopped after step 5; and the whole run."""
    if not _built:
        root = tmp_path_factory.mktemp("broken-off")
        run_qlora(output_dir=root / "straight", max_steps=6)
        stopped(5, output_dir=root / "stopped", max_steps=6)
        _built.update(straight=root / "straight", stopped=root / "stopped")
    shutil.copytree(_built["stopped"], tmp_path / "out")
    assert steps_kept(tmp_path / "out") == {2, 4, 5}
    return _built["straight"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_skipped_with_a_warning(broken_off, tmp_path, caplog, kind):
    DAMAGE[kind](tmp_path / "out/checkpoint-5")
    with caplog.at_level("WARNING", "qlora"):
        assert qlora.find_last_checkpoint(tmp_path / "out") == tmp_path / "out/checkpoint-4"
    assert [message for message in caplog.messages if "checkpoint-5" in message and "skipped" in message]


def test_resume_from_the_checkpoint_before_a_damaged_one(run_qlora, broken_off, tmp_path):
    DAMAGE["no manifest, half an optimizer"](tmp_path / "out/checkpoint-5")
    run = run_qlora(max_steps=6)
    assert run.code == 0 and same_weights(run.output_dir, broken_off)
    assert "checkpoint-5 is not whole" in run.stderr and "checkpoint-4" in run.stderr


def test_run_starts_anew_when_every_checkpoint_is_damaged(run_qlora, broken_off, tmp_path):
    for step in (2, 4, 5):
        _truncate(tmp_path / f"out/checkpoint-{step}/adapter_model.safetensors")
    run = run_qlora(max_steps=6)
    assert run.code == 0 and same_weights(run.output_dir, broken_off)
    assert len(trained(run)) == 6


def test_numbers_decide_which_checkpoint_is_newest(broken_off, tmp_path):
    out = tmp_path / "out"
    for name in ("checkpoint-250", "checkpoint-1000", "checkpoint-9999.bak", "old-checkpoint-5000"):
        shutil.copytree(out / "checkpoint-5", out / name)
    for name in ("checkpoint-", "checkpoint-best", "checkpoint--7000", "checkpoint-8000x"):
        shutil.copytree(out / "checkpoint-5", out / name)
    (out / "checkpoint-6000").write_text("a file")
    assert qlora.find_last_checkpoint(out) == out / "checkpoint-1000"
    _truncate(out / "checkpoint-1000/optimizer.pt")
    assert qlora.find_last_checkpoint(out) == out / "checkpoint-250"


def test_the_same_folder_under_another_name_is_the_same_run(run_qlora, broken_off, tmp_path):
    (tmp_path / "out").rename(tmp_path / "moved")
    run = run_qlora(max_steps=6, output_dir=tmp_path / "moved")
    assert run.code == 0 and same_weights(run.output_dir, broken_off)


class Killed(BaseException):
    """What no handler of the program sees."""


def test_a_kill_while_saving_leaves_no_checkpoint_and_no_litter(run_qlora, broken_off, tmp_path, monkeypatch):
    def kill(*args, **kwargs):
        raise Killed

    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(Killed):
            run_qlora(max_steps=6)
    assert steps_kept(tmp_path / "out") == set()
    run = run_qlora(max_steps=6)
    assert run.code == 0 and same_weights(run.output_dir, broken_off)
    assert not hidden(run.output_dir)


@pytest.mark.parametrize("name", ["rejected.jsonl", "completed", "metrics.json"])
def test_a_folder_where_a_file_belongs(run_qlora, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    run = run_qlora(max_steps=1)
    assert run.code == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ") and f"{name}" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_after_training(run_qlora, monkeypatch, number):
    """The final adapter is not written, what was there before stays; on a real disk: test_crash_safety.py."""

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", full)
        run = run_qlora(save_strategy="no")
        assert f"{run.output_dir}: not saved: " in error_of(run) and os.strerror(number) in error_of(run)
        assert not hidden(run.output_dir) and not (run.output_dir / "completed").exists()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", full)
        assert os.strerror(number) in error_of(run_qlora())


def test_error_in_training_is_printed_below_the_progress_bar(run_qlora):
    run = run_qlora(learning_rate=1e30, max_grad_norm=0)
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------
# Completed
# ------------------------------------------------------------------------------------

PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}


def test_a_completed_run_is_not_trained_again_and_its_adapter_is_used(run_qlora):
    first = run_qlora(learning_rate=1e-2, **PREDICT)
    predictions = (first.output_dir / "predictions.jsonl").read_bytes()
    before = weights(first.output_dir), (first.output_dir / "completed").read_bytes()
    (first.output_dir / "predictions.jsonl").unlink()
    again = run_qlora(learning_rate=1e-2, **PREDICT)
    assert again.code == 0
    assert "not trained again" in again.stderr and "completed" in again.stderr
    assert (again.output_dir / "predictions.jsonl").read_bytes() == predictions
    assert (again.output_dir / "completed").read_bytes() == before[1]
    after = weights(again.output_dir)
    assert all(torch.equal(after[name], before[0][name]) for name in after)
    assert len(trained(again)) == 4


def test_fewer_steps_than_a_completed_run_had_train_nothing(run_qlora):
    run_qlora()
    again = run_qlora(max_steps=3)
    assert again.code == 0 and "not trained again" in again.stderr
    assert again.json("trainer_state.json")["global_step"] == 4


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"max_steps": 3}, {"max_steps": 7}),  # a checkpoint at 3 too: the last step is saved
        ({"num_train_epochs": 1, "max_steps": None}, {"num_train_epochs": 2, "max_steps": None}),
    ],
)
def test_more_steps_continue_a_completed_run(run_qlora, tmp_path, less, more):
    """24 rows in batches of 8: three steps an epoch."""
    flags = {"per_device_train_batch_size": 8, "lora_dropout": 0.1}
    reference = run_qlora(output_dir=tmp_path / "straight", **flags | more)
    assert run_qlora(**flags | less).code == 0
    longer = run_qlora(**flags | more)
    assert "checkpoint-3" in longer.stderr
    assert_equal_runs(longer, reference)


def test_killed_between_the_last_checkpoint_and_completed(run_qlora, tmp_path):
    reference = run_qlora(output_dir=tmp_path / "straight")
    run = run_qlora()
    for file in list(run.output_dir.iterdir()):
        if file.is_file():
            file.unlink()
    again = run_qlora()
    assert_equal_runs(again, reference)
    nothing_was_trained = {"train_results.json", "all_results.json"}
    assert again.files() >= reference.files() - nothing_was_trained


def test_completed_is_removed_while_a_longer_run_is_under_way(run_qlora, stopped):
    run_qlora()
    run = stopped(6, max_steps=8)
    assert not (run.output_dir / "completed").exists()
    assert run_qlora(max_steps=8).json("trainer_state.json")["global_step"] == 8


def test_prediction_after_an_interruption_uses_the_newest_weights(run_qlora, stopped, tmp_path):
    """The top of the folder holds the adapter of 4 steps, checkpoint-6 the newer one."""
    flags = {"learning_rate": 2e-2}
    run_qlora(**flags)
    stopped(6, max_steps=8, **flags)
    predict = flags | PREDICT | {"do_train": False, "max_steps": 8}
    run = run_qlora(**predict)
    named = run_qlora(
        **predict,
        adapter_name_or_path=tmp_path / "out/checkpoint-6",
        output_dir=tmp_path / "named",
    )
    files = [r.output_dir / "predictions.jsonl" for r in (run, named)]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize(
    ("change", "named", "completed"),
    [
        ({"bits": 8}, "bits", True),
        ({"bits": 8}, "bits", False),
        ({"lora_r": 8}, "lora_r", True),
        ({"lora_modules": "attn"}, "lora_modules", False),
        ({"model_name_or_path": "llama_gqa"}, "model_name_or_path", False),
        ({"dataset": "alpaca.jsonl"}, "dataset", True),
        ({"dataset": "alpaca.jsonl"}, "dataset", False),
    ],
    ids=str,
)
def test_another_run_in_the_same_folder_is_refused_and_nothing_is_touched(
    run_qlora, broken_off, models, data_dir, tmp_path, change, named, completed
):
    if completed:
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(broken_off, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    if "model_name_or_path" in change:
        change = {"model_name_or_path": models("llama_gqa")}
    if "dataset" in change:
        change = {"dataset": data_dir / "alpaca.jsonl"}
    run = run_qlora(max_steps=8, **change)
    message = error_of(run)
    assert named in message
    assert "--output_dir" in message or "--overwrite_output_dir" in message
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("completed", [True, False])
def test_prediction_refuses_a_base_of_other_bits(run_qlora, broken_off, tmp_path, completed):
    if completed:
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(broken_off, tmp_path / "out")
    run = run_qlora(do_train=False, bits=8, **PREDICT)
    assert "bits" in error_of(run)


def test_prediction_on_another_dataset_is_allowed(run_qlora, broken_off, data_dir):
    flags = PREDICT | {"do_train": False, "dataset": data_dir / "alpaca.jsonl"}
    assert run_qlora(**flags).code == 0


def test_overwrite_output_dir_starts_anew(run_qlora, tmp_path):
    fresh = run_qlora(output_dir=tmp_path / "fresh", lora_r=8)
    run_qlora(max_steps=6)
    run = run_qlora(lora_r=8, overwrite_output_dir=True)
    assert_equal_runs(run, fresh)
    assert run.files() == fresh.files()
    assert "not trained again" in run_qlora(lora_r=8).stderr


def test_resume_from_checkpoint_picks_one(run_qlora, broken_off, tmp_path):
    run = run_qlora(max_steps=6, resume_from_checkpoint=tmp_path / "out/checkpoint-2")
    assert run.code == 0 and "checkpoint-2" in run.stderr
    assert same_weights(run.output_dir, broken_off)
    written = (run.output_dir / "checkpoint-4/adapter_model.safetensors").stat().st_mtime_ns
    assert written > (_built["stopped"] / "checkpoint-5/optimizer.pt").stat().st_mtime_ns


def test_resume_from_a_checkpoint_of_another_folder(run_qlora, broken_off, tmp_path):
    run = run_qlora(
        max_steps=6,
        output_dir=tmp_path / "elsewhere",
        resume_from_checkpoint=tmp_path / "out/checkpoint-4",
    )
    assert run.code == 0 and same_weights(run.output_dir, broken_off)
    assert steps_kept(run.output_dir) == {6}
    assert steps_kept(tmp_path / "out") == {2, 4, 5}


@pytest.mark.parametrize("path", ["missing", "out", "out/checkpoint-5"])
def test_resume_from_something_else_than_a_checkpoint_is_an_error(run_qlora, broken_off, tmp_path, path):
    (tmp_path / "out/checkpoint-5/optimizer.pt").unlink()
    run = run_qlora(max_steps=6, resume_from_checkpoint=tmp_path / path)
    assert str(tmp_path / path) in error_of(run)


def test_the_folder_of_a_run_is_no_checkpoint_to_resume_from(run_qlora, tmp_path):
    """A finished run's folder holds an adapter and a trainer_state.json, as a checkpoint does."""
    first = run_qlora(max_steps=2)
    for target in ("out", "elsewhere"):
        error = error_of(run_qlora(output_dir=tmp_path / target, resume_from_checkpoint=first.output_dir))
        assert f"the folder of a run, its newest checkpoint is {first.output_dir / 'checkpoint-2'}" in error
    shutil.rmtree(first.output_dir / "checkpoint-2")
    error = error_of(run_qlora(output_dir=tmp_path / "elsewhere", resume_from_checkpoint=first.output_dir))
    assert "the folder of a run" in error and not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------------------
# The original's layout, full fine-tunes
# ------------------------------------------------------------------------------------


def test_the_originals_layout_is_read_and_not_written(run_qlora, broken_off, tmp_path):
    """checkpoint-N/adapter_model/ holds the adapter, and there is no list of files."""
    folder = tmp_path / "out/checkpoint-5"
    (folder / "adapter_model").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (folder / name).rename(folder / "adapter_model" / name)
    _lose_manifest(folder)
    run = run_qlora(max_steps=6)
    assert run.code == 0 and "checkpoint-5" in run.stderr
    assert same_weights(run.output_dir, broken_off)
    new = {name for name in run.files() if not name.startswith("checkpoint-5/")}
    assert not any("adapter_model/" in name or "/default/" in name for name in new)
    adapter = load_file(run.output_dir / "checkpoint-6/adapter_model.safetensors")
    assert adapter.keys() == weights(broken_off).keys()
    assert not any("adapter_model." in name for name in adapter)


def test_the_originals_layout_serves_prediction(run_qlora, broken_off, tmp_path):
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    plain = run_qlora(do_train=False, **PREDICT)
    expected = (plain.output_dir / "predictions.jsonl").read_text()
    folder = tmp_path / "out/checkpoint-5"
    (folder / "adapter_model").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(folder / "adapter_model" / name)
    _lose_manifest(folder)
    run = run_qlora(do_train=False, **PREDICT)
    assert run.code == 0 and "adapter_model" in run.stderr
    assert (run.output_dir / "predictions.jsonl").read_text() == expected


def test_a_full_fine_tune_resumes_completes_and_predicts(run_qlora, stopped, tmp_path):
    flags = {"full_finetune": True, "bits": 16, "lora_r": None, "learning_rate": 1e-3}
    flags |= {"max_steps": 6}
    reference = run_qlora(output_dir=tmp_path / "straight", **flags)
    broken = stopped(3, **flags)
    assert steps_kept(broken.output_dir) == {2, 3}
    _truncate(broken.output_dir / "checkpoint-3/model.safetensors")
    resumed = run_qlora(**flags)
    assert "checkpoint-2" in resumed.stderr
    assert_equal_runs(resumed, reference)
    assert not any("adapter" in name for name in resumed.files())

    again = run_qlora(**flags)
    assert again.code == 0 and "not trained again" in again.stderr
    assert same_weights(again.output_dir, reference.output_dir)
    again = run_qlora(**flags, **PREDICT, do_train=False)
    trained_model = run_qlora(
        **PREDICT | {"do_train": False, "bits": 16, "output_dir": tmp_path / "as-a-base"},
        model_name_or_path=reference.output_dir,
    )
    rows, expected = (
        [json.loads(line) for line in (r.output_dir / "predictions.jsonl").open()] for r in (again, trained_model)
    )
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]


def test_more_steps_of_a_completed_full_fine_tune(run_qlora, tmp_path):
    flags = {"full_finetune": True, "bits": 16, "lora_r": None, "learning_rate": 1e-3}
    reference = run_qlora(output_dir=tmp_path / "straight", max_steps=6, **flags)
    run_qlora(max_steps=3, **flags)
    assert_equal_runs(run_qlora(max_steps=6, **flags), reference)


# ------------------------------------------------------------------------------------
# What else must survive an interruption
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_strategy": "steps", "eval_steps": 1},  # 4-bit weights that an evaluation must not repack
        {"lora_dtype": "bfloat16"},
        {"remove_unused_columns": True},
    ],
    ids=str,
)
def test_resume_is_exact_with(run_qlora, stopped, tmp_path, flags):
    reference = run_qlora(output_dir=tmp_path / "straight", max_steps=5, **flags)
    stopped(3, max_steps=5, **flags)
    resumed = run_qlora(max_steps=5, **flags)
    assert_equal_runs(resumed, reference)
    dtype = getattr(torch, flags.get("lora_dtype", "float32"))
    assert {tensor.dtype for tensor in weights(resumed.output_dir).values()} == {dtype}


def test_a_picked_checkpoint_leaves_the_newer_ones_aside(run_qlora, stopped, tmp_path):
    """Else the rerun would go on from the branch that was left."""
    run_qlora(max_steps=6)
    picked = {"resume_from_checkpoint": tmp_path / "out/checkpoint-2", "save_total_limit": 1}
    broken = stopped(3, max_steps=8, **picked)
    assert steps_kept(tmp_path / "out") == {3}
    left = list((tmp_path / "out").glob("left-checkpoint-*"))
    assert len(left) == 2 and all(f"set aside as {folder.name}" in broken.stderr for folder in left)
    run = run_qlora(max_steps=8, save_total_limit=1)
    assert "checkpoint-3" in run.stderr and run.json("trainer_state.json")["global_step"] == 8
    (tmp_path / "out/left-checkpoint-mine").mkdir()
    run_qlora(max_steps=1, overwrite_output_dir=True)
    assert [folder.name for folder in run.output_dir.glob("left-*")] == ["left-checkpoint-mine"]


# Perplexity falls, so that the first step's is the best where the greater is the better.
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_perplexity", "greater_is_better": True, "learning_rate": 1e-2}  # fmt: skip


def test_rotation_takes_neither_the_newest_nor_the_best(run_qlora, stopped, tmp_path):
    """--save_total_limit 1, stopped by a signal and to the end."""
    straight = run_qlora(**BEST, output_dir=tmp_path / "straight")
    run = stopped(3, **BEST, save_total_limit=1)
    assert steps_kept(run.output_dir) == {1, 3} and "step 3, saved" in run.stderr
    assert "the result" not in run.stderr  # there is none yet
    assert qlora.find_last_checkpoint(run.output_dir) == run.output_dir / "checkpoint-3"
    run = run_qlora(**BEST, save_total_limit=1)
    assert steps_kept(run.output_dir) == {1, 4} and "other flags" not in run.stderr
    assert_equal_runs(run, straight)


def test_the_best_metric_of_other_rows_is_not_compared_with(run_qlora, stopped):
    """Else the steps on the new rows are thrown away if these are harder. Without a best they may be others."""
    stopped(2, **BEST)
    message = error_of(run_qlora(**BEST, max_eval_samples=1))
    assert "evaluation rows" in message and "max_eval_samples was None, is 1" in message
    assert "label_smoothing_factor was 0.0, is 0.1" in error_of(run_qlora(**BEST, label_smoothing_factor=0.1))
    plain = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    stopped(2, **plain, load_best_model_at_end=True, overwrite_output_dir=True)
    assert "evaluation rows" in error_of(run_qlora(**plain, load_best_model_at_end=True, max_eval_samples=1))
    stopped(2, **plain, overwrite_output_dir=True)
    run = run_qlora(**plain, max_eval_samples=1, label_smoothing_factor=0.1)
    assert run.code == 0 and "label_smoothing_factor was 0.0, is 0.1: applies at once" in run.stderr


@pytest.mark.parametrize("flags", [{"max_steps": 6}, {"do_train": False, "do_eval": True}])
def test_a_base_whose_weights_changed_is_another(run_qlora, models, tmp_path, flags):
    """As where a first stage is trained on in its folder. A copy of the same weights is the same base."""
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    assert run_qlora(model_name_or_path=base).code == 0
    file = base / "model.safetensors"
    tensors = load_file(file)
    os.utime(file)
    save_file(tensors, base / "adapter_model.safetensors")  # nor what is not the base's
    (base / "pytorch_model.bin").symlink_to("nowhere")
    assert run_qlora(model_name_or_path=base).code == 0
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    message = error_of(run_qlora(model_name_or_path=base, **flags))
    assert "belongs to another run: weights of the base was" in message
    assert "For the same weights in other files: --adapter_name_or_path" in message


def test_of_a_run_that_began_with_an_adapter_the_result_is_used(run_qlora, finished_run, tmp_path):
    """With its own command and --do_train False, on the rows that it held out; --merged_output_dir likewise."""
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(20))
    flags = {"adapter_name_or_path": finished_run.output_dir, "learning_rate": 1e-2, "dataset": rows, "do_eval": True}
    trained = run_qlora(**flags)
    loss = trained.json("eval_results.json")["eval_loss"]
    run = run_qlora(**flags, do_train=False, merged_output_dir=tmp_path / "merged")
    assert f"evaluating {trained.output_dir}" in run.stderr and f"merging {trained.output_dir} into" in run.stderr
    assert re.search("eval data +2 rows", run.stderr)
    assert run.json("eval_results.json")["eval_loss"] == pytest.approx(loss, rel=1e-6)
    other = run_qlora(**flags, do_train=False, output_dir=tmp_path / "other")
    assert f"evaluating {finished_run.output_dir}" in other.stderr
    assert re.search("eval data +20 rows", other.stderr)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "gemma3"])
def test_a_resumed_full_fine_tune_has_all_its_weights(run_qlora, stopped, models, tmp_path, family):
    """Also those that files name otherwise than the model: GPT-NeoX's head, experts."""
    flags = {"model_name_or_path": models(family), "full_finetune": True, "bits": 32, "lora_r": None}
    flags |= {"learning_rate": 1e-2, "dataset_format": None}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    stopped(2, **flags)
    assert_equal_runs(run_qlora(**flags), straight)
    for file in ("completed", "model.safetensors"):  # a kill after the last step
        (tmp_path / "out" / file).unlink()
    assert_equal_runs(run_qlora(**flags), straight)


def test_a_full_fine_tune_of_weights_that_an_evaluation_changes_is_refused(run_qlora, models):
    assert "an evaluation changes rwkv's weights" in error_of(
        run_qlora(model_name_or_path=models("rwkv"), full_finetune=True, bits=32)
    )


def test_rotation_leaves_folders_of_others(run_qlora, tmp_path):
    (tmp_path / "out/checkpoint-0").mkdir(parents=True)
    run = run_qlora(save_steps=1, save_total_limit=1)
    assert steps_kept(run.output_dir) == {0, 4}


@pytest.mark.parametrize("flags", [{"save_total_limit": 1, "max_steps": 6}, {"overwrite_output_dir": True}])
def test_a_checkpoint_is_removed_at_once_and_never_through_a_link(run_qlora, tmp_path, monkeypatch, flags):
    """A kill while its files go would leave a folder that is neither whole nor absent; the one linked is the user's."""
    out, moved = run_qlora(save_steps=1, max_steps=3).output_dir, tmp_path / "other disk"
    (out / "checkpoint-1").rename(moved)
    (out / "checkpoint-1").symlink_to(moved)
    removed, rmtree = [], shutil.rmtree

    def note(folder, **options):
        removed.extend(qlora.checkpoints_in(out) if Path(folder).name.startswith("checkpoint-") else [])
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", note)
    assert run_qlora(save_steps=2, **flags).code == 0
    assert qlora.checkpoint_problem(moved) is None and not hidden(out) and not removed
    assert steps_kept(out) == ({6} if "save_total_limit" in flags else {2, 4})


def test_a_limit_below_one_keeps_all(run_qlora):
    run = run_qlora(save_steps=1, save_total_limit=-1)
    assert steps_kept(run.output_dir) == {1, 2, 3, 4}


def test_a_signal_saves_where_only_the_best_are_saved(run_qlora, stopped, tmp_path):
    flags = BEST | {"save_strategy": "best", "load_best_model_at_end": False}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    run = stopped(3, **flags)
    assert steps_kept(run.output_dir) == {1, 3} and "step 3, saved" in run.stderr
    assert_equal_runs(run_qlora(**flags), straight)


def test_best_model_is_used_when_only_completed_is_missing(run_qlora, tmp_path):
    flags = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    flags |= {"metric_for_best_model": "eval_perplexity", "greater_is_better": True, "learning_rate": 1e-2}
    run = run_qlora(**flags)
    best = Path(run.json("trainer_state.json")["best_model_checkpoint"])
    assert best.name == "checkpoint-1" and same_weights(run.output_dir, best)
    (run.output_dir / "completed").unlink()
    assert same_weights(run_qlora(**flags).output_dir, best)


def test_the_best_is_the_result_after_the_folder_has_moved(run_qlora, stopped, tmp_path):
    """No later step is saved, and the checkpoint's state still names the old folder."""
    flags = BEST | {"save_strategy": "best"}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    assert "the weights of checkpoint-1, the best, are the result" in straight.stderr
    card = (straight.output_dir / "README.md").read_text()
    assert "4 optimizer steps (the weights of checkpoint-1, the best)" in card
    stopped(3, **flags).output_dir.rename(tmp_path / "moved")
    run = run_qlora(**flags, output_dir=tmp_path / "moved")
    assert_equal_runs(run, straight)
    assert "The best checkpoint" not in run.stderr


def test_the_best_of_all_evaluations_is_saved_and_is_the_result_of_a_resumed_run_too(run_qlora, stopped, tmp_path):
    """Evaluated at each step, saved at each fourth: the best is the first."""
    flags = BEST | {"save_steps": 4, "max_steps": 6}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    assert steps_kept(straight.output_dir) == {1, 4, 6}
    assert same_weights(straight.output_dir, straight.output_dir / "checkpoint-1")
    stopped(3, **flags)
    assert_equal_runs(run_qlora(**flags), straight)


def test_a_checkpoint_on_another_disk_is_the_run_s_own(run_qlora, tmp_path):
    run = run_qlora()
    (run.output_dir / "checkpoint-4").rename(tmp_path / "there")
    (run.output_dir / "checkpoint-4").symlink_to(tmp_path / "there")
    assert f"resuming from {run.output_dir / 'checkpoint-4'}" in run_qlora(max_steps=6).stderr
    picked = run_qlora(max_steps=6, resume_from_checkpoint=run.output_dir / "checkpoint-4")
    assert f"resuming from {run.output_dir / 'checkpoint-4'}" in picked.stderr


def test_numbers_of_weights_that_were_trained_on_go(run_qlora):
    """An evaluation of the finished run keeps those of its training."""
    run = run_qlora(do_eval=False)
    assert run_qlora(do_train=False, do_eval=True).code == 0
    for name in "metrics.json", "all_results.json":
        assert {"train_loss", "eval_loss"} <= run.json(name).keys() and run.json(name).get("epoch") != 0
    assert run_qlora(do_eval=False, max_steps=6).code == 0
    assert all("eval_loss" not in run.json(name) for name in ("metrics.json", "all_results.json"))


def test_numbers_of_weights_before_a_stop_go(run_qlora, stopped, data_dir):
    """Six steps follow on four, and of these only the final files are missing: nothing is trained."""
    names = ("metrics.json", "all_results.json", "train_results.json")
    run = run_qlora(do_eval=True, eval_dataset=data_dir / "alpaca.jsonl")
    assert all("train_loss" in run.json(name) for name in names)
    stopped(6, max_steps=8, do_eval=False)
    run = run_qlora(max_steps=6, do_eval=False)
    assert run.code == 0 and run.json("completed")["step"] == 6
    for name in filter(lambda name: (run.output_dir / name).exists(), names):
        assert not {"train_loss", "eval_loss"} & run.json(name).keys(), name


def test_a_run_that_stopped_early_trains_no_further_when_only_completed_is_missing(run_qlora):
    """Nor does it then."""
    flags = BEST | {"early_stopping_patience": 2, "load_best_model_at_end": False, "max_steps": 6}
    straight = weights(run_qlora(**flags).output_dir)
    run = run_qlora(**flags)
    assert "not trained again" in run.stderr and run.json("completed")["stopped_at"] == 3
    for _ in range(2):
        (run.output_dir / "completed").unlink()
        run = run_qlora(**flags)
        assert run.json("completed")["stopped_at"] == 3 and steps_kept(run.output_dir) == {1, 2, 3}
        assert "train_loss" in run.json("train_results.json")  # these weights have it from before
        assert all(torch.equal(tensor, straight[name]) for name, tensor in weights(run.output_dir).items())
        assert "not trained again" in run_qlora(**flags).stderr


def test_overwriting_leaves_nothing_of_the_old_run(run_qlora, tmp_path):
    run_qlora(eval_strategy="steps", eval_steps=2, **PREDICT)
    fresh = run_qlora(output_dir=tmp_path / "fresh", bits=16, full_finetune=True)
    run = run_qlora(bits=16, full_finetune=True, overwrite_output_dir=True)
    assert run.files() == fresh.files()
    assert run.json("metrics.json").keys() == fresh.json("metrics.json").keys()


def test_a_checkpoint_without_optimizer_is_named(run_qlora, stopped):
    stopped(3, save_only_model=True)
    assert "no optimizer state" in run_qlora(save_only_model=True).stderr


def test_the_same_model_by_another_path_is_the_same(run_qlora, stopped, models, monkeypatch):
    stopped(3, model_name_or_path=models("llama"))
    monkeypatch.chdir(models("llama").parent)
    assert run_qlora(model_name_or_path=models("llama").name).code == 0


def test_checkpoint_of_an_older_version_resumes(run_qlora, broken_off, tmp_path):
    """It names some flags beside what it says of them, and some that are gone."""
    folder = tmp_path / "out/checkpoint-5"
    record = json.loads((folder / "checkpoint.json").read_text())["run"]
    flags = record.pop("flags")
    older = {name: flags[name] for name in ("model_name_or_path", "bits", "lora_r", "packing")}
    qlora.write_manifest(folder, record | older | {"stream_buffer": 10_000, "unpacked_layers": "auto"})
    run = run_qlora(max_steps=6)
    assert f"resuming from {folder}" in run.stderr and same_weights(run.output_dir, broken_off)


def test_a_checkpoint_of_another_engine_is_refused_but_its_result_is_used(run_qlora, broken_off, tmp_path):
    """One engine can't read another's optimizer state; an adapter is the same under all of them."""
    folder, engine = tmp_path / "out/checkpoint-5", {"engine": "DeepSpeed on 2 processes"}
    record = json.loads((folder / "checkpoint.json").read_text())["run"]
    qlora.write_manifest(folder, record | engine)
    assert "engine was DeepSpeed on 2 processes, is none or DDP" in error_of(run_qlora(max_steps=6))
    assert run_qlora(do_train=False, **PREDICT).code == 0
    completed = json.loads((broken_off / "completed").read_text())
    shutil.copytree(broken_off, tmp_path / "done")
    (tmp_path / "done/completed").write_text(json.dumps(completed | {"run": completed["run"] | engine}))
    again = run_qlora(max_steps=6, output_dir=tmp_path / "done")
    assert again.code == 0 and "not trained again" in again.stderr


@pytest.mark.parametrize("bits", [4, 16])
def test_masked_run_resumes_with_the_same_masks(run_qlora, stopped, models, tmp_path, bits):
    """In the second epoch, in the middle of it, with dropout in model and adapters."""
    rows = [{"text": "MKTAYIAKQRGAVLIPFMW"[: 5 + i]} for i in range(10)]
    flags = {
        "model_name_or_path": models("encoder", family="esm"),
        "dataset": tiny.rows_to_jsonl(tmp_path / "proteins.jsonl", rows),
        "target_max_len": None,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": 100,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "mask_prob": 0.3,
        "bits": bits,
    }
    stopped(5, **flags)
    resumed = run_qlora(**flags)
    reference = run_qlora(**flags, output_dir=tmp_path / "reference")
    assert_equal_runs(resumed, reference)
    assert len({loss for loss, *_ in trained(reference)}) == 8


# ------------------------------------------------------------------------------------
# Other flags than the checkpoint's
# ------------------------------------------------------------------------------------


def rates(run) -> list[float]:
    return [entry["learning_rate"] for entry in run.json("trainer_state.json")["log_history"] if "loss" in entry]


COSINE = {"lr_scheduler_type": "cosine"}
WARM = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}


@pytest.mark.parametrize(
    ("before", "after", "factors"),  # of the rate 1e-3 in steps 1 to 6; three of them before the stop
    [
        ({}, {"learning_rate": 1e-4}, [1, 1, 1, 0.1, 0.1, 0.1]),
        ({}, {"lr_scheduler_type": "linear"}, [1, 1, 1, 3 / 6, 2 / 6, 1 / 6]),
        (COSINE, COSINE | {"max_steps": 8},
         [(1 + math.cos(math.pi * step / (6 if step < 3 else 8))) / 2 for step in range(8)]),
        (WARM, WARM | {"warmup_steps": 8, "learning_rate": 2e-3}, [0, 1 / 4, 2 / 4, 2 * 3 / 8, 2 * 4 / 8, 2 * 5 / 8]),
    ],
    ids=str,
)  # fmt: skip
def test_rates_after_a_resume_are_those_of_the_flags(run_qlora, stopped, before, after, factors):
    flags = {"max_steps": 6, "learning_rate": 1e-3, "save_steps": 100, "warmup_steps": 0}
    stopped(3, **flags | before)
    run = run_qlora(**flags | after)
    assert run.code == 0 and rates(run) == pytest.approx([1e-3 * factor for factor in factors])
    assert all(re.search(rf"{name} was .*, is .*: new schedule", run.stderr) for name in after.keys() - before.keys())
    (folder,) = run.output_dir.glob(f"checkpoint-{len(factors)}")
    saved = torch.load(folder / "optimizer.pt")["param_groups"][0]
    assert saved["initial_lr"] == after.get("learning_rate", 1e-3)


def test_weight_decay_after_a_resume_is_that_of_the_flags(run_qlora, stopped, tmp_path):
    """AdamW takes rate x decay x weight off each weight, beside what it does without a decay."""
    flags = {"save_steps": 100, "learning_rate": 1e-3, "optim": "adamw_torch", "max_steps": 4}
    stopped(3, **flags)
    shutil.copytree(tmp_path / "out", tmp_path / "decayed")
    before = weights(tmp_path / "out/checkpoint-3")
    plain = weights(run_qlora(**flags).output_dir)
    run = run_qlora(**flags, weight_decay=0.5, adam_beta1=0.9, output_dir=tmp_path / "decayed")
    assert "weight_decay was 0.0, is 0.5: applies at once" in run.stderr and "adam_beta1" not in run.stderr
    for name, tensor in weights(run.output_dir).items():
        assert torch.allclose(plain[name] - tensor, 1e-3 * 0.5 * before[name], rtol=1e-2, atol=1e-8), name


def test_logging_saving_and_evaluation_after_a_resume_follow_the_flags(run_qlora, stopped):
    flags = {"max_steps": 9, "eval_strategy": "steps"}
    stopped(3, **flags, logging_steps=1, eval_steps=1, save_steps=1)
    run = run_qlora(**flags, logging_steps=2, eval_steps=3, save_steps=4)
    log = [entry for entry in run.json("trainer_state.json")["log_history"] if entry["step"] > 3]
    assert [entry["step"] for entry in log if "loss" in entry] == [4, 6, 8]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [6, 9]
    assert steps_kept(run.output_dir) == {1, 2, 3, 4, 8, 9}


@pytest.mark.parametrize(
    "change",
    [
        {"optim": "adamw_torch"},
        {"seed": 7},
        {"data_seed": 7},
        {"group_by_length": False},
        {"dataloader_drop_last": True},
        {"packing": True},
        {"bf16": True},
        {"per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 3},
        {"source_max_len": 12},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=str,
)
def test_flags_that_a_checkpoint_depends_on_are_refused_by_name(run_qlora, broken_off, tmp_path, change):
    before, name = snapshot(tmp_path / "out"), next(iter(change))
    message = error_of(run_qlora(max_steps=6, **change))
    assert {"group_by_length": "train_sampling_strategy"}.get(name, name) in message and "checkpoint-5" in message
    assert snapshot(tmp_path / "out") == before


def test_a_step_of_the_same_rows_may_be_cut_in_another_way(run_qlora, stopped, tmp_path):
    flags = {"save_steps": 100, "learning_rate": 5e-3}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    stopped(2, **flags)
    run = run_qlora(**flags, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert run.code == 0 and "gradient_accumulation_steps was 1, is 2: applies at once" in run.stderr
    losses = [[loss for loss, *_ in trained(each)] for each in (run, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_other_flags_for_a_completed_run_are_said(run_qlora):
    run_qlora(learning_rate=1e-3)
    again = run_qlora(learning_rate=1e-4, seed=1)
    assert again.code == 0 and "not trained again" in again.stderr
    assert "learning_rate was 0.001, is 0.0001: without effect" in again.stderr
    assert "seed was 42, is 1: without effect" in again.stderr


@pytest.mark.parametrize("killed", [False, True])
def test_flags_that_nothing_trained_with_are_not_recorded(run_qlora, killed):
    """The last step is saved, and the final files are missing."""
    first = run_qlora(learning_rate=1e-3, weight_decay=0.1)
    straight = weights(first.output_dir)
    for file in [path for path in first.output_dir.iterdir() if path.is_file() and killed]:
        file.unlink()
    (first.output_dir / "completed").unlink(missing_ok=True)
    again = run_qlora(learning_rate=1e-4, weight_decay=0.0)
    assert "learning_rate was 0.001, is 0.0001: without effect" in again.stderr
    for flags in (again.json("run.json")["flags"], again.json("completed")["run"]["flags"]):
        assert (flags["learning_rate"], flags["weight_decay"]) == (1e-3, 0.1)
    card = (again.output_dir / "README.md").read_text()
    assert "| learning_rate | `0.001` |" in card and "| weight_decay | `0.1` |" in card
    assert all(torch.equal(tensor, straight[name]) for name, tensor in weights(again.output_dir).items())


def test_flags_without_effect_and_folders_are_not_compared(run_qlora, stopped, tmp_path):
    flags = {"bits": 16, "full_finetune": True, "lora_r": None}
    stopped(3, **flags)
    run = run_qlora(**flags, quant_type="fp4", lora_alpha=5, num_train_epochs=9, cache_dir=tmp_path / "cache")
    assert run.code == 0 and "lora_alpha was" not in run.stderr and "quant_type was" not in run.stderr
    assert "layers_to_freeze" in error_of(run_qlora(**flags, max_steps=8, layers_to_freeze=1))


def test_deepspeed_restores_rates_with_its_state_so_that_others_are_refused(tmp_path):
    """But not more steps."""
    folder, config = tmp_path / "checkpoint-5", qlora.parse_config(["--learning_rate", "1e-4", "--max_steps", "20"])
    folder.mkdir()
    run = qlora.run_fingerprint(config, {})
    for flags in ({"max_steps": 9}, {"max_steps": 9, "learning_rate": 1e-3}):
        qlora.write_manifest(folder, run | {"flags": run["flags"] | flags})
        qlora.check_same_run(folder, run, True, config)
    config.training.deepspeed = "zero2.json"
    with pytest.raises(qlora.ConfigError, match=r"learning_rate was 0\.001, is 0\.0001\. Pass"):
        qlora.check_same_run(folder, run, True, config)
    qlora.check_same_run(folder, run, False, config)  # nothing is trained


def test_every_flag_has_a_rule():
    """A name in RESUME_RULES is a flag, and in one row only."""
    others = {"engine", "calibrated base", "adapter start", qlora.DATASET, qlora.STREAM_SIZES, qlora.BASE_WEIGHTS,
              qlora.EVAL_ROWS}  # fmt: skip
    flags = qlora.parse_config([]).flags.keys() | others
    rows = list(qlora.RESUME_RULES.values())
    assert all(row <= flags for row in rows) and sum(map(len, rows)) == len(set().union(*rows))
    assert flags >= qlora.UPDATE_FLAGS


def test_a_picked_checkpoint_of_a_completed_run_is_trained_on(run_qlora, tmp_path):
    flags = {"learning_rate": 1e-2}
    run_qlora(**flags)
    run = run_qlora(**flags, max_steps=3, resume_from_checkpoint=tmp_path / "out/checkpoint-2")
    assert run.code == 0 and "not trained again" not in run.stderr
    assert run.json("trainer_state.json")["global_step"] == 3 and run.json("completed")["step"] == 3
    assert same_weights(run.output_dir, tmp_path / "out/checkpoint-3")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 25}, "--dataloader_drop_last: 24 rows"),
        ({"num_train_epochs": 0, "max_steps": None}, "--num_train_epochs 0"),
    ],
)
def test_nothing_to_train_is_an_error(run_qlora, tmp_path, flags, said):
    assert said in error_of(run_qlora(**flags))
    assert not (tmp_path / "out" / "completed").exists()


# ------------------------------------------------------------------------------------
# Results of another run
# ------------------------------------------------------------------------------------
def test_fewer_steps_and_then_more(run_qlora, stopped):
    """A run that ends early because fewer steps are asked for goes on when more are."""
    stopped(4, max_steps=8)
    fewer = run_qlora(max_steps=4)
    assert fewer.code == 0 and fewer.json("completed")["step"] == 4 and "stopped early" not in fewer.stderr
    assert run_qlora(max_steps=8).json("trainer_state.json")["global_step"] == 8


def test_a_completed_run_of_another_kind_stays(run_qlora, tmp_path):
    full = {"full_finetune": True, "bits": 16, "lora_r": None, "save_strategy": "no", "save_steps": None}
    run = run_qlora(**full)
    before = run.files()
    error = error_of(run_qlora(save_strategy="no", save_steps=None))
    assert "holds the result of a run" in error and run.files() == before


def test_a_completed_run_without_checkpoints_is_not_trained_again_into_another_folder(run_qlora, tmp_path):
    run = run_qlora(save_strategy="no", save_steps=None)
    before = snapshot(run.output_dir)
    error = error_of(run_qlora(save_strategy="no", save_steps=None, final_output_dir=tmp_path / "final"))
    assert "no checkpoint of it is resumed" in error and snapshot(run.output_dir) == before


def test_a_run_that_is_refused_leaves_the_list_of_rejected_rows(run_qlora, small_flags, tmp_path):
    rows = [{"input": "1", "output": "2"}] * 4 + [{"input": "3", "output": ""}]
    bad = {"dataset": tiny.rows_to_jsonl(tmp_path / "bad.jsonl", rows), "on_bad_rows": "skip", "max_steps": 1}
    rejected = run_qlora(**bad).output_dir / "rejected.jsonl"
    before = rejected.read_text()
    assert before.count("\n") == 1
    assert "belongs to another run" in error_of(run_qlora(max_steps=2)) and rejected.read_text() == before
    assert run_qlora(**bad | {"max_steps": 2}).code == 0 and rejected.read_text() == before
    assert run_qlora(overwrite_output_dir=True).code == 0 and not rejected.exists()


def test_a_checkpoint_picked_elsewhere_does_not_replace_another_run(run_qlora, tmp_path):
    run_qlora()
    other = run_qlora(output_dir=tmp_path / "other", seed=5)
    before = other.files()
    error = error_of(run_qlora(output_dir=tmp_path / "other", resume_from_checkpoint=tmp_path / "out/checkpoint-2"))
    assert "no checkpoint of it is resumed" in error and other.files() == before


def test_a_picked_checkpoint_is_evaluated(run_qlora, tmp_path):
    run_qlora(learning_rate=2e-2)
    use = {"do_train": False, "do_eval": True, "eval_dataset_size": 4, "learning_rate": 2e-2}
    last = run_qlora(**use).json("eval_results.json")["eval_loss"]
    picked = run_qlora(**use, resume_from_checkpoint=tmp_path / "out/checkpoint-2").json("eval_results.json")[
        "eval_loss"
    ]
    assert picked != last


def test_the_patience_is_that_of_the_flags(run_qlora, tmp_path):
    stuck = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_size": 4, "learning_rate": 0, "save_steps": 1}
    assert run_qlora(**stuck, early_stopping_patience=3, max_steps=3).code == 0
    run = run_qlora(**stuck, early_stopping_patience=6, max_steps=10)
    assert run.json("completed")["stopped_at"] == 7
