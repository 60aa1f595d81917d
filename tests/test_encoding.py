"""Tokenizers and encoding: special tokens, limits, labels, batches.

Expected ids are spelled by hand with the byte tokenizer ("a" is 97), or come from sentencepiece or
tokenizers alone.
"""

import json
import logging
import shutil

import datasets
import pytest
import sentencepiece
import tiny
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qlora

BOS, EOS, PAD = tiny.BOS, tiny.EOS, tiny.PAD
A, B, C, D, E, F = b"abcdef"
X, Y, Z = b"xyz"
NO = -100  # a label that is not supervised


def encode(source, target, tokenizer, *limits, **options):
    rows = {"segments": [qlora.prompt_completion(source, target)], "rendered": [False]}
    columns = qlora.encode_batch(rows, tokenizer, qlora.Limits(*limits), **options)
    return tuple(columns[name][0] for name in ("input_ids", "labels", "cut"))


@pytest.fixture
def info(caplog):
    caplog.set_level(logging.INFO, "qlora")
    return caplog


# ------------------------------------------------------------------------------------
# Two limits
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "limits", "ids", "labels", "cut"),
    [
        ("ab", "xy", (9, 9), [BOS, A, B, X, Y, EOS], [NO, NO, NO, X, Y, EOS], False),
        ("", "xy", (9, 9), [BOS, X, Y, EOS], [NO, X, Y, EOS], False),
        ("ab", "xy", (3, 3), [BOS, A, B, X, Y, EOS], [NO, NO, NO, X, Y, EOS], False),
        ("ab", "xy", (2, 3), [BOS, A, X, Y, EOS], [NO, NO, X, Y, EOS], True),
        ("ab", "xy", (3, 2), [BOS, A, B, X, Y], [NO, NO, NO, X, Y], True),
        ("abcdef", "xyz", (3, 1), [BOS, A, B, X], [NO, NO, NO, X], True),
        ("abcdef", "xyz", (1, 4), [BOS, X, Y, Z, EOS], [NO, X, Y, Z, EOS], True),
        ("é", "xy", (2, 9), [BOS, 0xC3, X, Y, EOS], [NO, NO, X, Y, EOS], True),
    ],
)
def test_two_limits_cut_on_the_right(byte_tokenizer, source, target, limits, ids, labels, cut):
    assert encode(source, target, byte_tokenizer, *limits) == (ids, labels, cut)
    supervised = encode(source, target, byte_tokenizer, *limits, train_on_source=True)
    assert supervised == (ids, ids, cut)


def test_a_tokenizer_without_bos():
    tokenizer = tiny.byte_tokenizer(bos=None)
    eos = 256
    ids, labels = [A, B, X, eos], [NO, NO, X, eos]
    assert encode("ab", "x", tokenizer, 2, 2) == (ids, labels, False)
    assert encode("", "x", tokenizer, 2, 2) == ([X, eos], [X, eos], False)
    assert encode("ab", "x", tokenizer, 1, 2) == ([A, X, eos], [NO, X, eos], True)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_added_once_even_if_the_tokenizer_adds_it(tokenizers, tmp_path, add_bos):
    folder = shutil.copytree(tokenizers("sentencepiece"), tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": add_bos, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source, target = model.encode("Hello ship"), model.encode("The lamp\nworks.")
    ids, labels, _ = encode("Hello ship", "The lamp\nworks.", tokenizer, 99, 99)
    assert ids == [1, *source, *target, 2]
    assert labels == [NO] * (1 + len(source)) + [*target, 2]


# ------------------------------------------------------------------------------------
# One limit for both
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "total", "ids", "supervised", "cut"),
    [
        ("abc", "xyz", 8, [BOS, A, B, C, X, Y, Z, EOS], 4, False),  # fits exactly
        ("abc", "xyz", 99, [BOS, A, B, C, X, Y, Z, EOS], 4, False),
        ("abc", "xyz", 7, [BOS, B, C, X, Y, Z, EOS], 4, True),  # BOS stays, the input goes from the left
        ("abcdef", "xyz", 7, [BOS, E, F, X, Y, Z, EOS], 4, True),
        ("abcdef", "x", 4, [BOS, F, X, EOS], 2, True),
        # A quarter of 8 is left of the input (BOS and one token), then the output goes from the right.
        ("abcdef", "xyzxyz", 8, [BOS, F, X, Y, Z, X, Y, Z], 6, True),
        ("abcdef", "xyzxy", 8, [BOS, F, X, Y, Z, X, Y, EOS], 6, True),
        ("abcdef", "xyzx", 8, [BOS, E, F, X, Y, Z, X, EOS], 5, True),
        ("abcdef", "x" * 99, 16, [BOS, D, E, F, *[X] * 12], 12, True),
        ("a", "xyzxyzxyz", 8, [BOS, A, X, Y, Z, X, Y, Z], 6, True),  # shorter than a quarter: not touched
        ("", "xyzxyz", 4, [BOS, X, Y, Z], 3, True),
    ],
)
def test_one_limit(byte_tokenizer, source, target, total, ids, supervised, cut):
    labels = [NO] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    assert encode(source, target, byte_tokenizer, 1, 1, total) == (ids, labels, cut)  # 1 and 1 are replaced


