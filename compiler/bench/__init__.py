"""Side-by-side benchmarks: this project and its peers, each in a process of its own, asked in turn in one run."""
