"""packops.hf: every family packed equals padded, patched equals stock."""

from __future__ import annotations

import pytest
import torch

import packops
import packops.hf
from packops import PackingCollator
from packops.hf import families, record
from packops.hf import rope as hf_rope

transformers = pytest.importorskip("transformers")

from hf_models import BOTH, FAMILIES, FUSED_NORMS, UNGATED, difference, documents, make, packed, padded, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family, fused", [(f, True) for f in FAMILIES] + [(f, False) for f in BOTH], indirect=["fused"])
def test_patched_and_packed_equals_stock_and_padded(family, fused):
    model, texts = make(family), documents()
    stock = run(model, padded(texts))
    packops.hf.apply(model)
    report = packops.hf.report(model)
    assert report.tested
    assert report.replaced["tables"] == "fp32, from angles in fp64"
    assert ("apply_qk_norm_rope" in report.replaced["rope"]) == (family in FUSED_NORMS), report
    assert "lm_head" in report.replaced
    assert report.replaced.get("mlp") == (None if family in UNGATED else "packops.gated_mlp in 2 modules")
    assert len(report.notes) == (not fused), report.notes
    for name, module in model.named_modules():
        absorbed = family in FUSED_NORMS and name.endswith(("q_norm", "k_norm"))
        if "Norm" in type(module).__name__:
            assert record.is_patched(module) == ("RMSNorm" in type(module).__name__ and not absorbed), name
    assert difference(run(model, padded(texts)), stock) < 2e-5, "patched, padded"
    if families.makes_own_mask(model):
        assert families._version(transformers.__version__) < (5, 2), "not one of the versions in which some do"
        with pytest.raises(ValueError, match="never looks where packed documents"):
            run(model, packed(texts))
        with pytest.raises(ValueError, match="does not take attention='packops_varlen': it makes its mask by itself"):
            packops.hf.apply(packops.hf.revert(model), attention="packops_varlen")
    else:
        assert difference(run(model, packed(texts)), stock) < 2e-5


def test_every_family_is_tested():
    assert set(FAMILIES) == set(families.TESTED)


@pytest.mark.parametrize("change", ["position", "pairs", "norm", "scale"])
def test_a_wrong_rotation_is_caught(change, monkeypatch):
    """The comparison of patched with stock notices each planted mistake by far more than its tolerance."""
    model, texts = make("qwen3"), documents()
    stock = run(model, packed(texts))
    original = hf_rope.apply_qk_norm_rope

    def wrong(q, k, q_weight, k_weight, *, cos, sin, **options):
        if change == "position":
            cos, sin = cos.roll(1, 1), sin.roll(1, 1)
        elif change == "pairs":
            options["interleaved"] = True
        elif change == "norm":
            q_weight, k_weight = k_weight, q_weight
        else:
            cos = cos * 1.001
        return original(q, k, q_weight, k_weight, cos=cos, sin=sin, **options)

    monkeypatch.setattr(hf_rope, "apply_qk_norm_rope", wrong)
    assert difference(run(packops.hf.apply(model), packed(texts)), stock) > 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_equals_stock_on_a_gpu(family):
    device = torch.device("cuda")
    model, texts = make(family).to(device), documents((130, 50, 1, 220, 80))
    inputs = PackingCollator()(texts).to(device).to_hf()
    stock = run(model, inputs)
    packops.hf.apply(model)
    assert difference(run(model, inputs), stock) < 1e-4
