# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Loading a checkpoint never runs code from it, by any way; and what mmengine writes loads all the same."""
import functools
import http.server
import itertools
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from safetensors.torch import save_file
from torch import nn

from revcol_mm.apis import train
from revcol_mm.checkpoint import CheckpointError, load_pretrained, read_checkpoint
from revcol_mm.checkpoint import download as downloads
from revcol_mm.models import RevCol

NANO = dict(channels=[4, 6, 8, 10], depths=(1, 1, 1, 1), num_columns=2)
RUNS = itertools.count()
REFUSED = (pickle.UnpicklingError, CheckpointError)


class Trap:
    """Makes a folder when it is unpickled by the plain pickle."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder, )


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / 'the-trap-was-sprung'


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(folder, URL of the folder), with torch's download cache in another folder."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02, ), daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture(params=['file', 'URL'])
def trap(request, served, sprung):
    """Address of a booby-trapped checkpoint, whose weights would otherwise fit."""
    folder, url = served
    weights = {f'backbone.{key}': value for key, value in RevCol(NANO).state_dict().items()}
    torch.save(dict(state_dict=weights, meta=Trap(sprung)), folder / 'trap.pth')
    return str(folder / 'trap.pth') if request.param == 'file' else f'{url}/trap.pth'


def detector_config():
    return Config(dict(
        default_scope='mmdet',
        model=dict(
            type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor'), backbone=dict(type='RevCol', arch=NANO),
            neck=dict(type='FPN', in_channels=NANO['channels'], out_channels=8, num_outs=5),
            bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1),
            test_cfg=dict(nms_pre=10, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5)),
        test_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])),
        visualizer=dict(type='DetLocalVisualizer', name='safe-loading')))


class Toy(BaseModel):

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.linear(torch.stack(list(inputs)))
        return dict(loss=(out**2).mean()) if mode == 'loss' else list(out)


class ToyData(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'), palette=[(1, 2, 3)], dataset_type='toy', scale=np.float64(0.5))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([1., float(index)]), data_samples=index)


class ToyMetric(BaseMetric):
    """Gives a numpy number, as mmdet's and mmseg's metrics do."""
    default_prefix = None

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(score=np.float64(0.25))


def runner(work_dir, epochs=2, scheduler=None, **settings):
    def loader():
        return dict(dataset=ToyData(), batch_size=2, num_workers=0,
                    sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='pseudo_collate'))

    torch.manual_seed(0)
    settings.setdefault('optim_wrapper', dict(optimizer=dict(type='AdamW', lr=0.1)))
    return Runner(
        model=Toy(), work_dir=str(work_dir), train_dataloader=loader(), val_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1), val_cfg=dict(), val_evaluator=Evaluator(ToyMetric()),
        param_scheduler=scheduler, default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, save_best='score', rule='greater'),
            logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=[EMAHook(ema_type='ExponentialMovingAverage', momentum=0.1)], default_scope='mmengine',
        experiment_name=f'safe-loading-{next(RUNS)}', log_level='WARNING', **settings)


def test_the_trap_works_where_torch_is_told_to_run_code(tmp_path, sprung):
    torch.save(Trap(sprung), tmp_path / 'trap.pth')
    torch.load(tmp_path / 'trap.pth', weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize('zipped', [True, False], ids=['zip format', 'old format'])
@pytest.mark.parametrize('load', [torch.load, CheckpointLoader.load_checkpoint, read_checkpoint])
def test_a_file_with_code_is_refused(tmp_path, sprung, load, zipped):
    path = str(tmp_path / 'trap.pth')
    torch.save(dict(state_dict=Trap(sprung)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(REFUSED):
        load(path)
    assert not sprung.exists()


def test_pretrained_weights_run_no_code(trap, sprung):
    with pytest.raises(CheckpointError, match='trap.pth is refused: it refers to .*mkdir'):
        RevCol(NANO, init_cfg=dict(type='Pretrained', checkpoint=trap)).init_weights()
    assert not sprung.exists()


@pytest.mark.parametrize('resume', [False, True], ids=['load_from', 'resume'])
def test_load_from_and_resume_run_no_code(trap, sprung, resume, tmp_path):
    with pytest.raises(REFUSED):
        runner(tmp_path / f'run{resume}', load_from=trap, resume=resume).train()
    assert not sprung.exists()


def load_with_mmengine(trap):
    load_checkpoint(nn.Linear(1, 1), trap)


def load_with_init_detector(trap):
    from mmdet.apis import init_detector
    init_detector(detector_config(), trap, device='cpu')


def load_with_the_inferencer(trap):
    from mmdet.apis import DetInferencer
    DetInferencer(detector_config(), weights=trap, device='cpu')


@pytest.mark.parametrize('load', [load_with_mmengine, load_with_init_detector, load_with_the_inferencer])
def test_other_ways_in_run_no_code(trap, sprung, load):
    with pytest.raises(REFUSED):
        load(trap)
    assert not sprung.exists()


def test_a_url_loads_and_a_missing_one_gets_a_sentence(served):
    folder, url = served
    torch.save(dict(model=RevCol(NANO).state_dict()), folder / 'good.pth')
    load_pretrained(RevCol(NANO), f'{url}/good.pth')
    with pytest.raises(CheckpointError, match='absent.pth could not be downloaded'):
        read_checkpoint(f'{url}/absent.pth')


def test_safetensors_load_from_path_and_url_wherever_mmengine_loads(served):
    folder, url = served
    weights = RevCol(NANO).state_dict()
    save_file(weights, folder / 'weights.safetensors')
    for address in (str(folder / 'weights.safetensors'), f'{url}/weights.safetensors'):
        model = RevCol(NANO)
        load_checkpoint(model, address, strict=True)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize('name', ['best.pth', 'best.safetensors', 'best.pth?download=true'])
def test_files_of_the_same_name_from_two_addresses_are_kept_apart(served, tmp_path, name):
    folder, url = served
    file = name.partition('?')[0]
    for value, run in enumerate(('one', 'two')):
        (folder / run).mkdir()
        (save_file if 'safetensors' in name else torch.save)({'w': torch.full((2, ), float(value))}, folder / run / file)
    for _ in range(2):
        for value, run in enumerate(('one', 'two')):
            assert read_checkpoint(f'{url}/{run}/{name}')['w'].tolist() == [value, value]
        for run in ('one', 'two'):  # the second time they come from the cache
            (folder / run / file).unlink(missing_ok=True)
    cached = sorted(os.listdir(tmp_path / 'cache' / 'hub' / 'checkpoints'))
    assert len(cached) == 2 and all(name.startswith('best-') and name.endswith(os.path.splitext(file)[1]) for name in cached)


def test_the_log_says_how_and_from_where_a_download_comes(served, monkeypatch, capsys):
    folder, url = served
    torch.save({'w': torch.ones(1)}, folder / 'best.pth')
    shown = []
    monkeypatch.setattr('os.isatty', lambda file: True)
    monkeypatch.setattr(downloads, 'Progress', lambda *columns, disable, _kind=downloads.Progress, **settings: (
        shown.append(not disable), _kind(*columns, disable=True, **settings))[1])
    lines = []
    monkeypatch.setattr('mmengine.runner.checkpoint.print_log', lambda message, **_: lines.append(message))
    read_checkpoint(f'{url}/best.pth')
    assert shown == [True] and f'Loads checkpoint by http backend from path: {url}/best.pth' in lines
    assert f'Downloading {url}/best.pth to ' in capsys.readouterr().err


def test_damaged_files_of_the_old_format_get_a_sentence(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(dict(model=RevCol(NANO).state_dict()), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    key = list(re.finditer(rb'[0-9]{9,}', data))[-1]  # of a storage, which the weights refer to
    for damaged in (*(data[:length] for length in range(1, len(data), 997)),
                    data[:key.start()] + bytes(reversed(key[0])) + data[key.end():]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match='old.pth cannot be read as a checkpoint'):
            read_checkpoint(str(path))


class Asks:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) + ((state, ) if state else ())

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('request_', [
    Asks(getattr, HistoryBuffer, '__init__'), Asks(getattr, HistoryBuffer, '__subclasses__'),
    Asks(getattr, HistoryBuffer, 'register_statistics'), Asks(getattr, torch.Tensor, '__setstate__'),
    Asks(getattr, np.ndarray, 'tofile'),
    Asks(np.dtype, 'O', False, True, state=(3, '|', None, None, None, -1, -1, 0)), Asks(np.dtype, [('a', 'O')], False, True),
    Asks(eval, '1 + 1'), Asks(SimpleNamespace)], ids=lambda asks: str(asks.call[:2]))
def test_the_allow_list_is_no_door(request_, tmp_path):
    """Neither attributes beyond the few needed, nor object dtypes, whose flags a pickle could overwrite."""
    torch.save([request_], tmp_path / 'asks.pth')
    with pytest.raises(CheckpointError, match='is refused'):
        read_checkpoint(str(tmp_path / 'asks.pth'))


def test_arguments_of_a_command_line_are_read_as_values(tmp_path):
    torch.save(dict(args=Namespace(lr=0.1, names=['a'])), tmp_path / 'args.pth')
    assert vars(read_checkpoint(str(tmp_path / 'args.pth'))['args']) == dict(lr=0.1, names=['a'])
    torch.save(dict(args=Namespace(call=Asks(eval, '1 + 1'))), tmp_path / 'call.pth')
    with pytest.raises(CheckpointError, match='is refused'):
        read_checkpoint(str(tmp_path / 'call.pth'))


@pytest.fixture
def stores(monkeypatch, tmp_path, served):
    """Addresses of one file, trap.pth, for every kind of place that mmengine loads from."""
    folder, url = served

    class Model:
        def __init__(self, name):
            self.name = name

        def download(self, path):
            Path(path).write_bytes((folder / self.name).read_bytes())

    class Store:
        def get(self, address):
            return (folder / os.path.basename(address)).read_bytes()

    monkeypatch.setitem(sys.modules, 'pavi', SimpleNamespace(modelcloud=SimpleNamespace(get=Model)))
    monkeypatch.setattr('revcol_mm.checkpoint.safe.get_file_backend', lambda *args, **kwargs: Store())
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {
        'at_home': 'trap.pth', 'online': f'{url}/trap.pth'})
    for name in ('torchvision', 'mmcls'):
        monkeypatch.setattr(f'mmengine.runner.checkpoint.get_{name}_models', lambda: {'net': f'{url}/trap.pth'})
    monkeypatch.setattr('mmengine.runner.checkpoint._get_mmengine_home', lambda: str(folder))
    return [str(folder / 'trap.pth'), f'{url}/trap.pth', 'pavi://trap.pth', 's3://bucket/trap.pth', 'petrel://bucket/trap.pth',
            'open-mmlab://at_home', 'openmmlab://online', 'torchvision://net', 'modelzoo://net', 'mmcls://net']


@pytest.mark.parametrize('variable', [None, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'])
def test_no_loader_of_mmengine_runs_code_whatever_the_environment_says(stores, served, sprung, monkeypatch, variable):
    torch.save(Trap(sprung), served[0] / 'trap.pth')
    if variable:
        monkeypatch.setenv(variable, '1')
        torch.load(served[0] / 'trap.pth')
        assert sprung.exists()  # what the variable does elsewhere
        sprung.rmdir()
    for address in stores:
        with pytest.raises(REFUSED):
            CheckpointLoader.load_checkpoint(address)
        assert not sprung.exists(), address


def test_every_loader_of_mmengine_loads_weights(stores, served):
    torch.save(dict(state_dict={'backbone.w': torch.ones(2)}), served[0] / 'trap.pth')
    for address in stores:
        loaded = CheckpointLoader.load_checkpoint(address)
        assert torch.equal(loaded['state_dict'].popitem()[1], torch.ones(2)), address


def test_safetensors_load_from_every_store(stores, served):
    save_file({'backbone.w': torch.ones(2)}, served[0] / 'trap.safetensors')
    for address in ('pavi://trap.safetensors', 's3://bucket/trap.safetensors', 'cluster:petrel://bucket/trap.safetensors'):
        assert read_checkpoint(address)['backbone.w'].tolist() == [1, 1], address
    (served[0] / 'trap.safetensors').write_bytes(b'nothing')
    with pytest.raises(CheckpointError, match='^s3://bucket/trap.safetensors must be a safetensors file, but is damaged'):
        read_checkpoint('s3://bucket/trap.safetensors')


def test_the_import_leaves_the_environment_and_the_users_own_pickles_alone(tmp_path):
    code = f"""
