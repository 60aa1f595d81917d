#!/usr/bin/env python3
"""QLoRA in one file: fine-tune a language model whose frozen weights are held in 4 bits.

    python qlora.py --model_name_or_path M --dataset D --output_dir OUT      train
    python qlora.py run.yaml --learning_rate 1e-4                            flags from a file
    python qlora.py … --do_train False --do_predict --predict_with_generate  use what was trained

A base model is loaded in 4, 8, 16 or 32 bit, LoRA adapters go on every linear layer, the dataset is brought to
{input, output} pairs, and the Hugging Face Trainer trains the adapters with a paged optimizer. The method is
QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314); flags, defaults, prompts, labels and files are those of
its original script (https://github.com/artidoro/qlora), except where the README's list of differences says otherwise.

The file reads from top to bottom, and a room uses only rooms above it:

     1 Imports          5 Loading      9 LoRA            13 Stages
     2 Errors           6 Tokenizer   10 Checkpoints     14 Main
     3 Arguments        7 Encoding    11 Evaluation
     4 Dataset formats  8 Model       12 Trainer
"""

# ------------------------------------------------------------------------------------
# 1. Imports
#
# torch, transformers, peft and bitsandbytes come with the Trainer's arguments in any case. datasets and matplotlib are
# imported where they are used.
# ------------------------------------------------------------------------------------
# ruff: noqa: E402

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import gc
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypedDict, get_type_hints

# transformers imports bitsandbytes, which then says that it lacks a kernel no release has, and, in every 8-bit layer of
# every step, that it casts its input. Both are as they should be.
for _noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

import torch
import torch.nn.functional as F
import yaml
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    HfArgumentParser,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    enable_full_determinism,
    set_seed,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import speed_metrics

log = logging.getLogger("qlora")

IGNORE = -100  # a label that the loss leaves out
GIB = 2**30


# ------------------------------------------------------------------------------------
# 2. Errors
#
# What a user can mend is a QLoRAError: main prints its message in one line and returns 2. A message says what was
# found, what was expected, and the way out. Everything else is our bug and keeps its traceback.
# ------------------------------------------------------------------------------------
class QLoRAError(Exception):
    """Something that the user can mend."""


class ConfigError(QLoRAError):
    """A flag, a combination of flags, or a model that does not fit them."""


class DataError(QLoRAError):
    """A dataset, a file of it, or a row."""


class TrainingError(QLoRAError):
    """Training that can't go on: a loss that is not finite, no memory."""


class RowError(ValueError):
    """What is wrong with one row; becomes a DataError that also names file and line, or a line of rejected.jsonl."""

    def __init__(self, message: str, raw: Any = None) -> None:
        super().__init__(message)
        self.raw = raw  # what stood there, where it could not become a row


def one_line(error: BaseException) -> str:
    """The first lines of a library's message, joined, short enough to read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


# What libraries raise over a user's files and flags; not RuntimeError, which is as often our bug.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError,
    RecursionError, yaml.YAMLError, zlib.error, SafetensorError,
)  # fmt: skip


@contextlib.contextmanager
def mendable(what: str, kind: type[QLoRAError] = ConfigError, *also: type[Exception]) -> Iterator[None]:
    """A library's complaint as one line of ours that begins with `what`: the flag or file that it is about."""
    try:
        yield
    except (*LIBRARY_ERRORS, *also) as error:
        raise kind(f"{what}: {one_line(error)}") from error


# ------------------------------------------------------------------------------------
# 3. Arguments: the command line and a YAML or JSON file -> Config
#
# A flag is one field of the dataclass of its group: type, default, help and choices come from there. A flag that was
# renamed is a row of RENAMED_FLAGS. A rule between flags is a line of check_config, which runs before anything heavy;
# nothing later edits a Config.
# ------------------------------------------------------------------------------------
def flag(default: Any, text: str) -> Any:
    """A dataclass field with its help text, in which %% stands for a percent sign."""
    return field(default=default, metadata={"help": text})


# fmt: off
@dataclass
class ModelArguments:
    """Which base model and tokenizer."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = flag("EleutherAI/pythia-12b", "Base model: hub id, folder, or .gguf file.")
    trust_remote_code: bool = flag(False, "Run the Python code that comes with model and tokenizer.")
    use_auth_token: bool = flag(False, "Use this machine's hub login, for gated models.")
    adapter_name_or_path: str | None = flag(None, "Adapter to start from, optimizer fresh. A resume is a rerun.")
    attn_implementation: str | None = flag(None, "Attention kernel: sdpa, eager, flash_attention_2, ...")
    use_fast_tokenizer: bool = flag(True, "Accepted for old command lines: every tokenizer is a fast one today.")
    pad_token: str | None = flag(None, "Token of the vocabulary to pad with.")
    eos_token: str | None = flag(None, "Token of the vocabulary that ends a sequence.")
    bos_token: str | None = flag(None, "Token of the vocabulary that begins a sequence.")
    unk_token: str | None = flag(None, "Token of the vocabulary for what is unknown.")
    padding_side: Literal["right", "left"] = flag("right", "Padding of training batches; generation pads left.")
    tokenizer_patch: str | None = flag(None, "Folder whose tokenizer_config.json and special_tokens_map.json are laid "
        "over the model's (examples/llama1_tokenizer: for early LLaMA conversions).")
    rope_scaling: str | None = flag(None, "JSON laid over the model's rotary embedding, for longer contexts: "
        '{"rope_type": "linear", "factor": 2.0}')
    cache_dir: str | None = flag(None, "Folder for downloads, converted models and encoded datasets.")


@dataclass
class DataArguments:
    """Which rows, how they are read, how they are cut."""

    _argument_group_name: ClassVar[str] = "data"

    dataset: str = flag("alpaca", "Preset, local file or folder, or hub id; a comma-separated list is concatenated.")
    dataset_format: str | None = flag(None, "Format of the rows; default: the preset's own, else by the columns.")
    eval_dataset_size: float = flag(1024, "Rows held out where the dataset has no split for it: a number, or below 1 a "
        "share. The default takes a tenth of a set of fewer than 4096 rows.")
    max_train_samples: int | None = flag(None, "Train on the first N rows, counted after the split.")
    max_eval_samples: int | None = flag(None, "Evaluate and predict on the first N rows.")
    source_max_len: int = flag(1024, "Longest input, in tokens with BOS; cut on the right.")
    target_max_len: int = flag(256, "Longest output, in tokens with EOS; cut on the right.")
    model_max_len: int | None = flag(None, "One limit, in tokens, for input and output together; replaces those two.")
    skip_excess_length: bool = flag(True, "With model_max_len: drop longer training rows instead of cutting them.")
    on_bad_rows: Literal["stop", "skip"] = flag("stop", "At a row of no use: stop, or write it to rejected.jsonl.")
    train_on_source: bool = flag(False, "Learn the input tokens too.")


@dataclass
class QuantisationArguments:
    """How the frozen weights are held."""

    _argument_group_name: ClassVar[str] = "quantisation"

    bits: Literal[4, 8, 16, 32] = flag(4, "Bits of a base weight.")
    quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit data type.")
    double_quant: bool = flag(True, "Quantise the quantisation constants too: 0.37 bits a parameter less.")
    full_finetune: bool = flag(False, "No adapters: train all weights but the embeddings. Needs bits 16 or 32.")
    max_memory_MB: int = flag(80000, "Memory to use on each GPU, in MB, where one process drives them all.")


@dataclass
class LoraArguments:
    """The adapters."""

    _argument_group_name: ClassVar[str] = "LoRA"

    lora_r: int = flag(64, "Rank of the adapters.")
    lora_alpha: float = flag(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(0.0, "Dropout probability on the adapters' input.")
    lora_modules: str = flag("all", "Adapted: all (linear layers but the head), attn, mlp, or leaf names.")
    lora_bias: Literal["none", "all", "lora_only"] = flag("none", "Which bias vectors train too.")
    lora_dtype: Literal["float32", "bfloat16"] = flag("float32", "Data type that the adapters are kept in.")
    use_dora: bool = flag(False, "Weight-decomposed adapters (DoRA).")
    use_rslora: bool = flag(False, "Scale by lora_alpha / sqrt(lora_r).")
    init_lora_weights: str = flag("True", "How adapters start: True (B is zero), False, gaussian, eva; with bits 16 or "
        "32 also orthogonal, pissa, pissa_niter_N, olora.")
    modules_to_save: str | None = flag(None, "Comma list of modules to train whole, e.g. embed_tokens,lm_head.")
    layers_to_freeze: int = flag(0, "Leave the first N layers alone: no adapters, no training.")
    layer_freeze_ratio: float = flag(0.0, "As layers_to_freeze, as a share of the layers, below 1.")


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """The Trainer's arguments with the original's defaults."""

    _argument_group_name: ClassVar[str] = "training: flags of ours, and defaults that differ from the Trainer's"

    report_to: str | None = flag("none", "Tracker: none, tensorboard, wandb, trackio, ...")
    output_dir: str = flag("./output", "Folder for adapter, checkpoints, metrics and predictions.")
    optim: str = flag("paged_adamw_32bit", "Optimizer, by the Trainer's names.")
    per_device_train_batch_size: int = flag(1, "Rows of a micro-batch on each GPU.")
    gradient_accumulation_steps: int = flag(16, "Micro-batches of one optimizer step.")
    max_steps: int = flag(10000, "Optimizer steps; epochs rule if -1, or if num_train_epochs is given without it.")
    weight_decay: float = flag(0.0, "AdamW's weight decay.")
    learning_rate: float = flag(2e-4, "Highest learning rate.")
    remove_unused_columns: bool = flag(False, "Drop columns that the model does not name.")
    max_grad_norm: float = flag(0.3, "Clip the gradient to this norm.")
    gradient_checkpointing: bool = flag(True, "Recompute activations in the backward pass, to save memory.")
    do_train: bool = flag(True, "Train.")
    lr_scheduler_type: str = flag("constant", "Schedule of the learning rate. constant ignores warm-up.")
    warmup_steps: float = flag(0.03, "Warm-up: steps, or below 1 a share of them.")
    logging_steps: float = flag(10, "Steps between lines of the log, or below 1 a share of all.")
    train_sampling_strategy: str = flag("group_by_length", "Order of the rows: group_by_length, random or sequential.")
    save_strategy: str = flag("steps", "When to save: no, steps, epoch or best.")
    save_steps: float = flag(250, "Steps between checkpoints, or below 1 a share of all.")
    save_total_limit: int | None = flag(40, "Checkpoints to keep.")
    overwrite_output_dir: bool = flag(False, "Start anew although output_dir holds a run; its checkpoints go.")
    working_dir: str | None = flag(None, "Folder for all but the final weights, their tokenizer and card.")
    final_output_dir: str | None = flag(None, "Folder for those; default: output_dir.")
    merged_output_dir: str | None = flag(None, "Folder for the base with the adapter merged into it, in 16 bit.")
    merge_base: Literal["original", "dequantized"] = flag("original", "Merge into the base as published, or into the "
        "values that its quantised weights stand for.")
    max_shard_size: str = flag("5GB", "Largest file of a merged or fully fine-tuned model.")
    adam8bit: bool = flag(False, "Short for --optim paged_adamw_8bit.")
    show_traceback: bool = flag(False, "Show an error's traceback; --debug without a value does the same.")


@dataclass
class MMLUArguments:
    """Multiple-choice questions at each evaluation."""

    _argument_group_name: ClassVar[str] = "MMLU"

    do_mmlu_eval: bool = flag(False, "Answer MMLU questions at each evaluation.")
    mmlu_split: Literal["eval", "test"] = flag("eval", "Which questions.")
    mmlu_dataset: Literal["mmlu-zs", "mmlu-fs", "mmlu"] = flag("mmlu-fs", "Zero-shot or five-shot (mmlu-fs, mmlu).")
    max_mmlu_samples: int | None = flag(None, "Answer the first N questions.")
    mmlu_source_max_len: int = flag(2048, "Longest prompt, in tokens; cut on the left.")
    mmlu_dir: str = flag("data/mmlu", "Folder of the original's question files; without it cais/mmlu of the hub.")


@dataclass
class GenerationArguments:
    """How predictions are generated. Only the values given reach the model's generate."""

    _argument_group_name: ClassVar[str] = "generation"

    max_new_tokens: int = flag(256, "Longest prediction, in tokens.")
    min_new_tokens: int | None = flag(None, "Shortest prediction, in tokens.")
    do_sample: bool = flag(False, "Sample instead of taking the likeliest token.")
    num_beams: int = flag(1, "Beams of the beam search.")
    num_beam_groups: int = flag(1, "Groups of beams.")
    penalty_alpha: float | None = flag(None, "Degeneration penalty of contrastive search.")
    temperature: float = flag(1.0, "Sampling temperature.")
    top_k: int = flag(50, "Sample among the k likeliest tokens.")
    top_p: float = flag(1.0, "Sample among the likeliest tokens of this total probability.")
    typical_p: float = flag(1.0, "Sample among the most typical tokens of this total probability.")
    diversity_penalty: float = flag(0.0, "Penalty for a token that another beam group chose.")
    repetition_penalty: float = flag(1.0, "Above 1: penalty for tokens that occurred.")
    length_penalty: float = flag(1.0, "Exponent of the length in beam scores.")
    no_repeat_ngram_size: int = flag(0, "No run of this many tokens occurs twice.")
# fmt: on


@dataclass(frozen=True)
class Config:
    """Every flag, by group, as the run uses it."""

    model: ModelArguments
    data: DataArguments
    quant: QuantisationArguments
    lora: LoraArguments
    training: TrainingArguments
    mmlu: MMLUArguments
    generation: GenerationArguments
    flags: dict[str, Any]  # every flag by its own name, as resolved
    given: frozenset[str]  # those that the user set


GROUPS: tuple[Any, ...] = tuple(get_type_hints(Config)[f.name] for f in dataclasses.fields(Config))[:-2]


class Given(NamedTuple):
    """One flag as it was given: on the command line or in a file."""

    name: str  # with underscores, without dashes
    values: tuple[str, ...]
    where: str  # how to name it in a message


class Renamed(NamedTuple):
    """What an old flag is called today."""

    to: str | None  # None: accepted, without effect
    values: Mapping[str, str] | None = None  # of a boolean: what True and False became; empty: nothing
    note: str = "it has no counterpart in today's Trainer"


BOOLEANS = {"": "True", "true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}

RENAMED_FLAGS: dict[str, Renamed] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "warmup_ratio": Renamed("warmup_steps"),
    "group_by_length": Renamed("train_sampling_strategy", {"True": "group_by_length", "False": "random"}),
    "no_cuda": Renamed("use_cpu"),
    "use_auth": Renamed("use_auth_token"),
    "push_to_hub_token": Renamed("hub_token"),
    "use_flash_attention_2": Renamed("attn_implementation", {"True": "flash_attention_2", "False": ""}),
    "adafactor": Renamed("optim", {"True": "adafactor", "False": ""}),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "torchdynamo": Renamed("torch_compile_backend"),
    "save_safetensors": Renamed(None, note="weights are always saved as safetensors"),
    "sortish_sampler": Renamed(None, note="use --train_sampling_strategy"),
    "sharded_ddp": Renamed(None, note="use --fsdp"),
    "length_column_name": Renamed(None, note="lengths are counted here, in tokens"),
    **dict.fromkeys(
        ("use_mps_device", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval", "past_index",
         "ray_scope", "tpu_num_cores", "fp16_opt_level", "xpu_backend", "include_inputs_for_metrics",
         "include_tokens_per_second", "dispatch_batches", "split_batches", "fsdp_min_num_params",
         "push_to_hub_model_id", "push_to_hub_organization"),
        Renamed(None),
    ),
}  # fmt: skip


