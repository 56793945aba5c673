# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Whole models as ONNX files, from the image to boxes, masks, label maps or scores."""
import os.path as osp
import tempfile
import warnings
from typing import Any, Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..version import __version__
from .classifiers import ExportedClassifier
from .detectors import ExportedDINO, ExportedTwoStage
from .files import check_request, write_onnx
from .network import ExportedNet, type_name
from .rewrites import prepare
from .segmentors import ExportedSegmentor

#: Heights and widths at which a file is checked, odd ones among them, and the size at which it is traced, none of them.
SIZES, TRACED = ((256, 256), (225, 323), (320, 193)), (231, 309)
KINDS: dict[str, type[ExportedNet]] = dict(
    FasterRCNN=ExportedTwoStage, MaskRCNN=ExportedTwoStage, CascadeRCNN=ExportedTwoStage, TwoStageDetector=ExportedTwoStage,
    DINO=ExportedDINO, EncoderDecoder=ExportedSegmentor, ImageClassifier=ExportedClassifier,
    IntermediateSupervisionClassifier=ExportedClassifier)


def exported_net(model: nn.Module, **options) -> ExportedNet:
    """The network from the image to its predictions that a file holds. It shares its parts with the model.

    Args:
        model (nn.Module): a whole detector, segmentor or classifier.
        **options: ``logits`` of a segmentor.

    Returns:
        ExportedNet: the network.

    Raises:
        ValueError: if the model, or a part of it, is of a kind that cannot be exported. Nothing has been computed then.
    """
    kind = KINDS.get(type_name(model))
    if kind is None:
        raise ValueError(f'the model must be one of {", ".join(KINDS)} to be exported to ONNX, but is a {type_name(model)}: '
                         'export its backbone (--part backbone)')
    if options.get('logits') and kind is not ExportedSegmentor:
        raise ValueError(f'logits must be False for a {type(model).__name__}, because only segmentors have logit maps')
    return kind(model, **{key: value for key, value in options.items() if value})


def export_model(model: nn.Module, path: str, sizes: Sequence[tuple[int, int]] = SIZES, opset: int = 17, *,
                 logits: bool = False, half: bool = False, metadata: Mapping[str, Any] | None = None, force: bool = False
                 ) -> dict[tuple[int, int], dict[str, float]]:
    """Writes a whole model as one ONNX file that runs without PyTorch, in ONNX's own operators.

    Its inputs are ``images``, uint8 RGB (N, 3, H, W) as they come from the resize, N = 1 for two-stage detectors, and, except
    for classifiers and windows, ``size`` int64 (2, ), the height and width of the original image. Its outputs are those of the
    ``forward`` of the model's kind in :data:`KINDS`: boxes in the original image, scores and labels, and masks; label maps
    at the original size; scores. Height and width are free. The weights are folded and in float32.

    The file is run in onnxruntime on images of all sizes and compared with the model's own predictions before it appears.
    If a detector finds nothing in these images, a second file without the threshold of scores is compared, too.

    Args:
        model (nn.Module): a whole model of mmdet, mmseg or mmpretrain, with its weights. It does not change.
        path (str): the file. An earlier one stays as it was if the export fails.
        sizes (Sequence[tuple[int, int]]): heights and widths to check at. Default: :data:`SIZES`.
        opset (int): version of ONNX's operators, at least 17. Default: 17.
        logits (bool): whether a segmentor also returns the logits at the original size. Default: False.
        half (bool): whether convolutions and matrix products compute in float16, for GPUs. Default: False.
        metadata (Mapping | None): further entries for the file, such as :func:`describe` makes them. Default: None.
        force (bool): replace a file that exists. Default: False.

    Returns:
        dict: for each size, the deviations of the file from the model, by name; see ``compare`` of the model's kind.

    Raises:
        CheckpointError: if the file exists or cannot be written.
        ModuleNotFoundError: if onnx, onnxruntime, or for a detector torchvision is missing.
        ValueError: for a model that cannot be exported, sizes that it does not take, or a smaller ``opset``.
        RuntimeError: if the file predicts something else.
    """
    exported_net(model, logits=logits)  # refuses before anything is copied
    if any(min(size) < 1 for size in sizes):
        raise ValueError(f'sizes must be heights and widths of at least 1 pixel, but got {list(sizes)}')
    check_request(path, opset, force)
    trained = model.training
    model.eval()
    try:
        net = exported_net(prepare(model), logits=logits).eval()
        inputs = dict(images=make_images(1, TRACED))
        if net.takes_size:
            inputs['size'] = torch.tensor(original_size(TRACED))
        axes = {name: value for name, value in net.axes.items() if name in (*inputs, *net.outputs)}
        about = dict(task=net.task, version=f'revcol_mm {__version__}', license='Apache-2.0',
                     precision='float16' if half else 'float32', **net.settings)
        about.update(metadata or {})

        def write(file: str) -> dict:
            return write_onnx(net, inputs, net.outputs, axes, file, opset, lambda run: compare(model, net, run, sizes, half),
                              about, half, force)

        if predicts_something(model, net, sizes):
            return write(path)
        with net.without_threshold(model), tempfile.TemporaryDirectory() as folder:
            deviations = write(osp.join(folder, osp.basename(path)))
        write(path)
        return deviations
    finally:
        model.train(trained)


