# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Label maps of semantic segmentation: whether their values are the classes that the model will learn."""
import time
from collections import Counter

import mmcv
import numpy as np
from mmengine.dataset import BaseDataset
from PIL import Image

from ...checkpoint.safe import first_names
from ..errors import LaunchError
from .common import name_of, steps_of, warn
from .images import SampleError, first_line, why_broken

SECONDS = 1  # that the search for classes which the sample does not show may take
LONGER = 10  # the same where the sample looks wrong
ENOUGH = 100  # maps of a mask's two values after which it is certain that they are masks


def check_number_of_classes(dataset: BaseDataset) -> None:
    """mmseg's loader reads maps as 8 bits per pixel: a number beyond them would silently be that of another class.

    Args:
        dataset (BaseDataset): one with label maps.

    Raises:
        LaunchError: it has more classes than such maps can tell apart.
    """
    if not any(getattr(getattr(step, '_load_seg_map', None), '__module__', '').startswith('mmseg.')
               for step in steps_of(dataset.pipeline)):
        return
    count = max(len(dataset._metainfo.get('classes') or ()), len(dataset.label_map or ()))  # those that are chosen, and all
    ignored, reduced = getattr(dataset, 'ignore_index', 255), bool(dataset.reduce_zero_label)
    limit = 254 if reduced else 256 - (ignored == 255)
    if count > limit:
        kept = 'reduce_zero_label=True takes two values' if reduced else f'{ignored} is ignored'
        raise LaunchError(f'{name_of(dataset)} must have at most {limit} classes, because mmseg loads label maps with 8 bits '
                          f'per pixel ({kept}), but it has {count}: merge classes, or load the maps with a transform of your '
                          'own')


class LabelMaps:
    """The values that the label maps of a data set of mmseg hold, as the files have them and as the model will see them.

    Args:
        dataset (BaseDataset): one of mmseg.
        loader (str): name of its data loader, 'train', 'val' or 'test'.
    """

    def __init__(self, dataset: BaseDataset, loader: str) -> None:
        self.dataset, self.loader = dataset, loader
        self.classes = dataset._metainfo.get('classes') or ()
        self.ignored = getattr(dataset, 'ignore_index', 255)
        self.reduced = bool(dataset.reduce_zero_label)
        self.pixels, self.raw, self.seen = Counter(), Counter(), set()

    def add(self, index: int, path: str) -> tuple[int, int]:
        """Counts the values of one map.

        Args:
            index (int): its number in the data set.
            path (str): the file.

        Returns:
            tuple[int, int]: its height and width.

        Raises:
            LaunchError: it has several channels, or a value that is neither a class nor ignored.
            SampleError: it cannot be read, or is too large for Pillow, with which mmseg reads it, too.
        """
        try:
            raw = mmcv.imread(path, flag='unchanged', backend='pillow')
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = why_broken(path) or f'{type(error).__name__}: {first_line(error)}'
            raise SampleError(f'the label map {path} cannot be used: {reason}') from error
        raw = raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw
        if raw.ndim != 2:
            raise LaunchError(f'the label map {path} must have one channel of class numbers, but its shape is {raw.shape}: '
                              'write an image in grey or with a palette')
        raw = raw.astype(np.uint8) if raw.dtype == bool else raw  # as mmseg reads an image of one bit per pixel
        self.seen.add(index)
        for value, count in zip(*(part.tolist() for part in np.unique(raw, return_counts=True))):
            self.raw[value] += count
            label = value
            if self.reduced:
                label = self.ignored if value in (0, 255) else value - 1
            label = (self.dataset.label_map or {}).get(label, label)
            self.pixels[label] += count
            if label != self.ignored and not 0 <= label < len(self.classes):
                first = int(self.reduced)
                raise LaunchError(
                    f'the values of label maps must be from {first} to {len(self.classes) - 1 + first} ({len(self.classes)} '
                    f'classes{", reduce_zero_label=True" * self.reduced}) or {self.ignored}, which is ignored, but {path} '
                    f'holds {value} ({count} pixels): correct the maps, or metainfo.classes and num_classes')
        return raw.shape

    def check(self) -> None:
        """Judges all maps together, and looks at more of them where the first ones lack classes.

        Raises:
            LaunchError: they are masks of 0 and 255, the classes begin at 0 although reduce_zero_label removes it, or only one
                class is left beside the ignored value.
        """
        suspicious = len(self._labels()) < 2
        self._search(LONGER if suspicious else SECONDS)
        labels, whole = self._labels(), len(self.seen) == len(self.dataset)
        unseen = [name for label, name in enumerate(self.classes) if label not in labels]
        if not unseen and len(labels) > 1:
            return
        count = len(self.classes)
        classes = f'the {count} classes' if count > 1 else 'at least two classes, the background counted'
        text = (f'the label maps of {self.loader}_dataloader must hold {classes}, but the values of '
                f'{len(self.seen)} of {len(self.dataset)} maps are {first_names(sorted(self.raw), 6)}, of which '
                + (f'0 and {self.ignored} count as ignored (reduce_zero_label=True)' if self.reduced else
                   f'{self.ignored} counts as ignored'))
        remedy = ': write class numbers into the maps (a mask of 0 and 255 as 0 and 1)'
        if count == 1:  # what is ignored teaches nothing, so that every pixel that is learned from is of this class
            remedy += ', and name the background as a class in metainfo.classes and num_classes'
        shifted = self.reduced and self.raw[0] and max(self.raw, key=lambda value: value % 255) == count - 1
        if shifted:  # the classes from 0 on, one more than can be left
            remedy = ': set reduce_zero_label=False in the data sets of all data loaders, because the maps number from 0'
        masks = set(self.raw) == {0, 255} and self.ignored == 255
        train = self.loader == 'train'
        certain = (masks and (whole or len(self.seen) >= ENOUGH)
                   or whole and len(labels) < 2 and self.pixels[self.ignored] > 0
                   or whole and shifted and train or not labels and whole)
        if certain:
            raise LaunchError(text + remedy)
        if suspicious and len(labels) < 2 or whole:
            warn(f'{len(unseen)} of {count} classes ({first_names(unseen)}) have no pixel: {text}' if unseen else text)

    def _search(self, seconds: float) -> None:
        started = time.monotonic()
        for index in range(len(self.dataset)):
            if len(self._labels()) >= max(len(self.classes), 2) or time.monotonic() - started > seconds:
                return
            if index not in self.seen:
                try:
                    self.add(index, self.dataset.get_data_info(index)['seg_map_path'])
                except SampleError:
                    continue  # a broken file, which the data loader names

    def _labels(self) -> list[int]:
        return [label for label, count in self.pixels.items() if count and label != self.ignored]
