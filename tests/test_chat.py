"""Conversations: airoboros_chat, chat templates, rows that a user's function makes.

Expected ids are spelt by hand with the byte tokenizer ("a" is 97), or come from sentencepiece, tokenizers or
apply_chat_template alone.
"""

import datetime
import json
import logging
import re

import pytest
import tiny
from datasets import Dataset
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer

import qlora

BOS, EOS = tiny.BOS, tiny.EOS
NO = -100
IM_START, IM_END = 259, 260  # in chatml_tokenizer()


def load(file, tokenizer=None, *argv):
    return qlora.load_splits(qlora.parse_config(["--dataset", str(file), *map(str, argv)]), tokenizer)


def encode(segments, tokenizer, *limits, rendered=False, **options):
    """Ids and labels of one row."""
    rows = {"segments": [segments], "rendered": [rendered]}
    columns = qlora.encode_batch(rows, tokenizer, qlora.Limits(*(limits or (999, 999))), **options)
    return columns["input_ids"][0], columns["labels"][0]


def error_of(file, tokenizer=None, *argv):
    with pytest.raises(qlora.ConfigError) as caught:
        load(file, tokenizer, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shared(*values, who="from", what="value"):
    """Turns of human and gpt, one after the other; a first one that begins with `system:` is the system's."""
    turns = []
    if values[0].startswith("system:"):
        turns, values = [{who: "system", what: values[0].removeprefix("system:")}], values[1:]
    names = ("human", "gpt") if who == "from" else ("user", "assistant")
    return turns + [{who: names[n % 2], what: value} for n, value in enumerate(values)]


# ------------------------------------------------------------------------------------
# airoboros_chat
# ------------------------------------------------------------------------------------

OWN_SYSTEM = "<<SYS>>\nYou are an unbiased, uncensored, helpful assistant.\n<</SYS>>\n\n"
# Turns; what stands before each pair of EOS and BOS, and after the last; what is supervised.
AIROBOROS_CHAT = [
    (["Hi", "Hello"], [f"[INST] {OWN_SYSTEM}Hi [/INST]"], "Hello"),
    ([" Hi\n", " Hello \n"], [f"[INST] {OWN_SYSTEM} Hi\n [/INST]"], " Hello \n"),  # neither is stripped
    (["system:Be brief.", "Hi", "Hello"], ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"], "Hello"),
    (
        [" a ", "\nb ", " c\n", " d "],
        [f"[INST] {OWN_SYSTEM} a  [/INST] b ", "[INST] c [/INST]"],
        " d ",
    ),
    (
        ["system:S", "a", "b", "c", "d", " e", "f "],
        ["[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b ", "[INST] c [/INST] d ", "[INST] e [/INST]"],
        "f ",
    ),
    # What a user wrote stays text, also where it looks like a separator.
    (
        ["a</s><s>b", "</s>", "<s>", "x</s>"],
        [f"[INST] {OWN_SYSTEM}a</s><s>b [/INST] </s> ", "[INST] <s> [/INST]"],
        "x</s>",
    ),
]
CHAT_IDS = [f"{len(turns)} turns {number}" for number, (turns, *_) in enumerate(AIROBOROS_CHAT)]


def chat_pair(turns):
    return qlora.FORMATS["airoboros_chat"].parse({"conversations": shared(*turns)})


@pytest.mark.parametrize(("turns", "prompt", "answer"), AIROBOROS_CHAT, ids=CHAT_IDS)
def test_airoboros_chat_in_text(byte_tokenizer, turns, prompt, answer):
    shown = qlora.decoded_pair(chat_pair(turns), False, byte_tokenizer)
    assert shown == {"input": "</s><s>".join(prompt), "output": answer}


@pytest.mark.parametrize("kind", ["byte", "byte_bpe", "sentencepiece", "byte_bpe without BOS"])
@pytest.mark.parametrize(("turns", "prompt", "answer"), AIROBOROS_CHAT, ids=CHAT_IDS)
def test_airoboros_chat_in_ids(tokenizers, kind, turns, prompt, answer):
    """Pieces between the separators are tokenised each by itself; only the last answer and EOS are supervised."""
    name, _, without = kind.partition(" ")
    folder = tokenizers(name, **({"bos": None} if without else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "sentencepiece":
        model, bos, eos = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), [1], [2]

        def encode_alone(text):
            return model.encode(text.removeprefix(" "))  # transformers adds no second space before a first one

    else:
        plain = Tokenizer(tokenizer.backend_tokenizer.model)  # the same merges and no special tokens
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bos, eos = {"byte": ([256], [257]), "byte_bpe": ([508], [509])}[name]
        if without:
            bos, eos = [], [508]

        def encode_alone(text):
            return plain.encode(text).ids

    first, *others = prompt
    source = [*bos, *encode_alone(first)]
    for piece in others:
        source += [*eos, *bos, *encode_alone(piece)]
    target = [*encode_alone(answer), *eos]
    ids, labels = encode(chat_pair(turns), tokenizer)
    assert ids == source + target
    assert labels == [NO] * len(source) + target


def test_airoboros_chat_spelt_out(byte_tokenizer):
    """No token, not even a space, stands between the last `[/INST]` and the answer."""
    ids, labels = encode(chat_pair(["system:s", "a", "b", "c", "d"]), byte_tokenizer)
    first = b"[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b "
    assert ids == [256, *first, 257, 256, *b"[INST] c [/INST]", 100, 257]
    assert labels == [NO] * (len(ids) - 2) + [100, 257]


BAD_CHATS = {
    "gpt first": shared("a", "b")[::-1],
    "human twice": [*shared("a"), *shared("a", "b")],
    "gpt twice": [*shared("a", "b"), {"from": "gpt", "value": "c"}],
    "no gpt turn": shared("a"),
    "no final gpt turn": shared("a", "b", "c"),
    "system alone": shared("system:s"),
    "system late": [*shared("a", "b"), {"from": "system", "value": "s"}, *shared("a", "b")],
    "unknown name": [{"from": "cat", "value": "a"}, {"from": "gpt", "value": "b"}],
    "no turns": [],
    "no list": "a",
    "no object": ["a", "b"],
    "no value": [{"from": "human"}, {"from": "gpt", "value": "b"}],
    "null": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}],
    "empty": shared("a", " \n"),
    "empty between": shared("a", "", "c", "d"),
    "a list": [*shared("a"), {"from": "gpt", "value": ["b"]}],
}


@pytest.mark.parametrize("name", BAD_CHATS)
@pytest.mark.parametrize("expand", [False, True])
def test_an_invalid_conversation_is_one_bad_row(tmp_path, name, expand):
    good, bad = {"conversations": shared("a", "b", "c", "d")}, {"conversations": BAD_CHATS[name]}
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [good, bad])
    flags = ("--dataset_format", "airoboros_chat", "--expand_conversations", expand, "--output_dir", tmp_path / "out")
    message = error_of(file, None, *flags)
    assert message.startswith(f"{file}:2: ") and "expected" in message and "more such" not in message
    rows = load(file, None, *flags, "--on_bad_rows", "skip").train
    assert len(rows) == (2 if expand else 1)
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["row"] == bad


def test_expand_conversations(tmp_path, byte_tokenizer):
    """One row for each answer, with all that precedes it; a single exchange stays one row."""
    turns = ["system:s", "a", "b", "c", "d", "e", "f"]
    rows = [{"conversations": shared(*turns)}, {"conversations": shared("x", "y")}]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load(file, None, "--dataset_format", "airoboros_chat", "--expand_conversations").train
    expected = [chat_pair(turns[:3]), chat_pair(turns[:5]), chat_pair(turns), chat_pair(["x", "y"])]
    assert loaded["segments"][:] == expected
    assert [where.rpartition(":")[2] for where in loaded["where"]] == ["1", "1", "1", "2"]
    encoded = qlora.encode_splits(
        qlora.Splits(loaded, None), byte_tokenizer, qlora.parse_config(["--source_max_len", "999"])
    ).train
    supervised = [bytes(i for i in labels if 0 <= i < 256) for labels in encoded["labels"]]
    assert supervised == [b"b", b"d", b"f", b"y"]
    without = load(file, None, "--dataset_format", "airoboros_chat").train  # not the rows of the cache
    assert without["segments"][:] == [expected[2], expected[3]]


def test_model_max_len_drops_or_cuts_a_conversation(tmp_path, byte_tokenizer):
    """Cut from the left, after BOS; the answer's marker stays, and longer rows are dropped unless told otherwise."""
    turns = ["system:s", "a", "b", "c", "d"]
    whole, _ = encode(chat_pair(turns), byte_tokenizer)
    assert encode(chat_pair(turns), byte_tokenizer, 1, 1, len(whole))[0] == whole  # exactly that length fits
    ids, labels = encode(chat_pair(turns), byte_tokenizer, 1, 1, 24)
    assert ids == [256, *whole[-23:]] and bytes(ids[-18:-2]) == b"[INST] c [/INST]"
    assert labels[-2:] == [100, 257] and set(labels[:-2]) == {NO}

    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"conversations": shared(*t)} for t in (turns, turns[:3], turns)])
    total, short = len(whole), 1 + len(b"[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]b") + 1
    for limit, skip, lengths in (
        (total, True, [total, short, total]),
        (total - 1, True, [short]),
        (total - 1, False, [total - 1, short, total - 1]),
    ):
        flags = ["--dataset_format", "airoboros_chat", "--model_max_len", limit, "--skip_excess_length", skip]
        config = qlora.parse_config(["--dataset", str(file), *map(str, flags)])
        encoded = qlora.encode_splits(qlora.load_splits(config), byte_tokenizer, config).train
        assert encoded["length"][:] == lengths


# ------------------------------------------------------------------------------------
# include_sources, category
# ------------------------------------------------------------------------------------


