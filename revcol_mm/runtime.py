# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Runs the ONNX files of tools/export_onnx.py without PyTorch: numpy, onnxruntime, and OpenCV or Pillow are enough.

This file uses nothing else of revcol_mm and may be copied. ``import revcol_mm.runtime`` would import PyTorch with the package;
copy the file, or run it by its path::

    python runtime.py model.onnx photo.jpg more.png --out predictions

    model = Model('model.onnx')                    # provider='cuda' for a GPU
    result = model.predict('photo.jpg')            # or an array, (H, W, 3) RGB uint8
    result['boxes'], result['scores'], [model.classes[label] for label in result['labels']]
"""
import argparse
import glob
import io
import json
import os
import sys
import tempfile
import warnings
from typing import Any, Sequence

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None
try:
    from PIL import Image, ImageDraw, ImageOps
except ImportError:
    Image = None

#: Names of onnxruntime's execution providers.
PROVIDERS = dict(cpu='CPUExecutionProvider', cuda='CUDAExecutionProvider', openvino='OpenVINOExecutionProvider')
#: Steps that prepare an image, as the file's metadata names them.
STEPS = ('Resize', 'ResizeEdge', 'CenterCrop')
#: Names of image files end with one of these.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
TOP = 5  # classes that a classifier's JSON names per image


class Model:
    """A detector, a segmentor or a classifier in an ONNX file.

    Args:
        path (str): a file that ``tools/export_onnx.py`` has written.
        provider (str): 'cpu', 'cuda' or 'openvino', as far as the installed onnxruntime has it. Default: 'cpu'.
        threads (int | None): CPU threads. Default: None, onnxruntime's choice.

    Attributes:
        task (str): 'detection', 'segmentation' or 'classification'.
        classes (list[str] | None): names of the labels, if the file has them.
        palette (list[list[int]] | None): RGB of the classes, if the file has it.

    Raises:
        ImportError: if onnxruntime, or both OpenCV and Pillow, are missing.
        ValueError: if the file is not one of a whole model, or the provider is not available.
    """

    def __init__(self, path: str, provider: str = 'cpu', threads: int | None = None) -> None:
        import onnxruntime
        if cv2 is None and Image is None:
            raise ImportError('reading images needs OpenCV or Pillow: pip install opencv-python')
        available = onnxruntime.get_available_providers()
        if PROVIDERS.get(provider) not in available:
            names = [name for name, value in PROVIDERS.items() if value in available]
            raise ValueError(f'provider must be one of {", ".join(names)}, which the installed onnxruntime has, but got '
                             f'{provider!r}')
        if not os.path.isfile(path):
            raise FileNotFoundError(f'there is no file {path} (looked from {os.getcwd()})')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            reason = str(error).splitlines()[0]
            raise ValueError(f'{path} must be an ONNX file that onnxruntime can run, but is not: {reason}') from error
        if PROVIDERS[provider] not in self.session.get_providers():  # onnxruntime goes on with the CPU
            raise ValueError(f'provider {provider!r} cannot be used, because onnxruntime could not start '
                             f'{PROVIDERS[provider]}: install the CUDA and cuDNN, or the OpenVINO, that it needs, or use cpu')
        entries = self.session.get_modelmeta().custom_metadata_map
        if 'task' not in entries:
            raise ValueError(f'{path} must be a whole model that tools/export_onnx.py has written, but its metadata has no '
                             'task: export it again, without --part backbone')
        if 'pipeline' not in entries:
            raise ValueError(f'{path} must say how images are prepared, but its metadata has no pipeline: export it with '
                             'tools/export_onnx.py, or with export_model(…, metadata=describe(cfg, meta))')
        self.metadata = {key: _read(value) for key, value in entries.items()}
        self.task, self.pipeline = self.metadata['task'], self.metadata['pipeline']
        self.classes, self.palette = self.metadata.get('classes'), self.metadata.get('palette')
        unknown = [step['type'] for step in self.pipeline if step['type'] not in STEPS]
        if unknown:
            raise ValueError(f'the images of {path} are prepared by {unknown[0]}, which this version does not know: update '
                             'revcol_mm')
        self._inputs = {entry.name for entry in self.session.get_inputs()}
        self._outputs = [entry.name for entry in self.session.get_outputs()]

    def predict(self, image: str | np.ndarray) -> dict[str, np.ndarray]:
        """Predicts on one image.

        Args:
            image (str | np.ndarray): a file, or pixels, (H, W, 3) RGB uint8.

        Returns:
            dict[str, np.ndarray]: of a detector ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the image, ``scores`` (n, ),
            ``labels`` (n, ), and ``masks`` (n, H, W) bool if the model has them; of a segmentor ``labels`` (H, W); of a
            classifier ``scores`` (classes, ).

        Raises:
            ValueError: if the image cannot be read, or has another shape or dtype.
        """
        pixels = read_image(image) if isinstance(image, (str, os.PathLike)) else image
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            shape = f'{pixels.dtype} {pixels.shape}' if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ValueError(f'an image must be an array (H, W, 3) of uint8, RGB, but got {shape}')
        size, inputs = pixels.shape[:2], self.inputs(pixels)
        if self.metadata.get('mode') == 'slide':
            return dict(labels=self._labels(_resize_maps(self._mean(inputs), size, self.metadata['align_corners'])))
        found = self._run(inputs[0][1])
        batched = self.task != 'detection' or found['boxes'].ndim == 3
        return {name: value[0] if batched else value for name, value in found.items()}

    def inputs(self, pixels: np.ndarray) -> list[tuple[tuple[slice, slice], dict[str, np.ndarray]]]:
        """What the file gets for an image.

        Args:
            pixels (np.ndarray): the image, (H, W, 3) RGB uint8.

        Returns:
            list: of each window, its rows and columns in the resized image, and the inputs by name. Unless the model slides,
            there is one window, the whole image.
        """
        prepared = self.prepare(pixels).transpose(2, 0, 1)[None]
        sides = prepared.shape[-2:]
        if self.metadata.get('mode') == 'slide':
            rows, columns = (_windows(*side) for side in zip(sides, self.metadata['crop_size'], self.metadata['stride']))
        else:
            rows, columns = ([slice(0, side)] for side in sides)
        size = np.array(pixels.shape[:2], np.int64)
        windows = [(row, column) for row in rows for column in columns]
        inputs = [dict(images=np.ascontiguousarray(prepared[..., row, column]), size=size) for row, column in windows]
        return [(place, {name: values[name] for name in self._inputs}) for place, values in zip(windows, inputs)]

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Resizes and crops an image, (H, W, 3), as the test of the config does."""
        for step in self.pipeline:
            height, width = pixels.shape[:2]
            if step['type'] == 'CenterCrop':
                crop = min(step['crop_size'][0], width), min(step['crop_size'][1], height)
                left, top = (max(0, round((side - part) / 2)) for side, part in zip((width, height), crop))
                pixels = pixels[top:top + crop[1], left:left + crop[0]]
                continue
            pixels = _resize(pixels, _target(step, width, height), step['interpolation'], step['backend'])
        return pixels

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self.session.run(None, inputs)))

    def _mean(self, inputs: list[tuple[tuple[slice, slice], dict[str, np.ndarray]]]) -> np.ndarray:
        """Logits of a whole image, (C, H, W), as the mean of those of windows that overlap."""
        sides = [max(place.stop for place in places) for places in zip(*(place for place, _ in inputs))]
        total, count = None, np.zeros(sides, np.float32)
        for place, values in inputs:
            logits, = self._run(values)['logits']
            if total is None:
                total = np.zeros((len(logits), *sides), np.float32)
            total[:, *place] += logits
            count[place] += 1
        return total / count

    def _labels(self, logits: np.ndarray) -> np.ndarray:
        if len(logits) > 1:
            return logits.argmax(0)
        return (1 / (1 + np.exp(-logits[0])) > self.metadata['threshold']).astype(np.int64)


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


