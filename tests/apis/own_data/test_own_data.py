# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""tools/train.py --data: layouts of folders, the configs that come of them, and what is said of a folder that is none."""
import argparse
import copy
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from revcol_mm.apis import own_data
from revcol_mm.apis.config import load_config
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.own_data import use_own_data
from revcol_mm.apis.own_data.layouts import find_data
from revcol_mm.apis.own_data.settings import _fit_weights, _fitting
from revcol_mm.apis.train import parse_train_args, train
from revcol_mm.datasets import make_digits
from revcol_mm.utils.configs import build_on_meta
from tests.apis.checks.made_up import write_coco, write_folders

pytestmark = pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')

DETECTOR, CLASSIFIER = 'demo/cascade_rcnn_revcol_nano_digits', 'demo/revcol_nano_digits_cls'
SEGMENTOR = 'demo/upernet_revcol_nano_digits'
SCOPES = dict(mmdet=Config(dict(default_scope='mmdet'), filename='detector.py', cfg_text=' '),
              mmseg=Config(dict(default_scope='mmseg'), filename='segmentor.py', cfg_text=' '),
              mmpretrain=Config(dict(default_scope='mmpretrain'), filename='classifier.py', cfg_text=' '))


@functools.cache
def _config(name: str) -> Config:
    return load_config(argparse.Namespace(config=name, cfg_options=None, launcher='none', work_dir='work', local_rank=0))


def config(name: str) -> Config:
    return copy.deepcopy(_config(name))


def on_own_data(name: str, root, fraction: float | None = None) -> Config:
    cfg = config(name)
    use_own_data(cfg, str(root), fraction)
    return cfg


def write_images(*paths: Path, suffix: str = '.png') -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(f'{path}{suffix}', np.zeros((6, 8, 3), np.uint8))


def write_maps(root: Path, parts=('train', 'val'), names=('images', 'annotations'), values=(0, 1, 255), count: int = 2) -> Path:
    for part in parts:
        for index in range(count):
            write_images(root / names[0] / part / str(index), suffix='.jpg')
            (root / names[1] / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / names[1] / part / f'{index}.png'), np.array([values] * 6, np.uint8))
    return root


def coco(root: Path, *parts: str, **kwargs) -> Path:
    """train.json with its images in train/, and so on."""
    root.mkdir(parents=True, exist_ok=True)
    for part in parts or ('train', 'val'):
        write_coco(root, part, **kwargs)
    return root


def moved(root: Path, **places: str) -> Path:
    """Other names for files and folders of a set; '__' stands for a dot."""
    for old, new in places.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old.replace('__', '.'), root / new)
    return root


# The demo ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('demo')
    make_digits(folder / 'data' / 'digits', num_train=6, num_val=3)
    return folder


def test_the_layout_of_the_bundled_digits_gives_the_settings_and_the_batches_of_the_demo(tmp_path):
    digits = tuple('0123456789')
    root = coco(tmp_path / 'data' / 'digits', categories=digits, objects=digits)
    moved(root, train__json='annotations/instances_train.json', val__json='annotations/instances_val.json')
    (root / 'semantic').mkdir()
    (root / 'digits.json').write_text('{}')
    compare_with_demo()


@pytest.mark.slow
def test_the_bundled_digits_give_the_settings_and_the_batches_of_the_demo(digits, monkeypatch):
    monkeypatch.chdir(digits)
    compare_with_demo()


def compare_with_demo() -> None:
    demo, own = config(DETECTOR), on_own_data(DETECTOR, 'data/digits')
    assert own.auto_scale_lr == dict(enable=True, base_batch_size=demo.train_dataloader.batch_size)  # a factor of 1
    own.auto_scale_lr.enable = demo.auto_scale_lr.enable
    assert own.to_dict() == demo.to_dict()
    with DefaultScope.overwrite_default_scope('mmdet'):
        for loader in ('train_dataloader', 'val_dataloader'):
            theirs, ours = (DATASETS.build(copy.deepcopy(cfg[loader].dataset)) for cfg in (demo, own))
            assert len(ours) == len(theirs) and ours.metainfo['classes'] == theirs.metainfo['classes']
            for sample, expected in zip(ours, theirs):
                assert torch.equal(sample['inputs'], expected['inputs'])
                for key in ('labels', 'bboxes'):
                    values = (part['data_samples'].gt_instances[key] for part in (sample, expected))
                    assert np.array_equal(*(getattr(value, 'tensor', value).numpy() for value in values))