def test_include_sources(tmp_path):
    names = ["orca", "gsm8k", "orca ", None, "other", 7]
    rows = [{"input": "q", "output": str(number), "source": name} for number, name in enumerate(names)]
    rows.append({"input": "q", "output": "no source"})
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)

    def outputs(*argv):
        return [segments[-1]["text"] for segments in load(file, None, *argv).train["segments"]]

    assert len(outputs()) == len(outputs("--include_sources", "ALL")) == 7
    assert outputs("--include_sources", "orca") == ["0"]
    assert outputs("--include_sources", "gsm8k, orca,7") == ["0", "1", "5"]
    message = error_of(file, None, "--include_sources", "orc")
    assert "--include_sources orc" in message and str(file) in message


def test_a_row_that_is_left_out_by_its_source_may_be_bad(tmp_path):
    rows = [{"input": "q", "output": "a", "source": "x"}, {"input": "q", "output": None, "source": "y"}]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    assert len(load(file, None, "--include_sources", "x").train) == 1
    assert f"{file}:2" in error_of(file, None, "--include_sources", "x,y")


def test_include_sources_needs_the_column(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": "q", "output": "a"}])
    message = error_of(file, None, "--include_sources", "x")
    assert message == f"{file}: no row has a source in --include_sources x"


def test_category_stratifies_airoboros_rows(tmp_path):
    """Of 40 rows of two categories and one row of a third, a quarter of each is held out; one row breaks nothing."""
    rows = [{"instruction": f"{n}", "response": c, "category": c} for c, k in (("x", 28), ("y", 12)) for n in range(k)]
    rows.append({"instruction": "q", "response": "z", "category": "z"})
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    splits = load(file, None, "--do_eval", "--eval_dataset_size", "10")
    held_out = [row[-1]["text"].strip() for row in splits.eval["segments"]]
    assert (held_out.count("x"), held_out.count("y"), len(held_out)) == (7, 3, 10)
    assert len(splits.train) == 31


# ------------------------------------------------------------------------------------
# Chat templates
# ------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
STOPLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# As Qwen3's does with reasoning: what stands before an answer goes once another turn follows.
CHANGING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% if c.id is defined %}#{{ c.id }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = shared("system:Be kind.", "Hi", "Hello", "Where is the ship?", "In the harbour.", who="role", what="content")


def chatml_tokenizer(template=CHATML, **options):
    tokenizer = tiny.byte_tokenizer(extra=("<|im_start|>", "<|im_end|>"), **options)
    tokenizer.chat_template = template
    return tokenizer


def render_all(messages, tokenizer, **columns):
    """The rows of a chat."""
    chat = qlora.FORMATS["messages"].parse({"messages": messages, **columns})
    return [row.segments for row in qlora.render_chat(chat, tokenizer)]


def render(messages, tokenizer, **columns):
    """The segments of a chat that is one row."""
    (segments,) = render_all(messages, tokenizer, **columns)
    return segments


def texts(segments, supervised=True):
    return [segment["text"] for segment in segments if segment["supervised"] == supervised]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_every_answer_is_supervised_and_nothing_else(template):
    """Two ways to find the answers, the same ids and labels, spelt by hand."""
    tokenizer = chatml_tokenizer(template)
    messages = shared("system:s", "a", "b", "c", "de", who="role", what="content")
    ids, labels = encode(render(messages, tokenizer), tokenizer, rendered=True)
    expected, supervised = [], []
    for role, content in ((b"system", b"s"), (b"user", b"a"), (b"assistant", b"b"), (b"user", b"c")):
        piece = [IM_START, *role, 10, *content, IM_END]
        expected += [*piece, 10]
        supervised += [NO] * (len(piece) - 2) + ([98, IM_END] if content == b"b" else [NO, NO]) + [NO]
    expected += [IM_START, *b"assistant", 10, 100, 101, IM_END, 10]
    supervised += [NO] * 11 + [100, 101, IM_END, NO]
    assert ids == expected
    assert labels == supervised


@pytest.mark.parametrize(
    ("template", "supervised"),
    [
        (CHATML, ["Hello<|im_end|>", "In the harbour.<|im_end|>"]),
        (LLAMA2, [" Hello </s>", " In the harbour. </s>"]),
        (VICUNA, [" Hello</s>", " In the harbour.</s>"]),
        (STOPLESS, ["assistant: Hello\n", "assistant: In the harbour.\n"]),  # without a prompt it writes its name
    ],
    ids=["chatml", "llama-2", "vicuna", "stopless"],
)
@pytest.mark.parametrize("name", ["byte", "byte_bpe", "sentencepiece"])
def test_ids_equal_apply_chat_template_and_labels_spell_the_answers(tokenizers, name, template, supervised):
    """The ids are apply_chat_template's; decoded in runs, the labels are what is supervised."""
    extra = {} if name == "sentencepiece" else {"extra": ("<|im_start|>", "<|im_end|>")}
    tokenizer = AutoTokenizer.from_pretrained(tokenizers(name, **extra))
    tokenizer.chat_template = template
    messages = LONG[1:]
    segments = render(messages, tokenizer)
    if not extra and template == CHATML:  # whose stop is plain text there
        supervised = [text + "\n" for text in supervised]
    assert texts(segments) == supervised
    assert "".join(segment["text"] for segment in segments) == tokenizer.apply_chat_template(messages, tokenize=False)
    ids, labels = encode(segments, tokenizer, rendered=True)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    runs, before = [], NO
    for label in labels:
        if label != NO:
            runs = [*runs, []] if before == NO else runs
            runs[-1].append(label)
        before = label
    assert [tokenizer.decode(run).strip() for run in runs] == [text.strip() for text in supervised]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert "".join(segment["text"] for segment in segments[: qlora.last_supervised(segments)]) == prompt


@pytest.mark.parametrize(
    ("name", "template"),
    [("byte", CHATML), ("byte", LLAMA2), ("byte_bpe", CHATML), ("byte_bpe", LLAMA2), ("sentencepiece", LLAMA2)],
)
def test_special_tokens_in_a_message_stay_text(tokenizers, name, template):
    extra = {} if name == "sentencepiece" else {"extra": ("<|im_start|>", "<|im_end|>")}
    tokenizer = AutoTokenizer.from_pretrained(tokenizers(name, **extra))
    tokenizer.chat_template = template
    special = set(tokenizer.added_tokens_decoder)

    def specials(question, answer):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        segments = render(messages, tokenizer)
        ids, labels = encode(segments, tokenizer, rendered=True)
        shown = qlora.decoded_pair(segments, True, tokenizer)
        assert question in shown["input"] and shown["output"].strip() == answer.strip()
        assert question in tokenizer.decode(ids) and answer in tokenizer.decode([i for i in labels if i != NO])
        return [i for i in ids if i in special]

    plain = specials("Hi there", "The lamp")
    assert plain and specials("a </s> b <s>", "The </s> lamp<|im_end|> <|im_start|>") == plain


def test_tools_roles_and_nulls_as_parquet_has_them(tmp_path):
    """A tool call without content, a tool's turn, nulls that Arrow adds, tools as a list or as JSON with a null."""
    tokenizer = chatml_tokenizer(TOOLS)
    call = {"type": "function", "function": {"name": "ask", "arguments": {"city": "Oslo"}}, "id": None}
    messages = [
        {"role": "system", "content": "s", "tool_calls": None},
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "cold", "tool_calls": None},
        {"role": "assistant", "content": "It is cold.", "tool_calls": None},
    ]
    tools = [{"type": "function", "function": {"name": "ask", "description": None}}]
    for column, function in ((tools, '{"name": "ask"}'), (json.dumps(tools), '{"name": "ask", "description": null}')):
        told = f'<|im_start|>tools\n[{{"type": "function", "function": {function}}}]<|im_end|>\n<|im_start|>system\ns'
        file = tiny.rows_to_parquet(tmp_path / "a.parquet", [{"messages": messages, "tools": column}])
        (segments,) = load(file, tokenizer).train["segments"]
        assert texts(segments) == ['ask({"city": "Oslo"})<|im_end|>', "It is cold.<|im_end|>"]
        assert segments[0]["text"].startswith(told)
    assert texts(render(messages, tokenizer), False)[0].startswith("<|im_start|>system")
    with pytest.raises(qlora.RowError, match=r"'tools'.*expected a list"):
        render(messages, tokenizer, tools="none")
    with pytest.raises(qlora.RowError, match=r'messages\[1\].*"tool".*assistant'):
        render([messages[1], messages[3]], tokenizer)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("Human", "user"),
        *((name, "assistant") for name in ("gpt", "assistant", "chatgpt", "bing", "bard", "GPT")),
        *((name, "tool") for name in ("tool", "function")),
        ("system", "system"),
    ],
)
def test_the_speakers_of_sharegpt(name, role):
    before = {"user": "", "system": "", "assistant": "a", "tool": "ab"}[role]
    turns = [*shared(*before)] if before else []
    after = {"user": "gpt", "system": "", "assistant": "", "tool": "gpt"}[role]
    turns.append({"from": name, "value": "x"})
    turns += [{"from": after, "value": "y"}] if after else shared("z", "y") if role == "system" else []
    chat = qlora.FORMATS["sharegpt"].parse({"conversations": turns})
    assert [m["role"] for m in chat.messages if m["content"] == "x"] == [role] and chat.tools is None


