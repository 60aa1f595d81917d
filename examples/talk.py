"""What generate.py, chat.py and chat_gradio.py share: load a model, write its prompt, stream its answer."""

import argparse
import contextlib
import dataclasses
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # qlora.py is a script, not an installed package
import qlora

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}
TEMPLATES = {  # how a conversation is written: the text around each message, by its role
    "plain": {"user": "{}", "assistant": "{}", "system": "{}"},
    "chat": {},  # by the tokenizer's own chat template
    # the prompt ends before the space, which belongs to the answer's first token
    "guanaco": {"user": "### Human: {}### Assistant:", "assistant": " {}", "system": "{} "},
    "alpaca": {"user": "### Instruction:\n{}\n\n### Response: ", "assistant": "{}\n\n", "system": "{}\n\n"},
    "airoboros": {"user": "USER: {}\nASSISTANT: ", "assistant": "{}\n", "system": "{}\n"},
}
STOPS = {"guanaco": ["### Human:", "### Assistant:"], "alpaca": ["### Instruction:"], "airoboros": ["USER:"]}
SYSTEMS = {  # the system message if none is passed
    "guanaco": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "airoboros": "A chat.",
}
# The template that writes a prompt as the rows of a format were; rows of the formats that are not here are plain.
FORMAT_TEMPLATES = {"messages": "chat", "sharegpt": "chat", "airoboros_chat": "chat", "oasst1": "guanaco"}
FORMAT_TEMPLATES |= {"alpaca": "alpaca", "alpaca-clean": "alpaca", "airoboros": "airoboros"}
# The flags of a run that say how to load its model. The saved tokenizer includes its chat template and patch.
KEPT_FLAGS = {"bf16", "fp16", "objective"} | {
    field.name for group in (qlora.ModelArguments, qlora.QuantisationArguments) for field in dataclasses.fields(group)
} - {"adapter_name_or_path", "full_finetune", "calibration_rows", "chat_template", "tokenizer_patch", "padding_side"}


def encode(messages: Sequence[Message], tokenizer: Any, template: str) -> list[int]:
    """The token ids of a conversation, as in training. Special tokens that a user types remain text."""
    if template == "chat":
        # a template writes special tokens, which are parsed, so those that a user typed are escaped
        escaped = qlora.escape_special_tokens([*messages], qlora.special_token_pattern(tokenizer))
        with qlora.reraise_as_user_error("the model's chat template"):
            text = tokenizer.apply_chat_template(escaped, tokenize=False, add_generation_prompt=True)
        ((tokens,),) = qlora.tokenize_rendered([[{"text": text, "supervised": False}]], tokenizer)
    else:
        text = "".join(TEMPLATES[template][turn["role"]].format(turn["content"]) for turn in messages)
        (((*tokens, _),),) = qlora.tokenize_segments([[{"text": text, "supervised": False}]], tokenizer)  # without EOS
    return [token_id for token_id, _ in tokens]


