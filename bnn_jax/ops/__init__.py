"""Pure array functions: arrays in, arrays out; no modules, no config, no state."""
