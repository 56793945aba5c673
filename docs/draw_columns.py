# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Draws docs/images/columns.png, the levels of three columns and what they read, and docs/images/training_ways.png,
what each way to train keeps."""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

IMAGES = Path(__file__).parent / 'images'
BLUE, ORANGE, GREY = '#0072B2', '#D55E00', '#999999'  # told apart with every kind of colour vision, and in print


def box(axes, x, y, text, width=1.0, height=0.6, **style):
    style = dict(dict(facecolor='white', edgecolor='black'), **style)
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle='round,pad=0.04', **style))
    axes.text(x, y, text, ha='center', va='center', fontsize=9)


def arrow(axes, start, end, color='black', style='-', bend=0.0):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=11, color=color, linestyle=style,
                                   connectionstyle=f'arc3,rad={bend}', shrinkA=0, shrinkB=0, linewidth=1.3))


def draw_columns(path):
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    columns, levels, step = 3, 4, 2.4
    box(axes, step, -1.3, "stem's output $x$", width=2 * step + 1, facecolor='#eeeeee')
    for column in range(columns):
        x = column * step
        axes.text(x, levels + 0.1, f'column {column + 1}', ha='center', fontsize=10)
        for level in range(levels):
            name = 'y' if column == 1 else 'p' if column == 0 else 'z'
            box(axes, x, level, f'${name}_{level}$' + (f' = $F_{level}$(…) + $γ_{level} p_{level}$' if column == 1 else ''),
                width=1.0 if column != 1 else 1.7)
            arrow(axes, (x, level - 1 + (0.34 if level else 0.04)), (x, level - 0.34))
            if column:
                left, right = (x - step + (0.54 if column == 1 else 0.89), x - (0.89 if column == 1 else 0.54))
                arrow(axes, (left, level), (right, level), BLUE, '--')
                if level < levels - 1:
                    arrow(axes, (left, level + 0.9), (right, level + 0.12), ORANGE)
    for color, style, text, place in (('black', '-', 'the level below in the same column', 0),
                                      (ORANGE, '-', 'the level above in the column before', 1),
                                      (BLUE, '--', 'the same level in the column before, times $γ$: the shortcut', 2)):
        y = -2.1 - 0.4 * place
        axes.plot([-0.6, 0], [y, y], color=color, linestyle=style, linewidth=1.5)
        axes.text(0.15, y, text, va='center', fontsize=9)
    axes.text(step, -3.45, '$y_l = F_l(y_{l-1},\\ p_{l+1}) + γ_l\\, p_l$        and back:        '
              '$p_l = (y_l - F_l(y_{l-1},\\ p_{l+1}))\\ /\\ γ_l$', ha='center', fontsize=12)
    axes.set(xlim=(-1.2, 2 * step + 1.2), ylim=(-3.8, levels + 0.4))
    axes.axis('off')
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_training_ways(path):
    figure, axes = plt.subplots(figsize=(8, 4.4), layout='constrained')
    columns = 8
    ways = [('plain', 0, 'Every column keeps the activations of all its blocks:\nmemory grows with the columns.'),
            ('with_cp=True', columns, 'Every column keeps its features, and is computed again\nin the backward pass.'),
            ('reversible=True', columns, 'Only the last features are kept. The backward pass\nrebuilds each column from the '
             'one after it.'),
            ('stored_columns=2', columns - 2, 'The last two columns keep theirs, and are freed first.\nLess is rebuilt; memory '
             'still does not grow.')]
    for row, (name, again, text) in enumerate(ways):
        y = -1.5 * row
        axes.text(-0.8, y, name, ha='right', va='center', fontsize=10, family='monospace')
        for column in range(columns):
            full = column >= again
            box(axes, column * 0.75, y, '', width=0.45, height=0.8, facecolor=BLUE if full else 'white',
                edgecolor=BLUE if full else GREY, linestyle='-' if full else '--')
            if name == 'with_cp=True':
                box(axes, column * 0.75 + 0.375, y, '', width=0.04, height=0.8, facecolor=ORANGE, edgecolor=ORANGE)
        box(axes, columns * 0.75 - 0.27, y, '', width=0.04, height=0.8, facecolor=ORANGE, edgecolor=ORANGE)
        axes.text(columns * 0.75 + 0.1, y, text, va='center', fontsize=9)
    y = -5.6
    for x, style, text in ((0, dict(facecolor=BLUE, edgecolor=BLUE), 'activations kept'),
                           (3.6, dict(facecolor='white', edgecolor=GREY, linestyle='--'), 'computed again'),
                           (7.0, dict(facecolor=ORANGE, edgecolor=ORANGE), 'features of a column')):
        box(axes, x, y, '', width=0.3, height=0.25, **style)
        axes.text(x + 0.35, y, text, va='center', fontsize=9)
    axes.set(xlim=(-4.2, 12.2), ylim=(-6.0, 0.7))
    axes.axis('off')
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == '__main__':
    draw_columns(IMAGES / 'columns.png')
    draw_training_ways(IMAGES / 'training_ways.png')
