"""The compiled part: products of packed weights and whole decoder steps in C, and what calls them."""
