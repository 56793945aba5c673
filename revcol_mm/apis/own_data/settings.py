# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Writes own data into a config: data sets, evaluators, the number of classes wherever it stands, the learning rate."""
from typing import Any, Iterator, Mapping, Sequence

from mmengine.config import Config, ConfigDict
from torch import nn

from ...checkpoint.safe import first_names
from ...runtime import EXTENSIONS
from ...utils.configs import as_list, build_on_meta, kind_of
from ..checks.classes import kind_and_classes
from ..checks.common import settings_of_leaves
from ..checks.model import heads_of
from ..errors import LaunchError, build_errors
from .layouts import OwnData, Part

DATASETS = dict(mmdet='CocoDataset', mmseg='BaseSegDataset', mmpretrain='CustomDataset')
#: What a data set of any type may keep of its settings.
KEPT = ('pipeline', 'filter_cfg', 'test_mode', 'serialize_data', 'lazy_init', 'max_refetch', 'backend_args', 'indices',
        'ignore_index')


def fill_config(cfg: Config, data: OwnData, options: Mapping[str, Any] | None = None) -> list[str]:
    """Makes a config train and test on own data.

    Batch sizes, transforms and the schedule stay those of the config. Data loaders and evaluators that the config does not
    have are not added.

    Args:
        cfg (Config): the config; changed in place. Its packages are registered.
        data (OwnData): with both parts.
        options (Mapping | None): the settings of the command line that ``cfg`` has already. A learning rate among them is not
            scaled, and neither is any with ``auto_scale_lr.enable=False``. Default: None.

    Returns:
        list[str]: what was chosen, for the user.

    Raises:
        LaunchError: the config has several training sets, or a model whose heads are not found in it.
    """
    train = _the_dataset(cfg, 'train_dataloader')
    same_classes = tuple(kind_and_classes(train, data.scope)[1] or ()) == data.classes
    lines = [f'--data {data.root}: {len(data.classes)} classes ({first_names(data.classes, 10)})']
    for loader, part in (('train_dataloader', data.train), ('val_dataloader', data.val), ('test_dataloader', data.val)):
        if cfg.get(loader):
            _set_dataset(_the_dataset(cfg, loader), data, part, same_classes)
            lines.append(f'  {loader}: {len(part.samples)} images in {part.images}'
                         + f', {part.listing or part.annotations}' * bool(part.listing or part.annotations))
        else:
            lines.append(f'  {loader}: none, as in {cfg.filename}')
    lines += _leave_out_semantic_maps(cfg) + _set_heads(cfg, data, same_classes)
    for key in ('val_evaluator', 'test_evaluator'):
        if cfg.get(key):
            before = [kind_of(evaluator) for evaluator in as_list(cfg[key])]
            _set_evaluators(cfg, key, data)
            kinds = [kind_of(evaluator) for evaluator in as_list(cfg[key])]
            lines.append(f'  {key}: ' + ', '.join(kinds))
            if key == 'val_evaluator' and kinds != before:
                lines += _choose_best_by_any_metric(cfg)
    return lines + [_scale_learning_rate(cfg, options or {})] + [f'  {note}' for note in data.notes]


# Data sets -----------------------------------------------------------------------------------------------------------------

def _the_dataset(cfg: Config, loader: str) -> ConfigDict:
    datasets = list(settings_of_leaves((cfg.get(loader) or {}).get('dataset')))
    if len(datasets) != 1:
        raise LaunchError(f'--data needs one data set in {loader}, inside of wrappers or not, but {cfg.filename} has '
                          f'{len(datasets)}: write the data into a config of your own')
    if 'Panoptic' in kind_of(datasets[0]):
        raise LaunchError(f'--data finds boxes and masks of objects, but {cfg.filename} trains on a {kind_of(datasets[0])}: '
                          'choose another config, or write the data into one of your own')
    return datasets[0]


