"""Dataset formats: golden prompts and ids, presets, and which format the columns tell.

To add a format, add its rows to GOLDEN; the last test of the first part fails until they are there.
"""

import json
import logging

import datasets
import pytest
import tiny

import qlora

BOS, EOS = tiny.BOS, tiny.EOS

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{}\n\n### Input:\n{}\n\n### Response: "
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response: "
)

# ------------------------------------------------------------------------------------
# Golden pairs: format, row, input, output
# ------------------------------------------------------------------------------------

ALPACA = [
    ({"instruction": "Add.", "input": "2, 2", "output": "4"}, WITH_INPUT.format("Add.", "2, 2"), "4"),
    ({"instruction": "Say é.", "input": "", "output": "é\n"}, WITHOUT_INPUT.format("Say é."), "é\n"),
    ({"instruction": "Go", "output": "on"}, WITHOUT_INPUT.format("Go"), "on"),
    ({"instruction": "Go", "input": None, "output": "on"}, WITHOUT_INPUT.format("Go"), "on"),
    # Nothing of a row is a template, and nothing is stripped.
    (
        {"instruction": " {input} {0} %s\n", "input": "{instruction}", "output": " {output} "},
        WITH_INPUT.format(" {input} {0} %s\n", "{instruction}"),
        " {output} ",
    ),
    ({"instruction": "Is it?", "input": 0, "output": 1.5}, WITH_INPUT.format("Is it?", "0"), "1.5"),
    ({"instruction": "Is it?", "input": False, "output": True}, WITH_INPUT.format("Is it?", "false"), "true"),
    # LLaMA-Factory's columns: a system text stands for the first sentences, earlier exchanges before the instruction.
    ({"instruction": "Go", "output": "on", "system": None, "history": []}, WITHOUT_INPUT.format("Go"), "on"),
    (
        {
            "instruction": "Why?",
            "input": "x",
            "output": "so",
            "system": "Be brief.",
            "history": [["Who?", "I."], ["A", 2]],
        },
        "Be brief.\n\n### Instruction:\nWho?\n\n### Response: I.\n\n### Instruction:\nA\n\n### Response: 2\n\n"
        "### Instruction:\nWhy?\n\n### Input:\nx\n\n### Response: ",
        "so",
    ),
]
CHIP2 = [
    ("<human>: Hi\n<bot>: Hello", "Hi", "Hello"),
    ("<human>: A\n<bot>: B\n<bot>: C", "A", "B"),
    # What a later human turn says stays in the answer, as in the original.
    ("<human>: A\n<bot>: B\n<human>: C\n<bot>: D\n<human>: E\n<bot>: F", "A", "B\n<human>: C"),
    ("<human>: A\n<human>: B\n<bot>: C", "A\nB", "C"),
    ("Context <human>: A<human>:B <bot>: x\n<bot>: C ", "Context A<human>:B <bot>: x", "C "),
    ("<human>: A\n<bot>: B <human>: C", "A", "B <human>: C"),  # taken out of the question only
]
# Instruction, response, what else the row has, input, output.
AIROBOROS = [
    ("Hi", "Hello", {}, "A chat.\nUSER: Hi\nASSISTANT: ", "Hello\n"),
    (" Hi \n", "\n Hello\n\n", {}, "A chat.\nUSER: Hi\nASSISTANT: ", "Hello\n"),
    ("Hi", "Hello", {"system": " Be brief.\n"}, "Be brief.\nUSER: Hi\nASSISTANT: ", "Hello\n"),
    *(("Hi", "Ho", {"system": none}, "A chat.\nUSER: Hi\nASSISTANT: ", "Ho\n") for none in (None, "", " ")),
    ("a\n  PLAINFORMAT", "b", {}, "A chat.\nUSER: a PLAINFORMAT\nASSISTANT: ", "b\n"),
    ("a\n\nPLAINFORMAT \n", "b", {"system": "S"}, "S\nUSER: a PLAINFORMAT\nASSISTANT: ", "b\n"),
    ("PLAINFORMAT", "b", {}, "A chat.\nUSER: PLAINFORMAT\nASSISTANT: ", "b\n"),
    ("PLAINFORMAT\na", "b", {}, "A chat.\nUSER: PLAINFORMAT\na\nASSISTANT: ", "b\n"),
    ("a  PLAINFORMAT b", "c", {}, "A chat.\nUSER: a  PLAINFORMAT b\nASSISTANT: ", "c\n"),
    *((" a\n", "b ", {"skip_prompt_formatting": yes, "system": "S"}, "a\n", "b\n") for yes in (True, "true", "True")),
    ("a\n PLAINFORMAT", "b", {"skip_prompt_formatting": True}, "a\n PLAINFORMAT\n", "b\n"),
    *(
        ("a", "b", {"skip_prompt_formatting": no}, "A chat.\nUSER: a\nASSISTANT: ", "b\n")
        for no in (False, None, "", "false")
    ),
    ("{system}", 7, {"system": "{instruction}"}, "{instruction}\nUSER: {system}\nASSISTANT: ", "7\n"),
]
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Bye!"
GUANACO = "### Human: Hi### Assistant: Hello### Human: Bye### Assistant: Bye!"
GOLDEN = {
    "alpaca": ALPACA,
    "alpaca-clean": ALPACA,
    "chip2": [({"text": text, "metadata": "{}"}, source, target) for text, source, target in CHIP2],
    "self-instruct": [({"prompt": "Q: a\n\nA:", "completion": " b"}, "Q: a\n\nA:", " b")],
    "hh-rlhf": [
        ({"chosen": DIALOGUE, "rejected": "no"}, "", DIALOGUE),
        ({"prompt": DIALOGUE[:26], "chosen": DIALOGUE, "rejected": f"{DIALOGUE[:26]} No"}, "", DIALOGUE),
        ({"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "No."}, "Hello", "Hello! How are you?"),
    ],
    "oasst1": [({"text": GUANACO}, "", GUANACO)],
    "input": [({"input": "MKV\n", "output": "not read"}, "", "MKV\n")],
    "text": [({"text": " a\nb\n"}, "", " a\nb\n")],
    "input-output": [
        ({"input": "a ", "output": " b", "source": None}, "a ", " b"),
        ({"input": "", "output": "b"}, "", "b"),
        ({"input": "a", "output": "a"}, "a", "a"),  # which Python makes one object
        ({"input": 7, "output": True}, "7", "true"),
    ],
    "longform": [({"input": "a ", "output": " b", "source": "wiki"}, "a ", " b")],
    "airoboros": [
        ({"instruction": i, "response": r, **more}, source, target) for i, r, more, source, target in AIROBOROS
    ],
}
CHATS = {"airoboros_chat", "messages", "sharegpt"}  # of several turns: tests/test_chat.py
ROWS = [(name, *golden) for name, goldens in GOLDEN.items() for golden in goldens]
ROWS_IDS = [f"{name}-{number}" for name, goldens in GOLDEN.items() for number in range(len(goldens))]


def encode(name, row, tokenizer, limits):
    """A row of a format, encoded."""
    rows = {"segments": [qlora.FORMATS[name].parse(row)], "rendered": [False]}
    columns = qlora.encode_batch(rows, tokenizer, limits)
    return columns["input_ids"][0], columns["labels"][0]


@pytest.mark.parametrize(("name", "row", "source", "target"), ROWS, ids=ROWS_IDS)
def test_golden_pair(name, row, source, target):
    assert qlora.FORMATS[name].parse(row) == [
        {"text": source, "supervised": False},
        {"text": target, "supervised": True},
    ]


@pytest.mark.parametrize(("name", "row", "source", "target"), ROWS, ids=ROWS_IDS)
def test_golden_ids(byte_tokenizer, name, row, source, target):
    """A byte is its own id, so the golden texts spell the ids."""
    limits = qlora.Limits(1024, 1024)
    ids, labels = encode(name, row, byte_tokenizer, limits)
    assert ids == [BOS, *source.encode(), *target.encode(), EOS]
    assert labels == [-100] * (1 + len(source.encode())) + [*target.encode(), EOS]


def test_ids_at_both_ends_of_the_alpaca_prompt(byte_tokenizer):
    """`\\n\\n### Response: ` ends in one space, and no line break follows."""
    row = {"instruction": "A", "output": "b"}
    ids, _ = encode("alpaca", row, byte_tokenizer, qlora.Limits(999, 9))
    response = [82, 101, 115, 112, 111, 110, 115, 101]
    assert ids[:7] == [256, 66, 101, 108, 111, 119, 32]  # BOS, "Below "
    assert ids[-19:] == [65, 10, 10, 35, 35, 35, 32, *response, 58, 32, 98, 257]


def test_oasst1_supervises_the_whole_dialogue(byte_tokenizer):
    ids, labels = encode("oasst1", {"text": "### é"}, byte_tokenizer, qlora.Limits(16, 9))
    assert ids == [256, 35, 35, 35, 32, 195, 169, 257]
    assert labels == [-100, 35, 35, 35, 32, 195, 169, 257]


def test_every_format_has_golden_rows():
    assert set(GOLDEN) | CHATS == set(qlora.FORMATS)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"instruction": "a", "response": "b", "skip_prompt_formatting": "perhaps"}, "skip_prompt_formatting"),
        ({"instruction": "a", "response": None}, "response"),
        ({"instruction": "a", "response": " \n"}, "empty"),
        ({"instruction": "a", "response": "b", "system": ["S"]}, "system"),
    ],
)
def test_a_bad_airoboros_row(tmp_path, row, named):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "response": "b"}, row])
    with pytest.raises(qlora.ConfigError, match=rf"a\.jsonl:2: .*{named}"):
        load("--dataset", str(file))


