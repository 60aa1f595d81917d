#!/usr/bin/env python3
"""Tokens per second and peak memory of QLoRA steps: qlora.py, stock libraries, liger-kernel and unsloth, in one run.

    python scripts/benchmark.py MODEL [--sides ours,stock,liger,unsloth] [--cases 1x528:all,16x528:none] [--out DIR]

MODEL is a folder with a LLaMA model; random weights will do. A case is ROWSxTOKENS:RECOMPUTE, the rows of a micro-batch
and none or all; 16*1x528 stands for 16 rows of an optimizer step that come one at a time, as the default flags have it.
REAL:FILE:ROWS takes the lengths of a JSON-lines file's texts, ROWS to an optimizer step; unsloth gets them end to end.

Every side is a process of its own: nf4 with double quantisation, bf16, LoRA of --rank on all linear layers without
dropout, adapters in bf16, paged 32-bit AdamW, the same random token ids; 2 steps to warm up, then the median of
--steps, by the GPU's own clock and without a wait between them. The stacks of a mixture of experts get adapters of
the same rank (ours with --flags "--expert_lora_r RANK"); the stock libraries keep them in bf16. Padding is not counted.
The side ours+offload is ours with --offload_activations. Loss and gradient norm of the first step stand beside each
speed: they must agree. Writes benchmark.json and benchmark.png to --out.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALPHA, WARM_UP = 16, 2
VARIANTS = {"offload": ["--offload_activations"]}  # ours with other flags, as a side: ours+offload
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lengths_of(case: str, seed: int = 0) -> tuple[list[list[int]], int, str]:
    """A case as the lengths of each optimizer step's rows, the rows of a micro-batch, and what is recomputed."""
    if case.startswith("REAL:"):
        _, file, rows = case.split(":")
        lines = Path(file).read_text(encoding="utf-8").strip().split("\n")
        lengths = [min(528, max(16, len(json.loads(line)["text"]) // 4)) for line in lines]  # 4 characters a token
        count = int(rows)
        return [lengths[i : i + count] for i in range(0, len(lengths) - count + 1, count)], count, "none"
    shape, _, recompute = case.partition(":")
    rows, tokens = shape.split("x")
    accumulated, _, at_once = rows.rpartition("*")
    count = int(at_once) * int(accumulated or 1)
    return [[int(tokens)] * count], int(at_once), recompute or "none"


def token_rows(lengths: list[int], step: int) -> list[Any]:
    """Random token ids of one optimizer step, the same for every side."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return [torch.randint(5, 31999, (n,), generator=generator) for n in lengths]


def mark() -> Any:
    """A point in the GPU's work. Nobody waits for it, so that the next step is prepared meanwhile, as in a real run."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: list[Any]) -> list[float]:
    """From each mark to the next."""
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def measure_ours(model: str, case: str, steps: int, flags: list[str]) -> dict[str, Any]:
    """qlora.py's own Trainer over rows of these lengths, started as a user starts it."""
    sys.path.insert(0, str(ROOT))
    import datasets
    import torch
    from transformers import TrainerCallback

    import qlora

    class Clock(TrainerCallback):
        """When the GPU was done with every optimizer step."""

        def __init__(self) -> None:
            self.ends: list[Any] = []
            self.first_step = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(mark())
            if len(self.ends) == 1:
                torch.cuda.synchronize()
                self.first_step = time.perf_counter()
            if len(self.ends) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()

    windows, at_once, recompute = lengths_of(case)
    count, total = len(windows[0]), steps + WARM_UP
    words = ["--model_name_or_path", model, "--bf16", "--lora_dtype", "bfloat16", "--max_grad_norm", "0"]
    words += ["--per_device_train_batch_size", str(at_once), "--gradient_accumulation_steps", str(count // at_once)]
    words += ["--max_steps", str(total), "--save_strategy", "no", "--logging_steps", "1000", "--logging_first_step"]
    words += ["--train_sampling_strategy", "sequential", "--disable_tqdm", "True", "--output_dir", "/tmp/bench"]
    words += [] if case.startswith("REAL:") or "*" in case else ["--recompute_layers", recompute]
    config = qlora.parse_config([*words, *flags])
    qlora.set_up_logging()
    rows = [row for step in range(total) for row in token_rows(windows[step % len(windows)], step)]
    columns = {"input_ids": [row.tolist() for row in rows], "labels": [row.tolist() for row in rows]}
    extra = {"length": [len(row) for row in rows], "where": [""] * len(rows)}
    data = datasets.Dataset.from_dict({**columns, **extra})
    began = time.perf_counter()
    model_config = qlora.load_model_config(config, model)
    tokenizer = qlora.load_tokenizer(config, model_config, model)
    run = qlora.Run(config, model, model, model_config, tokenizer, qlora.ResumePoint(train=True))
    data = qlora.Data(data, None, qlora.Splits(data, None), {})
    trainer = qlora.prepare(run, data, {"effective batch": {"rows": count}}, None, qlora.GracefulStop())
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    first = trainer.state.log_history[0]
    return {
        "seconds": seconds_between(clock.ends[WARM_UP - 1 :]),
        "tokens": [sum(windows[step % len(windows)]) for step in range(WARM_UP, total)],
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "ready_s": clock.first_step - began,
        "plan": str(trainer.plan),
        "predicted_gib": trainer.plan.peak and round(trainer.plan.peak, 2),
    }


def load_peer(side: str, model: str, cases: list[str], rank: int) -> Any:
    """The model of another library, with adapters like ours."""
    import torch

    longest = max(max(map(max, lengths_of(case)[0])) for case in cases)
    recompute = lengths_of(cases[0])[2]
    if side == "unsloth":
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        from unsloth import FastLanguageModel

        base, _ = FastLanguageModel.from_pretrained(
            model, max_seq_length=max(8192, longest), dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        return FastLanguageModel.get_peft_model(
            base, r=rank, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=LINEAR,
            use_gradient_checkpointing=recompute == "all",
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if side == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=nf4
    )
    base.requires_grad_(False)
    if recompute == "all":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    stacks = {name.partition(".mlp.")[2] for name, weight in base.named_parameters() if weight.ndim == 3}
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=LINEAR, target_parameters=sorted(stacks) or None
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def padded(rows: list[Any]) -> dict[str, Any]:
    """Rows padded on the right, on the GPU."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100))
    batch = {"input_ids": ids, "labels": labels}
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return {name: tensor.pin_memory().cuda(non_blocking=True) for name, tensor in batch.items()}


def end_to_end(rows: list[Any]) -> dict[str, Any]:
    """Rows as one, the way that unsloth takes them without padding."""
    import torch

    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
    batch = {
        "input_ids": torch.cat(rows).unsqueeze(0),
        "labels": torch.cat(labels).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
        "packed_seq_lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
    }
    return {name: tensor.pin_memory().cuda(non_blocking=True) for name, tensor in batch.items()}


def measure_peer(side: str, trained: Any, case: str, steps: int) -> dict[str, Any]:
    """Steps of another library over the same rows: a plain loop, without a Trainer around it."""
    import bitsandbytes
    import torch

    windows, at_once, _ = lengths_of(case)
    collate = end_to_end if side == "unsloth" and case.startswith("REAL:") else padded
    trained.train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=2e-4)
    ends, first = [], dict[str, float]()
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        rows, total = token_rows(windows[step % len(windows)], step), 0.0
        for i in range(0, len(rows), at_once):
            with torch.autocast("cuda", torch.bfloat16):
                loss = trained(**collate(rows[i : i + at_once])).loss / (len(rows) / at_once)
            loss.backward()
            total += loss.detach()
        if not first:
            norms = torch._foreach_norm([parameter.grad.float() for parameter in parameters])
            first = {"loss": float(total), "grad_norm": float(torch.stack(norms).norm())}
        optimizer.step()
        optimizer.zero_grad()
        ends.append(mark())
    tokens = [sum(windows[step % len(windows)]) for step in range(WARM_UP, steps + WARM_UP)]
    return {"seconds": seconds_between(ends[WARM_UP - 1 :]), "tokens": tokens, **first}


def measure(side: str, cases: list[str], arguments: argparse.Namespace) -> None:
    """Cases with the same recomputation, in this process; a line of JSON for each."""
    import gc

    began, trained, model, steps = time.perf_counter(), None, arguments.model, arguments.steps
    flags = ["--lora_r", str(arguments.rank), *arguments.flags.split()]
    ours, _, variant = side.partition("+")
    if variant:
        flags = [*flags, *VARIANTS[variant]]
    if ours != "ours":
        trained = load_peer(side, model, cases, arguments.rank)
    ready = time.perf_counter() - began
    import torch

    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad] if trained else []
    fresh = [parameter.detach().clone().cpu() for parameter in parameters]
    for case in cases:
        with torch.no_grad():  # every case begins with the same adapters
            for parameter, value in zip(parameters, fresh, strict=True):
                parameter.copy_(value)
        torch.cuda.empty_cache()
        made = measure_ours(model, case, steps, flags) if ours == "ours" else measure_peer(side, trained, case, steps)
        seconds, tokens = made.pop("seconds"), made.pop("tokens")
        rates = [count / second for count, second in zip(tokens, seconds, strict=True)]
        peak = torch.cuda.max_memory_allocated() / 2**30
        speed = {"tokens_per_s": round(statistics.median(rates)), "step_s": round(statistics.median(seconds), 4)}
        result = {"side": side, "case": case, **speed, "peak_gib": round(peak, 2), "ready_s": ready, **made}
        print("RESULT", json.dumps(result), flush=True)
        gc.collect()


def in_a_process(side: str, arguments: argparse.Namespace, cases: list[str]) -> list[dict[str, Any]]:
    """Cases of one side, in a process of its own."""
    command = [sys.executable, __file__, arguments.model, "--one", side, "--cases", ",".join(cases)]
    command += ["--steps", str(arguments.steps), "--rank", str(arguments.rank), f"--flags={arguments.flags}"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = [dict(json.loads(line)) for line in lines]
    if len(found) < len(cases):
        reason = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no result"]
        (Path(arguments.out) / f"failed_{side}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        found += [{"side": side, "case": case, "failed": reason[0][:300]} for case in cases[len(found) :]]
    return found


def versions() -> dict[str, str]:
    """Of what was measured, and on what."""
    import torch

    names = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "triton")
    found = {"gpu": torch.cuda.get_device_name()}
    for name in names:
        if importlib.util.find_spec(name.replace("-", "_")):
            found[name] = importlib.metadata.version(name)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; the ratio is to unsloth, or to the best side that is not ours."""
    lines = ["| case | side | tokens/s | ratio | peak GiB | loss | gradient norm | ready s |", "|" + "---|" * 8]
    for case in dict.fromkeys(result["case"] for result in results):
        of_case = [result for result in results if result["case"] == case]
        others = {r["side"]: r["tokens_per_s"] for r in of_case if r["side"][:4] != "ours" and "failed" not in r}
        against = others.get("unsloth") or max(others.values(), default=0)
        for r in of_case:
            if "failed" in r:
                lines.append(f"| {case} | {r['side']} | failed: {r['failed']} | | | | | |")
                continue
            ratio = f"{r['tokens_per_s'] / against:.2f}" if against else ""
            lines.append(
                f"| {case} | {r['side']} | {r['tokens_per_s']} | {ratio} | {r['peak_gib']} | {r['loss']:.3f} "
                f"| {r['grad_norm']:.3f} | {r['ready_s']:.0f} |"
            )
    return "\n".join(lines)


def chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second, by case and side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases, sides = (list(dict.fromkeys(result[key] for result in results)) for key in ("case", "side"))
    figure, axes = pyplot.subplots(figsize=(2 + 2 * len(cases), 4), layout="constrained")
    for i, side in enumerate(sides):
        heights = [
            next((r.get("tokens_per_s", 0) for r in results if (r["case"], r["side"]) == (case, side)), 0)
            for case in cases
        ]
        axes.bar([x + i * 0.8 / len(sides) for x in range(len(cases))], heights, 0.8 / len(sides), label=side)
    axes.set_xticks([x + 0.4 - 0.4 / len(sides) for x in range(len(cases))], cases)
    axes.set(ylabel="tokens per second, padding not counted")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every side in every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sides", default="ours,stock,liger,unsloth")
    parser.add_argument("--cases", default="16*1x528,16x528:all,16x528:none")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--flags", default="", help="more flags for qlora.py")
    parser.add_argument("--out", default="benchmark")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    if arguments.one:
        measure(arguments.one, cases, arguments)
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for recompute in dict.fromkeys(lengths_of(case)[2] for case in cases):
        for side in arguments.sides.split(","):
            found = in_a_process(side, arguments, [case for case in cases if lengths_of(case)[2] == recompute])
            results += found
            for result in found:
                print(json.dumps(result), file=sys.stderr, flush=True)
    record = {"command": " ".join(sys.argv), "versions": versions(), "results": results}
    (out / "benchmark.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    chart(results, out / "benchmark.png")
    print(table(results))


if __name__ == "__main__":
    main()
