# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What an exported file tells about its images and labels, for programs that run it without the config."""
from pathlib import Path
from typing import Any, Mapping, Sequence

from mmengine.config import Config

from ..apis.inference import read_test_settings
from ..utils.configs import kind_of

#: Steps of a test pipeline that do not change the image.
SILENT = ('LoadAnnotations', 'PackDetInputs', 'PackSegInputs', 'PackInputs')


def describe(cfg: Config, meta: Mapping) -> dict[str, Any]:
    """The entries of a config and its checkpoint for the ``metadata`` of :func:`export_model`.

    Args:
        cfg (Config): config of the model.
        meta (Mapping): the checkpoint's.

    Returns:
        dict: ``config``, its name; ``classes``; ``palette``, RGB from 0 to 255, if there is one; and ``pipeline``, see
        :func:`image_steps`.

    Raises:
        LaunchError: if the config has no test data set with a pipeline.
        ValueError: if the test prepares images in a way that the file cannot describe.
    """
    steps, classes, palette = read_test_settings(cfg, meta)
    listed = classes and isinstance(palette, Sequence) and not isinstance(palette, str) and len(palette) >= len(classes)
    return dict(config=Path(cfg.filename).stem if cfg.filename else None, pipeline=image_steps(steps),
                classes=list(classes) if classes else None,
                palette=[list(map(int, color)) for color in palette[:len(classes)]] if listed else None)


def image_steps(pipeline: Sequence[Mapping]) -> list[dict[str, Any]]:
    """What a test pipeline does with an image between reading it and the network.

    Args:
        pipeline (Sequence[Mapping]): settings of the steps.

    Returns:
        list[dict]: steps in their order, each with its ``type``: ``Resize`` to ``scale`` (width, height), into which the image
        fits with ``keep_ratio``; ``ResizeEdge``, of the ``edge`` 'short', 'long', 'width' or 'height' to ``scale`` pixels;
        ``CenterCrop`` to ``crop_size`` (width, height). The first two have an ``interpolation`` and a ``backend``, 'cv2' or
        'pillow', as in mmcv.

    Raises:
        ValueError: for another step, or another kind of image than a coloured one.
    """
    steps = []
    for step in pipeline:
        kind, options = kind_of(step), {key: value for key, value in step.items() if key != 'type'}
        if kind == 'LoadImageFromFile':
            read = (options.get('color_type', 'color'), options.get('imdecode_backend') or 'cv2')
            if read != ('color', 'cv2') or options.get('to_float32'):
                raise ValueError("LoadImageFromFile of the test pipeline must read coloured uint8 images with 'cv2' to be "
                                 f'described in an ONNX file, but has {options}')
        elif kind == 'Resize' and options.get('scale') is not None:
            scale = options['scale']
            steps.append(dict(type=kind, scale=[scale, scale] if isinstance(scale, int) else list(scale),
                              keep_ratio=bool(options.get('keep_ratio', False)), **_interpolation(options)))
        elif kind == 'ResizeEdge':
            steps.append(dict(type=kind, scale=options['scale'], edge=options.get('edge', 'short'), **_interpolation(options)))
        elif kind == 'CenterCrop' and not options.get('auto_pad'):
            size = options['crop_size']
            steps.append(dict(type=kind, crop_size=[size, size] if isinstance(size, int) else list(size)))
        elif kind not in SILENT:
            raise ValueError('the test pipeline must consist of Resize with a scale, ResizeEdge, CenterCrop, loading and '
                             f'packing to be described in an ONNX file, but has {dict(step)}')
    return steps


def _interpolation(options: Mapping) -> dict[str, str]:
    return dict(interpolation=options.get('interpolation', 'bilinear'), backend=options.get('backend', 'cv2'))
