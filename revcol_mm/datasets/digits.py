# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A small data set of real handwriting, made in seconds and without a download.

The 1,797 handwritten digits that come with scikit-learn (8×8 pixels each, from the UCI collection "Optical Recognition of
Handwritten Digits") are enlarged smoothly and pasted at several scales on textured backgrounds, some of them over others. One
call writes what detectors, segmentors and classifiers read::

    root/
    ├── digits.json                      how it was made: the data set's own mark
    ├── annotations/instances_{train,val}.json   COCO boxes and masks (RLE: digits have holes)
    ├── {train,val}/000000.jpg           images
    ├── semantic/{train,val}/000000.png  class of every pixel: 0 … 9 the digit, 10 the background
    └── crops/{train,val}/{0 … 9}/*.jpg  single digits, one folder a class

Training and validation share no handwriting sample. Which sample is on which side never depends on the seed, so that what was
pre-trained on one data set can be validated on another. A tuning set is made of the training side's handwriting alone, and
divides that again: settings are chosen on it without a look at the validation side.
"""
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

DIGITS = tuple('0123456789')
BACKGROUND = len(DIGITS)

_MARK = 'digits.json'
_MAKER = 'revcol_mm.datasets.digits'
_OWN_FOLDER = re.compile('annotations|(crops/|semantic/)?(train|val)|semantic|crops(/(train|val)/[0-9])?')
_OWN_FILE = re.compile(r'digits\.json|annotations/instances_(train|val)\.json|(train|val)/[0-9]{6,}\.jpg|'
                       r'semantic/(train|val)/[0-9]{6,}\.png|crops/(train|val)/[0-9]/[0-9]{4}_[0-9]\.jpg')
_FORMAT = 4  # raise it when the same arguments give other files

_SIDES = (28, 64)  # pixels of a digit's longer side
_OVERLAPPING = 0.25  # share of the digits that may be pasted over others
_MIN_VISIBLE = 0.6  # of each digit's pixels
_TRIES = 20  # places tried for one digit before it is left out
_CROP = 64
_CROPS_PER_SAMPLE = dict(train=4, val=1)


class Sample(NamedTuple):
    """One piece of handwriting: its number in scikit-learn's set, its class, and its ink in [0, 1], (8, 8)."""
    index: int
    label: int
    ink: np.ndarray


def make_digits(root: str | Path = 'data/digits', num_train: int = 1600, num_val: int = 200, size: int = 128,
                seed: int = 0, tuning: bool = False) -> bool:
    """Writes the data set, or does nothing where it was made with the same arguments before.

    The folder appears when it is complete. A data set that was made with other arguments is replaced; nothing else is.

    Args:
        root (str | Path): folder to make. Default: 'data/digits'.
        num_train (int): number of training images. Default: 1600.
        num_val (int): number of validation images. Default: 200.
        size (int): width and height of the images, in pixels. Default: 128.
        seed (int): the same arguments give the same bytes. Default: 0.
        tuning (bool): whether to make the tuning set, whose ``train`` and ``val`` are parts of the training side's
            handwriting, three quarters and one. Default: False.

    Returns:
        bool: whether anything was written.

    Raises:
        ValueError: for counts below 1, a size below 64, or a negative seed.
        FileExistsError: if ``root`` exists and is not a data set made here, or if it would be replaced and other files lie
            in it or in its folders.
        ImportError: without scikit-learn.
    """
    for name, value, least in (('num_train', num_train, 1), ('num_val', num_val, 1), ('size', size, 64), ('seed', seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f'{name} must be an integer of at least {least}, but got {value!r}')
    root = Path(root)
    made = dict(maker=_MAKER, format=_FORMAT, num_train=num_train, num_val=num_val, size=size, seed=seed)
    if tuning:
        made['tuning'] = True
    replaces = root.exists() or root.is_symlink()
    if replaces and _read_mark(root) == made:
        return False
    if replaces:
        _check_that_all_is_own(root)

    samples = _load_samples(tuning)
    root.parent.mkdir(parents=True, exist_ok=True)
    # A fresh folder inside the temporary one, since mkdtemp's own is readable by its owner only.
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch) / 'new'
        (new / 'annotations').mkdir(parents=True)
        for split, count in (('train', num_train), ('val', num_val)):
            _write_scenes(new, split, samples[split], count, size, seed)
            _write_crops(new, split, samples[split], seed)
        _write_json(made, new / _MARK)
        if replaces:
            os.rename(root, Path(scratch) / 'old')
        os.rename(new, root)
    return True


def _read_mark(root: Path) -> dict:
    """The arguments that the data set in ``root`` was made with."""
    try:
        made = json.loads((root / _MARK).read_text())
        own = made['maker'] == _MAKER and not root.is_symlink()
    except (OSError, ValueError, TypeError, KeyError):
        own = False
    if not own:
        raise FileExistsError(f'{root} exists and is not a data set that this tool made: choose another folder')
    return made


def _check_that_all_is_own(root: Path) -> None:
    """Raises FileExistsError if anything in ``root`` has a name that the tool does not give. The first one is named."""
    for folder, folders, files in os.walk(root):
        for names, own in ((folders, _OWN_FOLDER), (files, _OWN_FILE)):
            for name in sorted(names):
                path = Path(folder, name).relative_to(root)
                if not own.fullmatch(path.as_posix()):
                    raise FileExistsError(f'{root} must hold only files that this tool made to be replaced, but holds {path}: '
                                          'move it away, or choose another folder')


def _load_samples(tuning: bool) -> dict[str, list[Sample]]:
    """A quarter of every class for validation, the rest for training; for tuning, that rest is divided again."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits need scikit-learn, which is not installed: pip install scikit-learn') from error
    digits = load_digits()
    samples: dict[str, list[Sample]] = dict(train=[], val=[])
    order = np.random.default_rng(0).permutation(len(digits.target))
    for label in range(len(DIGITS)):
        own = [Sample(int(i), label, digits.images[i] / 16) for i in order if digits.target[i] == label]
        if tuning:
            own = own[len(own) // 4:]
        quarter = len(own) // 4
        samples['val'] += own[:quarter]
        samples['train'] += own[quarter:]
    return samples


def _write_scenes(root: Path, split: str, samples: list[Sample], count: int, size: int, seed: int) -> None:
    """Images, semantic maps and COCO annotations of one split."""
    (root / split).mkdir()
    (root / 'semantic' / split).mkdir(parents=True)
    images, annotations = [], []
    for index in track(range(count), description=f'{split} images'):
        rng = np.random.default_rng([seed, split == 'val', index])
        image, masks, used = _compose(rng, samples, size)
        name = f'{index:06d}'
        semantic = np.full((size, size), BACKGROUND, np.uint8)
        for mask, sample in zip(masks, used):
            semantic[mask] = sample.label
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=index, category_id=sample.label + 1, iscrowd=0, area=int(mask.sum()),
                bbox=coco_mask.toBbox(rle).tolist(), segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                sample=sample.index))
        _write_image(image, root / split / f'{name}.jpg')
        _write_image(semantic, root / 'semantic' / split / f'{name}.png')
        images.append(dict(id=index, file_name=f'{name}.jpg', width=size, height=size))
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(DIGITS)]
    _write_json(dict(images=images, annotations=annotations, categories=categories),
                root / 'annotations' / f'instances_{split}.json')


def _write_crops(root: Path, split: str, samples: list[Sample], seed: int) -> None:
    """Single digits that fill most of a small image, each sample on several backgrounds for training."""
    for name in DIGITS:
        (root / 'crops' / split / name).mkdir(parents=True)
    for sample in track(samples, description=f'{split} crops'):
        rng = np.random.default_rng([seed, 2 + (split == 'val'), sample.index])
        folder = root / 'crops' / split / DIGITS[sample.label]
        for copy in range(_CROPS_PER_SAMPLE[split]):
            image = _texture(rng, _CROP)
            alpha = _enlarge(sample.ink, int(rng.integers(_CROP * 3 // 5, _CROP)))
            margins = [_CROP - side for side in alpha.shape]
            top, left = (int(rng.integers(margin // 4, margin - margin // 4 + 1)) for margin in margins)  # about the middle
            _blend(rng, image, alpha, top, left)
            _write_image(image.astype(np.uint8), folder / f'{sample.index:04d}_{copy}.jpg')


def _compose(rng: np.random.Generator, samples: list[Sample], size: int) -> tuple[np.ndarray, list[np.ndarray], list[Sample]]:
    """One image, (size, size, 3), with the visible part of each digit, (size, size) bool, and the digit's sample."""
    image = _texture(rng, size)
    masks: list[np.ndarray] = []
    full_areas: list[int] = []
    used: list[Sample] = []
    largest = min(_SIDES[1], size // 2)
    for _ in range(int(rng.integers(2, 6))):
        sample = samples[int(rng.integers(len(samples)))]
        side = round(float(np.exp(rng.uniform(np.log(_SIDES[0]), np.log(largest)))))  # as many small as large ones
        alpha = _enlarge(sample.ink, side)
        may_overlap = rng.random() < _OVERLAPPING
        for _ in range(_TRIES):
            top, left = (int(rng.integers(0, size - length + 1)) for length in alpha.shape)
            mask = np.zeros((size, size), bool)
            mask[top:top + alpha.shape[0], left:left + alpha.shape[1]] = alpha > 0.5
            if _fits(mask, masks, full_areas, may_overlap):
                _blend(rng, image, alpha, top, left)
                masks = [other & ~mask for other in masks] + [mask]
                full_areas.append(int(mask.sum()))
                used.append(sample)
                break
    return image.astype(np.uint8), masks, used


def _fits(mask: np.ndarray, others: list[np.ndarray], full_areas: list[int], may_overlap: bool) -> bool:
    if may_overlap:
        return all((other & ~mask).sum() >= _MIN_VISIBLE * area for other, area in zip(others, full_areas))
    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    return not any((other & near).any() for other in others)


def _enlarge(ink: np.ndarray, side: int) -> np.ndarray:
    """Opacity in [0, 1] of a digit whose longer side is about ``side`` pixels, cut to its extent."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = np.pad(ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], 1)  # the margin lets strokes fade out
    scale = side / (max(ink.shape) - 2)
    alpha = cv2.resize(ink.astype(np.float32), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((alpha - 0.5) * 3 + 0.5, 0, 1)  # 8×8 pixels are blurred: steeper edges
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    alpha = alpha[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    return alpha[:side, :side]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Paper: coloured noise of three scales around a random light colour, (size, size, 3) float32 in [0, 255]."""
    image = np.full((size, size, 3), rng.uniform(130, 220, 3), np.float32)
    for cells, strength in ((3, 25), (12, 15), (size // 2, 10)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255)


def _blend(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray, top: int, left: int) -> None:
    """Paints a digit into the image, in ink of a random dark colour."""
    region = image[top:top + alpha.shape[0], left:left + alpha.shape[1]]
    region += alpha[..., None] * (rng.uniform(0, 90, 3).astype(np.float32) - region)


def _write_image(image: np.ndarray, path: Path) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f'{path} could not be written: make room, or choose another folder')


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, separators=(',', ':')))
