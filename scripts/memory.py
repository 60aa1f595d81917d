#!/usr/bin/env python3
"""Does a model of this size train in so much memory? Peak memory against the plan, on random weights.

    python scripts/memory.py [--shapes 1b,7b,8b,70b@48] [--tokens 512] [--steps 5] [-- FLAGS OF qlora.py]

A model of each shape, LLaMA's or a mixture's, is made on the GPU, quantised layer by layer, so that no disk and no
second copy is needed, and trained for a few steps on random tokens, one row at a time with every layer recomputed.
70b@48: on a card of 48 GiB, of which torch's allocator gets what CUDA leaves. 70b/8: with 8 layers of it. memory.json
and its table go to --out.
With --write DIR nothing is trained: each model is written, quantised, into DIR/SHAPE with a tokenizer, for
scripts/benchmark_many.py (-- --bf16 --fsdp: stored as FSDP needs it) or benchmark.py (-- --bits 16: not quantised).
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import datasets
import proof
import torch
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import tiny

import qlora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# hidden, inner, layers, heads, key/value heads, vocabulary: of LLaMA, LLaMA-2 and Llama 3, of Yi-34B and of mixtures
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 320),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "33b": (6656, 17920, 60, 52, 52, 32000),
    "34b": (7168, 20480, 60, 56, 8, 64000),
    "65b": (8192, 22016, 80, 64, 64, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny-moe": (64, 128, 2, 4, 2, 320),
    "mixtral-8x7b": (4096, 14336, 32, 32, 8, 32000),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, 4, 151936),
}
QWEN3 = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
# configuration and what it needs beside the shape; LLaMA's for all others
MIXTURES: dict[str, tuple[Any, dict[str, int]]] = {
    "tiny-moe": (MixtralConfig, {}), "mixtral-8x7b": (MixtralConfig, {}), "qwen3-30b-a3b": (Qwen3MoeConfig, QWEN3),
}  # fmt: skip


def shape_config(name: str) -> Any:
    """The configuration of a shape; qwen3-30b-a3b/12 has 12 layers of it."""
    name, _, some = name.partition("/")
    hidden, inner, layers, heads, grouped, vocabulary = SHAPES[name]
    kind, more = MIXTURES.get(name, (LlamaConfig, {}))
    return kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=int(some or layers), num_attention_heads=heads,
        num_key_value_heads=grouped, vocab_size=vocabulary, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, **more,
    )  # fmt: skip


def random_base(model_config: Any, config: qlora.Config, writes: bool = False) -> Any:
    """The model with random weights, each quantised before the next is drawn.

    Stacks of experts to be written stay as they are: transformers' layout has no packed ones.
    """
    model, packed = qlora.meta_model(config, model_config), config.quant.bits == 4
    linear = set(qlora.linear_layers(model)) if packed else set()
    for name, parameter in list(model.named_parameters()):
        value = torch.empty_like(parameter, device=DEVICE, requires_grad=False)
        value = value.fill_(1.0) if parameter.ndim == 1 else value.normal_(0, 0.02)
        module, _, leaf = name.rpartition(".")
        if module in linear:
            out, size = parameter.shape
            options: Any = {"bias": False, "compute_dtype": qlora.compute_dtype(config), "device": "meta"}
            model.set_submodule(module, bitsandbytes.nn.Linear4bit(size, out, **options))
        packs = module in linear or (parameter.ndim == 3 and qlora.packs_experts(config) and not writes)
        weight = qlora.pack_weight(value, config) if packs else torch.nn.Parameter(value, requires_grad=False)
        setattr(model.get_submodule(module), leaf, weight)
    model.model.rotary_emb = type(model.model.rotary_emb)(model_config).to(DEVICE)
    model.is_loaded_in_4bit = packed  # as peft asks
    model.config.use_cache = False
    return model


def load_random(config: qlora.Config, model_config: Any, _: str) -> Any:
    """In place of qlora.load_model: the base with random weights."""
    model = random_base(model_config, config)
    if qlora.packs_experts(config):
        qlora.pack_experts(model, config)
    return model


def train(name: str, cap: float | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one shape for a few steps on random rows; where memory does not suffice, the reason."""
    model_config, tokenizer = shape_config(name), tiny.byte_tokenizer()
    config = qlora.parse_config([
        "--model_name_or_path", name, "--output_dir", "/tmp/memory", "--save_strategy", "no", "--bf16",
        "--gradient_accumulation_steps", "1", "--max_steps", str(arguments.steps), "--logging_steps", "1",
        "--recompute_layers", "all", "--disable_tqdm", "True", *arguments.flags,
    ])  # fmt: skip
    memory = qlora.memory_from_config(config, model_config)
    room = 1000 * qlora.GIB  # the prediction for a GPU on which it fits
    plan, _, _ = qlora.plan_step(memory, room, arguments.tokens, arguments.tokens, config)
    pages = memory.optimizer / qlora.GIB if memory.paged else 0.0
    result = {"shape": name, "cap": cap, "predicted_gib": round(plan.peak or 0.0, 3), "pages_gib": round(pages, 3)}
    ids = torch.randint(5, model_config.vocab_size, (arguments.steps, arguments.tokens)).tolist()
    columns = {"input_ids": ids, "labels": ids, "length": [arguments.tokens] * len(ids), "where": [""] * len(ids)}
    rows = datasets.Dataset.from_dict(columns)
    run = qlora.Run(config, name, name, model_config, tokenizer, qlora.ResumePoint(train=True))
    data = qlora.Data(rows, None, qlora.Splits(rows, None), {})
    try:
        with mock.patch.object(qlora, "load_model", load_random):
            trainer = qlora.prepare(run, data, {"effective batch": {"rows": 1}}, None, qlora.GracefulStop())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    except torch.OutOfMemoryError as error:
        return result | {"failed": str(error).split(". ")[0]}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return result | {
        "peak_gib": round(qlora.peak_memory_gib(), 3),
        "losses": [entry["loss"] for entry in history],
        "grad_norms": [entry["grad_norm"] for entry in history],
        "plan": str(trainer.plan),
    }


