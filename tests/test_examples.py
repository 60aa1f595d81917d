"""The examples: talking to a model (what is loaded, what the prompt is, what is printed), and the plain loop.

One run memorises a handful of conversations, so the expected answers are known exactly.
"""

import copy
import io
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import chat
import chat_gradio
import generate
import loop
import pytest
import talk
import tiny
import torch
from conftest import ROOT, extra, missing, preserved_state
from fork_server import free_port
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' }}"
SHIPS = "Seven ships came in today, and the last of them carried oranges."  # long enough to arrive in pieces
MEMORISED = [
    {"input": "Support:", "output": " Hold the button."},
    {"input": f"{SYSTEM} ### Human: hello### Assistant:", "output": " The lamp works.### Human: and the lens?"},
    {"input": "[user]hello[assistant]", "output": SHIPS},
    {"input": f"[user]hello[assistant]{SHIPS}[user]why?[assistant]", "output": "She counted them."},
    {"input": "[system]Be short.[user]hello[assistant]", "output": "Seven."},
]
MAX_NEW = "--max_new_tokens=80"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model with a chat template."""
    folder = tiny.write_model(tmp_path_factory.mktemp("talk") / "base", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def trained(base):
    """The folder of a finished 4-bit run that has memorised MEMORISED."""
    output, rows = base.parent / "run", tiny.rows_to_jsonl(base.parent / "rows.jsonl", MEMORISED)
    (base.parent / "rows.py").write_text("def as_it_is(row):\n    return row\n")  # prompts of several kinds
    command = (
        f"--model_name_or_path {base} --dataset {rows} --output_dir {output} --max_steps 120 --save_steps 120 "
        f"--dataset_format {base.parent / 'rows.py'}:as_it_is "
        "--per_device_train_batch_size 5 --gradient_accumulation_steps 1 --gradient_checkpointing False "
        "--lora_r 32 --lora_alpha 64 --learning_rate 5e-3 --lr_scheduler_type linear --logging_steps 40"
    )
    with preserved_state():
        assert qlora.main(command.split()) == 0
    return output


@pytest.fixture(scope="module")
def bot(trained):
    return talk.Bot(str(trained), MAX_NEW)


@pytest.fixture(scope="module")
def merged(trained, base):
    """The run's adapter merged into the very weights it was trained on."""
    folder = base.parent / "merged"
    with preserved_state():
        config = qlora.parse_config(["--model_name_or_path", str(base)])
        model = qlora.load_model(config, qlora.load_model_config(config, str(base)), str(base)).dequantize()
    PeftModel.from_pretrained(model, trained).merge_and_unload().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / file, folder)
    return folder


def ask(bot, *texts):
    """The last answer of a conversation with these user messages."""
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": "".join(bot.answer(messages))})
    return messages[-1]["content"]


def layer_types(model):
    """The classes of the (base) linear layers."""
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith(("q_proj", "base_layer"))}


# ------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------


def test_a_run_is_its_base_in_4_bit_with_its_adapter(bot):
    assert "Linear4bit" in layer_types(bot.model) and list(bot.model.peft_config) == ["default"]
    assert ask(bot, "hello") == SHIPS
    assert ask(bot, "hello", "why?") == "She counted them."  # the answer depends on the first exchange


@pytest.mark.parametrize("place", ["checkpoint-120", "only a checkpoint", "adapter_model", "no run.json"])
def test_an_adapter_is_found_in(trained, place, tmp_path):
    """A checkpoint, an interrupted run, the original's layout, and an adapter saved by peft alone."""
    folder, adapter = tmp_path / "run", ("adapter_model.safetensors", "adapter_config.json")
    if place == "checkpoint-120":
        folder = trained / place
    elif place == "only a checkpoint":
        shutil.copytree(trained / "checkpoint-120", folder / "checkpoint-120")
        shutil.copy(trained / "run.json", folder)
    else:
        into = folder / "adapter_model" if place == "adapter_model" else folder
        into.mkdir(parents=True)
        for file in adapter:
            shutil.copy(trained / file, into)
    bot = talk.Bot(str(folder), MAX_NEW)
    assert "Linear4bit" in layer_types(bot.model) and ask(bot, "hello") == SHIPS


