# 350 GFLOPs, 88.2 top-1 in the paper (table 1), and 89.4 with private data. No XL weights were released: put your own where
# `checkpoint` says (--cfg-options model.backbone.init_cfg.checkpoint=… for another place).
_base_ = '_base_/revcol_in1k_ft.py'

model = dict(
    backbone=dict(arch='xlarge', drop_path_rate=0.4, init_cfg=dict(checkpoint='checkpoints/revcol_xlarge_22k.pth')),
    head=dict(in_channels=1792))

optim_wrapper = dict(
    optimizer=dict(lr=2e-5 * 512 / 1024),  # the paper: 5e-5 at this batch
    paramwise_cfg=dict(layer_decay_rate=0.8))
param_scheduler = _base_.param_scheduler
param_scheduler[0].eta_min_ratio = 2e-7 / 2e-5

custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),  # the paper: none
    dict(type='ReversibleDriftHook', interval=100)]
