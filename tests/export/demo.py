# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the tests of the export share: small models of the demo configs that find much, images, runs of a file."""
import functools
from pathlib import Path
from typing import Callable

import numpy as np
import onnxruntime
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from tests.common import CONFIGS

#: None of them is the one at which files are traced.
SIZES = [(97, 131), (32, 32), (33, 128), (160, 65), (64, 64), (128, 47), (75, 77)]
TRACED = (77, 101)
#: Factors that spread the scores, boxes and masks of random weights.
SPREAD = dict(rpn_cls=30, rpn_reg=10, fc_cls=10, fc_reg=20, conv_logits=10, conv_seg=100, cls_embed=30, mask_embed=2)


def make_model(name: str, change: Callable[[Config], None] = lambda cfg: None) -> nn.Module:
    """A demo config's model with as few columns as it takes, in eval mode. ``change`` edits the config."""
    cfg = Config.fromfile(CONFIGS / 'demo' / f'{name}.py')
    if 'data_preprocessor' not in cfg.model:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    if cfg.model.type != 'IntermediateSupervisionClassifier':  # which wants four
        cfg.model.backbone.arch.num_columns = 1
    change(cfg)
    # The random numbers that follow are the same, whether this test or another makes the model.
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(1)
        model = MODELS.build(cfg.model)
        model.init_weights()
    spread_scores(model)
    return model.eval()


@torch.no_grad()
def spread_scores(model: nn.Module) -> None:
    """Multiplies the last layers of the heads, so that a model with random weights finds much, and near-ties are rare."""
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(next((factor for part, factor in SPREAD.items() if part in key), 1))


def random_images(number: int, size: tuple[int, int]) -> Tensor:
    """uint8 RGB, (number, 3, \\*size): coarse squares under noise."""
    coarse = torch.rand(number, 3, -(-size[0] // 16), -(-size[1] // 16)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return ((coarse[..., :size[0], :size[1]] + torch.rand(number, 3, *size)) * 127.5).to(torch.uint8)


def other_size(size: tuple[int, int]) -> tuple[int, int]:
    """An original height and width that the resized image does not have."""
    return size[0] * 2 - 7, max(size[1] - 5, 1)


@functools.lru_cache(maxsize=2)
def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def run_file(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """Outputs of an ONNX file, by name."""
    session = session_of(path)
    found = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), found, strict=True)}
