"""The end-to-end benchmark runs, all its rows train on the same documents, and a row that trains otherwise is marked."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs packops[hf]")


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "bench" / "end_to_end.py"
    spec = importlib.util.spec_from_file_location("bench_end_to_end", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def run(bench, out, *arguments) -> dict:
    parser = bench.add_arguments(argparse.ArgumentParser())
    options = ["--tiny", "--tokens", "128", "--rounds", "1", "--corpora", "short", "--device", "cpu", "--out", str(out)]
    assert bench.main(parser.parse_args([*options, *arguments])) == 0
    return json.loads(out.with_suffix(".json").read_text())


def test_documents_follow_the_corpus(bench):
    corpora = json.loads(bench.LENGTHS.read_text())
    for name, tokens in (("short", 1 << 18), ("long", 1 << 24)):
        lengths = [len(document) for document in bench.draw_documents(corpora[name], tokens, 100)]
        assert tokens - 300_000 < sum(lengths) <= tokens
        assert sum(lengths) / len(lengths) == pytest.approx(corpora[name]["mean"], rel=0.25)
    assert max(map(len, bench.draw_documents(corpora["long"], 4096, 100, seed=3))) <= 4096


def test_padded_micro_batches_hold_every_document_and_fit(bench):
    documents = [torch.arange(3, 3 + length) for length in (5, 60, 2, 2, 2, 2, 2, 2, 2, 2, 2, 33, 30)]
    batches = bench.micro_batches(documents, bench.ROWS[0], 64, torch.device("cpu"))
    found = [row[mask.bool()].tolist() for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    assert found == [document.tolist() for document in documents]
    assert all(batch["input_ids"].numel() <= 64 and len(batch["input_ids"]) <= bench.PADDED_ROWS for batch in batches)
    assert all((batch["labels"] != -100).sum() == batch["attention_mask"].sum() for batch in batches)
    assert {int(batch["num_items_in_batch"]) for batch in batches} == {sum(map(len, documents)) - len(documents)}


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2"])
def test_it_runs(bench, tmp_path, model, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    # FlexAttention has no backward on the CPU, and to find that out takes longer than all the rest
    monkeypatch.setattr(bench, "ROWS", [row for row in bench.ROWS if "flex" not in row.name])
    data = run(bench, tmp_path / "result", "--models", model)
    (case,) = data["cases"]
    results = {result["row"]: result for result in case["results"]}
    assert list(results) == [row.name for row in bench.ROWS]
    measured = {name for name, result in results.items() if "left_out" not in result}
    assert measured >= {"padded", "packed, packops attention", "packed, packops"}
    assert ("packed, sdpa" in measured) == (model != "gemma2")
    for name in measured:
        assert results[name]["wrong"] == []
        assert results[name]["loss"] == pytest.approx(results["padded"]["loss"], rel=1e-4)
        assert results[name]["gradient"] == pytest.approx(results["padded"]["gradient"], rel=1e-3)
        assert results[name]["seconds"] >= results[name]["seconds_by_part"]["backward"] > 0
    assert (tmp_path / "result.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"\n{row.name} " in printed for row in bench.ROWS)


def test_a_row_that_trains_something_else_is_marked(bench, tmp_path, monkeypatch, capsys):
    def careless(model):
        stock = model.loss_function
        model.loss_function = lambda *, num_items_in_batch, **options: stock(
            **options, num_items_in_batch=num_items_in_batch * 1.1
        )

    def broken(model):
        raise ModuleNotFoundError("no such thing")

    rows = [bench.ROWS[0], bench.Row("careless", "sdpa", change=careless), bench.Row("missing", "sdpa", change=broken)]
    monkeypatch.setattr(bench, "ROWS", rows)
    padded, wrong, missing = run(bench, tmp_path / "result", "--models", "llama")["cases"][0]["results"]
    assert padded["wrong"] == []
    assert wrong["wrong"] == ["loss", "gradient"]
    assert "no such thing" in missing["left_out"]
    assert "WRONG loss, gradient" in capsys.readouterr().out


def test_no_time_left_is_said(bench, tmp_path):
    rows = run(bench, tmp_path / "result", "--models", "llama", "--seconds", "0")["cases"][0]["results"]
    assert {row["left_out"] for row in rows} == {"no time left"}


def test_unknown_rows_are_an_error(bench, capsys):
    parser = bench.add_arguments(argparse.ArgumentParser())
    assert bench.main(parser.parse_args(["--tiny", "--rows", "nothing"])) == 2
    assert "there are: padded;" in capsys.readouterr().err
