"""Compile a (modified) copy of ``csrc/`` at run time and load its ops beside the installed ones.

    ops = packops.jit.load("my_csrc")                    # torch.ops.packops_dev
    ops.cross_entropy(logits, labels)                    # against torch.ops.packops.cross_entropy(logits, labels)

The cache lies in the user's cache folder (``$PACKOPS_CACHE_DIR`` chooses another) and is keyed by what the build depends on:
contents, never times. Headers that it includes from elsewhere count, but those of the system do not. ``PACKOPS_DISABLE_JIT=1``
forbids compiling; what the cache has is still loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import _C, _build, _loader, ops

CACHE_DIR = "PACKOPS_CACHE_DIR"
DISABLE = "PACKOPS_DISABLE_JIT"
UNFINISHED = "unfinished"  # a file beside object files whose compilation did not come to its end
KEPT_BUILDS = 32  # every edit of a kernel leaves a library of some megabytes; the oldest go

_loaded: dict[str, dict[str, Any]] = {}  # namespace -> the note of the build that serves it
_lock = threading.RLock()


def load(
    csrc: str | os.PathLike | None = None, *, defines: Iterable[str] = (), namespace: str = "packops_dev", verbose: bool = False
):
    """Compile ``csrc``, register its ops, fake kernels and gradients as ``torch.ops.<namespace>``, and return that.

    Args:
        csrc: a folder like packops' ``csrc/``, with its ``build.json``; None is the one packops itself was built from.
        defines: preprocessor macros for every file, ``"NAME"`` or ``"NAME=VALUE"``.
        namespace: where the ops go. A process can load any number of builds, each into a namespace of its own.
        verbose: show the compiler's output although nothing failed.

    CUDA kernels are compiled for the GPUs of this machine, or for ``TORCH_CUDA_ARCH_LIST``. Without a GPU only the CPU kernels
    are, unless ``PACKOPS_CUDA=1``; ``PACKOPS_CUDA=0`` leaves CUDA out.

    Raises:
        ImportError: a package of the extra ``packops[jit]`` is missing.
        FileNotFoundError: ``csrc`` has no ``build.json``.
        ValueError: a malformed define or namespace; a C or C++ source that is not named ``.cpp``.
        RuntimeError: the namespace is taken; the compiler failed (its output is in the message); compiling is forbidden;
            someone else can write into the cache.
    """
    _need_extras()
    folder = Path(csrc).expanduser().resolve() if csrc is not None else _build.find_csrc()
    if not (folder / "build.json").is_file():
        raise FileNotFoundError(f"packops.jit: csrc must be a copy of packops' csrc folder, found no build.json in {folder}")
    request = {
        **_target(folder),
        "csrc": str(folder),
        "defines": [f"PACKOPS_NAMESPACE={_checked(namespace)}", *_checked_defines(defines)],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name in _build.COMPILER_VARIABLES},
        "torch": torch.__version__,
        "compilers": _compiler_versions(),
    }
    with _lock:
        key = _key(request)
        if namespace in _loaded and _loaded[namespace]["key"] == key and _same_headers(_loaded[namespace], str(folder)):
            return getattr(torch.ops, namespace)
        if _loader.has_ops(namespace):
            raise RuntimeError(
                f"packops.jit: torch.ops.{namespace} already has ops in this process"
                + (" (of another build)" if namespace in _loaded else "")
                + ", and a second library that defines them would end it. Choose another namespace: "
                + f"load(..., namespace={namespace + '_2'!r})"
            )
        cache = _private_folder()
        built = _find(cache, key, str(folder)) or _compile(cache, request, verbose)
        library = cache / built["key"] / "library.so"
        torch.ops.load_library(library)
        _share_errors(library)
        ops.register(namespace)
        _loaded[namespace] = built  # what was loaded, although the sources may have changed since
    return getattr(torch.ops, namespace)


def _share_errors(library: Path) -> None:
    """Let errors of this library have the Python types that those of packops have; sources older than that can be loaded too."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(str(library)).packops_set_error_hook(ctypes.c_void_p(_C.error_hook))


def installed_csrc() -> Path:
    """The sources that came with this installation: copy them, change the copy, :func:`load` it."""
    return _build.find_csrc()


def _need_extras() -> None:
    missing = [name for name in ("filelock", "platformdirs", "setuptools") if importlib.util.find_spec(name) is None]
    if shutil.which("ninja", path=_build.path_with_ninja()) is None:
        missing.append("ninja")
    if missing:
        raise ImportError(f"packops.jit needs {', '.join(missing)}: pip install '.[jit]'")


def _checked(namespace: str) -> str:
    if not re.fullmatch(r"[A-Za-z]\w*", namespace, re.ASCII):
        raise ValueError(f"packops.jit: namespace must be a C++ and Python identifier, got {namespace!r}")
    return namespace