@pytest.mark.parametrize("text", ["no answer", "<human>: A <bot>: B", "<human>: A\n<bot>:B", "\n<bot>:"])
def test_chip2_without_an_answer_is_a_bad_row(text):
    with pytest.raises(qlora.RowError, match=r"'text'.*<bot>: "):
        qlora.FORMATS["chip2"].parse({"text": text})


# ------------------------------------------------------------------------------------
# Presets
# ------------------------------------------------------------------------------------

# Preset: where it is, format, what datasets.load_dataset is told besides, a row.
PRESETS = {
    "alpaca": ("tatsu-lab/alpaca", "alpaca", {}),
    "alpaca-clean": ("yahma/alpaca-cleaned", "alpaca-clean", {}),
    "chip2": ("laion/OIG", "chip2", {"data_files": "unified_chip2.jsonl"}),
    # A script dataset, which datasets does not run any more: its conversion lies on a branch.
    "self-instruct": (
        "yizhongw/self_instruct",
        "self-instruct",
        {"revision": "refs/convert/parquet", "data_dir": "self_instruct"},
    ),
    "hh-rlhf": ("Anthropic/hh-rlhf", "hh-rlhf", {}),
    "longform": ("akoksal/LongForm", "longform", {}),
    "oasst1": ("timdettmers/openassistant-guanaco", "oasst1", {}),
}