@pytest.mark.slow
def test_the_crops_give_the_samples_of_the_classification_demo(digits, monkeypatch):
    monkeypatch.chdir(digits)
    demo, own = config(CLASSIFIER), on_own_data(CLASSIFIER, 'data/digits/crops')
    for loader in ('train_dataloader', 'val_dataloader'):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            theirs, ours = (DATASETS.build(cfg[loader].dataset) for cfg in (demo, own))
        assert ours.metainfo['classes'] == theirs.metainfo['classes']
        assert [(Path(info['img_path']), info['gt_label']) for info in map(ours.get_data_info, range(len(ours)))] == [
            (Path(info['img_path']), info['gt_label']) for info in map(theirs.get_data_info, range(len(theirs)))]
    assert own.model.to_dict() == demo.model.to_dict()


@pytest.mark.slow
def test_a_run_is_repeated_from_its_dumped_config_without_the_flag(digits, monkeypatch):
    monkeypatch.chdir(digits)
    options = ['--cfg-options', 'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0', 'train_cfg.max_iters=2',
               'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0', 'train_cfg.val_interval=2',
               'val_dataloader.persistent_workers=False', 'randomness.seed=0', 'default_hooks.checkpoint.interval=2']
    train([f'{DETECTOR}.py', '--data', 'data/digits', '--work-dir', 'first', *options])
    dumped = 'first/cascade_rcnn_revcol_nano_digits.py'
    train([dumped, '--work-dir', 'second'])
    first, second = (torch.load(f'{name}/iter_2.pth', weights_only=True)['state_dict'] for name in ('first', 'second'))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert Config.fromfile(dumped).auto_scale_lr.enable is True


@pytest.mark.slow
@pytest.mark.parametrize('name, root', [(DETECTOR, 'data/digits'), (CLASSIFIER, 'data/digits/crops'), (SEGMENTOR, 'maps')])
def test_a_dry_run_draws_16_training_samples_and_trains_nothing(digits, tmp_path, monkeypatch, capsys, name, root):
    for part in ('train', 'val'):
        for kind, source in (('images', part), ('annotations', f'semantic/{part}')):
            shutil.copytree(digits / 'data/digits' / source, tmp_path / 'maps' / kind / part)
    (tmp_path / 'maps/classes.txt').write_text('\n'.join([*'0123456789', 'background']))
    (tmp_path / 'data').symlink_to(digits / 'data')
    train([f'{name}.py', '--data', root, '--dry-run', '--work-dir', 'work'])
    pictures = sorted((tmp_path / 'work/own_data/samples').iterdir())
    assert len(pictures) == min(16, 6 if name != CLASSIFIER else 16)
    sizes = {cv2.imread(str(path)).shape[:2] for path in pictures}
    assert sizes == {(128, 128) if name != CLASSIFIER else (32, 32)}
    assert f'{len(pictures)} training samples are drawn in work/own_data/samples' in capsys.readouterr().out
    assert not list((tmp_path / 'work').glob('*.pth'))


# Layouts -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('places, train, val, images', [
    ({}, 'train.json', 'val.json', 'train/'),
    (dict(train__json='annotations/instances_train2017.json', val__json='annotations/instances_val2017.json',
          train='train2017', val='val2017'), 'annotations/instances_train2017.json', 'annotations/instances_val2017.json',
     'train2017/'),
    (dict(train__json='train/_annotations.coco.json', val__json='val/_annotations.coco.json', val='valid'),
     'train/_annotations.coco.json', 'valid/_annotations.coco.json', 'train/'),
    (dict(train__json='annotations/train.json', val__json='annotations/val.json', train='images/train', val='images/val'),
     'annotations/train.json', 'annotations/val.json', 'images/train/')])
def test_coco_sets_are_found_under_the_usual_names(tmp_path, places, train, val, images):
    root = moved(coco(tmp_path / 'mine'), **places)
    (root / 'annotations').mkdir(exist_ok=True)
    (root / 'annotations' / 'captions_train2017.json').write_text('{}')
    data = find_data(str(root), SCOPES['mmdet'])
    assert (data.train.annotations, data.val.annotations, data.train.images) == tuple(
        f'{root}/{name}' for name in (train, val, images))
    assert data.classes == ('disc', 'square') and data.train.samples == ('0.png', '1.png')


