"""Reading datasets: kinds of files, rows that are wrong, splits, and the cache."""

import gzip
import json
import logging
import os
import re
from collections import Counter

import datasets
import pyarrow
import pytest
import tiny

import qlora

# Each row trips somebody: separators and line breaks of every sort, quotes, what looks like another type.
ROWS = [
    {"input": "plain", "output": "one"},
    {"input": "a,b;c\t\"d\" 'e'", "output": "two\nlines"},
    {"input": "", "output": "NA"},
    {"input": "null", "output": "007"},
    {"input": "é 日本 🙂 \u2028 \x85 \x0b", "output": "nan"},
    {"input": " padded ", "output": "{}"},
]


def load(*argv):
    """The splits that these flags give."""
    return qlora.load_splits(qlora.parse_config([str(word) for word in argv]))


def pairs_of(rows):
    return [{"input": source, "output": output} for source, output in zip(inputs(rows), outputs(rows), strict=True)]


def outputs(rows):
    return None if rows is None else [segments[-1]["text"] for segments in rows["segments"]]


def inputs(rows):
    return [segments[0]["text"] for segments in rows["segments"]]


def numbered(count, prefix=""):
    return [{"input": "q", "output": f"{prefix}{number}"} for number in range(count)]


def data_error(*argv):
    """The one line that loading ends with."""
    with pytest.raises(qlora.ConfigError) as caught:
        load(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def info(caplog):
    """What the program logged, at INFO and above."""
    caplog.set_level(logging.INFO, "qlora")
    return caplog


# ------------------------------------------------------------------------------------
# Kinds of files and folders
# ------------------------------------------------------------------------------------


def write_json_array(path, rows):
    path.write_text("\n " + json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_tsv(path, rows):
    return tiny.rows_to_csv(path, rows, delimiter="\t")


KINDS = {
    "lines.json": tiny.rows_to_jsonl,
    "array.json": write_json_array,
    "rows.jsonl": tiny.rows_to_jsonl,
    "array.jsonl": write_json_array,
    "rows.csv": tiny.rows_to_csv,
    "rows.tsv": write_tsv,
    "rows.parquet": tiny.rows_to_parquet,
    "ROWS.JSONL": tiny.rows_to_jsonl,
    "rows.ndjson": tiny.rows_to_jsonl,
    "rows.jsonlines": tiny.rows_to_jsonl,
}


def zstd(data):
    """In two frames, as parallel compressors write them."""
    codec = pyarrow.Codec("zstd")
    return b"".join(codec.compress(half, asbytes=True) for half in (data[:20], data[20:]))


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".ZST": zstd}


@pytest.mark.parametrize(
    "name", [name + suffix for name in KINDS for suffix in COMPRESSIONS if name + suffix != "rows.parquet.ZST"]
)
def test_a_file_of_each_kind(tmp_path, name):
    kind, suffix = next((name.removesuffix(s), s) for s in reversed(COMPRESSIONS) if name.endswith(s))
    content = KINDS[kind](tmp_path / "hidden", ROWS).read_bytes()
    (file := tmp_path / name).write_bytes(COMPRESSIONS[suffix](content))
    splits = load("--dataset", file)
    assert pairs_of(splits.train) == ROWS
    assert splits.eval is None


def test_an_evaluation_dataset_of_other_splits_is_read_from_its_first(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"input": name, "output": name}]) for name in ("easy", "hard", "mid")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train = tiny.rows_to_jsonl(tmp_path / "train.jsonl", ROWS)
    assert inputs(load("--dataset", train, "--do_eval", "--eval_dataset", tmp_path / "saved").eval) == ["easy"]


@pytest.mark.parametrize("flags", [["--streaming", "--max_steps", "3"], ["--eval_dataset_size", "64"]], ids=str)
def test_a_calibrated_run_is_evaluated_where_nothing_is_left_to_train_on(tmp_path, flags):
    name = "eval.jsonl" if "--streaming" in flags else "rows.jsonl"
    (tmp_path / "data").mkdir()
    file = tiny.rows_to_jsonl(tmp_path / "data" / name, ROWS)
    dataset = file.parent if "--streaming" in flags else file
    splits = load("--dataset", dataset, "--calibration_rows", "4", "--do_train", "False", "--do_eval", *flags)
    assert splits.train is None and len(splits.eval) == len(ROWS)


def test_a_folder_written_by_save_to_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert pairs_of(load("--dataset", tmp_path / "one").train) == ROWS

    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    splits = load("--dataset", tmp_path / "two", "--do_eval")
    assert pairs_of(splits.train) == ROWS and pairs_of(splits.eval) == ROWS[:2]


def test_a_folder_of_files_named_after_splits(tmp_path):
    tiny.rows_to_jsonl(tmp_path / "train.jsonl", numbered(3))
    tiny.rows_to_csv(tmp_path / "test.csv", numbered(2, "t"))
    (tmp_path / "README.md").write_text("not data")
    splits = load("--dataset", tmp_path, "--do_eval")
    assert outputs(splits.train) == ["0", "1", "2"] and outputs(splits.eval) == ["t0", "t1"]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "val"), ("train", "valid"), ("Train", "DEV"), ("gsm8k_train", "gsm8k_test"),
        ("squad-train-00000-of-00001", "squad-validation-00000-of-00001"), ("a.train", "a.eval"),
        ("gsm8kTrain", "gsm8kTest"), ("trainSplit", "DEVSplit"), ("training", "testing"),
        ("Training2", "my-evaluation"), ("trainset", "testset"), ("my_TrainSet", "devset"),
    ],
)  # fmt: skip
def test_names_of_splits(tmp_path, train, held_out):
    tiny.rows_to_jsonl(tmp_path / f"{train}.jsonl", numbered(3))
    tiny.rows_to_jsonl(tmp_path / f"{held_out}.jsonl", numbered(2, "h"))
    splits = load("--dataset", tmp_path, "--do_eval")
    assert outputs(splits.train) == ["0", "1", "2"] and outputs(splits.eval) == ["h0", "h1"]
    assert outputs(load("--dataset", tmp_path).train) == ["0", "1", "2"]


def test_several_files_of_one_split(tmp_path):
    for name in ("train-1", "part_train", "val", "dev_2"):
        tiny.rows_to_jsonl(tmp_path / f"{name}.jsonl", numbered(1, name))
    splits = load("--dataset", tmp_path, "--do_eval")
    assert outputs(splits.train) == ["part_train0", "train-10"] and outputs(splits.eval) == ["dev_20", "val0"]


