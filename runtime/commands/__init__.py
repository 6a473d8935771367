"""The commands of `skipjack`."""
