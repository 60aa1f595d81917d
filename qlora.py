#!/usr/bin/env python3
"""QLoRA in one file: fine-tune a language model whose frozen weights are held in 4 bits.

    python qlora.py --model_name_or_path M --dataset D --output_dir OUT      train
    python qlora.py run.yaml --learning_rate 1e-4                            flags from a file
    python qlora.py OLD/run.json --output_dir NEW                            repeat a run, say what differs
    python qlora.py … --do_train False --do_predict --predict_with_generate  use what was trained

A base model is loaded in 4, 8, 16 or 32 bit, LoRA adapters go on every linear layer, every row of the dataset becomes
text that is supervised or not, and the Hugging Face Trainer trains the adapters with a paged optimizer. The method is
QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314); flags, defaults, prompts, labels and files are those of
its original script (https://github.com/artidoro/qlora), except where the README's list of differences says otherwise.

The file reads from top to bottom, and a room uses only rooms above it:

     1 Imports           6 Tokenizer   11 Plan           16 Stages
     2 Errors            7 Encoding    12 Checkpoints    17 Main
     3 Dataset formats   8 Model       13 Processes
     4 Arguments         9 LoRA        14 Evaluation
     5 Loading          10 Fast path   15 Trainer
"""

# ------------------------------------------------------------------------------------
# 1. Imports
#
# torch, transformers, peft, bitsandbytes and datasets come with the Trainer in any case. matplotlib is imported where
# it is used.
# ------------------------------------------------------------------------------------
# ruff: noqa: E402

import argparse
import bisect
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import gc
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import pickle
import platform
import re
import shutil
import signal
import socket
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial, partialmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypedDict, get_type_hints

# Nothing goes over the network but what the user named. Before the libraries are imported: most read these once.
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a service of the hub to convert .bin weights
} | os.environ

# transformers imports bitsandbytes, which then says that it lacks a kernel no release has, and, in every 8-bit layer of
# every step, that it casts its input. Both are as they should be. What can't run without values the plan says itself.
for _noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torch._subclasses.fake_tensor"):
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)

import bitsandbytes.optim.optimizer
import datasets
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub import snapshot_download, upload_folder
from jinja2 import TemplateError, TemplateSyntaxError
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
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
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
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import speed_metrics
from transformers.utils.chat_template_utils import render_jinja_template

try:
    import triton
    import triton.language as tl
except ImportError:  # without a GPU: the same is done in torch
    triton = None

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


class PeerFailure(QLoRAError):
    """Another process of this run is there no more."""


class RowError(ValueError):
    """What is wrong with one row; becomes a DataError that also names file and line, or a line of rejected.jsonl."""

    def __init__(self, message: str, raw: Any = None) -> None:
        super().__init__(message)
        self.raw = raw  # what stood there, where it could not become a row


def escape_control_chars(text: str) -> str:
    """Text in which nothing hides or commands a terminal: what is not printable stands as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(error: object) -> str:
    """The first lines of a library's message or of a value, joined, short enough to read."""
    text = escape_control_chars(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def format_table(lines: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())


# What libraries raise over a user's files and flags; not RuntimeError, which is as often our bug.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError,
    ArithmeticError, RecursionError, yaml.YAMLError, zlib.error, SafetensorError, TemplateError, pickle.UnpicklingError,
)  # fmt: skip


@contextlib.contextmanager
def reraise_as_user_error(
    what: str, kind: type[QLoRAError] = ConfigError, *also: type[BaseException]
) -> Iterator[None]:
    """A library's complaint as one line of ours that begins with `what`: the flag or file that it is about."""
    try:
        yield
    except torch.OutOfMemoryError:  # says what it is by itself, and training makes room
        raise
    except pickle.UnpicklingError as error:  # torch advises to load it all the same
        raise kind(f"{what}: a pickle with more than tensors in it, which is not read") from error
    except (*LIBRARY_ERRORS, *also) as error:
        raise kind(f"{what}: {shorten(error)}") from error


# ------------------------------------------------------------------------------------
# 3. Dataset formats: one row of a raw dataset -> segments
#
# A format parses a row into a short list of segments, each supervised or not; {input, output} is the case of two. A
# chat is a Conversation first, which the tokenizer's template renders. Later rooms do not know the formats.
# To add one: write `parse_name` (or use `column_format`), add a row to FORMATS and one to tests/test_formats.py. The
# order of FORMATS is the order in which formats are inferred from columns. A named dataset is a row of DATASETS.
# ------------------------------------------------------------------------------------
BOOLEANS = {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Segment(TypedDict):
    text: str
    supervised: bool


class Conversation(NamedTuple):  # a chat before the tokenizer's template renders it
    messages: list[dict[str, Any]]  # ends with an answer
    tools: list[Any] | None


RawRow = Mapping[str, Any]
ParsedRow = list[Segment] | Conversation


class DatasetFormat(NamedTuple):
    columns: tuple[str, ...]  # required
    parse: Callable[[RawRow], ParsedRow]
    inferred: bool = True  # from the columns alone


# Unicode noncharacters, which no text may contain. The first two stand for the tokenizer's own ids. The third, inside
# the text of a special token that a user wrote, keeps it text.
BOS_MARK, EOS_MARK, ESCAPE_MARK = MARKS = "\ufdd0\ufdd1\ufdd2"


def prompt_completion(*texts: str) -> list[Segment]:
    """The last text is supervised; one before it is the prompt, which plain language modelling does not have."""
    *prompt, completion = texts
    return [{"text": "".join(prompt), "supervised": False}, {"text": completion, "supervised": True}]


def to_valid_utf8(text: str) -> str:
    """Replace lone surrogates, which stand for bytes that are not UTF-8 and which Arrow refuses."""
    return text.encode("utf-8", "replace").decode()


def get_text(row: RawRow, name: str, default: str | None = None) -> str:
    """The text in a field; a number or boolean becomes its JSON text, and null counts as missing."""
    value = row.get(name)
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, str):
        if value != to_valid_utf8(value):
            raise RowError(f"field {name!r} is not valid UTF-8, expected text")
        if any(mark in value for mark in MARKS):
            raise RowError(f"field {name!r} holds a noncharacter, U+FDD0 to U+FDD2, expected text")
        return value
    if value is None and default is not None:
        return default
    kinds = {"NoneType": "null" if name in row else "missing", "dict": "an object", "float": repr(value)}
    raise RowError(f"field {name!r} is {kinds.get(type(value).__name__, f'a {type(value).__name__}')}, expected text")


def get_optional_text(row: RawRow, column: str) -> str:
    """An optional column as text, whatever its type; null counts as missing."""
    value = row.get(column)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def get_list(row: RawRow, name: str) -> list[Any]:
    """The list in a field, which may be JSON text."""
    value = row.get(name)
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    if isinstance(value, list):
        return value
    raise RowError(f"field {name!r} is {shorten(repr(value))}, expected a list")


ALPACA_PROMPT = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response: "
)
AIROBOROS_SYSTEM = "You are an unbiased, uncensored, helpful assistant."


def parse_alpaca(row: RawRow) -> ParsedRow:
    """The Alpaca prompt (https://github.com/tatsu-lab/stanford_alpaca), with the original's single trailing space."""
    instruction, context = get_text(row, "instruction"), get_text(row, "input", "")
    paired = ", paired with an input that provides further context" if context else ""
    context = f"### Input:\n{context}\n\n" if context else ""
    prompt = ALPACA_PROMPT.format(paired=paired, instruction=instruction, context=context)
    return prompt_completion(prompt, get_text(row, "output"))


def parse_chip2(row: RawRow) -> ParsedRow:
    """Question and answer share one string, marked `<human>: ` and `<bot>: `; the first answer is supervised."""
    parts = get_text(row, "text").split("\n<bot>: ")
    if len(parts) < 2:
        raise RowError(r"field 'text' has no '\n<bot>: ', expected a question and an answer")
    return prompt_completion(parts[0].replace("<human>: ", ""), parts[1])


def parse_airoboros(row: RawRow) -> ParsedRow:
    """Airoboros up to 2.2.1 (https://github.com/jondurbin/airoboros)."""
    instruction, skip = get_text(row, "instruction").strip(), get_text(row, "skip_prompt_formatting", "") or "false"
    if skip.lower() not in BOOLEANS:
        raise RowError(f"field 'skip_prompt_formatting' is {skip!r}, expected true or false")
    prompt = f"{instruction}\n"
    if not BOOLEANS[skip.lower()]:
        instruction = re.sub(r"\s+PLAINFORMAT$", " PLAINFORMAT", instruction)
        prompt = f"{get_text(row, 'system', '').strip() or 'A chat.'}\nUSER: {instruction}\nASSISTANT: "
    return prompt_completion(prompt, get_text(row, "response").strip() + "\n")


ROLES = {"system": "system"}  # the names that datasets give to each role
ROLES |= dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
NEXT_ROLES = {"": "system user", "system": "user", "user": "assistant", "assistant": "user tool"}
NEXT_ROLES |= {"tool": "tool assistant"}


def get_messages(row: RawRow, column: str) -> list[dict[str, Any]]:
    """The turns of a conversation, {role, content} or {from, value}, with standard roles in a valid order."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(get_list(row, column)):
        place, expected = f"{column}[{number}]", NEXT_ROLES[messages[-1]["role"] if messages else ""]
        if not isinstance(turn, Mapping):
            raise RowError(f"{place} is a {type(turn).__name__}, expected an object")
        role_key, content_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
        fields = {f"{place}.{name}": value for name, value in turn.items()}  # with the names that errors show
        name = get_text(fields, f"{place}.{role_key}")
        role = ROLES.get(name.lower())
        if role not in expected.split():
            raise RowError(f"{place} is a turn of {name!r}, expected one of {expected.replace(' ', ' or ')}")
        calls = role == "assistant" and turn.get("tool_calls")
        content = get_text(fields, f"{place}.{content_key}", "" if calls else None)
        if role == "assistant" and not calls and not content.strip():
            raise RowError(f"{place}: the output is empty, expected something to learn")
        messages.append({**turn, "role": role, "content": content})
    return messages


def parse_airoboros_chat(row: RawRow) -> ParsedRow:
    """Airoboros from 3.0 on: LLaMA-2's chat, of which the last answer is supervised."""
    turns = get_messages(row, "conversations")
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else AIROBOROS_SYSTEM
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or any(turn["role"] == "tool" for turn in turns):
        raise RowError("field 'conversations': expected turns of human and gpt, one after the other, the last of gpt")
    question, *between, answer = (turn["content"] for turn in turns)
    prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]"
    for earlier, question in zip(between[::2], between[1::2], strict=True):
        prompt += f" {earlier.strip()} {EOS_MARK}{BOS_MARK}[INST] {question.strip()} [/INST]"
    return prompt_completion(prompt, answer)


def expand_turns(row: RawRow) -> list[RawRow]:
    """One row for each answer of a valid conversation, with everything before it; the last is the row itself."""
    parse_airoboros_chat(row)
    ends = [n for n, turn in enumerate(get_messages(row, "conversations"), 1) if turn["role"] == "assistant"]
    return [*({**row, "conversations": get_list(row, "conversations")[:n]} for n in ends[:-1]), row]


def parse_chat(column: str, row: RawRow) -> ParsedRow:
    """Everything up to the last answer: nothing after it is supervised."""
    messages = get_messages(row, column)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowError(f"field {column!r} has no turn of the assistant, expected an answer to learn")
    return Conversation(messages, get_list(row, "tools") if row.get("tools") else None)


def column_format(*columns: str, inferred: bool = True) -> DatasetFormat:
    """Columns used as they are: prompt and completion, or for plain language modelling the completion alone."""
    return DatasetFormat(columns, lambda row: prompt_completion(*(get_text(row, name) for name in columns)), inferred)


FORMATS: dict[str, DatasetFormat] = {
    "messages": DatasetFormat(("messages",), partial(parse_chat, "messages")),
    "sharegpt": DatasetFormat(("conversations",), partial(parse_chat, "conversations")),
    "airoboros": DatasetFormat(("instruction", "response"), parse_airoboros),
    "alpaca": DatasetFormat(("instruction", "output"), parse_alpaca),
    "self-instruct": column_format("prompt", "completion"),
    "input-output": column_format("input", "output"),
    "hh-rlhf": column_format("chosen"),
    "text": column_format("text"),
    "alpaca-clean": DatasetFormat(("instruction", "output"), parse_alpaca, inferred=False),
    "longform": column_format("input", "output", inferred=False),
    "chip2": DatasetFormat(("text",), parse_chip2, inferred=False),
    "oasst1": column_format("text", inferred=False),
    "input": column_format("input", inferred=False),
    "airoboros_chat": DatasetFormat(("conversations",), parse_airoboros_chat, inferred=False),
}
MASKED_FORMATS: tuple[str, ...] = ("input", "text")  # for masked language models, in order of preference
CUSTOM_FORMAT: re.Pattern[str] = re.compile(r"(.+\.py):([A-Za-z_]\w*)")  # a user's file and function


def get_format(name: str) -> DatasetFormat:
    """A row of FORMATS, or the function that path.py:function names."""
    custom = CUSTOM_FORMAT.fullmatch(name)
    if custom is None:
        return FORMATS[name]
    spec: Any = importlib.util.spec_from_file_location("dataset_format", custom[1])
    module: Any = importlib.util.module_from_spec(spec)
    anything = Exception, SystemExit  # a user's code may raise it
    with reraise_as_user_error(f"--dataset_format {name}", ConfigError, *anything):
        spec.loader.exec_module(module)
        return DatasetFormat((), partial(parse_custom, name, getattr(module, custom[2])))


def parse_custom(name: str, function: Callable[[dict[str, Any]], Any], row: RawRow) -> ParsedRow:
    """Call a user's function on a row."""
    try:
        result = function(dict(row))
        if isinstance(result, Mapping):
            return FORMATS["messages" if "messages" in result else "input-output"].parse(result)
        flags = [bool(s.get("supervised", s.get("learnt"))) for s in result]  # `learnt` is the key's earlier name
        return [{"text": get_text(s, "text"), "supervised": flag} for s, flag in zip(result, flags, strict=True)]
    except (Exception, SystemExit) as error:  # whatever a user's code raises is an error of this row
        expected = "it returns {input, output}, {messages} or a list of {text, supervised}"
        raise RowError(f"{name}: {type(error).__name__}: {shorten(error)}; expected: {expected}") from error


@lru_cache(maxsize=1)
def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the text of any special token of the tokenizer."""
    texts = sorted((str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    return re.compile("|".join(map(re.escape, reversed(texts))) or "(?!)")


def escape_special_tokens(value: Any, special: re.Pattern[str]) -> Any:
    """A user's values for a template: without the nulls that Arrow adds, and special tokens in them stay text."""
    if isinstance(value, str):
        return special.sub(lambda match: match[0][0] + ESCAPE_MARK + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: escape_special_tokens(item, special) for key, item in value.items() if item is not None}
    return [escape_special_tokens(item, special) for item in value] if isinstance(value, list) else value


def apply_template(
    messages: list[Any], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase, prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of a conversation, and the spans of its answers if the template marks them with {% generation %}."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        options: dict[str, Any] = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": marked}
        options |= {"tools": tools, "chat_template": template, **tokenizer.special_tokens_map}
        rendered: Any = render_jinja_template([messages], **options)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template, line {error.lineno}: {shorten(error)}") from error
    except LIBRARY_ERRORS as error:
        raise RowError(f"the chat template refuses it: {shorten(error)}") from error
    return rendered[0][0], rendered[1][0] if marked else None


def render_chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
    """Apply the tokenizer's chat template: every answer with its stop token is supervised, nothing else.

    If the template does not mark its answers, each begins where the text before it with the generation prompt ends, and
    ends with its stop token: white space after that belongs to the template.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template, which chat rows need: pass a --chat_template FILE")
    special = special_token_pattern(tokenizer)
    messages, tools = (escape_special_tokens(part, special) for part in conversation)
    text, spans = apply_template(messages, tools, tokenizer)
    for n in [n for n, message in enumerate(messages) if message["role"] == "assistant"] if spans is None else []:
        before, _ = apply_template(messages[:n], tools, tokenizer, prompt=True)
        after, _ = apply_template(messages[: n + 1], tools, tokenizer)
        if before == after or not (after.startswith(before) and text.startswith(after)):
            raise RowError(
                f"turn {n + 1}: the chat template renders it differently inside the whole conversation; "
                "pass a --chat_template with {% generation %} and {% endgeneration %} around the answers"
            )
        stops = (token.end() for token in special.finditer(after, len(before)) if not after[token.end() :].strip())
        spans = [*(spans or []), (len(before), next(stops, len(after)))]
    bounds = [0, *itertools.chain(*(spans or [])), len(text)]
    texts = [text[start:end] for start, end in itertools.pairwise(bounds)]
    return [{"text": text, "supervised": n % 2 == 1} for n, text in enumerate(texts) if text]


# Presets: arguments of datasets.load_dataset. Each is in the format of its name.
DATASETS: dict[str, dict[str, str]] = {
    "alpaca": {"path": "tatsu-lab/alpaca"},
    "alpaca-clean": {"path": "yahma/alpaca-cleaned"},
    "chip2": {"path": "laion/OIG", "data_files": "unified_chip2.jsonl"},
    # a script dataset, which datasets >= 4 does not run: its parquet conversion
    "self-instruct": {
        "path": "yizhongw/self_instruct",
        "revision": "refs/convert/parquet",
        "data_dir": "self_instruct",
    },
    "hh-rlhf": {"path": "Anthropic/hh-rlhf"},
    "longform": {"path": "akoksal/LongForm"},
    "oasst1": {"path": "timdettmers/openassistant-guanaco"},
}


def infer_format(columns: Iterable[str], where: str, masked: bool = False) -> str:
    """The first format whose columns are all present."""
    columns = set(columns)
    candidates = MASKED_FORMATS if masked else tuple(name for name, f in FORMATS.items() if f.inferred)
    for name in candidates:
        if columns.issuperset(FORMATS[name].columns):
            return name
    needs = "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in candidates)
    names = ", ".join(sorted(columns)) or "(none)"
    raise DataError(f"{where}: no format fits the columns {names}. Needed are, for {needs}")


# ------------------------------------------------------------------------------------
# 4. Arguments: the command line and a YAML or JSON file -> Config
#
# A flag is one field of the dataclass of its group: type, default, help and choices come from there. A flag that was
# renamed is a row of RENAMED_FLAGS. A rule between flags is a row of RULES, checked before anything heavy;
# nothing later edits a Config.
# ------------------------------------------------------------------------------------
def arg(default: Any, text: str) -> Any:
    """A dataclass field with its help text, in which %% stands for a percent sign."""
    return field(default=default, metadata={"help": text})


# fmt: off
@dataclass
class ModelArguments:
    """Model and tokenizer."""

    model_name_or_path: str = arg("EleutherAI/pythia-12b", "Base model: hub id, folder, or .gguf file.")
    trust_remote_code: bool = arg(False, "Run the Python code that comes with model and tokenizer.")
    allow_pickle_weights: bool = arg(False, "Read .bin weights, which are pickles, too; only tensors are taken.")
    use_auth_token: bool = arg(False, "Use this machine's hub login, for gated models.")
    adapter_name_or_path: str | None = arg(None, "Adapter to start from, optimizer fresh. A resume is a rerun.")
    attn_implementation: str | None = arg(None, "Attention kernel: sdpa, eager, flash_attention_2, ...")
    use_fast_tokenizer: bool = arg(True, "Accepted for old command lines: every tokenizer is a fast one today.")
    pad_token: str | None = arg(None, "Token of the vocabulary to pad with.")
    eos_token: str | None = arg(None, "Token of the vocabulary that ends a sequence.")
    bos_token: str | None = arg(None, "Token of the vocabulary that begins a sequence.")
    unk_token: str | None = arg(None, "Token of the vocabulary for what is unknown.")
    padding_side: Literal["right", "left"] = arg("right", "Padding of training batches; generation pads left.")
    tokenizer_patch: str | None = arg(None, "Folder with files to lay over the tokenizer's, for early LLaMA.")
    chat_template: str | None = arg(None, "Jinja file with the chat template, for a tokenizer that has none.")
    rope_scaling: str | None = arg(None, 'For longer contexts, JSON as {"rope_type": "linear", "factor": 2.0}.')
    cache_dir: str | None = arg(None, "Folder for downloads, converted models and encoded datasets.")


@dataclass
class DataArguments:
    """Data: which rows, how they are read, how they are cut."""

    dataset: str = arg("alpaca", "Preset, local file or folder, or hub id; a comma-separated list is concatenated.")
    dataset_format: str | None = arg(None, "Format, or path.py:function; default: the preset's, else by the columns.")
    expand_conversations: bool = arg(False, "airoboros_chat: one row for each answer of a conversation, not the last.")
    include_sources: str = arg("ALL", "Keep the rows whose column `source` is in this comma-separated list.")
    eval_dataset_size: float = arg(1024, "Rows to hold out, or below 1 a share; by default of few rows a tenth.")
    streaming: bool = arg(False, "Read and encode the rows while training, a block at a time. Needs --max_steps.")
    stream_buffer: int = arg(10_000, "Rows of a block of --streaming, which are shuffled and packed together.")
    max_train_samples: int | None = arg(None, "Train on the first N rows, counted after the split.")
    max_eval_samples: int | None = arg(None, "Evaluate and predict on the first N rows.")
    source_max_len: int = arg(1024, "Longest input, in tokens with BOS; cut on the right.")
    target_max_len: int = arg(256, "Longest output, in tokens with EOS; cut on the right.")
    model_max_len: int | None = arg(None, "One limit, in tokens, for input and output together; replaces those two.")
    skip_excess_length: bool = arg(True, "With model_max_len: drop longer training rows instead of cutting them.")
    on_bad_rows: Literal["stop", "skip"] = arg("stop", "At a row of no use: stop, or write it to rejected.jsonl.")
    packing: bool = arg(False, "Fill rows up to the length limit with several examples, each attending to itself.")
    train_on_source: bool = arg(False, "Learn the input tokens too.")
    objective: Literal["auto", "clm", "mlm"] = arg("auto", "Learn the next or masked tokens; auto: as the model does.")
    mask_prob: float = arg(0.15, "mlm: share of the tokens that is chosen to be predicted, above 0.")
    mask_replace_prob: float = arg(0.8, "mlm: share of the chosen that become the mask token.")
    random_replace_prob: float = arg(0.1, "mlm: share of the chosen that become a random token; the rest stay.")
    preview: int = arg(0, "Print the first N rows as they will be trained and statistics of all of them, and exit.")


@dataclass
class QuantisationArguments:
    """Quantisation of the frozen weights."""

    bits: Literal[4, 8, 16, 32] = arg(4, "Bits of a base weight.")
    quant_type: Literal["nf4", "fp4"] = arg("nf4", "4-bit data type.")
    double_quant: bool = arg(True, "Quantise the quantisation constants too: 0.37 bits a parameter less.")
    full_finetune: bool = arg(False, "No adapters: train all weights but the embeddings. Needs bits 16 or 32.")
    max_memory_MB: int = arg(80000, "Memory to use on each GPU, in MB, where one process drives them all.")


@dataclass
class LoraArguments:
    """LoRA."""

    lora_r: int = arg(64, "Rank of the adapters.")
    lora_alpha: float = arg(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = arg(0.0, "Dropout probability on the adapters' input.")
    lora_modules: str = arg("all", "Adapted: all (linear layers but the head), attn, mlp, or leaf names.")
    lora_bias: Literal["none", "all", "lora_only"] = arg("none", "Which bias vectors train too.")
    lora_dtype: Literal["float32", "bfloat16"] = arg("float32", "Data type that the adapters are kept in.")
    use_dora: bool = arg(False, "Weight-decomposed adapters (DoRA).")
    use_rslora: bool = arg(False, "Scale by lora_alpha / sqrt(lora_r).")
    init_lora_weights: str = arg("True", "Start of the adapters: True (B is zero), gaussian, eva, pissa, olora, ...")
    modules_to_save: str | None = arg(None, "Comma list of modules to train whole, e.g. embed_tokens,lm_head.")
    layers_to_freeze: int = arg(0, "Leave the first N layers alone: no adapters, no training.")
    layer_freeze_ratio: float = arg(0.0, "As layers_to_freeze, as a share of the layers, below 1.")


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Training: flags of ours, and defaults that differ from the Trainer's."""

    report_to: str | None = arg("none", "Trackers: none, all, or some of tensorboard, wandb, trackio, ...")
    output_dir: str = arg("./output", "Folder for adapter, checkpoints, metrics and predictions.")
    optim: str = arg("paged_adamw_32bit", "Optimizer, by the Trainer's names.")
    per_device_train_batch_size: int = arg(1, "Rows of a micro-batch on each GPU.")
    gradient_accumulation_steps: int = arg(16, "Micro-batches of one optimizer step.")
    max_steps: int = arg(10000, "Optimizer steps; epochs rule if -1, or if num_train_epochs is given without it.")
    weight_decay: float = arg(0.0, "AdamW's weight decay.")
    learning_rate: float = arg(2e-4, "Highest learning rate.")
    remove_unused_columns: bool = arg(False, "Drop columns that the model does not name.")
    max_grad_norm: float = arg(0.3, "Clip the gradient to this norm.")
    gradient_checkpointing: bool = arg(True, "Recompute activations in the backward pass, as far as memory asks.")
    recompute_layers: str = arg("auto", "Layers to recompute: auto (as memory asks), all, none or a number.")
    auto_batch: bool | None = arg(None, "Regroup a step's rows into the largest micro-batches; default on a GPU.")
    padding_free: bool = arg(True, "Lay rows end to end instead of padding them, where the model allows it.")
    fused_lora: bool = arg(True, "Compute base and adapters in fused functions, where they know the layer.")
    chunked_head: bool = arg(True, "Compute logits only for tokens that are supervised, a few hundred at a time.")
    cuda_graphs: bool = arg(False, "Launch whole layers at once where micro-batches are so small that the GPU waits.")
    offload_activations: bool = arg(False, "Keep the inputs of recomputed layers in the CPU's memory.")
    unpacked_layers: str = arg("auto", "Layers whose weights to keep unpacked too: auto, all, none or a number.")
    plan: bool = arg(False, "Print what the run will take (GiB by part, tokens per second), and exit.")
    plan_gpu: str | None = arg(None, "GPU to plan for, by size or name: 24GiB, 8x80GiB, H100. Default: the one here.")
    liger: bool = arg(True, "Use liger-kernel's norms, activations and rotary embedding, where it has the model.")
    do_train: bool = arg(True, "Train.")
    lr_scheduler_type: str = arg("constant", "Schedule of the learning rate. constant ignores warm-up.")
    warmup_steps: float = arg(0.03, "Warm-up: steps, or below 1 a share of them.")
    logging_steps: float = arg(10, "Steps between lines of the log, or below 1 a share of all.")
    train_sampling_strategy: str = arg("group_by_length", "Order of the rows: group_by_length, random or sequential.")
    save_strategy: str = arg("steps", "When to save: no, steps, epoch or best.")
    save_steps: float = arg(250, "Steps between checkpoints, or below 1 a share of all.")
    save_total_limit: int | None = arg(40, "Checkpoints to keep.")
    overwrite_output_dir: bool = arg(False, "Start anew although output_dir holds a run; its checkpoints go.")
    working_dir: str | None = arg(None, "Folder for all but the final weights, their tokenizer and card.")
    final_output_dir: str | None = arg(None, "Folder for those; default: output_dir.")
    merged_output_dir: str | None = arg(None, "Folder for the base with the adapter merged into it, in 16 bit.")
    merge_base: Literal["original", "dequantized"] = arg("original", "Merge into the base as published or as trained.")
    max_shard_size: str = arg("5GB", "Largest file of a merged or fully fine-tuned model.")
    adam8bit: bool = arg(False, "Short for --optim paged_adamw_8bit.")
    show_traceback: bool = arg(False, "Show an error's traceback; --debug without a value does the same.")

    @property
    def device(self) -> torch.device:
        """Without the number that a CPU has among several processes: transformers 5.17 loads no optimizer onto that."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


@dataclass
class MMLUArguments:
    """MMLU: multiple-choice questions at each evaluation."""

    do_mmlu_eval: bool = arg(False, "Answer MMLU questions at each evaluation.")
    mmlu_split: Literal["eval", "test"] = arg("eval", "Which questions.")
    mmlu_dataset: Literal["mmlu-zs", "mmlu-fs", "mmlu"] = arg("mmlu-fs", "Zero-shot or five-shot (mmlu-fs, mmlu).")
    max_mmlu_samples: int | None = arg(None, "Answer the first N questions.")
    mmlu_source_max_len: int = arg(2048, "Longest prompt, in tokens; cut on the left.")
    mmlu_dir: str = arg("data/mmlu", "Folder of the original's question files; without it cais/mmlu of the hub.")


@dataclass
class GenerationArguments:
    """Generation of predictions; only the values given reach the model's generate."""

    max_new_tokens: int = arg(256, "Longest prediction, in tokens.")
    min_new_tokens: int | None = arg(None, "Shortest prediction, in tokens.")
    do_sample: bool = arg(False, "Sample instead of taking the likeliest token.")
    num_beams: int = arg(1, "Beams of the beam search.")
    num_beam_groups: int = arg(1, "Groups of beams.")
    penalty_alpha: float | None = arg(None, "Degeneration penalty of contrastive search.")
    temperature: float = arg(1.0, "Sampling temperature.")
    top_k: int = arg(50, "Sample among the k likeliest tokens.")
    top_p: float = arg(1.0, "Sample among the likeliest tokens of this total probability.")
    typical_p: float = arg(1.0, "Sample among the most typical tokens of this total probability.")
    diversity_penalty: float = arg(0.0, "Penalty for a token that another beam group chose.")
    repetition_penalty: float = arg(1.0, "Above 1: penalty for tokens that occurred.")
    length_penalty: float = arg(1.0, "Exponent of the length in beam scores.")
    no_repeat_ngram_size: int = arg(0, "No run of this many tokens occurs twice.")
# fmt: on


@dataclass(frozen=True)
class Config:
    """Every flag, by group, as the run uses it."""

    model: ModelArguments
    data: DataArguments
    quant: QuantisationArguments
    lora: LoraArguments
    mmlu: MMLUArguments
    generation: GenerationArguments
    training: TrainingArguments  # last, for its class has the Trainer's own flags too, which end --help
    flags: dict[str, Any]  # every flag by its own name, as resolved; but no token
    explicitly_set: frozenset[str]  # those that the user set
    record: dict[str, Any]  # run.json of the run to repeat, or nothing

    @property
    def masked(self) -> bool:
        """Whether masked tokens are supervised; `auto` is settled once the model's config is known."""
        return self.data.objective == "mlm"


ARGUMENT_GROUPS: tuple[Any, ...] = tuple(get_type_hints(Config)[f.name] for f in dataclasses.fields(Config))[:-3]


class CliArg(NamedTuple):
    """One flag as it was given: on the command line or in a file."""

    name: str  # with underscores, without dashes
    value: str | None  # several joined by commas
    where: str  # how to name it in a message


HUB_TOKEN = re.compile(r"\bhf_\w{8,}")  # somebody may give one to --use_auth_token

# The names of today; of a boolean also what True and False became, where that is not today's default.
RENAMED_FLAGS: dict[str, tuple[str, ...]] = {
    "evaluation_strategy": ("eval_strategy",),
    "warmup_ratio": ("warmup_steps",),
    "group_by_length": ("train_sampling_strategy", "group_by_length", "random"),
    "mlm_probability": ("mask_prob",),
    "no_cuda": ("use_cpu",),
    "use_auth": ("use_auth_token",),
    "push_to_hub_token": ("hub_token",),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2", ""),
    "adafactor": ("optim", "adafactor", ""),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "torchdynamo": ("torch_compile_backend",),
}
# Accepted without effect, and why.
IGNORED_FLAGS: dict[str, str] = {
    "save_safetensors": "weights are always saved as safetensors",
    "sortish_sampler": "use --train_sampling_strategy",
    "sharded_ddp": "use --fsdp",
    "length_column_name": "lengths are counted here, in tokens",
    "auto_find_batch_size": "use --auto_batch, which leaves the optimizer's step as it is",
    "enable_jit_checkpoint": "a signal always saves a checkpoint",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "ddp_broadcast_buffers": "every process has the same ones",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "use --liger, which is on"),
    **dict.fromkeys(
        ("torch_empty_cache_steps", "label_names", "include_for_metrics", "batch_eval_metrics", "prediction_loss_only",
         "eval_do_concat_batches", "eval_use_gather_object", "include_num_input_tokens_seen"),
        "steps and evaluation are our own, see --help"),
    **dict.fromkeys(
        ("use_mps_device", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval", "past_index",
         "ray_scope", "tpu_num_cores", "fp16_opt_level", "xpu_backend", "include_inputs_for_metrics",
         "include_tokens_per_second", "dispatch_batches", "split_batches", "fsdp_min_num_params",
         "push_to_hub_model_id", "push_to_hub_organization"),
        "it has no counterpart in today's Trainer"),
}  # fmt: skip
OLD_FLAGS = RENAMED_FLAGS.keys() | IGNORED_FLAGS.keys()


class Parser(HfArgumentParser):
    """HfArgumentParser with the Trainer's own flags apart, and errors of ours."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """One group for what a class declares itself, one for what it inherits; --help leaves out an empty one."""
        own: Any = self.add_argument_group(dtype.__doc__.rstrip("."))
        others: Any = self.add_argument_group("The Trainer's other flags, with its own defaults")
        hints = get_type_hints(dtype)
        for item in dataclasses.fields(dtype):
            if item.init and item.name not in OLD_FLAGS:
                item.type = hints[item.name]
                self._parse_dataclass_field(own if item.name in dtype.__annotations__ else others, item)

    def error(self, message: str) -> NoReturn:
        """Argparse's own complaints, as ours."""
        raise ConfigError(message.replace("argument ", ""))

    def repeat(self, flags: Mapping[str, Any], argv: Sequence[str]) -> None:
        """Make the flags of a run.json the defaults, which argparse itself does not check against the choices."""
        for action in self._actions:
            value, default, among = flags.get(action.dest), action.default, action.choices
            number = isinstance(default, (int, float)) and not isinstance(value, (int, float, str))
            if action.dest in flags and value != default and (value not in among if among else number):
                expected = f"one of {', '.join(map(str, among))}" if among else f"such as {default}"
                raise ConfigError(f"{argv[0]}: {action.dest} is {value!r}, expected {expected}")
        self.set_defaults(**flags)


def read_config_file(path: Path) -> list[CliArg]:
    """The flags of a YAML or JSON file: a mapping of names to values."""
    with reraise_as_user_error(str(path)):
        text = path.read_text(encoding="utf-8")
        content, words = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # JSON is YAML
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected flags as `name: value` lines, found {type(content).__name__}")
    given = []
    for (name, value), word in zip(content.items(), words.values(), strict=True):
        if value is not None:  # the words as they stand there: YAML takes `no` for False and 1_0 for 10
            word = json.dumps(value) if isinstance(value, dict) else word
            text = ",".join(map(str, word)) if isinstance(word, list) else word
            given.append(CliArg(str(name).replace("-", "_"), text, f"{path}: {name}"))
    return given


# What a run's repetition does not take over: its places, what may destroy or publish, what depends on the machine.
NOT_REPEATED = frozenset({"output_dir", "working_dir", "final_output_dir", "merged_output_dir", "merge_base", "use_cpu",
    "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token", "show_traceback"})  # fmt: skip


def read_run_record(argv: Sequence[str]) -> dict[str, Any]:
    """The run.json that stands first on a command line, if one does."""
    with contextlib.suppress(IndexError, OSError, ValueError):  # read_config_file says what is wrong with a file
        content = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        parts = ("flags", "derived", "versions", "data", "device")
        if isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in parts):
            return content
    return {}


def split_argv(argv: Sequence[str]) -> list[CliArg]:
    """The command line as flags with their values, after those of a config file that stands first."""
    given: list[CliArg] = []
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
            given.append(CliArg(name.replace("-", "_"), value if equals else None, f"--{name}"))
        elif len(given) > from_file:
            before = given[-1].value
            given[-1] = given[-1]._replace(value=token if before is None else f"{before},{token}")
        else:
            raise ConfigError(f"{token}: expected a flag, which begins with --, or a .yaml or .json file first")
    return given


def current_name(item: CliArg, known: set[str]) -> CliArg | None:
    """A flag under its name of today, an old one with a warning; None where it has no effect any more."""
    positive = item.name.removeprefix("no_")  # argparse knows --no_flag for what is on by default
    if positive != item.name and ({item.name, positive} <= known or positive in OLD_FLAGS):
        item = item._replace(name=positive, value=str(not parse_bool(item)))
    if item.name == "logging_dir":
        os.environ["TENSORBOARD_LOGGING_DIR"] = item.value or ""
        log.warning("%s: old name, set as TENSORBOARD_LOGGING_DIR", item.where)
        return None
    if item.name == "debug" and item.value is None:  # with a value it is the Trainer's flag of that name
        return item._replace(name="show_traceback")
    if item.name in IGNORED_FLAGS:
        log.warning("%s: accepted, without effect: %s", item.where, IGNORED_FLAGS[item.name])
        return None
    if item.name in RENAMED_FLAGS:
        new, *meanings = RENAMED_FLAGS[item.name]
        value = meanings[not parse_bool(item)] if meanings else item.value
        if new == "warmup_steps":  # from 1 on, the Trainer would take a ratio for a number of steps
            with contextlib.suppress(ValueError):  # the parser names the flag and its type
                if not 0 <= float(value or "") < 1:
                    raise ConfigError(f"{item.where} {value}: expected a share of the steps, from 0 up to below 1")
        log.warning("%s: old name, read as --%s %s", item.where, new, value if meanings else "")
        return None if value == "" and meanings else CliArg(new, value, item.where)
    if item.name not in known:
        near = difflib.get_close_matches(item.name, sorted(known | OLD_FLAGS), n=5, cutoff=0.5)
        near.sort(key=lambda name: -len(os.path.commonprefix([name, item.name])))  # noqa: RUF071
        raise ConfigError(f"{item.where}: unknown flag, {f'did you mean --{near[0]}?' if near else 'see --help'}")
    return item


def parse_bool(item: CliArg) -> bool:
    """The value of a flag that is on or off; on where it has none."""
    value = BOOLEANS.get((item.value or "").lower())
    if value is None:
        raise ConfigError(f"{item.where} {item.value}: expected True or False")
    return value


