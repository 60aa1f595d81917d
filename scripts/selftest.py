#!/usr/bin/env python3
"""Proves the installation on this machine, without a network: a tiny model of its own goes through what qlora.py does.

    python scripts/selftest.py                   on the CPU and, where there is one, on the first GPU (there in bf16)
    python scripts/selftest.py --device cpu      on one of them: cpu or cuda

One line for each check, with a tick or the reason; exit status 1 if any fails. It takes about a minute.
Everything is written into a temporary folder. Each device has a process of its own.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = [{"input": f"Count to {n}:", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 33)]
PLAIN = {  # the libraries' own way
    "fused_lora": False, "padding_free": False, "chunked_head": False, "liger": False, "auto_batch": False,
    "recompute_layers": "none", "unpacked_layers": "none",
}  # fmt: skip


def write_model(folder: Path) -> None:
    """A LLaMA of two layers with random weights, and a tokenizer with one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=320, initializer_range=0.05, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)


class Failure(Exception):
    """What a check found wrong."""


def expect(holds: bool, otherwise: str) -> None:
    """Raise a Failure that says `otherwise`."""
    if not holds:
        raise Failure(otherwise)


class Bench:
    """A device, and a folder with a model, rows, and the runs made so far."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        write_model(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def flags(self, name: str, **flags: Any) -> list[str]:
        """The command line of a run into the folder `name`."""
        flags = {
            "model_name_or_path": self.folder / "model", "dataset": self.folder / "rows.jsonl",
            "output_dir": self.folder / name, "cache_dir": self.folder / "cache", "bf16": self.device == "cuda",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_r": 16, "learning_rate": 3e-3,
            "max_steps": 6, "logging_steps": 1, "save_steps": 100, "disable_tqdm": True, **flags,
        }  # fmt: skip
        return [f"--{flag}={value}" for flag, value in flags.items()]

    def run(self, name: str, **flags: Any) -> str:
        """A run of qlora.py; returns what it said."""
        import qlora

        words = io.StringIO()
        qlora.log.handlers.clear()  # they would go on writing where the run before wrote
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            code = qlora.main(self.flags(name, **flags))
        gc.collect()
        expect(code == 0, f"exit status {code}: {words.getvalue().strip().splitlines()[-1]}")
        return words.getvalue()

    def losses(self, name: str) -> list[float]:
        """The loss of every step of a run."""
        log = json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in log if "loss" in entry]

    def adapter(self, name: str) -> Any:
        """All values of a run's adapter in one row, in float64."""
        import torch
        from safetensors.torch import load_file

        tensors = load_file(self.folder / name / "adapter_model.safetensors")
        return torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])

    def logits(self, bits: int) -> tuple[Any, int]:
        """Of the model's first tokens, at so many bits; and the number of its quantised layers."""
        import torch

        import qlora

        folder = str(self.folder / "model")
        config = qlora.parse_config(self.flags("none", bits=bits))
        model = qlora.load_model(config, qlora.load_model_config(config, folder), folder).eval()
        layers = [module for module in model.modules() if re.match(rf"Linear{bits}bit", type(module).__name__)]
        ids = torch.arange(64, device=model.get_input_embeddings().weight.device)[None]
        with torch.no_grad():
            return model(input_ids=ids).logits.double().cpu(), len(layers)


def distance(a: Any, b: Any) -> float:
    """Relative to `b`, in norm."""
    return float((a - b).norm() / b.norm())


def quantise(bench: Bench, bits: int, bound: float) -> str:
    """Weights rounded to few bits give nearly, but not exactly, the logits of those that are not."""
    whole, _ = bench.logits(32)
    rounded, layers = bench.logits(bits)
    error = distance(rounded, whole)
    expect(layers == 14, f"{layers} layers are quantised, expected 14")
    expect(1e-5 < error < bound, f"logits differ by {error:.2g} of their size, expected up to {bound:g}, and above 0")
    return f"logits within {error:.1%}"


def train(bench: Bench, bits: int) -> str:
    """Six steps of the defaults: nf4 or LLM.int8, paged optimizer, recomputed layers."""
    bench.run(f"{bits}bit", bits=bits)
    first, *_, last = bench.losses(f"{bits}bit")
    expect(last < first - 0.2, f"the loss went from {first:.3f} to {last:.3f}, expected it to fall")
    return f"loss {first:.2f} to {last:.2f}"


