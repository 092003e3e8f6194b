import json

from benchmarks import seeds


def test_both_sides_take_the_same_steps_and_are_timed_in_one_run(tmp_path, capsys):
    file = tmp_path / "seeds.json"
    # resnet8 on 2 x 4 images: what is compiled is what takes the time.
    seeds.main(
        ["--network=resnet8", "--bits=32", "--seeds=2", "--batch_size=4", "--steps=2", "--rounds=1", f"--json={file}"]
    )
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["bits"], row["seeds"], row["steps"]) == (32, 2, 2)
    assert row["together_milliseconds"] > 0 and row["alone_milliseconds"] > 0 and row["ratio"] > 0
    # Six steps from the same states; rounding of batches of four grows, but other steps would differ by 0.01.
    assert row["largest_difference"] < 1e-3
    assert len(capsys.readouterr().out.splitlines()) == 2
