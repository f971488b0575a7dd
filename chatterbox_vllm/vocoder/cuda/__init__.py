"""The vocoder's networks on a CUDA card: what the modules of the same names one folder up compute, many times faster.

``backend`` is the way in. ``encoder`` and ``estimator``, with ``kernels``, ``tiling`` and ``graphs``, are the flow in
half precision; ``hift`` and ``hift_kernels`` are HiFT. Weights are taken from the networks one folder up, which remain
the definition of what is right.
"""