def _set_dataset(dataset: ConfigDict, data: OwnData, part: Part, same_classes: bool) -> None:
    metainfo = dataset.get('metainfo')
    if not (same_classes and metainfo):  # else it may have a palette, too
        metainfo = dict(classes=data.classes)
        if data.scope == 'mmdet' and len(data.classes) > 80:  # CocoDataset's own palette has a color for each of COCO's
            metainfo['palette'] = 'random'
    # What was divided is listed in another folder.
    root, paths = ('', (part.images, part.listing, part.annotations)) if part.listing else (
        data.root, [path.removeprefix(data.root) for path in (part.images, part.annotations, part.annotations)])
    images, file, maps = paths
    kept = {key: dataset[key] for key in KEPT if key in dataset}
    settings = dict(type=DATASETS[data.scope], data_root=root, metainfo=metainfo)
    if data.scope == 'mmdet':
        settings.update(ann_file=file, data_prefix=dict(img=images))
    elif data.scope == 'mmseg':
        settings.update(data_prefix=dict(img_path=images, seg_map_path=maps), img_suffix=part.img_suffix,
                        seg_map_suffix=part.map_suffix, reduce_zero_label=False)
        for step in _dicts(kept.get('pipeline')):
            step.pop('reduce_zero_label', None)  # it must be that of the data set
    else:
        settings.update(data_prefix=images, extensions=EXTENSIONS)
    if part.listing:
        settings['ann_file'] = part.listing
    dataset.clear()
    dataset.update(settings | kept)


def _dicts(node: Any) -> Iterator[dict]:
    """All settings of objects in a part of a config."""
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from _dicts(part)


def _set_evaluators(cfg: Config, key: str, data: OwnData) -> None:
    evaluators = [_fitting(evaluator, cfg, data) for evaluator in as_list(cfg[key])]
    cfg[key] = evaluators if isinstance(cfg[key], (list, tuple)) else evaluators[0]


def _fitting(evaluator: ConfigDict, cfg: Config, data: OwnData) -> dict:
    """An evaluator for the data: that of the config, or the usual one in place of one that is made for another data set."""
    kind = kind_of(evaluator)
    if data.scope == 'mmdet':
        file = data.val.listing or data.val.annotations
        if kind == 'CocoMetric':
            return dict(evaluator, ann_file=file)
        masks = any(step.get('with_mask') for step in _dicts(_the_dataset(cfg, 'train_dataloader').get('pipeline')))
        return dict(type='CocoMetric', ann_file=file, metric=['bbox', 'segm'] if masks else 'bbox')
    if data.scope == 'mmseg':
        left_out = set(as_list(evaluator.get('background', 'background')))
        fits = kind == 'IoUMetric' or kind == 'ForegroundIoUMetric' and left_out < set(data.classes)
        return evaluator if fits else dict(type='IoUMetric', iou_metrics=['mIoU'])
    _limit_ranks(evaluator, len(data.classes))
    return evaluator


def _choose_best_by_any_metric(cfg: Config) -> list[str]:
    """The metrics that a hook keeps the best checkpoint by are those of the evaluator that was replaced."""
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]
    lines = []
    for hook in hooks:
        if hook and hook.get('save_best') not in (None, 'auto'):
            lines.append(f'  {kind_of(hook)}: save_best="auto", the first metric, because {hook.save_best} was one of another '
                         'evaluator')
            hook.save_best = 'auto'
            hook.pop('rule', None)
    return lines


def _limit_ranks(node: dict, count: int) -> None:
    ranks = node.get('topk')
    if isinstance(ranks, (tuple, list)):
        node['topk'] = tuple(rank for rank in ranks if rank <= count) or (1, )


# The model -----------------------------------------------------------------------------------------------------------------

def _leave_out_semantic_maps(cfg: Config) -> list[str]:
    """HTC's branch for semantic maps, which COCO files do not have."""
    heads = cfg.model.get('roi_head') or {}
    if not heads.get('semantic_head'):
        return []
    heads.semantic_head = heads.semantic_roi_extractor = None
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for step in _dicts(cfg.get(loader)):
            if 'with_seg' in step:
                step['with_seg'] = False
    return ['  model.roi_head.semantic_head: None, because the data have no semantic maps']


