"""Figures that the project states, each made by `python -m bench NAME`."""
