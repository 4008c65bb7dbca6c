"""Generation of tokens and text: the key-value cache, sampling, decoding."""
