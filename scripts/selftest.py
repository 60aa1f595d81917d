#!/usr/bin/env python3
"""Check an installation without a network: a tiny random model goes through what qlora.py does.

    python scripts/selftest.py                   on the first GPU in bf16, or on the CPU if there is none
    python scripts/selftest.py --device cpu

Prints one line for each check, with a tick or the reason it failed; the exit status is 1 if any failed. Takes about a
minute and writes only to a temporary folder.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # the libraries read the environment when they are imported
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: cuda, if there is a GPU")
    # one GPU at most: qlora.py would spread the model over several
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu if parser.parse_args().device == "cuda" else ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qlora

ROWS = [{"input": f"Count to {n}:", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 33)]
SPECIAL_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STOCK = {"fast_path": False, "auto_batch": False, "recompute_layers": "none"}  # the libraries' own functions


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_inputs(folder: Path) -> None:
    """Rows, and a two-layer LLaMA with random weights."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    byte_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, initializer_range=0.05, **SPECIAL_IDS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def flags_for(folder: Path, name: str, **flags: Any) -> list[str]:
    """The command line of a run that writes to the folder `name`."""
    defaults = {
        "model_name_or_path": folder / "model", "dataset": folder / "rows.jsonl", "output_dir": folder / name,
        "cache_dir": folder / "cache", "bf16": torch.cuda.is_available(), "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "lora_r": 16, "learning_rate": 3e-3, "max_steps": 6, "logging_steps": 1,
        "save_steps": 100, "disable_tqdm": True,
    }  # fmt: skip
    return [f"--{flag}={value}" for flag, value in (defaults | flags).items()]


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

    qlora.log.handlers.clear()  # they write to the previous run's output
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


def run(folder: Path, name: str, **flags: Any) -> tuple[list[float], torch.Tensor]:
    """A run that must end well. Returns the loss of every step and the adapter's values as one float64 vector."""
    code, text, _ = start(flags_for(folder, name, **flags))
    assert code == 0, f"exit status {code}: {text.strip().splitlines()[-1:]}"
    tensors = load_file(folder / name / "adapter_model.safetensors")
    adapter = torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])
    return [*logged(folder / name, "loss").values()], adapter


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, relative to that of `b`."""
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------
# Checks: each returns what it found, or raises
# ------------------------------------------------------------------------------------
@torch.no_grad()
def logits(folder: Path, bits: int) -> tuple[torch.Tensor, int]:
    """The model's logits at this precision, and how many of its layers are quantised."""
    config, base = qlora.parse_config(flags_for(folder, "none", bits=bits)), str(folder / "model")
    model = qlora.load_model(config, qlora.load_model_config(config, base), base).eval()
    layers = sum(type(module).__name__.startswith(f"Linear{bits}bit") for module in model.modules())
    ids = torch.arange(64, device=model.get_input_embeddings().weight.device)[None]
    return model(input_ids=ids).logits.double().cpu(), layers


def check_bits(folder: Path, bits: int, bound: float) -> str:
    """The logits of quantised weights are close to the original ones, but not equal; the loss falls in six steps."""
    quantised, layers = logits(folder, bits)
    error = distance(quantised, logits(folder, 32)[0])
    assert layers == 14, f"{layers} layers are quantised, expected 14"
    assert 1e-5 < error < bound, f"logits differ by {error:.2g}, expected more than 0 and less than {bound:g}"
    losses, _ = run(folder, f"{bits}bit", bits=bits)
    assert losses[-1] < losses[0] - 0.2, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, expected a fall"
    return f"logits within {error:.1%}, loss {losses[0]:.2f} to {losses[-1]:.2f}"


