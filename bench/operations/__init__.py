"""Each operation of the kernels beside what this machine can do."""
