# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""docs/paper.md names a config or a command for every table and figure, and its figures are counted."""
import itertools
import re
import shlex

import pytest
from mmengine.config import Config, DictAction

from revcol_mm.utils import flops
from tests.common import CONFIGS, ROOT, count_config, load_config, mostly_slow

PAGE = (ROOT / 'docs/paper.md').read_text()
ROWS = {cells[0]: cells for line in PAGE.splitlines() if re.match(r'\| (table|figure) \d', line)
        for cells in [[cell.strip() for cell in line.strip('|').split('|')]]}
COMMANDS = [shlex.split(line) for block in re.findall(r'^```bash\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
            for line in block.replace('\\\n', ' ').splitlines()]


def expand(text: str) -> list[str]:
    """Bash's braces: a_{b,c} is a_b, a_c."""
    parts = [part.split(',') for part in re.split(r'[{}]', text)]
    parts[::2] = [[','.join(part)] for part in parts[::2]]
    return [''.join(choice) for choice in itertools.product(*parts)]


def chosen() -> list[list[str]]:
    """The rows of the two tables of widths and depths."""
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in PAGE.splitlines()
            if re.match(r'\| `\w+_in1k`', line)]


def test_every_table_and_figure_has_a_row():
    named = {name.partition(':')[0] for name in ROWS}
    assert named == {*(f'table {number}' for number in range(1, 11)), *(f'figure {number}' for number in (3, 4, 6, 8, 9))}
    assert all(len(cells) == 4 and all(cells) for cells in ROWS.values())


def test_the_configs_that_it_names_are_there():
    named = [name for cells in ROWS.values() for text in re.findall(r'`([^`]+)`', cells[1])
             if not text.startswith(('python', 'tools')) and text.islower() for name in expand(text)]
    assert len(named) > 50
    assert not [name for name in named if not (CONFIGS / f'{name}.py').is_file()]


def test_its_links_lead_to_headings():
    def anchors(text):
        titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
        return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}

    links = re.findall(r'\]\(([\w.]*)#?([\w-]*)\)', PAGE)
    assert len(links) > 10
    for page, anchor in links:
        text = (ROOT / 'docs' / page).read_text() if page else PAGE
        assert not anchor or anchor in anchors(text), (page, anchor)


@pytest.mark.parametrize('row', mostly_slow(chosen(), [row for row in chosen() if 'revcol_t_in1k' in row[0]]),
                         ids=lambda row: row[0].split('`')[1])
def test_widths_depths_and_counts_are_the_configs(row):
    name = row[0].split('`')[1]
    cost, backbone = count_config(name), flops.build_on_meta(load_config(name)).backbone
    counted = f'{cost["backbone"].params / 1e6:.1f}M / {cost["total"].macs / 1e9:.2f}G'
    depths = ' '.join(map(str, backbone.depths))
    assert row[1] == str(backbone.num_columns)
    if 'vit' in row[0]:
        assert row[2:] == [depths, counted]
    else:
        assert row[2:4] == [' '.join(map(str, backbone.channels)), depths] and row[5] == counted


def test_the_rule_chooses_the_configs_of_table_5():
    """All networks of the rule, counted by a formula that RevCol-T's own count confirms."""
    def count(c, depths, columns):
        width, pixels = [c, 2 * c, 4 * c, 8 * c], [56**2, 28**2, 14**2, 7**2]
        params, macs = 48 * c + 3 * c, 48 * c * pixels[0]  # the stem
        for level, (w, number) in enumerate(zip(width, pixels)):
            params += columns * (depths[level] * (8 * w * w + 18 * w) + w)  # blocks: 3×3, norm, two Linear, LayerScale; and γ
            macs += columns * depths[level] * (8 * w * w + 9 * w) * number
            if level:  # the path down, and the path up from this level in all columns but the first
                params += columns * (2 * w * w + 3 * w) + (columns - 1) * (w * w // 2 + 3 * w // 2)
                macs += columns * 2 * w * w * number + (columns - 1) * w * w // 2 * number
        return params, macs + 8 * c * 1000

    t = count_config('revcol_t_in1k')
    assert count(64, (2, 2, 4, 2), 4) == (t['backbone'].params, t['total'].macs)
    table = {row[0].split('`')[1]: row for row in chosen() if '4g5' in row[0]}
    for columns, printed in {1: (28e6, 4.4e9), 8: (34e6, 4.7e9), 12: (33e6, 4.4e9), 20: (35e6, 4.2e9)}.items():
        found = []
        for c, *depths in itertools.product(range(16, 161, 8), *[range(1, 7)] * 4):
            counted = count(c, depths, columns)
            error = max(abs(value / target - 1) for value, target in zip(counted, printed))
            if max(error, abs((counted[0] + 8 * c * 1001) / printed[0] - 1)) <= 0.03:  # with one classifier, too
                found.append((sum(abs(a - b) for a, b in zip(depths, (2, 2, 4, 2))), error, c, depths))
        _, _, c, depths = min(found)
        row = table[f'revcol_4g5_col{columns}_in1k']
        assert row[2].startswith(f'{c} ') and row[3] == ' '.join(map(str, depths))


@pytest.mark.slow
def test_the_single_columns_of_figure_3_have_the_size_of_revcol_s():
    small = count_config('revcol_s_in1k')
    commands = [words for words in COMMANDS if 'configs/revcol_4g5_col1_in1k.py' in words]
    assert len(commands) == 2
    for words in commands:
        cfg = Config.fromfile(ROOT / words[2])
        options = [word.split('=') for word in words[words.index('--cfg-options') + 1:]]
        cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in options})
        cost = flops.count(cfg)
        assert cost['backbone'].params == pytest.approx(small['backbone'].params, rel=0.02)
        assert cost['total'].macs == pytest.approx(small['total'].macs, rel=0.02)
