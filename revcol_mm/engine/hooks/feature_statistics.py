# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the features of every column look like while a network is trained."""
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...models.backbones.base import ColumnStack
from ...reversible import keep_invertible


@HOOKS.register_module()
class FeatureStatisticsHook(Hook):
    """Writes statistics of the features of every column and level, and the range of γ, into the log and the vis backends.

    Every ``interval`` iterations it reads the features of this iteration's batch as they leave each column, before any output
    norm, and reduces them to six numbers, which the JSON file, TensorBoard and all other vis backends get under
    ``features/column{i}/level{l}/{name}``, with both counted from 0; the text log gets them as a table:

    - ``std``: standard deviation of all values,
    - ``max``: largest value,
    - ``abs_max``: largest absolute value,
    - ``dead``: share of the channels that have the same value in the whole batch, at all positions of all images,
    - ``gamma_min``, ``gamma_max``: smallest and largest γ of the shortcut as the column uses it, with its sign; the first
      column has no shortcut, nor have the columns of :class:`~revcol_mm.models.HRNetColumns`, and those of
      :class:`~revcol_mm.models.RevNetConvNeXt` lie within the levels and are not reported.

    Features are not stored, and the gradients are bit for bit those without the hook, with and without ``reversible``. In
    training with several processes the numbers are those of the first one's part of the batch.

    Args:
        interval (int): iterations between two entries. Default: 50.

    Raises:
        ValueError: if ``interval`` is not a positive integer; when a training begins, if the model has no columns.
    """

    def __init__(self, interval: int = 50) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, but got {interval!r}')
        self.interval = interval
        self.statistics: dict[str, Tensor] = {}  # of this iteration
        self.handles: list = []

    def before_train(self, runner) -> None:
        if not self._columns(runner):
            raise ValueError('FeatureStatisticsHook needs a model with a network of columns, but '
                             f'{type(runner.model).__name__} has none: remove the hook')

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self.statistics, self.handles = {}, []
        if self.every_n_train_iters(runner, self.interval):
            self.handles = [column.register_forward_hook(self._reader(index))
                            for index, column in enumerate(self._columns(runner))]

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        for handle in self.handles:
            handle.remove()
        if self.statistics:
            values = torch.stack(list(self.statistics.values())).tolist()  # one transfer
            scalars = dict(zip(self.statistics, values))
            runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
            runner.logger.info(_table(scalars))
            self.statistics = {}

    @staticmethod
    def _columns(runner) -> list[nn.Module]:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        # A sharded column has all its parameters only inside of its wrapper.
        return [getattr(column, '_fsdp_wrapped_module', column)
                for module in model.modules() if isinstance(module, ColumnStack) for column in module.columns]

    def _reader(self, index: int):
        """A hook of column ``index``."""
        @torch.no_grad()
        def read(column: nn.Module, args, features: tuple[Tensor, ...]) -> None:
            if f'features/column{index}/level0/std' in self.statistics:  # with_cp runs a column again
                return
            gammas = getattr(column, 'gammas', None) or [None] * len(features)
            for level, (feature, gamma) in enumerate(zip(features, gammas)):
                feature = feature.detach()
                channels = feature.transpose(0, 1) if feature.dim() == 4 else feature.transpose(0, -1)
                channels = channels.flatten(1)  # (C, all positions of all images)
                low, high = channels.amin(1).float(), channels.amax(1).float()
                found = dict(std=feature.float().std(), max=high.amax(), abs_max=torch.maximum(high.amax(), -low.amin()),
                             dead=(low == high).float().mean())
                if gamma is not None and not column.first:
                    gamma = keep_invertible(gamma.detach()).float()
                    found.update(gamma_min=gamma.amin(), gamma_max=gamma.amax())
                self.statistics.update({f'features/column{index}/level{level}/{name}': value for name, value in found.items()})
        return read


def _table(scalars: dict[str, float]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for key, value in scalars.items():
        _, column, level, name = key.split('/')
        rows.setdefault(f'{column:9} {level}', {})[name] = value
    lines = ['statistics of the features of this batch:', f'{"":16} {"std":>9} {"max":>9} {"abs max":>9} {"dead":>6}   γ']
    for place, row in rows.items():
        gamma = f'{row["gamma_min"]:.3g} … {row["gamma_max"]:.3g}' if 'gamma_min' in row else '–'
        lines.append(f'{place:16} {row["std"]:9.3g} {row["max"]:9.3g} {row["abs_max"]:9.3g} {row["dead"]:6.1%}   {gamma}')
    return '\n'.join(lines)
