"""The vocoder stage: S3Gen's inference, written anew for batches and streams.

``stage`` is the way in (``Vocoder``, ``Utterance``, ``Chunk``), ``worker`` its front for asyncio and ``schedule`` says
how a stream is cut. Of the networks, ``encoder``, ``estimator`` and ``flow`` make a mel spectrogram of speech tokens,
``source`` and ``hift`` make samples of that; ``noise`` is their only randomness.
"""