def test_a_folder_with_dev_and_val_alone_has_nothing_to_train_on(tmp_path):
    message = data_error("--dataset", write_splits(tmp_path, "dev", "val"))
    assert "no split named train, found validation" in message


def test_splits_of_a_saved_dataset_may_have_other_names(tmp_path):
    parts = {"Train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    splits = load("--dataset", tmp_path / "saved", "--do_eval")
    assert pairs_of(splits.train) == ROWS and pairs_of(splits.eval) == ROWS[:2]


def test_sub_folders_are_read_where_the_folder_has_no_data(tmp_path, info):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / "data" / split).mkdir(parents=True)
        tiny.rows_to_jsonl(tmp_path / "data" / split / "part.jsonl", numbered(count, split))
    (tmp_path / ".git").mkdir()
    tiny.rows_to_jsonl(tmp_path / ".git" / "train.jsonl", numbered(9))
    splits = load("--dataset", tmp_path, "--do_eval")
    assert outputs(splits.train) == ["train0", "train1"] and outputs(splits.eval) == ["test0"]
    assert not any("not read" in message for message in info.messages)


def test_hidden_files_of_the_working_directory_are_not_read(tmp_path, monkeypatch):
    tiny.rows_to_jsonl(tmp_path / "rows.jsonl", numbered(2, "seen"))
    tiny.rows_to_jsonl(tmp_path / ".rows.jsonl", numbered(2, "hidden"))
    monkeypatch.chdir(tmp_path)
    assert outputs(load("--dataset", ".").train) == ["seen0", "seen1"]


def test_what_is_not_read_of_a_folder_is_named(tmp_path, info):
    write_splits(tmp_path, "train", "test", "validation")
    (tmp_path / "old").mkdir()
    tiny.rows_to_jsonl(tmp_path / "old" / "train.jsonl", numbered(9))
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / ".hidden").write_text("")
    assert len(load("--dataset", tmp_path, "--do_eval").train) == 3
    assert [m for m in info.messages if "not read" in m] == [
        f"{tmp_path}: not read: notes.txt, old/train.jsonl",
        f"not read: {tmp_path}[test]",
    ]


@pytest.mark.parametrize("names", [("a", "b"), ("tests", "trains"), ("attest", "constraint")])
def test_a_folder_of_other_files_is_one_set(tmp_path, names):
    tiny.rows_to_jsonl(tmp_path / f"{names[0]}.jsonl", numbered(2, "a"))
    (tmp_path / f"{names[1]}.csv.gz").write_bytes(gzip.compress(b"input,output\nq,b0\n"))
    (tmp_path / "notes.txt").write_text("not data")
    assert outputs(load("--dataset", tmp_path).train) == ["a0", "a1", "b0"]


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("not data")
    message = data_error("--dataset", tmp_path)
    assert str(tmp_path) in message and ".jsonl" in message


@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz", "rows"])
def test_an_unknown_kind_of_file(tmp_path, name):
    (tmp_path / name).write_text("text")
    message = data_error("--dataset", tmp_path / name)
    assert str(tmp_path / name) in message and ".jsonl" in message and ".parquet" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("torn.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode() * 99, mtime=0)[:-20]),
        ("no.jsonl.gz", b'{"input": "a", "output": "b"}\n'),
        ("no.jsonl.zst", b'{"input": "a", "output": "b"}\n'),
        ("torn.jsonl.zst", pyarrow.Codec("zstd").compress(bytes(range(256)) * 9, asbytes=True)[:-20]),
        ("no.parquet", b"PAR1 it is not"),
        ("no.parquet.gz", gzip.compress(b"PAR1 it is not", mtime=0)),
        ("empty.parquet", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in data_error("--dataset", tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv.gz", "sub/none.parquet"])
def test_a_missing_file(tmp_path, name):
    message = data_error("--dataset", tmp_path / name)
    assert str(tmp_path / name) in message and "no such file" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.json", "[]"),
        ("rows.csv", ""),
        ("rows.csv", "input,output\n"),
        ("rows.tsv", "input\toutput\r\n"),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_empty_set_always_stops(tmp_path, name, content, policy):
    (tmp_path / name).write_text(content)
    options = ("--on_bad_rows", policy, "--output_dir", tmp_path / "out")
    assert str(tmp_path / name) in data_error("--dataset", tmp_path / name, *options)


# ------------------------------------------------------------------------------------
# Contents of files
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "array.json", "rows.csv.gz"])
def test_another_encoding_is_named(tmp_path, name, encoding):
    """Before it is said that columns are missing; also where rows may be skipped."""
    text = KINDS[name.removesuffix(".gz")](tmp_path / "utf-8", ROWS).read_text(encoding="utf-8")
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    options = ("--on_bad_rows", "skip", "--output_dir", tmp_path / "out")
    message = data_error("--dataset", tmp_path / name, *options)
    assert message.startswith(f"{tmp_path / name}: ") and "UTF-16 or UTF-32, expected UTF-8" in message


def test_latin_1_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("input,output\ncafé,b\n".encode("latin-1"))
    assert "a.csv:2: field 'input' is" in (message := data_error("--dataset", tmp_path / "a.csv"))
    assert "expected UTF-8 (is the file in Latin-1?)" in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("header", ["instruction,output,café", "é,output", "Frage,Antwörter"])
def test_an_encoding_that_shows_in_the_header_alone_is_named(tmp_path, encoding, header):
    """Also where the column is not needed, and before it is said that columns are missing."""
    (tmp_path / "a.csv").write_bytes(f"{header}\n{'x' + ',y' * header.count(',')}\n".encode(encoding))
    message = data_error("--dataset", tmp_path / "a.csv")
    assert message.startswith(f"{tmp_path / 'a.csv'}:")
    assert ("Latin-1" if encoding == "latin-1" else "UTF-16") in message and "format" not in message


def test_csv_cells_are_their_text(tmp_path):
    cells = ["", "NA", "null", "nan", "None", "007", "1.50", "1e5", "True", " x ", "-", "#N/A", "1,000"]
    text = "input,output\n" + "".join(f'"{cell}",out\n' if "," in cell else f"{cell},out\n" for cell in cells)
    (tmp_path / "rows.csv").write_text(text.replace("t,o", "t, o", 1))  # a column's name has no space around it
    assert inputs(load("--dataset", tmp_path / "rows.csv").train) == cells
    (tmp_path / "rows.tsv").write_text(text.replace(",out", "\tout").replace("input,", "input\t"))
    assert inputs(load("--dataset", tmp_path / "rows.tsv").train) == cells


def test_csv_quotes_and_line_breaks_in_cells(tmp_path):
    text = 'output,input\n"say ""hi""","a\nb"\n"x, y","c\r\nd"\n""" ""","e"\n'
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert pairs_of(load("--dataset", tmp_path / "rows.csv").train) == [
        {"output": 'say "hi"', "input": "a\nb"},
        {"output": "x, y", "input": "c\r\nd"},
        {"output": '" "', "input": "e"},
    ]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_several_columns_without_a_name_are_read(tmp_path, name, mark):
    """What Excel writes behind cells that were emptied."""
    (tmp_path / name).write_text("input,output,,\na,b,,\nc,d,,\n".replace(",", mark))
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    assert pairs_of(load("--dataset", tmp_path / name).train) == rows


def test_a_long_csv_cell(tmp_path):
    """Longer than the 128 KiB at which Python's csv module stops unless told otherwise."""
    rows = [{"input": "q", "output": "long " * 40_000}]
    assert pairs_of(load("--dataset", tiny.rows_to_csv(tmp_path / "a.csv", rows)).train) == rows


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "array.json"])
def test_byte_order_marks_and_line_ends(tmp_path, name, mark, end):
    lines = {
        "rows.csv": ["input,output", "é,x", "b,y"],
        "rows.jsonl": ['{"input": "é", "output": "x"}', "", '{"input": "b", "output": "y"}'],
        "array.json": ["[", '{"input": "é", "output": "x"},', '{"input": "b", "output": "y"}', "]"],
    }
    (tmp_path / name).write_bytes(mark + "".join(line + end for line in lines[name]).encode())
    expected = [{"input": "é", "output": "x"}, {"input": "b", "output": "y"}]
    assert pairs_of(load("--dataset", tmp_path / name).train) == expected


