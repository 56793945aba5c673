# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checks before anything is built: whether the data sets, the weights and the checkpoint of a run exist and can be read."""
import glob
import json
import os
import os.path as osp
import re
import warnings
from typing import Iterator, Sequence

import torch
from mmengine.config import Config

from ...checkpoint import read_checkpoint
from ...checkpoint.download import remove_damaged
from ...checkpoint.files import check_bytes
from ...checkpoint.safe import is_local
from ...checkpoint.zoo import PREFIX, find_address
from ...converters import is_official
from ...utils.configs import as_list, kind_of
from ..errors import LaunchError

#: Files and folders of well-known data sets below their ``data_root``.
LAYOUTS = dict(
    CocoDataset='annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/*.jpg and val2017/*.jpg '
                '(https://cocodataset.org/#download)',
    ADE20KDataset='images/training, images/validation, annotations/training and annotations/validation '
                  '(ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu)',
    ImageNet='train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG with meta/val.txt (https://image-net.org)')


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Checks that the annotation files and folders of the data loaders and evaluators of a run exist.

    Args:
        cfg (Config): the config.
        loaders (Sequence[str]): among 'train', 'val' and 'test'.

    Raises:
        LaunchError: if one is missing; the message tells where the data must be, and how to give another place.
    """
    for loader in loaders:
        section = f'{loader}_dataloader'
        if not cfg.get(section):
            continue
        for key, dataset in _datasets(cfg[section], section):
            root = dataset.get('data_root') or ''
            paths = [dataset.get('ann_file')]
            prefix = dataset.get('data_prefix') or {}
            paths += [prefix] if isinstance(prefix, str) else [path for path in prefix.values() if isinstance(path, str)]
            if not any(paths) and root:
                paths = ['']
            for path in paths:
                path = path if path is None or not is_local(path) else osp.join(root, path)
                if _is_missing(path):
                    raise LaunchError(_describe_missing_data(path, key, dataset, section))
        for evaluator in as_list(cfg.get(f'{loader}_evaluator') or []):
            path = evaluator.get('ann_file')
            if _is_missing(path):
                raise LaunchError(f'there is no annotation file {path} (looked from {os.getcwd()}), which {loader}_evaluator '
                                  f'needs. Another place: --cfg-options {loader}_evaluator.ann_file=/path/to/annotations.json')


def read_annotations(path: str) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Reads an annotation file in COCO format.

    Returns:
        tuple[list, dict]: (file name, id) of each image, and {name: id} of the categories.

    Raises:
        LaunchError: if the file cannot be read, or has another format.
    """
    content = load_annotations(path)
    try:
        return ([(image['file_name'], image['id']) for image in content['images']],
                {category['name']: category['id'] for category in content['categories']})
    except (KeyError, TypeError) as error:
        raise LaunchError(no_annotations(path, error)) from None


def load_annotations(path: str) -> dict:
    """Reads a JSON file, which should be one of annotations in COCO format.

    Raises:
        LaunchError: if the file cannot be read, or is no JSON.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except OSError as error:
        raise LaunchError(f'the annotation file {path} cannot be read: {error.strerror}, in {os.getcwd()}') from None
    except ValueError as error:  # no JSON, or no text
        raise LaunchError(no_annotations(path, error)) from None


def no_annotations(path: str, error: Exception) -> str:
    """Says that a file is no annotation file in COCO format, for the reason that reading it has given."""
    encoded = isinstance(error, UnicodeDecodeError) or 'BOM' in str(error)
    return (f'{path} must be an annotation file in COCO format, but is not: {type(error).__name__}: {error}'
            + '. Save it as UTF-8 without a byte order mark (BOM)' * encoded)


def _datasets(dataset, key: str) -> Iterator[tuple[str, dict]]:
    """The data sets inside of wrappers (RepeatDataset, ConcatDataset, …), with their keys in the config."""
    if isinstance(dataset, (list, tuple)):
        for index, part in enumerate(dataset):
            yield from _datasets(part, f'{key}.{index}')
    elif not isinstance(dataset, dict):
        return
    elif 'dataset' in dataset:
        yield from _datasets(dataset['dataset'], f'{key}.dataset')
    elif 'datasets' in dataset:
        for index, part in enumerate(dataset['datasets']):
            yield from _datasets(part, f'{key}.datasets.{index}')
    else:
        yield key, dataset


def _is_missing(path: str | None) -> bool:
    return bool(path) and is_local(path) and not osp.exists(path)


def _describe_missing_data(path: str, key: str, dataset: dict, section: str) -> str:
    root = dataset.get('data_root')
    text = f'there is no {path} (looked from {os.getcwd()}), which {section} needs.'
    layout = LAYOUTS.get(kind_of(dataset))
    if layout and root:
        text += f' {kind_of(dataset)} lies in {root}: {layout}.'
    if root:
        link = root.rstrip('/')
        text += (f' If it is elsewhere, make a link (ln -s /path/to/data {link}), or name the place with --cfg-options '
                 f'{key}.data_root=/path/to/data/, the same for the other data loaders')
        text += ', and the annotation files of val_evaluator and test_evaluator' if 'ann_file' in dataset else ''
    else:
        text += f' Another place: --cfg-options {key}.ann_file=…'
    return text


def check_pretrained(cfg: Config, config: str) -> None:
    """Checks the file of ``model.backbone.init_cfg``, which a training needs, and its bytes.

    Of a URL, only the copy in the cache is checked, and removed if it is damaged.

    Raises:
        LaunchError: if it does not exist; the message tells how to make it, or where the config ``config`` has it from.
        CheckpointError: if its bytes are not those that were written.
    """
    init_cfg = ((cfg.get('model') or {}).get('backbone') or {}).get('init_cfg')
    path = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
    source = f'the first lines of {config} and docs/model_zoo.md name'
    padded = re.fullmatch(r'(.+)_k(\d+)\.pth', path or '')
    remedy = f'Put the weights there that {source}'
    if padded:
        remedy = f'Pad the 3×3 weights that {source}: python tools/pad_kernels.py {padded[1]}.pth --size {padded[2]}'
    key = 'model.backbone.init_cfg'
    _check_exists(path, f'{key}.checkpoint', f'{remedy}. Another place: --cfg-options {key}.checkpoint=/path/to/weights.pth; '
                  f'no pre-trained weights: --cfg-options {key}=None')
    _check_bytes(path)


def _check_bytes(path: str | None) -> None:
    """Compares a file with its checksums, which mmengine does not. A damaged copy of a URL's file is removed."""
    if path and path.startswith(('http://', 'https://', PREFIX)):
        remove_damaged(find_address(path))
    elif path and is_local(path) and osp.isfile(osp.expanduser(path)):
        check_bytes(osp.expanduser(path))