def _checked_defines(defines: Iterable[str]) -> list[str]:
    """The macros, if a shell and a compiler take each for one plain word."""
    if isinstance(defines, str):
        raise ValueError(f"packops.jit: defines must be several strings such as ('BLOCK=256',), got the one string {defines!r}")
    checked = list(defines)
    for define in checked:
        if not re.fullmatch(r"[A-Za-z_]\w*(=[\w.+-]*)?", define, re.ASCII):
            raise ValueError(f"packops.jit: defines must be 'NAME' or 'NAME=VALUE' without quotes or spaces, got {define!r}")
    return checked


def _target(csrc: Path) -> dict[str, Any]:
    """What to compile for: the CUDA toolkit and the architectures, or neither."""
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    if not gpus and not _build.env_flag(_build.CUDA_REQUEST):
        return {"cuda_home": None, "archs": None}
    cuda_home = _build.choose_cuda_home()
    if cuda_home is None:
        return {"cuda_home": None, "archs": None}
    if gpus and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {"cuda_home": str(cuda_home), "archs": [f"{major}.{minor}" for major, minor in gpus]}
    return {"cuda_home": str(cuda_home), "archs": _build.choose_archs(_build.read_config(csrc), cuda_home)[0]}


def _key(request: dict[str, Any]) -> str:
    """The name of a build: everything that its content depends on, but headers outside ``csrc``, which a compiler has to name."""
    cuda_home = request["cuda_home"]
    parts = {
        **request,
        "csrc": _build.source_digest(Path(request["csrc"])),
        "builder": hashlib.sha256(Path(_build.__file__).read_bytes()).hexdigest(),
        "nvcc": _build.nvcc_version(Path(cuda_home)) if cuda_home else None,
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _compiler_versions() -> list[str]:
    """Of the C++ compiler, and of those that nvcc may be given for the host's code: the command alone outlives an update."""
    commands = [os.environ.get("CXX") or "c++", *filter(None, map(os.environ.get, ("CC", "NVCC_CCBIN")))]
    versions = []
    for command in commands:
        try:
            asked = [*command.split(), "--version"]
            versions.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError) as error:
            if command == commands[0]:  # the others may be of no use here
                raise RuntimeError(f"packops.jit: no C++ compiler: {error}; install g++ or set CXX") from None
    return versions


# --------------------------------------------------------------------------------------------------------------------------------
# The cache: <folder>/<key>/{library.so, build.json}, <key>.lock, and objects-<...>/ for what the next edit need not compile again


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``$PACKOPS_CACHE_DIR/jit``, or ``packops/jit`` in the user's cache folder."""
    import platformdirs

    chosen = os.environ.get(CACHE_DIR)
    folder = Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("packops")
    if str(folder).startswith("~"):  # else it would be a folder of that name here
        raise RuntimeError(
            f"packops.jit: the cache folder {folder} lies in a home folder that nobody knows. "
            f"Set HOME, or {CACHE_DIR} to a folder that you can write to"
        )
    return folder.absolute() / "jit"


def _private_folder() -> Path:
    """The cache folder, made for this user alone; what others could have written into is refused, because it would be run."""
    folder = cache_folder()
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
    except OSError as error:
        raise RuntimeError(
            f"packops.jit: the cache folder {folder} cannot be made ({error.strerror}: {error.filename}). "
            f"Set {CACHE_DIR} to a folder that you can write to"
        ) from None
    for path in (folder, folder.parent):
        status = path.lstat()
        wrong = None
        if not stat.S_ISDIR(status.st_mode):
            wrong = "is not a folder"
        elif status.st_uid != os.geteuid():
            wrong = f"belongs to user {status.st_uid}, not to you ({os.geteuid()})"
        elif status.st_mode & 0o022:
            wrong = f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
        if wrong:
            raise RuntimeError(
                f"packops.jit: the cache folder {path} {wrong}. Mend that, or set {CACHE_DIR} to a folder of your own"
            )
    return folder


def _find(cache: Path, key: str, csrc: str) -> dict[str, Any] | None:
    """The note beside the library of this key if the cache has one that is whole, ours, and of the headers that there are."""
    library, note = cache / key / "library.so", cache / key / "build.json"
    try:
        built = json.loads(note.read_text())
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        if library.lstat().st_uid != os.geteuid() or built["library_sha256"] != digest or built["key"] != key:
            raise ValueError
        if not _same_headers(built, csrc):
            return None
    except (OSError, ValueError, KeyError):
        if (cache / key).exists():
            print(f"packops.jit: {cache / key} is damaged or was not written by packops: compiling again", file=sys.stderr)
        return None
    with contextlib.suppress(OSError):  # a cache that is mounted read-only
        os.utime(cache / key)
    return built


def _same_headers(built: dict[str, Any], csrc: str) -> bool:
    """Whether the headers outside ``csrc`` are those that the library was made of: its key cannot speak of them."""
    wanted = dict(built["included"])
    for path, digest in built["included"].items():
        if os.path.commonpath([path, built["csrc"]]) != "/":  # by "../" the same sources in another place mean another file
            wanted[os.path.normpath(Path(csrc, os.path.relpath(path, built["csrc"])))] = digest
    return _build.hashes(wanted) == wanted


