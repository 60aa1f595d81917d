"""Masked language models: what is masked, what is supervised, what carries adapters, and what fills a mask."""

import importlib.util
import json
import math

import pytest
import tiny
import tiny_encoders
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import ROOT, commands_in
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    EsmConfig,
    LlamaConfig,
)

import qlora

IGNORE = -100
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "is", "##s", "cold", "[", "]", "sep"]
TEXTS = [line for line in tiny.TEXT.splitlines() if line]
PROTEINS = ["MKTAYIAKQR", "GAVLIPFMW", "STCYNQDEKRH", "MKVLA", "WWCCHHKKRR", "AGAGAGAGTT", "LLLEEERRR", "DEDEDEKK"]


@pytest.fixture(scope="session")
def bert_words() -> BertTokenizer:
    """A BERT tokenizer whose ids can be spelled by hand."""
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture(scope="session")
def esm_tokenizer(models):
    return AutoTokenizer.from_pretrained(models("encoder", family="esm"))


@pytest.fixture
def run_masked(run_qlora, models, tmp_path):
    """`run_masked("bert", bits=8)`: as run_qlora, on the family's model and rows of its kind."""

    def run(family: str, texts=None, column: str = "text", **flags):
        texts = texts or (PROTEINS if family == "esm" else TEXTS[:12])
        file = tiny.rows_to_jsonl(tmp_path / f"{family}.jsonl", [{column: text} for text in texts])
        defaults = {"target_max_len": None, "source_max_len": 48, "dataset": file}
        return run_qlora(model_name_or_path=models("encoder", family=family), **{**defaults, **flags})

    return run


def error_of(run) -> str:
    assert run.code == 2 and "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    return line


def masking(**shares: float) -> qlora.Masking:
    values = {"chosen": 0.15, "replaced": 0.8, "random": 0.1, **shares}
    return qlora.Masking(**values, mask_id=4, words=torch.arange(10, 60))


# ------------------------------------------------------------------------------------
# Encoding
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "ids", "learnable"),
    [
        ("the sea is cold", 9, [2, 5, 6, 7, 9, 3], [5, 6, 7, 9]),
        ("the seas", 9, [2, 5, 6, 8, 3], [5, 6, 8]),
        ("the sea is cold", 6, [2, 5, 6, 7, 9, 3], [5, 6, 7, 9]),  # fits exactly
        ("the sea is cold", 4, [2, 5, 6, 3], [5, 6]),  # cut before [SEP]
        ("the [MASK] is cold", 9, [2, 5, 4, 7, 9, 3], [5, 7, 9]),  # a mask is one, and nothing to learn
        ("the [SEP] sea", 9, [2, 5, 10, 12, 11, 6, 3], [5, 10, 12, 11, 6]),  # text stays text
        ("", 9, [2, 3], []),
    ],
)
def test_special_tokens_are_added_and_never_supervised(bert_words, text, limit, ids, learnable):
    row = qlora.encode_masked(text, bert_words, qlora.Limits(limit, 0))
    labels = row["labels"]
    assert row["input_ids"] == ids
    assert [label for label in labels if label != IGNORE] == learnable
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    assert labels[0] == labels[-1] == IGNORE
    assert row["cut"] == (limit == 4)


def test_a_protein_is_one_token_for_each_letter(esm_tokenizer):
    row = qlora.encode_masked("MK<mask>L", esm_tokenizer, qlora.Limits(9, 0))
    assert row["input_ids"] == [0, 20, 15, 32, 4, 2]  # ESM-1b's published ids
    assert row["labels"] == [IGNORE, 20, 15, IGNORE, 4, IGNORE]


