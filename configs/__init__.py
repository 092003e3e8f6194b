"""Configs: one file per experiment; ``common`` holds the sections they share."""
