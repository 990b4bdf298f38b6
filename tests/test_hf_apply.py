"""packops.hf.apply: one instance changes, nothing else, and so do its copies; the undo is exact; what is not known is refused."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import packops
import packops.hf
from packops.hf import families, record, rewrite

transformers = pytest.importorskip("transformers")

from hf_models import VOCABULARY, attributes, difference, documents, make, packed, padded, run, same_attributes  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def without_numbers(fake, inputs):
    return {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_fake_tensors_are_planned_with_as_real_ones(family, attention):
    """Memory of the same ops: all is replaced in a model without numbers that is replaced in one with them."""
    stock, inputs = make(family), packed(documents())
    config, options = copy.deepcopy(stock.config), {"attn_implementation": stock.config._attn_implementation}
    real = packops.hf.apply(stock, attention=attention)
    with FakeTensorMode() as fake:
        model = packops.hf.apply(type(real)._from_config(config, **options), attention=attention)
        results = model(**without_numbers(fake, inputs))
        results.loss.backward()
    assert str(packops.hf.report(model)) == str(packops.hf.report(real))
    assert results.logits is None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("leave_out", "more", "what"),
    [
        (("cu_seq_lens_q", "cu_seq_lens_k"), {}, "position_ids without cu_seq_lens_q"),
        (("max_length_q", "max_length_k"), {}, "cu_seq_lens_q without max_length_q"),
        ((), {"attention_mask": torch.ones(1, sum(map(len, documents())))}, "attention_mask"),
        ((), {"dropout": 0.1}, "lengths of documents beside dropout"),
    ],
)
def test_fake_tensors_that_packops_varlen_would_have_to_read(leave_out, more, what):
    inputs = {name: x for name, x in (packed(documents()) | more).items() if name not in leave_out}
    config = copy.deepcopy(make("llama").config)
    config.attention_dropout = inputs.pop("dropout", 0.0)
    with FakeTensorMode() as fake:
        model = packops.hf.apply(transformers.LlamaForCausalLM(config), attention="packops_varlen")
        with pytest.raises(ValueError, match=rf"packops_varlen reads {what}.*got a fake tensor .*pass cu_seq_lens_q"):
            model(**without_numbers(fake, inputs))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere"])
def test_revert_is_exact(family, fused):
    model, texts = make(family), documents()
    before, stock = attributes(model), run(model, packed(texts))
    model.zero_grad(set_to_none=True)
    config = copy.deepcopy(model.config.to_dict())
    packops.hf.apply(model, attention="eager", reduction="seq-mean-token-sum")
    assert not same_attributes(before, attributes(model))
    assert float(run(model, packed(texts))[0]) != float(stock[0])
    packops.hf.revert(model)
    model.zero_grad(set_to_none=True)
    assert same_attributes(before, attributes(model))
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    again = run(model, packed(texts))
    assert torch.equal(again[0], stock[0])
    assert all(torch.equal(again[1][name], gradient) for name, gradient in stock[1].items())
    assert repr(packops.hf.report(model)) == f"packops.hf: nothing is replaced in {type(model).__name__}"
    packops.hf.revert(model)  # once more does nothing


def test_only_this_instance_changes(fused):
    from transformers.models.qwen3 import modeling_qwen3 as module

    def world():
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        return dict(vars(module)), [dict(vars(cls)) for cls in classes], torch.nn.functional.cross_entropy

    model, other, texts = make("qwen3"), make("qwen3"), documents()
    stock, before, outside = run(other, packed(texts)), attributes(other), world()
    packops.hf.apply(model)
    run(model, packed(texts))
    other.zero_grad(set_to_none=True)
    assert same_attributes(before, attributes(other))
    assert world() == outside
    again = run(other, packed(texts))
    assert all(torch.equal(again[1][name], gradient) for name, gradient in stock[1].items())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert model.state_dict().keys() == other.state_dict().keys()


def test_apply_again_changes_the_options():
    model = make("llama")
    before = attributes(model)
    packops.hf.apply(model)
    packops.hf.apply(model, rope=False, reduction="seq-mean-token-mean")
    assert packops.hf.report(model).replaced["loss"] == "packops.cross_entropy, reduction 'seq-mean-token-mean'"
    assert "rope" not in packops.hf.report(model).replaced
    packops.hf.revert(model)
    assert same_attributes(before, attributes(model))


def test_parts():
    model = make("llama")
    assert packops.hf.apply(model, cross_entropy=False, rms_norm=False, mlp=False) is model
    assert set(packops.hf.report(model).replaced) == {"rope", "projections", "tables"}
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    packops.hf.apply(model, rope=False, cross_entropy=False, mlp=False)
    assert packops.hf.report(model).replaced == {
        "rms_norm": "packops.rms_norm (torch's on the CPU) in 5 modules",
        "residual": "packops.add_rms_norm (apart on the CPU) in 2 layers",
    }
    packops.hf.apply(model, rope=False, cross_entropy=False, rms_norm=False)
    assert packops.hf.report(model).replaced == {"mlp": "packops.gated_mlp in 2 modules"}
    packops.hf.apply(model, rope=False, cross_entropy=False, rms_norm=False, mlp=False)
    assert packops.hf.report(model).replaced == {}


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral", "phi3"])
def test_copies_are_patched_and_on_their_own(family, how):
    model, texts = make(family), documents()
    stock = run(make(family), packed(texts))
    packops.hf.apply(model, attention="packops_varlen")
    ours = run(model, packed(texts))
    twin = COPIES[how](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert difference(run(twin, packed(texts)), ours) == 0, "the copy computes with the original's weights, or is stock"
    assert repr(packops.hf.report(twin)) == repr(packops.hf.report(model))
    packops.hf.revert(twin)
    assert not any(record.is_patched(module) for module in twin.modules())
    assert record.is_patched(model.model.layers[0].self_attn)
    assert packops.hf.report(model).replaced
    if family != "gemma2":  # whose sdpa has no softcap, so that it is eager, which agrees to rounding
        assert twin.config._attn_implementation == "sdpa"
    assert difference(run(twin, packed(texts)), stock) < (1e-5 if family == "gemma2" else 1e-30)


def test_a_pickled_model_runs_in_another_process(tmp_path):
    """One that knows neither packops_varlen nor that there is anything to register."""
    model, texts = packops.hf.apply(make("llama"), attention="packops_varlen").eval(), documents()
    torch.save(model, tmp_path / "model.pt")
    torch.save((packed(texts), float(model(**packed(texts)).loss)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); inputs, loss = torch.load(sys.argv[2]); "
        "torch.set_num_threads(1); assert float(model(**inputs).loss) == loss; import packops.hf; "
        "assert packops.hf.report(model).replaced['attention'] == 'packops_varlen'; packops.hf.apply(model)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.pt", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mixtral", "phi3"])
def test_replicas_of_data_parallel_compute_with_their_own_weights(family):
    """torch.nn.DataParallel makes a replica of every module on every GPU, and gives them copies of the parameters."""
    model, texts = packops.hf.apply(make(family)), documents()
    expected = run(model, packed(texts))[0]
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for module, replica in replicas.items():
        assert record.is_patched(replica) == record.is_patched(module)
    outputs = replicas[model](**packed(texts))
    assert float(outputs.loss) == pytest.approx(float(expected), rel=1e-6)
    assert outputs.logits is None, "a replica's lm_head is fused as well"


@pytest.mark.gpu
@pytest.mark.multigpu(count=2)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mixtral", "phi3"])
def test_data_parallel_on_two_gpus(family):
    """Rows of a padded batch go to two GPUs; summed losses divided by one count have the loss and gradients of a stock model."""
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in padded(documents()).items()}
    inputs["num_items_in_batch"] = int((inputs["labels"][:, 1:] != -100).sum())
    expected = run(make(family).cuda(), inputs)
    model = packops.hf.apply(make(family).cuda())
    losses = torch.nn.DataParallel(model, [0, 1])(**inputs).loss
    assert len(losses) == 2
    losses.sum().backward()
    ours = losses.sum().detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
    assert difference(ours, expected) < 1e-4


def test_two_models_of_one_configuration():
    config = make("llama").config
    policy, reference = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    assert policy.config is reference.config
    packops.hf.apply(policy, attention="packops_varlen")
    assert policy.config._attn_implementation == "packops_varlen"
    assert all(layer.self_attn.config._attn_implementation == "packops_varlen" for layer in policy.model.layers)
    assert reference.config is config
    assert config._attn_implementation == "sdpa"
    assert not packops.hf.report(reference).replaced
    packops.hf.revert(policy)
    assert policy.config is reference.config is policy.model.layers[1].self_attn.config


def test_save_pretrained(tmp_path):
    model = make("llama")
    packops.hf.apply(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert packops.hf.report(again).replaced == {}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_threads():
    """Models patched, run and reverted at the same time give what they give alone."""
    texts, failures = documents(), []
    stock = {family: run(make(family), packed(texts)) for family in ("llama", "qwen3")}

    def work(family):
        try:
            model = make(family)
            for _ in range(3):
                packops.hf.apply(model)
                assert 0 < difference(run(model, packed(texts)), stock[family]) < 1e-5
                packops.hf.revert(model)
                assert difference(run(model, packed(texts)), stock[family]) == 0
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(family,)) for family in ("llama", "qwen3") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_something_else_in_the_way():
    model = make("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = functools.partial(type(layer).forward, layer)  # as accelerate's hooks do
    with pytest.raises(
        ValueError, match=r"forward of model\.layers\.1\.self_attn \(LlamaAttention\) was already replaced.*functools"
    ):
        packops.hf.apply(model)
    assert not record.is_patched(model.model.layers[0].self_attn), "a refusal changes nothing"
    del layer.forward
    packops.hf.apply(model)
    ours = layer.forward
    layer.forward = functools.partial(ours)
    with pytest.raises(RuntimeError, match=r"forward of model\.layers\.1\.self_attn was replaced again"):
        packops.hf.revert(model)
    assert record.is_patched(model.model.layers[0].self_attn), "all or nothing"
    del layer.forward  # which is one way out, and putting ours back another
    packops.hf.revert(model)
    assert not any("forward" in vars(module) or record.is_patched(module) for module in model.modules())


def test_record_says_what_it_cannot_undo():
    """A record is of one model; undoing it twice is nothing."""
    model = packops.hf.apply(make("llama"))
    kept = vars(model)[record.ATTRIBUTE]
    packops.hf.revert(model)
    kept.undo()
    assert not record.is_patched(model)


def test_wrappers():
    """PEFT and its like hold the model; what is below is found, and nothing is changed above."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

    wrapper = Wrapper(make("llama"))
    assert packops.hf.apply(wrapper) is wrapper
    assert set(vars(wrapper)) == set(vars(Wrapper(make("llama"))))
    assert packops.hf.report(wrapper).replaced == packops.hf.report(wrapper.base_model).replaced != {}
    packops.hf.revert(wrapper)
    assert packops.hf.report(wrapper).replaced == {}
    with pytest.raises(TypeError, match=r"must be a transformers\.PreTrainedModel or hold one, got Linear"):
        packops.hf.apply(nn.Linear(2, 2))