def check_fast_path(folder: Path) -> str:
    """One step of plain SGD at rate 1 changes the adapter by its gradient, computed in two ways."""
    step = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "init_lora_weights": False}
    _, before = run(folder, "start", **step, **STOCK, learning_rate=0)
    (stock_loss,), stock = run(folder, "stock", **step, **STOCK, learning_rate=1)
    (fast_loss,), fast = run(folder, "fast", **step, learning_rate=1)
    loss, gradient = abs(fast_loss / stock_loss - 1), distance(before - fast, before - stock)
    # bf16 has 8 bits of mantissa, so each side is about a hundredth off the exact gradient
    most_loss, most_gradient = (5e-3, 6e-2) if torch.cuda.is_available() else (1e-5, 1e-3)
    assert loss < most_loss, f"losses differ by {loss:.1e}, expected less than {most_loss:g}"
    assert gradient < most_gradient, f"gradients differ by {gradient:.1e}, expected less than {most_gradient:g}"
    assert gradient > 0, "gradients are identical to the bit: the fast path was not taken"
    return f"losses differ by {loss:.0e}, gradients by {gradient:.0e}"


def check_merge(folder: Path) -> str:
    """The merged model has the logits of base and adapter; qlora.py compares them itself."""
    run(folder, "4bit", do_train=False, merged_output_dir=folder / "merged")
    assert "quantization_config" not in qlora.read_json(folder / "merged/config.json"), "it is still quantised"
    difference = qlora.read_json(folder / "4bit/metrics.json")["merge_difference"]
    return f"logits within {difference:.1e} of base and adapter"


def check_resume(folder: Path) -> str:
    """A run that ends after two of four steps and is resumed gives the same losses and adapter, bit for bit."""
    flags = {"lora_dropout": 0.1, "full_determinism": True}
    losses, adapter = run(folder, "straight", max_steps=4, **flags)
    run(folder, "resumed", max_steps=2, **flags)
    resumed_losses, resumed = run(folder, "resumed", max_steps=4, **flags)
    assert losses == resumed_losses, "losses differ from the uninterrupted run's"
    assert bool((adapter == resumed).all()), f"adapters differ by {distance(resumed, adapter):.1e}, expected 0"
    return "identical to the bit"


# ------------------------------------------------------------------------------------
# Random runs, which tests/test_random_runs.py repeats with many seeds: killed, resumed, with flags that change
# ------------------------------------------------------------------------------------
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
        run(folder, "older", max_steps=2)
    shared, before = draw(chance, FIXED), contents(folder)
    shared |= {name: folder / f"{value}-{seed}" for name, value in shared.items() if name.endswith("_dir")}
    work = shared.get("working_dir", shared["output_dir"])
    for number in range(1, starts + 1):
        flags = shared | draw(chance, CHANGING)
        words = flags_for(folder, "", **flags, eval_dataset_size=HELD_OUT, source_max_len=16, target_max_len=112)
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
    count = len(ROWS) - HELD_OUT * ("eval_strategy" in flags)
    steps = (math.floor if flags["dataloader_drop_last"] else math.ceil)(count / size)
    for first in range(1, max(trained) - steps + 2, steps):
        rows = Counter(row for step in range(first, first + steps) for row in trained[step])
        count = min(count, steps * size)
        assert len(rows) == rows.total() == count, f"steps from {first} on have the rows {rows}, expected {count}"


CHECKS: dict[str, Callable[[Path], str]] = {
    "train in 4 bit": lambda folder: check_bits(folder, 4, 0.5),  # unrelated logits differ by 1.4
    "train in 8 bit": lambda folder: check_bits(folder, 8, 0.1),
    "fast path against stock": check_fast_path,
    "merge": check_merge,
    "random runs": check_random_runs,
    "resume": check_resume,  # last: it makes torch deterministic for the rest of the process
}


def check_all() -> int:
    """Run every check. Returns 1 if any failed."""
    print(f"{qlora.device_name()}: {', '.join(f'{name} {number}' for name, number in qlora.versions().items())}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="qlora-selftest-", ignore_cleanup_errors=True) as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            write_inputs(Path(folder))
        for name, check in CHECKS.items():
            began = time.perf_counter()
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    tick, message = "✓", check(Path(folder))
            except Exception as error:  # whatever is wrong with this machine is what we look for
                tick, message, failed = "✗", f"{type(error).__name__}: {error}", 1
            print(f"{tick} {name:<24} {message} ({time.perf_counter() - began:.0f} s)", flush=True)
    print("some checks failed" if failed else "all checks passed")
    return failed


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals that cannot print a tick
    sys.exit(check_all())
