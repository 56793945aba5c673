_base_ = '_base_/cascade_rcnn_revcol.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.4,
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_small_1k.pth')))
# Layer decay 0.85, as in the base; the paper: 0.8.