@pytest.mark.parametrize(
    ("total", "ids"),
    [(7, [D, E, F, X, Y, Z, 256]), (8, [C, D, E, F, X, Y, Z, 256]), (5, [F, X, Y, Z, 256]), (4, [F, X, Y, Z])],
)
def test_one_limit_without_bos_cuts_the_input_from_the_left_alone(total, ids):
    tokenizer = tiny.byte_tokenizer(bos=None)
    assert encode("abcdef", "xyz", tokenizer, 1, 1, total)[0] == ids


# ------------------------------------------------------------------------------------
# Special tokens in a user's text
# ------------------------------------------------------------------------------------

RESERVED = "<|reserved_special_token_0|>"
TEXTS = ["</s>", "<s>", "a</s>b", "<s>hello</s>", "<pad>", "<unk>", "x </s> <s> y", f"a{RESERVED}b"]


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_text_stay_text_byte(text):
    tokenizer = tiny.byte_tokenizer(unk="<unk>", extra=(RESERVED,))
    assert encode(text, text, tokenizer, 99, 99)[0] == [BOS, *text.encode(), *text.encode(), EOS]


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_text_stay_text_bpe(tokenizers, text):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("byte_bpe", extra=(RESERVED,)))
    plain = Tokenizer(tokenizer.backend_tokenizer.model)  # the same merges and no special tokens
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = plain.encode(text).ids
    assert encode(text, text, tokenizer, 99, 99)[0] == [508, *expected, *expected, 509]


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_text_stay_text_sentencepiece(tokenizers, text):
    folder = tokenizers("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = model.encode(text)
    ids, *_ = encode(text, text, AutoTokenizer.from_pretrained(folder), 99, 99)
    assert ids == [1, *expected, *expected, 2]


def test_a_special_token_named_by_a_flag_stays_text_too():
    tokenizer = special(tiny.byte_tokenizer(extra=("<|end|>",)), "--eos_token", "<|end|>")
    assert encode("a<|end|>", "x", tokenizer, 99, 99)[0] == [BOS, A, *b"<|end|>", X, 259]


def with_markers():
    """A tokenizer like DeepSeek's, whose markers of turns are not flagged special."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<|User|>", "<|Assistant|>", "<think>")])
    return tokenizer


def test_markers_of_turns_that_are_not_flagged_special_stay_text_too():
    """Between two of their characters the text is cut; other tokens that are not flagged are tokens."""
    text = "a<|Assistant|>b<think>"
    ids, *_ = encode(text, text, with_markers(), 99, 99)
    assert ids == [BOS, *b"a<|Assistant|>b", 261, *b"a<|Assistant|>b", 261, EOS]


WRITTEN = "<|im_start|>user\nHi<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "tokenizer", "count"),
    [
        ([("a", "b"), (WRITTEN, "b"), ("a", "b</s>"), ("<", "/s>")], None, 2),
        ([("a<|User|>", "b"), ("<think>", "b"), ("<|user|>", "b")], with_markers, 1),
        ([("a", "b")], None, 0),
    ],
)
def test_rows_with_special_tokens_as_text_are_counted_and_warned_of(tmp_path, info, rows, tokenizer, count):
    tokenizer = tokenizer() if tokenizer else tiny.byte_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": a, "output": b} for a, b in rows])
    config = qlora.parse_config(["--dataset", str(file)])
    encoded = qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config)
    _, statistics = qlora.pack_and_summarize(encoded, config)
    assert statistics["train"].special_text == count
    warned = [m for m in info.messages if "special tokens, which stay text" in m]
    assert [m.split()[0] for m in warned] == [f"{count}"] * bool(count)
    assert (f"{count} ({count / len(rows):.1%}) with special tokens as text" in str(statistics["train"])) == bool(count)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_special_tokens_in_a_chat_are_counted_too(tmp_path, role):
    """But not those of the template, nor those that a function names."""
    tokenizer = with_markers()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': '<|User|>', 'assistant': '<|Assistant|>'}[m.role] }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<|Assistant|>' if add_generation_prompt }}"
    )
    written = {"user": "q<|Assistant|>", "assistant": "</s>a"}
    chats = [[("user", "q"), ("assistant", "<think>a")], [("user", "q"), ("assistant", "a")]]
    chats[1] = [(name, written[name] if name == role else text) for name, text in chats[1]]
    rows = [{"messages": [{"role": name, "content": text} for name, text in chat]} for chat in chats]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    config = qlora.parse_config(["--dataset", str(file)])
    train = qlora.encode_splits(qlora.load_splits(config, tokenizer), tokenizer, config).train
    assert train["special_text"][:] == [False, True]
    assert train["input_ids"][0] == [259, *b"q", 260, 261, *b"a", EOS]
    expected = {"user": [259, *b"q<|Assistant|>", 260, *b"a", EOS], "assistant": [259, *b"q", 260, *b"</s>a", EOS]}
    assert train["input_ids"][1] == expected[role]


# ------------------------------------------------------------------------------------
# Special tokens of a tokenizer
# ------------------------------------------------------------------------------------


def special(tokenizer, *argv, vocab_size=None):
    """The tokenizer as a run uses it, beside a model of so many tokens."""
    config = LlamaConfig(vocab_size=vocab_size or len(tokenizer))
    qlora.set_special_tokens(tokenizer, qlora.parse_config(list(argv)), config)
    return tokenizer


@pytest.mark.parametrize(
    ("options", "vocab_size", "pad", "pad_id"),
    [
        ({}, None, "<pad>", PAD),  # its own
        ({"pad": "</s>"}, None, "</s>", EOS),  # its own
        ({"pad": None, "unk": "<unk>", "extra": ("<|im_sep|>", RESERVED)}, None, RESERVED, 260),
        ({"pad": None, "unk": "<unk>", "extra": ("<unused0>",)}, None, "<unused0>", 259),
        ({"pad": None, "unk": "<unk>", "extra": ("[PAD]",)}, None, "[PAD]", 259),
        ({"pad": None, "unk": "<unk>", "extra": ("<|im_sep|>",)}, None, "<unk>", 258),
        ({"pad": None, "extra": ("<|im_sep|>",)}, None, "</s>", EOS),
        ({"pad": None}, 320, "</s>", EOS),  # the model's matrix is larger than the vocabulary
        ({"pad": None, "unk": "<unk>", "extra": (RESERVED,)}, 259, "<unk>", 258),  # beyond the model
        ({"pad": "<pad>"}, 258, "</s>", EOS),  # its own lies beyond the model
    ],
)
def test_the_choice_of_a_pad_token(options, vocab_size, pad, pad_id):
    tokenizer = tiny.byte_tokenizer(**options)
    before = len(tokenizer)
    special(tokenizer, vocab_size=vocab_size)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, pad_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert len(tokenizer) == before  # so that no embedding needs another row


def test_a_sentencepiece_tokenizer_pads_with_unk(tokenizers):
    tokenizer = special(AutoTokenizer.from_pretrained(tokenizers("sentencepiece")))
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id == 0 and len(tokenizer) == 512


@pytest.mark.parametrize(
    ("argv", "ids"),
    [
        (["--pad_token", "<|x|>"], {"bos": 256, "eos": 257, "pad": 260, "unk": 259}),
        (["--pad_token", "</s>"], {"bos": 256, "eos": 257, "pad": 257, "unk": 259}),
        (["--eos_token", "<|x|>"], {"bos": 256, "eos": 260, "pad": 258, "unk": 259}),
        (["--bos_token", "<|x|>"], {"bos": 260, "eos": 257, "pad": 258, "unk": 259}),
        (["--unk_token", "<|x|>"], {"bos": 256, "eos": 257, "pad": 258, "unk": 260}),
        (["--pad_token", "a", "--eos_token", "<|x|>"], {"bos": 256, "eos": 260, "pad": 97, "unk": 259}),
    ],
)
def test_flags_override_special_tokens_and_the_models_ids(argv, ids):
    tokenizer = special(tiny.byte_tokenizer(unk="<unk>", extra=("<|x|>",)), *argv)
    assert {name: getattr(tokenizer, f"{name}_token_id") for name in ids} == ids
    assert len(tokenizer) == 261

    config = LlamaConfig(vocab_size=261, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    qlora.sync_special_tokens(model, tokenizer)
    named = {name: getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert named == {name: ids[name] for name in named}
    assert model.get_input_embeddings().num_embeddings == 261


def test_eos_token_ends_the_completion():
    tokenizer = special(tiny.byte_tokenizer(eos=None, extra=("<|x|>",)), "--eos_token", "<|x|>")
    assert encode("a", "x", tokenizer, 9, 9)[0] == [256, A, X, 258]


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "bos_token", "unk_token"])
@pytest.mark.parametrize("token", ["<nope>", "ab", ""])
def test_a_token_that_is_not_in_the_vocabulary(name, token):
    with pytest.raises(qlora.ConfigError, match=rf"--{name} {token}.*vocabulary"):
        special(tiny.byte_tokenizer(), f"--{name}={token}")


def test_a_token_beyond_the_models_vocabulary():
    with pytest.raises(qlora.ConfigError, match=r"--pad_token <pad>.*258"):
        special(tiny.byte_tokenizer(), "--pad_token", "<pad>", vocab_size=258)


def test_no_eos_token():
    with pytest.raises(qlora.ConfigError, match="--eos_token"):
        special(tiny.byte_tokenizer(eos=None))


def load_tokenizer(folder, *argv):
    config = qlora.parse_config(["--model_name_or_path", str(folder), *map(str, argv)])
    return qlora.load_tokenizer(config, LlamaConfig(vocab_size=512), str(folder))


PATCH = ("--tokenizer_patch", "examples/llama1_tokenizer")


def test_empty_special_tokens_name_the_patch(tokenizers):
    with pytest.raises(qlora.ConfigError, match="--tokenizer_patch examples/llama1_tokenizer") as caught:
        load_tokenizer(tokenizers("early_llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", [["eos_token"], ["bos_token", "eos_token"]], ids=" ".join)
def test_some_empty_special_tokens_name_the_patch(tokenizers, tmp_path, empty):
    folder = shutil.copytree(tokenizers("sentencepiece"), tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | dict.fromkeys(empty, "")))
    with pytest.raises(qlora.ConfigError, match="--tokenizer_patch"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["early_llama", "bare_sentencepiece", "sentencepiece"])
def test_llama_tokenizers_give_sentencepieces_ids(tokenizers, monkeypatch, tmp_path, name, request):
    monkeypatch.chdir(request.config.rootpath)
    folder = tokenizers(name)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder, *(PATCH if name == "early_llama" else ()))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    text = "What is the capital?\nOslo </s>"
    expected = [1, *model.encode(text), *model.encode("Hello"), 2]
    assert encode(text, "Hello", tokenizer, 99, 99)[0] == expected

    tokenizer.save_pretrained(tmp_path / "saved")  # as a run does, beside the adapter
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert encode(text, "Hello", saved, 99, 99)[0] == expected


@pytest.mark.parametrize("patch", ["missing", "empty", "broken"])
def test_a_bad_patch_names_the_folder(tokenizers, tmp_path, patch):
    folder = tmp_path / patch
    if patch != "missing":
        folder.mkdir()
    if patch == "broken":
        (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(qlora.ConfigError, match=patch):
        load_tokenizer(tokenizers("early_llama"), "--tokenizer_patch", folder)


def test_a_patch_leaves_the_models_folder_alone(tokenizers, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    folder = tokenizers("early_llama")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    load_tokenizer(folder, *PATCH)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ------------------------------------------------------------------------------------
# Whole splits
# ------------------------------------------------------------------------------------


@pytest.fixture
def encode_file(tmp_path, byte_tokenizer):
    """`encode_file(rows, *argv)`: the rows, read from a file and encoded."""

    def call(rows, *argv, tokenizer=byte_tokenizer):
        file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
        paths = ["--dataset", str(file), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
        config = qlora.parse_config([*paths, *argv])
        return qlora.encode_splits(qlora.load_splits(config), tokenizer, config)

    return call


def test_encoded_rows(encode_file):
    rows = encode_file([{"input": "ab", "output": "x"}, {"input": "", "output": "yz"}]).train
    assert rows["input_ids"][:] == [[BOS, A, B, X, EOS], [BOS, Y, Z, EOS]]
    assert rows["labels"][:] == [[NO, NO, NO, X, EOS], [NO, Y, Z, EOS]]
    assert rows["length"][:] == [5, 4]


def test_the_default_limits_count_bos_and_eos(encode_file):
    rows = [{"input": "a" * n, "output": "x" * m} for n, m in ((1023, 255), (1024, 256), (9999, 9999))]
    encoded = encode_file(rows).train
    assert encoded["length"][:] == [1280, 1280, 1280]
    assert [ids[-1] for ids in encoded["input_ids"]] == [EOS, X, X]


def test_the_flags_reach_the_limits(encode_file):
    rows = [{"input": "abcdef", "output": "xyz"}]
    both = ("--source_max_len", "3", "--target_max_len", "2")
    assert encode_file(rows, *both).train["input_ids"][:] == [[BOS, A, B, X, Y]]
    assert encode_file(rows, *both, "--train_on_source").train["labels"][0][1:] == [A, B, X, Y]
    one = ("--model_max_len", "7", "--skip_excess_length", "False")
    assert encode_file(rows, *one).train["input_ids"][:] == [[BOS, E, F, X, Y, Z, EOS]]
    long = [{"input": "a" * 1500, "output": "x" * 400}]
    assert encode_file(long, "--model_max_len", "1902").train["length"][:] == [1902]


@pytest.mark.parametrize("longer", [0, 1, 3])
def test_the_share_of_cut_rows_is_part_of_the_statistics(encode_file, longer):
    rows = [{"input": "a", "output": "x" * (4 if n < longer else 3)} for n in range(4)]
    encoded = encode_file(rows, "--target_max_len", "4").train
    found = qlora.token_statistics(encoded, masked=False)
    assert (found.rows, found.cut, found.without_eos) == (4, longer, longer)
    assert (f"{longer} ({25 * longer}.0%) cut" in str(found)) == (longer > 0) and "4 rows" in str(found)


@pytest.fixture
def long_and_short(tmp_path):
    """A folder: of each split the lengths are 8, 9 and 7 tokens."""
    rows = [{"input": source, "output": "xyz"} for source in ("abc", "abcd", "ab")]
    for split in ("train", "eval"):
        tiny.rows_to_jsonl(tmp_path / f"{split}.jsonl", rows)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "train"),
    [(["--model_max_len", "8"], [8, 7]), (["--model_max_len", "8", "--no_skip_excess_length"], [8, 8, 7])],
)
def test_longer_training_rows_are_dropped_and_eval_rows_cut(byte_tokenizer, long_and_short, info, flags, train):
    config = qlora.parse_config(["--dataset", long_and_short, "--do_eval", *flags])
    splits = qlora.encode_splits(qlora.load_splits(config), byte_tokenizer, config)
    assert splits.train["length"][:] == train
    assert splits.eval["length"][:] == [8, 8, 7]
    assert splits.eval["input_ids"][1] == [BOS, B, C, D, X, Y, Z, EOS]
    said = any("1 of 3" in message and "model_max_len 8" in message for message in info.messages)
    assert said == (len(train) == 2)


def test_limits_without_model_max_len_drop_nothing(byte_tokenizer, long_and_short):
    config = qlora.parse_config(["--dataset", long_and_short, "--source_max_len", "2"])
    splits = qlora.encode_splits(qlora.load_splits(config), byte_tokenizer, config)
    assert splits.train["length"][:] == [6, 6, 6]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_limit_that_drops_every_row(encode_file, policy):
    with pytest.raises(qlora.ConfigError, match=r"--model_max_len 5"):
        encode_file([{"input": "abc", "output": "xyz"}] * 2, "--model_max_len", "5", "--on_bad_rows", policy)


def test_a_row_without_supervised_tokens_is_a_bad_row(encode_file, tmp_path):
    """Without BOS nothing comes before the only token of the first row."""
    tokenizer = tiny.byte_tokenizer(bos=None)
    rows = [{"input": "a", "output": "x"}, {"input": "", "output": "y"}, {"input": "", "output": "z"}]
    flags = ("--target_max_len", "1")
    with pytest.raises(qlora.ConfigError) as caught:
        encode_file(rows, *flags, tokenizer=tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:2: ") and "1 more" in message and "\n" not in message
    skipped = encode_file(rows, *flags, "--on_bad_rows", "skip", tokenizer=tokenizer)
    assert skipped.train["input_ids"][:] == [[A, X]]
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].rpartition(":")[2] for line in rejected] == ["2", "3"]
    for policy in ("stop", "skip"):
        with pytest.raises(qlora.ConfigError):
            encode_file(rows[1:], *flags, "--on_bad_rows", policy, tokenizer=tokenizer)


def test_rows_are_encoded_once(encode_file, monkeypatch):
    rows = [{"input": "ab", "output": "x"}]
    first = encode_file(rows).train["input_ids"][:]

    def fail(*args, **options):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(qlora, "encode_batch", fail)
    assert encode_file(rows).train["input_ids"][:] == first


def test_the_cache_depends_on_flags_tokenizer_and_rows(encode_file):
    """Each call differs from the first two in one thing; none may get their rows."""
    rows = [{"input": "ab", "output": "xy"}]
    for _ in range(2):
        assert encode_file(rows).train["input_ids"][:] == [[BOS, A, B, X, Y, EOS]]
    assert encode_file(rows, "--source_max_len", "2").train["input_ids"][:] == [[BOS, A, X, Y, EOS]]
    assert encode_file(rows, "--target_max_len", "2").train["input_ids"][:] == [[BOS, A, B, X, Y]]
    assert encode_file(rows, "--train_on_source").train["labels"][0][1:] == [A, B, X, Y, EOS]
    assert encode_file(rows, "--model_max_len", "6").train["input_ids"][:] == [[BOS, A, B, X, Y, EOS]]

    other = tiny.byte_tokenizer(extra=("<|x|>",))
    for flag, ids in (("--bos_token", [259, A, B, X, Y, EOS]), ("--eos_token", [BOS, A, B, X, Y, 259])):
        tokenizer = special(tiny.byte_tokenizer(extra=("<|x|>",)), flag, "<|x|>")
        assert encode_file(rows, tokenizer=tokenizer).train["input_ids"][:] == [ids]
    assert encode_file(rows, tokenizer=other).train["input_ids"][:] == [[BOS, A, B, X, Y, EOS]]
    assert encode_file([{"input": "ab", "output": "xz"}]).train["input_ids"][:] == [[BOS, A, B, X, Z, EOS]]


# ------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------


def statistics(*rows):
    """Of rows given as (ids, labels)."""
    more = {"cut": False, "special_text": False, "rendered": False}
    facts = [qlora.encoded_row(*row, (len(row[0]), 0), EOS) | more for row in rows]
    return qlora.token_statistics(datasets.Dataset.from_list(facts), masked=False)


FIRST, SECOND = ([BOS, A, B, EOS], [NO, NO, B, EOS]), ([BOS, X, Y, Z, EOS], [NO, X, Y, Z, EOS])


def test_token_statistics():
    found = statistics(FIRST, SECOND)
    assert (found.tokens, found.supervised, found.largest_id, found.longest) == (9, 6, 257, 5)
    assert statistics(FIRST) == statistics(FIRST)


@pytest.mark.parametrize(
    ("row", "without_eos"),
    [
        (([BOS, A, X, EOS], [NO, NO, X, EOS]), 0),
        (([BOS, A, EOS, X, A], [NO, A, EOS, NO, A]), 1),  # an earlier answer's
        (([BOS, A, X, EOS], [NO, NO, X, NO]), 1),  # it is there, but not supervised
        (([BOS, A, EOS, Y], [BOS, A, EOS, Y]), 0),  # --train_on_source, and a line end of the template's
        (([A, A], [NO, A]), 1),
    ],
)
def test_rows_without_eos_are_counted(row, without_eos):
    """Each alone, and before and after another row, whose tokens must not be taken for its own."""
    for rows, more in (([row], 0), ([SECOND, row, FIRST], 0), ([FIRST, row], 0), ([row, row], 1)):
        found = statistics(*rows)
        assert found.without_eos == without_eos * (1 + more)
        assert found.duplicates == more


def test_duplicates_are_whole_rows():
    ones, twos = ([A] * 4, [NO, A, A, A]), ([A, A], [NO, A])
    assert statistics(ones, twos, twos).duplicates == 1  # not 4 tokens that are the same in both
    assert statistics(FIRST, SECOND, FIRST, FIRST, SECOND).duplicates == 3


@pytest.mark.parametrize(
    "rows",
    [
        [SECOND, FIRST],
        [FIRST],
        [FIRST, SECOND, SECOND],
        [([BOS, A, B, EOS], [NO, A, B, EOS]), SECOND],
        [([BOS, A, C, EOS], [NO, NO, B, EOS]), SECOND],
        [([BOS, A, B], [NO, NO, B]), ([EOS, BOS, X, Y, Z, EOS], [EOS, NO, X, Y, Z, EOS])],  # the same ids in all
    ],
    ids=["order", "fewer", "more", "label", "id", "boundary"],
)
def test_the_fingerprint_changes_with_the_rows(rows):
    assert statistics(*rows).fingerprint != statistics(FIRST, SECOND).fingerprint


# ------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------

BATCH = [
    {"input_ids": [BOS, A, B, X, EOS], "labels": [NO, NO, NO, X, EOS]},
    {"input_ids": [BOS, Y, EOS], "labels": [NO, Y, EOS]},
]


@pytest.mark.parametrize("pad", [PAD, EOS, 0], ids=["pad", "pad is EOS", "0"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side, pad):
    """The mask comes from the lengths: where pad is EOS, the EOS of a row is attended to and supervised."""
    batch = qlora.padded_batch(step_of(BATCH), [0, 1], pad, side)
    short, mask = [BOS, Y, EOS], [1, 1, 1]
    right = side == "right"
    assert batch["input_ids"].tolist() == [
        [BOS, A, B, X, EOS],
        [*short, pad, pad] if right else [pad, pad, *short],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [*mask, 0, 0] if right else [0, 0, *mask]]
    # Of the two rows of five, laid flat: which position predicts which supervised token.
    assert batch["positions"].tolist() == [2, 3, *([5, 6] if right else [7, 8])]
    assert batch["targets"].tolist() == [X, EOS, Y, EOS]


def step_of(rows):
    return qlora.collate_step(rows)["step"]


def test_ids_that_equal_the_pad_are_attended_to():
    rows = [{"input_ids": [EOS, EOS, X], "labels": [NO, EOS, X]}, {"input_ids": [BOS], "labels": [NO]}]
    batch = qlora.padded_batch(step_of(rows), [0, 1], EOS, "right")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch["positions"].tolist(), batch["targets"].tolist()) == ([0, 1], [EOS, X])


def test_prompts_have_no_labels():
    batch = qlora.padded_prompts([[BOS, A], [BOS]], PAD, "left")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[BOS, A], [PAD, BOS]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_the_first_token_of_a_row_is_not_supervised():
    """Nothing predicts it: not the last token of the row before, where rows lie end to end."""
    rows = [{"input_ids": [A, B], "labels": [A, B]}, {"input_ids": [X, Y, EOS], "labels": [X, Y, EOS]}]
    step = step_of(rows)
    assert step.labels.tolist() == [NO, B, NO, Y, EOS] and step.supervised == 3
    flat = qlora.padding_free_batch(step, [0, 1])
    assert flat["input_ids"].tolist() == [[A, B, X, Y, EOS]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert flat["cu_seq_lens_q"].tolist() == flat["cu_seq_lens_k"].tolist() == [0, 2, 5]
    assert (flat["max_length_q"], flat["max_length_k"]) == (3, 3)
    assert (flat["positions"].tolist(), flat["targets"].tolist()) == ([0, 2, 3], [B, Y, EOS])
    turned = qlora.padding_free_batch(step, [1, 0])
    assert turned["input_ids"].tolist() == [[X, Y, EOS, A, B]] and turned["targets"].tolist() == [Y, EOS, B]
