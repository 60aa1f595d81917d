"""--preview: rows as they are trained, statistics of all of them, and the page that shows both."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil

import pytest
import tiny
from conftest import ROOT, extra, missing, preserved_state
from test_examples import CHROMIUM
from transformers import AutoTokenizer

import qlora

# Of the byte tokenizer 6, 21 (its output is cut: no EOS), 6 and 34 (its input is cut) tokens; the third is the first.
ROWS = [
    {"input": "ab", "output": "cd"},
    {"input": "</s>\x1b[1m⟪", "output": "é🙂\nx"},
    {"input": "ab", "output": "cd"},
    {"input": "q" * 40, "output": "r"},
]
LIMITS = {"source_max_len": 32, "target_max_len": 8}
SHOWN = """\
⟪supervised⟫, ↵ end of a line

row 1: {0}:1, 6 tokens, 3 supervised
<s>ab⟪cd</s>⟫

row 2: {0}:2, 20 tokens, 8 supervised, cut, special tokens as text
<s></s>\\x1b[1m⟪⟪é🙂↵
x⟫

train rows: 4 rows, 66 tokens, 34 in the longest row, 16 (24.2%) supervised, 2 (50.0%) cut, 1 (25.0%) without EOS, \
1 (25.0%) duplicates, 1 (25.0%) with special tokens as text
"""


@pytest.fixture
def rows_file(tmp_path):
    return tiny.rows_to_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def preview(run_qlora, rows_file):
    """`preview(N, **flags)` -> the run, whose rows are in their order."""

    def call(number, **flags):
        return run_qlora(**{"preview": number, "dataset": rows_file, "train_sampling_strategy": "sequential",
                            **LIMITS, **flags})  # fmt: skip

    return call


def without_weights(model, tmp_path):
    """A copy of a model's folder that holds none."""
    return shutil.copytree(model, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))


# ------------------------------------------------------------------------------------
# In a pipe and in a terminal
# ------------------------------------------------------------------------------------


def test_output_to_a_pipe(preview, rows_file, models, tmp_path):
    """Every character of it, from a model without weights; and nothing is written."""
    run = preview(2, model_name_or_path=without_weights(models("llama"), tmp_path))
    assert run.code == 0
    assert run.stdout == SHOWN.format(rows_file)
    assert not run.output_dir.exists()


def test_a_terminal_gets_colours_and_no_escape_sequences_of_the_data(run_qlora, rows_file, models, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    argv = ["--model_name_or_path", models("llama"), "--dataset", rows_file, "--preview", "9", "--source_max_len", "32"]
    texts = []
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        with preserved_state(), contextlib.redirect_stdout(Terminal()) as terminal:
            assert qlora.main([str(word) for word in argv]) == 0
        texts.append(terminal.getvalue())
    green = ("\x1b[32m", "\x1b[39m")
    assert "\n<s>ab{}cd</s>{}\n".format(*green) in texts[0]
    assert "</s>\\x1b[1m⟪" in texts[0] and "row 4" in texts[0] and "row 5" not in texts[0]
    rest = re.sub("|".join(map(re.escape, green)), "", texts[0])
    assert all(char.isprintable() or char == "\n" for char in rest) and "\x1b" not in texts[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\x1b]0;x\x07", "a\\x1b]0;x\\x07"), ("\x9b31m\r\t", "\\x9b31m\\r\\t"), ("a\u202eb\u200d", "a\\u202eb\\u200d"),
     ("é 日本 🙂", "é 日本 🙂"), ("\u2028\xa0", "\\u2028\\xa0")],
)  # fmt: skip
def test_escape_control_chars(text, expected):
    assert qlora.escape_control_chars(text) == expected


def test_an_escape_sequence_in_a_bad_row_stays_text(run_qlora, tmp_path):
    (tmp_path / "a.csv").write_text("in\x1b[31mput,output\na,b\nc\n")
    for flags in ({}, {"on_bad_rows": "skip", "dataset_format": "text"}):
        run = run_qlora(dataset=tmp_path / "a.csv", **{"dataset_format": "input-output", **flags})
        assert run.code == 2 and "\\x1b[31m" in run.stderr and "\x1b[31m" not in run.stderr


