# Mask R-CNN, 1x schedule: a start for one small GPU (--auto-scale-lr adapts the rate, which is for 16 images, to its batch).
# The paper has no such detector; optimizer and drop path are those of RevCol-T's Cascade Mask R-CNN.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', './_base_/revcol.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.detection'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))

model = dict(
    backbone=_base_.revcol_tiny,
    neck=dict(in_channels=[64, 128, 256, 512]))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85),
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05))
