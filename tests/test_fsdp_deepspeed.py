"""Several processes under FSDP and each DeepSpeed stage: the same run as one process makes, on CPUs with gloo.

Without GPUs torch replaces only the kernels: sharding, gathering, saving and resuming are the engines' own.
"""

import importlib.util
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT, missing
from peft import PeftModel
from ranks import (
    ALL_STAGES,
    AS_GPUS,
    Start,
    assert_same_run,
    assert_same_training,
    error_of,
    finish,
    losses,
    weights,
)
from transformers import AutoModelForCausalLM

BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# FSDP offloads to pinned memory, which needs a GPU driver.
SHARDING = f"""{AS_GPUS}
import torch.distributed.fsdp as fsdp
class Unpinned(fsdp.CPUOffloadPolicy):
    def __init__(self):
        super().__init__(pin_memory=False)
fsdp.CPUOffloadPolicy = Unpinned
"""


def zero(stage: int) -> Path:
    return ROOT / f"examples/deepspeed_zero{stage}.json"


def need_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        missing("deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")


@pytest.fixture(scope="module")
def start(fork_server, models, tmp_path_factory) -> Start:
    return Start(fork_server, tmp_path_factory.mktemp("engines"), models("llama"), bits=16, optim="adamw_torch")


FULL = {"full_finetune": True}
SHARDS = {**FULL, "max_shard_size": "200KB"}  # of 520 KB
# Name -> (the run of one process that it must repeat, its flags)
RUNS = {
    "one": (None, {}),
    "all": (None, FULL),
    "zero2": ("one", {"deepspeed": zero(2)}),
    "zero3": ("one", {"deepspeed": zero(3)}),
    "zero2-all": ("all", {"deepspeed": zero(2), **SHARDS}),
    "zero3-all": ("all", {"deepspeed": "fixed", **SHARDS}),
    "fsdp-all": ("all", {"fsdp": [], "fsdp_config": {"cpu_offload": True}, "before": SHARDING, **SHARDS}),
}
ENGINES = [name for name, (like, _) in RUNS.items() if like]
IN_SUITE = ("zero2", "fsdp-all")  # the others, of half a minute together, with `-m ci`


@pytest.fixture(scope="module")
def runs(start) -> Callable[[str], Path]:
    """`runs("zero2")`: the folder of that run, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if "zero" in name:
            need_deepspeed()
        if name not in made:
            like, flags = RUNS[name]
            folder = start.folder / name
            finish(start(2 if like else 1, folder, **ALL_STAGES, **resolve_file(start.folder, flags)))
            made[name] = folder
        return made[name]

    return get


def resolve_file(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Write the "fixed" DeepSpeed file, whose batch sizes are numbers equal to the flags instead of "auto"."""
    if flags.get("deepspeed") == "fixed":
        content = json.loads(zero(3).read_text()) | dict(zip(BATCH, (1, 4, 8), strict=True))
        (folder / "fixed.json").write_text(json.dumps(content))
        flags = flags | {"deepspeed": folder / "fixed.json"}
    return flags


