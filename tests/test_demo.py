"""The demo, in small: packed with packops is padded training to fp32 rounding, packed carelessly is not."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for _package in ("matplotlib", "tokenizers", "tqdm", "transformers"):
    pytest.importorskip(_package, reason="needs the demo extra")

import packops  # noqa: E402
from packops import cli, demo  # noqa: E402
from packops.demo import corpus, report, train, ways  # noqa: E402

SIZES = {
    "steps": 6, "documents_per_step": 7, "padded_batch": 3, "pack_length": 96, "max_tokens": 64, "vocab_size": 300,
    "hidden_size": 32, "layers": 2, "heads": 4, "held_out": 5, "checkpoints": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def text():
    """Documents of 2 to 64 tokens from a few numbers; documents of equal length, and one that fills most of a pack, included."""
    rng = np.random.default_rng(3)
    lengths = [2, 3, 64, 64, 17, 2, 31, *rng.integers(2, 65, 40)]
    documents = [rng.integers(0, 300, n) for n in lengths]
    return corpus.Corpus(documents[:-5], documents[-5:], 300, "numbers")


@pytest.fixture(scope="module")
def results():
    return {}


@pytest.fixture
def result(device, text, results):
    if device not in results:
        results[device] = train.train(train.Settings(device=device, **SIZES), text)
    return results[device]


def test_packops_trains_as_padded_does_and_careless_does_not(result):
    assert result.weight_change() > 1e-3
    assert max(result.runs["packops"].distances) < 5e-6
    for series in ("losses", "held_out"):
        assert result.loss_difference("packops", series) < 5e-6
    assert result.runs["careless"].distances[-1] > 1e-3
    assert result.loss_difference("careless", "losses") > 1e-2
    assert result.loss_difference("careless") > 1e-3


def test_every_run_starts_from_the_same_weights(result):
    assert len({run.held_out[0] for run in result.runs.values()}) == 1
    assert result.checkpoints == [0, 2, 4, 6]
    assert all(len(run.held_out) == 4 and len(run.losses) == 6 and run.seconds > 0 for run in result.runs.values())


def test_useful_share(result, text):
    steps = train.steps_of(text.training, result.settings)
    useful = sum(len(document) for step in steps for document in step)
    grid = sum(len(step[i : i + 3]) * max(map(len, step[i : i + 3])) for step in steps for i in range(0, 7, 3))
    assert result.useful_tokens == useful < grid
    assert {name: run.tokens for name, run in result.runs.items()} == {"padded": grid, "careless": useful, "packops": useful}


def documents_of(batch):
    """The documents a batch holds."""
    if isinstance(batch, ways.PaddedBatch):
        return [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return [tuple(part.tolist()) for part in batch.input_ids[0].split(batch.lengths)]


def test_the_same_documents_in_every_step(device, text):
    settings = train.Settings(device=device, **SIZES)
    runs = train.build_runs(settings, 300)
    for number, step in enumerate(train.steps_of(text.training, settings)):
        expected = sorted(tuple(document.tolist()) for document in step)
        for run in runs.values():
            batches = run.way.batches(step, number)
            assert sorted(document for batch in batches for document in documents_of(batch)) == expected
            assert sum(batch.input_ids.numel() for batch in batches) >= sum(map(len, expected))
            assert all(getattr(batch, "packs_in_step", len(batches)) == len(batches) for batch in batches)


def test_every_document_once_before_any_comes_again(text):
    settings = train.Settings(**SIZES | {"steps": 12})
    seen = [id(document) for step in train.steps_of(text.training, settings) for document in step]
    assert sorted(seen[:42]) == sorted(map(id, text.training))
    assert sorted(seen[42:]) == sorted(seen[:42])
    assert seen[42:] != seen[:42]


@pytest.mark.parametrize("name", ["padded", "packops"])
def test_loss_is_the_mean_over_documents_of_each_ones_mean(device, text, name):
    """Against each document alone, in fp64: the loss and every gradient."""
    settings = train.Settings(device=device, **SIZES)
    run = train.build_runs(settings, 300)[name]
    documents = text.training[:7]
    loss, _ = train.gradients(run, documents, 0)
    alone = train.build_model(settings, 300).double()
    total = 0.0
    for document in documents:
        ids = torch.from_numpy(document).to(device)
        logits = alone(input_ids=ids[None]).logits[0]
        each = F.cross_entropy(logits[:-1], ids[1:]) / len(documents)
        each.backward()
        total += each.item()
    assert loss.item() == pytest.approx(total, rel=2e-6)
    for (weight, parameter), expected in zip(run.model.named_parameters(), alone.parameters(), strict=True):
        scale = expected.grad.abs().max()
        assert (parameter.grad - expected.grad).abs().max() < 2e-5 * scale, weight


def test_no_document_sees_another(device, text):
    settings = train.Settings(device=device, **SIZES)
    runs = train.build_runs(settings, 300)
    pack = ways.make_packs(text.training[:7], 96, seed=0, step=0, device=device)[0]
    assert len(pack.lengths) > 1
    other = copy.copy(pack)
    changed = pack.input_ids.clone()
    changed[0, : pack.lengths[0]] = (changed[0, : pack.lengths[0]] + 7) % 300
    object.__setattr__(other, "input_ids", changed)
    rest = slice(pack.lengths[0], None)

    def logits(name, batch):
        model = runs[name].model
        extra = {"position_ids": batch.position_ids, "pack": batch} if name == "packops" else {}
        return model(input_ids=batch.input_ids, **extra).logits[0, rest]

    assert torch.equal(logits("packops", pack), logits("packops", other))
    assert not torch.allclose(logits("careless", pack), logits("careless", other), atol=1e-3)


def test_both_forms_of_document_attention_agree(device, text):
    documents = [document for document in text.training[:7] if len(document) < 64]
    (pack,) = ways.make_packs(documents, 96, seed=0, step=1, device=device)
    assert len(set(pack.lengths)) > 2
    tokens = pack.input_ids.shape[1]
    outputs = []
    for attend in (ways.attend_each, ways.attend_grid):
        torch.manual_seed(5)
        heads = [torch.randn(1, tokens, n, 8, device=device).transpose(1, 2).requires_grad_() for n in (4, 2, 2)]
        output = attend(*heads, pack, 0.25)
        gradients = torch.autograd.grad(output, heads, torch.randn(output.shape, device=device))
        outputs.append([output, *gradients])
    for each, grid in zip(*outputs, strict=True):
        torch.testing.assert_close(each, grid, rtol=1e-5, atol=2e-6)


def test_positions_restart_in_every_document(device, text, monkeypatch):
    """Scores depend on differences of positions alone, so no loss would tell; angles do."""
    run = train.build_runs(train.Settings(device=device, **SIZES), 300)["packops"]
    seen, apply_rope = [], packops.apply_rope
    monkeypatch.setattr(
        packops, "apply_rope", lambda q, k, cos, sin, **rest: seen.append(sin) or apply_rope(q, k, cos, sin, **rest)
    )
    for pack in run.way.batches(text.training[:7], 0):
        seen.clear()
        run.way.loss(run.model, pack)
        assert len(seen) == SIZES["layers"]
        starts = (seen[0][0] == 0).all(-1).nonzero()[:, 0]
        assert starts.tolist() == pack.cu_seqlens[:-1].tolist()


def test_rotation_is_restored(device, text):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    run = train.build_runs(train.Settings(device=device, **SIZES), 300)["packops"]
    train.gradients(run, text.training[:3], 0)
    assert modeling_llama.apply_rotary_pos_emb is original


def test_corpus_is_real_text_in_a_fixed_order(monkeypatch):
    found = corpus.read_documents(("networkx",))
    monkeypatch.setattr(corpus, "read_documents", lambda packages: list(found))
    sizes = {"vocab_size": 400, "max_tokens": 50, "num_training": 30, "num_held_out": 10, "packages": ("networkx",)}
    first, again, other = (corpus.load(**sizes, seed=seed) for seed in (0, 0, 1))
    assert len(first.training) == 30
    assert len(first.held_out) == 10
    assert first.vocab_size == 400
    for one, two in zip(first.training + first.held_out, again.training + again.held_out, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first.training, other.training, strict=True))
    lengths = [len(document) for document in first.training]
    assert max(lengths) == 50
    assert min(lengths) < 40
    assert all(document[-1] == 0 for document in first.training if len(document) < 50)
    assert not {tuple(a) for a in first.held_out} & {tuple(a) for a in first.training}
    assert first.description.startswith(f"{len(found)} docstrings of networkx")
    assert len(found) > 500


def test_documents_are_clean_and_distinct(tmp_path, monkeypatch):
    package = tmp_path / "demo_text"
    (package / "tests").mkdir(parents=True)
    long = "Long enough to be a document of the corpus. "
    (package / "__init__.py").write_text(
        f'"""{long} One.   \n\n   Two.\n"""\ndef f():\n    "too short"\ndef g():\n    "{long}B"\n'
    )
    (package / "a.py").write_text(f'class C:\n    """{long}C"""\n    def m(self):\n        """{long}B"""\n')
    (package / "broken.py").write_text("def (:\n")
    (package / "tests" / "test_a.py").write_text(f'"""{long}Test"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert corpus.read_documents(("demo_text",)) == [f"{long} One.\n\n   Two.".replace("   Two", "Two"), f"{long}B", f"{long}C"]
    with pytest.raises(ModuleNotFoundError, match="not_a_package, which is not installed"):
        corpus.read_documents(("not_a_package",))