def test_a_batch_is_padded_to_its_longest_row_and_keeps_every_label():
    rows = [{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}, {"input_ids": [6], "labels": [6]}]
    window = qlora.collate_step(rows, masked=True)["step"]
    batch = qlora.padded_batch(window, [0, 1], pad_id=0, side="right")
    assert batch["input_ids"].tolist() == [[7, 8, 9], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["positions"].tolist() == [0, 1, 2, 3] and batch["targets"].tolist() == [7, 8, 9, 6]


@pytest.mark.parametrize("column", ["input", "text"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, kind, column):
    rows = [{"id": i, column: text} for i, text in enumerate(PROTEINS)]
    file = tmp_path / f"rows.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        tiny.rows_to_jsonl(file, rows)
    elif kind == "parquet":
        tiny.rows_to_parquet(file, rows)
    else:
        tiny.rows_to_csv(file, rows, "\t" if kind == "tsv" else ",")
    splits = qlora.load_splits(qlora.parse_config(["--dataset", str(file), "--objective", "mlm"]))
    assert [row[-1]["text"] for row in splits.train["segments"]] == PROTEINS


@pytest.mark.parametrize(
    ("row", "flags", "text"),
    [
        ({"input": "A", "output": "B"}, [], "A"),
        ({"input": "A", "text": "B"}, [], "A"),  # the first of the two names
        ({"input": "A", "text": "B"}, ["--dataset_format", "text"], "B"),
        ({"instruction": "I", "output": "O", "text": "T"}, [], "T"),  # Alpaca's rows have a text too
    ],
)
def test_the_column_that_is_read(tmp_path, row, flags, text):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row])
    config = qlora.parse_config(["--dataset", str(file), "--objective", "mlm", *flags])
    assert qlora.load_splits(config).train["segments"][0][-1]["text"] == text


def test_rows_without_such_a_column_are_refused(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"sequence": "MKV"}])
    with pytest.raises(qlora.ConfigError, match=r"sequence.*text .text. or input .input.*--columns") as caught:
        qlora.load_splits(qlora.parse_config(["--dataset", str(file), "--objective", "mlm"]))
    assert "path.py" not in str(caught.value), "which no masked model takes"


# ------------------------------------------------------------------------------------
# Masking
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "replaced", "random"), [(0.15, 0.8, 0.1), (0.15, 1.0, 0.0), (1.0, 0.5, 0.5), (0.4, 0.0, 0.3)]
)
def test_the_shares_of_masked_tokens(chosen, replaced, random):
    ids = torch.full((100, 1000), 99)
    labels = ids.clone()
    labels[:, ::2] = IGNORE
    masked, supervised = masking(chosen=chosen, replaced=replaced, random=random).mask_tokens(ids, labels, 1)
    picked = supervised != IGNORE
    assert (supervised[picked] == 99).all() and not picked[:, ::2].any()
    assert (masked[~picked] == 99).all(), "only what is supervised is changed"
    count = picked.sum().item()
    # 50 000 candidates: four standard deviations
    assert abs(count / 50_000 - chosen) <= 4 * math.sqrt(chosen * (1 - chosen) / 50_000)
    shares = {
        replaced: masked[picked] == 4,
        random: (masked[picked] >= 10) & (masked[picked] < 60),
        1 - replaced - random: masked[picked] == 99,
    }
    if replaced != random:
        for share, found in shares.items():
            assert abs(found.sum().item() / count - share) <= 4 * math.sqrt(max(share * (1 - share), 0) / count) + 1e-9
    assert {4, 99, *range(10, 60)} >= set(masked.unique().tolist())


def test_masks_follow_from_the_seed_alone():
    ids = torch.arange(100, 300).reshape(2, 100)
    draws = []
    for state, step in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(state)  # the global generator plays no part
        draws.append(masking().mask_tokens(ids, ids, "train", step))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][1], draws[2][1])


