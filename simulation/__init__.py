"""A guessing game of very many agents that are distributed over agent servers."""
