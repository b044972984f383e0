"""The story of a run, top to bottom: train, infer, evaluate, each in a child process of its own."""
