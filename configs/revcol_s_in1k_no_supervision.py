# RevCol-S without intermediate supervision (table 7): 83.0 top-1 in the paper.
_base_ = 'revcol_t_in1k_no_supervision.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
