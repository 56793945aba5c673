# UPerNet for RevCol on ADE20K, crops of 512x512: what all sizes share. Heads, augmentation and 160k iterations are
# mmsegmentation's own for ConvNeXt; the optimizer's settings are those of the authors' release. Table 14 of the paper has the
# same ones, except for RevCol-T's rate (upernet_revcol_t.py), 80k iterations and, with ImageNet-22K weights, a warm-up of 1500
# iterations for L too.
_base_ = ['mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py', './revcol.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.segmentation'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))
env_cfg = dict(cudnn_benchmark=False)  # reversible training computes every convolution twice, and needs the same result

model = dict(
    backbone=_base_.revcol_tiny,
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))

# 8 GPUs x 2 images; --auto-scale-lr adapts the rate to other batch sizes.
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0),
    optimizer=dict(type='AdamW', lr=4e-5, betas=(0.9, 0.999), weight_decay=0.01))
auto_scale_lr = dict(enable=False, base_batch_size=16)

# Multi-scale and flip test as in mmseg 0.x, which the paper used: the scales are ratios of the usual size, not of the image's.
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios]

# The release's warm-up for L and H is twice as long; table 14 has 1500 for L.
param_scheduler_warmup_3000 = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=3000),
    dict(type='PolyLR', power=1.0, begin=3000, end=160000, eta_min=0.0, by_epoch=False)]