def test_report(result, tmp_path):
    picture, data = report.write(result, tmp_path / "new" / "folder")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    shown = json.loads(data.read_text())
    assert shown == json.loads(json.dumps(report.figures(result)))
    assert shown["runs"]["packops"]["largest_weight_difference"] == result.runs["packops"].distances
    table = report.table(result)
    for run in result.runs.values():
        assert f"{run.held_out[-1]:.6f}" in table
        assert f"{result.useful_tokens / run.seconds:,.0f}" in table
    assert len({len(line) for line in table.splitlines()[1:9]}) == 1


def test_command(monkeypatch, capsys, tmp_path, text):
    small = train.Settings(**SIZES | {"steps": 2})
    asked = {}

    def for_device(device, *, steps, seed):
        asked.update(device=device, steps=steps, seed=seed)
        return small

    monkeypatch.setattr(train.Settings, "for_device", for_device)
    monkeypatch.setattr(corpus, "load", lambda **sizes: text)
    assert cli.main(["demo", "--device", "cpu", "--steps", "2", "--seed", "4", "--out", str(tmp_path)]) == 0
    assert asked == {"device": torch.device("cpu"), "steps": 2, "seed": 4}
    shown = capsys.readouterr().out
    assert "largest weight difference" in shown
    assert f"wrote {tmp_path / 'demo.png'}" in shown


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "REQUIRED", ("tqdm", "surely_not_installed"))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "needs surely_not_installed: pip install '.[demo]'" in capsys.readouterr().err