def test_numbers_and_booleans_become_their_text(tmp_path):
    rows = [
        {"input": 7, "output": 1.5},
        {"input": True, "output": False},
        {"input": -0.25, "output": 0},
        {"input": 12345678901234567890, "output": "text"},
    ]
    expected = [["7", "1.5"], ["true", "false"], ["-0.25", "0"], ["12345678901234567890", "text"]]
    for write, name in ((tiny.rows_to_jsonl, "rows.jsonl"), (write_json_array, "rows.json")):
        loaded = load("--dataset", write(tmp_path / name, rows)).train
        assert [list(pair.values()) for pair in pairs_of(loaded)] == expected


def test_parquet_numbers_become_their_text(tmp_path):
    file = tiny.rows_to_parquet(tmp_path / "a.parquet", [{"input": 7, "output": True}, {"input": 8, "output": False}])
    expected = [{"input": "7", "output": "true"}, {"input": "8", "output": "false"}]
    assert pairs_of(load("--dataset", file).train) == expected


@pytest.mark.parametrize("field", ["input", "category", "source"])
def test_a_null_in_an_optional_column_means_missing(tmp_path, field):
    rows = [
        {"instruction": "a", "output": "b", field: None},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", field: "c"},
    ]
    loaded = pairs_of(load("--dataset", tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)).train)
    assert loaded[0] == loaded[1] and (loaded[1] == loaded[2]) == (field != "input")
    assert "### Input" not in loaded[0]["input"]


# ------------------------------------------------------------------------------------
# Bad rows
# ------------------------------------------------------------------------------------

GOOD = b'{"input": "a", "output": "b"}\n'
# File, content, line or row of the first bad row, what the message says of it, how many more.
BAD = {
    "missing": ("a.jsonl", GOOD + b'{"input": "a"}\n', 2, ["'output'", "missing", "text"], 0),
    "null": ("a.jsonl", GOOD + b'{"input": "a", "output": null}\n', 2, ["'output'", "null", "text"], 0),
    "null input": ("a.jsonl", GOOD + b'{"input": null, "output": "b"}', 2, ["'input'", "null", "text"], 0),
    "list": ("a.jsonl", GOOD + b'{"input": ["x"], "output": "b"}', 2, ["'input'", '["x"]', "text"], 0),
    "object": ("a.jsonl", GOOD + b'{"input": "a", "output": {"x": 1}}', 2, ["'output'", '{"x": 1}', "text"], 0),
    "NaN": ("a.jsonl", GOOD + b'{"input": NaN, "output": "b"}', 2, ["'input'", "NaN", "text"], 0),
    "infinite": ("a.jsonl", GOOD + b'{"input": "a", "output": -Infinity}', 2, ["'output'", "Infinity", "text"], 0),
    "overflow": ("a.jsonl", GOOD + b'{"input": "a", "output": 1e999}', 2, ["'output'", "Infinity", "text"], 0),
    "empty": ("a.jsonl", GOOD + b'{"input": "a", "output": ""}', 2, ["output", "empty"], 0),
    "surrogate": ("a.jsonl", GOOD + b'{"input": "\\ud83d", "output": "b"}', 2, ["'input'", "UTF-8"], 0),
    "no object": ("a.jsonl", GOOD + b'["a", "b"]\n"c"\n3\n' + GOOD, 2, ["list", "object"], 2),
    "null row": ("a.jsonl", GOOD + b"null\n", 2, ["object"], 0),
    "broken": ("a.jsonl", GOOD + b"\n" + b'{"input": "a", \n', 3, ["JSON"], 0),
    "torn": ("a.jsonl", GOOD * 2 + b'{"input": "a", "outp', 3, ["JSON"], 0),
    "three": ("a.jsonl", GOOD + b'{"input": "a"}\n' * 3 + GOOD, 2, ["'output'", "missing"], 2),
    "encoding": ("a.jsonl", GOOD + b'{"input": "caf\xe9", "output": "b"}', 2, ["'input'", "UTF-8"], 0),
    "u2028": ("a.jsonl", '{"input": "\u2028\x85", "output": "b"}\n{}'.encode(), 2, ["missing"], 0),
    "array": ("a.json", b'[\n{"input": "a", "output": "b"},\n{"input": "a"}]', 2, ["'output'", "missing"], 0),
    "array of lists": ("a.json", b'[{"input": "a", "output": "b"}, ["a"]]', 2, ["list", "object"], 0),
    "csv fewer": ("a.csv", b"input,output\na,b\nc\n", 3, ["1", "2", "input, output"], 0),
    "csv more": ("a.csv", b"input,output\na,b,c\nd,e\n\nf,g,h,i\n", 2, ["3", "2", "input, output"], 1),
    "csv empty": ("a.csv", b"input,output\na,b\n,\n", 3, ["output", "empty"], 0),
    "csv encoding": ("a.csv", b"input,output\na,b\ncaf\xe9,d\n", 3, ["'input'", "UTF-8"], 0),
    "csv lines": ("a.csv", b'input,output\n"a\nb\nc",d\ne,"f\r\ng"\nh\n', 7, ["1", "2"], 0),
    "csv start": ("a.csv", b'input,output\na,b\n"c\nd\n",""\ne,f\n', 3, ["output", "empty"], 0),
    "csv open": ("a.csv", b'input,output\na,b\nc,"d\ne,f\n', 3, ["lines 3 to 4, from a quote", "CSV"], 0),
    "csv closed late": ("a.csv", b'input,output\na,b\n"c,d\ne\nf",g,h\ni,j', 3, ["lines 3 to 5", "3 fields"], 0),
    "csv quote": ("a.csv", b'input,output\na,b\n"c"x,d\ne,f\n', 3, ["CSV"], 0),
    "tsv open": ("a.tsv", b'input\toutput\na\tb\n"c\td\ne\t"f"\n', 3, ["lines 3 to 4", r"'\t' expected"], 0),
    "tsv": ("a.tsv", b"input\toutput\na\tb\nc\td\te\n", 3, ["3", "2", "input, output"], 0),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_stops_with_one_line(tmp_path, case):
    name, content, number, fragments, more = BAD[case]
    (tmp_path / name).write_bytes(content)
    message = data_error("--dataset", tmp_path / name, "--dataset_format", "input-output")
    where, _, rest = message.partition(": ")
    assert where == f"{tmp_path / name}:{number}"
    assert all(fragment in rest for fragment in [*fragments, "expected", "--on_bad_rows skip"])
    assert (f"{more} more" in rest) if more else "more" not in rest


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_may_be_skipped(tmp_path, case, info):
    name, content, number, _, more = BAD[case]
    (tmp_path / name).write_bytes(content + (b"" if content.endswith((b"\n", b"]")) else b"\n"))
    out = tmp_path / "out"
    options = ("--dataset_format", "input-output", "--on_bad_rows", "skip", "--output_dir", out)
    splits = load("--dataset", tmp_path / name, *options)
    assert len(splits.train) > 0 and all(outputs(splits.train))

    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rejected) == 1 + more
    assert rejected[0]["where"] == f"{tmp_path / name}:{number}" and rejected[0]["reason"]
    (warning,) = [r.getMessage() for r in info.records if r.levelno == logging.WARNING]
    assert f"{1 + more} of {len(splits.train) + 1 + more} rows" in warning
    assert "rejected.jsonl" in warning


