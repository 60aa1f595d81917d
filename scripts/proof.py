#!/usr/bin/env python3
"""What QLoRA promises, shown on real weights by runs of qlora.py itself.

    python scripts/proof.py bits MODEL                          bits a parameter as stored, error of quantisation
    python scripts/proof.py noise MODEL ROWS                    is it the rounding, or any error of its size?
    python scripts/proof.py precision MODEL ROWS                held-out loss by precision of the frozen weights
    python scripts/proof.py learning MODEL ROWS --mmlu FOLDER   the Guanaco recipe, MMLU, the quick start's questions
    python scripts/proof.py fast_slow MODEL ROWS                the fast path against the libraries' own, step by step
    python scripts/proof.py chart                               tables and charts again, from the results alone

MODEL is a folder, a .gguf file or a folder with one; ROWS a file of rows that --dataset takes. Flags of qlora.py may
follow after --. Every run is one of qlora.py in a process that runs several, --jobs processes at a time on one GPU.
Raw numbers go to --out as JSON, beside them a table and a chart; models, adapters and logs to --work.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qlora

ROOT = Path(qlora.__file__).resolve().parent
GPU = torch.cuda.is_available()
BF16 = ["--bf16"] if GPU else []  # float32 is faster on a CPU
BATCH = 16  # rows of an optimizer step

# Guanaco's rows and adapters. All held-out rows are one evaluation batch: its loss is the mean over their tokens.
ROWS = ["--source_max_len", "16", "--target_max_len", "512", "--gradient_accumulation_steps", str(BATCH),
        "--lora_r", "64", "--lora_alpha", "16", "--save_strategy", "no", "--logging_steps", "1",
        "--disable_tqdm", "True", "--overwrite_output_dir", "True"]  # fmt: skip
EVALUATE = ["--do_eval", "--eval_on_start", "True", "--eval_strategy"]

LORA, FULL = ["--learning_rate", "5e-4"], ["--learning_rate", "2e-5", "--full_finetune"]
NF4, FP4 = ["--bits", "4", "--quant_type", "nf4"], ["--bits", "4", "--quant_type", "fp4"]
SETTINGS = {
    "LoRA, 16 bit": [*LORA, *BF16, "--bits", "16"],
    "LoRA, int8": [*LORA, *BF16, "--bits", "8"],
    "LoRA, nf4": [*LORA, *BF16, *NF4, "--double_quant", "False"],
    "LoRA, nf4 + double quant": [*LORA, *BF16, *NF4],
    "LoRA, fp4": [*LORA, *BF16, *FP4, "--double_quant", "False"],
    "full, float32 weights": [*FULL, "--bits", "32"],
    # as the original has it: of a step of 2e-5 a bf16 weight of 0.02 keeps nothing
    "full, bf16 weights": [*FULL, *BF16, "--bits", "16"],
}
REFERENCE = "LoRA, 16 bit"

STOCK = ["--fused_lora", "False", "--padding_free", "False", "--chunked_head", "False", "--liger", "False",
         "--unpacked_layers", "none", "--recompute_layers", "none", "--auto_batch", "False"]  # fmt: skip

# The quick start's flags, but for its number of questions.
SUPPORT = ["--dataset", str(ROOT / "examples/data/support_desk"), "--source_max_len", "64", "--target_max_len", "64",
           "--bits", "4", "--lora_r", "16", "--lora_alpha", "32",
           "--do_predict", "--predict_with_generate", "--max_new_tokens", "48", "--per_device_eval_batch_size", "8",
           "--disable_tqdm", "True", "--overwrite_output_dir", "True"]  # fmt: skip
SUPPORT_TRAIN = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
                 "--gradient_checkpointing", "False", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear",
                 "--save_steps", "1000", "--logging_steps", "24", "--do_eval"]  # fmt: skip


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------
EVALUATED = ("eval_loss", "mmlu_eval_accuracy", "mmlu_loss")


class Job(NamedTuple):
    """One run of qlora.py."""

    name: str
    flags: list[str]
    seed: int = 0

    @classmethod
    def seeded(cls, name: str, flags: list[str], seed: int) -> "Job":
        """With one seed for adapters and order of rows."""
        return cls(name, [*flags, "--seed", str(seed), "--data_seed", str(seed)], seed)

    def folder(self, work: Path) -> Path:
        """Where it writes."""
        return work / f"{self.name}-{self.seed}".replace(" ", "_").replace(",", "").replace("+", "and")


def read_json(path: Path) -> Any:
    """A JSON file, or an empty object where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def shown(words: Iterable[str]) -> list[str]:
    """A command without this machine's folders."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def free_memory() -> None:
    """Give back what a run has left on the GPU."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def run_job(job: Job, work: Path) -> dict[str, Any]:
    """Run it in this process; what it measured."""
    began, out = time.perf_counter(), job.folder(work)
    try:
        qlora.run(qlora.parse_config([*job.flags, "--output_dir", str(out)]), qlora.GracefulStop())
    finally:
        free_memory()
    history = read_json(out / "trainer_state.json").get("log_history", [])
    return {
        "name": job.name,
        "seed": job.seed,
        "flags": shown(job.flags),
        "loss": [round(entry["loss"], 6) for entry in history if "loss" in entry],  # of every step
        "eval": [{"step": e["step"]} | {k: e[k] for k in EVALUATED if k in e} for e in history if "eval_loss" in e],
        "metrics": {name: v for name, v in read_json(out / "metrics.json").items() if "accuracy_" not in name},
        "data": read_json(out / "run.json").get("data", {}),
        "seconds": round(time.perf_counter() - began, 1),
    }


