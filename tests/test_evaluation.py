"""Perplexity, predictions and MMLU, each against a plain loop of transformers and peft alone."""

import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaModel

import qlora

EVAL_ROWS = [
    {"input": "Who wrote the green book?", "output": "The keeper of the lighthouse."},
    {"input": "Ships?", "output": "The North Star and the Patience."},
    {"input": "", "output": "The lamp stands in a large lens."},
    {"input": "Which ship carried the oranges from the harbour?", "output": "The Little Anna, I am sure."},
]
PREDICT = {"do_predict": True, "predict_with_generate": True}


@pytest.fixture
def folder(tmp_path):
    """Training rows and known evaluation rows, in files named after the splits."""
    (tmp_path / "data").mkdir()
    tiny.rows_to_jsonl(tmp_path / "data/train.jsonl", tiny.support_rows(8))
    tiny.rows_to_jsonl(tmp_path / "data/eval.jsonl", EVAL_ROWS)
    return tmp_path / "data"


def plain_model(base: Path, adapter: Path | None = None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def predictions(run) -> list[dict]:
    lines = (run.output_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def greedy(model, prompt: list[int], count: int, eos: int = tiny.EOS) -> list[int]:
    """One token after the other, without padding and without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def text_of(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_eval_loss_and_perplexity_equal_a_plain_loop(run_qlora, models, folder, batch):
    """16 supervised tokens in each row, so that every way to take the mean gives one number."""
    flags = {"bits": 16, "source_max_len": 60, "target_max_len": 16, "learning_rate": 1e-2}
    run = run_qlora(dataset=folder, do_eval=True, per_device_eval_batch_size=batch, **flags)
    model = plain_model(models("llama"), run.output_dir)
    losses = []
    for row in EVAL_ROWS:
        source, target = [tiny.BOS, *row["input"].encode()], list(row["output"].encode()[:16])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source + target])).logits[0]
        losses.append(F.cross_entropy(logits[len(source) - 1 : -1], torch.tensor(target)))
    expected = torch.stack(losses).mean().item()
    metrics = run.json("metrics.json")
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert run.json("eval_results.json")["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize("train", [True, False])
def test_eval_batch_size_is_independent_of_the_training_batch(run_qlora, folder, monkeypatch, train):
    """Whatever the training's micro-batches are, of one row here."""
    evaluated, make = [], qlora.QLoRATrainer.tensors

    def noted(trainer, window, members):
        evaluated.extend([] if torch.is_grad_enabled() else [len(members)])
        return make(trainer, window, members)

    monkeypatch.setattr(qlora.QLoRATrainer, "tensors", noted)
    flags = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 3, "max_steps": 1, "save_strategy": "no"}
    run_qlora(dataset=folder, do_train=train, do_eval=True, **flags)
    assert evaluated == [3, len(EVAL_ROWS) - 3]


# ------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_equal_a_plain_loop_with_the_trained_adapter(run_qlora, models, folder, batch):
    run = run_qlora(
        dataset=folder,
        bits=16,
        learning_rate=2e-2,
        max_steps=6,
        max_new_tokens=12,
        source_max_len=60,
        per_device_eval_batch_size=batch,
        **PREDICT,
    )
    rows = predictions(run)
    assert [set(row) for row in rows] == [{"input", "output", "prediction", "prediction_with_input"}] * 4
    assert [{"input": r["input"], "output": r["output"]} for r in rows] == EVAL_ROWS
    model = plain_model(models("llama"), run.output_dir)
    prompts = [[tiny.BOS, *row["input"].encode()] for row in EVAL_ROWS]
    answers = [text_of(greedy(model, prompt, 12)) for prompt in prompts]
    assert [row["prediction"] for row in rows] == answers
    base = plain_model(models("llama"))
    assert answers != [text_of(greedy(base, prompt, 12)) for prompt in prompts]
    assert run.json("predict_results.json")["predict_samples"] == 4
    assert str(run.output_dir) in next(x for x in run.stderr.splitlines() if x.startswith("evaluating"))


def test_trained_answer_stops_at_eos_and_comes_without_its_prompt(run_qlora, tmp_path):
    """Trained and predicted in one run, then predicted alone: the prompt holds what looks special."""
    row = {"input": "  a </s> b<pad>", "output": " yo </s> <s>!"}
    (tmp_path / "data").mkdir()
    for split in ("train", "eval"):
        tiny.rows_to_jsonl(tmp_path / f"data/{split}.jsonl", [row] * 2)
    flags = {"dataset": tmp_path / "data", "max_new_tokens": 40, "max_steps": 40, **PREDICT}
    run = run_qlora(learning_rate=2e-2, save_steps=40, **flags)
    assert run.json("train_results.json")["train_loss"] < 2
    expected = {"prediction": row["output"], "prediction_with_input": row["input"] + row["output"]}
    assert predictions(run) == [row | expected] * 2
    (run.output_dir / "predictions.jsonl").unlink()
    again = run_qlora(do_train=False, **flags)
    assert predictions(again) == [row | expected] * 2
    assert str(again.output_dir) in next(x for x in again.stderr.splitlines() if x.startswith("evaluating"))


@pytest.mark.parametrize("bits", [4, 16])
def test_without_an_adapter_the_base_predicts_and_the_log_says_so(run_qlora, models, folder, bits):
    """The Trainer itself refuses a quantised base without adapters."""
    run = run_qlora(
        dataset=folder, bits=bits, do_train=False, do_eval=True, max_new_tokens=6, source_max_len=60, **PREDICT
    )
    assert run.code == 0 and "base model" in run.stderr
    assert not (run.output_dir / "completed").exists()
    assert "eval_loss" in run.json("metrics.json")
    if bits == 16:
        base = plain_model(models("llama"))
        prompts = [[tiny.BOS, *row["input"].encode()] for row in EVAL_ROWS]
        assert [r["prediction"] for r in predictions(run)] == [text_of(greedy(base, p, 6)) for p in prompts]


def test_an_adapter_named_by_a_flag_predicts(run_qlora, folder, tmp_path):
    flags = {"dataset": folder, "bits": 16, "max_new_tokens": 8, **PREDICT}
    trained = run_qlora(learning_rate=2e-2, max_steps=6, **flags)
    other = run_qlora(do_train=False, adapter_name_or_path=trained.output_dir, output_dir=tmp_path / "other", **flags)
    assert predictions(other) == predictions(trained)
    assert "base model" not in other.stderr


def test_long_prompts_are_cut_as_in_training(run_qlora, models, folder):
    run = run_qlora(dataset=folder, bits=16, do_train=False, source_max_len=10, max_new_tokens=5, **PREDICT)
    base = plain_model(models("llama"))
    prompts = [[tiny.BOS, *row["input"].encode()][:10] for row in EVAL_ROWS]
    assert [r["prediction"] for r in predictions(run)] == [text_of(greedy(base, p, 5)) for p in prompts]


GENERATION = {"dataset": None, "bits": 16, "do_train": False, "max_new_tokens": 8, "source_max_len": 60}


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 3, "length_penalty": 0.2},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-6, "temperature": 0.5},
    ],
    ids=str,
)
def test_generation_flags_reach_generate(run_qlora, models, folder, values):
    """Sampling among one token is greedy; the others are compared with generate on one row."""
    run = run_qlora(**GENERATION | {"dataset": folder}, **PREDICT, **values)
    base = plain_model(models("llama"))
    asked = {} if "do_sample" in values else values
    expected = []
    for row in EVAL_ROWS:
        prompt = torch.tensor([[tiny.BOS, *row["input"].encode()]])
        ids = base.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=tiny.PAD, **asked
        )
        expected.append(text_of(ids[0, prompt.shape[1] :].tolist()))
    assert [row["prediction"] for row in predictions(run)] == expected


