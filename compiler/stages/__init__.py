"""The stages, one file each. A stage is a function of inputs and parameters; only what runs a job (pipeline, judge, tools) calls it,
and it never sees the target."""
