# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Removes the training state from a checkpoint, puts a hash into its name, and writes a description beside it.

    python tools/publish_checkpoint.py work_dirs/run/epoch_36.pth --out cascade_rcnn_revcol_t.pth
"""
import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.errors import plain_errors  # noqa: E402
from revcol_mm.checkpoint.zoo import find_address  # noqa: E402
from revcol_mm.converters import publish_checkpoint  # noqa: E402


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Publish a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file, URL or zoo:CONFIG_NAME')
    parser.add_argument('--out', help='output without the hash, .pth or .safetensors, or a folder. Default: the name of the '
                        'checkpoint')
    parser.add_argument('--force', action='store_true', help='replace outputs that exist')
    args = parser.parse_args(argv)
    args.checkpoint = find_address(args.checkpoint)
    path, sidecar, description = publish_checkpoint(args.checkpoint, args.out, args.force)
    print(json.dumps(description, indent=2, default=str))
    print(f'written: {path}, {sidecar}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
