"""``packops bench gated-mlp`` runs, and marks what is wrong. No time is asserted."""

import importlib

import pytest

import packops
from bench_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch):
    module = importlib.import_module("gated_mlp")
    monkeypatch.setattr(module, "CPU_SHAPES", [(40, 24, 64, "silu"), (9, 5, 33, "gelu_tanh")])
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_runs(bench, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    code, data = run(bench, tmp_path, "--peers", "eager", "--dtype", dtype)
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{work}, {shape}, {dtype}"
        for shape in ("40 x 24 to 64, silu", "9 x 5 to 33, gelu_tanh")
        for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert [row["system"] for row in case["rows"]] == ["packops", "eager", "products"]
        assert not any(row.get("wrong") for row in case["rows"])
    assert [case["rows"][0]["flops"] for case in data["cases"][:2]] == [6 * 40 * 24 * 64, 18 * 40 * 24 * 64]


right = packops.gated_mlp
MISTAKES = {
    "another activation": lambda *tensors, activation: right(*tensors, activation="gelu"),
    "half the gradient of a weight": lambda x, gate, up, down, activation: right(
        x, gate, (up + up.detach()) / 2, down, activation=activation
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_result_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(packops, "gated_mlp", MISTAKES[mistake])
    code, data = run(bench, tmp_path, "--peers", "eager")
    assert code != 0
    assert any(row.get("wrong") for case in data["cases"] for row in case["rows"] if row["system"] == "packops")


@pytest.mark.gpu
def test_on_a_gpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(1024, 256, 128, "silu"), (1024, 256, 128, "gelu_tanh")])
    code, data = run(bench, tmp_path, "--peers", "eager", device="cuda")
    assert code == 0
    assert not any(row.get("wrong") for case in data["cases"] for row in case["rows"])
