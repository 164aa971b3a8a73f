"""Networks of structural biology and genomics; they stand on `nn` alone."""