def test_a_pipe_that_closes_early_is_no_error(rows_file, models):
    """As `| head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = ["--model_name_or_path", str(models("llama")), "--dataset", str(rows_file), "--preview", "4"]
    with open(writer, "w") as broken, preserved_state(), contextlib.redirect_stdout(broken):
        assert qlora.main(argv) == 0
        broken.write("nor is what Python writes at its end")


# ------------------------------------------------------------------------------------
# The rows
# ------------------------------------------------------------------------------------


def test_packs_are_shown_part_by_part(preview, rows_file):
    """40 tokens at most: 34 with 6, then 20 with 6."""
    run = preview(1, packing=True)
    assert f"row 1, part 1 of 2: {rows_file}:4, 34 tokens, 2 supervised, cut\n<s>{'q' * 31}⟪r</s>⟫\n" in run.stdout
    assert f"row 1, part 2 of 2: {rows_file}:1, 6 tokens, 3 supervised\n<s>ab⟪cd</s>⟫\n" in run.stdout
    assert "row 2" not in run.stdout and "packing: 4 rows in 2 packs of up to 40 tokens" in run.stderr


def test_the_first_token_is_never_supervised(preview, models):
    """Nothing predicts it, even with --train_on_source and without BOS."""
    run = preview(1, train_on_source=True)
    assert "6 tokens, 5 supervised\n<s>⟪abcd</s>⟫" in run.stdout
    assert "62 (93.9%) supervised" in run.stdout  # of 66, but for four first ones


def test_held_out_rows_have_statistics_of_their_own(preview):
    run = preview(1, do_eval=True, eval_dataset_size=1, per_device_eval_batch_size=3)
    assert "\ntrain rows: 3 rows, " in run.stdout and "\neval rows: 1 rows, " in run.stdout
    alone = preview(1, do_eval=True, do_train=False, eval_dataset_size=4, max_eval_samples=2)
    assert "row 1: " in alone.stdout and "train rows" not in alone.stdout and "\neval rows: 2 rows" in alone.stdout


def test_masked_tokens_are_shown_with_their_labels(run_qlora, models, tmp_path):
    model, text = models("encoder", family="bert"), "the lighthouse works."
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"text": text}, {"text": text}])
    flags = {"model_name_or_path": without_weights(model, tmp_path), "dataset": file, "target_max_len": None}
    all_masked = run_qlora(**flags, preview=1, mask_prob=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)
    tokens = AutoTokenizer.from_pretrained(model).tokenize(text)
    assert f", {len(tokens) + 2} tokens, {len(tokens)} supervised\n[CLS]⟪" in all_masked.stdout
    (row,) = re.findall(r"\[CLS\]⟪(.*)⟫", all_masked.stdout)
    assert row.replace(" ", "") == "[MASK]" * len(tokens) + "→" + text.replace(" ", "")
    assert re.search(rf"{2 * len(tokens)} \([\d.]+%\) may be masked", all_masked.stdout)
    assert "EOS" not in all_masked.stdout
    kept = run_qlora(**flags, preview=1, mask_prob=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)
    assert re.search(r"\[CLS\]⟪ ?the[^→]*⟫ ?\[SEP\]\n", kept.stdout)


def test_spans_join_to_the_encoded_text(tokenizers):
    """Of a SentencePiece tokenizer, which drops the leading space of what it decodes by itself."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("sentencepiece"))
    words = "The lamp works. The lens is clean."
    ids = [tokenizer.bos_token_id, *tokenizer(words, add_special_tokens=False).input_ids]
    labels = [i if n % 3 == 0 else qlora.IGNORE for n, i in enumerate(ids)]
    spans = qlora.row_spans(ids, labels, tokenizer)
    assert [supervised for _, supervised in spans] == [n % 2 == 0 for n in range(len(spans))]
    assert "".join(text for text, _ in spans).removeprefix("<s>").strip() == words


# ------------------------------------------------------------------------------------
# The statistics
# ------------------------------------------------------------------------------------


def test_every_run_logs_and_records_the_statistics(run_qlora, rows_file):
    run = run_qlora(dataset=rows_file, train_sampling_strategy="sequential", max_steps=1, **LIMITS)
    assert run.code == 0
    line = "4 rows, 66 tokens, 34 in the longest row, 16 (24.2%) supervised, 2 (50.0%) cut, 1 (25.0%) without EOS"
    assert re.search(
        rf"train data +{re.escape(line)}, 1 \(25.0%\) duplicates, 1 \(25.0%\) with special tokens as text\n", run.stderr
    )
    data = run.json("run.json")["data"]["train"]
    expected = {"rows": 4, "tokens": 66, "supervised": 16, "cut": 2, "without_eos": 1, "duplicates": 1}
    expected |= {"largest_id": 257, "longest": 34}
    assert {name: data[name] for name in expected} == expected and len(data["fingerprint"]) == 16


