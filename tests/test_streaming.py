"""--streaming: rows that are read and encoded while training, and a resume that continues exactly."""

import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import tiny
from safetensors.torch import load_file

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


@pytest.mark.parametrize("flags", [{}, {"train_sampling_strategy": "sequential"}], ids=["shuffled", "sequential"])
@pytest.mark.parametrize("where", ["file", "hub"])
def test_a_resumed_stream_equals_an_uninterrupted_one(run_qlora, data_dir, tmp_path, hub, flags, where):
    """Over more than a pass: 9 x 4 of 24 rows, stopped in the middle of the first."""
    dataset = data_dir / "support.jsonl" if where == "file" else hub(train=ROWS)
    flags = FLAGS | {"dataset": dataset, "gradient_accumulation_steps": 2} | flags
    whole = run_qlora(**flags, output_dir=tmp_path / "whole")
    first = run_qlora(**flags | {"max_steps": 5}, output_dir=tmp_path / "parts")
    assert whole.code == first.code == 0
    for name in ("completed", "adapter_model.safetensors"):  # what a kill after step 5 would not have left
        (first.output_dir / name).unlink()
    second = run_qlora(**flags, output_dir=tmp_path / "parts")
    assert second.code == 0 and "resuming from" in second.stderr
    assert losses(second) == losses(whole) and len(losses(whole)) == 9
    assert same(weights(second), weights(whole))
    epochs = [[e["epoch"] for e in run.json("trainer_state.json")["log_history"]][5:] for run in (second, whole)]
    assert epochs[0] == epochs[1]


def test_a_stream_whose_file_has_changed_is_not_resumed(run_qlora, tmp_path):
    """Also where the rows that are read at the start are the same: rows that were not read yet would be skipped."""
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", tiny.support_rows(1100))
    flags = FLAGS | {"dataset": file, "max_steps": 2}
    assert run_qlora(**flags).code == 0
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-9]))
    run = run_qlora(**flags | {"max_steps": 4})
    assert run.code == 2 and "belongs to another run: sizes of the dataset's files was [" in run.stderr


# ------------------------------------------------------------------------------------
# Which rows
# ------------------------------------------------------------------------------------


def stream_of(*argv):
    """The splits of these flags, and `rows(n, skip)`: the stream's rows from there on, as (raw rows consumed, row)."""
    config = qlora.parse_config(["--streaming", *map(str, argv)])
    tokenizer = tiny.byte_tokenizer()
    splits = qlora.load_splits(config, tokenizer)

    def rows(count, skip=0):
        return list(itertools.islice(qlora.encoded_stream(splits.train, tokenizer, config, skip), count))

    return splits, rows, lambda: qlora.encode_splits(splits, tokenizer, config)


def numbers(rows):
    """Their lines in the file."""
    return [int(row["where"].rpartition(":")[2]) for _, row in rows]


@pytest.fixture
def file(tmp_path):
    """12 rows of different lengths."""
    return tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": "q" * n, "output": "a"} for n in range(12)])


SMALL = ("--max_steps", 9, "--stream_buffer", 5)


def test_each_pass_has_every_row_once_in_an_order_of_its_own(file):
    _, rows, _ = stream_of("--dataset", file, *SMALL)
    order = numbers(rows(24))
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(1, 13))
    assert order[:12] != order[12:] and order[:12] != sorted(order[:12])
    assert [consumed for consumed, _ in rows(24)] == list(range(1, 25))
    assert numbers(stream_of("--dataset", file, *SMALL, "--data_seed", 1)[1](12)) != order[:12]
    in_order = ("--train_sampling_strategy", "sequential")
    assert numbers(stream_of("--dataset", file, *SMALL, *in_order)[1](24)) == [*range(1, 13)] * 2


def test_a_shuffled_row_is_at_most_a_buffer_early(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"input": "q", "output": "a"}] * 100)
    order = numbers(stream_of("--dataset", file, "--max_steps", 9, "--stream_buffer", 10)[1](100))
    assert all(number < place + 10 + 1 for place, number in enumerate(order, start=1))


@pytest.mark.parametrize("skip", [1, 7, 12, 17])
def test_skipped_rows_are_read_and_not_encoded(file, monkeypatch, skip):
    _, rows, _ = stream_of("--dataset", file, *SMALL)
    whole, encoded, original = rows(24), [], qlora.encode_batch
    monkeypatch.setattr(qlora, "encode_batch", lambda *args, **kwargs: encoded.append(1) or original(*args, **kwargs))
    assert rows(24 - skip, skip) == whole[skip:] and len(encoded) == 24 - skip


