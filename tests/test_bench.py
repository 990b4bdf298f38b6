"""The benchmarks run and mark what is wrong; statistics, tables and pictures say what was measured. No time is asserted."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import packops
from packops import cli
from packops.cli import bench as cli_bench

BENCH = Path(__file__).parents[1] / "bench"

import command  # noqa: E402
import measuring  # noqa: E402
import peers  # noqa: E402
import reporting  # noqa: E402
from measuring import Candidate, Case, Target  # noqa: E402


def load(stem):
    return importlib.import_module(stem)


def case_of(candidates, **options):
    return Case("a case", candidates, **options)


def row_of(case, system):
    return next(row for row in case["rows"] if row["system"] == system)


# ---- statistics ------------------------------------------------------------------------------------------------------------


def test_ratio_is_taken_within_rounds():
    """A slow second round slows both; the ratio of the medians would be 0.75, of the sums 0.67."""
    assert measuring.ratio([1, 20, 3], [2, 4, 30]) == 0.5


def test_summary_by_hand():
    targets = {"packops": [Target("copy", 2.0), Target("eager", 0.4), Target("us", 7), Target("absent", 1)]}
    case = case_of({}, bytes=600, targets=targets)
    rows = measuring.summary(case, {"copy": [1, 2, 3], "packops": [2, 6, 9], "eager": [4, 12, 90]})
    assert [row["microseconds"] for row in rows] == [2, 6, 12]
    assert rows[1]["spread"] == pytest.approx([2.8, 8.4])
    assert rows[1]["of"] == {"copy": 3.0}  # not of itself
    assert rows[2]["of"] == {"copy": 6.0, "packops": 2.0}
    found = [(t["against"], t["value"], t["met"]) for t in rows[1]["targets"]]
    assert found == [("copy", 3.0, False), ("eager", 0.5, False), ("us", 6, True)]
    assert reporting.speed_text(rows[1]) == "0.1 GB/s"  # 600 bytes in 6 us


def test_speed_in_flops():
    """Of those who do the arithmetic; a copy does none."""
    case = case_of({}, bytes=600, flops=24_000_000)
    rows = measuring.summary(case, {"copy": [2], "packops": [6], "eager": [9600]})
    assert [reporting.speed_text(row) for row in rows] == ["0.3 GB/s", "4.0 TFLOP/s", "2.5 GFLOP/s"]
    shown = reporting.format_case({"name": "work", "rows": rows, "absent": {}}).splitlines()
    assert [line.index("/s") for line in shown[1:]] == [shown[1].index("/s")] * 3  # one column
    (row,) = measuring.summary(case_of({}, flops=24_000_000), {"packops": [6]})
    assert "4.0 TFLOP/s" in reporting.format_case({"name": "work", "rows": [row], "absent": {}})


def test_rounds_interleave_in_random_order():
    order = []
    candidates = {name: Candidate(None) for name in "abc"}
    names = {id(candidate): name for name, candidate in candidates.items()}

    def sample(candidate):
        order.append(names[id(candidate)])
        return len(order)

    samples = measuring.interleave(candidates, sample, rounds=40, seconds=60)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 120, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}  # each once a round
    assert len(set(rounds)) == 6  # in every order
    assert samples["b"] == [3 * i + names.index("b") + 1 for i, names in enumerate(rounds)]
    order.clear()
    measuring.interleave(candidates, sample, rounds=40, seconds=60)
    assert "".join(order) == "".join(rounds)  # the same at every run
    assert len(measuring.interleave(candidates, sample, rounds=9, seconds=0)["a"]) == 5  # never fewer than five
    assert len(measuring.interleave(candidates, sample, rounds=2, seconds=0)["a"]) == 2


# ---- measuring -------------------------------------------------------------------------------------------------------------


def test_what_is_wrong_absent_or_broken_is_said():
    def absent():
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    def broken():
        raise RuntimeError("does not compile\nmore")

    case = case_of(
        {
            "packops": lambda: Candidate(lambda i: 1, check=lambda result: "" if result == 1 else "not 1"),
            "wrong": lambda: Candidate(lambda i: 2, check=lambda result: "" if result == 1 else f"{result}, not 1"),
            "absent": absent,
            "broken": broken,
        }
    )
    result = measuring.measure(case, "cpu", rounds=2, seconds=1)
    assert "wrong" not in row_of(result, "packops")
    assert row_of(result, "wrong")["wrong"] == "2, not 1"
    assert row_of(result, "wrong")["rounds"] == 2
    assert result["absent"] == {"absent": "not installed", "broken": "RuntimeError: does not compile"}
    shown = reporting.format_case(result)
    assert "WRONG RESULT: 2, not 1" in shown
    assert "not installed" in shown
    with pytest.raises(RuntimeError, match="does not compile"):  # of ours this is no footnote
        measuring.measure(case_of({"packops, variant": broken}), "cpu", rounds=1, seconds=1)


def test_limits_within_limits():
    """The inner one ends first, or with the outer one, which goes on afterwards."""

    overslept = []

    def sleep(*limits):
        with contextlib.ExitStack() as within:
            for seconds in limits:
                within.enter_context(measuring.time_limit(seconds))
            time.sleep(20)
            overslept.append(limits)

    for limits in ((100, 0.05), (0.05, 100)):
        with pytest.raises(measuring.OutOfTime):
            sleep(*limits)
    assert not overslept
    ended = []
    with contextlib.suppress(measuring.OutOfTime), measuring.time_limit(2):
        for _ in range(2):
            with contextlib.suppress(measuring.OutOfTime):
                sleep(0.05)
            ended.append("inner")
        time.sleep(20)
        ended.append("none")
    assert ended == ["inner", "inner"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def sleepy():
    time.sleep(60)


def test_what_is_not_ready_in_time_is_left_out(capfd):
    slow = {"packops": lambda: Candidate(lambda i: 1), "slow": sleepy, "fast": lambda: Candidate(lambda i: 2)}
    begin = time.perf_counter()
    result = measuring.measure(case_of(slow), "cpu", rounds=2, seconds=1, patience=0.1)
    elapsed = time.perf_counter() - begin
    assert [row["system"] for row in result["rows"]] == ["packops", "fast"]
    assert result["absent"] == {"slow": "not ready after 0 s"}
    assert sum(row["seconds_to_prepare"] for row in result["rows"]) <= elapsed - 0.1  # not what the slow one took
    assert "a case: slow not ready" in capfd.readouterr().err
    result = measuring.measure(case_of(slow), "cpu", rounds=2, seconds=1, until=time.perf_counter())
    assert [row["system"] for row in result["rows"]] == ["packops"]  # must run
    assert result["absent"] == {"slow": "no time left", "fast": "no time left"}


def test_what_fails_is_left_out_and_a_signal_ends_the_run():
    def broken():
        raise ValueError(torch.zeros(2), int(signal.SIGTERM))  # not what a signal raises

    def terminated():
        os.kill(os.getpid(), signal.SIGTERM)

    candidates = {"packops": lambda: Candidate(lambda i: 1), "broken": broken}
    result = measuring.measure(case_of(candidates), "cpu", rounds=1, seconds=1, patience=20)
    assert result["absent"]["broken"].startswith("ValueError")
    with pytest.raises(measuring.OutOfTime):
        measuring.measure(case_of({**candidates, "terminated": terminated}), "cpu", rounds=1, seconds=1, patience=20)


def test_a_limit_of_the_run(tmp_path, capsys):
    """What was measured is written; SIGTERM ends a run likewise."""

    def cases(args):
        yield case_of({"packops": lambda: Candidate(lambda i: 1)})
        if args.quick:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    for more in (["--limit", "1"], ["--quick"]):
        out = tmp_path / more[0]
        options = ["--device", "cpu", "--rounds", "1", "--seconds", "0.1", "--out", str(out), *more]
        assert command.main("nothing", "nothing", "", cases, peers={}, draw=lambda data, path: None, arguments=options) == 0
        assert len(json.loads(out.with_suffix(".json").read_text())["cases"]) == 1
        assert "cases are missing" in capsys.readouterr().err


def test_what_a_call_destroys_is_put_back():
    source, scratch = torch.arange(3.0), torch.zeros(3)
    seen = []

    def call(i):
        seen.append(scratch.tolist())
        return scratch.neg_()

    candidate = Candidate(
        call,
        check=lambda result: "" if torch.equal(result, -source) else "not the negative",
        restore=lambda i: scratch.copy_(source),
    )
    result = measuring.measure(case_of({"packops": lambda: candidate}), "cpu", rounds=3, seconds=1)
    assert "wrong" not in result["rows"][0]
    assert seen == [[0, 1, 2]] * len(seen)
    assert len(seen) >= 6


def test_a_sample_uses_every_buffer_and_keeps_the_results():
    """Results freed within a sample would be written over each other, in the cache."""
    made, alive = [], []

    class Result:
        pass

    def call(i):
        result = Result()
        alive.append((i, [reference() is not None for reference in made]))
        made.append(weakref.ref(result))
        return result

    assert measuring.Sampler(case_of({}, buffers=4), "cpu").sample(Candidate(call)) > 0
    assert alive == [(i, [True] * i) for i in range(4)]
    assert [reference() for reference in made] == [None] * 4


def test_copy_moves_as_many_bytes(monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append((self.nbytes, other.nbytes)))
    candidate, scale = measuring.copy_candidate(case_of({}, bytes=1000, buffers=2), "cpu")
    candidate.call(1)
    assert (copied, scale) == ([(500, 500)], 1.0)
    monkeypatch.setattr(measuring, "LARGEST_COPY", 400)
    candidate, scale = measuring.copy_candidate(case_of({}, bytes=1000), "cpu")
    candidate.call(0)
    assert (copied[-1], scale) == ((200, 200), 2.5)
    monkeypatch.setattr(measuring.Sampler, "sample", lambda self, candidate: 2.0)
    result = measuring.measure(case_of({"packops": lambda: Candidate(lambda i: None)}, bytes=1000), "cpu", 1, 1)
    assert [row["microseconds"] for row in result["rows"]] == [5, 2]  # the time of 1000 bytes


def test_a_call_that_waits_is_not_held_longer_and_longer(monkeypatch):
    """How long the stream is held is found out once; else a candidate that waits for the device would add up."""
    slept = []

    class Event:
        def __init__(self, **_): ...
        def record(self): ...
        def synchronize(self): ...
        def elapsed_time(self, _):
            return 1.0

    times = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(times) ** 2 / 1e3)
    clock = measuring.Sampler(case_of({}, buffers=2), "cpu")
    clock.cold = torch.zeros(1)
    candidate = Candidate(lambda i: i)
    assert [clock._on_cuda(candidate) for _ in range(4)] == [500.0] * 4  # 1 ms for two calls
    assert slept[0] == 100_000
    assert slept[1] == slept[2] == slept[3] == 2_600_000 + 100_000


def test_buffers_exceed_the_cache():
    assert measuring.buffers_for(1 << 40, "cuda") == 1
    assert measuring.buffers_for(48 << 20, "cuda") * (48 << 20) > 192 << 20
    assert measuring.buffers_for(0, "cpu") == 32


# ---- the result: data, text, picture -----------------------------------------------------------------------------------------


@pytest.fixture
def data():
    """Of a benchmark with one case, as it is written."""
    target = {"against": "copy", "limit": 1.1, "value": 1.5, "met": False}
    rows = [
        {"system": "copy", "microseconds": 1000.0, "spread": [990, 1010], "bytes": 4_000_000_000, "of": {}, "targets": []},
        {"system": "packops", "microseconds": 1500.0, "spread": [1400, 1600], "of": {"copy": 1.5}, "targets": [target]},
        {"system": "Rival", "microseconds": 700.0, "spread": [690, 710], "of": {}, "targets": [], "wrong": "zero gradient"},
        {"system": "Other", "microseconds": 2500.0, "spread": [2400, 2600], "of": {"packops": 1.67}, "targets": []},
    ]
    return {
        "benchmark": "thing",
        "environment": measuring.environment("cpu", {"torch": peers.TORCH, "absent": peers.Peer("surely-not-installed")}),
        "cases": [{"name": "work, 3 x 4", "facts": {"work": "work"}, "rows": rows, "absent": {"Third": "not installed"}}],
    }


def test_environment(data):
    e = data["environment"]
    assert e["torch"] == torch.__version__
    assert e["packops"] == packops.__version__
    assert e["sources"] == packops._C.build_info()["sources"][:12]
    assert e["peers"] == {"torch": torch.__version__}
    assert {"device", "date", "commit", "threads", "cpu_isa", "load"} <= set(e)


def test_text(data):
    lines = reporting.format_case(data["cases"][0]).splitlines()
    assert [line.split()[0] for line in lines] == ["work,", "copy", "packops", "Rival", "Other", "Third"]
    assert "4.00 TB/s" in lines[1]
    assert "1.500 ms" in lines[2]
    assert "1.400 to 1.600" in lines[2]
    assert "1.50 x copy" in lines[2]
    assert lines[2].endswith("1.500, wanted at most 1.1 x copy: MISSED")
    assert lines[3].endswith("WRONG RESULT: zero gradient")
    verdict = reporting.format_verdict(data)
    assert verdict.startswith("0 of 1 targets met, missed:\n  packops, work, 3 x 4: 1.500")
    assert verdict.endswith("wrong results:\n  Rival, work, 3 x 4: zero gradient")
    data["cases"][0]["rows"] = data["cases"][0]["rows"][:1]
    assert reporting.format_verdict(data) == ""


def test_bars_show_the_numbers(data):
    pytest.importorskip("matplotlib")
    plot = reporting.pyplot()
    figure, axis = plot.subplots()
    reporting.bars(axis, data["cases"][0]["rows"], "title", *reporting.unit_of(data["cases"][:1]))
    widths = [patch.get_width() for patch in axis.patches]
    assert widths == [2.5, 1.5, 1.0, 0.7]  # ms, the fastest on top
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Other", "packops", "copy", "Rival"]
    assert [text.get_text().strip() for text in axis.texts] == ["2.5", "1.5", "1", "0.7 (wrong result)"]
    from matplotlib.colors import to_hex

    assert to_hex(axis.patches[1].get_facecolor()) == reporting.COLOURS["packops"]
    assert to_hex(axis.patches[3].get_facecolor()) == reporting.COLOURS["wrong"]
    plot.close(figure)


def test_pictures_come_from_the_file(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "measure", None)
    path = tmp_path / "thing_cpu.json"
    pictures = []
    for factor in (1, 1, 2):
        data["cases"][0]["rows"][3]["microseconds"] = factor * 2500.0
        reporting.write(data, path)
        assert reporting.redraw([path], reporting.draw_bars) == 0
        pictures.append(path.with_suffix(".png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert "WRONG RESULT" in capsys.readouterr().out
    assert reporting.redraw([], reporting.draw_bars) == 1


def test_one_picture_of_several_files(data, tmp_path, capsys):
    """Of a case that two files have, the last one's, in the place of the first."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    other = copy.deepcopy(data)
    other["cases"][0]["rows"] = other["cases"][0]["rows"][:2]
    other["cases"].append({**other["cases"][0], "name": "another"})
    for path, content in zip(paths, (data, other), strict=True):
        reporting.write(content, path)
    drawn = {}
    assert reporting.redraw(paths, lambda data, path: drawn.update({path.name: data}), together=tmp_path / "both") == 0
    assert list(drawn) == ["both.png"]
    assert [case["name"] for case in drawn["both.png"]["cases"]] == [*(case["name"] for case in data["cases"]), "another"]
    assert len(drawn["both.png"]["cases"][0]["rows"]) == 2
    assert capsys.readouterr().out.count(data["cases"][0]["name"]) >= 2

    reporting.write({**other, "environment": {**other["environment"], "device": "another card"}}, paths[1])
    for files, stem, said in ((paths, tmp_path / "both", "another card"), (paths[:1], Path(), "needs a STEM")):
        drawn.clear()
        assert reporting.redraw(files, lambda data, path: drawn.update({path.name: data}), together=stem) == 2
        assert not drawn
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attention", "end_to_end"])
def test_draw_and_out_make_one_picture(name, tmp_path, monkeypatch):
    paths = sorted(str(path) for path in reporting.RESULTS.glob(f"{name}_*_h200.json"))
    module, drawn = importlib.import_module(name), []
    monkeypatch.setattr(module, "draw", lambda data, path: drawn.append((path, len(data["cases"]))))
    arguments = ["--draw", *paths, "--out", str(tmp_path / "all")]
    if name == "attention":
        assert module.main(arguments) == 0
    else:
        assert module.main(module.add_arguments(argparse.ArgumentParser()).parse_args(arguments)) == 0
    assert [path for path, _ in drawn] == [tmp_path / "all.png"]
    assert drawn[0][1] > max(len(json.loads(Path(path).read_text())["cases"]) for path in paths)