def test_a_row_to_evaluate_on_has_one_mask_at_least_and_always_the_same():
    rare = masking(chosen=1e-9)
    rows = [list(range(60 + i, 70 + i)) for i in range(20)]
    examples = [{"input_ids": ids, "labels": [IGNORE, *ids[1:-1], IGNORE]} for ids in rows]
    step = qlora.collate_step([*examples, {"input_ids": [2, 3], "labels": [IGNORE, IGNORE]}], masked=True)["step"]
    drawn, again = (rare.mask_step(step, "eval", one=True) for _ in range(2))
    assert torch.equal(drawn.input_ids, again.input_ids) and torch.equal(drawn.labels, again.labels)
    *labels, nothing_to_choose = (labels.tolist() for _, labels in drawn.members())
    places = [[i for i, label in enumerate(row) if label != IGNORE] for row in labels]
    assert all(len(found) == 1 and 0 < found[0] < 9 for found in places) and len({found[0] for found in places}) > 3
    assert nothing_to_choose == [IGNORE, IGNORE]


def test_a_random_token_is_an_ordinary_one_that_the_model_has(esm_tokenizer):
    words = qlora.build_masking(esm_tokenizer, 30, qlora.parse_config(["--objective", "mlm"]).data).words.tolist()
    assert words == list(range(4, 30))  # not <cls> 0, <pad> 1, <eos> 2, <unk> 3, and none from 30 on


# ------------------------------------------------------------------------------------
# Model and adapters
# ------------------------------------------------------------------------------------

LINEAR = {  # of each of two layers
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense",
    "deberta-v2": "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense "
    "intermediate.dense output.dense",
}
HEAD = {
    "bert": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "roberta": {"lm_head.dense", "lm_head.decoder"},
    "deberta-v2": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "esm": {"lm_head.dense", "lm_head.decoder", "esm.contact_head.regression"},
}


def encoder_layers(family: str) -> set[str]:
    prefix = family.removesuffix("-v2")
    layers = LINEAR.get(family, LINEAR["bert"]).split()
    return {f"{prefix}.encoder.layer.{i}.{layer}" for i in range(2) for layer in layers}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", HEAD)