def test_messages_and_sharegpt_give_the_same_rows(tmp_path):
    """Either spelling of the turns, in either column, in a column or as JSON in a CSV cell."""
    tokenizer, expected = chatml_tokenizer(), render(LONG, chatml_tokenizer())
    said = ("system:Be kind.", "Hi", "Hello", "Where is the ship?", "In the harbour.")
    files = [
        tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}]),
        tiny.rows_to_jsonl(tmp_path / "b.jsonl", [{"conversations": shared(*said)}]),
        tiny.rows_to_jsonl(tmp_path / "c.jsonl", [{"conversations": LONG}]),
        tiny.rows_to_csv(tmp_path / "d.csv", [{"messages": json.dumps(LONG)}]),
    ]
    for file in files:
        rows = load(file, tokenizer).train
        assert rows["segments"][:] == [expected] and rows["rendered"][:] == [True]


def test_turns_after_the_last_answer_are_dropped():
    tokenizer = chatml_tokenizer()
    question = {"role": "user", "content": "And then?"}
    assert render([*LONG, question], tokenizer) == render(LONG, tokenizer)


BAD_MESSAGES = {
    "assistant first": (LONG[2:], "messages[0]"),
    "user twice": ([LONG[1], *LONG[1:]], "messages[1]"),
    "assistant twice": ([*LONG, LONG[-1]], "messages[5]"),
    "system late": ([*LONG, LONG[0]], "messages[5]"),
    "no assistant": (LONG[:2], "assistant"),
    "no messages": ([], "assistant"),
    "unknown role": ([{"role": "cat", "content": "a"}], '"cat"'),
    "no role": ([{"content": "a"}], "messages[0].role"),
    "no content": ([LONG[1], {"role": "assistant"}], "messages[1].content"),
    "empty answer": ([LONG[1], {"role": "assistant", "content": " "}], "messages[1]"),
    "parts": ([LONG[1], {"role": "assistant", "content": [{"type": "text"}]}], "messages[1].content"),
    "noncharacter": ([LONG[1], {"role": "assistant", "content": "a\ufdd0"}], "messages[1].content"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_invalid_messages_are_a_bad_row(tmp_path, name):
    messages, named = BAD_MESSAGES[name]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": messages}])
    message = error_of(file, chatml_tokenizer())
    assert message.startswith(f"{file}:2: ") and named in message and "expected" in message
    flags = ("--on_bad_rows", "skip", "--output_dir", tmp_path / "out")
    assert len(load(file, chatml_tokenizer(), *flags).train) == 1


def test_a_template_that_changes_earlier_turns(tmp_path, caplog):
    """One exchange is one row. Of two that do not join, each answer is a row with the prompt for generating it."""
    tokenizer = chatml_tokenizer(CHANGING)
    assert texts(render(LONG[:3], tokenizer)) == ["<think></think>Hello<|im_end|>"]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG[:3]}, {"messages": LONG}])
    with caplog.at_level(logging.INFO, "qlora"):
        rows = load(file, tokenizer).train
    assert [where.rpartition(":")[2] for where in rows["where"]] == ["1", "2", "2"]
    assert any("2 chats became 3 rows" in message for message in caplog.messages)
    for segments, answer, end in zip(
        rows["segments"], ["Hello", *["Hello", "In the harbour."]], (2, 2, 4), strict=True
    ):
        prompt = tokenizer.apply_chat_template(LONG[:end], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(LONG[: end + 1], tokenize=False)
        assert "".join(segment["text"] for segment in segments) == whole
        last = qlora.last_supervised(segments)
        assert "".join(segment["text"] for segment in segments[:last]) == prompt
        assert texts(segments) == [f"<think></think>{answer}<|im_end|>"]
    marked = MARKED.replace("{% generation %}", "{% generation %}{% if loop.last %}<think></think>{% endif %}")
    supervised = texts(render(LONG, chatml_tokenizer(marked)))
    assert supervised == ["Hello<|im_end|>", "<think></think>In the harbour.<|im_end|>"]


@pytest.mark.parametrize("category", [{}, {"category": "x"}])
def test_rows_of_one_chat_are_on_one_side(tmp_path, category):
    """Of ten chats of two rows each, three are held out whole."""
    chats = [[{**m, "content": f"{n} {m['content']}"} for m in LONG] for n in range(10)]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": chat, **category} for chat in chats])
    splits = load(file, chatml_tokenizer(CHANGING), "--do_eval", "--eval_dataset_size", 3)
    train, held_out = ([where.rpartition(":")[2] for where in rows["where"][:]] for rows in splits)
    assert len(set(held_out)) == 3 and len(held_out) == 6 and len(train) == 14 and not {*train} & {*held_out}
    alone = tiny.rows_to_jsonl(tmp_path / "b.jsonl", [{"messages": LONG}])
    assert "leaves nothing to train on" in error_of(alone, chatml_tokenizer(CHANGING), "--do_eval")


@pytest.mark.parametrize("when", ["loop.last", "add_generation_prompt and loop.last"])
def test_a_template_that_changes_the_question_once_it_is_answered(when):
    """Each answer is learnt after the prompt that the template writes for generating it."""
    changed = f"{{{{ m.content }}}}{{{{ '?' if {when} and m.role == 'user' }}}}"
    tokenizer = chatml_tokenizer(CHATML.replace("{{ m.content }}", changed))
    rows = render_all(LONG, tokenizer)
    for segments, end, answer in zip(rows, (3, 5), ("Hello", "In the harbour."), strict=True):
        prompt = tokenizer.apply_chat_template(LONG[: end - 1], tokenize=False, add_generation_prompt=True)
        last = qlora.last_supervised(segments)
        assert "".join(segment["text"] for segment in segments[:last]) == prompt
        assert texts(segments) == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize("content", ["<table><tr>x</tr></table>", "[1, 2]", "<|x|>"])
def test_an_answer_that_begins_like_the_end_of_the_prompt(content):
    """The prompt ends in a tag that the answer lacks; the answer is learnt from its own first character on."""
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    assert template != CHATML
    (supervised,) = texts(render([LONG[1], LONG[2] | {"content": content}], chatml_tokenizer(template)))
    assert supervised == f"{content}<|im_end|>"


def test_an_answer_of_weight_0_among_marked_ones():
    messages = [dict(message) for message in (*LONG, LONG[1], {"role": "assistant", "content": "Third."})]
    messages[2]["weight"] = 0
    assert texts(render(messages, chatml_tokenizer(MARKED))) == ["In the harbour.<|im_end|>", "Third.<|im_end|>"]


def test_calls_in_llama_s_spelling():
    calls = [{"name": "count", "parameters": {"of": "ships"}}]
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "tool_calls": calls}]
    conversation = qlora.FORMATS["messages"].parse({"messages": messages})
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "count", "arguments": {"of": "ships"}}


# As Mistral's: the system turn stands in the first question.
MISTRAL = (
    "{% set first = messages[1:] if messages[0].role == 'system' else messages %}{% for m in first %}"
    "{% if m.role == 'user' %}[INST] {% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        MARKED,
        CHANGING,
        VICUNA,
        STOPLESS,
        MISTRAL,
        LLAMA2.replace("{% else %}", "{% elif m.role != 'system' %}"),
    ],
    ids=["chatml", "marked", "changing", "vicuna", "stopless", "mistral", "llama-2"],
)
@pytest.mark.parametrize("system", [True, False])
def test_a_chat_that_is_too_long_is_what_the_template_writes_without_its_first_exchanges(template, system):
    """One token too few for the prompt of so many exchanges, and another one goes."""
    if template == VICUNA and system:
        pytest.skip("it writes a system turn as an answer")
    tokenizer = chatml_tokenizer(template)
    words = ["Why?", "So.", "Whither?", "Sow.", "Why not?", "Well.", "Why?", "So."]
    head = [{"role": "system", "content": "Be kind."}] * system
    chat = shared(*words, who="role", what="content")
    parsed = qlora.FORMATS["messages"].parse({"messages": [*head, *chat]})

    def prompt_of(messages):
        segments = render_all(messages, tokenizer)[-1]
        prompt = "".join(segment["text"] for segment in segments[: qlora.last_supervised(segments)])
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    for kept in range(1, 4):
        shorter, fuller = ([*head, *chat[-2 * count :]] for count in (kept, kept + 1))
        for room in (prompt_of(shorter), prompt_of(fuller) - 1):
            row = list(qlora.render_within(parsed, tokenizer, qlora.Limits(room, 99)))[-1]
            assert "".join(s["text"] for s in row.segments) == tokenizer.apply_chat_template(shorter, tokenize=False)
            silent = ["system turns that the chat template does not write"] * (system and "!= 'system'" in template)
            assert row.left_out == [*silent, qlora.OLDEST_EXCHANGES]
            assert row.segments == render_all(shorter, tokenizer)[-1]


def test_another_tokenizer_cuts_a_chat_by_its_own_tokens(tmp_path):
    """With the same template and special tokens: the rows that one has cut are not found in the cache of the other."""
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"messages": shared(*"abcdef", who="role", what="content")}])
    flags = ["--dataset", str(file), "--source_max_len", "25", "--cache_dir", str(tmp_path / "cache")]
    lost = []
    for tokenizer in (chatml_tokenizer(), chatml_tokenizer(), chatml_tokenizer()):
        if lost:
            tokenizer.add_tokens(["user\n", "assistant\n"])
        lost.append(sum(qlora.load_splits(qlora.parse_config(flags), tokenizer).train["lost"][:]))
    assert lost[0] > lost[1] == lost[2]


# ------------------------------------------------------------------------------------
# Tool calls
# ------------------------------------------------------------------------------------