def test_a_resume_may_begin_between_two_answers_of_a_chat(tmp_path, monkeypatch):
    """With a template that makes a row of each answer: a position within a chat is a fraction."""
    last = "{{ '!' if loop.last and m.role == 'assistant' }}"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + last + "</s>{% endfor %}"
    chats = [[{"role": ("user", "assistant")[n % 2], "content": f"{k}{n}"} for n in range(6)] for k in range(3)]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    made = tiny.byte_tokenizer()
    made.chat_template = template
    monkeypatch.setattr(tiny, "byte_tokenizer", lambda: made)
    _, rows, _ = stream_of("--dataset", file, *SMALL)
    whole = rows(18)
    assert [position for position, _ in whole[2::3]] == [1, 2, 3, 4, 5, 6]
    assert len({tuple(row["input_ids"]) for _, row in whole}) == 9
    for n in range(17):
        assert rows(17 - n, whole[n][0]) == whole[n + 1 :]


def test_each_answer_of_an_expanded_conversation_is_a_row_of_its_own(tmp_path):
    """So that a resume may begin between two answers."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": f"{n}"} for n in range(6)]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}] * 2)
    flags = ("--dataset_format", "airoboros_chat", "--expand_conversations")
    _, rows, _ = stream_of("--dataset", file, *SMALL, *flags)
    whole = rows(12)
    assert Counter(numbers(whole)) == {1: 6, 2: 6}
    assert rows(7, 5) == whole[5:]


def test_rows_to_evaluate_on_are_the_first_and_not_trained_on(file):
    flags = ("--do_eval", "--eval_dataset_size", 4, "--max_eval_samples", 3)
    splits, rows, _ = stream_of("--dataset", file, *SMALL, *flags)
    assert [where.rpartition(":")[2] for where in splits.eval["where"]] == ["1", "2", "3"]
    assert Counter(numbers(rows(16))) == Counter({n: 2 for n in range(5, 13)})


def test_a_split_of_its_own_is_evaluated_on(hub):
    rows = [{"input": "q", "output": f"{n}"} for n in range(9)]
    name = hub(train=rows, validation=rows[:5], test=rows[:2])
    flags = ("--do_eval", "--max_eval_samples", 4, "--max_train_samples", 6)
    splits, rows, _ = stream_of("--dataset", name, *SMALL, *flags)
    assert [where for where in splits.eval["where"]] == [f"some/set[validation]:{n}" for n in range(1, 5)]
    assert Counter(numbers(rows(12))) == Counter({n: 2 for n in range(1, 7)})


def test_bad_rows_of_a_stream(tmp_path, file):
    """Skipped, each is written once although its pass is repeated; otherwise the run stops at the first."""
    (tmp_path / "b.jsonl").write_text(file.read_text() + '{"input": "x"}\n')
    flags = ("--dataset", tmp_path / "b.jsonl", *SMALL, "--output_dir", tmp_path / "out")
    _, rows, _ = stream_of(*flags, "--on_bad_rows", "skip")
    assert Counter(numbers(rows(24))) == Counter({n: 2 for n in range(1, 13)})
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{tmp_path / 'b.jsonl'}:13" and json.loads(line)["row"] == {"input": "x"}
    with pytest.raises(qlora.ConfigError, match=r"b.jsonl:13: field 'output' is missing"):
        stream_of(*flags)[1](13)


def test_rejected_rows_are_read_once(tmp_path, monkeypatch):
    """Not again for each of them, and written once each."""
    rows = [{"input": "q", "output": ""}, {"input": "q", "output": "a"}] * 20
    flags = ("--dataset", tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows), *SMALL, "--output_dir", tmp_path / "out")
    read, original = [], Path.open

    def spied(path, mode="r", *args, **options):
        if path.name == "rejected.jsonl" and ("r" in mode or "+" in mode):
            read.append(path)
        return original(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", spied)
    for _ in range(2):  # the second as after a resume
        assert len(stream_of(*flags, "--on_bad_rows", "skip")[1](40)) == 40
        assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 20
    assert len(read) <= 2 + 2  # two are this test's


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"input": "x", "output": ""}\n' * 7, (), "no row in it that can be used"),
        (
            '{"input": "x", "output": "y"}\n' * 7,
            ("--do_eval", "--eval_dataset_size", 7),
            r"no row after the 7 held out \(--eval_dataset_size\)",
        ),
        (
            '{"input": "x", "output": "y"}\n',
            ("--model_max_len", 2),
            "--model_max_len 2: all 1 train rows are longer",
        ),
    ],
    ids=["bad", "held out", "too long"],
)
def test_a_stream_without_a_row_to_train_on_ends(tmp_path, content, flags, message):
    (tmp_path / "b.jsonl").write_text(content)
    paths = ("--dataset", tmp_path / "b.jsonl", "--output_dir", tmp_path / "out")
    with pytest.raises(qlora.ConfigError, match=message):
        stream_of(*paths, *SMALL, "--on_bad_rows", "skip", *flags)[2]()


def test_rows_of_other_sources_are_left_out(tmp_path):
    rows = [{"input": "q", "output": "a", "source": "other" if 5 < n < 11 else "mine"} for n in range(1, 16)]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", rows)
    _, rows, _ = stream_of("--dataset", file, *SMALL, "--include_sources", "mine")
    assert Counter(numbers(rows(20))) == Counter({n: 2 for n in (*range(1, 6), *range(11, 16))})
    held = ("--max_train_samples", "3", "--do_eval", "--eval_dataset_size", "4")  # counted among those that are left
    splits, rows, _ = stream_of("--dataset", file, *SMALL, "--include_sources", "mine", *held)
    assert [row["where"].rpartition(":")[2] for row in splits.eval] == ["1", "2", "3", "4"]
    assert set(numbers(rows(6))) == {5, 11, 12}


def test_evaluation_alone_reads_no_more_of_a_stream_than_asked(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        tiny.rows_to_jsonl(tmp_path / f"data/{split}.jsonl", [{"input": "q", "output": f"a{n}"} for n in range(90)])
    flags = ["--dataset", str(tmp_path / "data"), "--streaming", "--do_train", "False", "--do_eval"]
    with caplog.at_level("INFO", "qlora"):
        splits = qlora.load_splits(qlora.parse_config([*flags, "--max_eval_samples", "9"]))
    assert splits.train is None and len(splits.eval) == 9
    assert f"{tmp_path / 'data'}[test]: 9 rows" in caplog.messages


def test_statistics_are_those_of_the_first_rows(tmp_path):
    file = tiny.rows_to_jsonl(
        tmp_path / "a.jsonl", [{"input": "q", "output": "a" * (n // 999)} for n in range(999, 3000)]
    )
    encoded = stream_of("--dataset", file, *SMALL)[2]().train
    assert len(encoded) == 1000 and encoded["where"][-1].endswith(":1000")
    assert encoded["length"][0] == 4 and encoded["length"][-1] == 5


def steps_of(file, monkeypatch, *, rank=0, ranks=1, position=0, vocabulary=300, limit=1000):
    """The steps of 4 rows that one of so many ranks gets, as (lines in the file, position after them)."""
    monkeypatch.setattr(qlora, "rank_and_world_size", lambda: (rank, ranks))
    config = qlora.parse_config(["--streaming", "--dataset", str(file), *map(str, SMALL)])
    tokenizer = tiny.byte_tokenizer()
    stream = qlora.load_splits(config, tokenizer).train
    steps = qlora.StreamedSteps(stream, tokenizer, config, 4, (vocabulary, limit, limit), position)
    taken = list(itertools.islice(steps, 6))
    return [(numbers((0, {"where": where}) for where in step["step"].where), step["position"]) for step in taken]


def test_ranks_share_the_steps_of_a_stream(file, monkeypatch):
    """Each row of a step goes to one rank, and all ranks note the same position, also after a resume."""
    alone = steps_of(file, monkeypatch)
    first, second = (steps_of(file, monkeypatch, rank=rank, ranks=2) for rank in (0, 1))
    assert [position for _, position in alone] == [4, 8, 12, 16, 20, 24]
    for (rows, position), (mine, at), (other, there) in zip(alone, first, second, strict=True):
        assert position == at == there and rows[::2] == mine and rows[1::2] == other
    assert steps_of(file, monkeypatch, rank=1, ranks=2, position=8)[:4] == second[2:]


def test_a_token_id_outside_the_embedding_is_refused(file, monkeypatch):
    with pytest.raises(qlora.ConfigError, match="hold token id 257, the model has 257"):
        steps_of(file, monkeypatch, vocabulary=257)  # EOS is 257


def test_a_row_of_more_tokens_than_positions_is_refused(file, monkeypatch):
    with pytest.raises(qlora.ConfigError, match="tokens, the model takes 3"):
        steps_of(file, monkeypatch, limit=3)


def test_a_checkpoint_without_streaming_is_not_streamed_on(run_qlora):
    assert run_qlora(max_steps=2).code == 0
    run = run_qlora(max_steps=4, streaming=True)
    assert run.code == 2 and "streaming was False, is True" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "[1]", '{"rows": '])
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
    """Its first 1,000 rows for the statistics: a bad one behind them and the last step is never reached."""
    lines = [json.dumps({"input": "a", "output": "b"})] * 1010 + ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = {"dataset": tmp_path / "a.jsonl", "cache_dir": tmp_path / "cache", "do_eval": True, "eval_dataset_size": 4}
    run = run_qlora(**FLAGS | flags | {"max_steps": 2, "stream_buffer": 5})
    assert run.code == 0 and "train data       1,000 rows, " in run.stderr
    assert run.json("metrics.json")["eval_loss"] > 0
    assert run_qlora(**flags, output_dir=tmp_path / "other").code == 2
