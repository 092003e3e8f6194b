import numpy as np
import pytest

from bnn_jax.data.memory import Split, fingerprint, limit
from bnn_jax.errors import DataError


def test_fingerprint_sees_pixels_labels_and_which_split_they_are_in():
    images, labels = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32)
    split, other = Split(images, labels), Split(images + np.uint8(1), labels)
    variants = [(split, other), (other, split), (split, split), (split, other, None), (split, None, other)]
    variants.append((split, Split(images, labels[::-1])))
    assert len({fingerprint(*splits) for splits in variants}) == len(variants) - 1
    assert fingerprint(split, other) == fingerprint(split, other, None)


def test_limit_names_the_key_the_value_and_what_is_accepted():
    assert limit("digits train", "num_train", asked=None, available=7) == 7
    assert limit("digits train", "num_train", asked=5, available=7) == 5
    for asked in (0, 8):
        with pytest.raises(DataError, match=rf"config.data.num_train={asked}: digits train has 7 images.*1 to 7"):
            limit("digits train", "num_train", asked=asked, available=7)
