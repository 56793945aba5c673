# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A classifier that also supervises the columns inside of RevCol (section 3.3 of the paper, appendix B.1)."""

from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from ..heads.cls_heads import IntermediateSupervisionHead


@MODELS.register_module()
class IntermediateSupervisionClassifier(ImageClassifier):
    """RevCol under an :class:`IntermediateSupervisionHead`.

    The head sees the level-3 features of columns COL/4, COL/2, 3·COL/4 and COL, and in training also the image as the network
    sees it, after mixup, cutmix and erasing. With ``reversible=True`` in the backbone these columns are still not stored.

    Args:
        backbone (dict): a :class:`~revcol_mm.RevCol` whose number of columns is a multiple of four.
        head (dict): an :class:`IntermediateSupervisionHead`.
        **kwargs: ``data_preprocessor``, ``train_cfg``, ``init_cfg``… of :class:`mmpretrain.models.ImageClassifier`.

    Raises:
        ValueError: if the backbone or the head are of another kind, or do not fit each other.
    """

    def __init__(self, backbone: dict, head: dict, **kwargs) -> None:
        super().__init__(backbone=backbone, head=head, **kwargs)
        if self.with_neck:
            raise ValueError(f'neck={kwargs["neck"]!r}: the heads of intermediate supervision sit on the columns themselves')
        if not isinstance(self.head, IntermediateSupervisionHead):
            raise ValueError(f'head={type(self.head).__name__}: IntermediateSupervisionClassifier takes an '
                             'IntermediateSupervisionHead; for any other head use ImageClassifier')
        columns = getattr(self.backbone, 'num_columns', None)
        if columns is None or columns % 4:
            raise ValueError(f'backbone {type(self.backbone).__name__} with num_columns={columns}: intermediate supervision '
                             'takes a RevCol whose number of columns is a multiple of 4')
        if tuple(self.backbone.channels) != self.head.in_channels:
            raise ValueError(f'head in_channels={self.head.in_channels}: the channels of the backbone are '
                             f'{tuple(self.backbone.channels)}')
        #: (column, level) of each supervised feature.
        self.supervised = [(columns * quarter // 4 - 1, 3) for quarter in (1, 2, 3, 4)]

    def extract_feat(self, inputs: Tensor, stage: str = 'neck') -> tuple[Tensor, ...] | Tensor:
        """The four supervised features, (N, C3, H/32, W/32) each, or for ``stage='pre_logits'`` the last one, (N, C3)."""
        features = self.backbone(inputs, outputs=self.supervised)
        return self.head.pre_logits(features) if stage == 'pre_logits' else features

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict:
        """The terms of the compound loss; see :meth:`IntermediateSupervisionHead.loss`."""
        return self.head.loss(self.extract_feat(inputs), data_samples, images=self.restore_images(inputs))

    def restore_images(self, inputs: Tensor) -> Tensor:
        """The network's input, (N, 3, H, W), put back to [0, 1] by undoing the preprocessor's normalisation."""
        mean: Tensor | None = getattr(self.data_preprocessor, 'mean', None)
        pixels = inputs if mean is None else inputs * self.data_preprocessor.std + mean
        return pixels / 255