def test_images_in_one_folder_are_found_by_the_names_in_the_file(tmp_path):
    root = coco(tmp_path)
    for part in ('train', 'val'):
        (root / 'images').mkdir(exist_ok=True)
        shutil.move(root / part, root / 'images' / f'x{part}x')
        content = json.loads((root / f'{part}.json').read_text())
        for image in content['images']:
            image['file_name'] = f'x{part}x/{image["file_name"]}'
        (root / f'{part}.json').write_text(json.dumps(content))
    assert find_data(str(root), SCOPES['mmdet']).train.images == f'{root}/images/'


def test_images_may_have_absolute_names(tmp_path):
    coco(tmp_path / 'mine')
    for part in ('train', 'val'):
        spoil(tmp_path / f'mine/{part}.json', lambda content: [
            image.update(file_name=str(tmp_path / 'mine' / part / image['file_name'])) for image in content['images']])
    cfg = on_own_data(DETECTOR, tmp_path / 'mine')
    with DefaultScope.overwrite_default_scope('mmdet'):
        data = DATASETS.build(cfg.train_dataloader.dataset)
    assert all(Path(data.get_data_info(index)['img_path']).is_file() for index in range(len(data)))


def test_the_group_that_roboflow_lists_as_a_category_is_no_class(tmp_path):
    def group(content):
        for category in content['categories']:
            category['supercategory'] = 'shapes'
        content['categories'].insert(0, dict(id=0, name='shapes', supercategory='none'))

    data = find_data(str(coco(tmp_path, change=group)), SCOPES['mmdet'])
    assert data.classes == ('disc', 'square') and "'shapes' is left out" in data.notes[0]


@pytest.mark.parametrize('parts, names', [(('train', 'val'), ('images', 'annotations')),
                                          (('train', 'val'), ('img_dir', 'ann_dir')),
                                          (('training', 'validation'), ('images', 'annotations'))])
def test_label_maps_are_found_with_and_without_classes_txt(tmp_path, parts, names):
    root = write_maps(tmp_path / 'maps', parts, names)
    data = find_data(str(root), SCOPES['mmseg'])
    assert data.classes == ('0', '1') and (data.train.img_suffix, data.train.map_suffix) == ('.jpg', '.png')
    assert data.val.images == f'{root}/{names[0]}/{parts[1]}/' and data.val.annotations == f'{root}/{names[1]}/{parts[1]}/'
    (root / 'classes.txt').write_text('road\nsky \n\n')
    assert find_data(str(root), SCOPES['mmseg']).classes == ('road', 'sky')


def test_class_folders_are_the_classes_in_the_order_of_their_names(tmp_path):
    write_folders(tmp_path / 'train', 'dog', 'cat')
    write_folders(tmp_path / 'valid', 'dog', 'cat')
    data = find_data(str(tmp_path), SCOPES['mmpretrain'])
    assert data.classes == ('cat', 'dog') and data.val.images == f'{tmp_path}/valid/'


@pytest.mark.parametrize('scope', ['mmseg', 'mmpretrain'])
def test_files_that_are_not_taken_for_images_are_counted(tmp_path, scope):
    root, folder = tmp_path / 'mine', 'images/train' if scope == 'mmseg' else 'train'
    if scope == 'mmseg':
        (write_maps(root) / 'classes.txt').write_text('road\nsky\n')
    else:
        write_images(*(root / part / group / '0' for part in ('train', 'val') for group in 'ab'))
    assert find_data(str(root), SCOPES[scope]).notes == ()
    (root / folder / 'a').mkdir(exist_ok=True)
    for name in ('1.JFIF', '2.jfif', '1.heic', '.hidden.heic', 'LABELS'):
        (root / folder / 'a' / name).write_bytes(b'')
    data = find_data(str(root), SCOPES[scope])
    note, = data.notes
    assert note.startswith(f'left out of {root}/{folder}/: 2 .jfif, 1 .heic, 1 LABELS, because images must end in .jpg, .jpeg')
    assert len(data.train.samples) == 2


# Configs -------------------------------------------------------------------------------------------------------------------

