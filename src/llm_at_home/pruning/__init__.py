"""Pruning in one shot: which weights of a dense model become zero, and the checkpoints that this leaves."""
