"""Changes valid files at random and reads them: whatever is in a file, the answer is its content or one line.

    python benchmarks/fuzz.py [--seconds=60] [--seed=0] [--readers=json,pytorch,safetensors,npz]

`json`: the files of a run folder, made of the shapes that `bnn_jax/run_files.py` declares, with another value, field or
byte; what is accepted is handed to those who read it. `pytorch`: checkpoints with other bytes, in the file and in the
pickle within. `safetensors` and `npz`: other bytes, headers with other values. A finding is an error that is no
UserError, or an answer after more than `SLOW` seconds. The last line is one JSON object; the exit status is 1 with
findings, each of which is printed with the number of its case: the same seed makes the same cases.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import run_files
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import flatten
from bnn_jax.experiment.results import best_of
from bnn_jax.report import tables
from bnn_jax.search.evolution import Evolution, Settings, restored_rng
from bnn_jax.stages import differing_keys
from bnn_jax.storage import other_files
from bnn_jax.training import metrics
from bnn_jax.training.seeds import table_row
from tests.storage.torch_writer import Opcodes, assemble, save, saved, write, write_legacy

SLOW = 5.0
SETTINGS = Settings(genes=3, choices=4, population=4, mutations=1, crossovers=1, parents=2, generations=3)
CANDIDATES: tuple[Any, ...] = (0, 1, 2, "name", "MT19937", {"a": {"b": [1, "c"]}}, list(range(624)))
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 0.5, 99, 101, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x", "[/b]", "\ud800", "a\nb", "9" * 300, [], {}, [[]], [1, "x"], {"x": 1}, {"": {}}),
)


def example(shape: Any) -> Any:
    """A value that has a shape."""
    if isinstance(shape, run_files.Value):
        return next(value for value in CANDIDATES if shape.test(value))
    if isinstance(shape, dict):
        return {name.removesuffix("?"): example(part) for name, part in shape.items()}
    return [example(part) for part in shape]


def changed(value: Any, draw: random.Random) -> Any:
    """The value with one part of it replaced, removed or given twice."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice(JUNK)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    kind = draw.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.2 and isinstance(copy, list):
        copy.append(copy[key])
    else:
        copy[key] = changed(value[key], draw)
    return copy


