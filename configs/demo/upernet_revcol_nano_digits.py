# The segmentation demo: UPerNet as for ADE20K, narrowed until two CPU cores train it in minutes.
_base_ = ['../_base_/upernet_revcol.py', '_base_/digits_semantic.py']

custom_imports = dict(
    imports=['revcol_mm', 'revcol_mm.segmentation', 'revcol_mm.datasets.iou'], allow_failed_imports=False)

norm = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=_base_.digits_backbone,
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=32, num_classes=11, norm_cfg=norm),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=11, norm_cfg=norm),
    test_cfg=dict(_delete_=True, mode='whole'))
del norm

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = dict(
    checkpoint=_base_.digits_default_hooks.checkpoint,
    visualization=dict(interval=1))  # draws every image of a test, not one batch in 50