def test_the_encoder_is_quantised_and_adapted_and_the_head_is_neither(run_masked, models, monkeypatch, family, bits):
    kinds, shared = {}, []
    plain = qlora.make_trainable

    def spy(model, *args):
        if model.device.type == "meta":  # of which the plan counts what a layer keeps
            return plain(model, *args)
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        kinds.update({name: type(module).__name__ for name, module in linear.items()})
        shared.append(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
        return plain(model, *args)

    monkeypatch.setattr(qlora, "make_trainable", spy)
    run = run_masked(family, bits=bits, max_steps=2, save_steps=2, learning_rate=1e-2)
    assert run.code == 0 and shared == [True]
    assert kinds.keys() == encoder_layers(family) | HEAD[family]
    expected = {4: "Linear4bit", 8: "Linear8bitLt", 16: "Linear"}[bits]
    assert {kinds[name] for name in encoder_layers(family)} == {expected}
    assert {kinds[name] for name in HEAD[family]} == {"Linear"}
    adapter = load_file(run.output_dir / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter}
    assert adapted == encoder_layers(family)
    assert all(tensor.any() for tensor in adapter.values()), "every adapter has supervised"


def test_the_adapter_is_one_that_peft_loads_alone(run_masked, models):
    run = run_masked("bert", bits=16, learning_rate=1e-2)
    assert json.loads((run.output_dir / "adapter_config.json").read_text())["task_type"] is None
    base = AutoModelForMaskedLM.from_pretrained(models("encoder", family="bert")).eval()
    ids = torch.tensor([[2, 10, 4, 11, 3]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.output_dir).eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-2
    assert "pipeline_tag: fill-mask" in (run.output_dir / "README.md").read_text()


MLP = ("intermediate.dense", "output.dense")
ATTENTION = ("attention.output.dense", "self.query", "self.key", "self.value")
OF_DEBERTA = ("attention.output.dense", "self.query_proj", "self.key_proj", "self.value_proj")


@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", ATTENTION), ("roberta", ATTENTION), ("deberta-v2", OF_DEBERTA), ("esm", ATTENTION)],
)
@pytest.mark.parametrize("group", ["attn", "mlp"])
def test_the_groups_of_layers(models, family, attention, group):
    config = qlora.parse_config(["--lora_modules", group])
    model = AutoModelForMaskedLM.from_pretrained(models("encoder", family=family))
    adapted = qlora.get_peft_model(model, qlora.lora_config(model, config.lora, masked=True))
    found = {
        name.split(".lora_A")[0].partition("layer.")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    leaves = MLP if group == "mlp" else tuple(f"attention.{n}" if n.startswith("self") else n for n in attention)
    assert found == {f"{layer}.{leaf}" for layer in range(2) for leaf in leaves}


def test_a_merge_onto_what_training_saw_leaves_the_head_as_published(models, tmp_path):
    """Training quantises the encoder alone."""
    folder = models("encoder", family="deberta-v2")
    flags = ["--objective", "mlm", "--merge_base", "dequantized", "--merged_output_dir", str(tmp_path / "merged")]
    config = qlora.parse_config(["--model_name_or_path", str(folder), *flags])
    base, published = qlora.load_merge_base(config, str(folder)), AutoModelForMaskedLM.from_pretrained(folder)
    same = {
        name: torch.equal(weight, published.get_parameter(name).to(torch.bfloat16))
        for name, weight in base.named_parameters()
    }
    assert same["cls.predictions.transform.dense.weight"]
    assert not same["deberta.encoder.layer.0.output.dense.weight"]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("bert", {}),
        ("bert", {"modules_to_save": "cls"}),
        ("roberta", {"lora_bias": "all"}),
        ("roberta", {"modules_to_save": "lm_head"}),
        ("deberta-v2", {"merge_base": "dequantized", "max_steps": 12}),  # whose effect exceeds the rounding
        ("esm", {}),
    ],
)
def test_a_merged_model_answers_as_base_and_adapter(run_masked, models, tmp_path, family, flags):
    """Their heads hold one bias twice, and DeBERTa reads its relative positions past their module."""
    merged = tmp_path / "merged"
    run = run_masked(family, learning_rate=1e-2, merged_output_dir=merged, **flags)
    assert run.code == 0
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    plain, base = (
        AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (merged, models("encoder", family=family))
    )
    with torch.no_grad():
        before = base(ids).logits
        wanted, found = PeftModel.from_pretrained(base, run.output_dir).eval()(ids).logits, plain(ids).logits
    # a bf16 weight is off by up to 2**-9 of itself; one that dequantises is off by what 4 bits round as well
    assert (found - wanted).abs().mean() < (0.7 if flags.get("merge_base") else 0.1) * (before - wanted).abs().mean()


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "esm"])
def test_a_plan_is_that_of_the_model_with_its_masked_head(run_masked, family):
    run = run_masked(family, plan=True, plan_gpu="24GiB")
    assert run.code == 0 and "objective: mlm" in run.stderr and "GiB" in run.stdout


def test_a_full_fine_tune_leaves_a_model_that_transformers_loads(run_masked, models):
    run = run_masked("esm", bits=32, full_finetune=True, learning_rate=1e-2, do_predict=True)
    assert run.code == 0
    trained = AutoModelForMaskedLM.from_pretrained(run.output_dir).state_dict()
    base = AutoModelForMaskedLM.from_pretrained(models("encoder", family="esm")).state_dict()
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert "esm.encoder.layer.0.attention.self.query.weight" in moved
    assert "esm.embeddings.word_embeddings.weight" not in moved


