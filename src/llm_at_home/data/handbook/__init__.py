"""The data set "handbook": questions on the handbook of an invented small company, Brindlemoor Bellworks."""
