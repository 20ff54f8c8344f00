"""How the code of a network uses its weights."""
