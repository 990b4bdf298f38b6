"""Projections of one input in Hugging Face's attention layers: which share the sum of gradients, and what is computed."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import packops.hf
from packops.hf import projections

transformers = pytest.importorskip("transformers")

from hf_models import FAMILIES, difference, make, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT = {"phi3", "gpt_neox", "persimmon"}  # one weight for q, k and v


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call had that shares its input."""
    found, apply = [], projections.Projections.apply

    def counted(*tensors):
        found.append(len(tensors) // 2)
        return apply(*tensors)

    monkeypatch.setattr(projections.Projections, "apply", counted)
    return found


def apply(model):
    return packops.hf.apply(model, cross_entropy=False, rms_norm=False, mlp=False)


def inputs(device="cpu"):
    ids = torch.randint(3, 61, (2, 17), device=device)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, calls):
    stock = make(family)
    model = apply(copy.deepcopy(stock))
    batch = inputs()
    assert difference(run(model, batch), run(stock, batch)) < 1e-4
    assert calls == ([] if family in WITHOUT else [3, 3])
    assert ("projections" in packops.hf.report(model).replaced) == (family not in WITHOUT)


def test_products_add_up():
    model = apply(make("llama"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model, inputs())
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::addmm_") == 2 * 2


def test_what_looks_on_sees_the_projections(calls):
    """Hooks, a frozen input, no gradients, another module in one's place, a compiler, autocast, transforms."""
    stock = make("qwen2")
    model, batch = apply(copy.deepcopy(stock)), inputs()
    seen = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, given, made: seen.append(made.shape))
    assert difference(run(model, batch), run(stock, batch)) < 1e-4
    assert (seen, calls) == ([(2, 17, 16)], [3])
    handle.remove()
    calls.clear()
    with torch.no_grad():
        model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(run(model, batch), run(stock, batch)) < 0.05
    parameters = dict(model.named_parameters())
    loss = lambda p: torch.func.functional_call(model, p, kwargs=batch).loss  # noqa: E731
    found = torch.func.grad(loss)(parameters)
    assert difference((loss(parameters), found), run(stock, batch)) < 1e-4
    calls.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert difference(run(compiled, batch), run(torch.compile(stock, backend="aot_eager"), batch)) < 1e-4
    assert calls == []
    model.model.layers[0].self_attn.v_proj = nn.Sequential(model.model.layers[0].self_attn.v_proj)
    model.model.layers[1].requires_grad_(False)
    run(model, batch)
    assert calls == [3]


