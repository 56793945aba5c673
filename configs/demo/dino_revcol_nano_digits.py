# DINO with five scales as for COCO, narrowed, on the bundled digits.
_base_ = ['../_base_/dino_revcol.py', '_base_/digits_coco.py']

width = 64
layer = dict(self_attn_cfg=dict(embed_dims=width), ffn_cfg=dict(embed_dims=width, feedforward_channels=4 * width))
model = dict(
    num_queries=50,
    backbone=_base_.digits_backbone,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=width),
    encoder=dict(num_layers=2, layer_cfg=layer),
    decoder=dict(num_layers=2, layer_cfg=dict(layer, cross_attn_cfg=dict(embed_dims=width))),
    positional_encoding=dict(num_feats=width // 2),
    bbox_head=dict(embed_dims=width, num_classes=10),
    test_cfg=dict(max_per_img=50))
del width, layer

train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
val_evaluator.metric = 'bbox'
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = _base_.digits_default_hooks
log_processor = dict(by_epoch=False)
