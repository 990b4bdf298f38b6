"""``packops pack`` and ``packops verify`` as a user meets them: files in, tables, JSON, pictures and exit statuses out."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from packops import cli
from packops.cli import pack as cli_pack
from packops.cli import verify as cli_verify


def command(name, *argv):
    return cli.main([name, *map(str, argv)])


LENGTHS = [6, 5, 3, 0, 2, 4]


FORMS = [
    "npy",
    "txt",
    "txt.gz",
    "jsonl numbers",
    "jsonl lists",
    "jsonl input_ids",
    "jsonl column",
    "jsonl text",
    "jsonl.gz lists",
]
FORMS += ["csv alone", "csv column", "csv lists", "csv.gz column", "parquet lists", "parquet column", "parquet text"]


@pytest.fixture(params=FORMS)
def source(request, tmp_path):
    kind, _, form = request.param.partition(" ")
    path, options = tmp_path / f"lengths.{kind}", []
    if kind == "npy":
        np.save(path, np.array(LENGTHS, np.int32))
    elif kind.startswith("txt"):
        write(path, "".join(f"{n}\n" for n in LENGTHS) + "\n")
    elif kind.startswith("csv"):
        header = {"alone": "", "column": "id,size\n", "lists": '"input_ids","id"\n'}[form]
        row = {"alone": "{n}\n", "column": '"a, b",{n}\n', "lists": '"{ids}",7\n'}[form]
        write(path, header + "".join(row.format(n=n, ids=[7] * n) for n in LENGTHS))
        options = ["--column", "size"] if form == "column" else []
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {
            "lists": {"id": list("abcdef"), "input_ids": [[7] * n for n in LENGTHS]},
            "column": {"id": [9] * 6, "n": LENGTHS},
        }
        columns["text"] = {"text": ["word " * n for n in LENGTHS]}
        parquet.write_table(pyarrow.table(columns[form]), path, row_group_size=4)
        options = {"lists": [], "column": ["--column", "n"], "text": ["--tokenizer", words(tmp_path)]}[form]
    else:
        values = {"numbers": LENGTHS, "lists": [[7] * n for n in LENGTHS]}.get(form)
        if form == "input_ids":
            values = [{"id": "x", "input_ids": [7] * n} for n in LENGTHS]
        if form == "column":
            values, options = [{"input_ids": [], "ids": [7] * n} for n in LENGTHS], ["--column", "ids"]
        if form == "text":
            values, options = [{"text": "word " * n} for n in LENGTHS], ["--tokenizer", words(tmp_path)]
        write(path, "".join(json.dumps(v) + "\n" for v in values))
    return path, options


def write(path, text):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


def words(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_pack_reads_every_form(source, capsys):
    path, options = source
    assert command("pack", path, "--max-length", 10, "--strategy", "bfd", *options) == 0
    out = capsys.readouterr().out
    assert "6 documents, 20 tokens: mean 3, median 3, 95 % at most 6, longest 6" in out
    assert "bfd" in out
    assert "100.00 %" in out
    assert "1 empty document in no pack" in out


def test_pack_writes_what_it_is_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    np.save(tmp_path / "l.npy", lengths)
    files = {name: tmp_path / name for name in ("out.json", "out.png", "out.npz")}
    assert (
        command("pack", tmp_path / "l.npy", "--max-length", 256, "--json", files["out.json"], "--picture", files["out.png"]) == 0
    )
    table = capsys.readouterr().out
    data = json.loads(files["out.json"].read_text())
    assert [plan["strategy"] for plan in data["plans"]] == ["best_fit", "bfd", "ffd", "next_fit", "sequential", "wrapped"]
    for plan in data["plans"]:
        assert sum(plan["packs_by_documents"]) == sum(plan["packs_by_fill"]) == plan["num_packs"]
        assert f"{plan['num_packs']:,}" in table
    assert 0.3 < data["padded_efficiency"] < 0.9
    assert files["out.png"].read_bytes()[:4] == b"\x89PNG"
    assert command("pack", tmp_path / "l.npy", "--max-length", 256, "--strategy", "best_fit", "--plan", files["out.npz"]) == 0
    plan = np.load(files["out.npz"])
    assert np.array_equal(np.sort(plan["indices"]), np.arange(3000))
    assert np.array_equal(plan["lengths"], lengths[plan["indices"]])


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("l.txt", "3\nx4\n", [], r"line 2: want an integer, got 'x4'"),
        ("l.jsonl", "{", [], r"line 1: want JSON, got '{'"),
        ("l.jsonl", '{"text": "a", "b": 3}', [], r"line 1: --column must name one of the fields 'text', 'b'"),
        ("l.jsonl", '{"text": "a"}', ["--column", "ids"], r"--column must name one of the fields 'text', got 'ids'"),
        ("l.jsonl", '"some text"', [], r"line 1: text needs --tokenizer to be counted in tokens"),
        ("l.jsonl", "1.5", [], r"line 1: want a length, a list of token ids or text, got float"),
        ("l.xml", "3", [], r"LENGTHS must end in .npy, .txt, .jsonl, .csv, .parquet (.gz may follow those that are text)"),
        ("l.txt", "", [], r"l.txt is empty: want the length of at least one document"),
        ("l.jsonl", "\n\n", [], r"l.jsonl is empty"),
        ("l.csv", "input_ids,id\n", [], r"l.csv is empty"),
        ("l.txt", "3\n\n-4\n", [], r"line 3: a document has 0 to 2^31 - 1 tokens, got -4"),
        ("l.txt", "3\n1000000000000000000000\n", [], r"line 2: a document has 0 to 2^31 - 1 tokens, got 1000000000000000000000"),
        ("l.jsonl", "3\n2147483648\n", [], r"line 2: a document has 0 to 2^31 - 1 tokens, got 2147483648"),
        ("l.txt", "9" * 5000, [], r"line 1: want an integer, got '999"),
        ("l.jsonl", "[" * 100000, [], r"line 1: want JSON, got '[[["),
        ("l.jsonl", "true", [], r"line 1: want a length, a list of token ids or text, got bool"),
        ("l.csv", "size,id\n3,4\n", [], r"line 2: --column must name one of the fields 'size', 'id'"),
        ("l.csv", "size,id\n3\n", [], r"line 2: want 2 columns as in the header, got 1"),
        ("l.csv", "size,size\n3,4\n", ["--column", "size"], r"line 1: the header has 'size' twice"),
        ("l.csv", 'length\n"[4, 5]"\n', [], r"line 2: 'length' must hold a number of tokens, got a list"),
        ("l.jsonl", '{"length": [5]}', [], r"line 1: 'length' must hold a number of tokens, got a list"),
        ("l.jsonl", '{"input_ids": 5}', [], r"line 1: 'input_ids' must hold a list of token ids, got a number"),
        ("l.jsonl", '{"input_ids": [5]}\n{"id": 7}', [], r"line 2: --column must name one of the fields 'id', got 'input_ids'"),
        ("l.csv", "3\n4,5\n", [], r"line 2: want one column as in the rows before, got 2"),
        ("l.csv", 'length\n"three"\n', [], r"line 2: text needs --tokenizer"),
        ("l.csv", "5.0\n7\n", [], r"line 1: want a length, a list of token ids or text, got float"),
        ("l.csv", "3\nthree\n", [], r"line 2: want int as in the first row, got 'three'"),
        ("l.csv", '0\n"[4, 5]"\n', [], r"line 2: want int as in the first row, got '[4, 5]'"),
        (
            "l.jsonl",
            '[3]\n{"input_ids": [1, 2], "attention_mask": [1]}',
            [],
            r"attention_mask of {path}, line 2 must have one entry per token (2), got shape (1,)",
        ),
        ("l.txt.gz", "3\n", [], r"l.txt.gz, line 1 or later: Not a gzipped file"),
        ("l.npy", "3\n", [], r"l.npy: want an array as numpy.save writes it"),
        ("l.npy.gz", "3\n", [], r"l.npy.gz: .gz may follow the formats that are text, and npy is none; unpack it with gunzip"),
        ("l.parquet.gz", "3\n", [], r"text, and parquet is none"),
        ("l.npy", "3\n", ["--column", "a"], r"l.npy: npy holds nothing but lengths; --column and --tokenizer are for other"),
        ("l.txt", "3\n", ["--tokenizer", "a"], r"l.txt: txt holds nothing but lengths"),
        ("l.parquet", "3\n", [], r"l.parquet"),
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
    assert command("pack", tmp_path / name, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("packops pack: ")
    assert message.replace("{path}", str(tmp_path / name)) in error
    assert command("pack", tmp_path / "nowhere.txt") == 2


def test_pack_names_a_bad_element_of_an_array(tmp_path, capsys):
    for values, message in (([3, -1], "l.npy, element 1: a document has 0"), ([3.5], "l.npy: lengths must be integers")):
        np.save(tmp_path / "l.npy", np.array(values))
        assert command("pack", tmp_path / "l.npy") == 2
        assert message in capsys.readouterr().err


def test_pack_names_a_bad_row_of_a_parquet_file(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for values, message in (([3, 4, -1], "element 2: a document has 0"), ([3, None, 4], "row 1: 'length' is null")):
        parquet.write_table(pyarrow.table({"length": values, "id": values}), tmp_path / "l.parquet", row_group_size=2)
        assert command("pack", tmp_path / "l.parquet") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "values"), [("length", [[5], [7]]), ("input_ids", [5, 7])])
def test_pack_takes_no_parquet_lengths_for_tokens(tmp_path, name, values):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({name: values}), tmp_path / "l.parquet")
    with pytest.raises(TypeError, match=f"l.parquet: '{name}' must hold a"):
        cli_pack.read_lengths(tmp_path / "l.parquet")


@pytest.mark.parametrize("width", [None, 4], ids=["lists", "lists of one size"])
def test_pack_reads_tokens_and_masks_of_a_parquet_file_as_those_of_jsonl(tmp_path, width):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids, masks = [[1, 2, 3, 0], [0, 0, 7, 0], [4, 5, 6, 7]], [[1, 1, 1, 0], [0, 0, 1, 0], None]
    path, lines = tmp_path / "l.parquet", tmp_path / "l.jsonl"

    def lengths_of(**columns):
        kinds = {name: pyarrow.list_(pyarrow.int64(), width or -1) for name in columns}
        table = pyarrow.table({name: pyarrow.array(values, kinds[name]) for name, values in columns.items()})
        parquet.write_table(table, path, row_group_size=2)
        return cli_pack.read_lengths(path).tolist()

    lines.write_text("".join(json.dumps({"input_ids": i, "attention_mask": m}) + "\n" for i, m in zip(ids, masks, strict=True)))
    assert lengths_of(attention_mask=masks, input_ids=ids) == cli_pack.read_lengths(lines).tolist() == [3, 1, 4]
    assert lengths_of(input_ids=ids, other=masks[::-1]) == [4, 4, 4]
    for more in ({}, {"attention_mask": masks}):
        with pytest.raises(ValueError, match=r"l.parquet, row 2: 'input_ids' holds a null"):
            lengths_of(input_ids=[*ids[:2], [4, None, 6, 7]], **more)
    with pytest.raises(ValueError, match=r"attention_mask of .*l.parquet, row 2 must be 1 for its tokens"):
        lengths_of(input_ids=ids, attention_mask=[*masks[:2], [1, 0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "options"),
    [("3\n4\n5\n", []), ('{"input_ids": [1, 2, 3]}\n4\n[1, 2, 3, 4, 5]', []), ("n\n3\n4\n5\n", ["--format", "csv"])],
    ids=["numbers", "jsonl", "csv"],
)
def test_pack_reads_the_standard_input(tmp_path, monkeypatch, capsys, text, options):
    (tmp_path / "in").write_text(text)
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert command("pack", "-", *options) == 0
    assert "3 documents, 12 tokens" in capsys.readouterr().out


def test_pack_says_that_its_input_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    assert command("pack", "-") == 2
    assert "packops pack: the standard input is closed" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_pack_reads_files_that_are_piped(monkeypatch, form):
    file = io.BytesIO()
    if form == "npy":
        np.save(file, np.array([3, 4, 5]))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"length": [3, 4, 5]}), file)
    read, write = os.pipe()
    with open(write, "wb") as writer:
        writer.write(file.getvalue())
    with open(read) as reader:
        monkeypatch.setattr(sys, "stdin", reader)
        assert cli_pack.read_lengths(Path("-"), form=form).tolist() == [3, 4, 5]


def test_pack_says_what_it_wrote(tmp_path, capsys):
    (tmp_path / "l.txt").write_text("3\n4\n")
    plan, report = tmp_path / "plan", tmp_path / "r.json"
    assert command("pack", tmp_path / "l.txt", "--strategy", "bfd", "--plan", plan, "--json", report) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"wrote {report}", f"wrote {plan}"]
    assert np.load(plan)["lengths"].tolist() == [4, 3]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("pack l.txt --json ./l.txt", "lengths and json"),
        ("pack l.txt --strategy bfd --plan r --json r", "json and plan"),
        ("verify m --documents l.txt --json l.txt", "documents and json"),
    ],
)
def test_no_file_is_written_over_another_of_the_call(tmp_path, monkeypatch, capsys, words, names):
    monkeypatch.chdir(tmp_path)
    Path("l.txt").write_text("3\n")
    with pytest.raises(SystemExit, match="2"):
        command(*words.split())
    assert f"{names} are one file" in capsys.readouterr().err
    assert Path("l.txt").read_text() == "3\n"
    assert command("pack", "l.txt", "--strategy", "bfd", "--json", "/dev/null", "--plan", "/dev/null") == 0


@pytest.mark.parametrize("option", ["pack --json", "pack --picture", "pack --plan", "verify --json"])
def test_a_file_that_cannot_be_written_is_named_first(tmp_path, monkeypatch, capsys, option):
    for module in (cli_pack, cli_verify):
        monkeypatch.setattr(module, "run", lambda args: pytest.fail("it was computed"))
    name, option = option.split()
    protected = tmp_path / "protected"
    protected.mkdir()
    (tmp_path / "old").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (protected, tmp_path / "old"))  # chmod does not stop root
    for path, message in (
        (tmp_path / "nowhere" / "x", f"there is no folder {tmp_path / 'nowhere'}"),
        (tmp_path, f"{tmp_path} is a folder"),
        (protected / "x", f"{protected / 'x'} cannot be written"),
        (tmp_path / "old", f"{tmp_path / 'old'} cannot be written"),
    ):
        with pytest.raises(SystemExit) as end:
            command(name, "l.txt", option, path)
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith(f"packops {name}: error: argument {option}: {message}\n")


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf", "small"])
def test_a_tolerance_that_is_none_is_refused_first(monkeypatch, capsys, text):
    monkeypatch.setattr(cli_verify, "run", lambda args: pytest.fail("it was computed"))
    with pytest.raises(SystemExit) as end:
        command("verify", "model", "--tolerance", text)
    assert end.value.code == 2
    says = "invalid tolerance value" if text == "small" else "must be positive and finite, got"
    assert f"argument --tolerance: {says}" in capsys.readouterr().err


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
    assert command("verify", model, "--device", "cpu", "--json", tmp_path / "r.json") == 0
    shown = capsys.readouterr()
    assert "packed EQUALS one by one: 8 documents" in shown.out
    assert shown.out.endswith(f"wrote {tmp_path / 'r.json'}\n")
    assert "M parameters on cpu, 28 forward passes" in shown.err
    assert " s left after 3 of 28" in shown.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"] is True
    assert len(report["leaks"]) == 8
    assert command("verify", model, "--device", "cpu", "--random-weights", "--attention", "eager", "--no-gradients") == 0


def test_verify_knows_the_attention_of_packops(model, monkeypatch):
    from transformers import AttentionInterface

    monkeypatch.delitem(AttentionInterface._global_mapping, "packops_varlen", raising=False)
    assert command("verify", model, "--device", "cpu", "--attention", "packops_varlen") == 0


def test_verify_says_no(model, capsys):
    """transformers' own loss is a mean over tokens, whatever else is asked for."""
    assert command("verify", model, "--device", "cpu", "--reduction", "seq-mean-token-mean") == 1
    shown = capsys.readouterr().out
    assert "DOES NOT EQUAL" in shown
    assert "computes that after packops.hf.apply(model, reduction=...) (packops verify --apply)" in shown


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verify_applies_packops(model, monkeypatch, reduction):
    import packops.hf

    seen = []
    monkeypatch.setattr(cli_verify, "verify", lambda m, *rest, **options: seen.append(m) or packops.verify(m, *rest, **options))
    assert command("verify", model, "--device", "cpu", "--apply", "--reduction", reduction) == 0
    assert f"reduction {reduction!r}" in packops.hf.report(seen[0]).replaced["loss"]


