# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The data sets in numbers: what the checks count, and the table that the log shows once."""
from collections import Counter
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Collection, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table

from .common import leaves


@dataclass
class Record:
    """What is known of one data set.

    Attributes:
        classes (tuple[str, ...] | None): names in the order of the labels; None if unknown.
        images (int): number of images that are left after filtering.
        objects (Counter): number per label, of objects that count.
        ignored (int): number of objects that the file has and the data set leaves out or ignores, with crowds.
        empty (int): number of images without an object that counts.
        sizes (str): smallest and largest width and height of the images in pixels, as the annotation file says, or of those
            that were opened.
        areas (tuple[int, int, int] | None): number of small (below 32² pixels), medium and large (96² and more) objects.
        names (dict): names of the image files without folders, by image id, of a detection data set.
        paths (np.ndarray): hashes of the paths of the images, which need less memory than a million texts.
    """
    classes: tuple[str, ...] | None
    images: int = 0
    objects: Counter = field(default_factory=Counter)
    ignored: int = 0
    empty: int = 0
    sizes: str = ''
    areas: tuple[int, int, int] | None = None
    names: dict[Any, str] = field(default_factory=dict)
    paths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)


def spread(sizes: Collection[tuple[int, int]]) -> str:
    """The smallest and the largest of some widths and heights."""
    widths, heights = zip(*sizes)
    return f'{min(widths)}×{min(heights)} to {max(widths)}×{max(heights)}'


def table(loaders: Mapping[str, Any], records: Mapping[Any, Record]) -> str:
    """The data sets in numbers, as text.

    Args:
        loaders (Mapping): data loaders by name.
        records (Mapping[BaseDataset, Record]): by the data set.
    """
    rows = Table(title='Data', title_justify='left')
    for column in ('loader', 'data set', 'classes', 'images', 'without objects', 'objects', 'small/medium/large', 'ignored',
                   'image sizes'):
        rows.add_column(column, justify='left' if column in ('loader', 'data set') else 'right')
    for name, loader in loaders.items():
        for dataset in leaves(loader.dataset):
            record = records.get(dataset)
            if record is None:
                rows.add_row(name, type(dataset).__name__, '', str(len(dataset)))
                continue
            detection = record.areas is not None
            rows.add_row(name, type(dataset).__name__, str(len(record.classes)) if record.classes else '?', str(record.images),
                         str(record.empty) if detection else '', str(record.objects.total() or (0 if detection else '')),
                         '/'.join(map(str, record.areas or ())), str(record.ignored) if detection else '', record.sizes)
    console = Console(file=StringIO(), width=128)
    console.print(rows)
    return '\n' + console.file.getvalue().rstrip()
