"""Checkpoints: what is restored, what is kept, and what damage, kills and a full disk do."""

import errno
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax import networks
from bnn_jax.errors import CheckpointError
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.storage import checkpoint, orbax_files
from bnn_jax.storage.checkpoint import CheckpointStore, describe
from bnn_jax.storage.content_hash import Header
from bnn_jax.training.state import TrainState
from tests.conftest import ROOT, mounted_disk


def tiny_state(step: int, *, size: int = 4) -> TrainState:
    """A state with few leaves, whose content is a function of the step."""
    values = jax.random.normal(jax.random.key(step), (size,))
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"dense": {"kernel": values}},
        batch_stats={},
        quant_state={"mask": jnp.arange(step, step + 3, dtype=jnp.uint8)},
        opt_state=(optax.TraceState(trace=values * 2), optax.EmptyState()),
        objective_state={},
        metric_sums={},
        rng=jax.random.key(7),
    )


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Path, type, shape and bytes of every leaf."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        rows.append((jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, data.tobytes()))
    return rows


def score(value: float) -> dict[str, float]:
    return {"selection_top1": value}


def saved_metrics(store: CheckpointStore, step: int) -> dict[str, float] | None:
    return Header.read(store.directory / str(step)).metrics


def save_all(folder: pathlib.Path, scores: dict[int, float | None]) -> None:
    """Saves tiny states at these steps; None is a save in the middle of an epoch."""
    with CheckpointStore(folder) as store:
        for step, value in scores.items():
            store.save(tiny_state(step), meta={"step": step}, metrics=None if value is None else score(value))


