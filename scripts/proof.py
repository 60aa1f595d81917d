#!/usr/bin/env python3
"""Check what QLoRA promises on real weights, with runs of qlora.py itself.

    python scripts/proof.py precision MODEL ROWS      held-out loss by precision of the frozen weights; with
                                                      --rates by learning rate, also with the adapters on 16 bit
    python scripts/proof.py fast_slow MODEL ROWS      the fast path, the libraries' own and a plain loop, step by step

MODEL is a folder, a .gguf file or a folder with one; ROWS is a JSON-lines file of rows {"text": ...}. Flags of
qlora.py may follow after --. Every run is a process of its own, --jobs at a time for each GPU; one that has finished
with the same flags is not repeated. Raw numbers go to --out as JSON, with a table; models, adapters and logs to --work.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "examples"))
import loop

import qlora

ROOT = Path(qlora.__file__).resolve().parent
RESULTS = ROOT / "scripts/results"
GPU = torch.cuda.is_available()
GPUS = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count() or 1)))).split(",")
BF16 = ["--bf16"] if GPU else []  # float32 is faster on a CPU
BATCH = 16  # rows of an optimizer step

# Guanaco's rows and adapters. All held-out rows are one evaluation batch, so their loss is the mean over their tokens.
SHARED = ["--source_max_len", "16", "--target_max_len", "512", "--gradient_accumulation_steps", str(BATCH),
          "--lora_r", "64", "--do_eval", "--eval_on_start", "True", "--save_strategy", "no",
          "--logging_steps", "1", "--disable_tqdm", "True", "--overwrite_output_dir", "True"]  # fmt: skip
LORA, FULL = ["--learning_rate", "5e-4", *BF16], ["--learning_rate", "2e-5", "--full_finetune"]
NF4 = [*LORA, "--bits", "4", "--quant_type", "nf4"]
CALIBRATED = [*NF4, "--calibration_rows", "128"]
REFERENCE = "LoRA, 16 bit"
SETTINGS = {
    REFERENCE: [*LORA, "--bits", "16"],
    "LoRA, int8": [*LORA, "--bits", "8"],
    "LoRA, nf4": [*NF4, "--double_quant", "False"],
    "LoRA, nf4 + double quant": NF4,
    "LoRA, nf4 calibrated": CALIBRATED,
    # the better base alone: adapters start at zero
    "LoRA, nf4 calibrated, start at zero": [*CALIBRATED, "--init_lora_weights", "True"],
    "LoRA, fp4": [*LORA, "--bits", "4", "--quant_type", "fp4", "--double_quant", "False"],
    "full, float32 weights": [*FULL, "--bits", "32"],
    # as the original does it; a step of 2e-5 is below the rounding of a bf16 weight of 0.02
    "full, bf16 weights": [*FULL, *BF16, "--bits", "16"],
}


# ---- Runs --------------------------------------------------------------------------
class Job(NamedTuple):
    """One run of qlora.py; the seed is that of adapters and row order."""

    name: str
    flags: list[str]
    seed: int = 0
    rate: float | None = None  # the learning rate, where the name does not imply it

    def folder(self, work: Path) -> Path:
        """Where the run writes to."""
        return work / re.sub(r"\W+", "_", f"{self.name}-{self.seed}-{self.rate or ''}").strip("_")


def without_folders(words: Iterable[str]) -> list[str]:
    """A command without this machine's folders."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def start(words: list[str], log: Path, gpus: str | None = None) -> str:
    """Run Python with its output in a log file, which is returned; if it fails, raise with what it says of that."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if GPU and gpus else {})
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, *words], stdout=file, stderr=file, env=environment).returncode
    text = log.read_text(encoding="utf-8")
    if code:
        lines = text.splitlines()
        errors = [line for line in lines if "error: " in line.lower()]
        raise RuntimeError(f"exit status {code}: {' '.join(errors[:1] or lines[-3:])}")
    return text


def measure(launcher: list[str], flags: list[str], out: Path, gpus: str | None) -> dict[str, Any]:
    """What a run of qlora.py measured; if it fails, the reason, so that the other runs' numbers are kept."""
    try:
        start([*launcher, str(ROOT / "qlora.py"), *flags, "--output_dir", str(out)], out.with_suffix(".log"), gpus)
    except RuntimeError as error:
        return {"failed": str(error)}
    history = qlora.read_json(out / "trainer_state.json")["log_history"]
    return {
        "loss": [round(entry["loss"], 6) for entry in history if "loss" in entry],  # of every step
        "eval": [{key: e[key] for key in ("step", "eval_loss")} for e in history if "eval_loss" in e],
        "metrics": qlora.read_json(out / "metrics.json"),
        "data": qlora.read_json(out / "run.json")["data"],
    }