def leave_after(parent: Any) -> None:
    """End this process as soon as that one is gone, killed too."""
    parent.join()
    os._exit(1)


def start_worker(logs: Path, threads: int) -> None:
    """A process of the pool: its output into a file of its own. It ends with the process that asked for it."""
    threading.Thread(target=leave_after, args=(multiprocessing.parent_process(),), daemon=True).start()
    sys.stdout = sys.stderr = (logs / f"worker-{os.getpid()}.log").open("w", encoding="utf-8", buffering=1)
    torch.set_num_threads(threads)
    qlora.set_up_logging()


class Pool:
    """Functions run in --jobs processes, or with 0 in this one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.pool = Path(arguments.work), None
        self.work.mkdir(parents=True, exist_ok=True)
        if arguments.jobs:
            threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self.pool = ProcessPoolExecutor(arguments.jobs, context, start_worker, (self.work, threads))

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        """A promise of its result."""
        if self.pool is not None:
            return self.pool.submit(function, *args)
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done

    def results(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Every job's measurements; of one that fails its reason, and the others go on."""
        found, waiting = [], [(job, self.submit(run_job, job, self.work)) for job in jobs]
        began = time.perf_counter()
        for job, future in waiting:
            future.add_done_callback(partial(_say_done, job, began))
        for job, future in waiting:
            try:
                found.append(future.result())
            except Exception as error:  # whatever it is, the other runs' numbers stay
                reason = f"{type(error).__name__}: {error}"
                found.append({"name": job.name, "seed": job.seed, "flags": shown(job.flags), "failed": reason})
        return found


def _say_done(job: Job, began: float, future: Future[Any]) -> None:
    error, taken = future.exception(), time.perf_counter() - began
    losses = [] if error else [round(entry["eval_loss"], 4) for entry in future.result()["eval"]]
    ends = [losses[0], losses[-1]] if losses else []
    print(f"{job.name}, seed {job.seed}: {error or ends or 'done'}, after {taken:.0f} s", flush=True)


def base_folder(arguments: argparse.Namespace) -> str:
    """The model as a folder; a .gguf file is dequantised here, once."""
    flags = ["--model_name_or_path", arguments.model, "--cache_dir", f"{arguments.work}/cache"]
    return qlora.model_folder(qlora.parse_config(flags))


def row_flags(arguments: argparse.Namespace, folder: str) -> list[str]:
    """Flags that all runs on the rows share."""
    held = str(arguments.held_out)
    return ["--model_name_or_path", folder, "--cache_dir", f"{arguments.work}/cache", "--dataset", arguments.rows,
            *ROWS, "--eval_dataset_size", held, "--per_device_eval_batch_size", held]  # fmt: skip


def encoded(flags: list[str]) -> tuple[Any, qlora.Splits, qlora.Splits]:
    """Tokenizer and the rows as every run will find them in the cache: as text, and encoded."""
    config = qlora.parse_config([*flags, "--do_eval"])
    model_config = qlora.load_model_config(config, config.model.model_name_or_path)
    config = qlora.resolve_objective(config, model_config)
    tokenizer = qlora.load_tokenizer(config, model_config, config.model.model_name_or_path)
    texts = qlora.load_splits(config, tokenizer)
    return tokenizer, texts, qlora.encode_splits(texts, tokenizer, config)


def in_lines(value: Any) -> str:
    """JSON with one run in a line."""
    runs = isinstance(value, list) and isinstance(value[0], dict)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "]" if runs else json.dumps(value)


