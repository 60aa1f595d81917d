"""What generate.py, chat.py and chat_gradio.py share: load a model, write its prompt, stream its answer.

MODEL is the folder of a run (or one of its checkpoints), whose adapter is loaded onto the base it was trained on, at
the run's --bits. Or it is a base model or a merged one: a folder, a hub id or a .gguf file, in 16 bit unless you pass
--bits.
"""

import argparse
import contextlib
import copy
import dataclasses
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
GUANACO_ROLES = "{'system': '', 'user': '### Human: ', 'assistant': '### Assistant: '}"
SYSTEMS = {
    "guanaco": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "airoboros": "A chat.",
}
STOPS = {"guanaco": ["### Human:", "### Assistant:"], "alpaca": ["### Instruction:"], "airoboros": ["USER:"]}
TEMPLATES = {  # BOS is added to all but the model's own, which writes it
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
    # as qlora.parse_alpaca writes a row with earlier exchanges, and parse_airoboros one
    "alpaca": "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response: "
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}",
    "airoboros": "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else '' }}{{ m.content }}\n"
    "{{ 'ASSISTANT: ' if m.role == 'user' else '' }}{% endfor %}",
    "chat": None,  # the model's own
    # as oasst1's rows are written; the prompt ends before the space, which belongs to the answer's first token
    "guanaco": "{% for m in messages %}{{ " + GUANACO_ROLES + "[m.role] + m.content }}"
    "{{ ' ' if m.role == 'system' else '' }}{% endfor %}### Assistant:",
}
KEPT_FLAGS = {
    field.name
    for group in (qlora.ModelArguments, qlora.QuantisationArguments)
    for field in dataclasses.fields(group)
    if field.name not in ("adapter_name_or_path", "full_finetune")
} | {"bf16", "fp16"}


def encode(messages: Sequence[Message], tokenizer: Any, template: str) -> list[int]:
    """The token ids of a conversation, as in training. Special tokens that a user types remain text."""
    messages, own_template = list(messages), template == "chat"
    if own_template:  # which contains special tokens, so the text below is tokenised with them
        messages = qlora.escape_special_tokens(messages, qlora.special_token_pattern(tokenizer))
    options = {"chat_template": TEMPLATES[template], "tokenize": False, "add_generation_prompt": True}
    with qlora.reraise_as_user_error("the model's chat template", qlora.ConfigError, jinja2.TemplateError):
        text = tokenizer.apply_chat_template(messages, **options)
    if own_template:
        ((tokens,),) = qlora.tokenize_rendered([[{"text": text, "supervised": False}]], tokenizer)
        return [token_id for token_id, _ in tokens]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The stream up to the first stop string. Text that may be the beginning of one is held back."""
    begun = [re.escape(stop[:n]) + r"\Z" for stop in stops for n in range(1, len(stop))]
    pattern = re.compile("|".join([*map(re.escape, stops), *begun]) or "(?!)")  # (?!) never matches
    text = ""
    for piece in pieces:
        text += piece
        match = pattern.search(text)
        end = match.start() if match else len(text)
        yield text[:end]
        text = text[end:]
        if text.startswith(tuple(stops)):
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
    stops: list[str]

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer in pieces, as they are generated. Closing the iterator stops the model."""
        ids = torch.tensor([self.prompt(messages)], device=self.model.get_input_embeddings().weight.device)
        stopped, dtype = threading.Event(), qlora.compute_dtype(self.config)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate = torch.autocast(ids.device.type, dtype, enabled=dtype is not torch.float32)(self.model.generate)
        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(
                generate, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.generation,
                tokenizer=self.tokenizer, streamer=streamer,
                stopping_criteria=[lambda ids, _: torch.full(ids.shape[:1], stopped.is_set(), device=ids.device)],
            )  # fmt: skip
            generation.add_done_callback(lambda _: streamer.end())  # without it the loop would wait after an error
            started = self.template == "plain"  # a plain text continues the prompt, whitespace included
            try:
                for piece in until_stop(streamer, self.stops):
                    piece = piece if started else piece.lstrip()
                    started = started or bool(piece)
                    if piece:
                        yield piece
            finally:
                stopped.set()
            with qlora.reraise_as_user_error("generation flags"):
                generation.result()

    def with_settings(self, system: str, temperature: float, max_new_tokens: int) -> "Bot":
        """The same model with other settings. Temperature 0 takes the likeliest token."""
        generation, flags = copy.deepcopy(self.generation), self.config.generation
        generation.update(
            do_sample=temperature > 0, temperature=float(temperature) or 1.0, max_new_tokens=int(max_new_tokens)
        )
        flags = dataclasses.replace(flags, max_new_tokens=generation.max_new_tokens)
        config = dataclasses.replace(self.config, generation=flags)
        return self._replace(system=system, generation=generation, config=config)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, without its oldest exchanges if the model cannot read all of it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.config.model.rope_scaling:
            positions = None  # the model reads more than it was trained on
        new = self.config.generation.max_new_tokens
        room = positions - new if positions else sys.maxsize
        while len(ids := encode([*system, *messages], self.tokenizer, self.template)) > room:
            if len(messages) < 3:
                raise qlora.ConfigError(
                    f"the prompt has {len(ids)} tokens and the model reads {positions}, {new} of which are reserved "
                    "for the answer: shorten the prompt, or lower --max_new_tokens"
                )
            messages = messages[2:]
        return ids or [self.tokenizer.eos_token_id]