@pytest.mark.parametrize("name", [n if n in IN_SUITE else pytest.param(n, marks=pytest.mark.ci) for n in ENGINES])
def test_an_engine_repeats_the_run_of_one_process_and_resumes_from_its_checkpoints(start, runs, name):
    """Two processes get 4 rows each of a step, 2 and 1 at the end of an epoch, 3 and 1 for evaluation.

    FSDP resumes with 3 processes, too.
    """
    like, flags = RUNS[name]
    assert_same_run(runs(name), runs(like))
    assert any((runs(name) / "checkpoint-4").glob("global_step*")) == ("zero" in name)
    assert (len([*runs(name).glob("model-*-of-*.safetensors")]) > 2) == ("all" in name)
    running = {}
    for step in (4, 6):  # of 6: only the final weights are missing then
        resumed = start.folder / f"{name}-resumed-{step}"
        shutil.copytree(runs(name) / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        number = 3 if "fsdp" in name and step == 4 else 2  # the effective batch stays the checkpoint's
        own = {"gradient_accumulation_steps": 4} | resolve_file(start.folder, flags)
        running[resumed] = start(number, resumed, **ALL_STAGES, **own)
    for resumed, processes in running.items():
        assert "resuming from" in finish(processes)
        assert_same_run(resumed, runs(like))


@pytest.mark.parametrize("name", ["zero3", "fsdp-all"])
def test_a_finished_sharded_run_is_evaluated_without_training(start, runs, tmp_path, name):
    folder, (like, flags) = tmp_path / "out", RUNS[name]
    shutil.copytree(runs(name), folder)
    for name in ("metrics.json", "eval_results.json", "predictions.jsonl"):
        (folder / name).unlink()
    finish(start(2, folder, do_train=False, **ALL_STAGES, **flags))
    assert_same_run(folder, runs(like))


def test_an_engine_trains_experts_and_tied_weights_and_ends_with_the_best_checkpoint(start, models, tmp_path):
    """That is the first one here, as a higher loss counts as better.

    ZeRO-3 hides the shapes of stacked experts; FSDP can't shard one weight in two modules that train whole.
    """
    need_deepspeed()
    flags = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    flags |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    flags |= {"model_name_or_path": models("mixtral", tie=True), "modules_to_save": "lm_head,embed_tokens"}
    flags |= {"adam_epsilon": 1e-5}  # a gradient of mere rounding noise takes no full step
    engines = {
        "fsdp": {"fsdp": [], "before": SHARDING},
        "zero2": {"deepspeed": zero(2)},
        "zero3": {"deepspeed": zero(3)},
    }
    running = [start(1, tmp_path / "one", **flags)]
    running += [start(2, tmp_path / name, **flags, **own) for name, own in engines.items()]
    for processes in running:
        finish(processes)
    wanted = weights(tmp_path / "one")
    assert len([name for name in wanted if ".experts." in name]) == 8, "A and B of two stacks in two layers"
    assert {f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")} < wanted.keys()
    last, first = (weights(tmp_path / "one" / f"checkpoint-{step}") for step in (4, 2))
    assert all(torch.equal(wanted[name], first[name]) for name in wanted)
    assert any((wanted[name] - last[name]).abs().max() > 1e-4 for name in wanted)
    for name in engines:
        ours = weights(tmp_path / name)
        assert ours.keys() == wanted.keys() and all((ours[k] - wanted[k]).abs().max() < 1e-5 for k in ours), name


# The scaler that accelerate uses for fp16, on GPUs only.
SCALER = """
import accelerate.accelerator, torch
accelerator = accelerate.accelerator.Accelerator
begin = accelerator.__init__
def scaled(self, *args, **options):
    begin(self, *args, **options)
    self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**22)
accelerator.__init__ = scaled
"""


@pytest.mark.ci
def test_fp16_under_fsdp_scales_its_loss_and_resumes_with_the_scale(start, tmp_path):
    """As DDP does; each process saves its own shards."""
    sharded = {"fsdp": [], "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "before": SHARDING + SCALER}
    flags = {"fp16": True, "max_steps": 12, "save_steps": 8, "do_eval": False}
    running = start(2, tmp_path / "ddp", before=SCALER, **flags)
    finish(start(2, tmp_path / "fsdp", **flags, **sharded))
    finish(running)
    assert_same_training(tmp_path / "fsdp", tmp_path / "ddp", rounding=2e-4)  # of fp16, by the processor's kernels
    places = [tmp_path / name / "checkpoint-8" / "scaler.pt" for name in ("fsdp", "ddp")]
    scales = [torch.load(place)["scale"] for place in places]
    assert scales[0] == scales[1] < 2.0**22, "the first steps overflow"
    resumed = tmp_path / "resumed"
    shutil.copytree(places[0].parent, resumed / "checkpoint-8")
    finish(start(2, resumed, **flags, **sharded))
    assert_same_training(resumed, tmp_path / "fsdp")


def test_experts_in_4_bit_under_fsdp_train_as_in_one_process(fork_server, models, tmp_path):
    """FSDP's parameters lose the statistics of packed weights; here they come from a calibrated base."""
    base = models("mixtral", intermediate_size=256)
    flags = {"bits": 4, "optim": "adamw_torch", "calibration_rows": 8, "cache_dir": tmp_path / "cache", **ALL_STAGES}
    start = Start(fork_server, tmp_path, base, **flags)
    running = start(1, tmp_path / "one")
    sharded = {"fsdp": [], "before": SHARDING}
    text = finish(start(2, tmp_path / "fsdp", **sharded))
    finish(running)
    assert "nf4 (packed): 417,792" in text and "stay in" not in text and "unpack whole stacks" not in text
    assert_same_run(tmp_path / "fsdp", tmp_path / "one")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "fsdp" / "checkpoint-4", resumed / "checkpoint-4")
    finish(start(2, resumed, **sharded))
    assert_same_run(resumed, tmp_path / "one")


def test_pissa_under_zero3_trains_as_in_one_process(start, tmp_path):
    """Its decomposition needs whole weights, of which ZeRO-3 leaves shards."""
    need_deepspeed()
    flags = {"init_lora_weights": "pissa", "max_steps": 2, "do_eval": False}
    running = start(1, tmp_path / "one", **flags), start(2, tmp_path / "zero3", deepspeed=zero(3), **flags)
    for processes in running:
        finish(processes)
    assert_same_training(tmp_path / "zero3", tmp_path / "one")


@pytest.mark.ci
def test_experts_under_deepspeed_are_not_packed_and_it_says_so(fork_server, models, tmp_path):
    need_deepspeed()
    start = Start(fork_server, tmp_path, models("mixtral"), bits=4, max_steps=1, do_eval=False)
    text = finish(start(2, tmp_path / "out", deepspeed=zero(2)))
    assert "4 tensors of experts, 0.00 GiB, stay in float32: only --bits 4 without --deepspeed packs them" in text


def test_what_fsdp_cannot_wrap_save_or_train_is_one_line(start, models, tmp_path):
    """Under it, packed weights look like bfloat16."""
    bert = {"model_name_or_path": models("encoder", family="bert"), "target_max_len": None}
    llama = r"model\.layers\.0\.self_attn\.o_proj\.weight"
    cases = [
        ({"fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}},
         "transformer_layer_cls_to_wrap BertLayer: not in the model.*LlamaDecoderLayer"),
        ({"modules_to_save": "decoder", **bert},
         "--modules_to_save: --fsdp can't save tied modules of a masked model; leave them out$"),
        ({"modules_to_save": "o_proj", "lora_modules": "mlp", "bits": 4, "bf16": True},
         f"--modules_to_save o_proj: {llama} is quantised; pass --bits 16 or 32$"),
    ]  # fmt: skip
    fsdp = {"fsdp": [], "before": SHARDING, "do_eval": False}
    running = [start(2, tmp_path / f"{number}", **fsdp, **flags) for number, (flags, _) in enumerate(cases)]
    for processes, (_, wanted) in zip(running, cases, strict=True):
        line = error_of(finish(processes, 2))
        assert re.search(wanted, line), line


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.ci)])
def test_a_quantised_base_under_deepspeed_trains_as_in_one_process(start, tmp_path, bits):
    need_deepspeed()
    flags = {"bits": bits, "max_steps": 2}
    running = [start(1, tmp_path / "one", **flags)]
    running += [start(2, tmp_path / f"{stage}", deepspeed=zero(stage), **flags) for stage in (2, 3)]
    for processes in running:
        finish(processes)
    for stage in ("2", "3"):
        assert_same_training(tmp_path / stage, tmp_path / "one")


