# 116 GFLOPs, 87.6 top-1 in the paper.
_base_ = '_base_/revcol_in1k_ft.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.3,
        init_cfg=dict(
            checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_large_22k.pth')),
    head=dict(in_channels=1024))

optim_wrapper = dict(
    optimizer=dict(lr=5e-5 * 512 / 1024),  # the paper: 5e-5 at this batch
    paramwise_cfg=dict(layer_decay_rate=0.8))
param_scheduler = _base_.param_scheduler
param_scheduler[0].eta_min_ratio = 2e-7 / 5e-5
