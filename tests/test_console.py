"""What a run prints: warnings at the start, a line for each log, what to do next."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import tiny
import torch

import qlora


def history(run, name):
    return [entry for entry in run.json("trainer_state.json")["log_history"] if name in entry]


# ------------------------------------------------------------------------------------
# Warnings at the start
# ------------------------------------------------------------------------------------


@pytest.fixture
def warned(tmp_path, models, caplog):
    """`warned(rows, *words)` -> the warnings about rows once they are encoded, byte by byte, and those of the start."""

    def warn(rows, *words):
        file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
        flags = ["--model_name_or_path", str(models("llama")), "--dataset", str(file)]
        config = qlora.parse_config([*flags, "--output_dir", str(tmp_path / "out"), *words])
        caplog.clear()
        with caplog.at_level("WARNING", "qlora"):
            run, data = qlora.load_run(config)
            run, identity = qlora.check_resume(run, data)
            qlora.describe_run(run, data, identity)
        return caplog.messages

    return warn


PAIRS = [{"input": "a" * n, "output": "b" * (n + 10)} for n in range(1, 201)]  # BOS and EOS make each one longer


def test_rows_that_are_cut_name_lengths_that_fit(warned):
    """99 % of 200 rows are 198: up to 198 + BOS and 208 + EOS tokens."""
    few = ("--max_steps", "1")
    (cut,) = warned(PAIRS, "--source_max_len", "100", "--target_max_len", "300", *few)
    assert "of 200 train rows 101 are cut" in cut and "--source_max_len 199" in cut and "--target_max_len" not in cut
    (cut,) = warned(PAIRS, "--source_max_len", "300", "--target_max_len", "100", *few)
    assert "of 200 train rows 111 are cut, and 111 end without EOS" in cut
    assert cut.endswith("pass --target_max_len 209")
    one = "--model_max_len", "300", "--skip_excess_length", "False", *few
    assert "--model_max_len 408" in warned(PAIRS, *one)[0]  # 2 * 198 + 10 + 2
    assert "99 % of them fit with --model_max_len 408" in warned(PAIRS, "--model_max_len", "300", *few)[0]
    assert warned(PAIRS, "--source_max_len", "195", *few) == []  # 6 of 200 are 3 %


def test_no_length_is_named_that_the_model_can_not_read(warned):
    """It reads 512 tokens. 99 % of the first rows need 409 and 419 together; of the second 409 or 419, never both."""
    both, few = [{"input": "a" * 408, "output": "b" * 418}] * 20, ("--max_steps", "1")
    (cut,) = warned(both, "--source_max_len", "300", "--target_max_len", "100", *few)
    assert "shorten them" in cut and "_max_len" not in cut
    one = [{"input": "a" * 408, "output": "b"}, {"input": "a", "output": "b" * 418}] * 10
    (cut,) = warned(one, "--source_max_len", "300", "--target_max_len", "100", *few)
    assert cut.endswith("pass --source_max_len 409 --target_max_len 419")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max_steps", "100"), None),  # 10 rows in steps of 2: 20 epochs
        (("--max_steps", "101"), "--max_steps 101: 20 times through 10 rows; three times are --max_steps 15"),
        (("--num_train_epochs", "21"), "--num_train_epochs 21: 21 times through 10 rows; three times"),
        (("--max_steps", "101", "--do_train", "False", "--do_eval"), None),
    ],
)
def test_many_epochs_are_a_warning_with_the_steps_of_three(warned, words, said):
    batch = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")
    messages = warned(PAIRS[:10], *batch, *words)
    assert [said in message for message in messages] == [True] * (said is not None)


def test_a_busy_machine_is_named_where_threads_would_wait(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    for load, said in ((1.0, False), (3.5, True), (40.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0, 0))
        caplog.clear()
        with caplog.at_level("WARNING", "qlora"):
            qlora.log_hints(qlora.parse_config([]))
        assert any("OMP_NUM_THREADS=1" in message for message in caplog.messages) == said


@pytest.mark.parametrize(("own", "flag", "said"), [(True, "", "16 times"), (False, "--bf16", "pass --fp16")])
def test_bf16_on_a_gpu_is_a_hint(monkeypatch, caplog, own, flag, said):
    config = qlora.parse_config([flag] if flag else [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with caplog.at_level("INFO", "qlora"):
        qlora.log_hints(config)
    assert any(said in message for message in caplog.messages)


# ------------------------------------------------------------------------------------
# A whole run
# ------------------------------------------------------------------------------------


def test_a_run_in_a_pipe_prints_a_line_for_each_log_and_every_metric_once(run_qlora, tmp_path, data_dir):
    run = run_qlora(
        max_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=2, save_steps=5, load_best_model_at_end=False,
        do_predict=True, predict_with_generate=True, max_new_tokens=2, output_dir=tmp_path / "a b",
    )  # fmt: skip
    assert run.code == 0 and not run.stdout
    lines = run.stderr.splitlines()
    assert not any(re.search(r"it/s|%\||examples/s|\x1b|Warning|\d\.\d{6}", line) for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    logged = history(run, "loss")
    assert [entry["step"] for entry in logged] == [2, 4]  # and the last one only if it is due
    for entry in logged:
        (line,) = (line for line in steps if f"step {entry['step']} of 5" in line and "gradient norm" in line)
        numbers = f"loss {entry['loss']:.4g} ", f"gradient norm {entry['grad_norm']:.4g} ", "rate 0.0002 "
        assert all(number in line for number in numbers) and "tokens/s" in line and line.endswith(" left")
    evaluated = history(run, "eval_loss")
    assert [entry["step"] for entry in evaluated] == [2, 4, 5]  # the last one is shown at the end
    assert len([line for line in steps if "eval_loss" in line]) == 2
    done = dict(line.split(maxsplit=1) for line in lines[lines.index("Next") - 5 : lines.index("Next")])
    metrics = run.json("metrics.json")
    for name in ("train_loss", "eval_loss", "eval_perplexity"):
        assert done[name] == f"{metrics[name]:.4g}"
    assert len(str(metrics["eval_loss"])) > 10, "files have all digits"
    speed = metrics["train_tokens_per_second"]
    assert done["train_tokens_per_second"] == (f"{speed:,.0f}" if speed >= 1000 else f"{speed:.4g}")

    commands = {line.split()[0]: shlex.split(line)[1:] for line in lines[lines.index("Next") + 1 :]}
    assert commands["chat"] == ["python", "examples/chat.py", str(run.output_dir)]
    evaluation, loss = run.json("eval_results.json"), metrics["train_loss"]
    assert "eval_model_preparation_time" not in metrics
    card = (run.output_dir / "README.md").read_text(encoding="utf-8")
    assert "| eval_steps | `2` |" in card
    assert re.findall(r"^\| (\d) \| [\d.]* \| [\d.]+ \|$", card, re.MULTILINE) == ["2", "4", "5"]  # a row for a step
    file = data_dir / "support.csv"
    for name, more in (("predict", {"FILE": str(file)}), ("merge", {})):
        words = [more.get(word, word) for word in commands[name]]
        assert words[:2] == ["python", "qlora.py"] and qlora.main(words[2:]) == 0
        assert run.json("eval_results.json") == evaluation and run.json("train_results.json")["train_loss"] == loss
    assert (Path(f"{run.output_dir}-merged") / "config.json").is_file()
    predictions = (run.output_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(predictions) == 24  # every row of the file


def test_a_gguf_base_is_converted_without_lines_of_libraries(fork_server, models, data_dir, tmp_path):
    base = models("gguf", base=models("llama", tokenizer="sentencepiece"))
    flags = {"model_name_or_path": base, "dataset": data_dir / "support.jsonl", "output_dir": tmp_path / "out"}
    flags |= {"cache_dir": tmp_path / "cache", "max_steps": 1, "disable_tqdm": True}
    run = fork_server.start([f"--{name}={value}" for name, value in flags.items()], tmp_path / "log")
    assert run.wait() == 0 and "dequantising" in run.text()
    assert not re.search(r"it/s|\d%\||\[transformers\]|Warning", run.text()), run.text()


@pytest.mark.parametrize(
    "flags",
    [
        "--do_eval --do_mmlu_eval",
        "--eval_strategy steps --early_stopping_patience 2",
        "--eval_strategy steps --load_best_model_at_end",
        "--eval_strategy steps --do_mmlu_eval --metric_for_best_model mmlu_eval_accuracy",
        "--do_predict --predict_with_generate --save_strategy no",
        "--eval_strategy steps --lr_scheduler_type reduce_lr_on_plateau",
        "--adapter_name_or_path first --fsdp",
    ],
)
def test_the_next_commands_are_right_whatever_the_flags_were(tmp_path, flags):
    config = qlora.parse_config(["--output_dir", str(tmp_path), *flags.split()])
    record = {"flags": config.flags, "derived": {"given": sorted(config.explicitly_set)}}
    (tmp_path / "run.json").write_text(json.dumps(record, default=str))
    _, *commands = qlora.next_commands(config).values()
    assert len(commands) == 2
    for command in commands:
        again = qlora.parse_config(shlex.split(command)[2:])
        assert not (again.training.do_train or again.training.do_eval or again.training.fsdp)
        assert not again.model.adapter_name_or_path, "its own adapter, not the one that it started from"


def test_the_last_evaluation_is_done_once(run_qlora, monkeypatch):
    passes, loop = [], qlora.QLoRATrainer.evaluation_loop

    def counted(self, *args, **kwargs):
        passes.append(self.state.global_step)
        return loop(self, *args, **kwargs)

    monkeypatch.setattr(qlora.QLoRATrainer, "evaluation_loop", counted)
    run = run_qlora(eval_strategy="steps", eval_steps=2)
    assert passes == [2, 4]
    assert "eval_loss" not in [line for line in run.stderr.splitlines() if line.startswith("step 4")][-1]
    last = history(run, "eval_loss")[-1]
    assert run.json("eval_results.json") == {name: value for name, value in last.items() if name != "step"}
    assert run_qlora(eval_strategy="steps", eval_steps=2).code == 0 and passes[2:] == [0]  # completed: evaluated anew


def test_without_training_neither_steps_nor_recomputation_are_told(run_qlora, finished_run):
    run = run_qlora(output_dir=finished_run.output_dir, do_train=False, do_eval=True)
    assert run.code == 0 and not re.search(r"steps|epoch|recomputed|Next", run.stderr)
    base = run_qlora(do_train=False, do_eval=True)
    assert "none, the base model alone" in base.stderr


def test_a_run_that_is_destroyed_says_so_and_a_short_one_has_a_line(run_qlora):
    run = run_qlora(max_steps=6, learning_rate=2e4, logging_steps=1)
    assert run.code == 0 and sum("the gradient is zero" in line for line in run.stderr.splitlines()) == 1
    short = run_qlora(max_steps=3, logging_steps=10, overwrite_output_dir=True)
    (line,) = (line for line in short.stderr.splitlines() if line.startswith("step "))
    assert line.startswith("step 3 of 3  loss ")


def test_a_merge_ends_in_a_verdict(run_qlora, tmp_path):
    run = run_qlora(learning_rate=1e-2, merged_output_dir=tmp_path / "merged")
    (line,) = (line for line in run.stderr.splitlines() if "merged model answers" in line)
    assert line.startswith("verified: ") and "merge  " not in run.stderr


# ------------------------------------------------------------------------------------
# Messages
# ------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """No connection to the hub, which has not been noticed yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