def test_zero2_evaluates_without_training(start, tmp_path):
    need_deepspeed()
    finish(start(2, tmp_path / "out", deepspeed=zero(2), do_train=False))
    assert "eval_loss" in json.loads((tmp_path / "out/metrics.json").read_text())


def test_fsdp_without_gpus_is_one_line(start, tmp_path):
    """accelerate would use DDP on two CPUs, and nothing for one process."""
    running = [start(number, tmp_path / str(number), fsdp=[], **FULL) for number in (2, 1)]
    for processes in running:
        line = error_of(finish(processes, 2))
        assert line.startswith("--fsdp shards the weights over GPUs") and "leave it out" in line


def test_peft_alone_loads_an_adapter_of_zero2(runs, models):
    need_deepspeed()
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    model, ids = PeftModel.from_pretrained(base, runs("zero2")), torch.arange(1, 9).unsqueeze(0)
    with model.disable_adapter():
        without = model(ids).logits
    assert not torch.allclose(model(ids).logits, without, atol=1e-3)


def test_a_checkpoint_of_another_engine_is_refused(start, runs, tmp_path):
    """The run could continue without its optimizer state, but it would be another run."""
    need_deepspeed()
    stage2 = {"deepspeed": zero(2)}
    cases = [
        (("zero2", 1, {}), "engine was DeepSpeed on 2 processes, is none or DDP"),
        (("one", 2, stage2), "engine was none or DDP, is DeepSpeed on 2 processes"),
        (("fsdp-all", 1, FULL), "engine was FSDP, is none or DDP"),
        (("zero2", 3, stage2), "engine was DeepSpeed on 2 processes, is DeepSpeed on 3 processes"),
    ]
    running = []
    for number, ((name, processes, flags), _) in enumerate(cases):
        shutil.copytree(runs(name) / "checkpoint-4", tmp_path / f"{number}" / "checkpoint-4")
        running.append(start(processes, tmp_path / f"{number}", **flags))
    for processes, (_, wanted) in zip(running, cases, strict=True):
        line = error_of(finish(processes, 2))
        assert wanted in line and "checkpoint-4" in line


