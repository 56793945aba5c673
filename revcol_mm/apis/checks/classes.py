# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The order of the classes: one per run, that of the training file, to which everything else is mapped by name."""
import itertools
import os
import os.path as osp
from collections import Counter
from typing import Any, Collection, Iterable, Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.dataset import BaseDataset

from ...checkpoint import read_checkpoint
from ...checkpoint.loading import find_meta
from ...checkpoint.safe import first_names
from ..errors import LaunchError
from .common import class_of, name_of, say, settings_of_leaves, warn
from .files import read_annotations

CHECKPOINT = 'the checkpoint'


class ClassOrder:
    """The order of the classes of a run. The first data set sets it, unless a checkpoint has.

    Args:
        classes (Sequence[str] | None): the order with which the model was trained. Default: None, that of the first data set.
    """

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self.classes = None if classes is None else tuple(classes)
        self.source = '' if classes is None else CHECKPOINT
        self.folders: tuple[str, ...] | None = None

    def settle(self, dataset: BaseDataset, path: str, categories: Sequence[Mapping] | None) -> None:
        """Gives a data set's labels the order of the run, and makes its names follow.

        Args:
            dataset (BaseDataset): with its list of images, before that is packed.
            path (str): its annotation file.
            categories (Sequence[Mapping] | None): those of the file, if it is one in COCO's format.

        Raises:
            LaunchError: its classes are not those of the run, or nothing tells which of two orders is right.
        """
        classes = dataset._metainfo.get('classes')
        if isinstance(classes, str):
            say(f'the classes of {name_of(dataset)} are the text {classes!r}, which is read as one class')
            dataset._metainfo['classes'] = classes = (classes, )
        if categories is not None:
            self._settle_categories(dataset, path, {category['id']: category['name'] for category in categories})
        elif getattr(dataset, 'folder_to_idx', None):
            self._settle_folders(dataset, tuple(dataset.folder_to_idx))
        elif classes is None:
            if hasattr(dataset, 'label_map'):
                raise LaunchError(f'{name_of(dataset)} must have names for the values of its label maps, but has none: write '
                                  'metainfo=dict(classes=(…)) into the data set of every data loader')
        elif self._differs(tuple(classes), name_of(dataset)):
            self._settle_names(dataset, tuple(classes))

    def _take_over(self, labelled: tuple[str, ...], name: str) -> None:
        """The first data set's order is that of the run, also where a checkpoint has other names for the same labels."""
        known = self.classes or ()
        if self.source == CHECKPOINT and set(labelled) != set(known) and len(labelled) == len(known) and all(
                mine == theirs or (mine not in known and theirs not in labelled) for mine, theirs in zip(labelled, known)):
            warn(f'the checkpoint names its classes ({first_names(known, 10)}), {name} ({first_names(labelled, 10)}): they are '
                 'taken for the same in this order')  # there are several sets of names for ImageNet's
            self.classes = None
        if self.classes is None:
            self.classes, self.source = labelled, name

    def _differs(self, labelled: tuple[str, ...], name: str) -> bool:
        """Whether an order is not that of the run.

        Raises:
            LaunchError: its names are others.
        """
        self._take_over(labelled, name)
        if set(self.classes) != set(labelled):
            raise LaunchError(f'the classes of {name} must be those of {self.source} ({first_names(self.classes, 10)}), but '
                              f'they are ({first_names(labelled, 10)}): give all data sets the same metainfo.classes')
        return labelled != self.classes

    def _settle_categories(self, dataset: BaseDataset, path: str, names: Mapping[int, str]) -> None:
        """mmdet labels in the order of the file."""
        check_names(names.values(), path, 'category')
        classes = tuple(dataset._metainfo['classes'])
        labelled = tuple(names[category] for category in dataset.cat_ids)  # the names in the order of mmdet's labels
        absent = [name for name in self.classes or () if name not in labelled] if self._is_subset(classes, names) else []
        if absent:
            warn(f'{path} lacks the categories {first_names(absent)} of {self.source}: they count as classes without objects')
        else:
            check_categories(classes, list(names.values()), path, name_of(dataset))
        if absent or self._differs(labelled, name_of(dataset)):
            _move_labels(dataset, [self.classes.index(name) for name in labelled])
            ids = {**dict(zip(absent, unused_ids(names))), **{names[category]: category for category in dataset.cat_ids}}
            dataset.cat_ids = [ids[name] for name in self.classes]
            dataset.cat2label = {category: label for label, category in enumerate(dataset.cat_ids)}
            say(f'{path} lists its categories as ({first_names(labelled, 10)}); its labels follow the order of {self.source}, '
                f'({first_names(self.classes, 10)})')
        _set_classes(dataset, self.classes, path)

    def _is_subset(self, classes: Sequence[str], names: Mapping[int, str]) -> bool:
        """Whether a file has some classes of the run and no other category, so that nothing can be meant by another name."""
        return self.classes is not None and set(classes) == set(self.classes) and set(names.values()) < set(classes)

    def _settle_folders(self, dataset: BaseDataset, folders: tuple[str, ...]) -> None:
        """mmpretrain labels in the alphabetical order of the folders, whatever the order of the classes."""
        classes, root = tuple(dataset._metainfo['classes']), dataset.img_prefix
        if set(classes) & set(folders) and set(classes) != set(folders):
            raise LaunchError(f'the classes of {name_of(dataset)} must be the names of the folders in {root}, but '
                              f'{first_names(sorted(set(classes) - set(folders)))} is no folder and '
                              f'{first_names(sorted(set(folders) - set(classes)))} no class: correct metainfo.classes')
        named = set(classes) == set(folders)
        if self.folders is None:
            if named:
                self._take_over(classes if self.source == CHECKPOINT else folders, root)
            self.folders = self.classes if named and self.classes else folders
        unknown = sorted(set(folders) - set(self.folders))
        if unknown:
            raise LaunchError(f'the folders in {root} must be classes of {self.source} ({first_names(self.folders, 10)}), but '
                              f'{first_names(unknown)} are not: rename or remove them')
        if folders != self.folders[:len(folders)]:
            to = [self.folders.index(name) for name in folders]
            for info in dataset.data_list:
                info['gt_label'] = to[info['gt_label']]
            dataset.folder_to_idx = dict(zip(folders, to))
            say(f'the folders in {root} are labelled in the order of {self.source}: ({first_names(self.folders, 10)})')
        if named:
            _set_classes(dataset, self.folders, root)
        elif self._differs(classes, name_of(dataset)):
            raise self._different_order(dataset, classes)

    def _settle_names(self, dataset: BaseDataset, labelled: tuple[str, ...]) -> None:
        """Labels that the data set itself has given by name can move; numbers in files say nothing of names."""
        to = [self.classes.index(name) for name in labelled]
        named_values = hasattr(dataset, 'label_map') and getattr(type(dataset), 'METAINFO', {}).get('classes')
        if any('instances' in info for info in dataset.data_list[:1]):
            _move_labels(dataset, to)
        elif named_values:
            old = dataset.label_map or {label: label for label in range(len(labelled))}
            dataset.label_map = {value: to[label] if label < len(to) else label for value, label in old.items()}
            for info in dataset.data_list:
                info['label_map'] = dataset.label_map
        else:
            raise self._different_order(dataset, labelled)
        say(f'{name_of(dataset)}: its labels follow the order of {self.source}, ({first_names(self.classes, 10)})')
        _set_classes(dataset, self.classes, name_of(dataset))

    def _different_order(self, dataset: BaseDataset, labelled: tuple[str, ...]) -> LaunchError:
        return LaunchError(f'the classes of {name_of(dataset)} must be those of {self.source}, in the same order, '
                           f'({first_names(self.classes, 10)}), but they are ({first_names(labelled, 10)}), and its labels are '
                           'numbers without names, so that nothing tells which order is right: give all data sets the same '
                           'metainfo.classes')


