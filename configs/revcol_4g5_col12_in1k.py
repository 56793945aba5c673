# Table 5, 12 columns at about 4.5 GFLOPs: 82.2 top-1 in the paper. Widths and depths are chosen here, see docs/paper.md.
_base_ = 'revcol_t_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=(40, 80, 160, 320), depths=(1, 2, 3, 2), num_columns=12)),
    head=dict(in_channels=(40, 80, 160, 320)))