def test_signature_and_traceback():
    """Trainer reads the first, people the second."""
    model = make("llama")
    before = inspect.signature(model.forward)
    packops.hf.apply(model)
    assert inspect.signature(model.forward) == before
    layer = model.model.layers[0].self_attn
    assert inspect.signature(layer.forward) == inspect.signature(type(layer).forward.__get__(layer))
    layer.q_proj = None
    with pytest.raises(TypeError) as caught:
        model(**packed(documents()))
    shown = "".join(traceback.format_exception(caught.value))
    assert "modeling_llama.py" in shown
    assert "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)" in shown
    assert "outputs: BaseModelOutputWithPast = self.model(" in shown


# ---- what is replaced afterwards -----------------------------------------------------------------------------------------------


def part_of(path, family="llama"):
    return make(family).get_submodule(path)


@pytest.mark.parametrize("family", ["llama", "glm4", "gpt_neox"])
def test_rope_that_was_replaced_in_part_is_refused(family):
    """A table twice as wide would turn twice as many features, where not all of a head turn."""
    attention = "gpt_neox.layers.1.attention" if family == "gpt_neox" else "model.layers.1.self_attn"
    rotary = f"{attention.partition('.')[0]}.rotary_emb"
    model = packops.hf.apply(make(family))
    before = model(**packed(documents())).loss
    model.set_submodule(rotary, part_of(rotary, family))
    with pytest.raises(ValueError, match=r"the rotary embedding was replaced after packops\.hf\.apply: call"):
        model(**packed(documents()))
    packops.hf.apply(model)
    assert torch.equal(model(**packed(documents())).loss, before)
    model.set_submodule(attention, part_of(attention, family))
    with pytest.raises(
        ValueError, match=f"packops.hf: {attention} was replaced after packops.hf.apply, by a .*Attention that reads"
    ):
        model(**packed(documents()))


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("lm_head", lambda: nn.Linear(32, VOCABULARY)),
        ("model.embed_tokens", lambda: part_of("model.embed_tokens")),
        ("model.layers.0.input_layernorm", lambda: nn.LayerNorm(32)),
        ("model.layers.0.mlp", lambda: part_of("model.layers.1.mlp")),
        ("model.layers.0.mlp.act_fn", nn.ReLU),
        ("model.layers.0.mlp.down_proj", lambda: nn.Sequential(nn.Linear(48, 32), nn.Tanh())),
        ("model.layers.0.self_attn.q_norm", lambda: nn.LayerNorm(8)),
    ],
)
def test_other_parts_may_be_replaced(path, part, attention):
    ours, stock, new = make("qwen3"), make("qwen3"), part()
    packops.hf.apply(ours, attention=attention)
    for model in (ours, stock):
        model.set_submodule(path, copy.deepcopy(new))
    assert difference(run(ours, packed(documents())), run(stock, packed(documents()))) < 1e-5


