"""What the ranks of a job send each other: counted, and calculated from the layout."""