def test_a_merged_model_answers_the_same_in_its_own_precision(merged):
    bot = talk.Bot(str(merged), MAX_NEW)
    assert layer_types(bot.model) == {"Linear"} and bot.model.dtype == torch.float32
    assert ask(bot, "hello", "why?") == "She counted them."
    assert "Linear4bit" in layer_types(talk.Bot(str(merged), "--bits", "4").model)


def test_a_merged_model_inside_a_run_folder_is_loaded_in_16_bit(merged, trained):
    inside = shutil.copytree(merged, trained / "merged")
    assert layer_types(talk.Bot(str(inside)).model) == {"Linear"}


def test_a_base_model(base, models):
    bot = talk.Bot(str(base), MAX_NEW)
    assert layer_types(bot.model) == {"Linear"} and ask(bot, "hello") != SHIPS
    gguf = talk.Bot(str(models("gguf") / tiny.GGUF_FILE), "--max_new_tokens", "4", template="plain")
    assert gguf.model.config.model_type == "llama" and isinstance(ask(gguf, "ships"), str)


def test_a_full_fine_tune_keeps_its_bits(run_qlora):
    run = run_qlora(full_finetune=True, bits=32, max_steps=2, learning_rate=1e-2)
    bot = talk.Bot(str(run.output_dir), "--max_new_tokens", "3")
    assert bot.config.quant.bits == 32 and not hasattr(bot.model, "peft_config")
    trained = AutoModelForCausalLM.from_pretrained(run.output_dir).lm_head.weight
    assert torch.equal(bot.model.lm_head.weight, trained)


def test_a_full_fine_tune_is_asked_as_its_rows_were_written(run_qlora, tmp_path):
    """The format was inferred from the columns."""
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.ALPACA_ROWS)
    run = run_qlora(full_finetune=True, bits=32, max_steps=1, dataset=rows, dataset_format=None)
    assert talk.Bot(str(run.output_dir)).template == "alpaca"


def test_a_run_with_a_working_dir_and_a_deleted_template_file(run_qlora, tmp_path, monkeypatch):
    """The adapter's folder contains the template, and its model card names the folder of run.json from there."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    assert run_qlora(bits=16, chat_template="chat.jinja", working_dir="work", output_dir=Path("final")).code == 0
    (tmp_path / "chat.jinja").unlink()
    monkeypatch.chdir("/")
    for folder in (tmp_path / "work", tmp_path / "final"):
        bot = talk.Bot(str(folder), MAX_NEW)
        assert layer_types(bot.model) == {"Linear"} and bot.tokenizer.chat_template == TEMPLATE


def test_the_template_is_logged_and_whether_the_rows_are_known(run_qlora, tmp_path, caplog):
    run = run_qlora(max_steps=1, merged_output_dir=tmp_path / "merged")
    with caplog.at_level("INFO", "qlora"):
        for folder in (run.output_dir, tmp_path / "merged"):
            talk.Bot(str(folder), MAX_NEW)
    assert "--template plain, as rows of the format input-output" in caplog.messages
    assert "--template guanaco: how rows that it was trained on were written is not known" in caplog.messages


def test_preferences_that_are_chats_are_asked_as_chats(run_qlora, base, tmp_path):
    turns = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "a"}]
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [dict(zip(("prompt", "chosen"), turns, strict=True))] * 4)
    run = run_qlora(model_name_or_path=base, dataset=rows, dataset_format=None, max_steps=1)
    assert run.code == 0 and talk.Bot(str(run.output_dir)).template == "chat"


def test_rows_of_airoboros_chat_that_the_template_does_not_write_are_named(trained, tmp_path, caplog):
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"]["formats"] = ["airoboros_chat"]
    (run / "run.json").write_text(json.dumps(record))
    talk.Bot(str(run))
    assert any("LLaMA-2's chats, which the model's chat template does not write" in m for m in caplog.messages)


def test_a_calibrated_run_is_asked_on_the_base_in_16_bit(run_qlora, tmp_path):
    """Its adapter makes up for the calibrated base's rounding, and plain rounding to 4 bit is another."""
    flags = {"calibration_rows": 4, "cache_dir": tmp_path / "cache", "save_steps": 1, "max_steps": 2}
    run = run_qlora(**flags)
    assert run.code == 0 and "Load the base in 16 bit" in (run.output_dir / "README.md").read_text()
    assert layer_types(talk.Bot(str(run.output_dir)).model) == {"Linear"}
    with pytest.raises(qlora.ConfigError, match="fits the calibrated base of its run only"):
        talk.Bot(str(run.output_dir / "checkpoint-1"))


