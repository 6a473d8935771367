"""The engine, the decoding loop and the methods."""
