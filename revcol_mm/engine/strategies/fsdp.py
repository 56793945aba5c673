# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Sharded training of models that are too large for one GPU."""
from logging import WARNING
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.logging import print_log
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType, StateDictType

from ...checkpoint import CheckpointError
from ...reversible import ReversibleColumn


def column_network_wrap_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: every column is a unit, and the rest of the model is another unit.

    The parameters of a unit are gathered while it runs, so that a process holds those of one or two columns at a time.
    """
    return recurse or isinstance(module, ReversibleColumn)


@STRATEGIES.register_module()
class RevColFSDPStrategy(FSDPStrategy):
    """Shards parameters, gradients and optimizer states over the processes, also over CPU processes.

    Example::

        tools/dist_train.sh CONFIG 8 --cfg-options runner_type=FlexibleRunner strategy.type=RevColFSDPStrategy

    It differs from mmengine's strategy in these points: every column is a unit of its own; gradients are clipped by the norm of
    the whole model, not of each process's shards; a checkpoint is one file that every other tool reads, and a run can be
    resumed from it with today's torch, and from a checkpoint of a run without sharding; weights of another shape are left out,
    with a line in the log, as without sharding; and no GPU is needed.

    Args:
        model_wrapper (dict, optional): arguments of ``MMFullyShardedDataParallel``: ``mixed_precision``, ``cpu_offload``, …
            Default: ``auto_wrap_policy=column_network_wrap_policy``.
        state_dict_cfg (str | dict): 'full', or mmengine's dict with ``state_dict_type='FULL_STATE_DICT'``: one file. Default:
            'full'.
        **kwargs: those of mmengine's ``FSDPStrategy``.

    Raises:
        ValueError: for another ``state_dict_cfg``, such as 'local'. Those files hold objects that safe loading refuses.
    """

    def __init__(self, *, model_wrapper: dict | None = None, state_dict_cfg: str | dict = 'full', **kwargs) -> None:
        model_wrapper = dict(model_wrapper or {})
        model_wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        model_wrapper.setdefault('auto_wrap_policy', column_network_wrap_policy)
        if get_device() == 'cpu':
            model_wrapper['device_id'] = 'cpu'
            if state_dict_cfg == 'full':  # mmengine's setting moves tensors to the CPU, which fails for tensors that are there
                state_dict_cfg = dict(
                    state_dict_type='FULL_STATE_DICT', state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
                    optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True))
        super().__init__(model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if self.state_dict_type != StateDictType.FULL_STATE_DICT:
            raise ValueError("state_dict_cfg must be 'full', because a training cannot be resumed from checkpoints of other "
                             f'kinds: safe loading refuses them; but got {state_dict_cfg!r}')

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        self.shapes = {key: value.shape for key, value in model.state_dict().items()}
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        optim_wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(optim_wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            optim_wrapper.clip_func = lambda parameters, **kwargs: self.model.clip_grad_norm_(**kwargs)
        return optim_wrapper

    def load_model_state_dict(self, state_dict: dict, *, strict: bool = False, **kwargs) -> None:
        state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}  # as without sharding
        if not strict:
            different = [key for key, value in state_dict.items() if value.shape != self.shapes.get(key, value.shape)]
            if different:
                print_log(f'not loaded, because the model has other shapes: {", ".join(different)}', 'current', WARNING)
            state_dict = {key: value for key, value in state_dict.items() if key not in different}
        super().load_model_state_dict(state_dict, strict=strict, **kwargs)

    def optim_state_dict(self) -> dict:
        # torch keeps the entries of an optimizer only. The wrapper adds others: the learning rate that the log shows as
        # base_lr, and the loss scale.
        return {**self._gather_optimizer(), **_entries_of_wrapper(self.optim_wrapper.state_dict())}

    def _gather_optimizer(self) -> dict:
        if get_device() != 'cpu':
            return super().optim_state_dict()
        # torch gathers all kinds of state (such as both moments of Adam) into the same memory, and copies it only from a GPU.
        # On the CPU all kinds would have the values of the last one, so a call of its own gathers each kind.
        own, whole = self.optim_wrapper.state_dict(), {}
        kinds = sorted({kind for names in all_gather_object([kind for state in own['state'].values() for kind in state])
                        for kind in names}) or [None]
        for kind in kinds:
            part = {key: {kind: state[kind]} for key, state in own['state'].items() if kind in state}
            found = FSDP.optim_state_dict(self.model, self.optim_wrapper, dict(own, state=part))
            for name, state in found.pop('state', {}).items():
                whole.setdefault('state', {}).setdefault(name, {}).update(state)
            whole.update(found)
        return whole

    def load_optim_state_dict(self, state_dict: dict) -> None:
        entries = _entries_of_wrapper(state_dict)
        state_dict = {key: value for key, value in state_dict.items() if key not in entries}
        optimizer = self.optim_wrapper.optimizer
        if any(isinstance(key, int) for key in state_dict['state']):  # numbers in place of names: it was not sharded
            stored, own = (sum(len(group['params']) for group in groups)
                           for groups in (state_dict['param_groups'], optimizer.param_groups))
            if stored != own:
                raise CheckpointError(
                    f"the checkpoint's optimizer state must be of as many parameters as the sharded optimizer has, {own}, but "
                    f'is of {stored}. Freeze the same parts, and leave strategy.model_wrapper.use_orig_params=True; or start '
                    'from the weights alone, with load_from and without --resume')
            state_dict = FSDP.rekey_optim_state_dict(state_dict, OptimStateKeyType.PARAM_NAME, self.model, optim=optimizer)
        # mmengine passes these by position, in an order that torch has changed.
        loaded = FSDP.optim_state_dict_to_load(model=self.model, optim=optimizer, optim_state_dict=state_dict)
        self.optim_wrapper.load_state_dict({**loaded, **entries})


def _entries_of_wrapper(state_dict: dict) -> dict:
    """The entries of an optimizer wrapper's state dict that are not the optimizer's."""
    return {key: value for key, value in state_dict.items() if key not in ('state', 'param_groups')}
