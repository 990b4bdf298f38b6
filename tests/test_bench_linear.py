"""``packops bench linear-cross-entropy`` runs, measures errors, and marks what is wrong. No time is asserted."""

import importlib
from pathlib import Path

import pytest
import torch

import bench_runs
import packops

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench():
    return importlib.import_module("linear_ce_loss")


def run(bench, tmp_path, *arguments, device="cpu", shape=("70", "16", "203")):
    return bench_runs.run(bench, tmp_path, "--shape", *shape, *arguments, device=device)


def test_it_runs(bench, tmp_path, capsys):
    code, data = run(bench, tmp_path, "--peers", "eager,torch linear_cross_entropy", "--chunks", "16")
    text = capsys.readouterr().out
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{work}, 70 x 16 x 203 {dtype}" for dtype in ("fp32", "bf16") for work in ("loss + gradients", "loss alone")
    ]
    for case, rounding in ((data["cases"][0], 3e-6), (data["cases"][2], 1e-2)):
        systems = {row["system"] for row in case["rows"]}
        assert {"packops", bench.HALF, "packops, half ignored", "packops, chunks of 16", bench.PRODUCTS, "eager"} <= systems
        assert not any(row.get("wrong") for row in case["rows"])
        errors = case["facts"]["errors"]
        assert set(errors) == systems - {bench.PRODUCTS}
        for system, found in errors.items():
            assert 0 < found["hidden"] < rounding, system
            assert 0 < found["weight"] < rounding, system
    assert "relative error against fp64" in text
    assert (tmp_path / "result.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda h, w, y: packops.linear_cross_entropy(h, w, y) * 1.01, "loss"),
        (lambda h, w, y: packops.linear_cross_entropy(h, w.detach() + 0 * w, y), "gradient of weight"),
        (lambda h, w, y: packops.linear_cross_entropy(h * 1.1 - h.detach() * 0.1, w, y), "gradient of hidden"),
        (lambda h, w, y: packops.linear_cross_entropy(h, w, y.where(y != y[3], -100)), "loss"),
    ],
)
def test_mistakes_are_found(bench, mistake, message):
    problem = bench.Problem(70, 16, 203, "fp32", "cpu")
    right = problem.candidate("right", packops.linear_cross_entropy)
    assert right.check(right.call(0)) == ""
    wrong = problem.candidate("wrong", mistake)
    assert message in wrong.check(wrong.call(0))


def test_reference_is_autograd_in_fp64(bench):
    problem = bench.Problem(70, 16, 203, "fp32", "cpu")
    for labels in (problem.labels, problem.half):
        hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
        loss = packops.reference.linear_cross_entropy(hidden, weight, labels)
        grads = torch.autograd.grad(loss, (hidden, weight))
        found, *sampled = problem.reference(labels)
        torch.testing.assert_close(found, loss.detach())
        for a, b, rows in zip(sampled, grads, problem.samples, strict=True):
            torch.testing.assert_close(a, b[rows])


def test_a_wrong_loss_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packops, "linear_cross_entropy", lambda h, w, y, **options: (h @ w.t()).square().mean())
    code, data = run(bench, tmp_path, "--peers", "none")
    assert code == 1
    assert "wrong results" in capsys.readouterr().out
    assert all("wrong" in row for row in data["cases"][0]["rows"] if row["system"].startswith("packops"))


@pytest.mark.gpu
def test_on_a_gpu(bench, tmp_path):
    """Every peer that is installed, peak memory of ours below that of all logits."""
    code, data = run(bench, tmp_path, device="cuda", shape=("4096", "256", "32000"))
    assert code == 0
    rows = {row["system"]: row for row in data["cases"][0]["rows"]}
    assert rows["packops"]["peak_bytes"] < 4096 * 32000 * 2 < rows["eager"]["peak_bytes"]
    assert rows["packops"]["targets"][0]["against"] == bench.PRODUCTS


def test_log_probs_runs(tmp_path):
    code, data = run(importlib.import_module("log_probs"), tmp_path, "--peers", "eager")
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{work}, 70 x 16 x 203 {dtype}" for dtype in ("fp32", "bf16") for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert {row["system"] for row in case["rows"]} >= {"packops", "eager"}
        assert not any(row.get("wrong") for row in case["rows"])


@pytest.mark.parametrize(
    "mistake, message",
    [
        (
            lambda h, w, y: (packops.linear_log_probs(h, w, y).log_probs, packops.linear_log_probs(h, w, y).entropy * 1.001),
            "entropies",
        ),
        (lambda h, w, y: packops.linear_log_probs(h, w, y.roll(1))[:2], "log-probabilities"),
        (lambda h, w, y: packops.linear_log_probs(h * 1.1 - h.detach() * 0.1, w, y)[:2], "gradients"),
    ],
)
def test_mistakes_in_log_probs_are_found(mistake, message):
    bench = importlib.import_module("log_probs")
    problem = bench.Problem(70, 16, 203, "fp32", "cpu")
    right = problem.candidate("ours", bench.ours, True)
    assert right.check(right.call(0)) == ""
    wrong = problem.candidate("mistake", mistake, True)
    assert message in wrong.check(wrong.call(0))