def test_a_decoder_that_was_replaced_is_asked_how_it_attends():
    """By its own configuration: that of the model says packops_varlen still, beside which masks are harmless."""
    model, inputs = make("llama"), packed(documents())
    want = model(**inputs).loss
    packops.hf.apply(model, attention="packops_varlen", rope=False)
    model.model = make("llama").model
    torch.testing.assert_close(model(**inputs).loss, want)
    with pytest.raises(ValueError, match="beside which transformers does not look for packed documents: with 'sdpa'"):
        model(**inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})


class Saved(nn.Module):
    """As PEFT's ``modules_to_save``: a copy of a module computes in its place."""

    def __init__(self, module):
        super().__init__()
        self.original_module, self.copy = module, copy.deepcopy(module)

    def forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)


def save(model, path):
    model.set_submodule(path, Saved(model.get_submodule(path)))
    return model


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
@pytest.mark.parametrize("path", ["model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.1.input_layernorm", "lm_head"])
def test_copies_of_patched_modules(path, attention):
    """They compute as what they are copies of, patched once more or not at all."""
    texts = documents()
    stock = run(save(make("qwen3"), path), packed(texts))
    model = save(packops.hf.apply(make("qwen3"), attention=attention), path)
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.apply(model, rope=False, attention=attention)
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert not any(record.is_patched(module) for module in model.modules())
    assert difference(run(model, packed(texts)), stock) < 1e-6


