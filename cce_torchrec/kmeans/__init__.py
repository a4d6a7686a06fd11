"""K-means over the distinct (main row, helper row) pairs of a CCE chunk."""
