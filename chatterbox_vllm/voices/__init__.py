"""Voices: from a recording to what the models know of it, files of that, and the names they go by."""
