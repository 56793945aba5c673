# Figure 6, four columns: RevCol-ViT-B with 32 blocks at about 18 GFLOPs. The width is chosen here, see docs/paper.md.
_base_ = 'revcol_vit_b_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=464, depths=(2, 2, 2, 2), num_heads=8, num_columns=4)),
    head=dict(in_channels=464))
