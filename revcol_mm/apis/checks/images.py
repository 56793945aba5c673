# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Images that cannot be used: found before the run, or named in one sentence when they are met in it."""
import os.path as osp
from typing import Any

import mmcv
import torch
from mmengine.dataset import BaseDataset, Compose
from PIL import Image

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

    It also looks at the label map of every sample: a value that is no class would end in an IndexError of a loss.

    Args:
        dataset (BaseDataset): the data set, whose pipeline is a plain Compose.
    """

    def __init__(self, dataset: BaseDataset) -> None:
        self.transforms = dataset.pipeline.transforms
        self.num_classes = len(dataset._metainfo.get('classes') or ()) if hasattr(dataset, 'label_map') else 0
        self.ignored = getattr(dataset, 'ignore_index', 255)

    def __call__(self, data: dict) -> dict | None:
        path, seg_map = data.get('img_path'), data.get('seg_map_path')
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
            raise SampleError(f'{path} cannot be used: {type(error).__name__}: {_first_line(error)}') from error
        if self.num_classes:
            self._check_labels(sample, seg_map)
        return sample

    def _check_labels(self, sample: Any, path: Any) -> None:
        labels = getattr(sample.get('data_samples'), 'gt_sem_seg', None) if isinstance(sample, dict) else None
        if labels is None:
            return
        wrong = labels.data[(labels.data >= self.num_classes) & (labels.data != self.ignored)]
        if len(wrong):
            raise SampleError(f'{path} cannot be used: its label {torch.max(wrong).item()} is none of the {self.num_classes} '
                              'classes, which are numbered from 0')


def _first_line(error: Exception) -> str:
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
        return f'the file cannot be read as an image ({_first_line(error)})'
    return None


def reads_local_images(dataset: BaseDataset) -> bool:
    """Whether the pipeline begins with a transform that reads an image file from the local disk."""
    first = next(iter(dataset.pipeline.transforms), None)
    backend = (getattr(first, 'backend_args', None) or {}).get('backend', 'local')
    return ((first is None or type(first).__name__ in LOADERS) and backend == 'local'
            and getattr(first, 'file_client_args', None) is None)
