"""The JIT loader: what it compiles, what it refuses, and that it never takes the process with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from packops import _build, jit

pytest.importorskip("platformdirs", reason="needs packops[jit]")
pytest.importorskip("filelock", reason="needs packops[jit]")

LIBRARY = """
#include "torch/register.h"
#include <torch/csrc/stable/tensor.h>
#ifndef FACTOR
#define FACTOR 2
#endif
int64_t scale(int64_t x) { return FACTOR * x; }
PACKOPS_SCHEMAS(m) { m.def("scale(int x) -> int"); }
PACKOPS_KERNELS_FOR(CompositeExplicitAutograd, m) { m.impl("scale", TORCH_BOX(&scale)); }
"""

CUDA = """
#include <cuda_runtime.h>
__global__ void touch(float* x) { x[threadIdx.x] = 1.0f; }
extern "C" cudaError_t launch(float* x, cudaStream_t s) { touch<<<1, 32, 0, s>>>(x); return cudaGetLastError(); }
"""

# For a process of its own: an op library without packops' ops needs no fake kernels.
SCRIPT = """
import sys, packops.jit
packops.ops.register = lambda namespace: None
print(packops.jit.load(sys.argv[1], namespace=sys.argv[2]).scale(21))
"""


@pytest.fixture
def csrc(tmp_path):
    """A small csrc with one op: three seconds to compile."""
    folder = tmp_path / "csrc"
    (folder / "torch").mkdir(parents=True)
    for name in ("register.h", "stable.h"):
        shutil.copy(_build.find_csrc() / "torch" / name, folder / "torch")
    config = _build.read_config(_build.find_csrc())
    config["cxx_flags"] = ["-std=c++20", "-O0"]
    (folder / "build.json").write_text(json.dumps(config))
    (folder / "library.cpp").write_text(LIBRARY)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(jit.CACHE_DIR, str(tmp_path / "cache"))
    monkeypatch.delenv(jit.DISABLE, raising=False)
    monkeypatch.setenv(_build.CUDA_REQUEST, "0")
    monkeypatch.setattr("packops.ops.register", lambda namespace: None)
    return tmp_path / "cache" / "jit"


def in_process(csrc, namespace="packops_test_process"):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(csrc), namespace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def builds(cache):
    return [path for path in cache.iterdir() if (path / "library.so").is_file()]


def test_load_compiles_once_and_for_all_processes(csrc, cache, capsys):
    ops = jit.load(csrc, namespace="packops_test_once")
    assert ops.scale(21) == 42
    assert "compiling" in capsys.readouterr().err
    assert jit.load(csrc, namespace="packops_test_once") is ops
    assert capsys.readouterr().err == ""
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, cache.parent)] == [0o700, 0o700]

    first, second = in_process(csrc), in_process(csrc)  # both want to compile the same sources for a new namespace
    (out1, err1), (out2, err2) = first.communicate(), second.communicate()
    assert (out1, out2) == ("42\n", "42\n"), err1 + err2
    assert (err1 + err2).count("packops.jit: compiling") == 2, err1 + err2  # begin and end of one compilation
    assert len(builds(cache)) == 2
    assert not list(cache.glob(".building-*"))


def test_defines_reach_the_compiler_and_the_key(csrc, cache):
    assert jit.load(csrc, defines=["FACTOR=3"], namespace="packops_test_define").scale(7) == 21
    with pytest.raises(RuntimeError, match=r"packops_test_define already has ops.*Choose another namespace"):
        jit.load(csrc, namespace="packops_test_define")
    assert torch.ops.packops_test_define.scale(7) == 21  # the process is well


def test_what_reaches_the_compiler_is_in_the_key(csrc, monkeypatch):
    monkeypatch.setenv("CPPFLAGS", "-DFACTOR=3")
    assert jit.load(csrc, namespace="packops_test_flags").scale(7) == 21
    for name in _build.COMPILER_VARIABLES:
        with monkeypatch.context() as changed:
            changed.setenv(name, "c++ -DFACTOR=5")
            with pytest.raises(RuntimeError, match="of another build"):
                jit.load(csrc, namespace="packops_test_flags")
    assert jit.load(csrc, namespace="packops_test_flags").scale(7) == 21


@pytest.mark.parametrize("define", ["A B", "A='x'", 'A="x"', "-DX", "A=$(id)", "A=x;y", "", "A=`id`"])
def test_bad_defines(csrc, define):
    with pytest.raises(ValueError, match="defines must be 'NAME' or 'NAME=VALUE'"):
        jit.load(csrc, defines=[define])


def test_one_string_of_defines_is_no_list(csrc):
    with pytest.raises(ValueError, match="several strings"):
        jit.load(csrc, defines="FACTOR=3")


@pytest.mark.parametrize("namespace", ["", "a b", "1a", "a::b", "a;b", "ä"])
def test_bad_namespace(csrc, namespace):
    with pytest.raises(ValueError, match="namespace must be"):
        jit.load(csrc, namespace=namespace)


@pytest.mark.parametrize("namespace", ["packops", "aten"])
def test_namespace_of_loaded_ops_is_refused(csrc, namespace):
    with pytest.raises(RuntimeError, match=f"torch.ops.{namespace} already has ops.*namespace='{namespace}_2'"):
        jit.load(csrc, namespace=namespace)


def test_not_a_csrc(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no build\.json in .*nowhere"):
        jit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["more.cc", "torch/more.cxx", "more.c", "more.C"])
def test_a_source_that_would_be_left_out_is_refused(csrc, name):
    (csrc / name).touch()
    with pytest.raises(ValueError, match=rf"{name} would not be compiled: sources must be named \.cpp or \.cu"):
        jit.load(csrc)


def test_compiler_errors_are_shown(csrc, cache):
    source = csrc / "library.cpp"
    source.write_text(LIBRARY.replace("FACTOR * x", "FACTOR * y"))
    with pytest.raises(RuntimeError, match="failed") as error:
        jit.load(csrc, namespace="packops_test_error")
    assert f"{source}:7" in str(error.value)  # the user's own file and line
    told = str(error.value).splitlines()
    assert "was not declared in this scope" in str(error.value)
    assert "^" in told[-1] or "|" in told[-1]  # g++'s own last line: nothing of ours or of Python's comes after it
    assert not [line for line in told if "Traceback" in line or line.startswith("ninja:")]
    assert builds(cache) == []
    source.write_text(LIBRARY)
    assert jit.load(csrc, namespace="packops_test_error").scale(1) == 2  # mended, in the same process


def test_a_library_that_ends_its_process_is_not_loaded(csrc, cache):
    (csrc / "library.cpp").write_text(LIBRARY.replace('m.def("scale(int x) -> int");', 'm.def("scale(int x) -> int");' * 2))
    with pytest.raises(RuntimeError, match=r"the library (ends the process with signal|does not load)") as error:
        jit.load(csrc, namespace="packops_test_twice")
    assert "API call failed" in str(error.value)
    assert builds(cache) == []


@pytest.fixture
def header(csrc, tmp_path):
    """What ``csrc`` includes from elsewhere."""
    path = tmp_path / "elsewhere" / "factor.h"
    path.parent.mkdir()
    path.write_text("#define FACTOR 2\n")
    (csrc / "library.cpp").write_text(LIBRARY.replace("#define FACTOR 2", '#include "../elsewhere/factor.h"'))
    return path


def test_headers_from_elsewhere_are_not_overlooked(csrc, header, tmp_path):
    namespace = "packops_test_header"
    assert jit.load(csrc, namespace=namespace).scale(21) == 42
    header.write_text("#define FACTOR 3\n")
    with pytest.raises(RuntimeError, match=r"packops_test_header already has ops in this process \(of another build\)"):
        jit.load(csrc, namespace=namespace)
    assert in_process(csrc, namespace).communicate()[0] == "63\n"
    header.write_text("#define FACTOR 5\n")
    old = time.time() - 10**6
    os.utime(header, (old, old))  # ninja goes by times
    out, err = in_process(csrc, namespace).communicate()
    assert out == "105\n", err
    assert in_process(csrc, namespace).communicate() == (out, "")  # nothing to compile

    moved = tmp_path / "moved"
    shutil.copytree(csrc, moved / "csrc")
    shutil.copytree(header.parent, moved / "elsewhere")
    assert in_process(moved / "csrc", namespace).communicate() == (out, "")
    (moved / "elsewhere" / "factor.h").write_text("#define FACTOR 7\n")
    assert in_process(moved / "csrc", namespace).communicate()[0] == "147\n"
    header.unlink()
    out, err = in_process(csrc, namespace).communicate()
    assert out == ""
    assert "factor.h: No such file or directory" in err


@pytest.mark.parametrize("saved", ["source", "header"])
def test_an_edit_while_compiling_is_compiled(csrc, cache, header, monkeypatch, tmp_path, saved):
    """The compiler has read the old text, and its object file is newer than the new text: ninja would take it for compiled."""
    compiler = tmp_path / "compiler"
    source, flag = csrc / "library.cpp", tmp_path / "edited"
    if saved == "source":
        source.write_text(LIBRARY)
    else:
        source = header
    compiler.write_text(
        f"""#!/bin/sh
        case "$*" in *" -c "*) ;; *) exec c++ "$@" ;; esac
        c++ "$@" || exit 1
        [ -e {flag} ] && exit 0
        touch {flag}
        sed -i 's/FACTOR 2/FACTOR 5/' {source}
        sleep 0.1
        for object in $(echo "$*" | grep -o -- '-o [^ ]*' | cut -c4-); do touch "$object"; done
        """
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert jit.load(csrc, namespace=f"packops_test_edit_{saved}").scale(21) == 105
    assert flag.exists()


def test_an_updated_compiler_compiles_again(csrc, monkeypatch, tmp_path):
    """Under the name that it had: the command tells nothing."""
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(compiler))

    def install(version):
        compiler.write_text(f'#!/bin/sh\n[ "$*" = --version ] && echo {version} && exit\nexec c++ -DFACTOR={version} "$@"\n')
        compiler.chmod(0o755)

    install(3)
    assert in_process(csrc).communicate()[0] == "63\n"
    install(5)
    out, err = in_process(csrc).communicate()
    assert out == "105\n", err


@pytest.mark.parametrize("name", ["CC", "NVCC_CCBIN"])
def test_the_version_of_the_hosts_compiler_is_in_the_key(csrc, monkeypatch, tmp_path, name):
    compiler = tmp_path / "compiler"
    monkeypatch.setenv(name, str(compiler))
    said = []
    for version in (1, 2):
        compiler.write_text(f"#!/bin/sh\necho {version}\n")
        compiler.chmod(0o755)
        said.append(jit._compiler_versions())
    assert said[0] != said[1]
    monkeypatch.setenv(name, str(tmp_path / "none"))
    assert jit._compiler_versions() == said[0][:1]  # not ours to refuse


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_objects_of_a_killed_build_are_not_trusted(csrc, cache, monkeypatch, tmp_path):
    """Its compilers live on for a while, and write."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        """#!/bin/sh
        case "$*" in *" -c "*) ;; *) exec c++ "$@" ;; esac
        read -r pid name state parent group session rest < /proc/$$/stat
        kill -KILL $session
        """
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"failed \(the compiler's process was ended by signal 9\)"):
        jit.load(csrc, namespace="packops_test_killed")
    assert [path.name for path in cache.glob("objects-*/*") if path.name == jit.UNFINISHED]


def compilers_of(folder: Path) -> list[str]:
    """Command lines of running processes that speak of ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_compilers_end_with_their_process(csrc, cache, signum):
    """And what they leave half done is not taken for compiled."""
    heavy = "#include <regex>\n#include <map>\nstd::regex made(const char* x) { return std::regex(x); }\n"
    (csrc / "heavy.cpp").write_text(heavy)
    process = in_process(csrc)

    def wait_for(condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    wait_for(lambda: any("cc1plus" in command for command in compilers_of(csrc)), "no compiler was started")
    process.send_signal(signum)
    process.communicate()
    wait_for(lambda: not compilers_of(csrc.parent), "compilers live on")
    (csrc / "library.cpp").write_text(LIBRARY.replace("FACTOR 2", "FACTOR 3"))
    out, err = in_process(csrc).communicate()
    assert out == "63\n", err


def test_errors_have_their_types(csrc):
    torch_folder = _build.find_csrc() / "torch"
    for name in ("check.h", "error.h", "error.cpp"):
        shutil.copy(torch_folder / name, csrc / "torch")
    body = '{ packops::raise("IndexError", "scale: x must be small, got ", x); }'
    text = LIBRARY.replace("{ return FACTOR * x; }", body)
    text = text.replace("#include <torch/csrc", '#include "torch/check.h"\n#include <torch/csrc')
    (csrc / "library.cpp").write_text(text)
    ops = jit.load(csrc, namespace="packops_test_types")
    with pytest.raises(IndexError, match=r"^packops\.scale: x must be small, got 7$"):
        ops.scale(7)


def test_undefined_symbol(csrc, cache):
    (csrc / "library.cpp").write_text(
        LIBRARY.replace("int64_t scale(int64_t x) { return FACTOR * x; }", "int64_t scale(int64_t);")
    )
    with pytest.raises(RuntimeError, match="does not load") as error:
        jit.load(csrc, namespace="packops_test_undefined")
    assert "undefined symbol" in str(error.value)


def test_an_older_file_put_back_is_compiled(csrc):
    """ninja goes by times; an edit that carries an old one (cp -p, tar, rsync -a) must be seen all the same."""
    assert jit.load(csrc, namespace="packops_test_old_a").scale(1) == 2
    shutil.copytree(csrc, csrc.parent / "kept")
    namespace = "packops_test_old_b"
    assert in_process(csrc, namespace).communicate()[0] == "42\n"
    (csrc / "library.cpp").write_text(LIBRARY.replace("FACTOR 2", "FACTOR 5"))
    old = time.time() - 10**6
    os.utime(csrc / "library.cpp", (old, old))
    assert in_process(csrc, namespace).communicate()[0] == "105\n"


def test_planted_libraries_are_not_loaded(csrc, cache, capsys):
    assert in_process(csrc).communicate()[0] == "42\n"
    (build,) = builds(cache)
    good = (build / "library.so").read_bytes()
    note = json.loads((build / "build.json").read_text())
    assert note["library_sha256"] == hashlib.sha256(good).hexdigest()

    (build / "library.so").write_bytes(b"\x7fELF something foreign")
    out, err = in_process(csrc).communicate()
    assert out == "42\n"
    assert "was not written by packops: compiling again" in err

    (build / "build.json").unlink()  # a bare .so under the right name
    out, err = in_process(csrc).communicate()
    assert out == "42\n"
    assert "compiling again" in err


def test_cache_others_can_write_is_refused(csrc, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(RuntimeError, match=r"can be written by others \(mode 0777\).*PACKOPS_CACHE_DIR"):
        jit.load(csrc, namespace="packops_test_open")
    cache.chmod(0o700)
    cache.parent.chmod(0o720)
    with pytest.raises(RuntimeError, match=r"can be written by others \(mode 0720\)"):
        jit.load(csrc, namespace="packops_test_open")


def test_a_cache_that_cannot_be_made_names_the_variable(csrc, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(jit.CACHE_DIR, str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"cannot be made .*Set PACKOPS_CACHE_DIR to a folder that you can write to"):
        jit.load(csrc, namespace="packops_test_unwritable")


def test_a_cache_that_cannot_be_written_names_the_variable(csrc, cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache)  # chmod does not stop root
    with pytest.raises(RuntimeError, match=r"cannot be written\. Set PACKOPS_CACHE_DIR to a folder that you can write to"):
        jit.load(csrc, namespace="packops_test_unwritable")


def test_cache_of_someone_else_is_refused(csrc, cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RuntimeError, match="belongs to user"):
        jit.load(csrc, namespace="packops_test_owner")


def test_cache_behind_a_link_is_refused(csrc, cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="is not a folder"):
        jit.load(csrc, namespace="packops_test_link")


def test_default_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv(jit.CACHE_DIR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_folder() == tmp_path / "xdg" / "packops" / "jit"


def test_a_home_that_is_not_known_is_named(csrc, monkeypatch, tmp_path):
    """And no folder is made whose name is a tilde."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(jit.CACHE_DIR, "~nobody_of_that_name/cache")
    with pytest.raises(RuntimeError, match=r"the cache folder ~.* lies in a home folder that nobody knows\. Set HOME, or P"):
        jit.load(csrc, namespace="packops_test_home")
    assert not list(tmp_path.glob("~*"))


def test_compiling_can_be_forbidden(csrc, monkeypatch):
    monkeypatch.setenv(jit.DISABLE, "1")
    with pytest.raises(RuntimeError, match="PACKOPS_DISABLE_JIT=1 forbids compiling"):
        jit.load(csrc, namespace="packops_test_forbidden")
    monkeypatch.setenv(jit.DISABLE, "yes")
    with pytest.raises(ValueError, match=r"PACKOPS_DISABLE_JIT must be 0, 1 or unset, got 'yes'"):
        jit.load(csrc, namespace="packops_test_forbidden")


def test_missing_extra_is_named(csrc, monkeypatch):
    find = jit.importlib.util.find_spec
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None if name == "filelock" else find(name))
    with pytest.raises(ImportError, match=r"needs filelock: pip install '.\[jit\]'"):
        jit.load(csrc)
    monkeypatch.undo()
    monkeypatch.setattr(_build, "path_with_ninja", lambda: "/nowhere")
    with pytest.raises(ImportError, match=r"needs ninja: pip install '.\[jit\]'"):
        jit.load(csrc)


def test_old_builds_go(cache, monkeypatch):
    monkeypatch.setattr(jit, "KEPT_BUILDS", 2)
    cache.mkdir(parents=True)
    for age, name in enumerate(("new", "middle", "old", "older")):
        (cache / name).mkdir()
        os.utime(cache / name, (10**9 - age, 10**9 - age))
    (cache / ".building-killed").mkdir()
    jit._forget_old(cache)
    assert sorted(path.name for path in cache.iterdir()) == ["middle", "new"]


@pytest.mark.skipif(_build.find_cuda_home() is None, reason="needs nvcc")
def test_cuda_kernels_compile_under_any_torch(csrc, cache, monkeypatch):
    """Also where torch is CPU-only: the library then loads, and has device code in it."""
    (csrc / "touch.cu").write_text(CUDA)
    monkeypatch.setenv(_build.CUDA_REQUEST, "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert jit.load(csrc, namespace="packops_test_cuda").scale(21) == 42
    (build,) = builds(cache)
    assert json.loads((build / "build.json").read_text())["archs"] == ["9.0"]
    assert b".nv_fatbin" in (build / "library.so").read_bytes()


def test_progress_on_a_terminal(tmp_path):
    """One line that counts, and then says how long it took."""
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(_build.__file__).parent)!r})
        import _build, pathlib
        with _build.progress("label", pathlib.Path({str(tmp_path)!r}), sys.stderr):
            pathlib.Path({str(tmp_path)!r}, "one.o").touch()
            time.sleep(1.2)
    """)
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=child)
    process.wait()
    os.close(child)
    shown = os.read(parent, 4096).decode()
    os.close(parent)
    assert "label: 1 done, " in shown
    assert shown.count("\n") == 1
    assert shown.splitlines()[-1].rstrip().endswith(" s")
