# HTC++ as for COCO, narrowed, on the bundled digits with their semantic maps.
_base_ = ['../htc_revcol_h.py', '_base_/digits_coco.py']

width = 32
roi_head = _base_.model.roi_head
rcnn = _base_.model.train_cfg.rcnn

model = dict(
    backbone=_base_.digits_backbone,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=width, norm_cfg=dict(type='BN')),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=[
            dict(head, num_shared_convs=2, in_channels=width, conv_out_channels=width, fc_out_channels=128, num_classes=10,
                 norm_cfg=dict(type='BN')) for head in roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=width),
        mask_head=[
            dict(head, num_convs=2, in_channels=width, conv_out_channels=width, num_classes=10)
            for head in roi_head.mask_head
        ],
        semantic_roi_extractor=dict(out_channels=width),
        semantic_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=11)),  # background too
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32, pos_fraction=0.5)) for stage in rcnn]),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))
del width, roi_head, rcnn

tta_pipeline = None  # not COCO's scales: tools/test.py --tta takes its default
train_dataloader = _base_.digits_train_dataloader
train_dataloader.dataset.update(
    data_prefix=dict(img='train/', seg='semantic/train/'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
        dict(type='PackDetInputs')
    ])
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = _base_.digits_default_hooks
log_processor = dict(by_epoch=False)
