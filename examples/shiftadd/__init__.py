"""Softmax, hashed attention, shift layers and mixtures, trained (docs/shiftadd.md)."""
