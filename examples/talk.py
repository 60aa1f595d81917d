"""What generate.py, chat.py and chat_gradio.py share: loading a model, writing its prompt, streaming its answer.

MODEL is the folder of a run (or a checkpoint of it), whose adapter goes on the base it was trained on, in the same
bits; or a base model or a merged one: a folder, a hub id or a .gguf file, held in 16 bit unless --bits says otherwise.
"""

import argparse
import contextlib
import dataclasses
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # qlora.py is run where it lies, not installed
import qlora

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}


# ------------------------------------------------------------------------------------
# Prompts: messages -> token ids. To add a form: one function, one row in FORMS.
# ------------------------------------------------------------------------------------
def input_ids(text: str, tokenizer: Any) -> list[int]:
    """A text as `input` is trained: BOS and its tokens."""
    row = {"segments": [qlora.prompt_completion(text, "")], "rendered": [False]}
    return qlora.prompt_ids(row, tokenizer, qlora.Limits(source=sys.maxsize, target=0))[0]


def plain_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """The text as it stands."""
    return input_ids("".join(message["content"] for message in messages), tokenizer)


GUANACO_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GUANACO_MARKS = {"system": "", "user": "### Human: ", "assistant": "### Assistant: "}


def guanaco_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """As the rows of oasst1 are written. It ends before the space: that belongs to the answer's first token."""
    turns = [GUANACO_MARKS[message["role"]] + message["content"] for message in messages]
    if messages[0]["role"] == "system":
        turns[0] += " "
    return input_ids("".join(turns) + "### Assistant:", tokenizer)


def template_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Through the model's own chat template, which writes BOS and the marks of the turns itself; as in training."""
    typed = qlora.escape_special_tokens(list(messages), qlora.special_token_pattern(tokenizer))
    with qlora.reraise_as_user_error("the model's chat template", qlora.ConfigError, jinja2.TemplateError):
        text = tokenizer.apply_chat_template(typed, tokenize=False, add_generation_prompt=True)
    ((tokens,),) = qlora.tokenize_rendered([[{"text": text, "supervised": False}]], tokenizer)
    return [number for number, _ in tokens]


class Form(NamedTuple):
    """How a conversation is written for the model."""

    ids: Callable[[Sequence[Message], Any], list[int]]
    system: str = ""  # where --system is not given
    stops: tuple[str, ...] = ()  # where an answer ends, besides the model's own stop tokens


FORMS = {
    "plain": Form(plain_ids),
    "chat": Form(template_ids),
    "guanaco": Form(guanaco_ids, GUANACO_SYSTEM, ("### Human:", "### Assistant:")),
}


# ------------------------------------------------------------------------------------
# Loading: MODEL and flags -> Bot
# ------------------------------------------------------------------------------------
class Bot(NamedTuple):
    """A model to talk to."""

    model: Any
    tokenizer: Any
    config: qlora.Config
    form: Form
    system: str
    stops: tuple[str, ...]

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer, piece by piece as it is generated. To close the iterator is to stop the model."""
        ids = self.prompt(messages)
        stop = threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(generate, self, ids, streamer, stop)
            try:
                begun = self.form.ids is plain_ids  # a plain text goes on where the prompt ends, white space and all
                for piece in up_to(self.stops, streamer):
                    piece = piece if begun else piece.lstrip()
                    begun = begun or bool(piece)
                    if piece:
                        yield piece
            finally:
                stop.set()
            running.result()  # raises what went wrong in there

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation; where it is longer than the model reads, without its oldest exchanges."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.config.generation.max_new_tokens
        while True:
            ids = self.form.ids([*system, *messages], self.tokenizer) or [self.tokenizer.eos_token_id]
            if not positions or self.config.model.rope_scaling or len(ids) + new <= positions:
                return ids
            if len(messages) < 3:
                raise qlora.ConfigError(
                    f"the prompt has {len(ids)} tokens and the model reads {positions}, {new} of which are kept for "
                    "the answer: shorten it, or lower --max_new_tokens"
                )
            messages = messages[2:]


class StopOn(StoppingCriteria):
    """Ends a generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def generate(bot: Bot, ids: list[int], streamer: TextIteratorStreamer, stop: threading.Event) -> None:
    """The model at work, in a thread of its own."""
    prompt = torch.tensor([ids], device=bot.model.get_input_embeddings().weight.device)
    dtype = qlora.compute_dtype(bot.config)
    half = torch.autocast(prompt.device.type, dtype, enabled=dtype != torch.float32)  # as in training
    try:
        with qlora.reraise_as_user_error("generation flags"), qlora.generating(bot.model), half:
            bot.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=qlora.generation_config(bot.config, bot.model, bot.tokenizer),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopOn(stop)]),
            )
    finally:
        streamer.end()  # or the reader of the stream would wait for ever


def up_to(stops: Iterable[str], pieces: Iterable[str]) -> Iterator[str]:
    """A stream until the first stop string in it. An end that may become one is held back until that is clear."""
    text, shown = "", 0
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            yield text[shown : min(found)]
            return
        held = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        yield text[shown : len(text) - held]
        shown = max(shown, len(text) - held)
    yield text[shown:]


KEPT_FLAGS = {
    field.name
    for group in (qlora.ModelArguments, qlora.QuantisationArguments)
    for field in dataclasses.fields(group)
    if field.name not in ("adapter_name_or_path", "full_finetune")
} | {"bf16", "fp16"}


