"""Runs of several processes for test_ddp.py and test_fsdp_deepspeed.py: started, awaited and compared.

    start = Start(fork_server, folder, model)
    text = finish(start(2, folder / "two", max_steps=4))

gloo on a CPU. The processes are forks (fork_server.py), so the libraries are imported once; tests of torchrun itself
start `launch_command`.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import _to_argv
from fork_server import ForkServer, Process
from safetensors.torch import load_file

# Code that tells accelerate its CPU processes are GPUs, so that a machine without GPUs can shard weights.
AS_GPUS = """
import accelerate.state as state
init_state = state.PartialState.__init__
def init(self, *args, **options):
    init_state(self, *args, **options)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU
state.PartialState.__init__ = init
"""


class Start:
    """`start(processes, folder, before="", **flags)` -> the processes of a run of 6 steps.

    19 rows train in steps of 8, 8 and 3; 4 are held out and evaluated in batches of 3 and 1.
    """

    def __init__(self, server: ForkServer, folder: Path, model: Path, **flags: Any) -> None:
        self.server, self.folder = server, folder
        self.flags = {
            "model_name_or_path": model,
            "dataset": tiny.rows_to_jsonl(folder / "rows.jsonl", tiny.support_rows(23)),
            "max_steps": 6,
            "source_max_len": 32,
            "target_max_len": 32,
            "lora_r": 4,
            "lora_dropout": 0.0,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            "do_eval": True,
            "eval_dataset_size": 4,
            "per_device_eval_batch_size": 3,
            "mmlu_dataset": "mmlu-zs",
            "mmlu_dir": folder / "mmlu",
            **flags,
        }
        (folder / "mmlu").mkdir()
        tiny.rows_to_jsonl(folder / "mmlu" / "zero_shot_mmlu_val.json", map(question, range(7)))

    def argv(self, processes: int, folder: Path, **flags: Any) -> list[str]:
        shared = {"gradient_accumulation_steps": 8 // processes, "output_dir": folder}
        return _to_argv(self.flags | shared | flags)

    def __call__(self, processes: int, folder: Path, before: str = "", **flags: Any) -> list[Process]:
        argv, log = self.argv(processes, folder, **flags), folder.with_name(f"{folder.name}.log")
        if processes == 1:
            return [self.server.start(argv, log, before=before)]
        return self.server.start_ranks(processes, argv, log, before=before)


def question(number: int) -> dict[str, str]:
    """One of three MMLU subjects, one of four right answers."""
    text = f"{number} is?\nA. 0\nB. {number}\nC. 7\nD. 9\nAnswer:"
    return {"subject": f"topic{number % 3}", "input": text, "output": "ABCD"[number % 4]}


# Every stage after training.
ALL_STAGES = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 4, "do_mmlu_eval": True}


def launch_command(processes: int, program: str = "qlora.py") -> list[str]:
    """torchrun, before the flags of the program."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), program]


def finish(processes: list[Process], code: int = 0) -> str:
    """Wait for all of them, check their exit statuses, return what they wrote."""
    codes = [process.wait() for process in processes]
    text = "".join(process.text() for process in processes)
    assert codes == [code] * len(processes), text
    return text


def error_of(text: str) -> str:
    """The one error of a run. A rank other than 0 prefixes its line; if several ranks fail, it is the same error."""
    found = re.findall(r"^(?:rank \d+: )?error: (?:rank \d+: )?(.*)", text, re.MULTILINE)
    assert len(set(found)) == 1 and "Traceback" not in text, text
    return found[0]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, Any]:
    """The adapter or, after a full fine-tune, all weights, of one file or of shards."""
    files = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_same_training(found: Path, expected: Path, rounding: float = 1e-5) -> None:
    """Losses and weights, in float32."""
    assert losses(found) == pytest.approx(losses(expected), abs=2 * rounding)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and ours
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(apart.values()) < rounding, apart


def assert_same_run(found: Path, expected: Path) -> None:
    """Training, evaluation loss, MMLU and, word for word, predictions (ALL_STAGES)."""
    assert_same_training(found, expected)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (found, expected))
    for name in "eval_loss", "mmlu_loss":
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    assert ours["predict_samples"] == 4
    accuracies = [{k: v for k, v in metrics.items() if "mmlu_eval_accuracy" in k} for metrics in (ours, theirs)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 4, "of three subjects and of all"
    assert (found / "predictions.jsonl").read_text() == (expected / "predictions.jsonl").read_text()


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait for it, but not forever."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
