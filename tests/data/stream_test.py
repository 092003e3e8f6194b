import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bnn_jax import data, picture_files
from bnn_jax.data import augment, stream
from bnn_jax.data.order import Purpose, random_bits
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

COUNT, SIZE = 23, 24


class Pictures:
    """Records in memory."""

    name, description = "pictures", "made by a test"

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def read(self, numbers):
        return [self.contents[number] for number in numbers]

    def name_of(self, number):
        return f"pictures, image {number}"

    def labels(self, numbers):
        return np.array([self.contents[number][1] for number in numbers], np.int32)


@pytest.fixture(scope="module")
def contents():
    return makers.small_pictures(COUNT, seed=0)


@pytest.fixture(scope="module")
def split(contents):
    return stream.StreamedSplit(Pictures(contents), np.arange(COUNT), SIZE)


@pytest.fixture(scope="module")
def stored_split(contents, tmp_path_factory):
    """A split whose records can be read by other processes too, which cannot import what a test defines."""
    folder = makers.write_imagenet(tmp_path_factory.mktemp("sets"), contents, contents[:4])
    spec = DataSpec("imagenet2012", augment="random_resized_crop_flip", options=(("image_size", SIZE),))
    return data.build(spec, data_dir=str(folder)).train


def _plan(rows, width, seed=0):
    return np.random.default_rng(seed).integers(0, COUNT, (rows, width)).astype(np.int32)


def _all(batches):
    images, labels = zip(*batches)
    return np.stack(images), np.stack(labels)


def test_batches_follow_the_plan(split, contents):
    plan = _plan(3, 5)
    images, labels = _all(split.batches(plan))
    assert (images.dtype, labels.dtype, images.shape) == (np.uint8, np.int32, (3, 5, SIZE, SIZE, 3))
    np.testing.assert_array_equal(labels, split.labels[plan])
    for row, columns in enumerate(plan):
        for column, number in enumerate(columns):
            np.testing.assert_array_equal(
                images[row, column],
                picture_files.evaluation_image(contents[number][0], SIZE),
                err_msg=f"{row}, {column}",
            )


@pytest.mark.parametrize("width", [stream.PIECE - 1, stream.PIECE, 2 * stream.PIECE + 1])
def test_rows_of_any_width_are_whole(split, width):
    plan = _plan(2, width)
    images, labels = _all(split.batches(plan))
    assert images.shape == (2, width, SIZE, SIZE, 3)
    np.testing.assert_array_equal(labels, split.labels[plan])


def test_a_random_crop_depends_on_seed_epoch_and_number_of_the_image_alone(split, contents):
    plan = np.array([[3, 7, 3]])
    (images,), _ = _all(split.batches(plan, random_crops=(5, 2)))
    np.testing.assert_array_equal(images[0], images[2])
    bits = random_bits(5, 2, purpose=Purpose.CROP, count=augment.NUM_DRAWS, item=7)
    np.testing.assert_array_equal(images[1], augment.training_image(contents[7][0], SIZE, bits, decoder="pillow"))
    for other in ((5, 3), (6, 2)):
        (changed,), _ = _all(split.batches(plan, random_crops=other))
        assert (changed != images).any(axis=(1, 2, 3)).all()


def test_neither_the_width_of_a_batch_nor_a_slice_of_its_columns_nor_where_one_begins_changes_an_image(split):
    plan = _plan(4, 12)
    images, labels = _all(split.batches(plan, random_crops=(0, 1)))
    narrow, _ = _all(split.batches(plan.reshape(12, 4), random_crops=(0, 1)))
    np.testing.assert_array_equal(narrow.reshape(images.shape), images)
    part, part_labels = _all(split.batches(plan[:, 3:9], random_crops=(0, 1)))
    np.testing.assert_array_equal(part, images[:, 3:9])
    np.testing.assert_array_equal(part_labels, labels[:, 3:9])
    rest, _ = _all(split.batches(plan[2:], random_crops=(0, 1)))
    np.testing.assert_array_equal(rest, images[2:])


def test_images_keep_their_number_when_some_are_taken(split):
    mask = np.arange(COUNT) % 3 == 1
    taken, numbers = split.take(mask), np.flatnonzero(mask)
    assert len(taken) == mask.sum() and taken.image_shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(taken.labels, split.labels[mask])
    ours = _all(taken.batches(np.array([[0, 2, 1]]), random_crops=(0, 0)))
    theirs = _all(split.batches(numbers[[[0, 2, 1]]], random_crops=(0, 0)))
    np.testing.assert_array_equal(ours[0], theirs[0])
    again = taken.take(np.array([2, 0]))
    np.testing.assert_array_equal(again.labels, split.labels[numbers[[2, 0]]])


@pytest.mark.parametrize("cores", [1, 7])
def test_the_number_of_threads_changes_nothing(split, monkeypatch, cores):
    plan = _plan(5, 20)
    expected = _all(split.batches(plan, random_crops=(0, 0)))
    monkeypatch.setattr(stream, "available_cores", lambda: cores)
    found = _all(split.batches(plan, random_crops=(0, 0)))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.slow
