# Table 6, a single reversible column in RevNet's way: 81.6 top-1 in the paper. Settings of RevCol-T; a single column has no
# inner columns to supervise.
_base_ = 'revcol_t_in1k_no_supervision.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='RevNetConvNeXt',
        arch='tiny',
        drop_path_rate=0.1,
        out_indices=(3, ),
        reversible=True),  # False: plain autograd, faster, with memory that grows with the depth
    head=dict(in_channels=1536))