@pytest.fixture(scope="module")
def two_good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store with the good steps 1 and 2; copy it before damaging it."""
    folder = tmp_path_factory.mktemp("stage") / "checkpoints"
    save_all(folder, {1: 50.0, 2: 60.0})
    return folder


@pytest.fixture
def damageable(two_good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(two_good, tmp_path / "checkpoints"))


def restored_step(folder: pathlib.Path, which: Any = "last") -> int:
    """Restores from a read-only store and checks every bit."""
    with CheckpointStore(folder, read_only=True) as store:
        state, meta = store.restore(jax.eval_shape(lambda: tiny_state(0)), which=which)
    step = int(state.step)
    assert bits(state) == bits(tiny_state(step))
    assert meta == {"step": step}
    return step


# ---- round trip


@pytest.fixture(scope="module")
def real_state() -> TrainState:
    """ResNet-8 with every kind of leaf a stage may have."""
    quant = QuantSpec(weight=spec("pruned", inner=spec("dorefa", bits=1), amount=0.05), act=spec("dorefa", bits=1))
    network = networks.build(spec("resnet8"), quant, num_classes=10)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), QuantContext())
    assert variables["quant_state"]
    return TrainState(
        step=jnp.asarray(17, jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        quant_state=variables["quant_state"],
        opt_state=optax.sgd(0.1, momentum=0.9).init(variables["params"]),
        objective_state={
            "half": jnp.asarray([1.0, 2.5, -0.0], jnp.bfloat16),
            # NaN with a payload, a denormal, negative zero: equal bits are more than equal values.
            "odd": jax.lax.bitcast_convert_type(jnp.asarray([0x7FC00001, 1, 0x80000000], jnp.uint32), jnp.float32),
            "flags": jnp.asarray([True, False]),
            "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        },
        metric_sums={"count": jnp.asarray(5, jnp.int32)},
        rng=jax.random.key(7),
    )


def test_every_leaf_of_a_real_state_comes_back_bit_for_bit(real_state: TrainState, tmp_path: pathlib.Path) -> None:
    meta = {"epoch": 3, "note": "ü", "nested": {"rates": [0.1, 1e-8]}}
    with CheckpointStore(tmp_path / "new" / "checkpoints") as store:
        store.save(real_state, meta=meta, metrics={"selection_top1": 91.25, "test_loss": 0.5})
        restored, restored_meta = store.restore(real_state)
        assert saved_metrics(store, 17) == {"selection_top1": 91.25, "test_loss": 0.5}
    assert bits(restored) == bits(real_state)
    assert jax.tree.structure(restored) == jax.tree.structure(real_state)
    assert restored_meta == meta
    # The key is still a key: it draws the same numbers.
    assert jax.random.uniform(restored.rng) == jax.random.uniform(real_state.rng)


def test_abstract_target_restores_the_same(real_state: TrainState, tmp_path: pathlib.Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(real_state, meta={}, metrics=None)
        restored, _ = store.restore(jax.eval_shape(lambda: real_state))
    assert bits(restored) == bits(real_state)
    assert not restored.step.committed


def test_restored_arrays_go_where_the_target_is(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.eval_shape(lambda: tiny_state(0))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target)
    save_all(tmp_path, {1: None})
    with CheckpointStore(tmp_path, read_only=True) as store:
        restored, _ = store.restore(target)
        again, _ = store.restore(restored)
    for state in (restored, again):
        assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {sharding}
        assert bits(state) == bits(tiny_state(1))


def test_state_may_be_donated_while_it_is_being_saved(tmp_path: pathlib.Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = tiny_state(1, size=100_000).replace(rng={})
    expected = bits(state)
    with CheckpointStore(tmp_path) as store:
        store.save(state, meta={}, metrics=None)
        overwritten = overwrite(state)
        assert state.params["dense"]["kernel"].is_deleted()
        restored, _ = store.restore(jax.eval_shape(lambda: overwritten))
    assert bits(restored) == expected


def test_restored_arrays_share_no_buffer(two_good: pathlib.Path) -> None:
    with CheckpointStore(two_good, read_only=True) as store:
        first, _ = store.restore(tiny_state(0))
        second, _ = store.restore(first)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((first.params, second.params))]
    assert len(set(pointers)) == 2
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(first.replace(rng={}))
    assert bits(second) == bits(tiny_state(2))


def test_replicated_state_round_trips_over_several_devices(tmp_path: pathlib.Path) -> None:
    program = f"""
        import sys, jax
        sys.path.insert(0, {str(ROOT)!r})
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from tests.storage.checkpoint_test import CheckpointStore, bits, pathlib, tiny_state
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        state = jax.device_put(tiny_state(1), NamedSharding(mesh, PartitionSpec()))
        with CheckpointStore(pathlib.Path({str(tmp_path)!r})) as store:
            store.save(state, meta={{}}, metrics=None)
            restored, _ = store.restore(state)
        kernel = restored.params["dense"]["kernel"]
        assert kernel.sharding == NamedSharding(mesh, PartitionSpec())
        assert len({{shard.data.unsafe_buffer_pointer() for shard in kernel.addressable_shards}}) == 4
        assert bits(restored) == bits(tiny_state(1))
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_arrays_without_elements_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="zero size"), CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1).replace(params={"kernel": jnp.zeros((0, 3))}), meta={}, metrics=None)


@pytest.mark.parametrize("metrics", [{}, {"test_loss": 1.0}, score(float("nan"))])
def test_metrics_that_rank_nothing_are_refused(metrics: dict[str, float], tmp_path: pathlib.Path) -> None:
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="selection_top1"):
        store.save(tiny_state(1), meta={}, metrics=metrics)


# ---- what is kept


def test_last_two_and_best_are_kept(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: 10.0, 2: 90.0, 3: 20.0, 4: 30.0, 5: 40.0, 6: 35.0})
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps() == [2, 5, 6]
        assert (store.latest_step(), store.best_step()) == (6, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    assert restored_step(tmp_path) == 6
    assert restored_step(tmp_path, "best") == 2
    assert restored_step(tmp_path, 5) == 5


def test_a_new_best_releases_the_old_one(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: 10.0, 2: 20.0, 3: 30.0, 4: 25.0, 5: 24.0})
    assert CheckpointStore(tmp_path, read_only=True).steps() == [3, 4, 5]


def test_of_equal_scores_the_earlier_is_best(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: 10.0, 2: 50.0, 3: 50.0, 4: 50.0, 5: 50.0})
    store = CheckpointStore(tmp_path, read_only=True)
    assert store.steps() == [2, 4, 5]
    assert store.best_step() == 2


def test_best_is_remembered_by_a_new_process(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: 90.0, 2: 20.0})
    save_all(tmp_path, {3: 30.0, 4: 40.0})
    store = CheckpointStore(tmp_path, read_only=True)
    assert store.steps() == [1, 3, 4]
    assert store.best_step() == 1