def test_sampling_values_without_sampling_are_ignored(run_qlora, folder, tmp_path):
    flags = {"dataset": folder, "max_new_tokens": 4, **PREDICT}
    plain = run_qlora(**flags)
    told = run_qlora(**flags, top_p=0.9, temperature=0.3, top_k=3, output_dir=tmp_path / "told")
    assert told.code == 0
    assert predictions(told) == predictions(plain)


def test_only_values_that_were_set_are_passed_on(run_qlora, folder, monkeypatch):
    """And ids for BOS, EOS and padding, which flags alone would not give."""
    seen = []
    generate = GenerationMixin.generate

    def spy(self, *args, **kwargs):
        seen.append(kwargs["generation_config"])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    run_qlora(**GENERATION | {"dataset": folder, "max_new_tokens": None, "max_eval_samples": 1}, **PREDICT)
    chosen = seen[-1]  # the first look for padding that is taken for text
    assert chosen.max_new_tokens == 256
    ids = {chosen.bos_token_id, chosen.pad_token_id, *chosen.eos_token_id}
    assert ids == {tiny.BOS, tiny.PAD, tiny.EOS}
    for name in ("temperature", "top_k", "top_p", "typical_p", "num_beams", "length_penalty"):
        assert getattr(chosen, name) in (None, getattr(type(chosen)(), name)), name


