"""Headless runs over the same core as the nodes: distil, sample, inspect."""