def head_sizes(cfg: Config) -> dict[str, int]:
    """The last layers that tell classes apart, by their sizes, from the built model."""
    last = ('fc_cls', 'cls_branches', 'cls_embed', 'conv_seg', 'conv_logits', 'label_embedding', 'classifier')
    return {name: module.weight.shape[0] for name, module in build_on_meta(copy.deepcopy(cfg)).named_modules()
            if getattr(module, 'weight', None) is not None and any(part in last for part in name.split('.'))}


@pytest.mark.parametrize('name, heads, sizes', [
    (DETECTOR, 6, {3, 4}), ('demo/htc_revcol_nano_digits', 6, {3, 4}), ('demo/dino_revcol_nano_digits', 4, {3}),
    ('demo/mask_rcnn_revcol_vit_digits', 2, {3, 4})])
def test_every_head_of_a_detector_gets_the_number_of_classes(tmp_path, name, heads, sizes):
    root = coco(tmp_path / 'mine', categories=('a', 'b', 'c'), objects=('a', 'b', 'c'))
    found = head_sizes(on_own_data(name, root))
    assert len(found) == heads and set(found.values()) == sizes


def test_htc_trains_without_its_semantic_branch(tmp_path):
    cfg = on_own_data('demo/htc_revcol_nano_digits', coco(tmp_path / 'mine'))
    loaders = [cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader]
    assert cfg.model.roi_head.semantic_head is None and "'with_seg': True" not in str(loaders)
    assert build_on_meta(cfg).roi_head.with_semantic is False


@pytest.mark.parametrize('name, heads', [(SEGMENTOR, 2), ('demo/mask2former_revcol_nano_digits', 1)])
def test_every_head_of_a_segmentor_gets_the_number_of_classes(tmp_path, name, heads):
    cfg = on_own_data(name, write_maps(tmp_path / 'mine', values=(0, 1, 2)))
    found = head_sizes(cfg)
    mask2former = 'mask2former' in name
    assert len(found) == heads and set(found.values()) == {4 if mask2former else 3}
    weights = cfg.model.decode_head.loss_cls.class_weight if mask2former else cfg.model.decode_head.loss_decode.class_weight
    assert weights == ([1.0] * 3 + [0.1] if mask2former else None)  # UPerNet's were made for digits and their background
    assert cfg.val_evaluator.type == 'IoUMetric'


@pytest.mark.parametrize('background, kind', [('background', 'ForegroundIoUMetric'), ('bg', 'IoUMetric'),
                                              (('background', 'void'), 'IoUMetric')])
def test_the_background_is_left_out_only_where_the_data_have_it(background, kind):
    data = SimpleNamespace(scope='mmseg', classes=('background', 'b', 'g'))
    assert _fitting(dict(type='ForegroundIoUMetric', background=background), None, data)['type'] == kind


def test_every_classifier_of_intermediate_supervision_gets_the_number_of_classes(tmp_path):
    for part in ('train', 'val'):
        write_folders(tmp_path / 'mine' / part, 'a', 'b', 'c')
    cfg = on_own_data(CLASSIFIER, tmp_path / 'mine')
    model = build_on_meta(copy.deepcopy(cfg))
    assert [module.out_features for module in model.head.cls_blocks.modules() if isinstance(module, torch.nn.Linear)] == [3] * 4
    assert cfg.data_preprocessor.num_classes == 3 and cfg.val_evaluator[0].topk == (1, )


def test_ade20k_s_settings_do_not_stay(tmp_path):
    cfg = on_own_data('upernet_revcol_t', write_maps(tmp_path / 'mine'))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = cfg[loader].dataset
        assert dataset.type == 'BaseSegDataset' and dataset.reduce_zero_label is False
        assert not any('reduce_zero_label' in step for step in dataset.pipeline)
    assert cfg.auto_scale_lr.enable and cfg.auto_scale_lr.base_batch_size == 16


def test_imagenet_s_settings_do_not_stay(tmp_path):
    for part in ('train', 'val'):
        write_folders(tmp_path / 'mine' / part, 'a', 'b')
    cfg = on_own_data('revcol_t_in1k', tmp_path / 'mine')
    assert cfg.train_dataloader.dataset.type == 'CustomDataset' and 'split' not in cfg.train_dataloader.dataset
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 2


def test_weights_of_classes_are_kept_where_they_mean_the_same():
    assert _fit_weights([1.0] * 80 + [0.1], 80, 2) == [1.0, 1.0, 0.1]
    assert _fit_weights([2.0] * 5, 5, 2) == [2.0, 2.0]
    assert _fit_weights([1.0, 2.0], 2, 3) is None
    assert _fit_weights(1.0, 2, 3) == 1.0


