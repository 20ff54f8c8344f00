"""What `import slimfront` offers of searches: running one, and reading one that was run."""

from slimfront.search.python_api.found import Member, Search
from slimfront.search.python_api.running import load, search

__all__ = ["Member", "Search", "load", "search"]
