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
import itertools
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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROWS = [{"input": f"Count to {n}:", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 33)]
STOCK = {"fast_path": False, "auto_batch": False, "recompute_layers": "none"}  # the libraries' own functions


def write_inputs(folder: Path) -> None:
    """Rows, and a two-layer LLaMA with random weights and a tokenizer with one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, initializer_range=0.05, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def flags_for(folder: Path, name: str, **flags: Any) -> list[str]:
    """The command line of a run that writes to the folder `name`."""
    import torch

    defaults = {
        "model_name_or_path": folder / "model", "dataset": folder / "rows.jsonl", "output_dir": folder / name,
        "cache_dir": folder / "cache", "bf16": torch.cuda.is_available(), "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "lora_r": 16, "learning_rate": 3e-3, "max_steps": 6, "logging_steps": 1,
        "save_steps": 100, "disable_tqdm": True,
    }  # fmt: skip
    return [f"--{flag}={value}" for flag, value in (defaults | flags).items()]


def run(folder: Path, name: str, **flags: Any) -> tuple[list[float], Any]:
    """Run qlora.py in this process. Returns the loss of every step and the adapter's values as one float64 vector."""
    import torch
    from safetensors.torch import load_file

    import qlora

    output = io.StringIO()
    qlora.log.handlers.clear()  # they write to the previous run's output
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = qlora.main(flags_for(folder, name, **flags))
    assert code == 0, f"exit status {code}: {output.getvalue().strip().splitlines()[-1:]}"
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    tensors = load_file(folder / name / "adapter_model.safetensors")
    adapter = torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])
    return [entry["loss"] for entry in history if "loss" in entry], adapter


def logits(folder: Path, bits: int) -> tuple[Any, int]:
    """The model's logits at this precision, and how many of its layers are quantised."""
    import torch

    import qlora

    base = str(folder / "model")
    config = qlora.parse_config(flags_for(folder, "none", bits=bits))
    model = qlora.load_model(config, qlora.load_model_config(config, base), base).eval()
    layers = sum(type(module).__name__.startswith(f"Linear{bits}bit") for module in model.modules())
    ids = torch.arange(64, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits.double().cpu(), layers


def distance(a: Any, b: Any) -> float:
    """The norm of the difference, relative to that of `b`."""
    return float((a - b).norm() / b.norm())


def check_quantised(folder: Path, bits: int, bound: float) -> str:
    """The logits of quantised weights are close to the original ones, but not equal."""
    quantised, layers = logits(folder, bits)
    error = distance(quantised, logits(folder, 32)[0])
    assert layers == 14, f"{layers} layers are quantised, expected 14"
    assert 1e-5 < error < bound, f"logits differ by {error:.2g}, expected more than 0 and less than {bound:g}"
    return f"logits within {error:.1%}"


def check_training(folder: Path, bits: int) -> str:
    """The loss falls in six steps with the default flags."""
    losses, _ = run(folder, f"{bits}bit", bits=bits)
    assert losses[-1] < losses[0] - 0.2, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, expected a fall"
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def check_fast_path(folder: Path) -> str:
    """One step of plain SGD at rate 1 changes the adapter by its gradient, computed in two ways."""
    step = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "init_lora_weights": False}
    _, start = run(folder, "start", **step, **STOCK, learning_rate=0)
    (stock_loss,), stock = run(folder, "stock", **step, **STOCK, learning_rate=1)
    (fast_loss,), fast = run(folder, "fast", **step, learning_rate=1)
    loss, gradient = abs(fast_loss / stock_loss - 1), distance(start - fast, start - stock)
    # bf16 has 8 bits of mantissa, so each side is about a hundredth off the exact gradient
    most_loss, most_gradient = (5e-3, 6e-2) if "--bf16=True" in flags_for(folder, "fast") else (1e-5, 1e-3)
    assert loss < most_loss, f"losses differ by {loss:.1e}, expected less than {most_loss:g}"
    assert gradient < most_gradient, f"gradients differ by {gradient:.1e}, expected less than {most_gradient:g}"
    assert gradient > 0, "gradients are identical to the bit: the fast path was not taken"
    return f"losses differ by {loss:.0e}, gradients by {gradient:.0e}"


