"""The suite's own machinery: GPU tests that did not run, or ran out of memory, never pass for tests that passed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import hypothesis
import pytest
import torch

import conftest
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
from pathlib import Path
import conftest_of_packops as base
from conftest_of_packops import *

base.HERE = Path(__file__).resolve().parent / "tests"
base.why_no_gpu = lambda: None
base.gpu_record.FEWEST_TESTS = 1
base.gpu_record.PATH = Path("record.json")
base.gpu_record.environment = lambda: {
    "device": "pretended", "compute_capability": "9.0", "built_for": BUILT_FOR, "torch": "0", "driver": "0", "date": "today"
}
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
    assert result.outlines[-1].startswith("GPU record: ")
    result = suite.runpytest_subprocess("tests", "--gpu-record", "record.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gpu-record: no CUDA device, so there is nothing to record"])


def pretend(suite, built_for="9.0"):
    suite.makeconftest(PRETEND.replace("BUILT_FOR", repr(built_for)))


def record_of(suite, build="card"):
    return json.loads((suite.path / "record.json").read_text())["tests"][build]


def test_record_of_a_run(suite):
    pretend(suite)
    result = suite.runpytest_subprocess("tests", "--gpu-record", "record.json")
    result.assert_outcomes(passed=2, skipped=1, failed=2)
    result.stdout.fnmatch_lines(["1 GPU tests ran OUT OF MEMORY and proved nothing."])
    part = record_of(suite)
    assert part["gpu"] == {"passed": 1, "failed": 1, "skipped": 0, "out_of_memory": 1}
    assert part["cpu"] == {"passed": 1, "failed": 1, "skipped": 0, "out_of_memory": 0}
    assert part["selection"] == "everything"
    assert part["environment"]["device"] == "pretended"
    assert result.outlines[-1].endswith("as built for the card: GPU tests as built for the card: 1 failed; "
                                        "GPU tests as built for the card: 1 out of memory")  # fmt: skip


def test_a_build_from_ptx_is_a_part_of_its_own(suite):
    """The second run is in two processes, if there is xdist to start them."""
    suite.path.joinpath("tests", "test_suite.py").write_text("def test_both(device): pass")
    parallel = ("-n", "2", "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    for built_for, processes in (("9.0", ()), ("8.0+PTX", parallel)):
        pretend(suite, built_for)
        result = suite.runpytest_subprocess("tests", "-m", "gpu", *processes, "--gpu-record", "record.json")
        assert result.ret == pytest.ExitCode.OK, result.outlines
    for build in ("card", "ptx"):
        assert record_of(suite, build)["gpu"]["passed"] == 1
        assert record_of(suite, build)["selection"] == "everything"


SKIP = "import pytest\n@pytest.mark.gpu\ndef test_a(): pytest.skip({reason!r})\n@pytest.mark.gpu\ndef test_b(): pass\n"


def test_a_gpu_test_that_was_skipped_needs_an_excuse(suite):
    reason = "transformers is not installed"
    pretend(suite)
    suite.path.joinpath("tests", "test_suite.py").write_text(SKIP.format(reason=reason))
    result = suite.runpytest_subprocess("tests", "--gpu-record", "record.json")
    result.assert_outcomes(passed=1, skipped=1)
    assert record_of(suite)["skips"] == {reason: 1}
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert f"1 skipped: {reason}" in result.outlines[-1]


PARTIAL = {
    "keyword": (["tests", "-k", "both"], "-k both"),
    "mark": (["tests", "-m", "gpu and not slow"], "-m gpu and not slow"),
    "one test": (["tests/test_suite.py::test_both"], "tests/test_suite.py::test_both"),
    "one file": (["tests/test_suite.py"], "tests/test_suite.py"),
    "another folder of that name": (["elsewhere/tests"], "elsewhere/tests"),
    "deselected": (["tests", "--deselect", "tests/test_suite.py::test_b"], "--deselect tests/test_suite.py::test_b"),
    "ignored": (["tests", "--ignore", "tests/test_other.py"], "--ignore tests/test_other.py"),
    "ignored by a pattern": (["tests", "--ignore-glob", "*other*"], "--ignore-glob *other*"),
    "what failed last": (["tests", "--lf"], "--lf"),
    "up to a failure": (["tests", "-x"], "--maxfail 1"),
    "step by step": (["tests", "--stepwise"], "--stepwise"),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_what_is_a_partial_run(suite, monkeypatch, case):
    arguments, selection = PARTIAL[case]
    suite.mkpydir("elsewhere").joinpath("tests").mkdir()
    monkeypatch.setattr(conftest, "HERE", suite.path / "tests")
    assert conftest.selection_of(suite.parseconfig(*arguments)) == selection
    for whole in (["tests"], [str(suite.path / "tests")], ["tests", "-m", "gpu"], ["tests", "-m", "gpu", "-q", "--ff"]):
        assert conftest.selection_of(suite.parseconfig(*whole)) == ""


def test_a_partial_run_says_so_and_fails(suite):
    pretend(suite)
    suite.path.joinpath("tests", "test_suite.py").write_text("def test_both(device): pass")
    result = suite.runpytest_subprocess("tests", "-x", "--gpu-record", "record.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.outlines[-1].endswith("a partial run: --maxfail 1")


def test_a_whole_run_on_a_gpu_fails_beside_a_stale_record(suite):
    """A part of it does not: someone is at work."""
    pretend(suite)
    suite.path.joinpath("tests", "test_suite.py").write_text("def test_both(device): pass\n")
    suite.path.joinpath("record.json").write_text(json.dumps({"csrc_sha256": "0" * 64}))
    result = suite.runpytest_subprocess("tests")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "speaks of other sources" in result.outlines[-1]
    assert suite.runpytest_subprocess("tests", "-k", "both").ret == pytest.ExitCode.OK


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


def test_examples_follow_from_the_commit_or_a_variable(suite, monkeypatch, request):
    commits = iter(["1" * 40, "2" * 40])
    monkeypatch.delenv("PACKOPS_TEST_SEED", raising=False)
    monkeypatch.setattr(conftest.gpu_record, "_run", lambda *command: next(commits))
    assert [conftest.example_seed() for _ in "ab"] == [0x11111111, 0x22222222]
    monkeypatch.setenv("PACKOPS_TEST_SEED", "7")
    config = suite.parseconfig("tests")
    conftest.choose_seed(config)
    assert config.option.hypothesis_seed == "7"
    assert "seed 7; PACKOPS_TEST_SEED=7 tries" in conftest.pytest_report_header(config)
    # What hypothesis itself has read, in this run: the option came before it looked.
    assert hypothesis.core.global_force_seed == int(request.config.option.hypothesis_seed)
