# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The pictures of the analysis, with a map of colours that colour-blind readers and printers without colour keep apart."""
from typing import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..checkpoint.files import write_whole
from .layercam import HeatMaps
from .memory import ColumnBytes

COLOURS = 'viridis'


def draw_heat_maps(path: str, result: HeatMaps, title: str) -> None:
    """One row for each level, one column for each column of the network, over the grey image (figure 8)."""
    levels, columns = result.maps.shape[:2]
    height, width = result.image.shape[:2]
    side = max(0.9, min(1.8, 14 / (columns + 1)))
    figure = Figure(figsize=((columns + 1) * side + 1.2, levels * side * height / width + 0.9), layout='constrained')
    axes = figure.subplots(levels, columns + 1, squeeze=False)
    grey = result.image.mean(2)
    for axis in axes[:, 0]:
        axis.axis('off')
    axes[0, 0].imshow(result.image)
    axes[0, 0].set_title('image', fontsize=9)
    if result.box is not None:
        x1, y1, x2, y2 = result.box
        axes[0, 0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor='red', linewidth=1.5))
    for level in range(levels):
        for column in range(columns):
            axis = axes[level, column + 1]
            axis.imshow(grey, cmap='gray', vmin=0, vmax=255)
            drawn = axis.imshow(result.maps[level, column], cmap=COLOURS, vmin=0, vmax=1, alpha=0.7)
            axis.set(xticks=[], yticks=[])
            if level == 0:
                axis.set_title(f'column {column}', fontsize=9)
            if column == 0:
                axis.set_ylabel(f'level {level}', fontsize=9)
    bar = figure.colorbar(drawn, ax=axes[:, 1:], shrink=0.8, pad=0.01)
    bar.set_label("LayerCAM, share of each map's largest value", fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_grids(path: str, grids: Mapping[str, np.ndarray], title: str) -> None:
    """Annotated heat maps of one number for each level and column, side by side (figure 9)."""
    levels, columns = next(iter(grids.values())).shape
    figure = Figure(figsize=(len(grids) * (0.55 * columns + 1.9), 0.5 * levels + 1.5), layout='constrained')
    for axis, (name, values) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items()):
        _matrix(figure, axis, values, fontsize=8)
        axis.set(xlabel='column', ylabel='level', xticks=range(columns), yticks=range(levels))
        axis.set_title(name if len(name) <= 40 else f'{name[:38]} …', fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_between(path: str, between: Mapping[tuple, float], title: str) -> None:
    """All features against each other: the levels of the first column, then those of the second one, and so on."""
    places = list(dict.fromkeys(place for place, _ in between))
    values = np.array([[between[a, b] for b in places] for a in places])
    figure = Figure(figsize=(0.36 * len(places) + 2.2, 0.36 * len(places) + 1.6), layout='constrained')
    axis = figure.subplots()
    _matrix(figure, axis, values, fontsize=6, limits=(0, 1))
    levels = 1 + max(level for _, level in places)
    for edge in range(levels, len(places), levels):
        axis.axhline(edge - 0.5, color='white')
        axis.axvline(edge - 0.5, color='white')
    names = [f'{column}, {level}' for column, level in places]
    axis.set(xlabel='column, level', ylabel='column, level', xticks=range(len(places)), yticks=range(len(places)))
    axis.set_xticklabels(names, rotation=90, fontsize=8)
    axis.set_yticklabels(names, fontsize=8)
    axis.set_title(title, fontsize=10)
    _save(figure, path)


def draw_memory(path: str, counted: Sequence[ColumnBytes], title: str) -> None:
    """Bytes against the number of columns, in plain and in reversible training (figure 4)."""
    figure = Figure(figsize=(5.5, 3.6), layout='constrained')
    axis = figure.subplots()
    columns = [row.columns for row in counted]
    for way, marker in dict(plain='o', reversible='s').items():
        colour = dict(plain='#1f3b73', reversible='#d99000')[way]
        axis.plot(columns, [getattr(row, way) / 2**20 for row in counted], marker=marker, color=colour,
                  label=f'{way}: kept between forward and backward')
        axis.plot(columns, [getattr(row, f'{way}_peak') / 2**20 for row in counted], marker=marker, color=colour,
                  linestyle='--', markerfacecolor='white', label=f'{way}: largest moment, with gradients')
    axis.set(xlabel='number of columns', ylabel='MiB of the backbone', ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    _save(figure, path)


def _matrix(figure: Figure, axis, values: np.ndarray, fontsize: float, limits: tuple[float, float] | None = None) -> None:
    known = values[~np.isnan(values)]
    low, high = limits or (min(0., known.min(initial=0)), known.max(initial=0) or 1.)
    drawn = axis.imshow(values, cmap=COLOURS, vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        dark = not value > low + 0.6 * (high - low)
        axis.text(column, row, '–' if np.isnan(value) else f'{value:.2f}', ha='center', va='center', fontsize=fontsize,
                  color='white' if dark and not np.isnan(value) else 'black')
    figure.colorbar(drawn, ax=axis, shrink=0.8)


def _save(figure: Figure, path: str) -> None:
    with write_whole(path) as file:
        figure.savefig(file, format='png', dpi=120)
