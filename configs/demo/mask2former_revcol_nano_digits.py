# Mask2Former as for ADE20K, narrowed, on the bundled digits' semantic maps.
_base_ = ['../_base_/mask2former_revcol.py', '_base_/digits_semantic.py']

width = 64
num_classes = 11
attention = dict(embed_dims=width)
position = dict(num_feats=width // 2)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=_base_.digits_backbone,
    decode_head=dict(
        in_channels=[16, 32, 64, 128],
        feat_channels=width,
        out_channels=width,
        num_classes=num_classes,
        num_queries=20,
        pixel_decoder=dict(
            encoder=dict(
                num_layers=2,
                layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=width, feedforward_channels=4 * width))),
            positional_encoding=position),
        positional_encoding=position,
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=attention,
                cross_attn_cfg=attention,
                ffn_cfg=dict(embed_dims=width, feedforward_channels=4 * width))),
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
        train_cfg=dict(num_points=1024)))
del width, num_classes, attention, position

test_pipeline = _base_.digits_test_pipeline  # mmseg's inference reads it from here
tta_pipeline = None  # not ADE20K's scales: tools/test.py --tta takes its default
train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator

optim_wrapper = _base_.digits_optim_wrapper
auto_scale_lr = _base_.digits_auto_scale_lr
param_scheduler = _base_.digits_param_scheduler
train_cfg = _base_.digits_train_cfg
default_hooks = dict(
    checkpoint=_base_.digits_default_hooks.checkpoint,
    visualization=dict(interval=1))  # draws every image of a test, not one batch in 50
