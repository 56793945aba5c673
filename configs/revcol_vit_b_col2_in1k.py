# Figure 6, two columns of 16 blocks.
_base_ = 'revcol_vit_b_col4_in1k.py'

model = dict(backbone=dict(arch=dict(depths=(4, 4, 4, 4), num_columns=2)))
