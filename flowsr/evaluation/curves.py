"""Curves: the dial among other systems, and the course of a training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np


def read_others(table: str) -> list[dict]:
    """Other systems from a CSV with the columns `system`, `psnr_y` and `lpips` of the same test set.

    Raises:
        ValueError: for a missing file or column, or a cell that is no number.
    """
    if not Path(table).is_file():
        raise ValueError(f"`--others`: there is no file {table}.")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = ("system", "psnr_y", "lpips")
    if not rows or not set(wanted) <= set(rows[0]):
        raise ValueError(
            f"`--others`: {table} needs the columns {', '.join(wanted)}, found {list(rows[0] if rows else [])}."
        )
    try:
        return [{"system": row["system"], **{name: float(row[name]) for name in wanted[1:]}} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--others`: a cell of {table} is no number ({error}).") from error


def plot_dial(result: dict, others: list[dict], picture: str | Path, title: str = "") -> None:
    """PSNR-Y against LPIPS: the dial by steps (solid) and fidelity (dashed), others, and the blends of any two.

    Args:
        result: of [`measure_dial`].
        others: of [`read_others`].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "steps" in row]
    if any("lpips" not in row for row in rows):
        raise ValueError(f"The curve needs LPIPS: {result['lpips']}.")
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for number, first in enumerate(others):
        for second in others[:number]:
            ends = [[each[name] for each in (first, second)] for name in ("psnr_y", "lpips")]
            axis.plot(*ends, color="0.85", linewidth=0.7, zorder=1)
    for other in others:
        axis.plot(other["psnr_y"], other["lpips"], "o", color="0.45", markersize=4, zorder=2)
        axis.annotate(
            other["system"], (other["psnr_y"], other["lpips"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    ends = [row for row in rows if row["fidelity"] in (0, 1)]  # the numbers of steps, from the faithful end on
    dial = [row for row in rows if row["steps"] in (1, ends[-1]["steps"])]  # the fidelities at the most steps
    for series, style in ((dial, "o--"), (ends, "o-")):
        axis.plot(
            [row["psnr_y"] for row in series], [row["lpips"] for row in series], style, color="tab:red", zorder=3
        )
    for row in rows:
        name = f"fidelity {row['fidelity']:g}" if row["fidelity"] else f"{row['steps']} steps"
        place = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 7, "color": "tab:red"}
        axis.annotate(name, (row["psnr_y"], row["lpips"]), **place)
    axis.set(xlabel="PSNR-Y, dB (more is better)", ylabel="LPIPS (less is better)", title=title)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def plot_training(metrics: Path, picture: Path) -> None:
    """Draws the loss and every validated number of a `metrics.jsonl` over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    validated = [record for record in records if record.get("event") == "validation"]
    kinds = [
        kind for kind in ("psnr_y", "ssim_y", "lpips") if any(f"{kind}_" in name for r in validated for name in r)
    ]
    figure, axes = pyplot.subplots(1, 1 + len(kinds), figsize=(5 * (1 + len(kinds)), 4), layout="constrained")
    axes = np.atleast_1d(axes)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    axes[0].semilogy(*zip(*losses))
    axes[0].set(title="loss", xlabel="optimiser steps")
    for axis, kind in zip(axes[1:], kinds):
        for name in sorted(
            {n for r in validated for n in r if n.startswith(kind)}, key=lambda n: int(n.split("_")[-1])
        ):
            points = [(record["step"], record[name]) for record in validated if name in record]
            axis.plot(*zip(*points), marker=".", label=f"{name.split('_')[-1]} steps")
        axis.set(title=kind, xlabel="optimiser steps")
        axis.legend()
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
