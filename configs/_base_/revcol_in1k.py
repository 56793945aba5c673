# RevCol from scratch on ImageNet-1K with intermediate supervision: what the sizes share. The settings are those of the
# authors' release; where table 11 of the paper differs, a comment says so.
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py', 'mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.classification'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))

model = dict(
    type='IntermediateSupervisionClassifier',
    backbone=dict(
        type='RevCol',
        arch='tiny',
        drop_path_rate=0.1,
        reversible=True),  # False: plain autograd, faster, with memory that grows with the columns
    head=dict(
        type='IntermediateSupervisionHead',
        num_classes=1000,
        in_channels=(64, 128, 256, 512),
        score_every_head=True,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[
        dict(type='Mixup', alpha=0.8),  # the paper: 0.5
        dict(type='CutMix', alpha=1.0)]))

# 32 GPUs x 128 images. RandAugment (9, 0.5), erasing 0.25 and bicubic interpolation are those of the inherited pipeline.
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy', topk=(1, 5)), dict(type='HeadAccuracy')]
test_evaluator = val_evaluator

# The rates are stated for 1024 images and grow with the batch, all three alike: the first and the last one are ratios below.
# --auto-scale-lr adapts them to other batch sizes.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=1e-3 * 4096 / 1024, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0, decay_gamma=True))
auto_scale_lr = dict(enable=False, base_batch_size=4096)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5 / 1e-3, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-6 / 1e-3, begin=20, end=300, T_max=280, by_epoch=True,
         convert_to_iter_based=True)]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),  # decay 0.9999
    dict(type='ReversibleDriftHook', interval=100)]
