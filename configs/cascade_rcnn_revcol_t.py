_base_ = '_base_/cascade_rcnn_revcol.py'