def parse_config(argv: Sequence[str]) -> Config:
    """The command line -> a checked Config. A ConfigError names what is unknown, wrong or does not go together."""
    epilog = "A YAML or JSON file with flags may stand first: python qlora.py run.yaml --learning_rate 1e-4"
    parser = Parser(ARGUMENT_GROUPS, prog="qlora.py", allow_abbrev=False, epilog=epilog)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])  # ends here
    known = {word[2:].replace("-", "_") for word in parser._option_string_actions if word.startswith("--")}
    record = read_run_record(argv)
    repeated = {name: value for name, value in record.get("flags", {}).items() if name in known - NOT_REPEATED}
    parser.repeat(repeated, argv)
    items = [item for old in split_argv(argv[1:] if record else argv) if (item := current_name(old, known))]
    flags = vars(parser.parse_args([f"--{name}" + ("" if value is None else f"={value}") for name, value, _ in items]))
    given = frozenset(item.name for item in items)
    if record and "output_dir" not in given:
        raise ConfigError(f"{argv[0]}: to repeat this run, name another folder with --output_dir")
    given |= repeated.keys() & set(record.get("derived", {}).get("given", ()))
    if {"--warmup_ratio", "--warmup_steps"} <= {item.where for item in items}:
        raise ConfigError("--warmup_ratio and --warmup_steps: give one of them")
    flags |= resolve_defaults(flags, given)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not flags.get(precision):  # the Trainer would compute so, whatever is said of it
        raise ConfigError(f"mixed_precision {precision} of accelerate launch: say it with --bf16 or --fp16 too, or no")
    if flags["deepspeed"] == "":
        raise ConfigError("--deepspeed: name a file, also where accelerate launch asks for it (deepspeed_config_file)")
    if flags["deepspeed"] and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed: it is not installed here: DS_BUILD_OPS=0 pip install deepspeed")
    if flags["deepspeed"] and not flags["plan"] and "LOCAL_RANK" not in os.environ:
        raise ConfigError("--deepspeed: start it with torchrun --nproc_per_node N qlora.py, N processes")
    with reraise_as_user_error("flags"):  # output_dir is where the Trainer writes, and all but final_folder
        groups = parser.parse_dict(flags | {"output_dir": flags["working_dir"] or flags["output_dir"]}, True)
    flags["hub_token"] = flags["hub_token"] and "(hidden)"  # which no file is to hold
    config = Config(*groups, flags, given, record)  # type: ignore[call-arg]
    check_config(config)
    check_folders(config)
    return config


def uses_fsdp(flag: Any) -> bool:
    """Whether FSDP spreads the model's weights, by the flags or by `accelerate launch`."""
    return bool(flag) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def resolve_defaults(flags: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Defaults that depend on other flags, on `accelerate launch` or on the machine."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and "deepspeed" not in given
    derived: dict[str, Any] = {"deepspeed": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")} if launched else {}
    if "num_train_epochs" in given and "max_steps" not in given:
        derived["max_steps"] = -1
    if flags["eval_strategy"] != "no":
        derived["do_eval"] = True
    if uses_fsdp(flags["fsdp"]) and "optim" not in given:
        derived["optim"] = "adamw_torch"  # bitsandbytes' can't step on shards
    if uses_fsdp(flags["fsdp"]) and torch.cuda.is_available() and "ddp_backend" not in given:
        derived["ddp_backend"] = "cuda:nccl,cpu:gloo"  # the gradients' norm is taken where they are, offloaded too
    if flags["adam8bit"]:
        derived["optim"] = "paged_adamw_8bit"
    if "," in flags["report_to"]:
        derived["report_to"] = [name.strip() for name in flags["report_to"].split(",")]
    if "project" not in given and "TRACKIO_PROJECT" in os.environ:  # wandb reads its own WANDB_PROJECT
        derived["project"] = os.environ["TRACKIO_PROJECT"]
    if not torch.cuda.is_available():
        derived["use_cpu"] = True
    if flags["gradient_checkpointing_kwargs"] is None:
        derived["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")  # transformers 5.23 warns of the old name, 5.17 knows no other
        if new in flags:
            derived[old] = derived[new] = flags[new] if new in given else derived.get(old, flags[old])
    return derived


# How adapters may start, and why some can't on quantised weights. What peft knows besides is refused for its reason.
LORA_INITS = {
    "true|false|gaussian|eva": "",
    "orthogonal": "peft draws it in the data type of the weights",
    r"pissa(_niter_\d+)?|olora": "rounding the weights again, less a part, leaves an adapter for another base",
}
UNSUPPORTED_LORA_INITS = {
    "loftq": "its adapters make up for the rounding of 4-bit weights and would be wrong on the base as published",
    "corda": "it needs statistics of the data from the full-precision base first",
    "lora_ga": "it needs gradients of the full-precision base first",
}


def lora_init_problem(name: str, quantised: bool) -> str | None:
    """Why adapters can't start in a way, or None."""
    why = next((why for pattern, why in LORA_INITS.items() if re.fullmatch(pattern, name.lower())), None)
    if why is None:
        return UNSUPPORTED_LORA_INITS.get(name.lower(), f"expected one of {', '.join(LORA_INITS)}")
    return f"not on quantised weights, give --bits 16 or 32: {why}" if why and quantised else None


# Flags that name what a run reads, and folders that it writes to.
READS = ("model_name_or_path", "adapter_name_or_path", "tokenizer_patch", "chat_template", "mmlu_dir", "deepspeed")
WRITES = ("output_dir", "working_dir", "final_output_dir", "merged_output_dir")


def check_folders(config: Config) -> None:
    """Refuse output folders that are, or lie above, what the run reads: its files could be overwritten or removed."""
    sources = {f"--{name} {config.flags[name]}": config.flags[name] for name in READS}
    sources |= {f"--dataset {name}": name for name in (config.data.dataset, *config.data.dataset.split(","))}
    for flag in (flag for flag in WRITES if config.flags[flag]):
        folder = Path(config.flags[flag]).expanduser().resolve()
        for what, name in sources.items():
            source = Path(str(name or "").strip()).expanduser().resolve()
            read = source if source.is_dir() else source.parent
            if name and source.exists() and folder in (read, *read.parents):
                raise ConfigError(
                    f"--{flag} {folder}: the run reads {what} from there; name another folder to write to"
                )


def final_folder(config: Config) -> Path:
    """Where the final adapter or model goes, with its tokenizer and card; all else goes to training.output_dir."""
    return Path(config.flags["final_output_dir"] or config.flags["output_dir"])


def rope_parameters(text: str | None) -> dict[str, Any] | None:
    """--rope_scaling as a dictionary; the key `type` of old configs is today's `rope_type`."""
    with reraise_as_user_error("--rope_scaling: not JSON"):
        value = None if text is None else json.loads(text)
    if not isinstance(value, dict | None):
        raise ConfigError(f'--rope_scaling {text}: expected an object such as {{"rope_type": "linear", "factor": 2.0}}')
    return value and {("rope_type" if key == "type" else key): item for key, item in value.items()}


SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "typical_p")  # what the library refuses unless it samples
GENERATION_FLAGS = ("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config",
    *(f.name for f in dataclasses.fields(GenerationArguments)))  # fmt: skip
# What a masked language model has no use for: it has no output of its own, and generates nothing.
CAUSAL_ONLY_FLAGS = frozenset({"target_max_len", "train_on_source", "chat_template", "do_mmlu_eval", *GENERATION_FLAGS})
LORA_FLAGS = frozenset(f.name for f in dataclasses.fields(LoraArguments))
URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")

# fmt: off
# What a flag may be, on its own: the flags, what is expected of them, and whether a value is that.
VALUE_CHECKS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("max_train_samples max_eval_samples source_max_len target_max_len model_max_len max_mmlu_samples "
     "mmlu_source_max_len max_new_tokens per_device_train_batch_size per_device_eval_batch_size "
     "gradient_accumulation_steps lora_r max_memory_MB stream_buffer", "at least 1", lambda x: x >= 1),
    ("learning_rate weight_decay max_grad_norm dataloader_num_workers num_train_epochs layers_to_freeze preview",
     "0 or more", lambda x: 0 <= x < math.inf),
    ("lora_alpha temperature", "more than 0", lambda x: 0 < x < math.inf),
    ("lora_dropout layer_freeze_ratio label_smoothing_factor", "from 0 up to below 1", lambda x: 0 <= x < 1),
    ("mask_prob", "above 0 and at most 1", lambda x: 0 < x <= 1),
    ("seed", "from 0 up to 2**32 - 1", lambda x: 0 <= x < 2**32),
    ("eval_dataset_size", "a number of rows, or a share below 1", lambda x: 0 < x < 1 or (x > 0 and x % 1 == 0)),
    ("max_steps", "a number of steps, or -1 and --num_train_epochs", lambda x: x != 0),
    ("recompute_layers unpacked_layers", "auto, all, none or a number",
     lambda x: re.fullmatch(r"auto|all|none|\d+", x)),
    ("max_shard_size", "a whole number and KB, MB, GB or TB, as in 5GB", lambda x: re.fullmatch(r"[1-9]\d*[KMGT]B", x)),
    ("train_sampling_strategy", "group_by_length, random or sequential",
     lambda x: x in ("group_by_length", "random", "sequential")),
    ("include_sources", "a comma-separated list, or ALL", lambda x: x.strip(" ,")),
    ("dataset", "a preset, a file, a folder or a hub id", lambda x: x.strip(" ,")),
)
# A flag, and another without which it means nothing.
REQUIRES = (("merge_base", "merged_output_dir"), ("skip_excess_length", "model_max_len"),
            ("stream_buffer", "streaming"), ("plan_gpu", "plan"), ("do_mmlu_eval", "do_eval"))
# Flags of which one leaves the other without a meaning.
MUTUALLY_EXCLUSIVE = (("full_finetune", "adapter_name_or_path"), ("merged_output_dir", "full_finetune"),
          ("preview", "plan"),
          ("model_max_len", "source_max_len"), ("model_max_len", "target_max_len"), ("adam8bit", "optim"),
          ("layers_to_freeze", "layer_freeze_ratio"), ("overwrite_output_dir", "resume_from_checkpoint"))

# Every rule between flags: whether it is broken, by the flags and what `flags_of` adds to them, and a message with the
# way out. The first that is broken ends the run. To add one: a row here, one in its tests.
RULES: tuple[tuple[Callable[[Any], Any], str], ...] = (
    *((lambda f, name=name, holds=holds: (value := getattr(f, name)) is not None and not holds(value),
       f"--{name} {{{name}}}: expected {expected}")
      for names, expected, holds in VALUE_CHECKS for name in names.split()),
    *((lambda f, a=a, b=b: a in f.explicitly_set and getattr(f, a) and not getattr(f, b), f"--{a} needs --{b}")
      for a, b in REQUIRES),
    *((lambda f, a=a, b=b: {a, b} <= f.explicitly_set and getattr(f, a) and getattr(f, b),
       f"--{a} and --{b}: give one of them") for a, b in MUTUALLY_EXCLUSIVE),
    (lambda f: f.telling, "--{telling}: a URL with a password, which the run's files would show: log in instead"),
    (lambda f: not (f.do_train or f.do_eval or f.do_predict or f.merged_output_dir),
     "nothing to do: --do_train, --do_eval, --do_predict are off, and there is no --merged_output_dir"),
    (lambda f: f.merged_output_dir and Path(f.merged_output_dir).resolve() in f.folders,
     "--merged_output_dir {merged_output_dir}: the run's own folder, name another"),
    (lambda f: f.full_finetune and f.bits < 16,
     "--full_finetune: weights rounded to --bits {bits} take no small steps of training, give 16 or 32"),
    (lambda f: f.by_fsdp and re.search(r"8bit|paged|lion|ademamix", f.optim),
     "--fsdp: bitsandbytes' --optim {optim} can't step on shards, give adamw_torch"),
    (lambda f: f.by_fsdp and f.bits == 8, "--fsdp: it can't shard --bits 8, give 4 or 16"),
    (lambda f: f.by_fsdp and str(f.spread.get("version", 2)) != "2",
     "--fsdp: version {spread[version]} has its end in transformers, give version 2 in --fsdp_config (in the file of "
     "accelerate launch fsdp_version)"),
    (lambda f: f.by_fsdp and "SIZE" in str(f.spread.get("auto_wrap_policy")).upper(),
     "--fsdp_config: auto_wrap_policy {spread[auto_wrap_policy]} would shard what is no layer, leave it out"),
    (lambda f: f.by_fsdp and str(f.spread.get("activation_checkpointing")).lower() == "true",
     "--fsdp_config: activation_checkpointing would save weights under other names, give --recompute_layers all"),
    (lambda f: f.fsdp and f.unheard, "--fsdp_config: {unheard}: expected some of {heard}"),
    (lambda f: f.objective == "clm" and f.do_predict and not f.predict_with_generate,
     "--do_predict needs --predict_with_generate"),
    (lambda f: f.objective == "mlm" and f.causal_flags,
     "{causal_flags}: of no use with a masked language model (--objective mlm)"),
    (lambda f: f.objective == "clm" and f.explicitly_set & {"mask_prob", "mask_replace_prob", "random_replace_prob"},
     "--mask_prob, --mask_replace_prob, --random_replace_prob: nothing is masked with --objective clm, give mlm"),
    (lambda f: f.objective == "mlm" and f.padding_side == "left",
     "--padding_side left: a masked language model (--objective mlm) pads on the right"),
    (lambda f: f.objective == "mlm" and f.dataset_format not in (None, *MASKED_FORMATS),
     "--dataset_format {dataset_format}: expected input or text with --objective mlm"),
    (lambda f: not (min(f.mask_replace_prob, f.random_replace_prob) >= 0
                    and f.mask_replace_prob + f.random_replace_prob <= 1),
     "--mask_replace_prob {mask_replace_prob}, --random_replace_prob {random_replace_prob}: expected a sum up to 1"),
    (lambda f: not f.gradient_checkpointing and f.recompute_layers not in ("auto", "none", "0"),
     "--recompute_layers {recompute_layers} and --gradient_checkpointing False: give one of them"),
    (lambda f: f.offload_activations and (not f.gradient_checkpointing or f.recompute_layers in ("none", "0")),
     "--offload_activations needs recomputed layers: drop --recompute_layers none, --gradient_checkpointing False"),
    (lambda f: f.cuda_graphs and (not f.gradient_checkpointing or f.recompute_layers not in ("auto", "all")),
     "--cuda_graphs recompute all layers: give --recompute_layers all"),
    (lambda f: f.cuda_graphs and (f.offload_activations or f.full_finetune or not f.padding_free or f.fsdp
                                  or f.deepspeed),
     "--cuda_graphs: not with --offload_activations, --full_finetune, --padding_free False, --fsdp or --deepspeed"),
    (lambda f: str(f.resume_from_checkpoint).lower() == "false",
     "--resume_from_checkpoint False: a rerun resumes by itself, give --overwrite_output_dir to start anew"),
    (lambda f: f.start_problem, "--init_lora_weights {init_lora_weights}: {start_problem}"),
    (lambda f: f.init_lora_weights.lower() == "orthogonal" and f.lora_r % 2 == 1,
     "--init_lora_weights orthogonal: --lora_r {lora_r} is odd, it must be even"),
    (lambda f: f.metric_for_best_model is not None and "mmlu_" not in f.metric_for_best_model
     and f.metric_for_best_model.removeprefix("eval_") not in f.metrics.split(", "),
     "--metric_for_best_model {metric_for_best_model}: expected {metrics} or an MMLU metric"),
    (lambda f: "mmlu_" in (f.metric_for_best_model or "") and not f.do_mmlu_eval,
     "--metric_for_best_model {metric_for_best_model} needs --do_mmlu_eval"),
    (lambda f: f.num_beam_groups > 1 or f.penalty_alpha is not None or f.diversity_penalty != 0,
     "--num_beam_groups, --diversity_penalty and --penalty_alpha: transformers generates in these ways no more"),
    (lambda f: f.push_to_hub and "hub_strategy" in f.explicitly_set and f.hub_strategy != "end",
     "--push_to_hub pushes what is final, no checkpoints: give --hub_strategy end, not {hub_strategy}"),
    (lambda f: f.streaming and f.do_train and f.max_steps < 1,
     "--streaming: how long it is nobody knows: give --max_steps, not epochs"),
    (lambda f: f.streaming and "," in f.dataset and not Path(f.dataset).exists(),
     "--streaming: --dataset names several: give one, or a folder"),
    (lambda f: f.streaming and f.eval_dataset_size < 1,
     "--streaming: --eval_dataset_size {eval_dataset_size:g}: expected a number of rows, nobody knows a share"),
    (lambda f: f.streaming and f.dataloader_num_workers > 0,
     "--streaming: its blocks are read in order: give --dataloader_num_workers 0"),
    (lambda f: f.streaming and f.do_train and "epoch" in (f.save_strategy, f.eval_strategy, f.logging_strategy),
     "--streaming: it has no epochs: give --save_strategy, --eval_strategy and --logging_strategy steps"),
    (lambda f: "vicuna" in f.dataset.replace(" ", "").split(","),
     "--dataset vicuna: its data was never released; a file of your own, or one of {datasets}"),
    (lambda f: f.dataset_format not in (None, *FORMATS) and not CUSTOM_FORMAT.fullmatch(f.dataset_format),
     "--dataset_format {dataset_format}: expected one of {formats}, or path.py:function"),
    (lambda f: (own := CUSTOM_FORMAT.fullmatch(f.dataset_format or "")) and not Path(own[1]).is_file(),
     "--dataset_format {dataset_format}: no such file"),
    (lambda f: f.expand_conversations and f.dataset_format != "airoboros_chat",
     "--expand_conversations needs --dataset_format airoboros_chat"),
    (lambda f: f.unknown, "--report_to {unknown}: expected none, all, or some of {known}"),
    (lambda f: f.missing, "--report_to {missing}: its Python package is not installed here"),
)

# Flags that do nothing beside others, though nothing is wrong with them: said once, by `hints`.
INEFFECTIVE_FLAGS: tuple[tuple[Iterable[str], Callable[[Any], Any], str], ...] = (
    (("quant_type", "double_quant"), lambda f: f.bits != 4, "bits is {bits}"),
    (("unpacked_layers",), lambda f: f.bits >= 16, "bits is {bits}"),
    (("merge_base",), lambda f: f.bits >= 16, "bits is {bits}, so a base is merged into as it was published"),
    (("max_shard_size",), lambda f: not (f.merged_output_dir or f.full_finetune),
     "only a merged model (--merged_output_dir) and one of --full_finetune are written in shards"),
    (LORA_FLAGS - {"layers_to_freeze", "layer_freeze_ratio"}, lambda f: f.full_finetune,
     "a full fine-tune has no adapters"),
    (LORA_FLAGS, lambda f: f.adapter_name_or_path is not None,
     "an adapter given by adapter_name_or_path keeps its own rank, alpha and layers"),
    (GENERATION_FLAGS, lambda f: not f.do_predict, "nothing is generated without --do_predict"),
    (SAMPLING_FLAGS, lambda f: f.do_predict and not f.do_sample,
     "predictions are not sampled unless --do_sample is given"),
    (("length_penalty",), lambda f: f.do_predict and f.num_beams == 1 and f.generation_num_beams in (None, 1),
     "it weighs beams: --num_beams is 1"),
    (("mmlu_split", "mmlu_dataset", "max_mmlu_samples", "mmlu_source_max_len", "mmlu_dir"),
     lambda f: not f.do_mmlu_eval, "no question is asked without --do_mmlu_eval"),
    (("eval_dataset_size", "max_eval_samples", "per_device_eval_batch_size"),
     lambda f: not (f.do_eval or f.do_predict), "no row is held out without --do_eval or --do_predict"),
    (("eval_steps", "eval_delay"), lambda f: f.eval_strategy == "no", "eval_strategy is no"),
    (("save_steps",), lambda f: f.save_strategy != "steps", "save_strategy is {save_strategy}"),
    (("num_train_epochs",), lambda f: f.max_steps > 0, "max_steps {max_steps} rules"),
    (("overwrite_output_dir",), lambda f: not f.do_train, "nothing is trained"),
    (("warmup_steps",), lambda f: f.lr_scheduler_type == "constant",
     "lr_scheduler_type constant ignores warm-up; constant_with_warmup honours it"),
    (("use_fast_tokenizer",), lambda f: not f.use_fast_tokenizer, "every tokenizer is a fast one today"),
    (("fsdp_config",), lambda f: not f.fsdp, "it is for --fsdp; accelerate launch has a file of its own"),
    (("max_memory_MB",), lambda f: f.use_cpu or "LOCAL_RANK" in os.environ, "it is for one process with many GPUs"),
    (("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
     lambda f: not f.push_to_hub, "nothing is pushed without --push_to_hub; --use_auth_token is for gated downloads"),
    (("project", "trackio_space_id"), lambda f: "trackio" not in f.trackers, "they are for --report_to trackio"),
)
# fmt: on


# What FSDP2 hears of --fsdp_config.
FSDP_CONFIG = {"version", "cpu_offload", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "reshard_after_forward",
               "state_dict_type", "cpu_ram_efficient_loading"}  # fmt: skip

FSDP_LAUNCH = ("version", "auto_wrap_policy", "activation_checkpointing")  # of accelerate launch, what has a rule


def flags_of(config: Config) -> argparse.Namespace:
    """What rules are about: every flag by its name, and what follows from several of them or from the tables."""
    flags, given, trackers = config.flags, config.explicitly_set, config.training.report_to or ()
    installed = {*get_available_reporting_integrations(), "azure_ml", "flyte"} if trackers else ()  # two not looked for
    launched = {name: value for name in FSDP_LAUNCH if (value := os.environ.get(f"FSDP_{name.upper()}"))}
    spread: Any = config.training.fsdp_config if flags["fsdp"] else {"version": 1} | launched
    return argparse.Namespace(
        **flags,
        by_fsdp=uses_fsdp(flags["fsdp"]),
        spread=spread,
        unheard=", ".join(name for name in sorted(spread or ()) if spread[name] and name not in FSDP_CONFIG),
        heard=", ".join(sorted(FSDP_CONFIG)),
        explicitly_set=given,
        causal_flags=", ".join(f"--{name}" for name in sorted(given & CAUSAL_ONLY_FLAGS) if flags[name] is not False),
        telling=next((name for name, value in flags.items() if URL_WITH_PASSWORD.search(str(value))), ""),
        folders={path.resolve() for path in (Path(config.training.output_dir), final_folder(config))},
        start_problem=lora_init_problem(config.lora.init_lora_weights, config.quant.bits < 16),
        metrics="loss, perplexity" + (", masked_accuracy" if flags["objective"] != "clm" else ""),
        trackers=trackers,
        unknown=", ".join(name for name in trackers if name not in INTEGRATION_TO_CALLBACK),
        missing=", ".join(name for name in trackers if name not in installed),
        known=", ".join(INTEGRATION_TO_CALLBACK),
        datasets=", ".join(DATASETS),
        formats=", ".join(FORMATS),
    )


def check_config(config: Config) -> None:
    """Every rule between flags, each with the way out; the first that is broken is a ConfigError."""
    f = flags_of(config)
    for broken, message in RULES:
        if broken(f):
            raise ConfigError(message.format(**vars(f)))
    rope_parameters(config.model.rope_scaling)
    differing = getattr(getattr(config.training, "hf_deepspeed_config", None), "mismatches", ())
    if differing:
        values = ", ".join(re.sub("^- ds | hf", "", line) for line in differing)
        raise ConfigError(f'--deepspeed {f.deepspeed}: {values}: give "auto" there')


def hub_options(config: Config) -> dict[str, Any]:
    """What every function that may download takes."""
    return {"cache_dir": config.model.cache_dir, "token": True if config.model.use_auth_token else None}


# ------------------------------------------------------------------------------------
# 5. Loading: Config -> Splits of rows as segments
#
# Every row of every file becomes segments, once, in an Arrow cache. A row that can't be used keeps its problem and what
# was read, so that the cache knows it too; drop_bad_rows then stops the run or writes it to rejected.jsonl.
# To read another kind of file: one function that yields (line, row or RowError), and one row of READERS.
# ------------------------------------------------------------------------------------
NumberedRows = Iterator[tuple[int, Any]]  # (line or row number from 1, the row or a RowError)

LONGEST_CELL = 2**27  # characters: a longer one is a quote left open
SPLIT_NAMES = ("eval", "validation", "test")  # for evaluation, in order of preference
REJECTED = "rejected.jsonl"
EVAL_SPLIT_SEED = 42  # the original's: the same rows are held out
DATASETS_ERRORS = (RuntimeError, datasets.exceptions.DatasetsError)  # beside LIBRARY_ERRORS
ROW_FEATURES = datasets.Features(
    {"segments": [{"text": datasets.Value("string"), "supervised": datasets.Value("bool")}]}
    | {"rendered": datasets.Value("bool")}  # by a chat template, which adds the special tokens
    | dict.fromkeys(("where", "category", "problem", "raw"), datasets.Value("string"))
)


class Splits(NamedTuple):
    """The rows of a run: segments at first, encoded later."""

    train: Any | None
    eval: Any | None


def read_json_lines(stream: Any) -> NumberedRows:
    """JSON lines, or one JSON array, which is read into memory whole."""
    first = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    if first.lstrip().startswith("["):
        try:
            yield from enumerate(json.load(stream), start=1)
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON: {shorten(getattr(error, 'msg', error))}, expected one array of rows"
            yield getattr(error, "lineno", 1), RowError(reason)
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, RowError(f"not valid JSON: {shorten(error)}, expected one object in a line", line)


def read_delimited(stream: Any, delimiter: str) -> NumberedRows:
    """CSV or TSV with a header; every cell is text: an empty one is an empty string, and NA is NA."""
    csv.field_size_limit(LONGEST_CELL)  # the default of 128 KiB is shorter than many documents
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    with reraise_as_user_error(f"{stream.name}:1: the header is not valid CSV", DataError, csv.Error):
        header = next(reader, [])
    if len(set(header)) < len(header):
        raise DataError(f"{stream.name}: the column {max(header, key=header.count)!r} appears twice in the header")
    cells: list[str] | None = []
    while cells is not None:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, RowError(f"not valid CSV: {error}")
            continue
        if cells and len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif cells:  # an empty line has none
            yield number, RowError(shorten(f"{len(cells)} fields, expected {len(header)}: {', '.join(header)}"), cells)


def read_parquet(stream: Any) -> NumberedRows:
    """Parquet, a few thousand rows at a time."""
    batches = ParquetFile(stream.buffer).iter_batches(4096)  # the bytes below the text
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[Any], NumberedRows]] = {
    ".json": read_json_lines,
    ".jsonl": read_json_lines,
    ".csv": lambda stream: read_delimited(stream, ","),
    ".tsv": lambda stream: read_delimited(stream, "\t"),
    ".parquet": read_parquet,
}


def data_suffix(path: Path) -> str:
    """The suffix that selects the reader, ignoring .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_file(path: Path) -> NumberedRows:
    """The rows of one local file; a DataError if it can't be read to its end."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    with reraise_as_user_error(str(path), DataError), open_file(path, "rb") as file:
        # bytes that are not UTF-8 become lone surrogates, which get_text reports with the row they are in
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from READERS[data_suffix(path)](text)


@dataclass(frozen=True)
class RowSource:
    """Raw rows of local files or of the datasets library, as pairs (where, row or RowError)."""

    name: str  # for messages
    files: tuple[Path, ...] = ()
    loaded: Any | None = None  # a Dataset, or an IterableDataset of the hub
    first: int = 0  # rows to skip
    last: int | None = None  # rows to read, the skipped ones included

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return itertools.islice(self._rows(), self.first, self.last)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for path in self.files:
            for number, row in read_file(path):
                yield f"{path}:{number}", row
        with reraise_as_user_error(self.name, DataError, *DATASETS_ERRORS):
            for number, row in enumerate(self.loaded or (), start=1):
                yield f"{self.name}:{number}", row

    def fingerprint(self) -> str:
        """Changes with the content; that of a stream with its first rows."""
        own = getattr(self.loaded, "_fingerprint", None)
        content = [f"{path}:{file_digest(path)}" for path in self.files] or own or list(itertools.islice(self, 100))
        return digest(content, self.first, self.last)

    def columns(self) -> list[str]:
        """The columns of the first rows; a JSON line may omit empty ones."""
        if self.loaded is not None and self.loaded.column_names:
            return list(self.loaded.column_names)
        rows = (row for _, row in self if isinstance(row, Mapping))
        return sorted({name for row in itertools.islice(rows, 100) for name in row})


class RowStream(NamedTuple):
    """Rows that are read, rendered and encoded while training (--streaming)."""

    source: RowSource
    format_name: str


def digest(*parts: Any) -> str:
    """A short hash of the parts' text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A short hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


CODE_VERSION = file_digest(Path(__file__))  # rows that another version of this file encoded are encoded again


def find_splits(name: str, config: Config) -> dict[str, RowSource]:
    """A dataset's splits by name, before any row is read."""
    path = Path(name).expanduser()
    if name in DATASETS:
        return load_from_hub(config, **DATASETS[name])
    if path.is_dir():
        return find_splits_in_folder(path)
    if path.is_file():
        if data_suffix(path) not in READERS:
            raise DataError(f"{path}: unknown kind of file, expected {', '.join(READERS)}, or one of them with .gz")
        return {"train": RowSource(name, (path,))}
    if path.suffix and data_suffix(path) in READERS:
        raise DataError(f"--dataset {name}: no such file")
    return load_from_hub(config, name)


def find_splits_in_folder(folder: Path) -> dict[str, RowSource]:
    """A folder of data files, or one written by `save_to_disk`."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        with reraise_as_user_error(str(folder), DataError):
            return as_sources(str(folder), datasets.load_from_disk(str(folder)))
    splits: dict[str, tuple[Path, ...]] = defaultdict(tuple)
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "."):
        if data_suffix(file) in READERS:
            match = re.match(rf"(train|{'|'.join(SPLIT_NAMES)})(?![A-Za-z0-9])", file.name)
            splits[match[1] if match else ""] += (file,)
    if not splits:
        raise DataError(f"{folder}: no data file in it, expected {', '.join(READERS)}, or what save_to_disk writes")
    if "" in splits and len(splits) > 1:
        others = ", ".join(file.name for file in splits[""])
        raise DataError(f"{folder}: {others} beside files named after splits: name all train, eval, ..., or none")
    return {split or "train": RowSource(str(folder), files) for split, files in splits.items()}


def load_from_hub(config: Config, path: str, **options: Any) -> dict[str, RowSource]:
    """All splits of a dataset on the hub."""
    what = f"--dataset {path}: no local file of that name, and the hub does not give it"
    options |= {"streaming": True} if config.data.streaming else {}
    with reraise_as_user_error(what, DataError, *DATASETS_ERRORS):
        return as_sources(path, datasets.load_dataset(path, **hub_options(config), **options))


def as_sources(name: str, loaded: Any) -> dict[str, RowSource]:
    """The datasets library loads one dataset or a dictionary of splits."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {split: RowSource(f"{name}[{split}]", loaded=dataset) for split, dataset in splits.items()}


def choose_format(name: str, sources: Mapping[str, RowSource], config: Config) -> str:
    """The format of a dataset's rows: the flag, the preset's own, or inferred from the columns."""
    source, data = next(iter(sources.values())), config.data
    columns = source.columns()
    if not columns:
        where, row = next(iter(source), (name, RowError("no row in it")))
        with reraise_as_user_error(where, DataError):  # a RowError is a ValueError
            check_row(row)
    if data.dataset_format:
        chosen, why = data.dataset_format, "--dataset_format"
    elif name in DATASETS and not config.masked:
        chosen, why = name, "the preset's"
    else:
        chosen, why = infer_format(columns, name, config.masked), "inferred from the columns"
    if data.include_sources != "ALL" and "source" not in columns:
        raise DataError(f"{name}: --include_sources needs a column source, found {', '.join(columns)}")
    if missing := sorted(set(get_format(chosen).columns) - set(columns)):
        raise DataError(
            f"{name}: no column {', '.join(missing)}, found {', '.join(columns)}. "
            f"The format is {chosen} ({why}); others: {', '.join(FORMATS)}"
        )
    log.info("%s: format %s, %s", name, chosen, why)
    return chosen


def check_row(row: Any) -> Mapping[str, Any]:
    """Raise the reader's RowError, or one for what is not an object."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is a {type(row).__name__}, expected an object with fields")
    return row


def select_rows(source: RowSource, data: DataArguments) -> Iterator[dict[str, Any]]:
    """The rows of --include_sources; with --expand_conversations a row for each answer of a conversation."""
    sources = None if data.include_sources == "ALL" else {name.strip() for name in data.include_sources.split(",")}
    found = False
    for where, row in source:
        if sources is None or not isinstance(row, Mapping) or get_optional_text(row, "source") in sources:
            found, turns = True, [row]
            with contextlib.suppress(RowError, RecursionError):  # to_segments reports it
                turns = expand_turns(check_row(row)) if data.expand_conversations else turns
            yield from ({"where": where, "row": turn} for turn in turns)
    if sources and not found:
        raise DataError(f"{source.name}: no row whose source is in --include_sources {data.include_sources}")


def to_segments(row: Any, dataset_format: DatasetFormat, tokenizer: Any) -> tuple[list[Segment], bool]:
    """A raw row as segments, and whether a chat template rendered them; a RowError if it can't be used."""
    parsed = dataset_format.parse(check_row(row))
    rendered = isinstance(parsed, Conversation)
    segments = render_chat(parsed, tokenizer) if isinstance(parsed, Conversation) else parsed
    if not any(segment["supervised"] and segment["text"].strip() for segment in segments):
        column = "".join(dataset_format.columns[-1:]) or "output"
        raise RowError(f"field {column!r}: the output is empty, expected something to learn")
    return [{**segment, "text": to_valid_utf8(segment["text"])} for segment in segments], rendered


def normalize_row(where: str, row: Any, dataset_format: DatasetFormat, tokenizer: Any) -> dict[str, Any]:
    """A raw row as ROW_FEATURES; a bad one has no segments but a problem, and what was read as JSON."""
    texts, rendered = {"where": where, "category": "", "problem": "", "raw": ""}, False
    segments: list[Segment] = []
    try:
        texts["category"] = get_optional_text(check_row(row), "category") or get_optional_text(row, "source")
        segments, rendered = to_segments(row, dataset_format, tokenizer)
    except (RowError, RecursionError) as error:
        texts |= {"problem": str(error) if isinstance(error, RowError) else "nested too deeply to be read"}
        with contextlib.suppress(RecursionError):
            texts["raw"] = json.dumps(row.raw if isinstance(row, RowError) else row, default=str)
    texts = {name: to_valid_utf8(text) for name, text in texts.items()}
    return {"segments": segments, "rendered": rendered, **texts}


