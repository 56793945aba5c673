_base_ = 'cascade_rcnn_revcol_t.py'

train_cfg = _base_.train_cfg_1x
param_scheduler = _base_.param_scheduler_1x
