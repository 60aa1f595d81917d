"""Runs with random flags that are killed and resumed with others: scripts/selftest.py has the checks."""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import selftest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and a dataset, as the self-test writes them."""
    folder = tmp_path_factory.mktemp("random")
    selftest.write_inputs(folder)
    return folder


@pytest.mark.parametrize("seed", [3, 9])  # of four starts each
def test_random_runs_keep_to_their_flags(folder, seed):
    selftest.check_random_runs(folder, seed)


@pytest.mark.slow
def test_many_random_runs_keep_to_their_flags(folder):
    """QLORA_RUNS of them, by default 30; QLORA_SEED repeats one."""
    seeds = [int(os.environ["QLORA_SEED"])] if "QLORA_SEED" in os.environ else random.sample(range(10**6), 30)
    for seed in seeds[: int(os.environ.get("QLORA_RUNS", 30))]:
        print(f"seed {seed}: {selftest.check_random_runs(folder, seed)}")
