"""How good a pipeline is: pictures with their truth, what is measured of them, tables, curves and grids."""

from flowsr.evaluation.curves import plot_dial, plot_training, read_others
from flowsr.evaluation.grids import bicubic_row, coupling_row, generated_grid, grid, upscale_pair
from flowsr.evaluation.measures import markdown_table, measure, measure_dial, measure_steps
from flowsr.evaluation.pairs import Pair, load_pairs

__all__ = [
    "Pair",
    "bicubic_row",
    "coupling_row",
    "generated_grid",
    "grid",
    "load_pairs",
    "markdown_table",
    "measure",
    "measure_dial",
    "measure_steps",
    "plot_dial",
    "plot_training",
    "read_others",
    "upscale_pair",
]
