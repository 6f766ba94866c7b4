"""How much of the merged fp32 model the bundle keeps: data, comparison, tasks."""
