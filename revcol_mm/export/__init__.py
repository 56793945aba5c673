# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Export to ONNX: whole models, and backbones alone. It needs onnx and onnxruntime, for detectors also torchvision."""
from .backbone import export_backbone
from .metadata import describe
from .model import export_model, exported_net

export_onnx = export_backbone  # its name in version 0.1

__all__ = ['describe', 'export_backbone', 'export_model', 'exported_net']
