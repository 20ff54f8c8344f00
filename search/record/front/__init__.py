"""The front of a search: which networks are on it, which of them matter, which one to take, and
which ones people are shown."""