def test_numbers_are_written_with_six_digits(tmp_path):
    reporting.write({"a": [1 / 3, 123456789.0], "b": (True, 7, "x", None)}, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": [0.333333, 123457000.0], "b": [True, 7, "x", None]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA RTX PRO 6000 Blackwell", "rtx_pro"),
    ],
)
def test_device_in_the_file_name(name, expected):
    assert measuring.slug("cuda", name) == expected
    assert measuring.slug("cpu", name) == "cpu"


def test_choice_of_peers():
    known = {"eager": peers.TORCH, "Liger": peers.LIGER, "Liger, in place": peers.LIGER}
    assert list(command.chosen(known, "all", "cuda")) == [*known]
    assert list(command.chosen(known, "all", "cpu")) == ["eager"]
    assert command.chosen(known, "none", "cuda") == {}
    assert list(command.chosen(known, "liger, EAGER", "cuda")) == ["Liger", "Liger, in place", "eager"]
    with pytest.raises(SystemExit, match="no ligre here; there are eager, Liger"):
        command.chosen(known, "ligre", "cuda")


# ---- peers -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Packages that must not be imported as a whole."""
    for file, text in {
        "flash_attn/__init__.py": "raise ImportError('wants its CUDA extension')",
        "flash_attn/ops/__init__.py": "",
        "flash_attn/ops/thing.py": "value = 3",
        "flash_attn/cute/__init__.py": "",
        "flash_attn/cute/interface.py": "from cutlass import value",
        "nvidia_cutlass_dsl/dsl_packages/cutlass.py": "value = 4",
        "lone/__init__.py": "raise RuntimeError('patches the world')",
        "lone/data/tools.py": "import nowhere\nLIMIT = 1\ndef double(x: Unknown): return 2 * x + EXTRA\nclass Other: pass\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flash_attn", "lone", "cutlass"):
            del sys.modules[name]


