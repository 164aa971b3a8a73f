"""Models of biology: genomes, alignments, structures. Stands on nn/ alone."""