# A part for validation -----------------------------------------------------------------------------------------------------

def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER])
def test_a_fraction_is_divided_alike_every_time_and_written_into_the_work_folder_only(tmp_path, name):
    root = tmp_path / 'mine'
    if name == DETECTOR:
        moved(coco(root, 'train', objects=('disc', 'square') * 5), train='images', train__json='result.json')
    elif name == SEGMENTOR:
        write_maps(root, ('', ), count=10)
    else:
        write_images(*(root / group / str(index) for group in 'ab' for index in range(5)))
    before = files_of(root)
    with pytest.raises(LaunchError, match=f'{root}/ must have data for validation .*--val-fraction 0.2'):
        on_own_data(name, root)
    cfg = on_own_data(name, 'mine', 0.2)
    lists = {path: path.read_text() for path in (tmp_path / 'work/own_data').iterdir()}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        parts = [DATASETS.build(cfg[f'{part}_dataloader'].dataset) for part in ('train', 'val')]
    samples = [{info['img_path'] for info in map(part.get_data_info, range(len(part)))} for part in parts]
    assert [len(part) for part in samples] == [8, 2] and not samples[0] & samples[1]
    assert all(Path(path).is_file() for path in samples[0] | samples[1])
    if name == CLASSIFIER:
        assert {Path(path).parent.name for path in samples[1]} == {'a', 'b'}
        info = parts[1].get_data_info(0)
        assert parts[1].metainfo['classes'][info['gt_label']] == Path(info['img_path']).parent.name
    on_own_data(name, 'mine', 0.2)
    assert len(lists) == 2 and lists == {path: path.read_text() for path in lists}
    assert files_of(root) == before


def test_an_image_more_moves_at_most_one_other_to_the_other_part(tmp_path):
    names = [f'{index}' for index in range(101)]
    write_images(*(tmp_path / 'mine' / group / name for group in 'ab' for name in names[:100]))
    parts = []
    for name in names[99:]:
        write_images(*(tmp_path / 'mine' / group / name for group in 'ab'))
        on_own_data(CLASSIFIER, 'mine', 0.2)
        parts.append({line.split()[0] for line in (tmp_path / 'work/own_data/val.txt').read_text().splitlines()})
    assert len(parts[0]) == 40 and len(parts[1] - parts[0]) <= 2  # one in a class


def test_only_the_first_process_writes_the_lists(tmp_path, monkeypatch):
    write_images(*(tmp_path / 'mine' / group / str(index) for group in 'ab' for index in range(5)))
    on_own_data(CLASSIFIER, 'mine', 0.2)
    path = tmp_path / 'work/own_data/val.txt'
    before = path.read_text()
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(own_data, 'PATIENCE', 0.)
    cfg = config(CLASSIFIER)
    cfg.launcher = 'pytorch'
    written = []
    monkeypatch.setattr(own_data, 'open_whole', lambda path, mode: written.append(path) or open(os.devnull, mode))
    use_own_data(cfg, 'mine', 0.2)
    assert not written and path.read_text() == before  # they are there
    use_own_data(cfg, 'mine', 0.4)
    assert len(written) == 2  # on another disk


def test_hidden_folders_are_no_classes_of_divided_data(tmp_path):
    write_images(*(tmp_path / 'mine' / group / str(index) for group in ('a', 'b', '__MACOSX') for index in range(2)))
    assert on_own_data(CLASSIFIER, tmp_path / 'mine', 0.5).train_dataloader.dataset.metainfo.classes == ('a', 'b')


@pytest.mark.parametrize('options, scaled, said', [
    (['train_dataloader.num_workers=0'], True, 'scaled to the real one'),
    (['optim_wrapper.optimizer.lr=0.003'], False, 'learning rate: 0.003, as given, and not scaled'),
    (['auto_scale_lr.enable=False'], False, 'not scaled, because auto_scale_lr.enable=False'),
    (['optim_wrapper.optimizer.lr=0.003', 'auto_scale_lr.enable=True'], True, 'scaled to the real one')])
