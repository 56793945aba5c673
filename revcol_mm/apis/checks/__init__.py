# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What is checked before a run, one file per concern; docs/data_checks.md lists the checks for users.

==================  ================================================================================================
file                what it checks
==================  ================================================================================================
:mod:`files`        before anything is built: whether data, weights and checkpoints exist and can be read
:mod:`options`      keys of ``--cfg-options`` that are misspelt, or that nothing reads
:mod:`settings`     settings that are not meant as they are written; packages that the settings need
:mod:`schedules`    learning rates: accumulated batches, schedules to one rate for all groups
:mod:`run`          the one pass over what was built, which calls the following
:mod:`annotations`  entries of COCO files: missing keys, boxes that are not finite
:mod:`classes`      the order of the classes
:mod:`images`       broken images, before the run and in it
:mod:`label_maps`   values of label maps
:mod:`model`        heads, semantic maps, sliding windows
:mod:`evaluators`   evaluators against data loaders
:mod:`report`       the table of the data
:mod:`hook`         the checks for whatever tool runs the config
==================  ================================================================================================
"""
from .classes import check_class_folders, classes_of_meta, find_file_classes, find_model_classes
from .files import check_checkpoint, check_data, check_pretrained, place_of_backbones, read_annotations
from .hook import DataCheckHook
from .options import check_options
from .run import DataChecks, check_loops, check_run, rehearse
from .settings import check_settings

__all__ = ['DataCheckHook', 'DataChecks', 'check_checkpoint', 'check_class_folders', 'check_data', 'check_loops',
           'check_options', 'check_pretrained', 'check_run', 'check_settings', 'classes_of_meta', 'find_file_classes',
           'find_model_classes', 'place_of_backbones', 'read_annotations', 'rehearse']
