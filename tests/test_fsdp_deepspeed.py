"""Several processes with gloo on a CPU under each engine, started one by one as srun does: the same run as one makes.

The processes are forked (fork_server.py), so that the libraries are imported once. Of an accelerator without GPUs torch takes
everything but the kernels: sharding, gathering, saving and resuming are the engines' own.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT, _to_argv, missing
from fork_server import Forks, Process
from peft import PeftModel
from safetensors.torch import load_file
from test_ddp import AS_GPUS, children, losses, same, until
from transformers import AutoModelForCausalLM

import qlora

BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# FSDP keeps what it moves to the CPU in pinned memory, which only a GPU's driver can give.
SHARDING = (
    AS_GPUS.partition("sys.path")[0]
    + """
import torch.distributed.fsdp as fsdp
class Unpinned(fsdp.CPUOffloadPolicy):
    def __init__(self):
        super().__init__(pin_memory=False)
fsdp.CPUOffloadPolicy = Unpinned
"""
)
# What a process trained, bit for bit, before rank 0 writes its own.
LEAVE = """
import torch, qlora
from pathlib import Path
save = qlora.save_final
def left(trainer, final, config):
    trained = {n: p.detach() for n, p in trainer.runtime().model.named_parameters() if p.requires_grad}
    torch.save(trained, Path(f"{final}.trained.{trainer.args.process_index}"))
    save(trainer, final, config)
qlora.save_final = left
"""


def zero(stage: int) -> Path:
    return ROOT / f"examples/deepspeed_zero{stage}.json"


def deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        missing("deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
    if shutil.which("c++") is None:
        pytest.skip("on CPUs DeepSpeed compiles its shared memory, and there is no compiler here")


@pytest.fixture(scope="module")
def fork_server() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def start(fork_server, models, tmp_path_factory) -> Callable[..., list[Process]]:
    """`start(processes, folder, before="", **flags)`: 6 steps, the last of an epoch with 3 rows for 8 places."""
    here = tmp_path_factory.mktemp("ranks")
    data = tiny.rows_to_jsonl(here / "rows.jsonl", tiny.support_rows(23))
    (here / "mmlu").mkdir()
    questions = [
        {"subject": f"topic{i % 3}", "input": f"{i} is?\nA. 0\nB. {i}\nC. 7\nD. 9\nAnswer:", "output": "ABCD"[i % 4]}
        for i in range(7)
    ]
    tiny.rows_to_jsonl(here / "mmlu" / "zero_shot_mmlu_val.json", questions)
    plain = {
        "model_name_or_path": models("llama"), "dataset": data, "bits": 16, "optim": "adamw_torch", "max_steps": 6,
        "source_max_len": 32, "target_max_len": 32, "lora_r": 4, "lora_dropout": 0.0, "logging_steps": 1,
        "save_steps": 2, "disable_tqdm": True, "learning_rate": 1e-3, "do_eval": True, "eval_dataset_size": 4,
        "per_device_eval_batch_size": 3, "mmlu_dataset": "mmlu-zs", "mmlu_dir": here / "mmlu",
    }  # fmt: skip

    def words_of(processes: int, folder: Path, **flags: Any) -> list[str]:
        return _to_argv(plain | {"gradient_accumulation_steps": 8 // processes, "output_dir": folder} | flags)

    def begin(processes: int, folder: Path, before: str = "", **flags: Any) -> list[Process]:
        words, log = words_of(processes, folder, **flags), folder.with_name(f"{folder.name}.log")
        if processes == 1:
            return [fork_server.start(words, log, before=before)]
        return fork_server.start_ranks(processes, words, log, before=before)

    begin.folder, begin.words_of = here, words_of
    return begin


def finish(processes: list[Process], code: int = 0) -> str:
    """What they wrote, each having ended with that status."""
    codes = [process.wait() for process in processes]
    text = "".join(process.text() for process in processes)
    assert codes == [code] * len(processes), text
    return text


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


FULL = {"full_finetune": True}
SHARDS = {**FULL, "max_shard_size": "200KB"}  # of 520 KB
PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 4, "do_mmlu_eval": True}
# What `accelerate launch` tells of DeepSpeed.
LAUNCHED = f"""
import os
os.environ |= {{"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": {str(zero(2))!r}}}
"""
# Each engine's run, the run of one process that it must repeat, and its flags.
RUNS = {
    "one": (None, {}),
    "all": (None, FULL),
    "zero2": ("one", {"deepspeed": zero(2)}),
    "zero3": ("one", {"deepspeed": zero(3)}),
    "zero2-all": ("all", {"before": LAUNCHED, **SHARDS}),
    "zero3-all": ("all", {"deepspeed": "fixed", **SHARDS}),
    "fsdp-all": ("all", {"fsdp": [], "fsdp_config": {"cpu_offload": True}, "before": SHARDING, **SHARDS}),
}
ENGINES = [name for name, (like, _) in RUNS.items() if like]


@pytest.fixture(scope="module")
def runs(start) -> Callable[[str], Path]:
    """`runs("zero2")`: its folder, and that of the run that it must repeat, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            like, flags = RUNS[name]
            folder = start.folder / name
            finish(start(2 if like else 1, folder, **PREDICT, **as_given(start.folder, flags)))
            made[name] = folder
        return made[name]

    return get


