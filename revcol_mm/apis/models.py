# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Models by name, and their predictions, alike for mmdet, mmseg and mmpretrain."""
import os
from typing import Any, Sequence

import numpy as np
from torch import nn

from .config import load_named_config


def init_model(name: str, checkpoint: str | None = 'zoo', device: str | None = None) -> nn.Module:
    """Builds the model of a config, in eval mode, with its weights.

    Args:
        name (str): name of one of the package's configs, such as ``'cascade_rcnn_revcol_t'``, or path of a config.
        checkpoint (str | None): ``'zoo'``, the published weights of this config, which are downloaded once; ``'zoo:NAME'``,
            those of another config; a path or URL of a whole model, also of a file of the authors' code; or None, random
            weights. Default: 'zoo'.
        device (str | None): Default: None, a GPU if there is one.

    Returns:
        nn.Module: a detector, segmentor or classifier. Its ``dataset_meta`` names the classes, and ``inferencer`` is the
        package's own, which also draws.

    Raises:
        LaunchError: if there is no such config or device, or if the model cannot be built.
        CheckpointError: if there are no such weights, if they cannot be downloaded or read, or if they do not fit the model.
        FileNotFoundError: if there is no such file.
    """
    from .inference import build_inferencer  # needs the packages of inference
    inferencer = build_inferencer(load_named_config(name), checkpoint, device)
    inferencer.model.inferencer = inferencer
    return inferencer.model


def predict(model: nn.Module, images: str | os.PathLike | np.ndarray | Sequence) -> Any:
    """Predicts on images, one after the other.

    Args:
        model (nn.Module): from :func:`init_model`.
        images (str | os.PathLike | np.ndarray | Sequence): file of an image, its pixels (H, W, 3) as uint8 BGR, or a sequence
            of these.

    Returns:
        DetDataSample | SegDataSample | DataSample: the package's own, on the CPU: ``pred_instances`` with ``bboxes`` (n, 4) in
        pixels of the image, ``scores`` (n), ``labels`` (n) and ``masks`` (n, H, W); ``pred_sem_seg.data`` (1, H, W); or
        ``pred_score`` (classes) and ``pred_label`` (1). For a sequence, a list of them.

    Raises:
        TypeError: if the model is not from :func:`init_model`.
        ValueError: if there is no such file, if it cannot be read as an image, or if pixels have another shape or dtype.
    """
    from .inference import predict_sample, read_image
    if not hasattr(model, 'inferencer'):
        raise TypeError(f'model must come from revcol_mm.apis.init_model, but got a {type(model).__name__} of another source')
    if isinstance(images, (list, tuple)):
        return [predict(model, image) for image in images]
    if isinstance(images, (str, os.PathLike)):
        images = os.fspath(images)
        try:
            read_image(images)  # OpenCV fills up what is cut off
        except ValueError as error:
            raise ValueError(f'{images}: {error}') from None
    elif not isinstance(images, np.ndarray) or images.ndim != 3 or images.shape[2] != 3 or images.dtype != np.uint8:
        shape = f'{images.dtype} {images.shape}' if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f'an image must be an array (H, W, 3) of uint8, BGR, but got {shape}')
    return predict_sample(model.inferencer, images)
