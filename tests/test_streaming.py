"""--streaming: rows that are read while training, a block at a time, and a resume that goes on from the very place."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import tiny
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import qlora

ROWS = tiny.support_rows(24)
FLAGS = {"streaming": True, "stream_buffer": 10, "max_steps": 9, "save_steps": 3, "lora_dropout": 0.1}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(rows_by_split)`: what `load_dataset("some/set", streaming=True)` gives, from three JSON files a split.

    Only the look-up by name is replaced: files are read by the library's own streaming code, as the hub's are.
    """
    real = datasets.load_dataset

    def publish(**splits):
        files = {}
        for split, rows in splits.items():
            third = -(-len(rows) // 3)
            files[split] = [
                str(tiny.rows_to_jsonl(tmp_path / f"{split}-{n}.jsonl", rows[n * third : (n + 1) * third]))
                for n in range(3)
            ]

        def load_dataset(path, **options):
            assert path == "some/set" and options.pop("streaming") is True
            return real("json", data_files=files, streaming=True, cache_dir=options["cache_dir"])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return "some/set"

    return publish


def losses(run):
    return {e["step"]: e["loss"] for e in run.json("trainer_state.json")["log_history"] if "loss" in e}


def weights(run):
    return load_file(run.output_dir / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"packing": True, "train_sampling_strategy": "random"},
        {"train_sampling_strategy": "sequential", "stream_buffer": 7},
    ],
    ids=["grouped", "packed", "in order"],
)
@pytest.mark.parametrize("where", ["file", "hub"])
def test_a_resumed_stream_equals_an_uninterrupted_one(run_qlora, data_dir, tmp_path, hub, flags, where):
    """Over more than a pass (24 rows, 9 x 2 and 9 x 4 of them), stopped in the middle of a block."""
    dataset = data_dir / "support.jsonl" if where == "file" else hub(train=ROWS)
    flags = FLAGS | {"dataset": dataset, "gradient_accumulation_steps": 2} | flags
    whole = run_qlora(**flags, output_dir=tmp_path / "whole")
    first = run_qlora(**flags | {"max_steps": 5}, output_dir=tmp_path / "parts")
    assert whole.code == first.code == 0
    for name in ("completed", "adapter_model.safetensors"):  # what a kill after step 5 would not have left
        (first.output_dir / name).unlink()
    place = json.loads((tmp_path / "parts" / "checkpoint-5" / "stream.json").read_text())
    assert place["windows"] == 5 and place["taken"] > 0
    second = run_qlora(**flags, output_dir=tmp_path / "parts")
    assert second.code == 0 and "resuming from" in second.stderr
    assert losses(second) == losses(whole) and len(losses(whole)) == 9
    assert same(weights(second), weights(whole))
    epochs = [[e["epoch"] for e in run.json("trainer_state.json")["log_history"]][5:] for run in (second, whole)]
    assert epochs[0] == epochs[1]


# ------------------------------------------------------------------------------------
# Which rows
# ------------------------------------------------------------------------------------


SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
MODEL = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=tiny.PAD + 1, max_position_embeddings=64))


def stream_of(*argv):
    """The splits of these flags, and the windows that each of so many processes gets to train on."""
    config = qlora.parse_config(["--streaming", *map(str, argv)])
    tokenizer = tiny.byte_tokenizer()
    splits = qlora.load_splits(config, tokenizer)

    def windows(count, processes=1, rank=0, place=None, size=None):
        args = qlora.dataclasses.replace(qlora.trainer_arguments(config.training))
        shared = {"world_size": processes, "process_index": rank, "train_batch_size": args.train_batch_size}
        shared |= {name: getattr(args, name) for name in ("seed", "data_seed", "train_sampling_strategy")}
        shown = type("Args", (), shared)
        more = qlora.collate_step, MODEL, size or args.train_batch_size * processes, place or {}
        stream = qlora.StreamedWindows(splits.train, tokenizer, config, shown, *more)
        return list(itertools.islice(iter(stream), count))

    return splits, windows


