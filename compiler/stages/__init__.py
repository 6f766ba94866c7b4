"""The stages, one file each: functions of inputs and parameters. Only what runs a job (pipeline, judge, tools) calls them; none sees the target."""
