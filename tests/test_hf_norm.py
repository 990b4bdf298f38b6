"""RMS norms of Hugging Face models: found by what they compute, and computed with fewer roundings."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops.hf import norm as hf_norm
from packops.hf import record

transformers = pytest.importorskip("transformers")

from hf_models import difference, documents, make, packed, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def norms_of(dtype=torch.float32, width=40):
    """A norm of each kind: weight rounded last, weight in fp32, 1 + weight."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norms = LlamaRMSNorm(width, eps=1e-3), Olmo2RMSNorm(width, eps=1e-3), Gemma2RMSNorm(width, eps=1e-3)
    for norm in norms:
        norm.weight.data += 0.3 * torch.randn(width)
        norm.to(dtype)
    return norms


def patched(norm):
    """The norm as ``apply`` has it, on its own."""
    twin = copy.deepcopy(norm)
    hf_norm.patch(twin, record.Record(record.Report("", "", True)))
    assert record.is_patched(twin)
    return twin


def test_norms_are_recognised():
    llama, olmo, gemma = norms_of()
    assert hf_norm.recognise(llama) == (type(llama), "variance_epsilon", False)
    assert hf_norm.recognise(olmo) == (type(olmo), "variance_epsilon", False)
    assert hf_norm.recognise(gemma) == (type(gemma), "eps", True)
    assert hf_norm.recognise(llama.to("meta")) == (type(llama), "variance_epsilon", False)


class Norm(nn.Module):
    """``forward`` in one line, given the normed input too."""

    def __init__(self, **more):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6
        for name, value in more.items():
            self.register_parameter(name, value) if isinstance(value, nn.Parameter) else self.register_buffer(name, value)

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Biased(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight + self.bias


class Buffered(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight * self.scale


class Gated(Norm):
    def forward(self, x, gate=None):
        return self.normed(x) * self.weight if gate is None else self.normed(x) * self.weight * gate


class Weightless(Norm):
    def forward(self, x):
        return self.normed(x)


class EpsilonOutside(Norm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Clipped(Norm):
    def forward(self, x):
        return self.weight * self.normed(x.clamp(-50, 50))


class InGroups(Norm):
    def forward(self, x):
        return self.weight * self.normed(x.unflatten(-1, (2, -1))).flatten(-2)


class Doubled(Norm):
    def forward(self, x):
        return self.normed(x) * (2 + self.weight)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(32, bias=False),
        nn.LayerNorm(32),
        nn.BatchNorm1d(32),
        nn.GroupNorm(4, 32),
        Biased(bias=nn.Parameter(torch.zeros(32))),
        Buffered(scale=torch.ones(())),
        Gated(),
        Weightless(),
        EpsilonOutside(),
        Clipped(),
        InGroups(),
        Doubled(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_that_compute_something_else_are_left_alone(norm):
    model = make("llama")
    model.model.norm = norm
    before = [tensor.clone() for tensor in norm.state_dict().values()]
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["rms_norm"] == "packops.rms_norm (torch's on the CPU) in 4 modules"
    assert not record.is_patched(norm)
    assert all(map(torch.equal, before, norm.state_dict().values())), "asking has changed it"


def test_a_norm_without_numbers_is_left_alone():
    """DeepSpeed's partitioned weights hold none, so any answer would agree."""
    llama, _, _ = norms_of()
    llama.weight.data = torch.empty(0)
    assert hf_norm.recognise(llama) is None


def test_a_norm_that_somebody_else_replaced_is_left_alone():
    model, texts = make("llama"), documents()
    norm = model.model.norm
    norm.forward = theirs = functools.partial(type(norm).forward, norm)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["rms_norm"] == "packops.rms_norm (torch's on the CPU) in 4 modules"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert vars(norm)["forward"] is theirs


def test_norms_of_16_bits_are_no_less_accurate_than_stock(device):
    """Against fp64, output and both gradients. The stock norms round more often."""
    x = torch.randn(64, 40, dtype=torch.bfloat16, device=device)
    grad = torch.randn_like(x)

    def errors(norm, exact):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results(norm, x, grad), exact, strict=True)]

    def results(norm, x, grad):
        x = x.clone().requires_grad_()
        y = norm(x)
        return y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)

    for norm in norms_of(torch.bfloat16):
        norm = norm.to(device)
        exact = results(patched(norm).double(), x.double(), grad.double())
        ours, stock = errors(patched(norm), exact), errors(norm, exact)
        assert all(a < 1.02 * b for a, b in zip(ours, stock, strict=True)), (ours, stock)
        assert max(ours) < 4e-3
        plain = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-3)
        gain = norm.weight.double() + (type(norm).__name__ == "Gemma2RMSNorm")
        torch.testing.assert_close(exact[0], plain * gain)


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_return_the_dtype_of_stock(device, autocast):
    """Where weight and input differ, too; then the module's own forward runs."""
    for weight in (torch.float32, torch.bfloat16):
        for norm in norms_of(weight):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                norm, x = norm.to(device), torch.randn(6, 40, dtype=dtype, device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    ours, stock = patched(norm)(x), norm(x)
                assert ours.dtype == stock.dtype
                if weight != dtype and type(norm).__name__ != "Gemma2RMSNorm":
                    assert torch.equal(ours, stock)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_torch_fx_traces_a_patched_norm(family):
    norm, x = packops.hf.apply(make(family)).model.norm, torch.randn(7, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(norm)(x), norm(x))


def test_a_norm_reads_its_epsilon_at_every_call():
    for norm in norms_of():
        twin, x = patched(norm), torch.randn(3, 40)
        setattr(twin, hf_norm.recognise(norm).eps, 2.0)
        setattr(norm, hf_norm.recognise(norm).eps, 2.0)
        torch.testing.assert_close(twin(x), norm(x))


def test_which_rows_have_a_kernel(monkeypatch):
    def has_kernel(columns, dtype=torch.bfloat16, is_cuda=True):
        x = SimpleNamespace(shape=(3, columns), dtype=dtype, is_cuda=is_cuda, element_size=lambda: dtype.itemsize)
        return hf_norm.has_kernel(x)

    monkeypatch.setattr(hf_norm, "has_cuda", True)
    f32 = torch.float32
    assert all(has_kernel(*row) for row in ((8,), (8192,), (4, f32), (4096, f32)))
    assert not any(has_kernel(*row) for row in ((0,), (12,), (8200,), (8192, f32), (64, torch.float64)))
    assert not has_kernel(64, is_cuda=False)
    monkeypatch.setattr(hf_norm, "has_cuda", False)
    assert not has_kernel(64)


@pytest.mark.gpu
def test_norms_are_fused_on_a_gpu():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(str(op))
            return op(*args, **(kwargs or {}))

    for norm in norms_of(torch.bfloat16):
        norm, seen = patched(norm.to("cuda")), set()
        x = torch.randn(3, 5, 40, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with Ops():
            norm(x).sum().backward()
        assert {"packops._rms_norm.default", "packops._rms_norm_backward.default"} <= seen
        assert not {op for op in seen if "rsqrt" in op or "pow" in op or "_to_copy" in op}
