"""What every test shares: the ``device`` fixture, fixed seeds, what happens without a GPU, and the GPU record.

``device`` is a :class:`torch.device`, once ``cpu`` and once ``cuda``; a test that takes it therefore runs on both. Tests that
make sense on a GPU alone carry ``@pytest.mark.gpu`` and use ``torch.device("cuda")``; ``@pytest.mark.large(gib=30)`` beside it
skips them where less device memory is free.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # as it is for a benchmark run as a program
sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file, under any import mode
import gpu_record

HERE = Path(__file__).resolve().parent

# No wall time decides a test. Examples follow from a seed alone, and every commit has one of its own: a red run is red
# everywhere, and yet not the same examples are tried for ever.
hypothesis.settings.register_profile("packops", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("packops")
SEED = "PACKOPS_TEST_SEED"

OUT_OF_MEMORY = "CUDA ran out of memory"


def own_compile_cache() -> None:
    """torch keeps compiled graphs on disk by the names of their ops, not by what these return: other code has another cache."""
    code = hashlib.sha256(gpu_record.current_digest().encode() + gpu_record.python_digests()["python/packops"].encode())
    folder, stamp = gpu_record.ROOT / "build" / "inductor", code.hexdigest()
    if not (folder / stamp).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / stamp).touch()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # workers of pytest-xdist have that of the first process
    own_compile_cache()


def pytest_addoption(parser):
    parser.addoption(
        "--gpu-record",
        metavar="FILE",
        type=Path,
        help="write what the GPU tests showed to FILE; without a GPU, or with a build without CUDA kernels, this is an error",
    )


def why_no_gpu() -> str | None:
    """None if GPU tests can run here, else the reason why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    import packops

    if not packops.has_cuda:
        return "packops was built without CUDA kernels"
    return None


def example_seed() -> int:
    """``$PACKOPS_TEST_SEED``, or a number that follows from the commit."""
    if os.environ.get(SEED):
        return int(os.environ[SEED])
    return int(gpu_record._run("git", "rev-parse", "HEAD")[:8] or "0", 16)


def choose_seed(config) -> None:
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = str(example_seed())


def pytest_report_header(config):
    seed = config.getoption("hypothesis_seed", None)
    return f"examples of hypothesis: seed {seed}; {SEED}={seed} tries the same ones again"


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its seed
def pytest_configure(config):
    global _config  # a report does not know its run's
    _config = config
    choose_seed(config)
    config.packops_no_gpu = why_no_gpu()
    config.packops_outcomes = {"gpu": Counter(), "cpu": Counter()}
    config.packops_skips = Counter()  # of GPU tests, by reason
    if config.getoption("--gpu-record") and config.packops_no_gpu:
        raise pytest.UsageError(f"--gpu-record: {config.packops_no_gpu}, so there is nothing to record")


