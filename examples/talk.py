"""What generate.py, chat.py and chat_gradio.py share: load a model, write its prompt, stream its answer."""

import argparse
import contextlib
import copy
import dataclasses
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
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
} - {"adapter_name_or_path", "full_finetune", "chat_template", "tokenizer_patch"}


def encode(messages: Sequence[Message], tokenizer: Any, template: str) -> list[int]:
    """The token ids of a conversation, as in training. Special tokens that a user types remain text."""
    if template != "chat":
        text = "".join(TEMPLATES[template][turn["role"]].format(turn["content"]) for turn in messages)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # its text contains special tokens and is tokenised with them, so those that a user typed are escaped
    escaped = qlora.escape_special_tokens([*messages], qlora.special_token_pattern(tokenizer))
    with qlora.reraise_as_user_error("the model's chat template", jinja2.TemplateError):
        text = tokenizer.apply_chat_template(escaped, tokenize=False, add_generation_prompt=True)
    ((tokens,),) = qlora.tokenize_rendered([[{"text": text, "supervised": False}]], tokenizer)
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


class Bot(NamedTuple):
    """A loaded model and how to talk to it."""

    model: Any
    tokenizer: Any
    config: qlora.Config
    generation: GenerationConfig
    template: str
    system: str

    def with_settings(self, system: str, temperature: float, max_new_tokens: int) -> "Bot":
        """The same model with other settings. Temperature 0 takes the likeliest token."""
        generation, length = copy.deepcopy(self.generation), int(max_new_tokens)
        generation.update(do_sample=temperature > 0, temperature=float(temperature) or 1.0, max_new_tokens=length)
        return self._replace(system=system, generation=generation)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, without its oldest exchanges if the model cannot read all of it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        # with --rope_scaling the model reads more than it was trained on
        positions = math.inf if self.config.model.rope_scaling else qlora.positions_of(self.model.config)
        new = self.generation.max_new_tokens or 0
        while len(ids := encode([*system, *messages], self.tokenizer, self.template)) > positions - new:
            if len(messages) < 3:
                raise qlora.ConfigError(
                    f"the prompt has {len(ids)} tokens and the model reads {positions}, {new} of which are reserved "
                    "for the answer: shorten the prompt, or lower --max_new_tokens"
                )
            messages = messages[2:]
        return ids or [self.tokenizer.eos_token_id]

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer in pieces, as they are generated. Closing the iterator stops the model."""
        ids = torch.tensor([self.prompt(messages)], device=self.model.get_input_embeddings().weight.device)
        closed, dtype = threading.Event(), qlora.compute_dtype(self.config)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate = torch.autocast(ids.device.type, dtype, enabled=dtype is not torch.float32)(self.model.generate)
        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(
                generate, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.generation,
                tokenizer=self.tokenizer, streamer=streamer,
                stopping_criteria=[lambda ids, _: torch.full(ids.shape[:1], closed.is_set(), device=ids.device)],
            )  # fmt: skip
            generation.add_done_callback(lambda _: streamer.end())  # without it the loop would wait after an error
            started = self.template == "plain"  # a plain text continues the prompt, whitespace included
            try:
                for piece in until_stop(streamer, tuple(self.generation.stop_strings or ())):
                    if started or (piece := piece.lstrip()):
                        started = True
                        yield piece
            finally:
                closed.set()
            with qlora.reraise_as_user_error("generation flags"):
                generation.result()


def find_adapter(folder: Path) -> Path | None:
    """A run's adapter, or that of its last checkpoint if the run was interrupted; None for a model."""
    adapter = qlora.weights_in(folder)
    if adapter or not folder.is_dir() or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        return adapter
    last = qlora.find_last_checkpoint(folder)
    if last is None or (adapter := qlora.weights_in(last)) is None:
        raise qlora.ConfigError(f"{folder}: neither a trained adapter nor a model in this folder")
    return adapter


def find_record(folder: Path, adapter: Path | None) -> dict[str, Any]:
    """run.json of the run that wrote this folder or one of its checkpoints; empty if no run did."""
    # with --working_dir, run.json is elsewhere and the model card says where
    cards = "".join(card.read_text(encoding="utf-8", errors="replace") for card in folder.glob("*.md"))
    named = re.findall(r"are in `(.+)/run\.json`", cards)
    for place in (folder, *(folder / path for path in named), folder.parent):
        if (place / "run.json").is_file():
            record = qlora.read_json(place / "run.json")
            if adapter or record.get("flags", {}).get("full_finetune"):  # a merged model may be inside its run's folder
                return record
    return {}