def test_an_epoch_is_counted_without_a_step_that_is_dropped(run_qlora, rows_file):
    flags = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, **LIMITS}
    for drop, steps in (False, 2), (True, 1):  # of 4 rows
        run = run_qlora(dataset=rows_file, dataloader_drop_last=drop, overwrite_output_dir=True, **flags)
        assert run.code == 0 and f"{steps} steps are an epoch" in run.stderr
    merged = run_qlora(dataset=rows_file, do_train=False, merged_output_dir=run.output_dir / "merged",
                       dataloader_drop_last=True, **flags | {"per_device_train_batch_size": 9})  # fmt: skip
    assert merged.code == 0


def test_with_packing_an_epoch_is_counted_in_packs(run_qlora, rows_file):
    run = run_qlora(dataset=rows_file, packing=True, max_steps=1, per_device_train_batch_size=1, **LIMITS)
    assert run.code == 0 and "2 steps are an epoch" in run.stderr


# ------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------

EVIL = '<script>document.title="got in"</script>&amp;<img src=x onerror="document.title=1">\u202e\x07'


@pytest.fixture
def page(models, tmp_path, capsys):
    """`page(rows, *flags)` -> the file that the script writes."""
    spec = importlib.util.spec_from_file_location("preview_html", ROOT / "scripts/preview_html.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def write(rows, *flags):
        file = tiny.rows_to_jsonl(tmp_path / "<b>rows.jsonl", rows)
        argv = ["--model_name_or_path", models("llama"), "--dataset", file, "--output_dir", tmp_path / "out", *flags]
        with preserved_state():
            assert qlora.main([str(word) for word in argv], script.preview) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'out' / 'preview.html'}\n"
        return tmp_path / "out" / "preview.html"

    return write


def test_the_page_has_numbers_with_commas(page):
    text = page([{"input": "a" * 20, "output": f"{n}" * 20} for n in range(40)]).read_text(encoding="utf-8")
    assert "<dt>tokens</dt><dd>1," in text or "<dt>tokens</dt><dd>2," in text


def test_the_page_in_a_browser(page, tmp_path):
    playwright = extra("playwright.sync_api")
    chromium = shutil.which("chromium") or missing("chromium is not installed: bash .ci/browser.sh")
    rows = [{"input": EVIL, "output": "x" * 400}, *({"input": f"a{n}\nb", "output": "cd"} for n in range(29))]
    file, asked, wrong = page(rows, "--hub_token", "hf_secret"), [], []
    assert "hf_secret" not in file.read_text(encoding="utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM)
        colours = {}
        for scheme, width in (("light", 1200), ("dark", 360)):
            tab = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: wrong.append(message.text))
            tab.goto(file.as_uri())
            tab.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
            colours[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (
            tab.title() == f"Preview of {tmp_path}/<b>rows.jsonl" and tab.locator("main img, main script").count() == 0
        )
        shown = tab.locator("details")
        assert shown.count() == 20 and tab.locator("details[open]").count() == 5
        first = shown.nth(0).locator(".row").inner_text()
        assert first == "<s>" + qlora.escape_control_chars(EVIL) + "x" * 256
        second = shown.nth(1).locator(".row")
        assert second.locator("mark").all_inner_texts() == ["cd</s>"]
        assert "cut\n1 (3.3%)" in tab.locator(".note").all_inner_texts()
        tab.keyboard.press("Tab")  # the rows fold by keyboard alone
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.tagName") == "SUMMARY" and tab.locator("details[open]").count() == 4
        browser.close()
    assert asked == [file.as_uri()] * 2 and not wrong
    assert colours["light"] != colours["dark"]


def test_the_page_shows_what_the_terminal_does(page, run_qlora, rows_file):
    text = page(ROWS, "--preview", "2", "--source_max_len", "32", "--target_max_len", "8").read_text(encoding="utf-8")
    assert (
        text.count("<details") == 2 and "</s>\\x1b[1m⟪" not in text and "&lt;/s&gt;\\x1b[1m⟪<mark>é🙂<i>↵</i>" in text
    )
    assert '<div class="note"><dt>without EOS</dt><dd>1 <small>(25.0%)</small></dd></div>' in text
    assert not re.search(r"(src|href|url)\s*[=(]", text)


# ------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is(run_qlora, preview, rows_file):
    run = run_qlora(dataset=rows_file, max_steps=1, save_steps=1, **LIMITS)
    (run.output_dir / "rejected.jsonl").write_text("{}\n")  # as of a run with --on_bad_rows skip
    before = {name: (run.output_dir / name).read_bytes() for name in run.files()}
    assert preview(1, source_max_len=8).code == 0  # which a rerun would refuse: other rows
    assert {name: (run.output_dir / name).read_bytes() for name in run.files()} == before
    assert json.loads(before["run.json"])["flags"]["preview"] == 0
