# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A folder with a data set and one small config for each package, on which the tools run."""
import pytest
from mmengine.visualization import Visualizer

from revcol_mm.datasets import make_digits

COMMON = """
custom_imports = dict(imports=['revcol_mm', 'revcol_mm.detection'], allow_failed_imports=False)
backbone = dict(type='RevCol', arch=dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_columns=3), reversible=True,
                layer_scale_init_value=1.0)
optim = dict(constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.9),
             optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
classes = tuple('0123456789')
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2), logger=dict(type='LoggerHook', interval=1),
             timer=dict(type='IterTimerHook'))
train_loop = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=1000)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
env_cfg = dict(mp_cfg=dict(mp_start_method='fork'))
"""
DETECTION = COMMON + """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, **backbone),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16, norm_cfg=dict(type='SyncBN')),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=10),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=10)),
    train_cfg=dict(rpn=dict(sampler=dict(num=32)), rpn_proposal=dict(nms_pre=50, max_per_img=20),
                   rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
                 dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(sampler=dict(type='InfiniteSampler'), batch_sampler=None, dataset=dict(
    data_root='{root}', metainfo=dict(classes=classes), ann_file='annotations/instances_train.json',
    data_prefix=dict(img='train')), **loader)
val_dataloader = dict(dataset=dict(
    data_root='{root}', metainfo=dict(classes=classes), ann_file='annotations/instances_val.json', data_prefix=dict(img='val'),
    pipeline=test_pipeline), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{root}/annotations/instances_val.json')
test_evaluator = val_evaluator
optim_wrapper = dict(_delete_=True, type='AmpOptimWrapper', **optim)
default_hooks = hooks
train_cfg = dict(_delete_=True, **train_loop)
param_scheduler = []
"""
SEGMENTATION = COMMON + """
_base_ = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
model = dict(
    pretrained=None, backbone=dict(_delete_=True, **backbone), data_preprocessor=dict(size=(64, 64)),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=16, num_classes=11), auxiliary_head=dict(in_channels=24, channels=16,
                                                                                                    num_classes=11))
dataset_type = 'BaseSegDataset'
data = dict(type=dataset_type, data_root='{root}', img_suffix='.jpg', seg_map_suffix='.png',
            metainfo=dict(classes=(*classes, 'background'), palette=[[20 * i, 0, 0] for i in range(11)]))
train_dataloader = dict(dataset=dict(
    _delete_=True, data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')], **data), **loader)
val_dataloader = dict(dataset=dict(
    _delete_=True, data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='LoadAnnotations'),
              dict(type='PackSegInputs')], **data), **loader)
test_dataloader = val_dataloader
optim_wrapper = dict(_delete_=True, **optim)
default_hooks = hooks
train_cfg = dict(_delete_=True, **train_loop)
param_scheduler = []
"""
CLASSIFICATION = COMMON + """
default_scope = 'mmpretrain'
model = dict(type='ImageClassifier', backbone=dict(out_indices=(3, ), **backbone), neck=dict(type='GlobalAveragePooling'),
             head=dict(type='LinearClsHead', num_classes=10, in_channels=32, loss=dict(type='CrossEntropyLoss')),
             data_preprocessor=dict(num_classes=10, mean=[128] * 3, std=[64] * 3))
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
data = dict(type='CustomDataset', data_root='{root}/crops', pipeline=pipeline)
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(data_prefix='train', **data),
                        sampler=dict(type='InfiniteSampler', shuffle=True))
test_dataloader = dict(batch_size=50, num_workers=0, dataset=dict(data_prefix='val', **data),
                       sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='Accuracy', topk=(1, 5))
test_cfg = dict()
optim_wrapper = optim
default_hooks = hooks
train_cfg = train_loop
"""


@pytest.fixture
def no_visualizer_of_another_run() -> None:
    """A run finds its visualizer by name, one for the whole process: here runs of several packages share one."""
    def forget(cls):
        cls._instance_dict.clear()
        for subclass in cls.__subclasses__():
            forget(subclass)

    forget(Visualizer)


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    """A folder with the data set and one config for each package."""
    folder = tmp_path_factory.mktemp('tools')
    make_digits(folder / 'digits', num_train=4, num_val=2, size=64)
    for name, text in dict(detection=DETECTION, segmentation=SEGMENTATION, classification=CLASSIFICATION).items():
        (folder / f'{name}.py').write_text(text.replace('{root}', str(folder / 'digits')))
    return folder


@pytest.fixture
def own_surroundings(monkeypatch, tmp_path):
    """Every test starts its runs in its own folder."""
    monkeypatch.chdir(tmp_path)
