"""The sanitizer driver never takes a broken run for a clean one."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

import gpu_record
import sanitize
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
    assert sanitize.read_log(text, status) == {"errors": errors, "cases": cases}


RING = "packops::<unnamed>::resident_kernel<float, (int)0, (bool)0>(packops::CeLossParams, int)"
READER = f"Read access at void {RING}+0x10"
WRITER = f"Write access at void {RING}+0x90"
COPY = "Write access at packops::cp_async_bulk(void *, const void *, unsigned int, unsigned long *)+0x15b0 in ptx.cuh:96"
READ_OF_COPY = COPY.replace("Write", "Read")
HELPER = "Read access at packops::<unnamed>::RowMaths<float, (int)0>::transform_at(const float *, long) const+0x40 in ptx.cuh:2"
ELSEWHERE = "Read access at void packops::<unnamed>::attention_kernel<float>(packops::AttentionParams)+0x10"
PLACE = "packops::<unnamed>::resident_kernel"


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
def test_hazards_of_bulk_copies_are_counted_apart(case):
    hazards, errors, places = HAZARDS[case]
    log = log_of(hazards)
    assert sanitize.read_log(log, 99) == {"errors": errors, "cases": 1, **({"excused": places} if places else {})}
    # Hazards that are counted but not shown are not excused.
    assert sanitize.read_log(log.replace(f"SUMMARY: {len(hazards)}", "SUMMARY: 9"), 99)["errors"] == 9
    # And what is excused has one exit status: the sanitizer's own.
    if errors == 0:
        assert all(sanitize.read_log(log, status)["errors"] == -1 for status in (0, 1, 134, -11))


def test_excused_warnings_may_leave_the_status_as_it_is():
    log = log_of([(COPY, READER)], "Warning")
    for status in (0, 99):
        assert sanitize.read_log(log, status) == {"errors": 0, "cases": 1, "excused": {PLACE: 1}}
    assert sanitize.read_log(log, 1)["errors"] == -1


def test_a_thousand_excused_hazards_are_no_clean_record(tmp_path, monkeypatch):
    """Each is excusable; their number is not what the record expects."""
    result = sanitize.read_log(log_of([(COPY, READER)] * 1000), 99)
    assert result["errors"] == 0
    part = {"environment": {"built_for": "9.0", "compute_capability": "9.0"}, "planted": dict.fromkeys(sanitize.TOOLS, True)}
    tools = {tool: {"errors": 0, "cases": 250} for tool in sanitize.TOOLS}
    monkeypatch.setattr(gpu_record, "EXCUSED_HAZARDS", {PLACE: 56})
    for count, problems in ((56, 0), (1000, 1)):
        tools["racecheck"]["excused"] = {PLACE: count}
        assert len(gpu_record._problems_of_sanitizer({**part, "tools": tools})) == problems


def test_the_excuse_names_what_there_is():
    """The copy's and the kernel's names, which a renaming would turn into an excuse for nothing."""
    csrc = gpu_record.ROOT / "csrc"
    assert re.search(rf"\bvoid {sanitize.BULK_COPY}\(", (csrc / "common" / "ptx.cuh").read_text())
    users = [path.name for path in csrc.glob("*.cu*") if re.search(rf"\b{sanitize.BULK_COPY}\(", path.read_text())]
    assert users, "no kernel has bulk copies: the excuse can go"
    assert all(f"{sanitize.RING_KERNEL}(" in (csrc / name).read_text() for name in users)


AT = "\n=========     at <unnamed>::"
SAID = {
    "memcheck": f"========= Invalid __global__ write of size 4 bytes{AT}planted_write_out_of_bounds(float *, int)",
    "racecheck": "========= Error: Race reported between Write access at <unnamed>::planted_race(float *, int)+0x80 in a.cu:17",
    "synccheck": f"========= Barrier error detected. Divergent thread(s) in block.{AT}planted_divergent_barrier(float *, int)",
    "initcheck": f"========= Uninitialized __global__ memory read of size 4 bytes{AT}planted_read_of_nothing(float *, int)",
}


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_what_counts_as_found(tool):
    assert sanitize.found_planted(tool, SAID[tool], 99)
    assert not sanitize.found_planted(tool, SAID[tool], 0)
    assert not sanitize.found_planted(tool, SAID[tool].replace("planted_", "other_"), 99)
    assert not any(sanitize.found_planted(tool, SAID[other], 99) for other in sanitize.TOOLS if other != tool)
    assert not sanitize.found_planted(tool, "========= ERROR SUMMARY: 0 errors", 99)


@pytest.mark.skipif(gpu_record._build.find_cuda_home() is None, reason="needs nvcc")
def test_an_error_is_planted_for_each_tool(tmp_path):
    library = ctypes.CDLL(str(sanitize.compile_planted(tmp_path)))
    source = sanitize.PLANTED.read_text()
    for tool in sanitize.TOOLS:
        assert hasattr(library, f"planted_{tool}")
        assert f"void {sanitize.PLANTED_MESSAGE[tool][1]}(" in source


def test_findings_begin_with_the_first():
    text = "========= COMPUTE-SANITIZER\ncase a: x\n" + "========= Invalid __global__ read\n=========  Host Frame: main\n"
    text += "terminate called\n" + "========= ERROR SUMMARY: 1 error\n"
    assert sanitize.findings(text).splitlines() == [
        "case a: x",
        "========= Invalid __global__ read",
        "========= ERROR SUMMARY: 1 error",
    ]
    assert sanitize.findings("no tool ran") == "no tool ran"


def test_every_case_runs(device):
    """Also where there is no sanitizer, so that a case that breaks is seen before someone waits for a GPU."""
    assert sanitize.run_cases(device) == 0


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
