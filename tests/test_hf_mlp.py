"""Gated MLPs of Hugging Face models: found by what they compute, and keeping half as much."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops.hf import mlp as hf_mlp
from packops.hf import record

transformers = pytest.importorskip("transformers")

from hf_models import difference, documents, make, packed, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class MLP(nn.Module):
    """As most families write it, and what subclasses make of it."""

    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Exchanged(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=50.0)) * self.up_proj(x))


class Scaled(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.001


class Dropping(MLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.001, self.training)


class Routed(MLP):
    def forward(self, x, weights=None):
        return super().forward(x)


class WithMore(MLP):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class WithScale(MLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Widths(MLP):
    """Computes with sizes of its own, which small projections do not have."""

    def forward(self, x):
        return super().forward(x.view(-1, 32)).view(x.shape)


def hooked():
    mlp = MLP()
    mlp.act_fn.register_forward_hook(lambda *_: None)
    return mlp


@pytest.mark.parametrize(
    "mlp",
    [
        Exchanged(), Clamped(), Scaled(), Dropping(), Routed(), WithMore(), WithScale(), Widths(), hooked(),
        MLP(nn.ReLU()), MLP(nn.Tanh()), MLP(nn.Sigmoid()), MLP(nn.Mish()), MLP(nn.PReLU(init=0.5)),
        MLP(transformers.activations.QuickGELUActivation()), MLP(transformers.activations.ClippedGELUActivation(-10, 10)),
    ],
    ids=lambda mlp: f"{type(mlp).__name__} {type(mlp.act_fn).__name__}",
)  # fmt: skip
def test_mlps_that_compute_something_else_are_left_alone(mlp):
    model = make("llama")
    model.model.layers[1].mlp = mlp
    random = torch.random.get_rng_state()
    packops.hf.apply(model.eval())  # dropout is off, and will be on
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_mlp in 1 modules"
    assert not record.is_patched(mlp)
    assert torch.equal(torch.random.get_rng_state(), random), "asking takes from the user's random numbers"


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        *((transformers.activations.ACT2FN[name], activation) for name, activation in (
            ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("swish", "silu"),
        )),
    ],
)  # fmt: skip
def test_activations_are_told_apart(act, activation):
    mlp = MLP(act)
    assert hf_mlp.recognise(mlp).activation == activation
    with torch.device("meta"):  # whatever the default device
        assert hf_mlp.recognise(mlp).activation == activation


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_mlps_of_16_bits_are_no_less_accurate_than_stock(device, family):
    mlp = make(family, torch.bfloat16).model.layers[0].mlp.to(device)
    x, grad = torch.randn(2, 64, 32, device=device).bfloat16()
    ours = copy.deepcopy(mlp)
    ours.forward = hf_mlp._forward(hf_mlp.recognise(mlp)).__get__(ours)

    def results(mlp, x, grad):
        x = x.clone().requires_grad_()
        y = mlp(x)
        return y.detach(), *torch.autograd.grad(y, (x, *mlp.parameters()), grad)

    exact = results(copy.deepcopy(mlp).double(), x.double(), grad.double()) if device.type == "cpu" else None
    exact = exact or [y.to(device) for y in results(copy.deepcopy(mlp).cpu().double(), x.cpu().double(), grad.cpu().double())]
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(results(m, x, grad), exact, strict=True)] for m in (ours, mlp)
    ]
    assert all(a < 1.05 * b for a, b in zip(*errors, strict=True)), errors


class LoRA(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("first", ["lora", "apply"])
def test_projections_that_are_more_than_their_weight(family, first):
    """They are called, whether they were wrapped before or after apply; so is the activation, if somebody looks at it."""
    model, texts = make(family), documents()
    if first == "apply":
        packops.hf.apply(model)
    mlp = model.model.layers[0].mlp
    torch.manual_seed(3)
    for name in ("down_proj", "gate_up_proj" if family == "phi3" else "up_proj"):
        setattr(mlp, name, LoRA(getattr(mlp, name)))
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    ours = run(model, packed(texts))
    packops.hf.revert(model)
    stock = run(model, packed(texts))
    if first == "lora":
        ours = run(packops.hf.apply(model), packed(texts))
        assert packops.hf.report(model).replaced["mlp"] == "packops.gated_activation in 2 modules"
    assert "model.layers.0.mlp.down_proj.a.weight" in stock[1]
    assert 0 < difference(ours, stock) < 1e-5

    seen = []
    packops.hf.apply(model)
    act = mlp.activation_fn if family == "phi3" else mlp.act_fn
    act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert difference(run(model, packed(texts)), stock) < 1e-5
    assert len(seen) == 1


@pytest.mark.parametrize(("family", "name"), [("llama", "gate_proj"), ("llama", "up_proj"), ("phi3", "gate_up_proj")])
def test_first_projections_that_are_more_than_their_weight(family, name):
    """They are called, and what follows them is one op."""
    model, texts = make(family), documents()
    torch.manual_seed(3)
    first, second = (layer.mlp for layer in model.model.layers[:2])
    setattr(first, name, LoRA(getattr(first, name)))
    second.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + 0.1)
    stock = run(model, packed(texts))
    ours = run(packops.hf.apply(model), packed(texts))
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_linear in 2 modules"
    assert 0 < difference(ours, stock) < 1e-5


def test_another_option_of_the_activation():
    """``nn.GELU`` is two functions of one class."""
    model, texts = make("llama"), documents()
    for layer, act in zip(model.model.layers, (nn.GELU("tanh"), nn.GELU()), strict=True):
        layer.mlp = MLP(act)
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_mlp in 2 modules"
    model.model.layers[0].mlp.act_fn = nn.GELU()
    model.model.layers[1].mlp.act_fn.approximate = "tanh"
    ours = run(model, packed(texts))
    assert difference(ours, run(packops.hf.revert(model), packed(texts))) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_torch_fx_traces_a_patched_mlp(family):
    """The family's own lines: an op of packops takes no proxy."""
    mlp, x = packops.hf.apply(make(family)).model.layers[0].mlp, torch.randn(7, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(mlp)(x), mlp(x))