WEATHER = {"type": "function", "function": {"name": "ask", "arguments": {"city": "Oslo", "when": None}}}
ASKED = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [WEATHER]}]
TOOLS_AS_TEXT = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments")  # as DeepSeek's expects them
WITHOUT_TOOLS = TOOLS.replace("m.tool_calls or []", "[]")


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "assistant", "tool_calls": json.dumps([WEATHER])},
        {"role": "assistant", "tool_calls": [WEATHER["function"]]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "ask", "arguments": '{"city": "Oslo", "when": null}'}}],
        },
        {"role": "assistant", "content": None, "function_call": WEATHER["function"]},
        {"from": "function_call", "value": '{"name": "ask", "arguments": {"city": "Oslo", "when": null}}'},
        {"from": "function_call", "value": json.dumps([WEATHER["function"]])},
    ],
    ids=["openai", "list as text", "bare", "arguments as text", "function_call", "llama-factory", "list"],
)
@pytest.mark.parametrize("template", [TOOLS, TOOLS_AS_TEXT], ids=["object", "text"])
def test_a_call_is_the_same_however_it_is_spelt(template, turn):
    """And a null that was written stays."""
    question = {"from": "human", "value": "Weather?"} if "from" in turn else ASKED[0]
    assert texts(render([question, turn], chatml_tokenizer(template))) == [
        'ask({"city": "Oslo", "when": null})<|im_end|>'
    ]


@pytest.mark.parametrize(
    "empty", [{"tool_calls": []}, {"tool_calls": None}, {"tool_calls": "[]"}, {"function_call": None}]
)
@pytest.mark.parametrize(
    "tools", [{}, {"tools": []}, {"tools": "[]"}, {"tools": None}, {"tools": ""}, {"functions": []}]
)
def test_no_calls_and_no_tools_are_absent(empty, tools):
    template = "{% if tools is not none %}{{ raise_exception('tools') }}{% endif %}" + CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if 'tool_calls' in m or 'function_call' in m %}{{ 1 / 0 }}{% endif %}"
    )
    messages = [LONG[1], {**LONG[2], **empty}]
    assert texts(render(messages, chatml_tokenizer(template), **tools)) == ["Hello<|im_end|>"]


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        ("ask", "tool_calls"),
        ([3], "tool_calls"),
        ([{"name": 3}], "a name"),
        ([{"name": "a", "arguments": "{"}], "arguments"),
    ],
)
def test_a_call_that_is_none_is_a_bad_row(calls, named):
    with pytest.raises(qlora.RowError, match=named):
        render([ASKED[0], {"role": "assistant", "tool_calls": calls}], chatml_tokenizer(TOOLS))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nulls_that_were_written_stay_and_nulls_that_arrow_adds_go(tmp_path, kind):
    """Parquet's two calls share their columns, so that each gets the other's argument as null."""
    calls = [
        {"name": "ask", "arguments": {"city": "Oslo"}},
        {"name": "ask", "arguments": {"when": None, "days": [None, 2]}},
    ]
    rows = [{"messages": [ASKED[0], {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    file = (tiny.rows_to_jsonl if kind == "jsonl" else tiny.rows_to_parquet)(tmp_path / f"a.{kind}", rows)
    first, second = (texts(segments) for segments in load(file, chatml_tokenizer(TOOLS)).train["segments"])
    assert first == ['ask({"city": "Oslo"})<|im_end|>']
    kept = '"when": null, ' if kind == "jsonl" else ""
    assert second == [f'ask({{{kept}"days": [null, 2]}})<|im_end|>']


def test_an_argument_in_single_quotes_is_found():
    """As LFM2 writes Python's strings."""
    value = r"""'city=' ~ c.function.arguments.city | replace("'", "\\'")"""
    template = TOOLS.replace("c.function.arguments | tojson", value)
    call = {"name": "ask", "arguments": {"city": "it's"}}
    turns = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert texts(render(turns, chatml_tokenizer(template))) == ["ask(city=it\\'s)<|im_end|>"]


def test_functions_are_tools_and_developers_are_systems():
    functions = [{"name": "ask", "parameters": {}}]
    messages = [{"role": "developer", "content": "s"}, *ASKED, {"role": "function", "name": "ask", "content": "cold"}]
    messages.append({"role": "assistant", "content": "Cold."})
    tokenizer = chatml_tokenizer(TOOLS)
    rendered = "".join(texts(render(messages, tokenizer, functions=functions), False))
    assert rendered.startswith(
        '<|im_start|>tools\n[{"type": "function", "function": {"name": "ask", "parameters": {}}}]<|im_end|>\n'
        "<|im_start|>system\ns<|im_end|>"
    )
    assert "<|im_start|>tool\ncold<|im_end|>" in rendered


# ------------------------------------------------------------------------------------
# An answer reaches the model, or the row is bad
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "turn", "missing"),
    [
        (WITHOUT_TOOLS, {"content": "", "tool_calls": [WEATHER]}, "ask"),  # the bare stop token would be learnt
        (TOOLS, {"content": "", "tool_calls": [WEATHER]}, None),
        (TOOLS.replace("{{ c.function.name }}", ""), {"content": "", "tool_calls": [WEATHER]}, "ask"),
        (TOOLS.replace("| tojson", "| length"), {"content": "", "tool_calls": [WEATHER]}, "Oslo"),
        (
            TOOLS.replace("{% if m.content", "{% if not m.tool_calls"),
            {"content": "Well:", "tool_calls": [WEATHER]},
            "Well",
        ),
        (CHATML.replace("m.content", "m.content[:5]"), {"content": "Hello there"}, "Hello there"),
        (CHATML.replace("m.content", "m.content | trim"), {"content": " Hello\n\nthere "}, None),
        (
            CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
            {"content": "<think>Hm.</think>\nHello"},
            None,
        ),
        (MARKED.replace("{{ m.content }}<|im_end|>{% end", "<|im_end|>{% end"), {"content": "Hello"}, "Hello"),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_a_bad_row(template, turn, missing):
    messages = [ASKED[0], {"role": "assistant", **turn}]
    if missing is None:
        assert render(messages, chatml_tokenizer(template))
        return
    with pytest.raises(qlora.RowError, match=rf"turn 2: .*{missing}.*--chat_template"):
        render(messages, chatml_tokenizer(template))


def test_arguments_that_a_template_writes_as_python_become_json_text():
    expected = ['ask({"city": "Oslo", "when": null})<|im_end|>']
    assert texts(render(ASKED, chatml_tokenizer(TOOLS_AS_TEXT))) == expected
    refusing = TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    assert texts(render(ASKED, chatml_tokenizer(refusing))) == expected


def test_arguments_hold_whatever_they_hold():
    """Nested, quoted, in other scripts, as JSON or raw: no false alarm."""
    arguments = {"a": [1, 2.5, {"b": 'say "hi"\\n\n\tnow'}], "ö": "日本 é", "c": True, "d": None, "e": "", "f": {}}
    call = {"name": "ask", "arguments": arguments}
    for template in (
        TOOLS,
        TOOLS.replace("tojson", "tojson(ensure_ascii=true)"),
        TOOLS.replace("tojson", "tojson(indent=2)"),
    ):
        (learnt,) = texts(render([ASKED[0], {"role": "assistant", "tool_calls": [call]}], chatml_tokenizer(template)))
        assert json.loads(learnt.removeprefix("ask(").removesuffix(")<|im_end|>")) == arguments


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_marks_of_reasoning_in_an_answer_are_tokens(template):
    """Which they are not in a question; other special tokens stay text in both."""
    tokenizer = tiny.byte_tokenizer(extra=("<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"))
    tokenizer.chat_template = template
    said = [("user", "[THINK]?"), ("assistant", "[THINK]a[/THINK]b<|im_end|>")]
    segments = render([{"role": role, "content": content} for role, content in said], tokenizer)
    ids, labels = encode(segments, tokenizer, rendered=True)
    assert [i for i in labels if i != NO] == [261, 97, 262, *b"b<|im_end|>", 260]
    assert ids.count(261) == 1 and bytes(i for i in ids if i < 256).count(b"[THINK]?") == 1


# ------------------------------------------------------------------------------------
# What a row says about itself
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss_mask", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), ("false", None)])
@pytest.mark.parametrize("template", [CHATML, CHANGING, MARKED], ids=["prefixes", "changing", "marks"])
def test_an_answer_may_be_context_only(template, key, no, yes):
    messages = [*LONG[:2], {**LONG[2], key: no}, LONG[3], {**LONG[4], key: yes}]
    segments = render(messages, chatml_tokenizer(template))
    assert [text.removeprefix("<think></think>") for text in texts(segments)] == ["In the harbour.<|im_end|>"]
    assert "".join(texts(segments, False)).count("Hello<|im_end|>") == 1


def test_what_follows_the_last_answer_to_learn_is_left_out():
    messages = [*LONG[:4], {**LONG[4], "weight": 0}]
    assert render(messages, chatml_tokenizer()) == render(LONG[:3], chatml_tokenizer())
    assert qlora.parse_chat("messages", {"messages": messages}).left_out == ["turns after the last answer to learn"]
    with pytest.raises(qlora.RowError, match="an answer to learn"):
        render([*LONG[:2], {**LONG[2], "train": False}], chatml_tokenizer())


def test_an_empty_answer_may_be_context_only():
    messages = [*LONG[:2], {**LONG[2], "content": "", "weight": 0}, *LONG[3:]]
    assert texts(render(messages, chatml_tokenizer())) == ["In the harbour.<|im_end|>"]


def test_earlier_answers_in_the_prompt_of_a_preference_are_context():
    chat = qlora.parse_chosen({"prompt": LONG[:4], "chosen": [LONG[4]], "rejected": [LONG[2]]})
    assert chat == qlora.parse_chosen({"prompt": LONG[:4], "chosen": LONG[:5], "rejected": [LONG[2]]})
    assert [turn["content"] for turn in chat.messages] == [turn["content"] for turn in LONG[:5]] and chat.answers == [4]


def test_prompt_and_completion_may_be_chats(tmp_path):
    """As TRL has them: the completion is learnt, earlier answers are its context."""
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"prompt": LONG[:4], "completion": LONG[4:]}])
    (row,) = load(file, chatml_tokenizer()).train
    assert texts(row["segments"]) == ["In the harbour.<|im_end|>"] and row["left_out"] == []
    whole = "".join(segment["text"] for segment in render(LONG, chatml_tokenizer()))
    assert "".join(segment["text"] for segment in row["segments"]) == whole
    with pytest.raises(qlora.RowError, match=r"field 'completion\[4\]\.content' is \"\", expected an answer to learn"):
        qlora.FORMATS["self-instruct"].parse({"prompt": LONG[:4], "completion": [LONG[4] | {"content": ""}]})


def test_preferences_that_are_chats_have_their_question_in_them(tmp_path):
    """A column beside them that repeats it is no prompt that is missing."""
    rows = [{"question": LONG[3]["content"], "chosen": LONG, "rejected": LONG[:2]}]
    (row,) = load(tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows), chatml_tokenizer()).train
    assert row["segments"] == render(LONG, chatml_tokenizer()) and row["left_out"] == ["question"]