@torch.no_grad()
def predicts_something(model: nn.Module, net: ExportedNet, sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether the images that :func:`compare` makes have predictions: a trained detector may find nothing in them."""
    return any(len(value) for size in sizes for found in net.predict(model, make_images(net.batch, size), original_size(size))
               for value in found.values())


@torch.no_grad()
def compare(model: nn.Module, net: ExportedNet, run: Callable, sizes: Sequence[tuple[int, int]] = SIZES, half: bool = False
            ) -> dict[tuple[int, int], dict[str, float]]:
    """Runs a file and the model on the same images, whose original size is another.

    Args:
        model (nn.Module): the model.
        net (ExportedNet): what the file holds.
        run (Callable): runs the file, (images=array, …) -> list of tensors.
        sizes (Sequence[tuple[int, int]]): heights and widths. Default: :data:`SIZES`.
        half (bool): whether the file is in half precision, so that only gross errors count. Default: False.

    Returns:
        dict: for each size, the largest deviations, by name.

    Raises:
        RuntimeError: if a deviation is above its limit.
    """
    deviations = {}
    for size in sizes:
        images, original = make_images(net.batch, size), original_size(size)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of mmdet about its own way of making masks
            expected = net.predict(model, images, original)
        found = net.split(run(images=images.numpy(), **(dict(size=torch.tensor(original).numpy()) if net.takes_size else {})))
        each = [net.compare(*pair) for pair in zip(found, expected, strict=True)]
        worst = {name: max(deviation[name] for deviation in each) for name in each[0]}
        for name, value in worst.items():
            limit = net.limits[name]
            if not value <= limit and not half:
                raise RuntimeError(f'at {size[0]}×{size[1]}, the {name} of onnxruntime and of torch differ by {value:.2g}, but '
                                   f'at most {limit:g} is allowed; nothing was written')
        deviations[tuple(size)] = worst
    return deviations


def make_images(number: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Random uint8 images (number, 3, \\*size) with smooth areas and noise."""
    generator = torch.Generator().manual_seed(sum(size) + seed)
    areas = torch.rand(number, 3, size[0] // 16 + 1, size[1] // 16 + 1, generator=generator)
    noise = torch.rand(number, 3, *size, generator=generator)
    return (F.interpolate(areas, size=size, mode='bilinear') * 192 + noise * 63).to(torch.uint8)


def original_size(size: tuple[int, int]) -> tuple[int, int]:
    """Another height and width than those of the resized image, larger and smaller."""
    return size[0] * 3 // 2 + 1, max(size[1] * 4 // 5, 1)