def fast_path(bench: Bench) -> str:
    """One step of plain SGD at rate 1 changes the adapter by its gradient, computed in two ways."""
    step = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "init_lora_weights": False}
    bench.run("start", **step | PLAIN | {"learning_rate": 0})
    bench.run("stock", **step | PLAIN | {"learning_rate": 1})
    said = bench.run("fast", **step | {"learning_rate": 1})
    for part in (r"rows end to end +yes", r"logits in chunks +yes"):
        expect(bool(re.search(part, said)), f"the fast path is not taken: {part!r} was not said")
    expect(
        "stay with peft's own functions" not in said, "the fast path is not taken: layers stay with peft's functions"
    )
    start, fast, stock = map(bench.adapter, ("start", "fast", "stock"))
    (ours,), (theirs,) = bench.losses("fast"), bench.losses("stock")
    loss, gradient = abs(ours / theirs - 1), distance(start - fast, start - stock)
    # bf16 has 8 bits, and neither side is exact: each is off by about a hundredth
    most_loss, most_gradient = (5e-3, 6e-2) if bench.device == "cuda" else (1e-5, 1e-3)
    expect(loss < most_loss, f"losses {ours:.5f} and {theirs:.5f} differ by {loss:.1e}, expected below {most_loss:g}")
    expect(gradient < most_gradient, f"gradients differ by {gradient:.1e}, expected below {most_gradient:g}")
    return f"losses differ by {loss:.0e}, gradients by {gradient:.0e}"


def merge(bench: Bench) -> str:
    """The program itself compares the merged model's logits with those of base and adapter."""
    from transformers import AutoConfig

    bench.run("4bit", do_train=False, merged_output_dir=bench.folder / "merged")
    config = AutoConfig.from_pretrained(bench.folder / "merged")
    expect(not hasattr(config, "quantization_config"), "the merged model is still quantised")
    found = json.loads((bench.folder / "4bit/metrics.json").read_text())["merge_difference"]
    return f"logits within {found:.1e} of base and adapter"


def resume(bench: Bench) -> str:
    """Ended after two steps of four and continued: the same adapter, bit for bit."""
    flags = {"lora_dropout": 0.1, "full_determinism": True}
    bench.run("straight", max_steps=4, **flags)
    for steps in (2, 4):
        bench.run("resumed", max_steps=steps, **flags)
    straight, resumed = bench.adapter("straight"), bench.adapter("resumed")
    expect(bench.losses("straight") == bench.losses("resumed"), "the losses of an uninterrupted run are others")
    expect(bool((straight == resumed).all()), f"adapters differ by {distance(resumed, straight):.1e}, expected by 0")
    return "equal to the bit"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "fast path against stock path": fast_path,  # first: liger-kernel, which it uses, stays in transformers' modules
    "quantise to 4 bit": lambda bench: quantise(bench, 4, 0.5),  # what has nothing in common differs by 1.4
    "quantise to 8 bit": lambda bench: quantise(bench, 8, 0.1),
    "train in 4 bit": lambda bench: train(bench, 4),
    "train in 8 bit": lambda bench: train(bench, 8),
    "merge": merge,
    "resume": resume,  # last: it makes torch deterministic for good
}


def check_all(device: str) -> int:
    """Every check on one device. Returns 1 if any failed."""
    import qlora

    print(f"{qlora.device_name()}: {', '.join(f'{name} {number}' for name, number in qlora.versions().items())}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="qlora-selftest-", ignore_cleanup_errors=True) as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            bench = Bench(device, Path(folder))
        for name, check in CHECKS.items():
            began = time.perf_counter()
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    tick, found = "✓", check(bench)
            except Exception as error:  # whatever is wrong with this machine is what we want to hear
                tick, found, failed = "✗", f"{type(error).__name__}: {qlora.shorten(error)}", 1
            print(f"{device:<4} {tick} {name:<28} {found} ({time.perf_counter() - began:.0f} s)", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of one device
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # where a terminal has no tick
    if args.here:
        return check_all(args.device)

    import torch

    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    devices = [args.device] if args.device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="qlora-selftest-") as home:
        fixed = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": home,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        for device in devices:
            environment = os.environ | fixed | {"CUDA_VISIBLE_DEVICES": gpu if device == "cuda" else ""}
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                environment.pop(name, None)
            command = [sys.executable, __file__, "--here", "--device", device]
            code = subprocess.run(command, env=environment, stderr=None, check=False).returncode
            if code not in (0, 1):
                print(f"{device:<4} ✗ the process ended with status {code}")
            failed |= int(code != 0)
    print("failed" if failed else "all is well")
    return failed


if __name__ == "__main__":
    sys.exit(main())