@pytest.mark.parametrize(
    ("model_config", "masked"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), True),
        (BertConfig(architectures=["BertForPreTraining"]), True),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), False),
        (EsmConfig(architectures=["EsmForMaskedLM"]), True),
        (DebertaV2Config(), True),  # as microsoft/deberta-v3-base: it names no architecture
        (LlamaConfig(architectures=["LlamaForCausalLM"]), False),
        (LlamaConfig(), False),
        (AutoConfig.for_model("bart"), False),
        (AutoConfig.for_model("t5", architectures=["T5ForConditionalGeneration"]), False),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_objective_auto(model_config, masked):
    config = qlora.resolve_objective(qlora.parse_config([]), model_config)
    assert config.masked is masked
    assert config.flags["objective"] == config.data.objective == ("mlm" if masked else "clm")


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_an_objective_that_is_given_is_kept(objective):
    for model_config in (LlamaConfig(), EsmConfig()):
        config = qlora.resolve_objective(qlora.parse_config(["--objective", objective]), model_config)
        assert config.data.objective == objective


# ------------------------------------------------------------------------------------
# Loss, evaluation, masks over a run
# ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_masked_places_themselves():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 5), IGNORE)
    labels[0, 0], labels[0, 4], labels[1, 2] = 3, 6, 1
    model = lambda **inputs: type("Outputs", (), {"logits": logits})  # noqa: E731
    log_probabilities = logits.double().log_softmax(-1)
    total = -(log_probabilities[0, 0, 3] + log_probabilities[0, 4, 6] + log_probabilities[1, 2, 1]).item()
    assert qlora.summed_loss(
        model, qlora.FastPath(), qlora.supervised_targets(labels.flatten(), 0)
    ).item() == pytest.approx(total)
    logits.requires_grad_()
    nothing = qlora.summed_loss(model, qlora.FastPath(), qlora.supervised_targets(torch.full((10,), IGNORE), 0))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


