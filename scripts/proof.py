#!/usr/bin/env python3
"""Check what QLoRA promises on real weights, with runs of qlora.py itself.

    python scripts/proof.py precision MODEL ROWS      held-out loss by precision of the frozen weights
    python scripts/proof.py rates MODEL ROWS          the same by learning rate, also with the adapters on 16 bit
    python scripts/proof.py fast_slow MODEL ROWS      the fast path, the libraries' own and a plain loop, step by step
    python scripts/proof.py recipe MODEL ROWS         held-out loss of --recipe modern and of the default flags
    python scripts/proof.py chart                     redraw tables and charts from the results

MODEL is a folder, a .gguf file or a folder with one; ROWS is a JSON-lines file of rows {"text": ...}. Flags of
qlora.py may follow after --. Every run is a process of its own, --jobs at a time on each GPU. Raw numbers go to --out
as JSON, with a table and a chart; models, adapters and logs go to --work.
"""

import argparse
import gc
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "examples"))
import loop

import qlora

ROOT = Path(qlora.__file__).resolve().parent
GPU = torch.cuda.is_available()
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(max(1, torch.cuda.device_count())))
BF16 = ["--bf16"] if GPU else []  # float32 is faster on a CPU
BATCH = 16  # rows of an optimizer step

# Guanaco's rows and adapters. All held-out rows are one evaluation batch, so their loss is the mean over their tokens.
SHARED = ["--source_max_len", "16", "--target_max_len", "512", "--gradient_accumulation_steps", str(BATCH),
          "--lora_r", "64", "--do_eval", "--eval_on_start", "True", "--save_strategy", "no",
          "--logging_steps", "1", "--disable_tqdm", "True", "--overwrite_output_dir", "True"]  # fmt: skip
LORA, FULL = ["--learning_rate", "5e-4"], ["--learning_rate", "2e-5", "--full_finetune"]
NF4, FP4 = ["--bits", "4", "--quant_type", "nf4"], ["--bits", "4", "--quant_type", "fp4"]
CALIBRATED = [*NF4, "--calibration_rows"]
SETTINGS = {
    "LoRA, 16 bit": [*LORA, *BF16, "--bits", "16"],
    "LoRA, int8": [*LORA, *BF16, "--bits", "8"],
    "LoRA, nf4": [*LORA, *BF16, *NF4, "--double_quant", "False"],
    "LoRA, nf4 + double quant": [*LORA, *BF16, *NF4],
    "LoRA, nf4 calibrated": [*LORA, *BF16, *CALIBRATED, "128"],
    # the better base alone: adapters start at zero
    "LoRA, nf4 calibrated, start at zero": [*LORA, *BF16, *CALIBRATED, "128", "--init_lora_weights", "True"],
    "LoRA, fp4": [*LORA, *BF16, *FP4, "--double_quant", "False"],
    "full, float32 weights": [*FULL, "--bits", "32"],
    # as the original does it; a step of 2e-5 is below the rounding of a bf16 weight of 0.02
    "full, bf16 weights": [*FULL, *BF16, "--bits", "16"],
}
ROWS = {f"LoRA, nf4 calibrated, {n} rows": [*LORA, *BF16, *CALIBRATED, str(n)] for n in (64, 512)}
CHOICES = SETTINGS | ROWS  # of --settings; SETTINGS are the default
REFERENCE = "LoRA, 16 bit"
BY_RATE = [REFERENCE, "LoRA, nf4 + double quant", "LoRA, nf4 calibrated", "LoRA, nf4 calibrated, start at zero"]
DEFAULTS = "the original's defaults"
RECIPES = {DEFAULTS: BF16, "--recipe modern": [*BF16, "--recipe", "modern"]}
STOCK = ["--fast_path", "False", "--recompute_layers", "none", "--auto_batch", "False"]


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------
class Job(NamedTuple):
    """One run of qlora.py; the seed is that of adapters and row order."""

    name: str
    flags: list[str]
    seed: int = 0
    rate: float | None = None  # the learning rate, where the name does not imply it