def test_every_batch_stops_at_the_models_own_stop_tokens(run_qlora, models, folder, tmp_path, monkeypatch):
    """Llama 3 has several, which its generation_config.json lists."""
    shutil.copytree(models("llama"), tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [tiny.EOS, 65]}))
    seen, generate = [], GenerationMixin.generate

    def spy(self, *args, **kwargs):
        seen.append({*kwargs["generation_config"].eos_token_id})
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    flags = {"model_name_or_path": tmp_path / "model", "dataset": folder, "per_device_eval_batch_size": 1}
    assert run_qlora(**flags, max_steps=1, max_new_tokens=2, **PREDICT).code == 0
    assert len(seen) > 1 and seen == [{tiny.EOS, 65}] * len(seen)


def test_sampling_defaults_of_the_model_are_ignored(run_qlora, models, folder, tmp_path):
    """As published LLaMA-2 folders have it: temperature and top_p beside do_sample false."""
    shutil.copytree(models("llama"), tmp_path / "model")
    own = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": tiny.EOS}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(own))
    flags = {"dataset": folder, "bits": 16, "full_finetune": True, "max_new_tokens": 4, **PREDICT}
    own_defaults = run_qlora(model_name_or_path=tmp_path / "model", **flags)
    plain = run_qlora(output_dir=tmp_path / "plain", **flags)
    assert own_defaults.code == plain.code == 0
    assert predictions(own_defaults) == predictions(plain)


def test_removed_generation_modes_are_refused_in_one_line(run_qlora, folder):
    run = run_qlora(**GENERATION | {"dataset": folder}, **PREDICT, penalty_alpha=0.6, top_k=4)
    assert run.code in (0, 2) and "Traceback" not in run.stderr
    assert (run.code == 2) == ("error: " in run.stderr)


# ------------------------------------------------------------------------------------
# MMLU
# ------------------------------------------------------------------------------------

HEAD = "The following are multiple choice questions (with answers) about  {}.\n\n"
SUBJECTS = ["knots", "knots", "tides", "knots", "fog", "tides", "knots"]
QUESTIONS = [
    HEAD.format(subject) + f"Question {i}{' or so' * i}?\nA. {i}\nB. {i + 1}\nC. none\nD. many\nAnswer:"
    for i, subject in enumerate(SUBJECTS)
]


@torch.no_grad()
def plain_mmlu(model, tokenizer, prompts: list[str], longest: int = 10_000, bos: int = tiny.BOS):
    """For each prompt: the logits of A to D where the letter is due, and those that follow the letter."""
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"]
    shared = 0
    while len({tuple(ids[: shared + 1]) for ids in letters}) == 1:
        shared += 1
    rows = []
    for prompt in prompts:
        ids = [bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = ids if len(ids) <= longest else [bos, *ids[len(ids) - longest + 1 :]]
        ids += letters[0][:shared]
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        rows.append((ids, torch.stack([logits[letter[shared]] for letter in letters]), logits))
    return rows


def write_mmlu(folder: Path, answers: list[int], name: str = "zero_shot_mmlu_val.json") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"subject": subject, "input": prompt, "output": "ABCD"[answer]}
        for subject, prompt, answer in zip(SUBJECTS, QUESTIONS, answers, strict=True)
    ]
    tiny.rows_to_jsonl(folder / name, rows)
    return folder


