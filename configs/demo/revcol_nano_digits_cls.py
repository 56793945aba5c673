# The classification demo: a small RevCol with intermediate supervision, on single digits of handwriting that it has never seen.
# Two CPU cores train it in three minutes.
_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.classification'], allow_failed_imports=False)

model = dict(
    type='IntermediateSupervisionClassifier',
    backbone=dict(
        type='RevCol',
        arch=dict(channels=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_columns=4),
        # The release's LayerScale 1e-6 and standard deviation 0.02 suit long schedules (docs/demo.md describes a trial).
        layer_scale_init_value=1.0,
        reversible=True,
        init_cfg=dict(type='Kaiming', layer=['Conv2d', 'Linear'])),
    head=dict(
        type='IntermediateSupervisionHead',
        num_classes=10,
        in_channels=(16, 32, 64, 128),
        score_every_head=True,
        cal_acc=True,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[64.] * 3, to_rgb=True)

# The network would soon overfit 1,350 samples, so they are rotated, sheared, moved and recoloured. They are not flipped,
# because a mirrored digit is another sign.
augmentation = dict(
    type='RandAugment',
    policies=[
        dict(type='Rotate', magnitude_range=(0, 20)),
        dict(type='Shear', magnitude_range=(0, 0.25), direction='horizontal'),
        dict(type='Shear', magnitude_range=(0, 0.25), direction='vertical'),
        dict(type='Translate', magnitude_range=(0, 0.12), direction='horizontal'),
        dict(type='Translate', magnitude_range=(0, 0.12), direction='vertical'),
        dict(type='ColorTransform', magnitude_range=(0, 0.9)),
        dict(type='Brightness', magnitude_range=(0, 0.4)),
    ],
    num_policies=3,
    total_level=10,
    magnitude_level=10,
    magnitude_std='inf',
    hparams=dict(pad_val=128, prob=1.0, random_negative_prob=0.5))
load = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32), interpolation='bicubic')]
pack = dict(type='PackInputs')
dataset = dict(type='CustomDataset', metainfo=dict(classes=tuple('0123456789')))
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, data_root='data/digits/crops/train', pipeline=[*load, augmentation, pack]))
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, data_root='data/digits/crops/val', pipeline=[*load, pack]))
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy', topk=(1, 5)), dict(type='HeadAccuracy')]
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05, fused=True),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0, decay_gamma=True),
    clip_grad=dict(max_norm=5.0))
auto_scale_lr = dict(enable=False, base_batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=1, end=max_epochs, T_max=max_epochs - 1, by_epoch=True,
         convert_to_iter_based=True)
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1),
    exact_resume=dict(type='ExactResumeHook'))
custom_hooks = [dict(type='ReversibleDriftHook', interval=25)]
randomness = dict(seed=0)
