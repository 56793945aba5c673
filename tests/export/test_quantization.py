# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Files whose convolutions and matrix products compute with integers."""
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from revcol_mm.checkpoint import CheckpointError
from revcol_mm.export import export_model, quantization
from revcol_mm.export import model as exporting
from revcol_mm.export.quantization import INTEGER, quantize_onnx
from tests.export.demo import TRACED, make_model, random_images, run_file

CASCADE, CLASSIFIER = 'cascade_rcnn_revcol_nano_digits', 'revcol_nano_digits_pretrain'
SIZE = (96, 64)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> dict[str, Path]:
    """A detector and a classifier in float32, and a classifier in half precision."""
    folder = tmp_path_factory.mktemp('float')
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, 'TRACED', TRACED)
        for name, config, options in (('detector', CASCADE, {}), ('classifier', CLASSIFIER, {}),
                                      ('half', CLASSIFIER, dict(half=True))):
            paths[name] = folder / f'{name}.onnx'
            export_model(make_model(config), str(paths[name]), sizes=[SIZE], metadata=dict(classes=['0', '1']), **options)
    return paths


def images_of(number: int, seed: int = 0, **more) -> list[dict[str, np.ndarray]]:
    torch.manual_seed(seed)
    return [dict(images=random_images(1, SIZE).numpy(), **more) for _ in range(number)]


def quantized_weights(path: Path) -> list[np.ndarray]:
    model = onnx.load(path)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == 'DequantizeLinear'}
    return [weights[stored[node.input[1]]] for node in model.graph.node
            if node.op_type in INTEGER and stored.get(node.input[1]) in weights]


@pytest.mark.parametrize('reduce_range, largest', [(True, 64), (False, 127)])
def test_a_classifier_predicts_nearly_the_same_with_weights_of_one_byte(files, tmp_path, reduce_range, largest):
    path, content = tmp_path / 'int8.onnx', files['classifier'].read_bytes()
    quantize_onnx(str(files['classifier']), str(path), images_of(8), reduce_range)
    assert files['classifier'].read_bytes() == content and os.listdir(tmp_path) == ['int8.onnx']
    weights = quantized_weights(path)
    products = [node for node in onnx.load(files['classifier']).graph.node if node.op_type in ('Conv', 'Gemm')]
    assert len(weights) >= len(products) > 5
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8)}
    assert max(np.abs(weight.astype(int)).max() for weight in weights) == largest
    assert path.stat().st_size < 0.5 * len(content)
    for inputs in images_of(4, seed=1):
        expected, found = (run_file(file, **inputs)['scores'] for file in (files['classifier'], path))
        assert not torch.equal(found, expected)
        assert (found - expected).abs().max() < 0.1 * expected.max()


def test_the_file_says_what_it_is(files, tmp_path):
    path = tmp_path / 'int8.onnx'
    quantize_onnx(str(files['classifier']), str(path), images_of(1))
    before, after = ({entry.key: entry.value for entry in onnx.load(file).metadata_props}
                     for file in (files['classifier'], path))
    assert after == dict(before, precision='int8')
    assert {node.domain for node in onnx.load(path).graph.node} <= {'', 'ai.onnx'}
    onnx.checker.check_model(path)


@pytest.mark.slow
def test_products_of_two_activations_stay_in_floating_point(files, tmp_path):
    """The pasting of masks is one of them; its factors are coordinates."""
    path, size = tmp_path / 'int8.onnx', dict(size=np.array([150, 100]))
    quantize_onnx(str(files['detector']), str(path), images_of(4, **size))
    nodes = onnx.load(path).graph.node
    stored = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
    products = [node for node in nodes if node.op_type == 'MatMul' and not stored & set(node.input)]
    assert len(products) >= 2
    inputs, = images_of(1, seed=1, **size)
    found = run_file(path, **inputs)
    assert len(found['boxes']) > 5 and found['masks'].shape == (len(found['boxes']), 150, 100)
    assert 0 <= found['boxes'].min() and (found['boxes'].amax(0) <= torch.tensor([100, 150, 100, 150])).all()


@pytest.mark.parametrize('source, number, options, error, sentence', [
    ('half', 1, {}, ValueError, 'half.onnx must be in float32 to be quantized, but is in float16'),
    ('classifier', 0, {}, ValueError, 'inputs must hold those of at least one image'),
    ('classifier', 1, dict(out='old.onnx'), CheckpointError, 'old.onnx exists already'),
    ('classifier', 1, dict(out='none/int8.onnx'), CheckpointError, 'output folder none does not exist'),
])
def test_a_refused_request_writes_nothing(files, tmp_path, monkeypatch, source, number, options, error, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'old.onnx').write_text('earlier')
    with pytest.raises(error, match=sentence):
        quantize_onnx(str(files[source]), inputs=images_of(number), **dict(dict(out='int8.onnx'), **options))
    assert os.listdir(tmp_path) == ['old.onnx'] and (tmp_path / 'old.onnx').read_text() == 'earlier'


def test_something_must_be_found_in_an_image(files, tmp_path, monkeypatch):
    results = [torch.ones(0), torch.ones(0), torch.ones(1)]
    monkeypatch.setattr(quantization, 'run_file', lambda path: lambda **inputs: [results.pop(0)])
    with pytest.raises(ValueError, match='must find something in at least one of the images'):
        quantize_onnx(str(files['classifier']), str(tmp_path / 'int8.onnx'), images_of(2))
    assert os.listdir(tmp_path) == [] and len(results) == 1
    monkeypatch.undo()
    reader = quantization._Reader(iter(images_of(2)), lambda **inputs: [torch.ones(1)])
    assert reader.get_next() and reader.found and reader.get_next() and reader.get_next() is None


def test_a_file_is_not_quantized_twice(files, tmp_path):
    path = tmp_path / 'int8.onnx'
    quantize_onnx(str(files['classifier']), str(path), images_of(1))
    with pytest.raises(ValueError, match='int8.onnx must be in float32 to be quantized, but is in int8'):
        quantize_onnx(str(path), str(tmp_path / 'again.onnx'), images_of(1))


def test_the_input_is_never_the_output(files):
    with pytest.raises(CheckpointError, match='must not be the input'):
        quantize_onnx(str(files['classifier']), str(files['classifier']), images_of(1), force=True)