@pytest.mark.parametrize('kept', [False, True])
def test_a_learning_rate_that_the_user_gives_is_not_scaled(tmp_path, options, scaled, said, kept):
    coco(tmp_path / 'mine')
    args = parse_train_args([DETECTOR, '--cfg-options', *options])
    cfg = config(DETECTOR)
    cfg.auto_scale_lr.enable = kept  # as in a config that an earlier run has kept
    cfg.merge_from_dict(args.cfg_options)
    lines = use_own_data(cfg, 'mine', options=args.cfg_options)
    assert bool(cfg.auto_scale_lr.get('enable')) == scaled
    assert any(said in line for line in lines)


def test_the_best_checkpoint_is_not_chosen_by_a_metric_of_a_replaced_evaluator(tmp_path):
    coco(tmp_path / 'mine')
    for evaluator, chosen in ((dict(type='VOCMetric'), 'auto'), (None, 'coco/bbox_mAP')):
        cfg = config(DETECTOR)
        cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP' if evaluator is None else 'pascal_voc/mAP'
        cfg.val_evaluator = evaluator or cfg.val_evaluator
        lines = use_own_data(cfg, 'mine')
        assert cfg.default_hooks.checkpoint.save_best == chosen
        assert any('save_best="auto"' in line and 'pascal_voc/mAP' in line for line in lines) == (chosen == 'auto')


# What is wrong with a folder -----------------------------------------------------------------------------------------------

