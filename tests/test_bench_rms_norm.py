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
        for shape in (f"40 x 64 {dtype}", f"24 x 32 {dtype}, 1 + weight")
        for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert [row["system"] for row in case["rows"]] == ["copy", "packops", "eager", "torch"]
        assert not any(row.get("wrong") for row in case["rows"])
    size = 4 if dtype == "fp32" else 2
    assert [case["rows"][1]["bytes"] for case in data["cases"][:2]] == [2 * 40 * 64 * size, 5 * 40 * 64 * size]


right = packops.rms_norm
MISTAKES = {
    "no 1 +": lambda x, weight, eps, zero_centered: right(x, weight, eps=eps),
    "another epsilon": lambda x, weight, eps, zero_centered: right(x, weight, eps=eps + 0.1, zero_centered=zero_centered),
    "half the gradient of the weight": lambda x, weight, eps, zero_centered: right(
        x, (weight + weight.detach()) / 2, eps=eps, zero_centered=zero_centered
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_result_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(packops, "rms_norm", MISTAKES[mistake])
    code, data = run(bench, tmp_path, "--peers", "none")
    assert code != 0
    assert any(row.get("wrong") for case in data["cases"] for row in case["rows"] if row["system"] == "packops")


@pytest.mark.gpu
def test_on_a_gpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(512, 256, False), (512, 256, True)])
    code, data = run(bench, tmp_path, device="cuda")
    assert code == 0
    assert not any(row.get("wrong") for case in data["cases"] for row in case["rows"])
