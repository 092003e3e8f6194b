"""The BASQ checks can fail: one changed number in a file of each kind is found."""

import pathlib

import numpy as np
import pytest

from tests.golden import golden_test
from tests.golden.comparison import GoldenMismatch

DATA = golden_test.COMMITTED / "basq"

# Kind of file, the array to change, by how much: a few tolerances.
CHANGES = [
    ("quant_basq_act", "c0_y", 1e-5),
    ("quant_basq_act", "c1_dalpha", 1e-3),
    # What is exactly on the threshold gets no gradient.
    ("quant_basq_act", "edge_dx", 1.0),
    ("quant_lsq_weight", "c0_dw", 1e-5),
    ("quant_lsq_weight", "c1_ds", 1e-4),
    ("quant_lsq_weight", "c2_s_init", 1e-4),
    ("quant_lsq_weight", "c0_thd", 1),
    ("quant_lsq_act", "c0_y", 1e-5),
    ("quant_lsq_act", "c1_ds", 1e-4),
    ("quant_lsq_act", "c2_thd", 1),
    ("qtconv", "c1_y", 1e-3),
    ("qtconv", "c3_dw_flat", 1e-2),
    ("flexconn", "c2_y", 1e-4),
    ("flexconn", "c7_dx", 1e-4),
    ("kd_loss", "c0_loss", 1e-3),
    ("kd_loss", "c1_dstudent", 1e-4),
    ("schedules", "supernet_lr_Tmax1000", 1e-6),
    ("schedules", "finetune_lr", 1e-7),
    ("evolution", "small/fold0/evals", 1),
    ("evolution", "small/fold0/fulls", 1),
    ("evolution", "small/fold0/rng_after", 1),
    ("evolution", "full_seed0/fold1/visited", 1),
    ("kfold", "c2_fold_acc", 0.1),
    ("kfold", "c0_full_acc", 0.01),
    ("kfold", "c2_tail_batches_in_no_fold", 1),
]


def changed(path: pathlib.Path, name: str, amount: float) -> dict[str, np.ndarray]:
    """The file's arrays with the last entry of one of them changed."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    array = arrays[name].copy()
    array[(-1,) * array.ndim] += np.array(amount).astype(array.dtype)
    return {**arrays, name: array}


@pytest.mark.parametrize(("kind", "name", "amount"), CHANGES, ids=[f"{kind}:{name}" for kind, name, _ in CHANGES])
def test_a_changed_number_is_found(tmp_path, kind: str, name: str, amount: float) -> None:
    path = tmp_path / "basq" / f"{kind}.npz"
    path.parent.mkdir()
    np.savez(path, **changed(DATA / f"{kind}.npz", name, amount))
    with pytest.raises(GoldenMismatch) as caught:
        golden_test.check_file(path, lambda *_: None)
    assert any(found.startswith(name) for found in caught.value.found), caught.value.found


def test_every_committed_kind_is_changed() -> None:
    assert {kind for kind, _, _ in CHANGES} == {path.stem for path in DATA.glob("*.npz")}
