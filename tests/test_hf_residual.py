"""Layers of Hugging Face models that normalise a sum: which are found, what is computed, and where nothing is exchanged."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import packops
import packops.hf
from packops.hf import norm as hf_norm
from packops.hf import record
from packops.hf import residual as hf_residual

transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

from hf_models import FAMILIES, difference, make, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

gpu = pytest.mark.gpu
# Norms of what a block makes, before it is added; layer norms; one sum of both blocks.
WITHOUT = {
    "olmo2",
    "olmo3",
    "cohere",
    "gpt_neox",
    "olmo",
    "stablelm",
    "starcoder2",
    "phi",
    "cohere2",
    "exaone4",
    "nemotron",
    "persimmon",
}


@pytest.fixture
def calls(monkeypatch):
    """As on a GPU, whatever the device: whether a residual was given, for every sum that packops made."""
    found = []

    def add_rms_norm(x, residual, *others, **options):
        found.append(residual is not None)
        return packops.add_rms_norm(x, residual, *others, **options)

    monkeypatch.setattr(hf_norm, "has_kernel", lambda x: True)
    monkeypatch.setattr(hf_residual, "add_rms_norm", add_rms_norm)
    return found


def apply(model):
    """Norms and sums alone."""
    return packops.hf.apply(model, rope=False, cross_entropy=False, mlp=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, calls):
    stock = make(family)
    model = apply(copy.deepcopy(stock))
    ids = torch.randint(3, 61, (2, 17))
    inputs = {"input_ids": ids, "labels": ids}
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-4
    assert calls == ([] if family in WITHOUT else 2 * [False, True])  # two layers: the first norm's input, the second's sum
    assert ("residual" in packops.hf.report(model).replaced) == (family not in WITHOUT)
    packops.hf.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_on_the_cpu_norms_are_torchs():
    model = apply(make("llama"))
    assert packops.hf.report(model).replaced["residual"] == "packops.add_rms_norm (apart on the CPU) in 2 layers"
    ids = torch.randint(3, 61, (2, 17))
    names = {e.key for e in profiled(lambda: model(input_ids=ids, labels=ids).loss.backward())}
    assert not any("packops" in name for name in names)


def profiled(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return profile.key_averages()


def test_what_looks_on_sees_the_norm(calls):
    """A hook, a forward of the instance, another module in its place."""
    model, stock = apply(make("llama")), make("llama")
    stock.load_state_dict(model.state_dict())
    ids = torch.randint(3, 61, (2, 17))
    inputs, seen = {"input_ids": ids, "labels": ids}, []
    layers = model.model.layers
    handle = layers[0].post_attention_layernorm.register_forward_hook(lambda m, given, made: seen.append(made.shape))
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-4
    assert seen == [(2, 17, 32)]
    assert calls == [False, False, True]
    handle.remove()
    calls.clear()
    layers[1].input_layernorm = nn.LayerNorm(32)
    stock.model.layers[1].input_layernorm = copy.deepcopy(layers[1].input_layernorm)
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-4
    assert calls == [False, True, True]


def test_a_hook_of_all_modules_sees_the_norm(calls):
    model = apply(make("llama"))
    ids, seen = torch.randint(3, 61, (2, 17)), []
    handle = register_module_forward_hook(lambda module, given, made: seen.append(type(module).__name__))
    try:
        model(input_ids=ids)
    finally:
        handle.remove()
    assert seen.count("LlamaRMSNorm") == 5
    assert calls == []


def test_what_nobody_can_add_is_an_error(calls):
    norm = LlamaRMSNorm(32)
    hf_norm.patch(norm, record.Record(record.Report("", "", True)))
    with pytest.raises(TypeError, match="unsupported operand"):
        hf_residual.add_and_normalise(norm, torch.randn(3, 32), None)
    assert calls == []


def test_autocast_and_other_dtypes_keep_the_sum_apart(calls):
    norm = LlamaRMSNorm(32)
    hf_norm.patch(norm, record.Record(record.Report("", "", True)))
    x, residual = torch.randn(3, 32), torch.randn(3, 32)
    for first, second in ((x, residual.half()), (x, residual[:1]), (x.half(), residual.half()), (x, 1.5)):
        made, total = hf_residual.add_and_normalise(norm, first, second)
        assert total.dtype == (first + second).dtype
        assert torch.equal(total, first + second)
        torch.testing.assert_close(made, norm(total))
    assert calls == []
    assert all(map(torch.equal, hf_residual.add_and_normalise(norm, x, residual), (norm(x + residual), x + residual)))
    assert calls == [True]


class Layer(nn.Module):
    """Sums of several kinds around one norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.block = LlamaRMSNorm(32), nn.Linear(32, 32)


