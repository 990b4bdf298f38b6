"""The build helpers, and what comes out of a source distribution."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import packops
from packops import _build, _loader

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / ".git").exists()


def fake_toolkit(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


@pytest.fixture
def no_cuda(monkeypatch, tmp_path):
    """A machine without a CUDA toolkit, wherever this runs."""
    for name in ("CUDA_HOME", "CUDA_PATH", _build.CUDA_REQUEST, "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: not str(self).startswith("/usr/local/cuda") and is_file(self))


def test_without_nvcc_one_clear_warning(no_cuda, capsys):
    assert _build.choose_cuda_home() is None
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "WARNING: nvcc was not found, so this is a CPU-only build" in warning


def test_without_nvcc_cuda_on_request_is_an_error(no_cuda, monkeypatch):
    monkeypatch.setenv(_build.CUDA_REQUEST, "1")
    with pytest.raises(RuntimeError, match="PACKOPS_CUDA=1 asks for CUDA kernels, but no nvcc was found"):
        _build.choose_cuda_home()


def test_cuda_can_be_left_out_in_silence(no_cuda, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    monkeypatch.setenv(_build.CUDA_REQUEST, "0")
    assert _build.choose_cuda_home() is None
    assert capsys.readouterr().err == ""


def test_toolkit_is_found(no_cuda, monkeypatch, tmp_path):
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", f"{home}/bin{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert _build.choose_cuda_home() == home
    assert _build.nvcc_version(home) == "12.9"
    (home / "lib64" / "libcudart_static.a").unlink()  # an nvcc without its runtime cannot link
    assert _build.find_cuda_home() is None


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_layouts_of_toolkits(no_cuda, monkeypatch, tmp_path, folder):
    """NVIDIA's installer, pip's packages, conda's."""
    home = fake_toolkit(tmp_path / "cuda")
    (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "lib64" / "libcudart_static.a").rename(home / folder / "libcudart_static.a")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert _build.choose_cuda_home() == home
    assert _build.cuda_libraries(home) == home / folder


def test_the_toolkit_of_pips_packages_is_found(no_cuda, monkeypatch, tmp_path):
    """nvidia-cuda-nvcc and its kin, in this environment: no root is needed, and nothing has to be set."""
    home = fake_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    (home / "lib64").rename(home / "lib")
    assert _build.choose_cuda_home() is None
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])
    assert _build.choose_cuda_home() == home
    (home / "bin" / "nvcc").unlink()  # torch brings the libraries, not the compiler
    assert _build.choose_cuda_home() is None


