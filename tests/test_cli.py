"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import packops
from packops import cli


def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["packops"] == packops.__version__
    assert shown["library"] == packops._C.__file__
    assert "csrc as it is now" in shown["built"]


def test_info_as_a_program_without_the_extras():
    """The first thing a user runs must not need what only other commands need."""
    script = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'tqdm', 'filelock', 'platformdirs', 'ninja'): sys.modules[name] = None\n"
        "from packops.cli import main\n"
        "sys.exit(main(['info']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "packops[demo]  missing matplotlib, tqdm, transformers" in result.stdout


def test_info_shows_a_stale_build(monkeypatch, capsys):
    monkeypatch.setattr("packops._build.source_digest", lambda csrc: "0" * 64)
    cli.main(["info"])
    assert "csrc has CHANGED since: build again" in capsys.readouterr().out


def test_info_shows_variables(monkeypatch, capsys):
    monkeypatch.setenv("PACKOPS_CACHE_DIR", "/somewhere")
    cli.main(["info"])
    assert "PACKOPS_CACHE_DIR=/somewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((9, 0), "8.0_9.0_10.0_12.0+PTX", "covered"),
        ((8, 9), "8.0_9.0", "covered"),  # machine code of 8.0 runs on all of 8.x
        ((10, 3), "8.0_9.0_10.0_12.0+PTX", "covered"),
        ((7, 5), "8.0_9.0_12.0+PTX", "NOT covered by this build: rebuild with TORCH_CUDA_ARCH_LIST=7.5"),
        ((8, 0), "8.6", "NOT covered by this build: rebuild with TORCH_CUDA_ARCH_LIST=8.0"),
        ((13, 0), "8.0_12.0+PTX", "covered by PTX, which the driver compiles at the first launch"),
        ((13, 0), "8.0_12.0", "NOT covered by this build: rebuild with TORCH_CUDA_ARCH_LIST=13.0"),
        ((9, 0), "9.0a", "covered"),
        ((10, 3), "10.0a", "NOT covered by this build: rebuild with TORCH_CUDA_ARCH_LIST=10.3"),
        ((9, 0), "", "NOT usable, packops was built without CUDA kernels"),
    ],
)
def test_coverage(capability, archs, expected):
    assert cli.coverage(capability, archs) == expected


def test_a_command_gets_its_arguments(monkeypatch):
    module = types.ModuleType("packops_test_command")
    module.add_parser = lambda commands: commands.add_parser("demo").add_argument("--steps", type=int)
    module.main = lambda arguments: arguments.steps
    monkeypatch.setitem(sys.modules, "packops_test_command", module)
    monkeypatch.setitem(cli.COMMANDS, "demo", ("packops_test_command", "help", "demo"))
    assert cli.main(["demo", "--steps", "3"]) == 3


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "demo", ("surely_not_installed", "help", "demo"))
    with pytest.raises(SystemExit, match=r"packops demo: No module named 'surely_not_installed': pip install 'packops\[demo\]'"):
        cli.main(["demo"])


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "--nonsense"]])
def test_misuse(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: packops" in capsys.readouterr().err
