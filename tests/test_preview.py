"""--preview: rows as they are trained, statistics of all of them, and the page that shows both."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil

import numpy as np
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
⟪supervised⟫, ⟦special token⟧, ↵ end of a line

row 1: {0}:1, 6 tokens, 3 supervised
⟦<s>⟧ab⟪cd⟦</s>⟧⟫

row 2: {0}:2, 20 tokens, 8 supervised, cut
⟦<s>⟧</s>\\x1b[1m\\u27ea⟪é🙂↵
x⟫

"""
STATISTICS = """\
train rows
  rows                4
  tokens              66
  supervised          16 (24.2%)
  cut                 2 (50.0%)
  without EOS         1 (25.0%)
  with doubled BOS    0 (0.0%)
  duplicates          1 (25.0%)
  padding at batch 2  38.9%
  filled if packed    82.5%
  1-5 tokens          0
  6-10 tokens         ██████████████████████████████ 2
  11-15 tokens        0
  16-20 tokens        ███████████████ 1
  21-25 tokens        0
  26-30 tokens        0
  31-35 tokens        ███████████████ 1

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
    assert run.stdout == SHOWN.format(rows_file) + STATISTICS
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
    green, reverse = ("\x1b[32m", "\x1b[39m"), ("\x1b[7m", "\x1b[27m")
    assert "\n{1}<s>{2}ab{0}cd{1}</s>{2}{3}\n".format(green[0], *reverse, green[1]) in texts[0]
    assert "</s>\\x1b[1m⟪" in texts[0] and "row 4" in texts[0] and "row 5" not in texts[0]
    rest = re.sub("|".join(map(re.escape, (*green, *reverse))), "", texts[0])
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
    """40 tokens at most: 34 with 6, then 20 with 6. Their padding is that of the packs."""
    run = preview(1, packing=True)
    assert f"row 1, part 1 of 2: {rows_file}:4, 34 tokens, 2 supervised, cut\n⟦<s>⟧{'q' * 31}⟪r⟦</s>⟧⟫\n" in run.stdout
    assert f"row 1, part 2 of 2: {rows_file}:1, 6 tokens, 3 supervised\n⟦<s>⟧ab⟪cd⟦</s>⟧⟫\n" in run.stdout
    assert "row 2" not in run.stdout and "packing: 4 rows in 2 packs of up to 40 tokens" in run.stderr
    assert "padding at batch 2  17.5%" in run.stdout  # 40 and 26 of twice 40


def test_the_first_token_is_never_supervised(preview, models):
    """Nothing predicts it, even with --train_on_source and without BOS."""
    run = preview(1, train_on_source=True)
    assert "6 tokens, 5 supervised\n⟦<s>⟧⟪abcd⟦</s>⟧⟫" in run.stdout
    assert "supervised          62 (93.9%)" in run.stdout  # of 66, but for four first ones


def test_held_out_rows_have_statistics_of_their_own(preview):
    run = preview(1, do_eval=True, eval_dataset_size=1, per_device_eval_batch_size=3)
    train, held_out = run.stdout.split("\ntrain rows\n")[1].split("\neval rows\n")
    assert "rows                3" in train and "padding at batch 2" in train
    assert re.search(r"rows +1\n", held_out) and "padding at batch 3" in held_out and "packed" not in held_out
    alone = preview(1, do_eval=True, do_train=False, eval_dataset_size=4, max_eval_samples=2)
    assert "row 1: " in alone.stdout and "train rows" not in alone.stdout and "\neval rows\n" in alone.stdout


def test_masked_tokens_are_shown_with_their_labels(run_qlora, models, tmp_path):
    model, text = models("encoder", family="bert"), "the lighthouse works."
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"text": text}, {"text": text}])
    flags = {"model_name_or_path": without_weights(model, tmp_path), "dataset": file, "target_max_len": None}
    all_masked = run_qlora(**flags, preview=1, mask_prob=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)
    tokens = AutoTokenizer.from_pretrained(model).tokenize(text)
    drawn = "".join(f"⟦[MASK]⟧→{token}" for token in tokens)
    assert f", {len(tokens) + 2} tokens, {len(tokens)} supervised\n⟦[CLS]⟧⟪{drawn}⟫⟦[SEP]⟧\n" in all_masked.stdout
    assert f"may be masked       {2 * len(tokens)} (" in all_masked.stdout and "EOS" not in all_masked.stdout
    kept = run_qlora(**flags, preview=1, mask_prob=1.0, mask_replace_prob=0.0, random_replace_prob=0.0)
    assert re.search(r"⟦\[CLS\]⟧⟪ ?the[^→]*⟫⟦\[SEP\]⟧\n", kept.stdout)


def test_spans_join_to_the_encoded_text(tokenizers):
    """Of a SentencePiece tokenizer, which drops the leading space of what it decodes by itself."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("sentencepiece"))
    words = "The lamp works. The lens is clean."
    ids = [tokenizer.bos_token_id, *tokenizer(words, add_special_tokens=False).input_ids]
    labels = [i if n % 3 == 0 else qlora.IGNORE for n, i in enumerate(ids)]
    pieces = list(qlora.row_spans(ids, labels, tokenizer))
    assert pieces[0] == qlora.Span("<s>", True, True) and len(pieces) == 8
    assert "".join(piece.text for piece in pieces[1:]).strip() == words


