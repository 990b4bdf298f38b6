"""rope_table and RotaryEmbedding: equal to transformers where both exist, exact at long positions."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import packops
from cuda_streams import capture, no_host_sync
from packops.rotary import Tables, rope_inverse_frequencies
from ranks import fabrics, run_ranks, this_device

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
        ((8, 4), {"rope_theta": math.inf}, r"scaling\['rope_theta'\] must be finite, got inf"),
        ((8, 4), {"rope_type": "linear", "factor": 0.0}, r"scaling\['factor'\] must be positive and finite, got 0.0"),
        ((8, 4), {"rope_type": "linear", "factor": math.nan}, r"scaling\['factor'\] must be positive and finite, got nan"),
        (
            (4, 4),
            {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 9, "short_factor": [1.0, 0.0]},
            r"scaling\['short_factor'\] must be positive and finite",
        ),
        ((8, -1), None, "max_position must not be negative, got -1"),
    ],
)
def test_errors(arguments, scaling, message):
    with pytest.raises(ValueError, match="packops.rope_table: .*" + message):
        packops.rope_table(*arguments, scaling=scaling)


# ---- the module ----------------------------------------------------------------------------------------------------------------

DIM, TRAINED = 16, 24
BY_LENGTH = {
    "none": None,
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 500.0, "original_max_position_embeddings": TRAINED},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "original_max_position_embeddings": TRAINED,
        "max_position_embeddings": 4 * TRAINED,
        "short_factor": [1 + i / 50 for i in range(DIM // 2)],
        "long_factor": [2 + i / 3 for i in range(DIM // 2)],
    },
}


def heads(tokens, device="cpu", seed=0):
    return torch.randn(tokens, 2, DIM, generator=torch.Generator().manual_seed(seed)).to(device)


def rotated(q, scaling, longest, rows=256, **where):
    """q by a table made for a longest document of ``longest`` tokens, in fp64 up to the table's one rounding."""
    frequencies, factor = rope_inverse_frequencies(DIM, scaling=scaling, max_position=longest)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    cos, sin = ((f(angles) * factor).float().to(q.device) for f in (torch.cos, torch.sin))
    return packops.apply_rope(q, None, cos, sin, **where)[0]


