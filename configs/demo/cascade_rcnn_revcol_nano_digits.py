# The demo: Cascade Mask R-CNN as for COCO, narrowed until two CPU cores train it in minutes, from the backbone that
# revcol_nano_digits_pretrain.py makes (`load_from`).
_base_ = ['../_base_/cascade_rcnn_revcol.py', '_base_/digits_coco.py']

width = 64
norm = dict(type='BN')
one_sample = dict(roi_layer=dict(sampling_ratio=1))  # on the CPU RoIAlign is a third of the step, and digits are small
roi_head = _base_.model.roi_head
rcnn = _base_.model.train_cfg.rcnn

model = dict(
    backbone=_base_.digits_backbone,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=width, norm_cfg=norm),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(one_sample, out_channels=width),
        bbox_head=[
            dict(head, num_shared_convs=2, in_channels=width, conv_out_channels=width, fc_out_channels=256, num_classes=10,
                 norm_cfg=norm)
            for head in roi_head.bbox_head
        ],
        mask_roi_extractor=dict(one_sample, out_channels=width),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=10, norm_cfg=norm)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32, pos_fraction=0.5)) for stage in rcnn]),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))
del width, norm, one_sample, roi_head, rcnn

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
optim_wrapper.optimizer.lr = 2e-3
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = _base_.digits_default_hooks
log_processor = dict(by_epoch=False)
