"""What a result says: tables for the terminal and pictures, both made from the written data alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import COPY, OURS, Target

RESULTS = Path(__file__).parent / "results"
latest: dict[str, Any] = {}  # the result that was written last, which --reproduce compares although no file may be wanted


# ---- words -----------------------------------------------------------------------------------------------------------------


def time_text(microseconds: float) -> str:
    return f"{microseconds:,.1f} us" if microseconds < 1000 else f"{microseconds / 1000:,.3f} ms"


def spread_text(row: dict[str, Any]) -> str:
    unit, digits = (1, 1) if row["microseconds"] < 1000 else (1000, 3)
    low, high = (value / unit for value in row["spread"])
    return f"{low:.{digits}f} to {high:.{digits}f}"


def speed_text(row: dict[str, Any]) -> str:
    if row.get("flops"):
        speed = row["flops"] / row["microseconds"] * 1e6
        return f"{speed / 1e12:.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.1f} GFLOP/s"
    speed = row["bytes"] / row["microseconds"] * 1e6
    return f"{speed / 1e12:.2f} TB/s" if speed >= 1e12 else f"{speed / 1e9:.1f} GB/s"


def target_text(target: dict[str, Any]) -> str:
    """``1.18, wanted at most 1.1 x copy: MISSED``"""
    value = f"{target['value']:.1f}" if target["against"] == "us" else f"{target['value']:.3f}"
    return f"{value}, wanted at most {Target(target['against'], target['limit'])}: {'met' if target['met'] else 'MISSED'}"


def format_case(case: dict[str, Any]) -> str:
    """A case as text: the copy, ours, and the peers by their time."""

    def place(row: dict[str, Any]) -> tuple[int, float]:
        group = 0 if row["system"] == COPY else 1 if row["system"].startswith(OURS) else 2
        return group, row["microseconds"] if group == 2 else 0

    width = max(20, *(len(name) + 2 for name in [*case["absent"], *(row["system"] for row in case["rows"])]))
    speeds = 15 if any(row.get("flops") for row in case["rows"]) else 10
    lines = [case["name"]]
    for row in sorted(case["rows"], key=place):
        line = f"  {row['system']:<{width}}{time_text(row['microseconds']):>12}  {spread_text(row):<18}"
        line += f"{speed_text(row):>{speeds}}" if row.get("bytes") or row.get("flops") else " " * speeds
        for base in (COPY, OURS):
            line += f"{row['of'][base]:>8.2f} x {base:<7}" if base in row["of"] else " " * 18
        if "peak_bytes" in row:
            line += f"{row['peak_bytes'] / 2**20:>9,.0f} MiB"
        notes = [target_text(target) for target in row["targets"]]
        if row.get("wrong"):
            notes.insert(0, f"WRONG RESULT: {row['wrong']}")
        lines.append(f"{line}  {'; '.join(notes)}".rstrip())
    lines += [f"  {name:<{width}}{reason:>12}" for name, reason in case["absent"].items()]
    return "\n".join(lines)


def format_environment(data: dict[str, Any]) -> str:
    e = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["peers"].items())
    where = (
        f"CUDA {e['cuda']}, driver {e['driver']}"
        if "cuda" in e
        else f"{e['threads']} threads, {e['cpu_isa']}, load {e['load']:.1f}"
    )
    return (
        f"{data['benchmark']}: {e['device']}, {where}, torch {e['torch']}, packops {e['packops']}"
        + (f" ({e['commit']})" if e["commit"] else "")
        + f", {e['date']}"
        + (f"\npeers: {versions}" if versions else "")
    )


def format_data(data: dict[str, Any]) -> str:
    """Everything of a result file as text."""
    parts = [format_environment(data)]
    parts += [format_case(case) for case in data["cases"]]
    return "\n\n".join([*parts, format_verdict(data)])


def format_verdict(data: dict[str, Any]) -> str:
    """How many targets are met, which are not, and whose results are wrong."""
    targets = [(case["name"], row["system"], target) for case, row in rows_of(data) for target in row["targets"]]
    wrong = [f"  {row['system']}, {case['name']}: {row['wrong']}" for case, row in rows_of(data) if row.get("wrong")]
    missed = [f"  {system}, {case}: {target_text(t)}" for case, system, t in targets if not t["met"]]
    lines = [f"{len(targets) - len(missed)} of {len(targets)} targets met" + (", missed:" if missed else "")] if targets else []
    lines += missed
    return "\n".join(lines + (["wrong results:", *wrong] if wrong else []))


def rows_of(data: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(case, row) for case in data["cases"] for row in case["rows"]]


def ours_of(case: dict[str, Any]) -> float:
    """Microseconds of packops itself, without options."""
    return next(row["microseconds"] for row in case["rows"] if row["system"] == OURS)


# ---- pictures --------------------------------------------------------------------------------------------------------------

COLOURS = {OURS: "#0b7a75", COPY: "#d9dde1", "wrong": "#c8553d", "peer": "#b0b7bf"}


def colour(row: dict[str, Any]) -> str:
    if row.get("wrong"):
        return COLOURS["wrong"]
    if row["system"] == COPY:
        return COLOURS[COPY]
    return COLOURS[OURS] if row["system"].startswith(OURS) else COLOURS["peer"]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def unit_of(cases: list[dict[str, Any]]) -> tuple[int, str]:
    """Microseconds of the unit that all panels of a picture have, and its name."""
    return (1, "µs") if min(row["microseconds"] for case in cases for row in case["rows"]) < 100 else (1000, "ms")


def bars(axis: Any, rows: list[dict[str, Any]], title: str, unit: int, name: str) -> None:
    """Times of one case, fastest on top; a wrong result has its own colour and says so."""
    rows = sorted(rows, key=lambda row: -row["microseconds"])
    places = range(len(rows))
    axis.barh(places, [row["microseconds"] / unit for row in rows], color=[colour(row) for row in rows])
    axis.set_yticks(places, [row["system"] for row in rows])
    for place, row in enumerate(rows):
        value = row["microseconds"] / unit
        label = (f" {value:,.0f}" if value >= 100 else f" {value:.3g}") + (" (wrong result)" if row.get("wrong") else "")
        axis.text(row["microseconds"] / unit, place, label, va="center", fontsize=8)
    axis.set(xlim=(0, 1.2 * max(row["microseconds"] for row in rows) / unit), xlabel=name)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def draw_bars(
    data: dict[str, Any], path: Path, *, only: Callable[[dict[str, Any]], bool] = lambda case: True, columns: int = 3
) -> None:
    """One panel for each case that ``only`` takes."""
    cases = [case for case in data["cases"] if case["rows"] and only(case)]
    if not cases:
        return
    plot = pyplot()
    columns = min(columns, len(cases))
    lines = math.ceil(len(cases) / columns)
    deepest = max(len(case["rows"]) for case in cases)
    size = (5 * columns, lines * (1.2 + 0.27 * deepest))
    figure, axes = plot.subplots(lines, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        bars(axis, case["rows"], case["name"], *unit_of(cases))
    finish(figure, data, path)


def finish(figure: Any, data: dict[str, Any], path: Path) -> None:
    """Write the picture, with what it was measured on at its foot."""
    e = data["environment"]
    figure.supxlabel(f"{e['device']}, torch {e['torch']}, {e['date'].split()[0]}", fontsize=8, color="#667")
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


# ---- files -----------------------------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Six significant digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(data: dict[str, Any], stem: Path | None) -> None:
    """Write ``stem.json``, if there is a stem."""
    text = json.dumps(rounded(data), indent=1)
    latest.clear()
    latest.update(json.loads(text))
    if stem:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(text + "\n")


def figures(data: dict[str, Any]) -> dict[str, float]:
    """The measured figures of any result file, by what was measured."""
    found: dict[str, float] = {}
    for case in data.get("cases", []):
        for row in case["rows"] if "name" in case else []:
            found[f"{case['name']}: {row['system']}, us"] = row["microseconds"]
        for row in case.get("results", []):
            if "seconds" in row:
                found[f"{case['model']}, {case['corpus']}: {row['row']}, ms"] = 1e3 * row["seconds"]
    if not found:
        skipped = ("environment", "settings", "state", "samples")
        found = dict(leaves({name: value for name, value in data.items() if name not in skipped}))
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}, {name}" if path else str(name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def compare(written: dict[str, Any], now: dict[str, Any]) -> str:
    """A written result and one measured again with its settings, side by side."""
    before, after = figures(written), figures(now)
    width = max(map(len, [*before, *after]), default=0)
    lines = [f"{'':<{width}}{'written':>14}{'now':>14}{'now/written':>13}"]
    for name in [*before, *(name for name in after if name not in before)]:
        cells = [f"{values[name]:>14,.4g}" if name in values else f"{'--':>14}" for values in (before, after)]
        both = name in before and name in after and before[name]
        lines.append(f"{name:<{width}}{''.join(cells)}" + (f"{after[name] / before[name]:>13.3f}" if both else ""))
    lines += [f"written: {format_environment(written)}", f"now: {format_environment(now)}"]
    return "\n".join(lines)


def redraw(
    paths: Sequence[Path],
    draw: Callable[[dict[str, Any], Path], None],
    text: Callable[[dict[str, Any]], str] = format_data,
    together: Path | None = None,
) -> int:
    """A table and a picture of each result file, or one picture of all, ``together.png``."""
    if not paths:
        print("there is no result to draw: run with --out first", file=sys.stderr)
        return 1
    results = [json.loads(path.read_text()) for path in paths]
    for data in results:
        print(text(data) + "\n")
    pictures = list(zip(results, paths, strict=True))
    if together:
        devices = {data["environment"]["device"] for data in results}
        if together == Path() or len(devices) > 1 or not all("cases" in data for data in results):
            print(
                "--draw with --out needs a STEM and result files with cases of one device, "
                f"got {str(together)!r} and {', '.join(map(str, paths))} of {', '.join(sorted(devices))}",
                file=sys.stderr,
            )
            return 2
        pictures = [(merged(results), together)]
    for data, path in pictures:
        draw(data, path.with_suffix(".png"))
        print(f"drawn: {path.with_suffix('.png')}")
    return 0


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first result with the cases of all. Of a case that several have, the last one's, in the place of the first."""
    cases = {case.get("name") or (case["model"], case["corpus"]): case for data in results for case in data["cases"]}
    return {**results[0], "cases": list(cases.values())}
