"""Training: state, optimisers, schedules, the step, the loop, checkpoints. One of each, for every method."""
