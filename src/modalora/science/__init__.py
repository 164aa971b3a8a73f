"""Networks of the natural sciences, on the mathematics of nn alone."""
