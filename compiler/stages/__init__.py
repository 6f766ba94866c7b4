"""The stages, one file each. A stage is a function of inputs and parameters; only `pipeline` calls it, and it never sees the target."""
