# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The runner with its checks of checkpoints, and the end of a distributed run."""
import copy
import gc
import os.path as osp
import textwrap
from typing import Mapping

import torch
from mmengine._strategy import SingleDeviceStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from .. import ops
from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpoint.kernels import compare_kernels
from ..checkpoint.loading import find_differences
from ..checkpoint.safe import first_names
from ..converters import to_current_names
from ..engine.workers import WorkersEndWithTraining
from ..utils.configs import kind_of
from .checks import place_of_backbones
from .cpu import fit_to_cpu
from .errors import LaunchError, build_errors
from .saving import SafeSaving


class CheckedLoading:
    """Refuses checkpoints that do not fit the model. It stands before a runner of mmengine in the list of base classes.

    mmengine's runners load the weights that fit, and only warn of the others. A run that tests or resumes needs all weights. A
    training that starts from ``load_from`` needs some: heads for other classes may differ, and mmengine logs what is left out.
    A file of weights alone, such as a ``.safetensors`` file, is a checkpoint, too, and so is a file of the authors' code.
    """

    #: Whether the checkpoint and the model must have the same weights.
    loads_whole_model = False
    #: What the checkpoint holds that was loaded last.
    loaded_keys: frozenset[str] = frozenset()

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_hook(_CurrentNames())

    def load_or_resume(self) -> None:
        """As mmengine's."""
        if isinstance(self, FlexibleRunner) and not self._has_loaded:
            for hook in self.hooks:
                if isinstance(hook, EMAHook):  # mmengine makes its model after loading, and EMAHook loads into that model
                    hook.before_run(self)
                    hook.before_run = lambda runner: None
        super().load_or_resume()

    def load_checkpoint(self, filename: str, map_location='cpu', strict: bool = False, **kwargs):
        """As mmengine's.

        Raises:
            CheckpointError: if the checkpoint cannot be read or does not fit.
        """
        if not self.loads_whole_model:
            self._check_some_fit(filename)
        try:
            # mmengine compares, because it knows the wrappers, and the weights that a model renames or pads.
            strict = strict or self.loads_whole_model
            return super().load_checkpoint(filename, map_location=map_location, strict=strict, **kwargs)
        except (CheckpointError, LaunchError, torch.cuda.OutOfMemoryError):
            raise
        except RuntimeError as error:
            differences = find_differences(*self._shapes_and_weights(filename), filename) or textwrap.shorten(str(error), 500)
            raise CheckpointError(f"{filename} does not fit the config's model: {differences}") from error

    def resume(self, filename: str, **kwargs) -> None:
        """As mmengine's; raises a CheckpointError for a checkpoint of another model."""
        if isinstance(self, FlexibleRunner):
            self.load_checkpoint(filename)  # because its resume() loads the weights that fit, without load_checkpoint()
            if isinstance(self.strategy, SingleDeviceStrategy):  # a file of the best weights holds neither
                kwargs = dict(resume_optimizer='optimizer' in self.loaded_keys,
                              resume_param_scheduler='param_schedulers' in self.loaded_keys, **kwargs)
        super().resume(filename, **kwargs)

    def _model(self) -> nn.Module:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def own_shapes(self) -> Mapping[str, torch.Size] | None:
        """Names and shapes of the model's weights; None for a model that another strategy than ours has sharded."""
        own = getattr(getattr(self, 'strategy', None), 'shapes', None)
        if own is None and not isinstance(self.model, FSDP):
            own = {key: value.shape for key, value in self._model().state_dict().items()}
        return own

    def _shapes_and_weights(self, filename: str) -> tuple[Mapping[str, torch.Size], dict[str, Tensor]]:
        """The shapes of the model's weights, and the weights of a file without their values, under the model's names.

        Both are empty where they cannot be compared: for a folder of FSDP's, and for a model that another strategy than ours
        has sharded, whose shapes are those of the shards.
        """
        own = self.own_shapes()
        if osp.isdir(filename) or own is None:
            return {}, {}
        model = self._model()
        content = to_current_names(read_checkpoint(filename, map_location='meta', logger=None), filename, own)
        weights = {key.removeprefix('module.'): value for key, value in content.get('state_dict', content).items()}
        # Some models rename weights while they load them, as mmdet's teachers and students do. Meta tensors are not copied.
        model._load_from_state_dict(weights, '', {}, False, [], [], [])
        return own, weights

    def _check_some_fit(self, filename: str) -> None:
        own, weights = self._shapes_and_weights(filename)
        if own and not any(key in own and value.shape == own[key] for key, value in weights.items()):
            raise CheckpointError(f"none of the weights of {filename} ({first_names(weights, 2)}) fits the config's model "
                                  f'({first_names(own, 2)}). {place_of_backbones(filename)}')
        pads = any(getattr(module, 'pad_pretrained', False) for module in self._model().modules())
        kernels = compare_kernels(own, weights, filename, pads)
        if kernels:
            raise CheckpointError(f'{filename} has {kernels}')


