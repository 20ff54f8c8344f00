"""What runs a search: searcher, scheduler, observer, runner and packing."""
