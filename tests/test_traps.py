"""What the libraries do without a word and the program must not let happen, where no other file has it."""

import json
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel

import qlora

WITHOUT_PAD = partial(tiny.write_byte, pad=None)  # and without an unknown token: pad is EOS


@pytest.mark.parametrize("tokenizer", [WITHOUT_PAD, "sentencepiece"], ids=["byte", "sentencepiece"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_missing_pad_token_does_not_bring_the_embeddings_into_the_adapter(run_qlora, models, tokenizer, tie):
    run = run_qlora(model_name_or_path=models("llama", tokenizer=tokenizer, tie=tie), max_steps=1)
    assert run.code == 0
    for folder in (run.output_dir, run.output_dir / "checkpoint-1"):
        assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_eos_is_learnt_where_it_is_the_pad_too(run_qlora, models, tmp_path):
    """The loss of the first step, of rows padded with EOS, is that of all tokens and of every EOS."""
    rows = [{"input": "q", "output": "abcdefgh"}, {"input": "", "output": "x"}]
    base = models("llama", tokenizer=WITHOUT_PAD)
    run = run_qlora(
        model_name_or_path=base,
        dataset=tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows),
        bits=16,
        max_steps=1,
    )
    assert run.json("run.json")["derived"]["special tokens"].count("257") == 2  # EOS and pad
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    losses = []
    for row in rows:
        source, target = [256, *row["input"].encode()], [*row["output"].encode(), 257]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
    (entry,) = (e for e in run.json("trainer_state.json")["log_history"] if "loss" in e)
    assert entry["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_predictions_use_the_cache_that_training_turned_off(run_qlora, monkeypatch):
    """With it every forward pass but the first sees one token."""
    widths, forward = [], LlamaModel.forward

    def spy(self, input_ids=None, **kwargs):
        if not self.training:
            widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    plain = qlora.predict
    monkeypatch.setattr(qlora, "predict", lambda *args: widths.clear() or plain(*args))  # what came before: other tries
    monkeypatch.setattr(LlamaModel, "forward", spy)
    run = run_qlora(
        do_predict=True,
        predict_with_generate=True,
        max_new_tokens=4,
        min_new_tokens=4,
        max_eval_samples=1,
        use_cache=False,
    )
    assert run.code == 0
    assert widths[0] > 1 and widths[1:] == [1, 1, 1]


def test_an_adapter_is_one_that_peft_loads_alone(run_qlora, models):
    run = run_qlora(learning_rate=1e-2, bits=16)
    config = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models("llama"))
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    ids = torch.tensor([[256, *b"Order 3: where is my coffee?"]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.output_dir).eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-2


def test_a_mixed_precision_run_leaves_no_float32_copy_of_embeddings_and_head(run_qlora, monkeypatch):
    """What prepare_model_for_kbit_training would do. The adapters alone are float32."""
    seen = {}
    plain = qlora.build_trainer

    def spy(ready, *args, **kwargs):
        seen.update({name: p.dtype for name, p in ready.model.named_parameters() if p.dtype.is_floating_point})
        return plain(ready, *args, **kwargs)

    monkeypatch.setattr(qlora, "build_trainer", spy)
    assert run_qlora(bf16=True, max_steps=1).code == 0
    of = {dtype: {n.split(".")[-2] for n, d in seen.items() if d == dtype} for dtype in set(seen.values())}
    assert of[torch.float32] == {"default"}  # lora_A.default.weight, lora_B.default.weight
    assert {"embed_tokens", "lm_head", "norm"} <= of[torch.bfloat16]