def test_verify_could_not_tell(model, tmp_path, capsys):
    for name in (tmp_path / "nowhere", "./nowhere", "../no/where", "no/where/at all"):
        assert command("verify", name, "--device", "cpu") == 2
        assert f"MODEL: there is no folder {name}" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text('[1, 2]\n{"input_ids": [3, "x"]}\n')
    assert command("verify", model, "--device", "cpu", "--documents", tmp_path / "d.jsonl") == 2
    assert "line 2: want a list of token ids" in capsys.readouterr().err
    assert command("verify", model, "--device", "cpu", "--max-length", 89) == 2  # advice of another command is none
    assert "verify: max_length must be at least the longest document (90 tokens), got 89" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text('[1, 2, 3]\n{"input_ids": [3, 4, 5, 6]}\n')
    assert command("verify", model, "--device", "cpu", "--documents", tmp_path / "d.jsonl") == 0


def test_verify_counts_the_passes_that_it_announces(model, monkeypatch):
    """The time that it names is a share of them."""
    calls = []
    monkeypatch.setattr(cli_verify, "progress", lambda m, total, device: counting(m, total, calls))
    assert command("verify", model, "--device", "cpu", "--max-length", 100) == 0
    (total, done) = calls
    assert total == done > 28


@contextlib.contextmanager
def counting(model, total, calls):
    count = [0]
    hook = model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield
    hook.remove()
    calls += [total, count[0]]


