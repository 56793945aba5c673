_base_ = '_base_/cascade_rcnn_revcol.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_large_22k.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]))

optim_wrapper = dict(optimizer=dict(lr=1e-4))  # layer decay 0.85, as in the base; the paper: 0.8
