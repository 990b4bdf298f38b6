"""The command line as a user meets it."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import packops
from packops import cli
from packops.cli import device, info, program
from packops.data.packing import STRATEGIES
from packops.distributed import DENOMINATORS

PYTHON = str(Path(packops.__file__).parents[1])


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
    assert "extra demo    missing matplotlib, tqdm, transformers: pip install '.[demo]'" in result.stdout


def test_info_shows_a_stale_build(monkeypatch, capsys):
    monkeypatch.setattr("packops._build.source_digest", lambda csrc: "0" * 64)
    cli.main(["info"])
    assert "csrc has CHANGED since: build again" in capsys.readouterr().out


def test_info_shows_variables(monkeypatch, capsys):
    monkeypatch.setenv("PACKOPS_CACHE_DIR", "/somewhere")
    cli.main(["info"])
    assert "PACKOPS_CACHE_DIR=/somewhere" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["pack", "verify", "info", "demo"])
def test_an_unknown_option_shows_the_usage_of_its_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        program.read([command, *(["x"] if command in ("pack", "verify") else []), "--bogus", "3"])
    assert end.value.code == 2
    usage, _, error = capsys.readouterr().err.rpartition(f"packops {command}: error: ")
    assert usage.startswith(f"usage: packops {command} ")
    assert error.startswith("unrecognized arguments: --bogus")


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
    assert info.coverage(capability, archs) == expected


@pytest.mark.parametrize(
    ("gpu", "cuda", "archs", "expected"),
    [
        (False, "", "", "the CPU kernels are usable"),
        (False, "13.0", "9.0", "the CPU kernels are usable; the CUDA kernels are there, but this torch sees no GPU"),
        (True, "", "", "WITHOUT CUDA kernels"),
        (True, "13.0", "8.0", "the CUDA kernels NOT on every GPU here"),
        (True, "13.0", "9.0", "the CPU and the CUDA kernels are usable"),
    ],
)
def test_the_last_line_of_info_says_what_matters_most(monkeypatch, gpu, cuda, archs, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    assert expected in info._summary({"cuda": cuda, "cuda_archs": archs})


def test_a_command_gets_its_arguments(monkeypatch):
    module = types.ModuleType("packops_test_command")
    module.main = lambda arguments: arguments.steps
    monkeypatch.setitem(sys.modules, "packops_test_command", module)
    monkeypatch.setitem(program.COMMANDS, "demo", ("packops_test_command", "help"))
    assert cli.main(["demo", "--steps", "3"]) == 3


def test_the_names_spelled_for_a_parser_without_torch_are_those_of_the_package():
    assert program.STRATEGIES == STRATEGIES
    assert tuple(DENOMINATORS) == program.REDUCTIONS
    assert program.version() == packops.__version__
    assert set(program.ARGUMENTS) == set(program.COMMANDS)


def test_alone_it_prints_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: packops")
    assert all(f"    {name} " in shown for name in program.COMMANDS)


@pytest.mark.parametrize("argv", [["nonsense"], ["info", "--nonsense"], ["pack"], ["pack", "x", "--max-length", "0"]])
def test_misuse(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: packops" in capsys.readouterr().err


CONSOLE_SCRIPT = ["-c", "import sys; sys.argv[0] = 'packops'; from _packops_cli import main; sys.exit(main())"]


def program_of(start, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": PYTHON}
    return subprocess.Popen([sys.executable, *start, *arguments], env=environment, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("start", [["-m", "packops"], CONSOLE_SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["bench"], 0),
        (["nonsense"], 2),
        *([[name, "-h"], 0] for name in program.COMMANDS),
    ],
    ids=str,
)
def test_help_and_mistakes_do_not_import_torch(tmp_path, start, arguments, status):
    """Which would take seconds. A torch and a numpy that cannot be imported stand in for the clock."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHON}"}
    done = subprocess.run([sys.executable, *start, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "imported" not in done.stderr
    assert "packops" in (done.stderr if status else done.stdout)


def test_a_program_that_imports_packops_is_left_alone(tmp_path):
    """Its arguments are its own, also where its package imports packops while ``-m`` is looking for it."""
    package = tmp_path / "packops_user"
    package.mkdir()
    (package / "__init__.py").write_text("import packops")
    (package / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": f"{PYTHON}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "packops_user", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "['--help']\n", done.stderr


def test_a_reader_that_has_seen_enough_ends_it_silently(tmp_path):
    """``packops info | head -1``: here the pipe is closed before anything is written."""
    read, write = os.pipe()
    process = program_of(["-m", "packops"], "info", stdout=write)
    os.close(write)
    os.close(read)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


def test_without_a_standard_output_it_ends_well():
    """Closed before the start, as some schedulers do."""
    process = program_of(["-m", "packops"], "info", preexec_fn=functools.partial(os.close, 1))
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("start", [["-m", "packops"], CONSOLE_SCRIPT], ids=["module", "script"])
def test_an_interrupt_ends_it_without_a_traceback(tmp_path, start):
    fifo = tmp_path / "lengths.txt"
    os.mkfifo(fifo)
    # A shell has what it starts in the background ignore interrupts, and a child inherits that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = program_of(start, "pack", str(fifo), stdout=subprocess.PIPE, preexec_fn=heed)
    with fifo.open("w") as writer:  # opens when the command reads, and stays open: the command waits for a line
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
        writer.flush()
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("start", [["-m", "packops"], CONSOLE_SCRIPT], ids=["module", "script"])
def test_an_interrupt_ends_it_while_torch_is_imported(tmp_path, start):
    """Also where what is being imported catches the exception that Ctrl-C would be, as parts of torch and numpy do."""
    catcher = (
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    print('went on')\n"
    )
    (tmp_path / "torch.py").write_text(catcher)
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHON}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *start, "info"], env=environment, preexec_fn=heed, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpu", "'tpu' is no device"),
        ("meta", "not on meta"),
        ("cuda:99", r"there is no cuda:99 here; this torch sees \d+ GPUs"),
    ],
)
def test_a_device_that_is_not_there(text, says):
    with pytest.raises(ValueError, match=says):
        device.choose_device(text)


def test_a_gpu_without_kernels_for_it_is_not_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(device, "has_cuda", False)
    assert device.choose_device(None).type == "cpu"
    with pytest.raises(ValueError, match="built without them"):
        device.choose_device("cuda")


def test_no_message_names_an_index_where_the_package_is_not():
    root = Path(__file__).resolve().parents[1]
    folders = ("python", "examples", "docs", "tools", "bench")
    sources = [p for f in folders for p in (root / f).rglob("*") if p.suffix in (".py", ".md", ".sh")]
    named = [str(p) for p in [*sources, root / "README.md"] if re.search(r"pip install '?packops", p.read_text())]
    assert not named