def test_verify_checks_what_is_cheap_first(model, tmp_path, monkeypatch, capsys):
    import transformers

    def load(*args, **options):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert command("verify", model, "--device", "cuda:99") == 2
    assert "there is no cuda:99 here" in capsys.readouterr().err
    for text, message in (
        ("[1, 2]\n[3, 53]\n", "line 2: token id 53 is outside the model's vocabulary [0, 53)"),
        ("[1, -1]\n[3]\n", "line 1: token id -1 is outside"),
        ("[1, 2]\n\n", "want at least two documents with a token, got 1"),
        ("[1, 2]\n{", "line 2: want JSON, got '{'"),
    ):
        (tmp_path / "d.jsonl").write_text(text)
        assert command("verify", model, "--device", "cpu", "--documents", tmp_path / "d.jsonl") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError("x"), ZeroDivisionError()])
def test_a_crash_of_verify_does_not_look_like_a_difference(model, monkeypatch, capsys, error):
    def crash(*args, **options):
        raise error

    monkeypatch.setattr(cli_verify, "verify", crash)
    assert command("verify", model, "--device", "cpu") == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert f"packops verify: crashed: {error!r}" in shown


@pytest.mark.parametrize("name", ["lengths.txt", "lengths.parquet", "lengths"])
def test_a_file_that_is_not_there_is_named(tmp_path, capsys, name):
    """Before anything is said about its format or about a package that reads it."""
    assert command("pack", tmp_path / name) == 2
    assert capsys.readouterr().err == f"packops pack: {tmp_path / name}: there is no such file\n"