def test_saves_without_metrics_neither_pile_up_nor_displace_the_best(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: 10.0, 2: 90.0, **dict.fromkeys(range(3, 8))})
    store = CheckpointStore(tmp_path, read_only=True)
    assert store.steps() == [2, 6, 7]
    assert store.best_step() == 2
    assert saved_metrics(store, 7) is None


def test_without_metrics_there_is_no_best(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, {1: None, 2: None})
    store = CheckpointStore(tmp_path, read_only=True)
    assert store.best_step() is None
    with pytest.raises(CheckpointError, match="no checkpoint of a finished epoch"):
        store.restore(tiny_state(0), which="best")


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [(None, 50.0, "second"), (50.0, None, "first"), (None, None, "second"), (50.0, 40.0, "second")],
)
def test_saving_a_step_again_keeps_the_one_with_metrics(
    first: float | None, second: float | None, kept: str, tmp_path: pathlib.Path
) -> None:
    with CheckpointStore(tmp_path) as store:
        for name, value in {"first": first, "second": second}.items():
            store.save(tiny_state(3), meta={"name": name}, metrics=None if value is None else score(value))
        assert store.restore(tiny_state(0))[1] == {"name": kept}
        assert store.steps() == [3]
        expected = {"first": first, "second": second}[kept]
        assert saved_metrics(store, 3) == (None if expected is None else score(expected))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# ---- damage


def files_of_newest(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in (folder / "2").rglob("*") if path.is_file())


