"""Energy, memory and time: each meter yields readings that name their method."""
