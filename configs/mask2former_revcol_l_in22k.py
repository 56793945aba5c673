_base_ = '_base_/mask2former_revcol_640.py'

model = dict(
    backbone=dict(
        arch='large',
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_large_22k.pth')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
param_scheduler = _base_.param_scheduler_warmup_3000
