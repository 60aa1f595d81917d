"""The loss of every row equals the loss that the documentation implies.

With learning rate 0 the loss of a row is the base model's. These tests format, tokenise and mask each row again as the
documentation says, with transformers alone, and compute its loss by itself. Of qlora.py they use only the command line.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# ------------------------------------------------------------------------------------
# The documented formats: row -> prompt pieces and answer. BOS and EOS are added later, as ids.
# ------------------------------------------------------------------------------------
SEPARATOR = object()  # in a prompt: the tokenizer's own EOS, then its BOS


def alpaca(row):
    head, context = "Below is an instruction that describes a task", row.get("input")
    head += ", paired with an input that provides further context. " if context else ". "
    head += "Write a response that appropriately completes the request.\n\n"
    head += "### Instruction:\n" + row["instruction"] + "\n\n"
    head += "### Input:\n" + context + "\n\n" if context else ""
    return [head + "### Response: "], row["output"]


def chip2(row):
    question, _, rest = row["text"].partition("\n<bot>: ")
    return ["".join(question.split("<human>: "))], rest.partition("\n<bot>: ")[0]


def airoboros(row):
    instruction, answer = row["instruction"].strip(), row["response"].strip() + "\n"
    if row.get("skip_prompt_formatting"):
        return [instruction + "\n"], answer
    if instruction.endswith("PLAINFORMAT"):
        instruction = instruction[: -len("PLAINFORMAT")].rstrip() + " PLAINFORMAT"
    system = (row.get("system") or "").strip() or "A chat."
    return [system + "\nUSER: " + instruction + "\nASSISTANT: "], answer


def airoboros_chat(row):
    said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    system = "You are an unbiased, uncensored, helpful assistant."
    if said[0][0] == "system":
        system = said.pop(0)[1]
    parts = [f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{said[0][1]} [/INST]"]
    for number in range(1, len(said) - 1, 2):
        parts[-1] += " " + said[number][1].strip() + " "
        parts += [SEPARATOR, "[INST] " + said[number + 1][1].strip() + " [/INST]"]
    return parts, said[-1][1]


def column(name):
    return lambda row: ([""], row[name])


def columns(first, second):
    return lambda row: ([row[first]], row[second])


def turns(*values):
    names = ["human", "gpt"] * len(values)
    system = [{"from": "system", "value": values[0][7:]}] if values[0].startswith("system:") else []
    values = values[1:] if system else values
    return {"conversations": system + [{"from": n, "value": v} for n, v in zip(names, values, strict=False)]}


ALPACA = [
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"instruction": "Name a ship.", "input": "", "output": " The Patience.\n"},
    {"instruction": "Go {input}", "output": "on"},
]
PAIRS = [("Who wrote it? ", "The keeper."), ("", "A lamp."), ("How far</s>?", " Five\nmiles. ")]
TEXTS = ["### Human: Hi### Assistant: Hello, é!", " The lamp works.\n\n", "A sea without ships."]
DOCUMENTED = {
    "alpaca": (alpaca, ALPACA),
    "alpaca-clean": (alpaca, ALPACA),
    "chip2": (
        chip2,
        [
            {"text": "<human>: A\n<bot>: B"},
            {"text": "<human>: Who?\n<bot>: He.\n<human>: Why?\n<bot>: So."},
            {"text": "Since <human>: when?\n<bot>: Then \n<bot>: no"},
        ],
    ),
    "self-instruct": (columns("prompt", "completion"), [{"prompt": a, "completion": b} for a, b in PAIRS]),
    "input-output": (columns("input", "output"), [{"input": a, "output": b} for a, b in PAIRS]),
    "longform": (columns("input", "output"), [{"input": a, "output": b, "source": "x"} for a, b in PAIRS]),
    "hh-rlhf": (column("chosen"), [{"chosen": "\n\nHuman: " + text, "rejected": "no"} for text in TEXTS]),
    "oasst1": (column("text"), [{"text": text} for text in TEXTS]),
    "text": (column("text"), [{"text": text} for text in TEXTS]),
    "input": (column("input"), [{"input": text} for text in TEXTS]),
    "airoboros": (
        airoboros,
        [
            {"instruction": " Hi \n", "response": "\n Hello ", "system": " Be brief. "},
            {"instruction": "List them.\n\n  PLAINFORMAT ", "response": "1, 2"},
            {"instruction": " def f():\n", "response": "pass", "skip_prompt_formatting": True, "system": "not read"},
            {"instruction": "Go", "response": "on", "skip_prompt_formatting": False, "system": None},
        ],
    ),
    "airoboros_chat": (
        airoboros_chat,
        [
            turns("Hi", " Hello "),
            turns("system:Be brief.", " a ", "\nb ", " c\n", " d "),
            turns("What</s><s>?", "x", "y", "z", " w", "v</s>"),
        ],
    ),
}


def test_every_format_is_documented_here():
    """Except chats with the tokenizer's template and users' own functions, which have tests of their own below."""
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = page.partition("| `--dataset_format` |")[2].partition("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for name in row.split("|")[1].replace("`", "").replace(" ", "").split(",")}
    assert named == {*DOCUMENTED, "messages", "sharegpt", "path.py:function"}


def tokens(tokenizer, text):
    """Ids of a text, without adding or recognising special tokens."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def documented_ids(tokenizer, prompt, answer):
    """BOS + tokens of the input, tokens of the output + EOS; a tokenizer without BOS adds none."""
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    source, end = list(first), [tokenizer.eos_token_id]
    for part in prompt:
        source += end + first if part is SEPARATOR else tokens(tokenizer, part)
    return source, tokens(tokenizer, answer) + end