class Difference(Layer):
    def forward(self, h):
        kept = h
        h = self.block(h)
        h = kept - h
        kept = h
        h = self.norm(h)
        return kept + h


class Scaled(Layer):
    def forward(self, h):
        kept = h
        h = self.block(h)
        h = 0.5 * h + kept
        kept = h
        h = self.norm(h)
        return kept + 2 * h


class InBranches(Layer):
    def forward(self, h):
        if self.training:
            kept = h
            h = self.norm(h)
        else:
            h = h + self.block(h)
            kept = h
            h = self.norm(h)
        return kept + h


class OfAnother(Layer):
    def forward(self, h):
        other = 2 * h
        kept = h
        h = self.norm(other)
        return kept + h


class WithMore(Layer):
    def forward(self, h):
        total = h + self.block(h)
        kept = total
        h = self.norm(total)
        return kept + h


class Changed(Layer):
    def forward(self, h):
        h = h + self.block(h)
        kept = h
        h = self.norm(h)
        kept += 1
        h *= 2
        return kept + h


class Wrapped(Layer):
    def forward(self, h):
        kept = h
        h = self.norm(h)
        return kept + h


def tripled(forward):
    @functools.wraps(forward)
    def call(self, h):
        return 3 * forward(self, h)

    return call


Wrapped.forward = tripled(Wrapped.forward)


class Listed(Layer):
    """A list of norms is a module, whose forward is no method."""

    def __init__(self):
        super().__init__()
        self.norm = nn.ModuleList([LlamaRMSNorm(32)])

    def forward(self, h):
        kept = h
        h = self.norm[0](h)
        return kept + h


@pytest.mark.parametrize("kind", [Wrapped, Listed])
def test_layers_that_are_left_alone(kind, calls):
    stock = kind()
    layer, found_there = copy.deepcopy(stock), record.Record(record.Report("", "", True))
    hf_norm.patch(layer, found_there)
    hf_residual.patch(layer, found_there)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), stock(x))
    assert calls == []


@pytest.mark.parametrize(
    ("kind", "found"),
    [(Difference, [False]), (Scaled, [True]), (InBranches, [False]), (OfAnother, []), (WithMore, []), (Changed, [True])],
)
def test_other_layers(kind, found, calls):
    torch.manual_seed(0)
    stock = kind()
    layer = copy.deepcopy(stock)
    found_there = record.Record(record.Report("", "", True))
    hf_norm.patch(layer, found_there)
    hf_residual.patch(layer, found_there)
    x = torch.randn(5, 32)
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(training)(x), stock.train(training)(x))
    assert calls == (2 * found if kind is not InBranches else [False, True])
    if kind is not Changed:  # which autograd refuses in any case: the norm's input was changed
        results = []
        for module in (layer, stock):
            leaf = x.clone().requires_grad_()
            results.append(torch.autograd.grad(module.train()(leaf).square().sum(), (leaf, module.norm.weight)))
        torch.testing.assert_close(*results)


def test_copies_and_pickles(calls):
    model = apply(make("llama"))
    ids = torch.randint(3, 61, (2, 17))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        assert calls == 4 * [False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    stock = make("llama").train()
    model = apply(copy.deepcopy(stock))
    for m in (model, stock):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
    ids = torch.randint(3, 61, (2, 17))
    inputs = {"input_ids": ids, "labels": ids}
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-4
    assert len(calls) == 8


def test_compiled(monkeypatch):
    monkeypatch.setattr(hf_norm, "has_kernel", lambda x: True)
    stock = make("qwen3")
    model = apply(copy.deepcopy(stock))
    model.compile(backend="aot_eager", fullgraph=True)
    ids = torch.randint(3, 61, (2, 17))
    inputs = {"input_ids": ids, "labels": ids}
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-4


@gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_on_a_gpu(family, monkeypatch):
    """As the stock model, everything replaced."""
    made = []

    def add_rms_norm(x, residual, *others, **options):
        made.append(residual is not None)
        return packops.add_rms_norm(x, residual, *others, **options)

    monkeypatch.setattr(hf_residual, "add_rms_norm", add_rms_norm)
    stock = make(family).cuda()
    model = packops.hf.apply(copy.deepcopy(stock))
    ids = torch.randint(3, 61, (2, 17), device="cuda")
    inputs = {"input_ids": ids, "labels": ids}
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-3
    assert made == 2 * [False, True]