def _compile(cache: Path, request: dict[str, Any], verbose: bool) -> dict[str, Any]:
    """Compile, unless another process just did; put the result into the cache in one step."""
    import filelock

    if not os.access(cache, os.W_OK | os.X_OK):
        raise RuntimeError(
            f"packops.jit: the cache folder {cache} cannot be written. Set {CACHE_DIR} to a folder that you can write to"
        )
    if _build.env_flag(DISABLE):
        raise RuntimeError(f"packops.jit: {DISABLE}=1 forbids compiling, and {cache} has no build of these sources")
    lock = filelock.FileLock(cache / "compile.lock", mode=0o600)
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"packops.jit: waiting for another process that compiles ({lock.lock_file})", file=sys.stderr)
        lock.acquire()
    try:
        for _ in range(3):
            key = _key(request)
            found = _find(cache, key, request["csrc"])
            if found:
                return found
            with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
                building = Path(temporary) / "done"
                building.mkdir()
                included = _run_compiler(cache, request, building / "library.so", verbose)
                if included is None or _key(request) != key:
                    continue  # someone saved a file meanwhile
                digest = hashlib.sha256((building / "library.so").read_bytes()).hexdigest()
                built = {**request, "key": key, "library_sha256": digest, "included": included}
                (building / "build.json").write_text(json.dumps(built, indent=2))
                shutil.rmtree(cache / key, ignore_errors=True)
                building.rename(cache / key)
            _forget_old(cache)
            return built
        raise RuntimeError(f"packops.jit: {request['csrc']} kept changing while it was compiled")
    finally:
        lock.release()


def _run_compiler(cache: Path, request: dict[str, Any], out: Path, verbose: bool) -> _build.Hashes | None:
    """Run ``_build.py`` in a process of its own, where setuptools and a library that does not load can do no harm.

    Returns the headers outside ``csrc`` that the compiler read, or None if a file changed meanwhile.
    """
    csrc = Path(request["csrc"])
    objects = _objects(cache, request)
    log = out.parent / "build.log"
    label = f"packops.jit: compiling {csrc} for " + (", ".join(request["archs"]) if request["archs"] else "the CPU")
    arguments = json.dumps({**request, "out": str(out), "objects": str(objects), "parent": os.getpid()})
    files = _sources(csrc)
    compiled, started = _build.hashes(files), time.time() - 0.1  # a file's time lags by a tick of the kernel
    unfinished = objects / UNFINISHED
    unfinished.touch()
    with log.open("w") as file, _build.progress(label, objects, sys.stderr):
        command = [sys.executable, _build.__file__, arguments]
        process = subprocess.Popen(command, cwd=out.parent, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:  # an interrupt, say
            process.terminate()
            process.wait()
            raise
    text = log.read_text(errors="replace")
    if verbose:
        print(text, file=sys.stderr)
    included = _build.hashes(set(_build.files_read(objects)) - set(files))
    unchanged = _build.hashes(_sources(csrc)) == compiled and not any(_saved_since(started, path) for path in included)
    finished = status >= 0 or out.is_file()  # else ninja and its compilers may live on
    if finished and unchanged:  # else nobody knows what was compiled
        (objects / _build.SOURCES).write_text(json.dumps({**compiled, **included}))
        unfinished.unlink()
    if status == 0:
        return included if unchanged else None
    if not out.is_file():
        signal = "" if finished else f" (the compiler's process was ended by signal {-status})"
        raise RuntimeError(f"packops.jit: compiling {csrc} failed{signal}:\n{_build.readable_log(text)}")
    ended = f"ends the process with signal {-status}" if status < 0 else "does not load"
    raise RuntimeError(
        f"packops.jit: {csrc} compiles, but the library {ended}; "
        f"is an op defined twice, or a function declared and never written?\n{_build.readable_log(text)}"
    )


def _objects(cache: Path, request: dict[str, Any]) -> Path:
    """A folder in which ninja finds what it compiled from this ``csrc`` before, emptied if nobody knows what that was.

    A file changed while it was compiled, or a killed compiler left half an object. ``_build.py`` sees an older file put back.
    """
    name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    folder = cache / f"objects-{name}"
    if (folder / UNFINISHED).exists():
        # Moved first: a compiler that outlived its build finds no folder to write into.
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
        folder.rename(aside / "objects")
        shutil.rmtree(aside, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    return folder


def _sources(csrc: Path) -> list[str]:
    return [str(path) for path in _build.source_files(csrc)]


def _saved_since(started: float, path: str) -> bool:
    """Whether the file's time is between ``started`` and now; a clock that is ahead leaves files of the future."""
    with contextlib.suppress(OSError):
        return started <= Path(path).stat().st_mtime <= time.time()
    return False


def _forget_old(cache: Path) -> None:
    """Remove all but the last used builds, and what killed compilations left behind. Only the holder of the lock may."""
    for path in cache.glob(".building-*"):
        shutil.rmtree(path, ignore_errors=True)
    folders = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_BUILDS:]:
        shutil.rmtree(path, ignore_errors=True)