def numbers(windows):
    """The rows that windows are made of, by their line in the file."""
    return [int(where.rpartition(":")[2]) for window in windows for where in window["window"].where]


@pytest.fixture
def file(tmp_path):
    """12 rows of different lengths."""
    return tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": "q" * n, "output": "a"} for n in range(12)])


SMALL = ("--max_steps", 9, "--gradient_accumulation_steps", 2, "--stream_buffer", 5)


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_each_pass_holds_every_row_once_shuffled_within_blocks(file, strategy):
    _, windows = stream_of("--dataset", file, *SMALL, "--train_sampling_strategy", strategy)
    got = numbers(windows(12))  # two passes
    blocks = [got[start : start + size] for start, size in ((0, 5), (5, 5), (10, 2), (12, 5), (17, 5), (22, 2))]
    ordered = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]] * 2
    assert [sorted(block) for block in blocks] == ordered
    assert (blocks == ordered) == (strategy == "sequential")
    if strategy == "random":
        assert blocks[0] != blocks[3]  # another order in the next pass


def test_processes_share_the_windows(file):
    _, windows = stream_of("--dataset", file, *SMALL)
    shares = [windows(3, processes=2, rank=rank) for rank in (0, 1)]
    assert sorted(numbers(shares[0]) + numbers(shares[1])) == list(range(1, 13))
    assert [window["place"] for window in shares[0]] == [window["place"] for window in shares[1]]
    later = windows(3, processes=2, rank=1, place=shares[1][1]["place"])
    assert later[:2] == [{}, {}] and numbers(later[2:]) == numbers(shares[1][2:])
    alone = windows(3, size=4, place=shares[1][1]["place"])  # goes on with as many rows to a step
    assert sorted(numbers(alone[2:])) == sorted(numbers(shares[0][2:]) + numbers(shares[1][2:]))
    three = [windows(3, processes=3, rank=rank, size=4) for rank in range(3)]
    assert sorted(map(len, (share[0]["window"].rows for share in three))) == [1, 1, 2]


def test_rows_to_evaluate_on_are_the_first_and_not_trained_on(file):
    splits, windows = stream_of(
        "--dataset", file, *SMALL, "--do_eval", "--eval_dataset_size", 4, "--max_eval_samples", 3
    )
    assert [where.rpartition(":")[2] for where in splits.eval["where"]] == ["1", "2", "3"]
    assert Counter(numbers(windows(8))) == Counter({n: 2 for n in range(5, 13)})


def test_a_split_of_its_own_is_evaluated_on(hub):
    rows = [{"input": "q", "output": f"{n}"} for n in range(9)]
    name = hub(train=rows, validation=rows[:5], test=rows[:2])
    splits, windows = stream_of(
        "--dataset", name, *SMALL, "--do_eval", "--max_eval_samples", 4, "--max_train_samples", 6
    )
    assert [where for where in splits.eval["where"]] == [f"some/set[validation]:{n}" for n in range(1, 5)]
    assert Counter(numbers(windows(6))) == Counter({n: 2 for n in range(1, 7)})


def test_bad_rows_of_a_stream(tmp_path, file):
    """Skipped, each is written down once although its pass comes again; else the run stops at the first."""
    (tmp_path / "b.jsonl").write_text(file.read_text() + '{"input": "x"}\n')
    flags = ("--dataset", tmp_path / "b.jsonl", *SMALL, "--output_dir", tmp_path / "out")
    _, windows = stream_of(*flags, "--on_bad_rows", "skip")
    assert Counter(numbers(windows(12))) == Counter({n: 2 for n in range(1, 13)})
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{tmp_path / 'b.jsonl'}:13"
    _, windows = stream_of(*flags)
    with pytest.raises(qlora.DataError, match=r"b.jsonl:13: field 'output' is missing"):
        windows(12)


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ('{"input": "x", "output": ""}\n' * 7, (), "no row in it that can be used"),
        (
            '{"input": "x", "output": "y"}\n' * 7,
            ("--do_eval", "--eval_dataset_size", 7),
            "no row in it that can be used to train after the first 7, which are held out",
        ),
        ('{"input": "x", "output": "y"}\n', ("--model_max_len", 2), "no row in it that can be used"),
    ],
    ids=["bad", "held out", "too long"],
)
def test_a_stream_without_a_row_to_train_on_ends(tmp_path, content, flags, said):
    (tmp_path / "b.jsonl").write_text(content)
    flags = (
        "--dataset",
        tmp_path / "b.jsonl",
        *SMALL,
        "--on_bad_rows",
        "skip",
        "--output_dir",
        tmp_path / "out",
        *flags,
    )
    with pytest.raises(qlora.DataError, match=said):
        stream_of(*flags)[1](1)


