"""Kernels: the fused operations of a decoder, each beside its plain reference."""
