#!/usr/bin/env python3
"""QLoRA in a plain training loop: transformers, peft and bitsandbytes, without qlora.py.

    python examples/loop.py MODEL rows.jsonl output/loop --steps 100

Read it to learn what QLoRA does; qlora.py computes the same losses (tests/test_examples.py compares them) and adds
speed, resuming, evaluation and error messages. MODEL is a folder or a hub id of a causal language model. Each line of
the file is a pair {input, output} or plain {text}. The adapter and its tokenizer are saved to the output folder, where
peft and qlora.py find them.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.optim import PagedAdamW32bit
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

IGNORE = -100  # the label of a token that is not supervised
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}  # what fills up a row that is shorter than others
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # float32 is faster on a CPU


# ---- Data: a row of the file -> input_ids and labels -------------------------------
def encode(row: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """BOS, the prompt (not supervised), the answer and EOS (supervised), cut on the right to `max_length` tokens."""
    if "instruction" in row:
        raise SystemExit("Alpaca rows need a prompt around them, as qlora.py writes it: make pairs of input and output")
    # split_special_tokens: "</s>" in a row is text and must not become the token that ends an answer
    texts = ["", row["text"]] if "text" in row else [row["input"], row["output"]]
    prompt, answer = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    answer = [*answer, tokenizer.eos_token_id]
    labels = [IGNORE] * len(prompt) + answer
    labels[0] = IGNORE  # nothing precedes the first token, so nothing can predict it
    ids = (prompt + answer)[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[:max_length]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest of them: three (rows, tokens) tensors."""
    batch = {}
    for name, value in PADDING.items():
        tensors = [torch.tensor(row[name], device=DEVICE) for row in rows]
        batch[name] = pad_sequence(tensors, batch_first=True, padding_value=value)
    return batch


def windows(rows: list[Any], size: int, shuffle: bool, seed: int) -> Iterator[list[Any]]:
    """The rows of each optimizer step, epoch after epoch; an epoch may end with a smaller step."""
    rows, order = list(rows), random.Random(seed)
    while True:
        if shuffle:
            order.shuffle(rows)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


# ---- Model: a frozen 4-bit base with trainable low-rank adapters -------------------
def load_model(name: str, rank: int) -> Any:
    """The base in nf4 with double quantisation, and LoRA on every linear layer except the head."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # 16 levels, spaced for normally distributed weights
        bnb_4bit_use_double_quant=True,  # the scale of each 64 weights is stored in 8 bits: 4.13 bits a weight
        bnb_4bit_compute_dtype=DTYPE,  # weights are unpacked to this type for every product
    )
    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=DTYPE, device_map={"": DEVICE})
    base.requires_grad_(False)
    base.config.use_cache = False
    # Keep only each layer's input and recompute the rest in the backward pass: slower, but much less memory.
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


# ---- Training ----------------------------------------------------------------------
def window_loss(model: Any, window: list[Any], batch_size: int) -> float:
    """Forward and backward over an optimizer step's rows. Returns the mean loss of their supervised tokens.

    Dividing each micro-batch by its own count instead would weight short answers more than long ones.
    """
    supervised = sum(label != IGNORE for row in window for label in row["labels"])
    total = 0.0
    for start in range(0, len(window), batch_size):
        batch = collate(window[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]  # position t predicts token t + 1
        with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE is torch.bfloat16):
            logits = model(**batch).logits[:, :-1].float()  # (rows, tokens - 1, vocabulary)
        summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        loss = summed / max(supervised, 1)
        loss.backward()
        total += loss.item()
    return total


def fine_tune(args: argparse.Namespace) -> list[float]:
    """Train and save the adapter. Returns the loss of every step."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = Path(args.rows).read_text(encoding="utf-8").split("\n")  # not at U+2028
    rows = [encode(json.loads(line), tokenizer, args.max_length) for line in lines if line.strip()]
    set_seed(args.seed)  # before the adapters are drawn
    model = load_model(args.model, args.rank).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Paged: on a GPU that runs out of memory the optimizer's state moves to the CPU instead of failing.
    optimizer = PagedAdamW32bit(parameters, lr=args.learning_rate, weight_decay=0.0)
    losses = []
    steps = windows(rows, args.batch_size * args.accumulation_steps, args.shuffle, args.seed)
    for step, window in enumerate(itertools.islice(steps, args.steps), start=1):
        losses.append(window_loss(model, window, args.batch_size))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()  # at a constant rate
        optimizer.zero_grad()
        print(f"step {step}: loss {losses[-1]:.6f}, gradient norm {float(norm):.3f}", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("rows", help="JSON-lines file to train on")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation_steps", type=int, default=16, help="micro-batches of an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapters; their alpha is 16")
    parser.add_argument("--max_length", type=int, default=1024, help="longest row, in tokens; longer ones are cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    return fine_tune(parser.parse_args(argv))


if __name__ == "__main__":
    main()
