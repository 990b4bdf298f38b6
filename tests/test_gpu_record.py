"""The GPU record tells the truth about itself."""

from __future__ import annotations

import copy
import json
import re

import pytest

import gpu_record

SEEN = {"device": "a GPU", "compute_capability": "9.0", "built_for": "9.0", "torch": "2.10", "driver": "1", "date": "2026-01-01"}
HAZARDS = {"ring.cuh: raw = chunk[v];": 5}


def run_of(built_for: str) -> dict:
    return {
        "environment": {**SEEN, "built_for": built_for},
        "python": gpu_record.python_digests(),
        "gpu": {"passed": 2163, "failed": 0, "skipped": 8, "out_of_memory": 0},
        "skips": {"needs 2 GPUs: found 1": 8},
        "selection": "everything",
    }


def good() -> dict:
    tools = {tool: {"errors": 0, "cases": 276} for tool in gpu_record.TOOLS}
    tools["racecheck"]["excused"] = dict(HAZARDS)
    return {
        "csrc_sha256": gpu_record.current_digest(),
        "tests": {"card": run_of("9.0"), "ptx": run_of("8.0+PTX")},
        "sanitizer": {"environment": dict(SEEN), "tools": tools, "planted": dict.fromkeys(gpu_record.TOOLS, True)},
    }


@pytest.fixture(autouse=True)
def _hazards(monkeypatch):
    monkeypatch.setattr(gpu_record, "EXCUSED_HAZARDS", HAZARDS)


def record(tmp_path, **changes):
    """A good record with, at a path of keys joined by ``__``, another value, or None for nothing at all."""
    content = good()
    for keys, value in changes.items():
        *way, last = keys.split("__")
        place = content
        for key in way:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    return path


def test_a_good_record_vouches(tmp_path):
    path = record(tmp_path)
    assert gpu_record.problems(path) == []
    line = gpu_record.describe(path)
    assert "passed 2163 GPU tests as built for the card and 2163 GPU tests as PTX of 8.0 on a GPU" in line
    assert "clean in 276 cases but for 5 hazards" in line
    assert "changed since" not in line
    assert "\n" not in line


def test_older_code_has_no_wgmma(tmp_path):
    assert (
        gpu_record.problems(record(tmp_path, tests__ptx__skips={"neither this GPU nor the loaded code has wgmma, so": 8})) == []
    )


