"""The hot paths as operations of PyTorch: what they compute, and Triton kernels for where those win.

One file a path: affinity, correlation, scma, spectral. An operation stands for the mathematics; dispatch.py says which
implementation runs. Imports neither Triton nor CUDA by itself.
"""