def test_a_bad_cuda_home_is_an_error(no_cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    with pytest.raises(RuntimeError, match=r"CUDA_HOME=.*absent is no CUDA toolkit.*PACKOPS_CUDA=0 builds without CUDA"):
        _build.choose_cuda_home()
    monkeypatch.setenv(_build.CUDA_REQUEST, "0")
    assert _build.choose_cuda_home() is None


def compiler(folder: Path, text: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_without_cpp20_is_an_error(monkeypatch, tmp_path):
    old = compiler(tmp_path, 'case "$*" in *--version*) echo "cxx (GCC) 8.5.0"; echo more;; *) exit 1;; esac')
    monkeypatch.setenv("CXX", f"{old} -m64")
    with pytest.raises(
        SystemExit, match=r"C\+\+20 compiler \(GCC >= 11 or Clang >= 14\), found \S*cxx, cxx \(GCC\) 8.5.0: install"
    ):
        _build.check_compiler()


def test_no_compiler_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="none, which does not run: No such file or directory: install one, or name it in CXX"):
        _build.check_compiler()


def test_this_compiler_knows_cpp20():
    _build.check_compiler()


@pytest.mark.parametrize(
    ("built", "torch_cuda", "driver", "visible", "warns"),
    [
        ("", "13.0", True, None, True),
        ("13.0", "13.0", True, None, False),
        ("", None, True, None, False),
        ("", "13.0", False, None, False),
        ("", "13.0", True, "", False),
        ("", "13.0", True, "0", True),
    ],
)
def test_a_build_without_cuda_beside_a_gpu_warns(monkeypatch, tmp_path, recwarn, built, torch_cuda, driver, visible, warns):
    monkeypatch.setattr(_loader.importlib, "import_module", lambda name: SimpleNamespace(build_info=lambda: {"cuda": built}))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(_loader, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _loader.load()
    assert ["built without CUDA kernels" in str(w.message) for w in recwarn] == [True] * warns


@pytest.mark.parametrize(
    "before",
    [
        "torch.ops.load_library(sys.argv[1])",
        "import packops\nfor name in [name for name in sys.modules if name.startswith('packops')]: del sys.modules[name]",
        "import packops, importlib\nimportlib.reload(packops)",
    ],
    ids=["another library", "again", "reload"],
)
def test_a_second_import_is_refused(tmp_path, before):
    """It does not end the process, nor change the ops that are there."""
    copy = shutil.copy(packops._C.__file__, tmp_path / "libpackops.so")
    script = "import sys, torch, warnings\nwarnings.simplefilter('error')\n" + before + "\nimport packops"
    done = subprocess.run([sys.executable, "-c", script, str(copy)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "ImportError: packops: torch.ops.packops has ops already. A process can import packops once" in done.stderr


@pytest.mark.parametrize("value", ["yes", "2", "true", " 1"])
def test_flags_are_0_or_1(monkeypatch, value):
    monkeypatch.setenv(_build.CUDA_REQUEST, value)
    with pytest.raises(ValueError, match=f"PACKOPS_CUDA must be 0, 1 or unset, got '{value}'"):
        _build.choose_cuda_home()


def test_flags_of_architectures():
    assert _build.arch_flags(["9.0"]) == _build.arch_flags(["9.0a"])  # all of Hopper's instructions
    assert _build.arch_flags(_build.split_arch_list("8.0;9.0a 12.0+PTX, ")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def gpu_machine(folder: Path, monkeypatch, capabilities: str | None) -> Path:
    """A toolkit that knows 7.5 to 12.0, and an nvidia-smi that lists these GPUs; None: one that finds no driver."""
    home = fake_toolkit(folder / "cuda")
    known = "\n".join(f"compute_{number}" for number in (75, 80, 86, 89, 90, 100, 120))
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{known}'\n")
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + ("echo no driver; exit 9\n" if capabilities is None else f"printf '{capabilities}'\n"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return home


EVERY = ["8.0", "9.0", "10.0", "12.0+PTX"]


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [
        ("9.0\n9.0\n", ["9.0"]),
        ("12.0\n8.9\n", ["8.9", "12.0"]),
        ("7.5\n8.6\n", ["8.6"]),  # a card for the screen beside one to compute with
        ("7.5\n", EVERY),
        ("13.0\n", EVERY),  # a GPU that nvcc does not know runs the PTX
        ("9.0\n13.0\n", EVERY),
        ("[N/A]\n", EVERY),
        ("", EVERY),
        (None, EVERY),
    ],
)
def test_a_build_is_for_the_gpus_of_this_machine(no_cuda, monkeypatch, tmp_path, gpus, archs):
    home = gpu_machine(tmp_path, monkeypatch, gpus)
    chosen, remark = _build.choose_archs(_build.read_config(_build.find_csrc()), home)
    assert chosen == archs
    assert ("of this machine; TORCH_CUDA_ARCH_LIST=All" in remark) == (archs != EVERY)
    assert ("no GPU is visible here, so for every GPU" in remark) == (archs == EVERY)


def test_without_nvidia_smi_a_build_is_for_every_gpu(no_cuda, tmp_path):
    assert _build.choose_archs(_build.read_config(_build.find_csrc()), fake_toolkit(tmp_path / "cuda"))[0] == EVERY


@pytest.mark.parametrize(("given", "archs"), [("8.6", ["8.6"]), ("All", EVERY), ("all", EVERY)])
def test_architectures_on_request(no_cuda, monkeypatch, tmp_path, given, archs):
    home = gpu_machine(tmp_path, monkeypatch, "9.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert _build.choose_archs(_build.read_config(_build.find_csrc()), home) == (archs, "")


def test_the_build_says_which_gpus_it_is_for(no_cuda, monkeypatch, tmp_path):
    home = gpu_machine(tmp_path, monkeypatch, "9.0")
    extension = _build.make_extension("x", _build.find_csrc(), python_module=True, cuda_home=home)
    assert extension.packops_label == "sm_90 (of this machine; TORCH_CUDA_ARCH_LIST=All builds for every GPU)"
    assert "-gencode=arch=compute_90a,code=sm_90a" in extension.extra_compile_args["nvcc"]


def test_the_cpp_library_is_linked_before_torch():
    """torch's libraries export copies of some of its symbols: bound to those, a library needs the torch of its build."""
    flags = _build.read_config(_build.find_csrc())["link_flags"]
    assert flags.index("-lstdc++") < flags.index("-ltorch") < flags.index("-lc10")


def test_no_symbol_is_borrowed_from_torch():
    nm = ["nm", "-D", "--undefined-only", packops._C.__file__]
    names = re.findall(r"^ +U ([^@\s]+)$", subprocess.run(nm, capture_output=True, text=True, check=True).stdout, re.MULTILINE)
    assert names  # those of the stable ABI and of Python
    assert not [name for name in names if name.startswith("_Z")]


@pytest.mark.parametrize("text", ["Hopper", "9", "9.0 -o /tmp/x", "9.0;$(id)", ";", "9.0+ptx"])
def test_bad_architectures(text):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        _build.split_arch_list(text)


@pytest.mark.parametrize("cuda", [False, True])
def test_sources_are_found(tmp_path, cuda):
    """A new op is compiled because its files are there; the Python module only where there is one."""
    for name in ("my_op_cpu.cpp", "my_op.cu", "my_op.h", "bindings.cpp", "torch/ops_my_op.cpp", "common/tables.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def units(python_module):
        found = _build.translation_units(tmp_path, cuda=cuda, python_module=python_module)
        return [path.relative_to(tmp_path).as_posix() for path in found]

    kernels = ["common/tables.cpp", *(["my_op.cu"] if cuda else []), "my_op_cpu.cpp", "torch/ops_my_op.cpp"]
    assert units(False) == kernels
    assert units(True) == ["bindings.cpp", *kernels]


def sources_of_cmake(csrc: Path, folder: Path) -> subprocess.CompletedProcess:
    """A run of the part of CMakeLists.txt that finds sources; it ends in their list, on stderr."""
    part = re.search(r"# ---- Sources.*?(?=# ----)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL)[0]
    script = folder / "list.cmake"
    script.write_text(
        f"cmake_policy(VERSION 3.24)\nset(CSRC {csrc})\n{part.replace('CONFIGURE_DEPENDS', '')}"
        'message("${kernels};${cuda_kernels};${torch_glue}")\n'
    )
    return subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("names", [None, ["a.cpp", "a.cu", "bindings.cpp", "torch/ops_a.cpp", "new/b.cpp", "new/new/b.cu"]])
def test_cmake_finds_the_same_sources(tmp_path, names):
    csrc = _build.find_csrc()
    if names:
        csrc = tmp_path / "c++" / "csrc"
        for name in [*names, ".hidden/a.cpp", "#a.cpp", ".#b.cu", "a.cpp~", "a.h", "build.json", "../../elsewhere/link.cpp"]:
            (csrc / name).parent.mkdir(parents=True, exist_ok=True)
            (csrc / name).touch()
        (csrc / "common").symlink_to(tmp_path / "elsewhere")
    found = sources_of_cmake(csrc, tmp_path).stderr.strip().split(";")
    assert sorted(filter(None, found)) == sorted(map(str, _build.translation_units(csrc, cuda=True, python_module=False)))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("suffix", [*_build.NEVER_COMPILED, ".C", ".CXX"])
def test_cmake_refuses_a_source_that_it_would_leave_out(tmp_path, suffix):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / f"more{suffix}").touch()
    done = sources_of_cmake(tmp_path, tmp_path)
    assert done.returncode == 1
    assert f"torch/more{suffix} would not be compiled: sources must be named .cpp or .cu" in " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_understands_whether_cuda_is_wanted(tmp_path):
    """On a machine without an nvcc: an error, a warning, or neither."""
    environment = {name: value for name, value in os.environ.items() if name != _build.CUDA_REQUEST}
    environment["CUDACXX"] = str(tmp_path / "none")
    for given, variable, said in (
        ("bogus", None, "PACKOPS_CUDA must be ON, OFF or AUTO, got bogus"),
        (None, None, "this is a CPU-only build"),
        ("auto", "0", "this is a CPU-only build"),
        *((value, "1", None) for value in ("OFF", "0", "off", "FALSE", "No")),
        (None, "0", None),
        *((value, "0", f"PACKOPS_CUDA={value} asks for CUDA kernels") for value in ("ON", "1", "on", "True")),
        (None, "1", "PACKOPS_CUDA=1 asks for CUDA kernels"),
    ):
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DPACKOPS_TORCH=/nowhere"]
        command.append("-UPACKOPS_CUDA" if given is None else f"-DPACKOPS_CUDA={given}")
        variables = environment if variable is None else {**environment, _build.CUDA_REQUEST: variable}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        told = " ".join(done.stderr.split())
        assert (said or "") in told, (given, variable)
        assert ("nvcc" in told) == (said is not None and "bogus" not in said), (given, variable, told)
        assert (done.returncode == 0) == (said is None or "CPU-only" in said), (given, variable)


def test_kernels_know_no_torch():
    csrc = _build.find_csrc()
    for path in _build.source_files(csrc):
        if path.parent != csrc / "torch" and path.suffix != ".json":
            includes = re.findall(r'#include [<"](torch/\S+|ATen/\S+|c10/\S+)[>"]', path.read_text())
            # the Python module installs the hook that it declares, which names nothing of torch
            assert not set(includes) - {"torch/error.h"}, f"{path.name} includes {includes}"
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in (csrc / "torch").iterdir():
        included = re.findall(r"#include <((?:torch|ATen|c10)/\S+)>", path.read_text())
        unstable = [name for name in included if not name.startswith(stable)]
        assert not unstable, f"{path.name} includes {unstable}, which is not the stable ABI"


def test_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "a.cu").write_text("x")
    (tmp_path / "common" / "b.h").write_text("y")
    first = _build.source_digest(tmp_path)
    for name in (".clangd", "a.cu~", "#a.cu#", ".git/a.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a source")
    assert _build.source_digest(tmp_path) == first
    (tmp_path / "a.cu").write_text("xy")
    second = _build.source_digest(tmp_path)
    (tmp_path / "a.cu").rename(tmp_path / "c.cu")
    third = _build.source_digest(tmp_path)
    (tmp_path / "c.cu").write_text("x")
    (tmp_path / "common" / "b.h").write_text("yy")
    assert len({first, second, third, _build.source_digest(tmp_path)}) == 4


@pytest.mark.parametrize("name", ["a.hpp", "a.hh", "a.inc", "a.inl", "table.txt", "table"])
def test_digest_sees_what_is_included_under_any_name(tmp_path, name):
    (tmp_path / name).write_text("x")
    first = _build.source_digest(tmp_path)
    (tmp_path / name).write_text("y")
    assert _build.source_digest(tmp_path) != first


def test_digest_sees_behind_links(tmp_path):
    csrc, shared = tmp_path / "csrc", tmp_path / "shared"
    csrc.mkdir()
    shared.mkdir()
    (csrc / "common").symlink_to(shared)
    (shared / "back").symlink_to(csrc)
    (csrc / "nothing.h").symlink_to(tmp_path / "none")
    (shared / "a.cpp").write_text("x")
    assert _build.translation_units(csrc, cuda=False, python_module=True) == [csrc / "common" / "a.cpp"]
    first = _build.source_digest(csrc)
    (shared / "a.cpp").write_text("y")
    assert _build.source_digest(csrc) != first


def test_the_library_knows_its_sources():
    """A stale build is the first thing to rule out; `packops info` and the GPU record rely on this."""
    assert packops._C.build_info()["sources"] == _build.source_digest(_build.find_csrc())


def test_cuda_objects_older_than_a_header_are_built_again(tmp_path):
    """ninja does not know their headers where torch has no CUDA."""
    header, source = tmp_path / "a.cuh", "csrc/a.cu"
    for folder, objects in (("old", 1), ("new", 3)):
        for name in ("a", "b"):
            built = tmp_path / folder / "csrc" / f"{name}.o"
            built.parent.mkdir(parents=True, exist_ok=True)
            built.touch()
            os.utime(built, (objects, objects))
        header.touch()
        os.utime(header, (2, 2))
        (tmp_path / folder / _build.SOURCES).write_text(json.dumps(_build.hashes([str(header)])))
        _build.drop_stale_objects(tmp_path / folder, [source, "csrc/b.cpp", "csrc/none.cu"], [str(header)])
        left = sorted(path.name for path in (tmp_path / folder / "csrc").iterdir())
        assert left == (["b.o"] if folder == "old" else ["a.o", "b.o"])


def test_a_build_begins_without_stale_objects(tmp_path, monkeypatch):
    built, header = tmp_path / "a.o", tmp_path / "a.cuh"
    for path, age in ((built, 1), (header, 2)):
        path.touch()
        os.utime(path, (age, age))
    there = []
    build = build_of(tmp_path, ["a.cu"], [header], monkeypatch, lambda self: there.append(built.exists()))
    build.build_extensions()
    assert there == [False]


def build_of(folder: Path, sources: list[str], files: list[Path], monkeypatch, compile_them):
    command = _build.make_build_command()
    build = command.__new__(command)
    build.build_temp = str(folder)
    depends = list(map(str, files))
    build.extensions = [SimpleNamespace(sources=sources, depends=depends, packops_digest_of=None, packops_label="the test")]
    monkeypatch.setattr(command.__base__, "build_extensions", compile_them)
    return build


def test_objects_of_what_is_not_known_any_more_are_not_linked(tmp_path, monkeypatch):
    """The library would say that it was built from the sources as they are."""
    built, source = tmp_path / "a.o", tmp_path / "a.cpp"
    there: list[bool] = []
    ends = []

    def compile_them(self):
        assert not (tmp_path / _build.SOURCES).exists()  # nor does it where this is killed
        there.append(built.exists())
        built.touch()
        for error in ends:
            raise error

    build = build_of(tmp_path, ["a.cpp"], [source], monkeypatch, compile_them)
    source.write_text("one")
    os.utime(source, (2, 2))
    build.build_extensions()
    build.build_extensions()
    source.write_text("two")  # newer: ninja sees it
    os.utime(source, (time.time() + 9, time.time() + 9))
    build.build_extensions()
    source.write_text("one")
    os.utime(source, (1, 1))
    build.build_extensions()
    assert there == [False, True, True, False]
    ends.append(RuntimeError("the compiler's error"))
    for _ in range(2):
        with pytest.raises(SystemExit):
            build.build_extensions()
    (tmp_path / _build.SOURCES).unlink()
    with pytest.raises(SystemExit):
        build.build_extensions()
    assert there[4:] == [True, True, False]


@pytest.mark.skipif(not CHECKOUT or shutil.which("make") is None, reason="needs the source tree and make")
def test_make_builds_what_changed_by_content(tmp_path):
    """An older file put back, as rsync -a does, and one saved while the compiler runs."""
    for name in ("csrc/a.cpp", "setup.py", "pyproject.toml", "python/packops/_build.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = tmp_path / "csrc" / "a.cpp"
    python, seen = tmp_path / "python3", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\ncase "$1" in setup.py) cat csrc/* >> {seen}; [ ! -e next ] || mv next csrc/a.cpp;; esac\n')
    python.chmod(0o755)

    def make() -> str:
        seen.write_text("")
        command = ["make", "-f", str(ROOT / "Makefile"), "build", f"PYTHON={python}"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return seen.read_text()

    source.write_text("one")
    assert [make(), make()] == ["one", ""]
    source.write_text("two")
    os.utime(source, (1, 1))
    assert [make(), make()] == ["two", ""]
    source.rename(source.with_name("b.cpp"))
    assert [make(), make()] == ["two", ""]
    source.with_name("b.cpp").rename(source)
    (tmp_path / "next").write_text("three")
    assert [make(), make(), make()] == ["two", "three", ""]


LOSS = "ptxas info    : ({}) Potential Performance Loss: {} in the function 'f'"
SERIALIZED = "wgmma.mma_async instructions are serialized due to {}"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (LOSS.format("C7515", SERIALIZED.format("x")), f"({SERIALIZED.format('x')})."),
        (LOSS.format("C7512", SERIALIZED.format("y")), f"({SERIALIZED.format('y')})."),
        (LOSS.format("C7508", "'setmaxnreg' ignored"), "('setmaxnreg' ignored)."),
        ("ptxas info    : 0 bytes gmem", ""),
    ],
)
def test_an_nvcc_whose_kernels_are_slow_is_named(tmp_path, capfd, said, why):
    """ptxas calls it information, so that nothing else in the log would be shown."""
    with _build.quiet_output(tmp_path / "build.log", "packops: compiling", tmp_path):
        subprocess.run(["echo", said], check=True)
    told = capfd.readouterr().err
    assert ("CUDA 12.9 or newer" in told) == bool(why)
    assert why in told
    sought = re.search(r'grep -q "(packops: WARNING.*?)"', (ROOT / "tools" / "build_wheels.sh").read_text())  # no such wheel
    assert (sought[1] in told) == bool(why)


def test_a_log_ends_with_the_compilers_error():
    log = "\n".join(
        [
            "[1/4] /usr/bin/nvcc -c a.cu -o a.o",
            "a.cu(1): warning: x is not used",
            "FAILED: [code=1] b.o",
            "ccache c++ -c b.cpp -o b.o",
            "b.cpp:1:1: error: x was not declared",
            "    1 | x",
            "      | ^",
            "[2/4] /usr/bin/nvcc -c c.cu -o c.o",
            "c.cu(1): warning: y is not used",
            "ninja: build stopped: subcommand failed.",
            "Traceback (most recent call last):",
            "RuntimeError: Error compiling objects for extension",
        ]
    )
    assert _build.readable_log(log).splitlines() == [
        "a.cu(1): warning: x is not used",
        "c.cu(1): warning: y is not used",
        "b.cpp:1:1: error: x was not declared",
        "    1 | x",
        "      | ^",
    ]
    assert _build.readable_log("g++ -shared a.o b.o -o lib.so\nld: undefined x") == "ld: undefined x"


@pytest.mark.skipif(not CHECKOUT, reason="needs the source tree")
def test_wheel_lists_every_module_and_source(tmp_path):
    """What setup.py would install, against what lies in the tree."""
    script = (
        "import json, setuptools, runpy; from unittest import mock\n"
        "with mock.patch('setuptools.setup') as setup:\n"
        "    runpy.run_path('setup.py', run_name='__main__')\n"
        "print(json.dumps(setup.call_args.kwargs['packages']))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PACKOPS_CUDA": "0"}
    )
    packages = json.loads(out.stdout.splitlines()[-1])
    folders = {path.parent.relative_to(ROOT / "python").as_posix().replace("/", ".") for path in (ROOT / "python").rglob("*.py")}
    assert folders - {"."} <= set(packages)  # what lies at the top are modules
    assert "packops.csrc" in packages


@pytest.mark.skipif(not CHECKOUT, reason="needs the source tree")
def test_source_distribution_is_complete(tmp_path):
    """Every file a build, a test or a reader needs; `make wheel` builds the wheel from the sdist alone."""
    pytest.importorskip("build")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    tree = tmp_path / "checkout"  # a copy, so that nothing is left in the tree
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    included = "csrc/common/table.inc"  # whatever an #include may name is in the digest, so it has to be in every copy
    (tree / included).touch()
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PACKOPS_CUDA": "0"})
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc/", "python/", "tests/", "tools/", "docs/", "examples/", "bench/")
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h", ".json", ".sh", ".md", ".typed")
    wanted = {name for name in listed if name.startswith(folders) and name.endswith(suffixes) and (ROOT / name).is_file()}
    wanted |= {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-dev.txt", "setup.py"}
    assert not (wanted | {included}) - names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_headers_of_torch_are_included_in_one_place():
    """csrc/torch/stable.h changes what they do when a call fails, which only works where it comes first."""
    including = [path for path in (ROOT / "csrc").rglob("*.*") if "#include <torch/" in path.read_text()]
    assert [path.name for path in including] == ["stable.h"]
