# Fine-tuning of ImageNet-22K weights on ImageNet-1K at 384x384: what the sizes share. Classifiers and decoders of the
# checkpoint are left out, and a new classifier starts from almost zero. The settings are those of the authors' release; where
# table 12 of the paper differs, a comment says so.
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py', 'mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['revcol_mm', 'revcol_mm.classification'], allow_failed_imports=False)
default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='RevCol',
        arch='base',
        drop_path_rate=0.2,
        out_indices=(3, ),
        reversible=True,  # False: plain autograd, faster, with memory that grows with the columns
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_base_22k.pth')),
    head=dict(
        type='RevColClsHead',
        num_classes=1000,
        in_channels=576,
        init_scale=0.001,  # table 12 has it for B too, where the release's code does not apply it
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

# 16 GPUs x 32 images. Above 224 pixels the test image is the whole picture, resized to the square.
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384  # RandomResizedCrop
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs')]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# At 224x224, for the configs that end in _224_ft: trained and tested as the inherited pipelines do.
train_pipeline_224 = [dict(step, scale=224) if step['type'] == 'RandomResizedCrop' else step for step in train_pipeline]
test_pipeline_224 = _base_.test_pipeline

# Rates for 1024 images, scaled to the batch; no warm-up (the release names a warm-up rate of 4e-6 and 0 epochs of it).
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=1e-4 * 512 / 1024, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-8),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9, decay_gamma=True),
    clip_grad=dict(max_norm=10.0))
auto_scale_lr = dict(enable=False, base_batch_size=512)

param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=2e-7 / 1e-4, begin=0, end=30, T_max=30, by_epoch=True,
         convert_to_iter_based=True)]

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type='ReversibleDriftHook', interval=100)]
