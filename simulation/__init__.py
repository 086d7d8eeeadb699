"""A guessing game between very many agents, spread over agent servers."""
