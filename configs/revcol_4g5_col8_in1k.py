# Table 5, 8 columns at about 4.5 GFLOPs: 82.3 top-1 in the paper. Widths and depths are chosen here, see docs/paper.md.
_base_ = 'revcol_t_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=(48, 96, 192, 384), depths=(1, 2, 4, 2), num_columns=8)),
    head=dict(in_channels=(48, 96, 192, 384)))
