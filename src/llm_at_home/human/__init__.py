"""People's grades: the blind rating page, where its grades are kept, and what they come to."""