def write(arguments: argparse.Namespace, name: str, content: dict[str, Any], show: bool = True) -> None:
    """Results with what it takes to judge them, then their table and chart."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(["python", *shown(sys.argv)]),
        "commit": qlora.git_commit(),
        "device": qlora.device_name(),
        "versions": qlora.versions(),
    }
    lines = [f"{json.dumps(key)}: {in_lines(value)}" for key, value in (about | content).items()]
    (out / f"{name}.json").write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")
    if show:
        present(out, name)


# ------------------------------------------------------------------------------------
# precision: held-out loss by the precision of the frozen weights
# ------------------------------------------------------------------------------------
def precision(arguments: argparse.Namespace) -> None:
    """Every setting with every seed; within a seed all see the same rows in the same order."""
    flags = row_flags(arguments, base_folder(arguments))
    encoded(flags)
    flags += [*EVALUATE, "epoch", "--num_train_epochs", str(arguments.epochs), "--lr_scheduler_type", "constant"]
    names = arguments.settings.split(";") if arguments.settings else list(reversed(SETTINGS))  # the longest first
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    jobs = [Job.seeded(name, [*flags, *SETTINGS[name], *arguments.flags], seed) for name in names for seed in seeds]
    write(arguments, "precision", {"runs": Pool(arguments).results(jobs)})


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def precision_table(content: dict[str, Any]) -> str:
    """By setting; differences are taken seed by seed, where rows and adapters begin alike."""
    lines = [
        "| trained | held-out loss before | after: mean ± deviation over seeds | minus 16-bit LoRA, seed by seed "
        "| lowest in a run | tokens/s | peak GiB |",
        "|" + "---|" * 7,
    ]
    runs = [run for run in content["runs"] if "failed" not in run]
    last = {(run["name"], run["seed"]): run["eval"][-1]["eval_loss"] for run in runs}
    for name in SETTINGS:
        own = [run for run in runs if run["name"] == name]
        if not own:
            continue
        minus = [last[name, r["seed"]] - last[REFERENCE, r["seed"]] for r in own if (REFERENCE, r["seed"]) in last]
        lowest = statistics.mean(min(entry["eval_loss"] for entry in run["eval"]) for run in own)
        speed = statistics.median(run["metrics"]["train_tokens_per_second"] for run in own)
        peak = max(run["metrics"]["train_peak_memory_gib"] for run in own)
        lines.append(
            f"| {name} | {own[0]['eval'][0]['eval_loss']:.4f} | {spread([last[name, r['seed']] for r in own])} "
            f"| {spread(minus) if minus and name != REFERENCE else ''} | {lowest:.4f} | {speed:.0f} | {peak:.1f} |"
        )
    lines += [f"\n{run['name']}, seed {run['seed']}: {run['failed']}" for run in content["runs"] if "failed" in run]
    return "\n".join(lines)


def precision_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Held-out loss over steps, and where each seed ends."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    runs = [run for run in content["runs"] if "failed" not in run]
    names = [name for name in SETTINGS if any(run["name"] == name for run in runs)]
    for place, name in enumerate(names):
        own = [run["eval"] for run in runs if run["name"] == name]
        steps = [entry["step"] for entry in own[0]]
        means = [statistics.mean(run[i]["eval_loss"] for run in own) for i in range(len(steps))]
        left.plot(steps, means, marker="o", label=name, color=f"C{place}")
        ends = [run[-1]["eval_loss"] for run in own]
        right.plot(ends, [place] * len(ends), "o", color=f"C{place}", alpha=0.6)
        right.plot([statistics.mean(ends)], [place], "|", color=f"C{place}", markersize=22)
    left.set(xlabel="optimizer step", ylabel="held-out loss (nats per token), mean of seeds")
    left.legend(fontsize=8)
    right.set(xlabel="held-out loss after training: each seed, and their mean", yticks=range(len(names)))
    right.set_yticklabels(names)
    right.invert_yaxis()
    return figure


# ------------------------------------------------------------------------------------
# bits: what a parameter takes, and what rounding does to it
# ------------------------------------------------------------------------------------
def stored_bits(layers: Iterable[Any]) -> dict[str, float]:
    """Bits a parameter of 4-bit layers, from the bytes of every tensor that they keep."""
    parameters, bytes_, tables = 0, 0, 0
    for layer in layers:
        state = layer.weight.quant_state
        parameters += math.prod(state.shape)
        nested = [state.offset, state.state2.absmax] if state.nested else []
        bytes_ += sum(tensor.nbytes for tensor in (layer.weight.data, state.absmax, *nested))
        tables += state.code.nbytes + (state.state2.code.nbytes if state.nested else 0)
    return {"bits": 8 * bytes_ / parameters, "with_tables": 8 * (bytes_ + tables) / parameters}


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight as a kind of quantisation gives it back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if kind == "int8":  # a scale for each row, as LLM.int8() has it
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    if kind == "int4":  # -7 to 7, a scale for 64 weights
        blocks = weight.reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
        return ((blocks / scale).round() * scale).view_as(weight)
    kind, _, double = kind.partition(" + ")
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=bool(double))
    return dequantize_4bit(packed, state)


KINDS = ("int8", "nf4", "nf4 + double quant", "fp4", "int4")


def error_of(weights: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Of each kind: the root mean square of the error over that of the weights, of all and of the worst layer."""
    found = {}
    for kind in KINDS:
        sums = [(float((rounded(w, kind) - w).square().sum()), float(w.square().sum())) for w in weights]
        whole = math.sqrt(sum(e for e, _ in sums) / sum(s for _, s in sums))
        found[kind] = {"relative_rms": whole, "worst_layer": max(math.sqrt(e / s) for e, s in sums)}
    return found


