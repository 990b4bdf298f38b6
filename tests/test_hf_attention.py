"""Packed attention of Hugging Face models: a document's tokens see that document alone, however the model is called."""

from __future__ import annotations

import argparse
import ast
import gc
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import packops
from cuda_streams import no_host_sync

transformers = pytest.importorskip("transformers", reason="needs packops[hf]")

from packops.hf import attention, attention_documents  # noqa: E402
from packops.ops import attention_documents as documents_found  # noqa: E402
from packops.ops import attention_paths  # noqa: E402

LENGTHS = (7, 1, 19, 12, 3)
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral, window": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "gemma2, window and softcap": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=16, sliding_window=5, attn_logit_softcapping=1.5, query_pre_attn_scalar=20
    ),
    "gemma3, window": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    # its layers do not tell the attention function of their window, only the mask
    "qwen2_moe, window": lambda: transformers.Qwen2MoeConfig(
        **SMALL, sliding_window=5, use_sliding_window=True, max_window_layers=1, num_experts=2, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "gpt_oss, window and sinks": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compiles_anew():
    """torch compiles a function for a limited number of kinds of inputs in each process. The tests of other files share
    FlexAttention's, which computes fp32 on a GPU."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _registered():
    """One thread: what is small here is slower on several, by far where the machine has other work."""
    assert attention.register() == "packops_varlen"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family: str, device="cpu", **options):
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():  # scores far from uniform, so that who is seen matters
        if parameter.dim() > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.3)
    return model.to(device).train()


def documents_of(lengths=LENGTHS):
    return [torch.randint(3, 61, (length,)) for length in lengths]


def packed(documents, device="cpu"):
    inputs = packops.PackingCollator(names="hf")(documents)
    inputs.pop("labels")
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def logits_and_gradients(model, forward, direction):
    model.zero_grad()
    logits = forward()
    (logits * direction).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def alone(model, documents, direction):
    def forward():
        return torch.cat([model(input_ids=d[None].to(direction.device), use_cache=False).logits[0] for d in documents])

    return logits_and_gradients(model, forward, direction)


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)


CALLS = {
    "as collated": lambda x: x,
    "use_cache": lambda x: {**x, "use_cache": True},
    "mask of ones": lambda x: {**x, "attention_mask": torch.ones_like(x["input_ids"])},
    "positions alone, cache, mask of ones": lambda x: {
        "input_ids": x["input_ids"], "position_ids": x["position_ids"], "attention_mask": torch.ones_like(x["input_ids"])
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_never_see_each_other(family, device):
    torch.compiler.reset()  # past its limit of graphs, torch 2.11 fails in FlexAttention
    model, documents = build(family, device), documents_of()
    direction = torch.randn(sum(LENGTHS), SMALL["vocab_size"], device=device)
    expected = alone(model, documents, direction)
    model.set_attn_implementation(attention.NAME)
    inputs = packed(documents, device)
    for name, change in CALLS.items():
        called = change(inputs)
        found = logits_and_gradients(model, lambda called=called: model(**called).logits[0], direction)
        assert_same(found, expected, 2e-5 if device.type == "cpu" else 2e-4), name


def test_the_stock_backend_fails_this_test():
    """What the backend is for: transformers' sdpa lets documents see each other once there is a cache, without a word."""
    model, documents = build("llama").eval(), documents_of()
    expected = torch.cat([model(input_ids=d[None]).logits[0] for d in documents])
    model.set_attn_implementation("sdpa")
    assert (model(**packed(documents)).logits[0] - expected).abs().max() < 1e-4
    assert (model(**CALLS["use_cache"](packed(documents))).logits[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2, window and softcap"])
def test_padded_rows(family, side, device):
    model, documents = build(family, device), documents_of()
    direction = torch.randn(sum(LENGTHS), SMALL["vocab_size"], device=device)
    expected = alone(model, documents, direction)
    model.set_attn_implementation(attention.NAME)
    longest = max(LENGTHS)
    ids, mask = torch.zeros(2, len(documents), longest, dtype=torch.int64, device=device)
    for row, document in enumerate(documents):
        where = slice(0, len(document)) if side == "right" else slice(longest - len(document), longest)
        ids[row, where], mask[row, where] = document.to(device), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({"position_ids": positions}, {}):  # without, positions run through the padding: the same angles between tokens

        def forward(more=more):
            return model(input_ids=ids, attention_mask=mask, **more).logits[mask.bool()]

        assert_same(logits_and_gradients(model, forward, direction), expected, 2e-5 if device.type == "cpu" else 2e-4)


def test_rows_of_a_batch_are_packed_each():
    """Several packed rows in a batch, whose documents do not even start at 0."""
    model, documents = build("llama").eval(), documents_of((4, 6, 10))
    model.set_attn_implementation("eager")
    expected = [
        model(input_ids=d[None], position_ids=torch.arange(len(d))[None] + 3 * (len(d) == 4)).logits[0] for d in documents
    ]
    model.set_attn_implementation(attention.NAME)
    ids = torch.stack([torch.cat(documents[:2]), documents[2]])
    positions = torch.tensor([[3, 4, 5, 6, 0, 1, 2, 3, 4, 5], [*range(10)]])
    found = model(input_ids=ids, position_ids=positions).logits.flatten(0, 1)
    assert (found - torch.cat(expected)).abs().max() < 1e-4
    bounds = torch.tensor([0, 4, 10, 20])
    found = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=10).logits.flatten(0, 1)
    assert (found - torch.cat(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma2, window and softcap", "gpt_oss, window and sinks"])
def test_generation_is_that_of_eager(family, padded, cache):
    """A static cache has its masks made before the forward; a prompt may be longer than the window, or not."""
    for length in (9, 4):
        check_generation(build(family).eval(), length, padded, cache)


def check_generation(model, length, padded, cache):
    ids = torch.randint(3, 61, (3, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length - 2] = mask[2, :1] = 0
    found = []
    for name in ("eager", attention.NAME):
        model.set_attn_implementation(name)
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "cache_implementation": cache,
        }
        found.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_gradient_checkpointing():
    model, documents = build("gemma2, window and softcap"), documents_of()
    direction = torch.randn(sum(LENGTHS), SMALL["vocab_size"])
    model.set_attn_implementation(attention.NAME)
    inputs = packed(documents)
    expected = logits_and_gradients(model, lambda: model(**inputs).logits[0], direction)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same(logits_and_gradients(model, lambda: model(**inputs).logits[0], direction), expected, 1e-6)


# ---- what the backend asks for -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_host_sync_with_cu_seqlens():
    """Nor a surprise by boundaries that are new with every batch. (transformers waits itself, once, before the first layer.)"""

    def step(lengths):
        shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes)
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        options = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": 20}
        with no_host_sync():
            attention.packed_attention(torch.nn.Module(), q, k, v, None, **options)[0].sum().backward()

    step([7, 1, 40])
    step([3, 50, 1, 9])


def test_16_bits_where_the_model_computes_in_16_bits(monkeypatch):
    """Under autocast, and with queries and keys that a rotation left in fp32: else CUDA would take the slow path."""
    chosen = []
    original = attention.choose_path
    monkeypatch.setattr(
        attention, "choose_path", lambda *given, **options: chosen.append(given[1]) or original(*given, **options)
    )
    q, options = torch.randn(1, 2, 6, 8), {"cu_seq_lens_q": BOUNDS, "max_length_q": 4}
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.packed_attention(torch.nn.Module(), q, q, q, None, **options)[0]
    assert found.dtype == torch.bfloat16
    assert attention.packed_attention(torch.nn.Module(), q, q, q.half(), None, **options)[0].dtype == torch.float16
    assert chosen == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_longest_length_that_is_too_small(compiled):
    """It hid the window, as if no document reached it. In a graph nobody can look; the window is obeyed all the same."""
    q = torch.randn(1, 2, 46, 16)
    bounds = torch.tensor([0, 29, 46], dtype=torch.int32)

    def attend(longest):
        options = {"cu_seq_lens_q": bounds, "max_length_q": longest, "sliding_window": 5}
        return attention.packed_attention(torch.nn.Module(), q, q, q, None, **options)[0]

    expected = attend(29)
    if compiled:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(attend, backend="eager", fullgraph=True)(3), expected)
    else:
        torch.testing.assert_close(attend(64), expected)
        with pytest.raises(ValueError, match=r"at least the longest document of cu_seq_lens_q \(29\), got 3"):
            attend(3)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_used_again_with_other_positions(inference):
    """The documents found with the first ones are not those of the second, nor of these after a change in place."""
    q, padding = torch.randn(1, 2, 7, 16), torch.tensor([[False] + [True] * 6])
    again = attention.Pattern(padding=padding)

    def attend(pattern, ids):
        return attention.packed_attention(torch.nn.Module(), q, q, q, pattern, position_ids=ids)[0]

    with torch.inference_mode(inference):
        for ids in (torch.tensor([[0, 0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 2, 0, 1, 2]])):
            for _ in range(2):
                expected = attend(attention.Pattern(padding=padding.clone()), ids.clone())
                assert torch.equal(attend(again, ids), expected)
                ids[0, 5] = 0


def test_tensors_without_values_are_not_looked_at():
    """Tools that estimate a model's memory run it on such tensors."""
    model, inputs = build("llama"), packed(documents_of())
    packops.hf.apply(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids, positions = (mode.from_tensor(inputs[name]) for name in ("input_ids", "position_ids"))
        assert model(input_ids=ids, position_ids=positions, use_cache=False).logits.shape == (1, sum(LENGTHS), 61)


# ---- what is found out once ------------------------------------------------------------------------------------------------


def test_boundaries_are_found_once_a_forward_and_forgotten(monkeypatch):
    model, documents = build("llama").eval(), documents_of()
    model.set_attn_implementation(attention.NAME)
    calls = []
    original = attention_documents._from_positions
    monkeypatch.setattr(attention_documents, "_from_positions", lambda *given: calls.append(0) or original(*given))
    gc.collect()
    before = len(documents_found._found)
    positions = packed(documents)["position_ids"]
    ids = torch.cat(documents)[None]
    first = model(input_ids=ids, position_ids=positions).logits
    assert len(calls) == 1
    assert len(documents_found._found) == before + 1
    positions.copy_(torch.arange(ids.shape[1])[None])  # now one document
    assert (model(input_ids=ids, position_ids=positions).logits - first).abs().max() > 0.1
    assert len(calls) == 2
    del positions
    for bounds in (torch.tensor([0, ids.shape[1]], dtype=dtype) for dtype in (torch.int32, torch.int64)):
        model(input_ids=ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=ids.shape[1])
        assert len(documents_found._found) == before + 1
        del bounds
        gc.collect()
        assert len(documents_found._found) == before


def test_compiles_in_one_graph(monkeypatch):
    """With boundaries and the longest length given nothing is read on the host, so that no path but sdpa's has a graph break.

    On the CPU, packops.attention is the path that runs; the one by varlen_attn is compiled with what torch documents of it. (The
    next test compiles it as it is.)
    """
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for path in ("packops", "varlen"):
        monkeypatch.setattr(attention, "choose_path", lambda *given, path=path, **options: path)
        if path == "varlen":
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_in_one_graph)
        model = build("mistral, window")
        model.set_attn_implementation(attention.NAME)
        torch.compiler.reset()
        targets.clear()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for lengths in (LENGTHS, (2, 30)):
            inputs = packed(documents_of(lengths))
            with monkeypatch.context() as eager:
                eager.setattr(attention, "choose_path", attention_paths.choose_path)
                expected = model(**inputs).logits
            assert (compiled(**inputs).logits - expected).abs().max() < 1e-5
        assert any("packops.attention" in target for target in targets) == (path == "packops")
    with pytest.raises(Exception, match="takes no attention_mask"):
        compiled(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    torch.compiler.reset()


@pytest.mark.gpu
def test_varlen_compiles_in_one_graph(monkeypatch):
    """A build without kernels: torch's varlen_attn, forward and backward, in one graph."""
    monkeypatch.setattr(attention_paths, "has_cuda", False)
    torch.compiler.reset()
    config = transformers.MistralConfig(**{**SMALL, "hidden_size": 384}, head_dim=96, sliding_window=50)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
    model.set_attn_implementation(attention.NAME)
    inputs = packed(documents_of((70, 5, 130)), "cuda")
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    direction = torch.randn(205, SMALL["vocab_size"], dtype=torch.bfloat16, device="cuda")
    found, expected = (logits_and_gradients(model, lambda f=f: f(**inputs).logits[0], direction) for f in (compiled, model))
    assert any("varlen" in target for target in targets)
    assert_same(found, expected, 2e-2)
    torch.compiler.reset()


@pytest.mark.gpu
def test_compiles_in_one_graph_with_the_kernels():
    torch._dynamo.reset()
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 256}, head_dim=64)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
    model.set_attn_implementation(attention.NAME)
    inputs = packed(documents_of((70, 5, 130)), "cuda")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    direction = torch.randn(205, SMALL["vocab_size"], dtype=torch.bfloat16, device="cuda")
    found, expected = (logits_and_gradients(model, lambda f=f: f(**inputs).logits[0], direction) for f in (compiled, model))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


def varlen_in_one_graph(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of varlen_attn, which dynamo can trace: with a mask made of the boundaries."""
    token = torch.arange(query.shape[0])
    document = (token[:, None] >= cu_seq_q[1:]).sum(1)
    seen = document[:, None] == document
    left, right = window_size
    distance = token[:, None] - token
    seen = seen & (distance >= -right) if right >= 0 else seen
    seen = seen & (distance <= left) if left >= 0 else seen
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_only_the_mask_knows_is_not_compiled_away(name):
    """Compiled, there is no mask to ask; a layer that does not pass its window has none only if the model has none."""
    layer, q = torch.nn.Module(), torch.randn(1, 2, 6, 8)
    layer.config = argparse.Namespace(**{name: 4})
    with pytest.raises(NotImplementedError, match=f"which layers have the {name}"):
        attention.packed_attention(layer, q, q, q, None, cu_seq_lens_q=BOUNDS)
    attention.packed_attention(layer, q, q, q, None, cu_seq_lens_q=BOUNDS, sliding_window=None)
    layer.config = argparse.Namespace(**{name: None})
    attention.packed_attention(layer, q, q, q, None, cu_seq_lens_q=BOUNDS)


def test_import_changes_nothing():
    """transformers is imported by the functions that need it, and nothing is registered before ``register()``."""
    sources = (Path(module.__file__).read_text() for module in (attention, attention_documents))
    tree = ast.parse("\n".join(sources))
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in imported if "transformers" in line]
    assert not [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]


# ---- what is refused -------------------------------------------------------------------------------------------------------


def attend(batch=1, length=6, keys=None, **options):
    q = torch.randn(batch, 2, length, 8)
    k = torch.randn(batch, 2, keys or length, 8)
    return attention.packed_attention(torch.nn.Module(), q, k, k, options.pop("attention_mask", None), **options)


BOUNDS = torch.tensor([0, 2, 6])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 3]])
HOLE = torch.tensor([[True, True, True, False, True, True]])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "no cu_seq_lens_q and no position_ids"),
        ({"position_ids": POSITIONS[None].expand(3, 1, 6)}, ValueError, r"position_ids of shape \(3, 1, 6\)"),
        ({"cu_seq_lens_q": BOUNDS.float()}, ValueError, "must be .* int32 or int64, got .* torch.float32"),
        ({"cu_seq_lens_q": BOUNDS[None]}, ValueError, r"must be \(documents \+ 1,\)"),
        ({"cu_seq_lens_q": BOUNDS - 1}, ValueError, "must rise from 0 to the 6 tokens"),
        ({"cu_seq_lens_q": BOUNDS[:2]}, ValueError, r"must rise from 0 to the 6 tokens of the batch, got \[0, 2\]"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": torch.tensor([0, 3, 6])}, ValueError, "must be the same"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": attention.Pattern(padding=HOLE)}, ValueError, "leave out the mask"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, ValueError, "no 4-D"),
        ({"cu_seq_lens_q": BOUNDS, "keys": 9}, ValueError, "got 6 queries and 9 keys"),
        (
            {"position_ids": torch.arange(6)[None], "attention_mask": attention.Pattern(padding=HOLE)},
            NotImplementedError, "zeros inside a document",
        ),
        ({"cu_seq_lens_q": BOUNDS, "is_causal": False, "softcap": 3.0}, NotImplementedError, "bidirectional"),
        ({"cu_seq_lens_q": BOUNDS, "is_causal": False, "s_aux": torch.zeros(2)}, NotImplementedError, "bidirectional .* sinks"),
        ({"cu_seq_lens_q": BOUNDS, "output_attentions": True}, NotImplementedError, "has no output_attentions"),
    ],
)  # fmt: skip
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        attend(**options)


def test_other_mask_patterns_are_refused():
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8, num_local_experts=2, no_rope_layers=[1, 1]
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packops_varlen")
    with pytest.raises(NotImplementedError, match="masks with chunked_overlay"):
        model(**packed(documents_of()))


def test_bidirectional_attention():
    """A decoder used as an encoder (``is_causal=False``): every token of a document sees all of it."""
    q = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    found, weights = attention.packed_attention(
        torch.nn.Module(), q, q, q, attention.Pattern(causal=False), is_causal=False, position_ids=POSITIONS
    )
    expected = torch.cat([F.scaled_dot_product_attention(part, part, part) for part in q.split([2, 4], 2)], 2)
    assert weights is None
    assert (found.transpose(1, 2) - expected).abs().max() < 1e-12


def test_a_mask_of_the_caller_is_obeyed():
    q = torch.randn(2, 2, 6, 8)
    mask = torch.rand(2, 1, 6, 6) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    for more in ({}, {"softcap": 1e6}):
        found = attention.packed_attention(torch.nn.Module(), q, q, q, mask, **more)[0].transpose(1, 2)
        assert (found - expected).abs().max() < 1e-4


def test_masks_as_older_versions_of_transformers_ask_for_them():
    """Before 5.4 or so a mask function got the queries' positions in the cache, not their number."""
    from transformers.masking_utils import causal_mask_function

    old = attention.packed_mask(
        batch_size=1, cache_position=torch.arange(5), kv_length=5, kv_offset=0, mask_function=causal_mask_function
    )
    new = attention.packed_mask(1, 5, 5, mask_function=causal_mask_function)
    assert (old.causal, old.window, old.padding) == (new.causal, new.window, new.padding) == (True, None, None)


def test_replicas_of_data_parallel_are_refused():
    """torch.nn.DataParallel scatters a batch of one row: the row is whole, and cu_seq_lens_q is cut."""
    model = packops.hf.apply(build("llama"), attention="packops_varlen")
    inputs = packed(documents_of())
    names, tensors = zip(*((name, x) for name, x in inputs.items() if isinstance(x, torch.Tensor)), strict=True)
    pieces = {name: x.chunk(2, dim=0) for name, x in zip(names, tensors, strict=True)}
    assert len(pieces["input_ids"]) == 1
    assert len(pieces["cu_seq_lens_q"]) == 2
    for module in model.modules():  # as torch marks them
        module._is_replica = True
    assert "_is_replica" in vars(torch.nn.Linear(1, 1)._replicate_for_data_parallel())
    with pytest.raises(ValueError, match="DataParallel cuts cu_seq_lens_q"):
        model(**{**inputs, **{name: parts[0] for name, parts in pieces.items()}})
