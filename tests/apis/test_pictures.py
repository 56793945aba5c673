# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Names of pictures."""
from revcol_mm.apis.pictures import distinct_names


def test_images_of_one_name_are_named_with_their_folders():
    assert distinct_names(['d/a/0.png', 'd/b/0.png', 'd/b/1.png']) == {'d/a/0.png': 'a_0.png', 'd/b/0.png': 'b_0.png'}


def test_no_two_names_are_the_same():
    paths = ['d/a/b/0.png', 'd/a_b/0.png', 'd/0.png', 'd/c/a_b_0.png']
    names = {path: path.rpartition('/')[2] for path in paths} | distinct_names(paths)
    assert len(set(names.values())) == len(paths)


def test_an_image_that_is_used_twice_keeps_its_name():
    assert distinct_names(['d/0.png', 'd/0.png']) == {}
