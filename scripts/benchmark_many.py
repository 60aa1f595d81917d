#!/usr/bin/env python3
"""Several GPUs against one, on the same data: loss, speed and memory of each strategy.

    python scripts/benchmark_many.py --model MODEL --dataset FILE [--gpus 2] [--only ddp,fsdp2] [--steps 100] [-- FLAGS]

Each strategy is one run of qlora.py with the same effective batch, started by torchrun if it needs several processes.
Speed and memory are those of metrics.json. The speed includes the first steps, which compile kernels: take enough
--steps. FLAGS are qlora.py's; --out gets benchmark_many.json and its table.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import proof

FSDP_OFFLOAD = ["--fsdp", "--fsdp_config", '{"cpu_offload": true}']
ADAPTERS = {"one GPU": [], "ddp": [], "fsdp2": ["--fsdp"], "fsdp2 offload": FSDP_OFFLOAD, "device_map": []}
ZERO = {f"zero{n}": ["--deepspeed", str(proof.ROOT / f"examples/deepspeed_zero{n}.json")] for n in (2, 3)}
FULL_FLAGS = ["--full_finetune", "--bits", "16", "--optim", "adamw_torch", "--learning_rate", "1e-5"]
FULL = {name: [*FULL_FLAGS, *own] for name, own in {"one GPU": [], "ddp": [], **ZERO, "fsdp2": ["--fsdp"]}.items()}


def run(name: str, strategy: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One run's losses and metrics, or why it failed."""
    processes = 1 if name in ("one GPU", "device_map") else args.gpus
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [
        "--model_name_or_path", args.model, "--dataset", args.dataset, "--overwrite_output_dir", "--max_steps",
        str(args.steps), "--logging_steps", "1", "--save_strategy", "no", "--gradient_accumulation_steps",
        str(args.batch // processes), "--disable_tqdm", "True", *strategy, *args.flags,
    ]  # fmt: skip
    output, gpus = args.out / name.replace(" ", "_"), "0" if name == "one GPU" else None
    return {"name": name, "flags": flags} | proof.measure(torchrun if processes > 1 else [], flags, output, gpus)


def table(runs: list[dict[str, Any]]) -> str:
    """A line for each strategy, compared with the first that did not fail, one GPU unless the model is too large."""
    one: dict[str, Any] = next((run for run in runs if "failed" not in run), {"name": "one GPU"})
    rows = [["strategy", "tokens/s", f"against {one['name']}", "peak GiB", "largest loss difference"]]
    for run in runs:
        if "failed" in run:
            rows.append([run["name"], f"failed: {run['failed']}", "", "", ""])
            continue
        speed, first = (each["metrics"]["train_tokens_per_second"] for each in (run, one))
        peak = run["metrics"].get("train_peak_memory_gib", 0.0)  # of the fullest GPU of rank 0
        difference = max(abs(a - b) for a, b in zip(run["loss"], one["loss"], strict=True))
        rows.append([run["name"], f"{speed:.0f}", f"{speed / first:.3f}", f"{peak:.1f}", f"{difference:.5f}"])
    return proof.markdown(*rows)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", help="strategies, separated by commas; one GPU is always measured")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step, over all GPUs")
    parser.add_argument("--full", action="store_true", help="fine-tune all weights")
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
    runs: list[dict[str, Any]] = []
    for name in ["one GPU", *names]:
        runs.append(run(name, strategies[name], args))
        proof.publish(args.out, "benchmark_many", {"runs": runs}, table(runs))
    return int(any("failed" in run for run in runs))


if __name__ == "__main__":
    sys.exit(main())