def until_stop(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The stream up to the first stop string. Text that may be the beginning of one is held back."""
    text = ""
    for piece in pieces:
        text += piece
        begins = (i for i in range(len(text)) if any(text.startswith(s, i) or s.startswith(text[i:]) for s in stops))
        end = next(begins, len(text))
        yield text[:end]
        text = text[end:]
        if text.startswith(stops):
            return
    yield text


def find_record(folder: Path, adapter: Path | None) -> dict[str, Any]:
    """run.json of the run that wrote this folder or one of its checkpoints; empty if no run did."""
    # with --working_dir, run.json is elsewhere and the model card says where
    cards = "".join(card.read_text(encoding="utf-8", errors="replace") for card in folder.glob("*.md"))
    places = [folder, *(folder / path for path in re.findall(r"are in `(.+)/run\.json`", cards))]
    records = filter(None, map(qlora.run_record, places))
    # a merged model may be inside its run's folder
    return next((record for record in records if adapter or record["flags"].get("full_finetune")), {})


def loading_flags(folder: Path, adapter: Path | None, record: dict[str, Any]) -> list[str]:
    """The flags of qlora.py that load MODEL as the run had it."""
    gpu = torch.cuda.is_available()
    flags: dict[str, Any] = {"bits": 4 if adapter else 16, "bf16": gpu and torch.cuda.is_bf16_supported()}
    flags |= {key: value for key, value in record.get("flags", {}).items() if key in KEPT_FLAGS and value is not None}
    if adapter is None:
        flags["model_name_or_path"] = folder
    else:
        flags["adapter_name_or_path"] = adapter  # refused if it fits the calibrated base of an unfinished run only
        if record.get("flags", {}).get("calibration_rows"):
            flags["bits"] = 16  # its adapter fits the published base, and not that base rounded to 4 bit
        if not record:
            flags["model_name_or_path"] = qlora.read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    if not gpu:
        flags |= {"bf16": False, "fp16": False}  # float32 is faster on a CPU
    return [f"--{key}={value}" for key, value in flags.items()]


def choose_template(record: dict[str, Any], tokenizer: Any) -> str:
    """The template that writes prompts as the rows of a run had them, or as chats where that is not known."""
    parts = record.get("data", {}).values()
    formats = [name for part in parts for name in part.get("formats", ())]
    if formats and formats[0] in qlora.FORMATS:
        # preferences may be chats too
        pairs = formats[0] in ("hh-rlhf", "self-instruct")
        chats = record["flags"].get("as_chat") or (pairs and any(part.get("chats") for part in parts))
        template = "chat" if chats else FORMAT_TEMPLATES.get(formats[0], "plain")
        qlora.log.info("--template %s, as rows of the format %s", template, formats[0])
        if formats[0] == "airoboros_chat" and "[INST]" not in str(tokenizer.chat_template):
            qlora.log.warning("its rows were LLaMA-2's chats, which the model's chat template does not write")
    else:  # a base or merged model, or a function of the user's own wrote the rows
        template = "chat" if tokenizer.chat_template else "plain" if record else "guanaco"
        qlora.log.info("--template %s: how rows that it was trained on were written is not known", template)
    return template


class Bot:
    """A loaded model and how to talk to it.

    Flags are qlora.py's and override those of the run; `stop` are more strings that end an answer.
    """

    def __init__(
        self, name: str, *flags: str, template: str = "auto", system: str | None = None, stop: Sequence[str] = ()
    ) -> None:
        folder = Path(name).expanduser()
        if folder.is_file() and folder.suffix != ".gguf":
            raise qlora.ConfigError(f"{name} is a file: pass its folder, {folder.parent}")
        if not (qlora.weights_in(folder) or (folder / "config.json").is_file()):
            folder = qlora.find_last_checkpoint(folder) or folder  # of an interrupted run
        adapter = qlora.weights_in(folder)
        record = find_record(folder, adapter)
        self.config = config = qlora.parse_config([*loading_flags(folder, adapter, record), *flags])
        if config.model.adapter_name_or_path not in (None, str(adapter)):
            raise qlora.ConfigError("--adapter_name_or_path: pass the adapter's folder as MODEL")
        if (ignored := config.explicitly_set & qlora.SAMPLING_FLAGS) and not config.generation.do_sample:
            qlora.log.warning("%s: without effect, nothing is sampled without --do_sample", ", ".join(sorted(ignored)))
        if config.masked:
            raise qlora.ConfigError(f"{name}: a masked language model, which fills masks but does not answer")
        base = qlora.model_folder(config)
        model_config = qlora.load_model_config(config, base)
        saved = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base
        self.tokenizer: Any = qlora.load_tokenizer(config, model_config, str(saved))
        template = choose_template(record, self.tokenizer) if template == "auto" else template
        if template == "chat" and not self.tokenizer.chat_template:
            raise qlora.ConfigError(f"{name} has no chat template: pass --template guanaco or plain")
        self.template, self.system = template, SYSTEMS.get(template, "") if system is None else system
        model: Any = qlora.load_model(config, model_config, base)
        self.generation = qlora.generation_config(config, model, self.tokenizer)
        self.generation.stop_strings = [*STOPS.get(template, []), *filter(None, stop)] or None
        model.generation_config = GenerationConfig()  # generate() would add the model's own sampling values
        self.model = (qlora.attach_adapter(model, str(adapter)) if adapter else model).eval()
        torch.manual_seed(config.training.seed)  # with --do_sample, one --seed gives one conversation

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, without its oldest exchanges if the model cannot read all of it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        # with --rope_scaling the model reads more than it was trained on
        positions = math.inf if self.config.model.rope_scaling else qlora.positions_of(self.model.config)
        new = self.generation.max_new_tokens or 0
        while len(ids := encode([*system, *messages], self.tokenizer, self.template)) > positions - new:
            if len(messages) < 3:
                found = f"the prompt has {len(ids)} tokens, the answer up to {new}, and the model reads {positions}"
                raise qlora.ConfigError(f"{found}: shorten the prompt, or lower --max_new_tokens")
            messages = messages[2:]
        return ids or [self.tokenizer.eos_token_id]

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer in pieces, as they are generated. Closing the iterator stops the model."""
        ids = torch.tensor([self.prompt(messages)], device=self.model.get_input_embeddings().weight.device)
        closed, dtype = threading.Event(), qlora.compute_dtype(self.config)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate = torch.autocast(ids.device.type, dtype, enabled=dtype is not torch.float32)(self.model.generate)
        with ThreadPoolExecutor(1) as pool, qlora.reraise_as_user_error("generation flags"):
            generation = pool.submit(
                generate, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.generation,
                tokenizer=self.tokenizer, streamer=streamer, stopping_criteria=[lambda *_: closed.is_set()],
            )  # fmt: skip
            generation.add_done_callback(lambda _: streamer.end())  # or the stream would not end after an error
            try:
                started = self.template == "plain"  # a plain text goes on from the prompt, with its white space
                for piece in until_stop(streamer, tuple(self.generation.stop_strings or ())):
                    if started or (piece := piece.lstrip()):
                        started = True
                        yield piece
            finally:
                closed.set()
            generation.result()


def make_parser(script: str, template: str) -> argparse.ArgumentParser:
    """MODEL and the flags that the scripts share; all other flags are qlora.py's."""
    more = "Flags of qlora.py may follow: --bits 4, --max_new_tokens 64, --do_sample --temperature 0.7."
    parser = argparse.ArgumentParser(description=script, epilog=more, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    run = "folder of a run or checkpoint, whose adapter is loaded onto the base it was trained on, at the run's --bits"
    model = "or a base or merged model: folder, hub id or .gguf file, in 16 bit unless --bits is passed"
    parser.add_argument("model", metavar="MODEL", help=f"{run}; {model}")
    parser.add_argument("--template", choices=["auto", *TEMPLATES], default=template, help="default: %(default)s")
    parser.add_argument("--system", help="system message before the conversation")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    return parser


def load_from(options: argparse.Namespace, flags: Sequence[str]) -> Bot:
    """The model that a command line asks for."""
    return Bot(options.model, *flags, template=options.template, system=options.system, stop=options.stop)


def run(body: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """A script's exit status: 0, or 2 after one line that says what is wrong."""
    qlora.set_up_logging()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is a way to leave
            body(argv)
    except (qlora.ConfigError, OSError, torch.OutOfMemoryError) as error:
        no_memory = isinstance(error, torch.OutOfMemoryError)
        print(f"error: {'not enough GPU memory: try --bits 4' if no_memory else error}", file=sys.stderr)
        return 2
    return 0