def bounds_of(*lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def positions_of(*lengths, device="cpu"):
    return torch.cat([torch.arange(n) for n in lengths]).to(device)


def test_module_equals_the_functions(device):
    module = packops.RotaryEmbedding(32, 16, interleaved=True, rotary_offset=8).to(device)
    q, k = torch.randn(12, 3, 64, device=device), torch.randn(12, 1, 64, device=device)
    cu_seqlens = torch.tensor([0, 5, 12], device=device)
    cos, sin = packops.rope_table(32, 16, device=device)
    expected = packops.apply_rope(q, k, cos, sin, cu_seqlens=cu_seqlens, interleaved=True, rotary_offset=8)
    actual = module(q, k, cu_seqlens=cu_seqlens)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(module.cos, cos.cpu())
    assert torch.equal(module.sin, sin.cpu())
    assert "rotary_dim=32" in repr(module)


def test_the_table_reaches_every_position_of_a_row_and_says_where_it_ends():
    module = packops.RotaryEmbedding(8, 4)
    q = torch.randn(1, 2, 11, 8)
    assert torch.equal(
        module(q, None, layout="bhsd")[0], packops.apply_rope(q, None, *packops.rope_table(8, 11), layout="bhsd")[0]
    )
    far = torch.tensor([[3, 30]])
    two = q[:, :, :2]
    expected = packops.apply_rope(two, None, *packops.rope_table(8, 31), layout="bhsd", position_ids=far)[0]
    with pytest.raises(IndexError, match="outside the table"):  # although a table of 16 rows exists since the first call
        module(two, None, layout="bhsd", position_ids=torch.tensor([[3, 10]]))
    assert torch.equal(module(two, None, layout="bhsd", position_ids=far, max_position=31)[0], expected)
    with pytest.raises(IndexError, match="outside the table"):
        module(two, None, layout="bhsd", position_ids=far)
    module.extend(31)
    assert torch.equal(module(two, None, layout="bhsd", position_ids=far)[0], expected)


def test_a_document_may_cross_the_rows_of_a_batch():
    q = torch.randn(3, 7, 2, 8)
    module = packops.RotaryEmbedding(8, 4)
    cu_seqlens = torch.tensor([0, 2, 21])
    expected = packops.apply_rope(q, None, *packops.rope_table(8, 19), cu_seqlens=cu_seqlens)[0]
    assert torch.equal(module(q, None, cu_seqlens=cu_seqlens)[0], expected)


LENGTHS = [(5,), (TRAINED,), (TRAINED + 1,), (90,), (7, 3, TRAINED, 1), (4, TRAINED + 1, 2), (2, 100), (3, 1)]


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_call_does_not_depend_on_the_calls_before(name, device):
    scaling = BY_LENGTH[name]
    module = packops.RotaryEmbedding(DIM, 8, scaling=scaling)
    for lengths in [*LENGTHS, *LENGTHS[::-1]]:
        q, bounds, positions = (
            heads(sum(lengths), device),
            bounds_of(*lengths, device=device),
            positions_of(*lengths, device=device),
        )
        expected = rotated(q, scaling, max(lengths), cu_seqlens=bounds)
        calls = {
            "cu_seqlens": {"cu_seqlens": bounds},
            "position_ids": {"position_ids": positions},
            "both": {"cu_seqlens": bounds, "position_ids": positions},
            "max_seqlen": {"cu_seqlens": bounds, "max_seqlen": max(lengths)},
            "max_seqlen on the device": {"cu_seqlens": bounds, "max_seqlen": bounds.diff().max()},
        }
        if len(lengths) == 1:
            calls["the row"] = {}
        for how, arguments in calls.items():
            error = (module(q, None, **arguments)[0] - expected).abs().max()
            assert error <= 1e-6, (how, lengths)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_longest_document_is_that_of_real_tokens_and_of_every_axis(name):
    scaling = BY_LENGTH[name]
    module = packops.RotaryEmbedding(DIM, 8, scaling=scaling)
    q = heads(40)
    # Positions past cu_seqlens are padding, whatever they hold.
    positions = torch.cat([torch.arange(10), torch.arange(30, 60)])
    bounds = torch.tensor([0, 10])
    expected = rotated(q, scaling, 10, cu_seqlens=bounds, position_ids=positions)
    assert torch.equal(module(q, None, cu_seqlens=bounds, position_ids=positions, max_position=60)[0], expected)
    # A document that goes on: its positions count, not the tokens of this call.
    late = torch.arange(40, 50)
    expected = rotated(q[:10], scaling, 50, cu_seqlens=bounds, position_ids=late)
    actual = module(q[:10], None, cu_seqlens=bounds, position_ids=late, max_position=50)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    # One row of positions for every row of a batch, and three axes.
    batch = q.view(4, 10, 2, DIM)
    expected = rotated(batch, scaling, 50, position_ids=late[None])
    torch.testing.assert_close(module(batch, None, position_ids=late[None], max_position=50)[0], expected, rtol=0, atol=1e-6)
    axes = torch.stack([torch.zeros(10, dtype=torch.long), torch.arange(10), late])
    sections = packops.RotaryEmbedding(DIM, 8, scaling=scaling, mrope_section=(4, 2, 2))
    expected = rotated(q[:10], scaling, 50, position_ids=axes, mrope_section=(4, 2, 2))
    torch.testing.assert_close(sections(q[:10], None, position_ids=axes, max_position=50)[0], expected, rtol=0, atol=1e-6)
    # Nothing at all.
    for empty in ({}, {"cu_seqlens": torch.tensor([0])}, {"position_ids": torch.arange(0)}):
        assert module(q[:0], None, **empty)[0].shape == (0, 2, DIM)


def hugging_face(name):
    """A rotary embedding of transformers that has seen no call, and its (cos, sin) of positions at half width."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    settings = {"hidden_size": 2 * DIM, "num_attention_heads": 2, "rope_parameters": dict(BY_LENGTH[name])}
    if name == "dynamic":
        return LlamaRotaryEmbedding(transformers.LlamaConfig(**settings, max_position_embeddings=TRAINED))
    lengths = {"max_position_embeddings": 4 * TRAINED, "original_max_position_embeddings": TRAINED}
    return Phi3RotaryEmbedding(transformers.Phi3Config(**settings, **lengths, pad_token_id=0))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_call_is_that_of_a_fresh_module_of_transformers(name, lengths):
    q, positions = heads(sum(lengths)), positions_of(*lengths)
    cos, sin = hugging_face(name)(torch.zeros(1, 1, DIM), positions[None])
    expected = packops.apply_rope(q[None], None, cos, sin, per_token_table=True)[0][0]
    module = packops.RotaryEmbedding(DIM, scaling=BY_LENGTH[name])
    module(heads(100), None)
    actual = module(q, None, cu_seqlens=bounds_of(*lengths))[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5)


def _from_pretrained(module, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "packops_rotary"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.proj = torch.nn.Linear(2, 2)
            self.rope = packops.RotaryEmbedding(DIM, 8, scaling=BY_LENGTH["longrope"])
            self.post_init()

    Model(Config()).save_pretrained(tmp_path)
    return Model.from_pretrained(tmp_path).rope


def _averaged(module, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    module(heads(50), None)  # the module that is averaged has seen a longer row
    average.update_parameters(model)
    average.update_parameters(model)
    return average.module[1]


def _seen_under_inference_mode(module, tmp_path):
    with torch.inference_mode():
        module(heads(50), None)
    return module


def _seen_by_fake_tensors(module, tmp_path):
    with torch._subclasses.FakeTensorMode() as mode:
        fake = module(mode.from_tensor(heads(50)), None)[0]
    assert fake.shape == (50, 2, DIM)
    return module


def _seen_under_a_transform(module, tmp_path):
    with contextlib.suppress(RuntimeError):  # whether or not the op takes part in torch.func
        torch.func.grad(lambda q: module(q, None)[0].sum())(heads(50))
    return module


def _on_meta(module, tmp_path):
    with torch.device("meta"):
        empty = packops.RotaryEmbedding(DIM, 8, scaling=BY_LENGTH["longrope"])
        assert empty(torch.randn(50, 2, DIM), None)[0].is_meta
    return empty.to_empty(device="cpu")


def _loaded(module, tmp_path):
    old = {"cos": torch.full((99, DIM // 2), 7.0), "sin": torch.zeros(3)}  # of a module that kept its table among its buffers
    loaded = torch.nn.Sequential(module)
    loaded.load_state_dict({f"0.{name}": table for name, table in old.items()})
    loaded.load_state_dict({})
    return loaded[0]


def _pickled(module, tmp_path):
    torch.save(module, tmp_path / "module.pt")
    return torch.load(tmp_path / "module.pt", weights_only=False)


TREATMENTS = {
    "to a dtype": lambda module, tmp_path: module.to(torch.bfloat16),
    "half": lambda module, tmp_path: module.half(),
    "double": lambda module, tmp_path: module.double(),
    "to_empty": lambda module, tmp_path: module.to_empty(device="cpu"),
    "deepcopy": lambda module, tmp_path: copy.deepcopy(module),
    "pickled": _pickled,
    "from_pretrained": _from_pretrained,
    "averaged": _averaged,
    "inference mode": _seen_under_inference_mode,
    "fake tensors": _seen_by_fake_tensors,
    "a transform": _seen_under_a_transform,
    "on meta": _on_meta,
    "loaded": _loaded,
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_no_treatment_of_the_module_changes_what_it_returns(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Tables, "_shared", weakref.WeakValueDictionary())  # tables that other tests made would hide a bad one
    module = TREATMENTS[name](packops.RotaryEmbedding(DIM, 8, scaling=BY_LENGTH["longrope"]), tmp_path)
    assert not list(module.buffers())
    assert not module.state_dict()
    for length in (50, TRAINED, 6, 50):
        q = heads(length).requires_grad_()
        out = module(q, None)[0]
        torch.testing.assert_close(out, rotated(q, BY_LENGTH["longrope"], length), rtol=0, atol=1e-6)
        out.sum().backward()  # saves the table
        with torch.device("meta"):
            assert torch.equal(module(q, None)[0], out)


class Layer(torch.nn.Module):
    def __init__(self, scaling):
        super().__init__()
        self.proj = torch.nn.Linear(DIM, DIM)
        self.rope = packops.RotaryEmbedding(DIM, 8, scaling=scaling)

    def forward(self, x, position_ids=None, cu_seqlens=None):
        return self.rope(self.proj(x), None, position_ids=position_ids, cu_seqlens=cu_seqlens)[0]


def _train_rows_of_different_lengths(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(this_device().type, (2,))
    torch.manual_seed(0)
    for scaling in BY_LENGTH.values():
        layer = Layer(scaling).to(this_device())
        alone = copy.deepcopy(layer.proj)
        for model in (torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer)), fully_shard(layer, mesh=mesh)):
            for lengths in [(10, 10), (10, 40), (12, 12), (90, 5)]:
                q = heads(lengths[rank], this_device())
                out = model(q)
                out.sum().backward()
                expected = rotated(alone(q), scaling, lengths[rank])
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@fabrics(2)
def test_ranks_whose_rows_differ_do_not_change_each_other(backend, world_size, tmp_path):
    run_ranks(world_size, tmp_path, _train_rows_of_different_lengths, backend=backend)


@pytest.mark.parametrize("name", BY_LENGTH)
@pytest.mark.parametrize("where", ["row", "cu_seqlens", "position_ids"])
def test_compiled_calls_of_any_length_share_a_graph(name, where, device):
    """One without a scaling; two where the length of a row, which the host knows, is on either side of the trained one."""
    torch._dynamo.reset()
    scaling = BY_LENGTH[name]
    layer = Layer(scaling).to(device)
    layer.rope.extend(128)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (10, 90, 12, TRAINED, TRAINED + 1, 33, 128):
        x = heads(tokens, device)
        lengths = (tokens,) if where == "row" else (tokens - 4, 4)
        arguments = {
            "row": {},
            "cu_seqlens": {"cu_seqlens": bounds_of(*lengths, device=device)},
            "position_ids": {"position_ids": positions_of(*lengths, device=device)},
        }[where]
        out = compiled(x, **arguments)
        out.sum().backward()
        expected = rotated(layer.proj(x), scaling, max(lengths), position_ids=positions_of(*lengths, device=device))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert counter.frame_count == (2 if where == "row" and scaling else 1)


def test_an_exported_model_keeps_its_table(tmp_path):
    layer = Layer(BY_LENGTH["longrope"])
    layer.rope.extend(64)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = {"x": {0: tokens}, "position_ids": {0: tokens}}
    program = torch.export.export(layer, (heads(30), torch.arange(30)), dynamic_shapes=shapes)
    for length in (9, TRAINED, 60):
        x, positions = heads(length), torch.arange(length)
        expected = layer(x, position_ids=positions)
        torch.testing.assert_close(program.module()(x, positions), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BY_LENGTH)
@pytest.mark.gpu
def test_nothing_waits_for_lengths_on_the_gpu(name):
    scaling, device = BY_LENGTH[name], torch.device("cuda")
    module = packops.RotaryEmbedding(DIM, 128, scaling=scaling, device="cuda")
    module(heads(100, device), None, max_seqlen=100)  # longrope's second table
    cases = [(heads(sum(n), device), bounds_of(*n, device=device), positions_of(*n, device=device)) for n in LENGTHS]
    for q, bounds, positions in cases:
        with no_host_sync():
            outputs = [module(q, None, cu_seqlens=bounds)[0], module(q, None, position_ids=positions)[0]]
        for out in outputs:
            torch.testing.assert_close(out, rotated(q, scaling, int(bounds.diff().max()), cu_seqlens=bounds), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BY_LENGTH)
@pytest.mark.gpu
def test_a_graph_takes_the_longest_document_of_each_replay(name):
    scaling, device = BY_LENGTH[name], torch.device("cuda")
    module = packops.RotaryEmbedding(DIM, 128, scaling=scaling)
    q, bounds = heads(60, device), bounds_of(60, 0, 0, device=device)
    graph, out = capture(lambda: module(q, None, cu_seqlens=bounds)[0])
    for lengths in [(20, 20, 20), (60, 0, 0), (TRAINED, TRAINED, 12), (TRAINED + 1, 30, 5)]:
        bounds.copy_(bounds_of(*lengths))
        graph.replay()
        torch.testing.assert_close(out, rotated(q, scaling, max(lengths), cu_seqlens=bounds), rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_table_cannot_be_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(Tables, "_shared", weakref.WeakValueDictionary())
    q = heads(60, "cuda")
    module = packops.RotaryEmbedding(DIM, 128)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        module(q, None)
    torch.cuda.synchronize()
    assert torch.equal(module(q, None)[0], rotated(q, None, 60))


def test_arguments_that_make_no_table():
    with pytest.raises(ValueError, match="max_position must be positive, got 0"):
        packops.RotaryEmbedding(8, 0)
    with pytest.raises(ValueError, match="needs a rotary_dim of at least 4"):
        packops.RotaryEmbedding(2, scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9})
    for name in ("short_factor", "long_factor"):  # at once, not at the first long document
        with pytest.raises(ValueError, match=name):
            packops.RotaryEmbedding(DIM, scaling={**BY_LENGTH["longrope"], name: [1.0]})
    with pytest.raises(ValueError, match=r"scaling\['full_attention'\] is a dictionary"):
        packops.RotaryEmbedding(DIM, scaling={"full_attention": BY_LENGTH["longrope"]})
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        packops.RotaryEmbedding(8)([1.0], None)


def test_settings_are_those_of_when_the_module_was_made():
    scaling = copy.deepcopy(BY_LENGTH["longrope"])
    scaling["long_factor"] = torch.tensor(scaling["long_factor"], dtype=torch.float64)
    module = packops.RotaryEmbedding(DIM, scaling=scaling)
    scaling["short_factor"][0] = scaling["original_max_position_embeddings"] = 3
    module.cos.zero_()  # a copy
    for q in (heads(10), heads(TRAINED + 1)):
        assert torch.equal(module(q, None)[0], rotated(q, BY_LENGTH["longrope"], len(q)))


@pytest.mark.parametrize("scaling", [{"factor": 4.0}, {"rope_typ": "linear", "factor": 4.0}, {"beta_fast": 32.0}], ids=str)
def test_scaling_of_no_type_is_refused(scaling):
    for call in (lambda: packops.rope_table(8, 16, scaling=scaling), lambda: packops.RotaryEmbedding(8, 16, scaling=scaling)):
        with pytest.raises(ValueError, match=r"scaling needs 'rope_type' beside '(factor|beta_fast)', got"):
            call()
    packops.rope_table(8, 16, scaling={"rope_theta": 500.0})