@pytest.mark.parametrize(
    "name, text, lengths",
    [
        ("a.csv", "\ufeff12\n30\n40\n", [12, 30, 40]),
        ("b.csv", "+12\n30\n40\n", [12, 30, 40]),
        ("c.csv", "\ufefflength,x\n12,a\n", [12]),
        ("d.txt", "\ufeff12\n30\n", [12, 30]),
        ("e.jsonl", '{"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}\n', [3]),
        ("f.csv", '"[1, 2, 3]"\n"[4, 5]"\n[]\n', [3, 2, 0]),
        ("g.csv", "length\n+12\n30\n", [12, 30]),
    ],
)
def test_files_of_other_programs(tmp_path, name, text, lengths):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert cli_pack.read_lengths(path).tolist() == lengths


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('{"messages": [{"role": "user"}]}', "dict"),
        ('{"input_ids": [[1, 2, 3]]}', "list"),
        ('{"input_ids": [1.5]}', "float"),
        ("[1, 0.0, 0.5]", "float"),
        ("[null, null, 5]", "NoneType"),
        ("[[], [1, 2, 3]]", "list"),
        ('["", "a"]', "str"),
        ("[false, true]", "bool"),
    ],
)
def test_lists_of_anything_else_are_no_token_ids(tmp_path, line, kind):
    path = tmp_path / "documents.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TypeError, match=f"want a list of token ids, got one of {kind}"):
        cli_pack.read_lengths(path)


