"""The functions of ``bnn_jax.experiment`` do a whole run, as ``launch.py`` does it."""

from bnn_jax import experiment
from bnn_jax.deploy import load

# As tests.integration.launching.TWO_RUNGS, whose compiled programs are used again.
TWO_RUNGS = {"asbq.bits": (32, 1), "asbq.learning_rates": (0.1, 0.02), "asbq.epochs": (2,)}


def test_a_run_from_its_config_to_a_file_that_classifies(tmp_path, capsys):
    config = experiment.load_config("quickstart:smoke", TWO_RUNGS)
    trained = experiment.train(config, tmp_path)
    assert [stage["stage"] for stage in trained["stages"]] == ["w32a32", "w1a1"]
    assert experiment.evaluate(config, tmp_path)["top1"] == trained["stages"][-1]["last_top1"]
    assert experiment.summary(config)["total"]["quantized_bits"] == trained["stages"][-1]["quantized_weight_bits"]
    assert experiment.report(config, tmp_path)["picture"] == str(tmp_path / "chain.png")
    exported = experiment.export(config, tmp_path, output=tmp_path / "net.bnn")
    assert load(exported["path"]).image_shape == (16, 16, 3)
    # The tables that the command line prints.
    assert {"Stages", "Results"} <= {line.strip() for line in capsys.readouterr().out.splitlines()}
