"""Headless runs: the same core as the nodes, from the command line."""
