"""The end-to-end benchmark runs, all its rows train on the same documents, and a row that trains otherwise is marked. It ends in
time, shows what it has, and leaves nothing of a model behind."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import json
import os
import signal
import sys
import time
import types
import weakref

import numpy as np
import pytest
import torch

from corpora import PADDED_ROWS, draw_lengths

pytest.importorskip("transformers", reason="needs packops[hf]")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench():
    return importlib.import_module("end_to_end")


def run(bench, out, *arguments) -> dict:
    parser = bench.add_arguments(argparse.ArgumentParser())
    options = [
        "--tiny",
        "--tokens",
        "128",
        "--micro-batches",
        "2",
        "--rounds",
        "1",
        "--corpora",
        "short",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert bench.main(parser.parse_args([*options, *arguments])) == 0
    return json.loads(out.with_suffix(".json").read_text())


def test_documents_follow_the_corpus(bench):
    corpora = json.loads(bench.LENGTHS.read_text())
    for name, tokens in (("short", 16384), ("short", 1 << 18), ("long", 1 << 24)):
        quantiles = corpora[name]["quantiles"]
        lengths = sorted(draw_lengths(corpora[name], tokens, np.random.default_rng(0)))
        assert 0.96 * tokens < sum(lengths) <= tokens, "another document would have fitted"
        assert lengths[len(lengths) // 2] == pytest.approx(quantiles[len(quantiles) // 2], rel=0.05)
        assert lengths[-1] < quantiles[-1], "the longest of the corpus stands for a share of documents, not for one of them"
        if tokens > 1 << 17:
            assert sum(lengths) / len(lengths) == pytest.approx(corpora[name]["mean"], rel=0.15)


def test_a_seed_changes_the_order_and_nothing_else(bench):
    corpus = {"quantiles": [10, 20, 30, 40, 50]}
    drawn = [draw_lengths(corpus, 160, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert sorted(drawn[0]) == [14, 22, 30, 38, 46]  # 5 of them; 6 would be 30 on average, too, and 180 together
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[2]) == sorted(drawn[0])
    assert draw_lengths(corpus, 16, np.random.default_rng(0)) == [16]


@pytest.mark.parametrize("name, tokens", [("short", 16384), ("long", 16384), ("long", 32768)])
def test_packs_are_full_and_of_the_corpus(bench, name, tokens):
    packs = bench.draw_packs(json.loads(bench.LENGTHS.read_text())[name], tokens, 4, 100)
    assert len(packs) == 4
    for pack in packs:
        assert 0.97 * tokens <= sum(map(len, pack)) <= tokens
        assert all(document.max() < 100 for document in pack)
    lengths = [len(document) for pack in packs for document in pack]
    mean = sum(lengths) / len(lengths)
    assert mean < 200 if name == "short" else mean > 3000


def test_the_floor_is_the_products_and_the_optimizer(bench):
    """Its gradients are those of linear layers, once for every pack."""
    base = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 7))
    seen = []

    class Recording(torch.optim.SGD):
        def step(self):
            seen.extend(parameter.grad.clone() for parameter in base.parameters())

    def run(packs):
        torch.manual_seed(0)
        bench.Floor(base, packs, 11).step(Recording(base.parameters(), lr=1.0), bench.Laps(torch.device("cpu")))
        found = list(seen)
        seen.clear()
        return found

    one, three = run(1), run(3)
    assert [gradient.shape for gradient in one] == [parameter.shape for parameter in base.parameters()]
    for name, (a, b) in zip(dict(base.named_parameters()), zip(one, three, strict=True), strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert (a != 0).any() == name.endswith("weight")


def test_padded_micro_batches_hold_every_document_and_fit(bench):
    documents = [torch.arange(3, 3 + length) for length in (5, 60, 2, 2, 2, 2, 2, 2, 2, 2, 2, 33, 30)]
    batches = bench.micro_batches([documents[:5], documents[5:]], bench.ROWS[0], 64, None, torch.device("cpu"))
    found = [row[mask.bool()].tolist() for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    assert found == [document.tolist() for document in documents]
    assert all(batch["input_ids"].numel() <= 64 and len(batch["input_ids"]) <= PADDED_ROWS for batch in batches)
    assert all((batch["labels"] != -100).sum() == batch["attention_mask"].sum() for batch in batches)
    assert {int(batch["num_items_in_batch"]) for batch in batches} == {sum(map(len, documents)) - len(documents)}


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2"])
def test_rows_keep_their_attention_and_agree(bench, model):
    """Forward passes of every row that has one here, all prepared before the first runs, as in the timed rounds."""
    from transformers import AutoModelForCausalLM

    config = bench.configuration(model, tiny=True)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packs = bench.draw_packs({"quantiles": [5, 30, 60]}, 256, 2, config.vocab_size)
    rows = [row for row in bench.ROWS if model not in row.not_for and not row.compiled]
    rows = [row for row in rows if "Liger" not in row.name and row.attention != bench.FA4 and not row.alone]
    prepared = {row.name: bench.Prepared(row, model, base, packs, 256) for row in rows}
    stock = "eager" if model == "gemma2" else "sdpa"
    assert {name: p.model.config._attn_implementation for name, p in prepared.items()} == {
        row.name: "packops_varlen" if row.change else stock if row.attention == "default" else row.attention for row in rows
    }
    with torch.no_grad():
        losses = {name: sum(p.model(**batch).loss.item() for batch in p.batches) for name, p in prepared.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["padded"]), rel=1e-5)


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2"])
def test_it_runs(bench, tmp_path, model, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    # FlexAttention has no backward on the CPU, and to find that out takes longer than all the rest
    rows = [row for row in bench.ROWS if "flex" not in row.name and row.attention != bench.FA4 and not row.alone]
    monkeypatch.setattr(bench, "ROWS", [row for row in rows if model == "llama" or not row.compiled])
    data = run(bench, tmp_path / "result", "--models", model)
    (case,) = data["cases"]
    results = {result["row"]: result for result in case["results"]}
    assert list(results) == [row.name for row in bench.ROWS]
    measured = {name for name, result in results.items() if "left_out" not in result}
    assert measured >= {row.name for row in bench.ROWS} - {"packed, sdpa"}
    assert case["floor"]["rounds"] == 1
    assert all(seconds > 0 for seconds in case["floor"]["seconds_by_part"].values())
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
    assert len(rows) == sum(not row.alone for row in bench.ROWS)


def test_what_was_measured_before_the_end_is_shown(bench, tmp_path, monkeypatch, capsys):
    """The limit runs out while the second of three rows is prepared."""

    def endless(model):
        written = json.loads((tmp_path / "result.json").read_text())["cases"][0]["results"]
        assert written[0]["tokens_per_second"] > 0
        raise bench.OutOfTime

    rows = [bench.ROWS[0], bench.Row("endless", "sdpa", change=endless), bench.Row("third", "sdpa")]
    monkeypatch.setattr(bench, "ROWS", rows)
    (case,) = run(bench, tmp_path / "result", "--models", "llama", "--rounds", "3")["cases"]
    padded, *others = case["results"]
    assert padded["rounds"] == 1
    assert padded["wrong"] == []
    assert [row["left_out"] for row in others] == ["no time left"] * 2
    shown = capsys.readouterr()
    assert "\npadded  " in shown.out
    assert "\nthird  " in shown.out
    assert "out of time" in shown.err


def test_a_row_that_takes_too_long_to_prepare_is_left_out(bench, tmp_path, monkeypatch):
    """The row after it is what it is without it."""

    def slow(model):
        forward = model.forward

        def late(**inputs):
            if len(begun) > 1:
                time.sleep(60)
            begun.append(inputs)
            return forward(**inputs)

        model.forward = late

    begun = []
    rows = [bench.ROWS[0], bench.Row("slow", "sdpa", change=slow), bench.Row("third", "sdpa")]
    monkeypatch.setattr(bench, "ROWS", rows)
    padded, left_out, third = run(bench, tmp_path / "result", "--models", "llama", "--patience", "3")["cases"][0]["results"]
    assert left_out["left_out"] == "not ready after 3 s"
    assert third["rounds"] == 1
    assert padded["wrong"] == third["wrong"] == []
    assert padded["seconds_to_prepare"] < 3 <= left_out["seconds_to_prepare"]


def test_a_row_of_its_own(bench, tmp_path, monkeypatch):
    """A model that another library makes of the weights is told the lengths of documents, and is not among other rows."""
    lengths = []

    def make(base, tokens):
        model = copy.deepcopy(base)
        forward = model.forward

        def packed(packed_seq_lengths, **inputs):
            lengths.append(packed_seq_lengths)
            return forward(**inputs)

        model.forward = packed
        return model

    monkeypatch.setattr(bench, "ROWS", [bench.ROWS[0], bench.Row("theirs", "sdpa", make=make, alone=True)])
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    (padded,) = run(bench, tmp_path / "result", "--models", "llama")["cases"][0]["results"]
    assert not lengths
    (theirs,) = run(bench, tmp_path / "result", "--models", "llama", "--rows", "theirs")["cases"][0]["results"]
    assert theirs["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert theirs["gradient"] == pytest.approx(padded["gradient"], rel=1e-3)
    assert {int(x.sum()) for x in lengths} == {128}


def test_rows_by_name_and_by_a_part_of_it(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", [bench.Row(name, "sdpa") for name in ("packed", "packed, more", "flex", "flex, more")])
    results = run(bench, tmp_path / "result", "--models", "llama", "--rows", "packed", "flex, m", "--seconds", "0")["cases"][0]
    assert [row["row"] for row in results["results"]] == ["packed", "flex, more"]


def test_the_limit_interrupts(bench):
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]

    def work(seconds, *signals):
        with bench.time_limit(seconds):
            for number in signals:
                os.kill(os.getpid(), number)
            with contextlib.suppress(Exception):  # as code on the way may do
                time.sleep(60)

    for arguments in ((0.01,), (-1.0,), (float("inf"), signal.SIGTERM)):
        with pytest.raises(bench.OutOfTime):
            work(*arguments)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)] == handlers


def test_a_model_is_gone_before_the_next(bench, tmp_path, monkeypatch):
    """And a row that fails before the row after it."""
    made = []

    def alive(*names):
        return [name for name, model in made if model() is not None and (name in names or not names)]

    def change(model):
        assert alive("failing") == []
        return bench.with_packops(model)

    def fail(model):
        model.forward = functools.partial(raise_error, model)

    def raise_error(model, **inputs):
        raise RuntimeError("out of everything")

    prepare = bench.Prepared.__init__

    def prepared(self, row, model_name, base, *more):
        if row.padded:
            assert alive() == [], "the model before"
            made.append(("base", weakref.ref(base)))
        prepare(self, row, model_name, base, *more)
        made.append((row.name, weakref.ref(self.model)))

    monkeypatch.setattr(bench.Prepared, "__init__", prepared)
    rows = [bench.ROWS[0], bench.Row("failing", "sdpa", change=fail), bench.Row("after it", "sdpa", change=change)]
    monkeypatch.setattr(bench, "ROWS", rows)
    for case in run(bench, tmp_path / "result", "--models", "llama", "qwen3")["cases"]:
        assert [result.get("left_out") for result in case["results"]] == [None, "RuntimeError: out of everything", None]
    assert [name for name, _ in made] == 2 * ["base", "padded", "failing", "after it"]
    assert alive() == []


def test_unknown_rows_are_an_error(bench, capsys):
    parser = bench.add_arguments(argparse.ArgumentParser())
    assert bench.main(parser.parse_args(["--tiny", "--rows", "nothing"])) == 2
    assert "there are: padded;" in capsys.readouterr().err
