"""Calibrated 4-bit bases: which codes are chosen, where adapters start, and what a run leaves."""

import copy
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, get_4bit_type, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import qlora

KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]
NF4 = sorted(get_4bit_type("nf4", device="cpu").tolist())
# Settings under which a whole run is fast and exact.
RUN = {"calibration_rows": 8, "learning_rate": 1e-3, "eval_dataset_size": 4, "do_eval": True}


def parse(kind="nf4", double=True, *words):
    return qlora.parse_config(["--quant_type", kind, "--double_quant", str(double), *words])


def inputs(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    """Inputs of a layer whose channels differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return mixed * torch.logspace(-1, 1, size)


def choose(weight, hessian, config):
    return qlora.choose_codes(weight, None if hessian is None else qlora.damped_factors(hessian), config)


def unpacked(weight) -> torch.Tensor:
    return dequantize_4bit(weight.data, weight.quant_state)


def error_of(run) -> str:
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    return next(line for line in lines if line.startswith("error: "))


# ------------------------------------------------------------------------------------
# Codes and scales
# ------------------------------------------------------------------------------------
def test_errors_are_fed_back_by_hand():
    """Two rows of two columns, codes -1, 0, 1, scale 1, H = [[2, 1], [1, 1]].

    H⁻¹ = [[1, -1], [-1, 2]]. Row (0.6, 0.3): 0.6 becomes 1, an error of -0.4; the second column loses
    -0.4 · (-1) / 1 = 0.4: 0.3 - 0.4 = -0.1, which becomes 0. Row (-0.4, 0.3): 0, an error of -0.4 too, so
    0.3 - 0.4 = -0.1 becomes 0. Row (0.4, 0.3): an error of 0.4, so 0.3 + 0.4 = 0.7 becomes 1.
    """
    weight = torch.tensor([[0.6, 0.3], [-0.4, 0.3], [0.4, 0.3]])
    inverse = torch.linalg.cholesky(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), upper=True)
    code = torch.tensor([-1.0, 0.0, 1.0])
    codes = qlora.feed_errors_back(weight, torch.ones(3, 2), code, inverse)
    assert code[codes].tolist() == [[1, 0], [0, 0], [0, 1]]


def eliminated(weight, scales, code, hessian):
    """GPTQ as first derived (Optimal Brain Quantization): the inverse of H shrinks column by column, in float64."""
    weight, inverse = weight.double().numpy().copy(), np.linalg.inv(hessian.double().numpy())
    codes = np.zeros(weight.shape, dtype=int)
    for q in range(weight.shape[1]):
        values = np.array(code)[None] * scales[:, q].double().numpy()[:, None]
        codes[:, q] = np.abs(weight[:, q, None] - values).argmin(1)
        error = (weight[:, q] - np.take_along_axis(values, codes[:, q, None], 1)[:, 0]) / inverse[q, q]
        weight -= error[:, None] * inverse[q][None]
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


def test_errors_are_fed_back_as_in_a_plain_float64_reference():
    """200 columns, more than the 128 that are done at a time. A tie of two codes may fall either way in float32."""
    x, generator = inputs(1000, 200).double(), torch.Generator().manual_seed(1)
    hessian = x.T @ x + 0.01 * (x * x).sum() / 200 * torch.eye(200)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    weight, scales = torch.randn(24, 200, generator=generator), 1.5 + torch.rand(24, 200, generator=generator)
    ours = qlora.feed_errors_back(weight, scales, torch.tensor(NF4), inverse)
    assert (ours.numpy() == eliminated(weight, scales, NF4, hessian)).mean() > 0.995


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_codes_decode_through_bitsandbytes(kind, double):
    """Every value is one of the 16 codes times its block's scale, as bitsandbytes stores that."""
    x, config, weight = inputs(500, 192), parse(kind, double), torch.randn(8, 192)
    weight[3, :64] = 0  # a block of zeros has the scale 0
    chosen = choose(weight, x.T @ x, config).weight
    state = chosen.quant_state
    assert state.nested == double and chosen.shape == (8 * 192 // 2, 1) and chosen.dtype == torch.uint8
    dense, scales = dequantize_4bit(chosen.data, state), state.absmax
    scales = dequantize_blockwise(scales, state.state2) + state.offset if double else scales
    ratios = dense.view(-1, 64) / scales.view(-1, 1)
    values = get_4bit_type(kind, device="cpu")
    assert ((ratios[..., None] - values).abs().amin(-1)[scales != 0] < 1e-5).all()
    assert torch.equal(qlora.stack_values(chosen, torch.float32), dense) and dense[3, :64].abs().max() < 0.05


def test_a_block_s_scale_is_the_weighted_least_squares_one():
    """Block by block in plain numpy: the best of 18 scales from 0.7 to 1.05 times the largest weight."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.logspace(-2, 2, 128)
    ours = qlora.weighted_scales(weight, importance, torch.tensor(NF4))
    importance = importance + 0.01 * importance.mean()  # so that channels that are never on count a little
    for row in range(4):
        for start in 0, 64:
            block, weights = weight[row, start : start + 64].numpy(), importance[start : start + 64].numpy()
            errors = {}
            for scale in np.abs(block).max() * np.linspace(0.7, 1.05, 18):
                nearest = np.array(NF4)[np.abs(block[:, None] / scale - np.array(NF4)).argmin(1)] * scale
                errors[scale] = float((weights * (nearest - block) ** 2).sum())
            assert ours[row, start // 64] == pytest.approx(min(errors, key=errors.get), rel=1e-5)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_outputs_error_is_below_plain_rounding_s(kind, double):
    x, config = inputs(500, 128), parse(kind, double)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    choice = choose(weight, x.T @ x, config)
    plain = quantize_4bit(weight, compress_statistics=double, quant_type=kind)
    dense = dequantize_4bit(*plain), dequantize_4bit(choice.weight.data, choice.weight.quant_state)
    measured = [float((x @ (weight - values).T).square().sum()) for values in dense]
    assert [choice.before, choice.after] == pytest.approx(measured, rel=1e-3)
    assert choice.after < 0.6 * choice.before


@pytest.mark.parametrize(
    ("size", "hessian"),
    [(64, None), (64, torch.zeros(64, 64)), (64, torch.full((64, 64), math.nan)), (96, torch.eye(96))],
    ids=["no input", "zero", "not finite", "width"],
)
def test_a_layer_that_cannot_be_calibrated_is_rounded_plainly_and_counted(size, hessian):
    weight = torch.randn(8, size)
    choice = choose(weight, hessian, parse())
    plain, _ = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(choice.weight.data, plain) and choice.plain == 1
    assert {*choice.start} == ({"lora_A", "lora_B"} if size == 96 else set())  # there the adapter makes up for it


def test_a_channel_that_is_never_on_is_no_obstacle():
    x = inputs(500, 64)
    x[:, 7] = 0
    choice = choose(torch.randn(16, 64), x.T @ x, parse())
    assert choice.after < choice.before and unpacked(choice.weight).isfinite().all()
    assert choice.start["lora_A"].isfinite().all()


def test_the_adapter_s_start_is_the_best_of_its_rank():
    """By H's measure what is left has the energy of the singular values beyond the rank (Eckart and Young)."""
    x, left = inputs(500, 96).double(), torch.randn(80, 96, generator=torch.Generator().manual_seed(3))
    hessian = x.T @ x + torch.eye(96)
    order = torch.randperm(96)
    factors = qlora.Factors(hessian, order, torch.linalg.cholesky(hessian[order][:, order]), torch.empty(0))
    start = qlora.adapter_start(left, factors, 8)
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors @ values.sqrt().diag() @ vectors.T  # the symmetric root, by another way than Cholesky's
    rest = (left.double() - start["lora_B"].double() @ start["lora_A"].double()) @ root
    best = torch.linalg.svdvals(left.double() @ root)[8:].square().sum()
    assert float(rest.square().sum()) == pytest.approx(float(best), rel=2e-2)
    assert start["lora_A"].shape == (8, 96) and start["lora_B"].shape == (80, 8)


def test_the_adapter_s_start_can_be_saved_whatever_the_layout_of_singular_vectors(monkeypatch, tmp_path):
    """A GPU's lie column by column in memory, which safetensors refuses."""
    original = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: [x.T.contiguous().T for x in original(*a, **k)])
    x = torch.randn(300, 64)
    start = qlora.adapter_start(torch.randn(48, 64), qlora.damped_factors(x.T @ x), 8)
    save_file(start, tmp_path / "start.safetensors")
    assert load_file(tmp_path / "start.safetensors")["lora_B"].shape == (48, 8)


# ------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------
@pytest.fixture
def calibrated(run_qlora, tmp_path):
    """`calibrated(**flags)` -> Run, with one cache for the test."""
    return lambda **flags: run_qlora(**{**RUN, "cache_dir": tmp_path / "cache", **flags})


def cached(tmp_path):
    return sorted((tmp_path / "cache/qlora-calibrated").iterdir())


def test_a_run_from_the_first_step_to_a_prediction(calibrated, tmp_path):
    run = calibrated()
    assert run.code == 0 and "calibration took" in run.stderr and "nf4 (packed)" in run.stderr
    assert "rounded plainly" not in run.stderr
    assert "calibration: 0 layers left, " in run.stderr  # in the place of a bar, which a pipe has not
    (folder,) = cached(tmp_path)
    assert {file.name for file in folder.glob("*.safetensors")} == {"model.safetensors", "adapter_start.safetensors"}
    again = calibrated(output_dir=tmp_path / "again", max_steps=1)
    assert again.code == 0 and "calibration took" not in again.stderr and cached(tmp_path) == [folder]

    # the saved adapter is s (B A - B0 A0) of twice the rank, for the published base
    last = load_file(run.output_dir / "checkpoint-4/adapter_model.safetensors")
    saved, start = (
        load_file(run.output_dir / "adapter_model.safetensors"),
        load_file(folder / "adapter_start.safetensors"),
    )
    adapter_config = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert (adapter_config["r"], adapter_config["lora_alpha"]) == (8, 32)
    layer = "model.layers.1.mlp.down_proj"
    a, b = (f"base_model.model.{layer}.lora_{part}.weight" for part in "AB")
    trained, first = last[b] @ last[a], start[f"{layer}.lora_B"] @ start[f"{layer}.lora_A"] / (16 / 4)
    assert (trained - first).norm() > 0.01 * first.norm()
    assert torch.allclose(saved[b] @ saved[a], trained - first, atol=1e-6)

    # a rerun evaluates what was trained, on the base that it was trained on
    rerun = calibrated(do_train=False)
    assert rerun.code == 0
    assert rerun.json("eval_results.json")["eval_loss"] == pytest.approx(
        run.json("eval_results.json")["eval_loss"], rel=1e-5
    )


def test_the_start_brings_the_base_closer_to_the_published_one(calibrated, models, tmp_path):
    """Logits of plain 4 bits, of the calibrated base, and with the adapters' start, each against the published base."""
    calibrated(max_steps=1, lora_r=16, calibration_rows=20)
    ids = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee?"]])
    config = qlora.parse_config(
        ["--lora_r", "16", "--calibration_rows", "20", "--model_name_or_path", str(models("llama"))]
    )
    base, (folder,) = str(models("llama")), cached(tmp_path)
    published = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain, chosen = (
        qlora.load_model(config, qlora.load_model_config(config, where), where) for where in (base, str(folder))
    )
    with torch.no_grad():
        target, *others = (model.eval()(input_ids=ids).logits for model in (published, plain, chosen))
        adapted = qlora.make_trainable(chosen, config, None, folder / "adapter_start.safetensors").eval()
        others.append(adapted(input_ids=ids).logits)
    plain_error, error, with_start = (float((logits - target).norm()) for logits in others)
    assert with_start < error < plain_error


def test_a_resumed_run_is_the_same(calibrated, tmp_path):
    straight = calibrated(output_dir=tmp_path / "straight")
    calibrated(max_steps=2)
    resumed = calibrated()
    ours, theirs = (load_file(run.output_dir / "adapter_model.safetensors") for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_base_is_refused(calibrated):
    calibrated(max_steps=2)
    assert "calibration_rows was 8, is 12" in error_of(calibrated(calibration_rows=12))
    assert "calibration_rows was 8, is 0" in error_of(calibrated(calibration_rows=None))
    assert "adapter start was calibrated, is True" in error_of(calibrated(init_lora_weights=True))


def test_an_unfinished_adapter_is_no_start_for_another_run(calibrated, run_qlora, tmp_path):
    """A checkpoint's adapter fits the calibrated base only, that of the finished run the published one."""
    run = calibrated(max_steps=2, save_steps=1)
    assert run.code == 0 and run.json("run.json")["derived"]["calibrated base"] == cached(tmp_path)[0].name
    plain = {name: value for name, value in RUN.items() if name != "calibration_rows"}
    for rows in (None, 8):
        flags = {**plain, "output_dir": tmp_path / "other", "cache_dir": tmp_path / "cache", "calibration_rows": rows}
        other = run_qlora(**flags, adapter_name_or_path=run.output_dir / "checkpoint-1")
        assert "fits the calibrated base of its run only" in error_of(other)
    assert run_qlora(**plain, output_dir=tmp_path / "next", adapter_name_or_path=run.output_dir).code == 0


def test_a_finished_run_is_used_on_the_base_it_was_trained_on(calibrated, run_qlora, data_dir, tmp_path):
    """Also where this command reads other rows: the base is the recorded one, and if it is gone, an error."""
    trained = calibrated(do_eval=False, eval_dataset_size=None, learning_rate=1e-2)
    assert trained.code == 0
    used = {"do_train": False, "do_eval": True, "eval_dataset_size": 4, "learning_rate": 1e-2}
    run = calibrated(**used)
    assert run.code == 0 and len(cached(tmp_path)) == 1
    shutil.rmtree(tmp_path / "cache/qlora-calibrated")
    assert "the base of this run is not in" in error_of(calibrated(**used))


def test_a_merge_needs_no_calibrated_base_and_a_run_without_one_gets_none(calibrated, run_qlora, tmp_path):
    """The result fits the published base; and a base is not calibrated for a run that was trained on another."""
    assert calibrated(learning_rate=1e-2).code == 0
    shutil.rmtree(tmp_path / "cache/qlora-calibrated")
    merge = {"do_train": False, "do_eval": False, "merged_output_dir": tmp_path / "merged"}
    assert calibrated(learning_rate=1e-2, **merge).code == 0
    assert not (tmp_path / "cache/qlora-calibrated").exists()
    assert run_qlora(output_dir=tmp_path / "plain", max_steps=1).code == 0
    refused = run_qlora(output_dir=tmp_path / "plain", max_steps=2, calibration_rows=4, cache_dir=tmp_path / "cache")
    assert "was trained without --calibration_rows" in error_of(refused)
    assert not (tmp_path / "cache/qlora-calibrated").exists()


@pytest.mark.parametrize("flags", [{"bf16": True}, {"fp16": True}])
def test_sums_are_in_float32_under_autocast(calibrated, flags):
    run = calibrated(max_steps=1, **flags)
    assert run.code == 0, run.stderr


def test_layers_that_return_tuples(calibrated, models):
    """With more than a few layers a tuple taken for a tensor shows."""
    folder = models("falcon", num_hidden_layers=5)
    run = calibrated(model_name_or_path=folder, max_steps=1)
    assert run.code == 0, run.stderr


def test_a_block_whose_inputs_are_never_on_has_the_scale_of_plain_least_squares():
    """Every scale is as good there; the smallest would cut its largest weight to 0.7 for rows to come."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[64:] = 0
    scales = qlora.weighted_scales(weight, importance, torch.tensor(NF4))
    assert torch.equal(scales[:, 1:], qlora.weighted_scales(weight[:, 64:], torch.ones(64), torch.tensor(NF4)))


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_merging(calibrated, tmp_path, merge_base):
    """qlora.py compares the merged model with base + adapter; here once more, by peft on the base that is meant."""
    calibrated(learning_rate=1e-2)
    done = calibrated(learning_rate=1e-2, do_train=False, do_eval=False, merge_base=merge_base,
                      merged_output_dir=tmp_path / "merged")  # fmt: skip
    assert done.code == 0, done.stderr


FAMILIES = ("gpt2", "falcon", "gemma3", "olmoe", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(calibrated, models, family, tmp_path):
    """Every layer that plain quantisation holds in 4 bits is calibrated; Conv1D, biases, fused projections, windows."""
    run = calibrated(model_name_or_path=models(family), max_steps=1, do_eval=False)
    assert run.code == 0, run.stderr
    plain = calibrated(model_name_or_path=models(family), max_steps=1, do_eval=False, calibration_rows=None,
                       output_dir=tmp_path / "plain")  # fmt: skip
    counts = [
        next(line for line in done.stderr.splitlines() if line.strip().startswith("nf4 (packed)"))
        for done in (run, plain)
    ]
    assert counts[0] == counts[1]


def test_a_masked_model(calibrated, models):
    run = calibrated(model_name_or_path=models("encoder", family="bert"), dataset_format="input", target_max_len=None)
    assert run.code == 0, run.stderr


def test_the_user_s_own_start_wins(calibrated):
    run = calibrated(init_lora_weights="gaussian", max_steps=1)
    assert run.code == 0 and json.loads((run.output_dir / "adapter_config.json").read_text())["r"] == 4


def test_rslora_and_dropout(calibrated):
    run = calibrated(use_rslora=True, lora_dropout=0.1, max_steps=1)
    assert run.code == 0, run.stderr


def test_a_base_that_is_stored_in_16_bit_is_calibrated_as_in_float32(calibrated, models, tmp_path):
    """Without --bf16 a layer at a time becomes float32, and the rest stays as it is mapped from the files."""
    folders = [tmp_path / name for name in ("stored16", "stored32")]
    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.bfloat16)
    for folder, kept in zip(folders, (model, copy.deepcopy(model).float()), strict=True):
        shutil.copytree(models("llama"), folder)
        kept.save_pretrained(folder)
    runs = [calibrated(model_name_or_path=f, output_dir=tmp_path / f"{f.name}-out", max_steps=1) for f in folders]
    bases = [load_file(folder / "model.safetensors") for folder in cached(tmp_path)]
    assert [run.code for run in runs] == [0, 0] and len(bases) == 2 and bases[0].keys() == bases[1].keys()
    for name, value in bases[0].items():
        assert value.dtype == bases[1][name].dtype and torch.equal(value, bases[1][name]), name


def test_an_interrupted_calibration_leaves_nothing(calibrated, tmp_path, monkeypatch):
    save = qlora.save_file
    monkeypatch.setattr(qlora, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert calibrated().code == 130
    assert cached(tmp_path) == []
    monkeypatch.setattr(qlora, "save_file", save)
    assert calibrated().code == 0


def test_what_a_killed_run_left_in_the_cache_goes_with_the_next(tmp_path):
    """That of a run that still writes, here the parent process, stays."""
    done = subprocess.Popen(["true"])
    done.wait()
    for pid in (done.pid, os.getppid()):
        (tmp_path / f"base.{platform.node()}.{pid}" / "parts").mkdir(parents=True)
    with qlora.made_once(tmp_path / "base", "--calibration_rows") as made:
        Path(made).mkdir()
        assert {*tmp_path.iterdir()} == {Path(made), tmp_path / f"base.{platform.node()}.{os.getppid()}"}
    assert (tmp_path / "base").is_dir() and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bits": 8}, "--calibration_rows needs --bits 4"),
        ({"use_dora": True}, "pass --init_lora_weights True"),
        ({"calibration_rows": -1}, "--calibration_rows -1: expected 0 or more"),
    ],
)
def test_flags_that_do_not_fit(run_qlora, flags, message):
    assert message in error_of(run_qlora(**RUN | flags))


def test_a_base_that_is_quantised_already(calibrated, models):
    assert "--calibration_rows: " in error_of(calibrated(model_name_or_path=models("prequantised")))


def test_more_rows_than_there_are(calibrated):
    run = calibrated(calibration_rows=1000, max_steps=1)
    assert run.code == 0 and "--calibration_rows 1000: the dataset has 20, all of them are used" in run.stderr


def test_a_hint_on_the_rate(calibrated):
    assert "such as 2.5e-4" in calibrated(max_steps=1).stderr
    assert "such as 2.5e-4" not in calibrated(max_steps=1, learning_rate=2e-4).stderr
    zero = calibrated(max_steps=1, init_lora_weights=True, overwrite_output_dir=True)
    assert zero.code == 0 and "such as 2.5e-4" not in zero.stderr


def test_the_saved_adapter_on_the_published_base(calibrated, models):
    """peft alone: the adapter that is saved has its effect on the published base."""
    run = calibrated(learning_rate=1e-2)
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.output_dir).eval()
    ids = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee?"]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - adapted).norm() > 0.05 * adapted.norm()


# ------------------------------------------------------------------------------------
# Mixtures of experts
# ------------------------------------------------------------------------------------
WIDE = {"intermediate_size": 256}  # experts of whole blocks of nested scales, as those of most models are
ODD = {"intermediate_size": 192}  # experts that share a block of nested scales, as gpt-oss' do
EXPERTS = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts, "llama4": Llama4TextExperts}


def plain_values(weight, kind, double):
    return dequantize_4bit(*quantize_4bit(weight, compress_statistics=double, quant_type=kind))


def experts_and_calls(models, family="mixtral", **options):
    """Experts with random weights, and two calls: all tokens reach the first, 488 the next, then 12 and none."""
    config = AutoConfig.from_pretrained(models(family, **options))
    config._experts_implementation = "eager"
    module, generator = EXPERTS[family](config), torch.Generator().manual_seed(5)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 8
    chosen = torch.zeros(500, 2, dtype=torch.long)
    chosen[:, 1] = 1 + (torch.arange(500) % 40 == 39).long()
    x = inputs(500, 64)
    shares = torch.full((500, 2), 0.5)
    return module, [(x[:300], chosen[:300], shares[:300]), (x[300:], chosen[300:], shares[300:])]


def calibrate(module, calls, config):
    """The choices of a module's stacks, by the calls as the module gets them: Llama 4's has a copy for each expert."""
    sums = qlora.InputSums()
    for x, chosen, shares in calls:
        reached = torch.stack([(chosen == expert).any(1) for expert in range(4)])[..., None]
        copies = isinstance(module, Llama4TextExperts)
        sums.add("experts", module, ((x * reached).flatten(0, 1),) if copies else (x, chosen, shares))
    with torch.no_grad():
        return dict(qlora.calibrate_experts(module, sums.routed["experts"], config))


def output(module, expert, x):
    """What one expert makes of x, by transformers' own function."""
    if isinstance(module, Llama4TextExperts):
        return module(x.repeat(4, 1)).view(4, *x.shape)[expert]
    return module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("options", [ODD, WIDE], ids=["odd", "whole"])
@pytest.mark.parametrize("family", EXPERTS)
def test_outputs_of_experts_of_all_layouts_are_closer_than_by_plain_rounding(models, family, options, kind, double):
    """On an expert's own tokens. Those that too few reach have the codes of plain rounding, and its scales."""
    module, calls = experts_and_calls(models, family, **options)
    published, plain = copy.deepcopy(module), copy.deepcopy(module)
    choices = calibrate(module, calls, parse(kind, double))
    assert [*choices] == ["gate_up_proj", "down_proj"] and {choice.plain for choice in choices.values()} == {2}
    for name, choice in choices.items():
        packed, state = quantize_4bit(getattr(plain, name).data, compress_statistics=double, quant_type=kind)
        getattr(plain, name).data = rounded = dequantize_4bit(packed, state)
        values = unpacked(choice.weight)
        assert values.shape == rounded.shape and torch.equal(values, getattr(module, name).data)
        assert torch.equal(choice.weight.data.view(4, -1)[2:], packed.view(4, -1)[2:])
        near = {"rtol": 0.03, "atol": 0.03} if double and options is ODD else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(values[2:], rounded[2:], **near)
    x, chosen = (torch.cat(parts) for parts in list(zip(*calls, strict=True))[:2])
    for expert in range(2):
        rows = x[(chosen == expert).any(1)]
        wanted, ours, others = (output(each, expert, rows).double() for each in (published, module, plain))
        assert (ours - wanted).square().sum() < 0.75 * (others - wanted).square().sum()


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_transposed_stack_is_rounded_by_hand(kind, double):
    """H is the identity: nothing is fed back, and a block of 64 outputs has its best scale by least squares."""
    generator = torch.Generator().manual_seed(6)
    stack = torch.randn(2, 3, 128, generator=generator)  # 2 experts, 3 inputs, 128 outputs
    given = {i: (torch.ones(3), lambda: qlora.damped_factors(torch.eye(3))) for i in range(2)}
    choice = qlora.calibrate_weight(stack, given, parse(kind, double), transposed=True)
    blocks, code = stack.view(12, 64), get_4bit_type(kind, device="cpu")
    scales = blocks.abs().amax(1) * torch.linspace(0.7, 1.05, 18)[:, None]
    nearest = (blocks / scales[..., None] - code.view(-1, 1, 1, 1)).abs().argmin(0)
    errors = (code[nearest] * scales[..., None] - blocks).square().sum(-1)
    scales = scales.gather(0, errors.argmin(0)[None])[0]
    state = choice.weight.quant_state
    stored = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    torch.testing.assert_close(stored, scales, rtol=0.01 if double else 1e-5, atol=0)
    values = code[(blocks / stored[:, None] - code.view(-1, 1, 1)).abs().argmin(0)] * stored[:, None]
    assert torch.equal(unpacked(choice.weight), values.view_as(stack))


def test_experts_that_are_calibrated_together_have_the_codes_of_each_alone(models, monkeypatch):
    """But for ties of two codes, as products of several matrices may be summed in another order."""
    codes = []
    for together in (qlora.TOGETHER, 1):
        monkeypatch.setattr(qlora, "TOGETHER", together)
        module, calls = experts_and_calls(models, "gpt_oss", **ODD)
        choices = calibrate(module, calls, parse())
        codes.append(torch.cat([choice.weight.data for choice in choices.values()]))
    assert (codes[0] == codes[1]).float().mean() > 0.995


@pytest.mark.parametrize("double", [True, False])
def test_an_expert_that_plain_rounding_fits_better_keeps_it(double):
    """Its weights are codes times 1. The next one stays calibrated; nested scales are in one block for both."""
    generator, config = torch.Generator().manual_seed(7), parse("nf4", double)
    stack = torch.randn(2, 96, 64, generator=generator)
    stack[0] = torch.tensor(NF4)[torch.randint(16, (96, 64), generator=generator)]
    stack[0, :, 0] = 1
    x = inputs(500, 64)
    given = {i: ((x * x).sum(0), lambda: qlora.damped_factors(x.T @ x)) for i in range(2)}
    plain = plain_values(stack, "nf4", double)
    choice = qlora.calibrate_weight(stack, given, config, transposed=False)
    changes = (stack - values for values in (plain, unpacked(choice.weight)))
    before, after = ((x @ change.mT).square().sum((1, 2)).tolist() for change in changes)
    assert choice.plain == 1 and after[0] < 0.01 * before[1] and after[1] < 0.7 * before[1]
    assert double or after[0] == 0
    assert [choice.before, choice.after] == pytest.approx([sum(before), sum(after)], rel=0.02)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_each_expert_is_calibrated_on_its_own_tokens(models, kind, double):
    """By its own H, in float64, no expert's error is above plain rounding's; codes decode to what is put in place."""
    module, calls = experts_and_calls(models, **WIDE)
    before = {name: weight.data.clone() for name, weight in module.named_parameters()}
    choices = calibrate(module, calls, parse(kind, double))
    assert [*choices] == ["gate_up_proj", "down_proj"] and {choice.plain for choice in choices.values()} == {2}
    x, chosen = (torch.cat(parts) for parts in list(zip(*calls, strict=True))[:2])
    sums = {name: [0.0, 0.0] for name in choices}
    for expert in range(4):
        rows = x[(chosen == expert).any(1)].double()
        for name, choice in choices.items():
            values = dequantize_4bit(choice.weight.data, choice.weight.quant_state)
            assert values.shape == before[name].shape and torch.equal(values, getattr(module, name).data)
            plain = plain_values(before[name], kind, double)
            if expert > 1:
                assert torch.equal(values[expert], plain[expert]), "too few tokens reach it"
                continue
            errors = [float((rows @ (before[name] - q)[expert].double().T).square().sum()) for q in (plain, values)]
            assert errors[1] < 0.7 * errors[0]
            sums[name] = [total + error for total, error in zip(sums[name], errors, strict=True)]
            gate, up = (rows @ values[expert].double().T).chunk(2, dim=-1)
            rows = torch.nn.functional.silu(gate) * up if name == "gate_up_proj" else rows
    for name, choice in choices.items():
        assert [choice.before, choice.after] == pytest.approx(sums[name], rel=1e-3)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("options", [ODD, {"intermediate_size": 96}], ids=["no tokens", "rows of 96"])
def test_stacks_are_rounded_plainly_as_bitsandbytes_does(models, double, options):
    module, calls = experts_and_calls(models, **options)
    weights = {name: weight.data.clone() for name, weight in module.named_parameters()}
    calls = [[part[:0] for part in call] for call in calls] if options is ODD else calls
    choices = calibrate(module, calls, parse("nf4", double))
    for name, choice in choices.items() if options is ODD else [("down_proj", choices["down_proj"])]:
        packed, state = quantize_4bit(weights[name], compress_statistics=double, quant_type="nf4")
        own = choice.weight.quant_state
        pairs = [(choice.weight.data, packed), (own.absmax, state.absmax)]
        pairs += [(own.offset, state.offset), (own.state2.absmax, state.state2.absmax)] if double else []
        assert all(torch.equal(*pair) for pair in pairs) and own.shape == state.shape and choice.plain == 4


def test_few_tokens_do_not_harm_others():
    """The codes of as many tokens as a layer has inputs, judged on others: error feedback alone fits what is noise."""
    x, weight, config = inputs(8000, 128), torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), parse()
    few, others = x[:64], x[4000:]
    errors = []
    for tokens in (math.inf, 64):
        choice = qlora.choose_codes(weight, qlora.damped_factors(few.T @ few, tokens), config)
        errors.append(float((others @ (weight - unpacked(choice.weight)).T).square().sum()))
    plain = float((others @ (weight - plain_values(weight, "nf4", True)).T).square().sum())
    assert errors[1] < 0.9 * plain and errors[1] < errors[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4", "gpt_oss"])
def test_the_base_of_a_mixture_is_loaded_as_it_was_written(calibrated, models, tmp_path, monkeypatch, family):
    """Bit for bit, and its adapters train."""
    written, save = {}, PreTrainedModel.save_pretrained

    def spy(model, *args, **kwargs):
        packed = {name: w for name, w in model.named_parameters() if hasattr(w, "quant_state")}
        written.update({name: (w.data.clone(), dequantize_4bit(w.data, w.quant_state)) for name, w in packed.items()})
        return save(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spy)
    base = models(family, **{"moe_intermediate_size": 192} if family in ("qwen3_moe", "deepseek_v3") else ODD)
    run = calibrated(model_name_or_path=base, max_steps=1, do_eval=False, learning_rate=1e-4)
    assert run.code == 0 and "quantised after loading" not in run.stderr, run.stderr
    # one of Llama 4's, each token meeting one, gets 8
    assert ("2 matrices are rounded plainly" in run.stderr) == (family == "llama4"), run.stderr
    adapters = load_file(run.output_dir / "checkpoint-1/adapter_model.safetensors")
    trained = [tensor.any() for name, tensor in adapters.items() if "experts" in name and "lora_B" in name]
    assert trained and all(trained), "they start at zero"
    config, folder = qlora.parse_config(["--calibration_rows", "8"]), str(cached(tmp_path)[0])
    model = qlora.load_model(config, qlora.load_model_config(config, folder), folder)
    loaded = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}
    assert {*written} == {*loaded} and any("experts" in name for name in loaded)
    for name, (codes, values) in written.items():
        assert torch.equal(loaded[name].data, codes), name
        assert torch.equal(dequantize_4bit(loaded[name].data, loaded[name].quant_state), values), name
    plain = qlora.parse_config([])
    other = qlora.load_model(plain, qlora.load_model_config(plain, str(base)), str(base))
    for name in qlora.stacked_experts(other):
        assert not torch.equal(other.get_parameter(name).data, loaded[name].data), name
    assert not any(
        tensor.dim() == 3 and tensor.is_floating_point() for tensor in load_file(f"{folder}/model.safetensors").values()
    )


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_experts_of_a_base_in_16_bits(calibrated, models, family):
    run = calibrated(model_name_or_path=models(family, **ODD), max_steps=1, bf16=True)
    assert run.code == 0 and "calibration took" in run.stderr, run.stderr


def test_a_calibrated_mixture_is_closer_to_the_published_one(calibrated, models, tmp_path):
    """On the rows: the loss of its predictions against the published model's, which has the lowest."""
    base = models("mixtral", **WIDE)
    assert calibrated(model_name_or_path=base, max_steps=1, calibration_rows=20).code == 0
    config = qlora.parse_config(["--calibration_rows", "20"])
    folders = str(base), str(cached(tmp_path)[0])
    published = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    models_in_4_bit = [qlora.load_model(config, qlora.load_model_config(config, folder), folder) for folder in folders]
    losses = [0.0, 0.0]
    with torch.no_grad():
        for row in tiny.support_rows(20):
            ids = torch.tensor([[tiny.BOS, *f"{row['input']}{row['output']}".encode()]])
            target = published(input_ids=ids).logits.softmax(-1)[0]
            for i, model in enumerate(models_in_4_bit):
                logits = model.eval()(input_ids=ids).logits[0]
                losses[i] += float(torch.nn.functional.cross_entropy(logits, target))
                losses[i] -= float(torch.nn.functional.cross_entropy(target.log(), target))
    assert losses[1] < 0.8 * losses[0]


def test_a_calibrated_mixture_resumes_predicts_and_is_merged(calibrated, models, tmp_path):
    flags = {"model_name_or_path": models("mixtral", **WIDE), "learning_rate": 1e-2}
    straight = calibrated(**flags, output_dir=tmp_path / "straight", do_predict=True, predict_with_generate=True,
                          max_new_tokens=3, merged_output_dir=tmp_path / "merged")  # fmt: skip
    calibrated(**flags, max_steps=2)
    resumed = calibrated(**flags)
    assert straight.code == resumed.code == 0 and "calibration took" not in resumed.stderr
    ours, theirs = (load_file(run.output_dir / "adapter_model.safetensors") for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and any("experts" in name for name in ours)
    done = calibrated(**flags, do_train=False, do_eval=False, merge_base="dequantized",
                      merged_output_dir=tmp_path / "dequantized")  # fmt: skip
    assert done.code == 0, done.stderr
    layouts = [{*load_file(tmp_path / name / "model.safetensors")} for name in ("merged", "dequantized")]
    assert layouts == [{*load_file(flags["model_name_or_path"] / "model.safetensors")}] * 2
