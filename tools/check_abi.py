"""What a built wheel depends on: the LibTorch Stable ABI as of torch 2.10, and no library that a user's machine may lack.

python tools/check_abi.py dist/packops-*.whl...
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MINIMUM_TORCH = "2.10.0"
# Newer symbols that the library can do without: undefined weak symbols, null under an older torch.
WEAK = {"torch_exception_get_what_without_backtrace"}
# A CUDA runtime or libtorch_cuda in this list would tie the wheel to one CUDA version, or to torch with CUDA.
ALLOWED = {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
ALLOWED |= {"libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def audit(library: Path) -> list[str]:
    """What is wrong with the library; empty if nothing is."""
    command = [str(Path(sys.executable).with_name("torch-abi-audit")), "--json", str(library)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (extension,) = report["extensions"]
    torch = extension["torch"]
    wrong = []
    if not torch["stable"]:
        wrong.append(f"symbols outside the stable ABI: {torch['unstable_symbols']}")
    undefined = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    weak = WEAK & set(re.findall(r"^ +[wv] (\S+)$", undefined, re.MULTILINE))
    if torch["min_torch_version"] != MINIMUM_TORCH and not set(torch["version_defining_symbols"]) <= weak:
        wrong.append(f"needs torch {torch['min_torch_version']}, promised {MINIMUM_TORCH}: {torch['version_defining_symbols']}")
    # Every symbol of libstdc++ and libc has a version, unless it is a copy that libtorch or libc10 exports.
    named = re.findall(r"^ +U ([^@\s]+)$", undefined, re.MULTILINE)
    borrowed = [name for name in named if not re.match(r"_?Py[A-Z_]|(aoti_)?torch_", name)]
    if borrowed:
        wrong.append(f"takes {borrowed} from libtorch or libc10, which do not promise them")
    dynamic = subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    if needed - ALLOWED:
        wrong.append(f"needs {sorted(needed - ALLOWED)}")
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    if any(not part.startswith("$ORIGIN") for path in paths for part in path.split(":")):
        wrong.append(f"looks for libraries in {paths}: only $ORIGIN is the same on every machine")
    headers = subprocess.run(["readelf", "-lW", str(library)], capture_output=True, text=True, check=True).stdout
    if re.search(r"GNU_STACK.* RWE ", headers):
        wrong.append("has an executable stack")
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()} - {"__bss_start", "_end", "_edata"}
    own = {name for name in exported if not re.match(r"_Z(TV|TI|TS|N|NK|GVN)?St|_ZZNS", name)}
    # Each library has a packops_set_error_hook of its own, which is looked up by the library's handle.
    if own - {"packops_set_error_hook"} != {"PyInit__C"}:
        wrong.append(f"exports {own}: a second library with the same names would be bound to ours")
    return wrong


def audit_wheel(wheel: Path) -> bool:
    """Whether the wheel is as promised; says so, or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            archive.extractall(folder)
        if len(libraries) != 1:
            print(f"{wheel.name}: expected one library, found {libraries}")
            return False
        wrong = audit(Path(folder) / libraries[0])
    for line in wrong:
        print(f"{libraries[0]}: {line}")
    verdict = "NOT portable" if wrong else f"stable ABI, torch >= {MINIMUM_TORCH}, needs torch and the C++ runtime alone"
    print(f"{wheel.name}: {verdict}")
    return not wrong


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    verdicts = [audit_wheel(Path(name)) for name in sys.argv[1:]]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