class Parser(HfArgumentParser):
    """HfArgumentParser with the Trainer's own flags last, no abbreviations, and errors of ours."""

    def __init__(self) -> None:
        self.trainer_group: Any = None
        epilog = "A YAML or JSON file with flags may stand first: python qlora.py run.yaml --learning_rate 1e-4"
        super().__init__(GROUPS, prog="qlora.py", allow_abbrev=False, epilog=epilog)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """One group for what a class declares itself; what it inherits goes into a group below all of ours."""
        own: Any = self.add_argument_group(dtype._argument_group_name)
        if dtype is TrainingArguments:
            self.trainer_group = argparse._ArgumentGroup(self, "the Trainer's other flags, with its own defaults")
        hints = get_type_hints(dtype)
        for item in dataclasses.fields(dtype):
            if item.init and item.name not in RENAMED_FLAGS:
                item.type = hints[item.name]
                self._parse_dataclass_field(own if item.name in dtype.__annotations__ else self.trainer_group, item)
        if dtype is GROUPS[-1]:  # argparse prints the groups in this order
            self._action_groups.append(self.trainer_group)

    def error(self, message: str) -> NoReturn:
        """Argparse's own complaints, as ours."""
        raise ConfigError(message.replace("argument ", ""))

    def tokens(self, item: Given) -> list[str]:
        """What argparse reads; a list that a file gives for a flag of one value is joined by commas."""
        one = self._option_string_actions[f"--{item.name}"].nargs is None
        if one and item.values:
            return [f"--{item.name}={','.join(item.values)}"]
        return [f"--{item.name}", *item.values]

    def flag_names(self) -> set[str]:
        """Every name that may follow the dashes, with underscores."""
        return {s[2:].replace("-", "_") for s in self._option_string_actions if s.startswith("--")}


def read_config_file(path: Path) -> list[Given]:
    """The flags of a YAML or JSON file: a mapping of names to values."""
    with mendable(str(path)):
        text = path.read_text(encoding="utf-8")
        content, words = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # JSON is YAML
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected flags as `name: value` lines, found {type(content).__name__}")
    given = []
    for (name, value), word in zip(content.items(), words.values(), strict=True):
        if value is not None:  # the words as they stand there: YAML takes `no` for False and 1_0 for 10
            values = [json.dumps(value)] if isinstance(value, dict) else word if isinstance(word, list) else [word]
            given.append(Given(str(name).replace("-", "_"), tuple(map(str, values)), f"{path}: {name}"))
    return given


def split_argv(argv: Sequence[str]) -> list[Given]:
    """The command line as flags with their values, after those of a config file that stands first."""
    given: list[Given] = []
    if argv and Path(argv[0]).suffix.lower() in (".yaml", ".yml", ".json"):
        given = read_config_file(Path(argv[0]))
        argv = argv[1:]
    from_file = len(given)
    for token in argv:
        dashes = re.match(r"(--|[–—]+)(?=[A-Za-z])", token)
        if dashes:
            name, equals, value = token[dashes.end() :].partition("=")
            if dashes.group() != "--":
                log.warning("%s: read as --%s (its dash is not a hyphen)", token, name)
            given.append(Given(name.replace("-", "_"), (value,) if equals else (), f"--{name}"))
        elif len(given) > from_file:
            given[-1] = given[-1]._replace(values=(*given[-1].values, token))
        else:
            raise ConfigError(f"{token}: expected a flag, which begins with --, or a .yaml or .json file first")
    return given


def current_name(item: Given, known: set[str]) -> Given | None:
    """A flag under its name of today, an old one with a warning; None where it has no effect any more."""
    negated = item.name.startswith("no_") and item.name not in RENAMED_FLAGS and item.name[3:] in RENAMED_FLAGS
    old = item.name[3:] if negated else item.name
    if old == "logging_dir":
        os.environ["TENSORBOARD_LOGGING_DIR"] = " ".join(item.values)
        log.warning("%s: old name, set as TENSORBOARD_LOGGING_DIR", item.where)
        return None
    if old == "debug" and not item.values:  # with a value it is the Trainer's flag of that name
        return item._replace(name="show_traceback")
    if old in RENAMED_FLAGS:
        return renamed(item, RENAMED_FLAGS[old], negated)
    if item.name not in known:
        near = difflib.get_close_matches(item.name, sorted(known | set(RENAMED_FLAGS)), n=5, cutoff=0.5)
        near.sort(key=lambda name: -len(os.path.commonprefix([name, item.name])))  # noqa: RUF071
        raise ConfigError(f"{item.where}: unknown flag, {f'did you mean --{near[0]}?' if near else 'see --help'}")
    if item.name.startswith("no_") and item.name[3:] in known and item.values:  # in a file, `no_double_quant: true`
        return item._replace(name=item.name[3:], values=("False" if boolean(item) == "True" else "True",))
    return item


def boolean(item: Given) -> str:
    """The value of a flag that is on or off; on where it has none."""
    value = BOOLEANS.get("".join(item.values).lower())
    if value is None:
        raise ConfigError(f"{item.where} {' '.join(item.values)}: expected True or False")
    return value


def renamed(item: Given, new: Renamed, negated: bool) -> Given | None:
    """A flag by its row in RENAMED_FLAGS."""
    if new.to is None:
        log.warning("%s: accepted, without effect: %s", item.where, new.note)
        return None
    values = ("False",) if negated else item.values
    if new.values is not None:
        value = new.values["False" if negated else boolean(item)]
        values = (value,) if value else ()
    if new.to == "warmup_steps":  # from 1 on, the Trainer would take a ratio for a number of steps
        with contextlib.suppress(ValueError):  # the parser names the flag and its type
            if not 0 <= float("".join(values)) < 1:
                raise ConfigError(f"{item.where} {values[0]}: expected a share of the steps, from 0 up to below 1")
    log.warning("%s: old name, read as --%s %s", item.where, new.to, " ".join(values))
    return Given(new.to, values, item.where) if values or new.values is None else None


def parse_config(argv: Sequence[str]) -> Config:
    """The command line -> a checked Config.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type, flags that do not go together.
    """
    parser = Parser()
    if any(token in ("-h", "--help") for token in argv):
        parser.print_help()
        raise SystemExit(0)
    known = parser.flag_names()
    items = [item for old in split_argv(argv) if (item := current_name(old, known))]
    flags = vars(parser.parse_args([token for item in items for token in parser.tokens(item)]))
    given = frozenset(item.name if item.name in flags else item.name.removeprefix("no_") for item in items)
    if {"--warmup_ratio", "--warmup_steps"} <= {item.where for item in items}:
        raise ConfigError("--warmup_ratio and --warmup_steps: give one of them")
    flags |= derived_defaults(flags, given)
    with mendable("flags"):
        work = {
            "output_dir": flags["working_dir"] or flags["output_dir"]
        }  # where the Trainer, and all but final_folder, is
        groups = parser.parse_dict(flags | work, allow_extra_keys=True)
    config = Config(*groups, flags, given)  # type: ignore[call-arg]
    check_config(config)
    return config


