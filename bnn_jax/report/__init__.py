"""Reports: cost of a network per layer, tables of stages and results, weight levels in use, plots."""