def test_a_model_with_a_copy_of_a_patched_decoder():
    """No record of its own says that it was patched."""
    inputs, stock, model = packed(documents()), make("llama"), make("llama")
    model.model = copy.deepcopy(packops.hf.apply(make("llama"), attention="packops_varlen").model)
    model.config = model.model.config
    packops.hf.apply(model, attention="sdpa")
    assert difference(run(model, inputs), run(stock, inputs)) < 1e-5
    packops.hf.revert(model)
    assert not any(record.is_patched(module) for module in model.modules())
    model.model = copy.deepcopy(packops.hf.apply(make("llama")).model)
    packops.hf.revert(model)
    assert not any(record.is_patched(module) for module in model.modules())


@pytest.mark.parametrize("through", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_another_record_answers_for_stays(through):
    """A model in a model, and layers that two models share; also where both were copied."""
    inner = packops.hf.apply(make("llama"))
    if through is not None:
        inner = through(inner)
    want = run(inner, packed(documents()))
    model = packops.hf.apply(make("llama"))
    model.other, model.shared = inner, make("llama").model.layers[0]
    model.shared.mlp = inner.model.layers[0].mlp
    packops.hf.revert(model)
    assert record.is_patched(inner)
    assert record.is_patched(inner.model.layers[0].mlp)
    assert difference(run(inner, packed(documents())), want) == 0
    packops.hf.revert(inner)
    assert not any(record.is_patched(module) for module in model.modules())


def test_a_layer_of_two_models_that_are_patched_is_reverted_for_one():
    first, second = make("llama"), make("llama")
    second.model.layers[0].mlp = first.model.layers[0].mlp
    want = run(packops.hf.apply(first), packed(documents()))
    packops.hf.revert(packops.hf.apply(second))
    assert record.is_patched(first.model.layers[0].mlp)
    assert difference(run(first, packed(documents())), want) == 0
    packops.hf.revert(first)
    assert not any(record.is_patched(module) for module in (*first.modules(), *second.modules()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("path", ["self_attn", ""])
def test_copies_of_attention_have_a_configuration_of_their_own(family, path):
    texts, path = documents(), f"model.layers.1.{path}".rstrip(".")
    model = save(make(family), path)
    stock, layer = run(model, packed(texts)), model.get_submodule(path).copy
    config, before = getattr(layer, "self_attn", layer).config, model.config._attn_implementation
    packops.hf.apply(model, attention="packops_varlen")
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert getattr(layer, "self_attn", layer).config is config
    assert config._attn_implementation == before
    assert difference(run(model, packed(texts)), stock) < 1e-6


class Prompted(nn.Module):
    """As PEFT's adaption prompts: the attention layer is called, and its queries are turned once more."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.gate = layer, nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        output, weights = self.layer(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
        return output + self.gate * (cos[..., :8].sum(-1) + sin[..., 7])[..., None], weights


def test_a_layer_in_a_wrapper_that_reads_tables():
    """Before apply the tables stay the model's; afterwards it is refused."""
    texts, path = documents(), "model.layers.0.self_attn"

    def wrap(model):
        model.set_submodule(path, Prompted(model.get_submodule(path)))
        return model

    model = packops.hf.apply(wrap(make("llama")))
    assert difference(run(model, packed(texts)), run(wrap(make("llama")), packed(texts))) < 1e-5
    assert packops.hf.report(model).replaced["tables"].startswith("the model's own")
    model = wrap(packops.hf.apply(make("llama")))
    with pytest.raises(ValueError, match=f"{path} was replaced after packops.hf.apply, by a Prompted that reads other"):
        model(**packed(texts))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts)), run(wrap(make("llama")), packed(texts))) < 1e-5