def derived_defaults(flags: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Defaults that depend on other flags or on the machine."""
    derived: dict[str, Any] = {}
    if "num_train_epochs" in given and "max_steps" not in given:
        derived["max_steps"] = -1
    if flags["eval_strategy"] != "no":
        derived["do_eval"] = True
    if flags["adam8bit"]:
        derived["optim"] = "paged_adamw_8bit"
    if not torch.cuda.is_available():
        derived["use_cpu"] = True
    if flags["gradient_checkpointing_kwargs"] is None:
        derived["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")  # transformers 5.23 warns of the old name, 5.17 knows no other
        if new in flags:
            derived[old] = derived[new] = flags[new] if new in given else derived.get(old, flags[old])
    return derived


def check_config(config: Config) -> None:
    """Every rule between flags, each with the way out; the first that is broken is a ConfigError."""
    model, data, quant, lora, train = config.model, config.data, config.quant, config.lora, config.training
    given, full, size = config.given, config.quant.full_finetune, config.data.eval_dataset_size
    metric = train.metric_for_best_model
    freeze, strategies = lora.layer_freeze_ratio, ("group_by_length", "random", "sequential")
    merged, final, start = (
        train.merged_output_dir,
        final_folder(config),
        lora_start_problem(lora.init_lora_weights, quant.bits < 16),
    )
    at_least_one = (
        "max_train_samples", "max_eval_samples", "source_max_len", "target_max_len", "model_max_len",
        "max_mmlu_samples", "mmlu_source_max_len", "max_new_tokens", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r", "max_memory_MB",
    )  # fmt: skip
    # fmt: off
    rules: list[tuple[bool, str]] = [
        (not (train.do_train or train.do_eval or train.do_predict or merged),
         "nothing to do: --do_train, --do_eval, --do_predict are off, and there is no --merged_output_dir"),
        (bool(merged) and full, "--merged_output_dir: --full_finetune leaves a whole model, there is nothing to merge"),
        ("merge_base" in given and not merged, "--merge_base needs --merged_output_dir"),
        (bool(merged) and Path(merged or "").resolve() in {p.resolve() for p in (Path(train.output_dir), final)},
         f"--merged_output_dir {merged}: the run's own folder, name another"),
        (re.fullmatch(r"[1-9]\d*[KMGT]B", train.max_shard_size) is None,
         f"--max_shard_size {train.max_shard_size}: expected a whole number and KB, MB, GB or TB, as in 5GB"),
        (full and quant.bits < 16,
         f"--full_finetune: weights rounded to --bits {quant.bits} take no small steps of training, give 16 or 32"),
        (full and model.adapter_name_or_path is not None, "--full_finetune: drop --adapter_name_or_path"),
        (train.adam8bit and "optim" in given, "--adam8bit and --optim: give one of them"),
        (train.do_predict and not train.predict_with_generate, "--do_predict needs --predict_with_generate"),
        (config.mmlu.do_mmlu_eval and not train.do_eval, "--do_mmlu_eval answers at each evaluation: add --do_eval"),
        (data.model_max_len is not None and bool(given & {"source_max_len", "target_max_len"}),
         "--model_max_len replaces --source_max_len and --target_max_len: give one or the others"),
        ("skip_excess_length" in given and data.model_max_len is None, "--skip_excess_length needs --model_max_len"),
        (not 0 < size < math.inf or (size > 1 and size != int(size)),
         f"--eval_dataset_size {size:g}: expected a number of rows, or a share below 1"),
        (not 0 <= lora.lora_dropout < 1, f"--lora_dropout {lora.lora_dropout:g}: expected from 0 up to below 1"),
        (lora.layers_to_freeze > 0 and freeze > 0, "--layers_to_freeze and --layer_freeze_ratio: give one of them"),
        (lora.layers_to_freeze < 0, f"--layers_to_freeze {lora.layers_to_freeze}: expected 0 or more"),
        (not 0 <= freeze < 1, f"--layer_freeze_ratio {freeze:g}: expected from 0 up to below 1"),
        (start is not None, f"--init_lora_weights {lora.init_lora_weights}: {start}"),
        (lora.init_lora_weights.lower() == "orthogonal" and lora.lora_r % 2 == 1,
         f"--init_lora_weights orthogonal: --lora_r {lora.lora_r} is odd, it must be even"),
        (train.max_steps == 0, "--max_steps 0: expected a number of steps, or -1 and --num_train_epochs"),
        (not 0 <= train.seed < 2**32, f"--seed {train.seed}: expected from 0 up to 2**32 - 1"),
        (not 0 <= train.label_smoothing_factor < 1,
         f"--label_smoothing_factor {train.label_smoothing_factor:g}: expected from 0 up to below 1"),
        (not 0 < lora.lora_alpha < math.inf, f"--lora_alpha {lora.lora_alpha:g}: expected more than 0"),
        *((not 0 <= config.flags[name] < math.inf, f"--{name} {config.flags[name]:g}: expected 0 or more")
          for name in ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "num_train_epochs")),
        (metric is not None and not (metric.removeprefix("eval_") in ("loss", "perplexity") or "mmlu_" in metric),
         f"--metric_for_best_model {metric}: expected loss, perplexity or an MMLU metric"),
        (metric is not None and "mmlu_" in metric and not config.mmlu.do_mmlu_eval,
         f"--metric_for_best_model {metric} needs --do_mmlu_eval"),
        (config.generation.num_beam_groups > 1 or config.generation.penalty_alpha is not None,
         "--num_beam_groups and --penalty_alpha: transformers has these two ways of generating no more"),
        (not config.generation.temperature > 0,
         f"--temperature {config.generation.temperature:g}: expected more than 0"),
        (train.train_sampling_strategy not in strategies,
         f"--train_sampling_strategy {train.train_sampling_strategy}: expected one of {', '.join(strategies)}"),
        *((value is not None and value < 1, f"--{name} {value}: expected at least 1")
          for name in at_least_one for value in [config.flags[name]]),
        (not data.dataset.strip(" ,"), "--dataset is empty"),
        ("vicuna" in data.dataset.replace(" ", "").split(","),
         f"--dataset vicuna: its data was never released; a file of your own, or one of {', '.join(DATASETS)}"),
        (data.dataset_format is not None and data.dataset_format not in FORMATS,
         f"--dataset_format {data.dataset_format}: expected one of {', '.join(FORMATS)}"),
    ]
    # fmt: on
    for broken, message in rules:
        if broken:
            raise ConfigError(message)
    rope_parameters(model.rope_scaling)


# How adapters may start, and why some can't on quantised weights. What peft knows besides is refused for its reason.
_ROUNDED_TWICE = (
    "it takes a part out of the weights, and rounding the rest again would leave an adapter for another base"
)
LORA_STARTS = dict.fromkeys(("true", "false", "gaussian", "eva"), "") | {
    "orthogonal": "peft draws it in the data type of the weights",
    **dict.fromkeys(("pissa", r"pissa_niter_\d+", "olora"), _ROUNDED_TWICE),
}
REFUSED_LORA_STARTS = {
    "loftq": "its adapters make up for the rounding of 4-bit weights and would be wrong on the base as published",
    "corda": "it needs statistics of the data from the full-precision base first",
    "lora_ga": "it needs gradients of the full-precision base first",
}


def lora_start_problem(name: str, quantised: bool) -> str | None:
    """Why adapters can't start in a way, or None."""
    why = next((why for pattern, why in LORA_STARTS.items() if re.fullmatch(pattern, name.lower())), None)
    if why is None:
        return REFUSED_LORA_STARTS.get(name.lower(), f"expected one of {', '.join(LORA_STARTS)}")
    return f"not on quantised weights, give --bits 16 or 32: {why}" if why and quantised else None


def final_folder(config: Config) -> Path:
    """Where the final adapter or model goes, with its tokenizer and card; all else goes to training.output_dir."""
    return Path(config.flags["final_output_dir"] or config.flags["output_dir"])


def rope_parameters(text: str | None) -> dict[str, Any] | None:
    """--rope_scaling as a dictionary; the key `type` of old configs is today's `rope_type`."""
    with mendable("--rope_scaling: not JSON"):
        value = None if text is None else json.loads(text)
    if not isinstance(value, dict | None):
        example = '{"rope_type": "linear", "factor": 2.0}'
        raise ConfigError(f"--rope_scaling: expected an object such as {example}, found {text}")
    return value and {("rope_type" if key == "type" else key): item for key, item in value.items()}


def hub_options(config: Config) -> dict[str, Any]:
    """What every function that may download takes."""
    return {"cache_dir": config.model.cache_dir, "token": True if config.model.use_auth_token else None}


# ------------------------------------------------------------------------------------
# 4. Dataset formats: one row of a raw dataset -> Pair
#
# Every format ends here in {input, output}; no later room knows where a row came from.
# To add one: write `_name_to_pair` (or take `plain`), add a row to FORMATS, add a row to tests/test_formats.py. The
# order of FORMATS is the order in which a format is inferred from the columns. A named dataset is a row of DATASETS.
# ------------------------------------------------------------------------------------
class Pair(TypedDict):
    """The normal form of a row."""

    input: str  # the prompt; empty for plain language modelling
    output: str  # what is learnt


class DatasetFormat(NamedTuple):
    """How rows with these columns become pairs."""

    columns: tuple[str, ...]  # that a row must have
    to_pair: Callable[[Mapping[str, Any]], Pair]
    inferred: bool = True  # from the columns alone


def text_of(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """The text in a field; a number or boolean is its JSON text, a null means that the field is missing.

    Raises:
        RowError: nothing there and no default, or a value that is no text.
    """
    value = row.get(name)
    if value is None:
        if default is None:
            raise RowError(f"field {name!r} is {'null' if name in row else 'missing'}, expected text")
        return default
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        found = {"dict": "an object", "float": repr(value)}.get(type(value).__name__, f"a {type(value).__name__}")
        raise RowError(f"field {name!r} is {found}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"field {name!r} is not valid UTF-8 at character {error.start}, expected text") from error
    return value


ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


def _alpaca_to_pair(row: Mapping[str, Any]) -> Pair:
    """The Alpaca prompt (https://github.com/tatsu-lab/stanford_alpaca), with the original's single trailing space."""
    fields = {"instruction": text_of(row, "instruction"), "input": text_of(row, "input", "")}
    prompt = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
    return {"input": prompt.format(**fields), "output": text_of(row, "output")}


def _chip2_to_pair(row: Mapping[str, Any]) -> Pair:
    """Question and answer share one string, marked `<human>: ` and `<bot>: `; the first answer is learnt."""
    parts = text_of(row, "text").split("\n<bot>: ")
    if len(parts) < 2:
        raise RowError(r"field 'text' has no '\n<bot>: ', expected a question and an answer")
    return {"input": parts[0].replace("<human>: ", ""), "output": parts[1]}


def _plain_to_pair(columns: Sequence[str], row: Mapping[str, Any]) -> Pair:
    *source, output = (text_of(row, name) for name in columns)
    return {"input": "".join(source), "output": output}


def plain(*columns: str, inferred: bool = True) -> DatasetFormat:
    """A format whose columns stand as they are: input and output, or for plain language modelling output alone."""
    return DatasetFormat(columns, partial(_plain_to_pair, columns), inferred)


FORMATS: dict[str, DatasetFormat] = {
    "alpaca": DatasetFormat(("instruction", "output"), _alpaca_to_pair),
    "self-instruct": plain("prompt", "completion"),
    "input-output": plain("input", "output"),
    "hh-rlhf": plain("chosen"),
    "text": plain("text"),
    "alpaca-clean": DatasetFormat(("instruction", "output"), _alpaca_to_pair, inferred=False),
    "longform": plain("input", "output", inferred=False),
    "chip2": DatasetFormat(("text",), _chip2_to_pair, inferred=False),
    "oasst1": plain("text", inferred=False),
}


class NamedDataset(NamedTuple):
    """A preset: where it is, and the format of its rows."""

    path: str
    format: str
    options: Mapping[str, str] = {}  # for datasets.load_dataset


DATASETS: dict[str, NamedDataset] = {
    "alpaca": NamedDataset("tatsu-lab/alpaca", "alpaca"),
    "alpaca-clean": NamedDataset("yahma/alpaca-cleaned", "alpaca-clean"),
    "chip2": NamedDataset("laion/OIG", "chip2", {"data_files": "unified_chip2.jsonl"}),
    # a script dataset, which datasets >= 4 does not run: its parquet conversion
    "self-instruct": NamedDataset(
        "yizhongw/self_instruct", "self-instruct", {"revision": "refs/convert/parquet", "data_dir": "self_instruct"}
    ),
    "hh-rlhf": NamedDataset("Anthropic/hh-rlhf", "hh-rlhf"),
    "longform": NamedDataset("akoksal/LongForm", "longform"),
    "oasst1": NamedDataset("timdettmers/openassistant-guanaco", "oasst1"),
}


def infer_format(columns: Iterable[str], where: str) -> str:
    """The first format whose columns are all there."""
    found = set(columns)
    for name, candidate in FORMATS.items():
        if candidate.inferred and found.issuperset(candidate.columns):
            return name
    needs = "; ".join(f"{name}: {', '.join(f.columns)}" for name, f in FORMATS.items() if f.inferred)
    names = ", ".join(sorted(found)) or "(none)"
    raise DataError(f"{where}: no format fits the columns {names}. Needed are, for {needs}")


# ------------------------------------------------------------------------------------
# 5. Loading: Config -> Splits of pairs
#
# Every row of every file becomes PAIR_COLUMNS, written once to an Arrow cache. A row that can't be
# used travels with its problem, so that the count survives the cache, and reject_bad_rows stops or skips.
# To read another kind of file: one function that yields (line, row or RowError), one row in READERS.
# ------------------------------------------------------------------------------------
Numbered = Iterator[tuple[int, Any]]  # (line or row number from 1, the row or a RowError)

SPLIT_NAMES = ("eval", "validation", "test")  # for evaluation, in this order of preference
REJECTED = "rejected.jsonl"
EVAL_SPLIT_SEED = 42  # the original's: the same rows are held out


class Splits(NamedTuple):
    """What a run reads; pairs at first, encoded rows later."""

    train: Any | None
    eval: Any | None


def read_json_lines(stream: Any) -> Numbered:
    """JSON lines, or one JSON array."""
    head = stream.read(1)
    while head.isspace():
        head = stream.read(1)
    stream.seek(0)
    if head == "[":
        try:
            yield from enumerate(json.load(stream), start=1)
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON: {one_line(error)}, expected one array of rows"
            yield getattr(error, "lineno", 1), RowError(reason)
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"not valid JSON: {one_line(error)}, expected one object in a line"
                yield number, RowError(reason, line)


def read_delimited(stream: Any, delimiter: str) -> Numbered:
    """CSV or TSV with a header; every cell is text: an empty one is an empty string, and NA is NA."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than many documents
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header = next(reader, None)
    if header is None:
        return
    if len(set(header)) < len(header):
        doubled = [name for name, count in Counter(header).items() if count > 1]
        raise DataError(f"{stream.name}: the column {doubled[0]!r} stands twice in the header")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, RowError(f"not valid CSV: {error}")
            continue
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif cells:  # no cells: an empty line
            yield number, RowError(f"{len(cells)} fields, expected {len(header)}: {', '.join(header)}")


def read_parquet(stream: Any) -> Numbered:
    """Parquet, a few thousand rows at a time."""
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(stream).iter_batches(4096)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[Any], Numbered]] = {
    ".json": read_json_lines,
    ".jsonl": read_json_lines,
    ".csv": lambda stream: read_delimited(stream, ","),
    ".tsv": lambda stream: read_delimited(stream, "\t"),
    ".parquet": read_parquet,
}


def data_suffix(path: Path) -> str:
    """The suffix that chooses the reader; .gz is looked through."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_file(path: Path) -> Numbered:
    """The rows of one local file.

    Raises:
        DataError: a file that can't be opened, or that breaks off.
    """
    suffix = data_suffix(path)
    try:
        raw = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # noqa: SIM115
        with raw:
            if suffix == ".parquet":
                yield from READERS[suffix](io.BytesIO(raw.read()) if isinstance(raw, gzip.GzipFile) else raw)
            else:
                # bytes that are not UTF-8 become lone surrogates, which text_of finds in the row they belong to
                text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
                yield from READERS[suffix](text)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {one_line(error)}") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise DataError(f"{path}: not a {suffix} file: {one_line(error)}") from error


class RowSource(NamedTuple):
    """Rows before they are pairs: local files, or a dataset that the datasets library has loaded."""

    name: str  # for messages
    files: tuple[Path, ...]
    loaded: Any | None = None

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where, row or RowError) of every row."""
        for path in self.files:
            for number, row in read_file(path):
                yield f"{path}:{number}", row
        if self.loaded is not None:
            for number, row in enumerate(self.loaded, start=1):
                yield f"{self.name}:{number}", row

    def fingerprint(self) -> str:
        """Changes with the content of the files."""
        return digest(*(f"{path}:{file_digest(path)}" for path in self.files), getattr(self.loaded, "_fingerprint", ""))

    def columns(self) -> list[str]:
        """The columns of the first rows; a JSON line may lack those that it leaves empty."""
        if self.loaded is not None:
            return list(self.loaded.column_names)
        rows = (row for _, row in self.rows() if isinstance(row, Mapping))
        return sorted({name for row in itertools.islice(rows, 100) for name in row})


def digest(*parts: Any) -> str:
    """A short hash of what the parts print."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def find_splits(name: str, config: Config) -> dict[str, RowSource]:
    """A dataset's splits by name, before any row is read."""
    path = Path(name).expanduser()
    if name in DATASETS:
        return load_from_hub(DATASETS[name].path, config, **DATASETS[name].options)
    if path.is_file():
        if data_suffix(path) not in READERS:
            raise DataError(f"{path}: unknown kind of file, expected {', '.join(READERS)}, or one of them with .gz")
        return {"train": RowSource(name, (path,))}
    if path.is_dir():
        return find_splits_in_folder(path)
    if path.suffix and data_suffix(path) in READERS:
        raise DataError(f"--dataset {name}: no such file")
    return load_from_hub(name, config)


def find_splits_in_folder(folder: Path) -> dict[str, RowSource]:
    """A folder of data files, or one written by `save_to_disk`."""
    import datasets

    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        with mendable(str(folder), DataError):
            return as_sources(str(folder), datasets.load_from_disk(str(folder)))
    files = sorted(p for p in folder.iterdir() if p.is_file() and data_suffix(p) in READERS and p.name[0] != ".")
    if not files:
        raise DataError(f"{folder}: no data file in it, expected {', '.join(READERS)}, or what save_to_disk writes")
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = re.match(rf"(train|{'|'.join(SPLIT_NAMES)})(?![A-Za-z0-9])", file.name)
        splits[match.group(1) if match else ""].append(file)
    if list(splits) == [""]:
        return {"train": RowSource(str(folder), tuple(files))}
    if "" in splits:
        stray = ", ".join(file.name for file in splits[""])
        raise DataError(f"{folder}: {stray} beside files named after splits: name all train, eval, ..., or none")
    return {split: RowSource(str(folder), tuple(paths)) for split, paths in splits.items()}


def load_from_hub(path: str, config: Config, **options: Any) -> dict[str, RowSource]:
    """A dataset of the hub, all its splits."""
    import datasets

    own = (RuntimeError, datasets.exceptions.DatasetsError)
    with (
        mendable(f"--dataset {path}", DataError, *own),
        mendable(f"--dataset {path}: no local file of that name, and the hub does not give it", DataError),
    ):
        return as_sources(path, datasets.load_dataset(path, **hub_options(config), **options))


def as_sources(name: str, loaded: Any) -> dict[str, RowSource]:
    """What the datasets library loads is one dataset or a dictionary of splits."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {split: RowSource(f"{name}[{split}]", (), dataset) for split, dataset in splits.items()}


PAIR_COLUMNS = ("input", "output", "where", "category", "problem")


def pair_rows(source: RowSource, format_name: str) -> Iterator[dict[str, str]]:
    """Every row as PAIR_COLUMNS. One that can't be used has a `problem`, and in `input` what stood there."""
    to_pair = FORMATS[format_name].to_pair
    for where, row in source.rows():
        pair, category, problem = Pair(input="", output=""), "", ""
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, Mapping):
                raise RowError(f"the row is a {type(row).__name__}, expected an object with fields")
            pair = to_pair(row)
            category = next((row[c] for c in ("category", "source") if isinstance(row.get(c), str)), "")
            if not pair["output"].strip():
                raise RowError("the output is empty, expected something to learn")
        except RowError as error:
            raw = error.raw if isinstance(row, RowError) else row
            pair, problem = Pair(input=json.dumps(raw, default=str), output=""), str(error)
        values = (pair["input"], pair["output"], where, category, problem)
        texts = [value.encode("utf-8", "replace").decode() for value in values]
        yield dict(zip(PAIR_COLUMNS, texts, strict=True))


def load_pairs(source: RowSource, format_name: str, cache_dir: str | None) -> Any:
    """One split as an Arrow dataset of pairs, from the cache if the same content was read before."""
    import datasets

    features = datasets.Features(dict.fromkeys(PAIR_COLUMNS, datasets.Value("string")))
    try:
        return datasets.Dataset.from_generator(
            pair_rows,
            features=features,
            gen_kwargs={"source": source, "format_name": format_name},
            cache_dir=cache_dir,
            fingerprint=digest("pairs", CODE_VERSION, source.name, source.fingerprint(), format_name),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, QLoRAError):
            raise error.__cause__ from error
        raise


CODE_VERSION = file_digest(Path(__file__))  # rows that another version of this file encoded are encoded again


def format_of(name: str, sources: Mapping[str, RowSource], config: Config) -> str:
    """The format of a dataset's rows: the flag, the preset's own, or what the columns tell."""
    source = next(iter(sources.values()))
    columns = source.columns()
    if not columns:
        where, row = next(source.rows(), (name, RowError("no row in it")))
        raise DataError(f"{where}: {row if isinstance(row, RowError) else 'not an object with fields'}")
    if config.data.dataset_format:
        chosen, why = config.data.dataset_format, "--dataset_format"
    elif name in DATASETS:
        chosen, why = DATASETS[name].format, "the preset's"
    else:
        chosen, why = infer_format(columns, name), "inferred from the columns"
    missing = sorted(set(FORMATS[chosen].columns) - set(columns))
    if missing:
        raise DataError(
            f"{name}: no column {', '.join(missing)}, found {', '.join(columns)}. "
            f"The format is {chosen} ({why}); others: {', '.join(FORMATS)}"
        )
    log.info("%s: format %s, %s", name, chosen, why)
    return chosen


def load_splits(config: Config) -> Splits:
    """Every dataset named, as pairs: rows to train on and rows to evaluate on."""
    if config.training.process_index == 0:
        Path(config.training.output_dir, REJECTED).unlink(missing_ok=True)
    parts: dict[str, list[Any]] = {"train": [], "eval": []}
    evaluating = config.training.do_eval or config.training.do_predict
    names = [config.data.dataset]
    if not Path(names[0]).exists():
        names = [name.strip() for name in names[0].split(",") if name.strip()]
    for name in names:
        sources = find_splits(name, config)
        chosen = format_of(name, sources, config)
        held_out = next((split for split in SPLIT_NAMES if split in sources), None) if evaluating else None
        if "train" not in sources and (config.training.do_train or held_out is None):
            raise DataError(f"{name}: no split named train, found {', '.join(sources) or 'none'}")
        for part, split in (("train", "train"), ("eval", held_out)):
            if split in sources:
                rows = load_pairs(sources[split], chosen, config.model.cache_dir)
                log.info("%s: %d rows in split %s", name, len(rows), split)
                parts[part].append(rows)
    splits = Splits(*(reject_bad_rows(joined(part), config) for part in parts.values()))
    if evaluating and splits.eval is None and splits.train is not None:
        splits = split_off(splits.train, config)
    return Splits(
        first_rows(splits.train, config.data.max_train_samples) if needs_train_rows(config) else None,
        first_rows(splits.eval, config.data.max_eval_samples),
    )


def needs_train_rows(config: Config) -> bool:
    """To train, or to compare a merged model on where no rows are held out."""
    args = config.training
    return args.do_train or (args.merged_output_dir is not None and not (args.do_eval or args.do_predict))


def joined(parts: list[Any]) -> Any | None:
    """Datasets one after the other, under a fingerprint that a second run finds again."""
    import datasets

    if len(parts) < 2:
        return parts[0] if parts else None
    whole = datasets.concatenate_datasets(parts)
    whole._fingerprint = digest(*(part._fingerprint for part in parts))
    return whole


def first_rows(rows: Any | None, limit: int | None) -> Any | None:
    """The first rows, or all of them."""
    return rows if rows is None or limit is None or limit >= len(rows) else rows.select(range(limit))


def split_off(rows: Any, config: Config) -> Splits:
    """Hold rows out for evaluation, shuffled with the original's seed."""
    size = config.data.eval_dataset_size
    if "eval_dataset_size" not in config.given and len(rows) < 4 * size:
        size = max(1, len(rows) // 10)
        log.info("a tenth of %d rows, %d, is held out; --eval_dataset_size sets another number", len(rows), size)
    count = math.ceil(size if size >= 1 else size * len(rows))
    if config.training.do_train and count >= len(rows):
        raise DataError(f"--eval_dataset_size {size:g} leaves nothing to train on: the dataset has {len(rows)} rows")
    if count >= len(rows):
        return Splits(None, rows)
    if any(rows["category"]):
        return Splits(*(rows.select(part) for part in stratified(rows["category"], count)))
    parts = rows.train_test_split(test_size=count, shuffle=True, seed=EVAL_SPLIT_SEED)
    return Splits(parts["train"], parts["test"])


def stratified(categories: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and `count` to hold out, every category by its share; one with one row breaks nothing."""
    order = torch.randperm(len(categories), generator=torch.Generator().manual_seed(EVAL_SPLIT_SEED)).tolist()
    members: dict[str, list[int]] = defaultdict(list)
    for row in order:
        members[categories[row]].append(row)
    shares = {name: len(rows) * count / len(categories) for name, rows in members.items()}
    taken = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: taken[name] - shares[name])[: count - sum(taken.values())]:
        taken[name] += 1  # largest remainders first
    held_out = {row for name, rows in members.items() for row in rows[: taken[name]]}
    return [row for row in order if row not in held_out], [row for row in order if row in held_out]


def without(rows: Any, left_out: list[int]) -> Any:
    """The rows that do not have these numbers, in their order."""
    return rows.select(sorted(set(range(len(rows))) - set(left_out)))


def reject_bad_rows(rows: Any | None, config: Config) -> Any | None:
    """Rows without a problem. The others stop the run, by a DataError that counts them, or go to rejected.jsonl."""
    if rows is None:
        return None
    bad = [i for i, problem in enumerate(rows["problem"]) if problem]
    if bad:
        first = "{where}: {problem}".format(**rows[bad[0]])
        if config.data.on_bad_rows == "stop":
            more = f" (and {len(bad) - 1} more such rows)" if len(bad) > 1 else ""
            raise DataError(f"{first}{more}; --on_bad_rows skip leaves them out")
        rejected = Path(config.training.output_dir, REJECTED)
        if config.training.process_index == 0:
            rejected.parent.mkdir(parents=True, exist_ok=True)
            with rejected.open("a", encoding="utf-8") as file:
                for row in rows.select(bad):
                    raw = json.loads(row.get("input", "null"))
                    file.write(json.dumps({"where": row["where"], "reason": row["problem"], "row": raw}) + "\n")
        log.warning("%d of %d rows left out, the first: %s; all in %s", len(bad), len(rows), first, rejected)
        rows = without(rows, bad)
    if len(rows) == 0:
        raise DataError(f"--dataset {config.data.dataset}: no row in it that can be used")
    return rows


# ------------------------------------------------------------------------------------
# 6. Tokenizer: special tokens and padding
#
# What leaves is a fast tokenizer with BOS (where it has one), EOS and pad ids that lie within the model's embedding.
# ------------------------------------------------------------------------------------
EMPTY_SPECIALS = (
    "--model_name_or_path {}: the tokenizer's special tokens are empty strings, as in early LLaMA conversions: "
    "give --tokenizer_patch examples/llama1_tokenizer"
)
PATCHED_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Tokens that models keep unused: they make a pad that no text contains. In order of preference.
SPARE_TOKENS = re.compile(
    r"<\|finetune_right_pad_id\|>|<\|?pad(ding)?\|?>|\[PAD\]|<\|reserved_special_token_\d+\|>|<unused\d+>|<\|unused\d+\|>|<\|reserved_\d+\|>",
    re.IGNORECASE,
)


def tokenizer_files(name: str, config: Config) -> Path:
    """The folder that holds a model's tokenizer files, fetched if need be."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges*", "added_tokens.json", "config.json"]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub_options(config)))


def patched_tokenizer_folder(name: str, patch: str, into: Path, config: Config) -> Path:
    """The model's tokenizer files with those of the patch laid over them, key by key."""
    if not any((Path(patch) / file).is_file() for file in PATCHED_FILES):
        raise ConfigError(f"--tokenizer_patch {patch}: expected a folder with {' or '.join(PATCHED_FILES)}")
    for file in tokenizer_files(name, config).iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt"):
            shutil.copyfile(file, into / file.name)
    for file_name in PATCHED_FILES:
        own, over = into / file_name, Path(patch) / file_name
        merged = read_json(own) if own.is_file() else {}
        merged |= read_json(over) if over.is_file() else {}
        own.write_text(json.dumps(merged), encoding="utf-8")
    return into


def read_json(path: Path) -> Any:
    """A JSON file's content; a ConfigError where it can't be read."""
    with mendable(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


def is_bare_llama(folder: Path, model_type: str) -> bool:
    """Whether SentencePiece's tokenizer.model is all that a folder has of its tokens.

    AutoTokenizer reads that as a generic tokenizer with other ids, silently, unless the folder's tokenizer_config.json
    names the right class; LlamaTokenizer reads it rightly in any case.
    """
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return bare and model_type in ("llama", "mistral", "mixtral")


def load_tokenizer(config: Config, model_config: PretrainedConfig, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (`folder` is the model's folder or hub id) with the overrides of the flags.

    Raises:
        ConfigError: no such tokenizer, a token that is not in its vocabulary, no end-of-sequence token.
    """
    model = config.model
    options = hub_options(config) | {"trust_remote_code": model.trust_remote_code}
    if not model.use_fast_tokenizer:
        log.info("use_fast_tokenizer False: every tokenizer is a fast one today")
    what = f"--model_name_or_path {model.model_name_or_path}: its tokenizer does not load"
    with tempfile.TemporaryDirectory() as scratch, mendable(what):
        if model.tokenizer_patch:
            folder = str(patched_tokenizer_folder(folder, model.tokenizer_patch, Path(scratch), config))
        bare = is_bare_llama(Path(folder), model_config.model_type)
        try:
            tokenizer = (LlamaTokenizer if bare else AutoTokenizer).from_pretrained(folder, **options)
        except RecursionError as error:  # what an empty unk_token leads to
            raise ConfigError(EMPTY_SPECIALS.format(model.model_name_or_path)) from error
    if "" in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
        raise ConfigError(EMPTY_SPECIALS.format(model.model_name_or_path))
    tokenizer.name_or_path = model.model_name_or_path
    set_special_tokens(tokenizer, config, model_config)
    return tokenizer


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, config: Config, model_config: PretrainedConfig) -> None:
    """Overrides, then a pad where there is none, then the checks.

    The embedding matrix is never resized: a resized one would be written into every adapter.
    """
    vocabulary = tokenizer.get_vocab()
    rows = getattr(model_config.get_text_config(), "vocab_size", None) or len(tokenizer)
    for name in ("pad_token", "eos_token", "bos_token", "unk_token"):
        token = getattr(config.model, name)
        if token is not None and vocabulary.get(token, rows) >= rows:
            raise ConfigError(f"--{name} {token}: not in the model's vocabulary of {rows} tokens")
        if token is not None:
            setattr(tokenizer, name, token)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token: name one of its tokens with --eos_token")
    if not tokenizer.pad_token or vocabulary.get(str(tokenizer.pad_token), rows) >= rows:
        spare = [token for token, i in vocabulary.items() if SPARE_TOKENS.fullmatch(token) and i < rows]
        spare.sort(key=lambda token: ("pad" not in token.lower(), vocabulary[token]))
        tokenizer.pad_token = spare[0] if spare else tokenizer.unk_token or tokenizer.eos_token
        log.info("pad token: %s (the tokenizer has none that the model knows)", tokenizer.pad_token)
    for name in ("eos_token_id", "bos_token_id"):
        number = getattr(tokenizer, name) or 0
        if number >= rows:
            raise ConfigError(f"the tokenizer's {name} {number} lies outside the model's {rows} tokens")


# ------------------------------------------------------------------------------------
# 7. Encoding: Pair -> ids and labels -> batch
#
# A row is tokenised once, before training, into {input_ids, labels, length, cut, where, problem}, in parallel and
# cached. BOS and EOS are added as ids; text is tokenised without special tokens, so `</s>` in a row stays text.
# ------------------------------------------------------------------------------------
class Limits(NamedTuple):
    """How long a row may be, in tokens."""

    source: int  # input with BOS
    target: int  # output with EOS
    total: int | None = None  # both together; replaces the two above

    def __str__(self) -> str:
        return f"model_max_len {self.total}" if self.total else f"source {self.source}, target {self.target}"


class Encoded(NamedTuple):
    """A row as it is trained."""

    input_ids: list[int]
    labels: list[int]  # the ids that are learnt, IGNORE elsewhere
    cut: bool  # whether a limit took something away


def join_ids(
    source: list[int], target: list[int], limits: Limits, train_on_source: bool = False, bos: int = 1
) -> Encoded:
    """Input ids (with BOS) and output ids (with EOS), cut to the limits, joined and labelled.

    `bos` is the number of ids at the beginning that no cut takes away: 1, or 0 for a tokenizer without BOS.
    Two limits cut each side on the right, so a cut output has no EOS. One limit for both cuts the input from the left,
    after BOS, down to a quarter of the limit, so that the answer's marker stays, and then the output on the right.
    """
    if limits.total is None:
        kept_source, kept_target = source[: limits.source], target[: limits.target]
    else:
        kept_source = cut_left(source, max(limits.total - len(target), limits.total // 4), bos)
        kept_target = target[: limits.total - len(kept_source)]
    labels = kept_source + kept_target if train_on_source else [IGNORE] * len(kept_source) + kept_target
    cut = len(kept_source) + len(kept_target) < len(source) + len(target)
    return Encoded(kept_source + kept_target, labels, cut)


def cut_left(ids: list[int], limit: int, bos: int) -> list[int]:
    """The first `bos` ids and the last ones."""
    return ids if len(ids) <= limit else ids[: min(bos, limit)] + ids[len(ids) - max(limit - bos, 0) :]


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts as ids, without special tokens around them or parsed in them."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


def source_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Inputs as ids, with BOS where the tokenizer has one."""
    return [bos_ids(tokenizer) + ids for ids in token_ids(texts, tokenizer)]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS as a list, empty for a tokenizer without it."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_pairs(
    pairs: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, limits: Limits, train_on_source: bool = False
) -> list[Encoded]:
    """Pairs, given as columns, as ids and labels."""
    sources = source_ids(pairs["input"], tokenizer)
    targets = [[*ids, tokenizer.eos_token_id] for ids in token_ids(pairs["output"], tokenizer)]
    bos = len(bos_ids(tokenizer))
    return [join_ids(s, t, limits, train_on_source, bos) for s, t in zip(sources, targets, strict=True)]


def encode_pair(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, limits: Limits, train_on_source: bool = False
) -> Encoded:
    """One pair as ids and labels."""
    return encode_pairs({"input": [pair["input"]], "output": [pair["output"]]}, tokenizer, limits, train_on_source)[0]


def encode_batch(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, limits: Limits, train_on_source: bool
) -> dict[str, list[Any]]:
    """Columns of pairs -> columns of encoded rows, for datasets.map."""
    rows = encode_pairs(batch, tokenizer, limits, train_on_source)
    problems = ["" if any(i != IGNORE for i in row.labels[1:]) else "no token left to learn" for row in rows]
    return {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "cut": [row.cut for row in rows],
        "problem": problems,
    }


def limits_of(config: Config) -> Limits:
    """The limits that the flags set."""
    data = config.data
    return Limits(data.source_max_len, data.target_max_len, data.model_max_len)


def encode_dataset(pairs: Any, tokenizer: PreTrainedTokenizerBase, config: Config, name: str) -> Any:
    """Every pair encoded, in parallel, from the cache where the same rows were encoded before."""
    limits, on_source = limits_of(config), config.data.train_on_source
    ids = (tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id)
    workers = min(os.cpu_count() or 1, len(pairs) // 20_000)  # below that, starting processes takes longer
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
    return pairs.map(
        encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "limits": limits, "train_on_source": on_source},
        remove_columns=["input", "output", "category"],
        num_proc=workers if workers > 1 else None,
        desc=f"Encoding {name} rows",
        new_fingerprint=digest(CODE_VERSION, pairs._fingerprint, *ids, limits, on_source),
    )


def encode_splits(splits: Splits, tokenizer: PreTrainedTokenizerBase, config: Config) -> Splits:
    """Both splits encoded; too long rows dropped from training where the flags say so; what was cut is logged."""
    limits = limits_of(config)
    parts: list[Any] = []
    for name, pairs in zip(Splits._fields, splits, strict=True):
        if pairs is None:
            parts.append(None)
            continue
        rows = encode_dataset(pairs, tokenizer, config, name)
        cut = [i for i, was_cut in enumerate(rows["cut"]) if was_cut]
        if cut and name == "train" and limits.total is not None and config.data.skip_excess_length:
            log.info("%d of %d training rows are longer than %s: left out", len(cut), len(rows), limits)
            rows = without(rows, cut)
            if len(rows) == 0:
                raise DataError(f"--{limits}: every row is longer; raise it or give --skip_excess_length False")
        elif cut:
            share = 100 * len(cut) / len(rows)
            log.info("%s: %.1f %% of %d rows were cut to the limits %s", name, share, len(rows), limits)
        parts.append(reject_bad_rows(rows, config))
    return Splits(*parts)


class TokenStatistics(NamedTuple):
    """What a run needs to know about its encoded rows."""

    fingerprint: str  # of every id and label, in order
    tokens: int
    learnt: int
    largest_id: int
    longest: int


def token_statistics(rows: Any) -> TokenStatistics:
    """One pass over the encoded rows, in bounded memory."""
    hasher, tokens, learnt, largest = hashlib.sha256(), 0, 0, 0
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        for column in ("input_ids", "labels"):
            values = batch[column].combine_chunks()
            lengths, flat = values.value_lengths().to_numpy(), values.flatten().to_numpy()
            hasher.update(lengths.tobytes() + flat.tobytes())
            if column == "input_ids":
                tokens, largest = tokens + len(flat), max(largest, int(flat.max(initial=0)))
            else:
                learnt += int((flat != IGNORE).sum())
    return TokenStatistics(hasher.hexdigest()[:16], tokens, learnt, largest, max(rows["length"]))


@dataclass
class CausalLMCollator:
    """Encoded rows -> tensors of shape (rows, longest row), padded on one side.

    The attention mask comes from the lengths, never from `id != pad`: pad is often EOS, which is learnt.
    """

    pad_id: int
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Keys: input_ids, attention_mask, labels (where the rows have them), where (ditto: a list of strings)."""
        batch: dict[str, Any] = {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": self._pad([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "labels" in rows[0]:
            # nothing predicts the first token of a row, and the Trainer must not count it
            batch["labels"] = self._pad([[IGNORE, *row["labels"][1:]] for row in rows], IGNORE)
        if "where" in rows[0]:
            batch["where"] = [row["where"] for row in rows]
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.side)


# ------------------------------------------------------------------------------------
# 8. Model: data types, quantisation, devices
#
# What leaves is the frozen base. Linear layers but the head are in 4 or 8 bits; embeddings, norms and head are in the
# load dtype. No module is cast up: RMSNorm and LayerNorm compute in float32 inside, whatever their weights are.
# ------------------------------------------------------------------------------------
def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of matrix products."""
    train = config.training
    return torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32


def load_dtype(config: Config) -> torch.dtype:
    """The dtype of what is not quantised. fp16 loads in float32 on purpose: it is unstable as a storage type."""
    return torch.bfloat16 if config.training.bf16 else torch.float32


ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what `accelerate launch` sets


def device_map(config: Config) -> Any:
    """Where the layers go: all on this process's GPU, over all GPUs of a lone process, or the CPU."""
    if config.training.deepspeed or config.training.fsdp or "true" in map(os.environ.get, ENGINES):
        return None  # the engine places them
    if config.training.use_cpu or not torch.cuda.is_available():
        return {"": "cpu"}
    if "LOCAL_RANK" in os.environ:  # device_map="auto" is refused by accelerate there
        return {"": int(os.environ["LOCAL_RANK"])}
    return "auto"


def is_prequantised(model_config: PretrainedConfig) -> bool:
    """Whether the checkpoint itself is quantised."""
    return getattr(model_config, "quantization_config", None) is not None


def quantisation_config(config: Config) -> Any | None:
    """What bitsandbytes is told. For bits 4 and 8 only: with both switches off it quantises to 4 bit all the same."""
    quant = config.quant
    if quant.bits not in (4, 8):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=quant.bits == 4,
        load_in_8bit=quant.bits == 8,
        llm_int8_threshold=6.0,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_compute_dtype=compute_dtype(config),
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_quant_type=quant.quant_type,
    )


def gguf_file(name: str) -> Path | None:
    """The .gguf file that a base model is, or that lies in its folder in place of a model."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ConfigError(f"--model_name_or_path {name}: {len(files)} .gguf files in it, name one of them")
        return files[0] if files else None
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def load_whole(name: str, folder: str | Path, **options: Any) -> Any:
    """A model, refused where its checkpoint lacks weights: transformers draws them at random and only warns."""
    with mendable(f"--model_name_or_path {name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"--model_name_or_path {name}: {len(missing)} weights are not in it, first {missing[0]}")
    own = getattr(model, "generation_config", None)
    if own is not None and not own.do_sample and any(getattr(own, name, None) for name in ("temperature", "top_p")):
        own.do_sample = True  # as published LLaMA-2 has it: values without their switch, which can't be saved today
    return model


def dequantised_gguf(path: Path, cache_dir: str | None) -> Path:
    """A folder in bf16 with the weights and the tokenizer of a .gguf file, made once and kept in the cache.

    bf16 keeps 8 bits of mantissa, more than the at most 8 bits that such a file stores for a weight.
    """
    from huggingface_hub.constants import HF_HOME

    stat = path.stat()
    root = Path(cache_dir or HF_HOME) / "qlora-gguf"
    folder = root / f"{path.stem}-{digest(path.resolve(), stat.st_size, stat.st_mtime_ns)}"
    if folder.is_dir():
        return folder
    log.info("%s: dequantising into %s, once", path, folder)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        with mendable(f"--model_name_or_path {path}"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = load_whole(str(path), path.parent, gguf_file=path.name, dtype=torch.float32)
        if isinstance(model.config.eos_token_id, int):  # transformers 5.17 takes BOS for EOS
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        # transformers refuses to save what came from a gguf file unless it forgets that
        model.hf_quantizer.remove_quantization_config(model)
        model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        part = Path(scratch) / "model"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def model_folder(config: Config) -> str:
    """Where transformers loads the base from: the folder or hub id given, or the folder made from a .gguf file."""
    name = config.model.model_name_or_path
    gguf = gguf_file(name)
    return str(dequantised_gguf(gguf, config.model.cache_dir)) if gguf else name


def load_model_config(config: Config, folder: str) -> PretrainedConfig:
    """The base model's configuration, with --rope_scaling in it."""
    model = config.model
    with mendable(f"--model_name_or_path {model.model_name_or_path}"):
        code = model.trust_remote_code
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=code, **hub_options(config))
    rope = rope_parameters(model.rope_scaling)
    if rope is not None:
        text_config = model_config.get_text_config()
        own, kinds = getattr(text_config, "rope_parameters", None), ("default", *ROPE_INIT_FUNCTIONS)
        kind = rope.get("rope_type")
        if not own:
            raise ConfigError(f"--rope_scaling: a {model_config.model_type} model has no rotary embedding")
        if kind not in kinds:
            raise ConfigError(f"--rope_scaling: rope_type {kind!r}, expected one of {', '.join(kinds)}")
        if kind != "default" and "factor" not in rope:
            raise ConfigError(f"--rope_scaling: {kind} needs a factor, how much longer the context gets")
        text_config.rope_parameters = {**own, **rope}
    return model_config


def attention_kernel(config: Config) -> str | None:
    """The attention implementation asked for; sdpa where flash-attn is missing."""
    from transformers.utils import is_flash_attn_2_available

    wanted = config.model.attn_implementation
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        log.warning("attn_implementation flash_attention_2: flash-attn is not installed here, using sdpa")
        return "sdpa"
    return wanted


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of every linear layer except the output head."""
    kinds = (torch.nn.Linear, Conv1D)  # bitsandbytes' derive from nn.Linear; Conv1D is GPT-2's
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]


class Quirk(NamedTuple):
    """What a family of models needs before it is loaded."""

    applies: Callable[[PretrainedConfig], bool]
    mend: Callable[[], None]
    why: str


def _plain_falcon_linear() -> None:
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[assignment, misc]


QUIRKS = (
    Quirk(
        lambda config: config.model_type == "falcon",
        _plain_falcon_linear,
        "transformers quantises what is exactly nn.Linear; Falcon's subclass of it computes the same and stays whole",
    ),
)


def load_base(config: Config, model_config: PretrainedConfig, folder: str, **options: Any) -> Any:
    """The base model as these options have it."""
    for quirk in (quirk for quirk in QUIRKS if quirk.applies(model_config)):
        quirk.mend()
    shared = {"config": model_config, "trust_remote_code": config.model.trust_remote_code} | hub_options(config)
    options = {name: value for name, value in (shared | options).items() if value is not None}
    return load_whole(config.model.model_name_or_path, folder, **options)


def load_model(config: Config, model_config: PretrainedConfig, folder: str) -> PreTrainedModel:
    """The base model to train or use, quantised and placed."""
    options: dict[str, Any] = {
        "dtype": load_dtype(config),
        "device_map": device_map(config),
        "attn_implementation": attention_kernel(config),
    }
    prequantised = is_prequantised(model_config)
    init = config.lora.init_lora_weights
    if prequantised and (config.quant.full_finetune or lora_start_problem(init, quantised=True)):
        what = "--full_finetune" if config.quant.full_finetune else f"--init_lora_weights {init}"
        raise ConfigError(f"{what}: the weights of {config.model.model_name_or_path} are quantised already")
    if prequantised:
        log.info("the checkpoint is already quantised and is loaded as it is; bits and quant_type are its own")
    else:
        options["quantization_config"] = quantisation_config(config)
    if options["device_map"] == "auto":
        limit = f"{config.quant.max_memory_MB}MB"
        options["max_memory"] = dict.fromkeys(range(torch.cuda.device_count()), limit)
    model = load_base(config, model_config, folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # or the first evaluation on such a CPU repacks the 4-bit weights in place, and training goes on with others
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    whole = [name for name in linear_layers(model) if type(model.get_submodule(name)).__module__.startswith("torch")]
    if whole and not prequantised and config.quant.bits < 16:
        log.warning("%d linear layers are not quantised, their class is unknown: %s, ...", len(whole), whole[0])
    # keeps the Trainer from wrapping the one model in DataParallel where this process sees several GPUs
    model.is_parallelizable = model.model_parallel = True
    model.config.use_cache = False  # of no use in training; generation turns it on
    return model


def special_ids_into_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's BOS, EOS and pad ids, also in the model's config."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))


def parameter_report(model: torch.nn.Module) -> list[str]:
    """The original's line on trainable parameters, with true counts, and one line for each dtype."""
    by_dtype: Counter[str] = Counter()
    trainable = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which counts as what it stands for
        size = math.prod(packed.shape) if packed else parameter.numel()
        trainable += size if parameter.requires_grad else 0
        by_dtype[f"{packed.quant_type} (packed)" if packed else str(parameter.dtype).removeprefix("torch.")] += size
    total = sum(by_dtype.values())
    lines = [f"trainable params: {trainable} || all params: {total} || trainable: {100 * trainable / total}"]
    return lines + [f"{name}: {size} ({100 * size / total:.1f} %)" for name, size in by_dtype.most_common()]


# ------------------------------------------------------------------------------------
# 9. LoRA: the base -> a model whose adapters train
#
# Adapters go on every linear layer but the output head, which is found by identity and not by a name. They are kept in
# float32 and computed in the compute dtype. A full fine-tune freezes the embeddings instead.
# ------------------------------------------------------------------------------------
LAYER_GROUPS = {  # of --lora_modules, by what the families call the blocks that hold the layers
    "attn": re.compile(r"(.*\.)?(self_|cross_)?(attn|attention|attn_attention)\..*"),
    "mlp": re.compile(r"(.*\.)?(mlp|ffn|ff|feed_forward|block_sparse_moe)\..*|(.*\.)?fc\d"),
}


def leaf_name(name: str) -> str:
    """The last part of a module's full name."""
    return name.rpartition(".")[2]


def is_trained_layer(name: str, frozen: int) -> bool:
    """Whether what has this name lies outside the first `frozen` layers; its first number is the layer."""
    index = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return index is None or index >= frozen


def layers_to_freeze(model: PreTrainedModel, lora: LoraArguments) -> int:
    """How many layers from the bottom stay as they are; all of them is a ConfigError."""
    layers: int = model.config.get_text_config().num_hidden_layers or 0
    frozen = lora.layers_to_freeze or int(lora.layer_freeze_ratio * layers)
    if frozen >= layers:
        raise ConfigError(f"--layers_to_freeze {frozen}: the model has {layers} layers, nothing would train")
    return frozen


def lora_targets(model: PreTrainedModel, lora: LoraArguments) -> list[str]:
    """Names for peft: leaf names where they say the same, which reads better in adapter_config.json, else full ones."""
    layers, frozen = linear_layers(model), layers_to_freeze(model, lora)
    wanted = [name for name in layers if is_trained_layer(name, frozen)]
    names = {name.strip() for name in lora.lora_modules.split(",")}
    if names != {"all"}:
        tests = {name: LAYER_GROUPS.get(name, re.compile(rf"(.*\.)?{re.escape(name)}")) for name in names}
        for name, test in tests.items():
            if not any(test.fullmatch(full) for full in wanted):
                found = ", ".join(sorted({leaf_name(full) for full in layers}))
                raise ConfigError(f"--lora_modules: no linear layer is called {name!r}, the model has {found}")
        wanted = [full for full in wanted if any(test.fullmatch(full) for test in tests.values())]
    leaves = {leaf_name(full) for full in wanted}
    named = {name for name, _ in model.named_modules() if leaf_name(name) in leaves}
    return sorted(leaves) if named == set(wanted) else wanted


def whole_modules(model: PreTrainedModel, names: str | None) -> list[str] | None:
    """--modules_to_save as a list; a name that no module has is a ConfigError."""
    wanted = [name.strip() for name in names.split(",")] if names else None
    for name in wanted or []:
        if not any(f".{full}".endswith(f".{name}") for full, _ in model.named_modules()):
            raise ConfigError(f"--modules_to_save: the model has no module called {name!r}")
    return wanted


def lora_config(model: PreTrainedModel, lora: LoraArguments) -> Any:
    """The flags as peft's configuration."""
    booleans = {"true": True, "false": False}
    init: Any = booleans.get(lora.init_lora_weights.lower(), lora.init_lora_weights.lower())
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=lora.lora_dropout,
        target_modules=lora_targets(model, lora),
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=init,
        # the same rank everywhere: EVA's own choice of ranks would change with the batches it happened to see
        eva_config=EvaConfig(rho=1.0) if init == "eva" else None,
        modules_to_save=whole_modules(model, lora.modules_to_save),
        task_type="CAUSAL_LM",
    )


def attach_adapters(model: PreTrainedModel, config: Config, adapter: str | None) -> Any:
    """The model with exactly one adapter: a fresh one, drawn from the seed, or the one found at `adapter`."""
    set_seed(config.training.seed)  # loading draws random numbers; a seed gives one initialisation
    upcast = config.lora.lora_dtype == "float32"
    what = f"adapter {adapter}" if adapter else "LoRA flags"
    with mendable(f"{what} on {config.model.model_name_or_path}", ConfigError, RuntimeError):  # shapes that differ
        if adapter is None:
            adapted = get_peft_model(model, lora_config(model, config.lora), autocast_adapter_dtype=upcast)
        else:
            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=upcast)
    for name, parameter in adapted.named_parameters() if not upcast else ():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    if adapter is None and takes_from_base(adapted.peft_config["default"].init_lora_weights):
        # what peft took out of the base's weights; see fit_to_base
        adapted.lora_start = {name: p.detach().cpu().clone() for name, p in get_peft_model_state_dict(adapted).items()}
    return adapted


def takes_from_base(start: Any) -> bool:
    """Whether adapters that start so change the base: W becomes W - s B A."""
    return isinstance(start, str) and start.startswith(("pissa", "olora", "corda"))


def fit_to_base(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Turn a saved adapter on a base changed by its start, B' A', into one on the base as published.

    (W - s B' A') + s B A = W + s [B, -B'] [A; A']: twice the rank, at the same scale s.
    """
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights, config = load_file(file), read_json(config_file)
    for name in (name for name in weights if ".lora_A." in name or ".lora_B." in name):
        b = ".lora_B." in name
        first = start[name].to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], -first if b else first], dim=int(b))
    save_file(weights, file, metadata={"format": "pt"})
    alpha = config["lora_alpha"] * (math.sqrt(2) if config["use_rslora"] else 2)
    changed = {"r": 2 * config["r"], "lora_alpha": alpha, "init_lora_weights": True}
    config_file.write_text(json.dumps(config | changed, indent=2), encoding="utf-8")


@dataclass
class EvaBatches:
    """For EVA's running decomposition of the layers' inputs: batches of several times as many tokens as its rank."""

    rows: list[list[int]]
    pad_id: int
    rank: int

    def __len__(self) -> int:
        return 1000  # after which it is not going to settle; peft would go on for ever

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        source, collate = itertools.cycle(self.rows), CausalLMCollator(self.pad_id)
        for _ in range(len(self)):
            batch = [{"input_ids": next(source)}]
            while sum(len(row["input_ids"]) for row in batch) < 8 * self.rank:
                batch.append({"input_ids": next(source)})
            yield collate(batch)
        raise ConfigError(f"--init_lora_weights eva: not settled after {len(self)} batches; lower --lora_r")


def start_from_inputs(model: Any, rows: Any, pad_id: int, config: Config) -> None:
    """EVA (https://arxiv.org/abs/2410.07170): A starts as the main directions of each layer's inputs."""
    batches: Any = EvaBatches(rows["input_ids"], pad_id, config.lora.lora_r)
    with mendable("--init_lora_weights eva", ConfigError, RuntimeError):
        initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)


def make_trainable(model: PreTrainedModel, config: Config, adapter: str | None) -> Any:
    """Adapters or, for a full fine-tune, all weights but embeddings, what is tied to them, and frozen layers."""
    if not config.quant.full_finetune:
        return attach_adapters(model, config, adapter)
    frozen = layers_to_freeze(model, config.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained_layer(name, frozen))
    model.get_input_embeddings().requires_grad_(False)
    return model


# ------------------------------------------------------------------------------------
# 10. Checkpoints: whole or absent
#
# A checkpoint is written into a hidden folder, flushed to disk and renamed. Its checkpoint.json says whose it is
# and lists its files with their sizes; a folder that differs is passed over. `completed` comes last.
# ------------------------------------------------------------------------------------
MANIFEST = "checkpoint.json"
COMPLETED = "completed"
STAGING = ".saving-"  # prefix of the hidden folders that a checkpoint or final model is written into
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class Start(NamedTuple):
    """Where a run begins."""

    train: bool
    checkpoint: Path | None = None  # resume from it
    weights: str | None = None  # an adapter, or for a full fine-tune a model, to begin from or to use
    found: Path | None = None  # what was found of an earlier run, and must belong to this one
    note: str = ""


def identity(config: Config, data: TokenStatistics | None) -> dict[str, Any]:
    """What a checkpoint belongs to: it can't be continued with another."""
    names = ["model_name_or_path", "bits", "full_finetune"]
    names += ["quant_type", "double_quant"] if config.quant.bits == 4 else []
    if not config.quant.full_finetune:
        names += [f.name for f in dataclasses.fields(LoraArguments)]
    values = {name: config.flags[name] for name in names}
    base = Path(config.model.model_name_or_path).expanduser()
    values["model_name_or_path"] = str(base.resolve()) if base.exists() else config.model.model_name_or_path
    return values | ({"dataset (the encoded training rows)": data.fingerprint} if data else {})


def check_identity(folder: Path, wanted: Mapping[str, Any], training: bool) -> None:
    """Refuse to go on with what belongs to another run, by a ConfigError that names what differs."""
    file = folder / (COMPLETED if (folder / COMPLETED).is_file() else MANIFEST)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s does not say what it belongs to: model, bits and dataset are not compared", folder)
        return
    differing = [f"{name} was {found[name]}, is {new}" for name, new in wanted.items() if found.get(name, new) != new]
    if differing:
        raise ConfigError(
            f"{folder} belongs to another run: {'; '.join(differing)}. "
            "Give the same flags, another --output_dir, or --overwrite_output_dir to start anew"
            + (", or --do_train False to evaluate or predict with what was trained" if training else "")
        )


def adapter_folder(folder: Path) -> Path | None:
    """Where a folder keeps its adapter: at its top or, as the original did, in adapter_model/."""
    for place in (folder, folder / "adapter_model"):
        if (place / "adapter_config.json").is_file() and any((place / name).is_file() for name in ADAPTER_FILES):
            return place
    return None


def has_weights(folder: Path, full_finetune: bool) -> bool:
    """Whether a trained adapter, or for a full fine-tune a trained model, lies in a folder."""
    if full_finetune:
        return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return adapter_folder(folder) is not None


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint can't be used, or None if it is whole."""
    manifest = folder / MANIFEST
    try:
        if manifest.is_file():
            for name, size in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
                if (folder / name).stat().st_size != size:
                    return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            return None
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # another program's, or the original's
        for file in folder.rglob("*.safetensors"):
            safe_open(file, "pt")
        broken = [file.name for file in folder.glob("*.pt") if not zipfile.is_zipfile(file)]
        if broken:
            return f"{broken[0]} breaks off"
    except LIBRARY_ERRORS as error:
        return one_line(error)
    return None if adapter_folder(folder) or (folder / "config.json").is_file() else "no weights in it"


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest (by number) first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; a torn one is passed over with a warning."""
    for folder in checkpoints_in(output_dir):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        log.warning("%s is not whole (%s): passed over", folder, problem)
    return None


def asks_for_more(config: Config, completed: Mapping[str, Any]) -> bool:
    """Whether a run wants more steps or epochs than a completed one had."""
    train = config.training
    if train.max_steps > 0:
        return train.max_steps > completed.get("step", math.inf)
    return train.num_train_epochs > completed.get("epoch", math.inf) + 1e-6


def find_start(config: Config) -> Start:
    """Resume, begin anew, or use what is finished.

    Raises:
        ConfigError: --resume_from_checkpoint names nothing whole; more steps are asked of a run without checkpoints.
    """
    train, output, final = config.training, Path(config.training.output_dir), final_folder(config)
    given, full = config.model.adapter_name_or_path, config.quant.full_finetune
    picked = train.resume_from_checkpoint
    if picked and str(picked).lower() not in ("true", "false"):
        problem = checkpoint_problem(Path(picked))
        if problem:
            raise ConfigError(f"--resume_from_checkpoint {picked}: not a whole checkpoint: {problem}")
        last: Path | None = Path(picked)
    else:
        last = None if train.overwrite_output_dir else find_last_checkpoint(output)
    completed = read_completed(output)
    if not train.do_train:
        places = (final if completed is not None else None, last, final)  # the newest weights first
        place = None if given else next((place for place in places if place and has_weights(place, full)), None)
        weights = str(adapter_folder(place) or place) if place else given
        return Start(False, weights=weights, found=output if place == final else place)
    if completed is not None and not train.overwrite_output_dir and has_weights(final, full):
        if not asks_for_more(config, completed):
            steps = completed.get("step", "?")
            note = f"{output} holds a completed run of {steps} steps: it is used, not trained again"
            return Start(False, weights=str(adapter_folder(final) or final), found=output, note=note)
        if last is None:
            raise ConfigError(
                f"{output} holds a completed run but no checkpoint to go on from; begin another from its adapter with "
                f"--adapter_name_or_path {final} and another --output_dir"
            )
    if last is not None and not (last / "optimizer.pt").is_file() and not any(last.glob("global_step*")):
        log.warning("%s holds no optimizer state: the resumed run will differ from an uninterrupted one", last)
    if last is not None:
        return Start(True, checkpoint=last, weights=given, found=last, note=f"resuming from {last}")
    return Start(True, weights=given)


def read_completed(output: Path) -> dict[str, Any] | None:
    """What `completed` says, or None without it; the original's is an empty file."""
    try:
        text = (output / COMPLETED).read_text(encoding="utf-8")
        return dict(json.loads(text)) if text.strip() else {}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if os.name == "nt":
        return  # Windows opens no folder, and flushes no file that is open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    aside.replace(path)


def name_base(folder: Path, name: str) -> None:
    """Write the base as the user named it, not the folder that a .gguf file was converted into, into an adapter."""
    file = folder / "adapter_config.json"
    if file.is_file():
        file.write_text(json.dumps(read_json(file) | {"base_model_name_or_path": name}, indent=2), encoding="utf-8")


def publish(staging: Path, final: Path, run: Mapping[str, Any]) -> None:
    """Turn a written folder into a checkpoint: its list of files, flushed to disk, then its name."""
    files = {str(p.relative_to(staging)): p.stat().st_size for p in sorted(staging.rglob("*")) if p.is_file()}
    (staging / MANIFEST).write_text(json.dumps({"run": run, "files": files}, indent=1), encoding="utf-8")
    for path in [*staging.rglob("*"), staging]:
        flush(path)
    if final.exists():
        shutil.rmtree(final)  # the same step saved twice, or a torn one of that name
    staging.rename(final)
    flush(final.parent)


# What a run leaves at the top of its folder, and --overwrite_output_dir takes away.
RUN_FILES = (
    COMPLETED, "adapter_model.*", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "*_results.json", "metrics.json", "predictions.jsonl",
    "trainer_state.json", "loss.png",
)  # fmt: skip


def clear_output(output: Path, final: Path, everything: bool, resumed: Path | None) -> None:
    """Before training: away with `completed` and half written folders and, to start anew, with all that a run left.

    Checkpoints newer than the one that --resume_from_checkpoint picked belong to a branch that is left: they are set
    aside under another name, or the next rerun would take them up.
    """
    for place in {output, final}:
        for file in itertools.chain.from_iterable(map(place.glob, RUN_FILES if everything else (COMPLETED,))):
            file.unlink()
        for folder in place.glob(f"{STAGING}*"):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in checkpoints_in(output):
        if everything:
            shutil.rmtree(folder)
        elif resumed and resumed.resolve().parent == output.resolve() and step_of(folder) > step_of(resumed):
            folder.rename(output / f"left-{folder.name}-{time.time_ns()}")


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


# ------------------------------------------------------------------------------------
# 11. Evaluation: generated predictions, MMLU
#
# Each process takes a run of the rows; results are gathered in the order of the rows, so none is lost or doubled.
# ------------------------------------------------------------------------------------
class Runtime(NamedTuple):
    """What it takes to run a model outside the Trainer's loops."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    accelerator: Any
    batch_size: int
    limits: Limits


def dealt_batches(count: int, runtime: Runtime) -> list[list[int]]:
    """This process's row numbers, in batches; gather_object puts the processes' results one after the other."""
    with runtime.accelerator.split_between_processes(list(range(count))) as mine:
        return [mine[i : i + runtime.batch_size] for i in range(0, len(mine), runtime.batch_size)]


SAMPLING = ("temperature", "top_p", "top_k", "typical_p")  # what the library refuses unless it samples


def generation_config(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The values that the user gave, with BOS, EOS and pad ids filled in.

    The model's own generation_config only adds its further stop tokens: its sampling values are not the user's.
    """
    chosen = config.generation
    values = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen) if f.name in config.given}
    if config.training.generation_num_beams is not None:
        values.setdefault("num_beams", config.training.generation_num_beams)
    if config.training.generation_max_length is not None and "max_new_tokens" not in values:
        values["max_length"] = config.training.generation_max_length
    else:
        values.setdefault("max_new_tokens", chosen.max_new_tokens)
    if not chosen.do_sample:
        values = {name: value for name, value in values.items() if name not in SAMPLING}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = sorted({tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    with mendable("generation flags"):
        file = config.training.generation_config
        if file is not None:
            values = GenerationConfig.from_pretrained(str(file)).to_diff_dict() | values
            for name in ("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"):
                values.pop(name, None)
        return GenerationConfig(**values, use_cache=True, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its own sampling defaults out of the way, for a while."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # generate() mixes its values into those it is given
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


def prompt_ids(inputs: list[str], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[list[int]]:
    """Prompts, cut as in training; one that is empty begins with EOS, since something must stand there."""
    bos, ids_of = len(bos_ids(tokenizer)), source_ids(inputs, tokenizer)
    cut = [ids[: limits.source] if limits.total is None else cut_left(ids, limits.total, bos) for ids in ids_of]
    return [ids or [tokenizer.eos_token_id] for ids in cut]


def generate_predictions(runtime: Runtime, rows: Any, generation: GenerationConfig) -> list[dict[str, str]]:
    """One dictionary for each row: its fields, `prediction`, `prediction_with_input`."""
    model, tokenizer = runtime.model, runtime.tokenizer
    device = model.get_input_embeddings().weight.device
    collate = CausalLMCollator(tokenizer.pad_token_id, side="left")
    results: list[dict[str, str]] = []
    batches, quiet = dealt_batches(len(rows), runtime), not runtime.accelerator.is_main_process
    with generating(model), runtime.accelerator.autocast():
        for numbers in tqdm(batches, "Predicting", disable=quiet):
            batch = rows[numbers]
            prompts = prompt_ids(batch["input"], tokenizer, runtime.limits)
            tensors = {name: t.to(device) for name, t in collate([{"input_ids": ids} for ids in prompts]).items()}
            with mendable("generation flags"):
                output = model.generate(**tensors, generation_config=generation)
            width = tensors["input_ids"].shape[1]  # the prompt is taken off by its tokens, never by its text
            answers = output[:, width:].tolist()
            for source, target, prompt, answer in zip(batch["input"], batch["output"], prompts, answers, strict=True):
                row = {"input": source, "output": target}
                row["prediction"] = str(tokenizer.decode(answer, skip_special_tokens=True))
                row["prediction_with_input"] = str(tokenizer.decode(prompt + answer, skip_special_tokens=True))
                results.append(row)
    return list(gather_object(results))


class Question(NamedTuple):
    """A multiple-choice question."""

    subject: str
    prompt: str  # ends with "Answer:"
    answer: int  # 0 to 3 for A to D


LETTERS = "ABCD"


def load_questions(config: Config) -> list[Question]:
    """MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300) from the original's files, or from the hub.

    Raises:
        DataError: the file is not there, or a question is not one.
    """
    mmlu = config.mmlu
    five_shot = mmlu.mmlu_dataset != "mmlu-zs"
    if Path(mmlu.mmlu_dir).is_dir():
        name = f"{'five' if five_shot else 'zero'}_shot_mmlu_{'val' if mmlu.mmlu_split == 'eval' else 'test'}.json"
        questions = list(questions_in_file(Path(mmlu.mmlu_dir, name)))
    else:
        questions = list(questions_of_hub(config, five_shot))
    if not questions:
        raise DataError(f"--mmlu_dir {mmlu.mmlu_dir}: no question in it")
    return questions[: mmlu.max_mmlu_samples]


def questions_in_file(path: Path) -> Iterator[Question]:
    """The original's format: one {subject, input, output} in a line, the output a letter."""
    for number, row in read_file(path):
        try:
            if isinstance(row, RowError):
                raise row
            letter = text_of(row, "output").strip()
            if letter not in tuple(LETTERS):
                raise RowError(f"field 'output' is {letter!r}, expected A, B, C or D")
            yield Question(text_of(row, "subject"), text_of(row, "input"), LETTERS.index(letter))
        except RowError as error:
            raise DataError(f"{path}:{number}: {error}") from error


def questions_of_hub(config: Config, five_shot: bool) -> Iterator[Question]:
    """The same prompts built from `cais/mmlu`, whose `dev` rows are the worked examples."""
    sources = load_from_hub("cais/mmlu", config, name="all")
    splits: dict[str, Any] = {name: source.loaded for name, source in sources.items()}
    shots: dict[str, str] = defaultdict(str)
    for row in splits["dev"] if five_shot else []:
        shots[row["subject"]] += f"{question_text(row)} {LETTERS[row['answer']]}\n\n"
    for row in splits["validation" if config.mmlu.mmlu_split == "eval" else "test"]:
        topic = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about  {topic}.\n\n"  # as published
        yield Question(row["subject"], head + shots[row["subject"]] + question_text(row), row["answer"])


def question_text(row: Mapping[str, Any]) -> str:
    """Question and choices, up to `Answer:`."""
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """What A to D begin with alike (some tokenizers: a space of its own), and what follows in each."""
    ids = token_ids(list(LETTERS), tokenizer)
    shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False)))
    return ids[0][:shared], [letter[shared:] for letter in ids]


def mmlu_metrics(runtime: Runtime, questions: list[Question], split: str, longest: int) -> dict[str, float]:
    """Accuracy by subject, their unweighted mean, and the loss on the right letter and EOS.

    The letters' first tokens are compared in one pass. Where those are not four different ones, each letter is put
    after the prompt in turn, and what is compared is the probability of all its tokens.
    """
    tokenizer, model = runtime.tokenizer, runtime.model
    device = model.get_input_embeddings().weight.device
    prefix, letters = letter_ids(tokenizer)
    firsts = [ids[0] for ids in letters]
    one_pass = len(set(firsts)) == len(LETTERS)
    texts = [question.prompt for question in questions]
    prompts = [ids + prefix for ids in prompt_ids(texts, tokenizer, Limits(longest, 0, total=longest))]
    collate = CausalLMCollator(tokenizer.pad_token_id)
    results: list[tuple[str, bool, float]] = []
    with generating(model), runtime.accelerator.autocast():
        for numbers in dealt_batches(len(questions), runtime):
            asked = [(i, c) for i in numbers for c in ([questions[i].answer] if one_pass else range(len(LETTERS)))]
            answers = [[*letters[c], tokenizer.eos_token_id] for _, c in asked]
            batch = collate([{"input_ids": prompts[i] + ids} for (i, _), ids in zip(asked, answers, strict=True)])
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            scores: dict[int, torch.Tensor] = {i: torch.zeros(len(LETTERS)) for i in numbers}
            losses: dict[int, float] = {}
            for row, ((i, c), ids) in enumerate(zip(asked, answers, strict=True)):
                at = len(prompts[i]) - 1  # the position that predicts the letter
                predicted = logits[row, at : at + len(ids)].float().log_softmax(-1).cpu()
                chosen = predicted[range(len(ids)), ids]
                if c == questions[i].answer:
                    losses[i] = -chosen.mean().item()
                if one_pass:
                    scores[i] = predicted[0, firsts]
                else:
                    scores[i][c] = chosen[:-1].sum()
            for i in numbers:
                results.append((questions[i].subject, int(scores[i].argmax()) == questions[i].answer, losses[i]))
    scored = gather_object(results)
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for subject, right, _ in scored:
        by_subject[subject].append(right)
    accuracy = {subject: sum(marks) / len(marks) for subject, marks in by_subject.items()}
    return {
        "mmlu_loss": sum(loss for _, _, loss in scored) / len(scored),
        **{f"mmlu_{split}_accuracy_{subject}": value for subject, value in accuracy.items()},
        f"mmlu_{split}_accuracy": sum(accuracy.values()) / len(accuracy),
    }


# ------------------------------------------------------------------------------------
# 12. Trainer: order of rows, loss, whole checkpoints, signals
#
# The Hugging Face Trainer with five things of ours: an order of rows that a resume finds again, the loss on labelled
# tokens only, checkpoints that are whole or absent, a stop on numbers that are not finite, MMLU beside the evaluation.
# To add a callback: one class, one line in build_callbacks.
# ------------------------------------------------------------------------------------
class EpochSampler(torch.utils.data.Sampler[int]):
    """Row numbers in an order that follows from seed and epoch alone, so that a resume in any epoch finds it again.

    With lengths, rows of like length stand together (in windows of 50 batches, the longest first): less padding.
    """

    def __init__(self, rows: int, seed: int, lengths: list[int] | None = None, batch_size: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.batch_size = rows, seed, lengths, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def causal_lm_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, in float32, over the labelled tokens of the whole accumulation window.

    Args:
        outputs: with `logits`, (rows, tokens, vocabulary).
        labels: (rows, tokens), IGNORE where nothing is learnt.
        num_items_in_batch: labelled tokens of the window; None takes the mean of this batch.
        smoothing: --label_smoothing_factor.
    """
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    following = labels[:, 1:].to(logits.device)
    learnt = following != IGNORE
    # only these rows of the logits become float32: a quarter of them where the prompt is three quarters
    rows = logits[:, :-1][learnt].float()
    total = F.cross_entropy(rows, following[learnt], reduction="sum", label_smoothing=smoothing)
    return total / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)


class Stop(TrainerCallback):
    """The signal that asked this run to stop, if one did: save and stop after the step in which it came."""

    signal: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer for both, on every process if the signal reached one."""
        if args.world_size > 1:
            flag = torch.tensor(self.signal or 0, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.signal = int(flag) or None
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """Note SIGINT and SIGTERM for the end of the step; a second one ends the run at once."""

    def note(number: int, frame: Any) -> None:
        stop.signal = number
        signal.signal(number, saved[number])
        log.warning("%s: finishing the step, then saving", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    saved: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in saved:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def build_callbacks(stop: Stop) -> list[TrainerCallback]:
    """Every callback of a run."""
    return [stop]


class QLoRATrainer(Trainer):
    """The Trainer with our order of rows, checkpoints and checks."""

    def __init__(self, *, run: dict[str, Any], questions: list[Question] | None, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run, self.questions, self.config = run, questions, config
        self.window: list[str] = []  # where the rows of the current step come from
        self.window_loss: torch.Tensor | float = 0.0
        self.tokens_seen: torch.Tensor | int = 0  # without padding, by this process
        self.seconds_aside = 0.0  # spent on evaluating and saving while training
        self.staging: Path | None = None

    def runtime(self) -> Runtime:
        """The model as the Trainer holds it, for loops of ours."""
        return Runtime(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,  # type: ignore[arg-type]
            self.accelerator,
            self.args.per_device_eval_batch_size,
            limits_of(self.config),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Ours: the Trainer's grouped sampler draws from the global generator, and a resume in epoch 2 differs."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        strategy = args.train_sampling_strategy
        if strategy == "sequential":
            return torch.utils.data.SequentialSampler(rows)
        seed = args.seed if args.data_seed is None else args.data_seed
        every: Any = self.train_dataset  # `rows` may have lost its columns to --remove_unused_columns
        lengths = list(every["length"]) if strategy == "group_by_length" else None
        return EpochSampler(len(rows), seed, lengths, args.train_batch_size * args.gradient_accumulation_steps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step; notes their rows and counts their tokens."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.window, self.window_loss = ([row for batch in batches for row in batch.pop("where", [])], 0.0)
        self.tokens_seen = self.tokens_seen + sum(batch["attention_mask"].sum() for batch in batches)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.window_loss = self.window_loss + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """After the gradients of a step are there and before the optimizer uses them: are the numbers finite?"""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.args.fp16 and self.accelerator.scaler is not None  # its scaler skips such steps by itself
        bad = "loss" if not math.isfinite(float(self.window_loss)) else "gradient norm"
        if bad == "loss" or not (scaled or math.isfinite(float(norm))):
            rows = ", ".join(self.window[:4]) + (f" and {len(self.window) - 4} more" if len(self.window) > 4 else "")
            raise TrainingError(
                f"step {self.state.global_step + 1}: the {bad} is not finite, on rows {rows}. The last good checkpoint "
                "stays; look at these rows, lower --learning_rate, or train in --bf16 instead of --fp16"
            )
        return norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with perplexity and, where asked for, MMLU beside the loss."""
        began = time.perf_counter()
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        for name, loss in list(output.metrics.items()):
            if name.endswith("_loss"):
                output.metrics[name.removesuffix("loss") + "perplexity"] = math.exp(min(loss, 700.0))
        if self.questions:
            split, longest = self.config.mmlu.mmlu_split, self.config.mmlu.mmlu_source_max_len
            output.metrics.update(mmlu_metrics(self.runtime(), self.questions, split, longest))
        self.seconds_aside += time.perf_counter() - began
        return output

    def _get_output_dir(self, trial: Any) -> str:
        """The Trainer writes checkpoint-N below this."""
        return str(self.staging) if self.staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, written aside, flushed and renamed."""
        began, output = time.perf_counter(), Path(self.config.training.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self.staging = output / f"{STAGING}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            best = f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and ((output / best).is_dir() or best == name):
                self.state.best_model_checkpoint = str(output / best)  # the Trainer looked for it in the hidden folder
                self.state.save_to_json(str(self.staging / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (self.staging / name / "training_args.bin").unlink(missing_ok=True)  # a pickle, with tokens in it
                name_base(self.staging / name, self.config.model.model_name_or_path)
                publish(self.staging / name, output / name, self.run)
                shutil.rmtree(self.staging)
                self._drop_old_checkpoints(output)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what a full disk may lead to
            shutil.rmtree(self.staging, ignore_errors=True)
            reason = f"{output / name}: not saved: {one_line(error)}. The checkpoints before it stay"
            raise TrainingError(reason) from error
        finally:
            self.staging = None
            self.seconds_aside += time.perf_counter() - began

    def _drop_old_checkpoints(self, output: Path) -> None:
        """Keep the newest save_total_limit checkpoints, and the best one."""
        limit = self.args.save_total_limit
        for folder in checkpoints_in(output)[max(limit, 1) :] if limit else []:
            if str(folder) != self.state.best_model_checkpoint:
                shutil.rmtree(folder)

    def take_over(self, checkpoint: Path) -> None:
        """Weights and state of a checkpoint, without training on."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Into the one adapter there is, in its dtype; the Trainer's own way may add a second, and makes it float32."""
        place = adapter_folder(Path(resume_from_checkpoint))
        if place is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with mendable(f"{place} does not fit the LoRA flags", ConfigError, RuntimeError):
            set_peft_model_state_dict(self.model, load_peft_weights(str(place), device="cpu"))

    def _load_best_model(self) -> None:
        """The same way."""
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """MMLU's numbers too, under the prefix that the Trainer asks for."""
        return super()._determine_best_metric(
            metrics | {f"eval_{name}": value for name, value in metrics.items()}, trial
        )


def build_trainer(
    model: Any, tokenizer: Any, splits: Splits, questions: Any, run: dict[str, Any], stop: Stop, config: Config
) -> QLoRATrainer:
    """Everything that training and evaluation need."""
    args = config.training
    if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        log.warning("gradient_checkpointing: %s does not support it, nothing is recomputed", type(model).__name__)
        names = ("gradient_checkpointing", "activation_checkpointing")  # the later one, where there is one, rules
        off: dict[str, Any] = {name: False for name in names if hasattr(args, name)}
        args = dataclasses.replace(args, **off)
    return QLoRATrainer(
        model=model,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.eval.remove_columns("where") if splits.eval is not None else None,
        data_collator=CausalLMCollator(tokenizer.pad_token_id, config.model.padding_side),
        processing_class=tokenizer,
        compute_loss_func=partial(causal_lm_loss, smoothing=args.label_smoothing_factor),
        callbacks=build_callbacks(stop),
        run=run,
        questions=questions,
        config=config,
    )


# ------------------------------------------------------------------------------------
# 13. Stages: train, evaluate, predict, and the files that a run leaves
#
# Each stage takes the trainer, writes its files and returns its metrics.
# ------------------------------------------------------------------------------------
def peak_memory_gib() -> float:
    """Peak memory of this process: of all its GPUs, or of the process itself where it has none."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / GIB
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def train(trainer: QLoRATrainer, start: Start, stop: Stop, config: Config) -> dict[str, Any]:
    """Train, save what was trained, mark the run completed. After a signal only the checkpoint is there."""
    output = Path(config.training.output_dir)
    if trainer.args.should_save:
        clear_output(output, final_folder(config), config.training.overwrite_output_dir, start.checkpoint)
    state = read_json(start.checkpoint / "trainer_state.json") if start.checkpoint else {"global_step": 0}
    metrics: dict[str, Any] = {}
    if start.checkpoint and not asks_for_more(config, {"step": state["global_step"], "epoch": state["epoch"]}):
        log.info("%s holds the last step: nothing is left to train", start.checkpoint)  # the Trainer would do one more
        trainer.take_over(start.checkpoint)
    else:
        metrics = timed_training(trainer, start.checkpoint, state["global_step"], stop)
    if stop.signal is None:
        if metrics:
            trainer.log_metrics("train", metrics)
            trainer.save_metrics("train", metrics)
        trainer.save_state()
        save_final(trainer, final_folder(config), config)
    return metrics


def timed_training(trainer: QLoRATrainer, checkpoint: Path | None, first_step: int, stop: Stop) -> dict[str, Any]:
    """Train and measure: tokens without padding over the seconds that were not spent on evaluating and saving."""
    began = time.perf_counter()
    with stopping_on_signals(stop):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = max(time.perf_counter() - began - trainer.seconds_aside, 1e-9)
    tokens = trainer.accelerator.reduce(torch.as_tensor(int(trainer.tokens_seen), device=trainer.args.device)).item()
    steps = max(trainer.state.global_step - first_step, 1)
    saved = Path(trainer.config.training.output_dir, f"checkpoint-{trainer.state.global_step}")
    if stop.signal is not None and not saved.is_dir():
        trainer._save_checkpoint(trainer.model, None)  # it came after the last step had asked what to save
    return {
        **result.metrics,
        "train_loss": trainer._total_loss_scalar / steps,  # transformers 5.17 divides by the steps before a resume too
        "train_tokens": tokens,
        "train_tokens_per_second": round(tokens / seconds, 1),
        "train_peak_memory_gib": round(peak_memory_gib(), 3),
    }


def save_final(trainer: QLoRATrainer, final: Path, config: Config) -> None:
    """The adapter (or, after a full fine-tune, the model) and its tokenizer, each file whole; then `completed`."""
    model, tokenizer, *_ = trainer.runtime()
    if trainer.args.should_save:
        output, aside = Path(config.training.output_dir), final / f"{STAGING}final"
        with mendable(f"{final}: the trained weights are not saved", TrainingError):
            model.config.use_cache = True  # for whoever loads it: load_model turned it off
            model.save_pretrained(aside, max_shard_size=config.training.max_shard_size)
            model.config.use_cache = False
            tokenizer.save_pretrained(aside)
            if getattr(model, "lora_start", None):
                fit_to_base(aside, model.lora_start)
        name_base(aside, config.model.model_name_or_path)
        written = {path.name for path in aside.iterdir()}
        for name in sorted(written):
            flush(aside / name)
            (aside / name).replace(final / name)
        aside.rmdir()
        for stale in {*final.glob("model*.safetensors"), *final.glob("model.safetensors.index.json")}:
            if stale.name not in written:  # of an earlier save in other shards, which would be loaded instead
                stale.unlink()
        state = {"step": trainer.state.global_step, "epoch": trainer.state.epoch, "run": trainer.run}
        write_loss_chart(output / "loss.png", trainer.state.log_history)
        write_file(final / "README.md", model_card(trainer, config))
        write_file(output / COMPLETED, json.dumps(state, indent=1))
    trainer.accelerator.wait_for_everyone()


def evaluate(trainer: QLoRATrainer) -> dict[str, Any]:
    """Loss, perplexity and MMLU on the held-out rows."""
    metrics = trainer.evaluate(metric_key_prefix="eval")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def predict(trainer: QLoRATrainer, pairs: Any, config: Config) -> dict[str, Any]:
    """Generate an answer for every held-out row, into predictions.jsonl."""
    runtime = trainer.runtime()
    began = time.time()
    rows = generate_predictions(runtime, pairs, generation_config(config, runtime.model, runtime.tokenizer))
    metrics = {"predict_samples": len(rows), **speed_metrics("predict", began, num_samples=len(rows))}
    if trainer.args.should_save:
        file = Path(config.training.output_dir, "predictions.jsonl")
        write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    return metrics


def check_merge(start: Start, config: Config) -> None:
    """Before anything is trained: can a merged model be written, and is there something to merge?"""
    if config.training.merged_output_dir is None:
        return
    target = Path(config.training.merged_output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--merged_output_dir {target}: is there already and not empty; name another, or remove it")
    if not start.train and start.weights is None:
        raise ConfigError(f"--merged_output_dir {target}: no adapter to merge: nothing was trained in --output_dir")
    target.parent.mkdir(parents=True, exist_ok=True)


def load_merge_base(config: Config, folder: str) -> Any:
    """The base in 16 bit on the CPU: as published, or with the values that its quantised weights stand for."""
    model_config = load_model_config(config, folder)
    own = model_config.dtype if model_config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    options: dict[str, Any] = {"dtype": own, "device_map": {"": "cpu"}}
    quantised = is_prequantised(model_config)
    if quantised:
        log.info("the base is quantised already: the adapter is merged into the values that its weights stand for")
    elif config.training.merge_base == "dequantized" and config.quant.bits < 16:
        options |= {"dtype": load_dtype(config), "quantization_config": quantisation_config(config)}
        quantised = True
    model = load_base(config, model_config, folder, **options)
    if quantised:
        with mendable(f"--merged_output_dir: {config.model.model_name_or_path} can't be dequantised"):
            model = model.dequantize(dtype=own)
        model._weight_conversions = None  # or saving would try to quantise again
    return computing_in_float32(cast(model, own))


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The parameters in another dtype; not the buffers, whose rotary frequencies must stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _widen(module: torch.nn.Module, inputs: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.kept, parameter.data = parameter.data, parameter.data.float()  # type: ignore[attr-defined]


def _narrow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.kept  # type: ignore[attr-defined]
        del parameter.kept  # type: ignore[attr-defined]


def computing_in_float32(model: Any) -> Any:
    """The model, which now widens one module's weights at a time: exact sums, in the memory of 16 bit."""
    for module in model.modules():
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow)
    return model


@torch.no_grad()
def logits_on(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of every token that is not padding: (tokens, vocabulary)."""
    return model(**batch).logits[batch["attention_mask"].bool()]


MERGE_ROWS, MERGE_TOKENS = 4, 64  # of the dataset, on which a merged model is compared


def merge(adapter: str, splits: Splits, tokenizer: Any, folder: str, config: Config) -> dict[str, Any]:
    """Base and adapter as one model in 16 bit, written aside, loaded again, compared, and only then named.

    Raises:
        QLoRAError: the merged model answers as the base does, or otherwise than base and adapter.
    """
    if config.training.merged_output_dir is None or config.training.process_index != 0:
        return {}
    target = Path(config.training.merged_output_dir)
    aside = target.with_name(f".merging-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    rows = splits.eval if splits.eval is not None else splits.train
    assert rows is not None
    collate = CausalLMCollator(tokenizer.pad_token_id)
    sample = collate([{"input_ids": ids[:MERGE_TOKENS]} for ids in rows[:MERGE_ROWS]["input_ids"]])
    gc.collect()  # what was trained in this process refers to itself in circles
    log.info("merging %s into %s", adapter, target)
    try:
        with mendable(f"--merged_output_dir {target}", TrainingError):
            before = write_merged(adapter, aside, tokenizer, sample, folder, config)
            model = load_whole(str(aside), aside, trust_remote_code=config.model.trust_remote_code)
        metrics = compare_merged(computing_in_float32(model), before, sample, target)
        del model
        for path in [*aside.iterdir(), aside]:
            flush(path)
        if target.exists():
            target.rmdir()  # empty, as check_merge saw
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return metrics


class Before(NamedTuple):
    """What a merged model is compared with."""

    adapted: torch.Tensor  # logits of base with adapter
    plain: torch.Tensor  # logits of the base
    lost: float  # the share of the adapter that 16 bit can't hold


def merge_layers(peft_model: Any, dtype: torch.dtype) -> float:
    """Merge every layer in float32 and round it once. Returns the share of the change that this rounds away."""
    wanted = kept = 0.0
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            weight.data = weight.data.float()
            before = weight.data.clone()
            layer.merge()  # type: ignore[operator]
            change, weight.data = weight.data - before, weight.data.to(dtype)
            wanted += change.square().sum().item()
            kept += (change * (weight.data.float() - before)).sum().item()
    return 1 - kept / wanted if wanted else 0.0


def write_merged(
    adapter: str, aside: Path, tokenizer: Any, sample: Mapping[str, torch.Tensor], folder: str, config: Config
) -> Before:
    """Write a merged model."""
    model: Any = load_merge_base(config, folder)
    embedding, dtype = model.get_input_embeddings().num_embeddings, model.dtype
    plain = logits_on(model, sample)
    with mendable(f"adapter {adapter} on {config.model.model_name_or_path}", ConfigError, RuntimeError):
        peft_model = PeftModel.from_pretrained(model, adapter)
    start = getattr(peft_model.peft_config["default"], "init_lora_weights", None)
    if takes_from_base(start):
        raise ConfigError(f"{adapter} fits a base changed by {start}: finish its training, whose result fits any base")
    adapted = logits_on(peft_model, sample)
    lost = merge_layers(peft_model, dtype)
    model = cast(peft_model.merge_and_unload(), dtype)  # the layers are, what was trained whole is not
    special_ids_into_model(model, tokenizer)
    model.save_pretrained(aside, max_shard_size=config.training.max_shard_size)
    tokenizer.save_pretrained(aside)
    if (Path(folder) / "tokenizer.model").is_file():  # which llama.cpp's converter prefers
        shutil.copyfile(Path(folder) / "tokenizer.model", aside / "tokenizer.model")
    if len(tokenizer) > embedding:
        log.warning(
            "the tokenizer has %d tokens, the model %d: llama.cpp will not convert it", len(tokenizer), embedding
        )
    return Before(adapted, plain, lost)


def compare_merged(model: Any, before: Before, sample: Any, target: Path) -> dict[str, float]:
    """Compare a merged model's logits with those of base and adapter.

    They may differ as much as they do when every weight of the merged model moves by a unit in its last place, which is
    tried out (the model is of no use afterwards), and twice the share of the adapter's effect that was rounded away.
    """
    merged = logits_on(model, sample)
    generator = torch.Generator().manual_seed(0)
    for weight in (p.data for p in model.parameters() if p.dim() == 2):
        signs = [torch.randint(2, (n, 1), generator=generator).mul_(2).sub_(1).to(weight.dtype) for n in weight.shape]
        weight.addcmul_(weight, signs[0] @ signs[1].T, value=torch.finfo(weight.dtype).eps)
    differences = merged - before.adapted, before.plain - before.adapted, merged - logits_on(model, sample)
    found, effect, moved = (x.norm().item() / math.sqrt(x.numel()) for x in differences)
    largest, furthest, _ = (x.abs().max().item() for x in differences)
    allowed = moved + 2 * before.lost * effect
    log.info("merged: its logits differ from those of base + adapter by at most %.3g", largest)
    log.info("the adapter moves them by up to %.3g", furthest)
    if before.lost > 0.05:
        log.warning("%.0f %% of the adapter's change is too small for a 16-bit weight and is lost", 100 * before.lost)
    if torch.equal(merged, before.plain):
        raise QLoRAError(f"{target}: not written, the merge changed nothing: the adapter is zero, or lost in 16 bit")
    if not found <= allowed:
        raise QLoRAError(
            f"{target}: not written, the merged model's logits differ from those of base + adapter by {found:.3g} "
            f"(root mean square), of which rounding explains {allowed:.3g}"
        )
    return {"merge_largest_difference": largest, "merge_difference": found, "merge_rounding": allowed}


def write_loss_chart(path: Path, history: list[dict[str, float]]) -> None:
    """Training and evaluation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, marker in (("loss", "training", None), ("eval_loss", "evaluation", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shown_flags(config: Config) -> dict[str, Any]:
    """Every flag with its value, but no token."""
    return config.flags | ({"hub_token": "(hidden)"} if config.flags["hub_token"] else {})


def model_card(trainer: QLoRATrainer, config: Config) -> str:
    """README.md of the adapter: settings, data and losses, with the metadata block that the hub reads."""
    losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    every = max(1, math.ceil(len(losses) / 20))  # at most 20 rows, the last among them
    losses = losses[(len(losses) - 1) % every :: every]
    rows = "\n".join(f"| {e['step']} | {e.get('loss', '')} | {e.get('eval_loss', '')} |" for e in losses)
    flags = shown_flags(config)
    settings = "\n".join(f"| {name} | `{flags[name]}` |" for name in sorted(config.given))
    base = config.model.model_name_or_path
    beside = "" if Path(config.training.output_dir) == final_folder(config) else f"{config.training.output_dir}/"
    kind, library = ("full fine-tune", "transformers") if config.quant.full_finetune else ("LoRA adapter", "peft")
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: {library}\n"
        f"pipeline_tag: text-generation\n---\n\n"
        f"# {kind.capitalize()} for {base}\n\n"
        f"Trained with QLoRA: base in {config.quant.bits} bit, {trainer.state.global_step} optimizer steps, "
        f"dataset `{config.data.dataset}`.\n\n"
        f"## Settings given\n\n| flag | value |\n|---|---|\n{settings}\n\n"
        f"All flags, resolved, and library versions are in `{beside}run.json`.\n\n"
        f"## Losses\n\n| step | training loss | evaluation loss |\n|---|---|---|\n{rows}\n\n![loss]({beside}loss.png)\n"
    )


def versions() -> dict[str, str]:
    """Of Python and the libraries that a result depends on."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this file's checkout, marked if it has changes."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name() -> str:
    """What computes."""
    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def run_record(config: Config, derived: dict[str, Any], data: dict[str, Any]) -> str:
    """run.json: enough to repeat the run, and nothing secret."""
    record = {
        "flags": shown_flags(config),
        "derived": derived,
        "versions": versions() | {"qlora.py": git_commit() or CODE_VERSION},
        "data": data,
        "device": {"name": device_name(), "processes": config.training.world_size},
    }
    return json.dumps(record, indent=1, default=str) + "\n"


def derived_settings(config: Config, start: Start, tokenizer: Any, splits: Splits) -> dict[str, Any]:
    """What follows from the flags: the block at the start of a run, and `derived` in run.json."""
    args, quant = config.training, config.quant
    rows, accumulated, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    effective = rows * accumulated * processes
    why = "--bf16" if args.bf16 else "--fp16" if args.fp16 else "neither --bf16 nor --fp16"
    kind = f"{quant.bits} bit"
    if quant.bits == 4:
        kind += f" {quant.quant_type}{', double quantisation' if quant.double_quant else ''}"
    train_rows, eval_rows = (len(part) if part is not None else 0 for part in splits)
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    names = ("bos", "eos", "pad")
    special = [(name, getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")) for name in names]
    fresh = "fresh, from the seed" if args.do_train else "the base itself"
    adapter = f"adapter {start.checkpoint or start.weights or fresh}"
    trained = "all weights but the embeddings" if quant.full_finetune else adapter
    return {
        "model": config.model.model_name_or_path,
        "weights": kind,
        "compute dtype": f"{str(compute_dtype(config)).removeprefix('torch.')} ({why})",
        "effective batch": f"{effective} rows = {rows} at once x {accumulated} accumulated x {processes} processes",
        "length": f"{length}; {math.ceil(train_rows / effective)} steps are an epoch",
        "special tokens": ", ".join(f"{name} {token!r} = {number}" for name, token, number in special),
        "trained part": trained,
        "train rows": train_rows,
        "eval rows": eval_rows,
    }


def log_block(title: str, lines: Mapping[str, Any]) -> None:
    """A titled block of `name: value` lines."""
    width = max(map(len, lines))
    log.info("%s\n%s", title, "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items()))


def hints(config: Config) -> None:
    """What a user may not expect of the flags given, said once."""
    args, quant, given = config.training, config.quant, config.given
    gpu, half = torch.cuda.is_available(), args.bf16 or args.fp16
    lora = {f.name for f in dataclasses.fields(LoraArguments)} - {"layers_to_freeze", "layer_freeze_ratio"}
    idle = [name for name in SAMPLING if name in given and not config.generation.do_sample]
    held = "in bf16, with --bf16" if args.bf16 else "in float32, without --bf16"
    # fmt: off
    notes: list[tuple[bool, str]] = [
        (gpu and torch.cuda.is_bf16_supported() and not half,
         "hint: this GPU computes in bf16; without --bf16 everything is in float32, which is slower"),
        (not gpu and half, "hint: on a CPU float32 is about 2.5 times faster: leave --bf16 and --fp16 out"),
        (quant.bits >= 16 and args.bf16 != (quant.bits == 16),
         f"bits {quant.bits}: the weights are held {held}, as in the original"),
        (quant.bits != 4 and bool(given & {"quant_type", "double_quant"}),
         f"quant_type and double_quant: without effect, bits is {quant.bits}"),
        (quant.full_finetune and bool(given & lora), "the LoRA flags: without effect in a full fine-tune"),
        (config.model.adapter_name_or_path is not None and bool(given & lora),
         "the LoRA flags: an adapter given by adapter_name_or_path keeps its own rank, alpha and layers"),
        (args.do_predict and bool(idle),
         f"{', '.join(idle)}: without effect on predictions unless --do_sample is given"),
        (args.lr_scheduler_type == "constant" and "warmup_steps" in given,
         "lr_scheduler_type constant ignores warm-up; constant_with_warmup honours it"),
    ]
    # fmt: on
    for applies, note in notes:
        if applies:
            log.info("%s", note)


# ------------------------------------------------------------------------------------
# 14. Main
# ------------------------------------------------------------------------------------
def check_fit(model: Any, parts: Mapping[str, TokenStatistics]) -> None:
    """Rows against the model: an id outside the embedding would only show as a crash on the GPU."""
    rows = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, part in parts.items():
        if part.largest_id >= rows:
            found = f"the {name} rows hold token id {part.largest_id}, the model has {rows}"
            raise ConfigError(f"{found}: its tokenizer is another's")
        if positions and part.longest > positions:
            found = f"the longest {name} row has {part.longest} tokens, the model was made for {positions}"
            log.warning("%s: lower the limits or give --rope_scaling", found)


def use(trainer: QLoRATrainer, start: Start, pairs: Splits, config: Config) -> dict[str, Any]:
    """Evaluate and predict with what was trained or found."""
    metrics: dict[str, Any] = {}
    output = final_folder(config)
    if config.training.do_eval:
        metrics |= evaluate(trainer)
    if config.training.do_predict:
        if not start.train and start.weights is None:
            log.warning("no trained adapter in %s: these are the predictions of the base model", output)
        else:
            log.info("predicting with %s", f"the adapter just trained, {output}" if start.train else start.weights)
        metrics |= predict(trainer, pairs.eval, config)
    return metrics


def run(config: Config, stop: Stop) -> int:
    """One run, from checked flags to files. Returns the exit status."""
    args, output = config.training, Path(config.training.output_dir)
    began = time.perf_counter()
    if args.full_determinism:
        enable_full_determinism(args.seed)
    set_seed(args.seed)
    hints(config)
    start = find_start(config)
    if start.note:
        log.info("%s", start.note)
    check_merge(start, config)

    with args.main_process_first(desc="converting the model"):
        folder = model_folder(config)
    model_config = load_model_config(config, folder)
    tokenizer = load_tokenizer(config, model_config, folder)
    with args.main_process_first(desc="reading and encoding the dataset"):
        pairs = load_splits(config)
        splits = encode_splits(pairs, tokenizer, config)
    if args.do_predict:
        generation_config(config, None, tokenizer)  # a wrong flag shows now and not after training
    questions = load_questions(config) if config.mmlu.do_mmlu_eval else None
    statistics = {name: token_statistics(part) for name, part in splits._asdict().items() if part is not None}
    this_run = identity(config, statistics.get("train") if args.do_train else None)
    if start.found:
        check_identity(start.found, this_run, args.do_train)

    output.mkdir(parents=True, exist_ok=True)  # a folder that can't be written shows before the model is loaded
    final_folder(config).mkdir(parents=True, exist_ok=True)
    derived = derived_settings(config, start, tokenizer, splits)
    log_block("This run", derived)
    if not (start.train or args.do_eval or args.do_predict):
        finish(config, merge(str(start.weights), splits, tokenizer, folder, config), time.perf_counter() - began)
        return 0
    model = load_model(config, model_config, start.weights or folder if config.quant.full_finetune else folder)
    special_ids_into_model(model, tokenizer)
    check_fit(model, statistics)
    model = make_trainable(model, config, start.weights)
    if config.lora.init_lora_weights.lower() == "eva" and start == Start(train=True) and not config.quant.full_finetune:
        start_from_inputs(model, splits.train, tokenizer.pad_token_id, config)
    for line in parameter_report(model):
        log.info("%s", line)
    with mendable("flags", ConfigError, RuntimeError):
        trainer = build_trainer(model, tokenizer, splits, questions, this_run, stop, config)
        if start.train and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those make their own
            trainer.create_optimizer_and_scheduler(num_training_steps=max(args.max_steps, 1))  # a try of their flags

    data = {name: part._asdict() for name, part in statistics.items()}
    if args.should_save and (start.train or not (output / "run.json").is_file()):
        write_file(output / "run.json", run_record(config, derived, data))
    metrics: dict[str, Any] = {}
    log.info("ready after %.0f s", time.perf_counter() - began)
    if start.train:
        metrics |= train(trainer, start, stop, config)
        if stop.signal is not None:
            name, step = signal.Signals(stop.signal).name, trainer.state.global_step
            log.warning("stopped by %s at step %d, saved; the same command goes on from there", name, step)
            return 128 + stop.signal
    metrics |= use(trainer, start, pairs, config)
    del model, trainer  # memory for a merged model
    weights = final_folder(config) if start.train else start.weights
    metrics |= merge(str(weights), splits, tokenizer, folder, config)
    finish(config, metrics, time.perf_counter() - began)
    return 0


def finish(config: Config, metrics: dict[str, Any], seconds: float) -> None:
    """metrics.json, and the block at the end of a run."""
    if config.training.process_index != 0:
        return
    file = Path(config.training.output_dir, "metrics.json")
    earlier = read_json(file) if file.is_file() else {}
    write_file(file, json.dumps({"run_name": config.training.run_name, **earlier, **metrics}, indent=1) + "\n")
    shown = ("train_tokens_per_second", "train_peak_memory_gib", "train_loss", "eval_loss", "eval_perplexity")
    lines = {name.replace("_", " "): metrics[name] for name in shown if name in metrics}
    lines |= {name: value for name, value in metrics.items() if re.fullmatch(r"mmlu_\w+_accuracy|mmlu_loss", name)}
    files = {str(final_folder(config)): 1, config.training.output_dir: 1, config.training.merged_output_dir: 1}
    log_block("Done", lines | {"seconds": round(seconds), "files": ", ".join(filter(None, files))})


DISK_ERRORS = {"ENOENT", "ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "ENAMETOOLONG"}
MEMORY_ADVICE = (
    "lower --per_device_train_batch_size or --source_max_len and --target_max_len, or keep --gradient_checkpointing on"
)


def exit_status(error: BaseException) -> tuple[int, str] | None:
    """Exit status and message for what a user can mend; None for our bugs."""
    if isinstance(error, QLoRAError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command goes on from what is saved"
    if isinstance(error, torch.OutOfMemoryError):
        return 2, f"not enough GPU memory: {MEMORY_ADVICE}"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in DISK_ERRORS:
        return 2, f"{error.filename or 'a file'}: {error.strerror}"
    return None


# Of one library about another's code: nothing that a user could do about it.
QUIET_WARNING = (
    ".*(gradient_checkpointing|is_gradient_checkpointing).* is deprecated|All adapters are already merged|"
    "Model has `tie_word_embeddings=True` and a tied|Input and output embeddings are no longer tied after merging"
)


def set_up_logging() -> None:
    """INFO to standard error on rank 0, only errors elsewhere."""
    warnings.filterwarnings("ignore", QUIET_WARNING)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 2 mend something, 130 or 143 stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    debug = any(re.fullmatch(r"--show[_-]traceback|--debug", token) for token in argv)
    try:
        return run(parse_config(argv), Stop())
    except (Exception, KeyboardInterrupt) as error:
        known = exit_status(error)
        if known is None:
            raise
        if debug:
            traceback.print_exc()
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or the message would stand behind a progress bar
        print(f"error: {known[1]}", file=sys.stderr)
        return known[0]


if __name__ == "__main__":
    sys.exit(main())
