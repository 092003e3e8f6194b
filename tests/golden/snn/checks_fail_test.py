"""The SNN checks can fail: one changed number in a file of each kind is found."""

import pathlib
import re

import numpy as np
import pytest

from tests.golden import golden_test
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch
from tests.golden.snn import CHECKS

DATA = golden_test.COMMITTED / "snn"

# File, the part of it that is kept (for speed), the arrays to change, by how much: a few tolerances, or one.
CHANGES = [
    ("codes", "", ["bnum", "table_bnum", "idx_tau4", "nearest_tau9"], 1),
    ("codes", "", ["table512"], -2),
    ("binarize", "t4_", [f"t4_refine_{x}" for x in ("y", "dw", "dpatterns", "patterns_after")], 1e-5),
    ("binarize", "t4_plain", ["t4_plain_memory_after"], -2),
    ("binarize", "t4_plain", ["t4_plain_idx"], -1),
    ("binarize", "t4_plain", ["t4_plain_dw", "t4_plain_patterns_after"], 1e-5),
    ("hardconv", "t4_s2|react", [f"t4_s2_refine_{x}" for x in ("y", "dx", "dw", "dpatterns")], 1e-2),
    ("hardconv", "t4_s2|react", ["t4_s2_refine_alpha", "react_y", "react_dx", "react_dw"], 1e-2),
    ("refine", "many_t5", [f"many_t5__{x}" for x in ("bnum_before", "kept", "patterns_after", "bnum_after")], 1),
    ("refine", "many_t5", ["many_t5__n_missing"], 1),
    ("traj_conv_skip", "", ["loss", "patterns", "w", "patterns_grad"], 1e-2),
    ("traj_conv_skip", "", ["memory"], -2),
    ("traj_conv_skip", "", ["idx"], -1),
    ("traj_conv_r14wd", "", ["patterns"], 1e-3),
    ("activation", "", ["y", "dx", "dx_edge", "rsign_y", "rprelu_dx", "rprelu_dslope"], 1e-3),
    ("loss", "", ["kd", "kd_ds", "ce", "ce_ds"], 1e-4),
    ("loss", "", ["lr_E256", "lr_E128"], 1e-10),
    ("loss", "", ["top1", "top5", "light_out"], 1),
    ("block_s1", "c1_", [f"c1_{x}" for x in ("y", "dx", "grad.bn1.weight", "out.bn1.running_var", "y_eval")], 1e-1),
    ("block_s2", "c2_", ["c2_grad.binary_conv.binarize.patterns", "c2_out.binary_conv.binarize.patterns"], 1e-1),
]
# Which of a file's arrays decide what its check does: changed, the recorded results no longer follow.
CAUSES = [
    ("binarize", "t5_refine", "t5_refine_resample_idx", "t5_refine_patterns_after"),
    ("binarize", "t5_refine", "t5_refine_step_before", "t5_refine_: refinement follows from the counter"),
    ("refine", "many_t5", "many_t5__resample_idx", "many_t5__patterns_after"),
    ("traj_conv_r14wd", "", "event_resample_idx", "patterns"),
    ("traj_conv_r14wd", "", "step0", "pg_steps"),
    ("traj_conv_r14wd", "", "wd", "patterns"),
    ("binarize", "t4_plain", "t4_plain_memory_before", "t4_plain_memory_after"),
]


def run_check(path: pathlib.Path) -> None:
    """Runs the check of a file; unlike the test of golden files it does not ask whether the method is built."""
    check = next(check for pattern, check in CHECKS if re.fullmatch(pattern, path.stem))
    file, comparison = GoldenFile(path), Comparison()
    check(file, comparison)
    comparison.finish(file)


def arrays_of(kind: str, part: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{kind}.npz") as archive:
        return {name: archive[name] for name in archive.files if re.match(part, name)}


def changed(array: np.ndarray, amount: float) -> np.ndarray:
    """The array with its largest entry changed."""
    result = np.array(array)
    result.flat[np.argmax(result)] += np.array(amount).astype(result.dtype)
    return result


def save(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    path = folder / f"{name}.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("kind", "part", "names", "amount"), CHANGES, ids=[f"{kind}:{names[0]}" for kind, _, names, _ in CHANGES]
)
def test_a_changed_array_is_found(tmp_path, kind: str, part: str, names: list[str], amount: float) -> None:
    arrays = arrays_of(kind, part)
    path = save(tmp_path, kind, {**arrays, **{name: changed(arrays[name], amount) for name in names}})
    with pytest.raises(GoldenMismatch) as caught:
        run_check(path)
    assert [name for name in names if not any(what.startswith(name) for what in caught.value.found)] == []


@pytest.mark.parametrize(("kind", "part", "cause", "result"), CAUSES, ids=[f"{row[0]}:{row[2]}" for row in CAUSES])
def test_another_cause_has_another_result(tmp_path, kind: str, part: str, cause: str, result: str) -> None:
    arrays = arrays_of(kind, part)
    old = arrays[cause]
    # Drawn rows are reversed, counts and factors changed, signs turned.
    new = old[..., ::-1] if cause.endswith("resample_idx") else -old if "memory" in cause else old + 1
    with pytest.raises(GoldenMismatch) as caught:
        run_check(save(tmp_path, kind, {**arrays, cause: new}))
    assert result in caught.value.found


@pytest.mark.parametrize(("kind", "part"), sorted({(kind, part) for kind, part, *_ in [*CHANGES, *CAUSES]}))
def test_the_unchanged_part_passes(tmp_path, kind: str, part: str) -> None:
    run_check(save(tmp_path, kind, arrays_of(kind, part)))


def test_an_array_nobody_reads_is_found(tmp_path) -> None:
    arrays = {**arrays_of("refine", "many_t5"), "surprise": np.zeros(3)}
    with pytest.raises(GoldenMismatch, match="no check has read: surprise"):
        run_check(save(tmp_path, "refine", arrays))
