_base_ = '_base_/mask2former_revcol.py'

optim_wrapper = dict(optimizer=dict(lr=6e-5))  # as for UPerNet in the release
