"""A guessing game among very many agents, distributed over agent servers."""
