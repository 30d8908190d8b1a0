"""The command line, `python -m lcqat_min <command>`."""
