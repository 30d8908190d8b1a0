"""Products of inputs with packed codes, on CPUs and GPUs."""