@pytest.mark.parametrize(
    "names", [("messages", "role", "content", "user", "assistant"), ("conversations", "from", "value", "human", "gpt")]
)
@pytest.mark.parametrize("explicit", [False, True])
def test_nulls_that_datasets_adds_to_json_lines_are_no_arguments(tmp_path, explicit, names):
    """Its export gives every call the arguments of all, and user turns calls; nulls written by hand stay."""
    calls = [{"function": {"name": name, "arguments": {key: None if explicit else "v"}}} for name, key in ("ab", "cd")]
    column, who, what, user, assistant = names
    rows = [{column: [{who: user, what: "Go."}, {who: assistant, "tool_calls": [call]}]} for call in calls]
    file = tiny.rows_to_jsonl(tmp_path / "own.jsonl", rows)
    if not explicit:
        Dataset.from_list(rows).to_json(file)
        assert '"d":null' in file.read_text().replace(" ", "")
    written = [texts(row)[0] for row in load(file, chatml_tokenizer(TOOLS)).train["segments"]]
    value = "null" if explicit else '"v"'
    assert [text.partition("<|")[0] for text in written] == [f'a({{"b": {value}}})', f'c({{"d": {value}}})']


@pytest.mark.parametrize("weight", [0.5, 2, -1, "half", [1]])
def test_an_answer_is_learnt_whole_or_not_at_all(tmp_path, weight):
    """OpenAI's format knows no weight but 0 and 1."""
    messages = [*LONG[:2], {**LONG[2], "weight": weight}]
    message = error_of(tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), chatml_tokenizer())
    assert "a.jsonl:1: field 'messages[2].weight' is " in message
    assert "expected 1 or 0, or true or false" in message and "--on_bad_rows skip" in message


def test_airoboros_chat_honours_weights(tmp_path):
    turns = shared("a", "b", "c", "d")
    turns[1]["train"] = False
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}])
    flags = (None, "--dataset_format", "airoboros_chat", "--expand_conversations", True)
    assert [row[-1]["text"] for row in load(file, *flags).train["segments"]] == ["d"]
    turns[3]["weight"] = 0
    assert "to learn" in error_of(tiny.rows_to_jsonl(tmp_path / "b.jsonl", [{"conversations": turns}]), *flags)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_is_a_turn(name):
    tokenizer = chatml_tokenizer()
    assert render(LONG[1:], tokenizer, **{name: "Be kind."}) == render(LONG, tokenizer)
    assert render(LONG, tokenizer, **{name: "Be rude."}) == render(LONG, tokenizer)  # the turn's own comes first
    assert render(LONG[1:], tokenizer, **{name: ""}) == render(LONG[1:], tokenizer)


def left_out_of(tmp_path, caplog, tokenizer, *rows, **flags):
    """What a run says that it leaves out of these rows, and what a preview says of each."""
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    config = qlora.parse_config(["--dataset", str(file), "--preview", "9", *argv])
    caplog.clear()
    with caplog.at_level(logging.INFO, "qlora"):
        encoded = qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config).train
    said = [message.partition("left out: ")[2] for message in caplog.messages if "left out: " in message]
    titles = [title for title, _ in qlora.preview_rows(encoded, tokenizer, config)]
    return said, [title.partition("left out: ")[2] for title in titles]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_system_column_beside_another_system_turn_is_named(tmp_path, caplog, name, column):
    same, other = ({column: LONG, name: text} for text in ("Be kind.", "Be rude."))
    note = f"{name} beside another system turn"
    said = left_out_of(tmp_path, caplog, chatml_tokenizer(), same, other, {column: LONG[1:], name: "Be rude."})
    assert said == ([f"{note} (in 1 of 3 rows)"], ["", note, ""])


def test_one_of_two_columns_for_the_same_thing_is_named(tmp_path, caplog):
    tool = {"type": "function", "function": {"name": "ask"}}
    row = {"messages": LONG[1:], "system": "a", "system_prompt": "b", "tools": [tool], "functions": [{"name": "say"}]}
    said = "functions beside tools, system_prompt beside another system turn"
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(TOOLS), row)[0] == [said]


@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_that_are_no_objects_are_a_bad_row(column):
    with pytest.raises(qlora.RowError, match=rf"'{column}' is \[\"function\"\], expected a list of objects"):
        render(LONG, chatml_tokenizer(TOOLS), **{column: ["function"]})


def test_calls_in_two_places_are_a_bad_row():
    turn = {"role": "assistant", "tool_calls": [WEATHER], "function_call": {"name": "other"}}
    with pytest.raises(qlora.RowError, match=r"messages\[1\].function_call.*one place"):
        render([ASKED[0], turn], chatml_tokenizer(TOOLS))


def test_tools_and_results_that_a_template_does_not_write_are_named(tmp_path, caplog):
    """An answer that rests on them would be learnt without its ground."""
    text = {"role": "assistant", "content": "It is sunny."}
    row = {"messages": [*ASKED, {"role": "tool", "content": "SUNNY"}, text], "tools": [{"name": "ask"}]}
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(TOOLS), row) == ([], [""])
    silent = TOOLS.replace("{% if tools %}", "{% if false %}").replace("if m.content", "if m.role != 'tool'")
    first, second = (f"{what} that the chat template does not write" for what in ("tools", "tool results"))
    said = left_out_of(tmp_path, caplog, chatml_tokenizer(silent), row)
    assert said == ([f"{second}, {first}"], [f"{second}, {first}"])


def test_a_system_turn_that_a_template_does_not_write_is_named(tmp_path, caplog):
    silent = CHATML.replace(
        "<|im_start|>{{ m.role }}", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}"
    )
    assert silent != CHATML
    said = left_out_of(tmp_path, caplog, chatml_tokenizer(silent), {"messages": LONG[:3]})[0]
    assert said == ["system turns that the chat template does not write"]


@pytest.mark.parametrize("numbers", [(12, 1), (12, 7), (3, 3)])
def test_each_of_several_calls_in_a_turn_reaches_the_model(numbers):
    """gpt-oss's template writes the first one; the number of the other may be a part of its."""
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"id": n}}} for n in numbers]
    turns = [ASKED[0], {"role": "assistant", "tool_calls": calls}]
    written = texts(render(turns, chatml_tokenizer(TOOLS)))
    assert "".join(written).count('"id"') == 2
    first_only = TOOLS.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    assert first_only != TOOLS
    with pytest.raises(qlora.RowError, match=r"turn 2: the chat template does not write"):
        render(turns, chatml_tokenizer(first_only))


def test_a_marker_that_takes_white_space_is_none_of_the_answers(tmp_path):
    """Phi-3's <|assistant|>: the white space that its token swallows belongs to the answer."""
    tokenizer = tiny.byte_tokenizer(extra=("<|user|>", "<|end|>"))
    tokenizer.add_tokens([AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for answer in ("A", "\n\nA"):
        segments = render([ASKED[0] | {"content": "Q"}, {"role": "assistant", "content": answer}], tokenizer)
        ids, labels = encode(segments, tokenizer, rendered=True)
        names = tokenizer.convert_ids_to_tokens(ids)
        assert labels[names.index("<|assistant|>")] == NO and labels[names.index("A")] == ord("A")


def test_an_answer_beside_the_turns_is_refused_and_a_function_appends_it(tmp_path):
    """LLaMA-Factory's preferences; the earlier answer alone is not what they are for."""
    chosen, rejected = ({"from": "gpt", "value": value} for value in ("good", "bad"))
    row = {"conversations": shared("a", "b", "c"), "chosen": chosen, "rejected": rejected}
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [row])
    message = error_of(file, chatml_tokenizer())
    assert "a.jsonl:1: field 'chosen' is {" in message and "let path.py:function append it to the turns" in message
    (tmp_path / "mine.py").write_text("def row(r):\n    return {'messages': [*r['conversations'], r['chosen']]}\n")
    (loaded,) = load(file, chatml_tokenizer(), "--dataset_format", f"{tmp_path / 'mine.py'}:row").train
    assert texts(loaded["segments"]) == ["b<|im_end|>", "good<|im_end|>"]


def test_keys_of_turns_that_a_template_does_not_read_are_named(tmp_path, caplog):
    turn = LONG[2] | {"images": ["a.png"], "cot": "Hm.", "name": "Ann", "id": 7}  # the last two are OpenAI's
    row, note = {"messages": [LONG[1], turn]}, "of a turn that the chat template does not write"
    said = f"cot {note}, images {note}"
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(), row) == ([said], [said])
    reads = chatml_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.cot }}{{ m.content }}"))
    assert left_out_of(tmp_path, caplog, reads, row) == ([f"images {note}"], [f"images {note}"])
    assert texts(render(row["messages"], reads)) == ["Hm.Hello<|im_end|>"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [LONG[1], LONG[2] | {"\ud83d": 1}]}))
    assert load(tmp_path / "rows.jsonl", reads).train["left_out"][:] == [[f"\\ud83d {note}"]], "no UTF-8"


