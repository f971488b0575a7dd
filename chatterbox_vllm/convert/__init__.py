"""``chatterbox-vllm quantize``: a checkpoint whose T3 is in few bits (``command``), with AWQ's calibration."""

from chatterbox_vllm.convert.command import main, parser, quantize

__all__ = ["main", "parser", "quantize"]