def loading_flags(name: str, adapter: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """The flags of qlora.py that load MODEL as the run had it."""
    flags = {key: value for key, value in record.get("flags", {}).items() if key in KEPT_FLAGS and value is not None}
    if adapter is None:
        flags = {"bits": 16} | flags | {"model_name_or_path": name}
    elif not record:
        flags = {"model_name_or_path": qlora.read_json(adapter / "adapter_config.json")["base_model_name_or_path"]}
    if not torch.cuda.is_available():
        return flags | {"bf16": False, "fp16": False}  # float32 is faster on a CPU
    return flags if record else flags | {"bf16": torch.cuda.is_bf16_supported()}


def trained_template(record: dict[str, Any]) -> str:
    """The template that writes prompts as the rows of a run had them."""
    formats = [name for part in record.get("data", {}).values() for name in part.get("formats", ())]
    if not formats or formats[0] not in qlora.FORMATS:  # a function of the user's own wrote the rows
        qlora.log.warning("how the rows that it was trained on were written is not known: see --template")
        return "chat"
    return "chat" if record.get("flags", {}).get("as_chat") else FORMAT_TEMPLATES.get(formats[0], "plain")


def load(name: str, *flags: str, template: str = "auto", system: str | None = None, stop: Sequence[str] = ()) -> Bot:
    """Load MODEL. `flags` are qlora.py's and override the run's; `stop` are more strings that end an answer."""
    folder = Path(name).expanduser()
    if folder.is_file() and folder.suffix != ".gguf":
        raise qlora.ConfigError(f"{name} is a file: pass its folder, {folder.parent}")
    adapter = find_adapter(folder)
    record = find_record(folder, adapter)
    config = qlora.parse_config([f"--{k}={v}" for k, v in loading_flags(name, adapter, record).items()] + [*flags])
    if config.masked:
        raise qlora.ConfigError(f"{name}: a masked language model, which fills masks but does not answer")
    if (folder / qlora.MERGED).is_file() and template == "auto":
        qlora.log.warning("how the rows that it was trained on were written is not known: see --template")
    base = qlora.model_folder(config)
    model_config = qlora.load_model_config(config, base)
    own_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = qlora.load_tokenizer(config, model_config, str(adapter) if own_tokenizer else base)
    if template == "auto":
        template = trained_template(record) if record else "chat"
        if template == "chat" and not tokenizer.chat_template:
            template = "plain" if record else "guanaco"
        qlora.log.info("--template %s", template)
    if template == "chat" and not tokenizer.chat_template:
        raise qlora.ConfigError(f"{name} has no chat template: pass --template guanaco or plain")
    model: Any = qlora.load_model(config, model_config, base)
    generation = qlora.generation_config(config, model, tokenizer)
    generation.stop_strings = [*STOPS.get(template, []), *filter(None, stop)] or None
    model.generation_config = GenerationConfig()  # generate() would add the model's own sampling values
    model = (qlora.attach_adapter(model, str(adapter)) if adapter else model).eval()
    torch.manual_seed(config.training.seed)  # with --do_sample, one --seed gives one conversation
    system = SYSTEMS.get(template, "") if system is None else system
    return Bot(model, tokenizer, config, generation, template, system)


def make_parser(script: str, template: str) -> argparse.ArgumentParser:
    """MODEL and the flags that the scripts share; all other flags are qlora.py's."""
    parser = argparse.ArgumentParser(
        description=script,
        epilog="Flags of qlora.py may follow: --bits 4, --max_new_tokens 64, --do_sample --temperature 0.7.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run = "folder of a run or checkpoint, whose adapter is loaded onto the base it was trained on, at the run's --bits"
    model = "or a base or merged model: folder, hub id or .gguf file, in 16 bit unless --bits is passed"
    parser.add_argument("model", metavar="MODEL", help=f"{run}; {model}")
    parser.add_argument("--template", choices=["auto", *TEMPLATES], default=template, help="default: %(default)s")
    parser.add_argument("--system", help="system message before the conversation")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The script's own options, and in `flags` those for qlora.py."""
    options, flags = parser.parse_known_args(argv)
    options.flags = flags
    return options


def load_from(options: argparse.Namespace) -> Bot:
    """The model that a command line asks for."""
    return load(options.model, *options.flags, template=options.template, system=options.system, stop=options.stop)


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