def test_rejected_jsonl_holds_the_row(tmp_path):
    """The file of rejected rows holds each row, not only where it was."""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"input": "find me", "output": ""}\n')
    out = tmp_path / "out"
    load("--dataset", tmp_path / "a.jsonl", "--on_bad_rows", "skip", "--output_dir", out)
    (line,) = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "find me" in line


def test_the_cells_of_a_rejected_csv_line_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text("input,output\na,b\nfind,me,too\n")
    load("--dataset", tmp_path / "a.csv", "--on_bad_rows", "skip", "--output_dir", tmp_path / "out")
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["row"] == ["find", "me", "too"]


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("alpaca", {"instruction": "a", "output": " "}, "output"),
        ("self-instruct", {"prompt": "a", "completion": ""}, "completion"),
        ("airoboros", {"instruction": "a", "response": "\n"}, "response"),
        ("text", {"text": ""}, "text"),
        ("hh-rlhf", {"chosen": ""}, "chosen"),
        ("chip2", {"text": "<human>: a\n<bot>: "}, "text"),
    ],
)
def test_an_empty_output_names_its_field(tmp_path, name, row, field):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [row])
    message = data_error("--dataset", file, "--dataset_format", name)
    assert message.startswith(f"{file}:1: field {field!r}: the output is empty, expected something to learn")


def test_a_row_that_the_limits_leave_nothing_of_names_them(run_qlora, tmp_path, models):
    """One token, which nothing predicts: a tokenizer without BOS, an empty input and an output cut to one token."""
    model = tiny.write_model(tmp_path / "model", "llama", tokenizer=tiny_without_bos)
    rows = [{"input": "ab", "output": "cd"}, {"input": "", "output": "x"}]
    flags = {
        "model_name_or_path": model,
        "dataset": tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows),
        "target_max_len": 1,
    }
    run = run_qlora(**flags)
    found = f"{tmp_path}/a.jsonl:2: no token left to learn, expected one at least: raise the length limits"
    assert run.code == 2 and run.stderr.splitlines()[-1].startswith(f"error: {found}; --on_bad_rows skip")
    assert run_qlora(**flags, on_bad_rows="skip", max_steps=1).code == 0
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["where"].endswith("a.jsonl:2") and "length limits" in json.loads(line)["reason"]


def tiny_without_bos(path):
    return tiny.write_tokenizer(path, "byte", bos=None)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_set_without_a_good_row_always_stops(tmp_path, policy):
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": ""}\n' * 3)
    options = ("--on_bad_rows", policy, "--output_dir", tmp_path / "out")
    assert str(tmp_path / "a.jsonl") in data_error("--dataset", tmp_path / "a.jsonl", *options)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"input": "a", "output": "b"},\n{"input": "a" "output": "b"}]\n', 2),
        ('[{"input": "a", "output": "b"},\n\n{"input": "a",', 3),
        ('[{"input": "a", "output": "b"}]\n[1]\n', 2),
    ],
)
def test_a_broken_json_array_names_the_line(tmp_path, content, line):
    (tmp_path / "a.json").write_text(content)
    message = data_error("--dataset", tmp_path / "a.json", "--dataset_format", "input-output")
    assert f"{tmp_path / 'a.json'}:{line}:" in message and "JSON" in message


def test_bad_parquet_rows_are_numbered(tmp_path):
    rows = [*numbered(2), {"input": "q", "output": None}, {"input": None, "output": "x"}]
    message = data_error("--dataset", tiny.rows_to_parquet(tmp_path / "a.parquet", rows))
    assert f"{tmp_path / 'a.parquet'}:3:" in message and "1 more" in message
    assert all(fragment in message for fragment in ("'output'", "null", "expected"))


def test_a_parquet_column_of_lists(tmp_path):
    file = tiny.rows_to_parquet(tmp_path / "a.parquet", [{"input": "q", "output": ["x"]}])
    message = data_error("--dataset", file)
    assert f"{file}:1:" in message and "'output'" in message and '["x"]' in message


