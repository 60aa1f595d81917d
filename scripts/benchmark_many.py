#!/usr/bin/env python3
"""Several GPUs against one, on the same data: loss, speed and memory of each strategy.

    python scripts/benchmark_many.py --model MODEL --dataset FILE [--gpus 2] [--only ddp,fsdp2] [--steps 8] [-- FLAGS]

Each strategy is one run of qlora.py (started by torchrun, or plainly for one process) with one effective batch. A line
of a table for each, and benchmark_many.json in --out: the largest difference of a step's loss from one GPU's, tokens
per second by the median step after the first three, their ratio to one GPU's, and the peak memory of each GPU of rank
0. --full runs the strategies of a full fine-tune; --cap limits torch's allocator on each GPU to so many GiB.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# flags of each; what stands first is how many processes: 0 for as many as GPUs
ADAPTERS: dict[str, tuple[int, list[str]]] = {
    "one GPU": (1, []),
    "ddp": (0, []),
    "fsdp2": (0, ["--fsdp"]),
    "fsdp2 offload": (0, ["--fsdp", "--fsdp_config", '{"cpu_offload": true}']),
    "device_map": (1, []),
}
FULL = {
    "one GPU": (1, []),
    "ddp": (0, []),
    "zero2": (0, ["--deepspeed", str(ROOT / "examples/deepspeed_zero2.json")]),
    "zero3": (0, ["--deepspeed", str(ROOT / "examples/deepspeed_zero3.json")]),
    "fsdp2": (0, ["--fsdp"]),
}
WARM_UP, CHILD = 3, "--child"


def train(cap: str, flags: list[str]) -> int:
    """qlora.py itself in this process; the first of the processes leaves when each step ended and its GPUs' peak."""
    import torch
    from benchmark import mark, seconds_between
    from transformers import TrainerCallback

    sys.path.insert(0, str(ROOT))
    import qlora

    gpus = list(range(torch.cuda.device_count()))
    if gpus and "LOCAL_RANK" in os.environ:
        gpus = [int(os.environ["LOCAL_RANK"])]
    for gpu in gpus if float(cap) else []:
        share = float(cap) * 2**30 / torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(share, gpu)

    class Clock(TrainerCallback):
        """When each step ended: by the GPU's clock, without a wait between steps."""

        def __init__(self) -> None:
            self.ends: list[Any] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(mark() if gpus else time.perf_counter())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends = self.ends
            seconds = seconds_between(ends) if gpus else [b - a for a, b in itertools.pairwise(ends)]
            peaks = [torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in gpus]
            if state.is_world_process_zero:
                content = {"seconds": seconds, "peak_gib": [round(peak, 2) for peak in peaks]}
                Path(args.output_dir, "clock.json").write_text(json.dumps(content))

    build = qlora.build_trainer

    def timed(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Clock())
        return trainer

    qlora.build_trainer = timed
    return qlora.main(flags)


def run(name: str, processes: int, own: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; what it left, or why it failed."""
    output = arguments.out / name.replace(" ", "_")
    count = processes or arguments.gpus
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if not processes else []
    env = dict(os.environ)
    if name == "one GPU":
        env["CUDA_VISIBLE_DEVICES"] = "0"
    command = [
        sys.executable, *launch, __file__, CHILD, str(arguments.cap),
        "--model_name_or_path", arguments.model, "--dataset", arguments.dataset,
        "--output_dir", str(output), "--overwrite_output_dir", "--max_steps", str(arguments.steps),
        "--gradient_accumulation_steps", str(arguments.batch // (1 if processes else count)), "--logging_steps", "1",
        "--save_strategy", "no", "--disable_tqdm", "True", *own, *arguments.flags,
    ]  # fmt: skip
    if arguments.full:
        command += ["--full_finetune", "--bits", "16", "--optim", "adamw_torch", "--learning_rate", "1e-5"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        return {"strategy": name, "failed": f"took longer than {arguments.timeout} s"}
    (arguments.out / f"{output.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if re.search(r"^(\[rank\d+\]: )?\w*[eE]rror: ", line)]
        return {"strategy": name, "failed": lines[0] if lines else done.stderr[-300:]}
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    metrics = json.loads((output / "metrics.json").read_text())
    clock = json.loads((output / "clock.json").read_text())
    seconds = statistics.median(clock["seconds"][WARM_UP - 1 :])
    return {
        "strategy": name,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in history if "loss" in entry],
        "tokens_per_second": round(metrics["train_tokens"] / arguments.steps / seconds),
        "peak_gib": clock["peak_gib"],
        "step_seconds": clock["seconds"],
        "seconds": round(time.perf_counter() - began),
        "command": " ".join(["qlora.py", *command[command.index("--model_name_or_path") :]]),
    }


def main() -> int:
    """Every strategy, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", help="strategies, separated by commas; one GPU is always the first unless capped")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step, on all GPUs together")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--cap", type=float, default=0.0)
    parser.add_argument("--timeout", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("/tmp/benchmark_many"))
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    strategies = FULL if arguments.full else ADAPTERS
    wanted = [name for name in strategies if not arguments.only or name in ("one GPU", *arguments.only.split(","))]
    results: list[dict[str, Any]] = []
    print(
        "| strategy | tokens/s | against one GPU | peak GiB a GPU, of rank 0 | largest loss difference |\n"
        + "|---" * 5
        + "|"
    )
    for name in wanted:
        if arguments.cap and name == "one GPU":
            continue
        result = run(name, *strategies[name], arguments)
        results.append(result)
        if "failed" in result:
            print(f"| {name} | failed: {result['failed']} | | | |", flush=True)
            continue
        one = next((r for r in results if r["strategy"] == "one GPU" and "losses" in r), result)
        differences = [abs(a - b) for a, b in zip(result["losses"], one["losses"], strict=True)]
        result |= {
            "ratio": round(result["tokens_per_second"] / one["tokens_per_second"], 3),
            "loss_difference": round(max(differences), 5),
        }
        cells = (name, result["tokens_per_second"], result["ratio"], result["peak_gib"], result["loss_difference"])
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    (arguments.out / "benchmark_many.json").write_text(json.dumps(results, indent=1))
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(train(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == [CHILD] else main())