def test_without_a_connection_model_and_data_are_one_line_each(offline, run_qlora):
    model = run_qlora(model_name_or_path="maker/model")
    (line,) = model.stderr.splitlines()
    assert model.code == 2 and line.startswith(
        "error: --model_name_or_path maker/model: no such folder, not in the cache"
    )
    adapter = run_qlora(adapter_name_or_path="maker/adapter")
    line = adapter.stderr.splitlines()[-1]
    assert adapter.code == 2 and line.startswith("error: --adapter_name_or_path maker/adapter: no such folder, not in")
    for flags in {"dataset": "alpaca"}, {"dataset": "maker/rows"}, {"eval_dataset": "maker/rows", "do_eval": True}:
        rows = run_qlora(**flags)
        assert rows.code == 2 and "no connection to the hub" in rows.stderr.splitlines()[-1]
        assert "thrown while requesting" not in rows.stderr


def test_a_torn_adapter_config_as_the_base_is_named(run_qlora, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model')
    run = run_qlora(model_name_or_path=tmp_path, output_dir=tmp_path / "out")
    assert run.code == 2 and run.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/adapter_config.json: ")


def test_push_to_hub_is_checked_before_anything_is_loaded(offline, run_qlora):
    run = run_qlora(push_to_hub=True)
    assert run.code == 2 and "trainable params" not in run.stderr and "This run" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: --push_to_hub: ") and "hf auth login" in run.stderr


@pytest.mark.parametrize("suffix", ["csv", "csv.zst"])
def test_a_semicolon_between_columns_is_named(run_qlora, tmp_path, suffix):
    file, content = tmp_path / f"rows.{suffix}", b"input;output\na;b\n"
    file.write_bytes(pyarrow.compress(content, "zstd", asbytes=True) if suffix.endswith("zst") else content)
    run = run_qlora(dataset=file)
    assert run.code == 2 and f"{file}: columns are separated by ';', expected ','" in run.stderr


def test_unknown_columns_name_the_nearest_formats_first_and_ways_out(run_qlora, tmp_path):
    run = run_qlora(dataset=tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"prompts": "a", "completions": "b"}]))
    assert run.code == 2 and "the nearest need prompt, completion (self-instruct) or " in run.stderr
    assert "--columns" in run.stderr and "path.py:function" in run.stderr and len(run.stderr) < 500


