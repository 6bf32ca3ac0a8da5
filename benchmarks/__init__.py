"""Speed and memory, measured by hand. A package, or one of that name elsewhere would be taken."""
