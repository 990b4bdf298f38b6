"""clang-format over every C++ and CUDA file that git knows. ``--check`` changes nothing, and fails where it would have to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def main() -> int:
    folders = ["csrc", "tests/cpp", "tests/emulator"]
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.splitlines() if name.endswith(SUFFIXES) and (ROOT / name).is_file()]
    mode = ["--dry-run", "--Werror"] if "--check" in sys.argv[1:] else ["-i"]
    beside = Path(sys.executable).with_name("clang-format")  # the pinned one of this environment
    status = subprocess.run([str(beside) if beside.is_file() else "clang-format", *mode, *files], cwd=ROOT).returncode
    if status and mode != ["-i"]:
        print("`make format` mends this.", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
