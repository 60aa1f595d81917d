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
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def run(folder: Path, name: str, **flags: Any) -> tuple[list[float], torch.Tensor]:
    """A run that must end well. Returns the loss of every step and the adapter's values as one float64 vector."""
    output = io.StringIO()
    qlora.log.handlers.clear()  # they write to the previous run's output
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = qlora.main(flags_for(folder, name, **flags))
    assert code == 0, f"exit status {code}: {output.getvalue().strip().splitlines()[-1:]}"
    tensors = load_file(folder / name / "adapter_model.safetensors")
    adapter = torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])
    history = qlora.read_json(folder / name / "trainer_state.json")["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], adapter


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


CHECKS: dict[str, Callable[[Path], str]] = {
    "train in 4 bit": lambda folder: check_bits(folder, 4, 0.5),  # unrelated logits differ by 1.4
    "train in 8 bit": lambda folder: check_bits(folder, 8, 0.1),
    "fast path against stock": check_fast_path,
    "merge": check_merge,
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
