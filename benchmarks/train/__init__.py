"""A small restoration model that learns to take one instrument out of a mixture."""
