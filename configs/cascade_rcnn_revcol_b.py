_base_ = '_base_/cascade_rcnn_revcol.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_base_1k.pth')),
    neck=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))  # the paper: 0.8
