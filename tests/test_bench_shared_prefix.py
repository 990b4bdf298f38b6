"""``packops bench shared-prefix`` runs, compares with flat documents, and marks what is wrong. No time is asserted."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

import command
import packops
from bench_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("--group", "20", "6", "3")


@pytest.fixture
def bench():
    return importlib.import_module("shared_prefix")


def test_it_runs(bench, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    code, data = run(bench, tmp_path, *TINY, "--tokens", "60")
    assert code == 0
    assert [case["name"].partition(",")[0] for case in data["cases"]] == ["forward", "forward + backward", "step"]
    for case in data["cases"]:
        systems = [row["system"] for row in case["rows"]]
        assert systems[0] == "packops"
        assert "packops, flat" in systems
        assert not any(row.get("wrong") for row in case["rows"])
        facts = case["facts"]
        assert (facts["tokens"], facts["flat_tokens"]) == (19 + 3 * 7, 3 * 26)
        assert facts["pairs"] == sum(range(20)) + 3 * (7 * 19 + sum(range(8)))
        assert facts["flat_pairs"] == 3 * sum(range(27))
    assert data["cases"][2]["facts"]["micro_batches"] == 2  # of at most 60 tokens
    assert (tmp_path / "result.png").stat().st_size > 10_000


def test_siblings_that_see_each_other_are_marked(bench, tmp_path, monkeypatch):
    right = packops.attention

    def leaking(q, k, v, cu_seqlens, parents=None, **options):  # the whole row, if it is a forest
        return right(q, k, v, cu_seqlens if parents is None else cu_seqlens[[0, -1]], **options)

    monkeypatch.setattr(packops, "attention", leaking)
    code, data = run(bench, tmp_path, *TINY, "--parts", "attention")
    assert code == 1
    assert [case["rows"][0]["wrong"].split(" differs")[0] for case in data["cases"]] == ["result", "result"]


def test_a_wrong_step_is_marked(bench, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    to_hf = packops.PackedForest.to_hf

    def every_token_once(self, **options):
        return {**to_hf(self, **options), "token_weight": (self.token_weight > 0).double() * 0.5}

    monkeypatch.setattr(packops.PackedForest, "to_hf", every_token_once)
    code, data = run(bench, tmp_path, *TINY, "--parts", "step")
    assert code == 1
    assert data["cases"][0]["rows"][0]["wrong"].startswith("loss ")


def test_what_it_measures_by_default(bench, monkeypatch):
    monkeypatch.setattr(bench, "Attention", lambda *arguments: None)
    monkeypatch.setattr(bench, "attention_candidates", lambda problem, wanted, gradient: dict(wanted))
    parser = command.add_arguments(argparse.ArgumentParser(), bench.PEERS)
    bench.extend(parser)
    args = parser.parse_args(["--device", "cuda", "--parts", "attention"])
    args.peers = bench.PEERS
    cases = list(bench.cases(args))
    assert len(cases) == len({case.name for case in cases}) == 2 * 2 * 24
    with_targets = [case for case in cases if case.targets]
    assert with_targets == [case for case in cases if case.candidates]
    assert len(with_targets) == 4
    limit = with_targets[0].targets["packops"][0].limit
    assert limit == pytest.approx(1.15 * 44_107_776 / 75_688_056)


def test_the_rows_of_flat_documents(bench):
    group = bench.Group(4, 2, 3)
    assert group.boundaries == [0, 3, 6, 9, 12]
    assert group.flat_rows("cpu").tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 0, 1, 2, 9, 10, 11]
    documents = [[7, 7, 7, 7, i, 9] for i in range(3)]
    forest = packops.PackingCollator(share_prefixes=True, min_shared=1)(documents)
    assert forest.cu_seqlens.tolist() == group.boundaries
    assert forest.parents.tolist() == group.parents
    assert torch.equal(forest.rows, group.flat_rows("cpu"))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "bench/results").glob("shared_prefix*.json")))
def test_written_results_are_right_and_can_be_drawn(bench, path, tmp_path):
    pytest.importorskip("matplotlib")
    data = json.loads(path.read_text())
    assert not any(row.get("wrong") for case in data["cases"] for row in case["rows"])
    bench.draw(data, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
