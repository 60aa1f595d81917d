"""The notebooks of examples/, executed in a kernel on a tiny model."""

import json
import os

import pytest
from conftest import ROOT, extra

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def cell_outputs(book) -> list[str]:
    """What each code cell printed, and the MIME types of what it displayed."""
    texts = []
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        streams = [out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"]
        types = [mime for out in cell.outputs if "data" in out for mime in out.data]
        texts.append("".join([*streams, *types]))
    return texts


@pytest.mark.ci
def test_fine_tuning_then_inference(models, tmp_path, monkeypatch):
    nbformat, nbclient = extra("nbformat"), extra("nbclient")
    extra("ipykernel")
    settings = {"MODEL": models("llama"), "STEPS": "2", "OUTPUT": tmp_path / "run", "CACHE": tmp_path / "cache"}
    environment = os.environ | {f"NOTEBOOK_{name}": str(value) for name, value in settings.items()}
    texts = {}
    for name in ("finetune", "inference"):
        book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
        client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}})
        client.execute(env=environment | {"OMP_NUM_THREADS": "1"})
        texts[name] = cell_outputs(book)
    setup, data, _training, chart, answers = texts["finetune"]
    assert setup == "" and data.startswith("Customer: ")
    assert (tmp_path / "run" / "completed").exists()
    assert "image/png" in chart
    assert "loss on held-out questions: " in answers and " of 8\n" in answers
    setup, base, france, italy, tuned = texts["inference"]
    assert base.startswith(("LlamaForCausalLM cpu", "LlamaForCausalLM cuda"))
    assert france.strip() and italy.strip()  # random weights give some text
    assert "no finished run" not in tuned and tuned.endswith("\n")
