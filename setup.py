"""Build packops: the metadata is in pyproject.toml, the sources and flags in csrc/build.json."""

import importlib.util
import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
spec = importlib.util.spec_from_file_location("packops_build", ROOT / "python" / "packops" / "_build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

setup(
    packages=[*find_packages("python"), "packops.csrc"],  # with the sources, which the JIT loader compiles
    package_dir={"": "python", "packops.csrc": "csrc"},
    ext_modules=[
        build.make_extension("packops._C", ROOT / "csrc", python_module=True, cuda_home=build.choose_cuda_home(), root=ROOT)
    ],
    cmdclass={"build_ext": build.make_build_command()},
)