def test_peers_are_entered_without_their_init(foreign):
    assert peers.flash_attention("ops.thing").value == 3
    assert peers.flash_attention("ops.thing").value == 3  # again
    assert peers.folder_of("flash_attn").name == "flash_attn"  # also once it is entered
    with pytest.raises(ModuleNotFoundError):
        peers.folder_of("surely_not_installed")


def test_the_compiler_of_flash_attention_4_is_found_without_its_pth_file(foreign, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert peers.flash_attention_4().value == 4


def test_single_functions_of_an_installed_file(foreign):
    scope = peers.functions_of("lone", "data/tools.py", ["double"], {"EXTRA": 1})
    assert scope["double"](3) == 7
    assert "Other" not in scope
    with pytest.raises(ModuleNotFoundError, match=r"lone has no double, gone in data/tools\.py any more"):
        peers.functions_of("lone", "data/tools.py", ["double", "gone"], {})


def test_pins_say_what_to_install():
    assert peers.LIGER.requirement == f"liger-kernel=={peers.LIGER.pinned}"
    assert peers.TORCH.requirement == "torch"
    assert peers.TORCH.version() == torch.__version__


# ---- cross entropy ---------------------------------------------------------------------------------------------------------

TINY = ["--device", "cpu", "--rounds", "1", "--peers", "eager", "--threads", "1"]


def run(stem, tmp_path, *arguments):
    module, path = load(stem), tmp_path / "out" / stem
    options = {"peers": module.PEERS, "draw": module.draw, "extend": module.extend}
    arguments = [*TINY, *arguments, "--out", str(path)]
    status = command.main(module.NAME, stem, module.__doc__, module.cases, arguments=arguments, **options)
    return status, json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def small_buffers(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(measuring, "buffers_for", lambda bytes_per_call, device: 2)
    yield
    torch.set_num_threads(threads)


def test_cross_entropy_runs(tmp_path, small_buffers, capsys):
    pytest.importorskip("matplotlib")
    status, data = run("ce_loss", tmp_path, "--rows", "21", "--vocabularies", "37")
    assert status == 0
    assert [case["name"] for case in data["cases"]][:2] == ["forward, 21 x 37 fp32", "loss + gradient, 21 x 37 fp32"]
    assert len(data["cases"]) == 5  # two dtypes, with and without gradient, and the host
    for case in data["cases"]:
        assert not case["absent"]
        assert all("wrong" not in row for row in case["rows"]), case["name"]
    gradient = data["cases"][1]
    assert [row["system"] for row in gradient["rows"]] == ["copy", "packops", "packops, in place", "eager"]
    assert row_of(gradient, "packops")["bytes"] == 2 * 21 * 37 * 4
    assert row_of(gradient, "packops")["targets"][0]["against"] == "eager"
    assert (tmp_path / "out" / "ce_loss.png").stat().st_size > 10_000
    assert "targets met" in capsys.readouterr().out


def test_a_wrong_loss_of_ours_fails_the_benchmark(tmp_path, small_buffers, monkeypatch, capsys):
    right = packops.cross_entropy
    monkeypatch.setattr(packops, "cross_entropy", lambda *args, **options: 1.01 * right(*args, **options))
    status, data = run("ce_loss", tmp_path, "--rows", "8", "--vocabularies", "16", "--only", "^forward.*fp32")
    assert status == 1
    assert row_of(data["cases"][0], "packops")["wrong"].startswith("loss ")
    assert "wrong results:\n  packops, forward, 8 x 16 fp32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_every_option_is_checked_against_what_it_should_be(dtype, small_buffers):
    ce_loss = load("ce_loss")
    problem = ce_loss.Problem(37, 50, dtype, "cpu", gradient=True)
    found = ce_loss.variants(problem)
    assert set(ce_loss.VARIANT_LIMITS) < set(found)
    for name, make in found.items():
        candidate = make()
        assert candidate.check(candidate.call(0)) == "", name
        loss, gradient = candidate.call(0)
        assert candidate.check((loss, torch.zeros_like(gradient))).startswith("gradient wrong"), name


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda loss, grad: (loss * 1.001, grad), "loss"),
        (lambda loss, grad: (loss * float("nan"), grad), "loss nan"),
        (lambda loss, grad: (loss, 1.05 * grad), "gradient wrong in 100 % of rows"),
        (lambda loss, grad: (loss, torch.where(grad < 0, grad * float("nan"), grad)), "gradient wrong in 100 % of rows"),
        (lambda loss, grad: (loss, torch.cat([grad[:-1], torch.zeros_like(grad[-1:])])), "gradient wrong in 5 % of rows"),
    ],
)
@torch.no_grad()
def test_mistakes_of_a_loss_are_found(mistake, message, small_buffers):
    problem = load("ce_loss").Problem(20, 33, "fp32", "cpu", gradient=True)
    candidate = problem.candidate(lambda x, y: torch.nn.functional.cross_entropy(x, y))
    assert candidate.check(candidate.call(0)) == ""
    assert candidate.check(mistake(*candidate.call(0))).startswith(message)


