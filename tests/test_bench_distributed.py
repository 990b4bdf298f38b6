"""The distributed benchmark's simulated part runs, and refuses what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "bench" / "distributed.py"
    spec = importlib.util.spec_from_file_location("bench_distributed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["packops bench distributed", *map(str, arguments)])
    bench.main()


def test_utilisation_by_hand(bench):
    assert bench.utilisation(np.array([[4.0, 2.0], [3.0, 3.0]])) == 12 / 14


def test_balance(bench, monkeypatch, tmp_path, capsys):
    run(bench, monkeypatch, "balance", "--documents", 20_000, "--out", tmp_path / "balance")
    rows = json.loads((tmp_path / "balance.json").read_text())["rows"]
    assert [(row["ranks"], row["packs_per_batch"]) for row in rows] == [(8, 1), (8, 4), (64, 1), (64, 4)]
    for row in rows:
        utilisation = row["utilisation"]
        assert utilisation["none"] < utilisation["attention"] <= 1
        assert row["time_saved"] == pytest.approx(1 - row["time"]["attention"] / row["time"]["none"], abs=1e-5)
    assert "balance=attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vocab", "--ranks", 1], "needs two ranks or more, got 1"),
        (["vocab", "--ranks", 2, "--vocab", 101], "101 classes do not divide by 2 ranks"),
        (["steps", "--device", "cpu"], "needs GPUs"),
    ],
)
def test_what_it_cannot_do(bench, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(bench, monkeypatch, *arguments)
