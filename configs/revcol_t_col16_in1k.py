# Figure 3, sixteen columns of RevCol-T's size.
_base_ = 'revcol_t_col12_in1k.py'

model = dict(backbone=dict(arch=dict(num_columns=16)))
