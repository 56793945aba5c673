# Mask2Former for RevCol on ADE20K, crops of 512x512: what all sizes share. Heads and augmentation are mmsegmentation's own. The
# paper has no settings for Mask2Former; section 3.3 says that they are the same as UPerNet's, and these configs follow it. The
# gradient clipping, the embeddings without weight decay and the test on whole images are Mask2Former's own.
_base_ = ['mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', './revcol.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.segmentation', 'mmdet.models'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))
env_cfg = dict(cudnn_benchmark=False)  # as in upernet_revcol.py

model = dict(
    backbone=_base_.revcol_tiny,
    decode_head=dict(in_channels=[64, 128, 256, 512]))

# 8 GPUs x 2 images; --auto-scale-lr adapts the rate to other batch sizes.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay_rate=1.0,
        custom_keys=dict(
            query_embed=dict(decay_mult=0.0), query_feat=dict(decay_mult=0.0), level_embed=dict(decay_mult=0.0))),
    optimizer=dict(lr=4e-5, weight_decay=0.01))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=160000, eta_min=0.0, by_epoch=False)]
param_scheduler_warmup_3000 = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=3000),
    dict(type='PolyLR', power=1.0, begin=3000, end=160000, eta_min=0.0, by_epoch=False)]

# Multi-scale and flip test as in mmseg 0.x: the scales are ratios of the usual size, not of the image's.
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios]
