# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What a folder of data holds: a set in COCO's format, label maps for segmentation, or a folder for each class."""
import os
import os.path as osp
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Mapping, Sequence

from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from ...checkpoint.safe import first_names
from ...runtime import EXTENSIONS
from ..checks.classes import check_names
from ..checks.files import load_annotations, no_annotations
from ..checks.label_maps import LabelMaps
from ..errors import LaunchError
from .foreign import convert, foreign_format
from .names import folders_of, hidden_folders, images_below, only, others_below, part_folders, part_of, words_of

#: Parts of the data.
LONG = dict(train='training', val='validation')
#: Words in the name of a COCO file that has no such word, and those of COCO's files for other tasks.
COCO_WORDS = frozenset(('annotation', 'annotations', 'coco', 'default', 'instances', 'labels', 'result'))
OTHER_TASKS = frozenset(('captions', 'info', 'keypoints', 'panoptic', 'stuff'))
#: Folders that are no classes.
NO_CLASSES = frozenset(('ann_dir', 'annotations', 'images', 'img_dir', 'labels', 'masks', 'semantic'))

EXPECTED = dict(
    mmdet='annotations in COCO format and their images, for example annotations/instances_train.json, '
          'annotations/instances_val.json, train/ and val/, or train/_annotations.coco.json and valid/_annotations.coco.json',
    mmseg='images/train, images/val, annotations/train and annotations/val with images and their label maps, or the same in '
          'img_dir/ and ann_dir/, and perhaps classes.txt',
    mmpretrain='train/ and val/ with a folder of images for each class')
NAMES = dict(mmdet='a set in COCO format, for detectors', mmseg='images with label maps, for segmentors',
             mmpretrain='a folder of images for each class, for classifiers')


@dataclass(frozen=True)
class Part:
    """The data for training, or those for validation. Paths start from the present folder, as the data's own one does.

    Attributes:
        images (str): folder of the images, or of the class folders.
        annotations (str): COCO file, or folder of label maps; '' for classification.
        samples (tuple): names of the images as their file or folder lists them: with COCO as the file says, for segmentation
            without ``img_suffix``, for classification 'class/name.jpg'.
        img_suffix (str), map_suffix (str): endings of images and label maps, for segmentation.
        listing (str): file that lists the samples of this part, where they were divided here; '' otherwise.
        content (dict): the parsed COCO file.
    """
    images: str
    annotations: str = ''
    samples: tuple[str, ...] = ()
    img_suffix: str = ''
    map_suffix: str = ''
    listing: str = ''
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class OwnData:
    """What was found in a folder.

    Attributes:
        root (str): the folder, ending in '/'.
        scope (str): the package that trains on such data: 'mmdet', 'mmseg' or 'mmpretrain'.
        classes (tuple[str, ...]): names in the order of the labels.
        train (Part): for training.
        val (Part | None): for validation; None if the folder has no such part.
        notes (tuple[str, ...]): what the user should know.
    """
    root: str
    scope: str
    classes: tuple[str, ...]
    train: Part
    val: Part | None
    notes: tuple[str, ...] = ()


def find_data(root: str, cfg: Config, split: bool = False) -> OwnData:
    """Finds the data that a config needs in a folder.

    Args:
        root (str): the folder.
        cfg (Config): the config, whose ``default_scope`` is the task.
        split (bool): whether the validation data are to be taken from the training data. Default: False.

    Returns:
        OwnData: what was found; ``val`` is None only with ``split``.

    Raises:
        LaunchError: the folder does not hold such data, or something in it is wrong. The message names what was found and
            what is expected.
    """
    scope = cfg.get('default_scope')
    if scope not in FINDERS:
        raise LaunchError(f'--data needs a config of mmdet, mmseg or mmpretrain, but the default_scope of {cfg.filename} is '
                          f'{scope!r}: write the data into a config of your own')
    if not osp.isdir(root):
        state = 'is a file' if osp.exists(root) else 'does not exist'
        raise LaunchError(f'--data must be a folder, but {root} {state} (looked from {os.getcwd()})')
    root = osp.join(osp.normpath(root), '')
    data = FINDERS[scope](root)
    if data is None:
        raise LaunchError(_why_none(root, scope, cfg.filename))
    if data.val is None and not split:
        raise LaunchError(f'{root} must have data for validation beside those for training ({_place(data.train)}), but has '
                          f'none: {EXPECTED[scope]}. To take a part of the training data: --val-fraction 0.2')
    if data.val is not None and split:
        raise LaunchError(f'--val-fraction divides data that have no part for validation, but {root} has one '
                          f'({_place(data.val)}): leave --val-fraction out')
    if not split:
        _refuse_hidden_folders(data)
    return data