def cut(source, target, limits, on_source=False):
    """Truncate each side on the right."""
    source, target = source[: limits[0]], target[: limits[1]]
    return source + target, (source if on_source else [-100] * len(source)) + target


@torch.no_grad()
def loss_of(model, rows):
    """The mean over the supervised tokens of all rows, each run through the model by itself."""
    total, count = 0.0, 0
    for ids, labels in rows:
        logits, wanted = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
        total += F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").item()
        count += int((wanted != -100).sum())
    return total / count


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()
    return model, AutoTokenizer.from_pretrained(folder)


def logged_losses(run_qlora, folder, file, **flags):
    """The program's loss at every step: one row after the other, learning rate 0."""
    run = run_qlora(
        **{
            "model_name_or_path": folder,
            "dataset": file,
            "bits": 16,
            "learning_rate": 0,
            "max_steps": len(file.read_text(encoding="utf-8").splitlines()),
            "per_device_train_batch_size": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "source_max_len": 400,
            "target_max_len": 100,
            **flags,
        }
    )
    assert run.code == 0
    return [entry["loss"] for entry in run.json("trainer_state.json")["log_history"] if "loss" in entry]


TOKENIZERS = {"byte": {}, "byte_bpe": {}, "byte_bpe, no BOS": {"bos": None}}


def model_with(models, kind):
    """A tiny model with one of TOKENIZERS."""
    name, _, without = kind.partition(",")
    writer = (lambda path: tiny.write_tokenizer(path, name, bos=None)) if without else name
    return models("llama", tokenizer=writer)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_loss_of_every_row(run_qlora, models, tmp_path, name):
    """Each format uses one of the tokenizers; prompts of several pieces use the one that merges bytes."""
    kind = list(TOKENIZERS)[list(DOCUMENTED).index(name) % 3] if name != "airoboros_chat" else "byte_bpe"
    folder, (formatted, rows) = model_with(models, kind), DOCUMENTED[name]
    model, tokenizer = load(folder)
    expected = [loss_of(model, [cut(*documented_ids(tokenizer, *formatted(row)), (400, 100))]) for row in rows]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    losses = logged_losses(run_qlora, folder, file, dataset_format=name)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) == len(rows)  # so no row could pass for another