def read_json(path: Path) -> Any:
    """A JSON file, or an empty object if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def without_folders(words: Iterable[str]) -> list[str]:
    """A command without this machine's folders."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def start(script: Path, words: list[str], log: Path, gpu: str = GPUS) -> str:
    """Run a Python script with its output in a log file, which is returned; raise with its last lines if it fails."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if GPU else {})
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(script), *words]
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    text = log.read_text(encoding="utf-8")
    if code:
        raise RuntimeError(f"exit status {code}: {' '.join(text.splitlines()[-3:])}")
    return text


def run_job(work: Path, gpus: Queue[str], published: Any, job: Job) -> dict[str, Any]:
    """What a run measured; if it fails the reason, so that the other runs' numbers are kept."""
    name = f"{job.name}-{job.seed}{'' if job.rate is None else f'-{job.rate}'}"
    out, gpu = work / re.sub(r"\W+", "_", name), gpus.get()
    flags = [*job.flags, "--seed", str(job.seed), "--data_seed", str(job.seed)]
    flags += [] if job.rate is None else ["--learning_rate", str(job.rate)]
    result = {"name": job.name, "seed": job.seed, "rate": job.rate, "flags": without_folders(flags)}
    done = read_json(record := out.with_suffix(".json"))
    if done.get("flags") == result["flags"]:  # by the same command, which was stopped
        gpus.put(gpu)
        return dict(done)
    try:
        start(ROOT / "qlora.py", [*flags, "--output_dir", str(out)], out.with_suffix(".log"), gpu)
    except RuntimeError as error:
        return result | {"failed": str(error)}
    finally:
        gpus.put(gpu)
    history = read_json(out / "trainer_state.json").get("log_history", [])
    result["loss"] = [round(entry["loss"], 6) for entry in history if "loss" in entry]  # of every step
    result["eval"] = [{key: e[key] for key in ("step", "eval_loss")} for e in history if "eval_loss" in e]
    losses = ", ".join(f"{entry['eval_loss']:.4f}" for entry in result["eval"])
    print(f"{job.name}, seed {job.seed}: held-out loss {losses}", flush=True)
    if published:
        result["published"] = round(published.loss(out), 6)
    result |= {"metrics": read_json(out / "metrics.json"), "data": read_json(out / "run.json").get("data", {})}
    record.write_text(json.dumps(result), encoding="utf-8")
    return result


def run_jobs(arguments: argparse.Namespace, jobs: Iterable[Job], published: Any = None) -> list[dict[str, Any]]:
    """Every job's measurements, --jobs at a time on each GPU; with `published`, also of its adapter on that base."""
    gpus, names = Queue[str](), GPUS.split(",") * arguments.jobs
    for gpu in names:
        gpus.put(gpu)
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(partial(run_job, Path(arguments.work), gpus, published), jobs))


