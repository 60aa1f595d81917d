#!/usr/bin/env python3
"""Several GPUs against one, on the same data: loss, speed and memory of each strategy.

    python scripts/benchmark_many.py --model MODEL --dataset FILE [--gpus 2] [--only ddp,fsdp2] [--steps 100] [-- FLAGS]

Each strategy is one run of qlora.py with the same effective batch, started by torchrun if it needs several processes.
Prints a table and writes benchmark_many.json to --out: tokens per second and peak memory from metrics.json, the ratio
to one GPU's speed, and the largest difference of a step's loss from one GPU's. The speed includes the first steps,
which compile kernels: take enough --steps. --full runs the strategies of a full fine-tune; --cap limits torch's
allocator on each GPU, in GiB. Flags after -- are qlora.py's.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import proof
import torch

import qlora

FSDP_OFFLOAD = ["--fsdp", "--fsdp_config", '{"cpu_offload": true}']
ADAPTERS = {"one GPU": [], "ddp": [], "fsdp2": ["--fsdp"], "fsdp2 offload": FSDP_OFFLOAD, "device_map": []}
ZERO = {f"zero{n}": ["--deepspeed", str(proof.ROOT / f"examples/deepspeed_zero{n}.json")] for n in (2, 3)}
ONE_PROCESS, CHILD = ("one GPU", "device_map"), "--child"
FULL_FLAGS = ["--full_finetune", "--bits", "16", "--optim", "adamw_torch", "--learning_rate", "1e-5"]
FULL = {name: [*FULL_FLAGS, *own] for name, own in {"one GPU": [], "ddp": [], **ZERO, "fsdp2": ["--fsdp"]}.items()}


def train(cap: float, flags: list[str]) -> int:
    """qlora.py in this process, with torch's allocator limited to `cap` GiB on each GPU (0: unlimited)."""
    own = os.environ.get("LOCAL_RANK")
    for gpu in (range(torch.cuda.device_count()) if own is None else [int(own)]) if cap else ():
        fraction = cap * qlora.GIB / torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(fraction, gpu)
    return qlora.main(flags)


def run(name: str, strategy: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One run's losses, speed and memory, or why it failed."""
    output, processes = args.out / name.replace(" ", "_"), 1 if name in ONE_PROCESS else args.gpus
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [
        "--model_name_or_path", args.model, "--dataset", args.dataset, "--output_dir", str(output),
        "--overwrite_output_dir", "--max_steps", str(args.steps), "--logging_steps", "1", "--save_strategy", "no",
        "--gradient_accumulation_steps", str(args.batch // processes), "--disable_tqdm", "True", *strategy, *args.flags,
    ]  # fmt: skip
    words = [*(torchrun if processes > 1 else []), __file__, CHILD, str(args.cap), *flags]
    try:
        proof.start(words, output.with_suffix(".log"), "0" if name == "one GPU" else None)
    except RuntimeError as error:
        return {"strategy": name, "failed": str(error)}
    history = qlora.read_json(output / "trainer_state.json")["log_history"]
    metrics = qlora.read_json(output / "metrics.json")
    return {
        "strategy": name,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in history if "loss" in entry],
        "tokens_per_second": metrics["train_tokens_per_second"],
        "peak_gib": metrics.get("train_peak_memory_gib", 0.0),  # of the fullest GPU of rank 0
        "command": " ".join(["qlora.py", *flags]),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", help="strategies, separated by commas; without --cap, one GPU is always measured")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step, over all GPUs")
    parser.add_argument("--full", action="store_true", help="fine-tune all weights")
    parser.add_argument("--cap", type=float, default=0.0, help="GiB of each GPU that torch may allocate")
    parser.add_argument("--out", type=Path, default=Path("/tmp/benchmark_many"))
    parser.add_argument("flags", nargs="*", help="flags of qlora.py, after --")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    strategies = FULL if args.full else ADAPTERS
    names = args.only.split(",") if args.only else [*strategies][1:]
    if unknown := set(names) - set(strategies):
        parser.error(f"--only: no strategy {', '.join(unknown)}; there are {', '.join(strategies)}")
    if args.batch % args.gpus:
        parser.error(f"--batch {args.batch}: {args.gpus} GPUs can't share it evenly")
    results: list[dict[str, Any]] = []
    print("| strategy | tokens/s | against one GPU | peak GiB | largest loss difference |\n" + "|---" * 5 + "|")
    for name in [*([] if args.cap else ["one GPU"]), *names]:
        results.append(result := run(name, strategies[name], args))
        if "failed" in result:
            print(f"| {name} | failed: {result['failed']} | | | |", flush=True)
            continue
        one = next((r for r in results if r["strategy"] == "one GPU" and "losses" in r), result)
        result["ratio"] = round(result["tokens_per_second"] / one["tokens_per_second"], 3)
        result["loss_difference"] = max(abs(a - b) for a, b in zip(result["losses"], one["losses"], strict=True))
        speed, peak, ratio = result["tokens_per_second"], result["peak_gib"], result["ratio"]
        print(f"| {name} | {speed:.0f} | {ratio} | {peak:.1f} | {result['loss_difference']:.5f} |", flush=True)
    (args.out / "benchmark_many.json").write_text(json.dumps(results, indent=1))
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(train(float(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == [CHILD] else main())
