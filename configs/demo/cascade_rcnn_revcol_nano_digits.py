# The demo: Cascade Mask R-CNN as for COCO, narrowed until two CPU cores train it in minutes.
_base_ = ['../_base_/cascade_rcnn_revcol.py', '_base_/digits_coco.py']

width = 64
norm = dict(type='BN')
roi_head = _base_.model.roi_head
rcnn = _base_.model.train_cfg.rcnn

model = dict(
    backbone=_base_.digits_backbone,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=width, norm_cfg=norm),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=[
            dict(head, num_shared_convs=2, in_channels=width, conv_out_channels=width, fc_out_channels=256, num_classes=10,
                 norm_cfg=norm)
            for head in roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=10, norm_cfg=norm)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32, pos_fraction=0.5)) for stage in rcnn]),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))
del width, norm, roi_head, rcnn

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

max_iters = 500
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(
    type='OptimWrapper',
    paramwise_cfg=dict(layer_decay_rate=1.0),
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=50, end=max_iters)
]
default_hooks = dict(
    logger=dict(interval=25), checkpoint=dict(by_epoch=False, interval=max_iters, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
