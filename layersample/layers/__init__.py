"""The layers of a model: where they are, what happens to each, and what it costs to train them."""