def test_gradients():
    """Of all tensors and of some, of results that nobody used; those of weights and biases have autograd's bits."""
    torch.manual_seed(0)
    modules = [nn.Linear(24, n, bias=n != 8).double() for n in (16, 8, 12)]
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    grads = [torch.randn(2, 5, m.out_features, dtype=torch.float64) for m in modules]
    for frozen, unused in ((None, None), (0, None), (1, None), (None, 0), (2, 1)):
        for i, module in enumerate(modules):
            module.requires_grad_(i != frozen)
        leaves = [x, *(p for m in modules for p in m.parameters() if p.requires_grad)]
        results = []
        for made in (projections.project(x, *modules), [m(x) for m in modules]):
            used = [i for i in range(3) if i != unused]
            wanted = [made[i] for i in used], leaves, [grads[i] for i in used]
            results.append(torch.autograd.grad(*wanted, allow_unused=True))
        (of_x, *found), (want_x, *want) = results[0], results[1]
        torch.testing.assert_close(of_x, want_x, rtol=1e-13, atol=1e-13)
        for a, b in zip(found, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_gradients_of_gradients():
    modules = [nn.Linear(6, n).double() for n in (4, 3)]
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = [p for m in modules for p in m.parameters()]

    def projected(x, *_):
        return projections.project(x, *modules)

    assert torch.autograd.gradcheck(projected, (x, *parameters))
    assert torch.autograd.gradgradcheck(projected, (x, *parameters))


def test_inputs_of_any_shape_and_stride():
    modules = [nn.Linear(24, n).double() for n in (16, 8)]
    whole = torch.randn(5, 4, 48, dtype=torch.float64)
    for x in (whole[..., :24], whole.transpose(0, 1)[..., 24:], whole[0, 0, ::2], whole[:0, :, :24], whole[:, 0, :24]):
        leaf = x.detach().requires_grad_()
        results = []
        for made in (projections.project(leaf, *modules), [m(leaf) for m in modules]):
            loss = sum((y * y.detach().cos()).sum() for y in made)
            results.append(torch.autograd.grad(loss, [leaf, *modules[0].parameters()]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(("width", "columns"), [(0, 4), (5, 0)])
def test_nothing_to_multiply(width, columns):
    modules = [nn.Linear(width, columns), nn.Linear(width, 3)]
    x = torch.randn(2, 4, width, requires_grad=True)
    leaves = [x, *(p for m in modules for p in m.parameters())]
    results = [torch.autograd.grad(sum(y.square().sum() for y in made), leaves) for made in both(x, modules)]
    torch.testing.assert_close(*results)


def both(x, modules):
    """What we make and what torch makes."""
    return projections.project(x, *modules), [m(x) for m in modules]


def test_other_tensors(calls):
    """Complex ones, and nested ones, have gradients of their own."""
    modules = [nn.Linear(6, n) for n in (4, 3)]
    weights = [m.weight for m in modules]
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.nested_tensor([torch.randn(n, 6) for n in (3, 2)], layout=layout, requires_grad=True)
        losses = [sum(y.to_padded_tensor(0.0).square().sum() for y in made) for made in both(x, modules)]
        torch.testing.assert_close(*[torch.autograd.grad(loss, weights) for loss in losses])
    x = torch.randn(2, 6, dtype=torch.complex64, requires_grad=True)
    modules = [nn.Linear(6, n, dtype=torch.complex64) for n in (4, 3)]
    results = [torch.autograd.grad(sum(y.abs().sum() for y in made), [x, modules[0].weight]) for made in both(x, modules)]
    torch.testing.assert_close(*results)
    assert calls == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (1, 2, 5, 6)])
def test_results_are_changed_in_place(shape, bias):
    modules = [nn.Linear(6, 4, bias=bias) for _ in range(2)]
    x = torch.randn(shape, requires_grad=True)
    results = []
    for q, k in both(x, modules):
        q *= 2
        k.view(-1, 2).clamp_(-0.5, 0.5)
        results.append(torch.autograd.grad((q.square() + k.square()).sum(), [x, modules[0].weight, modules[1].weight]))
    torch.testing.assert_close(*results)


def test_a_layer_that_clips_in_place(calls):
    """OLMo's, which clips what linear returns."""
    stock = make("olmo", attention_bias=True, clip_qkv=1.0)
    model, batch = apply(copy.deepcopy(stock)), inputs()
    assert difference(run(model, batch), run(stock, batch)) < 1e-4
    assert calls == [3, 3]


def test_frozen_weights_keep_no_input(calls):
    """As where adapters train other layers: what goes in may be changed afterwards, too."""
    modules = [nn.Linear(6, n).requires_grad_(False) for n in (4, 3)]
    leaf = torch.randn(2, 5, 6, requires_grad=True)
    kept, results = [], []
    for make_both in (projections.project, lambda x, *modules: [m(x) for m in modules]):
        x = leaf * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
            made = make_both(x, *modules)
        x.zero_()
        results.append(torch.autograd.grad(sum(y.square().sum() for y in made), leaf))
    torch.testing.assert_close(*results)
    assert calls == [2]
    assert not [y for y in kept if y.shape == leaf.shape]


def test_autocast_around_the_backward_pass_alone(calls):
    modules = [nn.Linear(6, n) for n in (4, 3)]
    x = torch.randn(2, 5, 6, requires_grad=True)
    made = projections.project(x, *modules)
    want = torch.autograd.grad(made, [x, modules[1].weight], made, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(made, [x, modules[1].weight], made)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert calls == [2]


def test_projections_live_no_longer_than_before():
    """Past RoPE nobody needs them."""
    layer = apply(make("llama")).model.layers[0].self_attn
    made, alive = [], []
    for name in ("q_proj", "k_proj"):
        getattr(layer, name).register_forward_hook(lambda m, given, y: made.append(weakref.ref(y)))
    layer.o_proj.register_forward_pre_hook(lambda m, given: alive.extend(y() is not None for y in made))
    with torch.no_grad():
        layer(torch.randn(1, 5, 32), (torch.ones(1, 5, 4), torch.zeros(1, 5, 4)))
    assert alive == [False, False]


def test_counted_products():
    """In the forward pass the counter has hooks on all modules."""
    modules, counts = [nn.Linear(6, n) for n in (4, 3)], []
    for made in both(torch.randn(2, 6, requires_grad=True), modules):
        with FlopCounterMode(display=False) as counter:
            sum(y.sum() for y in made).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_layer_without_source_is_refused():
    model = make("llama")
    kind = type(model.model.layers[0].self_attn)
    scope = {"__name__": "typed", "apply_rotary_pos_emb": kind.forward.__globals__["apply_rotary_pos_emb"]}
    exec("def forward(self, x, tables):\n    return apply_rotary_pos_emb(x, x, *tables)", scope)
    model.model.layers[1].self_attn.__class__ = type("Typed", (kind,), {"forward": scope["forward"]})
    with pytest.raises(ValueError, match=r"cannot replace RoPE in LlamaForCausalLM .*: the source of forward is not installed"):
        apply(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    stock = make("llama")
    model = apply(copy.deepcopy(stock))
    for m in (model, stock):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
    batch = inputs()
    assert difference(run(model, batch), run(stock, batch)) < 1e-4
    assert set(calls) == {3}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)


class Changed(Layer):
    def forward(self, x):
        y = self.a(x)
        x = self.b(x)
        z = self.c(x)
        return x + y + z


class Twice(Layer):
    def forward(self, x):
        y = self.a(x).view(-1, 6)
        z = self.a(x).view(y.shape)
        w = self.norm(self.b(x)).view(z.shape)
        return y + 2 * z + 3 * w


class Conditional(Layer):
    def forward(self, x):
        y = self.a(x)
        z = self.b(x) if self.c is None else y
        w = self.c(x, *[])
        return y + z + w


class TwoRuns(Layer):
    def forward(self, x):
        if self.training:
            y = self.a(x)
            z = self.b(x)
            x = y * z
        u = self.b(x)
        v = self.c(x)
        y = self.a(u)
        z = self.c(u)
        return u * v + y * z


@pytest.mark.parametrize(("kind", "found"), [(Changed, []), (Twice, [2]), (Conditional, []), (TwoRuns, [2, 2, 2])])
def test_other_lines(kind, found, calls):
    torch.manual_seed(0)
    layer = kind()
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    scope = dict(projections.share_input(definition))
    exec(compile(ast.fix_missing_locations(ast.Module([definition], [])), "<rewritten>", "exec"), scope)
    x = torch.randn(3, 6, requires_grad=True)
    results = []
    for forward in (scope["forward"], kind.forward):
        made = forward(layer, x)
        results.append((made, *torch.autograd.grad(made.square().sum(), [x, layer.a.weight])))
    torch.testing.assert_close(*results)
    assert calls == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_exact(dtype, device, calls):
    """The gradient of x is no further from the exact one than autograd's sum, whose order it has. In 16 bits it is nearer on the
    CPU; cuBLAS rounds a product before it adds, as torch's kernel does."""
    torch.manual_seed(0)
    modules = [nn.Linear(256, n, bias=False).to(device, dtype) for n in (512, 128, 128)]
    x = torch.randn(1000, 256, device=device).to(dtype).requires_grad_()
    grads = [torch.randn(1000, m.out_features, device=device).to(dtype) for m in modules]
    exact = sum(g.double() @ m.weight.double() for g, m in zip(grads, modules, strict=True))
    errors = []
    for made in (projections.project(x, *modules), [m(x) for m in modules]):
        (of_x,) = torch.autograd.grad(made, x, grads)
        errors.append((of_x - exact).square().mean().sqrt().item())
    assert errors[0] <= (0.9 if dtype == torch.bfloat16 and device.type == "cpu" else 1.01) * errors[1]
    assert calls == [3]
