# Pre-training for the demo, which takes less than a minute: the detectors' backbone learns to classify single digits, from
# the training part of the handwriting. The detector loads it with `load_from`.
_base_ = 'revcol_nano_digits_cls.py'

model = dict(
    _delete_=True,
    type='ImageClassifier',
    backbone=dict(
        type='RevCol',
        arch=dict(channels=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_columns=3),
        out_indices=(3, ),
        layer_scale_init_value=1.0,
        reversible=True,
        init_cfg=dict(type='Kaiming', layer=['Conv2d', 'Linear'])),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128, topk=(1, )))

# Detectors must find digits anywhere, so the crops are moved by up to a quarter of their size.
move = dict(
    type='Translate', prob=1., pad_val=(175, 175, 175), magnitude_range=(0, 0.25), magnitude_level=10, magnitude_std='inf',
    total_level=10, random_negative_prob=0.5)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            pipeline[0], dict(move, direction='horizontal'), dict(move, direction='vertical'), pipeline[1]
        ]))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
del move
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Accuracy', topk=1)
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=50, end=85 * max_epochs, by_epoch=False)
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
