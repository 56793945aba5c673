# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""How checkpoints are written, when old ones are deleted, and from which one a training is resumed."""
import fnmatch
import os
import os.path as osp
import shutil
from logging import Logger

from mmengine._strategy import SingleDeviceStrategy
from mmengine.config import Config
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, Hook

from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpoint.files import put_in_place
from ..checkpoint.safe import is_local
from .checks import check_checkpoint
from .errors import LaunchError

SUFFIX = '.saving'  # of a file that is being written
OUTDATED = 'outdated_ckpts'  # key in the message hub


class SafeSaving:
    """Keeps a complete checkpoint at all times, and resumes from the newest one that can be read.

    It stands before a runner of mmengine in the list of base classes.

    - A checkpoint is written under a hidden name, such as ``.iter_2000.pth.saving``, synced to the disk, and renamed.
    - mmengine's CheckpointHook deletes old checkpoints (``max_keep_ckpts``, the best one so far) before it writes the new one.
      Here :class:`DeleteOutdated` deletes them after the new one is complete and ``last_checkpoint`` names it.
    - A training that is resumed without the name of a file uses the one that :func:`find_newest_checkpoint` returns.

    This holds for local files, on one device, with DDP and with FSDP. Other storage and other strategies work as in mmengine.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_hook(DeleteOutdated())

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, *args,
                        backend_args: dict | None = None, **kwargs) -> None:
        """As mmengine's.

        Raises:
            CheckpointError: if the file cannot be written, for example because the disk is full. The earlier checkpoints and
                ``last_checkpoint`` do not change.
        """
        strategy = getattr(self, 'strategy', None)
        local = file_client_args is None and isinstance(get_file_backend(out_dir, backend_args=backend_args), LocalBackend)
        if not local or not (strategy is None or isinstance(strategy, SingleDeviceStrategy)):
            super().save_checkpoint(out_dir, filename, file_client_args, *args, backend_args=backend_args, **kwargs)
            return
        path, draft = osp.join(out_dir, filename), osp.join(out_dir, f'.{filename}{SUFFIX}')
        outdated = self.message_hub.runtime_info.get(OUTDATED, [])
        if osp.normpath(path) in outdated:  # a file can follow one of the same name, and holds this list
            outdated.remove(osp.normpath(path))
        try:
            super().save_checkpoint(out_dir, osp.basename(draft), None, *args, backend_args=backend_args, **kwargs)
            if hasattr(strategy, '_is_full_state_dict') and not strategy._is_full_state_dict():
                barrier()  # every process has written its part
            if is_main_process():
                put_in_place(draft, path)
        except OSError as error:
            _remove(draft)
            raise CheckpointError(f'{path} could not be written: {error.strerror or error}. The earlier checkpoints did '
                                  'not change. Make room, and resume with --resume auto') from error

    def load_or_resume(self) -> None:
        """As mmengine's; the first process chooses the checkpoint for all.

        Raises:
            CheckpointError: if there are checkpoints, but none can be read.
        """
        if not self._has_loaded:
            choice = [self._resume, self._load_from]
            if choice == [True, None] and is_main_process():
                choice[1] = find_newest_checkpoint(self.cfg, self.logger)
            broadcast_object_list(choice)
            self._resume, self._load_from = choice
            path = self._load_from
            if path and is_local(path) and not all(all_gather_object(osp.exists(osp.expanduser(path)))):
                raise CheckpointError(f'all processes must see the checkpoint {path}, but some do not: name a work folder that '
                                      'all machines share, or copy the checkpoint to each')
        super().load_or_resume()


class DeleteOutdated(Hook):
    """Deletes the files that a CheckpointHook asked to delete, after their successor is complete.

    Until then the message hub holds their names, so they are in the checkpoint too. If a run is killed before it deletes them,
    the resumed run does it.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def before_train(self, runner) -> None:
        folders = []
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and isinstance(hook.file_backend, LocalBackend):
                hook.file_backend = _DeletesLater(runner.message_hub, osp.abspath(hook.out_dir))
                folders.append(osp.abspath(hook.out_dir))
        if is_main_process():
            for folder in filter(osp.isdir, folders):
                for name in os.listdir(folder):
                    # A killed run was writing it, or deleting it.
                    if name.startswith('.') and (SUFFIX in name or fnmatch.fnmatch(name, '.last_checkpoint.*.tmp')):
                        _remove(osp.join(folder, name))
        # A training that was resumed from a checkpoint in another folder must not delete files there, and none may delete the
        # file that it was resumed from.
        outdated, resumed = runner.message_hub.runtime_info.get(OUTDATED, []), osp.realpath(runner._load_from or '')
        outdated = [path for path in outdated if osp.dirname(osp.abspath(path)) in folders and osp.realpath(path) != resumed]
        runner.message_hub.update_info(OUTDATED, outdated)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        _delete_outdated(runner)

    def after_train_epoch(self, runner) -> None:
        _delete_outdated(runner)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        _delete_outdated(runner)


