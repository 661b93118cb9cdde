"""Which parts of a result the oracle looks at: the beginning, the end, and parts nobody can know beforehand."""

_WINDOW_ELEMENTS = 1 << 18  # what a window holds at most, if a row is not larger


def row_windows(images, height, row_elements, pick, windows=4):
    """(image, range of rows): the first rows of the first image, the last rows of the last one, and random ones.

    Small results are taken whole.
    """
    rows = max(1, min(height, _WINDOW_ELEMENTS // row_elements))
    if images * -(-height // rows) <= windows:
        return [(n, range(r, min(r + rows, height))) for n in range(images) for r in range(0, height, rows)]
    chosen = [(0, range(rows)), (images - 1, range(height - rows, height))]
    while len(chosen) < windows:
        first = pick.randint(0, height - rows)
        chosen.append((pick.randrange(images), range(first, first + rows)))
    return chosen


def image_pick(images, pick, most=3):
    """Images: the last, and random ones."""
    others = pick.sample(range(images - 1), min(most - 1, images - 1))
    return [images - 1, *others]


def channel_pick(channels, pick, most=3):
    """Channels: the first, the last, and random ones, in order."""
    if channels <= most:
        return list(range(channels))
    return sorted({0, channels - 1, *(pick.randrange(channels) for _ in range(most - 2))})
