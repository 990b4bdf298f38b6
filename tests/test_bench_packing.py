"""The packing benchmark runs, and its utilisation is what it says."""

from __future__ import annotations

import argparse
import importlib
import json

import numpy as np
import pytest


@pytest.fixture
def bench():
    return importlib.import_module("packing")


def test_utilisation_by_hand(bench):
    # step 1: one rank works 4, the other 2 of 4; step 2: both work 3
    assert bench.utilisation(np.array([[4.0, 2.0], [3.0, 3.0]])) == 12 / 14


def test_it_runs(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "gcide_lengths", lambda: None)
    monkeypatch.setattr(bench, "SYSTEMS", [entry for entry in bench.SYSTEMS if entry[2] == "packops"])
    parser = bench.add_arguments(argparse.ArgumentParser())
    assert bench.main(parser.parse_args(["--documents", "3000", "--seconds", "0", "--out", str(tmp_path / "packing")])) == 0
    data = json.loads((tmp_path / "packing.json").read_text())
    rows = {row["system"]: row for row in data["packers"]["lognormal"]}
    assert rows["packops bfd"]["fill"] > rows["packops next_fit"]["fill"]
    assert all(0.5 < row["utilisation"] <= 1 for row in data["ranks"]["lognormal"]["rows"])
    assert (tmp_path / "packing.png").stat().st_size > 10_000
