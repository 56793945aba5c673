# 16.6 GFLOPs, 85.6 top-1 in the paper.
_base_ = 'revcol_b_in1k_384_ft.py'

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 224  # RandomResizedCrop
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
