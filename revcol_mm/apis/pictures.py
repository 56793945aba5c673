# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Pictures that a run draws: by which visualizer, and their names."""
import os
import os.path as osp
from collections import Counter
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping

from mmengine.registry import VISUALIZERS
from mmengine.visualization import Visualizer

from .checks.common import leaves, say
from .errors import LaunchError

#: The visualizers of the packages, which draw data samples with their classes.
PACKAGES = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer', mmpretrain='UniversalVisualizer')

#: The file that their visualization hooks write in a test, inside of the folder; {} is the image's name. mmdet's has that name.
FILES = dict(mmseg='vis_data/vis_image/test_{}_0.png', mmpretrain='{}_0.png')


def build_visualizer(scope: str, metainfo: Mapping[str, Any]) -> Visualizer:
    """A package's own visualizer, whichever the config has, and without its backends.

    Args:
        scope (str): 'mmdet', 'mmseg' or 'mmpretrain'.
        metainfo (Mapping): of the data set, with its classes.
    """
    visualizer = VISUALIZERS.get(f'{scope}.{PACKAGES[scope]}')()  # built by the registry it would be shared by its name
    visualizer.dataset_meta = metainfo
    return visualizer


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """File names for images whose own name another image has, too: their folders below the common one come before the name.

    Args:
        paths (Iterable[str]): of images.

    Returns:
        dict[str, str]: such as {'data/a/0.png': 'a_0.png', 'data/b/0.png': 'b_0.png'}; only for images that need it.
    """
    paths = list(dict.fromkeys(paths))
    counts = Counter(osp.basename(path) for path in paths)
    same = [path for path in paths if counts[osp.basename(path)] > 1]
    if not same:
        return {}
    root = osp.commonpath([osp.dirname(osp.abspath(path)) for path in same])
    names, taken = {}, set(counts)
    for path in same:
        name = draft = osp.relpath(osp.abspath(path), root).replace(os.sep, '_')
        number = 1
        while name in taken:  # a_b/0.png and a/b_0.png, or 0.png beside a/0.png
            number += 1
            name = f'{number}_{draft}'
        names[path] = name
        taken.add(name)
    return names


def name_pictures_apart(runner: Any, folder: str, scope: str | None) -> None:
    """Makes a runner's visualizer write a picture of its own for every image of the test.

    The visualization hooks of mmdet, mmseg and mmpretrain name it after the image without its folder.

    Args:
        runner (Runner | FlexibleRunner): with a test loop that is built.
        folder (str): the folder of the pictures.
        scope (str | None): the config's ``default_scope``.

    Raises:
        LaunchError: if a picture would replace an image or an annotated map.
    """
    infos = list(_images_of(runner))
    names = distinct_names(info['img_path'] for info in infos)
    written = FILES.get(scope, '{}')
    _check_kept(infos, f'--show-dir {folder}', {
        osp.realpath(osp.join(folder, written.format(names.get(info['img_path'], osp.basename(info['img_path'])))))
        for info in infos})
    if not names:
        return
    say(f'--show-dir: {len(names)} images have the name of another one; their pictures are named with their folders')
    for method in ('add_datasample', 'visualize_cls'):
        if hasattr(runner.visualizer, method):
            setattr(runner.visualizer, method, _renaming(getattr(runner.visualizer, method), names))


def check_label_maps(runner: Any, folder: str) -> None:
    """Checks that mmseg can write a label map for every image of the test into a folder.

    It names a map after the image without its folder, and writes 8 bits.

    Args:
        runner (Runner | FlexibleRunner): of mmseg, with a test loop that is built.
        folder (str): the folder.

    Raises:
        LaunchError: if two images have the same name, if a map would replace an image or an annotated map, or if there are
            more than 255 classes.
    """
    taken: dict[str, str] = {}
    infos = list(_images_of(runner))
    for info in infos:
        path = info['img_path']
        place = osp.realpath(osp.join(folder, f'{osp.splitext(osp.basename(path))[0]}.png'))
        if taken.setdefault(place, path) != path:
            raise LaunchError(f'--out {folder} must get a map for every image, but {taken[place]} and {path} have the same '
                              'name: write --out FILE.pkl, or use tools/infer.py, which names them apart')
    _check_kept(infos, f'--out {folder}', taken)
    most = max((len(dataset.metainfo.get('classes') or ()) for dataset in leaves(runner.test_loop.dataloader.dataset)),
               default=0)
    if most > 255:
        raise LaunchError(f'--out {folder} writes maps of 8 bits, for at most 255 classes, but there are {most}: write '
                          '--out FILE.pkl, or use tools/infer.py, which writes 16 bits')


def _images_of(runner: Any) -> Iterator[Mapping[str, Any]]:
    """What the test's data sets say of their images."""
    for dataset in leaves(runner.test_loop.dataloader.dataset):
        infos = map(dataset.get_data_info, range(len(dataset))) if hasattr(dataset, 'get_data_info') else ()
        yield from (info for info in infos if isinstance(info.get('img_path'), str))


def _check_kept(infos: Iterable[Mapping[str, Any]], option: str, written: Collection[str]) -> None:
    """Raises LaunchError if one of the files that are written, as real paths, is an image or an annotated map of the test."""
    for info in infos:
        for given in (info['img_path'], info.get('seg_map_path')):
            if given and osp.realpath(given) in written:
                raise LaunchError(f'{option} must be a folder without the data, but {given} would be replaced: choose another '
                                  'folder')


def _renaming(draw: Callable, names: Mapping[str, str]) -> Callable:
    def draw_apart(*args, **kwargs) -> None:
        path = kwargs['data_sample'].get('img_path') if 'data_sample' in kwargs else None
        if path in names:
            def rename(text: Any) -> Any:
                if not isinstance(text, str):
                    return text
                folder, name = osp.split(text)
                return osp.join(folder, name.replace(osp.basename(path), names[path]))

            args = (*map(rename, args[:1]), *args[1:])
            kwargs = {key: rename(value) if key in ('name', 'out_file') else value for key, value in kwargs.items()}
        draw(*args, **kwargs)

    return draw_apart
