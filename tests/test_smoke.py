"""What the check of a built wheel runs, here on the source tree: a new op it does not call is found before a wheel is built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from op_table import kernels, ops_called_by

SMOKE = Path(__file__).resolve().parents[1] / "tools" / "smoke.py"


def load():
    spec = importlib.util.spec_from_file_location("smoke", SMOKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_calls_every_op_and_each_is_right():
    """Private ones, too, which the public functions call."""
    called = ops_called_by(load().check_everything)
    assert not kernels() - called, f"tools/smoke.py never runs {sorted(kernels() - called)}"


def test_smoke_names_an_op_it_does_not_call():
    library = torch.library.Library("packops", "FRAGMENT")
    try:
        library.define("unheard_of(Tensor x) -> Tensor")
        with pytest.raises(AssertionError, match="'unheard_of'"):
            load().check_everything()
    finally:
        library._destroy()
