"""The yardsticks themselves."""

from __future__ import annotations

import pytest
import torch

from packops import testing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes_and_more_does_not(dtype):
    want = torch.randn(1000, dtype=torch.float64)
    got = want.to(dtype)
    testing.assert_close(got, want)
    found = testing.errors(got, want)
    if dtype != torch.float64:
        assert 0.4 < found.max_ulp <= 0.5
    wrong = got.clone()
    rtol, atol = testing.tolerance(dtype)
    wrong[17] += 2 * (rtol * wrong[17].abs() + atol)
    with pytest.raises(AssertionError, match=r"gradient at \(17,\)"):
        testing.assert_close(wrong, want, name="gradient")


def test_errors_by_hand():
    found = testing.errors(torch.tensor([1.5, 2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert found.max_abs == 0.5
    assert found.max_rel == 0.5
    assert found.rms == pytest.approx((0.25 / 3) ** 0.5)
    assert found.max_ulp == 0.5 * 2**23
    assert testing.errors(torch.empty(0), torch.empty(0, dtype=torch.float64)).max_abs == 0


def test_infinities_and_nans_must_be_in_place():
    inf, nan = float("inf"), float("nan")
    want = torch.tensor([1.0, inf, -inf, nan], dtype=torch.float64)
    assert testing.errors(want.float(), want).max_abs == 0
    for index, value in ((0, nan), (0, inf), (1, -inf), (2, 0.0), (3, 0.0)):
        got = want.float()
        got[index] = value
        with pytest.raises(AssertionError, match=rf"at \({index},\)"):
            testing.errors(got, want)
        with pytest.raises(AssertionError):
            testing.assert_close(got, want)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"shapes differ: got \(2,\), want \(1, 2\)"):
        testing.errors(torch.zeros(2), torch.zeros(1, 2, dtype=torch.float64))


def test_least_accurate_dtype_decides():
    want = torch.randn(100, dtype=torch.float64)
    through_bf16 = want.bfloat16().float()
    testing.assert_close(through_bf16, want, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        testing.assert_close(through_bf16, want)


def test_no_worse_than():
    want = torch.randn(1000, dtype=torch.float64)
    rival = want.float() + 1e-4 * torch.randn(1000)
    testing.assert_no_worse_than(want.float(), rival, want)
    with pytest.raises(AssertionError, match=r"more than 1\.05 times"):
        testing.assert_no_worse_than(want.float() + 2e-4, rival, want)


def test_unknown_dtype():
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        testing.tolerance(torch.int32)


def test_cpu_is_always_there():
    assert testing.devices()[0] == torch.device("cpu")
