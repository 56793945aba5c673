# Table 5, 20 columns at about 4.5 GFLOPs: 81.0 top-1 in the paper. Widths and depths are chosen here, see docs/paper.md.
_base_ = 'revcol_t_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=(32, 64, 128, 256), depths=(1, 1, 3, 2), num_columns=20)),
    head=dict(in_channels=(32, 64, 128, 256)))
