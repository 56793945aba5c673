# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What every exported model shares: the image's way into the network, and the comparison of a file with torch."""
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from .rewrites import pad_corner

#: Packages whose types the export knows by name.
PACKAGES = ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'revcol_mm')
#: Largest accepted difference from torch of maps and scores, relative to the largest value.
TOLERANCE = 1e-4


def refuse(part: Any, what: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the type of a part is one of those whose arithmetic the export knows.

    Args:
        part (Any): the part.
        what (str): its place in the config.
        allowed (Sequence[str]): names of types. A class derived from one of them may compute something else, and is refused.
    """
    if type_name(part) not in allowed:
        raise ValueError(f'{what} must be a {" or ".join(allowed)} to be exported to ONNX, but got {type_name(part)}')


def type_name(part: Any) -> str:
    """The name of a part's type; with its module in front if this is none of OpenMMLab's packages or ours."""
    kind = type(part)
    return kind.__name__ if kind.__module__.partition('.')[0] in PACKAGES else f'{kind.__module__}.{kind.__name__}'


class Preprocessing(nn.Module):
    """Normalises and pads images as the data preprocessor of mmdet, mmseg or mmpretrain does for a test.

    Args:
        preprocessor (BaseDataPreprocessor): of the model.

    Raises:
        ValueError: for a preprocessor of another kind, or one for images that are not coloured.
    """

    def __init__(self, preprocessor: BaseDataPreprocessor) -> None:
        super().__init__()
        kind = type(preprocessor).__name__
        refuse(preprocessor, 'model.data_preprocessor', ('DetDataPreprocessor', 'SegDataPreProcessor', 'ClsDataPreprocessor'))
        self.normalizes = preprocessor._enable_normalize
        if self.normalizes:
            self.register_buffer('mean', preprocessor.mean)
            self.register_buffer('std', preprocessor.std)
        if kind == 'SegDataPreProcessor':
            padding = preprocessor.test_cfg or {}
            swaps, self.divisor, self.value = _swaps_channels(preprocessor), padding.get('size_divisor'), preprocessor.pad_val
            self.least = padding.get('size')
        else:
            swaps = preprocessor.to_rgb if kind == 'ClsDataPreprocessor' else _swaps_channels(preprocessor)
            self.divisor, self.value, self.least = preprocessor.pad_size_divisor, preprocessor.pad_value, None
        self.flips = not swaps  # the loader's images are BGR, those of the exported file RGB

    @property
    def pads(self) -> bool:
        """Whether images of some sizes are padded."""
        return (self.divisor or 1) > 1 or self.least is not None

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) -> float32 (N, 3, H', W')."""
        x = (images.flip(1) if self.flips else images).float()
        if self.normalizes:
            x = (x - self.mean) / self.std
        if not self.pads:
            return x
        shape = shape_of(x)
        if self.least is not None:
            missing = [(least - length).clamp(min=0) for least, length in zip(self.least, shape)]
        else:
            missing = [-length % self.divisor for length in shape]
        return pad_corner(x, *missing, value=self.value)


class ExportedNet(nn.Module):
    """Base of the networks from an image to its predictions, whose Python every size passes as a tensor.

    Args:
        model (nn.Module): the whole model of mmdet, mmseg or mmpretrain.

    Raises:
        ValueError: if a part of the model is of a kind that cannot be exported.
    """

    task = ''
    #: Names of outputs, and the free sizes of inputs and outputs, by dimension.
    outputs: tuple[str, ...] = ()
    axes: dict[str, dict[int, str]] = dict(images={0: 'batch', 2: 'height', 3: 'width'})
    #: Number of images of a check, and whether the original size is an input.
    batch, takes_size = 2, True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(model.data_preprocessor)
        self.model = model

    @property
    def settings(self) -> dict[str, Any]:
        """What the file tells of the network, and its runner needs."""
        return {}

    @staticmethod
    def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """The model's own predictions.

        Args:
            model (nn.Module): in eval mode.
            images (Tensor): uint8 RGB, (N, 3, H, W).
            size (tuple[int, int]): original height and width.

        Returns:
            list[dict[str, Tensor]]: the predictions of each image, by the names of the outputs, and what :meth:`compare` needs.
        """
        raise NotImplementedError

    def split(self, found: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The outputs of :meth:`forward`, or of the file, as :meth:`predict` returns them."""
        return [dict(zip(self.outputs, values)) for values in zip(*found)]

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
        """How far predictions of one image differ.

        Args:
            found (dict[str, Tensor]): predictions to check.
            expected (dict[str, Tensor]): those of the model itself.

        Returns:
            dict[str, float]: deviations by name; their upper bounds are in :attr:`limits`.
        """
        raise NotImplementedError

    #: Largest accepted deviations, by name.
    limits: dict[str, float] = {}

    @contextmanager
    def without_threshold(self, model: nn.Module) -> Iterator[None]:
        """Inside, this network and the model also predict what their threshold of scores drops, if they have one."""
        yield


def _swaps_channels(preprocessor: BaseDataPreprocessor) -> bool:
    # mmseg has its own name for it, onedl-mmsegmentation that of mmengine.
    return preprocessor.channel_conversion if hasattr(preprocessor, 'channel_conversion') else preprocessor._channel_conversion


def shape_of(images: Tensor) -> Tensor:
    """Height and width as a tensor, (2, ) int64, which an exported graph reads anew for every image."""
    return torch._shape_as_tensor(images)[-2:]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for other shapes or where a value is not finite."""
    if found.shape != expected.shape:
        return float('inf')
    if not expected.numel():
        return 0.
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return difference.nan_to_num(nan=float('inf')).item()


def bgr(images: Tensor) -> list[Tensor]:
    """Images as a loader gives them to the data preprocessor."""
    return list(images.flip(1))
