import numpy as np

from benchmarks import scaling


def stage(losses: list[list[float]], value: float) -> dict:
    return {"losses": np.asarray(losses), "variables": {"params/w": np.asarray([1.0, value])}}


def test_differences_are_relative_for_losses_and_absolute_for_variables():
    first, other = stage([[2.0, 4.0], [1.0, 1.0]], 3.0), stage([[2.0, 4.0], [1.1, 1.0]], 2.5)
    found = scaling.compare(other, first)
    np.testing.assert_allclose(found["loss_difference"], 0.1)
    assert found["variable_difference"] == 0.5
    assert scaling.compare(first, first) == {"loss_difference": 0.0, "variable_difference": 0.0}


def test_devices_are_forced_on_a_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert scaling.environment(4)["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=4"
