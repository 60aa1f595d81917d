"""What qlora.py uses of its libraries although it is private: each test fails when a release changes it."""

import inspect

import bitsandbytes
import torch
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