def _delete_outdated(runner) -> None:
    outdated = runner.message_hub.runtime_info.get(OUTDATED, [])
    while outdated:
        path = outdated.pop()
        if is_main_process():
            _remove(path)


class _DeletesLater(LocalBackend):
    """File backend of a CheckpointHook, whose files are deleted after their successor is complete.

    It never deletes files in other folders, such as the best checkpoint of the run that was resumed.
    """

    def __init__(self, message_hub, folder: str) -> None:
        self.message_hub, self.folder = message_hub, folder

    def remove(self, filepath: str) -> None:
        if osp.dirname(osp.abspath(filepath)) == self.folder:
            self.message_hub.runtime_info.setdefault(OUTDATED, []).append(osp.normpath(filepath))

    rmtree = remove


def _remove(path: str) -> None:
    if osp.isdir(path):
        shutil.rmtree(path)
    elif osp.lexists(path):
        os.unlink(path)


def find_newest_checkpoint(cfg: Config, logger: Logger) -> str | None:
    """Finds the checkpoint from which a training is resumed: the one that ``last_checkpoint`` names, or an earlier one.

    Args:
        cfg (Config): the config of the training.
        logger (Logger): gets a warning for each newer file that cannot be read.

    Returns:
        str | None: the path, or None if there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints, but none can be read.
    """
    refused = []
    for path in list_checkpoints(cfg):
        try:
            check_checkpoint(path, _last_checkpoint(cfg), resume=True)
        except (CheckpointError, LaunchError) as error:
            refused.append((path, error))
            continue
        for damaged, error in refused:
            logger.warning(f'{damaged} cannot be resumed from, so the training is resumed from {path}: {error}')
        return path
    if refused:
        raise CheckpointError(f'none of the checkpoints in {cfg.work_dir} can be read: '
                              + '; '.join(str(error) for _, error in refused)
                              + '. To start from the beginning, name another folder with --work-dir')
    return None


def list_checkpoints(cfg: Config) -> list[str]:
    """Lists the checkpoints of the training in ``cfg.work_dir``, in the order in which they are tried.

    The file that ``last_checkpoint`` names is the first; in a folder that was moved or copied, the file of this name there. The
    other files with names of the CheckpointHook follow, the newest first. One exception: if a file is newer than
    ``last_checkpoint`` and has a later iteration, it comes first, because the run was killed after it wrote this file and
    before it wrote ``last_checkpoint``. Files of an earlier, longer training in the same folder are older, so they never come
    first.

    Args:
        cfg (Config): the config of the training.

    Returns:
        list[str]: paths. They may not exist, or be damaged.
    """
    last, named = _last_checkpoint(cfg), None
    if osp.exists(last):
        with open(last, encoding='utf-8', errors='replace') as file:
            named = file.read().strip() or last  # an empty file, which the warning names
        if '://' in named:
            return [named]
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [cfg.work_dir]
    # Before the first training in the work folder, what lies in the other one is of another training.
    if hook.get('out_dir') and osp.isdir(cfg.work_dir) and any(entry.is_dir() for entry in os.scandir(cfg.work_dir)):
        folders.append(osp.join(hook['out_dir'], osp.basename(cfg.work_dir.rstrip(os.sep))))
    patterns = {(hook.get('filename_tmpl') or 'iter_{}.pth').replace('{}', '*'), 'iter_*.pth', 'epoch_*.pth'}
    found = [osp.join(folder, name) for folder in folders if osp.isdir(folder) for name in os.listdir(folder)
             if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    found.sort(key=lambda path: (osp.getmtime(path), len(path), path), reverse=True)  # some file systems count in seconds
    if not named:
        return found
    if osp.dirname(osp.realpath(named)) not in map(osp.realpath, folders):  # the folder was moved or copied
        named = next((path for path in found if osp.basename(path) == osp.basename(named)), named)
    others = [path for path in found if not (osp.exists(named) and osp.samefile(path, named))]
    later = [path for path in others if osp.getmtime(path) >= osp.getmtime(last) and _iteration(path) > _iteration(named)]
    return [*later, named, *(path for path in others if path not in later)]


def _last_checkpoint(cfg: Config) -> str:
    return osp.join(cfg.work_dir, 'last_checkpoint')


def _iteration(path: str) -> int:
    """Reads the iteration of a checkpoint; -1 if that is not possible."""
    try:
        return read_checkpoint(path, map_location='meta', logger=None)['meta']['iter']
    except (CheckpointError, FileNotFoundError, KeyError, TypeError):
        return -1
