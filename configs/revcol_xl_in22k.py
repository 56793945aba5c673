_base_ = '_base_/revcol_in22k.py'

model = dict(
    backbone=dict(arch='xlarge', drop_path_rate=0.4),  # the paper: 0.3
    head=dict(in_channels=(224, 448, 896, 1792)))
