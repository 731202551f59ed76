"""What spreads a model over processes, and what it must be told of a switch."""
