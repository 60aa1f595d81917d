#!/usr/bin/env python3
"""QLoRA in one file: fine-tune a language model by training LoRA adapters on a frozen base in 4 bits.

    python qlora.py --model_name_or_path MODEL --dataset DATA --output_dir OUT    train
    python qlora.py run.yaml --learning_rate 1e-4                                 read flags from a file
    python qlora.py OLD/run.json --output_dir NEW                                 repeat a run and list what differs
    python qlora.py ... --do_train False --do_predict --predict_with_generate     predict with a trained adapter

The base is loaded in 4, 8, 16 or 32 bits, every linear layer gets a LoRA adapter, dataset rows become segments of text
that are supervised or not, and the Hugging Face Trainer trains the adapters with a paged optimizer. The method is
QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). Flags, defaults, prompts, labels and output files are
those of the original script (https://github.com/artidoro/qlora); the README lists the differences.

Read the file from top to bottom, along the path of the data: every room uses only the rooms above it. The prompt is
masked in `with_labels`, a format is a row of FORMATS, memory decides the micro-batch in `search_step_plan`, the rename
in `commit_checkpoint` makes a checkpoint visible, and the loss is normalised in `_micro_batch_losses`.

     1 Imports             38-189
     2 Errors             192-255
     3 Dataset formats    258-846
     4 Arguments         849-1575
     5 Loading          1578-2236
     6 Tokenizer        2239-2362
     7 Encoding         2365-2845
     8 Model            2848-3482
     9 Calibration      3485-3842
    10 LoRA             3845-4181
    11 Fast path        4184-5226
    12 Plan             5229-5578
    13 Checkpoints      5581-5986
    14 Processes        5989-6046
    15 Evaluation       6049-6248
    16 Trainer          6251-6886
    17 Stages           6889-7397
    18 Main             7400-7690
"""

# ------------------------------------------------------------------------------------
# 1. Imports
#
# transformers' Trainer needs torch, peft, bitsandbytes and datasets anyway; matplotlib is imported where it is used.
# ------------------------------------------------------------------------------------
# ruff: noqa: E402, I001 (long lists have several names a line)

import argparse
import bisect
import contextlib
import copy
import csv
import dataclasses
import difflib
import gc
import glob
import gzip
import hashlib
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
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict
from unittest import mock

if imports := __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while libraries are imported: without their traceback

# Send nothing that the user did not ask for. Most libraries read these variables when imported.
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else transformers asks a hub service to convert .bin weights
    "TQDM_LEAVE": "",  # progress bars disappear when they are done
} | os.environ  # what is set stays as it is

# Harmless warnings: a CPU kernel that no release has, casts in 8-bit layers, operations that the plan reports itself,
# special tokens that were set on purpose and are listed at the start, kernels of liger that need other packages.
for _noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torch._subclasses.fake_tensor",
               "transformers.trainer_utils", "liger_kernel.backends.registry"):  # fmt: skip
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)

import bitsandbytes.functional as bnb_functional
import bitsandbytes.optim.optimizer
import datasets
import numpy
import pyarrow
import huggingface_hub
import psutil
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate.utils import DistributedType, send_to_device
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub import snapshot_download, upload_folder
from huggingface_hub.constants import HF_HOME
from jinja2 import TemplateError, TemplateSyntaxError
from peft import (
    LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights,
    set_peft_model_state_dict,
)  # fmt: skip
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, transformers_weight_conversion as peft_conversion
from peft.utils.other import get_pattern_key
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import (
    AddedToken, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoTokenizer,
    BitsAndBytesConfig, DataCollatorWithFlattening, EarlyStoppingCallback, GenerationConfig, HfArgumentParser,
    LlamaTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast,
    PrinterCallback, ProgressCallback, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainerControl,
    TrainerState, enable_full_determinism, set_seed,
)  # fmt: skip
from transformers.hf_argparser import string_to_bool
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.gguf import gguf_tokenizer_mapping
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.mistral import convert_tekken_tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput, speed_metrics
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template

try:
    import triton
    import triton.language as tl
except ImportError:  # without a GPU, torch does the same
    triton = None
try:
    from liger_kernel import ops as liger_ops
except ImportError:  # or the Triton that it needs
    liger_ops = None

if imports:
    signal.signal(signal.SIGINT, signal.default_int_handler)

log = logging.getLogger("qlora")
warn_once = cache(log.warning)

IGNORE = -100  # label that the loss ignores
GIB = 2**30


# ------------------------------------------------------------------------------------
# 2. Errors
#
# main prints a ConfigError as one line and returns 2. Its message says what was found, what was expected, what to do.
# Every other exception is a bug and keeps its traceback.
# ------------------------------------------------------------------------------------
class ConfigError(Exception):
    """Something that the user can fix: flags that are wrong or conflict, an unusable model, dataset, file or row."""


class RowError(ValueError):
    """What is wrong with one row; whoever reads the file adds file and line."""

    def __init__(self, message: str, raw: Any = None) -> None:
        super().__init__(message)
        self.raw = raw  # the text of a line that could not be parsed


def escape_control_chars(text: str) -> str:
    """Escape unprintable characters, which could control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(error: object, most: int = 400) -> str:
    """An error or a value as one line of at most so many characters."""
    text = escape_control_chars(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def format_table(rows: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


# What libraries raise because of a user's files and flags. RuntimeError is just as often a bug of ours.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError,
    ArithmeticError, RecursionError, yaml.YAMLError, zlib.error, SafetensorError, TemplateError, pickle.UnpicklingError,
)  # fmt: skip


@contextlib.contextmanager
def reraise_as_user_error(what: str, *also: type[BaseException]) -> Iterator:
    """Re-raise library errors as one line that begins with `what`, the flag or file at fault."""
    try:
        yield
    except torch.OutOfMemoryError:  # handled by training, which retries with less
        raise
    except pickle.UnpicklingError as error:  # torch's own message suggests to disable the protection
        raise ConfigError(f"{what}: a pickle that holds more than tensors, which is not loaded") from error
    except (*LIBRARY_ERRORS, *also) as error:
        raise ConfigError(f"{what}: {shorten(error)}") from error


def read_json(path: Path) -> Any:
    """A JSON file's content; a ConfigError if it can't be read."""
    with reraise_as_user_error(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


def is_peer_failure(error: BaseException) -> bool:
    """Whether a message to another rank failed because that rank has exited."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# ------------------------------------------------------------------------------------
# 3. Dataset formats: one row of a raw dataset -> segments
#
# A format parses a row into a short list of segments, each supervised or not; {input, output} is the case of two. A
# chat is a Conversation first, which the tokenizer's template renders. Later rooms do not know the formats.
# To add one: write `parse_name` (or use `column_format`), add a row to FORMATS and one to tests/test_formats.py. The
# order of FORMATS is the order in which formats are inferred from columns. A named dataset is a row of DATASETS.
# ------------------------------------------------------------------------------------
BOOLEANS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


class Segment(TypedDict):
    text: str
    supervised: bool


class Conversation(NamedTuple):  # before the tokenizer's template renders it
    messages: list[dict[str, Any]]  # in OpenAI's form; the last is an answer that is supervised
    answers: list[int]  # the messages that are supervised
    tools: list[Any] | None
    options: dict[str, Any]  # variables for the template
    left_out: list[str]  # what the row has and its text has not


class RenderedRow(NamedTuple):
    segments: list[Segment]
    left_out: list[str]  # what the raw row has and the text has not
    lost: int = 0  # tokens of the exchanges that are left out
    rendered: bool = False  # tokenised whole, with the special tokens in it


class JoinedSegments(list[Segment]):
    """Segments that are tokenised as one text. One that starts with ESCAPE_MARK is the name of a special token."""


RawRow = Mapping[str, Any]
ParsedRow = list[Segment] | Conversation


class DatasetFormat(NamedTuple):
    columns: tuple[str, ...]  # required
    parse: Callable[[RawRow], ParsedRow]
    inferred: bool = True  # whether columns alone may choose it
    optional: tuple[str, ...] = ()


# Unicode noncharacters, which no text may contain. The first two stand for the tokenizer's own ids. The third, inside
# the text of a special token that a user wrote, keeps it text.
BOS_MARK, EOS_MARK, ESCAPE_MARK = MARKS = "\ufdd0\ufdd1\ufdd2"
REASONING_TAG = re.compile(r"(?i)[<\[][^<>\[\]]*(?:think|thought)[^<>\[\]]*[>\]]")
INVALID_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd2]")  # and the lone surrogates that stand for broken UTF-8


def prompt_completion(*texts: str) -> list[Segment]:
    """The last text is supervised; the one before it, if any, is the prompt."""
    *prompt, completion = texts
    return [{"text": "".join(prompt), "supervised": False}, {"text": completion, "supervised": True}]


def field_error(row: RawRow, name: str, expected: str) -> RowError:
    """What a field holds, and what a format expects there."""
    found = shorten(json.dumps(row[name], default=repr), 200) if name in row else "missing"
    return RowError(f"field {name!r} is {found}, expected {expected}")


def get_text(row: RawRow, name: str, default: str | None = None) -> str:
    """The text in a field; a number or boolean becomes its JSON text, and null counts as missing."""
    value = default if row.get(name) is None else row[name]
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise field_error(row, name, "text")
    if INVALID_TEXT.search(value):
        raise field_error(row, name, "UTF-8 (is the file in Latin-1?) without the noncharacters U+FDD0 to U+FDD2")
    return value


def get_text_or_refuse_chat(row: RawRow, name: str, default: str | None = None) -> str:
    """The text in a field; a RowError for a list of turns as text, which is what a CSV file holds of a chat."""
    text = get_text(row, name, default)
    if re.match(r"\s*\[\{['\"](role['\"]: ?['\"](system|user|assistant)|from['\"]: ?['\"](system|human|gpt))\b", text):
        raise field_error(row, name, "text; a chat goes into a column `messages`, as a list or JSON")
    return text


def get_list(row: RawRow, name: str, default: Any = None, kinds: Any = None) -> Any:
    """The list in a field, or a dict if the default is one; it may be JSON text, and empty text is the default."""
    value = default if row.get(name) in (None, "") else row[name]
    kinds = kinds or (list if default is None else type(default))
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    value = default if default is not None and value in (None, False, [], {}) else value
    if not isinstance(value, kinds):
        raise field_error(row, name, "a list" if kinds is list else "an object")
    return value


def get_boolean(row: RawRow, name: str, default: str) -> bool:
    """The boolean in a field, which may be 0, 1 or text."""
    value = default if row.get(name) in (None, "") else row[name]
    if str(value).lower() not in BOOLEANS:
        raise field_error(row, name, "1 or 0, or true or false")
    return BOOLEANS[str(value).lower()]


def parse_alpaca(row: RawRow) -> ParsedRow:
    """The Alpaca prompt (https://github.com/tatsu-lab/stanford_alpaca), with the original's single trailing space."""
    context = get_text(row, "input", "")
    paired = ", paired with an input that provides further context" if context else ""
    task = f"Below is an instruction that describes a task{paired}. "
    task += "Write a response that appropriately completes the request."
    prompt = (get_text(row, "system", "") or task) + "\n\n"
    for pair in get_list(row, "history", []):  # earlier exchanges, as LLaMA-Factory has them
        if not isinstance(pair, list) or len(pair) != 2:
            raise field_error(row, "history", "pairs of instruction and output")
        question, answer = (get_text({"history": part}, "history") for part in pair)
        prompt += f"### Instruction:\n{question}\n\n### Response: {answer}\n\n"
    prompt += f"### Instruction:\n{get_text(row, 'instruction')}\n\n"
    prompt += f"### Input:\n{context}\n\n" if context else ""
    return prompt_completion(f"{prompt}### Response: ", get_text(row, "output"))


def parse_chosen(row: RawRow, answer: str = "chosen") -> ParsedRow:
    """The chosen answer of a preference, after its prompt unless it begins with that. Both may be chats."""
    prompt, chosen = row.get("prompt") or "", row.get(answer)
    if isinstance(chosen, list):
        turns = prompt if isinstance(prompt, list) else []
        answers = chosen[len(turns) :] if chosen[: len(turns)] == turns else chosen
        context = [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in turns]
        chat = parse_chat(answer, {**row, answer: [*context, *answers]})
        if prompt and isinstance(prompt, str) and prompt not in (message["content"] for message in chat.messages):
            chat.left_out.append("a prompt beside a chat")
        return chat
    prompt, chosen = get_text_or_refuse_chat(row, "prompt", ""), get_text_or_refuse_chat(row, "chosen")
    # an answer may repeat its prompt, but `Hello` before `Hello, Bob!` is no repetition
    both = str(row.get("rejected") or chosen).startswith(prompt) and not re.fullmatch(r"\w*", prompt)
    repeated = chosen.startswith(prompt) and (both or re.search(r"[:\s]$", prompt))
    return prompt_completion("" if repeated else prompt, chosen)


def parse_pair(row: RawRow) -> ParsedRow:
    """Prompt and completion, both as text or, as TRL has them, as chats."""
    if isinstance(row.get("completion"), list):
        return parse_chosen(row, "completion")
    return prompt_completion(*(get_text_or_refuse_chat(row, name) for name in ("prompt", "completion")))


def parse_chip2(row: RawRow) -> ParsedRow:
    """Question and answer share one string, marked `<human>: ` and `<bot>: `; the first answer is supervised."""
    parts = get_text(row, "text").split("\n<bot>: ")
    if len(parts) < 2:
        raise field_error(row, "text", r"a question and an answer with '\n<bot>: ' between them")
    return prompt_completion(parts[0].replace("<human>: ", ""), parts[1])


def parse_airoboros(row: RawRow) -> ParsedRow:
    """Airoboros up to 2.2.1 (https://github.com/jondurbin/airoboros)."""
    instruction, answer = get_text(row, "instruction").strip(), get_text(row, "response").strip() + "\n"
    if get_boolean(row, "skip_prompt_formatting", "false"):
        return prompt_completion(f"{instruction}\n", answer)
    instruction = re.sub(r"\s+PLAINFORMAT$", " PLAINFORMAT", instruction)
    system = get_text(row, "system", "").strip() or "A chat."
    return prompt_completion(f"{system}\nUSER: {instruction}\nASSISTANT: ", answer)


ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}  # as datasets name them
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
NEXT_ROLES = {"": ["system", "user"], "system": ["user"], "user": ["assistant"], "assistant": ["user", "tool"]}
NEXT_ROLES |= {"tool": ["tool", "assistant"]}
WEIGHT_KEYS = ("weight", "train", "training", "trainable", "loss_mask", "loss")  # 0 or false: an answer is context only
TURN_KEYS = {*WEIGHT_KEYS, "role", "content", "from", "value", "name", "id", "tool_calls", "tool_call_id",
             "reasoning_content", "reasoning", "thinking"}  # fmt: skip


def drop_nulls(value: Any, top: bool = False) -> Any:
    """A row without the nulls that Arrow adds where an object lacks a field that others have; its columns stay."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None or top}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def get_calls(fields: RawRow, name: str) -> list[dict[str, Any]]:
    """A list of tool calls, or a single one, in OpenAI's form with arguments as an object; JSON text is parsed."""
    value = get_list(fields, name, kinds=(list, dict))
    calls: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise field_error(fields, name, "tool calls, each with a name and arguments")
        arguments = get_list(function, "arguments" if "arguments" in function else "parameters", {})  # Llama's
        frame = {key: call[key] for key in ("type", "id") if call.get(key) is not None}
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function"} | frame | {"function": function})
    return calls


def get_messages(row: RawRow, column: str) -> list[dict[str, Any]]:
    """Turns of {role, content} or {from, value} in OpenAI's form; refuses turns that are out of order."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(get_list(row, column)):
        place, expected = f"{column}[{number}]", NEXT_ROLES[messages[-1]["role"] if messages else ""]
        if not isinstance(turn, Mapping):
            raise field_error({place: turn}, place, "an object")
        fields = {f"{place}.{name}": value for name, value in turn.items()}  # with the names that errors show
        names = ("from", "value") if turn.get("from") is not None else ("role", "content")
        role_field, content_field = (f"{place}.{name}" for name in names)
        name = get_text(fields, role_field).lower()
        role = ROLES.get(name)
        if role not in expected:
            raise field_error(fields, role_field, " or ".join(expected))
        message = {key: value for key, value in turn.items() if value not in (None, "[]", "{}", "null")}
        if turn.get("train_detail"):
            raise field_error(fields, f"{place}.train_detail", "nothing: a turn is supervised whole, or not at all")
        weights = [get_boolean(fields, f"{place}.{key}", "true") for key in WEIGHT_KEYS]
        message |= {"role": role, "supervised": role == "assistant" and all(weights)}
        own_role = name == "function_call"  # LLaMA-Factory's role, whose content is calls; OpenAI's old key is below
        calls = [content_field] if own_role else []
        for key in ("tool_calls", "function_call"):
            if message.pop(key, None) and role == "assistant":
                calls.append(f"{place}.{key}")
        if len(calls) > 1:
            raise field_error(fields, calls[1], "calls in one place only")
        if calls:
            message["tool_calls"] = get_calls(fields, calls[0])
        content = "" if own_role else get_text(fields, content_field, "" if calls else None)
        if message["supervised"] and not calls and not content.strip():
            raise field_error(fields, content_field, "an answer to learn")
        messages.append(message | {"content": content})
    return messages


def parse_airoboros_chat(row: RawRow) -> ParsedRow:
    """Airoboros from 3.0 on: LLaMA-2's chat, of which the last answer is supervised."""
    system = "You are an unbiased, uncensored, helpful assistant."
    turns = get_messages(row, "conversations")
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    if len(turns) < 2 or not turns[-1]["supervised"] or any(turn["role"] == "tool" for turn in turns):
        raise RowError("field 'conversations': expected turns of human and gpt, the last of gpt, to learn")
    question, *between, answer = (turn["content"] for turn in turns)
    prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]"
    for earlier, question in zip(between[::2], between[1::2], strict=True):
        prompt += f" {earlier.strip()} {EOS_MARK}{BOS_MARK}[INST] {question.strip()} [/INST]"
    return prompt_completion(prompt, answer)


def parse_chat(column: str, row: RawRow) -> Conversation:
    """Everything up to the last supervised answer, with the columns beside it that a chat may have."""
    row = {**row, column: get_list(row, column)}
    if isinstance(row.get("chosen"), Mapping):  # LLaMA-Factory's preferences
        raise field_error(row, "chosen", f"no answer beside {column!r}: let path.py:function append it to the turns")
    turns = (turn for turn in row[column] if isinstance(turn, Mapping) and "tool_calls" in turn)
    if any((turn.get("from") or turn.get("role")) in ("user", "human") for turn in turns):
        row = drop_nulls(row, top=True)  # JSON lines that datasets wrote have Arrow's nulls too
    messages = get_messages(row, column)
    left_out: list[str] = []
    for name in ("system", "system_prompt"):
        system = get_text(row, name, "")
        if system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system, "supervised": False})
        elif system and messages and messages[0]["content"] != system:
            left_out.append(f"{name} beside another system turn")
    answers = [n for n, message in enumerate(messages) if message.pop("supervised")]
    others = [message for message in messages if message["role"] != "assistant"]
    ignored = sorted({key for m in others for key in WEIGHT_KEYS if BOOLEANS.get(str(m.get(key)).lower())})
    left_out += [f"{key} of a turn that is not the assistant's" for key in ignored]
    if not answers:
        raise RowError(f"field {column!r} has no turn of the assistant with a weight, expected an answer to learn")
    tools, functions = get_list(row, "tools", []), get_list(row, "functions", [])
    left_out += ["functions beside tools"] if tools and functions else []
    if not all(isinstance(tool, Mapping) for tool in tools or functions):
        raise field_error(row, "tools" if tools else "functions", "a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or functions]
    options = get_list(row, "chat_template_kwargs", {})
    left_out += ["turns after the last answer to learn"] if answers[-1] + 1 < len(messages) else []
    return Conversation(messages[: answers[-1] + 1], answers, tools or None, options, left_out)


def column_format(*columns: str, inferred: bool = True) -> DatasetFormat:
    """Columns used as they are: prompt and completion, or for plain language modelling the completion alone."""
    return DatasetFormat(columns, lambda row: prompt_completion(*(get_text(row, name) for name in columns)), inferred)


BESIDE_CHATS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
BESIDE_AIROBOROS = ("system", "skip_prompt_formatting")
FORMATS: dict[str, DatasetFormat] = {
    "messages": DatasetFormat(("messages",), partial(parse_chat, "messages"), optional=BESIDE_CHATS),
    "sharegpt": DatasetFormat(("conversations",), partial(parse_chat, "conversations"), optional=BESIDE_CHATS),
    "airoboros": DatasetFormat(("instruction", "response"), parse_airoboros, True, BESIDE_AIROBOROS),
    "alpaca": DatasetFormat(("instruction", "output"), parse_alpaca, optional=("input", "system", "history")),
    "self-instruct": DatasetFormat(("prompt", "completion"), parse_pair),
    "input-output": column_format("input", "output"),
    "hh-rlhf": DatasetFormat(("chosen",), parse_chosen, optional=("prompt", "rejected")),
    "text": column_format("text"),
    "alpaca-clean": DatasetFormat(("instruction", "output"), parse_alpaca, False, ("input", "system", "history")),
    "longform": column_format("input", "output", inferred=False),
    "chip2": DatasetFormat(("text",), parse_chip2, inferred=False),
    "oasst1": column_format("text", inferred=False),
    "input": column_format("input", inferred=False),
    "airoboros_chat": DatasetFormat(("conversations",), parse_airoboros_chat, inferred=False),
}
MASKED_FORMATS: tuple[str, ...] = ("input", "text")  # for masked language models, in order of preference
CUSTOM_FORMAT: re.Pattern[str] = re.compile(r"(.+\.py):([A-Za-z_]\w*)")  # a user's file and function


def parse_as_chat(question: tuple[str, ...], answer: str, row: RawRow) -> ParsedRow:
    """A pair as a chat of one exchange."""
    first, *others = question
    text = "\n\n".join(filter(None, (get_text(row, first), *(get_text(row, name, "") for name in others))))
    if not (completion := get_text(row, answer)).strip():
        raise field_error(row, answer, "an answer to learn")
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]
    return parse_chat("messages", {**row, "messages": turns})


def get_format(name: str, as_chat: bool = False) -> DatasetFormat:
    """A row of FORMATS, or the function that path.py:function names."""
    if not (custom := CUSTOM_FORMAT.fullmatch(name)):
        known = FORMATS[name]
        if not as_chat or {"messages", "conversations"}.intersection(known.columns):
            return known
        question = known.columns[:-1] + (("input",) if "input" in known.optional else ())  # the last is the answer
        if not question:
            raise ConfigError(f"--as_chat: rows of the format {name} are not pairs of a question and an answer")
        parse = partial(parse_as_chat, question, known.columns[-1])
        return DatasetFormat(known.columns, parse, optional=question + BESIDE_CHATS)
    with reraise_as_user_error(f"--dataset_format {name}", Exception, SystemExit):
        module = types.SimpleNamespace(**runpy.run_path(custom[1]))
        return DatasetFormat((), partial(parse_custom, name, getattr(module, custom[2])))


def parse_custom(name: str, function: Callable[[dict[str, Any]], Any], row: RawRow) -> ParsedRow:
    """Call a user's function on a row."""
    try:
        result = function(dict(row))
        if isinstance(result, Mapping):
            return FORMATS["messages" if "messages" in result else "input-output"].parse(result)
        segments = JoinedSegments()
        for part in result:  # it may be a generator
            special = "special" in part
            text = ESCAPE_MARK + get_text(part, "special") if special else get_text(part, "text")
            supervised = part.get("supervised", False) if special else part["supervised"]
            segments.append({"text": text, "supervised": bool(supervised)})
        return segments
    except (Exception, SystemExit) as error:  # whatever a user's code raises is an error of this row
        expected = "it returns {input, output}, {messages} or a list of {text, supervised} and {special, supervised}"
        raise RowError(f"{name}: {type(error).__name__}: {shorten(error)}; expected: {expected}") from error


@lru_cache(maxsize=2)
def special_token_pattern(tokenizer: PreTrainedTokenizerBase, unflagged: bool = False) -> re.Pattern[str]:
    """Match special tokens, and turn marks that are not flagged as such (DeepSeek's); with `unflagged` these alone.

    Cached by tokenizer: call it after load_tokenizer has set template and special tokens.
    """
    texts: list[str] = []
    template = str(tokenizer.chat_template or "")
    added = getattr(tokenizer, "text_tokens", ())  # of --add_tokens: no marker unless the template writes it
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token)
        names_role = re.search("(?i)system|user|assistant|turn", text) and (text in template or text not in added)
        marks_turn = text in template and re.match("(?i)(?!.*(think|tool)).*(im_|inst|head|role|end)", text)
        if (token.special and not unflagged) or (not token.special and (names_role or marks_turn)):
            texts.append(text)
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def escape_special_tokens(value: Any, special: re.Pattern[str], answer: bool = False) -> Any:
    """Put ESCAPE_MARK into every special token that a user wrote, which keeps it text; an answer's think tags stay."""
    if isinstance(value, str):
        keep = "(?i)think|thought" if answer else "(?!)"
        return special.sub(lambda m: m[0] if re.search(keep, m[0]) else m[0][0] + ESCAPE_MARK + m[0][1:], value)
    if isinstance(value, Mapping):
        answer = answer or value.get("role") == "assistant"
        escape = partial(escape_special_tokens, special=special, answer=answer)
        return {escape(name): escape(item) for name, item in value.items()}
    return [escape_special_tokens(item, special, answer) for item in value] if isinstance(value, list) else value


def join_segments(segments: JoinedSegments, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Segments with the marks of BOS and EOS around them. Special tokens in a text stay text."""
    special = special_token_pattern(tokenizer)
    joined: list[Segment] = []
    for number, segment in enumerate(segments, start=1):
        named = segment["text"].startswith(ESCAPE_MARK)
        text = segment["text"][1:] if named else escape_special_tokens(segment["text"], special)
        if named and not special.fullmatch(text):
            raise RowError(f"{{'special': {text!r}}}: the tokenizer has no such special token")
        text = "" if named and number == 1 and text == tokenizer.bos_token else text  # it stands there anyway
        ends = number == len(segments) and not (named and text == tokenizer.eos_token)
        text = (BOS_MARK if number == 1 else "") + text + (EOS_MARK if ends else "")
        joined.append({"text": text, "supervised": segment["supervised"]})
    return joined


def apply_template(
    chat: Conversation, tokenizer: PreTrainedTokenizerBase, end: int | None = None, prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of messages up to `end`, and the spans of answers if the template marks them with {% generation %}."""
    try:
        template = tokenizer.get_chat_template(tools=chat.tools)
        if today := getattr(tokenizer, "template_date", None):  # the run's, so that a resume renders the same
            parts = "".join(f".replace('%{part}', {today.strftime('%' + part)!r})" for part in "AaBbdemjyYHIMSpFx")
            template = "{% macro strftime_now(format) %}{{ format" + parts + " }}{% endmacro %}" + template
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        options = {**tokenizer.special_tokens_map, **chat.options, "tools": chat.tools, "chat_template": template}
        own = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": marked, "continue_final_message": False}
        rendered: Any = render_jinja_template([chat.messages[:end]], **options | own)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template, line {error.lineno}: {shorten(error)}") from error
    except LIBRARY_ERRORS as error:
        raise RowError(f"the chat template refuses it: {shorten(error)}") from error
    return rendered[0][0], rendered[1][0] if marked else None


def contains(text: str, value: Any) -> bool:
    """Whether a text without white space holds a value and all that is in it, as it is or as JSON."""
    if isinstance(value, (dict, list)):
        return all(contains(text, part) for part in (*value, *(value.values() if isinstance(value, dict) else ())))
    if value is None or isinstance(value, bool):  # as True or true, None or null
        return True
    forms = json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value), repr(f'{value}"')[1:-2]  # ' as \'
    return any("".join(form.split()) in text for form in (str(value), *(form.strip("\"'") for form in forms)))


def check_answer(message: Mapping[str, Any], turn: int, supervised: str) -> bool:
    """Whether the supervised text has an answer's reasoning; a RowError if it lacks its content or part of a call."""
    supervised = "".join(supervised.split())
    *reasoning, answer = REASONING_TAG.split(message["content"] or "")
    while reasoning and not answer.strip() and not message.get("tool_calls"):  # no text but the reasoning
        answer = reasoning.pop()
    wanted = [answer]
    for call in message.get("tool_calls", ()):
        wanted += call["function"].values()
    for value in wanted:
        # a dictionary written as Python's is refused: render_chat tries arguments as JSON text next
        as_python = value and isinstance(value, dict) and "".join(repr(value).split()) in supervised
        if as_python or not contains(supervised, value):
            what = f"turn {turn}: the chat template does not write this part of the answer as text or JSON"
            raise RowError(f"{what}: {shorten(value)}; pass a --chat_template that does")
    reasoning += [message.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    return contains(supervised, reasoning)


def find_answer(chat: Conversation, n: int, whole: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, slice]:
    """The prompt for generating answer n, the text of the chat up to it, and its span, from there to its stop token.

    Where the prompt is no prefix of the text (it may open a block of reasoning that the answer lacks), the answer
    begins where they differ. White space after the stop token belongs to the template.
    """
    prompt, context = (apply_template(chat, tokenizer, n, prompt=opened)[0] for opened in (True, False))
    text = whole if n + 1 == len(chat.messages) else apply_template(chat, tokenizer, n + 1)[0]
    places = range(min(len(prompt), len(text)))  # bisected: 20,000 characters one by one take 1.8 ms and not 0.04
    start = bisect.bisect_left(places, True, key=lambda place: prompt[: place + 1] != text[: place + 1])
    if start < min(len(prompt), len(context)):
        # The template renders earlier turns differently once they are answered. The longest end of the prompt that the
        # text has too aligns the two: the answer follows it. Without one, the answer begins where they differ.
        cut = bisect.bisect_left(range(len(prompt)), True, key=lambda place: prompt[place:] in text[start:])
        place = text.rindex(prompt[cut:]) + len(prompt) - cut
        last = chat.messages[n - 1]["content"]
        has_last = lambda part: contains("".join(part.split()), last)  # noqa: E731
        # that end begins before the generation prompt; if the template has none, it has the last message
        aligned = cut < len(context) and (prompt != context or (last.strip() and has_last(prompt[cut:])))
        if aligned and has_last(text[:place]):
            text, start = prompt + text[place:], len(prompt)
        elif has_last(prompt[start:]) or not has_last(prompt[:start]):
            reason = f"turn {n + 1}: the chat template renders what precedes it differently once it follows"
            raise RowError(f"{reason}; pass a --chat_template with {{% generation %}} around the answers")
    # prompt and answer may share the first characters of a tag: the answer begins with the whole tag
    tags = re.finditer(r"<[^<>]*>|\[[^\[\]]*\]", prompt)
    start = next((tag.start() for tag in tags if tag.start() < start < tag.end()), start)
    stops = special_token_pattern(tokenizer).finditer(text, start)
    return prompt, text, slice(start, next((stop.end() for stop in stops if not text[stop.end() :].strip()), len(text)))


def check_calls(chat: Conversation, whole: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse several calls of an answer of which the template leaves one out, as gpt-oss's does: tried without each."""
    for n in chat.answers:
        turn, calls = chat.messages[n], chat.messages[n].get("tool_calls", ())
        for i, call in enumerate(calls if len(calls) > 1 else ()):
            fewer = turn | {"tool_calls": [*calls[:i], *calls[i + 1 :]]}
            messages, rendered = [*chat.messages[:n], fewer, *chat.messages[n + 1 :]], ""
            with contextlib.suppress(RowError):  # of a template that counts results
                rendered = apply_template(chat._replace(messages=messages), tokenizer)[0]
            if rendered == whole:
                what = f"the chat template does not write call {i + 1} of {len(calls)}, of {call['function']['name']}"
                raise RowError(f"turn {n + 1}: {what}; pass a --chat_template that does")


def render_rows(chat: Conversation, tokenizer: PreTrainedTokenizerBase) -> Iterator[RenderedRow]:
    """The rows of a chat whose values are escaped; answers to train on are supervised with their stop tokens."""
    whole, marks = apply_template(chat, tokenizer)
    written = "".join(whole.split())
    others = {
        key for m in chat.messages for key, value in m.items() if key not in TURN_KEYS and not contains(written, value)
    }
    absent = [f"{escape_control_chars(key)} of a turn" for key in sorted(others)]
    for role, what in (("tool", "tool results"), ("system", "system turns")):
        if not contains(written, [m["content"] for m in chat.messages if m["role"] == role]):
            absent.append(what)
    check_calls(chat, whole, tokenizer)
    with contextlib.suppress(RowError):  # of a template that wants tools beside calls
        if chat.tools and apply_template(chat._replace(tools=None), tokenizer)[0] == whole:
            absent.append("tools")
    notes = [*chat.left_out, *(f"{what} that the chat template does not write" for what in absent)]
    answers_in_all = [message["role"] for message in chat.messages].count("assistant")
    if marks is None or len(chat.answers) < answers_in_all:  # the template marks context-only answers, too
        found = [find_answer(chat, n, whole, tokenizer) for n in chat.answers]
        rows = [(text, [n], [span]) for n, (_, text, span) in zip(chat.answers, found, strict=True)]
        if not all(text.startswith(before) for before, text, _ in found):
            notes.append("the end of the generation prompt, such as an opened <think>")
        if all(whole.startswith(text) and text.startswith(before) for before, text, _ in found):
            rows = [(whole, chat.answers, [span for _, _, span in found])]
    else:
        rows = [(whole, chat.answers, [slice(*mark) for mark in marks if mark[0] < mark[1]])]
    for text, answers, spans in rows:
        parts = [text[span] for span in spans]
        parts = parts if len(parts) == len(answers) else ["".join(parts)] * len(answers)
        complete = [check_answer(chat.messages[n], n + 1, part) for n, part in zip(answers, parts, strict=True)]
        left_out = notes + ([] if all(complete) else ["reasoning that the chat template does not write"])
        segments: list[Segment] = []
        bounds = sorted({0, len(text), *(edge for span in spans for edge in (span.start, span.stop))})
        for start, end in itertools.pairwise(bounds):
            supervised = any(span.start <= start < span.stop for span in spans)
            segments.append({"text": text[start:end], "supervised": supervised})
        yield RenderedRow(segments, left_out, rendered=True)


def render_chat(chat: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> list[RenderedRow]:
    """Apply the chat template: one row or, if it renders a chat differently as it grows, a row for each answer."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template, which chat rows need: pass a --chat_template FILE")
    chat = Conversation(*(escape_special_tokens(part, special_token_pattern(tokenizer)) for part in chat))
    try:
        return list(render_rows(chat, tokenizer))
    except RowError:
        messages = copy.deepcopy(chat.messages)
        for message in messages:  # for templates that expect arguments as JSON text, and no content beside calls
            for call in message.get("tool_calls", ()):
                message["content"] = message["content"] or None
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        with contextlib.suppress(RowError):
            return list(render_rows(chat._replace(messages=messages), tokenizer))
        raise


# Presets: arguments of datasets.load_dataset. Each is in the format of its name.
DATASETS: dict[str, dict[str, str]] = {
    "alpaca": {"path": "tatsu-lab/alpaca"},
    "alpaca-clean": {"path": "yahma/alpaca-cleaned"},
    "chip2": {"path": "laion/OIG", "data_files": "unified_chip2.jsonl"},
    # a script dataset, which datasets >= 4 does not run: its parquet conversion
    "self-instruct": {
        "path": "yizhongw/self_instruct", "revision": "refs/convert/parquet", "data_dir": "self_instruct"},
    "hh-rlhf": {"path": "Anthropic/hh-rlhf"},
    "longform": {"path": "akoksal/LongForm"},
    "oasst1": {"path": "timdettmers/openassistant-guanaco"},
}  # fmt: skip


def renamed_columns(flag: str | None, dataset_format: str | None) -> dict[str, str]:
    """--columns input=question,output=answer: the names that a format has, and those in the data."""
    pairs = [[*map(str.strip, part.split("="))] for part in (flag or "").split(",") if part.strip()]
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(dict(pairs)) < len(pairs):
        raise ConfigError(f"--columns {flag}: expected pairs such as input=question,output=answer, each name once")
    fields = {"category", "source"}.union(*(known.columns + known.optional for known in FORMATS.values()))
    if (unknown := sorted(dict(pairs).keys() - fields)) and not CUSTOM_FORMAT.fullmatch(dataset_format or ""):
        raise ConfigError(f"--columns {flag}: no format has a field {unknown[0]}, but {', '.join(sorted(fields))}")
    return dict(pairs)


def rename_columns(row: Any, names: Mapping[str, str]) -> Any:
    """A row with its columns under the names that its format has."""
    if not isinstance(row, Mapping) or not names:
        return row
    kept = {f"{n} (replaced by {names[n]})" if n in names else n: v for n, v in row.items() if n not in names.values()}
    return kept | {name: row[own] for name, own in names.items() if own in row}


def dataset_shares(flag: str) -> list[tuple[str, float]]:
    """The names in --dataset, each with the share of its rows to train on: `a.jsonl:0.5,b:2` takes all of b twice."""
    shares = []
    for name in [flag] if os.path.exists(flag) else filter(None, re.split(r"\s*,\s*", flag.strip())):
        share = None if os.path.exists(name) else re.fullmatch(r"(.+):(\d*\.?\d+)", name)
        if share and not float(share[2]):
            raise ConfigError(f"--dataset {name}: expected a share such as 0.5, or a number of repeats such as 2")
        shares.append((share[1], float(share[2])) if share else (name, 1.0))
    return shares


# ------------------------------------------------------------------------------------
# 4. Arguments: the command line and a YAML or JSON file -> Config
#
# A flag is one field of its group's dataclass: type, default, help and choices come from there. A renamed or removed
# flag is a row of RENAMED_FLAGS or REMOVED_FLAGS. A rule is a row of VALUE_CHECKS, REQUIRES, MUTUALLY_EXCLUSIVE or
# `conflicts`; all are checked before anything heavy. Nothing later edits a Config.
# ------------------------------------------------------------------------------------
def arg(default: Any, text: str, **options: str) -> Any:
    """A dataclass field with its help text (%% for a percent sign) and argparse's options."""
    return field(default=default, metadata={"help": text, **options})


# fmt: off
@dataclass
class ModelArguments:
    """Model and tokenizer."""
    model_name_or_path: str = arg("EleutherAI/pythia-12b", "Base model: hub id, folder or .gguf file.")
    trust_remote_code: bool = arg(False, "Run Python code that ships with the model or the tokenizer.")
    use_auth_token: bool = arg(False, "Use this machine's hub login, for gated models.")
    adapter_name_or_path: str | None = arg(None, "Adapter to start from, with a fresh optimizer. To resume, rerun.")
    attn_implementation: str | None = arg(None, "Attention implementation: sdpa, eager, flash_attention_2, ...")
    pad_token: str | None = arg(None, "Padding token, from the vocabulary.")
    eos_token: str | None = arg(None, "End-of-sequence token, from the vocabulary.")
    bos_token: str | None = arg(None, "Beginning-of-sequence token, from the vocabulary.")
    unk_token: str | None = arg(None, "Unknown token, from the vocabulary.")
    add_tokens: str | None = arg(None, "Comma-separated new tokens, whose embedding and head rows train too.")
    padding_side: Literal["right", "left"] = arg("right", "Padding side for training; generation always pads left.")
    tokenizer_patch: str | None = arg(None, "Folder of files that override the tokenizer's, for early LLaMA.")
    chat_template: str | None = arg(None, "Jinja file with the chat template, for tokenizers without one.")
    rope_scaling: str | None = arg(None, 'RoPE scaling as JSON, such as {"rope_type": "linear", "factor": 2.0}.')
    cache_dir: str | None = arg(None, "Folder for downloads, converted models and encoded datasets.")


@dataclass
class DataArguments:
    """Data: which rows to read, and how to encode them."""
    dataset: str = arg("alpaca", "Preset, file, folder or hub id, or several: a,b:0.5,c:2 (half of b, c twice).")
    dataset_format: str | None = arg(None, "Format, or path.py:function; default: the preset's, else by columns.")
    columns: str | None = arg(None, "Other names of columns, as input=question,output=answer.")
    as_chat: bool = arg(False, "Render pairs by the tokenizer's chat template, for bases that were trained on chats.")
    expand_conversations: bool = arg(False, "airoboros_chat: one row per assistant turn instead of the last only.")
    include_sources: str = arg("ALL", "Keep rows whose `source` column is in this comma-separated list.")
    eval_dataset: str | None = arg(None, "Evaluate and predict on this dataset, instead of rows of --dataset.")
    eval_dataset_size: float = arg(1024, "Rows to hold out, or a fraction below 1; a tenth of small sets by default.")
    streaming: bool = arg(False, "Read and encode rows during training instead of before it. Needs --max_steps.")
    stream_buffer: int = arg(10_000, "Rows in the stream's shuffle buffer.")
    max_train_samples: int | None = arg(None, "Train on the first N rows after the split; of a stream, N lines.")
    max_eval_samples: int | None = arg(None, "Evaluate and predict on the first N held-out rows.")
    source_max_len: int = arg(1024, "Longest input, in tokens including BOS; truncated on the right.")
    target_max_len: int = arg(256, "Longest output, in tokens including EOS; truncated on the right.")
    model_max_len: int | None = arg(None, "One limit for input and output together, in tokens; replaces those two.")
    skip_excess_length: bool = arg(True, "With model_max_len: drop longer training rows instead of truncating them.")
    on_bad_rows: Literal["stop", "skip"] = arg("stop", "Unusable rows: stop, or skip and list in rejected.jsonl.")
    packing: bool = arg(False, "Pack several examples into rows of the longest length; each attends to itself only.")
    train_on_source: bool = arg(False, "Compute the loss on input tokens too.")
    objective: Literal["auto", "clm", "mlm"] = arg("auto", "Predict the next token or masked ones; auto: by model.")
    mask_prob: float = arg(0.15, "mlm: fraction of tokens to predict, above 0.")
    mask_replace_prob: float = arg(0.8, "mlm: fraction of those that become the mask token.")
    random_replace_prob: float = arg(0.1, "mlm: fraction of those that become a random token; the rest stay.")
    preview: int = arg(0, "Print the first N encoded rows and statistics of the dataset, and exit.")


@dataclass
class QuantisationArguments:
    """Quantisation of the frozen weights."""
    bits: Literal[4, 8, 16, 32] = arg(4, "Bits per base weight.")
    quant_type: Literal["nf4", "fp4"] = arg("nf4", "4-bit data type.")
    double_quant: bool = arg(True, "Quantise the quantisation constants too; saves 0.37 bits per parameter.")
    calibration_rows: int = arg(0, "Rows to choose 4-bit codes and adapters' start by; wants a 4 times lower rate.")
    full_finetune: bool = arg(False, "Train all weights but the embeddings, no adapters. Needs --bits 16 or 32.")
    max_memory_MB: int = arg(80000, "Memory to use on each GPU, in MB, when one process drives all of them.")


@dataclass
class LoraArguments:
    """LoRA."""
    lora_r: int = arg(64, "Rank of the adapters.")
    lora_alpha: float = arg(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = arg(0.0, "Dropout probability on the adapters' input.")
    expert_lora_r: int | None = arg(None, "Rank for each expert; default: lora_r / experts per token, at least 1.")
    lora_modules: str = arg("all", "Layers to adapt: all (linear ones except the head), attn, mlp, or leaf names.")
    lora_bias: Literal["none", "all", "lora_only"] = arg("none", "Bias vectors to train.")
    lora_dtype: Literal["float32", "bfloat16"] = arg("float32", "Data type of the adapter weights.")
    lora_rank_pattern: str | None = arg(None, 'Other ranks for some layers, as JSON: {"layers.0.mlp.down_proj": 8}.')
    lora_alpha_pattern: str | None = arg(None, "Other lora_alpha for some layers, as JSON.")
    use_dora: bool = arg(False, "Weight-decomposed adapters (DoRA).")
    use_rslora: bool = arg(False, "Scale by lora_alpha / sqrt(lora_r).")
    init_lora_weights: str = arg("True", "Initialisation: True (B is zero), gaussian, pissa, olora, orthogonal.")
    modules_to_save: str | None = arg(None, "Comma-separated modules to train in full, e.g. embed_tokens,lm_head.")
    layers_to_freeze: int = arg(0, "Neither adapt nor train the first N layers.")
    layer_freeze_ratio: float = arg(0.0, "layers_to_freeze as a fraction of all layers, below 1.")


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Training: new flags, and flags whose default differs from the Trainer's."""
    output_dir: str = arg("./output", "Folder for adapter, checkpoints, metrics and predictions.")
    do_train: bool = arg(True, "Train.")
    do_predict: bool = arg(False, "Answer the held-out rows with --predict_with_generate, into predictions.jsonl.")
    predict_with_generate: bool = arg(False, "Generate the predictions.")
    max_steps: int = arg(10000, "Optimizer steps; takes precedence over epochs.")
    report_to: str = arg("none", "Trackers: none, all, or some of tensorboard, wandb, trackio, ...", nargs="+")
    debug: str = arg("", "Show tracebacks of errors; with underflow_overflow, the Trainer's check.", nargs="*")
    gradient_checkpointing: bool = arg(True, "Recompute activations in the backward pass when memory requires it.")
    recompute_layers: str = arg("auto", "Layers to recompute: auto (as memory requires), all, none or a number.")
    auto_batch: bool = arg(True, "Regroup a step's rows into the largest micro-batches that fit.")
    fast_path: bool = arg(True, "Fused LoRA, padding-free batches, chunked head, liger-kernel where they fit.")
    offload_activations: bool = arg(False, "Keep inputs of recomputed layers in CPU memory; slow if a step is small.")
    plan: bool = arg(False, "Print the memory that the run needs, in GiB by part, and exit.")
    plan_gpu: str | None = arg(None, "Memory of the GPU to plan for, such as 24GiB; default: that of the GPU here.")
    train_sampling_strategy: Literal["group_by_length", "random", "sequential"] = arg("group_by_length", "Row order.")
    recipe: Literal["modern"] | None = arg(None, "modern: alpha 32, linear decay, learning rate by the model's width.")
    early_stopping_patience: int | None = arg(None, "Stop after N evaluations without a better metric_for_best_model.")
    overwrite_output_dir: bool = arg(False, "Start over in an output_dir that holds a run; removes its checkpoints.")
    working_dir: str | None = arg(None, "Folder for everything but the final weights, their tokenizer and card.")
    final_output_dir: str | None = arg(None, "Folder for the final weights; default: output_dir.")
    merged_output_dir: str | None = arg(None, "Folder for the base with the adapter merged into it, in 16 bit.")
    merge_base: Literal["original", "dequantized"] = arg("original", "Merge into the published or the quantised base.")
    max_shard_size: str = arg("5GB", "Largest file of a merged or fully fine-tuned model.")

    @property
    def device(self) -> torch.device:
        """Without the index that each rank's CPU gets: transformers 5.17 cannot load an optimizer onto cpu:1."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


TRAINER_DEFAULTS: dict[str, Any] = {  # of the Trainer's own flags, where they differ from its defaults
    "optim": "paged_adamw_32bit", "learning_rate": 2e-4, "lr_scheduler_type": "constant", "max_grad_norm": 0.3,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "warmup_steps": 0.03, "logging_steps": 10,
    "save_steps": 250, "save_total_limit": 40, "remove_unused_columns": False,
}
RECIPES: dict[str, dict[str, Any]] = {  # of --recipe: flags that the user did not pass; resolve_recipe adds the rate
    "modern": {"lora_alpha": 32, "lora_modules": "all", "lr_scheduler_type": "linear", "warmup_steps": 0.03},
}


@dataclass
class MMLUArguments:
    """MMLU: multiple-choice questions at each evaluation."""
    do_mmlu_eval: bool = arg(False, "Answer MMLU questions at each evaluation.")
    mmlu_split: Literal["eval", "test"] = arg("eval", "Split of the questions.")
    mmlu_dataset: Literal["mmlu-zs", "mmlu-fs", "mmlu"] = arg("mmlu-fs", "Zero-shot or five-shot (mmlu-fs, mmlu).")
    max_mmlu_samples: int | None = arg(None, "Answer the first N questions.")
    mmlu_source_max_len: int = arg(2048, "Longest prompt, in tokens; truncated on the left.")
    mmlu_dir: str = arg("data/mmlu", "Folder of the original's question files; if absent, the hub's cais/mmlu.")


@dataclass
class GenerationArguments:
    """Generation of predictions; only the flags that are passed reach the model's generate."""
    max_new_tokens: int = arg(256, "Longest prediction, in tokens.")
    min_new_tokens: int | None = arg(None, "Shortest prediction, in tokens.")
    do_sample: bool = arg(False, "Sample instead of taking the likeliest token.")
    num_beams: int = arg(1, "Number of beams in beam search.")
    temperature: float = arg(1.0, "Sampling temperature.")
    top_k: int = arg(50, "Sample from the k likeliest tokens.")
    top_p: float = arg(1.0, "Sample from the likeliest tokens with this total probability.")
    typical_p: float = arg(1.0, "Sample from the most typical tokens with this total probability.")
    repetition_penalty: float = arg(1.0, "Penalty for tokens that already occurred, above 1.")
    length_penalty: float = arg(1.0, "Exponent of the length in beam scores.")
    no_repeat_ngram_size: int = arg(0, "Never repeat an n-gram of this many tokens.")
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
    flags: dict[str, Any]  # every flag by its own name, as resolved; tokens are hidden
    explicitly_set: frozenset[str]  # flags that the user passed
    record: dict[str, Any]  # run.json of the run to repeat, or empty

    @property
    def masked(self) -> bool:
        """Whether masked tokens are predicted; `auto` is resolved once the model's config is known."""
        return self.data.objective == "mlm"


ARGUMENT_GROUPS: tuple[Any, ...] = tuple(f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))

# The current name or, of a boolean that became a choice, `name value_if_true [value_if_false]`; else its default.
RENAMED_FLAGS: dict[str, str] = {
    "evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "mlm_probability": "mask_prob",
    "no_cuda": "use_cpu", "use_auth": "use_auth_token", "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size", "push_to_hub_token": "hub_token",
    "activation_checkpointing": "gradient_checkpointing", "generation_num_beams": "num_beams",
    "group_by_length": "train_sampling_strategy group_by_length random", "adafactor": "optim adafactor",
    "use_flash_attention_2": "attn_implementation flash_attention_2", "adam8bit": "optim paged_adamw_8bit",
}  # fmt: skip
# The flag to suggest for a name that people type, axolotl's and LLaMA-Factory's too, where difflib suggests another.
OTHER_NAMES: dict[str, str] = {name: flag for flag, names in (
    ("model_name_or_path", "model base_model model_id model_dir"), ("learning_rate", "lr"), ("output_dir", "out"),
    ("dataset", "data_path dataset_path train_file"), ("dataset_format", "type dataset_type prompt_template"),
    ("adapter_name_or_path", "adapter lora_model_dir"), ("merged_output_dir", "merge merge_lora export_dir"),
    ("resume_from_checkpoint", "resume checkpoint"), ("gradient_accumulation_steps", "grad_accum grad_acc"),
    ("per_device_train_batch_size", "batch_size train_batch_size micro_batch_size"), ("num_train_epochs", "epochs"),
    ("per_device_eval_batch_size", "eval_batch_size"), ("max_steps", "max_train_steps"), ("lora_r", "r rank lora_rank"),
    ("bits 4", "load_in_4bit qlora use_qlora"), ("bits 8", "load_in_8bit"), ("bits", "quantization_bit quantization"),
    ("lora_modules", "lora_target lora_target_modules target_modules lora_target_linear"),
    ("model_max_len", "sequence_len cutoff_len max_seq_length max_seq_len max_length seq_len context_length"),
    ("bits 32", "fp32"), ("eval_dataset", "eval_file validation_file"), ("quant_type", "bnb_4bit_quant_type"),
    ("lora_r", "use_lora"), ("output_dir", "save_dir"), ("use_auth_token", "token hf_token"), ("weight_decay", "wd"),
    ("double_quant", "bnb_4bit_use_double_quant"), ("modules_to_save", "additional_target"), ("objective", "stage"),
    ("full_finetune", "finetuning_type"), ("max_train_samples", "max_samples"), ("eval_dataset_size", "val_size"),
    ("attn_implementation", "flash_attn flash_attention"), ("report_to", "wandb wandb_project"),
    ("eval_strategy", "evals_per_epoch"), ("save_strategy", "saves_per_epoch"), ("save_steps", "save_every"),
    ("packing", "sample_packing"), ("bf16", "precision"), ("use_cpu", "device"), ("chat_template", "template"),
) for name in names.split()}  # fmt: skip
# Accepted without effect, and why.
IGNORED_FLAGS: dict[str, str] = {name: why for names, why in (
    ("save_safetensors use_fast_tokenizer", "always so"), ("sortish_sampler", "use --train_sampling_strategy"),
    ("auto_find_batch_size", "use --auto_batch, which keeps the effective batch"), ("sharded_ddp", "use --fsdp"),
    ("use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode torchdynamo",
     "use --fast_path"),
    ("hub_strategy hub_always_push", "only the final weights are uploaded"),
    ("enable_jit_checkpoint logging_nan_inf_filter ddp_broadcast_buffers length_column_name label_names "
     "torch_empty_cache_steps include_for_metrics batch_eval_metrics prediction_loss_only eval_do_concat_batches "
     "eval_use_gather_object include_num_input_tokens_seen gradient_checkpointing_kwargs "
     "activation_checkpointing_kwargs average_tokens_across_devices ddp_find_unused_parameters",
     "qlora.py has its own training step and evaluation"),
    ("use_mps_device half_precision_backend fp16_backend use_ipex jit_mode_eval past_index ray_scope tpu_num_cores "
     "fp16_opt_level xpu_backend include_inputs_for_metrics include_tokens_per_second dispatch_batches split_batches "
     "fsdp_min_num_params push_to_hub_model_id push_to_hub_organization", "the Trainer no longer has it"),
) for name in names.split()}  # fmt: skip
# An error each, which says what to do instead.
REMOVED_FLAGS: dict[str, str] = {name: instead for names, instead in (
    ("fused_lora padding_free chunked_head liger", "use --fast_path, on or off as a whole"),
    ("cuda_graphs", "leave it out; --auto_batch makes micro-batches large enough to keep the GPU busy"),
    ("unpacked_layers", "leave it out; free memory decides which weights stay unpacked"),
    ("allow_pickle_weights", "leave it out; .bin weights are always read, but only tensors from them"),
    ("num_beam_groups diversity_penalty penalty_alpha", "leave it out; transformers no longer supports it"),
    ("show_traceback", "use --debug"), ("generation_max_length", "use --max_new_tokens"),
    ("generation_config", "pass its values as flags, e.g. --num_beams 4"),
) for name in names.split()}  # fmt: skip
# Removed flags with the original's default, as its command lines may have them.
HARMLESS = {("num_beam_groups", "1"), ("diversity_penalty", "0.0"), ("penalty_alpha", "None")}
OLD_FLAGS = {"logging_dir", *RENAMED_FLAGS, *IGNORED_FLAGS, *REMOVED_FLAGS}
# Not taken over when a run is repeated: its folders, what deletes, publishes or runs code, what the machine decides.
NOT_REPEATED = frozenset({"output_dir", "working_dir", "final_output_dir", "merged_output_dir", "merge_base", "use_cpu",
    "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token", "trust_remote_code"})  # fmt: skip
OUTPUT_FLAGS = ("output_dir", "working_dir", "final_output_dir", "merged_output_dir")
HUB_TOKEN = re.compile(r"\bhf_(?:\w+_)?[A-Za-z0-9]{20,}")  # some users pass one to --use_auth_token


class OldFlag(argparse.Action):
    """A flag of the tables above."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Set the current flag, say that it has no effect, or raise."""
        name, value, written = self.dest, ",".join(values), str(option)
        if (name, value) in HARMLESS:
            return
        if name in REMOVED_FLAGS:
            raise ConfigError(f"{written}: this flag no longer exists: {REMOVED_FLAGS[name]}")
        if name in IGNORED_FLAGS:
            log.warning("%s: accepted, without effect: %s", written, IGNORED_FLAGS[name])
            return
        if name == "logging_dir":
            os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.expanduser(value)
            log.warning("%s: old name, set as TENSORBOARD_LOGGING_DIR", written)
            return
        current, on, off = [*RENAMED_FLAGS[name].split(), "", ""][:3]
        negated = not written.replace("-", "_").endswith(f"__{name}")
        with reraise_as_user_error(f"{written} {value}", argparse.ArgumentTypeError):
            if negated or on:
                wanted = string_to_bool(value or "True") != negated
                value = (on if wanted else off) if on else str(wanted)
            if name == "warmup_ratio" and not 0 <= float(value) < 1:
                raise ValueError("expected a fraction of the steps, at least 0 and below 1")
        log.warning("%s: old name of --%s %s", written, current, value if on else "")  # it may be a token
        if value or not on:
            parser.parse_args([f"--{current}={value}" if value else f"--{current}"], namespace)


class Parser(HfArgumentParser):
    """HfArgumentParser with a short help, which knows old flags and raises ConfigErrors."""

    everything = False  # whether the help lists the Trainer's other flags

    def format_help(self) -> str:
        """One line for each flag (of --x and --no_x the first): those that most runs need, then the others by group."""
        usage = "usage: python qlora.py [RUN.yaml | RUN.json] --FLAG VALUE ...; --help all adds the Trainer's own flags"
        lines = [str(__doc__).partition("\n")[0], usage]
        actions = {action.dest: action for action in reversed(self._actions) if action.help != argparse.SUPPRESS}
        first = """model_name_or_path dataset output_dir do_train do_eval eval_strategy do_predict predict_with_generate
            bf16 max_steps num_train_epochs learning_rate per_device_train_batch_size gradient_accumulation_steps
            source_max_len target_max_len resume_from_checkpoint seed"""
        groups = {"Start with these; defaults are in brackets": first.split()}
        for group in ARGUMENT_GROUPS:
            own = group.__annotations__.keys() | TRAINER_DEFAULTS
            groups[group.__doc__.rstrip(".")] = [f.name for f in dataclasses.fields(group) if f.name in own]
        groups |= {"The Trainer's other flags": [*reversed(actions)]} if self.everything else {}
        for title, names in groups.items():
            lines += ["", f"{title}:"] if len(names) > 16 else [f"{title}:"]  # 130 lines in all
            for action in (actions.pop(name) for name in names if name in actions):
                text = " ".join(str(action.help).replace("%%", "%").split())
                if len(text) > 90:  # one of the Trainer's: its first sentence
                    text = text.partition(". ")[0].rstrip(".") + "."
                choices = [str(choice) for choice in action.choices or ()]
                if choices and (self.everything or len(choices) < 6):
                    text += f" One of {', '.join(choices)}."
                unsaid = {"True": f" [on; --no_{action.dest}: off]", "False": "", "None": "", "''": ""}
                lines.append(f"  --{action.dest:<28} {text}" + unsaid.get(repr(action.default), f" [{action.default}]"))
        return "\n".join([*lines, ""])

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ConfigError(re.sub(r"^argument |/--[\w-]+(?=:)", "", message))

    def passed_flags(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that these words set, and no others."""
        words = [re.sub("^[–—]+(?=[A-Za-z])", "--", word) for word in argv]
        for typed, word in zip(argv, words, strict=True):
            if typed != word:
                log.warning("%s: read as %s (its dash is not a hyphen)", typed, word)
        unset = object()
        namespace = argparse.Namespace(**dict.fromkeys((action.dest for action in self._actions), unset))
        _, unknown = self.parse_known_args(words, namespace)
        if unknown:
            typed = unknown[0].partition("=")[0]
            if not typed.startswith("-"):
                raise ConfigError(f"{typed}: expected a flag, which begins with --, or a .yaml or .json file first")
            name = typed.lstrip("-").replace("-", "_")
            known = ((option[2:], action.dest) for option, action in self._option_string_actions.items())
            names = [option for option, dest in known if "-" not in option and dest not in OLD_FLAGS]
            nearest = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, names, 1, 0.7)), "")
            raise ConfigError(f"{typed}: unknown flag, {f'did you mean --{nearest}?' if nearest else 'see --help'}")
        passed = {name: value for name, value in vars(namespace).items() if value is not unset}
        # a shell expands ~ neither in --flag=~/x nor after a comma; Windows' backslashes are for re.sub
        home = os.path.expanduser("~/").replace("\\", r"\\")
        return {n: re.sub(r"(?<![^,\s])~/", home, v) if isinstance(v, str) else v for n, v in passed.items()}


def read_config_file(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The flags of a YAML or JSON file as words; of the run.json of a run to repeat, also the whole content."""
    with reraise_as_user_error(str(path)):
        text, is_json = path.read_text(encoding="utf-8"), path.suffix.lower() == ".json"
        content = json.loads(text) if is_json else yaml.safe_load(text)
        # The values as they are written: YAML reads `no` as False and 1_0 as 10.
        literals = content if is_json else yaml.load(text, yaml.BaseLoader)
        pairs = json.loads(text, object_pairs_hook=list) if is_json else getattr(yaml.compose(text), "value", [])
    if not isinstance(content, dict) or len(literals) != len(content):
        found = f"found {type(content).__name__}, or << or names that YAML takes for one"
        raise ConfigError(f"{path}: expected flags as `name: value` lines, {found}")
    if len(pairs) > len(content):
        names = Counter(name if is_json else name.value for name, _ in pairs)
        raise ConfigError(f"{path}: {names.most_common(1)[0][0]} stands there twice")
    record = content if isinstance(content.get("flags"), dict) else {}
    if record:
        known = {f.name for group in ARGUMENT_GROUPS for f in dataclasses.fields(group)} - OLD_FLAGS - NOT_REPEATED
        content = literals = {n: v for n, v in record["flags"].items() if n in known and v not in ("", [])}
        if record["flags"].get("trust_remote_code"):
            log.warning("%s: trust_remote_code is not taken over; pass it here if you trust the model's code", path)
    words = []
    for (name, literal), value in zip(literals.items(), content.values(), strict=True):
        if value is True and name.startswith(("no_", "no-")):  # such a flag takes no value
            words.append(f"--{name}")
        elif value is not None:
            literal = ",".join(map(str, literal)) if isinstance(literal, list) else literal
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else literal}")
    return words, record


def parse_config(argv: Sequence[str]) -> Config:
    """The command line -> a checked Config. A ConfigError names the flag that is unknown, wrong or in conflict."""
    parser = Parser(ARGUMENT_GROUPS, allow_abbrev=False, add_help=False, conflict_handler="resolve")
    parser.set_defaults(**TRAINER_DEFAULTS)
    for action in parser._actions:
        if action.type is string_to_bool:  # a flag of None, True or False, too, may stand alone
            action.nargs, action.const = "?", True
    hidden = argparse.SUPPRESS
    for name in OLD_FLAGS:
        options = {f"--{prefix}{word}" for prefix in ("", "no_", "no-") for word in (name, name.replace("_", "-"))}
        parser.add_argument(*options, dest=name, action=OldFlag, nargs="*", default=hidden, help=hidden)
    if {"-h", "--help"}.intersection(argv):
        parser.everything = "all" in argv
        parser.print_help()
        parser.exit()
    path = argv[0] if argv and re.fullmatch(r"(?is)[^-–—].*\.(yaml|yml|json)", argv[0]) else ""
    words, record = read_config_file(Path(path)) if path else ([], {})
    with reraise_as_user_error(path, ConfigError):  # names the file before its errors
        from_file = parser.passed_flags(words)
    passed = parser.passed_flags(argv[bool(path) :])
    lost = {other for name in passed for other in SUPERSEDED.get(name, ())}  # the command line wins
    other_data = "eval_dataset" in passed or passed.get("dataset") not in (None, from_file.get("dataset"))
    if record and not passed.get("do_train", True) and other_data:  # these select rows of the recorded dataset
        lost |= {"eval_dataset_size", "max_eval_samples", "include_sources", "streaming", "stream_buffer"}
    from_file = {name: value for name, value in from_file.items() if name not in lost}
    given = from_file.keys() & record.get("derived", {}).get("given", ()) if record else from_file.keys()
    explicitly_set = frozenset(passed.keys() | given)
    if record and "output_dir" not in passed:
        raise ConfigError(f"{path}: to repeat this run, pass another folder as --output_dir")
    flags = vars(parser.parse_args([])) | from_file | passed
    flags |= resolve_defaults(flags, explicitly_set)
    check_launcher(flags)
    with reraise_as_user_error("flags"):  # the Trainer's output_dir is --working_dir, if passed
        groups = parser.parse_dict(flags | {"output_dir": flags["working_dir"] or flags["output_dir"]}, True)
    flags["hub_token"] = flags["hub_token"] and "(hidden)"  # never written to a file
    config = Config(*groups, flags, explicitly_set, record)  # type: ignore[call-arg]
    check_config(config)
    if path and not record and Path(path).resolve() == Path(config.training.output_dir, "run.json").resolve():
        raise ConfigError(f"{path}: the run would write its own file of this name there; rename yours")
    return config


def resolve_defaults(flags: Mapping[str, Any], explicitly_set: frozenset[str]) -> dict[str, Any]:
    """Values that depend on other flags or on the machine."""
    gpu, best = torch.cuda.is_available(), flags["early_stopping_patience"] or flags["load_best_model_at_end"]
    best = best or flags["save_strategy"] == "best"
    defaults = (
        ("max_steps", "num_train_epochs" in explicitly_set, -1),
        ("optim", flags["fsdp"], "adamw_torch"),  # bitsandbytes' optimizers cannot update shards
        ("ddp_backend", flags["fsdp"] and gpu, "cuda:nccl,cpu:gloo"),  # the CPU reduces the norm of offloaded gradients
        ("metric_for_best_model", best or flags["lr_scheduler_type"] == "reduce_lr_on_plateau", "loss"),
        # the Trainer knows of losses only that less is better
        ("greater_is_better", str(flags["metric_for_best_model"]).endswith("perplexity"), False),
        ("train_sampling_strategy", flags["streaming"], "random"),  # the order of the stream's shuffle buffer
    )
    derived: dict[str, Any] = {name: v for name, applies, v in defaults if applies and name not in explicitly_set}
    derived |= {n: v for n, v in RECIPES.get(flags["recipe"] or "", {}).items() if n not in explicitly_set}
    derived |= {"use_cpu": flags["use_cpu"] or not gpu, "do_eval": flags["do_eval"] or flags["eval_strategy"] != "no"}
    if isinstance(flags["report_to"], list):
        names = re.split(r"[\s,]+", " ".join(flags["report_to"]))
        derived["report_to"] = names if len(names) > 1 else names[0]
    return derived


def final_folder(config: Config) -> Path:
    """Folder of the final adapter or model, its tokenizer and card; the rest goes to training.output_dir."""
    return Path(config.flags["final_output_dir"] or config.flags["output_dir"])


def hub_options(config: Config) -> dict[str, Any]:
    """Options for every function that may download."""
    return {"cache_dir": config.model.cache_dir, "token": True if config.model.use_auth_token else None}


def rope_parameters(text: str | None) -> dict[str, Any] | None:
    """--rope_scaling as a dictionary; the key `type` of old configs is now `rope_type`."""
    with reraise_as_user_error(f'--rope_scaling {text}: expected JSON like {{"rope_type": "linear", "factor": 2.0}}'):
        return {"rope_type" if k == "type" else k: value for k, value in json.loads(text).items()} if text else None


def parse_pattern(lora: Any, name: str) -> dict[str, Any]:
    """--lora_rank_pattern or --lora_alpha_pattern: names of layers, or regular expressions, and a value for each."""
    text = getattr(lora, f"lora_{name}_pattern")
    kinds = (int,) if name == "rank" else (int, float)
    expected = f'--lora_{name}_pattern {text}: expected JSON such as {{"q_proj": 8}}'
    with reraise_as_user_error(expected, re.error):
        pattern: dict[str, Any] = json.loads(text or "{}")
        if not all(re.compile(layer) and type(v) in kinds and 0 < v < math.inf for layer, v in pattern.items()):
            raise ValueError("values must be above 0, and ranks whole numbers")
    return pattern


SAMPLING_FLAGS = {"temperature", "top_p", "top_k", "typical_p"}  # transformers refuses them without do_sample
GENERATION_FLAGS = {f.name for f in dataclasses.fields(GenerationArguments)} | {"predict_with_generate"}
CAUSAL_ONLY_FLAGS = GENERATION_FLAGS | {"target_max_len", "train_on_source", "padding_side", "chat_template", "as_chat"}
CAUSAL_ONLY_FLAGS |= {"do_mmlu_eval", "add_tokens"}
MASKING_FLAGS = {"mask_prob", "mask_replace_prob", "random_replace_prob"}
MMLU_FLAGS = {f.name for f in dataclasses.fields(MMLUArguments)} - {"do_mmlu_eval"}
LORA_FLAGS = {f.name for f in dataclasses.fields(LoraArguments)}
QUANTISED_INITS = {"true", "false", "gaussian"}  # peft computes the others from weights that are not quantised

# Flags, the values expected of each, and whether a value is one of them.
VALUE_CHECKS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("max_train_samples max_eval_samples source_max_len target_max_len model_max_len max_mmlu_samples "
     "mmlu_source_max_len max_new_tokens per_device_train_batch_size per_device_eval_batch_size "
     "gradient_accumulation_steps lora_r expert_lora_r max_memory_MB stream_buffer early_stopping_patience",
     "at least 1", lambda x: x >= 1),
    ("learning_rate weight_decay max_grad_norm dataloader_num_workers layers_to_freeze preview "
     "neftune_noise_alpha calibration_rows", "0 or more", lambda x: 0 <= x < math.inf),
    ("lora_alpha temperature num_train_epochs", "more than 0", lambda x: 0 < x < math.inf),
    ("lora_dropout layer_freeze_ratio label_smoothing_factor", "at least 0 and below 1", lambda x: 0 <= x < 1),
    ("add_tokens", "tokens with commas between them", lambda x: all(map(str.strip, x.split(",")))),
    ("mask_prob", "above 0 and at most 1", lambda x: 0 < x <= 1),
    ("mask_replace_prob random_replace_prob", "0 to 1", lambda x: 0 <= x <= 1),
    ("seed data_seed", "0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    ("eval_dataset_size", "a number of rows, or a fraction below 1", lambda x: 0 < x < 1 or (x > 0 and x % 1 == 0)),
    ("max_steps", "a number of steps, or -1 with --num_train_epochs", lambda x: x != 0),
    ("resume_from_checkpoint", "a checkpoint's folder; --overwrite_output_dir starts anew",
     lambda x: str(x).lower() != "false"),
    ("optim", "an optimizer that steps after the backward pass", lambda x: not re.search("lomo|layerwise", x)),
    ("debug", "nothing, or underflow_overflow", lambda x: {*x} <= {"", "underflow_overflow", "tpu_metrics_debug"}),
    ("init_lora_weights", "True, False, gaussian, orthogonal, olora, pissa or pissa_niter_N",
     re.compile(r"(?i)true|false|gaussian|orthogonal|olora|pissa(_niter_\d+)?").fullmatch),
    ("recompute_layers", "auto, all, none or a number", re.compile(r"auto|all|none|\d+").fullmatch),
    ("plan_gpu", "a size such as 24GiB", re.compile(r"[1-9]\d*(\.\d+)?GiB").fullmatch),
    ("max_shard_size", "a whole number and KB, MB, GB or TB, as in 5GB", re.compile(r"[1-9]\d*[KMGT]B").fullmatch),
    ("dataset", f"one of {', '.join(DATASETS)}, or data of your own; vicuna was never released",
     lambda x: x.strip(" ,") and "vicuna" not in x.replace(" ", "").split(",")),
    ("dataset_format", f"one of {', '.join(FORMATS)}, or path.py:function with a file that exists",
     lambda x: x in FORMATS or ((custom := CUSTOM_FORMAT.fullmatch(x)) and Path(custom[1]).is_file())),
)  # fmt: skip
# The first flag needs the second, on or with one of these values.
REQUIRES: tuple[tuple[Any, ...], ...] = (
    ("merge_base", "merged_output_dir"), ("skip_excess_length", "model_max_len"), ("stream_buffer", "streaming"),
    ("plan_gpu", "plan"), ("do_mmlu_eval", "do_eval"), ("offload_activations", "gradient_checkpointing"),
    ("full_finetune", "bits", 16, 32), ("fsdp", "bits", 4, 16, 32),
    ("expand_conversations", "dataset_format", "airoboros_chat"), ("calibration_rows", "bits", 4),
    ("streaming", "train_sampling_strategy", "random", "sequential"),
    ("dataloader_persistent_workers", "dataloader_num_workers"),
)  # fmt: skip
MUTUALLY_EXCLUSIVE = (
    ("full_finetune", "adapter_name_or_path"), ("merged_output_dir", "full_finetune"), ("preview", "plan"),
    ("recipe", "full_finetune"), ("add_tokens", "full_finetune"), ("add_tokens", "modules_to_save"),
    ("model_max_len", "source_max_len"), ("model_max_len", "target_max_len"),
    ("eval_dataset", "eval_dataset_size"), ("add_tokens", "calibration_rows"),
    ("layers_to_freeze", "layer_freeze_ratio"), ("overwrite_output_dir", "resume_from_checkpoint"),
    ("streaming", "packing"), ("streaming", "dataloader_num_workers"), ("streaming", "ignore_data_skip"),
)  # fmt: skip

# What a flag on the command line replaces, if a file has it.
SUPERSEDED = {"num_train_epochs": {"max_steps"}, "eval_dataset": {"eval_dataset_size"},
              "model_max_len": {"source_max_len", "target_max_len"},
              "source_max_len": {"model_max_len"}, "target_max_len": {"model_max_len"}}  # fmt: skip


def check_launcher(flags: Mapping[str, Any]) -> None:
    """Rules on accelerate launch and DeepSpeed, which the Trainer's arguments act on as soon as they are built."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not flags.get(precision):
        raise ConfigError(f"mixed_precision {precision} of accelerate launch: set it to no, or pass --bf16 or --fp16")
    for engine in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}") == "true" and not flags[engine]:
            raise ConfigError(f"use_{engine} of accelerate launch: leave it out there, and pass --{engine} here")
    if flags["deepspeed"] and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed: it is not installed here: DS_BUILD_OPS=0 pip install deepspeed")
    if flags["deepspeed"] and not flags["plan"] and "LOCAL_RANK" not in os.environ:
        raise ConfigError("--deepspeed: start it with torchrun --nproc_per_node N qlora.py, N processes")


def check_config(config: Config) -> None:
    """Check every flag and every rule between flags; the first broken one is a ConfigError with the way out."""
    flags, explicitly_set = config.flags, config.explicitly_set
    rope_parameters(config.model.rope_scaling)
    renamed_columns(config.data.columns, config.data.dataset_format)
    for name in ("rank", "alpha"):
        parse_pattern(config.lora, name)
    for names, expected, is_valid in VALUE_CHECKS:
        for name in names.split():
            if flags[name] is not None and not is_valid(flags[name]):
                raise ConfigError(f"--{name} {flags[name]}: expected {expected}")
    for name, other, *values in REQUIRES:
        if name in explicitly_set and flags[name] and not (flags[other] in values if values else flags[other]):
            raise ConfigError(f"--{name} needs --{other} {' or '.join(map(str, values))}".rstrip())
    for name, other in MUTUALLY_EXCLUSIVE:
        if {name, other} <= explicitly_set and flags[name] and flags[other]:
            raise ConfigError(f"--{name} and --{other}: pass only one of them")
    for broken, message in conflicts(config):
        if broken:
            raise ConfigError(message)


FSDP_CONFIG = ("cpu_offload", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "reshard_after_forward",
               "state_dict_type", "cpu_ram_efficient_loading")  # fmt: skip


def unsupported_fsdp(training: Any) -> str:
    """What an --fsdp_config asks for that is not supported, by name and value."""
    settings = training.fsdp_config if training.fsdp else {}
    words = [(name, str(value).lower()) for name, value in settings.items()]
    words = [(n, v) for n, v in words if v not in ("", "false", "0", "none") and (n not in FSDP_CONFIG or "size" in v)]
    return ", ".join(f"{n} {v}" for n, v in words if (n, v) != ("version", "2"))


def conflicts(config: Config) -> list[tuple[Any, str]]:
    """The rules that no table holds: whether each is broken, and the message that says so."""
    flags, training = argparse.Namespace(**config.flags), config.training
    clm, mlm = config.data.objective == "clm", config.masked
    unsuitable = MASKING_FLAGS if clm else CAUSAL_ONLY_FLAGS if mlm else set()
    harmless = ("False", "right")  # a switch that is off, and padding_side's default, ask for nothing
    wrong = sorted(name for name in config.explicitly_set & unsuitable if str(config.flags[name]) not in harmless)
    metrics = ["loss", "perplexity"] + ([] if clm else ["masked_accuracy"])
    metrics += ["mmlu_..."] if flags.do_mmlu_eval else []
    metric = (flags.metric_for_best_model or "loss").removeprefix("eval_")
    epochs = flags.max_steps < 1 or "epoch" in (flags.save_strategy, flags.eval_strategy, flags.logging_strategy)
    shares = [share for _, share in dataset_shares(flags.dataset)]
    own_folders = [Path(p).resolve() for p in (flags.output_dir, flags.working_dir, flags.final_output_dir) if p]
    secret = [name for name, value in config.flags.items() if re.search(r"://[^/@\s]*:[^/@\s]*@", str(value))]
    missing = set(training.report_to or ()) - {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    mismatches = getattr(getattr(training, "hf_deepspeed_config", None), "mismatches", ())
    values = ", ".join(re.sub("^- ds | hf", "", line) for line in mismatches)
    return [
        (not (flags.do_train or flags.do_eval or flags.do_predict or flags.merged_output_dir),
         "nothing to do: pass --do_train, --do_eval, --do_predict or --merged_output_dir"),
        (flags.calibration_rows and (flags.use_dora or flags.lora_rank_pattern)
         and "init_lora_weights" not in config.explicitly_set,
         "--calibration_rows: with DoRA or a rank pattern adapters start at zero: pass --init_lora_weights True"),
        (flags.bits == 8 and flags.use_dora and flags.use_cpu,
         "--use_dora with --bits 8: peft can't compute it on a CPU; pass --bits 4 or 16"),
        (not flags.gradient_checkpointing and flags.recompute_layers not in ("auto", "none", "0"),
         f"--recompute_layers {flags.recompute_layers} needs --gradient_checkpointing"),
        (flags.merged_output_dir and Path(flags.merged_output_dir).resolve() in own_folders,
         f"--merged_output_dir {flags.merged_output_dir}: the run's own folder; name another"),
        (flags.bits < 16 and flags.init_lora_weights.lower() not in QUANTISED_INITS,
         f"--init_lora_weights {flags.init_lora_weights}: needs --bits 16 or 32, weights that are not quantised"),
        (flags.add_tokens and (flags.fsdp or flags.deepspeed),
         "--add_tokens: peft cannot train rows of an embedding that --fsdp or --deepspeed shards"),
        (flags.do_train and flags.early_stopping_patience
         and (flags.eval_strategy == "no" or metric.startswith("mmlu")),
         "--early_stopping_patience needs --eval_strategy steps or epoch, and a metric other than MMLU's"),
        (flags.save_strategy == "best" and flags.eval_strategy == "no",
         "--save_strategy best needs --eval_strategy steps or epoch"),
        (flags.mask_replace_prob + flags.random_replace_prob > 1,
         f"--mask_replace_prob {flags.mask_replace_prob} + --random_replace_prob {flags.random_replace_prob}: above 1"),
        (wrong, f"--{', --'.join(wrong)}: no meaning with --objective {flags.objective}"),
        (clm and flags.do_predict and not flags.predict_with_generate, "--do_predict needs --predict_with_generate"),
        (mlm and flags.dataset_format not in (None, *MASKED_FORMATS),
         f"--dataset_format {flags.dataset_format}: expected input or text with --objective mlm"),
        (flags.streaming and flags.do_train and epochs, "--streaming: a stream has neither length nor epochs: pass "
         "--max_steps, and steps as --save_strategy, --eval_strategy and --logging_strategy"),
        (flags.streaming and (flags.eval_dataset_size < 1 or shares != [1]),
         "--streaming needs one --dataset, such as a folder of files, and --eval_dataset_size as a number of rows"),
        (flags.do_train and metric not in metrics and not ("mmlu_" in metric and flags.do_mmlu_eval),
         f"--metric_for_best_model {metric}: expected {', '.join(metrics)}; MMLU metrics need --do_mmlu_eval"),
        (missing, f"--report_to {', '.join(sorted(missing))}: not installed here, or none of "
         f"{', '.join(INTEGRATION_TO_CALLBACK)}"),
        (getattr(training.accelerator_config, "gradient_accumulation_kwargs", None),
         "--accelerator_config: gradient_accumulation_kwargs would change the loss's scale; leave them out"),
        (secret, f"--{', --'.join(secret)}: a URL with a password, which run.json would show; log in instead"),
        (values, f'--deepspeed {training.deepspeed}: {values}: set these to "auto" in the file'),
        (training.fsdp and re.search(r"8bit|paged|lion|ademamix", flags.optim),
         f"--fsdp: bitsandbytes' --optim {flags.optim} cannot update shards; pass adamw_torch"),
        (unsupported := unsupported_fsdp(training),
         f"--fsdp_config: {unsupported}: not supported, expected version 2 and some of "
         f"{', '.join(FSDP_CONFIG)}; whole layers are sharded, and --recompute_layers all recomputes them"),
    ]  # fmt: skip


def check_folders(config: Config) -> None:
    """Refuse output folders that the run reads, also a checkpoint in one: files could be overwritten or removed."""
    flags, output = config.flags, Path(config.training.output_dir).resolve()
    reads = ["model_name_or_path", "adapter_name_or_path", "tokenizer_patch", "chat_template", "deepspeed",
             "eval_dataset", "resume_from_checkpoint", *(["mmlu_dir"] if config.mmlu.do_mmlu_eval else [])]  # fmt: skip
    removed = re.compile(r"checkpoint-\d+$|left-checkpoint-|\.saving-")  # what a run moves or removes in its folder
    names = {name for name, _ in dataset_shares(config.data.dataset)} - DATASETS.keys()
    sources = [(name, flags[name]) for name in reads] + [("dataset", name) for name in sorted(names)]
    sources = [(name, value) for name, value in sources if value and os.path.exists(value)]
    for flag in OUTPUT_FLAGS:
        folder = Path(flags[flag] or flags["output_dir"]).resolve()
        for place in (folder, *folder.parents):
            if place.is_file():
                raise ConfigError(f"--{flag} {folder}: {place} is a file; name a folder")
            ours = place == folder or place.parent == output or (place / "trainer_state.json").is_file()
            if ours and removed.match(place.name):
                raise ConfigError(f"--{flag} {folder}: {place.name} names a run's checkpoint; name another folder")
        for name, value in sources:
            read = Path(value).resolve()
            read = read if read.is_dir() else read.parent
            inside = read.relative_to(folder).parts if read.is_relative_to(folder) else None  # (): folder itself
            resumes = name == "resume_from_checkpoint"
            own_run = resumes and (folder / "run.json").is_file()  # checkpoint_problem says which checkpoint to pass
            if (inside == () and not own_run) or (inside and not resumes and removed.match(inside[0])):
                raise ConfigError(f"--{flag} {folder}: the run reads --{name} {value} there; name another folder")


@cache
def no_connection() -> str:
    """Why the hub is out of reach, or nothing. Asked once: huggingface_hub would try six times per file, for 43 s."""
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        return ""
    except Exception as error:  # of its HTTP library
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return shorten(error)


def check_base(config: Config) -> None:
    """Check that the base and the adapter to start from are here or on the hub, and that the base is no adapter."""
    model, args = config.model.model_name_or_path, config.training
    for flag, file in ("model_name_or_path", "config.json"), ("adapter_name_or_path", "adapter_config.json"):
        name = config.flags[flag]
        if not name or Path(name).exists():
            continue
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise ConfigError(f"--{flag} {name}: no such folder or file")
        if why := no_connection():
            if not isinstance(huggingface_hub.try_to_load_from_cache(name, file, config.model.cache_dir), str):
                raise ConfigError(f"--{flag} {name}: no such folder, not in the cache, and no connection: {why}")
            log.warning("no connection to the hub (%s): using %s as it is in the cache", why, name)
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file() and not Path(model, "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ConfigError(f"--model_name_or_path {model}: an adapter of {base}; move it to --adapter_name_or_path")
    manifest = Path(config.model.adapter_name_or_path or model, "checkpoint.json")
    if manifest.is_file() and '"adapter start": "calibrated"' in manifest.read_text(encoding="utf-8"):
        raise ConfigError(f"{manifest.parent}: fits the calibrated base of its run only; finish that run")
    if args.push_to_hub and args.do_train and not (args.plan or config.data.preview):
        with reraise_as_user_error("--push_to_hub: log in with `hf auth login`", Exception):
            huggingface_hub.whoami(token=args.hub_token)


def ineffective_flags(config: Config) -> list[tuple[Any, Iterable[str], str]]:
    """Flags that have no effect beside others, which is no error: whether that is so, their names, and why."""
    flags = argparse.Namespace(**config.flags)
    return [
        (flags.bits != 4, {"quant_type", "double_quant"}, f"bits is {flags.bits}"),
        (CUSTOM_FORMAT.fullmatch(flags.dataset_format or ""), {"as_chat"}, "a function writes its rows itself"),
        (flags.full_finetune, LORA_FLAGS - {"layers_to_freeze", "layer_freeze_ratio"}, "there are no adapters"),
        (flags.adapter_name_or_path, LORA_FLAGS - {"lora_dtype", "layers_to_freeze", "layer_freeze_ratio"},
         "the adapter to start from keeps its own shape"),
        (not flags.do_predict, GENERATION_FLAGS, "nothing is generated without --do_predict"),
        (flags.do_predict and not flags.do_sample, SAMPLING_FLAGS, "nothing is sampled without --do_sample"),
        (not flags.do_mmlu_eval, MMLU_FLAGS, "no questions are asked without --do_mmlu_eval"),
        (not (flags.do_eval or flags.do_predict),
         {"eval_dataset", "eval_dataset_size", "max_eval_samples", "per_device_eval_batch_size"},
         "no rows are held out without --do_eval or --do_predict"),
        (flags.eval_strategy == "no", {"eval_steps", "eval_delay"}, "eval_strategy is no"),
        (flags.save_strategy != "steps", {"save_steps"}, f"save_strategy is {flags.save_strategy}"),
        (flags.max_steps > 0, {"num_train_epochs"}, f"max_steps {flags.max_steps} takes precedence"),
        (flags.fsdp or flags.deepspeed, {"offload_activations"}, "an engine recomputes layers as its own flags say"),
        (flags.lr_scheduler_type == "constant", {"warmup_steps"},
         "lr_scheduler_type constant ignores warm-up; constant_with_warmup honours it"),
        (not flags.push_to_hub, {"hub_model_id", "hub_token", "hub_private_repo", "hub_revision"},
         "nothing is uploaded without --push_to_hub; gated downloads take --use_auth_token"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------
# 5. Loading: Config -> Splits of rows as segments
#
# Every row of every file becomes segments, once, in an Arrow cache. A row that can't be used keeps its problem and what
# was read, so that the cache knows it too; drop_bad_rows then stops the run or writes it to rejected.jsonl. What a row
# leaves out is a column of its own, `left_out`, for the log and the preview.
# To read another kind of file: one function that yields (line, row or RowError), and one row of READERS.
# ------------------------------------------------------------------------------------
NumberedRows = Iterator[tuple[int, Any]]  # (line or row number from 1, the row or a RowError)

LONGEST_CELL = 2**27  # characters: a longer one is a quote left open
SPLIT_NAMES = ("eval", "validation", "test")  # for evaluation, in order of preference
SPLITS = {name: name for name in ("train", *SPLIT_NAMES)} | dict.fromkeys(("val", "valid", "dev"), "validation")
SPLITS |= {"training": "train", "testing": "test", "evaluation": "eval"}
REJECTED = "rejected.jsonl"
MERGED = "merged.json"  # in a merged model's folder: what it is the merge of, and run.json of that
OLDEST_EXCHANGES = "the oldest exchanges of a chat that is too long"
DATASETS_ERRORS = (RuntimeError, datasets.exceptions.DatasetsError)  # beside LIBRARY_ERRORS
ROW_FEATURES = datasets.Features(  # of a RenderedRow, and more
    {"segments": [{"text": datasets.Value("string"), "supervised": datasets.Value("bool")}]}
    | {"left_out": [datasets.Value("string")], "lost": datasets.Value("int32"), "rendered": datasets.Value("bool")}
    | dict.fromkeys(("where", "category", "problem", "raw"), datasets.Value("string"))
)


def read_json_lines(stream: Any) -> NumberedRows:
    """JSON lines, or one JSON array, which is read into memory whole."""
    head = list(itertools.islice(stream, 10))  # the first lines may be empty
    lines = itertools.chain(head, stream)
    array = "".join(head).lstrip().startswith("[")
    for number, text in [(1, "".join(lines))] if array else enumerate(lines, start=1):
        try:
            if text.strip():
                yield from enumerate(json.loads(text), start=1) if array else [(number, json.loads(text))]
        except (ValueError, RecursionError) as error:
            expected = "one array of rows" if array else "one object in a line"
            reason = f"not valid JSON: {getattr(error, 'msg', error)}, expected {expected}"
            yield getattr(error, "lineno", 1) if array else number, RowError(reason, None if array else text)


def read_delimited(stream: Any, delimiter: str) -> NumberedRows:
    """CSV or TSV with a header; every cell is text: an empty one is an empty string, and NA is NA."""
    csv.field_size_limit(LONGEST_CELL)  # the default of 128 KiB is shorter than many documents
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header = [cell.strip() for cell in next(filter(None, reader), [])]
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])) and other[0] != delimiter:
        raise ValueError(f"columns are separated by {other[0]!r}, expected {delimiter!r}: {header[0]}")
    if twice := [name for name, n in Counter(header).items() if name and n > 1]:  # Excel leaves several nameless
        raise ValueError(f"the column {twice[0]!r} appears twice in the header")
    cells: list[str] | None = []
    while cells is not None:
        number, wrong = reader.line_num + 1, ""
        try:
            if (cells := next(reader, None)) and len(cells) != len(header):
                wrong = f"{len(cells)} fields, expected {len(header)}: {', '.join(header)}"
        except csv.Error as error:
            cells, wrong = [], f"not valid CSV: {error}".replace("\t", "\\t")
        if wrong:
            lines = f"lines {number} to {reader.line_num}, from a quote on: " if reader.line_num > number else ""
            yield number, RowError(shorten(lines + wrong), cells or None)
        elif cells:  # an empty line has none
            yield number, dict(zip(header, cells, strict=True))


READERS: dict[str, Callable[[Any], NumberedRows]] = {
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson"), read_json_lines),
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".parquet": lambda stream: enumerate(  # a few thousand rows at a time, of the bytes in the buffer
        (drop_nulls(row, True) for part in ParquetFile(stream.buffer).iter_batches(4096) for row in part.to_pylist()), 1
    ),
}
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".zst": lambda path, _: io.BufferedReader(pyarrow.input_stream(path, compression="zstd")),
}


def data_suffix(path: Path) -> str:
    """The suffix that selects the reader, ignoring that of a compressed file."""
    return Path(path.stem if path.suffix.lower() in OPENERS else path.name).suffix.lower()


def read_file(path: Path) -> NumberedRows:
    """The rows of one local file; a ConfigError if it can't be read to its end."""
    open_file = OPENERS.get(path.suffix.lower(), open)
    with reraise_as_user_error(str(path), csv.Error), open_file(path, "rb") as file:
        head = file.peek(1000)[:1000]
        wide = head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) > len(head) // 3
        if wide and data_suffix(path) != ".parquet":
            raise ConfigError(f"{path}: the file is in UTF-16 or UTF-32, expected UTF-8: save it in that encoding")
        # bytes that are not UTF-8 become lone surrogates, which get_text reports with the row they are in
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from READERS[data_suffix(path)](text)


@dataclass(frozen=True)
class RowSource:
    """Raw rows of local files or of the datasets library, as pairs (where, row or RowError)."""

    name: str  # for messages
    files: tuple[Path, ...] = ()
    loaded: Any = None  # a Dataset, or an IterableDataset of the hub
    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)  # names that the format has, and those in the rows
    start: int = 0  # which of the rows that select_rows keeps, as in itertools.islice
    stop: int | None = None

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        numbered = [(str(path), read_file(path)) for path in self.files]
        numbered.append((self.name, enumerate((drop_nulls(row, top=True) for row in self.loaded or ()), start=1)))
        rows = ((f"{name}:{number}", row) for name, part in numbered for number, row in part)
        with reraise_as_user_error(self.name, *DATASETS_ERRORS):
            yield from rows

    def fingerprint(self) -> str:
        """Changes with the content; that of a stream with its first rows."""
        own = getattr(self.loaded, "_fingerprint", None)
        content = [f"{path}:{file_digest(path)}" for path in self.files] or own or list(itertools.islice(self, 100))
        return digest(self.name, self.format, content, self.start, self.stop)


class Splits(NamedTuple):
    """The rows of a run: segments at first, encoded later. With --streaming the training rows stay a RowSource."""

    train: Any | None
    eval: Any | None


def digest(*parts: Any) -> str:
    """A short hash of the parts' text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A short hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


CODE_VERSION = file_digest(Path(__file__))  # rows that another version of this file encoded are encoded again


def find_splits(name: str, config: Config) -> dict[str, RowSource]:
    """A dataset's splits by name, before any row is read: a preset, a file, a folder or a hub id."""
    path = Path(name)
    if name in DATASETS:
        return load_from_hub(config, **DATASETS[name])
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):  # written by save_to_disk
        with reraise_as_user_error(name):
            return as_sources(str(path), datasets.load_from_disk(path))
    if path.exists():
        return find_files(name, path, config)
    if data_suffix(path) in READERS:
        raise ConfigError(f"{name}: no such file")
    return load_from_hub(config, name)


def load_from_hub(config: Config, path: str, **options: Any) -> dict[str, RowSource]:
    """All splits of a dataset on the hub."""
    hub = f"no connection to the hub: {why}" if (why := no_connection()) else "the hub does not give it"
    options |= hub_options(config) | ({"streaming": True} if config.data.streaming else {})
    with reraise_as_user_error(f"dataset {path}: no local file of that name, and {hub}", *DATASETS_ERRORS):
        return as_sources(path, datasets.load_dataset(path, **options))


def split_named(name: str) -> str:
    """The split that a word of a file's or split's name stands for; empty if there is none, or several."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)  # also of gsm8kTrain
    found = {SPLITS.get(word.lower().removesuffix("set"), "") for word in words} - {""}  # also of testset
    return found.pop() if len(found) == 1 else ""


def as_sources(name: str, loaded: Any) -> dict[str, RowSource]:
    """The splits that the datasets library loaded, by their own names and by those that SPLITS gives them."""
    sources: dict[str, RowSource] = {}
    for split, rows in (loaded if isinstance(loaded, dict) else {"train": loaded}).items():
        rows = rows.with_format(None)  # a saved set_format hides columns
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):  # which nothing reads
                rows = rows.cast_column(column, dataclasses.replace(feature, decode=False))
        sources[split] = RowSource(f"{name}[{split}]", loaded=rows)
    named = {split_named(split) or split: source for split, source in reversed(sources.items())}
    return sources | named | sources  # in the order of the dataset


def find_files(name: str, path: Path, config: Config) -> dict[str, RowSource]:
    """The splits of a local file, or of a folder. Its sub-folders are read only if it has no data file of its own."""
    files = [path]
    if path.is_dir():
        visible = sorted(f for f in path.rglob("*") if f.is_file() and "/." not in f"/{f.relative_to(path).as_posix()}")
        data = [f for f in visible if data_suffix(f) in READERS and not f.name.startswith("dataset_info")]
        files = [file for file in data if file.parent == path] or data
        for flag in OUTPUT_FLAGS if files is data else ():
            if (value := config.flags[flag]) and Path(value).resolve().is_relative_to(path.resolve()):
                raise ConfigError(f"--{flag} {value}: the run reads sub-folders of {path}; name a folder outside")
        card = (path / "README.md").read_text("utf-8", "replace") if path / "README.md" in visible else ""
        if re.match(r"---\n(?:(?!---).*\n)*configs:", card):  # of the hub
            log.warning("%s: the configs in its README.md are not used: name the files of one of them", path)
        if unread := [str(file.relative_to(path)) for file in visible if file not in files]:
            log.info("%s: not read: %s", path, shorten(", ".join(unread)))
    splits: dict[str, tuple[Path, ...]] = defaultdict(tuple)
    for file in files:
        splits[split_named(file.relative_to(path).as_posix())] += (file,)
    if not splits or data_suffix(files[0]) not in READERS:
        raise ConfigError(f"{path}: no data, expected {', '.join(READERS)}, also .gz or .zst, or save_to_disk's files")
    if "" in splits and len(splits) > 1:
        others = ", ".join(file.name for file in splits[""])
        raise ConfigError(f"{path}: {others} beside files named after splits: name all train, eval, ..., or none")
    return {s or "train": RowSource(f"{name}[{s}]" if s else name, files) for s, files in splits.items()}


def choose_format(name: str, source: RowSource, config: Config) -> RowSource:
    """The rows of a dataset with their format: the flag, the preset's own, or the first whose columns are all there."""
    rows = (row for _, row in source if isinstance(row, Mapping) and not INVALID_TEXT.search("".join(row)))
    first = [*itertools.islice(rows, 100)]
    own = sorted({column for row in first for column in row})  # a JSON line may omit some
    if not own:
        where, row = next(iter(source), (source.name, RowError("no row in it")))
        with reraise_as_user_error(where):  # a RowError is a ValueError
            check_row(row)
    asked = renamed_columns(config.data.columns, config.data.dataset_format)
    names = asked if {*own}.intersection(asked.values()) else {}  # a dataset with none of them is used as it is
    columns = rename_columns(dict.fromkeys(own), names).keys()
    candidates = MASKED_FORMATS if config.masked else tuple(name for name, f in FORMATS.items() if f.inferred)
    named = config.data.dataset_format or (name if name in DATASETS and not config.masked else None)
    chosen = named or next((known for known in candidates if columns >= {*FORMATS[known].columns}), None)
    missing = sorted({*get_format(chosen, config.data.as_chat).columns} - columns) if chosen else []
    found = f"{source.name}: found the columns {shorten(', '.join(own) or '(none)')}"
    absent = [column for column in asked.values() if column not in own]
    if absent and (names or missing or not chosen):
        raise ConfigError(f"{found}, but none is called {absent[0]}, which --columns names")
    if chosen is None:
        needed = {", ".join(sorted(FORMATS[known].columns)): known for known in candidates}
        nearest = (needed[text] for text in difflib.get_close_matches(", ".join(columns), needed, n=2, cutoff=0))
        needs = " or ".join(f"{', '.join(FORMATS[known].columns)} ({known})" for known in nearest)
        way = "--columns input=question says what yours are called"
        way += "" if config.masked else ", --dataset_format path.py:function converts rows"
        way += "" if config.training.do_train else "; to predict without training, the answers may be any text"
        raise ConfigError(f"{found}, which fit no format; the nearest need {needs}; {way}")
    if missing:
        raise ConfigError(f"{found}, the format {chosen} needs {', '.join(missing)}; others: {', '.join(FORMATS)}")
    said = "" if named else ", inferred from columns"
    said += "; it has none of the columns that --columns names" if absent else ""
    log.info("%s: format %s%s", source.name, chosen, said)
    if chosen == "hh-rlhf":
        asks = [name for name in ("question", "instruction", "query", "input") if name in columns]
        chats = any(isinstance(row.get(names.get("chosen", "chosen")), list) for row in first)  # with their questions
        if asks and "prompt" not in columns and not (named or chats):
            renamed = ",".join(map("=".join, (asked | {"prompt": names.get(asks[0], asks[0])}).items()))
            way = f"--columns {renamed} makes it the prompt, --dataset_format hh-rlhf leaves it out"
            raise ConfigError(f"{found}, but hh-rlhf's prompt is a column `prompt`; {way}")
        log.info("%s: preferences: this is fine-tuning on the chosen answers, without the rejected ones", source.name)
    if CUSTOM_FORMAT.fullmatch(chosen):
        log.info("its rows are cached: if it reads other files and they change, pass another --cache_dir")
    return dataclasses.replace(source, format=chosen, columns=names)


class Limits(NamedTuple):
    """The most tokens that a row may have."""

    source: int  # prompt with BOS
    target: int  # completion with EOS
    total: int | None = None  # both together; replaces the other two

    @property
    def longest(self) -> int:
        """Of a row, and of a pack."""
        return self.total or self.source + self.target

    def prompt(self, completion: int) -> int:
        """The longest prompt beside `completion` tokens; under one limit for both, a quarter of it at least."""
        return self.source if self.total is None else max(self.total - completion, self.total // 4)


Tokens = list[tuple[int, int]]  # ids and labels


def with_labels(ids: Iterable[int], supervised: bool) -> Tokens:
    """Ids with their labels: themselves if they are supervised, or IGNORE, as for a prompt."""
    return [(i, i if supervised else IGNORE) for i in ids]


def length_limits(config: Config) -> Limits:
    """The limits that the flags set."""
    data = config.data
    return Limits(data.source_max_len, 0 if config.masked else data.target_max_len, data.model_max_len)


def tokenize_rendered(rows: list[list[Segment]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Tokens]]:
    """Tokens of each segment of rows that are tokenised as one text; a token in two segments goes to the second."""
    if not tokenizer.is_fast:
        raise ConfigError("chats and segments need a tokenizer with character offsets, which a tokenizer.json gives")
    ends, bos, eos = BOS_MARK + EOS_MARK, tokenizer.bos_token_id, tokenizer.eos_token_id
    added = tokenizer.added_tokens_decoder
    texts = ["".join(segment["text"] for segment in row).strip(ends) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True)
    for row, text, ids, offsets in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        segment_of = [number for number, segment in enumerate(row) for _ in segment["text"].strip(ends)]  # by character
        tokens: list[Tokens] = [[] for _ in row]
        for i, (start, end) in zip(ids, offsets, strict=True):
            if text[start:end] == ESCAPE_MARK:
                continue
            if i in added:  # Phi-3's <|assistant|> swallows white space that follows, which belongs to the answer
                end = start + (len(text[start:end].rstrip()) or end - start)
            last_character = max(end, 1) - 1  # of a token without characters, the one before it
            first, last = segment_of[min(start, last_character)], segment_of[last_character]
            tokens[last] += with_labels([i], row[first]["supervised"] or row[last]["supervised"])
        if row[0]["text"].startswith(BOS_MARK) and bos is not None:
            tokens[0][:0] = with_labels([bos], row[0]["supervised"])
        if row[-1]["text"].endswith(EOS_MARK):
            tokens[-1] += with_labels([eos], row[-1]["supervised"])
        yield tokens


def last_supervised(segments: Sequence[Segment]) -> int:
    """The segment with which the completion begins: the first of the last supervised ones in a row."""
    found = re.search("1+0*$", "".join("01"[segment["supervised"]] for segment in segments))
    return found.start() if found else 0


def prompt_fits(row: RenderedRow, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> bool:
    """Whether the prompt of a chat's last answer is within the limits."""
    last, sizes = last_supervised(row.segments), [len(segment["text"].encode()) for segment in row.segments]
    if sum(sizes[:last]) > limits.prompt(sum(sizes[last:])):  # a token has a byte at least
        sizes = [len(tokens) for tokens in next(tokenize_rendered([row.segments], tokenizer))]
    return sum(sizes[:last]) <= limits.prompt(sum(sizes[last:]))


def render_within(chat: Conversation, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Iterator[RenderedRow]:
    """The rows of a chat. One with too long a prompt is rendered without its oldest exchanges; the last one stays."""
    rows = render_chat(chat, tokenizer)
    for answer, row in zip(chat.answers[-len(rows) :], rows, strict=True):
        first, *later = [n for n, message in enumerate(chat.messages[:answer]) if message["role"] == "user"]
        if later and not prompt_fits(row, tokenizer, limits):
            shorter = []  # the chat without its oldest exchange, without its two oldest, ...
            for user in later:
                answers = [answer] if len(rows) > 1 else chat.answers
                kept = [n - user + first for n in answers if n >= user]
                messages = chat.messages[:first] + chat.messages[user : answer + 1]
                shorter.append(chat._replace(messages=messages, answers=kept))
            # the prompt's length depends on the last answer alone; the shortest is taken even if it does not fit
            alone = [part._replace(answers=part.answers[-1:]) for part in shorter[:-1]]
            fits = lambda part: prompt_fits(render_chat(part, tokenizer)[0], tokenizer, limits)  # noqa: E731
            short = render_chat(shorter[bisect.bisect_left(alone, True, key=fits)], tokenizer)[-1]
            both = tokenize_rendered([row.segments, short.segments], tokenizer)
            whole, rest = (sum(map(len, tokens)) for tokens in both)
            row = short._replace(left_out=[*short.left_out, OLDEST_EXCHANGES], lost=whole - rest)
        yield row


def check_row(row: Any) -> Mapping[str, Any]:
    """Raise the reader's RowError, or one for what is not an object."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is a {type(row).__name__}, expected an object with fields")
    if INVALID_TEXT.search("".join(row)):
        raise RowError("a field's name is not UTF-8, expected UTF-8 (is the file in Latin-1 or UTF-16?)")
    return row


def select_rows(source: RowSource, data: DataArguments) -> Iterator[dict[str, Any]]:
    """The rows of --include_sources, renamed; with --expand_conversations one for each answer of a valid chat."""
    wanted = {name.strip() for name in data.include_sources.split(",")}
    found = False
    kept = ((where, rename_columns(row, source.columns)) for where, row in source)
    if wanted != {"ALL"}:
        kept = (pair for pair in kept if not isinstance(pair[1], Mapping) or str(pair[1].get("source")) in wanted)
    for where, row in itertools.islice(kept, source.start, source.stop):
        found = True
        rows = [row]
        with contextlib.suppress(RowError):  # normalize_rows reports it
            if data.expand_conversations and parse_airoboros_chat(check_row(row)):
                turns, roles = get_list(row, "conversations"), get_messages(row, "conversations")
                ends = [end for end, turn in enumerate(roles, start=1) if turn["supervised"]]
                rows = [{**row, "conversations": turns[:end]} for end in ends]
        yield from ({"where": where, "row": row} for row in rows)
    if not found:
        which = "" if wanted == {"ALL"} else f" has a source in --include_sources {data.include_sources}"
        after = f" after the {source.start} held out (--eval_dataset_size)" if source.start else ""
        raise ConfigError(f"{source.name}: no row{after}{which}")


def normalize_rows(where: str, row: Any, dataset_format: DatasetFormat, tokenizer: Any, limits: Limits) -> list[Any]:
    """A raw row as ROW_FEATURES, a chat as one or several; a bad one has no segments but a problem, and its JSON."""
    normal = dict.fromkeys(("category", "problem", "raw"), "") | {"where": escape_control_chars(where)}
    try:
        parsed = dataset_format.parse(check_row(row))
        answers = {"completion", "messages", "conversations"}.intersection(dataset_format.columns)
        marks = ("kto_tag", "label") if answers else ("kto_tag",)  # elsewhere a label may be a class
        undesirable = [mark for mark in marks if str(row.get(mark)).lower() == "false"]  # a CSV has text
        if undesirable and dataset_format.columns:
            what = f"field {undesirable[0]!r} is false, expected no answer that is marked as undesirable"
            raise RowError(f"{what}; drop the column if it means something else")
        if isinstance(parsed, Conversation):
            rows = list(render_within(parsed, tokenizer, limits))
        elif isinstance(parsed, JoinedSegments):
            rows = [RenderedRow(join_segments(parsed, tokenizer), [], rendered=True)]
        else:
            rows = [RenderedRow(parsed, [])]
        normal["category"] = escape_control_chars(str(row.get("category") or row.get("source") or ""))
        beside = BESIDE_CHATS if isinstance(parsed, Conversation) else ()
        used = {"", *dataset_format.columns, *dataset_format.optional, *beside}  # pandas' index has no name in a CSV
        used |= {name for name in ("category", "source") if len(str(row.get(name))) < 100}  # else they are no labels
        unused = sorted(escape_control_chars(n) for n, value in row.items() if n not in used and value is not None)
        for segments, left_out, *_ in rows:
            left_out.extend(unused if dataset_format.columns else ())  # a user's own function may use all of them
            if not any(segment["supervised"] and segment["text"].strip(MARKS).strip() for segment in segments):
                column = "".join(dataset_format.columns[-1:]) or "output"
                raise RowError(f"field {column!r}: the output is empty, expected something to learn")
            "".join(segment["text"] for segment in segments).encode()  # Arrow refuses what is not UTF-8
        return [normal | rendered._asdict() for rendered in rows]
    except (RowError, UnicodeEncodeError) as error:
        problem = shorten(error) if isinstance(error, RowError) else "not valid UTF-8 (is the file in Latin-1?)"
        raw = json.dumps(row.raw if isinstance(row, RowError) else row, default=str)
        return [normal | RenderedRow([], [])._asdict() | {"problem": problem, "raw": raw}]


def load_rows(source: RowSource, config: Config, tokenizer: Any, limit: int | None = None) -> Any:
    """The good rows of a split as an Arrow dataset, from the cache if the same content was read before."""
    data, custom = config.data, CUSTOM_FORMAT.fullmatch(source.format)
    dataset_format, limits = get_format(source.format, data.as_chat), length_limits(config)
    normalize = partial(normalize_rows, dataset_format=dataset_format, tokenizer=tokenizer, limits=limits)
    depends: list[Any] = [source.fingerprint(), custom and file_digest(Path(custom[1])), limit]
    depends += [data.columns, data.expand_conversations, data.include_sources, data.as_chat]
    if tokenizer:
        template = str(tokenizer.chat_template or "")
        today = "strftime_now" in template and getattr(tokenizer, "template_date", None)
        depends += [template, tokenizer.special_tokens_map, special_token_pattern(tokenizer).pattern, today]
        if template and tokenizer.is_fast:  # chats that are too long are cut by their tokens
            depends += [limits, tokenizer.backend_tokenizer.to_str()]
    options = {"cache_dir": config.model.cache_dir, "fingerprint": digest("rows", CODE_VERSION, *depends)}
    try:
        normal = (row for raw in itertools.islice(select_rows(source, data), limit) for row in normalize(**raw))
        rows = datasets.Dataset.from_generator(lambda: normal, ROW_FEATURES, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    # with this info alone: the library's own, of which a fingerprint is made too, differs once the rows are cached
    info = datasets.DatasetInfo(description=source.format)  # which token_statistics reads
    rows = datasets.Dataset(rows.data, info, fingerprint=options["fingerprint"])
    log.info("%s: %d rows", source.name, len(rows))
    if counts := Counter(what for left_out in rows["left_out"][:] for what in left_out):
        some = lambda n: f" (in {n} of {len(rows)} rows)" if n < len(rows) else ""  # noqa: E731
        said = [what + some(n) for what, n in sorted(counts.items())]
        log.info("%s: left out: %s", source.name, shorten(", ".join(said)))
    chats = len({where for where, rendered in zip(rows["where"][:], rows["rendered"][:], strict=True) if rendered})
    if chats < (answers := sum(rows["rendered"][:])):
        log.info("%s: %d chats became %d rows: the template rewrites earlier turns", source.name, chats, answers)
    return drop_bad_rows(rows, config)


def run_record(folder: Path) -> dict[str, Any]:
    """run.json of the run whose folder, checkpoint or merged model this is, or an empty one."""
    for place in (folder, folder.parent) if re.fullmatch(r"checkpoint-\d+", folder.name) else (folder,):
        for file in filter(Path.is_file, (place / "run.json", place / MERGED)):
            content = read_json(file)
            record = content.get("run", content) if isinstance(content, dict) else {}
            if isinstance(record, dict) and isinstance(record.get("flags"), dict):  # else another program's
                return record
    return {}


def choose_sources(
    config: Config, training: bool, evaluating: bool
) -> tuple[list[tuple[RowSource, float]], list[RowSource]]:
    """The splits to train on, each with its share, and to evaluate on. With none of these, rows are held out."""
    opened = [(name, share, find_splits(name, config)) for name, share in dataset_shares(config.data.dataset)]
    other = config.data.eval_dataset
    candidates = [(other, 1.0, find_splits(other, config))] if other and evaluating else opened
    evaluated: list[RowSource] = []
    for name, _, sources in candidates if evaluating else ():
        wanted = (*SPLIT_NAMES, *sources) if other else SPLIT_NAMES  # without them, all of the other dataset
        if split := next((split for split in wanted if split in sources), None):
            evaluated.append(choose_format(name, sources[split], config))
    trained: list[tuple[RowSource, float]] = []
    for name, share, sources in opened if training or not evaluated else ():
        if "train" in sources:
            trained.append((choose_format(name, sources["train"], config), share))
        elif config.training.do_train or not evaluated:
            raise ConfigError(f"{name}: no split named train, found {', '.join(sources) or 'none'}")
    read = {source.name for source in (*(source for source, _ in trained), *evaluated)}
    if unused := {source.name for _, _, sources in opened for source in sources.values()} - read:
        log.info("not read: %s", ", ".join(sorted(unused)))
    return trained, evaluated


def load_splits(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> Splits:
    """Rows to train and to evaluate on, of every dataset named. Chats need the tokenizer."""
    clear_rejected(config)
    record = find_training(config)
    config = as_held_out(config, record)
    args, data = config.training, config.data
    evaluating = args.do_eval or args.do_predict
    # without training, a merged model is compared on rows, and a base calibrated on them
    training = bool(args.do_train or config.quant.calibration_rows or (args.merged_output_dir and not evaluating))
    sources, eval_sources = choose_sources(config, training, evaluating)
    holds_out = evaluating and not eval_sources
    if data.streaming:
        size = int(data.eval_dataset_size) if holds_out else 0  # the first rows
        eval_sources += [dataclasses.replace(sources[0][0], stop=size)] if holds_out else []
        stop = size + data.max_train_samples if data.max_train_samples else None
        stream = dataclasses.replace(sources[0][0], start=size, stop=stop) if training and sources else None
        parts = [load_rows(part, config, tokenizer, data.max_eval_samples) for part in eval_sources]
        splits = Splits(stream, concatenate(parts))
    else:
        rows, times = load_shares(sources, config, tokenizer)
        evaluated = concatenate([load_rows(source, config, tokenizer) for source in eval_sources])
        train: Sequence[int] = range(len(times))
        if holds_out:
            asked = args.do_train or "eval_dataset_size" in config.explicitly_set
            asked |= held_rows_out(record) or bool(config.quant.calibration_rows and not config.record)
            train, held_out = train_eval_split(rows, config) if asked else ([], train)
            evaluated = rows.select(held_out)
        if training and train:  # rows are repeated only now, so that no copy of a held-out row is trained on
            repeated = [i for turn in range(max(times)) for i in train if times[i] > turn]
            rows = rows.select(first := repeated[: data.max_train_samples])
            if len(first) < len(repeated):
                log.info("max_train_samples: the first %d of %d rows", len(first), len(repeated))
        if evaluated:
            evaluated = evaluated.select(range(len(evaluated))[: data.max_eval_samples])
        splits = Splits(rows if training and train else None, evaluated)
    if holds_out and record:
        check_held_out(splits.eval, record, config)
    return splits


def concatenate(parts: list[Any]) -> Any:
    """The rows of several datasets, or None."""
    return datasets.concatenate_datasets(parts) if parts else None


def find_training(config: Config) -> dict[str, Any]:
    """run.json of the model to evaluate, if it was trained on one of these datasets, or an empty one."""
    args, model = config.training, config.model
    picked = str(args.resume_from_checkpoint)
    trained = model.adapter_name_or_path or (picked if os.path.isdir(picked) else args.output_dir)
    now = {os.path.realpath(name) for name, _ in dataset_shares(config.data.dataset)}
    for folder in (trained, model.model_name_or_path) if not args.do_train else ():
        record = run_record(Path(str(folder)))
        flags = record.get("flags", {})
        own = {os.path.realpath(name) for name, _ in dataset_shares(str(flags.get("dataset", "")))}
        if flags.get("do_train") and now & own:
            return record
    return {}


def held_rows_out(record: Mapping[str, Any]) -> bool:
    """Whether a run held out rows of its dataset."""
    flags = record.get("flags", {})
    return bool(flags.get("do_eval") or flags.get("do_predict")) and not flags.get("eval_dataset")


def as_held_out(config: Config, record: dict[str, Any]) -> Config:
    """The flags to evaluate with: as many rows are held out as by the run of this record, if no flag says how many."""
    if "eval_dataset_size" in config.explicitly_set or not held_rows_out(record):
        return config
    given = {"eval_dataset_size"}.intersection(record.get("derived", {}).get("given", ()))
    data = dataclasses.replace(config.data, eval_dataset_size=record["flags"]["eval_dataset_size"])
    return dataclasses.replace(config, data=data, explicitly_set=config.explicitly_set | given)


def held_out_places(rows: Any) -> list[str]:
    """File and line of the first eight held-out rows: another size or order of the dataset has others."""
    return [place.rpartition("/")[2] for place in rows[:8]["where"]]


def check_held_out(rows: Any, record: dict[str, Any], config: Config) -> None:
    """Warn if the run to evaluate did not hold out these rows of its dataset: another size, or rows that were added."""
    flags, derived, size = record["flags"], record.get("derived", {}), "eval_dataset_size"
    same = flags.get(size) == config.data.eval_dataset_size
    same &= (size in derived.get("given", ())) == (size in config.explicitly_set)  # the default may mean a tenth
    pairs = zip(derived.get("held out", ()), held_out_places(rows), strict=False)  # an earlier version wrote none
    if not (held_rows_out(record) and same and all(old == new for old, new in pairs)):
        what = f"{flags.get('output_dir', 'the model')} was trained on these rows, or some of them"
        log.warning("--dataset %s: %s", config.data.dataset, what)


def load_shares(sources: list[tuple[RowSource, float]], config: Config, tokenizer: Any) -> tuple[Any, list[int]]:
    """The rows that the shares in --dataset take, the same ones each time, and how often each is to be trained on."""
    parts, all_times = [], list[int]()
    for source, share in sources:
        rows = load_rows(source, config, tokenizer)
        total = max(1, round(share * len(rows)))
        once_more = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)) < total % len(rows)
        times = (once_more + total // len(rows)).tolist()
        if share != 1:
            log.info("%s: a share of %g: %d of %d rows", source.name, share, total, len(rows))
        parts.append(rows.select([i for i, n in enumerate(times) if n]))
        all_times += filter(None, times)
    return concatenate(parts), all_times


def train_eval_split(rows: Any, config: Config) -> tuple[Sequence[int], Sequence[int]]:
    """Hold rows out as datasets' train_test_split does with the original's seed; rows of one chat stay together."""
    categories, places = rows["category"][:], rows["where"][:]
    size = config.data.eval_dataset_size
    order = numpy.random.default_rng(42).permutation(len(rows)).tolist()
    chats = list({places[i]: i for i in order}.values())  # one row of each; a plain row is its own
    total = len(chats)
    if "eval_dataset_size" not in config.explicitly_set and total < 4 * size:
        size = max(1, total // 10)
        log.info("a tenth of %d rows, %d, is held out; --eval_dataset_size sets another number", total, size)
    count = math.ceil(size if size >= 1 else size * total)
    if config.training.do_train and count >= total:
        raise ConfigError(f"--eval_dataset_size {size:g} leaves nothing to train on: the dataset has {total} rows")
    if count >= total:
        return [], range(len(rows))
    if any(categories):  # evenly spaced: each gives its share, and one with a single row breaks nothing
        chats.sort(key=categories.__getitem__)
        chats = [chats[(2 * n + 1) * total // (2 * count)] for n in range(count)]
    held_out = {places[i] for i in chats[:count]}
    train = range(len(rows)) if config.training.train_sampling_strategy == "sequential" else order
    return [i for i in train if places[i] not in held_out], [i for i in order if places[i] in held_out]


def drop_bad_rows(rows: Any, config: Config) -> Any:
    """The rows without a problem, at least one; others stop the run or go to rejected.jsonl."""
    problems = rows["problem"][:]
    if bad := [i for i, problem in enumerate(problems) if problem]:
        reject(list(rows.select(bad)), len(rows), config)
        rows = rows.select([i for i, problem in enumerate(problems) if not problem])
    if not len(rows):
        raise ConfigError(f"--dataset {config.data.dataset}: no row in it that can be used")
    return rows


def clear_rejected(config: Config) -> None:
    """Remove rejected.jsonl, unless this run goes on with it: a stream does not read its first rows again."""
    args, output = config.training, Path(config.training.output_dir)
    rejected_lines.cache_clear()
    # the folder may hold another run, at which this one will stop: its file stays
    kept = () if args.overwrite_output_dir else (*output.glob("checkpoint-*"), *output.glob("completed"))
    if args.process_index == 0 and not (config.data.streaming or config.data.preview or kept):
        (output / REJECTED).unlink(missing_ok=True)


@lru_cache(maxsize=1)
def rejected_lines(file: Path) -> set[str]:
    """What the file holds from an earlier pass over a stream, before a resume, or from the previewed run; read once."""
    return set(file.read_text(encoding="utf-8").splitlines(keepends=True)) if file.is_file() else set()


def reject(rows: Sequence[Mapping[str, Any]], total: int, config: Config) -> None:
    """Stop the run at bad rows, or write those that are not there yet to rejected.jsonl."""
    first = "{where}: {problem}".format(**rows[0])
    file = Path(config.training.output_dir, REJECTED)
    if config.data.on_bad_rows == "stop":
        more = f" (and {len(rows) - 1} more such rows)" if len(rows) > 1 else ""
        raise ConfigError(f"{first}{more}; --on_bad_rows skip leaves them out")
    entries = [{"where": r["where"], "reason": r["problem"], "row": json.loads(r.get("raw") or "null")} for r in rows]
    lines = [json.dumps(entry) + "\n" for entry in entries]
    new = [line for line in lines if line not in rejected_lines(file)]
    if new and config.training.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(new)
        log.warning("%d of %d rows left out, the first: %s; all in %s", len(rows), total, first, file)
    rejected_lines(file).update(new)


# ------------------------------------------------------------------------------------
# 6. Tokenizer: special tokens and padding
#
# Returns a fast tokenizer with BOS (where it has one), EOS and pad ids inside the model's embedding.
# ------------------------------------------------------------------------------------
# Tokens that no text contains, for padding. One called pad is taken first, then the lowest id.
SPARE_TOKENS = re.compile(
    r"<\|finetune_right_pad_id\|>|<\|?pad(ding)?\|?>|\[PAD\]|<\|reserved_special_token_\d+\|>|<\|?unused\d+\|?>"
    r"|<\|reserved_\d+\|>", re.IGNORECASE,
)  # fmt: skip
# Texts to which a class that transformers rebuilds may give other ids than tokenizer.json.
PROBES = ["  I'LL don't\n\n\n 1. é à e\u0301 ﬁ\n    return x\n\tif 日本語 🙂 ", "12 3456,78 10 21 1893 24\n\n2. A"]
# Names of pre-tokenizers in .gguf files (llama.cpp's llama-vocab.cpp): GPT-2's, with digits one by one or in runs.
GGUF_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
GGUF_DIGIT_RUNS = ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "phi-2", "roberta-bpe")
TOKENIZER_FILES = [
    "tokenizer*", "tekken.json", "special_tokens_map.json", "vocab*", "merges*", "added_tokens.json", "config.json",
]  # fmt: skip


def download(name: str, patterns: list[str], config: Config) -> Path:
    """A model's folder; of a hub id, these files are downloaded."""
    folder = Path(name)
    return folder if folder.is_dir() else Path(snapshot_download(name, allow_patterns=patterns, **hub_options(config)))


def read_tokenizer_patch(folder: Path) -> dict[str, Any]:
    """The settings in the files of --tokenizer_patch, which take precedence over the tokenizer's own."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if not any(file.is_file() for file in files):
        raise ConfigError(f"--tokenizer_patch {folder}: expected a folder with {' or '.join(f.name for f in files)}")
    settings = {name: value for file in files if file.is_file() for name, value in read_json(file).items()}
    settings.pop("tokenizer_class", None)  # it follows from the model and its files
    return {n: v["content"] if isinstance(v, dict) and "content" in v else v for n, v in settings.items()}


def match_file(tokenizer: Any, file: Path, **options: Any) -> Any:
    """The tokenizer, or the plain class made from its tokenizer.json if that gives other ids."""
    if not file.is_file():
        mistral = type(tokenizer).__name__ == "MistralCommonBackend"  # which has no offsets
        return convert_tekken_tokenizer(str(file.with_name("tekken.json"))) if mistral else tokenizer
    backend = Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    expected = [e.ids for e in backend.encode_batch(PROBES, add_special_tokens=False)]
    if not getattr(tokenizer, "is_fast", False) or tokenizer(PROBES, add_special_tokens=False)["input_ids"] != expected:
        log.warning("%s gives other ids than tokenizer.json, which is loaded instead", type(tokenizer).__name__)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, **options)
        if tokenizer(PROBES, add_special_tokens=False)["input_ids"] != expected:
            log.warning("the settings in tokenizer_config.json still give other ids than tokenizer.json")
    return tokenizer


def set_gguf_splits(tokenizer: Any, path: Path) -> None:
    """Set the pre-tokenizer that a .gguf file names, where transformers does not know it."""
    fields = importlib.import_module("gguf").GGUFReader(path).fields
    names = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind, pre = (fields[name].contents() if name in fields else "" for name in names)
    name = pre if kind == "gpt2" and pre else "gpt-2"
    known = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())  # from transformers 5.18 on
    if name in GGUF_SINGLE_DIGITS:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    elif name not in (*GGUF_DIGIT_RUNS, *known):
        log.warning("%s: unknown way %r of splitting text: as GPT-2 does, which may give other ids", path, name)


def load_tokenizer(config: Config, model_config: PretrainedConfig, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which may be a hub id, with the overrides of the flags."""
    model = config.model
    tokenizer = None
    options = hub_options(config) | {"trust_remote_code": model.trust_remote_code}
    what = f"--model_name_or_path {model.model_name_or_path}: its tokenizer"
    with reraise_as_user_error(f"{what} does not load"):
        options |= read_tokenizer_patch(Path(model.tokenizer_patch)) if model.tokenizer_patch else {}
        # of SentencePiece's file alone, AutoTokenizer may silently make a generic tokenizer with other ids
        file = download(folder, TOKENIZER_FILES, config) / "tokenizer.json"
        bare = file.with_name("tokenizer.model").is_file() and not file.is_file()
        llama = bare and model_config.model_type in ("llama", "mistral", "mixtral")
        with contextlib.suppress(RecursionError):  # caused by an empty unk_token
            tokenizer = (LlamaTokenizer if llama else AutoTokenizer).from_pretrained(folder, **options)
            tokenizer = match_file(tokenizer, file, **options)
    if tokenizer is None or "" in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
        raise ConfigError(f"{what} has empty special tokens: pass --tokenizer_patch examples/llama1_tokenizer")
    tokenizer.name_or_path = model.model_name_or_path
    if model.chat_template:
        with reraise_as_user_error(f"--chat_template {model.chat_template}"):
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    set_special_tokens(tokenizer, config, model_config)
    return tokenizer


def add_tokens(tokenizer: Any, model: ModelArguments, rows: int) -> int:
    """Add --add_tokens, and note in `new_rows` which of their ids the model lacks. Returns how many rows it needs."""
    tokens = [name.strip() for name in str(model.add_tokens).split(",")]
    special = {model.eos_token, model.pad_token, model.bos_token, model.unk_token}  # not shown in predictions
    before = tokenizer.get_vocab()
    tokenizer.text_tokens = [token for token in tokens if token not in before]
    new = [AddedToken(token, normalized=False, special=token in special) for token in tokenizer.text_tokens]
    tokenizer.add_tokens(new)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    known = {i for i in before.values() if i < rows}
    tokenizer.new_rows = {i: i not in known for i in sorted({*ids, *range(rows, max(ids) + 1)})}
    return max(rows, *(i + 1 for i in ids))


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, config: Config, model_config: PretrainedConfig) -> None:
    """Apply the flags, and choose a pad token if there is none."""
    rows = getattr(model_config.get_text_config(), "vocab_size", None) or len(tokenizer)  # of the embedding
    rows = add_tokens(tokenizer, config.model, rows) if config.model.add_tokens else rows
    vocabulary = tokenizer.get_vocab()
    for name in ("pad_token", "eos_token", "bos_token", "unk_token"):
        if (token := getattr(config.model, name)) is not None:
            if vocabulary.get(token, rows) >= rows:
                raise ConfigError(f"--{name} {token}: not in the model's vocabulary of {rows} tokens")
            setattr(tokenizer, name, token)
    needed, way = ("mask_token", "pass a masked model") if config.masked else ("eos_token", "pass --eos_token")
    if getattr(tokenizer, needed) is None:
        raise ConfigError(f"the tokenizer has no {needed}: {way}")
    if not tokenizer.pad_token or vocabulary.get(str(tokenizer.pad_token), rows) >= rows:
        spare = [token for token, i in vocabulary.items() if SPARE_TOKENS.fullmatch(token) and i < rows]
        other = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.pad_token = min(spare, key=lambda t: ("pad" not in t.lower(), vocabulary[t]), default=other)
        log.info("pad token: %s (the tokenizer has none that the model knows)", tokenizer.pad_token)


# ------------------------------------------------------------------------------------
# 7. Encoding: segments -> ids and labels -> StepBatch -> micro-batch
#
# A row is tokenised once, before training, in parallel and cached; a stream's rows when they are due. BOS and EOS are
# added as ids. Prompt and completion are tokenised apart, a chat and a function's own segments whole, with the special
# tokens of the template and those named on purpose. A `</s>` that a user wrote stays text in all.
# ------------------------------------------------------------------------------------
def truncate_and_concat(
    source: Tokens, target: Tokens, limits: Limits, train_on_source: bool = False, bos: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids and labels of prompt and completion, cut to the limits. Two limits cut each on the right, so EOS goes too.

    One limit cuts the prompt from the left, after BOS, down to a quarter of it, and then the completion on the right.
    """
    kept = limits.prompt(len(target))
    if limits.total is None:
        prompt, room = source[:kept], limits.target
    else:
        first = min(kept, 1) if source and source[0][0] == bos else 0
        prompt = source[:first] + source[max(len(source) - kept, 0) + first :]
        room = limits.total - len(prompt)
    tokens = prompt + target[:room]
    return [i for i, _ in tokens], [i if train_on_source else label for i, label in tokens]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts, without special tokens around them or parsed in them."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


def tokenize_segments(rows: list[list[Segment]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Tokens]]:
    """Tokens of each segment, BOS before the first and EOS after the last; without a BOS token none is added."""
    bos, eos = tokenizer.bos_token_id, [tokenizer.eos_token_id]
    marks = {BOS_MARK: [] if bos is None else [bos], EOS_MARK: eos, ESCAPE_MARK: []}
    # split_special_tokens leaves added tokens whole that are not flagged; Unigram's vocabulary may have </s> as a word
    unigram = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"
    special = special_token_pattern(tokenizer, unflagged=not unigram)
    split = [[re.split(f"([{MARKS}])", escape_special_tokens(s["text"], special)) for s in row] for row in rows]
    ids_of_text = iter(tokenize([text for row in split for parts in row for text in parts[::2]], tokenizer))
    for row, segments in zip(rows, split, strict=True):
        ids: list[list[int]] = [[] for _ in row]
        ids[0] += marks[BOS_MARK]
        for own, parts in zip(ids, segments, strict=True):
            for part in parts:  # texts and marks in turn; the texts in the order in which they were tokenised
                own += marks[part] if part in marks else next(ids_of_text)
        ids[-1] += eos
        yield [with_labels(own, segment["supervised"]) for segment, own in zip(row, ids, strict=True)]


def prompts_and_completions(batch: Mapping[str, list[Any]], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens, bool]]:
    """Tokens of a row's prompt, and of the rest from its last supervised segment on; whether it is a chat."""
    rows = zip(batch["segments"], batch["rendered"], strict=True)
    for rendered, group in itertools.groupby(rows, operator.itemgetter(1)):
        segments = [row for row, _ in group]
        tokenized = (tokenize_rendered if rendered else tokenize_segments)(segments, tokenizer)
        for row, tokens in zip(segments, tokenized, strict=True):
            last = last_supervised(row)
            chat = rendered and not row[0]["text"].startswith(BOS_MARK)
            yield list(itertools.chain(*tokens[:last])), list(itertools.chain(*tokens[last:])), chat


def encoded_row(
    ids: list[int], labels: list[int], uncut: tuple[int, int], eos: int | None = None, masked: bool = False
) -> dict[str, Any]:
    """An encoded row and what statistics and checks need to know of it; `uncut` counts prompt and completion."""
    targets = [n for n, label in enumerate(labels) if label != IGNORE and (n or masked)]  # nothing predicts the first
    last = targets[-1] if targets else 0
    missing = "no token left to learn, expected one at least: raise the length limits"
    return {
        "input_ids": ids,
        "labels": labels,
        "problem": missing if ids and not targets else "",
        "length": len(ids),
        "uncut": uncut,
        "cut": len(ids) < sum(uncut),
        "supervised": len(targets),
        # with --train_on_source, the line end that a template puts after EOS is supervised too
        "without_eos": eos not in labels[max(last - 1, 0) : last + 1],
        "largest_id": max(ids, default=0),
        "hash": hash((*ids, *labels)),  # of integers: the same in every process
    }


def encode_masked(text: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> dict[str, Any]:
    """A text with the tokenizer's special tokens around it; the labels are the tokens that may be masked."""
    # special tokens in a text stay text, but not beside a mask token, which prediction fills, nor with slow
    # tokenizers: ESM's finds its letters by the same rule as special tokens
    split = tokenizer.is_fast and str(tokenizer.mask_token) not in text
    limit = limits.total or limits.source
    row = tokenizer(text, return_special_tokens_mask=True, split_special_tokens=split, verbose=False)
    ids, special = row["input_ids"], row["special_tokens_mask"]
    closing = sum(1 for _ in itertools.takewhile(bool, reversed(special)))  # never cut
    kept = [i for i in range(len(ids)) if i < limit - closing or i >= len(ids) - closing]
    labels = [IGNORE if special[i] or ids[i] == tokenizer.mask_token_id else ids[i] for i in kept]
    return encoded_row([ids[i] for i in kept], labels, (len(ids), 0), masked=True)


def encode_batch(
    batch: Mapping[str, list[Any]], tokenizer: Any, limits: Limits, train_on_source: bool = False, masked: bool = False
) -> dict[str, list[Any]]:
    """Columns of segments -> columns of encoded rows, for datasets.map. A chat whose prompt does not fit is empty."""
    rows: list[dict[str, Any]] = []
    if masked:
        rows = [encode_masked(row[-1]["text"], tokenizer, limits) for row in batch["segments"]]
    else:
        lost_tokens = batch.get("lost") or [0] * len(batch["segments"])
        for (source, target, chat), lost in zip(prompts_and_completions(batch, tokenizer), lost_tokens, strict=True):
            ids, labels = truncate_and_concat(source, target, limits, train_on_source, tokenizer.bos_token_id)
            if chat and len(source) > limits.prompt(len(target)):
                ids, labels = [], []
            rows.append(encoded_row(ids, labels, (len(source) + lost, len(target)), tokenizer.eos_token_id))
    special = special_token_pattern(tokenizer)
    for row, segments, rendered in zip(rows, batch["segments"], batch["rendered"], strict=True):
        mark = ESCAPE_MARK if rendered else special
        row["special_text"] = not masked and any(re.search(mark, segment["text"]) for segment in segments)
    return {name: [row[name] for row in rows] for name in rows[0]}


def encode_splits(splits: Splits, tokenizer: Any, config: Config, positions: float = math.inf) -> Splits:
    """Encode rows in parallel, or find them in the cache; those that can't be trained on are left out."""
    data, limit = config.data, config.data.model_max_len
    options = {"limits": length_limits(config), "train_on_source": data.train_on_source, "masked": config.masked}
    encoded = splits._asdict()
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    depends = (vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id, options)
    for name, rows in splits._asdict().items():
        if rows is None:
            continue
        if isinstance(rows, RowSource):  # the first rows of a stream stand for it
            rows = load_rows(rows, config, tokenizer, limit=1000)
        workers = min(os.cpu_count() or 1, len(rows) // 20_000)  # starting them takes time
        if workers > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
        rows = rows.map(
            encode_batch, batched=True, fn_kwargs={"tokenizer": tokenizer, **options},
            remove_columns=sorted({*rows.column_names} - {"where", "rendered", "problem", "left_out"}),
            num_proc=workers if workers > 1 else None,
            desc=f"Encoding {name} rows", new_fingerprint=digest(CODE_VERSION, rows._fingerprint, *depends),
        )  # fmt: skip
        skip = name == "train" and limit and data.skip_excess_length
        if any(long := rows["cut"][:] if skip else [not length for length in rows["length"][:]]):
            flag = f"--model_max_len {limit}" if limit else f"--source_max_len {data.source_max_len}"
            if all(long):
                flag += f": all {len(rows)} {name} rows are longer"
                raise ConfigError(f"{flag}; {'pass --skip_excess_length False' if skip else 'raise it'}")
            fitting = fitting_lengths(rows, config, positions)
            way = f"; 99 % of them fit with {fitting}" if fitting else ""
            log.warning("%d of %d %s rows are longer than %s: left out%s", sum(long), len(rows), name, flag, way)
            rows = rows.select([i for i, is_long in enumerate(long) if not is_long])
        encoded[name] = drop_bad_rows(rows, config)
    return Splits(**encoded)


def encoded_stream(stream: RowSource, tokenizer: Any, config: Config, skip: float = 0) -> Iterator[tuple[float, Any]]:
    """Encoded rows to train on, pass after pass without end, each with the number of raw rows consumed so far.

    The order of a pass follows from seed and pass alone. A resume gives that number as `skip`: raw rows up to it are
    read but not encoded. Resuming a shuffle buffer's state would not be exact.
    """
    args, data = config.training, config.data
    consumed = 0
    seed = args.seed if args.data_seed is None else args.data_seed
    dataset_format, limits = get_format(stream.format, data.as_chat), length_limits(config)
    for epoch in itertools.count():
        raw_rows = datasets.IterableDataset.from_generator(select_rows, gen_kwargs={"source": stream, "data": data})
        if args.train_sampling_strategy != "sequential":
            raw_rows = raw_rows.shuffle(seed=seed + epoch, buffer_size=data.stream_buffer)
        for raw in raw_rows:
            consumed += 1
            if consumed <= skip:
                continue
            rows = normalize_rows(**raw, dataset_format=dataset_format, tokenizer=tokenizer, limits=limits)
            for number, row in enumerate(rows, start=1):
                position = consumed - 1 + number / len(rows)  # each row of a chat consumes a share
                if position <= skip:
                    continue
                if not row["problem"]:
                    columns = {name: [row[name]] for name in ("segments", "rendered", "lost")}
                    encoded = encode_batch(columns, tokenizer, limits, data.train_on_source, config.masked)
                    row |= {name: values[0] for name, values in encoded.items()}
                if row["problem"]:
                    reject([row], 1, config)
                elif row["length"] and not (row["cut"] and data.model_max_len and data.skip_excess_length):
                    yield position, row


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in packs of at most `limit` tokens. The longest first, each goes into the fullest pack that has room.

    Best-fit decreasing (Johnson 1973) needs at most 11/9 of the fewest packs.
    """

    def __init__(self, rows: Any, limit: int) -> None:
        lengths = rows["length"][:]
        self.rows, self.packs = rows, list[list[int]]()
        by_room = defaultdict[int, list[list[int]]](list)  # open packs by their free tokens
        rooms: list[int] = []  # for which there are packs, ascending
        for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
            room = limit
            pack: list[int] = []
            fullest = bisect.bisect_left(rooms, lengths[i])
            if fullest < len(rooms):
                room = rooms[fullest]
                pack = by_room[room].pop()
                if not by_room[room]:
                    del rooms[fullest]
            else:
                self.packs.append(pack)
            pack.append(i)
            left = max(room - lengths[i], 0)
            if not by_room[left]:
                bisect.insort(rooms, left)
            by_room[left].append(pack)
        self.lengths = [sum(lengths[i] for i in pack) for pack in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, key: Any) -> Any:
        """One pack; by name a column of the rows, but `length` is that of each pack."""
        if isinstance(key, str):
            return self.lengths if key == "length" else self.rows[key]
        return {"pack": [self.rows[i] for i in self.packs[key]]}


def epoch_order(lengths: list[int], batch_size: int, args: Any, epoch: int) -> list[int]:
    """Row numbers by seed and epoch alone: after a resume the Trainer's own sampler would draw another order."""
    generator = torch.Generator().manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)
    if args.train_sampling_strategy == "group_by_length":
        return get_length_grouped_indices(lengths, batch_size, generator=generator)
    if args.train_sampling_strategy == "sequential":
        return list(range(len(lengths)))
    return torch.randperm(len(lengths), generator=generator).tolist()


def steps_per_epoch(rows: int, size: int, args: Any) -> int:
    """Optimizer steps of `size` rows; a smaller one at the end counts unless the flags drop it."""
    return rows // size if args.dataloader_drop_last else math.ceil(rows / size)


class TokenStatistics(NamedTuple):
    fingerprint: str  # of every id and label, in order
    rows: int
    tokens: int
    longest: int  # tokens
    supervised: int  # tokens; with a masked model, those that may be masked
    largest_id: int
    cut: int  # rows, as the next two
    without_eos: int | None  # which do not teach the model to stop; None with a masked model
    duplicates: int
    special_text: int  # rows in whose text special tokens are written
    chats: int  # rows that a chat template wrote, or whose segments a function of the user's did
    formats: list[str]  # of the datasets

    def __str__(self) -> str:
        """One line, for the log and --preview."""
        supervised = "may be masked" if self.without_eos is None else "supervised"
        rows = {"cut": self.cut, "without EOS": self.without_eos, "duplicates": self.duplicates}
        rows["with special tokens as text"] = self.special_text
        return ", ".join([
            f"{self.rows:,} rows", f"{self.tokens:,} tokens", f"{self.longest:,} in the longest row",
            f"{self.supervised:,} ({self.supervised / self.tokens:.1%}) {supervised}",
            *(f"{count:,} ({count / self.rows:.1%}) {name}" for name, count in rows.items() if count),
        ])  # fmt: skip


def token_statistics(rows: Any, masked: bool) -> TokenStatistics:
    """Statistics of encoded rows."""
    lengths, hashes = rows["length"][:], rows["hash"][:]
    return TokenStatistics(
        fingerprint=digest(*hashes), rows=len(rows), tokens=sum(lengths), longest=max(lengths),
        supervised=sum(rows["supervised"][:]), largest_id=max(rows["largest_id"][:]), cut=sum(rows["cut"][:]),
        without_eos=None if masked else sum(rows["without_eos"][:]), duplicates=len(hashes) - len(set(hashes)),
        special_text=sum(rows["special_text"][:]), chats=sum(rows["rendered"][:]),
        formats=rows.info.description.split("\n\n"),  # load_rows writes one, and concatenate_datasets joins them so
    )  # fmt: skip


def fitting_lengths(rows: Any, config: Config, positions: float) -> str:
    """The length limits that 99 % of the rows keep to, where they are above the flags' and within the positions."""
    uncut = rows["uncut"][:]
    lengths = {"source_max_len": [row[0] for row in uncut], "target_max_len": [row[1] for row in uncut]}
    if config.data.model_max_len:
        lengths = {"model_max_len": [sum(row) for row in uncut]}
    fitting = {flag: sorted(own)[math.ceil(0.99 * len(uncut)) - 1] for flag, own in lengths.items()}
    limits = [max(most, getattr(config.data, flag)) for flag, most in fitting.items()]
    if max(sum(map(min, row, limits)) for row in zip(*lengths.values(), strict=True)) > positions:
        return ""
    return " ".join(f"--{flag} {most}" for flag, most in fitting.items() if most > getattr(config.data, flag))


def pack_and_summarize(splits: Splits, config: Config, positions: float = math.inf) -> tuple[Any, dict[str, Any]]:
    """The training rows, packed if the flags say so, and statistics of both splits."""
    parts = {name: rows for name, rows in splits._asdict().items() if rows is not None}
    statistics = {name: token_statistics(rows, config.masked) for name, rows in parts.items()}
    if splits.train is not None and config.training.do_train:
        cut, endless = statistics["train"].cut, statistics["train"].without_eos or 0
        if max(cut, endless) > 0.05 * len(splits.train):
            fitting = fitting_lengths(splits.train, config, positions)
            what = f", and {endless} end without EOS, so that the model won't learn to stop" if endless else ""
            other = "shorten them" if cut >= endless else "try another --eos_token or chat template"
            way = f"pass {fitting}" if fitting else other
            log.warning("of %d train rows %d are cut%s: %s", len(splits.train), cut, what, way)
    for name, part in statistics.items():
        if part.special_text:
            log.warning("%d %s rows contain special tokens, which stay text: if a template wrote them, pass messages, "
                        "or segments with {special} by a function of your own", part.special_text, name)  # fmt: skip
    if splits.train is None or not config.data.packing:
        return splits.train, statistics
    limit = length_limits(config).longest
    packs = PackedRows(splits.train, limit)
    log.info("packing: %d rows in %d packs of up to %d tokens", len(splits.train), len(packs), limit)
    return packs, statistics


def padded_prompts(rows: Sequence[Sequence[int] | Tensor], pad_id: int, side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask, (rows, longest). The mask comes from the lengths: pad is often EOS."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(row) for row in tensors], padding_value=0)
    return {"input_ids": pad(tensors, padding_value=pad_id), "attention_mask": mask}


@dataclass(frozen=True)
class StepBatch:
    """One process's rows of an optimizer step or evaluation batch, before they are cut into micro-batches."""

    input_ids: Tensor  # (tokens,) of all members, one after the other; a member is a row, or a row of a pack
    labels: Tensor  # (tokens,) the first of a member is IGNORE, as nothing predicts it, unless tokens are masked
    lengths: Tensor  # (members,)
    rows: list[int]  # members of each dataset row: 1, or more if rows are packed
    where: list[str]  # of each member
    masked: bool = False  # whether a label is predicted at its own position, not at the one before

    @property
    def supervised(self) -> int:
        """The number of labels."""
        return int((self.labels != IGNORE).sum())

    def members(self, numbers: Iterable[int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Ids and labels of these members, or of all."""
        lengths = self.lengths.tolist()
        pairs = list(zip(self.input_ids.split(lengths), self.labels.split(lengths), strict=True))
        return pairs if numbers is None else [pairs[i] for i in numbers]


def collate_step(rows: Sequence[Mapping[str, Any]], masked: bool = False) -> dict[str, Any]:
    """Rows of a dataset, packed or not -> a StepBatch, in a dictionary as the Trainer passes it around."""
    packs = [row.get("pack", [row]) for row in rows]
    # a process without rows of its own still has to take part: one token without a label
    members = [member for pack in packs for member in pack] or [{"input_ids": [0], "labels": [IGNORE]}]
    ids, labels = (torch.tensor([i for m in members for i in m[name]]) for name in ("input_ids", "labels"))
    lengths = torch.tensor([len(member["input_ids"]) for member in members])
    if not masked:
        labels[lengths.cumsum(0) - lengths] = IGNORE
    where = [member.get("where", "") for member in members]
    return {"step": StepBatch(ids, labels, lengths, [len(pack) for pack in packs], where, masked)}


def micro_batches(step: StepBatch, rows: int | None, tokens: int, padded: bool) -> list[list[int]]:
    """Which members go through the model together: those of `rows` dataset rows in turn or, with None, as many as fit.

    They have at most `tokens` tokens, padding included, unless one member alone has more.
    """
    lengths = step.lengths.tolist()
    groups = [list(range(len(lengths)))]
    if rows is not None and step.rows:  # a process may have none
        starts = [0, *itertools.accumulate(step.rows)][:-1]  # each row's first member
        bounds = [*starts[::rows], len(lengths)]
        groups = [list(range(start, end)) for start, end in itertools.pairwise(bounds)]
    elif padded:
        groups[0].sort(key=lambda i: -lengths[i])
    else:
        count = max(1, math.ceil(sum(lengths) / tokens))  # no more batches than needed, of one size
        tokens = min(tokens, math.ceil(sum(lengths) / count * 1.02))  # 2 % above an even share, as rows stay whole
    batches: list[list[int]] = []
    for group in groups:
        batches.append([])
        for i in group:
            together = [lengths[j] for j in (*batches[-1], i)]
            if batches[-1] and (max(together) * len(together) if padded else sum(together)) > tokens:
                batches.append([])
            batches[-1].append(i)
    return batches


def padded_batch(step: StepBatch, members: list[int], pad_id: int, side: str, numbered: bool = False) -> dict[str, Any]:
    """Members padded to one length, and which positions predict what; `numbered`: also the tokens' positions."""
    ids, labels = zip(*step.members(members), strict=True)
    padded = pad_sequence([*labels], batch_first=True, padding_value=IGNORE, padding_side=side).flatten()
    batch = padded_prompts(ids, pad_id, side) | supervised_targets(padded, 0 if step.masked else 1)
    if numbered:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def padding_free_batch(step: StepBatch, members: list[int]) -> dict[str, Any]:
    """Members in one row without padding; positions restart in each."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in step.members(members)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    labels = batch.pop("labels").squeeze(0)
    return batch | supervised_targets(labels)


def supervised_targets(labels: Tensor, ahead: int = 1) -> dict[str, Tensor]:
    """Flat labels -> the positions that predict a supervised token, `ahead` of it, and those tokens."""
    positions = (labels[ahead:] != IGNORE).nonzero().squeeze(1)
    return {"positions": positions, "targets": labels[positions + ahead]}


class Masking(NamedTuple):
    """How tokens are masked (BERT, Devlin et al. 2019, https://arxiv.org/abs/1810.04805)."""

    chosen: float  # share of the tokens
    replaced: float  # share of the chosen that become the mask token
    random: float  # share of the chosen that become a random token
    mask_id: int
    words: Tensor  # the ids that a random token may be

    def mask_tokens(self, ids: Tensor, labels: Tensor, *seed: Any, one: bool = False) -> list[Tensor]:
        """Masked ids, and the labels of the chosen tokens (at least `one`, if asked); both follow from the seed."""
        generator = torch.Generator().manual_seed(int(digest(*seed), 16))
        # drawn on the CPU: the same masks on every device
        choice, fate = torch.rand((2, *ids.shape), generator=generator).to(ids.device)
        words = self.words[torch.randint(len(self.words), ids.shape, generator=generator)].to(ids.device)
        choice[labels == IGNORE] = 2.0
        chosen = choice < self.chosen
        chosen |= one & (choice < 2.0) & (choice == choice.min())
        masked = ids.masked_fill(chosen & (fate < self.replaced), self.mask_id)
        return [masked.where(~chosen | (fate < 1 - self.random), words), labels.masked_fill(~chosen, IGNORE)]

    def mask_step(self, step: StepBatch, *seed: Any, one: bool = False) -> StepBatch:
        """A step with masks that follow from the seed and each row alone."""
        masked = [self.mask_tokens(ids, labels, *seed, ids.tolist(), one=one) for ids, labels in step.members()]
        ids, labels = (torch.cat(parts) for parts in zip(*masked, strict=True))
        return dataclasses.replace(step, input_ids=ids, labels=labels)


def build_masking(tokenizer: PreTrainedTokenizerBase, rows: int, data: DataArguments) -> Masking:
    """The masking that the flags set, for a model whose embedding has this many rows."""
    # a random token is never a special one: RoBERTa and ESM count positions from the padding tokens
    words = sorted(i for i in set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) if i < rows)
    shares = data.mask_prob, data.mask_replace_prob, data.random_replace_prob
    return Masking(*shares, mask_id=tokenizer.mask_token_id, words=torch.tensor(words))


Spans = list[tuple[str, bool]]  # parts of a row, each supervised or not


def row_spans(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Spans:
    """A row's supervised and other text; masked tokens end in an arrow and their labels."""
    spans: Spans = []
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    kinds = [(label != IGNORE, label in (IGNORE, i)) for i, label in zip(ids, labels, strict=True)]
    for (supervised, kept), group in itertools.groupby(range(len(ids)), kinds.__getitem__):
        numbers = list(group)
        first, end = numbers[0], numbers[-1] + 1
        # decoded alone, it could lose its leading space or half of a letter
        before, text = str(decode(ids[:first])), str(decode(ids[:end]))
        text = text[len(before) :] if text.startswith(before) else str(decode(ids[first:end]))
        text += "" if kept else f"→{decode(labels[first:end])}"
        spans.append(("↵\n".join(map(escape_control_chars, text.split("\n"))), supervised))
    return spans


def preview_rows(rows: Any, tokenizer: Any, config: Config) -> Iterator[tuple[str, Spans]]:
    """The first rows or packs as a step would have them, each with a title."""
    masking = build_masking(tokenizer, len(tokenizer), config.data) if config.masked else None
    for number in range(min(config.data.preview, len(rows))):
        members = rows[number].get("pack", [rows[number]])
        step = collate_step(members, config.masked)["step"]
        step = masking.mask_step(step, "preview") if masking else step
        for part, (member, (ids, labels)) in enumerate(zip(members, step.members(), strict=True), start=1):
            title = f"row {number + 1}" + (f", part {part} of {len(members)}" if len(members) > 1 else "")
            title += f": {member['where']}, {len(ids)} tokens, {int((labels != IGNORE).sum())} supervised"
            title += ", cut" if member["cut"] else ""
            title += ", special tokens as text" if member["special_text"] else ""
            if member["left_out"]:
                title += f", left out: {shorten(', '.join(member['left_out']))}"
            yield title, row_spans(ids.tolist(), labels.tolist(), tokenizer)


# ------------------------------------------------------------------------------------
# 8. Model: data types, quantisation, devices
#
# What leaves is the frozen base. Linear layers other than the head are in 4 or 8 bits; embeddings, norms and head are
# in the load dtype. Nothing is cast up: RMSNorm and LayerNorm compute in float32 inside, whatever their weights are.
# A model family that needs help while it is loaded is a row of QUIRKS.
# ------------------------------------------------------------------------------------
# FSDP shards floating dtypes. bf16 would damage a thousandth of the packed values: copies on a GPU turn every NaN into
# the same one (https://github.com/pytorch/pytorch/issues/159333).
FSDP_STORAGE = torch.float32
EXPERT_STATISTICS = "expert_statistics.safetensors"  # in a calibrated base's folder

LINEAR_CLASSES = (torch.nn.Linear, Conv1D)  # bitsandbytes' derive from nn.Linear; Conv1D is GPT-2's
# How LoRA's best rate falls with the width, by model_type (https://thinkingmachines.ai/blog/lora/); else their mean.
WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
COMPILED: dict[Any, Any] = {}  # kernels for aligned tensors, by device, dtype, size and constants
TRIALS: dict[Any, tuple[set[str], set[str]]] = {}  # results of try_layers, which takes a second at 7B

# By model_type, what holds while a model of this family is loaded.
QUIRKS = {
    # transformers quantises nn.Linear itself and no subclass; Falcon's computes the same
    "falcon": partial(mock.patch, "transformers.models.falcon.modeling_falcon.FalconLinear", torch.nn.Linear),
}


def auto_model(config: Config, model_config: PretrainedConfig | None) -> Any:
    """The kind of class to load; what was published with towers for images keeps them."""
    published = {*(getattr(model_config, "architectures", None) or ())}
    towers = published & {*modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    causal: Any = AutoModelForImageTextToText if towers else AutoModelForCausalLM
    auto = AutoModelForMaskedLM if config.masked else causal
    known = type(model_config) in auto._model_mapping or hasattr(model_config, "auto_map")
    decoder_alone = auto is AutoModelForCausalLM and getattr(model_config, "is_encoder_decoder", False)
    if model_config and (not known or decoder_alone):
        kind = "masked" if config.masked else "causal"
        raise ConfigError(f"--model_name_or_path: {model_config.model_type} is no {kind} language model")
    return auto


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of matrix products."""
    return torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else torch.float32


def load_dtype(config: Config) -> torch.dtype:
    """The dtype of what is not quantised. --fp16 loads in float32: float16 is unstable as a storage type."""
    return torch.bfloat16 if config.training.bf16 else torch.float32


def is_sharded(config: Config) -> bool:
    """Whether an engine, FSDP or DeepSpeed, shards the model's weights."""
    return bool(config.training.fsdp or config.training.deepspeed)


def device_map(config: Config) -> Any:
    """Where the layers go: all on this process's GPU, over all GPUs of a single process, or on the CPU."""
    if is_sharded(config):
        return None  # the engine places them
    if config.training.use_cpu or not torch.cuda.is_available():
        return {"": "cpu"}
    # accelerate refuses "auto" in a process that a launcher started
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


@contextlib.contextmanager
def made_once(folder: Path, what: str) -> Iterator[str]:
    """Where to write what becomes `folder` once it is whole, unless another run has made it meanwhile."""
    name = f"{folder.name}.{platform.node()}"
    scratch = folder.with_name(f"{name}.{os.getpid()}")
    with reraise_as_user_error(what):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.iterdir():  # by runs on this host that were killed
            if left.name.rpartition(".")[0] == name and not psutil.pid_exists(int(left.suffix[1:])):
                shutil.rmtree(left)
        try:
            yield str(scratch)
            if not folder.is_dir():
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def model_folder(config: Config) -> str:
    """Where to load the base from: what the user named, or the cached bf16 folder made of a .gguf file."""
    check_base(config)
    name = config.model.model_name_or_path
    path, root = Path(name), Path(config.model.cache_dir or HF_HOME, "qlora-gguf")
    if path.is_dir() and not (path / "config.json").is_file():
        files = [*path.glob("*.gguf")]
        path = files[0] if len(files) == 1 else path
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return name
    version = digest(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns, "2", GGUF_SINGLE_DIGITS)
    folder = root / f"{path.stem}-{version}"
    if folder.is_dir():
        return str(folder)
    log.info("%s: dequantising into %s, once", path, folder)
    with made_once(folder, f"--model_name_or_path {path}") as made:
        # newer versions of transformers could leave weights packed
        dense = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
        options: Any = {"gguf_file": path.name, "dtype": torch.bfloat16, "quantization_config": dense}
        with mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", partial(tqdm, disable=None), create=True):
            model = load_base(config, None, path.parent, **options)  # its bar, in a terminal only
        if quantizer := getattr(model, "hf_quantizer", None):  # else nothing from gguf is saved
            quantizer.remove_quantization_config(model)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        set_gguf_splits(tokenizer, path)
        if isinstance(eos := model.config.eos_token_id, int):  # transformers 5.17 takes BOS for EOS
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        for part in (model, tokenizer):
            part.save_pretrained(made)
    return str(folder)


def load_model_config(config: Config, folder: str) -> PretrainedConfig:
    """The base model's configuration, with --rope_scaling applied."""
    options = hub_options(config) | {"trust_remote_code": config.model.trust_remote_code}
    with reraise_as_user_error(f"--model_name_or_path {config.model.model_name_or_path}"):
        model_config = AutoConfig.from_pretrained(folder, **options)
    if rope := rope_parameters(config.model.rope_scaling):
        parameters = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
        parameters = parameters.get("full_attention", parameters)  # Gemma 3's other layers see a short span only
        if not parameters or any(isinstance(value, dict) for value in parameters.values()):
            raise ConfigError(f"--rope_scaling: a {model_config.model_type} model has no rotary embedding to scale")
        partial_heads = parameters.get("rope_type") == "proportional"  # Gemma 4 turns a part of each head
        known = ["proportional"] if partial_heads else ["default", *ROPE_INIT_FUNCTIONS]
        factor = rope.get("factor", 0 if rope.get("rope_type") != "default" else 1)
        if rope.get("rope_type") not in known or type(factor) not in (int, float) or not 0 < factor < math.inf:
            raise ConfigError(f"--rope_scaling: expected a factor above 0 and a rope_type: {', '.join(known)}")
        parameters |= rope
    return model_config


def positions_of(model_config: PretrainedConfig) -> float:
    """Tokens that a model was made for; XLNet's -1 sets no limit."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 0
    return positions if positions > 0 else math.inf


def model_sizes(model: Any) -> tuple[int, float, float]:
    """The number of token ids, of positions that a model has embeddings for, and that it was made for."""
    limit, positions = math.inf, positions_of(model.config)
    for name, table in model.named_modules():
        leaf = leaf_name(name.removesuffix(".original_module"))
        if isinstance(table, torch.nn.Embedding) and re.search("position|wpe", leaf):
            # RoBERTa's and ESM's begin after the pad's, OPT's and BART's at 2; a tower for images has other sizes
            first = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            if 0 <= table.num_embeddings - positions <= 2 or (positions == math.inf and leaf == "position_embeddings"):
                limit = min(limit, table.num_embeddings - first)
    table = model.get_input_embeddings()  # peft wraps one that it trains
    ids = getattr(table, "num_embeddings", None) or model.config.get_text_config().vocab_size
    return ids, limit, positions


def resolve_objective(config: Config, model_config: PretrainedConfig) -> Config:
    """The Config with the objective that `auto` stands for, checked against the rules that depend on it."""
    objective = config.data.objective
    if objective == "auto":
        masked_models = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        names = model_config.architectures or [masked_models.get(model_config.model_type, "")]
        encoder = not getattr(model_config, "is_decoder", False)
        masked = encoder and any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
        objective = "mlm" if masked else "clm"
        log.info("objective: %s, by the model's config", objective)
    data = dataclasses.replace(config.data, objective=objective)
    resolved = dataclasses.replace(config, data=data, flags=config.flags | {"objective": objective})
    check_config(resolved)
    return resolved


def resolve_recipe(config: Config, model_config: PretrainedConfig) -> Config:
    """The Config with the learning rate of --recipe, which follows from the model's width."""
    if config.training.recipe is None:
        return config
    flags, training = dict(config.flags), copy.copy(config.training)
    if "learning_rate" not in config.explicitly_set:
        width = getattr(model_config.get_text_config(), "hidden_size", None)
        if not width or config.training.deepspeed:  # whose file is filled in before the width is known
            raise ConfigError("--recipe: for --deepspeed or a model without hidden_size, pass --learning_rate too")
        exponent = next((p for name, p in WIDTH_EXPONENTS.items() if model_config.model_type.startswith(name)), 0.429)
        training.learning_rate = flags["learning_rate"] = float(f"{5e-4 * (2000 / width) ** exponent:.3g}")
    words = (f"--{name} {flags[name]}" for name in (*RECIPES[flags["recipe"]], "learning_rate"))
    warn_once("--recipe %s: %s", flags["recipe"], " ".join(words))  # --plan comes here twice
    return dataclasses.replace(config, training=training, flags=flags)


def resolve_attention(config: Config) -> str | None:
    """The requested attention implementation; torch's own where flash-attn is missing."""
    implementation = config.model.attn_implementation
    if implementation == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
        warn_once("attn_implementation flash_attention_2: flash-attn is not installed here, using torch's own")
        return None
    return implementation


class MetaValues(TorchDispatchMode):
    """Answer what a forward pass asks of values on the meta device, which has none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_meta:
            if function is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=x.dtype).item()
            if function is torch.ops.aten.nonzero.default:
                return x.new_zeros((min(1, x.numel()), x.dim()), dtype=torch.long)
        return function(*args, **(kwargs or {}))


def leaf_name(name: str) -> str:
    """The last part of a module's full name."""
    return name.rpartition(".")[2]


def without_numbers(name: str) -> str:
    """A module's or weight's kind: its name with a star for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def try_layers(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Names of the linear layers that a step on text trains, and of those whose weight must not be packed.

    Found by a step on the meta device, which takes no memory. A packed weight can only be used by calling its layer:
    Mamba reads that of `dt_proj` itself, RWKV rescales some, and Llama 4's router returns a tuple. No gradient reaches
    DeepSeek-V3.2's indexer.
    """
    kind: Any = type(model)
    settings = {n: v for n, v in model.config.to_dict().items() if not re.search("quantization|use_cache|token_id", n)}
    if (key := (kind, str(settings))) in TRIALS:
        return TRIALS[key]
    config = copy.deepcopy(model.config)
    config.use_cache, config._attn_implementation = False, "eager"  # flash-attn's kernels want values
    names: dict[Any, str] = {}  # of the linear layers
    running: list[Any] = []
    otherwise: set[Any] = set()  # layers that are not just called for a product

    def leave(layer: Any, args: Any, output: Any) -> None:
        running.pop()
        size = getattr(layer, "out_features", None) or layer.nf
        if not isinstance(output, Tensor) or output.shape[-1] != size:
            otherwise.add(layer)

    def read_weight(layer: Any) -> Any:
        if layer not in running:  # else it reads its weight itself
            otherwise.add(layer)
        return layer.__getattr__("weight")

    length = int(min(160, positions_of(config)))  # DeepSeek-V4 compresses 128
    ids = torch.ones(1, length, dtype=torch.long, device="meta")
    try:
        with torch.random.fork_rng(devices=[]), MetaValues(), torch.enable_grad():
            with torch.device("meta"):
                twin: Any = kind(config).bfloat16()  # grouped products of experts want it
            names |= {module: name for name, module in twin.named_modules() if isinstance(module, LINEAR_CLASSES)}
            for layer in names:
                layer.register_forward_pre_hook(lambda layer, args: running.append(layer))
                layer.register_forward_hook(leave)
            for mode in (False, True):  # some layers are left out at random in training, some only used there
                with mock.patch.object(torch.nn.Linear, "weight", property(read_weight), create=True):
                    logits = twin.train(mode)(input_ids=ids, attention_mask=ids).logits
                logits.sum().backward()
            used = {name for layer, name in names.items() if layer.weight.grad is not None}
    except Exception as error:  # whatever the model raises
        log.warning("%s can't be tried (%s): all of its linear layers count as used", kind.__name__, shorten(error))
        used = {name for name, module in model.named_modules() if isinstance(module, LINEAR_CLASSES)}
    kinds = {without_numbers(name) for name in used if ".experts." in name}  # which are called depends on values
    used |= {name for name in names.values() if without_numbers(name) in kinds}
    read = {id(layer._parameters.get("weight")) for layer in otherwise}  # also by a layer that is tied to it
    beside = {name for module, name in names.items() if id(module._parameters.get("weight")) in read}
    TRIALS[key] = used - beside, beside
    return TRIALS[key]


def linear_layers(model: PreTrainedModel, masked: bool = False) -> list[str]:
    """Full names of the linear layers that train, except the output head; of a masked model, those of its encoder."""
    used, head = try_layers(model)[0], model.get_output_embeddings()
    searched = set(model.base_model.modules() if masked else model.modules()) - {head}
    return [name for name, module in model.named_modules() if name in used and module in searched]


def knows_experts(module: Any) -> bool:
    """Whether a module's stacks of experts can be packed and adapted: it has transformers' interface."""
    return hasattr(module, "has_gate") or type(module).__name__ == "Llama4TextExperts"


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts of a layer a token meets, by the families' names for it; of a list the most."""
    text, names = config.get_text_config(), ("num_experts_per_tok", "top_k_experts", "moe_topk")
    found = next((value for name in names if (value := getattr(text, name, None))), 1)
    return max(found) if isinstance(found, list) else found


def stack_of(module: Any, name: str) -> Any:
    """A module's weight of many experts, with its quant_state, which FSDP loses as it makes new parameters."""
    weight = module._parameters[name]
    if state := vars(module).get("quant_states", {}).get(name):
        state.to(weight.device)
        weight.quant_state = state
    return weight


def stacks_in(module: Any) -> dict[str, Any]:
    """A module's own weights of many experts, (experts, ., .), packed or not; a convolution has none."""
    names = [] if hasattr(module, "kernel_size") else [name for name, _ in module.named_parameters(recurse=False)]
    weights = {name: stack_of(module, name) for name in names}
    shapes = {n: getattr(w, "ds_shape", getattr(w, "quant_state", w).shape) for n, w in weights.items()}  # of ZeRO-3
    return {name: weights[name] for name, shape in shapes.items() if len(shape) == 3 and shape[0] > 1}


def stacked_experts(model: torch.nn.Module, known: bool = False) -> dict[str, tuple[Any, torch.nn.Parameter]]:
    """Every weight of many experts, or of those that are `known`, with its module, by name."""
    owners = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if knows_experts(m) or not known}
    return {f"{name}.{leaf}": (module, w) for name, module in owners.items() for leaf, w in stacks_in(module).items()}


def find_routers(model: torch.nn.Module, layers: Iterable[str], *also: str) -> set[str]:
    """A mixture's routers among the layers: quantised or adapted, they would send tokens to other experts."""
    names = "|".join(["router", "gate", *also])
    return set(filter(re.compile(rf"(.*\.)?({names})(\..*)?").fullmatch, layers)) if stacked_experts(model) else set()


def pack_weight(weight: Tensor, config: Config) -> Any:
    """A weight of any shape in 4 bit."""
    quant, storage = config.quant, FSDP_STORAGE if config.training.fsdp else torch.uint8
    options: Any = {"compress_statistics": quant.double_quant, "quant_type": quant.quant_type, "quant_storage": storage}
    packed: Any = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
    return packed.to(weight.device)


def packs_experts(config: Config) -> bool:
    """Whether experts are held in 4 bit; DeepSpeed shards them as they are."""
    return config.quant.bits == 4 and not config.training.deepspeed


@contextlib.contextmanager
def packing_experts(config: Config) -> Iterator[None]:
    """Quantise experts one stack at a time while a model loads: transformers' quantizer knows linear layers only."""
    needs, convert = Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert

    def is_stack(model: Any, name: str) -> bool:
        module = model.get_submodule(name.rpartition(".")[0])
        return knows_experts(module) and leaf_name(name) in stacks_in(module)

    def pack(self: Any, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not all(is_stack(kwargs["model"], name) for name in tensors):
            return convert(self, tensors, *args, **kwargs)
        return {name: pack_weight(w[0] if isinstance(w, list) else w, config) for name, w in tensors.items()}

    def needs_packing(self: Any, model: Any, name: str, **kwargs: Any) -> bool:
        return is_stack(model, name) or needs(self, model, name, **kwargs)

    asked = mock.patch.object(Bnb4BitHfQuantizer, "param_needs_quantization", needs_packing)
    # transformers would make linear layers of Llama 4's experts, where a base is quantised already
    kept = mock.patch.object(Bnb4BitHfQuantizer, "_convert_model_for_quantization", lambda *_: None)
    with asked, kept, mock.patch.object(Bnb4bitQuantize, "convert", pack):
        yield


def pack_experts(model: Any, config: Config) -> None:
    """Let modules unpack their stacks, and quantise those that loading did not, as of MXFP4 bases, on the GPU."""
    again = []
    for name, (module, weight) in stacked_experts(model, known=True).items():
        module.forward = partial(unpacked_experts_forward, module, {})
        if not hasattr(weight, "quant_state"):
            weight = pack_weight(weight.data.to(config.training.device), config).to(weight.device)
            setattr(module, leaf_name(name), weight)
            again.append(name)
        vars(module).setdefault("quant_states", {})[leaf_name(name)] = weight.quant_state
    if again:
        log.info("%d stacks of experts are quantised after loading, first %s", len(again), again[0])


if triton is not None:

    @triton.jit
    def _dequantise_4bit_kernel(  # type: ignore[no-untyped-def]
        packed, absmax, code, nested_code, nested_absmax, offset, out, blocks,
        BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # one row is one block of weights
        valid = row < blocks
        if NESTED:
            scale = tl.load(nested_code + tl.load(absmax + row, mask=valid, other=0).to(tl.int32))
            scale = scale * tl.load(nested_absmax + row // NESTED_BLOCK, mask=valid, other=0.0) + tl.load(offset)
        else:
            scale = tl.load(absmax + row, mask=valid, other=0.0)
        half = tl.arange(0, BLOCK // 2)
        position = row[:, None].to(tl.int64) * (BLOCK // 2) + half[None, :]
        byte = tl.load(packed + position, mask=valid[:, None], other=0).to(tl.int32)
        high = tl.load(code + (byte >> 4)) * scale[:, None]  # the first of two weights is the high half
        low = tl.load(code + (byte & 15)) * scale[:, None]
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        column = tl.arange(0, BLOCK)
        tl.store(out + row[:, None].to(tl.int64) * BLOCK + column[None, :], both, mask=valid[:, None])


def on_current_gpu(x: Tensor) -> bool:
    """Whether x lies where Triton launches kernels, unlike most of a model spread over several GPUs."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def dequantise_4bit(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Dequantise a packed weight, scales included, in one launch where bitsandbytes takes three (small: 14 %)."""
    if triton is None or not on_current_gpu(packed) or packed.numel() * 2 % state.blocksize:
        return dequantize_4bit(packed, state).to(dtype)
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    nested, code, blocks = state.state2 if state.nested else None, state.code, out.numel() // state.blocksize
    scales = (nested.code, nested.absmax, state.offset) if nested else (code, state.absmax, code)
    tensors, grid = (packed, state.absmax, code, *scales, out), (triton.cdiv(blocks, 32), 1, 1)
    constants = (state.blocksize, nested.blocksize if nested else 1, nested is not None, 32)
    key = packed.device, dtype, blocks, constants
    aligned = not any(tensor.data_ptr() % 16 for tensor in tensors)
    if aligned and key in COMPILED:  # Triton takes 34 of 50 us to find what it has compiled (small: 8 %)
        COMPILED[key][grid](*tensors, blocks, *constants)
    else:  # without fusion, as bitsandbytes rounds the product before it adds
        kernel = _dequantise_4bit_kernel[grid](*tensors, blocks, *constants, enable_fp_fusion=False)
        if aligned:
            COMPILED[key] = kernel
    return out


def stack_values(weight: Any, dtype: torch.dtype) -> Tensor:
    """The values of a weight, packed or not; of a stack of experts, (experts, ., .)."""
    state = getattr(weight, "quant_state", None)
    return dequantise_4bit(weight.data.view(torch.uint8), state, dtype) if state else weight.to(dtype)


def expert_factors(layer: Any, experts: int) -> tuple[Tensor, Tensor]:
    """lora_A, (experts, r, in), and lora_B, (experts, out, r), of peft's adapter of a stack."""
    a, b = (next(iter(part.values())).weight for part in (layer.lora_A, layer.lora_B))
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def unpacked_experts_forward(module: Any, layers: Mapping[str, Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a module of experts on a copy whose weights are unpacked, with their adapters added."""
    dense = copy.copy(module)
    dense._parameters = dict(module._parameters)
    for name, weight in stacks_in(module).items():
        values = stack_values(weight, matmul_dtype(x))
        if name in layers and not layers[name].disable_adapters:
            a, b = expert_factors(layers[name], len(values))
            change = layers[name].scaling["default"] * (b @ a).to(values.dtype)
            values = values + (change.mT if getattr(module, "is_transposed", False) else change)
        dense._parameters[name] = values
    return type(module).forward(dense, x, *args, **kwargs)


def decoder_layers(model: Any) -> list[Any]:
    """The layers that can be recomputed one by one; not those of a tower for images."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    text = {*model.get_decoder().modules()} if hasattr(model, "get_decoder") else set()
    return [layer for layer in layers if layer in text] or layers


def meta_model(config: Config, model_config: PretrainedConfig) -> Any:
    """The base model on the meta device, without weights."""
    # under ZeRO-3 transformers would draw and shard weights
    whole = mock.patch("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: False)
    with whole, torch.device("meta"), reraise_as_user_error(f"--model_name_or_path {config.model.model_name_or_path}"):
        return auto_model(config, model_config).from_config(
            model_config, dtype=load_dtype(config), trust_remote_code=config.model.trust_remote_code
        )


def quantisation_config(config: Config, model_config: PretrainedConfig) -> Any | None:
    """Settings of bitsandbytes; None for 16 and 32 bits: with both load_in_... off it would quantise to 4 bit."""
    quant = config.quant
    if quant.bits not in (4, 8):
        return None
    model = meta_model(config, model_config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_CLASSES)}
    fit = linear_layers(model, masked=True) if config.masked else linear.keys() - try_layers(model)[1]
    head, routers = model.get_output_embeddings(), find_routers(model, linear, "shared_expert_gate")
    # also a masked model's prediction head; without names, transformers leaves out the output layer
    whole = [n for n, module in linear.items() if n not in fit or module is head or n in routers]
    return BitsAndBytesConfig(
        load_in_4bit=quant.bits == 4,
        load_in_8bit=quant.bits == 8,
        llm_int8_skip_modules=whole or None,
        bnb_4bit_compute_dtype=compute_dtype(config),
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_quant_storage=FSDP_STORAGE if config.training.fsdp else None,
    )


def load_base(config: Config, model_config: PretrainedConfig | None, folder: str | Path, **options: Any) -> Any:
    """Load a model that its files fill and fit: transformers only warns, and draws missing weights at random."""
    what = f"model {folder}"
    options |= {"config": model_config, "trust_remote_code": config.model.trust_remote_code} | hub_options(config)
    options = {name: value for name, value in options.items() if value is not None}
    quirk = QUIRKS.get(model_config.model_type if model_config else "", contextlib.nullcontext)
    calibrated = config.quant.calibration_rows and getattr(model_config, "quantization_config", None)
    packs = calibrated or getattr(options.get("quantization_config"), "load_in_4bit", False)
    packing = packing_experts(config) if packs and packs_experts(config) else contextlib.nullcontext()
    with reraise_as_user_error(what, RuntimeError), quirk(), packing:
        model, loading = auto_model(config, model_config).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if (file := Path(folder, EXPERT_STATISTICS)).is_file():  # of stacks of codes, (experts, bytes, 1), by stack:part
        statistics = load_file(file)
        for name, (module, codes) in stacked_experts(model, known=True).items():
            parts = {k.removeprefix(f"{name}:"): part for k, part in statistics.items() if k.startswith(f"{name}:")}
            weight = bitsandbytes.nn.Params4bit.from_prequantized(codes.view(-1, 1), parts, device=codes.device)
            setattr(module, leaf_name(name), weight)
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"{what}: {len(missing)} weights are not in it, first {missing[0]}")
    sizes = [*loading["mismatched_keys"]]
    for name, module in model.named_modules():  # transformers checks no shape that it quantises, 5.17 no other
        if isinstance(module, torch.nn.Linear) and module.weight.numel():  # DeepSpeed's shards are empty
            stored = getattr(module.weight, "quant_state", None) or module.weight
            sizes.append((f"{name}.weight", stored.shape, (module.out_features, module.in_features)))
        elif isinstance(module, torch.nn.Embedding) and module.weight.numel():
            sizes.append((f"{name}.weight", module.weight.shape, (module.num_embeddings, module.embedding_dim)))
    for name, found, wanted in sorted(sizes, key=str):
        if tuple(found) != tuple(wanted):
            raise ConfigError(f"{what}: config.json makes {name} {tuple(wanted)}, the file has {tuple(found)}")
    kinds = {*map(without_numbers, model.state_dict())}
    beyond = [name for name in sorted(loading["unexpected_keys"]) if without_numbers(name) in kinds]
    if beyond and not getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0):
        raise ConfigError(f"{what}: config.json has fewer layers than the weights, which go on with {beyond[0]}")
    generation = getattr(model, "generation_config", None)
    if generation is not None and (generation.temperature or generation.top_p):
        generation.do_sample = True  # else LLaMA-2's sampling values can't be saved
    return model


def check_prequantised(config: Config, stored: Mapping[str, Any]) -> None:
    """Refuse flags that need weights which are not quantised yet."""
    base, storage = config.model.model_name_or_path, stored.get("bnb_4bit_quant_storage", "uint8")
    if config.training.fsdp and "float" not in storage:
        reason = "FSDP shards floating dtypes only: pass the base as published"
        raise ConfigError(f"--fsdp: {base} is quantised already and stored as {storage}, {reason}")
    if config.quant.full_finetune or (init := config.lora.init_lora_weights).lower() not in QUANTISED_INITS:
        flag = "--full_finetune" if config.quant.full_finetune else f"--init_lora_weights {init}"
        raise ConfigError(f"{flag}: {base} is quantised already")


def load_for_fsdp(config: Config, model_config: PretrainedConfig, folder: str | Path, **options: Any) -> Any:
    """Load a base on the CPU as FSDP can shard it; the scales of its 4-bit blocks, unknown to FSDP, on this GPU.

    Nothing public in bitsandbytes 0.50 quantises on the GPU (7B in 2 s, not 200) and stores on the CPU.
    """
    device, quantise = config.training.device, bitsandbytes.nn.Params4bit._quantize

    def quantise_on_device(weight: Any, storage: Any) -> Any:
        quantise(weight, device)
        weight.data = weight.data.to(storage)
        return weight

    with mock.patch.object(bitsandbytes.nn.Params4bit, "_quantize", quantise_on_device):
        model = load_base(config, model_config, folder, **options)
    for weight in (weight for weight in model.parameters() if hasattr(weight, "quant_state")):
        weight.data = weight.data.flatten().view(FSDP_STORAGE).unsqueeze(1)  # rows to shard
        weight.quant_state.to(device)
    head = model.get_output_embeddings()
    for module in model.modules():  # BERT's head holds its bias twice; the decoder's is the one that is added
        if module is not head and head.bias is not None and getattr(module, "bias", None) is head.bias:
            module.bias = None
    return model


def load_model(config: Config, model_config: PretrainedConfig, folder: str) -> Any:
    """The base model to train or use, quantised and placed."""
    args, stored = config.training, getattr(model_config, "quantization_config", None)
    state: Any = args.distributed_state
    if args.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        # accelerate would silently use DDP, or nothing
        way = "start it with torchrun --nproc_per_node N qlora.py on a machine with GPUs, or leave it out"
        raise ConfigError(f"--fsdp shards the weights over GPUs, one process each: {way}")
    options: dict[str, Any] = {"dtype": load_dtype(config), "attn_implementation": resolve_attention(config)}
    options["device_map"] = device_map(config)
    if options["device_map"] == "auto":
        options["max_memory"] = dict.fromkeys(range(torch.cuda.device_count()), f"{config.quant.max_memory_MB}MB")
    if stored:
        check_prequantised(config, stored)
        if not AutoHfQuantizer.supports_quant_method(stored):  # transformers would ignore it
            raise ConfigError(f"model {folder}: no known quantisation: {stored.get('quant_method')}; pass the original")
    else:
        options["quantization_config"] = quantisation_config(config, model_config)
    if args.deepspeed:  # ZeRO-3 shards weights while they are loaded, by its own count of the processes
        importlib.import_module("deepspeed").init_distributed()
    model = (load_for_fsdp if args.fsdp else load_base)(config, model_config, folder, **options)
    if packs := packs_experts(config):
        pack_experts(model, config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # the first evaluation would repack, and change, weights
            module.support_avx512bf16_for_cpu = False
    if stored and not config.quant.calibration_rows:  # whose base is our own
        unpacked = getattr(model, "hf_quantizer", None) is None  # transformers drops it then
        held = f"dequantised, held in {str(model.dtype)[6:]}" if unpacked else "loaded as it is: its bits are its own"
        log.info("the checkpoint is already quantised (%s) and is %s", stored.get("quant_method"), held)
    experts = (module for module in model.modules() if "expert" in type(module).__name__.lower())
    stacks = [w for module in experts for w in module.parameters(recurse=False) if w.dim() > 1]
    if options.get("quantization_config") and stacks and not any(hasattr(w, "quant_state") for w in stacks):
        why = "this family's are not known" if packs else "only --bits 4 without --deepspeed packs them"
        size, dtype = sum(weight.nbytes for weight in stacks) / GIB, str(stacks[0].dtype)[6:]
        log.warning("%d tensors of experts, %.2f GiB, stay in %s: %s", len(stacks), size, dtype, why)
    # else the Trainer wraps the model in DataParallel where it sees several GPUs
    model.is_parallelizable = model.model_parallel = True
    model.config.use_cache = False  # of no use in training; generation turns it on
    return model


def sync_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the tokenizer's BOS, EOS and pad ids to the model's config."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))


def parameter_report(model: torch.nn.Module) -> list[str]:
    """The original's line on trainable parameters, with true counts; dtypes; kinds of layers with adapters."""
    by_dtype: Counter[str] = Counter()
    trainable = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)  # a 4-bit weight counts as the matrix that it packs,
        size = math.prod(packed.shape) if packed else getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3's too
        trainable += size if parameter.requires_grad else 0
        by_dtype[f"{packed.quant_type} (packed)" if packed else str(parameter.dtype).removeprefix("torch.")] += size
    total = sum(by_dtype.values())
    lines = [f"trainable params: {trainable:,} || all params: {total:,} || trainable: {100 * trainable / total:.4g} %"]
    lines += [f"{name}: {size:,} ({100 * size / total:.1f} %)" for name, size in by_dtype.most_common()]
    kinds = {"adapters": Counter[str](), "linear layers without": Counter[str]()}
    for name, module in model.named_modules() if isinstance(model, PeftModel) else ():
        inside = re.search("base_layer|lora_|original_module|modules_to_", name)
        if isinstance(module, (LoraLayer, *LINEAR_CLASSES)) and not inside:
            kind = without_numbers(name.removeprefix("base_model.model."))
            title = "adapters" if isinstance(module, LoraLayer) else "linear layers without"
            kinds[title][kind.partition(".*.")[2] or kind] += 1
    return lines + [f"{title}: {', '.join(f'{n} {k}' for k, n in of.items())}" for title, of in kinds.items() if of]


# ------------------------------------------------------------------------------------
# 9. Calibration: 4-bit codes chosen by what the layers compute on training rows
#
# bitsandbytes rounds every weight to the nearest code. Here block scales and codes are chosen so that a layer's outputs
# on real inputs change least, and adapters start from what rounding left. The base is written in transformers' own
# layout of quantised models, so that no later room knows the difference.
# ------------------------------------------------------------------------------------
BLOCK = 64  # weights that share a scale: bitsandbytes' default
DAMPING = (0.01, 0.1, 1.0)  # of H's mean diagonal, added to it; the next one where Cholesky's method fails
FEWEST_TOKENS = 16  # an expert that fewer reach is rounded plainly
TOGETHER = 2**26  # values in the square matrices of experts that are calibrated together: 16 of 2048 x 2048
ADAPTER_START = "adapter_start.safetensors"  # in a calibrated base's folder


class Choice(NamedTuple):
    """What stands in the place of a weight W, or of a stack of experts."""

    weight: Any  # Q, a Params4bit
    start: dict[str, Tensor]  # lora_A, (r, in), and lora_B, (out, r), close to W - Q; empty: from zero
    before: float  # squared change of the outputs by plain rounding
    after: float  # by Q
    plain: int = 0  # how many matrices are rounded plainly


def weighted_scales(weight: Tensor, importance: Tensor, code: Tensor) -> Tensor:
    """Scales of a weight's blocks, (out, in / BLOCK), by least squares over 18 fractions of the largest value.

    Each square counts by the mean square of its input, `importance`, (in,): without that the loss before training is
    worse than with plain rounding.
    """
    importance = (importance + 0.01 * importance.mean()).view(-1, BLOCK)  # channels that are never on count a little
    blocks, midpoints = weight.unflatten(1, (-1, BLOCK)), (code[1:] + code[:-1]) / 2
    largest = blocks.abs().amax(-1)
    best, chosen = torch.full_like(largest, math.inf), largest
    for fraction in torch.linspace(0.7, 1.05, 18).tolist():
        scale = (largest * fraction)[..., None]
        nearest = code[torch.bucketize((blocks / scale).contiguous(), midpoints)]
        errors = (nearest * scale - blocks).square_().mul_(importance).sum(-1)
        chosen, best = torch.where(errors < best, scale[..., 0], chosen), torch.minimum(errors, best)
    return chosen


class Factors(NamedTuple):
    """Of H, damped, with its columns in order of falling diagonal."""

    hessian: Tensor  # H itself
    order: Tensor
    lower: Tensor  # Cholesky factor, in float64
    inverse: Tensor  # upper Cholesky factor of the inverse, in float32


def damped_factors(hessian: Tensor, tokens: float = math.inf) -> Factors | None:
    """Factor H, with more damping where it is needed; None if it tells nothing."""
    diagonal = hessian.diagonal()
    order, mean = diagonal.argsort(descending=True), diagonal.mean().double()
    for damping in DAMPING if diagonal.isfinite().all() and mean > 0 else ():
        ordered = hessian[order][:, order].double()
        # codes fitted to few tokens had 1.6 times plain rounding's error on others without len(H) / tokens, 0.8 with it
        ordered.diagonal().add_((damping + len(hessian) / tokens) * mean)
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            inverse = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
            return Factors(hessian, order, lower, inverse)
    return None


def feed_errors_back(weight: Tensor, scales: Tensor, code: Tensor, inverse: Tensor) -> Tensor:
    """Ascending codes, (out, in), of columns rounded one after the other.

    The columns still to come make the error of each good (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323).
    `inverse` and the columns are in the order of Factors. They go 128 at a time, as products are faster, and those of
    several experts, (experts, out, in), together.
    """
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.long, device=weight.device)
    midpoints = (code[1:] + code[:-1]) / 2
    for start, end in ((start, start + 128) for start in range(0, weight.shape[-1], 128)):
        block, errors = weight[..., start:end], torch.empty_like(weight[..., start:end])
        for i in range(block.shape[-1]):
            column, scale, row = block[..., i], scales[..., start + i], inverse[..., start + i, None, :]
            codes[..., start + i] = nearest = torch.bucketize(column / scale, midpoints)
            errors[..., i] = (column - code[nearest] * scale) / row[..., start + i]
            block[..., i + 1 :] -= errors[..., i, None] * row[..., start + i + 1 : end]
        weight[..., end:] -= errors @ inverse[..., start:end, end:]
    return codes


def adapter_start(left: Tensor, factors: Factors, rank: int) -> dict[str, Tensor]:
    """lora_A, (r, in), and lora_B, (out, r), whose product is closest to `left` = W - Q by H's measure.

    From the singular vectors of (W - Q) L with H = L Lᵀ (QERA, https://arxiv.org/abs/2410.06040; CLoQ,
    https://arxiv.org/abs/2501.18475).
    """
    lower, order = factors.lower.float(), factors.order
    with torch.random.fork_rng([left.device] if left.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(left[:, order] @ lower, q=min(rank + 16, *left.shape), niter=4)
    root, a = s[:rank].sqrt(), left.new_zeros(rank, left.shape[1])  # zeros where a layer is narrower than the rank
    a[: len(root), order] = torch.linalg.solve_triangular(lower, (v[:, :rank] * root).T, upper=False, left=False)
    b = F.pad(u[:, :rank] * root, (0, rank - len(root)))
    return {"lora_A": a, "lora_B": b.contiguous()}  # on a GPU the singular vectors are columns in memory


def calibrate_weight(weight: Tensor, inputs: Mapping[int, Any], config: Config, transposed: bool) -> Choice:
    """Quantise a weight, (out, in), or a stack of them, each (in, out) if `transposed`, for the inputs x that they see.

    `inputs` maps a matrix's number in the stack to the diagonal of H = Σ x xᵀ and a function that returns H's Factors.
    Matrices absent from it, and those that bitsandbytes rounds better by H's measure, keep its codes. Blocks lie along
    the last dimension.
    """
    packed, stack = pack_weight(weight.to(load_dtype(config)), config), weight.view(-1, *weight.shape[-2:])
    if not inputs or weight.shape[-1] % BLOCK:
        return Choice(packed, {}, 0.0, 0.0, len(stack))
    plain, state = stack_values(packed, load_dtype(config)).view_as(stack), packed.quant_state
    code, stored_code = state.code.sort()
    scales = stack.unflatten(2, (-1, BLOCK)).abs().amax(3).float()
    for i, (squares, _) in inputs.items():  # transposed: a block shares one input
        scales[i] = weighted_scales(stack[i].float(), torch.ones_like(stack[i, 0]) if transposed else squares, code)
    state.absmax = scales.flatten()
    if state.nested:
        # a stack keeps its offset, so that experts rounded plainly keep their scales, unless others share their block
        state.offset = state.absmax.mean() if weight.dim() == 2 else state.offset
        state.absmax, state.state2 = bnb_functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        scales = (bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).view_as(scales)
    errors, size = dict[int, list[float]](), max(1, TOGETHER // max(stack[0].shape) ** 2)
    for group in (list(inputs)[i : i + size] for i in range(0, len(inputs), size)):
        factors = [inputs[i][1]() for i in group]
        parts = stack[group].float(), scales[group].repeat_interleave(BLOCK, 2), plain[group]
        values, scale, rounded = (part.mT if transposed else part for part in parts)
        order = torch.stack([one.order for one in factors])[:, None]  # (experts, 1, in)
        inverse = torch.stack([one.inverse.mT for one in factors]).mT  # in Cholesky's layout
        ordered = feed_errors_back(values.take_along_dim(order, 2), scale.take_along_dim(order, 2), code, inverse)
        codes = ordered.take_along_dim(order.argsort(), 2)
        chosen = (code[codes] * scale).to(rounded.dtype)
        for i, one, *rests in zip(group, factors, values - rounded, values - chosen, strict=True):
            errors[i] = [float(((rest @ one.hessian) * rest).sum()) for rest in rests]  # tr(D H Dᵀ)
        high, low = stored_code.to(torch.uint8)[codes.mT if transposed else codes].reshape(len(group), -1, 2).unbind(2)
        packed.data.view(torch.uint8).view(len(stack), -1)[group] = high << 4 | low
    before, after = map(sum, zip(*errors.values(), strict=True))
    better = {i: own for i, own in inputs.items() if errors[i][1] < errors[i][0]}
    if len(better) < len(inputs):  # again without the others: nested scales are quantised together, so all may change
        choice = calibrate_weight(weight, better, config, transposed)
        return choice._replace(before=before, after=before - choice.before + choice.after)
    return Choice(packed, {}, before, after, len(stack) - len(inputs))


def choose_codes(weight: Tensor, factors: Factors | None, config: Config) -> Choice:
    """Round a linear layer's weight, (out, in), by its inputs, and start its adapter from what is left."""
    inputs = {0: (factors.hessian.diagonal(), lambda: factors)} if factors else {}
    choice = calibrate_weight(weight, inputs, config, transposed=False)
    left = weight - stack_values(choice.weight, load_dtype(config))
    return choice._replace(start=adapter_start(left, factors, config.lora.lora_r) if factors else {})


def as_matrix(module: Any) -> Any:
    """A linear layer's weight as (out, in); GPT-2's Conv1D holds it the other way round."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


class InputSums:
    """Σ x xᵀ of what linear layers read, in float32; layers share that of one tensor."""

    def __init__(self) -> None:
        self.sums = dict[str, Tensor]()
        self.readers = defaultdict[str, set[str]](set)  # of each sum's input
        self.routed = defaultdict[str, list[Any]](list)  # x, (tokens, in), and the experts of each token, (tokens, k)
        self.latest: tuple[Any, str] = (None, "")

    def add(self, name: str, module: Any, args: tuple[Tensor]) -> None:
        """Add a call's input, (..., in)."""
        if knows_experts(module):
            x, reached = args[0], args[1] if len(args) > 1 else None
            if reached is None:  # Llama 4's read all tokens each, zeros where these are not theirs
                kept = x.any(1).nonzero()  # (rows, 1)
                x, reached = x[kept[:, 0]], kept // (len(x) // module.num_experts)
            return self.routed[name].append((x, reached))
        if args[0] is not self.latest[0]:
            self.latest = args[0], name
            x = args[0].flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):
                self.sums[name] = self.sums.get(name, 0) + x.T @ x
        self.readers[self.latest[1]].add(name)


def calibrate_experts(module: Any, calls: Sequence[Any], config: Config) -> Iterator[tuple[str, Choice]]:
    """Choose the codes of stacks of experts, each expert's on the tokens that reach it; put them in place."""
    x, reached = map(torch.cat, zip(*calls, strict=True))
    rows = [x[(reached == expert).any(1)] for expert in range(module.num_experts)]
    transposed = getattr(module, "is_transposed", True)  # Llama 4's has no such attributes
    gate = getattr(module, "_apply_gate", lambda x: x.chunk(2, -1)[1] * module.act_fn(x.chunk(2, -1)[0]))
    for name in sorted(stacks_in(module), reverse=True):  # down_proj last
        known = dict[int, Any]()
        for i, own in enumerate(rows):
            squares = own.float().square().sum(0)
            if len(own) >= FEWEST_TOKENS and 0 < squares.sum() < math.inf:
                known[i] = squares, lambda x=own: damped_factors(x.float().T @ x.float(), len(x))
        stack = module._parameters[name].data
        choice = calibrate_weight(stack, known, config, transposed)
        stack.copy_(stack_values(choice.weight, stack.dtype))
        yield name, choice
        if name != "down_proj":
            bias = getattr(module, f"{name}_bias", stack.new_zeros(len(stack), 1))
            weights = stack.mT if transposed else stack
            products = (own.float() @ w.float().mT + b for own, w, b in zip(rows, weights, bias, strict=True))
            rows = [gate(inner) if getattr(module, "has_gate", True) else module.act_fn(inner) for inner in products]


def calibrate_layer(
    layer: Any, modules: Mapping[str, Any], calls: Sequence[Any], config: Config
) -> tuple[dict[str, Choice], list[Tensor]]:
    """Choose the codes of a layer's weights; also its new outputs, which are the next layer's inputs."""
    device, dtype, inputs = config.training.device, compute_dtype(config), InputSums()
    run = torch.autocast(device.type, dtype, dtype != torch.float32)(layer)
    weights = {name: as_matrix(module) for name, module in modules.items() if not knows_experts(module)}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(partial(inputs.add, name)))
        for hidden, args, kwargs in calls:
            run(hidden, *args, **kwargs)
    choices: dict[str, Choice] = {}
    for owner, readers in inputs.readers.items():
        factors = damped_factors(inputs.sums.pop(owner))
        choices |= {name: choose_codes(weights[name].float(), factors, config) for name in sorted(readers)}
    choices |= {n: choose_codes(w.float(), None, config) for n, w in weights.items() if n not in choices}
    for name, weight in weights.items():
        weight.copy_(stack_values(choices[name].weight, weight.dtype))
    for name, seen in inputs.routed.items():
        choices |= {f"{name}.{leaf}": choice for leaf, choice in calibrate_experts(modules[name], seen, config)}
    outputs = (run(hidden, *args, **kwargs) for hidden, args, kwargs in calls)
    return choices, [out[0] if isinstance(out, tuple) else out for out in outputs]


def replace_weight(model: Any, name: str, weight: Any, config: Config) -> None:
    """Put a 4-bit layer in the place of a linear one, or a packed stack in that of another, on the CPU."""
    if len(weight.quant_state.shape) == 3:
        return setattr(model.get_submodule(name.rpartition(".")[0]), leaf_name(name), weight.to("cpu"))
    out, size = weight.quant_state.shape
    layer = bitsandbytes.nn.Linear4bit(size, out, bias=False, compute_dtype=compute_dtype(config), device="meta")
    layer.weight, layer.bias = weight.to("cpu"), model.get_submodule(name).bias
    model.set_submodule(name, layer)


def layer_calls(model: Any, model_config: PretrainedConfig, ids: list[list[int]], config: Config) -> list[list[Any]]:
    """What each layer is called with, by row; no layer runs, so only the first one's input is real."""
    layers, twin, parts = decoder_layers(model), meta_model(config, copy.deepcopy(model_config)), dict[int, int]()
    for i, layer in enumerate(decoder_layers(twin)):  # how many values a layer returns; 0 for one that is no tuple
        layer.register_forward_hook(lambda m, args, out, i=i: parts.update({i: len(out) * isinstance(out, tuple)}))
    calls: list[list[Any]] = [[] for _ in layers]

    def record(i: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[i].append((hidden_states, args, kwargs))
        return (hidden_states, *[None] * (parts[i] - 1)) if parts[i] else hidden_states

    what = f"--calibration_rows: {type(model).__name__} can't be calibrated layer by layer"
    with reraise_as_user_error(what, RuntimeError, IndexError), contextlib.ExitStack() as stack:
        with MetaValues():
            twin.bfloat16().eval()(input_ids=torch.ones(1, 8, dtype=torch.long, device="meta"))
        for i, layer in enumerate(layers):
            stack.enter_context(mock.patch.object(layer, "forward", partial(record, i)))
        for row in ids:
            model.base_model(input_ids=torch.tensor([row]))
    if {len(own) for own in calls} != {len(ids)}:
        raise ConfigError(f"{what}: its layers are not called once each")
    return calls


def write_calibrated(model: Any, model_config: Any, ids: list[list[int]], config: Config, folder: str) -> None:
    """Choose the codes of every layer on the outputs of those before it, and write the base to `folder`.

    In memory are the base, mapped from its files but for stacks of experts, what is packed so far, and on the device
    one layer with the sums of its inputs. Layers outside the decoder's are rounded plainly.
    """
    device, began, layers = config.training.device, time.perf_counter(), decoder_layers(model)
    prefixes, dtype = [f"{name}." for name, module in model.named_modules() if module in layers], load_dtype(config)
    for name, parameter in model.named_parameters():
        if dtype == torch.float32 and not name.startswith(tuple(prefixes)):
            parameter.data = parameter.data.float()
    quantisation: Any = quantisation_config(config, model_config)
    whole, starts = {*(quantisation.llm_int8_skip_modules or ())}, dict[str, Tensor]()
    linear = [n for n, m in model.named_modules() if isinstance(m, LINEAR_CLASSES) and n not in whole]
    targets = linear + [n for n, m in model.named_modules() if knows_experts(m)]
    before, after, plain = 0.0, 0.0, 0
    calls = layer_calls(model, model_config, ids, config)
    hidden = [send_to_device(call[0], device) for call in calls[0]]
    for prefix in (bar := tqdm(prefixes, "Calibrating", disable=None)):
        layer = model.get_submodule(prefix[:-1]).to(device, torch.float32 if dtype == torch.float32 else None)
        modules = {name: model.get_submodule(name) for name in targets if name.startswith(prefix)}
        own = [(state, *send_to_device(call[1:], device)) for state, call in zip(hidden, calls.pop(0), strict=True)]
        choices, hidden = calibrate_layer(layer, modules, own, config)
        for name, choice in choices.items():
            replace_weight(model, name, choice.weight, config)
            starts |= {f"{name}.{part}": tensor.cpu() for part, tensor in choice.start.items()}
            before, after, plain = before + choice.before, after + choice.after, plain + choice.plain
        layer.to("cpu")
        bar.set_postfix_str(share := f"{1 - after / (before or 1):.0%} of the error removed")
        if bar.disable and len(calls) % 8 == 0:  # a pipe has no bar
            log.info("calibration: %d layers left, %s", len(calls), share)
    for name in (name for name in linear if not name.startswith(tuple(prefixes))):
        replace_weight(model, name, pack_weight(as_matrix(model.get_submodule(name)).to(dtype), config), config)
    model.config.quantization_config, model.is_loaded_in_4bit = quantisation.to_dict(), True
    codes, statistics = dict[str, Tensor](), dict[str, Tensor]()
    for name, (_, weight) in stacked_experts(model).items():
        if state := getattr(weight, "quant_state", None):
            codes[name] = weight.data.view(torch.uint8).view(state.shape[0], -1, 1)
            statistics |= {f"{name}:{part}": own.clone() for part, own in state.as_dict(packed=True).items()}
    # packed experts can't be taken apart, as the published format has them
    model.save_pretrained(folder, state_dict=model.state_dict() | codes, save_original_format=not codes)
    if statistics:
        save_file(statistics, Path(folder, EXPERT_STATISTICS))
    save_file(starts, Path(folder, ADAPTER_START))
    if plain:
        why = f"few or no tokens reach them, or their rows are no multiple of {BLOCK} values"
        log.warning("calibration: %d matrices are rounded plainly: %s", plain, why)
    message = "calibration took %.0f s: squared error of the layers' outputs %.4g by plain rounding, %.4g now"
    log.info(message, time.perf_counter() - began, before, after)


def adapter_start_file(config: Config, base: str) -> Path | None:
    """Where adapters of a run on this calibrated base start; None if they start as --init_lora_weights says."""
    own = "init_lora_weights" not in config.explicitly_set and config.model.adapter_name_or_path is None
    return Path(base, ADAPTER_START) if config.quant.calibration_rows and own else None


@torch.no_grad()
def calibrated_base(config: Config, model_config: Any, published: str, rows: Any, known: str | None) -> str:
    """The folder of the calibrated base: `known` of the run that goes on, one from the cache, or a new one."""
    root, count = Path(config.model.cache_dir or HF_HOME, "qlora-calibrated"), config.quant.calibration_rows
    args, dtype = config.training, load_dtype(config)
    if known and (root / known).is_dir():
        return str(root / known)
    if getattr(model_config, "quantization_config", None):
        raise ConfigError(f"--calibration_rows: {config.model.model_name_or_path} is quantised already")
    if args.deepspeed:
        raise ConfigError("--calibration_rows and --deepspeed: pass only one of them")
    rows = getattr(rows, "rows", rows) or []  # of packs, their rows
    if len(rows) < count:
        log.info("--calibration_rows %d: the dataset has %d, all of them are used", count, len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    ids = [rows[i]["input_ids"] for i in order[:count]]
    # its name is a hash of the model's files, the rows and the flags that it depends on
    files = [file for file in sorted(Path(published).glob("*")) if file.is_file()]
    source: list[Any] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    source = source or [published, getattr(model_config, "_commit_hash", None)]
    flags = [dtype, compute_dtype(config), args.device.type, bool(args.fsdp), config.masked]
    names = ("quant_type", "double_quant", "lora_r", "rope_scaling", "attn_implementation")
    folder = root / digest("3", source, *flags, *(config.flags[name] for name in names), ids)
    if not ids or (known and folder.name != known):
        raise ConfigError(f"--calibration_rows: the base of this run is not in {root}, these rows make another")
    if not folder.is_dir():
        options: Any = {"device_map": {"": "cpu"}, "attn_implementation": resolve_attention(config)}
        options["dtype"] = "auto" if dtype == torch.float32 else dtype
        model = load_base(config, model_config, published, **options).eval()
        model.config.get_text_config().use_cache = False
        with made_once(folder, f"--calibration_rows: {folder}") as made:
            write_calibrated(model, model_config, ids, config, made)
    log.info("calibrated base: %s", folder)
    if args.do_train and args.learning_rate > 5e-4 and adapter_start_file(config, str(folder)):
        log.info("hint: adapters on a calibrated base want a rate about four times smaller, such as 2.5e-4")
    return str(folder)


# ------------------------------------------------------------------------------------
# 10. LoRA: the base -> a model whose adapters train
#
# Adapters go on every linear layer but the output head, which is found by identity and not by a name. They are kept in
# float32 and computed in the compute dtype. A full fine-tune freezes the embeddings instead.
# ------------------------------------------------------------------------------------
LAYER_GROUPS = {  # of --lora_modules, by the families' names for the blocks
    "all": r".*",
    "attn": r"(.*\.)?(self_|cross_|linear_)?(attn|attention|attn_attention)\..*",
    "mlp": r"(.*\.)?(mlp|ffn|ff|feed_forward|block_sparse_moe)\..*|(.*\.)?fc\d|"
    r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense",  # BERT and its kind, whose attention has an `output` too
}


def outside_frozen_layers(names: Iterable[str], model: PreTrainedModel, lora: LoraArguments) -> set[str]:
    """Those of the names that lie in no frozen layer; freezing all layers is a ConfigError."""
    layers: int = model.config.get_text_config().num_hidden_layers or 0
    frozen = lora.layers_to_freeze or int(lora.layer_freeze_ratio * layers)
    if frozen and frozen >= layers:
        raise ConfigError(f"--layers_to_freeze {frozen}: the model has {layers} layers, nothing would train")
    # the first number in a name is its layer's; a name without one lies in no layer and stays
    return {name for name in names if next((int(n) for n in name.split(".") if n.isdigit()), math.inf) >= frozen}


def lora_targets(model: PreTrainedModel, lora: LoraArguments, masked: bool = False) -> set[str]:
    """Full names of the layers that --lora_modules asks for, and of stacks of experts, outside frozen layers."""
    layers, targets, experts = linear_layers(model, masked), set[str](), [*stacked_experts(model, known=True)]
    if not lora.use_dora and lora.init_lora_weights.lower() in ("true", "false", "gaussian"):
        layers += experts
    elif experts:  # said once, as the plan attaches adapters too
        warn_once("experts get no adapters: peft takes neither --use_dora nor this --init_lora_weights for them")
    trainable = outside_frozen_layers(layers, model, lora)
    grouped = trainable - find_routers(model, trainable)
    for name in map(str.strip, lora.lora_modules.split(",")):
        pattern = re.compile(LAYER_GROUPS.get(name, rf"(.*\.)?{re.escape(name)}(?:(?<=experts)\.\w+)?"))
        found = set(filter(pattern.fullmatch, grouped if name in LAYER_GROUPS else trainable))
        if not found:
            known = ", ".join(sorted(set(map(leaf_name, layers)))) or "none that an adapter fits"
            raise ConfigError(f"--lora_modules: no linear layer is called {name!r}, the model has {known}")
        targets |= found
    return targets


def add_expert_patterns(patterns: dict[str, Any], experts: Sequence[str], per_token: int, lora: LoraArguments) -> None:
    """Add rank and alpha of stacks of experts, by name, to the patterns that the user passed for layers.

    A stack must match one key only: peft takes the first, and saves them in another order. So keys are full names where
    the user's match some. The experts of a token share the rank (Schulman et al. 2025,
    https://thinkingmachines.ai/blog/lora/).
    """
    rank = lora.expert_lora_r or max(1, lora.lora_r // per_token)
    for name, value in ("rank_pattern", rank), ("alpha_pattern", lora.lora_alpha):
        by_user = {n for n in experts if get_pattern_key(patterns[name], n) in patterns[name]}
        others = [n.split(".") for n in experts if n not in by_user]
        patterns[name] |= {re.escape(".".join(parts if by_user else parts[-2:])): value for parts in others}


def lora_config(model: PreTrainedModel, lora: LoraArguments, masked: bool = False) -> LoraConfig:
    """The flags as peft's configuration; a name in --modules_to_save that no module has is a ConfigError."""
    init = lora.init_lora_weights.lower()
    whole = [name.strip() for name in (lora.modules_to_save or "").split(",") if name.strip()]
    for name in whole:
        if not any(f".{full}".endswith(f".{name}") for full, _ in model.named_modules()):
            raise ConfigError(f"--modules_to_save: the model has no module called {name!r}")
    targets = lora_targets(model, lora, masked)
    patterns: Any = {f"{name}_pattern": parse_pattern(lora, name) for name in ("rank", "alpha")}
    for key in itertools.chain(*patterns.values()):
        if all(get_pattern_key([key], name) != key for name in targets):
            raise ConfigError(f"--lora_rank_pattern, --lora_alpha_pattern: no adapted layer is called {key!r}")
    experts = sorted(targets & stacked_experts(model, known=True).keys())
    if init == "olora" and any(isinstance(model.get_submodule(name), Conv1D) for name in targets.difference(experts)):
        raise ConfigError("--init_lora_weights olora: peft transposes no layers of GPT-2's kind; pass pissa")
    add_expert_patterns(patterns, experts, experts_per_token(model.config), lora)
    if experts and lora.lora_dropout:
        warn_once("--lora_dropout: experts get none, which peft cannot give them")
    if lora.expert_lora_r and not experts:
        warn_once("--expert_lora_r: without effect, no stack of experts is adapted")
    ranks = patterns["rank_pattern"]
    for name in (*experts, *(targets if mutates_base(init) else ())):
        weight: Any = model.get_parameter(name if name in experts else f"{name}.weight")
        most = min(getattr(weight, "ds_shape", getattr(weight, "quant_state", weight).shape)[-2:])
        rank = ranks.get(get_pattern_key(ranks, name), lora.lora_r)
        if rank > most:
            flag, start = ("expert_lora_r", "") if name in experts else ("lora_r", f", and {init} starts from it")
            raise ConfigError(f"--{flag} {rank}: {name} has a rank of {most} at most{start}")
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=int(lora.lora_alpha) if lora.lora_alpha % 1 == 0 else lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(targets.difference(experts)),  # peft shortens a long list
        target_parameters=experts or None,
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        **patterns,
        init_lora_weights={"true": True, "false": False}.get(init, init),  # type: ignore[arg-type]
        modules_to_save=whole or None,
        task_type=None if masked else "CAUSAL_LM",  # which needs methods for generation
    )


def adapter_files(adapter: str, config: Config) -> str:
    """The folder of an adapter, downloaded if it is a hub id."""
    with reraise_as_user_error(f"--adapter_name_or_path {adapter}"):
        return str(download(adapter, ["adapter_config.json", "adapter_model.*", "tokenizer.json"], config))


def fit_calibrated_base(adapted: Any, start: Path, fresh: bool, rank: int) -> None:
    """Give fresh adapters their start; of saved ones zero the half that convert_to_published_base has added."""
    starts = load_file(start) if fresh else {}
    for name, layer in adapted.named_modules():
        key = name.removeprefix("base_model.model.")
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
            continue  # experts start at zero
        if not fresh:
            layer.lora_B["default"].weight.data[:, rank:] = 0  # type: ignore[operator]
        for part in ("lora_A", "lora_B") if f"{key}.lora_A" in starts else ():  # the scaling goes evenly to A and B
            getattr(layer, part)["default"].weight.data.copy_(starts[f"{key}.{part}"] / layer.scaling["default"] ** 0.5)


def load_adapter_weights(adapted: Any, folder: str) -> None:
    """Fill a model's adapter from a folder: the file has all of it, and nothing else."""
    # with --lora_bias all peft saves the biases of modules that are trained whole under two more names
    copies = re.compile(r"\.(modules_to_save|original_module)\.")
    stored = {name: w for name, w in load_peft_weights(folder, device="cpu").items() if not copies.search(name)}
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    own = get_peft_model_state_dict(adapted).keys()
    # peft 0.21 renames what transformers 4 called experts, also where the names are the model's own (Laguna)
    renames = f"{peft_conversion.__name__}.convert_peft_adapter_state_dict_for_transformers"
    as_it_is = mock.patch(renames, lambda adapter_state_dict, **kwargs: adapter_state_dict)
    as_named = as_it_is if stored.keys() <= own else contextlib.nullcontext()
    with as_named, reraise_as_user_error(f"{folder} does not fit the model"):
        result: Any = set_peft_model_state_dict(adapted, stored)
    # peft would put a base's own weight into the base, which is not saved with the adapter
    unused = [*result.unexpected_keys, *(name for name in stored if "lora_" not in name and name not in own)]
    empty = sorted(trained.intersection(result.missing_keys))
    if unused or empty or not stored:
        found = f"{len(unused)} of its weights have no place in the model, {len(empty)} of the model's are not in it"
        raise ConfigError(f"{folder}: {found}: {', '.join([*unused[:1], *empty[:1]]) or 'it is empty'}")


@contextlib.contextmanager
def adapting_packed_experts(own_names: bool) -> Iterator[None]:
    """Let peft see the shapes that packed stacks stand for and, if these are the model's own names, rename nothing.

    It renames what transformers 4 called experts, and takes a mixture's dense and shared layers for them
    (0.21, https://github.com/huggingface/peft/issues/3711).
    """
    shown = ParamWrapper.get_param

    def get_param(self: Any) -> Tensor:
        weight = shown(self)
        state = getattr(weight, "quant_state", None)
        return weight.new_zeros(1, dtype=torch.float32).expand(state.shape) if state else weight

    as_it_is = mock.patch(f"{peft_conversion.__name__}.convert_peft_config_for_transformers", lambda *a, **k: None)
    as_named = as_it_is if own_names else contextlib.nullcontext()
    with as_named, mock.patch.object(ParamWrapper, "get_param", get_param), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*keys did not match any targeted module")
        yield


def adapted_experts(model: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The outermost of peft's wrappers of each module of experts by name, with the wrapper of each stack."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):  # the outermost comes first, the others are its base_layer
            _, layers = found.setdefault(name.replace(".base_layer", ""), (module, {}))
            layers[module.parameter_name] = module
    return found


def token_rows(adapter: Any) -> set[int]:
    """The ids of the tokens whose rows in embedding and head an adapter trains."""
    rows = getattr(adapter, "trainable_token_indices", None) or []
    return {*itertools.chain(*rows.values())} if isinstance(rows, dict) else {*rows}


def fit_embeddings(model: Any, ids: set[int], new: Iterable[int] = ()) -> dict[str, list[int]]:
    """Give embedding and head rows for these ids, new ones the mean of those before. Returns peft's setting."""
    if not ids:
        return {}
    size, end = model.get_input_embeddings().num_embeddings, max(ids) + 1
    if end > size:
        model.resize_token_embeddings(end, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if new := sorted({*new, *range(size, end)}):
        for weight in (table.weight.data for table in tables):
            weight[new] = weight[: new[0]].mean(0, dtype=torch.float32).to(weight.dtype)
    tables = tables[:1] if tables[0].weight is tables[1].weight else tables  # peft follows a tie
    return {name: sorted(ids) for name, module in model.named_modules() if module in tables}


def attach_adapter(model: Any, adapter: LoraConfig | str) -> Any:
    """Attach one adapter to exactly the layers that it names in full, or, from a folder, that its file holds."""
    config: Any = PeftConfig.from_pretrained(adapter) if isinstance(adapter, str) else adapter
    config.inference_mode, config.base_model_name_or_path = False, None
    layers, dropout, own_names = {*(config.target_modules or ())}, config.lora_dropout, True
    for name, weight in model.named_parameters():  # under --fsdp packed weights look like bfloat16
        packed = hasattr(weight, "quant_state") or not weight.is_floating_point()
        if packed and (whole := [m for m in config.modules_to_save or () if f".{m}." in f".{name}"]):
            raise ConfigError(f"--modules_to_save {whole[0]}: {name} is quantised; pass --bits 16 or 32")
    if isinstance(adapter, str):  # it may have transformers 4's names
        keys = (key.removeprefix("base_model.model.") for key in load_peft_weights(adapter, device="cpu"))
        held = {key.partition(".lora_")[0].replace(".base_layer", "") for key in keys if ".lora_" in key}
        own_names = held <= {name for name, _ in model.named_modules()}
    fit_embeddings(model, token_rows(config))
    if config.target_parameters or not own_names:
        config.lora_dropout = 0.0  # peft refuses it beside experts, also in a saved adapter
    with adapting_packed_experts(own_names):
        adapted: Any = get_peft_model(model, config)
    for module in adapted.modules() if dropout and config.target_parameters else ():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    for outer, stacks in adapted_experts(adapted).values():
        module = outer.get_base_layer()
        if any(hasattr(weight, "quant_state") for weight in stacks_in(module).values()):
            outer.forward = partial(unpacked_experts_forward, module, stacks)  # peft would add to packed weights
    if isinstance(adapter, str):
        load_adapter_weights(adapted, adapter)  # checks that they are on the layers of the file
        return adapted
    asked = layers.union(name.rpartition(".")[0] for name in config.target_parameters or ())  # a stack by its owner
    adapters = (name for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer))
    carry = {name.replace(".base_layer", "") for name in adapters}
    if carry != asked:
        other = f"{len(carry - asked)} others and not on {len(asked - carry)}, first {min(carry ^ asked)}"
        raise ConfigError(f"peft puts the adapters on {other}: choose layers with --lora_modules")
    if stacked_experts(model):
        config.target_modules = layers  # in full, which later versions of peft leave alone
    return adapted


def widen_trained(adapted: Any, model: PreTrainedModel, lora: LoraArguments) -> list[Any]:
    """Make float32 what trains, but biases, and freeze what lies in frozen layers. Returns the adapter's parameters."""
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    outside = outside_frozen_layers(trained, model, lora)
    for name, parameter in trained.items():
        parameter.requires_grad_(name in outside)
        # biases stay: a layer norm needs weight and bias of one dtype, and bitsandbytes casts its own
        if re.search(r"lora_|trainable_tokens_|modules_to_save", name):
            parameter.data = parameter.data.float()
    table = adapted.get_input_embeddings()
    if isinstance(table, ModulesToSaveWrapper):  # in float32 it must not widen the hidden states
        dtype = table.original_module.weight.dtype
        table.register_forward_hook(lambda module, args, out: out.to(dtype))
    return [p for name, p in trained.items() if "lora_" in name or "trainable_tokens_" in name]


def check_token_rows(head: Any, adapted: Any, adapter: str | None, tokenizer: Any) -> None:
    """Refuse new tokens that an adapter does not train, or under other ids, or whose rows peft can't train."""
    rows, found = getattr(tokenizer, "new_rows", {}), token_rows(adapted.peft_config["default"])
    if rows.keys() != found and (rows or (tokenizer and max(found) >= len(tokenizer))):  # known ones need no flag
        raise ConfigError(f"{adapter} trains rows {sorted(found)}, --add_tokens asks for {[*rows]}: pass its tokens")
    file = Path(adapter or "", "tokenizer.json")
    stored = {t["id"]: t["content"] for t in read_json(file)["added_tokens"]} if adapter and file.is_file() else {}
    if other := [
        f"{stored[i]} and not {t}" for i in rows if stored.get(i, t := tokenizer.convert_ids_to_tokens(i)) != t
    ]:
        raise ConfigError(f"{adapter} has {other[0]} at this place: pass --add_tokens in its order")
    if rows and (
        not isinstance(head, TrainableTokensWrapper) or getattr(head.original_module, "bias", None) is not None
    ):
        raise ConfigError("--add_tokens: peft can't train rows of this model's head: it has a bias, or an odd tie")


def make_trainable(
    model: Any, config: Config, adapter: str | None, start: Path | None = None, tokenizer: Any = None
) -> Any:
    """Attach one adapter, fresh or stored at `adapter`; for a full fine-tune, freeze embeddings and lower layers.

    `start` is the file of a calibrated base, from which a fresh adapter takes its values; `tokenizer` has new tokens.
    """
    rows: dict[int, bool] = getattr(tokenizer, "new_rows", {})
    if config.quant.full_finetune:
        if model.config.model_type == "rwkv":
            raise ConfigError("--full_finetune: an evaluation changes rwkv's weights in place; train adapters")
        parameters = dict(model.named_parameters())
        trainable = outside_frozen_layers(parameters, model, config.lora)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trainable)
        model.get_input_embeddings().requires_grad_(False)  # and with them a head that is tied to them
        if load_dtype(config) != torch.float32 and not is_sharded(config):
            lost = "weights in bfloat16 lose updates below a 256th of their size"
            warn_once(f"--full_finetune --bf16: {lost}: leave --bf16 out, or pass --fsdp, which keeps float32 copies")
        return model
    set_seed(config.training.seed)  # loading draws random numbers too; a seed gives one initialisation
    source, stored = (f"adapter {adapter}", adapter_files(adapter, config)) if adapter else ("LoRA flags", None)
    # RuntimeError: shapes that differ
    with reraise_as_user_error(f"{source} on {config.model.model_name_or_path}", RuntimeError):
        new = None if adapter else lora_config(model, config.lora, config.masked)
        if new and rows:
            new.trainable_token_indices = fit_embeddings(model, {*rows}, [i for i in rows if rows[i]])
            named = (f"{tokenizer.convert_ids_to_tokens(i)} = {i}{' (not new)' * (not rows[i])}" for i in rows)
            log.info("--add_tokens: embedding and head train the rows %s", ", ".join(named))
        adapted = attach_adapter(model, new or str(stored))
    adapted.peft_config["default"].base_model_name_or_path = config.model.model_name_or_path  # not a .gguf's folder
    check_token_rows(model.get_output_embeddings(), adapted, stored, tokenizer)
    if rows:
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # not grown ones
    trained = widen_trained(adapted, model, config.lora)
    if start:
        fit_calibrated_base(adapted, start, fresh=adapter is None, rank=config.lora.lora_r)
    if adapter is None and (start or mutates_base(adapted.peft_config["default"].init_lora_weights)):
        state = get_peft_model_state_dict(adapted)  # convert_to_published_base needs it
        experts = tuple(f"{name}." for name in adapted_experts(adapted))  # they start at zero
        fresh = {name: tensor for name, tensor in state.items() if not name.startswith(experts)}
        adapted.initial_adapter = {name: tensor.detach().cpu().clone() for name, tensor in fresh.items()}
    for parameter in trained if config.lora.lora_dtype == "bfloat16" else ():
        parameter.data = parameter.data.bfloat16()
    return adapted


def mutates_base(init: Any) -> bool:
    """Whether this initialisation takes the adapter out of the base: W becomes W - s B A."""
    return isinstance(init, str) and init.startswith(("pissa", "olora", "corda"))


def convert_to_published_base(folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite a saved adapter whose initial value B' A' was taken out of the base, to fit the base as published.

    (W - s B' A') + s B A = W + s [B, -B'] [A; A']: twice the rank, at the same scale s.
    """
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights, config = load_file(file), read_json(config_file)
    for name in weights.keys() & initial.keys():
        weights[name], first = weights[name].float(), initial[name]  # in full, or the two would not cancel
        if ".lora_A." in name:
            weights[name] = torch.cat([weights[name], first], dim=0)
        elif ".lora_B." in name:
            weights[name] = torch.cat([weights[name], -first], dim=1)
    save_file(weights, file, metadata={"format": "pt"})
    experts, factor = config["target_parameters"] or (), math.sqrt(2) if config["use_rslora"] else 2
    doubled = {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    for pattern, times in (("rank_pattern", 2), ("alpha_pattern", factor)):  # those of experts stay
        own = {get_pattern_key(config[pattern], name) for name in experts}
        doubled[pattern] = {key: value * (1 if key in own else times) for key, value in config[pattern].items()}
    config_file.write_text(json.dumps(config | doubled, indent=2), encoding="utf-8")


# ------------------------------------------------------------------------------------
# 11. Fast path: the same numbers from fewer, larger operations
#
# A model with adapters enters; the same model leaves, computing the same in less time and memory. A percentage says how
# much longer a step takes without that mechanism: Llama-2-7B shape, one H200, 16 x 528 tokens, or `small`: 1 x 528, all
# layers recomputed.
# ------------------------------------------------------------------------------------
def dense_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Dequantise or cast a linear layer's weight, (out, in)."""
    unpacked = getattr(base, "unpacked", None)
    if unpacked is not None and unpacked.dtype == dtype:
        return unpacked
    weight = base.weight
    # FSDP stores a floating dtype, and its parameter loses the state
    if state := getattr(weight, "quant_state", None) or getattr(base, "quant_state", None):
        return dequantise_4bit(weight.data.view(torch.uint8), state, dtype)
    if weight.dtype != torch.int8:
        return weight.to(dtype)
    int8 = base.state if base.state.CB is not None else weight  # bitsandbytes moves it there at the first use
    return torch.mul(int8.CB, (int8.SCB / 127.0)[:, None], out=torch.empty_like(int8.CB, dtype=dtype))


class FusedLinear(NamedTuple):
    """A linear layer and its one LoRA adapter."""

    module: Any  # peft's layer
    base: Any
    rank: int
    lora_a: Any  # its weight: (r, in)
    lora_b: Any  # (out, r)
    scaling: float
    dropout: float

    def parameters(self) -> tuple[Any, Any, Any]:
        """What may train: lora_A, lora_B and the base's bias."""
        return self.lora_a.weight, self.lora_b.weight, self.base.bias

    def can_fuse(self, x: Tensor) -> bool:
        """Whether to fuse a call: any in training, where engines need all ranks' gradients in one order."""
        # bitsandbytes multiplies fewer than 16 tokens without dequantising
        large = self.module.training or x.numel() >= 16 * x.shape[-1] or hasattr(self.lora_a.weight, "ds_id")
        return large and not (self.module.disable_adapters or self.module.merged)


# Below, `params` are lora_A, lora_B and bias of each layer in turn, and `hidden` the LoRA hidden states of layers that
# share an input, side by side: (tokens, sum of ranks).
def columns_of(hidden: Tensor, layers: Sequence[FusedLinear]) -> Sequence[Tensor]:
    """Each layer's columns of the hidden states."""
    return hidden.split([layer.rank for layer in layers], 1)  # one call: a slice each takes the host longer


def lora_down(x: Tensor, layers: Sequence[FusedLinear], params: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Compute hidden = scaling * dropout(x) Aᵀ and each layer's dropout mask, (tokens, in), if there is dropout."""
    hidden, masks = x.new_empty(x.shape[0], sum(layer.rank for layer in layers)), list[Any]()
    drops = any(layer.dropout and layer.module.training for layer in layers)
    # one product for the layers that share x reads x once, and applies the scaling as well
    if not drops and len({layer.scaling for layer in layers}) == 1:
        a = torch.cat(list(params[::3])) if len(layers) > 1 else params[0]
        return torch.addmm(hidden, x, a.to(x.dtype).t(), beta=0, alpha=layers[0].scaling, out=hidden), masks
    for layer, a, part in zip(layers, params[::3], columns_of(hidden, layers), strict=True):
        dropped = x
        if drops:
            dropped, mask = torch.native_dropout(x, layer.dropout, True)
            masks.append(mask)
        torch.addmm(part, dropped, a.to(x.dtype).t(), beta=0, alpha=layer.scaling, out=part)
    return hidden, masks


def lora_up(hidden: Tensor, layers: Sequence[FusedLinear], params: Sequence[Any]) -> list[Tensor]:
    """Compute each layer's hidden Bᵀ + bias, (tokens, out)."""
    return [
        F.linear(part, b.to(part.dtype), None if bias is None else bias.to(part.dtype))
        for b, bias, part in zip(params[1::3], params[2::3], columns_of(hidden, layers), strict=True)
    ]


def frozen_outputs(x: Tensor, hidden: Tensor, layers: Sequence[FusedLinear], params: Any) -> list[Any]:
    """Compute W x + bias + B hidden of every layer; the large product adds to the small one in place."""
    # peft scales and adds the branch in passes of its own: with the sums of input gradients 62 of 545 ms
    outputs = zip(lora_up(hidden, layers, params), layers, strict=True)
    return [out.addmm_(x, dense_weight(layer.base, x.dtype).t()) for out, layer in outputs]


def hidden_gradient(grads: Sequence[Any], layers: Sequence[FusedLinear], params: Sequence[Any]) -> Tensor:
    """Compute the gradient of the hidden states, times the scaling."""
    d_hidden = grads[0].new_empty(grads[0].shape[0], sum(layer.rank for layer in layers))
    for layer, grad, b, part in zip(layers, grads, params[1::3], columns_of(d_hidden, layers), strict=True):
        torch.addmm(part, grad, b.to(grad.dtype), beta=0, alpha=layer.scaling, out=part)
    return d_hidden


def input_gradient(
    grads: Sequence[Any], d_hidden: Tensor, masks: Sequence[Any], layers: Sequence[FusedLinear], params: Sequence[Any]
) -> Tensor:
    """Compute the gradient of the layers' one input."""
    downs = [a.to(d_hidden.dtype) for a in params[::3]]
    if masks:
        d_x = d_hidden.new_zeros(len(d_hidden), downs[0].shape[1])
        for layer, mask, down, part in zip(layers, masks, downs, columns_of(d_hidden, layers), strict=True):
            d_x += (part @ down).mul_(mask).div_(1 - layer.dropout)
    else:
        d_x = d_hidden @ (torch.cat(downs) if len(downs) > 1 else downs[0])
    # each product adds to the sum in place, where autograd would sum those of q, k and v in passes of its own
    for layer, grad in zip(layers, grads, strict=True):
        d_x.addmm_(grad, dense_weight(layer.base, d_x.dtype))
    return d_x


def gradient_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a parameter's gradient; a GPU accumulates it in the parameter's float32."""
    # a product rounds its result to bf16 unless it is told otherwise, and the optimizer would see the rounded one
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def parameter_gradients(
    grads: Sequence[Any], d_hidden: Tensor, x: Tensor, hidden: Tensor, masks: Sequence[Any],
    layers: Sequence[FusedLinear], params: Sequence[Any],
) -> list[Tensor | None]:  # fmt: skip
    """Compute the gradients of lora_A, lora_B and a bias that trains, for each layer in turn."""
    gradients: list[Tensor | None] = []
    if not masks:  # one product reads x once for all layers
        of_a = gradient_mm(d_hidden.t(), x, params[0].dtype).split([layer.rank for layer in layers])
    columns = zip(columns_of(d_hidden, layers), columns_of(hidden, layers), strict=True)
    for i, (layer, grad, (d_part, part)) in enumerate(zip(layers, grads, columns, strict=True)):
        a, b, bias = params[3 * i : 3 * i + 3]
        if masks:
            gradients.append(gradient_mm(d_part.t(), x * masks[i] / (1 - layer.dropout), a.dtype))
        else:
            gradients.append(of_a[i])
        gradients.append(gradient_mm(grad.t(), part, b.dtype))
        gradients.append(grad.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None)
    return gradients


class FusedLoRA(torch.autograd.Function):
    """W x + bias + scaling * B A dropout(x) for the layers that share the input x (21 % with FusedMLP, against peft).

    LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. The backward pass dequantises the weights again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[FusedLinear], *params: Tensor | None) -> Any:
        """Take x, (tokens, in), and return one (tokens, out) for each layer."""
        hidden, masks = lora_down(x, layers, params)
        ctx.layers, ctx.params = layers, params  # leaves need no saving: a checkpoint's hooks cost 3 us each
        ctx.save_for_backward(x, hidden, *masks)
        # the weights are not saved: to dequantise them again takes 8 of 497 ms, to keep all of them 12 GiB
        return tuple(frozen_outputs(x, hidden, layers, params))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, hidden, *masks = ctx.saved_tensors
        layers, params = ctx.layers, ctx.params
        d_hidden = hidden_gradient(grads, layers, params)
        d_x = input_gradient(grads, d_hidden, masks, layers, params) if ctx.needs_input_grad[0] else None
        return d_x, None, *parameter_gradients(grads, d_hidden, x, hidden, masks, layers, params)


def gated_kernels(act: Any, x: Tensor) -> Any:
    """Find liger-kernel's forward and backward of act(gate) * up (3 %), or None."""
    name = {"SiLUActivation": "swiglu", "SiLU": "swiglu", "GELUTanh": "geglu"}.get(type(act).__name__)
    if liger_ops is None or name is None or not on_current_gpu(x):
        return None
    return [getattr(liger_ops, f"{name}_{way}") for way in ("forward", "backward")]


def gated_product(act: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Compute act(gate) * up."""
    kernels = gated_kernels(act, gate)
    return kernels[0](gate, up)[2] if kernels else act(gate) * up


def gated_gradients(act: Any, grad: Tensor, gate: Tensor, up: Tensor) -> Any:
    """Compute the gradients of gate and up, which liger writes over both."""
    if kernels := gated_kernels(act, gate):
        return kernels[1](gate, up, grad)
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        return torch.autograd.grad(act(gate) * up, (gate, up), grad)


class FusedMLP(torch.autograd.Function):
    """A gated MLP, down(act(gate(x)) * up(x)), without the last frozen product, which AddFrozen adds.

    The backward pass computes act(gate) * up again: 44.5 GiB without recomputed layers, 55.4 with peft's functions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Any, layers: Sequence[FusedLinear], *params: Tensor | None) -> Any:
        """Take x, (tokens, hidden), and layers gate, up, down; return the down adapter's output and its input."""
        hidden, masks = lora_down(x, layers[:2], params[:6])
        gate, up = frozen_outputs(x, hidden, layers[:2], params[:6])
        product = gated_product(act, gate, up)
        down_hidden, down_masks = lora_down(product, layers[2:], params[6:])
        ctx.layers, ctx.params, ctx.act, ctx.masks = layers, params, act, len(masks)
        ctx.save_for_backward(x, gate, up, hidden, down_hidden, *masks, *down_masks)
        # only AddFrozen reads it, and the backward pass below has its gradient from that of the output
        ctx.mark_non_differentiable(product)
        ctx.set_materialize_grads(False)  # else zeros of the product's size
        return lora_up(down_hidden, layers[2:], params[6:])[0], product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gate, up, hidden, down_hidden, *rest = ctx.saved_tensors
        params, masks, down_masks = ctx.params, rest[: ctx.masks], rest[ctx.masks :]
        pair, down = ctx.layers[:2], ctx.layers[2:]
        d_hidden, product = hidden_gradient(grads[:1], down, params[6:]), gated_product(ctx.act, gate, up)
        of_down = parameter_gradients(grads[:1], d_hidden, product, down_hidden, down_masks, down, params[6:])
        del product  # 180 MiB, as is its gradient
        d_product = input_gradient(grads[:1], d_hidden, down_masks, down, params[6:])
        d_pair = gated_gradients(ctx.act, d_product, gate, up)
        del d_product
        d_hidden = hidden_gradient(d_pair, pair, params[:6])
        d_x = input_gradient(d_pair, d_hidden, masks, pair, params[:6]) if ctx.needs_input_grad[0] else None
        return d_x, None, None, *parameter_gradients(d_pair, d_hidden, x, hidden, masks, pair, params[:6]), *of_down


class AddFrozen(torch.autograd.Function):
    """out += x Wᵀ with W frozen. Saves nothing: torch's checkpoint stops before it when it recomputes a layer.

    That is 7 % of a step with all layers recomputed. FusedMLP computes the gradient of x.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, base: Any) -> Tensor:
        """Change `out`, (tokens, out), in place; x is (tokens, in)."""
        ctx.mark_dirty(out)
        return out.addmm_(x, dense_weight(base, x.dtype).t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class FusedGroup:
    """The adapted layers of one block that share an input: the first one called computes all (1 %; small: 12 %)."""

    def __init__(self, layers: list[FusedLinear]) -> None:
        self.layers = layers
        self.forget()
        for index, layer in enumerate(layers):
            layer.module.forward = partial(self.forward, index)

    def forget(self) -> None:
        """After an error, let go of outputs that were not asked for, and with them of the autograd graph."""
        self.source: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def forward(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for the forward of layer `index`."""
        layer = self.layers[index]
        if args or kwargs or not layer.can_fuse(x):
            return type(layer.module).forward(layer.module, x, *args, **kwargs)
        # q, k and v are called one after the other with one tensor; another tensor, or a second call, starts anew
        if self.source is not x or index not in self.outputs:
            params = [parameter for one in self.layers for parameter in one.parameters()]
            flat = x.reshape(-1, x.shape[-1]).to(matmul_dtype(x))
            self.source, self.outputs = x, dict(enumerate(FusedLoRA.apply(flat, self.layers, *params)))
        out = self.outputs.pop(index)
        if not self.outputs:
            self.forget()
        return out.view(*x.shape[:-1], -1)


def fused_mlp(module: Any, layers: Sequence[FusedLinear], x: Tensor) -> Tensor:
    """Stand in for a gated MLP's forward."""
    if not layers[0].can_fuse(x):
        return type(module).forward(module, x)
    params = [parameter for layer in layers for parameter in layer.parameters()]
    flat = x.reshape(-1, x.shape[-1]).to(matmul_dtype(x))
    out = AddFrozen.apply(*FusedMLP.apply(flat, module.act_fn, layers, *params), layers[2].base)
    return out.view(*x.shape[:-1], -1)


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows of x, (rows, in), which stop at its end, by its weight, (experts, in, out)."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # it also wants strides that are multiples of 16 bytes
        return F.grouped_mm(x, weights, offs=ends)
    return torch.cat([part @ w for part, w in zip(x.tensor_split(ends[:-1].tolist()), weights, strict=True)])


if triton is not None:

    @triton.jit
    def _sum_rows_kernel(rows, places, out, width, K: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros((SIZE,), tl.float32)
        for i in range(K):
            place = tl.load(places + token * K + i)
            total += tl.load(rows + place * width + column, mask=column < width, other=0).to(tl.float32)
        tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)

    @triton.jit
    def _gate_kernel(both, shares, out, width, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        both, out, share = both + row * 2 * width, out + row * width, tl.load(shares + row).to(tl.float32)
        for start in range(0, width, SIZE):
            column = start + tl.arange(0, SIZE)
            inside = column < width
            gate = tl.load(both + column, mask=inside, other=0).to(tl.float32)
            up = tl.load(both + width + column, mask=inside, other=0).to(tl.float32)
            tl.store(out + column, (gate * tl.sigmoid(gate) * up * share).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_gradient_kernel(  # type: ignore[no-untyped-def]
        both, shares, grad, d_both, d_shares, width, SIZE: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        both, d_both, grad = both + row * 2 * width, d_both + row * 2 * width, grad + row * width
        share, d_share = tl.load(shares + row).to(tl.float32), tl.zeros((SIZE,), tl.float32)
        for start in range(0, width, SIZE):
            column = start + tl.arange(0, SIZE)
            inside = column < width
            gate = tl.load(both + column, mask=inside, other=0).to(tl.float32)
            up = tl.load(both + width + column, mask=inside, other=0).to(tl.float32)
            d_out = tl.load(grad + column, mask=inside, other=0).to(tl.float32)
            part = tl.sigmoid(gate)
            d_share += d_out * gate * part * up
            d_gate = d_out * share * up * part * (1 + gate * (1 - part))
            tl.store(d_both + column, d_gate.to(d_both.dtype.element_ty), mask=inside)
            tl.store(d_both + width + column, (d_out * share * gate * part).to(d_both.dtype.element_ty), mask=inside)
        tl.store(d_shares + row, tl.sum(d_share).to(d_shares.dtype.element_ty))


class GatedShares(torch.autograd.Function):
    """silu(gate) * up * share, where rows hold gate and up, in one pass over memory (7 % of a mixture's step)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, shares: Tensor) -> Tensor:
        """Take (rows, 2 width) and (rows, 1), and return (rows, width)."""
        rows, width = both.shape
        ctx.save_for_backward(both, shares)
        out = both.new_empty(rows, width // 2)
        _gate_kernel[(rows,)](both, shares, out, width // 2, SIZE=1024)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both, shares = ctx.saved_tensors
        d_both, d_shares = torch.empty_like(both), torch.empty_like(shares)
        grad = grads[0].contiguous()
        _gate_gradient_kernel[(len(both),)](both, shares, grad, d_both, d_shares, both.shape[1] // 2, SIZE=1024)
        return d_both, d_shares


def sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Sum the k rows, of (rows, width), that `places`, (tokens, k), names for each token (3 % of a mixture's step)."""
    if triton is None or not on_current_gpu(rows):
        return rows[places].sum(1)
    rows, (tokens, k) = rows.contiguous(), places.shape
    out = rows.new_empty(tokens, rows.shape[1])
    _sum_rows_kernel[(tokens, triton.cdiv(rows.shape[1], 1024))](rows, places, out, rows.shape[1], K=k, SIZE=1024)
    return out


class RowsOfTokens(torch.autograd.Function):
    """Copy a token's row for each of its experts or, with `back`, sum those rows for each token.

    Autograd's own backward pass of an index sorts, and adds row by row (6 % of a mixture's step).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor, back: bool) -> Tensor:
        """Take (tokens, width) and return (rows, width), the rows of x that `tokens` names; `back` from `places`."""
        ctx.tokens, ctx.places, ctx.back = tokens, places, back
        return sum_rows(x, places) if back else x[tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][ctx.tokens] if ctx.back else sum_rows(grads[0], ctx.places), None, None, None


class FrozenExperts(torch.autograd.Function):
    """Each expert's rows times its frozen weight. Keeps neither rows nor unpacked weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, weight: Any, transposed: bool) -> Tensor:
        """Take x, (rows, in), in the order of experts, and return (rows, out)."""
        if weight.requires_grad:
            raise ValueError("they train")
        ctx.ends, ctx.weight, ctx.transposed = ends, weight, transposed
        # unpacked here and again in the backward pass: kept, they would add 1.2 GB a layer of Qwen3-30B-A3B
        values = stack_values(weight, x.dtype)
        return grouped_mm(x, values if transposed else values.mT, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values = stack_values(ctx.weight, grads[0].dtype)
        return grouped_mm(grads[0], values.mT if ctx.transposed else values, ctx.ends), None, None, None


def expert_products(module: Any, layer: Any, name: str, x: Tensor, experts: Any, ends: Any) -> Tensor:
    """Each row times its expert's weight, with bias and adapter: (rows, out)."""
    out = FrozenExperts.apply(x, ends, stack_of(module, name), module.is_transposed)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[experts].to(out.dtype)
    if layer is None or layer.disable_adapters:
        return out
    # thin products on the rows alone; peft adds B A to the whole stack and unpacks it for that
    a, b = (factor.to(x.dtype) for factor in expert_factors(layer, len(ends)))
    spare = -a.shape[1] % 8  # grouped products on a GPU want multiples
    a, b = F.pad(a, (0, 0, 0, spare)), F.pad(b, (0, spare)).contiguous()
    return out + grouped_mm(grouped_mm(x, a.mT, ends) * layer.scaling["default"], b.mT, ends)


def grouped_experts_forward(module: Any, layers: Mapping[str, Any], x: Tensor, chosen: Tensor, shares: Tensor) -> Any:
    """Stand in for the forward of a module of experts: rows are sorted by expert, and stacks unpacked once.

    x is (tokens, hidden); `chosen` and `shares`, the experts of each token and what they count, are (tokens, k).
    """
    experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(module.num_experts, device=x.device), right=True).int()
    numbers = torch.arange(len(order), device=x.device)  # scattering them inverts the order
    tokens, places = order // chosen.shape[1], torch.empty_like(order).scatter_(0, order, numbers).view_as(chosen)
    rows = RowsOfTokens.apply(x.to(matmul_dtype(x)), tokens, places, False)
    shares = shares.flatten().gather(0, order)[:, None]  # an index would sort in its backward pass
    first = "gate_up_proj" if module.has_gate else "up_proj"
    both = expert_products(module, layers.get(first), first, rows, experts, ends)
    silu = module.has_gate and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    own = silu and module._apply_gate.__name__ == "_default_apply_gate"  # others clamp, or alternate gate and up
    # shares may scale the inputs of the last product, which are narrower, unless a bias is added to it
    if early := own and not module.has_bias and triton is not None and on_current_gpu(both):
        inner = GatedShares.apply(both, shares)
    else:
        inner = module._apply_gate(both) if module.has_gate else module.act_fn(both)
        inner = inner.to(both.dtype)  # on a GPU autocast squares in float32, as Nemotron-H does
    out = expert_products(module, layers.get("down_proj"), "down_proj", inner, experts, ends)
    return RowsOfTokens.apply(out if early else out * shares, tokens, places, True).to(x.dtype)


@torch.no_grad()
def group_experts(model: Any) -> list[str]:
    """Multiply experts in groups wherever a few tokens then get the same; names of the other modules, and why not."""
    outer = {layer.get_base_layer(): (layer, layers) for layer, layers in adapted_experts(model).values()}
    others, generator = [], torch.Generator().manual_seed(0)
    for name, module in ((name, module) for name, module in model.named_modules() if knows_experts(module)):
        layer, layers = outer.get(module, (module, {}))
        try:
            weight = module._parameters["down_proj"]
            values = getattr(weight, "quant_state", weight)  # on a GPU grouped products want bf16
            size, dtype = values.shape[2 if module.is_transposed else 1], values.dtype
            # several of these tokens go to an expert and, of many experts, none to some, as in a step
            x = torch.randn(24, size, generator=generator).to(weight.device, dtype)
            shares, chosen = torch.rand(24, module.num_experts, generator=generator).to(weight.device).topk(2)
            ways = (unpacked_experts_forward, grouped_experts_forward)
            whole, grouped = (way(module, layers, x, chosen, shares).float() for way in ways)
            if not logits_close(whole, grouped, dtype=dtype):
                raise ValueError("groups give something else")
            layer.forward = partial(grouped_experts_forward, module, layers)
        except Exception as error:  # whatever the module raises
            others.append(f"{name}: {shorten(error)}")
    return others


def is_gated_mlp(module: Any) -> bool:
    """Check, on stand-ins, that a block computes down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    layers = types.SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.exp, act_fn=torch.tanh)
    x = torch.linspace(-2, 2, 9)
    try:
        out = type(module).forward(layers, x)
    except Exception:  # it needs more than these four, or another shape
        return False
    return torch.equal(out, torch.exp(torch.tanh(torch.sin(x)) * torch.cos(x)))


def as_fused_linear(module: Any) -> FusedLinear | None:
    """Describe an adapted layer; None for DoRA, a bias in lora_B and the like."""
    base, name = module.get_base_layer(), next(iter(module.active_adapters), "")
    a, b = (dict(layers).get(name) for layers in (module.lora_A, module.lora_B))
    linear = isinstance(base, torch.nn.Linear) and type(a) is type(b) is torch.nn.Linear and b.bias is None
    if not linear or len(module.active_adapters) != 1 or name in module.lora_variant:
        return None
    dropout = getattr(module.lora_dropout[name], "p", 0.0)
    return FusedLinear(module, base, module.r[name], a, b, module.scaling[name], dropout)


def patch_lora_layers(model: Any) -> tuple[list[FusedGroup], list[str]]:
    """Fuse every adapted layer that is known, but experts; returns the groups, and the names of the other layers."""
    adapted: Any = ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))
    # a frozen one may never be called, and its group would wait for it
    trained = ((name, m) for name, m in adapted if any(p.requires_grad for p in m.parameters()))
    layers = {name: as_fused_linear(m) for name, m in trained if not isinstance(m, ParamWrapper)}
    known = {name: layer for name, layer in layers.items() if layer is not None}
    for name, module in model.named_modules():
        names = [f"{name}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        if known.keys() >= {*names} and is_gated_mlp(module):
            module.forward = partial(fused_mlp, module, [known[leaf] for leaf in names])
    members: dict[str, list[FusedLinear]] = defaultdict(list)
    for name, layer in known.items():
        owner, _, leaf = name.rpartition(".")
        members[owner if leaf in ("q_proj", "k_proj", "v_proj") else name].append(layer)
    return [FusedGroup(group) for group in members.values()], sorted(layers.keys() - known.keys())


GROUPED_BY_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has none and needs none
VARLEN_ATTENTION = "qlora_varlen"  # the name of our attention among transformers'


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, cu_seq_lens_q: Any = None,
    max_length_q: int = 0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of rows that lie end to end, each to itself; padding would cost its share of a step.

    query, key and value are (1, heads, tokens, dim), cu_seq_lens_q is (rows + 1,), the result (1, tokens, heads, dim).
    """
    if cu_seq_lens_q is None or attention_mask is not None:  # Nemotron, Doge
        raise NotImplementedError("it passes no lengths, or makes its own mask")
    rows, (heads, tokens, size) = len(cu_seq_lens_q) - 1, query.shape[1:]
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": heads != key.shape[1]}
    if rows * max_length_q == tokens and window is None:
        # an ordinary batch, for which cuDNN takes 0.6 of the time of the kernel for rows of any length (3 %)
        q, k, v = (t.view(t.shape[1], rows, -1, t.shape[3]).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return out.transpose(1, 2).reshape(1, tokens, heads, -1).contiguous(), None
    # one kernel on a GPU for 16-bit heads of these sizes without dropout, else row by row
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and size in range(8, 257, 8) and not dropout:
        q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))  # (tokens, heads, dim)
        grouped = {"enable_gqa": True} if options["enable_gqa"] and GROUPED_BY_FLAG else {}
        options = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0), **grouped}
        varlen: Any = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
        return varlen.unsqueeze(0), None
    pieces = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        mask = None
        if window is not None and end - start > window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        pieces.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options).transpose(1, 2))
    return torch.cat(pieces, dim=1), None


# What models do to the logits of their head, with a number of their config: Granite, Cohere, Gemma 2.
LOGIT_RULES: tuple[Callable[[float, Tensor], Tensor], ...] = (
    lambda scale, logits: logits / scale,
    lambda scale, logits: logits * scale,
    lambda cap, logits: cap * torch.tanh(logits / cap),
)


class FastPath(NamedTuple):
    """Which parts of the fast path a model takes, and why not the others."""

    attention: str | None = None  # for rows that lie end to end; None: rows are padded
    alone: bool = False  # whether each row goes through the model alone
    body: Any | None = None  # the model below its head; None: whole logits
    head: Any | None = None
    logit_rule: Callable[[Tensor], Tensor] | None = None  # one of LOGIT_RULES with the model's number
    groups: tuple[FusedGroup, ...] = ()
    sharded: bool = False  # whether FSDP or DeepSpeed holds the weights
    off: tuple[str, ...] = ()  # reasons

    def without(self, reason: str, **changes: Any) -> "FastPath":
        """The same, with a reason why something is off."""
        return self._replace(off=(*self.off, reason), **changes)

    def lines(self) -> dict[str, str]:
        """Names and values for a table."""
        parts = {"fused LoRA": self.groups, "padding-free rows": self.attention, "logits in chunks": self.head}
        lines = {"fast path": ", ".join(name for name, part in parts.items() if part) or "off"}
        return lines | ({"not used": "; ".join(self.off)} if self.off else {})


def head_logits(states: Tensor, head: Any, rule: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Compute logits, (tokens, vocabulary), in float32 at least."""
    logits = F.linear(states, head.weight, getattr(head, "bias", None))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return rule(logits) if rule else logits


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(logits, targets, losses, words, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        logits, target = logits + row * words, tl.load(targets + row)
        chosen = tl.load(logits + target).to(tl.float32)  # before any thread has come to the second loop
        largest, total = -float("inf"), 0.0  # the sum of exp(x - largest)
        for start in range(0, words, SIZE):
            column = start + tl.arange(0, SIZE)
            x = tl.load(logits + column, mask=column < words, other=-float("inf")).to(tl.float32)
            before, largest = largest, tl.maximum(largest, tl.max(x))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest))
        whole = largest + tl.log(total)
        tl.store(losses + row, whole - chosen)
        for start in range(0, words, SIZE):  # the logits' gradient takes their place
            column = start + tl.arange(0, SIZE)
            x = tl.load(logits + column, mask=column < words, other=0).to(tl.float32)
            gradient = tl.exp(x - whole) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < words)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum the head's cross-entropy with 128 MiB of logits in memory at a time.

    Gradients are computed while a chunk's logits are there (as in liger-kernel, Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989). To make these again in the backward pass takes 7B 1.5 % longer, and SmolLM2-135M
    on a CPU 10 %. liger's own function takes 7B as long, but a mixture of experts 4 % longer: it waits for the GPU.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Any, bias: Any, targets: Tensor, rule: Any, smoothing: float) -> Any:
        """Take states, (tokens, dim), weight and bias of the head, targets, (tokens,), and FastPath.logit_rule."""
        needs = ctx.needs_input_grad[:3]
        kernel = triton is not None and on_current_gpu(states) and not (rule or smoothing or any(needs[1:]))
        width = states.element_size() if kernel else 4  # only the kernel takes logits in 16 bits
        rows = max(1, 2**27 // (width * len(weight)))
        head = types.SimpleNamespace(weight=weight.detach().requires_grad_(needs[1]), bias=None)
        if bias is not None:
            head.bias = bias.detach().requires_grad_(needs[2])
        total, gradients = states.new_zeros((), dtype=torch.float32), list[Any]()
        for part, chosen in zip(states.split(rows), targets.split(rows), strict=True):
            if kernel:
                logits, losses = F.linear(part, weight, bias), part.new_empty(len(part), dtype=torch.float32)
                _cross_entropy_kernel[(len(part),)](logits, chosen, losses, len(weight), SIZE=8192, num_warps=16)
                loss, gradient = losses.sum(), logits @ weight if needs[0] else None
            else:
                leaf = part.detach().requires_grad_(needs[0])
                with torch.enable_grad():  # no name holds the logits any longer than the loss does
                    loss = F.cross_entropy(
                        head_logits(leaf, head, rule), chosen, reduction="sum", label_smoothing=smoothing
                    )
                if any(needs):
                    loss.backward()
                gradient = leaf.grad
            total = total + loss.detach()
            gradients += [gradient] if needs[0] else []
        ctx.gradients = (torch.cat(gradients) if needs[0] else None), head.weight.grad, getattr(head.bias, "grad", None)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, ()  # the loss keeps ctx during the whole backward pass
        return *(None if x is None else x * grads[0] for x in gradients), None, None, None


@contextlib.contextmanager
def attention_implementation(model: Any, name: str | None) -> Iterator[None]:
    """Switch a model's attention implementation for a while."""
    config = model.config.get_text_config()
    saved, config._attn_implementation = config._attn_implementation, name or config._attn_implementation
    try:
        yield
    finally:
        config._attn_implementation = saved


def supervised_states(model: Any, fast: FastPath, batch: Mapping[str, Any]) -> Tensor:
    """Select what predicts a batch's labelled tokens: hidden states, or logits where the fast path has no `body`."""
    inputs = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
    if fast.sharded and fast.attention and len(inputs["input_ids"]) == 1 and len(batch["positions"]):
        # an engine gathers the head's weight inside the model's own forward, which selects among one long row
        return model(**inputs, logits_to_keep=batch["positions"]).logits.flatten(0, 1)
    states = model(**inputs).logits if fast.body is None else fast.body(**inputs).last_hidden_state
    return states.flatten(0, 1)[batch["positions"].to(states.device)]


def supervised_logits(model: Any, fast: FastPath, batch: Mapping[str, Any]) -> Tensor:
    """Compute the logits of a batch's labelled tokens, (labelled tokens, vocabulary), in float32."""
    states, head = supervised_states(model, fast, batch), fast.head
    return states.float() if head is None else head_logits(states.to(head.weight.dtype), head, fast.logit_rule)


def summed_loss(model: Any, fast: FastPath, batch: Mapping[str, Any], smoothing: float = 0.0) -> Tensor:
    """Sum the cross-entropy of a batch's labelled tokens, in float32."""
    states = supervised_states(model, fast, batch)
    targets = batch["targets"].to(states.device)
    if fast.head is None:
        return F.cross_entropy(states.float(), targets, reduction="sum", label_smoothing=smoothing)
    weights = [fast.head.weight, getattr(fast.head, "bias", None)]
    if not torch.is_grad_enabled():  # else a head that trains would get a gradient in an evaluation too
        weights = [weight if weight is None else weight.detach() for weight in weights]
    states = states.to(matmul_dtype(states))
    return ChunkedCrossEntropy.apply(states, *weights, targets, fast.logit_rule, smoothing)


def set_unpacked_layers(model: Any, count: int, dtype: torch.dtype) -> None:
    """Keep a dequantised copy of the first `count` layers' weights in memory that is free anyway (2.5 %)."""
    for i, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
                # an attribute, no buffer: it must not be saved or moved with the model
                linear: Any = module
                linear.unpacked = None  # else dense_weight would return it
                linear.unpacked = dense_weight(linear, dtype) if i < count else None


class OffloadedInput:
    """A recomputed layer's input in pinned CPU memory, copied beside the computation (save_on_cpu is not: 9 %)."""

    def __init__(self, tensor: Tensor, newest: weakref.WeakValueDictionary[str, Any]) -> None:
        self.gpu: Tensor | None = tensor.detach()
        self.stream, self.before = copy_stream(tensor.device), newest.get("input")
        if self.before is not None:
            self.before.wait()
            self.before.gpu = None
        self.cpu = self.copy(torch.empty_like(tensor, device="cpu", pin_memory=True), tensor)
        newest["input"] = self

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """Copy in a stream of its own, after what the GPU has been given so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            return target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Let the GPU go on after the last copy."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def fetch(self) -> None:
        """Begin to copy the input back."""
        if self.gpu is None:
            self.gpu = self.copy(torch.empty_like(self.cpu, device=self.stream.device), self.cpu)

    def get(self) -> Any:
        """The input; that of the layer before, which the backward pass wants next, begins to come."""
        self.fetch()
        self.wait()
        if self.before is not None:
            self.before.fetch()
        return self.gpu


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A GPU's stream for copies."""
    return torch.cuda.Stream(device)


def offloading_checkpoint(newest: Any, run: Any, *args: Any, **options: Any) -> Any:
    """Checkpoint with the input in CPU memory: inside, the checkpoint's own hooks replace these."""
    pack = lambda tensor: OffloadedInput(tensor, newest) if tensor.is_cuda else tensor  # noqa: E731
    unpack = lambda kept: kept.get() if isinstance(kept, OffloadedInput) else kept  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return torch.utils.checkpoint.checkpoint(run, *args, **options)


def small_checkpoint(run: Any, *args: Any, **options: Any) -> Any:
    """Checkpoint of few tokens by torch's older kind, which has no hooks: a layer takes the host a quarter less time.

    It runs a layer to its end where the other one stops early, and knows the gradient of the first input alone.
    """
    others = [part for o in (*args[1:], *run.keywords.values()) for part in (o if isinstance(o, tuple) else [o])]
    objects = [part for part in others if not isinstance(part, bool | int | float | None)]  # such as a cache
    if args and all(isinstance(part, Tensor) and not part.requires_grad for part in objects):
        options["use_reentrant"], first = True, args[0]
        args = (first if first.requires_grad else first.detach().requires_grad_(), *args[1:])
    return torch.utils.checkpoint.checkpoint(run, *args, **options)


def set_recomputed_layers(model: Any, count: int, offload: bool = False, small: bool = False) -> None:
    """Recompute the first `count` layers (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

    The backward pass reaches them last, when the memory of the others is free. `small`: the time goes into launches.
    """
    layers = decoder_layers(model)
    devices = [next(layer.parameters()).device for layer in layers]
    # by their place among the layers of their own GPU: of several, each recomputes its first ones
    chosen = sorted(range(len(layers)), key=lambda i: devices[:i].count(devices[i]))[:count]
    checkpoint: Any = small_checkpoint if small else torch.utils.checkpoint.checkpoint
    if offload:
        checkpoint = partial(offloading_checkpoint, weakref.WeakValueDictionary())
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i in chosen
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@cache
def rotates_halves(own: Any) -> bool:
    """Whether a family's function rotates the halves of whole heads, as Llama's and liger-kernel do."""
    q, angles = torch.linspace(-2, 3, 1536).view(1, 4, 6, 64), torch.linspace(0, 9, 192).view(1, 6, 32).repeat(1, 1, 2)
    inputs = q, 1 + q[:, :2], angles.cos(), angles.sin()
    with contextlib.suppress(Exception):  # of another form, as Gemma 4's and many towers'
        return all(map(torch.allclose, own(*inputs), apply_rotary_pos_emb(*inputs)))
    return False


def rotate(own: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a family's rotary embedding of q and k, (rows, heads, tokens, dim); parts of heads are its own."""
    if args or kwargs or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
        return own(q, k, cos, sin, *args, **kwargs)
    return liger_ops.LigerRopeFunction.apply(q, k, cos, sin)  # which writes over q and k


def forward_with(module: Any, forward: Any, name: str, other: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a module's forward: while it runs, the global `name` of its file is another function."""
    own, forward.__globals__[name] = forward.__globals__[name], other
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        forward.__globals__[name] = own


def fuse_rotary(model: Any) -> str | None:
    """Rotate queries and keys by liger-kernel's kernel (15 %); returns why not, where a family's own function stays.

    Attention blocks see another function while their forward runs. The family's module stays as it is: a merged model
    on the CPU must not run into Triton.
    """
    why = "liger-kernel is not installed" if liger_ops is None else ""
    if len({*getattr(model, "hf_device_map", {}).values()}) > 1:  # Triton launches on one of them
        why = "one process spreads the model over several GPUs, start one process for each with torchrun"
    kept, name = False, "apply_rotary_pos_emb"
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)  # which transformers may decorate
        names = getattr(forward, "__globals__", {})
        if name not in names or name not in forward.__code__.co_names:
            continue
        if why or not rotates_halves(own := names[name]):
            kept = True
        else:
            module.forward = partial(forward_with, module, forward, name, partial(rotate, own))
    return f"the rotary embedding is torch's, which is slower: {why or 'this family has its own'}" if kept else None


def forget_longest_row(model: Any) -> None:
    """Let dynamic rotary embeddings start anew: they would grow with the longest row that they ever saw."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            state = vars(module) | dict(module.named_buffers(recurse=False))
            for name in (name for name in state if name.endswith(("inv_freq", "max_seq_len_cached"))):
                reset = lambda module, args, name=name, value=state[name]: setattr(module, name, value)  # noqa: E731
                module.register_forward_pre_hook(reset)


def fuse_norms(model: Any) -> None:
    """Compute RMSNorms in one kernel: torch's, whose launch costs a tenth of liger's (small: 20 %), or Gemma's kind."""
    for module in model.modules():
        weight, name = module._parameters.get("weight"), type(module).__name__
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if "RMSNorm" not in name or weight is None or not isinstance(eps, float):
            continue
        if len(inspect.signature(type(module).forward).parameters) > 2:  # beside itself and x a gate, as in Mamba-2
            continue
        x = torch.linspace(-2.0, 3.0, weight.numel(), device=weight.device)[None]
        with contextlib.suppress(Exception):  # of a shape of its own
            found = type(module).forward(module, x).float()
            for offset in (0.0, 1.0):  # tried on numbers: Gemma's adds 1 to its weight, and no name tells
                expected = F.rms_norm(x, weight.shape, weight.float() + offset, eps)
                if torch.allclose(found, expected, rtol=1e-2, atol=1e-3):
                    module.forward = partial(rms_norm, module, eps, offset)


def rms_norm(module: Any, eps: float, offset: float, x: Tensor) -> Any:
    """Stand in for an RMSNorm's forward; without autocast, which may cast its input to float32."""
    with torch.autocast(x.device.type, enabled=False):
        if not offset:
            return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), eps)
        if liger_ops is not None and on_current_gpu(x):  # float32 inside, in one pass
            return liger_ops.LigerRMSNormFunction.apply(x, module.weight, eps, offset, "gemma", False)
        return F.rms_norm(x.float(), module.weight.shape, module.weight.float() + offset, eps).to(x.dtype)


def to_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Move a batch's tensors; from pinned memory, so that the host does not wait for the GPU."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if torch.device(device).type == "cuda":
        # a copy from ordinary memory waits for all that the GPU has still to do
        tensors = {name: value if value.is_cuda else value.pin_memory() for name, value in tensors.items()}
    return {**batch, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()}}


def short_spans(model: Any, longest: int) -> contextlib.ExitStack:
    """Shorten attention that reaches less far than the longest row to a few tokens, for a while.

    Where a model only puts it into its mask (PhiMoE, Llama 4's chunks), the trial's short rows would not show that.
    """
    spans = contextlib.ExitStack()
    for owner in (model.config.get_text_config(), *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and 8 < value < longest:
                spans.callback(setattr, owner, name, value)
                setattr(owner, name, 8)
    return spans


def logits_close(a: Tensor, b: Tensor, noise: Any = 0.0, *, dtype: torch.dtype) -> bool:
    """Whether logits agree up to rounding (5 % of their norm in bf16, 1 % in fp16) and twice the noise."""
    a, b = (x.cpu() - x.cpu().mean(-1, keepdim=True) for x in (a, b))  # a constant changes nothing
    rounding = min(0.05, 10 * torch.finfo(dtype).eps) + (1e-2 if torch.backends.cuda.matmul.allow_tf32 else 1e-4)
    return bool((a - b).norm() <= rounding * a.norm() + 2 * noise)


class Float32Mode(TorchFunctionMode):
    """Compute in float32 with 16-bit weights, widened for one operation at a time: memory holds one model."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:  # takes one expert's weights out of a stack
            return function(*args)
        wide = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return function(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def padding_changes(model: Any, dtype: torch.dtype, answer: Callable[..., Any], sharded: bool = False) -> bool:
    """Whether the logits of two rows padded to one length, answer(0, 1), are others than those of each row alone.

    In 16 bits rounding sends a mixture's tokens to other experts, so float32 has the last word.
    """
    same = lambda: all(map(partial(logits_close, dtype=dtype), answer(0) + answer(1), answer(0, 1)))  # noqa: E731
    if not (alike := same()) and dtype != torch.float32 and stacked_experts(model) and not sharded:
        with contextlib.suppress(Exception), Float32Mode(), torch.autocast(model.device.type, enabled=False):
            alike = same()
    return not alike


def padding_of(base: Any, config: Config) -> tuple[int, str, bool]:
    """The pad id, the side, and whether a batch needs position_ids: embeddings would count padding on the left."""
    side = config.model.padding_side
    numbered = side == "left" and not config.masked and "position_ids" in inspect.signature(base.forward).parameters
    return base.config.pad_token_id or 0, side, numbered


def try_head(model: Any, base: Any, fast: FastPath, batch: Mapping[str, Any]) -> FastPath:
    """Apply the head here where the model hands it the body's output and changes its logits by a rule, or not at all.

    The model gets known numbers in their place: what it makes of them shows the change, whatever its config calls it.
    """
    whole = fast.without(f"whole logits: {type(base).__name__} changes them in a way of its own")
    head, inputs = base.get_output_embeddings(), list[Tensor]()
    kept = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
    plain = head.original_module if isinstance(head, TrainableTokensWrapper) else head  # its `weight` has the new rows
    if not isinstance(plain, torch.nn.Linear) or not type(plain).__module__.startswith("torch"):
        return whole
    ramp_like = lambda x: torch.linspace(-40, 40, x.numel(), device=x.device).view_as(x)  # noqa: E731
    noting = head.register_forward_pre_hook(lambda module, args: inputs.append(*args))
    with contextlib.suppress(Exception):  # the model may change what enters its body, or what leaves it
        with noting, head.register_forward_hook(lambda module, args, logits: ramp_like(logits)):
            logits = model(**kept).logits
        (states,) = inputs  # the head is called once
        same, ramp = partial(torch.allclose, logits.float(), rtol=1e-5, atol=1e-4), ramp_like(logits)
        # each number of the config in each rule: the attribute is called otherwise in every family
        values = (v for v in base.config.get_text_config().to_dict().values() if isinstance(v, int | float) and v)
        rules = [partial(rule, value) for value in values for rule in LOGIT_RULES]
        found = [None] if same(ramp) else [rule for rule in rules if same(rule(ramp))]
        # twice, to know what a kernel that adds in another order each time changes
        first, second = (base.base_model(**kept).last_hidden_state for _ in range(2))
        if found and (first - states).norm() <= 2 * (first - second).norm() + 1e-5 * states.norm():
            return fast._replace(body=base.base_model, head=head, logit_rule=found[0])
    return whole


def trial_logits(
    model: Any, fast: FastPath, step: StepBatch, padding: Sequence[Any], device: Any, *members: int, flat: bool = False
) -> list[Tensor]:
    """Logits of each member, all in one micro-batch: end to end if `flat`, else padded."""
    batch = padding_free_batch(step, [*members]) if flat else padded_batch(step, [*members], *padding)
    logits = supervised_logits(model, fast, to_device(batch, device)).cpu()
    return [*logits.split([int(step.lengths[i]) - 1 for i in members])]


def try_padding_free(base: Any, fast: FastPath, config: Config, answer: Callable[..., Any]) -> FastPath:
    """Lay rows end to end where that gives the logits of padded ones and no row sees its neighbour."""
    text, name, wanted = base.config.get_text_config(), type(base).__name__, resolve_attention(config)
    kernel = wanted if wanted == "flash_attention_2" else VARLEN_ATTENTION
    if config.training.neftune_noise_alpha:
        return fast.without("rows are padded: --neftune_noise_alpha divides its noise by the root of a row's length")
    if getattr(text, "attn_temperature_tuning", 0):
        return fast.without(f"rows are padded: {name} scales attention by the position in a micro-batch")
    if wanted not in (None, kernel):
        return fast.without(f"rows are padded: --attn_implementation {wanted}")
    # one by one and padded say what is right; end to end must give it, and not depend on the neighbour
    questions = config.mmlu.mmlu_source_max_len + 8 if config.mmlu.do_mmlu_eval else 0  # with their answers
    longest = max(length_limits(config).longest, questions)
    with short_spans(base, longest if kernel == VARLEN_ATTENTION else 0):
        alone, padded = answer(0) + answer(1), answer(0, 1)
        try:
            with attention_implementation(base, kernel):
                first, second = answer(0, 1, flat=True), answer(2, 1, flat=True)
        except Exception as error:
            return fast.without(f"rows are padded: end to end they fail in {name}: {shorten(error)}")
    noise = (padded[1] - alone[1]).norm()  # of the longer row: what another kernel changes, more with each layer
    # a neighbour changes nothing; but an expert multiplies the tokens of all rows at once, which rounds differently
    allowed = 2 * noise + 1e-5 * torch.cat(alone).norm() if stacked_experts(base) else 0.0
    close = logits_close(torch.cat(alone), torch.cat(first), noise, dtype=compute_dtype(config))
    if close and (first[1] - second[1]).norm() <= allowed:
        return fast._replace(attention=kernel)
    return fast.without(f"rows are padded: in {name} they would see each other, or too far back")


def longest_independent(model_config: PretrainedConfig) -> float:
    """Tokens up to which a row changes no other of its micro-batch.

    A longer one stretches the rotary embedding for all of them (LongRoPE, dynamic NTK), or needs a sparse attention's
    choice of blocks, which starts at the first position.
    """
    text = model_config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    parts = (part for part in (rope, *rope.values()) if isinstance(part, dict))
    growing = (part for part in parts if part.get("rope_type") in ("dynamic", "longrope"))
    starts = [part.get("original_max_position_embeddings") or positions_of(text) for part in growing]
    blocks = getattr(text, "index_block_size", 0) * getattr(text, "index_topk_blocks", 0)
    return min([*starts, blocks or math.inf])


@torch.no_grad()
def choose_fast_path(model: Any, base: Any, fast: FastPath, config: Config, device: Any = None) -> FastPath:
    """Find out on a few tokens what a model can do; `model` may be an engine that shards it."""
    device, dtype = device or base.get_input_embeddings().weight.device, compute_dtype(config)
    name, training, generator = type(base).__name__, base.training, torch.Generator().manual_seed(0)
    words = base.config.get_text_config().vocab_size
    # rows with 16, 22 and 16 labels: under 16 tokens FusedLinear.can_fuse says no
    rows = [torch.randint(words, (n,), generator=generator).tolist() for n in (17, 23, 17)]
    step = collate_step([{"input_ids": ids, "labels": ids} for ids in rows])["step"]
    model.eval()
    with torch.autocast(device.type, dtype, dtype != torch.float32):
        tries = config.training.fast_path and not config.masked  # masked rows are padded, and their head is more
        if tries and not fast.sharded:
            fast = try_head(model, base, fast, to_device(padded_batch(step, [0, 1], 0, "right"), device))
        answer = partial(trial_logits, model, fast, step, padding_of(base, config), device)
        if length_limits(config).longest > longest_independent(base.config):
            fast = fast.without("one row at a time: a long one would change the others", alone=True)
        elif tries:
            fast = try_padding_free(base, fast, config, answer)
        try:
            if fast.attention is None and not fast.alone and padding_changes(base, dtype, answer, fast.sharded):
                fast = fast.without(f"one row at a time: {name} takes padding for text", alone=True)
        except RuntimeError as error:
            if fast.sharded or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(f"{name} fails in {dtype}: {shorten(error)}") from error  # as DeBERTa and FNet do in bf16
    model.train(training)  # DeepSpeed's wrapper says that it trains while the model inside does not
    return fast


def enable_fast_path(model: Any, base: Any, config: Config) -> FastPath:
    """Turn on every part of the fast path that gives this model the same numbers."""
    ALL_ATTENTION_FUNCTIONS.register(VARLEN_ATTENTION, varlen_attention)  # no mask is registered, so none is made
    wanted = config.training.fast_path
    groups, others = patch_lora_layers(model) if wanted else ([], [])
    off = [] if wanted else ["--fast_path False"]
    if others:
        off.append(f"{len(others)} adapted layers keep peft's functions, first {others[0]}")
    if wanted and (whole := group_experts(model)):
        off.append(f"{len(whole)} modules of experts unpack whole stacks, first {whole[0]}")
    fast = FastPath(groups=tuple(groups), sharded=is_sharded(config), off=tuple(off))
    return fast if fast.sharded else choose_fast_path(model, base, fast, config)  # an engine shards first


# ------------------------------------------------------------------------------------
# 12. Plan: what a step takes, and how it is cut to fit
#
# From the model's shapes alone, before a weight is read: GiB by part. On the loaded model two small steps say what a
# token and a layer really take. In `search_step_plan` memory decides the micro-batch.
# ------------------------------------------------------------------------------------
NO_LIMIT = 2**30  # tokens: more than any step has
CONTEXT = 0.6  # GiB that CUDA takes beside torch's allocator


class StepPlan(NamedTuple):
    """How the rows of a step go through the model; changes when memory runs out."""

    rows: int | None  # of a micro-batch, as the flags say; None for as many as fit
    tokens: int  # of a micro-batch, at most
    recomputed: int  # layers, from the first on
    unpacked: int = 0  # layers whose weights are kept dequantised too, from the first on
    offloaded: bool = False  # whether the inputs of recomputed layers lie in CPU memory
    resident: bool = False  # whether a paged optimizer's state stays on the GPU
    peak: float | None = None  # GiB predicted for torch's allocator

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"{self.rows} rows and "
        tokens = f"{self.tokens} tokens" if self.tokens < NO_LIMIT else "any number of tokens"
        recomputed = f"{self.recomputed} layers recomputed{', inputs in CPU memory' if self.offloaded else ''}"
        return f"{rows}{tokens} at once, {recomputed}, {self.unpacked} kept dequantised"


class MemoryModel(NamedTuple):
    """Bytes on one GPU of a model with these flags."""

    weights: int  # linear layers as they are stored
    other: int  # embedding, head, norms
    experts: int  # those that are stacked in one tensor
    adapters: int
    gradients: int
    optimizer: int
    paged: bool  # the optimizer's state may be moved to the CPU, and lies beside torch's allocator
    fixed: int  # transients that do not grow with the tokens: a dequantised weight, a chunk of logits
    token: int  # transients of a token
    layer: int  # what a layer keeps of a token for its backward pass
    checkpoint: int  # what a recomputed layer keeps of a token: its input
    layers: int
    unpacked: int  # a layer's weights in the compute dtype

    def per_token(self, recomputed: int) -> int:
        """Bytes of a token at the peak, when one recomputed layer has all its activations again."""
        whole = self.layers - recomputed + (recomputed > 0)
        return self.token + whole * self.layer + recomputed * self.checkpoint

    def resident(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        whole = self.weights + self.other + self.experts + self.adapters + self.gradients
        return whole + (0 if self.paged else self.optimizer)

    def shared(self, config: Config, gpus: int) -> "MemoryModel":
        """One GPU's part, where FSDP, DeepSpeed or one process spread the model over several."""
        names = ["gradients", "optimizer"]
        changes: dict[str, Any] = {}
        if not is_sharded(config) or config.training.fsdp or hf_deepspeed.is_deepspeed_zero3_enabled():
            names += ["weights", "other", "experts", "adapters"]
        if not is_sharded(config):
            names += ["layer", "checkpoint", "unpacked"]
            changes = {"token": self.token + self.layer}
        else:  # two layers are whole while they compute
            changes = {"paged": False, "unpacked": 0, "fixed": self.fixed + 2 * self.weights // self.layers}
            if config.quant.full_finetune and load_dtype(config) != torch.float32:
                changes["optimizer"] = 3 * self.optimizer // gpus  # engines step on a float32 copy of 16-bit weights
        return self._replace(**({name: getattr(self, name) // gpus for name in names} | changes))


def kept_by_linear(shapes: Mapping[str, Any], hidden: int, config: Config) -> int:
    """How many values the linear layers, (out, in) by name, keep of a token for the backward pass.

    Those of one block share an input, but peft's functions may cast one for each; a block's last output is only added
    to the residual; a gated MLP that is not fused keeps the activation's output and its last input too.
    """
    full = config.quant.full_finetune
    fused = config.training.fast_path and not full and not config.lora.use_dora
    kept, inputs = 0, dict[Any, int]()
    for name, (out, size) in shapes.items():
        owner, _, leaf = name.rpartition(".")
        last = out == hidden and leaf not in ("q_proj", "k_proj", "v_proj", "query", "key", "value")
        kept += (0 if last else out) + (0 if full else config.lora.lora_r)
        kept += out if leaf == "gate_proj" and not fused else 0
        key = (owner, size, last) if fused or full else name  # a shared input counts once
        inputs[key] = 0 if fused and leaf == "down_proj" else size
    return kept + sum(inputs.values())


def memory_from_config(config: Config, model_config: PretrainedConfig) -> MemoryModel:
    """Predict the memory of the base model, its adapters and its steps from shapes alone."""
    train, full, bits = config.training, config.quant.full_finetune, config.quant.bits
    model = meta_model(config, copy.deepcopy(model_config))
    text = model.config.get_text_config()
    layers, hidden = text.num_hidden_layers, text.hidden_size
    plain = load_dtype(config).itemsize
    width = min(compute_dtype(config).itemsize, plain)
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in linear_layers(model, config.masked)}
    total = sum(p.numel() for p in model.parameters())
    linear = sum(map(math.prod, shapes.values()))
    # a 4-bit weight has a float32 scale for 64 values, or 8 bits of scale and one float32 for 256 of them
    four_bits = 0.5 + (1 / 64 + 4 / (64 * 256) if config.quant.double_quant else 4 / 64)
    kept = kept_by_linear(shapes, hidden, config)
    norms = 0  # bytes of their inputs, in float32 unless an RMSNorm is fused
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and re.search(r"\.\d+\.", name):  # in a layer
            norms += hidden * (width if train.fast_path and "RMS" in type(module).__name__ else 4)
    # of experts stacked in one tensor a token meets a few, which keep their inputs and outputs
    stacks = [weight for _, weight in stacked_experts(model).values()]
    experts = sum(weight.numel() for weight in stacks)
    kept += 2 * experts_per_token(text) * sum(weight.numel() // len(weight) for weight in stacks) // hidden
    packed = sum(w.numel() for _, w in stacked_experts(model, known=True).values()) if packs_experts(config) else 0
    dense = [*shapes.values(), *(weight.shape for weight in stacks if packed)]  # what is unpacked at once
    head = model.get_output_embeddings()
    # peft copies a head with new tokens; beside the copy lie its gradient or three chunks of float32 logits
    tables = {model.get_input_embeddings().weight, head.weight} if config.model.add_tokens else set[Any]()
    table = head.weight.numel() * plain if tables else 0
    copied = max(2 * table, table + 2**28) if tables else 0
    # adapters that are computed from the base's weights would be computed from none
    fresh = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init_lora_weights="true"))
    with torch.device("meta"):
        trained = [p for p in make_trainable(model, fresh, None).parameters() if p.requires_grad]
        trained += [trained[0].new_empty(str(config.model.add_tokens).count(",") + 1, w.shape[1]) for w in tables]
    count = sum(p.numel() for p in trained)
    size = sum(p.nbytes for p in trained)
    # bytes a parameter: torch's AdamW keeps its averages in the parameter's dtype, the others in float32
    states = {"lion_8bit": 1, "ademamix_8bit": 3, "8bit": 2, "adafactor": 1, "sgd": 0, "lion": 4, "ademamix": 12}
    states["torch"] = 2 * size // count
    memory = MemoryModel(
        weights=int(linear * (four_bits if bits == 4 else 1 if bits == 8 else plain)),
        other=(total - linear - experts) * plain,
        experts=int(packed * four_bits) + (experts - packed) * plain,
        adapters=0 if full else size,
        gradients=size * (2 if train.world_size > 1 else 1),  # DDP averages a flat copy
        optimizer=count * next((width for name, width in states.items() if name in train.optim), 8),
        paged="paged" in train.optim,
        fixed=copied + (max(map(math.prod, dense), default=0) * width if bits < 16 else 0) + 2**27,
        token=width * (2 * max(map(max, shapes.values()), default=4 * hidden) + 3 * hidden)
        + (0 if head is None or (train.fast_path and not is_sharded(config)) else head.weight.shape[0] * (width + 12)),
        layer=(width * kept + norms) // layers,
        checkpoint=math.ceil(2 * width * hidden / layers) if train.offload_activations else width * hidden,
        layers=layers,
        unpacked=width * linear // layers if bits < 16 and train.fast_path else 0,
    )
    return memory.shared(config, train.world_size) if is_sharded(config) else memory


def recompute_choices(config: Config, layers: int) -> Sequence[int]:
    """The numbers of recomputed layers that the flags allow."""
    wanted = config.training.recompute_layers if config.training.gradient_checkpointing else "none"
    if wanted == "auto":
        return [0, layers] if is_sharded(config) else range(layers + 1)  # an engine recomputes all or none
    return [layers if wanted == "all" else 0 if wanted == "none" else min(int(wanted), layers)]


def search_step_plan(memory: MemoryModel, room: float, longest: int, window: int, config: Config) -> StepPlan:
    """Find the fastest way to cut a step that fits, or the smallest.

    `room` is in bytes, for activations and transients; `longest` and `window` are tokens, of a row and of a step.
    """
    train, layers = config.training, memory.layers
    rows = None if train.auto_batch else train.per_device_train_batch_size
    largest = window if rows is None else min(window, longest * rows)
    # a row is never cut; rows that the flags ask for stay together where they fit
    smallest = longest if rows is None else largest
    choices = recompute_choices(config, layers)
    best, lowest = StepPlan(rows, longest, choices[-1]), math.inf
    for recomputed in choices:
        tokens = min(largest, int((room - memory.fixed) / memory.per_token(recomputed)))
        batches = math.ceil(window / max(1, tokens))
        # dequantising and launching take as long as the products of some 500 tokens, and recomputing all layers 0.4 of
        # a step (measured at 7B)
        cost = batches * (math.ceil(window / batches) + 500) * (1 + 0.4 * recomputed / max(1, layers))
        if tokens >= smallest and cost < lowest:
            best, lowest = StepPlan(rows, tokens, recomputed), cost
    if lowest == math.inf or best.recomputed or not memory.unpacked:
        return best
    # what is left over speeds up the products; a tenth stays free, as the allocator's blocks do not fit without gaps
    left = 0.9 * (room - memory.fixed) - best.tokens * memory.per_token(0)
    return best._replace(unpacked=max(0, min(int(left / memory.unpacked), layers)))


def plan_step(
    memory: MemoryModel, room: float, longest: int, window: int, config: Config
) -> tuple[StepPlan, dict[str, str], bool]:
    """Plan a step for `room` bytes: the plan, a table of it, and whether it fits."""
    # a paged optimizer's state stays on the GPU if that fits; the table below is of the last attempt
    for pages in (memory.optimizer, 0) if memory.paged else (0,):
        plan = search_step_plan(memory, room - pages, longest, window, config)
        largest = window if plan.rows is None else min(window, plan.rows * longest)
        # estimated as if a step's micro-batches were of one size, as micro_batches cuts it where it can
        tokens = max(longest, math.ceil(largest / math.ceil(largest / plan.tokens)))
        activations = tokens * (memory.per_token(plan.recomputed) - memory.token)
        transients = memory.fixed + tokens * memory.token
        copies = memory.unpacked * plan.unpacked
        if fits := activations + transients + copies <= room - pages:
            break
    parts = {
        "weights of the linear layers": memory.weights,
        "weights kept dequantised": copies,
        "embedding, head, norms": memory.other,
        **({"experts": memory.experts} if memory.experts else {}),
        "adapters": memory.adapters,
        # with one micro-batch a step, gradients take the place of activations that are freed
        "gradients": memory.gradients if tokens < window else max(0, memory.gradients - activations),
        "optimizer": 0 if memory.paged else memory.optimizer,
        "activations": activations,
        "transients and head": transients,
    }
    peak = sum(parts.values())
    beside = int(CONTEXT * GIB) + pages
    parts |= {"predicted peak": peak, "beside it": beside, "in all": peak + beside}
    lines = {name: f"{size / GIB:6.2f} GiB" for name, size in parts.items()}
    lines["beside it"] += ": CUDA"
    if memory.paged:
        lines["beside it"] += f"; the optimizer's pages {'stay' if pages else 'move out'}"
        lines["optimizer"] += f": its {memory.optimizer / GIB:.2f} GiB are pages beside torch's allocator or on the CPU"
    lines["micro-batch"] = f"{tokens} tokens"
    lines["recomputed"] = f"{plan.recomputed} of {memory.layers} layers"
    lines["kept dequantised"] = f"{plan.unpacked} of {memory.layers} layers"
    offloaded = config.training.offload_activations
    return plan._replace(offloaded=offloaded, resident=pages > 0, peak=peak / GIB), lines, fits


def gpu_gib(config: Config) -> float:
    """GiB of the GPU to plan for: --plan_gpu, or this process's share of the one that is here."""
    if config.training.plan_gpu:
        return float(re.sub(r"[^\d.]", "", config.training.plan_gpu))
    if not torch.cuda.is_available():
        raise ConfigError("--plan: there is no GPU here; pass the size of one with --plan_gpu, e.g. --plan_gpu 24GiB")
    # a limit that the caller set on torch's allocator counts, as scripts/memory.py does to act as a smaller card
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    return min(total, torch.cuda.get_per_process_memory_fraction() * total + CONTEXT)


def plan_from_flags(config: Config, memory: MemoryModel) -> tuple[dict[str, str], bool]:
    """Plan before any row or weight is read, every row as long as the limits allow: a table, and whether it fits."""
    train, gib, longest = config.training, gpu_gib(config), length_limits(config).longest
    window = longest * train.per_device_train_batch_size * train.gradient_accumulation_steps
    room = 0.95 * (gib - CONTEXT) * GIB - memory.resident()  # a twentieth stays free
    plan, lines, fits = plan_step(memory, room, longest, window, config)
    needed = math.ceil(100 * ((plan.peak or 0) / 0.95 + CONTEXT)) / 100
    verdict = "fits" if fits else f"does not fit into {gib:g} GiB, needs {needed:.2f} GiB"
    return {"GPU": f"{gib:g} GiB", **lines, "verdict": verdict}, fits


def changes_that_fit(config: Config, model_config: PretrainedConfig, memory: MemoryModel) -> str:
    """The smallest change of each kind with which a run that does not fit would fit."""
    full, data, rank, bits = config.quant.full_finetune, config.data, config.lora.lora_r, config.quant.bits
    train, sharded = config.training, is_sharded(config)
    limits = ["model_max_len"] if data.model_max_len else ["source_max_len", "target_max_len"]
    longest = max(limits, key=lambda name: getattr(data, name))
    changes: list[tuple[str, str, list[Any]]] = [
        ("training", "bf16", [True] if bits >= 16 and not train.bf16 else []),
        ("training", "offload_activations", [] if train.offload_activations or sharded else [True]),
        ("quant", "bits", [n for n in (8, 4) if n < bits and not full]),
        ("lora", "lora_r", [rank >> n for n in range(1, 9) if rank >> n >= 4 and not full]),
        ("data", longest, [max(getattr(data, longest) >> n, 1) for n in range(1, 6)]),
    ]
    found = []
    for group, flag, values in changes:
        for value in values:
            with contextlib.suppress(ConfigError, ValueError):  # the flags refuse it
                arguments = dataclasses.replace(getattr(config, group), **{flag: value})
                flags, known = config.flags | {flag: value}, config.explicitly_set | {flag}
                changed = dataclasses.replace(config, **{group: arguments}, flags=flags, explicitly_set=known)
                check_config(changed)
                needed = memory if group == "data" else memory_from_config(changed, model_config)
                if plan_from_flags(changed, needed)[1]:
                    found.append(f"--{flag} {value}")
                    break
    gpus = () if sharded else (2, 4, 8, 16)
    found += [f"{n} such GPUs" for n in gpus if plan_from_flags(config, memory.shared(config, n))[1]][:1]
    return "; ".join(found) or "no single change"


def measure_memory(
    memory: MemoryModel, model: Any, base: Any, fast: FastPath, config: Config, longest: int = 512
) -> MemoryModel:
    """Scale the predicted memory of a token by what two small steps take, no longer than the model's positions."""
    longest = int(min(longest, 512, *model_sizes(base)[1:]))
    device, dtype = base.get_input_embeddings().weight.device, compute_dtype(config)
    peaks = []
    gpus = range(torch.cuda.device_count())
    set_recomputed_layers(base, 0)
    model.train()
    drop = lambda parameter: setattr(parameter, "grad", None)  # noqa: E731
    with contextlib.ExitStack() as stack:
        for parameter in model.parameters():  # gradients would hide what a step of few tokens keeps
            if parameter.requires_grad:
                stack.enter_context(parameter.register_post_accumulate_grad_hook(drop))
        for count in (longest // 4, longest):
            step = collate_step([{"input_ids": [1] * count, "labels": [1] * count}])["step"]
            batch = padding_free_batch(step, [0]) if fast.attention else padded_batch(step, [0], 0, "right")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            try:
                with torch.random.fork_rng(gpus), attention_implementation(base, fast.attention):
                    with torch.autocast("cuda", dtype, dtype != torch.float32):
                        loss = summed_loss(model, fast, to_device(batch, device))
                    loss.backward()
            except RuntimeError as error:  # out of memory, or no gradient
                log.info("plan: a trial of %d tokens failed, the prediction stands: %s", count, shorten(error))
                for group in fast.groups:
                    group.forget()
                return memory
            peaks.append(torch.cuda.max_memory_allocated() - before)
    # the difference leaves out what does not grow with the tokens
    ratio = max(0.5, (peaks[1] - peaks[0]) / ((longest - longest // 4) * memory.per_token(0)))
    return memory._replace(token=int(memory.token * ratio), layer=int(memory.layer * ratio))


def free_memory(gpu: Any = None) -> float:
    """Bytes that torch may still hand out on this GPU, within this process's share of it."""
    free, total = torch.cuda.mem_get_info(gpu)
    # what torch holds and does not use is free too, which the driver does not know
    reserved = torch.cuda.memory_reserved(gpu)
    share = torch.cuda.get_per_process_memory_fraction(gpu) * total
    return min(free, share - reserved) + reserved - torch.cuda.memory_allocated(gpu)


def choose_step_plan(
    memory: MemoryModel, model: Any, base: Any, fast: FastPath, rows: Any | None, config: Config
) -> tuple[StepPlan, dict[str, str]]:
    """Choose micro-batches and recomputed layers for the memory that is free; the plan, and a table of it."""
    train = config.training
    if not train.do_train or rows is None or train.use_cpu:
        choices = recompute_choices(config, len(decoder_layers(base)) or memory.layers)
        # 16 rows of 200 tokens (8 layers of width 576, 4 bit) take two cores 3.3 s one by one, 2.5 s in batches of
        # 800 to 3,200; 6,400 take 11 % longer than 4,096. Recomputing all layers adds a third.
        at_once, tokens = (None, 4096) if train.auto_batch else (train.per_device_train_batch_size, NO_LIMIT)
        recomputed = choices[-1]
        if rows is not None:  # half of the memory is for the rest of the machine
            most = tokens if at_once is None else at_once * max(rows["length"][:])
            needed = memory.gradients + memory.optimizer + memory.fixed + most * memory.per_token(0)
            fits = needed * train.world_size < psutil.virtual_memory().available / 2
            recomputed = choices[0 if fits else -1]
        return StepPlan(at_once, tokens, recomputed, offloaded=train.offload_activations), {}
    lengths = sorted(rows["length"][:], reverse=True)
    window = sum(lengths[: train.per_device_train_batch_size * train.gradient_accumulation_steps])
    if is_sharded(config):  # nothing can be measured before, nor repeated after memory ran out
        room = 0.85 * (gpu_gib(config) - CONTEXT) * GIB - memory.resident()
    else:
        devices = {parameter.device for parameter in base.parameters() if parameter.device.type == "cuda"}
        memory = memory.shared(config, len(devices)) if len(devices) > 1 else memory
        memory = measure_memory(memory, model, base, fast, config, max(128, lengths[0]))
        # measured on the loaded model; gradients and the optimizer's state are still to come
        room = 0.95 * min(map(free_memory, devices)) - memory.gradients - (0 if memory.paged else memory.optimizer)
    return plan_step(memory, room, lengths[0], window, config)[:2]


# ------------------------------------------------------------------------------------
# 13. Checkpoints: whole or absent
#
# A checkpoint is written into a hidden folder, flushed to disk and renamed. Its checkpoint.json says which run it
# belongs to and lists its files with size and hash; a folder that differs by a bit is skipped. `completed` comes last.
# ------------------------------------------------------------------------------------
MANIFEST = "checkpoint.json"
COMPLETED = "completed"
PREVIOUS = ".completed-before"  # `completed` of an earlier run, while another one trains
STREAM = "stream.json"  # in a checkpoint: how far a stream was read
STAGING = ".saving-"  # prefix of the hidden folders that a checkpoint or final model is written into
LEFT = "left-checkpoint-"  # prefix of checkpoints that are set aside
MERGING = ".merging-"  # prefix of the hidden folder beside a merged model
LOCK = ".qlora.lock"  # held by the run that writes into a folder
RESULT_FILES = ("train_results.json", "eval_results.json", "predict_results.json", "all_results.json", "metrics.json",
                "predictions.jsonl")  # fmt: skip
DATASET, STREAM_SIZES = "dataset (the encoded training rows)", "sizes of the dataset's files"
BASE_WEIGHTS, EVAL_ROWS = "weights of the base", "evaluation rows (encoded)"
MODEL_FLAGS = {"model_name_or_path", "bits", "quant_type", "double_quant", "full_finetune", "objective", *LORA_FLAGS,
               "calibration_rows", "calibrated base", "adapter start", "add_tokens", BASE_WEIGHTS}  # fmt: skip
# What the best metric so far depends on.
BEST_FLAGS = {"metric_for_best_model", "greater_is_better", "label_smoothing_factor", EVAL_ROWS, "mmlu_dataset",
              "mmlu_split", "max_mmlu_samples"}  # fmt: skip
RATE_FLAGS = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
STATEFUL_SCHEDULES = {"reduce_lr_on_plateau", "greedy"}  # whose rates follow from the past, not from the step
BATCH_FLAGS = {"per_device_train_batch_size", "gradient_accumulation_steps"}
UPDATE_FLAGS = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# What a resume does with a flag that differs from the checkpoint's: refuse it, if weights, optimizer state, order of
# rows or best metric depend on it; schedule the steps that are left by it; or, in neither row, apply it at once.
RESUME_RULES: dict[str, set[str]] = {
    "refused": MODEL_FLAGS | BEST_FLAGS | {
        "adapter_name_or_path", "rope_scaling", "bf16", "fp16", "optim", "optim_args", "optim_target_modules", "engine",
        DATASET, STREAM_SIZES, "packing", "streaming", "stream_buffer", "train_sampling_strategy", "seed", "data_seed",
        "dataloader_drop_last",
    },
    "new schedule": RATE_FLAGS | {"max_steps", "num_train_epochs"},
}  # fmt: skip


class ResumePoint(NamedTuple):
    """Where a run begins."""

    train: bool
    checkpoint: Path | None = None  # to resume from
    weights: str | None = None  # an adapter, or for a full fine-tune a model, to start from or to use
    found: Path | None = None  # checkpoint or folder of an earlier run, which must be the same run
    state: TrainerState | None = None  # the checkpoint's
    trained: bool = False  # the checkpoint holds the last step: only the final files are missing


def weights_digest(model: Path) -> str:
    """A short hash of a model's weights: of each file's size and 64 pieces, since to read all of 70B takes minutes."""
    names, parts = ("model*.safetensors", "pytorch_model*.bin", "*.gguf"), list[Any]()
    found = (sorted(filter(Path.is_file, model.glob(name))) for name in names)
    for path in next(filter(None, found), [model] if model.is_file() else []):
        with path.open("rb") as file:
            parts.append(size := path.stat().st_size)
            for i in range(64):
                file.seek(size * i // 64)
                parts.append(file.read(1024))
    return digest(*parts)


def run_fingerprint(config: Config, data: Mapping[str, TokenStatistics]) -> dict[str, Any]:
    """What a checkpoint records as `run`: every flag, the engine, and hashes of what the flags only name."""
    flags = json.loads(json.dumps(config.flags, default=str))
    for name in ("model_name_or_path", "adapter_name_or_path"):  # relative to this working directory
        if flags[name] and Path(flags[name]).exists():
            flags[name] = str(Path(flags[name]).resolve())
    run = {"flags": flags}
    if (model := Path(config.model.model_name_or_path)).exists():
        run[BASE_WEIGHTS] = weights_digest(model)
    if config.training.do_train:
        # One engine can't read another's optimizer state, and DeepSpeed reads only what as many processes wrote.
        engine = f"DeepSpeed on {config.training.world_size} processes" if config.training.deepspeed else "none or DDP"
        run["engine"] = "FSDP" if config.training.fsdp else engine
        names = {"train": DATASET, "eval": EVAL_ROWS}
        run |= {names[name]: part.fingerprint for name, part in data.items()}
    return run


def read_record(folder: Path) -> dict[str, Any]:
    """What a completed run or a checkpoint says about itself; nothing if another program wrote it."""
    for name in (COMPLETED, PREVIOUS, MANIFEST):
        with contextlib.suppress(OSError, ValueError, TypeError):  # the original's `completed` is an empty file
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return {}


def effective_batch(checkpoint: Path | None, args: TrainingArguments) -> dict[str, Any]:
    """Rows of an optimizer step. A resume with the same flags on more or fewer processes keeps the earlier number."""
    flags = [args.per_device_train_batch_size, args.gradient_accumulation_steps]
    batch = {"rows": math.prod(flags) * args.world_size, "flags": flags}
    before = read_record(checkpoint).get("run", {}).get("effective batch", batch) if checkpoint else batch
    return before if before["flags"] == flags else batch


def check_same_run(folder: Path, run: Mapping[str, Any], resumes: bool, config: Config) -> dict[str, Any]:
    """Refuse to continue another run, and log what other flags change: see RESUME_RULES. Returns their old values."""
    recorded = read_record(folder).get("run", {})
    if not recorded:
        log.warning("%s does not say what it belongs to: model, bits and dataset are not compared", folder)
    before, now = ({**record.get("flags", {}), **record} for record in (recorded, run))  # flags beside the rest
    ineffective = {name for applies, names, _ in ineffective_flags(config) if applies for name in names}
    # What an earlier version did not record is not compared: its checkpoints stay resumable.
    names = (now.keys() & before.keys()) - {"flags", "effective batch", *NOT_REPEATED, *ineffective}
    compared = None not in (before.get("metric_for_best_model"), now["metric_for_best_model"])  # with the best so far
    changed = {n: f"{n} was {before[n]}, is {now[n]}" for n in sorted(names) if before[n] != now[n]}
    refused = changed.keys() & (RESUME_RULES["refused"] if resumes else {*MODEL_FLAGS, DATASET, STREAM_SIZES})
    refused -= set() if compared else BEST_FLAGS
    rows = {record["effective batch"]["rows"] for record in (before, now) if "effective batch" in record}
    if resumes and len(rows) > 1:  # the order of rows is cut into steps of one size
        refused |= changed.keys() & BATCH_FLAGS
    stateful = {before.get("lr_scheduler_type"), now["lr_scheduler_type"]} & STATEFUL_SCHEDULES
    if resumes and (stateful or config.training.deepspeed):
        refused |= changed.keys() & (RATE_FLAGS | UPDATE_FLAGS)  # they are restored with their state
    if refused & {DATASET, EVAL_ROWS}:  # name what selects and encodes rows
        fields = (*dataclasses.fields(ModelArguments), *dataclasses.fields(DataArguments))
        refused |= changed.keys() & {"do_eval", "do_predict", *(field.name for field in fields)}
    if refused:
        found = "; ".join(changed[name] for name in sorted(refused))
        way = "Pass the same flags, another --output_dir or, to train anew, --overwrite_output_dir"
        if refused == {BASE_WEIGHTS}:
            way += f". For the same weights in other files: --adapter_name_or_path {folder} and another --output_dir"
        raise ConfigError(f"{folder} belongs to another run: {found}. {way}")
    if changed and config.training.do_train:
        trained = "without effect on what is trained already"
        new, rates = ("applies at once", "new schedule") if resumes else (trained, trained)
        lines = [f"{text}: {rates if name in RESUME_RULES['new schedule'] else new}" for name, text in changed.items()]
        log.warning("other flags than in %s\n  %s", folder, "\n  ".join(lines))
    return {name: before[name] for name in changed}


def weights_in(folder: Path, full_finetune: bool = False) -> Path | None:
    """Where a folder keeps its adapter (the original: in adapter_model/) or, after a full fine-tune, its model."""
    adapter = "adapter_config.json", ["adapter_model.*"]
    config, weights = ("config.json", ["model*.safetensors", "pytorch_model*.bin"]) if full_finetune else adapter
    for place in (folder, folder / "adapter_model"):
        if (place / config).is_file() and any(any(place.glob(name)) for name in weights):
            return place
    return None


def file_digests(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Size and hash of every file but the manifest, or of those among `names` that are there."""
    paths = folder.rglob("*") if names is None else map(folder.joinpath, names)
    files = sorted(path for path in paths if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor() as pool:  # a checkpoint of a full fine-tune of 7B holds 80 GB
        digests = zip(files, pool.map(file_digest, files), strict=True)
        return {p.relative_to(folder).as_posix(): f"{p.stat().st_size} bytes, {value}" for p, value in digests}


def checkpoint_step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first: checkpoint-1000 is newer than checkpoint-250."""
    names = glob.glob("checkpoint-*", root_dir=output_dir)  # another rank may just remove the folder
    folders = [output_dir / name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return sorted(filter(Path.is_dir, folders), key=checkpoint_step, reverse=True)


def checkpoint_problem(folder: Path) -> str | None:
    """The first thing in a checkpoint that is not as it was written, or None if it is whole."""
    try:
        if (folder / MANIFEST).is_file():
            written, found = read_json(folder / MANIFEST)["files"], file_digests(folder)
            changed = [name for name in written if found.get(name) != written[name]]
            return f"{changed[0]} is missing or not as it was written" if changed else None
        if (folder / "run.json").is_file():  # it has an adapter and a trainer_state.json, too
            return f"the folder of a run, its newest checkpoint is {next(iter(checkpoints_in(folder)), 'missing')}"
        # Another program's, such as the original's, lists no files: whole if everything in it opens.
        read_json(folder / "trainer_state.json")
        for file in folder.rglob("*.safetensors"):
            safe_open(file, "pt")
        torn = [f"{file.name} breaks off" for file in folder.glob("*.pt") if not zipfile.is_zipfile(file)]
        empty = not weights_in(folder) and not weights_in(folder, full_finetune=True)
        return next(iter(torn), "no weights in it" if empty else None)
    except (*LIBRARY_ERRORS, ConfigError) as error:  # type: ignore[misc]
        return shorten(error)


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; a torn one is skipped with a warning."""
    for folder in checkpoints_in(output_dir):
        if not (problem := checkpoint_problem(folder)):
            return folder
        log.warning("%s is not whole (%s): skipped", folder, problem)
    return None


def needs_more_steps(config: Config, completed: Mapping[str, Any]) -> bool:
    """Whether the flags ask for more steps or epochs than a completed run had, or more patience if it stopped early."""
    args = config.training
    if "stopped_at" in completed:  # more steps alone would train nothing
        patience = completed["run"]["flags"].get("early_stopping_patience")
        return (args.early_stopping_patience or math.inf) > (patience or math.inf)
    # the Trainer's count of epochs may end just below a whole number
    target, unit = (args.max_steps, "step") if args.max_steps > 0 else (args.num_train_epochs - 1e-6, "epoch")
    return target > completed.get(unit, math.inf)


def check_final_weights(config: Config, other: str | None) -> None:
    """Refuse final weights that are not those which the run in output_dir recorded: another run replaced them."""
    args, output, final = config.training, Path(config.training.output_dir), final_folder(config)
    unread = args.overwrite_output_dir if args.do_train else other  # a checkpoint or adapter that is used instead
    record = {} if unread else read_record(output)
    known: Any = record.get("weights")  # None: an earlier version wrote it
    files = [name for name in record.get("files", ()) if known is not None and name.endswith(".safetensors")]
    whole = (re.sub("^model-.*", "model.safetensors", name) for name in files)  # loaded instead of shards
    if others := [name for name, found in file_digests(final, {*files, *whole}).items() if found not in known]:
        way = f"to use them, pass --adapter_name_or_path {final}; to train, another folder or --overwrite_output_dir"
        raise ConfigError(f"{final / others[0]}: not what the run in {output} saved, but of another one; {way}")


def check_output_is_free(config: Config, last: Path | None) -> None:
    """Refuse to train over another run than that of the checkpoint, also over its weights in the final folder."""
    output, final = Path(config.training.output_dir).resolve(), final_folder(config).resolve()
    kept = last is not None and last.parent.resolve() == output
    other = not kept and ((output / COMPLETED).is_file() or (last and checkpoints_in(output)))
    recorded = final_files(output, final)
    beside_checkpoint = kept and final == output
    found = weights_in(final) or weights_in(final, full_finetune=True)
    foreign = found and not recorded and not beside_checkpoint
    if (foreign or other) and not config.training.overwrite_output_dir:
        place, way = final if foreign else output, "pass another folder, or --overwrite_output_dir to replace it"
        raise ConfigError(f"{place} holds the result of a run, and no checkpoint of it is resumed; {way}")
    whole = final / "model.safetensors"
    if config.quant.full_finetune and not beside_checkpoint and whole.is_file() and whole not in recorded:
        raise ConfigError(f"{whole}: of another run, and loaded instead of shards; remove it, or pass another folder")


def without_start(config: Config) -> Config:
    """Unless training, leave out the adapter that the run in output_dir began with: its result is used instead."""
    adapter, output = config.model.adapter_name_or_path, Path(config.training.output_dir)
    if not adapter or config.training.do_train:
        return config
    records = [read_record(folder) for folder in (output, *checkpoints_in(output))]
    began = {record.get("run", {}).get("flags", {}).get("adapter_name_or_path") for record in records}
    other = None if began & {adapter, str(Path(adapter).resolve())} else adapter
    return dataclasses.replace(config, model=dataclasses.replace(config.model, adapter_name_or_path=other))


def find_resume_point(config: Config) -> ResumePoint:
    """Resume, start anew, or use what is finished."""
    args, output, final = config.training, Path(config.training.output_dir), final_folder(config)
    adapter, full = config.model.adapter_name_or_path, config.quant.full_finetune
    picked = None if str(args.resume_from_checkpoint).lower() == "true" else args.resume_from_checkpoint
    last = Path(picked).absolute() if picked else None
    if last and (problem := checkpoint_problem(last)):
        raise ConfigError(f"--resume_from_checkpoint {picked}: not a whole checkpoint: {problem}")
    if not (picked or args.overwrite_output_dir):
        last = find_last_checkpoint(output)
    check_final_weights(config, picked or adapter)
    finished = (output / COMPLETED).is_file() and not picked
    if not args.do_train:
        # An interrupted run's last checkpoint is newer than what is in the final folder.
        places = () if adapter else (final, last) if finished else (last, final)
        for folder in filter(None, places):
            if weights := weights_in(folder, full):
                return ResumePoint(False, weights=str(weights), found=output if folder == final else folder)
        return ResumePoint(False, weights=adapter)
    weights, record = weights_in(final, full), read_record(output)
    if finished and weights and not args.overwrite_output_dir and not needs_more_steps(config, record):
        early = ", stopped early (a larger --early_stopping_patience goes on)" if "stopped_at" in record else ""
        steps = f"{record.get('stopped_at', record.get('step', '?'))} steps{early}"
        log.info("%s holds a completed run of %s: it is used, not trained again", output, steps)
        return ResumePoint(False, weights=str(weights), found=output)
    check_output_is_free(config, last)
    if last is None:
        return ResumePoint(True, weights=adapter)
    log.info("resuming from %s", last)
    if not is_sharded(config) and not (last / "optimizer.pt").is_file():
        log.warning("%s holds no optimizer state: the resumed run will differ from an uninterrupted one", last)
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    evaluations = state.stateful_callbacks.get("EarlyStopping", {}).get("attributes", {})
    trained = evaluations.get("early_stopping_patience_counter", 0) >= (args.early_stopping_patience or math.inf)
    if not needs_more_steps(config, {"step": state.global_step, "epoch": state.epoch}):
        trained, state.max_steps = True, state.global_step  # as many as are asked for now
    return ResumePoint(True, checkpoint=last, weights=adapter, found=last, state=state, trained=trained)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    if path.is_file():  # safetensors makes files that only their owner can read
        os.umask(mask := os.umask(0o077))  # set, to read the old one, and set back: there is no other way
        path.chmod(0o666 & ~mask)
    if os.name != "nt":  # Windows opens no folder, and flushes no file that is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    fsync_path(part)  # else a power cut may keep the new name and lose the text
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def add_json(path: Path, values: Mapping[str, Any], anew: bool = False, **first: Any) -> None:
    """Add values to those that a JSON file holds already, unless it begins anew."""
    write_json(path, {**first, **(read_json(path) if path.is_file() and not anew else {}), **values})


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """List a checkpoint's files, and say which run it belongs to."""
    write_json(folder / MANIFEST, {"run": run, "files": file_digests(folder)})


def commit_checkpoint(staging: Path, final: Path) -> None:
    """Flush a written folder to disk and rename it, which makes it a checkpoint."""
    for path in [*staging.rglob("*"), staging]:
        fsync_path(path)
    staging.rename(final)
    fsync_path(final.parent)


@contextlib.contextmanager
def atomic_save(staging: Path, target: Path) -> Iterator[None]:
    """Around a save into `staging`, which is removed in any case. A full disk or missing rights are a ConfigError."""
    try:
        yield
    except Exception as error:
        # Libraries raise them as OSError, RuntimeError (torch), SafetensorError, or a plain Exception (tokenizers).
        saving = isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception
        if is_peer_failure(error) or not saving:
            raise
        what = "No space left on device" if re.search("No space left|inline_container", str(error)) else shorten(error)
        raise ConfigError(f"{target}: not saved: {what}. What was saved before stays") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The kernel releases the lock of a process that dies."""
    made = not folder.exists() or folder.name.startswith(MERGING)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would pass to data-loader workers
            if os.fstat(file.fileno()).st_nlink == 0:  # the run that held it has just removed it
                raise PermissionError
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(f"{folder} is in use by {file.read()}: wait for it, or name another folder") from None
        except (ImportError, OSError) as error:  # Windows, or a file system without locks
            log.warning("%s can't be locked (%s): start no other run there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                (folder / LOCK).unlink()
                if made:
                    folder.rmdir()


def final_place(output: Path, final: Path) -> str:
    """The final folder as `completed` records it: relative, so that both can be moved together."""
    return os.path.relpath(final.resolve(), output.resolve())


def final_files(output: Path, final: Path) -> set[Path]:
    """The files in the final folder that the last completed run lists. No others are ever removed."""
    record, place = read_record(output), final_place(output, final)
    names = record.get("files") if record.get("final", place) == place else None
    files = {final / name for name in names} if isinstance(names, list) else set()  # a checkpoint has a dictionary
    return {file for file in files if file.resolve().is_relative_to(final.resolve())}


def clear_output(config: Config, step: int, trained: bool = False) -> None:
    """Before training: set `completed` aside and, to start anew, remove what the record of an earlier run names."""
    output, final, anew = Path(config.training.output_dir), final_folder(config), config.training.overwrite_output_dir
    recorded, checkpoints = final_files(output, final), checkpoints_in(output)
    ours = recorded or any((checkpoint / MANIFEST).is_file() for checkpoint in checkpoints)
    kept = trained and str(config.training.resume_from_checkpoint or True).lower() == "true"  # no other was picked
    stale = [output / name for name in (() if kept else RESULT_FILES)]  # of weights that will no longer be there
    stale += [*recorded, output / "trainer_state.json", output / "loss.png"] if anew else []
    for file in stale if ours else ():
        file.unlink(missing_ok=True)
    if (output / COMPLETED).is_file():  # the next save removes the files that it lists
        (output / COMPLETED).replace(output / PREVIOUS)
    for checkpoint in [*checkpoints, *(output.glob(f"{LEFT}*") if anew else ())]:
        if anew and (checkpoint / MANIFEST).is_file():
            (output / f"{STAGING}old").mkdir(exist_ok=True)
            checkpoint.rename(output / f"{STAGING}old" / checkpoint.name)
        elif checkpoint in checkpoints and (anew or checkpoint_step(checkpoint) > step):
            # Torn, not ours, or of a branch that --resume_from_checkpoint left: a rerun would go on from it.
            left = checkpoint.rename(output / f"{LEFT}{checkpoint_step(checkpoint)}-{time.time_ns()}")
            log.warning("%s is set aside as %s; nothing reads it, you may remove it", checkpoint, left.name)
    for staging in [*output.glob(f"{STAGING}*"), *final.glob(f"{STAGING}*")]:  # also of a run that was killed
        shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------
# 14. Processes: what the ranks of one run tell each other
#
# Counts and messages go over gloo, so that no step waits for its GPU. A rank that fails prints its line and exits;
# torchrun ends the others. --ddp_timeout bounds the GPUs' waits.
# ------------------------------------------------------------------------------------
def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


@lru_cache(maxsize=2)
def _cpu_group(timeout: timedelta | None) -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def all_gather_object(value: Any, timeout: timedelta | None = None) -> list[Any]:
    """Gather one object from each rank, in the order of ranks, within half an hour by default."""
    values = [value] * rank_and_world_size()[1]
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(values, value, group=_cpu_group(timeout))
    return values


def wait_for_all_ranks() -> None:
    """Wait until every rank is here: one may encode, save or merge for hours."""
    all_gather_object(None, timedelta(days=2))


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """Run on each machine's first rank; the others wait and reuse the result."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        wait_for_all_ranks()
    yield
    if first:
        wait_for_all_ranks()


def check_ranks_agree(values: Mapping[str, Any]) -> None:
    """Refuse to go on where ranks were started with different flags, or read different data."""
    mine = {name: json.dumps(value, default=str) for name, value in values.items()}
    (_, first), *others = all_gather_object((socket.gethostname(), mine))
    for rank, (host, found) in enumerate(others, start=1):
        if differing := [f"{n} is {v}, on rank 0 {first[n]}" for n, v in found.items() if v != first[n]]:
            raise ConfigError(f"rank {rank} ({host}): {'; '.join(differing)}. Flags and data must be the same")


def shutdown_distributed() -> None:
    """Take the process groups down once all ranks are done with them."""
    # at Python's exit gloo may abort the process (https://github.com/pytorch/pytorch/issues/190489)
    if torch.distributed.is_initialized():
        wait_for_all_ranks()
        _cpu_group.cache_clear()
        torch.distributed.destroy_process_group()
        gc.collect()


# ------------------------------------------------------------------------------------
# 15. Evaluation: generated predictions, filled masks, MMLU
#
# Each rank takes some of the batches; results are gathered by row number, so that none is lost or counted twice.
# A function that runs the model takes the trainer, which holds it with its tokenizer, flags and fast path.
# ------------------------------------------------------------------------------------
def run_batches(trainer: Any, count: int, process: Callable[[list[int]], Any], title: str) -> list[Any]:
    """Call `process` with the row numbers of each batch; returns the results for all batches, on every rank."""
    results: dict[int, Any] = {}  # by a batch's first row
    size, (rank, ranks) = trainer.args.per_device_eval_batch_size, rank_and_world_size()
    starts = range(0, count, size)  # cut as for one process
    turns = math.ceil(len(starts) / ranks)  # engines need as many batches on every rank, so some repeat the first ones
    own = [starts[i % len(starts)] for i in range(rank, turns * ranks, ranks)]
    shown = trainer.accelerator.is_main_process and not trainer.config.training.disable_tqdm
    trainer.unwrapped.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in tqdm(own, title, disable=None if shown else True, leave=False):  # None: in a terminal only
            results[start] = process([*range(start, min(start + size, count))])
    gathered = {first: result for part in all_gather_object(results) for first, result in part.items()}
    return [gathered[first] for first in sorted(gathered)]


def generation_config(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What the flags set, with BOS, EOS and pad ids, and the model's own further stop tokens."""
    flags = config.generation
    passed = {"max_new_tokens", *config.explicitly_set} - (set() if flags.do_sample else SAMPLING_FLAGS)
    values = {name: value for name, value in vars(flags).items() if name in passed}
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    eos = sorted({tokenizer.eos_token_id, *([stops] if isinstance(stops, int) else stops)})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    with reraise_as_user_error("generation flags"):
        return GenerationConfig(**(values | ids | {"use_cache": True}))


def decoded_pair(segments: list[Segment], rendered: bool, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A row's input and output as text, the output without a template's special tokens."""
    last = last_supervised(segments)
    answer = (segment["text"] for segment in segments[last:] if segment["supervised"])
    texts = {"input": "".join(segment["text"] for segment in segments[:last]), "output": "".join(answer)}
    if rendered:
        texts["output"] = special_token_pattern(tokenizer).sub("", texts["output"])
    marks = str.maketrans(dict(zip(MARKS, (str(tokenizer.bos_token or ""), str(tokenizer.eos_token), ""), strict=True)))
    return {name: text.strip(BOS_MARK + EOS_MARK).translate(marks) for name, text in texts.items()}


@torch.no_grad()
def sees_padding(model: Any, prompt: list[int], pad_id: int, device: Any, dtype: torch.dtype) -> bool:
    """Whether a model reads padding on the left as text, as RWKV does, and MiniMax with its cache."""
    long = (prompt * 16)[: max(16, len(prompt))]
    prompts = long[len(long) // 2 :], long
    options: Any = {"pad_token_id": pad_id, "max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}

    def answer(*rows: int) -> list[Tensor]:
        tensors = to_device(padded_prompts([prompts[i] for i in rows], pad_id, "left"), device)
        same = {"prefix_allowed_tokens_fn": lambda row, ids: prompt[:1]}  # all go on with one token
        steps = model.generate(**tensors, generation_config=GenerationConfig(**options), **same).logits
        return [*torch.stack(steps, dim=1).float()]  # (2, vocabulary) each

    if differs := padding_changes(model, dtype, answer):
        log.warning("%s takes padding for text: predicting one row at a time", model.config.model_type)
    return differs


def generate_predictions(trainer: Any, batch: Any) -> Iterator[dict[str, str]]:
    """One dictionary a row: its fields, `prediction`, `prediction_with_input`. Prompts are cut as in training."""
    model, tokenizer, limits = trainer.unwrapped, trainer.processing_class, length_limits(trainer.config)
    prompts = []
    for source, _, chat in prompts_and_completions(batch, tokenizer):
        room = Limits(len(source), 0) if chat else limits  # within a question nothing is cut
        prompt = truncate_and_concat(source, [], room, bos=tokenizer.bos_token_id)[0]
        prompts.append(prompt or [tokenizer.eos_token_id])  # generation needs one token at least
    generation, device = generation_config(trainer.config, model, tokenizer), trainer.args.device
    answers: list[list[int]] = []
    # generate() merges the model's own sampling values into those that it is given; a routers' loss takes no cache
    without_own = mock.patch.object(trainer.base, "generation_config", GenerationConfig())
    without_loss = mock.patch.object(trainer.base.config.get_text_config(), "output_router_logits", False, create=True)
    with reraise_as_user_error("generation flags"), without_own, without_loss:
        if trainer.one_by_one is None and len(prompts) > 1 and not trainer.sharded:
            longest, dtype = max(prompts, key=len), compute_dtype(trainer.config)
            trainer.one_by_one = sees_padding(model, longest, tokenizer.pad_token_id, device, dtype)
        for rows in [[prompt] for prompt in prompts] if trainer.one_by_one else [prompts]:
            tensors = to_device(padded_prompts(rows, tokenizer.pad_token_id, "left"), device)
            output = model.generate(**tensors, generation_config=generation)
            answers += output[:, tensors["input_ids"].shape[1] :].tolist()  # the prompt ends by tokens, never by text
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        yield decoded_pair(batch["segments"][i], batch["rendered"][i], tokenizer) | {
            "prediction": str(tokenizer.decode(answer, skip_special_tokens=True)),
            "prediction_with_input": str(tokenizer.decode(prompt + answer, skip_special_tokens=True)),
        }


def fill_masks(trainer: Any, batch: Any) -> Iterator[dict[str, Any]]:
    """Fill the masks in each row's text, or, where it has none, those of evaluation; one dictionary a row."""
    tokenizer, texts = trainer.processing_class, [row[-1]["text"] for row in batch["segments"]]
    encoded = encode_batch(batch, tokenizer, length_limits(trainer.config), masked=True)
    masking = trainer.masking._replace(replaced=1.0, random=0.0)
    masked: list[list[int]] = []
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        drawn, _ = masking.mask_tokens(torch.tensor(ids), torch.tensor(labels), "eval", ids, one=True)
        masked.append(ids if masking.mask_id in ids else drawn.tolist())
    tensors = to_device(padded_prompts(masked, tokenizer.pad_token_id, "right"), trainer.args.device)
    predicted = trainer.unwrapped(**tensors).logits.argmax(-1).tolist()
    for text, labels, ids, tokens in zip(texts, encoded["labels"], masked, predicted, strict=True):
        shown = [i for i, label in enumerate(labels) if label != IGNORE or ids[i] == masking.mask_id]  # no [CLS], [SEP]
        before = tokenizer.decode([ids[i] for i in shown])
        after = tokenizer.decode([tokens[i] if ids[i] == masking.mask_id else ids[i] for i in shown])
        if " " not in text.strip():  # a protein: ESM's tokenizer puts a space between its letters
            before, after = before.replace(" ", ""), after.replace(" ", "")
        yield {"input": before, "output": text, "prediction": after}


LETTERS = ["A", "B", "C", "D"]
QUESTION = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"


class Question(NamedTuple):
    subject: str
    prompt: str  # ends with "Answer:"
    answer: int  # into LETTERS


def load_questions(config: Config) -> list[Question]:
    """MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300), from the original's files or the hub.

    A file has one {subject, input, output} a line; the worked examples are in the prompt, on the hub in `dev`.
    """
    mmlu = config.mmlu
    five_shot = mmlu.mmlu_dataset != "mmlu-zs"
    questions: list[Question] = []
    split, hub_split = ("val", "validation") if mmlu.mmlu_split == "eval" else ("test", "test")
    if Path(mmlu.mmlu_dir).is_dir():
        path = Path(mmlu.mmlu_dir, f"{'five' if five_shot else 'zero'}_shot_mmlu_{split}.json")
        for number, row in read_file(path):
            with reraise_as_user_error(f"{path}:{number}"):  # a RowError is a ValueError
                letter = get_text(check_row(row), "output").strip()
                if letter not in LETTERS:
                    raise RowError(f"field 'output' is {letter!r}, expected A, B, C or D")
                questions.append(Question(get_text(row, "subject"), get_text(row, "input"), LETTERS.index(letter)))
    else:
        splits = load_from_hub(config, "cais/mmlu", name="all")
        shots: dict[str, str] = defaultdict(str)
        for _, row in splits["dev"] if five_shot else ():
            shots[row["subject"]] += f"{QUESTION.format_map(row)} {LETTERS[row['answer']]}\n\n"
        for _, row in splits[hub_split]:
            subject, answer = row["subject"], row["answer"]
            topic = subject.replace("_", " ")  # two spaces before it, as published
            head = f"The following are multiple choice questions (with answers) about  {topic}.\n\n"
            questions.append(Question(subject, head + shots[subject] + QUESTION.format_map(row), answer))
    if not questions:
        raise ConfigError(f"--mmlu_dir {mmlu.mmlu_dir}: no question in it")
    return questions[: mmlu.max_mmlu_samples]


def answer_questions(trainer: Any, questions: list[Question]) -> list[tuple[bool, float]]:
    """For each question: whether the answer is right, and the loss on the right letter and EOS.

    One pass compares the letters' first tokens. Where those are not four different ones, each letter is put after the
    prompt in turn, and the probabilities of all its tokens are compared.
    """
    tokenizer, longest = trainer.processing_class, trainer.config.mmlu.mmlu_source_max_len
    letters, texts = tokenize(LETTERS, tokenizer), tokenize([question.prompt for question in questions], tokenizer)
    if len({*map(tuple, letters)}) < len(LETTERS):
        raise ConfigError("--do_mmlu_eval: this tokenizer does not tell A, B, C and D apart")
    prefix = os.path.commonprefix(letters)  # noqa: RUF071  # with some tokenizers, a space
    answers = [[*ids[len(prefix) :], tokenizer.eos_token_id] for ids in letters]
    first_tokens = [ids[0] for ids in answers]
    one_pass = len(set(first_tokens)) == len(LETTERS)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [[*bos, *ids[max(len(bos) + len(ids) - longest, 0) :], *prefix] for ids in texts]
    pairs = [(i, c) for i, q in enumerate(questions) for c in ([q.answer] if one_pass else range(len(LETTERS)))]
    rows = [{"input_ids": prompts[i] + answers[c], "labels": [IGNORE] * len(prompts[i]) + answers[c]} for i, c in pairs]
    step = collate_step(rows)["step"]
    scores, losses = torch.zeros(len(questions), len(LETTERS)), [0.0] * len(questions)
    for members in trainer.micro_batches(step):
        # Only the logits of the answers: all those of 100 prompts of 400 tokens would take 8 GB.
        logits = supervised_logits(trainer.unwrapped, trainer.fast, trainer.tensors(step, members)).log_softmax(-1)
        own = [pairs[n] for n in members]
        for (i, c), predicted in zip(own, logits.cpu().split([len(answers[c]) for _, c in own]), strict=True):
            log_probs = predicted[range(len(answers[c])), answers[c]]
            if c == questions[i].answer:
                losses[i] = -log_probs.mean().item()
            if one_pass:
                scores[i] = predicted[0, first_tokens]
            else:
                scores[i, c] = log_probs[:-1].sum()
    return [(c == q.answer, loss) for c, q, loss in zip(scores.argmax(-1).tolist(), questions, losses, strict=True)]


def mmlu_metrics(trainer: Any, questions: list[Question]) -> dict[str, float]:
    """Accuracy by subject, their unweighted mean, and the loss."""
    by_subject: dict[str, list[bool]] = {question.subject: [] for question in questions}
    questions = sorted(questions, key=lambda question: len(question.prompt))  # else two thirds of a batch are padding
    answers = lambda numbers: answer_questions(trainer, [questions[i] for i in numbers])  # noqa: E731
    answered = [*itertools.chain(*run_batches(trainer, len(questions), answers, "MMLU"))]
    for question, (correct, _) in zip(questions, answered, strict=True):
        by_subject[question.subject].append(correct)
    loss = sum(loss for _, loss in answered) / len(answered)
    name = f"mmlu_{trainer.config.mmlu.mmlu_split}_accuracy"
    accuracy = {f"{name}_{subject}": sum(right) / len(right) for subject, right in by_subject.items()}
    return {"mmlu_loss": loss, **accuracy, name: sum(accuracy.values()) / len(accuracy)}


# ------------------------------------------------------------------------------------
# 16. Trainer: order of rows, loss, whole checkpoints, signals
#
# The Hugging Face Trainer with an order of rows that a resume finds again, the loss on supervised tokens, whole
# checkpoints, a stop on numbers that are not finite, and MMLU. It receives whole optimizer steps, which `training_step`
# cuts into micro-batches. To add a callback: one class, one line in build_callbacks.
# ------------------------------------------------------------------------------------
def check_sizes(name: str, largest_id: int, longest: int, sizes: tuple[int, float, float]) -> None:
    """Check rows against the model: an id outside its embedding would only show as a crash on the GPU."""
    ids, limit, positions = sizes
    if largest_id >= ids:
        raise ConfigError(f"the {name} rows hold token id {largest_id}, the model has {ids}: wrong tokenizer")
    if longest > limit:
        way = f"pass --source_max_len {limit}, less what --target_max_len takes"
        raise ConfigError(f"{name} rows have {longest} tokens, the model takes {limit}: {way}")
    if longest > positions:
        warn_once("%s rows exceed the %d tokens the model was made for: pass --rope_scaling or less", name, positions)


@dataclass
class StreamedSteps(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream as this rank's share of each step, which carries the position after it: a loader may read ahead."""

    stream: RowSource
    tokenizer: Any
    config: Config
    size: int  # rows of a step, over all ranks
    sizes: tuple[int, float, float]  # the model's
    position: float = 0  # raw rows consumed before a resume
    steps: int = 0  # optimizer steps before it

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from itertools.repeat({}, self.steps)  # the Trainer skips the steps before a resume
        rank, ranks = rank_and_world_size()
        rows = encoded_stream(self.stream, self.tokenizer, self.config, skip=self.position)
        while group := list(itertools.islice(rows, self.size)):
            step = collate_step([row for _, row in group[rank::ranks]], self.config.masked)["step"]
            check_sizes("streamed", int(step.input_ids.max()), int(step.lengths.max()), self.sizes)
            yield {"step": step, "position": group[-1][0]}


class DistributedWindowSampler(torch.utils.data.Sampler[list[int]]):
    """This rank's rows of each optimizer step, which has the same rows however many ranks share it.

    Rows are dealt by length, back and forth: about as many tokens each. An epoch's last share may be empty.
    """

    def __init__(self, lengths: list[int], size: int, args: Any, state: Callable[[], TrainerState]) -> None:
        self.lengths, self.size, self.args, self.state = lengths, size, args, state
        self.rank, self.ranks = rank_and_world_size()

    def __len__(self) -> int:
        return steps_per_epoch(len(self.lengths), self.size, self.args)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.lengths, self.size, self.args, epoch=self.state().global_step // len(self))
        turns = self.rank, 2 * self.ranks - 1 - self.rank
        for start in range(0, len(self) * self.size, self.size):
            window = order[start : start + self.size]
            if self.ranks > 1:
                window.sort(key=lambda row: -self.lengths[row])
            yield [row for i, row in enumerate(window) if i % (2 * self.ranks) in turns]


# Signals that ask a run to stop, and its exit status then. Batch systems send SIGUSR1 before the time is up: the same
# command will be started again, so it is no failure.
STOP_SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 0}
STOP_NUMBERS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]  # Windows has no SIGUSR1


class GracefulStop(TrainerCallback):
    """Saves a checkpoint and stops after the step in which a signal came."""

    grace = 30  # seconds for a data loader to hand out its next rows
    received = 0  # number of the first signal
    training = False  # a step can be finished and saved; at other times a signal ends the run at once
    interrupted = False  # training stopped before its last step
    saved = False  # whether this run has saved anything

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal. Only Ctrl-C counts twice: launchers and batch systems repeat the others."""
        if os.getpid() != self.process:  # a worker of datasets.map, which its pool ends this way
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.training or (self.received and number == signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second one then ends a library that goes on
            raise KeyboardInterrupt(number)
        elif not self.received:
            self.received = number
            if hasattr(signal, "setitimer"):  # Windows has none
                signal.signal(signal.SIGALRM, self.stop_waiting)
                signal.setitimer(signal.ITIMER_REAL, self.grace, self.grace)
            with contextlib.suppress(RuntimeError):  # it came while a line was being written
                log.warning("%s: finishing the step, then saving", signal.Signals(number).name)

    def stop_waiting(self, number: int, frame: Any) -> None:
        """End a run that still waits for its next rows: a data-loader worker may hang."""
        if any(caller.f_code is QLoRATrainer.get_batch_samples.__code__ for caller, _ in traceback.walk_stack(frame)):
            raise KeyboardInterrupt(self.received)

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        self.process = os.getpid()
        saved = {number: signal.signal(number, self.note) for number in STOP_NUMBERS}
        try:
            yield
        finally:
            if self.received and hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in saved.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop after the step, on every rank if the signal reached one."""
        if any(all_gather_object(self.received)):
            control.should_training_stop = control.should_save = True
            self.interrupted = state.global_step < state.max_steps
            args.load_best_model_at_end &= not self.interrupted
            if self.interrupted and state.epoch % 1:  # type: ignore[operator]  # the epoch's evaluation is left out
                args.eval_strategy = args.logging_strategy = "no"

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = True


def init_worker(number: int) -> None:
    """Leave signals to the process that trains: terminals send them to data-loader workers too."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for stopping in {*STOP_NUMBERS} - {signal.SIGTERM}:  # by which a run that ends takes its workers along
        signal.signal(stopping, signal.SIG_IGN)


class FlagIntervals(TrainerCallback):
    """Logs, evaluates and saves as often, and where, as the flags say: a resumed Trainer would go by the checkpoint."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_model_checkpoint is None and best.is_dir():  # the folder has moved
            state.best_model_checkpoint = str(best)
        state.logging_steps = min(state.logging_steps, state.max_steps)  # one line at least


class EarlyStopping(EarlyStoppingCallback):
    """The library's, with the flag's patience: a resume would restore the checkpoint's."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.early_stopping_patience = args.early_stopping_patience
        recorded: Any = state.stateful_callbacks  # nothing of this callback, if the patience is new at a resume
        recorded.setdefault(type(self).__name__, self.state())


def build_callbacks(stop: GracefulStop, config: Config) -> list[TrainerCallback]:
    """Every callback of a run."""
    patience = config.training.early_stopping_patience
    bars = sys.stderr.isatty() and not config.training.disable_tqdm
    bar = type("Bar", (ProgressCallback,), {"on_log": TrainerCallback.on_log})  # QLoRATrainer.log writes the lines
    return [stop, FlagIntervals(), *([EarlyStopping(patience)] if patience else []), *([bar()] if bars else [])]


def peak_memory_gib() -> float:
    """Peak memory of this process's fullest GPU; 0 without one."""
    return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0) / GIB


def rounded(value: float) -> str:
    """A number for the console: at least four digits, with commas between thousands. Files have all digits."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def shown_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that the console shows, rounded."""
    shown = r"(train|plan)_(tokens_per_second|peak_memory_gib|loss)|eval_(loss|perplexity)|\w+_accuracy|mmlu_loss"
    return {name: rounded(value) for name, value in metrics.items() if re.fullmatch(shown, name)}


class QLoRATrainer(Trainer):
    """The Trainer with our order of rows, micro-batches, checkpoints and checks."""

    def __init__(
        self, *, config: Config, fast: FastPath, plan: StepPlan, identity: dict[str, Any],
        questions: list[Question] | None, masking: Masking | None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.config, self.fast, self.plan, self.masking = config, fast, plan, masking
        self.identity, self.questions = identity, questions  # what checkpoints say of the run; MMLU's
        if plugin := getattr(self.accelerator.state, "fsdp_plugin", None):
            set_up_fsdp(plugin, self.model, config)
        self.unwrapped: Any = self.accelerator.unwrap_model(self.model)  # the base with its adapters, if it has some
        self.base = self.unwrapped.get_base_model() if hasattr(self.unwrapped, "get_base_model") else self.unwrapped
        self.padding = padding_of(self.base, config)
        self.parameter_count = self.unwrapped.num_parameters(exclude_embeddings=True)
        self.sharded = is_sharded(config)
        # what trains; an engine makes parameters of its own
        self.trained = [] if self.sharded else [p for p in self.unwrapped.parameters() if p.requires_grad]
        self.parts: list[tuple[list[str], Tensor]] = []  # rows and loss of the last step's micro-batches
        self.pending_checks: list[tuple[Any, ...]] = []  # steps whose numbers were not looked at yet
        self.position: float | None = None  # in a stream, after the current step
        self.tokens_seen = 0  # by this rank, without padding
        self.untimed_seconds = 0.0  # spent on evaluating and saving
        self.interval: tuple[float, int, int] | None = None  # began at this time, token and step
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})  # at this step, with these metrics
        self.one_by_one = fast.alone or None  # whether prompts are answered one by one; not known before the first
        self.save_is_put_off = False  # to the end of the epoch, which follows
        self.overflows = 0  # steps in succession whose gradient norm is not finite
        self.router_logits: Any = None  # of the last forward pass, where the config asks for the routers' own loss
        self.router_losses: list[Tensor] = []  # since the last log
        self.balance = router_loss_of(self.base)
        if self.balance:
            note = lambda model, args, outputs: setattr(self, "router_logits", outputs.router_logits)  # noqa: E731
            self.base.base_model.register_forward_hook(note)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train without bitsandbytes 0.50's wait for the GPU after each parameter (10 %); one stream keeps order."""
        without_wait = mock.patch.object(bitsandbytes.optim.optimizer, "sync_gpu", lambda tensor: None)
        # the Trainer walks all modules for the parameters three times a step (small: 5 %)
        trained = mock.patch.object(self.model, "parameters", lambda recurse=True: iter(self.trained))
        with without_wait, contextlib.nullcontext() if self.sharded else trained:
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Hand out whole steps, in an order that a resume finds again, and no row twice."""
        rows: Any = self.train_dataset
        if isinstance(rows, StreamedSteps):
            return torch.utils.data.DataLoader(rows, batch_size=None)
        size = self.identity["effective batch"]["rows"]
        # train() makes a state of its own, which tells the sampler its epoch
        steps = DistributedWindowSampler(rows["length"][:], size, self.args, lambda: self.state)
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        options: dict[str, Any] = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        # an iterator draws its workers' seed: from torch's own generator, a resumed run would draw one more
        options |= {"worker_init_fn": init_worker, "generator": torch.Generator()}
        return torch.utils.data.DataLoader(rows, batch_sampler=steps, collate_fn=self.data_collator, **options)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Fetch the one batch of an optimizer step, and count the supervised tokens of all ranks for its loss."""
        if self.interval is None:
            self.interval = time.perf_counter() - self.untimed_seconds, self.tokens_seen, self.state.global_step
        batch = next(epoch_iterator, None)
        if batch is None:  # an epoch's end
            return [], None
        self.position = batch.pop("position", None)
        if self.masking:  # masks follow from step and row alone, so that a resume draws them again
            batch["step"] = self.masking.mask_step(batch["step"], "train", self.args.seed, self.state.global_step)
        self.tokens_seen += len(batch["step"].input_ids)
        # reduced on the CPUs: a GPU would have to finish everything queued on it first
        count = sum(all_gather_object(batch["step"].supervised))
        return [batch], torch.tensor(max(1, count))  # 0 where no token happens to be masked

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a step forward and backward; where GPU memory runs out, again in smaller micro-batches."""
        step = inputs["step"]
        random_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        # a schedule-free optimizer holds, between steps, what is evaluated and saved
        self.optimizer.train()  # type: ignore[union-attr]
        if not self.unwrapped.training:  # walking all modules takes 5 ms at 7B
            model.train()
        while True:
            try:
                self.parts = self._micro_batch_losses(model, step, num_items_in_batch)
                break
            except torch.OutOfMemoryError as error:
                if self.sharded:  # the other ranks wait for this one in the middle of a layer
                    raise
                reason = error.with_traceback(None)  # its frames hold everything that the failed pass made
            model.zero_grad(set_to_none=True)
            for group in self.fast.groups:
                group.forget()
            self._make_room(step, reason)
            torch.set_rng_state(random_states[0])
            torch.cuda.set_rng_state_all(random_states[1])
        if self.args.world_size > 1 and not self.sharded:
            average_gradients(self.trained)
        return torch.stack([loss for _, loss in self.parts]).sum()

    def _micro_batch_losses(self, model: Any, step: StepBatch, items: Any) -> list[tuple[list[str], Tensor]]:
        losses, router_losses = list[Any](), list[Tensor]()
        parts = self.micro_batches(step)
        inner = model if self.sharded else self.unwrapped  # without DDP's wrapper: gradients are averaged once a step
        with attention_implementation(self.unwrapped, self.fast.attention):
            for i, members in enumerate(parts):
                last = i == len(parts) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step by it
                with self.accelerator.no_sync(model) if self.sharded and not last else contextlib.nullcontext():
                    batch = self.tensors(step, members)
                    with self.compute_loss_context_manager():
                        total = summed_loss(inner, self.fast, batch, self.args.label_smoothing_factor)
                        # normalised by `items`, all ranks' supervised tokens of the step; ranks' gradients are averaged
                        loss = total * (self.args.world_size / items)
                        if self.balance:  # a micro-batch counts by its tokens, as in the model's own loss
                            routed = self.balance(self.router_logits, batch.get("attention_mask"))
                            share = int(step.lengths[members].sum()) / len(step.input_ids)
                            loss = loss + routed * share * self.base.router_aux_loss_coef
                            router_losses.append(routed.detach() * share)
                    if not loss.requires_grad:  # Reformer's reversible layers
                        raise ConfigError(f"no gradient reaches any adapter of {type(self.base).__name__}")
                    self.accelerator.backward(loss)
                    losses.append(([step.where[i] for i in members], loss.detach().to(self.args.device)))
        self.router_losses += router_losses  # once a whole pass has fitted into memory
        return losses

    def micro_batches(self, step: StepBatch) -> list[list[int]]:
        """Which members of a step go through the model together."""
        rows = self.plan.rows if torch.is_grad_enabled() else None  # evaluation has a batch size of its own
        tokens = 0 if self.fast.alone else self.plan.tokens  # 0: one row at a time
        parts = micro_batches(step, rows, tokens, padded=self.fast.attention is None)
        if self.sharded:  # each one gathers the sharded weights, so every rank runs as many, some of them empty
            parts += [[]] * (max(all_gather_object(len(parts))) - len(parts))
        return parts

    def tensors(self, step: StepBatch, members: list[int]) -> dict[str, Any]:
        """Return the model's inputs for a micro-batch, on the device."""
        if not members:
            step, members = collate_step([])["step"], [0]
        padded = self.fast.attention is None
        batch = padded_batch(step, members, *self.padding) if padded else padding_free_batch(step, members)
        return to_device(batch, self.args.device)

    def _make_room(self, step: StepBatch, reason: torch.OutOfMemoryError) -> None:
        """Drop dequantised copies, halve down to 4096 tokens, recompute more layers, offload their inputs, halve on."""
        plan, layers = self.plan, len(decoder_layers(self.unwrapped))
        largest = max(self.micro_batches(step), key=lambda members: int(step.lengths[members].sum()))
        tokens = int(step.lengths[largest].sum())
        if plan.unpacked:
            self.plan = plan._replace(unpacked=0)
        elif len(largest) > 1 and tokens > 4096:
            self.plan = plan._replace(tokens=tokens // 2)
        elif plan.recomputed < layers:
            self.plan = plan._replace(recomputed=min(layers, plan.recomputed + max(1, layers // 4)))
        elif layers and not plan.offloaded:
            self.plan = plan._replace(offloaded=True)
        elif len(largest) > 1:
            self.plan = plan._replace(tokens=tokens // 2)
        else:
            raise reason
        apply_step_plan(self.unwrapped, self.plan, self.config)
        torch.cuda.empty_cache()
        ran_out, number = plan._replace(rows=None, tokens=tokens), self.state.global_step + 1
        log.warning("step %d: GPU memory ran out with %s; repeating it with %s", number, ran_out, self.plan)

    def compute_loss_context_manager(self) -> Any:
        """Autocast: accelerate puts it around the model's own forward, which the fast path does not call."""
        dtype = compute_dtype(self.config)
        # DeepSpeed and a full fine-tune under FSDP cast weights instead
        casts = self.sharded and (self.config.quant.full_finetune or not self.config.training.fsdp)
        return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32 and not casts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, and one line to the console while training."""
        if self.router_losses and self.interval and "loss" in logs:
            since = max(1, self.state.global_step - self.interval[2])  # steps
            logs["router_loss"], self.router_losses = float(torch.stack(self.router_losses).sum()) / since, []
        super().log(logs, *args, **kwargs)
        step, steps = self.state.global_step, self.state.max_steps
        parts: list[str] = []
        if "loss" in logs and self.interval:
            began, tokens, first = self.interval
            seconds = max(time.perf_counter() - self.untimed_seconds - began, 1e-9)
            speed = (self.tokens_seen - tokens) * self.args.world_size / seconds
            left = timedelta(seconds=round(seconds / max(step - first, 1) * (steps - step)))
            names = {"loss": "loss", "router_loss": "routers' loss", "grad_norm": "gradient norm"}
            names |= {"learning_rate": "rate"}
            parts += [f"{names[name]} {float(logs[name]):<8.4g}" for name in names if logs.get(name) is not None]
            parts += [f"{speed:,.0f} tokens/s", *([f"{peak:.1f} GiB"] if (peak := peak_memory_gib()) else [])]
            parts += [f"{left} left"] if step < steps else []
            self.interval = None
            if logs.get("grad_norm") == 0 and not self.masking:  # of few tokens none may be masked
                warn_once("the gradient is zero, so nothing is trained any more: lower --learning_rate")
        elif self.is_in_train and step < steps:  # at the end report_done shows them
            parts += [f"{name} {value}" for name, value in shown_metrics(logs).items()]
        if parts:
            log.info("step %*d of %d  %s", len(str(steps)), step, steps, "  ".join(parts))

    def floating_point_ops(self, inputs: Any) -> int:
        return 6 * len(inputs["step"].input_ids) * self.parameter_count  # as the Trainer counts

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the rows themselves, which evaluation_loop deals to the ranks."""
        return eval_dataset

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Compute loss, perplexity and, if asked, MMLU. It draws no random numbers."""
        began, rows = time.perf_counter(), dataloader
        with attention_implementation(self.unwrapped, self.fast.attention):
            batches = run_batches(self, len(rows), lambda numbers: self._eval_batch(rows, numbers), "Evaluating")
            mmlu = mmlu_metrics(self, self.questions) if self.questions else {}
        sizes, losses, correct, counts = zip(*batches, strict=True)
        loss = sum(map(operator.mul, sizes, losses)) / sum(sizes)  # the mean over rows of their batches' means
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), **mmlu}
        if self.masking:
            metrics["eval_masked_accuracy"] = sum(correct) / sum(counts)
        self.untimed_seconds += time.perf_counter() - began
        self.evaluated = self.state.global_step, metrics
        return EvalLoopOutput(None, None, metrics, len(rows))  # type: ignore[arg-type]

    def _eval_batch(self, rows: Any, numbers: list[int]) -> tuple[int, float, int, int]:
        """A batch's rows, mean loss, masked tokens that are predicted right, and supervised tokens."""
        step = self.data_collator([rows[i] for i in numbers])["step"]
        if self.masking:  # the same masks at every evaluation, one in a row at least
            step = self.masking.mask_step(step, "eval", one=True)
        inner, smoothing = self.model if self.sharded else self.unwrapped, self.args.label_smoothing_factor
        total, correct = torch.zeros((), device=self.args.device), 0
        for members in self.micro_batches(step):
            batch = self.tensors(step, members)
            if self.masking:
                logits, targets = supervised_logits(inner, self.fast, batch), batch["targets"]
                correct += int((logits.argmax(-1) == targets).sum())
                total += F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            else:
                total += summed_loss(inner, self.fast, batch, smoothing).to(total.device)
        count = max(1, step.supervised)
        return len(numbers), float(total) / count, correct, count

    # From here on private methods of transformers 5.17 to 5.24, which tests/test_private_apis.py checks.

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Try the rest of the fast path once an engine has sharded the weights."""
        with reraise_as_user_error("--deepspeed") if self.is_deepspeed_enabled else contextlib.nullcontext():
            model, dataloader = super()._prepare_for_training(*args, **kwargs)
        if self.sharded and self.config.training.fast_path and not self.config.masked:
            self.fast = choose_fast_path(model, self.base, self.fast, self.config, self.args.device)
            log.info("%s", format_table(self.fast.lines()))
        return model, dataloader

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        """Check steps' numbers before a log or a save, ten at a time at most: reading each stalls the GPU (1.5 %)."""
        self.optimizer.eval()  # type: ignore[union-attr]
        control, step = self.control, self.state.global_step
        saving = control.should_save or control.should_evaluate or control.should_training_stop
        at_step = bool(self.parts)  # a second call follows at an epoch's end
        if at_step:
            self.pending_checks.append((step, grad_norm, self.parts))
            self.parts = []
        if saving or control.should_log or control.should_epoch_stop or len(self.pending_checks) >= 10:
            for check in self.pending_checks:
                self._check_numbers(*check)
            self.pending_checks = []
        # at an epoch's end saves follow its evaluation, which a resume would skip
        ends = control.should_training_stop or self.state.epoch % 1 == 0
        self.save_is_put_off = control.should_save and at_step and ends
        control.should_save &= not self.save_is_put_off
        if control.should_save and not all(bool(parameter.isfinite().all()) for parameter in self.trained):
            self._stop(step, "its update leaves weights that are not finite", "lower --learning_rate")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        control.should_save |= self.save_is_put_off

    def _check_numbers(self, step: int, grad_norm: Any, losses: list[tuple[list[str], Tensor]]) -> None:
        """Stop at a loss or gradient norm that is not finite, naming the rows and the likely cause."""
        if hasattr(grad_norm, "full_tensor"):  # sharded, of FSDP
            grad_norm = grad_norm.full_tensor()
        norm = 1.0 if grad_norm is None else float(grad_norm)
        parts = [(rows, math.isfinite(loss)) for rows, loss in losses]
        if not math.isfinite(norm):  # of the gradients' average over ranks, so on all of them
            parts = list(itertools.chain(*all_gather_object(parts)))
        finite = [good for _, good in parts]
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        # a scaler skips such a step and halves its scale: after 20 the scale is not the cause
        exploded = self.overflows > (0 if self.accelerator.scaler is None else 20)
        if all(finite) and not exploded:
            return
        why = (
            "fp16 ends at 65504, train with --bf16" if self.args.fp16
            else "the step's other rows are fine, look at these" if 0 < sum(finite) < len(finite)
            else f"lower --learning_rate {self.args.learning_rate:g}, or look at these rows"
        )  # fmt: skip
        what = f"the {'gradient norm' if all(finite) else 'loss'} is not finite"
        self._stop(step, what, why, [row for part, good in parts if all(finite) or not good for row in part])

    def _stop(self, step: int, what: str, why: str, rows: Sequence[str] = ()) -> NoReturn:
        """End the run before anything of the step is saved."""
        of = f", on rows {shorten(', '.join(filter(None, rows)))}" if any(rows) else ""
        kept = checkpoints_in(Path(self.config.training.output_dir))
        stays = f"{kept[0]} stays, a rerun on the same rows goes on from it" if kept else "no checkpoint was saved"
        raise ConfigError(f"step {step}: {what}{of}: {why}. {stays}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the Trainer write into a hidden folder; the rename in commit_checkpoint makes it visible as a whole."""
        began, output = time.perf_counter(), Path(self.config.training.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        staging = output / f"{STAGING}{self.state.global_step}"
        folder = staging / final.name
        with atomic_save(staging, final):
            with mock.patch.object(self.args, "output_dir", str(staging)):
                super()._save_checkpoint(model, trial)
            best = output / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best.is_dir() or best == final):
                self.state.best_model_checkpoint = str(best)  # the Trainer looked in the hidden folder
                self.state.save_to_json(str(folder / "trainer_state.json"))
            wait_for_all_ranks()
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with tokens in it
                if self.position is not None:
                    write_json(folder / STREAM, {"rows": self.position})
                write_manifest(folder, self.identity)
                commit_checkpoint(folder, final)
                own = [checkpoint for checkpoint in checkpoints_in(output) if (checkpoint / MANIFEST).is_file()]
                limit = max(self.config.training.save_total_limit or 0, 0) or len(own)  # 0 keeps all, as in the Trainer
                for old in own[limit:]:
                    if str(old) != self.state.best_model_checkpoint:
                        old.rename(staging / old.name)  # absent at once, and removed with the hidden folder
            wait_for_all_ranks()
        self.untimed_seconds += time.perf_counter() - began

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load into the one adapter, in its dtype, or all weights of a full fine-tune."""
        adapter = weights_in(Path(resume_from_checkpoint))
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif adapter is None:  # the Trainer would skip weights that files name otherwise (GPT-NeoX's head, experts)
            own, dtype = copy.deepcopy(self.base.config), self.base.dtype
            self.base.load_state_dict(load_base(self.config, own, resume_from_checkpoint, dtype=dtype).state_dict())
        else:
            with reraise_as_user_error(f"{adapter} does not fit the LoRA flags", RuntimeError):
                load_adapter_weights(self.model, str(adapter))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Load their states, but take rates, decay, betas and epsilon from the flags."""
        optimizer: Any = self.optimizer
        names = ("initial_lr", "weight_decay", "betas", "eps")
        flags = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
        # fp16's scaler is hidden from the empty step that accelerate takes to make room for what FSDP loads
        what = f"{checkpoint}: the state of its optimizer"  # an earlier version trained more of a frozen layer
        with mock.patch.object(optimizer, "scaler", None, create=True), reraise_as_user_error(what):
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint and not self.is_deepspeed_enabled and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            schedule.base_lrs = [own["initial_lr"] for own in flags]
            for group, own, factor in zip(optimizer.param_groups, flags, schedule.lr_lambdas, strict=True):
                group.update(own, lr=own["initial_lr"] * factor(schedule.last_epoch))
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _load_best_model(self) -> None:
        """Load as a resume does; under an engine, in its own way."""
        model: Any = self.model
        log.info("the weights of %s, the best, are the result", Path(str(self.state.best_model_checkpoint)).name)
        for module in model.modules() if self.is_fsdp_enabled else ():
            if hasattr(module, "reshard"):  # what an evaluation left gathered would keep its values
                module.reshard()
        if self.sharded:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def load_end(self, last: Path) -> None:
        """Load the last step, or the best if asked for, of a run that lacks only its final files."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        wanted = last.with_name(Path(best).name) if best else last  # the folder may have moved
        if not wanted.is_dir():
            log.warning("%s, the best checkpoint, is not there: the last one is saved", wanted)
            wanted = last
        if self.sharded:  # loads into what it has sharded
            self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), str(wanted))
        else:
            self._load_from_checkpoint(str(wanted))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        prefixed = {f"eval_{name}": value for name, value in metrics.items()}  # MMLU's too, as the Trainer asks for
        # with --save_strategy best, the Trainer saves what this returns, but a signal's checkpoint is due in any case
        best = super()._determine_best_metric(metrics | prefixed, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end and not self.save_is_put_off
        return (best or self.control.should_save) and not self.save_is_put_off


def router_loss_of(model: Any) -> Callable[[Any, Any], Tensor] | None:
    """The load-balancing loss of a mixture whose config asks for it (output_router_logits), on logits and a mask."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if function is None or not hasattr(model, "router_aux_loss_coef"):
        log.warning("output_router_logits: %s has no known loss of its routers: none is added", type(model).__name__)
        return None
    return lambda logits, mask: function(logits, model.num_experts, model.num_experts_per_tok, mask)


def set_up_fsdp(plugin: Any, model: Any, config: Config) -> None:
    """Tell accelerate's FSDP plugin what to wrap, and not to cast packed weights."""
    if not config.quant.full_finetune:
        plugin.mixed_precision_policy = None  # it would cast what is packed
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        if config.masked and any(uses[parameter] > 1 for parameter in module.original_module.parameters()):
            raise ConfigError("--modules_to_save: --fsdp can't save tied modules of a masked model; leave them out")
        module.original_module = copy.deepcopy(module.original_module)  # shards can't share a tied weight
    # Only the layers: BERT's own list also wraps its embeddings, which share a weight with its head.
    names = sorted({type(layer).__name__ for layer in decoder_layers(model)})
    wrapped = plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or names
    if set(wrapped) - {type(module).__name__ for module in model.modules()}:
        classes = "transformer_layer_cls_to_wrap " + ", ".join(wrapped)
        raise ConfigError(f"--fsdp_config: {classes}: not in the model, whose layers are {', '.join(names)}")


def trainer_arguments(args: TrainingArguments) -> TrainingArguments:
    """Derive the Trainer's own arguments: it receives whole steps, which training_step cuts."""
    names = ("gradient_checkpointing", "activation_checkpointing")  # transformers 5.23 renamed it; 5.17 has the old
    changed: dict[str, Any] = {name: False for name in names if hasattr(args, name)} | {
        "logging_nan_inf_filter": False,  # it reads the loss, and so waits for the GPU; our own check stops
        "restore_callback_states_from_checkpoint": True,  # evaluations that early stopping has counted
        "hub_strategy": "end",  # save_final pushes; the Trainer would upload all of output_dir, and the token
        "disable_tqdm": True,  # build_callbacks adds the bar, and QLoRATrainer.log writes the lines
        "per_device_train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "gradient_accumulation_steps": 1,
        "save_total_limit": None,  # at the end the Trainer would remove all checkpoints but the best
    }
    if args.deepspeed:  # a batch that its file fixes is that of the flags, which check_config compared
        batch = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        changed["deepspeed"] = args.hf_deepspeed_config.config | dict.fromkeys(batch, "auto")
    return dataclasses.replace(args, **changed)


def average_gradients(trained: list[torch.nn.Parameter]) -> None:
    """Average over the ranks once a step: in the backward pass they would wait for one whose memory ran out."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        by_dtype[parameter.dtype].append(parameter.grad)
    for gradients in by_dtype.values():
        flat = parameters_to_vector(gradients)  # one message; activations have made room
        torch.distributed.all_reduce(flat)
        vector_to_parameters(flat.div_(rank_and_world_size()[1]), gradients)


def apply_step_plan(base: Any, plan: StepPlan, config: Config) -> None:
    """Recompute layers as planned; a model without transformers' own kind of layers recomputes all or none."""
    set_unpacked_layers(base, plan.unpacked, compute_dtype(config))
    if decoder_layers(base) and not is_sharded(config):  # an engine recomputes all layers or none
        # a layer that is first run without gradients would hand none to the routers' own loss
        routed = getattr(base.config.get_text_config(), "output_router_logits", False)
        small = plan.tokens < 2048 and config.training.world_size == 1 and not routed
        set_recomputed_layers(base, plan.recomputed, plan.offloaded, small)
    elif plan.recomputed and getattr(base, "supports_gradient_checkpointing", True):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    elif plan.recomputed:
        log.warning("gradient_checkpointing: %s does not support it, nothing is recomputed", type(base).__name__)


# ------------------------------------------------------------------------------------
# 17. Stages: train, evaluate, predict, merge, and the files that a run leaves
#
# Each stage takes the trainer, writes its files and returns its metrics.
# ------------------------------------------------------------------------------------
class Run(NamedTuple):
    """What a run is: everything but its rows and weights."""

    config: Config  # with the objective resolved
    folder: str  # of the base model, as published
    base: str  # of the weights to train on: the same, or a calibrated base
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    resume: ResumePoint


class Data(NamedTuple):
    """The rows of a run."""

    train: Any  # encoded, packed if the flags say so; of a stream its first rows
    eval: Any
    text: Splits  # before they are encoded
    statistics: dict[str, TokenStatistics]


def save_metrics(trainer: QLoRATrainer, split: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Save metrics as the Trainer does, but each file whole."""
    metrics = {name: value for name, value in metrics.items() if name != "epoch" or value}  # 0: nothing is trained
    if trainer.args.should_save:
        output = Path(trainer.config.training.output_dir)
        write_json(output / f"{split}_results.json", metrics)
        add_json(output / "all_results.json", metrics, anew=split == "train")
    return metrics


def train(trainer: QLoRATrainer, start: ResumePoint, stop: GracefulStop) -> dict[str, Any]:
    """Train, save the result, mark the run completed. After a signal only the checkpoint is there.

    The speed is that of tokens without padding, over the seconds not spent on evaluating and saving.
    """
    checkpoint, rows = start.checkpoint, trainer.train_dataset
    state = start.state or TrainerState()
    first_step = state.global_step
    metrics = {}
    stop.training = True
    trainer.args.eval_on_start = trainer.args.eval_on_start and not checkpoint  # it would count as one without progress
    if trainer.args.should_save:
        clear_output(trainer.config, first_step, start.trained)
    if checkpoint and start.trained:
        log.info("%s holds the last step: nothing is left to train", checkpoint)  # the Trainer would do one more
        trainer.state = state
        trainer.load_end(checkpoint)
    else:
        if checkpoint and isinstance(rows, StreamedSteps):
            with reraise_as_user_error(f"{checkpoint / STREAM}"):
                rows.position = read_json(checkpoint / STREAM)["rows"]
                rows.steps = first_step
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except pickle.UnpicklingError as error:
            raise ConfigError(f"{checkpoint}: a pickle in it holds more than tensors, and is not loaded") from error
        seconds = max(time.perf_counter() - began - trainer.untimed_seconds, 1e-9)
        tokens = sum(all_gather_object(trainer.tokens_seen))
        steps = max(trainer.state.global_step - first_step, 1)
        peaks = {"train_peak_memory_gib": peak_memory_gib(), "plan_peak_memory_gib": trainer.plan.peak}
        metrics = result.metrics | {
            "train_loss": trainer._total_loss_scalar / steps,  # transformers 5.17 counts steps before a resume too
            "train_tokens": tokens,
            "train_tokens_per_second": round(tokens / seconds, 1),
            **{name: round(peak, 3) for name, peak in peaks.items() if peak},  # of GPUs only
        }
    if not stop.interrupted:
        if metrics:
            save_metrics(trainer, "train", metrics)
        trainer.save_state()
        save_final(trainer)
        stop.saved = True
    stop.training = False
    return metrics


def gather_weights(trainer: QLoRATrainer) -> dict[str, Tensor]:
    """The weights to save, gathered from the ranks that shard them; every rank has to take part."""
    if trainer.is_deepspeed_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped) or {})
    model, full = trainer.unwrapped, trainer.config.quant.full_finetune
    weights = {}
    names = model.all_tied_weights_keys  # a bias that a head holds under two names is saved under one
    for name, parameter in model.named_parameters():
        if full or parameter.requires_grad:  # one at a time: a whole base may not fit
            tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            weights[names.get(name, name)] = tensor.detach().cpu()
    return weights


def save_final(trainer: QLoRATrainer) -> None:
    """Save the adapter (or, after a full fine-tune, the model) and its tokenizer, each file whole; then `completed`."""
    model, args, state, config = trainer.unwrapped, trainer.args, trainer.state, trainer.config
    output, final = Path(config.training.output_dir), final_folder(config)
    weights = {"state_dict": gather_weights(trainer)} if trainer.sharded else {}
    if args.should_save:
        staging = final / f"{STAGING}final"
        cached = mock.patch.object(model.config, "use_cache", True)
        with atomic_save(staging, final), cached:  # load_model turned the cache off
            model.save_pretrained(staging, max_shard_size=config.training.max_shard_size, **weights)
            trainer.processing_class.save_pretrained(staging)  # type: ignore[union-attr]
            if getattr(model, "initial_adapter", None):
                convert_to_published_base(staging, model.initial_adapter)
            earlier = final_files(output, final)
            readme = final / "README.md"
            foreign = readme.is_file() and "Trained with QLoRA" not in readme.read_text("utf-8", "replace")
            (staging / readme.name).unlink(missing_ok=True)  # peft's
            card = "MODEL_CARD.md" if foreign and readme not in earlier else readme.name  # a project's own stays
            write_file(staging / card, model_card(trainer))
            files = file_digests(staging)
            saved: Any = {"final": final_place(output, final), "files": [*files], "weights": [*files.values()]}
            # a kill from here on may leave old files and new ones
            listed = sorted({*files, *(file.relative_to(final).as_posix() for file in earlier)})
            either = {"files": listed, "weights": saved["weights"] + [*file_digests(final, listed).values()]}
            write_json(output / PREVIOUS, read_record(output) | saved | either)
            for name in files:
                fsync_path(staging / name)
                (final / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(final / name)
        for old in earlier - {final / name for name in files}:  # shards would be loaded instead
            old.unlink(missing_ok=True)
        write_loss_chart(output / "loss.png", state.log_history)
        done = {"step": state.global_step, "epoch": state.epoch, "run": trainer.identity}
        if state.global_step < state.max_steps:  # stopped early: a rerun with the same flags is not to go on
            done |= {"step": state.max_steps, "epoch": state.num_train_epochs, "stopped_at": state.global_step}
            log.info("stopped early at step %d of %d", state.global_step, state.max_steps)
        write_json(output / PREVIOUS, done | saved)
        (output / PREVIOUS).replace(output / COMPLETED)
        if args.push_to_hub:
            hub: Any = {"repo_id": str(trainer.hub_model_id), "revision": args.hub_revision, "token": args.hub_token}
            with reraise_as_user_error("--push_to_hub: all is saved here, but the upload failed"):
                upload_folder(folder_path=final, allow_patterns=[*files], **hub)
            log.info("pushed to %s", trainer.hub_model_id)
    wait_for_all_ranks()


def predict(trainer: QLoRATrainer, pairs: Any) -> dict[str, Any]:
    """Generate an answer for every held-out row, or fill its masks, into predictions.jsonl."""
    began = time.time()
    answers: Any = fill_masks if trainer.config.masked else generate_predictions
    batches = run_batches(trainer, len(pairs), lambda numbers: [*answers(trainer, pairs[numbers])], "Predicting")
    rows = [*itertools.chain(*batches)]
    metrics = {"predict_samples": len(rows), **speed_metrics("predict", began, num_samples=len(rows))}
    if trainer.args.should_save:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(Path(trainer.config.training.output_dir, "predictions.jsonl"), lines)
    return save_metrics(trainer, "predict", metrics)


PROCESSOR_FILES = ["tokenizer.model", "*processor*.json"]  # llama.cpp's converter prefers the first


def merge_record(adapter: str, config: Config) -> dict[str, Any]:
    """What a merged model is made of."""
    weights = {file.name: file_digest(file) for file in Path(adapter_files(adapter, config)).glob("adapter_model.*")}
    return weights | {name: config.flags[name] for name in ("model_name_or_path", "merge_base", "max_shard_size")}


def merging_folder(config: Config) -> Path:
    """The hidden folder that a model is merged in."""
    target = Path(str(config.training.merged_output_dir)).resolve()
    return target.with_name(f"{MERGING}{target.name}")


def check_merge(start: ResumePoint, config: Config) -> None:
    """Check before training that there will be an adapter to merge and a free folder for the result."""
    if config.training.merged_output_dir is None or config.data.preview:
        return
    target = Path(config.training.merged_output_dir).resolve()
    if not start.train and start.weights is None:
        raise ConfigError(f"--merged_output_dir {target}: no adapter to merge: nothing was trained in --output_dir")
    record = read_json(target / MERGED) if not start.train and (target / MERGED).is_file() else None
    if isinstance(record, dict) and record.items() >= merge_record(str(start.weights), config).items():
        log.info("%s holds this adapter merged already", target)
    elif target == Path.cwd() or target.is_mount() or any(target.glob("*")):  # it will be replaced
        raise ConfigError(f"--merged_output_dir {target}: in use or not empty; name another folder, or remove it")


def load_merge_base(config: Config, folder: str) -> Any:
    """The base in 16 bit on the CPU: as published, or with the values that its quantised weights stand for."""
    model_config = load_model_config(config, folder)
    dtype = model_config.dtype if model_config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if stored := getattr(model_config, "quantization_config", None):
        log.info("the base is quantised already: the adapter is merged into the values that its weights stand for")
    elif config.training.merge_base == "dequantized" and config.quant.bits < 16:
        options = {"dtype": load_dtype(config), "quantization_config": quantisation_config(config, model_config)}
    model = load_base(config, model_config, folder, device_map={"": "cpu"}, **options)
    for name, (module, weight) in stacked_experts(model).items():
        if hasattr(weight, "quant_state"):  # a stack of experts, which model.dequantize() does not know
            setattr(module, leaf_name(name), torch.nn.Parameter(stack_values(weight, dtype), requires_grad=False))
    if getattr(model.config, "quantization_config", None):
        with reraise_as_user_error(f"--merged_output_dir: {config.model.model_name_or_path} can't be dequantised"):
            model = model.dequantize(dtype=dtype)
    if stored or "quantization_config" in options:
        model._weight_conversions = None  # or saving would quantise again (transformers 5.23)
    return cast_parameters(model, dtype)


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters but not the buffers: rotary frequencies must stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@torch.no_grad()
def float32_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of every token that is not padding, (tokens, vocabulary)."""
    with Float32Mode():
        return model(**batch).logits[batch["attention_mask"].bool()]


def merge_layers(peft_model: Any, dtype: torch.dtype) -> float:
    """Merge every layer in float32, rounding once. Returns the share of the change that is rounded away."""
    total = kept = 0.0
    for layer in (module for module in peft_model.modules() if isinstance(module, LoraLayer)):
        base, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")  # experts are not a `weight`
        before = getattr(base, name).data.float()
        # its own: that of a head may be the embedding's too
        weight = torch.nn.Parameter(before.clone(), requires_grad=False)
        setattr(base, name, weight)
        layer.merge()  # type: ignore[operator]
        change, weight.data = weight.data - before, weight.data.to(dtype)
        total += change.square().sum().item()
        kept += (change * (weight.data.float() - before)).sum().item()
    return 1 - kept / total if total else 0.0


def compare_merged(model: Any, base: Tensor, adapted: Tensor, lost: float, sample: Any, target: str) -> dict[str, Any]:
    """Compare a merged model's logits with those of base + adapter, and refuse one that is wrong.

    They may differ by as much as one unit in the last place of every weight changes, which is measured on the model
    itself, plus twice the part of the adapter's effect that was rounded away.
    """
    merged, generator = float32_logits(model, sample), torch.Generator().manual_seed(0)
    # from here on, every weight is off by one unit in its last place
    for weight in (p.data for p in model.parameters() if p.dim() == 2):
        signs = [torch.randint(2, (n, 1), generator=generator).mul_(2).sub_(1).to(weight.dtype) for n in weight.shape]
        weight.addcmul_(weight, signs[0] @ signs[1].T, value=torch.finfo(weight.dtype).eps)
    differences = merged - adapted, base - adapted, merged - float32_logits(model, sample)
    # a router that rounding flips changes its own token by more than rounding explains, and most tokens by nothing
    tokens = len(merged) * 9 // 10 if stacked_experts(model) else len(merged)
    squares = (x.square().mean(-1).sort().values[:tokens] for x in differences)
    error, effect, rounding = (part.mean().sqrt().item() for part in squares)
    largest, moved, _ = (x.abs().max().item() for x in differences)
    allowed = rounding + 2 * max(lost, 0) * effect
    if lost > 0.05:
        log.warning("%.0f %% of the adapter's change is too small for a 16-bit weight and is lost", 100 * lost)
    if torch.equal(merged, base):
        raise ConfigError(f"{target}: not written, the merge changed nothing: the adapter is zero, or lost in 16 bit")
    if not error <= allowed:
        what = f"its logits differ from base + adapter's by {error:.3g} (root mean square)"
        raise ConfigError(f"{target}: not written, {what}, of which rounding explains {allowed:.3g}")
    log.info("verified: the merged model answers as base and adapter do: logits differ by at most %.3g, as rounding to "
             "16 bit explains; the adapter moves them by up to %.3g", largest, moved)  # fmt: skip
    return {"merge_largest_difference": largest, "merge_difference": error, "merge_rounding": allowed}


def merge(adapter: str, run: Run, data: Data) -> dict[str, Any]:
    """Write base and adapter as one model in 16 bit, load it again, compare, and only then give it its name."""
    config, tokenizer, folder = run.config, run.tokenizer, run.config.training.merged_output_dir
    if folder is None or config.training.process_index != 0 or Path(folder, MERGED).is_file():  # see check_merge
        return {}
    target, source = Path(folder).resolve(), download(run.folder, PROCESSOR_FILES, config)
    staging = merging_folder(config) / target.name  # a model's own code is imported under its folder's name
    shutil.rmtree(staging, ignore_errors=True)
    rows = data.eval or getattr(data.train, "rows", data.train)  # of packs, or as they are
    sample = padded_prompts([ids[:64] for ids in rows[:4]["input_ids"]], tokenizer.pad_token_id, "right")
    gc.collect()  # the trained model is held by reference cycles
    log.info("merging %s into %s", adapter, target)
    with atomic_save(staging, target), reraise_as_user_error(f"--merged_output_dir {target}"):
        dequantised = config.training.merge_base == "dequantized"
        model: Any = load_merge_base(config, run.base if dequantised else run.folder)
        fit_embeddings(model, token_rows(PeftConfig.from_pretrained(adapter_files(adapter, config))))  # for the sample
        dtype, base = model.dtype, float32_logits(model, sample)
        with reraise_as_user_error(f"{adapter} on {config.model.model_name_or_path}", RuntimeError):
            model = attach_adapter(model, adapter_files(adapter, config)).eval()  # without dropout
        if mutates_base(init := getattr(model.peft_config["default"], "init_lora_weights", None)):
            raise ConfigError(f"{adapter} fits a base changed by {init}: finish its training; the result fits any base")
        if (start := adapter_start_file(config, run.base)) and dequantised:
            fit_calibrated_base(model, start, fresh=False, rank=config.lora.lora_r)
        elif start and model.peft_config["default"].r == config.lora.lora_r:
            raise ConfigError(f"{adapter} fits the calibrated base only: finish its training")
        adapted = float32_logits(model, sample)
        lost = merge_layers(model, dtype)
        model = cast_parameters(model.merge_and_unload(), dtype)  # what was trained whole is still in float32
        if not getattr(model.config, "tie_word_embeddings", False):
            # Of one weight under two names, as of BART's head that was trained whole, only one would be saved.
            shared = ("bias", "embed_tokens.weight")
            copies = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(shared)}
            model.load_state_dict(copies, strict=False, assign=True)
        sync_special_tokens(model, tokenizer)
        model.save_pretrained(staging, max_shard_size=config.training.max_shard_size)
        tokenizer.save_pretrained(staging)
        for file in itertools.chain(*map(source.glob, PROCESSOR_FILES)):
            shutil.copyfile(file, staging / file.name)
        del model  # before the next is loaded
        merged = load_base(config, load_model_config(config, str(staging)), staging)
        metrics = compare_merged(merged, base, adapted, lost, sample, folder)
        run_of = run_record(Path(adapter)) or run_record(Path(config.training.output_dir))
        write_json(staging / MERGED, merge_record(adapter, config) | {"run": run_of})
        if target.exists():
            target.rmdir()  # empty: check_merge refuses others
        commit_checkpoint(staging, target)
    return metrics


def write_loss_chart(path: Path, history: list[dict[str, float]]) -> None:
    """Plot training and evaluation loss over steps."""
    from matplotlib.figure import Figure  # pyplot would ask for a window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def model_card(trainer: QLoRATrainer) -> str:
    """README.md of the adapter: settings, data and losses, with the metadata block that the hub reads."""
    config = trainer.config
    steps: dict[float, dict[str, float]] = defaultdict(dict)
    for entry in trainer.state.log_history:
        steps[entry["step"]] |= entry
    losses = [entry for entry in steps.values() if "loss" in entry or "eval_loss" in entry]
    losses = losses[:: -math.ceil(max(len(losses), 1) / 20)][::-1]  # every n-th back from the last, at most 20 rows
    names = ("step", "loss", "eval_loss")
    columns = ([rounded(entry[name]) if name in entry else "" for name in names] for entry in losses)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in columns)
    given = ((name, config.flags[name]) for name in sorted(config.explicitly_set))
    texts = ((name, f"{v:g}" if isinstance(v, float) else str(v).replace("|", "\\|")) for name, v in given)
    settings = "\n".join(f"| {name} | `{text}` |" for name, text in texts)
    base, output = config.model.model_name_or_path, config.training.output_dir
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", base):  # a folder of the hub's cache
        base = "/".join(cached.groups())
    # the hub refuses what is not a name of its own
    metadata = "" if Path(base).exists() else f"base_model: {json.dumps(base)}\n"
    prefix = "" if Path(output) == final_folder(config) else f"{os.path.relpath(output, final_folder(config))}/"
    last = max(getattr(trainer.processing_class, "new_rows", [-1]))
    notes, lora = "", config.lora
    unserved = {
        "new tokens": last >= 0, "ranks or alphas by layer": lora.lora_rank_pattern or lora.lora_alpha_pattern,
        "DoRA": lora.use_dora, "modules trained whole": lora.modules_to_save, "biases": lora.lora_bias != "none",
        "rsLoRA (llama.cpp)": lora.use_rslora,
    }  # fmt: skip
    if last >= 0:
        notes = f"New tokens: if the base has fewer rows, call `base.resize_token_embeddings({last + 1})` before.\n\n"
    if (found := [name for name, present in unserved.items() if present]) and not config.quant.full_finetune:
        notes += f"vLLM or llama.cpp refuse an adapter with {', '.join(found)}, or scale it differently: to serve "
        notes += "it there, merge it with `--merged_output_dir`.\n\n"
    if config.quant.calibration_rows:
        notes += "Load the base in 16 bit: to round it to 4 bit anew gives another base than the calibrated one.\n\n"
    best = Path(trainer.state.best_model_checkpoint or "").name if trainer.args.load_best_model_at_end else ""
    best = f" (the weights of {best}, the best)" if best else ""
    kind, library = ("Full fine-tune", "transformers") if config.quant.full_finetune else ("LoRA adapter", "peft")
    return (
        f"---\n{metadata}library_name: {library}\n"
        f"pipeline_tag: {'fill-mask' if config.masked else 'text-generation'}\n---\n\n# {kind} for {base}\n\n"
        f"Trained with QLoRA: base in {config.quant.bits} bit, {trainer.state.global_step} optimizer steps{best}, "
        f"dataset `{config.data.dataset}`.\n\n## Settings given\n\n| flag | value |\n|---|---|\n{settings}\n\n"
        f"{notes}All flags, resolved, and library versions are in `{prefix}run.json`.\n\n"
        f"## Losses\n\n| step | training loss | evaluation loss |\n|---|---|---|\n{rows}\n\n![loss]({prefix}loss.png)\n"
    )


def versions() -> dict[str, str]:
    """Versions of Python, the libraries and this file: its commit, marked if it has uncommitted changes."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    found = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = CODE_VERSION
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found | {"qlora.py": commit}


def device_name() -> str:
    """The GPUs, or the CPU."""
    gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return ", ".join(gpus) or f"CPU, {os.cpu_count()} cores"


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """List what differs in two records, each line with the path to it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() - NOT_REPEATED - {"derived"}:  # an earlier version recorded less
            yield from differences(old[key], new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name} was {old}, is {new}"


def describe_run(run: Run, data: Data, identity: dict[str, Any]) -> dict[str, Any]:
    """Log what this run is, and how it differs from one that it repeats. Returns run.json, which holds no secret."""
    config, args, quant, rows = run.config, run.config.training, run.config.quant, identity["effective batch"]["rows"]
    once, accumulated, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    batch = f"{rows} rows = {once} at once x {accumulated} accumulated x {ranks} processes"
    if rows != once * accumulated * ranks:
        batch = f"{rows} rows, as in the checkpoint, shared by {ranks} processes"
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    if data.train is not None and not config.data.streaming:
        an_epoch = max(1, steps_per_epoch(len(data.train), rows, args))
        epochs = args.max_steps / an_epoch if args.max_steps > 0 else args.num_train_epochs
        length += f"; {an_epoch} steps are an epoch"
        if run.resume.train and epochs > 20:
            flag = f"--max_steps {args.max_steps}" if args.max_steps > 0 else f"--num_train_epochs {epochs:g}"
            text = "%s: %.0f times through %d rows; three times are --max_steps %d"
            log.warning(text, flag, epochs, len(data.train), 3 * an_epoch)
    why = "--bf16" if args.bf16 else "--fp16" if args.fp16 else "neither --bf16 nor --fp16"
    tokens = {name: token for name, token in run.tokenizer.special_tokens_map.items() if isinstance(token, str)}
    stored = getattr(run.model_config, "quantization_config", {}).get("quant_method")
    bits = f"{quant.bits} bit"
    bits += f" {quant.quant_type}, double_quant {quant.double_quant}" if quant.bits == 4 else ""
    bits += f", kept in {str(load_dtype(config)).removeprefix('torch.')}" if quant.bits >= 16 else ""
    adapter = run.resume.checkpoint or run.resume.weights or ("new" if args.do_train else "none, the base model alone")
    derived = {
        "model": config.model.model_name_or_path,
        "objective": config.data.objective,
        "weights": f"quantised already, by {stored}" if stored else bits,
        **({"calibrated base": Path(run.base).name} if run.base != run.folder else {}),
        "compute dtype": f"{str(compute_dtype(config)).removeprefix('torch.')} ({why})",
        **({"effective batch": batch, "length": length} if run.resume.train else {}),
        "special tokens": ", ".join(f"{n} {t!r} = {run.tokenizer.convert_tokens_to_ids(t)}" for n, t in tokens.items()),
        "trained part": "all weights but the embeddings" if quant.full_finetune else f"adapter: {adapter}",
        **{f"{name} data": str(part) for name, part in data.statistics.items()},
    }
    log.info("This run\n%s", format_table(derived))
    more = {"given": sorted(config.explicitly_set), "template date": run.tokenizer.template_date}
    if data.text.eval is not None and not config.data.eval_dataset:
        more["held out"] = held_out_places(data.text.eval)
    record = {
        "flags": config.flags,
        "derived": derived | more,
        "versions": versions(),
        "data": {name: part._asdict() for name, part in data.statistics.items()},
        "device": {"name": device_name(), "processes": args.world_size},
    }
    record = json.loads(json.dumps(record, default=str))  # as it will be read
    if config.record and args.do_train:
        changed = sorted(differences(config.record, record)) or ["nothing"]
        log.warning("repeating a run, what differs from it:\n  %s", "\n  ".join(changed))
    return record


def log_hints(config: Config) -> None:
    """Log once what may surprise a user about the flags."""
    train = config.training
    needed = {"model_name_or_path"} if train.plan else {"model_name_or_path", "dataset"}
    if missing := sorted(needed - config.explicitly_set):
        defaults = ", ".join(f"--{name} {config.flags[name]}" for name in missing)
        log.info("not passed, so the original's defaults are used and downloaded: %s", defaults)
    own_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if own_bf16 and not (train.bf16 or train.fp16):
        log.info("hint: pass --bf16: float32 products take 2 (RTX 4090) to 16 times (A100, H100) as long on this GPU")
    elif train.bf16 and torch.cuda.is_available() and not own_bf16:
        name = torch.cuda.get_device_name()
        log.warning("--bf16: the %s here computes it by emulation, slowly: pass --fp16 instead", name)
    free = (os.cpu_count() or 1) - (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0)  # Windows has none
    runs = not (train.plan or config.data.preview)
    if runs and train.use_cpu and (threads := torch.get_num_threads()) > max(1, free + 0.5):
        log.warning("other programs keep this machine busy (%.1f of %d cores are free): with %d threads each waits for "
                    "the slowest; OMP_NUM_THREADS=1 is faster", max(free, 0), os.cpu_count(), threads)  # fmt: skip
    for applies, names, reason in ineffective_flags(config):
        if applies and not config.record and (passed := sorted(config.explicitly_set.intersection(names))):
            log.info("%s: without effect: %s", ", ".join(passed), reason)


def report_done(config: Config, metrics: dict[str, Any], trained: bool, seconds: float) -> None:
    """Write metrics.json and log the block at the end of a run."""
    args = config.training
    anew = "train_loss" in metrics  # what the file holds is of weights that are no longer there
    add_json(Path(args.output_dir, "metrics.json"), metrics, anew, run_name=args.run_name)
    folders = dict.fromkeys([str(final_folder(config)), str(Path(args.output_dir)), args.merged_output_dir])
    lines = shown_metrics(metrics) | {"files": ", ".join(filter(None, folders))}
    log.info("Done after %s\n%s", timedelta(seconds=round(seconds)), format_table(lines))
    if trained:
        log.info("Next\n%s", format_table(next_commands(config)))


def next_commands(config: Config) -> dict[str, str]:
    """What to do with a finished run, as commands."""
    flags, final = config.flags, str(final_folder(config))
    kept = ("output_dir", "working_dir", "final_output_dir", "trust_remote_code")  # which run.json does not repeat
    off = dict.fromkeys(("do_train", "do_eval", "do_mmlu_eval", "load_best_model_at_end"), "False")
    off |= {"eval_strategy": "no", "lr_scheduler_type": "constant"}  # one of its schedules needs evaluations
    off |= dict.fromkeys(("adapter_name_or_path", "deepspeed", "fsdp"), "")  # the run's own adapter, in one process
    again = ["python", "qlora.py", str(Path(config.training.output_dir, "run.json"))]
    again += [f"--{name}={value}" for name, value in off.items() if flags[name] and flags[name] != value]
    again += [f"--{name}={flags[name]}" for name in kept if flags[name]]
    merge = [*again, "--do_predict=False", f"--merged_output_dir={final}-merged"]
    predict = ["--do_predict"] if config.masked else ["--do_predict", "--predict_with_generate"]
    found = {
        "chat": [] if config.masked else ["python", "examples/chat.py", final],
        "predict": [*again, *predict, "--eval_dataset" if flags["eval_dataset"] else "--dataset", "FILE"],
        "merge": [] if config.quant.full_finetune or flags["merged_output_dir"] else merge,
    }
    return {name: shlex.join(words) for name, words in found.items() if words}


# ------------------------------------------------------------------------------------
# 18. Main: one run, from the command line to files
# ------------------------------------------------------------------------------------
def print_preview(rows: Iterable[tuple[str, Spans]], statistics: Mapping[str, TokenStatistics], config: Config) -> None:
    """Print the rows, then the statistics of each split. Supervised text is green in a terminal, else in brackets."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    encoding = sys.stdout.encoding or "utf-8"
    on, off = ("\x1b[32m", "\x1b[39m") if coloured else "⟪⟫"
    lines = [f"{on}supervised{off}, ↵ end of a line"]
    for title, spans in rows:
        lines += ["", title, "".join(f"{on}{text}{off}" if supervised else text for text, supervised in spans)]
    lines += ["", *(f"{name} rows: {part}" for name, part in statistics.items())]
    text = "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`; nothing may be left for Python to write when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_run(config: Config) -> tuple[Run, Data]:
    """Read everything but weights: resume point, model config, tokenizer, rows; the same on all ranks."""
    config = without_start(config)
    resume = ResumePoint(train=True) if config.data.preview else find_resume_point(config)
    check_merge(resume, config)
    check_ranks_agree(config.flags | {"checkpoint": resume.checkpoint})
    with local_main_process_first():  # converts a .gguf file
        folder = model_folder(config)
    model_config = load_model_config(config, folder)
    config = resolve_recipe(resolve_objective(config, model_config), model_config)
    auto_model(config, model_config)  # refuses other kinds of models before the dataset is read
    tokenizer = load_tokenizer(config, model_config, folder)
    record = (run_record(resume.found) if resume.found else {}) or config.record
    tokenizer.template_date = date.fromisoformat(record.get("derived", {}).get("template date") or str(date.today()))
    if config.training.do_predict and not config.masked:
        generation_config(config, None, tokenizer)  # a wrong flag shows now and not after training
    with local_main_process_first():  # encodes the dataset
        text = load_splits(config, tokenizer)
        encoded = encode_splits(text, tokenizer, config, positions := positions_of(model_config))
    rows, statistics = pack_and_summarize(encoded, config, positions)
    check_ranks_agree({f"the encoded {name} rows": part.fingerprint for name, part in statistics.items()})
    base = folder
    args = config.training
    used = args.do_train or args.do_eval or args.do_predict or args.merge_base == "dequantized"
    if config.quant.calibration_rows and not config.data.preview and used:
        with local_main_process_first():
            recorded = read_record(resume.found).get("run", {}) if resume.found else {}
            known = str(recorded.get("calibrated base", "")).partition(" ")[0]
            if recorded and not known:
                raise ConfigError(f"{resume.found} was trained without --calibration_rows: leave it out")
            base = calibrated_base(config, model_config, folder, rows, known)
    return Run(config, folder, base, model_config, tokenizer, resume), Data(rows, encoded.eval, text, statistics)


def prepare(run: Run, data: Data, identity: dict[str, Any], questions: Any, stop: GracefulStop) -> QLoRATrainer:
    """Load the model, put adapters and the fast path on it, plan its steps, and build the trainer."""
    config, resume, tokenizer = run.config, run.resume, run.tokenizer
    trained = resume.weights if config.quant.full_finetune else None
    model_config = run.model_config if run.base == run.folder else load_model_config(config, run.base)
    base: Any = load_model(config, model_config, trained or run.base)
    sync_special_tokens(base, tokenizer)
    forget_longest_row(base)
    missing = None
    if config.training.fast_path and not config.training.use_cpu:
        fuse_norms(base)
        missing = fuse_rotary(base)
    model = make_trainable(base, config, resume.weights, adapter_start_file(config, run.base), tokenizer)
    sizes = model_sizes(base)
    for name, part in data.statistics.items():
        check_sizes(name, part.largest_id, part.longest, sizes)
    log.info("Model\n%s", "\n".join(f"  {line}" for line in parameter_report(model)))
    fast = enable_fast_path(model, base, config)
    fast = fast._replace(off=(*fast.off, *filter(None, [missing])))
    plan, lines = choose_step_plan(memory_from_config(config, run.model_config), model, base, fast, data.train, config)
    apply_step_plan(base, plan, config)
    model.train()  # peft's wrapper says that it trains while the model inside, as loaded, does not
    log.info("Step plan\n%s", format_table(fast.lines() | ({"steps": str(plan), **lines} if resume.train else {})))
    masking = build_masking(tokenizer, sizes[0], config.data) if config.masked else None
    rows = data.train
    if isinstance(stream := data.text.train, RowSource):
        rows = StreamedSteps(stream, tokenizer, config, identity["effective batch"]["rows"], sizes)
    with reraise_as_user_error("flags", RuntimeError):
        trainer = QLoRATrainer(
            config=config, fast=fast, plan=plan, identity=identity, questions=questions, masking=masking, model=model,
            args=trainer_arguments(config.training), train_dataset=rows, eval_dataset=data.eval,
            data_collator=partial(collate_step, masked=config.masked), processing_class=tokenizer,
            callbacks=build_callbacks(stop, config),
        )  # fmt: skip
        if resume.train and not is_sharded(config):  # engines make their own
            trainer.create_optimizer_and_scheduler(max(config.training.max_steps, 1))  # shows wrong flags now
            if plan.resident:  # pages that stay on the GPU need no prefetching: 22 of 33 ms of updates at 7B
                trainer.optimizer.prefetch_state = lambda parameter: None  # type: ignore[union-attr]
    if is_sharded(config) and not resume.train:  # an engine shards a model beside its optimizer only
        trainer._prepare_for_training(1, None, None)
    return trainer


def check_resume(run: Run, data: Data) -> tuple[Run, dict[str, Any]]:
    """Check that an earlier run found here is this one. Returns it with the flags that trained, and its identity."""
    config, resume, args = run.config, run.resume, run.config.training
    identity = run_fingerprint(config, data.statistics)
    if DATASET in identity and isinstance(stream := data.text.train, RowSource):  # the statistics are of its first rows
        identity[STREAM_SIZES] = [file.stat().st_size for file in stream.files]
    if run.base != run.folder:
        content = digest(*(file_digest(file) for file in sorted(Path(run.base).glob("*.safetensors"))))
        start = "calibrated" if adapter_start_file(config, run.base) else config.lora.init_lora_weights
        identity |= {"calibrated base": f"{Path(run.base).name} {content}", "adapter start": start}
    identity["effective batch"] = batch = effective_batch(resume.checkpoint, args)
    if resume.found:
        earlier = check_same_run(resume.found, identity, resume.train and not resume.trained, config)
        if resume.trained:
            identity["flags"] |= earlier
            identity["effective batch"] = read_record(resume.found).get("run", {}).get("effective batch", batch)
            run = run._replace(config=dataclasses.replace(config, flags=config.flags | earlier))
    rows = len(data.train or ())
    if resume.train and args.dataloader_drop_last and not config.data.streaming and rows < batch["rows"]:
        raise ConfigError(f"--dataloader_drop_last: {rows} rows make no step of {batch['rows']}: nothing to train")
    return run, identity


def plan_of_rows(config: Config) -> dict[str, str]:
    """Rows, steps and time of the run that is planned, if its rows can be read."""
    reading = dataclasses.replace(config, data=dataclasses.replace(config.data, preview=1))  # refuses no folder
    try:
        run, data = load_run(reading)
    except ConfigError as error:
        return {"rows": f"not read: {error}"}
    train, part = config.training, data.statistics["train"]
    epoch = max(1, steps_per_epoch(len(data.train), effective_batch(None, train)["rows"], train))
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * epoch)
    lines = {"rows": f"{part.rows:,} of {part.tokens / part.rows:.0f} tokens on average"}
    lines["steps"] = f"{steps:,}, which is {rounded(steps / epoch)} epochs"
    assumed = 1.2e14  # tokens/s times parameters: 17,800 at 7B on one H200 in bf16, on rows of many lengths
    model = meta_model(config, run.model_config)
    if not stacked_experts(model):  # a token meets a few experts only
        rate = train.world_size * assumed / model.num_parameters()
        duration = timedelta(seconds=round(steps / epoch * part.tokens / rate))
        lines["time"] = f"{duration} at {rate:,.0f} tokens/s (assumed, as on an H200 with --bf16)"
    return lines


def run(config: Config, stop: GracefulStop, show: Callable[..., None] = print_preview) -> int:
    """Do one run, from checked flags to files, or show --plan or --preview. Returns the exit status."""
    args, began = config.training, time.perf_counter()
    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
    log_hints(config)
    if args.plan:
        model_config = load_model_config(config, model_folder(config))
        config = resolve_recipe(resolve_objective(config, model_config), model_config)
        memory = memory_from_config(config, model_config)
        lines, fits = plan_from_flags(config, memory)
        if not fits:
            lines["would fit with"] = changes_that_fit(config, model_config, memory)
        if "dataset" in config.explicitly_set and args.do_train and not config.data.streaming:
            lines |= plan_of_rows(config)
        if args.process_index == 0:
            print(format_table(lines))
        return 0 if fits else 3
    check_folders(config)
    if config.data.preview:
        this, data = load_run(config)
        rows = data.eval if data.train is None else data.train
        if args.process_index == 0:
            show(preview_rows(rows, this.tokenizer, this.config), data.statistics, this.config)
        return 0
    with contextlib.ExitStack() as locks:
        if args.process_index == 0:
            merging = [merging_folder(config)] if args.merged_output_dir else []
            for folder in {Path(args.output_dir).resolve(), final_folder(config).resolve(), *merging}:
                locks.enter_context(lock_folder(folder))
        return run_stages(*load_run(config), stop, began)


def run_stages(run: Run, data: Data, stop: GracefulStop, began: float) -> int:
    """Train, evaluate, predict and merge, as the flags say. Returns the exit status."""
    run, identity = check_resume(run, data)
    config, resume, args, output = run.config, run.resume, run.config.training, Path(run.config.training.output_dir)
    questions = load_questions(config) if config.mmlu.do_mmlu_eval else None
    record = describe_run(run, data, identity)
    metrics: dict[str, Any] = {}
    weights = final_folder(config) if resume.train else resume.weights
    if resume.train or args.do_eval or args.do_predict:
        trainer = prepare(run, data, identity, questions, stop)
        if args.should_save and ((resume.train and not resume.trained) or not (output / "run.json").is_file()):
            write_json(output / "run.json", record)
        log.info("ready after %.0f s", time.perf_counter() - began)
        if resume.train:
            metrics |= train(trainer, resume, stop)
            if number := max(all_gather_object(stop.received)):
                name, step = signal.Signals(number).name, trainer.state.global_step
                log.warning("stopped by %s at step %d, saved; %s", name, step, way_to_go_on(config, stop))
                return STOP_SIGNALS[name]
        if args.do_eval or args.do_predict:
            level = logging.INFO if weights else logging.WARNING
            log.log(level, "evaluating %s", weights or f"the base model alone: nothing trained is in {output}")
        if args.do_eval:
            step, evaluated = trainer.evaluated
            at_end = step == trainer.state.global_step and not args.load_best_model_at_end
            metrics |= save_metrics(trainer, "eval", evaluated if at_end else trainer.evaluate())
        if args.do_predict:
            metrics |= predict(trainer, data.text.eval)
        del trainer  # memory for a merged model
    metrics |= merge(str(weights), run, data)
    if args.process_index == 0:
        report_done(config, metrics, resume.train, time.perf_counter() - began)
    return 0


def way_to_go_on(config: Config | None, stop: GracefulStop) -> str:
    """Name the command that goes on from what this run has saved."""
    flags = [f"--{n}" for n in ("overwrite_output_dir", "resume_from_checkpoint") if config and config.flags[n]]
    without = f" without {flags[0]}" if flags and stop.saved else ""
    output = Path(config.training.output_dir if config else "")
    saved = config and (checkpoints_in(output) or (output / COMPLETED).is_file()) and (without or not flags)
    return f"the same command{without} {'goes on from what is saved' if saved else 'starts again'}"


def exit_status(error: BaseException, way: str = "") -> tuple[int, str] | None:
    """Return the exit status and message of what a user can fix; None for our bugs."""
    match error:
        case ConfigError():
            return 2, str(error)
        case KeyboardInterrupt():
            name = signal.Signals(error.args[0] if error.args else signal.SIGINT).name
            return STOP_SIGNALS[name], f"interrupted by {name}; {way}"
        case torch.OutOfMemoryError():
            return 2, "not enough GPU memory: lower --per_device_train_batch_size, --source_max_len or --target_max_len"
        case _ if is_peer_failure(error):
            return 2, f"another rank of this run has exited; {way}"
        case ValueError() if "DebugUnderflowOverflow" in str(error):
            return 2, "--debug underflow_overflow: a value is not finite, the modules that lead to it are listed above"
        case OSError() if error.errno:  # of a disk, a path or a connection
            places = f"a file, in --output_dir, --cache_dir or {tempfile.gettempdir()}"
            return 2, f"{error.filename or places}: {error.strerror}"
        case _ if (library := type(error).__module__.partition(".")[0]) in INTEGRATION_TO_CALLBACK:
            return 2, f"--report_to {library}: {shorten(error)}"  # a tracker without login or connection
    return None


def set_up_logging() -> None:
    """Log INFO to standard error on rank 0, only errors elsewhere."""
    for message in (  # warnings of one library about another's code: nothing that a user could do about it
        ".*gradient_checkpointing.* is deprecated", "All adapters are already merged", "Could not find a config file",
        "Setting `save_embedding_layers` to `True`", "This DataLoader will create",
        "Model has `tie_word_embeddings=True` and", "Input and output embeddings are no longer tied after merging",
        "FSDP2-wrapped module .* returned a view", "Paged optimizers are not supported on CPU",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message)
    noise = {"DeepSpeed": "Setting accelerator to CPU", "transformers.trainer": "The best checkpoint"}
    for name in noise:
        logging.getLogger(name).addFilter(lambda record: noise[record.name] not in str(record.msg))
    if not sys.stderr.isatty():  # bars in a file are noise
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    if not log.handlers:
        stream = types.SimpleNamespace(write=lambda text: tqdm.write(text, sys.stderr, end=""))  # above progress bars
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def main(argv: Sequence[str] | None = None, action: Callable[[Config, GracefulStop], int] = run) -> int:
    """Run the command line. Returns the exit status: 0 done, 2 fix something, 3 does not fit, else STOP_SIGNALS'."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    debug = any(re.match("--debug(=|$)", token) for token in argv)
    stop, config = GracefulStop(), None
    try:
        with stop.handling_signals():
            config = parse_config(argv)
            status = action(config, stop)
            shutdown_distributed()
            return status
    except (Exception, KeyboardInterrupt) as error:
        known = exit_status(error, way_to_go_on(config, stop))
        if known is None:
            raise
        if debug or (config and "debug" in config.explicitly_set):
            traceback.print_exc()
        rank, ranks = rank_and_world_size()
        if ranks > 1 or os.environ.get("LOCAL_RANK", "0") == "0":  # before they connect, all ranks meet the same error
            message = escape_control_chars(HUB_TOKEN.sub("(a token)", known[1]))
            prefix = "error: " if known[0] and not is_peer_failure(error) else ""  # the other rank says why
            tqdm.write(f"{f'rank {rank}: ' * (rank > 0)}{prefix}{message}", sys.stderr)  # not behind a progress bar
        return known[0]


if __name__ == "__main__":
    sys.exit(main())