def test_a_block_of_which_no_row_is_of_the_sources_is_passed_over(tmp_path):
    rows = [{"input": "q", "output": "a", "source": "other" if 5 < n < 11 else "mine"} for n in range(1, 16)]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    _, windows = stream_of("--dataset", file, *SMALL, "--include_sources", "mine")
    assert Counter(numbers(windows(10))) == Counter({n: 2 for n in (*range(1, 6), *range(11, 16))})


def test_every_block_is_held_against_the_model(tmp_path, caplog, monkeypatch):
    """An id that its embedding lacks would only show as a crash on the GPU."""
    rows = [{"input": "q", "output": "a" * (90 if n in (7, 12) else 9)} for n in range(1, 16)]
    flags = ("--dataset", tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows), *SMALL, "--max_train_samples")
    monkeypatch.setattr(qlora.log, "propagate", True)
    stream_of(*flags, 5)[1](12)
    assert "the model was made for" not in caplog.text
    stream_of(*flags, 15)[1](30)  # two passes
    assert caplog.text.count("the longest train row has 93 tokens, the model was made for 64") == 1
    monkeypatch.setattr(MODEL.get_input_embeddings(), "num_embeddings", tiny.EOS)
    rows[6]["output"] = "a"  # the only row that is not cut, and so the only one with EOS
    cut = ("--target_max_len", 5, *flags)
    tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    assert len(stream_of(*cut, 5)[1](2)) == 2
    with pytest.raises(qlora.ConfigError, match=f"hold token id {tiny.EOS}, the model has {tiny.EOS}"):
        stream_of(*cut, 15)[1](4)


def test_a_checkpoint_without_streaming_is_not_streamed_on(run_qlora):
    assert run_qlora(max_steps=2).code == 0
    run = run_qlora(max_steps=4, streaming=True)
    assert run.code == 2 and "streaming was False, is True" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "[1]", '{"row": '])
def test_a_checkpoint_without_a_place_is_one_line(run_qlora, tmp_path, content):
    checkpoint = run_qlora(**FLAGS | {"max_steps": 3}).output_dir / "checkpoint-3"
    for name in ("checkpoint.json", "stream.json"):  # another program's
        (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / "stream.json").write_text(content)
    run = run_qlora(**FLAGS, resume_from_checkpoint=checkpoint, output_dir=tmp_path / "next")
    assert run.code == 2 and "Traceback" not in run.stderr
    assert str(checkpoint) in run.stderr.splitlines()[-1] and "stream" in run.stderr.splitlines()[-1]


def test_a_stream_is_read_as_far_as_it_is_trained_on(run_qlora, tmp_path):
    """A row that is wrong far behind the last step is never met, and nothing of the file is cached."""
    lines = [json.dumps(row) for row in ROWS] + ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = {"dataset": tmp_path / "a.jsonl", "cache_dir": tmp_path / "cache", "do_eval": True, "eval_dataset_size": 4}
    run = run_qlora(**FLAGS | flags | {"max_steps": 2, "stream_buffer": 5})
    assert run.code == 0 and "of a stream's first block: 5 rows" in run.stderr
    assert run.json("metrics.json")["eval_loss"] > 0
    assert run_qlora(**flags, output_dir=tmp_path / "other").code == 2
