"""Which device a run uses, what it can do, and what else is present on the machine."""
