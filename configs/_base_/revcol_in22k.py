# RevCol from scratch on ImageNet-22K with intermediate supervision: what the sizes share, and how it differs from
# ImageNet-1K (table 11). The 22K images have no validation split: fine-tuning on 1K shows how good the weights are.
_base_ = './revcol_in1k.py'

data_preprocessor = dict(num_classes=21841)
train_dataloader = dict(dataset=dict(type='ImageNet21k', data_root='data/imagenet22k'))
val_dataloader = None
val_evaluator = None
val_cfg = None
test_dataloader = None
test_evaluator = None
test_cfg = None

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3),
    head=dict(num_classes=21841, in_channels=(72, 144, 288, 576), score_every_head=False))

optim_wrapper = dict(
    optimizer=dict(lr=1.25e-4 * 4096 / 1024, weight_decay=0.1),
    clip_grad=dict(max_norm=10.0))  # the paper: none

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5 / 1.25e-4, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-7 / 1.25e-4, begin=5, end=90, T_max=85, by_epoch=True,
         convert_to_iter_based=True)]

train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=90)

custom_hooks = [dict(type='ReversibleDriftHook', interval=100)]