def linear_of(model: str, work: str, *flags: str) -> list[Any]:
    """The linear layers that qlora.py quantises, loaded as it loads them."""
    config = qlora.parse_config(["--model_name_or_path", model, "--cache_dir", f"{work}/cache", *flags])
    folder = qlora.model_folder(config)
    model_config = qlora.load_model_config(config, folder)
    config = qlora.resolve_objective(config, model_config)
    loaded = qlora.load_model(config, model_config, folder)
    return [loaded.get_submodule(name) for name in qlora.linear_layers(loaded, config.masked)]


def bits(arguments: argparse.Namespace) -> None:
    """On a model's own weights, one layer of LLaMA-7B's shape, and values drawn from a normal distribution."""
    import bitsandbytes

    torch.manual_seed(0)
    storage: dict[str, Any] = {}
    for double in (True, False):
        layer = bitsandbytes.nn.Linear4bit(4096, 4096, bias=False, quant_type="nf4", compress_statistics=double)
        name = "nf4 + double quant" if double else "nf4"
        own = linear_of(arguments.model, arguments.work, *NF4, "--double_quant", str(double))
        layer.to("cuda" if GPU else "cpu")
        storage[name] = {"model": stored_bits(own), "4096 x 4096": stored_bits([layer])}
        del own
        free_memory()
    weights = [
        layer.weight.detach().float().cpu() for layer in linear_of(arguments.model, arguments.work, *("--bits", "32"))
    ]
    count = sum(weight.numel() for weight in weights)
    errors = {"model": error_of(weights), "normal": error_of([torch.randn(1024, 1024)])}
    write(
        arguments,
        "bits",
        {"model": Path(arguments.model).name, "parameters": count, "storage": storage, "errors": errors},
    )


