_base_ = '_base_/cascade_rcnn_revcol.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.4,
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_small_1k.pth')))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.85))  # the paper: 0.8