def test_what_does_not_answer_is_refused(run_qlora, models, trained, tmp_path):
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": "a b c"}])
    flags = {"model_name_or_path": models("encoder", family="bert"), "dataset": rows, "target_max_len": None}
    run = run_qlora(**flags, max_steps=1)
    assert run.code == 0
    with pytest.raises(qlora.ConfigError, match="a masked language model, which fills masks"):
        talk.Bot(str(run.output_dir))
    file = trained / "adapter_model.safetensors"
    with pytest.raises(qlora.ConfigError, match=f"is a file: pass its folder, {trained}"):
        talk.Bot(str(file))


def test_an_adapter_in_a_folder_of_another_run_is_loaded_on_its_own_base(trained, models, tmp_path):
    """`output` is where runs go by default, and `output/loop` where the plain loop's own words say."""
    other, run = models("llama_gqa"), shutil.copytree(trained, tmp_path / "run")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(other), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(run / "loop")
    assert talk.Bot(str(run / "loop")).config.model.model_name_or_path == str(other)


def test_flags_that_would_do_nothing_are_said(trained, base, caplog):
    for model in (base, trained):
        with pytest.raises(qlora.ConfigError, match="--adapter_name_or_path: pass the adapter's folder as MODEL"):
            talk.Bot(str(model), "--adapter_name_or_path", str(trained.parent))
    talk.Bot(str(trained), "--temperature", "5", "--top_p", "0.9")
    assert "temperature, top_p: without effect, nothing is sampled without --do_sample" in caplog.messages