def check_merge(folder: Path) -> str:
    """The merged model has the logits of base and adapter; qlora.py compares them itself."""
    run(folder, "4bit", do_train=False, merged_output_dir=folder / "merged")
    config = json.loads((folder / "merged/config.json").read_text())
    assert "quantization_config" not in config, "the merged model is still quantised"
    difference = json.loads((folder / "4bit/metrics.json").read_text())["merge_difference"]
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

FIXED: dict[str, list[Any]] = {  # for the whole life of a run
    "bits": [4, 16], "optim": ["paged_adamw_32bit", "adamw_torch"], "seed": [0, 1], "lora_dropout": [0, 0.1],
    "per_device_train_batch_size": [3, 4, 8], "gradient_accumulation_steps": [1, 2],
    "train_sampling_strategy": ["group_by_length", "random"], "dataloader_drop_last": [False, True],
    "output_dir": ["random", "older/next"], "other_dir": ["working_dir", "final_output_dir", ""],
    "eval_strategy": ["no", "steps"], "eval_steps": [1], "eval_dataset_size": [8], "packing": [False, False, True],
    "full_finetune": [False, True], "source_max_len": [16], "target_max_len": [112],
}  # fmt: skip
CHANGING: dict[str, list[Any]] = {  # with each start
    "learning_rate": [1e-3, 2e-4], "lr_scheduler_type": ["constant", "linear", "cosine", "constant_with_warmup"],
    "warmup_steps": [0, 3], "weight_decay": [0, 0.1], "max_grad_norm": [0.3, 1], "max_steps": [9, 12],
    "save_steps": [1, 2, 3], "save_total_limit": [-1, 1, 2], "load_best_model_at_end": [False, True],
}  # fmt: skip
REFUSED: list[dict[str, Any]] = [
    {"seed": 7}, {"optim": "sgd"}, {"bits": 8}, {"gradient_accumulation_steps": 5}, {"source_max_len": 3},
    {"output_dir": "model"}, {"final_output_dir": "model"}, {"working_dir": "."}, {"output_dir": "model/.."},
]  # fmt: skip


class Killed(BaseException):
    """Ends a run as kill -9 does: no handler of the program sees it."""