def test_bad_rows_of_a_folder_name_their_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD + b'{"input": "a"}\n')
    assert f"{tmp_path / 'b.jsonl'}:2:" in data_error("--dataset", tmp_path)


def test_bad_rows_of_a_saved_dataset_name_split_and_row(tmp_path):
    rows = [*numbered(1), {"input": "q", "output": None}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    message = data_error("--dataset", tmp_path / "saved")
    assert all(fragment in message for fragment in (str(tmp_path / "saved"), "train", ":2", "'output'", "null"))


def test_a_bad_row_ends_the_program_with_one_line(run_qlora, tmp_path):
    """And before any weight is loaded: nothing is written."""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"input": "a"}\n')
    run = run_qlora(dataset=tmp_path / "a.jsonl")
    error = run.stderr.splitlines()[-1]
    assert run.code == 2 and error.startswith(f"error: {tmp_path / 'a.jsonl'}:2: ")
    assert "Traceback" not in run.stderr and not run.files()


# ------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------


def write_splits(folder, *names):
    for name in names:
        tiny.rows_to_jsonl(folder / f"{name}.jsonl", numbered(3, f"{name}-"))
    return folder


@pytest.mark.parametrize("flags", [["--do_eval"], ["--do_predict", "--predict_with_generate"]])
@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train", "test"), "test"),
        (("train", "validation", "test"), "validation"),
        (("train", "eval", "validation", "test"), "eval"),
        (("train", "eval", "test"), "eval"),
    ],
)
def test_the_split_to_evaluate_on(tmp_path, info, flags, names, chosen):
    splits = load("--dataset", write_splits(tmp_path, *names), *flags)
    assert outputs(splits.train) == ["train-0", "train-1", "train-2"]
    assert outputs(splits.eval) == [f"{chosen}-0", f"{chosen}-1", f"{chosen}-2"]
    assert any(str(tmp_path) in m and chosen in m.replace(str(tmp_path), "") for m in info.messages)


def test_without_evaluation_nothing_is_held_out(tmp_path):
    splits = load("--dataset", write_splits(tmp_path, "train", "test"))
    assert outputs(splits.train) == ["train-0", "train-1", "train-2"] and splits.eval is None
    file = tiny.rows_to_jsonl(tmp_path / "train.jsonl", numbered(50))
    splits = load("--dataset", file, "--eval_dataset_size", "10")
    assert outputs(splits.train) == [str(n) for n in range(50)] and splits.eval is None


def test_no_split_to_train_on(tmp_path):
    message = data_error("--dataset", write_splits(tmp_path, "test"))
    assert "train" in message and "test" in message


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """`rows_file(n)` -> a file of n numbered rows."""
    folder = tmp_path_factory.mktemp("numbered")
    return lambda count: tiny.rows_to_jsonl(folder / f"{count}.jsonl", numbered(count))


def library_split(count, test_size):
    """What datasets' own train_test_split makes of the rows at the original's seed."""
    whole = datasets.Dataset.from_list(numbered(count))
    parts = whole.train_test_split(test_size=test_size, shuffle=True, seed=42)
    return parts["train"]["output"][:], parts["test"]["output"][:]


@pytest.mark.parametrize(
    ("count", "given", "held_out"),
    [
        (50, None, 5),
        (19, None, 1),
        (4095, None, 409),
        (4096, None, 1024),
        (50, "1", 1),
        (50, "7", 7),
        (50, "49", 49),
        (50, "0.1", 5),
        (50, "0.5", 25),
        (10, "0.25", 0.25),  # not a whole number of rows: the library's way of rounding
        (10, "0.01", 0.01),
    ],
)
def test_rows_are_held_out_as_the_library_does(rows_file, count, given, held_out, info):
    options = () if given is None else ("--eval_dataset_size", given)
    splits = load("--dataset", rows_file(count), "--do_eval", *options)
    assert (outputs(splits.train), outputs(splits.eval)) == library_split(count, held_out)
    said = any("tenth" in message and str(held_out) in message for message in info.messages)
    assert said == (given is None and count < 4096)


@pytest.mark.parametrize(("given", "count"), [("20", 20), ("21", 20), ("1024", 1000), ("0.99", 2), ("1", 1)])
def test_eval_dataset_size_that_leaves_nothing_to_train(rows_file, given, count):
    message = data_error("--dataset", rows_file(count), "--do_eval", "--eval_dataset_size", given)
    assert f"--eval_dataset_size {given}" in message and str(count) in message


def test_a_run_that_only_evaluates_holds_out_the_same_rows(rows_file):
    both = load("--dataset", rows_file(50), "--do_eval", "--eval_dataset_size", "7")
    alone = load("--dataset", rows_file(50), "--do_eval", "--eval_dataset_size", "7", "--do_train", "False")
    assert outputs(alone.eval) == outputs(both.eval) and alone.train is None


def test_sequential_order_is_the_files_beside_held_out_rows(rows_file):
    flags = ("--do_eval", "--eval_dataset_size", "7", "--train_sampling_strategy", "sequential")
    splits = load("--dataset", rows_file(50), *flags)
    _, held_out = library_split(50, 7)
    assert outputs(splits.eval) == held_out
    assert outputs(splits.train) == [str(n) for n in range(50) if str(n) not in held_out]


def test_a_run_that_only_evaluates_may_take_every_row(rows_file):
    splits = load("--dataset", rows_file(19), "--do_eval", "--eval_dataset_size", "100", "--do_train", "False")
    assert sorted(outputs(splits.eval)) == sorted(str(n) for n in range(19))


@pytest.mark.parametrize("column", ["category", "source"])
def test_a_category_stratifies_the_split(tmp_path, column):
    """Categories of 40, 9 and 1 rows; the last must break nothing."""
    rows = numbered(40, "a") + numbered(9, "b") + numbered(1, "c")
    rows = [row | {column: row["output"][0]} for row in rows]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load("--dataset", file, "--do_eval", "--eval_dataset_size", "10")
    assert len(splits.eval) == 10 and len(splits.train) == 40
    first_letters = "".join(sorted(output[0] for output in outputs(splits.eval)))
    assert first_letters.replace("c", "") in ("a" * 8 + "bb", "a" * 8 + "b")


@pytest.mark.parametrize("values", [(7, 8), (True, False), (["a"], ["b"]), (None, "b")], ids=str)
def test_a_category_may_be_a_number_or_missing(tmp_path, values):
    """Ten rows of one and thirty of the other: the held-out ones have a quarter of the first."""
    rows = [{"input": "q", "output": f"{n % 4 == 0}", "category": values[n % 4 != 0]} for n in range(40)]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load("--dataset", file, "--do_eval", "--eval_dataset_size", "8")
    assert sorted(outputs(splits.eval)) == ["False"] * 6 + ["True"] * 2


