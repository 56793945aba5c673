# Mask R-CNN on the bundled digits with columns of ViT blocks: maps of one resolution, from which ViTDet's simple feature
# pyramid makes strides 4 to 32.
_base_ = ['../mask_rcnn_revcol_t.py', '_base_/digits_coco.py']

width = 64
model = dict(
    backbone=dict(
        _delete_=True,
        type='RevColViT',
        arch=dict(embed_dims=96, depths=(1, 1, 1, 1), num_heads=4, num_columns=3),
        img_size=128,
        patch_size=8,
        reversible=True),
    neck=dict(
        _delete_=True, type='SimpleFPN', in_channels=96, out_channels=width, scale_factors=(2, 1, 0.5, 0.25), num_outs=4),
    rpn_head=dict(
        in_channels=width, feat_channels=width, anchor_generator=dict(strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(in_channels=width, conv_out_channels=width, num_classes=10)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))
del width

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
max_iters = 500
param_scheduler = _base_.digits_param_scheduler
param_scheduler[1].end = max_iters
train_cfg = dict(_base_.digits_train_cfg, max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(_base_.digits_default_hooks.checkpoint, interval=max_iters))
log_processor = dict(by_epoch=False)