def other_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes, up to three pieces of them replaced, removed or repeated."""
    result = bytearray(data)
    for _ in range(draw.randint(0, 3)):
        place, length = draw.randrange(len(result) + 1), draw.choice((1, 1, 1, 2, 8, 200))
        piece = [draw.randbytes(length), b"", bytes(result[place : place + length]) * draw.choice((2, 50)), b"[" * 2000]
        result[place : place + length] = draw.choices(piece, (8, 2, 2, 0.2))[0]
    return bytes(result)


# ---- the files of a run folder, and what is done with their content


def use_results(content: dict[str, Any]) -> None:
    tables.show(tables.results_table([content]), file=io.StringIO())


def use_config(content: dict[str, Any]) -> None:
    differing_keys(flatten(content["config"]), {"seed": 1})
    differing_keys(content["stages"], [{}], "stages")


def use_state(content: dict[str, Any]) -> None:
    evolution = Evolution.from_state(SETTINGS, content["evolution"])
    if content["evolution"]["evaluated"] and not evolution.finished:
        evolution.ask()


def read_json(shape: Any, use: Callable[[Any], object]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        if (content := run_files.read(path, shape)) is not None:
            use(content)

    return read


def read_records(path: Path) -> None:
    if records := metrics.read(path):
        best_of(metrics.read(path, epochs=len(records)))
        metrics.write_csv([table_row(record) for record in records], path.with_suffix(".csv"))
        metrics.cut_back(path, 1)


PATH = run_files.vector(SETTINGS.genes, SETTINGS.choices)
JSON_FILES: dict[str, tuple[Any, Callable[[Path], None]]] = {
    "config": (run_files.CONFIG, read_json(run_files.CONFIG, use_config)),
    "trained": (run_files.TRAINED, read_json(run_files.TRAINED, use_results)),
    "winner": (run_files.WINNER, read_json(run_files.WINNER, use_results)),
    "searched": (run_files.SEARCHED, read_json(run_files.SEARCHED, use_results)),
    "record": (run_files.record(), read_records),
    "fold": (run_files.fold(0, PATH), read_json(run_files.fold(0, PATH), lambda found: restored_rng(found["rng"]))),
    "state": (run_files.search_state(PATH), read_json(run_files.search_state(PATH), use_state)),
}


def json_case(draw: random.Random, path: Path) -> Callable[[Path], None]:
    """Writes a changed file of a run folder and tells who reads it."""
    shape, read = JSON_FILES[draw.choice(list(JSON_FILES))]
    content = example(shape)
    for _ in range(draw.randint(0, 2)):
        content = changed(content, draw)
    # A digit limit of Python's holds for writing too.
    text = json.dumps(content).encode() if content is not JUNK[9] else b"9" * 5000
    path.write_bytes(text if draw.random() < 0.7 else other_bytes(text, draw))
    return read


# ---- PyTorch's files


def read_arrays(path: Path) -> None:
    for array in other_files.read_arrays(path).values():
        array.copy()


def pytorch_case(draw: random.Random, path: Path) -> Callable[[Path], None]:
    """Writes a changed checkpoint of either format and tells who reads it."""
    array = np.arange(36, dtype=np.float32).reshape(2, 2, 3, 3)
    state = {
        "conv1.weight": array,
        "bn1.running_mean": array[0, 0, 0],
        "bn1.running_var": array[0, 0, 1],
        "fc.weight": array[0, 0],
    }
    content, records = saved(state)
    kind = draw.random()
    if kind < 0.5:
        pickled = other_bytes(assemble(content), draw)
        write(
            path, Opcodes(pickled), {key: other_bytes(raw, draw) if kind < 0.1 else raw for key, raw in records.items()}
        )
        return read_arrays
    if kind < 0.75:
        save(path, state)
    else:
        write_legacy(path, content, records)
    path.write_bytes(other_bytes(path.read_bytes(), draw))
    return read_arrays


# ---- files of arrays

ARRAYS = {"params/conv1/kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 2, 2), "params/fc/bias": np.arange(3.0)}


def safetensors_case(draw: random.Random, path: Path) -> Callable[[Path], None]:
    """Writes a changed file of safetensors and tells who reads it."""
    content = safetensors.numpy.save(ARRAYS, metadata={"format": "np"})
    if draw.random() < 0.5:
        path.write_bytes(other_bytes(content, draw))
        return read_arrays
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(draw.randint(0, 2)):
        header = changed(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return read_arrays


def npz_case(draw: random.Random, path: Path) -> Callable[[Path], None]:
    """Writes a changed file of numpy's, within its arrays or around them, and tells who reads it."""
    inside = draw.random() < 0.5
    with zipfile.ZipFile(path, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, array in ARRAYS.items():
            file = io.BytesIO()
            np.save(file, array)
            content = other_bytes(file.getvalue(), draw) if inside else file.getvalue()
            # A name without a date: the same case has the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content)
    if not inside:
        path.write_bytes(other_bytes(path.read_bytes(), draw))
    return read_arrays


READERS = {"json": json_case, "pytorch": pytorch_case, "safetensors": safetensors_case, "npz": npz_case}


def try_case(make: Callable[[random.Random, Path], Callable[[Path], None]], name: str, folder: Path) -> str:
    """'read', 'refused', or what is wrong with the answer to the case that the name draws."""
    path = folder / "case.json"
    read = make(random.Random(name), path)
    begin = time.process_time()
    try:
        read(path)
        answer = "read"
    except UserError:
        answer = "refused"
    except Exception:
        return f"{name}: {traceback.format_exc()}"
    seconds = time.process_time() - begin
    return answer if seconds <= SLOW else f"{name}: {answer} after {seconds:.1f} s"


def fuzz(readers: list[str], *, seed: int, seconds: float) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Tries cases until the time is over.

    Returns:
      How many cases of each reader were read and refused, and the findings.
    """
    counts, findings = {name: {"read": 0, "refused": 0} for name in readers}, []
    end, number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for name in readers:
                answer = try_case(READERS[name], f"{name} {seed} {number}", Path(folder))
                if answer in counts[name]:
                    counts[name][answer] += 1
                else:
                    findings.append(answer)
            number += 1
    return counts, findings


def main() -> int:
    """Parses the command line, prints findings and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--readers", default=",".join(READERS), help=f"which of {', '.join(READERS)}")
    options = parser.parse_args()
    counts, findings = fuzz(options.readers.split(","), seed=options.seed, seconds=options.seconds)
    for finding in findings[:20]:
        print(finding, file=sys.stderr)
    print(json.dumps({"seed": options.seed, "cases": counts, "findings": len(findings)}))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
