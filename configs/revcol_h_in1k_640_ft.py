# 2537 GFLOPs, 90.0 top-1 in the paper. Pre-trained weights (private data):
# revcol_models/classification/revcol_huge_megdata.pth of https://huggingface.co/LarryTsai/RevCol, put into checkpoints/.
# (docs/model_zoo.md links the result of the fine-tuning, revcol_huge_megdata_in1k.pth.)
_base_ = '_base_/revcol_in1k_ft.py'

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.4,  # the paper: 0.5
        init_cfg=dict(checkpoint='checkpoints/revcol_huge_megdata.pth')),
    head=dict(in_channels=2880))

# 64 GPUs x 8 images.
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 640  # RandomResizedCrop
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (640, 640)  # Resize
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=4e-5 * 512 / 1024),  # the paper: 5e-5 at this batch
    paramwise_cfg=dict(layer_decay_rate=0.8),
    clip_grad=dict(max_norm=100.0))  # the paper: 10

# No warm-up (the release names a warm-up rate of 4e-8 and 0 epochs of it).
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=2e-8 / 4e-5, begin=0, end=20, T_max=20, by_epoch=True,
         convert_to_iter_based=True)]
train_cfg = dict(max_epochs=20)  # the paper: 30

custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
    dict(type='ReversibleDriftHook', interval=100)]