def flip_byte(path: pathlib.Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def check_detected_or_harmless(folder: pathlib.Path, path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Restores; either the newest is intact bit for bit, or it is named in one warning and step 1 is used."""
    caplog.clear()
    step = restored_step(folder)  # checks every bit
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if step == 2:
        assert warnings == [], path
        return False
    assert step == 1
    assert len(warnings) == 1 and "\n" not in warnings[0], (path, warnings)
    assert warnings[0].startswith(f"{folder / '2'}: damaged checkpoint, left out: "), warnings
    return True


def test_a_flipped_byte_in_any_file_is_detected_or_harmless(
    damageable: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    detected = set()
    for path in files_of_newest(damageable):
        content = path.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            flip_byte(path, position)
            if check_detected_or_harmless(damageable, path, caplog):
                detected.add(path.relative_to(damageable / "2").parts[0])
            path.write_bytes(content)
    # Every item is protected; only Orbax's own notes beside them may change without effect.
    assert detected >= {"meta", "params", "quant_state", "opt_state", "rng", "step"}


@pytest.mark.parametrize("change", ["truncated", "emptied", "deleted"])
def test_a_truncated_or_missing_file_is_detected_or_harmless(
    change: str, damageable: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    detected = set()
    for path in files_of_newest(damageable):
        content = path.read_bytes()
        if change == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if change == "truncated" else b"")
        if check_detected_or_harmless(damageable, path, caplog):
            detected.add(path.relative_to(damageable / "2").parts[0])
        path.write_bytes(content)
    assert detected >= {"meta", "params", "quant_state", "opt_state", "rng", "step"}


def swap_content(folder: pathlib.Path, item: str) -> None:
    """Puts another, intact item in the place of one of step 2: no file is damaged, only the content is another."""
    shutil.rmtree(folder / "2" / item)
    shutil.copytree(folder / "1" / item, folder / "2" / item)


def test_intact_files_of_another_content_are_detected(damageable: pathlib.Path) -> None:
    swap_content(damageable, "params")
    with pytest.raises(CheckpointError, match="/2: damaged checkpoint: params does not match its hash"):
        CheckpointStore(damageable, read_only=True).restore(tiny_state(0), which=2)


@pytest.mark.parametrize("change", [('"selection_top1": 60.0', '"selection_top1": 10.0'), ('"step": 2}', '"step": 7}')])
def test_a_plausible_change_of_meta_is_detected(change: tuple[str, str], damageable: pathlib.Path) -> None:
    file = damageable / "2" / "meta" / "metadata"
    before = file.read_text()
    file.write_text(before.replace(*change))
    assert file.read_text() != before
    # Believed, the first would make another step the best, the second resume at another place.
    with pytest.raises(CheckpointError, match="/2: damaged checkpoint: meta does not match its hash"):
        CheckpointStore(damageable, read_only=True).restore(tiny_state(0), which="best")


def test_a_step_under_another_number_is_detected(damageable: pathlib.Path) -> None:
    shutil.copytree(damageable / "1", damageable / "3")
    assert restored_step(damageable) == 2


@pytest.mark.parametrize("which", ["best", 2])
@pytest.mark.parametrize("item", ["params", "meta"])
def test_best_and_numbered_checkpoints_have_no_substitute(which: Any, item: str, damageable: pathlib.Path) -> None:
    swap_content(damageable, item)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(damageable, read_only=True).restore(tiny_state(0), which=which)
    assert str(caught.value).startswith(f"{damageable / '2'}: damaged checkpoint: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", ["params", "meta"])
def test_all_damaged_is_an_error(item: str, damageable: pathlib.Path) -> None:
    for step in (1, 2):
        (damageable / str(step) / item).rename(damageable / str(step) / "elsewhere")
    store = CheckpointStore(damageable, read_only=True)
    with pytest.raises(CheckpointError, match=r"all checkpoints \(steps 1, 2\) are damaged"):
        store.restore(tiny_state(0))
    # Nobody may take this stage for one that never started.
    with pytest.raises(CheckpointError, match="are damaged"):
        store.latest_step()


def test_training_goes_on_over_a_damaged_newest(damageable: pathlib.Path) -> None:
    swap_content(damageable, "params")
    with CheckpointStore(damageable) as store:
        state, _ = store.restore(tiny_state(0))
        assert int(state.step) == 1
        assert store.steps() == [1]
        store.save(tiny_state(2), meta={"step": 2}, metrics=None)
        store.save(tiny_state(3), meta={"step": 3}, metrics=None)
    assert sorted(path.name for path in damageable.iterdir()) == ["1", "2", "2.damaged", "3"]
    assert restored_step(damageable) == 3
    assert restored_step(damageable, 2) == 2


def test_a_damaged_step_does_not_count_as_the_good_one_behind_the_newest(damageable: pathlib.Path) -> None:
    (damageable / "2" / "meta" / "metadata").write_text("{")
    save_all(damageable, {3: None})
    assert CheckpointStore(damageable, read_only=True).steps() == [1, 3]


# ---- another network, missing


def changed_params(**leaves: Any) -> TrainState:
    return tiny_state(0).replace(params=leaves)


@pytest.mark.parametrize(
    ("params", "phrase"),
    [
        ({"dense": {}}, r"params/dense/kernel float32 \(4,\) is only in it"),
        (
            {"dense": {"kernel": jnp.zeros(4), "bias": jnp.zeros(2)}},
            r"params/dense/bias float32 \(2,\) is missing in it",
        ),
        ({"dense": {"kernel": jnp.zeros((2, 2))}}, r"kernel is float32 \(4,\) in it and float32 \(2, 2\) here"),
        ({"dense": {"kernel": jnp.zeros(4, jnp.bfloat16)}}, r"is float32 \(4,\) in it and bfloat16 \(4,\) here"),
        ({"dense": {"kernel": jnp.zeros(4, jnp.int32)}}, r"is float32 \(4,\) in it and int32 \(4,\) here"),
    ],
    ids=["extra", "missing", "reshaped", "narrower type", "same-size type"],
)
def test_another_structure_is_another_network(params: Any, phrase: str, two_good: pathlib.Path) -> None:
    store = CheckpointStore(two_good, read_only=True)
    for restore in (
        lambda: store.restore(tiny_state(0).replace(params=params)),
        lambda: store.restore({"params": params}),
    ):
        with pytest.raises(CheckpointError, match=f"/2: checkpoint of another network: .*{phrase}") as caught:
            restore()
        assert "\n" not in str(caught.value)


def test_only_the_first_differences_are_shown(two_good: pathlib.Path) -> None:
    params = {"dense": {"kernel": jnp.zeros(4)}, **{f"new{i}": jnp.zeros(1) for i in range(9)}}
    with pytest.raises(CheckpointError, match=r"params/new2 float32 \(1,\) is missing in it \(and 6 more\)$"):
        CheckpointStore(two_good, read_only=True).restore({"params": params})


def test_another_optimiser_is_not_called_another_network(two_good: pathlib.Path) -> None:
    target = tiny_state(0).replace(opt_state=optax.EmptyState())
    with pytest.raises(CheckpointError, match=r"checkpoint of another optimiser.*opt_state/0/trace"):
        CheckpointStore(two_good, read_only=True).restore(target)


def test_a_key_of_another_generator_is_refused(two_good: pathlib.Path) -> None:
    target = tiny_state(0).replace(rng=jax.random.key(0, impl="rbg"))
    with pytest.raises(CheckpointError, match=r"rng is key<fry> \(\) in it and key<rbg> \(\) here"):
        CheckpointStore(two_good, read_only=True).restore(target)


def test_variables_are_restored_without_the_rest(two_good: pathlib.Path) -> None:
    expected = tiny_state(2)
    with CheckpointStore(two_good, read_only=True) as store:
        only_params, meta = store.restore({"params": jax.eval_shape(lambda: expected.params)})
        both, _ = store.restore({"params": expected.params, "batch_stats": {}, "quant_state": expected.quant_state})
    assert meta == {"step": 2}
    assert only_params.keys() == {"params"}
    assert bits(only_params["params"]) == bits(expected.params)
    assert both["batch_stats"] == {}
    assert bits(both["quant_state"]) == bits(expected.quant_state)


def test_a_collection_asked_for_as_empty_must_be_empty(two_good: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"another network: quant_state/mask uint8 \(3,\) is only in it"):
        CheckpointStore(two_good, read_only=True).restore({"params": tiny_state(0).params, "quant_state": {}})


def test_damage_elsewhere_does_not_keep_variables_from_being_read(damageable: pathlib.Path) -> None:
    shutil.rmtree(damageable / "2" / "opt_state")
    with CheckpointStore(damageable, read_only=True) as store:
        _, meta = store.restore({"params": tiny_state(0).params})
    assert meta == {"step": 2}


def test_any_part_of_a_state_is_restored_on_its_own(damageable: pathlib.Path) -> None:
    expected = tiny_state(2)
    shutil.rmtree(damageable / "2" / "params")
    with CheckpointStore(damageable, read_only=True) as store:
        target = jax.eval_shape(lambda: {"opt_state": expected.opt_state, "step": expected.step})
        items, meta = store.restore(target)
        assert store.restore({"step": expected.step}, which=1)[0]["step"] == 1
    assert meta == {"step": 2}
    assert items.keys() == {"opt_state", "step"}
    assert bits(items) == bits({"opt_state": expected.opt_state, "step": expected.step})


def test_a_part_of_another_set_up_is_refused(two_good: pathlib.Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"another optimiser, objective .*: objective_state/bank/rows .* is missing"
    ):
        CheckpointStore(two_good, read_only=True).restore({"objective_state": {"bank": {"rows": jnp.ones(2)}}})


def test_missing_steps_and_folders_are_named(two_good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="no step 9: there are 1, 2"):
        CheckpointStore(two_good, read_only=True).restore(tiny_state(0), which=9)
    empty = CheckpointStore(tmp_path / "nothing", read_only=True)
    assert (empty.steps(), empty.latest_step(), empty.best_step()) == ([], None, None)
    with pytest.raises(CheckpointError, match="nothing: no checkpoint here"):
        empty.restore(tiny_state(0))


# ---- interruption, read-only


def tree_of(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def interrupted(damageable: pathlib.Path) -> pathlib.Path:
    """Steps 1 and 2 and everything that killed processes may have left."""
    shutil.copytree(damageable / "2", damageable / "3.new.orbax-checkpoint-tmp")
    shutil.copytree(damageable / "1", damageable / "0.deleted")
    shutil.copytree(damageable / "1", damageable / "1.new")
    shutil.copytree(damageable / "1", damageable / "2.deleted")
    (damageable / "2").rename(damageable / "2.new")
    (damageable / "notes").mkdir()
    return damageable


def test_what_a_killed_process_left_is_ignored_and_cleaned_up(interrupted: pathlib.Path) -> None:
    with CheckpointStore(interrupted) as store:
        assert store.steps() == [1, 2]
    assert sorted(path.name for path in interrupted.iterdir()) == ["1", "2", "notes"]
    assert restored_step(interrupted) == 2


def test_read_only_changes_nothing(interrupted: pathlib.Path) -> None:
    before = tree_of(interrupted)
    with CheckpointStore(interrupted, read_only=True) as store:
        assert store.steps() == [1]
        store.restore(tiny_state(0))
        store.restore({"params": tiny_state(0).params})
        with pytest.raises(ValueError, match="opened read-only"):
            store.save(tiny_state(5), meta={}, metrics=None)
    assert tree_of(interrupted) == before


def test_read_only_leaves_a_damaged_store_alone(damageable: pathlib.Path) -> None:
    swap_content(damageable, "params")
    before = tree_of(damageable)
    assert restored_step(damageable) == 1
    assert tree_of(damageable) == before


def test_read_only_does_not_make_the_folder(tmp_path: pathlib.Path) -> None:
    with CheckpointStore(tmp_path / "a" / "b", read_only=True) as store:
        assert store.steps() == []
    assert list(tmp_path.iterdir()) == []


KILLED_PROGRAM = """
    import sys
    sys.path.insert(0, {root!r})
    from tests.storage.checkpoint_test import CheckpointStore, pathlib, score, tiny_state
    with CheckpointStore(pathlib.Path({folder!r})) as store:
        start = store.latest_step() or 0
        for step in range(start + 1, start + 10_000):
            state = tiny_state(step, size=20_000)
            # Twice at every other step: the replacement of a saved step is interrupted too.
            store.save(state, meta={{"step": step}}, metrics=None)
            if step % 2:
                store.save(state, meta={{"step": step}}, metrics=score(step % 5))
            if step > start + 1:
                print(step - 1, flush=True)  # saved by this process, and complete: the save of this step waited for it
"""


def test_kill_in_the_middle_of_saving_leaves_a_good_checkpoint(tmp_path: pathlib.Path) -> None:
    program = textwrap.dedent(KILLED_PROGRAM.format(root=str(ROOT), folder=str(tmp_path)))
    moments = random.Random(0)
    target = jax.eval_shape(lambda: tiny_state(0, size=20_000))
    reached = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            complete = int(child.stdout.readline())
            time.sleep(moments.uniform(0.1, 0.8))
            child.send_signal(signal.SIGKILL)
            complete = max([complete, *map(int, child.stdout.read().split())])
        assert child.returncode == -signal.SIGKILL
        with CheckpointStore(tmp_path) as store:
            state, meta = store.restore(target)
        step = int(state.step)
        assert step >= complete > reached, "a completed save was lost, or nothing was saved since the last kill"
        assert meta == {"step": step}
        assert bits(state) == bits(tiny_state(step, size=20_000))
        reached = step


# ---- failing saves


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MB."""
    with mounted_disk(tmp_path / "disk", 1) as folder:
        yield folder


def test_a_full_disk_is_one_line_and_the_checkpoint_before_survives(
    small_disk: pathlib.Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "checkpoints"
    with CheckpointStore(folder) as store:
        store.save(tiny_state(1, size=30_000), meta={"step": 1}, metrics=None)
        store.wait()
        for raise_error in (store.wait, lambda: store.save(tiny_state(3), meta={"step": 3}, metrics=None)):
            store.save(tiny_state(2, size=200_000), meta={"step": 2}, metrics=None)
            with pytest.raises(CheckpointError) as caught:
                raise_error()
            message = f"no space left on {folder} while step 2 was saved; the last good checkpoint is step 1"
            assert str(caught.value) == message
            # What was written of it is gone, so that the rest of the program can still write its results.
            assert [path.name for path in folder.iterdir()] == ["1"]
        restored, _ = store.restore(tiny_state(0, size=30_000))
        assert bits(restored) == bits(tiny_state(1, size=30_000))
        # Nobody writes on behind our back: the step that failed can be saved again, and is sound.
        store.save(tiny_state(2), meta={"step": 2}, metrics=None)
    assert restored_step(folder) == 2
    assert caplog.records == [], "Orbax's tracebacks would bury the one line"
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_keeps_the_step_that_was_to_be_replaced(small_disk: pathlib.Path) -> None:
    folder = small_disk / "checkpoints"
    with pytest.raises(CheckpointError, match="the last good checkpoint is step 1"), CheckpointStore(folder) as store:
        store.save(tiny_state(1), meta={"step": 1}, metrics=None)
        store.save(tiny_state(1, size=300_000), meta={"step": 1}, metrics=score(1.0))
    assert restored_step(folder) == 1
    assert [path.name for path in folder.iterdir()] == ["1"]


def fail_saving(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(orbax_files, "save", fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "^no space left on .*; there is no good checkpoint$"),
        (
            ValueError('RESOURCE_EXHAUSTED: Failed to write "/x" [OS error 28: No space left on device]'),
            "^no space left",
        ),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "^no space left"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "step 1 could not be saved: .*Permission denied; there is",
        ),
    ],
)
def test_errors_of_the_disk_are_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fail_saving(monkeypatch, error)
    with CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={}, metrics=None)
        with pytest.raises(CheckpointError, match=message):
            store.wait()
        store.wait()  # an error is raised once


