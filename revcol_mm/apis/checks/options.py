# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Keys of ``--cfg-options`` that are misspelt, or that nothing reads."""
import difflib
import inspect
from typing import Any, Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
)

from ..errors import LaunchError

#: Top-level settings that the runners of mmengine, its hooks, mmpretrain, or the tools here read.
READ = frozenset((
    'model', 'work_dir', 'data_preprocessor', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_processor', 'log_level',
    'visualizer', 'default_scope', 'randomness', 'experiment_name', 'default_hooks', 'custom_hooks', 'custom_imports',
    'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg', 'test_cfg', 'val_evaluator',
    'test_evaluator', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'runner_type', 'strategy', 'compile', 'sync_bn',
    'model_wrapper_cfg', 'find_unused_parameters', 'activation_checkpointing', 'efficient_conv_bn_eval', 'tta_model',
    'tta_pipeline', 'test_pipeline', 'init_weights_for_test_or_val'))
#: Parts of a setting's name whose contents are looked up by name, so that nobody reads a misspelt one, and what they may have.
LOOKED_UP = dict(
    train_cfg=('assigner', 'sampler', 'allowed_border', 'pos_weight', 'debug', 'nms', 'nms_pre', 'max_per_img', 'min_bbox_size',
               'mask_size', 'rpn', 'rpn_proposal', 'rcnn', 'num_points', 'oversample_ratio', 'importance_sample_ratio',
               'augments', 'by_epoch', 'max_epochs', 'max_iters', 'val_interval', 'val_begin', 'dynamic_intervals'),
    test_cfg=('mode', 'crop_size', 'stride', 'rpn', 'rcnn', 'score_thr', 'nms', 'nms_pre', 'max_per_img', 'max_num',
              'min_bbox_size', 'mask_thr_binary', 'iou_thr', 'iou_threshold', 'method', 'sigma', 'min_score', 'class_agnostic',
              'split_thr', 'panoptic_on', 'semantic_on', 'instance_on', 'object_mask_thr', 'filter_low_score', 'fp16'),
    paramwise_cfg=('custom_keys', ), auto_scale_lr=('enable', 'base_batch_size'),
    env_cfg=('cudnn_benchmark', 'mp_cfg', 'dist_cfg'), metainfo=('classes', 'palette'), data_prefix=(),
    filter_cfg=('filter_empty_gt', 'min_size', 'bbox_min_size'))
#: Where the classes that a config names are looked for.
REGISTRIES = (MODELS, TASK_UTILS, DATASETS, TRANSFORMS, HOOKS, DATA_SAMPLERS, METRICS, EVALUATOR, LOOPS, OPTIMIZERS,
              OPTIM_WRAPPERS, PARAM_SCHEDULERS, VISUALIZERS, VISBACKENDS, LOG_PROCESSORS)
#: Keys that the builders of OpenMMLab take out of the settings of an object, whatever its class.
BUILDERS = frozenset(('type', '_scope_', '_delete_', 'priority', 'convert_to_iter_based', 'constructor', 'paramwise_cfg'))


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Every key of ``--cfg-options`` must be one that something reads.

    Args:
        cfg (Config): the config, before the options are merged into it; its packages are registered.
        options (Mapping): values by key, such as ``{'train_dataloader.batch_size': 1}``.

    Raises:
        LaunchError: for one that is misspelt or that nothing reads; the message names what was meant.
    """
    for key in options:
        first, *rest = key.split('.')
        if first not in READ:
            close = difflib.get_close_matches(first, READ, 1, 0.75)
            if close:
                remedy = f'did you mean {".".join([close[0], *rest])}?'
            else:
                same = [name for name in _names(cfg) if name.rpartition('.')[2] == key.rpartition('.')[2] and name != key]
                remedy = f'set {", ".join(same[:4])} instead' if same else 'remove it'
            state = 'is only a variable of the config, whose value has been used already' if first in cfg else 'is unknown'
            raise LaunchError(f'every key of --cfg-options must be a setting that the run reads, but {key} {state}: {remedy}')
        node = cfg._cfg_dict
        parts = [first, *rest]
        for index, part in enumerate(parts):
            if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
                continue
            node = node if isinstance(node, dict) else {}
            if part not in node:
                meant = _what_was_meant(part, node, parts[:index], cfg.get('default_scope'))
                if meant:
                    raise LaunchError(f'every key of --cfg-options must be a setting that the run reads, but {key} is unknown: '
                                      f'did you mean {".".join([*parts[:index], meant, *parts[index + 1:]])}?')
            node = node.get(part)


def _what_was_meant(part: str, node: Mapping[str, Any], above: Sequence[str], scope: str | None) -> str | None:
    """The setting that a new key resembles; None for one that may be meant as it is."""
    arguments = _arguments(node, scope)
    if arguments:
        return None if part in arguments else next(iter(difflib.get_close_matches(part, arguments, 1, 0.8)), None)
    places = [place for place in above if place in LOOKED_UP]
    known = [name for place in places for name in LOOKED_UP[place]]
    if not places or part in known:
        return None
    close = difflib.get_close_matches(part, node, 1, 0.72) or difflib.get_close_matches(part, known, 1, 0.72)
    return close[0] if close else None


def _arguments(node: Mapping[str, Any], scope: str | None) -> set[str]:
    """The names of the arguments of the class that settings name; nothing if they name none, or if it is unknown."""
    kind = node.get('type')
    for root in REGISTRIES:
        if isinstance(kind, str):
            with root.switch_scope_and_registry(scope) as own:
                kind = own.get(kind) or kind
    names, classes = set(BUILDERS), kind.__mro__ if isinstance(kind, type) else [kind]
    for part in classes if callable(kind) else ():
        try:
            parameters = inspect.signature(part.__init__ if isinstance(part, type) else part).parameters
        except (TypeError, ValueError):  # written in C
            return set()
        names.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return names  # the arguments of base classes are not passed on
    return names if len(names) > len(BUILDERS) else set()


def _names(cfg: Config) -> Iterator[str]:
    """The full names of the settings that are read, without those inside of lists."""
    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield f'{prefix}{key}'
            if isinstance(value, dict):
                yield from walk(value, f'{prefix}{key}.')

    for name in cfg:
        if name in READ and isinstance(cfg[name], dict):
            yield from walk(cfg[name], f'{name}.')
