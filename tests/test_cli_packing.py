"""``packops pack`` and ``packops verify`` as a user meets them: files in, tables, JSON, pictures and exit statuses out."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from packops import cli_pack, cli_verify


def command(module, *argv):
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    name = module.__name__.rpartition("_")[2]
    return module.main(parser.parse_args([name, *map(str, argv)]))


LENGTHS = [6, 5, 3, 0, 2, 4]


@pytest.fixture(params=["npy", "txt", "jsonl numbers", "jsonl lists", "jsonl column", "jsonl text"])
def source(request, tmp_path):
    kind, _, form = request.param.partition(" ")
    path, options = tmp_path / f"lengths.{kind}", []
    if kind == "npy":
        np.save(path, np.array(LENGTHS, np.int32))
    elif kind == "txt":
        path.write_text("".join(f"{n}\n" for n in LENGTHS) + "\n")
    else:
        values = {"numbers": LENGTHS, "lists": [[7] * n for n in LENGTHS]}.get(form)
        if form == "column":
            values, options = [{"id": "x", "input_ids": [7] * n} for n in LENGTHS], ["--column", "input_ids"]
        if form == "text":
            tokenizers = pytest.importorskip("tokenizers")
            words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
            words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            words.save(str(tmp_path / "tokenizer.json"))
            values = [{"text": "word " * n} for n in LENGTHS]
            options = ["--column", "text", "--tokenizer", tmp_path / "tokenizer.json"]
        path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path, options


def test_pack_reads_every_form(source, capsys):
    path, options = source
    assert command(cli_pack, path, "--max-length", 10, "--strategy", "bfd", *options) == 0
    out = capsys.readouterr().out
    assert "6 documents, 20 tokens: mean 3, median 3, 95 % below 5, longest 6" in out
    assert "bfd" in out
    assert "100.00 %" in out
    assert "1 empty documents are in no pack" in out


def test_pack_writes_what_it_is_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    np.save(tmp_path / "l.npy", lengths)
    files = {name: tmp_path / name for name in ("out.json", "out.png", "out.npz")}
    assert (
        command(cli_pack, tmp_path / "l.npy", "--max-length", 256, "--json", files["out.json"], "--picture", files["out.png"])
        == 0
    )
    table = capsys.readouterr().out
    data = json.loads(files["out.json"].read_text())
    assert [plan["strategy"] for plan in data["plans"]] == ["best_fit", "bfd", "ffd", "next_fit", "sequential", "wrapped"]
    for plan in data["plans"]:
        assert sum(plan["packs_by_documents"]) == sum(plan["packs_by_fill"]) == plan["num_packs"]
        assert f"{plan['num_packs']:,}" in table
    assert 0.3 < data["padded_efficiency"] < 0.9
    assert files["out.png"].read_bytes()[:4] == b"\x89PNG"
    assert command(cli_pack, tmp_path / "l.npy", "--max-length", 256, "--strategy", "best_fit", "--plan", files["out.npz"]) == 0
    plan = np.load(files["out.npz"])
    assert np.array_equal(np.sort(plan["indices"]), np.arange(3000))
    assert np.array_equal(plan["lengths"], lengths[plan["indices"]])


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("l.txt", "3\nx4\n", [], r"line 2: want an integer, got 'x4'"),
        ("l.jsonl", "{", [], r"line 1: want JSON, got '{'"),
        ("l.jsonl", '{"text": "a"}', [], r"line 1: --column must name one of the fields 'text'"),
        ("l.jsonl", '{"text": "a"}', ["--column", "ids"], r"--column must name one of the fields 'text', got 'ids'"),
        ("l.jsonl", '"some text"', [], r"line 1: text needs --tokenizer to be counted in tokens"),
        ("l.jsonl", "1.5", [], r"line 1: want a length, a list of token ids or text, got float"),
        ("l.csv", "3", [], r"LENGTHS must end in .npy, .txt or .jsonl"),
        (
            "l.txt",
            "3\n5000",
            [],
            r"lengths[1] = 5000 is longer than max_length = 4096; --overlong truncate, split or drop accepts it",
        ),
        ("l.txt", "3", ["--plan", "p.npz"], r"--plan wants one --strategy"),
    ],
)
def test_pack_names_what_is_wrong(tmp_path, capsys, name, content, options, message):
    (tmp_path / name).write_text(content)
    assert command(cli_pack, tmp_path / name, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("packops pack: ")
    assert message in error
    assert command(cli_pack, tmp_path / "nowhere.txt") == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_verify_says_yes(model, tmp_path, capsys):
    assert command(cli_verify, model, "--device", "cpu", "--json", tmp_path / "r.json") == 0
    assert "packed EQUALS one by one: 8 documents" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"] is True
    assert len(report["leaks"]) == 8
    assert command(cli_verify, model, "--device", "cpu", "--random-weights", "--attention", "eager", "--no-gradients") == 0


def test_verify_says_no(model, capsys):
    """transformers' own loss is a mean over tokens, whatever else is asked for."""
    assert command(cli_verify, model, "--device", "cpu", "--reduction", "seq-mean-token-mean") == 1
    assert "DOES NOT EQUAL" in capsys.readouterr().out


def test_verify_could_not_tell(model, tmp_path, capsys):
    assert command(cli_verify, tmp_path / "nowhere", "--device", "cpu") == 2
    (tmp_path / "d.jsonl").write_text('[1, 2]\n{"input_ids": [3, "x"]}\n')
    assert command(cli_verify, model, "--device", "cpu", "--documents", tmp_path / "d.jsonl") == 2
    assert "line 2: want a list of token ids" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text('[1, 2, 3]\n{"input_ids": [3, 4, 5, 6]}\n')
    assert command(cli_verify, model, "--device", "cpu", "--documents", tmp_path / "d.jsonl") == 0