def _refuse_hidden_folders(data: OwnData) -> None:
    """mmseg takes images from them, and mmpretrain takes them for classes, where no list names the samples."""
    for part in (data.train, data.val) if data.scope != 'mmdet' else ():
        hidden = hidden_folders(part.images)
        if hidden:
            raise LaunchError(f'{part.images} must have no hidden folders, because {data.scope} reads them, too, but it has '
                              f'{first_names(hidden)}: remove them')


def _place(part: Part) -> str:
    return part.annotations or part.images


def _left_out(part: Part | None) -> tuple[str, ...]:
    """Notes on files that are no images, or none that are read, because they would be missed in silence."""
    folders = [] if part is None else [part.images, part.annotations]
    return tuple(f'left out of {folder}: {others}, because images must end in {", ".join(EXTENSIONS)}'
                 for folder in folders if folder and (others := others_below(folder)))


def _why_none(root: str, scope: str, config: str) -> str:
    kind = foreign_format(root)
    if kind and scope == 'mmdet':
        return convert(root, kind)
    for other in FINDERS:
        try:
            found = other != scope and FINDERS[other](root) is not None
        except LaunchError:
            found = True
        if found:
            return (f'{root} must hold {NAMES[scope]}, because {config} is a config of {scope}, but it holds {NAMES[other]}: '
                    f'choose another config, or lay the data out as {EXPECTED[scope]}')
    there = [name + '/' * osp.isdir(osp.join(root, name)) for name in sorted(os.listdir(root))]
    held = f'annotations in the format of {kind}' if kind else first_names(there, 8)
    if not images_below(root) and (others := others_below(root)):
        held += f' with {others}, and no images that end in {", ".join(EXTENSIONS)}'
    return f'{root} must hold {NAMES[scope]} ({EXPECTED[scope]}), but no such data were found in it; it holds {held}'


# COCO ----------------------------------------------------------------------------------------------------------------------

def find_detection(root: str) -> OwnData | None:
    """A set in COCO's format; None if there is no annotation file."""
    files: dict[str | None, list[str]] = {}
    for part, path in _annotation_files(root):
        files.setdefault(part, []).append(path)
    if not any(files.get(part) for part in ('train', 'val', None)):
        return None
    paths = {part: only(files.get(part, []), root, f'annotation file for {LONG[part]}') for part in LONG}
    if paths['train'] is None and paths['val'] is None:
        paths['train'] = only(files[None], root, 'annotation file')
    if paths['train'] is None:
        raise LaunchError(f'{root} must have an annotation file for training, but has only {paths["val"]} for validation: '
                          f'{EXPECTED["mmdet"]}')
    train = _coco_part(root, paths['train'], 'train')
    classes, notes = _coco_classes(train)
    if files.get('test'):
        notes.append(f'{first_names(files["test"])}: not used; tools/test.py tests on the validation data')
    return OwnData(root, 'mmdet', classes, train, paths['val'] and _coco_part(root, paths['val'], 'val'), tuple(notes))


def _annotation_files(root: str) -> Iterator[tuple[str | None, str]]:
    """Files that look like COCO annotations of boxes, with what they are for."""
    for folder in dict.fromkeys(('', 'annotations', *folders_of(root))):
        inside = part_of(folder)
        place = osp.join(root, folder)
        if not osp.isdir(place) or (folder not in ('', 'annotations') and inside is None):
            continue
        for name in sorted(os.listdir(place)):
            stem, extension = osp.splitext(name)
            if extension.lower() != '.json' or words_of(stem) & OTHER_TASKS or not osp.isfile(osp.join(place, name)):
                continue
            part = part_of(stem)
            if part in (None, inside or part) and (part or words_of(stem) & COCO_WORDS):
                yield inside or part, osp.join(place, name)


