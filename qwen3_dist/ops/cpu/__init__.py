"""Kernels for CPU ranks: C++ that is compiled on the machine it runs on."""
