"""Decoding without Python in the way: a static cache, one fixed step for every token, captured as a CUDA graph.

``layers`` computes a step of a Llama-family decoder, ``kernels`` and ``reference`` are its operations in Triton and in
plain torch, ``slots`` holds the cache and the captured graphs.
"""
