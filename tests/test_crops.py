import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.data.crops import non_overlapping_crops


def test_crops_are_consecutive_and_the_tail_is_dropped():
    starts, record = non_overlapping_crops([2400, 599, 600, 1900], [0, 5000, 6000, 7000], 600)
    assert starts.tolist() == [0, 600, 1200, 1800, 6000, 7000, 7600, 8200]
    assert record.tolist() == [0, 0, 0, 0, 2, 3, 3, 3]


def test_no_record_long_enough_gives_no_crop():
    starts, record = non_overlapping_crops([10, 20], [0, 10], 600)
    assert len(starts) == len(record) == 0
    with pytest.raises(ValueError, match="at least 1"):
        non_overlapping_crops([10], [0], 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20), st.integers(1, 1000))
def test_non_overlapping_crops(lengths, window):
    offsets = np.cumsum([0, *lengths])[:-1]
    starts, owner = non_overlapping_crops(lengths, offsets, window)
    expected = [
        (offset + k * window, i)
        for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
        for k in range(length // window)
    ]
    assert list(zip(starts, owner, strict=True)) == expected
