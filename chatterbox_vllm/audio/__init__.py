"""Sound in and out: reading recordings within limits, encoding speech as it comes, tempo, the watermark."""
