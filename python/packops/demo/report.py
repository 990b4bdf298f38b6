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
            "largest_weight_difference": run.distances,
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
        "largest_weight": max(weight.abs().max().item() for weight in result.runs["padded"].model.state_dict().values()),
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
    shown_checkpoints = range(len(result.checkpoints))[:: -(-len(result.checkpoints) // 6)]  # six rows are enough to read
    for index in sorted({*shown_checkpoints, len(result.checkpoints) - 1}):
        step = result.checkpoints[index]
        rows.append([f"held-out loss after step {step}", *(f"{shown[name]['held_out_loss'][index]:.6f}" for name in names)])
    rows += [
        ["largest held-out difference", "-", *(f"{shown[name]['largest_held_out_difference']:.1e}" for name in names[1:])],
        ["largest weight difference", "-", *(f"{shown[name]['largest_weight_difference'][-1]:.1e}" for name in names[1:])],
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

    runs = shown["runs"]
    figure = Figure(figsize=(13, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1.55, 1.2, 0.95))
    factor = runs["packops"]["useful_tokens_per_second"] / runs["padded"]["useful_tokens_per_second"]
    title = f"Packed with packops, a Llama trains as if its documents had been padded, at {factor:.1f} times the speed"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.008, ha="left")
    draw_losses(axes[0], shown)
    draw_distances(axes[1], shown)
    draw_speed(axes[2], runs)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_losses(axes: Any, shown: dict[str, Any]) -> None:
    """The loss that is meant, on held-out documents, evaluated alike for all: the runs' own training losses are not comparable,
    as the careless one scores other things. Without the first steep steps, so that the curves fill the panel."""
    steps = shown["checkpoints"]
    first = next(index for index, step in enumerate(steps) if step >= steps[-1] // 6)
    looks = {
        "padded": {"linewidth": 7, "alpha": 0.6, "solid_capstyle": "round", "solid_joinstyle": "round"},
        "careless": {"linewidth": 1.4, "marker": "s", "markersize": 4},
        "packops": {"linewidth": 1.4, "marker": "o", "markersize": 4},
    }
    for name, look in looks.items():
        losses = shown["runs"][name]["held_out_loss"]
        label = f"{TITLES[name]}: {losses[-1]:.4f} at the end"
        axes.plot(steps[first:], losses[first:], color=COLOURS[name], label=label, **look)
    axes.set_title("Held-out loss, each document alone (lower is better)", loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean over documents of nats per token")
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper right", prop={"weight": "bold", "size": 9.5})


def draw_distances(axes: Any, shown: dict[str, Any]) -> None:
    steps = shown["checkpoints"]
    rounding = 2.0**-23 * shown["largest_weight"]  # at most one unit in the last place of that weight
    for name, marker in (("careless", "s"), ("packops", "o")):
        values = [max(value, rounding / 16) for value in shown["runs"][name]["largest_weight_difference"][1:]]
        axes.plot(steps[1:], values, color=COLOURS[name], marker=marker, markersize=4)
        axes.annotate(
            f"{TITLES[name]}: {values[-1]:.0e}", (steps[-1], max(values)), xytext=(0, 16), textcoords="offset points",
            ha="right", color=COLOURS[name], fontweight="bold", fontsize=9.5,
        )  # fmt: skip
    moved = shown["largest_weight_change"]
    axes.axhline(moved, color="0.5", linewidth=1, linestyle=":")
    axes.text(
        steps[-1], moved / 2, f"training moved a weight by up to {moved:.2f}", color="0.4", ha="right", va="top", fontsize=9
    )
    axes.axhspan(rounding / 32, rounding * 4, color="0.92", zorder=0)
    axes.text(steps[1], rounding / 24, "fp32 rounding", color="0.4", va="bottom", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(rounding / 32, 20)
    axes.set_title("Largest weight difference to the padded run", loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")


def draw_speed(axes: Any, runs: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    names = list(runs)
    speeds = [runs[name]["useful_tokens_per_second"] for name in names]
    bars = axes.barh(range(len(names)), speeds, color=[COLOURS[name] for name in names], height=0.55)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.6, -0.6)
    axes.set_title("Useful tokens per second", loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for bar, name, speed in zip(bars, names, speeds, strict=True):
        middle, factor = bar.get_y() + bar.get_height() / 2, "" if name == "padded" else f"  ({speed / speeds[0]:.1f}×)"
        axes.annotate(
            TITLES[name], (0, bar.get_y()), xytext=(2, 3), textcoords="offset points", color=COLOURS[name], fontweight="bold"
        )
        axes.annotate(
            f"{speed:,.0f}{factor}", (0, middle), xytext=(6, 0), textcoords="offset points", va="center", fontweight="bold",
            color="white" if name == "packops" else "black",
        )  # fmt: skip