def test_an_error_of_the_program_is_not_called_a_disk_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fail_saving(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"), CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={}, metrics=None)


def test_leaving_the_context_raises_the_error_of_the_last_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fail_saving(monkeypatch, OSError(errno.ENOSPC, "full"))
    with pytest.raises(CheckpointError, match="no space left"), CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={}, metrics=None)


def test_a_failed_save_does_not_hide_the_error_that_ends_the_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    fail_saving(monkeypatch, OSError(errno.ENOSPC, "full"))
    with pytest.raises(KeyboardInterrupt), CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={}, metrics=None)
        raise KeyboardInterrupt
    assert "no space left" in caplog.text


# ---- in the background


def test_save_returns_before_anything_is_written_and_leaving_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    may_write, write = threading.Event(), orbax_files.save

    def late(*args: Any) -> None:
        assert may_write.wait(30)
        write(*args)

    monkeypatch.setattr(orbax_files, "save", late)
    with CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={"step": 1}, metrics=None)
        assert store.steps() == []
        may_write.set()
    assert restored_step(tmp_path) == 1


def test_orbax_is_quiet(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        save_all(tmp_path, {1: 1.0, 2: None})
        restored_step(tmp_path)
    finally:
        absl.logging.set_verbosity(verbosity)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# ---- describe


def test_describe_finds_the_store_a_folder_means(two_good: pathlib.Path) -> None:
    assert describe(two_good.parent) == (two_good, None)
    assert describe(two_good) == (two_good, None)
    assert describe(two_good / "1") == (two_good, 1)


def test_describe_says_what_is_accepted(two_good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.txt"
    file.write_text("")
    for stage in ("00_w32a32", "01_w8a8"):
        shutil.copytree(two_good, tmp_path / "run" / stage / "checkpoints")
    for folder, message in {
        tmp_path / "absent": "absent: no such folder",
        file: "model.txt: a file; accepted is the folder of a stage",
        tmp_path: "no checkpoint here; accepted is the folder of a stage or of one step",
        tmp_path / "run": "a run of several stages; name the folder of one: 00_w32a32, 01_w8a8",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            describe(folder)


# ---- several processes


def test_of_several_processes_only_the_first_writes_or_cleans_up(tmp_path, monkeypatch):
    left = tmp_path / "3.deleted"
    left.mkdir()
    monkeypatch.setattr(checkpoint.hosts, "is_first", lambda: False)
    with CheckpointStore(tmp_path) as store:
        store.save(tiny_state(1), meta={}, metrics=None)
        store.wait()
        assert store.latest_step() is None
    assert [path.name for path in tmp_path.iterdir()] == [left.name]


def test_the_first_process_decides_which_step_is_restored(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            store.save(tiny_state(step), meta={"at": step}, metrics=None)
            store.wait()
        asked = []

        def from_first(name, decide):
            asked.append(name)
            return {"restored step": 1, "latest step": 7}[name]

        monkeypatch.setattr(checkpoint.hosts, "from_first", from_first)
        restored, meta = store.restore(tiny_state(0))
        assert (int(restored.step), meta) == (1, {"at": 1})
        assert store.latest_step() == 7
    assert asked == ["restored step", "latest step"]