def bits_table(content: dict[str, Any]) -> str:
    """By kind of quantisation."""
    lines = [
        "| | bits a parameter, as stored | with tables, on this model | relative error of its weights "
        "| its worst layer | of normal values |",
        "|" + "---|" * 6,
    ]
    for kind in KINDS:
        stored = content["storage"].get(kind)
        held = f"{stored['4096 x 4096']['bits']:.3f} | {stored['model']['with_tables']:.3f}" if stored else " | "
        own, normal = (content["errors"][of][kind] for of in ("model", "normal"))
        lines.append(
            f"| {kind} | {held} | {own['relative_rms']:.4f} | {own['worst_layer']:.4f} | {normal['relative_rms']:.4f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------
# noise: what an error of the weights costs before training, whatever its shape
# ------------------------------------------------------------------------------------
def blurred(weight: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    """A weight with normal noise in place of the error of rounding, as large as that in each block of 64."""
    error = (rounded(weight, kind) - weight).reshape(-1, 64)
    drawn = torch.randn(error.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    return weight + (drawn * error.square().mean(1, keepdim=True).sqrt()).view_as(weight)


def noise(arguments: argparse.Namespace) -> None:
    """Held-out loss of the base: as it is, rounded, and with noise of that size in place of rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder(arguments)
    texts = [row[-1]["text"] for row in encoded(row_flags(arguments, base))[1].eval["segments"]][: arguments.first]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to("cuda" if GPU else "cpu").eval()
    layers = [model.get_submodule(name) for name in qlora.linear_layers(model)]
    own = [layer.weight.detach().clone() for layer in layers]
    changes: dict[str, Any] = {"as it is": lambda weight, _: weight}
    for kind in ("nf4", "fp4"):
        changes[kind] = lambda weight, _, kind=kind: rounded(weight, kind)
        for seed in (0, 1, 2):
            changes[f"noise as large as {kind}'s error, seed {seed}"] = lambda weight, place, kind=kind, seed=seed: (
                blurred(weight, kind, 1000 * seed + place)
            )
    losses = {}
    for name, change in changes.items():
        with torch.no_grad():
            for place, (layer, weight) in enumerate(zip(layers, own, strict=True)):
                layer.weight.copy_(change(weight, place))
        losses[name] = plain_loss(model, tokenizer, texts)
        print(f"{name}: {losses[name]:.4f}", flush=True)
    write(arguments, "noise", {"model": Path(arguments.model).name, "rows": len(texts), "eval_loss": losses})


def noise_table(content: dict[str, Any]) -> str:
    """By what was done to the weights."""
    lines = [f"| weights | loss on {content['rows']} held-out rows | minus the base's |", "|---|---|---|"]
    losses = content["eval_loss"]
    return "\n".join(lines + [f"| {n} | {v:.4f} | {v - losses['as it is']:.4f} |" for n, v in losses.items()])


# ------------------------------------------------------------------------------------
# learning: the Guanaco recipe at this model's size, MMLU, and the quick start's questions
# ------------------------------------------------------------------------------------
def guanaco_flags(**environment: str) -> list[str]:
    """The flags of the published recipe, from its script."""
    script, names = ROOT / "scripts/finetune_guanaco_7b.sh", {"PYTHON": "echo", **environment}
    said = subprocess.run(["bash", str(script)], env=os.environ | names, capture_output=True, text=True, check=True)
    return shlex.split(said.stdout)[1:]


def prompts_of(texts: Any, count: int) -> list[dict[str, str]]:
    """The first turn of the first held-out rows in plain ASCII, with the answer that they have."""
    found = []
    for segments in texts["segments"]:
        human, marker, rest = segments[-1]["text"].partition("### Assistant:")
        if marker and (human + rest).isascii() and len(human) < 400:
            found.append({"input": human + marker, "output": rest.partition("### Human:")[0].strip()})
    return found[:count]


def plain_model(folder: str, adapter: str | None) -> Any:
    """The base in nf4 with double quantisation, with an adapter or without: the libraries alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if GPU else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    where = {"": 0 if GPU else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=where, quantization_config=nf4)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # such a CPU would round in bf16 once no gradient is wanted
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def plain_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """The mean over the tokens of all texts, one row at a time, with nothing of qlora.py."""
    first, last = [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None), [tokenizer.eos_token_id]
    total, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, GPU):
        for text in texts:
            target = (tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] + last)[:512]
            ids = torch.tensor([first + target], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    return total / tokens


def plain_numbers(folder: str, adapter: str | None, texts: list[str], mmlu: str | None, count: int | None) -> Any:
    """Held-out loss and MMLU by loops over one row at a time, with nothing of qlora.py: what its numbers must equal."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), plain_model(folder, adapter)
    first = [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    marks: dict[str, list[bool]] = defaultdict(list)
    found: dict[str, Any] = {"eval_loss": plain_loss(model, tokenizer, texts)}
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, GPU):
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
        asked: dict[int, list[Any]] = defaultdict(list)  # questions of as many tokens go together, without padding
        for line in Path(mmlu).read_text(encoding="utf-8").splitlines()[:count] if mmlu else []:
            question = json.loads(line)
            ids = first + tokenizer(question["input"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            asked[len(ids)].append((ids, question))
        for group in asked.values():
            prompts, questions = zip(*group, strict=True)
            scores = model(input_ids=torch.tensor(prompts, device=model.device)).logits[:, -1, letters]
            for choice, question in zip(scores.argmax(-1).tolist(), questions, strict=True):
                marks[question["subject"]].append("ABCD"[choice] == question["output"])
    if marks:
        found["mmlu_eval_accuracy"] = statistics.mean(sum(own) / len(own) for own in marks.values())
        found["mmlu_questions"] = sum(len(own) for own in marks.values())
    return found


def predictions(folder: Path) -> list[dict[str, str]]:
    """What a run answered."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def exact(rows: list[dict[str, str]]) -> int:
    """Answers that are right word for word."""
    return sum(row["prediction"].strip() == row["output"].strip() for row in rows)


def learning(arguments: argparse.Namespace) -> None:
    """Before and after: held-out loss, MMLU, three prompts, the quick start's questions."""
    base, pool, work = base_folder(arguments), Pool(arguments), Path(arguments.work)
    texts = encoded(row_flags(arguments, base))[1]
    steps = str(arguments.steps)
    recipe = guanaco_flags(MODEL=base, DATASET=arguments.rows, MAX_STEPS=steps, MMLU=str(bool(arguments.mmlu)))
    recipe += ["--bf16", str(GPU), "--eval_dataset_size", str(arguments.held_out), *EVALUATE, "steps",
               "--eval_steps", str(max(1, arguments.steps // 3)), "--logging_steps", "1", "--disable_tqdm", "True",
               "--per_device_eval_batch_size", str(arguments.held_out), "--save_strategy", "no",
               "--cache_dir", f"{work}/cache", "--overwrite_output_dir", "True"]  # fmt: skip
    questions = Path(arguments.mmlu, "zero_shot_mmlu_val.json") if arguments.mmlu else None
    if questions:
        some = ["--max_mmlu_samples", str(arguments.max_mmlu_samples)] if arguments.max_mmlu_samples else []
        recipe += ["--mmlu_dataset", "mmlu-zs", "--mmlu_dir", arguments.mmlu, *some]
    own = ["--model_name_or_path", base, "--cache_dir", f"{work}/cache", *BF16]
    support = [*SUPPORT, *own, *(["--max_eval_samples", "2"] if arguments.steps < 10 else [])]
    folder = work / "prompts"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in prompts_of(texts.eval, 3)]
    (folder / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    asking = [*own, "--bits", "4", "--dataset", str(folder), "--do_train", "False", "--do_predict",
              "--predict_with_generate", "--max_new_tokens", "128", "--repetition_penalty", "1.2",
              "--disable_tqdm", "True"]  # fmt: skip
    jobs = [
        Job("guanaco", [*recipe, *arguments.flags]),
        Job("support", [*support, *SUPPORT_TRAIN, "--max_steps", str(min(144, arguments.steps))]),
        Job("support before", [*support, "--do_train", "False"]),
        Job("prompts before", asking),
    ]
    held_out = [segments[-1]["text"] for segments in texts.eval["segments"]]
    plain = (held_out, str(questions) if questions else None, arguments.max_mmlu_samples)
    before = pool.submit(plain_numbers, base, None, *plain)
    runs = pool.results(jobs)
    adapter = jobs[0].folder(work)
    after = pool.submit(plain_numbers, base, str(adapter), *plain)
    runs += pool.results([Job("prompts after", [*asking, "--adapter_name_or_path", str(adapter)])])
    asked = {name: predictions(Job(f"prompts {name}", []).folder(work)) for name in ("before", "after")}
    answered = {"before": predictions(jobs[2].folder(work)), "after": predictions(jobs[1].folder(work))}
    result = {
        "runs": runs,
        "plain": {"before": before.result(), "after": after.result()},
        "prompts": [
            {"input": b["input"], "before": b["prediction"], "after": a["prediction"]}
            for b, a in zip(asked["before"], asked["after"], strict=True)
        ],
        "support": {name: {"exact": exact(rows), "of": len(rows)} for name, rows in answered.items()},
    }
    write(arguments, "learning", result)


def learning_table(content: dict[str, Any]) -> str:
    """Before and after, by qlora.py and by the plain loops."""
    recipe = next(run for run in content["runs"] if run["name"] == "guanaco")
    first, last = recipe["eval"][0], recipe["eval"][-1]
    lines = [f"| | before | after {last['step']} steps |", "|---|---|---|"]
    for name, label in (("eval_loss", "held-out loss"), ("mmlu_eval_accuracy", "MMLU zero-shot, mean of subjects")):
        if name in first:
            plain = [content["plain"][when][name] for when in ("before", "after")]
            lines.append(f"| {label} | {first[name]:.4f} | {last[name]:.4f} |")
            lines.append(f"| the same by a plain loop | {plain[0]:.4f} | {plain[1]:.4f} |")
    marks = [f"{content['support'][when]['exact']} of {content['support'][when]['of']}" for when in ("before", "after")]
    lines.append(f"| the quick start's held-out questions, right word for word | {marks[0]} | {marks[1]} |")
    for row in content["prompts"]:
        lines.append(f"\n`{row['input'].strip()}`\n\n* before: {' '.join(row['before'].split())}")
        lines.append(f"* after: {' '.join(row['after'].split())}")
    return "\n".join(lines)


def learning_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Loss over steps."""
    recipe = next(run for run in content["runs"] if run["name"] == "guanaco")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(recipe["loss"]) + 1), recipe["loss"], label="training", linewidth=0.9)
    points = [(entry["step"], entry["eval_loss"]) for entry in recipe["eval"]]
    axes.plot(*zip(*points, strict=True), "o-", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------
# fast_slow: the fast path against the libraries' own, step by step
# ------------------------------------------------------------------------------------
def windows(rows: Any, seed: int, steps: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each optimizer step, in the order of a run with this seed."""
    order = qlora.EpochSampler(len(rows), seed, list(rows["length"]), BATCH)
    while steps > 0:
        numbers = list(order)
        for start in range(0, len(numbers), BATCH)[:steps]:
            yield [rows[i] for i in numbers[start : start + BATCH]]
        steps -= math.ceil(len(numbers) / BATCH)
        order.set_epoch(order.epoch + 1)


def plain_training(flags: list[str], rate: float, seed: int, steps: int) -> list[float]:
    """The same steps by transformers, peft and bitsandbytes in a plain loop; of qlora.py only rows and order."""
    from bitsandbytes.optim import PagedAdamW32bit
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    tokenizer, _, splits = encoded(flags)
    base = plain_model(flags[1], None)
    base.requires_grad_(False)
    set_seed(seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM"))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = PagedAdamW32bit(parameters, lr=rate, weight_decay=0.0), []
    for window in windows(splits.train, seed, steps):
        longest = max(row["length"] for row in window)
        ids, labels, mask = (torch.tensor(part, device=base.device) for part in (
            [row["input_ids"] + [tokenizer.pad_token_id] * (longest - row["length"]) for row in window],
            [row["labels"] + [-100] * (longest - row["length"]) for row in window],
            [[1] * row["length"] + [0] * (longest - row["length"]) for row in window],
        ))  # fmt: skip
        with torch.autocast(base.device.type, torch.bfloat16, GPU):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    del base, model, optimizer
    free_memory()
    return losses


def fast_slow(arguments: argparse.Namespace) -> None:
    """Runs that should not differ, and runs that differ only in the order of sums or in the seed, for comparison."""
    flags, pool, rate = row_flags(arguments, base_folder(arguments)), Pool(arguments), 2e-4
    encoded(flags)
    every = ["--eval_steps", str(arguments.steps), "--max_steps", str(arguments.steps), "--learning_rate", str(rate)]
    shared = [*flags, *BF16, *NF4, *EVALUATE, "steps", *every, *arguments.flags]
    halves = ["--per_device_train_batch_size", str(BATCH // 2), "--gradient_accumulation_steps", "2"]
    whole = ["--per_device_train_batch_size", str(BATCH), "--gradient_accumulation_steps", "1"]
    plain = pool.submit(plain_training, flags, rate, 0, arguments.steps)
    runs = pool.results(
        [
            Job.seeded("stock", [*shared, *STOCK, *whole], 0),
            Job.seeded("stock, half the rows at once", [*shared, *STOCK, *halves], 0),
            Job.seeded("stock", [*shared, *STOCK, *whole], 1),
            Job.seeded("fast", shared, 0),
            Job.seeded("fast, again", shared, 0),
        ]
    )
    write(arguments, "fast_slow", {"runs": runs, "plain": plain.result()})


def curves(content: dict[str, Any]) -> dict[str, list[float]]:
    """Loss by step, of the runs with the first seed."""
    found = {run["name"]: run["loss"] for run in content["runs"] if run["seed"] == 0 and "failed" not in run}
    return found | {"plain loop": content["plain"]}


PAIRS = (
    ("fast", "stock"), ("fast", "plain loop"), ("stock", "plain loop"), ("stock, half the rows at once", "stock"),
    ("fast, again", "fast"),
)  # fmt: skip


def fast_slow_table(content: dict[str, Any]) -> str:
    """How far apart curves are that have the same rows in every step."""
    losses = curves(content)
    lines = [
        "| | difference of the loss of a step: mean size | largest | mean | last 50 steps, mean size |",
        "|" + "---|" * 5,
    ]
    for a, b in (pair for pair in PAIRS if set(pair) <= set(losses)):
        apart = [x - y for x, y in zip(losses[a], losses[b], strict=True)]
        sizes = [abs(x) for x in apart]
        lines.append(
            f"| {a} − {b} | {statistics.mean(sizes):.5f} | {max(sizes):.5f} | {statistics.mean(apart):+.5f} "
            f"| {statistics.mean(sizes[-50:]):.5f} |"
        )
    lines += ["", "| | held-out loss before | after | tokens/s |", "|---|---|---|---|"]
    for run in (run for run in content["runs"] if "failed" not in run):
        ends = [f"{run['eval'][i]['eval_loss']:.4f}" for i in (0, -1)]
        speed = run["metrics"]["train_tokens_per_second"]
        lines.append(f"| {run['name']}, seed {run['seed']} | {ends[0]} | {ends[1]} | {speed:.0f} |")
    return "\n".join(lines)


def fast_slow_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Curves over one another, and their distances."""
    losses = curves(content)
    figure, (top, low) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for name, style in (("plain loop", "C2-"), ("stock", "C1-"), ("fast", "C0--")):
        top.plot(range(1, len(losses[name]) + 1), losses[name], style, label=name, linewidth=0.9)
    for place, (a, b) in enumerate(pair for pair in PAIRS if set(pair) <= set(losses)):
        apart = [max(abs(x - y), 1e-6) for x, y in zip(losses[a], losses[b], strict=True)]
        low.semilogy(range(1, len(apart) + 1), apart, color=f"C{place}", label=f"{a} − {b}", linewidth=0.7)
    top.set(ylabel="training loss (nats per token)")
    low.set(xlabel="optimizer step", ylabel="size of the difference")
    top.legend()
    low.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------
# memory: what scripts/memory.py measured
# ------------------------------------------------------------------------------------
def memory_table(content: dict[str, Any]) -> str:
    """By shape, and by the memory that a run was allowed."""
    lines = [
        "| shape | limit, GiB | plan, GiB | measured peak, GiB | optimizer's pages, GiB | loss, first and last step "
        "| gradient norm |",
        "|" + "---|" * 7,
    ]
    for run in content["results"]:
        shape = f"| {run['shape']} | {run['cap'] or ''} | {run['predicted_gib']:.2f} "
        if "failed" in run:
            lines.append(f"{shape}| fails: {run['failed']} | {run['pages_gib']:.2f} | | |")
        else:
            ends = f"{run['losses'][0]:.2f}, {run['losses'][-1]:.2f} | {run['grad_norms'][-1]:.2f}"
            lines.append(f"{shape}| {run['peak_gib']:.2f} | {run['pages_gib']:.2f} | {ends} |")
    return "\n".join(lines)


def memory_chart(content: dict[str, Any], pyplot: Any) -> Any:
    """Plan and peak side by side."""
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
# Tables and charts
# ------------------------------------------------------------------------------------
TABLES: dict[str, Any] = {
    "precision": precision_table, "bits": bits_table, "noise": noise_table, "learning": learning_table,
    "fast_slow": fast_slow_table, "memory": memory_table,
}  # fmt: skip
CHARTS: dict[str, Any] = {
    "precision": precision_chart,
    "learning": learning_chart,
    "fast_slow": fast_slow_chart,
    "memory": memory_chart,
}


def present(out: Path, name: str) -> None:
    """Table and chart of one result."""
    content = read_json(out / f"{name}.json")
    table = TABLES[name](content)
    print(table, flush=True)
    (out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    if name in CHARTS:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = CHARTS[name](content, pyplot)
        figure.savefig(out / f"{name}.png", dpi=110)
        pyplot.close(figure)


def chart(arguments: argparse.Namespace) -> None:
    """Of every result that is there."""
    for name in TABLES:
        if (Path(arguments.out) / f"{name}.json").is_file():
            print(f"\n{name}\n")
            present(Path(arguments.out), name)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line; what follows -- is for qlora.py."""
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
    parts = {"bits": bits, "noise": noise, "precision": precision, "learning": learning, "fast_slow": fast_slow,
             "chart": chart}  # fmt: skip
    for name, function in parts.items():
        one = commands.add_parser(name, parents=[shared], help=function.__doc__)
        one.set_defaults(function=function)
        if name != "chart":
            one.add_argument("model", help="folder, .gguf file or folder with one")
        if name in ("noise", "precision", "learning", "fast_slow"):
            one.add_argument("rows", help="file of rows")
            one.add_argument("--held_out", type=int, default=100, help="rows to hold out")
        if name == "noise":
            one.add_argument("--first", type=int, help="only so many of the held-out rows")
        if name in ("precision", "learning", "fast_slow"):
            one.add_argument("--jobs", type=int, default=6 if GPU else 1, help="processes at a time; 0: this one")
            one.add_argument("--steps", type=int, default=300, help="optimizer steps (not of precision)")
        if name == "precision":
            one.add_argument("--seeds", default="0,1,2")
            one.add_argument("--epochs", type=float, default=3)
            one.add_argument("--settings", help=f"some of: {'; '.join(SETTINGS)}")
        if name == "learning":
            one.add_argument("--mmlu", help="folder with zero_shot_mmlu_val.json")
            one.add_argument("--max_mmlu_samples", type=int)
    qlora.set_up_logging()
    arguments = parsed(parser, argv)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
