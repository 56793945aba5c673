# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""torchvision's Faster R-CNN on a RevCol, without mmdet: python examples/torchvision_faster_rcnn.py"""
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import revcol_mm


class Pyramid(nn.Module):

    def __init__(self, name: str, pretrained: bool, out_channels: int = 256) -> None:
        super().__init__()
        self.body = revcol_mm.create_model(name, pretrained=pretrained, features_only=True, drop_path_rate=0.3, reversible=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): feature for level, feature in enumerate(self.body(images))})


def build_detector(name: str = 'revcol_tiny', num_classes: int = 91, pretrained: bool = True, **kwargs) -> FasterRCNN:
    anchors = AnchorGenerator(((32, ), (64, ), (128, ), (256, )), ((0.5, 1.0, 2.0), ) * 4)  # of strides 4, 8, 16 and 32
    return FasterRCNN(Pyramid(name, pretrained), num_classes, rpn_anchor_generator=anchors, **kwargs)


if __name__ == '__main__':
    detector = build_detector()
    boxes, labels = torch.tensor([[100., 100., 300., 200.]]), torch.tensor([1])
    print(detector([torch.rand(3, 480, 640)], [dict(boxes=boxes, labels=labels)]))  # the losses of a training step