def test_limits_count_after_the_split(rows_file, info):
    options = ("--do_eval", "--eval_dataset_size", "10", "--max_train_samples", "4", "--max_eval_samples", "3")
    train, held_out = library_split(50, 10)
    splits = load("--dataset", rows_file(50), *options)
    assert outputs(splits.train) == train[:4] and outputs(splits.eval) == held_out[:3]
    assert "max_train_samples: the first 4 of 40 rows" in info.messages


def test_limits_larger_than_the_set(tmp_path):
    options = ("--do_eval", "--max_train_samples", "4", "--max_eval_samples", "9")
    splits = load("--dataset", write_splits(tmp_path, "train", "test"), *options)
    assert len(splits.train) == len(splits.eval) == 3


def test_datasets_with_different_formats_are_concatenated(tmp_path):
    tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"instruction": "A", "output": "b"}])
    tiny.rows_to_csv(tmp_path / "c.csv", [{"input": "c", "output": "d"}])
    tiny.rows_to_parquet(tmp_path / "e.parquet", [{"text": "e"}, {"text": "f"}])
    names = f"{tmp_path / 'a.jsonl'}, {tmp_path / 'c.csv'},{tmp_path / 'e.parquet'}"
    rows = load("--dataset", names).train
    assert outputs(rows) == ["b", "d", "e", "f"]
    assert inputs(rows)[0].endswith("### Instruction:\nA\n\n### Response: ") and inputs(rows)[1] == "c"


def test_a_file_with_a_comma_in_its_name(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a,b.jsonl", numbered(2))
    assert outputs(load("--dataset", file).train) == ["0", "1"]


# ------------------------------------------------------------------------------------
# Shares and repeats
# ------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Files of 40, 9 and 3 rows; an output names its file."""
    for name, count in (("a", 40), ("b", 9), ("c", 3)):
        tiny.rows_to_jsonl(tmp_path / f"{name}.jsonl", numbered(count, name))
    return tmp_path


def counted(rows):
    """How many different outputs occur how often, by their first letter."""
    return Counter((output[0], times) for output, times in Counter(outputs(rows)).items())


def test_shares_and_repeats(three, info):
    rows = load("--dataset", f"{three}/a.jsonl:0.25, {three}/b.jsonl:2,{three}/c.jsonl").train
    assert counted(rows) == {("a", 1): 10, ("b", 2): 9, ("c", 1): 3}
    assert any("a.jsonl: a share of 0.25: 10 of 40 rows" in message for message in info.messages)


def test_a_share_between_two_numbers_of_repeats(three):
    assert counted(load("--dataset", f"{three}/c.jsonl:2.34").train) == {("c", 2): 2, ("c", 3): 1}
    assert counted(load("--dataset", f"{three}/a.jsonl:.1,{three}/c.jsonl:1").train) == {("a", 1): 4, ("c", 1): 3}


def test_a_share_is_the_same_each_time_and_not_the_first_rows(three):
    first, second = (outputs(load("--dataset", f"{three}/a.jsonl:0.5", "--seed", seed).train) for seed in (1, 2))
    assert first == second and len(first) == 20 and first != [f"a{n}" for n in range(20)]
    assert first == sorted(first, key=lambda output: int(output[1:]))


def test_no_copy_of_a_held_out_row_is_trained_on(three):
    flags = ("--do_eval", "--eval_dataset_size", "0.3")
    splits = load("--dataset", f"{three}/b.jsonl:3,{three}/a.jsonl:0.5", *flags)
    assert not set(outputs(splits.train)) & set(outputs(splits.eval))
    assert len(splits.eval) == 9 == len(set(outputs(splits.eval)))  # of 9 + 20 different rows
    assert set(Counter(o for o in outputs(splits.train) if o[0] == "b").values()) == {3}


def test_a_split_of_its_own_is_evaluated_on_whole(tmp_path):
    splits = load("--dataset", f"{write_splits(tmp_path, 'train', 'test')}:2", "--do_eval")
    assert len(splits.train) == 6 and len(splits.eval) == 3
    alone = load("--dataset", f"{tmp_path}:2", "--do_eval", "--do_train", "False")
    assert alone.train is None and len(alone.eval) == 3


@pytest.mark.parametrize("name", ["a:2", "a:0.5", "x,y:3"])
def test_a_path_with_a_colon(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    tiny.rows_to_jsonl(tmp_path / name / "rows.jsonl", numbered(4))
    assert outputs(load("--dataset", name).train) == ["0", "1", "2", "3"]
    assert len(load("--dataset", f"{tmp_path / name}").train) == 4
    if "," not in name:
        assert len(load("--dataset", f"{name}:2,{name}").train) == 12


@pytest.mark.parametrize(
    ("share", "message"),
    [(":0", "expected a share such as 0.5"), (":0.0", "expected a share")],
)
def test_a_share_of_nothing(three, share, message):
    with pytest.raises(qlora.ConfigError, match=message) as caught:
        load("--dataset", f"{three}/c.jsonl{share}")
    assert f"c.jsonl{share}" in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_formats_of_the_rows_are_recorded_and_leave_a_repeat_as_it_was(run_qlora, data_dir, tmp_path, streaming):
    names = [data_dir / "alpaca.jsonl", *[data_dir / "support.jsonl"] * (not streaming)]
    flags = {"streaming": True, "eval_dataset_size": 2} if streaming else {"eval_dataset": data_dir / "support.csv"}
    run = run_qlora(dataset=",".join(map(str, names)), do_eval=True, max_steps=1, **flags)
    data = run.json("run.json")["data"]
    assert data["train"]["formats"] == ["alpaca", *["input-output"] * (not streaming)]
    assert data["eval"]["formats"] == ["alpaca" if streaming else "input-output"]
    again = run_qlora(str(run.output_dir / "run.json"), output_dir=tmp_path / "again", dataset=None, max_steps=1)
    assert "what differs from it:\n  nothing" in again.stderr and again.json("run.json")["data"] == data


def test_shares_through_a_whole_run(run_qlora, three):
    """run.json has them; a stream takes none; the output folder may not be the dataset's."""
    names = f"{three}/b.jsonl:2,{three}/c.jsonl"
    run = run_qlora(dataset=names, max_steps=1)
    record = run.json("run.json")
    assert run.code == 0 and record["flags"]["dataset"] == names
    assert record["data"]["train"]["rows"] == 21 and record["data"]["train"]["duplicates"] == 9
    stream = run_qlora(dataset=f"{three}/b.jsonl:2", streaming=True, max_steps=1)
    assert stream.code == 2 and "--streaming needs one --dataset" in stream.stderr
    inside = run_qlora(dataset=f"{three}/b.jsonl:2", output_dir=three)
    assert inside.code == 2 and "the run reads --dataset" in inside.stderr


# ------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", numbered(3))
    cache = ("--cache_dir", tmp_path / "cache")
    formatted = []
    original = qlora.FORMATS["input-output"]

    def parse(row):
        formatted.append(row)
        return original.parse(row)

    spied = original._replace(parse=parse)
    monkeypatch.setitem(qlora.FORMATS, "input-output", spied)
    for _ in range(2):
        assert outputs(load("--dataset", file, *cache).train) == ["0", "1", "2"]
    assert len(formatted) == 3  # by the first call alone

    stat = file.stat()
    file.write_text(file.read_text().replace('"2"', '"9"'))  # of the same size, and no younger
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert outputs(load("--dataset", file, *cache).train) == ["0", "1", "9"]


def test_another_format_of_the_same_file_is_read_anew(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": "a", "output": "b", "text": "c"}])
    for name, output in (("input-output", "b"), ("text", "c")):
        assert outputs(load("--dataset", file, "--dataset_format", name).train) == [output]


def test_bad_rows_are_found_in_the_cache_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"input": "a"}\n')
    first, second = (data_error("--dataset", tmp_path / "a.jsonl") for _ in range(2))
    assert first == second


def test_a_format_of_ones_own_says_that_its_rows_are_cached(tmp_path, info):
    (tmp_path / "mine.py").write_text("def row(r):\n    return {'input': r['q'], 'output': r['a']}\n")
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}])
    load("--dataset", file, "--dataset_format", f"{tmp_path / 'mine.py'}:row")
    assert sum("if it reads other files" in m and "--cache_dir" in m for m in info.messages) == 1


