_base_ = '_base_/revcol_in22k.py'

model = dict(backbone=dict(arch='large'), head=dict(in_channels=(128, 256, 512, 1024)))
