"""Build packops: the metadata is in pyproject.toml, the sources and flags in csrc/build.json."""

import importlib.util
import os
from pathlib import Path

import setuptools
from setuptools import find_namespace_packages, find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # a fresh venv has an older one, and its own complaint is no help
    raise SystemExit(
        f"packops: building needs setuptools >= 77, found {setuptools.__version__}: pip install --upgrade setuptools"
    )

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
spec = importlib.util.spec_from_file_location("packops_build", ROOT / "python" / "packops" / "_build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

sources = ["packops." + name for name in find_namespace_packages(include=["csrc", "csrc.*"])]  # the JIT loader compiles them
setup(
    packages=[*find_packages("python"), *sources],
    package_dir={"": "python", "packops.csrc": "csrc"},
    ext_modules=[
        build.make_extension("packops._C", ROOT / "csrc", python_module=True, cuda_home=build.choose_cuda_home(), root=ROOT)
    ],
    cmdclass={"build_ext": build.make_build_command()},
)
