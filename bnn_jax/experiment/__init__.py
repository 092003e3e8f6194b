"""Experiments: a config becomes stages, stages are built, trained, evaluated and reported."""
