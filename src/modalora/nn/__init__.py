"""Tensor mathematics that has never heard of Phi."""