def _move_labels(dataset: BaseDataset, to: Sequence[int]) -> None:
    for info in dataset.data_list:
        for instance in info['instances']:
            instance['bbox_label'] = to[instance['bbox_label']]


def _set_classes(dataset: BaseDataset, order: tuple[str, ...], source: str) -> None:
    classes = tuple(dataset._metainfo['classes'])
    if classes == order:
        return
    palette = dataset._metainfo.get('palette')
    if palette is not None and len(palette) == len(classes) == len(order):
        dataset._metainfo['palette'] = type(palette)(palette[classes.index(name)] for name in order)
    dataset._metainfo['classes'] = order
    say(f'{source}: metainfo.classes names the classes as ({first_names(classes, 10)}); the order of the labels is '
        f'({first_names(order, 10)}), and the names follow it')


def unused_ids(ids: Collection[int | str]) -> Iterator[int | str]:
    """Ids for categories that a file does not have: numbers, or texts if its ids are texts."""
    if any(isinstance(index, str) for index in ids):
        return (index for index in map('unused {}'.format, itertools.count()) if index not in ids)
    return itertools.count(max(ids) + 1)


def check_names(names: Iterable, path: str, what: str) -> None:
    """Every class must have a name of its own, which is a text.

    Args:
        names (Iterable): the names.
        path (str): the file that they come from.
        what (str): what they are in it, for the message.

    Raises:
        LaunchError: some names are there several times, or are no texts.
    """
    names = list(names)
    numbers = [name for name in names if not isinstance(name, str)]
    if numbers:
        raise LaunchError(f'the name of every {what} in {path} must be a text, but {first_names(numbers)} is none: '
                          f'write "{numbers[0]}" in quotes')
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise LaunchError(f'every {what} in {path} must have a name of its own, but there are several {first_names(twice)}: '
                          'rename or merge them')


