"""How ``csrc/`` becomes a library: reads ``csrc/build.json`` for setup.py and for the JIT loader.

Standard library only at import time, because setup.py loads this file before packops is installed. Run as a script it builds one
library from one JSON request, which is how :mod:`packops.jit` calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

CUDA_REQUEST = "PACKOPS_CUDA"  # "1": CUDA or an error; "0": never; unset: CUDA when nvcc is there
VERBOSE = "PACKOPS_BUILD_VERBOSE"  # "1": show every compiler command
OLDEST_GPU = 8.0  # compute capability
# What ptxas says, as information, where every wgmma waits for the one before, or a warp group keeps registers it was to give up.
SLOW = "Potential Performance Loss: "
# What setuptools and torch, C++ compilers and nvcc read by themselves.
COMPILER_VARIABLES = (
    "CC", "CXX", "LDSHARED", "LDCXXSHARED", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS",
    "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_RUN_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX",
    "PYTORCH_NVCC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
)  # fmt: skip
SOURCES = "sources.json"  # a note beside object files: the hashes of what they were compiled from
NEVER_COMPILED = (".c", ".cc", ".cp", ".cxx", ".c++")  # sources for others, not for us


def env_flag(name: str) -> bool | None:
    """The environment variable ``name`` as True ("1"), False ("0") or None (unset or empty); anything else is a ValueError."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable {name} must be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


# --------------------------------------------------------------------------------------------------------------------------------
# What there is to build


def find_csrc() -> Path:
    """The folder of the C++ and CUDA sources: inside an installed package, or beside it in the repository."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "csrc", here.parents[1] / "csrc"):
        if (candidate / "build.json").is_file():
            return candidate
    raise FileNotFoundError(f"packops: no csrc/build.json in {here} nor two folders above it")


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below ``folder``, behind links too, without hidden ones and editors' backups."""
    real = folder.resolve()
    if real in above:  # a link back to where it lies in
        return
    for path in folder.iterdir():
        if path.name.startswith((".", "#")) or path.name.endswith("~"):
            continue
        if path.is_dir():
            yield from files_below(path, (*above, real))
        elif path.is_file():
            yield path


def source_files(csrc: Path) -> list[Path]:
    """Every file of ``csrc``, as an ``#include`` takes any name, in an order that does not depend on the machine."""
    found = list(files_below(csrc))
    for path in found:
        if path.suffix.lower() in NEVER_COMPILED:
            raise ValueError(f"packops: {path} would not be compiled: sources must be named .cpp or .cu, got {path.suffix}")
    return sorted(found, key=lambda path: path.relative_to(csrc).as_posix())


def translation_units(csrc: Path, *, cuda: bool, python_module: bool) -> list[Path]:
    """What is compiled: every ``.cpp`` file, with ``cuda`` every ``.cu`` file too; ``bindings.cpp`` only if asked for."""
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    found = [path for path in source_files(csrc) if path.suffix in suffixes]
    return [path for path in found if python_module or path != csrc / "bindings.cpp"]


def source_digest(csrc: Path) -> str:
    """Which sources a build or a test run speaks of."""
    return digest_of(source_files(csrc), csrc)


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """sha256 over the contents of files and their paths in the folder."""
    digest = hashlib.sha256()
    for path in files:
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


Hashes = dict[str, str | None]  # path -> sha256 of the content, None where there is no such file


def hashes(files: Iterable[str]) -> Hashes:
    found: Hashes = dict.fromkeys(files)
    for path in found:
        with contextlib.suppress(OSError):
            found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


def overlooks(note: Path, files: Iterable[str]) -> bool:
    """Whether ninja, which compiles what is newer than its object, may miss a file: an older one put back (cp -p, rsync -a)."""
    if not note.is_file():
        return True
    known, built = json.loads(note.read_text()), note.stat().st_mtime
    changed = [Path(name) for name, digest in hashes({*known, *files}).items() if digest and known.get(name) != digest]
    return any(path.stat().st_mtime <= built for path in changed)


def read_config(csrc: Path) -> dict[str, Any]:
    return json.loads((csrc / "build.json").read_text())