import os, mmcv, mmengine.runner, torch
before = dict(os.environ)
import revcol_mm
assert dict(os.environ) == before
class Cache:
    size = 3
torch.save(Cache(), {str(tmp_path / 'cache.pt')!r})
assert torch.load({str(tmp_path / 'cache.pt')!r}, weights_only=False).size == 3
"""
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


OWN_DATA = """
import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS

class Sample:
    def __init__(self, value):
        self.value = value

@DATASETS.register_module()
class CachedData(torch.utils.data.Dataset):
    def __init__(self, path):
        torch.save([Sample(1.), Sample(2.)], path)
        self.samples = torch.load(path, weights_only=False)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([self.samples[index].value]))

@MODELS.register_module()
class OwnModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(torch.stack(list(inputs))).square().mean())
"""


def test_a_data_set_reads_its_own_pickle_in_a_training(tmp_path, monkeypatch):
    (tmp_path / 'own_data.py').write_text(OWN_DATA)
    (tmp_path / 'config.py').write_text(f"""
custom_imports = dict(imports=['own_data'])
default_scope = 'mmengine'
model = dict(type='OwnModel')
train_dataloader = dict(dataset=dict(type='CachedData', path={str(tmp_path / 'cache.pt')!r}), batch_size=2, num_workers=0,
                        sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
""")
    monkeypatch.syspath_prepend(tmp_path)
    train.train([str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work')])
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()


SCHEDULERS = dict(
    linear_multistep=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3), dict(type='MultiStepLR', milestones=[1])],
    cosine=[dict(type='CosineAnnealingLR', T_max=3, eta_min=1e-3, convert_to_iter_based=True)],
    poly=[dict(type='PolyLR', power=1.0, eta_min=0., end=3, by_epoch=False)],
    one_cycle=[dict(type='OneCycleLR', eta_max=0.1, total_steps=6, by_epoch=False)],
    one_cycle_linear=[dict(type='OneCycleLR', eta_max=0.1, total_steps=6, by_epoch=False, anneal_strategy='linear')],
    others=[dict(type='ConstantLR', factor=0.5, end=1), dict(type='StepLR', step_size=1),
            dict(type='ExponentialLR', gamma=0.9)])


@pytest.mark.parametrize('scheduler', SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_run_resumes_from_what_it_has_written(tmp_path, scheduler):
    """Schedulers, averaged weights, the best score, histories: after a restart all is as in a run that was never stopped."""
    whole = runner(tmp_path / 'whole', epochs=3, scheduler=scheduler)
    whole.train()
    runner(tmp_path / 'parts', epochs=3, scheduler=scheduler).train()
    os.remove(tmp_path / 'parts' / 'epoch_3.pth')
    (tmp_path / 'parts' / 'last_checkpoint').write_text(str(tmp_path / 'parts' / 'epoch_2.pth'))
    parts = runner(tmp_path / 'parts', epochs=3, scheduler=scheduler, resume=True)
    parts.train()

    assert parts.epoch == 3 and parts.message_hub.get_info('best_score') == 0.25
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[key])
    for name, history in whole.message_hub.log_scalars.items():
        if 'lr' in name or 'loss' in name:
            assert np.array_equal(history.data, parts.message_hub.log_scalars[name].data)
    assert any(name.startswith('best') for name in os.listdir(tmp_path / 'parts'))


def with_names_of_numpy_1(path):
    """Rewrites a checkpoint as numpy 1 would have written it: its internal modules were called numpy.core."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    renamed = {key: value.replace(b'numpy._core.', b'numpy.core.') if key.endswith('data.pkl') else value
               for key, value in entries.items()}
    assert renamed != entries
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for key, value in renamed.items():
            archive.writestr(key, value)


