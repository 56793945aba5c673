# DINO with five scales as for COCO, with fewer layers and queries, on the bundled digits. The width stays 256: mmdet's decoder
# encodes reference points for no other.
_base_ = ['../_base_/dino_revcol.py', '_base_/digits_coco.py']

layer = dict(ffn_cfg=dict(feedforward_channels=256))
model = dict(
    num_queries=50,
    backbone=_base_.digits_backbone,
    neck=dict(in_channels=[16, 32, 64, 128]),
    encoder=dict(num_layers=2, layer_cfg=layer),
    decoder=dict(num_layers=2, layer_cfg=layer),
    bbox_head=dict(num_classes=10),
    test_cfg=dict(max_per_img=50))
del layer

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
val_evaluator.metric = 'bbox'
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = _base_.digits_default_hooks
log_processor = dict(by_epoch=False)
