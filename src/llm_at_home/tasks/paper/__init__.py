"""The whole paper in one command: which runs there are, what they will take, and ours beside the published figures."""
