# Table 6, columns without reversible connections: RevCol-T's columns, joined by HRNet's fusion; 78.8 top-1 in the paper.
_base_ = 'revcol_t_in1k.py'

model = dict(backbone=dict(type='HRNetColumns', reversible=False))  # these columns have no inverse