def test_no_column_is_read_row_by_row(run_qlora, monkeypatch, tmp_path):
    """Of two million rows that takes half a minute; as a slice it takes 0.1 s."""

    def fail(column):
        raise AssertionError("a column of the dataset is iterated over")

    monkeypatch.setattr(datasets.arrow_dataset.Column, "__iter__", fail)
    for n, flags in enumerate(({"packing": True}, {"do_eval": True, "eval_dataset_size": 2})):
        assert run_qlora(max_steps=1, **flags, output_dir=tmp_path / f"{n}").code == 0


# ------------------------------------------------------------------------------------
# The hub
# ------------------------------------------------------------------------------------


def test_an_unknown_hub_dataset_is_one_line(run_qlora):
    run = run_qlora(dataset="nobody/no-such-set")
    error = run.stderr.splitlines()[-1]
    assert run.code == 2 and error.startswith("error: ") and "nobody/no-such-set" in error
    assert "Traceback" not in run.stderr and len(error) < 1000


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("no\nroute"),
        datasets.exceptions.DatasetNotFoundError("not\nfound"),
        ValueError("Unknown\nsplit"),
        RuntimeError("Dataset scripts are no longer supported, but found\nx.py"),
        TimeoutError("slow"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_each_failure_of_the_hub_is_one_line(monkeypatch, failure):
    def load_dataset(*args, **options):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = data_error("--dataset", "a/b")
    assert "a/b" in message and " ".join(str(failure).split()) in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{\n  "input": "a",\n  "output": "b"\n}\n', ":1: not valid JSON"),
        ("a.json", b'[{"input":1,}]', "not valid JSON"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"", "no row in it"),
        ("a.csv", b"input,output\n", "no row in it"),
        ("a.jsonl", b"[1]\n[2]\n", "expected"),
    ],
    ids=["pretty", "trailing comma", "utf-16", "empty", "header alone", "lists"],
)
def test_a_file_of_broken_rows_alone_names_the_first(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(qlora.ConfigError) as caught:
        qlora.load_splits(qlora.parse_config(["--dataset", str(tmp_path / name)]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------
# --eval_dataset, --columns, --as_chat
# ------------------------------------------------------------------------------------
def test_rows_of_another_dataset_are_evaluated(rows_file, tmp_path):
    """All of a file, or of a folder its split for evaluation; nothing is held out of --dataset."""
    other = tiny.rows_to_jsonl(tmp_path / "questions.jsonl", numbered(3, "other "))
    splits = load("--dataset", rows_file(20), "--do_eval", "--eval_dataset", other)
    assert len(splits.train) == 20 and outputs(splits.eval) == ["other 0", "other 1", "other 2"]
    (folder := tmp_path / "folder").mkdir()
    tiny.rows_to_jsonl(folder / "train.jsonl", numbered(2, "train "))
    tiny.rows_to_jsonl(folder / "val.jsonl", numbered(2, "val "))
    splits = load("--dataset", rows_file(20), "--do_eval", "--eval_dataset", folder)
    assert outputs(splits.eval) == ["val 0", "val 1"]
    assert load("--dataset", rows_file(20), "--eval_dataset", other).eval is None  # nothing is evaluated


def test_rows_to_train_on_are_not_read_where_others_are_evaluated(tmp_path, info):
    bad = tiny.rows_to_jsonl(tmp_path / "bad.jsonl", [{"input": "a", "output": ""}])
    good = tiny.rows_to_jsonl(tmp_path / "good.jsonl", numbered(2))
    splits = load("--dataset", bad, "--eval_dataset", good, "--do_train", "False", "--do_eval")
    assert splits.train is None and len(splits.eval) == 2 and f"not read: {bad}" in info.messages


@pytest.mark.parametrize("name", ["none.jsonl", "no/such-data"])
def test_a_missing_dataset_to_evaluate_on_is_not_blamed_on_another_flag(rows_file, name):
    with pytest.raises(qlora.ConfigError, match=f"^(?!.*--dataset).*{name}: no (such|local) file"):
        load("--dataset", rows_file(4), "--do_eval", "--eval_dataset", name)


def test_columns_of_other_names(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}", "output": "not this"} for n in range(3)]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load("--dataset", file, "--columns", "input=question, output=answer")
    assert outputs(splits.train) == ["a0", "a1", "a2"]
    assert [row["segments"][0]["text"] for row in splits.train] == ["q0", "q1", "q2"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("input", "--columns input: expected pairs such as input=question"),
        ("input=", "expected pairs such as"),
        ("input=prompt,output=answer", "none is called prompt, which --columns names"),
        ("input=query,output=reply", "rows.jsonl: found the columns answer, question, but none is called query"),
        ("input=question,input=answer", "--columns input=question,input=answer: expected pairs such as"),
        ("question=input,answer=output", "no format has a field answer, but category, chat_template_kwargs, chosen, "),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(qlora.ConfigError, match=re.escape(message)):
        load("--dataset", file, "--columns", columns)


def test_columns_are_renamed_where_they_are(tmp_path, caplog):
    """A dataset whose rows have the format's own names is used as it is."""
    own = tiny.rows_to_jsonl(tmp_path / "own.jsonl", [{"instruction": "x", "output": "y"}])
    rows = [{"question": "q", "extra": "e", "answer": "a"}]
    other = tiny.rows_to_jsonl(tmp_path / "other.jsonl", rows)
    renamed = ("--columns", "instruction=question,input=extra,output=answer")
    with caplog.at_level("INFO", "qlora"):
        splits = load("--dataset", f"{other},{own}", *renamed, "--do_eval", "--eval_dataset", own)
    assert outputs(splits.train) == ["a", "y"] and outputs(splits.eval) == ["y"]
    said = [message for message in caplog.messages if "it has none of the columns that --columns names" in message]
    assert said and all(message.startswith(f"{own}: format alpaca, inferred") for message in said)
    half = tiny.rows_to_jsonl(tmp_path / "half.jsonl", [{"instruction": "x", "answer": "y"}])
    with pytest.raises(qlora.ConfigError, match=r"half.jsonl: .* but none is called question, which --columns names"):
        load("--dataset", f"{other},{half}", *renamed)


def test_a_function_may_have_any_columns(tmp_path):
    (tmp_path / "mine.py").write_text("def pair(row):\n    return {'input': row['a'], 'output': row['b']}\n")
    mine = ("--dataset_format", f"{tmp_path / 'mine.py'}:pair", "--columns", "a=question,b=answer")
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "r"}])
    own = tiny.rows_to_jsonl(tmp_path / "own.jsonl", [{"a": "q", "b": "s"}])
    assert outputs(load("--dataset", f"{file},{own}", *mine).train) == ["r", "s"]


def test_a_column_that_another_replaces_is_left_out(tmp_path, caplog):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "input": "old", "output": "a"}])
    with caplog.at_level("INFO", "qlora"):
        splits = load("--dataset", file, "--columns", "input=question")
    assert splits.train[0]["segments"][0]["text"] == "q"
    assert f"{file}: left out: input (replaced by question)" in caplog.messages
    swapped = load("--dataset", file, "--columns", "input=output,output=input").train[0]
    assert swapped["segments"][0]["text"] == "a" and swapped["left_out"] == ["question"]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"input": "q", "output": "a"}, ["<user>q</s><assistant>", "a</s>"]),
        ({"prompt": "q", "completion": "a", "system": "s"}, ["<system>s</s><user>q</s><assistant>", "a</s>"]),
        ({"instruction": "do", "input": "this", "output": "a"}, ["<user>do\n\nthis</s><assistant>", "a</s>"]),
        ({"instruction": "do", "output": "a"}, ["<user>do</s><assistant>", "a</s>"]),
    ],
)
def test_pairs_as_chats(tmp_path, byte_tokenizer, row, texts):
    """A user's turn and an answer, with the system turn of a column; Alpaca's own prompt has no place there."""
    byte_tokenizer.chat_template = CHAT
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row])
    config = qlora.parse_config(["--dataset", str(file), "--as_chat", "--output_dir", str(tmp_path / "out")])
    (loaded,) = qlora.load_splits(config, byte_tokenizer).train
    assert [segment["text"] for segment in loaded["segments"] if segment["text"]] == texts
    assert [segment["supervised"] for segment in loaded["segments"]] == [False, True]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"instruction": None, "input": "", "output": "a"}, "'instruction' is null"),
        ({"instruction": "q", "output": " "}, "'output' is"),
    ],
)
def test_a_pair_that_lacks_a_part_is_no_chat(tmp_path, byte_tokenizer, row, field):
    byte_tokenizer.chat_template = CHAT
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row])
    config = qlora.parse_config(["--dataset", str(file), "--as_chat", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(qlora.ConfigError, match=f"rows.jsonl:1: field {field}"):
        qlora.load_splits(config, byte_tokenizer)


def test_text_is_no_chat(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"text": "only text"}])
    with pytest.raises(qlora.ConfigError, match="--as_chat: rows of the format text are not pairs"):
        load("--dataset", file, "--as_chat")


