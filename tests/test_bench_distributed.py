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


def test_steps(bench, monkeypatch, tmp_path, capsys):
    """Rows train as one process does, and every round is written down."""
    pytest.importorskip("transformers")
    rows = ["DDP, packed, balance=attention", "FSDP2, padded"]
    small = ["--tiny", "--device", "cpu", "--max-length", 256, "--steps", 2, "--rounds", 1]
    run(bench, monkeypatch, "steps", *small, "--ranks", 2, "--rows", *rows, "--out", tmp_path / "steps")
    (case,) = json.loads((tmp_path / "steps.json").read_text())["cases"]
    assert case["ranks"] == 2
    assert sorted(case["rows"]) == sorted(rows)
    for row in case["rows"].values():
        assert row["weights_off_by"] < 1e-4
        (measured,) = row["rounds"]
        assert len(measured["samples"]) == 2
        assert measured["tokens_per_second"] == pytest.approx(measured["useful_tokens"] / sum(measured["samples"]), rel=1e-3)
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("balance", [None, "none", "attention"])
def test_plans_train_on_every_document_once(bench, balance):
    """Padded steps may leave out the last, which would not fill all ranks."""
    from distributed_steps import PADDED_ROWS, Row, plan

    lengths = np.random.default_rng(0).integers(2, 60, 200).tolist()
    plans = [plan(Row("DDP", balance), lengths, 64, (1.0, 1.0), rank, 3) for rank in range(3)]
    assert len({len(steps) for steps in plans}) == 1
    trained = [document for steps in plans for step in steps for document in step]
    assert len(trained) == len(set(trained))
    assert len(trained) > len(lengths) - 3 * PADDED_ROWS if balance is None else len(trained) == len(lengths)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vocab", "--ranks", 1], "needs two ranks or more, got 1"),
        (["vocab", "--ranks", 2, "--vocab", 101], "101 classes do not divide by 2 ranks"),
        (["steps", "--device", "cpu"], "on a CPU with --tiny only"),
    ],
)
def test_what_it_cannot_do(bench, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(bench, monkeypatch, *arguments)
