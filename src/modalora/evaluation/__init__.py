"""How good a model is, in the figures of its field, with intervals."""