@pytest.mark.parametrize("write", [str, json.dumps])
@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected"), ("prompt", "completion"), ("chosen",)])
def test_a_chat_in_a_cell_is_not_learnt_as_text(tmp_path, write, names):
    """What pandas and datasets make of lists in a CSV file."""
    row = {name: write([{"role": "user", "content": "q"}]) for name in names}
    file = tiny.rows_to_csv(tmp_path / "a.csv", [row])
    message = data_error("--dataset", file)
    assert f"a.csv:2: field '{names[0]}' is" in message and "a chat goes into a column `messages`" in message


@pytest.mark.parametrize(
    "text", ['[{"value": 3, "unit": "kg"}]', '[{"from": "Paris", "to": "Rome"}]', '[{"role": "x"}]']
)
def test_other_json_in_a_cell_is_text(tmp_path, text):
    rows = [{"prompt": text, "completion": "a"}, {"prompt": "a", "completion": text}]
    assert len(load("--dataset", tiny.rows_to_csv(tmp_path / "a.csv", rows)).train) == 2
    chat = json.dumps([{"role": "user", "content": "q"}])  # in a column that is no chat's
    assert inputs(load("--dataset", tiny.rows_to_csv(tmp_path / "b.csv", [{"input": chat, "output": "a"}])).train) == [
        chat
    ]


def test_a_long_source_is_named(tmp_path, caplog):
    """It is no label but a text that its row may need."""
    rows = [{"instruction": "Summarise", "source": source, "output": "short"} for source in ("wiki", "word " * 50)]
    with caplog.at_level("INFO", "qlora"):
        load("--dataset", tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows))
    assert any("left out: source (in 1 of 2 rows)" in message for message in caplog.messages)


def test_what_to_pass_as_answers_is_said_where_only_questions_are_answered(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
    flags = ("--do_train", "False", "--do_predict", "--predict_with_generate")
    assert data_error("--dataset", file, *flags).endswith("the answers may be any text")
    assert "any text" not in data_error("--dataset", file)