def spoil(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_annotations(root):
    write_images(root / 'photos' / 'a')


def two_candidates(root):
    coco(root)
    shutil.copy(root / 'train.json', root / 'instances_train.json')


def two_image_folders(root):
    coco(root)
    shutil.copytree(root / 'train', root / 'images' / 'train')


def missing_images(root):
    coco(root, objects=('disc', 'square', 'disc'))
    (root / 'val' / '1.png').unlink()


def no_images_at_all(root):
    shutil.rmtree(coco(root) / 'train')


def name_twice(root):
    spoil(coco(root) / 'train.json', lambda content: content['categories'].append(dict(id=7, name='disc')))


def only_validation(root):
    coco(root, 'val')


def no_json(root):
    (coco(root) / 'train.json').write_text('{"images": [')


def classes_for_detector(root):
    for part in ('train', 'val'):
        write_folders(root / part, 'a', 'b')


def boxes_for_segmentor(root):
    coco(root)


def maps_for_testing(root):
    write_maps(root, ('trainval', 'test'))


def line_twice(root):
    (write_maps(root) / 'classes.txt').write_text('road\nsky\nroad\n')


def gaps(root):
    write_maps(root, values=(0, 128, 255))


def no_map(root):
    (write_maps(root) / 'annotations' / 'val' / '1.png').unlink()


def broken_map(root):
    (write_maps(root) / 'annotations' / 'train' / '1.png').write_bytes(b'no image')


def empty_map(root):
    (write_maps(root) / 'annotations' / 'train' / '1.png').write_bytes(b'')


def mixed_endings(root):
    write_images(write_maps(root) / 'images' / 'train' / '9')


def one_class(root):
    for part in ('train', 'val'):
        write_folders(root / part, 'a')


def numbers_for_names(root):
    spoil(coco(root) / 'train.json', lambda content: content['categories'][0].update(name=7))


def absolute_names_of_another_disk(root):
    spoil(coco(root) / 'train.json', lambda content: [image.update(file_name=f'/none{root}/a.png')
                                                      for image in content['images']])


def one_line(root):
    (write_maps(root) / 'classes.txt').write_text('crack\n')


def folder_without_images(root):
    for part in ('train', 'val'):
        write_folders(root / part, 'a', 'b')
    (root / 'train' / 'c').mkdir()


def unread_images(root):
    write_images(*(root / part / group / str(index) for part in ('train', 'val') for group in 'ab' for index in range(2)),
                 suffix='.jp2')


def unread_class(root):
    for part in ('train', 'val'):
        write_folders(root / part, 'a', 'b')
    write_images(root / 'train' / 'c' / '0', suffix='.jp2')


def unread_images_with_maps(root):
    for image in (write_maps(root) / 'images' / 'val').iterdir():
        image.rename(image.with_suffix('.jfif'))


def hidden_class_folder(root):
    for part in ('train', 'val'):
        write_folders(root / part, 'a', 'b')
    write_images(root / 'val' / '__MACOSX' / '0')


def hidden_images(root):
    write_images(write_maps(root) / 'images' / 'train' / '.ipynb_checkpoints' / '0-checkpoint', suffix='.jpg')


@pytest.mark.parametrize('scope, make, said', [
    ('mmdet', no_annotations, 'must hold a set in COCO format, .*no such data were found in it; it holds photos/'),
    ('mmdet', two_candidates, 'must have one annotation file for training, but has 2: .*/instances_train.json, .*/train.json'),
    ('mmdet', two_image_folders, 'must have one folder with the images of .*train.json, but has 2: .*train/, .*images/train/'),
    ('mmdet', missing_images, r'val/ must have all 3 images of .*val.json, but 1 are missing \(1.png\)'),
    ('mmdet', no_images_at_all, 'images of .*train.json must lie in one of the folders .*none of them has 0.png, 1.png'),
    ('mmdet', name_twice, 'every category in .*train.json must have a name of its own, but there are several disc'),
    ('mmdet', only_validation, 'must have an annotation file for training, but has only .*val.json'),
    ('mmdet', numbers_for_names, 'the name of every category in .*train.json must be a text, but 7 is none: write "7"'),
    ('mmdet', absolute_names_of_another_disk, r'the disk must have all 2 images of .*train.json, but 2 .*\(/none/.*/a.png'),
    ('mmdet', no_json, 'train.json must be an annotation file in COCO format'),
    ('mmdet', classes_for_detector, 'because detector.py is a config of mmdet, but it holds a folder of images for each class'),
    ('mmseg', boxes_for_segmentor, 'because segmentor.py is a config of mmseg, but it holds a set in COCO format'),
    ('mmseg', maps_for_testing, r'must have a folder of images for training that is named so, .* testing \(.*/test/\)'),
    ('mmseg', line_twice, 'every class in .*classes.txt must have a name of its own, but there are several road'),
    ('mmseg', gaps, 'from 0 on without a gap .*but hold 0, 128, 255: write the names of all classes into classes.txt'),
    ('mmseg', no_map, r'must have a label map of its name in .*annotations/val/, but 1 of 2 have none \(1\)'),
    ('mmseg', broken_map, 'the label map .*annotations/train/1.png cannot be used: the file cannot be read as an image'),
    ('mmseg', empty_map, 'the label map .*annotations/train/1.png cannot be used: the file is empty'),
    ('mmseg', mixed_endings, r'images/train/ must have names that end alike, such as .png, but there are 2 .jpg, 1 .png'),
    ('mmseg', one_line, 'at least two, the background counted, but has crack'),
    ('mmseg', hidden_images, 'images/train/ must have no hidden folders, because mmseg .* it has .ipynb_checkpoints'),
    ('mmpretrain', folder_without_images, 'every folder in .*train/ is a class and must have images, but c has none'),
    ('mmpretrain', unread_images, 'it holds train/, val/ with 8 .jp2, and no images that end in .jpg, .*.pgm'),
    ('mmpretrain', unread_class, 'must have images, but c has none that end in .jpg, .*.pgm: remove the folder'),
    ('mmseg', unread_images_with_maps, 'images/val/ must have images that end in .jpg, .*.pgm, but has 2 .jfif'),
    ('mmpretrain', hidden_class_folder, 'val/ must have no hidden folders, because mmpretrain .* it has __MACOSX'),
    ('mmpretrain', one_class, 'train/ must have a folder for each class, of which there are at least two, but has only a')])
def test_a_folder_that_cannot_be_used_is_named_with_what_it_has_and_should_have(tmp_path, scope, make, said):
    make(tmp_path / 'mine')
    with pytest.raises(LaunchError, match=said) as error:
        find_data(str(tmp_path / 'mine'), SCOPES[scope])
    assert f'{tmp_path}/mine/' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
def test_a_map_with_a_value_beyond_classes_txt_is_named_before_the_training(tmp_path):
    (write_maps(tmp_path / 'mine', values=(0, 1, 7)) / 'classes.txt').write_text('road\nsky\ntree\n')
    with pytest.raises(LaunchError, match=r'values of label maps must be from 0 to 2 .*mine/annotations/train/0.png holds 7'):
        train([f'{SEGMENTOR}.py', '--data', 'mine', '--work-dir', 'work'])


def test_options_that_do_not_fit_the_folder_are_refused(tmp_path):
    coco(tmp_path / 'mine')
    for fraction, said in ((0.2, 'has one .*val.json.*: leave --val-fraction out'), (1.5, 'between 0 and 1, but got 1.5')):
        with pytest.raises(LaunchError, match=said):
            on_own_data(DETECTOR, 'mine', fraction)
    with pytest.raises(LaunchError, match='--data must be a folder, but none does not exist'):
        on_own_data(DETECTOR, 'none')
    with pytest.raises(LaunchError, match='there is no --data'):
        train([f'{DETECTOR}.py', '--val-fraction', '0.2'])
    cfg = config(DETECTOR)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, copy.deepcopy(inner)])
    with pytest.raises(LaunchError, match='needs one data set in train_dataloader.* has 2'):
        use_own_data(cfg, 'mine')


