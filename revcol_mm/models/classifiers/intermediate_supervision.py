# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A classifier that also supervises inner columns of RevCol (section 2.3 and appendix D.1 of the paper)."""
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from ..backbones.revcol import RevCol
from ..heads.cls_heads import IntermediateSupervisionHead


@MODELS.register_module()
class IntermediateSupervisionClassifier(ImageClassifier):
    """RevCol with an :class:`IntermediateSupervisionHead`.

    The head gets the level-3 features of columns COL/4, COL/2, 3·COL/4 and COL. In training it also gets the image that the
    network gets, after mixup, cutmix and erasing. With ``reversible=True`` in the backbone, these columns are not stored.

    Args:
        backbone (dict): a :class:`~revcol_mm.RevCol` whose number of columns is a multiple of 4.
        head (dict): an :class:`IntermediateSupervisionHead`.
        **kwargs: ``data_preprocessor``, ``train_cfg``, ``init_cfg``… of :class:`mmpretrain.models.ImageClassifier`.

    Raises:
        ValueError: if there is a neck, if the backbone or the head is of another kind, or if they do not fit each other.
    """

    def __init__(self, backbone: dict, head: dict, **kwargs) -> None:
        super().__init__(backbone=backbone, head=head, **kwargs)
        if self.with_neck:
            raise ValueError('neck must be None, because the heads of intermediate supervision read the columns themselves, '
                             f'but got {kwargs["neck"]!r}')
        if not isinstance(self.head, IntermediateSupervisionHead):
            raise ValueError('the head of an IntermediateSupervisionClassifier must be an IntermediateSupervisionHead, but got '
                             f'{type(self.head).__name__}: for any other head use ImageClassifier')
        columns = getattr(self.backbone, 'num_columns', None)
        if not isinstance(self.backbone, RevCol) or columns % 4:
            raise ValueError('intermediate supervision needs a RevCol whose number of columns is a multiple of 4, but got '
                             f'{type(self.backbone).__name__} with num_columns={columns}')
        if tuple(self.backbone.channels) != self.head.in_channels:
            raise ValueError(f'in_channels of the head must be the channels of the backbone, {tuple(self.backbone.channels)}, '
                             f'but got {self.head.in_channels}')
        #: (column, level) of each supervised feature.
        self.supervised = [(columns * quarter // 4 - 1, 3) for quarter in (1, 2, 3, 4)]

    def extract_feat(self, inputs: Tensor, stage: str = 'neck') -> tuple[Tensor, ...] | Tensor:
        """Returns the four supervised features, (N, C3, H/32, W/32) each; for 'pre_logits' the last one, pooled, (N, C3)."""
        features = self.backbone(inputs, outputs=self.supervised)
        return self.head.pre_logits(features) if stage == 'pre_logits' else features

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict:
        """Returns the terms of the compound loss; see :meth:`IntermediateSupervisionHead.loss`."""
        return self.head.loss(self.extract_feat(inputs), data_samples, images=self.restore_images(inputs))

    def restore_images(self, inputs: Tensor) -> Tensor:
        """Undoes the preprocessor's normalisation of the network's input, (N, 3, H, W), so that it is in [0, 1]."""
        mean: Tensor | None = getattr(self.data_preprocessor, 'mean', None)
        pixels = inputs if mean is None else inputs * self.data_preprocessor.std + mean
        return pixels / 255