CARD = "tests__card__"
PROBLEMS = {
    "other sources": ({"csrc_sha256": "0" * 64}, "other sources"),
    "no tests": ({"tests": None}, "no run of the GPU tests as built for the card"),
    "no build from PTX": ({"tests__ptx": None}, "no run of the GPU tests as PTX of 8.0"),
    "no build for the card": ({"tests__card": None}, "no run of the GPU tests as built for the card"),
    "the same build twice": ({"tests__ptx__environment": SEEN}, "as PTX of 8.0: were built for 9.0"),
    "partial": ({CARD + "selection": "-k rope"}, "a partial run: -k rope"),
    "failed": ({CARD + "gpu": {"passed": 2163, "failed": 1, "skipped": 8, "out_of_memory": 0}}, "1 failed"),
    "out of memory": ({CARD + "gpu": {"passed": 2163, "failed": 0, "skipped": 8, "out_of_memory": 2}}, "2 out of memory"),
    "none passed": ({CARD + "gpu": {"passed": 0, "failed": 0, "skipped": 8, "out_of_memory": 0}}, "only 0 passed"),
    "few passed": ({CARD + "gpu": {"passed": 200, "failed": 0, "skipped": 8, "out_of_memory": 0}}, "only 200 passed"),
    "skipped": ({CARD + "skips": {"no transformers": 8}}, "8 skipped: no transformers"),
    "a card without wgmma": ({CARD + "skips": {"neither this GPU nor the loaded code has wgmma, so": 8}}, "8 skipped: neither"),
    "skipped without a reason": ({CARD + "skips": {}}, "8 skipped, and reasons for 0"),
    "no sanitizer": ({"sanitizer": None}, "no compute-sanitizer run"),
    "an empty sanitizer": ({"sanitizer": {}}, "no compute-sanitizer run"),
    "no tools": ({"sanitizer__tools": {}}, "memcheck: no run"),
    "one tool alone": ({"sanitizer__tools": {"memcheck": {"errors": 0, "cases": 276}}}, "racecheck: no run"),
    "one tool missing": ({"sanitizer__tools__synccheck": None}, "synccheck: no run"),
    "errors": ({"sanitizer__tools__memcheck": {"errors": 2, "cases": 276}}, "memcheck: 2 errors"),
    "a broken run": ({"sanitizer__tools__memcheck": {"errors": -1, "cases": 276}}, "memcheck: -1 errors"),
    "a case out of time": (
        {"sanitizer__tools__memcheck": {"errors": 0, "cases": 276, "unfinished": {"rope": "stopped after 9 s"}}},
        "memcheck: rope did not finish: stopped after 9 s",
    ),
    "no cases": ({"sanitizer__tools__memcheck": {"errors": 0, "cases": 0}}, "memcheck: only 0 cases"),
    "other cases": ({"sanitizer__tools__memcheck": {"errors": 0, "cases": 277}}, "different numbers of cases"),
    "more hazards": ({"sanitizer__tools__racecheck__excused": {"ring.cuh: raw = chunk[v];": 6}}, "6 hazards excused"),
    "fewer hazards": ({"sanitizer__tools__racecheck__excused": None}, "0 hazards excused"),
    "hazards elsewhere": ({"sanitizer__tools__racecheck__excused": {**HAZARDS, "a.cu: b;": 1}}, "`a.cu: b;`, tests/"),
    "hazards of another tool": ({"sanitizer__tools__memcheck": {"errors": 0, "cases": 9, "excused": HAZARDS}}, "5 hazards"),
    "a tool that finds nothing": ({"sanitizer__planted__synccheck": False}, "synccheck: did not find the errors"),
    "a tool that nothing was planted for": ({"sanitizer__planted": {}}, "initcheck: did not find the errors"),
    "the sanitizer of PTX": ({"sanitizer__environment__built_for": "8.0+PTX"}, "compute-sanitizer saw a build for 8.0+PTX"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(tmp_path, case):
    change, complaint = PROBLEMS[case]
    path = record(tmp_path, **change)
    assert any(complaint in problem for problem in gpu_record.problems(path)), gpu_record.problems(path)
    assert complaint in gpu_record.describe(path)


def test_no_record(tmp_path):
    assert "no recorded GPU run" in gpu_record.problems(tmp_path / "absent.json")[0]


def test_the_committed_record_can_be_read():
    """Whether it vouches for these sources is asked by the last step of .ci/run: someone with a GPU has to mend it."""
    found, line = gpu_record.problems(gpu_record.PATH), gpu_record.describe(gpu_record.PATH)
    assert line.startswith("GPU record: ")
    assert all(problem in line for problem in found)
    for part in (gpu_record.read(gpu_record.PATH).get("tests") or {}).values():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["environment"]["date"])
        assert re.fullmatch(r"[0-9a-f]{40}", part["environment"]["commit"])
        assert part["environment"]["device"]


@pytest.mark.parametrize("name", ["python/packops", "the GPU tests"])
def test_what_changed_beside_csrc_is_named_and_voids_nothing(tmp_path, name):
    changed = {**gpu_record.python_digests(), name: "0" * 64}
    path = record(tmp_path, tests__ptx__python=changed)
    assert gpu_record.problems(path) == []
    assert gpu_record.describe(path).endswith(f"; changed since: {name}.")


def test_the_digests_see_a_change(tmp_path, monkeypatch):
    for file in ("python/packops/ops/a.py", "tests/test_gpu.py", "tests/test_cpu.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("def test(device): pass" if "gpu" in file else "")
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    before = gpu_record.python_digests()
    (tmp_path / "tests/test_cpu.py").write_text("# a change")
    assert gpu_record.python_digests() == before
    (tmp_path / "python/packops/ops/a.py").write_text("# a change")
    changed = gpu_record.python_digests()
    assert [name for name in before if before[name] != changed[name]] == ["python/packops"]
    (tmp_path / "tests/test_gpu.py").write_text("def test(device): assert True")
    assert gpu_record.python_digests()["the GPU tests"] != changed["the GPU tests"]


BUILDS = {
    "one architecture": ("9.0", "9.0", "card"),
    "a wheel": ("8.0_9.0_10.0_12.0+PTX", "9.0", "card"),
    "with a suffix": ("9.0a", "9.0", "card"),
    "with PTX": ("8.0+PTX", "8.0", "card"),
    "PTX alone": ("8.0+PTX", "9.0", "ptx"),
    "PTX of another": ("8.6+PTX", "9.0", None),
    "machine code of another": ("8.0", "9.0", None),
}


@pytest.mark.parametrize("case", BUILDS)
def test_build_of(case):
    built_for, capability, build = BUILDS[case]
    if build is None:
        with pytest.raises(RuntimeError, match=re.escape(f"built for {built_for}")):
            gpu_record.build_of(built_for, capability)
    else:
        assert gpu_record.build_of(built_for, capability) == build


def test_parts_are_merged_and_keep_their_environments(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    outcomes = {"gpu": {"passed": 2163}, "cpu": {}}
    for built_for, date in (("9.0", "Monday"), ("8.0+PTX", "Tuesday")):
        monkeypatch.setattr(gpu_record, "environment", lambda b=built_for, d=date: {**SEEN, "built_for": b, "date": d})
        gpu_record.merge_tests(path, outcomes, {}, "")
    whole, seen = good()["sanitizer"], {**SEEN, "date": "Wednesday"}
    gpu_record.merge_sanitizer(path, seen, whole["tools"], whole["planted"])
    assert gpu_record.problems(path) == []
    content = gpu_record.read(path)
    dates = [part["environment"]["date"] for part in (*content["tests"].values(), content["sanitizer"])]
    assert dates == ["Monday", "Tuesday", "Wednesday"]
    # One record speaks of one csrc/: what was seen with other sources is dropped.
    path.write_text(json.dumps({**content, "csrc_sha256": "0" * 64}))
    gpu_record.merge_sanitizer(path, seen, whole["tools"], whole["planted"])
    assert "tests" not in gpu_record.read(path)


def test_tools_of_the_sanitizer_are_merged_if_they_saw_the_same_environment(tmp_path):
    path, whole = tmp_path / "record.json", good()["sanitizer"]
    for tool in reversed(gpu_record.TOOLS):
        one = {tool: whole["tools"][tool]}, {tool: True}
        content = gpu_record.merge_sanitizer(path, {**SEEN, "date": tool, "commit": None}, *one)
    assert list(content["sanitizer"]["tools"]) == list(gpu_record.TOOLS)
    assert gpu_record.problems(path, ("sanitizer",)) == []
    content = gpu_record.merge_sanitizer(path, {**SEEN, "driver": "2"}, *one)
    assert list(content["sanitizer"]["tools"]) == list(content["sanitizer"]["planted"]) == [tool]


def test_an_override_is_loud_and_ends_with_the_next_change(tmp_path, monkeypatch, capsys):
    path = record(tmp_path, csrc_sha256="0" * 64)
    monkeypatch.setattr(gpu_record, "PATH", path)
    monkeypatch.setattr("sys.argv", ["gpu_record.py"])
    assert gpu_record.main() == 1
    monkeypatch.setattr("sys.argv", ["gpu_record.py", "--override", "the only machine is being moved"])
    assert gpu_record.main() == 0
    assert gpu_record.main() == 0
    said = capsys.readouterr().out
    assert "other sources" in said
    assert "Overridden: the only machine is being moved" in said
    monkeypatch.setattr("sys.argv", ["gpu_record.py"])
    monkeypatch.setattr(gpu_record, "current_digest", lambda: "1" * 64)
    assert gpu_record.main() == 1
    with pytest.raises(ValueError, match="needs a reason"):
        gpu_record.override(path, " ")


def test_a_record_that_vouches_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_record, "PATH", record(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu_record.py"])
    assert gpu_record.main() == 0
    content = copy.deepcopy(good())
    content["sanitizer"]["planted"]["memcheck"] = False
    gpu_record.PATH.write_text(json.dumps(content))
    assert gpu_record.main() == 1
