# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Classification heads of RevCol, and the decoders of intermediate supervision (section 2.3 and appendix D.1 of the paper)."""
from typing import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.evaluation.metrics import Accuracy
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..layers import Classifier, ConvNeXtBlock, LayerNorm2d, check_positive_int, init_weights

#: With more classes, as in ImageNet-22K, the decoders are a single projection (appendix D.1).
MAX_CLASSES_OF_PYRAMID_DECODER = 1000


class PyramidDecoder(nn.Module):
    """Rebuilds the image in steps: (N, C3, H/32, W/32) -> logits (N, 3, H, W).

    It has three stages of a 1×1 convolution to the width of the level below, LayerNorm, GELU, bilinear ×2 and one ConvNeXt
    block of expansion 1, and then a 1×1 convolution to 4×4 pixels.

    Args:
        channels (Sequence[int]): C0 … C3.
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
    """Rebuilds the image in one step, LayerNorm and a 1×1 convolution: (N, C3, H/32, W/32) -> logits (N, 3, H, W).

    Args:
        channels (int): C3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projback = nn.Sequential(
            LayerNorm2d(channels, eps=1e-6), nn.Conv2d(channels, 3 * 32 ** 2, 1), nn.PixelShuffle(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.projback(x)


@MODELS.register_module()
class RevColClsHead(ClsHead):
    """One classifier on the last column. Its parameters have the names of the authors' checkpoints, ``cls.classifier``.

    Args:
        num_classes (int): number of classes.
        in_channels (int): C3.
        init_scale (float): factor of the initial weight and bias of the Linear layer. The authors fine-tune with 0.001.
            Default: 1.
        **kwargs: ``loss``, ``topk``, ``cal_acc`` of :class:`mmpretrain.models.ClsHead`.

    Raises:
        ValueError: if ``num_classes`` is not a positive integer.
    """

    def __init__(self, num_classes: int, in_channels: int, init_scale: float = 1., **kwargs) -> None:
        super().__init__(**kwargs)
        check_positive_int('num_classes', num_classes)
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
    """Four classifiers and three decoders on the columns. Only the last classifier predicts.

    The loss (equation 4) is CE(last) + Σ_i [ a_i·BCE_i + b_i·CE_i ], where i = 0, 1, 2 for columns COL/4, COL/2 and 3·COL/4,
    a_i = reconstruction_weight·(1 − i/3) and b_i = classification_weight·(i + 1)/4: for early columns the reconstruction counts
    more, for late ones the classification. BCE compares the decoders' logits with the image in [0, 1], clamped to [0.01, 0.99].

    Args:
        num_classes (int): number of classes. The decoders are :class:`PyramidDecoder` for up to 1000 classes, and
            :class:`ProjectionDecoder` for more.
        in_channels (Sequence[int]): C0 … C3 of the backbone.
        reconstruction_weight (float): factor of all a_i. Default: 3.
        classification_weight (float): factor of all b_i. Default: 0.7.
        score_every_head (bool): whether every prediction holds the scores of all four classifiers, as ``head_scores`` (4,
            num_classes), for :class:`~revcol_mm.classification.HeadAccuracy`. Default: False.
        cal_acc (bool): whether to log the accuracy of every head in training. If mixup or cutmix has mixed labels, the label
            with the larger part counts. Default: False.
        **kwargs: ``loss``, ``topk`` of :class:`mmpretrain.models.ClsHead`.

    Raises:
        ValueError: if ``num_classes`` is not a positive integer, or ``in_channels`` does not have four numbers.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], reconstruction_weight: float = 3.,
                 classification_weight: float = 0.7, score_every_head: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        check_positive_int('num_classes', num_classes)
        if len(in_channels) != 4:
            raise ValueError(f'in_channels must be the channels of the four levels of the backbone, but got {in_channels!r}')
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
        """Returns the scores of the last classifier, (N, num_classes)."""
        return self.cls_blocks[-1](feats[-1])

    def scores(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Returns the scores of the four classifiers, (N, num_classes) each."""
        return [classifier(feature) for classifier, feature in zip(self.cls_blocks, feats)]

    def reconstruct(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Returns the images that the decoders rebuild from the first three features, as logits, (N, 3, H, W) each."""
        return [decoder(feature) for decoder, feature in zip(self.decoder_blocks, feats)]

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], images: Tensor) -> dict[str, Tensor]:
        """Returns the weighted terms of the compound loss.

        Args:
            feats (tuple[Tensor]): level-3 features of columns COL/4, COL/2, 3·COL/4 and COL, (N, C3, H/32, W/32) each.
            data_samples (list[DataSample]): the labels, as ``gt_score`` (soft labels) or ``gt_label``.
            images (Tensor): the images that the network got, in [0, 1], (N, 3, H, W), H and W multiples of 32.

        Returns:
            dict[str, Tensor]: ``loss_cls`` of the last head, ``loss_reconstruction{i}`` and ``loss_cls{i}`` of the inner heads,
            already weighted, so that the loss is their sum, and with ``cal_acc`` also ``head{i}_accuracy_top-{k}``.

        Raises:
            ValueError: if the size of the images is not a multiple of 32.
        """
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError('height and width of the images must be multiples of 32, because the decoders rebuild them from '
                             f'features at stride 32, but got {images.shape[-2]}×{images.shape[-1]} pixels')
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
        """Returns the predictions of the last classifier, with ``score_every_head`` also the softmax scores of all four."""
        if not self.score_every_head:
            return super().predict(feats, data_samples)
        scores = self.scores(feats)
        predictions = self._get_predictions(scores[-1], data_samples)
        for sample, heads in zip(predictions, torch.stack(scores, 1).softmax(-1)):
            sample.set_field(heads, 'head_scores')
        return predictions
