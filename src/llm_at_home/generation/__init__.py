"""Engines that turn conversations into replies, and the terminal chat."""