def test_text_is_counted_whole(tmp_path):
    """A tokenizer.json may ask to truncate and to pad."""
    tokenizers = pytest.importorskip("tokenizers")
    loaded = tokenizers.Tokenizer.from_file(str(words(tmp_path)))
    loaded.enable_truncation(3)
    loaded.enable_padding(length=2)
    loaded.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "l.jsonl").write_text('{"text": "a a a a a"}\n{"text": "a"}\n')
    assert cli_pack.read_lengths(tmp_path / "l.jsonl", None, str(tmp_path / "tokenizer.json")).tolist() == [5, 1]


def test_a_tokenizer_that_is_none_is_named(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "t.json").write_text("3")
    (tmp_path / "l.jsonl").write_text('{"text": "a"}\n')
    assert command("pack", tmp_path / "l.jsonl", "--tokenizer", tmp_path / "t.json") == 2
    assert f"packops pack: --tokenizer {tmp_path / 't.json'}: " in capsys.readouterr().err


def test_text_that_looks_like_a_number_is_text(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_pack, "_load_tokenizer", lambda name: lambda text: len(text.split()))
    table = tmp_path / "table.csv"
    table.write_text('text\nhello there\n1984\n"[1, 2]"\n')
    assert cli_pack.read_lengths(table, tokenizer="any").tolist() == [2, 1, 2]
    table.write_text("1984\nhello there\n")
    with pytest.raises(ValueError, match="line 1: text for --tokenizer wants a header, got '1984'"):
        cli_pack.read_lengths(table, tokenizer="any")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": 1984}\n')
    with pytest.raises(TypeError, match="want text for --tokenizer, got the number 1984"):
        cli_pack.read_lengths(lines, tokenizer="any")
