# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The features of all columns and levels, from one forward pass of a whole model."""
from contextlib import contextmanager
from typing import Iterator

from mmengine.config import Config
from torch import Tensor

from ..apis.errors import LaunchError
from ..apis.inference import build_inferencer
from ..models.backbones.base import ColumnStack
from ..utils.planning import column_network


def build_analysed(cfg: Config, checkpoint: str, device: str | None = None):
    """The inferencer of the config's package, whose model has a network of columns and gathers no gradients of parameters.

    Args:
        cfg (Config): from :func:`revcol_mm.apis.config.load_config`.
        checkpoint (str): path or URL of a whole model.
        device (str | None): Default: None, a GPU if there is one.

    Returns:
        DetInferencer | MMSegInferencer | ImageClassificationInferencer: as :func:`~revcol_mm.apis.inference.build_inferencer`.

    Raises:
        LaunchError, CheckpointError: if the backbone is no network of columns, or as :func:`build_inferencer`, for example for
            the checkpoint of a folded network.
    """
    try:
        column_network(cfg)
    except (KeyError, ValueError) as error:  # KeyError: a type that no registry knows
        raise LaunchError(error.args[0]) from error
    inferencer = build_inferencer(cfg, checkpoint, device)
    inferencer.model.eval().requires_grad_(False)
    return inferencer


@contextmanager
def record_features(backbone: ColumnStack) -> Iterator[dict[tuple[int, int], Tensor]]:
    """Gathers the features of every forward pass that the backbone, in eval mode, runs in this context.

    They are the very tensors that the next level and the next column read, so that a later output can be differentiated by all
    of them in one backward pass. (Those that ``backbone(x, outputs=…)`` returns are contiguous copies: no output depends on
    the copies of inner columns.)

    Yields:
        dict: {(column, level): feature}, empty before the first pass: (N, C, H, W), in a :class:`RevColViT` (N, H·W, C).
    """
    features: dict[tuple[int, int], Tensor] = {}

    def keep(column: int):
        return lambda module, args, output: features.update({(column, level): y for level, y in enumerate(output)})

    handles = [column.register_forward_hook(keep(index)) for index, column in enumerate(backbone.columns)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
