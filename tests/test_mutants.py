"""The list of planted bugs speaks of the code as it is, and the runner tells a bug that was found from one that was not."""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
import mutants  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = {mutant.name: mutant for mutant in mutants.read_list()}


def test_there_are_many_and_of_every_kind():
    assert len(MUTANTS) == len(mutants.read_list()), "two mutants share a name"
    kinds = collections.Counter(
        Path(m.file).parts[0] + Path(m.file).suffix + ("" if "torch" not in m.file else " glue") for m in MUTANTS.values()
    )
    assert {"python.py", "csrc.cpp"} <= set(kinds), kinds


@pytest.mark.parametrize("name", MUTANTS)
def test_each_can_be_planted(name):
    mutant = MUTANTS[name]
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{text.count(mutant.old)} times in {mutant.file}, not once: {mutant.old!r}"
    assert mutant.old != mutant.new
    if mutant.file.endswith(".py"):
        before, after = (ast.dump(ast.parse(t)) for t in (text, text.replace(mutant.old, mutant.new)))
        assert before != after, "changes nothing but how the file looks"
    assert mutant.tests or mutant.cpp, "nothing shall kill it"
    for arguments in mutant.tests:
        for file in (word for word in shlex.split(arguments) if word.endswith(".py") or ".py::" in word):
            assert (ROOT / file.split("::")[0]).is_file(), f"no {file}"
    for test in mutant.cpp:
        name, *cases = test.split()
        folder, stem = ("emulator", name[len("emulated_") :]) if name.startswith("emulated_") else ("cpp", name)
        source = ROOT / "tests" / folder / f"{stem.removesuffix('_code80')}.cpp"
        assert source.is_file(), f"no {name}"
        for case in cases:
            assert f"CASE({case})" in source.read_text(), f"no case {case} in {source.name}"


# --------------------------------------------------------------------------------------------------------------------------------
# The runner

ADD = mutants.Mutant("adds", "python/small.py", "a + b", "a - b", tests=("tests/test_small.py",))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "python" / "small.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "tests" / "test_small.py").write_text("from small import add\n\ndef test_add():\n    assert add(2, 1) == 3\n")
    monkeypatch.setattr(mutants.Scratch, "build_library", lambda self: None)
    return mutants.Scratch(tmp_path, cuda=False)