# How many of a subject's questions are answered rightly: knots 3 of 4, tides 1 of 2, fog 0 of 1.
RIGHT = [True, False, True, True, False, False, True]
ACCURACY = {"knots": 3 / 4, "tides": 1 / 2, "fog": 0.0}
MMLU = {"do_mmlu_eval": True, "do_eval": True, "mmlu_dataset": "mmlu-zs", "bits": 16}


def write_spaced(path: Path) -> Path:
    """Bytes, but every text begins with a space: a letter is two tokens, and the first says nothing."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(path)
    return path


def test_mmlu_of_a_model_that_reads_padding_takes_one_prompt_at_a_time(run_qlora, folder, tmp_path, monkeypatch):
    sizes, padded_batch = [], qlora.padded_batch

    def spy(step, members, *args):
        sizes.append(len(members))
        return padded_batch(step, members, *args)

    monkeypatch.setattr(qlora, "choose_fast_path", lambda model, base, fast, *_: fast._replace(alone=True))
    monkeypatch.setattr(qlora, "padded_batch", spy)
    data = tiny.rows_to_jsonl(tmp_path / "one.jsonl", [{"input": "a", "output": "b"}])
    flags = MMLU | {"do_train": False, "per_device_eval_batch_size": 3, "eval_dataset": data}
    run = run_qlora(dataset=folder, mmlu_dir=write_mmlu(tmp_path / "mmlu", [0] * 7), **flags)
    assert run.code == 0 and sizes == [1] * 8


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("tokenizer", "bos", "longest"),
    [("byte", tiny.BOS, 2048), ("byte", tiny.BOS, 31), ("byte_bpe", 508, 2048), (write_spaced, tiny.BOS, 2048)],
)
def test_mmlu_equals_a_plain_loop(run_qlora, models, folder, tmp_path, batch, tokenizer, bos, longest):
    """The answers are chosen so that the accuracies are known; the mean is over the subjects."""
    base = models("llama", tokenizer=tokenizer, max_position_embeddings=1024)
    words, model = AutoTokenizer.from_pretrained(base), plain_model(base)
    letters = words(list("ABCD"), add_special_tokens=False)["input_ids"]
    assert all(len(ids) == (2 if tokenizer == write_spaced else 1) for ids in letters)
    rows = plain_mmlu(model, words, QUESTIONS, longest, bos)
    choices = [int(four.argmax()) for _, four, _ in rows]
    answers = [c if right else (c + 1) % 4 for c, right in zip(choices, RIGHT, strict=True)]
    run = run_qlora(
        model_name_or_path=base,
        dataset=folder,
        do_train=False,
        mmlu_dir=write_mmlu(tmp_path / "mmlu", answers),
        mmlu_source_max_len=longest,
        per_device_eval_batch_size=batch,
        **MMLU,
    )
    metrics = run.json("metrics.json")
    subjects = {f"mmlu_eval_accuracy_{name}": value for name, value in ACCURACY.items()}
    assert {name: metrics[name] for name in subjects} == subjects
    assert metrics["mmlu_eval_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert "mmlu_eval_accuracy" in run.stderr
    if tokenizer != write_spaced:  # a letter is one token: its loss and that of the EOS after it
        losses = []
        for (ids, _, logits), answer in zip(rows, answers, strict=True):
            letter = words("ABCD"[answer], add_special_tokens=False)["input_ids"][0]
            with torch.no_grad():
                after = model(input_ids=torch.tensor([[*ids, letter]])).logits[0, -1]
            target = torch.tensor([letter, words.eos_token_id])
            losses.append(F.cross_entropy(torch.stack([logits, after]), target).item())
        assert metrics["mmlu_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_mmlu_where_letters_share_their_first_token(run_qlora, models, folder, tmp_path):
    """▁A is one token, B, C and D begin alike with ▁. The model says ▁ and then D, wherever it is asked."""
    shutil.copytree(models("llama", tokenizer="sentencepiece"), tmp_path / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    a, *others = (words(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD")
    assert len(a) == 1 and [ids[:-1] for ids in others] == [others[0][:1]] * 3
    tensors = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
            tensor.zero_()
        elif name.endswith(("embed_tokens.weight", "model.norm.weight")):
            tensor.fill_(1.0)
    tensors["lm_head.weight"][others[2][0]] = 3.0
    tensors["lm_head.weight"][others[2][1]] = 2.0
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    run = run_qlora(
        model_name_or_path=tmp_path / "model",
        dataset=folder,
        do_train=False,
        mmlu_dir=write_mmlu(tmp_path / "mmlu", [3] * 7),
        **MMLU,
    )
    assert run.json("metrics.json")["mmlu_eval_accuracy"] == 1.0


def test_mmlu_prompts_are_longer_than_what_a_model_looks_back(run_qlora, models, folder, tmp_path):
    """OLMoE's window is in its mask alone; the limits of training rows are below it, those of questions above."""
    base, mmlu = models("olmoe", sliding_window=40), write_mmlu(tmp_path / "mmlu", [0] * 7)
    flags = {"model_name_or_path": base, "dataset": folder, "source_max_len": 16, "target_max_len": 16, "bits": 32}
    fast, slow = (
        run_qlora(**MMLU | flags, do_train=False, mmlu_dir=mmlu, fast_path=fast_path, per_device_eval_batch_size=3)
        for fast_path in (True, False)
    )
    losses = [run.json("metrics.json")["mmlu_loss"] for run in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_mmlu_at_each_evaluation_of_a_training_run(run_qlora, folder, tmp_path):
    run = run_qlora(
        dataset=folder,
        eval_strategy="steps",
        eval_steps=2,
        mmlu_dir=write_mmlu(tmp_path / "mmlu", [0] * 7),
        max_mmlu_samples=3,
        **MMLU,
    )
    log = run.json("trainer_state.json")["log_history"]
    assert [x["step"] for x in log if "mmlu_eval_accuracy" in x][:2] == [2, 4]
    metrics = run.json("metrics.json")
    assert {"mmlu_loss", "mmlu_eval_accuracy", "eval_loss", "train_loss"} <= set(metrics)
    subjects = {name for name in metrics if name.startswith("mmlu_eval_accuracy_")}
    assert subjects == {"mmlu_eval_accuracy_knots", "mmlu_eval_accuracy_tides"}  # of the first three


def load(tmp_path, *words):
    common = ["--do_mmlu_eval", "--do_eval", "--output_dir", str(tmp_path / "out")]
    return qlora.load_questions(qlora.parse_config([*common, *words]))


@pytest.mark.parametrize(
    ("dataset", "split", "file"),
    [
        ("mmlu-zs", "eval", "zero_shot_mmlu_val.json"),
        ("mmlu-zs", "test", "zero_shot_mmlu_test.json"),
        ("mmlu-fs", "eval", "five_shot_mmlu_val.json"),
        ("mmlu", "test", "five_shot_mmlu_test.json"),
    ],
)
def test_question_file_follows_the_flags(tmp_path, dataset, split, file):
    write_mmlu(tmp_path / "mmlu", [3, 2, 1, 0, 0, 0, 0], file)
    flags = ["--mmlu_dir", str(tmp_path / "mmlu"), "--mmlu_dataset", dataset, "--mmlu_split", split]
    questions = load(tmp_path, *flags, "--max_mmlu_samples", "2")
    assert [tuple(q) for q in questions] == [("knots", QUESTIONS[0], 3), ("knots", QUESTIONS[1], 2)]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (None, "zero_shot_mmlu_val.json"),
        ("{", "zero_shot_mmlu_val.json:2"),
        ('{"subject": "fog", "input": "?"}', "output"),
        ('{"subject": "fog", "input": "?", "output": "E"}', "A, B, C"),
        ('{"input": "?", "output": "A"}', "subject"),
    ],
)
def test_invalid_question_file_is_an_error_before_loading(run_qlora, folder, tmp_path, line, named):
    write_mmlu(tmp_path / "mmlu", [0] * 7, "other.json")
    if line:
        good = '{"subject": "fog", "input": "?", "output": "A"}'
        (tmp_path / "mmlu/zero_shot_mmlu_val.json").write_text(f"{good}\n{line}\n")
    run = run_qlora(dataset=folder, do_train=False, mmlu_dir=tmp_path / "mmlu", **MMLU)
    assert run.code == 2 and "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and named in last
    assert "trainable params" not in run.stderr


