# Figure 6, eight columns of 4 blocks.
_base_ = 'revcol_vit_b_col4_in1k.py'

model = dict(backbone=dict(arch=dict(depths=(1, 1, 1, 1), num_columns=8)))
