# Figure 3, twelve columns of RevCol-T's size. Four are RevCol-T, and eight are RevCol-S. The paper prints no drop path rate:
# this is RevCol-B's.
_base_ = 'revcol_t_in1k.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, channels=(64, 128, 256, 512), depths=(2, 2, 4, 2), num_columns=12), drop_path_rate=0.4))
