"""Plants the bugs of ``mutants.toml``, one after the other, in a scratch copy of this checkout, and sees which tests find them.

    make mutants                       all of them; some hours on two cores
    make mutants ARGS="rope softcap"   those whose name or file has one of these words
    make mutants ARGS=--resume         those that the last run of the same code did not come to
    make mutants ARGS=--list           what there is

A mutant is found when a test that should find it fails, and killed if that test passes without the bug: in the end all those
tests run so. One that survives is a test that is missing. Only what a mutant needs is built again. Mutants that only a GPU can
see are skipped where there is none. Each result is appended to ``build/mutants/results.jsonl`` at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tomllib

import gpu_record
from gpu_record import ROOT

LIST = ROOT / "tests" / "mutants.toml"
SCRATCH = ROOT / "build" / "mutants"
TIMEOUT = 1200  # seconds for one test command: a bug may also hang


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` in ``file`` (exactly once) becomes ``new``.

    ``tests`` are arguments of pytest, ``cpp`` names of ctest, some followed by cases; any of them may kill. ``gpu``: only a GPU
    can see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    cpp: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def digest(self) -> str:
        """One that is changed is another one."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]

    def plant(self, root: Path, kept: Path | None = None) -> str:
        """Change the file; what it held before, which is also written to ``kept``."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text is {text.count(self.old)} times in {self.file}, not once:\n{self.old}")
        if kept is not None:
            kept.write_text(json.dumps({self.file: text}))
        path.write_text(text.replace(self.old, self.new))
        return text


def read_list() -> list[Mutant]:
    entries = tomllib.loads(LIST.read_text())["mutants"]
    return [Mutant(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}) for entry in entries]


class Scratch:
    """A copy of the checkout in which bugs are planted and tests run."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        self.folder, self.cuda = folder, cuda
        self.built: str | None = None  # the digest of csrc/ in the library

    def refresh(self) -> None:
        """Bring the copy up to the checkout, without touching files that did not change: compilers go by their times."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        files = [name for name in listed if name and (ROOT / name).is_file()]
        for name in files:
            source, target = ROOT / name, self.folder / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        kept = {self.folder / name for name in files}
        for top in ("python", "tests", "csrc", "bench", "tools"):
            for path in (self.folder / top).rglob("*"):
                if path.is_file() and path not in kept and path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                    path.unlink()

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def start(self, commit: str) -> None:
        """A new run: of the checkout as it is now, without results."""
        self.refresh()
        self.results.write_text(json.dumps({"commit": commit, "date": datetime.date.today().isoformat()}) + "\n")

    def note(self, mutant: Mutant, outcome: str, by: str) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"mutant": mutant.digest, "name": mutant.name, "outcome": outcome, "by": by}) + "\n")

    def known(self, mutants: list[Mutant]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """What the run is of, and what it has found of these mutants so far, by their names."""
        first, *lines = map(json.loads, self.results.read_text().splitlines())
        found = {line["mutant"]: line for line in lines}
        return first, {mutant.name: found[mutant.digest] for mutant in mutants if mutant.digest in found}

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The copy with that bug. What the file held is kept meanwhile, for a run that goes on after this one was killed."""
        kept = self.folder / "unplanted.json"
        before = mutant.plant(self.folder, kept)
        try:
            yield
        finally:
            (self.folder / mutant.file).write_text(before)
            kept.unlink(missing_ok=True)

    def unplant(self) -> None:
        """Without the bug of a run that was killed."""
        kept = self.folder / "unplanted.json"
        if kept.is_file():
            for file, before in json.loads(kept.read_text()).items():
                (self.folder / file).write_text(before)
            kept.unlink()

    def run(self, command: list[str], timeout: float | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "python"), **variables}
        try:
            return subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, -1, f"ran for more than {timeout} s", "")

    def build_library(self) -> str | None:
        """packops._C of the copy as it stands; the compiler's words if it refuses."""
        digest = gpu_record._build.source_digest(self.folder / "csrc")
        if self.built == digest:
            return None
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force", "--build-temp", "build/objects"]
        done = self.run(command, PACKOPS_CUDA="1" if self.cuda else "0")
        self.built = digest if done.returncode == 0 else None
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

    def build_cpp(self, test: str) -> str | None:
        """``test``: a name of ctest and, perhaps, names of its cases."""
        tree = self.folder / "build" / "cmake"
        if not (tree / "CMakeCache.txt").is_file():
            options = [f"-DPACKOPS_PYTHON={sys.executable}", "-DPACKOPS_CUDA=OFF", "-DPACKOPS_TORCH=/nowhere"]
            configured = self.run(["cmake", "-S", ".", "-B", str(tree), *options])
            if configured.returncode:
                return configured.stdout + configured.stderr
        target = test.split()[0].removesuffix("_code80")
        done = self.run(["cmake", "--build", str(tree), "--target", target, "--parallel", str(os.cpu_count())])
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

    def test(self, command: tuple[str, str]) -> tuple[str, str] | None:
        """The test that fails, as a command of its own, or the whole command where none says its name; None if all pass.

        ValueError if it cannot be run at all.
        """
        if command[0] == "ctest":
            name, *cases = command[1].split()
            program = str(self.folder / "build" / "cmake" / name.removesuffix("_code80"))
            code = {"EMULATED_CODE": "80"} if name.endswith("_code80") else {}
            done = self.run([program, *cases], TIMEOUT, STOP_AT_FIRST_FAILURE="1", **code)
            failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
            alone = f"{name} {failed[1]}" if failed else command[1]
        else:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--no-header"]
            done = self.run([sys.executable, "-m", "pytest", *options, *shlex.split(command[1])], TIMEOUT)
            if done.returncode in (2, 3, 4, 5):
                raise ValueError(f"pytest {command[1]} does not run:\n{(done.stdout + done.stderr)[-3000:]}")
            failed = re.search(r"^(?:FAILED|ERROR) +(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
            alone = shlex.quote(failed[1]) if failed else command[1]
        return None if done.returncode == 0 else (command[0], alone)

    def wrong(self, commands: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Those that fail in the copy as it stands, and why. Tests of one program run together, or alone if one of them fails."""
        programs: dict[tuple[str, str], list[str]] = {}
        for kind, test in dict.fromkeys(commands):
            programs.setdefault((kind, test.split()[0] if kind == "ctest" else ""), []).append(test)
        wrong = {}
        for (kind, program), tests in programs.items():
            cases = [] if program in tests else [test.removeprefix(program).strip() for test in tests]
            if self.fails((kind, " ".join([program, *cases]).strip())):
                wrong |= {(kind, test): why for test in tests if (why := self.fails((kind, test)))}
        return wrong

    def fails(self, command: tuple[str, str]) -> str | None:
        try:
            return self.prepare(command) or ("fails without a bug" if self.test(command) else None)
        except ValueError as error:
            return str(error)

    def prepare(self, command: tuple[str, str]) -> str | None:
        return self.build_cpp(command[1]) if command[0] == "ctest" else self.build_library()


def commands_of(mutant: Mutant) -> list[tuple[str, str]]:
    return [*(("ctest", name) for name in mutant.cpp), *(("pytest", arguments) for arguments in mutant.tests)]


def try_mutant(scratch: Scratch, mutant: Mutant) -> tuple[str, str]:
    """``found``, ``survived`` or ``broken`` (the entry is no good), and by what or why."""
    try:
        with scratch.planted(mutant):
            for command in commands_of(mutant):
                if wrong := scratch.prepare(command):
                    return "broken", f"does not compile: {wrong}"
                if failed := scratch.test(command):
                    return "found", " ".join(failed)
        return "survived", ", ".join(command[1] for command in commands_of(mutant))
    except ValueError as error:
        return "broken", str(error)


def confirm(scratch: Scratch, mutants: list[Mutant]) -> None:
    """What was found is killed, unless the test that found it fails without a bug, too."""
    _, known = scratch.known(mutants)
    found = {mutant: tuple(known[mutant.name]["by"].split(" ", 1)) for mutant in mutants if is_found(known.get(mutant.name))}
    wrong = scratch.wrong(found.values())
    for mutant, command in found.items():
        if command in wrong:
            print(f"broken   {mutant.name}: {' '.join(command)}: {wrong[command]}")
        scratch.note(mutant, "broken" if command in wrong else "killed", f"{command[1]}{wrong.get(command, '')}")


def is_found(result: dict[str, str] | None) -> bool:
    return result is not None and result["outcome"] == "found"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose name or file has one of these")
    parser.add_argument("--list", action="store_true", help="print the mutants")
    parser.add_argument("--resume", action="store_true", help="go on where the last run of this folder stopped")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where to work")
    arguments = parser.parse_args()
    mutants = [
        mutant
        for mutant in read_list()
        if not arguments.words or any(word in f"{mutant.name} {mutant.file}" for word in arguments.words)
    ]
    if arguments.list:
        print("\n".join(f"{mutant.file}: {mutant.name}{' (GPU)' if mutant.gpu else ''}" for mutant in mutants))
        return 0
    import torch

    has_gpu = torch.cuda.is_available()
    scratch = Scratch(arguments.scratch.absolute(), cuda=has_gpu)
    if arguments.resume and scratch.results.is_file():
        scratch.unplant()
    else:
        scratch.start(commit())
    _, known = scratch.known(mutants)
    # Python's first: they need no other library than the checkout's.
    for mutant in sorted(mutants, key=lambda mutant: (mutant.file.startswith("csrc"), bool(mutant.cpp), mutant.file)):
        if mutant.name in known:
            continue
        started = time.monotonic()
        outcome, said = ("skipped", "needs a GPU") if mutant.gpu and not has_gpu else try_mutant(scratch, mutant)
        scratch.note(mutant, outcome, said)
        print(f"{outcome:8} {mutant.name} [{mutant.file}] {time.monotonic() - started:.0f} s: {said}", flush=True)
    confirm(scratch, mutants)
    return report(*scratch.known(mutants))


def commit() -> str:
    return gpu_record._run("git", "rev-parse", "--short", "HEAD")


def report(run: dict[str, str], results: dict[str, dict[str, str]]) -> int:
    counts = {
        kind: [n for n, r in results.items() if r["outcome"] == kind] for kind in ("killed", "survived", "broken", "skipped")
    }
    tried = len(results) - len(counts["skipped"])
    print(
        f"{len(counts['killed'])} of {tried} mutants killed at {run['commit']} on {run['date']}"
        + (f"; {len(counts['skipped'])} need a GPU" if counts["skipped"] else "")
    )
    for kind in ("survived", "broken"):
        for name in counts[kind]:
            print(f"  {kind}: {name}")
    return 1 if counts["survived"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
