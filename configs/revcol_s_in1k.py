# 60M parameters, 9.0 GFLOPs, 83.5 top-1 in the paper.
_base_ = '_base_/revcol_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