def test_evaluation_gives_loss_perplexity_and_accuracy_of_the_masks(run_masked, models):
    """Against the plain model, row by row and unpadded. It knows nothing, but of so few letters some come out right."""
    texts = [(protein * 6)[:40] for protein in PROTEINS]
    flags = {"bits": 16, "max_steps": 1, "learning_rate": 0.0, "do_eval": True, "eval_dataset_size": 6}
    run = run_masked("esm", texts, mask_prob=0.5, **flags)
    folder = models("encoder", family="esm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    config = qlora.parse_config(["--objective", "mlm", "--mask_prob", "0.5"])
    drawing = qlora.build_masking(tokenizer, len(tokenizer), config.data)
    argv = ["--dataset", run.json("run.json")["flags"]["dataset"], "--objective", "mlm", "--eval_dataset_size", "6"]
    held_out = qlora.load_splits(qlora.parse_config([*argv, "--do_eval"])).eval
    losses, right = [], []
    for text in (row[-1]["text"] for row in held_out["segments"]):
        ids = tokenizer(text)["input_ids"][:48]
        maskable = torch.tensor([IGNORE, *ids[1:-1], IGNORE])
        masked, labels = drawing.mask_tokens(torch.tensor(ids), maskable, "eval", ids, one=True)
        with torch.no_grad():
            logits = model(input_ids=masked[None]).logits[0][labels != IGNORE]
        losses += F.cross_entropy(logits, labels[labels != IGNORE], reduction="none").tolist()
        right += (logits.argmax(-1) == labels[labels != IGNORE]).tolist()
    metrics = run.json("eval_results.json")
    assert len(losses) > 80 and 0 < sum(right) < len(right)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert metrics["eval_masked_accuracy"] == pytest.approx(sum(right) / len(right))
    assert run.json("metrics.json")["eval_masked_accuracy"] == metrics["eval_masked_accuracy"]


def test_training_masks_are_fresh_in_every_batch_and_evaluation_masks_the_same(run_masked, monkeypatch):
    """Four epochs over the same rows with a learning rate of 0: training losses differ, evaluation losses do not."""
    seen = []
    plain = qlora.Masking.mask_tokens

    def spy(self, ids, labels, *seed, one=False):
        masked, supervised = plain(self, ids, labels, *seed, one=one)
        if seed[0] == "train":
            seen.append((ids.tolist(), masked.tolist()))
        return [masked, supervised]

    monkeypatch.setattr(qlora.Masking, "mask_tokens", spy)
    run = run_masked(
        "esm",
        bits=16,
        max_steps=4,
        per_device_train_batch_size=6,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset_size=2,
        mask_prob=0.5,
    )
    log = run.json("trainer_state.json")["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [(e["eval_loss"], e["eval_masked_accuracy"]) for e in log if "eval_loss" in e]
    assert len(set(losses)) == 4 and len(evaluations) >= 4 and len(set(evaluations)) == 1
    steps = [seen[i : i + len(seen) // 4] for i in range(0, len(seen), len(seen) // 4)]
    assert len(steps) == 4 and all([ids for ids, _ in s] == [ids for ids, _ in steps[0]] for s in steps), (
        "the same rows"
    )
    assert len({str([masked for _, masked in step]) for step in steps}) == 4, "other masks"


# ------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------


def predictions(run) -> list[dict]:
    return [json.loads(line) for line in (run.output_dir / "predictions.jsonl").read_text().splitlines()]


def test_prediction_fills_the_masks_that_a_row_has_and_those_drawn_elsewhere(run_masked, models, tmp_path):
    texts = ["MKT<mask>YIAKQ", "GAVLIPFMWSTC", "<mask>KV"]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    folder = models("encoder", family="esm")
    run = run_masked("esm", dataset=file, do_train=False, do_predict=True, bits=16, eval_dataset_size=3)
    assert run.code == 0
    rows = {row["output"]: row for row in predictions(run)}
    assert set(rows) == set(texts)
    assert rows[texts[0]]["input"] == texts[0] and rows[texts[2]]["input"] == texts[2]
    drawn = rows[texts[1]]
    assert "<mask>" in drawn["input"] and "<mask>" not in drawn["prediction"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    for row in rows.values():
        ids = torch.tensor([tokenizer(row["input"])["input_ids"]])
        with torch.no_grad():
            best = model(input_ids=ids).logits[0].argmax(-1)
        expected = row["input"]
        for place in [i for i, token in enumerate(ids[0].tolist()) if token == 32]:
            expected = expected.replace("<mask>", tiny_encoders.ESM_TOKENS[int(best[place])], 1)
        assert row["prediction"] == expected and row.keys() == {"input", "output", "prediction"}
    assert run.json("metrics.json")["predict_samples"] == 3


def test_prediction_uses_the_adapter_that_was_trained(run_masked):
    """Proteins of one letter: after a few steps every mask is that letter, which the base does not know."""
    texts = ["A" * n for n in range(6, 18)]
    flags = {"bits": 4, "do_predict": True, "mask_prob": 0.3, "eval_dataset_size": 2}
    base = run_masked("esm", texts, do_train=False, **flags)
    assert [row["prediction"] for row in predictions(base)] != [row["output"] for row in predictions(base)]
    run = run_masked("esm", texts, max_steps=30, save_steps=30, learning_rate=1e-2, lora_r=8, **flags)
    assert [row["prediction"] for row in predictions(run)] == [row["output"] for row in predictions(run)]
    again = run_masked("esm", texts, do_train=False, lora_r=8, **flags)
    assert [row["prediction"] for row in predictions(again)] == [row["output"] for row in predictions(again)]


# ------------------------------------------------------------------------------------
# Refused flags
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"objective": "mlm", "target_max_len": None}, "llama is no masked language model"),
        ({"mask_prob": 0.2}, "--mask_prob clm"),  # auto, settled by the model's config
        ({"do_predict": True}, "--predict_with_generate"),
    ],
    ids=["no masked model", "mask flags", "predict"],
)
def test_a_causal_model_with_flags_of_a_masked_one(run_qlora, flags, words):
    error = error_of(run_qlora(**flags))
    assert all(word in error for word in words.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target_max_len": 9}, "--target_max_len mlm"),
        ({"do_predict": True, "predict_with_generate": True}, "--predict_with_generate mlm"),
        ({"dataset_format": "alpaca"}, "--dataset_format alpaca input text"),
        ({"chat_template": "chat.jinja"}, "--chat_template mlm"),
    ],
    ids=["target", "generate", "format", "template"],
)
def test_a_masked_model_with_flags_of_a_causal_one(run_masked, flags, words):
    error = error_of(run_masked("bert", **flags))
    assert all(word in error for word in words.split())


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("roberta", 64), ("esm", 64)])
def test_rows_longer_than_the_position_embeddings_are_refused(run_masked, family, room):
    texts = ["MKTAY" * 20] * 8 if family == "esm" else [" ".join(TEXTS[:3])] * 8
    flags = {"bits": 16, "max_steps": 1, "texts": texts}
    assert f"--source_max_len {room}" in error_of(run_masked(family, source_max_len=room + 1, **flags))
    assert run_masked(family, source_max_len=room, **flags).code == 0


