# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Layer-wise learning-rate decay for every model whose backbone tells the depth of its parameters."""
import itertools
from logging import WARNING

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from ...reversible import ReversibleColumn

#: What FSDP, activation checkpointing and torch.compile put into the names of parameters. DDP puts 'module' in front.
_WRAPPERS = ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for models of mmdet, mmseg and mmpretrain.

    A parameter of layer ``id`` learns with ``lr * layer_decay_rate ** (num_layers - id - 1)``. The backbone says where its
    parameters sit: ``get_layer_depth(name, prefix) -> (id, num_layers)``; everything outside of the backbone belongs to the
    last layer, whose scale is 1. Biases and parameters of one dimension get no weight decay, and neither do the γ of the
    reversible columns, unless ``decay_gamma``. Parameters without gradient are left out of the optimizer.

    Every scheduler that works with factors (LinearLR, MultiStepLR, PolyLR and CosineAnnealingLR with ``eta_min_ratio``)
    keeps the ratios between the layers, as does ``--auto-scale-lr``; an absolute ``eta_min`` is the same for all layers,
    and may be larger than the rate of the first ones.

    Example::

        optim_wrapper = dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.85))

    Args:
        optim_wrapper_cfg (dict): the optimizer wrapper; its ``optimizer`` needs ``lr``.
        paramwise_cfg (dict, optional): ``layer_decay_rate`` (float in (0, 1], default 1.0: all layers alike);
            ``decay_gamma`` (bool, default False: the release decays γ in classification only; γ, the factor of the columns'
            shortcuts, is the parameter ``alpha{l}``, and ``gamma`` in a parameter's name is a LayerScale);
            ``custom_keys`` (dict, default none), as mmengine's: {part of a parameter's name: dict(lr_mult=…, decay_mult=…)},
            the longest match wins and multiplies what the rules above give. The log warns of a key that is in no name.

    Raises:
        ValueError: for other keys (also in the dicts of ``custom_keys``), values out of range, an optimizer without ``lr``, and
            FSDP without ``use_orig_params``.
        TypeError: if a model with decaying rates has no backbone with ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        defaults = dict(layer_decay_rate=1.0, decay_gamma=False, custom_keys={})
        given = dict(paramwise_cfg or {})
        unknown = sorted(set(given) - set(defaults))
        if unknown:
            raise ValueError(f'paramwise_cfg of LayerDecayOptimWrapperConstructor may hold {sorted(defaults)}, but got '
                             f'{unknown}. Keys from a base config are removed by paramwise_cfg=dict(_delete_=True, …)')
        super().__init__(optim_wrapper_cfg, dict(defaults, **given))
        for key, settings in self.paramwise_cfg['custom_keys'].items():
            unknown = sorted(set(settings) - {'lr_mult', 'decay_mult'})
            if unknown:
                raise ValueError(f'custom_keys.{key} in paramwise_cfg may hold lr_mult and decay_mult, but got {unknown}: '
                                 "remove them, or use mmengine's DefaultOptimWrapperConstructor")
        self._dims: dict[int, int] = {}
        rate = self.paramwise_cfg['layer_decay_rate']
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate in paramwise_cfg must be above 0 and at most 1, but got {rate!r}')
        if self.base_lr is None:
            raise ValueError('optim_wrapper.optimizer must have lr, which the rates of the layers are multiples of')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        self._dims = _unsharded_dims(model)  # before mmengine takes the wrapper off
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Appends the parameter groups of ``module`` to ``params``, those of the last layer first.

        mmengine logs the rate of the first group, and the last layer has the rate that the config names.
        """
        rate, custom_keys = self.paramwise_cfg['layer_decay_rate'], self.paramwise_cfg['custom_keys']
        keys = sorted(sorted(custom_keys), key=len, reverse=True)
        backbones = _find_backbones(module)
        if rate < 1 and not backbones:
            raise TypeError(f'layer_decay_rate={rate} needs a backbone with get_layer_depth, but {type(module).__name__} has '
                            'none: layer_decay_rate=1.0 gives all layers the same rate')
        gammas = {id(gamma) for part in module.modules() if isinstance(part, ReversibleColumn) for gamma in part.gammas}
        groups: dict[tuple[int, str], dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            name = _clean(name)
            layer, num_layers = _layer_of(name, backbones)
            scale = rate**(num_layers - layer - 1)
            decays = self._dims.get(id(param), param.dim()) > 1 and not name.endswith('.bias')
            if id(param) in gammas:
                decays = self.paramwise_cfg['decay_gamma']
            label = 'decay' if decays else 'no_decay'
            weight_decay = (self.base_wd or 0.) if decays else 0.
            key = next((key for key in keys if key in name), None)
            if key is not None:
                scale *= custom_keys[key].get('lr_mult', 1.)
                weight_decay *= custom_keys[key].get('decay_mult', 1.)
                label = f'{label}_{key}'
            group = groups.setdefault((layer, label), dict(
                params=[], param_names=[], group_name=f'layer_{layer}_{label}', lr_scale=scale, lr=scale * self.base_lr))
            if self.base_wd is not None or not decays:
                group['weight_decay'] = weight_decay
            group['params'].append(param)
            group['param_names'].append(name)
        unused = [key for key in keys if not any(key in _clean(name) for name, _ in module.named_parameters())]
        if unused:
            print_log(f'these custom_keys in paramwise_cfg change nothing, because no parameter has them in its name: {unused}',
                      'current', WARNING)
        ordered = [groups[key] for key in sorted(groups, key=lambda key: (-key[0], key[1]))]
        for group in ordered:
            print_log(f'{group["group_name"]}: {len(group["params"])} parameters, lr {group["lr"]:.4g}, weight decay '
                      f'{group.get("weight_decay", "of the optimizer")}', logger='current')
        params.extend(ordered)


def _clean(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    parts = itertools.dropwhile(lambda part: part == 'module', name.split('.'))
    return '.'.join(part for part in parts if part not in _WRAPPERS)


def _find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Prefix and module of every backbone: the innermost modules that have ``get_layer_depth``.

    The classifiers of mmpretrain have a method of that name too, so only the innermost modules count.
    """
    found = {_clean(name): part for name, part in model.named_modules() if callable(getattr(part, 'get_layer_depth', None))}
    prefixes = {name + '.' if name else '': part for name, part in found.items()}
    return {prefix: part for prefix, part in prefixes.items()
            if not any(other != prefix and other.startswith(prefix) for other in prefixes)}


def _layer_of(name: str, backbones: dict[str, nn.Module]) -> tuple[int, int]:
    for prefix, backbone in backbones.items():
        if name.startswith(prefix):
            return backbone.get_layer_depth(name, prefix)
    depths = [backbone.get_layer_depth('', 'outside of the backbone.') for backbone in backbones.values()]
    return max(depths, default=(0, 1))


def _unsharded_dims(model: nn.Module) -> dict[int, int]:
    """Dimensions of the parameters that FullyShardedDataParallel has flattened: a shard of a matrix has one dimension."""
    dims: dict[int, int] = {}
    for unit in FSDP.fsdp_modules(model):
        # One unit at a time: the whole model may not fit.
        with torch.no_grad(), FSDP.summon_full_params(unit, recurse=False, writeback=False):
            dims.update({id(param): param.dim() for param in unit.parameters()})
    return dims
