"""``packops bench attention`` runs, counts its arithmetic, and marks what is wrong. No time is asserted."""

import argparse
import importlib
import json
import types

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import command
import measuring
import packops
from bench_runs import run
from corpora import draw_lengths
from packops import reference
from packops.ops.attention_paths import attend_flex

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench():
    return importlib.import_module("attention")


TINY = ("--shape", "4", "2", "16", "--tokens", "150")


def test_it_runs(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, data = run(bench, tmp_path, *TINY)
    text = capsys.readouterr().out
    assert code == 0
    assert [case["name"] for case in data["cases"]] == [
        f"{work}, {documents}, 150 x 4/2 x 16 fp32"
        for documents in ("2 short documents", "2 mixed documents", "1 long document")
        for work in ("forward", "forward + backward")
    ]
    for case in data["cases"]:
        assert [row["system"] for row in case["rows"]] == ["copy", "packops", "SDPA"]
        assert not case["absent"]
        assert not any(row.get("wrong") for row in case["rows"])
        assert all(row["microseconds"] > 0 for row in case["rows"])
        assert "flops" not in case["rows"][0]
    forward, both = ({row["flops"] for row in case["rows"][1:]} for case in data["cases"][4:])
    assert forward == {4 * 4 * 16 * 150 * 151 // 2}
    assert both == {14 * 4 * 16 * 150 * 151 // 2}
    assert [case["rows"][1]["bytes"] for case in data["cases"][4:]] == [150 * 12 * 16 * 4, 3 * 150 * 12 * 16 * 4]
    assert text.count("FLOP/s") == 12
    assert (tmp_path / "result.png").stat().st_size > 10_000


def test_what_it_measures_by_default(bench, monkeypatch):
    """The cases of both devices, without their tensors."""
    monkeypatch.setattr(bench.Problem, "__post_init__", lambda self: setattr(self, "count", 1))
    monkeypatch.setattr(bench, "ours", lambda problem, gradient: {})
    monkeypatch.setattr(bench, "peer_candidates", lambda problem, wanted, gradient: {})
    parser = command.add_arguments(argparse.ArgumentParser(), bench.PEERS)
    bench.extend(parser)

    def names(*arguments):
        return [case.name for case in bench.cases(parser.parse_args(arguments))]

    assert names("--device", "cpu") == [
        f"{work}, {documents}, 512 x 4/2 x 64 fp32"
        for documents in ("5 short documents", "4 mixed documents", "1 long document")
        for work in ("forward", "forward + backward")
    ]
    on_cuda = names("--device", "cuda")
    assert on_cuda == [
        f"{work}, {documents}, 16384 x {shape}"
        for shape in ("32/8 x 64 bf16", "16/8 x 128 bf16", "8/4 x 256 bf16", "8/4 x 256 bf16, softcap 50")
        for documents in ("118 short documents", "65 mixed documents", "3 long documents")
        for work in ("forward", "forward + backward")
    ]
    assert names("--device", "cuda", "--quick") == on_cuda[:6]
    several = names("--device", "cuda", "--quick", "--corpora", "mixed", "--tokens", "8192", "131072")
    assert [name.split(", ")[2] for name in several] == [
        f"{tokens} x 32/8 x 64 bf16" for tokens in (8192, 131072) for _ in range(2)
    ]


@pytest.mark.parametrize("name", ["short", "long"])
@pytest.mark.parametrize("tokens", [512, 16384])
def test_lengths_are_those_of_the_corpus_and_the_rest(bench, name, tokens):
    lengths = bench.document_lengths(name, tokens)
    corpus = json.loads(bench.LENGTHS.read_text())[name]
    drawn = draw_lengths(corpus, tokens, np.random.default_rng(0))
    assert lengths[: len(drawn)] == drawn
    assert sum(lengths) == tokens
    assert min(lengths) > 0
    assert len(lengths) <= len(drawn) + 1


def problem_of(bench, lengths=(70, 3, 64, 1, 90), shape=(4, 2, 16), softcap=None, dtype="fp32"):
    return bench.Problem(list(lengths), *shape, softcap, dtype, "cpu")


def test_flops(bench):
    """Of the forward as torch counts them where every query meets just the keys that it sees; all by hand."""
    problem = problem_of(bench, (3, 1), (2, 1, 8))
    with FlopCounterMode(display=False) as counter:
        for begin, length in ((0, 3), (3, 1)):
            for head in range(2):
                for i in range(begin, begin + length):
                    q, k, v = problem.q[0][i : i + 1, head], problem.k[0][begin : i + 1, 0], problem.v[0][begin : i + 1, 0]
                    (q @ k.t()).softmax(-1) @ v
    assert bench.pairs([3, 1]) == 7
    assert problem.flops() == counter.get_total_flops() == 2 * 2 * 2 * 8 * 7
    assert problem.flops(gradient=True) == 3.5 * problem.flops()


def test_reference_is_that_of_all_tokens_at_once(bench, monkeypatch):
    monkeypatch.setattr(bench, "CHECK_TOKENS", 75)
    problem = problem_of(bench, softcap=5.0)
    assert [(part.start, part.stop, bounds.tolist()) for part, bounds in problem.pieces()] == [
        (0, 73, [0, 70, 73]),
        (73, 138, [0, 64, 65]),
        (138, 228, [0, 90]),
    ]
    leaves = [x[0].double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    result = reference.attention(*leaves, problem.documents.cu_seqlens, softcap=5.0)
    gradients = torch.autograd.grad(result, leaves, problem.gradients[0].double())
    for found, wanted in zip(problem.reference, (result.detach(), *gradients), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_what_is_right_passes(bench, dtype, softcap):
    problem = problem_of(bench, softcap=softcap, dtype=dtype)
    for gradient in (False, True):
        candidates = bench.ours(problem, gradient) | bench.peer_candidates(problem, {"SDPA": None}, gradient)
        assert list(candidates) == ["packops", "SDPA"]
        for make in candidates.values():
            candidate = make()
            result = candidate.call(0)
            assert len(result) == (4 if gradient else 1)
            assert candidate.check(result) == ""


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_computes_the_same(bench):
    """Its result; it has no backward on the CPU."""
    problem = problem_of(bench, softcap=50.0)
    candidate = problem.candidate(lambda q, k, v: attend_flex(q, k, v, problem.documents, problem.rule))
    assert candidate.check(candidate.call(0)) == ""


def attend(q, k, v, problem, **changed):
    options = {"cu_seqlens": problem.documents.cu_seqlens, "softcap": problem.softcap} | changed
    return packops.attention(q, k, v, **options)


def last_zero(q, k, v, p):
    out = attend(q, k, v, p)
    return torch.cat([out[:-1], torch.zeros_like(out[-1:])])


MISTAKES = {
    "documents see each other": (lambda q, k, v, p: attend(q, k, v, p, cu_seqlens=torch.tensor([0, p.tokens])), "result"),
    "one boundary is a token late": (
        lambda q, k, v, p: attend(q, k, v, p, cu_seqlens=torch.tensor([0, 70, 73, 138, 138, 228])),
        "result",
    ),
    "later tokens are seen": (lambda q, k, v, p: attend(q, k, v, p, causal=False), "result"),
    "no softcap": (lambda q, k, v, p: attend(q, k, v, p, softcap=None), "result"),
    "a window": (lambda q, k, v, p: attend(q, k, v, p, window=60), "result"),
    "heads meet others' keys": (lambda q, k, v, p: attend(q, k.flip(1), v, p), "result"),
    "the last token is forgotten": (last_zero, "result"),
    "not a number": (lambda q, k, v, p: attend(q, k, v, p) * float("nan"), "result"),
    "gradient of q": (lambda q, k, v, p: attend(1.1 * q - 0.1 * q.detach(), k, v, p), "gradient of q"),
    "gradient of k": (lambda q, k, v, p: attend(q, 1.1 * k - 0.1 * k.detach(), v, p), "gradient of k"),
    "gradient of v": (lambda q, k, v, p: attend(q, k, v.detach() + 0 * v, p), "gradient of v"),
    "shape": (lambda q, k, v, p: attend(q, k, v, p).transpose(0, 1), "result of shape (4, 228, 16)"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(bench, mistake, dtype):
    wrong, message = MISTAKES[mistake]
    gradient = message.startswith("gradient")
    problem = problem_of(bench, softcap=20.0, dtype=dtype)
    candidate = problem.candidate(lambda q, k, v: wrong(q, k, v, problem), gradient)
    assert candidate.check(candidate.call(0)).startswith(f"{message} wrong in" if message in bench.RESULTS else message)


def test_a_wrong_result_of_ours_fails_the_benchmark(bench, tmp_path, monkeypatch, capsys):
    right = packops.attention
    monkeypatch.setattr(packops, "attention", lambda q, k, v, *rest, **options: right(q, k, 1.1 * v, *rest, **options))
    code, data = run(bench, tmp_path, *TINY, "--corpora", "short")
    assert code == 1
    assert "wrong results:\n  packops, forward, 2 short documents" in capsys.readouterr().out
    for case in data["cases"]:
        rows = {row["system"]: row for row in case["rows"]}
        assert rows["packops"]["wrong"].startswith("result wrong in 100 % of blocks, off by up to 10 %")
        assert "wrong" not in rows["SDPA"]


def test_varlen_is_left_out_of_a_softcap_and_named(bench):
    problem = problem_of(bench, softcap=50.0)
    candidates = bench.ours(problem, False) | bench.peer_candidates(problem, bench.PEERS, False)
    del candidates[bench.FLEX], candidates[bench.FA4]
    result = measuring.measure(measuring.Case("a case", candidates), "cpu", rounds=1, seconds=0)
    assert result["absent"] == {bench.VARLEN: "NotImplementedError: varlen_attn has no softcap"}
    assert [row["system"] for row in result["rows"]] == ["packops", "SDPA"]


def test_peers_of_each_device(bench):
    problem = problem_of(bench)
    flash = [bench.FA4, bench.FA4_DETERMINISTIC]
    for device, gradient, expected in (
        ("cpu", True, [bench.SDPA]),
        ("cuda", False, [bench.FA4, bench.VARLEN, bench.FLEX]),
        ("cuda", True, [*flash, bench.VARLEN, bench.FLEX]),
    ):
        problem.device = device
        assert list(bench.peer_candidates(problem, command.chosen(bench.PEERS, "all", device), gradient)) == expected
    assert list(command.chosen(bench.PEERS, "FlashAttention-4", "cuda")) == flash


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_flash_attention_4_is_asked_for_the_same(bench, monkeypatch, softcap):
    """Its interface, by the reference: every document, causal, the softcap; deterministic only under that name."""
    problem = problem_of(bench, softcap=softcap)
    asked = []

    def attend(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softcap, deterministic):
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == 90
        asked.append(deterministic)
        return reference.attention(q, k, v, cu_seqlens_q, causal=causal, softcap=softcap or None), None

    monkeypatch.setattr(bench.peers, "flash_attention_4", lambda: types.SimpleNamespace(flash_attn_varlen_func=attend))
    for gradient in (False, True):
        candidates = bench.peer_candidates(problem, command.chosen(bench.PEERS, "FlashAttention-4", "cuda"), gradient)
        for make in candidates.values():
            candidate = make()
            assert candidate.check(candidate.call(0)) == ""
    assert asked == [False, False, True]


def test_a_softcap_wants_a_shape(bench, tmp_path):
    with pytest.raises(SystemExit, match="only with --shape"):
        run(bench, tmp_path, "--softcap", "50")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [(), ("--softcap", "50")], ids=["", "softcap"])
def test_on_a_gpu(bench, tmp_path, softcap):
    """All corpora with the peers that torch brings, whose results are right, too."""
    peers = ("--peers", f"{bench.VARLEN},{bench.FLEX}")
    code, data = run(bench, tmp_path, "--tokens", "4096", "--shape", "4", "2", "64", *peers, *softcap, device="cuda")
    assert code == 0
    assert len(data["cases"]) == 6
    for case in data["cases"]:
        rows = {row["system"]: row for row in case["rows"]}
        assert list(rows) == ["copy", "packops", *([] if softcap else [bench.VARLEN]), bench.FLEX]
        assert list(case["absent"]) == ([bench.VARLEN] if softcap else [])
        assert not any(row.get("wrong") for row in rows.values())
        assert rows["packops"]["peak_bytes"] > 0


def test_the_picture_has_times_over_those_of_packops(bench, tmp_path, monkeypatch):
    """Also where a peer ran in one of the two panels alone."""

    def case(work, **microseconds):
        facts = {"work": work, "documents": 3, "corpus": "long", "shape": "9 x 2/1 x 64", "softcap": None}
        return {"facts": facts, "rows": [{"system": name, "microseconds": value} for name, value in microseconds.items()]}

    figures = []
    monkeypatch.setattr(bench.reporting, "finish", lambda figure, data, path: figures.append(figure))
    cases = [
        case("forward", copy=1.0, packops=4.0, peer=6.0),
        case("forward + backward", copy=1.0, packops=8.0, peer=6.0, other=2.0),
    ]
    bench.draw({"cases": [*cases, {"facts": {}, "rows": []}]}, tmp_path / "x.png")
    panels = [{line.get_label(): list(line.get_xdata()) for line in axis.lines} for axis in figures[0].axes]
    assert panels == [{"peer": [1.5], "packops": [1, 1]}, {"peer": [0.75], "other": [0.25], "packops": [1, 1]}]
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["3 long documents, 9 x 2/1 x 64"]
    bench.reporting.pyplot().close(figures[0])