def start(folder: Path, flags: dict[str, Any], event: str = "", step: int = 0) -> tuple[Any, str, dict[int, list[str]]]:
    """Start a run and, at `event` of `step`, kill or signal it. Returns exit status, output and each step's rows."""
    from transformers import TrainerCallback

    import qlora

    class Interrupt(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            return self.interrupt if name == event.rpartition(" ")[2] else super().__getattribute__(name)

        def interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and "signal" in event:
                signal.raise_signal(signal.SIGTERM)
            elif state.global_step == step:
                raise Killed

    build, training_step, rows = qlora.build_callbacks, qlora.QLoRATrainer.training_step, {}

    def noted(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows[self.state.global_step + 1] = list(inputs["step"].where)
        return training_step(self, model, inputs, *args)

    output, code = io.StringIO(), "killed"
    qlora.log.handlers.clear()
    with (
        mock.patch.object(qlora, "build_callbacks", lambda *args: [*build(*args), Interrupt()]),
        mock.patch.object(qlora.QLoRATrainer, "training_step", noted),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        contextlib.suppress(Killed),
    ):
        code = qlora.main(flags_for(folder, "random", **flags))
    return code, output.getvalue(), rows


def rates(flags: dict[str, Any]) -> list[float]:
    """The learning rate of each step, from transformers alone."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=flags["learning_rate"])
    schedule = get_scheduler(flags["lr_scheduler_type"], optimizer, flags["warmup_steps"], flags["max_steps"])
    found = []
    for _ in range(flags["max_steps"]):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, beside the cache."""
    files = (path for path in folder.rglob("*") if path.is_file() and folder / "cache" not in path.parents)
    return {path: path.read_bytes() for path in files}


def check_random_runs(folder: Path, seed: int = 3, starts: int = 4) -> str:
    """A run that is killed and resumed with other flags keeps to them, and to what lay around it.

    Nothing that was there before is gone or changed, the log's rates and the rows of each step are those of the flags,
    and what a line calls saved loads.
    """
    import qlora

    chance = random.Random(seed)
    if not (folder / "older").exists():
        run(folder, "older", max_steps=2)
    shared = {name: chance.choice(values) for name, values in FIXED.items()}
    shared["full_finetune"] &= shared["bits"] == 16
    shared["dataloader_drop_last"] &= not shared["packing"]  # or nothing would be left of a few packs
    other, output = shared.pop("other_dir"), folder / f"{shared['output_dir']}-{seed}"
    shared |= {"output_dir": output} | ({other: folder / f"elsewhere-{seed}"} if other else {})
    work = shared.get("working_dir", output)
    before, expected, trained, step = contents(folder), {}, {}, 0
    for number in range(starts):
        flags = shared | {name: chance.choice(values) for name, values in CHANGING.items()}
        flags["load_best_model_at_end"] &= flags["eval_strategy"] == "steps"
        if number and chance.random() < 0.5:
            refused, there = chance.choice(REFUSED), contents(folder)
            own = {name: folder / value if name.endswith("_dir") else value for name, value in refused.items()}
            code, text, _ = start(folder, flags | own)
            assert code == 2 and contents(folder) == there, f"{refused} was not refused: {code}, {text[-500:]}"
        last = number == starts - 1
        event = chance.choice(
            [f"{how} on_{what}" for how in ("kill", "signal") for what in ("step_begin", "step_end", "save")]
        )
        stop = chance.randrange(step, max(step, flags["max_steps"]) + 1)
        code, text, rows = start(folder, flags, *(() if last else (event, stop)))
        where = f"seed {seed}, start {number}, {event} {stop}, {flags}:\n{text[-2000:]}"
        assert code in (0, 143, "killed") and (code == 0 or not last), f"exit status {code}, {where}"
        expected |= {done: rate for done, rate in enumerate(rates(flags), 1) if done in rows}
        trained |= rows
        for line in re.findall(r".* at step (\d+), saved", text):
            names = [work / f"checkpoint-{line}"] if not (work / "completed").exists() else []
            assert all(qlora.checkpoint_problem(name) is None for name in names), f"{line} is not saved, {where}"
        newest = qlora.find_last_checkpoint(work)
        step = qlora.checkpoint_step(newest) if newest else 0
        state = work if code == 0 else newest
        log = json.loads((state / "trainer_state.json").read_text())["log_history"] if state else []
        logged = {entry["step"]: entry["learning_rate"] for entry in log if "loss" in entry}
        wrong = [n for n, rate in logged.items() if not math.isclose(rate, expected[n], rel_tol=1e-6, abs_tol=1e-12)]
        assert not wrong, f"rates of steps {wrong} are not the flags': {logged}, expected {expected}, {where}"
        after = contents(folder)
        changed = [str(path) for path, data in before.items() if after.get(path) != data]
        assert not changed, f"{changed} changed, {where}"
        if (work / "completed").exists():  # or a signal came in the last step
            break
    if not shared["packing"]:
        check_rows(trained, shared)
    return f"{number + 1} starts, {len(logged)} steps"


def check_rows(trained: dict[int, list[str]], flags: dict[str, Any]) -> None:
    """Every epoch has each row once; where the last, smaller step is dropped, at most once."""
    size = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    count = len(ROWS) - flags["eval_dataset_size"] * (flags["eval_strategy"] == "steps")
    steps = (math.floor if flags["dataloader_drop_last"] else math.ceil)(count / size)
    for epoch in range(max(trained) // steps):
        rows = Counter(itertools.chain(*(trained[epoch * steps + n] for n in range(1, steps + 1))))
        count = min(count, steps * size)
        assert len(rows) == sum(rows.values()) == count, f"epoch {epoch + 1} has the rows {rows}, expected {count}"


CHECKS: dict[str, Callable[[Path], str]] = {
    "quantise to 4 bit": lambda folder: check_quantised(folder, 4, 0.5),  # unrelated logits differ by 1.4
    "quantise to 8 bit": lambda folder: check_quantised(folder, 8, 0.1),
    "fast path against stock": check_fast_path,
    "train in 4 bit": lambda folder: check_training(folder, 4),
    "train in 8 bit": lambda folder: check_training(folder, 8),
    "merge": check_merge,
    "random runs": check_random_runs,
    "resume": check_resume,  # last: it makes torch deterministic for the rest of the process
}


def check_all() -> int:
    """Run every check. Returns 1 if any failed."""
    import qlora

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


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: cuda, if there is a GPU")
    # one GPU at most: qlora.py would spread the model over several
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu if parser.parse_args().device == "cuda" else ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRANSFORMERS_VERBOSITY": "error"}
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot print a tick
    return check_all()


if __name__ == "__main__":
    sys.exit(main())