def find_adapter(folder: Path) -> Path | None:
    """A run's adapter, or that of its last checkpoint if the run was interrupted; None for a model."""
    adapter = qlora.weights_in(folder)
    if adapter or not folder.is_dir() or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        return adapter
    last = qlora.find_last_checkpoint(folder)
    if last is None or (adapter := qlora.weights_in(last)) is None:
        raise qlora.ConfigError(f"{folder}: neither a trained adapter nor a model in this folder")
    return adapter


def training_flags(folder: Path, adapter: Path | None) -> dict[str, Any]:
    """The flags of the run that wrote this folder or one of its checkpoints; empty if no run did."""
    card = folder / "README.md"  # with --working_dir, run.json is elsewhere and the model card says where
    link = re.search(r"are in `(.+)/run\.json`", card.read_text(encoding="utf-8")) if card.is_file() else None
    for place in (folder, *([Path(link[1])] if link else []), folder.parent):
        if (place / "run.json").is_file():
            flags = qlora.read_json(place / "run.json").get("flags", {})
            if adapter or flags.get("full_finetune"):  # a merged model may be inside its run's folder
                return flags
    return {}


def loading_flags(name: str, adapter: Path | None, trained: dict[str, Any]) -> dict[str, Any]:
    """The flags of qlora.py that load MODEL as the run had it."""
    flags = {key: value for key, value in trained.items() if key in KEPT_FLAGS and value is not None}
    if ((adapter or Path(name).expanduser()) / "tokenizer_config.json").is_file():  # it includes these two
        flags = {key: value for key, value in flags.items() if key not in ("chat_template", "tokenizer_patch")}
    if adapter is None:
        flags = {"bits": 16} | flags | {"model_name_or_path": name}
    elif not trained:
        flags = {"model_name_or_path": qlora.read_json(adapter / "adapter_config.json")["base_model_name_or_path"]}
    if not torch.cuda.is_available():
        return flags | {"bf16": False, "fp16": False}  # float32 is faster on a CPU
    return flags if trained else flags | {"bf16": torch.cuda.is_bf16_supported()}


# The template of a dataset format; those that are not here are plain.
FORMS = {"oasst1": "guanaco", "alpaca": "alpaca", "alpaca-clean": "alpaca", "airoboros": "airoboros"}


def trained_template(trained: dict[str, Any], config: qlora.Config) -> str | None:
    """The template that writes prompts as the rows of a run had them; None for the model's own."""
    name = qlora.dataset_shares(trained["dataset"])[0][0]
    chosen = trained.get("dataset_format") or (name if name in qlora.DATASETS else None)
    if trained.get("as_chat"):
        return None
    try:
        if not chosen:  # inferred from columns
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, columns=trained.get("columns")))
            chosen = next(iter(qlora.open_dataset(name, config).values())).format
        form = qlora.FORMATS[chosen]
    except (qlora.QLoRAError, KeyError) as error:  # the data is gone, or a function of its own wrote it
        qlora.log.warning("how the rows that it was trained on were written is not known (%s): see --template", error)
        return None
    return None if {"messages", "conversations"}.intersection(form.columns) else FORMS.get(chosen, "plain")


def load(name: str, *flags: str, template: str = "auto", system: str | None = None, stop: Sequence[str] = ()) -> Bot:
    """Load MODEL. `flags` are qlora.py's and override the run's; `stop` are more strings that end an answer."""
    adapter = find_adapter(Path(name).expanduser())
    trained = training_flags(Path(name).expanduser(), adapter)
    config = qlora.parse_config([f"--{k}={v}" for k, v in loading_flags(name, adapter, trained).items()] + [*flags])
    folder = qlora.model_folder(config)
    model_config = qlora.load_model_config(config, folder)
    own_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = qlora.load_tokenizer(config, model_config, str(adapter) if own_tokenizer else folder)
    if template == "auto":
        own = trained_template(trained, config) if adapter and trained else None
        other = "plain" if adapter and trained else "guanaco"  # rows that no template wrote
        template = own or ("chat" if tokenizer.chat_template else other)
        qlora.log.info("--template %s", template)
    if template == "chat" and not tokenizer.chat_template:
        raise qlora.ConfigError(f"{name} has no chat template: pass --template guanaco or plain")
    model: Any = qlora.load_model(config, model_config, folder)
    generation = qlora.generation_config(config, model, tokenizer)
    model.generation_config = GenerationConfig()  # generate() would add the model's own sampling values
    model = (qlora.attach_adapter(model, str(adapter)) if adapter else model).eval()
    torch.manual_seed(config.training.seed)  # with --do_sample, one --seed gives one conversation
    system = SYSTEMS.get(template, "") if system is None else system
    stops = [*STOPS.get(template, []), *filter(None, stop)]
    generation.stop_strings = stops or None
    return Bot(model, tokenizer, config, generation, template, system, stops)


def make_parser(script: str, template: str) -> argparse.ArgumentParser:
    """MODEL and the flags that the scripts share; all other flags are qlora.py's."""
    parser = argparse.ArgumentParser(
        description=f"{script}\n\n{__doc__.partition(chr(10) * 2)[2]}",  # type: ignore[union-attr]
        epilog="Flags of qlora.py may follow: --bits 4, --max_new_tokens 64, --do_sample --temperature 0.7.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a base model or a merged one")
    parser.add_argument("--template", choices=["auto", *TEMPLATES], default=template, help="default: %(default)s")
    parser.add_argument("--system", help="system message before the conversation")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The script's own options, and in `flags` those for qlora.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0].startswith("--") and "--help" not in argv:
        parser.error(f"{argv[0]} comes before MODEL, which must be first")  # its value would be taken for MODEL
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
        return 0
    except torch.OutOfMemoryError:
        message = "not enough GPU memory: try --bits 4"
    except (qlora.QLoRAError, OSError) as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    return 2
