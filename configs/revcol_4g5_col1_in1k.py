# Table 5, one column at about 4.5 GFLOPs: 81.9 top-1 in the paper. Widths and depths are chosen here, see docs/paper.md. A
# single column has no inner columns to supervise.
_base_ = 'revcol_t_in1k_no_supervision.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=(120, 240, 480, 960), depths=(2, 2, 5, 2), num_columns=1)),
    head=dict(in_channels=960))
