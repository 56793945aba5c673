# DINO for RevCol: what all sizes share. Model, augmentation, batch, clipping and weight decay are mmdet's own for Swin-L, 36
# epochs.
#
# What the paper leaves open, and the choice here:
# - Scales: five, strides 4 to 64, as in DINO's strongest published setting. RevCol returns strides 4 to 32 and ChannelMapper
#   adds one. The stride-4 level holds the low-level detail that RevCol keeps. With four scales (strides 8 to 64) the encoder
#   sees a quarter of the tokens:
#     --cfg-options model.num_feature_levels=4 model.backbone.out_indices="(1,2,3)" model.neck.in_channels="[144,288,576]" \
#       model.neck.num_outs=4 model.encoder.layer_cfg.self_attn_cfg.num_levels=4 \
#       model.decoder.layer_cfg.cross_attn_cfg.num_levels=4
# - Rates: layer decay in the backbone, as in all other fine-tuning of RevCol, instead of DINO's 0.1 for the whole
#   backbone. Its value and the drop path of B and L are those of their Cascade Mask R-CNN.
_base_ = ['mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py', './revcol.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.detection'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))

model = dict(
    backbone=dict(
        _base_.revcol_tiny,
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_base_22k.pth')),
    neck=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.9))
