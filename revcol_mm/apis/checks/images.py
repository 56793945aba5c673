# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Images that cannot be used: found before the run, or named in one sentence when they are met in it."""
import os.path as osp
from typing import Any, Mapping

import mmcv
import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose
from PIL import ExifTags, Image

from ..errors import LaunchError

#: Transforms of the three packages that read an image from a file with mmcv.
LOADERS = ('LoadImageFromFile', 'LoadImageFromFile2')


class SampleError(LaunchError):
    """An image that cannot be loaded or prepared. One sentence, also after its way out of a data loader's worker."""

    def __init__(self, message: str) -> None:
        # torch passes a worker's exception on as a text that ends in the traceback's last line.
        super().__init__(message.strip().splitlines()[-1].rpartition(f'{type(self).__name__}: ')[2])


class NamingPipeline(Compose):
    """A data set's pipeline, whose exceptions become a :class:`SampleError` that names the file.

    It also compares the size of every image with that of its annotation file, and looks at the label map of every sample: a
    value that is no class would end in an IndexError of a loss.

    Args:
        dataset (BaseDataset): the data set, whose pipeline is a plain Compose.
    """

    def __init__(self, dataset: BaseDataset) -> None:
        self.transforms = dataset.pipeline.transforms
        self.num_classes = len(dataset._metainfo.get('classes') or ()) if hasattr(dataset, 'label_map') else 0
        self.ignored = getattr(dataset, 'ignore_index', 255)

    def __call__(self, data: dict) -> dict | None:
        path, seg_map = data.get('img_path'), data.get('seg_map_path')
        said = {key: data[key] for key in ('width', 'height') if key in data}
        try:
            sample = super().__call__(data)
        except SampleError:
            raise
        except Exception as error:  # whatever a transform raises, its file must be known
            if not isinstance(path, str):
                raise
            for file in (path, seg_map) if isinstance(seg_map, str) else (path, ):
                reason = why_broken(file)
                if reason:
                    raise SampleError(f'{file} cannot be used: {reason}') from error
            raise SampleError(f'{path} cannot be used: {type(error).__name__}: {first_line(error)}') from error
        size = _loaded_size(sample)
        reason = size and why_other_size(size, said)
        if reason:
            raise SampleError(f'{path} cannot be used: {reason}')
        if self.num_classes:
            self._check_labels(sample, seg_map)
        return sample

    def _check_labels(self, sample: Any, path: Any) -> None:
        labels = getattr(sample.get('data_samples'), 'gt_sem_seg', None) if isinstance(sample, dict) else None
        if labels is None:
            return
        # A test compares at the original size.
        shape, fitting = tuple(labels.shape), [tuple(sample['inputs'].shape[-2:]), sample['data_samples'].get('ori_shape')]
        if shape not in fitting:
            raise SampleError(f'{path} cannot be used: a label map must have the size of its image, but after the transforms '
                              f'it is {shape[1]}×{shape[0]}, and the image {fitting[0][1]}×{fitting[0][0]} (width×height)')
        wrong = labels.data[(labels.data >= self.num_classes) & (labels.data != self.ignored)]
        if len(wrong):
            raise SampleError(f'{path} cannot be used: its label {torch.max(wrong).item()} is none of the {self.num_classes} '
                              'classes, which are numbered from 0')


def _loaded_size(sample: Any) -> tuple[int, int] | None:
    """Width and height of the image that a sample was made of; None if it does not tell."""
    if not isinstance(sample, dict):
        return None
    packed = sample.get('data_samples', sample)
    packed = packed[0] if isinstance(packed, (list, tuple)) and packed else packed  # of test-time augmentation
    shape = packed.get('ori_shape') if hasattr(packed, 'get') else None
    return None if shape is None else (shape[1], shape[0])


def first_line(error: Exception) -> str:
    return (str(error).strip() or 'no reason given').splitlines()[0]


def why_broken(path: str) -> str | None:
    """Why a local image cannot be read; None if it can, or if it is not local."""
    if '://' in path:
        return None
    try:
        if not osp.getsize(path):
            return 'the file is empty'
    except FileNotFoundError:
        return 'there is no such file'
    except OSError as error:
        return str(error)
    try:
        with Image.open(path) as image:
            image.load()
    except Image.DecompressionBombError:
        return None  # large, not broken
    except Image.UnidentifiedImageError:
        return None if mmcv.imread(path) is not None else 'the file cannot be read as an image'  # OpenCV knows other formats
    except (OSError, SyntaxError, ValueError) as error:
        return f'the file cannot be read as an image ({first_line(error)})'
    return None


def turns_images(dataset: BaseDataset) -> bool:
    """Whether the pipeline turns images as their EXIF entry says, which mmcv does unless it is told otherwise."""
    kind = getattr(next(iter(dataset.pipeline.transforms), None), 'color_type', 'color')
    return kind != 'unchanged' and not kind.endswith('ignore_orientation')


def brightest_of(path: str) -> int | None:
    """The largest value of a local image with more than 8 bits in its one channel; None for any other image."""
    try:
        with Image.open(path) as image:
            return int(np.asarray(image).max()) if image.mode.startswith('I') else None
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def keeps_upper_bits(dataset: BaseDataset) -> bool:
    """Whether the pipeline loads images of 16 bits with OpenCV into 8 bits, of which it keeps the upper ones."""
    first = next(iter(dataset.pipeline.transforms), None)
    return getattr(first, 'color_type', 'unchanged') != 'unchanged' and getattr(first, 'imdecode_backend', 'cv2') == 'cv2'


def size_of(path: str, turned: bool = True) -> tuple[int, int] | None:
    """Width and height of a local image as it is loaded; None if Pillow cannot tell.

    Args:
        path (str): the file.
        turned (bool): whether it is turned as its EXIF entry says. Default: True.
    """
    try:
        with Image.open(path) as image:
            # OpenCV turns TIFF files whatever it is told, and Pillow has the turned size of them from the beginning.
            across = turned and image.format != 'TIFF' and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if across else image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def why_other_size(size: tuple[int, int], info: Mapping[str, Any]) -> str | None:
    """Compares the width and height of an image with those of its entry in the annotation file, where it has them."""
    said = info.get('width', size[0]), info.get('height', size[1])
    if said != size:
        return (f'the image is {size[0]}×{size[1]}, but its annotation file says {said[0]}×{said[1]} (width×height, after it '
                'is turned as its EXIF entry says), so that its boxes would not fit')
    return None


def why_other_shape(shape: tuple[int, int], size: tuple[int, int] | None) -> str | None:
    """Compares the height and width of a label map with the width and height of its image."""
    if size and shape[::-1] != size:
        return f'the label map is {shape[1]}×{shape[0]}, but its image is {size[0]}×{size[1]} (width×height)'
    return None


def reads_local_images(dataset: BaseDataset) -> bool:
    """Whether the pipeline begins with a transform that reads an image file from the local disk."""
    first = next(iter(dataset.pipeline.transforms), None)
    backend = (getattr(first, 'backend_args', None) or {}).get('backend', 'local')
    return ((first is None or type(first).__name__ in LOADERS) and backend == 'local'
            and getattr(first, 'file_client_args', None) is None)
