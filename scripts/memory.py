#!/usr/bin/env python3
"""Does a model of this size train in so much memory? Peak memory against the plan, on random weights.

    python scripts/memory.py [--shapes 1b,7b,8b,70b@48] [--tokens 512] [-- FLAGS OF qlora.py]

A model of each shape, LLaMA's or a mixture's, is loaded as if from files, but each weight is drawn on the GPU and
quantised before the next, so that no disk and no second copy is needed. It is trained for --max_steps (5) on random
tokens, one row at a time with every layer recomputed. 70b@48: on a card of 48 GiB, of which torch's allocator gets
what CUDA leaves. memory.json and its table go to --out.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import proof
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import tiny

import qlora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LLAMA = {"model_type": "llama", "vocab_size": 32000}
MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
# width, inner width, layers, heads, heads of keys and values: of LLaMA, LLaMA-2 and Llama 3, Yi-34B and mixtures
SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (64, 128, 2, 4, 2, LLAMA | {"vocab_size": 320}),
    "1b": (2048, 8192, 16, 32, 8, LLAMA),
    "7b": (4096, 11008, 32, 32, 32, LLAMA),
    "8b": (4096, 14336, 32, 32, 8, LLAMA | {"vocab_size": 128256}),
    "13b": (5120, 13824, 40, 40, 40, LLAMA),
    "33b": (6656, 17920, 60, 52, 52, LLAMA),
    "34b": (7168, 20480, 60, 56, 8, LLAMA | {"vocab_size": 64000}),
    "65b": (8192, 22016, 80, 64, 64, LLAMA),
    "70b": (8192, 28672, 80, 64, 8, LLAMA | {"vocab_size": 128256}),
    "tiny-moe": (64, 128, 1, 4, 2, {"model_type": "mixtral", "vocab_size": 320}),
    "mixtral-8x7b": (4096, 14336, 32, 32, 8, {"model_type": "mixtral", "vocab_size": 32000}),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, 4, MOE | {"model_type": "qwen3_moe", "vocab_size": 151936}),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PLAN = ["--bf16", "--gradient_accumulation_steps", "1", "--max_steps", "5", "--recompute_layers", "all",
        "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True",
        "--output_dir", "/tmp/memory"]  # fmt: skip


class RandomWeight:
    """What transformers takes for a slice of a file: the weight is drawn when it is read."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __getitem__(self, _: Any) -> torch.Tensor:
        value = torch.empty_like(self.weight, device=DEVICE)
        return value.fill_(1.0) if value.ndim == 1 else value.normal_(0, 0.02)


def random_model(_: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """In place of from_pretrained: a model with random weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: RandomWeight(weight) for name, weight in model.state_dict().items()}
    options |= {"config": config, "dtype": dtype, "device_map": {"": DEVICE}, "state_dict": weights}
    return type(model).from_pretrained(None, **options)


def train(config: qlora.Config, model_config: Any, tokens: int) -> dict[str, Any]:
    """Train on random rows: what was planned and what was measured or, if memory does not suffice, the reason."""
    memory = qlora.memory_from_config(config, model_config)
    plan, _, _ = qlora.plan_step(memory, 1000 * qlora.GIB, tokens, tokens, config)  # for a GPU on which it fits
    pages = memory.optimizer / qlora.GIB if memory.paged else 0.0
    result = {"predicted_gib": round(plan.peak or 0.0, 3), "pages_gib": round(pages, 3)}
    ids = torch.randint(5, model_config.vocab_size, (config.training.max_steps, tokens)).tolist()
    columns = {"input_ids": ids, "labels": ids, "length": [tokens] * len(ids), "where": [""] * len(ids)}
    rows = datasets.Dataset.from_dict(columns)
    run = qlora.Run(config, "", "", model_config, tiny.byte_tokenizer(), qlora.ResumePoint(train=True))
    data = qlora.Data(rows, None, qlora.Splits(rows, None), {})
    try:
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", random_model):
            trainer = qlora.prepare(run, data, {"effective batch": {"rows": 1}}, None, qlora.GracefulStop())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of the trial steps that the plan is corrected by
        trainer.train()
    except (torch.OutOfMemoryError, qlora.ConfigError) as error:  # transformers may hide it while it loads
        return result | {"failed": str(error).split(". ")[0]}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return result | {"peak_gib": round(qlora.peak_memory_gib(), 3), "losses": losses, "plan": str(trainer.plan)}


def memory_table(content: dict[str, Any]) -> str:
    """One line for each shape and memory limit."""
    rows = [["shape", "limit, GiB", "plan, GiB", "measured peak, GiB", "optimizer's pages, GiB"]]
    for run in content["results"]:
        peak = f"failed: {run['failed']}" if "failed" in run else f"{run['peak_gib']:.2f}"
        planned, pages = f"{run['predicted_gib']:.2f}", f"{run['pages_gib']:.2f}"
        rows.append([run["shape"], str(run["cap"] or ""), planned, peak, pages])
    return proof.markdown(*rows)


def main(argv: list[str] | None = None) -> None:
    """Every shape in turn; what is measured is written as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,7b,8b,13b,34b,70b,65b@48,70b@48,33b@24,7b@6")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", default=str(proof.RESULTS))
    parser.add_argument("flags", nargs="*", help="flags of qlora.py, after --")
    qlora.set_up_logging()
    arguments, results = parser.parse_args(argv), list[dict[str, Any]]()
    for shape in arguments.shapes.split(","):
        name, _, limit = shape.partition("@")
        *sizes, others = SHAPES[name]
        ids = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
        model_config = AutoConfig.for_model(**others, **ids, **dict(zip(SIZES, sizes, strict=True)))
        config = qlora.parse_config(["--model_name_or_path", name, *PLAN, *arguments.flags])
        cap = float(limit) if limit else None
        if torch.cuda.is_available():
            whole = torch.cuda.get_device_properties(0).total_memory / qlora.GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - qlora.CONTEXT) / whole) if cap else 1.0)
        results.append({"shape": name, "cap": cap} | train(config, model_config, arguments.tokens))
        proof.publish(arguments.out, "memory", {"results": results}, memory_table({"results": results}))
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


if __name__ == "__main__":
    main()
