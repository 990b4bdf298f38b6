"""rope_table and RotaryEmbedding: equal to transformers where both exist, exact at long positions."""

from __future__ import annotations

import math

import pytest
import torch

import packops
from packops.rotary import rope_inverse_frequencies

HALF = 32
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn_past_the_last_dimension": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 131072,
        "rope_theta": 10000.0,
    },
    "yarn_attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "attention_factor": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + i / 50 for i in range(HALF)],
        "long_factor": [1 + i / 3 for i in range(HALF)],
        "original_max_position_embeddings": 512,
        "factor": 4.0,
        "rope_theta": 10000.0,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 2.0, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("length", [100, 2048, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, length):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * 2 * HALF,
        num_attention_heads=4,
        head_dim=2 * HALF,
        max_position_embeddings=2048,
        rope_parameters=dict(scaling),
    )
    if scaling["rope_type"] == "default":
        expected = 1.0 / scaling["rope_theta"] ** (torch.arange(0, 2 * HALF, 2).float() / (2 * HALF))
        factor = 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device="cpu", seq_len=length)
    ours, our_factor = rope_inverse_frequencies(2 * HALF, scaling=scaling, max_position=length)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)
    cos, sin = packops.rope_table(2 * HALF, 64, scaling=scaling)
    assert (cos**2 + sin**2 - our_factor**2).abs().max() < 1e-6


@pytest.mark.parametrize("position", [131071, 1_000_000])
def test_long_positions_stay_at_rounding_error(position):
    cos, sin = packops.rope_table(64, position + 1, base=10000.0)
    for i in [0, 1, 7, 31]:
        angle = math.fmod(position * 10000.0 ** (-2 * i / 64), 2 * math.pi)
        assert abs(cos[-1, i].item() - math.cos(angle)) < 1e-7
        assert abs(sin[-1, i].item() - math.sin(angle)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_table_dtype_is_rounded_once(dtype):
    exact, rounded = packops.rope_table(64, 100, dtype=torch.float64), packops.rope_table(64, 100, dtype=dtype)
    assert all(torch.equal(r, e.to(dtype)) for r, e in zip(rounded, exact, strict=True))


def test_theta_in_the_dictionary_wins():
    table = packops.rope_table(8, 5, base=3.0, scaling={"rope_type": "default", "rope_theta": 77.0})
    assert torch.equal(table[0], packops.rope_table(8, 5, base=77.0)[0])


@pytest.mark.parametrize(
    "arguments, scaling, message",
    [
        ((7, 4), None, "rotary_dim must be even and positive, got 7"),
        ((8, 4), {"rope_type": "ntk"}, "must be one of default, linear"),
        ((8, 4), {"rope_type": "linear"}, "needs 'factor'"),
        (
            (8, 4),
            {"rope_type": "dynamic", "factor": 2.0},
            "needs 'original_max_position_embeddings' or 'max_position_embeddings'",
        ),
        ((8, 4), {"rope_type": "yarn", "original_max_position_embeddings": 4}, "needs 'factor' or 'max_position_embeddings'"),
        (
            (8, 4),
            {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 9, "short_factor": [1.0]},
            "must have rotary_dim / 2 = 4 numbers, got 1",
        ),
        ((8, 4), {"rope_theta": -1.0}, "base must be positive"),
    ],
)
def test_errors(arguments, scaling, message):
    with pytest.raises(ValueError, match="packops.rope_table: .*" + message):
        packops.rope_table(*arguments, scaling=scaling)


def test_module_equals_the_functions(device):
    module = packops.RotaryEmbedding(32, 16, interleaved=True, rotary_offset=8).to(device)
    q, k = torch.randn(12, 3, 64, device=device), torch.randn(12, 1, 64, device=device)
    cu_seqlens = torch.tensor([0, 5, 12], device=device)
    cos, sin = packops.rope_table(32, 16, device=device)
    expected = packops.apply_rope(q, k, cos, sin, cu_seqlens=cu_seqlens, interleaved=True, rotary_offset=8)
    actual = module(q, k, cu_seqlens=cu_seqlens)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not module.state_dict()
    assert "rotary_dim=32" in repr(module)


def test_module_grows():
    module = packops.RotaryEmbedding(8, 4)
    q = torch.randn(1, 2, 11, 8)
    assert torch.equal(
        module(q, None, layout="bhsd")[0], packops.apply_rope(q, None, *packops.rope_table(8, 11), layout="bhsd")[0]
    )
    assert module.cos.shape[0] == 11
    module(q[:, :, :2], None, layout="bhsd", position_ids=torch.tensor([[3, 30]]), max_position=31)
    assert module.cos.shape[0] == 31
    with pytest.raises(IndexError):
        module(q[:, :, :1], None, layout="bhsd", position_ids=torch.tensor([[31]]))


def test_module_table_survives_casts_and_empty_moves():
    module = packops.RotaryEmbedding(8, 9)
    cos = module.cos.clone()
    assert torch.equal(module.to(torch.bfloat16).cos, cos)
    with torch.device("meta"):
        empty = packops.RotaryEmbedding(8, 9)
    assert empty.cos.is_meta
    assert torch.equal(empty.to_empty(device="cpu").cos, cos)