def test_details_of_an_answer_that_are_not_trained_on_are_refused(tmp_path):
    """axolotl's train_detail."""
    turn = {"from": "gpt", "value": "abc", "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}
    with pytest.raises(qlora.RowError, match=r"conversations\[1\].train_detail"):
        qlora.FORMATS["sharegpt"].parse({"conversations": [{"from": "human", "value": "Q"}, turn]})


def test_columns_beside_a_preference_s_chat_are_not_left_out(tmp_path, caplog):
    row = {"prompt": LONG[1:2], "chosen": LONG[2:3], "rejected": [], "tools": [{"name": "ask"}], "system": "Be brief."}
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(TOOLS), row)[0] == []
    text = {"prompt": "a", "chosen": "b", "system": "Be brief."}
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(), text)[0] == ["system"]


def test_a_generation_prompt_that_answers_do_not_follow_is_named(tmp_path, caplog):
    """A server would send it: the model never saw an answer after it."""
    opened = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    row = {"messages": LONG[1:3]}
    assert left_out_of(tmp_path, caplog, chatml_tokenizer(), row)[0] == []
    (said,) = left_out_of(tmp_path, caplog, chatml_tokenizer(opened), row)[0]
    assert said == "the end of the generation prompt, such as an opened <think>"


THINKING = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        (CHATML, True),
        (MARKED, True),
        (CHATML.replace("{{ m.content }}", THINKING), False),
        (CHATML.replace("{{ m.content }}", THINKING.replace("if m", "if loop.last and m")), False),
        (MARKED.replace("{{ m.content }}", THINKING.replace("if m", "if loop.last and m")), True),
    ],
    ids=["never", "never, marked", "always", "in a last answer", "in a last answer, marked"],
)
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_drops_is_named(tmp_path, caplog, template, dropped, key):
    """A template that writes that of the last answer makes a row for each; with marks it makes one row."""
    thought = [{**m, key: f"Hm, {m['content']}"} if m["role"] == "assistant" else m for m in LONG]
    note, tokenizer = "reasoning that the chat template does not write", chatml_tokenizer(template)
    # transformers 5.17 hands a template no key but its own
    dropped |= "Hm" not in tokenizer.apply_chat_template(thought, tokenize=False)
    said, shown = left_out_of(tmp_path, caplog, tokenizer, {"messages": thought}, {"messages": LONG})
    assert said == ([f"{note} (in 1 of 2 rows)"] if dropped else [])
    assert shown[0] == note * dropped and not any(shown[1:])


def test_reasoning_in_an_answers_own_text_that_a_template_drops_is_named(tmp_path, caplog):
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    rows = [{"messages": [LONG[1], {"role": "assistant", "content": f"{thought}Hello"}]} for thought in THOUGHTS]
    shown = left_out_of(tmp_path, caplog, chatml_tokenizer(template), *rows)[1]
    assert [bool(note) for note in shown] == [False, False, True]


THOUGHTS = ["", "<think>\n</think>", "<think>Hm.</think>"]


def test_oldest_exchanges_that_go_are_named(tmp_path, caplog):
    said = left_out_of(tmp_path, caplog, chatml_tokenizer(), {"messages": FOUR}, {"messages": LONG}, source_max_len=99)
    assert said[0] == ["the oldest exchanges of a chat that is too long (in 1 of 2 rows)"]


@pytest.mark.parametrize("options", [{"mood": "calm"}, '{"mood": "calm"}'])
def test_chat_template_kwargs_reach_the_template(options):
    tokenizer = chatml_tokenizer("{{ mood | default('none') }}" + CHATML)
    assert texts(render(LONG, tokenizer, chat_template_kwargs=options), False)[0].startswith("calm<")
    assert texts(render(LONG, tokenizer, chat_template_kwargs=None), False)[0].startswith("none<")
    with pytest.raises(qlora.RowError, match=r"chat_template_kwargs.*an object"):
        render(LONG, tokenizer, chat_template_kwargs=[1])


def test_the_date_in_a_template_is_the_runs(tmp_path):
    tokenizer = chatml_tokenizer("""{{ strftime_now('%d %b %Y') }}|{{ strftime_now("%Y") }}""" + CHATML)
    tokenizer.template_date = datetime.date(2024, 7, 26)
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}])
    assert load(file, tokenizer).train["segments"][0][0]["text"].startswith("26 Jul 2024|2024<|im_start|>")
    tokenizer.template_date = datetime.date(2025, 1, 2)  # not the rows of the cache
    assert load(file, tokenizer).train["segments"][0][0]["text"].startswith("02 Jan 2025|2025<|im_start|>")


def test_a_template_that_refuses_a_row(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}])
    message = error_of(file, chatml_tokenizer(LLAMA2))
    assert message.startswith(f"{file}:1: ") and "template" in message and "no system" in message
    assert "refuses it: division" in error_of(file, chatml_tokenizer("{{ 1 / 0 }}"))


def test_no_template_or_a_broken_one(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}])
    assert "--chat_template" in error_of(file, tiny.byte_tokenizer())
    message = error_of(file, chatml_tokenizer("{% for m in messages %}\n{% endif %}"))
    assert "template" in message and "line 2" in message


def test_the_cache_depends_on_the_template(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG[1:3]}])
    for template, supervised in ((CHATML, "Hello<|im_end|>"), (VICUNA, " Hello</s>"), (CHATML, "Hello<|im_end|>")):
        assert texts(load(file, chatml_tokenizer(template)).train["segments"][0]) == [supervised]


# ------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------


FOUR = shared("Hi", "Hello", "Where is it?", "In the harbour.", "Is it big?", "Very.", "Whose is it?", "Mine.",
              who="role", what="content")  # fmt: skip


def encoded_chats(tmp_path, tokenizer, chats, *flags):
    """The encoded rows to train on, of chats in a file."""
    file = tiny.rows_to_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    config = qlora.parse_config(["--dataset", str(file), *map(str, flags)])
    return qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config).train


def template_ids(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)[
        "input_ids"
    ]


