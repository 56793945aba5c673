_base_ = 'cascade_rcnn_revcol_b.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_base_22k.pth')))

optim_wrapper = dict(optimizer=dict(lr=1e-4))
