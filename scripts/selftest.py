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
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the libraries read the environment when they are imported
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: cuda, if there is a GPU")
    # one GPU at most: qlora.py would spread the model over several
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu if parser.parse_args().device == "cuda" else ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny

import qlora

ROWS = [{"input": f"Count to {n}:", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 33)]


def write_inputs(folder: Path) -> None:
    """Rows, and a two-layer LLaMA with random weights."""
    tiny.rows_to_jsonl(folder / "rows.jsonl", ROWS)
    tiny.write_model(folder / "model", "llama_gqa", hidden_size=256, intermediate_size=512, initializer_range=0.05)


def flags_for(folder: Path, name: str, **flags: Any) -> list[str]:
    """The command line of a run that writes to the folder `name`."""
    defaults = {
        "model_name_or_path": folder / "model", "dataset": folder / "rows.jsonl", "output_dir": folder / name,
        "cache_dir": folder / "cache", "bf16": torch.cuda.is_available(), "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "max_steps": 6, "logging_steps": 1,
    }  # fmt: skip
    return [f"--{flag}={value}" for flag, value in (defaults | flags).items()]


def run(folder: Path, name: str, **flags: Any) -> torch.Tensor:
    """A run that must end well. Returns the adapter's values as one vector."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = qlora.main(flags_for(folder, name, **flags))
    assert code == 0, f"exit status {code}: {output.getvalue().strip().splitlines()[-1:]}"
    return torch.cat([tensor.flatten() for tensor in load_file(folder / name / "adapter_model.safetensors").values()])


def check_gradients(folder: Path, one: dict[str, Any], other: dict[str, Any], bound: float) -> str:
    """The adapter's gradients with two sets of flags are close, but not equal: something was computed differently."""
    # at rate and weight decay 1, a step of plain SGD puts the negative gradient in place of the adapter
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1, "weight_decay": 1, "max_grad_norm": 0}
    step |= {"init_lora_weights": False, "overwrite_output_dir": True}  # where B is zero, A has no gradient
    a, b = (run(folder, "step", **step, **flags) for flags in (one, other))
    difference = float((a - b).norm() / b.norm())
    assert 0 < difference < bound, f"gradients differ by {difference:.1e}, expected more than 0, less than {bound:g}"
    return f"gradients differ by {difference:.1e}"


def check_merge(folder: Path) -> str:
    """Training lowers the loss, and the merged model has the logits of base and adapter: qlora.py compares them."""
    run(folder, "trained", merged_output_dir=folder / "merged")
    metrics = qlora.read_json(folder / "trained/metrics.json")
    loss, difference = metrics["train_loss"], metrics["merge_difference"]
    assert loss < 5, f"the mean loss is {loss:.2f}, expected less than 5: it starts at 6"
    return f"mean loss {loss:.2f}, logits within {difference:.1e} of base and adapter"


def check_resume(folder: Path) -> str:
    """A run that ends after two of four steps and is resumed gives the same adapter, bit for bit."""
    flags = {"lora_dropout": 0.1, "full_determinism": True}
    straight = run(folder, "straight", max_steps=4, **flags)
    run(folder, "resumed", max_steps=2, **flags)
    assert torch.equal(run(folder, "resumed", max_steps=4, **flags), straight), "the adapter differs"
    return "identical to the bit"


STOCK = {"fast_path": False, "auto_batch": False, "recompute_layers": "none"}  # the libraries' own functions
CHECKS: dict[str, Callable[[Path], str]] = {  # each returns what it found, or raises
    # unrelated gradients differ by 1.4; in bf16, with 8 bits of mantissa, each is about a hundredth off the exact one
    "4 bit against 32 bit": partial(check_gradients, one={"bits": 4}, other={"bits": 32}, bound=0.5),
    "8 bit against 32 bit": partial(check_gradients, one={"bits": 8}, other={"bits": 32}, bound=0.2),
    "fast path against stock": partial(
        check_gradients, one={}, other=STOCK, bound=0.06 if torch.cuda.is_available() else 1e-3
    ),
    "train and merge": check_merge,
    "resume": check_resume,  # last: it makes torch deterministic for the rest of the process
}


def check_all() -> int:
    """Run every check. Returns 1 if any failed."""
    print(f"{qlora.device_name()}: {', '.join(f'{name} {number}' for name, number in qlora.versions().items())}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="qlora-selftest-", ignore_cleanup_errors=True) as folder:
        write_inputs(Path(folder))
        for name, check in CHECKS.items():
            try:
                tick, message = "✓", check(Path(folder))
            except Exception as error:  # whatever is wrong with this machine is what we look for
                tick, message, failed = "✗", f"{type(error).__name__}: {error}", 1
            print(f"{tick} {name:<24} {message}", flush=True)
    print("some checks failed" if failed else "all checks passed")
    return failed


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals that cannot print a tick
    sys.exit(check_all())