# Images ----------------------------------------------------------------------------------------------------------------------

def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads an image, turned as its EXIF entry says: (H, W, 3) RGB uint8.

    Raises:
        ValueError: if it cannot be read.
    """
    if not os.path.isfile(path):
        raise ValueError(f'there is no image {path} (looked from {os.getcwd()})')
    if Image is not None:  # which notices an image that is cut off
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # an image of one's own may be large
        try:
            with Image.open(path) as file:
                file.load()
                if cv2 is None:
                    return _colors_of(ImageOps.exif_transpose(file), file.format == 'PNG')
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f'{path} cannot be read as an image ({error}): copy it again') from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError(f'OpenCV cannot read {path} as an image: save it as JPEG or PNG')
    return np.ascontiguousarray(pixels[..., ::-1])


def _colors_of(image: 'Image.Image', png: bool) -> np.ndarray:
    """Pillow's image as (H, W, 3) RGB uint8. Of 16 bits the upper 8 are kept, as OpenCV does; Pillow would cut off at 255."""
    if image.mode.startswith('I;16') or png and image.mode == 'I':  # as earlier versions of Pillow have it
        return np.repeat((np.array(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ('I', 'F'):
        raise ValueError('its pixels have 32 bits, which have no agreed range: save it with 8 or 16 bits')
    return np.array(image.convert('RGB'))


def _target(step: dict, width: int, height: int) -> tuple[int, int]:
    """Width and height to which a step resizes."""
    if step['type'] == 'ResizeEdge':
        narrow = dict(short=width < height, long=width > height, width=True, height=False)[step['edge']]
        scale = step['scale']
        return (scale, int(scale * height / width)) if narrow else (int(scale * width / height), scale)
    if not step['keep_ratio']:
        return tuple(step['scale'])
    factor = min(max(step['scale']) / max(height, width), min(step['scale']) / min(height, width))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str, backend: str) -> np.ndarray:
    if backend == 'cv2' and cv2 is None or backend == 'pillow' and Image is None:
        backend, missing = ('pillow', 'opencv-python') if backend == 'cv2' else ('cv2', 'Pillow')
        warnings.warn(f'images are resized by another library than in the test of the model, which changes predictions '
                      f'slightly: pip install {missing}', stacklevel=3)
    if backend == 'pillow':
        return np.array(Image.fromarray(pixels).resize(size, getattr(Image.Resampling, interpolation.upper())))
    names = dict(nearest='NEAREST', bilinear='LINEAR', bicubic='CUBIC', area='AREA', lanczos='LANCZOS4')
    return cv2.resize(pixels, size, interpolation=getattr(cv2, f'INTER_{names[interpolation]}'))


def _windows(length: int, window: int, stride: int) -> list[slice]:
    """The windows along one side; the last ones are moved back inside."""
    count = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(index * stride + window, length) for index in range(count)]
    return [slice(max(end - window, 0), end) for end in ends]


def _resize_maps(maps: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Bilinear interpolation of (C, H, W) to another height and width, as PyTorch does it."""
    for axis, length in ((1, size[0]), (2, size[1])):
        old, places = maps.shape[axis], np.arange(length, dtype=np.float32)
        if align_corners:
            places *= np.float32((old - 1) / max(length - 1, 1))
        else:
            places = np.clip((places + np.float32(0.5)) * np.float32(old / length) - np.float32(0.5), 0, None)
        first = np.minimum(places.astype(np.int64), old - 1)
        weight = (places - first).astype(np.float32).reshape([-1 if dim == axis else 1 for dim in range(3)])
        low, high = maps.take(first, axis), maps.take(np.minimum(first + 1, old - 1), axis)
        maps = low + (high - low) * weight
    return maps


# Results ---------------------------------------------------------------------------------------------------------------------

def coco_results(model: Model, result: dict[str, np.ndarray]) -> list[dict]:
    """What :meth:`Model.predict` found, as COCO's results without ``image_id``; ``category_id`` is the label, from 0."""
    if model.task == 'classification':
        order = np.argsort(-result['scores'], kind='stable')[:TOP]
        return [dict(category_id=int(label), score=float(result['scores'][label])) for label in order]
    if model.task == 'segmentation':
        found = []
        for label in np.unique(result['labels']).tolist():
            mask = result['labels'] == label
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            found.append(dict(category_id=label, segmentation=encode_mask(mask), area=int(mask.sum()),
                              bbox=[float(side) for side in box], score=1.0))
        return found
    boxes = result['boxes'].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    found = [dict(category_id=int(label), bbox=box, score=float(score))
             for label, box, score in zip(result['labels'], boxes.tolist(), result['scores'])]
    for entry, mask in zip(found, result.get('masks', ())):
        entry['segmentation'] = encode_mask(mask)
    return found


def encode_mask(mask: np.ndarray) -> dict:
    """A mask (H, W) in COCO's compressed run-length encoding."""
    flat = np.concatenate([[0], mask.astype(np.int8).flatten('F'), [0]])
    edges = np.flatnonzero(np.diff(flat))  # where runs begin, of ones and of zeros in turn
    runs = np.diff([0, *edges.tolist(), mask.size]).tolist()
    if len(runs) > 1 and runs[-1] == 0:
        runs.pop()
    text = bytearray()
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        while True:  # groups of five bits, the lowest first; the sixth bit says that more follow
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text.append((group | more << 5) + 48)
            if not more:
                break
    return dict(size=list(mask.shape), counts=text.decode())


def draw(model: Model, pixels: np.ndarray, result: dict[str, np.ndarray], score_thr: float = 0.3) -> np.ndarray:
    """A picture of the predictions.

    Args:
        model (Model): the model.
        pixels (np.ndarray): the image, (H, W, 3) RGB uint8.
        result (dict): from :meth:`Model.predict`.
        score_thr (float): lowest score of a detection that is drawn. Default: 0.3.

    Returns:
        np.ndarray: (H, W, 3) RGB uint8.

    Raises:
        ImportError: if Pillow is missing.
    """
    if Image is None:
        raise ImportError('drawing needs Pillow: pip install Pillow')
    colors = _colors(model, 1 + int(result['labels'].max(initial=0)) if 'labels' in result else 0)
    if model.task == 'segmentation':
        return _blend(pixels, np.ones(pixels.shape[:2], bool), colors[result['labels']])
    picture, texts = pixels, []
    if model.task == 'classification':
        texts = [((2, 2), f'{_name(model, entry["category_id"])}: {entry["score"]:.2f}', (255, 255, 255))
                 for entry in coco_results(model, result)[:1]]
    kept = np.flatnonzero(result['scores'] >= score_thr) if model.task == 'detection' else ()
    for index in kept:
        if 'masks' in result:
            picture = _blend(picture, result['masks'][index], colors[result['labels'][index]])
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    for index in kept:
        box, color = result['boxes'][index].tolist(), tuple(colors[result['labels'][index]].tolist())
        pen.rectangle([*box[:2], max(box[2], box[0]), max(box[3], box[1])], outline=color, width=2)
        texts.append((tuple(box[:2]), f'{_name(model, result["labels"][index])}: {result["scores"][index]:.2f}', color))
    for place, text, color in texts:
        pen.rectangle(pen.textbbox(place, text), fill=(0, 0, 0))
        pen.text(place, text, fill=color)
    return np.array(image)


def _blend(pixels: np.ndarray, mask: np.ndarray, color: np.ndarray) -> np.ndarray:
    mixed = (pixels.astype(np.uint16) + color) // 2
    return np.where(mask[..., None], mixed, pixels).astype(np.uint8)


def _colors(model: Model, count: int) -> np.ndarray:
    palette = np.array(model.palette or [], np.uint8).reshape(-1, 3)
    more = np.random.default_rng(0).integers(64, 256, (max(count, len(model.classes or ())), 3)).astype(np.uint8)
    return np.concatenate([palette, more[len(palette):]])


def _name(model: Model, label: int) -> str:
    return model.classes[label] if model.classes else str(label)


# Command line ----------------------------------------------------------------------------------------------------------------

def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Predicts on images with an ONNX file, without PyTorch')
    parser.add_argument('model', help='file.onnx of tools/export_onnx.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders (with all images below), or quoted globs')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for images.json, predictions.json, pictures (vis/) '
                        'and, in segmentation, label maps (maps/)')
    parser.add_argument('--score-thr', type=float, default=0.3, help="lowest score in a detector's pictures; "
                        'the JSON holds all scores. Default: 0.3')
    parser.add_argument('--no-pictures', action='store_true', help='write no pictures')
    parser.add_argument('--provider', choices=PROVIDERS, default='cpu', help='where onnxruntime computes. Default: cpu')
    parser.add_argument('--threads', type=int, help="CPU threads; default: onnxruntime's")
    parser.add_argument('--force', action='store_true', help='replace the files of an earlier run')
    return parser.parse_args(argv)


def find_images(patterns: Sequence[str], out: str | None = None) -> list[str]:
    """All images that the patterns name, in order, without repetition.

    Pictures and label maps of an earlier run in the folder ``out`` are no images, unless they are named one by one.

    Raises:
        ValueError: for a pattern that names no image.
    """
    earlier = earlier_outputs(out)
    found: dict[str, str] = {}
    for pattern in map(os.path.expanduser, patterns):
        places = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths = []
        for place in places:
            inside = sorted(glob.glob(os.path.join(glob.escape(place), '**', '*'), recursive=True))
            images = [path for path in inside if path.lower().endswith(EXTENSIONS) and os.path.isfile(path)]
            paths += images if os.path.isdir(place) else [place]
        if paths != [pattern]:
            paths = [path for path in paths if not os.path.realpath(path).startswith(earlier)]
        if not paths:
            raise ValueError(f'there is no image {pattern} (looked from {os.getcwd()})')
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def earlier_outputs(out: str | None) -> tuple[str, ...]:
    """Beginnings of the real paths of the pictures and label maps that an earlier run has written into the folder ``out``."""
    if not out or not os.path.isfile(os.path.join(out, 'images.json')):
        return ()
    return tuple(os.path.realpath(os.path.join(out, name)) + os.sep for name in ('vis', 'maps'))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes ``images.json``, ``predictions.json``, pictures and label maps.

    Returns:
        int: 0 when all images were predicted, 3 when some were left out, 1 when none was predicted.
    """
    args = parse_args(argv)
    try:
        paths = find_images(args.images, args.out)
        files = {name: os.path.join(args.out, f'{name}.json') for name in ('images', 'predictions')}
        outputs, inputs = _outputs_of(paths, args.out), {os.path.realpath(path) for path in paths}
        for places in outputs.values():
            for path in places:
                if os.path.realpath(path) in inputs:
                    raise ValueError(f'the output {path} is one of the images, which are never changed: choose another folder')
        if Image is None and not args.no_pictures:
            raise ImportError('drawing needs Pillow: pip install Pillow, or add --no-pictures')
        model = Model(args.model, args.provider, args.threads)
        pictures = [] if args.no_pictures else outputs['vis']
        for path in [*files.values(), *pictures, *(outputs['maps'] if model.task == 'segmentation' else [])]:
            if os.path.exists(path) and not args.force:
                raise ValueError(f'the output {path} exists already: choose another folder, or replace it with --force')
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # an error before the run if nothing can be written there
        images, predictions, left_out = _predict_all(model, paths, outputs, args)
        for name, content in dict(images=dict(images=images, annotations=[], categories=_categories(model, predictions)),
                                  predictions=predictions).items():
            _write(files[name], json.dumps(content).encode())
    except (ImportError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{len(images)} of {len(paths)} images, {len(predictions)} results: {args.out}')
    return (3 if images else 1) if left_out else 0


def _predict_all(model: Model, paths: Sequence[str], outputs: dict[str, list[str]], args: argparse.Namespace
                 ) -> tuple[list[dict], list[dict], int]:
    images, predictions, left_out = [], [], 0
    for number, path in enumerate(paths, 1):
        if sys.stderr.isatty():
            print(f'\rimage {number} of {len(paths)}', end='\n' * (number == len(paths)), file=sys.stderr, flush=True)
        try:
            pixels = read_image(path)
            result, files = model.predict(pixels), {}
            if not args.no_pictures:
                files['vis'] = encode_picture(draw(model, pixels, result, args.score_thr))
            if model.task == 'segmentation':
                files['maps'] = encode_map(result['labels'])
            entries = [dict(entry, image_id=number) for entry in coco_results(model, result)]
        except Exception as error:  # of this image, or of memory; onnxruntime's have no base class of their own
            print(f'left out: {path}: {(str(error).strip() or type(error).__name__).splitlines()[0]}', file=sys.stderr)
            left_out += 1
            continue
        images.append(dict(id=number, file_name=path, width=pixels.shape[1], height=pixels.shape[0]))
        predictions += entries
        for folder, content in files.items():
            _write(outputs[folder][number - 1], content)
    return images, predictions, left_out


def _categories(model: Model, predictions: Sequence[dict]) -> list[dict]:
    count = 1 + max((entry['category_id'] for entry in predictions), default=-1)
    return [dict(id=label, name=name) for label, name in enumerate(model.classes or map(str, range(count)))]


def _outputs_of(paths: Sequence[str], out: str) -> dict[str, list[str]]:
    """Where the picture and the label map of each image go."""
    names = _output_names(paths)
    return {folder: [os.path.join(out, folder, name + extension) for name in names]
            for folder, extension in (('vis', '.jpg'), ('maps', '.png'))}


def _output_names(paths: Sequence[str]) -> list[str]:
    """A different name for the outputs of each image, as short as possible."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    for names in ([os.path.basename(path) for path in absolute], [os.path.relpath(path, root) for path in absolute]):
        short = [os.path.splitext(name)[0] for name in names]
        for choice in (short, names):
            if len(set(choice)) == len(choice):
                return choice
    return names


def encode_picture(pixels: np.ndarray) -> bytes:
    """The bytes of a JPEG file of a picture, (H, W, 3) RGB uint8.

    Raises:
        ValueError: if the picture is too large for the format, which ends at 65,500 pixels.
    """
    return _encode(pixels, 'JPEG', quality=95)


def encode_map(labels: np.ndarray) -> bytes:
    """The bytes of a PNG file of a label map, (H, W) integers, with 8 bits, or 16 if labels above 255 need them."""
    return _encode(labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16), 'PNG')


def _encode(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    size = f'{pixels.shape[1]}×{pixels.shape[0]}'
    if Image is None:  # label maps alone, because drawing needs Pillow
        done, encoded = cv2.imencode(f'.{kind.lower()}', pixels)
        if not done:
            raise ValueError(f'an image of {size} cannot be written as {kind}')
        return encoded.tobytes()
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, format=kind, **options)
    except OSError as error:
        raise ValueError(f'its picture of {size} cannot be written as {kind} ({error}): add --no-pictures') from None
    return buffer.getvalue()


def _write(path: str, content: bytes) -> None:
    """Writes a file under another name first, so that no half of it appears."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=folder, prefix=f'.{os.path.basename(path)}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == '__main__':
    sys.exit(main())
