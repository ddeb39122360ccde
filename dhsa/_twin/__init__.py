"""Definitions in NumPy float64 that the twins of methods (`dhsa.methods`) and `dhsa.reference` build on."""
