# 16.6 GFLOPs, 85.6 top-1 in the paper.
_base_ = 'revcol_b_in1k_384_ft.py'

train_pipeline = _base_.train_pipeline_224
test_pipeline = _base_.test_pipeline_224
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
