# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Names of pictures and label maps."""
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from revcol_mm.apis import test
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.pictures import check_label_maps, distinct_names, name_pictures_apart


def test_images_of_one_name_are_named_with_their_folders():
    assert distinct_names(['d/a/0.png', 'd/b/0.png', 'd/b/1.png']) == {'d/a/0.png': 'a_0.png', 'd/b/0.png': 'b_0.png'}


def test_no_two_names_are_the_same():
    paths = ['d/a/b/0.png', 'd/a_b/0.png', 'd/0.png', 'd/c/a_b_0.png']
    names = {path: path.rpartition('/')[2] for path in paths} | distinct_names(paths)
    assert len(set(names.values())) == len(paths)


def test_an_image_that_is_used_twice_keeps_its_name():
    assert distinct_names(['d/0.png', 'd/0.png']) == {}


def runner(*images, classes=2):
    """A stand-in for a runner of mmseg, whose test set has these images, and maps beside them."""
    infos = [dict(img_path=path, seg_map_path=path.replace('images', 'maps').replace('.jpg', '.png')) for path in images]

    class Images:
        metainfo, __len__ = dict(classes=range(classes)), lambda self: len(infos)
        get_data_info = staticmethod(infos.__getitem__)

    return SimpleNamespace(test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=Images())))


@pytest.mark.parametrize('images, folder, classes, message', [
    (('images/a/0.jpg', 'images/b/0.jpg'), 'out', 2,
     'images/a/0.jpg and images/b/0.jpg have the same name: write --out FILE.pkl'),
    (('images/0.jpg', ), './maps', 2, 'folder without the data, but maps/0.png would be replaced'),
    (('images/0.png', ), 'images', 2, 'but images/0.png would be replaced'),
    (('images/0.jpg', ), 'out', 256, 'at most 255 classes, but there are 256')])
def test_label_maps_that_would_replace_something_are_refused(images, folder, classes, message):
    with pytest.raises(LaunchError, match=message):
        check_label_maps(runner(*images, classes=classes), folder)


def test_other_label_maps_are_written():
    check_label_maps(runner('images/0.jpg', 'images/1.jpg', classes=255), 'out')


@pytest.mark.parametrize('scope, folder, images', [
    ('mmdet', './images', ['images/0.jpg']), ('mmpretrain', 'images', ['images/0.jpg', 'images/0.jpg_0.png']),
    ('mmseg', 'out', ['images/0.jpg', 'out/vis_data/vis_image/test_0.jpg_0.png'])])
def test_drawn_pictures_that_would_replace_an_image_are_refused(scope, folder, images):
    with pytest.raises(LaunchError, match=f'--show-dir {folder} must be .*, but {images[-1]} would be replaced'):
        name_pictures_apart(runner(*images), folder, scope)
    name_pictures_apart(runner(*images), 'elsewhere', scope)


def test_drawn_pictures_that_are_named_apart_may_lie_beside_the_images():
    tested = runner('images/a/0.jpg', 'images/b/0.jpg')
    tested.visualizer = None
    name_pictures_apart(tested, 'images/a', 'mmdet')  # as a_0.jpg and b_0.jpg


def test_a_picture_is_not_drawn_through_a_link_to_an_image(tmp_path):
    (tmp_path / '0.jpg').touch()
    (tmp_path / 'drawn').mkdir()
    (tmp_path / 'drawn' / '0.jpg').symlink_to(tmp_path / '0.jpg')
    with pytest.raises(LaunchError, match='0.jpg would be replaced'):
        name_pictures_apart(runner(str(tmp_path / '0.jpg')), str(tmp_path / 'drawn'), 'mmdet')


def visualize(scope, *options, **settings):
    """A config as tools/test.py changes it for these options."""
    cfg = Config(dict(default_scope=scope, default_hooks=dict(visualization=dict(type='Hook')), **settings))
    args = test.parse_test_args(['config', 'checkpoint', '--show-dir', 'drawn', *options])
    cfg.merge_from_dict(args.cfg_options or {})
    test._set_visualization(cfg, args)
    return cfg


def visualization(scope, *options):
    return visualize(scope, *options).default_hooks.visualization


def test_views_of_a_classifier_cannot_be_drawn():
    with pytest.raises(LaunchError, match='with --tta it got several views: leave --tta out, or the pictures'):
        visualization('mmpretrain', '--tta')
    for scope in ('mmdet', 'mmseg'):
        assert visualization(scope, '--tta').draw


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_every_image_is_drawn_unless_the_command_line_names_an_interval(scope):
    assert visualization(scope).interval == 1
    assert visualization(scope, '--cfg-options', 'default_hooks.visualization.interval=7').interval == 7


def test_a_segmentor_without_a_visualizer_gets_one_that_writes_into_the_folder():
    expected = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], save_dir='drawn')
    assert visualize('mmseg').visualizer == expected
    assert visualize('mmseg', visualizer=dict(type='Other', alpha=1)).visualizer == dict(expected, type='Other', alpha=1)
