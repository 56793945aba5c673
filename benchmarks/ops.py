# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Times of mmcv's operators as revcol_mm.ops runs them, beside those of a compiled mmcv where one is installed.

    python benchmarks/ops.py                              # sizes of a Cascade Mask R-CNN step at 800×1344; minutes on a CPU
    python benchmarks/ops.py --shape 400 672 --batch 1    # smaller images
    python benchmarks/ops.py --only nms models            # what has these words in its name

The functions of mmcv.ops are called, once on each kind of native function. The two take turns in every round, and what counts
is the ratio of their median times. On the CPU these are processor times of all threads, which other programs disturb least;
with --threads 1 they are what an idle machine needs. mmcv's CPU has neither focal losses nor deformable attention; the latter
is compared with mmcv's own Python, which models run on the CPU in any case. The models are the demo's, with random weights, on
one image of 256×256: nearly every class of every region passes HTC's score threshold, and soft-NMS gets about 1000 boxes.
Writes JSON.
"""
import argparse
import json
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from revcol_mm import ops  # noqa: E402
from revcol_mm.ops.extension import stand_in  # noqa: E402

# isort: split
import mmcv.ops  # noqa: E402 - after revcol_mm
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch  # noqa: E402

from benchmarks.inference import device_name  # noqa: E402

STRIDES = (4, 8, 16, 32)
OURS, COMPILED = 'revcol_mm', 'mmcv'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), default=[800, 1344], help='default: 800 1344')
    parser.add_argument('--batch', type=int, default=2, help='images per step; default: 2')
    parser.add_argument('--rounds', type=int, default=5, help='measured rounds, after one that is not; default: 5')
    parser.add_argument('--only', nargs='+', metavar='WORD', help='only operators with one of these words in the name')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: a GPU if there is one')
    parser.add_argument('--threads', type=int, help="CPU threads; default: torch's")
    parser.add_argument('--out', type=Path, help='JSON. Default: benchmarks/results/ops_<cpu or cuda>.json')
    return parser.parse_args()


@contextmanager
def native(extension: ModuleType) -> Iterator[None]:
    """mmcv.ops with these native functions."""
    users = [module for name, module in sys.modules.items() if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module')]
    before = [user.ext_module for user in users]
    try:
        for user in users:
            user.ext_module = extension
        yield
    finally:
        for user, module in zip(users, before):
            user.ext_module = module


def boxes(count: int, shape: tuple[int, int], device: str) -> Tensor:
    """Boxes of 16 to 256 pixels a side, within the image."""
    size = torch.tensor(shape[::-1], device=device)
    sides = 16 * 16 ** torch.rand(count, 2, device=device)
    centres = torch.rand(count, 2, device=device) * size
    return torch.cat([(centres - sides / 2).clamp(min=0), torch.minimum(centres + sides / 2, size)], 1)


def make_operators(shape: tuple[int, int], batch: int, device: str) -> dict[str, Callable[[], object]]:
    """Calls of mmcv.ops by name: a training step with 512 regions per image, a quarter of them objects, and what tests add."""
    levels = [(-(-shape[0] // stride), -(-shape[1] // stride)) for stride in STRIDES]
    pyramid = [torch.randn(batch, 256, *level, device=device, requires_grad=True) for level in levels]
    regions = []
    for level in range(len(levels)):
        # Most regions are small, and small ones lie on the finest level.
        count = batch * 512 // 2 ** (level + 1)
        regions.append(torch.cat([torch.randint(batch, (count, 1), device=device), boxes(count, shape, device)], 1))

    def align(size: int, share: int, backward: bool) -> None:
        for features, rois, stride in zip(pyramid, regions, STRIDES):
            output = mmcv.ops.roi_align(features, rois[:len(rois) // share], (size, size), 1 / stride, 0, 'avg', True)
            if backward:
                torch.autograd.grad(output, features, torch.ones_like(output))

    proposals = boxes(8000, shape, device)
    proposal_scores, proposal_levels = torch.rand(8000, device=device), torch.arange(8000, device=device) // 2000
    found = boxes(1000, shape, device)
    found_scores, classes = torch.rand(1000, device=device), torch.randint(80, (1000, ), device=device)
    logits = torch.randn(batch * levels[1][0] * levels[1][1], 80, device=device, requires_grad=True)
    target = torch.randint(81, (len(logits), ), device=device)

    def focal() -> None:
        torch.autograd.grad(mmcv.ops.sigmoid_focal_loss(logits, target, 2., 0.25, None, 'mean'), logits)

    # DINO's encoder: every pixel of four levels, from stride 8 on, asks for 8 heads × 4 levels × 4 samples.
    shapes = torch.tensor([*levels[1:], (-(-levels[3][0] // 2), -(-levels[3][1] // 2))], device=device)
    pixels = shapes.prod(1)
    starts = torch.cat([pixels.new_zeros(1), pixels.cumsum(0)[:-1]])
    total = int(pixels.sum())
    value = torch.randn(1, total, 8, 32, device=device, requires_grad=True)
    places = torch.rand(1, total, 8, 4, 4, 2, device=device, requires_grad=True)
    weights = torch.rand(1, total, 8, 4, 4, device=device, requires_grad=True)

    def attention(backward: bool) -> None:
        if sys.modules['mmcv.ops.multi_scale_deform_attn'].ext_module is stand_in() or device != 'cpu':
            output = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)
        else:
            output = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
        if backward:
            torch.autograd.grad(output, (value, places, weights), torch.ones_like(output))

    stage = torch.randn(batch, 128, *levels[2], device=device, requires_grad=True)
    kernel = torch.randn(128, 128, 3, 3, device=device, requires_grad=True)
    offset = torch.randn(batch, 18, *levels[2], device=device, requires_grad=True)
    mask = torch.rand(batch, 9, *levels[2], device=device, requires_grad=True)

    def convolve(modulated: bool) -> None:
        if modulated:
            output = mmcv.ops.modulated_deform_conv2d(stage, offset, mask, kernel, None, 1, 1)
        else:
            output = mmcv.ops.deform_conv2d(stage, offset, kernel, 1, 1)
        torch.autograd.grad(output, (stage, offset, kernel), torch.ones_like(output))

    demo = [ROOT / 'configs' / 'demo' / f'{name}_revcol_nano_digits.py' for name in ('cascade_rcnn', 'htc', 'dino')]
    return {
        'RoIAlign of boxes, 7×7, forward': lambda: align(7, 1, False),
        'RoIAlign of boxes, 7×7, forward and backward': lambda: align(7, 1, True),
        'RoIAlign of masks, 14×14, forward': lambda: align(14, 4, False),
        'RoIAlign of masks, 14×14, forward and backward': lambda: align(14, 4, True),
        'nms of the RPN, 8000 boxes of an image on four levels': lambda: mmcv.ops.batched_nms(
            proposals, proposal_scores, proposal_levels, dict(type='nms', iou_threshold=0.7)),
        'nms of detections, 1000 boxes of 80 classes': lambda: mmcv.ops.batched_nms(
            found, found_scores, classes, dict(type='nms', iou_threshold=0.5)),
        'soft-nms of 1000 boxes, linear': lambda: mmcv.ops.soft_nms(found, found_scores),
        'soft-nms of 1000 boxes, Gaussian': lambda: mmcv.ops.soft_nms(found, found_scores, method='gaussian'),
        'nms_match of 1000 boxes': lambda: mmcv.ops.nms_match(torch.cat([found, found_scores[:, None]], 1), 0.5),
        'overlaps of 2000 and 100 boxes': lambda: mmcv.ops.bbox_overlaps(proposals[:2000], found[:100]),
        'sigmoid focal loss, stride 8, 80 classes, forward and backward': focal,
        f'attention of one encoder layer of DINO, {total} queries, forward': lambda: attention(False),
        f'attention of one encoder layer of DINO, {total} queries, forward and backward': lambda: attention(True),
        'deformable convolution, 128 channels, stride 16, forward and backward': lambda: convolve(False),
        'modulated deformable convolution, the same': lambda: convolve(True),
        **{f'models: inference of {path.stem}': predictor(path, device) for path in demo},
    }


def predictor(config: Path, device: str) -> Callable[[], object]:
    """A call that lets the config's model predict; it is built at the first one."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    models = []

    def call() -> None:
        if not models:
            cfg = Config.fromfile(config)
            init_default_scope('mmdet')
            torch.manual_seed(0)
            models.append(MODELS.build(cfg.model).to(device).eval())
        sample = DetDataSample(metainfo=dict(img_shape=(256, 256), ori_shape=(256, 256), batch_input_shape=(256, 256),
                                             scale_factor=(1., 1.)))
        images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.inference_mode():
            models[0].predict(images, [sample])
    return call


