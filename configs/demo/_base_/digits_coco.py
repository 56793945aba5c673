# What the detectors on the bundled digits share: data (tools/make_digits.py), schedule and the small backbone. The names start
# with digits_, because each detector's own base defines COCO's settings under the usual names.
digits_root = 'data/digits/'
digits_meta = dict(classes=tuple('0123456789'))

digits_backbone = dict(
    _delete_=True,
    type='RevCol',
    arch=dict(channels=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_columns=3),
    # With the release's standard deviation of 0.02 a trial of 200 steps learned nothing (docs/demo.md).
    layer_scale_init_value=1.0,
    reversible=True,
    init_cfg=dict(type='Kaiming', layer=['Conv2d', 'Linear']))

digits_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs')  # no flip: a mirrored digit is another sign
]
digits_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),  # keeps the size; predictions need its scale factor
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
digits_train_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=digits_root,
        metainfo=digits_meta,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=digits_train_pipeline))
digits_val_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=digits_root,
        metainfo=digits_meta,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=digits_test_pipeline))
digits_evaluator = dict(
    _delete_=True, type='CocoMetric', ann_file=digits_root + 'annotations/instances_val.json', metric=['bbox', 'segm'])

digits_optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0),
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10))
digits_auto_scale_lr = dict(base_batch_size=8)  # the batch that the learning rates are made for

digits_max_iters = 300
digits_train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=digits_max_iters, val_interval=digits_max_iters)
digits_param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=50, end=digits_max_iters)
]
digits_default_hooks = dict(checkpoint=dict(by_epoch=False, interval=digits_max_iters, max_keep_ckpts=1))
