"""What qlora.py uses of its libraries although it is private: each test fails when a release changes it."""

import inspect

import bitsandbytes
import torch
from transformers.models.falcon import modeling_falcon

import qlora


def test_bitsandbytes_quantises_through_one_method():
    """`Params4bit.to` calls `_quantize(device)`, which quantise_on_device replaces for a while."""
    original = bitsandbytes.nn.Params4bit._quantize
    assert list(inspect.signature(original).parameters) == ["self", "device"]
    with qlora.quantise_on_device(torch.device("cpu")):
        assert bitsandbytes.nn.Params4bit._quantize is not original
        weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    assert weight.dtype == torch.uint8 and weight.quant_state is not None
    assert bitsandbytes.nn.Params4bit._quantize is original


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