def _check_exists(path: str | None, argument: str, remedy: str = '') -> None:
    if path and _is_missing(osp.expanduser(path)):
        raise LaunchError(f'there is no checkpoint {path} (looked from {os.getcwd()}), which {argument} names'
                          + f'. {remedy}' * bool(remedy))


def check_checkpoint(path: str | None, argument: str, resume: bool = False) -> None:
    """Checks a local checkpoint before anything is built. A folder is a checkpoint of FSDP: only its bytes are checked.

    Of a URL, only the copy in the cache is checked, and removed if it is damaged.

    Args:
        path (str | None): the file; None is not checked.
        argument (str): the argument that names it.
        resume (bool): whether a training is resumed from it, which needs more than weights. Default: False.

    Raises:
        LaunchError: if it does not exist, or is a file of which mmengine would load nothing and only warn.
        CheckpointError: if it cannot be read, or its bytes are not those that were written.
    """
    if not path:
        return
    if not is_local(path):
        _check_bytes(path)
        return
    if osp.isdir(osp.expanduser(path)):
        _check_folder(osp.expanduser(path), argument)
        return
    _check_exists(path, argument, 'Another place: --cfg-options load_from=/path/to/checkpoint.pth; without one: --cfg-options '
                  'load_from=None' if argument == 'load_from' else '')
    content = read_checkpoint(path, map_location='meta', logger=None)
    _check_bytes(path)
    keys = list(content) if isinstance(content, dict) else []
    alone = bool(keys) and all(isinstance(content[key], torch.Tensor) for key in keys)
    if 'state_dict' not in keys and not alone and not is_official(content):
        found = ', '.join(map(str, keys[:5])) or f'a {type(content).__name__}'
        raise LaunchError(f'{path} must be a checkpoint of a whole model, with a state_dict, but holds {found}. '
                          + place_of_backbones(path))
    missing = [key for key in ('meta', 'message_hub') if key not in keys]
    if resume and 'optimizer' not in keys:
        warnings.warn(f'{path} holds no optimizer state, as files of the best weights: the optimizer starts anew')
    if resume and missing:
        raise LaunchError(f'a training can be resumed only from a checkpoint with meta and message_hub, but {path} has no '
                          f'{" and no ".join(missing)}. To start a training from its weights: --cfg-options load_from={path}')


def _check_folder(path: str, argument: str) -> None:
    if glob.glob(osp.join(glob.escape(path), 'rank*.pth')):  # as FSDP writes
        check_bytes(path)
        return
    last, found = osp.join(path, 'last_checkpoint'), []
    if osp.isfile(last):
        with open(last, encoding='utf-8', errors='replace') as file:
            found = [osp.join(path, osp.basename(file.read().strip()))]
    found += sorted(glob.glob(osp.join(glob.escape(path), '*.pth')), key=osp.getmtime, reverse=True)
    newest = next((name for name in found if osp.exists(name)), None)
    raise LaunchError(f'{argument} must name a checkpoint, but {path} is a folder'
                      + (f', whose newest checkpoint is {newest}: name this one' if newest else ' without one')
                      + (f'; to go on in this folder: --resume auto --work-dir {path}' if argument == '--resume' else ''))


def place_of_backbones(path: str) -> str:
    return ("Weights of a backbone go into the config: model.backbone.init_cfg=dict(type='Pretrained', "
            f"checkpoint='{path}')")
