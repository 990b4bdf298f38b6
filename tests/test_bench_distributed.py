"""The distributed benchmarks run, tell right from wrong, and refuse what they cannot do."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time

import numpy as np
import pytest
import torch

from ranks import run_ranks


@pytest.fixture
def bench():
    return importlib.import_module("distributed")


def run(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["packops bench distributed", *map(str, arguments)])
    bench.main()


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


def test_rows_that_ran_out_of_time_are_left_out(bench):
    """One rank has nothing to balance: its ``none`` is what every packed row is compared with."""
    from distributed_steps import table

    row = {"tokens_per_second": 100.0, "utilisation": 0.5, "peak_gib": 1.0, "weights_off_by": 0.0}
    fast = {**row, "tokens_per_second": 180.0}
    one = {"ranks": 1, "rows": {"DDP, packed, balance=none": row}}
    two = {"ranks": 2, "rows": {"DDP, packed, balance=attention": fast, "DDP, padded": fast}}
    lines = table({"model": "", "corpus_name": "", "max_length": 1, "steps": 1, "cases": [one, two]}, "").splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == [
        "DDP, packed, balance=attention",
        "DDP, packed, balance=none",
        "DDP, padded",
    ]
    assert "0.900" in lines[0]
    assert "0.9" not in lines[2]
    # Without one rank a row is compared with itself alone.
    lines = table({"model": "", "corpus_name": "", "max_length": 1, "steps": 1, "cases": [{**one, "ranks": 2}, two]}, "")
    assert "0.900" not in lines
    assert "1.8" not in lines


def test_lm_head(bench, monkeypatch, tmp_path, capsys):
    run(bench, monkeypatch, "head", "--quick", "--device", "cpu", "--vocab", 402, "--out", tmp_path / "head")
    result = json.loads((tmp_path / "head.json").read_text())
    assert (result["ranks"], result["vocab"]) == (2, 402)
    assert set(result["parts"]) == {"loss", "log_probs"}
    for facts in result["parts"].values():
        assert facts.pop("products")["milliseconds"] > 0
        assert {"packops", "eager, as Megatron"} <= set(facts)
        for name, fact in facts.items():
            assert fact["same_bits"] is True
            assert len(fact["samples"]) == 2
            assert ("gradient of weight" in fact["off_by"]) == (name != "packops, no gradient")
    assert "on all ranks" in capsys.readouterr().out


def on_two_ranks(rank):
    from distributed_losses import Candidate, race, vocab
    from process_group import time_left

    torch.set_num_threads(1)
    device = torch.device("cpu")
    options = {"rows": 24, "vocab": 26, "rounds": 1, "until": math.inf, "peers": False}
    for name, fact in vocab(device, options)["parts"]["loss"].items():
        assert name == "copy" or (fact["same_bits"] and "failed" not in fact)

    exact = {"loss": torch.tensor(2.0), "log_probs": torch.arange(-6.0, -1), "gradient of weight": torch.ones(4, 3)}

    def planted(name, on_rank_1):
        def make():
            found = {key: value.clone() for key, value in exact.items()}
            if rank == 1:
                found[name] = on_rank_1(found[name])
            return lambda: found

        return Candidate(make)

    def fail():
        if rank == 1:
            raise ModuleNotFoundError("nothing here")
        return dict

    def one_row(grad):
        grad[2] *= 1.2
        return grad

    loss, log_probs, grad = exact
    candidates = {
        "right": planted(grad, lambda x: x * 1.001),  # each rank's own
        "another loss": planted(loss, lambda x: torch.nextafter(x, 2 * x)),
        "another bit": planted(log_probs, lambda x: x * (1 - 1e-7)),
        "a wrong row": planted(grad, one_row),
        "a NaN": planted(grad, lambda x: torch.cat([x[:3], x[3:] * math.nan])),
        "absent": Candidate(fail),
    }
    facts = race(candidates, ("nothing", lambda: None), dict(exact), options, device)
    said = {name: fact.get("failed") for name, fact in facts.items()}
    assert said == {
        "nothing": None,
        "right": None,
        "another loss": "loss differs between ranks",
        "another bit": "log_probs differs between ranks",
        "a wrong row": "gradient of weight off by 2.0e-01",
        "a NaN": "gradient of weight off by inf",
        "absent": "ModuleNotFoundError: nothing here",
    }
    assert [name for name, fact in facts.items() if "milliseconds" in fact] == ["nothing", "right"]
    assert not facts["another loss"]["same_bits"]
    assert facts["a wrong row"]["same_bits"]

    # By rank 0's clock.
    assert time_left(time.time() + (60 if rank == 0 else -60), device, 30)
    assert not time_left(time.time() + (60 if rank == 0 else 1000), device, 90)


def test_wrong_candidates_fail_on_every_rank(tmp_path):
    """A rank that leaves one out while another waits for it in a collective hangs."""
    run_ranks(2, tmp_path, on_two_ranks)


@pytest.mark.parametrize("balance", [None, "none", "attention"])
def test_plans_train_on_every_document_once(bench, balance):
    """Padded steps may leave out the last, which would not fill all ranks."""
    from corpora import PADDED_ROWS
    from distributed_steps import Row, plan

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
        (["head", "--ranks", 1], "needs two ranks or more, got 1"),
        (["vocab", "--ranks", 2, "--vocab", 101], "101 classes do not divide by 2 ranks"),
        (["steps", "--device", "cpu"], "on a CPU with --tiny only"),
    ],
)
def test_what_it_cannot_do(bench, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(bench, monkeypatch, *arguments)
