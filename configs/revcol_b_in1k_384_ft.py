# 48.9 GFLOPs, 86.7 top-1 in the paper.
_base_ = '_base_/revcol_in1k_ft.py'
