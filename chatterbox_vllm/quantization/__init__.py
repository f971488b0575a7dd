"""Quantisation: which method for which network (``policy``) and how it is asked for (``spellings``), matrices in few
bits (``matrices``), what they weigh (``estimate``) and how a checkpoint is converted (``awq``, ``packing``).

It lies below the stages, which use its methods and know nothing of spellings and strategies.
"""
