# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Classification heads of RevCol, and the decoders of intermediate supervision (section 3.3 of the paper, appendix B.1)."""
from typing import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.evaluation.metrics import Accuracy
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..layers import ConvNeXtBlock, LayerNorm2d, init_weights

#: More classes than this, and the decoders are a single projection: the heads of the larger data sets stay small.
MAX_CLASSES_OF_PYRAMID_DECODER = 1000


class Classifier(nn.Module):
    """Global average pool, LayerNorm, Linear: (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.LayerNorm(in_channels, eps=1e-6), nn.Linear(in_channels, num_classes))

    def pool(self, x: Tensor) -> Tensor:
        return self.classifier[0](x.mean((-2, -1)))  # (N, C, H, W) -> (N, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[1](self.pool(x))


class PyramidDecoder(nn.Module):
    """Rebuilds the image in steps: (N, C3, H/32, W/32) -> logits (N, 3, H, W).

    Three times a 1×1 convolution to the width of the level below, LayerNorm, GELU, bilinear ×2 and one ConvNeXt block of
    expansion 1, then a 1×1 convolution to 4×4 pixels.

    Args:
        channels: C0 … C3.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        widths = channels[::-1]
        self.proj_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, narrow, 1), LayerNorm2d(narrow, eps=1e-6), nn.GELU())
            for wide, narrow in zip(widths, widths[1:]))
        self.normal_layers = nn.ModuleList(nn.Sequential(ConvNeXtBlock(width, expansion=1)) for width in widths[1:])
        self.projback = nn.Sequential(nn.Conv2d(widths[-1], 3 * 4 ** 2, 1), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        for project, block in zip(self.proj_layers, self.normal_layers):
            x = block(F.interpolate(project(x), scale_factor=2, mode='bilinear', align_corners=True))
        return self.projback(x)


class ProjectionDecoder(nn.Module):
    """Rebuilds the image in one step: LayerNorm and a 1×1 convolution, (N, C3, H/32, W/32) -> logits (N, 3, H, W).

    Args:
        channels: C3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projback = nn.Sequential(
            LayerNorm2d(channels, eps=1e-6), nn.Conv2d(channels, 3 * 32 ** 2, 1), nn.PixelShuffle(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.projback(x)


@MODELS.register_module()
class RevColClsHead(ClsHead):
    """One classifier on the last column, with the parameter names of the authors' checkpoints, ``cls.classifier``.

    Args:
        num_classes (int): number of classes.
        in_channels (int): C3.
        init_scale (float): factor on the initial weight and bias of the Linear layer; the authors fine-tune with 0.001.
            Default: 1.
        **kwargs: ``loss``, ``topk``, ``cal_acc`` of :class:`mmpretrain.models.ClsHead`.

    Raises:
        ValueError: if ``num_classes`` is not a positive integer.
    """

    def __init__(self, num_classes: int, in_channels: int, init_scale: float = 1., **kwargs) -> None:
        super().__init__(**kwargs)
        _check_num_classes(num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.cls = Classifier(in_channels, num_classes)
        self.apply(init_weights)
        with torch.no_grad():
            for parameter in self.cls.classifier[1].parameters():
                parameter.mul_(init_scale)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.cls.pool(feats[-1])

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.cls(feats[-1])


@MODELS.register_module()
class IntermediateSupervisionHead(ClsHead):
    """Four classifiers and three decoders on the columns; predictions come from the last classifier alone.

    Loss = CE(last) + Σ_i [ a_i·BCE_i + b_i·CE_i ], i = 0, 1, 2 for columns COL/4, COL/2 and 3·COL/4, with
    a_i = reconstruction_weight·(1 − i/3) and b_i = classification_weight·(i + 1)/4: shallow columns keep what is in the image,
    deep ones what it shows. BCE compares the decoders' logits with the image in [0, 1], clamped to [0.01, 0.99].

    Args:
        num_classes (int): number of classes. Up to 1000 classes the decoders are :class:`PyramidDecoder`, above
            :class:`ProjectionDecoder`.
        in_channels (Sequence[int]): C0 … C3 of the backbone.
        reconstruction_weight (float): Default: 3.
        classification_weight (float): Default: 0.7.
        score_every_head (bool): keep the scores of all four classifiers in every prediction, as ``head_scores`` (4,
            num_classes), for :class:`~revcol_mm.classification.HeadAccuracy`. Default: False.
        cal_acc (bool): log the accuracy of every head in training; labels mixed by mixup or cutmix count as their larger
            part. Default: False.
        **kwargs: ``loss``, ``topk`` of :class:`mmpretrain.models.ClsHead`.

    Raises:
        ValueError: if ``num_classes`` or ``in_channels`` are out of range.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], reconstruction_weight: float = 3.,
                 classification_weight: float = 0.7, score_every_head: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        _check_num_classes(num_classes)
        if len(in_channels) != 4:
            raise ValueError(f'in_channels={in_channels!r}: the widths of the four levels of the backbone')
        self.num_classes, self.in_channels = num_classes, tuple(in_channels)
        self.score_every_head = score_every_head
        self.reconstruction_weights = [reconstruction_weight * (1 - i / 3) for i in range(3)]
        self.classification_weights = [classification_weight * (i + 1) / 4 for i in range(3)]
        self.cls_blocks = nn.ModuleList(Classifier(self.in_channels[3], num_classes) for _ in range(4))
        self.decoder_blocks = nn.ModuleList(
            PyramidDecoder(self.in_channels) if num_classes <= MAX_CLASSES_OF_PYRAMID_DECODER
            else ProjectionDecoder(self.in_channels[3]) for _ in range(3))
        self.apply(init_weights)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.cls_blocks[-1].pool(feats[-1])

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Scores of the last classifier, (N, num_classes)."""
        return self.cls_blocks[-1](feats[-1])

    def scores(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Scores of the four classifiers, (N, num_classes) each."""
        return [classifier(feature) for classifier, feature in zip(self.cls_blocks, feats)]

    def reconstruct(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """The image as rebuilt from the first three features, logits, (N, 3, H, W) each."""
        return [decoder(feature) for decoder, feature in zip(self.decoder_blocks, feats)]

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the compound loss.

        Args:
            feats: level-3 features of columns COL/4, COL/2, 3·COL/4 and COL, (N, C3, H/32, W/32) each.
            data_samples: with ``gt_score`` (soft labels) or ``gt_label``.
            images: what the network saw, in [0, 1], (N, 3, H, W), H and W multiples of 32.

        Returns:
            dict[str, Tensor]: ``loss_cls`` of the last head; ``loss_reconstruction{i}`` and ``loss_cls{i}`` of the inner ones,
            already weighted, so that the loss is their sum; with ``cal_acc`` also ``head{i}_accuracy_top-{k}``.

        Raises:
            ValueError: if the size of the images is not a multiple of 32.
        """
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(f'images of {images.shape[-2]}×{images.shape[-1]} pixels: intermediate supervision rebuilds the '
                             'image from features at 1/32 of its size, so height and width must be multiples of 32')
        soft = 'gt_score' in data_samples[0]
        if soft:
            target = torch.stack([sample.gt_score for sample in data_samples])
        else:
            target = torch.cat([sample.gt_label for sample in data_samples])
        scores = self.scores(feats)
        classification = [self.loss_module(score, target, avg_factor=len(score)) for score in scores]
        images = images.float().clamp(0.01, 0.99)
        losses = dict(loss_cls=classification[-1])
        for i, reconstruction in enumerate(self.reconstruct(feats)):
            bce = F.binary_cross_entropy_with_logits(reconstruction.float(), images)
            losses[f'loss_reconstruction{i}'] = self.reconstruction_weights[i] * bce
            losses[f'loss_cls{i}'] = self.classification_weights[i] * classification[i]
        if self.cal_acc:
            labels = target.argmax(1) if soft else target
            for i, score in enumerate(scores):
                accuracies = Accuracy.calculate(score, labels, topk=self.topk)
                losses.update({f'head{i}_accuracy_top-{k}': value for k, (value, ) in zip(self.topk, accuracies)})
        return losses

    def predict(self, feats: tuple[Tensor, ...],
                data_samples: list[DataSample | None] | None = None) -> list[DataSample]:
        """Predictions of the last classifier, and with ``score_every_head`` the softmax scores of all, for evaluation."""
        if not self.score_every_head:
            return super().predict(feats, data_samples)
        scores = self.scores(feats)
        predictions = self._get_predictions(scores[-1], data_samples)
        for sample, heads in zip(predictions, torch.stack(scores, 1).softmax(-1)):
            sample.set_field(heads, 'head_scores')
        return predictions


def _check_num_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f'num_classes={num_classes!r}: a positive integer')