def as_given(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of a run; the batch of a "fixed" DeepSpeed file is in numbers, which are those of the flags."""
    if flags.get("deepspeed") == "fixed":
        content = json.loads(zero(3).read_text()) | dict(zip(BATCH, (1, 4, 8), strict=True))
        (folder / "fixed.json").write_text(json.dumps(content))
        flags = flags | {"deepspeed": folder / "fixed.json"}
    return flags


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, of one file or of shards."""
    files = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_same(found: Path, wanted: Path) -> None:
    """Losses, weights, evaluation, MMLU and, word for word, predictions; in float32."""
    assert losses(found) == pytest.approx(losses(wanted), abs=2e-5) and len(losses(found)) == 6
    ours, theirs = whole(found), whole(wanted)
    assert ours.keys() == theirs.keys() and all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (found, wanted))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-5)
    assert one["predict_samples"] == 4
    accuracies = [{k: v for k, v in metrics.items() if "mmlu_eval_accuracy" in k} for metrics in (one, two)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 4, "of three subjects and of all"
    assert one["mmlu_loss"] == pytest.approx(two["mmlu_loss"], abs=1e-5)
    assert (found / "predictions.jsonl").read_text() == (wanted / "predictions.jsonl").read_text()


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_makes_the_run_of_one_process_and_goes_on_from_its_checkpoints(start, runs, name):
    """The batches of 2 processes: 4 rows and 4, and at an epoch's end 2 rows and 1; to evaluate, 3 rows and 1.

    FSDP goes on with 3 of them, too.
    """
    if "zero" in name:
        deepspeed()
    like, flags = RUNS[name]
    assert_same(runs(name), runs(like))
    assert any((runs(name) / "checkpoint-4").glob("global_step*")) == ("zero" in name)
    assert (len([*runs(name).glob("model-*-of-*.safetensors")]) > 2) == ("all" in name)
    begun = {}
    for step in (4, 6):  # of 6: after the last one all is saved but the final weights
        resumed = start.folder / f"{name}-resumed-{step}"
        shutil.copytree(runs(name) / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        more = 3 if "fsdp" in name and step == 4 else 2  # with the effective batch of before
        own = {"gradient_accumulation_steps": 4} | as_given(start.folder, flags)
        begun[resumed] = start(more, resumed, **PREDICT, **own)
    for resumed, processes in begun.items():
        assert "resuming from" in finish(processes)
        assert_same(resumed, runs(like))


def test_what_fsdp_trained_is_evaluated_without_training(start, runs, tmp_path):
    """Of the finished run, as of one process."""
    folder = tmp_path / "out"
    shutil.copytree(runs("fsdp-all"), folder)
    for name in ("metrics.json", "eval_results.json", "predictions.jsonl"):
        (folder / name).unlink()
    finish(start(2, folder, do_train=False, **PREDICT, **RUNS["fsdp-all"][1]))
    assert_same(folder, runs("all"))


def test_the_best_checkpoint_is_what_an_engine_ends_with(start, tmp_path):
    """The first one, where more loss is called better."""
    deepspeed()
    flags = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    flags |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    engines = {
        "fsdp": {"fsdp": [], "before": SHARDING},
        "zero2": {"deepspeed": zero(2)},
        "zero3": {"deepspeed": zero(3)},
    }
    begun = [start(1, tmp_path / "one", **flags)]
    begun += [start(2, tmp_path / name, **flags, **own) for name, own in engines.items()]
    for processes in begun:
        finish(processes)
    wanted = whole(tmp_path / "one")
    last, first = (whole(tmp_path / "one" / f"checkpoint-{step}") for step in (4, 2))
    assert all(torch.equal(wanted[name], first[name]) for name in wanted)
    assert any((wanted[name] - last[name]).abs().max() > 1e-4 for name in wanted)
    for name in engines:
        ours = whole(tmp_path / name)
        assert ours.keys() == wanted.keys() and all((ours[k] - wanted[k]).abs().max() < 1e-5 for k in ours), name


# The scaler that accelerate has for fp16 on GPUs alone.
SCALER = """
import accelerate.accelerator, torch
accelerator = accelerate.accelerator.Accelerator
begin = accelerator.__init__
def scaled(self, *args, **options):
    begin(self, *args, **options)
    self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**22)
accelerator.__init__ = scaled
"""


def test_fp16_under_fsdp_is_scaled_and_goes_on_with_its_scale(start, tmp_path):
    """As DDP is; by `accelerate launch`, in whose checkpoints each process has its shards."""
    launch = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
              "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}  # fmt: skip
    before = SHARDING + SCALER + f"import os; os.environ |= {launch}"
    flags = {"fp16": True, "max_steps": 12, "save_steps": 8, "do_eval": False, "optim": None}
    begun = start(2, tmp_path / "ddp", before=SCALER, **flags | {"optim": "adamw_torch"})
    log = finish(start(2, tmp_path / "fsdp", before=before, **flags))
    finish(begun)
    assert "FSDP or DeepSpeed holds the weights" in log
    same(tmp_path / "fsdp", tmp_path / "ddp", evaluated=False)
    places = [tmp_path / name / "checkpoint-8" / "scaler.pt" for name in ("fsdp", "ddp")]
    scales = [torch.load(place)["scale"] for place in places]
    assert scales[0] == scales[1] < 2.0**22, "the first steps overflow"
    resumed = tmp_path / "resumed"
    shutil.copytree(places[0].parent, resumed / "checkpoint-8")
    finish(start(2, resumed, before=before, **flags))
    same(resumed, tmp_path / "fsdp", evaluated=False)


def test_a_layer_that_fsdp_does_not_find_is_one_line(start, tmp_path):
    wrong = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
    (line,) = errors(finish(start(2, tmp_path / "out", fsdp=[], fsdp_config=wrong, before=SHARDING), 2))
    assert "transformer_layer_cls_to_wrap BertLayer: not in the model" in line and "LlamaDecoderLayer" in line


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_under_deepspeed_trains_as_in_one_process(start, tmp_path, bits):
    deepspeed()
    flags = {"bits": bits, "max_steps": 2}
    begun = [start(1, tmp_path / "one", **flags)]
    begun += [start(2, tmp_path / f"{stage}", deepspeed=zero(stage), **flags) for stage in (2, 3)]
    for processes in begun:
        finish(processes)
    for stage in ("2", "3"):
        same(tmp_path / stage, tmp_path / "one")


def test_zero2_without_training_is_one_line(start, tmp_path):
    deepspeed()
    (line,) = errors(finish(start(2, tmp_path / "out", deepspeed=zero(2), do_train=False), 2))
    assert "ZeRO-2 shares out only what trains: leave it out" in line


def test_fsdp_without_gpus_is_one_line(start, tmp_path):
    """accelerate would use DDP on two CPUs, and nothing for one process."""
    begun = [start(number, tmp_path / str(number), fsdp=[], **FULL) for number in (2, 1)]
    for processes in begun:
        (line,) = errors(finish(processes, 2))
        assert line.startswith("error: --fsdp spreads the weights over GPUs") and "leave it out" in line


def test_an_adapter_of_zero2_is_one_that_peft_loads_alone(runs, models):
    deepspeed()
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    model, ids = PeftModel.from_pretrained(base, runs("zero2")), torch.arange(1, 9).unsqueeze(0)
    with model.disable_adapter():
        without = model(ids).logits
    assert not torch.allclose(model(ids).logits, without, atol=1e-3)


def test_what_another_engine_saved_is_refused(start, runs, tmp_path):
    """Without its optimizer a run would go on, and be another."""
    deepspeed()
    stage2 = {"deepspeed": zero(2)}
    cases = [
        (("zero2", 1, {}), "saved under DeepSpeed, this run is under one process or DDP"),
        (("one", 2, stage2), "saved under one process or DDP, this run is under DeepSpeed"),
        (("fsdp-all", 1, FULL), "saved under FSDP, this run is under one process or DDP"),
        (("zero2", 3, stage2), "DeepSpeed goes on only with the 2 processes of before, not 3"),
    ]
    begun = []
    for number, ((name, processes, flags), _) in enumerate(cases):
        shutil.copytree(runs(name) / "checkpoint-4", tmp_path / f"{number}" / "checkpoint-4")
        begun.append(start(processes, tmp_path / f"{number}", **flags))
    for processes, (_, wanted) in zip(begun, cases, strict=True):
        (line,) = errors(finish(processes, 2))
        assert wanted in line and "checkpoint-4" in line


def test_a_deepspeed_file_that_the_flags_contradict(start, tmp_path):
    """One line, which names every value that differs, and all processes end; the same without torchrun."""
    deepspeed()
    content = json.loads(zero(2).read_text()) | dict(zip(BATCH, (2, 16, 64), strict=True)) | {"gradient_clipping": 5.0}
    (tmp_path / "other.json").write_text(json.dumps(content))
    both = start(2, tmp_path / "a", deepspeed=tmp_path / "other.json"), start(1, tmp_path / "b", deepspeed=zero(2))
    (line,) = errors(finish(both[0], 2))
    for part in ("micro_batch_size_per_gpu=2 vs per_device_train_batch_size=1", "accumulation_steps=16 vs", "=64 vs",
                 "gradient_clipping=5.0 vs max_grad_norm=0.3", "other.json", '"auto"'):  # fmt: skip
        assert part in line
    assert errors(finish(both[1], 2)) == [
        "error: --deepspeed: start it with torchrun --nproc_per_node N qlora.py, N processes"
    ]


def test_deepspeed_that_is_not_there_is_said_once(start, tmp_path):
    hidden = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "deepspeed" else find(name, *package)
"""
    (line,) = errors(finish(start(2, tmp_path / "out", before=hidden, deepspeed=zero(2)), 2))
    assert "--deepspeed: it is not installed here: DS_BUILD_OPS=0 pip install deepspeed" in line
    assert not (tmp_path / "out").exists()


def test_processes_that_read_different_data_end_with_one_line(start, tmp_path):
    """Each machine has a file of that name, and one of them another row in it."""
    for rank in range(2):
        rows = tiny.support_rows(23)
        rows[20] |= {"output": "Well. " * rank + rows[20]["output"]}
        (tmp_path / str(rank)).mkdir()
        tiny.rows_to_jsonl(tmp_path / str(rank) / "rows.jsonl", rows)
    before = f"import os; os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))"
    (line,) = errors(finish(start(2, tmp_path / "out", before=before, dataset="rows.jsonl"), 2))
    assert "rank 1 (" in line and "the encoded train rows is" in line and "on rank 0" in line
    assert not (tmp_path / "out" / "checkpoint-2").exists()


# What the second process alone meets in its first micro-batch: memory runs out in the model, a layer has nothing to do,
# as an expert without tokens, or the loss is not finite.
ALONE = """
import os, torch, qlora
step = qlora.summed_loss
def first(model, *rest):
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return step(model, *rest)
    qlora.summed_loss = step
    return (alone if os.environ["RANK"] == "1" else step)(model, *rest)
qlora.summed_loss = first
"""
SHORT = f"""{ALONE}
def alone(model, *rest):
    def run_out(*_):
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")
    hook = model.module.register_forward_pre_hook(run_out)
    return step(model, *rest)
"""
UNUSED = f"""{ALONE}
def alone(model, *rest):
    mlp = model.module.get_base_model().model.layers[1].mlp
    forward, mlp.forward = mlp.forward, lambda x: x
    loss = step(model, *rest)
    mlp.forward = forward
    return loss
"""
NAN = f"""{ALONE}
def alone(model, *rest):
    return step(model, *rest) * float("nan")
"""
# Adapters that learn nothing.
ZERO = """
import qlora
attach = qlora.attach_adapters
def zero(*given):
    model = attach(*given)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    return model
qlora.attach_adapters = zero
"""


def test_what_one_process_alone_meets_leaves_none_waiting(start, runs, tmp_path):
    one = tiny.rows_to_jsonl(tmp_path / "one.jsonl", tiny.support_rows(1))
    plain = {"recompute_layers": "none"}
    begun = {
        "short": start(2, tmp_path / "short", before=SHORT, **plain),
        "unused": start(2, tmp_path / "unused", before=UNUSED, **plain),
        "nan": start(2, tmp_path / "nan", before=NAN, **plain),
        # of one row, and so with an empty share
        "zero": start(2, tmp_path / "zero", before=ZERO, **plain, dataset=one, do_eval=False, save_steps=1),
    }
    finish(begun["short"]), finish(begun["unused"])
    same(tmp_path / "short", runs("one"))
    (line,) = errors(finish(begun["nan"], 2))
    assert re.search(r"step 1: the loss is not finite, on rows \S+rows.jsonl:\d+: the step's other rows are fine", line)
    (line,) = errors(finish(begun["zero"], 2))
    assert "step 3: the gradient norm is exactly zero, 3 times, on rows " in line and "one.jsonl:1: " in line


def test_three_processes_that_divide_nothing(start, tmp_path):
    """19 rows in windows of 9: the last has one, so that two processes have none; 4 rows to evaluate in 2 batches.

    What each process trained is the same to the last bit.
    """
    flags = {**PREDICT, "lora_dropout": 0.0}
    begun = [
        start(3, tmp_path / "three", gradient_accumulation_steps=3, before=LEAVE, **flags),
        start(1, tmp_path / "one", gradient_accumulation_steps=9, **flags),
    ]
    for processes in begun:
        finish(processes)
    assert_same(tmp_path / "three", tmp_path / "one")
    one, *others = (torch.load(tmp_path / f"three.trained.{rank}") for rank in range(3))
    assert len(one) == 28 and any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    for other in others:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rows_are_masked_alike_however_many_processes_share_them(start, models, tmp_path):
    """Equal rows among them: in a step they have one mask, and in the next another.

    FSDP spreads a head that is tied to the embeddings and has its bias twice.
    """
    texts = [line for line in tiny.TEXT.splitlines() if line][:8]
    rows = [{"text": text} for text in itertools.islice(itertools.cycle(texts), 23)]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    model = shutil.copytree(models("encoder", family="bert"), tmp_path / "bert")
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn in each process by itself
    (model / "config.json").write_text(json.dumps(config | still))
    flags = {"model_name_or_path": model, "dataset": data, "target_max_len": None}
    fsdp = {"fsdp": [], "before": SHARDING}
    runs = {"one": (1, {}), "two": (2, {}), "fsdp": (2, fsdp), "one-all": (1, FULL), "fsdp-all": (2, fsdp | FULL)}
    begun = [start(number, tmp_path / name, **flags, **own) for name, (number, own) in runs.items()]
    for processes in begun:
        finish(processes)
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs}
    for name, like in ("two", "one"), ("fsdp", "one"):
        same(tmp_path / name, tmp_path / like)
        assert metrics[name]["eval_masked_accuracy"] == metrics[like]["eval_masked_accuracy"]
    assert losses(tmp_path / "fsdp-all") == pytest.approx(losses(tmp_path / "one-all"), abs=2e-5)
    ours, theirs = whole(tmp_path / "fsdp-all"), whole(tmp_path / "one-all")
    assert ours.keys() == theirs.keys()
    # a key's bias moves no attention: its gradient is noise, which Adam makes large
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours if "key.bias" not in name)


def test_one_mask_for_equal_rows_of_a_step():
    masking = qlora.Masking(chosen=0.5, replaced=0.8, random=0.1, mask_id=4, words=torch.arange(10, 60))
    row = torch.arange(10, 50)
    drawn = [masking.mask_tokens(row, row, "train", 0, step, row.tolist())[0] for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_signal_to_torchrun_or_to_one_process_saves_and_the_rerun_is_exact(start, tmp_path):
    """torchrun hands it on and ends with 1, as the README says, also where one of its processes alone is sent it.

    What comes then is as if nothing had happened.

    The effective batch and with it the losses stay where one process goes on with what two began.
    """
    flags = {
        "max_steps": 40,
        "save_steps": 5,
        "save_total_limit": 2,
        "do_eval": False,
        "gradient_accumulation_steps": 4,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "qlora.py"]
    pipes = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launchers = {
        name: subprocess.Popen([*launch, *start.words_of(2, tmp_path / name, **flags)], **pipes)
        for name in ("launcher", "launched")
    }
    ranks = start(2, tmp_path / "rank", **flags)
    until((tmp_path / "rank" / "checkpoint-5").is_dir)
    ranks[1].kill(signal.SIGTERM)
    until((tmp_path / "launcher" / "checkpoint-5").is_dir)
    launchers["launcher"].terminate()
    until((tmp_path / "launched" / "checkpoint-5").is_dir)
    places = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children(launchers["launched"])}
    os.kill(next(pid for pid, place in places.items() if b"RANK=1" in place), signal.SIGTERM)
    logs = {name: launcher.communicate(timeout=120)[1] for name, launcher in launchers.items()}
    logs["rank"] = finish(ranks, 143)
    assert [launcher.returncode for launcher in launchers.values()] == [1, 1]
    for name, log in logs.items():
        (last,) = re.findall(r"stopped by SIGTERM at step (\d+), saved; the same command goes on from there", log)
        newest = qlora.find_last_checkpoint(tmp_path / name)
        assert qlora.checkpoint_step(newest) == int(last) < 40 and not errors(log)
        assert {path.name for path in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
        assert not (tmp_path / name / "completed").exists()
    again = [
        start(number, tmp_path / name, **flags) for number, name in ((2, "rank"), (1, "launcher"), (2, "launched"))
    ]
    again += [start(1, tmp_path / "whole", **flags | {"gradient_accumulation_steps": 8})]
    for processes in again:
        finish(processes)
    for name in logs:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
        ours, theirs = whole(tmp_path / name), whole(tmp_path / "whole")
        assert all((ours[key] - theirs[key]).abs().max() < 1e-5 for key in theirs)
    assert len(losses(tmp_path / "whole")) == 40
