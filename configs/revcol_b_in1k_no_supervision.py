# RevCol-B without intermediate supervision (table 7): 83.2 top-1 in the paper. Clipping and last rate as in revcol_b_in1k.py.
_base_ = 'revcol_t_in1k_no_supervision.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.4), head=dict(in_channels=576))

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = _base_.param_scheduler
param_scheduler[1].eta_min_ratio = 1e-8 / 1e-3