def test_files_written_under_numpy_1_and_numpy_2_load(tmp_path):
    path = str(tmp_path / 'run' / 'epoch_1.pth')
    runner(tmp_path / 'run', epochs=1).train()
    new = read_checkpoint(path)
    with_names_of_numpy_1(path)
    old = read_checkpoint(path)
    for hub in (old['message_hub'], new['message_hub']):
        assert hub['runtime_info']['best_score'] == np.float64(0.25)
        assert hub['log_scalars']['train/loss'].mean() > 0
        assert hub['log_scalars']['train/loss'].statistics('current') == hub['log_scalars']['train/loss'].data[0][-1]
    assert old['meta']['dataset_meta'] == ToyData.metainfo


@pytest.mark.parametrize('value', [np.float32(1.5), np.int64(3), np.bool_(True), np.arange(6, dtype=np.uint8).reshape(2, 3),
                                   np.array([1 + 2j]), torch.amp.GradScaler('cpu', enabled=True).state_dict()], ids=repr)
def test_numbers_of_numpy_and_the_loss_scaler_survive(value, tmp_path):
    torch.save([value], tmp_path / 'value.pth')
    loaded = read_checkpoint(str(tmp_path / 'value.pth'))[0]
    assert type(loaded) is type(value)
    assert np.array_equal(loaded, value) if isinstance(value, np.ndarray) else loaded == value


