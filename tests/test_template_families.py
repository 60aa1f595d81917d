"""Chat templates of current models: ids and labels against apply_chat_template, and TRL's marked variants of them.

The templates are files of an installed trl, which is not imported. Nothing is downloaded.
"""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import tiny
from conftest import missing

import qlora

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0], "chat_templates") if SPEC else Path("none")
NO = -100


def need_templates():
    if not FOLDER.is_dir():
        missing("trl is not installed: pip install -r tests/requirements.txt")


def read_template(name):
    need_templates()
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template, others=""):
    """One token a byte, and one for each marker in the templates, of which the first is used."""
    markers = sorted(set(re.findall(r"<[|\uff5c]?[\w▁/:]+[|\uff5c]?>|<\|?/?\w+\|?>|\[/?[A-Z_]+\]", template + others)))
    tokenizer = tiny.byte_tokenizer(extra=[marker for marker in markers if marker not in ("<s>", "</s>", "<pad>")])
    tokenizer.chat_template = template
    return tokenizer


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}


def exchanges(*words, **reasoning):
    """Questions and answers, one after the other, with the answers' reasoning if there is any."""
    return [
        message(
            ("user", "assistant")[n % 2],
            word,
            **({key: values[n // 2] for key, values in reasoning.items()} if n % 2 else {}),
        )
        for n, word in enumerate(words)
    ]


CHATS = {
    "one exchange": exchanges("Wer?", "Ich, <b>\n"),
    "two exchanges": exchanges("Hi", "Hello.", "And?", "Fine."),
    "reasoning": exchanges("2+2?", "4.", "3+3?", "6.", reasoning_content=["Two and two.", "Three."]),
}
PICTURES = ("idefics3", "llava_next", "smolvlm")  # which write no content that is text, only lists of parts
ORIGINALS = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))


def runs(ids, labels):
    """The supervised ids, in runs."""
    found = [[]]
    for i, label in zip(ids, labels, strict=True):
        if label != NO:
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def encoded(segments, tokenizer):
    columns = qlora.encode_batch({"segments": [segments], "rendered": [True]}, tokenizer, qlora.Limits(99999, 99999))
    return columns["input_ids"][0], columns["labels"][0]


def render_all(messages, tokenizer, **columns):
    chat = qlora.FORMATS["messages"].parse({"messages": messages, **columns})
    return [row.segments for row in qlora.render_chat(chat, tokenizer)]


def expected_text(tokenizer, messages, marked=None):
    """The last answer: what a template writes after its generation prompt, up to the stop token.

    With TRL's marked variant of the template it is what that marks; only the part of a mark that the generation prompt
    has already written goes (in some families the answer's header, in some the beginning of its reasoning), and white
    space after the stop token, and the stop token that GLM's variant adds.
    """
    plain = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answer = plain
    if marked:
        options = {"chat_template": marked, "tokenize": True, "return_dict": True}
        made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        masked = zip(made["input_ids"], made["assistant_masks"], strict=True)
        ids = runs(made["input_ids"], [i if mask else NO for i, mask in masked])[-1]
        answer = tokenizer.decode(ids).rstrip().removesuffix("<|user|>")
        assert plain.endswith(answer)
    written = len(os.path.commonprefix([plain, prompt]))  # noqa: RUF071
    return answer[max(written - (len(plain) - len(answer)), 0) :]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", ORIGINALS or ["none"])
def test_rows_are_the_templates_and_answers_those_that_trl_marks(family, chat):
    template = read_template(family)
    marked = read_template(f"{family}_training") if (FOLDER / f"{family}_training.jinja").is_file() else ""
    tokenizer, messages = tokenizer_for(template, marked), CHATS[chat]
    if family in PICTURES:
        with pytest.raises(qlora.RowError, match=r"turn 2|refuses"):
            render_all(messages, tokenizer)
        return
    rows = [encoded(segments, tokenizer) for segments in render_all(messages, tokenizer)]
    ends = [n + 1 for n, m in enumerate(messages) if m["role"] == "assistant"]
    if "endgeneration" in template:  # marks of its own come first, with the white space in them
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = tokenizer.apply_chat_template(messages, **options)
        masked = zip(whole["input_ids"], whole["assistant_masks"], strict=True)
        assert rows == [(whole["input_ids"], [i if mask else NO for i, mask in masked])]
        return
    expected = [expected_text(tokenizer, messages[:end], marked) for end in ends]
    assert [tokenizer.decode(run) for row in rows for run in runs(*row)] == expected
    for (ids, _), end in zip(rows, ends if len(rows) > 1 else ends[-1:], strict=True):
        assert ids == tokenizer.apply_chat_template(messages[:end], tokenize=True, return_dict=True)["input_ids"]


# Templates that write nothing of a call.
WITHOUT_CALLS = {"cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5"}
WITHOUT_CALLS |= {"qwen2_5_vl", "smolvlm"}
SAID = {"tool_call_id": "call_1abcd", "name": "get_weather"}
ASKING = message("assistant", "", reasoning_content="I ask.", tool_calls=[CALL | {"id": "call_1abcd"}])


@pytest.mark.parametrize("family", ["gemma4_v5", "gptoss", "qwen3", "qwen3_5_think", "nemotron_3_nano"])
def test_each_answer_around_a_tools_follows_its_own_prompt(family):
    """Also where the reasoning before a call goes once the tool has been heard and answered to."""
    tokenizer = tokenizer_for(read_template(family))
    cold = [message("tool", "cold", **SAID), message("assistant", "Cold.", reasoning_content="It says so.")]
    messages = [message("user", "Weather?"), ASKING, *cold, message("user", "Sure?"), ASKING, *cold]
    rows, ends = render_all(messages, tokenizer, tools=[TOOL]), [1, 3, 5, 7]
    learnt = [[segment["text"] for segment in row if segment["supervised"]] for row in rows]
    assert [len(texts) for texts in learnt] == [1] * 4 or len(rows) == 1
    for row, end, (text,) in zip(rows, ends, learnt, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True, tools=[TOOL])
        assert "".join(segment["text"] for segment in row).startswith(prompt + text[:2]) or text[0] == "<"
        assert ("Oslo" in text) == (end in (1, 5)) and ("Cold." in text) == (end in (3, 7))


@pytest.mark.parametrize("family", ORIGINALS or ["none"])
def test_nothing_but_the_answers_is_learnt_around_calls(family):
    """Two calls in turn after an earlier exchange: what the tool says and what was asked is context only."""
    tokenizer, messages = tokenizer_for(read_template(family)), exchanges("ask A", "first answer", "ask B")
    for city in ("Oslo", "Rome"):
        call = CALL | {"id": "call_1abcd", "function": {"name": "get_weather", "arguments": {"city": city}}}
        messages += message("assistant", "", tool_calls=[call]), message("tool", "heard", **SAID)
    try:
        rows = render_all([*messages, message("assistant", "last answer")], tokenizer, tools=[TOOL])
    except qlora.RowError:
        assert family in WITHOUT_CALLS | {"llama3_1", "llama3_2"}, "these write one call at most"
        return
    learnt = "".join(segment["text"] for row in rows for segment in row if segment["supervised"])
    assert "ask" not in learnt and "heard" not in learnt
    assert all(learnt.count(own) == 1 for own in ("Oslo", "Rome", "first answer", "last answer"))


def test_families_that_drop_earlier_reasoning_are_trained():
    """A row for each of two answers with reasoning; with the other templates both are in one."""
    need_templates()
    several = {
        family
        for family in ORIGINALS
        if family not in PICTURES and len(render_all(CHATS["reasoning"], tokenizer_for(read_template(family)))) == 2
    }
    names = "deepseek_r1_distill deepseekv3 diffusion_gemma gemma4_v5 glm4moe gptoss nemotron_3_5_lightning"
    names += (
        " nemotron_3_nano nemotron_3_super nemotron_3_ultra phi3 phi3_5 qwen3 qwen3_5_nothink qwen3_5_think qwen3_6"
    )
    assert several == set(names.split())


@pytest.mark.parametrize("family", ORIGINALS or ["none"])
def test_arguments_as_json_text_are_the_arguments(family):
    """Rows are the same, and hold every part of the call once as the template writes parts; or the row is refused."""
    tokenizer, arguments = tokenizer_for(read_template(family)), {"city": "Oslo", "days": 2, "note": 'say "hi"\nnow'}
    made = []
    for given in (arguments, json.dumps(arguments)):
        call = {"id": "call_1abcd", "type": "function", "function": {"name": "get_weather", "arguments": given}}
        messages = [message("user", "Weather?"), message("assistant", None, tool_calls=[call])]
        try:
            made.append(render_all(messages, tokenizer, tools=[TOOL]))
        except qlora.RowError as error:
            assert family in WITHOUT_CALLS
            made.append(str(error))
    assert made[0] == made[1]
    assert isinstance(made[0], str) == (family in WITHOUT_CALLS)
    if family not in WITHOUT_CALLS:
        (segments,) = made[0]
        (learnt,) = [segment["text"] for segment in segments if segment["supervised"]]
        assert all(part in learnt for part in ("get_weather", "city", "Oslo", "days", "2", "note", "say ", "now"))
        assert '\\"city' not in learnt and "'city'" not in learnt  # neither JSON in a string nor Python