def memory_table(content: dict[str, Any]) -> str:
    """One line for each shape and memory limit."""
    rows = [["shape", "limit, GiB", "plan, GiB", "measured peak, GiB", "optimizer's pages, GiB",
             "loss, first and last step", "gradient norm"]]  # fmt: skip
    for run in content["results"]:
        planned, pages = [run["shape"], str(run["cap"] or ""), f"{run['predicted_gib']:.2f}"], f"{run['pages_gib']:.2f}"
        if "failed" in run:
            rows.append([*planned, f"failed: {run['failed']}", pages, "", ""])
            continue
        losses = f"{run['losses'][0]:.2f}, {run['losses'][-1]:.2f}"
        rows.append([*planned, f"{run['peak_gib']:.2f}", pages, losses, f"{run['grad_norms'][-1]:.2f}"])
    return proof.markdown(*rows)


def write(name: str, arguments: argparse.Namespace) -> None:
    """A shape with random weights, quantised, as a folder to load."""
    config = qlora.parse_config(["--model_name_or_path", name, "--output_dir", "/tmp/memory", *arguments.flags])
    model, folder = random_base(shape_config(name), config, writes=True), Path(arguments.write, name)
    if config.quant.bits == 4:
        quantisation: Any = qlora.quantisation_config(config, shape_config(name))
        model.config.quantization_config = quantisation.to_dict()
    model.save_pretrained(folder, max_shard_size="5GB")
    tiny.byte_tokenizer().save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Every shape in turn; what is measured is written as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,7b,8b,13b,34b,70b,65b@48,70b@48,33b@24,7b@6")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default=str(proof.RESULTS))
    parser.add_argument("--write", metavar="DIR", help="write the models instead of training them")
    parser.add_argument("flags", nargs="*", help="flags of qlora.py, after --")
    qlora.set_up_logging()
    arguments, results = parser.parse_args(argv), list[dict[str, Any]]()
    for shape in arguments.shapes.split(","):
        if arguments.write:
            write(shape, arguments)
            continue
        name, _, limit = shape.partition("@")
        cap = float(limit) if limit else None
        if torch.cuda.is_available():
            whole = torch.cuda.get_device_properties(0).total_memory / qlora.GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - qlora.CONTEXT) / whole) if cap else 1.0)
        results.append(train(name, cap, arguments))
        proof.publish(arguments.out, "memory", {"results": results}, memory_table({"results": results}))
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


if __name__ == "__main__":
    main()
