# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The memory that a backbone needs in training against its number of columns (figure 4)."""
import copy
import inspect
from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

import torch
from mmengine.config import Config

from ..utils.memory import count_step, without_memory
from ..utils.planning import Plan, column_network


@dataclass(frozen=True)
class ColumnBytes:
    """Bytes of a backbone with this number of columns.

    Attributes:
        columns: number of columns.
        parameters: of the backbone.
        plain, reversible: what lives between the forward and the backward pass, without parameters.
        plain_peak, reversible_peak: what lives at the largest moment, with the gradients.
    """
    columns: int
    parameters: int
    plain: int
    plain_peak: int
    reversible: int
    reversible_peak: int


def with_columns(cfg: Config, columns: int) -> Config:
    """A copy of a config whose backbone has another number of columns of the same size."""
    cfg = copy.deepcopy(cfg)
    kind = column_network(cfg)
    arch = cfg.model.backbone.get('arch', inspect.signature(kind).parameters['arch'].default)
    cfg.model.backbone.arch = dict(kind.read_arch(arch), num_columns=columns)
    return cfg


def count_columns(cfg: Config, columns: Sequence[int], shape: Sequence[int] | None = None, batch: int | None = None,
                  progress: Callable[[Iterable], Iterable] = iter) -> tuple[list[ColumnBytes], Plan]:
    """Counts the bytes of training the backbone with :func:`~revcol_mm.utils.memory.count_step`, without memory for it.

    Args:
        cfg (Config): a config whose backbone is a network of columns. It is not changed.
        columns (Sequence[int]): numbers of columns.
        shape, batch: height and width of the images, and their number. Default: None, as :class:`~.planning.Plan`.
        progress (Callable): wraps the numbers, for example in a progress bar. Default: iter.

    Returns:
        tuple: the bytes for each number of columns, and the last plan, which tells shape, batch and precision.

    Raises:
        ValueError: as :class:`~.planning.Plan`, or if the model cannot have so many columns.
    """
    column_network(cfg)
    counted = []
    for number in progress(columns):
        plan = Plan(with_columns(cfg, number), shape, batch)
        backbone, steps = plan.backbone, []
        for reversible in (False, True):
            backbone.reversible, backbone.stored_columns, backbone.with_cp = reversible, 0, False
            with without_memory(backbone) as net:
                images = torch.empty(plan.batch, backbone.in_channels, *plan.shape)
                steps.append(count_step(net, images, autocast=plan.autocast))
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
        counted.append(ColumnBytes(number, parameters, steps[0].kept, steps[0].peak_with_gradients, steps[1].kept,
                                   steps[1].peak_with_gradients))
    return counted, plan