def test_a_full_disk_is_called_so_whatever_the_library_says(tmp_path):
    for text in ("[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 3", "No space left on device"):
        expected = pytest.raises(qlora.ConfigError, match=r"not saved: No space left on device\. What")
        with expected, qlora.atomic_save(tmp_path / "staging", tmp_path):
            raise RuntimeError(text)


# ------------------------------------------------------------------------------------
# Preferences
# ------------------------------------------------------------------------------------
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "Q: ", "chosen": "A"}, [("Q: ", False), ("A", True)]),
        ({"prompt": "Q: ", "chosen": "Q: A"}, [("", False), ("Q: A", True)]),
        ({"prompt": None, "chosen": "A"}, [("", False), ("A", True)]),
        ({"prompt": "Q", "chosen": TURNS}, ["Q", "A"]),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:]}, ["Q", "A"]),
        ({"prompt": TURNS[:1], "chosen": TURNS}, ["Q", "A"]),
        ({"prompt": "another", "chosen": TURNS}, ["Q", "A"]),
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": None}, [("Hi", False), ("Hi there", True)]),
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}, [("Hi", False), ("Hi there", True)]),
        ({"prompt": "Say it.", "chosen": "Say it. A", "rejected": None}, [("", False), ("Say it. A", True)]),
        ({"prompt": "写诗。", "chosen": "写诗。春", "rejected": "写诗。不"}, [("", False), ("写诗。春", True)]),
    ],
)
def test_the_prompt_of_a_preference_is_its_input(row, parts):
    parsed = qlora.FORMATS["hh-rlhf"].parse({"rejected": "no", **row})
    if isinstance(parsed, qlora.Conversation):
        assert [message["content"] for message in parsed.messages] == parts and parsed.answers == [1]
        assert parsed.left_out == ["a prompt beside a chat"] * (row["prompt"] == "another")
    else:
        assert [(part["text"], part["supervised"]) for part in parsed] == parts


def test_preferences_are_said_to_be_fine_tuning_on_the_chosen_answers(caplog):
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with caplog.at_level("INFO", "qlora"):
        assert qlora.choose_format("x", qlora.RowSource("x", loaded=rows), qlora.parse_config([])).format == "hh-rlhf"
    assert sum("fine-tuning on the chosen answers" in message for message in caplog.messages) == 1


# ------------------------------------------------------------------------------------
# On a CPU
# ------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_recomputed_where_memory_is_free(run_qlora, tmp_path, monkeypatch):
    for free, layers in ((2**40, 0), (2**20, 2)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        run = run_qlora(max_steps=1, output_dir=tmp_path / str(free))
        assert run.code == 0 and f"{layers} layers recomputed" in run.stderr
    whole = json.loads((tmp_path / str(2**40) / "trainer_state.json").read_text())["log_history"][0]
    again = json.loads((tmp_path / str(2**20) / "trainer_state.json").read_text())["log_history"][0]
    assert whole["loss"] == again["loss"] and torch.isclose(
        *map(torch.tensor, (whole["grad_norm"], again["grad_norm"]))
    )
