# RevCol-ViT-B (appendix B.1, table 9): 82.7 top-1 in the paper. With its classifier it has
# 89.1M parameters and 18.7 GFLOPs, where the paper prints 67M and 18.8G: see docs/columns.md.
_base_ = 'revcol_vit_s_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.2), head=dict(in_channels=384))
