_base_ = '_base_/mask2former_revcol_640.py'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_base_22k.pth')),
    decode_head=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
