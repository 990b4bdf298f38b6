"""Patched models as they are run: checkpointed, compiled, generating, under autocast, with another attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import packops
import packops.hf
from cuda_streams import no_host_sync
from packops import PackingCollator
from packops.hf import record

transformers = pytest.importorskip("transformers")

from hf_models import VOCABULARY, difference, documents, make, packed, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, fused):
    model, texts = make("qwen3"), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.23, before it
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert difference(run(model, packed(texts)), stock) < 1e-5


@pytest.mark.parametrize("family, fused", [("llama", True), ("qwen3", False)], indirect=["fused"])
def test_compile(family, fused):
    """In one graph, which holds our operations and not the stock ones."""
    model, texts = make(family), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert difference(run_compiled(compiled, model, packed(texts)), stock) < 1e-5
    op = "packops.qk_norm_rope" if family == "qwen3" else "packops.rope"
    assert sum(target.startswith(op) for target in targets) == 2
    losses = ("packops.cross_entropy", "packops.linear_cross_entropy")
    assert sum(target.startswith(losses) for target in targets) == 1
    assert sum("rms_norm" in target for target in targets) == 5
    assert not any("rsqrt" in target or "silu" in target for target in targets)
    torch.compiler.reset()


def run_compiled(compiled, model, inputs):
    model.zero_grad(set_to_none=True)
    model.train()
    loss = compiled(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


STATIC_LENGTHS = {"few": (9, 20), "one": (33,), "many": (3, 1, 7, 2, 12, 5), "no padding": (24, 16)}


def static_batches(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    collate = PackingCollator(pad_to_length=40, num_documents=8)
    for lengths in STATIC_LENGTHS.values():
        yield collate([torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]).to(device)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compiled_once_for_all_documents(family):
    """``to_hf(static=True)`` has nothing that changes a graph, also on the CPU, where packops_varlen otherwise reads lengths."""
    model = packops.hf.apply(make(family), attention="packops_varlen")
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for batch in static_batches():
        count = {"num_items_in_batch": torch.tensor(float(max(batch.num_items, 1)))}
        found = run_compiled(compiled, model, batch.to_hf(static=True) | count)
        assert difference(found, run_compiled(model, model, batch.to_hf() | count)) < 1e-5
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_cuda_graphs_for_all_documents(family):
    """``reduce-overhead``: what a replayed graph computes is of this batch's documents."""
    model = packops.hf.apply(make(family, torch.bfloat16, head_dim=64).to("cuda"), attention="packops_varlen")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        for batch in static_batches("cuda"):
            count = {"num_items_in_batch": torch.tensor(float(max(batch.num_items, 1)), device="cuda")}
            torch.compiler.cudagraph_mark_step_begin()
            found = run_compiled(compiled, model, batch.to_hf(static=True) | count)
            # Those of another batch's documents differ by 0.7 and more.
            assert difference(found, run_compiled(model, model, batch.to_hf() | count)) < 0.15
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "cohere"])
def test_generate(family):
    model = make(family).eval()
    prompt = {"input_ids": torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])}
    prompt["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    want = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert len(set(want[:, 5:].flatten().tolist())) > 4, "a model that says one thing proves nothing"
    packops.hf.apply(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0), want)


def test_autocast(fused):
    model, texts = make("qwen3"), documents()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    exact = run(model, packed(texts))
    with torch.autocast("cpu", torch.bfloat16):
        stock = difference(run(model, packed(texts)), exact)
        ours = difference(run(packops.hf.apply(model), packed(texts)), exact)
    assert ours < 1.5 * stock < 0.5
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_attention():
    """Any of transformers' implementations by name."""
    model, texts = make("llama"), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert packops.hf.report(model).replaced["attention"] == "eager"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError):
        packops.hf.apply(model, attention="no_such_attention")
    assert packops.hf.report(model).replaced == {}
    assert model.config._attn_implementation == "sdpa"
    assert not record.is_patched(model)


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    device = torch.device("cuda")
    model = packops.hf.apply(make("qwen3", dtype=torch.bfloat16).to(device), reduction="seq-mean-token-mean")
    inputs = PackingCollator()(documents()).to(device).to_hf()
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = None  # documents found by position_ids
    position_ids, labels = inputs["position_ids"], inputs["labels"]
    run(model, inputs)
    rotary, loss = model.model.rotary_emb, model.loss_function
    logits = torch.randn(*labels.shape, VOCABULARY, device=device, requires_grad=True)
    with no_host_sync():
        rotary(logits, position_ids)
        loss(
            logits, labels, position_ids=position_ids, num_items_in_batch=torch.ones((), dtype=torch.float64, device=device)
        ).backward()
