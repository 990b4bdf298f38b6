"""The sanitizer driver never takes a broken run for a clean one."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

import gpu_record
import sanitize
import sanitizer
from op_table import kernels, ops_called_by

CLEAN = "case a: x\ncase a: y\n2 cases ran on NVIDIA H200\n========= ERROR SUMMARY: 0 errors\n"


RACES = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)")
LOGS = {
    "clean": (CLEAN, 0, 0, 2),
    "clean, but it failed": (CLEAN, 99, -1, 2),
    "errors": (CLEAN.replace("0 errors", "3 errors"), 99, 3, 2),
    "no hazards": (RACES.format(0, 0, 0), 0, 0, 2),
    "no hazards, but it failed": (RACES.format(0, 0, 0), 99, -1, 2),
    "a hazard": (RACES.format(1, 1, 0), 99, 1, 2),
    "no summary": (CLEAN.replace("========= ERROR SUMMARY: 0 errors", ""), 0, -1, 2),
    "died between two cases": (CLEAN.replace("2 cases ran on NVIDIA H200\n", ""), 0, -1, 2),
    "no device": ("========= Error: Device not supported\n", 1, -1, 0),
}


@pytest.mark.parametrize("case", LOGS)
def test_read_log(case):
    text, status, errors, cases = LOGS[case]
    assert sanitizer.read_log(text, status) == {"errors": errors, "cases": cases}


RING = "packops::<unnamed>::resident_kernel<float, (int)0, (bool)0>(packops::CeLossParams, int)"
READER = f"Read access at void {RING}+0x10"
WRITER = f"Write access at void {RING}+0x90"
COPY = "Write access at packops::cp_async_bulk(void *, const void *, unsigned int, unsigned long *)+0x15b0 in ptx.cuh:96"
READ_OF_COPY = COPY.replace("Write", "Read")
HELPER = "Read access at packops::<unnamed>::RowMaths<float, (int)0>::transform_at(const float *, long) const+0x40 in ptx.cuh:2"
ELSEWHERE = "Read access at void packops::<unnamed>::attention_kernel<float>(packops::AttentionParams)+0x10"
PLACE = "packops::<unnamed>::resident_kernel"
SMALL_COPY = "Write access at packops::cp_async_4_zfill(void *, const void *, bool)+0x18f20 in ptx.cuh:71"
KEYS = "packops::<unnamed>::long_split_kernel"
OF_KEYS = f"Read access at void {KEYS}<packops::half_t, (int)128>(packops::AttentionParams)+0x13c80"


HAZARDS = {
    "a copy and its reader": ([(COPY, READER)], 0, {PLACE: 1}),
    "the other way round": ([(READER, COPY, COPY)], 0, {PLACE: 1}),
    "two readers": ([(COPY, READER, HELPER)], 0, {PLACE: 1, "ptx.cuh: #pragma once": 1}),
    "twice": ([(COPY, READER), (COPY, READER)], 0, {PLACE: 2}),
    "a race beside one": ([(READER, COPY), (READER, WRITER)], 1, {PLACE: 1}),
    "a race in one of two": ([(READER, COPY, WRITER)], 1, {}),
    "who writes does not read": ([(COPY, WRITER)], 1, {}),
    "two copies": ([(COPY, COPY)], 1, {}),
    "a copy that reads": ([(READ_OF_COPY, READER)], 1, {}),
    "another kernel": ([(COPY, ELSEWHERE)], 1, {}),
    "one access alone": ([(COPY,)], 1, {}),
    "a copy of four bytes": ([(SMALL_COPY, OF_KEYS)], 0, {KEYS: 1}),
    "a copy in another ring's kernel": ([(SMALL_COPY, READER)], 1, {}),
    "copies of two kinds": ([(COPY, SMALL_COPY, OF_KEYS)], 1, {}),
    "a copy of another name": ([(COPY.replace("cp_async_bulk", "sink_cp_async_bulk"), READER)], 1, {}),
}


def log_of(hazards, level="Error") -> str:
    log = "case a: x\n1 cases ran on NVIDIA H100\n"
    for first, *others in hazards:
        log += f"========= {level}: Race reported between {first}\n"
        log += "".join(f"=========     and {other} [8 hazards]\n" for other in others) + "========= \n"
    errors, warnings = (len(hazards), 0) if level == "Error" else (0, len(hazards))
    return log + f"========= RACECHECK SUMMARY: {len(hazards)} hazards displayed ({errors} errors, {warnings} warnings)\n"


@pytest.mark.parametrize("case", HAZARDS)
def test_hazards_of_copies_are_counted_apart(case):
    hazards, errors, places = HAZARDS[case]
    log = log_of(hazards)
    assert sanitizer.read_log(log, 99) == {"errors": errors, "cases": 1, **({"excused": places} if places else {})}
    # Hazards that are counted but not shown are not excused.
    assert sanitizer.read_log(log.replace(f"SUMMARY: {len(hazards)}", "SUMMARY: 9"), 99)["errors"] == 9
    # And what is excused has one exit status: the sanitizer's own.
    if errors == 0:
        assert all(sanitizer.read_log(log, status)["errors"] == -1 for status in (0, 1, 134, -11))


def test_excused_warnings_may_leave_the_status_as_it_is():
    log = log_of([(COPY, READER)], "Warning")
    for status in (0, 99):
        assert sanitizer.read_log(log, status) == {"errors": 0, "cases": 1, "excused": {PLACE: 1}}
    assert sanitizer.read_log(log, 1)["errors"] == -1


def test_a_thousand_excused_hazards_are_no_clean_record(tmp_path, monkeypatch):
    """Each is excusable; their number is not what the record expects."""
    result = sanitizer.read_log(log_of([(COPY, READER)] * 1000), 99)
    assert result["errors"] == 0
    part = {"environment": {"built_for": "9.0", "compute_capability": "9.0"}, "planted": dict.fromkeys(sanitize.TOOLS, True)}
    tools = {tool: {"errors": 0, "cases": 280} for tool in sanitize.TOOLS}
    monkeypatch.setattr(gpu_record, "EXCUSED_HAZARDS", {PLACE: 56})
    for count, problems in ((56, 0), (1000, 1)):
        tools["racecheck"]["excused"] = {PLACE: count}
        assert len(gpu_record._problems_of_sanitizer({**part, "tools": tools})) == problems


@pytest.mark.parametrize("copy", sanitizer.RINGS)
def test_the_excuse_names_what_there_is(copy):
    """The copies' and the kernels' names, which a renaming would turn into an excuse for nothing."""
    csrc = gpu_record.ROOT / "csrc"
    assert re.search(rf"\bvoid {copy}\(", (csrc / "common" / "ptx.cuh").read_text())
    kernels = "".join(path.read_text() for path in csrc.glob("*.cu*"))
    assert all(f" {name}(" in kernels for name in (copy, *sanitizer.RINGS[copy]))


OF = "void packops::<unnamed>::{}<float, (bool)0>(packops::RmsNormParams, packops::RmsNormLaunch)+0x90 in rms_norm.cu:28"
FRAMES = "\n=========     by thread (0,0,0) in block (0,0,0)\n=========         Device Frame: "
BARRIER = "========= Barrier error detected. {}.\n=========     at void packops::team_sum<(int)1>(float *)+0x90" + FRAMES
SAID = {
    "rows are written 2^32 rows further on": (
        "========= Invalid __global__ write of size 16 bytes\n=========     at store_streaming(void *)+0x10 in vec.cuh:9",
        FRAMES,
        OF.format("rms_norm_kernel"),
    ),
    "sums are read before they are written": (
        "========= Error: Race reported between Write access at ",
        OF.format("team_sum"),
        "\n=========     and Read access at " + OF.format("team_sum"),
    ),
    "a thread waits for others than itself": (BARRIER.format("Invalid arguments"), OF.format("rms_norm_kernel")),
    "a block's share of the weight's gradient is not written": (
        "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at add_partials<float>()+0x1 in a.cuh:9",
        FRAMES,
        OF.format("weight_gradient_kernel"),
    ),
}


def test_each_tool_has_an_error():
    assert {planted.tool for planted in sanitizer.PLANTED.values()} == set(sanitize.TOOLS)
    assert set(SAID) == set(sanitizer.PLANTED)


@pytest.mark.parametrize("name", sanitizer.PLANTED)
def test_what_counts_as_found(name):
    said = "".join(SAID[name])
    assert sanitizer.found_planted(name, said, 99)
    assert not sanitizer.found_planted(name, said, 0)
    assert not sanitizer.found_planted(name, said, None)  # it had to be stopped
    assert not sanitizer.found_planted(name, re.sub(r"team_sum|\w+_kernel", "other", said), 99)
    assert not any(sanitizer.found_planted(name, "".join(SAID[other]), 99) for other in SAID if other != name)
    assert not sanitizer.found_planted(name, "========= ERROR SUMMARY: 0 errors", 99)


@pytest.mark.parametrize("name", sanitizer.PLANTED)
def test_errors_can_be_planted(name, tmp_path):
    csrc = shutil.copytree(gpu_record.ROOT / "csrc", tmp_path / "csrc")
    before = (csrc / "rms_norm.cu").read_text()
    sanitizer.PLANTED[name].plant(csrc)
    assert (csrc / "rms_norm.cu").read_text() != before


def test_an_error_whose_place_is_gone_is_not_planted(tmp_path):
    (tmp_path / "rms_norm.cu").write_text("partial[c] = sum; partial[c] = sum;")
    for planted in sanitizer.PLANTED.values():
        with pytest.raises(ValueError, match="not once"):
            planted.plant(tmp_path)


@pytest.mark.skipif(gpu_record._build.find_cuda_home() is None, reason="needs nvcc")
def test_a_copy_with_an_error_compiles(tmp_path):
    library = ctypes.CDLL(str(sanitizer.compile_planted("a thread waits for others than itself", tmp_path)))
    assert hasattr(library, "packops_planted")


FUNCTIONS = [function.__name__ for function in sanitize.CASES]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Tools that say what a test wants: (tool, function) -> (log, exit status); all else is clean and finds what is planted."""
    says: dict[tuple[str, str], tuple[str, int | None]] = {}

    def run_sanitizer(tool, log, *arguments, limit):
        if arguments[0] == "--planted":
            names, usual = [arguments[1]], ("".join(SAID[arguments[1]]), 99)
        else:
            names, usual = [argument.removeprefix("--only=") for argument in arguments[1:]], (CLEAN, 0)
        text, status = next((says[tool, name] for name in names if (tool, name) in says), usual)
        log.write_text(text)
        return status

    monkeypatch.setattr(sanitize, "run_sanitizer", run_sanitizer)
    monkeypatch.setattr(sanitize, "compile_planted", lambda name, folder: folder)
    monkeypatch.setattr(gpu_record, "environment", lambda: {"built_for": "9.0", "compute_capability": "9.0", "date": "today"})
    monkeypatch.setattr(gpu_record, "PATH", tmp_path / "record.json")
    monkeypatch.setattr(gpu_record, "FEWEST_CASES", 2)
    monkeypatch.setattr(gpu_record, "EXCUSED_HAZARDS", {})
    return says


