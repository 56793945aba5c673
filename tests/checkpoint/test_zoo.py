# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Weights by name: from the model index, through a cache or a mirror, and whole or not at all."""
import errno
import hashlib
import http.server
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from revcol_mm.apis.checks.files import check_checkpoint, check_pretrained
from revcol_mm.checkpoint import CheckpointError, read_checkpoint, zoo
from revcol_mm.checkpoint import download as downloads
from revcol_mm.checkpoint.download import download
from revcol_mm.checkpoint.safe import local_name
from revcol_mm.checkpoint.zoo import Entry, find_address, find_nearest, find_published, read_index
from revcol_mm.models import RevCol
from tests.common import CONFIGS, load_tool, run_tool, small_arch

RELEASE = 'https://github.com/megvii-research/RevCol/releases/download/checkpoint'
URL = f'{RELEASE}/revcol_tiny_1k.pth'  # of revcol_t_in1k


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``, with ranges unless told otherwise; may end a connection early, which a browser would not see."""

    def do_GET(self):
        data, server = self.server.files.get(self.path.lstrip('/')), self.server
        server.requests.append((self.path, self.headers.get('Range')))
        if data is None:
            return self.send_error(404)
        start = 0
        if server.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
            if start >= len(data):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(data)}')
                return self.end_headers()
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + (server.cuts.pop(0) if server.cuts else len(data))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror that has no files yet; torch's cache is in another folder."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files, server.cuts, server.ranges, server.requests = {}, [], True, []
    thread = threading.Thread(target=server.serve_forever, args=(0.02, ), daemon=True)
    thread.start()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv(downloads.MIRROR, f'http://127.0.0.1:{server.server_port}/')
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def weights(tmp_path) -> bytes:
    torch.save(dict(model=RevCol(small_arch()).state_dict()), tmp_path / 'weights.pth')
    return (tmp_path / 'weights.pth').read_bytes()


@pytest.fixture
def index(monkeypatch):
    """A function that lets the model index know more of a file."""
    def know(name='revcol_t_in1k', **known):
        entries = dict(read_index())
        entries[name] = Entry(**{**vars(entries[name]), **known})
        monkeypatch.setattr(zoo, 'read_index', lambda: entries)

    return know


def cached(tmp_path) -> list[str]:
    folder = tmp_path / 'cache' / 'hub' / 'checkpoints'
    return sorted(os.listdir(folder)) if folder.exists() else []


# Names

def test_a_name_stands_for_what_the_model_index_links():
    assert find_address('zoo:revcol_t_in1k') == find_address('zoo:configs/revcol_t_in1k.py') == URL
    assert find_address('zoo:cascade_rcnn_revcol_t').endswith('/revcol_models/detection/cmr_tiny_3x_in1k_AP508.pth')
    for other in ('zoo.pth', 'work_dirs/zoo', 'https://zoo/x.pth'):
        assert find_address(other) == other


def test_zoo_alone_stands_for_the_weights_of_the_config_beside_it(tmp_path):
    assert find_address('zoo', str(CONFIGS / 'revcol_t_in1k.py')) == URL
    copy = tmp_path / 'revcol_t_in1k.py'  # of another checkout
    copy.write_bytes((CONFIGS / 'revcol_t_in1k.py').read_bytes())
    assert find_address('zoo', str(copy)) == URL
    copy.write_text('model = dict()')
    with pytest.raises(CheckpointError, match=f'{copy} is not one of them: name the config whose weights you want'):
        find_address('zoo', str(copy))
    with pytest.raises(CheckpointError, match='no config is given'):
        find_address('zoo')


def test_an_unknown_name_gets_the_names_that_there_are():
    with pytest.raises(CheckpointError, match="no 'revcol_q'; with public weights there are .*cascade_rcnn_revcol_t, "):
        find_address('zoo:revcol_q')


@pytest.mark.parametrize('name, nearest', [
    ('cascade_rcnn_revcol_t_k7_1x', 'cascade_rcnn_revcol_t'),  # same size and head
    ('mask2former_revcol_b_in22k', 'upernet_revcol_b_in22k'),  # no such head: the same task and data
    ('cascade_rcnn_revcol_xl_in22k', 'cascade_rcnn_revcol_l_in22k'),  # no such size: L and H are next to it
    ('dino_revcol_h', 'revcol_h_in1k_640_ft'),  # the size counts more than the task
])
def test_a_config_without_weights_names_the_nearest_one_with_some(name, nearest):
    with pytest.raises(CheckpointError, match=rf'{name} has no public weights\. The nearest .* is {nearest}: give that config, '
                                              rf'and zoo:{nearest}$'):
        find_address(f'zoo:{name}')


def test_backbones_of_no_published_size_have_no_nearest_config():
    assert find_nearest(read_index()['revcol_vit_b_in1k']) is None
    with pytest.raises(CheckpointError, match='hrnet_columns_in1k has no public weights. There are none of its kind'):
        find_address('zoo:hrnet_columns_in1k')


def test_files_of_the_model_index_have_names_of_their_own():
    """A mirror is one folder."""
    urls = [entry.url for entry in read_index().values() if entry.url]
    assert len({url.rpartition('/')[2] for url in urls}) == len(urls) == 20


def test_a_query_is_no_part_of_a_files_name():
    url = f'{URL}?download=true'
    assert find_published(url).name == 'revcol_t_in1k' and find_published(f'{RELEASE}/other.pth?x={URL}') is None
    assert local_name(url) == 'revcol_tiny_1k.pth' and local_name('s3://bucket/a/b.safetensors#1') == 'b.safetensors'
    assert local_name('folder/what?.pth') == 'folder/what?.pth'
    name = load_tool('pad_kernels').output_name(SimpleNamespace(out=None, checkpoint=url.replace('.pth', '.safetensors')), 7)
    assert name == 'revcol_tiny_1k_k7.safetensors'


# Downloads

def test_a_download_is_kept_and_comes_from_the_cache_the_next_time(server, weights, tmp_path, capsys):
    server.files['revcol_tiny_1k.pth'] = weights
    path = download(URL)
    assert Path(path).read_bytes() == weights and 'Downloading http://127.0.0.1' in capsys.readouterr().err
    server.files.clear()
    assert download(URL) == path and len(server.requests) == 1 and cached(tmp_path) == [os.path.basename(path)]


@pytest.mark.parametrize('ranges', [True, False])
def test_a_broken_connection_goes_on_from_where_it_was(server, weights, tmp_path, ranges):
    server.files['revcol_tiny_1k.pth'], server.ranges, server.cuts = weights, ranges, [1000]
    assert Path(download(URL)).read_bytes() == weights
    assert [asked for _, asked in server.requests] == [None, 'bytes=1000-']


def test_what_a_dead_connection_leaves_is_no_checkpoint_and_is_used_by_the_next_call(server, weights, tmp_path):
    server.files['revcol_tiny_1k.pth'], server.cuts = weights, [1000, 0, 500]
    with pytest.raises(CheckpointError, match=rf'ended after 1500 of {len(weights)} bytes; 1500 bytes are kept') as error:
        download(URL)
    assert '\n' not in str(error.value) and downloads.MIRROR in str(error.value)
    assert all(name.startswith('.partial-') for name in cached(tmp_path))
    assert Path(download(URL)).read_bytes() == weights
    assert server.requests[-1][1] == 'bytes=1500-' and len(cached(tmp_path)) == 1


def test_a_process_that_was_killed_before_the_last_step_has_nothing_to_load_again(server, weights, tmp_path):
    server.files['revcol_tiny_1k.pth'] = weights
    path = Path(download(URL))
    path.rename(path.with_name(f'.partial-{path.name}'))
    assert download(URL) == str(path) and server.requests[-1][1] == f'bytes={len(weights)}-'
    path.with_name(f'.partial-{path.name}').write_bytes(weights + b'more')  # of a file that has changed since then
    path.unlink()
    assert Path(download(URL)).read_bytes() == weights


@pytest.mark.parametrize('damage', ['other bytes', 'a page of a proxy'])
def test_damaged_contents_are_not_kept(server, weights, tmp_path, damage):
    half = len(weights) // 2
    server.files['revcol_tiny_1k.pth'] = (
        weights[:half] + bytes(byte ^ 1 for byte in weights[half:half + 8]) + weights[half + 8:]
        if damage == 'other bytes' else b'<html>Please log in</html>')
    with pytest.raises(CheckpointError, match=r'^http://127\.0\.0\.1:\d+/revcol_tiny_1k\.pth (is damaged|cannot be read)'):
        download(URL)
    assert cached(tmp_path) == []


def test_a_copy_that_was_damaged_in_the_cache_is_named_and_downloaded_once_more_before_a_run(server, weights, tmp_path):
    server.files['revcol_tiny_1k.pth'] = weights
    path, half = Path(download(URL)), len(weights) // 2
    check_checkpoint('zoo:revcol_t_in1k', 'load_from')
    assert path.exists()
    path.write_bytes(weights[:half])
    with pytest.raises(CheckpointError, match=f'^{URL} cannot be read .* It was read from {path}: remove this file first'):
        read_checkpoint(URL)
    for damaged in (weights[:half], weights[:half] + bytes(byte ^ 1 for byte in weights[half:half + 8]) + weights[half + 8:]):
        path.write_bytes(damaged)
        check_checkpoint('zoo:revcol_t_in1k', 'load_from')
        assert not path.exists() and download(URL) == str(path) and path.read_bytes() == weights
    assert cached(tmp_path) == [path.name] and len(server.requests) == 3


def test_a_damaged_copy_of_a_backbones_weights_is_downloaded_once_more_before_a_training(server, weights, tmp_path):
    server.files['revcol_tiny_1k.pth'] = weights
    path, half = Path(download(URL)), len(weights) // 2
    damaged = weights[:half] + bytes(byte ^ 1 for byte in weights[half:half + 8]) + weights[half + 8:]
    for address in ('zoo:revcol_t_in1k', URL):
        path.write_bytes(damaged)
        check_pretrained(Config(dict(model=dict(backbone=dict(init_cfg=dict(checkpoint=address))))), 'config.py')
        assert not path.exists() and Path(download(URL)).read_bytes() == weights
    (tmp_path / 'own.pth').write_bytes(damaged)
    with pytest.raises(CheckpointError, match='own.pth is damaged'):
        check_pretrained(Config(dict(model=dict(backbone=dict(init_cfg=dict(checkpoint=str(tmp_path / 'own.pth')))))),
                         'config.py')


def test_a_file_that_needs_a_missing_package_is_neither_removed_nor_downloaded(server, tmp_path, monkeypatch):
    url = f'{os.environ[downloads.MIRROR]}/own.safetensors'
    path = Path(downloads._places(url)[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b'whatever')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    for load in (download, read_checkpoint, lambda url: check_checkpoint(url, 'load_from')):
        with pytest.raises(CheckpointError, match='need the package safetensors: pip install safetensors$'):
            load(url)
    assert path.read_bytes() == b'whatever' and not server.requests


@pytest.mark.parametrize('place', ['server', 'folder'])
def test_another_file_than_that_of_the_index_is_refused(server, weights, tmp_path, monkeypatch, index, place):
    server.files['revcol_tiny_1k.pth'] = weights
    if place == 'folder':
        (tmp_path / 'mirror').mkdir()
        (tmp_path / 'mirror' / 'revcol_tiny_1k.pth').write_bytes(weights)
        monkeypatch.setenv(downloads.MIRROR, str(tmp_path / 'mirror'))
    index(size=len(weights) + 1)
    with pytest.raises(CheckpointError, match=f'{len(weights) + 1} bytes, as the model index says, but has {len(weights)}'):
        download(URL)
    index(size=len(weights), sha256=hashlib.sha256(b'').hexdigest())
    with pytest.raises(CheckpointError, match='must have the SHA-256 e3b0c4'):
        download(URL)
    assert cached(tmp_path) == []
    index(size=len(weights), sha256=hashlib.sha256(weights).hexdigest())
    assert Path(download(URL)).read_bytes() == weights


def test_a_folder_takes_the_place_of_the_hosts(tmp_path, monkeypatch, weights):
    monkeypatch.setenv(downloads.MIRROR, str(tmp_path / 'mirror'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    with pytest.raises(CheckpointError, match=rf'must hold revcol_tiny_1k\.pth, but does not: put there what {URL} has'):
        read_checkpoint('zoo:revcol_t_in1k')
    (tmp_path / 'mirror').mkdir()
    (tmp_path / 'mirror' / 'revcol_tiny_1k.pth').write_bytes(weights)
    lines = []
    monkeypatch.setattr(downloads, 'print_log', lambda line, logger: lines.append(line))
    assert download(URL) == str(tmp_path / 'mirror' / 'revcol_tiny_1k.pth') and cached(tmp_path) == []
    assert lines == [f'{tmp_path}/mirror/revcol_tiny_1k.pth is taken for {URL} (REVCOL_MM_WEIGHTS)']
    backbone = RevCol(small_arch(), init_cfg=dict(type='Pretrained', checkpoint='zoo:revcol_t_in1k'))
    backbone.init_weights()
    torch.testing.assert_close(dict(backbone.state_dict()), read_checkpoint(str(tmp_path / 'weights.pth'))['model'],
                               rtol=0, atol=0)


def test_a_server_that_has_no_such_file_or_does_not_answer_is_named(server, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r'tiny_1k\.pth could not be downloaded: the server answers 404 Not Found\.'):
        download(URL)
    monkeypatch.setenv(downloads.MIRROR, 'http://127.0.0.1:1')
    with pytest.raises(CheckpointError, match=r'http://127\.0\.0\.1:1/revcol_tiny_1k\.pth could not be downloaded: .*refused'):
        download(URL)
    assert cached(tmp_path) == []


def test_a_full_disk_ends_with_a_sentence(server, weights, tmp_path, monkeypatch):
    server.files['revcol_tiny_1k.pth'] = weights

    def fail(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(downloads, 'put_in_place', fail)
    with pytest.raises(CheckpointError, match='could not be written: No space left on device. Make room'):
        download(URL)


def test_two_processes_that_want_the_same_file_download_it_once(server, weights, tmp_path):
    server.files['revcol_tiny_1k.pth'] = weights
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(download(URL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(paths) == 4 and len(set(paths)) == 1 and len(server.requests) == 1 and len(cached(tmp_path)) == 1


def test_a_tool_without_a_config_takes_a_name(server, weights, tmp_path, monkeypatch):
    server.files['revcol_tiny_1k.pth'] = weights
    result = run_tool('pad_kernels', 'zoo:revcol_t_in1k', '--size', '5', '--out', str(tmp_path / 'k5.pth'))
    assert result.returncode == 0, result.stderr
    assert read_checkpoint(str(tmp_path / 'k5.pth'))['model']['subnet0.level0.blocks.0.dwconv.weight'].shape[-1] == 5
    result = run_tool('pad_kernels', 'zoo:dino_revcol_h', '--size', '5', '--out', str(tmp_path / 'k5.pth'))
    assert (result.returncode, result.stderr.count('\n')) == (1, 1) and result.stderr.startswith('error: dino_revcol_h has no')