OUTCOMES = {
    "found": (ADD, "found", r"pytest tests/test_small\.py::test_add"),
    "not found": (dataclasses.replace(ADD, old="def add(a, b)", new="def add(a, b=0)"), "survived", "test_small"),
    "does not run": (dataclasses.replace(ADD, old="def add", new="def app"), "broken", "ImportError"),
    "nothing to run": (dataclasses.replace(ADD, tests=("tests/test_small.py -k nothing",)), "broken", "fails|does not run"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_outcomes(scratch, case):
    mutant, outcome, said = OUTCOMES[case]
    before = (scratch.folder / mutant.file).read_text()
    got = mutants.try_mutant(scratch, mutant)
    assert got[0] == outcome, got
    assert re.search(said, got[1])
    assert (scratch.folder / mutant.file).read_text() == before, "the bug was left behind"


def test_only_a_test_that_passes_without_a_bug_kills(scratch):
    (scratch.folder / "tests" / "test_red.py").write_text("def test_red():\n    assert False\n")
    red = dataclasses.replace(ADD, name="red", tests=("tests/test_red.py",))
    gone = dataclasses.replace(ADD, name="gone")
    scratch.results.write_text("{}\n")
    for mutant in (ADD, red):
        scratch.note(mutant, *mutants.try_mutant(scratch, mutant))
    scratch.note(gone, "found", "pytest tests/test_gone.py::test_add")
    mutants.confirm(scratch, [ADD, red, gone])
    results = scratch.known([ADD, red, gone])[1]
    assert {name: result["outcome"] for name, result in results.items()} == {"adds": "killed", "red": "broken", "gone": "broken"}
    assert results["adds"]["by"] == "tests/test_small.py::test_add"
    assert "fails without a bug" in results["red"]["by"]


@pytest.mark.parametrize(("listed", "cases", "code"), [("t", "", ""), ("t_code80 some", "some", "80")])
def test_cases_of_a_program(scratch, monkeypatch, listed, cases, code):
    program = scratch.folder / "build" / "cmake" / "t"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\necho "FAILED it$STOP_AT_FIRST_FAILURE with $EMULATED_CODE and $*"\ngrep -q "a + b" python/small.py\n'
    )
    program.chmod(0o755)
    assert scratch.test(("ctest", listed)) is None
    mutant = dataclasses.replace(ADD, tests=(), cpp=(listed,))
    with scratch.planted(mutant):
        assert scratch.test(("ctest", listed)) == ("ctest", f"{listed.split()[0]} it1")
        assert f"with {code} and {cases}" in scratch.run([str(program), *listed.split()[1:]], EMULATED_CODE=code).stdout
        monkeypatch.setattr(mutants.Scratch, "build_cpp", lambda self, test: None)
        assert scratch.wrong([("ctest", listed)]) == {("ctest", listed): "fails without a bug"}
    ran = []
    monkeypatch.setattr(mutants.Scratch, "test", lambda self, command: ran.append(command))
    assert not scratch.wrong(
        [("ctest", f"{listed.split()[0]} one"), ("ctest", f"{listed.split()[0]} two"), ("pytest", "a"), ("pytest", "b")]
    )
    assert ran == [("ctest", f"{listed.split()[0]} one two"), ("pytest", "a b")]


def test_a_text_that_is_not_there_once_is_refused(scratch):
    with pytest.raises(ValueError, match="2 times"):
        dataclasses.replace(ADD, old="b").plant(scratch.folder)


def test_the_bug_of_a_run_that_was_killed_is_not_left_behind(scratch):
    file = scratch.folder / ADD.file
    before = file.read_text()
    with scratch.planted(ADD):
        killed = mutants.Scratch(scratch.folder, cuda=False)
        assert file.read_text() != before
        killed.unplant()
        assert file.read_text() == before
    assert file.read_text() == before


def test_the_score_fails_unless_all_are_killed(capsys):
    run = {"commit": "1234567", "date": "2026-01-02"}
    results = {"a": {"outcome": "killed", "by": "x"}, "b": {"outcome": "skipped", "by": "needs a GPU"}}
    assert mutants.report(run, results) == 0
    assert "1 of 1 mutants killed at 1234567 on 2026-01-02" in capsys.readouterr().out
    assert mutants.report(run, {**results, "c": {"outcome": "survived", "by": "x"}}) == 1
    assert "survived: c" in capsys.readouterr().out


def test_a_run_is_resumed_where_it_stopped(scratch, monkeypatch, capsys):
    """What was tried is not tried again, unless it was changed since, and belongs to the code that it was tried on."""
    others = [dataclasses.replace(ADD, name=name) for name in ("a", "b")]
    changed = dataclasses.replace(others[0], new="a * b")
    tried = []

    def try_mutant(_, mutant):
        if len(tried) == 1 and tried[0] is others[0]:
            tried.append(None)
            raise KeyboardInterrupt
        tried.append(mutant)
        return "killed", "a test"

    def main(listed, *arguments):
        monkeypatch.setattr(mutants, "read_list", lambda: listed)
        monkeypatch.setattr("sys.argv", ["mutants.py", "--scratch", str(scratch.folder), *arguments])
        return mutants.main()

    monkeypatch.setattr(mutants, "try_mutant", try_mutant)
    monkeypatch.setattr(mutants, "commit", lambda: "1234567")
    monkeypatch.setattr(mutants.Scratch, "refresh", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        main(others)
    monkeypatch.setattr(mutants, "commit", lambda: "7654321")
    assert main(others, "--resume") == 0
    assert tried == [others[0], None, others[1]]
    assert "2 of 2 mutants killed at 1234567" in capsys.readouterr().out
    main([changed, others[1]], "--resume")
    assert tried[3:] == [changed]
    main(others)
    assert tried[4:] == others
