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


CHECKS: dict[str, Callable[[Path], str]] = {
    "quantise to 4 bit": lambda folder: check_quantised(folder, 4, 0.5),  # unrelated logits differ by 1.4
    "quantise to 8 bit": lambda folder: check_quantised(folder, 8, 0.1),
    "fast path against stock": check_fast_path,
    "train in 4 bit": lambda folder: check_training(folder, 4),
    "train in 8 bit": lambda folder: check_training(folder, 8),
    "merge": check_merge,
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