@pytest.fixture
def hub(monkeypatch):
    """`hub(rows)` makes datasets.load_dataset give them; returns the calls, as (path, options)."""

    def serve(rows_by_split):
        calls = []

        def load_dataset(path, **options):
            calls.append((path, options))
            splits = {split: datasets.Dataset.from_list(rows) for split, rows in rows_by_split.items()}
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def load(*argv):
    return qlora.load_splits(qlora.parse_config(list(argv)))


def pairs_of(rows):
    return [tuple(segment["text"] for segment in row["segments"]) for row in rows]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(hub, caplog, preset):
    caplog.set_level(logging.INFO, "qlora")
    path, name, options = PRESETS[preset]
    goldens = GOLDEN[name][:1]  # an Arrow column has one type
    calls = hub({"train": [row for row, *_ in goldens]})
    splits = load("--dataset", preset)
    assert pairs_of(splits.train) == [(source, target) for _, source, target in goldens]
    assert splits.eval is None
    ((called, given),) = calls
    given = {key: value for key, value in given.items() if value is not None}
    assert (called, given) == (path, options)
    assert any(preset in message and f"format {name}" in message for message in caplog.messages)


def test_the_presets_are_these():
    assert set(qlora.DATASETS) == set(PRESETS)


def test_the_hub_gets_token_and_cache_folder(hub, tmp_path):
    calls = hub({"train": [{"text": "a"}]})
    load("--dataset", "a/b", "--use_auth_token", "--cache_dir", str(tmp_path))
    ((path, options),) = calls
    assert (path, options) == ("a/b", {"token": True, "cache_dir": str(tmp_path)})