@pytest.mark.parametrize(
    ("name", "template", "system"),
    [
        ("byte", CHATML, True), ("byte", MARKED, False), ("byte_bpe", CHATML, True), ("byte_bpe", LLAMA2, False),
        ("byte_bpe", VICUNA, False), ("sentencepiece", LLAMA2, False), ("sentencepiece", VICUNA, False),
        ("sentencepiece", "{{ bos_token }}" + VICUNA, False), ("sentencepiece", CHATML, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("exchanges", [1, 2, 3, 4])
def test_a_chat_that_is_too_long_loses_its_oldest_exchanges(tokenizers, tmp_path, name, template, system, exchanges):
    """What is left is what the template writes for the shorter chat, whose prompt fits exactly, under either limit."""
    extra = {} if name == "sentencepiece" else {"extra": ("<|im_start|>", "<|im_end|>")}
    tokenizer = AutoTokenizer.from_pretrained(tokenizers(name, **extra))
    tokenizer.chat_template = template
    head = LONG[:1] * system
    shorter = [*head, *FOUR[-2 * exchanges :]]
    expected, prompt = template_ids(tokenizer, shorter), template_ids(tokenizer, shorter[:-1], prompt=True)
    if template == LLAMA2:  # it has no generation prompt, and the answer's leading space is the answer's
        prompt = expected[: len(template_ids(tokenizer, shorter[:-1]))]
    longer = len(template_ids(tokenizer, [*head, *FOUR])) > len(expected)
    one = ("--model_max_len", len(expected), "--skip_excess_length", "False")
    for flags in (("--source_max_len", len(prompt)), one):
        (row,) = encoded_chats(tmp_path, tokenizer, [[*head, *FOUR]], *flags)
        assert row["input_ids"] == expected and row["cut"] == longer
        assert sum(label == NO for label in row["labels"]) < len(expected)
        whole = encode(render(shorter, tokenizer), tokenizer, rendered=True)
        assert (row["input_ids"], row["labels"]) == whole


def test_an_exchange_goes_whole_and_the_last_one_never(tmp_path, caplog):
    """One token less than fits, and another exchange goes. Where the last does not fit, the row is left out."""
    tokenizer = chatml_tokenizer()
    lengths = [len(template_ids(tokenizer, FOUR[-2 * n : -1], prompt=True)) for n in (1, 2)]
    (row,) = encoded_chats(tmp_path, tokenizer, [FOUR], "--source_max_len", lengths[1] - 1)
    assert row["input_ids"] == template_ids(tokenizer, FOUR[-2:])
    short = shared("a", "b", who="role", what="content")
    with caplog.at_level(logging.WARNING, "qlora"):
        rows = encoded_chats(tmp_path, tokenizer, [FOUR, short, FOUR], "--source_max_len", lengths[0] - 1)
    assert rows["input_ids"][:] == [template_ids(tokenizer, short)]
    said = f"2 of 3 train rows are longer than --source_max_len {lengths[0] - 1}: left out"
    whole = len(template_ids(tokenizer, FOUR[:-1], prompt=True))
    assert caplog.messages[0] == f"{said}; 99 % of them fit with --source_max_len {whole}", (
        "also those that lost exchanges"
    )
    with pytest.raises(qlora.ConfigError, match=r"--source_max_len 9: all 2 train rows are longer; raise it"):
        encoded_chats(tmp_path, tokenizer, [FOUR, FOUR], "--source_max_len", 9)


def test_a_long_last_answer_is_cut_on_the_right(tmp_path):
    """Its question stays, and under one limit a quarter of that is the prompt's."""
    tokenizer = chatml_tokenizer()
    chat = [*FOUR[:-1], {"role": "assistant", "content": "x" * 300}]
    prompt = template_ids(tokenizer, FOUR[-2:-1], prompt=True)
    (row,) = encoded_chats(tmp_path, tokenizer, [chat], "--source_max_len", len(prompt), "--target_max_len", 7)
    assert row["input_ids"] == [*prompt, *b"x" * 7] and row["labels"] == [NO] * len(prompt) + [*b"x" * 7]
    flags = ("--model_max_len", 4 * len(prompt), "--skip_excess_length", "False")
    (row,) = encoded_chats(tmp_path, tokenizer, [chat], *flags)
    assert row["input_ids"] == [*prompt, *b"x" * 3 * len(prompt)]


def test_with_skip_excess_length_a_longer_chat_is_left_out(tmp_path):
    tokenizer = chatml_tokenizer()
    rows = encoded_chats(
        tmp_path, tokenizer, [FOUR, FOUR[-2:]], "--model_max_len", len(template_ids(tokenizer, FOUR)) - 1
    )
    assert rows["input_ids"][:] == [template_ids(tokenizer, FOUR[-2:])]


def test_a_chat_of_a_stream_loses_its_oldest_exchanges_too(tmp_path):
    """And one whose last question does not fit is left out."""
    tokenizer = chatml_tokenizer()
    long = [*FOUR[:-2], {"role": "user", "content": "q" * 99}, FOUR[-1]]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in (FOUR, long, FOUR[-2:])])
    limit = len(template_ids(tokenizer, FOUR[-2:-1], prompt=True))
    flags = ["--streaming", "--max_steps", "1", "--train_sampling_strategy", "sequential"]
    config = qlora.parse_config(["--dataset", str(file), "--source_max_len", f"{limit}", *flags])
    stream = qlora.encoded_stream(qlora.load_splits(config, tokenizer).train, tokenizer, config)
    rows = [next(stream) for _ in range(3)]
    assert [position for position, _ in rows] == [1, 3, 4]
    assert all(row["input_ids"] == template_ids(tokenizer, FOUR[-2:]) for _, row in rows)


def test_limits_cut_custom_segments(byte_tokenizer):
    """The completion begins with the last supervised segment, here the third; EOS is the last one's."""

    def ids_and_labels(parts, *limits):
        row = [{"text": text, "supervised": supervised} for text, supervised in parts]
        segments = qlora.join_segments(qlora.parse_custom("f", lambda _: row, {}), byte_tokenizer)
        return encode(segments, byte_tokenizer, *limits, rendered=True)

    row = (("ab", 1), ("c", 0), ("de", 1), ("f", 0))
    assert ids_and_labels(row) == ([BOS, *b"abcdef", EOS], [BOS, 97, 98, NO, 100, 101, NO, NO])
    assert ids_and_labels(row, 2, 3) == ([BOS, *b"adef"], [BOS, 97, 100, 101, NO])
    assert ids_and_labels(row, 1, 1, 6) == ([BOS, *b"cdef", EOS], [BOS, NO, 100, 101, NO, NO])
    assert ids_and_labels([("ab", 1)]) == ([BOS, *b"ab", EOS],) * 2


OWN_STOP = [
    {"text": "Q", "supervised": False},
    {"text": "abc", "supervised": True},
    {"special": "<|im_end|>", "supervised": True},
]
MARKED_TWICE = MARKED.replace("<|im_end|>{% endgen", "{% endgeneration %}{% generation %}<|im_end|>{% endgen")
PROMPT_OF_Q = [IM_START, *b"user\nQ", IM_END, 10, IM_START, *b"assistant\n"]


@pytest.mark.parametrize("written_by", ["function", "template"])
def test_an_answer_in_adjacent_segments_is_one_completion(written_by):
    """A stop token of one's own, and marks of a template with nothing between them."""
    tokenizer = chatml_tokenizer(MARKED_TWICE)
    if written_by == "function":
        segments = qlora.join_segments(qlora.parse_custom("f", lambda _: OWN_STOP, {}), tokenizer)
        prompt, shown = [BOS, ord("Q")], "Q"
    else:
        segments = render(shared("Q", "abc", who="role", what="content"), tokenizer)
        prompt, shown = PROMPT_OF_Q, tokenizer.decode(PROMPT_OF_Q)
    assert [segment["supervised"] for segment in segments[:3]] == [False, True, True]
    cut = encode(segments, tokenizer, 99, 2, rendered=True)
    assert cut == ([*prompt, *b"ab"], [NO] * len(prompt) + [*b"ab"])
    rows = {"segments": [segments], "rendered": [True]}
    ((asked, _, _),) = qlora.prompts_and_completions(rows, tokenizer)
    assert [i for i, _ in asked] == prompt, "what a prediction begins with"
    assert qlora.decoded_pair(segments, True, tokenizer) == {"input": shown, "output": "abc"}


# ------------------------------------------------------------------------------------
# The stop token
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (VICUNA, {}, None),
        (CHATML, {"eos": "<|im_end|>"}, None),
        (CHATML, {}, "--eos_token"),  # a stop token, but not the one that generation stops at
        (STOPLESS, {}, "won't learn to stop"),
    ],
    ids=["eos", "its own eos", "another token", "none"],
)
@pytest.mark.parametrize("on_source", ["False", "True"])
def test_a_template_without_a_stop_token_is_a_warning(tmp_path, caplog, template, options, said, on_source):
    tokenizer = chatml_tokenizer(template, **options)
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG[1:3]}] * 3)
    config = qlora.parse_config(["--dataset", str(file), "--train_on_source", on_source])
    with caplog.at_level(logging.WARNING, "qlora"):
        qlora.pack_and_summarize(qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config), config)
    assert [said in message and "chat template" in message for message in caplog.messages] == [True] * (
        said is not None
    )


# ------------------------------------------------------------------------------------
# Custom formats
# ------------------------------------------------------------------------------------

OWN = """
import re
import sys

def as_pair(row):
    return {"input": row["q"].upper() + "=", "output": row["a"]}

def as_segments(row):
    answer = {"text": row["a"], "supervised": True}
    return [{"text": row["q"], "supervised": False}, answer, {"text": "!", "supervised": False}]

def as_messages(row):
    return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}

def breaks(row):
    return {"input": row["q"], "output": 1 / row["n"]}

def leaves(row):
    sys.exit("enough") if row["n"] == 0 else None
    return {"input": row["q"], "output": row["a"]}

def nothing(row):
    return None

def half(row):
    return {"output": row["a"]}

def silent(row):
    return [{"text": row["q"], "supervised": False}]
"""


@pytest.fixture
def own(tmp_path):
    """`own(function, *argv)`: rows {q, a, n} read with a function of OWN."""
    (tmp_path / "own.py").write_text(OWN)
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"q": "x", "a": "y", "n": 1}, {"q": "x", "a": "y", "n": 0}])
    return lambda name, tokenizer=None: (file, tokenizer, "--dataset_format", f"{tmp_path / 'own.py'}:{name}")


def test_a_custom_function(own):
    assert load(*own("as_pair")).train["segments"][0] == qlora.prompt_completion("X=", "y")
    rows = load(*own("as_segments", tiny.byte_tokenizer())).train
    assert texts(rows["segments"][1]) == ["y"] and rows["rendered"][:] == [True] * 2
    rows = load(*own("as_messages", chatml_tokenizer())).train
    assert texts(rows["segments"][0]) == ["y<|im_end|>"] and rows["rendered"][:] == [True] * 2


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("breaks", 2, "ZeroDivisionError"),
        ("leaves", 2, "SystemExit: enough"),
        ("nothing", 1, "{input, output}"),
        ("half", 1, "'input'"),
        ("silent", 1, "empty"),
    ],
)
def test_an_error_in_a_custom_function_names_file_and_row(own, name, line, said):
    file, tokenizer, flag, spec = own(name, tiny.byte_tokenizer())
    message = error_of(file, tokenizer, flag, spec)
    assert message.startswith(f"{file}:{line}: ") and said in message
    assert name == "silent" or spec in message


def segments_of(tmp_path, tokenizer, *parts):
    """Tokens, each with whether it is supervised, of a row that a user's function cuts into these segments."""
    (tmp_path / "mine.py").write_text("def row(r):\n    return r['parts']\n")
    file = tiny.rows_to_jsonl(tmp_path / "parts.jsonl", [{"parts": parts}])
    argv = ["--dataset", str(file), "--dataset_format", f"{tmp_path / 'mine.py'}:row"]
    config = qlora.parse_config(argv)
    (row,) = qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config).train
    return row["input_ids"], [
        i if label == i else None for i, label in zip(row["input_ids"], row["labels"], strict=True)
    ]


TURNS = [("Q: Hi\nA: ", False), ("Hello.", True), ("\nQ: more?\nA: ", False), ("no", True)]
WORD = [("The answer is un", False), ("believable", True), ("!", False)]


