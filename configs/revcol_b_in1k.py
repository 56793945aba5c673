# 138M parameters, 16.6 GFLOPs, 84.1 top-1 in the paper.
_base_ = '_base_/revcol_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.4), head=dict(in_channels=(72, 144, 288, 576)))

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))  # the paper: none
param_scheduler = _base_.param_scheduler
param_scheduler[1].eta_min_ratio = 1e-8 / 1e-3
