"""The forecast checkpoint: planned from headers alone, written in one pass, invisible until it is whole."""
