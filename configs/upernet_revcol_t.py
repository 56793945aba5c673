_base_ = '_base_/upernet_revcol.py'

optim_wrapper = dict(optimizer=dict(lr=6e-5))  # the release's; table 14 of the paper: 4e-5