def hub_rows(subject: str, count: int) -> list[dict]:
    return [
        {
            "question": f"{subject} {i}?",
            "subject": subject,
            "choices": [f"{subject[0]}{i}{x}" for x in "wxyz"],
            "answer": i % 4,
        }
        for i in range(count)
    ]


@pytest.fixture
def hub(monkeypatch):
    """What the hub would give for cais/mmlu: two subjects, five worked examples each."""
    asked = []

    def load_dataset(path, *args, **kwargs):
        asked.append((path, args, kwargs.get("name")))
        both = ("sea_law", "fog")
        return datasets.DatasetDict(
            dev=datasets.Dataset.from_list([row for s in both for row in hub_rows(s, 5)]),
            validation=datasets.Dataset.from_list([row for s in both for row in hub_rows(s, 7)[5:]]),
            test=datasets.Dataset.from_list(hub_rows("fog", 8)[7:]),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_questions_from_the_hub_are_written_as_published(hub, tmp_path):
    absent = ["--mmlu_dir", str(tmp_path / "absent")]
    zero = load(tmp_path, *absent, "--mmlu_dataset", "mmlu-zs")
    head = "The following are multiple choice questions (with answers) about  sea law.\n\n"
    sixth = "sea_law 5?\nA. s5w\nB. s5x\nC. s5y\nD. s5z\nAnswer:"
    assert tuple(zero[0]) == ("sea_law", head + sixth, 1)
    assert [q.subject for q in zero] == ["sea_law"] * 2 + ["fog"] * 2
    assert hub[0][0] == "cais/mmlu" and "all" in (*hub[0][1], hub[0][2])

    five = load(tmp_path, *absent)
    shots = "".join(
        f"sea_law {i}?\nA. s{i}w\nB. s{i}x\nC. s{i}y\nD. s{i}z\nAnswer: {letter}\n\n"
        for i, letter in enumerate("ABCDA")
    )
    assert five[0].prompt == head + shots + sixth

    test = load(tmp_path, *absent, "--mmlu_split", "test", "--mmlu_dataset", "mmlu-zs")
    assert [(q.subject, q.answer) for q in test] == [("fog", 3)]


def test_predictions_use_the_cache_that_training_turned_off(run_qlora, monkeypatch):
    """With the cache every forward pass but the first sees one token."""
    widths, forward, generate = [], LlamaModel.forward, GenerationMixin.generate

    def spy(self, input_ids=None, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    def generate_alone(self, *args, **kwargs):
        widths.clear()  # of training and its trial
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    monkeypatch.setattr(GenerationMixin, "generate", generate_alone)
    run = run_qlora(
        do_predict=True,
        predict_with_generate=True,
        max_new_tokens=4,
        min_new_tokens=4,
        max_eval_samples=1,
        use_cache=False,
    )
    assert run.code == 0
    assert widths[0] > 1 and widths[1:4] == [1, 1, 1]


# ------------------------------------------------------------------------------------
# Early stopping
# ------------------------------------------------------------------------------------
# At a rate of 0 the first evaluation stays the best: the fourth is the third that is no better.
STUCK = {"early_stopping_patience": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset_size": 4,
         "learning_rate": 0, "save_steps": 1, "max_steps": 8}  # fmt: skip


def test_early_stopping(run_qlora):
    run = run_qlora(**STUCK)
    assert run.code == 0 and "stopped early at step 4 of 8" in run.stderr
    again = run_qlora(**STUCK)
    assert again.code == 0 and "it is used, not trained again" in again.stderr


def test_less_perplexity_is_better(run_qlora):
    flags = STUCK | {
        "learning_rate": 1e-2,
        "early_stopping_patience": 1,
        "load_best_model_at_end": True,
        "max_steps": 4,
    }
    run = run_qlora(**flags, metric_for_best_model="perplexity")
    values = [e["eval_perplexity"] for e in run.json("trainer_state.json")["log_history"] if "eval_perplexity" in e]
    assert run.code == 0 and values == sorted(values, reverse=True) and len(values) == 4
    assert "checkpoint-4" in run.json("trainer_state.json")["best_model_checkpoint"]


def test_the_evaluation_at_the_start_is_not_repeated_on_a_resume(run_qlora):
    """It would count as one that is not better than the checkpoint's own."""
    flags = STUCK | {"learning_rate": 1e-2, "early_stopping_patience": 1, "eval_on_start": True}
    assert run_qlora(**flags | {"max_steps": 2}).code == 0
    run = run_qlora(**flags | {"max_steps": 4})
    steps = [e["step"] for e in run.json("trainer_state.json")["log_history"] if "eval_loss" in e]
    assert run.code == 0 and steps == [0, 1, 2, 3, 4]


def test_more_training_removes_the_predictions_of_the_weights_before(run_qlora, tmp_path):
    rows = tiny.rows_to_jsonl(tmp_path / "eval.jsonl", tiny.support_rows(2))
    flags = {"eval_dataset": rows, "save_steps": 1}
    run = run_qlora(max_steps=1, do_eval=True, do_predict=True, predict_with_generate=True, max_new_tokens=1, **flags)
    names = ("predictions.jsonl", "predict_results.json", "eval_results.json")
    assert all((run.output_dir / name).is_file() for name in names)
    run = run_qlora(max_steps=2, **flags)
    assert run.code == 0 and not any((run.output_dir / name).exists() for name in names)


def test_early_stopping_goes_on_with_more_patience(run_qlora, tmp_path):
    """As if it had been that from the start; more steps alone are none that would be trained."""
    flags = STUCK | {"learning_rate": 1e-2, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    straight = run_qlora(**flags | {"early_stopping_patience": 5}, output_dir=tmp_path / "straight")
    run_qlora(**flags)
    for same in (flags, flags | {"max_steps": 9}, flags | {"early_stopping_patience": 2}):
        again = run_qlora(**same)
        stopped = "completed run of 4 steps, stopped early (a larger --early_stopping_patience goes on)"
        assert again.code == 0 and stopped in again.stderr and "resuming from" not in again.stderr
    more = run_qlora(**flags | {"early_stopping_patience": 5})
    assert "early_stopping_patience was 3, is 5: applies at once" in more.stderr
    assert [done.json("completed")["stopped_at"] for done in (straight, more)] == [6, 6]
    files = [(done.output_dir / "adapter_model.safetensors").read_bytes() for done in (straight, more)]
    assert files[0] == files[1]
    none = run_qlora(**flags | {"early_stopping_patience": None})
    assert none.json("completed")["step"] == 8 and "stopped_at" not in none.json("completed")


def test_more_patience_without_a_checkpoint_to_go_on_from(run_qlora):
    flags = STUCK | {"save_strategy": "no", "save_steps": None}
    run_qlora(**flags)
    more = run_qlora(**flags | {"early_stopping_patience": 5})
    assert more.code == 2 and "no checkpoint of it is resumed; pass another folder, or --overw" in more.stderr


def test_early_stopping_counts_over_a_resume(run_qlora, tmp_path):
    straight = run_qlora(**STUCK, output_dir=tmp_path / "straight")
    assert run_qlora(**STUCK | {"max_steps": 2}).code == 0
    resumed = run_qlora(**STUCK)
    assert [done.json("completed")["stopped_at"] for done in (straight, resumed)] == [4, 4]


def test_early_stopping_that_begins_with_a_resume(run_qlora):
    """The first evaluation that it sees, of step 3, is the best: the third after it is one too many."""
    assert run_qlora(**STUCK | {"early_stopping_patience": None, "max_steps": 2}).code == 0
    run = run_qlora(**STUCK)
    assert run.code == 0 and "stopped early at step 6 of 8" in run.stderr


@pytest.mark.parametrize(
    "flags", [{"eval_strategy": "no"}, {"do_mmlu_eval": True, "metric_for_best_model": "mmlu_loss"}]
)
def test_early_stopping_needs_evaluations(run_qlora, flags):
    run = run_qlora(**STUCK | flags)
    assert run.code == 2 and "--early_stopping_patience needs --eval_strategy" in run.stderr


def test_early_stopping_of_less_than_one(run_qlora):
    assert (
        "--early_stopping_patience 0: expected at least 1" in run_qlora(**STUCK | {"early_stopping_patience": 0}).stderr
    )


def test_rows_are_held_out_only_of_what_was_trained_on(run_qlora, data_dir, tmp_path):
    """Of 24 rows a tenth, 2, of the dataset that was trained on, however it is written; every row of another one."""
    predict = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 1}
    assert run_qlora(max_steps=1, do_eval=True).code == 0
    for same in (data_dir / "support.jsonl", f"{data_dir}/../{data_dir.name}/support.jsonl"):
        run = run_qlora(**predict, dataset=same)
        assert len((run.output_dir / "predictions.jsonl").read_text().splitlines()) == 2
    other = shutil.copy(data_dir / "support.jsonl", tmp_path / "test_questions.jsonl")
    assert len((run_qlora(**predict, dataset=other).output_dir / "predictions.jsonl").read_text().splitlines()) == 24


def test_a_run_json_of_another_program_is_no_record(run_qlora, tmp_path):
    (tmp_path / "run.json").write_text('{"name": "another program"}')
    assert run_qlora(do_train=False, do_eval=True, output_dir=tmp_path / "out").code == 0


def test_a_training_run_does_not_read_the_record_that_it_replaces(run_qlora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"flags": ')
    flags = {"max_steps": 1, "do_eval": True, "do_predict": False, "overwrite_output_dir": True}
    run = run_qlora(**flags, output_dir=tmp_path / "out")
    assert run.code == 0, run.stderr


@pytest.mark.parametrize(
    ("trained", "then", "warned"),
    [
        ({"do_eval": False}, {}, True),
        ({"do_eval": False}, {"eval_dataset_size": 5}, True),
        ({"eval_dataset_size": 5}, {"eval_dataset_size": 5}, False),
        ({"eval_dataset_size": 5}, {"eval_dataset_size": 5, "max_eval_samples": 2}, False),
        ({"eval_dataset_size": 5, "max_eval_samples": 2}, {"eval_dataset_size": 5}, False),
        ({"eval_dataset_size": 5}, {"eval_dataset_size": 9}, True),
        ({"eval_dataset_size": 5}, {}, False),
        ({}, {"eval_dataset_size": 1024}, True),
        ({}, {}, False),
        ({}, {"rows": 30}, True),
        ({"streaming": True, "eval_dataset_size": 5}, {"streaming": True, "eval_dataset_size": 5}, False),
        ({"streaming": True, "eval_dataset_size": 5}, {"eval_dataset_size": 5}, True),
        ({"streaming": True, "do_eval": False}, {"streaming": True, "eval_dataset_size": 5}, True),
        ({"streaming": True, "eval_dataset_size": 5}, {"streaming": True, "max_eval_samples": 2}, False),
    ],
)
def test_rows_that_were_trained_on_are_a_warning(run_qlora, tmp_path, trained, then, warned):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(24))
    flags = {"dataset": file, "do_predict": False}
    assert run_qlora(**flags | {"max_steps": 1, "do_eval": True} | trained).code == 0
    then = dict(then)
    tiny.rows_to_jsonl(file, tiny.support_rows(then.pop("rows", 24)))  # rows that were added change which are held out
    run = run_qlora(**flags | {"do_train": False, "do_eval": True} | then)
    said = f"--dataset {file}: {run.output_dir} was trained on these rows, or some of them"
    assert run.code == 0 and run.stderr.splitlines().count(said) == warned, run.stderr
