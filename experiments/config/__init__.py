"""Configs of runs: fields, presets and the command line."""
