# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Runs without a GPU."""
import os
import subprocess
import warnings
from datetime import timedelta
from typing import Sequence

import torch
from mmengine.config import Config

from ..utils.configs import kind_of, replace_sync_bn
from .errors import LaunchError


def fit_to_cpu(cfg: Config) -> None:
    """Changes the settings that need a GPU, and warns of those that change the training.

    Mixed precision becomes float32, and SyncBN becomes BN. DDP gets no device ids, and FSDP gets the CPU as its device. The
    process group uses gloo and is initialised here, because mmengine calls CUDA with every backend.
    """
    wrapper = cfg.get('optim_wrapper')
    if kind_of(wrapper) == 'AmpOptimWrapper':
        warnings.warn('no GPU: training in float32 instead of mixed precision')
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
    for key in ('val_cfg', 'test_cfg'):
        if (cfg.get(key) or {}).get('fp16'):
            warnings.warn(f'no GPU: {key} runs in float32 instead of mixed precision')
            cfg[key].fp16 = False
    if replace_sync_bn(cfg.model) or cfg.get('sync_bn'):
        warnings.warn('no GPU: SyncBN becomes BN, whose statistics are those of one process')
        cfg.sync_bn = None
    logger = (cfg.get('default_hooks') or {}).get('logger')
    if logger:
        logger.interval = min(logger.get('interval', 10), 10)  # iterations take seconds here
    if cfg.launcher == 'none':
        return
    _init_gloo(cfg.launcher, ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout'))
    if kind_of(dict(type=cfg.get('runner_type'))) == 'FlexibleRunner' and not cfg.get('strategy'):
        cfg.strategy = dict(type='DDPStrategy')  # mmengine's default
    if cfg.get('strategy'):
        strategy = kind_of(cfg.strategy)
        if strategy == 'FSDPStrategy':
            cfg.strategy.setdefault('model_wrapper', dict(type='MMFullyShardedDataParallel'))
            cfg.strategy.model_wrapper.device_id = 'cpu'
        elif strategy == 'DDPStrategy':
            cfg.strategy.setdefault('model_wrapper', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
            cfg.strategy.model_wrapper.device_ids = None
    else:
        default = dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                       find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)


def _init_gloo(launcher: str, timeout: float | None = None) -> None:
    """``timeout``: seconds that a process waits for another. Default: None, torch's, half an hour."""
    if torch.distributed.is_initialized():
        return
    env = os.environ
    needed = dict(slurm=('SLURM_NODELIST', 'SLURM_PROCID', 'SLURM_NTASKS'),
                  mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE')).get(launcher, ())
    _check_environment(launcher, needed)
    if launcher == 'slurm':
        node = subprocess.run(['scontrol', 'show', 'hostname', env['SLURM_NODELIST']],
                              capture_output=True, text=True, check=True).stdout.split()[0]
        env.setdefault('MASTER_ADDR', node)
        env.update(RANK=env['SLURM_PROCID'], LOCAL_RANK=env.get('SLURM_LOCALID', '0'), WORLD_SIZE=env['SLURM_NTASKS'])
    elif launcher == 'mpi':
        env.update(RANK=env['OMPI_COMM_WORLD_RANK'], LOCAL_RANK=env['OMPI_COMM_WORLD_LOCAL_RANK'],
                   WORLD_SIZE=env['OMPI_COMM_WORLD_SIZE'])
        env.setdefault('MASTER_ADDR', '127.0.0.1')
    env.setdefault('MASTER_PORT', '29500')
    _check_environment(launcher, ('RANK', 'WORLD_SIZE', 'MASTER_ADDR'))
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise LaunchError(f'env_cfg.dist_cfg.timeout must be a positive number of seconds, but got {timeout!r}')
    torch.distributed.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))


def _check_environment(launcher: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise LaunchError(f'--launcher {launcher} needs environment variables that are not set: {", ".join(missing)}. Start '
                          'the processes with tools/dist_train.sh, torchrun or srun, or leave --launcher out for one process')