def measure(call: Callable[[], object], extensions: dict[str, ModuleType], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds on each kind of native function, which take turns."""
    clock = time.process_time if device == 'cpu' else time.perf_counter
    seconds = {name: [] for name in extensions}
    for index in range(rounds + 1):
        for name in (list(extensions) if index % 2 else reversed(extensions)):
            torch.manual_seed(0)
            with native(extensions[name]):
                start = clock()
                call()
                if device != 'cpu':
                    torch.cuda.synchronize()
            if index:
                seconds[name].append(clock() - start)
    return {name: round(1e3 * statistics.median(times), 2) for name, times in seconds.items()}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    extensions = {OURS: stand_in()}
    if ops.backend() == 'mmcv':
        extensions[COMPILED] = sys.modules['mmcv._ext']
    load, results = os.getloadavg()[0], {}
    for name, call in make_operators(tuple(args.shape), args.batch, args.device).items():
        if args.only and not any(word in name for word in args.only):
            continue
        lacking = args.device == 'cpu' and 'focal loss' in name
        times = measure(call, {OURS: extensions[OURS]} if lacking else extensions, args.rounds, args.device)
        results[name] = dict(milliseconds=times)
        if COMPILED in times:
            results[name]['ratio'] = round(times[OURS] / times[COMPILED], 2)
        print(f'{name}: {json.dumps(results[name])}', flush=True)
    report = dict(device=device_name(args.device), torch=torch.__version__, threads=torch.get_num_threads(),
                  load_average_before=load, batch=args.batch, shape=args.shape, rounds=args.rounds,
                  compared_with='compiled mmcv' if COMPILED in extensions else None, operators=results)
    out = args.out or ROOT / 'benchmarks' / 'results' / f'ops_{torch.device(args.device).type}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(parse_args())
