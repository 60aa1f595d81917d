"""Readers and formats against whatever a file may hold: no traceback, and every message names file and row.

A few dozen examples of each property, the same ones every time; FUZZ=200 tries two hundred times as many, at random.
"""

import csv
import gzip
import io
import itertools
import json
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import tiny

import qlora

if not os.environ.get("QLORA_ALL_TESTS"):  # in CI the import below fails instead
    pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install -r tests/requirements.txt")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ", "1"))


def tries(count):
    """So many examples of a property, the same each time unless FUZZ asks for more."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Text without and with what UTF-8 can't hold; the second half of st.characters is mostly never reached otherwise.
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ODD = st.sampled_from(
    ["", "\x00", "\ud83d", "\ufdd0", "\u2028", "\x1b[31m", "</s>", "NA", "true", "\n<bot>: a", "null"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), PLAIN, ODD, st.sampled_from(["a", "x y"])
)
NAMES = sorted({name for form in qlora.FORMATS.values() for name in form.columns} | {"input", "system", "tools"})
KEYS = st.sampled_from([*NAMES, "category", "source", "skip_prompt_formatting", "\ud83d", ""])
ROLES = st.one_of(st.sampled_from([*qlora.ROLES, "nobody"]), SCALARS)
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": SCALARS}, optional={"tool_calls": SCALARS, "from": SCALARS}),
    st.fixed_dictionaries({"from": ROLES, "value": SCALARS}),
    SCALARS,
)
VALUES = st.recursive(
    SCALARS | st.lists(TURN, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROW = st.fixed_dictionaries({}, optional={name: VALUES | st.sampled_from(["text", CHAT]) for name in KEYS.elements})

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls[0].name if m.tool_calls }}</s>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def data_flags(**flags):
    defaults = {"include_sources": "ALL", "expand_conversations": False, "as_chat": False, "columns": None}
    return SimpleNamespace(**defaults | {"dataset_format": None} | flags)


def checked(source, form, tokenizer, **flags):
    """Rows in normal form, each of which can be trained on or says what is wrong with it."""
    options = {"dataset_format": qlora.FORMATS[form], "tokenizer": tokenizer, "limits": qlora.Limits(9, 9)}
    normalize = partial(qlora.normalize_rows, **options)
    rows = [row for raw in qlora.select_rows(source, data_flags(**flags)) for row in normalize(**raw)]
    for row in rows:
        texts = [segment["text"] for segment in row["segments"]]
        for text in [*texts, row["problem"], row["raw"], row["category"], row["where"]]:
            text.encode("utf-8")  # what Arrow can hold
        assert "\n" not in row["problem"]
        if row["problem"]:
            assert json.loads(row["raw"]) is not ... and not texts
        else:
            assert any(segment["supervised"] and segment["text"].strip() for segment in row["segments"])
            limits = qlora.Limits(9, 9, None if len(texts[0]) % 2 else 5)
            made = qlora.encode_batch({"segments": [row["segments"]], "rendered": [row["rendered"]]}, tokenizer, limits)
            assert len(made["input_ids"][0]) == len(made["labels"][0]) <= 18
    return rows


# ------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", qlora.FORMATS)
@tries(60)
@given(row=ROW | VALUES, expand=st.booleans())
def test_any_row_of_any_format(tokenizer, form, row, expand):
    source = qlora.RowSource("a", loaded=[row])
    rows = checked(source, form, tokenizer, expand_conversations=expand and form == "airoboros_chat")
    assert rows and all(row["where"] == "a:1" for row in rows)


def test_deep_nesting(tmp_path, tokenizer):
    """Deeper than Python reads JSON: a bad row."""
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"instruction": "a", "output": "b"}}\n{deep}\n')
    (_, good), (where, bad) = qlora.RowSource("a", (tmp_path / "a.jsonl",))
    assert good == {"instruction": "a", "output": "b"} and where.endswith("a.jsonl:2")
    assert isinstance(bad, qlora.RowError) and "recursion" in str(bad)


# ------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------
SUFFIXES = [kind + packed for kind in qlora.READERS for packed in ("", ".gz")]
GOOD = [{"input": f"q{n}", "output": f"a{n}"} for n in range(4)]


def good_bytes(suffix, folder):
    """A sound file of GOOD."""
    kind = suffix.removesuffix(".gz")
    file = folder / f"good{kind}"
    if kind == ".parquet":
        tiny.rows_to_parquet(file, GOOD)
    elif kind in (".csv", ".tsv"):
        tiny.rows_to_csv(file, GOOD, delimiter="," if kind == ".csv" else "\t")
    elif kind == ".json":
        file.write_text(json.dumps(GOOD, indent=1))
    else:
        tiny.rows_to_jsonl(file, GOOD)
    return gzip.compress(file.read_bytes(), mtime=0) if suffix != kind else file.read_bytes()


def outcome(file, tokenizer):
    """The rows of a file, or the one line that reading it ends with."""
    source = qlora.RowSource(str(file), (file,))
    try:
        config = SimpleNamespace(data=data_flags(dataset_format="input-output"), masked=False)
        qlora.choose_format(str(file), source, config)
        rows = checked(source, "input-output", tokenizer)
    except qlora.ConfigError as error:
        status, message = qlora.exit_status(error)
        assert status == 2 and message.startswith(str(file)) and message.isprintable()
        return []
    numbers = [int(row["where"].removeprefix(f"{file}:")) for row in rows]
    assert all(number >= 1 for number in numbers)
    return rows


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "insert", "double"]),
        st.floats(0, 1),
        st.binary(max_size=6)
        | st.sampled_from([b"\x00", b'"', b"\n", b"\r", b"[", b"\xef\xbb\xbf", b"\xff\xfe", b"{}"]),
    ),
    min_size=1,
    max_size=4,
)


def edited(content, edits):
    for kind, share, data in edits:
        at = int(share * len(content))
        changed = {"cut": b"", "flip": data + content[at + len(data) :], "insert": data + content[at:]}
        content = content[:at] + changed.get(kind, content[at:] + content[at:])
    return content


@pytest.mark.parametrize("suffix", SUFFIXES)
@tries(40)
@given(edits=EDITS)
def test_a_damaged_file(tmp_path_factory, tokenizer, suffix, edits):
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / f"a{suffix}"
    file.write_bytes(edited(good_bytes(suffix, folder), edits))
    outcome(file, tokenizer)


@pytest.mark.parametrize("suffix", SUFFIXES)
@tries(25)
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, tokenizer, suffix, content):
    file = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    file.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") and len(content) % 2 else content)
    outcome(file, tokenizer)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "latin-1", "cp1252", "utf-8-sig", "utf-7"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_an_encoding(tmp_path, tokenizer, kind, encoding):
    """Only one that reads as UTF-8 gives rows; from another none comes out changed."""
    file = tmp_path / f"a.{kind}"
    text = good_bytes(f".{kind}", tmp_path).decode().replace("a1", "é1")
    file.write_bytes(text.encode(encoding))
    read = [row["segments"][1]["text"] for row in outcome(file, tokenizer) if not row["problem"]]
    whole = ["a0", "é1", "a2", "a3"]
    assert read == {"utf-8-sig": whole, "latin-1": ["a0", "a2", "a3"], "cp1252": ["a0", "a2", "a3"]}.get(encoding, read)
    assert "é1" in read or encoding != "utf-8-sig"
    assert set(read) <= set(whole) or encoding == "utf-7"


@tries(60)
@given(junk=st.lists(st.tuples(st.integers(0, 4), st.binary(min_size=1, max_size=12)), max_size=4))
def test_good_lines_survive_among_junk(tmp_path_factory, tokenizer, junk):
    """Every row of JSON lines comes out with its own line number, whatever lines stand between."""
    lines = [json.dumps(row).encode() for row in GOOD]
    for at, data in junk:
        lines.insert(at, b"?" + re.sub(rb"[\r\n]", b"", data))
    file = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    rows = outcome(file, tokenizer)
    good = {row["where"]: row["segments"][1]["text"] for row in rows if not row["problem"]}
    expected = {n: json.loads(line)["output"] for n, line in enumerate(lines, 1) if not line.startswith(b"?")}
    assert good == {f"{file}:{number}": output for number, output in expected.items()}
    assert len(rows) == len(lines)


@tries(60)
@given(cells=st.lists(st.tuples(PLAIN, PLAIN), max_size=5), delimiter=st.sampled_from([",", "\t"]))
def test_cells_come_back_as_they_were_written(cells, delimiter):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *cells])
    text.seek(0)
    text.name = "a.csv"
    assert [row for _, row in qlora.read_delimited(text, delimiter)] == [{"a": a, "b": b} for a, b in cells]


@tries(150)
@given(
    rows=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    end=st.integers(3, 400),
    ascii_only=st.booleans(),
)
@example(rows=[], indent=None, end=3, ascii_only=True)
def test_an_array_is_read_as_json_reads_it(rows, indent, end, ascii_only):
    """Cut anywhere before its end, or followed by something, it is one error with its line."""
    text = " \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    read = list(qlora.read_json_lines(io.StringIO(text + "\n ")))
    assert [repr(row) for _, row in read] == [repr(row) for row in json.loads(text)]
    assert [number for number, _ in read] == list(range(1, len(rows) + 1))
    for broken in (text[: min(end, len(text) - 1)], f"{text}x"):
        ((line, error),) = qlora.read_json_lines(io.StringIO(broken))
        assert isinstance(error, qlora.RowError) and 1 <= line <= 1 + broken.count("\n")


PARQUET_VALUES = st.one_of(
    st.lists(
        st.none() | st.text(max_size=5).map(lambda s: s.encode("utf-8", "replace").decode()), min_size=3, max_size=3
    ),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.none() | st.floats(), min_size=3, max_size=3),
    st.lists(st.none() | st.binary(max_size=4), min_size=3, max_size=3),
    st.lists(st.none() | st.datetimes() | st.none(), min_size=3, max_size=3),
    st.lists(st.none() | st.decimals(-999, 999, places=2), min_size=3, max_size=3),
    st.lists(st.none() | st.lists(st.integers(0, 9), max_size=2), min_size=3, max_size=3),
    st.lists(st.none() | st.fixed_dictionaries({"x": st.none() | st.booleans()}), min_size=3, max_size=3),
)


@tries(60)
@given(source=PARQUET_VALUES, output=PARQUET_VALUES)
def test_parquet_columns_of_any_type(tmp_path_factory, tokenizer, source, output):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"input": source, "output": output}), file)
    rows = outcome(file, tokenizer)
    assert [row["where"] for row in rows] == [f"{file}:{n}" for n in (1, 2, 3)]
    for row, a, b in zip(rows, source, output, strict=True):
        texts = all(isinstance(value, (str, int)) for value in (a, b))
        assert not (row["problem"] and texts and str(b).strip() and not set(qlora.MARKS) & set(f"{a}{b}"))


@tries(8)
@given(lines=st.lists(ROW.map(json.dumps) | st.text(max_size=9), min_size=1, max_size=6))
def test_rows_are_skipped_through_the_whole_way(tmp_path_factory, lines):
    """From the flags to rejected.jsonl, with the cache between: kept and rejected rows are all there are."""
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [re.sub(r"[\r\n]", " ", line) for line in lines]
    content = "\n".join(['{"input": "a", "output": "b"}', *lines]).encode("utf-8", "surrogatepass")
    (folder / "a.jsonl").write_bytes(content)
    flags = ["--dataset", f"{folder / 'a.jsonl'}", "--dataset_format", "input-output", "--output_dir", f"{folder}/out"]
    flags += ["--cache_dir", f"{folder}/cache"]
    kept = qlora.load_splits(qlora.parse_config([*flags, "--on_bad_rows", "skip"])).train
    rejected = folder / "out" / "rejected.jsonl"
    bad = [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.exists() else []
    where = [row["where"] for row in bad] + list(kept["where"])
    expected = [n for n, line in enumerate(content.split(b"\n"), 1) if line.decode("utf-8", "surrogateescape").strip()]
    assert sorted(where) == sorted(f"{folder / 'a.jsonl'}:{n}" for n in expected)
    if bad:
        with pytest.raises(qlora.ConfigError) as caught:
            qlora.load_splits(qlora.parse_config(flags))
        message = qlora.exit_status(caught.value)[1]
        assert message.startswith(bad[0]["where"] + ": ") and message.isprintable()


def test_the_size_of_a_quote_left_open_is_bounded(monkeypatch, tmp_path, tokenizer):
    """Else one quote would draw the rest of a file of any size into memory."""
    monkeypatch.setattr(qlora, "LONGEST_CELL", 200)
    rest = "".join(f"q{n},a{n}\n" for n in range(99))
    (tmp_path / "a.csv").write_text('input,output\nq,a\n"q,a\n' + rest)
    rows = outcome(tmp_path / "a.csv", tokenizer)
    assert rows[1]["where"].endswith(":3") and "field limit" in rows[1]["problem"]
    assert len(list(itertools.filterfalse(lambda row: row["problem"], rows))) > 50
    (tmp_path / "a.json").write_text('[{"input": "q", "output": "a' + rest)
    ((line, error),) = qlora.read_file(tmp_path / "a.json")
    assert line == 1 and "JSON" in str(error)