def _coco_part(root: str, path: str, part: str) -> Part:
    content = load_annotations(path)
    try:
        names = tuple(str(image['file_name']) for image in content['images'])
        [(category['id'], category['name']) for category in content['categories']]
    except (KeyError, TypeError) as error:
        raise LaunchError(no_annotations(path, error)) from None
    if not names:
        raise LaunchError(f'{path} must list images, but has none')
    folders = [osp.join(osp.dirname(path), ''), *part_folders(root, part), *part_folders(osp.join(root, 'images'), part)]
    folders += [osp.join(folder, 'images', '') for folder in folders]
    folders += [osp.join(root, name, '') for name in ('images', 'data')] + [root]
    folders = list({osp.realpath(folder): folder for folder in reversed(folders) if osp.isdir(folder)}.values())[::-1]
    relative = [name for name in names if not osp.isabs(name)]  # an absolute one is found from any folder
    sample = relative[::max(len(relative) // 50, 1)]
    found = {folder: sum(osp.isfile(osp.join(folder, name)) for name in sample) for folder in folders}
    most = max(found.values())
    best = [folder for folder, count in found.items() if count == most]
    if relative and not most:
        raise LaunchError(f'the images of {path} must lie in one of the folders {first_names(folders, 6)}, but none of them '
                          f'has {first_names(names, 2)}: put the images there')
    folder = only(best, root, f'folder with the images of {path}') if relative else best[0]
    missing = [name for name in names if not osp.isfile(osp.join(folder, name))]
    if missing:
        raise LaunchError(f'{folder if relative else "the disk"} must have all {len(names)} images of {path}, but '
                          f'{len(missing)} are missing ({first_names(missing)}): put them there, or remove their entries from '
                          'a copy of the file')
    return Part(folder, path, names, content=content)


def _coco_classes(part: Part) -> tuple[tuple[str, ...], list[str]]:
    """The names of the categories in the order of the file, in which mmdet labels."""
    categories, notes = list(part.content['categories']), []
    check_names([category['name'] for category in categories], part.annotations, 'category')
    used = {annotation.get('category_id') for annotation in part.content.get('annotations') or []}
    groups = {category.get('supercategory') for category in categories}
    # Roboflow's exports begin with a category that stands for the whole project and has no objects.
    for category in categories[:1]:
        if category['id'] not in used and category.get('supercategory') == 'none' and groups == {'none', category['name']}:
            categories.remove(category)
            notes.append(f'the category {category["name"]!r} is left out: it is the group of all others and has no objects')
    if not categories:
        raise LaunchError(f'{part.annotations} must have categories, a list of classes with id and name, but has none')
    return tuple(str(category['name']) for category in categories), notes


# Segmentation --------------------------------------------------------------------------------------------------------------

def find_segmentation(root: str) -> OwnData | None:
    """Images and label maps in two folders; None if there are no such folders."""
    pairs = [(osp.join(root, images, ''), osp.join(root, maps, '')) for images, maps in (('images', 'annotations'),
                                                                                          ('img_dir', 'ann_dir'))]
    pairs = [pair for pair in pairs if osp.isdir(pair[0]) and osp.isdir(pair[1]) and next(iter(images_below(pair[1])), None)]
    if not pairs:
        return None
    only([images for images, _ in pairs], root, 'folder of images that has label maps')
    images, maps = pairs[0]
    parts = {part: _map_part(root, images, maps, part) for part in LONG}
    train = parts['train']
    if train is None:
        if parts['val'] is not None:
            raise LaunchError(f'{root} must have images for training, but has only those for validation '
                              f'({parts["val"].images}): {EXPECTED["mmseg"]}')
        test = [name for folder in (images, maps) for name in part_folders(folder, 'test')]
        if test:  # --val-fraction would train on it
            raise LaunchError(f'{root} must have a folder of images for training that is named so, because it has one for '
                              f'testing ({test[0]}): {EXPECTED["mmseg"]}')
        train = _maps_of(images, maps)
    classes, notes = _map_classes(root, train)
    return OwnData(root, 'mmseg', classes, train, parts['val'], notes + _left_out(train) + _left_out(parts['val']))


def _map_part(root: str, images: str, maps: str, part: str) -> Part | None:
    folder = only(part_folders(images, part), root, f'folder with images for {LONG[part]}')
    map_folder = only(part_folders(maps, part), root, f'folder with label maps for {LONG[part]}')
    if (folder is None) != (map_folder is None):
        raise LaunchError(f'{root} must have images and label maps for {LONG[part]}, but has only '
                          f'{folder or map_folder}: {EXPECTED["mmseg"]}')
    return None if folder is None else _maps_of(folder, map_folder)


def _maps_of(images: str, maps: str) -> Part:
    """The samples of two folders; the map of an image has its name."""
    files = {folder: images_below(folder) for folder in (images, maps)}
    suffixes = {}
    for folder, names in files.items():
        endings = Counter(osp.splitext(name)[1] for name in names)
        if not names:
            raise LaunchError(f'{folder} must have images that end in {", ".join(EXTENSIONS)}, but has '
                              f'{others_below(folder) or "none"}')
        if len(endings) != 1:
            found = first_names([f'{count} {ending}' for ending, count in endings.most_common()])
            raise LaunchError(f'all images in {folder} must have names that end alike, such as .png, but there are {found}: '
                              'convert them to one format')
        suffixes[folder], = endings
    stems = {folder: {name.removesuffix(suffixes[folder]) for name in names} for folder, names in files.items()}
    missing = sorted(stems[images] - stems[maps])
    if missing:
        raise LaunchError(f'every image in {images} must have a label map of its name in {maps}, but {len(missing)} of '
                          f'{len(stems[images])} have none ({first_names(missing)})')
    return Part(images, maps, tuple(sorted(stems[images])), suffixes[images], suffixes[maps])


def _map_classes(root: str, part: Part) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names in classes.txt, or the numbers that the label maps hold."""
    path = osp.join(root, 'classes.txt')
    if osp.isfile(path):
        try:
            with open(path, encoding='utf-8-sig') as file:
                names = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise LaunchError(f'{path} must be a text in UTF-8, but is not: {error}') from None
        if len(names) < 2:
            raise LaunchError(f'{path} must have the name of a class in every line, and at least two, the background counted, '
                              f'but has {first_names(names) or "none"}')
        check_names(names, path, 'class')
        return tuple(names), ()
    # Any number may be a class.
    anything = SimpleNamespace(_metainfo=dict(classes=range(255)), ignore_index=255, reduce_zero_label=False, label_map=None)
    maps = LabelMaps(anything, 'train')
    for index, name in enumerate(track(part.samples, 'Looking for classes', console=Console(stderr=True))):
        maps.add(index, osp.join(part.annotations, name + part.map_suffix))
    values = sorted(set(maps.raw) - {255})
    if values != list(range(len(values))) or len(values) < 2:
        raise LaunchError(f'without {path} the label maps in {part.annotations} must hold the numbers of at least two classes '
                          f'from 0 on without a gap (255 is ignored), but hold {first_names(sorted(maps.raw), 12)}: write the '
                          'names of all classes into classes.txt, one a line, or correct the maps (a mask of 0 and 255 as 0 '
                          'and 1)')
    return tuple(map(str, values)), (f'there is no {path}: the classes are the numbers that the {len(part.samples)} label maps '
                                     'for training hold',)


# Classification ------------------------------------------------------------------------------------------------------------

def find_classification(root: str) -> OwnData | None:
    """A folder of images for each class; None if there are no such folders."""
    folders = {part: only([folder for folder in part_folders(root, part) if _class_folders(folder)], root,
                          f'folder with class folders for {LONG[part]}') for part in LONG}
    if folders['train'] is None and folders['val'] is not None:
        raise LaunchError(f'{root} must have images for training, but has only those for validation ({folders["val"]}): '
                          f'{EXPECTED["mmpretrain"]}')
    folder = folders['train'] or root
    classes = _class_folders(folder)
    if folder == root and any(map(part_of, classes)):
        return None
    samples = _class_samples(folder, classes)
    filled = {sample.split(os.sep)[0] for sample in samples}
    empty = [name for name in classes if name not in filled]
    if empty:
        raise LaunchError(f'every folder in {folder} is a class and must have images, but {first_names(empty)} '
                          f'{"has" if len(empty) == 1 else "have"} none that end in {", ".join(EXTENSIONS)}: remove the '
                          'folder, or add its images')
    if len(classes) < 2:
        if folders['train'] is None:
            return None
        raise LaunchError(f'{folder} must have a folder for each class, of which there are at least two, but has only '
                          f'{first_names(classes)}')
    train = Part(folder, samples=samples)
    val = None
    if folders['val'] is not None:
        val = Part(folders['val'], samples=_class_samples(folders['val'], _class_folders(folders['val'])))
    return OwnData(root, 'mmpretrain', tuple(classes), train, val, _left_out(train) + _left_out(val))


def _class_folders(path: str) -> list[str]:
    names = folders_of(path)
    if set(map(str.lower, names)) & NO_CLASSES:
        return []
    return names if any(images_below(osp.join(path, name)) for name in names) else []


def _class_samples(folder: str, classes: Sequence[str]) -> tuple[str, ...]:
    return tuple(osp.join(name, image) for name in classes for image in images_below(osp.join(folder, name)))


FINDERS: dict[str, Callable[[str], OwnData | None]] = dict(
    mmdet=find_detection, mmseg=find_segmentation, mmpretrain=find_classification)