def normalize_rows(source: RowSource, format_name: str, data: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """All rows of a source, for Dataset.from_generator."""
    dataset_format = get_format(format_name)
    for row in select_rows(source, data):
        yield normalize_row(**row, dataset_format=dataset_format, tokenizer=tokenizer)


def load_rows(source: RowSource, format_name: str, config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """One split as an Arrow dataset with ROW_FEATURES, from the cache if the same content was read before."""
    data, custom = config.data, CUSTOM_FORMAT.fullmatch(format_name)
    depends: list[Any] = [source.name, source.fingerprint(), format_name, custom and file_digest(Path(custom[1]))]
    depends += [data.expand_conversations, data.include_sources]
    if tokenizer:
        depends += [tokenizer.chat_template, tokenizer.special_tokens_map, special_token_pattern(tokenizer).pattern]
    raw = {"source": source, "format_name": format_name, "data": data, "tokenizer": tokenizer}
    options = {"cache_dir": config.model.cache_dir, "fingerprint": digest("rows", CODE_VERSION, *depends)}
    try:
        return datasets.Dataset.from_generator(normalize_rows, ROW_FEATURES, gen_kwargs=raw, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, QLoRAError):
            raise error.__cause__ from None
        raise


def load_splits(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> Splits:
    """Rows to train and to evaluate on, of every dataset named. Chats need the tokenizer."""
    args, data = config.training, config.data
    if args.process_index == 0 and not (data.streaming or data.preview):  # a stream's resume reads no row again
        Path(args.output_dir, REJECTED).unlink(missing_ok=True)
    parts: dict[str, list[Any]] = {"train": [], "eval": []}
    evaluating = args.do_eval or args.do_predict
    names = [data.dataset] if Path(data.dataset).exists() else re.split(r"\s*,\s*", data.dataset.strip())
    for name in filter(None, names):
        sources = find_splits(name, config)
        format_name = choose_format(name, sources, config)
        held_out = next((split for split in SPLIT_NAMES if split in sources), "") if evaluating else ""
        if "train" not in sources and (args.do_train or not held_out):
            raise DataError(f"{name}: no split named train, found {', '.join(sources) or 'none'}")
        if data.streaming:
            return stream_splits(sources["train"], sources.get(held_out), format_name, config, tokenizer)
        for part, split in (("train", "train"), ("eval", held_out)):
            if split in sources:
                rows = load_rows(sources[split], format_name, config, tokenizer)
                log.info("%s: %d rows in split %s", name, len(rows), split)
                parts[part].append(rows)
    splits = Splits(*(drop_bad_rows(concatenate(part), config) for part in parts.values()))
    if evaluating and splits.eval is None and splits.train is not None:
        splits = train_eval_split(splits.train, config)
    train = take_rows(splits.train, data.max_train_samples) if needs_train_rows(config) else None
    return Splits(train, take_rows(splits.eval, data.max_eval_samples))


def stream_splits(
    train: RowSource, held_out: RowSource | None, format_name: str, config: Config, tokenizer: Any
) -> Splits:
    """A stream to train on; its first rows are evaluated on, unless there is a split for that."""
    data, rows = config.data, None
    if config.training.do_eval or config.training.do_predict:
        count = sys.maxsize if held_out else int(data.eval_dataset_size)
        source = dataclasses.replace(held_out or train, last=min(count, data.max_eval_samples or count))
        rows = drop_bad_rows(load_rows(source, format_name, config, tokenizer), config)
        train = train if held_out else dataclasses.replace(train, first=count)
    if data.max_train_samples is not None:
        train = dataclasses.replace(train, last=train.first + data.max_train_samples)
    return Splits(RowStream(train, format_name) if needs_train_rows(config) else None, rows)


def needs_train_rows(config: Config) -> bool:
    """To train, or to compare a merged model on if no rows are held out."""
    args = config.training
    return args.do_train or (args.merged_output_dir is not None and not (args.do_eval or args.do_predict))


def concatenate(parts: list[Any]) -> Any | None:
    """Datasets one after the other; the library's own fingerprint differs each time."""
    rows: Any = datasets.concatenate_datasets(parts) if parts else None
    if parts:
        rows._fingerprint = digest(*(part._fingerprint for part in parts))
    return rows


def take_rows(rows: Any | None, limit: int | None) -> Any | None:
    """The first rows, or all of them."""
    return rows if rows is None or limit is None or limit >= len(rows) else rows.select(range(limit))


def train_eval_split(rows: Any, config: Config) -> Splits:
    """Hold rows out for evaluation, shuffled with the original's seed."""
    size, total = config.data.eval_dataset_size, len(rows)
    if "eval_dataset_size" not in config.explicitly_set and total < 4 * size:
        size = max(1, total // 10)
        log.info("a tenth of %d rows, %d, is held out; --eval_dataset_size sets another number", total, size)
    count = math.ceil(size if size >= 1 else size * total)
    if config.training.do_train and count >= total:
        raise DataError(f"--eval_dataset_size {size:g} leaves nothing to train on: the dataset has {total} rows")
    if count >= total:
        return Splits(None, rows)
    categories = rows["category"][:]
    if not any(categories):
        parts = rows.train_test_split(test_size=count, shuffle=True, seed=EVAL_SPLIT_SEED)
        return Splits(parts["train"], parts["test"])
    # sorted by category and evenly spaced: each category gives its share, and one with a single row breaks nothing
    order = torch.randperm(total, generator=torch.Generator().manual_seed(EVAL_SPLIT_SEED)).tolist()
    by_category = sorted(order, key=categories.__getitem__)
    held_out = {by_category[(2 * n + 1) * total // (2 * count)] for n in range(count)}
    return Splits(*(rows.select([i for i in order if (i in held_out) == held]) for held in (False, True)))


def drop_bad_rows(rows: Any | None, config: Config) -> Any | None:
    """The rows that can be used."""
    if rows is None:
        return None
    problems = rows["problem"][:]
    if bad := [i for i, problem in enumerate(problems) if problem]:
        reject(list(rows.select(bad)), len(rows), config)
        rows = rows.select([i for i, problem in enumerate(problems) if not problem])
    if len(rows) == 0:
        raise DataError(f"--dataset {config.data.dataset}: no row in it that can be used")
    return rows


def reject(rows: Sequence[Mapping[str, Any]], total: int, config: Config) -> None:
    """Stop the run at bad rows, or write those that are not there yet to rejected.jsonl."""
    first, file = "{where}: {problem}".format(**rows[0]), Path(config.training.output_dir, REJECTED)
    if config.data.on_bad_rows == "stop":
        more = f" (and {len(rows) - 1} more such rows)" if len(rows) > 1 else ""
        raise DataError(f"{first}{more}; --on_bad_rows skip leaves them out")
    if config.training.process_index != 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as stream:
        stream.seek(0)
        written = set(stream)  # in an earlier pass over a stream, before a resume, or by the run that is previewed
        records = [json.dumps({"where": row["where"], "reason": row["problem"]}) for row in rows]
        raw = [row.get("raw") or "null" for row in rows]  # JSON already
        lines = [f'{record[:-1]}, "row": {row}}}\n' for record, row in zip(records, raw, strict=True)]
        stream.writelines(line for line in lines if line not in written)
    if not written.issuperset(lines):
        log.warning("%d of %d rows left out, the first: %s; all in %s", len(rows), total, first, file)


# ------------------------------------------------------------------------------------
# 6. Tokenizer: special tokens and padding
#
# Returns a fast tokenizer with BOS (where it has one), EOS and pad ids inside the model's embedding.
# ------------------------------------------------------------------------------------
PATCHED_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Tokens that models leave unused, and so a pad that no text contains. In order of preference.
SPARE_TOKENS = re.compile(
    r"<\|finetune_right_pad_id\|>|<\|?pad(ding)?\|?>|\[PAD\]|<\|reserved_special_token_\d+\|>|<unused\d+>|<\|unused\d+\|>|<\|reserved_\d+\|>",
    re.IGNORECASE,
)
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges*", "added_tokens.json", "config.json"]


def download(name: str, patterns: list[str], config: Config) -> Path:
    """A model's folder; of a hub id, these files are downloaded."""
    folder = Path(name)
    return folder if folder.is_dir() else Path(snapshot_download(name, allow_patterns=patterns, **hub_options(config)))


def read_json(path: Path) -> Any:
    """A JSON file's content; a ConfigError if it can't be read."""
    with reraise_as_user_error(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


def patched_tokenizer_folder(name: str, patch: Path, target: Path, config: Config) -> Path:
    """Copy the model's tokenizer files, with those of --tokenizer_patch laid over them key by key."""
    if not any((patch / file).is_file() for file in PATCHED_FILES):
        raise ConfigError(f"--tokenizer_patch {patch}: expected a folder with {' or '.join(PATCHED_FILES)}")
    for file in download(name, TOKENIZER_FILES, config).iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt"):
            shutil.copyfile(file, target / file.name)
    for file_name in PATCHED_FILES:
        merged: dict[str, Any] = {}
        for file in (target / file_name, patch / file_name):
            merged |= read_json(file) if file.is_file() else {}
        (target / file_name).write_text(json.dumps(merged), encoding="utf-8")
    return target


def load_tokenizer(config: Config, model_config: PretrainedConfig, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which may be a hub id, with the overrides of the flags."""
    model, tokenizer = config.model, None
    options = hub_options(config) | {"trust_remote_code": model.trust_remote_code}
    what = f"--model_name_or_path {model.model_name_or_path}"
    with tempfile.TemporaryDirectory() as scratch, reraise_as_user_error(f"{what}: its tokenizer does not load"):
        if model.tokenizer_patch:
            folder = str(patched_tokenizer_folder(folder, Path(model.tokenizer_patch), Path(scratch), config))
        # of SentencePiece's file alone, AutoTokenizer may silently make a generic tokenizer with other ids
        bare = Path(folder, "tokenizer.model").is_file() and not Path(folder, "tokenizer.json").is_file()
        llama = bare and model_config.model_type in ("llama", "mistral", "mixtral")
        with contextlib.suppress(RecursionError):  # caused by an empty unk_token
            tokenizer = (LlamaTokenizer if llama else AutoTokenizer).from_pretrained(folder, **options)
    if tokenizer is None or "" in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
        raise ConfigError(
            f"{what}: the tokenizer's special tokens are empty strings, as in early LLaMA conversions: "
            "pass --tokenizer_patch examples/llama1_tokenizer"
        )
    tokenizer.name_or_path = model.model_name_or_path
    if model.chat_template:
        with reraise_as_user_error(f"--chat_template {model.chat_template}"):
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    set_special_tokens(tokenizer, config, model_config)
    return tokenizer


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, config: Config, model_config: PretrainedConfig) -> None:
    """Apply the flags, choose a pad token if there is none, and check the ids.

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
    if config.masked and tokenizer.mask_token_id is None:
        raise ConfigError("--objective mlm: the tokenizer has no mask token, so its model is no masked language model")
    if tokenizer.eos_token_id is None and not config.masked:
        raise ConfigError("the tokenizer has no end-of-sequence token: name one of its tokens with --eos_token")
    if not tokenizer.pad_token or vocabulary.get(str(tokenizer.pad_token), rows) >= rows:
        spare = [token for token, i in vocabulary.items() if SPARE_TOKENS.fullmatch(token) and i < rows]
        spare.sort(key=lambda token: ("pad" not in token.lower(), vocabulary[token]))
        tokenizer.pad_token = spare[0] if spare else tokenizer.unk_token or tokenizer.eos_token
        log.info("pad token: %s (the tokenizer has none that the model knows)", tokenizer.pad_token)
    for name in ("eos_token_id", "bos_token_id", *(("mask_token_id",) if config.masked else ())):
        if (getattr(tokenizer, name) or 0) >= rows:
            raise ConfigError(
                f"the tokenizer's {name} {getattr(tokenizer, name)} lies outside the model's {rows} tokens"
            )


# ------------------------------------------------------------------------------------
# 7. Encoding: segments -> ids and labels -> StepBatch -> micro-batch
#
# A row is tokenised once, before training, in parallel and cached; a stream's rows when they are due. BOS and EOS are
# added as ids, and segments are tokenised apart; text from a chat template is tokenised whole, with the template's own
# special tokens. A `</s>` that a user wrote stays text in both.
# ------------------------------------------------------------------------------------
class Limits(NamedTuple):
    """The most tokens that a row may have."""

    source: int  # prompt with BOS
    target: int  # completion with EOS
    total: int | None = None  # both together; replaces the other two

    @property
    def longest(self) -> int:
        """Tokens of the longest row, and of a pack."""
        return self.total or self.source + self.target

    def __str__(self) -> str:
        both = f"source {self.source}" + (f", target {self.target}" if self.target else "")
        return f"model_max_len {self.total}" if self.total else both


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # the ids that are supervised, IGNORE elsewhere
    cut: bool  # whether it was longer than a limit


Tokens = list[tuple[int, int]]  # ids and labels: the id where it is supervised, IGNORE elsewhere


def length_limits(config: Config) -> Limits:
    """The limits that the flags set."""
    data = config.data
    return Limits(data.source_max_len, 0 if config.masked else data.target_max_len, data.model_max_len)


def truncate_and_concat(
    source: Tokens, target: Tokens, limits: Limits, train_on_source: bool = False, bos: int | None = None
) -> Encoded:
    """Prompt and completion cut to the limits and joined.

    Two limits cut each on the right, so a cut completion has no EOS. One limit for both cuts the prompt from the left,
    after BOS, down to a quarter of the limit, which keeps the answer's marker; then the completion on the right.
    """
    if limits.total is None:
        tokens = source[: limits.source] + target[: limits.target]
    else:
        tokens = cut_left(source, max(limits.total - len(target), limits.total // 4), bos)
        tokens = tokens + target[: limits.total - len(tokens)]
    ids, labels = [i for i, _ in tokens], [i if train_on_source else label for i, label in tokens]
    return Encoded(ids, labels, cut=len(tokens) < len(source) + len(target))


def cut_left(tokens: Tokens, limit: int, bos: int | None) -> Tokens:
    """The last tokens, after BOS if they begin with it."""
    first = min(limit, 1) if tokens and tokens[0][0] == bos else 0
    return tokens if len(tokens) <= limit else tokens[:first] + tokens[len(tokens) - max(limit - first, 0) :]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts, without special tokens around them or parsed in them."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


def tokenize_segments(rows: list[list[Segment]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Tokens]]:
    """Tokens of each segment, BOS before the first and EOS after the last; without a BOS token none is added."""
    bos, eos = tokenizer.bos_token_id, [tokenizer.eos_token_id]
    marks = {BOS_MARK: [] if bos is None else [bos], EOS_MARK: eos}
    split = [[re.split(f"([{BOS_MARK}{EOS_MARK}])", s["text"]) for s in row] for row in rows]  # texts between marks
    ids_of_text = iter(tokenize([text for row in split for parts in row for text in parts[::2]], tokenizer))
    for row, segments in zip(rows, split, strict=True):
        ids = [[i for p in parts for i in (marks[p] if p in marks else next(ids_of_text))] for parts in segments]
        ids[0] = marks[BOS_MARK] + ids[0]
        ids[-1] = ids[-1] + eos
        yield [[(i, i if s["supervised"] else IGNORE) for i in part] for s, part in zip(row, ids, strict=True)]


def tokenize_rendered(rows: list[list[Segment]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Tokens]]:
    """Tokens of each segment of rows that are tokenised as one text; a token in two segments goes to the second."""
    texts = ["".join(segment["text"] for segment in row) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True)
    for row, text, ids, offsets in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        segment_of = [number for number, segment in enumerate(row) for _ in segment["text"]]  # by character
        tokens: list[Tokens] = [[] for _ in row]
        for i, (start, end) in zip(ids, offsets, strict=True):
            if text[start:end] != ESCAPE_MARK:
                first, last = segment_of[min(start, len(text) - 1)], segment_of[max(end, start + 1, 1) - 1]
                supervised = row[first]["supervised"] or row[last]["supervised"]
                tokens[last].append((i, i if supervised else IGNORE))
        yield tokens


def last_supervised(segments: Sequence[Segment]) -> int:
    """The segment with which the completion begins."""
    return max(number for number, segment in enumerate(segments) if segment["supervised"])


def prompts_and_completions(batch: Mapping[str, list[Any]], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens]]:
    """Tokens of each row's prompt and of its completion, which begins with the last supervised segment."""
    rows = list(zip(batch["segments"], batch["rendered"], strict=True))
    kinds = {False: tokenize_segments, True: tokenize_rendered}
    tokens_of = {kind: kinds[kind]([row for row, rendered in rows if rendered == kind], tokenizer) for kind in kinds}
    for segments, rendered in rows:
        tokens, last = next(tokens_of[rendered]), last_supervised(segments)
        yield list(itertools.chain(*tokens[:last])), list(itertools.chain(*tokens[last:]))


def last_texts(batch: Mapping[str, list[Any]]) -> list[str]:
    """The last segment of each row."""
    return [segments[-1]["text"] for segments in batch["segments"]]


def encode_masked(text: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
    """A text with the tokenizer's special tokens around it; the labels are the tokens that may be masked.

    A mask token in the text is one, which prediction fills. Other special tokens in it stay text, except with slow
    tokenizers: ESM's finds its letters by the same rule as special tokens.
    """
    split, limit = tokenizer.is_fast and str(tokenizer.mask_token) not in text, limits.total or limits.source
    row = tokenizer(text, return_special_tokens_mask=True, split_special_tokens=split, verbose=False)
    ids, special = row["input_ids"], row["special_tokens_mask"]
    closing = sum(1 for _ in itertools.takewhile(bool, reversed(special)))  # the last special tokens are never cut
    kept = [i for i in range(len(ids)) if i < limit - closing or i >= len(ids) - closing]
    labels = [IGNORE if special[i] or ids[i] == tokenizer.mask_token_id else ids[i] for i in kept]
    return Encoded([ids[i] for i in kept], labels, len(kept) < len(ids))


def encode_batch(
    batch: Mapping[str, list[Any]], tokenizer: Any, limits: Limits, train_on_source: bool = False, masked: bool = False
) -> dict[str, list[Any]]:
    """Columns of segments -> columns of encoded rows, for datasets.map."""
    if masked:
        encoded = [encode_masked(text, tokenizer, limits) for text in last_texts(batch)]
    else:
        pairs, bos = prompts_and_completions(batch, tokenizer), tokenizer.bos_token_id
        encoded = [truncate_and_concat(source, target, limits, train_on_source, bos) for source, target in pairs]
    problem = f"no token left to learn within {limits}, expected one at least"
    rows = [row._asdict() | row_facts(row.input_ids, row.labels, tokenizer, masked) for row in encoded]
    rows = [row | {"problem": "" if row["supervised"] else problem} for row in rows]
    return {name: [row[name] for row in rows] for name in rows[0]}


def row_facts(ids: list[int], labels: list[int], tokenizer: Any, masked: bool) -> dict[str, int]:
    """What the statistics say of an encoded row."""
    bos = tokenizer.cls_token_id if masked else tokenizer.bos_token_id
    targets = [n for n, label in enumerate(labels) if label != IGNORE and (n or masked)]  # nothing predicts the first
    last = targets[-1] if targets else 0
    return {
        "length": len(ids),
        "supervised": len(targets),
        # with --train_on_source, the line end that a template puts after EOS is supervised too
        "without_eos": tokenizer.eos_token_id not in labels[max(last - 1, 0) : last + 1],
        "doubled_bos": ids[:2] == [bos, bos],
        "largest_id": max(ids, default=0),
        "hash": hash((*ids, *labels)),  # of integers: the same in every process
    }


def encoding_options(config: Config) -> dict[str, Any]:
    """The arguments of encode_batch that the flags set."""
    return {"limits": length_limits(config), "train_on_source": config.data.train_on_source, "masked": config.masked}


def encode_dataset(rows: Any, tokenizer: PreTrainedTokenizerBase, config: Config, name: str) -> Any:
    """Encode every row, in parallel, or find them in the cache."""
    options = encoding_options(config)
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    depends = (rows._fingerprint, vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id, options)
    workers = min(os.cpu_count() or 1, len(rows) // 20_000)  # below that, starting processes takes longer
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
    return rows.map(
        encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, **options},
        remove_columns=["segments", "category", "raw"],
        num_proc=workers if workers > 1 else None,
        desc=f"Encoding {name} rows",
        new_fingerprint=digest(CODE_VERSION, *depends),
    )


def warn_missing_eos(rows: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the chat template puts the end-of-sequence token after none of the first answers."""
    first = rows.select(range(min(len(rows), 100)))
    whole = [row for row in first if row["rendered"] and not (row["cut"] or row["problem"])]
    if whole and all(row["without_eos"] for row in whole):
        tokens = (str(tokenizer.decode([i])) for i in reversed(whole[0]["labels"]) if i != IGNORE)
        last = next((token for token in tokens if token.strip()), "")  # before the template's white space
        what = "the chat template ends an answer with %r, not with the end-of-sequence token %r"
        if special_token_pattern(tokenizer).fullmatch(last):
            what += ": generation stops there only if --eos_token or the model's generation_config names it"
        else:
            what += ": the model won't learn to stop"
        log.warning(what, last, tokenizer.eos_token)


def encode_splits(splits: Splits, tokenizer: PreTrainedTokenizerBase, config: Config) -> Splits:
    """Both splits encoded; the first rows of a stream stand for it."""
    return Splits(*(rows and encode_split(rows, name, tokenizer, config) for name, rows in splits._asdict().items()))


def encode_split(rows: Any, name: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Any:
    """A split encoded, without the rows that can't be trained on."""
    streamed = isinstance(rows, RowStream)
    rows = first_rows(rows, tokenizer, config) if streamed else encode_dataset(rows, tokenizer, config, name)
    warn_missing_eos(rows, tokenizer)
    limits = length_limits(config)
    if name == "train" and limits.total and config.data.skip_excess_length and any(cut := rows["cut"][:]):
        log.info("%d of %d training rows are longer than %s: left out", sum(cut), len(rows), limits)
        if all(cut):
            raise DataError(f"--{limits}: every row is longer; raise it or pass --skip_excess_length False")
        rows = rows.select([i for i, is_cut in enumerate(cut) if not is_cut])
    return drop_bad_rows(rows, config)


def encode_stream_row(where: str, row: Any, dataset_format: DatasetFormat, tokenizer: Any, config: Config) -> Any:
    """A raw row encoded, or None if it is left out: bad, or too long."""
    normal = normalize_row(where, row, dataset_format, tokenizer)
    if not normal["problem"]:
        columns = encode_batch({name: [value] for name, value in normal.items()}, tokenizer, **encoding_options(config))
        normal |= {name: values[0] for name, values in columns.items()}
    if normal["problem"]:
        reject([normal], 1, config)
    too_long = config.data.model_max_len and config.data.skip_excess_length and normal.get("cut")
    return None if normal["problem"] or too_long else normal


def stream_encoder(stream: RowStream, tokenizer: PreTrainedTokenizerBase, config: Config) -> Callable[..., Any]:
    """encode_stream_row for the raw rows of a stream."""
    dataset_format = get_format(stream.format_name)
    return partial(encode_stream_row, dataset_format=dataset_format, tokenizer=tokenizer, config=config)


def first_rows(stream: RowStream, tokenizer: PreTrainedTokenizerBase, config: Config) -> Any:
    """The first 1,000 encoded rows of a stream, unshuffled, for statistics and --preview."""
    encode, rows = stream_encoder(stream, tokenizer, config), select_rows(stream.source, config.data)
    encoded = list(itertools.islice(filter(None, (encode(**row) for row in rows)), 1000))
    if not encoded:
        count = stream.source.first
        after = f" after the first {count}, which are held out (--eval_dataset_size)" if count else ""
        raise DataError(f"{stream.source.name}: no row in it that can be used to train{after}")
    return datasets.Dataset.from_list(encoded)


def encoded_stream(stream: RowStream, tokenizer: Any, config: Config, skip: int = 0) -> Iterator[tuple[int, Any]]:
    """Encoded rows to train on, pass after pass without end, each with the number of raw rows consumed so far.

    The order of a pass follows from seed and pass alone. A resume gives that number as `skip`: raw rows up to it are
    read but not encoded, and the rest is what it would have been. Resuming a shuffle buffer's state would not be exact.
    """
    args, encode, consumed = config.training, stream_encoder(stream, tokenizer, config), 0
    raw, seed = {"source": stream.source, "data": config.data}, args.seed if args.data_seed is None else args.data_seed
    for epoch in itertools.count():
        rows = datasets.IterableDataset.from_generator(select_rows, gen_kwargs=raw)
        if args.train_sampling_strategy != "sequential":
            rows = rows.shuffle(seed=seed + epoch, buffer_size=config.data.stream_buffer)
        for raw_row in rows:
            consumed += 1
            if consumed > skip and (row := encode(**raw_row)):
                yield consumed, row


def pack_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers in packs of at most `limit` tokens: the longest first, each into the fullest pack that has room.

    Best-fit decreasing (Johnson 1973) needs at most 11/9 of the fewest packs.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = defaultdict(list)  # open packs by their free tokens
    rooms: list[int] = []  # the keys that have packs, in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[i])
        room, pack = (rooms[at], by_room[rooms[at]].pop()) if at < len(rooms) else (limit, [])
        if not pack:
            packs.append(pack)
        elif not by_room[room]:
            del rooms[at]
        pack.append(i)
        room = max(room - lengths[i], 0)
        if not by_room[room]:
            bisect.insort(rooms, room)
        by_room[room].append(pack)
    return packs


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a dataset, several to a pack. The packs follow from the rows alone."""

    def __init__(self, rows: Any, limit: int) -> None:
        lengths = rows["length"][:]
        self.rows, self.limit, self.packs = rows, limit, pack_rows(lengths, limit)
        self.lengths = [sum(lengths[i] for i in pack) for pack in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, key: Any) -> Any:
        """One pack; by name a column of the rows, but `length` is that of each pack."""
        if isinstance(key, str):
            return self.lengths if key == "length" else self.rows[key]
        return {"pack": [self.rows[i] for i in self.packs[key]]}


class EpochSampler(torch.utils.data.Sampler[int]):
    """Row numbers in an order that follows from seed and epoch alone, so that a resume in any epoch repeats it.

    With lengths, rows of similar length are together (in windows of 50 batches, the longest first): less padding.
    """

    def __init__(self, rows: int, seed: int, lengths: list[int] | None = None, batch_size: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.batch_size, self.epoch = rows, seed, lengths, batch_size, 0

    def set_epoch(self, epoch: int) -> None:  # called by the data loader
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def build_sampler(lengths: list[int], batch_size: int, args: Any) -> Any:
    """The order of training rows that the flags ask for; the Trainer's own grouped sampler changes after a resume."""
    if args.train_sampling_strategy == "sequential":
        return torch.utils.data.SequentialSampler(lengths)
    seed = args.seed if args.data_seed is None else args.data_seed
    grouped = lengths if args.train_sampling_strategy == "group_by_length" else None
    return EpochSampler(len(lengths), seed, grouped, batch_size)


class TokenStatistics(NamedTuple):
    fingerprint: str  # of every id and label, in order
    rows: int
    tokens: int
    supervised: int  # tokens; with a masked model, those that may be masked
    largest_id: int
    longest: int  # tokens
    cut: int  # rows, as the next three
    without_eos: int | None  # which do not teach the model to stop; None with a masked model
    doubled_bos: int
    duplicates: int
    batch: int  # rows
    padding: float  # share of the tokens of padded batches
    packing: float | None  # share of the packs that is filled, if the training rows are packed
    lengths: dict[str, int]  # rows by length in tokens

    def lines(self) -> dict[str, str]:
        """Names and values, for a table."""
        rows = {"cut": self.cut, "without EOS": self.without_eos, "with doubled BOS": self.doubled_bos,
                "duplicates": self.duplicates}  # fmt: skip
        supervised = "may be masked" if self.without_eos is None else "supervised"
        return {
            "rows": str(self.rows), "tokens": str(self.tokens),
            supervised: f"{self.supervised} ({self.supervised / self.tokens:.1%})",
            **{name: f"{count} ({count / self.rows:.1%})" for name, count in rows.items() if count is not None},
            f"padding at batch {self.batch}": f"{self.padding:.1%}",
            **({} if self.packing is None else {"filled if packed": f"{self.packing:.1%}"}),
        }  # fmt: skip

    def __str__(self) -> str:
        """One line for the log, without zeros."""
        return ", ".join(f"{value} {name}" for name, value in self.lines().items() if value[:2] != "0 ")


def token_statistics(rows: Any, config: Config, packs: PackedRows | None = None) -> TokenStatistics:
    """Statistics of encoded rows; training rows come with their packs."""
    args, lengths, hashes = config.training, np.asarray(rows["length"][:]), rows["hash"][:]
    sizes = np.asarray(packs.lengths) if packs and config.data.packing else lengths
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    shuffled = packs and not config.data.streaming
    order = build_sampler(sizes.tolist(), step, args) if shuffled else range(len(sizes))
    batch = args.per_device_train_batch_size if packs else args.per_device_eval_batch_size
    sums = {name: sum(rows[name][:]) for name in ("supervised", "cut", "without_eos", "doubled_bos")}
    sums |= {"without_eos": None} if config.masked else {}
    return TokenStatistics(**sums,
        fingerprint=digest(*hashes), rows=len(lengths), tokens=int(lengths.sum()), longest=int(lengths.max()),
        largest_id=max(rows["largest_id"][:]), duplicates=len(hashes) - len(set(hashes)), lengths=histogram(lengths),
        batch=batch, padding=padding_share(sizes, order, batch),
        packing=sum(packs.lengths) / (packs.limit * len(packs)) if packs else None,
    )  # fmt: skip


def pack_and_summarize(splits: Splits, config: Config) -> tuple[Any, dict[str, TokenStatistics]]:
    """The training rows, packed if the flags say so, and statistics of both splits."""
    packs = None if splits.train is None else PackedRows(splits.train, length_limits(config).longest)
    statistics = {} if packs is None else {"train": token_statistics(splits.train, config, packs)}
    statistics |= {} if splits.eval is None else {"eval": token_statistics(splits.eval, config)}
    if packs is None or not config.data.packing:
        return splits.train, statistics
    log.info("packing: %d rows in %d packs of up to %d tokens", len(packs.rows), len(packs), packs.limit)
    return packs, statistics


def padding_share(lengths: Any, order: Iterable[int], batch_size: int) -> float:
    """The share of padding in batches taken in this order."""
    ordered, starts = lengths[np.fromiter(order, int)], np.arange(0, len(lengths), batch_size)
    padded = np.maximum.reduceat(ordered, starts) * np.diff(starts, append=len(ordered))
    return float(1 - ordered.sum() / padded.sum())


def histogram(lengths: Any) -> dict[str, int]:
    """Counts in at most a dozen steps of a round size."""
    step = next(n * 10**power for power in itertools.count() for n in (1, 2, 5) if 12 * n * 10**power >= lengths.max())
    counts = np.bincount((lengths - 1) // step).tolist()
    return {f"{n * step + 1}-{(n + 1) * step}": count for n, count in enumerate(counts)}


def pad(rows: Sequence[Sequence[int] | torch.Tensor], value: int, side: str) -> torch.Tensor:
    """Rows of ids as one (rows, longest) tensor."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def padded_prompts(rows: Sequence[Sequence[int] | torch.Tensor], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (rows, longest). The mask comes from the lengths: pad is often EOS."""
    return {"input_ids": pad(rows, pad_id, side), "attention_mask": pad([[1] * len(row) for row in rows], 0, side)}


@dataclass(frozen=True)
class StepBatch:
    """One process's rows of an optimizer step, or of an evaluation batch, before they are cut into micro-batches."""

    input_ids: torch.Tensor  # (tokens,) of all members, one after the other; a member is a row, or a row of a pack
    labels: torch.Tensor  # (tokens,) the first of a member is IGNORE, as nothing predicts it, unless tokens are masked
    lengths: torch.Tensor  # (members,)
    rows: list[int]  # members of each dataset row: 1, or more if rows are packed
    where: list[str]  # of each member
    masked: bool = False  # whether a label is predicted at its own position, not at the one before

    @property
    def supervised(self) -> int:
        """The number of labels."""
        return int((self.labels != IGNORE).sum())

    def members(self, numbers: Iterable[int] | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of these members, or of all."""
        lengths = self.lengths.tolist()
        pairs = list(zip(self.input_ids.split(lengths), self.labels.split(lengths), strict=True))
        return pairs if numbers is None else [pairs[i] for i in numbers]


def collate_step(rows: Sequence[Mapping[str, Any]], masked: bool = False) -> dict[str, Any]:
    """Rows of a dataset, packed or not -> a StepBatch, and its tokens for each row, which the Trainer counts."""
    packs = [row.get("pack", [row]) for row in rows]
    # a process without rows of its own still has to take part: one token without a label
    members = [member for pack in packs for member in pack] or [{"input_ids": [0], "labels": [IGNORE]}]
    ids, labels = (torch.tensor([i for m in members for i in m[name]]) for name in ("input_ids", "labels"))
    lengths = torch.tensor([len(member["input_ids"]) for member in members])
    if not masked:
        labels[lengths.cumsum(0) - lengths] = IGNORE
    where = [member.get("where", "") for member in members]
    step = StepBatch(ids, labels, lengths, [len(pack) for pack in packs], where, masked)
    return {"lengths": torch.tensor([len(ids)] * len(rows)), "step": step}


def micro_batches(step: StepBatch, rows: int | None, tokens: int, padded: bool) -> list[list[int]]:
    """The members that go through the model together: at most `rows` of the dataset, in their order.

    They have at most so many tokens, padding included, unless one member alone has more. `rows` None: as many as fit.
    """
    lengths = step.lengths.tolist()
    groups = [list(range(len(lengths)))]
    if rows is not None and step.rows:  # a process may have none
        ends = [0, *itertools.accumulate(step.rows)]
        groups = [groups[0][start:end] for start, end in itertools.pairwise([*ends[:-1:rows], ends[-1]])]
    elif padded:
        groups[0].sort(key=lambda i: -lengths[i])
    else:  # even shares
        tokens = min(tokens, math.ceil(sum(lengths) / max(1, math.ceil(sum(lengths) / tokens)) * 1.02))
    batches: list[list[int]] = []
    for group in groups:
        batches.append([])
        for i in group:
            together = [lengths[j] for j in (*batches[-1], i)]
            if batches[-1] and (max(together) * len(together) if padded else sum(together)) > tokens:
                batches.append([])
            batches[-1].append(i)
    return batches


def padded_batch(step: StepBatch, members: list[int], pad_id: int, side: str) -> dict[str, Any]:
    """Members in rows of one length, and which positions predict what."""
    ids, labels = zip(*step.members(members), strict=True)
    targets = supervised_targets(pad(labels, IGNORE, side).flatten(), 0 if step.masked else 1)
    return padded_prompts(ids, pad_id, side) | targets


def padding_free_batch(step: StepBatch, members: list[int]) -> dict[str, Any]:
    """Members in one row without padding; positions restart in each."""
    ids, labels = zip(*step.members(members), strict=True)
    lengths = [len(row) for row in ids]
    starts = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths), "max_length_k": max(lengths),
        **supervised_targets(torch.cat(labels)),
    }  # fmt: skip


def supervised_targets(labels: torch.Tensor, ahead: int = 1) -> dict[str, torch.Tensor]:
    """Flat labels -> the positions that predict a supervised token, `ahead` of it, and those tokens."""
    positions = (labels[ahead:] != IGNORE).nonzero().squeeze(1)
    return {"positions": positions, "targets": labels[positions + ahead]}


class Masking(NamedTuple):
    """How tokens are masked (BERT, Devlin et al. 2019, https://arxiv.org/abs/1810.04805)."""

    chosen: float  # share of the tokens
    replaced: float  # share of the chosen that become the mask token
    random: float  # share of the chosen that become a random token
    mask_id: int
    words: torch.Tensor  # the ids that a random token may be

    def mask_tokens(self, ids: torch.Tensor, labels: torch.Tensor, *seed: Any, least: int = 0) -> list[torch.Tensor]:
        """Masked ids, and the labels of the chosen tokens, at least `least`; both follow from the seed alone."""
        generator = torch.Generator().manual_seed(int(digest(*seed), 16))
        # drawn on the CPU: the same masks on every device
        choice, fate = torch.rand((2, *ids.shape), generator=generator).to(ids.device)
        words = self.words[torch.randint(len(self.words), ids.shape, generator=generator)].to(ids.device)
        choice[labels == IGNORE] = 2.0
        chosen = choice < self.chosen
        chosen |= (choice < 2.0) & (choice <= (choice.min() if least else -1))
        masked = ids.masked_fill(chosen & (fate < self.replaced), self.mask_id)
        return [masked.where(~chosen | (fate < 1 - self.random), words), labels.masked_fill(~chosen, IGNORE)]

    def mask_eval_row(self, ids: list[int], labels: list[int]) -> dict[str, list[int]]:
        """A row to evaluate on: at least one mask, and the same ones each time."""
        masked, chosen = self.mask_tokens(torch.tensor(ids), torch.tensor(labels), "eval", ids, least=1)
        return {"input_ids": masked.tolist(), "labels": chosen.tolist()}


def build_masking(tokenizer: PreTrainedTokenizerBase, rows: int, data: DataArguments) -> Masking:
    """The masking that the flags set, for a model whose embedding has this many rows.

    A random token is never a special one: RoBERTa and ESM count positions from the padding tokens.
    """
    words = sorted(i for i in set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) if i < rows)
    shares = data.mask_prob, data.mask_replace_prob, data.random_replace_prob
    return Masking(*shares, mask_id=tokenizer.mask_token_id, words=torch.tensor(words))


class Span(NamedTuple):
    """A part of a row, as --preview shows it."""

    text: str
    supervised: bool
    special: bool  # a special token, not text that looks like one


TitledSpans = tuple[str, list[Span]]  # a row and its title


def row_spans(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """A row's supervised and other text; after a token with another label, an arrow and that label."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    alone = [i in special or label not in (IGNORE, i) for i, label in zip(ids, labels, strict=True)]
    kinds = [(label != IGNORE, n if alone[n] else -1) for n, label in enumerate(labels)]
    for (supervised, _), group in itertools.groupby(range(len(ids)), kinds.__getitem__):
        first, last = (numbers := list(group))[0], numbers[-1]
        # decoded alone, it could lose its leading space or half of a letter
        before, text = (str(decode(ids[:end])) for end in (first, last + 1))
        text = text[len(before) :] if text.startswith(before) else str(decode(ids[first : last + 1]))
        name = str(tokenizer.convert_ids_to_tokens(ids[first])) if ids[first] in special else text
        yield Span("↵\n".join(map(escape_control_chars, name.split("\n"))), supervised, ids[first] in special)
        if supervised and labels[first] != ids[first]:
            yield Span(f"→{escape_control_chars(str(decode(labels[first : first + 1])))}", True, False)


def preview_rows(rows: Any, tokenizer: Any, model_config: PretrainedConfig, config: Config) -> Iterator[TitledSpans]:
    """The first rows or packs as the first step would have them."""
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None) or len(tokenizer)
    masking = build_masking(tokenizer, vocabulary, config.data) if config.masked else None
    for number in range(min(config.data.preview, len(rows))):
        members = rows[number].get("pack", [rows[number]])
        for part, (ids, labels) in enumerate(collate_step(members, config.masked)["step"].members()):
            if masking:
                ids, labels = masking.mask_tokens(ids, labels, "train", config.training.seed, 0, 0, number, part)
            title = f"row {number + 1}" + f", part {part + 1} of {len(members)}" * (len(members) > 1)
            title += f": {escape_control_chars(members[part]['where'])}, {len(ids)} tokens"
            title += f", {int((labels != IGNORE).sum())} supervised" + ", cut" * members[part]["cut"]
            yield title, list(row_spans(ids.tolist(), labels.tolist(), tokenizer))


# Around supervised text and around special tokens: green and reversed in a terminal, brackets elsewhere.
TERMINAL_MARKS, PLAIN_MARKS = ("\x1b[32m", "\x1b[39m", "\x1b[7m", "\x1b[27m"), tuple("⟪⟫⟦⟧")


def format_preview(rows: Iterable[TitledSpans], statistics: Mapping[str, TokenStatistics], terminal: bool) -> str:
    """The rows, then the statistics of each split."""
    on, off, open_, close = TERMINAL_MARKS if terminal else PLAIN_MARKS
    escapes = {} if terminal else {ord(mark): f"\\u{ord(mark):x}" for mark in PLAIN_MARKS}  # in the data
    lines = [f"{on}supervised{off}, {open_}special token{close}, ↵ end of a line\n"]
    for title, spans in rows:
        text = ""
        for supervised, group in itertools.groupby(spans, lambda span: span.supervised):
            inner = "".join(f"{open_}{s.text}{close}" if s.special else s.text.translate(escapes) for s in group)
            text += f"{on}{inner}{off}" if supervised else inner
        lines += [title, text + "\n"]
    for name, part in statistics.items():
        most = max(part.lengths.values())
        bars = {f"{size} tokens": f"{'█' * math.ceil(30 * n / most)} {n}".strip() for size, n in part.lengths.items()}
        lines += [f"{name} rows", format_table(part.lines() | bars) + "\n"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------
# 8. Model: data types, quantisation, devices
#
# What leaves is the frozen base. Linear layers but the head are in 4 or 8 bits; embeddings, norms and head are in the
# load dtype. No module is cast up: RMSNorm and LayerNorm compute in float32 inside, whatever their weights are.
# ------------------------------------------------------------------------------------
AUTO_MODELS = {False: AutoModelForCausalLM, True: AutoModelForMaskedLM}  # by Config.masked


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of matrix products."""
    train = config.training
    return torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32


def load_dtype(config: Config) -> torch.dtype:
    """The dtype of what is not quantised. fp16 loads in float32 on purpose: it is unstable as a storage type."""
    return torch.bfloat16 if config.training.bf16 else torch.float32


CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # the later name, where there is one, rules


# FSDP shards what is of a floating dtype. In bf16 it ruins a thousandth of the packed values: its copies on a GPU make
# one NaN of all, and such bits are common there (https://github.com/pytorch/pytorch/issues/159333).
FSDP_STORAGE = torch.float32


def is_fsdp(config: Config) -> bool:
    """Whether FSDP spreads the model's weights."""
    return uses_fsdp(config.training.fsdp)


def is_sharded(config: Config) -> bool:
    """Whether an engine, FSDP or DeepSpeed, spreads them."""
    return is_fsdp(config) or bool(config.training.deepspeed)


def check_fsdp(config: Config) -> None:
    """Refuse FSDP where accelerate, without a word, would use DDP or nothing at all."""
    state: Any = config.training.distributed_state
    if is_fsdp(config) and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            "--fsdp spreads the weights over GPUs, a process for each: start it with torchrun --nproc_per_node N "
            "qlora.py on a machine with GPUs, or leave it out"
        )


def device_map(config: Config) -> Any:
    """Where the layers go: all on this process's GPU, over all GPUs of a lone process, or the CPU."""
    if is_sharded(config):
        return None  # the engine places them
    if config.training.use_cpu or not torch.cuda.is_available():
        return {"": "cpu"}
    if "LOCAL_RANK" in os.environ:  # device_map="auto" is refused by accelerate there
        return {"": int(os.environ["LOCAL_RANK"])}
    return "auto"


def quantisation_config(config: Config, whole: list[str] | None = None) -> Any | None:
    """What bitsandbytes is told. For bits 4 and 8 only: with both switches off it quantises to 4 bit all the same.

    `whole` names the layers that stay as they are; None leaves it to transformers, which finds the output embedding.
    """
    quant = config.quant
    if quant.bits not in (4, 8):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=quant.bits == 4,
        load_in_8bit=quant.bits == 8,
        llm_int8_threshold=6.0,
        llm_int8_skip_modules=whole,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_compute_dtype=compute_dtype(config),
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_quant_storage=FSDP_STORAGE if is_fsdp(config) else None,
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


def check_weights(folder: str | Path, config: Config) -> None:
    """Refuse a folder whose weights are a pickle, which can hold code, unless the flag says to take its tensors."""
    for pickled, safe in (("adapter_model.bin", "adapter_model.safetensors"), ("pytorch_model*.bin", "*.safetensors")):
        found = sorted(Path(folder).glob(pickled))
        if found and not (config.model.allow_pickle_weights or any(Path(folder).glob(safe))):
            way = "convert it to safetensors, or give --allow_pickle_weights, which takes nothing but tensors from it"
            raise ConfigError(f"{found[0]}: weights in a pickle, which can hold code: {way}")


def load_strict(name: str, folder: str | Path, auto_model: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model, refused where its checkpoint lacks weights: transformers draws them at random and only warns."""
    with reraise_as_user_error(f"--model_name_or_path {name}"):
        loaded: Any = auto_model.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"--model_name_or_path {name}: {len(missing)} weights are not in it, first {missing[0]}")
    own = getattr(model, "generation_config", None)
    if own is not None and not own.do_sample and any(getattr(own, name, None) for name in ("temperature", "top_p")):
        own.do_sample = True  # as published LLaMA-2 has it: values without their switch, which can't be saved today
    return model


def convert_gguf(path: Path, cache_dir: str | None, weights: bool = True) -> Path:
    """A folder in bf16 with the weights (or config alone) and the tokenizer of a .gguf file, made once and cached.

    bf16 keeps 8 bits of mantissa, more than the at most 8 bits that such a file stores for a weight.
    """
    from huggingface_hub.constants import HF_HOME

    stat = path.stat()
    root = Path(cache_dir or HF_HOME) / "qlora-gguf"
    folder = root / f"{path.stem}-{digest(path.resolve(), stat.st_size, stat.st_mtime_ns)}"
    if not weights and not folder.is_dir():
        folder = folder.with_name(f"{folder.name}-without-weights")
    if folder.is_dir():
        return folder
    log.info("%s: %s into %s, once", path, "dequantising" if weights else "its tokenizer", folder)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        with reraise_as_user_error(f"--model_name_or_path {path}"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model_config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        part = Path(scratch) / "model"
        if isinstance(model_config.eos_token_id, int):  # transformers 5.17 takes BOS for EOS
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model_config.eos_token_id)
        if weights:
            model = load_strict(str(path), path.parent, gguf_file=path.name, dtype=torch.bfloat16)
            # transformers refuses to save what came from a gguf file unless it forgets that
            model.hf_quantizer.remove_quantization_config(model)
            model.save_pretrained(part)
        else:
            model_config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def model_folder(config: Config) -> str:
    """Where transformers loads the base from: the folder or hub id given, or the folder made from a .gguf file."""
    name, weights = config.model.model_name_or_path, not (config.training.plan or config.data.preview)
    gguf = gguf_file(name)
    return str(convert_gguf(gguf, config.model.cache_dir, weights)) if gguf else name


def load_model_config(config: Config, folder: str) -> PretrainedConfig:
    """The base model's configuration, with --rope_scaling in it."""
    model = config.model
    with reraise_as_user_error(f"--model_name_or_path {model.model_name_or_path}"):
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


def is_masked_lm(model_config: PretrainedConfig) -> bool:
    """Whether a config is a masked language model's: by its architectures or, where it names none, by its kind."""
    names = getattr(model_config, "architectures", None) or []
    if names:
        return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    kind = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_config.model_type, "")
    return kind.endswith("ForMaskedLM") and not getattr(model_config, "is_decoder", False)


def resolve_objective(config: Config, model_config: PretrainedConfig) -> Config:
    """The Config with the objective that `auto` stands for, and the rules checked that depend on it."""
    wanted = config.data.objective
    chosen = wanted if wanted != "auto" else "mlm" if is_masked_lm(model_config) else "clm"
    log.info("objective: %s (%s)", chosen, "--objective" if wanted != "auto" else "by the model's config")
    data = dataclasses.replace(config.data, objective=chosen)  # type: ignore[arg-type]
    settled = dataclasses.replace(config, data=data, flags=config.flags | {"objective": chosen})
    check_config(settled)
    return settled


def resolve_attention(config: Config) -> str | None:
    """The attention implementation asked for; sdpa where flash-attn is missing."""
    from transformers.utils import is_flash_attn_2_available

    wanted = config.model.attn_implementation
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        log.warning("attn_implementation flash_attention_2: flash-attn is not installed here, using sdpa")
        return "sdpa"
    return wanted


LINEAR_CLASSES = (torch.nn.Linear, Conv1D)  # bitsandbytes' derive from nn.Linear; Conv1D is GPT-2's
# What derives from it and gives more than a product: routers of Llama 4 and PhiMoE, groups of DeepSeek V4.
NOT_LINEAR = ("Router", "GroupedLinear")


def linear_layers(model: PreTrainedModel, masked: bool = False) -> list[str]:
    """Full names of every linear layer except the output head; of a masked model, those of its encoder."""
    head = model.get_output_embeddings()
    layers = [
        name for name, module in model.named_modules()
        if isinstance(module, LINEAR_CLASSES) and module is not head and not type(module).__name__.endswith(NOT_LINEAR)
    ]  # fmt: skip
    if not masked:
        return layers
    # what transforms and predicts lies beside the encoder; in it ESM's predictor of contacts, which never runs here
    inside = set(model.base_model.modules())
    return [name for name in layers if model.get_submodule(name) in inside and "contact_head" not in name.split(".")]


def stacked_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Weights of many experts in one tensor, which bitsandbytes does not know and leaves as they are."""
    owners = [(name, module) for name, module in model.named_modules() if not hasattr(module, "kernel_size")]
    return {
        f"{name}.{leaf}": weight
        for name, module in owners for leaf, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and len(weight) > 1
    }  # fmt: skip


def meta_model(config: Config, model_config: PretrainedConfig) -> Any:
    """The base model on the meta device. Under ZeRO-3 transformers, if it knew, would draw and share out weights."""
    saved, hf_deepspeed._hf_deepspeed_config_weak_ref = hf_deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        with torch.device("meta"), reraise_as_user_error(f"--model_name_or_path {config.model.model_name_or_path}"):
            return AUTO_MODELS[config.masked].from_config(
                model_config, dtype=load_dtype(config), trust_remote_code=config.model.trust_remote_code
            )
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = saved


def decoder_layers(model: Any) -> list[Any]:
    """The layers that can be recomputed one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _parts_of(model: Any, layers: list[Any], name: str = "") -> Iterator[str]:
    """Names of a model's largest parts that hold no more than one layer."""
    yield from (name + own for own, _ in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)])
    for own, child in model.named_children():
        if child not in layers and any(module in layers for module in child.modules()):
            yield from _parts_of(child, layers, f"{name}{own}.")
        else:
            yield name + own


def even_map(gpus: int, config: Config, model_config: PretrainedConfig) -> dict[str, int] | None:
    """Which GPU each part of the model goes to, so that all hold as much; None where that can't be had.

    accelerate's own map gives the first of two GPUs 7 of an 8B model's 32 layers, and 36 of 80 of a 70B one's.
    """
    model, sizes = meta_model(config, model_config), Counter[str]()
    packed = {f"{name}.weight" for name in linear_layers(model, config.masked)}
    parts = list(_parts_of(model, decoder_layers(model)))
    homes, tied = dict[Any, str](), dict[str, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = next(part for part in parts if f"{name}.".startswith(f"{part}."))
        if parameter not in homes:
            sizes[part] += parameter.numel() * (config.quant.bits if name in packed else 8 * parameter.itemsize)
        if homes.setdefault(parameter, part) != part:  # a weight that two parts share is on one GPU
            tied[part] = homes[parameter]
    places, gpu, held, left = dict[str, int](), 0, 0, sizes.total()
    for part in parts:
        share = left / (gpus - gpu)
        if gpu < gpus - 1 and held and held + sizes[part] / 2 > share:
            gpu, left, held = gpu + 1, left - held, 0
        places[part] = gpu
        held += sizes[part]
    for part, home in tied.items():
        places[part] = places[home]
    shares = [sum(sizes[part] for part in parts if places[part] == gpu) for gpu in range(gpus)]
    return places if min(shares) > 0 and max(shares) / 8e6 <= config.quant.max_memory_MB else None


def skip_modules(config: Config, model_config: PretrainedConfig) -> list[str] | None:
    """The prediction head of a masked model, found on a copy without weights; None leaves it to transformers."""
    if not config.masked:
        return None
    empty = meta_model(config, model_config)
    linear = {name for name, module in empty.named_modules() if isinstance(module, LINEAR_CLASSES)}
    return sorted(linear - set(linear_layers(empty, masked=True)))


def patch_falcon_linear() -> None:
    """What is exactly nn.Linear is quantised by transformers: Falcon's subclass computes the same and would stay."""
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[assignment, misc]


QUIRKS = {"falcon": patch_falcon_linear}  # by model_type: what a family needs before it is loaded


def load_base(config: Config, model_config: PretrainedConfig, folder: str, **options: Any) -> Any:
    """The base model as these options have it."""
    if model_config.model_type in QUIRKS:
        QUIRKS[model_config.model_type]()
    pickles, name = config.model.allow_pickle_weights, config.model.model_name_or_path
    shared = {"config": model_config, "trust_remote_code": config.model.trust_remote_code} | hub_options(config)
    options = {"use_safetensors": None if pickles else True} | shared | options
    options = {name: value for name, value in options.items() if value is not None}
    name += "" if pickles or Path(folder).is_dir() else " (read as safetensors; --allow_pickle_weights reads .bin too)"
    return load_strict(name, folder, AUTO_MODELS[config.masked], **options)


def check_prequantised(config: Config, own: Mapping[str, Any]) -> None:
    """Refuse flags that ask for more than weights that are quantised already can give."""
    name, init = config.model.model_name_or_path, config.lora.init_lora_weights
    stored = own.get("bnb_4bit_quant_storage", "uint8")
    if is_fsdp(config) and "float" not in stored:
        raise ConfigError(
            f"--fsdp: {name} is quantised already and stored as {stored}, which FSDP can't shard, it takes a floating "
            "dtype: give the base as published"
        )
    if config.quant.full_finetune or lora_init_problem(init, quantised=True):
        what = "--full_finetune" if config.quant.full_finetune else f"--init_lora_weights {init}"
        raise ConfigError(f"{what}: the weights of {name} are quantised already")


@contextlib.contextmanager
def quantise_on_device(device: torch.device) -> Iterator[None]:
    """FSDP's base, which waits in the CPU's memory to be shared out: the CPU would take 200 s for 7B, the GPU takes 2.

    The scales of the 4-bit blocks, which FSDP does not know of, stay on the GPU.
    """
    own = bitsandbytes.nn.Params4bit._quantize
    bitsandbytes.nn.Params4bit._quantize = partialmethod(_quantise_on, own, device)  # type: ignore[assignment]
    try:
        yield
    finally:
        bitsandbytes.nn.Params4bit._quantize = own  # type: ignore[method-assign]


def _quantise_on(weight: Any, own: Any, device: torch.device, place: Any) -> Any:
    own(weight, device)
    weight.data = weight.data.to(place)
    return weight


def keep_one_bias(model: Any) -> None:
    """Of a bias that BERT's head has twice FSDP, which refuses that, gets the one that is added."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is not head and head.bias is not None and getattr(module, "bias", None) is head.bias:
            module.bias = None


def load_model(config: Config, model_config: PretrainedConfig, folder: str) -> PreTrainedModel:
    """The base model to train or use, quantised and placed."""
    options: dict[str, Any] = {
        "dtype": load_dtype(config),
        "device_map": device_map(config),
        "attn_implementation": resolve_attention(config),
    }
    if options["device_map"] == "auto":
        gpus, limit = torch.cuda.device_count(), f"{config.quant.max_memory_MB}MB"
        options["max_memory"] = dict.fromkeys(range(gpus), limit)
        options["device_map"] = (even_map(gpus, config, model_config) if gpus > 1 else None) or "auto"
    own = getattr(model_config, "quantization_config", None)
    if own:
        check_prequantised(config, own)
        log.info("the checkpoint is already quantised and is loaded as it is; bits and quant_type are its own")
    else:
        options["quantization_config"] = quantisation_config(config, skip_modules(config, model_config))
    if config.training.deepspeed:  # ZeRO-3 shards weights while they are loaded, by its own count of the processes
        importlib.import_module("deepspeed").init_distributed()
    with quantise_on_device(config.training.device) if is_fsdp(config) else contextlib.nullcontext():
        model = load_base(config, model_config, folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # or the first evaluation on such a CPU repacks the 4-bit weights in place, and training goes on with others
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = getattr(module, "weight", None)
        if is_fsdp(config) and hasattr(weight, "quant_state"):
            if weight.nbytes % FSDP_STORAGE.itemsize:
                shape = " x ".join(map(str, weight.quant_state.shape))
                raise ConfigError(
                    f"--fsdp: a packed weight of {shape} does not fill whole float32 values: leave it out"
                )
            weight.data = weight.data.flatten().view(FSDP_STORAGE).unsqueeze(1)
            weight.quant_state.to(config.training.device)
    if is_fsdp(config):
        keep_one_bias(model)
    layers = linear_layers(model, config.masked)
    whole = [name for name in layers if type(model.get_submodule(name)).__module__.startswith("torch")]
    if whole and not own and config.quant.bits < 16:
        log.warning("%d linear layers are not quantised, their class is unknown: %s, ...", len(whole), whole[0])
    stacked = stacked_experts(model) if config.quant.bits < 16 else {}
    if stacked:
        gib, kind = sum(weight.nbytes for weight in stacked.values()) / GIB, next(iter(stacked.values())).dtype
        log.warning(
            "%d tensors of stacked experts stay in %s and take %.2f GiB, bitsandbytes quantises none such: %s, ...",
            len(stacked), str(kind).removeprefix("torch."), gib, min(stacked),
        )  # fmt: skip
    # keeps the Trainer from wrapping the one model in DataParallel where this process sees several GPUs
    model.is_parallelizable = model.model_parallel = True
    model.config.use_cache = False  # of no use in training; generation turns it on
    return model


def sync_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's BOS, EOS and pad ids, also in the model's config."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))


def parameter_report(model: torch.nn.Module) -> list[str]:
    """The original's line on trainable parameters, with true counts, and one line for each dtype."""
    by_dtype: Counter[str] = Counter()
    trainable = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which counts as what it stands for
        size = math.prod(packed.shape) if packed else getattr(parameter, "ds_numel", parameter.numel())  # of ZeRO-3
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
    "mlp": re.compile(
        r"(.*\.)?(mlp|ffn|ff|feed_forward|block_sparse_moe)\..*|(.*\.)?fc\d|"
        r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"  # of BERT's kind, whose attention has an `output` too
    ),
}


def leaf_name(name: str) -> str:
    """The last part of a module's full name."""
    return name.rpartition(".")[2]


def layer_number(name: str) -> float:
    """The layer in which what has this name lies, which is its first number; infinity for what lies in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), math.inf)


def layers_to_freeze(model: PreTrainedModel, lora: LoraArguments) -> int:
    """How many layers from the bottom stay as they are; all of them is a ConfigError."""
    layers: int = model.config.get_text_config().num_hidden_layers or 0
    frozen = lora.layers_to_freeze or int(lora.layer_freeze_ratio * layers)
    if frozen >= layers:
        raise ConfigError(f"--layers_to_freeze {frozen}: the model has {layers} layers, nothing would train")
    return frozen


def lora_targets(model: PreTrainedModel, lora: LoraArguments, masked: bool = False) -> list[str]:
    """Names for peft: leaf names where they say the same, which reads better in adapter_config.json, else full ones."""
    layers, frozen = linear_layers(model, masked), layers_to_freeze(model, lora)
    wanted = [name for name in layers if layer_number(name) >= frozen]
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


def resolve_modules_to_save(model: PreTrainedModel, names: str | None) -> list[str] | None:
    """--modules_to_save as a list; a name that no module has is a ConfigError."""
    wanted = [name.strip() for name in names.split(",")] if names else None
    for name in wanted or []:
        if not any(f".{full}".endswith(f".{name}") for full, _ in model.named_modules()):
            raise ConfigError(f"--modules_to_save: the model has no module called {name!r}")
    return wanted


def lora_config(model: PreTrainedModel, lora: LoraArguments, masked: bool = False) -> Any:
    """The flags as peft's configuration."""
    booleans = {"true": True, "false": False}
    init: Any = booleans.get(lora.init_lora_weights.lower(), lora.init_lora_weights.lower())
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=lora.lora_dropout,
        target_modules=lora_targets(model, lora, masked),
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=init,
        # the same rank everywhere: EVA's own choice of ranks would change with the batches it happened to see
        eva_config=EvaConfig(rho=1.0) if init == "eva" else None,
        modules_to_save=resolve_modules_to_save(model, lora.modules_to_save),
        task_type=None if masked else "CAUSAL_LM",  # which wants methods of generation, and an encoder has none
    )


def adapter_files(adapter: str, config: Config) -> str:
    """The folder of an adapter, fetched if need be, whose weights may be read."""
    with reraise_as_user_error(f"--adapter_name_or_path {adapter}"):
        folder = download(adapter, ["adapter_config.json", "adapter_model.*"], config)
    check_weights(folder, config)
    return str(folder)


def attach_adapters(model: PreTrainedModel, config: Config, adapter: str | None) -> Any:
    """The model with exactly one adapter: a fresh one, drawn from the seed, or the one found at `adapter`."""
    set_seed(config.training.seed)  # loading draws random numbers; a seed gives one initialisation
    upcast = config.lora.lora_dtype == "float32"
    what = f"adapter {adapter}" if adapter else "LoRA flags"
    with reraise_as_user_error(
        f"{what} on {config.model.model_name_or_path}", ConfigError, RuntimeError
    ):  # shapes that differ
        if adapter is None:
            settings = lora_config(model, config.lora, config.masked)
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=upcast)
        else:
            folder = adapter_files(adapter, config)
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=upcast)
    for name, parameter in adapted.named_parameters() if not upcast else ():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    if adapter is None and mutates_base(adapted.peft_config["default"].init_lora_weights):
        # what peft took out of the base's weights; see fit_to_base
        adapted.lora_start = {name: p.detach().cpu().clone() for name, p in get_peft_model_state_dict(adapted).items()}
    return adapted


def mutates_base(start: Any) -> bool:
    """Whether adapters that start so change the base: W becomes W - s B A."""
    return isinstance(start, str) and start.startswith(("pissa", "olora", "corda"))


def convert_to_published_base(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
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


class EndingBatches(list[dict[str, torch.Tensor]]):
    """Batches for EVA's running decomposition of the layers' inputs: peft would go round them for ever."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from super().__iter__()
        raise ConfigError(f"--init_lora_weights eva: not settled after {len(self)} batches; lower --lora_r")


def start_from_inputs(model: Any, rows: Any, pad_id: int, config: Config) -> None:
    """EVA (https://arxiv.org/abs/2410.07170): A starts as the main directions of each layer's inputs."""
    source, batches = itertools.cycle(rows["input_ids"]), EndingBatches()
    while len(batches) < 1000:  # after which it is not going to settle
        batch = [next(source)]
        while sum(map(len, batch)) < 8 * config.lora.lora_r:
            batch.append(next(source))
        batches.append(padded_prompts(batch, pad_id, "right"))
    with reraise_as_user_error("--init_lora_weights eva", ConfigError, RuntimeError):
        initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)


def make_trainable(model: PreTrainedModel, config: Config, adapter: str | None) -> Any:
    """Adapters or, for a full fine-tune, all weights but embeddings, what is tied to them, and frozen layers."""
    if not config.quant.full_finetune:
        return attach_adapters(model, config, adapter)
    frozen = layers_to_freeze(model, config.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_number(name) >= frozen)
    model.get_input_embeddings().requires_grad_(False)
    return model


# ------------------------------------------------------------------------------------
# 10. Fast path: the same numbers from fewer, larger operations
#
# What enters is a model with adapters; what leaves computes the same, in less time and memory. Four parts, each alone:
# base and adapters of the layers that share an input in one autograd function; recomputation of whole layers; attention
# over rows that lie end to end; cross-entropy that never holds all logits. What a part does not know keeps the
# library's own way. A frozen layer costs 2N FLOP a token forward and 2N backward; everything here is about the rest.
# ------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _dequantise_4bit_kernel(  # type: ignore[no-untyped-def]
        packed, absmax, code, nested_code, nested_absmax, offset, out, blocks,
        BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # one row is one block of weights
        there = row < blocks
        if NESTED:
            scale = tl.load(nested_code + tl.load(absmax + row, mask=there, other=0).to(tl.int32))
            scale = scale * tl.load(nested_absmax + row // NESTED_BLOCK, mask=there, other=0.0) + tl.load(offset)
        else:
            scale = tl.load(absmax + row, mask=there, other=0.0)
        half = tl.arange(0, BLOCK // 2)
        where = row[:, None].to(tl.int64) * (BLOCK // 2) + half[None, :]
        pair = tl.load(packed + where, mask=there[:, None], other=0).to(tl.int32)
        high = tl.load(code + (pair >> 4)) * scale[:, None]  # the first of two weights lies in the high half
        low = tl.load(code + (pair & 15)) * scale[:, None]
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        column = tl.arange(0, BLOCK)
        tl.store(out + row[:, None].to(tl.int64) * BLOCK + column[None, :], both, mask=there[:, None])

    @triton.jit
    def _gated_kernel(  # type: ignore[no-untyped-def]
        gate, up, grad, out, count, KIND: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
    ):
        where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = where < count
        g = tl.load(gate + where, mask=there, other=0.0).to(tl.float32)
        u = tl.load(up + where, mask=there, other=0.0).to(tl.float32)
        if KIND == 0:  # SiLU
            sigmoid = tl.sigmoid(g)
            act = g * sigmoid
            slope = sigmoid * (1 + g * (1 - sigmoid))
        else:  # GELU, by tanh
            inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)  # twice: tanh(x) = 2 sigmoid(2 x) - 1
            sigmoid = tl.sigmoid(inner)
            act = g * sigmoid
            slope = sigmoid + act * (1 - sigmoid) * 1.5957691216057308 * (1 + 0.134145 * g * g)
        kind = out.dtype.element_ty
        if BACKWARD:
            d = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
            tl.store(gate + where, (d * u * slope).to(kind), mask=there)
            tl.store(up + where, (d * act).to(kind), mask=there)
        tl.store(out + where, (act * u).to(kind), mask=there)

    @triton.jit
    def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
        logits, targets, losses, columns, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * columns
        target = tl.load(targets + row)
        highest, total = float("-inf"), 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
            above = tl.maximum(highest, tl.max(x))
            total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above))
            highest = above
        logsumexp = highest + tl.log(total)
        tl.store(losses + row, logsumexp - tl.load(logits + target).to(tl.float32))
        if GRADIENT:
            tl.debug_barrier()
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - logsumexp) - tl.where(column == target, 1.0, 0.0)
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


def dense_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer's weight, (out, in), from 4, 8 or 16 bits."""
    weight, unpacked = base.weight, getattr(base, "unpacked", None)
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)  # FSDP's weight has lost its own
    if unpacked is not None and unpacked.dtype == dtype:
        return unpacked
    if state is None:
        if weight.dtype != torch.int8:
            return weight.to(dtype)
        whole = base.state if base.state.CB is not None else weight  # where bitsandbytes keeps it before and after use
        return torch.mul(whole.CB, (whole.SCB / 127.0)[:, None], out=torch.empty_like(whole.CB, dtype=dtype))
    packed = weight.data.view(torch.uint8)  # FSDP has it stored as a floating dtype
    if triton is None or not weight.is_cuda or packed.numel() * 2 % state.blocksize:
        return dequantize_4bit(packed, state).to(dtype)
    out = torch.empty(state.shape, dtype=dtype, device=weight.device)
    nested = state.state2 if state.nested else None
    blocks, rows = out.numel() // state.blocksize, 32
    _dequantise_4bit_kernel[(triton.cdiv(blocks, rows),)](
        packed, state.absmax, state.code,
        nested.code if nested else state.code, nested.absmax if nested else state.absmax,
        state.offset if nested else state.code, out, blocks,
        BLOCK=state.blocksize, NESTED_BLOCK=nested.blocksize if nested else 1, NESTED=nested is not None, ROWS=rows,
        enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds
    )  # fmt: skip
    return out


class FusedLinear(NamedTuple):
    """A linear layer and its one adapter, as the functions below use them."""

    module: Any  # peft's layer
    base: Any
    down: Any  # lora_A, (r, in)
    up: Any  # lora_B, (out, r)
    scaling: float
    dropout: float
    stock: Callable[..., torch.Tensor]  # peft's own forward

    def parameters(self) -> tuple[Any, Any, Any]:
        """What may train: lora_A, lora_B and the base's bias."""
        return self.down.weight, self.up.weight, self.base.bias

    @property
    def drops(self) -> bool:
        """Whether some of its input is dropped now."""
        return bool(self.dropout and self.module.training)

    def applies(self, x: torch.Tensor) -> bool:
        """Not for a few tokens, where bitsandbytes multiplies without unpacking, nor with the adapter switched off.

        In training always: ZeRO-2 adds up gradients in the order in which each process has them. Under ZeRO-3 always:
        weights are gathered in the order in which they are used, alike for a process that has few tokens.
        """
        many = self.module.training or x.numel() >= 16 * x.shape[-1] or hasattr(self.down.weight, "ds_id")
        return many and not (self.module.disable_adapters or self.module.merged)


class Products(NamedTuple):
    """What the layers of one input computed, and what their backward pass needs."""

    outputs: list[torch.Tensor]  # (tokens, out) each
    thin: torch.Tensor  # (tokens, sum of ranks): scaling * dropout(x) lora_A^T
    masks: list[torch.Tensor]  # of the dropout, (tokens, in) each; empty without


Parameters = Sequence[torch.Tensor | None]  # lora_A, lora_B, bias of one layer after the other


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Write scale * a @ b into `out`, without a pass over the product."""
    torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def gradient_mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply to the gradient of a parameter; on a GPU summed and kept in the parameter's float32."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def ranks(params: Parameters) -> list[slice]:
    """Which columns of `thin` are whose."""
    ends = list(itertools.accumulate(a.shape[0] for a in params[::3] if a is not None))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def forward_products(
    x: torch.Tensor, layers: Sequence[FusedLinear], params: Parameters, only_thin: bool = False
) -> Products:
    """W x + bias + scaling * B A dropout(x) of every layer, x of shape (tokens, in)."""
    dtype, columns, masks = x.dtype, ranks(params), []
    drops = any(layer.drops for layer in layers)
    thin = x.new_empty(x.shape[0], columns[-1].stop)
    if not drops and len({layer.scaling for layer in layers}) == 1:
        down = torch.cat([a for a in params[::3] if a is not None]).to(dtype)
        scaled_mm(x, down.t(), layers[0].scaling, thin)
    else:
        for layer, a, column in zip(layers, params[::3], columns, strict=True):
            assert a is not None
            dropped = x
            if drops:
                dropped, mask = torch.native_dropout(x, layer.dropout, True)
                masks.append(mask)
            scaled_mm(dropped, a.to(dtype).t(), layer.scaling, thin[:, column])
    outputs = []
    for layer, b, bias, column in zip(layers, params[1::3], params[2::3], columns, strict=True):
        assert b is not None
        if only_thin:  # nobody reads this output; if somebody did, the loss would not be finite
            outputs.append(x.new_full((x.shape[0], b.shape[0]), math.nan))
            continue
        # the adapter's share first: the large product adds to it on its way out, which costs no pass of its own
        out = F.linear(thin[:, column], b.to(dtype), None if bias is None else bias.to(dtype))
        outputs.append(out.addmm_(x, dense_weight(layer.base, dtype).t()))
    return Products(outputs, thin, masks)


def thin_gradient(grads: Sequence[torch.Tensor], layers: Sequence[FusedLinear], params: Parameters) -> torch.Tensor:
    """Gradient of what lora_B multiplies, times the scaling: (tokens, sum of ranks)."""
    columns = ranks(params)
    d_thin = grads[0].new_empty(grads[0].shape[0], columns[-1].stop)
    for layer, grad, b, column in zip(layers, grads, params[1::3], columns, strict=True):
        assert b is not None
        scaled_mm(grad, b.to(grad.dtype), layer.scaling, d_thin[:, column])
    return d_thin


def input_gradient(
    grads: Sequence[torch.Tensor], d_thin: torch.Tensor, masks: Sequence[torch.Tensor], layers: Sequence[FusedLinear],
    params: Parameters,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the layers' one input, summed in place over them."""
    dtype = d_thin.dtype
    downs = [a.to(dtype) for a in params[::3] if a is not None]
    d_x = d_thin.new_zeros(d_thin.shape[0], downs[0].shape[1]) if masks else d_thin @ torch.cat(downs)
    for layer, mask, down, column in zip(layers, masks, downs, ranks(params), strict=False):  # none without dropout
        d_x += (d_thin[:, column] @ down).mul_(mask).div_(1 - layer.dropout)
    for layer, grad in zip(layers, grads, strict=True):
        d_x.addmm_(grad, dense_weight(layer.base, dtype))
    return d_x


def parameter_gradients(
    grads: Sequence[torch.Tensor], d_thin: torch.Tensor, x: torch.Tensor, made: Products, layers: Sequence[FusedLinear],
    params: Parameters, wide: bool = False,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients of lora_A, lora_B and a bias that trains, one layer after the other; `wide` in at least float32."""
    found: list[torch.Tensor | None] = []
    for i, (layer, grad, column) in enumerate(zip(layers, grads, ranks(params), strict=True)):
        a, b, bias = params[3 * i : 3 * i + 3]
        assert a is not None and b is not None
        of_a, of_b = (torch.promote_types(p.dtype, torch.float32) if wide else p.dtype for p in (a, b))
        dropped = x * made.masks[i] / (1 - layer.dropout) if made.masks else x
        found.append(gradient_mm(d_thin[:, column].t(), dropped, of_a))
        found.append(gradient_mm(grad.t(), made.thin[:, column], of_b))
        found.append(grad.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None)
    return found


class FusedLoRA(torch.autograd.Function):
    """The layers that share one input: its gradient is summed in place, their thin products are one.

    LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Only x and the thin products are kept for the backward pass;
    the weights are unpacked again there.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: Sequence[FusedLinear], *params: torch.Tensor | None) -> Any:
        """Takes x (tokens, in) in the compute dtype -> one (tokens, out) for each layer."""
        made = forward_products(x, layers, params)
        ctx.layers = layers
        ctx.save_for_backward(x, made.thin, *params, *made.masks)
        return tuple(made.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of x and of every parameter."""
        x, thin, *rest = ctx.saved_tensors
        count = 3 * len(ctx.layers)
        layers, params, made = ctx.layers, rest[:count], Products([], thin, rest[count:])
        d_thin = thin_gradient(grads, layers, params)
        d_x = input_gradient(grads, d_thin, made.masks, layers, params) if ctx.needs_input_grad[0] else None
        return d_x, None, *parameter_gradients(grads, d_thin, x, made, layers, params)


class GatedActivation(NamedTuple):
    """The product act(gate) * up of a gated MLP."""

    module: Any  # the activation
    kind: int | None  # which of the kernel's, where there is one for it

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """act(gate) * up."""
        if self.kind is None or not gate.is_cuda:
            return self.module(gate) * up
        out = torch.empty_like(gate)
        _gated_kernel[(triton.cdiv(out.numel(), 2048),)](
            gate, up, out, out, out.numel(), KIND=self.kind, BACKWARD=False, BLOCK=2048
        )
        return out

    def gradients(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The product again, and the gradients of gate and up; on a GPU in the memory of the three given."""
        if self.kind is None or not gate.is_cuda:
            with torch.enable_grad():
                gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
                product = self.module(gate) * up
            return product.detach(), *torch.autograd.grad(product, (gate, up), grad)
        _gated_kernel[(triton.cdiv(gate.numel(), 2048),)](
            gate, up, grad, grad, gate.numel(), KIND=self.kind, BACKWARD=True, BLOCK=2048
        )
        return grad, gate, up


def gated_act(act: Any) -> GatedActivation:
    """An activation with the kernel that computes it, if there is one."""
    kinds = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1}
    return GatedActivation(act, kinds.get(type(act).__name__) if triton is not None else None)


def mlp_gradients(
    grad: torch.Tensor, x: torch.Tensor, act: GatedActivation, layers: Sequence[FusedLinear], params: Parameters,
    outputs: list[torch.Tensor], first: Products, last: Products | None, needs_x: bool, wide: bool = False,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients of a gated MLP's x and parameters. `outputs` are gate and up, which are used up."""
    pair, down = layers[:2], layers[2:]
    d_thin = thin_gradient([grad], down, params[6:])
    d_product = input_gradient([grad], d_thin, last.masks if last else [], down, params[6:])
    product, *d_pair = act.gradients(d_product, *outputs)
    outputs.clear()
    last = last or forward_products(product, down, params[6:], only_thin=True)
    of_last = parameter_gradients([grad], d_thin, product, last, down, params[6:], wide)
    del product, d_product
    d_thin = thin_gradient(d_pair, pair, params[:6])
    d_x = input_gradient(d_pair, d_thin, first.masks, pair, params[:6]) if needs_x else None
    return [d_x, *parameter_gradients(d_pair, d_thin, x, first, pair, params[:6], wide), *of_last]


class FusedMLP(torch.autograd.Function):
    """A gated MLP, down(act(gate(x)) * up(x)), that keeps x, gate and up and computes the middle again.

    While its layer is recomputed it keeps x alone and leaves everything to the backward pass, which then takes the
    tokens in pieces: three tensors as wide as the MLP are the largest that a recomputed step holds.
    """

    PIECE = 2**28  # bytes of a piece's gate: 12 000 tokens at 7B. Each piece unpacks the weights anew

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, act: GatedActivation, layers: Sequence[FusedLinear], *params: torch.Tensor | None
    ) -> torch.Tensor:
        """Takes x (tokens, hidden) -> (tokens, hidden). While a layer is recomputed nobody reads the result."""
        ctx.layers, ctx.act, ctx.masks = layers, act, None
        again = Recompute.skips_last
        if again and not any(layer.drops for layer in layers):  # dropout has its place in the order of random numbers
            ctx.save_for_backward(x, *params)
            return x.new_full((1, 1), math.nan).expand(len(x), layers[2].base.out_features)
        first = forward_products(x, layers[:2], params[:6])
        gate, up = first.outputs
        last = forward_products(act.product(gate, up), layers[2:], params[6:], only_thin=again)
        ctx.masks = len(first.masks)
        ctx.save_for_backward(x, gate, up, first.thin, last.thin, *params, *first.masks, *last.masks)
        return last.outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of x and of every parameter."""
        needs_x, layers, (grad,) = ctx.needs_input_grad[0], ctx.layers, grads
        if ctx.masks is not None:
            x, gate, up, thin, last_thin, *rest = ctx.saved_tensors
            params, masks = rest[:9], rest[9:]
            first, last = Products([], thin, masks[: ctx.masks]), Products([], last_thin, masks[ctx.masks :])
            found = mlp_gradients(grad, x, ctx.act, layers, params, [gate, up], first, last, needs_x)
            return found[0], None, None, *found[1:]
        x, *params = ctx.saved_tensors
        pieces = math.ceil(len(x) * layers[0].base.out_features * x.element_size() / FusedMLP.PIECE)
        rows = math.ceil(len(x) / pieces)
        d_x = torch.empty_like(x) if needs_x else None
        sums: list[torch.Tensor | None] = [None] * 9
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            first = forward_products(x[part], layers[:2], params[:6])
            d_part, *found = mlp_gradients(
                grad[part], x[part], ctx.act, layers, params, first.outputs, first, None, needs_x, wide=pieces > 1
            )
            if d_x is not None and d_part is not None:
                d_x[part] = d_part
            sums = [b if a is None or b is None else a.add_(b) for a, b in zip(sums, found, strict=True)]
        return d_x, None, None, *sums


class FusedGroup:
    """The adapted layers that an attention block applies to one input: the first call computes for all of them."""

    source: ClassVar[torch.Tensor | None] = None  # the input of the group that was called last
    waiting: ClassVar[dict[Any, torch.Tensor]] = {}  # what its layers have not asked for yet

    def __init__(self, layers: list[FusedLinear]) -> None:
        self.layers = layers

    @staticmethod
    def forget() -> None:
        """Let go of what is waiting, and with it of a whole tape."""
        FusedGroup.source, FusedGroup.waiting = None, {}

    def forward(self, index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of one layer's forward."""
        layer = self.layers[index]
        if args or kwargs or not layer.applies(x):
            return layer.stock(x, *args, **kwargs)
        if FusedGroup.source is not x or layer.module not in FusedGroup.waiting:
            params = [parameter for one in self.layers for parameter in one.parameters()]
            flat = x.reshape(-1, x.shape[-1]).to(matmul_dtype(x))
            made = FusedLoRA.apply(flat, self.layers, *params)
            modules = [one.module for one in self.layers]
            FusedGroup.source, FusedGroup.waiting = x, dict(zip(modules, made, strict=True))
        out = FusedGroup.waiting.pop(layer.module)
        if not FusedGroup.waiting:
            FusedGroup.forget()
        return out.view(*x.shape[:-1], -1)


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fused_mlp(module: Any, act: GatedActivation, layers: Sequence[FusedLinear], x: torch.Tensor) -> torch.Tensor:
    """In place of a gated MLP's forward."""
    if not layers[0].applies(x):
        return type(module).forward(module, x)
    params = [parameter for layer in layers for parameter in layer.parameters()]
    flat = x.reshape(-1, x.shape[-1]).to(matmul_dtype(x))
    return FusedMLP.apply(flat, act, layers, *params).view(*x.shape[:-1], -1)


GATED_MLP = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
SHARED_INPUT = ("q_proj", "k_proj", "v_proj")  # as most families call them


def is_gated_mlp(module: Any) -> bool:
    """Whether a block computes what fused_mlp does."""
    return GATED_MLP in inspect.getsource(type(module).forward)


def as_fused_linear(module: Any) -> FusedLinear | None:
    """An adapted layer as the functions above take it; None for what they do not know (DoRA, a bias in lora_B, ...)."""
    name = next(iter(module.active_adapters), "")
    base = module.get_base_layer()
    down, up = (dict(layers).get(name) for layers in (module.lora_A, module.lora_B))
    linear = isinstance(base, torch.nn.Linear) and type(down) is type(up) is torch.nn.Linear
    if down is None or up is None or len(module.active_adapters) != 1 or not linear or name in module.lora_variant:
        return None
    if up.bias is not None:
        return None
    dropout = getattr(module.lora_dropout[name], "p", 0.0)
    return FusedLinear(module, base, down, up, module.scaling[name], dropout, module.forward)


def patch_lora_layers(model: Any) -> list[str]:
    """Give every adapted layer that is known the functions above; returns the names of the others."""
    found = {name: as_fused_linear(m) for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    known = {name: layer for name, layer in found.items() if layer is not None}
    for name, module in model.named_modules():
        wanted = [f"{name}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        parts = [known[leaf] for leaf in wanted if leaf in known]
        if len(parts) == 3 and is_gated_mlp(module):
            module.forward = partial(fused_mlp, module, gated_act(module.act_fn), parts)
    groups: dict[str, list[FusedLinear]] = defaultdict(list)
    for name, layer in known.items():
        owner, _, leaf = name.rpartition(".")
        groups[owner if leaf in SHARED_INPUT else name].append(layer)
    for layers in groups.values():
        group = FusedGroup(layers)
        for index, layer in enumerate(layers):
            layer.module.forward = partial(group.forward, index)
    return sorted(found.keys() - known.keys())


class Offloaded:
    """A tensor on its way to the CPU's memory, and back when it is asked for; the GPU computes on meanwhile."""

    streams: ClassVar[dict[torch.device, Any]] = {}

    def __init__(self, x: torch.Tensor) -> None:
        self.stream = self.streams.setdefault(x.device, torch.cuda.Stream(x.device))
        self.device = x.device
        self.here: torch.Tensor | None = None
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            self.there = x.to("cpu", non_blocking=True)  # pinned
        x.record_stream(self.stream)

    def fetch(self) -> None:
        """Begin to bring it back, into memory that the computing stream owns."""
        self.here = torch.empty_like(self.there, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.here.copy_(self.there, non_blocking=True)

    def take(self) -> torch.Tensor:
        """The tensor, on the GPU again."""
        if self.here is None:
            self.fetch()
        assert self.here is not None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self.here


class Recompute(torch.autograd.Function):
    """Keep a layer's input alone and compute the layer again in the backward pass (Chen et al. 2016, 1604.06174).

    What a gated MLP multiplies last is only added to the residual, so its second computation is left out where the
    layer's structure allows that: 22 % of the repeated products of a 7B model.
    """

    skips_last = False  # while a layer is computed again
    away: ClassVar[list[Offloaded]] = []  # inputs in the CPU's memory, of one layer after the other

    @staticmethod
    def forward(
        ctx: Any, run: Any, how: tuple[bool, bool], anchor: torch.Tensor, hidden: torch.Tensor, *args: Any
    ) -> Any:
        """`anchor` requires a gradient, so that this is on the tape even where `hidden` does not need one."""
        ctx.run, ctx.args = run, args
        ctx.skip, offloads = how
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.rng = random_state(hidden.device)
        if offloads and hidden.is_cuda and any(ctx.needs_input_grad):  # else no backward pass fetches it
            Recompute.away.append(Offloaded(hidden))
            ctx.save_for_backward()
        else:
            ctx.save_for_backward(hidden)
        return run(hidden, *args)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute again, with a tape, from the same random numbers."""
        saved = ctx.saved_tensors[0] if ctx.saved_tensors else Recompute.away.pop().take()
        if Recompute.away:
            Recompute.away[-1].fetch()  # while this layer is computed again
        hidden = saved.detach().requires_grad_(ctx.needs_input_grad[3])
        with drawn_again(hidden.device, ctx.rng), computed_again(ctx.skip), torch.autocast(*ctx.autocast):
            made = ctx.run(hidden, *ctx.args)
        outputs = made if isinstance(made, tuple) else (made,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, None, hidden.grad, *(None for _ in ctx.args)


def random_state(device: torch.device) -> torch.Tensor:
    """The generator's state that dropout on this device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """The counterpart of random_state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextlib.contextmanager
def drawn_again(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """For a while the random numbers that followed a state of this device's generator."""
    now = random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, now)


@contextlib.contextmanager
def computed_again(skips_last: bool) -> Iterator[None]:
    """A layer is computed a second time, with a tape; whether it leaves out its last product."""
    Recompute.skips_last = skips_last
    try:
        with torch.enable_grad():
            yield
    finally:
        Recompute.skips_last = False


def all_random_states() -> list[torch.Tensor]:
    """Of every generator that a step may draw from: the CPU's and each GPU's, where layers lie on several."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_all_random_states(states: list[torch.Tensor]) -> None:
    """The counterpart of all_random_states."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


def recompute(how: tuple[bool, bool], anchor: torch.Tensor, run: Any, hidden: torch.Tensor, *args: Any) -> Any:
    """What a decoder layer calls instead of itself. `how`: whether it skips the last product and offloads its input."""
    return Recompute.apply(run, how, anchor, hidden, *args)


class Passes(NamedTuple):
    """A layer's two passes over one shape as CUDA graphs, and where those read and write."""

    forward: Any
    backward: Any
    hidden: torch.Tensor  # what enters, and after the forward pass what leaves
    grad: torch.Tensor  # the gradient of what leaves, and after the backward pass of what enters
    others: list[list[Any]]  # each a tensor that is read, and what was last copied into it

    def fill(self, hidden: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
        """Copy what the forward pass reads, once for all layers where they share it."""
        self.hidden.copy_(hidden)
        for slot, value in zip(self.others, others, strict=True):
            if slot[1] is not value:
                slot[0].copy_(value)
                slot[1] = value


class Graphed(torch.autograd.Function):
    """Recompute for micro-batches so small that the GPU waits for the next kernel: two launches a layer, not 150.

    A graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) is of one shape. The first batch of each
    shape is computed plainly, which compiles the kernels; the second records, and from then on graphs are replayed.
    They add the gradients of parameters up where they stay from step to step.
    """

    most: ClassVar[int] = 32  # shapes that are recorded; of rows up to 512 tokens long there may be 512
    shapes: ClassVar[set[Any]] = set()
    made: ClassVar[dict[Any, Passes | None]] = {}  # by layer and shapes
    buffers: ClassVar[dict[Any, tuple[torch.Tensor, torch.Tensor]]] = {}  # by shape, of all layers
    slots: ClassVar[list[list[Any]]] = []
    sums: ClassVar[dict[torch.Tensor, torch.Tensor]] = {}  # by parameter, its gradient
    pool: ClassVar[Any] = None
    stream: ClassVar[Any] = None

    @staticmethod
    def forward(ctx: Any, passes: Passes, others: Any, anchor: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Keeps `hidden`, and what else the layer reads where it was copied to: the next micro-batch comes later."""
        ctx.passes, ctx.rng = passes, random_state(hidden.device)
        ctx.save_for_backward(hidden)
        passes.fill(hidden, others)
        passes.forward.replay()
        return passes.hidden.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Computes the layer again, too, from the same random numbers."""
        passes: Passes = ctx.passes
        passes.hidden.copy_(ctx.saved_tensors[0])
        passes.grad.copy_(grads[0])
        with drawn_again(passes.hidden.device, ctx.rng):
            passes.backward.replay()
        return None, None, None, passes.grad.clone()

    @staticmethod
    def record(layer: Any, run: Any, skips_last: bool, hidden: torch.Tensor, rest: Any) -> Passes:
        """Both passes of a layer, without running them."""
        key = hidden.shape, hidden.dtype
        if key not in Graphed.buffers:
            Graphed.buffers[key] = torch.empty_like(hidden), torch.empty_like(hidden)
        static, grad = Graphed.buffers[key]
        others: list[list[Any]] = []
        args, keywords = tree_map_only(torch.Tensor, partial(_slot, others), rest)
        compute = partial(_on_first, run, args, keywords)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            Graphed.sums[parameter] = parameter.grad
        forward = recorded(partial(_forward_pass, compute, static), hidden.device)
        backward = recorded(partial(_backward_pass, compute, static, grad, trained, skips_last), hidden.device)
        return Passes(forward, backward, static, grad, others)

    @staticmethod
    def begin() -> None:
        """A new step: gradients from zero, in the memory that the graphs know."""
        for parameter, total in Graphed.sums.items():
            parameter.grad = total
        if Graphed.sums:
            torch._foreach_zero_(list(Graphed.sums.values()))

    @staticmethod
    def forget() -> None:
        """Let go of all graphs and their memory."""
        Graphed.made, Graphed.buffers, Graphed.slots, Graphed.sums, Graphed.pool = {}, {}, [], {}, None
        Graphed.shapes = set()


def _slot(slots: list[list[Any]], value: torch.Tensor) -> torch.Tensor:
    """Where a graph reads what this layer, and in this micro-batch perhaps another one, was given."""
    slot = next((slot for slot in Graphed.slots if slot[1] is value), None)
    if slot is None:
        slot = [value.clone(), value]
        Graphed.slots.append(slot)
    slots.append(slot)
    return slot[0]


def _on_first(run: Any, args: Any, keywords: Any, hidden: torch.Tensor) -> torch.Tensor:
    return run.func(*run.args, hidden, *args, **keywords)


def _forward_pass(compute: Any, hidden: torch.Tensor) -> None:
    with torch.no_grad():
        hidden.copy_(compute(hidden))


def _backward_pass(compute: Any, hidden: torch.Tensor, grad: torch.Tensor, trained: Any, skips_last: bool) -> None:
    again = hidden.detach().requires_grad_()
    with computed_again(skips_last):
        out = compute(again)
    of_hidden, *found = torch.autograd.grad(out, [again, *trained], grad)
    if trained:
        torch._foreach_add_([Graphed.sums[parameter] for parameter in trained], found)
    grad.copy_(of_hidden)


def recorded(function: Callable[[], None], device: torch.device) -> Any:
    """A CUDA graph of what a function launches. Other threads, as the one that pins memory, go on meanwhile."""
    if Graphed.pool is None:
        Graphed.pool, Graphed.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    Graphed.stream.wait_stream(here)
    # what autocast has cast before would be gone by the next replay
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    with torch.cuda.stream(Graphed.stream), torch.autocast(device.type, dtype, enabled, cache_enabled=False):
        graph.capture_begin(pool=Graphed.pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    here.wait_stream(Graphed.stream)
    return graph


def graphed(
    how: tuple[bool, bool], anchor: torch.Tensor, layer: Any, run: Any, hidden: torch.Tensor, *args: Any
) -> Any:
    """In place of recompute, where small micro-batches are graphs."""
    rest = args, run.keywords
    leaves = tree_leaves(rest)
    shapes = [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    key = (layer, hidden.shape, hidden.dtype, *shapes)
    if key not in Graphed.made or (key[1:] not in Graphed.shapes and len(Graphed.shapes) == Graphed.most):
        Graphed.made.setdefault(key)
        return recompute(how, anchor, run, hidden, *args)
    passes = Graphed.made[key]
    if passes is None:
        Graphed.shapes.add(key[1:])
        what = f"--cuda_graphs: {type(layer).__name__} can't be recorded, leave the flag out"
        with reraise_as_user_error(
            what, QLoRAError, RuntimeError
        ):  # and torch not be used after a recording that failed
            passes = Graphed.made[key] = Graphed.record(layer, run, how[0], hidden, rest)
    return Graphed.apply(passes, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], anchor, hidden)


GROUPED_BY_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has none, and needs none
VARLEN_ATTENTION = "end_to_end"  # the name of our attention among transformers'


def has_kernel(dtype: torch.dtype, size: int, dropout: float | None) -> bool:
    """Whether attention of rows of any length, with heads of this size, is one kernel on a GPU; else row by row."""
    return dtype in (torch.bfloat16, torch.float16) and size in range(8, 257, 8) and not dropout


def varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, cu_seq_lens_q: Any = None,
    max_length_q: int = 0, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention of rows that lie end to end, each to itself.

    Args:
        module: transformers' attention block.
        query, key, value: (1, heads, tokens, dim); fewer heads in key and value for grouped queries.
        attention_mask: None, the rows' lengths tell all.
        scaling: of the scores; None for 1 / sqrt(dim).
        dropout: of the attention weights.
        sliding_window: tokens that one attends to, itself among them.
        cu_seq_lens_q: (rows + 1,), where each row begins, and the end.
        max_length_q: the longest row.
        kwargs: what other kernels take.

    Returns:
        (1, tokens, heads, dim), and None for the weights.

    Raises:
        NotImplementedError: the model does not hand the lengths on, as Nemotron, or makes a mask of its own, as Doge.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise NotImplementedError
    rows, tokens = cu_seq_lens_q.shape[0] - 1, query.shape[2]
    if rows * max_length_q == tokens and (sliding_window is None or max_length_q <= sliding_window):
        # rows of one length, packed ones often, are an ordinary batch: cuDNN takes 0.6 of the time that the kernel for
        # rows of any length takes on an H200
        q, k, v = (t.squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(1, tokens, query.shape[1], -1), None
    q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))  # (tokens, heads, dim)
    if q.is_cuda and has_kernel(q.dtype, q.shape[-1], dropout):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        grouped: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] and GROUPED_BY_FLAG else {}
        found: Any = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=window, **grouped,
        )  # fmt: skip
        return found.unsqueeze(0), None
    pieces = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        queries, keys, values = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - sliding_window)
        piece = F.scaled_dot_product_attention(
            queries, keys, values, mask, dropout, mask is None, scale=scaling, enable_gqa=True
        )
        pieces.append(piece.squeeze(0).transpose(0, 1))
    return torch.cat(pieces).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(VARLEN_ATTENTION, varlen_attention)  # and no mask under that name: none is made


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head, summed over tokens, with the logits of a few hundred tokens at a time.

    The gradients are computed in the forward pass, from each chunk's logits while they are there (as in Liger Kernel,
    Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        post: Callable[[torch.Tensor], torch.Tensor] | None, smoothing: float,
    ) -> torch.Tensor:  # fmt: skip
        """Takes hidden (tokens, dim), weight (vocabulary, dim), targets (tokens,) -> the sum, in float32."""
        wants, precise = ctx.needs_input_grad, torch.promote_types(hidden.dtype, torch.float32)
        kernel = triton is not None and hidden.is_cuda and post is None and not smoothing
        dense = weight.to(hidden.dtype)
        rows = max(1, 2**27 // (weight.shape[0] * (hidden.element_size() if kernel else 8)))
        total = torch.zeros((), dtype=precise, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=precise) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and wants[2] else None
        for start in range(0, hidden.shape[0], rows):
            part, chosen = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(part, dense, None if bias is None else bias.to(hidden.dtype))
            if kernel:
                losses = torch.empty(len(part), dtype=precise, device=hidden.device)
                _cross_entropy_kernel[(len(part),)](
                    logits, chosen, losses, logits.shape[1], GRADIENT=any(wants), BLOCK=4096, num_warps=8
                )
                total += losses.sum()
                gradient = logits
            else:
                with torch.enable_grad():
                    logits.requires_grad_(any(wants))
                    wide = logits.to(precise) if post is None else post(logits.to(precise))
                    loss = F.cross_entropy(wide, chosen, reduction="sum", label_smoothing=smoothing)
                total += loss.detach()
                gradient = torch.autograd.grad(loss, logits)[0] if any(wants) else logits
                del wide, loss
            if d_hidden is not None:
                torch.mm(gradient, dense, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight += gradient.t() @ part
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.kept = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """What the forward pass found, times the gradient of the sum, which bf16 would round by up to 0.4 %."""
        factor = grads[0]
        return *(None if g is None else (g.to(factor.dtype) * factor).to(g.dtype) for g in ctx.kept), None, None, None


# What models do to the logits that their head returns, by the entry of their config that says so.
LOGIT_RULES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logits_scaling": lambda logits, scale: logits / scale,
    "logit_scale": lambda logits, scale: logits * scale,
}


class FastPath(NamedTuple):
    """Which parts of the fast path a model takes; none of them by default."""

    attention: str | None = None  # the kernel for rows that lie end to end; None where they are padded
    head: Any | None = None  # the output head, where its logits are computed in chunks
    post: Callable[[torch.Tensor], torch.Tensor] | None = None  # what the model does to its logits
    by_input: bool = True  # whether layers are recomputed from their input alone, and not in torch's own way
    skips_last: bool = False  # whether a recomputed layer may leave out its last product
    offloads: bool = False  # whether the inputs of recomputed layers wait in the CPU's memory
    spread: bool = False  # whether an engine spreads the weights over several processes
    graphs: bool = False  # whether layers may be CUDA graphs

    def lines(self) -> dict[str, str]:
        parts = {"rows end to end": self.attention, "logits in chunks": self.head}
        return {name: "no" if part is None else "yes" for name, part in parts.items()}


def head_rule(model: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the model does to its logits, or None for nothing."""
    config = model.config.get_text_config()
    rules = [(rule, getattr(config, name, None)) for name, rule in LOGIT_RULES.items()]
    chosen = [(rule, value) for rule, value in rules if value not in (None, 1, 1.0)]
    return partial(_apply_rules, chosen) if chosen else None


def _apply_rules(rules: Any, logits: torch.Tensor) -> torch.Tensor:
    for rule, value in rules:
        logits = rule(logits, value)
    return logits


@contextlib.contextmanager
def head_as(head: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The model with another function in its output head's place for a while."""
    own = vars(head).get("forward")  # accelerate's, where layers lie on several GPUs
    head.forward = function
    try:
        yield
    finally:
        del head.forward
        if own:
            head.forward = own


@contextlib.contextmanager
def attention_implementation(model: Any, kernel: str | None) -> Iterator[None]:
    """Another attention kernel for a while."""
    config = model.config.get_text_config()
    own = config._attn_implementation
    try:
        if kernel:
            config._attn_implementation = kernel
        yield
    finally:
        config._attn_implementation = own


def model_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """What the model makes of a batch."""
    return model(**{name: value for name, value in batch.items() if name not in ("positions", "targets")}).logits


def select_supervised(states: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """What predicts the labelled tokens, a row each; only these go on: a quarter where the prompt is three quarters."""
    return states.flatten(0, 1)[batch["positions"].to(states.device)]


def _into(found: list[torch.Tensor], function: Any, batch: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    found.append(function(select_supervised(hidden, batch)))
    return hidden[..., :1]


def at_head(model: Any, fast: FastPath, batch: Mapping[str, Any], function: Any) -> torch.Tensor:
    """What a function makes of the labelled hidden states, while the model is at its head: spread weights are here."""
    found: list[torch.Tensor] = []
    with head_as(fast.head, partial(_into, found, function, batch)):
        out = model_logits(model, batch)
    # FSDP and ZeRO-3 gather weights for the backward pass when it comes to what the model gave back
    return found[0] + out[:0].sum() if fast.spread and out.requires_grad else found[0]


def summed_loss(model: Any, fast: FastPath, batch: Mapping[str, Any], smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the labelled tokens of a batch, summed, in float32."""
    if fast.head is not None:
        return at_head(model, fast, batch, partial(_chunked, fast, batch["targets"], smoothing))
    states = select_supervised(model_logits(model, batch), batch)
    targets = batch["targets"].to(states.device)
    return F.cross_entropy(states.float(), targets, reduction="sum", label_smoothing=smoothing)


def _chunked(fast: FastPath, targets: torch.Tensor, smoothing: float, states: torch.Tensor) -> torch.Tensor:
    head, states = fast.head, states.to(matmul_dtype(states))
    assert head is not None
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # of which a torch.autograd.Function learns nothing
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    with torch.cuda.device_of(states):
        return ChunkedCrossEntropy.apply(states, weight, bias, targets.to(states.device), fast.post, smoothing)


def set_unpacked_layers(model: Any, count: int, dtype: torch.dtype) -> None:
    """Keep the weights of the first `count` layers unpacked beside the packed ones: for memory that is free anyway."""
    for i, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
                base: Any = module
                base.unpacked = None
                with torch.cuda.device_of(base.weight):
                    base.unpacked = dense_weight(base, dtype) if i < count else None


def set_recomputed_layers(model: Any, count: int, fast: FastPath, graphs: bool = False) -> None:
    """Recompute the first `count` layers: the backward pass reaches them last, when the others' memory is free.

    Where a process's layers are on several GPUs, of each its first.
    """
    Graphed.forget()
    layers, how = decoder_layers(model), (fast.skips_last, fast.offloads)
    places = [next(layer.parameters()).device for layer in layers]
    chosen = sorted(range(len(layers)), key=lambda i: places[:i].count(places[i]))[:count]
    for i, layer in enumerate(layers):
        # where neither a layer nor anything below it trains, no gradient arrives, and there is nothing to compute again
        anchor = torch.zeros(1, requires_grad=any(parameter.requires_grad for parameter in layer.parameters()))
        layer.gradient_checkpointing = i in chosen
        ours = partial(graphed, how, anchor, layer) if graphs else partial(recompute, how, anchor)
        theirs = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        layer._gradient_checkpointing_func = ours if fast.by_input else theirs


def liger_patches() -> Mapping[str, Any] | None:
    """By model_type, the function of liger-kernel that changes such a model; None where it is not installed."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as patches
    except ImportError:
        return None
    return patches


def apply_liger(model: Any, config: Config) -> None:
    """Take norms and rotary embedding from liger-kernel, where it is wanted, installed and has the model."""
    if not config.training.liger or triton is None or not torch.cuda.is_available():
        return
    patches = liger_patches()
    if patches is None:
        log.info("liger-kernel is not installed: norms and rotary embedding are torch's, which takes a tenth longer")
        return
    patch = patches.get(model.config.model_type)
    if patch is None:
        log.info("liger-kernel does not have %s: norms and rotary embedding are torch's", model.config.model_type)
        return
    known = inspect.signature(patch).parameters
    parts = {name: name in ("rope", "rms_norm", "layer_norm") for name in known if known[name].annotation is bool}
    family = vars(sys.modules[type(model).__module__])
    own = dict(family)
    patch(model=model, **parts)
    # it changes the family's module too, where a model on the CPU, as a merged one is, would run into Triton
    for name, before in own.items():
        if family[name] is not before:
            family[name] = before if isinstance(before, type) else partial(_on_gpu, family[name], before)


def stay_on_device(model: Any) -> None:
    """Let each part of a model that lies on several GPUs run with its own as the current one: Triton launches there."""
    places = getattr(model, "hf_device_map", {})
    modules = dict(model.named_modules())  # a part may also be a weight or a buffer
    for name in places.keys() & modules.keys() if len({*places.values()}) > 1 else ():
        if isinstance(places[name], int):
            modules[name].forward = partial(_run_on, places[name], modules[name].forward)


def _run_on(gpu: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device(gpu):
        return forward(*args, **kwargs)


def _on_gpu(kernel: Any, plain: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return (kernel if q.is_cuda else plain)(q, *args, **kwargs)


def end_to_end_kernel(model: Any, config: Config) -> str | None:
    """The attention kernel for rows that lie end to end, or None, with a line that says why they are padded."""
    wanted = resolve_attention(config)
    if not config.training.padding_free:
        return None
    if config.training.neftune_noise_alpha:
        log.info("rows are padded: --neftune_noise_alpha divides its noise by the root of a row's length")
        return None
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", None):
        log.info("rows are padded: %s scales attention by the place in a micro-batch", type(model).__name__)
        return None
    if wanted == "flash_attention_2":
        return wanted
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    if wanted is None and model._supports_sdpa and model._supports_attention_backend and takes_positions:
        return VARLEN_ATTENTION
    why = (
        f"attn_implementation {wanted}" if wanted else f"{type(model).__name__} does not take rows that lie end to end"
    )
    log.info("rows are padded: %s", why)
    return None


def supervised_logits(model: Any, fast: FastPath, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the labelled tokens of a batch, (supervised, vocabulary), in float32, by the ways that `fast` names."""
    if fast.head is not None:
        return at_head(model, fast, batch, partial(_logits, fast))
    return select_supervised(model_logits(model, batch), batch).float()


def _logits(fast: FastPath, states: torch.Tensor) -> torch.Tensor:
    head: Any = fast.head
    logits = F.linear(states.to(head.weight.dtype), head.weight, head.bias).float()
    return logits if fast.post is None else fast.post(logits)


def logits_close(a: torch.Tensor, b: torch.Tensor, noise: torch.Tensor | float = 0.0) -> bool:
    """Whether two ways of computing logits agree within bf16's rounding: about a hundredth, and twice the noise."""
    a, b = (x.cpu() - x.cpu().mean(-1, keepdim=True) for x in (a, b))  # of two ways that may end on two GPUs
    return bool((a - b).norm() <= 0.05 * a.norm() + 2 * noise)


def trial_windows(base: Any) -> list[StepBatch]:
    """Two windows of two short rows each, of which the second is the same."""
    words, generator = base.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    # more than 15 tokens each: fewer go through the libraries' own functions
    ids = [torch.randint(words, (n,), generator=generator).tolist() for n in (17, 23, 17)]
    a, b, c = ({"input_ids": row, "labels": row} for row in ids)
    return [collate_step(rows)["step"] for rows in ([a, b], [c, b])]


SPANS = ("sliding_window", "attention_chunk_size")  # how far attention reaches, as configs and modules call it


@contextlib.contextmanager
def short_spans(model: Any, longest: int) -> Iterator[None]:
    """For a while attention that reaches less far than the longest row reaches a few tokens back.

    Our kernel is told how far that is; where the model only puts it into its mask (PhiMoE, Llama 4's chunks), short
    rows would not show it.
    """
    owners = [model.config.get_text_config(), *model.modules()]
    found = [(owner, name, getattr(owner, name, None)) for owner in owners for name in SPANS]
    saved = [
        (owner, name, value) for owner, name, value in found
        if isinstance(value, int) and 8 < value < longest
    ]  # fmt: skip
    try:
        for owner, name, _ in saved:
            setattr(owner, name, 8)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def choose_fast_path(model: Any, base: Any, config: Config, device: Any = None) -> FastPath:
    """What of the fast path a model takes: each part is tried on a few tokens and left out where the numbers differ.

    Args:
        model: with adapters, or for a full fine-tune as it is; wrapped in the engine that spreads it.
        base: the model inside.
        config: the flags.
        device: where its input goes; None for where its embedding is.
    """
    kernel, head = end_to_end_kernel(base, config), base.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and type(head).__module__.startswith("torch")  # FSDP's or as it was
    if not config.training.chunked_head or not plain:
        head = None
    windows, device = trial_windows(base), device or base.get_input_embeddings().weight.device
    fast = FastPath(offloads=config.training.offload_activations, spread=is_sharded(config))
    # DeepSpeed's wrapper says that it trains while the model inside does not
    name, training, dtype = type(base).__name__, base.training, compute_dtype(config)
    model.eval()
    spans = short_spans(base, length_limits(config).longest if kernel == VARLEN_ATTENTION else 0)
    with torch.no_grad(), spans, torch.autocast(device.type, dtype, dtype != torch.float32):
        batch = to_device(padded_batch(windows[0], [0, 1], 0, "right"), device)
        known = supervised_logits(model, fast, batch)
        with_head = fast._replace(head=head, post=head_rule(base))
        if head is not None and logits_close(known, supervised_logits(model, with_head, batch)):
            fast = with_head
        elif head is not None:
            log.info("logits are computed whole: %s changes them in a way of its own", name)
        # the rows one by one: what another kernel alone changes, which grows with the layers that round
        alone = [to_device(padded_batch(windows[0], [row], 0, "right"), device) for row in (0, 1)] if kernel else []
        known = known.cpu()
        noise = (
            (known - torch.cat([supervised_logits(model, fast, row).cpu() for row in alone])).norm() if kernel else 0.0
        )
        with attention_implementation(base, kernel):
            flat = [to_device(padding_free_batch(window, [0, 1]), device) for window in windows]
            try:
                found = [supervised_logits(model, fast, batch) for batch in flat] if kernel else []
            except NotImplementedError:
                found = []
        # a neighbour changes nothing; but an expert multiplies the tokens of all rows at once, which rounds otherwise
        near = 2 * noise + 1e-5 * known.norm() if stacked_experts(base) else 0.0
        if found and logits_close(known, found[0], noise) and float((found[0] - found[1])[16:].norm()) <= near:
            fast = fast._replace(attention=kernel)
        elif kernel:
            log.info("rows are padded: in %s rows that lie end to end would see each other, or too far back", name)
    model.train(training)
    if fast.spread:  # it recomputes as the engine's hooks know it
        return fast._replace(by_input=False)
    return choose_recomputing(model, base, fast, flat[0] if fast.attention else batch, config)


def to_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A batch with its tensors there, without a wait for what the GPU has still to do: that takes pinned memory."""
    pinned = torch.device(device).type == "cuda"
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    there = {
        name: (value.pin_memory() if pinned and not value.is_cuda else value).to(device, non_blocking=True)
        for name, value in tensors.items()
    }
    return {**batch, **there}


def try_step(model: Any, base: Any, fast: FastPath, batch: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Forward and backward of a few tokens as in training; gradients stay, the random numbers are as before."""
    device = batch["input_ids"].device
    model.train()
    gpus = list({parameter.device for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(gpus), attention_implementation(base, fast.attention):
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            loss = summed_loss(model, fast, batch)
        loss.backward()


def tried_norms(
    model: Any, base: Any, fast: FastPath, recomputed: int, batch: Mapping[str, Any], dtype: torch.dtype
) -> list[float]:
    """The norm of each gradient of a few tokens, -1 where there is none; empty where layers can't be recomputed so."""
    set_recomputed_layers(base, recomputed, fast)
    try:
        try_step(model, base, fast, batch, dtype)
        return [-1.0 if p.grad is None else float(p.grad.norm()) for p in model.parameters() if p.requires_grad]
    except RuntimeError as error:
        if not recomputed or isinstance(error, torch.OutOfMemoryError):
            raise
        return []  # a tape that two layers share is used up by the first of them
    finally:
        Recompute.away.clear()
        FusedGroup.forget()
        model.zero_grad(set_to_none=True)
        set_recomputed_layers(base, 0, fast)


def choose_recomputing(model: Any, base: Any, fast: FastPath, batch: Mapping[str, Any], config: Config) -> FastPath:
    """How layers are recomputed: in the first way that gives the gradients of layers that are not.

    A layer that leaves out its last product puts NaN there, which must not reach a gradient. One that takes more from
    other layers than its input (Gemma 4's keys and values of an earlier one) is left to torch's checkpoints.
    """
    layers, training, dtype = len(decoder_layers(base)), model.training, compute_dtype(config)
    if not layers or not config.training.do_train:
        return fast
    expected = tried_norms(model, base, fast, 0, batch, dtype)
    least = 1e-6 * max(expected, default=0.0)
    for way in (fast._replace(skips_last=True), fast):
        found = tried_norms(model, base, way, layers, batch, dtype)
        if found and all(abs(a - b) <= 0.02 * abs(a) + least for a, b in zip(expected, found, strict=True)):
            break
    else:
        log.info("layers of %s are recomputed in torch's own way: they take more than one input", type(base).__name__)
        way = fast._replace(by_input=False)
    model.train(training)
    return way._replace(graphs=config.training.cuda_graphs and graphable(base, way, dtype))


def graphable(base: Any, fast: FastPath, dtype: torch.dtype) -> bool:
    """Whether layers launch the same on each batch of a shape, whatever they compute."""
    text = base.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // (getattr(text, "num_attention_heads", None) or 1)
    kernel = has_kernel(dtype, size, getattr(text, "attention_dropout", 0))  # row by row, the CPU must know lengths
    devices = {parameter.device for parameter in base.parameters()}
    on_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    able = fast.by_input and fast.attention == VARLEN_ATTENTION and on_gpu and kernel and not stacked_experts(base)
    if not able:
        name, kind = type(base).__name__, str(dtype).removeprefix("torch.")
        log.info("--cuda_graphs: without effect, for %s in %s on these devices layers are launched", name, kind)
    return able


def enable_fast_path(model: Any, base: Any, config: Config) -> FastPath:
    """Put the model's adapters on the fast path and find out what else of it the model takes."""
    if config.training.fused_lora and not config.quant.full_finetune:
        others = patch_lora_layers(model)
        if others:
            log.info("%d adapted layers stay with peft's own functions, first %s", len(others), others[0])
    fast = FastPath(offloads=config.training.offload_activations)
    if is_sharded(config):
        log.info("FSDP or DeepSpeed holds the weights: all layers are recomputed or none, and none is kept unpacked")
        return fast  # the rest is tried once they are spread
    if config.masked:
        batch = padded_batch(trial_windows(base)[0], [0, 1], 0, "right")
        batch = to_device(batch, base.get_input_embeddings().weight.device)
        return choose_recomputing(model, base, fast, batch, config)
    return choose_fast_path(model, base, config)


# ------------------------------------------------------------------------------------
# 11. Plan: what a run will take, and how its steps are cut to fit
#
# From the model's shapes alone, before a weight is read: GiB for each part, and tokens per second. On the model that is
# loaded, a try of one small step says what a token and a layer really take.
# ------------------------------------------------------------------------------------
class StepPlan(NamedTuple):
    """How a window goes through the model; changes when memory runs out."""

    rows: int | None  # of a micro-batch, as the flags say; None for as many as fit
    tokens: int  # of a micro-batch, at most
    recomputed: int  # layers, from the first on
    unpacked: int = 0  # layers whose weights are kept unpacked too, from the first on
    graphs: bool = False  # whether layers are CUDA graphs

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"{self.rows} rows and "
        tokens = f"{self.tokens} tokens" if self.tokens < NO_LIMIT else "any number of tokens"
        graphs = " in CUDA graphs" if self.graphs else ""
        return f"{rows}{tokens} at once, {self.recomputed} layers recomputed{graphs}, {self.unpacked} kept unpacked"


NO_LIMIT = 2**30  # tokens: more than any window has


class Gpu(NamedTuple):
    """What the plan needs to know of a GPU."""

    name: str
    gib: float
    tflops: float  # dense bf16 with float32 sums, by its data sheet
    number: int = 1  # of them
    across: int = 1  # over which a process's layers are spread


# By data sheet; memory as the driver reports it. The first of a size stands for it where only that is given.
GPUS = (
    Gpu("T4", 15, 65), Gpu("RTX 4080", 16, 97), Gpu("RTX 4090", 24, 165), Gpu("RTX 3090", 24, 71), Gpu("A10", 22, 125),
    Gpu("L4", 22, 121), Gpu("RTX 5090", 31, 209), Gpu("V100", 32, 125), Gpu("A100 40GB", 39, 312),
    Gpu("RTX A6000", 48, 155), Gpu("L40S", 44, 362), Gpu("RTX 6000 Ada", 48, 364), Gpu("A100", 79, 312),
    Gpu("H100", 79, 989), Gpu("H200", 140, 989), Gpu("B200", 178, 2250),
)  # fmt: skip
# Of the data sheet's TFLOP/s, what a step reaches in its products and in all it does: measured on an H200.
REACHED = 0.55
# Seconds in which Python launches a layer forward and backward, and once more: measured there, 8 to 9 ms in all.
LAUNCHING, LAUNCHING_AGAIN = 5e-3, 3e-3
CONTEXT = 0.6  # GiB that CUDA takes beside torch's allocator


def find_gpu(text: str | None) -> Gpu:
    """--plan_gpu, as 24GiB, 8x80GiB, H100 or 2xH100; else the GPU that is here."""
    if text is None:
        if not torch.cuda.is_available():
            raise ConfigError("--plan: there is no GPU here, name one with --plan_gpu, e.g. --plan_gpu 24GiB")
        here = torch.cuda.get_device_properties(0)
        known = next((gpu for gpu in reversed(GPUS) if re.search(rf"\b{gpu.name}\b", here.name)), None)
        gib = here.total_memory / GIB
        share = torch.cuda.get_per_process_memory_fraction() * gib + CONTEXT  # of torch's allocator alone
        return Gpu(here.name, min(gib, share), known.tflops if known else 0.0, torch.cuda.device_count())
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?(?:(\d+(?:\.\d+)?)(?:gib|gb|g)|(.*))", "".join(text.lower().split()))
    assert parts is not None
    number, size, name = int(parts[1] or 1), parts[2], parts[3]
    if size:
        like = min(GPUS, key=lambda gpu: abs(gpu.gib - float(size)))
        return Gpu(f"{float(size):g} GiB, as fast as {like.name}", float(size), like.tflops, number)
    for gpu in GPUS:
        if name == gpu.name.lower().replace(" ", ""):
            return gpu._replace(number=number)
    names = ", ".join(gpu.name for gpu in GPUS)
    raise ConfigError(
        f"--plan_gpu {text}: expected a size or a name, with a number before it for several: 24GiB, 8x80GiB, {names}"
    )


class MemoryModel(NamedTuple):
    """Bytes on one GPU, and work, of a model with these flags."""

    weights: int  # linear layers as they are held
    other: int  # embedding, head, norms
    adapters: int
    gradients: int
    optimizer: int
    paged: bool  # the optimizer's state lies in memory that may be moved out, beside torch's own
    fixed: int  # transients that do not grow with the tokens: a whole weight, a chunk of logits
    token: int  # transients of a token
    layer: int  # what a layer keeps of a token
    kept: int  # what a recomputed layer keeps of a token: its input; of those in the CPU's memory two are here
    layers: int
    unpacked: int  # a layer's weights in the compute dtype
    flops: float  # of a token, without recomputation
    repeated: float  # of a token, in all layers computed again
    all_or_none: bool = False  # whether an engine's hooks have all layers recomputed or none

    def activations(self, sizes: StepPlan) -> int:
        """Bytes of a token that wait for the backward pass; one recomputed layer is there as a whole."""
        whole = self.layers - sizes.recomputed + (sizes.recomputed > 0)
        return whole * self.layer + sizes.recomputed * self.kept

    def beside(self) -> int:
        """Bytes that are there whatever the micro-batch."""
        return self.weights + self.other + self.adapters + self.gradients + (0 if self.paged else self.optimizer)

    def seconds(self, sizes: StepPlan, tokens: int, gpu: Gpu) -> float:
        """A micro-batch's time: the GPU's, or where that is longer what launching its kernels takes."""
        work = self.flops + self.repeated * sizes.recomputed / max(1, self.layers)
        tflops = gpu.tflops or 100.0  # of a GPU that is not known: only for weighing one way against another
        # what does not grow with the tokens: unpacking each weight twice or three times, at 3 TB/s, as much as 220
        # tokens' products; and 70 kernels of 5 us a layer
        busy = (tokens + 220) * work / (tflops * 1e12 * REACHED) + self.layers * 70 * 5e-6
        launching = 0.0 if sizes.graphs else self.layers * LAUNCHING + sizes.recomputed * LAUNCHING_AGAIN
        return max(busy, launching)


def parameter_bytes(count: int, rows: int, config: Config) -> int:
    """Of a linear layer's weight with so many values, in its rows."""
    bits, plain = config.quant.bits, load_dtype(config).itemsize
    if bits == 4:  # a scale of float32 for 64 values, or of 8 bits with one of float32 for 256 of those
        return int(count * (0.5 + (1 / 64 + 4 / (64 * 256) if config.quant.double_quant else 4 / 64)))
    return count + 4 * rows if bits == 8 else count * plain


def _noted(kept: dict[str, int], ran: list[tuple[str, Any]], alike: str, run: Any, *args: Any) -> Any:
    """What a decoder layer calls instead of itself: of those alike the first one runs and notes what it keeps."""
    made = ran[-1][1] if ran else None
    if alike not in kept:
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.untyped_storage()), lambda x: x):
            made = run(*args)
        given = tree_leaves((args[1:], run.keywords))  # as the rotary embedding, which all layers share
        shared = {x.untyped_storage()._cdata for x in given if isinstance(x, torch.Tensor)}
        kept[alike] = sum({one._cdata: one.nbytes() for one in saved if one._cdata not in shared}.values())
    ran.append((alike, made))
    return made


def kept_by_layer(model: Any, base: Any, config: Config) -> int:
    """Bytes that a layer keeps of a token for its backward pass; 0 where it is not known what is a layer.

    Each tensor's memory is counted once, in forward passes of some tokens and of twice as many: the difference leaves
    out what does not grow, as weights that are cast. Tensors have shapes and no values. This uses up the model, and
    the `base` inside.
    """
    train, dtype, text = config.training, compute_dtype(config), base.config.get_text_config()
    here = torch.cuda.is_available() and not train.plan_gpu  # else liger-kernel is taken to be installed
    liger = train.liger and (not here or base.config.model_type in (liger_patches() or {}))
    if train.fused_lora and not config.quant.full_finetune:
        patch_lora_layers(model)
    for name, module in model.train().named_modules():
        kind, of_heads = type(module).__name__, leaf_name(name) in ("q_norm", "k_norm")
        if kind.endswith("LayerNorm"):  # under autocast it keeps its input in float32
            module.forward = lambda x: x.float().square()
        elif kind.endswith("RMSNorm") and liger and not (of_heads and module.weight.numel() >= text.hidden_size):
            module.forward = torch.square  # keeps its input as it is; norms over all heads (OLMo) have no such kernel
        elif "Attention" in kind or kind.endswith("Decoder"):
            # with dropout a CPU's attention keeps all scores; OPT would draw layers to leave out
            module.training = False
    base.get_input_embeddings().weight.requires_grad_(True)  # the first layer as all others
    kernel = VARLEN_ATTENTION if train.padding_free and base._supports_attention_backend else None
    length, found = min(256, (getattr(text, "max_position_embeddings", None) or 512) // 2), list[int]()
    autocast = torch.autocast("cpu", dtype, dtype != torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast, attention_implementation(base, kernel):
        model.to_empty(device="cpu")
        for rows in (1, 2):
            kept: dict[str, int] = {}
            ran: list[tuple[str, Any]] = []
            for layer in decoder_layers(base):
                alike = str([(name, parameter.shape) for name, parameter in layer.named_parameters()])
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(_noted, kept, ran, alike)
            shape = (1, rows * length) if kernel else (rows, length)
            ends = {"cu_seq_lens_q": torch.arange(shape[1] + 1), "max_length_q": 1} if kernel else {}
            base.base_model(input_ids=torch.zeros(shape, dtype=torch.long), **ends)
            found.append(sum(kept[alike] for alike, _ in ran))
    return (found[1] - found[0]) // length // int(text.num_hidden_layers)


def memory_from_config(config: Config, model_config: PretrainedConfig, exact: bool = True) -> MemoryModel:
    """The costs of the base model, from its shapes alone; `exact` in what a layer keeps, which takes 1 s at 7B."""
    train, full = config.training, config.quant.full_finetune
    model = meta_model(config, copy.deepcopy(model_config))
    text, plain = model.config.get_text_config(), load_dtype(config).itemsize
    text.use_cache = False
    width = min(compute_dtype(config).itemsize, plain)
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in linear_layers(model, config.masked)}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    every, held = sum(parameter.numel() for parameter in model.parameters()), sum(counts.values())
    head = model.get_output_embeddings()
    vocabulary = 0 if head is None else head.weight.shape[0]

    of_layer = {name: shape for name, shape in shapes.items() if layer_number(name) == 0}
    per_layer = sum(counts[name] for name in of_layer)
    last = max((counts[name] for name in of_layer if "down" in leaf_name(name)), default=0)  # recomputing skips it
    inner = max((max(shape) for shape in of_layer.values()), default=4 * hidden)
    # experts stacked in one tensor, which stay frozen and whole: the values that a token meets
    at_once = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 1
    experts = at_once * sum(weight.numel() // len(weight) for weight in stacked_experts(model).values())
    # a start that is computed from the base's weights would be computed from none
    fresh = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init_lora_weights="true"))
    with torch.device("meta"):
        trainable = make_trainable(model, fresh, None)
    trained = [parameter for parameter in trainable.parameters() if parameter.requires_grad]
    count, size = sum(parameter.numel() for parameter in trained), sum(parameter.nbytes for parameter in trained)
    layer = width * (sum(map(sum, of_layer.values())) + 2 * experts // (layers * hidden) + 4 * hidden)
    try:
        with reraise_as_user_error("not every model runs without values", ConfigError, RuntimeError, AssertionError):
            layer = (kept_by_layer(trainable, model, config) if exact else 0) or layer
    except ConfigError as error:
        log.info("plan: a layer is taken to keep all that its products take and give: %s", error)
    # torch's AdamW keeps its averages in the width of the weights, others in float32
    states = {"8bit": 2, "adafactor": 1, "sgd": 0, "lion": 4, "torch": 2 * size // count}
    return MemoryModel(
        weights=sum(parameter_bytes(counts[name], shape[0], config) for name, shape in shapes.items()),
        other=(every - held) * plain,
        adapters=0 if full else size,
        gradients=size,
        optimizer=count * next((each for name, each in states.items() if name in train.optim), 8),
        paged="paged" in train.optim,
        fixed=(max(counts.values(), default=0) * width if config.quant.bits < 16 else 0) + 2**27,
        token=width * (inner + 3 * hidden) + (0 if train.chunked_head else vocabulary * (width + 12)),
        layer=layer,
        kept=math.ceil(2 * width * hidden / layers) if train.offload_activations else width * hidden,
        layers=layers,
        unpacked=width * per_layer if config.quant.bits < 16 and train.fused_lora and not full else 0,
        flops=(6.0 if full else 4.0) * (held + experts) + 6.0 * (0 if full else count) + 4.0 * hidden * vocabulary,
        repeated=2.0 * layers * (per_layer - last) + 2.0 * experts,
        all_or_none=is_sharded(config),
    )


def requested_layers(flag: str, layers: int) -> int | None:
    """What --recompute_layers or --unpacked_layers says: a number of layers; None leaves it to the memory there is."""
    named = {"auto": None, "all": layers, "none": 0}
    return named[flag] if flag in named else min(int(flag), layers)


def requested_recompute(config: Config, layers: int) -> int | None:
    """How many layers the flags ask to recompute; None leaves it to the memory there is."""
    train = config.training
    return requested_layers(train.recompute_layers, layers) if train.gradient_checkpointing else 0


def search_step_plan(costs: MemoryModel, room: float, longest: int, window: int, gpu: Gpu, config: Config) -> StepPlan:
    """The fastest way to cut a window that fits into `room` bytes; where nothing does, the smallest.

    Args:
        room: bytes for activations and transients.
        longest: tokens of the longest row (or pack), which is not cut.
        window: tokens of the largest window.
    """
    train, wanted = config.training, requested_recompute(config, costs.layers)
    rows = train.per_device_train_batch_size if train.auto_batch is False else None
    at_least, most = (longest, window) if rows is None else (min(window, longest * rows),) * 2
    found: list[tuple[float, StepPlan]] = []
    numbers = range(0, costs.layers + 1, max(1, costs.layers) if costs.all_or_none else 1)
    for recomputed in numbers if wanted is None else [wanted]:
        sizes = StepPlan(rows, 0, recomputed)
        tokens = min(most, int((room - costs.fixed) / (costs.token + costs.activations(sizes))))
        if tokens >= at_least:
            batches = math.ceil(window / tokens)
            seconds = batches * costs.seconds(sizes, math.ceil(window / batches), gpu)
            found.append((seconds, sizes._replace(tokens=tokens)))
    if not found:
        return StepPlan(rows, longest, costs.layers if wanted is None else wanted)
    best = min(found, key=lambda pair: pair[0])[1]
    left = 0.9 * (room - costs.fixed) - best.tokens * (costs.token + costs.activations(best))
    return best._replace(unpacked=unpacked_layers(left, best, costs, config))


def unpacked_layers(left: float, sizes: StepPlan, costs: MemoryModel, config: Config) -> int:
    """How many layers' weights to keep unpacked in the bytes that are left; none where memory is short or asked for."""
    if not costs.unpacked:
        return 0
    asked = requested_layers(config.training.unpacked_layers, costs.layers)
    fitting = 0 if sizes.recomputed else max(0, min(costs.layers, int(left / costs.unpacked)))
    return fitting if asked is None else asked


class Plan(NamedTuple):
    """What a run is predicted to take on each GPU."""

    gpu: Gpu
    costs: MemoryModel
    sizes: StepPlan
    tokens: int  # of the largest micro-batch
    pages: int = 0  # bytes of a paged optimizer's state that stay on the GPU: all of it, or where memory is short none
    whole: bool = False  # whether a window is one micro-batch: its gradients come as its activations go

    def gib(self) -> dict[str, float]:
        """GiB by part, and their sum as torch's allocator counts it."""
        costs, activations = self.costs, self.costs.activations(self.sizes) * self.tokens
        beside = activations - costs.layer * self.tokens if self.whole else 0  # gone when the last gradient comes
        parts = {
            "weights of the linear layers": costs.weights,
            "weights kept unpacked": costs.unpacked * self.sizes.unpacked,
            "embedding, head, norms": costs.other,
            "adapters": costs.adapters,
            "gradients": max(0, costs.gradients - beside),
            "optimizer": 0 if costs.paged else costs.optimizer,
            "activations": activations,
            "transients and head": costs.fixed + costs.token * self.tokens,
        }
        return {name: size / GIB for name, size in parts.items()} | {"predicted peak": sum(parts.values()) / GIB}

    def needed(self) -> float:
        """GiB of everything, what lies beside torch's allocator too."""
        return self.gib()["predicted peak"] + CONTEXT + self.pages / GIB

    def fits(self) -> bool:
        return self.needed() <= self.gpu.gib

    def in_graphs(self, layers: int) -> "Plan":
        """All layers as CUDA graphs, if that is faster."""
        sizes = self.sizes._replace(recomputed=layers, graphs=True)
        launched, replayed = (self.costs.seconds(each, self.tokens, self.gpu) for each in (self.sizes, sizes))
        return self._replace(sizes=sizes) if replayed < launched else self

    def tokens_per_second(self) -> float:
        return self.gpu.number * self.tokens / self.costs.seconds(self.sizes, self.tokens, self.gpu)

    def lines(self) -> dict[str, str]:
        parts, beside = self.gib(), f"{self.needed() - self.gib()['predicted peak']:6.2f} GiB: CUDA"
        if self.costs.paged and self.costs.optimizer:
            beside += f"; the optimizer's pages {'stay' if self.pages else 'are moved out'}"
        fits = "fits" if self.fits() else f"does not fit into {self.gpu.gib:.0f} GiB"
        gpus, share = self.gpu.number * self.gpu.across, "; on each" if self.gpu.across > 1 else ""
        number, graphs = f"{gpus} x " if gpus > 1 else "", " in CUDA graphs" if self.sizes.graphs else ""
        return {
            "GPU": f"{number}{self.gpu.name}, {self.gpu.gib:.0f} GiB{share}",
            **{name: f"{size:6.2f} GiB" for name, size in parts.items()},
            "beside it": beside,
            "in all": f"{self.needed():6.2f} GiB: {fits}",
            "micro-batch": f"{self.tokens} tokens",
            "recomputed": f"{self.sizes.recomputed} of {self.costs.layers} layers{graphs}",
            "kept unpacked": f"{self.sizes.unpacked} of {self.costs.layers} layers",
            "tokens per second": f"{self.tokens_per_second():.0f}" if self.gpu.tflops else "not known for this GPU",
        }

    def metrics(self) -> dict[str, float]:
        """The prediction, for the table of what came."""
        peak, speed = self.gib()["predicted peak"], self.tokens_per_second()
        return {"plan_peak_memory_gib": round(peak, 3), "plan_tokens_per_second": round(speed, 1)}


def make_plan(
    costs: MemoryModel, gpu: Gpu, longest: int, window: int, config: Config, free: float | None = None
) -> Plan:
    """The plan for a GPU with nothing else on it, or for the bytes that are free beside what is there already.

    A paged optimizer's state stays on the GPU if that leaves room for a step, else its pages are moved out.
    """
    own = free if free is not None else (gpu.gib - CONTEXT) * 0.95 * GIB - costs.beside()
    for pages in (costs.optimizer, 0) if costs.paged else (0,):
        sizes = search_step_plan(costs, own - pages, longest, window, gpu, config)
        largest = window if sizes.rows is None else min(window, sizes.rows * longest)
        tokens = math.ceil(largest / math.ceil(largest / sizes.tokens))
        plan = Plan(gpu, costs, sizes, max(longest, tokens), pages, max(longest, tokens) >= window)
        if plan.fits():
            break
    return plan


LAUNCH = {  # how each way to use several GPUs is asked for
    "DDP": "torchrun --nproc_per_node {} qlora.py",
    "ZeRO-2": "with --deepspeed examples/deepspeed_zero2.json",
    "ZeRO-3": "with --deepspeed examples/deepspeed_zero3.json",
    "FSDP2": "the same with --fsdp",
    "one process": "python qlora.py",
}


def strategies(costs: MemoryModel, config: Config, number: int) -> dict[str, MemoryModel]:
    """What one of so many GPUs has of this model in each way that takes it, from the fastest: fewer weights travel."""
    names = ("weights", "other", "adapters", "gradients", "optimizer")
    shared = costs._replace(**{name: getattr(costs, name) // number for name in names})
    two_layers = 2 * (costs.weights // max(1, costs.layers))  # whole, while they compute and the next one arrives
    # DeepSpeed and FSDP step on a float32 copy of bf16 weights, with averages of that width
    copied = config.quant.full_finetune and load_dtype(config) != torch.float32
    state = (2 * (costs.optimizer + costs.gradients) if copied else costs.optimizer) // number
    shard = shared._replace(optimizer=state, paged=False, fixed=costs.fixed + two_layers, unpacked=0)
    shard = shard._replace(all_or_none=True)
    parts = {name: getattr(costs, name) // number for name in ("layer", "kept", "unpacked")}
    parts["token"] = costs.token + costs.layer - parts["layer"]  # the recomputed layer that is there is whole
    return {
        "DDP": costs._replace(gradients=2 * costs.gradients),  # and the buckets that they are sent in
        "ZeRO-2": shard._replace(weights=costs.weights, other=costs.other, adapters=costs.adapters, fixed=costs.fixed),
        "ZeRO-3": shard,
        "FSDP2": shard,
        "one process": shared._replace(**parts),
    }


STRATEGY_BITS = {"ZeRO-2": (16, 32), "ZeRO-3": (16, 32), "FSDP2": (4, 16, 32)}  # the others take any


def strategy_plans(config: Config, costs: MemoryModel) -> dict[str, Plan]:
    """The plan for each way to use several GPUs that takes these bits, from the fastest."""
    bits, ways = config.quant.bits, strategies(costs, config, find_gpu(config.training.plan_gpu).number)
    taken = {name: own for name, own in ways.items() if bits in STRATEGY_BITS.get(name, (bits,))}
    plans = {name: plan_from_flags(config, own, name == "DDP") for name, own in taken.items()}
    alone = plans["one process"]  # whose GPUs hold layers and wait for each other
    return plans | {"one process": alone._replace(gpu=alone.gpu._replace(number=1, across=alone.gpu.number))}


def strategy_lines(plans: Mapping[str, Plan]) -> dict[str, str]:
    """GiB of a GPU for each, and the first that fits."""
    lines = {
        name: f"{plan.needed():6.2f} GiB on each GPU{'' if plan.fits() else ': does not fit'}"
        + (f", {plan.tokens_per_second():.0f} tokens per second" if plan.fits() and plan.gpu.tflops else "")
        for name, plan in plans.items()
    }
    best = next((name for name, plan in plans.items() if plan.fits()), None)
    how = f"{best}: {LAUNCH[best].format(plans[best].gpu.number)}" if best else "none fits: more GPUs, or fewer bits"
    return lines | {"recommended": how}


def plan_from_flags(config: Config, costs: MemoryModel, graphs: bool = True) -> Plan:
    """The plan before any row or weight is read: every row as long as the limits allow.

    `graphs` says whether this way to use several GPUs takes CUDA graphs.
    """
    train, longest = config.training, length_limits(config).longest
    window = longest * train.per_device_train_batch_size * train.gradient_accumulation_steps
    plan = make_plan(costs, find_gpu(train.plan_gpu), longest, window, config)
    return plan.in_graphs(costs.layers) if train.cuda_graphs and graphs else plan


def calibrated(costs: MemoryModel, model: Any, base: Any, fast: FastPath, config: Config) -> MemoryModel:
    """The costs with what one small step, forward and backward, took of the GPU's memory."""
    count = min(512, getattr(base.config.get_text_config(), "max_position_embeddings", None) or 512)
    window = collate_step([{"input_ids": [1] * count, "labels": [1] * count}])["step"]
    batch = padding_free_batch(window, [0]) if fast.attention else padded_batch(window, [0], 0, "right")
    set_recomputed_layers(base, 0, fast)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        batch = to_device(batch, base.get_input_embeddings().weight.device)
        try_step(model, base, fast, batch, compute_dtype(config))
    except torch.OutOfMemoryError:
        log.info("plan: a try of %d tokens did not fit; its prediction stands", count)
        return costs
    finally:
        model.zero_grad(set_to_none=True)
    used = torch.cuda.max_memory_allocated() - before - costs.gradients - costs.fixed
    ratio = max(0.5, used / (count * (costs.token + costs.layers * costs.layer)))
    return costs._replace(token=int(costs.token * ratio), layer=int(costs.layer * ratio))


def free_memory(gpu: Any = None) -> float:
    """Bytes that torch may still hand out on this GPU, within this process's share of it."""
    (free, total), reserved = torch.cuda.mem_get_info(gpu), torch.cuda.memory_reserved(gpu)
    share = torch.cuda.get_per_process_memory_fraction(gpu) * total
    return min(free, share - reserved) + reserved - torch.cuda.memory_allocated(gpu)


def is_planned(rows: Any | None, config: Config) -> bool:
    """Whether a run's steps are cut to a GPU's memory."""
    train = config.training
    return train.do_train and rows is not None and torch.cuda.is_available() and not train.use_cpu


def choose_step_plan(
    costs: MemoryModel, model: Any, base: Any, fast: FastPath, rows: Any | None, config: Config
) -> tuple[StepPlan, Plan | None]:
    """Micro-batches and recomputed layers for the memory that is free, and the plan, to compare with what comes."""
    train, layers = config.training, len(decoder_layers(base)) or costs.layers
    if rows is None or not is_planned(rows, config):
        wanted = requested_recompute(config, layers)
        at_once = None if train.auto_batch else train.per_device_train_batch_size
        sizes = StepPlan(at_once, 4096 if train.auto_batch else NO_LIMIT, layers if wanted is None else wanted)
        return sizes._replace(unpacked=unpacked_layers(0, sizes, costs, config)), None
    lengths = sorted(rows["length"][:], reverse=True)
    window = sum(lengths[: train.per_device_train_batch_size * train.gradient_accumulation_steps])
    gpu = find_gpu(None)._replace(number=rank_and_world_size()[1])
    if is_sharded(config):  # nothing can be measured before, nor repeated after memory ran out
        way = "FSDP2" if is_fsdp(config) else "ZeRO-3" if hf_deepspeed.is_deepspeed_zero3_enabled() else "ZeRO-2"
        costs = strategies(costs, config, gpu.number)[way]
        plan = make_plan(costs, gpu, lengths[0], window, config, 0.85 * (gpu.gib - CONTEXT) * GIB - costs.beside())
        return plan.sizes, plan
    places = {parameter.device for parameter in base.parameters() if parameter.device.type == "cuda"}
    if len(places) > 1:  # of one process, whose GPUs wait for each other
        costs, gpu = strategies(costs, config, len(places))["one process"], gpu._replace(across=len(places))
    measured = calibrated(costs, model, base, fast, config)
    own = 0.95 * min(map(free_memory, places or [None])) - costs.gradients - (0 if costs.paged else costs.optimizer)
    plan = make_plan(measured, gpu, lengths[0], window, config, own)
    if fast.graphs:
        plan = plan.in_graphs(layers)
        if not plan.sizes.graphs:
            log.info("--cuda_graphs: without effect, micro-batches of %d tokens keep the GPU busy", plan.tokens)
    return plan.sizes, plan._replace(costs=costs)


# ------------------------------------------------------------------------------------
# 12. Checkpoints: whole or absent
#
# A checkpoint is written into a hidden folder, flushed to disk and renamed. Its checkpoint.json says whose it is
# and lists its files with size and hash; a folder that differs by a bit is passed over. `completed` comes last.
# ------------------------------------------------------------------------------------
MANIFEST = "checkpoint.json"
COMPLETED = "completed"
STREAM = "stream.json"  # in a checkpoint: the place in a stream
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
STAGING = ".saving-"  # prefix of the hidden folders that a checkpoint or final model is written into


class ResumePoint(NamedTuple):
    """Where a run begins."""

    train: bool
    checkpoint: Path | None = None  # resume from it
    weights: str | None = None  # an adapter, or for a full fine-tune a model, to begin from or to use
    found: Path | None = None  # what was found of an earlier run, and must belong to this one


def run_fingerprint(config: Config, data: TokenStatistics | None) -> dict[str, Any]:
    """What a checkpoint belongs to: it can't be continued with another."""
    names = ["model_name_or_path", "bits", "full_finetune", "objective"]
    names += ["quant_type", "double_quant"] if config.quant.bits == 4 else []
    names += ["streaming", "stream_buffer"] if config.data.streaming else ["streaming"]
    names += [] if config.quant.full_finetune else sorted(LORA_FLAGS)
    values = {name: config.flags[name] for name in names}
    base = Path(config.model.model_name_or_path).expanduser()
    values["model_name_or_path"] = str(base.resolve()) if base.exists() else config.model.model_name_or_path
    of_data = {"packing": config.data.packing, "dataset (the encoded training rows)": data.fingerprint} if data else {}
    return values | of_data


def effective_batch(checkpoint: Path | None, args: TrainingArguments) -> dict[str, Any]:
    """Rows of an optimizer step. A run that goes on with the same flags on more or fewer processes keeps it."""
    flags = [args.per_device_train_batch_size, args.gradient_accumulation_steps]
    here = {"rows": math.prod(flags) * args.world_size, "flags": flags}
    before = read_record(checkpoint).get("run", {}).get("effective batch", here) if checkpoint else here
    return before if before["flags"] == flags else here


def read_record(folder: Path) -> dict[str, Any]:
    """What a completed run or a checkpoint says of itself; nothing, if another program wrote it."""
    file = folder / (COMPLETED if (folder / COMPLETED).is_file() else MANIFEST)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def check_same_run(folder: Path, wanted: Mapping[str, Any], training: bool) -> None:
    """Refuse to go on with what belongs to another run, by a ConfigError that names what differs."""
    found = read_record(folder).get("run")
    if found is None:
        log.warning("%s does not say what it belongs to: model, bits and dataset are not compared", folder)
        return
    differing = [f"{name} was {found[name]}, is {new}" for name, new in wanted.items() if found.get(name, new) != new]
    if differing:
        raise ConfigError(
            f"{folder} belongs to another run: {'; '.join(differing)}. "
            "Give the same flags, another --output_dir, or --overwrite_output_dir to start anew"
            + (", or --do_train False to evaluate or predict with what was trained" if training else "")
        )


# Whose state of a run is in a checkpoint, by files that it leaves.
ENGINES = {"DeepSpeed": "global_step*", "FSDP": "pytorch_model_fsdp*", "one process or DDP": "optimizer.pt"}


def check_engine(checkpoint: Path, config: Config) -> None:
    """Refuse to go on with the state that another engine saved, or DeepSpeed on another number of processes."""
    deepspeed, fsdp, plain = ENGINES
    here = fsdp if is_fsdp(config) else deepspeed if is_sharded(config) else plain
    its = next((engine for engine, files in ENGINES.items() if any(checkpoint.glob(files))), plain)
    if its != here:
        raise ConfigError(f"{checkpoint} was saved under {its}, this run is under {here}: start it as it was")
    before, processes = len([*checkpoint.glob("global_step*/*optim_states.pt")]), config.training.world_size
    if its == deepspeed and before != processes:
        raise ConfigError(
            f"{checkpoint}: DeepSpeed goes on only with the {before} processes of before, not {processes}"
        )


def adapter_folder(folder: Path) -> Path | None:
    """Where a folder keeps its adapter: at its top or, as the original did, in adapter_model/."""
    for place in (folder, folder / "adapter_model"):
        if (place / "adapter_config.json").is_file() and any((place / name).is_file() for name in ADAPTER_FILES):
            return place
    return None


def weights_in(folder: Path, full_finetune: bool) -> str | None:
    """Where in a folder the trained adapter lies, or for a full fine-tune the trained model; None if it does not."""
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    place = (folder if whole else None) if full_finetune else adapter_folder(folder)
    return str(place) if place else None


def file_digests(folder: Path) -> dict[str, str]:
    """Every file in a folder but its list of them; hashed in parallel, for a full fine-tune holds 80 GB."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor() as pool:
        hashed = zip(files, pool.map(file_digest, files), strict=True)
        return {p.relative_to(folder).as_posix(): f"{p.stat().st_size} bytes, {found}" for p, found in hashed}


def checkpoint_problem(folder: Path) -> str | None:
    """The first thing that is not as it was written in a checkpoint, or None if it is whole."""
    try:
        if (folder / MANIFEST).is_file():
            manifest, found = read_json(folder / MANIFEST), file_digests(folder)
            if manifest.pop("seal", None) != digest(json.dumps(manifest)):
                return f"{MANIFEST} is not as it was written"
            changed = [item for item in manifest["files"].items() if found.get(item[0]) != item[1]]
            return next((f"{name}: {found.get(name, 'missing')}, instead of {was}" for name, was in changed), None)
        read_json(folder / "trainer_state.json")  # another program's, or the original's
        for file in folder.rglob("*.safetensors"):
            safe_open(file, "pt")
        torn = [f"{file.name} breaks off" for file in folder.glob("*.pt") if not zipfile.is_zipfile(file)]
        empty = not adapter_folder(folder) and not (folder / "config.json").is_file()
        return next(iter(torn), "no weights in it" if empty else None)
    except (*LIBRARY_ERRORS, QLoRAError) as error:  # type: ignore[misc]
        return shorten(error)


def checkpoint_step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest (by number) first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; a torn one is passed over with a warning."""
    for folder in checkpoints_in(output_dir):
        if not (problem := checkpoint_problem(folder)):
            return folder
        log.warning("%s is not whole (%s): passed over", folder, problem)
    return None


def needs_more_steps(config: Config, completed: Mapping[str, Any]) -> bool:
    """Whether a run wants more steps or epochs than a completed one had."""
    args = config.training
    wanted, had = (args.max_steps, "step") if args.max_steps > 0 else (args.num_train_epochs - 1e-6, "epoch")
    return wanted > completed.get(had, math.inf)


def find_resume_point(config: Config) -> ResumePoint:
    """Resume, begin anew, or use what is finished."""
    train, output, final = config.training, Path(config.training.output_dir), final_folder(config)
    given, full, picked = config.model.adapter_name_or_path, config.quant.full_finetune, train.resume_from_checkpoint
    if picked and str(picked).lower() != "true":
        last: Path | None = Path(picked)
        if problem := checkpoint_problem(Path(picked)):
            raise ConfigError(f"--resume_from_checkpoint {picked}: not a whole checkpoint: {problem}")
    else:
        last = None if train.overwrite_output_dir else find_last_checkpoint(output)
    completed = (output / COMPLETED).is_file()
    if not train.do_train:
        for place in () if given else (final if completed else None, last, final):  # the newest weights first
            if place and (weights := weights_in(place, full)):
                return ResumePoint(False, weights=weights, found=output if place == final else place)
        return ResumePoint(False, weights=given)
    if completed and not train.overwrite_output_dir and (finished := weights_in(final, full)):
        record = read_record(output)
        if not needs_more_steps(config, record):
            steps = record.get("step", "?")  # the original's is an empty file
            log.info("%s holds a completed run of %s steps: it is used, not trained again", output, steps)
            return ResumePoint(False, weights=finished, found=output)
        if last is None:
            way = f"begin another from its adapter with --adapter_name_or_path {final} and another --output_dir"
            raise ConfigError(f"{output} holds a completed run but no checkpoint to go on from; {way}")
    if last is None:
        return ResumePoint(True, weights=given)
    if not any(itertools.chain(last.glob("optimizer*"), last.glob("global_step*"))):
        log.warning("%s holds no optimizer state: the resumed run will differ from an uninterrupted one", last)
    log.info("resuming from %s", last)
    return ResumePoint(True, checkpoint=last, weights=given, found=last)


def fsync_path(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk; safetensors writes files for their owner's eyes alone."""
    if path.is_file():
        os.umask(mask := os.umask(0o077))
        path.chmod(0o666 & ~mask)
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
    fsync_path(aside)
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same of a value, as JSON."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def add_json(path: Path, values: Mapping[str, Any], **first: Any) -> None:
    """Add values to those that a JSON file holds already."""
    earlier = read_json(path) if path.is_file() else {}
    if not isinstance(earlier, dict):
        raise ConfigError(f"{path}: expected a JSON object; it is not this program's, move it away")
    write_json(path, {**first, **earlier, **values})


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """List a checkpoint's files and say whose they are."""
    manifest = {"run": run, "files": file_digests(folder)}
    write_json(folder / MANIFEST, manifest | {"seal": digest(json.dumps(manifest))})


def commit_checkpoint(staging: Path, final: Path) -> None:
    """Flush a written folder to disk and give it its name."""
    for path in [*staging.rglob("*"), staging]:
        fsync_path(path)
    if final.exists():  # a torn one of that name: it leaves at once, and goes with the hidden folder
        final.rename(staging.parent / "old")
    staging.rename(final)
    fsync_path(final.parent)


@contextlib.contextmanager
def atomic_save(aside: Path, what: Path) -> Iterator[None]:
    """A folder that is gone afterwards, whatever happens; a full disk, a quota or a lack of rights is one line.

    It shows as an OSError, as torch's RuntimeError, as safetensors' own error or as the plain Exception of tokenizers.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise
        raise QLoRAError(f"{what}: not saved: {shorten(error)}. What was saved before stays") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# What a run leaves in output_dir beside weights and checkpoints; --overwrite_output_dir removes them.
RUN_FILES = ("train_results.json", "eval_results.json", "predict_results.json", "all_results.json", "metrics.json",
             "predictions.jsonl", "trainer_state.json", "loss.png")  # fmt: skip
PREVIOUS = ".completed-before"  # the record of an earlier completed run, until this one is


def final_files(output: Path) -> list[str]:
    """The files of the final folder that the records of the last completed run name. No others are ever removed."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = output / (COMPLETED if (output / COMPLETED).is_file() else PREVIOUS)
        names = json.loads(record.read_text(encoding="utf-8"))["files"]
        return [name for name in names if isinstance(name, str) and Path(name).name == name]
    return []


def clear_output(config: Config, step: int) -> None:
    """Before training: set `completed` aside and, to start over, remove what the records of an earlier run name.

    Checkpoints beyond the step that a run begins at are incomplete, or of a branch that --resume_from_checkpoint left:
    they are renamed, or --save_total_limit would keep them rather than those to come.
    """
    output, anew = Path(config.training.output_dir), config.training.overwrite_output_dir
    names = final_files(output)
    if (output / COMPLETED).is_file():
        (output / COMPLETED).replace(output / PREVIOUS)
    if anew:
        for file in [final_folder(config) / name for name in names] + [
            output / name for name in (*RUN_FILES, PREVIOUS) if (output / "run.json").is_file()
        ]:
            file.unlink(missing_ok=True)
    for place in {output, final_folder(config)}:
        for folder in place.glob(f"{STAGING}*"):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in checkpoints_in(output):
        if anew and (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
        elif anew or checkpoint_step(folder) > step:
            folder.rename(output / f"left-{folder.name}-{time.time_ns()}")


# ------------------------------------------------------------------------------------
# 13. Processes
#
# What the ranks of one run say to each other.
# ------------------------------------------------------------------------------------
# Several processes speak through the CPU's network, beside the GPUs' own: nobody times out while rank 0 encodes, a step
# need not wait for the GPU to learn of a signal, and a process that ends is noticed at once.
#
# A machine without power or cable says nothing; the system would take 15 minutes to call the connection lost, now 30 s.
LIVELY = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


def hasten_losses() -> None:
    """Set LIVELY on every connection of this process, gloo's and the store's among them."""
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed since, or a socket of another kind
            if os.readlink(link).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as connection:
                    for name, value in LIVELY.items():
                        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
                        connection.setsockopt(level, getattr(socket, name), value)


@lru_cache(maxsize=1)
def _cpu_group() -> Any:
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))
    hasten_losses()
    return group


def all_reduce_int(value: int = 0, way: str = "MAX") -> int:
    """The largest of what the processes bring, or their SUM, once all are here."""
    if torch.distributed.is_initialized():
        found = torch.tensor(value)
        with reraise_as_user_error("another process is gone", PeerFailure, RuntimeError):
            torch.distributed.all_reduce(found, getattr(torch.distributed.ReduceOp, way), group=_cpu_group())
        value = int(found)
    return value


def shutdown_distributed() -> None:
    """Take the processes' connections down once all are done with them.

    Left to Python's end, a thread of gloo's may let go of the last tensor it sent when Python is no more, which aborts
    a process that did all its work (https://github.com/pytorch/pytorch/issues/190489). A group ends its threads when
    nothing holds it any longer. Ours, which speaks last, does so here; torch's own is held by some modules.
    """
    if torch.distributed.is_initialized():
        all_reduce_int()
        _cpu_group.cache_clear()
        torch.distributed.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """For what is made once on each machine: its first process goes first, the others find it made."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        all_reduce_int()
    yield
    if first:
        all_reduce_int()


def all_gather_object(value: Any) -> list[Any]:
    """What each process brings, by rank, once all are here."""
    every = [value] * rank_and_world_size()[1]
    if torch.distributed.is_initialized():
        with reraise_as_user_error("another process is gone", PeerFailure, RuntimeError):
            torch.distributed.all_gather_object(every, value, group=_cpu_group())
    return every


def check_ranks_agree(what: Mapping[str, Any]) -> None:
    """Refuse to go on where processes were started with different flags, or read different data."""
    mine = {name: json.dumps(value, default=str) for name, value in what.items()}
    every = all_gather_object((socket.gethostname(), mine))
    for rank, (host, its) in enumerate(every):
        differing = [
            f"{name} is {its[name]}, on rank 0 {value}" for name, value in every[0][1].items() if its[name] != value
        ]
        if differing:
            raise ConfigError(f"rank {rank} ({host}): {'; '.join(differing)}. Every process needs the same")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    here = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if here else (0, 1)


# How torch's collectives say that another process is there no more.
PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|timed out)|broken pipe|no route to host"
    r"|(network|host) is (down|unreachable)|remote process|nccl.*(abort|timeout|remote)",
    re.I,
)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that another process is gone."""
    met: set[int] = set()
    while error is not None and id(error) not in met:  # errors may name each other as their causes
        gone = (
            isinstance(error, RuntimeError)
            and rank_and_world_size()[1] > 1
            and PEER_GONE.search(str(error)) is not None
        )
        if gone or isinstance(error, PeerFailure):
            return True
        met.add(id(error))
        error = error.__cause__
    return False


def said_once(message: str, lost: bool, stopped: bool = False) -> str | None:
    """What this process prints of an error: the lowest rank of those that met it, once; None for the others.

    Each leaves its message where they all met; who leaves none was lost. Of that nobody speaks who has heard why, nor
    of a signal: torchrun sends one to all when the first has ended.
    """
    rank, processes = rank_and_world_size()
    if processes == 1:  # or not connected yet: each machine's first process speaks for it
        return message if os.environ.get("LOCAL_RANK", "0") == "0" else None
    first = rank == 0 and not lost  # waits only to be heard: where no launcher keeps the store, it goes with rank 0
    others = set(range(processes if lost or first else rank)) - {rank}
    until = time.monotonic() + (2 if first else 8)
    heard: dict[int, str] = {}
    met = False  # the store, to the end
    with contextlib.suppress(RuntimeError):  # whoever held the store is gone as well
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"qlora/{rank}", "" if lost else message)
        while (silent := others - heard.keys()) and time.monotonic() < until:
            heard |= {r: store.get(f"qlora/{r}").decode() for r in silent if store.check([f"qlora/{r}"])}
            time.sleep(0.1)
        met = True
    if not lost:
        why = stopped and any(text not in ("", message) for text in heard.values())
        if why or (rank and not met) or message in [text for r, text in heard.items() if r < rank]:
            time.sleep(1)  # torchrun ends all when the first has ended: after whoever speaks
            return None
        return f"rank {rank}: {message}" if rank else message
    if not met:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)
            return None
        return f"rank {rank} of {processes} lost {os.environ.get('MASTER_ADDR')}, where all of them met. {message}"
    gone = sorted(others - heard.keys())
    if any(heard.values()) or not gone or min(heard, default=rank) < rank:
        return None
    return f"rank {', '.join(map(str, gone))} of {processes} was lost. {message}"


# ------------------------------------------------------------------------------------
# 14. Evaluation: generated predictions, MMLU
#
# Each process takes some of the batches; results are gathered by the number of the row, so none is lost or doubled.
# ------------------------------------------------------------------------------------
class InferenceContext(NamedTuple):
    """What it takes to run a model outside the Trainer's loops."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    accelerator: Any
    batch_size: int
    limits: Limits
    fast: FastPath

    def padded(self, rows: Sequence[Sequence[int]], side: str = "right") -> dict[str, torch.Tensor]:
        """Rows of ids as the model takes them."""
        device = self.model.get_input_embeddings().weight.device
        return to_device(padded_prompts(rows, self.tokenizer.pad_token_id, side), device)

    def collect(self, count: int, results_of: Callable[[list[int]], Iterable[Any]], title: str) -> list[Any]:
        """What `results_of` says of each of so many rows, whose numbers it gets batch by batch."""
        results: dict[int, Any] = {}
        with generating(self.model), self.accelerator.autocast():
            quiet = not self.accelerator.is_main_process
            for numbers in tqdm(rank_batches(count, self.batch_size), title, disable=quiet):
                results |= zip(numbers, results_of(numbers), strict=True)
        return gather_results(results)


def rank_batches(count: int, size: int) -> list[list[int]]:
    """This process's row numbers, in batches as one process would cut them.

    Every process has as many, since an engine that shards the model needs all of them for each: the last may be one
    that another process has too.
    """
    rank, processes = rank_and_world_size()
    batches = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    return [batches[i % len(batches)] for i in range(rank, math.ceil(len(batches) / processes) * processes, processes)]


def gather_results(results: Mapping[int, Any]) -> list[Any]:
    """Every process's results by row number, each once and in order."""
    every = {number: result for part in all_gather_object(results) for number, result in part.items()}
    return [every[number] for number in sorted(every)]


def generation_config(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The values that the user gave, with BOS, EOS and pad ids filled in.

    The model's own generation_config only adds its further stop tokens: its sampling values are not the user's.
    """
    chosen, trainers = config.generation, config.training
    asked = {"num_beams": trainers.generation_num_beams, "max_length": trainers.generation_max_length}
    if "max_new_tokens" in config.explicitly_set or trainers.generation_max_length is None:
        asked |= {"max_new_tokens": chosen.max_new_tokens, "max_length": None}
    asked |= {name: value for name, value in vars(chosen).items() if name in config.explicitly_set}
    unused = () if chosen.do_sample else SAMPLING_FLAGS
    values = {name: value for name, value in asked.items() if value is not None and name not in unused}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = sorted({tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    with reraise_as_user_error("generation flags"):
        if trainers.generation_config is not None:
            values = GenerationConfig.from_pretrained(str(trainers.generation_config)).to_diff_dict() | values
        return GenerationConfig(**values | ids | {"use_cache": True})


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its own sampling defaults out of the way, for a while."""
    training, own = model.training, getattr(model, "generation_config", None)  # an encoder may have none
    model.eval()
    model.generation_config = GenerationConfig()  # generate() mixes its values into those it is given
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


def prompt_ids(batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[list[int]]:
    """Prompts, cut as in training; one that is empty begins with EOS, since something must stand there."""
    bos, sources = tokenizer.bos_token_id, [source for source, _ in prompts_and_completions(batch, tokenizer)]
    cut = [s[: limits.source] if limits.total is None else cut_left(s, limits.total, bos) for s in sources]
    return [[number for number, _ in source] or [tokenizer.eos_token_id] for source in cut]


def decoded_pair(segments: list[Segment], rendered: bool, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A row's input and output as text, the output without a template's special tokens."""
    last, own = last_supervised(segments), (str(tokenizer.bos_token or ""), str(tokenizer.eos_token), "")
    answer = segments[last]["text"]
    output = special_token_pattern(tokenizer).sub("", answer) if rendered else answer
    texts = {"input": "".join(segment["text"] for segment in segments[:last]), "output": output}
    table = str.maketrans(dict(zip(MARKS, own, strict=True)))
    return {name: text.translate(table) for name, text in texts.items()}


def generate_predictions(
    runtime: InferenceContext, generation: GenerationConfig, batch: Any
) -> Iterator[dict[str, str]]:
    """One dictionary for each row: its fields, `prediction`, `prediction_with_input`."""
    tokenizer = runtime.tokenizer
    prompts = prompt_ids(batch, tokenizer, runtime.limits)
    tensors = runtime.padded(prompts, "left")
    with reraise_as_user_error("generation flags"):
        output = runtime.model.generate(**tensors, generation_config=generation)
    width = tensors["input_ids"].shape[1]  # the prompt is taken off by its tokens, never by its text
    for i, (prompt, answer) in enumerate(zip(prompts, output[:, width:].tolist(), strict=True)):
        yield decoded_pair(batch["segments"][i], batch["rendered"][i], tokenizer) | {
            "prediction": str(tokenizer.decode(answer, skip_special_tokens=True)),
            "prediction_with_input": str(tokenizer.decode(prompt + answer, skip_special_tokens=True)),
        }


def fill_masks(runtime: InferenceContext, masking: Masking, batch: Any) -> Iterator[dict[str, Any]]:
    """One dictionary for each row: `input` with its masks, `output` as it was, `prediction`, what fills the `masks`.

    Filled are the masks that a row's text has. Where it has none, the places chosen for evaluation become masks.
    """
    tokenizer: Any = runtime.tokenizer
    masking, texts = masking._replace(replaced=1.0, random=0.0), last_texts(batch)
    plain = [encode_masked(text, tokenizer, runtime.limits) for text in texts]
    drawn = [
        ids if masking.mask_id in ids else masking.mask_eval_row(ids, labels)["input_ids"] for ids, labels, _ in plain
    ]
    logits = runtime.model(**runtime.padded(drawn)).logits
    for text, (_, truth, _), ids, scores in zip(texts, plain, drawn, logits, strict=True):
        places = [i for i, token in enumerate(ids) if token == masking.mask_id]
        chances, found = scores[places].float().softmax(-1).max(-1)
        filled = dict(zip(places, found.tolist(), strict=True))
        shown = [i for i, label in enumerate(truth) if label != IGNORE or i in filled]  # without [CLS] and [SEP]
        before = tokenizer.decode([ids[i] for i in shown])
        after = tokenizer.decode([filled.get(i, ids[i]) for i in shown])
        if " " not in text.strip():  # a protein: ESM's tokenizer puts a space between its letters
            before, after = before.replace(" ", ""), after.replace(" ", "")
        masks = []
        for (i, token), chance in zip(filled.items(), chances.tolist(), strict=True):
            best, right = (None if n == IGNORE else tokenizer.convert_ids_to_tokens(n) for n in (token, truth[i]))
            masks.append({"position": i, "token": best, "probability": round(chance, 4), "truth": right})
        yield {"input": before, "output": text, "prediction": after, "masks": masks}


class Question(NamedTuple):
    """A multiple-choice question."""

    subject: str
    prompt: str  # ends with "Answer:"
    answer: int  # 0 to 3 for A to D


LETTERS = "ABCD"


def load_questions(config: Config) -> list[Question]:
    """MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300) from the original's files, or from the hub."""
    mmlu, five_shot = config.mmlu, config.mmlu.mmlu_dataset != "mmlu-zs"
    name = f"{'five' if five_shot else 'zero'}_shot_mmlu_{'val' if mmlu.mmlu_split == 'eval' else 'test'}.json"
    here = Path(mmlu.mmlu_dir).is_dir()
    questions = list(questions_in_file(Path(mmlu.mmlu_dir, name)) if here else questions_of_hub(config, five_shot))
    if not questions:
        raise DataError(f"--mmlu_dir {mmlu.mmlu_dir}: no question in it")
    return questions[: mmlu.max_mmlu_samples]


def questions_in_file(path: Path) -> Iterator[Question]:
    """The original's format: one {subject, input, output} in a line, the output a letter."""
    for number, row in read_file(path):
        with reraise_as_user_error(f"{path}:{number}", DataError):  # a RowError is a ValueError
            row = check_row(row)
            letter = get_text(row, "output").strip()
            if letter not in tuple(LETTERS):
                raise RowError(f"field 'output' is {letter!r}, expected A, B, C or D")
            yield Question(get_text(row, "subject"), get_text(row, "input"), LETTERS.index(letter))


def questions_of_hub(config: Config, five_shot: bool) -> Iterator[Question]:
    """The same prompts built from `cais/mmlu`, whose `dev` rows are the worked examples."""
    splits, shots = load_from_hub(config, "cais/mmlu", name="all"), defaultdict[str, str](str)
    asked = "validation" if config.mmlu.mmlu_split == "eval" else "test"
    for part in ("dev", asked) if five_shot else (asked,):
        for _, row in splits[part]:
            subject, choices = row["subject"], map("{}. {}".format, LETTERS, row["choices"])
            text = "\n".join([row["question"], *choices, "Answer:"])
            if part == "dev":
                shots[subject] += f"{text} {LETTERS[row['answer']]}\n\n"
            else:
                topic = subject.replace("_", " ")  # with two spaces before it, as published
                head = f"The following are multiple choice questions (with answers) about  {topic}.\n\n"
                yield Question(subject, head + shots[subject] + text, row["answer"])


def answer_questions(runtime: InferenceContext, questions: list[Question], longest: int) -> list[tuple[bool, float]]:
    """Of each question: is it answered rightly, and the loss on the right letter and EOS.

    The letters' first tokens are compared in one pass. Where those are not four different ones, each letter is put
    after the prompt in turn, and what is compared is the probability of all its tokens.
    """
    letters = tokenize(list(LETTERS), runtime.tokenizer)
    alike = os.path.commonprefix(letters)  # noqa: RUF071  # with some tokenizers, a space
    answers = [[*ids[len(alike) :], runtime.tokenizer.eos_token_id] for ids in letters]
    firsts = [ids[0] for ids in answers]
    one_pass = len(set(firsts)) == len(LETTERS)
    rows: Any = {"segments": [prompt_completion(q.prompt, "") for q in questions], "rendered": [False] * len(questions)}
    prompts = [[*ids, *alike] for ids in prompt_ids(rows, runtime.tokenizer, Limits(longest, 0, total=longest))]
    asked = [(i, c) for i, q in enumerate(questions) for c in ([q.answer] if one_pass else range(len(LETTERS)))]
    batch = runtime.padded([prompts[i] + answers[c] for i, c in asked])
    # of all that a batch predicts, 8 GB of logits for 100 prompts of 400 tokens, only what is asked for
    counts, width = [len(answers[c]) for _, c in asked], batch["input_ids"].shape[1]
    starts = [row * width + len(prompts[i]) - 1 for row, (i, _) in enumerate(asked)]
    batch["positions"] = torch.cat([torch.arange(n) + start for n, start in zip(counts, starts, strict=True)])
    logits = supervised_logits(runtime.model, runtime.fast, batch).log_softmax(-1).cpu().split(counts)
    scores, losses = torch.zeros(len(questions), len(LETTERS)), [0.0] * len(questions)
    for (i, c), predicted in zip(asked, logits, strict=True):
        chosen = predicted[range(len(answers[c])), answers[c]]
        if c == questions[i].answer:
            losses[i] = -chosen.mean().item()
        if one_pass:
            scores[i] = predicted[0, firsts]
        else:
            scores[i, c] = chosen[:-1].sum()
    right = scores.argmax(-1).eq(torch.tensor([question.answer for question in questions])).tolist()
    return list(zip(right, losses, strict=True))


def mmlu_metrics(runtime: InferenceContext, questions: list[Question], split: str, longest: int) -> dict[str, float]:
    """Accuracy by subject, their unweighted mean, and the loss."""
    by_subject: dict[str, list[bool]] = {question.subject: [] for question in questions}
    questions = sorted(questions, key=lambda question: len(question.prompt))  # two thirds of a batch were padding
    answered = runtime.collect(
        len(questions), lambda numbers: answer_questions(runtime, [questions[i] for i in numbers], longest), "MMLU"
    )
    for question, (right, _) in zip(questions, answered, strict=True):
        by_subject[question.subject].append(right)
    accuracy = {f"mmlu_{split}_accuracy_{name}": sum(right) / len(right) for name, right in by_subject.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    loss = sum(loss for _, loss in answered) / len(answered)
    return {"mmlu_loss": loss, **accuracy, f"mmlu_{split}_accuracy": mean}


# ------------------------------------------------------------------------------------
# 15. Trainer: order of rows, loss, whole checkpoints, signals
#
# The Hugging Face Trainer with five things of ours: an order of rows that a resume finds again, the loss on labelled
# tokens only, checkpoints that are whole or absent, a stop on numbers that are not finite, MMLU beside the evaluation.
# To add a callback: one class, one line in build_callbacks.
# ------------------------------------------------------------------------------------
def max_positions(model: Any) -> int | None:
    """How many tokens the position embeddings of an encoder have room for; RoBERTa and ESM begin after the pad's."""
    for name, table in model.named_modules():
        if leaf_name(name) == "position_embeddings" and isinstance(table, torch.nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def check_rows_fit_model(model: Any, parts: Mapping[str, TokenStatistics]) -> None:
    """Rows against the model: an id outside an embedding would only show as a crash on the GPU."""
    rows = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    supervised = max_positions(model)
    for name, part in parts.items():
        if part.largest_id >= rows:
            found = f"the {name} rows hold token id {part.largest_id}, the model has {rows}"
            raise ConfigError(f"{found}: its tokenizer is another's")
        if supervised is not None and part.longest > supervised:
            found = f"the longest {name} row has {part.longest} tokens, the model has positions for {supervised}"
            raise ConfigError(f"{found}: lower the limit with --source_max_len {supervised}")
        if positions and part.longest > positions:
            found = f"the longest {name} row has {part.longest} tokens, the model was made for {positions}"
            log.warning("%s: lower the limits or give --rope_scaling", found)


class Place(TypedDict, total=False):
    """Where in a stream a step ends: what a resume goes on from."""

    rows: int  # consumed
    windows: int  # steps


@dataclass
class StreamedWindows(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream as this process's steps, each with the place behind it, which travels with the step."""

    stream: RowStream
    tokenizer: Any
    config: Config
    args: Any  # the Trainer's own
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    model: Any
    size: int  # rows of a step, however many processes share it
    place: Place = field(default_factory=lambda: Place())  # where to begin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        done, (rank, processes) = self.place.get("windows", 0), (self.args.process_index, self.args.world_size)
        yield from itertools.repeat({}, done)  # for the Trainer, which counts off the steps before a resume
        rows = encoded_stream(self.stream, self.tokenizer, self.config, self.place.get("rows", 0))
        known = self.model.get_input_embeddings().num_embeddings
        while group := list(itertools.islice(rows, self.size)):
            done += 1
            for _, row in group:
                if row["largest_id"] >= known:
                    found = f"{row['where']}: the row holds token id {row['largest_id']}, the model has {known}"
                    raise ConfigError(f"{found}: its tokenizer is another's")
            members = [row for _, row in group[rank::processes]]
            yield self.collate(members) | {"place": {"rows": group[-1][0], "windows": done}}


class DistributedWindowSampler(torch.utils.data.Sampler[list[int]]):
    """This process's rows of each window. A window has the same rows however many processes share it.

    Nothing is doubled: in the last window of an epoch a share is smaller, or empty. Rows are dealt out by length, back
    and forth, so that the processes have as many tokens as each other, and none waits for the rest.
    """

    def __init__(self, order: Any, size: int, lengths: list[int], drop_last: bool) -> None:
        self.windows = torch.utils.data.BatchSampler(order, size, drop_last)
        self.lengths, (self.rank, self.processes) = lengths, rank_and_world_size()

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        if isinstance(self.windows.sampler, EpochSampler):
            self.windows.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[list[int]]:
        for window in self.windows:
            if self.processes > 1:
                window.sort(key=lambda row: -self.lengths[row])
            turns = self.rank, 2 * self.processes - 1 - self.rank
            yield [row for place, row in enumerate(window) if place % (2 * self.processes) in turns]


# What asks a run to stop, and its exit status then. Batch systems send SIGUSR1 before the time is up: the same command
# will be started again, so it is no failure.
STOP_SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 0}
STOP_NUMBERS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]  # Windows has no SIGUSR1


class GracefulStop(TrainerCallback):
    """The signal that asked this run to stop, if one did: save and stop after the step in which it came."""

    signal = 0
    training = False  # a step can be finished and saved; at other times a signal ends the run at once
    broken_off = False  # it stopped before its last step

    def __init__(self) -> None:
        self.process = os.getpid()

    def note(self, number: int, frame: Any) -> None:
        """The handler. Only Ctrl-C counts twice: launchers and batch systems repeat the others."""
        if os.getpid() != self.process:  # one that maps a dataset, whose pool ends it so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.training or (self.signal and number == signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # for once more, where a library does not let go
            raise KeyboardInterrupt(number)
        elif not self.signal:
            self.signal = number
            with contextlib.suppress(RuntimeError):  # it came while a line was being written
                log.warning("%s: finishing the step, then saving", signal.Signals(number).name)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer for both, on every process if the signal reached one."""
        if all_reduce_int(self.signal):
            control.should_save = control.should_training_stop = True
            self.broken_off = state.global_step < state.max_steps


@contextlib.contextmanager
def handle_signals(stop: GracefulStop) -> Iterator[None]:
    """Signals go to `stop` for a while."""
    ours = threading.current_thread() is threading.main_thread()  # Python allows handlers there only
    saved = {number: signal.signal(number, stop.note) for number in STOP_NUMBERS if ours}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def init_worker(number: int) -> None:
    """A data loader's process leaves signals to the one that trains: terminals and torchrun send them to its group."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for stopping in {*STOP_NUMBERS} - {signal.SIGTERM}:  # with which a run that ends takes its workers along
        signal.signal(stopping, signal.SIG_IGN)


class PreparedModel(NamedTuple):
    """A model as it trains."""

    model: Any  # with adapters, or for a full fine-tune as it is
    fast: FastPath
    sizes: StepPlan
    plan: Plan | None


PATIENCE = 3  # steps in which something may look wrong before it is taken for wrong
SKIPS = 20  # steps in a row that fp16's scaler may skip: its scale, 65536 at first, is below 1 by then


def without_gradient(base: Any) -> set[str]:
    """Parameters that train and got nothing from the backward pass; those that text never passes through don't count.

    These are a tower for images beside the decoder and, in a full fine-tune, poolers and the like beside the layers.
    """
    text = base.get_decoder() if hasattr(base, "get_decoder") else base
    adapted = any(isinstance(module, LoraLayer) for module in text.modules())
    parts = [text] if adapted else decoder_layers(text) or [text]
    named = (item for part in parts for item in part.named_parameters())
    return {name for name, parameter in named if parameter.requires_grad and parameter.grad is None}


def build_callbacks(stop: GracefulStop) -> list[TrainerCallback]:
    """Every callback of a run."""
    return [stop]


class QLoRATrainer(Trainer):
    """The Trainer with our order of rows, checkpoints and checks."""

    def __init__(
        self, *, ready: PreparedModel, run: dict[str, Any], questions: list[Question] | None, config: Config,
        masking: Masking | None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(model=ready.model, **kwargs)
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin and not config.quant.full_finetune:
            plugin.mixed_precision_policy = None  # it would cast what is packed
        if plugin:  # BERT's own list has its embeddings, to which its head is tied
            names = sorted({type(layer).__name__ for layer in decoder_layers(ready.model)})
            given = plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or names
            if set(given) - {type(module).__name__ for module in ready.model.modules()}:
                classes = "transformer_layer_cls_to_wrap " + ", ".join(given)
                raise ConfigError(f"--fsdp_config: {classes}: not in the model, whose layers are {', '.join(names)}")
        self.run, self.questions, self.config, self.masking = run, questions, config, masking
        self.fast, self.sizes, self.plan = ready.fast, ready.sizes, ready.plan
        self.model_accepts_loss_kwargs = True  # our loss is divided by the labelled tokens of the window
        self.parameter_count = self.runtime().model.num_parameters(exclude_embeddings=True)
        self.window: StepBatch | None = None  # the last one
        self.parts: list[tuple[list[str], torch.Tensor]] = []  # rows and loss of the current step's micro-batches
        self.supervised = False
        self.unread: list[tuple[int, Any, Any, bool]] = []  # steps whose numbers nobody has looked at
        self.zeros = self.skips = 0  # the latest steps whose gradient is zero, or which fp16's scaler skipped
        self.idle: set[str] | None = None  # parameters that no step has given a gradient
        self.values: torch.Tensor | None = None  # sums of what is trained
        self.first = self.moved = 0  # the step before this process's first; the last that changed them, or need not
        self.began = 0.0  # when that step did
        self.place: Place | None = None  # in a stream, behind the current step
        self.tokens_seen = 0  # without padding, by this process
        self.seconds_aside = 0.0  # spent on evaluating and saving while training
        self.staging: Path | None = None
        self.judged: list[tuple[int, float, int, int]] = []  # the batches of an evaluation

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where the plan fits, a paged one does not ask for its pages: none of them is ever away.

        Asking is what takes the longest: 22 of 33 ms of a step's updates at 7B.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.plan is not None and self.plan.pages and self.plan.fits() and hasattr(optimizer, "prefetch_state"):
            optimizer.prefetch_state = _no_wait
        return optimizer

    def spread(self) -> None:
        """Share the model out without training: accelerate takes one for FSDP only beside an optimizer."""
        optimizer = torch.optim.SGD(self.model.parameters())  # type: ignore[union-attr]
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.model_wrapped = self.model
        torch.distributed.fsdp.register_fsdp_forward_method(self.model, "generate")

    def runtime(self) -> InferenceContext:
        """The model as the Trainer holds it, for loops of ours."""
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
        size, limits = self.args.per_device_eval_batch_size, length_limits(self.config)
        return InferenceContext(model, tokenizer, self.accelerator, size, limits, self.fast)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> Any:
        """Ours: the Trainer's grouped sampler draws from the global generator, and a resume in epoch 2 differs.

        Accelerate's share of each process would double rows where they don't come out even. A stream hands out whole
        windows, to each process its own.
        """
        rows, args = self.train_dataset, self.args
        if isinstance(rows, StreamedWindows):
            return torch.utils.data.DataLoader(rows, batch_size=None)
        lengths: list[int] = list(rows["length"])  # type: ignore[index, call-overload]
        size = self.run.get("effective batch", {}).get("rows", args.train_batch_size * args.world_size)
        return self._loader(
            rows, DistributedWindowSampler(build_sampler(lengths, size, args), size, lengths, args.dataloader_drop_last)
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This process's batches."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(rows, rank_batches(len(rows), self.args.per_device_eval_batch_size))

    def _loader(self, rows: Any, batches: Any) -> Any:
        args = self.args
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        options: dict[str, Any] = {name: getattr(args, f"dataloader_{name}") for name in names}
        loader = torch.utils.data.DataLoader(
            rows, batch_sampler=batches, collate_fn=self.data_collator, worker_init_fn=init_worker, **options
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0)  # of one process: the shares are dealt

    def masked(self, windows: Iterator[dict[str, Any]], masking: Masking) -> Iterator[dict[str, Any]]:
        """Windows with fresh masks, which follow from step and row alone: a resume draws them again."""
        for batch in windows:
            step, seed = batch["step"], ("train", self.args.seed, self.state.global_step)
            drawn = [masking.mask_tokens(ids, labels, *seed, ids.tolist()) for ids, labels in step.members()]
            ids, labels = (torch.cat(part) for part in zip(*drawn, strict=True))
            yield batch | {"step": dataclasses.replace(step, input_ids=ids, labels=labels)}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one optimizer step; notes their rows and counts their tokens."""
        source = self.masked(epoch_iterator, self.masking) if self.masking else epoch_iterator
        batches, supervised = list(itertools.islice(source, num_batches)), 0
        for batch in batches:  # one, or at an epoch's end none
            self.place = batch.pop("place", None)
            supervised = batch["step"].supervised
            self.tokens_seen += len(batch["step"].input_ids)
        if self.window is None:
            self.first = self.moved = self.state.global_step
            self.began = time.perf_counter()
        # added up by the CPUs: a GPU would be waited for until it is done with all that it has still to do, and
        # no step be launched meanwhile
        everywhere = all_reduce_int(supervised, "SUM") if batches else 0
        self.supervised = (
            everywhere > 0
        )  # for every process alike, since what they check of a step decides about its save
        counted = everywhere if self.args.average_tokens_across_devices else supervised
        return batches, torch.tensor(max(1, counted))  # 0 where no token happens to be masked

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a window, in as many micro-batches as memory asks for.

        Where memory runs out, the same window is repeated in smaller ones, from the same random numbers.
        """
        window = inputs["step"]
        self._try_fast_path(model)
        start = all_random_states()
        inner: Any = self.model
        if not inner.training:  # DeepSpeed's wrapper does not know; setting it walks all modules: 5 ms at 7B
            model.train()
        while True:
            Graphed.begin()
            try:
                parts = self._window_step(model, window, num_items_in_batch)
                break
            except torch.OutOfMemoryError as error:
                if is_sharded(self.config):  # others wait for this process in the middle of a layer
                    raise
                reason = error.with_traceback(None)  # whose frames hold all that the failed pass has made
            model.zero_grad(set_to_none=True)
            Recompute.away.clear()
            FusedGroup.forget()
            self._make_room(window, reason)
            set_all_random_states(start)
        self.window, self.parts = window, parts
        if self.idle != set() and not is_sharded(self.config):
            idle = set.intersection(*all_gather_object(without_gradient(self.runtime().model)))
            self.idle = idle if self.idle is None else self.idle & idle
        if self.args.world_size > 1 and not is_sharded(self.config):
            average_gradients(model)
        return torch.stack([loss for _, loss in parts]).sum()

    def _try_fast_path(self, model: Any) -> None:
        """Once an engine has spread the weights; every process takes part."""
        if self.fast.spread or self.config.masked or not is_sharded(self.config):
            return
        inside = self.runtime().model
        base = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
        self.fast = choose_fast_path(model, base, self.config, self.args.device)
        log.info("Fast path\n%s", format_table(self.fast.lines()))
        if self.config.training.chunked_head and self.fast.head is None:  # micro-batches were cut for that
            self.sizes = self.sizes._replace(rows=self.config.training.per_device_train_batch_size)

    def _window_step(self, model: Any, window: StepBatch, items: Any) -> list[tuple[list[str], torch.Tensor]]:
        done, parts = [], self._parts(window)
        sharded = is_sharded(self.config)
        with attention_implementation(self.model, self.fast.attention):
            for i, members in enumerate(parts):
                last = i == len(parts) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step by it
                with contextlib.nullcontext() if sharded and last else self.accelerator.no_sync(model):
                    batch = to_device(self._batch(window, members), self.args.device)
                    with self.compute_loss_context_manager():
                        part = self.compute_loss(model, batch, num_items_in_batch=items)
                    self.accelerator.backward(part)
                    done.append(([window.where[i] for i in members], part.detach().to(self.args.device)))
        return done

    def _parts(self, window: StepBatch) -> list[list[int]]:
        rows = self.sizes.rows if torch.is_grad_enabled() else None  # those of --per_device_eval_batch_size
        parts = micro_batches(window, rows, self.sizes.tokens, padded=self.fast.attention is None)
        # each gathers the weights that are spread over the processes, which so need as many of them as each other
        return parts + [[]] * (all_reduce_int(len(parts)) - len(parts)) if is_sharded(self.config) else parts

    def _batch(self, window: StepBatch, members: list[int]) -> dict[str, Any]:
        if not members:
            window, members = collate_step([])["step"], [0]
        if self.fast.attention is not None:
            return padding_free_batch(window, members)
        tokenizer: Any = self.processing_class
        return padded_batch(window, members, tokenizer.pad_token_id, self.config.model.padding_side)

    def _make_room(self, window: StepBatch, reason: torch.OutOfMemoryError) -> None:
        """No CUDA graphs, no unpacked weights, smaller micro-batches; where those are small, more recomputed layers."""
        base, sizes = self.runtime().model, self.sizes
        largest = max(self._parts(window), key=lambda part: int(window.lengths[part].sum()))
        tokens = int(window.lengths[largest].sum())
        layers = len(decoder_layers(base))
        if sizes.graphs:  # they keep memory of their own
            self.sizes = sizes._replace(graphs=False)
            set_recomputed_layers(base, sizes.recomputed, self.fast)
        elif sizes.unpacked:
            self.sizes = sizes._replace(unpacked=0)
            set_unpacked_layers(base, 0, compute_dtype(self.config))
        elif len(largest) > 1 and (tokens > 4096 or sizes.recomputed >= layers):
            self.sizes = sizes._replace(tokens=tokens // 2)
        elif sizes.recomputed < layers:
            self.sizes = sizes._replace(recomputed=min(layers, sizes.recomputed + max(1, layers // 4)))
            set_recomputed_layers(base, self.sizes.recomputed, self.fast)
        else:
            raise reason
        torch.cuda.empty_cache()
        log.warning(
            "step %d: GPU memory ran out with %d tokens at once, %d of %d layers recomputed and %d kept unpacked; "
            "repeating it with %s", self.state.global_step + 1, tokens, sizes.recomputed, layers, sizes.unpacked,
            self.sizes,
        )  # fmt: skip

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labelled tokens of the whole window, scaled for the average that DDP takes."""
        total = summed_loss(model, self.fast, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            return total / max(1, len(inputs["targets"]))
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * (scale / num_items_in_batch)

    def compute_loss_context_manager(self) -> Any:
        """Autocast for adapters under FSDP, which casts weights instead."""
        dtype = compute_dtype(self.config)
        ours = is_fsdp(self.config) and not self.config.quant.full_finetune and dtype != torch.float32
        return torch.autocast(self.args.device.type, dtype) if ours else super().compute_loss_context_manager()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Rows, mean loss, and of masked tokens how many are found; kept here: the Trainer gathers nothing uneven."""
        self._try_fast_path(model)
        window, total, right = inputs["step"], torch.zeros((), device=self.args.device), 0
        smoothing, count = self.args.label_smoothing_factor, max(1, window.supervised)
        with torch.no_grad(), attention_implementation(self.model, self.fast.attention):
            for members in self._parts(window):
                batch = to_device(self._batch(window, members), self.args.device)
                with self.compute_loss_context_manager():
                    if self.masking:
                        logits = supervised_logits(model, self.fast, batch)
                        right += int((logits.argmax(-1) == batch["targets"]).sum())
                        total += F.cross_entropy(logits, batch["targets"], reduction="sum", label_smoothing=smoothing)
                    else:
                        total += summed_loss(model, self.fast, batch, smoothing).to(total.device)
        self.judged.append((len(window.rows), float(total) / count, right, count))
        return None, None, None

    def floating_point_ops(self, inputs: Any) -> int:
        """Six for each parameter and token, as the Trainer counts."""
        return 6 * len(inputs["step"].input_ids) * self.parameter_count

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        """After a step: did it go wrong? Its numbers are read before anything is logged or saved, else one step later.

        Reading them at once would leave the GPU idle until the next step is launched.
        """
        control, step = self.control, self.state.global_step
        saving = control.should_save or control.should_evaluate or control.should_training_stop
        if self.parts:  # not the second call, at an epoch's end
            if step == self.first + 1:
                compiled = ", kernels are compiled" if self.args.device.type == "cuda" else ""
                log.info("first step: %.1f s%s", time.perf_counter() - self.began, compiled)
            rows, losses = zip(*self.parts, strict=True)
            self.unread.append(
                (step, copy_to_cpu_async(1.0 if grad_norm is None else grad_norm, *losses), rows, self.supervised)
            )
            self._check_at_once(step, kwargs.get("learning_rate") or 0, saving)
            self.parts = []
        while len(self.unread) > (0 if saving or control.should_log or control.should_epoch_stop else 1):
            self._check_numbers(*self.unread.pop(0))
        if (saving or control.should_log) and not is_sharded(self.config):
            self._check_values(step)
        if saving and self.window is not None:
            self._check_update(model, self.window)
        control.should_save = control.should_save and not self.zeros
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    def _check_at_once(self, step: int, rate: float, saving: bool) -> None:
        """What is known of a step without waiting for the GPU."""
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        self.skips = self.skips + 1 if skipped else 0
        if self.skips >= SKIPS:
            self._stop(step, f"fp16 overflowed in {self.skips} steps, one after the other", "train with --bf16")
        if skipped or not self.supervised or not rate >= self.args.learning_rate / 10 > 0:
            self.moved = step  # nothing need have changed: warm-up, a schedule's end, --learning_rate 0
        if self.idle and (saving or step - self.first >= PATIENCE):
            why = "the model does not use it, leave it out with --lora_modules or --layers_to_freeze"
            self._stop(step, f"no gradient reaches {min(self.idle)} ({len(self.idle)} such tensors)", why)

    def _check_numbers(self, step: int, numbers: Any, rows: Sequence[list[str]], supervised: bool) -> None:
        """Gradient norm and losses of a step."""
        values, arrived = numbers
        if arrived is not None:
            arrived.synchronize()
        norm, *losses = map(float, values)
        model: Any = self.model
        bad = [part for part, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
        broke = self.accelerator.scaler is None and not math.isfinite(norm)  # a scaler skips those by itself
        self.zeros = (self.zeros + supervised) * (norm == 0)
        if broke or self.zeros >= PATIENCE:  # for all processes alike, whose message is then the same
            rows, bad = (list(itertools.chain(*parts)) for parts in zip(*all_gather_object((rows, bad)), strict=True))
        if bad or broke:
            frozen = ((n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad)
            broken = next((name for name, parameter in frozen if not parameter.isfinite().all()), None)
            why = (
                f"the base's {broken} is not finite, its files are damaged" if broken
                else "fp16 ends at 65504, train with --bf16" if self.args.fp16
                else "the step's other rows are fine, look at these" if 0 < len(bad) < len(rows)
                else f"lower --learning_rate {self.args.learning_rate:g}, or look at these rows"
            )  # fmt: skip
            self._stop(step, f"the {'loss' if bad else 'gradient norm'} is not finite", why, bad or rows)
        if self.zeros >= PATIENCE:
            why = "A and B are zero, and so is each one's gradient: begin with another adapter"
            if any(parameter.any() for parameter in model.parameters() if parameter.requires_grad):
                why = "the loss does not depend on what trains, or is zero: look at --lora_modules and at these rows"
            self._stop(step, f"the gradient norm is exactly zero, {self.zeros} times", why, rows)

    def _check_values(self, step: int) -> None:
        """Does what is trained still change? The sum of a tensor's bits, as whole numbers, does with any value."""
        if self.values is not None and step - self.moved < PATIENCE:
            return
        model: Any = self.model
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        trained = (p.detach().view(whole[p.element_size()]) for p in model.parameters() if p.requires_grad)
        values = torch.stack([bits.sum().to(self.args.device) for bits in trained])
        if self.values is not None and torch.equal(values, self.values):
            why = f"--learning_rate {self.args.learning_rate:g} is lost in rounding to {self.config.lora.lora_dtype}"
            self._stop(step, f"no trained value has changed in {step - self.moved} steps", why)
        self.values, self.moved = values, step

    def _check_update(self, model: Any, window: StepBatch) -> None:
        """Before weights are saved: with them, is the loss of the rows that they were just trained on finite?"""
        batch = to_device(self._batch(window, self._parts(window)[0]), self.args.device)
        model.eval()  # draws no random numbers; training_step turns it back
        kernel = attention_implementation(self.model, self.fast.attention)
        with torch.no_grad(), kernel, self.compute_loss_context_manager():
            finite = bool(summed_loss(model, self.fast, batch).isfinite())
        if not finite:
            why = f"lower --learning_rate {self.args.learning_rate:g}"
            what = "its update leaves weights with which the loss is not finite"
            self._stop(self.state.global_step, what, why, [window.where])

    def _stop(self, step: int, what: str, why: str, rows: Sequence[Sequence[str]] = ()) -> NoReturn:
        """End the run, before anything of the step is saved; of several processes each says the same, if it can."""
        own = self.window.where if self.window and self.args.world_size == 1 else []
        named = [row for part in rows for row in part if row] or own
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        of = f", on rows {', '.join(named[:8])}{more}" if named else ""
        kept = checkpoints_in(Path(self.config.training.output_dir))
        stays = f"{kept[0]} stays, a rerun goes on from it" if kept else "no checkpoint was saved"
        raise QLoRAError(f"step {step}: {what}{of}: {why}. {stays}")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with perplexity and, where asked for, MMLU beside the loss."""
        began, self.judged = time.perf_counter(), []
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        numbers = [batch[0] for batch in rank_batches(output.num_samples or 0, self.args.per_device_eval_batch_size)]
        rows, losses, right, masked = zip(*gather_results(dict(zip(numbers, self.judged, strict=True))), strict=True)
        loss = sum(map(operator.mul, rows, losses)) / sum(rows)  # the mean over rows of their batches' means
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        found |= {"masked_accuracy": sum(right) / sum(masked)} if self.masking else {}
        output.metrics.update({f"{kwargs['metric_key_prefix']}_{name}": value for name, value in found.items()})
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
        final = output / f"checkpoint-{self.state.global_step}"
        self.staging = output / f"{STAGING}{self.state.global_step}"
        folder = self.staging / final.name
        with atomic_save(self.staging, final):
            super()._save_checkpoint(model, trial)
            self.staging = None
            best = output / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best.is_dir() or best == final):
                self.state.best_model_checkpoint = str(best)  # the Trainer looked in the hidden folder
                self.state.save_to_json(str(folder / "trainer_state.json"))
            all_reduce_int()
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with tokens in it
                if self.place:
                    write_json(folder / STREAM, self.place)
                write_manifest(folder, self.run)
                commit_checkpoint(folder, final)
                limit = self.args.save_total_limit or sys.maxsize
                for old in checkpoints_in(output)[max(limit, 1) :]:
                    if str(old) != self.state.best_model_checkpoint:
                        shutil.rmtree(old)
            all_reduce_int()
        self.seconds_aside += time.perf_counter() - began

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: save_final pushes. The Trainer would upload all of output_dir, and its arguments with the token."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Into the one adapter there is, in its dtype; the Trainer's own way may add a second, and makes it float32."""
        place = adapter_folder(Path(resume_from_checkpoint))
        if place is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with reraise_as_user_error(f"{place} does not fit the LoRA flags", ConfigError, RuntimeError):
            set_peft_model_state_dict(self.model, load_peft_weights(str(place), device="cpu"))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """The Trainer's; of the step on nothing, which makes room for what FSDP loads, fp16's scaler must not know."""
        optimizer: Any = self.optimizer
        scaler, optimizer.scaler = getattr(optimizer, "scaler", None), None
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            optimizer.scaler = scaler

    def _load_best_model(self) -> None:
        """The same way; an engine's by its own."""
        model: Any = self.model
        for module in model.modules() if self.is_fsdp_enabled else ():
            if hasattr(module, "reshard"):  # what an evaluation has left whole would not be loaded
                module.reshard()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def load_end(self, checkpoint: str) -> None:
        """What was trained up to the last step, where all is saved but the final weights."""
        best, by_engine = self.state.best_model_checkpoint, self.is_fsdp_enabled or self.is_deepspeed_enabled
        if by_engine:  # loads into what it has spread
            self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), checkpoint)
        if self.args.load_best_model_at_end and best and Path(best).is_dir():
            self._load_best_model()
        elif not by_engine:
            self._load_from_checkpoint(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """MMLU's numbers too, under the prefix that the Trainer asks for."""
        return super()._determine_best_metric(
            metrics | {f"eval_{name}": value for name, value in metrics.items()}, trial
        )


def trainer_arguments(args: TrainingArguments) -> TrainingArguments:
    """The Trainer's own arguments: it hands out whole windows, which training_step cuts up; we recompute ourselves."""
    changed: dict[str, Any] = {name: False for name in CHECKPOINTING if hasattr(args, name)}
    # it reads the loss, and so waits for the GPU; our own check stops at both
    changed["logging_nan_inf_filter"] = False
    if args.ddp_find_unused_parameters is None:  # the Trainer's True stops at layers that are recomputed as ours are
        changed["ddp_find_unused_parameters"] = False
    changed["ddp_broadcast_buffers"] = False  # a first forward pass repeated for memory would wait for the others
    changed["per_device_train_batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    changed["gradient_accumulation_steps"] = 1
    if args.deepspeed:  # a batch that its file fixes is that of the flags, which check_config compared
        batch = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        changed["deepspeed"] = args.hf_deepspeed_config.config | dict.fromkeys(batch, "auto")
    return dataclasses.replace(args, **changed)


def average_gradients(model: Any) -> None:
    """Over the processes, once a step: in a backward pass they would wait for one whose memory ran out."""
    kinds: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds[parameter.dtype].append(parameter.grad)
    for gradients in kinds.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message; the activations have made room
        torch.distributed.all_reduce(flat)
        parts = flat.div_(rank_and_world_size()[1]).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(old) for part, old in zip(parts, gradients, strict=True)])


def apply_step_plan(base: Any, fast: FastPath, sizes: StepPlan, dtype: torch.dtype, sharded: bool = False) -> None:
    """Recompute layers as decided; a model without layers of transformers' own kind recomputes all or none."""
    set_unpacked_layers(base, sizes.unpacked, dtype)
    if decoder_layers(base) and not sharded:  # whose hooks know torch's own checkpoints
        set_recomputed_layers(base, sizes.recomputed, fast, sizes.graphs)
    elif sizes.recomputed and getattr(base, "supports_gradient_checkpointing", True):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    elif sizes.recomputed:
        log.warning("gradient_checkpointing: %s does not support it, nothing is recomputed", type(base).__name__)


def copy_to_cpu_async(*numbers: Any) -> tuple[list[Any], Any]:
    """Numbers on their way from the GPU, and what says that they are there. Nobody waits for what is launched later."""
    there = [n.detach().to("cpu", non_blocking=True) if isinstance(n, torch.Tensor) else n or 0.0 for n in numbers]
    device = next((n.device for n in numbers if isinstance(n, torch.Tensor) and n.is_cuda), None)
    return there, torch.cuda.current_stream(device).record_event() if device else None


def _no_wait(tensor: torch.Tensor) -> None:
    """In place of bitsandbytes' wait for the GPU."""


def build_trainer(
    ready: PreparedModel,
    tokenizer: Any,
    splits: Splits,
    questions: Any,
    run: dict[str, Any],
    stop: GracefulStop,
    config: Config,
) -> QLoRATrainer:
    """Everything that training and evaluation need."""
    # It waits for the GPU after the update of every single parameter: 448 times a step at 7B, a tenth of the step. The
    # updates are in one stream, which keeps their order.
    bitsandbytes.optim.optimizer.sync_gpu = _no_wait  # type: ignore[assignment]
    train_rows, eval_rows = splits.train, splits.eval and splits.eval.remove_columns("where")
    masking, args = None, trainer_arguments(config.training)
    collate = partial(collate_step, masked=config.masked)
    if config.masked:
        masking = build_masking(tokenizer, ready.model.get_input_embeddings().num_embeddings, config.data)
    if masking and eval_rows is not None:  # masked here, once
        name = digest(CODE_VERSION, eval_rows._fingerprint, *masking[:-1], masking.words.tolist())
        options = {"input_columns": ["input_ids", "labels"], "desc": "Masking eval rows", "new_fingerprint": name}
        eval_rows = eval_rows.map(masking.mask_eval_row, **options)
    if isinstance(train_rows, RowStream):
        size = run["effective batch"]["rows"]
        train_rows = StreamedWindows(train_rows, tokenizer, config, args, collate, ready.model, size)
    return QLoRATrainer(
        ready=ready, run=run, questions=questions, config=config, masking=masking, args=args, data_collator=collate,
        train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer, callbacks=build_callbacks(stop),
    )  # fmt: skip


# ------------------------------------------------------------------------------------
# 16. Stages: train, evaluate, predict, and the files that a run leaves
#
# Each stage takes the trainer, writes its files and returns its metrics.
# ------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """What a run has read before any weight."""

    config: Config  # with the objective settled
    folder: str  # of the model
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    pairs: Splits  # rows as text
    splits: Splits  # encoded
    rows: Any  # to train on, packed if the flags say so
    statistics: dict[str, TokenStatistics]


def peak_memory_gib() -> float:
    """Peak memory of this process: of the fullest of its GPUs, or of the process itself where it has none."""
    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / GIB
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    return math.nan  # on Windows


def save_metrics(trainer: QLoRATrainer, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Log and save them, as the Trainer does, but each file whole: the next run reads all_results.json."""
    trainer.log_metrics(split, metrics)
    if trainer.args.should_save:
        output = Path(trainer.config.training.output_dir)
        write_json(output / f"{split}_results.json", metrics)
        add_json(output / "all_results.json", metrics)
    return metrics


def train(trainer: QLoRATrainer, start: ResumePoint, stop: GracefulStop, config: Config) -> dict[str, Any]:
    """Train, save what was trained, mark the run completed. After a signal only the checkpoint is there."""
    last, stop.training = start.checkpoint, True
    state = TrainerState.load_from_json(str(last / "trainer_state.json")) if last else TrainerState()
    metrics: dict[str, Any] = {}
    if trainer.args.should_save:
        clear_output(config, state.global_step)
    if last and not needs_more_steps(config, {"step": state.global_step, "epoch": state.epoch}):
        log.info("%s holds the last step: nothing is left to train", last)  # the Trainer would do one more
        trainer.state = state
        trainer.load_end(str(last))
    else:
        if last and config.data.streaming:
            with reraise_as_user_error(f"{last}: no place in a stream to go on from"):
                trainer.train_dataset.place = Place(**read_json(last / STREAM))  # type: ignore[union-attr]
        metrics = timed_training(trainer, last, state.global_step)
    if not stop.broken_off:
        if metrics:
            save_metrics(trainer, "train", metrics)
        trainer.save_state()
        save_final(trainer, final_folder(config), config)
    stop.training = False
    return metrics | (trainer.plan.metrics() if trainer.plan and metrics else {})


def timed_training(trainer: QLoRATrainer, checkpoint: Path | None, first_step: int) -> dict[str, Any]:
    """Train and measure: tokens without padding over the seconds that were not spent on evaluating and saving."""
    began = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        Graphed.forget()
    except pickle.UnpicklingError as error:
        way = "begin anew with --overwrite_output_dir, or name another with --resume_from_checkpoint"
        raise ConfigError(f"{checkpoint}: its state holds more than tensors and is not read; {way}") from error
    seconds = max(time.perf_counter() - began - trainer.seconds_aside, 1e-9)
    tokens = all_reduce_int(trainer.tokens_seen, "SUM")
    steps = max(trainer.state.global_step - first_step, 1)
    return {
        **result.metrics,
        "train_loss": trainer._total_loss_scalar / steps,  # transformers 5.17 divides by the steps before a resume too
        "train_tokens": tokens,
        "train_tokens_per_second": round(tokens / seconds, 1),
        "train_peak_memory_gib": round(peak_memory_gib(), 3),
    }


def whole_weights(trainer: QLoRATrainer) -> dict[str, torch.Tensor]:
    """What is saved, gathered from the processes that share it. Every one of them has to take part."""
    if trainer.is_deepspeed_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped) or {})
    model, full, found = trainer.runtime().model, trainer.config.quant.full_finetune, {}
    names = model.all_tied_weights_keys  # of a bias that a head has twice the name that files have
    for name, parameter in model.named_parameters():
        if full or parameter.requires_grad:  # one after the other: a whole base may not fit
            gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[names.get(name, name)] = gathered.detach().cpu()
    return found


def save_final(trainer: QLoRATrainer, final: Path, config: Config) -> None:
    """The adapter (or, after a full fine-tune, the model) and its tokenizer, each file whole; then `completed`."""
    model, tokenizer, *_ = trainer.runtime()
    gathered_weights, args = {"state_dict": whole_weights(trainer)} if is_sharded(config) else {}, trainer.args
    if args.should_save:
        output, aside = Path(config.training.output_dir), final / f"{STAGING}final"
        with atomic_save(aside, final):
            model.config.use_cache = True  # for whoever loads it: load_model turned it off
            model.save_pretrained(aside, max_shard_size=config.training.max_shard_size, **gathered_weights)
            model.config.use_cache = False
            tokenizer.save_pretrained(aside)
            if getattr(model, "lora_start", None):
                convert_to_published_base(aside, model.lora_start)
            written = sorted(path.name for path in aside.iterdir())
            for name in written:
                fsync_path(aside / name)
                (aside / name).replace(final / name)
        for name in {*final_files(output)} - {*written}:  # an earlier save's shards would be loaded instead
            (final / name).unlink(missing_ok=True)
        state = {"step": trainer.state.global_step, "epoch": trainer.state.epoch, "run": trainer.run, "files": written}
        write_loss_chart(output / "loss.png", trainer.state.log_history)
        write_file(final / "README.md", model_card(trainer, config))
        write_json(output / COMPLETED, state)
        (output / PREVIOUS).unlink(missing_ok=True)
        if args.push_to_hub:
            hub: Any = {"repo_id": str(trainer.hub_model_id), "revision": args.hub_revision, "token": args.hub_token}
            with reraise_as_user_error("--push_to_hub: all is saved here, but the hub does not take it"):
                upload_folder(folder_path=final, allow_patterns=[*written, "README.md"], **hub)
            log.info("pushed to %s", trainer.hub_model_id)
    all_reduce_int()


def predict(trainer: QLoRATrainer, start: ResumePoint, pairs: Any, config: Config) -> dict[str, Any]:
    """Generate an answer for every held-out row, or fill its masks, into predictions.jsonl."""
    runtime, began, output = trainer.runtime(), time.time(), final_folder(config)
    if start.train or start.weights:
        log.info("predicting with %s", f"the adapter just trained, {output}" if start.train else start.weights)
    else:
        log.warning("no trained adapter in %s: these are the predictions of the base model", output)
    if trainer.masking:
        answers = partial(fill_masks, runtime, trainer.masking)
    else:
        answers = partial(generate_predictions, runtime, generation_config(config, runtime.model, runtime.tokenizer))
    rows = runtime.collect(len(pairs), lambda numbers: answers(pairs[numbers]), "Predicting")
    metrics = {"predict_samples": len(rows), **speed_metrics("predict", began, num_samples=len(rows))}
    right = [mask["token"] == mask["truth"] for row in rows for mask in row.get("masks", ()) if mask["truth"]]
    metrics |= {"predict_masked_accuracy": sum(right) / len(right)} if right else {}
    if trainer.args.should_save:
        file = Path(config.training.output_dir, "predictions.jsonl")
        write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return save_metrics(trainer, "predict", metrics)


MERGED = "merged.json"  # of what a folder is the merge


def merge_record(adapter: str, config: Config) -> dict[str, Any]:
    """What a merged model is made of."""
    weights = {file.name: file_digest(file) for file in Path(adapter_files(adapter, config)).glob("adapter_model.*")}
    return weights | {name: config.flags[name] for name in ("model_name_or_path", "merge_base", "max_shard_size")}


def check_merge(start: ResumePoint, config: Config) -> None:
    """Before anything is trained: can a merged model be written, and is there something to merge?"""
    if config.training.merged_output_dir is None or config.data.preview:
        return
    target = Path(config.training.merged_output_dir)
    if not start.train and start.weights is None:
        raise ConfigError(f"--merged_output_dir {target}: no adapter to merge: nothing was trained in --output_dir")
    made = read_json(target / MERGED) if (target / MERGED).is_file() else None
    if made and not start.train and made == merge_record(str(start.weights), config):
        log.info("%s holds this adapter merged already", target)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--merged_output_dir {target}: is there already and not empty; name another, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)


def load_merge_base(config: Config, folder: str) -> Any:
    """The base in 16 bit on the CPU: as published, or with the values that its quantised weights stand for."""
    model_config = load_model_config(config, folder)
    own = model_config.dtype if model_config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    options: dict[str, Any] = {"dtype": own, "device_map": {"": "cpu"}}
    if getattr(model_config, "quantization_config", None):
        log.info("the base is quantised already: the adapter is merged into the values that its weights stand for")
    elif config.training.merge_base == "dequantized" and config.quant.bits < 16:
        as_trained = quantisation_config(config, skip_modules(config, model_config))
        options |= {"dtype": load_dtype(config), "quantization_config": as_trained}
    model = load_base(config, model_config, folder, **options)
    if getattr(model.config, "quantization_config", None):
        with reraise_as_user_error(f"--merged_output_dir: {config.model.model_name_or_path} can't be dequantised"):
            model = model.dequantize(dtype=own)
        model._weight_conversions = None  # or saving would try to quantise again
    return cast(model, own)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The parameters in another dtype; not the buffers, whose rotary frequencies must stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _widen(module: torch.nn.Module, inputs: Any) -> Any:
    for parameter in module.parameters(recurse=False):  # one may be in two modules: the bias of an encoder's head
        parameter.kept = [*getattr(parameter, "kept", ()), parameter.data]  # type: ignore[attr-defined]
        parameter.data = parameter.data.float()
    # DeBERTa reads its relative positions without a call of their module
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _narrow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.kept.pop()  # type: ignore[attr-defined]


@torch.no_grad()
def logits_on(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of every token that is not padding, (tokens, vocabulary); in float32, where modules are widened one at a time."""
    with register_module_forward_pre_hook(_widen), register_module_forward_hook(_narrow):
        return model(**batch).logits[batch["attention_mask"].bool()]


def merge(adapter: str, inputs: Inputs) -> dict[str, Any]:
    """Base and adapter as one model in 16 bit, written aside, loaded again, compared, and only then named."""
    config, named = inputs.config, inputs.config.training.merged_output_dir
    if named is None or config.training.process_index != 0 or Path(named, MERGED).is_file():  # as check_merge saw
        return {}
    target = Path(named)
    aside = target.with_name(f".merging-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    rows: Any = inputs.splits.eval or inputs.splits.train
    sample = padded_prompts([ids[:64] for ids in rows[:4]["input_ids"]], inputs.tokenizer.pad_token_id, "right")
    gc.collect()  # what was trained in this process refers to itself in circles
    log.info("merging %s into %s", adapter, target)
    with atomic_save(aside, target), reraise_as_user_error(f"--merged_output_dir {target}"):
        plain, adapted, lost = write_merged(adapter, aside, sample, inputs)
        kind, options = AUTO_MODELS[config.masked], {"trust_remote_code": config.model.trust_remote_code}
        model = load_strict(str(aside), aside, kind, **options)
        metrics = compare_merged(model, plain, adapted, lost, sample, target)
        write_json(aside / MERGED, merge_record(adapter, config))
        if target.exists():
            target.rmdir()  # empty, as check_merge saw
        commit_checkpoint(aside, target)
    return metrics


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


def untie(model: Any) -> None:
    """A parameter of its own for every module: a head trained whole still holds its bias twice, and saves it once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def write_merged(adapter: str, aside: Path, sample: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Write a merged model. Returns logits of the base, then with adapter, and what share of that 16 bit can't hold."""
    config, folder, tokenizer = inputs.config, inputs.folder, inputs.tokenizer
    model: Any = load_merge_base(config, folder)
    embedding, dtype = model.get_input_embeddings().num_embeddings, model.dtype
    plain = logits_on(model, sample)
    with reraise_as_user_error(f"adapter {adapter} on {config.model.model_name_or_path}", ConfigError, RuntimeError):
        peft_model = PeftModel.from_pretrained(model, adapter_files(adapter, config))
    start = getattr(peft_model.peft_config["default"], "init_lora_weights", None)
    if mutates_base(start):
        raise ConfigError(f"{adapter} fits a base changed by {start}: finish its training, whose result fits any base")
    adapted = logits_on(peft_model, sample)
    lost = merge_layers(peft_model, dtype)
    model = cast(peft_model.merge_and_unload(), dtype)  # the layers are, what was trained whole is not
    if not model.config.get_text_config().tie_word_embeddings:
        untie(model)
    sync_special_tokens(model, tokenizer)
    model.save_pretrained(aside, max_shard_size=config.training.max_shard_size)
    tokenizer.save_pretrained(aside)
    if (Path(folder) / "tokenizer.model").is_file():  # which llama.cpp's converter prefers
        shutil.copyfile(Path(folder) / "tokenizer.model", aside / "tokenizer.model")
    if len(tokenizer) > embedding:
        log.warning("the tokenizer has %d tokens, the model %d: llama.cpp won't convert it", len(tokenizer), embedding)
    return plain, adapted, lost


def compare_merged(
    model: Any, plain: torch.Tensor, adapted: torch.Tensor, lost: float, sample: Any, target: Path
) -> dict[str, float]:
    """Compare a merged model's logits with those of base and adapter.

    They may differ as much as they do when every weight of the merged model moves by a unit in its last place, which is
    tried out (the model is of no use afterwards), and twice the share of the adapter's effect that was rounded away.
    """
    merged = logits_on(model, sample)
    generator = torch.Generator().manual_seed(0)
    for weight in (p.data for p in model.parameters() if p.dim() == 2):
        signs = [torch.randint(2, (n, 1), generator=generator).mul_(2).sub_(1).to(weight.dtype) for n in weight.shape]
        weight.addcmul_(weight, signs[0] @ signs[1].T, value=torch.finfo(weight.dtype).eps)
    differences = merged - adapted, plain - adapted, merged - logits_on(model, sample)
    found, effect, moved = (x.square().mean().sqrt().item() for x in differences)
    largest, furthest, _ = (x.abs().max().item() for x in differences)
    allowed = moved + 2 * lost * effect
    log.info("merged: its logits differ from those of base + adapter by at most %.3g", largest)
    log.info("the adapter moves them by up to %.3g", furthest)
    if lost > 0.05:
        log.warning("%.0f %% of the adapter's change is too small for a 16-bit weight and is lost", 100 * lost)
    if torch.equal(merged, plain):
        raise QLoRAError(f"{target}: not written, the merge changed nothing: the adapter is zero, or lost in 16 bit")
    if not found <= allowed:
        raise QLoRAError(
            f"{target}: not written, the merged model's logits differ from those of base + adapter by {found:.3g} "
            f"(root mean square), of which rounding explains {allowed:.3g}"
        )
    return {"merge_largest_difference": largest, "merge_difference": found, "merge_rounding": allowed}


def write_loss_chart(path: Path, history: list[dict[str, float]]) -> None:
    """Training and evaluation loss over steps."""
    from matplotlib.figure import Figure  # without pyplot no window system is asked for

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (("loss", "training", None), ("eval_loss", "evaluation", "o")):
        if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def model_card(trainer: QLoRATrainer, config: Config) -> str:
    """README.md of the adapter: settings, data and losses, with the metadata block that the hub reads."""
    losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    every = max(1, math.ceil(len(losses) / 20))  # at most 20 rows, the last among them
    losses = losses[(len(losses) - 1) % every :: every]
    rows = "\n".join(f"| {e['step']} | {e.get('loss', '')} | {e.get('eval_loss', '')} |" for e in losses)
    settings = "\n".join(f"| {name} | `{config.flags[name]}` |" for name in sorted(config.explicitly_set))
    base = config.model.model_name_or_path
    beside = "" if Path(config.training.output_dir) == final_folder(config) else f"{config.training.output_dir}/"
    kind, library = ("full fine-tune", "transformers") if config.quant.full_finetune else ("LoRA adapter", "peft")
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: {library}\n"
        f"pipeline_tag: {'fill-mask' if config.masked else 'text-generation'}\n---\n\n"
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
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def git_commit() -> str | None:
    """The commit of this file's checkout, marked if it has changes."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def device_name() -> str:
    """What computes."""
    gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return ", ".join(gpus) or f"CPU, {os.cpu_count()} cores"


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs in two records, each line with the path to it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (old | new).keys() - NOT_REPEATED - {"derived"}:
            yield from differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name} was {old}, is {new}"


def describe_run(start: ResumePoint, this_run: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Log what this run is, and how it differs from one that it repeats. Returns run.json, which holds no secret."""
    config, args, quant, tokenizer = inputs.config, inputs.config.training, inputs.config.quant, inputs.tokenizer
    effective, processes = this_run["effective batch"]["rows"], args.world_size
    flags = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = f" = {flags[0]} at once x {flags[1]} accumulated x {processes} processes"
    if effective != math.prod(flags) * processes:
        batch = f", as in the checkpoint, shared by {processes} processes"
    kind = f" {quant.quant_type}{', double quantisation' if quant.double_quant else ''}" if quant.bits == 4 else ""
    why = "--bf16" if args.bf16 else "--fp16" if args.fp16 else "neither --bf16 nor --fp16"
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    if not config.data.streaming:
        length += f"; {math.ceil(len(inputs.rows or ()) / effective)} steps are an epoch"
    names = ("bos", "eos", "pad", *(["mask"] if config.masked else []))
    special = (f"{n} {getattr(tokenizer, f'{n}_token')!r} = {getattr(tokenizer, f'{n}_token_id')}" for n in names)
    fresh = "fresh, from the seed" if args.do_train else "the base itself"
    adapter = f"adapter {start.checkpoint or start.weights or fresh}"
    first = "of a stream's first rows: " if config.data.streaming else ""
    derived = {
        "model": config.model.model_name_or_path,
        "objective": config.data.objective,
        "weights": f"{quant.bits} bit{kind}",
        "compute dtype": f"{str(compute_dtype(config)).removeprefix('torch.')} ({why})",
        "effective batch": f"{effective} rows{batch}",
        "length": length,
        "special tokens": ", ".join(special),
        "trained part": "all weights but the embeddings" if quant.full_finetune else adapter,
        **{f"{name} data": f"{first * (name == 'train')}{part}" for name, part in inputs.statistics.items()},
    }
    log.info("This run\n%s", format_table(derived))
    said = {
        "flags": config.flags,
        "derived": derived | {"given": sorted(config.explicitly_set)},
        "versions": versions() | {"qlora.py": git_commit() or CODE_VERSION},
        "data": {name: part._asdict() for name, part in inputs.statistics.items()},
        "device": {"name": device_name(), "processes": processes},
    }
    record: dict[str, Any] = json.loads(json.dumps(said, default=str))
    if config.record:
        found = sorted(differences(config.record, record)) or ["nothing"]
        log.warning("repeating a run, what differs from it:\n  %s", "\n  ".join(found))
    return record


def log_hints(config: Config) -> None:
    """What a user may not expect of the flags given, said once."""
    args, bits, flags = config.training, config.quant.bits, flags_of(config)
    gpu, half = torch.cuda.is_available(), args.bf16 or args.fp16
    if gpu and torch.cuda.is_bf16_supported() and not half:
        log.info("hint: this GPU computes in bf16; without --bf16 everything is in float32, which is slower")
    if not gpu and half and not args.plan:
        log.info("hint: on a CPU float32 is about 2.5 times faster: leave --bf16 and --fp16 out")
    if bits >= 16 and args.bf16 != (bits == 16):
        held = "in bf16, with --bf16" if args.bf16 else "in float32, without --bf16"
        log.info("bits %d: the weights are held %s, as in the original", bits, held)
    for names, applies, why in INEFFECTIVE_FLAGS:
        if (given := sorted(flags.explicitly_set.intersection(names))) and applies(flags):
            log.info("%s: without effect: %s", ", ".join(given), why.format(**vars(flags)))


# ------------------------------------------------------------------------------------
# 17. Main
# ------------------------------------------------------------------------------------
def assemble(
    base: Any, costs: MemoryModel, start: ResumePoint, rows: Any | None, pad_id: int, config: Config
) -> PreparedModel:
    """A loaded base -> what trains, on the fast path, its steps cut to the memory there is."""
    apply_liger(base, config)
    stay_on_device(base)
    model = make_trainable(base, config, start.weights)
    for adapter in getattr(model, "peft_config", {}).values():  # saved as given, not the folder made of a .gguf file
        adapter.base_model_name_or_path = config.model.model_name_or_path
    if (
        config.lora.init_lora_weights.lower() == "eva"
        and start == ResumePoint(train=True)
        and not config.quant.full_finetune
    ):
        start_from_inputs(model, rows, pad_id, config)
    for line in parameter_report(model):
        log.info("%s", line)
    fast = enable_fast_path(model, base, config)
    sizes, plan = choose_step_plan(costs, model, base, fast, rows, config)
    apply_step_plan(base, fast, sizes, compute_dtype(config), is_sharded(config))
    model.train()  # peft's wrapper says that it trains while the model inside, as loaded, does not
    said = {} if is_sharded(config) else fast.lines()  # what an engine spreads is tried when it is
    log.info("Fast path\n%s", format_table(said | {"steps": sizes} | (plan.lines() if plan else {})))
    return PreparedModel(model, fast, sizes, plan)


def print_plan(config: Config) -> None:
    """To standard output, from the model's config and the flags alone."""
    model_config = load_model_config(config, model_folder(config))
    config = resolve_objective(config, model_config)
    costs = memory_from_config(config, model_config)
    if find_gpu(config.training.plan_gpu).number == 1:
        text = format_table(plan_from_flags(config, costs).lines())
    else:
        plans = strategy_plans(config, costs)
        parts = {name: plan.lines() for name, plan in plans.items()} | {"Of these": strategy_lines(plans)}
        text = "\n".join(f"{name}\n{format_table(lines)}" for name, lines in parts.items())
    if config.training.process_index == 0:
        print(text)


def print_preview(rows: Iterable[TitledSpans], statistics: Mapping[str, TokenStatistics], config: Config) -> None:
    """To standard output, coloured where that is a terminal."""
    if config.training.process_index != 0:
        return
    if config.data.streaming:
        log.info("rows and statistics are of the stream's first 1,000 rows")
    coloured, encoding = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), sys.stdout.encoding or "utf-8"
    text = format_preview(rows, statistics, coloured).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`; nothing may be left for Python to write at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_inputs(start: ResumePoint, config: Config) -> Inputs:
    """Model config, tokenizer and rows, made once on each machine and the same in every process."""
    check_ranks_agree(config.flags | {"checkpoint": start.checkpoint})
    with local_main_process_first():  # converting the model
        folder = model_folder(config)
    for place in (folder, start.weights, start.checkpoint and (adapter_folder(start.checkpoint) or start.checkpoint)):
        check_weights(place or folder, config)
    model_config = load_model_config(config, folder)
    config = resolve_objective(config, model_config)
    tokenizer = load_tokenizer(config, model_config, folder)
    if config.training.do_predict and not config.masked:
        generation_config(config, None, tokenizer)  # a wrong flag shows now and not after training
    with local_main_process_first():  # reading and encoding the dataset
        pairs = load_splits(config, tokenizer)
        splits = encode_splits(pairs, tokenizer, config)
    rows, statistics = pack_and_summarize(splits, config)
    check_ranks_agree({f"the encoded {name} rows": part.fingerprint for name, part in statistics.items()})
    return Inputs(config, folder, model_config, tokenizer, pairs, splits, rows, statistics)


def prepare(
    start: ResumePoint, inputs: Inputs, this_run: dict[str, Any], questions: Any, stop: GracefulStop
) -> QLoRATrainer:
    """Load the model and make it ready to train."""
    config, pad_id = inputs.config, inputs.tokenizer.pad_token_id
    found = start.weights if config.quant.full_finetune else None
    base = load_model(config, inputs.model_config, found or inputs.folder)
    sync_special_tokens(base, inputs.tokenizer)
    check_rows_fit_model(base, inputs.statistics)
    costs = memory_from_config(config, inputs.model_config, exact=is_planned(inputs.rows, config))
    ready = assemble(base, costs, start, inputs.rows, pad_id, config)
    splits = inputs.splits._replace(train=inputs.pairs.train if config.data.streaming else inputs.rows)
    with reraise_as_user_error("flags", ConfigError, RuntimeError):
        trainer = build_trainer(ready, inputs.tokenizer, splits, questions, this_run, stop, config)
        if start.train and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those make their own
            trainer.create_optimizer_and_scheduler(max(config.training.max_steps, 1))  # a try of their flags
    if trainer.is_fsdp_enabled and not start.train:
        trainer.spread()
    return trainer


def run(config: Config, stop: GracefulStop, show: Callable[..., None] = print_preview) -> int:
    """One run, from checked flags to files, or --plan or --preview shown. Returns the exit status."""
    args, output, began = config.training, Path(config.training.output_dir), time.perf_counter()
    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
    log_hints(config)
    if args.plan:
        print_plan(config)
        return 0
    start = ResumePoint(train=True) if config.data.preview else find_resume_point(config)
    check_merge(start, config)
    inputs = read_inputs(start, config)
    config, statistics = inputs.config, inputs.statistics
    if config.data.preview:
        rows = preview_rows(inputs.rows or inputs.splits.eval, inputs.tokenizer, inputs.model_config, config)
        show(rows, statistics, config)
        return 0
    questions = load_questions(config) if config.mmlu.do_mmlu_eval else None
    this_run = run_fingerprint(config, statistics.get("train") if args.do_train else None)
    if start.found:
        check_same_run(start.found, this_run, args.do_train)
    check_fsdp(config)
    if args.deepspeed and args.do_eval and not start.train and not hf_deepspeed.is_deepspeed_zero3_enabled():
        raise ConfigError("--deepspeed: ZeRO-2 shares out only what trains: leave it out to evaluate what was trained")
    if start.checkpoint:
        check_engine(start.checkpoint, config)
    this_run["effective batch"] = effective_batch(start.checkpoint, args)
    output.mkdir(parents=True, exist_ok=True)  # one that can't be written shows before the model is loaded
    final_folder(config).mkdir(parents=True, exist_ok=True)
    record = describe_run(start, this_run, inputs)

    metrics: dict[str, Any] = {}
    if start.train or args.do_eval or args.do_predict:
        trainer = prepare(start, inputs, this_run, questions, stop)
        if args.should_save and (start.train or not (output / "run.json").is_file()):
            write_json(output / "run.json", record)
        log.info("ready after %.0f s", time.perf_counter() - began)
        if start.train:
            metrics |= train(trainer, start, stop, config)
            if number := all_reduce_int(stop.signal):
                name, step = signal.Signals(number).name, trainer.state.global_step
                log.warning("stopped by %s at step %d, saved; the same command goes on from there", name, step)
                return STOP_SIGNALS[name]
        if args.do_eval:
            metrics |= save_metrics(trainer, "eval", trainer.evaluate())
        if args.do_predict:
            metrics |= predict(trainer, start, inputs.pairs.eval, config)
        del trainer  # memory for a merged model
    metrics |= merge(str(final_folder(config) if start.train else start.weights), inputs)
    report_done(config, metrics, time.perf_counter() - began)
    return 0


def report_done(config: Config, metrics: dict[str, Any], seconds: float) -> None:
    """metrics.json, and the block at the end of a run."""
    if config.training.process_index != 0:
        return
    add_json(Path(config.training.output_dir, "metrics.json"), metrics, run_name=config.training.run_name)
    shown = ("plan_tokens_per_second", "train_tokens_per_second", "plan_peak_memory_gib", "train_peak_memory_gib",
             "train_loss", "eval_loss", "eval_perplexity", "eval_masked_accuracy",
             "predict_masked_accuracy")  # fmt: skip
    lines = {name.replace("_", " "): metrics[name] for name in shown if name in metrics}
    lines |= {name: value for name, value in metrics.items() if re.fullmatch(r"mmlu_\w+_accuracy|mmlu_loss", name)}
    files = {str(final_folder(config)): 1, config.training.output_dir: 1, config.training.merged_output_dir: 1}
    lines |= {"seconds": round(seconds), "files": ", ".join(filter(None, files))}
    log.info("Done\n%s", format_table(lines))


# A disk's, which the user can mend; another error of the system may be ours.
DISK_ERRORS = {"ENOENT", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST"}
DISK_ERRORS |= {"ENAMETOOLONG", "ESTALE", "EISDIR", "ENOTEMPTY", "ELOOP"}


def exit_status(error: BaseException, output: Path | None = None) -> tuple[int, str] | None:
    """Exit status and message for what a user can mend; None for our bugs."""
    if is_lost(error):
        last = (find_last_checkpoint(output) if output else None) or "the beginning"
        way = "on as many processes as there are, with the same effective batch"
        return 2, f"The same command goes on from {last}, {way}"
    if isinstance(error, QLoRAError):
        return 2, escape_control_chars(str(error))
    if isinstance(error, KeyboardInterrupt):
        name = signal.Signals(error.args[0] if error.args else signal.SIGINT).name
        return STOP_SIGNALS[name], f"interrupted by {name}; the same command goes on from what is saved"
    if isinstance(error, torch.OutOfMemoryError):
        lower = "lower --per_device_train_batch_size or --source_max_len and --target_max_len"
        return 2, f"not enough GPU memory: {lower}, or keep --gradient_checkpointing on"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in DISK_ERRORS:
        return 2, f"{error.filename or 'a file'}: {error.strerror}"
    library = type(error).__module__.partition(".")[0]
    if library in INTEGRATION_TO_CALLBACK:  # no login, no connection, ...
        return 2, f"--report_to {library}: {shorten(error)}"
    return None


def set_up_logging() -> None:
    """INFO to standard error on rank 0, only errors elsewhere."""
    for message in (  # of one library about another's code: nothing that a user could do about it
        ".*gradient_checkpointing.* is deprecated", "All adapters are already merged",
        "Model has `tie_word_embeddings=True` and", "Input and output embeddings are no longer tied after merging",
        "FSDP2-wrapped module .* returned a view",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def main(argv: Sequence[str] | None = None, action: Callable[[Config, GracefulStop], int] = run) -> int:
    """The command line. Returns the exit status: 0 done, 2 mend something; STOP_SIGNALS: stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    debug = any(re.fullmatch(r"--show[_-]traceback|--debug", token) for token in argv)
    stop, output = GracefulStop(), None
    try:
        with handle_signals(stop):
            config = parse_config(argv)
            output = Path(config.training.output_dir)
            status = action(config, stop)
            shutdown_distributed()
            return status
    except (Exception, KeyboardInterrupt) as error:
        known, lost = exit_status(error, output), is_lost(error)
        if known is None:
            said_once(type(error).__name__, lost)
            raise
        if debug:
            traceback.print_exc()
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or the message would stand behind a progress bar
        own = escape_control_chars(HUB_TOKEN.sub("(a token)", known[1]))
        if message := said_once(own, lost, isinstance(error, KeyboardInterrupt)):
            print(f"{'error: ' if known[0] else ''}{message}", file=sys.stderr, flush=True)
        if (
            rank_and_world_size()[1] > 1
        ):  # what waits on a GPU for a process that is gone would keep this one from ending
            os._exit(known[0])
        return known[0]


if __name__ == "__main__":
    sys.exit(main())
