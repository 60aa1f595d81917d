"""What qlora.py uses of its libraries although it is private: each test fails when a release changes it."""

import inspect

import bitsandbytes
import datasets
import pytest
import torch
from accelerate.state import GradientState
from transformers import PretrainedConfig, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.falcon import modeling_falcon

import qlora


def test_bitsandbytes_quantises_through_one_method(models, monkeypatch):
    """Loading calls `_quantize(device)` once a weight; load_for_fsdp replaces it for a while."""
    original, devices = bitsandbytes.nn.Params4bit._quantize, []
    assert list(inspect.signature(original).parameters) == ["self", "device"]

    def quantise(weight, device):
        devices.append(device)
        return original(weight, device)

    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "_quantize", quantise)
    config, folder = qlora.parse_config(["--model_name_or_path", str(models("llama"))]), str(models("llama"))
    model_config = qlora.load_model_config(config, folder)
    options = {"quantization_config": qlora.quantisation_config(config, model_config), "device_map": None}
    model = qlora.load_for_fsdp(config, model_config, folder, **options)
    weights = [weight for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert {(weight.dtype, weight.shape[1]) for weight in weights} == {(qlora.FSDP_STORAGE, 1)}
    assert devices == [config.training.device] * len(weights) and len(weights) == 14
    assert bitsandbytes.nn.Params4bit._quantize is quantise


def test_bitsandbytes_repacks_weights_behind_one_attribute(models):
    """Set on every 4-bit layer, so that an evaluation on a CPU changes no weight."""
    config = qlora.parse_config(["--model_name_or_path", str(models("llama"))])
    model = qlora.load_model(config, qlora.load_model_config(config, str(models("llama"))), str(models("llama")))
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 and {layer.support_avx512bf16_for_cpu for layer in layers} == {False}
    assert "support_avx512bf16_for_cpu" in inspect.getsource(bitsandbytes.nn.Linear4bit)


def test_falcons_linear_class_is_put_back_after_loading(models):
    original, folder = modeling_falcon.FalconLinear, models("falcon")
    assert issubclass(original, torch.nn.Linear) and original is not torch.nn.Linear
    config = qlora.parse_config(["--model_name_or_path", str(folder)])
    model = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == 8
    assert modeling_falcon.FalconLinear is original


# ------------------------------------------------------------------------------------
# The Trainer, accelerate, transformers: methods that are overridden, attributes that are set or read
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_maybe_log_save_evaluate", ["tr_loss", "grad_norm", "model"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
        ("_load_best_model", []),
        ("_determine_best_metric", ["metrics", "trial"]),
        ("_prepare_for_training", ["max_steps", "train_dataloader", "resume_from_checkpoint"]),
    ],
)
def test_trainer_methods_that_are_overridden_or_called(method, parameters):
    own = list(inspect.signature(getattr(Trainer, method)).parameters)
    assert own[1 : 1 + len(parameters)] == parameters


def test_every_private_method_of_the_trainer_is_listed_here():
    ours = {name for name in vars(qlora.QLoRATrainer) if name.startswith("_") and hasattr(Trainer, name)}
    (listed,) = (mark for mark in test_trainer_methods_that_are_overridden_or_called.pytestmark)
    assert {name for name in ours if not name.startswith("__")} <= {row[0] for row in listed.args[1]}


def test_attributes_that_are_set_or_read():
    assert callable(bitsandbytes.optim.optimizer.sync_gpu)
    assert callable(bitsandbytes.optim.PagedAdamW32bit.prefetch_state)
    assert callable(GradientState._set_sync_gradients)
    assert "_attn_implementation" in dir(PretrainedConfig())
    assert "_gradient_checkpointing_func" in inspect.getsource(GradientCheckpointingLayer)
    assert "_fingerprint" in vars(datasets.Dataset.from_dict({"a": [1]}))
