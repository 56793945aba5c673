# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Keys of ``--cfg-options`` that are misspelt, or that nothing reads."""
import difflib
from typing import Any, Iterator, Mapping

from mmengine.config import Config

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
    train_cfg=(), test_cfg=('mode', 'crop_size', 'stride', 'score_thr', 'max_per_img'), paramwise_cfg=('custom_keys', ),
    auto_scale_lr=('enable', 'base_batch_size'), env_cfg=('cudnn_benchmark', 'mp_cfg', 'dist_cfg'),
    metainfo=('classes', 'palette'), data_prefix=(), filter_cfg=('filter_empty_gt', 'min_size'))


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Every key of ``--cfg-options`` must be one that something reads.

    Args:
        cfg (Config): the config, before the options are merged into it.
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
        for index, part in enumerate([first, *rest]):
            if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                above = [first, *rest][:index]
                known = [name for place in above for name in LOOKED_UP.get(place, ())]
                close = []
                if isinstance(node, dict) and any(place in LOOKED_UP for place in above) and part not in known:
                    close = difflib.get_close_matches(part, [*node, *known], 1, 0.85)
                if close:
                    raise LaunchError(f'every key of --cfg-options must be a setting that the run reads, but {key} is unknown: '
                                      f'did you mean {".".join([*above, close[0]])}?')
                break


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