def test_dataset_format_overrides_the_presets(hub):
    hub({"train": [{"text": "<human>: A\n<bot>: B"}]})
    assert pairs_of(load("--dataset", "oasst1", "--dataset_format", "chip2").train) == [("A", "B")]


def test_vicuna_is_refused_before_the_hub_is_asked(hub, capsys):
    calls = hub({"train": [{"text": "a"}]})
    assert qlora.main(["--dataset", "vicuna"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "vicuna" in line and "released" in line
    assert not calls


# ------------------------------------------------------------------------------------
# Inference
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("instruction response", "airoboros"),
        ("instruction response system category output prompt completion", "airoboros"),
        ("instruction output", "alpaca"),
        ("instruction input output", "alpaca"),
        ("instruction output prompt completion input chosen text", "alpaca"),
        ("prompt completion", "self-instruct"),
        ("prompt completion input output chosen text", "self-instruct"),
        ("input output", "input-output"),
        ("input output chosen text", "input-output"),
        ("instruction input text output", "alpaca"),
        ("instruction prompt input output text", "alpaca"),
        ("prompt input output chosen", "input-output"),
        ("chosen rejected", "hh-rlhf"),
        ("chosen rejected text", "hh-rlhf"),
        ("prompt chosen rejected", "hh-rlhf"),
        ("text", "text"),
        ("text metadata", "text"),
        ("instruction text", "text"),
        ("output prompt text", "text"),
    ],
)
def test_the_format_is_inferred_from_the_columns(tmp_path, caplog, columns, name):
    caplog.set_level(logging.INFO, "qlora")
    row = {column: f"<{column}>" for column in columns.split()}
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row])
    supervised = {
        "airoboros": "<response>\n",
        "alpaca": "<output>",
        "self-instruct": "<completion>",
        "input-output": "<output>",
    }
    supervised |= {"hh-rlhf": "<chosen>", "text": "<text>"}
    ((_, output),) = pairs_of(load("--dataset", str(file)).train)
    assert output == supervised[name]
    assert any(str(file) in m and f"format {name}," in m and "inferred" in m for m in caplog.messages)


@pytest.mark.parametrize("history", [["Who?", "I."], [["Who?"]], [["Who?", None]], "Who?"])
def test_a_bad_history_is_a_bad_row(history):
    with pytest.raises(qlora.RowError, match="history"):
        qlora.FORMATS["alpaca"].parse({"instruction": "a", "output": "b", "history": history})


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "system": "d", "history": []}, None),
        ({"instruction": "a", "output": "c", "text": "d", "score": 1}, "score, text"),
        ({"prompt": "a", "completion": "c", "system": "d"}, "system"),
        (
            {"instruction": "a", "response": "c", "system": "d", "category": "e", "source": "f", "history": []},
            "history",
        ),
        ({"text": "a", "meta": {}}, "meta"),
    ],
)
def test_columns_that_are_left_out_are_named_once(tmp_path, caplog, row, unused):
    caplog.set_level(logging.INFO, "qlora")
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    load("--dataset", str(file))
    assert [m.partition("left out: ")[2] for m in caplog.messages if "left out" in m] == [unused] * (unused is not None)


def test_a_column_that_few_rows_have_is_named(tmp_path, caplog):
    """Also the last of many, in a file and in the cache."""
    caplog.set_level(logging.INFO, "qlora")
    rows = [{"text": f"{n}", "meta": None} for n in range(150)] + [
        {"text": "a", "late": 0, "score": ""},
        {"text": "b", "late": 1},
    ]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        load("--dataset", str(file))
    said = "late (in 2 of 152 rows), score (in 1 of 152 rows)"
    assert [m.partition("left out: ")[2] for m in caplog.messages if "left out" in m] == [said] * 2


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
def test_a_preference_whose_prompt_has_another_name_is_refused_with_two_ways_out(tmp_path, name):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{name: "Q", "chosen": "A", "rejected": "B"}])
    renamed, without = ("--columns", f"prompt={name}"), ("--dataset_format", "hh-rlhf")
    with pytest.raises(qlora.ConfigError, match=f"{' '.join(renamed)} .*, {' '.join(without)} leaves it out"):
        load("--dataset", str(file))
    assert pairs_of(load("--dataset", str(file), *renamed).train) == [("Q", "A")]
    assert pairs_of(load("--dataset", str(file), *without).train) == [("", "A")]


