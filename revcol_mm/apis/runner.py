# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The runner of a run, and the end of its processes."""
import gc
import os.path as osp
from typing import Mapping

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn

from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpoint.kernels import kernels_of
from ..checkpoint.safe import some
from .checks import find_differences, place_of_backbones
from .cpu import fit_to_cpu
from .errors import LaunchError, build_errors


class CheckedLoading:
    """Refuses checkpoints that do not fit the model. Goes before a runner of mmengine in the list of base classes.

    mmengine's runners load what fits, and warn of the rest. A run that is tested or resumed needs every weight. A training that
    starts from ``load_from`` needs some: heads for other classes may differ, and mmengine's log lists what was left out.
    """

    #: Whether every weight of the model must be in the checkpoint, and the reverse.
    loads_whole_model = False

    def load_checkpoint(self, filename: str, map_location='cpu', strict: bool = False, **kwargs):
        """As mmengine's.

        Raises:
            CheckpointError: if the checkpoint cannot be read or does not fit.
        """
        if not self.loads_whole_model:
            self._check_some_fit(filename)
        try:
            strict = strict or self.loads_whole_model
            return super().load_checkpoint(filename, map_location=map_location, strict=strict, **kwargs)
        except CheckpointError:
            raise
        except RuntimeError as error:
            self._check_same_weights(filename)
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{filename} does not fit the config's model: {reason}") from error

    def resume(self, filename: str, *args, **kwargs) -> None:
        """As mmengine's; raises a CheckpointError for a checkpoint of another model."""
        self._check_same_weights(filename)
        super().resume(filename, *args, **kwargs)

    def _model(self) -> nn.Module:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _shapes(self) -> Mapping[str, torch.Size]:
        # A sharded model has shapes of its own; our strategy keeps those of the whole one.
        whole = getattr(getattr(self, 'strategy', None), 'shapes', None)
        return whole or {key: value.shape for key, value in self._model().state_dict().items()}

    def _check_same_weights(self, filename: str) -> None:
        if osp.isdir(filename):  # one of FSDP's local checkpoints
            return
        differences = find_differences(self._shapes(), _weights(filename))
        if differences:
            raise CheckpointError(f"{filename} does not fit the config's model: {differences}")

    def _check_some_fit(self, filename: str) -> None:
        if osp.isdir(filename):
            return
        model, own, weights = self._model(), self._shapes(), _weights(filename)
        # Some models rename weights while they load them, as mmdet's teachers and students do. Meta tensors are not copied.
        model._load_from_state_dict(weights, '', {}, False, [], [], [])
        if not any(key in own and value.shape == own[key] for key, value in weights.items()):
            raise CheckpointError(f"none of the weights of {filename} ({some(weights, 2)}) fits the config's model "
                                  f'({some(own, 2)}). {place_of_backbones(filename)}')
        sizes = [(value.shape[-1], own[key][-1]) for key, value in kernels_of(weights).items()
                 if key in own and value.dim() == 4 and value.shape != own[key] and value.shape[:2] == own[key][:2]]
        size, wanted = sizes[0] if sizes else (0, 0)
        padded = size < wanted and any(getattr(module, 'pad_pretrained', False) for module in model.modules())
        if sizes and not padded:
            remedy = f': python tools/pad_kernels.py {filename} --size {wanted}' if size < wanted else ''
            raise CheckpointError(f'{filename} has kernels of {size}×{size}, but the model has {wanted}×{wanted}{remedy}')


def _weights(filename: str) -> dict[str, Tensor]:
    """Names and shapes of a checkpoint's weights, without their values."""
    content = read_checkpoint(filename, map_location='meta', logger=None)
    return {key.removeprefix('module.'): value for key, value in content.get('state_dict', content).items()}


def build_runner(cfg: Config, loads_whole_model: bool = False) -> Runner | FlexibleRunner:
    """mmengine's Runner, or the one that the config's ``runner_type`` names, with :class:`CheckedLoading`.

    Args:
        cfg (Config): the config.
        loads_whole_model (bool): whether its checkpoint must hold the whole model, as for a test or when resuming. Default:
            False.

    Raises:
        LaunchError: for settings that the model, a hook or another part refuses, and for parts that do not go together.
    """
    sharded = str((cfg.get('strategy') or {}).get('type')).endswith('FSDPStrategy')
    if sharded and any(str(hook.get('type')).endswith('EMAHook') for hook in cfg.get('custom_hooks') or []):
        raise LaunchError('EMAHook copies the whole model, which is not possible with a sharded one. Without any custom hook: '
                          '--cfg-options custom_hooks="[]"; or leave this hook out in a config of your own')
    if get_device() == 'cpu':
        fit_to_cpu(cfg)
    with build_errors(cfg):
        kind = RUNNERS.get(cfg.runner_type) if 'runner_type' in cfg else Runner
        runner = type(kind.__name__, (CheckedLoading, kind), {}).from_cfg(cfg)
    runner.loads_whole_model = loads_whole_model
    return runner


def leave_process_group() -> None:
    """Ends a distributed run that went well: a process that exits with the group's threads alive can abort (gloo).

    What holds the group must be gone before: a sharded model does.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
