"""Longer windows without loss (LongRoPE2, arXiv:2502.20082): which rotary divisors, and how to train with them."""
