# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Converting checkpoint files: finding the backbone in a file, importing, padding and publishing."""
from .backbone import Backbone, find_backbone
from .importing import ImportReport, export_official, import_checkpoint, is_official, to_current_names
from .padding import PaddingReport, pad_checkpoint
from .publishing import publish_checkpoint, strip_training_state

__all__ = ['Backbone', 'ImportReport', 'PaddingReport', 'export_official', 'find_backbone', 'import_checkpoint',
           'is_official', 'pad_checkpoint', 'publish_checkpoint', 'strip_training_state', 'to_current_names']