# ------------------------------------------------------------------------------------
# The statistics
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "at_once", "share"),
    [
        ([0, 1, 2, 3, 4], 2, 1 - 20 / (2 * 5 + 2 * 9 + 1)),  # (2 5) (9 3) (1)
        ([0, 3, 4, 1, 2], 2, 1 - 20 / (2 * 3 + 2 * 5 + 9)),  # (2 3) (1 5) (9)
        ([0, 1, 2, 3, 4], 1, 0.0),
        ([4, 3, 2, 1, 0], 8, 1 - 20 / 45),
    ],
)
def test_padding_share(order, at_once, share):
    assert qlora.padding_share(np.array([2, 5, 9, 3, 1]), order, at_once) == pytest.approx(share)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1, 3], {"1-1": 2, "2-2": 0, "3-3": 1}),
        ([12, 13], {"1-2": 0, "3-4": 0, "5-6": 0, "7-8": 0, "9-10": 0, "11-12": 1, "13-14": 1}),
        ([100, 101, 250], {"1-50": 0, "51-100": 1, "101-150": 1, "151-200": 0, "201-250": 1}),
    ],
)
def test_histogram(lengths, expected):
    assert qlora.histogram(np.array(lengths)) == expected


def test_padding_follows_the_order_of_training(run_qlora, tmp_path):
    """Rows of 3 and of 23 tokens in turn: grouped by length they need no padding, in their own order half of it."""
    rows = [{"input": "", "output": "a" if n % 2 else "b" * 21} for n in range(8)]
    flags = {"dataset": tiny.rows_to_jsonl(tmp_path / "r.jsonl", rows), "preview": 1, "gradient_accumulation_steps": 4}
    assert "padding at batch 2  0.0%" in run_qlora(**flags).stdout
    assert "padding at batch 2  43.5%" in run_qlora(**flags, train_sampling_strategy="sequential").stdout  # 1 - 26/46


def test_every_run_logs_and_records_the_statistics(run_qlora, rows_file):
    run = run_qlora(dataset=rows_file, train_sampling_strategy="sequential", max_steps=1, **LIMITS)
    assert run.code == 0
    line = "4 rows, 66 tokens, 16 (24.2%) supervised, 2 (50.0%) cut, 1 (25.0%) without EOS, 1 (25.0%) duplicates"
    assert re.search(rf"train data +{re.escape(line)}, 38.9% padding at batch 2, 82.5% filled if packed\n", run.stderr)
    assert run.stderr.count("(50.0%)") == 1, "said once"
    data = run.json("run.json")["data"]["train"]
    expected = {"rows": 4, "tokens": 66, "supervised": 16, "cut": 2, "without_eos": 1, "doubled_bos": 0}
    expected |= {"duplicates": 1, "largest_id": 257, "longest": 34, "batch": 2, "packing": 66 / 80}
    assert {name: data[name] for name in expected} == expected
    assert data["padding"] == pytest.approx(1 - 66 / 108) and data["lengths"]["6-10"] == 2
    assert len(data["fingerprint"]) == 16 and re.search(r"rows end to end +(yes|no)\n", run.stderr)


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
        assert second.locator("mark").all_inner_texts() == ["cd", "</s>"]
        assert second.locator("code").all_inner_texts() == ["<s>", "</s>"]
        assert "cut\n1 (3.3%)" in tab.locator(".note").all_inner_texts()
        assert tab.locator("tbody tr").count() == len(tab.locator("tbody th[scope=row]").all()) > 1
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
    assert "<div><dt>with doubled BOS</dt><dd>0 <small>(0.0%)</small></dd></div>" in text
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
