"""What a machine is: its profile, how to measure one, and what to expect of it."""