@torch.no_grad()
def test_trainer_case_divides_by_num_items(small_buffers):
    ce_loss = load("ce_loss")
    problem = ce_loss.Problem(130, 20, "fp32", "cpu", gradient=True)
    case = ce_loss.trainer(problem, argparse.Namespace(peers={"eager": peers.TORCH}))
    assert list(case.candidates) == ["packops", "packops, in place", "eager"]
    for make in case.candidates.values():
        candidate = make()
        if candidate.restore:
            candidate.restore(0)
        assert candidate.check(candidate.call(0)) == ""


def test_vocabularies_are_drawn_as_lines(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    ce_loss = load("ce_loss")
    cases = []
    for vocab in (32000, 50257, 128256):
        for work in (ce_loss.FORWARD, ce_loss.GRADIENT):
            rows = [
                {"system": system, "microseconds": 100.0, "of": {"copy": slow}, "targets": []}
                for system, slow in (("packops", 1.1), ("packops, in place", 1.0), ("QuACK", 1.5))
            ]
            rows.append({"system": "Liger", "microseconds": 1.0, "of": {"copy": 0.1}, "targets": [], "wrong": "all of it"})
            cases.append(
                {"name": "", "facts": {"vocab": vocab, "work": work, "dtype": "bf16", "rows": ce_loss.ROWS}, "rows": rows}
            )
    drawn = []
    monkeypatch.setattr(reporting, "finish", lambda figure, data, path: drawn.append(figure))
    ce_loss.draw({"cases": cases}, tmp_path / "x.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[1].lines}
    assert lines["packops"] == [1.1] * 3
    assert lines["QuACK"] == [1.5] * 3
    assert "Liger" not in lines  # fast and wrong
    reporting.pyplot().close(drawn[0])


# ---- RoPE ------------------------------------------------------------------------------------------------------------------


def test_rope_runs(tmp_path, small_buffers):
    pytest.importorskip("matplotlib")
    status, data = run("rope", tmp_path, "--shape", "24", "4", "2", "16", "--dtype", "bf16")
    assert status == 0
    works = [case["name"].split(",")[0] for case in data["cases"]]
    assert works == [
        "forward",
        "forward + backward",
        "layouts of packops",
        "in place",
        "norm + RoPE",
        "norm + RoPE",
        "host time of a call",
    ]
    for case in data["cases"]:
        assert not case["absent"]
        assert all("wrong" not in row for row in case["rows"]), case["name"]
    assert row_of(data["cases"][0], "eager")["bytes"] == 2 * 24 * 6 * 16 * 2 + 24 * (16 * 4 + 8)
    assert row_of(data["cases"][3], "packops")["bytes"] == 2 * 24 * 3 * 8 * 2 + 24 * (8 * 4 + 8)  # a quarter of 32 features
    assert "bytes" not in data["cases"][-1]["rows"][0]


@torch.no_grad()
def test_mistakes_of_a_rotation_are_found(small_buffers, monkeypatch):
    rope = load("rope")
    monkeypatch.setattr(rope, "DOCUMENT", 8)
    p = rope.Problem(24, 2, 1, 16, "bf16", "cpu")
    assert p.ids.tolist() == list(range(8)) * 3
    assert p.cu_seqlens.tolist() == [0, 8, 16, 24]

    def wrong(q, k, cos=None, **options):
        return p.candidate(lambda *_: (q, k)).check((q, k))

    right = packops.apply_rope(p.q[0], p.k[0], p.cos, p.sin, position_ids=p.ids)
    assert wrong(*right) == ""
    assert wrong(*map(rope.heads_first, right)) == ""
    across = packops.apply_rope(p.q[0], p.k[0], p.cos, p.sin)  # positions go on over document ends
    assert wrong(*across).startswith("q wrong in ")
    assert 30 < float(wrong(*across).split()[3]) < 67  # of three documents the first is right
    assert wrong(right[0], p.k[0]).startswith("k wrong in ")
    assert wrong(right[0] * float("nan"), right[1]).startswith("q wrong in 100 %")


def test_a_wrong_gradient_of_a_rotation_is_found(small_buffers):
    p = load("rope").Problem(12, 2, 1, 16, "fp32", "cpu")
    candidate = p.with_gradient(lambda q, k: packops.apply_rope(q, k, p.cos, p.sin, position_ids=p.ids))
    assert candidate.check(candidate.call(0)) == ""
    detached = p.with_gradient(lambda q, k: (q * p.cos[0, 0], k * p.cos[0, 0]))  # the right norm, not turned back
    assert "wrong in" in detached.check(detached.call(0))


def test_a_result_holds_what_it_takes_to_believe_it(monkeypatch):
    calls = iter("ab")
    monkeypatch.setattr(measuring, "device_state", lambda device: {device: next(calls)})
    result = measuring.measure(case_of({"packops": lambda: Candidate(lambda i: None)}), "cpu", rounds=3, seconds=1)
    assert result["state"] == {"before": {"cpu": "a"}, "after": {"cpu": "b"}}
    row = result["rows"][0]
    assert len(row["samples"]) == row["rounds"] == 3
    assert min(row["samples"]) <= row["microseconds"] <= max(row["samples"])


def test_sensors():
    answers = {"clocks_event_reasons": "1980, 2619, 412.5, 54, 0x0000000000000004", "clocks_throttle_reasons": ""}

    def ask(names):
        asked.append(names)
        return answers[next(word for word in answers if word in names)]

    for old in (False, True):  # an old driver does not know the new name
        asked = []
        if old:
            answers = {"clocks_event_reasons": "", "clocks_throttle_reasons": "1980, 2619, [N/A], 54, Active\n1, 2, 3, 4, 5"}
        state = measuring.read_sensors(ask)
        assert len(asked) == 1 + old
        assert asked[0].split(",")[:2] == ["clocks.sm", "clocks.mem"]
        assert state["sm_mhz"] == 1980
        assert state["temperature_c"] == 54
        assert state["power_watts"] == ("[N/A]" if old else 412.5)
        assert state["throttle_reasons"] == ("Active" if old else "0x0000000000000004")
    assert measuring.read_sensors(lambda names: "") == {}
    assert measuring.device_state("cpu")["load"] >= 0


def test_the_arguments_are_kept_without_the_output():
    assert command.without_output(["--only", "a", "--out", "x", "--quick"]) == ["--only", "a", "--quick"]
    assert command.without_output(["--out=x", "--out", "--rounds", "3", "--out"]) == ["--rounds", "3"]


def test_reproduce(tmp_path, capsys):
    """A result is measured again with its settings, both are shown, and it is written where ``--out`` says alone."""
    pytest.importorskip("matplotlib")
    first = tmp_path / "first"
    small = ["--device", "cpu", "--only", "host", "--rounds", "2", "--threads", "1", "--shape", "8", "2", "1", "16"]
    assert cli.main(["bench", "rope", *small, "--peers", "none", "--out", str(first)]) == 0
    written = json.loads(first.with_suffix(".json").read_text())
    assert written["settings"]["arguments"] == [*small, "--peers", "none"]
    assert written["settings"]["data"]
    written["cases"][0]["rows"][0]["microseconds"] = 12345.0
    written["cases"][0]["rows"][0]["system"] = "gone"
    first.with_suffix(".json").write_text(json.dumps(written))
    capsys.readouterr()
    assert cli.main(["bench", "--reproduce", str(first.with_suffix(".json"))]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"packops bench rope {' '.join(written['settings']['arguments'])}"
    assert not any(line.startswith("written: ") and ".json" in line for line in shown)
    table = shown[next(i for i, line in enumerate(shown) if line.endswith("now/written")) + 1 :]
    (gone,) = (line for line in table if ": gone, us" in line)
    assert gone.split()[-2:] == ["1.234e+04", "--"]
    assert any(line.split()[-1].replace(".", "").isdigit() and ": packops" in line for line in table)
    again = tmp_path / "again.json"
    assert cli.main(["bench", "--reproduce", str(first.with_suffix(".json")), "--rounds", "3", "--out", str(again)]) == 0
    settings = json.loads(again.read_text())["settings"]
    assert settings["rounds"] == 3
    assert settings["arguments"] == [*written["settings"]["arguments"], "--rounds", "3"]
    assert f"written: {again}, " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"benchmark": "gone"}', '{"benchmark": 3}'])
def test_reproduce_refuses_what_is_no_result(tmp_path, capsys, text):
    (tmp_path / "r.json").write_text(text)
    assert cli.main(["bench", "--reproduce", str(tmp_path / "r.json")]) == 2
    assert "packops bench --reproduce" in capsys.readouterr().err


def test_every_written_result_can_be_compared():
    results = sorted((BENCH / "results").glob("*.json"))
    assert len(results) > 8
    for path in results:
        found = reporting.figures(json.loads(path.read_text()))
        assert found, path.name
        assert all(isinstance(value, (int, float)) for value in found.values())


# ---- the command -----------------------------------------------------------------------------------------------------------


def test_list_of_benchmarks(capsys):
    assert cli.main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert {"cross-entropy", "rope", "packing"} <= set(cli_bench.benchmarks())
    for name, (_, text) in cli_bench.benchmarks().items():
        assert f"  {name} " in shown
        assert text in shown
        assert 20 < len(text) < 120
    for arguments in (["--help"], ["-h", "rope"]):
        assert cli.main(["bench", *arguments]) == 0
        assert capsys.readouterr().out == shown


def test_every_program_is_listed():
    programs = {path for path in BENCH.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert len(programs) > 4
    assert {path for path, _ in cli_bench.benchmarks().values()} == programs


def test_unknown_benchmark(capsys):
    assert cli.main(["bench", "cross_entropy"]) == 2
    assert "Did you mean cross-entropy?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rope", "end-to-end", "distributed steps", "distributed vocab", "packing"])
def test_rounds_and_seconds_that_are_none(name, capsys):
    wrong = ["--rounds=0", "must be an integer from 1 to 2^31 - 1, got 0"], ["--rounds=-1", "got -1"]
    late = "--limit" if name.startswith("distributed") else "--seconds"
    wrong += [late + "=-1", "must be 0 seconds or more, got -1"], [late + "=nan", "got nan"], [late + "=x", "invalid"]
    for argument, message in wrong if name != "packing" else wrong[2:]:
        assert cli.main(["bench", *name.split(), argument, "--nonsense"]) == 2  # so that it runs in no case
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"error: argument {argument.partition('=')[0]}: " in error
        assert message in error


def test_no_seconds_are_no_seconds(tmp_path, small_buffers):
    pytest.importorskip("matplotlib")
    small = ["--only", "host", "--shape", "8", "2", "1", "16", "--peers", "none"]
    _, data = run("rope", tmp_path, "--rounds", "9", "--seconds", "0", *small)
    assert data["settings"]["seconds"] == 0
    assert {row["rounds"] for row in data["cases"][0]["rows"]} == {5}


def test_benchmarks_need_the_source_tree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path / "bench")
    assert cli.main(["bench", "rope"]) == 2
    assert "part of the source tree, not of the wheel" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    """Through the command line, in a process of its own: the path to bench/, the program's name, an error."""
    command = [sys.executable, "-m", "packops", "bench", "rope", "--device", "cpu"]
    good = subprocess.run(
        [*command, "--only", "host", "--rounds", "1", "--threads", "1", "--shape", "8", "2", "1", "16"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert good.returncode == 0, good.stderr
    assert "host time of a call" in good.stdout
    bad = subprocess.run([*command, "--peers", "ligre"], capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode != 0
    assert "no ligre here" in bad.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("stem", "arguments"), [("ce_loss", ["--rows", "256", "--vocabularies", "32000"]), ("rope", [])])
def test_on_a_gpu(stem, arguments, tmp_path):
    """Events, the sleeping kernel, peak memory; results of ours must be right."""
    status, data = run(stem, tmp_path, "--device", "cuda", "--quick", "--rounds", "2", *arguments)
    assert status == 0
    assert data["environment"]["driver"]
    for case in data["cases"]:
        assert all(row["microseconds"] > 0 for row in case["rows"])
        assert case["facts"].get("work") == "host" or row_of(case, "packops")["peak_bytes"] > 0