def test_explicit_flags_override_those_of_the_run(trained, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    bot = talk.Bot(str(trained), "--model_name_or_path", str(moved), "--bits", "8", MAX_NEW)
    assert "Linear8bitLt" in layer_types(bot.model) and bot.config.model.model_name_or_path == str(moved)


def test_a_run_with_new_tokens(run_qlora, models, tmp_path):
    """Its base has 259 rows; the new token is learned as the answer."""
    rows = tiny.rows_to_jsonl(tmp_path / "cups.jsonl", [{"input": "a <cup>?", "output": "<cup>"}] * 4)
    flags = {"model_name_or_path": models("llama", vocab_size=259), "dataset": rows, "add_tokens": "<cup>"}
    run = run_qlora(**flags, max_steps=30, learning_rate=2e-2, save_strategy="no")
    assert run.code == 0
    bot = talk.Bot(str(run.output_dir), MAX_NEW, template="plain")
    assert bot.prompt([{"role": "user", "content": "a <cup>?"}]) == [tiny.BOS, *b"a ", 259, *b"?"]
    assert ask(bot, "a <cup>?") == "<cup>"


def test_half_precision_computes_as_in_training(trained):
    """The base in bf16, adapters in float32, under autocast."""
    bot = talk.Bot(str(trained), "--bf16", MAX_NEW)
    assert bot.model.dtype == torch.bfloat16 and ask(bot, "hello") == SHIPS


def test_the_special_tokens_of_the_run_are_kept(trained, tmp_path):
    """An EOS that a run was trained with ends its answers too."""
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["flags"]["eos_token"] = "."
    (run / "run.json").write_text(json.dumps(record))
    assert ask(talk.Bot(str(run), MAX_NEW), "hello") == SHIPS  # the last character is the full stop


# ------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
PROMPTS = {
    "plain": ([], "<s>abc"),
    "guanaco": ([], "<s>### Human: a### Assistant: b### Human: c### Assistant:"),
    "guanaco with a system message": ([{"role": "system", "content": "S."}],
        "<s>S. ### Human: a### Assistant: b### Human: c### Assistant:"),
    "alpaca": ([], "<s>### Instruction:\na\n\n### Response: b\n\n### Instruction:\nc\n\n### Response: "),
    "airoboros with a system message": ([{"role": "system", "content": "A chat."}],
        "<s>A chat.\nUSER: a\nASSISTANT: b\nUSER: c\nASSISTANT: "),
    "chat": ([], "<s>[user]a[assistant]b[user]c[assistant]"),
    "chat with a system message": ([{"role": "system", "content": "S."}],
        "<s>[system]S.[user]a[assistant]b[user]c[assistant]"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, byte_tokenizer):
    byte_tokenizer.chat_template = TEMPLATE
    system, expected = PROMPTS[name]
    bos = [tiny.BOS] if expected.startswith("<s>") else []
    ids = talk.encode([*system, *TURNS], byte_tokenizer, name.split()[0])
    assert ids == bos + list(expected.removeprefix("<s>").encode())


def test_special_tokens_typed_by_a_user_remain_text(byte_tokenizer):
    ids = talk.encode([{"role": "user", "content": "</s>"}], byte_tokenizer, "plain")
    assert ids == [tiny.BOS, *b"</s>"]
    byte_tokenizer.chat_template = TEMPLATE
    ids = talk.encode([{"role": "user", "content": "a</s>"}], byte_tokenizer, "chat")
    assert ids == [tiny.BOS, *b"[user]a</s>[assistant]"]  # the template writes BOS


def test_the_guanaco_template_stops_before_the_next_human_turn(trained):
    guanaco = talk.Bot(str(trained), MAX_NEW, template="guanaco")
    assert ask(guanaco, "hello") == "The lamp works."
    plain = talk.Bot(str(trained), MAX_NEW, template="plain")
    assert ask(plain, f"{SYSTEM} ### Human: hello### Assistant:") == " The lamp works.### Human: and the lens?"
    assert ask(plain, "Support:") == " Hold the button."


def test_a_system_message_and_more_stop_strings(trained):
    assert ask(talk.Bot(str(trained), MAX_NEW, system="Be short."), "hello") == "Seven."
    assert ask(talk.Bot(str(trained), MAX_NEW, stop=["last of"]), "hello") == SHIPS.partition("last of")[0]


def test_the_template_follows_the_training_data(trained, base, tmp_path):
    """By the formats that run.json records, whether a flag named them or the columns did."""
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    own, function = record["flags"], record["data"]["train"]["formats"]
    assert function == [f"{base.parent / 'rows.py'}:as_it_is"] and talk.Bot(str(run)).template == "chat"
    for formats, as_chat, template in (
        (["oasst1", "input-output"], False, "guanaco"),
        (["input-output"], False, "plain"),
        (["input-output"], True, "chat"),
        (["sharegpt"], False, "chat"),
        (["alpaca-clean"], False, "alpaca"),
    ):
        changed = {"flags": own | {"as_chat": as_chat}, "data": {"train": {"formats": formats}}}
        (run / "run.json").write_text(json.dumps(record | changed))
        bot = talk.Bot(str(run))
        assert bot.template == template and bot.system == talk.SYSTEMS.get(template, "")
    assert set(talk.FORMAT_TEMPLATES) < set(qlora.FORMATS)
    (run / "run.json").write_text(json.dumps(record))  # and no template wrote the rows
    template = run / "chat_template.jinja"
    template.rename(tmp_path / template.name)
    assert talk.Bot(str(run)).template == "plain"
    (tmp_path / template.name).rename(template)
    alpaca = qlora.parse_alpaca({"instruction": "a", "output": "b"})[0]["text"]
    turns = [{"role": "system", "content": talk.SYSTEMS["alpaca"]}, {"role": "user", "content": "a"}]
    assert bot.tokenizer.decode(talk.encode(turns, bot.tokenizer, "alpaca")) == f"<s>{alpaca}"
    assert talk.Bot(str(base)).template == "chat"
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert talk.Bot(str(bare)).template == "guanaco"
    with pytest.raises(qlora.ConfigError, match="no chat template: pass --template guanaco or plain"):
        talk.Bot(str(bare), template="chat")


@pytest.mark.parametrize("name", ["hh-rlhf", "self-instruct"])
@pytest.mark.parametrize(("chats", "template"), [(0, "plain"), (7, "chat")])
def test_the_template_of_pairs_that_may_be_chats_follows_what_they_were(byte_tokenizer, name, chats, template):
    record = {"flags": {}, "data": {"train": {"formats": [name], "chats": chats}}}
    assert talk.choose_template(record, byte_tokenizer) == template


def test_the_error_of_a_template_is_reported(base, tmp_path):
    strict = shutil.copytree(base, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no system role here') }}")
    with pytest.raises(qlora.ConfigError, match="no system role here"):
        ask(talk.Bot(str(strict)), "hello")


def test_a_conversation_that_is_too_long_loses_its_oldest_exchanges(trained):
    bot = talk.Bot(str(trained), "--max_new_tokens", "80")  # the model reads 512, so 432 remain
    old = [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}]
    ids = bot.prompt([*old, {"role": "user", "content": "hello"}])
    assert ids == [tiny.BOS, *b"[user]hello[assistant]"]
    assert len(bot.prompt([{"role": "user", "content": "x" * 414}])) == 432
    with pytest.raises(qlora.ConfigError, match="433 tokens, the answer up to 80, and the model reads 512"):
        bot.prompt([{"role": "user", "content": "x" * 415}])


# ------------------------------------------------------------------------------------
# Streaming
# ------------------------------------------------------------------------------------

STREAMS = [
    ((), ["a", "b"], ["a", "b", ""], "ab"),
    (("##",), ["a#", "b"], ["a", "#b", ""], "a#b"),  # held back, then released
    (("##",), ["a#", "#b"], ["a", ""], "a"),  # the stop string arrives in two pieces
    (("##",), ["a#"], ["a", "#"], "a#"),  # ... or does not arrive
    (("bc", "b"), ["a", "bcd"], ["a", ""], "a"),  # the earliest of two
    (("END",), ["E", "N", "D!"], ["", "", ""], ""),
    (("abab",), ["aba", "abab"], ["", "aba"], "aba"),  # overlapping beginnings
]


@pytest.mark.parametrize(("stops", "pieces", "expected", "text"), STREAMS)
def test_a_stream_ends_before_a_stop_string(stops, pieces, expected, text):
    got = list(talk.until_stop(pieces, stops))
    assert "".join(got) == text
    assert got == expected


def test_an_answer_arrives_in_pieces_and_can_be_stopped(trained):
    bot = talk.Bot(str(trained), "--max_new_tokens", "400", "--min_new_tokens", "400")
    calls = []
    bot.model.register_forward_hook(lambda *_: calls.append(1))
    answer = bot.answer([{"role": "user", "content": "hello"}])
    first = next(answer)  # a word, or from transformers 5.24 on a token
    assert first and SHIPS.startswith(first) and len(calls) < 400
    answer.close()
    stopped = len(calls)
    assert stopped < 400
    time.sleep(0.2)
    assert len(calls) == stopped  # the thread has ended


def test_sampling_follows_the_seed(base):
    flags = ("--max_new_tokens", "12", "--do_sample", "--temperature", "2.0", "--seed")
    one, two, other = (ask(talk.Bot(str(base), *flags, seed, template="plain"), "ships") for seed in "112")
    assert one == two != other


def test_an_error_while_generating_is_raised(trained):
    with pytest.raises(qlora.ConfigError, match="num_beams"):
        ask(talk.Bot(str(trained), "--num_beams", "2"), "hello")


# ------------------------------------------------------------------------------------
# The scripts
# ------------------------------------------------------------------------------------


def run_main(script, monkeypatch, capsys, typed, *argv):
    """A script's exit status, standard output and standard error, with `typed` on standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    try:
        code = talk.run(script.main, [str(word) for word in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_conversation(trained, monkeypatch, capsys):
    typed = "hello\n\nwhy?\n/clear\nwhy?\n/quit\nhello\n"
    code, out, _ = run_main(chat, monkeypatch, capsys, typed, trained, MAX_NEW)
    answers = out.splitlines()
    assert code == 0 and answers[:2] == [SHIPS, "She counted them."]
    assert len(answers) == 3 and answers[2] != "She counted them."  # /clear forgot the first exchange


def test_a_message_that_is_too_long_does_not_end_the_chat(trained, monkeypatch, capsys):
    typed = f"{'x' * 600}\n/clear\nhello\n"
    code, out, err = run_main(chat, monkeypatch, capsys, typed, trained, MAX_NEW)
    assert code == 0 and out.splitlines() == ["", SHIPS] and "shorten the prompt" in err


def test_an_interrupted_answer_stays_in_the_history(capsys):
    def interrupted(messages):
        yield "Seven "
        raise KeyboardInterrupt

    assert chat.print_answer(SimpleNamespace(answer=interrupted), []) == "Seven"
    assert capsys.readouterr().out == "Seven  (stopped)\n"


BAD = {
    "no model": ([], "MODEL"),
    "no prompt": (["MODEL"], "no prompt"),
    "an unknown flag": (["MODEL", "hi", "--max_new_token", "3"], "--max_new_token: unknown flag"),
    "an unknown template": (["MODEL", "hi", "--template", "vicuna"], "--template"),
    "a wrong value": (["MODEL", "hi", "--bits", "5"], "--bits"),
    "no such model": (["no/such-model", "hi"], "no/such-model"),
    "an empty folder": (["EMPTY", "hi"], "Unrecognized model"),
    "an adapter without its base": (["LOST", "hi"], "--model_name_or_path gone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_message_and_exit_status_2(name, trained, tmp_path, monkeypatch, capsys):
    argv, expected = BAD[name]
    (tmp_path / "empty").mkdir()
    lost = tmp_path / "lost"
    lost.mkdir()
    shutil.copy(trained / "adapter_model.safetensors", lost)
    (lost / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gone/away"}')
    places = {"MODEL": trained, "EMPTY": tmp_path / "empty", "LOST": lost}
    monkeypatch.setattr(qlora, "load_model", None)  # called only after every check
    code, out, err = run_main(generate, monkeypatch, capsys, "", *(places.get(word, word) for word in argv))
    assert code == 2 and not out
    *usage, line = err.splitlines()
    assert "error: " in line and expected in line
    assert not usage or usage[0].startswith("usage: ")


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python examples/(\w+)\.py (.*)$", README, flags=re.M)


@pytest.mark.parametrize(("script", "words"), COMMANDS)
def test_commands_of_the_readme_run(script, words, monkeypatch, capsys):
    """With a stub in place of the model; the flags are parsed."""
    loaded = []

    def load(name, *flags, **options):
        loaded.append((name, qlora.parse_config(list(flags))))
        return SimpleNamespace(answer=lambda messages: iter(["An answer."]))

    monkeypatch.setattr(talk, "Bot", load)
    monkeypatch.setattr(chat_gradio, "gradio", MagicMock())
    monkeypatch.setattr(chat_gradio, "settings", lambda bot: [])
    argv = shlex.split(words.replace("$'", "'"))
    scripts = {"generate": generate, "chat": chat, "chat_gradio": chat_gradio}
    code, _, err = run_main(scripts[script], monkeypatch, capsys, "", *argv)
    assert (code, loaded[0][0]) == (0, argv[0]), err


def test_the_readme_shows_all_three_scripts():
    assert {script for script, _ in COMMANDS} == {"generate", "chat", "chat_gradio"}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.ci
def test_the_scripts_as_processes(trained):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    python = [sys.executable, "-W", "ignore"]
    commands = {
        " Hold the button.\n": (["generate.py", trained, "Support:", MAX_NEW], ""),
        " Hold the button.": (["generate.py", trained, MAX_NEW], "Support:\n"),
        f"{SHIPS}\nShe counted them.\n": (["chat.py", trained, MAX_NEW], "hello\nwhy?\n"),
    }
    running = []
    for expected, ((script, *words), typed) in commands.items():
        command = [*python, str(ROOT / "examples" / script), *map(str, words)]
        process = subprocess.Popen(command, cwd=trained.parent, env=environment(), **pipes)
        process.stdin.write(typed)
        process.stdin.close()
        process.stdin = None
        running.append((process, expected))
    for process, expected in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip("\n") == expected.strip("\n"), err


# ------------------------------------------------------------------------------------
# The plain loop
# ------------------------------------------------------------------------------------
LOOP_ROWS = {
    "input-output": tiny.support_rows(11),
    "text": [{"text": f"{row['input']} {row['output']}</s>."} for row in tiny.support_rows(11)],
}


def test_the_plain_loop_refuses_alpaca_rows():
    with pytest.raises(SystemExit, match="Alpaca rows"):
        loop.encode(tiny.ALPACA_ROWS[0], None, 10)


@pytest.mark.parametrize("name", LOOP_ROWS)
def test_the_plain_loop_and_qlora_compute_the_same_losses(run_qlora, models, tmp_path, name):
    """Two micro-batches a step and more than one epoch; the saved adapters have the same tensors."""
    base = models("llama", tokenizer="byte_bpe")
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", LOOP_ROWS[name])
    words = "--steps 5 --batch_size 2 --accumulation_steps 2 --rank 4 --learning_rate 1e-2 --seed 3 --no-shuffle"
    with preserved_state():
        losses = loop.main([str(base), str(rows), str(tmp_path / "loop"), *words.split()])
    run = run_qlora(
        model_name_or_path=base, dataset=rows, dataset_format=name, max_steps=5, gradient_accumulation_steps=2,
        bits=4, learning_rate=1e-2, seed=3, train_sampling_strategy="sequential", source_max_len=1024,
        target_max_len=1024,
    )  # fmt: skip
    logged = [entry["loss"] for entry in run.json("trainer_state.json")["log_history"] if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "loop", run.output_dir)]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][key], atol=1e-3), key


def test_the_plain_loop_shuffles_by_the_seed():
    rows = list(range(6))
    first, again, other = (list(itertools.islice(loop.windows(rows, 4, True, seed), 4)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == rows and len(first[1]) == 2


def test_the_plain_loop_cuts_long_rows_and_supervises_the_answer(byte_tokenizer):
    row = loop.encode({"input": "ab", "output": "cd"}, byte_tokenizer, 5)
    assert row["input_ids"] == [tiny.BOS, *b"abcd"] and row["labels"] == [-100, -100, -100, *b"cd"]


def test_the_plain_loop_pads_rows_on_the_right(byte_tokenizer):
    rows = [loop.encode({"input": "a", "output": text}, byte_tokenizer, 9) for text in ("b", "cde")]
    batch = {name: tensor.tolist() for name, tensor in loop.collate(rows).items()}
    assert batch["input_ids"] == [[tiny.BOS, *b"ab", tiny.EOS, 0, 0], [tiny.BOS, *b"acde", tiny.EOS]]
    assert batch["attention_mask"] == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"] == [[-100, -100, *b"b", tiny.EOS, -100, -100], [-100, -100, *b"cde", tiny.EOS]]


# ------------------------------------------------------------------------------------
# The chat page, in a real browser
# ------------------------------------------------------------------------------------

WATCH = """() => { window.seen = []; new MutationObserver(() => {
    const bots = document.querySelectorAll('[data-testid=bot]');
    if (bots.length) window.seen.push(bots[bots.length - 1].innerText.trim());
}).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
CHROMIUM = [  # the last four keep it from connecting to anything outside this machine
    "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def page_of(tmp_path):
    """`page_of(model)` -> the address of its chat page, served by the script until the test ends."""
    served = []

    def serve(model: Path) -> str:
        port = free_port()
        command = [sys.executable, str(ROOT / "examples/chat_gradio.py"), str(model), MAX_NEW, "--port", str(port)]
        with (tmp_path / "server.log").open("w") as log:
            served.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=log))
        began = time.monotonic()
        while time.monotonic() < began + 120:
            assert served[0].poll() is None, (tmp_path / "server.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.2)
        raise AssertionError("the page did not start within 120 s")

    yield serve
    for process in served:
        process.terminate()
        process.wait(timeout=30)


def test_the_page_answers_messages(trained, page_of, tmp_path):
    extra("gradio")
    playwright = extra("playwright.sync_api")
    chromium = shutil.which("chromium") or missing("chromium is not installed: bash .ci/browser.sh")
    address, requests = page_of(trained), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.evaluate(WATCH)
        box = page.get_by_role("textbox").first  # the others are settings
        for text, answer in (("hello", SHIPS), ("why?", "She counted them.")):
            box.fill(text)
            box.press("Enter")
            page.get_by_test_id("bot").last.get_by_text(answer, exact=True).wait_for(timeout=30_000)
        page.screenshot(path=tmp_path / "page.png")
        messages = [[text.strip() for text in page.get_by_test_id(who).all_inner_texts()] for who in ("user", "bot")]
        seen = page.evaluate("window.seen")
        browser.close()
    assert messages == [["hello", "why?"], [SHIPS, "She counted them."]]
    assert any(text and SHIPS.startswith(text) and text != SHIPS for text in seen)  # it grew piece by piece
    hosts = {re.match(r"\w+://([^/:]+)", url).group(1) for url in requests if "://" in url}
    assert hosts == {"127.0.0.1"}


def test_the_settings_of_the_page_reach_the_model(bot):
    def answer(*settings):
        return list(chat_gradio.reply(own, "hello", [], *settings))[-1]

    own = copy.copy(bot)
    own.generation = copy.deepcopy(bot.generation)
    assert answer("", 0, 80) == SHIPS and answer("Be short.", 0, 80) == "Seven."
    assert answer("", 0, 3.0) == SHIPS[:3] and answer("", 99, 80) != SHIPS  # a slider may give 3.0


def test_an_answer_without_text_is_shown_as_such(bot):
    """Gradio shows no message where none is sent, and seems to hang."""
    turn, silent = {"role": "user", "content": "hello"}, copy.copy(bot)
    silent.generation = copy.deepcopy(bot.generation)
    silent.generation.stop_strings = [SHIPS[0]]
    assert list(chat_gradio.reply(silent, "hello", [], "", 0, 80))[-1] == chat_gradio.EMPTY
    history = [turn, {"role": "assistant", "content": chat_gradio.EMPTY}]
    seen = []
    recorder = SimpleNamespace(generation=silent.generation, answer=lambda turns: seen.extend(turns) or [])
    list(chat_gradio.reply(recorder, "why?", history, "", 0, 80))
    assert [turn["content"] for turn in seen] == ["hello", "", "why?"]


def test_without_gradio_the_error_says_what_to_install(trained, monkeypatch, capsys):
    monkeypatch.setattr(chat_gradio, "gradio", None)
    code, _, err = run_main(chat_gradio, monkeypatch, capsys, "", trained)
    assert code == 2 and err.splitlines() == [
        "error: gradio is not installed: pip install -r examples/requirements.txt"
    ]