def _set_heads(cfg: Config, data: OwnData, same_classes: bool) -> list[str]:
    count, lines = len(data.classes), []
    with build_errors(cfg):
        heads = list(heads_of(build_on_meta(cfg)))
    done: set[int] = set()
    for name, head in heads:
        node = _settings_of(cfg, name)
        if node is None:
            raise LaunchError(f'the settings of {name} ({type(head).__name__}), whose num_classes must be {count}, are not '
                              f'where they are expected in {cfg.filename}: write the data into a config of your own')
        if id(node) not in done:
            done.add(id(node))
            lines += _set_head(node, head, name, count, same_classes)
    for owner in (cfg, cfg.model):
        if 'num_classes' in (owner.get('data_preprocessor') or {}):
            owner.data_preprocessor.num_classes = count
    names = dict.fromkeys(name.rstrip('.0123456789') for name, _ in heads)
    return [f'  num_classes={count}: {first_names(names, 8)}', *lines]


def _settings_of(cfg: Config, name: str) -> ConfigDict | None:
    """The settings of a part of the model. A list of equal heads may have the settings of one."""
    node: Any = cfg
    for part in name.split('.'):
        if part.isdigit() and isinstance(node, (list, tuple)):
            node = node[int(part)]
        elif not part.isdigit():
            node = node.get(part) if hasattr(node, 'get') else None
    return node if isinstance(node, dict) else None


def _set_head(node: ConfigDict, head: nn.Module, name: str, count: int, same_classes: bool) -> list[str]:
    """Sets the number of classes in a head, and in what depends on it: losses with a weight for each class."""
    old, lines = head.num_classes, []
    if 'num_things_classes' in node:
        node.num_things_classes = count
    else:
        node.num_classes = count
    _limit_ranks(node, count)
    for part in _dicts(node):
        if part is not node and part.get('num_classes') == old:
            part['num_classes'] = count
        weights = part.get('class_weight')
        if weights is None or (same_classes and not isinstance(weights, str)):
            continue
        fitted = _fit_weights(weights, old, count)
        if fitted is None:
            lines.append(f'  {name}: class_weight={weights} of {kind_of(part)} is left out, because it was made for other '
                         'classes')
        part['class_weight'] = fitted
    return lines


def _fit_weights(weights: Any, old: int, count: int) -> list[float] | None:
    """Weights for another number of classes, perhaps with one more for "no object"; None if they differ between classes."""
    if isinstance(weights, (int, float)):
        return weights
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) not in (old, old + 1):
        return None
    return [weights[0]] * count + list(weights[old:]) if len(set(weights[:old])) == 1 else None


def _scale_learning_rate(cfg: Config, options: Mapping[str, Any]) -> str:
    given = Config()
    given.merge_from_dict(dict(options))
    rate = ((given.get('optim_wrapper') or {}).get('optimizer') or {}).get('lr')
    enabled = (given.get('auto_scale_lr') or {}).get('enable')
    if rate is not None and not enabled:
        if cfg.get('auto_scale_lr'):  # a config that an earlier run has kept scales
            cfg.auto_scale_lr.enable = False
        return f'  learning rate: {rate}, as given, and not scaled'
    if enabled is False:
        return f'  learning rate: as in {cfg.filename}, not scaled, because auto_scale_lr.enable=False'
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    if base is None:
        return f'  learning rate: as in {cfg.filename}, which names no auto_scale_lr.base_batch_size to scale it'
    cfg.auto_scale_lr.enable = True
    return (f'  learning rate: made for batches of {base:g} images, and scaled to the real one (train_dataloader.batch_size='
            f'{cfg.train_dataloader.get("batch_size", 1)} times the number of processes)')