def test_a_deepspeed_file_that_the_flags_contradict(start, tmp_path):
    """One line names every value that differs, and all processes exit; so does a run without torchrun."""
    need_deepspeed()
    content = json.loads(zero(2).read_text()) | dict(zip(BATCH, (2, 16, 64), strict=True)) | {"gradient_clipping": 5.0}
    (tmp_path / "other.json").write_text(json.dumps(content))
    both = start(2, tmp_path / "a", deepspeed=tmp_path / "other.json"), start(1, tmp_path / "b", deepspeed=zero(2))
    line = error_of(finish(both[0], 2))
    for part in ("micro_batch_size_per_gpu=2 vs per_device_train_batch_size=1", "accumulation_steps=16 vs", "=64 vs",
                 "gradient_clipping=5.0 vs max_grad_norm=0.3", "other.json", '"auto"'):  # fmt: skip
        assert part in line
    expected = "--deepspeed: start it with torchrun --nproc_per_node N qlora.py, N processes"
    assert error_of(finish(both[1], 2)) == expected


def test_missing_deepspeed_is_one_line(start, tmp_path):
    hidden = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "deepspeed" else find(name, *package)
"""
    line = error_of(finish(start(2, tmp_path / "out", before=hidden, deepspeed=zero(2)), 2))
    assert "--deepspeed: it is not installed here: DS_BUILD_OPS=0 pip install deepspeed" in line
    assert not (tmp_path / "out").exists()


def test_masks_do_not_depend_on_the_number_of_processes(start, models, tmp_path):
    """Rows repeat: equal rows of one step share a mask, and get another one in the next step.

    FSDP shards a head that is tied to the embeddings and stores its bias twice.
    """
    texts = [line for line in tiny.TEXT.splitlines() if line][:8]
    rows = [{"text": text} for text in itertools.islice(itertools.cycle(texts), 23)]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    model = shutil.copytree(models("encoder", family="bert"), tmp_path / "bert")
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own
    (model / "config.json").write_text(json.dumps(config | still))
    flags = {"model_name_or_path": model, "dataset": data, "target_max_len": None}
    fsdp = {"fsdp": [], "before": SHARDING}
    runs = {"one": (1, {}), "two": (2, {}), "fsdp": (2, fsdp), "one-all": (1, FULL), "fsdp-all": (2, fsdp | FULL)}
    running = [start(number, tmp_path / name, **flags, **own) for name, (number, own) in runs.items()]
    for processes in running:
        finish(processes)
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs}
    for name, like in ("two", "one"), ("fsdp", "one"):
        assert_same_training(tmp_path / name, tmp_path / like)
        assert metrics[name]["eval_masked_accuracy"] == metrics[like]["eval_masked_accuracy"]
    assert losses(tmp_path / "fsdp-all") == pytest.approx(losses(tmp_path / "one-all"), abs=2e-5)
    ours, theirs = weights(tmp_path / "fsdp-all"), weights(tmp_path / "one-all")
    assert ours.keys() == theirs.keys()
    # Adam turns a gradient that is only rounding noise into a step of full size: a bias of the keys, which has no
    # effect on attention, gets no other, and now and then a few of the 100,000 values elsewhere.
    apart = {name: int(((ours[name] - theirs[name]).abs() > 1e-5).sum()) for name in ours if "key.bias" not in name}
    assert sum(apart.values()) <= 20, apart