def test_processes_give_what_threads_give(stored_split):
    plan = _plan(3, 20)
    threads = _all(stored_split.batches(plan, random_crops=(0, 4)))
    processes = _all(stored_split.batches(plan, random_crops=(0, 4), workers=2))
    np.testing.assert_array_equal(processes[0], threads[0])
    np.testing.assert_array_equal(processes[1], threads[1])


def _readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def _gone(found):
    """Whether nothing is found any more, after a while: the machine may be busy; what is not told to stop stays."""
    end = time.monotonic() + 20
    while found() and time.monotonic() < end:
        time.sleep(0.02)
    return not found()


def test_leaving_the_loop_ends_the_threads(split):
    for _ in split.batches(_plan(50, 8)):
        assert _readers()
        break
    assert _gone(_readers)


def test_only_what_is_soon_needed_is_read(split):
    read = []

    class Counted(Pictures):
        def read(self, numbers):
            read.extend(numbers)
            return super().read(numbers)

    counted = stream.StreamedSplit(Counted(split.records.contents), np.arange(COUNT), SIZE)
    batches = counted.batches(_plan(200, 4))
    assert not read
    next(batches)
    batches.close()
    # One batch, two ahead, and one for each thread.
    assert 4 <= len(read) <= 4 * (1 + 2 * stream.BATCHES_AHEAD + stream.available_cores())


@pytest.mark.slow
def test_closing_ends_the_processes(stored_split):
    batches = stored_split.batches(_plan(50, 8), workers=1)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 1
    batches.close()
    assert _gone(lambda: [child for child in children if child.is_alive()])


@pytest.mark.slow
def test_a_process_that_was_killed_is_an_error_of_one_line(stored_split):
    batches = stored_split.batches(_plan(200, 8), workers=1)
    next(batches)
    (child,) = multiprocessing.active_children()
    child.kill()
    with pytest.raises(DataError, match="a process that reads images was ended from outside") as raised:
        list(batches)
    assert "\n" not in str(raised.value)


def test_an_empty_plan_has_no_batches(split):
    assert list(split.batches(np.zeros((0, 4), np.int32))) == []


@pytest.mark.parametrize("plan", [np.arange(4), np.array([[COUNT]]), np.array([[-1]])])
def test_a_plan_of_other_images_is_refused(split, plan):
    with pytest.raises(ValueError, match=f"for {COUNT} images"):
        split.batches(plan)


@pytest.mark.parametrize("decoder", ["pillow", "opencv"])
@pytest.mark.parametrize("random_crops", [None, (0, 0)])
@pytest.mark.parametrize("content", [b"no picture", b""], ids=["other bytes", "nothing"])
def test_a_damaged_image_is_named(contents, content, random_crops, decoder):
    if decoder == "opencv":
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    pictures = Pictures([*contents[:5], (content, 0)])
    damaged = stream.StreamedSplit(pictures, np.arange(6), SIZE, decoder)
    with pytest.raises(DataError, match=r"^pictures, image 5: the image is corrupt \(") as raised:
        list(damaged.batches(np.array([[0, 5]]), random_crops=random_crops))
    assert "\n" not in str(raised.value)


def test_a_truncated_image_is_damaged(contents):
    whole = contents[0][0]
    damaged = stream.StreamedSplit(Pictures([(whole[: len(whole) // 2], 0)]), np.arange(1), SIZE)
    for random_crops in (None, (0, 0)):
        with pytest.raises(DataError, match="pictures, image 0: the image is corrupt"):
            list(damaged.batches(np.array([[0]]), random_crops=random_crops))


def test_readers_are_handed_to_processes_without_labels(stored_split):
    stored_split.labels
    reader = stream.PieceReader(stored_split.records, _plan(2, 3), SIZE, "pillow", None)
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy(1)[0], reader(1)[0])
    assert len(pickle.dumps(stored_split.records)) < 1000


KILLED_PROGRAM = """
import multiprocessing, signal, sys, os
import numpy as np
from bnn_jax import data
from bnn_jax.stages import DataSpec
spec = DataSpec("imagenet2012", augment="none", options=(("image_size", 24),))
batches = data.build(spec, data_dir=sys.argv[1]).train.batches(np.zeros((100, 4), int), workers=1)
next(batches)
(child,) = multiprocessing.active_children()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_outlives_sigterm_for_a_while(stored_split):
    batches = stored_split.batches(_plan(30, 4), workers=1)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGTERM)  # as a batch system does to every process of a job
    for _ in range(20):
        next(batches)
    batches.close()


@pytest.mark.slow
def test_a_process_does_not_outlive_the_program_it_reads_for(stored_split):
    folder = stored_split.records.folder.parent.parent
    program = subprocess.run(
        [sys.executable, "-c", KILLED_PROGRAM, str(folder)], capture_output=True, text=True, timeout=100
    )
    assert program.returncode == -signal.SIGKILL, program.stderr
    process = pathlib.Path(f"/proc/{int(program.stdout)}")
    if not process.parent.is_dir():
        pytest.skip("processes are not listed in /proc")
    assert _gone(process.exists)