def pytest_collection_modifyitems(config, items):
    if config.packops_no_gpu:
        skip = pytest.mark.skip(reason=f"needs a GPU: {config.packops_no_gpu}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
        return
    found = torch.cuda.device_count()
    for item in items:
        if "large" in item.keywords and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group("large"))  # with --dist loadgroup, one after the other
        marker = item.get_closest_marker("multigpu")
        needed = marker.kwargs.get("count", 2) if marker else 0
        if needed > found:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs: found {found}"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed(request):
    """The same random numbers in every run of a test, others in every test."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def one_thread():
    """For problems so small that handing them to other threads takes longer than solving them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("large")
    if marker is None or "gpu" not in item.keywords or item.config.packops_no_gpu:
        return
    gib = marker.kwargs.get("gib", 24)
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory, found {free / 2**30:.0f}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A GPU that is too small, or shared, is no failure of packops: such a test is skipped, and counted on its own."""
    report = (yield).get_result()
    if call.excinfo is not None and call.excinfo.errisinstance(torch.cuda.OutOfMemoryError) and "gpu" in item.keywords:
        report.outcome = "skipped"
        path, line, _ = item.location
        report.longrepr = (path, (line or 0) + 1, f"Skipped: {OUT_OF_MEMORY}")
        call.excinfo = None  # its traceback holds the tensors
    is_over = report.when == "teardown" and torch.cuda.is_initialized()
    if is_over and (report.skipped or torch.cuda.memory_reserved() > 2**30):  # other processes may want what this one keeps
        gc.collect()
        torch.cuda.empty_cache()


def outcome_of(report) -> str | None:
    """``passed``, ``failed``, ``skipped`` or ``out_of_memory`` for the one phase of a test that decides, else None."""
    if report.skipped and isinstance(report.longrepr, tuple) and OUT_OF_MEMORY in report.longrepr[2]:
        return "out_of_memory"
    if report.failed:
        return "failed"
    if report.skipped:
        return "skipped"
    return "passed" if report.when == "call" else None


def reason_of(report) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "expected to fail" if hasattr(report, "wasxfail") else str(report.longrepr)


def pytest_runtest_logreport(report):
    outcome = outcome_of(report)
    if outcome:
        where = "gpu" if "gpu" in report.keywords else "cpu"
        _config.packops_outcomes[where][outcome] += 1
        if (where, outcome) == ("gpu", "skipped"):
            _config.packops_skips[reason_of(report)] += 1


def pytest_terminal_summary(terminalreporter, config):
    gpu = config.packops_outcomes["gpu"]
    if gpu["skipped"] and config.packops_no_gpu:
        terminalreporter.section("GPU tests that did not run", sep="!", red=True, bold=True)
        terminalreporter.line(
            f"{gpu['skipped']} GPU tests were SKIPPED ({config.packops_no_gpu}). They proved nothing about the CUDA kernels. "
            "`make test-gpu` on a machine with a GPU runs them."
        )
    if gpu["out_of_memory"]:
        terminalreporter.section("GPU tests that ran out of memory", sep="!", red=True, bold=True)
        terminalreporter.line(f"{gpu['out_of_memory']} GPU tests ran OUT OF MEMORY and proved nothing.")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Write the record, and fail a run whose record is partial, or a whole run on a GPU beside a record that is stale."""
    config = session.config
    config.packops_last_line = None
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    path, selection = config.getoption("--gpu-record"), selection_of(config)
    if path:
        build, record = gpu_record.merge_tests(path, config.packops_outcomes, config.packops_skips, selection)
        found = gpu_record.problems(path, (build,))
        config.packops_last_line = f"GPU record: {path}: {record['tests'][build]['gpu']} {gpu_record.BUILDS[build]}" + (
            f": {'; '.join(found)}" if found else ""
        )
    else:
        found = [] if config.packops_no_gpu or selection else gpu_record.problems(gpu_record.PATH)
        if found or not selection or config.packops_outcomes["gpu"]["skipped"]:
            config.packops_last_line = gpu_record.describe(gpu_record.PATH)
    if found and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """After everything else, so that it is the last line."""
    if getattr(config, "packops_last_line", None):
        config.get_terminal_writer().line(config.packops_last_line)


def selection_of(config) -> str:
    """How this run was narrowed down, so that a partial run never passes for a whole one; "" for all that a GPU is needed for."""
    option = config.option
    parts = [f"-k {option.keyword}"] if option.keyword else []
    parts += [f"-m {option.markexpr}"] if option.markexpr not in ("", "gpu") else []
    for name in ("deselect", "ignore", "ignore_glob"):
        parts += [f"--{name.replace('_', '-')} {value}" for value in getattr(option, name, None) or []]
    for name in ("lf", "stepwise", "stepwise_skip", "setuponly", "setupplan"):
        parts += [f"--{name.replace('_', '-')}"] if getattr(option, name, False) else []
    parts += [f"--maxfail {option.maxfail}"] if option.maxfail else []
    here = config.invocation_params.dir
    if [(here / argument).resolve() for argument in config.args] != [HERE]:
        parts += [str(argument) for argument in config.args]
    return " ".join(parts)


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def fused(request, monkeypatch):
    """A patched Hugging Face model without logits where nobody wants them, and with them, as where the lm_head has LoRA."""
    from packops.hf import forward

    if not request.param:
        monkeypatch.setattr(forward, "is_plain_linear", lambda head: False)
    return request.param
