# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Code in the documentation that says it runs, and errors that it explains."""
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

from tests.common import ROOT

DOCS = ROOT / 'docs'
#: A block that is marked as runnable, and what it prints, if a block of text follows.
RUNNABLE = re.compile(r'<!-- run -->\n```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?', re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.glob('*.md')) if RUNNABLE.search(page.read_text())]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_what_is_marked_as_runnable_runs_and_prints_what_follows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, expected in RUNNABLE.findall(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), 'exec'), names)
        assert not expected or printed.getvalue() == expected


def test_explained_errors_are_those_of_this_package_or_of_one_beside_it():
    headings = re.findall(r'^### `(.*)`$', (DOCS / 'troubleshooting.md').read_text(), re.MULTILINE)
    assert len(set(headings)) == len(headings) >= 20
    beside = {'No module named': 'importlib/_bootstrap.py', 'operator torchvision::nms does not exist': None,  # Python; C++
              'CUDA out of memory': None, 'is used but incompatible': 'mmpretrain',
              'Expected more than 1': 'torch/nn/functional.py',
              'is not in the mmdet::model registry': None,  # put together from parts
              'The testing results': 'mmdet', 'do not match exactly': 'mmengine', 'Weights only load': 'torch/serialization.py'}
    own = '\n'.join(path.read_text() for path in (ROOT / 'revcol_mm').rglob('*.py'))
    for heading in headings:
        place = next((place for start, place in beside.items() if heading.startswith(start)), 'revcol_mm')
        if place == 'revcol_mm':
            assert heading in own, heading
        elif place and not heading.startswith('No module named'):
            package, _, file = place.partition('/')
            folder = Path(importlib.util.find_spec(package).origin).parent
            files = [folder / file] if file else folder.rglob('*.py')
            assert any(heading in path.read_text(errors='replace') for path in files), heading


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / 'mkdocs.yml').read_text()
    listed = set(re.findall(r'(\w+\.md)$', text[text.index('nav:'):], re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob('*.md')}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads((DOCS / 'tour.ipynb').read_text())['cells']:
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), 'tour.ipynb', 'exec'), names)
    assert names['deviation'] < 1e-3
