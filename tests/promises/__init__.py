"""What five other projects' guides promise their users works here by the same names: a test for each promise.

    a    "BNB Quantization for Chatterbox TTS"                       use_bnb_quantization
    b    "Ultra-Low VRAM Mode", chatterbox-vllm2                     flags, CHATTERBOX_*, use_quantization
    c    "Bitsandbytes Quantization Implementation Report"           strategies
    d    "BitsAndBytes Integration Guide", KaniTTS-vLLM              config.py, quantization="bitsandbytes"
    e    "INT8 Quantization", chatterbox-tts-api                     USE_INT8_QUANTIZATION, /config, /memory

Code is called as their guides write it. What only a GPU can do ends here where the GPU would begin: ``started`` shows
what would be loaded.
"""