class Doubled(torch.Tensor):
    """A bias that is more than its numbers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(*args[:2], 2 * args[2].as_subclass(torch.Tensor))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_bias_that_is_more_than_its_numbers(name):
    mlp = MLP()
    ours, x = copy.deepcopy(mlp), torch.randn(7, 32)
    ours.forward = hf_mlp._forward(hf_mlp.recognise(mlp)).__get__(ours)
    for module in (mlp, ours):
        linear = module.get_submodule(name)
        linear.bias = nn.Parameter(linear.bias.detach().as_subclass(Doubled))
    results = [(y, torch.autograd.grad(y.sum(), m.get_submodule(name).bias)) for m in (ours, mlp) for y in [m(x)]]
    torch.testing.assert_close(*results)


def test_a_mlp_that_somebody_else_replaced_is_left_alone():
    model, texts = make("llama"), documents()
    mlp = model.model.layers[0].mlp
    mlp.forward = theirs = functools.partial(type(mlp).forward, mlp)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_mlp in 1 modules"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert vars(mlp)["forward"] is theirs


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_patched_mlp_keeps_two_matrices(family):
    def kept(mlp):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        parameters = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        x = torch.randn(100, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = mlp(x)
        del storages[x.untyped_storage().data_ptr()]
        assert out.requires_grad
        return sum(size for place, size in storages.items() if place not in parameters) / (100 * 48 * 4)

    model = make(family)
    assert kept(model.model.layers[0].mlp) == 4
    assert kept(packops.hf.apply(model).model.layers[0].mlp) == 2


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_frozen_projections_keep_no_input(family):
    """As where adapters train the attention alone."""
    mlp = packops.hf.apply(make(family)).model.layers[0].mlp.requires_grad_(False)
    x = torch.randn(100, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        out = mlp(x * 1)
    assert sorted(y.numel() for y in kept if y.shape[0] == 100) == [100 * 48] * 2  # gate and up
    want = make(family).model.layers[0].mlp(x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (out, want)]
    torch.testing.assert_close(*grads)