# ---- what is replaced for all models of a process, afterwards --------------------------------------------------------------


def llama_module():
    from transformers.models.llama import modeling_llama

    return modeling_llama


def qwen3_module():
    from transformers.models.qwen3 import modeling_qwen3

    return modeling_qwen3


def doubled(stock):
    """As a monkey patch of transformers has it: the result of a ``forward``, or the first of its results, is another."""

    def forward(*args, **kwargs):
        found = stock(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    return forward


@pytest.mark.parametrize(
    "name",
    [
        "Attention.forward",
        "RMSNorm.forward",
        "MLP.forward",
        "DecoderLayer.forward",
        "RotaryEmbedding.forward",
        "apply_rotary_pos_emb",
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_class_does_after_apply_is_not_ignored(name, family, monkeypatch):
    """It is what a stock model would do from then on."""
    model, texts = packops.hf.apply(make(family)), documents()
    with_stock = run(model, packed(texts))
    module, prefix = (llama_module(), "Llama") if family == "llama" else (qwen3_module(), "Qwen3")
    path = name if name.startswith("apply") else f"{prefix}{name}"
    owner, attribute = (getattr(module, path.split(".")[0]), "forward") if "." in path else (module, path)
    monkeypatch.setattr(owner, attribute, doubled(getattr(owner, attribute)))
    refusal = rf"packops\.hf: [\w.]*{path} was replaced after packops\.hf\.apply, .*: call packops\.hf\.apply again"
    for call in (lambda: model(**packed(texts)), lambda: model.eval()(**packed(texts)), lambda: copy.deepcopy(model)):
        with pytest.raises(ValueError, match=refusal):
            call()
    wanted = run(make(family), packed(texts))
    assert difference(wanted, with_stock) > 1e-3
    if name in ("Attention.forward", "apply_rotary_pos_emb"):
        with pytest.raises(ValueError, match="cannot replace RoPE"):
            packops.hf.apply(model)
        packops.hf.apply(model, rope=False)
    else:
        packops.hf.apply(model)
    assert difference(run(model, packed(texts)), wanted) < 1e-5
    monkeypatch.undo()
    packops.hf.apply(packops.hf.revert(model))
    assert difference(run(model, packed(texts)), with_stock) == 0


def test_an_activation_of_all_models_that_is_replaced_after_apply(monkeypatch):
    model = packops.hf.apply(make("llama"))
    activation = type(model.model.layers[0].mlp.act_fn)
    monkeypatch.setattr(activation, "forward", doubled(activation.forward))
    with pytest.raises(ValueError, match=rf"{activation.__qualname__}\.forward was replaced after"):
        model(**packed(documents()))
    packops.hf.apply(model)
    assert difference(run(model, packed(documents())), run(make("llama"), packed(documents()))) < 1e-5


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_linear_layers_of_all_models(before, monkeypatch):
    model = make("llama")
    if before:
        monkeypatch.setattr(nn.Linear, "forward", doubled(nn.Linear.forward))
    packops.hf.apply(model)
    if not before:
        monkeypatch.setattr(nn.Linear, "forward", doubled(nn.Linear.forward))
    assert difference(run(model, packed(documents())), run(make("llama"), packed(documents()))) < 1e-5


@pytest.mark.parametrize("again", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", ["ForCausalLM", "DecoderLayer", "MLP", "RMSNorm", "RotaryEmbedding"])
def test_what_was_wrapped_around_a_class_is_called(name, again, monkeypatch):
    """Also by a model that is patched after another one of its family was."""
    cls, calls = getattr(qwen3_module(), f"Qwen3{name}"), []
    if again:
        packops.hf.apply(make("qwen3"))
    stock = cls.forward

    @functools.wraps(stock)
    def counted(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(cls, "forward", counted)
    texts, wanted = documents(), run(make("qwen3"), packed(documents()))
    once, model = len(calls), packops.hf.apply(make("qwen3"))
    calls.clear()  # apply asks some of them
    ours = run(model, packed(texts))
    assert len(calls) == once > 0
    assert difference(ours, wanted) < 1e-5


# ---- what is not known is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, reason",
    [
        (("NanoChat", {"head_dim": 8}), "turns heads in a way of its own"),
        (("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4}), "no layer of it calls apply_rotary_pos_emb"),
    ],
)
def test_unknown_families_are_refused(config, reason):
    prefix, options = config
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    config = getattr(transformers, f"{prefix}Config")(**({} if prefix == "GPT2" else base), **options)
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config)
    before = attributes(model)
    with pytest.raises(ValueError, match=reason) as caught:
        packops.hf.apply(model)
    assert "Llama, Mistral" in str(caught.value)
    assert "rope=False" in str(caught.value)
    assert same_attributes(before, attributes(model))
    packops.hf.apply(model, rope=False)
    assert "rope" not in packops.hf.report(model).replaced
    assert "do not cover" in repr(packops.hf.report(model))


def test_other_tasks_are_refused():
    config = make("llama").config
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification \('ForSequenceClassification'\): it does not score"):
        packops.hf.apply(model)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    with pytest.raises(ValueError, match="does not score each token's successor"):
        packops.hf.apply(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), rope=False)
    packops.hf.apply(model, cross_entropy=False)
    assert "rope" in packops.hf.report(model).replaced


def test_rewrite_refuses():
    class Closure(nn.Module):
        def forward(self):
            return super().forward()

    with pytest.raises(rewrite.CannotRewriteError, match="closure over __class__"):
        rewrite.build(Closure.forward, rewrite.parse(Closure.forward), {})
    with pytest.raises(rewrite.CannotRewriteError, match="not a Python function"):
        rewrite.parse(len)
    scope = {}
    exec("def forward(self): return 1", scope)
    with pytest.raises(rewrite.CannotRewriteError, match="source of forward is not installed"):
        rewrite.parse(scope["forward"])
    with pytest.raises(rewrite.CannotRewriteError, match="_forward_unimplemented is not a plain method"):
        rewrite.parse(nn.ModuleList.forward)

    class NotOutside(nn.Module):
        def by_name(function):
            return function

        @by_name
        def forward(self):
            return 1

        def private(self):
            return self.__private()

        def without(*everything):
            return everything

    with pytest.raises(rewrite.CannotRewriteError, match=r"cannot be defined outside of its class .*by_name"):
        rewrite.build(NotOutside.forward, rewrite.parse(NotOutside.forward), {})
    with pytest.raises(rewrite.CannotRewriteError, match="uses __private, a private name"):
        rewrite.build(NotOutside.private, rewrite.parse(NotOutside.private), {})
    with pytest.raises(rewrite.CannotRewriteError, match="without has no argument for its instance"):
        rewrite.self_name(rewrite.parse(NotOutside.without))


def test_a_rewritten_method_keeps_its_default_values():
    """Which its class may have made from names of its own, or from what has changed since; annotations may name nothing."""

    class Module(nn.Module):
        factor = 2

        def forward(self, x: OnlyForTypeCheckers, /, by=factor, *, plus=factor + 1):  # noqa: F821
            return x * by + plus

    rewritten = rewrite.build(Module.forward, rewrite.parse(Module.forward), {})
    assert rewrite.self_name(rewrite.parse(Module.forward)) == "self"
    assert rewritten(Module(), 5) == 13
    assert rewritten(Module(), 5, 1, plus=0) == 5


def test_what_was_wrapped_around_a_class_is_not_dropped(monkeypatch):
    """By another library, of the class: attention is refused."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    stock = LlamaAttention.forward

    @functools.wraps(stock)
    def doubled(*arguments, **keywords):
        attended, *others = stock(*arguments, **keywords)
        return 2 * attended, *others

    monkeypatch.setattr(LlamaAttention, "forward", doubled)
    with pytest.raises(ValueError, match=r"cannot replace RoPE .*LlamaAttention.forward was wrapped since it was defined"):
        packops.hf.apply(make("llama"))


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="reduction must be one of 'mean', 'seq-mean-token-mean', 'seq-mean-token-sum', got 'sum'"
    ):
        packops.hf.apply(make("llama"), reduction="sum")
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        packops.hf.CausalLMLoss()(torch.zeros(1, 2, 3), None)


# ---- versions -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def version(monkeypatch):
    def pretend(value):
        monkeypatch.setattr(families.importlib.metadata, "version", lambda name: value)
        families.require_transformers.cache_clear()

    yield pretend
    families.require_transformers.cache_clear()


def test_versions_of_transformers(version, monkeypatch):
    model = make("llama")
    for other in ("4.57.1", "6.0.0.dev0", "5.99.0"):
        version(other)
        with pytest.warns(UserWarning, match=rf"tested with transformers 5\.\d+ to 5\.\d+, found {other}") as caught:
            packops.hf.revert(packops.hf.apply(model))
    version("5.23.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packops.hf.revert(packops.hf.apply(model))
    version("5.99.0")
    with pytest.warns(UserWarning, match="tested with transformers") as caught:
        packops.hf.apply(model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packops.hf.apply(model)  # once is enough
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: None)
    families.require_transformers.cache_clear()
    with pytest.raises(ImportError, match=r"not installed: pip install '.*\[hf\]'"):
        packops.hf.report(model)


def test_import_is_light():
    """No transformers, and not a word."""
    code = "import sys, packops.hf; assert 'transformers' not in sys.modules; import packops; packops.hf.apply"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_apply_is_silent(capfd):
    model = packops.hf.apply(make("llama"))
    run(model, packed(documents()))
    packops.hf.revert(model)
    assert capfd.readouterr() == ("", "")
