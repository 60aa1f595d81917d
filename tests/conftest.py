"""Fixtures: tiny models and data, built once a session, and `run_qlora`, which runs the program.

    def test_it_trains(run_qlora):
        run = run_qlora(learning_rate=1e-3)
        assert run.code == 0 and (run.output_dir / "adapter_model.safetensors").exists()

Nothing here needs a network or a GPU. The builders are in tiny.py.
"""

import atexit
import contextlib
import functools
import gc
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

# Before the first import of a Hugging Face library, all of which read these once. Each pytest-xdist worker imports this
# file too and so has caches of its own.
_HF_HOME = tempfile.mkdtemp(prefix="qlora-tests-hf-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
if "PYTEST_XDIST_WORKER" not in os.environ and not any("gpu" in word for word in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests expect what a CPU does, but those marked `gpu`
os.environ |= {
    "HF_HOME": _HF_HOME,  # remote code is copied there, too
    "HF_DATASETS_CACHE": f"{_HF_HOME}/datasets",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]  # `import qlora`, `import tiny`, `import talk`

import jinja2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import tiny_encoders  # noqa: E402
import torch  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)  # tiny models gain nothing from a second thread
# peft compiles the template of its model card anew at every save, a tenth of a warm run's time.
jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)

# bitsandbytes warns about what every CPU test does: 8-bit layers compute in fp16 ("MatMul8bitLt: inputs will be
# cast"), and 4 bit has no downloadable kernel.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    """Ignore the warning that paged optimizers, the program's default, do not page on a CPU."""
    config.addinivalue_line("filterwarnings", "ignore:Paged optimizers are not supported on CPU")


# Files whose tests share fixtures that take seconds: one pytest-xdist worker runs all tests of such a file.
ONE_WORKER_EACH = ("test_ddp", "test_examples", "test_fast_path", "test_fsdp_deepspeed")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may not be installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files of ONE_WORKER_EACH first, then test by test.

    --dist loadgroup would do it, but xdist 3.8 writes groups to a private attribute that pytest 9.2 no longer has.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in ONE_WORKER_EACH else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and `gpu` on the command line"))


def pytest_collection_finish() -> None:
    freeze_imports()


def pytest_unconfigure() -> None:
    """Remove the caches here as well: a pytest-xdist worker does not run its atexit functions."""
    shutil.rmtree(_HF_HOME, ignore_errors=True)


def freeze_imports() -> None:
    """Exclude everything imported so far from garbage collection.

    accelerate collects garbage once a run, which takes 0.36 s over the objects of the imported libraries and a few
    milliseconds without them.
    """
    gc.collect()
    gc.freeze()


@functools.cache
def freeze_lazy_imports() -> None:
    """Once a process, after the first run has imported the rest (datasets, bitsandbytes, …)."""
    freeze_imports()