def run_job(job: Job, gpu: str, work: Path) -> dict[str, Any]:
    """What a run measured, now or before."""
    flags, out = [*job.flags, "--seed", str(job.seed), "--data_seed", str(job.seed)], job.folder(work)
    record = out.with_suffix(".json")
    if record.is_file() and (done := qlora.read_json(record))["flags"] == flags:
        return dict(done["result"])
    result = {**job._asdict(), "flags": without_folders(flags)} | measure([], flags, out, gpu)
    if "failed" not in result:
        record.write_text(json.dumps({"flags": flags, "result": result}), encoding="utf-8")
        losses = ", ".join(f"{entry['eval_loss']:.4f}" for entry in result["eval"])
        print(f"{out.name}: held-out loss {losses}", flush=True)
    return result


def run_jobs(arguments: argparse.Namespace, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Every job's measurements, --jobs at a time for each GPU."""
    with ThreadPoolExecutor(arguments.jobs * len(GPUS)) as pool:
        return list(pool.map(run_job, jobs, itertools.cycle(GPUS), itertools.repeat(arguments.work)))


def prepare(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The model as a folder (a .gguf file is dequantised here, once) and the flags that all runs share."""
    cache = ["--cache_dir", str(Path(arguments.work, "cache"))]
    arguments.work = Path(arguments.work, qlora.file_digest(arguments.rows))  # results on other rows are not reused
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (arguments.jobs * len(GPUS)))))
    base = qlora.model_folder(qlora.parse_config(["--model_name_or_path", arguments.model, *cache]))
    flags = ["--model_name_or_path", base, *cache, *SHARED, "--per_device_eval_batch_size", str(arguments.held_out)]
    return base, flags


def split_rows(arguments: argparse.Namespace) -> Path:
    """A folder with train.jsonl and eval.jsonl, shuffled once: every run then takes the rows in the same order."""
    lines = [f"{line}\n" for line in arguments.rows.read_text(encoding="utf-8").strip().split("\n")]
    random.Random(0).shuffle(lines)
    folder = arguments.work / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(lines[: arguments.held_out]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[arguments.held_out :]), encoding="utf-8")
    return folder


# ---- Results as JSON and as a table ------------------------------------------------
def publish(out: str | Path, name: str, content: dict[str, Any], table: str) -> None:
    """Write results with the command, commit, device and versions behind them, and their table."""
    versions, folder = qlora.versions(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(["python", *without_folders(sys.argv)]), "commit": versions["qlora.py"],
        "device": qlora.device_name(), "versions": versions,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(about | content, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    print(table, flush=True)


def markdown(*rows: Sequence[str]) -> str:
    """Rows as a table, the first as its head; columns that are empty below it are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    lines = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    return "\n".join([*lines[:1], "|" + "---|" * len(columns), *lines[1:]])


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, of a single value itself."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def runs_table(content: dict[str, Any]) -> str:
    """A line for each setting and learning rate. Differences are to the first setting, with the same rate and seed."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        if "failed" not in run:
            groups.setdefault((run["name"], run.get("rate")), []).append(run)
    reference = next(iter(groups), ("",))[0]
    after = {key: {run["seed"]: run["eval"][-1]["eval_loss"] for run in runs} for key, runs in groups.items()}
    rows = [["trained", "held-out loss before", "after: mean ± deviation over seeds",
             f"minus {reference}, seed by seed", "after, on the published base", "tokens/s", "peak GiB"]]  # fmt: skip
    for (name, rate), runs in groups.items():
        others = after.get((reference, rate), {}) if name != reference else {}
        rows.append([
            name if rate is None else f"{name}, {rate:g}",
            f"{statistics.mean(run['eval'][0]['eval_loss'] for run in runs):.4f}",
            spread([*after[name, rate].values()]),
            spread([loss - others[seed] for seed, loss in after[name, rate].items() if seed in others]),
            spread([run["published"] for run in runs if "published" in run]),
            f"{statistics.median(run['metrics']['train_tokens_per_second'] for run in runs):.0f}",
            f"{max(run['metrics'].get('train_peak_memory_gib', 0.0) for run in runs):.1f}",
        ])  # fmt: skip
    failed = [f"\n{run['name']}, seed {run['seed']}: {run['failed']}" for run in content["runs"] if "failed" in run]
    return "\n".join([markdown(*rows), *failed])


# ---- precision: held-out loss by the precision of the frozen weights, and by learning rate
def precision(arguments: argparse.Namespace) -> None:
    """Every setting with every seed; at each of --rates, if passed, and then also on the published base."""
    base, flags = prepare(arguments)
    flags += ["--eval_strategy", "epoch", "--num_train_epochs", "3"]
    if arguments.rates:
        folder = split_rows(arguments)
        flags += ["--dataset", str(folder)]
    else:
        flags += ["--dataset", str(arguments.rows), "--eval_dataset_size", str(arguments.held_out)]
    jobs = []
    for name, rate, seed in itertools.product(arguments.settings, arguments.rates or [None], arguments.seeds):
        own = ["--learning_rate", str(rate)] if rate else []
        jobs.append(Job(name, [*flags, *SETTINGS[name], *own, *arguments.flags], seed, rate))
    content = {"runs": run_jobs(arguments, jobs)}
    for job, run in zip(jobs, content["runs"], strict=True) if arguments.rates else ():
        adapter = job.folder(arguments.work)
        if "failed" not in run and qlora.weights_in(adapter):  # no full fine-tune
            run["published"] = loss_on(base, adapter, folder / "eval.jsonl")
    publish(arguments.out, "rates" if arguments.rates else "precision", content, runs_table(content))


@torch.no_grad()
def loss_on(base: str, adapter: Path, rows: Path) -> float:
    """Held-out loss of a saved adapter on a base in 16 bits, by transformers and peft alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=loop.DTYPE)
    adapted: Any = PeftModel.from_pretrained(model.to(loop.DEVICE), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = rows.read_text(encoding="utf-8").strip().split("\n")  # not at U+2028
    batches = [loop.collate([loop.encode(json.loads(line), tokenizer, 513)]) for line in lines]  # 512 tokens and BOS
    counts = [int((batch["labels"] != loop.IGNORE).sum()) for batch in batches]  # tokens that are supervised
    return round(statistics.fmean([float(adapted(**batch).loss) for batch in batches], counts), 6)


# ---- fast_slow: the fast path, the libraries' own functions and examples/loop.py, step by step
STOCK = ["--fast_path", "False", "--recompute_layers", "none", "--auto_batch", "False"]
PAIRS = (
    ("fast", "stock"), ("fast", "plain loop"), ("stock", "plain loop"), ("stock, half the rows at once", "stock"),
    ("fast, again", "fast"),
)  # fmt: skip


def fast_slow(arguments: argparse.Namespace) -> None:
    """Runs that should agree and, for comparison, runs that differ only in the order of sums or in the seed."""
    base, flags = prepare(arguments)
    folder, steps = split_rows(arguments), str(arguments.steps)
    flags += [*NF4, "--dataset", str(folder), "--eval_strategy", "steps", "--eval_steps", steps,
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
    output = arguments.work / "plain-loop"
    words = [base, str(folder / "train.jsonl"), str(output), "--steps", steps, "--batch_size", str(BATCH),
             "--accumulation_steps", "1", "--no-shuffle", "--max_length", "513"]  # fmt: skip
    text = start([str(ROOT / "examples/loop.py"), *words], output.with_suffix(".log"), GPUS[0])
    plain = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", text, flags=re.M)]
    content = {"plain": plain, "runs": run_jobs(arguments, jobs)}
    publish(arguments.out, "fast_slow", content, fast_slow_table(content))


def fast_slow_table(content: dict[str, Any]) -> str:
    """The differences of the losses of a step, and held-out loss and speed of the runs."""
    losses = {run["name"]: run["loss"] for run in content["runs"] if run["seed"] == 0 and "failed" not in run}
    losses["plain loop"] = content["plain"]
    rows = [["difference of the loss of a step", "mean size", "largest", "mean"]]
    for a, b in (pair for pair in PAIRS if set(pair) <= set(losses)):
        values = [x - y for x, y in zip(losses[a], losses[b], strict=True)]
        sizes = [abs(value) for value in values]
        numbers = statistics.mean(sizes), max(sizes), statistics.mean(values)
        rows.append([f"{a} − {b}", *(f"{number:.5f}" for number in numbers)])
    return f"{markdown(*rows)}\n\n{runs_table(content)}"


# ---- The command line --------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (precision, fast_slow):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("model", help="folder, .gguf file or folder with one")
        command.add_argument("rows", type=Path, help="JSON-lines file of rows")
        command.add_argument("--out", default=str(RESULTS), help="folder for JSON and table")
        command.add_argument("--work", default=str(ROOT / "output/proof"), help="folder for models, adapters and logs")
        command.add_argument("--held_out", type=int, default=100, help="rows to hold out")
        command.add_argument("--jobs", type=int, default=6 if GPU else 1, help="processes at a time for each GPU")
    commands.choices["fast_slow"].add_argument("--steps", type=int, default=300, help="optimizer steps")
    command = commands.choices["precision"]
    command.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS, metavar="NAME",
                         help=f"some of: {', '.join(map(repr, SETTINGS))}")  # fmt: skip
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--rates", nargs="+", type=float, default=[], help="learning rates")
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    qlora.set_up_logging()
    arguments = parser.parse_args(words[:end], argparse.Namespace(flags=words[end + 1 :]))
    try:
        arguments.function(arguments)
    except (OSError, qlora.ConfigError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
