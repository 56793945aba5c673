# Cascade Mask R-CNN for RevCol on COCO: what all sizes share. Heads, augmentation and the 3x schedule (36 epochs) are mmdet's
# own for ConvNeXt; what follows is where RevCol's settings differ. They are those of the authors' release; table 13 of the
# paper has the same ones, except where a comment says so.
_base_ = ['mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py', './revcol.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.detection'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))

model = dict(
    backbone=_base_.revcol_tiny,
    neck=dict(in_channels=[64, 128, 256, 512]))

# 8 GPUs x 2 images; --auto-scale-lr adapts the rate to other batch sizes.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.85),
    optimizer=dict(lr=2e-4, weight_decay=0.05))

warmup = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)
param_scheduler = [warmup, dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1)]

# The 1x schedule, for the configs that end in _1x (tables 7 and 8).
train_cfg_1x = dict(max_epochs=12)
param_scheduler_1x = [warmup, dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)]