def test_settings_in_a_checkpoint_come_out_as_plain_dicts(tmp_path):
    torch.save(Config(dict(a=dict(b=[1, dict(c=2)])))._cfg_dict, tmp_path / 'cfg.pth')
    assert read_checkpoint(str(tmp_path / 'cfg.pth')) == OrderedDict(a=dict(b=[1, dict(c=2)]))


def test_the_authors_training_checkpoints_load(tmp_path):
    """They hold a yacs configuration, a dict with attributes, and by a slip of its code Python's function `input`."""
    weights = RevCol(NANO).state_dict()
    torch.save(dict(model=weights, input='INPUT', config='CONFIG', max_accuracy=82.2, state_dict_ema=None), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    config = (b'cyacs.config\nCfgNode\nq\xf0)\x81q\xf1(X\x06\x00\x00\x00OUTPUTX\x03\x00\x00\x00out'  # CfgNode(OUTPUT='out')
              b'u}q\xf2X\r\x00\x00\x00__immutable__\x88sb')
    for key, value in entries.items():
        if key.endswith('data.pkl'):
            value = value.replace(b'X\x05\x00\x00\x00INPUT', b'c__builtin__\ninput\n').replace(
                b'X\x06\x00\x00\x00CONFIG', config)
            assert b'CfgNode' in value and b'builtin__' in value
            entries[key] = value
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_STORED) as archive:
        for key, value in entries.items():
            archive.writestr(key, value)
    loaded = read_checkpoint(str(tmp_path / 'a.pth'))
    assert loaded['input'] is None and loaded['config'] == OrderedDict(OUTPUT='out')
    load_pretrained(RevCol(NANO), str(tmp_path / 'a.pth'))
