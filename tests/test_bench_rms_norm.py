"""``packops bench rms-norm`` runs, and marks what is wrong. No time is asserted."""

import importlib

import pytest

import packops
from bench_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch):
    module = importlib.import_module("rms_norm")
    monkeypatch.setattr(module, "CPU_SHAPES", [(40, 64, False), (24, 32, True)])
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_runs(bench, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    code, data = run(bench, tmp_path, "--dtype", dtype)
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{work}, {shape}"
        for of_sum in ("", " of a sum")
        for shape in (f"40 x 64 {dtype}{of_sum}", f"24 x 32 {dtype}{of_sum}, 1 + weight")
        for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert [row["system"] for row in case["rows"]] == ["copy", "packops", "eager", "torch"]
        assert not any(row.get("wrong") for row in case["rows"])
    size = 4 if dtype == "fp32" else 2
    sizes = [data["cases"][i]["rows"][1]["bytes"] / (40 * 64 * size) for i in (0, 1, 4, 5)]
    assert sizes == [2, 5, 4, 8]


right, of_sum = packops.rms_norm, packops.add_rms_norm
MISTAKES = {
    "no 1 +": lambda x, weight, eps, zero_centered: right(x, weight, eps=eps),
    "another epsilon": lambda x, weight, eps, zero_centered: right(x, weight, eps=eps + 0.1, zero_centered=zero_centered),
    "half the gradient of the weight": lambda x, weight, eps, zero_centered: right(
        x, (weight + weight.detach()) / 2, eps=eps, zero_centered=zero_centered
    ),
}
MISTAKES_OF_SUMS = {
    "no residual": lambda x, residual, weight, **options: of_sum(x, 0 * residual, weight, **options),
    "half the gradient of the sum": lambda *tensors, **options: tuple(
        (x + i * x.detach()) / (1 + i) for i, x in enumerate(of_sum(*tensors, **options))
    ),
    "no gradient of the residual": lambda x, residual, weight, **options: of_sum(
        x, residual.detach() + 0 * residual, weight, **options
    ),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *MISTAKES_OF_SUMS])
def test_a_wrong_result_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, mistake):
    if mistake in MISTAKES:
        monkeypatch.setattr(packops, "rms_norm", MISTAKES[mistake])
    else:
        monkeypatch.setattr(packops, "add_rms_norm", MISTAKES_OF_SUMS[mistake])
    code, data = run(bench, tmp_path, "--peers", "none")
    assert code != 0
    wrong = {
        "of a sum" in case["name"]
        for case in data["cases"]
        for row in case["rows"]
        if row["system"] == "packops" and row.get("wrong")
    }
    assert wrong == {mistake in MISTAKES_OF_SUMS}


@pytest.mark.gpu
def test_on_a_gpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(512, 256, False), (512, 256, True)])
    code, data = run(bench, tmp_path, device="cuda")
    assert code == 0
    assert not any(row.get("wrong") for case in data["cases"] for row in case["rows"])
