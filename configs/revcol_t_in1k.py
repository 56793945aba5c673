# 30M parameters, 4.5 GFLOPs, 82.2 top-1 in the paper.
_base_ = '_base_/revcol_in1k.py'