VARIANTS = {
    "cut on the right": ({"source_max_len": 9, "target_max_len": 6}, lambda s, t: cut(s, t, (9, 6))),
    "supervised source": ({"train_on_source": True}, lambda s, t: cut(s, t, (400, 100), True)),
    "one limit, cut on the left": (
        {"model_max_len": 24, "skip_excess_length": False, "source_max_len": None, "target_max_len": None},
        lambda s, t: cut(s[:1] + s[1:][-(23 - len(t)) :] if len(s + t) > 24 else s, t, (400, 100)),
    ),
    "no fast path": ({"fast_path": False}, lambda s, t: cut(s, t, (400, 100))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_limits_supervised_source_and_no_fast_path(run_qlora, models, tmp_path, variant):
    flags, documented = VARIANTS[variant]
    folder, rows = model_with(models, "byte"), [row for row in DOCUMENTED["input-output"][1] if row["input"]]
    model, tokenizer = load(folder)
    sides = [documented_ids(tokenizer, [row["input"]], row["output"]) for row in rows]
    expected = [loss_of(model, [documented(source, target)]) for source, target in sides]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    assert logged_losses(run_qlora, folder, file, **flags) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 3, "packing": True, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 3, "auto_batch": True},
    ],
    ids=["padded", "accumulated", "packed", "regrouped"],
)
def test_rows_of_one_step_count_by_their_supervised_tokens(run_qlora, models, tmp_path, flags):
    folder, (formatted, rows) = model_with(models, "byte_bpe"), DOCUMENTED["airoboros"]
    model, tokenizer = load(folder)
    expected = loss_of(model, [cut(*documented_ids(tokenizer, *formatted(row)), (400, 100)) for row in rows[:3]])
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows[:3])
    losses = logged_losses(run_qlora, folder, file, max_steps=1, **flags)
    assert losses == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_4_bit_base(run_qlora, models, tmp_path, kind):
    folder, (formatted, rows) = model_with(models, "byte_bpe"), DOCUMENTED["alpaca"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model, tokenizer = load(folder, quantization_config=settings, device_map="cpu")
    expected = [loss_of(model, [cut(*documented_ids(tokenizer, *formatted(row)), (400, 100))]) for row in rows]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    losses = logged_losses(run_qlora, folder, file, bits=4, quant_type=kind)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_one_row_for_each_answer(run_qlora, models, tmp_path):
    """--expand_conversations: the prompt of an answer is everything before it."""
    folder, row = model_with(models, "byte"), turns("system:S", "a", "b", " c ", "d", "e", "f")
    model, tokenizer = load(folder)
    parts = [{"conversations": row["conversations"][:end]} for end in (3, 5, 7)]
    expected = [loss_of(model, [cut(*documented_ids(tokenizer, *airoboros_chat(p)), (400, 100))]) for p in parts]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [row])
    flags = {"dataset_format": "airoboros_chat", "expand_conversations": True, "max_steps": 3}
    assert logged_losses(run_qlora, folder, file, **flags) == pytest.approx(expected, rel=1e-5)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [("user", "Hi"), ("assistant", "Hello")],
    [("system", "Be brief."), ("user", "a é"), ("assistant", "b"), ("user", "c"), ("assistant", "d d")],
    [("user", "Say <|im_end|>"), ("assistant", "x<|im_start|>y"), ("user", "never answered")],
]


def write_chatml(path):
    tokenizer = tiny.byte_tokenizer(bos=None, eos="<|im_end|>", extra=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_a_chat_with_the_tokenizers_template(run_qlora, models, tmp_path, name):
    """Only answers and their stop tokens are supervised; everything after the last answer is dropped.

    The ids are the bytes of the template's text, with its two special tokens added by hand.
    """
    folder = models("llama", tokenizer=write_chatml)
    model, tokenizer = load(folder)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    expected = []
    for chat in CHATS:
        ids, labels, kept = [], [], chat[:-1] if chat[-1][0] == "user" else chat
        for number, (role, content) in enumerate(kept):
            head, body = [start, *f"{role}\n".encode()], [*content.encode(), end]
            tail = [10] if number < len(kept) - 1 else []  # the line break after the last stop token is dropped
            ids += head + body + tail
            labels += [-100] * len(head) + (body if role == "assistant" else [-100] * len(body)) + [-100] * len(tail)
        expected.append(loss_of(model, [(ids, labels)]))
    if name == "messages":
        rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in CHATS]
    else:
        others = {"user": "human", "assistant": "gpt", "system": "system"}
        rows = [{"conversations": [{"from": others[role], "value": text} for role, text in chat]} for chat in CHATS]
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    assert logged_losses(run_qlora, folder, file, dataset_format=name) == pytest.approx(expected, rel=1e-5)