class _CurrentNames(Hook):
    """Converts files of the authors' code, and puts weights that are alone where mmengine looks for them."""

    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        current = to_current_names(checkpoint, 'the checkpoint', runner.own_shapes() or (), log=True)
        if current is not checkpoint:
            checkpoint.clear()
            checkpoint.update(current)
        if 'state_dict' not in checkpoint:
            weights = copy.copy(checkpoint)
            checkpoint.clear()
            checkpoint['state_dict'] = weights
        runner.loaded_keys = frozenset(checkpoint)


def build_runner(cfg: Config, loads_whole_model: bool = False, kept: Config | None = None) -> Runner | FlexibleRunner:
    """mmengine's Runner, or the one that the config's ``runner_type`` names, with :class:`SafeSaving`,
    :class:`WorkersEndWithTraining` and :class:`CheckedLoading`.

    Args:
        cfg (Config): the config.
        loads_whole_model (bool): whether the checkpoint and the model must have the same weights, as for a test and when
            resuming. Default: False.
        kept (Config | None): the config to write into the work folder, which a training can be repeated with: as the user has
            given it, without what this machine or this call changes. It never replaces the file that it was read from.
            Default: None, nothing is written.

    Raises:
        LaunchError: for settings that the model, a hook or another part refuses, and for parts that do not go together.
    """
    strategy = cfg.get('strategy') or {}
    name = kind_of(strategy)
    if name == 'FSDPStrategy' and strategy.get('state_dict_cfg', 'local') == 'local':
        raise LaunchError("FSDPStrategy's state_dict_cfg must be 'full', because a training cannot be resumed from checkpoints "
                          "of the kind 'local', its default: safe loading refuses them. Use strategy.type=RevColFSDPStrategy")
    if name.endswith('FSDPStrategy') and any(kind_of(hook).endswith('EMAHook') for hook in cfg.get('custom_hooks') or []):
        raise LaunchError('EMAHook copies the whole model, which is not possible with a sharded one. Without any custom hook: '
                          '--cfg-options custom_hooks="[]"; or leave this hook out in a config of your own')
    kind = cfg.get('runner_type', Runner)
    kind = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if kind is None:
        raise LaunchError(f'runner_type must be Runner, FlexibleRunner or another registered one, but got {cfg.runner_type!r}')
    with build_errors(cfg):
        _add_exact_resume(cfg)
        if get_device() == 'cpu':
            fit_to_cpu(cfg)
        runner = type(kind.__name__, (SafeSaving, WorkersEndWithTraining, CheckedLoading, kind), dict(
            dump_config=lambda runner: _keep_config(runner, kept))).from_cfg(cfg)
    runner.loads_whole_model = loads_whole_model
    runner.logger.info(ops.describe())
    return runner


def _keep_config(runner: Runner | FlexibleRunner, kept: Config | None) -> None:
    """In place of mmengine's, which writes what a test, a resumed run or a machine without a GPU has made of the config."""
    if kept is None or not is_main_process():
        return
    path = osp.join(runner.work_dir, osp.basename(kept.filename) if kept.filename else f'{runner.timestamp}.py')
    if kept.filename is None or osp.realpath(path) != osp.realpath(kept.filename):
        kept.dump(path)


def _add_exact_resume(cfg: Config) -> None:
    """Adds ExactResumeHook where a config does not name it. ``default_hooks.exact_resume=None`` leaves it out."""
    named = dict(cfg.get('default_hooks') or {})
    hooks = [*named.values(), *(cfg.get('custom_hooks') or [])]
    if not any(kind_of(hook).endswith('ExactResumeHook') for hook in hooks):
        named.setdefault('exact_resume', dict(type='ExactResumeHook'))
    if named.get('exact_resume', {}) is None:  # which mmengine refuses for a hook that is none of its own
        del named['exact_resume']
    cfg.default_hooks = named


def leave_process_group() -> None:
    """Ends a distributed run without errors. A process that exits while threads of its group are alive can abort (gloo).

    Objects that hold the group, such as a sharded model, must be deleted before.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