def check_categories(classes: Sequence[str], categories: Sequence[str], path: str, name: str) -> None:
    """The classes in effect, given by the config or by the kind of data set, must be categories of the annotation file.

    Raises:
        LaunchError: some are not; the message names the line to write.
    """
    missing = [name for name in classes if name not in categories]
    alike = {name.strip().casefold(): name for name in categories}
    pairs = [f'{name!r} is {alike[name.strip().casefold()]!r}' for name in missing if name.strip().casefold() in alike]
    if pairs:
        raise LaunchError(f'metainfo.classes of {name} must be written as the categories of {path}, but {first_names(pairs)} '
                          'there: write both alike')
    if missing:
        raise LaunchError(f'metainfo.classes of {name} must be categories of {path}, which has {first_names(categories, 10)}, '
                          f'but got {first_names(missing)}. A data set without metainfo takes the classes of its type. Write '
                          'into the data set of every data loader (at the top level of the config nothing reads it): '
                          f'metainfo=dict(classes={tuple(categories)!r})')


# Of checkpoints --------------------------------------------------------------------------------------------------------------

def find_model_classes(path: str, cfg: Config) -> tuple[str, ...] | None:
    """The classes that a checkpoint was trained with, in the order of its labels.

    Args:
        path (str): the file or its URL. A folder, as FSDP writes, has no names that could be read alone.
        cfg (Config): the config, whose files tell the order where the checkpoint has no names; the log has a warning.

    Returns:
        tuple[str, ...] | None: None if neither tells.
    """
    classes = None if osp.isdir(path) else classes_of_meta(find_meta(read_checkpoint(path, 'meta', None), path))
    if classes is None:
        classes = find_file_classes(cfg)
        order = '' if classes is None else f': ({first_names(classes, 10)})'
        warn(f'{path} names no classes, so that its labels are taken for those of the data, in the order of their file{order}')
    return classes