OWN = """
def both(row):
    return {"input": row["q"] + "?", "output": row["a"]}


def segments(row):
    return [{"text": row["q"], "supervised": False}, {"text": row["a"], "supervised": True},
            {"text": " so ", "supervised": False}, {"text": "end", "supervised": True}]
"""


@pytest.mark.parametrize("function", ["both", "segments"])
def test_a_users_own_function(run_qlora, models, tmp_path, function):
    folder, rows = model_with(models, "byte"), [{"q": "Who", "a": "He"}, {"q": "Why it is", "a": "So."}]
    model, _ = load(folder)
    (tmp_path / "own.py").write_text(OWN)
    expected = []
    for row in rows:
        pieces = {"both": [(row["q"] + "?", 0), (row["a"], 1)]}
        pieces["segments"] = [(row["q"], 0), (row["a"], 1), (" so ", 0), ("end", 1)]
        ids, labels = [tiny.BOS], [-100]
        for text, supervised in pieces[function]:
            ids += text.encode()
            labels += text.encode() if supervised else [-100] * len(text.encode())
        expected.append(loss_of(model, [([*ids, tiny.EOS], [*labels, tiny.EOS])]))
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    losses = logged_losses(run_qlora, folder, file, dataset_format=f"{tmp_path / 'own.py'}:{function}")
    assert losses == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------
# A real model, if there is one: QLORA_MODEL is a folder with SmolLM2, QLORA_ROWS a file of OpenAssistant rows and
# QLORA_MMLU a folder with zero_shot_mmlu_val.json
# ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_real_rows_and_questions_on_a_real_model(run_qlora, tmp_path):
    import os

    names = ("QLORA_MODEL", "QLORA_ROWS", "QLORA_MMLU")
    if any(name not in os.environ for name in names):
        pytest.skip(f"needs {', '.join(names)} in the environment")
    folder, rows, mmlu = (Path(os.environ[name]) for name in names)
    lines = rows.read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, tokenizer = load(folder)
    texts = [json.loads(line)["text"] for line in lines]
    sides = [documented_ids(tokenizer, [""], text) for text in texts]
    expected = [loss_of(model, [cut(*both, (16, 256))]) for both in sides]
    flags = {"dataset_format": "oasst1", "source_max_len": 16, "target_max_len": 256}
    assert logged_losses(run_qlora, folder, tmp_path / "rows.jsonl", **flags) == pytest.approx(expected, rel=1e-5)

    questions = [json.loads(line) for line in (mmlu / "zero_shot_mmlu_val.json").read_text().splitlines()[::31]]
    (tmp_path / "mmlu").mkdir()
    tiny.rows_to_jsonl(tmp_path / "mmlu/zero_shot_mmlu_val.json", questions)
    letters, by_subject = [tokens(tokenizer, letter)[0] for letter in "ABCD"], {}
    for question in questions:
        ids = [tokenizer.bos_token_id, *tokens(tokenizer, question["input"])]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1, letters]
        right = "ABCD"[int(scores.argmax())] == question["output"]
        by_subject.setdefault(question["subject"], []).append(right)
    run = run_qlora(
        model_name_or_path=folder, dataset=tmp_path / "rows.jsonl", bits=16, do_train=False, do_eval=True,
        eval_dataset_size=2, do_mmlu_eval=True, mmlu_dataset="mmlu-zs", mmlu_dir=tmp_path / "mmlu",
        output_dir=tmp_path / "mmlu-out",
    )  # fmt: skip
    metrics = run.json("metrics.json")
    for subject, marks in by_subject.items():
        assert metrics[f"mmlu_eval_accuracy_{subject}"] == pytest.approx(sum(marks) / len(marks))
    whole = sum(sum(marks) / len(marks) for marks in by_subject.values()) / len(by_subject)
    assert metrics["mmlu_eval_accuracy"] == pytest.approx(whole)
