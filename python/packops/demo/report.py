"""What a run showed: a table for the terminal, a picture, and the figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .train import Result

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = {"padded": "#E69F00", "careless": "#CC79A7", "packops": "#0072B2"}
TITLES = {"padded": "padded", "careless": "packed carelessly", "packops": "packed with packops"}


def figures(result: Result) -> dict[str, Any]:
    """Every figure of a run, in plain types."""
    settings = asdict(result.settings) | {"device": str(result.settings.device)}
    runs = {
        name: {
            "useful_tokens_per_second": result.useful_tokens / run.seconds,
            "useful_share": result.useful_tokens / run.tokens,
            "training_seconds": run.seconds,
            "held_out_loss": run.held_out,
            "training_loss": run.losses,
            "largest_held_out_difference": result.loss_difference(name),
            "largest_weight_difference": result.weight_difference(name),
        }
        for name, run in result.runs.items()
    }
    return {
        "corpus": result.corpus,
        "model": result.model,
        "settings": settings,
        "useful_tokens": result.useful_tokens,
        "checkpoints": result.checkpoints,
        "largest_weight_change": result.weight_change(),
        "runs": runs,
    }


def table(result: Result) -> str:
    """The runs side by side, held-out losses down the rows."""
    names = list(result.runs)
    shown = figures(result)["runs"]
    rows = [["", *(TITLES[name] for name in names)]]
    rows += [
        ["useful tokens/s", *(f"{shown[name]['useful_tokens_per_second']:,.0f}" for name in names)],
        ["useful share of tokens", *(f"{shown[name]['useful_share']:.1%}" for name in names)],
    ]
    for index, step in enumerate(result.checkpoints):
        rows.append([f"held-out loss, step {step}", *(f"{shown[name]['held_out_loss'][index]:.6f}" for name in names)])
    rows += [
        ["largest loss difference", "-", *(f"{shown[name]['largest_held_out_difference']:.1e}" for name in names[1:])],
        ["largest weight difference", "-", *(f"{shown[name]['largest_weight_difference']:.1e}" for name in names[1:])],
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(len(lines) - 2, "-" * len(lines[0]))
    lines += [
        "",
        "Differences are to the padded run: of losses on the same held-out documents, and of weights after the last step",
        f"(training moved a weight by up to {result.weight_change():.2f}). tokens/s are of training, measured in this run.",
    ]
    return "\n".join(["", *lines])


def write(result: Result, folder: Path) -> list[Path]:
    """Write ``demo.json`` and ``demo.png`` into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "demo.json", folder / "demo.png"
    shown = figures(result)
    data.write_text(json.dumps(shown, indent=1) + "\n")
    draw(shown, picture)
    return [picture, data]


def draw(shown: dict[str, Any], path: Path) -> None:
    """Draw the picture from :func:`figures` (or from a ``demo.json``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, steps = shown["runs"], shown["checkpoints"]
    figure = Figure(figsize=(12, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1.35, 1.1, 0.95))
    figure.suptitle(
        "Packed with packops, a Llama trains as if it had been padded, only faster", fontsize=14, fontweight="bold", x=0.01, ha="left"
    )
    draw_losses(axes[0], runs, steps)
    draw_differences(axes[1], runs, steps)
    draw_speed(axes[2], runs)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_title(each.get_title(loc="left"), loc="left", fontsize=11)
    figure.savefig(path)


def draw_losses(axes: Any, runs: dict[str, Any], steps: list[int]) -> None:
    looks = {
        "padded": {"linewidth": 7, "alpha": 0.55, "solid_capstyle": "round"},
        "careless": {"linewidth": 2, "marker": "s", "markersize": 4},
        "packops": {"linewidth": 1.8, "marker": "o", "markersize": 4},
    }
    for name, look in looks.items():
        axes.plot(steps, runs[name]["held_out_loss"], color=COLOURS[name], **look)
    axes.set_title("Loss on held-out documents", loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean over documents, nats per token")
    middle = len(steps) * 6 // 10
    careless, padded = runs["careless"]["held_out_loss"], runs["padded"]["held_out_loss"]
    axes.annotate(
        f"packed carelessly: {careless[-1]:.2f}",
        (steps[middle], careless[middle]), (6, 34), textcoords="offset points",
        color=COLOURS["careless"], fontweight="bold", arrowprops={"arrowstyle": "-", "color": COLOURS["careless"]},
    )  # fmt: skip
    axes.annotate(
        f"packops ({runs['packops']['held_out_loss'][-1]:.2f})\non padded ({padded[-1]:.2f})",
        (steps[middle], padded[middle]), (-78, -48), textcoords="offset points",
        color=COLOURS["packops"], fontweight="bold", arrowprops={"arrowstyle": "-", "color": COLOURS["packops"]},
    )  # fmt: skip


def draw_differences(axes: Any, runs: dict[str, Any], steps: list[int]) -> None:
    padded = runs["padded"]["held_out_loss"]
    floor = 2.0**-24 * max(padded)  # half a unit in the last place of a loss of this size, at most
    for name in ("careless", "packops"):
        values = [max(abs(own - other), floor / 4) for own, other in zip(runs[name]["held_out_loss"], padded, strict=True)]
        axes.plot(steps[1:], values[1:], color=COLOURS[name], marker="s" if name == "careless" else "o", markersize=4)
        axes.annotate(
            TITLES[name], (steps[-1], values[-1]), (0, 9), textcoords="offset points",
            color=COLOURS[name], fontweight="bold", ha="right",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title("Its distance from the padded run", loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylim(floor / 8, 3)
    axes.axhspan(floor / 8, floor * 8, color="0.9", zorder=0)
    axes.text(steps[-1], floor / 6.5, "fp32 rounding of the loss", color="0.4", ha="right", va="bottom", fontsize=9)


def draw_speed(axes: Any, runs: dict[str, Any]) -> None:
    names = list(runs)
    speeds = [runs[name]["useful_tokens_per_second"] for name in names]
    bars = axes.barh(range(len(names)), speeds, color=[COLOURS[name] for name in names], height=0.62)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_title("Useful tokens per second", loc="left")
    axes.set_xlim(0, max(speeds) * 1.02)
    for bar, name, speed in zip(bars, names, speeds, strict=True):
        factor = "" if name == "padded" else f"  ({speed / speeds[0]:.1f}×)"
        axes.annotate(
            f"{TITLES[name]}", (0, bar.get_y()), (2, 3), textcoords="offset points",
            color=COLOURS[name], fontweight="bold", va="bottom",
        )  # fmt: skip
        axes.annotate(
            f"{speed:,.0f}{factor}", (0, bar.get_y() + bar.get_height() / 2), (6, 0), textcoords="offset points",
            color="white", fontweight="bold", va="center",
        )  # fmt: skip