def test_the_way_out_keeps_the_names_that_were_passed(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"q": "Q", "good": "A", "rejected": "B"}])
    with pytest.raises(qlora.ConfigError, match="--columns chosen=good,input=q,prompt=q makes it the prompt"):
        load("--dataset", str(file), "--columns", "chosen=good,input=q")
    assert pairs_of(load("--dataset", str(file), "--columns", "chosen=good,input=q,prompt=q").train) == [("Q", "A")]


def test_columns_that_only_some_rows_have_count(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "d"}]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    expected = [(WITHOUT_INPUT.format("a"), "b"), (WITH_INPUT.format("a", "c"), "d")]
    assert pairs_of(load("--dataset", str(file)).train) == expected


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages", "conversations", "instruction", "response", "text"], "messages"),
        (["conversations", "instruction", "response", "output"], "sharegpt"),
    ],
)
def test_chats_are_inferred_first(columns, name):
    source = qlora.RowSource("here", loaded=datasets.Dataset.from_list([dict.fromkeys(columns, "")]))
    assert qlora.choose_format("here", source, qlora.parse_config([])).format == name


def test_each_split_that_is_read_has_a_format_of_its_own(tmp_path, caplog):
    """Splits that are not read have none, whichever comes first by name."""
    caplog.set_level(logging.INFO, "qlora")
    tiny.rows_to_jsonl(tmp_path / "dev.jsonl", [{"input": "cat", "output": "chat"}])
    tiny.rows_to_jsonl(tmp_path / "test.jsonl", [{"question": "?", "answer": "!"}])
    tiny.rows_to_jsonl(tmp_path / "train.jsonl", [{"instruction": "Go", "output": "on"}])
    words = ["--dataset", str(tmp_path)]
    splits = load(*words)
    assert pairs_of(splits.train) == [(WITHOUT_INPUT.format("Go"), "on")] and splits.eval is None
    assert [message.split(": ", 1)[1] for message in caplog.messages if ": format " in message] == [
        "format alpaca, inferred from columns"
    ]
    splits = load(*words, "--do_eval")
    assert pairs_of(splits.train) == [(WITHOUT_INPUT.format("Go"), "on")]
    assert pairs_of(splits.eval) == [("cat", "chat")]


def test_a_row_that_lacks_a_column_of_the_flag_is_bad(tmp_path):
    """It is not taken from the column that is replaced; a dataset without any of the columns is another one."""
    rows = [{"input": "a", "output": "bad", "corrected": "good"}, {"input": "b", "output": "draft"}]
    file, other = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows), tiny.rows_to_jsonl(tmp_path / "b.jsonl", rows[1:])
    words = ["--dataset", f"{file},{other}", "--columns", "output=corrected"]
    with pytest.raises(qlora.ConfigError, match=r"a\.jsonl:2: field 'output' is missing"):
        load(*words)
    splits = load(*words, "--on_bad_rows", "skip", "--output_dir", str(tmp_path / "out"))
    assert pairs_of(splits.train) == [("a", "good"), ("b", "draft")]


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "bad", "label": False},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "bad"}], "kto_tag": False},
        {"instruction": "Q", "output": "bad", "kto_tag": False},
        {"messages": TURNS, "label": False},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "bad"}], "label": False},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "label": False},
        {"prompt": "Q", "completion": "bad", "label": "False"},  # of a CSV
    ],
)
def test_an_answer_that_is_marked_undesirable_is_a_bad_row(tmp_path, row):
    """As KTO's datasets do; a label beside a plain text may say anything."""
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(qlora.ConfigError, match=r"a\.jsonl:1: field '(label|kto_tag)' is false, expected no answer"):
        load("--dataset", str(file))
    tiny.rows_to_jsonl(file, [{"text": "a", "label": False}])
    assert pairs_of(load("--dataset", str(file)).train) == [("", "a")]