def test_a_checkpoint_is_not_taken_up_with_another_objective(run_masked):
    assert run_masked("bert", bits=16, max_steps=2).code == 0
    flags = {"bits": 16, "max_steps": 4, "objective": "clm", "eos_token": "[SEP]", "dataset_format": "text"}
    assert "objective was mlm, is clm" in error_of(run_masked("bert", **flags))


# ------------------------------------------------------------------------------------
# examples/masked_lm
# ------------------------------------------------------------------------------------


def test_the_example_learns_the_planted_rule(run_qlora, tmp_path, monkeypatch):
    """The command of its page, a third of the steps. Who does not know the rule is right at 1 in 20."""
    folder = ROOT / "examples/masked_lm"
    spec = importlib.util.spec_from_file_location("make_proteins", folder / "make_proteins.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr("sys.argv", ["make_proteins.py", str(tmp_path / "made"), "--rows", "1700", "--eval_rows", "60"])
    made.main()
    rows = [json.loads(line)["input"] for line in (tmp_path / "made/data/train.jsonl").read_text().splitlines()]
    letters = "".join(rows)
    assert all("ACDEFGHIKLMNPQRSTVWY".find(b) == (("ACDEFGHIKLMNPQRSTVWY".find(a) + 1) % 20)
               for row in rows[:50] for a, b in zip(row, row[4:], strict=False))  # fmt: skip
    assert max(letters.count(letter) for letter in set(letters)) / len(letters) < 0.06, "no letter is worth guessing"
    (words,) = commands_in((folder / "README.md").read_text())
    flags = qlora.parse_config(words).explicitly_set - {"max_steps", "do_eval", "eval_strategy", "eval_steps"}
    given = dict(zip(words[::2], words[1::2], strict=False))
    flags = {name: given.get(f"--{name}", "True").replace("output/masked_lm", str(tmp_path)) for name in flags}
    off = dict.fromkeys(("source_max_len", "target_max_len"))
    run = run_qlora(**{**off, **flags, "max_steps": 100, "do_eval": True})
    assert run.code == 0
    metrics = run.json("metrics.json")
    # six seeds gave from 0.63 to 0.89
    assert metrics["eval_masked_accuracy"] > 0.5
    base = run_qlora(**{**off, **flags, "output_dir": tmp_path / "base", "do_train": False, "do_eval": True})
    assert base.json("metrics.json")["eval_masked_accuracy"] < 0.15


def test_one_mask_for_equal_rows_of_a_step():
    masking = qlora.Masking(chosen=0.5, replaced=0.8, random=0.1, mask_id=4, words=torch.arange(10, 60))
    row = torch.arange(10, 50)
    drawn = [masking.mask_tokens(row, row, "train", 0, step, row.tolist())[0] for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