def run_tools(tmp_path, *tools, functions=FUNCTIONS) -> int:
    return sanitize.run_tools(list(tools or sanitize.TOOLS), functions, tmp_path / "logs", limit=5, processes=2)


def test_a_clean_run_is_recorded(tools, tmp_path):
    assert run_tools(tmp_path) == 0
    part = gpu_record.read(gpu_record.PATH)["sanitizer"]
    assert {result["cases"] for result in part["tools"].values()} == {2 * sanitize.GROUPS}
    assert all(part["planted"].values())


def test_what_runs_out_of_time_leaves_the_rest(tools, tmp_path, capsys):
    tools["initcheck", "rope"] = "case rope: a\n", None
    assert run_tools(tmp_path) == 1
    found = "\n".join(gpu_record.problems(gpu_record.PATH, ("sanitizer",)))
    assert re.search(r"^initcheck: .*\brope\b.* did not finish: stopped after 5 s$", found, re.MULTILINE)
    results = gpu_record.read(gpu_record.PATH)["sanitizer"]["tools"]
    assert results["initcheck"]["cases"] == 2 * sanitize.GROUPS - 1
    assert results["memcheck"]["unfinished"] == {}
    # One tool again: the others keep what they said.
    del tools["initcheck", "rope"]
    assert run_tools(tmp_path, "initcheck") == 0
    assert gpu_record.problems(gpu_record.PATH, ("sanitizer",)) == []
    assert "EXCUSED" not in capsys.readouterr().out


