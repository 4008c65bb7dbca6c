"""Generation of tokens and text: key-value cache, sampling, decoding."""