def classes_of_meta(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes in the ``meta`` of a checkpoint, in the order of its labels; None if it has none."""
    for source in (meta.get('dataset_meta') or {}, meta):  # before mmengine they were in the meta itself
        classes = {str(key).lower(): value for key, value in source.items()}.get('classes')
        if classes:
            return (classes, ) if isinstance(classes, str) else tuple(classes)
    return None


def find_file_classes(cfg: Config) -> tuple[str, ...] | None:
    """For a checkpoint without names: those of the config's data set, in the order in which its file or folders label them.

    Args:
        cfg (Config): the config. The training set counts, and where its file is missing, the test set.

    Returns:
        tuple[str, ...] | None: None if no file tells.

    Raises:
        LaunchError: the classes of the config are no categories of the file.
    """
    for loader in ('train_dataloader', 'test_dataloader'):
        for dataset in settings_of_leaves((cfg.get(loader) or {}).get('dataset')):
            classes = _file_classes(dataset, cfg.get('default_scope'))
            if classes is not None:
                return classes
    return None


def _file_classes(dataset: Mapping, scope: str | None) -> tuple[str, ...] | None:
    kind, classes = kind_and_classes(dataset, scope)
    if kind is None:
        return None
    root, path = dataset.get('data_root') or '', dataset.get('ann_file')
    if path and hasattr(kind, 'COCOAPI') and osp.isfile(osp.join(root, path)):
        path = osp.join(root, path)
        categories = list(read_annotations(path)[1])
        check_names(categories, path, 'category')
        classes = categories if classes is None else [classes] if isinstance(classes, str) else classes
        check_categories(classes, categories, path, kind.__name__)
        return tuple(name for name in categories if name in classes)
    folders = _class_folders(dataset, kind)[1]
    return tuple(folders) if folders and (classes is None or set(classes) == set(folders)) else None


def kind_and_classes(dataset: Mapping, scope: str | None) -> tuple[Any, Sequence[str] | str | None]:
    """The type of a data set in a config, None if it is unknown, and the classes that its settings or its type give it."""
    kind = class_of(dataset, scope)
    given = dict(dataset.get('metainfo') or {}, **({'classes': dataset['classes']} if dataset.get('classes') else {}))
    return kind, kind._load_metainfo(given).get('classes') if hasattr(kind, '_load_metainfo') else None


def _class_folders(dataset: Mapping, kind: Any) -> tuple[str, list[str]]:
    """The root of a data set of mmpretrain that has a folder for each class, and the folders' names in order; else none."""
    if dataset.get('ann_file') or not hasattr(kind, '_find_samples') or not dataset.get('with_label', True):
        return '', []
    prefix = dataset.get('data_prefix') or ''
    root = osp.join(dataset.get('data_root') or '', prefix if isinstance(prefix, str) else prefix.get('img_path', ''))
    return root, sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if osp.isdir(root) else []


def check_class_folders(cfg: Config, loaders: Sequence[str]) -> None:
    """The folders of a data set of mmpretrain must be as many as its classes, and none of them hidden.

    Args:
        cfg (Config): the config.
        loaders (Sequence[str]): among 'train', 'val' and 'test'.

    Raises:
        LaunchError: they are not; the message names them.
    """
    for loader in loaders:
        for dataset in settings_of_leaves((cfg.get(f'{loader}_dataloader') or {}).get('dataset')):
            kind, classes = kind_and_classes(dataset, cfg.get('default_scope'))
            root, folders = _class_folders(dataset, kind)
            hidden = [name for name in folders if name.startswith('.') or name == '__MACOSX']
            if hidden:
                raise LaunchError(f'every folder in {root} must be a class of {loader}_dataloader, but {first_names(hidden)} '
                                  'was made by another program: remove it')
            if folders and classes is not None and len(folders) != len(classes):
                lacking, further = sorted(set(classes) - set(folders)), sorted(set(folders) - set(classes))
                raise LaunchError(f'{root} must have a folder for each of the {len(classes)} classes of {loader}_dataloader, '
                                  f'but has {len(folders)}. Without folder: {first_names(lacking)}; without class: '
                                  f'{first_names(further)}. Make an empty folder for a class without images, and correct '
                                  'metainfo.classes for the others')