def test_what_dies_does_not_count_as_clean(tools, tmp_path):
    tools["memcheck", "metadata"] = CLEAN, 134
    assert run_tools(tmp_path) == 1
    (found,) = gpu_record.problems(gpu_record.PATH, ("sanitizer",))
    assert re.fullmatch(r"memcheck: .*\bmetadata\b.* did not finish: exit status 134", found)


def test_an_interrupted_run_is_recorded_as_far_as_it_came(tools, tmp_path, monkeypatch):
    says, left = sanitize.Job.say, [5]

    def say(job):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        says(job)

    monkeypatch.setattr(sanitize.Job, "say", say)
    with pytest.raises(KeyboardInterrupt):
        run_tools(tmp_path, "synccheck")
    result = gpu_record.read(gpu_record.PATH)["sanitizer"]["tools"]["synccheck"]
    assert result["unfinished"]
    assert set(result["unfinished"].values()) == {"not run"}


def test_a_planted_error_that_is_missed(tools, tmp_path):
    tools["synccheck", "a thread waits for others than itself"] = CLEAN, 0
    assert run_tools(tmp_path) == 1
    found = ["synccheck: did not find the errors that are planted for it"]
    assert gpu_record.problems(gpu_record.PATH, ("sanitizer",)) == found


def test_excused_hazards_can_be_copied_from_what_is_said(tools, tmp_path, monkeypatch, capsys):
    names = [function.__name__ for function in sanitize.CASES[:2]]  # of two groups
    for function in names:
        tools["racecheck", function] = log_of([(COPY, READER)] * 3).replace("1 cases", "2 cases"), 99
    assert run_tools(tmp_path, functions=names) == 0
    said = capsys.readouterr().out
    assert f'EXCUSED_HAZARDS = {{\n    "{PLACE}": 6\n}}' in said
    assert not gpu_record.PATH.exists(), "some of the cases are no record"
    assert run_tools(tmp_path) == 1
    monkeypatch.setattr(gpu_record, "EXCUSED_HAZARDS", {PLACE: 6})
    assert run_tools(tmp_path) == 0


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_over_its_limit_is_stopped_with_all_that_it_started(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nsleep 60 &\necho $! > "$0.pid"\nwait\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    started = time.monotonic()
    assert sanitizer.run_sanitizer("memcheck", tmp_path / "log", "--cases", limit=1) is None
    assert time.monotonic() - started < 50
    child = int((tmp_path / "compute-sanitizer.pid").read_text())
    while _runs(child):
        time.sleep(0.01)


def test_findings_begin_with_the_first():
    text = "========= COMPUTE-SANITIZER\ncase a: x\n" + "========= Invalid __global__ read\n=========  Host Frame: main\n"
    text += "terminate called\n" + "========= ERROR SUMMARY: 1 error\n"
    assert sanitizer.findings(text).splitlines() == [
        "case a: x",
        "========= Invalid __global__ read",
        "========= ERROR SUMMARY: 1 error",
    ]
    assert sanitizer.findings("no tool ran") == "no tool ran"


def test_every_case_runs(device):
    """Also where there is no sanitizer, so that a case that breaks is seen before someone waits for a GPU."""
    assert sanitize.run_cases(device) == 0


def test_initcheck_reads_nothing_that_tensor_copies_wrote(monkeypatch):
    """It does not see them write: logits, and what a product of cuBLAS makes."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for module in ("linear_ce_chunks", "linear_log_probs"):
            module = importlib.import_module(f"packops.ops.{module}")
            arguments = torch.zeros(1, 8), 3, 17, torch.float32
            assert module.logits_buffer(*arguments).isnan().all()
            with sanitize.cleared_outputs():
                assert (module.logits_buffer(*arguments) == 0).all()
            assert module.logits_buffer(*arguments).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_initcheck_lets_products_write_over_zeros(monkeypatch):
    lm_head, seen = importlib.import_module("packops.ops.lm_head"), []
    monkeypatch.setattr(lm_head, "product_", lambda out, a, b, add: seen.append(out.clone()))
    with sanitize.cleared_outputs():
        for add in (False, True):
            lm_head.product_(torch.ones(2), None, None, add)
    lm_head.product_(torch.ones(2), None, None, False)
    assert [out.tolist() for out in seen] == [[0, 0], [1, 1], [1, 1]]


def test_some_cases_alone(capsys):
    device = torch.device("cpu")
    assert sanitize.run_cases(device, [sanitize.metadata]) == 0
    said = capsys.readouterr().out
    assert set(re.findall(r"^case (\w+):", said, re.MULTILINE)) == {"metadata"}


def test_every_op_has_a_case():
    """A kernel that no case calls was never seen by a sanitizer."""
    called = ops_called_by(lambda: sanitize.run_cases(torch.device("cpu")))
    assert len(kernels()) > 20
    assert not kernels() - called, f"tests/sanitize.py has no case that calls {sorted(kernels() - called)}"
