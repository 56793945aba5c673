_base_ = '_base_/revcol_in22k.py'
