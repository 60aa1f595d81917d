#!/usr/bin/env python3
"""Compare training of every causal and masked class that transformers knows with a plain transformers + peft loop.

    HF_HUB_OFFLINE=1 python scripts/check_models.py                    all of them: 10 minutes on one core
    HF_HUB_OFFLINE=1 python scripts/check_models.py llama masked/bert  some
    HF_HUB_OFFLINE=1 python scripts/check_models.py --gpu --jobs 12    on a GPU; the plain loop stays on the CPU

Each class is made tiny with random weights and trained for two steps, in float32 and on a base in 4 bits, in a process
of its own. A row of the table says which path it takes, or which line refuses it, and how far losses, gradient norms
and the saved adapter are from the plain loop's (tests/plain_loop.py). Rows are written as they come; a class that is
in the results already is not run again unless it is named.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import peft
import plain_loop
import tiny
import tiny_classes
import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

import qlora

ROOT = Path(qlora.__file__).resolve().parent
TOLERANCE = 1e-4  # a GPU rounds some weights to another of two codes that are as near: a hundred times that
FAILURES = ("not made", "refused", "raises", "hangs", "dies")
ROWS = tiny.support_rows(4)
Row = dict[str, Any]


def train(base: Path, work: Path, bits: int, masked: bool) -> tuple[int, str]:
    """Run qlora.py on the four rows; its exit status and what it wrote to standard error."""
    flags = (plain_loop.MASKED_FLAGS if masked else plain_loop.FLAGS) | {"bits": bits, "save_strategy": "no"}
    flags |= {"model_name_or_path": base, "dataset": work / "rows.jsonl", "output_dir": work / f"out-{bits}"}
    flags["objective"] = "mlm" if masked else "clm"
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = qlora.main(words)
    return code, stderr.getvalue()


def line_of(stderr: str, start: str) -> str:
    """What follows `start` at the beginning of a line, or nothing."""
    lines = (line.strip() for line in stderr.splitlines())
    return next((line[len(start) :].strip(" :") for line in lines if line.startswith(start)), "")


def check(name: str, bits: int, send: Callable[[Row], None]) -> None:
    """Send the row of one class and precision, whatever it raises."""
    masked, row = name.startswith("masked/"), Row(path="", note="")
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            work, row["path"] = Path(folder), "not made"
            tiny.rows_to_jsonl(work / "rows.jsonl", ROWS)
            base = tiny_classes.write_class(work / "base", name.rpartition("/")[2], masked)
            row["path"] = "raises"
            code, stderr = train(base, work, bits, masked)
            row |= {"path": "refused" if code else line_of(stderr, "fast path"), "note": line_of(stderr, "error")}
            if not code:
                row |= {key: line_of(stderr, line) for key, line in (("why", "not used"), ("adapters", "adapters"))}
                row["without"] = line_of(stderr, "linear layers without")
                row["note"] = next((line for line in stderr.splitlines() if "can't be tried" in line), "")
                whole = plain_loop.layers_left_whole(base, masked) if bits == 4 else None
                row |= plain_loop.compare(work / f"out-{bits}", base, ROWS, whole, masked)._asdict()
    except BaseException as error:
        where = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "qlora" in frame.filename]
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({'/'.join(where[-2:])})"
    send(row)


def check_in_child(limit: float, gpu: bool, name: str, bits: int) -> Row:
    """A row from a process of its own, also if that hangs or dies; CUDA can't be used in a fork."""
    context = multiprocessing.get_context("spawn" if gpu else "fork")
    receiver, sender = context.Pipe(duplex=False)
    child: Any = context.Process(target=check, args=(name, bits, sender.send), daemon=True)  # type: ignore[attr-defined]
    began = time.monotonic()
    child.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(limit) else Row(path="hangs", note=f"longer than {limit:g} s")
    except EOFError:
        row = Row(path="dies", note="")
    child.kill()
    child.join()
    return Row(name=name, bits=bits, gpu=gpu, seconds=round(time.monotonic() - began, 1)) | row


def verdict(row: Row) -> str:
    """One word for a row."""
    if "loss" not in row:
        return row["path"] if row["path"] in FAILURES else "not compared"
    numbers = max(row["loss"], row["norm"], row["adapter"])
    allowed = TOLERANCE * (100 if row.get("gpu") and row["bits"] == 4 else 1)
    return "same" if numbers <= allowed and not row["names"] else "differs"


def write_table(rows: Iterable[Row], file: Path) -> None:
    """All rows as Markdown, with counts above them."""
    rows = sorted(rows, key=lambda row: (row["name"].startswith("masked/"), row["name"], -row["bits"]))
    lines = []
    for bits in (32, 4):
        counts = Counter(verdict(row) for row in rows if row["bits"] == bits)
        lines.append(f"{bits} bits: " + ", ".join(f"{n} {word}" for word, n in counts.most_common()) + "\n")
    for kind, masked in (("causal", False), ("masked", True)):
        own = [row for row in rows if row["name"].startswith("masked/") == masked and row["bits"] == 32]
        paths = Counter(row["path"] for row in own if "loss" in row)
        lines.append(f"{kind}, by path: " + "; ".join(f"{n} {path}" for path, n in paths.most_common()) + "\n")
    lines += ["| class | bits | | path | loss | gradient norm | adapter | notes |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in ("loss", "norm", "adapter")]
        notes = "; ".join(filter(None, (row["note"], row.get("why", ""), ", ".join(row.get("names", [])[:2]))))
        path = "" if row["path"] in FAILURES else row["path"]
        cells = [row["name"], str(row["bits"]), verdict(row), path, *numbers, notes.replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, with masked/ before those of masked language models")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "scripts/results", help="folder of models.json and models.md"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one class at one precision")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU; the results are models_gpu.json and .md")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    file = args.out / ("models_gpu.json" if args.gpu else "models.json")
    stored = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    found = {(row["name"], row["bits"]): row for row in stored["rows"]}
    names = args.names or [*(f"masked/{name}" for name in sorted(MASKED)), *sorted(CAUSAL)]
    todo = [(name, bits) for name in names for bits in (32, 4) if args.names or (name, bits) not in found]
    if not args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        check("llama", 4, lambda row: None)  # children start from what this imports
        qlora.log.handlers.clear()
        gc.freeze()
    command = f"HF_HUB_OFFLINE=1 python scripts/check_models.py{' --gpu' * args.gpu}"
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = pool.map(lambda one: check_in_child(args.limit, args.gpu, *one), todo)
        for row in tqdm(rows, total=len(todo)):
            found[row["name"], row["bits"]] = row
            stored = {"versions": versions, "command": command, "rows": [*found.values()]}
            file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            write_table(found.values(), file.with_suffix(".md"))


if __name__ == "__main__":
    main()