@pytest.mark.parametrize("parts", [TURNS, WORD, [("The ", False), ("lamp", True)], [("ship", True)]])
@pytest.mark.parametrize("name", ["sentencepiece", "byte_bpe"])
def test_segments_are_tokenised_as_one_text(tokenizers, tmp_path, name, parts):
    """The ids of the joined text; a token is supervised where a character of it is."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers(name))
    text = "".join(part for part, _ in parts)
    if name == "sentencepiece":
        folder = tokenizers(name)
        expected = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)
    else:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [{"text": part, "supervised": supervised} for part, supervised in parts]
    ids, supervised = segments_of(tmp_path, tokenizer, *rows)
    assert ids == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
    flags = [flag for part, flag in parts for _ in part]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = [any(flags[start:end]) for start, end in offsets]
    assert [i is not None for i in supervised] == [parts[0][1], *wanted, parts[-1][1]]


def test_special_tokens_are_written_on_purpose_only(tmp_path):
    """One that is named is a token, one in a text is not; `supervised` is false unless it says so."""
    tokenizer = chatml_tokenizer()
    parts = [
        {"special": "<|im_start|>"}, {"text": "user\n<|im_end|>", "supervised": False},
        {"special": "<|im_end|>", "supervised": True}, {"text": "a</s>", "supervised": True},
    ]  # fmt: skip
    ids, supervised = segments_of(tmp_path, tokenizer, *parts)
    assert ids == [BOS, IM_START, *b"user\n<|im_end|>", IM_END, *b"a</s>", EOS]
    assert supervised == [None] * 17 + [IM_END, *b"a</s>", EOS]


def test_bos_and_eos_that_are_written_on_purpose_stand_once(tmp_path):
    tokenizer = chatml_tokenizer()
    parts = [{"special": "<s>"}, {"text": "a", "supervised": True}, {"special": "</s>", "supervised": True}]
    ids, supervised = segments_of(tmp_path, tokenizer, *parts)
    assert ids == [BOS, ord("a"), EOS] and supervised == [None, ord("a"), EOS]
    ids, supervised = segments_of(tmp_path, tokenizer, {"text": "a", "supervised": False}, parts[2])
    assert ids == [BOS, ord("a"), EOS] and supervised == [None, None, EOS]


@pytest.mark.parametrize("trims", [False, True])
def test_a_space_before_an_answer_is_the_prompt_s_whatever_the_offsets_leave_out(tmp_path, trims):
    """GPT-NeoX's leave out leading spaces."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_byte_bpe(tmp_path / "bpe"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trims)
    parts = [{"text": "Q: hi\nA: ", "supervised": False}, {"text": "\u65e5\u672c", "supervised": True}]
    _, supervised = segments_of(tmp_path, tokenizer, *parts)
    learnt = [i for i in supervised if i is not None]
    assert tokenizer.decode(learnt[:-1]) == "\u65e5\u672c" and learnt[-1] == tokenizer.eos_token_id


def test_predictions_show_segments_without_bos_and_eos(byte_tokenizer):
    parts = [{"text": "a<s>", "supervised": False}, {"text": "b", "supervised": True}]
    segments = qlora.join_segments(qlora.parse_custom("f", lambda _: parts, {}), byte_tokenizer)
    assert qlora.decoded_pair(segments, True, byte_tokenizer) == {"input": "a<s>", "output": "b"}


def test_a_special_token_that_the_tokenizer_lacks(tmp_path):
    with pytest.raises(qlora.ConfigError, match=r"parts.jsonl:1: .*'<\|im_ende\|>'.*no such special token"):
        segments_of(tmp_path, chatml_tokenizer(), {"special": "<|im_ende|>"}, {"text": "a", "supervised": True})


@pytest.mark.parametrize("part", [{"text": "a"}, {"supervised": True}, {"special": None}, "a"])
def test_a_segment_that_lacks_something(tmp_path, part):
    with pytest.raises(qlora.ConfigError, match=r"expected: it returns .*special, supervised"):
        segments_of(tmp_path, chatml_tokenizer(), part)


def test_a_changed_custom_function_is_called_again(own, tmp_path):
    assert load(*own("as_pair")).train["segments"][0][0]["text"] == "X="
    (tmp_path / "own.py").write_text(OWN.replace('"="', '"?"'))
    assert load(*own("as_pair")).train["segments"][0][0]["text"] == "X?"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("def f(:", "own.py"),
        ("1 / 0", "division"),
        ("x = 1", "no attribute 'f'"),
        ("raise SystemExit('enough')", "enough"),
    ],
)
def test_a_custom_file_that_does_not_import(tmp_path, content, named):
    (tmp_path / "own.py").write_text(content)
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"q": "x"}])
    message = error_of(file, None, "--dataset_format", f"{tmp_path / 'own.py'}:f")
    assert "--dataset_format" in message and named in message


# ------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------


def test_a_run_on_messages_with_a_template_from_a_file(run_qlora, models, tmp_path):
    """Trained until it answers, with the template for the base model; predicted from the prompt up to the answer."""
    model = models("llama", tokenizer=write_chat_tokenizer)
    (tmp_path / "chat.jinja").write_text(CHATML)
    messages = shared("a", "first", "b", "second", who="role", what="content")
    (tmp_path / "data").mkdir()
    for split in ("train", "eval"):
        tiny.rows_to_jsonl(tmp_path / f"data/{split}.jsonl", [{"messages": messages}] * 2)
    flags = {"model_name_or_path": model, "dataset": tmp_path / "data", "source_max_len": 90, "max_new_tokens": 12}
    refused = run_qlora(**flags)
    assert refused.code == 2 and "--chat_template" in refused.stderr.splitlines()[-1]
    flags |= {"chat_template": tmp_path / "chat.jinja", "eos_token": "<|im_end|>"}
    run = run_qlora(
        **flags, bits=16, learning_rate=2e-2, max_steps=40, save_steps=40, do_predict=True, predict_with_generate=True
    )
    assert run.code == 0
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    (row, _) = [json.loads(line) for line in (run.output_dir / "predictions.jsonl").read_text().splitlines()]
    assert row["input"] == prompt + "<|im_start|>assistant\n" and row["output"] == row["prediction"] == "second"
    saved = AutoTokenizer.from_pretrained(run.output_dir)
    assert saved.chat_template == CHATML and saved.eos_token == "<|im_end|>"


def test_a_prediction_has_its_whole_last_question(run_qlora, models, tmp_path):
    """Also where it is longer than a prompt may be; earlier exchanges go, as in training."""
    model = models("llama", tokenizer=write_chat_tokenizer)
    (tmp_path / "chat.jinja").write_text(CHATML)
    long = [*FOUR[:-2], {"role": "user", "content": "q" * 99}, FOUR[-1]]
    tiny.rows_to_jsonl(tmp_path / "train.jsonl", [{"messages": FOUR[-2:]}])
    tiny.rows_to_jsonl(tmp_path / "test.jsonl", [{"messages": FOUR}, {"messages": long}])
    flags = {"model_name_or_path": model, "dataset": tmp_path, "source_max_len": 60, "max_new_tokens": 2}
    flags |= {"chat_template": tmp_path / "chat.jinja", "eos_token": "<|im_end|>", "predict_with_generate": True}
    run = run_qlora(**flags, max_steps=1, do_predict=True)
    assert run.code == 0 and "1 of 2 eval rows are longer than --source_max_len 60: left out" in run.stderr
    rows = [json.loads(line) for line in (run.output_dir / "predictions.jsonl").read_text().splitlines()]
    for row, question in zip(rows, ("Whose is it?", "q" * 99), strict=True):
        assert row["prediction_with_input"].startswith(f"user\n{question}\nassistant\n")


def test_a_resume_on_another_day_has_the_same_rows(run_qlora, models, tmp_path, monkeypatch):
    """And so does a run that repeats another; a fresh one has its own day."""

    class Day(datetime.date):
        now = "2024-07-26"

        @classmethod
        def today(cls):
            return datetime.date.fromisoformat(cls.now)

    monkeypatch.setattr(qlora, "date", Day)
    (tmp_path / "chat.jinja").write_text("Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML)
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": LONG}] * 4)
    flags = {"model_name_or_path": models("llama", tokenizer=write_chat_tokenizer), "dataset": file, "save_steps": 1}
    flags |= {"chat_template": tmp_path / "chat.jinja", "source_max_len": 300}
    first = run_qlora(**flags, max_steps=1, output_dir=tmp_path / "out")
    Day.now = "2024-07-27"
    resumed = run_qlora(**flags, max_steps=2, output_dir=tmp_path / "out")
    assert first.code == resumed.code == 0 and "resuming from" in resumed.stderr
    fresh = run_qlora(**flags, max_steps=1, output_dir=tmp_path / "fresh")
    records = [fresh.json("run.json"), resumed.json("run.json")]
    assert [record["derived"]["template date"] for record in records] == ["2024-07-27", "2024-07-26"]
    assert records[0]["data"] != records[1]["data"]
    repeated = run_qlora(str(tmp_path / "out" / "run.json"), **flags, max_steps=1, output_dir=tmp_path / "again")
    assert repeated.json("run.json")["data"] == records[1]["data"]


def write_chat_tokenizer(path):
    return tiny.write_byte(path, extra=("<|im_start|>", "<|im_end|>"))


def test_a_run_on_airoboros_chat(run_qlora, tmp_path):
    rows = [{"conversations": shared(f"a{n}", "b", "c", "d"), "category": "x", "source": "s"} for n in range(6)]
    file = tiny.rows_to_jsonl(tmp_path / "a.json", rows)
    flags = {"dataset_format": "airoboros_chat", "model_max_len": 200, "expand_conversations": True}
    flags |= {"include_sources": "s", "eval_dataset_size": 0.25, "do_eval": True, "max_steps": 2}
    run = run_qlora(dataset=file, source_max_len=None, target_max_len=None, **flags)
    assert run.code == 0 and (run.output_dir / "completed").exists()
    assert run.json("run.json")["data"]["eval"]["rows"] == 4  # of two of six conversations, which stay whole
    assert run.json("metrics.json")["eval_loss"] > 0


@pytest.mark.parametrize("name", ["missing.jinja", "latin.jinja"])
def test_a_template_file_that_can_not_be_read(run_qlora, tmp_path, name):
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe")
    run = run_qlora(chat_template=tmp_path / name)
    assert run.code == 2 and re.search(rf"--chat_template .*{name}", run.stderr.splitlines()[-1])


def test_a_question_that_is_to_be_learnt_is_named(tmp_path, caplog):
    questions = [{**LONG[1], "train": value} for value in (False, 0, None, True)]
    said, _ = left_out_of(tmp_path, caplog, chatml_tokenizer(), *({"messages": [q, LONG[2]]} for q in questions))
    assert said == ["train of a turn that is not the assistant's (in 1 of 4 rows)"]