def prepare(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The model as a folder (a .gguf file is dequantised here, once) and the flags that all runs share."""
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (arguments.jobs * len(GPUS.split(",")))))
    )
    cache = ["--cache_dir", str(work / "cache")]
    base = qlora.model_folder(qlora.parse_config(["--model_name_or_path", arguments.model, *cache]))
    flags = ["--model_name_or_path", base, *cache, *SHARED, "--per_device_eval_batch_size", str(arguments.held_out)]
    return base, flags


def free_memory() -> None:
    """Release what a run has left on the GPU."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def write(arguments: argparse.Namespace, name: str, content: dict[str, Any], show: bool = True) -> None:
    """Write results with the command, commit, device and versions behind them, then their table and chart."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    versions = qlora.versions()
    about = {
        "command": " ".join(["python", *without_folders(sys.argv)]), "commit": versions["qlora.py"],
        "device": qlora.device_name(), "versions": versions,
    }  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(about | content, indent=1) + "\n", encoding="utf-8")
    if show:
        present(out, name)


# ------------------------------------------------------------------------------------
# precision: held-out loss by the precision of the frozen weights
# ------------------------------------------------------------------------------------
def precision(arguments: argparse.Namespace) -> None:
    """Every setting with every seed; with one seed all settings see the same rows in the same order."""
    _, flags = prepare(arguments)
    flags += ["--dataset", arguments.rows, "--eval_dataset_size", str(arguments.held_out), "--eval_strategy", "epoch",
              "--num_train_epochs", str(arguments.epochs), "--lr_scheduler_type", "constant"]  # fmt: skip
    names = arguments.settings.split(";") if arguments.settings else list(reversed(SETTINGS))  # the slowest first
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    jobs = [Job(name, [*flags, *CHOICES[name], *arguments.flags], seed) for name in names for seed in seeds]
    write(arguments, "precision", {"runs": run_jobs(arguments, jobs)})


def recipe(arguments: argparse.Namespace) -> None:
    """The recipe and the default flags with every seed, on the same rows in the same order."""
    _, flags = prepare(arguments)
    steps = str(arguments.steps)
    flags += ["--dataset", arguments.rows, "--eval_dataset_size", str(arguments.held_out), "--eval_strategy", "steps",
              "--eval_steps", steps, "--max_steps", steps]  # fmt: skip
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    jobs = [Job(name, [*flags, *own, *arguments.flags], seed) for seed in seeds for name, own in RECIPES.items()]
    write(arguments, "recipe", {"runs": run_jobs(arguments, jobs)})


# ------------------------------------------------------------------------------------
# rates: the same by learning rate, and what the saved adapters do on the published weights
# ------------------------------------------------------------------------------------
class Published:
    """The base in 16 bit and the held-out rows, to try saved adapters on, with transformers and peft alone."""

    def __init__(self, base: str, rows: Path) -> None:
        dtype = torch.bfloat16 if GPU else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(loop.DEVICE)
        tokenizer, lines = AutoTokenizer.from_pretrained(base), rows.read_text(encoding="utf-8").splitlines()
        self.rows = [loop.encode(json.loads(line), tokenizer, 513) for line in lines]  # one of them is BOS
        self.lock = Lock()  # runs end at any time

    @torch.no_grad()
    def loss(self, adapter: Path) -> float:
        """Held-out loss with a saved adapter."""
        total = count = 0.0
        with self.lock:
            adapted = PeftModel.from_pretrained(self.model, adapter).eval()
            for i in range(0, len(self.rows), 10):
                inputs = loop.collate(self.rows[i : i + 10])
                labels = inputs.pop("labels")[:, 1:]
                logits = adapted(**inputs).logits[:, :-1].float().transpose(1, 2)
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += float((labels != loop.IGNORE).sum())
            self.model = adapted.unload()
        return total / count


def rates(arguments: argparse.Namespace) -> None:
    """Every setting at every learning rate with every seed, held-out rows apart once and for all."""
    base, flags = prepare(arguments)
    folder = split_rows(arguments)
    flags += ["--dataset", str(folder), "--eval_strategy", "epoch", "--num_train_epochs", str(arguments.epochs),
              "--lr_scheduler_type", "constant", *arguments.flags]  # fmt: skip
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    names = arguments.settings.split(";") if arguments.settings else BY_RATE
    jobs = [
        Job(name, [*flags, *CHOICES[name]], seed, float(rate))
        for rate in arguments.rates.split(",") for name in names for seed in seeds
    ]  # fmt: skip
    # first the runs that calibrate, one for each seed; the other runs then find the bases in the cache
    calibrates = [job for job in jobs if "calibrated" in job.name and job.rate == jobs[0].rate]
    first = [job for job in calibrates if "zero" not in job.name or len(names) == 1]
    rest = [job for job in jobs if "calibrated" not in job.name]
    jobs = [*first, *rest, *(job for job in jobs if job not in (*first, *rest))]
    runs = run_jobs(arguments, jobs, Published(base, folder / "eval.jsonl"))
    write(arguments, "rates", {"runs": [{key: run[key] for key in run if key != "loss"} for run in runs]})


def by_rate(content: dict[str, Any], key: Callable[[dict[str, Any]], float]) -> dict[str, dict[float, list[float]]]:
    """A number of every run, by setting and rate."""
    names = {run["name"] for run in content["runs"]}
    found: dict[str, dict[float, list[float]]] = {name: {} for name in (*BY_RATE, *ROWS) if name in names}
    for run in sorted((run for run in content["runs"] if "failed" not in run), key=lambda run: run["rate"]):
        found[run["name"]].setdefault(run["rate"], []).append(key(run))
    return found


WHERE: dict[str, Callable[[dict[str, Any]], float]] = {
    "the base it was trained on": lambda run: run["eval"][-1]["eval_loss"],
    "the published base, 16 bit": lambda run: run["published"],
}


def rates_table(content: dict[str, Any]) -> str:
    """Held-out loss by setting and rate, for each base, and the best rate's distance to 16 bit."""
    lines = []
    for where, key in WHERE.items():
        losses = by_rate(content, key)
        columns = sorted({rate for own in losses.values() for rate in own})
        head = " | ".join(f"{rate:g}" for rate in columns)
        lines.append(f"| held-out loss on {where} | before | {head} | best, minus 16 bit |")
        lines += ["|" + "---|" * (len(columns) + 3)]
        best = {name: min(statistics.mean(values) for values in own.values()) for name, own in losses.items() if own}
        lowest = best.get(REFERENCE, math.nan)
        for name, own in losses.items():
            first = [r["eval"][0]["eval_loss"] for r in content["runs"] if r["name"] == name and "eval" in r]
            before = f"{statistics.mean(first):.4f}" if key is WHERE["the base it was trained on"] else ""
            cells = " | ".join(spread(own[rate]) if rate in own else "" for rate in columns)
            lines.append(f"| {name} | {before} | {cells} | {best.get(name, math.nan) - lowest:+.4f} |")
        lines.append("")
    lines += [f"{r['name']}, seed {r['seed']}, {r['rate']:g}: {r['failed']}" for r in content["runs"] if "failed" in r]
    return "\n".join(lines).strip()


def rates_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Held-out loss over the learning rate, on both bases."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axes, (where, key) in zip(panels, WHERE.items(), strict=True):
        for name, own in ((name, own) for name, own in by_rate(content, key).items() if len(own) > 1):
            middle = [statistics.mean(values) for values in own.values()]
            axes.plot(list(own), middle, marker="o", label=name)
        axes.set(xscale="log", xlabel="learning rate", title=f"on {where}")
        ticks = sorted({run["rate"] for run in content["runs"]})
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.set_xticks([], minor=True)
    panels[0].set(ylabel="held-out loss (nats per token), mean of seeds")
    panels[0].legend(fontsize=8)
    return figure


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def precision_table(
    content: dict[str, Any], settings: Iterable[str] = CHOICES, reference: str = REFERENCE, short: str = "16-bit LoRA"
) -> str:
    """One line for each setting. Differences are taken seed by seed: rows and initial adapters are then the same."""
    lines = [
        f"| trained | held-out loss before | after: mean ± deviation over seeds | minus {short}, seed by seed "
        "| lowest in a run | tokens/s | peak GiB |",
        "|" + "---|" * 7,
    ]
    runs = [run for run in content["runs"] if "failed" not in run]
    last = {(run["name"], run["seed"]): run["eval"][-1]["eval_loss"] for run in runs}
    for name in settings:
        own = [run for run in runs if run["name"] == name]
        if not own:
            continue
        minus = [last[name, r["seed"]] - last[reference, r["seed"]] for r in own if (reference, r["seed"]) in last]
        lowest = statistics.mean(min(entry["eval_loss"] for entry in run["eval"]) for run in own)
        speed = statistics.median(run["metrics"]["train_tokens_per_second"] for run in own)
        peak = max(run["metrics"].get("train_peak_memory_gib", 0.0) for run in own)
        lines.append(
            f"| {name} | {own[0]['eval'][0]['eval_loss']:.4f} | {spread([last[name, r['seed']] for r in own])} "
            f"| {spread(minus) if minus and name != reference else ''} | {lowest:.4f} | {speed:.0f} | {peak:.1f} |"
        )
    lines += [f"\n{run['name']}, seed {run['seed']}: {run['failed']}" for run in content["runs"] if "failed" in run]
    return "\n".join(lines)


def precision_chart(content: dict[str, Any], pyplot: Any, settings: Iterable[str] = CHOICES) -> Any:
    """Held-out loss over steps, and the final loss of each seed."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    runs = [run for run in content["runs"] if "failed" not in run]
    names = [name for name in settings if any(run["name"] == name for run in runs)]
    for place, name in enumerate(names):
        own = [run["eval"] for run in runs if run["name"] == name]
        means = [statistics.mean(entry["eval_loss"] for entry in entries) for entries in zip(*own, strict=True)]
        left.plot([entry["step"] for entry in own[0]], means, marker="o", label=name, color=f"C{place}")
        final = [run[-1]["eval_loss"] for run in own]
        right.plot(final, [place] * len(final), "o", color=f"C{place}", alpha=0.6)
        right.plot([statistics.mean(final)], [place], "|", color=f"C{place}", markersize=22)
    left.set(xlabel="optimizer step", ylabel="held-out loss (nats per token), mean of seeds")
    left.legend(fontsize=8)
    right.set(xlabel="held-out loss after training: each seed, and their mean", yticks=range(len(names)))
    right.set_yticklabels(names)
    right.invert_yaxis()
    return figure


# ------------------------------------------------------------------------------------
# fast_slow: the fast path, the libraries' own functions and examples/loop.py, step by step
# ------------------------------------------------------------------------------------
PAIRS = (
    ("fast", "stock"), ("fast", "plain loop"), ("stock", "plain loop"), ("stock, half the rows at once", "stock"),
    ("fast, again", "fast"),
)  # fmt: skip


def split_rows(arguments: argparse.Namespace) -> Path:
    """A folder with train.jsonl and eval.jsonl, shuffled once: every run then takes the rows in the same order."""
    lines = Path(arguments.rows).read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    folder = Path(arguments.work, "rows")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(lines[: arguments.held_out]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[arguments.held_out :]), encoding="utf-8")
    return folder


def plain_losses(base: str, folder: Path, steps: int) -> list[float]:
    """The losses of examples/loop.py, which shares no code with qlora.py, on the same rows."""
    words = ["--steps", str(steps), "--batch_size", str(BATCH), "--accumulation_steps", "1", "--no-shuffle",
             "--max_length", "513"]  # fmt: skip
    output = folder.with_name("plain-loop")
    text = start(ROOT / "examples/loop.py", [base, str(folder / "train.jsonl"), str(output), *words],
                 output.with_suffix(".log"))  # fmt: skip
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", text, flags=re.M)]


def fast_slow(arguments: argparse.Namespace) -> None:
    """Runs that should agree and, for comparison, runs that differ only in the order of sums or in the seed."""
    base, flags = prepare(arguments)
    folder, steps = split_rows(arguments), str(arguments.steps)
    flags += [*BF16, *NF4, "--dataset", str(folder), "--eval_strategy", "steps", "--eval_steps", steps,
              "--max_steps", steps, "--learning_rate", "2e-4", "--train_sampling_strategy", "sequential",
              *arguments.flags]  # fmt: skip
    half = ["--per_device_train_batch_size", str(BATCH // 2), "--gradient_accumulation_steps", "2"]
    whole = ["--per_device_train_batch_size", str(BATCH), "--gradient_accumulation_steps", "1"]
    jobs = [
        Job("stock", [*flags, *STOCK, *whole]),
        Job("stock, half the rows at once", [*flags, *STOCK, *half]),
        Job("stock", [*flags, *STOCK, *whole], seed=1),
        Job("fast", flags),
        Job("fast, again", flags),
    ]
    plain = plain_losses(base, folder, arguments.steps)
    write(arguments, "fast_slow", {"runs": run_jobs(arguments, jobs), "plain": plain})


def curves(content: dict[str, Any]) -> dict[str, list[float]]:
    """The loss of every step, of the runs with seed 0."""
    runs = {run["name"]: run["loss"] for run in content["runs"] if run["seed"] == 0 and "failed" not in run}
    return runs | {"plain loop": content["plain"]}


def differences(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Step by step, for each of PAIRS that was measured."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(losses)]
    return {f"{a} − {b}": [x - y for x, y in zip(losses[a], losses[b], strict=True)] for a, b in pairs}


def fast_slow_table(content: dict[str, Any]) -> str:
    """The differences of the losses of a step, and held-out loss and speed of each run."""
    lines = [
        "| | difference of the loss of a step: mean size | largest | mean | last 50 steps, mean size |",
        "|" + "---|" * 5,
    ]
    for name, values in differences(curves(content)).items():
        sizes = [abs(value) for value in values]
        lines.append(
            f"| {name} | {statistics.mean(sizes):.5f} | {max(sizes):.5f} | {statistics.mean(values):+.5f} "
            f"| {statistics.mean(sizes[-50:]):.5f} |"
        )
    lines += ["", "| | held-out loss before | after | tokens/s |", "|---|---|---|---|"]
    for run in (run for run in content["runs"] if "failed" not in run):
        before, after = (f"{run['eval'][i]['eval_loss']:.4f}" for i in (0, -1))
        speed = run["metrics"]["train_tokens_per_second"]
        lines.append(f"| {run['name']}, seed {run['seed']} | {before} | {after} | {speed:.0f} |")
    lines += [f"\n{run['name']}, seed {run['seed']}: {run['failed']}" for run in content["runs"] if "failed" in run]
    return "\n".join(lines)


def fast_slow_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """The loss curves, and their differences on a logarithmic scale."""
    losses = curves(content)
    figure, (top, low) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for name, style in (("plain loop", "C2-"), ("stock", "C1-"), ("fast", "C0--")):
        top.plot(range(1, len(losses[name]) + 1), losses[name], style, label=name, linewidth=0.9)
    for place, (name, values) in enumerate(differences(losses).items()):
        sizes = [max(abs(value), 1e-6) for value in values]
        low.semilogy(range(1, len(sizes) + 1), sizes, color=f"C{place}", label=name, linewidth=0.7)
    top.set(ylabel="training loss (nats per token)")
    low.set(xlabel="optimizer step", ylabel="size of the difference")
    top.legend()
    low.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------
# memory: what scripts/memory.py measured
# ------------------------------------------------------------------------------------
def memory_table(content: dict[str, Any]) -> str:
    """One line for each shape and memory limit."""
    lines = [
        "| shape | limit, GiB | plan, GiB | measured peak, GiB | optimizer's pages, GiB | loss, first and last step "
        "| gradient norm |",
        "|" + "---|" * 7,
    ]
    for run in content["results"]:
        shape = f"| {run['shape']} | {run['cap'] or ''} | {run['predicted_gib']:.2f} "
        if "failed" in run:
            lines.append(f"{shape}| failed: {run['failed']} | {run['pages_gib']:.2f} | | |")
        else:
            ends = f"{run['losses'][0]:.2f}, {run['losses'][-1]:.2f} | {run['grad_norms'][-1]:.2f}"
            lines.append(f"{shape}| {run['peak_gib']:.2f} | {run['pages_gib']:.2f} | {ends} |")
    return "\n".join(lines)


def memory_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Planned and measured peaks side by side."""
    runs = [run for run in content["results"] if "failed" not in run]
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * len(runs), 4), layout="constrained")
    for shift, key, label in ((-0.2, "predicted_gib", "plan"), (0.2, "peak_gib", "measured")):
        bars = axes.bar([i + shift for i in range(len(runs))], [run[key] for run in runs], 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    names = [f"{run['shape']}\nof {run['cap']:g}" if run["cap"] else run["shape"] for run in runs]
    axes.set(xticks=range(len(runs)), xticklabels=names, ylabel="peak, GiB")
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------
# Tables, charts and the command line
# ------------------------------------------------------------------------------------
PRESENTED: dict[str, tuple[Any, Any]] = {
    "precision": (precision_table, precision_chart),
    "fast_slow": (fast_slow_table, fast_slow_chart),
    "recipe": (
        partial(precision_table, settings=RECIPES, reference=DEFAULTS, short=DEFAULTS),
        partial(precision_chart, settings=RECIPES),
    ),
    "rates": (rates_table, rates_chart),
    "memory": (memory_table, memory_chart),
}


def present(out: Path, name: str) -> None:
    """Write the table and the chart of one result, and print the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    make_table, make_chart = PRESENTED[name]
    content = read_json(out / f"{name}.json")
    table = make_table(content)
    print(table, flush=True)
    (out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    figure = make_chart(content, pyplot)
    figure.savefig(out / f"{name}.png", dpi=110)
    pyplot.close(figure)


def chart(arguments: argparse.Namespace) -> None:
    """Tables and charts of the results in --out."""
    for name in PRESENTED:
        if (Path(arguments.out) / f"{name}.json").is_file():
            print(f"\n{name}\n")
            present(Path(arguments.out), name)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the words after -- as `flags` for qlora.py."""
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.flags = words[end + 1 :]
    return arguments


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", default=str(ROOT / "scripts/results"), help="folder for JSON, tables and charts")
    shared.add_argument("--work", default=str(ROOT / "output/proof"), help="folder for models, adapters and logs")
    commands = parser.add_subparsers(required=True)
    for function in (precision, rates, fast_slow, recipe, chart):
        command = commands.add_parser(function.__name__, parents=[shared], help=function.__doc__)
        command.set_defaults(function=function)
        if function is chart:
            continue
        command.add_argument("model", help="folder, .gguf file or folder with one")
        command.add_argument("rows", help="JSON-lines file of rows")
        command.add_argument("--held_out", type=int, default=100, help="rows to hold out")
        command.add_argument("--jobs", type=int, default=6 if GPU else 1, help="processes at a time")
        if function in (fast_slow, recipe):
            command.add_argument("--steps", type=int, default=300, help="optimizer steps")
        if function is not fast_slow:
            command.add_argument("--seeds", default="0,1,2")
        if function in (precision, rates):
            command.add_argument("--epochs", type=float, default=3)
            command.add_argument("--settings", help=f"some of: {'; '.join(CHOICES)}")
        if function is rates:
            command.add_argument("--rates", default="1.25e-4,2.5e-4,5e-4,1e-3,2e-3,4e-3")
    qlora.set_up_logging()
    arguments = parsed(parser, argv)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
