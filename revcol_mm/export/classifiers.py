# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""mmpretrain's classifiers from the image to the scores."""
import torch.nn.functional as F
from torch import Tensor, nn

from .network import TOLERANCE, ExportedNet, refuse, relative_difference

HEADS = ('RevColClsHead', 'IntermediateSupervisionHead', 'LinearClsHead')


class ExportedClassifier(ExportedNet):
    """A classifier, for batches of images of one size.

    Args:
        model (ImageClassifier): the classifier.

    Raises:
        ValueError: for another head.
    """

    task, takes_size = 'classification', False
    outputs = ('scores', )
    axes = dict(ExportedNet.axes, scores={0: 'batch'})
    limits = dict(scores=TOLERANCE)

    def __init__(self, model: nn.Module) -> None:
        refuse(model.head, 'model.head', HEADS)
        super().__init__(model)

    def forward(self, images: Tensor) -> Tensor:
        """Predicts: uint8 RGB images (N, 3, H, W) -> scores (N, classes), which sum to 1."""
        return F.softmax(self.model.head(self.model.extract_feat(self.preprocessing(images))), dim=1)

    def split(self, found) -> list[dict[str, Tensor]]:
        return [dict(scores=scores) for scores in found[0]]

    @staticmethod
    def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        from mmpretrain.structures import DataSample
        data = dict(inputs=images.flip(1), data_samples=[DataSample() for _ in images])
        return [dict(scores=sample.pred_score.cpu()) for sample in model.test_step(data)]

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
        """Returns ``scores``, the largest difference, relative to the largest score."""
        return dict(scores=relative_difference(found['scores'], expected['scores']))
