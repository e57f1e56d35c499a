"""Other ways to few steps, written from their papers, on the same models with the same budget of network evaluations."""
