"""Learning: what a person's data say, as tokens and labels, and adapters that come of them."""
