# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What a test has found, whatever the task, and pictures of it."""
import io
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

SHOWN = 4  # best and worst images
MOST_CURVES, MOST_NUMBERS = 20, 20  # classes up to which each has its curve, and a confusion its number

Curves = Sequence[tuple[str, tuple[np.ndarray, np.ndarray]]]


@dataclass
class Judged:
    """One image.

    Attributes:
        score (float): how good its predictions are, from 0 to 1.
        path (str): the file.
        draw (Callable): draws prediction and truth, given a visualizer and the name of the picture to write.
    """
    score: float
    path: str
    draw: Callable[[Any, str], None] = field(repr=False)


@dataclass
class Findings:
    """Everything that a page shows of a test.

    Attributes:
        table (dict): values of each class, by column and in the order of ``classes``.
        classes (Sequence[str]): names.
        confusion (np.ndarray): counts; rows are the truth, columns the predictions.
        confused (Sequence[str]): names of the rows and columns.
        judged_by (str): what the score of an image is.
        images (list[Judged]): the images, at least the best and the worst ones.
        curves (list): name of a class, and its recall and precision, each an array. Names may repeat. Default: [], none.
    """
    table: Mapping[str, Sequence[Any]]
    classes: Sequence[str]
    confusion: np.ndarray
    confused: Sequence[str]
    judged_by: str
    images: list[Judged]
    curves: Curves = field(default_factory=list)


def extremes(images: list[Judged], count: int = SHOWN) -> tuple[list[Judged], list[Judged]]:
    """The best images, from the best one on, and the worst ones, from the worst one on; none is in both."""
    ordered = sorted(images, key=lambda image: image.score)
    worst = ordered[:min(count, len(ordered) // 2)]
    return ordered[len(worst):][:-count - 1:-1], worst


def draw_curves(curves: Curves) -> bytes:
    """Precision against recall, one curve for each class; with many classes without a legend."""
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axis = figure.subplots()
    for name, (recall, precision) in curves:
        axis.plot(recall, precision, label=name, linewidth=1)
    axis.set(xlabel='recall', ylabel='precision', xlim=(0, 1.01), ylim=(0, 1.01))
    axis.grid(alpha=0.3)
    if len(curves) <= MOST_CURVES:
        axis.legend(fontsize=7, ncols=2, loc='lower left')
    return _png(figure)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Shares of each row, which is a true class; white where a row is empty."""
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    size = min(14, 2.5 + 0.4 * len(names))
    figure = Figure(figsize=(size + 1, size), layout='constrained')
    axis = figure.subplots()
    drawn = axis.imshow(shares, cmap='viridis', vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axis, shrink=0.8, label='share of the true class')
    axis.set(xlabel='prediction', ylabel='truth')
    if len(names) <= 60:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                axis.text(column, row, f'{share:.2f}', ha='center', va='center', fontsize=6,
                          color='black' if share > 0.6 else 'white')
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=90)
    return buffer.getvalue()