def test_bad_arguments_end_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, "run", lambda settings: pytest.fail("it was trained"))
    for steps in ("0", "-3"):
        with pytest.raises(SystemExit):
            cli.main(["demo", f"--steps={steps}"])
        assert f"must be an integer from 1 to 2^31 - 1, got {steps}" in capsys.readouterr().err.splitlines()[-1]
    for seed in ("-1", str(2**64), "x"):
        with pytest.raises(SystemExit):
            cli.main(["demo", f"--seed={seed}"])
        assert f"must be an integer from 0 to 2^64 - 1, got {seed}" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "file").touch()
    for out, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "folder", "Not a directory")):
        assert cli.main(["demo", "--device", "cpu", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"packops demo: --out {out}: no folder can be made there ({why})\n"
    with monkeypatch.context() as changed:
        changed.setattr(os, "access", lambda path, mode: path != tmp_path)  # chmod does not stop root
        assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"packops demo: --out {tmp_path}: the folder cannot be written\n"
    assert cli.main(["demo", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("packops demo: --device: there is no cuda:99 here")


@pytest.mark.parametrize("documents", [0, -3])
def test_documents_must_be_positive(documents):
    """The examples hand on what they are given, and -3 would be all but three."""
    with pytest.raises(ValueError, match=f"documents to train on must be positive, got {documents}"):
        corpus.load(vocab_size=400, max_tokens=50, num_training=documents, num_held_out=0, seed=0)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_must_be_positive(steps):
    with pytest.raises(ValueError, match=f"steps must be positive, got {steps}"):
        train.Settings.for_device("cpu", steps=steps)


def test_example_learns():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "examples" / "plain_loop.py"
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(steps=12, documents_per_step=8)
    assert losses[0] > 4
    assert losses[-1] < 0.7 * losses[0]
