"""Predicts what a run will take of a GPU's memory, by parts, before anything is loaded."""