# VOC and YOLO --------------------------------------------------------------------------------------------------------------

class Converter:
    """What supervision.DetectionDataset does with files, as far as paths are concerned."""
    calls: list = []

    @classmethod
    def read(cls, images_directory_path, annotations_directory_path, data_yaml_path=None):
        cls.calls.append((images_directory_path, annotations_directory_path, data_yaml_path))
        assert Path(images_directory_path).is_dir() and Path(annotations_directory_path).is_dir()
        return cls()

    from_yolo = from_pascal_voc = read

    def as_coco(self, images_directory_path, annotations_path):
        folder = Path(images_directory_path)
        coco(folder.parent, folder.name)
        shutil.move(folder.parent / f'{folder.name}.json', annotations_path)


def yolo(root):
    write_images(*(root / 'images' / part / '0' for part in ('train', 'val')))
    for part in ('train', 'val'):
        (root / 'labels' / part).mkdir(parents=True)
        (root / 'labels' / part / '0.txt').write_text('0 0.5 0.5 0.2 0.2\n')
    (root / 'data.yaml').write_text('names: [disc]\n')


def yolo_by_part(root):
    for part in ('train', 'valid'):
        write_images(root / part / 'images' / '0')
        (root / part / 'labels').mkdir()
        (root / part / 'labels' / '0.txt').write_text('0 0.5 0.5 0.2 0.2\n')
    (root / 'data.yaml').write_text('names: [disc]\n')


def voc_by_part(root):
    for part in ('train', 'valid'):
        write_images(root / part / '0')
        (root / part / '0.xml').write_text('<annotation/>')


@pytest.mark.parametrize('make, kind', [(yolo, 'YOLO'), (yolo_by_part, 'YOLO'), (voc_by_part, 'Pascal VOC')])
def test_other_formats_are_refused_with_lines_that_convert_them(tmp_path, monkeypatch, make, kind):
    make(tmp_path / 'mine')
    with pytest.raises(LaunchError, match=f'must hold annotations in COCO .*in the format of {kind}') as error:
        find_data('mine', SCOPES['mmdet'])
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith('    ')]
    monkeypatch.setitem(sys.modules, 'supervision', SimpleNamespace(DetectionDataset=Converter))
    monkeypatch.setattr(Converter, 'calls', [])
    exec('\n'.join(lines), {})
    assert len(Converter.calls) == 2
    assert str(error.value).endswith('and train with --data mine_coco')
    assert find_data('mine_coco', SCOPES['mmdet']).val is not None


def test_voc_folders_of_several_years_are_not_written_over_one_another(tmp_path):
    for year in ('VOC2007', 'VOC2012'):
        write_images(tmp_path / 'mine' / year / 'JPEGImages/0')
        (tmp_path / 'mine' / year / 'Annotations').mkdir()
        (tmp_path / 'mine' / year / 'Annotations/0.xml').write_text('<annotation/>')
    with pytest.raises(LaunchError, match=r'in several folders \(mine/VOC2007/Annotations, .*: name one of them with --data'):
        find_data('mine', SCOPES['mmdet'])


def test_a_voc_folder_of_one_part_is_divided_afterwards(tmp_path):
    write_images(tmp_path / 'mine/JPEGImages/0')
    (tmp_path / 'mine/Annotations').mkdir()
    (tmp_path / 'mine/Annotations/0.xml').write_text('<annotation/>')
    with pytest.raises(LaunchError, match=r"pascal_voc\('mine/JPEGImages', 'mine/Annotations'\)(.|\n)*--val-fraction 0.2$"):
        find_data('mine', SCOPES['mmdet'])