# --------------------------------------------------------------------------------------------------------------------------------
# CUDA


def cuda_libraries(home: Path) -> Path | None:
    """Where a toolkit keeps the static runtime that we link: NVIDIA's installer, conda and pip each have a layout."""
    for folder in (home / "lib64", home / "lib", *sorted((home / "targets").glob("*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    return None


def cuda_headers(home: Path | None) -> list[str]:
    folders = [home / "include", *sorted((home / "targets").glob("*/include"))] if home else []
    return [str(folder) for folder in folders if folder.is_dir()]


def is_toolkit(home: Path) -> bool:
    """An nvcc on the PATH may be a wrapper that lies outside its toolkit: a toolkit also has the runtime."""
    return (home / "bin" / "nvcc").is_file() and cuda_libraries(home) is not None


def find_cuda_home() -> Path | None:
    """The CUDA toolkit that has an nvcc: $CUDA_HOME, then the PATH, then /usr/local/cuda, then pip's packages."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if on_path:
        candidates.append(str(Path(on_path).resolve().parents[1]))
    candidates.append("/usr/local/cuda")
    for folder in sys.path:
        candidates += sorted(map(str, Path(folder, "nvidia").glob("cu[0-9]*")), reverse=True)
    for home in candidates:
        if home and is_toolkit(Path(home)):
            return Path(home)
    return None


def choose_cuda_home() -> Path | None:
    """The toolkit to build with, or None for a CPU-only build; obeys PACKOPS_CUDA."""
    request = env_flag(CUDA_REQUEST)
    given = os.environ.get("CUDA_HOME")
    if request is not False and given and not is_toolkit(Path(given)):
        raise RuntimeError(
            f"CUDA_HOME={given} is no CUDA toolkit: it needs bin/nvcc, and libcudart_static.a in lib64, lib or targets/*/lib. "
            f"Mend or unset it; {CUDA_REQUEST}=0 builds without CUDA"
        )
    home = None if request is False else find_cuda_home()
    if home is None and request:
        raise RuntimeError(f"{CUDA_REQUEST}=1 asks for CUDA kernels, but no nvcc was found: set CUDA_HOME or put nvcc on PATH")
    if home is None and request is None:
        print(
            "packops: WARNING: nvcc was not found, so this is a CPU-only build. "
            "For CUDA kernels put nvcc on PATH or set CUDA_HOME; PACKOPS_CUDA=0 silences this.",
            file=sys.stderr,
        )
    return home


def split_arch_list(arch_list: str) -> list[str]:
    """``"8.0;9.0 12.0+PTX"`` as its items; ValueError for anything that is not a list of architectures."""
    items = [item for item in re.split(r"[;, ]+", arch_list) if item]
    for item in items:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
            raise ValueError(f'TORCH_CUDA_ARCH_LIST: {item!r} is not of the form "9.0", "9.0a" or "9.0+PTX"')
    if not items:
        raise ValueError(f'TORCH_CUDA_ARCH_LIST must name an architecture such as "9.0", got {arch_list!r}')
    return items


def arch_flags(archs: list[str]) -> list[str]:
    """nvcc's -gencode flags. Machine code for 9.0 is that of 9.0a, all of Hopper's instructions: there is no other GPU of 9.x."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        exact = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{exact},code=sm_{exact}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def visible_archs(cuda_home: Path) -> list[str]:
    """The architectures of this machine's GPUs; empty without one that packops runs on, or with one that nvcc does not know."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    capabilities = set(re.findall(r"^\d+\.\d$", answer.stdout, re.MULTILINE)) if answer.returncode == 0 else set()
    archs = sorted((item for item in capabilities if float(item) >= OLDEST_GPU), key=float)
    known = nvcc_says(cuda_home, "--list-gpu-arch").split()
    return archs if all(f"compute_{arch.replace('.', '')}" in known for arch in archs) else []


def choose_archs(config: dict[str, Any], cuda_home: Path) -> tuple[list[str], str]:
    """The architectures to compile for, and a remark for the user: TORCH_CUDA_ARCH_LIST's, this machine's, or all of them."""
    every = split_arch_list(config["cuda_arch_list"])
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return (every if given.lower() == "all" else split_arch_list(given)), ""
    archs = visible_archs(cuda_home)
    if archs:
        return archs, " (of this machine; TORCH_CUDA_ARCH_LIST=All builds for every GPU)"
    return every, " (no GPU is visible here, so for every GPU, which takes long; TORCH_CUDA_ARCH_LIST=9.0 builds for one)"


def nvcc_says(cuda_home: Path, question: str) -> str:
    return subprocess.run([str(cuda_home / "bin" / "nvcc"), question], capture_output=True, text=True).stdout


def nvcc_version(cuda_home: Path) -> str:
    match = re.search(r"release ([\d.]+)", nvcc_says(cuda_home, "--version"))
    return match[1] if match else "unknown"


# --------------------------------------------------------------------------------------------------------------------------------
# The extension


def make_extension(
    name: str,
    csrc: Path,
    *,
    python_module: bool,
    cuda_home: Path | None,
    archs: list[str] | None = None,
    defines: tuple[str, ...] = (),
    root: Path | None = None,
):
    """One ``CppExtension`` out of ``csrc``. ``root``: make source paths relative to it, as setuptools wants."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"packops: building needs torch ({error}). Install it first, or leave out --no-build-isolation"
        ) from None

    config = read_config(csrc)
    macros = config["defines"] + list(defines)
    # The C++ library comes first in it: libtorch and libc10 export copies of some of its symbols, other ones in each version.
    link_flags = list(config["link_flags"])
    if python_module:
        link_flags.append("-Wl,-rpath,$ORIGIN/../torch/lib")
    remark = ""
    if not cuda_home:
        archs = []
    elif not archs:
        archs, remark = choose_archs(config, cuda_home)
    if cuda_home:
        # Unquoted, one token each: quotes and semicolons do not survive every shell between here and the compiler.
        macros += config["cuda_defines"] + [
            f"PACKOPS_CUDA_VERSION={nvcc_version(cuda_home)}",
            f"PACKOPS_CUDA_ARCHS={'_'.join(archs)}",
        ]
        link_flags += [f"-L{cuda_libraries(cuda_home)}", *config["cuda_link_flags"]]
        # Under a CPU-only torch this is None, and BuildExtension would refuse .cu sources although it can compile them.
        cpp_extension.CUDA_HOME = str(cuda_home)
    macros = ["-D" + macro for macro in macros]
    # Python's own flags often ask for debugging symbols, which would be most of a wheel.
    compile_args = {"cxx": [*config["cxx_flags"], "-g0", *macros]}
    if cuda_home:
        compile_args["nvcc"] = config["nvcc_flags"] + macros + arch_flags(archs)
    base = csrc if root is None else csrc.relative_to(root)
    units = translation_units(csrc, cuda=cuda_home is not None, python_module=python_module)
    extension = cpp_extension.CppExtension(
        name,
        [str(base / path.relative_to(csrc)) for path in units],
        include_dirs=[str(csrc), *cuda_headers(cuda_home)],
        extra_compile_args=compile_args,
        extra_link_args=link_flags,
        depends=[str(base / path.relative_to(csrc)) for path in source_files(csrc)],
    )
    extension.libraries = []  # CppExtension names libtorch_python and others; link_flags says exactly what is needed
    label = "sm_" + ", sm_".join(archs).replace(".", "") if cuda_home else "the CPU"
    extension.packops_label = label + remark
    extension.packops_digest_of = csrc if python_module else None
    return extension


def path_with_ninja() -> str:
    """The PATH, and pip's ninja: an interpreter called by its path, .venv/bin/python, has that beside it but not on the PATH."""
    path = os.environ.get("PATH", os.defpath)
    with contextlib.suppress(ImportError):
        import ninja

        path = os.pathsep.join([ninja.BIN_DIR, path])
    return path


def files_read(objects: Path) -> list[str]:
    """The files that compilers read for the objects in this folder, by ninja's notes: all but headers of the system."""
    command = [shutil.which("ninja", path=path_with_ninja()) or "ninja", "-C", str(objects), "-t", "deps"]
    answer = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape").stdout
    return sorted({str(objects / line.strip()) for line in answer.splitlines() if line.startswith("    ")})


def check_compiler() -> None:
    """SystemExit unless the C++ compiler knows C++20, before it prints a page about the first source."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    program = "#include <bit>\n#include <concepts>\nstatic_assert(std::integral<int> && std::bit_width(4u) == 3);\n"
    try:
        check = subprocess.run(
            [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], input=program, capture_output=True, text=True
        )
        if check.returncode == 0:
            return
        found = (
            subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.split("\n")[0] or "of unknown version"
        )
    except OSError as error:
        found = f"which does not run: {error.strerror}"
    raise SystemExit(
        f"packops: building needs a C++20 compiler (GCC >= 11 or Clang >= 14), found {command[0]}, {found}: "
        "install one, or name it in CXX"
    )


def make_build_command():
    """torch's ``BuildExtension``, calm (progress instead of compiler commands), with our own architecture flags.

    It does not compare nvcc's version with torch's: the ops use the stable ABI and a static CUDA runtime, so they need not match.
    """
    from torch.utils import cpp_extension

    os.environ["PATH"] = path_with_ninja()
    cpp_extension._check_cuda_version = lambda *args, **kwargs: None
    base = cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)

    class BuildCommand(base):  # type: ignore[misc, valid-type]
        def build_extensions(self) -> None:
            check_compiler()
            (extension,) = self.extensions
            temporary = Path(self.build_temp)
            temporary.mkdir(parents=True, exist_ok=True)
            sources = extension.sources
            if extension.packops_digest_of:
                extension.sources = [*sources, write_digest(temporary, extension.packops_digest_of)]
            drop_stale_objects(temporary, extension.sources, extension.depends)
            compiled = hashes(extension.depends)
            label = f"packops: compiling {len(extension.sources)} files for {extension.packops_label}"
            try:
                with quiet_output(temporary / "build.log", label, temporary):
                    super().build_extensions()
            finally:
                extension.sources = sources
                (temporary / SOURCES).write_text(json.dumps(compiled))

    return BuildCommand


def drop_stale_objects(folder: Path, sources: list[str], files: list[str]) -> None:
    """Remove objects that ninja would keep although they are old.

    All of them if it overlooks a file, or if the build before was killed. And CUDA objects that are older than any of ``files``,
    the headers among them: torch asks nvcc which headers a source reads only where torch itself has CUDA.
    """
    note = folder / SOURCES
    if overlooks(note, files):
        for built in folder.rglob("*.o"):
            built.unlink()
    note.unlink(missing_ok=True)  # until this build ends
    newest = max(Path(file).stat().st_mtime for file in files)
    for source in sources:
        built = (folder / source).with_suffix(".o")
        if source.endswith(".cu") and built.is_file() and built.stat().st_mtime < newest:
            built.unlink()


def write_digest(folder: Path, csrc: Path) -> str:
    """A source file that tells the library which sources it was built from; rewritten only when they changed."""
    path = folder / "source_digest.cpp"
    declaration = "extern const char* const kSourceDigest;"
    definition = f'const char* const kSourceDigest = "{source_digest(csrc)}";'
    text = f"namespace packops {{ {declaration} {definition} }}\n"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return str(path)


# --------------------------------------------------------------------------------------------------------------------------------
# Calm output


def readable_log(text: str) -> str:
    """A build log without the commands that ninja and setuptools print, and with what the compiler refused at its end."""
    command = re.compile(
        r"\[\d+/\d+\] |(\S*/)?(ccache |sccache )?(\S*/)?(g\+\+|gcc|clang\+\+|clang|c\+\+|cc|nvcc|x86_64-\S+) .* -[co] "
        r"|(building|copying|creating|running) "
    )
    told: list[str] = []
    failed: list[str] = []
    block = told
    for line in text.splitlines():
        if line.startswith("FAILED: "):
            block = failed
            continue
        if re.match(r"\[\d+/\d+\] ", line):
            block = told
        elif line.startswith("ninja: build stopped"):
            break  # a traceback of Python follows, which says no more
        if not command.match(line):
            block.append(line)
    return "\n".join([*told, *failed]).strip()


@contextlib.contextmanager
def progress(label: str, objects: Path, stream: TextIO) -> Iterator[None]:
    """Say ``label`` and, on a terminal, how far the compiler is, by the object files that appear in the folder ``objects``."""
    started, since = time.monotonic(), time.time() - 0.1  # a file's time lags by a tick of the kernel
    done = threading.Event()

    def compiled() -> int:
        with contextlib.suppress(OSError):
            return sum(path.stat().st_mtime >= since for path in objects.rglob("*.o"))
        return 0

    def draw() -> None:
        while not done.wait(0.5):
            stream.write(f"\r{label}: {compiled()} done, {time.monotonic() - started:.0f} s ")
            stream.flush()

    terminal = stream.isatty()
    stream.write(label + (" ..." if terminal else " ...\n"))
    stream.flush()
    thread = threading.Thread(target=draw, daemon=True)
    if terminal:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if terminal:
            thread.join()
        stream.write(f"{chr(13) if terminal else ''}{label}: {time.monotonic() - started:.0f} s{' ' * 12 if terminal else ''}\n")
        stream.flush()


@contextlib.contextmanager
def quiet_output(log: Path, label: str, objects: Path) -> Iterator[None]:
    """Send what this process and its children print to the file ``log``; show warnings, and all of it if there is an error."""
    if env_flag(VERBOSE):
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(kept[1]), "w")
    try:
        with log.open("w") as file, progress(label, objects, terminal):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(kept[0], 1)
                os.dup2(kept[1], 2)
    except Exception as error:
        terminal.write(f"{readable_log(log.read_text())}\n")
        raise SystemExit(f"packops: the build failed: {error} (all of its output: {log})") from None
    else:
        text = log.read_text()
        if "warning" in text:
            terminal.write(f"{readable_log(text)}\n")
        if SLOW in text:
            why = text.split(SLOW, 1)[1].split(" in the function", 1)[0].splitlines()[0]
            terminal.write(
                f"packops: WARNING: nvcc made the lm_head, gated MLPs or attention slow on Hopper ({why}). "
                "CUDA 12.9 or newer does not, as long as csrc/ is unchanged\n"
            )
    finally:
        terminal.close()
        for descriptor in kept:
            os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------------------------
# One library for the JIT loader


def end_with_parent(parent: int) -> None:
    """End this process and the compilers that it runs when ``parent`` ends, however that ends (Linux; elsewhere not at all).

    Ninja passes a SIGTERM on to its compilers, which have process groups of their own; others are in this process's group.
    """

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(os.getpgrp(), signal.SIGTERM)
        os._exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it ended before it could be waited for
            stop(signal.SIGTERM, None)


def build_library(request: dict[str, Any]) -> None:
    """Compile ``csrc`` into the file ``out``, a library of ops without a Python module, and see whether it loads.

    Loading it here first keeps a library that ends its process (an op defined twice, say) out of the process of the user.
    """
    import torch
    from setuptools import Distribution

    csrc, out, objects = Path(request["csrc"]), Path(request["out"]), Path(request["objects"])
    cuda_home = Path(request["cuda_home"]) if request["cuda_home"] else None
    extension = make_extension(
        "library", csrc, python_module=False, cuda_home=cuda_home, archs=request["archs"], defines=tuple(request["defines"])
    )
    command = make_build_command()(Distribution({"name": "library", "ext_modules": [extension]}))
    command.build_lib = str(out.parent)
    command.build_temp = str(objects)
    command.ensure_finalized()
    command.run()
    Path(command.get_outputs()[0]).rename(out)
    print(f"loading {out}", flush=True)
    torch.ops.load_library(out)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: packops' own modules must not pass for top-level ones
    os.environ[VERBOSE] = "1"  # the loader that asked reads all of it
    arguments = json.loads(sys.argv[1])
    end_with_parent(arguments["parent"])
    build_library(arguments)
