"""``packops bench gated-linear`` runs, and marks what is wrong. No time is asserted."""

import importlib

import pytest

import packops
from bench_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch):
    module = importlib.import_module("gated_linear")
    monkeypatch.setattr(module, "CPU_SHAPES", [(40, 64, 24, "silu"), (9, 33, 5, "gelu_tanh")])
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_runs(bench, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    code, data = run(bench, tmp_path, "--peers", "eager", "--dtype", dtype)
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{op}, {work}, {shape}, {dtype}"
        for activation, linear in (("40 x 64, silu", "40 x 64 to 24, silu"), ("9 x 33, gelu_tanh", "9 x 33 to 5, gelu_tanh"))
        for op, shape in (("activation", activation), ("linear", linear))
        for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert [row["system"] for row in case["rows"]] == ["copy", "packops", "eager"]
        assert not any(row.get("wrong") for row in case["rows"])
    size = 4 if dtype == "fp32" else 2
    assert [case["rows"][1]["bytes"] for case in data["cases"][:2]] == [3 * 40 * 64 * size, 8 * 40 * 64 * size]
    assert [case["rows"][1].get("flops") for case in data["cases"][:4]] == [None, None, 2 * 40 * 64 * 24, 6 * 40 * 64 * 24]


right = packops.gated_activation, packops.gated_linear
MISTAKES = {
    "another activation": lambda gate, up, *weight, activation: right[len(weight)](gate, up, *weight, activation="gelu"),
    "half the gradient of up": lambda gate, up, *weight, activation: right[len(weight)](
        gate, (up + up.detach()) / 2, *weight, activation=activation
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("op", ["activation", "linear"])
def test_a_wrong_result_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, mistake, op):
    monkeypatch.setattr(packops, f"gated_{op}", MISTAKES[mistake])
    code, data = run(bench, tmp_path, "--peers", "eager", "--only", f"^{op},")
    assert code != 0
    assert any(row.get("wrong") for case in data["cases"] for row in case["rows"] if row["system"] == "packops")


@pytest.mark.gpu
def test_on_a_gpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(512, 256, 128, "silu"), (512, 256, 128, "gelu_tanh")])
    code, data = run(bench, tmp_path, "--peers", "eager", device="cuda")
    assert code == 0
    assert not any(row.get("wrong") for case in data["cases"] for row in case["rows"])
