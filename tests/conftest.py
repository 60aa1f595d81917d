"""Fixtures: tiny models and data built once a session, and `run_qlora`, which runs the program.

    def test_it_trains(run_qlora):
        run = run_qlora(learning_rate=1e-3)
        assert run.code == 0 and (run.output_dir / "adapter_model.safetensors").exists()

Nothing here needs a network or a GPU. The builders themselves are in tiny.py.
"""

import atexit
import contextlib
import importlib
import io
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Before the first import of a Hugging Face library, all of which read these once.
_HF_HOME = tempfile.mkdtemp(prefix="qlora-tests-hf-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": _HF_HOME,  # also where remote code is copied to
    "HF_DATASETS_CACHE": f"{_HF_HOME}/datasets",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]  # `import qlora`, `import tiny`, `import talk`

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import tiny_encoders  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits for the first

# bitsandbytes warns here of what every CPU test does: 8-bit layers compute in fp16 ("MatMul8bitLt:
# inputs will be cast"), and there is no downloadable kernel for 4 bit.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    """Paged optimizers, the program's default, warn on a CPU that they do not page."""
    config.addinivalue_line("filterwarnings", "ignore:Paged optimizers are not supported on CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def extra(module: str) -> Any:
    """A module of tests/requirements.txt."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing(f"{module} is not installed: pip install -r tests/requirements.txt")


def missing(reason: str) -> NoReturn:
    """Skip a test for what is not on this machine; CI sets QLORA_ALL_TESTS, and there the test fails.

    Not so for the browser, which comes from the system: where CI could not install it, it says so itself.
    """
    excused = os.environ.get("QLORA_NO_BROWSER") and reason.startswith("chromium")
    (pytest.fail if os.environ.get("QLORA_ALL_TESTS") and not excused else pytest.skip)(reason)


# ------------------------------------------------------------------------------------
# Folders, built when first asked for. They are shared: a test that changes one copies it first.
# ------------------------------------------------------------------------------------


def _cached(root: Path, build: Callable[..., Path], named: dict[str, Callable[..., Path]]) -> Callable[..., Path]:
    """`get(name, **options)`: one folder under `root` for each distinct call."""
    folders: dict[str, Path] = {}
    kept: list[Any] = []  # the options: a collected function's address, and so its repr, may come again

    def get(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        kept.append(options)
        if key not in folders:
            path = root / f"{name}-{len(folders)}"
            if name in named:
                folders[key] = named[name](path, **options)
            else:
                folders[key] = build(path, name, **options)
        return folders[key]

    return get


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("llama", **options of tiny.write_model)` -> folder.

    Also "remote_code"; "gguf" (options of tiny.write_gguf); "prequantised" (`base`: llama); "encoder" (options of
    tiny_encoders.write_encoder).
    """

    def prequantised(path: Path, base: Path | None = None) -> Path:
        return tiny.write_prequantised(path, base or get("llama"))

    named = {
        "remote_code": tiny.write_remote_code_model,
        "gguf": tiny.write_gguf,
        "prequantised": prequantised,
        "encoder": tiny_encoders.write_encoder,
    }
    get = _cached(tmp_path_factory.mktemp("models"), tiny.write_model, named)
    return get


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tokenizers("byte_bpe", bos=None)` -> folder; names and options are tiny.TOKENIZERS'."""
    return _cached(tmp_path_factory.mktemp("tokenizers"), tiny.write_tokenizer, {})


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpaca.jsonl (tiny.ALPACA_ROWS) and support.{jsonl,csv,parquet} (24 of tiny.support_rows)."""
    folder = tmp_path_factory.mktemp("data")
    tiny.rows_to_jsonl(folder / "alpaca.jsonl", tiny.ALPACA_ROWS)
    rows = tiny.support_rows(24)
    tiny.rows_to_jsonl(folder / "support.jsonl", rows)
    tiny.rows_to_csv(folder / "support.csv", rows)
    tiny.rows_to_parquet(folder / "support.parquet", rows)
    return folder


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tiny.byte_tokenizer(): byte ids 0..255, then tiny.BOS, tiny.EOS, tiny.PAD."""
    return tiny.byte_tokenizer()


# ------------------------------------------------------------------------------------
# Running the program
# ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run of the program left."""

    code: int
    output_dir: Path
    stdout: str
    stderr: str

    def json(self, name: str) -> Any:
        """A JSON file of the output folder."""
        return json.loads((self.output_dir / name).read_text(encoding="utf-8"))

    def files(self) -> set[str]:
        """Every file of the output folder, relative to it."""
        found = (path for path in self.output_dir.rglob("*") if path.is_file())
        return {path.relative_to(self.output_dir).as_posix() for path in found}


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    with preserved_state():
        yield


@pytest.fixture
def run_qlora(models: Callable[..., Path], data_dir: Path, tmp_path: Path) -> Callable[..., Run]:
    """`run_qlora(*words, **flags)` -> Run: calls `qlora.main` with flags small enough for a CPU.

    `words` come first on the command line, as they are. A flag that is None is left out, a list
    gives several words, a dict JSON. Runs of one test share the output folder `tmp_path / "out"`,
    so the second resumes the first. What is not a QLoRAError is raised to the test.
    """
    import qlora

    seeds = itertools.count(1)

    def run(*words: str, **flags: Any) -> Run:
        flags = {
            "model_name_or_path": flags.get("model_name_or_path") or models("llama"),
            "dataset": data_dir / "support.jsonl",
            "output_dir": tmp_path / "out",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "source_max_len": 32,
            "target_max_len": 32,
            "lora_r": 4,
            "logging_steps": 1,
            "save_steps": 2,
            **flags,
        }
        argv = [*words, *_to_argv(flags)]
        stdout, stderr = io.StringIO(), io.StringIO()
        with preserved_state():
            # Each run finds another random state, as each process does: a seed that is set too
            # late must show as a difference between runs.
            seed = next(seeds)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            try:
                with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                    code = qlora.main(argv)
            except SystemExit as stop:  # --help
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            finally:  # pytest shows it where the test fails
                print(stdout.getvalue(), end="")
                print(stderr.getvalue(), end="", file=sys.stderr)
        return Run(code, Path(flags["output_dir"]), stdout.getvalue(), stderr.getvalue())

    return run


def _to_argv(flags: dict[str, Any]) -> list[str]:
    """{"bits": 4, "do_eval": True, "optim": None} -> ["--bits", "4", "--do_eval", "True"]."""
    argv = []
    for name, value in flags.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        argv += [f"--{name}", *words]
    return argv


@contextlib.contextmanager
def preserved_state() -> Iterator[None]:
    """Put back what a run may change in this process: the next test must not inherit it."""
    environment, directory, excepthook = dict(os.environ), Path.cwd(), sys.excepthook
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    named = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    loggers = [
        (log, log.level, log.propagate, log.disabled, list(log.handlers))
        for log in {logging.root, logging.getLogger("qlora"), *named}
    ]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    grad, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.excepthook = excepthook
        for number, handler in signals.items():
            signal.signal(number, handler)
        for log, level, propagate, disabled, handlers in loggers:
            log.setLevel(level)
            log.propagate, log.disabled, log.handlers[:] = propagate, disabled, handlers
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(rng[0])
        np.random.set_state(rng[1])
        torch.set_rng_state(rng[2])
