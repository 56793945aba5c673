# The segmentation demo: UPerNet as for ADE20K, narrowed until two CPU cores train it in minutes, from the backbone that
# revcol_nano_digits_pretrain.py makes (`load_from`).
_base_ = ['../_base_/upernet_revcol.py', '_base_/digits_semantic.py']

norm = dict(type='BN')
# Seven pixels in eight are background. With a small weight on it the classes are learned early (auxiliary head); with a larger
# weight the outlines become tighter (decode head). mmseg's weighted loss raises an IndexError on padded pixels, so images must
# not be smaller than 128 pixels here. Without class weights, as in the other configs, they may be.
classes_first = dict(class_weight=[1.0] * 10 + [0.1])
outlines_too = dict(class_weight=[1.0] * 10 + [0.3])
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=_base_.digits_backbone,
    decode_head=dict(
        in_channels=[16, 32, 64, 128], channels=32, num_classes=11, norm_cfg=norm, loss_decode=outlines_too),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=11, norm_cfg=norm, loss_decode=classes_first),
    test_cfg=dict(_delete_=True, mode='whole'))
del norm, classes_first, outlines_too

test_pipeline = _base_.digits_test_pipeline  # mmseg's inference reads it from here
tta_pipeline = None  # not ADE20K's scales: tools/test.py --tta takes its default
train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
optim_wrapper.optimizer.lr = 1.5e-3
max_iters = 1000
param_scheduler = _base_.digits_param_scheduler
param_scheduler[1].end = max_iters
train_cfg = dict(_base_.digits_train_cfg, max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    checkpoint=dict(_base_.digits_default_hooks.checkpoint, interval=max_iters),
    visualization=dict(interval=1))  # draws every image of a test, not one batch in 50
