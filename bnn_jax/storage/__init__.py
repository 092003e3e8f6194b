"""What is kept on disk: checkpoints, weights in use, released files."""
