# Figure 6, one column of 32 blocks.
_base_ = 'revcol_vit_b_col4_in1k.py'

model = dict(backbone=dict(arch=dict(depths=(8, 8, 8, 8), num_columns=1)))