def test_a_saved_datasets_own_format_and_pictures_are_not_used(tmp_path):
    """`set_format` would hide columns, or give arrays; a picture would be decoded, here one that is none."""
    rows = datasets.Dataset.from_list([{"instruction": "a", "input": "b", "output": "c", "image": {"bytes": b"no"}}])
    rows = rows.cast_column("image", datasets.Image())
    rows.set_format("numpy", columns=["input", "output"])
    rows.save_to_disk(tmp_path / "saved")
    assert pairs_of(load("--dataset", str(tmp_path / "saved")).train) == [(WITH_INPUT.format("a", "b"), "c")]


def test_a_folder_like_a_clone_of_the_hub_is_read_as_any_other_and_its_configs_named(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("input,output\nq,007\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nconfigs:\n- config_name: a\n---\n")
    assert pairs_of(load("--dataset", str(tmp_path)).train) == [("q", "007")]
    said = [message for message in caplog.messages if "configs in its README.md are not used" in message]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n```\nconfigs:\n```\n")
    load("--dataset", str(tmp_path))
    assert len(said) == 1 and sum("configs in its README.md" in message for message in caplog.messages) == 1


def test_columns_of_mixed_types_that_datasets_saved_are_values_and_not_json(tmp_path):
    rows = [{"input": "x", "output": "one"}, {"input": "two words", "output": 2}, {"input": 5, "output": "three"}]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    try:
        loaded = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    except datasets.exceptions.DatasetGenerationError:
        pytest.skip("this version of datasets reads no columns of mixed types")
    loaded.save_to_disk(tmp_path / "saved")
    assert pairs_of(load("--dataset", str(tmp_path / "saved")).train) == [
        ("x", "one"),
        ("two words", "2"),
        ("5", "three"),
    ]


def test_the_reason_stands_behind_a_long_value(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        json.dumps({"input": "a", "output": "Der Text. " * 200 + "Zü"}, ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(qlora.ConfigError, match=r"expected UTF-8 \(is the file in Latin-1\?\)"):
        load("--dataset", str(file))


NEEDS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "airoboros": ["instruction", "response"],
    "alpaca": ["instruction", "output"],
    "self-instruct": ["prompt", "completion"],
    "input-output": ["input", "output"],
    "hh-rlhf": ["chosen"],
    "text": ["text"],
}


@pytest.mark.parametrize("columns", [["question", "answer"], ["instruction"], ["Text", "prompt"]])
def test_no_format_fits(tmp_path, columns):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "a")])
    with pytest.raises(qlora.ConfigError) as caught:
        load("--dataset", str(file))
    message = str(caught.value)
    assert str(file) in message and "\n" not in message
    before, _, after = message.partition("the nearest need")
    assert all(column in before for column in columns), "the columns found"
    named = {name for name, needed in NEEDS.items() if f"{', '.join(needed)} ({name})" in after}
    assert len(named) == 2 and "path.py:function" in after
    assert columns != ["instruction"] or named == {"alpaca", "airoboros"}, "which begin with that column"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_that_the_given_format_needs_is_missing(tmp_path, kind):
    rows = [{"input": "a", "answer": "b"}]
    writers = {"jsonl": tiny.rows_to_jsonl, "csv": tiny.rows_to_csv, "parquet": tiny.rows_to_parquet}
    file = writers[kind](tmp_path / f"rows.{kind}", rows)
    with pytest.raises(qlora.ConfigError) as caught:
        load("--dataset", str(file), "--dataset_format", "alpaca")
    message = str(caught.value)
    fragments = [str(file), "instruction", "output", "answer", "input", "alpaca", "chip2"]
    assert all(fragment in message for fragment in fragments) and "\n" not in message


def test_an_optional_column_may_be_all_null(tmp_path):
    rows = [{"instruction": "a", "input": None, "output": "b"}] * 2
    for file in (
        tiny.rows_to_parquet(tmp_path / "a.parquet", rows),
        tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows),
    ):
        assert pairs_of(load("--dataset", str(file)).train) == [(WITHOUT_INPUT.format("a"), "b")] * 2