def extra(module: str) -> Any:
    """Import a module of tests/requirements.txt, or skip the test."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing(f"{module} is not installed: pip install -r tests/requirements.txt")


def missing(reason: str) -> NoReturn:
    """Skip a test that needs something this machine lacks; with QLORA_ALL_TESTS set, as CI does, fail it.

    The browser is the exception: it comes from the system, and CI sets QLORA_NO_BROWSER if it cannot be installed.
    """
    excused = os.environ.get("QLORA_NO_BROWSER") and reason.startswith("chromium")
    (pytest.fail if os.environ.get("QLORA_ALL_TESTS") and not excused else pytest.skip)(reason)


# ------------------------------------------------------------------------------------
# Folders, built on first use and shared: a test that changes one must copy it first.
# ------------------------------------------------------------------------------------


def _cached(root: Path, build: Callable[..., Path], named: dict[str, Callable[..., Path]]) -> Callable[..., Path]:
    """`get(name, **options)`: one folder under `root` for each distinct call."""
    folders: dict[str, Path] = {}
    kept: list[Any] = []  # options stay alive: the repr of a collected function could be reused by another

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
    """Exit status, output and files of one run of the program."""

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
def _preserve_state() -> Iterator[None]:
    with preserved_state():
        yield


@pytest.fixture(autouse=True)
def _skip_slow_writes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the loss chart empty and skip fsync, unless the test is marked `real_writes`.

    Together they are half of a warm run of four steps.
    """
    if request.node.get_closest_marker("real_writes"):
        return
    import qlora

    monkeypatch.setattr(qlora, "write_loss_chart", lambda path, history: path.touch())
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _run_main(argv: list[str], output_dir: Path, seed: int) -> Run:
    import qlora

    stdout, stderr = io.StringIO(), io.StringIO()
    with preserved_state():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                code = qlora.main(argv)
        except SystemExit as stop:  # --help
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:  # pytest shows both if the test fails
            print(stdout.getvalue(), end="")
            print(stderr.getvalue(), end="", file=sys.stderr)
            freeze_lazy_imports()
    return Run(code, output_dir, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def small_flags(models: Callable[..., Path], data_dir: Path) -> dict[str, Any]:
    """The flags of `run_qlora`, small enough for a CPU."""
    return {
        "model_name_or_path": models("llama"),
        "dataset": data_dir / "support.jsonl",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "source_max_len": 32,
        "target_max_len": 32,
        "lora_r": 4,
        "logging_steps": 1,
        "save_steps": 2,
    }


@pytest.fixture
def run_qlora(small_flags: dict[str, Any], tmp_path: Path) -> Callable[..., Run]:
    """`run_qlora(*words, **flags)` -> Run: call `qlora.main` with `small_flags` and these.

    `words` come first on the command line, unchanged. A flag set to None is left out, a list gives several words, a
    dict JSON. All runs of a test share the output folder `tmp_path / "out"` unless told otherwise, so the second one
    resumes the first. Exceptions other than ConfigError reach the test.
    """

    # Every process starts from a random state of its own, and so does each run here: setting the seed too late must
    # show as a difference between two runs.
    seeds = itertools.count(1)

    def run(*words: str, **flags: Any) -> Run:
        flags = {**small_flags, "output_dir": tmp_path / "out", **flags}
        return _run_main([*words, *_to_argv(flags)], Path(flags["output_dir"]), next(seeds))

    return run


@pytest.fixture(scope="session")
def _reference_run(small_flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("reference") / "out"
    run = _run_main(_to_argv({**small_flags, "output_dir": output, "learning_rate": 1e-2}), output, seed=0)
    assert run.code == 0
    return run


@pytest.fixture
def finished_run(_reference_run: Run, tmp_path: Path) -> Run:
    """A finished run with `small_flags` and --learning_rate 1e-2, copied to `tmp_path / "finished"`.

    For tests that start from an adapter or a checkpoint and do not care how it was trained.
    """
    output = tmp_path / "finished"
    shutil.copytree(_reference_run.output_dir, output)
    return replace(_reference_run, output_dir=output)


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


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs in processes of their own, see fork_server.py."""
    with ForkServer() as server:
        yield server


@contextlib.contextmanager
def preserved_state() -> Iterator[None]:
    """Restore everything a run may change in this process, so that the next test does not inherit it."""
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
        if "qlora" in sys.modules:
            sys.modules["qlora"].no_connection.cache_clear()
            sys.modules["qlora"].warn_once.cache_clear()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.excepthook = excepthook
        for number, handler in signals.items():
            signal.signal(number, handler)
        for log, level, propagate, disabled, handlers in loggers:
            if log.level != level:  # to set it clears the caches of a thousand loggers, a seventh of a warm run's time
                log.setLevel(level)
            log.propagate, log.disabled, log.handlers[:] = propagate, disabled, handlers
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(rng[0])
        np.random.set_state(rng[1])
        torch.set_rng_state(rng[2])
