"""The suite's own machinery: GPU tests that did not run, or ran out of memory, never pass for tests that passed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import packops

pytest_plugins = ["pytester"]

SUITE = """
import pytest, torch

def test_both(device):
    assert device.type in ("cpu", "cuda")

@pytest.mark.gpu
def test_too_large():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")

@pytest.mark.gpu
def test_wrong():
    assert False

def test_out_of_memory_on_the_cpu_is_a_failure():
    raise torch.cuda.OutOfMemoryError("not on a GPU")
"""

PRETEND = """
import conftest_of_packops as base
from conftest_of_packops import *

base.why_no_gpu = lambda: None
base.gpu_record.environment = lambda: {"device": "pretended", "torch": "0", "driver": "0", "date": "today"}
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """A small suite under this one's conftest.py."""
    here = Path(__file__).parent
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  large\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(Path(packops.__file__).parents[1])]))
    pytester.makepyfile(conftest_of_packops=(here / "conftest.py").read_text())
    pytester.mkdir("tests").joinpath("test_suite.py").write_text(SUITE)
    return pytester


def test_without_a_gpu(suite):
    suite.makeconftest(
        "import conftest_of_packops as base\nfrom conftest_of_packops import *\nbase.why_no_gpu = lambda: 'no CUDA device'"
    )
    result = suite.runpytest_subprocess("tests")
    result.assert_outcomes(passed=1, skipped=3, failed=1)
    result.stdout.fnmatch_lines(
        ["*GPU tests that did not run*", "3 GPU tests were SKIPPED (no CUDA device). They proved nothing*"]
    )
    result = suite.runpytest_subprocess("tests", "--gpu-record", "record.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gpu-record: no CUDA device, so there is nothing to record"])


def test_record_of_a_run(suite):
    suite.makeconftest(PRETEND)
    result = suite.runpytest_subprocess("tests", "--gpu-record", "record.json")
    result.assert_outcomes(passed=2, skipped=1, failed=2)
    result.stdout.fnmatch_lines(["1 GPU tests ran OUT OF MEMORY and proved nothing."])
    record = json.loads((suite.path / "record.json").read_text())
    assert record["tests"]["gpu"] == {"passed": 1, "failed": 1, "skipped": 0, "out_of_memory": 1}
    assert record["tests"]["cpu"] == {"passed": 1, "failed": 1, "skipped": 0, "out_of_memory": 0}
    assert record["tests"]["selection"] == "everything"
    suite.runpytest_subprocess("tests", "-k", "both", "--gpu-record", "record.json")
    record = json.loads((suite.path / "record.json").read_text())
    assert record["tests"]["selection"] == "-k both"


def test_every_test_has_a_seed_of_its_own(suite):
    suite.makeconftest("from conftest_of_packops import *\nfrom conftest_of_packops import _seed")
    suite.path.joinpath("tests", "test_suite.py").write_text(
        "import torch, numpy, random\n"
        "def show(): print('drew', torch.rand(()).item(), numpy.random.rand(), random.random())\n"
        "def test_a(): show()\n"
        "def test_b(): show()\n"
    )
    runs = [[line for line in suite.runpytest_subprocess("-s", "tests").outlines if "drew" in line] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2
    first, second = (line.split("drew")[1].rstrip(".") for line in runs[0])
    assert first != second


def test_device_is_a_torch_device(device):
    assert isinstance(device, torch.device)