def flags_of(folder: Path, adapter: Path | None) -> dict[str, Any] | None:
    """The flags that a run was trained with, if the folder is a run's, a checkpoint of one, or what one ended in."""
    card = folder / "README.md"  # which names the --working_dir, where there is one
    named = re.search(r"are in `(.+)/run\.json`", card.read_text(encoding="utf-8")) if card.is_file() else None
    for place in (folder, *([Path(named[1])] if named else ()), folder.parent):
        if (place / "run.json").is_file():
            flags = qlora.read_json(place / "run.json").get("flags", {})
            if adapter or flags.get("full_finetune"):  # a merged model may lie inside its run's folder
                return flags
    return None


def config_of(name: str, given: Sequence[str]) -> tuple[qlora.Config, Path | None, dict[str, Any]]:
    """(the flags of the run with those given laid over them, its adapter, its own flags)."""
    folder = Path(name).expanduser()
    adapter = qlora.adapter_folder(folder)
    if adapter is None and folder.is_dir() and not (folder / "config.json").is_file():
        last = qlora.find_last_checkpoint(folder)  # a run that was interrupted
        adapter = qlora.adapter_folder(last) if last else None
        if adapter is None and qlora.gguf_file(name) is None:
            raise qlora.ConfigError(f"{name}: neither a trained adapter nor a model in it")
    own = flags_of(folder, adapter)
    flags = {key: value for key, value in (own or {}).items() if key in KEPT_FLAGS and value is not None}
    if ((adapter or folder) / "tokenizer_config.json").is_file():  # in which both are
        flags = {key: value for key, value in flags.items() if key not in ("chat_template", "tokenizer_patch")}
    if adapter is None:
        flags = {"bits": 16} | flags | {"model_name_or_path": name}
    elif own is None:
        flags = {"model_name_or_path": qlora.read_json(adapter / "adapter_config.json")["base_model_name_or_path"]}
    if not torch.cuda.is_available():
        flags |= {"bf16": False, "fp16": False}  # float32 is faster there
    elif own is None and torch.cuda.is_bf16_supported():
        flags["bf16"] = True
    return qlora.parse_config([f"--{key}={value}" for key, value in flags.items()] + list(given)), adapter, own or {}


def load(name: str, *given: str, template: str = "auto", system: str | None = None, stop: Sequence[str] = ()) -> Bot:
    """What MODEL names, ready to answer.

    Args:
        name: a run's folder, a base or a merged model.
        given: flags of qlora.py, laid over those of the run.
        template: a name of FORMS, or auto: what the run was trained on, the chat template, or Guanaco's form.
        system: what stands before the conversation; None takes the form's own.
        stop: further strings that end an answer.
    """
    config, adapter, own = config_of(name, given)
    folder = qlora.model_folder(config)
    model_config = qlora.load_model_config(config, folder)
    trained = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = qlora.load_tokenizer(config, model_config, str(adapter) if trained else folder)
    if template == "auto":
        on_guanaco = "oasst1" in (own.get("dataset"), own.get("dataset_format"))
        template = "chat" if tokenizer.chat_template and not on_guanaco else "guanaco"
    if template == "chat" and not tokenizer.chat_template:
        raise qlora.ConfigError(f"{name} has no chat template: give --template guanaco or plain")
    model: Any = qlora.load_model(config, model_config, folder)
    qlora.sync_special_tokens(model, tokenizer)
    if adapter:
        model = qlora.attach_adapters(model, config, str(adapter))
    qlora.set_seed(config.training.seed)  # with --do_sample, one --seed gives one conversation
    form = FORMS[template]
    system = form.system if system is None else system
    return Bot(model.eval(), tokenizer, config, form, system, (*form.stops, *(text for text in stop if text)))


# ------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """MODEL and our few flags; every other flag is qlora.py's."""

    def __init__(self, script: str, template: str) -> None:
        about = f"{script}\n\n{__doc__.partition(chr(10) * 2)[2]}"  # type: ignore[union-attr]
        rest = "Every flag of qlora.py works after these: --bits 4, --max_new_tokens 64, --do_sample --temperature 0.7."
        look = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, epilog=rest, formatter_class=look, allow_abbrev=False)
        self.add_argument("model", metavar="MODEL", help="a run's folder, a base model or a merged one")
        self.add_argument("--template", choices=["auto", *FORMS], default=template, help="default: %(default)s")
        self.add_argument("--system", help="what stands before the conversation")
        self.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")

    def error(self, message: str) -> NoReturn:
        raise qlora.ConfigError(f"{message.removeprefix('argument ')}; see --help")

    def words(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """(our words, qlora.py's flags), the latter checked before anything is loaded."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] and argv[0].startswith("--") and "--help" not in argv:
            self.error(f"{argv[0]} stands before MODEL")  # its value would be taken for the model
        return self.parse_known_args(argv)


def load_from(options: argparse.Namespace, flags: Sequence[str]) -> Bot:
    """The model that a command line asks for."""
    return load(options.model, *flags, template=options.template, system=options.system, stop=options.stop)


def run(body: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """A script's exit status: 0, or 2 after one line that says what to mend."""
    qlora.set_up_logging()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # a way of leaving
            body(argv)
        return 0
    except Exception as error:
        known = qlora.exit_status(error)
        if known is None:
            raise
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        print(f"error: {'not enough GPU memory: try --bits 4' if out_of_memory else known[1]}", file=sys.stderr)
        return known[0]
