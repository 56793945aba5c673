# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Time of one image on the CPU: torch, torch.compile, onnxruntime, its 8-bit integers, and OpenVINO if it is installed.

    python benchmarks/deploy.py                                        # everything; about half an hour on two cores
    python benchmarks/deploy.py --nets backbone-t --rounds 5

Backbones T, S and B, and whole models, Cascade Mask R-CNN and UPerNet with T, from the image to their predictions. Every net
also has ConvNeXt of the same size in RevCol's place, and goes the same way. Weights are random, RevCol is folded, and all ways
of one net take turns within every round; what counts is the ratios of their median times. Writes JSON.
"""
import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

import revcol_mm  # noqa: E402, F401, I001
from benchmarks.inference import build, device_name, measure  # noqa: E402
from revcol_mm.export import exported_net  # noqa: E402
from revcol_mm.export.files import run_file, write_onnx  # noqa: E402
from revcol_mm.export.model import make_images, original_size  # noqa: E402
from revcol_mm.export.quantization import quantize_onnx  # noqa: E402
from revcol_mm.export.rewrites import prepare  # noqa: E402

NETS = ('backbone-t', 'backbone-s', 'backbone-b', 'cascade_rcnn-t', 'upernet-t')
FAMILIES = ('RevCol', 'ConvNeXt')
WAYS = ('torch', 'compiled', 'onnxruntime', 'int8', 'openvino')
CALIBRATION = 8  # images


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nets', nargs='+', choices=NETS, default=list(NETS), help=f'default: {" ".join(NETS)}')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS), help=f'default: {" ".join(WAYS)}')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), default=[224, 224],
                        help='backbones; default: 224 224')
    parser.add_argument('--model-shape', type=int, nargs=2, metavar=('H', 'W'), default=[384, 512],
                        help='whole models; default: 384 512')
    parser.add_argument('--rounds', type=int, default=7, help='measured rounds, after two that are not; default: 7')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads; default: 1')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'deploy_cpu.json',
                        help='JSON; default: benchmarks/results/deploy_cpu.json')
    return parser.parse_args()


class Backbone(nn.Module):
    """A backbone's four outputs."""

    def __init__(self, family: str, size: str) -> None:
        super().__init__()
        self.net, self.outputs = prepare(build(family, size)), [f'level{level}' for level in range(4)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(images))


def whole_model(family: str, name: str) -> nn.Module:
    """A model with its backbone exchanged, from the image to its predictions."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}_revcol_t.py')
    model = cfg.model
    model.backbone.init_cfg = None
    if family == 'ConvNeXt':
        channels = [96, 192, 384, 768]
        model.backbone = dict(type='mmpretrain.ConvNeXt', arch='tiny', out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
        if 'neck' in model:
            model.neck.in_channels = channels
        else:
            model.decode_head.in_channels, model.auxiliary_head.in_channels = channels, channels[2]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return exported_net(prepare(MODELS.build(model))).eval()


def net_and_inputs(family: str, name: str, shape: tuple[int, int]) -> tuple[nn.Module, Iterator[dict[str, Tensor]]]:
    """A net, and any number of random inputs for it."""
    kind, size = name.rsplit('-', 1)
    net = Backbone(family, size) if kind == 'backbone' else whole_model(family, kind)

    def inputs() -> Iterator[dict[str, Tensor]]:
        for seed in range(10**6):
            images = make_images(1, shape, seed)
            if kind == 'backbone':
                yield dict(images=(images / 255 - 0.45) / 0.225)
            elif net.takes_size:
                yield dict(images=images, size=torch.tensor(original_size(shape)))
            else:  # the window of a model that slides
                yield dict(images=images)
    return net.eval(), inputs()


def ways_of(net: nn.Module, inputs: Iterator[dict[str, Tensor]], names: list[str], folder: str, threads: int
            ) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """A call per way of computing one image, and the sizes of the files in MiB."""
    image = next(inputs)
    arrays = {key: value.numpy() for key, value in image.items()}
    files = dict(onnxruntime=os.path.join(folder, 'net.onnx'), int8=os.path.join(folder, 'int8.onnx'))
    axes = {'images': {2: 'height', 3: 'width'}}
    write_onnx(net, image, net.outputs, axes, files['onnxruntime'], 17, lambda run: None)
    if 'int8' in names:
        calibration = ({key: value.numpy() for key, value in next(inputs).items()} for _ in range(CALIBRATION))
        quantize_onnx(files['onnxruntime'], files['int8'], calibration)
    sizes = {name: round(os.path.getsize(path) / 2**20, 1) for name, path in files.items() if os.path.exists(path)}
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == 'torch':
            calls[name] = infers(net, image)
        elif name in files:
            calls[name] = partial(run_file(files[name]), **arrays)  # with torch's number of threads
        elif name == 'openvino' and find_spec('openvino'):
            calls[name] = runs_in_openvino(files['onnxruntime'], arrays, threads)
    if 'compiled' in names:
        compiled = copy.deepcopy(net)
        (compiled.net if isinstance(compiled, Backbone) else compiled.model.backbone).compile()
        calls['compiled'] = infers(compiled, image)
    return calls, sizes


def infers(net: nn.Module, image: dict[str, Tensor]) -> Callable[[], object]:
    """Computes in torch."""
    def call() -> None:
        with torch.inference_mode():
            net(*image.values())
    return call


def runs_in_openvino(path: str, arrays: dict, threads: int) -> Callable[[], object]:
    import openvino
    model = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_NUM_THREADS': threads})
    return lambda: model(arrays)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    results = dict(device=device_name('cpu'), torch=torch.__version__, threads=args.threads, rounds=args.rounds,
                   load_average_before=os.getloadavg()[0], shape=args.shape, model_shape=args.model_shape, milliseconds={},
                   mebibytes={}, over_torch={}, revcol_over_convnext={})
    for name in args.nets:
        shape = args.shape if name.startswith('backbone') else args.model_shape
        print(f'{name}: export', flush=True)
        with tempfile.TemporaryDirectory() as folder:
            calls = {}
            for family in FAMILIES:
                torch.manual_seed(0)
                place = os.path.join(folder, family)
                os.mkdir(place)
                found, sizes = ways_of(*net_and_inputs(family, name, tuple(shape)), args.ways, place, args.threads)
                results['mebibytes'].update({f'{family} {name} {way}': size for way, size in sizes.items()})
                calls.update({f'{family} {name} {way}': call for way, call in found.items()})
            print(f'{name}: measure', flush=True)
            medians = {key: statistics.median(times) for key, times in measure(calls, args.rounds).items()}
        results['milliseconds'].update({key: round(1e3 * value, 1) for key, value in medians.items()})
        ways = list(dict.fromkeys(key.rpartition(' ')[2] for key in medians))
        for family in FAMILIES:
            results['over_torch'][f'{family} {name}'] = {
                way: round(medians[f'{family} {name} torch'] / medians[f'{family} {name} {way}'], 2)
                for way in ways if 'torch' in ways}
        results['revcol_over_convnext'][name] = {
            way: round(medians[f'ConvNeXt {name} {way}'] / medians[f'RevCol {name} {way}'], 2) for way in ways}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + '\n')  # what is measured stays if the rest is interrupted
    print(json.dumps(results, indent=2))


if __name__ == '__main__':
    main(parse_args())
