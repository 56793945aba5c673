# RevCol-ViT-S (appendix B.1, table 9): 80.6 top-1 in the paper. With its classifier it has
# 20.9M parameters and 4.57 GFLOPs, where the paper prints 16M and 4.6G: see docs/columns.md.
# Settings of RevCol-T, without intermediate supervision.
_base_ = 'revcol_t_in1k_no_supervision.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='RevColViT',
        arch='small',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        out_indices=(3, ),
        reversible=True),  # False: plain autograd, faster, with memory that grows with the columns
    head=dict(in_channels=224))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.))))
