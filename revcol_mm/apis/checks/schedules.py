# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Learning rates: accumulated batches, and schedules that end on one rate for all groups of parameters."""
from typing import Any, Iterator

from mmengine.config import Config
from mmengine.logging import print_log

from ...utils.configs import as_list, kind_of
from ..errors import LaunchError


def count_accumulation(cfg: Config) -> None:
    """Makes mmengine's scaling of the learning rate count the batches that are accumulated for one step of the optimizer.

    mmengine divides the batch size of one process times the number of processes by ``base_batch_size``.

    Raises:
        LaunchError: ``base_batch_size`` is missing.
    """
    uncounted = _uncounted(cfg)
    if uncounted is None:
        return
    scale, counts = uncounted
    scale['base_batch_size'], base = scale['base_batch_size'] / counts, scale['base_batch_size']
    scale['accumulative_counts'] = counts
    print_log(f'the learning rate is scaled for batches of {counts} times train_dataloader.batch_size, which are accumulated '
              f'(accumulative_counts={counts}): base_batch_size={base} becomes {scale["base_batch_size"]:g} per batch that is '
              'loaded', logger='current')


def check_accumulation(cfg: Config) -> None:
    """For tools that do not call :func:`count_accumulation`.

    Raises:
        LaunchError: the scaling of the learning rate ignores the accumulation, or has no ``base_batch_size``.
    """
    uncounted = _uncounted(cfg)
    if uncounted is not None:
        scale, counts = uncounted
        raise LaunchError(f'the scaling of the learning rate must count the accumulated batches, but accumulative_counts is '
                          f'{counts} and mmengine leaves it out: set auto_scale_lr.base_batch_size to '
                          f'{scale["base_batch_size"]}/{counts} and auto_scale_lr.accumulative_counts to {counts}')


def _uncounted(cfg: Config) -> tuple[dict, int] | None:
    """The settings of the scaling, and the accumulated batches that it does not count; None if there are none.

    Raises:
        LaunchError: the batch size to scale from is missing.
    """
    scale, counts = cfg.get('auto_scale_lr') or {}, (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    if not scale.get('enable') or counts == 1 or scale.get('accumulative_counts') == counts:
        return None
    if not scale.get('base_batch_size'):
        raise LaunchError('auto_scale_lr must have the base_batch_size that the learning rate is made for, but has '
                          f'{dict(scale)}: add it, or set auto_scale_lr.enable=False')
    return scale, counts


def check_schedulers(cfg: Config, repair: bool = True) -> None:
    """The target of a learning rate schedule must be relative where the groups of parameters have rates of their own.

    An absolute one would end all of them on one rate: layer-wise decay, ``lr_mult`` and ``--auto-scale-lr`` would be lost.

    Args:
        cfg (Config): the config.
        repair (bool): replace ``eta_min`` by the ``eta_min_ratio`` that means the same for the optimizer's rate. Default: True.

    Raises:
        LaunchError: for a schedule that has no relative target, or, without ``repair``, for any.
    """
    wrapper, schedulers = cfg.get('optim_wrapper') or {}, cfg.get('param_scheduler') or []
    paramwise = wrapper.get('paramwise_cfg') or {}
    decayed = any(value != 1 for value in _multipliers(paramwise))
    scaled = (cfg.get('auto_scale_lr') or {}).get('enable')
    if not decayed and not scaled:
        return
    why = ('the groups of parameters have learning rates of their own (paramwise_cfg)' if decayed else
           '--auto-scale-lr changes the learning rate')
    for index, scheduler in enumerate(as_list(schedulers)):
        kind = kind_of(scheduler)
        if 'LR' not in kind and not (kind.endswith('ParamScheduler') and scheduler.get('param_name') == 'lr'):
            continue
        name = f'param_scheduler[{index}] ({kind})'
        rate = (wrapper.get('optimizer') or {}).get('lr')
        if kind.startswith('OneCycle'):
            raise LaunchError(
                f'the target of {name} must be relative, because {why}, but eta_max is one rate for all: use '
                "dict(type='LinearLR', start_factor=1/25, …) followed by dict(type='CosineAnnealingLR', eta_min_ratio=4e-6, "
                f'…), and set optim_wrapper.optimizer.lr={scheduler.get("eta_max")}')
        if scheduler.get('eta_min') and scheduler.get('eta_min_ratio') is None:
            ratio = scheduler['eta_min'] / rate if rate else None
            if not (kind.startswith('Cosine') or kind == 'PolyLRRatio'):
                raise LaunchError(f'the target of {name} must be relative, because {why}, but eta_min={scheduler["eta_min"]} '
                                  'is one rate for all: set eta_min=0, or use CosineAnnealingLR with eta_min_ratio')
            if not repair or ratio is None:
                raise LaunchError(f'the target of {name} must be relative, because {why}, but eta_min={scheduler["eta_min"]} '
                                  f'is one rate for all: set eta_min_ratio={"…" if ratio is None else format(ratio, "g")} '
                                  'instead')
            del scheduler['eta_min']
            scheduler['eta_min_ratio'] = ratio
            print_log(f'{name}: eta_min={ratio * rate:g} becomes eta_min_ratio={ratio:g}, because {why}', logger='current')
        least = scheduler.get('min_value')
        if kind.startswith('ReduceOnPlateau') and least and not isinstance(least, (list, tuple)):
            raise LaunchError(f'the target of {name} must be relative, because {why}, but min_value={least} is one rate for '
                              'all: leave min_value out')


def _multipliers(node: Any) -> Iterator[float]:
    """Factors of learning rates in ``paramwise_cfg``: lr_mult, bias_lr_mult, …, layer_decay_rate, and mmseg's decay_rate."""
    if isinstance(node, dict):
        for key, value in node.items():
            if str(key).endswith(('lr_mult', 'decay_rate')) and isinstance(value, (int, float)):
                yield value
            else:
                yield from _multipliers(value)
